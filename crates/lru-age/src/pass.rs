//! [`AgePass`]: look at every page once, in slices, then open a new generation (KVM row 5.23).
//!
//! A pass walks the table's ranges in ascending order. Each step asks the MMU for one slice of at
//! most a budget and takes the answer in as it arrives, table by table; nothing is buffered. Every
//! slicing gives the same result as one large step. What steps did is in the table at once; only
//! `finish` moves the window, so a pass that is dropped loses nothing but its turn.
//!
//! A pass holds the table's [`AgeEditor`]: there is never a second one, and look-arounds and zaps
//! go through [`AgePass::editor`] or between passes. To let others in for a while, pause it.

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, AgeSink, MASK_WORDS};

use crate::editor::{AgeEditor, Promotion};
use crate::error::AgeError;
use crate::r#gen::{GenWindow, Seq};
use crate::region::Region;
use crate::table::AgeTable;
use crate::word::{BLOCK_PAGES, FULL, Rules, mask};

/// What it means that an MMU reported nothing for a part of a slice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gaps {
    /// Nothing is mapped there: tracked pages drop out. For MMUs that report every leaf.
    #[default]
    Unmapped,
    /// Nothing is known: pages stay as they are. For MMUs that skip subtrees which nobody used
    /// (non-leaf accessed bits). Zaps must then be told through [`AgeEditor::forget`], or show when
    /// a candidate is checked again ([`Candidate::recheck`](crate::Candidate::recheck)).
    Unknown,
}

/// How a pass works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassOptions {
    /// What happens to the accessed bits: clear, or clear and flush.
    pub mode: AgeMode,
    /// What an access earns.
    pub promotion: Promotion,
    /// What silence means.
    pub gaps: Gaps,
}

impl PassOptions {
    /// Second chance, gaps unmapped.
    #[must_use]
    pub const fn new(mode: AgeMode) -> Self {
        Self { mode, promotion: Promotion::SecondChance, gaps: Gaps::Unmapped }
    }
}

/// What was counted, in 4 KiB pages unless said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassCounts {
    /// Seen mapped, by the MMU's own count.
    pub mapped: u64,
    /// Seen used, by the MMU's own count.
    pub young: u64,
    /// Moved to the youngest generation from an older one.
    pub promoted: u64,
    /// Used, and only marked referenced: the next access promotes them.
    pub second_chance: u64,
    /// New: tracked from now on, in the youngest generation.
    pub added: u64,
    /// No longer mapped: dropped out of the counts.
    pub unmapped_now: u64,
    /// Table entries that the MMU read: what the pass cost.
    pub entries: u64,
    /// Leaves, not pages, that changed under the MMU's hands; they count as young.
    pub lost: u64,
}

/// Where a pass stands after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct PassProgress {
    /// Where the next step goes on; `None` when everything was looked at.
    pub next: Option<Gfn>,
    /// Part of the ranges' pages that was looked at, 0 to 100. 100 only when all of them were.
    pub percent: u8,
    /// Counted since the pass started.
    pub counts: PassCounts,
}

/// What a pass did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct PassReport {
    /// Counted over the whole pass.
    pub counts: PassCounts,
    /// Was everything looked at? False for a pass that was finished early (row 5.23: forced).
    pub complete: bool,
    /// Pages of the oldest generation that were folded into the next, to make room.
    pub folded: u64,
    /// The generations that exist now.
    pub window: GenWindow,
}

/// A pass under way. One per table at a time: it holds the editor.
///
/// Rules (rows 5.21, 5.22): a used page that was used before goes to the youngest generation; the
/// first use after the page was mapped only marks it referenced, unless [`Promotion::Immediate`].
/// The mark stays until the page is unmapped. A page that is new to the table enters the youngest
/// generation; its accessed bit, usually set by the access that faulted it in, is its first use. A
/// page that is no longer mapped drops out, and is new when it returns. A 2 MiB block whose leaf
/// became huge is as young as its youngest page was, and referenced if any was; one that was split
/// hands its state to each page.
///
/// Requires of the MMU: what [`AgeSink`] says, and that a level-1 table is answered as a whole
/// inside the requested range.
#[derive(Debug)]
pub struct AgePass<'t> {
    editor: AgeEditor<'t>,
    state: PausedPass,
}

