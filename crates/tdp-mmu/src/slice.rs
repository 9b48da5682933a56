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

/// What is to become of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plan {
    /// It is worked on.
    Visit,
    /// It is left out with all below it, and so are the entries after it in its table: as many as
    /// this says, itself included. Each counts as one.
    Skip(usize),
    /// The walk ends before it.
    Stop,
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
    iter: TdpIter<'g, H>,
    range: GfnRange,
    mut visit: impl FnMut(Found<'g>) -> Visit,
) -> Option<Cursor> {
    let plan = |(): &mut (), _: &TdpIter<'g, H>, _: &Step<'_>, _| Plan::Visit;
    run_planned(stats, iter, range, &mut (), plan, |(), found| visit(found))
}

/// The same with a question before each entry, which is told how many entries of a level-1 table a
/// visit would read, and how many there is room for in the slice; it is asked once in each slice
/// that comes to the entry. Both work on `work`. A walk that is stopped is suspended at the entry.
#[inline(always)]
pub(crate) fn run_planned<'g, H: Host, W>(
    stats: &StatsShard,
    mut iter: TdpIter<'g, H>,
    range: GfnRange,
    work: &mut W,
    mut plan: impl FnMut(&mut W, &TdpIter<'g, H>, &Step<'g>, [usize; 2]) -> Plan,
    mut visit: impl FnMut(&mut W, Found<'g>) -> Visit,
) -> Option<Cursor> {
    let mut visited = 0;
    while let Some(mut step) = iter.next() {
        let mut table = iter.leaf_table(&step, range);
        if visited == SLICE_ENTRIES {
            // Before the step is worked on: the walk comes back to it.
            match iter.suspend() {
                Ok(cursor) => return pause(stats, visited, cursor),
                Err(same) => iter = same,
            }
        }
        let below = table.as_ref().map_or(0, |table| table.count);
        match plan(work, &iter, &step, [below, SLICE_ENTRIES.saturating_sub(visited)]) {
            Plan::Visit => {}
            Plan::Skip(entries) => {
                iter.skip_entries(entries);
                visited += entries;
                continue;
            }
            Plan::Stop => return pause(stats, visited, iter.cursor()),
        }
        loop {
            let here = usize::from(!step.spte.is_table(step.level));
            let count = table.as_ref().map_or(here, |table| table.count);
            if visited != 0 && visited + count > SLICE_ENTRIES {
                match iter.suspend() {
                    Ok(cursor) => return pause(stats, visited, cursor),
                    Err(same) => iter = same,
                }
            }
            let is_table = table.is_some();
            let end = visit(work, table.map_or(Found::Entry(step), Found::Table)) == Visit::Done;
            if end || is_table {
                visited += count;
                break;
            }
            step.spte = step.cell.load();
            table = iter.leaf_table(&step, range);
            if table.is_none() {
                visited += count;
                break;
            }
        }
    }
    stats.max(Counter::MaxSlice, to_u64(visited));
    None
}

fn pause(stats: &StatsShard, visited: usize, cursor: Cursor) -> Option<Cursor> {
    stats.max(Counter::MaxSlice, to_u64(visited));
    Some(cursor)
}
