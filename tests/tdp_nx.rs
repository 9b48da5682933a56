//! The NX mitigation of huge pages: nothing huge is executed, what is not executed any more gets
//! huge again, and the choice can be changed (KVM rows 1.20, 3.24, 3.30 to 3.32, 3.38; B18, B31,
//! B32, B70, B81).

mod common;

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{
    BASE, Core, DATA, G1, Guest, M2, Modelled, Shape, StopOnDrop, TestHost, code, gpa, linear,
    range,
};
use mmu_core::addr::Level;
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, ConfigError, Ept, Legacy, Npt, SpteFormat};
use mmu_core::stats::Counter;
use mmu_model::AccessKind::{Fetch, Read, Write};
use mmu_model::{Caches, Random, SoftCpu};
use tdp_mmu::{NxHugePages, NxReport, TdpMmu, TdpVcpu};

const NONE: SlotFlags = SlotFlags::empty();

fn mitigated(caps: Capabilities) -> Capabilities {
    Capabilities { nx_huge_pages: true, ..caps }
}

fn guest<F: Modelled>(caps: Capabilities, pages: u64, level: Level) -> Guest<F> {
    Guest::<F>::with_memory(mitigated(caps), pages, level)
}

fn splits<F: Modelled>(guest: &Guest<F>) -> u64 {
    guest.stat(Counter::NxSplits)
}

fn recover<F: SpteFormat>(guest: &mut Guest<F>, ratio: u64) -> NxReport {
    guest.mmu.recover_nx(&mut guest.actor, ratio)
}

/// Data, code, data, recovery, data.
fn life<F: Modelled>(caps: Capabilities) {
    let mut guest = guest::<F>(caps, 4 * M2, Level::L2);
    guest.map([BASE + 1], Write, Level::L3);
    let found = guest.found(BASE + 1).expect("mapped");
    assert_eq!((found.level, found.executable), (2, false));
    guest.map([BASE + 3], Fetch, Level::L3);
    let found = guest.found(BASE + 3).expect("mapped");
    assert_eq!((found.level, found.executable, splits(&guest)), (1, true, 1));
    // 3.24: data in the same block does not bring the huge page back, and the code stays.
    let _ = guest.unmap(range(BASE + 9, BASE + 10));
    guest.map([BASE + 9], Write, Level::L3);
    assert_eq!(guest.found(BASE + 9).map(|found| (found.pfn, found.level)), Some((DATA + 9, 1)));
    assert!(guest.found(BASE + 3).expect("still there").executable);
    assert_eq!((splits(&guest), guest.stat(Counter::Collapses)), (1, 0));
    let _ = guest.mmu.collapse(&mut guest.actor, 0, range(BASE, BASE + M2));
    assert_eq!(guest.check().leaves, [M2, 0, 0], "nor does a collapse");
    // Code to begin with.
    guest.map([BASE + M2 + 3], Fetch, Level::L3);
    assert_eq!(splits(&guest), 2);
    guest.host().take_batches();
    assert_eq!(recover(&mut guest, 0), NxReport::default(), "0 is off");
    assert_eq!(guest.host().take_batches(), []);
    let report = recover(&mut guest, 2);
    assert_eq!((report.recovered, report.unmarked, report.zapped.leaves), (1, 0, [M2, 0, 0]));
    let batches = guest.host().take_batches();
    assert_eq!((batches.len(), batches[0].tables.len()), (1, 1));
    assert!(batches[0].covers(range(BASE, BASE + M2)));
    assert_eq!((guest.found(BASE + 3), splits(&guest)), (None, 1));
    guest.map([BASE + 3], Read, Level::L3);
    let found = guest.found(BASE + 3).expect("mapped");
    assert_eq!((found.level, found.executable), (2, false), "huge again");
    // The hand goes on: not the same block.
    assert_eq!(recover(&mut guest, 60).recovered, 1);
    assert_eq!((guest.found(BASE + M2 + 3), splits(&guest)), (None, 0));
    assert_eq!(recover(&mut guest, 1), NxReport::default(), "nothing is left");
    guest.check();
    guest.finish();
}

#[test]
fn what_is_executed_is_small_and_gets_huge_again() {
    for_each_format!(life);
}

