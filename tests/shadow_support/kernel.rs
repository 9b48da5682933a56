//! A guest in a paging mode of its choice, and one that changes it.

use std::ops::Range;

use mmu_core::addr::{Gva, Hpa};
use mmu_core::fault::{FaultError, FaultOutcome};
use mmu_core::spte::{Capabilities, Legacy};
use mmu_model::{Access, AccessKind, Random};
use shadow_mmu::guest::{
    GuestControls, GuestCpu, GuestRoot, GuestWalk, GuestWalker, PointerError, Privilege, Request,
    WalkError, WalkPath, WriteProtect,
};
use shadow_mmu::{PageRole, ShadowError};

use super::memory::Memory;
use super::rig::{Rig, operation};
use super::wide::{
    Guest, PAGES, PHYS, Permits, Start, TABLES, all_addresses, some_address, some_target, tables_of,
};
use super::{A, D, NX, P, PS, U, W, bits};
use crate::common::five;
use crate::common::inside::{fallible, infallible};

/// Where the pointers of PAE stand: two sets of four.
pub const POINTERS: u64 = 19;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    None,
    Bits32 { pse: bool },
    Pae,
    Long4,
    Long5,
}

impl Mode {
    /// What a guest on tables of `levels` may choose.
    pub fn all(levels: u8) -> Vec<Self> {
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

    pub fn controls(self) -> GuestControls {
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

    pub fn top(self) -> u32 {
        match self {
            Self::None => 0,
            // PAE's third level is in registers.
            Self::Bits32 { .. } | Self::Pae => 2,
            Self::Long4 => 4,
            Self::Long5 => 5,
        }
    }

    pub fn is_32(self) -> bool {
        matches!(self, Self::Bits32 { .. })
    }

    pub fn bytes(self) -> u64 {
        if self.is_32() { 4 } else { 8 }
    }

    pub fn shift(self, level: u32) -> u32 {
        12 + (level - 1) * if self.is_32() { 10 } else { 9 }
    }

    pub fn index(self, gva: u64, level: u32) -> u64 {
        gva >> self.shift(level) & if self.is_32() { 1023 } else { 511 }
    }

    pub fn has_pages(self, level: u32) -> bool {
        match level {
            1 => true,
            2 => self != Self::Bits32 { pse: false },
            3 => matches!(self, Self::Long4 | Self::Long5),
            _ => false,
        }
    }

    /// Reserved bits of an entry.
    pub fn reserved(self, level: u32, page: bool) -> u64 {
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
    pub fn indices(self, level: u32) -> &'static [u64] {
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
    pub fn addresses(self) -> Vec<u64> {
        if self == Self::None {
            let gfns = [0, 1, 2, 3, TABLES, 511, 512, 513, 1024, 1536, PAGES - 1, PAGES];
            return gfns.iter().map(|gfn| gfn << 12).collect();
        }
        let top = if self == Self::Pae { 3 } else { self.top() };
        let all = all_addresses(top, |level| self.indices(level), |level| self.shift(level));
        let sign = if self == Self::Long4 { 47 } else { 56 };
        let extended = |gva: u64| if gva >> sign & 1 == 1 { gva | u64::MAX << sign } else { gva };
        all.into_iter().map(extended).collect()
    }
}

pub fn caps(levels: u8) -> Capabilities {
    match levels {
        3 => Capabilities::pae(),
        4 => Capabilities::legacy(),
        _ => five(Capabilities::legacy()),
    }
}

pub fn guest_cpu() -> GuestCpu {
    GuestCpu {
        max_phys_bits: PHYS as u8,
        gbpages: true,
        la57: true,
        pse36: false,
        ..GuestCpu::baseline()
    }
}

/// A guest in a mode of its choice.
#[derive(Debug)]
pub struct Kernel {
    pub mode: Mode,
    pub walker: GuestWalker,
    pub role: PageRole,
    /// What the root register, or registers, hold.
    pub root: GuestRoot,
}

impl Kernel {
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            walker: GuestWalker::new(&guest_cpu(), mode.controls()).unwrap(),
            role: PageRole::of_guest(&guest_cpu(), mode.controls(), WriteProtect::On).unwrap(),
            root: GuestRoot::Cr3(0),
        }
    }
}

impl Guest for Kernel {
    type Format = Legacy;
    type Walk = (GuestWalk, Request);
    const INVALIDATES: bool = true;

    fn top(&self) -> u32 {
        self.mode.top()
    }

    fn bytes(&self) -> u64 {
        self.mode.bytes()
    }

    fn shift(&self, level: u32) -> u32 {
        self.mode.shift(level)
    }

    fn index(&self, address: u64, level: u32) -> u64 {
        self.mode.index(address, level)
    }

    fn has_pages(&self, level: u32) -> bool {
        self.mode.has_pages(level)
    }

    fn indices(&self, level: u32) -> &'static [u64] {
        self.mode.indices(level)
    }

    fn addresses(&self) -> Vec<u64> {
        self.mode.addresses()
    }

    fn start(&self, address: u64) -> Start {
        let table = match (self.mode, self.root) {
            (Mode::None, _) => return Start::NoPaging,
            (_, GuestRoot::Pae(pointers)) => pointers.values()[(address >> 30 & 3) as usize],
            (_, GuestRoot::Cr3(cr3)) => cr3 | P,
        };
        if table & P == 0 { Start::Nowhere } else { Start::Table(table) }
    }

