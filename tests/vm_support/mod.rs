//! A guest hypervisor and its guest in one VM, for tests: the hypervisor (L1) runs on direct
//! tables, its guest (L2) on shadows of tables that L1 made in its memory. Each has a processor
//! whose TLB forgets nothing by itself.
//!
//! What L2 may reach is worked out by hand from L1's tables, which are EPT's here, and remembered
//! from one flush to the next: [`Machine::check`] finds whatever is wider.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use mmu_core::access;
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, Level, Pfn};
use mmu_core::fault::FaultOutcome;
use mmu_core::slot::{LogOptions, SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{Capabilities, Ept, SpteConfig};
use mmu_core::stats::Counter;
use mmu_core::traits::{HostPage, ResolveError};
use mmu_core::vm::{Actor, VmCore};
use mmu_model::{Access, AccessKind, Caches, Random, SoftCpu, Translation, Walker};
use secondary_mmu::{Runs, Shadow, Vcpu, Vm};
use shadow_mmu::guest::{EptCpu, NestedError, NestedRequest, NestedWalker, Purpose};
use tdp_mmu::TdpOptions;

use crate::common::{Core, DATA, Modelled, Peek, TestHost, reported};
use crate::shadow_support::bits;
use crate::shadow_support::memory::{Backing, Memory};
use crate::shadow_support::rig::{Lock, operation};

pub type NestedVm = Vm<Ept, TestHost, Lock<Ept>>;

/// L1's memory, in blocks of 2 MiB that the host backs by one page or by small ones.
pub const BLOCKS: u64 = 4;
pub const PAGES: u64 = BLOCKS * 512;
/// The first frames are L1's tables; others hold nothing but zeros.
pub const TABLES: u64 = 14;
/// Physical address bits of guest and host.
const PHYS: u32 = 46;

/// Bits of an entry of L1's: read, write, fetch, accessed and dirty, write-back for leaves.
pub const READ: u64 = 1;
pub const WRITE: u64 = 2;
pub const EXEC: u64 = 4;
pub const LARGE: u64 = 1 << 7;
pub const USED: u64 = 1 << 8 | 1 << 9;
pub const BACK: u64 = 6 << 3;
pub const ALL: u64 = READ | WRITE | EXEC | USED;

/// A leaf of L1's that permits everything.
pub const fn leaf(gfn: u64) -> u64 {
    gfn << 12 | ALL | BACK
}

/// A link of L1's that permits everything.
pub const fn link(table: u64) -> u64 {
    table << 12 | ALL
}

/// Tables at a level: `0..6` at level 1, then three, three and two.
pub const fn first_table(level: u32) -> u64 {
    [0, 6, 9, 12][level as usize - 1]
}

pub const fn tables_at(level: u32) -> u64 {
    [6, 3, 3, 2][level as usize - 1]
}

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At this host page.
    Reached(u64),
    /// Somebody wants to see the write.
    Protected,
    /// L1's tables do not permit it.
    Reflected,
    /// No memory there.
    Nowhere,
}

/// What an address of L2's means by L1's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Meaning {
    pub gfn: u64,
    /// READ, WRITE, EXEC.
    pub permits: u64,
}

/// What a machine is made with.
pub struct Setup {
    pub quota: u32,
    pub options: TdpOptions,
    pub slots: Vec<SlotRequest>,
    pub log: LogOptions,
}

impl Default for Setup {
    fn default() -> Self {
        let slots = vec![slot(0, 0, PAGES, SlotFlags::empty())];
        Self { quota: 1000, options: TdpOptions::default(), slots, log: LogOptions::default() }
    }
}

pub struct Machine {
    pub random: Random,
    pub seed: u64,
    pub vm: Arc<NestedVm>,
    pub l1: Vcpu<Ept, TestHost, Lock<Ept>>,
    pub l2: Vcpu<Ept, TestHost, Lock<Ept>>,
    pub notifier: Actor<TestHost>,
    pub slots: SlotWriter,
    pub memory: Memory,
    pub backing: Arc<Backing>,
    backings: u64,
    pub nested: NestedWalker,
    /// L1's EPT pointer.
    pub pointer: u64,
    pub cpu1: Arc<Mutex<Core>>,
    pub cpu2: Arc<Mutex<Core>>,
    walker: Walker,
    /// Registers of the processors.
    root1: u64,
    root2: u64,
    /// Addresses of L2's that are looked at.
    pub addresses: Vec<u64>,
    /// What each may mean.
    allowed: Vec<BTreeSet<Meaning>>,
    /// Pages that the embedder tracks.
    pub tracked: BTreeSet<u64>,
    steps: Vec<String>,
}

