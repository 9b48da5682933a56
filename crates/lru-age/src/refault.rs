//! [`Refaults`]: pages that were evicted and came back, and how soon (KVM row 5.38).
//!
//! A shadow entry remembers of each evicted page when it went, on a clock that ticks once per
//! evicted page, and in which generation. A page that returns while its generation would still be
//! in the window, or before more pages were evicted than are in use, should have stayed.
//!
//! Memory is fixed: one word per entry, eight entries in a bucket, the oldest of a full bucket
//! goes. Entries are written by who evicts and taken by who faults, from any thread, without a
//! lock; each is taken once.

use alloc::boxed::Box;

use mmu_core::addr::{Gfn, to_index, to_u64};
use mmu_core::sync::{AtomicU64, Ordering, plain};

use crate::AgeError;
use crate::r#gen::{MAX_NR_GENS, Seq};
use crate::kind::{KINDS, Kind, TIERS, Tier};
use crate::region::zeroed;

/// Entries of a bucket: one cache line.
const WAYS: u64 = 8;
/// Most entries: 2^30, which is 8 GiB.
const MAX_ENTRIES: u64 = 1 << 30;

// Bits of an entry: 0 valid, 1 tier, 2 kind, 3..11 generation modulo 256, 11..34 clock in granules,
// 34..64 tag.
const VALID: u64 = 1;
const TIER_SHIFT: u32 = 1;
const KIND_SHIFT: u32 = 2;
const SEQ_SHIFT: u32 = 3;
const SEQ_MASK: u64 = 0xff;
const CLOCK_SHIFT: u32 = 11;
const CLOCK_BITS: u32 = 23;
const CLOCK_MASK: u64 = (1 << CLOCK_BITS) - 1;
const TAG_SHIFT: u32 = 34;
const TAG_BITS: u32 = 64 - TAG_SHIFT;

/// A page that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refault {
    /// Pages evicted since it went, itself included; exact up to the clock's granule
    /// ([`Refaults::granule`]), and modulo its 2^23 granules.
    pub distance: u64,
    /// Generations opened since the one that it was evicted from, modulo 256.
    pub generations: u64,
    /// Kind of its range.
    pub kind: Kind,
    /// Was it used before it grew old?
    pub tier: Tier,
}

impl Refault {
    /// Would its generation still be in the window? Then it was evicted too early, and belongs to
    /// the working set: [`AgeEditor::insert`](crate::AgeEditor::insert) it as
    /// [`Arrival::WorkingSet`](crate::Arrival).
    #[must_use]
    pub const fn is_recent(&self) -> bool {
        self.generations < MAX_NR_GENS
    }

    /// Would it still be there, had memory been larger by `pages`? With the pages in use, it
    /// competes with them and should displace one.
    #[must_use]
    pub const fn is_within(&self, pages: u64) -> bool {
        self.distance <= pages
    }
}

/// Pages of one kind and tier, since the last [`Refaults::age_counts`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefaultCounts {
    /// Came back while recent.
    pub refaulted: u64,
    /// Were evicted.
    pub evicted: u64,
    /// Were old enough to go and kept for their tier.
    pub protected: u64,
}

/// Shadow entries of evicted pages, and counts by kind and tier.
#[derive(Debug)]
pub struct Refaults {
    entries: Box<[AtomicU64]>,
    /// log2 of the buckets.
    bucket_bits: u32,
    /// Pages evicted, ever.
    clock: plain::AtomicU64,
    counts: [[Counts; TIERS]; KINDS],
}

#[derive(Debug, Default)]
struct Counts {
    refaulted: plain::AtomicU64,
    evicted: plain::AtomicU64,
    protected: plain::AtomicU64,
}

impl Refaults {
    /// Room for at least `entries` evicted pages, at 8 bytes each; rounded up to a power of two,
    /// 8 at least. To judge a refault by the pages in use, as many as the guest may have evicted.
    ///
    /// # Errors
    /// [`AgeError::NoMemoryFor`]: too many (more than 2^30), or the allocator had none.
    pub fn new(entries: u64) -> Result<Self, AgeError> {
        let count = entries.clamp(WAYS, MAX_ENTRIES).next_power_of_two();
        let no_memory = AgeError::NoMemoryFor { bytes: entries.saturating_mul(8) };
        if entries > MAX_ENTRIES {
            return Err(no_memory);
        }
        Ok(Self {
            entries: zeroed(count).ok_or(no_memory)?,
            bucket_bits: (count / WAYS).trailing_zeros(),
            clock: plain::AtomicU64::new(0),
            counts: Default::default(),
        })
    }

