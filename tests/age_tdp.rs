//! Generations over the direct MMU, on processors with TLBs and caches of upper entries: the
//! working set is what was used, cold pages go and hot ones stay, whatever the entry format (KVM
//! rows 5.17, 5.19, 5.28, 5.38, 5.39, 5.41, 8.3).

mod common;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{BASE, Core, Guest, M2, Modelled, no_ad, range, reported};
use lru_age::{
    AgePass, AgeTable, Arrival, EvictEnd, EvictOptions, Harvest, Histogram, IdleBitmap,
    LookOptions, Participation, PassOptions, PassReport, PidPolicy, Plain, Refaults, ScanPlan,
    Swappiness, Take, Unheard, Unit, WorkingSet, candidates,
};
use mmu_core::addr::{Gfn, GfnRange, Level, to_u64};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt};
use mmu_core::traits::{AgeMode, UpperBits};
use mmu_core::vm::Actor;
use mmu_model::{AccessKind, Caches, Random, SoftCpu};
use tdp_mmu::TdpVcpu;

/// Pages of the guests here.
const PAGES: u64 = 8 * M2;

fn table() -> AgeTable {
    let mut table = AgeTable::new(0);
    table.add_range(range(BASE, BASE + PAGES)).unwrap();
    table
}

fn core<F: Modelled>(guest: &mut Guest<F>) -> Arc<Mutex<Core>> {
    let root = guest.root_register();
    guest.host().add_core(SoftCpu::new(&guest.format, root, Caches::unlimited()))
}

/// A read by a processor with caches; faults are served with 4 KiB pages.
fn read<F: Modelled>(guest: &mut Guest<F>, core: &Arc<Mutex<Core>>, gfn: u64, level: Level) {
    let access = mmu_model::Access::user(AccessKind::Read);
    for _ in 0..4 {
        let found = core.lock().unwrap().cpu.access(guest.host(), gfn << 12, access);
        let Err(fault) = found else { return };
        let outcome = guest.vcpu.fault(&reported(gfn, &fault).at_most(level)).expect("memory");
        assert!(!matches!(outcome, FaultOutcome::Emulate(_)), "{outcome:?}");
    }
    panic!("{gfn:#x} cannot be read");
}

/// Does an entry map the page, be it tracked or not?
fn is_mapped<F: Modelled>(guest: &mut Guest<F>, gfn: u64) -> bool {
    let (level, spte) = guest.entry(gfn);
    spte.is_leaf(level)
}

fn pass<F: Modelled>(guest: &mut Guest<F>, table: &AgeTable, options: PassOptions) -> PassReport {
    let mut pass = AgePass::start_with(table, options).unwrap();
    while pass.step(&*guest.mmu, &mut guest.actor, 3000).next.is_some() {}
    let report = pass.finish(0);
    table.check().unwrap();
    report
}

/// What the working set of intervals is, with a flush: exactly what was used.
fn working_sets_are_exact<F: Modelled>(caps: Capabilities) {
    for upper in [UpperBits::Ignore, UpperBits::Use] {
        let mut random = Random::new(11);
        let mut guest = Guest::<F>::with_memory(caps, PAGES, Level::L1);
        let core = core(&mut guest);
        let table = table();
        guest.map((0..PAGES).step_by(5).map(|page| BASE + page), AccessKind::Read, Level::L1);
        let options = PassOptions { upper, ..PassOptions::new(AgeMode::ClearFlush) };
        let _ = pass(&mut guest, &table, options);
        let mut before = BTreeSet::new();
        for interval in 0..8 {
            // A set that moves, and a few pages anywhere.
            let mut used = BTreeSet::new();
            for _ in 0..400 {
                let near = (interval / 3 * 700 + random.below(300)) % PAGES;
                let page = if random.chance(1, 10) { random.below(PAGES) } else { near };
                used.insert(page);
                read(&mut guest, &core, BASE + page, Level::L1);
            }
            let report = pass(&mut guest, &table, options);
            assert!(report.complete);
            let truth = to_u64(used.len());
            let exact = WorkingSet { pages: truth, low: truth - report.counts.lost, high: truth };
            assert_eq!(WorkingSet::of(&table, 1), Some(exact), "interval {interval} {upper:?}");
            if interval > 0 {
                let both = to_u64(used.union(&before).count());
                let set = WorkingSet::of(&table, 2).unwrap();
                assert!(set.low <= both && both <= set.high, "{both} not in {set:?}");
                assert!(set.pages.abs_diff(both) * 10 <= both, "{both} {set:?}");
            }
            before = used;
        }
        guest.check();
        guest.finish();
    }
}

