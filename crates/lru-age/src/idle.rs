//! [`IdleBitmap`]: which guest pages were not used since somebody marked them idle (KVM row 5.39).
//!
//! The rules of the kernel's idle page tracking, on gfns: setting a page's bit clears its accessed
//! bit, without a flush; reading gives 1 for a page that was marked and not used since. One word
//! is 64 pages, and only whole words are read and written. Needs no generations; with them, pass
//! the table's editor as [`Heard`], so that a pass does not miss what marking cleared.
//!
//! One bit per page, allocated once. One owner, no lock.

use alloc::boxed::Box;
use alloc::vec::Vec;

use mmu_core::addr::{Gfn, GfnRange, to_index, to_u64};
use mmu_core::traits::{AgeMode, AgeRange};

use crate::AgeError;
use crate::region::zeroed;
use crate::runs::{Heard, Runs, ask};

/// Pages of a word.
const WORD: u64 = 64;

/// One bit per page of some ranges.
#[derive(Debug)]
pub struct IdleBitmap {
    /// Sorted, disjoint.
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    range: GfnRange,
    /// Of the words of gfns that the range touches.
    words: Box<[u64]>,
}

impl IdleBitmap {
    /// No page is idle. The ranges must be sorted and disjoint, as those of a table are.
    ///
    /// # Errors
    /// [`AgeError::EmptyRange`], [`AgeError::OutOfAddressSpace`], [`AgeError::Overlap`] (also for
    /// ranges that are not sorted), [`AgeError::OutOfMemory`].
    pub fn new(ranges: impl IntoIterator<Item = GfnRange>) -> Result<Self, AgeError> {
        let mut parts: Vec<Part> = Vec::new();
        for range in ranges {
            if range.is_empty() {
                return Err(AgeError::EmptyRange { range });
            }
            if !GfnRange::ALL.covers(range) {
                return Err(AgeError::OutOfAddressSpace { range });
            }
            if let Some(last) = parts.last().filter(|last| last.range.end > range.start) {
                return Err(AgeError::Overlap { range, existing: last.range });
            }
            let count = range.end.get().div_ceil(WORD) - range.start.get() / WORD;
            let no_memory = AgeError::OutOfMemory { range, bytes: 8 * count };
            parts.try_reserve(1).map_err(|_| no_memory)?;
            parts.push(Part { range, words: zeroed(count).ok_or(no_memory)? });
        }
        Ok(Self { parts })
    }

