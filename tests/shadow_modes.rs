//! Shadow tables in every paging mode of a guest, on host tables of three, four and five levels.
//!
//! As `shadow_model`, with guests that change their mode, map pages of 2 MiB, 4 MiB and 1 GiB, and
//! have memory that the host backs by small and by huge pages. The specification walks the guest's
//! tables on its own: its masks, indices and reserved bits are written down here once more.

mod common;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{Core, DATA, Modelled, Peek, TestHost, five};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Gva, Hva, Level, Pfn};
use mmu_core::fault::{FaultError, FaultOutcome};
use mmu_core::slot::{SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{Capabilities, Legacy, SpteConfig};
use mmu_core::stats::Counter;
use mmu_core::traits::{AgeAnswer, AgeMode, AgeRange, Effort, HostPage, ResolveError};
use mmu_core::vm::{Actor, VmCore};
use mmu_model::{AccessKind, Caches, Random, SoftCpu, Walker};
use shadow_mmu::guest::{
    EntryWidth, Exchange, GuestControls, GuestCpu, GuestMem, GuestRoot, GuestWalker, NotMemory,
    Operation, PointerError, Privilege, Request, WalkError, WriteProtect,
};
use shadow_mmu::{
    PageRole, ReclaimPolicy, RoleFlags, ShadowError, ShadowMmu, ShadowStats, ShadowVcpu,
    ShadowWriter, WriterLock,
};

/// Guest memory: four blocks of 2 MiB.
const PAGES: u64 = 4 * 512;
/// The first frames are tables. Others hold nothing but zeros.
const TABLES: u64 = 20;
/// Where the pointers of PAE stand: two sets of four.
const POINTERS: u64 = 19;
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    None,
    Bits32 { pse: bool },
    Pae,
    Long4,
    Long5,
}

impl Mode {
    /// What a guest on tables of `levels` may choose.
    fn all(levels: u8) -> Vec<Self> {
        let mut all = vec![
            Self::None,
            Self::Bits32 { pse: false },
            Self::Bits32 { pse: true },
            Self::Bits32 { pse: true },
            Self::Pae,
        ];
        if levels >= 4 {
            all.push(Self::Long4);
        }
        if levels >= 5 {
            all.push(Self::Long5);
        }
        all
    }

    fn controls(self) -> GuestControls {
        use GuestControls as C;
        match self {
            Self::None => C::empty(),
            Self::Bits32 { pse: false } => C::PG,
            Self::Bits32 { pse: true } => C::PG | C::PSE,
            Self::Pae => C::PG | C::PAE | C::NXE,
            Self::Long4 => C::LONG,
            Self::Long5 => C::LONG | C::LA57,
        }
    }

    fn top(self) -> u32 {
        match self {
            Self::None => 0,
            // PAE's third level is in registers.
            Self::Bits32 { .. } | Self::Pae => 2,
            Self::Long4 => 4,
            Self::Long5 => 5,
        }
    }

    fn is_32(self) -> bool {
        matches!(self, Self::Bits32 { .. })
    }

    fn bytes(self) -> u64 {
        if self.is_32() { 4 } else { 8 }
    }

    fn shift(self, level: u32) -> u32 {
        12 + (level - 1) * if self.is_32() { 10 } else { 9 }
    }

    fn index(self, gva: u64, level: u32) -> u64 {
        gva >> self.shift(level) & if self.is_32() { 1023 } else { 511 }
    }

    fn has_pages(self, level: u32) -> bool {
        match level {
            1 => true,
            2 => self != Self::Bits32 { pse: false },
            3 => matches!(self, Self::Long4 | Self::Long5),
            _ => false,
        }
    }

    /// Reserved bits of an entry.
    fn reserved(self, level: u32, page: bool) -> u64 {
        let high = match self {
            Self::Bits32 { .. } => return if page && level == 2 { bits(13, 21) } else { 0 },
            Self::Pae => bits(PHYS, 62),
            _ => bits(PHYS, 51),
        };
        high | match (level, page) {
            (2, true) => bits(13, 20),
            (3, true) => bits(13, 29),
            (4.., _) => PS,
            _ => 0,
        }
    }

