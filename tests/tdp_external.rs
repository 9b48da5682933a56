//! A tree that mirrors an external table: both hold the same after every operation, whichever
//! external call fails.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{BASE, DATA, G1, Guest, M2, Modelled, Shape, StopOnDrop, TestHost};
use common::{code, gpa, linear, range, request};
use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::dead::DeadReason;
use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt, Spte, SpteKind};
use mmu_core::traits::AgeMode;
use mmu_model::{AccessKind, PhysMem, Random};
use tdp_mmu::external::RemoveStep;
use tdp_mmu::{ChangePteError, ExternalCode, ExternalTable, Place, RemoveError, TdpMmu, TdpVcpu};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Table(Pfn),
    Page(Pfn, Access),
}

#[derive(Default)]
struct State {
    entries: BTreeMap<Place, Entry>,
    blocked: BTreeSet<Place>,
    /// Blocked, and a processor may have the page in its TLB.
    cached: BTreeSet<Place>,
    /// Tables whose links are gone, which a processor may have cached.
    freed: BTreeMap<Pfn, Place>,
    calls: u64,
    /// The call that fails, from 1; 0 for none.
    fails: u64,
    /// Every call with a number that this divides fails; 0 for none.
    every: u64,
}

impl State {
    fn call(&mut self) -> Result<(), ExternalCode> {
        self.calls += 1;
        if self.calls == self.fails || self.calls.checked_rem(self.every) == Some(0) {
            Err(ExternalCode(CODE))
        } else {
            Ok(())
        }
    }

    /// Is the table there that has the entry?
    fn linked(&self, at: Place) -> bool {
        let Some(above) = at.level.up().filter(|above| *above <= TOP) else { return true };
        let place = Place { gfn: at.gfn.align_down(above), level: above, ..at };
        matches!(self.entries.get(&place), Some(Entry::Table(_)))
    }
}

const CODE: u64 = 0xbad;
const TOP: Level = Level::L4;

/// The reference: checks what it is asked as well as doing it.
#[derive(Default)]
struct Reference(Mutex<State>);

impl ExternalTable for Reference {
    fn link(&self, at: Place, table: Pfn) -> Result<(), ExternalCode> {
        let mut state = self.0.lock().unwrap();
        assert!(state.linked(at) && at.level > Level::L1, "link {at:?}");
        state.call()?;
        let old = state.entries.insert(at, Entry::Table(table));
        assert_eq!(old, None, "link {at:?}");
        Ok(())
    }

    fn map(&self, at: Place, pfn: Pfn, access: Access) -> Result<(), ExternalCode> {
        let mut state = self.0.lock().unwrap();
        assert!(state.linked(at) && at.level == Level::L1, "map {at:?}");
        assert!(access.contains(Access::READ));
        state.call()?;
        let old = state.entries.insert(at, Entry::Page(pfn, access));
        assert_eq!(old, None, "map {at:?}");
        Ok(())
    }

    fn block(&self, at: Place) -> Result<(), ExternalCode> {
        let mut state = self.0.lock().unwrap();
        assert!(matches!(state.entries.get(&at), Some(Entry::Page(..))), "block {at:?}");
        state.call()?;
        state.blocked.insert(at);
        state.cached.insert(at);
        Ok(())
    }

    fn remove(&self, at: Place, pfn: Pfn) -> Result<(), ExternalCode> {
        let mut state = self.0.lock().unwrap();
        assert!(state.blocked.contains(&at), "remove {at:?}");
        assert!(!state.cached.contains(&at), "remove {at:?} before the flush");
        state.call()?;
        assert!(state.blocked.remove(&at));
        let old = state.entries.remove(&at);
        assert!(matches!(old, Some(Entry::Page(had, _)) if had == pfn), "remove {at:?}: {old:?}");
        Ok(())
    }

    fn free(&self, at: Place, table: Pfn) -> Result<(), ExternalCode> {
        let mut state = self.0.lock().unwrap();
        let below = range(at.gfn.get(), at.gfn.get() + at.level.pages());
        let inside = |other: &Place| other.level < at.level && below.contains(other.gfn);
        assert!(!state.entries.keys().any(inside), "free {at:?}, which is not empty");
        state.call()?;
        assert_eq!(state.entries.remove(&at), Some(Entry::Table(table)), "free {at:?}");
        state.freed.insert(table, at);
        Ok(())
    }
}

struct Mirror<F: Modelled> {
    guest: Guest<F>,
    external: Arc<Reference>,
}