pub fn slot(id: u16, start: u64, pages: u64, flags: SlotFlags) -> SlotRequest {
    let hva = Hva::new((DATA + start) << 12);
    SlotRequest { as_id: 0, id, base: Gpa::new(start << 12), bytes: pages << 12, hva, flags }
}

impl Machine {
    pub fn new(seed: u64, quota: u32) -> Self {
        Self::with(seed, Setup { quota, ..Setup::default() })
    }

    pub fn with(seed: u64, setup: Setup) -> Self {
        let Setup { quota, options, slots: slots_wanted, log } = setup;
        let caps = Capabilities { max_phys_bits: PHYS as u8, ..Capabilities::ept() };
        let config = SpteConfig::<Ept>::new(caps).unwrap();
        let limits = SlotLimits::new(2, config.max_gfn_exclusive());
        let host = TestHost::new(8192);
        host.record(false);
        let backing = Arc::new(Backing::new(BLOCKS));
        let pages = Arc::clone(&backing);
        host.set_resolver(Arc::new(move |_, gfn, _| -> Result<HostPage, ResolveError> {
            pages.page(gfn.get()).ok_or(ResolveError::NoMemory)
        }));
        let yields = std::thread::yield_now;
        let (core, mut slots) = VmCore::with_log(host, 8, limits, yields, log).unwrap();
        let mut notifier = core.actor().unwrap();
        let lock = |writer| Lock(Mutex::new(writer));
        let rights = (&mut slots, &mut notifier);
        let vm = Vm::nested(Arc::clone(&core), rights, config, options, quota, lock).unwrap();
        for request in slots_wanted {
            let _ = vm.set_slot(&mut slots, &mut notifier, &request, None).unwrap();
        }
        let format = Ept::model(&caps);
        let cpu = || core.host().add_core(SoftCpu::new(&format, 0, Caches::unlimited()));
        let (cpu1, cpu2) = (cpu(), cpu());
        // L2's caches go by its own addresses, flushes by L1's frames: everything goes.
        let flushed = Arc::clone(&cpu2);
        core.host().before_flush(Some(Arc::new(move |_| flushed.lock().unwrap().cpu.flush_all())));
        let max_phys_bits = PHYS as u8;
        let ept = EptCpu { max_phys_bits, accessed_dirty: true, ..EptCpu::baseline() };
        let mut addresses = vec![0];
        for (shift, count) in [(12, 4), (21, 2), (30, 2), (39, 1)] {
            let with =
                |low: &u64| (0..count).map(|index| *low | index << shift).collect::<Vec<_>>();
            addresses = addresses.iter().flat_map(with).collect();
        }
        let mut machine = Self {
            random: Random::new(seed),
            seed,
            l1: Vcpu::new(&vm, 0).unwrap(),
            l2: Vcpu::new(&vm, 0).unwrap(),
            vm,
            notifier,
            slots,
            memory: Memory::new(PAGES, TABLES),
            backing,
            backings: 0,
            nested: NestedWalker::ept(Level::L4, &ept).unwrap(),
            pointer: 0,
            cpu1,
            cpu2,
            walker: Walker::new(&format),
            root1: 0,
            root2: 0,
            allowed: vec![BTreeSet::new(); addresses.len()],
            addresses,
            tracked: BTreeSet::new(),
            steps: Vec::new(),
        };
        (0..BLOCKS).for_each(|block| machine.back(block));
        machine.point(0);
        machine
    }

    pub fn note(&mut self, step: String) {
        if self.steps.len() >= 80 {
            self.steps.drain(..40);
        }
        self.steps.push(step);
    }

    #[track_caller]
    pub fn fail(&self, what: &str) -> ! {
        panic!("seed {}: {what}\nsteps:\n  {}", self.seed, self.steps.join("\n  "));
    }

    pub fn host(&self) -> &TestHost {
        self.vm.core().host()
    }

    pub fn stat(&self, counter: Counter) -> u64 {
        self.vm.core().stats().get(counter)
    }

    pub fn shadow_mmu(&self) -> &Shadow<Ept, TestHost, Lock<Ept>> {
        self.vm.shadow().unwrap()
    }

    /// L1 uses its `number`th top table for L2.
    pub fn point(&mut self, number: u64) {
        self.pointer = (first_table(4) + number) << 12 | 0x5e;
        // The vCPU loads it when it enters.
        self.root2 = 0;
    }

