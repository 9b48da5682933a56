//! One word per block of 512 pages: how many pages of each label, and, under a huge leaf, all there
//! is to know.
//!
//! A block that one huge leaf maps is uniform: its summary holds its state and its pages' words are
//! all 0, so that aging a 2 MiB leaf is one store and, where the allocator hands out lazily zeroed
//! memory, the words never cost a page. Any other block has level 1 and its words are the truth.
//!
//! INVARIANT[I27]: the counts equal a recount of the words; they sum to at most 512; a huge
//! block has one label, all 512 pages, and zero words.

use mmu_core::addr::Level;
use mmu_core::sync::{AtomicU64, Ordering};

use crate::r#gen::Label;
use crate::word::{BLOCK_PAGES, Planes};

// Bits: 0..40 four counts of ten bits, 40..42 level of the leaf - 1, 42 referenced (huge only).
const FIELD: u64 = 10;
const FIELD_MASK: u64 = (1 << FIELD) - 1;
const COUNTS: u64 = (1 << (4 * FIELD)) - 1;
const LEVEL_SHIFT: u64 = 40;
const REFERENCED: u64 = 1 << 42;

const _: () = assert!(BLOCK_PAGES <= FIELD_MASK, "a count of a whole block fits its field");

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Summary(u64);

impl Summary {
    /// Nothing tracked.
    pub(crate) const EMPTY: Self = Self(0);

    /// A block that one leaf at `level` (2 or 3) maps.
    pub(crate) fn huge(level: Level, label: Label, referenced: bool) -> Self {
        let size: u64 = if level == Level::L3 { 2 } else { 1 };
        let flag = if referenced { REFERENCED } else { 0 };
        Self(BLOCK_PAGES << (FIELD * label.get()) | size << LEVEL_SHIFT | flag)
    }

    #[inline]
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// The size of the leaves: level 1 also for a block with nothing mapped.
    #[inline]
    pub(crate) const fn level(self) -> Level {
        match self.0 >> LEVEL_SHIFT & 3 {
            0 => Level::L1,
            1 => Level::L2,
            _ => Level::L3,
        }
    }

    #[inline]
    pub(crate) const fn is_huge(self) -> bool {
        self.0 >> LEVEL_SHIFT & 3 != 0
    }

    /// Was the huge leaf used at least once?
    #[inline]
    pub(crate) const fn referenced(self) -> bool {
        self.0 & REFERENCED != 0
    }

    /// Pages with `label`.
    #[inline]
    pub(crate) const fn count(self, label: Label) -> u64 {
        self.0 >> (FIELD * label.get()) & FIELD_MASK
    }

    /// Tracked pages.
    #[inline]
    pub(crate) const fn total(self) -> u64 {
        let pairs = (self.0 & (FIELD_MASK | FIELD_MASK << 20))
            + (self.0 >> FIELD & (FIELD_MASK | FIELD_MASK << 20));
        (pairs + (pairs >> 20)) & ((1 << 11) - 1)
    }

    /// One bit per label: are there pages with it?
    #[inline]
    pub(crate) fn labels(self) -> u64 {
        Label::ALL
            .iter()
            .fold(0, |set, &label| set | u64::from(self.count(label) != 0) << label.get())
    }

    /// The one label of a huge block.
    #[inline]
    pub(crate) fn huge_label(self) -> Label {
        Label::new(u64::from(self.labels().trailing_zeros()))
    }

    /// The same pages, mapped by 4 KiB leaves.
    pub(crate) const fn as_pages(self) -> Self {
        Self(self.0 & COUNTS)
    }

    /// Less the pages of a tally, more `entered` pages of `label`.
    pub(crate) const fn changed(self, left: Tally, entered: u64, label: Label) -> Self {
        Self(self.0 - left.0 + (entered << (FIELD * label.get())))
    }

    /// All pages with `from` given `to`.
    pub(crate) const fn relabelled(self, from: Label, to: Label) -> Self {
        let pages = self.count(from);
        Self(self.0 - (pages << (FIELD * from.get())) + (pages << (FIELD * to.get())))
    }
}

/// Pages per label, packed as in a summary.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally(u64);

impl Tally {
    /// Count the pages of `mask`.
    #[inline]
    pub(crate) fn add(&mut self, planes: Planes, mask: u64) {
        for label in Label::ALL {
            let pages = u64::from((planes.labelled(label) & mask).count_ones());
            self.0 += pages << (FIELD * label.get());
        }
    }

    /// As the summary of a level-1 block.
    pub(crate) const fn summary(self) -> Summary {
        Summary(self.0)
    }
}

/// The summary of one block as it stands in memory.
#[inline]
pub(crate) fn load(cell: &AtomicU64) -> Summary {
    // ORDERING[age-summary]: Acquire. Pairs with Release in `store`. A reader that finds level 1
    // finds the words filled in; one that saw a word cleared by a collapse finds the huge level.
    Summary(cell.load(Ordering::Acquire))
}

/// The same for the holder of the editor.
#[inline]
pub(crate) fn load_own(cell: &AtomicU64) -> Summary {
    // ORDERING[age-editor]: Relaxed. The editor is ours: its Acquire ordered all earlier writes.
    Summary(cell.load(Ordering::Relaxed))
}

/// Replace the summary of one block.
#[inline]
pub(crate) fn store(cell: &AtomicU64, summary: Summary) {
    // ORDERING[age-summary]: Release. Pairs with Acquire in `load`. Publishes: the words of a
    // block that was split, and the window under which the labels were chosen.
    cell.store(summary.0, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_fit_their_fields_at_both_ends() {
        for label in Label::ALL {
            for (level, referenced) in [(Level::L2, false), (Level::L3, true)] {
                let summary = Summary::huge(level, label, referenced);
                assert_eq!((summary.count(label), summary.total()), (BLOCK_PAGES, BLOCK_PAGES));
                assert_eq!((summary.level(), summary.referenced()), (level, referenced));
                assert_eq!((summary.labels(), summary.huge_label()), (1 << label.get(), label));
                assert_eq!(summary.as_pages().level(), Level::L1);
                for to in Label::ALL {
                    assert_eq!(summary.relabelled(label, to).count(to), BLOCK_PAGES);
                    assert_eq!(summary.relabelled(label, to).total(), BLOCK_PAGES);
                }
            }
        }
    }

    #[test]
    fn tallies_move_pages_between_labels() {
        let mut all = Tally::default();
        all.add(Planes::uniform(0xff, Label::new(1), false), u64::MAX);
        all.add(Planes::uniform(0xf0, Label::new(3), true), u64::MAX);
        let mut left = Tally::default();
        left.add(Planes::uniform(0xff, Label::new(1), false), 0x7f);
        let after = all.summary().changed(left, 500, Label::new(0));
        assert_eq!(Label::ALL.map(|label| after.count(label)), [500, 1, 0, 4]);
        assert_eq!((after.total(), after.labels(), after.is_huge()), (505, 0b1011, false));
    }
}