impl<F: Modelled> Mirror<F> {
    fn new(caps: Capabilities, pages: u64) -> Self {
        let external = Arc::new(Reference::default());
        let table = Arc::clone(&external);
        let mut guest = Guest::<F>::on(Shape::new(caps), |vm, config, options| {
            TdpMmu::with_external(vm, config, options, table).expect("made for TDP")
        });
        let flushed = Arc::clone(&external);
        guest.host().before_flush(Some(Arc::new(move |batch| {
            let covered = |at: &Place, pages: u64| batch.covers(GfnRange::from_len(at.gfn, pages));
            let mut state = flushed.0.lock().unwrap();
            state.cached.retain(|at| !covered(at, 1));
            // The flush that a table waits for is the one that names it.
            for table in &batch.tables {
                if state.freed.get(table).is_some_and(|at| covered(at, at.level.pages())) {
                    state.freed.remove(table);
                }
            }
        })));
        guest.vcpu.load_root().expect("a frame for the root");
        guest.host().set_resolver(linear(Level::L3));
        let _ = guest.set_slot(&request(0, BASE, pages, DATA, SlotFlags::empty())).expect("legal");
        Self { guest, external }
    }

    fn calls(&self) -> u64 {
        self.external.0.lock().unwrap().calls
    }

    /// The call after `n` more fails.
    fn fail(&self, n: u64) {
        let mut state = self.external.0.lock().unwrap();
        state.fails = state.calls + n;
    }

    /// What the tree of address space 0 holds, as it stands in memory. No entry is claimed.
    fn tree(&mut self) -> BTreeMap<Place, Entry> {
        let root = self.guest.root_register();
        let config = self.guest.config().clone();
        let mut found = BTreeMap::new();
        let mut stack = vec![(root, config.levels(), 0u64)];
        while let Some((table, level, base)) = stack.pop() {
            for index in 0..common::TABLE {
                let raw = self.guest.host().read(table + index * 8).expect("a table");
                let (spte, gfn) = (Spte::from_raw(raw), base + index * level.pages());
                let at = Place { space: 0, gfn: Gfn::new(gfn), level };
                let pfn = config.pfn(spte);
                match config.kind(spte, level) {
                    SpteKind::Empty => {}
                    SpteKind::Leaf => {
                        assert_eq!(level, Level::L1, "{at:?}: a huge page");
                        found.insert(at, Entry::Page(pfn, config.access(spte)));
                    }
                    SpteKind::Table => {
                        found.insert(at, Entry::Table(pfn));
                        let below = level.down().expect("not the lowest");
                        stack.push((pfn.address().get(), below, gfn));
                    }
                    kind => panic!("{at:?} is {kind:?}: {spte:?}"),
                }
            }
        }
        found
    }

    #[track_caller]
    fn compare(&mut self) {
        let tree = self.tree();
        assert_eq!(tree, self.external.0.lock().unwrap().entries);
        let count = self.guest.check();
        let pages = tree.values().filter(|entry| matches!(entry, Entry::Page(..))).count();
        assert_eq!(count.leaves, [pages as u64, 0, 0]);
    }

    fn remove(&mut self, range: GfnRange) -> Result<u64, RemoveError> {
        self.guest.mmu.remove(&mut self.guest.actor, range).map(|removed| removed.pages())
    }

    #[track_caller]
    fn finish(self) {
        self.guest.finish();
        let state = self.external.0.lock().unwrap();
        assert!(state.entries.is_empty() && state.blocked.is_empty(), "{:?}", state.entries);
        assert!(state.freed.is_empty(), "freed and not flushed: {:?}", state.freed);
    }
}

fn gfn(random: &mut Random) -> u64 {
    let block = [0, M2, 7 * M2, G1, 2 * G1 - M2][random.below(5) as usize];
    BASE + block + random.below(6)
}

