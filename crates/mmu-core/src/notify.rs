//! Invalidation: the host takes pages away while vCPUs fault them in.
//!
//! Owns [`Invalidations`] and its guard [`Invalidation`] (KVM rows 3.49, 3.50; the mmu notifier). A
//! fault takes a [`Snapshot`], resolves its page with nothing held, opens a Shared section and asks
//! [`Invalidations::must_retry`]. The host `begin`s (announces the range, then waits for the Shared
//! sections that were open), zaps, flushes, and drops the guard.
//!
//! Why no fault can install a page that was taken away: a section opened before the drain is waited
//! for, so its entry is there to be zapped; one opened after it sees the range, or, if the
//! invalidation has ended, a sequence number newer than its snapshot. Faults elsewhere never wait.
//!
//! Rank: `begin` takes `&mut Participant`, so it cannot be called inside a section; the spin lock
//! is a leaf. Slot changes wait until no invalidation is in progress (KVM row 6.8): see
//! [`Invalidations::when_idle`].

use alloc::sync::Arc;
use core::fmt;

use crate::addr::{Gfn, GfnRange};
use crate::epoch::{EpochDomain, Participant};
use crate::lock::Shared;
use crate::spin::SpinLock;
use crate::sync::{AtomicU64, Backoff, Ordering, load_own, plain};

/// All invalidations of a VM.
#[doc(alias = "mmu_notifier")]
pub struct Invalidations {
    domain: Arc<EpochDomain>,
    lock: SpinLock,
    /// Invalidations begun and not ended. Changed under `lock`.
    count: AtomicU64,
    /// Hull of their ranges while `count` is not 0. Changed under `lock`.
    start: AtomicU64,
    end: AtomicU64,
    /// Invalidations that ended.
    seq: AtomicU64,
    /// Invalidations that began. Changed under `lock`.
    begun: plain::AtomicU64,
}

/// The sequence number before a page was resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot(u64);

impl Snapshot {
    /// What it would be if the caller's own `count` invalidations, begun and ended since, had ended
    /// before: they took nothing back that the caller has resolved.
    #[must_use]
    pub const fn after_own(self, count: u64) -> Self {
        Self(self.0.wrapping_add(count))
    }
}

impl Invalidations {
    /// None in progress. `first_seq` is 0 but in tests of the wrap.
    #[must_use]
    pub fn new(domain: Arc<EpochDomain>, first_seq: u64) -> Self {
        let lock = SpinLock::new(domain.give_up_cpu());
        Self {
            domain,
            lock,
            count: AtomicU64::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            seq: AtomicU64::new(first_seq),
            begun: plain::AtomicU64::new(0),
        }
    }