/// A pass that holds nothing: ranges may come and go, other editors may work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PausedPass {
    options: PassOptions,
    /// The youngest generation when the pass started.
    seq: Seq,
    /// First gfn that was not looked at.
    cursor: Gfn,
    counts: PassCounts,
}

impl PausedPass {
    /// Go on with the pass. Ranges added behind its position wait for the next pass.
    ///
    /// # Errors
    /// [`AgeError::Superseded`] when another pass finished meanwhile, [`AgeError::Busy`] when one
    /// is under way. The paused pass stays as it is.
    pub fn resume(self, table: &AgeTable) -> Result<AgePass<'_>, AgeError> {
        let editor = table.edit()?;
        let max_seq = table.window().max_seq();
        if max_seq != self.seq {
            return Err(AgeError::Superseded { started: self.seq, max_seq });
        }
        Ok(AgePass { editor, state: self })
    }
}

impl<'t> AgePass<'t> {
    /// Start a pass with [`PassOptions::new`].
    ///
    /// # Errors
    /// As [`start_with`](Self::start_with).
    pub fn start(table: &'t AgeTable, mode: AgeMode) -> Result<Self, AgeError> {
        Self::start_with(table, PassOptions::new(mode))
    }

    /// Start a pass.
    ///
    /// # Errors
    /// [`AgeError::TestOnly`] for [`AgeMode::Test`], [`AgeError::Busy`] while another pass or
    /// editor is open, [`AgeError::SeqExhausted`] when no generation can be opened any more.
    pub fn start_with(table: &'t AgeTable, options: PassOptions) -> Result<Self, AgeError> {
        if options.mode == AgeMode::Test {
            return Err(AgeError::TestOnly);
        }
        let editor = table.edit()?;
        let seq = table.window().max_seq();
        if seq >= Seq::MAX {
            return Err(AgeError::SeqExhausted { max_seq: seq });
        }
        let counts = PassCounts::default();
        Ok(Self { editor, state: PausedPass { options, seq, cursor: Gfn::new(0), counts } })
    }

    /// Look at one slice: about `budget_entries` table entries, at least one table.
    ///
    /// An MMU that makes no progress ends the step early; the position is then the same as before.
    pub fn step<M: AgeRange>(
        &mut self,
        mmu: &M,
        reader: &mut M::Reader,
        budget_entries: u64,
    ) -> PassProgress {
        let table = self.editor.table();
        let budget = budget_entries.max(1);
        let mut spent = 0;
        while spent < budget {
            let Some(region) = table.regions().get(table.position(self.state.cursor)) else {
                break;
            };
            let start = self.state.cursor.max(region.range().start);
            let range = GfnRange::new(start, region.range().end);
            let entries = self.slice(mmu, reader, region, range, budget - spent);
            // Even an empty range costs something, so the budget bounds the ranges visited too.
            spent += entries.max(1);
            if self.state.cursor <= start {
                break;
            }
        }
        self.progress()
    }

    /// One call of the MMU. Returns the entries it read.
    fn slice<M: AgeRange>(
        &mut self,
        mmu: &M,
        reader: &mut M::Reader,
        region: &Region,
        range: GfnRange,
        budget: u64,
    ) -> u64 {
        let options = self.state.options;
        let mut sink = Observer {
            editor: &self.editor,
            region,
            range,
            gaps: options.gaps,
            rules: self.editor.rules(options.promotion),
            cursor: range.start,
            counts: &mut self.state.counts,
        };
        let report =
            mmu.age(reader, AgeRequest::new(range, options.mode).with_budget(budget), &mut sink);
        let next = report.next.clamp(range.start, range.end);
        sink.gap(next);
        let counts = &mut self.state.counts;
        counts.mapped += report.mapped;
        counts.young += report.young;
        counts.entries += report.entries;
        counts.lost += report.lost;
        self.state.cursor = next;
        report.entries
    }

