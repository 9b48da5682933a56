//! A small guest: four levels, pages of 4 KiB, forty frames and thirty-two addresses, all of them
//! looked at after every step.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mmu_core::addr::{Gfn, GfnRange, Gva, Level, Pfn};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::{Capabilities, Legacy};
use mmu_core::traits::{AgeAnswer, AgeMode, AgeRange, AgeRequest, CountOnly, HostPage};
use mmu_model::AccessKind;
use shadow_mmu::guest::{
    GuestControls, GuestCpu, GuestRoot, GuestWalker, Privilege, Request, WalkError,
};
use shadow_mmu::{OnWriteProtected, PageRole, ReclaimPolicy, RoleFlags, WriteRetry, WriterLock};

use super::memory::Memory;
use super::rig::{Machine, Rig, operation, some_kind};
use super::{A, D, FRAME, NX, P, U, W};
use crate::common::DATA;

/// Guest memory in pages.
pub const PAGES: u64 = 40;
/// The first of them are tables: two top tables, then those below.
pub const TABLES: u64 = 14;
/// The first table of the lowest level.
pub const LOWEST: u64 = 8;
/// Two indices at each level above the lowest, four there.
pub const GVAS: u64 = 2 * 2 * 2 * 4;

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
        let index = gva >> (12 + 9 * (level - 1)) & 511;
        let entry = memory.get(at * 4096 + index * 8, 8)?;
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

pub struct World {
    pub rig: Rig<Legacy>,
    pub memory: Memory,
    /// Host page of each guest page, as an offset from `DATA`; changes when the host takes one
    /// back.
    pub backing: Arc<Vec<AtomicU64>>,
    pub guest: GuestWalker,
    pub role: PageRole,
    /// Gfn of the guest's top table.
    pub root: u64,
    /// Guest pages accessed since all were aged with a flush.
    pub touched: BTreeSet<u64>,
    /// What each address meant since its last flush.
    pub allowed: Vec<Vec<Meaning>>,
}

impl World {
    pub fn new(seed: u64, quota: u32, policy: ReclaimPolicy) -> Self {
        Self::on(Machine::default(), seed, quota, policy)
    }

    pub fn on(machine: Machine, seed: u64, quota: u32, policy: ReclaimPolicy) -> Self {
        let backing: Arc<Vec<AtomicU64>> = Arc::new((0..PAGES).map(AtomicU64::new).collect());
        let pages = Arc::clone(&backing);
        let resolve = move |gfn: u64| {
            let pfn = Pfn::new(DATA + pages.get(gfn as usize)?.load(Ordering::SeqCst));
            Some(HostPage { pfn, writable: true, level: Level::L1 })
        };
        let controls =
            GuestControls::PG | GuestControls::PAE | GuestControls::LME | GuestControls::NXE;
        let cpu = GuestCpu { gbpages: false, ..GuestCpu::baseline() };
        Self {
            rig: Rig::new(machine, seed, Capabilities::legacy(), quota, policy, PAGES, resolve),
            memory: Memory::new(PAGES, PAGES),
            backing,
            guest: GuestWalker::new(&cpu, controls).unwrap(),
            role: PageRole::new(Level::L4, RoleFlags::NX | RoleFlags::WP),
            root: 0,
            touched: BTreeSet::new(),
            allowed: vec![Vec::new(); GVAS as usize],
        }
    }

    /// The guest loads CR3, which flushes everything.
    pub fn load_cr3(&mut self, root: u64) {
        self.root = root;
        self.rig.note(format!("cr3 = {root}"));
        self.enter_anew();
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
        self.rig.note(format!("invlpg {number}"));
        let address = Gva::new(gva(number));
        self.rig.vcpu.guest_invalidated(&self.rig.lock, &self.guest, &self.memory, address);
        self.rig.core.lock().unwrap().cpu.flush_address(address.get());
        self.allowed[number as usize].clear();
        self.remember(number);
    }

    /// What the shadow tables say about an address, to somebody who only looks.
    pub fn shadow(&self, number: u64) -> Option<mmu_model::Translation> {
        self.rig.shadow(gva(number), mmu_model::Access::supervisor(AccessKind::Read))
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
        match self.rig.random.below(20) {
            0 => self.rig.random.below(2),
            1 => 2 + self.rig.random.below(3),
            2..4 => 5 + self.rig.random.below(3),
            _ => LOWEST + self.rig.random.below(TABLES - LOWEST),
        }
    }

