//! Huge pages that come back: when logging ends, and on demand (KVM rows 3.28, 3.29, 0.2.10, 8.26).
//! Page sizes are counted exactly, translations judged by an independent walker and by a processor
//! that reads all the time.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{BASE, DATA, G1, Guest, M2, Modelled, Shape, StopOnDrop, code, gpa, linear, range};
use mmu_core::access::Access;
use mmu_core::addr::{GfnRange, Level, Pfn};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::traits::{AgeMode, HostPage, ResolveError};
use mmu_model::AccessKind::{Read, Write};
use mmu_model::{Caches, Random, SoftCpu};
use tdp_mmu::{CollapseReport, DirtyTracking, TdpOptions, TdpVcpu};

const NONE: SlotFlags = SlotFlags::empty();
const LOG: SlotFlags = SlotFlags::LOG_DIRTY;

fn collapse<F: SpteFormat>(guest: &mut Guest<F>, range: GfnRange) -> CollapseReport {
    guest.mmu.collapse(&mut guest.actor, 0, range)
}

/// What collapsed: 2 MiB, 1 GiB.
fn made(report: CollapseReport) -> [u64; 2] {
    assert_eq!(report.raced, 0);
    report.collapses
}

/// A guest whose huge pages stay split unless somebody asks.
fn manual<F: Modelled>(caps: Capabilities, dirty: DirtyTracking, pages: u64) -> Guest<F> {
    let mut options = TdpOptions::default();
    options.collapse_on_disable = false;
    options.dirty = dirty;
    let mut guest = Guest::<F>::with(Shape { options, ..Shape::new(caps) });
    guest.slot(0, BASE, pages, DATA, NONE);
    guest.host().set_resolver(linear(Level::L2));
    guest
}

/// Logging on and off, the slot beginning and ending inside huge pages.
fn logging_round<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::new(caps);
    let (first, pages) = (M2 - 7, 3 * M2 + 16);
    guest.slot(0, BASE + first, pages, DATA + first, NONE);
    // The same memory beyond both ends, as slots of their own.
    guest.slot(1, BASE, first, DATA, NONE);
    guest.slot(2, BASE + first + pages, 2 * M2, DATA + first + pages, NONE);
    guest.host().set_resolver(linear(Level::L3));
    let all = BASE + M2 - 9..BASE + 4 * M2 + 12;
    guest.map(all.clone(), Write, Level::L3);
    let before = guest.check().leaves;
    assert_eq!(before, [9 + 12, 3, 0]);
    for round in 0..2 {
        guest.slot(0, BASE + first, pages, DATA + first, LOG);
        assert_eq!(guest.check().leaves, [9 + 12 + 3 * M2, 0, 0], "all small, round {round}");
        guest.map([BASE + M2 + 3, BASE + 3 * M2], Write, Level::L3);
        guest.host().take_batches();
        guest.slot(0, BASE + first, pages, DATA + first, NONE);
        assert_eq!(guest.check().leaves, before, "huge again, round {round}");
        let batches = guest.host().take_batches();
        assert_eq!(batches.len(), 1, "one flush for the slot: {batches:?}");
        assert!(batches[0].covers(range(BASE + M2, BASE + 4 * M2)));
        assert_eq!(batches[0].tables.len(), 3);
        for gfn in all.clone() {
            assert_eq!(guest.found(gfn).expect("mapped").pfn, DATA + gfn - BASE);
        }
    }
    guest.finish();
}

#[test]
fn page_sizes_are_the_same_before_and_after_logging() {
    for_each_format!(logging_round);
}

fn logging_round_1g<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with(Shape { frames: 1200, ..Shape::new(caps) });
    // One page and 1 GiB and three 2 MiB pages.
    let (base, pages) = (BASE - 1, 1 + G1 + 3 * M2);
    guest.slot(0, base, pages, DATA - 1, NONE);
    guest.host().set_resolver(linear(Level::L3));
    guest.map([base, BASE + 5, BASE + G1, BASE + G1 + 2 * M2], Write, Level::L3);
    let before = guest.check().leaves;
    assert_eq!(before, [1, 2, 1]);
    guest.slot(0, base, pages, DATA - 1, LOG);
    assert_eq!(guest.check().leaves, [1 + G1 + 2 * M2, 0, 0]);
    assert_eq!(guest.stat(Counter::Splits), 1 + 512 + 2);
    guest.slot(0, base, pages, DATA - 1, NONE);
    assert_eq!(guest.check().leaves, before);
    assert!(guest.stat(Counter::MaxSlice) <= 512, "{}", guest.stat(Counter::MaxSlice));
    for gfn in [base, BASE, BASE + G1 - 1, BASE + G1 + 700 - M2] {
        assert_eq!(guest.found(gfn).map(|found| found.pfn), Some(DATA + gfn - BASE));
    }
    guest.finish();
}

