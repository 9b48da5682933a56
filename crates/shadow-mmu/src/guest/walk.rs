//! What a walk over guest tables found, or the fault it raised.
//!
//! A walker reads each entry once an attempt and keeps it in the [`WalkPath`] it returns; whoever
//! acts on the walk compares the entries again before trusting it (invariant I19). Values only.

use core::fmt;

use arrayvec::ArrayVec;

use mmu_core::access::{Access, EptViolation, NpfInfo, PfErrorCode};
use mmu_core::addr::{Gfn, Gpa, Gva, Level, PAGE_SIZE};

use super::memory::{EntryWidth, GuestMem};

/// Tables on the way to a page at most.
pub const MAX_WALK_LEVELS: usize = Level::ALL.len();

/// A guest entry as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestEntry {
    /// Where it stands in the memory that the walker reads. For a two-dimensional walk that is the
    /// guest hypervisor's physical memory, not the nested guest's.
    pub gpa: Gpa,
    /// Level of the table it stands in.
    pub level: Level,
    /// Its size in memory.
    pub width: EntryWidth,
    /// What the entries above it permit together, itself not counted: the access of the role that a
    /// shadow of its table gets (KVM row 4.6).
    pub above: Access,
    /// The value; a 4-byte entry is zero-extended. Accessed and dirty bits that the walk has set
    /// are in it.
    pub value: u64,
}

impl GuestEntry {
    /// Does memory still hold this value (KVM row 4.18)? Memory that is gone holds nothing.
    #[must_use]
    pub fn is_current<M: GuestMem + ?Sized>(&self, mem: &M) -> bool {
        mem.read(self.gpa, self.width) == Ok(self.value)
    }
}

/// What the guest's leaf says about writes so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dirtiness {
    /// Its dirty bit is set.
    Dirty,
    /// Its dirty bit is clear: the first write must be noticed (KVM row 4.12).
    Clean,
    /// The format, or the guest's choice, has no dirty bits.
    Untracked,
}

/// What one entry says by itself, for whoever looks at a table entry by entry (synchronisation,
/// prefetch; KVM rows 4.34, 4.55).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryMeaning {
    /// Not present: no other bit counts.
    Absent,
    /// Present with a reserved bit, or misconfigured.
    Rejected,
    /// It leads to a table of the level below.
    Table {
        /// Where the table stands.
        table: Gpa,
        /// What it permits.
        access: Access,
    },
    /// It maps a page.
    Page {
        /// First frame of the page.
        gfn: Gfn,
        /// What it permits.
        access: Access,
        /// It was used: only then may it be mapped before it is used again. Always true in formats
        /// without accessed bits.
        accessed: bool,
        /// Its dirty bit.
        dirty: Dirtiness,
    },
}

/// The way to a page through one dimension of tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalkPath {
    /// The entries read, root first; the last one is the leaf. Without those of PAE's pointer
    /// table, which stand in registers; empty without paging.
    pub entries: ArrayVec<GuestEntry, MAX_WALK_LEVELS>,
    /// The frame of 4 KiB that the address leads to.
    pub gfn: Gfn,
    /// Size of the guest's page. A 4 MiB page counts as [`Level::L2`]; without paging nothing is
    /// larger than that either (KVM row 4.61).
    pub level: Level,
    /// What all entries on the way permit together.
    pub access: Access,
    /// The leaf's dirty bit, after the walk.
    pub dirty: Dirtiness,
    /// Reads of memory that the last attempt took, those of nested tables included.
    pub loads: u32,
    /// Attempts, the last one included; others changed an entry in the earlier ones.
    pub attempts: u32,
}

impl WalkPath {
    /// `access` without writes if the leaf is clean: what may be mapped so that the first write
    /// still faults and sets the dirty bit (KVM row 4.12).
    #[must_use]
    pub fn clean_access(&self) -> Access {
        match self.dirty {
            Dirtiness::Clean => self.access.difference(Access::WRITE),
            Dirtiness::Dirty | Dirtiness::Untracked => self.access,
        }
    }
}

/// A translation of a linear address by the guest's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestWalk {
    /// The linear address translated.
    pub gva: Gva,
    /// How.
    pub path: WalkPath,
}

