//! A guest hypervisor's EPT or NPT under shadow: what its guest reaches is what the hypervisor's
//! tables say, and never more.
//!
//! As `shadow_modes`, one dimension up: the addresses are a nested guest's physical ones. The
//! specification walks EPT and NPT on its own.

mod common;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{Core, DATA, Modelled, Peek, TestHost, five};
use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, Level, Pfn};
use mmu_core::fault::FaultOutcome;
use mmu_core::slot::{SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{Capabilities, Ept, Npt, SpteConfig, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::traits::{AgeAnswer, AgeMode, AgeRange, Effort, HostPage, ResolveError};
use mmu_core::vm::{Actor, VmCore};
use mmu_model::{AccessKind, Caches, Random, SoftCpu, Walker};
use shadow_mmu::guest::{
    EntryWidth, EptCpu, Exchange, GuestControls, GuestCpu, GuestMem, NestedError, NestedRequest,
    NestedWalker, NotMemory, Operation, Purpose,
};
use shadow_mmu::{ReclaimPolicy, ShadowMmu, ShadowStats, ShadowVcpu, ShadowWriter, WriterLock};

/// Guest memory: four blocks of 2 MiB.
const PAGES: u64 = 4 * 512;
/// The first frames are tables. Others hold nothing but zeros.
const TABLES: u64 = 20;
/// Physical address bits of guest and host.
const PHYS: u32 = 46;

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;

/// Bits `low` to `high`.
const fn bits(low: u32, high: u32) -> u64 {
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

/// What the hypervisor made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ept { accessed_dirty: bool },
    Npt,
}

/// A format of nested tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mode {
    kind: Kind,
    levels: u32,
}

impl Mode {
    fn walker(self) -> NestedWalker {
        let Kind::Ept { accessed_dirty } = self.kind else {
            let cpu = GuestCpu { max_phys_bits: PHYS as u8, ..GuestCpu::baseline() };
            return NestedWalker::npt(&cpu, GuestControls::LONG).unwrap();
        };
        let max_phys_bits = PHYS as u8;
        let cpu = EptCpu { max_phys_bits, five_levels: true, accessed_dirty, ..EptCpu::baseline() };
        NestedWalker::ept(Level::new(self.levels as u8).unwrap(), &cpu).unwrap()
    }

    /// Was the page of a leaf written, or does nobody keep track?
    const fn is_dirty(self, leaf: u64) -> bool {
        match self.kind {
            Kind::Ept { accessed_dirty: true } => leaf & 1 << 9 != 0,
            Kind::Ept { accessed_dirty: false } => true,
            Kind::Npt => leaf & D != 0,
        }
    }

    const fn is_ept(self) -> bool {
        matches!(self.kind, Kind::Ept { .. })
    }

    /// Permission, accessed and dirty bits at random.
    fn permissions(self, random: &mut Random) -> u64 {
        let bits = if self.is_ept() {
            [(1, 14), (2, 12), (4, 12), (1 << 8, 10), (1 << 9, 8)]
        } else {
            [(P | U, 15), (W, 12), (NX, 2), (A, 10), (D, 8)]
        };
        bits.iter().filter(|(_, chance)| random.chance(*chance, 16)).map(|(bit, _)| bit).sum()
    }

    /// What an entry permits: reads, writes, fetches; `None` for a fault.
    fn decode(self, entry: u64, level: u32, page: bool) -> Option<[bool; 3]> {
        let first = if self.is_ept() { 12 } else { 13 };
        let inside = match (level, page) {
            (2, true) => bits(first, 20),
            (3, true) => bits(first, 29),
            _ => 0,
        };
        let has = |bit: u64| entry & bit != 0;
        let high = bits(PHYS, 51) | inside | if level > 3 { PS } else { 0 };
        if self.is_ept() {
            let bad = has(high | if page { 0 } else { bits(3, 6) }) || (has(2) && !has(1));
            return (has(7) && !bad).then_some([has(1), has(2), has(4)]);
        }
        // Every nested access is a user's.
        (has(P) && !has(high) && has(U)).then_some([true, has(W), !has(NX)])
    }

    fn shift(self, level: u32) -> u32 {
        12 + (level - 1) * 9
    }

    fn indices(self, level: u32) -> &'static [u64] {
        match level {
            1 => &[0, 1, 2, 3],
            3 if self.levels == 5 => &[0],
            _ => &[0, 1],
        }
    }

    fn addresses(self) -> Vec<u64> {
        let mut all = vec![0];
        for level in 1..=self.levels {
            let with = |low: &u64| {
                let low = *low;
                self.indices(level).iter().map(move |index| low | index << self.shift(level))
            };
            all = all.iter().flat_map(with).collect();
        }
        all
    }
}

