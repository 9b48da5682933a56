//! Interleavings and configurations that once went wrong, as they were found in review.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use common::{BASE, Batch, DATA, Guest, M2, no_ad, range, request};
use mmu_core::access::Access;
use mmu_core::addr::Level;
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::frame::CACHE_CAPACITY;
use mmu_core::slot::{SlotFlags, SlotRequest};
use mmu_core::spte::{Capabilities, Ept};
use mmu_model::AccessKind::{Fetch, Write};

/// B zaps gfn 7 and finds gfn 5 emptied by A, whose flush is not over: B's flush must cover both.
#[test]
fn an_unmap_flushes_what_another_one_emptied_also_when_it_emptied_something_itself() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), M2, Level::L1);
    guest.map([BASE + 5, BASE + 7], Write, Level::L1);
    guest.host().take_batches();
    let (started, has_started) = mpsc::channel::<()>();
    let (go, may_go) = mpsc::channel::<()>();
    let may_go = Mutex::new(may_go);
    let first = AtomicBool::new(true);
    let hold = move |_: &Batch| {
        if first.swap(false, Ordering::SeqCst) {
            started.send(()).unwrap();
            may_go.lock().unwrap().recv().unwrap();
        }
    };
    guest.host().before_flush(Some(Arc::new(hold)));
    let mmu = Arc::clone(&guest.mmu);
    let other = std::thread::spawn(move || {
        let mut actor = mmu.vm().actor().unwrap();
        let _ = mmu.unmap(&mut actor, range(BASE + 5, BASE + 6));
    });
    has_started.recv().unwrap();
    let _ = guest.unmap(range(BASE, BASE + 10));
    let batches = guest.host().take_batches();
    let covered = batches.iter().skip(1).any(|batch| batch.covers(range(BASE + 5, BASE + 6)));
    go.send(()).unwrap();
    other.join().unwrap();
    assert!(covered, "returned before the flush of gfn 5 was over: {batches:?}");
}

/// Huge leaves are not executable under the mitigation; a fetch gets a small one instead of the
/// same fault for ever.
#[test]
fn a_fetch_under_the_nx_mitigation_ends_in_a_small_executable_leaf() {
    let capabilities = Capabilities { nx_huge_pages: true, ..Capabilities::ept() };
    let mut guest = Guest::<Ept>::with_memory(capabilities, M2, Level::L2);
    guest.map([BASE + 1], Write, Level::L2);
    // The split gives X back to the children, so the walk finds the access permitted below.
    let outcome = guest.fault(BASE + 3, Fetch, Level::L3);
    assert!(matches!(outcome, FaultOutcome::Fixed | FaultOutcome::Spurious), "{outcome:?}");
    let (level, spte) = guest.entry(BASE + 3);
    assert_eq!(level, Level::L1);
    let config = guest.mmu.config();
    assert!(config.permits(spte, Access::EXEC), "{spte:?}");
}

#[test]
fn a_cache_refuses_more_frames_than_it_holds_and_keeps_what_it_had() {
    let guest = Guest::<Ept>::with_memory(Capabilities::ept(), M2, Level::L1);
    let pool = guest.mmu.vm().pool();
    let mut actor = guest.mmu.vm().actor().unwrap();
    let before = pool.frames_in_use();
    let error = actor.top_up(CACHE_CAPACITY + 1).expect_err("too many");
    assert_eq!(error.wanted, CACHE_CAPACITY as u64 + 1);
    drop(actor);
    assert_eq!(pool.frames_in_use(), before, "frames leaked");
}

/// Where entries are access-tracked, a prefaulted leaf is not writable, so nothing in it says that
/// the small pages it replaced were written.
#[test]
fn a_prefaulted_huge_page_keeps_what_was_used_and_written_before_it() {
    for capabilities in [Capabilities::ept(), no_ad(Capabilities::ept())] {
        prefaulted_huge_page(capabilities);
    }
}

fn prefaulted_huge_page(capabilities: Capabilities) {
    let mut guest = Guest::<Ept>::with_memory(capabilities, M2, Level::L2);
    guest.map([BASE + 1], Write, Level::L1);
    let huge = PageFault::prefetch(common::gpa(BASE + 1), Access::READ).at_most(Level::L2);
    assert_eq!(guest.vcpu.fault(&huge), Ok(FaultOutcome::Fixed));
    assert_eq!(guest.entry(BASE + 1).0, Level::L2);
    let all = guest.unmap(range(BASE, BASE + M2));
    assert_eq!((all.leaves, all.young, all.dirty), ([0, 1, 0], M2, M2));
    guest.finish();
}

/// The set that is not live kept the log until the slots changed again.
#[test]
fn the_memory_of_a_log_goes_when_logging_ends_or_the_slot_does() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), M2, Level::L1);
    let logged = request(0, BASE, M2, DATA, SlotFlags::LOG_DIRTY);
    let plain = request(0, BASE, M2, DATA, SlotFlags::empty());
    let gone = SlotRequest { bytes: 0, ..plain };
    for end in [plain, gone] {
        let _ = guest.set_slot(&logged).expect("legal");
        let weak = {
            let writer = guest.slots.lock().unwrap();
            let meta = writer.live().meta(0, 0).expect("logged");
            Arc::downgrade(meta.log().expect("logged"))
        };
        let _ = guest.set_slot(&end).expect("legal");
        assert_eq!(weak.strong_count(), 0, "{end:?}");
    }
    guest.finish();
}