/// 3.30: a table counts only if a huge page would stand there otherwise.
fn counted<F: Modelled>(caps: Capabilities) {
    let mut guest = guest::<F>(caps, 2 * G1, Level::L1);
    guest.map([BASE], Fetch, Level::L3);
    assert_eq!(splits(&guest), 0, "the host has small pages only");
    guest.host().set_resolver(linear(Level::L2));
    guest.map([BASE + M2], Fetch, Level::L1);
    assert_eq!(splits(&guest), 0, "the fault asks for no more");
    guest.map([BASE + 2 * M2], Fetch, Level::L3);
    assert_eq!(splits(&guest), 1, "level 2 and not level 3");
    guest.host().set_resolver(linear(Level::L3));
    guest.map([BASE + G1], Fetch, Level::L3);
    assert_eq!(splits(&guest), 3, "both tables on the way");
    guest.map([BASE + G1 + 1], Fetch, Level::L3);
    assert_eq!(splits(&guest), 3, "again is nothing");
    guest.map([BASE + G1 + M2], Write, Level::L3);
    assert_eq!(guest.found(BASE + G1 + M2).map(|found| found.level), Some(2), "below the mark");
    // An unmap leaves tables; a zap-all takes them with their marks.
    let _ = guest.unmap(range(BASE, BASE + 2 * G1));
    assert_eq!(splits(&guest), 3);
    let _ = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
    assert_eq!(splits(&guest), 0);
    guest.vcpu.load_root().expect("a root");
    guest.check();
    guest.finish();
}

#[test]
fn a_table_is_counted_only_where_a_huge_page_would_be() {
    counted::<Ept>(Capabilities::ept());
    counted::<Npt>(Capabilities::npt());
}

/// Slots that are logged are left alone, but not looked at again; each space by its own slots.
#[test]
fn recovery_leaves_logged_slots_alone_in_their_own_space() {
    let shape = Shape { spaces: 2, ..Shape::new(mitigated(Capabilities::ept())) };
    let mut guest = Guest::<Ept>::with(shape);
    guest.host().set_resolver(linear(Level::L2));
    guest.slot(0, BASE, M2, DATA, NONE);
    // The second space has a slot there that the first has not, and one that is logged.
    let smm = |base, flags| mmu_core::slot::SlotRequest {
        as_id: 1,
        ..common::request((base / M2 % 8) as u16, base, M2, DATA + base, flags)
    };
    for base in [BASE, BASE + M2] {
        let _ = guest.set_slot(&smm(base, NONE)).expect("legal");
    }
    let mut other = TdpVcpu::new(&guest.mmu, 1).expect("room");
    other.load_root().expect("a root");
    guest.map([BASE + 1], Fetch, Level::L3);
    for gfn in [BASE + 1, BASE + M2 + 1] {
        let fault = PageFault::new(gpa(gfn), code(Fetch, false));
        assert_eq!(other.fault(&fault), Ok(FaultOutcome::Fixed));
    }
    assert_eq!(splits(&guest), 3);
    let _ = guest.set_slot(&smm(BASE, SlotFlags::LOG_DIRTY)).expect("legal");
    let report = recover(&mut guest, 1);
    assert_eq!((report.recovered, report.unmarked), (2, 1));
    assert_eq!(splits(&guest), 0);
    assert_eq!(guest.found(BASE + 1), None, "the first space has its own slot");
    let kept = guest.mmu.lookup(&mut guest.actor, 1, mmu_core::addr::Gfn::new(BASE + 1));
    assert_eq!(kept.last().map(|(level, _)| *level), Some(Level::L1), "logged: stays");
    drop(other);
    guest.finish();
}

/// 3.38: the table that was found is not in the tree any more when its turn comes.
#[test]
fn recovery_leaves_a_table_alone_whose_root_went_in_between() {
    let mut guest = guest::<Ept>(Capabilities::ept(), M2, Level::L2);
    guest.map([BASE + 1], Fetch, Level::L3);
    let once = AtomicBool::new(true);
    let mmu = Arc::downgrade(&guest.mmu);
    // All roots become invalid between the search and the zap.
    let zapped = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&zapped);
    let lookups = AtomicU64::new(0);
    guest.host().on_table(Some(Arc::new(move |_| {
        // The third lookup: the search is at the tables' level.
        if lookups.fetch_add(1, Ordering::SeqCst) == 2 && once.swap(false, Ordering::SeqCst) {
            let mmu = mmu.upgrade().unwrap();
            let mmu: &Arc<TdpMmu<Ept, TestHost>> = &mmu;
            let mut other = mmu.vm().actor().expect("room");
            drop(mmu.invalidate_roots(&mut other));
            seen.store(1, Ordering::SeqCst);
        }
    })));
    let report = recover(&mut guest, 1);
    guest.host().on_table(None);
    assert_eq!((zapped.load(Ordering::SeqCst), report.recovered), (1, 0));
    guest.vcpu.load_root().expect("a root");
    let _ = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
    assert_eq!(splits(&guest), 0);
    guest.finish();
}

