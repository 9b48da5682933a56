//! Dirty logging on real threads: two processors write all the time, one thread harvests and
//! switches the log off and on, others age, unmap, split and drop everything.
//!
//! What must hold: a copy of the memory that is brought up to date by nothing but what the harvests
//! hand out equals the memory at the end.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{
    BASE, Core, DATA, Guest, M2, Modelled, Shape, StopOnDrop, TestHost, code, gpa, linear, range,
    request,
};
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::dirty::RingSize;
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::slot::{LogOptions, SlotFlags};
use mmu_core::spte::{Capabilities, Ept, Npt, SpteFormat};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use mmu_core::vm::Actor;
use mmu_model::{AccessKind, Caches, FaultKind, Random, SoftCpu};
use tdp_mmu::{DirtyTracking, LogError, TdpMmu, TdpOptions, TdpVcpu};

/// Across two blocks of 2 MiB, neither end at a word's.
const BEGIN: u64 = M2 - 41;
const PAGES: u64 = 150;
const WORDS: usize = PAGES.div_ceil(64) as usize;
/// Nothing here waits longer.
const PATIENCE: Duration = Duration::from_secs(30);
const TIME: Duration = Duration::from_millis(600);

/// A processor, and how it is asked for its hardware log.
struct Machine {
    core: Arc<Mutex<Core>>,
    /// Times that it was asked, and times that it had handed over all it had.
    asked: AtomicU64,
    answered: AtomicU64,
}

struct Bench<F: SpteFormat> {
    mmu: Arc<TdpMmu<F, TestHost>>,
    memory: Vec<AtomicU64>,
    stop: AtomicBool,
}

/// Hand over what the processor has logged.
fn hand_over<F: SpteFormat>(machine: &Machine, vcpu: &mut TdpVcpu<F, TestHost>) {
    let asked = machine.asked.load(Ordering::Acquire);
    let pages = machine.core.lock().unwrap().cpu.take_log();
    if !pages.is_empty() {
        vcpu.log_hardware(pages.into_iter().map(Gfn::new)).expect("the reserve is enough");
    }
    machine.answered.store(asked, Ordering::Release);
}

/// A guest that increments counters. Gives how often it did.
fn guest_loop<F: SpteFormat>(bench: &Bench<F>, machine: &Machine, seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let mut vcpu = TdpVcpu::new(&bench.mmu, 0).expect("room");
    let _stop = StopOnDrop(&bench.stop);
    let mut done = 0;
    while !bench.stop.load(Ordering::Acquire) {
        let page = random.below(PAGES);
        let kind = if random.chance(3, 4) { AccessKind::Write } else { AccessKind::Read };
        let start = Instant::now();
        while !access(bench, machine, &mut vcpu, page, kind) {
            assert!(start.elapsed() < PATIENCE, "seed {seed}: page {page} is never mapped");
            if bench.stop.load(Ordering::Acquire) {
                break;
            }
        }
        done += u64::from(kind == AccessKind::Write);
        let wanted = machine.asked.load(Ordering::Acquire);
        if wanted != machine.answered.load(Ordering::Acquire) || random.chance(1, 32) {
            hand_over(machine, &mut vcpu);
        }
        while vcpu.actor().ring().is_some_and(|ring| ring.is_soft_full()) {
            assert!(start.elapsed() < PATIENCE, "seed {seed}: nobody empties the ring");
            hand_over(machine, &mut vcpu);
            if bench.stop.load(Ordering::Acquire) {
                break;
            }
            std::thread::yield_now();
        }
    }
    hand_over(machine, &mut vcpu);
    machine.answered.store(u64::MAX, Ordering::Release);
    done
}

/// One try of an access; `true` when it went through.
fn access<F: SpteFormat>(
    bench: &Bench<F>,
    machine: &Machine,
    vcpu: &mut TdpVcpu<F, TestHost>,
    page: u64,
    kind: AccessKind,
) -> bool {
    let gfn = BASE + BEGIN + page;
    let mut core = machine.core.lock().unwrap();
    if core.reload || !vcpu.root_is_current() {
        core.reload = false;
        drop(core);
        let root = vcpu.load_root().expect("a root");
        let mut core = machine.core.lock().unwrap();
        // Asked again meanwhile: `root` may be stale.
        if !core.reload {
            core.cpu.set_root(root.address().get());
        }
        return false;
    }
    match core.cpu.access(bench.mmu.vm().host(), gfn << 12, mmu_model::Access::user(kind)) {
        Ok(pa) => {
            assert_eq!((pa >> 12) - DATA - BEGIN, page);
            if kind == AccessKind::Write {
                bench.memory[page as usize].fetch_add(1, Ordering::SeqCst);
            }
            true
        }
        Err(fault) => {
            drop(core);
            let present = fault.kind == FaultKind::Protection;
            let fault = PageFault::new(gpa(gfn), code(kind, present));
            match vcpu.fault(&fault).expect("no error") {
                FaultOutcome::Retry | FaultOutcome::RingFull => std::thread::yield_now(),
                FaultOutcome::Fixed | FaultOutcome::Spurious => {}
                other => panic!("page {page}: {other:?}"),
            }
            false
        }
    }
}

