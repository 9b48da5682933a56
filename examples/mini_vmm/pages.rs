//! Sets of data pages, and copies of them.
//!
//! [`Copied`] is the judge of dirty logging: it is brought up to date only by what was harvested,
//! so when the VM stands still and the last harvest is in, it is equal to memory or a write was
//! missed.

use std::ops::Range;

use mmu_core::spte::SpteFormat;

use super::machine::PAGE;
use super::vmm::Vmm;

/// Words of a page.
const WORDS: u64 = PAGE / 8;

/// A set of data pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// None of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// All of them.
    pub fn all(pages: u64) -> Self {
        let mut all = Self::new(pages);
        (0..pages).for_each(|page| all.insert(page));
        all
    }

    /// Add a page; one that does not exist is ignored.
    pub fn insert(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Add the pages `start + n` for each bit `n` of `bits`, 64 to a word.
    pub fn insert_bits(&mut self, range: Range<u64>, bits: &[u64]) {
        for (page, at) in range.zip(0u64..) {
            let word = bits.get((at / 64) as usize).copied().unwrap_or(0);
            if word >> (at % 64) & 1 == 1 {
                self.insert(page);
            }
        }
    }

    /// Add another set of the same pages.
    pub fn union(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(to, from)| *to |= from);
    }

    /// Is it in?
    pub fn contains(&self, page: u64) -> bool {
        let word = self.words.get((page / 64) as usize).copied().unwrap_or(0);
        word >> (page % 64) & 1 == 1
    }

    /// Number of pages in it.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.pages).filter(|page| self.contains(*page))
    }
}

/// A copy of guest data.
#[derive(Debug)]
pub struct Copied {
    words: Vec<u64>,
}

impl Copied {
    /// A copy of all data as it is now.
    pub fn new<F: SpteFormat>(vmm: &Vmm<F>) -> Self {
        let words = (0..vmm.shape.pages).flat_map(|page| vmm.page(page)).collect();
        Self { words }
    }

    /// Bring these pages up to date.
    pub fn update<F: SpteFormat>(&mut self, vmm: &Vmm<F>, pages: &PageSet) {
        for page in pages.iter() {
            let at = (page * WORDS) as usize;
            let copy = &mut self.words[at..at + WORDS as usize];
            copy.iter_mut().zip(vmm.page(page)).for_each(|(to, from)| *to = from);
        }
    }

    /// Pages that differ from memory.
    pub fn differing<F: SpteFormat>(&self, vmm: &Vmm<F>) -> Vec<u64> {
        let pages = self.words.chunks_exact(WORDS as usize).zip(0..);
        let differs = |(copy, page): (&[u64], u64)| {
            let same = vmm.page(page).eq(copy.iter().copied());
            (!same).then_some(page)
        };
        pages.filter_map(differs).collect()
    }
}