fn follows<F: Modelled>(caps: Capabilities) {
    let seed = 0x5eed;
    println!("seed {seed:#x}");
    let mut random = Random::new(seed);
    let mut mirror = Mirror::<F>::new(caps, 2 * G1);
    for _ in 0..300 {
        let at = gfn(&mut random);
        let guest = &mut mirror.guest;
        let block = range(BASE, BASE + 2 * G1);
        match random.below(16) {
            0..9 => {
                let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch]
                    [random.below(3) as usize];
                let outcome = guest.fault(at, kind, Level::L3);
                assert!(matches!(outcome, FaultOutcome::Fixed | FaultOutcome::Spurious));
                let (_, spte) = guest.entry(at);
                assert!(guest.config().permits(spte, code(kind, false).access()));
            }
            9 => assert!(guest.vcpu.prefault(range(at, at + 3), Access::READ).is_ok()),
            10 | 11 => {
                let _ = guest.unmap(range(at, at + random.below(2 * M2)));
                assert_eq!(guest.mmu.vm().is_dead(), None);
            }
            // None of these is a mirror's business, and none may change one side alone.
            12 => {
                let report = guest.age(block, AgeMode::Clear);
                assert_eq!((report.mapped, report.young), (0, 0));
            }
            13 => {
                let zap = guest.mmu.invalidate_roots(&mut guest.actor);
                assert_eq!(zap.finish(&mut guest.actor).pages(), 0);
                assert!(guest.vcpu.root_is_current());
            }
            14 => {
                let mmu = &guest.mmu;
                assert!(!mmu.write_protect_gfn(&mut guest.actor, 0, Gfn::new(at), Level::L1));
                let refused = mmu.change_pte(&mut guest.actor, 0, Gfn::new(at), Pfn::new(DATA));
                assert_eq!(refused, Err(ChangePteError::Mirror { gfn: Gfn::new(at) }));
                let _ = mmu.split(&mut guest.actor, 0, block);
                let _ = mmu.collapse(&mut guest.actor, 0, block);
            }
            _ => {
                let flags = [SlotFlags::LOG_DIRTY, SlotFlags::empty()][random.below(2) as usize];
                let slot = request(0, BASE, 2 * G1, DATA, flags);
                let _ = guest.set_slot(&slot).expect("legal");
                if flags == SlotFlags::LOG_DIRTY {
                    let mut words = vec![0; (2 * G1 / 64) as usize];
                    let done = guest.mmu.harvest_log(&mut guest.actor, 0, 0, &mut words);
                    assert!(done.is_ok() && words.iter().all(|word| *word == 0));
                }
            }
        }
        mirror.compare();
    }
    mirror.finish();
}

#[test]
fn both_sides_hold_the_same_after_every_operation() {
    follows::<Ept>(Capabilities::ept());
    follows::<Ept>(common::no_ad(Capabilities::ept()));
    follows::<Npt>(Capabilities::npt());
    follows::<Legacy>(common::no_ad(Capabilities::legacy()));
}

/// Whatever is under way, the next external call fails once; then the operation is repeated.
fn survives<F: Modelled>(caps: Capabilities) {
    for n in 1.. {
        let mut mirror = Mirror::<F>::new(caps, 2 * G1);
        mirror.fail(n);
        let mut failures = 0;
        let pages = [BASE, BASE + 1, BASE + 9, BASE + M2, BASE + G1];
        let mut frames = mirror.guest.check().tables;
        for page in pages {
            let fault = PageFault::new(gpa(page), code(AccessKind::Write, false));
            for turn in 0..2 {
                match mirror.guest.vcpu.fault(&fault) {
                    Ok(FaultOutcome::Fixed) if turn == failures.min(1) => {}
                    Ok(FaultOutcome::Fixed | FaultOutcome::Spurious) => {}
                    Err(FaultError::External { gfn, level, code: CODE }) => {
                        assert_eq!(gfn, Gfn::new(page).align_down(level));
                        failures += 1;
                    }
                    other => panic!("call {n}, {page:#x}: {other:?}"),
                }
                mirror.compare();
            }
        }
        for removal in [range(BASE, BASE + 2), range(BASE, BASE + 2 * G1)] {
            let before = mirror.tree().len();
            for turn in 0..2 {
                let done = mirror.remove(removal);
                if let Err(RemoveError { step, at, code, removed }) = done {
                    assert_eq!((turn, code), (0, ExternalCode(CODE)), "call {n}");
                    assert!(removal.contains(at.gfn) && step != RemoveStep::Free);
                    assert_eq!(before as u64 - removed.pages(), mirror.tree().len() as u64);
                    failures += 1;
                }
                mirror.compare();
            }
        }
        frames = frames.max(mirror.guest.check().tables);
        mirror.guest.vcpu.unload_root();
        let done = mirror.guest.mmu.try_destroy(&mut mirror.guest.actor);
        if let Err(RemoveError { step, removed, .. }) = done {
            assert_eq!(step, RemoveStep::Free, "nothing else is left");
            assert!(removed.tables < frames);
            failures += 1;
            mirror.compare();
        }
        let calls = mirror.calls();
        mirror.finish();
        assert!(failures <= 1);
        if failures == 0 {
            println!("{} external calls, each failed once", n - 1);
            assert!(n > 20 && calls < n);
            return;
        }
    }
}

