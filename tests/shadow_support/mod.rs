//! A guest on shadow tables, for tests: its memory and tables, a processor whose TLB forgets
//! nothing by itself, and what each address has meant since its last flush. Every step of [`World`]
//! judges what the guest can reach.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::{Core, DATA, Modelled, Peek, TestHost};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Gva, Hva, Level, Pfn};
use mmu_core::fault::FaultOutcome;
use mmu_core::slot::{SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{Capabilities, Legacy, SpteConfig};
use mmu_core::stats::Counter;
use mmu_core::traits::{
    AgeAnswer, AgeMode, AgeRange, AgeRequest, CountOnly, Effort, HostPage, ResolveError,
};
use mmu_core::vm::{Actor, VmCore};
use mmu_model::{AccessKind, Caches, Random, SoftCpu, Walker};
use shadow_mmu::guest::{
    EntryWidth, Exchange, GuestControls, GuestCpu, GuestMem, GuestRoot, GuestWalker, NotMemory,
    Operation, Privilege, Request, WalkError,
};
use shadow_mmu::{
    OnWriteProtected, PageRole, ReclaimPolicy, RoleFlags, ShadowMmu, ShadowVcpu, ShadowWriter,
    WriteRetry, WriterLock,
};

/// Guest memory in pages.
pub const PAGES: u64 = 40;
/// The first of them are tables: two top tables, then those below.
pub const TABLES: u64 = 14;
/// The first table of the lowest level.
pub const LOWEST: u64 = 8;
/// Two indices at each level above the lowest, four there.
pub const GVAS: u64 = 2 * 2 * 2 * 4;

pub const P: u64 = 1 << 0;
pub const W: u64 = 1 << 1;
pub const U: u64 = 1 << 2;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const NX: u64 = 1 << 63;
pub const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Guest memory: words that the guest, its tables' walker and the host see.
pub struct Memory(pub Vec<AtomicU64>);

impl Memory {
    pub fn word(&self, at: Gpa) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(at.get() / 8).ok()?).filter(|_| at.get() % 8 == 0)
    }

    pub fn get(&self, table: u64, index: u64) -> u64 {
        self.0[(table * 512 + index) as usize].load(Ordering::SeqCst)
    }
}

impl GuestMem for Memory {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        assert_eq!(width, EntryWidth::Eight);
        self.word(at).map(|word| word.load(Ordering::SeqCst)).ok_or(NotMemory { at })
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        _: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        let word = self.word(at).ok_or(NotMemory { at })?;
        Ok(match word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => Exchange::Done,
            Err(_) => Exchange::Lost,
        })
    }
}

/// What an address means, by the guest's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meaning {
    pub gfn: u64,
    pub write: bool,
    pub user: bool,
    pub exec: bool,
}

impl Meaning {
    pub fn allows(&self, kind: AccessKind, user: bool) -> bool {
        let kind = match kind {
            AccessKind::Read => true,
            AccessKind::Write => self.write,
            AccessKind::Fetch => self.exec,
        };
        kind && (self.user || !user)
    }
}

/// The linear address of universe element `number`.
pub fn gva(number: u64) -> u64 {
    let (l4, l3, l2, l1) = (number / 16 % 2, number / 8 % 2, number / 4 % 2, number % 4);
    l4 << 39 | l3 << 30 | l2 << 21 | l1 << 12
}

/// Four levels by hand; `None` where the guest has a fault for every access.
pub fn meaning(memory: &Memory, root: u64, gva: u64) -> Option<Meaning> {
    let mut at = root;
    let mut found = Meaning { gfn: 0, write: true, user: true, exec: true };
    for level in (1..=4).rev() {
        let entry = memory.get(at, gva >> (12 + 9 * (level - 1)) & 511);
        if entry & P == 0 {
            return None;
        }
        found.write &= entry & W != 0;
        found.user &= entry & U != 0;
        found.exec &= entry & NX == 0;
        let frame = (entry & FRAME) >> 12;
        if level == 2 && entry & 1 << 7 != 0 {
            if frame % 512 != 0 {
                return None;
            }
            found.gfn = frame + (gva >> 12 & 511);
            return Some(found);
        }
        if level > 1 && frame >= PAGES {
            return None;
        }
        at = frame;
    }
    found.gfn = at;
    Some(found)
}

