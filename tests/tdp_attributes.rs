//! Memory attributes: what a change takes away and what it leaves, what faults make of it, and a
//! guest that must never see a page of the other kind.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::runner::Runner;
use common::{BASE, Core, DATA, Guest, M2, Modelled, Shape, StopOnDrop, TestHost};
use common::{code, gpa, linear, range};
use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::attributes::{AttributeError, Attributes};
use mmu_core::fault::{EmulateReason, FaultError, FaultOutcome, PageFault};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept, Npt, SpteFormat};
use mmu_core::stats::Counter;
use mmu_model::{AccessKind, Caches, Random, SoftCpu};
use tdp_mmu::{TdpMmu, ZapReport};

const BLOCKS: u64 = 4;

fn set<F: Modelled>(guest: &mut Guest<F>, range: GfnRange, attributes: Attributes) -> ZapReport {
    let mut slots = guest.slots.lock().unwrap();
    let actor = &mut guest.actor;
    guest.mmu.set_attributes(slots.attributes(), actor, range, attributes).expect("a change")
}

fn private<F: Modelled>(guest: &mut Guest<F>, gfn: u64) -> Result<FaultOutcome, FaultError> {
    let fault = PageFault::new(gpa(gfn), code(AccessKind::Read, false)).private();
    guest.vcpu.fault(&fault)
}

fn memory_fault(gfn: u64, private: bool) -> FaultError {
    FaultError::MemoryFault { gpa: gpa(gfn), size: 4096, private }
}

fn converts<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, BLOCKS * M2, Level::L2);
    let blocks = || (0..BLOCKS).map(|block| BASE + block * M2);
    guest.map(blocks(), AccessKind::Write, Level::L2);
    let page = BASE + M2 + 7;
    let one = range(page, page + 1);
    let report = set(&mut guest, one, Attributes::PRIVATE);
    assert_eq!(report.leaves, [0, 1, 0], "the huge leaf around the page, nothing else");
    for block in blocks() {
        let level = guest.found(block).map(|found| found.level);
        assert_eq!(level, (block != BASE + M2).then_some(2), "{block:#x}");
    }
    // The other pages of the block come back one by one, the page itself as private only.
    assert_eq!(guest.try_fault(page, AccessKind::Read, Level::L3), Err(memory_fault(page, false)));
    assert_eq!(guest.fault(page + 1, AccessKind::Write, Level::L3), FaultOutcome::Fixed);
    assert_eq!(guest.found(page + 1).map(|found| found.level), Some(1));
    assert_eq!(private(&mut guest, page), Ok(FaultOutcome::Fixed));
    assert_eq!(guest.found(page).map(|found| found.level), Some(1));
    // Mapped now, and still not for everybody, on no path.
    assert_eq!(guest.try_fault(page, AccessKind::Read, Level::L3), Err(memory_fault(page, false)));
    let write = PageFault::new(gpa(page), code(AccessKind::Write, true));
    assert_eq!(guest.vcpu.fault(&write), Err(memory_fault(page, false)));
    assert_eq!(private(&mut guest, page + 1), Err(memory_fault(page + 1, true)));
    assert_eq!(private(&mut guest, page), Ok(FaultOutcome::Spurious));
    // Nothing to do: nothing is done.
    let (owed, zapped) = (guest.stat(Counter::FlushOwed), guest.stat(Counter::LeavesZapped));
    assert_eq!(set(&mut guest, one, Attributes::PRIVATE), ZapReport::default());
    assert_eq!(guest.stat(Counter::FlushOwed), owed);
    assert_eq!(guest.stat(Counter::LeavesZapped), zapped);
    // Alike again, so one entry again.
    assert_eq!(set(&mut guest, one, Attributes::empty()).leaves, [1, 0, 0]);
    guest.map([page], AccessKind::Write, Level::L2);
    assert_eq!(guest.found(page).map(|found| found.level), Some(2));
    let all = range(BASE, BASE + BLOCKS * M2);
    assert_eq!(set(&mut guest, all, Attributes::PRIVATE).leaves, [0, BLOCKS, 0]);
    assert_eq!(private(&mut guest, page), Ok(FaultOutcome::Fixed));
    assert_eq!(guest.found(page).map(|found| found.level), Some(2), "all private is alike too");
    guest.check();
    guest.finish();
}

#[test]
fn a_conversion_takes_what_it_touches_and_leaves_huge_pages_elsewhere() {
    for_each_format!(converts);
}

fn prefaults<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, BLOCKS * M2, Level::L1);
    let _ = set(&mut guest, range(BASE + 3, BASE + 5), Attributes::PRIVATE);
    let _ = set(&mut guest, range(BASE + 8, BASE + 9), Attributes::NO_WRITE);
    let done = guest.vcpu.prefault(range(BASE, BASE + 16), Access::READ).expect("no error");
    assert_eq!(done.next.get(), BASE + 16, "private or not");
    let done = guest.vcpu.prefault(range(BASE, BASE + 16), Access::WRITE).expect("no error");
    let denied = EmulateReason::Denied { gfn: Gfn::new(BASE + 8) };
    let _ = done;
    let write = PageFault::prefetch(gpa(BASE + 8), Access::WRITE);
    assert_eq!(guest.vcpu.fault(&write), Ok(FaultOutcome::Emulate(denied)));
    guest.check();
    guest.finish();
}

