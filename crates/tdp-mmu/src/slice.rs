//! Long walks in bounded slices: what every operation on a range is made of.
//!
//! Owns [`run`]: at most [`SLICE_ENTRIES`] entries between two points where others may proceed. The
//! links on the way to a table are not counted: each leads to entries that are.

use mmu_core::addr::{GfnRange, to_u64};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::traits::Host;

use crate::iter::{Cursor, LeafTable, Step, TdpIter};

/// Entries that a slice visits between two points where others may proceed.
pub const SLICE_ENTRIES: usize = 512;

/// What a walk with smallest level 2 comes to.
pub(crate) enum Found<'g> {
    /// A level-1 table, or the part of it inside the range.
    Table(LeafTable<'g>),
    /// An entry above level 1 that links no level-1 table; may be a leaf, empty or a link.
    Entry(Step<'g>),
}

/// Walk until the walk ends (`None`) or the slice is full. `visit` returns how many entries it
/// looked at besides.
#[inline(always)]
pub(crate) fn run<'g, H: Host>(
    stats: &StatsShard,
    mut iter: TdpIter<'g, H>,
    range: GfnRange,
    mut visit: impl FnMut(&TdpIter<'g, H>, Found<'g>) -> usize,
) -> Option<Cursor> {
    let mut visited = 0;
    while let Some(step) = iter.next() {
        let table = iter.leaf_table(&step, range);
        let here = usize::from(!step.spte.is_table(step.level));
        let count = table.as_ref().map_or(here, |table| table.count);
        if visited != 0 && visited + count > SLICE_ENTRIES {
            // Before the step is worked on: the walk comes back to it.
            match iter.suspend() {
                Ok(cursor) => {
                    stats.max(Counter::MaxSlice, to_u64(visited));
                    return Some(cursor);
                }
                Err(same) => iter = same,
            }
        }
        visited += count;
        visited += visit(&iter, table.map_or(Found::Entry(step), Found::Table));
    }
    stats.max(Counter::MaxSlice, to_u64(visited));
    None
}
