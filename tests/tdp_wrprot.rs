//! Write protection of one gfn: what it clears, what it flushes, and that nobody writes unseen.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::runner::Runner;
use common::{BASE, DATA, Guest, M2, Modelled, Shape, StopOnDrop, TestHost};
use common::{code, gpa, linear, range, request};
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::slot::{SlotFlags, SlotRequest, TrackError};
use mmu_core::spte::{Capabilities, Ept};
use mmu_model::{AccessKind, Caches, Random, SoftCpu};
use tdp_mmu::wrprot::TrackWriteError;
use tdp_mmu::{TdpMmu, TdpVcpu};

fn protect<F: Modelled>(guest: &mut Guest<F>, gfn: u64, min_level: Level) -> bool {
    guest.mmu.write_protect_gfn(&mut guest.actor, 0, Gfn::new(gfn), min_level)
}

fn one(gfn: u64) -> GfnRange {
    range(gfn, gfn + 1)
}

/// Was a flush of `range` complete since the last question?
fn flushed<F: Modelled>(guest: &Guest<F>, range: GfnRange) -> bool {
    guest.host().take_batches().iter().any(|batch| batch.covers(range))
}

fn protects<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, 4 * M2, Level::L2);
    guest.map([BASE, BASE + 1], AccessKind::Write, Level::L1);
    guest.map([BASE + M2], AccessKind::Write, Level::L2);
    let _ = guest.host().take_batches();
    assert!(protect(&mut guest, BASE, Level::L1));
    assert!(flushed(&guest, one(BASE)), "before the call returns");
    let (_, spte) = guest.entry(BASE);
    assert!(!guest.config().is_writable(spte) && !guest.config().is_mmu_writable(spte));
    assert!(guest.config().is_dirty(spte), "what was written was written");
    assert!(guest.found(BASE + 1).expect("mapped").writable, "the neighbour");
    assert!(guest.touch(BASE, AccessKind::Write).is_err());
    assert!(guest.touch(BASE, AccessKind::Read).is_ok());
    // Nothing left to do.
    assert!(!protect(&mut guest, BASE, Level::L1));
    assert!(!protect(&mut guest, BASE + 3 * M2, Level::L1), "not mapped");
    assert!(!protect(&mut guest, u64::MAX, Level::L1) && !protect(&mut guest, 0, Level::L5));
    // A huge leaf as a whole, a small one not when only huge ones are asked for.
    assert!(!protect(&mut guest, BASE + 1, Level::L2));
    assert!(protect(&mut guest, BASE + M2 + 9, Level::L2));
    assert!(flushed(&guest, range(BASE + M2, BASE + 2 * M2)), "all that the leaf maps");
    assert!(!guest.found(BASE + M2).expect("mapped").writable);
    // Nobody tracks the page, so a fault may make it writable again; not the lockless path.
    assert_eq!(guest.fault(BASE, AccessKind::Write, Level::L1), FaultOutcome::Fixed);
    assert!(guest.found(BASE).expect("mapped").writable);
    guest.check();
    guest.finish();
}

#[test]
fn protection_takes_the_right_to_grant_writes_and_flushes_before_it_returns() {
    for_each_format!(protects);
}

/// The dirty log left the page without W but with the right to grant it; its flush may not have
/// been made (B21).
fn protects_what_the_log_protected<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, M2, Level::L1);
    guest.slot(0, BASE, M2, DATA, SlotFlags::LOG_DIRTY);
    guest.map([BASE], AccessKind::Read, Level::L1);
    let (_, spte) = guest.entry(BASE);
    let config = guest.config();
    assert!(!config.is_writable(spte) && config.is_mmu_writable(spte), "as the log leaves it");
    let _ = guest.host().take_batches();
    assert!(protect(&mut guest, BASE, Level::L1));
    assert!(flushed(&guest, one(BASE)), "a processor may still write through its TLB");
    let (_, spte) = guest.entry(BASE);
    assert!(!guest.config().is_mmu_writable(spte));
    guest.check();
    guest.finish();
}

#[test]
fn a_page_without_w_is_protected_and_flushed_all_the_same() {
    for_each_format!(protects_what_the_log_protected);
}

