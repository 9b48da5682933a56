//! A guest hypervisor's EPT or NPT under shadow: what its guest reaches is what the hypervisor's
//! tables say, and never more.
//!
//! As `shadow_modes`, one dimension up: the addresses are a nested guest's physical ones. The
//! specification walks EPT and NPT on its own.

mod common;
mod shadow_support;

use std::marker::PhantomData;

use common::{Modelled, five};
use mmu_core::access;
use mmu_core::addr::{Gpa, Hpa, Level};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::{Capabilities, Ept, Npt};
use mmu_model::{Access, AccessKind, Random};
use shadow_mmu::guest::{
    EptCpu, GuestControls, GuestCpu, NestedError, NestedRequest, NestedWalk, NestedWalker, Purpose,
    WalkPath,
};
use shadow_mmu::{ReclaimPolicy, ShadowError};
use shadow_support::memory::Memory;
use shadow_support::rig::{Rig, operation};
use shadow_support::wide::{
    Guest, PHYS, Permits, Seen, Start, World, all_addresses, some_address, tables_of,
};
use shadow_support::{A, D, NX, P, PS, U, W, bits};

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

    fn decode(self, entry: u64, level: u32, page: bool) -> Option<Permits> {
        let first = if self.is_ept() { 12 } else { 13 };
        let inside = match (level, page) {
            (2, true) => bits(first, 20),
            (3, true) => bits(first, 29),
            _ => 0,
        };
        let has = |bit: u64| entry & bit != 0;
        let high = bits(PHYS, 51) | inside | if level > 3 { PS } else { 0 };
        // Every nested access is a user's.
        let user = true;
        if self.is_ept() {
            let bad = has(high | if page { 0 } else { bits(3, 6) }) || (has(2) && !has(1));
            let permits = Permits { read: has(1), write: has(2), user, exec: has(4) };
            return (has(7) && !bad).then_some(permits);
        }
        let permits = Permits { read: true, write: has(W), user, exec: !has(NX) };
        (has(P) && !has(high) && has(U)).then_some(permits)
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
        all_addresses(self.levels, |level| self.indices(level), |level| self.shift(level))
    }
}

/// A hypervisor with tables for its guest, shadowed in format `F`.
#[derive(Debug)]
struct Hypervisor<F> {
    mode: Mode,
    walker: NestedWalker,
    /// The EPT pointer, or nCR3.
    root: u64,
    format: PhantomData<F>,
}

impl<F: Modelled> Hypervisor<F> {
    fn new(mode: Mode) -> Self {
        Self { mode, walker: mode.walker(), root: 0, format: PhantomData }
    }
}

impl<F: Modelled + std::fmt::Debug> Guest for Hypervisor<F> {
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

    fn load(&mut self, random: &mut Random, _: &Memory) {
        self.root = (tables_of(self.mode.levels).start + random.below(2)) << 12;
        // What does not belong to the address: memory type and walk length.
        self.root |= if self.mode.is_ept() { 0x1e } else { 0 };
    }

    /// The hypervisor turns A and D on or off in its EPT pointer.
    fn switch(&mut self, _: &mut Random, _: u8) -> bool {
        let Kind::Ept { accessed_dirty } = self.mode.kind else { return false };
        let kind = Kind::Ept { accessed_dirty: !accessed_dirty };
        *self = Self::new(Mode { kind, ..self.mode });
        true
    }

    fn enter(&self, rig: &mut Rig<F>, memory: &Memory) -> Hpa {
        let loaded = rig.vcpu.load_nested_root(&rig.lock, &self.walker, memory, self.root, 0);
        loaded.expect("memory")
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
        rig.vcpu.nested_fault(&rig.lock, &self.walker, memory, walk, *request)
    }

    fn is_outside(&self, _: &ShadowError) -> bool {
        false
    }

    fn invalidate(&self, rig: &mut Rig<F>, memory: &Memory, address: u64) {
        rig.vcpu.nested_invalidated(&rig.lock, &self.walker, memory, Gpa::new(address));
    }

    fn flush(&self, rig: &mut Rig<F>, memory: &Memory) {
        rig.vcpu.nested_flushed(&rig.lock, &self.walker, memory);
    }

