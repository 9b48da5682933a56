//! Aging: accessed bits of shadow entries, found through reverse maps, without the writer.
//!
//! Implements [`AgeRange`] for [`ShadowMmu`] (KVM rows 5.6, 5.10). A page of the guest is young if
//! any entry that maps it is, in either address space. For each page the list is held by its bit
//! lock, so the entries' pages live (races R14 to R16); each young entry is written by one
//! compare-exchange that is not tried again (R1 to R7). Blocks of 512 pages are looked at one after
//! the other, aligned, so a range that starts in the middle of a large page skips nothing.
//!
//! Walks skip what has no reverse map. There is nothing more to skip: the links above a leaf are
//! those of linear addresses. A fast question is told "unknown" for a list that somebody holds.

use mmu_core::addr::{Gfn, GfnRange, Level, to_index};
use mmu_core::epoch::EpochGuard;
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::sync::{AtomicU64, Ordering};
use mmu_core::traits::{
    AgeAbilities, AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, Effort, Host, MASK_WORDS,
};
use mmu_core::vm::Actor;

use crate::mmu::{Cells, ShadowMmu};
use crate::rmap::{Busy, Lists, SPACES};

/// Bits of a mask word.
const WORD: usize = 64;
/// Levels of leaves.
const LEAVES: [Level; 3] = [Level::L1, Level::L2, Level::L3];

/// What is known of one block of the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    mapped: bool,
    young: bool,
    unknown: bool,
}

impl Seen {
    fn merge(&mut self, other: Self) {
        self.mapped |= other.mapped;
        self.young |= other.young;
        self.unknown |= other.unknown;
    }

    /// Is nothing known? Young is an answer, whatever could not be read beside; and who is not, had
    /// nothing done to it.
    const fn is_unknown(self) -> bool {
        self.unknown && !self.young
    }
}

impl<F: SpteFormat, H: Host> AgeRange for ShadowMmu<F, H> {
    type Reader = Actor<H>;

    fn abilities(&self) -> AgeAbilities {
        // Not FAST: a list may be held while its gfn is asked about.
        if self.config().ad_enabled() { AgeAbilities::HARDWARE_BITS } else { AgeAbilities::empty() }
    }

    fn age<S: AgeSink>(
        &self,
        reader: &mut Actor<H>,
        request: AgeRequest,
        sink: &mut S,
    ) -> AgeReport {
        let flushes = request.mode == AgeMode::ClearFlush && request.effort == Effort::Full;
        let noted = (request.mode != AgeMode::Test).then(|| self.unflushed().begin());
        let mut pass = Pass {
            mmu: self,
            request,
            report: AgeReport::empty(request.range.end),
            debt: FlushDebt::new(),
            huge: None,
            lists: [0, 1].map(|space| LEAVES.map(|level| self.rmaps().walk(space, level))),
            cells: self.cells(),
        };
        pass.run(reader, sink);
        let Pass { report, mut debt, .. } = pass;
        let due = if flushes { self.unflushed().due(noted) } else { None };
        if let Some(due) = due
            && due.of_others
        {
            // What was aged without a flush before may still hide accesses in TLBs.
            reader.stats().inc(Counter::FlushOwed);
            debt.owe(GfnRange::ALL);
        }
        reader.pay(debt, FlushScope::Ranges);
        if let Some(due) = due {
            self.unflushed().flushed(due);
        }
        if noted.is_some() {
            self.unflushed().end();
        }
        report
    }

    fn flush_aged(&self, reader: &mut Actor<H>, range: GfnRange) {
        if !range.is_empty()
            && let Some(due) = self.unflushed().due(None)
        {
            let mut debt = FlushDebt::new();
            // Which linear addresses lead to the range nobody knows.
            debt.owe(GfnRange::ALL);
            reader.stats().inc(Counter::FlushOwed);
            reader.pay(debt, FlushScope::Ranges);
            self.unflushed().flushed(due);
        }
    }
}

/// Whether something was aged and not flushed since. Calls that clear are counted; a flush pays for
/// those begun before it was asked for, if all of them were over then.
#[derive(Debug)]
pub(crate) struct Unflushed {
    /// Calls begun that clear.
    begun: AtomicU64,
    /// Of these, those that are not over.
    clearing: AtomicU64,
    /// So many of the calls begun are paid for.
    flushed: AtomicU64,
}

/// What a flush is to pay for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Due {
    /// Calls begun.
    begun: u64,
    /// Was any of them another's, and not paid for?
    of_others: bool,
    /// Were all of them over, but for the caller's own?
    quiet: bool,
}

impl Unflushed {
    pub(crate) fn new() -> Self {
        let none = || AtomicU64::new(0);
        Self { begun: none(), clearing: none(), flushed: none() }
    }

