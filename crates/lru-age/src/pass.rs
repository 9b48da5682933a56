//! [`AgePass`]: look at every page once, in slices, then open a new generation (KVM row 5.23).
//!
//! A pass walks the table's ranges in ascending order. Each step asks the MMU for one slice of at
//! most a budget and takes the answer in as it arrives, table by table; nothing is buffered. Every
//! slicing gives the same result as one large step. What steps did is in the table at once; only
//! `finish` moves the window, so a pass that is dropped loses nothing but its turn.
//!
//! A pass holds the table's [`AgeEditor`]: there is never a second one, and look-arounds and zaps
//! go through [`AgePass::editor`] or between passes. To let others in for a while, pause it.

use core::num::NonZeroU64;

use mmu_core::addr::{Gfn, GfnRange};
use mmu_core::traits::{AgeAbilities, AgeMode, AgeRange, AgeRequest, UpperBits};

use crate::editor::{AgeEditor, Promotion};
use crate::error::AgeError;
use crate::figures::Figures;
use crate::r#gen::{GenWindow, Seq};
use crate::harvest::Harvest;
use crate::observer::{Found, Observer, Taking};
use crate::region::Region;
use crate::summary;
use crate::table::AgeTable;
use crate::text::Switches;
use crate::word::BLOCK_PAGES;

/// What a pass does with an MMU that cannot answer fast
/// ([`AgeAbilities::FAST`](mmu_core::traits::AgeAbilities::FAST), KVM rows 5.17, 5.37).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SlowMmu {
    /// Nothing: it is asked when a candidate is checked before it goes, and its pages count as
    /// unknown. The table then knows only the pages that it is told of
    /// ([`AgeEditor::insert`]).
    #[default]
    Leave,
    /// It is asked like any other.
    Ask,
}

/// What a pass looks at (KVM rows 5.26, 5.29).
///
/// Where a pass leaves blocks out, accessed bits stay as they are and count later: for the next
/// pass that looks, or when a candidate is checked again before it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scan {
    /// Everything.
    #[default]
    Full,
    /// What the filters name ([`AgeTable::enable_filters`]): blocks in which the last pass or a
    /// look-around found many used pages, and noted ones; also blocks of huge leaves, and those of
    /// which nothing is known. Everything while there are no filters.
    Filtered,
    /// The same, but everything when the number of the youngest generation is a multiple of this,
    /// and then the accessed bits of upper entries are not asked either: bounds how long a page
    /// stays unseen that a filter missed, or that caches of upper entries hid.
    FullEvery(NonZeroU64),
}

impl Scan {
    /// Does a pass at `seq` leave blocks out?
    const fn is_filtered(self, seq: Seq) -> bool {
        match self {
            Self::Full => false,
            Self::Filtered => true,
            Self::FullEvery(period) => seq.get() % period.get() != 0,
        }
    }
}

/// How a pass works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassOptions {
    /// What happens to the accessed bits: clear, or clear and flush.
    pub mode: AgeMode,
    /// What an access earns.
    pub promotion: Promotion,
    /// What is looked at.
    pub scan: Scan,
    /// May the MMU leave out what nobody walked into? Then every pass wants a flush
    /// ([`AgePass::flush`]), else nothing is left out.
    pub upper: UpperBits,
    /// What happens when the MMU answers slowly.
    pub slow: SlowMmu,
}

impl PassOptions {
    /// The question of the pass at `seq` about `range`.
    pub(crate) const fn request(&self, range: GfnRange, seq: Seq) -> AgeRequest {
        let full = matches!(self.scan, Scan::FullEvery(_)) && !self.scan.is_filtered(seq);
        let upper = if full { UpperBits::Ignore } else { self.upper };
        AgeRequest::new(range, self.mode).with_upper(upper)
    }