#[test]
fn protection_stays_in_its_address_space() {
    let mut guest = Guest::<Ept>::with(Shape { spaces: 2, ..Shape::new(Capabilities::ept()) });
    guest.host().set_resolver(linear(Level::L1));
    let slot = request(0, BASE, M2, DATA, SlotFlags::empty());
    let _ = guest.set_slot(&slot).expect("a legal slot");
    let _ = guest.set_slot(&SlotRequest { as_id: 1, ..slot }).expect("another");
    let mut smm = TdpVcpu::new(&guest.mmu, 1).expect("room");
    let root = smm.load_root().expect("a root").address().get();
    let write = PageFault::new(gpa(BASE), code(AccessKind::Write, false));
    assert_eq!(smm.fault(&write), Ok(FaultOutcome::Fixed));
    guest.map([BASE], AccessKind::Write, Level::L1);
    assert!(protect(&mut guest, BASE, Level::L1));
    assert!(!guest.found(BASE).expect("mapped").writable);
    assert!(guest.found_in(root, BASE).expect("mapped").writable);
    drop(smm);
    guest.finish();
}

/// What two threads that protect the same page at the same time may rely on: the second to come
/// finds nothing to do, and must not return before the first one's flush.
#[test]
fn who_finds_the_page_protected_waits_for_the_flush_all_the_same() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), M2, Level::L1);
    guest.map([BASE], AccessKind::Write, Level::L1);
    let core = guest.host().add_core(SoftCpu::new(&guest.format, 0, Caches::unlimited()));
    let root = guest.root_register();
    core.lock().unwrap().cpu.set_root(root);
    let write = mmu_model::Access::user(AccessKind::Write);
    guest.host().delay_flushes(Duration::from_micros(300));
    let mmu = Arc::clone(&guest.mmu);
    let can_write = |mmu: &TdpMmu<Ept, TestHost>| {
        core.lock().unwrap().cpu.access(mmu.vm().host(), BASE << 12, write).is_ok()
    };
    for turn in 0..200 {
        // Once through the TLB, so that only a flush ends it.
        guest.map([BASE], AccessKind::Write, Level::L1);
        assert!(can_write(&mmu), "turn {turn}");
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut actor = mmu.vm().actor().expect("room");
                    let _ = mmu.write_protect_gfn(&mut actor, 0, Gfn::new(BASE), Level::L1);
                    assert!(!can_write(&mmu), "turn {turn}: through a stale translation");
                });
            }
        });
    }
    drop(mmu);
    guest.check();
    guest.finish();
}

fn enable<F: Modelled>(guest: &mut Guest<F>) {
    let mut slots = guest.slots.lock().unwrap();
    let actor = &mut guest.actor;
    guest.mmu.vm().enable_write_tracking(&mut slots, actor).expect("memory");
}

fn track<F: Modelled>(guest: &mut Guest<F>, gfn: u64) -> Result<(), TrackWriteError> {
    guest.mmu.track_write(&mut guest.actor, 0, Gfn::new(gfn))
}

fn untrack<F: Modelled>(guest: &mut Guest<F>, gfn: u64) -> Result<(), TrackWriteError> {
    guest.mmu.untrack_write(&mut guest.actor, 0, Gfn::new(gfn))
}

