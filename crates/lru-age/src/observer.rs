//! [`Observer`]: takes the answers of an MMU into a table, as they come.
//!
//! What a pass, a look-around and a thread's harvest have in common: masks of tables and huge
//! leaves in ascending order, gaps between them, and a second tree that maps the same pages.
//! Nothing is buffered. The caller holds the editor.

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::traits::{AgeReport, AgeSink, MASK_WORDS};

use crate::editor::{AgeEditor, Promotion};
use crate::figures::Figures;
use crate::r#gen::Seq;
use crate::harvest::{Harvest, Said};
use crate::lookaround::is_dense;
use crate::pass::PassCounts;
use crate::region::Region;
use crate::word::{BLOCK_PAGES, FULL, Rules, is_empty, mask};

/// What was counted on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) counts: PassCounts,
    pub(crate) figures: Figures,
}

impl Found {
    /// What the MMU counted by itself.
    pub(crate) fn add(&mut self, report: &AgeReport) {
        self.counts.mapped += report.mapped;
        self.counts.young += report.young;
        self.counts.entries += report.entries;
        self.counts.lost += report.lost;
        self.counts.idle += report.idle;
    }

    /// The figures of a pass that ends now, with `tracked` pages known.
    pub(crate) fn of_pass(&self, complete: bool, tracked: u64) -> Figures {
        Figures {
            mapped: self.counts.mapped,
            young: self.counts.young,
            marked: self.counts.second_chance,
            idle: self.counts.added_idle + self.counts.merged,
            again: self.counts.again,
            returned: self.counts.promoted - self.counts.again,
            lost: self.counts.lost,
            unknown: if complete { self.counts.unknown } else { tracked },
            passes: 1,
            ..self.figures
        }
    }
}

/// How answers are taken in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taking {
    pub(crate) promotion: Promotion,
    /// The generation whose filter gets to know of dense tables; `None` for a part of a table.
    pub(crate) next_filter: Option<Seq>,
}

/// Takes in the answers about one range, in one call of the MMU or several.
pub(crate) struct Observer<'a, 't> {
    editor: &'a AgeEditor<'t>,
    region: &'a Region,
    /// What was asked for.
    range: GfnRange,
    how: Taking,
    rules: Rules,
    /// First gfn not accounted for.
    cursor: Gfn,
    found: &'a mut Found,
}

impl<'a, 't> Observer<'a, 't> {
    pub(crate) fn new(
        editor: &'a AgeEditor<'t>,
        region: &'a Region,
        range: GfnRange,
        how: Taking,
        found: &'a mut Found,
    ) -> Self {
        let rules = editor.rules(how.promotion);
        Self { editor, region, range, how, rules, cursor: range.start, found }
    }

    /// Nothing was reported from the cursor up to `to`.
    #[inline]
    pub(crate) fn gap(&mut self, to: Gfn) {
        if self.cursor < to {
            let range = GfnRange::new(self.cursor, to).intersection(self.range);
            self.editor.unmapped(self.region, range, &mut self.found.counts);
        }
    }

    /// A table of `looked` pages was read and `young` of them had been used: is it worth a look
    /// next time?
    #[inline]
    fn rate(&mut self, part: GfnRange, young: &[u64; MASK_WORDS]) {
        let table = self.editor.table();
        let Some((filters, next)) = table.filters().zip(self.how.next_filter) else { return };
        let seq = table.window().max_seq();
        self.found.figures.found += u64::from(filters.contains(seq, part.start));
        if is_dense(ones(young), part.len()) {
            filters.add(next, part.start);
            self.found.figures.dense += 1;
        }
    }

    /// The part of an entry's range that was asked for and not accounted for yet.
    #[inline]
    fn take(&mut self, base: Gfn, level: Level) -> GfnRange {
        self.gap(base);
        let start = self.cursor.max(base);
        let end = base.saturating_add(level.pages()).min(self.range.end);
        self.cursor = self.cursor.max(end);
        GfnRange::new(start, end)
    }

