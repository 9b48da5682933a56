//! [`WorkingSet`]: how many pages a VM uses, and how wrong that may be (KVM row 8.3).
//!
//! [`WorkingSet::of`] reads what passes counted: no cost, as exact as the passes were.
//! [`SampledWorkingSet`] looks at some blocks only: its cost is bounded however large the VM is,
//! its error is statistical. Both give an interval, in integers.

use alloc::boxed::Box;
use alloc::vec::Vec;

use mmu_core::addr::{Gfn, GfnRange, to_index, to_u64};
use mmu_core::traits::{AgeMode, AgeRange};

use crate::AgeError;
use crate::figures::Figures;
use crate::r#gen::Seq;
use crate::runs::{Heard, Runs, ask};
use crate::table::AgeTable;
use crate::word::BLOCK_PAGES;

/// Reads of a table whose window moved meanwhile before the reader gives up.
const MAX_READ_TRIES: u32 = 8;

/// Pages (4 KiB) that were used, and the interval in which the truth lies.
///
/// What widens the interval: a huge leaf has one accessed bit, so of its pages one was used or all;
/// pages that no pass asked about; leaves that changed under the MMU's hands. What it does not
/// cover: accesses that a TLB hid. Passes with
/// [`AgeMode::ClearFlush`](mmu_core::traits::AgeMode::ClearFlush) have none of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    /// The best guess.
    pub pages: u64,
    /// No fewer.
    pub low: u64,
    /// No more.
    pub high: u64,
}

impl WorkingSet {
    /// Pages used in the last `generations` intervals between passes: 1, or as far back as the
    /// window keeps generations apart: 2 with four generations, 1 with three.
    ///
    /// With one generation and full passes the guess is what the last pass saw. With two, a page
    /// that was merely marked in the one before ([`Promotion`](crate::Promotion)) cannot be told
    /// from one promoted since, which widens the interval.
    ///
    /// `None` when the window does not reach so far, fewer passes finished, or passes finish faster
    /// than this can read.
    #[must_use]
    pub fn of(table: &AgeTable, generations: u64) -> Option<Self> {
        for _ in 0..MAX_READ_TRIES {
            let window = table.window();
            if generations == 0 || generations + 2 > window.max_gens() {
                return None;
            }
            let read = Self::read(table, window.max_seq(), generations);
            if window == table.window() {
                return read;
            }
        }
        None
    }

    fn read(table: &AgeTable, open: Seq, generations: u64) -> Option<Self> {
        let figures = |back: u64| {
            let seq = Seq::new(open.get().checked_sub(back)?);
            Some(table.figures(seq.generation())).filter(|figures| figures.passes != 0)
        };
        let last = figures(1)?;
        if generations == 1 {
            return Some(Self::of_pass(&last));
        }
        figures(2).map(|before| Self::of_two(&before, &last))
    }

    /// What one pass saw, and what others saw before it.
    const fn of_pass(figures: &Figures) -> Self {
        let pages = figures.young.saturating_add(figures.heard);
        Self {
            pages,
            low: figures.young.saturating_sub(figures.excess).saturating_sub(figures.lost),
            high: pages.saturating_add(figures.unknown),
        }
    }

    /// The union of what two passes in a row saw: the sum less what both did.
    ///
    /// A page that the second promoted from the first one's generation is in both. Those that the
    /// first merely marked stayed in an older generation; of pages that came back from there, some
    /// were marked. How many is the one thing not known; the guess is that marked pages were used
    /// again as often as the others of the first pass.
    fn of_two(before: &Figures, last: &Figures) -> Self {
        let [first, second] = [before, last].map(Self::of_pass);
        let sum = before.young.saturating_add(last.young);
        let most = before.marked.min(last.returned);
        let known = before.young.max(before.marked);
        let rate = last.again.saturating_add(most).min(known);
        let guess = wide_share(before.marked, rate, known).min(most);
        // Pages may have come into the first one's generation without a use.
        let surely = last.again.saturating_sub(before.idle);
        let heard = before.heard.saturating_add(last.heard);
        let unknown = before.unknown.saturating_add(last.unknown);
        let wrong = [before.excess, last.excess, before.lost, last.lost];
        let wrong = wrong.into_iter().fold(last.again.saturating_add(most), u64::saturating_add);
        let low = sum.saturating_sub(wrong).max(first.low).max(second.low);
        let high = sum.saturating_sub(surely).saturating_add(heard).saturating_add(unknown);
        let high = high.max(first.high).max(second.high);
        let pages = sum.saturating_sub(last.again).saturating_sub(guess).saturating_add(heard);
        Self { pages: pages.clamp(low, high), low, high }
    }