fn tracks<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, 2 * M2, Level::L2);
    let page = BASE + 5;
    assert_eq!(track(&mut guest, page), Err(TrackWriteError::NotEnabled));
    enable(&mut guest);
    guest.map([BASE, BASE + M2], AccessKind::Write, Level::L2);
    let _ = guest.host().take_batches();
    track(&mut guest, page).expect("memory");
    assert!(flushed(&guest, range(BASE, BASE + M2)));
    assert!(!guest.found(page).expect("mapped").writable);
    assert!(guest.found(BASE + M2).expect("mapped").writable, "the other block");
    // Every write to it is reported, reads pass, and its neighbours are small pages now.
    for _ in 0..3 {
        let outcome = guest.fault(page, AccessKind::Write, Level::L2);
        assert_eq!(outcome, FaultOutcome::WriteProtected);
        assert_eq!(guest.fault(page + 1, AccessKind::Write, Level::L2), FaultOutcome::Fixed);
        guest.map([page], AccessKind::Read, Level::L2);
        let (tracked, beside) = (guest.found(page), guest.found(page + 1));
        assert_eq!(tracked.map(|f| (f.level, f.writable)), Some((1, false)));
        assert_eq!(beside.map(|f| (f.level, f.writable)), Some((1, true)));
        let _ = guest.unmap(range(BASE, BASE + M2));
    }
    // Counted: the last one to let go lets writes through, and huge pages come back.
    track(&mut guest, page).expect("memory");
    untrack(&mut guest, page).expect("counted");
    let outcome = guest.fault(page, AccessKind::Write, Level::L2);
    assert_eq!(outcome, FaultOutcome::WriteProtected);
    untrack(&mut guest, page).expect("counted");
    guest.map([page], AccessKind::Write, Level::L2);
    let found = guest.found(page).expect("mapped");
    assert_eq!((found.level, found.writable), (2, true));
    let error = TrackError::NotTracked { gfn: Gfn::new(page) };
    assert_eq!(untrack(&mut guest, page), Err(TrackWriteError::Count(error)));
    let (space, gfn) = (0, Gfn::new(BASE - 1));
    assert_eq!(track(&mut guest, BASE - 1), Err(TrackWriteError::NoSlot { space, gfn }));
    guest.check();
    guest.finish();
}

#[test]
fn a_tracked_page_reports_each_write_and_is_in_no_huge_page() {
    for_each_format!(tracks);
}

#[test]
fn counts_go_with_their_slot_and_hold_in_every_address_space() {
    let mut guest = Guest::<Ept>::with(Shape { spaces: 2, ..Shape::new(Capabilities::ept()) });
    guest.host().set_resolver(linear(Level::L1));
    enable(&mut guest);
    // A slot that comes later has counts too.
    let slot = request(0, BASE, M2, DATA, SlotFlags::empty());
    let _ = guest.set_slot(&slot).expect("a legal slot");
    let _ = guest.set_slot(&SlotRequest { as_id: 1, ..slot }).expect("another");
    let mut smm = TdpVcpu::new(&guest.mmu, 1).expect("room");
    let _ = smm.load_root().expect("a root");
    let write = PageFault::new(gpa(BASE), code(AccessKind::Write, false));
    assert_eq!(smm.fault(&write), Ok(FaultOutcome::Fixed));
    track(&mut guest, BASE).expect("memory");
    let again = PageFault::new(gpa(BASE), code(AccessKind::Write, true));
    assert_eq!(smm.fault(&again), Ok(FaultOutcome::WriteProtected), "mapped before, protected");
    // Logging on and off keeps the count; moving the slot loses it, with the mappings.
    for flags in [SlotFlags::LOG_DIRTY, SlotFlags::empty()] {
        let _ = guest.set_slot(&SlotRequest { flags, ..slot }).expect("legal");
        let outcome = guest.fault(BASE, AccessKind::Write, Level::L1);
        assert_eq!(outcome, FaultOutcome::WriteProtected, "{flags:?}");
    }
    let _ = guest.set_slot(&SlotRequest { base: gpa(BASE + M2), ..slot }).expect("legal");
    let _ = guest.set_slot(&slot).expect("legal");
    assert_eq!(guest.fault(BASE, AccessKind::Write, Level::L1), FaultOutcome::Fixed);
    drop(smm);
    guest.finish();
}

const PAGES: u64 = 24;

