//! The dirty log against pages that have versions: whatever happens in between, a page that was
//! written since it was last handed out is handed out by the next harvest.
//!
//! A processor whose caches forget nothing by themselves runs the guest; two readers, one of the
//! bitmap and one of the rings, keep a copy of the versions and update it from what they are given.

mod common;

use std::collections::BTreeSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};

use common::{BASE, Core, DATA, Guest, M2, Modelled, Shape, code, gpa, linear, range, request};
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::dirty::RingSize;
use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::slot::{LogOptions, SlotFlags};
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt};
use mmu_core::traits::AgeMode;
use mmu_model::{AccessKind, Caches, FaultKind, Random, SoftCpu};
use tdp_mmu::root::ZapProgress;
use tdp_mmu::{DirtyTracking, TdpOptions};

/// The slot begins and ends within a word, and holds two whole blocks of 2 MiB.
const BEGIN: u64 = 449;
const PAGES: u64 = 1200;
const WORDS: usize = PAGES.div_ceil(64) as usize;
/// Where it may be.
const PLACES: [u64; 2] = [BASE + BEGIN, BASE + 8 * M2 + BEGIN];
/// A copy that was never made.
const NEVER: u64 = u64::MAX;

/// What a run is made of.
#[derive(Clone, Copy, Debug)]
struct Setup {
    tracking: DirtyTracking,
    log: LogOptions,
    eager_split: bool,
    huge: bool,
    /// Refuse frames now and then.
    starve: bool,
}

/// A reader of the log.
#[derive(Clone)]
struct Reader {
    /// Version of each page when it was handed out.
    copy: Vec<u64>,
    /// Pages that may be handed out: written, or marked, since they were last.
    allowed: BTreeSet<u64>,
}

impl Reader {
    fn begin(memory: &[u64], all: bool) -> Self {
        let copy = if all { vec![NEVER; memory.len()] } else { memory.to_vec() };
        let allowed = if all { (0..PAGES).collect() } else { BTreeSet::new() };
        Self { copy, allowed }
    }

    fn got(&mut self, page: u64, memory: &[u64], exact: bool) {
        let allowed = self.allowed.remove(&page);
        assert!(allowed || !exact, "page {page} was handed out, and nobody wrote it");
        self.copy[page as usize] = memory[page as usize];
    }

    #[track_caller]
    fn complete(&self, logged: &Range<u64>, memory: &[u64]) {
        for page in logged.clone() {
            let (copy, is) = (self.copy[page as usize], memory[page as usize]);
            assert_eq!(copy, is, "page {page}: a write is missing from the harvests");
        }
    }
}

struct Run<F: Modelled> {
    guest: Guest<F>,
    core: Arc<Mutex<Core>>,
    setup: Setup,
    random: Random,
    base: u64,
    /// Version of each page of the slot.
    memory: Vec<u64>,
    logged: Option<Range<u64>>,
    bits: Reader,
    ring: Reader,
    handed_out: u64,
}

fn pages_of(words: &[u64]) -> impl Iterator<Item = u64> {
    (0..PAGES).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 1)
}

impl<F: Modelled> Run<F> {
    fn new(caps: Capabilities, setup: Setup, seed: u64) -> Self {
        let mut options = TdpOptions::default();
        (options.dirty, options.eager_split) = (setup.tracking, setup.eager_split);
        let shape = Shape { frames: 96, options, log: setup.log, ..Shape::new(caps) };
        let mut guest = Guest::<F>::with(shape);
        guest.host().record(false);
        guest.host().set_resolver(linear(if setup.huge { Level::L2 } else { Level::L1 }));
        let mut cpu = SoftCpu::new(&guest.format, 0, Caches::unlimited());
        if setup.tracking == DirtyTracking::HardwareLog {
            cpu.log_dirtied();
        }
        let core = guest.host().add_core(cpu);
        let base = PLACES[0];
        guest.slot(0, base, PAGES, DATA + BEGIN, SlotFlags::empty());
        let memory = vec![0; PAGES as usize];
        let reader = Reader::begin(&memory, false);
        let random = Random::new(seed);
        let (bits, ring) = (reader.clone(), reader);
        let logged = None;
        Self { guest, core, setup, random, base, memory, logged, bits, ring, handed_out: 0 }
    }

    /// Is what is handed out exactly what was written?
    fn exact(&self) -> bool {
        self.guest.mmu.dirty_tracking() == DirtyTracking::WriteProtect
    }

    fn wrote(&mut self, page: u64) {
        self.bits.allowed.insert(page);
        self.ring.allowed.insert(page);
    }

