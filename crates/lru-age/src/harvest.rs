//! [`ScanPlan`] and [`Harvest`]: a pass by several threads. They ask, one hand writes.
//!
//! Threads claim disjoint parts of the plan and collect the MMU's answers, which is where the time
//! goes (memory that no cache holds); the holder of the pass takes what they collected in
//! ([`AgePass::absorb`](crate::AgePass::absorb)), part by part in any order. The table keeps its
//! one editor, and every order gives the same result as one thread.
//!
//! Threads and channels are the embedder's. A part whose harvest is dropped was cleared and not
//! counted: hand it in, or look young pages up again with the next pass.

use alloc::boxed::Box;
use alloc::vec::Vec;

use mmu_core::addr::{Gfn, GfnRange, Level, to_index, to_u64};
use mmu_core::sync::{AtomicU64, Ordering};
use mmu_core::traits::{AgeRange, AgeReport, AgeRequest, AgeSink, MASK_WORDS};

use crate::AgeError;
use crate::runs::ask_all;
use crate::table::AgeTable;
use crate::word::{BLOCK_PAGES, mask};

/// A table's ranges, cut into parts that threads claim. All of them: filters are not asked.
#[derive(Debug)]
pub struct ScanPlan<'t> {
    table: &'t AgeTable,
    /// Blocks of a part.
    size: u64,
    /// Parts claimed, or more.
    claimed: AtomicU64,
}

impl<'t> ScanPlan<'t> {
    /// Parts of `blocks` blocks of 2 MiB, 1 at least; shorter at the end of a range.
    #[must_use]
    pub fn new(table: &'t AgeTable, blocks: u64) -> Self {
        Self { table, size: blocks.max(1), claimed: AtomicU64::new(0) }
    }

    fn parts(&self) -> u64 {
        self.table.regions().iter().map(|region| region.len().div_ceil(self.size)).sum()
    }

    /// The next part, for the calling thread alone; `None` when all are claimed.
    pub fn claim(&self) -> Option<GfnRange> {
        // ORDERING[age-plan]: Relaxed. Pairs with the fetch-add below. Once all are claimed the
        // number stands still: a thread that asks for ever does not make it wrap.
        if self.claimed.load(Ordering::Relaxed) >= self.parts() {
            return None;
        }
        // ORDERING[age-plan]: Relaxed. Pairs with the load above and itself: each number is given
        // out once, and what it names does not change while the plan borrows the table.
        let mut part = if mmu_core::busted!("claim_by_store") {
            // ORDERING[age-plan]: Relaxed. The mutant's read.
            let part = self.claimed.load(Ordering::Relaxed);
            // ORDERING[age-plan]: Relaxed. The mutant's store.
            self.claimed.store(part + 1, Ordering::Relaxed);
            part
        } else {
            // ORDERING[age-plan]: Relaxed. As above.
            self.claimed.fetch_add(1, Ordering::Relaxed)
        };
        for region in self.table.regions() {
            let parts = region.len().div_ceil(self.size);
            if part < parts {
                let first = region.base_of(part * self.size);
                let range = GfnRange::from_len(first, self.size * BLOCK_PAGES);
                return Some(range.intersection(region.range()));
            }
            part -= parts;
        }
        None
    }
}

/// What an MMU said about one part: a row of at most 136 bytes per block.
#[derive(Debug)]
pub struct Harvest {
    rows: Box<[Row]>,
    range: GfnRange,
    report: AgeReport,
}

/// What was said of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// Nothing: no page is mapped.
    Nothing,
    /// Nobody walked into it.
    Idle,
    /// Both that and answers about pages, from several trees.
    Mixed,
    /// Its table was read, or several answers were united.
    Table,
    /// A huge leaf maps it.
    Leaf(Level),
}

/// One block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) said: Said,
    /// All ones, inside the part, for a huge leaf.
    pub(crate) present: [u64; MASK_WORDS],
    /// As many ones for one that was used.
    pub(crate) young: [u64; MASK_WORDS],
}

const _: () = assert!(size_of::<Row>() <= 136, "two masks, and what was said");

impl Row {
    const EMPTY: Self =
        Self { said: Said::Nothing, present: [0; MASK_WORDS], young: [0; MASK_WORDS] };