#[test]
fn a_prefault_maps_each_page_as_it_is_marked() {
    for_each_format!(prefaults);
}

fn intersects<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, BLOCKS * M2, Level::L2);
    let denied = |gfn| FaultOutcome::Emulate(EmulateReason::Denied { gfn: Gfn::new(gfn) });
    let (writes, fetches, reads) = (BASE + 1, BASE + M2, BASE + 2 * M2);
    guest.map([BASE, BASE + M2, BASE + 2 * M2], AccessKind::Write, Level::L2);
    let _ = set(&mut guest, range(BASE, BASE + M2), Attributes::NO_WRITE);
    let _ = set(&mut guest, range(BASE + M2, BASE + 2 * M2), Attributes::NO_EXEC);
    let _ = set(&mut guest, range(BASE + 2 * M2, BASE + 3 * M2), Attributes::NO_READ);
    // Writes.
    assert_eq!(guest.fault(writes, AccessKind::Write, Level::L3), denied(writes));
    assert_eq!(guest.found(writes), None, "nothing is mapped for a denied access");
    guest.map([writes], AccessKind::Read, Level::L3);
    let found = guest.found(writes).expect("mapped");
    assert_eq!((found.level, found.writable), (2, false));
    assert_eq!(guest.fault(writes, AccessKind::Write, Level::L3), denied(writes));
    assert!(!guest.found(writes).expect("mapped").writable, "no fast fault grants it");
    // Fetches.
    guest.map([fetches], AccessKind::Write, Level::L3);
    let found = guest.found(fetches).expect("mapped");
    assert_eq!((found.level, found.writable, found.executable), (2, true, false));
    assert_eq!(guest.fault(fetches, AccessKind::Fetch, Level::L3), denied(fetches));
    // Reads, and writes with them.
    for kind in [AccessKind::Read, AccessKind::Write] {
        assert_eq!(guest.fault(reads, kind, Level::L3), denied(reads), "{kind:?}");
    }
    assert_eq!(guest.found(reads), None);
    // An attribute never gives what the slot does not.
    guest.slot(1, BASE + 8 * M2, 4, DATA + 8 * M2, SlotFlags::READ_ONLY);
    let read_only = BASE + 8 * M2;
    let _ = set(&mut guest, range(read_only, read_only + 1), Attributes::NO_EXEC);
    guest.map([read_only], AccessKind::Read, Level::L3);
    assert!(!guest.found(read_only).expect("mapped").writable);
    let reason = EmulateReason::ReadOnly { gfn: Gfn::new(read_only), slot: 1 };
    let outcome = guest.fault(read_only, AccessKind::Write, Level::L3);
    assert_eq!(outcome, FaultOutcome::Emulate(reason));
    // Lifted: all is as before.
    let _ = set(&mut guest, GfnRange::ALL, Attributes::empty());
    guest.map([writes, reads], AccessKind::Write, Level::L3);
    guest.map([fetches], AccessKind::Fetch, Level::L3);
    assert!(guest.found(writes).expect("mapped").writable);
    assert!(guest.found(fetches).expect("mapped").executable);
    guest.check();
    guest.finish();
}

#[test]
fn a_mapping_permits_what_slot_and_attributes_both_permit() {
    for_each_format!(intersects);
}

#[test]
fn fetches_are_denied_in_every_mode_and_after_a_split_under_the_mitigation() {
    let caps = Capabilities { mode_based_exec: true, exec_only: true, ..Capabilities::ept() };
    let mut guest = Guest::<Ept>::with_memory(caps, M2, Level::L1);
    let _ = set(&mut guest, range(BASE, BASE + 1), Attributes::NO_EXEC);
    let _ = set(&mut guest, range(BASE + 1, BASE + 2), Attributes::NO_READ);
    guest.map([BASE], AccessKind::Read, Level::L1);
    let (_, spte) = guest.entry(BASE);
    assert_eq!(guest.config().access(spte), Access::READ | Access::WRITE, "nor by user mode");
    guest.map([BASE + 1], AccessKind::Fetch, Level::L1);
    let (_, spte) = guest.entry(BASE + 1);
    assert_eq!(guest.config().access(spte), Access::EXEC | Access::USER, "execute-only");
    guest.finish();
    let caps = Capabilities { nx_huge_pages: true, ..Capabilities::ept() };
    let mut guest = Guest::<Ept>::with_memory(caps, M2, Level::L2);
    let _ = set(&mut guest, range(BASE, BASE + M2), Attributes::NO_EXEC);
    guest.map([BASE], AccessKind::Write, Level::L2);
    let _ = guest.shrink(BASE);
    assert!(!guest.found(BASE).expect("mapped").executable, "a split gave fetches back");
    guest.finish();
}

