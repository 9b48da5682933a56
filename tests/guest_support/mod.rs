//! What the tests of guest walks share: small memories that log what is done to them, and the words
//! of the walkers beside those of the independent model.

#![allow(dead_code, reason = "each test uses a part")]

pub mod chain;
pub mod pages;

use mmu_model::{AccessKind, GuestAccess, GuestMachine, GuestMode, GuestRoots, Vendor, Who};
use shadow_mmu::guest::{
    GuestControls, GuestCpu, GuestRoot, GuestWalker, Operation, Privilege, Request, WriteProtect,
};

pub const P: u64 = 1;
pub const W: u64 = 1 << 1;
pub const U: u64 = 1 << 2;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const PS: u64 = 1 << 7;
pub const NX: u64 = 1 << 63;
/// Present, writable, user: an entry that forbids nothing.
pub const LINK: u64 = P | W | U;

/// A machine as the model has it: 46 address bits, NX and WP on, SMEP, SMAP and keys off.
pub const fn machine(mode: GuestMode) -> GuestMachine {
    GuestMachine {
        mode,
        vendor: Vendor::Intel,
        max_phys_bits: 46,
        nxe: true,
        wp: true,
        smep: false,
        smap: false,
        pke: false,
        pse: true,
        pse36: true,
        gbpages: true,
    }
}

/// The same setting, in the words of the library.
pub fn registers(machine: &GuestMachine) -> (GuestCpu, GuestControls) {
    let cpu = GuestCpu {
        max_phys_bits: machine.max_phys_bits,
        nx: true,
        gbpages: machine.gbpages,
        pse36: machine.pse36,
        la57: true,
        pku: true,
        amd: machine.vendor == Vendor::Amd,
    };
    let mut controls = match machine.mode {
        GuestMode::Off => GuestControls::empty(),
        GuestMode::TwoLevel => GuestControls::PG,
        GuestMode::Pae => GuestControls::PG | GuestControls::PAE,
        GuestMode::FourLevel => GuestControls::PG | GuestControls::PAE | GuestControls::LME,
        GuestMode::FiveLevel => {
            GuestControls::PG | GuestControls::PAE | GuestControls::LME | GuestControls::LA57
        }
    };
    controls.set(GuestControls::PSE, machine.pse);
    controls.set(GuestControls::SMEP, machine.smep);
    controls.set(GuestControls::SMAP, machine.smap);
    controls.set(GuestControls::PKE, machine.pke);
    controls.set(GuestControls::NXE, machine.nxe);
    (cpu, controls)
}

/// The walker of the library for this setting.
pub fn walker(machine: &GuestMachine) -> GuestWalker {
    let (cpu, controls) = registers(machine);
    GuestWalker::new(&cpu, controls).expect("a machine that exists")
}

pub const KINDS: [AccessKind; 3] = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch];
pub const KERNEL: Who = Who::Kernel { ac: false };
pub const EVERYBODY: [Who; 4] = [Who::User, KERNEL, Who::Kernel { ac: true }, Who::System];

/// An access of the model, in the words of the library.
pub fn request(machine: &GuestMachine, access: GuestAccess) -> Request {
    Request {
        operation: operation(access.kind),
        privilege: match access.who {
            Who::User => Privilege::User,
            Who::Kernel { ac: false } => Privilege::Supervisor,
            Who::Kernel { ac: true } => Privilege::SupervisorAc,
            Who::System => Privilege::Implicit,
        },
        write_protect: if machine.wp { WriteProtect::On } else { WriteProtect::Off },
        pkru: access.pkru,
    }
}

pub const fn operation(kind: AccessKind) -> Operation {
    match kind {
        AccessKind::Read => Operation::Read,
        AccessKind::Write => Operation::Write,
        AccessKind::Fetch => Operation::Fetch,
    }
}

/// Roots of the model, in the words of the library. The pointers of PAE are loaded, so they must
/// load.
pub fn root(walker: &GuestWalker, roots: GuestRoots) -> GuestRoot {
    if walker.mode() != shadow_mmu::guest::PagingMode::Pae {
        return GuestRoot::Cr3(roots.cr3);
    }
    let pointers = chain::Pointers(roots.pdptes);
    GuestRoot::Pae(walker.load_pointers(&pointers, 0).expect("pointers that load"))
}