    /// One more answer.
    fn add(&mut self, said: Said, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        self.said = match (self.said, said) {
            (Said::Nothing, one) => one,
            (one, other) if one == other => one,
            (Said::Idle | Said::Mixed, _) | (_, Said::Idle) => Said::Mixed,
            _ => Said::Table,
        };
        self.present.iter_mut().zip(present).for_each(|(all, more)| *all |= more);
        self.young.iter_mut().zip(young).for_each(|(all, more)| *all |= more);
    }
}

impl Harvest {
    /// Room for parts of `blocks` blocks.
    ///
    /// # Errors
    /// [`AgeError::NoMemoryFor`].
    pub fn new(blocks: u64) -> Result<Self, AgeError> {
        let blocks = blocks.max(1);
        let bytes = blocks.saturating_mul(to_u64(size_of::<Row>()));
        let mut rows = Vec::new();
        let count = to_index(blocks);
        rows.try_reserve_exact(count).map_err(|_| AgeError::NoMemoryFor { bytes })?;
        rows.resize(count, Row::EMPTY);
        let nothing = Gfn::new(0);
        let (range, report) = (GfnRange::new(nothing, nothing), AgeReport::empty(nothing));
        Ok(Self { rows: rows.into(), range, report })
    }

    /// Ask `mmu` about a part, as `request` says ([`AgePass::request`](crate::AgePass::request) for
    /// the part claimed), and keep the answers. What was kept before is gone. Of a part that is
    /// longer than there is room for, the first pages are taken; returns what was.
    pub fn collect<M: AgeRange>(
        &mut self,
        mmu: &M,
        reader: &mut M::Reader,
        request: AgeRequest,
    ) -> GfnRange {
        let part = request.range;
        let first = part.start.align_down(Level::L2);
        let room = first.saturating_add(to_u64(self.rows.len()).saturating_mul(BLOCK_PAGES));
        let range = GfnRange::new(part.start, part.end.min(room));
        self.rows.fill(Row::EMPTY);
        let mut sink = Collector { rows: &mut self.rows, range };
        let request = request.for_range(range).with_budget(u64::MAX);
        self.report = ask_all(mmu, reader, request, &mut sink);
        self.range = GfnRange::new(range.start, self.report.next.min(range.end));
        self.range
    }

    /// The part that was collected.
    #[must_use]
    pub const fn range(&self) -> GfnRange {
        self.range
    }

    /// What the MMU counted.
    pub const fn report(&self) -> &AgeReport {
        &self.report
    }

    /// The blocks of the part, each with what was said of it.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (GfnRange, &Row)> {
        let first = self.range.start.align_down(Level::L2);
        let block =
            move |at| GfnRange::from_len(first.saturating_add(at * BLOCK_PAGES), BLOCK_PAGES);
        let parts = (0..).map(block).map(|block| block.intersection(self.range));
        parts.zip(&self.rows).take_while(|(part, _)| !part.is_empty())
    }
}

/// Keeps answers by block; several about one block (one per root) are united.
struct Collector<'a> {
    rows: &'a mut [Row],
    range: GfnRange,
}

impl Collector<'_> {
    fn row(&mut self, base: Gfn) -> Option<&mut Row> {
        let first = self.range.start.align_down(Level::L2);
        let at = base.get().checked_sub(first.get())? / BLOCK_PAGES;
        self.rows.get_mut(to_index(at))
    }

    /// Each block of `part`, with its pages in it as a mask.
    fn each(&mut self, part: GfnRange, mut add: impl FnMut(&mut Row, &[u64; MASK_WORDS])) {
        let mut at = part.start;
        while at < part.end {
            let block = at.align_down(Level::L2);
            let end = block.saturating_add(BLOCK_PAGES).min(part.end);
            let pages = mask(at.distance_from(block), end.distance_from(block));
            if let Some(row) = self.row(block) {
                add(row, &pages);
            }
            at = end;
        }
    }
}

impl AgeSink for Collector<'_> {
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        if let Some(row) = self.row(base) {
            row.add(Said::Table, present, young);
        }
    }

    fn huge(&mut self, base: Gfn, level: Level, young: bool) {
        let part = GfnRange::entry(base, level).intersection(self.range);
        self.each(part, |row, pages| {
            row.add(Said::Leaf(level), pages, if young { pages } else { &NONE });
        });
    }

    fn idle(&mut self, range: GfnRange) {
        self.each(range.intersection(self.range), |row, _| row.add(Said::Idle, &NONE, &NONE));
    }

    fn unknown(&mut self, range: GfnRange) {
        self.idle(range);
    }
}

const NONE: [u64; MASK_WORDS] = [0; MASK_WORDS];
