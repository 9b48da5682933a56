//! A guest in any of its modes, or a nested one: tables of every level and width, pages of 2 MiB, 4
//! MiB and 1 GiB, and memory that the host backs by small and by huge pages.
//!
//! What its tables mean a [`Guest`] says, walked by hand: masks, indices and reserved bits are
//! written down here once more. Addresses are linear, or a nested guest's physical ones.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use mmu_core::addr::{Gfn, GfnRange, Hpa};
use mmu_core::fault::{EmulateReason, FaultOutcome};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::Capabilities;
use mmu_model::{Access, AccessKind, Random, Translation};
use shadow_mmu::guest::WalkPath;
use shadow_mmu::{ReclaimPolicy, ShadowCount, ShadowError};

use super::memory::{Backing, Memory};
use super::rig::{Machine, Rig, some_kind};
use super::{PS, bits};
use crate::common::Modelled;

/// Guest memory: four blocks of 2 MiB.
pub const PAGES: u64 = BLOCKS * 512;
pub const BLOCKS: u64 = 4;
/// The first frames are tables. Others hold nothing but zeros.
pub const TABLES: u64 = 20;
/// Physical address bits of guest and host.
pub const PHYS: u32 = 46;

/// Tables that are mostly used at a level.
pub fn tables_of(level: u32) -> Range<u64> {
    match level {
        1 => 0..6,
        2 => 6..10,
        3 => 10..13,
        4 => 13..16,
        _ => 16..19,
    }
}

/// What an entry of a table at `level` may lead to.
pub fn some_target(random: &mut Random, level: u32) -> u64 {
    if random.chance(1, 24) {
        return random.below(PAGES + 100);
    }
    if level > 1 {
        let below = tables_of(level - 1);
        return below.start + random.below(below.end - below.start);
    }
    if random.chance(1, 4) {
        random.below(TABLES)
    } else {
        random.below(BLOCKS) * 512 + TABLES + random.below(4)
    }
}

/// The address in an entry at `level`, whose pages have `shift` bits: of a large page where those
/// exist, every other time.
pub fn some_address(random: &mut Random, level: u32, shift: u32, large: bool) -> u64 {
    if large && random.chance(1, 2) {
        let pages = 1 << (shift - 12);
        let block = random.below((PAGES / pages).max(1));
        return (block * pages) << 12 | PS;
    }
    some_target(random, level) << 12
}

/// All addresses whose index at each level up to `top` is in use.
pub fn all_addresses<'a>(
    top: u32,
    indices: impl Fn(u32) -> &'a [u64],
    shift: impl Fn(u32) -> u32,
) -> Vec<u64> {
    (1..=top).fold(vec![0], |all, level| {
        let with = |low: &u64| {
            let (low, shift) = (*low, shift(level));
            indices(level).iter().map(move |index| low | index << shift)
        };
        all.iter().flat_map(with).collect()
    })
}

/// What an address means, by the guest's tables; or what was seen of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meaning {
    pub gfn: u64,
    pub read: bool,
    pub write: bool,
    pub user: bool,
    pub exec: bool,
    /// Written: only then may a write go unseen.
    pub dirty: bool,
    /// Level of the guest's page.
    pub level: u32,
}

impl Meaning {
    fn allows(&self, kind: AccessKind, user: bool) -> bool {
        let kind = match kind {
            AccessKind::Read => self.read,
            AccessKind::Write => self.write,
            AccessKind::Fetch => self.exec,
        };
        kind && (self.user || !user)
    }
}

/// What an entry permits.
#[derive(Clone, Copy, Debug)]
pub struct Permits {
    pub read: bool,
    pub write: bool,
    pub user: bool,
    pub exec: bool,
}

/// Where a walk by hand begins.
pub enum Start {
    /// Every access is a fault.
    Nowhere,
    /// Addresses are physical.
    NoPaging,
    /// A table, as an entry holds it.
    Table(u64),
}

/// A kind of guest: its tables, and how its vCPU is asked.
pub trait Guest: Debug {
    /// Format of the shadow tables.
    type Format: Modelled;
    /// A walk of its own walker, with what was asked.
    type Walk;
    /// Has it single addresses to invalidate?
    const INVALIDATES: bool;