    /// The processor leaves the guest: its log is emptied.
    fn exit(&mut self) {
        let logged = self.core.lock().unwrap().cpu.take_log();
        let pages = logged.into_iter().map(Gfn::new);
        if self.guest.vcpu.log_hardware(pages).is_err() {
            panic!("the reserve of a ring was used up");
        }
    }

    fn load_root(&mut self) {
        let root = self.guest.vcpu.load_root();
        let root = match root {
            Ok(root) => root,
            Err(_) => {
                self.find_frames();
                self.guest.vcpu.load_root().expect("a root")
            }
        };
        let mut core = self.core.lock().unwrap();
        core.reload = false;
        core.cpu.set_root(root.address().get());
    }

    /// Somebody needs frames: let there be some, at least those of dead trees.
    fn find_frames(&mut self) {
        self.guest.host().refuse(u64::MAX, u64::MAX);
        let _ =
            self.guest.mmu.invalidate_roots(&mut self.guest.actor).finish(&mut self.guest.actor);
    }

    /// An access as the guest makes it, faults and all.
    fn access(&mut self, page: u64, kind: AccessKind) {
        let gfn = self.base + page;
        for turn in 0.. {
            assert!(turn < 64, "page {page} is never mapped");
            if self.core.lock().unwrap().reload {
                // Only now: until it is told, it runs on the root it has, invalid or not.
                self.load_root();
            }
            let found = {
                let access = mmu_model::Access::user(kind);
                let mut core = self.core.lock().unwrap();
                core.cpu.access(self.guest.mmu.vm().host(), gfn << 12, access)
            };
            match found {
                Ok(pa) => {
                    assert_eq!((pa >> 12) - DATA - BEGIN, page);
                    if kind == AccessKind::Write {
                        self.memory[page as usize] += 1;
                        self.wrote(page);
                    }
                    // Most writes stay in the processor's log for a while.
                    if self.core.lock().unwrap().cpu.logged() > 40 {
                        self.exit();
                    }
                    return;
                }
                Err(fault) => {
                    self.exit();
                    self.fault(page, kind, fault.kind == FaultKind::Protection);
                }
            }
        }
    }

    fn fault(&mut self, page: u64, kind: AccessKind, present: bool) {
        if kind == AccessKind::Write {
            // A fault that grants the write marks the page, whether the write follows or not.
            self.wrote(page);
        }
        let fault = PageFault::new(gpa(self.base + page), code(kind, present));
        match self.guest.vcpu.fault(&fault) {
            Ok(FaultOutcome::Fixed | FaultOutcome::Spurious) => {}
            Ok(FaultOutcome::Retry) => self.load_root(),
            Ok(FaultOutcome::RingFull) => self.read_ring(),
            Err(FaultError::OutOfFrames(_)) => self.find_frames(),
            other => panic!("page {page}: {other:?}"),
        }
        if self.guest.vcpu.actor().ring().is_some_and(|ring| ring.is_soft_full()) {
            self.read_ring();
        }
    }

    /// Take everything out of the rings and reset them.
    fn read_ring(&mut self) {
        // What a processor has not handed over is in no ring.
        self.exit();
        let vm = Arc::clone(self.guest.mmu.vm());
        let mut got = BTreeSet::new();
        for ring in vm.rings() {
            for entry in ring.consumer() {
                assert_eq!((entry.key.as_id, entry.key.id), (0, 0));
                got.insert(entry.offset);
            }
        }
        let _ = self.guest.mmu.reset_rings(&mut self.guest.actor).expect("rings");
        for page in got {
            self.ring.got(page, &self.memory, self.exact());
            self.handed_out += 1;
        }
        if let Some(logged) = &self.logged {
            assert!(vm.rings().iter().all(|ring| ring.used() == 0));
            self.ring.complete(logged, &self.memory);
        }
    }

    fn harvest(&mut self) {
        // What `sync_hardware_log` makes every processor do.
        self.exit();
        let mut words = [0; WORDS];
        let harvest = self.guest.mmu.harvest_log(&mut self.guest.actor, 0, 0, &mut words);
        let harvest = harvest.expect("a logged slot");
        let logged = self.logged.clone().expect("logged");
        assert_eq!(harvest.pages, pages_of(&words).count() as u64);
        for page in pages_of(&words) {
            assert!(logged.contains(&page), "page {page} is not logged");
            self.bits.got(page, &self.memory, self.exact());
            self.handed_out += 1;
        }
        self.bits.complete(&logged, &self.memory);
    }