/// A copy that knows of the memory what harvests say.
struct Copied<'a, F: SpteFormat> {
    bench: &'a Bench<F>,
    copy: Vec<u64>,
    handed_out: u64,
}

impl<F: SpteFormat> Copied<'_, F> {
    fn read(&mut self, page: u64) {
        self.copy[page as usize] = self.bench.memory[page as usize].load(Ordering::SeqCst);
        self.handed_out += 1;
    }

    fn read_words(&mut self, words: &[u64]) {
        for page in (0..PAGES).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 1) {
            self.read(page);
        }
    }

    fn harvest(&mut self, actor: &mut Actor<TestHost>) {
        let mut words = [0; WORDS];
        let _ = self.bench.mmu.harvest_log(actor, 0, 0, &mut words).expect("logged");
        self.read_words(&words);
    }

    fn peek_and_clear(&mut self, actor: &mut Actor<TestHost>, random: &mut Random) {
        let mut words = [0; WORDS];
        let _ = self.bench.mmu.peek_log(actor, 0, 0, &mut words).expect("logged");
        words.iter_mut().for_each(|word| *word &= random.next_u64());
        let _ = self.bench.mmu.clear_log(actor, (0, 0), 0, PAGES, &words).expect("logged");
        self.read_words(&words);
    }

    fn empty_rings(&mut self, actor: &mut Actor<TestHost>) {
        let mut pages = Vec::new();
        for ring in self.bench.mmu.vm().rings() {
            pages.extend(ring.consumer().map(|gfn| gfn.offset));
        }
        let _ = self.bench.mmu.reset_rings(actor).expect("one resets");
        pages.into_iter().for_each(|page| self.read(page));
    }

    fn read_all(&mut self) {
        (0..PAGES).for_each(|page| self.read(page));
        self.handed_out -= PAGES;
    }
}