    /// Levels of tables; 0 without paging.
    fn top(&self) -> u32;
    fn bytes(&self) -> u64;
    fn shift(&self, level: u32) -> u32;
    fn index(&self, address: u64, level: u32) -> u64;
    fn has_pages(&self, level: u32) -> bool;
    /// Indices in use.
    fn indices(&self, level: u32) -> &'static [u64];
    /// The addresses that are looked at.
    fn addresses(&self) -> Vec<u64>;
    fn start(&self, address: u64) -> Start;
    /// `None` for a fault.
    fn decode(&self, entry: u64, level: u32, page: bool) -> Option<Permits>;
    /// Was the page of a leaf written, or does nobody keep track?
    fn is_dirty(&self, leaf: u64) -> bool;
    /// Any entry for a table at `level`; often one that leads on.
    fn some_entry(&self, random: &mut Random, level: u32) -> u64;
    /// Is the next access a user's?
    fn some_user(&self, random: &mut Random) -> bool;
    /// Somebody only looks at the shadow tables.
    fn look(&self) -> Access;

    /// The address that it has for a number of 64 bits.
    fn address(&self, any: u64) -> u64;

    /// Choose a root; the bytes of memory that were written for it.
    fn load(&mut self, random: &mut Random, memory: &Memory) -> Range<u64>;
    /// Choose one out of all that a register can hold; `false` where memory holds it.
    fn load_any(&mut self, any: u64) -> bool;
    /// Change its mode, on shadow tables of `levels`; `false` if it has no other.
    fn switch(&mut self, random: &mut Random, levels: u8) -> bool;

    /// Load the shadow of the root.
    fn enter(&self, rig: &mut Rig<Self::Format>, memory: &Memory) -> Result<Hpa, ShadowError>;
    /// `None` if the guest has a fault of its own; what a guest does not get is an error.
    fn walk(
        &self,
        memory: &Memory,
        address: u64,
        kind: AccessKind,
        user: bool,
    ) -> Result<Option<Self::Walk>, String>;
    fn path<'a>(&self, walk: &'a Self::Walk) -> &'a WalkPath;
    fn fault(
        &self,
        rig: &mut Rig<Self::Format>,
        memory: &Memory,
        walk: &Self::Walk,
    ) -> Result<FaultOutcome, ShadowError>;
    /// Is this the answer to an address outside guest memory?
    fn is_outside(&self, error: &ShadowError) -> bool;
    fn invalidate(&self, rig: &mut Rig<Self::Format>, memory: &Memory, address: u64);
    fn flush(&self, rig: &mut Rig<Self::Format>, memory: &Memory);
    /// The guest has got a fault of its own. Does that invalidate the address?
    fn fault_invalidates(&self) -> bool;
}

/// What a run saw, so that a test knows that it tested something.
#[derive(Debug, Default)]
pub struct Seen {
    /// Accesses that reached memory, by level of the guest's page.
    pub reached: [u64; 4],
    /// Of these by huge guest pages, through small and huge entries.
    pub small: u64,
    pub huge: u64,
    pub floods: u64,
    pub unsyncs: u64,
}

impl Seen {
    fn add(&mut self, one: &Self) {
        for (sum, one) in self.reached.iter_mut().zip(one.reached) {
            *sum += one;
        }
        self.small += one.small;
        self.huge += one.huge;
        self.floods += one.floods;
        self.unsyncs += one.unsyncs;
    }
}

pub struct World<G: Guest> {
    pub rig: Rig<G::Format>,
    pub guest: G,
    pub memory: Memory,
    pub backing: Arc<Backing>,
    backings: u64,
    /// Numbers of others that are looked at as well.
    pub extra: Vec<u64>,
    pub addresses: Vec<u64>,
    allowed: Vec<Vec<Meaning>>,
    /// Guest pages accessed since they were aged with a flush.
    pub touched: BTreeSet<u64>,
    /// A walk that its vCPU has not asked about yet.
    pub kept: Option<G::Walk>,
    seen: Seen,
}

