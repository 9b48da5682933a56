//! Four bits per page, sixteen pages per word, sixty-four pages per step.
//!
//! A word holds four planes of sixteen bits: tracked, referenced, and the two bits of the label.
//! All four bits of a page share one word, so a reader never sees half a change; and a plane is
//! sixteen consecutive bits, so an MMU's mask of a table is compared without spreading bits out.
//! Four words make a [`Group`], and their transpose ([`Planes`]) is four masks of 64 pages on which
//! the rules are a few bit operations. Pages that are not tracked keep all their bits 0.
//!
//! Words are written by the holder of the editor alone, with plain stores: a compare-exchange per
//! word would only cost.

use mmu_core::addr::{Gfn, Level, to_index};
use mmu_core::sync::{AtomicU64, Ordering};
use mmu_core::traits::MASK_WORDS;

use crate::r#gen::Label;

/// Pages per block: what one level-1 table maps.
pub(crate) const BLOCK_PAGES: u64 = Level::L2.pages();

/// One bit per page of a block.
pub(crate) type Mask = [u64; MASK_WORDS];
/// 64 pages.
pub(crate) type Group = [AtomicU64; 4];
/// The pages of one block.
pub(crate) type Block = [Group; MASK_WORDS];

/// Every page of a block.
pub(crate) const FULL: Mask = mask(0, BLOCK_PAGES);

/// Pages `from..to` of a block.
pub(crate) const fn mask(from: u64, to: u64) -> Mask {
    let mut words = [0; MASK_WORDS];
    let (mut rest, mut base): (&mut [u64], u64) = (&mut words, 0);
    while let Some((word, tail)) = rest.split_first_mut() {
        *word = below(to, base) & !below(from, base);
        (rest, base) = (tail, base + 64);
    }
    words
}

/// The bits of the word that starts at page `base` whose page is below `page`.
const fn below(page: u64, base: u64) -> u64 {
    match page.saturating_sub(base) {
        bits @ 0..64 => (1 << bits) - 1,
        _ => u64::MAX,
    }
}

/// No page at all?
pub(crate) fn is_empty(mask: &Mask) -> bool {
    mask.iter().fold(0, |all, word| all | word) == 0
}

/// What a page stores, as masks of 64 pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planes {
    pub(crate) tracked: u64,
    pub(crate) referenced: u64,
    lo: u64,
    hi: u64,
}

/// The four words of a group as they stand, for the holder of the editor.
#[inline]
pub(crate) fn load_own(group: &Group) -> [u64; 4] {
    let [a, b, c, d] = group;
    // ORDERING[age-editor]: Relaxed. The editor is ours: its Acquire ordered all earlier writes.
    [a, b, c, d].map(|word| word.load(Ordering::Relaxed))
}

/// The four words of a group, for a reader.
#[inline]
pub(crate) fn load(group: &Group) -> [u64; 4] {
    let [a, b, c, d] = group;
    // ORDERING[age-word]: Acquire. Pairs with Release in `store`. A reader that sees a label also
    // sees the window that gave the label its meaning, if it looks at the window afterwards.
    [a, b, c, d].map(|word| word.load(Ordering::Acquire))
}

/// Store those words of a group that change.
#[inline]
pub(crate) fn store(group: &Group, old: [u64; 4], new: [u64; 4]) {
    for ((cell, old), new) in group.iter().zip(old).zip(new) {
        if old != new {
            // ORDERING[age-word]: Release. Pairs with Acquire in `load`. Publishes: the window
            // under which the labels were chosen, and the summary that made words authoritative.
            cell.store(new, Ordering::Release);
        }
    }
}

/// The tracked pages of four words: the first plane of their transpose, alone.
#[inline]
pub(crate) fn tracked(words: [u64; 4]) -> u64 {
    let [a, b, c, d] = words.map(|word| word & 0xffff);
    a | b << 16 | c << 32 | d << 48
}

