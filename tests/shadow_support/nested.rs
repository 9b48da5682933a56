//! A guest hypervisor's EPT or NPT: the addresses are its guest's physical ones.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::ops::Range;

use mmu_core::access;
use mmu_core::addr::{Gpa, Hpa, Level};
use mmu_core::fault::FaultOutcome;
use mmu_model::{Access, AccessKind, Random};
use shadow_mmu::ShadowError;
use shadow_mmu::guest::{
    EptCpu, GuestControls, GuestCpu, NestedError, NestedRequest, NestedWalk, NestedWalker, Purpose,
    WalkPath,
};

use super::memory::Memory;
use super::rig::{Rig, operation};
use super::wide::{Guest, PHYS, Permits, Start, all_addresses, some_address, tables_of};
use super::{A, D, NX, P, PS, U, W, bits};
use crate::common::Modelled;
use crate::common::inside::{fallible, infallible};

/// EPT with accessed and dirty bits.
pub const EPT: Kind = Kind::Ept { accessed_dirty: true };

/// What the hypervisor made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ept { accessed_dirty: bool },
    Npt,
}

/// A format of nested tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    pub kind: Kind,
    pub levels: u32,
}

impl Mode {
    pub fn walker(self) -> NestedWalker {
        let Kind::Ept { accessed_dirty } = self.kind else {
            let cpu = GuestCpu { max_phys_bits: PHYS as u8, ..GuestCpu::baseline() };
            return NestedWalker::npt(&cpu, GuestControls::LONG).unwrap();
        };
        let max_phys_bits = PHYS as u8;
        let cpu = EptCpu { max_phys_bits, five_levels: true, accessed_dirty, ..EptCpu::baseline() };
        NestedWalker::ept(Level::new(self.levels as u8).unwrap(), &cpu).unwrap()
    }

    /// Was the page of a leaf written, or does nobody keep track?
    pub const fn is_dirty(self, leaf: u64) -> bool {
        match self.kind {
            Kind::Ept { accessed_dirty: true } => leaf & 1 << 9 != 0,
            Kind::Ept { accessed_dirty: false } => true,
            Kind::Npt => leaf & D != 0,
        }
    }

    pub const fn is_ept(self) -> bool {
        matches!(self.kind, Kind::Ept { .. })
    }

    /// Permission, accessed and dirty bits at random.
    pub fn permissions(self, random: &mut Random) -> u64 {
        let bits = if self.is_ept() {
            [(1, 14), (2, 12), (4, 12), (1 << 8, 10), (1 << 9, 8)]
        } else {
            [(P | U, 15), (W, 12), (NX, 2), (A, 10), (D, 8)]
        };
        bits.iter().filter(|(_, chance)| random.chance(*chance, 16)).map(|(bit, _)| bit).sum()
    }

    pub fn decode(self, entry: u64, level: u32, page: bool) -> Option<Permits> {
        let first = if self.is_ept() { 12 } else { 13 };
        let inside = match (level, page) {
            (2, true) => bits(first, 20),
            (3, true) => bits(first, 29),
            _ => 0,
        };
        let has = |bit: u64| entry & bit != 0;
        // AMD's processors reserve the bit of global pages, too.
        let upper = if self.is_ept() { PS } else { PS | 1 << 8 };
        let high = bits(PHYS, 51) | inside | if level > 3 { upper } else { 0 };
        // Every nested access is a user's.
        let user = true;
        if self.is_ept() {
            let inner = if page { 0 } else { bits(3, 6) };
            let no_memory_type = page && matches!(entry >> 3 & 7, 2 | 3 | 7);
            let bad = has(high | inner) || (has(2) && !has(1)) || no_memory_type;
            let permits = Permits { read: has(1), write: has(2), user, exec: has(4) };
            return (has(7) && !bad).then_some(permits);
        }
        let permits = Permits { read: true, write: has(W), user, exec: !has(NX) };
        (has(P) && !has(high) && has(U)).then_some(permits)
    }

    pub fn shift(self, level: u32) -> u32 {
        12 + (level - 1) * 9
    }

    pub fn indices(self, level: u32) -> &'static [u64] {
        match level {
            1 => &[0, 1, 2, 3],
            3 if self.levels == 5 => &[0],
            _ => &[0, 1],
        }
    }

    pub fn addresses(self) -> Vec<u64> {
        all_addresses(self.levels, |level| self.indices(level), |level| self.shift(level))
    }
}

/// A hypervisor with tables for its guest, shadowed in format `F`.
#[derive(Debug)]
pub struct Hypervisor<F> {
    mode: Mode,
    walker: NestedWalker,
    /// The EPT pointer, or nCR3.
    root: u64,
    format: PhantomData<F>,
}

impl<F: Modelled> Hypervisor<F> {
    pub fn new(mode: Mode) -> Self {
        Self { mode, walker: mode.walker(), root: 0, format: PhantomData }
    }
}

