//! Everything at once on real threads: two processors with TLBs that forget nothing by themselves,
//! a migrator that takes pages away and moves them, an ager, zap-alls, a slot that comes and goes.
//!
//! What must hold: when an unmap has returned, no access reaches the page; no increment is lost
//! when a page moves; nothing is left at the end. A page that nobody may use holds [`POISON`]:
//! whoever sees it, or changes it, used a translation that was taken away.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{BASE, Core, DATA, Guest, Modelled, Shape, StopOnDrop, TestHost, code, gpa, range};
use mmu_core::access::PfErrorCode;
use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt, SpteFormat};
use mmu_core::traits::{
    AgeMode, AgeRange, AgeRequest, CountOnly, HostPage, ResolveError, UpperBits,
};
use mmu_model::{AccessKind, Caches, FaultKind, Random, SoftCpu};
use tdp_mmu::{TdpMmu, TdpVcpu};

/// Pages that the guest uses all the time.
const PAGES: u64 = 96;
/// Pages of the slot that comes and goes.
const COMING: u64 = 32;
/// A page that nobody may use.
const POISON: u64 = 0xdead_dead_dead_dead;
/// Nothing here waits longer.
const PATIENCE: Duration = Duration::from_secs(30);
const TIME: Duration = Duration::from_millis(1200);

/// Guest memory: two frames for every page, one in use.
struct Memory {
    /// One word per frame: the guest's counter.
    words: Vec<AtomicU64>,
    /// Frame of each page, as an index into `words`.
    frame: Vec<AtomicU64>,
}

impl Memory {
    fn new() -> Self {
        let total = PAGES + COMING;
        let word = |n: u64| AtomicU64::new(if n < total { 0 } else { POISON });
        Self {
            words: (0..2 * total).map(word).collect(),
            frame: (0..total).map(AtomicU64::new).collect(),
        }
    }

    fn word(&self, pa: u64) -> &AtomicU64 {
        &self.words[(pa / 4096 - DATA) as usize]
    }

    /// Move a page to its other frame; its mapping is gone and stays gone meanwhile.
    fn migrate(&self, page: u64) {
        let old = self.frame[page as usize].load(Ordering::SeqCst);
        let new = (old + PAGES + COMING) % (2 * (PAGES + COMING));
        let spare = &self.words[new as usize];
        let content = self.words[old as usize].swap(POISON, Ordering::SeqCst);
        assert_ne!(content, POISON, "page {page:#x} was moved twice");
        assert_eq!(spare.swap(content, Ordering::SeqCst), POISON, "page {page:#x}: a stale write");
        self.frame[page as usize].store(new, Ordering::SeqCst);
    }
}