/// Tables that are mostly used at a level.
fn tables_of(level: u32) -> Range<u64> {
    match level {
        1 => 0..6,
        2 => 6..10,
        3 => 10..13,
        4 => 13..16,
        _ => 16..19,
    }
}

struct Memory(Vec<AtomicU64>);

impl Memory {
    fn get(&self, at: u64, bytes: u64) -> Option<u64> {
        assert_eq!(at % bytes, 0);
        if at >> 12 >= PAGES {
            return None;
        }
        let word = self.0.get((at / 8) as usize).map_or(0, |word| word.load(Ordering::SeqCst));
        Some(if bytes == 8 { word } else { word >> (at % 8 * 8) & u64::from(u32::MAX) })
    }

    /// Only tables are written.
    fn set(&self, at: u64, bytes: u64, value: u64) {
        let word = &self.0[(at / 8) as usize];
        let (shift, mask) =
            if bytes == 8 { (0, u64::MAX) } else { (at % 8 * 8, u64::from(u32::MAX)) };
        let old = word.load(Ordering::SeqCst);
        word.store(old & !(mask << shift) | value << shift, Ordering::SeqCst);
    }
}

impl GuestMem for Memory {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        self.get(at.get(), width.bytes()).ok_or(NotMemory { at })
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        if self.read(at, width)? != old {
            return Ok(Exchange::Lost);
        }
        self.set(at.get(), width.bytes(), new);
        Ok(Exchange::Done)
    }
}

/// What an address means, by the guest's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Meaning {
    gfn: u64,
    read: bool,
    write: bool,
    exec: bool,
    /// Written: only then may a write go unseen.
    dirty: bool,
    /// Level of the guest's page.
    level: u32,
}

/// What the host has behind each block of 2 MiB: first frame, and how large its pages are.
struct Backing(Vec<AtomicU64>);

impl Backing {
    /// Blocks get a frame of their own each time, huge or small.
    fn set(&self, block: u64, number: u64, huge: bool) {
        self.0[block as usize].store(number << 1 | u64::from(huge), Ordering::SeqCst);
    }

    fn page(&self, gfn: u64) -> Option<HostPage> {
        let word = self.0.get((gfn / 512) as usize)?.load(Ordering::SeqCst);
        let (base, huge) = (DATA + (word >> 1) * 512, word & 1 != 0);
        // Small pages lie in no order.
        let offset = if huge { gfn % 512 } else { (gfn + 77) % 512 };
        let level = if huge { Level::L2 } else { Level::L1 };
        Some(HostPage { pfn: Pfn::new(base + offset), writable: true, level })
    }

    fn pfn(&self, gfn: u64) -> Option<u64> {
        self.page(gfn).map(|page| page.pfn.get())
    }
}

struct Lock<F: SpteFormat>(Mutex<ShadowWriter<F, TestHost>>);

impl<F: SpteFormat> WriterLock<F, TestHost> for Lock<F> {
    fn with<R>(&self, work: impl FnOnce(&mut ShadowWriter<F, TestHost>) -> R) -> R {
        work(&mut self.0.lock().unwrap())
    }
}

fn slot(flags: SlotFlags) -> SlotRequest {
    let hva = Hva::new(DATA << 12);
    SlotRequest { as_id: 0, id: 0, base: Gpa::new(0), bytes: PAGES << 12, hva, flags }
}

/// What a run saw, so that a test knows that it tested something.
#[derive(Debug, Default)]
struct Seen {
    /// Accesses that reached memory, by level of the guest's page.
    reached: [u64; 4],
    /// Of these by huge guest pages, through small and huge entries.
    small: u64,
    huge: u64,
    unsyncs: u64,
}