    /// Indices in use.
    fn indices(self, level: u32) -> &'static [u64] {
        match (self, level) {
            (Self::Bits32 { .. }, 1) => &[0, 1, 512, 1023],
            (Self::Bits32 { .. }, _) => &[0, 1, 300, 1000],
            (_, 1) => &[0, 1, 2, 3],
            (Self::Long5, 3) => &[0],
            (Self::Pae, 3) => &[0, 3],
            // The upper half of the address space.
            (Self::Long4, 4) => &[0, 511],
            _ => &[0, 1],
        }
    }

    /// The linear addresses that are looked at.
    fn addresses(self) -> Vec<u64> {
        if self == Self::None {
            let gfns = [0, 1, 2, 3, TABLES, 511, 512, 513, 1024, 1536, PAGES - 1, PAGES];
            return gfns.iter().map(|gfn| gfn << 12).collect();
        }
        let top = if self == Self::Pae { 3 } else { self.top() };
        let mut all = vec![0];
        for level in 1..=top {
            let with = |low: &u64| {
                let low = *low;
                self.indices(level).iter().map(move |index| low | index << self.shift(level))
            };
            all = all.iter().flat_map(with).collect();
        }
        let sign = if self == Self::Long4 { 47 } else { 56 };
        let extended = |gva: u64| if gva >> sign & 1 == 1 { gva | u64::MAX << sign } else { gva };
        all.into_iter().map(extended).collect()
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
    write: bool,
    user: bool,
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

struct Lock(Mutex<ShadowWriter<Legacy, TestHost>>);

impl WriterLock<Legacy, TestHost> for Lock {
    fn with<R>(&self, work: impl FnOnce(&mut ShadowWriter<Legacy, TestHost>) -> R) -> R {
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
    floods: u64,
    unsyncs: u64,
}

struct World {
    seed: u64,
    random: Random,
    levels: u8,
    mode: Mode,
    memory: Memory,
    backing: Arc<Backing>,
    backings: u64,
    mmu: Arc<ShadowMmu<Legacy, TestHost>>,
    lock: Lock,
    vcpu: ShadowVcpu<Legacy, TestHost>,
    notifier: Actor<TestHost>,
    slots: SlotWriter,
    core: Arc<Mutex<Core>>,
    guest: GuestWalker,
    walker: Walker,
    role: PageRole,
    /// What the guest's root register, or registers, hold.
    root: GuestRoot,
    register: u64,
    addresses: Vec<u64>,
    allowed: Vec<Vec<Meaning>>,
    written: Option<BTreeSet<u64>>,
    looks: u64,
    seen: Seen,
    steps: Vec<String>,
}

fn caps(levels: u8) -> Capabilities {
    let caps = match levels {
        3 => Capabilities::pae(),
        4 => Capabilities::legacy(),
        _ => five(Capabilities::legacy()),
    };
    Capabilities { max_phys_bits: PHYS as u8, ..caps }
}

fn guest_cpu() -> GuestCpu {
    GuestCpu {
        max_phys_bits: PHYS as u8,
        gbpages: true,
        la57: true,
        pse36: false,
        ..GuestCpu::baseline()
    }
}

impl World {
    fn new(seed: u64, levels: u8, quota: u32, policy: ReclaimPolicy) -> Self {
        let caps = caps(levels);
        let config = SpteConfig::<Legacy>::new(caps).unwrap();
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
        let format = Legacy::model(&caps);
        let core = vm.host().add_core(SoftCpu::new(&format, 0, Caches::unlimited()));
        let flushed = Arc::clone(&core);
        vm.host().before_flush(Some(Arc::new(move |_| flushed.lock().unwrap().cpu.flush_all())));
        let mut world = Self {
            seed,
            random: Random::new(seed),
            levels,
            mode: Mode::None,
            memory: Memory((0..TABLES * 512).map(|_| AtomicU64::new(0)).collect()),
            backing,
            backings: 0,
            mmu,
            lock: Lock(Mutex::new(writer)),
            vcpu,
            notifier,
            slots,
            core,
            guest: GuestWalker::new(&guest_cpu(), GuestControls::empty()).unwrap(),
            walker: Walker::new(&format),
            role: PageRole::new(Level::L4, RoleFlags::empty()),
            root: GuestRoot::Cr3(0),
            register: 0,
            addresses: Vec::new(),
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

    /// The guest's tables, walked by hand; `None` where every access is a fault.
    fn meaning(&self, gva: u64) -> Option<Meaning> {
        let mode = self.mode;
        let mut found =
            Meaning { gfn: gva >> 12, write: true, user: true, exec: true, dirty: true, level: 2 };
        let mut table = match (mode, self.root) {
            (Mode::None, _) => return Some(found),
            (_, GuestRoot::Pae(pointers)) => pointers.values()[(gva >> 30 & 3) as usize],
            (_, GuestRoot::Cr3(cr3)) => cr3 | P,
        };
        if table & P == 0 {
            return None;
        }
        for level in (1..=mode.top()).rev() {
            let at = (table & bits(12, 51)) + mode.index(gva, level) * mode.bytes();
            let entry = self.memory.get(at, mode.bytes())?;
            let page = level == 1 || (entry & PS != 0 && mode.has_pages(level));
            if entry & P == 0 || entry & mode.reserved(level, page) != 0 {
                return None;
            }
            found.write &= entry & W != 0;
            found.user &= entry & U != 0;
            found.exec &= entry & NX == 0;
            if page {
                let inside = (1 << mode.shift(level)) - 1;
                found.gfn = (entry & bits(12, 51) & !inside | gva & inside) >> 12;
                found.level = level;
                found.dirty = entry & D != 0;
                return Some(found);
            }
            table = entry;
        }
        unreachable!("level 1 maps a page")
    }

    /// The guest switches its mode and loads its root.
    fn switch(&mut self, mode: Mode) {
        self.mode = mode;
        self.guest = GuestWalker::new(&guest_cpu(), mode.controls()).unwrap();
        self.role = PageRole::of_guest(&guest_cpu(), mode.controls(), WriteProtect::On).unwrap();
        self.addresses = mode.addresses();
        self.load();
    }

    /// The guest loads CR3, which flushes everything.
    fn load(&mut self) {
        let mut root =
            GuestRoot::Cr3((tables_of(self.mode.top()).start + self.random.below(2)) << 12);
        if self.mode == Mode::Pae {
            let cr3 = (POINTERS << 12) + self.random.below(2) * 32;
            for index in 0..4 {
                if self.random.chance(1, 3) {
                    let pointer = self.some_target(3) << 12 | P;
                    let pointer = if self.random.chance(1, 6) { 0 } else { pointer };
                    self.memory.set(cr3 + index * 8, 8, pointer);
                }
            }
            // Where somebody took the frame for another table, the guest gets its #GP.
            root = match self.guest.load_pointers(&self.memory, cr3) {
                Ok(pointers) => GuestRoot::Pae(pointers),
                Err(PointerError::Reserved { .. }) => {
                    (0..8).for_each(|index| self.memory.set((POINTERS << 12) + index * 8, 8, 0));
                    GuestRoot::Pae(self.guest.load_pointers(&self.memory, cr3).unwrap())
                }
                Err(other) => panic!("{other}"),
            };
        }
        self.root = root;
        self.note(format!("{:?}, {root:x?}", self.mode));
        self.enter_anew();
        self.forget();
    }

    fn enter_anew(&mut self) {
        let loaded =
            self.vcpu.load_guest_root(&self.lock, &self.guest, &self.memory, &self.root, self.role);
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

    fn invlpg(&mut self, number: usize) {
        self.note(format!("invlpg {:#x}", self.addresses[number]));
        let gva = Gva::new(self.addresses[number]);
        self.vcpu.guest_invalidated(&self.lock, &self.guest, &self.memory, gva);
        // The processor drops the whole page's entries: with 4 KiB entries of a large page of the
        // guest in its TLB, all of them, as an embedder must.
        self.core.lock().unwrap().cpu.flush_address(gva.get());
        self.allowed[number].clear();
        self.remember(number);
    }

    fn shadow(&self, number: usize) -> Option<mmu_model::Translation> {
        let access = mmu_model::Access::supervisor(AccessKind::Read);
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
        if level > 1 && self.mode.has_pages(level) && self.random.chance(1, 2) {
            let pages = 1 << (self.mode.shift(level) - 12);
            let block = self.random.below((PAGES / pages).max(1));
            return (block * pages) << 12 | PS;
        }
        self.some_target(level) << 12
    }

    /// The guest edits an entry: unseen where it can, else through the emulator.
    fn edit(&mut self) {
        let top = self.mode.top();
        if top == 0 {
            return;
        }
        let level = match self.random.below(8) {
            0 => 1 + self.random.below(u64::from(top)) as u32,
            1..4 => 2,
            _ => 1,
        };
        let tables = tables_of(level);
        let table = tables.start + self.random.below(tables.end - tables.start);
        let indices = self.mode.indices(level);
        let index = indices[self.random.below(indices.len() as u64) as usize];
        let mut entry = self.some_entry(level) | P;
        for (bit, chance) in [(W, 7), (U, 6), (A, 5), (D, 4)] {
            if self.random.chance(chance, 8) {
                entry |= bit;
            }
        }
        if !self.mode.is_32() && self.random.chance(1, 8) {
            entry |= NX;
        }
        // Ignored in long mode, reserved in PAE's.
        if matches!(self.mode, Mode::Long4 | Mode::Long5) && self.random.chance(1, 6) {
            entry |= 1 << 55;
        }
        if self.random.chance(1, 8) {
            entry = 0;
        }
        let bytes = self.mode.bytes();
        let at = table * 4096 + index * bytes;
        let unseen = self.is_writable(table);
        self.note(format!("{table}[{index}] = {entry:#x}, level {level}, unseen: {unseen}"));
        self.memory.set(at, bytes, entry);
        self.was_written(table);
        if !unseen {
            let page = GfnRange::from_len(Gfn::new(table), 1);
            let _ = self.notifier.mark_dirty(0, page).unwrap();
            let (lock, vcpu) = (&self.lock, &mut self.vcpu);
            lock.with(|writer| writer.guest_wrote(vcpu.actor(), Gpa::new(at), bytes));
        }
        self.remember_all();
    }

    fn access(&mut self, number: usize, kind: AccessKind, user: bool) {
        let gva = self.addresses[number];
        self.note(format!("{kind:?} {gva:#x}, user: {user}"));
        let access =
            if user { mmu_model::Access::user(kind) } else { mmu_model::Access::supervisor(kind) };
        let operation = match kind {
            AccessKind::Read => Operation::Read,
            AccessKind::Write => Operation::Write,
            AccessKind::Fetch => Operation::Fetch,
        };
        let privilege = if user { Privilege::User } else { Privilege::Supervisor };
        let request = Request::new(operation, privilege);
        for _ in 0..8 {
            self.enter();
            let reached = self.core.lock().unwrap().cpu.access(self.mmu.vm().host(), gva, access);
            if let Ok(pa) = reached {
                return self.reached(number, pa >> 12, kind, user);
            }
            let walk = self.guest.walk(&self.memory, &self.root, Gva::new(gva), request);
            self.remember_all();
            let walk = match walk {
                Ok(walk) => walk,
                Err(WalkError::Fault(_)) => {
                    let allows = |now: &Meaning| {
                        (now.user || !user)
                            && match kind {
                                AccessKind::Read => true,
                                AccessKind::Write => now.write,
                                AccessKind::Fetch => now.exec,
                            }
                    };
                    if let Some(now) = self.meaning(gva).filter(allows) {
                        self.fail(&format!("the guest had a fault and {now:?}"));
                    }
                    return;
                }
                Err(error) => self.fail(&format!("{error}")),
            };
            let outcome = self.vcpu.fault(&self.lock, &self.guest, &self.memory, &walk, request);
            self.note(format!("  {outcome:?}: gfn {} {:?}", walk.path.gfn, walk.path.access));
            match outcome {
                Ok(FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry) => {}
                Ok(FaultOutcome::WriteProtected) => return,
                Ok(FaultOutcome::Emulate(_)) if walk.path.gfn.get() >= PAGES => return,
                Err(ShadowError::Fault(FaultError::BeyondPhysical { gpa, .. }))
                    if gpa.get() >> 12 >= PAGES =>
                {
                    return;
                }
                other => self.fail(&format!("{other:?}")),
            }
        }
        self.fail("eight faults, and no end");
    }

    fn reached(&mut self, number: usize, pfn: u64, kind: AccessKind, user: bool) {
        let (write, exec) = (kind == AccessKind::Write, kind == AccessKind::Fetch);
        let gfn =
            self.judge(number, &Meaning { gfn: pfn, write, user, exec, dirty: true, level: 0 });
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
                && (meaning.user || !seen.user)
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
            let (write, user, exec) = (found.writable(), found.user(), found.executable());
            let seen = Meaning { gfn: found.pa >> 12, write, user, exec, dirty: true, level: 0 };
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
                let user = self.random.chance(1, 2);
                self.access(number, kind, user);
            }
            86..91 => self.invlpg(number),
            91..95 => self.load(),
            95 => {
                let modes = Mode::all(self.levels);
                let mode = modes[self.random.below(modes.len() as u64) as usize];
                self.switch(mode);
            }
            96..98 => self.take_back(),
            98 => match self.random.below(2) {
                0 => self.harvest(),
                _ => self.drop_everything(),
            },
            _ => {
                self.note("flush".to_owned());
                self.vcpu.guest_flushed(&self.lock, &self.guest, &self.memory);
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

fn run(seed: u64, levels: u8, mode: Mode, quota: u32, sum: &mut Seen) {
    let policy = if seed % 2 == 0 { ReclaimPolicy::Fifo } else { ReclaimPolicy::Accessed };
    let mut world = World::new(seed, levels, quota, policy);
    world.switch(mode);
    for step in 0..2_000 {
        if step == 1_500 {
            world.log();
        }
        world.step();
        world.check();
    }
    let stats = world.stats();
    sum.floods += stats.floods;
    sum.unsyncs += stats.unsyncs;
    sum.small += world.seen.small;
    sum.huge += world.seen.huge;
    for (sum, one) in sum.reached.iter_mut().zip(world.seen.reached) {
        *sum += one;
    }
    world.finish();
}

/// Every mode first for some seeds, on tables of `levels`.
fn all_modes(levels: u8) -> Seen {
    let mut sum = Seen::default();
    for (number, mode) in (0..).zip(Mode::all(levels)) {
        for seed in 0..12 {
            let quota = if seed % 4 == 3 { 12 } else { 1000 };
            run(seed + 100 * number + 10_000 * u64::from(levels), levels, mode, quota, &mut sum);
        }
    }
    println!("{levels} levels: {sum:?}");
    assert!(sum.reached[1] > 1000 && sum.reached[2] > 1000, "{sum:?}");
    assert!(sum.small > 1000 && sum.huge > 200 && sum.unsyncs > 100, "{sum:?}");
    sum
}

#[test]
fn every_mode_on_tables_of_three_levels_is_never_wider() {
    let _ = all_modes(3);
}

#[test]
fn every_mode_on_tables_of_four_levels_is_never_wider() {
    assert!(all_modes(4).reached[3] > 100, "pages of 1 GiB");
}

#[test]
fn every_mode_on_tables_of_five_levels_is_never_wider() {
    assert!(all_modes(5).reached[3] > 100, "pages of 1 GiB");
}

const ALL: u64 = P | W | U | A | D;

/// A guest in long mode whose address 0 is in the 2 MiB page `entry`, with memory behind block 1
/// in small pages and behind block 2 in a huge one.
fn large_page(entry: u64) -> World {
    let mut world = World::new(1, 4, 1000, ReclaimPolicy::Fifo);
    world.backing.set(1, 50, false);
    world.backing.set(2, 51, true);
    for (table, next) in [(13, 10), (14, 10), (10, 6)] {
        world.memory.set(table << 12, 8, next << 12 | ALL);
    }
    world.memory.set(6 << 12, 8, entry);
    world.switch(Mode::Long4);
    world
}

/// The 2 MiB page of a block.
const fn block(number: u64) -> u64 {
    (number * 512) << 12 | PS | ALL
}

/// Bug B01: the host, not the guest's processor, changes the entry of a page of 2 MiB, and nobody
/// is told. The row of small entries below it is not taken for a row of the new page.
#[test]
fn a_row_of_another_page_is_not_reused() {
    let mut world = large_page(block(1));
    world.access(0, AccessKind::Write, true);
    assert_eq!(world.shadow(0).unwrap().pa >> 12, world.backing.pfn(512).unwrap());
    world.backing.set(3, 52, false);
    world.memory.set(6 << 12, 8, block(3));
    world.remember_all();
    let next = world.addresses.iter().position(|gva| *gva == 0x1000).unwrap();
    world.access(next, AccessKind::Write, true);
    assert_eq!(world.shadow(next).unwrap().pa >> 12, world.backing.pfn(3 * 512 + 1).unwrap());
    assert_eq!(world.shadow(0), None, "an entry of the old row is reached through the new page");
    (0..16).for_each(|_| world.check());
    world.finish();
}

/// KVM rows 4.25, 4.56: small entries, a huge one, and small ones again, as the guest's page moves.
#[test]
fn rows_and_huge_leaves_take_turns() {
    let mut world = large_page(block(1));
    for (number, huge) in [(1, false), (2, true), (1, false), (2, true)] {
        world.memory.set(6 << 12, 8, block(number));
        let actor = world.vcpu.actor();
        world.lock.0.lock().unwrap().guest_wrote(actor, Gpa::new(6 << 12), 8);
        world.remember_all();
        world.access(0, AccessKind::Write, true);
        let found = world.shadow(0).unwrap();
        assert_eq!(found.level, if huge { 2 } else { 1 });
        assert_eq!(found.pa >> 12, world.backing.pfn(number * 512).unwrap());
    }
    world.finish();
}

/// KVM row 4.25: the guest's page of 2 MiB permits less, then more; what small entries permit
/// follows, though they stand in a page of their own.
#[test]
fn a_row_permits_what_the_guests_page_does() {
    let mut world = large_page(block(1) & !W);
    world.access(0, AccessKind::Read, true);
    assert!(!world.shadow(0).unwrap().writable());
    // Without a flush and without a report: permissions that are added need neither.
    world.memory.set(6 << 12, 8, block(1));
    world.remember_all();
    world.access(0, AccessKind::Write, true);
    assert!(world.shadow(0).unwrap().writable());
    world.finish();
}

/// A huge page of the guest that covers its own tables is mapped small, whoever comes first.
#[test]
fn no_huge_leaf_lies_over_the_tables_that_lead_to_it() {
    let mut world = large_page(block(0));
    world.backing.set(0, 53, true);
    world.access(0, AccessKind::Write, true);
    assert_eq!(world.shadow(0).unwrap().level, 1);
    assert!(!world.is_writable(6), "the guest writes to its table unseen");
    (0..16).for_each(|_| world.check());
    world.finish();
}

/// KVM row 1.30: a root where no memory is leads nowhere and harms nobody.
#[test]
fn a_root_outside_memory_leads_nowhere() {
    let mut world = large_page(block(1));
    for gfn in [PAGES + 5, 1 << 33, (1 << (PHYS - 12)) - 1] {
        world.root = GuestRoot::Cr3(gfn << 12);
        world.enter_anew();
        world.forget();
        world.access(0, AccessKind::Read, true);
        assert_eq!(world.shadow(0), None);
    }
    world.load();
    world.access(0, AccessKind::Read, true);
    assert!(world.shadow(0).is_some());
    (0..16).for_each(|_| world.check());
    world.finish();
}

/// Bug B90: what no guest has is refused by name.
#[test]
fn roots_that_do_not_fit_are_refused() {
    let mut world = large_page(block(1));
    let cr3 = GuestRoot::Cr3(13 << 12);
    for (mode, root) in [(Mode::Pae, cr3), (Mode::Long5, cr3)] {
        let guest = GuestWalker::new(&guest_cpu(), mode.controls()).unwrap();
        let role = PageRole::of_guest(&guest_cpu(), mode.controls(), WriteProtect::On).unwrap();
        let World { vcpu, lock, memory, .. } = &mut world;
        let refused = vcpu.load_guest_root(lock, &guest, memory, &root, role).unwrap_err();
        match mode {
            Mode::Pae => assert!(matches!(refused, ShadowError::WrongRoot { .. }), "{refused}"),
            _ => assert!(matches!(refused, ShadowError::WrongLevel { .. }), "{refused}"),
        }
    }
    world.access(0, AccessKind::Read, true);
    assert!(world.shadow(0).is_some(), "the vCPU is on its former root");
    world.finish();
}

/// What PAE's registers hold counts, not what memory holds by now, and each value of them has a
/// root of its own.
#[test]
fn pae_pointers_are_the_registers() {
    let mut world = World::new(1, 3, 1000, ReclaimPolicy::Fifo);
    for (table, entry) in [(6, block(1)), (7, block(2))] {
        world.memory.set(table << 12, 8, entry);
    }
    world.switch(Mode::Pae);
    let cr3 = POINTERS << 12;
    let mut registers = Vec::new();
    for table in [6, 7, 6, 7] {
        world.memory.set(cr3, 8, table << 12 | P);
        world.root = GuestRoot::Pae(world.guest.load_pointers(&world.memory, cr3).unwrap());
        world.enter_anew();
        world.forget();
        // Not loaded: nothing changes.
        world.memory.set(cr3, 8, 0);
        world.access(0, AccessKind::Write, true);
        let gfn = if table == 6 { 512 } else { 1024 };
        assert_eq!(world.shadow(0).unwrap().pa >> 12, world.backing.pfn(gfn).unwrap());
        registers.push(world.register);
    }
    assert_eq!(registers[0], registers[2], "former roots are kept");
    assert_ne!(registers[0], registers[1]);
    world.finish();
}

/// Bug B62: a table that long mode and PAE both use has a shadow for each, because PAE reserves
/// bits that long mode ignores.
#[test]
fn modes_share_no_shadow_of_a_table() {
    let mut world = large_page(6 << 12);
    world.memory.set(6 << 12, 8, ALL);
    world.memory.set(0, 8, (1000 << 12) | ALL | (1 << 55));
    world.access(0, AccessKind::Read, true);
    assert!(world.shadow(0).is_some());
    world.switch(Mode::Pae);
    world.memory.set(POINTERS << 12, 8, (6 << 12) | P);
    let pointers = world.guest.load_pointers(&world.memory, POINTERS << 12).unwrap();
    world.root = GuestRoot::Pae(pointers);
    world.enter_anew();
    world.forget();
    world.memory.set(8, 8, (1001 << 12) | ALL);
    world.remember_all();
    let next = world.addresses.iter().position(|gva| *gva == 0x1000).unwrap();
    world.access(next, AccessKind::Read, true);
    assert!(world.shadow(next).is_some());
    world.check();
    world.finish();
}