    /// A call will clear; its number, from 1 on.
    fn begin(&self) -> u64 {
        // ORDERING[shadow-aged]: Relaxed. Comes before the count below, which releases it.
        self.clearing.fetch_add(1, Ordering::Relaxed);
        // ORDERING[shadow-aged]: Release. Before anything is cleared, whose compare-exchange
        // releases this; who counts this call (Acquire in `due`) counts it as not over, too.
        self.begun.fetch_add(1, Ordering::Release) + 1
    }

    /// It is over.
    fn end(&self) {
        // ORDERING[shadow-aged]: Release. What it cleared comes before; pairs with `due`.
        self.clearing.fetch_sub(1, Ordering::Release);
    }

    /// What is to be flushed; `own`: the number of a call that flushes what it cleared itself.
    fn due(&self, own: Option<u64>) -> Option<Due> {
        // ORDERING[shadow-aged]: Acquire. Pairs with `begin`.
        let begun = self.begun.load(Ordering::Acquire);
        // ORDERING[shadow-aged]: Acquire. Pairs with `end`: what calls that are over cleared comes
        // before the flush.
        let clearing = self.clearing.load(Ordering::Acquire);
        // ORDERING[shadow-aged]: Acquire. Pairs with `flushed`.
        let flushed = self.flushed.load(Ordering::Acquire);
        let before = own.map_or(begun, |own| own - 1);
        let of_others = flushed < before || own.is_some_and(|own| own != begun);
        let quiet = clearing == u64::from(own.is_some());
        (of_others || own.is_some()).then_some(Due { begun, of_others, quiet })
    }

    /// The flush is complete.
    fn flushed(&self, due: Due) {
        if due.quiet {
            // ORDERING[shadow-aged]: Release. After the flush; pairs with `due`.
            self.flushed.fetch_max(due.begun, Ordering::Release);
        }
    }
}

