//! Another page for a mapped gfn: what stays, what is reported, and that nobody writes the old page
//! after the call. And the choice of paging, which a VM keeps.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::runner::Runner;
use common::{BASE, DATA, Guest, M2, Modelled, Shape, StopOnDrop, TestHost, range};
use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::fault::FaultOutcome;
use mmu_core::paging::{Paging, PagingPolicy};
use mmu_core::slot::{SlotFlags, SlotLimits};
use mmu_core::spte::{Capabilities, Ept, SpteConfig};
use mmu_core::traits::{HostPage, ResolveError};
use mmu_core::vm::{VmCore, VmOptions};
use mmu_model::{AccessKind, Caches, Random, SoftCpu};
use tdp_mmu::{ChangePteError, DirtyTracking, PageChange, TdpMmu, TdpOptions, WrongPaging};

/// Far from what slots have.
const OTHER: u64 = DATA + 0x10_0000;

fn change<F: Modelled>(guest: &mut Guest<F>, gfn: u64, pfn: u64) -> PageChange {
    let (gfn, pfn) = (Gfn::new(gfn), Pfn::new(pfn));
    guest.mmu.change_pte(&mut guest.actor, 0, gfn, pfn).expect("legal")
}

/// Gfn, page, may it be written; the last one counts.
type Moves = Arc<Mutex<Vec<(u64, u64, bool)>>>;

/// A guest whose resolver answers what `moved` has, or the slot's own page.
fn with_moves<F: Modelled>(caps: Capabilities) -> (Guest<F>, Moves) {
    let guest = Guest::<F>::with_memory(caps, M2, Level::L1);
    let moved = Moves::default();
    let answers = Arc::clone(&moved);
    guest.host().set_resolver(Arc::new(move |slot, gfn, _| {
        let answers = answers.lock().unwrap();
        if let Some((_, pfn, writable)) = answers.iter().rfind(|(at, ..)| *at == gfn.get()) {
            return Ok(HostPage { pfn: Pfn::new(*pfn), writable: *writable, level: Level::L1 });
        }
        let hva = slot.hva_of(gfn).ok_or(ResolveError::NoMemory)?;
        Ok(HostPage { pfn: Pfn::new(hva.get() >> 12), writable: true, level: Level::L1 })
    }));
    (guest, moved)
}

fn changes<F: Modelled>(caps: Capabilities) {
    let (mut guest, moved) = with_moves::<F>(caps);
    guest.map([BASE, BASE + 1], AccessKind::Write, Level::L1);
    let before = guest.found(BASE).expect("mapped");
    let _ = guest.host().take_batches();
    moved.lock().unwrap().push((BASE, OTHER, false));
    let done = change(&mut guest, BASE, OTHER);
    assert_eq!((done.changed, done.taken.leaves), (1, [1, 0, 0]));
    assert_eq!((done.taken.young, done.taken.dirty), (1, 1));
    let batches = guest.host().take_batches();
    assert!(batches.iter().any(|batch| batch.covers(range(BASE, BASE + 1))), "flushed");
    let (_, spte) = guest.entry(BASE);
    let config = guest.config().clone();
    assert!(!config.is_writable(spte) && !config.is_mmu_writable(spte));
    assert!(!config.is_host_writable(spte) && !config.is_dirty(spte));
    assert!(config.is_accessed(spte), "as it was");
    let after = guest.found(BASE).expect("mapped");
    assert_eq!((after.pfn, after.writable), (OTHER, false));
    assert_eq!(after.executable, before.executable, "as it was");
    assert_eq!(guest.found(BASE + 1).expect("mapped").pfn, DATA + 1, "the neighbour");
    // Reads go on; a write asks the host, which lets it pass by and by.
    assert!(guest.touch(BASE, AccessKind::Read).is_ok());
    assert!(guest.touch(BASE, AccessKind::Write).is_err());
    let outcome = guest.fault(BASE, AccessKind::Write, Level::L1);
    assert!(matches!(outcome, FaultOutcome::Emulate(_)), "the host says no: {outcome:?}");
    moved.lock().unwrap().push((BASE, OTHER, true));
    assert_eq!(guest.fault(BASE, AccessKind::Write, Level::L1), FaultOutcome::Fixed);
    assert!(guest.touch(BASE, AccessKind::Write).is_ok());
    guest.check();
    guest.finish();
}