/// A guest that increments counters; gives the number of increments per page.
fn guest_loop<F: SpteFormat>(
    mmu: &Arc<TdpMmu<F, TestHost>>,
    core: &Mutex<Core>,
    memory: &Memory,
    seed: u64,
    stop: &AtomicBool,
) -> Vec<u64> {
    let mut random = Random::new(seed);
    let mut vcpu = TdpVcpu::new(mmu, 0).expect("room");
    let mut done = vec![0; (PAGES + COMING) as usize];
    let _stop = StopOnDrop(stop);
    while !stop.load(Ordering::Acquire) {
        let page =
            if random.chance(1, 6) { PAGES + random.below(COMING) } else { random.below(PAGES) };
        let write = random.chance(1, 2);
        let kind = if write { AccessKind::Write } else { AccessKind::Read };
        let gfn = BASE + page;
        let start = Instant::now();
        // Each turn is a fault that another thread's change made necessary.
        loop {
            assert!(start.elapsed() < PATIENCE, "seed {seed}: {gfn:#x} is never mapped");
            let mut guard = core.lock().unwrap();
            if guard.reload || !vcpu.root_is_current() {
                guard.reload = false;
                drop(guard);
                let root = vcpu.load_root().expect("a root");
                let mut guard = core.lock().unwrap();
                // Asked again meanwhile: `root` may be stale.
                if !guard.reload {
                    guard.cpu.set_root(root.address().get());
                }
                continue;
            }
            let access = mmu_model::Access::user(kind);
            match guard.cpu.access(mmu.vm().host(), gfn << 12, access) {
                Ok(pa) => {
                    let word = memory.word(pa);
                    let seen = word.load(Ordering::SeqCst);
                    assert_ne!(seen, POISON, "seed {seed}: {gfn:#x} through a stale translation");
                    if write {
                        let _ = word.fetch_add(1, Ordering::SeqCst);
                        done[page as usize] += 1;
                    }
                    break;
                }
                Err(fault) => {
                    drop(guard);
                    assert_ne!(fault.kind, FaultKind::NoMemory, "{fault:?}");
                    // MMIO entries stand where a slot comes and goes.
                    let reserved = fault.kind == FaultKind::Reserved;
                    assert!(!reserved || page >= PAGES, "{fault:?}");
                    let mut code = code(kind, fault.kind == FaultKind::Protection);
                    code.set(PfErrorCode::RESERVED, reserved);
                    let fault = PageFault::new(gpa(gfn), code);
                    match vcpu.fault(&fault).expect("no error") {
                        FaultOutcome::Emulate(_) => {
                            assert!(page >= PAGES, "seed {seed}: {gfn:#x} has a slot");
                            break;
                        }
                        FaultOutcome::Retry => std::thread::yield_now(),
                        _ => {}
                    }
                }
            }
        }
    }
    // What the caches hold is nobody's any more.
    core.lock().unwrap().cpu.flush_all();
    done
}

/// Take pages away, move them, give them back.
fn migrate<F: SpteFormat>(
    mmu: &TdpMmu<F, TestHost>,
    memory: &Memory,
    seed: u64,
    stop: &AtomicBool,
) -> u64 {
    let mut random = Random::new(seed);
    let mut actor = mmu.vm().actor().expect("room");
    let mut begin = mmu.vm().actor().expect("room");
    let mut moved = 0;
    let _stop = StopOnDrop(stop);
    while !stop.load(Ordering::Acquire) {
        let first = random.below(PAGES);
        let end = (first + 1 + random.below(8)).min(PAGES);
        let gone = range(BASE + first, BASE + end);
        let invalidation = mmu.vm().notify().begin(begin.participant(), gone);
        let _ = mmu.unmap(&mut actor, gone);
        (first..end).for_each(|page| memory.migrate(page));
        moved += end - first;
        drop(invalidation);
    }
    moved
}

fn age<F: SpteFormat>(mmu: &TdpMmu<F, TestHost>, stop: &AtomicBool) -> u64 {
    let mut actor = mmu.vm().actor().expect("room");
    let _stop = StopOnDrop(stop);
    let mut young = 0;
    let modes = [AgeMode::Clear, AgeMode::Test, AgeMode::Clear, AgeMode::ClearFlush];
    let uses = [UpperBits::Ignore, UpperBits::Use];
    let asks = uses.into_iter().flat_map(|upper| modes.map(|mode| (mode, upper)));
    for (mode, upper) in asks.cycle() {
        if stop.load(Ordering::Acquire) {
            break;
        }
        let request = AgeRequest::new(GfnRange::ALL, mode).with_upper(upper);
        young += mmu.age(&mut actor, request, &mut CountOnly).young;
        std::thread::yield_now();
    }
    young
}

fn drop_all<F: SpteFormat>(mmu: &TdpMmu<F, TestHost>, seed: u64, stop: &AtomicBool) -> u64 {
    let mut random = Random::new(seed);
    let mut actor = mmu.vm().actor().expect("room");
    let _stop = StopOnDrop(stop);
    let mut times = 0;
    while !stop.load(Ordering::Acquire) {
        let mut zap = mmu.invalidate_roots(&mut actor);
        for _ in 0..random.below(4) {
            let _ = zap.step(&mut actor, 1);
        }
        // Now and then it is left for the next.
        if random.chance(3, 4) {
            let _ = zap.finish(&mut actor);
        }
        times += 1;
        std::thread::sleep(Duration::from_micros(300));
    }
    times
}

