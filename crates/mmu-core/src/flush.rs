//! Owed flushes as values.
//!
//! Owns [`FlushDebt`]: which ranges a change has made stale in TLBs, and which tables it unlinked.
//! Debts merge upward and are paid by [`VmCore::pay`](crate::vm::VmCore::pay), which asks the
//! embedder's [`TlbFlush`](crate::traits::TlbFlush), waits for completion, and only then retires
//! the tables. So a table cannot be reused before its flush (KVM rows 0.2.7, 3.63), and forgetting
//! to pay is a compile warning and, in debug builds, a panic.

use arrayvec::ArrayVec;
use core::fmt;

use crate::addr::{GfnRange, Pfn};
use crate::frame::{FrameList, PhysMap};

/// Ranges a debt keeps apart; beyond that neighbours are joined, which flushes more, not less.
pub const MAX_RANGES: usize = 16;

/// How much a flush must forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FlushScope {
    /// The ranges of the batch, at every level, and cached links to its tables.
    Ranges,
    /// Everything, and every vCPU leaves guest mode and loads its root again before it returns
    /// (roots were invalidated, KVM row 3.3).
    Reload,
}

/// What an embedder is asked to flush.
pub struct FlushBatch<'a> {
    /// How much.
    pub scope: FlushScope,
    /// Guest ranges, ascending, not overlapping. Old leaves and cached upper entries for them
    /// must go.
    pub ranges: &'a [GfnRange],
    tables: &'a FrameList,
    /// The frame after a frame of the list.
    next: &'a dyn Fn(Pfn) -> Option<Pfn>,
}

impl FlushBatch<'_> {
    /// Visit the frames of tables that were unlinked, for embedders that must know them.
    pub fn for_each_table(&self, visit: impl FnMut(Pfn)) {
        core::iter::successors(self.tables.first(), |frame| (self.next)(*frame)).for_each(visit);
    }

    /// Tables unlinked.
    #[must_use]
    pub fn tables(&self) -> u64 {
        self.tables.len()
    }
}

impl fmt::Debug for FlushBatch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlushBatch")
            .field("scope", &self.scope)
            .field("ranges", &self.ranges)
            .field("tables", &self.tables())
            .finish()
    }
}

/// A flush that is owed, with the tables that wait for it.
#[must_use = "an unpaid flush leaves stale translations: pay it with VmCore::pay or merge it"]
#[derive(Debug, Default)]
pub struct FlushDebt {
    ranges: ArrayVec<GfnRange, MAX_RANGES>,
    tables: FrameList,
    /// Changes that made this debt; what the statistics call owed and paid.
    changes: u64,
}

impl FlushDebt {
    /// Nothing owed.
    pub const fn new() -> Self {
        Self { ranges: ArrayVec::new_const(), tables: FrameList::new(), changes: 0 }
    }