/// Words to planes and back: the transpose of a 4 by 4 matrix of 16-bit elements.
#[inline]
const fn transpose(words: [u64; 4]) -> [u64; 4] {
    const EVEN: u64 = 0x0000_ffff_0000_ffff;
    const LOW: u64 = 0xffff_ffff;
    let [a, b, c, d] = words;
    let (ab_even, ab_odd) = ((a & EVEN) | (b & EVEN) << 16, (a >> 16) & EVEN | b & !EVEN);
    let (cd_even, cd_odd) = ((c & EVEN) | (d & EVEN) << 16, (c >> 16) & EVEN | d & !EVEN);
    [
        ab_even & LOW | cd_even << 32,
        ab_odd & LOW | cd_odd << 32,
        ab_even >> 32 | cd_even & !LOW,
        ab_odd >> 32 | cd_odd & !LOW,
    ]
}

impl Planes {
    #[inline]
    pub(crate) const fn from_words(words: [u64; 4]) -> Self {
        let [tracked, referenced, lo, hi] = transpose(words);
        Self { tracked, referenced, lo, hi }
    }

    #[inline]
    pub(crate) const fn to_words(self) -> [u64; 4] {
        transpose([self.tracked, self.referenced, self.lo, self.hi])
    }

    /// The pages of `mask` all tracked alike; no others.
    pub(crate) const fn uniform(mask: u64, label: Label, referenced: bool) -> Self {
        let planes = Self { tracked: mask, referenced: 0, lo: 0, hi: 0 };
        let planes = planes.relabelled(mask, label);
        Self { referenced: if referenced { mask } else { 0 }, ..planes }
    }

    /// The tracked pages that carry `label`.
    #[inline]
    pub(crate) const fn labelled(self, label: Label) -> u64 {
        let lo = self.lo ^ spread(!label.get() & 1);
        let hi = self.hi ^ spread(!(label.get() >> 1) & 1);
        self.tracked & lo & hi
    }

    /// The pages of `mask`, all tracked, given `label`.
    #[inline]
    pub(crate) const fn relabelled(self, mask: u64, label: Label) -> Self {
        Self {
            lo: self.lo & !mask | mask & spread(label.get() & 1),
            hi: self.hi & !mask | mask & spread(label.get() >> 1),
            ..self
        }
    }

    /// Bits of pages that are not tracked: always 0.
    pub(crate) const fn stray(self) -> u64 {
        (self.referenced | self.lo | self.hi) & !self.tracked
    }

    /// Take in what an MMU said about the pages of `looked`: `present` is mapped, `young` was used.
    #[inline]
    pub(crate) const fn observe(self, looked: u64, present: u64, young: u64, rules: Rules) -> Seen {
        let present = present & looked;
        let young = young & present;
        let gone = self.tracked & looked & !present;
        let fresh = present & !self.tracked;
        let used = young & self.tracked;
        let earned = used & (self.referenced | rules.immediate);
        let promoted = earned & !self.labelled(rules.youngest);
        let kept = Self {
            tracked: (self.tracked | fresh) & !gone,
            referenced: (self.referenced | young) & !gone,
            lo: self.lo & !gone,
            hi: self.hi & !gone,
        };
        Seen {
            after: kept.relabelled(fresh | promoted, rules.youngest),
            gone,
            fresh,
            promoted,
            again: promoted & self.labelled(rules.previous),
            second_chance: used & !earned,
        }
    }
}

/// A bit to a word of that bit.
#[inline]
const fn spread(bit: u64) -> u64 {
    bit.wrapping_neg()
}

/// What an access earns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Label of the generation that promoted and new pages enter.
    pub(crate) youngest: Label,
    /// Label of the generation before it.
    pub(crate) previous: Label,
    /// All ones: the first access promotes. Zero: the second does.
    pub(crate) immediate: u64,
}

/// One group before and after, as masks of what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) after: Planes,
    pub(crate) gone: u64,
    pub(crate) fresh: u64,
    pub(crate) promoted: u64,
    /// Of these, from the generation before.
    pub(crate) again: u64,
    pub(crate) second_chance: u64,
}

/// One page out of the four words of its group: (label, referenced), `None` when not tracked.
pub(crate) fn page(words: [u64; 4], gfn: Gfn) -> Option<(Label, bool)> {
    let planes = Planes::from_words(words);
    let bit = 1_u64 << (gfn.get() % BLOCK_PAGES % 64);
    if planes.tracked & bit == 0 {
        return None;
    }
    let label = Label::ALL.into_iter().find(|&label| planes.labelled(label) & bit != 0)?;
    Some((label, planes.referenced & bit != 0))
}