/// Delete the second slot, move its pages, create it again.
fn come_and_go<F: Modelled>(guest: &mut Guest<F>, memory: &Memory, stop: &AtomicBool) -> u64 {
    let _stop = StopOnDrop(stop);
    let mut times = 0;
    while !stop.load(Ordering::Acquire) {
        guest.slot(1, BASE + PAGES, 0, 0, SlotFlags::empty());
        (PAGES..PAGES + COMING).for_each(|page| memory.migrate(page));
        guest.slot(1, BASE + PAGES, COMING, DATA + PAGES, SlotFlags::empty());
        times += 1;
        std::thread::sleep(Duration::from_micros(100));
    }
    times
}

fn stress<F: Modelled>(caps: Capabilities, seed: u64) {
    let shape = Shape { participants: 16, frames: 2048, ..Shape::new(caps) };
    let mut guest = Guest::<F>::without_root(shape);
    guest.host().record(false);
    let memory = Arc::new(Memory::new());
    let backing = Arc::clone(&memory);
    guest.host().set_resolver(Arc::new(move |slot, gfn: Gfn, _| {
        let _ = slot.hva_of(gfn).ok_or(ResolveError::NoMemory)?;
        let page = gfn.get() - BASE;
        let frame = backing.frame[page as usize].load(Ordering::SeqCst);
        Ok(HostPage { pfn: Pfn::new(DATA + frame), writable: true, level: Level::L1 })
    }));
    guest.slot(0, BASE, PAGES, DATA, SlotFlags::empty());
    guest.slot(1, BASE + PAGES, COMING, DATA + PAGES, SlotFlags::empty());
    let core = || guest.host().add_core(SoftCpu::new(&guest.format, 0, Caches::unlimited()));
    let cores = [core(), core()];
    let stop = AtomicBool::new(false);
    let mmu = Arc::clone(&guest.mmu);
    let (done, figures) = std::thread::scope(|scope| {
        let (mmu, memory, stop, cores) = (&mmu, &*memory, &stop, &cores);
        let vcpus: Vec<_> = (0..2_usize)
            .map(|n| {
                let seed = seed ^ n as u64;
                scope.spawn(move || guest_loop(mmu, &cores[n], memory, seed, stop))
            })
            .collect();
        let migrator = scope.spawn(move || migrate(mmu, memory, seed + 10, stop));
        let ager = scope.spawn(move || age(mmu, stop));
        let zapper = scope.spawn(move || drop_all(mmu, seed + 20, stop));
        let start = Instant::now();
        scope.spawn(move || {
            while start.elapsed() < TIME && !stop.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(5));
            }
            stop.store(true, Ordering::Release);
        });
        let slots = come_and_go(&mut guest, memory, stop);
        let done: Vec<Vec<u64>> = vcpus.into_iter().map(|t| t.join().unwrap()).collect();
        let moved = migrator.join().unwrap();
        (done, [moved, ager.join().unwrap(), zapper.join().unwrap(), slots])
    });
    // Every increment is there, wherever the page went.
    let mut total = 0;
    for (page, (first, second)) in done[0].iter().zip(&done[1]).enumerate() {
        let frame = memory.frame[page].load(Ordering::SeqCst) as usize;
        let expected = first + second;
        assert_eq!(memory.words[frame].load(Ordering::SeqCst), expected, "page {page:#x}");
        total += expected;
    }
    println!("{}: {total} increments; moved, young, zap-alls, slots {figures:?}", F::NAME);
    assert!(total > 1000 && figures.iter().all(|figure| *figure > 0), "{total} {figures:?}");
    drop(mmu);
    let _ = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
    guest.check();
    guest.finish();
}

// INVARIANT[I11].
#[test]
fn no_access_reaches_a_page_that_was_taken_away() {
    let seed = 0x5eed;
    println!("seed {seed:#x}");
    stress::<Ept>(Capabilities::ept(), seed);
    stress::<Ept>(common::no_ad(Capabilities::ept()), seed + 100);
    stress::<Npt>(Capabilities::npt(), seed + 200);
    stress::<Legacy>(common::no_ad(Capabilities::legacy()), seed + 300);
}