    /// What an entry of `table` may lead to: mostly a table of the level below, sometimes anything.
    pub fn some_target(&mut self, table: u64) -> u64 {
        if self.rig.random.chance(1, 16) {
            return self.rig.random.below(PAGES);
        }
        match table {
            0..2 => 2 + self.rig.random.below(3),
            2..5 => 5 + self.rig.random.below(3),
            5..LOWEST => LOWEST + self.rig.random.below(TABLES - LOWEST),
            // Tables are memory, too.
            _ if self.rig.random.chance(1, 3) => self.rig.random.below(TABLES),
            _ => TABLES + self.rig.random.below(PAGES - TABLES),
        }
    }

    /// Tables that lead somewhere.
    pub fn furnish(&mut self) {
        for table in 0..TABLES {
            for index in 0..if table < LOWEST { 2 } else { 4 } {
                let entry = self.some_target(table) << 12 | P | W | U | A | D;
                self.memory.set(table * 4096 + index * 8, 8, entry);
            }
        }
    }

    /// The guest edits an entry: unseen where it can, else through the emulator.
    pub fn edit(&mut self) {
        let table = self.some_table();
        let index = self.rig.random.below(4);
        let target = self.some_target(table);
        let mut entry = target << 12 | P;
        for (bit, chance) in [(W, 7), (U, 6), (A, 5), (D, 4)] {
            if self.rig.random.chance(chance, 8) {
                entry |= bit;
            }
        }
        if self.rig.random.chance(1, 8) {
            entry |= NX;
        }
        if self.rig.random.chance(1, 6) {
            entry = 0;
        }
        let at = table * 4096 + index * 8;
        let unseen = self.is_writable(table);
        self.rig.note(format!("{table}[{index}] = {entry:#x}, unseen: {unseen}"));
        self.memory.set(at, 8, entry);
        self.rig.table_written(table, at, 8, unseen);
        (0..GVAS).for_each(|number| self.remember(number));
    }

    /// Take the root that is loaded once more.
    fn enter_anew(&mut self) {
        let (rig, root) = (&mut self.rig, Gfn::new(self.root));
        let loaded = rig.vcpu.load_root(&rig.lock, &self.guest, &self.memory, root, self.role);
        rig.set_register(loaded.expect("memory"));
    }

    /// The vCPU enters the guest: on a root that is good.
    pub fn enter(&mut self) {
        if !self.rig.vcpu.root_is_current() {
            self.rig.note("  the root went".to_owned());
            self.enter_anew();
        }
    }