    /// Look, clear some of it, perhaps write in between.
    fn peek_and_clear(&mut self) {
        // What `sync_hardware_log` makes every processor do.
        self.exit();
        let mut words = [0; WORDS];
        let peeked = self.guest.mmu.peek_log(&mut self.guest.actor, 0, 0, &mut words);
        assert_eq!(peeked.expect("logged").pages, pages_of(&words).count() as u64);
        let logged = self.logged.clone().expect("logged");
        for page in logged.clone() {
            let seen = words[(page / 64) as usize] >> (page % 64) & 1 == 1;
            let same = self.bits.copy[page as usize] == self.memory[page as usize];
            assert!(seen || same, "page {page}: a write cannot be seen");
        }
        for _ in 0..self.random.below(4) {
            let page = self.random.below(PAGES);
            self.access(page, AccessKind::Write);
        }
        let first = self.random.below(WORDS as u64);
        let count = self.random.below(WORDS as u64 - first + 1);
        let pages = (count * 64).min(PAGES - first * 64);
        let mask = if self.random.chance(1, 2) { u64::MAX } else { self.random.next_u64() };
        let part = &mut words[first as usize..(first + count) as usize];
        part.iter_mut().for_each(|word| *word &= mask);
        let part = part.to_vec();
        let (mmu, actor) = (&self.guest.mmu, &mut self.guest.actor);
        let done = mmu.clear_log(actor, (0, 0), first * 64, pages, &part).expect("legal");
        let mut cleared = 0;
        for (word, bits) in (first..).zip(part) {
            for page in (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word * 64 + bit) {
                self.bits.got(page, &self.memory, self.exact());
                cleared += 1;
            }
        }
        assert_eq!(done.pages, cleared, "what was seen is still there");
    }

