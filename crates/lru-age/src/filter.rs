//! Two Bloom filters by parity: which 2 MiB blocks are worth a look (KVM row 5.26).
//!
//! The pass that starts at generation `n` looks where filter `n` says, and writes down for `n + 1`
//! where it found many used pages. Look-arounds and faults add to filter `n` in between
//! ([`crate::AgeTable::note`]). A filter that was never begun, or belongs to another generation,
//! says "look": forgetting costs time, never a page.
//!
//! The holder of the editor begins filters; anybody may add to one. A note that meets the clearing
//! of a filter may be lost, so a page behind it waits for the next full pass. Nothing is ordered.

use alloc::boxed::Box;

use mmu_core::addr::{Gfn, to_index};
use mmu_core::sync::plain::{AtomicU64, Ordering};

use crate::r#gen::Seq;
use crate::region::zeroed;
use crate::word::BLOCK_PAGES;

/// log2 of the bits of a filter.
const SHIFT: u32 = 15;
/// 64-bit words of a filter.
const WORDS: u64 = (1 << SHIFT) / 64;

/// Both filters.
#[derive(Debug)]
pub(crate) struct Filters([Filter; 2]);

impl Filters {
    /// Bytes that both take.
    pub(crate) const BYTES: u64 = 2 * 8 * WORDS;

    /// Two filters that say "look" until they are begun; `None` when the allocator has no memory.
    pub(crate) fn new() -> Option<Self> {
        Some(Self([Filter::new()?, Filter::new()?]))
    }

    /// A pass starts at `seq`: empty the filter for the pass after it, unless the same pass was
    /// started and dropped before.
    pub(crate) fn begin(&self, seq: Seq) {
        let next = Seq::new(seq.get() + 1);
        let filter = self.of(next);
        if !filter.is_of(next) {
            filter.begin(next);
        }
    }

    /// Shall the pass at `seq` look at the block of `gfn`?
    #[inline]
    pub(crate) fn contains(&self, seq: Seq, gfn: Gfn) -> bool {
        let filter = self.of(seq);
        !filter.is_of(seq) || filter.contains(gfn)
    }

    /// The pass at `seq` shall look at the block of `gfn`.
    #[inline]
    pub(crate) fn add(&self, seq: Seq, gfn: Gfn) {
        let filter = self.of(seq);
        if filter.is_of(seq) {
            filter.add(gfn);
        }
    }

    fn of(&self, seq: Seq) -> &Filter {
        let [even, odd] = &self.0;
        if seq.get() % 2 == 0 || mmu_core::busted!("one_filter") { even } else { odd }
    }
}

/// One filter: m = 2^15 bits, k = 2.
#[derive(Debug)]
struct Filter {
    /// The generation that it is for, plus one; 0 while it was never begun.
    owner: AtomicU64,
    words: Box<[AtomicU64]>,
}

impl Filter {
    fn new() -> Option<Self> {
        Some(Self { owner: AtomicU64::new(0), words: zeroed(WORDS)? })
    }

    #[inline]
    fn is_of(&self, seq: Seq) -> bool {
        // ORDERING[age-filter]: Relaxed. Pairs with Relaxed in `begin`: a hint.
        self.owner.load(Ordering::Relaxed) == seq.get() + 1
    }

    fn begin(&self, seq: Seq) {
        for word in &self.words {
            // ORDERING[age-filter]: Relaxed. Pairs with Relaxed in `contains`: a hint.
            word.store(0, Ordering::Relaxed);
        }
        // ORDERING[age-filter]: Relaxed. Pairs with Relaxed in `is_of`: who sees the owner before
        // the emptied words finds blocks too many, who adds meanwhile may add in vain.
        self.owner.store(seq.get() + 1, Ordering::Relaxed);
    }

    #[inline]
    fn contains(&self, gfn: Gfn) -> bool {
        places(gfn).into_iter().all(|(word, bit)| {
            // ORDERING[age-filter]: Relaxed. Pairs with Relaxed in `add`: a hint.
            self.words.get(word).is_none_or(|word| word.load(Ordering::Relaxed) & bit != 0)
        })
    }

    #[inline]
    fn add(&self, gfn: Gfn) {
        for (word, bit) in places(gfn) {
            let Some(word) = self.words.get(word) else { continue };
            // ORDERING[age-filter]: Relaxed. Pairs with Relaxed in `contains`: a hint. Looked at
            // first, so that noting the same block again writes no shared line.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }
}

/// The two bits of a block: word and bit in it. Thirty bits of one product, split in two.
#[inline]
fn places(gfn: Gfn) -> [(usize, u64); 2] {
    let hash = (gfn.get() / BLOCK_PAGES).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - 2 * SHIFT);
    [hash & ((1 << SHIFT) - 1), hash >> SHIFT].map(|bit| (to_index(bit / 64), 1 << (bit % 64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gfn(block: u64) -> Gfn {
        Gfn::new(block * BLOCK_PAGES)
    }

    #[test]
    fn a_filter_that_was_not_begun_says_look() {
        let filters = Filters::new().unwrap();
        let seq = Seq::new(3);
        assert!(filters.contains(seq, gfn(5)));
        filters.begin(seq);
        assert!(filters.contains(seq, gfn(5)), "the first pass has no filter of its own");
        assert!(!filters.contains(Seq::new(4), gfn(5)));
        // Nobody passed through 4: the filter of 5 was never begun.
        assert!(filters.contains(Seq::new(5), gfn(5)));
        assert!(filters.contains(Seq::new(6), gfn(5)), "same parity as 4, another generation");
    }

    #[test]
    fn parity_keeps_what_is_read_and_what_is_written_apart() {
        let filters = Filters::new().unwrap();
        for seq in (3..20).map(Seq::new) {
            filters.begin(seq);
            let next = Seq::new(seq.get() + 1);
            filters.add(next, gfn(seq.get()));
            assert!(filters.contains(next, gfn(seq.get())));
            if seq.get() > 3 {
                assert!(filters.contains(seq, gfn(seq.get() - 1)), "what the last pass wrote");
                assert!(!filters.contains(next, gfn(seq.get() - 1)), "emptied before it is filled");
            }
            // A pass that was dropped and starts again keeps what it knew.
            filters.begin(seq);
            assert!(filters.contains(next, gfn(seq.get())));
        }
    }

    /// m = 2^15, k = 2: (1 - e^(-2n/m))^2 of the blocks that were not added are found all the same.
    #[test]
    fn false_positives_are_as_many_as_theory_says() {
        for (added, percent) in [(1_000, 0.4), (5_000, 6.9), (10_000, 20.9)] {
            let filters = Filters::new().unwrap();
            let seq = Seq::new(4);
            filters.begin(Seq::new(3));
            // Blocks anywhere in a large address space.
            let block = |n: u64| {
                let x = (n ^ n << 21).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                (x ^ (x >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 21
            };
            (0..added).for_each(|n| filters.add(seq, gfn(block(n))));
            assert!((0..added).all(|n| filters.contains(seq, gfn(block(n)))), "never a false no");
            let asked = 100_000_u64;
            let wrong = (added..added + asked).filter(|&n| filters.contains(seq, gfn(block(n))));
            let found = u32::try_from(wrong.count()).unwrap();
            let found = f64::from(found) * 100.0 / 100_000.0;
            assert!((found - percent).abs() < 0.15 * percent + 0.1, "{added}: {found} % found");
        }
    }
}