#[test]
fn working_sets_of_a_guest_are_exact_with_a_flush() {
    for_each_format!(working_sets_are_exact);
}

/// Without a flush TLBs hide uses, and only hide: never more than was used.
fn without_a_flush_uses_are_missed_and_none_invented<F: Modelled>(caps: Capabilities) {
    let mut random = Random::new(12);
    let mut guest = Guest::<F>::with_memory(caps, PAGES, Level::L1);
    let core = core(&mut guest);
    let table = table();
    let mut missed = 0;
    for _ in 0..6 {
        let mut used = BTreeSet::new();
        for _ in 0..500 {
            let page = random.below(600);
            used.insert(page);
            read(&mut guest, &core, BASE + page, Level::L1);
        }
        let _ = pass(&mut guest, &table, PassOptions::new(AgeMode::Clear));
        let set = WorkingSet::of(&table, 1).unwrap();
        let truth = to_u64(used.len());
        assert!(set.pages <= truth, "{set:?} of {truth}");
        missed += truth - set.pages;
    }
    assert!(missed > 0, "the TLB never evicts, so it must hide something");
    guest.finish();
}

#[test]
fn working_sets_without_a_flush_are_lower_bounds() {
    without_a_flush_uses_are_missed_and_none_invented::<Ept>(Capabilities::ept());
    without_a_flush_uses_are_missed_and_none_invented::<Npt>(Capabilities::npt());
    without_a_flush_uses_are_missed_and_none_invented::<Legacy>(Capabilities::legacy());
}

/// A guest under pressure: cold pages go, through the MMU's own unmap; hot ones never do; refaults
/// are known as such.
fn cold_pages_go_and_hot_ones_stay<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, PAGES, Level::L1);
    let core = core(&mut guest);
    let table = table();
    let refaults = Refaults::new(PAGES).unwrap();
    let mut zapper: Actor<_> = guest.mmu.vm().actor().unwrap();
    let hot: BTreeSet<u64> = (0..PAGES).step_by(37).collect();
    for page in 0..PAGES {
        read(&mut guest, &core, BASE + page, Level::L1);
    }
    let options = PassOptions { upper: UpperBits::Use, ..PassOptions::new(AgeMode::ClearFlush) };
    assert_eq!(Participation::of(&*guest.mmu), Participation::AgingAndLookAround);
    let mut gone = BTreeSet::new();
    for _ in 0..6 {
        hot.iter().for_each(|page| read(&mut guest, &core, BASE + page, Level::L1));
        let _ = pass(&mut guest, &table, options);
        // Used again after the pass, through whatever the TLB holds: a look before it goes sees it.
        hot.iter().take(20).for_each(|page| read(&mut guest, &core, BASE + page, Level::L1));
        let mut policy = PidPolicy::new(&refaults, Swappiness::DEFAULT);
        let evict = EvictOptions::new(500);
        let mmu = Arc::clone(&guest.mmu);
        let report =
            table.edit().unwrap().evict(&*mmu, &mut guest.actor, &mut policy, &evict, |victim| {
                let zapped = mmu.unmap(&mut zapper, victim.range);
                assert_eq!(zapped.pages(), victim.pages, "{victim:?}");
                gone.extend(victim.range.start.get() - BASE..victim.range.end.get() - BASE);
                Take::Evicted
            });
        assert!(report.evicted == 0 || report.end == EvictEnd::Enough, "{report:?}");
        table.check().unwrap();
    }
    assert!(gone.len() >= 1500, "{}", gone.len());
    assert!(gone.is_disjoint(&hot), "a hot page went");
    assert_eq!(to_u64(gone.len()), refaults.evictions());
    for page in 0..PAGES {
        assert_eq!(is_mapped(&mut guest, BASE + page), !gone.contains(&page), "{page}");
    }
    // They come back when used, and are known.
    let max = table.window().max_seq();
    for &page in gone.iter().take(50) {
        read(&mut guest, &core, BASE + page, Level::L1);
        let refault = refaults.refault(Gfn::new(BASE + page), max).expect("it was evicted");
        assert!(refault.distance <= to_u64(gone.len()));
        let arrival = if refault.is_recent() { Arrival::WorkingSet } else { Arrival::New };
        let one = GfnRange::from_len(Gfn::new(BASE + page), 1);
        assert_eq!(table.edit().unwrap().insert(one, Level::L1, arrival), 1);
    }
    let _ = pass(&mut guest, &table, PassOptions::new(AgeMode::Clear));
    assert_eq!(table.tracked_pages(), PAGES - to_u64(gone.len()) + 50);
    drop(zapper);
    guest.check();
    guest.finish();
}