    /// The vCPUs change places: each enters anew before it runs.
    pub fn swap(&mut self) {
        self.note("the vCPUs change places".to_owned());
        std::mem::swap(&mut self.l1, &mut self.l2);
        for core in [&self.cpu1, &self.cpu2] {
            core.lock().unwrap().reload = true;
        }
        self.root2 = 0;
    }

    /// L1's table, filled in without anybody's noticing: before L2 first runs.
    pub fn set_up(&mut self, table: u64, index: u64, entry: u64) {
        self.memory.set(table << 12 | index << 3, 8, entry);
    }

    /// One way down: top table 12, tables 9 and 6, table 0 at level 1.
    pub fn set_up_path(&mut self) {
        self.set_up(12, 0, link(9));
        self.set_up(9, 0, link(6));
        self.set_up(6, 0, link(0));
    }

    // What L2's addresses mean.

    pub fn meaning(&self, address: u64) -> Option<Meaning> {
        let mut table = self.pointer & bits(12, 51);
        let mut permits = READ | WRITE | EXEC;
        for level in (1..=4).rev() {
            let shift = 12 + (level - 1) * 9;
            let entry = self.memory.get(table + (address >> shift & 511) * 8, 8)?;
            let page = level == 1 || (entry & LARGE != 0 && level <= 3);
            let inside = if level > 1 && page { bits(12, shift - 1) } else { 0 };
            let links = if page { 0 } else { bits(3, 6) };
            let reserved = bits(PHYS, 51) | inside | links | if level > 3 { LARGE } else { 0 };
            if entry & 7 == 0 || entry & reserved != 0 || entry & (READ | WRITE) == WRITE {
                return None;
            }
            permits &= entry;
            if page {
                let low = (1 << shift) - 1;
                return Some(Meaning {
                    gfn: (entry & bits(12, 51) & !low | address & low) >> 12,
                    permits,
                });
            }
            table = entry & bits(12, 51);
        }
        unreachable!("level 1 maps a page")
    }

    /// L1's tables changed; L2 may use what they say, and what they have said since its last flush.
    pub fn remember(&mut self) {
        for number in 0..self.addresses.len() {
            if let Some(now) = self.meaning(self.addresses[number]) {
                self.allowed[number].insert(now);
            }
        }
    }

    /// Everything of L2's was flushed.
    pub fn forget(&mut self) {
        self.allowed.iter_mut().for_each(BTreeSet::clear);
        self.remember();
    }

    /// What L2's shadow says about an address.
    pub fn shadow(&self, address: u64) -> Option<Translation> {
        let access = Access::user(AccessKind::Read);
        self.walker.translate(&Peek(self.host()), self.root2, address, access).ok()
    }

    /// What L1's tables of ours say about a gfn.
    pub fn direct(&self, gfn: u64) -> Option<Translation> {
        let access = Access::user(AccessKind::Read);
        self.walker.translate(&Peek(self.host()), self.root1, gfn << 12, access).ok()
    }

    // The vCPUs.

    pub fn enter_l1(&mut self) {
        let reload = std::mem::take(&mut self.cpu1.lock().unwrap().reload);
        if reload || self.l1.runs() != Runs::Guest || !self.l1.root_is_current() {
            self.root1 = self.l1.enter_guest().unwrap().get() | 0x5e;
            let mut core = self.cpu1.lock().unwrap();
            core.cpu.set_root(self.root1);
            core.cpu.flush_all();
        }
    }

    /// As L1's VMRESUME; loading the root is a flush.
    pub fn enter_l2(&mut self) {
        let reload = std::mem::take(&mut self.cpu2.lock().unwrap().reload);
        let current = self.l2.runs() == Runs::Nested && self.l2.root_is_current();
        if reload || !current || self.root2 == 0 {
            self.note("  L2 loads its root".to_owned());
            let root = self.l2.enter_nested(&self.nested, &self.memory, self.pointer).unwrap();
            self.root2 = root.get() | 0x5e;
            let mut core = self.cpu2.lock().unwrap();
            core.cpu.set_root(self.root2);
            core.cpu.flush_all();
            drop(core);
            self.forget();
        }
    }