    /// The same as far as `switches` allow (row 5.37): without [`Switches::NONLEAF`] the accessed
    /// bits of upper entries are ignored. `None` when no pass is to run: without
    /// [`Switches::WALK`] no table is walked, without [`Switches::CORE`] there is no aging.
    ///
    /// With `CORE` and without `WALK` upstream still opens generations, which look-arounds fill: a
    /// pass that is finished without a step does that.
    ///
    /// ```
    /// use lru_age::{PassOptions, Switches};
    /// use mmu_core::traits::{AgeMode, UpperBits};
    ///
    /// let mut options = PassOptions::new(AgeMode::Clear);
    /// options.upper = UpperBits::Use;
    /// assert_eq!(options.within(Switches::ALL), Some(options));
    /// let leaves = options.within(Switches::CORE.union(Switches::WALK));
    /// assert_eq!(leaves.map(|options| options.upper), Some(UpperBits::Ignore));
    /// assert_eq!(options.within(Switches::NONE), None);
    /// ```
    #[must_use]
    pub const fn within(self, switches: Switches) -> Option<Self> {
        if !switches.contains(Switches::CORE.union(Switches::WALK)) {
            return None;
        }
        let upper =
            if switches.contains(Switches::NONLEAF) { self.upper } else { UpperBits::Ignore };
        Some(Self { upper, ..self })
    }

    /// Second chance, everything looked at, slow MMUs left alone.
    #[must_use]
    pub const fn new(mode: AgeMode) -> Self {
        let (promotion, scan) = (Promotion::SecondChance, Scan::Full);
        Self { mode, promotion, scan, upper: UpperBits::Ignore, slow: SlowMmu::Leave }
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
    /// Of these, from the generation before: used in two intervals in a row.
    pub again: u64,
    /// Used, and only marked referenced: the next access promotes them.
    pub second_chance: u64,
    /// New: tracked from now on, in the youngest generation.
    pub added: u64,
    /// Of these, not used yet: prefetched, or their accessed bit was cleared meanwhile.
    pub added_idle: u64,
    /// Not used, and as young as the youngest page of their block since a huge leaf maps it.
    pub merged: u64,
    /// No longer mapped: dropped out of the counts.
    pub unmapped_now: u64,
    /// Table entries that the MMU read: what the pass cost.
    pub entries: u64,
    /// Leaves, not pages, that changed under the MMU's hands; they count as young.
    pub lost: u64,
    /// gfns that the MMU left out, mapped or not, because nobody walked into what maps them.
    pub idle: u64,
    /// Tracked pages that were not asked for: left out by a filter, or the MMU is slow.
    pub unknown: u64,
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
/// Requires of the MMU: what [`AgeSink`](mmu_core::traits::AgeSink) says, and that a level-1 table
/// is answered as a whole inside the requested range.
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
    /// Pages taken in out of order ([`AgePass::absorb`]).
    absorbed: u64,
    found: Found,
}

impl PausedPass {
    /// How its answers are taken in: dense tables are for the next pass.
    const fn taking(&self) -> Taking {
        Taking { promotion: self.options.promotion, next_filter: Some(self.seq.next()) }
    }

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
        if let Some(filters) = table.filters() {
            filters.begin(seq);
        }
        let (cursor, found) = (Gfn::new(0), Found::default());
        Ok(Self { editor, state: PausedPass { options, seq, cursor, absorbed: 0, found } })
    }

    /// The youngest generation when the pass started.
    #[must_use]
    pub const fn seq(&self) -> Seq {
        self.state.seq
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
        let slow = !mmu.abilities().contains(AgeAbilities::FAST);
        let left_alone = slow && self.state.options.slow == SlowMmu::Leave;
        let mut spent = 0;
        while spent < budget {
            let Some(region) = table.regions().get(table.position(self.state.cursor)) else {
                break;
            };
            let start = self.state.cursor.max(region.range().start);
            if left_alone {
                self.state.found.counts.unknown += region.tracked_from(start);
                self.state.cursor = region.range().end;
                continue;
            }
            let run = self.next_run(region, start, budget - spent);
            // Even what is left out costs something, so the budget bounds the blocks visited too.
            spent += run.left_out;
            self.state.cursor = run.range.start;
            if run.range.is_empty() {
                continue;
            }
            let entries = self.slice(mmu, reader, region, run.range, budget - spent.min(budget));
            spent += entries.max(1);
            if self.state.cursor <= run.range.start {
                break;
            }
        }
        self.progress()
    }