/// All of guest memory.
pub fn slot(flags: SlotFlags) -> SlotRequest {
    let hva = Hva::new(DATA << 12);
    SlotRequest { as_id: 0, id: 0, base: Gpa::new(0), bytes: PAGES << 12, hva, flags }
}

pub struct Lock(pub Mutex<ShadowWriter<Legacy, TestHost>>);

impl WriterLock<Legacy, TestHost> for Lock {
    fn with<R>(&self, work: impl FnOnce(&mut ShadowWriter<Legacy, TestHost>) -> R) -> R {
        work(&mut self.0.lock().unwrap())
    }
}

pub struct World {
    pub seed: u64,
    pub random: Random,
    pub memory: Memory,
    /// Host page of each guest page, as an offset from `DATA`; changes when the host takes one
    /// back.
    pub backing: Arc<Vec<AtomicU64>>,
    pub mmu: Arc<ShadowMmu<Legacy, TestHost>>,
    pub lock: Lock,
    pub vcpu: ShadowVcpu<Legacy, TestHost>,
    pub notifier: Actor<TestHost>,
    pub core: Arc<Mutex<Core>>,
    pub guest: GuestWalker,
    pub walker: Walker,
    pub role: PageRole,
    /// Gfn of the guest's top table.
    pub root: u64,
    /// Address of the shadow of that.
    pub register: u64,
    pub looks: u64,
    /// Guest pages accessed since all were aged with a flush.
    pub touched: BTreeSet<u64>,
    /// Guest pages written since the log was harvested; `None` where writes are not logged.
    pub written: Option<BTreeSet<u64>>,
    pub slots: SlotWriter,
    /// What each address meant since its last flush.
    pub allowed: Vec<Vec<Meaning>>,
    pub steps: Vec<String>,
}