#[test]
fn whichever_external_call_fails_both_sides_stay_equal_and_nothing_is_stuck_or_lost() {
    survives::<Ept>(Capabilities::ept());
    survives::<Ept>(common::no_ad(Capabilities::ept()));
    survives::<Npt>(Capabilities::npt());
    survives::<Legacy>(common::no_ad(Capabilities::legacy()));
}

#[test]
fn a_page_that_cannot_be_taken_away_ends_the_vm() {
    for n in 1..3 {
        let mut mirror = Mirror::<Ept>::new(Capabilities::ept(), M2);
        mirror.guest.map([BASE], AccessKind::Write, Level::L1);
        mirror.fail(n);
        assert_eq!(mirror.guest.unmap(range(BASE, BASE + 1)).pages(), 0);
        let reason = DeadReason::ExternalTable;
        assert_eq!(mirror.guest.mmu.vm().is_dead(), Some(reason));
        mirror.compare();
        let fault = PageFault::new(gpa(BASE + 1), code(AccessKind::Read, false));
        assert_eq!(mirror.guest.vcpu.fault(&fault), Err(FaultError::Dead { reason }));
        mirror.finish();
    }
}

#[test]
fn a_destruction_that_failed_keeps_its_memory_until_it_is_repeated() {
    let mut mirror = Mirror::<Ept>::new(Capabilities::ept(), M2);
    mirror.guest.map([BASE], AccessKind::Write, Level::L1);
    mirror.fail(4);
    mirror.guest.vcpu.unload_root();
    let report = mirror.guest.mmu.destroy(&mut mirror.guest.actor);
    assert_eq!((report.pages(), report.tables), (1, 1), "block, remove, free, and no further");
    assert_eq!(mirror.guest.mmu.vm().is_dead(), Some(DeadReason::ExternalTable));
    mirror.compare();
    mirror.finish();
}

fn vcpu(mmu: &Arc<TdpMmu<Ept, TestHost>>, seed: u64, stop: &AtomicBool) -> u64 {
    let mut vcpu = TdpVcpu::new(mmu, 0).expect("room");
    let _ = vcpu.load_root().expect("a root");
    let mut random = Random::new(seed);
    let mut refused = 0;
    let _stop = StopOnDrop(stop);
    while !stop.load(Ordering::Acquire) {
        let fault = PageFault::new(gpa(gfn(&mut random)), code(AccessKind::Write, false));
        match vcpu.fault(&fault) {
            Ok(FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry) => {}
            Err(FaultError::External { code: CODE, .. }) => refused += 1,
            other => panic!("seed {seed:#x}: {other:?}"),
        }
    }
    refused
}

/// Two vCPUs fault on the same pages, two threads remove them, and calls fail all the time. The
/// reference checks each call, and that no two meet on an entry.
#[test]
fn threads_that_fault_and_remove_leave_both_sides_equal() {
    let seed = 0x5eed;
    println!("seed {seed:#x}");
    let mut mirror = Mirror::<Ept>::new(Capabilities::ept(), 2 * G1);
    mirror.guest.host().record(false);
    let mmu = Arc::clone(&mirror.guest.mmu);
    mirror.external.0.lock().unwrap().every = 13;
    let stop = AtomicBool::new(false);
    let (refused, failed) = std::thread::scope(|scope| {
        let (mmu, stop) = (&mmu, &stop);
        let faults: Vec<_> =
            (1..3).map(|n| scope.spawn(move || vcpu(mmu, seed + n, stop))).collect();
        let removers: Vec<_> = (3..5)
            .map(|n| {
                scope.spawn(move || {
                    let mut actor = mmu.vm().actor().expect("room");
                    let mut random = Random::new(seed + n);
                    let mut failed = 0;
                    for _ in 0..1_000 {
                        assert!(!stop.load(Ordering::Acquire), "a vCPU ended");
                        let start = gfn(&mut random);
                        let some = range(start, start + [3, 2 * G1][random.below(2) as usize]);
                        std::thread::sleep(Duration::from_micros(random.below(100)));
                        failed += u64::from(mmu.remove(&mut actor, some).is_err());
                    }
                    failed
                })
            })
            .collect();
        let sum = |threads: Vec<std::thread::ScopedJoinHandle<'_, u64>>| -> u64 {
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        };
        let _stop = StopOnDrop(stop);
        let failed = sum(removers);
        stop.store(true, Ordering::Release);
        (sum(faults), failed)
    });
    println!("{refused} faults refused, {failed} removals failed");
    assert!(refused > 10 && failed > 10);
    mirror.external.0.lock().unwrap().every = 0;
    drop(mmu);
    mirror.compare();
    mirror.finish();
}
