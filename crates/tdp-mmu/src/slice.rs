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

/// What became of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Visit {
    /// On to the next.
    Done,
    /// The entry may be another by now: a huge leaf that somebody split before it could be worked
    /// on, and whose children are in the range too.
    LookAgain,
}

/// Walk until the walk ends (`None`) or the slice is full.
#[inline(always)]
pub(crate) fn run<'g, H: Host>(
    stats: &StatsShard,
    mut iter: TdpIter<'g, H>,
    range: GfnRange,
    mut visit: impl FnMut(Found<'g>) -> Visit,
) -> Option<Cursor> {
    let mut visited = 0;
    while let Some(mut step) = iter.next() {
        loop {
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
            let is_table = table.is_some();
            let end = visit(table.map_or(Found::Entry(step), Found::Table)) == Visit::Done;
            if end || is_table {
                visited += count;
                break;
            }
            step.spte = step.cell.load();
            if iter.leaf_table(&step, range).is_none() {
                visited += count;
                break;
            }
        }
    }
    stats.max(Counter::MaxSlice, to_u64(visited));
    None
}