    fn decode(&self, entry: u64, level: u32, page: bool) -> Option<Permits> {
        if entry & P == 0 || entry & self.mode.reserved(level, page) != 0 {
            return None;
        }
        let has = |bit: u64| entry & bit != 0;
        Some(Permits { read: true, write: has(W), user: has(U), exec: !has(NX) })
    }

    fn is_dirty(&self, leaf: u64) -> bool {
        leaf & D != 0
    }

    fn some_entry(&self, random: &mut Random, level: u32) -> u64 {
        let (shift, large) = (self.mode.shift(level), level > 1 && self.mode.has_pages(level));
        let mut entry = some_address(random, level, shift, large) | P;
        for (bit, chance) in [(W, 7), (U, 6), (A, 5), (D, 4)] {
            if random.chance(chance, 8) {
                entry |= bit;
            }
        }
        if !self.mode.is_32() && random.chance(1, 8) {
            entry |= NX;
        }
        // Ignored in long mode, reserved in PAE's.
        if matches!(self.mode, Mode::Long4 | Mode::Long5) && random.chance(1, 6) {
            entry |= 1 << 55;
        }
        if random.chance(1, 8) { 0 } else { entry }
    }

    fn some_user(&self, random: &mut Random) -> bool {
        random.chance(1, 2)
    }

    fn look(&self) -> Access {
        Access::supervisor(AccessKind::Read)
    }

    fn address(&self, any: u64) -> u64 {
        let page = any & !0xfff;
        let bits = match self.mode {
            Mode::None | Mode::Bits32 { .. } | Mode::Pae => return page & u64::from(u32::MAX),
            Mode::Long4 => 48,
            Mode::Long5 => 57,
        };
        // Sign-extended.
        let unused = u64::BITS - bits;
        ((page << unused) as i64 >> unused) as u64
    }

    fn load_any(&mut self, any: u64) -> bool {
        let bits = if self.mode.is_32() { 31 } else { PHYS - 1 };
        self.root = GuestRoot::Cr3(any & super::bits(0, bits));
        self.mode != Mode::Pae
    }

    fn load(&mut self, random: &mut Random, memory: &Memory) -> Range<u64> {
        let cr3 = (tables_of(self.mode.top()).start + random.below(2)) << 12;
        self.root = GuestRoot::Cr3(cr3);
        if self.mode != Mode::Pae {
            return 0..0;
        }
        let cr3 = (POINTERS << 12) + random.below(2) * 32;
        for index in 0..4 {
            if random.chance(1, 3) {
                let pointer = some_target(random, 3) << 12 | P;
                let pointer = if random.chance(1, 6) { 0 } else { pointer };
                memory.set(cr3 + index * 8, 8, pointer);
            }
        }
        // Where somebody took the frame for another table, the guest gets its #GP.
        self.root = match self.walker.load_pointers(memory, cr3) {
            Ok(pointers) => GuestRoot::Pae(pointers),
            Err(PointerError::Reserved { .. }) => {
                (0..8).for_each(|index| memory.set((POINTERS << 12) + index * 8, 8, 0));
                GuestRoot::Pae(self.walker.load_pointers(memory, cr3).unwrap())
            }
            // The slot is gone: it has pointers that lead nowhere.
            Err(_) => GuestRoot::Pae(self.walker.load_pointers(&Memory::new(1, 1), 0).unwrap()),
        };
        POINTERS << 12..(POINTERS << 12) + 64
    }

    fn switch(&mut self, random: &mut Random, levels: u8) -> bool {
        let modes = Mode::all(levels);
        *self = Self::new(modes[random.below(modes.len() as u64) as usize]);
        true
    }

    fn enter(&self, rig: &mut Rig<Legacy>, memory: &Memory) -> Result<Hpa, ShadowError> {
        let (vcpu, lock) = (&mut rig.vcpu, &rig.lock);
        fallible(|| vcpu.load_guest_root(lock, &self.walker, memory, &self.root, self.role))
    }

    fn walk(
        &self,
        memory: &Memory,
        address: u64,
        kind: AccessKind,
        user: bool,
    ) -> Result<Option<Self::Walk>, String> {
        let privilege = if user { Privilege::User } else { Privilege::Supervisor };
        let request = Request::new(operation(kind), privilege);
        match self.walker.walk(memory, &self.root, Gva::new(address), request) {
            Ok(walk) => Ok(Some((walk, request))),
            Err(WalkError::Fault(_)) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    fn path<'a>(&self, walk: &'a Self::Walk) -> &'a WalkPath {
        &walk.0.path
    }

    fn fault(
        &self,
        rig: &mut Rig<Legacy>,
        memory: &Memory,
        (walk, request): &Self::Walk,
    ) -> Result<FaultOutcome, ShadowError> {
        let (vcpu, lock) = (&mut rig.vcpu, &rig.lock);
        fallible(|| vcpu.fault(lock, &self.walker, memory, walk, *request))
    }

    fn is_outside(&self, error: &ShadowError) -> bool {
        matches!(error, ShadowError::Fault(FaultError::BeyondPhysical { gpa, .. })
            if gpa.get() >> 12 >= PAGES)
    }

    fn invalidate(&self, rig: &mut Rig<Legacy>, memory: &Memory, address: u64) {
        let (vcpu, lock) = (&mut rig.vcpu, &rig.lock);
        infallible(|| vcpu.guest_invalidated(lock, &self.walker, memory, Gva::new(address)));
    }

    fn flush(&self, rig: &mut Rig<Legacy>, memory: &Memory) {
        infallible(|| rig.vcpu.guest_flushed(&rig.lock, &self.walker, memory));
    }

    fn fault_invalidates(&self) -> bool {
        false
    }
}
