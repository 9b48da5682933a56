//! Marks on entries of a table: a bit each, and how many there are.
//!
//! Owns [`Marks`], which a shadow page has for the entries below which pages are out of sync (KVM
//! row 4.33). Plain values.

use mmu_core::addr::to_index;
use mmu_core::sync::ENTRIES;

const WORDS: usize = ENTRIES.div_ceil(64);

/// See the file's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Marks {
    words: [u64; WORDS],
    count: u16,
}

impl Default for Marks {
    fn default() -> Self {
        Self { words: [0; WORDS], count: 0 }
    }
}

impl Marks {
    /// Mark entry `index`. Was it unmarked?
    pub(crate) fn set(&mut self, index: usize) -> bool {
        let Some(word) = self.words.get_mut(index / 64) else { return false };
        let bit = 1 << (index % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.count += u16::from(new);
        new
    }

    /// Take the mark of entry `index` off. Was it marked?
    pub(crate) fn clear(&mut self, index: usize) -> bool {
        let Some(word) = self.words.get_mut(index / 64) else { return false };
        let bit = 1 << (index % 64);
        let was = *word & bit != 0;
        *word &= !bit;
        self.count -= u16::from(was);
        was
    }

    /// No marks?
    pub(crate) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The first marked entry from `from` on.
    pub(crate) fn next(&self, from: usize) -> Option<usize> {
        let mut at = from / 64;
        let mut word = self.words.get(at)? & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                return Some(at * 64 + to_index(u64::from(word.trailing_zeros())));
            }
            at += 1;
            word = *self.words.get(at)?;
        }
    }

    /// Number of marks.
    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        debug_assert_eq!(
            u64::from(self.count),
            self.words.iter().map(|w| u64::from(w.count_ones())).sum()
        );
        u64::from(self.count)
    }
}

#[cfg(test)]
#[expect(clippy::as_conversions, reason = "small numbers of a test")]
mod tests {
    use std::collections::BTreeSet;
    use std::vec::Vec;

    use super::*;

    #[test]
    fn marks_are_a_set_of_entries() {
        let (mut marks, mut model) = (Marks::default(), BTreeSet::new());
        let mut state = 0x3a5d_u64;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let index = to_index(state >> 33) % ENTRIES;
            if state >> 60 & 1 == 0 {
                assert_eq!(marks.set(index), model.insert(index));
            } else {
                assert_eq!(marks.clear(index), model.remove(&index));
            }
            assert_eq!(marks.count(), model.len() as u64);
            assert_eq!(marks.is_empty(), model.is_empty());
            assert_eq!(marks.next(index), model.range(index..).next().copied());
        }
        let all: Vec<_> = core::iter::successors(marks.next(0), |at| marks.next(at + 1)).collect();
        assert!(all.iter().eq(&model));
        assert_eq!(marks.next(ENTRIES), None);
    }
}