impl World {
    pub fn new(seed: u64, quota: u32, policy: ReclaimPolicy) -> Self {
        let caps = Capabilities::legacy();
        let config = SpteConfig::<Legacy>::new(caps).unwrap();
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let host = TestHost::new(4096);
        host.record(false);
        let backing: Arc<Vec<AtomicU64>> = Arc::new((0..PAGES).map(AtomicU64::new).collect());
        let pages = Arc::clone(&backing);
        host.set_resolver(Arc::new(move |_, gfn, _| {
            let page = pages.get(gfn.get() as usize).ok_or(ResolveError::NoMemory)?;
            let pfn = Pfn::new(DATA + page.load(Ordering::SeqCst));
            Ok(HostPage { pfn, writable: true, level: Level::L1 })
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
        // The model's caches go by linear address, flushes by frame: everything goes.
        let flushed = Arc::clone(&core);
        vm.host().before_flush(Some(Arc::new(move |_| flushed.lock().unwrap().cpu.flush_all())));
        let controls =
            GuestControls::PG | GuestControls::PAE | GuestControls::LME | GuestControls::NXE;
        let cpu = GuestCpu { gbpages: false, ..GuestCpu::baseline() };
        Self {
            seed,
            random: Random::new(seed),
            memory: Memory((0..PAGES * 512).map(|_| AtomicU64::new(0)).collect()),
            backing,
            mmu,
            lock: Lock(Mutex::new(writer)),
            vcpu,
            notifier,
            core,
            guest: GuestWalker::new(&cpu, controls).unwrap(),
            walker: Walker::new(&format),
            role: PageRole::new(Level::L4, RoleFlags::NX | RoleFlags::WP),
            root: 0,
            register: 0,
            looks: 0,
            touched: BTreeSet::new(),
            written: None,
            slots,
            allowed: vec![Vec::new(); GVAS as usize],
            steps: Vec::new(),
        }
    }

    pub fn note(&mut self, step: String) {
        if self.steps.len() >= 80 {
            self.steps.drain(..40);
        }
        self.steps.push(step);
    }

    #[track_caller]
    pub fn fail(&self, what: &str) -> ! {
        let from = self.steps.len().saturating_sub(40);
        panic!("seed {}: {what}\nsteps:\n  {}", self.seed, self.steps[from..].join("\n  "));
    }

    /// The guest loads CR3, which flushes everything.
    pub fn load_cr3(&mut self, root: u64) {
        self.root = root;
        self.note(format!("cr3 = {root}"));
        let loaded =
            self.vcpu.load_root(&self.lock, &self.guest, &self.memory, Gfn::new(root), self.role);
        self.register = loaded.expect("memory").get();
        self.core.lock().unwrap().cpu.set_root(self.register);
        self.forget();
    }

    /// Everything was flushed: addresses mean what they mean now.
    pub fn forget(&mut self) {
        for number in 0..GVAS {
            self.allowed[number as usize].clear();
            self.remember(number);
        }
    }

    pub fn remember(&mut self, number: u64) {
        if let Some(now) = meaning(&self.memory, self.root, gva(number)) {
            let known = &mut self.allowed[number as usize];
            if !known.contains(&now) {
                known.push(now);
            }
        }
    }

    pub fn invlpg(&mut self, number: u64) {
        self.note(format!("invlpg {number}"));
        let address = Gva::new(gva(number));
        self.vcpu.guest_invalidated(&self.lock, &self.guest, &self.memory, address);
        self.core.lock().unwrap().cpu.flush_address(address.get());
        self.allowed[number as usize].clear();
        self.remember(number);
    }

    /// What the shadow tables say about an address, to somebody who only looks.
    pub fn shadow(&self, number: u64) -> Option<mmu_model::Translation> {
        let access = mmu_model::Access::supervisor(AccessKind::Read);
        self.walker.translate(&Peek(self.mmu.vm().host()), self.register, gva(number), access).ok()
    }

    /// Can the guest write to the frame unseen, through any address?
    pub fn is_writable(&self, gfn: u64) -> bool {
        let host = DATA + self.backing[gfn as usize].load(Ordering::SeqCst);
        (0..GVAS)
            .filter_map(|number| self.shadow(number))
            .any(|found| found.writable() && found.pa >> 12 == host)
    }

    /// A table to edit: mostly one of the lowest level.
    pub fn some_table(&mut self) -> u64 {
        match self.random.below(20) {
            0 => self.random.below(2),
            1 => 2 + self.random.below(3),
            2..4 => 5 + self.random.below(3),
            _ => LOWEST + self.random.below(TABLES - LOWEST),
        }
    }

    /// What an entry of `table` may lead to: mostly a table of the level below, sometimes anything.
    pub fn some_target(&mut self, table: u64) -> u64 {
        if self.random.chance(1, 16) {
            return self.random.below(PAGES);
        }
        match table {
            0..2 => 2 + self.random.below(3),
            2..5 => 5 + self.random.below(3),
            5..LOWEST => LOWEST + self.random.below(TABLES - LOWEST),
            // Tables are memory, too.
            _ if self.random.chance(1, 3) => self.random.below(TABLES),
            _ => TABLES + self.random.below(PAGES - TABLES),
        }
    }

    /// Tables that lead somewhere.
    pub fn furnish(&mut self) {
        for table in 0..TABLES {
            for index in 0..if table < LOWEST { 2 } else { 4 } {
                let entry = self.some_target(table) << 12 | P | W | U | A | D;
                self.memory.0[(table * 512 + index) as usize].store(entry, Ordering::SeqCst);
            }
        }
    }

    /// The guest edits an entry: unseen where it can, else through the emulator.
    pub fn edit(&mut self) {
        let table = self.some_table();
        let index = self.random.below(4);
        let target = self.some_target(table);
        let mut entry = target << 12 | P;
        for (bit, chance) in [(W, 7), (U, 6), (A, 5), (D, 4)] {
            if self.random.chance(chance, 8) {
                entry |= bit;
            }
        }
        if self.random.chance(1, 8) {
            entry |= NX;
        }
        if self.random.chance(1, 6) {
            entry = 0;
        }
        let at = table * 4096 + index * 8;
        let unseen = self.is_writable(table);
        self.note(format!("{table}[{index}] = {entry:#x}, unseen: {unseen}"));
        self.memory.0[(at / 8) as usize].store(entry, Ordering::SeqCst);
        self.was_written(table);
        if !unseen {
            // The emulator wrote it.
            let page = GfnRange::from_len(Gfn::new(table), 1);
            let _ = self.notifier.mark_dirty(0, page).unwrap();
            let (lock, vcpu) = (&self.lock, &mut self.vcpu);
            lock.with(|writer| writer.guest_wrote(vcpu.actor(), Gpa::new(at), 8));
        }
        (0..GVAS).for_each(|number| self.remember(number));
    }

    /// The vCPU enters the guest: on a root that is good.
    pub fn enter(&mut self) {
        if !self.vcpu.root_is_current(&self.lock) {
            self.note("  the root went".to_owned());
            let root = Gfn::new(self.root);
            let loaded =
                self.vcpu.load_root(&self.lock, &self.guest, &self.memory, root, self.role);
            self.register = loaded.expect("memory").get();
            self.core.lock().unwrap().cpu.set_root(self.register);
        }
    }

    /// The guest accesses an address until it is through or has a fault of its own.
    pub fn access(&mut self, number: u64, kind: AccessKind, user: bool) {
        self.note(format!("{kind:?} {number}, user: {user}"));
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
            let reached = {
                let mut core = self.core.lock().unwrap();
                core.cpu.access(self.mmu.vm().host(), gva(number), access)
            };
            // What a fault was the guest's walk decides.
            if let Ok(pa) = reached {
                self.was_accessed(pa >> 12, kind);
                let (write, exec) = (kind == AccessKind::Write, kind == AccessKind::Fetch);
                return self.judge(number, &Meaning { gfn: pa >> 12, write, user, exec });
            }
            let root = GuestRoot::Cr3(self.root << 12);
            let walk = self.guest.walk(&self.memory, &root, Gva::new(gva(number)), request);
            (0..GVAS).for_each(|number| self.remember(number));
            let walk = match walk {
                Ok(walk) => walk,
                Err(WalkError::Fault(_)) => {
                    let now = meaning(&self.memory, self.root, gva(number));
                    if now.is_some_and(|now| now.gfn < PAGES && now.allows(kind, user)) {
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
                // The emulator writes, which this guest need not see done.
                Ok(FaultOutcome::WriteProtected) => return,
                Ok(FaultOutcome::Emulate(_)) if walk.path.gfn.get() >= PAGES => return,
                other => self.fail(&format!("{other:?}")),
            }
        }
        self.fail("eight faults, and no end");
    }

    /// The guest can reach, or reached, the host page `seen.gfn`: did its tables allow all of that,
    /// at some time since the last flush? Permissions of different times do not add up.
    pub fn judge(&mut self, number: u64, seen: &Meaning) {
        let allows = |meaning: &Meaning| {
            let page = self.backing.get(meaning.gfn as usize);
            page.is_some_and(|page| DATA + page.load(Ordering::Relaxed) == seen.gfn)
                && (meaning.write || !seen.write)
                && (meaning.user || !seen.user)
                && (meaning.exec || !seen.exec)
        };
        let known = &self.allowed[number as usize];
        if !known.iter().any(allows) {
            let known = known.clone();
            self.fail(&format!("address {number} reaches {seen:x?}, allowed is {known:x?}"));
        }
    }

    /// The guest just accessed a host page through the tables: the page behind it is young.
    pub fn was_accessed(&mut self, pfn: u64, kind: AccessKind) {
        let behind = |page: &AtomicU64| DATA + page.load(Ordering::Relaxed) == pfn;
        let Some(gfn) = self.backing.iter().position(behind) else { return };
        let gfn = gfn as u64;
        self.touched.insert(gfn);
        if kind == AccessKind::Write {
            self.was_written(gfn);
        }
        let mode = AgeMode::Test;
        let answer = self.mmu.age_gfn(&mut self.notifier, Gfn::new(gfn), mode, Effort::Full);
        if answer != AgeAnswer::Young {
            self.fail(&format!("page {gfn} was accessed and is {answer:?}"));
        }
    }

    pub fn was_written(&mut self, gfn: u64) {
        if let Some(written) = &mut self.written {
            written.insert(gfn);
        }
    }

    /// Log writes from now on.
    pub fn log(&mut self) {
        self.note("log".to_owned());
        let vm = Arc::clone(self.mmu.vm());
        let request = slot(SlotFlags::LOG_DIRTY);
        let _ = vm.set_slot(&mut self.slots, &mut self.notifier, &request, |_, _| {}).unwrap();
        let memslot = *vm.slots().read(&self.notifier.pinned().section).by_id(0, 0).unwrap();
        self.mmu.log_enabled(&mut self.notifier, &self.lock, &memslot);
        self.written = Some(BTreeSet::new());
    }

    /// INVARIANT[I9]: every page written since the last harvest is reported, and no page can be
    /// written after it without being reported by the next.
    pub fn harvest(&mut self) {
        let Some(written) = &mut self.written else { return };
        let written = std::mem::take(written);
        let mut words = [0];
        let mmu = Arc::clone(&self.mmu);
        let dirty = mmu.harvest_log(&mut self.notifier, &self.lock, 0, 0, &mut words).unwrap();
        self.note(format!("harvest {:#x}", words[0]));
        assert_eq!(dirty, u64::from(words[0].count_ones()));
        if let Some(lost) = written.iter().find(|gfn| words[0] >> **gfn & 1 == 0) {
            self.fail(&format!("page {lost} was written and is not reported"));
        }
        let writable = (0..PAGES).find(|gfn| self.is_writable(*gfn));
        if let Some(gfn) = writable {
            self.fail(&format!("page {gfn} is writable after the harvest"));
        }
    }

    /// Nothing is young that was not accessed (INVARIANT[I21]); then everything is old.
    pub fn age(&mut self) {
        let all = GfnRange::from_len(Gfn::new(0), PAGES);
        let (mut young, mut unknown) = ([0], []);
        let test = AgeRequest::new(all, AgeMode::Test);
        let report = self.mmu.age_bitmap(&mut self.notifier, test, &mut young, &mut unknown);
        assert_eq!(report.next, all.end);
        let wrong = (0..PAGES).find(|gfn| young[0] >> gfn & 1 != 0 && !self.touched.contains(gfn));
        if let Some(gfn) = wrong {
            self.fail(&format!("page {gfn} is young and was not accessed"));
        }
        self.note("age all".to_owned());
        let clear = AgeRequest::new(all, AgeMode::ClearFlush);
        let cleared = self.mmu.age(&mut self.notifier, clear, &mut CountOnly);
        assert_eq!((cleared.mapped, cleared.young), (report.mapped, report.young));
        if self.mmu.test_age(&mut self.notifier, all) == AgeAnswer::Young {
            self.fail("a page is young that was just aged");
        }
        self.touched.clear();
    }

    /// The host takes a page back and gives another.
    pub fn take_back(&mut self) {
        let gfn = self.random.below(PAGES);
        self.note(format!("host takes {gfn}"));
        let range = GfnRange::from_len(Gfn::new(gfn), 1);
        let vm = Arc::clone(self.mmu.vm());
        let invalidation = vm.notify().begin(self.notifier.participant(), range);
        let place = &self.backing[gfn as usize];
        place.store(place.load(Ordering::SeqCst) + PAGES, Ordering::SeqCst);
        let _ = self.mmu.unmap_in(&mut self.notifier, &self.lock, &invalidation, range);
        drop(invalidation);
    }

    /// Every page becomes obsolete at once; taken apart a bit at a time.
    pub fn drop_everything(&mut self) {
        self.note("drop everything".to_owned());
        let (lock, actor) = (&self.lock, &mut self.notifier);
        lock.with(|writer| {
            writer.invalidate_all(actor);
            let _ = writer.zap_obsolete(actor);
        });
    }

    /// The emulator cannot do a write to a table: its shadows are given up.
    pub fn unprotect(&mut self) {
        let gfn = Gfn::new(self.random.below(TABLES));
        let mut retry = WriteRetry::new();
        let (lock, actor) = (&self.lock, &mut self.notifier);
        let first = lock.with(|writer| retry.cannot_emulate(writer, actor, 0x1000, gfn));
        let second = lock.with(|writer| retry.cannot_emulate(writer, actor, 0x1000, gfn));
        self.note(format!("unprotect {gfn}: {first:?}"));
        assert_eq!(second, OnWriteProtected::Emulate, "the same write, not tried for ever");
    }

    /// INVARIANT[I20]: no address permits more than the guest's tables have since its flush.
    pub fn check(&mut self) {
        self.enter();
        for number in 0..GVAS {
            let Some(found) = self.shadow(number) else { continue };
            let seen = Meaning {
                gfn: found.pa >> 12,
                write: found.writable(),
                user: found.user(),
                exec: found.executable(),
            };
            self.judge(number, &seen);
        }
        self.looks += 1;
        if self.looks % 16 != 0 {
            return;
        }
        // INVARIANT[I15], INVARIANT[I16], INVARIANT[I17], INVARIANT[I18]: the writer's own books.
        let (lock, actor) = (&self.lock, &mut self.notifier);
        let flaw = lock.with(|writer| writer.check(actor)).err();
        if let Some(flaw) = flaw {
            self.fail(&format!("{flaw}"));
        }
    }

    pub fn step(&mut self) {
        let number = self.random.below(GVAS);
        match self.random.below(100) {
            0..40 => self.edit(),
            40..85 => {
                let kind = match self.random.below(5) {
                    0..2 => AccessKind::Read,
                    2..4 => AccessKind::Write,
                    _ => AccessKind::Fetch,
                };
                let user = self.random.chance(1, 2);
                self.access(number, kind, user);
            }
            85..93 => self.invlpg(number),
            93..97 => {
                let root = self.random.below(2);
                self.load_cr3(root);
            }
            97 => self.take_back(),
            98 => match self.random.below(4) {
                0 => self.age(),
                1 => self.harvest(),
                2 => self.drop_everything(),
                _ => self.unprotect(),
            },
            _ => {
                self.note("flush".to_owned());
                self.vcpu.guest_flushed(&self.lock, &self.guest, &self.memory);
                self.core.lock().unwrap().cpu.flush_all();
                self.forget();
            }
        }
    }

    pub fn finish(mut self) {
        self.vcpu.drop_roots(&self.lock);
        let live = {
            let (lock, actor) = (&self.lock, &mut self.notifier);
            lock.with(|writer| {
                while writer.zap_obsolete(actor) {}
                let _ = writer.shrink(actor, u32::MAX);
                writer.live_pages()
            })
        };
        assert_eq!(live, 0, "seed {}: pages left", self.seed);
        let vm = Arc::clone(self.mmu.vm());
        for gauge in [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G, Counter::Tables] {
            assert_eq!(vm.stats().get(gauge), 0, "seed {}: {}", self.seed, gauge.name());
        }
        drop((self.vcpu, self.notifier));
        assert_eq!(vm.pool().frames_in_use(), 0, "seed {}: frames in use", self.seed);
    }
}