/// Which group of its block a gfn is in.
pub(crate) const fn group_of(gfn: Gfn) -> usize {
    to_index((gfn.get() % BLOCK_PAGES) / 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(youngest: u64, immediate: u64) -> Rules {
        Rules { youngest: Label::new(youngest), previous: Label::new(youngest + 3), immediate }
    }

    #[test]
    fn masks_cover_exactly_their_pages() {
        for (from, to) in [(0, 0), (0, 1), (63, 65), (64, 128), (5, 511), (0, 512), (511, 512)] {
            let words = mask(from, to);
            for page in 0..512_u64 {
                let bit = words[to_index(page / 64)] >> (page % 64) & 1;
                assert_eq!(bit == 1, (from..to).contains(&page), "{from}..{to} page {page}");
            }
        }
        assert!(is_empty(&mask(7, 7)) && !is_empty(&mask(7, 8)));
    }

    #[test]
    fn page_i_keeps_its_four_bits_in_word_i_div_16() {
        for i in 0..64_u64 {
            let planes = Planes::uniform(1 << i, Label::new(2), true);
            let words = planes.to_words();
            let expected = (1 | 1 << 16 | 1 << 48) << (i % 16);
            for (number, word) in words.into_iter().enumerate() {
                let here = mmu_core::addr::to_u64(number) == i / 16;
                assert_eq!(word, if here { expected } else { 0 }, "page {i} word {number}");
            }
            assert_eq!(Planes::from_words(words), planes);
            assert_eq!(tracked(words), 1 << i);
            assert_eq!(page(words, Gfn::new(i)), Some((Label::new(2), true)));
            assert_eq!(page(words, Gfn::new(i ^ 1)), None);
        }
    }

    #[test]
    fn every_tracked_page_has_exactly_one_label() {
        let words = [0x1234_5678_9abc_ffff, 0xfedc_0000_ffff_ffff, 0xffff, 0xaaaa_5555_0000_ffff];
        let planes = Planes::from_words(words);
        let labels = Label::ALL.map(|label| planes.labelled(label));
        let (mut union, mut sum) = (0, 0);
        for mask in labels {
            union |= mask;
            sum += mask.count_ones();
        }
        assert_eq!((union, sum), (u64::MAX, 64));
    }

    /// Rows 5.21 and 5.22, one page at a time: (tracked, referenced, old label, present, young).
    #[test]
    fn rules_hold_for_every_state_of_one_page() {
        for case in 0..256_u64 {
            let bit = |n: u64| case >> n & 1 == 1;
            let (was, referenced, present, young) = (bit(0), bit(0) && bit(1), bit(2), bit(3));
            let (old, immediate) = (Label::new(case >> 4), spread(case >> 6 & 1));
            let at = 1 << 40;
            let before = if was {
                Planes::uniform(at, old, referenced)
            } else {
                Planes::uniform(0, old, false)
            };
            let flag = |on: bool| if on { at } else { 0 };
            let seen = before.observe(at, flag(present), flag(young), rules(1, immediate));
            let used = was && present && young;
            let earned = used && (referenced || immediate != 0);
            assert_eq!(seen.after.tracked, flag(present), "{case:#x}");
            assert_eq!(seen.gone, flag(was && !present), "{case:#x}");
            assert_eq!(seen.fresh, flag(!was && present), "{case:#x}");
            assert_eq!(seen.promoted, flag(earned && old != Label::new(1)), "{case:#x}");
            assert_eq!(seen.second_chance, flag(used && !earned), "{case:#x}");
            assert_eq!(seen.again, flag(earned && old == Label::new(0)), "{case:#x}");
            assert_eq!(seen.after.stray(), 0, "{case:#x}");
            if present {
                let label = if earned || !was { Label::new(1) } else { old };
                assert_eq!(seen.after.labelled(label), at, "{case:#x}");
                assert_eq!(seen.after.referenced, flag(referenced || young), "{case:#x}");
            }
        }
    }

    #[test]
    fn pages_not_looked_at_stay_as_they_are() {
        let before = Planes::uniform(u64::MAX, Label::new(3), false);
        let seen = before.observe(0, 0, u64::MAX, rules(0, 0));
        assert_eq!(seen.after, before);
        assert_eq!((seen.gone, seen.fresh, seen.promoted, seen.second_chance), (0, 0, 0, 0));
    }
}
