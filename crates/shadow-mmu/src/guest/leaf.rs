//! One guest entry by itself: what a leaf at level 1 says, for shadows that follow it.
//!
//! Adds to [`GuestWalker`] what synchronising a page needs (KVM row 4.34): no walk, no request,
//! only the entry. Pure values.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Level};

use super::memory::EntryWidth;
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

impl GuestWalker {
    /// Size of an entry.
    pub(crate) const fn width(&self) -> EntryWidth {
        self.rules().width
    }

    /// The table that a CR3 names.
    pub(crate) const fn table(&self, cr3: u64) -> Gfn {
        Gfn::containing(self.rules().table(cr3))
    }

    /// Does bit 7 of a level-2 entry make it a page?
    pub(crate) fn has_large_pages(&self) -> bool {
        self.rules().is_leaf(Level::L2, 1 << 7)
    }

    /// Does the format have a no-execute bit?
    pub(crate) fn has_no_execute(&self) -> bool {
        let no_execute = 1 | 1 << 63;
        self.width() == EntryWidth::Eight && !self.rules().is_rejected(Level::L1, no_execute)
    }

    /// What an entry at level 1 of a table says; `None` if it is not present or rejected.
    pub(crate) fn leaf(&self, value: u64) -> Option<GuestLeaf> {
        let rules = self.rules();
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