impl<G: Guest> World<G> {
    pub fn new(seed: u64, caps: Capabilities, guest: G, quota: u32, policy: ReclaimPolicy) -> Self {
        let backing = Arc::new(Backing::new(BLOCKS));
        let pages = Arc::clone(&backing);
        let caps = Capabilities { max_phys_bits: PHYS as u8, ..caps };
        let machine = Machine::default();
        let mut world = Self {
            rig: Rig::new(machine, seed, caps, quota, policy, PAGES, move |gfn| pages.page(gfn)),
            extra: Vec::new(),
            addresses: guest.addresses(),
            guest,
            memory: Memory::new(PAGES, TABLES),
            backing,
            backings: 0,
            allowed: Vec::new(),
            touched: BTreeSet::new(),
            kept: None,
            seen: Seen::default(),
        };
        (0..BLOCKS).for_each(|block| world.back(block));
        world
    }

    /// Two thousand steps, writes logged for the last five hundred; what was seen goes into `sum`.
    pub fn run(mut self, sum: &mut Seen) {
        self.load();
        for step in 0..2_000 {
            if step == 1_500 {
                self.rig.log();
            }
            self.step();
            self.check();
        }
        let stats = self.rig.stats();
        (self.seen.floods, self.seen.unsyncs) = (stats.floods, stats.unsyncs);
        sum.add(&self.seen);
        self.finish();
    }

    /// Another host page behind a block.
    pub fn back(&mut self, block: u64) {
        self.backings += 1;
        let huge = self.rig.random.chance(1, 2);
        self.backing.set(block, self.backings, huge);
    }

    /// The guest's tables, walked by hand; `None` where every access is a fault.
    fn meaning(&self, address: u64) -> Option<Meaning> {
        let guest = &self.guest;
        let (read, write, user, exec, dirty) = (true, true, true, true, true);
        let mut found = Meaning { gfn: address >> 12, read, write, user, exec, dirty, level: 2 };
        let mut table = match guest.start(address) {
            Start::Nowhere => return None,
            Start::NoPaging => return Some(found),
            Start::Table(table) => table,
        };
        for level in (1..=guest.top()).rev() {
            let at = (table & bits(12, 51)) + guest.index(address, level) * guest.bytes();
            let entry = self.memory.get(at, guest.bytes())?;
            let page = level == 1 || (entry & PS != 0 && guest.has_pages(level));
            let permits = guest.decode(entry, level, page)?;
            found.read &= permits.read;
            found.write &= permits.write;
            found.user &= permits.user;
            found.exec &= permits.exec;
            if page {
                let inside = (1 << guest.shift(level)) - 1;
                found.gfn = (entry & bits(12, 51) & !inside | address & inside) >> 12;
                found.level = level;
                found.dirty = guest.is_dirty(entry);
                return Some(found);
            }
            table = entry;
        }
        unreachable!("level 1 maps a page")
    }

    /// The guest loads a root, which flushes everything.
    pub fn load(&mut self) {
        let written = self.guest.load(&mut self.rig.random, &self.memory);
        self.rig.note(format!("load {:x?}", self.guest));
        if !written.is_empty() {
            let bytes = written.end - written.start;
            self.rig.table_written(written.start >> 12, written.start, bytes, false);
        }
        self.enter_anew();
        self.forget();
    }

    /// The guest is in another mode, or has another root; everything was flushed.
    pub fn switched(&mut self) {
        self.list_addresses();
        self.enter_anew();
        self.forget();
    }

    /// In the guest's present mode.
    pub fn list_addresses(&mut self) {
        self.addresses = self.guest.addresses();
        for any in &self.extra {
            let address = self.guest.address(*any);
            if !self.addresses.contains(&address) {
                self.addresses.push(address);
            }
        }
    }

    pub fn enter_anew(&mut self) {
        let before = self.rig.refuses().then(|| self.picture());
        let root = match self.guest.enter(&mut self.rig, &self.memory) {
            Err(error) if self.rig.ran_out(&error) => {
                assert_eq!(before, Some(self.picture()), "{error}, and something changed");
                self.guest.enter(&mut self.rig, &self.memory)
            }
            entered => entered,
        };
        self.rig.set_register(root.expect("memory"));
    }

    /// All that a call which fails leaves as it was.
    pub fn picture(&mut self) -> (Vec<Option<Translation>>, ShadowCount) {
        (self.all_shadows(), self.rig.check_books_now())
    }

    /// What every address leads to.
    pub fn all_shadows(&self) -> Vec<Option<Translation>> {
        (0..self.addresses.len()).map(|number| self.shadow(number)).collect()
    }

