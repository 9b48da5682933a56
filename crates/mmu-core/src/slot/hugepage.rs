//! How large a page a slot's geometry allows (KVM row 6.14).
//!
//! Recomputed from three words whenever it is asked for, instead of kept per block of every slot.
//! The counters of row 6.14 (shadowed tables, tracked pages) belong to shadow paging and only ever
//! lower the answer, as do dirty logging and the host's own page size. No state, no ordering.

use crate::addr::{Gfn, GfnRange, Level};
use crate::slot::Memslot;

/// The largest leaf level, at most `cap`, at which one entry may map `gfn`.
///
/// Above level 1 the whole naturally aligned block around `gfn` must lie inside the slot, and the
/// slot's guest and host addresses must be congruent: else one entry would need host memory that
/// starts in the middle of a huge page. Level 1 is always allowed, also for a gfn outside the slot.
#[inline]
#[must_use]
pub fn max_level(slot: &Memslot, gfn: Gfn, cap: Level) -> Level {
    let mut level = cap.min(Level::MAX_LEAF);
    // Strictly down, so at most two rounds before level 1.
    while let Some(below) = level.down() {
        if is_allowed(slot, gfn, level) {
            break;
        }
        level = below;
    }
    level
}

/// May one entry at `level` map the block around `gfn`?
fn is_allowed(slot: &Memslot, gfn: Gfn, level: Level) -> bool {
    // INVARIANT[I12]: aligned alike on both sides, and inside one slot.
    let congruent = Gfn::new(slot.base_gfn.get() ^ slot.hva_page()).is_aligned(level);
    congruent && slot.range().covers(GfnRange::entry(gfn, level))
}