    /// The larger distance from the guess to an end of the interval, in percent of the guess,
    /// rounded up; 0 for an empty set that is known to be empty.
    #[must_use]
    pub fn error_percent(&self) -> u64 {
        let off = (self.pages - self.low).max(self.high - self.pages);
        if off == 0 { 0 } else { (off.saturating_mul(100)).div_ceil(self.pages.max(1)) }
    }
}

/// A working set from a sample of 2 MiB blocks, one at random out of each of as many strata.
///
/// Use: [`clear`](Self::clear), let the guest run, [`measure`](Self::measure), as often as wanted.
#[derive(Debug)]
pub struct SampledWorkingSet {
    /// The pages looked at: a block each, cut by its range. Ascending.
    blocks: Box<[GfnRange]>,
    /// Pages used in each, of the last measurement.
    used: Box<[u64]>,
    /// Blocks of all ranges.
    population: u64,
}

/// Standard deviations to each side: 99.7 % of a normal distribution, 99 % with reserves.
const SIGMAS: u64 = 3;
/// Of blocks of a sort that no sample met, the share may be up to this many parts in as many as
/// were sampled (99 %: -ln 0.01 = 4.6).
const UNMET: u64 = 5;

impl SampledWorkingSet {
    /// Choose `samples` blocks of the table's ranges; all of them when there are no more. `seed`
    /// decides which.
    ///
    /// # Errors
    /// [`AgeError::NoMemoryFor`].
    pub fn new(table: &AgeTable, samples: u64, seed: u64) -> Result<Self, AgeError> {
        let blocks_of = |range: GfnRange| {
            range.end.get().div_ceil(BLOCK_PAGES) - range.start.get() / BLOCK_PAGES
        };
        let population: u64 = table.ranges().map(blocks_of).sum();
        let samples = samples.min(population);
        let no_memory = AgeError::NoMemoryFor { bytes: samples.saturating_mul(24) };
        let mut blocks = Vec::new();
        let mut used = Vec::new();
        let count = to_index(samples);
        blocks.try_reserve_exact(count).map_err(|_| no_memory)?;
        used.try_reserve_exact(count).map_err(|_| no_memory)?;
        let mut random = crate::random::Random::new(seed);
        let (mut ranges, mut passed) = (table.ranges().peekable(), 0);
        for stratum in 0..samples {
            let first = wide_share(population, stratum, samples);
            let end = wide_share(population, stratum + 1, samples);
            let number = first + random.below(end - first);
            while let Some(range) = ranges.next_if(|&range| number - passed >= blocks_of(range)) {
                passed += blocks_of(range);
            }
            let Some(&range) = ranges.peek() else { break };
            let base = (range.start.get() / BLOCK_PAGES + number - passed) * BLOCK_PAGES;
            let block = GfnRange::from_len(Gfn::new(base), BLOCK_PAGES);
            blocks.push(block.intersection(range));
            used.push(0);
        }
        Ok(Self { blocks: blocks.into(), used: used.into(), population })
    }

    /// The pages looked at: what every call costs.
    pub fn blocks(&self) -> impl Iterator<Item = GfnRange> {
        self.blocks.iter().copied()
    }

    /// Begin an interval: forget what was used so far. `mode` is `Clear`, or `ClearFlush` for an
    /// interval that no TLB hides accesses from.
    ///
    /// # Errors
    /// [`AgeError::TestOnly`] for [`AgeMode::Test`]: nothing would be forgotten, and the next
    /// measurement would count everything ever used.
    pub fn clear<M: AgeRange, Y: Heard>(
        &self,
        mmu: &M,
        reader: &mut M::Reader,
        mode: AgeMode,
        heard: &mut Y,
    ) -> Result<(), AgeError> {
        if mode == AgeMode::Test {
            return Err(AgeError::TestOnly);
        }
        for &range in &self.blocks {
            let young = |run| heard.young(run);
            let mut sink = Runs { range, present: |_| {}, young };
            let _ = ask(mmu, reader, range, mode, &mut sink);
        }
        Ok(())
    }