    /// The guest accesses an address until it is through or has a fault of its own.
    pub fn access(&mut self, number: u64, kind: AccessKind, user: bool) {
        self.rig.note(format!("{kind:?} {number}, user: {user}"));
        let access =
            if user { mmu_model::Access::user(kind) } else { mmu_model::Access::supervisor(kind) };
        let privilege = if user { Privilege::User } else { Privilege::Supervisor };
        let request = Request::new(operation(kind), privilege);
        for _ in 0..8 {
            self.enter();
            // What a fault was the guest's walk decides.
            if let Some(pfn) = self.rig.reach(gva(number), access) {
                self.was_accessed(pfn, kind);
                let (write, exec) = (kind == AccessKind::Write, kind == AccessKind::Fetch);
                return self.judge(number, &Meaning { gfn: pfn, write, user, exec });
            }
            let root = GuestRoot::Cr3(self.root << 12);
            let walk = self.guest.walk(&self.memory, &root, Gva::new(gva(number)), request);
            (0..GVAS).for_each(|number| self.remember(number));
            let walk = match walk {
                Ok(walk) => walk,
                Err(WalkError::Fault(_)) => {
                    let now = meaning(&self.memory, self.root, gva(number));
                    if now.is_some_and(|now| now.gfn < PAGES && now.allows(kind, user)) {
                        self.rig.fail(&format!("the guest had a fault and {now:?}"));
                    }
                    return;
                }
                Err(error) => self.rig.fail(&format!("{error}")),
            };
            let outcome =
                self.rig.vcpu.fault(&self.rig.lock, &self.guest, &self.memory, &walk, request);
            self.rig.note(format!("  {outcome:?}: gfn {} {:?}", walk.path.gfn, walk.path.access));
            match outcome {
                Ok(FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry) => {}
                // The emulator writes, which this guest need not see done.
                Ok(FaultOutcome::WriteProtected) => return,
                Ok(FaultOutcome::Emulate(_)) if walk.path.gfn.get() >= PAGES => return,
                other => self.rig.fail(&format!("{other:?}")),
            }
        }
        self.rig.fail("eight faults, and no end");
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
            self.rig.fail(&format!("address {number} reaches {seen:x?}, allowed is {known:x?}"));
        }
    }

    /// The guest just accessed a host page through the tables: the page behind it is young.
    pub fn was_accessed(&mut self, pfn: u64, kind: AccessKind) {
        let behind = |page: &AtomicU64| DATA + page.load(Ordering::Relaxed) == pfn;
        let Some(gfn) = self.backing.iter().position(behind) else { return };
        self.touched.insert(gfn as u64);
        self.rig.was_accessed(gfn as u64, kind);
    }

    /// As [`Rig::harvest`], and no page can be written after it without being reported by the next.
    pub fn harvest(&mut self) {
        if !self.rig.harvest() {
            return;
        }
        let writable = (0..PAGES).find(|gfn| self.is_writable(*gfn));
        if let Some(gfn) = writable {
            self.rig.fail(&format!("page {gfn} is writable after the harvest"));
        }
    }

    /// Nothing is young that was not accessed (INVARIANT[I21]); then everything is old.
    pub fn age(&mut self) {
        let all = GfnRange::from_len(Gfn::new(0), PAGES);
        let (mut young, mut unknown) = ([0], []);
        let test = AgeRequest::new(all, AgeMode::Test);
        let report =
            self.rig.mmu.age_bitmap(&mut self.rig.notifier, test, &mut young, &mut unknown);
        assert_eq!(report.next, all.end);
        let wrong = (0..PAGES).find(|gfn| young[0] >> gfn & 1 != 0 && !self.touched.contains(gfn));
        if let Some(gfn) = wrong {
            self.rig.fail(&format!("page {gfn} is young and was not accessed"));
        }
        self.rig.note("age all".to_owned());
        let clear = AgeRequest::new(all, AgeMode::ClearFlush);
        let cleared = self.rig.mmu.age(&mut self.rig.notifier, clear, &mut CountOnly);
        assert_eq!((cleared.mapped, cleared.young), (report.mapped, report.young));
        if self.rig.mmu.test_age(&mut self.rig.notifier, all) == AgeAnswer::Young {
            self.rig.fail("a page is young that was just aged");
        }
        self.touched.clear();
    }

    /// The host takes a page back and gives another.
    pub fn take_back(&mut self) {
        let gfn = self.rig.random.below(PAGES);
        let place = &self.backing[gfn as usize];
        self.rig.take_back(GfnRange::from_len(Gfn::new(gfn), 1), |_| {
            place.store(place.load(Ordering::SeqCst) + PAGES, Ordering::SeqCst);
        });
    }

    /// The emulator cannot do a write to a table: its shadows are given up.
    pub fn unprotect(&mut self) {
        let gfn = Gfn::new(self.rig.random.below(TABLES));
        let mut retry = WriteRetry::new();
        let (lock, actor) = (&self.rig.lock, &mut self.rig.notifier);
        let first = lock.with(|writer| retry.cannot_emulate(writer, actor, 0x1000, gfn));
        let second = lock.with(|writer| retry.cannot_emulate(writer, actor, 0x1000, gfn));
        self.rig.note(format!("unprotect {gfn}: {first:?}"));
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
        self.rig.check_books();
    }

    pub fn step(&mut self) {
        let number = self.rig.random.below(GVAS);
        match self.rig.random.below(100) {
            0..40 => self.edit(),
            40..85 => {
                let kind = some_kind(&mut self.rig.random);
                let user = self.rig.random.chance(1, 2);
                self.access(number, kind, user);
            }
            85..93 => self.invlpg(number),
            93..97 => {
                let root = self.rig.random.below(2);
                self.load_cr3(root);
            }
            97 => self.take_back(),
            98 => match self.rig.random.below(4) {
                0 => self.age(),
                1 => self.harvest(),
                2 => self.rig.drop_everything(),
                _ => self.unprotect(),
            },
            _ => {
                self.rig.note("flush".to_owned());
                self.rig.vcpu.guest_flushed(&self.rig.lock, &self.guest, &self.memory);
                self.rig.core.lock().unwrap().cpu.flush_all();
                self.forget();
            }
        }
    }

    pub fn finish(self) {
        self.rig.finish();
    }
}