    /// The hypervisor gets the fault, which is a flush of the address.
    fn fault_invalidates(&self) -> bool {
        true
    }
}

fn run<F: Modelled + std::fmt::Debug>(caps: Capabilities, kind: Kind, levels: u32) {
    let mode = Mode { kind, levels };
    let mut sum = Seen::default();
    for seed in 0..48 {
        let quota = if seed % 4 == 3 { 12 } else { 1000 };
        let policy = if seed % 2 == 0 { ReclaimPolicy::Fifo } else { ReclaimPolicy::Accessed };
        World::new(seed, caps, Hypervisor::<F>::new(mode), quota, policy).run(&mut sum);
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
    let guest = Hypervisor::<Ept>::new(mode);
    let mut world = World::new(1, caps, guest, 1000, ReclaimPolicy::Fifo);
    for (table, next) in [(13, 10), (14, 10), (10, 6), (6, 0)] {
        world.memory.set(table << 12, 8, (next << 12) | ALL);
    }
    world.memory.set(0, 8, (600 << 12) | READ);
    // The nested guest may write to the table.
    world.memory.set(8, 8, ALL | 6 << 3);
    world.load();
    let number = |gpa: u64| mode.addresses().iter().position(|one| *one == gpa).unwrap();
    world.access(number(0), AccessKind::Read, true);
    world.access(number(0x1000), AccessKind::Write, true);
    assert!(world.is_writable(0), "the table is not out of sync");
    world.memory.set(0, 8, (700 << 12) | READ);
    world.remember_all();
    assert_eq!(world.shadow(number(0)).unwrap().pa >> 12, world.backing.pfn(600).unwrap());
    world.access(number(0), AccessKind::Write, true);
    world.check();
    world.access(number(0), AccessKind::Read, true);
    assert_eq!(world.shadow(number(0)).unwrap().pa >> 12, world.backing.pfn(700).unwrap());
    world.finish();
}

/// KVM row 4.34: what the hypervisor's entries permit together may come to nothing. Such an entry
/// goes when it follows its table; one that permits something stays.
#[test]
fn an_entry_that_permits_nothing_any_more_is_taken_out() {
    const READ: u64 = 1;
    const WRITE: u64 = 2;
    const EXEC: u64 = 4;
    const USED: u64 = 1 << 8 | 1 << 9;
    const WRITE_BACK: u64 = 6 << 3;
    // Below a link without X nothing is left of an entry that permits X only.
    for (link, stays) in [(READ | WRITE, false), (READ | WRITE | EXEC, true)] {
        let mode = Mode { kind: EPT, levels: 4 };
        let guest = Hypervisor::<Ept>::new(mode);
        let mut world = World::new(1, Capabilities::ept(), guest, 1000, ReclaimPolicy::Fifo);
        for (table, next) in [(13, 10), (14, 10), (10, 6)] {
            world.memory.set(table << 12, 8, (next << 12) | READ | WRITE | EXEC | USED);
        }
        world.memory.set(6 << 12, 8, link | USED);
        let page = 600 << 12 | WRITE_BACK | 1 << 8;
        world.memory.set(0, 8, page | READ);
        // The nested guest may write to the table.
        world.memory.set(8, 8, READ | WRITE | EXEC | USED | WRITE_BACK);
        world.load();
        let number = |gpa: u64| mode.addresses().iter().position(|one| *one == gpa).unwrap();
        world.access(number(0), AccessKind::Read, true);
        world.access(number(0x1000), AccessKind::Write, true);
        assert!(world.is_writable(0), "the table is not out of sync");
        assert!(world.shadow(number(0)).is_some());
        world.memory.set(0, 8, page | EXEC);
        // The same root once more: what the hypervisor's flush does, too.
        world.enter_anew();
        world.forget();
        let fetch = Access::user(AccessKind::Fetch);
        assert_eq!(world.shadow(number(0)), None, "not readable any more");
        assert_eq!(world.rig.shadow(0, fetch).is_some(), stays, "executable");
        (0..16).for_each(|_| world.check());
        world.access(number(0), AccessKind::Fetch, true);
        world.finish();
    }
}