/// Increment words until told to stop; how many increments, and how many were caught.
fn writer(
    mmu: &Arc<TdpMmu<Ept, TestHost>>,
    format: &mmu_model::Format,
    words: &[AtomicU64],
    seed: u64,
    stop: &AtomicBool,
) -> (u64, u64) {
    let mut random = Random::new(seed);
    let core = mmu.vm().host().add_core(SoftCpu::new(format, 0, Caches::unlimited()));
    let mut runner = Runner::new(mmu, core, seed);
    let _stop = StopOnDrop(stop);
    let (mut writes, mut caught) = (0, 0);
    while !stop.load(Ordering::Acquire) {
        let gfn = BASE + random.below(PAGES);
        let count = |pa: u64| {
            words[(pa / 4096 - DATA) as usize].fetch_add(1, Ordering::SeqCst);
        };
        let passed = runner.access(
            gfn,
            AccessKind::Write,
            || random.chance(1, 2),
            count,
            |outcome| outcome.expect("no error") == FaultOutcome::WriteProtected,
        );
        *(if passed { &mut writes } else { &mut caught }) += 1;
    }
    (writes, caught)
}

#[test]
fn a_page_tracked_in_one_space_keeps_huge_pages_out_of_the_other() {
    let mut guest = Guest::<Ept>::with(Shape { spaces: 2, ..Shape::new(Capabilities::ept()) });
    guest.host().set_resolver(linear(Level::L2));
    enable(&mut guest);
    let slot = request(1, BASE, 2 * M2, DATA, SlotFlags::empty());
    // In the second space only the count of the first can be what is asked.
    let _ = guest.set_slot(&SlotRequest { as_id: 1, ..slot }).expect("a legal slot");
    let _ = guest.set_slot(&slot).expect("another");
    track(&mut guest, BASE + 3).expect("memory");
    let mut smm = TdpVcpu::new(&guest.mmu, 1).expect("room");
    let _ = smm.load_root().expect("a root");
    for gfn in [BASE + 7, BASE + M2] {
        let read = PageFault::new(gpa(gfn), code(AccessKind::Read, false));
        assert_eq!(smm.fault(&read), Ok(FaultOutcome::Fixed));
    }
    let walk = |guest: &mut Guest<Ept>, gfn: u64| {
        guest.mmu.lookup(&mut guest.actor, 1, Gfn::new(gfn)).last().map(|(level, _)| *level)
    };
    assert_eq!(walk(&mut guest, BASE + 7), Some(Level::L1), "beside the tracked page");
    assert_eq!(walk(&mut guest, BASE + M2), Some(Level::L2), "in the next block");
    drop(smm);
    guest.finish();
}

/// Two processors write all the time; a third thread tracks pages and watches them.
#[test]
fn no_write_to_a_tracked_page_goes_unseen() {
    for (caps, seed) in
        [(Capabilities::ept(), 0x5eed), (common::no_ad(Capabilities::ept()), 0x5eee)]
    {
        println!("seed {seed:#x}");
        let mut guest = Guest::<Ept>::with_memory(caps, M2, Level::L2);
        guest.host().record(false);
        enable(&mut guest);
        let words: Vec<AtomicU64> = (0..M2).map(AtomicU64::new).collect();
        let stop = AtomicBool::new(false);
        let (mmu, format) = (Arc::clone(&guest.mmu), guest.format);
        let mut random = Random::new(seed);
        let figures: Vec<(u64, u64)> = std::thread::scope(|scope| {
            let (mmu, format, words, stop) = (&mmu, &format, &words[..], &stop);
            let writers: Vec<_> = (1..3)
                .map(|n| scope.spawn(move || writer(mmu, format, words, seed + n, stop)))
                .collect();
            let _stop = StopOnDrop(stop);
            for turn in 0..600 {
                let page = random.below(PAGES);
                track(&mut guest, BASE + page).expect("memory");
                let before = words[page as usize].load(Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(random.below(300)));
                let after = words[page as usize].load(Ordering::SeqCst);
                assert_eq!(before, after, "seed {seed:#x} turn {turn}: page {page} was written");
                untrack(&mut guest, BASE + page).expect("counted");
                if turn % 50 == 0 {
                    // So that there are huge leaves again.
                    let _ = guest.unmap(range(BASE, BASE + M2));
                }
                assert!(!stop.load(Ordering::Acquire), "seed {seed:#x}: a writer ended");
            }
            stop.store(true, Ordering::Release);
            writers.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        println!("writes and catches {figures:?}");
        assert!(figures.iter().all(|(writes, caught)| *writes > 100 && *caught > 0));
        drop(mmu);
        guest.check();
        guest.finish();
    }
}