#[test]
fn the_new_page_reads_as_the_old_one_did_and_a_write_asks_the_host() {
    for_each_format!(changes);
}

/// A leaf that nobody used stays so, tracked or not.
fn keeps_age<F: Modelled>(caps: Capabilities) {
    let (mut guest, _) = with_moves::<F>(caps);
    guest.map([BASE], AccessKind::Read, Level::L1);
    let _ = guest.age(range(BASE, BASE + 1), mmu_core::traits::AgeMode::Clear);
    let done = change(&mut guest, BASE, OTHER);
    assert_eq!((done.changed, done.taken.young), (1, 0));
    assert!(!guest.young(BASE));
    let (_, spte) = guest.entry(BASE);
    assert_eq!(guest.config().pfn(spte).get(), OTHER);
    guest.check();
    guest.finish();
}

#[test]
fn what_was_not_accessed_is_not_accessed_afterwards() {
    for_each_format!(keeps_age);
}

fn drops_huge<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, 2 * M2, Level::L2);
    guest.map([BASE], AccessKind::Write, Level::L2);
    let _ = guest.host().take_batches();
    let done = change(&mut guest, BASE + 7, OTHER);
    assert_eq!((done.changed, done.taken.leaves), (0, [0, 1, 0]));
    let batches = guest.host().take_batches();
    assert!(batches.iter().any(|batch| batch.covers(range(BASE, BASE + M2))), "all of it");
    assert_eq!(guest.found(BASE + 7), None);
    // Nothing there: nothing done.
    assert_eq!(change(&mut guest, BASE + 7, OTHER), PageChange::default());
    guest.check();
    guest.finish();
}

#[test]
fn a_huge_page_goes_as_a_whole() {
    for_each_format!(drops_huge);
}

fn refuses<F: Modelled>(caps: Capabilities) {
    let (mut guest, _) = with_moves::<F>(caps);
    guest.map([BASE], AccessKind::Write, Level::L1);
    let entry = guest.entry(BASE);
    let (max_gfn, max_pfn) =
        (guest.config().max_gfn_exclusive(), guest.config().max_pfn_exclusive());
    let mut call = |gfn, pfn| guest.mmu.change_pte(&mut guest.actor, 0, gfn, pfn);
    for pfn in [max_pfn, Pfn::new(u64::MAX)] {
        let gfn = Gfn::new(BASE);
        assert_eq!(call(gfn, pfn), Err(ChangePteError::BadPage { gfn, pfn, max_pfn }));
    }
    for gfn in [max_gfn, Gfn::new(u64::MAX)] {
        let error = ChangePteError::BeyondPhysical { gfn, max_gfn };
        assert_eq!(call(gfn, Pfn::new(OTHER)), Err(error));
    }
    assert_eq!(guest.entry(BASE), entry);
    guest.check();
    guest.finish();
}

#[test]
fn pages_and_frames_out_of_range_are_refused_and_nothing_changes() {
    for_each_format!(refuses);
}

/// Somebody unmaps the range at the same time, and may have passed the entry while it was empty.
#[test]
fn while_another_invalidation_is_in_progress_nothing_is_put_in() {
    let (mut guest, _) = with_moves::<Ept>(Capabilities::ept());
    guest.map([BASE], AccessKind::Write, Level::L1);
    let mmu = Arc::clone(&guest.mmu);
    let mut other = mmu.vm().actor().expect("room");
    let invalidation = mmu.vm().invalidate(other.participant(), range(0, 1));
    let done = change(&mut guest, BASE, OTHER);
    assert_eq!((done.changed, done.taken.leaves), (0, [1, 0, 0]));
    assert_eq!(guest.found(BASE), None);
    drop(invalidation);
    drop(other);
    drop(mmu);
    guest.finish();
}