#[test]
fn gigabytes_come_back_from_the_bottom_up() {
    logging_round_1g::<Ept>(Capabilities::ept());
    logging_round_1g::<Npt>(Capabilities::npt());
}

/// What one small page says, the huge one says.
fn merged<F: Modelled>(caps: Capabilities) {
    let mut guest = manual::<F>(caps, DirtyTracking::WriteProtect, 4 * M2);
    // Nothing used, one used, one written.
    guest.vcpu.prefault(range(BASE, BASE + 9), Access::READ).map(|_| ()).expect("no error");
    let small = |gfn| PageFault::prefetch(gpa(gfn), Access::READ).at_most(Level::L1);
    for gfn in (BASE + M2..BASE + M2 + 9).chain(BASE + 2 * M2..BASE + 2 * M2 + 9) {
        assert_eq!(guest.vcpu.fault(&small(gfn)), Ok(FaultOutcome::Fixed));
    }
    guest.map([BASE + M2 + 20], Read, Level::L1);
    guest.map([BASE + 2 * M2 + 20], Write, Level::L1);
    let _ = guest.age(range(BASE + M2, BASE + 2 * M2), AgeMode::Clear);
    let young = guest.config().ad_enabled();
    if young {
        guest.touch(BASE + M2 + 20, Read).map(|_| ()).expect("mapped");
    }
    assert_eq!(made(collapse(&mut guest, range(BASE, BASE + 4 * M2))), [2, 0]);
    assert_eq!(guest.check().leaves, [0, 3, 0]);
    assert!(guest.young(BASE + 2 * M2));
    let (_, spte) = guest.entry(BASE + M2);
    assert_eq!(guest.config().is_access_tracked(spte), !young, "all of them were");
    assert_eq!(guest.entry(BASE + 2 * M2).0, Level::L2);
    guest.map([BASE + 2 * M2 + 77], Write, Level::L2);
    let gone = guest.unmap(range(BASE + 2 * M2, BASE + 3 * M2));
    assert_eq!((gone.young, gone.dirty), (M2, M2));
    guest.finish();
}

#[test]
fn a_huge_page_is_as_used_and_as_written_as_its_parts() {
    for_each_format!(merged);
}

/// Between the exchange of the link and the end of the old table a processor goes on through a
/// cached link, and writes there: nobody but the old entry knows (I8).
fn late_write<F: Modelled>(caps: Capabilities) {
    let mut guest = manual::<F>(caps, DirtyTracking::DirtyBit, 2 * M2);
    guest.map((0..M2).map(|page| BASE + page), Write, Level::L1);
    guest.slot(0, BASE, 2 * M2, DATA, LOG);
    guest.slot(0, BASE, 2 * M2, DATA, NONE);
    let (_, spte) = guest.entry(BASE + 400);
    assert!(guest.config().is_writable(spte) && !guest.config().is_dirty(spte));
    let root = guest.root_register();
    let cpu = SoftCpu::new(&guest.format, root, Caches::unlimited());
    let core = guest.host().add_core(cpu);
    let user = mmu_model::Access::user;
    let address = (BASE + 7) << 12;
    core.lock().unwrap().cpu.access(guest.host(), address, user(Read)).expect("mapped");
    let written = Arc::new(AtomicU64::new(0));
    let mmu = Arc::downgrade(&guest.mmu);
    let (seen, hooked) = (Arc::clone(&written), Arc::clone(&core));
    guest.host().on_table(Some(Arc::new(move |_: Pfn| {
        let mmu = mmu.upgrade().unwrap();
        let host = mmu.vm().host();
        let done = mmu.vm().stats().get(Counter::Pages2M) == 1;
        if done && seen.swap(1, Ordering::SeqCst) == 0 {
            let write = (BASE + 400) << 12;
            let pa = hooked.lock().unwrap().cpu.access(host, write, user(Write));
            assert_eq!(pa, Ok((DATA + 400) << 12), "through the cached link");
        }
    })));
    assert_eq!(made(collapse(&mut guest, range(BASE, BASE + M2))), [1, 0]);
    guest.host().on_table(None);
    assert_eq!(written.load(Ordering::SeqCst), 1, "the moment came");
    let (level, spte) = guest.entry(BASE);
    assert_eq!(level, Level::L2);
    assert!(guest.config().is_dirty(spte), "the write is lost");
    assert_eq!(guest.unmap(range(BASE, BASE + 1)).dirty, M2);
    guest.finish();
}

