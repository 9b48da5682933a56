//! [`cold_ranges`]: runs of pages that are old enough, in the order of their addresses.
//!
//! For who acts on ranges (discard, migrate, balloon) instead of on the coldest page. Hints, like
//! [`candidates`](crate::candidates). Walks every block once; a block of huge leaves, an empty one
//! and one with nothing old cost one word each.

use mmu_core::addr::{Gfn, GfnRange, to_index};

use crate::r#gen::{GenWindow, Label, Seq};
use crate::region::Region;
use crate::summary::{self, Summary};
use crate::table::AgeTable;
use crate::word::{self, Planes};

/// Runs of tracked pages that all belong to generation `until` or an older one, of at least
/// `min_pages` pages, lowest first. A run ends at a page that is younger or not tracked, and at the
/// end of its range. Generations that are active never count as old.
#[must_use]
pub fn cold_ranges(table: &AgeTable, until: Seq, min_pages: u64) -> ColdRanges<'_> {
    let window = table.window();
    let old = |label: &Label| {
        let seq = window.seq_of(*label);
        seq.is_some_and(|seq| seq <= until && !window.is_active(seq))
    };
    let labels = Label::ALL.iter().filter(|label| old(label)).fold(0, |set, l| set | 1 << l.get());
    let min_pages = min_pages.max(1);
    ColdRanges { table, window, labels, min_pages, region: 0, at: None }
}

/// See [`cold_ranges`].
#[derive(Clone, Debug)]
pub struct ColdRanges<'t> {
    table: &'t AgeTable,
    window: GenWindow,
    /// One bit per label that counts as old.
    labels: u64,
    min_pages: u64,
    region: usize,
    /// Where to go on in the region; `None` at its start.
    at: Option<Gfn>,
}

impl Iterator for ColdRanges<'_> {
    type Item = GfnRange;

    fn next(&mut self) -> Option<GfnRange> {
        // Ends: every turn moves on in the range or to the next range.
        while let Some(region) = self.table.regions().get(self.region) {
            let from = self.at.unwrap_or(region.range().start);
            let run = self.run(region, from);
            if self.window != self.table.window() {
                return None;
            }
            match run {
                Some(run) => {
                    self.at = Some(run.end);
                    if run.len() >= self.min_pages {
                        return Some(run);
                    }
                }
                None => (self.region, self.at) = (self.region + 1, None),
            }
        }
        None
    }
}

impl ColdRanges<'_> {
    /// The first run from `from` on; `None` when the rest of the region has no old page.
    fn run(&self, region: &Region, from: Gfn) -> Option<GfnRange> {
        let end = region.range().end;
        let start = self.seek(region, from, end, Old::Is)?;
        let stop = self.seek(region, start, end, Old::IsNot).unwrap_or(end);
        Some(GfnRange::new(start, stop))
    }

    /// The first page in `from..end` that is old, or that is not.
    fn seek(&self, region: &Region, from: Gfn, end: Gfn, wanted: Old) -> Option<Gfn> {
        let mut at = from;
        while at < end {
            let block = region.block_of(at);
            let base = region.base_of(block);
            let (cell, pages) = region.block(block)?;
            let seen = summary::load(cell);
            let uniform = match self.share(seen) {
                Share::None => Some(wanted == Old::IsNot),
                Share::All => Some(wanted == Old::Is),
                Share::Some => None,
            };
            let next = base.saturating_add(word::BLOCK_PAGES);
            match uniform {
                Some(true) => return Some(at),
                Some(false) => at = next,
                None => {
                    let offset = at.distance_from(base);
                    let group = pages.get(to_index(offset / 64))?;
                    let planes = Planes::from_words(word::load(group));
                    let old = Label::ALL.iter().filter(|l| self.labels >> l.get() & 1 == 1);
                    let old = old.fold(0, |set, &label| set | planes.labelled(label));
                    let hits = if wanted == Old::Is { old } else { !old } >> (offset % 64);
                    if hits != 0 {
                        let found = at.saturating_add(u64::from(hits.trailing_zeros()));
                        return Some(found).filter(|&found| found < end);
                    }
                    at = base.saturating_add((offset / 64 + 1) * 64);
                }
            }
        }
        None
    }

    fn share(&self, seen: Summary) -> Share {
        let held = seen.labels();
        if held & self.labels == 0 {
            Share::None
        } else if held & !self.labels == 0 && seen.total() == word::BLOCK_PAGES {
            Share::All
        } else {
            Share::Some
        }
    }
}

/// What a seek looks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Old {
    Is,
    IsNot,
}

/// How much of a block is old.
enum Share {
    None,
    Some,
    All,
}