struct World<F: SpteFormat> {
    seed: u64,
    random: Random,
    levels: u8,
    mode: Mode,
    memory: Memory,
    backing: Arc<Backing>,
    backings: u64,
    mmu: Arc<ShadowMmu<F, TestHost>>,
    lock: Lock<F>,
    vcpu: ShadowVcpu<F, TestHost>,
    notifier: Actor<TestHost>,
    slots: SlotWriter,
    core: Arc<Mutex<Core>>,
    guest: NestedWalker,
    walker: Walker,
    /// What the guest's root register, or registers, hold.
    root: u64,
    register: u64,
    addresses: Vec<u64>,
    allowed: Vec<Vec<Meaning>>,
    written: Option<BTreeSet<u64>>,
    looks: u64,
    seen: Seen,
    steps: Vec<String>,
}

impl<F: Modelled> World<F> {
    fn new(seed: u64, caps: Capabilities, mode: Mode, quota: u32, policy: ReclaimPolicy) -> Self {
        let config = SpteConfig::<F>::new(caps).unwrap();
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let host = TestHost::new(4096);
        host.record(false);
        let backing = Arc::new(Backing((0..4).map(AtomicU64::new).collect()));
        let pages = Arc::clone(&backing);
        host.set_resolver(Arc::new(move |_, gfn, _| {
            pages.page(gfn.get()).ok_or(ResolveError::NoMemory)
        }));
        let (vm, mut slots) = VmCore::new(host, 4, limits, std::thread::yield_now).unwrap();
        let mut notifier = vm.actor().unwrap();
        let request = slot(SlotFlags::empty());
        let _ = vm.set_slot(&mut slots, &mut notifier, &request, |_, _| {}).unwrap();
        let (mmu, mut writer) = ShadowMmu::create(Arc::clone(&vm), config, quota);
        writer.set_policy(policy);
        let vcpu = ShadowVcpu::new(&mmu).unwrap();
        let format = F::model(&caps);
        let core = vm.host().add_core(SoftCpu::new(&format, 0, Caches::unlimited()));
        let flushed = Arc::clone(&core);
        vm.host().before_flush(Some(Arc::new(move |_| flushed.lock().unwrap().cpu.flush_all())));
        let mut world = Self {
            seed,
            random: Random::new(seed),
            levels: caps.levels,
            mode,
            memory: Memory((0..TABLES * 512).map(|_| AtomicU64::new(0)).collect()),
            backing,
            backings: 0,
            mmu,
            lock: Lock(Mutex::new(writer)),
            vcpu,
            notifier,
            slots,
            core,
            guest: mode.walker(),
            walker: Walker::new(&format),
            root: 0,
            register: 0,
            addresses: mode.addresses(),
            allowed: Vec::new(),
            written: None,
            looks: 0,
            seen: Seen::default(),
            steps: Vec::new(),
        };
        (0..4).for_each(|block| world.back(block));
        world
    }

    fn note(&mut self, step: String) {
        if self.steps.len() >= 80 {
            self.steps.drain(..40);
        }
        self.steps.push(step);
    }

    #[track_caller]
    fn fail(&self, what: &str) -> ! {
        let from = self.steps.len().saturating_sub(40);
        let steps = self.steps[from..].join("\n  ");
        panic!("seed {}, {} levels: {what}\nsteps:\n  {steps}", self.seed, self.levels);
    }

    /// Another host page behind a block.
    fn back(&mut self, block: u64) {
        self.backings += 1;
        let huge = self.random.chance(1, 2);
        self.backing.set(block, self.backings, huge);
    }

    /// The hypervisor's tables, walked by hand; `None` where every access is a fault.
    fn meaning(&self, address: u64) -> Option<Meaning> {
        let mode = self.mode;
        let mut found =
            Meaning { gfn: 0, read: true, write: true, exec: true, dirty: true, level: 0 };
        let mut table = self.root;
        for level in (1..=mode.levels).rev() {
            let index = address >> mode.shift(level) & 511;
            let entry = self.memory.get((table & bits(12, 51)) + index * 8, 8)?;
            let page = level == 1 || (entry & PS != 0 && level <= 3);
            let [read, write, exec] = mode.decode(entry, level, page)?;
            found.read &= read;
            found.write &= write;
            found.exec &= exec;
            if page {
                let inside = (1 << mode.shift(level)) - 1;
                found.gfn = (entry & bits(12, 51) & !inside | address & inside) >> 12;
                found.level = level;
                found.dirty = self.mode.is_dirty(entry);
                return Some(found);
            }
            table = entry;
        }
        unreachable!("level 1 maps a page")
    }