// INVARIANT[I8].
#[test]
fn a_write_through_a_link_that_a_processor_cached_is_not_lost() {
    late_write::<Ept>(Capabilities::ept());
    late_write::<Npt>(Capabilities::npt());
    late_write::<Legacy>(Capabilities::legacy());
}

/// Everything that a huge page may not do.
fn refused<F: Modelled>(caps: Capabilities) {
    let mut guest = manual::<F>(caps, DirtyTracking::WriteProtect, 4 * M2);
    let all = range(BASE, BASE + 4 * M2);
    let whole = (0..M2).map(|page| BASE + page);
    guest.map(whole.clone(), Write, Level::L1);
    // The host has small pages only.
    guest.host().set_resolver(linear(Level::L1));
    assert_eq!(made(collapse(&mut guest, all)), [0, 0]);
    // It has another page now, or does not answer, or answers with something else.
    let other = |change: fn(HostPage) -> Result<HostPage, ResolveError>| {
        let good = linear(Level::L2);
        Arc::new(move |slot: &_, gfn, want| good(slot, gfn, want).and_then(change))
    };
    guest
        .host()
        .set_resolver(other(|page| Ok(HostPage { pfn: Pfn::new(page.pfn.get() + M2), ..page })));
    assert_eq!(made(collapse(&mut guest, all)), [0, 0]);
    guest.host().set_resolver(other(|_| Err(ResolveError::NoMemory)));
    assert_eq!(made(collapse(&mut guest, all)), [0, 0]);
    guest.host().set_resolver(other(|page| Ok(HostPage { writable: false, ..page })));
    assert_eq!(made(collapse(&mut guest, all)), [0, 0]);
    guest
        .host()
        .set_resolver(other(|page| Ok(HostPage { writable: page.pfn.get() % M2 != 9, ..page })));
    let _ = guest.unmap(range(BASE + 9, BASE + 10));
    guest.map([BASE + 9], Read, Level::L1);
    assert_eq!(made(collapse(&mut guest, all)), [0, 0], "one page is read-only");
    let _ = guest.unmap(range(BASE + 9, BASE + 10));
    guest.host().set_resolver(linear(Level::L2));
    // A page is logged, another space, another range, no range.
    guest.slot(0, BASE, 4 * M2, DATA, LOG);
    assert_eq!(made(collapse(&mut guest, all)), [0, 0]);
    guest.slot(0, BASE, 4 * M2, DATA, NONE);
    assert_eq!(guest.mmu.collapse(&mut guest.actor, 1, all), CollapseReport::default());
    let far = range(u64::MAX - 5, u64::MAX);
    for nothing in [range(BASE, BASE), range(BASE + M2, BASE + 2 * M2), far] {
        assert_eq!(made(collapse(&mut guest, nothing)), [0, 0]);
    }
    guest.check();
    // Nothing in the way any more; nothing mapped in the table: it stays.
    assert_eq!(made(collapse(&mut guest, range(BASE + 100, BASE + 101))), [1, 0]);
    assert_eq!(guest.shrink(BASE), FaultOutcome::Spurious);
    let _ = guest.unmap(range(BASE, BASE + M2));
    assert_eq!(made(collapse(&mut guest, GfnRange::ALL)), [0, 0]);
    guest.finish();
}

#[test]
fn a_table_stays_where_a_huge_page_would_say_something_else() {
    for_each_format!(refused);
}

#[test]
fn devices_and_read_only_memory_collapse_like_any_other() {
    use mmu_core::traits::{Backing, PageKind};
    let mut guest = manual::<Ept>(Capabilities::ept(), DirtyTracking::WriteProtect, 2 * M2);
    guest
        .host()
        .set_kinds(Arc::new(|_, _| PageKind { backing: Backing::Device, memory_type: None }));
    guest.slot(1, BASE + 4 * M2, M2, DATA + 4 * M2, SlotFlags::READ_ONLY);
    guest.map([BASE, BASE + 8], Write, Level::L1);
    guest.map([BASE + 4 * M2, BASE + 4 * M2 + 8], Read, Level::L1);
    let (_, small) = guest.entry(BASE);
    assert_eq!(made(collapse(&mut guest, GfnRange::ALL)), [2, 0]);
    let (level, huge) = guest.entry(BASE + 9);
    assert_eq!(level, Level::L2);
    assert!(guest.config().same_memory(small, huge));
    assert!(!guest.found(BASE + 4 * M2).expect("mapped").writable);
    guest.check();
    guest.finish();
}