#[test]
fn a_guest_under_pressure_keeps_its_hot_pages() {
    for_each_format!(cold_pages_go_and_hot_ones_stay);
}

/// Row 5.28 over real tables, and row 5.9: a huge leaf is checked and goes as one.
fn look_arounds_reach_over_tables<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, PAGES, Level::L2);
    let core = core(&mut guest);
    let table = table();
    let huge = BASE + 2 * M2;
    guest.map((0..M2).map(|page| BASE + page), AccessKind::Read, Level::L1);
    guest.map([huge], AccessKind::Read, Level::L2);
    let flush = PassOptions::new(AgeMode::ClearFlush);
    (0..4).for_each(|_| {
        let _ = pass(&mut guest, &table, flush);
    });
    [100, 110, 90, 200].iter().for_each(|page| read(&mut guest, &core, BASE + page, Level::L1));
    let victim = candidates(&table).find(|v| v.range.start.get() == BASE + 100).unwrap();
    let look = {
        let mut editor = table.edit().unwrap();
        editor.look_around(&victim, &*guest.mmu, &mut guest.actor, LookOptions::DEFAULT)
    };
    assert_eq!((look.window.len(), look.counts.promoted), (64, 3));
    let young = |guest: &mut Guest<F>, page| guest.young(BASE + page);
    let bits = [100, 110, 90, 200].map(|page| young(&mut guest, page));
    assert_eq!(bits, [false, false, false, true], "outside the window nothing was cleared");
    // The huge leaf: used at the last moment, then not.
    let blocks = EvictOptions { unit: Unit::Blocks, ..EvictOptions::new(u64::MAX) };
    let mut zapper: Actor<_> = guest.mmu.vm().actor().unwrap();
    let mut sizes = Vec::new();
    for touched in [true, false] {
        if touched {
            core.lock().unwrap().cpu.flush_all();
            read(&mut guest, &core, huge + 77, Level::L2);
        }
        let mmu = Arc::clone(&guest.mmu);
        let _ = table.edit().unwrap().evict(
            &*mmu,
            &mut guest.actor,
            &mut Plain::default(),
            &blocks,
            |victim| {
                let _ = mmu.unmap(&mut zapper, victim.range);
                sizes.push((victim.range.start.get(), victim.level));
                Take::Evicted
            },
        );
        let there = is_mapped(&mut guest, huge);
        assert_eq!(there, touched);
        (0..4).for_each(|_| {
            let _ = pass(&mut guest, &table, flush);
        });
    }
    assert!(sizes.contains(&(huge, Level::L2)), "{sizes:?}");
    drop(zapper);
    guest.check();
    guest.finish();
}

