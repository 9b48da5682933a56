//! One guest entry by itself: what a leaf at level 1 says, for shadows that follow it.
//!
//! Owns [`EntryFormat`]: what synchronising a page needs (KVM row 4.34): no walk, no request,
//! only the entry. Pure values.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Level};

use super::memory::EntryWidth;
use super::mode::PagingMode;
use super::nested::NestedWalker;
use super::rules::Rules;
use super::walker::GuestWalker;

/// A present leaf at level 1 without a reserved bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestLeaf {
    /// The frame that it maps.
    pub(crate) gfn: Gfn,
    /// What it permits by itself.
    pub(crate) access: Access,
    /// A is set, or the format has none.
    pub(crate) accessed: bool,
    /// The format has D and it is clear.
    pub(crate) clean: bool,
}

/// How entries of a guest's tables are read, whichever dimension they belong to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryFormat<'w>(&'w Rules);

impl GuestWalker {
    /// Its tables' format.
    pub(crate) const fn format(&self) -> EntryFormat<'_> {
        EntryFormat(self.rules())
    }
}

impl NestedWalker {
    /// Its tables' format.
    pub(crate) const fn format(&self) -> EntryFormat<'_> {
        EntryFormat(self.rules())
    }
}

impl EntryFormat<'_> {
    /// The paging mode.
    pub(crate) const fn mode(self) -> PagingMode {
        self.0.mode
    }

    /// Has it accessed and dirty bits?
    pub(crate) const fn has_accessed(self) -> bool {
        self.0.accessed != 0
    }

    /// Is execution of two kinds?
    pub(crate) const fn is_mode_based(self) -> bool {
        self.0.is_mode_based()
    }

    /// Size of an entry.
    pub(crate) const fn width(self) -> EntryWidth {
        self.0.width
    }

    /// The table that a CR3 names.
    pub(crate) const fn table(self, cr3: u64) -> Gfn {
        Gfn::containing(self.0.table(cr3))
    }

    /// Does bit 7 of a level-2 entry make it a page?
    pub(crate) fn has_large_pages(self) -> bool {
        self.0.is_leaf(Level::L2, 1 << 7)
    }

    /// Does the format have a no-execute bit?
    pub(crate) fn has_no_execute(self) -> bool {
        let no_execute = 1 | 1 << 63;
        self.width() == EntryWidth::Eight && !self.0.is_rejected(Level::L1, no_execute)
    }

    /// What an entry at level 1 of a table says; `None` if it is not present or rejected.
    pub(crate) fn leaf(self, value: u64) -> Option<GuestLeaf> {
        let rules = self.0;
        if !rules.is_present(value) || rules.is_rejected(Level::L1, value) {
            return None;
        }
        Some(GuestLeaf {
            gfn: rules.frame(Level::L1, value, 0),
            access: rules.access(value),
            accessed: rules.accessed == 0 || value & rules.accessed != 0,
            clean: rules.dirty != 0 && value & rules.dirty == 0,
        })
    }
}