/// A fault for 1 GiB takes one table apart at most: where there are tables below, it takes the
/// size below.
fn bounded_fault<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, G1, Level::L3);
    guest.map([BASE, BASE + M2], Write, Level::L1);
    guest.map([BASE + 5 * M2], Write, Level::L3);
    assert_eq!(guest.check().leaves, [2, 1, 0]);
    guest.map([BASE + 2], Write, Level::L3);
    assert_eq!(guest.check().leaves, [1, 2, 0], "its own table went");
    for page in [0, 2, M2 - 1, M2, 6 * M2 - 1] {
        let found = guest.found(BASE + page).expect("mapped");
        assert_eq!(found.pfn, DATA + page);
    }
    guest.map([BASE + M2 + 1], Write, Level::L3);
    guest.map([BASE + 9 * M2], Write, Level::L3);
    assert_eq!(guest.check().leaves, [0, 0, 1], "no table below any more");
    guest.finish();
}

#[test]
fn a_fault_never_takes_tables_of_two_levels_apart() {
    bounded_fault::<Ept>(Capabilities::ept());
    bounded_fault::<Npt>(Capabilities::npt());
    bounded_fault::<Legacy>(common::no_ad(Capabilities::legacy()));
}

/// Reads all the time; gives how often a fault had to be looked at.
fn reader<F: Modelled>(guest: &Guest<F>, pages: u64, reads: &AtomicU64, stop: &AtomicBool) -> u64 {
    let _stop = StopOnDrop(stop);
    let mmu = &guest.mmu;
    let mut vcpu = TdpVcpu::new(mmu, 0).expect("room");
    let root = vcpu.load_root().expect("a root").address().get();
    let cpu = SoftCpu::new(&guest.format, root, Caches::unlimited());
    let core = mmu.vm().host().add_core(cpu);
    let (mut random, mut faults) = (Random::new(7), 0);
    while !stop.load(Ordering::Acquire) {
        let page = random.below(pages);
        let access = mmu_model::Access::user(Read);
        let found = core.lock().unwrap().cpu.access(mmu.vm().host(), (BASE + page) << 12, access);
        match found {
            Ok(pa) => {
                assert_eq!(pa >> 12, DATA + page, "translates elsewhere");
                reads.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => {
                // Through a link that it cached into a table that is being taken apart. The tree
                // itself has the page.
                faults += 1;
                let fault = PageFault::new(gpa(BASE + page), code(Read, false));
                let outcome = vcpu.fault(&fault).expect("no error");
                let known = [FaultOutcome::Spurious, FaultOutcome::Retry];
                assert!(known.contains(&outcome), "{page:#x} was not mapped: {outcome:?}");
            }
        }
    }
    core.lock().unwrap().cpu.flush_all();
    faults
}

fn read_through<F: Modelled>(caps: Capabilities) {
    const PAGES: u64 = 6 * M2;
    let mut guest = Guest::<F>::with_memory(caps, PAGES, Level::L2);
    guest.host().record(false);
    guest.map((0..PAGES).step_by(512).map(|page| BASE + page), Write, Level::L2);
    let (stop, reads) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; 2]);
    let mmu = Arc::clone(&guest.mmu);
    let slots = Arc::clone(&guest.slots);
    let rounds = std::thread::scope(|scope| {
        let (stop, guest, reads) = (&stop, &guest, &reads);
        let readers: Vec<_> =
            reads.iter().map(|n| scope.spawn(move || reader(guest, PAGES, n, stop))).collect();
        let enough = || reads.iter().all(|reads| reads.load(Ordering::Relaxed) > 1000);
        let mut rounds = 0;
        let toggle = |flags| {
            let mut actor = mmu.vm().actor().expect("room");
            let request = common::request(0, BASE, PAGES, DATA, flags);
            let writer: &Mutex<_> = &slots;
            mmu.set_slot(&mut writer.lock().unwrap(), &mut actor, &request).map(|_| ())
        };
        while (rounds < 40 || !enough()) && !stop.load(Ordering::Acquire) {
            toggle(LOG).expect("legal");
            toggle(NONE).expect("legal");
            let mut actor = mmu.vm().actor().expect("room");
            let all = range(BASE, BASE + PAGES);
            let _ = mmu.split(&mut actor, 0, range(BASE + M2, BASE + 3 * M2));
            let _ = mmu.collapse(&mut actor, 0, all);
            rounds += 1;
        }
        stop.store(true, Ordering::Release);
        for thread in readers {
            println!("{}: {} faults", F::NAME, thread.join().unwrap());
        }
        rounds
    });
    assert!(rounds >= 40);
    drop((mmu, slots));
    assert_eq!(guest.check().leaves, [0, 6, 0]);
    guest.finish();
}