    /// Bytes that the entries take.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        8 * to_u64(self.entries.len())
    }

    /// Pages per tick of the clock in entries: a power of two, so that 2^22 ticks are more than
    /// four times the entries, and an entry's age is never ambiguous while it is young enough to
    /// matter.
    #[must_use]
    pub fn granule(&self) -> u64 {
        1 << self.granule_bits()
    }

    fn granule_bits(&self) -> u32 {
        (self.bucket_bits + WAYS.trailing_zeros() + 2).saturating_sub(CLOCK_BITS - 1)
    }

    /// Pages evicted so far.
    #[must_use]
    pub fn evictions(&self) -> u64 {
        // ORDERING[age-refault-count]: Relaxed. Pairs with Relaxed in `evicted`: a count.
        self.clock.load(plain::Ordering::Relaxed)
    }

    /// The page was evicted from generation `seq`: remember it. Pages whose number is too large to
    /// be told apart (2^30 times the buckets: 4 TiB of guest at least) are counted and not
    /// remembered.
    pub fn evicted(&self, gfn: Gfn, seq: Seq, kind: Kind, tier: Tier) {
        // ORDERING[age-refault-count]: Relaxed. Pairs with Relaxed in `evictions`: a count.
        let now = self.clock.fetch_add(1, plain::Ordering::Relaxed);
        add(&tier.of(kind.of(&self.counts)).evicted, 1);
        let Some((bucket, tag)) = self.place(gfn) else { return };
        let entry = VALID
            | tier.number() << TIER_SHIFT
            | u64::from(kind == Kind::File) << KIND_SHIFT
            | (seq.get() & SEQ_MASK) << SEQ_SHIFT
            | (self.ticks(now) << CLOCK_SHIFT)
            | tag << TAG_SHIFT;
        let ages = bucket.iter().map(|cell| {
            // ORDERING[age-refault]: Relaxed. Pairs with AcqRel in `take`: which one goes is a
            // guess that the exchange below checks against nothing; a lost entry is a refault that
            // is not noticed.
            let word = cell.load(Ordering::Relaxed);
            let same = word & VALID != 0 && word >> TAG_SHIFT == tag;
            // The page's own old entry first, then a free one, then the oldest.
            let rank = if same { u64::MAX } else { self.rank(word, now) };
            (rank, cell)
        });
        if let Some((_, cell)) = ages.max_by_key(|&(rank, _)| rank) {
            // ORDERING[age-refault]: AcqRel. Pairs with Acquire in `take`. Publishes: what the
            // evictor did to the page before. An exchange and not a store: it comes before or after
            // a taking of the entry that it replaces, and is itself not taken back by it.
            if mmu_core::busted!("remember_by_store") {
                cell.store(entry, Ordering::Release);
            } else {
                let _ = cell.swap(entry, Ordering::AcqRel);
            }
        }
    }

    /// The page was old enough to go, and kept for its tier.
    pub fn protected(&self, kind: Kind, tier: Tier, pages: u64) {
        add(&tier.of(kind.of(&self.counts)).protected, pages);
    }

    /// The page is mapped again while `max_seq` is the youngest generation: what is known of its
    /// eviction, and forget it. `None` when it was never evicted, or too long ago.
    pub fn refault(&self, gfn: Gfn, max_seq: Seq) -> Option<Refault> {
        let (bucket, tag) = self.place(gfn)?;
        let word = bucket.iter().find_map(|cell| take(cell, tag))?;
        let now = self.evictions();
        let ticks = self.ticks(now).wrapping_sub(word >> CLOCK_SHIFT) & CLOCK_MASK;
        let seq = word >> SEQ_SHIFT & SEQ_MASK;
        let refault = Refault {
            distance: ticks << self.granule_bits(),
            generations: max_seq.get().wrapping_sub(seq) & SEQ_MASK,
            kind: if word >> KIND_SHIFT & 1 == 0 { Kind::Anon } else { Kind::File },
            tier: Tier::of_mark(word >> TIER_SHIFT & 1 == 1),
        };
        if refault.is_recent() {
            add(&refault.tier.of(refault.kind.of(&self.counts)).refaulted, 1);
        }
        Some(refault)
    }

    /// The counts of one kind and tier.
    #[must_use]
    pub fn counts(&self, kind: Kind, tier: Tier) -> RefaultCounts {
        let counts = tier.of(kind.of(&self.counts));
        let read = |count: &plain::AtomicU64| {
            // ORDERING[age-refault-count]: Relaxed. Pairs with Relaxed in `add`: a count.
            count.load(plain::Ordering::Relaxed)
        };
        RefaultCounts {
            refaulted: read(&counts.refaulted),
            evicted: read(&counts.evicted),
            protected: read(&counts.protected),
        }
    }

    /// Halve all counts: what happened longer ago weighs less. For who decides by them, once per
    /// generation (row 5.31: the exponential average of a controller).
    pub fn age_counts(&self) {
        for counts in self.counts.iter().flatten() {
            for count in [&counts.refaulted, &counts.evicted, &counts.protected] {
                // ORDERING[age-refault-count]: Relaxed. Pairs with Relaxed in `add`: a count, of
                // which an addition that comes between the two steps is halved or not.
                let seen = count.load(plain::Ordering::Relaxed);
                count.fetch_sub(seen - seen / 2, plain::Ordering::Relaxed);
            }
        }
    }

    fn ticks(&self, pages: u64) -> u64 {
        (pages >> self.granule_bits()) & CLOCK_MASK
    }

    /// How fit an entry is to be replaced: free, then the longer ago the fitter.
    fn rank(&self, word: u64, now: u64) -> u64 {
        if word & VALID == 0 {
            return CLOCK_MASK + 1;
        }
        self.ticks(now).wrapping_sub(word >> CLOCK_SHIFT) & CLOCK_MASK
    }

    /// Bucket and tag of a page. The two together are the page's number, mixed by steps that can be
    /// undone: no two pages share both.
    fn place(&self, gfn: Gfn) -> Option<(&[AtomicU64], u64)> {
        let width = (TAG_BITS + self.bucket_bits).min(52);
        let mask = (1 << width) - 1;
        if gfn.get() > mask {
            return None;
        }
        let fold = |x: u64| x ^ (x >> (width / 2));
        let mixed = fold(fold(gfn.get()).wrapping_mul(0x9e37_79b9_7f4a_7c15) & mask);
        let bucket = to_index(mixed & ((1 << self.bucket_bits) - 1)) * to_index(WAYS);
        let cells = self.entries.get(bucket..bucket + to_index(WAYS))?;
        Some((cells, mixed >> self.bucket_bits))
    }
}