    fn set_logging(&mut self, pages: Option<Range<u64>>) {
        let flags = if pages.is_some() { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
        let change = request(0, self.base, PAGES, DATA + BEGIN, flags);
        let before = self.logged.take();
        let _ = match &pages {
            Some(pages) => self.guest.set_slot_logging(&change, pages.clone()),
            None => self.guest.set_slot(&change),
        }
        .expect("legal");
        let all = self.setup.log.initially_set;
        let old = (self.bits.clone(), self.ring.clone());
        if pages != before {
            self.bits = Reader::begin(&self.memory, all);
            self.ring = Reader::begin(&self.memory, false);
        }
        if let (Some(before), Some(after)) = (&before, &pages) {
            // What was logged and is logged still is not forgotten.
            for page in before.clone().filter(|page| after.contains(page)) {
                let at = page as usize;
                self.ring.copy[at] = old.1.copy[at];
                if !all {
                    self.bits.copy[at] = old.0.copy[at];
                }
            }
            self.bits.allowed.extend(old.0.allowed);
        }
        // Entries of before stay in the rings.
        self.ring.allowed.extend(old.1.allowed);
        self.logged = pages;
    }

    fn part(&mut self) -> Range<u64> {
        let start = self.random.below(PAGES);
        start..start + 1 + self.random.below(PAGES - start)
    }

    fn some(&mut self) -> GfnRange {
        let start = self.base + self.random.below(PAGES);
        let pages = if self.random.chance(1, 3) { M2 } else { 1 + self.random.below(40) };
        range(start, start + pages)
    }

    fn mark(&mut self) {
        let pages = self.some();
        let first = pages.start.get() - self.base;
        let end = (pages.end.get() - self.base).min(PAGES);
        // A device writes; the pages are marked afterwards.
        for page in first..end {
            self.memory[page as usize] += 1;
            self.wrote(page);
        }
        let mut from = pages.start;
        while let Err(error) = self.guest.actor.mark_dirty(0, GfnRange::new(from, pages.end)) {
            from = error.next;
            // Not everything is marked yet: the reader cannot be complete.
            let logged = self.logged.take();
            self.read_ring();
            self.logged = logged;
        }
    }

    fn zap_all(&mut self) {
        let mut zap = self.guest.mmu.invalidate_roots(&mut self.guest.actor);
        for _ in 0..self.random.below(4) {
            if zap.step(&mut self.guest.actor, 2) == ZapProgress::Done {
                break;
            }
        }
    }

    fn go_somewhere_else(&mut self) {
        self.base = if self.base == PLACES[0] { PLACES[1] } else { PLACES[0] };
        let flags = if self.logged.is_some() { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
        self.exit();
        self.guest.slot(0, self.base, PAGES, DATA + BEGIN, flags);
    }

    fn delete_and_create(&mut self) {
        self.exit();
        self.guest.slot(0, self.base, 0, 0, SlotFlags::empty());
        let log = self.random.chance(1, 2);
        let flags = if log { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
        self.guest.slot(0, self.base, PAGES, DATA + BEGIN, flags);
        self.logged = log.then_some(0..PAGES);
        self.bits = Reader::begin(&self.memory, self.setup.log.initially_set);
        let allowed = std::mem::take(&mut self.ring.allowed);
        self.ring = Reader { allowed, ..Reader::begin(&self.memory, false) };
    }

    fn step(&mut self) {
        let near = self.random.below(64) * 19 % PAGES;
        let anywhere = self.random.below(PAGES);
        match self.random.below(100) {
            0..34 => self.access(near, AccessKind::Write),
            34..44 => self.access(anywhere, AccessKind::Write),
            44..52 => self.access(anywhere, AccessKind::Read),
            52..55 => {
                let present = self.random.chance(1, 2);
                self.fault(near, AccessKind::Write, present);
            }
            55..58 => {
                let pages = self.some();
                let _ = self.guest.unmap(pages);
            }
            58..63 => {
                let modes = [AgeMode::Test, AgeMode::Clear, AgeMode::ClearFlush];
                let mode = modes[self.random.below(3) as usize];
                let pages = self.some();
                let _ = self.guest.age(pages, mode);
            }
            63..66 => self.mark(),
            66 => self.zap_all(),
            67 => {
                let pages = self.some();
                let _ = self.guest.mmu.split(&mut self.guest.actor, 0, pages);
            }
            68 => {
                let pages = self.some();
                let access = mmu_core::access::Access::WRITE;
                let _ = self.guest.vcpu.prefault(pages, access);
            }
            69 => self.go_somewhere_else(),
            70 => self.delete_and_create(),
            71 | 72 => self.set_logging(None),
            73..76 => self.set_logging(Some(0..PAGES)),
            76 | 77 => {
                let part = self.part();
                self.set_logging(Some(part));
            }
            78 if self.setup.starve => {
                let now = self.guest.host().provides();
                self.guest.host().refuse(now, u64::MAX);
            }
            79..86 if !self.guest.mmu.vm().rings().is_empty() => self.read_ring(),
            86..93 if self.logged.is_some() && self.setup.log.bitmap => self.harvest(),
            93..100 if self.logged.is_some() && self.setup.log.bitmap => self.peek_and_clear(),
            _ => {}
        }
    }
}

const STEPS: u64 = 1500;
const SEEDS: u64 = 2;

fn run<F: Modelled>(caps: Capabilities, setup: Setup, handed_out: &mut u64) {
    for seed in 0..SEEDS {
        let mut run = Run::<F>::new(caps, setup, seed);
        for step in 0..STEPS {
            let result = catch_unwind(AssertUnwindSafe(|| run.step()));
            if let Err(panic) = result {
                eprintln!("{} {caps:?} {setup:?}: seed {seed}, step {step}", F::NAME);
                resume_unwind(panic);
            }
        }
        *handed_out += run.handed_out;
        run.guest.host().refuse(u64::MAX, u64::MAX);
        run.guest.mmu.check(&mut run.guest.actor).expect("well-formed trees");
        run.guest.finish();
    }
}

fn every_setup(check: &mut dyn FnMut(Setup)) {
    let ring = Some(RingSize::from_bytes(1 << 14).expect("1024 entries"));
    let logs = [
        LogOptions::default(),
        LogOptions { initially_set: true, ..LogOptions::default() },
        LogOptions { bitmap: false, ring, initially_set: false },
        LogOptions { bitmap: true, ring, initially_set: false },
        LogOptions { bitmap: true, ring, initially_set: true },
    ];
    let ways = [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit, DirtyTracking::HardwareLog];
    for log in logs {
        for tracking in ways {
            for (huge, eager_split, starve) in [
                (false, true, false),
                (true, true, false),
                (true, false, false),
                (true, true, true),
            ] {
                check(Setup { tracking, log, eager_split, huge, starve });
            }
        }
    }
}

fn on_format<F: Modelled>(caps: Capabilities) {
    let mut handed_out = 0;
    every_setup(&mut |setup| run::<F>(caps, setup, &mut handed_out));
    println!("{}: {handed_out} pages handed out", F::NAME);
    assert!(handed_out > 10_000);
}

// INVARIANT[I9].
#[test]
fn every_write_is_in_the_next_harvest_with_ept() {
    on_format::<Ept>(Capabilities::ept());
}

// INVARIANT[I9].
#[test]
fn every_write_is_in_the_next_harvest_without_hardware_dirty_bits() {
    on_format::<Ept>(common::no_ad(Capabilities::ept()));
}

// INVARIANT[I9].
#[test]
fn every_write_is_in_the_next_harvest_with_npt() {
    on_format::<Npt>(Capabilities::npt());
}

// INVARIANT[I9].
#[test]
fn every_write_is_in_the_next_harvest_with_legacy_tables() {
    on_format::<Legacy>(Capabilities::legacy());
}