    pub fn enter(&mut self) {
        if !self.rig.vcpu.root_is_current() {
            self.rig.note("  the root went".to_owned());
            self.enter_anew();
        }
    }

    pub fn forget(&mut self) {
        self.allowed = vec![Vec::new(); self.addresses.len()];
        self.remember_all();
    }

    pub fn remember_all(&mut self) {
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

    pub fn invalidate(&mut self, number: usize) {
        let address = self.addresses[number];
        self.rig.note(format!("invalidate {address:#x}"));
        self.guest.invalidate(&mut self.rig, &self.memory, address);
        // The processor drops the whole page's entries: with 4 KiB entries of a large page of the
        // guest in its TLB, all of them, as an embedder must.
        self.rig.core.lock().unwrap().cpu.flush_address(address);
        self.allowed[number].clear();
        self.remember(number);
    }

    pub fn shadow(&self, number: usize) -> Option<Translation> {
        self.rig.shadow(self.addresses[number], self.guest.look())
    }

    /// Can the guest write to the frame unseen, through any address?
    pub fn is_writable(&self, gfn: u64) -> bool {
        let host = self.backing.pfn(gfn);
        (0..self.addresses.len())
            .filter_map(|number| self.shadow(number))
            .any(|found| found.writable() && Some(found.pa >> 12) == host)
    }

    /// The guest edits an entry: unseen where it can, else through the emulator.
    pub fn edit(&mut self) {
        let (guest, random) = (&self.guest, &mut self.rig.random);
        if guest.top() == 0 {
            return;
        }
        let level = match random.below(8) {
            0 => 1 + random.below(u64::from(guest.top())) as u32,
            1..4 => 2,
            _ => 1,
        };
        let tables = tables_of(level);
        let table = tables.start + random.below(tables.end - tables.start);
        let indices = guest.indices(level);
        let index = indices[random.below(indices.len() as u64) as usize];
        let entry = guest.some_entry(random, level);
        let bytes = guest.bytes();
        let at = table * 4096 + index * bytes;
        self.rig.note(format!("{table}[{index}] = {entry:#x}, level {level}"));
        self.write(at, bytes, entry);
    }

    /// The guest writes to one of its tables: unseen where it can, else through the emulator.
    pub fn write(&mut self, at: u64, bytes: u64, value: u64) {
        let table = at >> 12;
        let unseen = self.is_writable(table);
        if unseen {
            self.rig.note("  unseen".to_owned());
        }
        self.memory.set(at, bytes, value);
        self.rig.table_written(table, at, bytes, unseen);
        self.remember_all();
    }

    /// The guest accesses an address until it is through or has a fault of its own.
    pub fn access(&mut self, number: usize, kind: AccessKind, user: bool) {
        let address = self.addresses[number];
        self.rig.note(format!("{kind:?} {address:#x}, user: {user}"));
        let access = if user { Access::user(kind) } else { Access::supervisor(kind) };
        for _ in 0..8 {
            self.enter();
            if let Some(pfn) = self.rig.reach(address, access) {
                return self.reached(number, pfn, kind, user);
            }
            let walk = self.guest.walk(&self.memory, address, kind, user);
            self.remember_all();
            let Some(walk) = walk.unwrap_or_else(|error| self.rig.fail(&error)) else {
                if let Some(now) = self.meaning(address).filter(|now| now.allows(kind, user)) {
                    self.rig.fail(&format!("the guest had a fault and {now:?}"));
                }
                if self.guest.fault_invalidates() {
                    self.invalidate(number);
                }
                return;
            };
            let before = self.rig.refuses().then(|| self.picture());
            let outcome = self.guest.fault(&mut self.rig, &self.memory, &walk);
            let (gfn, access) = (self.guest.path(&walk).gfn, self.guest.path(&walk).access);
            self.rig.note(format!("  {outcome:?}: gfn {gfn} {access:?}"));
            match outcome {
                Ok(FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry) => {
                    self.touched.insert(gfn.get());
                }
                Ok(FaultOutcome::WriteProtected) => return,
                Ok(FaultOutcome::Emulate(_)) if gfn.get() >= PAGES => return,
                Ok(FaultOutcome::Emulate(why)) if self.explains(why, kind) => return,
                Err(error) if self.guest.is_outside(&error) => return,
                Err(error) if self.rig.ran_out(&error) => {
                    assert_eq!(before, Some(self.picture()), "{error}, and something changed");
                }
                other => self.rig.fail(&format!("{other:?}")),
            }
        }
        self.rig.fail("eight faults, and no end");
    }

    /// Is that why an access is emulated?
    pub fn explains(&self, why: EmulateReason, kind: AccessKind) -> bool {
        match why {
            EmulateReason::NoSlot { .. } => self.rig.slot.is_none(),
            EmulateReason::ReadOnly { .. } => {
                let read_only = |flags: SlotFlags| flags.contains(SlotFlags::READ_ONLY);
                self.rig.slot.is_some_and(read_only) && kind == AccessKind::Write
            }
            _ => false,
        }
    }

    fn reached(&mut self, number: usize, pfn: u64, kind: AccessKind, user: bool) {
        let (read, write) = (kind == AccessKind::Read, kind == AccessKind::Write);
        let exec = kind == AccessKind::Fetch;
        let seen = Meaning { gfn: pfn, read, write, user, exec, dirty: true, level: 0 };
        let gfn = self.judge(number, &seen);
        self.touched.insert(gfn);
        self.rig.was_accessed(gfn, kind);
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
                && (meaning.read || !seen.read)
                && (meaning.write && meaning.dirty || !seen.write)
                && (meaning.user || !seen.user)
                && (meaning.exec || !seen.exec)
        };
        let known = &self.allowed[number];
        let Some(found) = known.iter().find(allows) else {
            let address = self.addresses[number];
            self.rig.fail(&format!("{address:#x} reaches {seen:x?}, allowed is {known:x?}"));
        };
        if seen.write && !self.rig.may_write(found.gfn) {
            self.rig.fail(&format!("page {} is written unseen", found.gfn));
        }
        found.gfn
    }