    /// Take before resolving a page.
    #[inline]
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        #[cfg(loom)]
        let _at_once = self.lock.by_contract();
        // ORDERING[invalidate-seq]: Acquire. Pairs with the Release in `Invalidation::drop`: a page
        // resolved after this is what the host has after the invalidations counted here.
        Snapshot(self.seq.load(Ordering::Acquire))
    }

    /// Must a fault that is about to map `pages`, which it resolved after `snapshot`, throw them
    /// away? `pages` is all that the entry maps: one taken out of a huge page takes it all.
    ///
    /// Authoritative only inside the Shared section in which the entry is installed.
    #[inline]
    #[must_use]
    pub fn must_retry(&self, _section: &Shared<'_>, snapshot: Snapshot, pages: GfnRange) -> bool {
        #[cfg(loom)]
        let _at_once = self.lock.by_contract();
        // ORDERING[invalidate-count]: Acquire. Pairs with the Release in `begin` (the range is
        // complete) and in `Invalidation::drop` (the new seq is visible).
        if self.count.load(Ordering::Acquire) != 0 {
            // ORDERING[invalidate-range]: Acquire. Pairs with the Release stores in `widen`: a
            // bound of a later invalidation brings the seq of the earlier one's end with it.
            let start = self.start.load(Ordering::Acquire);
            // ORDERING[invalidate-range]: Acquire. As above.
            let end = self.end.load(Ordering::Acquire);
            let meets = start < pages.end.get() && pages.start.get() < end;
            if meets && !crate::busted!("skip_range_check") {
                return true;
            }
        }
        if crate::busted!("skip_seq_recheck") {
            return false;
        }
        // ORDERING[invalidate-seq]: Relaxed. Ordered by the Acquire loads above: if an invalidation
        // of our range has ended since the snapshot, its seq is visible here.
        self.seq.load(Ordering::Relaxed) != snapshot.0
    }

    /// Is an invalidation of `gfn` in progress? A hint for faults that have not resolved their
    /// page yet; may be wrong in either direction.
    #[inline]
    #[must_use]
    pub fn likely_in_progress(&self, gfn: Gfn) -> bool {
        #[cfg(loom)]
        let _at_once = self.lock.by_contract();
        // ORDERING[invalidate-count]: Relaxed. A hint.
        self.count.load(Ordering::Relaxed) != 0
            // ORDERING[invalidate-range]: Relaxed. A hint.
            && self.start.load(Ordering::Relaxed) <= gfn.get()
            // ORDERING[invalidate-range]: Relaxed. A hint.
            && gfn.get() < self.end.load(Ordering::Relaxed)
    }

    /// Announce that pages of `range` are being taken away, and wait for the Shared sections that
    /// are open. When this returns, no fault installs an entry in `range` until the guard drops.
    ///
    /// Several may be in progress; faults then retry on the hull of their ranges.
    pub fn begin<'a>(&'a self, participant: &mut Participant, range: GfnRange) -> Invalidation<'a> {
        let lock = self.lock.lock();
        // ORDERING[invalidate-count]: Relaxed. Changed under the lock only.
        let count = load_own(&self.count);
        self.widen(range, count == 0);
        // ORDERING[invalidate-count]: Release. Pairs with the Acquire in `must_retry`.
        self.count.store(count + 1, Ordering::Release);
        // ORDERING[invalidate-begun]: Relaxed. Changed and read under the lock.
        let begun = self.begun.fetch_add(1, plain::Ordering::Relaxed) + 1;
        drop(lock);
        if !crate::busted!("begin_without_drain") {
            self.domain.drain(Some(participant.index()));
        }
        Invalidation { all: self, range, begun, first: count == 0 }
    }

    fn widen(&self, range: GfnRange, first: bool) {
        // ORDERING[invalidate-range]: Relaxed. Changed under the lock only.
        let (start, end) = (load_own(&self.start), load_own(&self.end));
        let hull = GfnRange::new(Gfn::new(start), Gfn::new(end));
        let hull = if first { range } else { hull.hull(range) };
        // ORDERING[invalidate-range]: Release. Pairs with the Acquire loads in `must_retry`.
        self.start.store(hull.start.get(), Ordering::Release);
        // ORDERING[invalidate-range]: Release. As above.
        self.end.store(hull.end.get(), Ordering::Release);
    }

    /// Run `swap` at a moment when no invalidation is in progress and none can begin, waiting for
    /// such a moment. `swap` must be short: it runs under the spin lock.
    pub fn when_idle<R>(&self, swap: impl FnOnce() -> R) -> R {
        let mut backoff = Backoff::new();
        loop {
            let lock = self.lock.lock();
            // ORDERING[invalidate-count]: Relaxed. Changed under the lock only.
            if load_own(&self.count) == 0 || crate::busted!("swap_beside_an_invalidation") {
                let result = swap();
                drop(lock);
                return result;
            }
            drop(lock);
            backoff.wait(self.domain.give_up_cpu());
        }
    }

    /// Invalidations in progress; a figure.
    #[must_use]
    pub fn in_progress(&self) -> u64 {
        // ORDERING[invalidate-count]: Relaxed. A figure.
        self.count.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Invalidations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidations").field("in_progress", &self.in_progress()).finish()
    }
}

/// An invalidation in progress; dropping it ends it. Drop it after the flush is complete.
#[must_use = "dropping it ends the invalidation"]
#[derive(Debug)]
pub struct Invalidation<'a> {
    all: &'a Invalidations,
    range: GfnRange,
    /// Number of this one.
    begun: u64,
    /// Was none in progress when it began?
    first: bool,
}

