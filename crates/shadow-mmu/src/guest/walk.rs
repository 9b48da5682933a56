//! What a walk over the guest's tables found, or the fault it raises.
//!
//! A walker reads each entry once, keeps it in the [`GuestWalk`] it returns, and whoever acts on
//! the walk compares the entries again before trusting it (invariant I19).

use arrayvec::ArrayVec;

use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, Gpa, Gva, Level};

/// Tables on the way to a page at most.
pub const MAX_WALK_LEVELS: usize = Level::ALL.len();

/// A guest entry as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestEntry {
    /// Where it stands.
    pub gpa: Gpa,
    /// Level of the table it stands in.
    pub level: Level,
    /// The value; a 4-byte entry is zero-extended.
    pub value: u64,
}

/// A translation by the guest's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestWalk {
    /// The linear address translated.
    pub gva: Gva,
    /// The entries read, root first; the last one is the leaf.
    pub entries: ArrayVec<GuestEntry, MAX_WALK_LEVELS>,
    /// The guest frame it leads to.
    pub gfn: Gfn,
    /// Size of the guest's page.
    pub level: Level,
    /// What all entries on the way permit together.
    pub access: Access,
}

impl GuestWalk {
    /// Memory reads the walk took.
    #[must_use]
    pub fn reads(&self) -> usize {
        self.entries.len()
    }
}

/// A fault that the guest must see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestFault {
    /// What goes into CR2.
    pub gva: Gva,
    /// The error code of the #PF.
    pub code: PfErrorCode,
    /// Level of the entry that stopped the walk.
    pub level: Level,
}