#[test]
fn look_arounds_work_on_every_format() {
    for_each_format!(look_arounds_reach_over_tables);
}

/// Row 5.24: passes and look-arounds take accessed bits only; what was written is told when it
/// goes.
fn written_pages_stay_dirty<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, PAGES, Level::L1);
    let table = table();
    guest.map((0..40).map(|page| BASE + page), AccessKind::Read, Level::L1);
    guest.map((40..64).map(|page| BASE + page), AccessKind::Write, Level::L1);
    for page in 40..64 {
        let _ = guest.touch(BASE + page, AccessKind::Write).expect("it is mapped");
    }
    (0..5).for_each(|_| {
        let _ = pass(&mut guest, &table, PassOptions::new(AgeMode::ClearFlush));
    });
    let mut zapper: Actor<_> = guest.mmu.vm().actor().unwrap();
    let (mmu, mut dirty) = (Arc::clone(&guest.mmu), 0);
    let report = table.edit().unwrap().evict(
        &*mmu,
        &mut guest.actor,
        &mut Plain::default(),
        &EvictOptions::new(64),
        |victim| {
            let told = mmu.unmap(&mut zapper, victim.range).dirty;
            // Of pages that were read only, an MMU may say what it likes.
            dirty += if victim.range.start.get() >= BASE + 40 { told } else { 0 };
            Take::Evicted
        },
    );
    assert_eq!((report.evicted, dirty), (64, 24));
    drop((zapper, mmu));
    guest.check();
    guest.finish();
}

#[test]
fn pages_that_were_written_stay_dirty_until_they_go() {
    for_each_format!(written_pages_stay_dirty);
}

/// Row 5.39: marking does not flush, so a use through a cached translation goes unseen; any other
/// is seen, and reading changes no entry.
fn idle_bits_follow_uses_that_walk<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, PAGES, Level::L1);
    let core = core(&mut guest);
    guest.map((0..64).map(|page| BASE + page), AccessKind::Read, Level::L1);
    let all = [range(BASE, BASE + PAGES)];
    let mut bitmap = IdleBitmap::new(all).unwrap();
    let mut words = [0; 2];
    let first = Gfn::new(BASE);
    let mmu = Arc::clone(&guest.mmu);
    bitmap.mark(first, &[u64::MAX; 2], &*mmu, &mut guest.actor, &mut Unheard).unwrap();
    bitmap.read(first, &mut words, &*mmu, &mut guest.actor).unwrap();
    assert_eq!(words, [u64::MAX, 0], "what is not mapped is not idle");
    core.lock().unwrap().cpu.flush_all();
    [3, 9].iter().for_each(|page| read(&mut guest, &core, BASE + page, Level::L1));
    for _ in 0..2 {
        bitmap.read(first, &mut words, &*mmu, &mut guest.actor).unwrap();
        assert_eq!(words[0], !(1 << 3 | 1 << 9));
        assert!(guest.young(BASE + 3), "reading cleared nothing");
    }
    drop(mmu);
    guest.check();
    guest.finish();
}

#[test]
fn idle_pages_of_a_guest_are_those_that_nobody_walked_to() {
    for_each_format!(idle_bits_follow_uses_that_walk);
}

