//! Statistics without shared lines: one shard per participant, summed when somebody asks.
//!
//! Owns [`Stats`], [`Counter`] and [`StatsShard`]. A shard is written by its participant only
//! (plain load and store, no read-modify-write), so counting costs about a nanosecond and no
//! transfer. Gauges such as [`Counter::Pages4K`] wrap per shard and are right in the sum.
//! KVM rows 3.11 and 3.59.

use alloc::vec::Vec;
use core::fmt;

use crate::addr::Level;
use crate::sync::plain::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(usize)]
        pub enum Counter {
            $($(#[$doc])* $name,)*
        }

        impl Counter {
            /// Every counter, in the order of the enum.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// A name for reports, in snake case.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

counters! {
    /// Gauge: leaves at level 1.
    Pages4K = "pages_4k",
    /// Gauge: leaves at level 2.
    Pages2M = "pages_2m",
    /// Gauge: leaves at level 3.
    Pages1G = "pages_1g",
    /// Gauge: tables linked into a tree, roots included (KVM row 3.11).
    Tables = "tables",
    /// Gauge: MMIO entries.
    MmioSptes = "mmio_sptes",
    /// Faults handled, all outcomes.
    PfTaken = "pf_taken",
    /// Faults that installed or changed an entry.
    PfFixed = "pf_fixed",
    /// Faults fixed without the lock by the fast path; part of `pf_fixed`.
    PfFast = "pf_fast",
    /// Faults that found the access already permitted.
    PfSpurious = "pf_spurious",
    /// Faults that lost a race and ask the vCPU to try again.
    PfRetry = "pf_retry",
    /// Faults for the emulator (no slot, read-only slot).
    PfEmulate = "pf_emulate",
    /// Faults on a gfn that is write-protected for shadowing.
    PfWriteProtected = "pf_write_protected",
    /// Faults that found the vCPU's dirty ring full.
    PfRingFull = "pf_ring_full",
    /// Faults that ended in an error.
    PfError = "pf_error",
    /// MMIO entries that faults made; part of `pf_emulate`.
    PfMmioMade = "pf_mmio_spte_created",
    /// Compare-exchanges lost on entries (faults, zaps).
    CasLost = "cas_lost",
    /// Huge leaves split.
    Splits = "splits",
    /// Gauge: huge pages that are split because the guest executes in them (NX mitigation).
    NxSplits = "nx_lpage_splits",
    /// Tables replaced by a huge leaf.
    Collapses = "collapses",
    /// Leaves zapped.
    LeavesZapped = "leaves_zapped",
    /// Tables unlinked.
    TablesUnlinked = "tables_unlinked",
    /// Leaves aged (accessed bit cleared, or access-tracked).
    LeavesAged = "leaves_aged",
    /// Flush obligations taken on: one per entry change that needs a flush.
    FlushOwed = "flush_owed",
    /// Flush obligations paid by completed flushes.
    FlushPaid = "flush_paid",
    /// Flushes requested from the embedder.
    FlushRequests = "flush_requests",
    /// Times long work closed its section to let others proceed.
    Yields = "yields",
    /// Pages of logged slots that were marked dirty, by faults and by the host.
    PagesMarkedDirty = "pages_marked_dirty",
    /// Slot lookups that missed the per-thread copy.
    SlotLookups = "slot_lookups",
    /// Largest number of entries that long work visited between two points where others may
    /// proceed. A maximum, not a sum: see [`StatsShard::max`].
    MaxSlice = "max_slice",
}

impl Counter {
    /// The gauge of leaves at `level`; levels above 3 have no leaves and count as 1 GiB.
    #[inline]
    #[must_use]
    pub const fn pages(level: Level) -> Self {
        match level {
            Level::L1 => Self::Pages4K,
            Level::L2 => Self::Pages2M,
            Level::L3 | Level::L4 | Level::L5 => Self::Pages1G,
        }
    }

    /// Is it a maximum, so that shards are not summed?
    #[inline]
    #[must_use]
    pub const fn is_maximum(self) -> bool {
        matches!(self, Self::MaxSlice)
    }

    #[inline]
    const fn index(self) -> usize {
        #[expect(clippy::as_conversions, reason = "discriminant of a field-less enum")]
        return self as usize;
    }
}

const COUNTERS: usize = Counter::ALL.len();

/// One participant's counters.
#[derive(Debug)]
#[repr(align(128))]
pub struct StatsShard {
    values: [AtomicU64; COUNTERS],
}

impl StatsShard {
    fn new() -> Self {
        Self { values: [const { AtomicU64::new(0) }; COUNTERS] }
    }

    /// Add to a counter. Only the shard's participant may call this; a second writer would lose
    /// counts, nothing worse.
    #[inline]
    pub fn add(&self, counter: Counter, amount: u64) {
        #[expect(clippy::indexing_slicing, reason = "the array has one element per variant")]
        let value = &self.values[counter.index()];
        // ORDERING[stats]: Relaxed. Single writer; pairs with the load in `Stats::get`, which
        // wants no order.
        let before = value.load(Ordering::Relaxed);
        // ORDERING[stats]: Relaxed. As above.
        value.store(before.wrapping_add(amount), Ordering::Relaxed);
    }

    /// Take from a gauge. The shard may wrap; the sum over shards is right.
    #[inline]
    pub fn sub(&self, counter: Counter, amount: u64) {
        self.add(counter, amount.wrapping_neg());
    }

    /// Raise a maximum to `value`, if it is lower.
    #[inline]
    pub fn max(&self, counter: Counter, value: u64) {
        debug_assert!(counter.is_maximum(), "{} is a sum", counter.name());
        #[expect(clippy::indexing_slicing, reason = "the array has one element per variant")]
        let max = &self.values[counter.index()];
        // ORDERING[stats]: Relaxed. As in `add`.
        if value > max.load(Ordering::Relaxed) {
            // ORDERING[stats]: Relaxed. As in `add`.
            max.store(value, Ordering::Relaxed);
        }
    }

    /// Count one.
    #[inline]
    pub fn inc(&self, counter: Counter) {
        self.add(counter, 1);
    }
}

/// All shards of a VM.
pub struct Stats {
    shards: Vec<StatsShard>,
}

impl Stats {
    /// One shard for each of `participants`, or `None` when memory is short.
    #[must_use]
    pub fn new(participants: usize) -> Option<Self> {
        let mut shards = Vec::new();
        shards.try_reserve_exact(participants).ok()?;
        shards.resize_with(participants, StatsShard::new);
        Some(Self { shards })
    }

    /// The shard of the participant with that index.
    ///
    /// # Panics
    /// When there is no such participant in the domain these statistics were made for.
    #[inline]
    #[must_use]
    pub fn shard(&self, participant: usize) -> &StatsShard {
        #[expect(clippy::indexing_slicing, reason = "documented panic; the index is the domain's")]
        &self.shards[participant]
    }

    /// The sum over all shards, or the largest value where [`Counter::is_maximum`] holds. Exact
    /// when nobody is counting, else a value that was true for some order of the concurrent counts.
    #[must_use]
    pub fn get(&self, counter: Counter) -> u64 {
        self.shards.iter().fold(0u64, |sum, shard| {
            #[expect(clippy::indexing_slicing, reason = "one element per variant")]
            // ORDERING[stats]: Relaxed. Pairs with the store in `StatsShard::add`.
            let value = shard.values[counter.index()].load(Ordering::Relaxed);
            if counter.is_maximum() { sum.max(value) } else { sum.wrapping_add(value) }
        })
    }
}

impl fmt::Debug for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for &counter in Counter::ALL {
            map.entry(&counter.name(), &self.get(counter));
        }
        map.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KVM row B50: neither what is owed nor what is paid loses its upper half on the way.
    #[test]
    fn counters_and_debts_have_all_their_64_bits() {
        let many = (1 << 40) | 7;
        let stats = Stats::new(2).expect("memory");
        stats.shard(0).add(Counter::FlushOwed, many);
        stats.shard(1).inc(Counter::FlushOwed);
        assert_eq!(stats.get(Counter::FlushOwed), many + 1);
        let mut debt = crate::flush::FlushDebt::new();
        debt.owe_many(crate::addr::GfnRange::from_len(crate::addr::Gfn::new(3), 1), many);
        assert_eq!(debt.changes(), many);
        assert_eq!(debt.settle().1, many);
    }

    #[test]
    fn gauges_moved_between_shards_are_right_in_the_sum() {
        let stats = Stats::new(2).expect("memory");
        stats.shard(0).add(Counter::Pages4K, 5);
        stats.shard(1).sub(Counter::Pages4K, 5);
        assert_eq!(stats.get(Counter::Pages4K), 0);
        stats.shard(1).sub(Counter::Pages4K, 1);
        stats.shard(0).inc(Counter::Pages4K);
        assert_eq!(stats.get(Counter::Pages4K), 0);
    }

    #[test]
    fn a_maximum_over_shards_is_the_largest_value_noted() {
        let stats = Stats::new(2).expect("memory");
        for (shard, value) in [(0, 5), (1, 9), (1, 3), (0, 7)] {
            stats.shard(shard).max(Counter::MaxSlice, value);
        }
        assert_eq!(stats.get(Counter::MaxSlice), 9);
    }
}
