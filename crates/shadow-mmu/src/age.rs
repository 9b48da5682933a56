//! Aging: accessed bits of shadow entries, found through reverse maps, without the writer.
//!
//! Implements [`AgeRange`] for [`ShadowMmu`] (KVM rows 5.6, 5.10). A page of the guest is young if
//! any entry that maps it is, in either address space. For each page the list is held by its bit
//! lock, so the entries' pages live (races R14 to R16); each young entry is written by one
//! compare-exchange that is not tried again (R1 to R7). Where nothing was used the lock is not
//! taken: entries are read, and the list is asked whether it is as it was. Blocks of 512 pages are
//! looked at one after the other, aligned, so a range that starts in the middle of a large page
//! skips nothing.
//!
//! Walks skip what has no reverse map. There is nothing more to skip: the links above a leaf are
//! those of linear addresses. A fast question is told "unknown" for a list that somebody holds.

use mmu_core::addr::{Gfn, GfnRange, Level, to_index};
use mmu_core::epoch::EpochGuard;
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::frame::PageTable;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::sync::{AtomicU64, Ordering};
use mmu_core::traits::{
    AgeAbilities, AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, Effort, Host, MASK_WORDS,
};
use mmu_core::vm::Actor;

use crate::chain::INLINE;
use crate::mmu::{Cells, ShadowMmu};
use crate::rmap::{Busy, Lists, Peek, SPACES};
use crate::spte_ref::SpteRef;

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
            limit: match request.effort {
                Effort::Full => u64::MAX,
                Effort::Fast if mmu_core::busted!("fast_age_over_budget") => u64::MAX,
                Effort::Fast => request.budget,
            },
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
        let later = own.is_some_and(|own| own != begun);
        let of_others = flushed < before || (later && !mmu_core::busted!("later_clears_unflushed"));
        if mmu_core::busted!("flush_noted_early") {
            // ORDERING[shadow-aged]: Release. The breakage's.
            self.flushed.fetch_max(begun, Ordering::Release);
        }
        let quiet = clearing == u64::from(own.is_some());
        (of_others || own.is_some()).then_some(Due { begun, of_others, quiet })
    }

    /// The flush is complete.
    fn flushed(&self, due: Due) {
        if due.quiet || mmu_core::busted!("late_clears_forgotten") {
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
    /// Entries that may be read: a fast call reads no more than it was told.
    limit: u64,
    debt: FlushDebt,
    /// The block of 1 GiB looked at last, and what its own leaves said: told for each part.
    huge: Option<(Gfn, Seen)>,
    /// Address space by address space, level by level.
    lists: [[Option<Lists<'a>>; LEAVES.len()]; SPACES],
    cells: Cells<'a, F, H>,
}

impl<'a, F: SpteFormat, H: Host> Pass<'a, F, H> {
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
        self.lists.iter_mut().flatten().flatten().for_each(Lists::forget);
        self.cells.forget();
        let base = block.start.align_down(Level::L2);
        let mut whole = self.look(section, shard, Level::L2, base);
        whole.merge(self.look_huge(section, shard, base.align_down(Level::L3)));
        if whole.is_unknown() && !mmu_core::busted!("fast_age_clears_untold") {
            return self.unknown(block, sink);
        }
        let Masks { mut present, mut young, mut unknown } = self.small(section, shard, block);
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
                if !mmu_core::busted!("young_told_unknown") {
                    unknown = [0; MASK_WORDS];
                }
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
        if !seen.unknown || mmu_core::busted!("unknown_remembered") {
            self.huge = Some((start, seen));
        }
        seen
    }

    /// Look at every 4 KiB page of a block of 2 MiB.
    fn small(&mut self, section: &EpochGuard<'_>, shard: &StatsShard, block: GfnRange) -> Masks {
        let mut masks = Masks::default();
        // Space by space, because one of them is nearly always empty.
        for (space, id) in (0..SPACES).zip(0..) {
            let first = self.mmu.rmaps().next(id, Level::L1, block.start, block.end);
            let Some(mut gfn) = first else { continue };
            let Some(mut lists) = self.take_lists(space, Level::L1) else { continue };
            let mut last = None;
            while gfn < block.end {
                let seen = self.look_at(section, shard, &mut lists, Level::L1, gfn, &mut last);
                masks.note(gfn.index(Level::L1), seen);
                gfn = gfn.saturating_add(1);
            }
            self.return_lists(space, Level::L1, lists);
        }
        if !mmu_core::busted!("young_told_unknown") {
            masks.settle();
        }
        masks
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
            if let Some(mut lists) = self.take_lists(space, level) {
                seen.merge(self.look_at(section, shard, &mut lists, level, gfn, &mut None));
                self.return_lists(space, level, lists);
            }
        }
        seen
    }

    fn take_lists(&mut self, space: usize, level: Level) -> Option<Lists<'a>> {
        self.lists.get_mut(space)?.get_mut(level.slot())?.take()
    }

    fn return_lists(&mut self, space: usize, level: Level, lists: Lists<'a>) {
        let levels = self.lists.get_mut(space);
        if let Some(place) = levels.and_then(|levels| levels.get_mut(level.slot())) {
            *place = Some(lists);
        }
    }

    /// Look at the entries on one list.
    #[inline(always)]
    fn look_at<'g>(
        &mut self,
        section: &'g EpochGuard<'_>,
        shard: &StatsShard,
        lists: &mut Lists<'a>,
        level: Level,
        gfn: Gfn,
        last: &mut Option<(u64, &'g PageTable)>,
    ) -> Seen
    where
        'a: 'g,
    {
        let Some(peek) = lists.peek(gfn) else { return Seen::default() };
        let left = self.limit.saturating_sub(self.report.entries);
        if let Some(spte) = peek.only().filter(|_| left > 0) {
            // What nearly all lists of a guest are.
            let cell = self.cells.near(section, spte, last);
            if cell.is_some_and(|cell| self.is_idle(cell, level)) && peek.stands() {
                self.report.entries += 1;
                return Seen { mapped: true, ..Seen::default() };
            }
            if let Ok(_held) = lists.lock_as(&peek) {
                let mut seen = Seen::default();
                self.look_entry(section, shard, spte, level, gfn, &mut seen);
                return seen;
            }
        } else if let Some(entries) = peek.entries()
            && left >= u64::from(INLINE)
            && let Some(read) = self.quiet(section, &peek, entries, level)
        {
            self.report.entries += read;
            return Seen { mapped: true, ..Seen::default() };
        }
        self.look_held(section, shard, lists, level, gfn)
    }

    /// Is the block mapped, and by leaves of which none was used? Then how many; found without the
    /// list's lock, and `None` if that does not tell. Most pages of a guest are idle most of the
    /// time, and locked instructions are what a pass costs.
    fn quiet(
        &mut self,
        section: &EpochGuard<'_>,
        peek: &Peek<'_>,
        entries: [Option<SpteRef>; 2],
        level: Level,
    ) -> Option<u64> {
        let mut read = 0;
        for spte in entries.into_iter().flatten() {
            let cell = self.cells.get(section, spte)?;
            if !self.is_idle(cell, level) {
                return None;
            }
            read += 1;
        }
        peek.stands().then_some(read)
    }

    /// Is it a leaf that was not used?
    #[inline(always)]
    fn is_idle(&self, cell: &SpteCell, level: Level) -> bool {
        let now = cell.peek();
        now.is_leaf(level) && !self.mmu.config().is_accessed(now)
    }

    /// Look at an entry of a list that is held still.
    #[inline]
    fn look_entry(
        &mut self,
        section: &EpochGuard<'_>,
        shard: &StatsShard,
        spte: SpteRef,
        level: Level,
        gfn: Gfn,
        seen: &mut Seen,
    ) {
        self.report.entries += 1;
        let Some(cell) = self.cells.get(section, spte) else { return };
        let now = cell.peek();
        if now.is_leaf(level) {
            seen.mapped = true;
            seen.young |= self.leaf(shard, cell, now, level, gfn);
        }
    }

    /// The same, holding the list still.
    #[inline(never)]
    fn look_held(
        &mut self,
        section: &EpochGuard<'_>,
        shard: &StatsShard,
        lists: &mut Lists<'a>,
        level: Level,
        gfn: Gfn,
    ) -> Seen {
        let mut seen = Seen::default();
        let list = match self.request.effort {
            Effort::Full => lists.lock(gfn),
            Effort::Fast => match lists.try_lock(gfn) {
                Ok(list) => list,
                Err(Busy) => return Seen { unknown: true, ..seen },
            },
        };
        let Some(list) = list else { return seen };
        if self.limit.saturating_sub(self.report.entries) < u64::from(list.len()) {
            return Seen { unknown: true, ..seen };
        }
        for spte in list.entries() {
            self.look_entry(section, shard, spte, level, gfn, &mut seen);
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

/// What is known of the pages of a block, a bit for each.
#[derive(Default)]
struct Masks {
    present: [u64; MASK_WORDS],
    young: [u64; MASK_WORDS],
    unknown: [u64; MASK_WORDS],
}

impl Masks {
    #[inline]
    fn note(&mut self, index: usize, seen: Seen) {
        let bit = 1 << (index % WORD);
        let mark = |mask: &mut [u64; MASK_WORDS]| {
            if let Some(word) = mask.get_mut(index / WORD) {
                *word |= bit;
            }
        };
        if seen.mapped {
            mark(&mut self.present);
        }
        if seen.young {
            mark(&mut self.young);
        }
        if seen.unknown {
            mark(&mut self.unknown);
        }
    }

    /// Young is an answer, whatever could not be read beside ([`Seen::is_unknown`]).
    fn settle(&mut self) {
        for (unknown, young) in self.unknown.iter_mut().zip(&self.young) {
            *unknown &= !young;
        }
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

#[cfg(all(test, not(loom)))]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#[expect(clippy::indexing_slicing, reason = "likewise")]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;

    /// A precise pass that is alone: had it to flush for others?
    fn precise(notes: &Unflushed) -> bool {
        let own = notes.begin();
        let due = notes.due(Some(own)).unwrap();
        notes.flushed(due);
        notes.end();
        due.of_others
    }

    /// A pass that clears and does not flush.
    fn coarse(notes: &Unflushed) {
        let _ = notes.begin();
        notes.end();
    }

    #[test]
    fn quiet_calls_owe_nothing() {
        let notes = Unflushed::new();
        assert_eq!(notes.due(None), None, "nobody cleared anything");
        for _ in 0..3 {
            assert!(!precise(&notes), "it flushes what it cleared itself");
            assert_eq!(notes.due(None), None);
        }
        for passes in 1..4 {
            (0..passes).for_each(|_| coarse(&notes));
            assert!(precise(&notes));
            assert!(!precise(&notes));
            assert_eq!(notes.due(None), None);
            (0..passes).for_each(|_| coarse(&notes));
            let due = notes.due(None).unwrap();
            assert!(due.of_others && due.quiet);
            notes.flushed(due);
            assert_eq!(notes.due(None), None);
            assert!(!precise(&notes));
        }
    }

    /// What the first took on itself is not flushed yet when the second comes back.
    #[test]
    fn a_precise_pass_beside_another_flushes_too() {
        for before in [0, 1] {
            let notes = Unflushed::new();
            (0..before).for_each(|_| coarse(&notes));
            let first = notes.begin();
            let first = notes.due(Some(first)).unwrap();
            assert_eq!(first.of_others, before != 0);
            let second = notes.begin();
            let second = notes.due(Some(second)).unwrap();
            assert!(second.of_others, "the first is not complete");
            assert!(notes.due(None).is_some(), "nor the second");
            notes.flushed(second);
            notes.end();
            assert!(notes.due(None).is_some(), "the first is not over");
            notes.flushed(first);
            notes.end();
            // One more pays for what was not sure.
            assert!(precise(&notes));
            assert!(!precise(&notes));
        }
    }

    #[test]
    fn what_is_cleared_during_a_flush_is_not_forgotten() {
        for over in [false, true] {
            let notes = Unflushed::new();
            let own = notes.begin();
            if !over {
                // It has begun when the flush is asked for, and clears afterwards.
                let _ = notes.begin();
            }
            let due = notes.due(Some(own)).unwrap();
            assert_eq!(due.quiet, over);
            if over {
                let _ = notes.begin();
            }
            notes.end();
            notes.flushed(due);
            notes.end();
            assert!(notes.due(None).is_some(), "{over}");
            assert!(precise(&notes), "{over}");
            assert_eq!(notes.due(None), None);
        }
    }

    /// A step of a thread, in a world of one page.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Step {
        Begin,
        /// Looks at the page's entry, clears A if it is set, and says young.
        Clear,
        Due,
        Flush,
        Flushed,
        End,
        /// The guest accesses the page: A is set, unless the TLB has the entry.
        Access,
    }

    use Step::{Access, Begin, Clear, Due as Ask, End, Flush, Flushed};
    const PRECISE: &[Step] = &[Begin, Clear, Ask, Flush, Flushed, End];
    const COARSE: &[Step] = &[Begin, Clear, End];
    const FLUSH_AGED: &[Step] = &[Ask, Flush, Flushed];
    const GUEST: &[Step] = &[Access, Access];

    /// What a thread knows.
    #[derive(Clone, Copy, Debug, Default)]
    struct Knows {
        own: Option<u64>,
        due: Option<Due>,
        /// It cleared A itself.
        cleared: bool,
        /// So many clears of the page must have been flushed when it is over.
        relies_on: u64,
    }

    /// One page that is in a TLB as long as nobody flushes.
    #[derive(Debug)]
    struct Page {
        notes: Unflushed,
        accessed: bool,
        /// Clears so far, and how many of them came before the last flush.
        clears: u64,
        flushed: u64,
        /// Clears by calls that are over.
        over: u64,
        threads: Vec<Knows>,
    }

    impl Page {
        fn new(threads: usize) -> Self {
            let threads = vec![Knows::default(); threads];
            let notes = Unflushed::new();
            Self { notes, accessed: true, clears: 0, flushed: 0, over: 0, threads }
        }

        /// Do a step of a thread; `false` if it breaks a promise.
        fn step(&mut self, thread: usize, steps: &[Step], step: Step) -> bool {
            let (precise, asks) = (steps == PRECISE, steps == FLUSH_AGED);
            let Self { notes, threads, .. } = self;
            let knows = &mut threads[thread];
            match step {
                Begin => knows.own = Some(notes.begin()),
                Clear => {
                    if core::mem::take(&mut self.accessed) {
                        self.clears += 1;
                        knows.cleared = true;
                    }
                    knows.relies_on = self.clears;
                }
                Ask => {
                    knows.due = notes.due(knows.own);
                    if asks {
                        // Those of calls that are not over may come later, too.
                        knows.relies_on = self.over;
                    }
                }
                Flush => {
                    if knows.cleared || knows.due.is_some_and(|due| due.of_others) {
                        self.flushed = self.clears;
                    }
                }
                Flushed => {
                    if let Some(due) = knows.due {
                        notes.flushed(due);
                    }
                }
                End => notes.end(),
                Access => self.accessed |= self.clears == self.flushed,
            }
            let last = steps.last() == Some(&step);
            if last && !asks {
                self.over = self.over.max(if knows.cleared { knows.relies_on } else { 0 });
            }
            !(last && (precise || asks)) || knows.relies_on <= self.flushed
        }
    }

    /// Every order of the steps left; how many there are.
    fn all_orders(programs: &[&[Step]], done: &mut Vec<usize>) -> u64 {
        let at = |thread: usize| done.iter().filter(|one| **one == thread).count();
        let places: Vec<usize> = (0..programs.len()).map(at).collect();
        if places.iter().zip(programs).all(|(place, steps)| *place == steps.len()) {
            run(programs, done);
            return 1;
        }
        let mut orders = 0;
        for (thread, place) in places.into_iter().enumerate() {
            if place < programs[thread].len() {
                done.push(thread);
                orders += all_orders(programs, done);
                done.pop();
            }
        }
        orders
    }

    fn run(programs: &[&[Step]], order: &[usize]) {
        let mut page = Page::new(programs.len());
        let mut places = vec![0; programs.len()];
        for thread in order {
            let steps = programs[*thread];
            let kept = page.step(*thread, steps, steps[places[*thread]]);
            places[*thread] += 1;
            assert!(kept, "{programs:?}: the page is believed cold in {order:?}: {page:?}");
        }
        let forgotten = page.flushed < page.clears && page.notes.due(None).is_none();
        assert!(!forgotten, "{programs:?}: nobody flushes after {order:?}: {page:?}");
    }

    /// Nothing that was cleared is believed cold before a flush after it, in any order of the steps
    /// of two calls or three.
    #[test]
    fn nothing_cleared_is_believed_cold_before_a_flush() {
        let threads: [(&[&[Step]], u64); 7] = [
            (&[PRECISE, PRECISE], 924),
            (&[PRECISE, COARSE], 84),
            (&[PRECISE, FLUSH_AGED], 84),
            (&[COARSE, FLUSH_AGED], 20),
            (&[PRECISE, PRECISE, GUEST], 84_084),
            (&[PRECISE, COARSE, FLUSH_AGED], 18_480),
            (&[PRECISE, PRECISE, COARSE], 420_420),
        ];
        for (programs, orders) in threads {
            assert_eq!(all_orders(programs, &mut Vec::new()), orders);
        }
    }
}
