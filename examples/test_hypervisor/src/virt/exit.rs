//! Why a guest stopped, in words that both extensions share.
//!
//! Owns [`Exit`] and [`NestedFault`]. What hardware said is kept beside what it means
//! ([`RawFault`]), so that suites can check the decoding and hand the original to the MMU. Values
//! only; no locks.

use core::fmt;

use mmu_core::access::{Access, EptViolation, NpfInfo};
use mmu_core::addr::Gpa;
use mmu_core::fault::PageFault;

/// Why a nested walk ended without a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An entry was not present.
    NotPresent,
    /// The entries are present and do not permit the access.
    Protection,
    /// A reserved bit was set (SVM; the access is known).
    Reserved,
    /// The entry is one that the format does not know (VMX; nothing is known but the address).
    Misconfigured,
}

/// Which access of the guest the nested walk was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// To one of the guest's own page tables.
    GuestTable,
    /// To the address that those led to.
    Final,
    /// Hardware does not say (misconfigurations).
    Unknown,
}

/// What hardware said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawFault {
    /// EXITINFO1 of a nested page fault.
    Npf(NpfInfo),
    /// Exit qualification of an EPT violation.
    Violation(EptViolation),
    /// An EPT misconfiguration, which has no qualification.
    Misconfiguration,
}

/// The nested walk failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedFault {
    /// The guest physical address.
    pub gpa: Gpa,
    /// The linear address that led to it, where hardware reports one.
    pub linear: Option<u64>,
    /// What hardware said of it.
    pub raw: RawFault,
}

impl NestedFault {
    /// The fault as the MMU takes it.
    pub const fn page_fault(&self) -> PageFault {
        match self.raw {
            RawFault::Npf(info) => PageFault::from_npf(self.gpa, info),
            RawFault::Violation(qualification) => PageFault::from_ept(self.gpa, qualification),
            RawFault::Misconfiguration => PageFault::from_ept_misconfiguration(self.gpa),
        }
    }

    /// What was wanted: exactly one of READ, WRITE, EXEC.
    pub const fn access(&self) -> Access {
        self.page_fault().access().difference(Access::USER)
    }

    /// Why it failed.
    pub const fn cause(&self) -> Cause {
        use mmu_core::access::PfErrorCode as Code;
        let code = self.page_fault().code;
        match self.raw {
            RawFault::Misconfiguration => Cause::Misconfigured,
            _ if code.contains(Code::RESERVED) => Cause::Reserved,
            _ if code.contains(Code::PRESENT) => Cause::Protection,
            _ => Cause::NotPresent,
        }
    }

    /// For which access.
    pub const fn stage(&self) -> Stage {
        use mmu_core::access::PfErrorCode as Code;
        let code = self.page_fault().code;
        if code.contains(Code::GUEST_FINAL) {
            Stage::Final
        } else if code.contains(Code::GUEST_TABLE) {
            Stage::GuestTable
        } else {
            Stage::Unknown
        }
    }
}

impl fmt::Display for NestedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let raw = match self.raw {
            RawFault::Npf(info) => info.bits(),
            RawFault::Violation(qualification) => qualification.bits(),
            RawFault::Misconfiguration => 0,
        };
        let (cause, stage, access) = (self.cause(), self.stage(), self.access());
        write!(f, "{access:?} of {} {cause:?} {stage:?} ({raw:#x})", self.gpa)
    }
}

/// Why a guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The nested walk failed.
    Nested(NestedFault),
    /// An OUT instruction; `value` is the part of RAX that it writes.
    Out {
        /// The port.
        port: u16,
        /// Bytes written: 1, 2, 4.
        size: u8,
        /// What was written.
        value: u32,
    },
    /// HLT.
    Halt,
    /// VMMCALL or VMCALL.
    Call,
    /// CPUID.
    Cpuid,
    /// The guest's own page fault, not delivered to it.
    PageFault {
        /// The linear address.
        address: u64,
        /// The error code.
        code: u64,
    },
    /// A write of a control register (shadow paging only), not done.
    ControlWrite {
        /// Which: 0, 3, 4.
        register: u8,
        /// The value, where hardware says; RAX holds it otherwise (the guest programs use RAX).
        value: u64,
    },
    /// INVLPG (shadow paging only), not done.
    InvalidatePage {
        /// The linear address, where hardware says; RDI holds it otherwise.
        address: u64,
    },
    /// An interrupt for the host, handled.
    Interrupt,
    /// An NMI for the host.
    Nmi,
    /// Triple fault.
    Shutdown,
    /// The hardware log is full.
    LogFull,
    /// The extension refused to enter the guest.
    Invalid {
        /// What the machine had to say about it.
        value: u64,
    },
    /// Anything else: the extension's own exit number.
    Other {
        /// The number.
        reason: u64,
        /// Its qualification, or EXITINFO1.
        detail: u64,
    },
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nested(fault) => fault.fmt(f),
            other => write!(f, "{other:x?}"),
        }
    }
}