    /// The hypervisor enters its guest on these or other tables, with a flush.
    fn load(&mut self) {
        self.root = (tables_of(self.mode.levels).start + self.random.below(2)) << 12;
        // What does not belong to the address: memory type and walk length.
        self.root |= if self.mode.is_ept() { 0x1e } else { 0 };
        self.note(format!("root {:#x}", self.root));
        self.enter_anew();
        self.forget();
    }

    /// The hypervisor turns A and D on or off in its EPT pointer.
    fn switch(&mut self) {
        if let Kind::Ept { accessed_dirty } = self.mode.kind {
            self.mode.kind = Kind::Ept { accessed_dirty: !accessed_dirty };
            self.guest = self.mode.walker();
            self.note(format!("{:?}", self.mode));
            self.load();
        }
    }

    fn enter_anew(&mut self) {
        let loaded =
            self.vcpu.load_nested_root(&self.lock, &self.guest, &self.memory, self.root, 0);
        self.register = loaded.expect("memory").get();
        self.core.lock().unwrap().cpu.set_root(self.register);
    }

    fn enter(&mut self) {
        if !self.vcpu.root_is_current(&self.lock) {
            self.note("  the root went".to_owned());
            self.enter_anew();
        }
    }

    fn forget(&mut self) {
        self.allowed = vec![Vec::new(); self.addresses.len()];
        self.remember_all();
    }

    fn remember_all(&mut self) {
        (0..self.addresses.len()).for_each(|number| self.remember(number));
    }

    fn remember(&mut self, number: usize) {
        if let Some(now) = self.meaning(self.addresses[number]) {
            let known = &mut self.allowed[number];
            if !known.contains(&now) {
                known.push(now);
            }
        }
    }

    fn shadow(&self, number: usize) -> Option<mmu_model::Translation> {
        let access = mmu_model::Access::user(AccessKind::Read);
        let gva = self.addresses[number];
        self.walker.translate(&Peek(self.mmu.vm().host()), self.register, gva, access).ok()
    }

    fn is_writable(&self, gfn: u64) -> bool {
        let host = self.backing.pfn(gfn);
        (0..self.addresses.len())
            .filter_map(|number| self.shadow(number))
            .any(|found| found.writable() && Some(found.pa >> 12) == host)
    }

    fn some_target(&mut self, level: u32) -> u64 {
        if self.random.chance(1, 24) {
            return self.random.below(PAGES + 100);
        }
        if level > 1 {
            let below = tables_of(level - 1);
            return below.start + self.random.below(below.end - below.start);
        }
        if self.random.chance(1, 4) {
            self.random.below(TABLES)
        } else {
            self.random.below(4) * 512 + TABLES + self.random.below(4)
        }
    }

    fn some_entry(&mut self, level: u32) -> u64 {
        let permissions = self.mode.permissions(&mut self.random);
        // Write back.
        let kind = if self.mode.is_ept() { 6 << 3 } else { 0 };
        if matches!(level, 2 | 3) && self.random.chance(1, 2) {
            let pages = 1 << (self.mode.shift(level) - 12);
            let block = self.random.below((PAGES / pages).max(1));
            return (block * pages) << 12 | PS | permissions | kind;
        }
        self.some_target(level) << 12 | permissions | if level == 1 { kind } else { 0 }
    }

    /// The hypervisor edits an entry: unseen where it can, else through the emulator.
    fn edit(&mut self) {
        let level = match self.random.below(8) {
            0 => 1 + self.random.below(u64::from(self.mode.levels)) as u32,
            1..4 => 2,
            _ => 1,
        };
        let tables = tables_of(level);
        let table = tables.start + self.random.below(tables.end - tables.start);
        let indices = self.mode.indices(level);
        let index = indices[self.random.below(indices.len() as u64) as usize];
        let entry = if self.random.chance(1, 8) { 0 } else { self.some_entry(level) };
        let at = table * 4096 + index * 8;
        let unseen = self.is_writable(table);
        self.note(format!("{table}[{index}] = {entry:#x}, level {level}, unseen: {unseen}"));
        self.memory.set(at, 8, entry);
        self.was_written(table);
        if !unseen {
            let page = GfnRange::from_len(Gfn::new(table), 1);
            let _ = self.notifier.mark_dirty(0, page).unwrap();
            let (lock, vcpu) = (&self.lock, &mut self.vcpu);
            lock.with(|writer| writer.guest_wrote(vcpu.actor(), Gpa::new(at), 8));
        }
        self.remember_all();
    }