#[test]
fn a_refused_change_unmaps_nothing() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), M2, Level::L2);
    guest.map([BASE], AccessKind::Write, Level::L2);
    let before = guest.found(BASE);
    for (range, attributes) in [
        (range(BASE + 1, BASE), Attributes::PRIVATE),
        (range(BASE, u64::MAX), Attributes::PRIVATE),
        (range(BASE, BASE + 1), Attributes::from_bits_retain(1 << 40)),
    ] {
        let slots = Arc::clone(&guest.slots);
        let mut slots = slots.lock().unwrap();
        let result =
            guest.mmu.set_attributes(slots.attributes(), &mut guest.actor, range, attributes);
        let named = AttributeError::UnknownFlags { bits: 1 << 40 };
        assert!(matches!(result, Err(AttributeError::BadRange { .. })) || result == Err(named));
    }
    assert_eq!(guest.found(BASE), before);
    guest.check();
    guest.finish();
}

/// What a private page holds: a guest that accesses shared memory only must never see it.
const SECRET: u64 = 0x5ec7_e75e_c7e7;
/// Pages that the race is about, around the border of two blocks.
const PAGES: u64 = 2 * M2;
const TURNS: u64 = 400;

/// Read shared memory all over the place. How many reads, and how many were refused.
fn reader<F: SpteFormat>(
    mmu: &Arc<TdpMmu<F, TestHost>>,
    core: Arc<Mutex<Core>>,
    words: &[AtomicU64],
    seed: u64,
    stop: &AtomicBool,
) -> (u64, u64) {
    let mut random = Random::new(seed);
    let mut runner = Runner::new(mmu, core, seed);
    let _stop = StopOnDrop(stop);
    let (mut reads, mut refused) = (0, 0);
    while !stop.load(Ordering::Acquire) {
        let gfn = BASE + random.below(PAGES);
        let look = |pa: u64| {
            let seen = words[(pa / 4096 - DATA) as usize].load(Ordering::SeqCst);
            assert_ne!(seen, SECRET, "seed {seed}: {gfn:#x} is private");
        };
        let passed = runner.access(
            gfn,
            AccessKind::Read,
            || false,
            look,
            |outcome| match outcome {
                Ok(_) => false,
                Err(FaultError::MemoryFault { gpa: at, private: false, .. }) => {
                    assert_eq!(at, gpa(gfn), "seed {seed}");
                    true
                }
                Err(error) => panic!("seed {seed}: {error}"),
            },
        );
        *(if passed { &mut reads } else { &mut refused }) += 1;
    }
    (reads, refused)
}

fn race<F: Modelled>(caps: Capabilities, seed: u64) {
    let shape = Shape { participants: 8, frames: 1024, ..Shape::new(caps) };
    let mut guest = Guest::<F>::with(shape);
    guest.host().record(false);
    guest.host().set_resolver(linear(Level::L2));
    guest.slot(0, BASE, PAGES, DATA, SlotFlags::empty());
    let words: Vec<AtomicU64> = (0..PAGES).map(AtomicU64::new).collect();
    let core = || guest.host().add_core(SoftCpu::new(&guest.format, 0, Caches::unlimited()));
    let cores = [core(), core()];
    let stop = AtomicBool::new(false);
    let mmu = Arc::clone(&guest.mmu);
    let mut random = Random::new(seed);
    let figures = std::thread::scope(|scope| {
        let (mmu, words, stop, cores) = (&mmu, &words[..], &stop, &cores);
        let readers: Vec<_> = (0..2_usize)
            .map(|n| {
                scope
                    .spawn(move || reader(mmu, Arc::clone(&cores[n]), words, seed + n as u64, stop))
            })
            .collect();
        let _stop = StopOnDrop(stop);
        for turn in 0..TURNS {
            // Mostly a few pages, sometimes across the border, sometimes whole blocks.
            let first = random.below(PAGES - 1);
            let pages = if turn % 10 == 0 { M2 } else { 1 + random.below(9) };
            let end = (first + pages).min(PAGES);
            let gfns = range(BASE + first, BASE + end);
            let words = &words[first as usize..end as usize];
            let _ = set(&mut guest, gfns, Attributes::PRIVATE);
            words.iter().for_each(|word| word.store(SECRET, Ordering::SeqCst));
            std::thread::sleep(Duration::from_micros(random.below(400)));
            assert!(!stop.load(Ordering::Acquire), "seed {seed} turn {turn}: a reader ended");
            words.iter().for_each(|word| word.store(0, Ordering::SeqCst));
            let _ = set(&mut guest, gfns, Attributes::empty());
            std::thread::sleep(Duration::from_micros(random.below(400)));
        }
        stop.store(true, Ordering::Release);
        let figures: Vec<(u64, u64)> = readers.into_iter().map(|t| t.join().unwrap()).collect();
        figures
    });
    println!("{}: seed {seed:#x}: reads and refusals {figures:?}", F::NAME);
    assert!(figures.iter().all(|(reads, refused)| *reads > 100 && *refused > 0), "{figures:?}");
    drop(mmu);
    guest.check();
    guest.finish();
}

#[test]
fn no_shared_access_reaches_a_page_once_it_is_private() {
    race::<Ept>(Capabilities::ept(), 0x5eed);
    race::<Npt>(common::no_ad(Capabilities::npt()), 0x5eee);
}
