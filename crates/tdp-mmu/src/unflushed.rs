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
}

impl Unflushed {
    pub(crate) fn new(give_up_cpu: fn()) -> Self {
        let zero = || plain::AtomicU64::new(0);
        Self { lock: SpinLock::new(give_up_cpu), start: zero(), end: zero() }
    }

    /// `range` is about to be aged without a flush. Call before the first bit is cleared.
    pub(crate) fn note(&self, range: GfnRange) {
        let _lock = self.lock.lock();
        let hull = self.load();
        self.store(if hull.is_empty() { range } else { hull.hull(range) });
    }

    /// What a precise pass over `range` must flush besides what it clears; it will have been.
    pub(crate) fn take(&self, range: GfnRange) -> Option<GfnRange> {
        let _lock = self.lock.lock();
        let hull = self.load();
        let due = hull.intersection(range);
        if due.is_empty() {
            return None;
        }
        // What is left must stay one range: forget only what is cut off at an end.
        if due.start == hull.start {
            self.store(GfnRange::new(due.end, hull.end.max(due.end)));
        } else if due.end == hull.end {
            self.store(GfnRange::new(hull.start, due.start));
        }
        Some(due)
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

    #[test]
    fn a_precise_pass_is_told_everything_aged_without_a_flush_before_it() {
        let all = Unflushed::new(mmu_core::sync::relax);
        assert_eq!(all.take(range(0, 100)), None);
        all.note(range(10, 20));
        all.note(range(40, 50));
        assert_eq!(all.take(range(0, 30)), Some(range(10, 30)));
        assert_eq!(all.take(range(0, 30)), None);
        assert_eq!(all.take(range(35, 38)), Some(range(35, 38)), "a hole in the middle is kept");
        assert_eq!(all.take(range(0, 100)), Some(range(30, 50)));
        assert_eq!(all.take(range(0, 100)), None);
    }
}