/// Take the entry of `tag` out of its cell.
fn take(cell: &AtomicU64, tag: u64) -> Option<u64> {
    // ORDERING[age-refault]: Acquire. Pairs with AcqRel in `evicted`. What the evictor did to the
    // page is visible to who takes its entry.
    let word = cell.load(Ordering::Acquire);
    if word & VALID == 0 || word >> TAG_SHIFT != tag {
        return None;
    }
    // ORDERING[age-refault]: AcqRel. Pairs with AcqRel in `evicted` and with itself: of two faults
    // one gets the entry.
    cell.compare_exchange(word, 0, Ordering::AcqRel, Ordering::Relaxed).ok()
}

fn add(count: &plain::AtomicU64, more: u64) {
    // ORDERING[age-refault-count]: Relaxed. Pairs with Relaxed in `counts`: a count.
    count.fetch_add(more, plain::Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_pages_share_an_entry() {
        for entries in [8, 64, 4096] {
            let refaults = Refaults::new(entries).unwrap();
            let pages =
                (0..20_000).chain((40..20_000).map(|n| n << 9)).chain(1 << 29..(1 << 29) + 99);
            let mut seen = alloc::collections::BTreeSet::new();
            for gfn in pages {
                let (bucket, tag) = refaults.place(Gfn::new(gfn)).unwrap();
                assert!(seen.insert((bucket.as_ptr(), tag)), "{gfn} of {entries}");
            }
        }
    }

    #[test]
    fn pages_beyond_the_tags_are_counted_and_not_remembered() {
        let refaults = Refaults::new(8).unwrap();
        let far = Gfn::new(1 << 30);
        refaults.evicted(far, Seq::new(3), Kind::File, Tier::Used);
        assert_eq!(refaults.refault(far, Seq::new(4)), None);
        assert_eq!(refaults.counts(Kind::File, Tier::Used).evicted, 1);
        assert!(Refaults::new(MAX_ENTRIES + 1).is_err());
    }

    #[test]
    fn the_clock_gets_coarser_before_it_gets_ambiguous() {
        let granules: alloc::vec::Vec<u64> =
            [8, 1 << 20, 1 << 22].map(|entries| Refaults::new(entries).unwrap().granule()).to_vec();
        assert_eq!(granules, [1, 1, 4]);
    }
}