    /// Nothing owed?
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty() && self.tables.is_empty()
    }

    /// The ranges to flush, ascending and apart.
    #[must_use]
    pub fn ranges(&self) -> &[GfnRange] {
        &self.ranges
    }

    /// Changes that made this debt.
    #[must_use]
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// Owe a flush of `range` for one change.
    #[inline]
    pub fn owe(&mut self, range: GfnRange) {
        self.owe_many(range, 1);
    }

    /// Owe a flush of `range` for `changes` changes in it.
    #[inline]
    pub fn owe_many(&mut self, range: GfnRange, changes: u64) {
        self.changes += changes;
        // The common case: a walk goes upward, and this range touches the last one.
        if let Some(last) = self.ranges.last_mut() {
            if last.start <= range.start && range.start <= last.end {
                last.end = last.end.max(range.end);
                return;
            }
        }
        self.insert(range);
    }

    /// Keep `ranges` ascending and apart, joining the two nearest when there is no room.
    fn insert(&mut self, range: GfnRange) {
        if range.is_empty() {
            return;
        }
        let mut merged = range;
        self.ranges.retain(|have| {
            let touches = have.start <= merged.end && merged.start <= have.end;
            if touches {
                merged = merged.hull(*have);
            }
            !touches
        });
        if self.ranges.is_full() {
            merged = self.join_nearest(merged);
        }
        let at = self.ranges.iter().position(|have| have.start > merged.start);
        let at = at.unwrap_or(self.ranges.len());
        let full = self.ranges.try_insert(at, merged).is_err();
        debug_assert!(!full, "join_nearest made room");
    }

    /// Remove the range nearest to `range` and return the hull of the two. Everything between
    /// them was unmapped or will be flushed for nothing.
    fn join_nearest(&mut self, range: GfnRange) -> GfnRange {
        let gap = |have: &GfnRange| {
            have.start.distance_from(range.end).max(range.start.distance_from(have.end))
        };
        let nearest = (0..self.ranges.len()).min_by_key(|&i| self.ranges.get(i).map(gap));
        let Some(nearest) = nearest else { return range };
        let other = self.ranges.remove(nearest);
        if crate::busted!("debt_forgets_a_range") { range } else { range.hull(other) }
    }

    /// Owe a flush before `table` may be reused.
    #[inline]
    pub fn owe_table<P: PhysMap>(&mut self, map: &P, table: Pfn) {
        self.tables.push(map, table);
    }

    /// Take over what `other` owes.
    pub fn merge<P: PhysMap>(&mut self, map: &P, mut other: Self) {
        for range in core::mem::take(&mut other.ranges) {
            self.insert(range);
        }
        self.tables.append(map, core::mem::take(&mut other.tables));
        self.changes += core::mem::take(&mut other.changes);
    }

    /// Take the tables out and forget the rest: the flush is complete.
    pub(crate) fn settle(mut self) -> (FrameList, u64) {
        self.ranges.clear();
        (core::mem::take(&mut self.tables), core::mem::take(&mut self.changes))
    }

    /// See the debt as the embedder will.
    pub(crate) fn with_batch<P: PhysMap, R>(
        &self,
        map: &P,
        scope: FlushScope,
        ask: impl FnOnce(&FlushBatch<'_>) -> R,
    ) -> R {
        let next = |frame: Pfn| FrameList::after(map, frame);
        ask(&FlushBatch { scope, ranges: &self.ranges, tables: &self.tables, next: &next })
    }
}

impl Drop for FlushDebt {
    fn drop(&mut self) {
        // INVARIANT[I11]: nothing is forgotten between a change and its flush.
        debug_assert!(self.is_empty(), "a flush debt was dropped unpaid (I11): {self:?}");
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::addr::Gfn;

    fn range(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    #[test]
    fn a_debt_covers_everything_owed_in_order_and_without_overlap() {
        let mut seed = 0x5eed_u64;
        for round in 0..2_000 {
            let mut debt = FlushDebt::new();
            let mut owed = [false; 256];
            for _ in 0..40 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let start = (seed >> 33) % 250;
                let end = start + 1 + (seed >> 50) % 5;
                debt.owe(range(start, end));
                (start..end).for_each(|g| owed[crate::addr::to_index(g)] = true);
            }
            let ranges = debt.ranges();
            let apart = ranges.windows(2).all(|pair| pair[0].end < pair[1].start);
            let all = (0..).map(Gfn::new).zip(owed).filter(|(_, owed)| *owed);
            let lost = all.map(|(gfn, _)| gfn).find(|gfn| !ranges.iter().any(|r| r.contains(*gfn)));
            let shown = std::format!("round {round}: {ranges:?}");
            // Settled first: a debt that is dropped by a panic would be another panic.
            assert_eq!(debt.settle().1, 40);
            assert!(apart, "{shown}");
            assert_eq!(lost, None, "{shown}");
        }
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "dropped unpaid")]
    fn dropping_a_debt_panics_in_debug_builds() {
        let mut debt = FlushDebt::new();
        debt.owe(range(1, 2));
    }
}
