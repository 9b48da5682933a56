//! Flushes and waits that no other test would miss, one by one (`docs/FLUSHES.md`).

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{BASE, Batch, Core, DATA, Guest, M2, Modelled, Shape, TestHost, code, gpa, range};
use mmu_core::addr::{Gfn, Level};
use mmu_core::fault::PageFault;
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept, Legacy, SpteFormat};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, AgeSink, CountOnly, MASK_WORDS};
use mmu_core::vm::Actor;
use mmu_model::AccessKind::{Fetch, Read};
use mmu_model::{Caches, SoftCpu};
use tdp_mmu::{DirtyTracking, TdpMmu, TdpOptions, TdpVcpu};

/// Row 0.2.7: a processor may walk a table that was unlinked until the flush is complete, so nobody
/// is given its frame before.
// INVARIANT[I13].
#[test]
fn no_table_comes_back_before_its_flush() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 4 * M2, Level::L2);
    guest.map((0..4).map(|block| BASE + block * M2), Read, Level::L1);
    let met = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&met);
    let mmu = Arc::downgrade(&guest.mmu);
    guest.host().before_flush(Some(Arc::new(move |batch: &Batch| {
        let mmu = mmu.upgrade().expect("alive");
        let pool = mmu.vm().pool();
        // All that can be had at this moment.
        let mut frames = pool.take(0, u64::MAX).expect("none is enough");
        let mut kept = mmu_core::frame::FrameList::new();
        while let Some(frame) = frames.pop(pool.map()) {
            assert!(!batch.tables.contains(&frame), "{frame} is handed out before its flush");
            kept.push(pool.map(), frame);
        }
        pool.give_back(kept);
        seen.fetch_add(batch.tables.len() as u64, Ordering::Relaxed);
    })));
    let all = range(BASE, BASE + 4 * M2);
    let report = guest.mmu.collapse(&mut guest.actor, 0, all);
    guest.host().before_flush(None);
    assert_eq!((report.collapses, met.load(Ordering::Relaxed)), ([4, 0], 4));
    guest.check();
    guest.finish();
}

/// What a collapse takes out is flushed, and comes back, as it goes: a large VM does not keep all
/// its tables until the end.
#[test]
fn a_collapse_gives_tables_back_on_the_way() {
    const BLOCKS: u64 = 70;
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), BLOCKS * M2, Level::L2);
    guest.map((0..BLOCKS).map(|block| BASE + block * M2), Read, Level::L1);
    guest.host().take_batches();
    let all = range(BASE, BASE + BLOCKS * M2);
    let report = guest.mmu.collapse(&mut guest.actor, 0, all);
    assert_eq!(report.collapses, [BLOCKS, 0]);
    let tables: Vec<usize> = guest.host().take_batches().iter().map(|b| b.tables.len()).collect();
    assert_eq!(tables, [32, 32, 6]);
    guest.check();
    guest.finish();
}

/// B31, B70: while a table is taken out by the recovery, an unmap of its block finds nothing there,
/// and must not return before a flush all the same.
#[test]
fn an_unmap_beside_a_recovery_flushes_for_itself() {
    let caps = Capabilities { nx_huge_pages: true, ..Capabilities::ept() };
    let mut guest = Guest::<Ept>::with_memory(caps, M2, Level::L2);
    guest.map([BASE + 3], Fetch, Level::L3);
    guest.host().take_batches();
    let mmu = Arc::downgrade(&guest.mmu);
    let first = AtomicBool::new(true);
    guest.host().before_flush(Some(Arc::new(move |_: &Batch| {
        if first.swap(false, Ordering::SeqCst) {
            let mmu = mmu.upgrade().expect("alive");
            let mut actor = mmu.vm().actor().expect("room");
            let gone = mmu.unmap(&mut actor, range(BASE + 3, BASE + 4));
            assert_eq!(gone.pages(), 0, "the recovery was first");
        }
    })));
    assert_eq!(guest.mmu.recover_nx(&mut guest.actor, 1).recovered, 1);
    guest.host().before_flush(None);
    let batches = guest.host().take_batches();
    assert_eq!(batches.len(), 2, "{batches:?}");
    assert!(batches[1].covers(range(BASE + 3, BASE + 4)), "{batches:?}");
    guest.check();
    guest.finish();
}

/// Guest memory of two tables, read through a TLB.
struct Aged<F: SpteFormat> {
    mmu: Arc<TdpMmu<F, TestHost>>,
    core: Arc<Mutex<Core>>,
    vcpu: Mutex<TdpVcpu<F, TestHost>>,
}

/// A page of each table.
const PAGES: [u64; 2] = [BASE, BASE + M2];

impl<F: Modelled> Aged<F> {
    fn new(guest: &mut Guest<F>) -> Self {
        let root = guest.root_register();
        let core = guest.host().add_core(SoftCpu::new(&guest.format, root, Caches::unlimited()));
        let mut vcpu = TdpVcpu::new(&guest.mmu, 0).expect("room");
        vcpu.load_root().expect("a root");
        let aged = Self { mmu: Arc::clone(&guest.mmu), core, vcpu: Mutex::new(vcpu) };
        aged.read();
        aged
    }

    /// The guest reads both pages.
    fn read(&self) {
        let access = mmu_model::Access::user(Read);
        for gfn in PAGES {
            let mut turns = 0..4;
            while self.core.lock().unwrap().cpu.access(self.host(), gfn << 12, access).is_err() {
                assert!(turns.next().is_some(), "{gfn:#x} cannot be read");
                let fault = PageFault::new(gpa(gfn), code(Read, false));
                let _ = self.vcpu.lock().unwrap().fault(&fault).expect("no error");
            }
        }
    }