#[test]
fn where_d_is_the_log_the_old_page_stays_logged() {
    let options = {
        let mut options = TdpOptions::default();
        options.dirty = DirtyTracking::DirtyBit;
        options
    };
    let mut guest = Guest::<Ept>::with(Shape { options, ..Shape::new(Capabilities::ept()) });
    guest.slot(0, BASE, M2, DATA, SlotFlags::LOG_DIRTY);
    guest.host().set_resolver(common::linear(Level::L1));
    guest.map([BASE + 3], AccessKind::Write, Level::L1);
    guest.map([BASE + 4], AccessKind::Read, Level::L1);
    let done = change(&mut guest, BASE + 3, OTHER);
    assert_eq!((done.changed, done.taken.dirty), (1, 1));
    assert_eq!(change(&mut guest, BASE + 4, OTHER + 1).taken.dirty, 0);
    let work = guest.actor.pinned();
    let slots = work.vm.slots().read(&work.section);
    let log = slots.meta(0, 0).and_then(|meta| meta.log()).expect("logged");
    assert_eq!(log.peek(0) & 0b11000, 0b01000, "page 3 was written, page 4 was not");
    drop(work);
    guest.finish();
}

const PAGES: u64 = 8;

/// Count a write to each page reached, until told to stop.
fn writer(
    mmu: &Arc<TdpMmu<Ept, TestHost>>,
    format: &mmu_model::Format,
    words: &[AtomicU64],
    seed: u64,
    stop: &AtomicBool,
) -> u64 {
    let mut random = Random::new(seed);
    let core = mmu.vm().host().add_core(SoftCpu::new(format, 0, Caches::unlimited()));
    let mut runner = Runner::new(mmu, core, seed);
    let _stop = StopOnDrop(stop);
    let mut writes = 0;
    while !stop.load(Ordering::Acquire) {
        let gfn = BASE + random.below(PAGES);
        let kind = if random.chance(1, 3) { AccessKind::Read } else { AccessKind::Write };
        let passed = |pa: u64| {
            let page = pa / 4096 - DATA;
            assert_eq!(page % PAGES, gfn - BASE, "seed {seed}: another gfn's page");
            if kind == AccessKind::Write {
                words[page as usize].fetch_add(1, Ordering::SeqCst);
                writes += 1;
            }
        };
        runner.access(
            gfn,
            kind,
            || random.chance(1, 2),
            passed,
            |outcome| {
                let _ = outcome.expect("no error");
                false
            },
        );
    }
    writes
}