    /// Bytes that the bits take.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.parts.iter().map(|part| 8 * to_u64(part.words.len())).sum()
    }

    /// Mark the pages whose bits are set in `words`, from `first` on: clear their accessed bits
    /// and make them idle. Zero bits change nothing. Pages that are not mapped or outside the
    /// ranges stay as they are: nothing of them can be told. A huge leaf has one accessed bit:
    /// marking one of its pages hides accesses to all of them from others (row 5.9). `heard` gets
    /// what was young.
    ///
    /// # Errors
    /// [`AgeError::Unaligned`] unless `first` is a multiple of 64.
    pub fn mark<M: AgeRange, Y: Heard>(
        &mut self,
        first: Gfn,
        words: &[u64],
        mmu: &M,
        reader: &mut M::Reader,
        heard: &mut Y,
    ) -> Result<(), AgeError> {
        for (at, &word) in (0..).zip(words) {
            let mut bits = word;
            let base = aligned(first)?.saturating_add(at * WORD);
            // Runs of bits, so that a word of ones is one question.
            while bits != 0 {
                let start = u64::from(bits.trailing_zeros());
                let length = u64::from((bits >> start).trailing_ones());
                bits &= !ones(start, length);
                self.mark_run(
                    GfnRange::from_len(base.saturating_add(start), length),
                    mmu,
                    reader,
                    heard,
                );
            }
        }
        aligned(first).map(|_| ())
    }

    fn mark_run<M: AgeRange, Y: Heard>(
        &mut self,
        run: GfnRange,
        mmu: &M,
        reader: &mut M::Reader,
        heard: &mut Y,
    ) {
        for part in &mut self.parts {
            let range = part.range.intersection(run);
            if range.is_empty() {
                continue;
            }
            let young = |run| heard.young(run);
            let present = |run| part.change(run, Change::Set);
            let mut sink = Runs { range, present, young };
            let _ = ask(mmu, reader, range, AgeMode::Clear, &mut sink);
        }
    }

    /// The bits of `words.len()` words of pages from `first` on: 1 for a page that is idle. A page
    /// that was used since it was marked is not, now and until it is marked again. Accessed bits
    /// stay as they are.
    ///
    /// # Errors
    /// [`AgeError::Unaligned`] unless `first` is a multiple of 64; `words` is as it was.
    pub fn read<M: AgeRange>(
        &mut self,
        first: Gfn,
        words: &mut [u64],
        mmu: &M,
        reader: &mut M::Reader,
    ) -> Result<(), AgeError> {
        let first = aligned(first)?;
        let asked = GfnRange::from_len(first, WORD * to_u64(words.len()));
        words.fill(0);
        for part in &mut self.parts {
            let range = part.range.intersection(asked);
            if range.is_empty() {
                continue;
            }
            // Words in which nothing is idle need no question.
            let mut at = range.start;
            while let Some(run) = part.next_marked(GfnRange::new(at, range.end)) {
                let young = |run| part.change(run, Change::Clear);
                let mut sink = Runs { range: run, present: |_| {}, young };
                let _ = ask(mmu, reader, run, AgeMode::Test, &mut sink);
                at = run.end;
            }
            let origin = part.range.start.get() / WORD;
            for (at, word) in (first.get() / WORD..).zip(words.iter_mut()) {
                let index = at.checked_sub(origin).map(to_index);
                let idle = index.and_then(|index| part.words.get(index));
                *word |= idle.copied().unwrap_or(0);
            }
        }
        Ok(())
    }

    /// How many pages are marked and were not seen used since; looks at no page.
    #[must_use]
    pub fn marked(&self) -> u64 {
        let words = self.parts.iter().flat_map(|part| part.words.iter());
        words.map(|word| u64::from(word.count_ones())).sum()
    }
}

/// What happens to bits.
#[derive(Clone, Copy)]
enum Change {
    Set,
    Clear,
}

impl Part {
    /// The first pages of `range`, which is inside the part, whose words have a bit set: as many
    /// words as follow each other. `None` when all words are 0.
    fn next_marked(&self, range: GfnRange) -> Option<GfnRange> {
        if range.is_empty() {
            return None;
        }
        let origin = self.range.start.get() / WORD;
        let (first, end) = (range.start.get() / WORD, range.end.get().div_ceil(WORD));
        let words = self.words.get(to_index(first - origin)..to_index(end - origin))?;
        let start = words.iter().position(|&word| word != 0)?;
        let length = words.iter().skip(start).take_while(|&&word| word != 0).count();
        let base = Gfn::new((first + to_u64(start)) * WORD);
        Some(GfnRange::from_len(base, to_u64(length) * WORD).intersection(range))
    }

    /// Set or clear the bits of the pages of `run` that are in the range.
    fn change(&mut self, run: GfnRange, change: Change) {
        let run = run.intersection(self.range);
        let origin = self.range.start.get() / WORD;
        let mut at = run.start.get();
        while at < run.end.get() {
            let offset = at % WORD;
            let length = (WORD - offset).min(run.end.get() - at);
            let mask = ones(offset, length);
            if let Some(word) = self.words.get_mut(to_index(at / WORD - origin)) {
                match change {
                    Change::Set => *word |= mask,
                    Change::Clear => *word &= !mask,
                }
            }
            at += length;
        }
    }
}

/// `length` ones from bit `start` on; `start + length` is at most 64.
const fn ones(start: u64, length: u64) -> u64 {
    match length {
        0 => 0,
        _ => (u64::MAX >> (WORD - length)) << start,
    }
}

fn aligned(first: Gfn) -> Result<Gfn, AgeError> {
    if first.get() % WORD == 0 { Ok(first) } else { Err(AgeError::Unaligned { gfn: first }) }
}
