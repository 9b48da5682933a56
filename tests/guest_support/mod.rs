//! What the tests of guest walks share: small memories that log what is done to them, and the words
//! of the walkers beside those of the independent model.

#![allow(dead_code, reason = "each test uses a part")]

pub mod any;
pub mod chain;
pub mod pages;
pub mod plane;

use mmu_core::access::Access;
use mmu_core::addr::Level;
use mmu_model::{
    AccessKind, Ept, Format, GuestAccess, GuestMachine, GuestMode, GuestRoots, NestedExit, Npt,
    Rights, Vendor, Who, Why,
};
use shadow_mmu::guest::{
    EptCpu, GuestControls, GuestCpu, GuestRoot, GuestWalker, NestedFault, NestedReport,
    NestedRequest, NestedWalker, Operation, Privilege, Purpose, Request, WriteProtect,
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

/// The library's walker for the model's nested format.
pub fn nested_walker(format: &Format, advanced: bool) -> NestedWalker {
    match *format {
        Format::Ept(ept) => {
            let cpu = EptCpu {
                max_phys_bits: ept.max_phys_bits,
                exec_only: ept.exec_only,
                huge_2m: ept.huge_2m,
                huge_1g: ept.huge_1g,
                mode_based_execute: ept.mode_based_execute,
                accessed_dirty: ept.accessed_dirty,
                advanced_info: advanced,
                five_levels: true,
            };
            let levels = Level::new(ept.levels).expect("4 or 5");
            NestedWalker::ept(levels, &cpu).expect("a format that exists")
        }
        Format::Npt(npt) => {
            let cpu = GuestCpu {
                max_phys_bits: npt.max_phys_bits,
                gbpages: npt.huge_1g,
                la57: true,
                ..GuestCpu::baseline()
            };
            let mut controls = GuestControls::LONG;
            controls.set(GuestControls::NXE, npt.nxe);
            controls.set(GuestControls::LA57, npt.levels == 5);
            // What does not concern nested walks is on.
            controls |= GuestControls::SMEP | GuestControls::SMAP;
            NestedWalker::npt(&cpu, controls).expect("a format that exists")
        }
        Format::Legacy(_) => panic!("not a second dimension"),
    }
}

/// Both nested formats with everything, of `levels`.
pub fn nested_formats(levels: u8) -> Vec<Format> {
    let ept = Ept { levels, ..Ept::new() };
    let off = Ept { accessed_dirty: false, ..ept };
    let by_mode = Ept { mode_based_execute: true, exec_only: false, ..ept };
    let npt = Npt { levels, ..Npt::new() };
    vec![Format::Ept(ept), Format::Ept(off), Format::Ept(by_mode), Format::Npt(npt)]
}

pub fn levels_of(format: &Format) -> u8 {
    match format {
        Format::Ept(ept) => ept.levels,
        Format::Npt(npt) => npt.levels,
        Format::Legacy(_) => panic!("not a second dimension"),
    }
}

/// What the model says that the guest's tables permit, in the words of the library.
pub fn linear(rights: Rights) -> Access {
    let mut access = Access::READ;
    access.set(Access::USER, rights.user);
    access.set(Access::WRITE, rights.writable);
    access.set(Access::EXEC, rights.executable);
    access
}

pub fn nested_request(kind: AccessKind, why: Why) -> NestedRequest {
    let purpose = match why {
        Why::Page(rights) => Purpose::Final(linear(rights)),
        Why::Table | Why::Update => Purpose::Table,
        Why::Pointers => Purpose::Pointers,
    };
    NestedRequest { operation: operation(kind), purpose }
}

/// Do the two show the hypervisor the same?
pub fn same_exit(predicted: &NestedExit, fault: &NestedFault) -> bool {
    match (*predicted, fault.report) {
        (NestedExit::Violation(code, gpa), NestedReport::EptViolation(qualification)) => {
            qualification.bits() == code && fault.gpa.get() == gpa
        }
        (NestedExit::Misconfiguration(gpa), NestedReport::EptMisconfig) => fault.gpa.get() == gpa,
        (NestedExit::NestedPageFault(code, gpa), NestedReport::Npf(info)) => {
            info.bits() == code && fault.gpa.get() == gpa
        }
        _ => false,
    }
}