#[test]
fn no_reader_finds_a_page_unmapped_while_sizes_change() {
    read_through::<Ept>(Capabilities::ept());
    read_through::<Npt>(Capabilities::npt());
    read_through::<Legacy>(Capabilities::legacy());
}

/// The model is the arithmetic of the slot: whatever is mapped maps `DATA + gfn - BASE`.
fn random_calls<F: Modelled>(caps: Capabilities) {
    const PAGES: u64 = 5 * M2 + 33;
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let first = [0, 1, M2 / 2][(seed % 3) as usize];
        let mut guest = Guest::<F>::with(Shape { frames: 96, ..Shape::new(caps) });
        let end = BASE + PAGES;
        guest.slot(0, BASE + first, PAGES - first, DATA + first, NONE);
        guest.host().set_resolver(linear(Level::L2));
        let mut mapped = vec![false; PAGES as usize];
        let (mut log, mut collapsed) = (false, 0);
        for step in 0..400 {
            let at = format!("{} seed {seed}, step {step}", F::NAME);
            let gfn = BASE + first + random.below(PAGES - first);
            let some = range(gfn, end.min(gfn + 1 + random.below(2 * M2)));
            match random.below(8) {
                0..3 => {
                    let kind = [Read, Write][random.below(2) as usize];
                    let level = [Level::L1, Level::L2][random.below(2) as usize];
                    guest.map([gfn], kind, level);
                    mapped[(gfn - BASE) as usize] = true;
                }
                3 => {
                    let _ = guest.unmap(some);
                    let gone = some.start.get() - BASE..some.end.get() - BASE;
                    gone.for_each(|page| mapped[page as usize] = false);
                    // Huge pages go as a whole.
                    for page in 0..PAGES {
                        mapped[page as usize] &= guest.found(BASE + page).is_some();
                    }
                }
                4 => {
                    log = !log;
                    let flags = if log { LOG } else { NONE };
                    guest.slot(0, BASE + first, PAGES - first, DATA + first, flags);
                }
                5 => {
                    let _ = guest.mmu.split(&mut guest.actor, 0, some);
                }
                6 => {
                    let report = collapse(&mut guest, some);
                    assert!(!log || report.collapses == [0, 0], "{at}: logged");
                    collapsed += report.collapses[0];
                }
                _ => {
                    let _ = guest.age(some, AgeMode::Clear);
                }
            }
            guest.check();
            for page in (0..PAGES).step_by(61).chain([gfn - BASE, some.end.get() - 1 - BASE]) {
                let tracked = {
                    let (_, spte) = guest.entry(BASE + page);
                    guest.config().is_access_tracked(spte)
                };
                let found = guest.found(BASE + page);
                assert!(!mapped[page as usize] || tracked || found.is_some(), "{at}: {page:#x}");
                assert!(found.is_none_or(|found| found.pfn == DATA + page), "{at}: {page:#x}");
            }
        }
        assert!(collapsed > 0, "seed {seed}");
        guest.finish();
    }
}

#[test]
fn random_splits_and_collapses_never_translate_elsewhere() {
    for_each_format!(random_calls);
}

#[test]
fn a_collapse_needs_no_memory() {
    let mut guest = manual::<Ept>(Capabilities::ept(), DirtyTracking::WriteProtect, 4 * M2);
    guest.map((0..4).map(|block| BASE + block * M2 + 3), Write, Level::L1);
    let now = guest.host().provides();
    guest.host().refuse(now, u64::MAX);
    assert_eq!(made(collapse(&mut guest, GfnRange::ALL)), [4, 0]);
    // A split that has no memory says so and leaves what it has not done as it was.
    let mut splits = 0;
    let error = loop {
        let report = guest.mmu.split(&mut guest.actor, 0, GfnRange::ALL);
        splits += report.splits;
        if let Some(error) = report.out_of_frames {
            break Some(error);
        }
        if guest.check().leaves[1] == 0 {
            break None;
        }
    };
    assert!(error.is_some() || splits == 4);
    for block in 0..4 {
        assert_eq!(guest.found(BASE + block * M2).expect("mapped").pfn, DATA + block * M2);
    }
    guest.host().refuse(u64::MAX, u64::MAX);
    guest.check();
    guest.finish();
}