    /// L1 accesses a page of its memory.
    pub fn l1_access(&mut self, gfn: u64, kind: AccessKind) -> End {
        for _ in 0..8 {
            self.enter_l1();
            let access = Access::user(kind);
            let host = Arc::clone(self.vm.core());
            let reached = self.cpu1.lock().unwrap().cpu.access(host.host(), gfn << 12, access);
            let fault = match reached {
                Ok(pa) => return self.l1_reached(gfn, pa >> 12, kind),
                Err(fault) => fault,
            };
            let outcome = self.l1.fault(&reported(gfn, &fault));
            self.note(format!("  L1 {kind:?} {gfn}: {outcome:?}"));
            match outcome {
                Ok(FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry) => {}
                Ok(FaultOutcome::WriteProtected) => return End::Protected,
                Ok(FaultOutcome::Emulate(_)) => return End::Nowhere,
                other => self.fail(&format!("{other:?}")),
            }
        }
        self.fail("eight faults of L1's, and no end");
    }

    fn l1_reached(&self, gfn: u64, pfn: u64, kind: AccessKind) -> End {
        if self.backing.pfn(gfn) != Some(pfn) {
            self.fail(&format!("L1 reaches {pfn:#x} by {gfn}"));
        }
        if kind == AccessKind::Write && self.tracked.contains(&gfn) {
            self.fail(&format!("L1 writes to {gfn} unseen"));
        }
        End::Reached(pfn)
    }

    /// L2 accesses an address.
    pub fn l2_access(&mut self, address: u64, kind: AccessKind) -> End {
        let purpose = Purpose::Final(access::Access::ALL);
        let request = NestedRequest { operation: operation(kind), purpose };
        for _ in 0..8 {
            self.enter_l2();
            let access = Access::user(kind);
            let host = Arc::clone(self.vm.core());
            let reached = self.cpu2.lock().unwrap().cpu.access(host.host(), address, access);
            if let Ok(pa) = reached {
                return self.l2_reached(address, pa >> 12, kind);
            }
            let walk = self.nested.walk(&self.memory, self.pointer, Gpa::new(address), request);
            let walk = match walk {
                Ok(walk) => walk,
                Err(NestedError::Fault(_)) => {
                    self.l2_invalidated(address);
                    return End::Reflected;
                }
                Err(error) => self.fail(&error.to_string()),
            };
            let outcome = self.l2.nested_fault(&self.nested, &self.memory, &walk, request);
            self.note(format!("  L2 {kind:?} {address:#x} at {}: {outcome:?}", walk.path.gfn));
            match outcome {
                Ok(FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry) => {}
                Ok(FaultOutcome::WriteProtected) => return End::Protected,
                Ok(FaultOutcome::Emulate(_)) => return End::Nowhere,
                other => self.fail(&format!("{other:?}")),
            }
        }
        self.fail("eight faults of L2's, and no end");
    }

    fn l2_invalidated(&mut self, address: u64) {
        self.l2.nested_invalidated(&self.nested, &self.memory, Gpa::new(address));
        self.cpu2.lock().unwrap().cpu.flush_address(address);
        let number = self.addresses.iter().position(|one| *one == address).unwrap();
        self.allowed[number].clear();
        self.remember();
    }

    /// The gfn is found by what is allowed.
    fn l2_reached(&mut self, address: u64, pfn: u64, kind: AccessKind) -> End {
        let needed = match kind {
            AccessKind::Read => READ,
            AccessKind::Write => WRITE,
            AccessKind::Fetch => EXEC,
        };
        let gfn = self.judge(address, pfn, needed);
        if kind == AccessKind::Write && self.tracked.contains(&gfn) {
            self.fail(&format!("L2 writes to {gfn} unseen"));
        }
        End::Reached(pfn)
    }

    /// L1 flushes what its tables say.
    pub fn flush(&mut self) {
        self.note("L1 flushes".to_owned());
        self.l2.nested_flushed(&self.nested, &self.memory);
        self.cpu2.lock().unwrap().cpu.flush_all();
        self.forget();
    }

    /// A host page that L2 can reach: did L1's tables allow that at some time since the last flush?
    pub fn judge(&self, address: u64, pfn: u64, needed: u64) -> u64 {
        let number = self.addresses.iter().position(|one| *one == address).unwrap();
        let allows = |meaning: &&Meaning| {
            self.backing.pfn(meaning.gfn) == Some(pfn) && meaning.permits & needed == needed
        };
        match self.allowed[number].iter().find(allows) {
            Some(found) => found.gfn,
            None => self.fail(&format!(
                "L2 reaches {pfn:#x} for {needed:#b} by {address:#x}, allowed is {:x?}",
                self.allowed[number]
            )),
        }
    }