    pub fn harvest(&mut self) {
        if self.rig.harvest()
            && (0..self.addresses.len()).any(|n| self.shadow(n).is_some_and(|s| s.writable()))
        {
            self.rig.fail("a page is writable after the harvest");
        }
    }

    /// The host takes a block back and gives another, of any size.
    pub fn take_back(&mut self) {
        let block = self.rig.random.below(BLOCKS);
        let range = GfnRange::from_len(Gfn::new(block * 512), 512);
        let (backing, number) = (&self.backing, &mut self.backings);
        self.rig.take_back(range, |rig| {
            *number += 1;
            let huge = rig.random.chance(1, 2);
            backing.set(block, *number, huge);
        });
    }

    /// INVARIANT[I20]: no address permits more than the guest's tables have since its flush.
    pub fn check(&mut self) {
        self.enter();
        for number in 0..self.addresses.len() {
            // The walk was a read.
            let Some(found) = self.shadow(number) else { continue };
            let (write, exec) = (found.writable(), found.executable());
            let user = self.guest.look().user || found.user();
            let (gfn, dirty) = (found.pa >> 12, true);
            let seen = Meaning { gfn, read: true, write, user, exec, dirty, level: 0 };
            let _ = self.judge(number, &seen);
        }
        self.rig.check_books();
    }

    fn step(&mut self) {
        let number = self.rig.random.below(self.addresses.len() as u64) as usize;
        match self.rig.random.below(100) {
            0..40 => self.edit(),
            40..86 => {
                let kind = some_kind(&mut self.rig.random);
                let user = self.guest.some_user(&mut self.rig.random);
                self.access(number, kind, user);
            }
            86..91 if G::INVALIDATES => self.invalidate(number),
            86..95 => self.load(),
            95 => {
                self.switch();
            }
            96..98 => self.take_back(),
            98 => match self.rig.random.below(2) {
                0 => self.harvest(),
                _ => self.rig.drop_everything(),
            },
            _ => self.flush(),
        }
    }

    /// The guest changes its mode.
    pub fn switch(&mut self) {
        if self.guest.switch(&mut self.rig.random, self.rig.levels) {
            self.kept = None;
            self.list_addresses();
            self.load();
        }
    }

    /// The guest flushes everything.
    pub fn flush(&mut self) {
        self.rig.note("flush".to_owned());
        self.guest.flush(&mut self.rig, &self.memory);
        self.rig.core.lock().unwrap().cpu.flush_all();
        self.forget();
    }

    pub fn finish(self) {
        self.rig.finish();
    }
}