impl GuestWalk {
    /// The physical address that it leads to.
    #[must_use]
    pub const fn gpa(&self) -> Gpa {
        Gpa::new(self.path.gfn.address().get() | (self.gva.get() & (PAGE_SIZE - 1)))
    }
}

/// A translation of a nested guest's physical address by its hypervisor's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NestedWalk {
    /// The nested guest's address.
    pub gpa: Gpa,
    /// How; the gfn is the hypervisor's.
    pub path: WalkPath,
}

impl NestedWalk {
    /// The hypervisor's physical address that it leads to.
    #[must_use]
    pub const fn target(&self) -> Gpa {
        Gpa::new(self.path.gfn.address().get() | (self.gpa.get() & (PAGE_SIZE - 1)))
    }
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An entry is not present, or the tables do not reach that far.
    NotPresent,
    /// A table is not in memory. The guest sees the fault of an entry that is not present.
    NotMemory,
    /// A reserved bit is set; in EPT, any misconfiguration.
    Reserved,
    /// All entries are there and together do not permit the access.
    Permission,
    /// The page would become dirty and the guest hypervisor's log is full.
    LogFull,
}

/// A fault that the guest must see (KVM row 4.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestFault {
    /// What goes into CR2.
    pub gva: Gva,
    /// The error code of the #PF.
    pub code: PfErrorCode,
    /// Level of the entry that stopped the walk.
    pub level: Level,
    /// Why.
    pub cause: Cause,
}

/// How a nested fault is shown to the guest hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedReport {
    /// EPT violation with its exit qualification.
    EptViolation(EptViolation),
    /// EPT misconfiguration, which has no qualification.
    EptMisconfig,
    /// Nested page fault with EXITINFO1.
    Npf(NpfInfo),
    /// Page-modification log full.
    LogFull,
}

/// A fault that the guest hypervisor must see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedFault {
    /// The nested guest's physical address that has no translation: the guest-physical-address
    /// field, or EXITINFO2.
    pub gpa: Gpa,
    /// Level of the entry that stopped the walk.
    pub level: Level,
    /// Why.
    pub cause: Cause,
    /// What the hypervisor reads.
    pub report: NestedReport,
}

/// Why a linear address was not translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// A page fault for the guest.
    Fault(GuestFault),
    /// In a two-dimensional walk: a fault for the guest hypervisor.
    Nested {
        /// The linear address, for the guest-linear-address field.
        gva: Gva,
        /// The fault.
        fault: NestedFault,
    },
    /// The address is not canonical, or beyond 4 GiB outside long mode: #GP or #SS, not #PF.
    NotCanonical {
        /// The address.
        gva: Gva,
    },
    /// Entries changed under every attempt. Nothing is wrong: let the vCPU try again.
    Contended {
        /// The address.
        gva: Gva,
    },
    /// The root is of another mode than the walker.
    WrongRoot,
}

impl fmt::Display for WalkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault) => {
                let (gva, level) = (fault.gva, fault.level);
                let code = fault.code.bits();
                write!(f, "#PF {code:#x} at {gva}: {:?} at level {level}", fault.cause)
            }
            Self::Nested { gva, fault } => {
                write!(f, "{gva}: {:?} at {}: {:?}", fault.cause, fault.gpa, fault.report)
            }
            Self::NotCanonical { gva } => write!(f, "{gva} is not canonical"),
            Self::Contended { gva } => write!(f, "{gva}: entries changed under every attempt"),
            Self::WrongRoot => f.write_str("the root is of another paging mode"),
        }
    }
}

impl core::error::Error for WalkError {}

/// Why a nested guest's physical address was not translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedError {
    /// A fault for the guest hypervisor.
    Fault(NestedFault),
    /// Entries changed under every attempt. Nothing is wrong: let the vCPU try again.
    Contended {
        /// The address.
        gpa: Gpa,
    },
}

impl fmt::Display for NestedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault) => {
                write!(f, "{:?} at {}: {:?}", fault.cause, fault.gpa, fault.report)
            }
            Self::Contended { gpa } => write!(f, "{gpa}: entries changed under every attempt"),
        }
    }
}

impl core::error::Error for NestedError {}