    fn access(&mut self, number: usize, kind: AccessKind) {
        let address = self.addresses[number];
        self.note(format!("{kind:?} {address:#x}"));
        let operation = match kind {
            AccessKind::Read => Operation::Read,
            AccessKind::Write => Operation::Write,
            AccessKind::Fetch => Operation::Fetch,
        };
        let request = NestedRequest { operation, purpose: Purpose::Final(Access::ALL) };
        for _ in 0..8 {
            self.enter();
            let access = mmu_model::Access::user(kind);
            let reached =
                self.core.lock().unwrap().cpu.access(self.mmu.vm().host(), address, access);
            if let Ok(pa) = reached {
                return self.reached(number, pa >> 12, kind);
            }
            let walk = self.guest.walk(&self.memory, self.root, Gpa::new(address), request);
            self.remember_all();
            let walk = match walk {
                Ok(walk) => walk,
                Err(NestedError::Fault(_)) => {
                    let allows = |now: &Meaning| match kind {
                        AccessKind::Read => now.read,
                        AccessKind::Write => now.write,
                        AccessKind::Fetch => now.exec,
                    };
                    if let Some(now) = self.meaning(address).filter(allows) {
                        self.fail(&format!("the hypervisor had a fault and {now:?}"));
                    }
                    return self.reflect(number);
                }
                Err(error) => self.fail(&format!("{error}")),
            };
            let outcome =
                self.vcpu.nested_fault(&self.lock, &self.guest, &self.memory, &walk, request);
            self.note(format!("  {outcome:?}: gfn {} {:?}", walk.path.gfn, walk.path.access));
            match outcome {
                Ok(FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry) => {}
                Ok(FaultOutcome::WriteProtected) => return,
                Ok(FaultOutcome::Emulate(_)) if walk.path.gfn.get() >= PAGES => return,
                other => self.fail(&format!("{other:?}")),
            }
        }
        self.fail("eight faults, and no end");
    }

    /// The hypervisor gets the fault, which is a flush of the address.
    fn reflect(&mut self, number: usize) {
        let address = self.addresses[number];
        let gpa = Gpa::new(address);
        self.vcpu.nested_invalidated(&self.lock, &self.guest, &self.memory, gpa);
        self.core.lock().unwrap().cpu.flush_address(address);
        self.allowed[number].clear();
        self.remember(number);
    }

    fn reached(&mut self, number: usize, pfn: u64, kind: AccessKind) {
        let (write, exec) = (kind == AccessKind::Write, kind == AccessKind::Fetch);
        let gfn = self.judge(
            number,
            &Meaning {
                gfn: pfn,
                read: kind == AccessKind::Read,
                write,
                exec,
                dirty: true,
                level: 0,
            },
        );
        if write {
            self.was_written(gfn);
        }
        let mode = AgeMode::Test;
        let answer = self.mmu.age_gfn(&mut self.notifier, Gfn::new(gfn), mode, Effort::Full);
        if answer != AgeAnswer::Young {
            self.fail(&format!("page {gfn} was accessed and is {answer:?}"));
        }
        let Some(now) = self.meaning(self.addresses[number]) else { return };
        self.seen.reached[now.level as usize] += 1;
        if now.level > 1
            && let Some(entry) = self.shadow(number)
        {
            if entry.level > 1 {
                self.seen.huge += 1;
            } else {
                self.seen.small += 1;
            }
        }
    }

    /// The host page `seen.gfn` can be reached: did the guest's tables allow that at some time
    /// since the last flush? The guest page that it is behind.
    fn judge(&self, number: usize, seen: &Meaning) -> u64 {
        let allows = |meaning: &&Meaning| {
            self.backing.pfn(meaning.gfn) == Some(seen.gfn)
                && (meaning.write && meaning.dirty || !seen.write)
                && (meaning.read || !seen.read)
                && (meaning.exec || !seen.exec)
        };
        let known = &self.allowed[number];
        let Some(found) = known.iter().find(allows) else {
            let gva = self.addresses[number];
            self.fail(&format!("{gva:#x} reaches {seen:x?}, allowed is {known:x?}"));
        };
        found.gfn
    }