    /// Pages of the whole VM used since the last `clear`, with an interval that holds the truth in
    /// 99 of 100 samples. Nothing is cleared.
    ///
    /// The error is that of the sample alone. Huge leaves count as used whole.
    pub fn measure<M: AgeRange>(&mut self, mmu: &M, reader: &mut M::Reader) -> WorkingSet {
        for (&range, used) in self.blocks.iter().zip(&mut self.used) {
            *used = 0;
            let young = |run: GfnRange| *used += run.len();
            let mut sink = Runs { range, present: |_| {}, young };
            let _ = ask(mmu, reader, range, AgeMode::Test, &mut sink);
        }
        self.estimate()
    }

    /// Mean of the sample times blocks. The variance is taken from neighbouring samples, which
    /// belong to neighbouring strata: what differs between far parts of the VM is no error of a
    /// stratified sample.
    fn estimate(&self) -> WorkingSet {
        let n = to_u64(self.used.len());
        let sum: u64 = self.used.iter().sum();
        let limit = self.population.saturating_mul(BLOCK_PAGES);
        if n == 0 || n == self.population {
            return WorkingSet { pages: sum, low: sum, high: sum };
        }
        let pages = wide_share(self.population, sum, n);
        let squares: u128 = self
            .used
            .windows(2)
            .filter_map(|pair| pair.first().zip(pair.last()))
            .map(|(&a, &b)| u128::from(a.abs_diff(b)).pow(2))
            .sum();
        // Var = B^2 (1 - n/B) s^2 / n with s^2 = squares / (2 (n - 1)); B - n blocks are unseen.
        let unseen = u128::from(self.population - n);
        let above = u128::from(self.population).saturating_mul(unseen).saturating_mul(squares);
        let below = 2 * u128::from(n) * u128::from(n.saturating_sub(1).max(1));
        let sigma = u64::try_from(isqrt(above / below)).unwrap_or(limit);
        let unmet = UNMET.saturating_mul(BLOCK_PAGES);
        let unmet = wide_share(self.population - n, unmet, n);
        let error = sigma.saturating_mul(SIGMAS).max(unmet);
        let high = pages.saturating_add(error).min(limit);
        WorkingSet { pages, low: pages.saturating_sub(error).max(sum), high }
    }
}

/// `whole * part / of` without overflow; `of` is not 0.
fn wide_share(whole: u64, part: u64, of: u64) -> u64 {
    let share = u128::from(whole) * u128::from(part) / u128::from(of.max(1));
    u64::try_from(share).unwrap_or(u64::MAX)
}

/// The largest integer whose square is at most `n`.
fn isqrt(n: u128) -> u128 {
    let mut root = 0;
    // One binary digit of the root per turn.
    for bit in (0..64).rev() {
        let more: u128 = root | 1 << bit;
        if more.checked_mul(more).is_some_and(|square| square <= n) {
            root = more;
        }
    }
    root
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_the_largest_that_fit() {
        for n in (0..5000).chain([u128::MAX, 1 << 100, (1 << 64) - 1, (1 << 64) + 1]) {
            let root = isqrt(n);
            assert!(root * root <= n, "{n}");
            let more = (root + 1).checked_mul(root + 1);
            assert!(more.is_none_or(|square| square > n), "{n}");
        }
    }

    #[test]
    fn strata_cover_every_block_once() {
        let mut table = AgeTable::new(0);
        let ranges = [(100, 1000), (2048, 4096), (5000, 5001)];
        for (start, end) in ranges {
            table.add_range(GfnRange::new(Gfn::new(start), Gfn::new(end))).unwrap();
        }
        for samples in 1..12 {
            let sample = SampledWorkingSet::new(&table, samples, 7).unwrap();
            let blocks: Vec<GfnRange> = sample.blocks().collect();
            assert_eq!(to_u64(blocks.len()), samples.min(7));
            assert!(blocks.windows(2).all(|pair| pair[0].end <= pair[1].start));
            let inside = |block: &GfnRange| table.ranges().any(|range| range.covers(*block));
            assert!(blocks.iter().all(inside));
            if samples >= 7 {
                let pages: u64 = blocks.iter().map(|block| block.len()).sum();
                assert_eq!(pages, 900 + 2048 + 1);
            }
        }
    }
}