    /// Another tree of the same MMU maps the table's pages too (an MMU may tell of one after the
    /// other): they are as young as the younger answer.
    fn again(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        let part = GfnRange::entry(base, Level::L2).intersection(self.range);
        if part.is_empty() || is_empty(present) {
            return;
        }
        let block = self.region.block_of(part.start);
        let inside = self.region.mask(block, part);
        let mut looked = *present;
        looked.iter_mut().zip(inside).for_each(|(word, inside)| *word &= inside);
        // The MMU counts a page that both trees saw used twice.
        self.found.figures.excess += ones(young);
        let (region, rules) = (self.region, self.rules);
        self.editor.pages(region, block, &looked, present, young, rules, &mut self.found.counts);
    }

    /// A huge leaf maps the pages of `part`.
    fn leaf(&mut self, part: GfnRange, level: Level, young: bool) {
        if young {
            // Whatever its size, at least one page was used: the first stands for it.
            let first = u64::from(part.start.is_aligned(level));
            self.found.figures.excess += part.len().saturating_sub(first);
        }
        let counts = &mut self.found.counts;
        let mut at = part.start;
        while at < part.end {
            let block = self.region.block_of(at);
            let end = self.region.base_of(block).saturating_add(BLOCK_PAGES).min(part.end);
            if end.distance_from(at) == BLOCK_PAGES {
                self.editor.huge(self.region, block, level, young, self.rules, counts);
            } else {
                let looked = self.region.mask(block, GfnRange::new(at, end));
                let used = if young { looked } else { mask(0, 0) };
                let (region, rules) = (self.region, self.rules);
                self.editor.pages(region, block, &looked, &looked, &used, rules, counts);
            }
            at = end;
        }
    }

    /// What a thread collected of a part.
    pub(crate) fn replay(&mut self, harvest: &Harvest) {
        let mut united = 0;
        for (part, row) in harvest.rows() {
            united += ones(&row.young);
            match row.said {
                Said::Nothing => {}
                Said::Idle => self.idle(part),
                Said::Mixed => {
                    self.idle(part);
                    self.again(part.start.align_down(Level::L2), &row.present, &row.young);
                }
                Said::Table => {
                    self.table(part.start.align_down(Level::L2), &row.present, &row.young);
                }
                Said::Leaf(level) => {
                    self.gap(part.start);
                    self.cursor = part.end;
                    self.leaf(part, level, !is_empty(&row.young));
                }
            }
        }
        self.gap(harvest.range().end);
        // See `again`.
        self.found.figures.excess += harvest.report().young.saturating_sub(united);
    }
}

fn ones(mask: &[u64; MASK_WORDS]) -> u64 {
    mask.iter().map(|word| u64::from(word.count_ones())).sum()
}

impl AgeSink for Observer<'_, '_> {
    #[inline]
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        let part = self.take(base, Level::L2);
        if part.is_empty() {
            self.again(base, present, young);
            return;
        }
        let block = self.region.block_of(part.start);
        let cut = part.len() != BLOCK_PAGES;
        let looked = if cut { self.region.mask(block, part) } else { FULL };
        let counts = &mut self.found.counts;
        self.editor.pages(self.region, block, &looked, present, young, self.rules, counts);
        self.rate(part, young);
    }

    /// As old as they were: neither unmapped nor used.
    fn idle(&mut self, range: GfnRange) {
        self.gap(range.start);
        if mmu_core::busted!("idle_means_unmapped") {
            self.gap(range.end);
        }
        self.cursor = self.cursor.max(range.end.min(self.range.end));
    }

    fn unknown(&mut self, range: GfnRange) {
        self.idle(range);
    }

    fn huge(&mut self, base: Gfn, level: Level, young: bool) {
        let part = self.take(base, level);
        if part.is_empty() && young {
            // Another tree of the same MMU: see `again`.
            self.found.figures.excess += 1;
            let part = GfnRange::entry(base, level).intersection(self.range);
            self.leaf(part, level, young);
            return;
        }
        self.leaf(part, level, young);
    }
}