    fn host(&self) -> &TestHost {
        self.mmu.vm().host()
    }

    /// A precise pass: how many pages were read since the last one.
    fn precise(&self, actor: &mut Actor<TestHost>) -> u64 {
        age(&self.mmu, actor, AgeMode::ClearFlush, &mut CountOnly)
    }
}

fn age<F: SpteFormat>(
    mmu: &TdpMmu<F, TestHost>,
    actor: &mut Actor<TestHost>,
    mode: AgeMode,
    sink: &mut impl AgeSink,
) -> u64 {
    let request = AgeRequest::new(range(BASE, BASE + 2 * M2), mode);
    mmu.age(actor, request, sink).young
}

/// Calls a closure when a pass has cleared its first table and not come to the second.
struct Between<C: FnMut()>(Option<C>);

impl<C: FnMut()> AgeSink for Between<C> {
    fn table(&mut self, _: Gfn, _: &[u64; MASK_WORDS], _: &[u64; MASK_WORDS]) {
        if let Some(mut call) = self.0.take() {
            call();
        }
    }

    fn huge(&mut self, _: Gfn, _: Level, _: bool) {}
}

fn coarse_around_precise<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, 2 * M2, Level::L1);
    let aged = Aged::new(&mut guest);
    let mut inner = guest.mmu.vm().actor().expect("room");
    let mut seen = 0;
    let between = || {
        // The first page is not young any more, but a TLB has it.
        assert_eq!(aged.precise(&mut inner), 1, "the second page");
        aged.read();
        seen = aged.precise(&mut inner);
    };
    let young = age(&guest.mmu, &mut guest.actor, AgeMode::Clear, &mut Between(Some(between)));
    assert_eq!(seen, 2, "{}: a read after a precise pass was not seen by the next", F::NAME);
    assert_eq!(young, 1, "of the second page nothing was left to clear");
    drop((aged, inner));
    guest.finish();
}

/// Row 5.2: a coarse pass says what it clears before it does, so that a precise one in the middle
/// of it flushes that too.
#[test]
fn a_precise_pass_inside_a_coarse_one_flushes_what_that_one_cleared() {
    coarse_around_precise::<Ept>(Capabilities::ept());
    coarse_around_precise::<Legacy>(Capabilities::legacy());
}

fn coarse_after_precise<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, 2 * M2, Level::L1);
    let aged = Aged::new(&mut guest);
    let mut inner = guest.mmu.vm().actor().expect("room");
    let between = || {
        // Flushes all that the coarse pass has said, and forgets it.
        let _ = aged.precise(&mut inner);
        aged.read();
    };
    // Goes on to clear the second page, which a TLB has.
    let young = age(&guest.mmu, &mut guest.actor, AgeMode::Clear, &mut Between(Some(between)));
    assert_eq!(young, 2);
    assert_eq!(aged.precise(&mut guest.actor), 1, "the first page was read in between");
    aged.read();
    assert_eq!(aged.precise(&mut guest.actor), 2, "{}: a TLB hid the read", F::NAME);
    drop((aged, inner));
    guest.finish();
}

/// Row 5.2: and it says so again when it has, because a precise pass in between may have forgotten
/// the first note.
#[test]
fn what_a_coarse_pass_clears_after_a_precise_one_is_flushed_by_the_next() {
    coarse_after_precise::<Ept>(Capabilities::ept());
    coarse_after_precise::<Legacy>(Capabilities::legacy());
}

/// Row 3.48: a write stands in the buffer of the processor that made it until somebody asks.
#[test]
fn what_processors_have_logged_is_fetched_before_it_is_handed_out() {
    let mut options = TdpOptions::default();
    options.dirty = DirtyTracking::HardwareLog;
    let mut guest = Guest::<Ept>::with(Shape { options, ..Shape::new(Capabilities::ept()) });
    guest.slot(0, BASE, 64, DATA, SlotFlags::LOG_DIRTY);
    let mut vcpu = TdpVcpu::new(&guest.mmu, 0).expect("room");
    vcpu.load_root().expect("a root");
    let vcpu = Arc::new(Mutex::new(vcpu));
    // A processor that wrote pages 3 and 9 and has not been asked.
    let buffer = Arc::new(Mutex::new(vec![Gfn::new(BASE + 3), Gfn::new(BASE + 9)]));
    let (owner, logged) = (Arc::downgrade(&vcpu), Arc::clone(&buffer));
    guest.host().on_sync(Arc::new(move || {
        let pages = std::mem::take(&mut *logged.lock().unwrap());
        let vcpu = owner.upgrade().expect("alive");
        let _ = vcpu.lock().unwrap().log_hardware(pages).expect("no ring");
    }));
    let mut words = [0];
    let peeked = guest.mmu.peek_log(&mut guest.actor, 0, 0, &mut words).expect("logged");
    assert_eq!((peeked.pages, words), (2, [1 << 3 | 1 << 9]));
    buffer.lock().unwrap().push(Gfn::new(BASE + 5));
    let taken = guest.mmu.harvest_log(&mut guest.actor, 0, 0, &mut words).expect("logged");
    assert_eq!((taken.pages, words), (3, [1 << 3 | 1 << 5 | 1 << 9]));
    drop(vcpu);
    guest.finish();
}