/// Guests fault and read while one thread ages, several ask for it, and cold pages are evicted:
/// nothing is lost, the books agree with the tables, no counted page is invented.
fn everything_at_once<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, PAGES, Level::L1);
    let table = table();
    let refaults = Refaults::new(PAGES).unwrap();
    let stop = AtomicBool::new(false);
    let refaulted = AtomicU64::new(0);
    let mut zapper: Actor<_> = guest.mmu.vm().actor().unwrap();
    let mut askers = [(); 2].map(|()| guest.mmu.vm().actor().unwrap());
    std::thread::scope(|scope| {
        let (mmu, table, refaults) = (&guest.mmu, &table, &refaults);
        for thread in 0..2 {
            let mut vcpu = TdpVcpu::new(mmu, 0).unwrap();
            let root = vcpu.load_root().unwrap().address().get();
            let host = guest.mmu.vm().host();
            let core = host.add_core(SoftCpu::new(&guest.format, root, Caches::unlimited()));
            let (stop, refaulted) = (&stop, &refaulted);
            scope.spawn(move || {
                let mut random = Random::new(thread);
                let access = mmu_model::Access::user(AccessKind::Read);
                while !stop.load(Ordering::Relaxed) {
                    let page =
                        if random.chance(7, 8) { random.below(200) } else { random.below(PAGES) };
                    let gfn = BASE + page;
                    let found = core.lock().unwrap().cpu.access(mmu.vm().host(), gfn << 12, access);
                    if let Err(fault) = found {
                        let _ = vcpu.fault(&reported(gfn, &fault)).expect("memory");
                        table.note(Gfn::new(gfn));
                        let known = refaults.refault(Gfn::new(gfn), table.window().max_seq());
                        refaulted.fetch_add(u64::from(known.is_some()), Ordering::Relaxed);
                    }
                    std::thread::yield_now();
                }
            });
        }
        let mut evicted = 0;
        for round in 0..30 {
            let options = PassOptions::new(AgeMode::ClearFlush);
            let mut pass = AgePass::start_with(table, options).unwrap();
            if round % 2 == 0 {
                while pass.step(&**mmu, &mut guest.actor, 1000).next.is_some() {}
            } else {
                let plan = ScanPlan::new(table, 1);
                let (send, receive) = std::sync::mpsc::channel();
                std::thread::scope(|scope| {
                    for asker in &mut askers {
                        let (send, plan, request) = (send.clone(), &plan, pass.request());
                        scope.spawn(move || {
                            while let Some(part) = plan.claim() {
                                let mut harvest = Harvest::new(1).unwrap();
                                harvest.collect(&**mmu, asker, request.for_range(part));
                                send.send(harvest).unwrap();
                            }
                        });
                    }
                    drop(send);
                    receive.iter().for_each(|harvest| pass.absorb(&harvest));
                });
            }
            assert!(pass.finish(round).complete);
            table.check().unwrap();
            let mut policy = PidPolicy::new(refaults, Swappiness::DEFAULT);
            let options = EvictOptions::new(300);
            let mut editor = table.edit().unwrap();
            let report = editor.evict(&**mmu, &mut guest.actor, &mut policy, &options, |victim| {
                let _ = mmu.unmap(&mut zapper, victim.range);
                Take::Evicted
            });
            drop(editor);
            evicted += report.evicted;
            refaults.age_counts();
            let histogram = Histogram::of(table, round);
            assert_eq!(histogram.pages(), table.tracked_pages());
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(refaults.evictions(), evicted);
    });
    assert!(refaults.evictions() >= refaulted.into_inner());
    // What the table tracks is what is mapped, once somebody looked.
    guest.map((0..300).map(|page| BASE + page * 9), AccessKind::Read, Level::L1);
    let _ = pass(&mut guest, &table, PassOptions::new(AgeMode::Clear));
    let mapped: BTreeSet<u64> =
        (0..PAGES).filter(|page| is_mapped(&mut guest, BASE + page)).collect();
    assert!(mapped.len() >= 300);
    for page in 0..PAGES {
        let tracked = table.page_age(Gfn::new(BASE + page)).is_some();
        assert_eq!(tracked, mapped.contains(&page), "{page}");
    }
    drop(zapper);
    drop(askers);
    guest.finish();
}

#[test]
fn guests_fault_while_others_age_and_evict() {
    everything_at_once::<Ept>(Capabilities::ept());
    everything_at_once::<Npt>(no_ad(Capabilities::npt()));
}