fn toggled<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, 2 * M2, Level::L2);
    assert_eq!(guest.mmu.nx_huge_pages(), NxHugePages::Off);
    guest.map([BASE], Fetch, Level::L3);
    let found = guest.found(BASE).expect("mapped");
    assert_eq!((found.level, found.executable), (2, true));
    for round in 0..3 {
        let on = round % 2 == 0;
        let choice = if on { NxHugePages::On } else { NxHugePages::Off };
        let zap = guest.mmu.set_nx_huge_pages(&mut guest.actor, choice).expect("possible");
        let _ = zap.expect("a change").finish(&mut guest.actor);
        assert_eq!(guest.mmu.nx_huge_pages(), choice);
        let again = guest.mmu.set_nx_huge_pages(&mut guest.actor, choice).expect("possible");
        assert!(again.is_none(), "chosen already");
        drop(again);
        guest.map([BASE + M2], Write, Level::L3);
        let found = guest.found(BASE + M2).expect("mapped");
        assert_eq!((found.level, found.executable), (2, !on), "no stale entry is reused");
        guest.map([BASE], Fetch, Level::L3);
        let found = guest.found(BASE).expect("mapped");
        assert_eq!((found.level, found.executable), (if on { 1 } else { 2 }, true));
        assert_eq!(splits(&guest), u64::from(on));
    }
    guest.check();
    guest.finish();
}

#[test]
fn the_mitigation_can_be_switched_while_the_vm_lives() {
    for_each_format!(toggled);
}

#[test]
fn recovery_and_switch_work_before_any_vcpu_and_where_nothing_is_possible() {
    let mut guest = Guest::<Ept>::without_root(Shape::new(Capabilities::ept()));
    assert_eq!(recover(&mut guest, 60), NxReport::default());
    let zap = guest.mmu.set_nx_huge_pages(&mut guest.actor, NxHugePages::On).expect("possible");
    let _ = zap.expect("a change").finish(&mut guest.actor);
    assert_eq!(recover(&mut guest, u64::MAX), NxReport::default());
    guest.finish();
    // Without NX nothing can be withheld.
    let mut guest = Guest::<Npt>::new(Capabilities { nx: false, ..Capabilities::npt() });
    let refused = guest.mmu.set_nx_huge_pages(&mut guest.actor, NxHugePages::On).map(|_| ());
    assert_eq!(refused, Err(ConfigError::NxHugePagesWithoutNx));
    assert_eq!(guest.mmu.nx_huge_pages(), NxHugePages::Off);
    guest.finish();
}

/// A processor that reads, writes and fetches.
fn processor<F: Modelled>(
    guest: &Guest<F>,
    core: &Mutex<Core>,
    pages: u64,
    seed: u64,
    stop: &AtomicBool,
) -> u64 {
    let _stop = StopOnDrop(stop);
    let mmu = &guest.mmu;
    let mut vcpu = TdpVcpu::new(mmu, 0).expect("room");
    let (mut random, mut done) = (Random::new(seed), 0);
    while !stop.load(Ordering::Acquire) {
        let mut guard = core.lock().unwrap();
        if guard.reload || !vcpu.root_is_current() {
            guard.reload = false;
            drop(guard);
            let root = vcpu.load_root().expect("a root").address().get();
            let mut guard = core.lock().unwrap();
            if !guard.reload {
                guard.cpu.set_root(root);
            }
            continue;
        }
        let page = random.below(pages);
        let kind = [Read, Write, Fetch][random.below(3) as usize];
        let access = mmu_model::Access::user(kind);
        match guard.cpu.access(mmu.vm().host(), (BASE + page) << 12, access) {
            Ok(pa) => {
                assert_eq!(pa >> 12, DATA + page, "seed {seed}: translates elsewhere");
                done += 1;
            }
            Err(fault) => {
                drop(guard);
                let present = fault.kind == mmu_model::FaultKind::Protection;
                let fault = PageFault::new(gpa(BASE + page), code(kind, present));
                let outcome = vcpu.fault(&fault).expect("no error");
                assert!(!matches!(outcome, FaultOutcome::Emulate(_)), "{outcome:?}");
            }
        }
    }
    core.lock().unwrap().cpu.flush_all();
    done
}

