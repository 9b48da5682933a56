//! Page faults as the MMU sees them, and what comes of them.
//!
//! Owns [`PageFault`] (the decoded exit), [`FaultOutcome`] (KVM's RET_PF_*, rows 0.3.1 to 0.3.7)
//! and [`FaultError`] (row 0.3.8). Outcomes are values the vCPU loop acts on; errors are what no
//! retry mends.

use core::fmt;

use crate::access::{Access, EptViolation, NpfInfo, PfErrorCode};
use crate::addr::{Gfn, Gpa, Level, Pfn};
use crate::dead::DeadReason;
use crate::frame::OutOfFrames;
use crate::traits::ResolveError;

/// Which memory an access is to, where a VM has both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Privacy {
    /// Memory shared with the host. What VMs without private memory access.
    #[default]
    Shared,
    /// Memory private to the guest.
    #[doc(alias = "PFERR_PRIVATE_ACCESS")]
    Private,
    /// Whichever the page's attributes say: for accesses that are not the guest's.
    AsMarked,
}

impl Privacy {
    /// Is an access to a page that is private, or is not, to the other kind of memory?
    #[inline]
    #[must_use]
    pub const fn differs(self, private: bool) -> bool {
        match self {
            Self::Shared => private,
            Self::Private => !private,
            Self::AsMarked => false,
        }
    }
}

/// A fault on a guest physical address.
#[doc(alias = "kvm_page_fault")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The address.
    pub gpa: Gpa,
    /// What hardware said, in the common vocabulary.
    pub code: PfErrorCode,
    /// Largest page to map; [`Level::L1`] asks for 4 KiB.
    pub max_level: Level,
    /// Nobody accessed the page yet: the entry is made without the accessed bit.
    pub prefetch: bool,
    /// Which memory the access is to.
    pub privacy: Privacy,
}

impl PageFault {
    /// A fault with the given code that may map up to 1 GiB.
    #[inline]
    #[must_use]
    pub const fn new(gpa: Gpa, code: PfErrorCode) -> Self {
        let privacy = Privacy::Shared;
        Self { gpa, code, max_level: Level::MAX_LEAF, prefetch: false, privacy }
    }

    /// From the exit qualification of an EPT violation.
    #[must_use]
    pub const fn from_ept(gpa: Gpa, qualification: EptViolation) -> Self {
        Self::new(gpa, qualification.to_error_code())
    }

    /// From EXITINFO1 of a nested page fault.
    #[must_use]
    pub const fn from_npf(gpa: Gpa, info: NpfInfo) -> Self {
        Self::new(gpa, info.to_error_code())
    }

    /// From an EPT misconfiguration exit, which does not say what kind of access it was. An MMIO
    /// entry causes it (KVM row 1.34), or an entry that should not be.
    #[doc(alias = "handle_ept_misconfig")]
    #[must_use]
    pub const fn from_ept_misconfiguration(gpa: Gpa) -> Self {
        Self::new(gpa, PfErrorCode::RESERVED)
    }

    /// A page the guest has not touched (KVM row 3.57).
    #[must_use]
    pub const fn prefetch(gpa: Gpa, access: Access) -> Self {
        let code =
            if access.contains(Access::WRITE) { PfErrorCode::WRITE } else { PfErrorCode::empty() };
        Self { prefetch: true, privacy: Privacy::AsMarked, ..Self::new(gpa, code) }
    }

    /// The same to private memory (KVM row 3.17): the address had the bit that says so, which is
    /// not part of [`gpa`](Self::gpa).
    #[must_use]
    pub const fn private(self) -> Self {
        Self { privacy: Privacy::Private, ..self }
    }

    /// The same, mapping at most `level`.
    #[must_use]
    pub const fn at_most(self, level: Level) -> Self {
        Self { max_level: level, ..self }
    }

    /// The guest frame.
    #[inline]
    #[must_use]
    pub const fn gfn(&self) -> Gfn {
        Gfn::containing(self.gpa)
    }

    /// What the access needs.
    #[inline]
    #[must_use]
    pub const fn access(&self) -> Access {
        self.code.access()
    }
}

/// What a handled fault means for the vCPU.
#[doc(alias = "RET_PF_FIXED")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub enum FaultOutcome {
    /// This call installed or changed the entry; enter the guest.
    Fixed,
    /// The entry already allowed the access (another vCPU won, or a stale TLB entry); enter.
    Spurious,
    /// A race was lost or the root is stale; enter after loading the root, the fault may recur.
    Retry,
    /// No memory there that can be mapped: emulate the access.
    Emulate(EmulateReason),
    /// The gfn is write-protected for shadowing: unprotect or emulate.
    WriteProtected,
    /// The vCPU's dirty ring is full, so nothing was made writable: have it harvested and reset,
    /// then try again (KVM row 3.47).
    #[doc(alias = "KVM_EXIT_DIRTY_RING_FULL")]
    RingFull,
}

