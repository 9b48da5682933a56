//! What a guest's control registers mean for its tables.
//!
//! Owns [`Paging`]: walker, role and root that follow from them, made anew when the guest writes
//! one. Values only; no locks.

use mmu_core::access::PfErrorCode;
use shadow_mmu::PageRole;
use shadow_mmu::guest::{
    GuestControls, GuestCpu, GuestRoot, GuestWalker, Operation, PagingMode, Privilege, Request,
    WriteProtect,
};
use x86::controlregs::{Cr0, Cr4};

use super::ram::Ram;
use crate::trouble::Trouble;
use crate::virt::GuestState;

/// EFER.LME, NXE.
const LONG_ENABLE: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 11;
/// RFLAGS.AC.
const ALIGNMENT_CHECK: u64 = 1 << 18;

/// See the file's head.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// Walks the guest's tables.
    pub walker: GuestWalker,
    /// Role of its root.
    pub role: PageRole,
    /// Where its tables begin.
    pub root: GuestRoot,
    /// CR0.WP.
    protect: WriteProtect,
}

/// The processor that guests have: this one, as far as its tables go.
pub fn guest_cpu(phys_bits: u8) -> GuestCpu {
    let extended = core::arch::x86_64::__cpuid(0x8000_0001);
    let vendor = core::arch::x86_64::__cpuid(0);
    GuestCpu {
        max_phys_bits: phys_bits,
        gbpages: extended.edx & 1 << 26 != 0,
        // "Auth" of AuthenticAMD.
        amd: vendor.ebx == u32::from_le_bytes(*b"Auth"),
        ..GuestCpu::baseline()
    }
}

impl Paging {
    /// What `state` says on `cpu`; PAE's pointers are read from `ram`.
    pub fn new(cpu: &GuestCpu, state: &GuestState, ram: &Ram) -> Result<Self, Trouble> {
        let mut controls = GuestControls::empty();
        let cr4 = |bit: Cr4| state.cr4 & bit.bits() as u64 != 0;
        let cr0 = |bit: Cr0| state.cr0 & bit.bits() as u64 != 0;
        controls.set(GuestControls::PG, cr0(Cr0::CR0_ENABLE_PAGING));
        controls.set(GuestControls::PSE, cr4(Cr4::CR4_ENABLE_PSE));
        controls.set(GuestControls::PAE, cr4(Cr4::CR4_ENABLE_PAE));
        controls.set(GuestControls::SMEP, cr4(Cr4::CR4_ENABLE_SMEP));
        controls.set(GuestControls::SMAP, cr4(Cr4::CR4_ENABLE_SMAP));
        controls.set(GuestControls::LME, state.efer & LONG_ENABLE != 0);
        controls.set(GuestControls::NXE, state.efer & NO_EXECUTE != 0);
        let on = cr0(Cr0::CR0_WRITE_PROTECT);
        let protect = if on { WriteProtect::On } else { WriteProtect::Off };
        let walker = GuestWalker::new(cpu, controls).map_err(Trouble::Mode)?;
        let role = PageRole::of_guest(cpu, controls, protect).map_err(Trouble::Mode)?;
        let root = match walker.mode() {
            PagingMode::Pae => {
                let pointers = walker.load_pointers(ram, state.cr3);
                GuestRoot::Pae(pointers.map_err(Trouble::Pointers)?)
            }
            _ => GuestRoot::Cr3(state.cr3),
        };
        Ok(Self { walker, role, root, protect })
    }

    /// The access that faulted with `code`.
    pub fn request(&self, code: u64, state: &GuestState) -> Request {
        let code = PfErrorCode::from_bits_retain(code);
        let operation = if code.contains(PfErrorCode::FETCH) {
            Operation::Fetch
        } else if code.contains(PfErrorCode::WRITE) {
            Operation::Write
        } else {
            Operation::Read
        };
        let privilege = if code.contains(PfErrorCode::USER) {
            Privilege::User
        } else if state.cs.selector & 3 == 3 {
            // The processor's own: it delivers an exception to a program in user mode.
            Privilege::Implicit
        } else if state.rflags & ALIGNMENT_CHECK != 0 {
            Privilege::SupervisorAc
        } else {
            Privilege::Supervisor
        };
        Request { write_protect: self.protect, ..Request::new(operation, privilege) }
    }

    /// The fetch of the instruction that is executed now.
    pub fn fetch(&self, state: &GuestState) -> Request {
        let user = state.cs.selector & 3 == 3;
        let privilege = if user { Privilege::User } else { Privilege::Supervisor };
        Request { write_protect: self.protect, ..Request::new(Operation::Fetch, privilege) }
    }
}