impl<F: Modelled + Debug> Guest for Hypervisor<F> {
    type Format = F;
    type Walk = (NestedWalk, NestedRequest);
    const INVALIDATES: bool = false;

    fn top(&self) -> u32 {
        self.mode.levels
    }

    fn bytes(&self) -> u64 {
        8
    }

    fn shift(&self, level: u32) -> u32 {
        self.mode.shift(level)
    }

    fn index(&self, address: u64, level: u32) -> u64 {
        address >> self.mode.shift(level) & 511
    }

    fn has_pages(&self, level: u32) -> bool {
        level <= 3
    }

    fn indices(&self, level: u32) -> &'static [u64] {
        self.mode.indices(level)
    }

    fn addresses(&self) -> Vec<u64> {
        self.mode.addresses()
    }

    fn start(&self, _: u64) -> Start {
        Start::Table(self.root)
    }

    fn decode(&self, entry: u64, level: u32, page: bool) -> Option<Permits> {
        self.mode.decode(entry, level, page)
    }

    fn is_dirty(&self, leaf: u64) -> bool {
        self.mode.is_dirty(leaf)
    }

    fn some_entry(&self, random: &mut Random, level: u32) -> u64 {
        if random.chance(1, 8) {
            return 0;
        }
        let permissions = self.mode.permissions(random);
        let (shift, large) = (self.mode.shift(level), matches!(level, 2 | 3));
        let address = some_address(random, level, shift, large);
        // Write back; what only leaves have.
        let leaf = self.mode.is_ept() && (level == 1 || address & PS != 0);
        address | permissions | if leaf { 6 << 3 } else { 0 }
    }

    fn some_user(&self, _: &mut Random) -> bool {
        true
    }

    fn look(&self) -> Access {
        Access::user(AccessKind::Read)
    }

    fn address(&self, any: u64) -> u64 {
        any & bits(12, 12 + self.mode.levels * 9 - 1)
    }

    fn load_any(&mut self, any: u64) -> bool {
        self.root = any & bits(0, PHYS - 1);
        true
    }

    fn load(&mut self, random: &mut Random, _: &Memory) -> Range<u64> {
        self.root = (tables_of(self.mode.levels).start + random.below(2)) << 12;
        // What does not belong to the address: memory type and walk length.
        self.root |= if self.mode.is_ept() { 0x1e } else { 0 };
        0..0
    }

    /// The hypervisor turns A and D on or off in its EPT pointer.
    fn switch(&mut self, _: &mut Random, _: u8) -> bool {
        let Kind::Ept { accessed_dirty } = self.mode.kind else { return false };
        let kind = Kind::Ept { accessed_dirty: !accessed_dirty };
        *self = Self::new(Mode { kind, ..self.mode });
        true
    }

    fn enter(&self, rig: &mut Rig<F>, memory: &Memory) -> Result<Hpa, ShadowError> {
        let (vcpu, lock) = (&mut rig.vcpu, &rig.lock);
        fallible(|| vcpu.load_nested_root(lock, &self.walker, memory, self.root, 0))
    }

    fn walk(
        &self,
        memory: &Memory,
        address: u64,
        kind: AccessKind,
        _user: bool,
    ) -> Result<Option<Self::Walk>, String> {
        let purpose = Purpose::Final(access::Access::ALL);
        let request = NestedRequest { operation: operation(kind), purpose };
        match self.walker.walk(memory, self.root, Gpa::new(address), request) {
            Ok(walk) => Ok(Some((walk, request))),
            Err(NestedError::Fault(_)) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    fn path<'a>(&self, walk: &'a Self::Walk) -> &'a WalkPath {
        &walk.0.path
    }

    fn fault(
        &self,
        rig: &mut Rig<F>,
        memory: &Memory,
        (walk, request): &Self::Walk,
    ) -> Result<FaultOutcome, ShadowError> {
        let (vcpu, lock) = (&mut rig.vcpu, &rig.lock);
        fallible(|| vcpu.nested_fault(lock, &self.walker, memory, walk, *request))
    }

    fn is_outside(&self, _: &ShadowError) -> bool {
        false
    }

    fn invalidate(&self, rig: &mut Rig<F>, memory: &Memory, address: u64) {
        let (vcpu, lock) = (&mut rig.vcpu, &rig.lock);
        infallible(|| vcpu.nested_invalidated(lock, &self.walker, memory, Gpa::new(address)));
    }

    fn flush(&self, rig: &mut Rig<F>, memory: &Memory) {
        infallible(|| rig.vcpu.nested_flushed(&rig.lock, &self.walker, memory));
    }

    /// The hypervisor gets the fault, which is a flush of the address.
    fn fault_invalidates(&self) -> bool {
        true
    }
}