    /// Where the pass stands.
    pub fn progress(&self) -> PassProgress {
        let cursor = self.state.cursor;
        let (mut done, mut all, mut next) = (0, 0, None);
        for range in self.editor.table().ranges() {
            all += range.len();
            done += GfnRange::new(range.start, range.end.min(cursor)).len();
            if next.is_none() && cursor < range.end {
                next = Some(cursor.max(range.start));
            }
        }
        // Ranges hold at most 2^52 pages, so the product fits.
        let percent = (done * 100).checked_div(all).unwrap_or(100);
        PassProgress {
            next,
            percent: u8::try_from(percent).unwrap_or(100),
            counts: self.state.counts,
        }
    }

    /// The editor that the pass holds, for look-arounds and zaps between its steps.
    pub const fn editor(&mut self) -> &mut AgeEditor<'t> {
        &mut self.editor
    }

    /// Let go of the table without losing the position.
    #[must_use]
    pub fn pause(self) -> PausedPass {
        self.state
    }

    /// Open a new youngest generation: `max_seq` + 1 (row 5.23). `now_ms` is its birth on the
    /// embedder's clock. The oldest generation is folded into the next when as many exist as may;
    /// then oldest generations without pages go, as long as [`MIN_NR_GENS`](crate::MIN_NR_GENS)
    /// remain.
    ///
    /// May be called before everything was looked at. Folding costs time in proportion to the
    /// smaller of the two oldest generations.
    pub fn finish(mut self, now_ms: u64) -> PassReport {
        let complete = self.progress().next.is_none();
        // `start` refused a table whose numbers are exhausted, and only this pass moves the window.
        let folded = self.editor.open_generation(now_ms).unwrap_or(0);
        let window = self.editor.table().window();
        PassReport { counts: self.state.counts, complete, folded, window }
    }
}

/// Takes in the answers of one slice.
struct Observer<'a, 't> {
    editor: &'a AgeEditor<'t>,
    region: &'a Region,
    /// What was asked for.
    range: GfnRange,
    gaps: Gaps,
    rules: Rules,
    /// First gfn not accounted for.
    cursor: Gfn,
    counts: &'a mut PassCounts,
}

impl Observer<'_, '_> {
    /// Nothing was reported from the cursor up to `to`.
    #[inline]
    fn gap(&mut self, to: Gfn) {
        if self.gaps == Gaps::Unmapped && self.cursor < to {
            let range = GfnRange::new(self.cursor, to).intersection(self.range);
            self.editor.unmapped(self.region, range, self.counts);
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
}

impl AgeSink for Observer<'_, '_> {
    #[inline]
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        let part = self.take(base, Level::L2);
        if part.is_empty() {
            return;
        }
        let block = self.region.block_of(part.start);
        let cut = part.len() != BLOCK_PAGES;
        let looked = if cut { self.region.mask(block, part) } else { FULL };
        self.editor.pages(self.region, block, &looked, present, young, self.rules, self.counts);
    }

    /// As old as they were: neither unmapped nor used.
    fn idle(&mut self, range: GfnRange) {
        self.gap(range.start);
        self.cursor = self.cursor.max(range.end);
    }

    fn unknown(&mut self, range: GfnRange) {
        self.idle(range);
    }

    fn huge(&mut self, base: Gfn, level: Level, young: bool) {
        let part = self.take(base, level);
        let mut at = part.start;
        while at < part.end {
            let block = self.region.block_of(at);
            let end = self.region.base_of(block).saturating_add(BLOCK_PAGES).min(part.end);
            if end.distance_from(at) == BLOCK_PAGES {
                self.editor.huge(self.region, block, level, young, self.rules, self.counts);
            } else {
                let looked = self.region.mask(block, GfnRange::new(at, end));
                let used = if young { looked } else { mask(0, 0) };
                let (region, rules) = (self.region, self.rules);
                self.editor.pages(region, block, &looked, &looked, &used, rules, self.counts);
            }
            at = end;
        }
    }
}
