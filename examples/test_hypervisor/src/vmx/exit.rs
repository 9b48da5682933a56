//! Why the guest of the current VMCS stopped: exit reasons and qualifications decoded (SDM 3D C,
//! 3C 28.2.1), and instruction errors in words.
//!
//! Neighbours: `virt::exit` for the vocabulary. Reads the VMCS; no locks.

use mmu_core::access::EptViolation;
use mmu_core::addr::Gpa;
use x86::vmx::vmcs::{guest, ro};

use super::instr;
use super::wanted::PAGE_FAULT;
use crate::virt::state::gpr::{RAX, RSP};
use crate::virt::{Exit, NestedFault, RawFault};

/// Basic exit reasons.
mod reason {
    pub(super) const EXCEPTION_OR_NMI: u64 = 0;
    pub(super) const EXTERNAL_INTERRUPT: u64 = 1;
    pub(super) const TRIPLE_FAULT: u64 = 2;
    pub(super) const CPUID: u64 = 10;
    pub(super) const HLT: u64 = 12;
    pub(super) const INVLPG: u64 = 14;
    pub(super) const VMCALL: u64 = 18;
    pub(super) const CONTROL_REGISTER: u64 = 28;
    pub(super) const IO: u64 = 30;
    pub(super) const EPT_VIOLATION: u64 = 48;
    pub(super) const EPT_MISCONFIGURATION: u64 = 49;
    pub(super) const LOG_FULL: u64 = 62;
}

/// Exit reason, bit 31: the guest was not entered.
const ENTRY_FAILED: u64 = 1 << 31;

/// What to do about an exit before the caller hears of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// An exit whose instruction is not done.
    On(Exit),
    /// An exit whose instruction is done once RIP is behind it.
    Behind(Exit),
    /// The host has an interrupt to take.
    Interrupt,
    /// The guest reads its CR3, which is not the processor's (shadow paging): it wants it in this
    /// general register.
    ReadCr3 {
        /// Number of the register.
        register: usize,
    },
}

/// Why the guest stopped, with `gpr` as its general registers but for RSP, which the VMCS holds.
pub fn decode(gpr: &[u64; 16]) -> Decoded {
    let full = instr::field(ro::EXIT_REASON);
    if full & ENTRY_FAILED != 0 {
        return Decoded::On(Exit::Invalid { value: full });
    }
    let qualification = instr::field(ro::EXIT_QUALIFICATION);
    let other = Decoded::On(Exit::Other { reason: full, detail: qualification });
    match full & 0xffff {
        reason::EXCEPTION_OR_NMI => exception(qualification),
        reason::EXTERNAL_INTERRUPT => Decoded::Interrupt,
        reason::TRIPLE_FAULT => Decoded::On(Exit::Shutdown),
        reason::CPUID => Decoded::Behind(Exit::Cpuid),
        reason::HLT => Decoded::Behind(Exit::Halt),
        reason::INVLPG => Decoded::On(Exit::InvalidatePage { address: qualification }),
        reason::VMCALL => Decoded::Behind(Exit::Call),
        reason::CONTROL_REGISTER => control_register(qualification, gpr).unwrap_or(other),
        reason::IO => output(qualification, gpr).unwrap_or(other),
        reason::EPT_VIOLATION => Decoded::On(Exit::Nested(violation(qualification))),
        reason::EPT_MISCONFIGURATION => Decoded::On(Exit::Nested(NestedFault {
            gpa: address(),
            linear: None,
            raw: RawFault::Misconfiguration,
        })),
        reason::LOG_FULL => Decoded::On(Exit::LogFull),
        _ => other,
    }
}

/// The guest physical address that an extended walk was made for.
fn address() -> Gpa {
    Gpa::new(instr::field(ro::GUEST_PHYSICAL_ADDR_FULL))
}

fn violation(qualification: u64) -> NestedFault {
    let violation = EptViolation::from_bits_retain(qualification);
    let known = violation.contains(EptViolation::LINEAR_VALID);
    NestedFault {
        gpa: address(),
        linear: known.then(|| instr::field(ro::GUEST_LINEAR_ADDR)),
        raw: RawFault::Violation(violation),
    }
}

/// Interruption information: vector 7:0, type 10:8 (2: NMI, 3: exception).
fn exception(qualification: u64) -> Decoded {
    let information = instr::field(ro::VMEXIT_INTERRUPTION_INFO);
    let vector = information & 0xff;
    match information >> 8 & 7 {
        // More of them are blocked until an IRET: that of the next interrupt's handler.
        2 => Decoded::On(Exit::Nmi),
        3 if vector == u64::from(PAGE_FAULT) => Decoded::On(Exit::PageFault {
            address: qualification,
            code: instr::field(ro::VMEXIT_INTERRUPTION_ERR_CODE),
        }),
        _ => Decoded::On(Exit::Other { reason: reason::EXCEPTION_OR_NMI, detail: information }),
    }
}

/// Qualification: register 3:0, kind 5:4 (0: a write, 1: a read), general register 11:8.
fn control_register(qualification: u64, gpr: &[u64; 16]) -> Option<Decoded> {
    let register = (qualification & 0xf) as u8;
    let general = (qualification >> 8 & 0xf) as usize;
    match qualification >> 4 & 3 {
        0 => {
            let value = if general == RSP { instr::field(guest::RSP) } else { *gpr.get(general)? };
            Some(Decoded::On(Exit::ControlWrite { register, value }))
        }
        1 if register == 3 => Some(Decoded::ReadCr3 { register: general }),
        _ => None,
    }
}

/// Qualification: size less one 2:0, input 3, string 4, port 31:16.
fn output(qualification: u64, gpr: &[u64; 16]) -> Option<Decoded> {
    if qualification & 0x18 != 0 {
        return None;
    }
    let size = (qualification & 7) as u8 + 1;
    let value = gpr[RAX] as u32;
    let value = if size == 4 { value } else { value & ((1 << (8 * size)) - 1) };
    Some(Decoded::Behind(Exit::Out { port: (qualification >> 16) as u16, size, value }))
}

/// An instruction error in words (SDM 3C 31.4).
pub const fn spelled(error: u64) -> &'static str {
    match error {
        1 => "VMCALL executed in VMX root operation",
        2 => "VMCLEAR with an invalid physical address",
        3 => "VMCLEAR with the VMXON pointer",
        4 => "VMLAUNCH with a VMCS that is not clear",
        5 => "VMRESUME with a VMCS that is not launched",
        6 => "VMRESUME after VMXOFF and VMXON",
        7 => "VM entry with invalid control fields",
        8 => "VM entry with invalid host-state fields",
        9 => "VMPTRLD with an invalid physical address",
        10 => "VMPTRLD with the VMXON pointer",
        11 => "VMPTRLD with a wrong VMCS revision",
        12 => "VMREAD or VMWRITE of a field that does not exist",
        13 => "VMWRITE of a read-only field",
        15 => "VMXON in VMX root operation",
        26 => "VM entry with events blocked by MOV SS",
        28 => "an invalid operand of INVEPT or INVVPID",
        super::instr::NO_VMCS => "there is no current VMCS",
        _ => "an error of another number",
    }
}

/// An exit reason of a failed entry in words (SDM 3C 27.8).
pub const fn entry_failure(reason: u64) -> &'static str {
    match reason & 0xffff {
        33 => "the guest state is invalid",
        34 => "an MSR could not be loaded",
        41 => "a machine check",
        _ => "a reason of another number",
    }
}
