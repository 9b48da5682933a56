//! [`Figures`]: what the pass of one generation counted, kept beside the table for who estimates
//! and prints.
//!
//! Written once, when a pass finishes, by the holder of the editor; read without a lock. Every
//! reader looks at the window afterwards, since the slot of an old generation is used again.

use mmu_core::sync::plain::{AtomicU64, Ordering};

/// What a pass counted beyond [`PassCounts`](crate::PassCounts), in 4 KiB pages unless said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    /// Seen mapped.
    pub(crate) mapped: u64,
    /// Seen used.
    pub(crate) young: u64,
    /// Used, and only marked: they stayed in their generation.
    pub(crate) marked: u64,
    /// In the youngest generation without a use: new ones, and neighbours under a huge leaf.
    pub(crate) idle: u64,
    /// Promoted from the generation before.
    pub(crate) again: u64,
    /// Promoted from an older one.
    pub(crate) returned: u64,
    /// Found used since the pass before, outside of passes.
    pub(crate) heard: u64,
    /// `young` less the number of young leaves: what huge leaves may exaggerate.
    pub(crate) excess: u64,
    /// Leaves that count as young because they changed under the MMU's hands.
    pub(crate) lost: u64,
    /// Tracked, and not asked for.
    pub(crate) unknown: u64,
    /// Tables that a filter named.
    pub(crate) found: u64,
    /// Tables that were dense, written down for the next pass.
    pub(crate) dense: u64,
    /// 1 when a pass finished.
    pub(crate) passes: u64,
}

const FIELDS: usize = 13;

impl Figures {
    const fn to_words(self) -> [u64; FIELDS] {
        [
            self.mapped,
            self.young,
            self.marked,
            self.idle,
            self.again,
            self.returned,
            self.heard,
            self.excess,
            self.lost,
            self.unknown,
            self.found,
            self.dense,
            self.passes,
        ]
    }

    const fn from_words(words: [u64; FIELDS]) -> Self {
        let [mapped, young, marked, idle, again, returned, rest @ ..] = words;
        let [heard, excess, lost, unknown, found, dense, passes] = rest;
        Self {
            mapped,
            young,
            marked,
            idle,
            again,
            returned,
            heard,
            excess,
            lost,
            unknown,
            found,
            dense,
            passes,
        }
    }
}

/// The figures of one slot.
#[derive(Debug, Default)]
pub(crate) struct FiguresCell([AtomicU64; FIELDS]);

impl FiguresCell {
    pub(crate) fn load(&self) -> Figures {
        // ORDERING[age-figures]: Acquire. Pairs with Release in `store`. A reader that sees figures
        // of a new generation and then looks at the window no longer finds the one whose slot it
        // took.
        Figures::from_words(self.0.each_ref().map(|word| word.load(Ordering::Acquire)))
    }

    pub(crate) fn store(&self, figures: Figures) {
        for (cell, word) in self.0.iter().zip(figures.to_words()) {
            // ORDERING[age-figures]: Release. Pairs with Acquire in `load`. Publishes: the window
            // in which the slot is free.
            cell.store(word, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_back_as_they_were_stored() {
        let cell = FiguresCell::default();
        assert_eq!(cell.load(), Figures::default());
        let figures = Figures::from_words([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
        cell.store(figures);
        assert_eq!(cell.load(), figures);
        assert_eq!((figures.mapped, figures.excess, figures.passes), (1, 8, 13));
    }
}