    /// INVARIANT[I20]: L2 reaches nothing that L1's tables have not allowed since the last flush,
    /// L1 nothing but its memory, and nobody writes to a tracked page.
    pub fn check(&mut self) {
        for address in self.addresses.clone() {
            let Some(found) = self.shadow(address) else { continue };
            let bit = |on: bool, bit: u64| if on { bit } else { 0 };
            let needed = READ | bit(found.writable(), WRITE) | bit(found.executable(), EXEC);
            let gfn = self.judge(address, found.pa >> 12, needed);
            if found.writable() && self.tracked.contains(&gfn) {
                self.fail(&format!("L2 may write to {gfn} by {address:#x}"));
            }
        }
        for gfn in (0..PAGES).filter(|gfn| *gfn < TABLES || gfn % 512 < 4) {
            let Some(found) = self.direct(gfn) else { continue };
            if self.backing.pfn(gfn) != Some(found.pa >> 12) {
                self.fail(&format!("L1 maps {:#x} at {gfn}", found.pa >> 12));
            }
            if found.writable() && self.tracked.contains(&gfn) {
                self.fail(&format!("L1 may write to {gfn}"));
            }
            let track = self.notifier.page_track(0, Gfn::new(gfn));
            let blocked = track.is_some_and(|track| !track.allows(Level::L2, Gfn::new(gfn)));
            if found.level > 1 && found.writable() && blocked {
                self.fail(&format!("L1 writes to {gfn}, of a blocked 2 MiB page, at once"));
            }
        }
        let Shadow { lock, .. } = self.vm.shadow().unwrap();
        if let Err(flaw) = lock.0.lock().unwrap().check(&mut self.notifier) {
            self.fail(&format!("{flaw}"));
        }
    }

    // What the host does.

    /// Another host page behind a block.
    pub fn back(&mut self, block: u64) {
        let huge = self.random.chance(1, 2);
        self.back_with(block, huge);
    }

    pub fn back_with(&mut self, block: u64, huge: bool) {
        self.backings += 1;
        self.backing.set(block, self.backings, huge);
    }

    /// The host takes a block back and gives another.
    pub fn take_back(&mut self, block: u64) -> secondary_mmu::Unmapped {
        self.note(format!("the host takes block {block}"));
        let range = GfnRange::from_len(Gfn::new(block * 512), 512);
        let core = Arc::clone(self.vm.core());
        let invalidation = core.invalidate(self.notifier.participant(), range);
        self.back(block);
        self.vm.unmap_in(&mut self.notifier, &invalidation, range)
    }

    /// L1 writes an entry of one of its tables, as its code would: by its own mapping, or through
    /// the emulator, or after the table's shadow was given up.
    pub fn edit(&mut self, table: u64, index: u64, entry: u64) -> End {
        let at = table << 12 | index << 3;
        let mut end = self.l1_access(table, AccessKind::Write);
        self.note(format!("L1 sets {table}[{index}] = {entry:#x}: {end:?}"));
        if end == End::Protected && self.random.chance(1, 3) && !self.tracked.contains(&table) {
            let (gfn, actor) = (Gfn::new(table), &mut self.notifier);
            if self.vm.unprotect(actor, gfn) {
                end = self.l1_access(table, AccessKind::Write);
                if !matches!(end, End::Reached(_)) {
                    self.fail(&format!("{end:?} after the shadow was given up"));
                }
            }
        }
        self.memory.set(at, 8, entry);
        if end == End::Protected {
            self.vm.guest_wrote(&mut self.notifier, Gpa::new(at), 8);
        }
        self.remember();
        end
    }

    pub fn finish(self) {
        let Self { vm, l1, l2, mut notifier, slots, .. } = self;
        drop((l1, l2));
        let _ = vm.destroy(&mut notifier);
        let core = Arc::clone(vm.core());
        for gauge in [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G, Counter::Tables] {
            assert_eq!(core.stats().get(gauge), 0, "seed {}: {}", self.seed, gauge.name());
        }
        for gfn in (0..PAGES).map(Gfn::new) {
            let Some(track) = notifier.page_track(0, gfn) else { continue };
            let own = u16::from(self.tracked.contains(&gfn.get()));
            assert_eq!(track.count(gfn), own, "seed {}: {gfn} is counted", self.seed);
        }
        if self.tracked.is_empty()
            && let Some(track) = notifier.page_track(0, Gfn::new(0))
        {
            assert!(track.allows(Level::L3, Gfn::new(0)), "seed {}: blocked", self.seed);
        }
        drop((notifier, slots, vm));
        assert_eq!(core.pool().frames_in_use(), 0, "seed {}: frames in use", self.seed);
    }
}

/// The host page in a leaf.
pub fn pfn_of(page: Option<HostPage>) -> Option<Pfn> {
    page.map(|page| page.pfn)
}
