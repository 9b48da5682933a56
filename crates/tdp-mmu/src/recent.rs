//! The level-1 table that a vCPU's last fault ended in: faults come in neighbourhoods.
//!
//! Owns [`Recent`], one per vCPU: the frame of that table, so that the next fault there need not
//! wait for the loads of a walk, one after the other, once its section is open. It is a frame
//! number, not a reference, and is worth something only together with
//! [`TablePool::unlinked`](mmu_core::frame::TablePool::unlinked), the count of tables taken out of
//! live trees, read inside the section:
//!
//! - The count is what it was when the table was found linked: then it was still linked when our
//!   section was announced, or its remover has yet to count it. A remover counts before it starts
//!   the grace period after which the frame may be reused, and both sides fence in between (tag
//!   `epoch-dekker`), so the remover sees our section and waits for it. What we may meet is a table
//!   that is being taken apart, which any walk may meet: its entries are FROZEN.
//! - The count is another one: walk.
//!
//! Trees of roots that became invalid are not counted. Their vCPUs find the root invalid in the
//! same section, and forget the table with the root.

use mmu_core::addr::{Gfn, Level, Pfn};

/// A level-1 table, by frame, and when it was linked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recent {
    base: Gfn,
    frame: Pfn,
    unlinked: u64,
}

impl Recent {
    /// None: no table has this gfn.
    pub(crate) const NONE: Self =
        Self { base: Gfn::new(u64::MAX), frame: Pfn::new(0), unlinked: 0 };

    /// The frame of the table that has the entry for `gfn`. `unlinked` was read in this section.
    #[inline(always)]
    pub(crate) fn frame(&self, gfn: Gfn, unlinked: u64) -> Option<Pfn> {
        let same = self.base == gfn.align_down(Level::L2);
        #[cfg(not(busted = "trust_recent_table"))]
        let same = same && self.unlinked == unlinked;
        #[cfg(busted = "trust_recent_table")]
        let _ = (self.unlinked, unlinked);
        same.then_some(self.frame)
    }

    /// A walk ended in the table in `frame`. `unlinked` was read in this section, before the walk.
    #[inline(always)]
    pub(crate) fn note(&mut self, gfn: Gfn, frame: Pfn, unlinked: u64) {
        *self = Self { base: gfn.align_down(Level::L2), frame, unlinked };
    }
}