    fn was_written(&mut self, gfn: u64) {
        if let Some(written) = &mut self.written {
            written.insert(gfn);
        }
    }

    fn log(&mut self) {
        self.note("log".to_owned());
        let vm = Arc::clone(self.mmu.vm());
        let request = slot(SlotFlags::LOG_DIRTY);
        let _ = vm.set_slot(&mut self.slots, &mut self.notifier, &request, |_, _| {}).unwrap();
        let memslot = *vm.slots().read(&self.notifier.pinned().section).by_id(0, 0).unwrap();
        self.mmu.log_enabled(&mut self.notifier, &self.lock, &memslot);
        self.written = Some(BTreeSet::new());
        for level in [Level::L2, Level::L3] {
            assert_eq!(vm.stats().get(Counter::pages(level)), 0, "huge leaves are left");
        }
    }

    /// INVARIANT[I9]: every page written since the last harvest is reported.
    fn harvest(&mut self) {
        let Some(written) = &mut self.written else { return };
        let written = std::mem::take(written);
        let mut words = [0; PAGES as usize / 64];
        let mmu = Arc::clone(&self.mmu);
        let _ = mmu.harvest_log(&mut self.notifier, &self.lock, 0, 0, &mut words).unwrap();
        self.note("harvest".to_owned());
        let lost = |gfn: &&u64| words[(**gfn / 64) as usize] >> (**gfn % 64) & 1 == 0;
        if let Some(gfn) = written.iter().find(lost) {
            self.fail(&format!("page {gfn} was written and is not reported"));
        }
        if (0..self.addresses.len()).any(|n| self.shadow(n).is_some_and(|s| s.writable())) {
            self.fail("a page is writable after the harvest");
        }
    }

    /// The host takes a block back and gives another, of any size.
    fn take_back(&mut self) {
        let block = self.random.below(4);
        self.note(format!("host takes block {block}"));
        let range = GfnRange::from_len(Gfn::new(block * 512), 512);
        let vm = Arc::clone(self.mmu.vm());
        let invalidation = vm.notify().begin(self.notifier.participant(), range);
        self.back(block);
        let _ = self.mmu.unmap_in(&mut self.notifier, &self.lock, &invalidation, range);
        drop(invalidation);
    }

    fn drop_everything(&mut self) {
        self.note("drop everything".to_owned());
        let (lock, actor) = (&self.lock, &mut self.notifier);
        lock.with(|writer| {
            writer.invalidate_all(actor);
            let _ = writer.zap_obsolete(actor);
        });
    }

    /// INVARIANT[I20]: no address permits more than the guest's tables have since its flush.
    fn check(&mut self) {
        self.enter();
        for number in 0..self.addresses.len() {
            let Some(found) = self.shadow(number) else { continue };
            // The walk was a read.
            let (write, exec) = (found.writable(), found.executable());
            let seen =
                Meaning { gfn: found.pa >> 12, read: true, write, exec, dirty: true, level: 0 };
            let _ = self.judge(number, &seen);
        }
        self.looks += 1;
        if self.looks % 16 != 0 {
            return;
        }
        let (lock, actor) = (&self.lock, &mut self.notifier);
        let flaw = lock.with(|writer| writer.check(actor)).err();
        if let Some(flaw) = flaw {
            self.fail(&format!("{flaw}"));
        }
    }

    fn step(&mut self) {
        let number = self.random.below(self.addresses.len() as u64) as usize;
        match self.random.below(100) {
            0..40 => self.edit(),
            40..86 => {
                let kind = match self.random.below(5) {
                    0..2 => AccessKind::Read,
                    2..4 => AccessKind::Write,
                    _ => AccessKind::Fetch,
                };
                self.access(number, kind);
            }
            86..95 => self.load(),
            95 => self.switch(),
            96..98 => self.take_back(),
            98 => match self.random.below(2) {
                0 => self.harvest(),
                _ => self.drop_everything(),
            },
            _ => {
                self.note("invept".to_owned());
                self.vcpu.nested_flushed(&self.lock, &self.guest, &self.memory);
                self.core.lock().unwrap().cpu.flush_all();
                self.forget();
            }
        }
    }

    fn stats(&self) -> ShadowStats {
        *self.lock.0.lock().unwrap().stats()
    }

