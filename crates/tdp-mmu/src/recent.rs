//! The table that a vCPU's last fault ended in: faults come in neighbourhoods.
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
use mmu_core::sync::ENTRY_BITS;

/// A table, by frame, and when it was linked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recent {
    /// What the gfns of the table have in common, and its level: see [`place`].
    place: u64,
    frame: Pfn,
    unlinked: u64,
    level: Level,
}

impl Recent {
    /// None: no table has this place.
    pub(crate) const NONE: Self =
        Self { place: u64::MAX, frame: Pfn::new(0), unlinked: 0, level: Level::L1 };

    /// The table that has the entry for `gfn`, or leads to it. `unlinked` was read in this section.
    #[inline(always)]
    pub(crate) fn table(&self, gfn: Gfn, unlinked: u64) -> Option<(Pfn, Level)> {
        self.table_at(gfn, self.level, unlinked).map(|frame| (frame, self.level))
    }

    /// The same, if it is a table of `level`.
    #[inline(always)]
    pub(crate) fn table_at(&self, gfn: Gfn, level: Level, unlinked: u64) -> Option<Pfn> {
        // Not one after the other: they agree, as a rule.
        let differs = self.place ^ place(gfn, level);
        let since =
            if mmu_core::busted!("trust_recent_table") { 0 } else { self.unlinked ^ unlinked };
        let differs = differs | since;
        (differs == 0).then_some(self.frame)
    }

    /// A walk ended in the table in `frame`. `unlinked` was read in this section, before the walk.
    #[inline(always)]
    pub(crate) fn note(&mut self, gfn: Gfn, (frame, level): (Pfn, Level), unlinked: u64) {
        *self = Self { place: place(gfn, level), frame, unlinked, level };
    }
}

/// The gfn of a table at `level` without the bits below its reach, and the level in the low bits.
/// A gfn has at most 52 bits.
#[inline(always)]
fn place(gfn: Gfn, level: Level) -> u64 {
    (gfn.get() >> (level.shift() + ENTRY_BITS)) << 3 | u64::from(level.number())
}