/// Takes things away from the guest.
fn churn<F: SpteFormat>(bench: &Bench<F>, seed: u64) {
    let mut random = Random::new(seed);
    let mut actor = bench.mmu.vm().actor().expect("room");
    let _stop = StopOnDrop(&bench.stop);
    while !bench.stop.load(Ordering::Acquire) {
        let start = BASE + BEGIN + random.below(PAGES);
        let pages = range(start, start + 1 + random.below(40));
        let mmu = &bench.mmu;
        match random.below(16) {
            0..6 => {
                let _ = mmu.unmap(&mut actor, pages);
            }
            6..12 => {
                let mode = [AgeMode::Clear, AgeMode::ClearFlush][random.below(2) as usize];
                let request = AgeRequest::new(pages, mode);
                let _ = mmu.age(&mut actor, request, &mut CountOnly);
            }
            12..15 => {
                let _ = mmu.split(&mut actor, 0, pages);
            }
            _ => {
                let _ = mmu.invalidate_roots(&mut actor).finish(&mut actor);
            }
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn run<F: Modelled>(caps: Capabilities, tracking: DirtyTracking, log: LogOptions) {
    let what = format!("{} {tracking:?} {log:?}", F::NAME);
    let mut options = TdpOptions::default();
    options.dirty = tracking;
    let mut guest = Guest::<F>::with(Shape { options, log, ..Shape::new(caps) });
    guest.host().record(false);
    guest.host().set_resolver(linear(Level::L2));
    let slot = |on: bool| {
        let flags = if on { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
        request(0, BASE + BEGIN, PAGES, DATA + BEGIN, flags)
    };
    let _ = guest.set_slot(&slot(false)).expect("legal");
    let machines: Arc<[Machine; 2]> = Arc::new([(); 2].map(|()| {
        let mut cpu = SoftCpu::new(&guest.format, 0, Caches::unlimited());
        if tracking == DirtyTracking::HardwareLog {
            cpu.log_dirtied();
        }
        let core = guest.host().add_core(cpu);
        Machine { core, asked: AtomicU64::new(0), answered: AtomicU64::new(0) }
    }));
    let asked = Arc::clone(&machines);
    guest.host().on_sync(Arc::new(move || {
        for machine in &*asked {
            let ticket = machine.asked.fetch_add(1, Ordering::AcqRel) + 1;
            let start = Instant::now();
            while machine.answered.load(Ordering::Acquire) < ticket {
                assert!(start.elapsed() < PATIENCE, "a processor keeps its log");
                std::thread::yield_now();
            }
        }
    }));
    let memory = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let bench = Bench { mmu: Arc::clone(&guest.mmu), memory, stop: AtomicBool::new(false) };
    let mut copied = Copied { bench: &bench, copy: vec![0; PAGES as usize], handed_out: 0 };
    let mut random = Random::new(7);
    let mut written = 0;
    std::thread::scope(|scope| {
        let bench = &bench;
        let guests = [0, 1].map(|n: usize| {
            let machine = &machines[n];
            scope.spawn(move || guest_loop(bench, machine, n as u64))
        });
        let churner = scope.spawn(move || churn(bench, 3));
        let _stop = StopOnDrop(&bench.stop);
        let _ = guest.set_slot(&slot(true)).expect("legal");
        copied.read_all();
        let start = Instant::now();
        while start.elapsed() < TIME && !bench.stop.load(Ordering::Acquire) {
            match random.below(12) {
                0 => {
                    // While vCPUs run: what was written in between is in the memory read then.
                    let _ = guest.set_slot(&slot(false)).expect("legal");
                    let _ = guest.set_slot(&slot(true)).expect("legal");
                    copied.read_all();
                }
                _ if !log.bitmap => copied.empty_rings(&mut guest.actor),
                1..7 => copied.harvest(&mut guest.actor),
                _ => copied.peek_and_clear(&mut guest.actor, &mut random),
            }
            std::thread::yield_now();
        }
        bench.stop.store(true, Ordering::Release);
        written = guests.map(|thread| thread.join().expect("no panic")).iter().sum();
        churner.join().expect("no panic");
    });
    if log.bitmap {
        copied.harvest(&mut guest.actor);
    } else {
        copied.empty_rings(&mut guest.actor);
    }
    let memory: Vec<u64> = bench.memory.iter().map(|word| word.load(Ordering::SeqCst)).collect();
    assert_eq!(copied.copy, memory, "{what}: a write is in no harvest");
    println!("{what}: {written} writes, {} pages handed out", copied.handed_out);
    assert!(written > 100 && copied.handed_out > 20, "{what}: {written} {}", copied.handed_out);
    let _ = guest.mmu.unmap(&mut guest.actor, GfnRange::ALL);
    drop(bench);
    // Not the root of before the first zap-all.
    guest.vcpu.unload_root();
    guest.check();
    guest.finish();
}

const WAYS: [DirtyTracking; 3] =
    [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit, DirtyTracking::HardwareLog];

// INVARIANT[I9].
#[test]
fn the_harvests_of_a_running_guest_make_up_its_memory() {
    for tracking in WAYS {
        run::<Ept>(Capabilities::ept(), tracking, LogOptions::default());
        let log = LogOptions { initially_set: true, ..LogOptions::default() };
        run::<Npt>(Capabilities::npt(), tracking, log);
    }
    let none = common::no_ad(Capabilities::ept());
    run::<Ept>(none, DirtyTracking::WriteProtect, LogOptions::default());
}

// INVARIANT[I9].
#[test]
fn the_rings_of_a_running_guest_make_up_its_memory() {
    let ring = Some(RingSize::from_bytes(1 << 14).expect("1024 entries"));
    for tracking in [DirtyTracking::WriteProtect, DirtyTracking::HardwareLog] {
        let log = LogOptions { bitmap: false, ring, initially_set: false };
        run::<Ept>(Capabilities::ept(), tracking, log);
    }
}

/// Calls on the log of a slot that comes, moves, and goes: what they find may be the slot of
/// before, which costs the answer, not the VM.
#[test]
fn a_slot_may_change_under_a_harvest() {
    let mut guest = Guest::<Ept>::new(Capabilities::ept());
    guest.host().record(false);
    guest.host().set_resolver(linear(Level::L2));
    let stop = AtomicBool::new(false);
    let mmu = Arc::clone(&guest.mmu);
    let (mut harvests, mut refused) = (0, 0);
    let mut guest = std::thread::scope(|scope| {
        let (mmu, stop) = (&mmu, &stop);
        let changer = scope.spawn(|| {
            let _stop = StopOnDrop(stop);
            let mut random = Random::new(5);
            while !stop.load(Ordering::Acquire) {
                let base = BASE + random.below(3) * 4 * M2 + 7;
                let on = random.chance(3, 4);
                let flags = if on { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
                guest.slot(0, base, 2 * M2, DATA + 7, flags);
                let pages = (0..8).map(|n| base + n * 100);
                guest.map(pages, AccessKind::Write, Level::L2);
                if random.chance(1, 4) {
                    guest.slot(0, base, 0, 0, SlotFlags::empty());
                }
            }
            guest
        });
        let _stop = StopOnDrop(stop);
        let mut actor = mmu.vm().actor().expect("room");
        let mut words = vec![0; 16];
        let start = Instant::now();
        while start.elapsed() < TIME && !stop.load(Ordering::Acquire) {
            let harvest = mmu.harvest_log(&mut actor, 0, 0, &mut words);
            let peek = mmu.peek_log(&mut actor, 0, 0, &mut words);
            let clear = mmu.clear_log(&mut actor, (0, 0), 64, 128, &[u64::MAX; 2]);
            for result in [harvest, peek, clear] {
                match result {
                    Ok(_) => harvests += 1,
                    Err(LogError::NoSuchSlot { .. } | LogError::NotLogged { .. }) => refused += 1,
                    Err(error) => panic!("{error}"),
                }
            }
        }
        drop(actor);
        stop.store(true, Ordering::Release);
        changer.join().expect("no panic")
    });
    drop(mmu);
    guest.check();
    guest.finish();
    assert!(harvests > 0 && refused > 0, "{harvests} {refused}");
}