    fn finish(mut self) {
        self.vcpu.drop_roots(&self.lock);
        let (lock, actor) = (&self.lock, &mut self.notifier);
        let live = lock.with(|writer| {
            while writer.zap_obsolete(actor) {}
            let _ = writer.shrink(actor, u32::MAX);
            writer.live_pages()
        });
        assert_eq!(live, 0, "seed {}: pages left", self.seed);
        let vm = Arc::clone(self.mmu.vm());
        for gauge in [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G, Counter::Tables] {
            assert_eq!(vm.stats().get(gauge), 0, "seed {}: {}", self.seed, gauge.name());
        }
        drop((self.vcpu, self.notifier));
        assert_eq!(vm.pool().frames_in_use(), 0, "seed {}: frames in use", self.seed);
    }
}

fn run<F: Modelled>(caps: Capabilities, kind: Kind, levels: u32) {
    let caps = Capabilities { max_phys_bits: PHYS as u8, ..caps };
    let mode = Mode { kind, levels };
    let mut sum = Seen::default();
    for seed in 0..48 {
        let quota = if seed % 4 == 3 { 12 } else { 1000 };
        let policy = if seed % 2 == 0 { ReclaimPolicy::Fifo } else { ReclaimPolicy::Accessed };
        let mut world = World::<F>::new(seed, caps, mode, quota, policy);
        world.load();
        for step in 0..2_000 {
            if step == 1_500 {
                world.log();
            }
            world.step();
            world.check();
        }
        sum.unsyncs += world.stats().unsyncs;
        sum.small += world.seen.small;
        sum.huge += world.seen.huge;
        for (sum, one) in sum.reached.iter_mut().zip(world.seen.reached) {
            *sum += one;
        }
        world.finish();
    }
    println!("{mode:?} on {} levels: {sum:?}", caps.levels);
    assert!(sum.reached[1] > 100 && sum.reached[2] > 100, "{sum:?}");
    assert!(sum.small > 100 && sum.huge > 50 && sum.unsyncs > 20, "{sum:?}");
}

const EPT: Kind = Kind::Ept { accessed_dirty: true };

#[test]
fn nested_ept_of_four_levels_is_never_wider() {
    run::<Ept>(Capabilities::ept(), EPT, 4);
    run::<Ept>(five(Capabilities::ept()), EPT, 4);
}

#[test]
fn nested_ept_of_five_levels_is_never_wider() {
    run::<Ept>(five(Capabilities::ept()), EPT, 5);
}

#[test]
fn nested_npt_is_never_wider() {
    run::<Npt>(Capabilities::npt(), Kind::Npt, 4);
    run::<Npt>(five(Capabilities::npt()), Kind::Npt, 4);
}

/// KVM row 4.39: a fault that the hypervisor gets invalidates its address, though nobody flushes.
#[test]
fn a_reflected_fault_invalidates_its_address() {
    const ALL: u64 = 7 | 1 << 8 | 1 << 9;
    const READ: u64 = 1 | 1 << 8 | 6 << 3;
    let mode = Mode { kind: EPT, levels: 4 };
    let caps = Capabilities::ept();
    let mut world = World::<Ept>::new(1, caps, mode, 1000, ReclaimPolicy::Fifo);
    for (table, next) in [(13, 10), (14, 10), (10, 6), (6, 0)] {
        world.memory.set(table << 12, 8, (next << 12) | ALL);
    }
    world.memory.set(0, 8, (600 << 12) | READ);
    // The nested guest may write to the table.
    world.memory.set(8, 8, ALL | 6 << 3);
    world.load();
    let number = |gpa: u64| mode.addresses().iter().position(|one| *one == gpa).unwrap();
    world.access(number(0), AccessKind::Read);
    world.access(number(0x1000), AccessKind::Write);
    assert!(world.is_writable(0), "the table is not out of sync");
    world.memory.set(0, 8, (700 << 12) | READ);
    world.remember_all();
    assert_eq!(world.shadow(number(0)).unwrap().pa >> 12, world.backing.pfn(600).unwrap());
    world.access(number(0), AccessKind::Write);
    world.check();
    world.access(number(0), AccessKind::Read);
    assert_eq!(world.shadow(number(0)).unwrap().pa >> 12, world.backing.pfn(700).unwrap());
    world.finish();
}