fn under_load<F: Modelled>(caps: Capabilities, seed: u64) {
    const PAGES: u64 = 4 * M2;
    let shape = Shape { frames: 1024, participants: 12, ..Shape::new(mitigated(caps)) };
    let mut guest = Guest::<F>::without_root(shape);
    guest.slot(0, BASE, PAGES, DATA, NONE);
    guest.host().set_resolver(linear(Level::L2));
    guest.host().record(false);
    let stop = AtomicBool::new(false);
    let core = || guest.host().add_core(SoftCpu::new(&guest.format, 0, Caches::unlimited()));
    let cores = [core(), core()];
    let mut recovered = 0;
    std::thread::scope(|scope| {
        let (stop, guest) = (&stop, &guest);
        let threads: Vec<_> = (0..2_u64)
            .zip(&cores)
            .map(|(n, core)| scope.spawn(move || processor(guest, core, PAGES, seed + n, stop)))
            .collect();
        let mmu = &guest.mmu;
        let mut actor = mmu.vm().actor().expect("room");
        for round in 0..600 {
            if stop.load(Ordering::Acquire) {
                break;
            }
            recovered += mmu.recover_nx(&mut actor, 2).recovered;
            if round % 100 == 99 {
                let on = [NxHugePages::On, NxHugePages::Off][round / 100 % 2];
                if let Some(zap) = mmu.set_nx_huge_pages(&mut actor, on).expect("possible") {
                    let _ = zap.finish(&mut actor);
                }
            }
            let _ = mmu.unmap(&mut actor, range(BASE + M2, BASE + M2 + 5));
            let _ = mmu.collapse(&mut actor, 0, range(BASE, BASE + PAGES));
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Release);
        for thread in threads {
            let done = thread.join().unwrap();
            println!("{}: {done} accesses", F::NAME);
        }
    });
    println!("{}: {recovered} tables recovered", F::NAME);
    assert!(recovered > 0);
    let _ = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
    assert_eq!(splits(&guest), 0);
    guest.finish();
}

#[test]
fn recovery_and_switch_under_load_translate_nothing_elsewhere() {
    let seed = 11;
    println!("seed {seed}");
    under_load::<Ept>(Capabilities::ept(), seed);
    under_load::<Npt>(Capabilities::npt(), seed + 100);
}

/// Whatever happens in which order: nothing huge is executable, a page that is mapped is the page,
/// the gauge equals what recovery finds.
fn random_calls<F: Modelled>(caps: Capabilities) {
    const PAGES: u64 = 4 * M2;
    for seed in 0..10 {
        let mut random = Random::new(seed);
        let mut guest = guest::<F>(caps, PAGES, Level::L2);
        for step in 0..300 {
            let at = format!("{} seed {seed}, step {step}", F::NAME);
            let gfn = BASE + random.below(PAGES);
            match random.below(9) {
                0..3 => {
                    let kind = [Read, Write][random.below(2) as usize];
                    guest.map([gfn], kind, Level::L3);
                }
                3..5 => {
                    guest.map([gfn], Fetch, Level::L3);
                    assert!(guest.found(gfn).expect("mapped").executable, "{at}");
                }
                5 => {
                    let _ = guest.unmap(range(gfn, gfn + 1 + random.below(M2)));
                }
                6 => {
                    let _ = recover(&mut guest, 1 + random.below(4));
                }
                7 => {
                    let _ = guest.mmu.collapse(&mut guest.actor, 0, range(BASE, BASE + PAGES));
                }
                _ => {
                    let _ = guest.mmu.split(&mut guest.actor, 0, range(gfn, gfn + 1));
                }
            }
            guest.check();
            for page in (0..PAGES).step_by(97) {
                let Some(found) = guest.found(BASE + page) else { continue };
                assert_eq!(found.pfn, DATA + page, "{at}");
                assert!(found.level == 1 || !found.executable, "{at}: {found:?}");
            }
        }
        let marked = splits(&guest);
        let report = recover(&mut guest, 1);
        assert_eq!((report.recovered, splits(&guest)), (marked, 0), "seed {seed}");
        guest.finish();
    }
}

#[test]
fn nothing_huge_is_executable_whatever_happens() {
    for_each_format!(random_calls);
}

#[test]
fn a_fetch_without_memory_changes_nothing_and_counts_nothing() {
    let mut guest = guest::<Legacy>(Capabilities::legacy(), M2, Level::L2);
    guest.map([BASE], Write, Level::L3);
    // Use up what the vCPU has in store.
    let spare: Vec<_> = std::iter::from_fn(|| guest.vcpu.actor().take_frame()).collect();
    let now = guest.host().provides();
    guest.host().refuse(now, u64::MAX);
    let before = guest.entry(BASE);
    let mut drained = Vec::new();
    // What the pool has in store.
    while guest.actor.top_up(1).is_ok() {
        drained.extend(guest.actor.take_frame());
    }
    let refused = guest.try_fault(BASE, Fetch, Level::L3);
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!((guest.entry(BASE), splits(&guest)), (before, 0));
    guest.host().refuse(u64::MAX, u64::MAX);
    drained.into_iter().for_each(|frame| guest.actor.put_frame(frame));
    spare.into_iter().for_each(|frame| guest.vcpu.actor().put_frame(frame));
    guest.map([BASE], Fetch, Level::L3);
    assert_eq!(splits(&guest), 1);
    guest.check();
    guest.finish();
}