/// Two processors read and write all the time while their pages change, sometimes with an unmap in
/// between: once a page was left, its word stands still.
#[test]
fn no_processor_writes_the_old_page_after_the_call() {
    for (caps, seed) in
        [(Capabilities::ept(), 0x5eed), (common::no_ad(Capabilities::ept()), 0x5eee)]
    {
        println!("seed {seed:#x}");
        let mut guest = Guest::<Ept>::with_memory(caps, PAGES, Level::L1);
        guest.host().record(false);
        guest.host().delay_flushes(Duration::from_micros(20));
        // Which of its copies a gfn has now.
        let copies: Arc<Vec<AtomicU64>> = Arc::new((0..PAGES).map(|_| AtomicU64::new(0)).collect());
        let answers = Arc::clone(&copies);
        guest.host().set_resolver(Arc::new(move |_, gfn, _| {
            let page = gfn.get() - BASE;
            let copy = answers[page as usize].load(Ordering::SeqCst);
            let pfn = Pfn::new(DATA + copy * PAGES + page);
            Ok(HostPage { pfn, writable: true, level: Level::L1 })
        }));
        let words: Vec<AtomicU64> = (0..PAGES * 4).map(|_| AtomicU64::new(0)).collect();
        let stop = AtomicBool::new(false);
        let (mmu, format) = (Arc::clone(&guest.mmu), guest.format);
        let mut random = Random::new(seed);
        let (mut changed, mut writes) = (0, 0);
        std::thread::scope(|scope| {
            let (mmu, format, words, stop) = (&mmu, &format, &words[..], &stop);
            let writers: Vec<_> = (1..3)
                .map(|n| scope.spawn(move || writer(mmu, format, words, seed + n, stop)))
                .collect();
            let _stop = StopOnDrop(stop);
            for turn in 0..1500 {
                let page = random.below(PAGES);
                let one = GfnRange::from_len(Gfn::new(BASE + page), 1);
                let invalidation = mmu.vm().invalidate(guest.actor.participant(), one);
                let old = copies[page as usize].load(Ordering::SeqCst);
                let copy = (old + 1 + random.below(3)) % 4;
                copies[page as usize].store(copy, Ordering::SeqCst);
                let pfn = Pfn::new(DATA + copy * PAGES + page);
                let done = mmu.change_pte_in(&mut guest.actor, &invalidation, 0, one.start, pfn);
                changed += done.expect("legal").changed;
                let left = &words[(old * PAGES + page) as usize];
                let before = left.load(Ordering::SeqCst);
                drop(invalidation);
                std::thread::sleep(Duration::from_micros(random.below(150)));
                let after = left.load(Ordering::SeqCst);
                assert_eq!(before, after, "seed {seed:#x} turn {turn}: the old page was written");
                if turn % 40 == 0 {
                    let _ = guest.unmap(range(BASE, BASE + PAGES));
                }
                assert!(!stop.load(Ordering::Acquire), "seed {seed:#x}: a writer ended");
            }
            stop.store(true, Ordering::Release);
            writes = writers.into_iter().map(|thread| thread.join().unwrap()).sum();
        });
        println!("writes {writes}, pages changed in place {changed}");
        assert!(writes > 100 && changed > 100, "{writes} {changed}");
        drop(mmu);
        guest.check();
        guest.finish();
    }
}

/// Changes and unmaps of the same pages by two threads: an unmap leaves nothing behind.
#[test]
fn an_unmap_beside_a_change_leaves_nothing_mapped() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), PAGES, Level::L1);
    guest.host().record(false);
    // So that they meet while the entry is empty.
    guest.host().delay_flushes(Duration::from_micros(200));
    let mmu = Arc::clone(&guest.mmu);
    for turn in 0..300 {
        guest.map([BASE], AccessKind::Write, Level::L1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut actor = mmu.vm().actor().expect("room");
                let _ = mmu.change_pte(&mut actor, 0, Gfn::new(BASE), Pfn::new(DATA));
            });
            std::thread::sleep(Duration::from_micros(turn));
            let _ = guest.unmap(range(BASE, BASE + 1));
        });
        // Whoever came last.
        assert_eq!(guest.found(BASE), None, "turn {turn}");
    }
    drop(mmu);
    guest.check();
    guest.finish();
}

fn vm(policy: &PagingPolicy) -> Arc<VmCore<TestHost>> {
    let limits = SlotLimits::new(1, Gfn::new(1 << 24));
    let options = VmOptions { paging: policy.get(), ..VmOptions::default() };
    let host = TestHost::new(16);
    VmCore::with_options(host, 2, limits, std::thread::yield_now, options).expect("memory").0
}

#[test]
fn a_vm_keeps_the_paging_it_was_made_for_whatever_the_policy_says_later() {
    let policy = PagingPolicy::default();
    let config = || SpteConfig::<Ept>::new(Capabilities::ept()).expect("possible");
    let first = vm(&policy);
    policy.set(Paging::Shadow);
    let second = vm(&policy);
    assert_eq!((first.paging(), second.paging()), (Paging::Tdp, Paging::Shadow));
    policy.set(Paging::Tdp);
    assert_eq!((first.paging(), second.paging()), (Paging::Tdp, Paging::Shadow));
    assert_eq!(PagingPolicy::new(Paging::Shadow).get(), Paging::Shadow, "another policy");
    let mmu = TdpMmu::try_new(first, config(), TdpOptions::default());
    assert!(mmu.is_ok());
    let mmu = TdpMmu::try_new(second, config(), TdpOptions::default());
    assert_eq!(mmu.err(), Some(WrongPaging { paging: Paging::Shadow }));
}