impl Invalidation<'_> {
    /// What is being invalidated.
    #[must_use]
    pub fn range(&self) -> GfnRange {
        self.range
    }

    /// Was another invalidation in progress at any time since this one began? Then an entry found
    /// empty may have been emptied by the other, whose flush is not over: flush before trusting it.
    #[must_use]
    pub fn others_in_progress(&self) -> bool {
        let _lock = self.all.lock.lock();
        // ORDERING[invalidate-begun]: Relaxed. Changed and read under the lock.
        !self.first || self.all.begun.load(plain::Ordering::Relaxed) != self.begun
    }
}

impl Drop for Invalidation<'_> {
    fn drop(&mut self) {
        let all = self.all;
        let _lock = all.lock.lock();
        // ORDERING[invalidate-seq]: Relaxed load, changed under the lock only.
        let seq = load_own(&all.seq);
        // ORDERING[invalidate-seq]: Release. Pairs with the Acquire in `snapshot`. Stored before
        // the count goes down, so nobody sees the range gone and the old seq.
        all.seq.store(seq.wrapping_add(1), Ordering::Release);
        // ORDERING[invalidate-count]: Relaxed load, changed under the lock only.
        let count = load_own(&all.count);
        // ORDERING[invalidate-count]: Release. Pairs with the Acquire in `must_retry`.
        all.count.store(count.wrapping_sub(1), Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::lock::MmuLock;

    fn range(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    /// The protocol on one thread, with the sequence number about to wrap (KVM row 3.50).
    #[test]
    fn faults_retry_inside_the_hull_and_after_any_end_across_the_wrap() {
        let domain = EpochDomain::new(2, crate::sync::relax).expect("in range");
        let all = Invalidations::new(Arc::clone(&domain), u64::MAX);
        let lock = MmuLock::new(Arc::clone(&domain));
        let mut vcpu = domain.register().expect("room");
        let mut host = domain.register().expect("room");
        let retry = |vcpu: &mut Participant, snapshot, gfn| {
            all.must_retry(&lock.shared(vcpu), snapshot, range(gfn, gfn + 1))
        };

        let before = all.snapshot();
        assert!(!retry(&mut vcpu, before, 5));
        let first = all.begin(&mut host, range(4, 6));
        let second = all.begin(&mut host, range(20, 22));
        assert_eq!(first.range(), range(4, 6));
        assert!(retry(&mut vcpu, before, 5));
        assert!(retry(&mut vcpu, before, 10), "between the two: the hull");
        assert!(!retry(&mut vcpu, before, 3) && !retry(&mut vcpu, before, 22));
        drop(first);
        assert!(retry(&mut vcpu, before, 3), "one has ended since the snapshot");
        let between = all.snapshot();
        assert!(!retry(&mut vcpu, between, 3));
        drop(second);
        assert!(retry(&mut vcpu, between, 3), "the wrapped sequence number differs");
        assert!(!retry(&mut vcpu, all.snapshot(), 20));
        assert_eq!(all.when_idle(|| 7), 7);
    }

    /// A fault that made invalidations of its own goes on; anybody else's makes it retry.
    #[test]
    fn only_ones_own_invalidations_are_left_out() {
        let domain = EpochDomain::new(2, crate::sync::relax).expect("in range");
        let all = Invalidations::new(Arc::clone(&domain), u64::MAX);
        let lock = MmuLock::new(Arc::clone(&domain));
        let mut vcpu = domain.register().expect("room");
        let mut host = domain.register().expect("room");
        let before = all.snapshot();
        let retry = |vcpu: &mut Participant, own, gfn| {
            all.must_retry(&lock.shared(vcpu), before.after_own(own), range(gfn, gfn + 1))
        };
        drop(all.begin(&mut vcpu, range(4, 6)));
        drop(all.begin(&mut vcpu, range(9, 10)));
        assert!(!retry(&mut vcpu, 2, 5), "they took back nothing that it has");
        assert!(retry(&mut vcpu, 1, 5) && retry(&mut vcpu, 0, 5) && retry(&mut vcpu, 3, 5));
        let other = all.begin(&mut host, range(4, 6));
        assert!(retry(&mut vcpu, 2, 5), "in progress");
        assert!(!retry(&mut vcpu, 2, 7), "elsewhere");
        drop(other);
        assert!(retry(&mut vcpu, 2, 5) && retry(&mut vcpu, 2, 7), "over");
        assert!(!retry(&mut vcpu, 3, 5), "which only a liar would claim");
    }
}