/// A call under way.
struct Pass<'a, F: SpteFormat, H: Host> {
    mmu: &'a ShadowMmu<F, H>,
    request: AgeRequest,
    report: AgeReport,
    debt: FlushDebt,
    /// The block of 1 GiB looked at last, and what its own leaves said: told for each part.
    huge: Option<(Gfn, Seen)>,
    /// Address space by address space, level by level.
    lists: [[Option<Lists<'a>>; LEAVES.len()]; SPACES],
    cells: Cells<'a, F, H>,
}

impl<F: SpteFormat, H: Host> Pass<'_, F, H> {
    fn run<S: AgeSink>(&mut self, reader: &mut Actor<H>, sink: &mut S) {
        let range = self.request.range;
        let mut at = range.start;
        while let Some(gfn) = self.next_mapped(at) {
            let spent = self.report.entries >= self.request.budget;
            if spent && self.request.effort == Effort::Fast {
                // No more is read: nothing is known of the rest.
                return self.unknown(GfnRange::new(gfn, range.end), sink);
            }
            // A young block of 1 GiB is told to its end: its bit is clear now.
            let told = self
                .huge
                .is_some_and(|(start, seen)| seen.mapped && start == gfn.align_down(Level::L3));
            if spent && at != range.start && !told {
                self.report.next = gfn;
                return;
            }
            // A section for each block: those who wait for sections wait for 512 lists at most.
            let work = reader.pinned();
            let block = GfnRange::entry(gfn, Level::L2).intersection(range);
            self.block(&work.section, work.stats, block, sink);
            at = block.end;
        }
    }

    /// The first page from `at` on that may be mapped.
    fn next_mapped(&self, at: Gfn) -> Option<Gfn> {
        let rmaps = self.mmu.rmaps();
        let spaces = (0..).take(SPACES);
        let lists = spaces.flat_map(|space| LEAVES.into_iter().map(move |level| (space, level)));
        lists
            .filter_map(|(space, level)| rmaps.next(space, level, at, self.request.range.end))
            .min()
    }

    fn unknown<S: AgeSink>(&mut self, range: GfnRange, sink: &mut S) {
        self.report.unknown += range.len();
        sink.unknown(range);
    }

    /// Look at the pages of one block of 2 MiB.
    fn block<S: AgeSink>(
        &mut self,
        section: &EpochGuard<'_>,
        shard: &StatsShard,
        block: GfnRange,
        sink: &mut S,
    ) {
        let base = block.start.align_down(Level::L2);
        let mut whole = self.look(section, shard, Level::L2, base);
        whole.merge(self.look_huge(section, shard, base.align_down(Level::L3)));
        if whole.is_unknown() {
            return self.unknown(block, sink);
        }
        let (mut present, mut young) = ([0; MASK_WORDS], [0; MASK_WORDS]);
        let mut unknown = [0; MASK_WORDS];
        let mut gfn = block.start;
        while gfn < block.end {
            let seen = self.look(section, shard, Level::L1, gfn);
            let index = gfn.index(Level::L1);
            for (mask, on) in [
                (&mut present, seen.mapped),
                (&mut young, seen.young),
                (&mut unknown, seen.is_unknown()),
            ] {
                if let Some(word) = mask.get_mut(index / WORD) {
                    *word |= u64::from(on) << (index % WORD);
                }
            }
            gfn = gfn.saturating_add(1);
        }
        let none = |mask: &[u64; MASK_WORDS]| mask.iter().all(|word| *word == 0);
        if none(&present) && none(&unknown) {
            if whole.mapped {
                self.report.mapped += block.len();
                self.report.young += if whole.young { block.len() } else { 0 };
                sink.huge(base, Level::L2, whole.young);
            }
            return;
        }
        if whole.mapped {
            // Mapped both ways: each page is young if either is.
            fill(&mut present, block);
            if whole.young {
                fill(&mut young, block);
                unknown = [0; MASK_WORDS];
            }
        }
        self.report.mapped += ones(&present);
        self.report.young += ones(&young);
        sink.table(base, &present, &young);
        let mut gfn = block.start;
        while gfn < block.end {
            let index = gfn.index(Level::L1);
            if unknown.get(index / WORD).is_some_and(|word| word >> (index % WORD) & 1 != 0) {
                self.unknown(GfnRange::from_len(gfn, 1), sink);
            }
            gfn = gfn.saturating_add(1);
        }
    }

    /// What the leaves of 1 GiB over a block say; asked once for each.
    fn look_huge(&mut self, section: &EpochGuard<'_>, shard: &StatsShard, start: Gfn) -> Seen {
        if let Some((known, seen)) = self.huge
            && known == start
        {
            return seen;
        }
        let seen = self.look(section, shard, Level::L3, start);
        if !seen.unknown {
            self.huge = Some((start, seen));
        }
        seen
    }

    /// Look at every entry of one level that maps a block, in both address spaces.
    fn look(
        &mut self,
        section: &EpochGuard<'_>,
        shard: &StatsShard,
        level: Level,
        gfn: Gfn,
    ) -> Seen {
        let mut seen = Seen::default();
        for space in 0..SPACES {
            let lists = self.lists.get_mut(space).and_then(|levels| levels.get_mut(level.slot()));
            let Some(Some(lists)) = lists else { continue };
            let list = match self.request.effort {
                Effort::Full => lists.lock(gfn),
                Effort::Fast => match lists.try_lock(gfn) {
                    Ok(list) => list,
                    Err(Busy) => {
                        seen.unknown = true;
                        continue;
                    }
                },
            };
            let Some(list) = list else { continue };
            let after = self.report.entries.saturating_add(u64::from(list.len()));
            if self.request.effort == Effort::Fast && after > self.request.budget {
                // No more is read.
                seen.unknown = true;
                continue;
            }
            for spte in list.entries() {
                self.report.entries += 1;
                let Some(cell) = self.cells.get(section, spte) else { continue };
                let now = cell.peek();
                if now.is_leaf(level) {
                    seen.mapped = true;
                    seen.young |= self.leaf(shard, cell, now, level, gfn);
                }
            }
        }
        seen
    }

    /// Was the leaf used? Clears what it saw, if that is asked for.
    fn leaf(
        &mut self,
        shard: &StatsShard,
        cell: &SpteCell,
        now: Spte,
        level: Level,
        gfn: Gfn,
    ) -> bool {
        let config = self.mmu.config();
        if !config.is_accessed(now) {
            return false;
        }
        if self.request.mode == AgeMode::Test {
            return true;
        }
        // INVARIANT[I21]: only A, or the permissions that tracking gives back. Not tried again: who
        // changed the entry meanwhile used it, or takes it away.
        if cell.try_change(now, config.age(now)).is_ok() {
            shard.inc(Counter::LeavesAged);
        } else {
            self.report.lost += 1;
        }
        if self.request.mode == AgeMode::ClearFlush && self.request.effort == Effort::Full {
            shard.inc(Counter::FlushOwed);
            self.debt.owe(GfnRange::entry(gfn, level));
        }
        true
    }
}

/// Set the bits of a block's pages.
fn fill(mask: &mut [u64; MASK_WORDS], block: GfnRange) {
    let first = block.start.index(Level::L1);
    let last = first + to_index(block.len());
    for (number, word) in mask.iter_mut().enumerate() {
        let (low, high) = (number * WORD, (number + 1) * WORD);
        let (from, to) = (first.clamp(low, high) - low, last.clamp(low, high) - low);
        if from < to {
            *word |= (u64::MAX >> (WORD - (to - from))) << from;
        }
    }
}

fn ones(mask: &[u64; MASK_WORDS]) -> u64 {
    mask.iter().map(|word| u64::from(word.count_ones())).sum()
}
