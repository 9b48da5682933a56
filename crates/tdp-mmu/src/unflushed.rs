//! Which gfns were aged without a flush, so that a precise pass knows what TLBs may still hide.
//!
//! Owns [`Unflushed`], the hull of what [`AgeMode::Clear`](mmu_core::traits::AgeMode::Clear)
//! cleared since the last precise pass over it. A CPU that cached such a translation does not set
//! the accessed bit again, so a precise pass that only flushed what it cleared itself would go on
//! missing accesses. Written by agers only; faults never look at it.

use mmu_core::addr::{Gfn, GfnRange};
use mmu_core::spin::SpinLock;
use mmu_core::sync::plain;

/// A hull of gfns under a lock of its own (a leaf).
#[derive(Debug)]
pub(crate) struct Unflushed {
    lock: SpinLock,
    start: plain::AtomicU64,
    end: plain::AtomicU64,
    /// Notes taken; a precise pass forgets the hull only if none came while it flushed.
    notes: plain::AtomicU64,
}

/// What a precise pass must flush, and what it may forget when the flush is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) range: GfnRange,
    notes: u64,
}

impl Unflushed {
    pub(crate) fn new(give_up_cpu: fn()) -> Self {
        let zero = || plain::AtomicU64::new(0);
        Self { lock: SpinLock::new(give_up_cpu), start: zero(), end: zero(), notes: zero() }
    }

    /// `range` is aged without a flush. Call before the first bit is cleared, and again after the
    /// last: a precise pass in between may have forgotten the first note.
    pub(crate) fn note(&self, range: GfnRange) {
        let _lock = self.lock.lock();
        // ORDERING[unflushed]: Relaxed. Protected by the lock.
        self.notes.fetch_add(1, plain::Ordering::Relaxed);
        let hull = self.load();
        self.store(if hull.is_empty() { range } else { hull.hull(range) });
    }

    /// What a precise pass over `range` must flush besides what it clears.
    pub(crate) fn due(&self, range: GfnRange) -> Option<Due> {
        let _lock = self.lock.lock();
        let range = self.load().intersection(range);
        // ORDERING[unflushed]: Relaxed. Protected by the lock.
        let notes = self.notes.load(plain::Ordering::Relaxed);
        (!range.is_empty()).then_some(Due { range, notes })
    }

    /// The flush of `due` is complete: forget it, unless somebody aged without a flush meanwhile.
    pub(crate) fn flushed(&self, due: Due) {
        let _lock = self.lock.lock();
        // ORDERING[unflushed]: Relaxed. Protected by the lock.
        let same = self.notes.load(plain::Ordering::Relaxed) == due.notes;
        if !same && !mmu_core::busted!("hull_forgets_late_notes") {
            return;
        }
        let (hull, range) = (self.load(), due.range);
        // What is left must stay one range: forget only what is cut off at an end.
        if range.start <= hull.start {
            let start = hull.start.max(range.end);
            self.store(GfnRange::new(start, hull.end.max(start)));
        } else if range.end >= hull.end {
            self.store(GfnRange::new(hull.start, hull.end.min(range.start).max(hull.start)));
        }
    }

    fn load(&self) -> GfnRange {
        // ORDERING[unflushed]: Relaxed. Protected by the lock, which every caller holds.
        let word = |atom: &plain::AtomicU64| Gfn::new(atom.load(plain::Ordering::Relaxed));
        GfnRange::new(word(&self.start), word(&self.end))
    }

    fn store(&self, range: GfnRange) {
        // ORDERING[unflushed]: Relaxed. Protected by the lock; pairs with `load`.
        self.start.store(range.start.get(), plain::Ordering::Relaxed);
        // ORDERING[unflushed]: Relaxed. As above.
        self.end.store(range.end.get(), plain::Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    /// A precise pass over a range: what it had to flush besides its own.
    fn precise(all: &Unflushed, over: GfnRange) -> Option<GfnRange> {
        let due = all.due(over)?;
        all.flushed(due);
        Some(due.range)
    }

    #[test]
    fn a_precise_pass_is_told_everything_aged_without_a_flush_before_it() {
        let all = Unflushed::new(mmu_core::sync::relax);
        assert_eq!(precise(&all, range(0, 100)), None);
        all.note(range(10, 20));
        all.note(range(40, 50));
        assert_eq!(precise(&all, range(0, 30)), Some(range(10, 30)));
        assert_eq!(precise(&all, range(0, 30)), None);
        assert_eq!(precise(&all, range(35, 38)), Some(range(35, 38)), "a hole is kept");
        assert_eq!(precise(&all, range(0, 100)), Some(range(30, 50)));
        assert_eq!(precise(&all, range(0, 100)), None);
    }

    #[test]
    fn a_note_taken_while_the_flush_was_on_its_way_is_not_forgotten() {
        let all = Unflushed::new(mmu_core::sync::relax);
        all.note(range(10, 20));
        let due = all.due(range(0, 100)).expect("noted");
        all.note(range(10, 20));
        all.flushed(due);
        assert_eq!(precise(&all, range(0, 100)), Some(range(10, 20)));
    }

    #[test]
    fn a_second_precise_pass_flushes_too_while_the_first_is_not_complete() {
        let all = Unflushed::new(mmu_core::sync::relax);
        all.note(range(10, 20));
        let first = all.due(range(0, 100)).expect("noted");
        assert_eq!(precise(&all, range(0, 100)), Some(range(10, 20)));
        all.flushed(first);
        assert_eq!(precise(&all, range(0, 100)), None);
    }
}