/// Why an access must be emulated; names the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EmulateReason {
    /// No memory slot holds the gfn: device memory, or nothing.
    NoSlot {
        /// The guest frame.
        gfn: Gfn,
        /// The address space searched.
        space: u16,
    },
    /// A write to memory that the slot or the host has read-only.
    ReadOnly {
        /// The guest frame.
        gfn: Gfn,
        /// The slot that holds it.
        slot: u16,
    },
    /// An access that the configuration forbids for the page, such as a fetch where nothing may be
    /// executed.
    Denied {
        /// The guest frame.
        gfn: Gfn,
    },
}

impl fmt::Display for EmulateReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoSlot { gfn, space } => {
                write!(f, "no slot of address space {space} holds gfn {gfn}")
            }
            Self::ReadOnly { gfn, slot } => {
                write!(f, "write to gfn {gfn} of slot {slot}, which is read-only")
            }
            Self::Denied { gfn } => write!(f, "gfn {gfn} does not permit such an access"),
        }
    }
}

/// A fault that no retry mends. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultError {
    /// The address is beyond what tables of this configuration can map (KVM row 1.39).
    BeyondPhysical {
        /// The address.
        gpa: Gpa,
        /// First gfn that cannot be mapped.
        max_gfn: Gfn,
    },
    /// `max_level` is a level that has no leaves.
    NotALeafLevel {
        /// The level asked for.
        level: Level,
    },
    /// No frame for a table. Nothing is held; add frames and try again.
    OutOfFrames(OutOfFrames),
    /// The host has no page to give.
    Resolve {
        /// The guest frame.
        gfn: Gfn,
        /// Why.
        source: ResolveError,
    },
    /// The resolver gave a page that cannot stand in an entry.
    BadHostPage {
        /// The guest frame.
        gfn: Gfn,
        /// The host frame number it gave.
        pfn: u64,
    },
    /// The gfn is mapped to another page, and no invalidation came before the resolver changed its
    /// answer: the host broke the contract of [`crate::traits::PfnResolver`]. Unmap the gfn.
    StaleMapping {
        /// The guest frame.
        gfn: Gfn,
        /// The page it is mapped to.
        mapped: Pfn,
        /// The page the resolver gave.
        resolved: Pfn,
    },
    /// The guest accessed as private what is marked shared, or the other way round (KVM row 3.17).
    /// The VMM converts the page, or refuses.
    #[doc(alias = "KVM_EXIT_MEMORY_FAULT")]
    MemoryFault {
        /// First byte of what was accessed wrongly.
        gpa: Gpa,
        /// How many bytes.
        size: u64,
        /// Was the access to private memory?
        private: bool,
    },
    /// The external table refused what the fault asked of it (KVM row 3.10).
    External {
        /// First guest frame of the entry.
        gfn: Gfn,
        /// Level of the entry: above level 1 a table was to be linked.
        level: Level,
        /// What the external table said.
        code: u64,
    },
    /// The vCPU has no root loaded.
    NoRoot,
    /// A reserved bit was set in an entry of ours, or the entry is none: the tables are corrupt or
    /// the configuration does not describe this CPU. The VM is dead from now on.
    ReservedBit {
        /// The address.
        gpa: Gpa,
        /// Level of the entry; those above it are in order.
        level: Level,
        /// The entry found.
        spte: u64,
    },
    /// The VM was marked dead ([`VmCore::mark_dead`](crate::vm::VmCore::mark_dead)): do not run the
    /// guest, give its memory back.
    Dead {
        /// What happened.
        reason: DeadReason,
    },
}

impl From<OutOfFrames> for FaultError {
    fn from(error: OutOfFrames) -> Self {
        Self::OutOfFrames(error)
    }
}

impl fmt::Display for FaultError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BeyondPhysical { gpa, max_gfn } => {
                write!(f, "fault at {gpa}: the tables map gfns below {max_gfn}")
            }
            Self::NotALeafLevel { level } => write!(f, "{level} pages do not exist"),
            Self::OutOfFrames(error) => error.fmt(f),
            Self::Resolve { gfn, source } => write!(f, "gfn {gfn}: {source}"),
            Self::BadHostPage { gfn, pfn } => {
                write!(f, "gfn {gfn}: host frame {pfn:#x} is beyond the physical address width")
            }
            Self::StaleMapping { gfn, mapped, resolved } => {
                write!(f, "gfn {gfn} is mapped to {mapped} and was not unmapped for {resolved}")
            }
            Self::MemoryFault { gpa, size, private } => {
                let (accessed, marked) =
                    if *private { ("private", "shared") } else { ("shared", "private") };
                write!(f, "{size} bytes from {gpa} accessed as {accessed} are marked {marked}")
            }
            Self::External { gfn, level, code } => {
                write!(f, "the external table refused the {level} entry for {gfn}: {code:#x}")
            }
            Self::NoRoot => f.write_str("the vCPU has no root loaded"),
            Self::ReservedBit { gpa, level, spte } => {
                write!(f, "fault at {gpa}: reserved bit in our {level} entry {spte:#018x}")
            }
            Self::Dead { reason } => write!(f, "the VM is dead: {reason}"),
        }
    }
}

impl core::error::Error for FaultError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::OutOfFrames(error) => Some(error),
            Self::Resolve { source, .. } => Some(source),
            _ => None,
        }
    }
}