    /// The first blocks from `start` on that the pass looks at, and how many it leaves out before.
    /// Looks at no more than `budget` blocks; the run is empty when it found none.
    fn next_run(&mut self, region: &Region, start: Gfn, budget: u64) -> Run {
        let end = region.range().end;
        let (seq, table) = (self.state.seq, self.editor.table());
        if table.filters().is_none() || !self.state.options.scan.is_filtered(seq) {
            return Run { range: GfnRange::new(start, end), left_out: 0 };
        }
        let mut at = start;
        let mut left_out = 0;
        while at < end && left_out < budget && !table.is_wanted(region, region.block_of(at), seq) {
            let known = region.block(region.block_of(at));
            let pages = known.map_or(0, |(cell, _)| summary::load_own(cell).total());
            self.state.found.counts.unknown += pages;
            left_out += 1;
            at = region.base_of(region.block_of(at)).saturating_add(BLOCK_PAGES).min(end);
        }
        let first = at;
        let mut blocks = 0;
        // Far enough for any budget, whether tables or huge leaves follow.
        let most = RUN_BLOCKS.saturating_add(budget / BLOCK_PAGES);
        while at < end && blocks < most && table.is_wanted(region, region.block_of(at), seq) {
            blocks += 1;
            at = region.base_of(region.block_of(at)).saturating_add(BLOCK_PAGES).min(end);
        }
        if left_out >= budget {
            at = first;
        }
        Run { range: GfnRange::new(first, at), left_out }
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
        let how = self.state.taking();
        let found = &mut self.state.found;
        let mut sink = Observer::new(&self.editor, region, range, how, found);
        let request = options.request(range, self.state.seq).with_budget(budget);
        let report = mmu.age(reader, request, &mut sink);
        let next = report.next.clamp(range.start, range.end);
        sink.gap(next);
        self.state.found.add(&report);
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
        done += self.state.absorbed;
        if done >= all {
            next = None;
        }
        // Ranges hold at most 2^52 pages, so the product fits.
        let percent = (done * 100).checked_div(all).unwrap_or(100);
        PassProgress {
            next,
            percent: u8::try_from(percent).unwrap_or(100),
            counts: self.state.found.counts,
        }
    }

    /// The question that this pass asks, without a range yet: for threads that ask about parts
    /// ([`ScanPlan`](crate::ScanPlan)).
    #[must_use]
    pub const fn request(&self) -> AgeRequest {
        let nothing = GfnRange::new(Gfn::new(0), Gfn::new(0));
        self.state.options.request(nothing, self.state.seq)
    }

    /// Take in what a thread collected of a part ([`ScanPlan`](crate::ScanPlan)), in any order,
    /// each part once. The pass is complete when all parts were; do not mix with
    /// [`step`](Self::step). Parts outside the table's ranges are ignored.
    pub fn absorb(&mut self, harvest: &Harvest) {
        let range = harvest.range();
        let Some(region) = self.editor.table().region_at(range.start) else { return };
        if !region.range().covers(range) {
            return;
        }
        let how = self.state.taking();
        let found = &mut self.state.found;
        Observer::new(&self.editor, region, range, how, found).replay(harvest);
        self.state.found.add(harvest.report());
        self.state.absorbed += range.len();
    }

    /// Flush what the pass cleared, complete on return: TLBs hide no later access, and upper
    /// entries that were cleared are believed in the next pass. For passes in [`AgeMode::Clear`],
    /// once, when everything was looked at; what was used between its clearing and now may be
    /// missed.
    pub fn flush<M: AgeRange>(&self, mmu: &M, reader: &mut M::Reader) {
        for range in self.editor.table().ranges() {
            mmu.flush_aged(reader, range);
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
        let PausedPass { found, seq, .. } = self.state;
        let table = self.editor.table();
        let figures = found.of_pass(complete, table.tracked_pages());
        let heard = table.take_heard();
        table.set_figures(seq.generation(), Figures { heard, ..figures });
        // `start` refused a table whose numbers are exhausted, and only this pass moves the window.
        let folded = self.editor.open_generation(now_ms).unwrap_or(0);
        let window = table.window();
        table.set_figures(window.max_seq().generation(), Figures::default());
        PassReport { counts: found.counts, complete, folded, window }
    }
}

/// What a filtered pass looks at next.
struct Run {
    range: GfnRange,
    /// Blocks before it that are left out.
    left_out: u64,
}

/// Blocks of a run at most, beyond what the budget is good for in tables.
const RUN_BLOCKS: u64 = 64;
