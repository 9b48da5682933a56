//! How long threads wait, and for what (KVM row 8.25).
//!
//! Owns [`Latencies`]: for each participant and each [`Wait`] a histogram by powers of two, a total
//! and a maximum. A histogram is written by its participant only, so measuring writes no line that
//! another thread writes. Nothing is measured, and no memory is taken, unless the embedder has a
//! clock ([`Trace::ENABLED`](crate::trace::Trace::ENABLED)); and what need not wait is not measured
//! as a wait.

use alloc::vec::Vec;
use core::fmt;

use crate::addr::{to_index, to_u64};
use crate::sync::plain::{AtomicU64, Ordering};

macro_rules! waits {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What is measured.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(usize)]
        pub enum Wait {
            $($(#[$doc])* $name,)*
        }

        impl Wait {
            /// Everything that is measured, in the order of the enum.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// A name for reports, in snake case.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

waits! {
    /// A Shared section that found an Exclusive holder, until it could open. Sections that open at
    /// once are not counted.
    Shared = "wait_shared",
    /// Exclusive: until other holders and open sections had ended.
    Exclusive = "wait_exclusive",
    /// Exclusive: for how long it was held.
    ExclusiveHeld = "hold_exclusive",
    /// An invalidation, until the sections that were open had ended.
    Invalidation = "wait_invalidation",
    /// A publication of slots: for invalidations in progress, then for the old set's readers.
    Publication = "wait_publication",
    /// A flush, from the request until it is complete.
    Flush = "wait_flush",
    /// A fault that installed or changed an entry, from call to return: the vCPU's stall.
    FaultFixed = "fault_fixed",
    /// A fault that found the access permitted already.
    FaultSpurious = "fault_spurious",
    /// A fault that asks the vCPU to try again.
    FaultRetry = "fault_retry",
    /// A fault that goes to the embedder: emulation, write protection, error.
    FaultOther = "fault_other",
}

impl Wait {
    #[inline]
    const fn index(self) -> usize {
        #[expect(clippy::as_conversions, reason = "discriminant of a field-less enum")]
        return self as usize;
    }
}

const WAITS: usize = Wait::ALL.len();

/// Buckets of a histogram: bucket 0 has 0 ns, bucket `i` has 2^(i-1) to 2^i - 1 ns, the last one
/// everything from 2^38 ns (almost five minutes) on.
pub const BUCKETS: usize = 40;

/// One participant's measurements of one kind.
#[derive(Debug)]
struct Cells {
    total: AtomicU64,
    max: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

/// One participant's measurements.
#[derive(Debug)]
#[repr(align(128))]
struct Shard([Cells; WAITS]);

impl Shard {
    fn new() -> Self {
        let cells = |_| Cells {
            total: AtomicU64::new(0),
            max: AtomicU64::new(0),
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
        };
        Self(core::array::from_fn(cells))
    }
}

/// Add to a word that only this thread writes.
fn bump(word: &AtomicU64, by: u64) {
    // ORDERING[latency]: Relaxed. Single writer; pairs with the loads in `Latencies::get`, which
    // want no order.
    let before = word.load(Ordering::Relaxed);
    // ORDERING[latency]: Relaxed. As above.
    word.store(before.wrapping_add(by), Ordering::Relaxed);
}

/// All measurements of a VM.
pub struct Latencies {
    /// Empty when nothing is measured.
    shards: Vec<Shard>,
}

impl Latencies {
    /// Room for the measurements of `participants`, or `None` when memory is short. With 0 nothing
    /// is allocated and nothing is measured.
    #[must_use]
    pub fn new(participants: usize) -> Option<Self> {
        let mut shards = Vec::new();
        shards.try_reserve_exact(participants).ok()?;
        shards.resize_with(participants, Shard::new);
        Some(Self { shards })
    }

    /// Note that `participant` took `nanos` for `wait`. Only the participant itself may call this;
    /// a second writer would lose counts, nothing worse.
    pub fn note(&self, participant: usize, wait: Wait, nanos: u64) {
        let Some(cells) = self.shards.get(participant).and_then(|s| s.0.get(wait.index())) else {
            return;
        };
        if let Some(bucket) = cells.buckets.get(bucket_of(nanos)) {
            bump(bucket, 1);
        }
        bump(&cells.total, nanos);
        // ORDERING[latency]: Relaxed. Single writer.
        if nanos > cells.max.load(Ordering::Relaxed) {
            // ORDERING[latency]: Relaxed. Pairs with the load in `read`.
            cells.max.store(nanos, Ordering::Relaxed);
        }
    }

    /// What all participants took for `wait`. Exact when nobody is measuring.
    #[must_use]
    pub fn get(&self, wait: Wait) -> Latency {
        let mut all = Latency::default();
        for participant in 0..self.shards.len() {
            all.merge(&self.of(participant, wait));
        }
        all
    }

    /// What one participant took: the stalls of one vCPU. Nothing if there is no such participant.
    #[must_use]
    pub fn of(&self, participant: usize, wait: Wait) -> Latency {
        let mut one = Latency::default();
        if let Some(cells) = self.shards.get(participant).and_then(|s| s.0.get(wait.index())) {
            for (sum, bucket) in one.buckets.iter_mut().zip(&cells.buckets) {
                // ORDERING[latency]: Relaxed. Pairs with the store in `bump`.
                *sum = bucket.load(Ordering::Relaxed);
            }
            // ORDERING[latency]: Relaxed. As above.
            one.total = cells.total.load(Ordering::Relaxed);
            // ORDERING[latency]: Relaxed. Pairs with the store in `note`.
            one.max = cells.max.load(Ordering::Relaxed);
        }
        one
    }
}

impl fmt::Debug for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for &wait in Wait::ALL {
            map.entry(&wait.name(), &format_args!("{}", self.get(wait)));
        }
        map.finish()
    }
}

/// Bucket of a duration.
fn bucket_of(nanos: u64) -> usize {
    let bits = u64::from(u64::BITS - nanos.leading_zeros());
    to_index(bits).min(BUCKETS - 1)
}

/// Measurements of one kind, summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency {
    /// Nanoseconds in all.
    pub total: u64,
    /// The longest, in nanoseconds.
    pub max: u64,
    /// How many took how long; see [`BUCKETS`].
    pub buckets: [u64; BUCKETS],
}

impl Default for Latency {
    fn default() -> Self {
        Self { total: 0, max: 0, buckets: [0; BUCKETS] }
    }
}

impl Latency {
    /// How many were measured.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum: u64, count| sum.wrapping_add(*count))
    }

    /// Mean in nanoseconds, rounded down; 0 if there was none.
    #[must_use]
    pub fn mean(&self) -> u64 {
        self.total.checked_div(self.count()).unwrap_or(0)
    }

    /// A duration, in nanoseconds, that `per_mille` of 1000 did not exceed: the end of their
    /// bucket, and at most [`max`](Self::max). 0 if there was none.
    #[must_use]
    pub fn percentile(&self, per_mille: u64) -> u64 {
        let count = u128::from(self.count());
        let wanted = (count * u128::from(per_mille.min(1000))).div_ceil(1000).max(1);
        let mut seen = 0u128;
        for (index, bucket) in self.buckets.iter().enumerate() {
            seen += u128::from(*bucket);
            if seen >= wanted {
                let end = 1u64.checked_shl(u32::try_from(to_u64(index)).unwrap_or(u32::MAX));
                let last = index == BUCKETS - 1;
                return end.filter(|_| !last).map_or(self.max, |end| (end - 1).min(self.max));
            }
        }
        0
    }

    /// Add other measurements.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(other.buckets) {
            *mine = mine.wrapping_add(theirs);
        }
        self.total = self.total.wrapping_add(other.total);
        self.max = self.max.max(other.max);
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, mean, max) = (self.count(), self.mean(), self.max);
        let p99 = self.percentile(990);
        write!(f, "{count} times, mean {mean} ns, 99% within {p99} ns, max {max} ns")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_the_bucket_of_their_power_of_two() {
        let ends = [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (1 << 37, 38)];
        for (nanos, bucket) in ends {
            assert_eq!(bucket_of(nanos), bucket, "{nanos}");
        }
        assert_eq!([1 << 38, u64::MAX].map(bucket_of), [BUCKETS - 1; 2]);
    }

    #[test]
    fn a_summary_agrees_with_the_durations_themselves() {
        let all = Latencies::new(2).expect("memory");
        let nanos: [u64; 7] = [0, 3, 3, 70, 900, 15, 1_000_000];
        for (index, &nanos) in nanos.iter().enumerate() {
            all.note(index % 2, Wait::Flush, nanos);
        }
        let got = all.get(Wait::Flush);
        let total: u64 = nanos.iter().sum();
        assert_eq!((got.count(), got.total, got.max), (7, total, 1_000_000));
        assert_eq!(got.mean(), total / 7);
        assert_eq!((got.percentile(0), got.percentile(500)), (0, 15));
        assert_eq!(got.percentile(860), 1_000_000, "no more than the longest");
        assert_eq!(all.of(1, Wait::Flush).max, 70, "{:?}", all.of(1, Wait::Flush));
        assert_eq!(all.get(Wait::Shared), Latency::default());
        assert_eq!(Latency::default().percentile(999), 0);
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let none = Latencies::new(0).expect("nothing to allocate");
        none.note(0, Wait::Shared, 5);
        assert_eq!(none.get(Wait::Shared), Latency::default());
    }
}
