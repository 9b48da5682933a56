//! Aging without a lock: read and clear accessed bits, a table at a time.
//!
//! Implements [`AgeRange`] for [`TdpMmu`] (KVM rows 5.1 to 5.9, 5.13, 5.16, 5.17; upper accessed
//! bits, row 5.25, are `upper`'s and `unflushed`'s). Only an epoch is pinned, for
//! at most [`SLICE_ENTRIES`](crate::zap::SLICE_ENTRIES) entries at a time, so aging never waits for
//! the MMU lock and holds nobody up. Each clearing is one compare-exchange without retry: a lost
//! one means that the entry is in use or going away, and counts as young (race table R1 to R13).

use mmu_core::addr::{Gfn, GfnRange, Level, to_u64};
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::trace::Event;
use mmu_core::traits::{
    AgeAbilities, AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, Effort, Host, MASK_WORDS,
    UpperBits,
};
use mmu_core::vm::Actor;

use crate::change::Change;
use crate::iter::{Cursor, LeafTable, Step, TdpIter};
use crate::mmu::TdpMmu;
use crate::root::RootFilter;
use crate::scan;
use crate::slice::{self, Found, Plan, Visit};
use crate::unflushed::{Links, Pass};
use crate::upper::Entered;

impl<F: SpteFormat, H: Host> AgeRange for TdpMmu<F, H> {
    type Reader = Actor<H>;

    /// Everything, unless the bits are not ours: of a mirror, or set by no hardware.
    fn abilities(&self) -> AgeAbilities {
        if self.external().is_some() {
            AgeAbilities::empty()
        } else if self.config().ad_enabled() {
            AgeAbilities::all()
        } else {
            AgeAbilities::FAST
        }
    }

    /// Every valid root is looked at. With more than one (address spaces), a table's gfns may be
    /// told once per root, root by root.
    fn age<S: AgeSink>(
        &self,
        reader: &mut Actor<H>,
        request: AgeRequest,
        sink: &mut S,
    ) -> AgeReport {
        self.assert_own(reader);
        let request = self.possible(request);
        let AgeRequest { range, mode, effort, .. } = request;
        let links = match (request.upper, mode, effort) {
            (UpperBits::Ignore, ..) => Links::Ignore,
            (UpperBits::Use, AgeMode::Test, _) | (UpperBits::Use, _, Effort::Fast) => {
                Links::Believe
            }
            (UpperBits::Use, ..) => Links::Clear,
        };
        let Some(mut pass) = self.begin_aging(request, links) else {
            let mut report = AgeReport::empty(range.end);
            tell_unknown(sink, range, &mut report);
            return report;
        };
        let mut debt = FlushDebt::new();
        let total = self.age_roots(reader, request, &mut pass, sink, &mut debt);
        if mode != AgeMode::Test {
            reader.stats().add(Counter::LeavesAged, total.young);
        }
        let done = GfnRange::new(range.start, total.next);
        self.vm().trace(|| Event::Aged { range: done, mode, young: total.young });
        // What was aged without a flush before may still hide accesses in TLBs.
        let more =
            if mode == AgeMode::ClearFlush { done } else { GfnRange::new(done.start, done.start) };
        self.flush_owed(reader, debt, more);
        self.unflushed().end(pass);
        total
    }

    fn flush_aged(&self, reader: &mut Actor<H>, range: GfnRange) {
        self.assert_own(reader);
        self.flush_owed(reader, FlushDebt::new(), range);
    }
}

/// What to do to one root.
#[derive(Clone, Copy)]
pub(crate) struct Job {
    pub(crate) range: GfnRange,
    pub(crate) mode: AgeMode,
    budget: u64,
    effort: Effort,
    upper: UpperBits,
}

/// What one root's walk works on.
pub(crate) struct Work<'a, S: AgeSink> {
    pub(crate) pass: &'a mut Pass,
    sink: &'a mut S,
    pub(crate) debt: &'a mut FlushDebt,
    pub(crate) entered: Entered,
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// The request without what this MMU cannot do, or what contradicts itself.
    fn possible(&self, mut request: AgeRequest) -> AgeRequest {
        if !self.abilities().contains(AgeAbilities::UPPER_BITS) {
            request.upper = UpperBits::Ignore;
        }
        if request.effort == Effort::Fast && request.mode == AgeMode::ClearFlush {
            request.mode = AgeMode::Clear;
        }
        request
    }

    /// Before the first bit is read. `None`: unknown, everything.
    fn begin_aging(&self, request: AgeRequest, links: Links) -> Option<Pass> {
        let AgeRequest { range, mode, effort, .. } = request;
        if effort == Effort::Fast && !self.abilities().contains(AgeAbilities::FAST) {
            return None;
        }
        self.unflushed().begin(range, mode, links, effort)
    }

    /// Age every root's part of the range.
    fn age_roots<S: AgeSink>(
        &self,
        reader: &mut Actor<H>,
        request: AgeRequest,
        pass: &mut Pass,
        sink: &mut S,
        debt: &mut FlushDebt,
    ) -> AgeReport {
        let AgeRequest { mut range, mode, budget, effort, upper, .. } = request;
        let mut total = AgeReport::empty(range.end);
        let mut first = true;
        for index in self.changeable_roots() {
            // The budget bounds the first root; the others catch up with it, unless they may not.
            let budget = match effort {
                Effort::Fast => budget.saturating_sub(total.entries),
                Effort::Full if first => budget,
                Effort::Full => u64::MAX,
            };
            let job = Job { range, mode, budget, effort, upper };
            let entered = Entered::NONE;
            let work = Work { pass: &mut *pass, sink: &mut *sink, debt: &mut *debt, entered };
            let Some(report) = self.age_root(reader, index, job, work) else { continue };
            let next = if first { report.next } else { total.next };
            total = total.merge(report);
            total.next = next;
            range.end = range.end.min(next);
            first = false;
        }
        total
    }

    /// Pay `debt`, and what is left unflushed in `more`.
    fn flush_owed(&self, reader: &mut Actor<H>, mut debt: FlushDebt, more: GfnRange) {
        let nothing = more.is_empty() || mmu_core::busted!("precise_age_forgets_others");
        let due = if nothing { None } else { self.unflushed().due(more) };
        if let Some(due) = due {
            reader.stats().inc(Counter::FlushOwed);
            debt.owe(due.range);
        }
        reader.pay(debt, FlushScope::Ranges);
        if let Some(due) = due {
            self.unflushed().flushed(due);
        }
    }

    /// Age one root's part of the range, in sections. `None` when there is no such root.
    fn age_root<S: AgeSink>(
        &self,
        reader: &mut Actor<H>,
        index: usize,
        job: Job,
        mut work: Work<'_, S>,
    ) -> Option<AgeReport> {
        let mut cursor = Cursor::new(job.range, Level::L2);
        let mut report: Option<AgeReport> = None;
        loop {
            let pinned = reader.pinned();
            let Some(root) = self.roots().get(index, RootFilter::Valid) else { return report };
            let pool = pinned.vm.pool();
            let space = root.role.space();
            let change = self.change(pinned.vm, pinned.stats, &pinned.section, space);
            let iter =
                TdpIter::resume(pool, &pinned.section, root.frame, root.role.level(), cursor)
                    .with_encryption(self.config().encryption_mask());
            let done = report.get_or_insert(AgeReport::empty(job.range.end));
            let mut slice = Slice { mmu: self, change, job, work: &mut work, report: done };
            match slice.run(iter) {
                End::Paused(next) if slice.report.entries < job.budget => cursor = next,
                End::Paused(next) if job.effort == Effort::Full => {
                    let stop = next.next();
                    slice.leave(root, stop);
                    done.next = stop;
                    return report;
                }
                End::Paused(next) | End::Stopped(next) => {
                    let rest = GfnRange::new(next.next(), job.range.end);
                    tell_unknown(work.sink, rest.intersection(job.range), done);
                    return report;
                }
                End::Done => return report,
            }
        }
    }
}

fn tell_unknown<S: AgeSink>(sink: &mut S, range: GfnRange, report: &mut AgeReport) {
    if !range.is_empty() {
        report.unknown += range.len();
        sink.unknown(range);
    }
}

/// How a slice ended.
enum End {
    Done,
    /// It was long enough.
    Paused(Cursor),
    /// What comes next would exceed the budget of a fast call.
    Stopped(Cursor),
}

/// One section's worth of aging.
pub(crate) struct Slice<'a, 'w, F: SpteFormat, H: Host, S: AgeSink> {
    pub(crate) mmu: &'a TdpMmu<F, H>,
    pub(crate) change: Change<'a, F, H>,
    pub(crate) job: Job,
    pub(crate) work: &'a mut Work<'w, S>,
    report: &'a mut AgeReport,
}

impl<F: SpteFormat, H: Host, S: AgeSink> Slice<'_, '_, F, H, S> {
    /// Age until the walk ends or the section has lasted long enough.
    fn run(&mut self, iter: TdpIter<'_, H>) -> End {
        let (stats, range) = (self.change.stats, self.job.range);
        if self.job.upper == UpperBits::Ignore && self.job.effort == Effort::Full {
            let next = slice::run(stats, iter, range, |found| self.visit(found));
            return next.map_or(End::Done, End::Paused);
        }
        let mut stopped = false;
        let plan = |this: &mut Self, iter: &TdpIter<'_, H>, step: &Step<'_>, room| {
            let plan = this.plan(iter, step, room);
            stopped |= plan == Plan::Stop;
            plan
        };
        let next = slice::run_planned(stats, iter, range, self, plan, Self::visit);
        match next {
            None => End::Done,
            Some(next) if stopped => End::Stopped(next),
            Some(next) => End::Paused(next),
        }
    }

    fn visit(&mut self, found: Found<'_>) -> Visit {
        self.report.entries += 1;
        match found {
            Found::Table(table) => self.table(&table),
            Found::Entry(step) if step.spte.is_leaf(step.level) => self.huge(&step),
            Found::Entry(_) => {}
        }
        Visit::Done
    }

    /// Is the entry worth a visit, of which it and `below` are read? There is `room` in the slice.
    #[inline]
    fn plan(&mut self, iter: &TdpIter<'_, H>, step: &Step<'_>, [below, room]: [usize; 2]) -> Plan {
        let left = match self.job.effort {
            Effort::Fast => self.job.budget.saturating_sub(self.report.entries),
            Effort::Full => u64::MAX,
        };
        if left == 0 {
            return Plan::Stop;
        }
        let uses = self.job.upper == UpperBits::Use && step.spte.is_table(step.level);
        if uses && self.is_idle(step) {
            let most = room.min(usize::try_from(left).unwrap_or(usize::MAX));
            let (links, idle) = self.idle_run(iter, step, most);
            let part = idle.intersection(self.job.range);
            self.report.entries += to_u64(links);
            self.report.idle += part.len();
            self.work.sink.idle(part);
            return Plan::Skip(links);
        }
        if to_u64(below) < left { Plan::Visit } else { Plan::Stop }
    }

    fn huge(&mut self, step: &Step<'_>) {
        let (gfn, level, range) = (step.gfn, step.level, step.range());
        let young = self.change.config.is_accessed(step.spte);
        let pages = range.intersection(self.job.range).len();
        self.report.mapped += pages;
        if young {
            self.report.young += pages;
            if self.job.mode != AgeMode::Test {
                self.clear(step.cell, step.spte, gfn, level);
            }
            match self.job.mode {
                AgeMode::ClearFlush => {
                    if !mmu_core::busted!("huge_age_without_flush") {
                        self.change.owe(self.work.debt, range);
                    }
                }
                // Cleared as a whole, and so hidden as a whole.
                AgeMode::Clear if !self.job.range.covers(range) => {
                    self.work.pass.note(range, Level::L1);
                }
                AgeMode::Clear | AgeMode::Test => {}
            }
        }
        self.work.sink.huge(gfn, level, young);
    }

    /// The loop that aging lives from: lines of eight entries read at once, a write only where the
    /// bit is set. Reading an entry twice is harmless: what was young at the first look was used.
    fn table(&mut self, table: &LeafTable<'_>) {
        let mut present = [0u64; MASK_WORDS];
        let mut young = [0u64; MASK_WORDS];
        self.report.entries += to_u64(table.count);
        // The table after this one is fetched ahead, unless it will be left out.
        let all = self.job.upper == UpperBits::Ignore;
        let next = table.next.filter(|_| all || self.change.config.is_accessed(table.next_link));
        let words = table.table.entries().chunks(scan::WORD);
        for (word, (cells, (p, y))) in words.zip(present.iter_mut().zip(&mut young)).enumerate() {
            scan::fetch(next, word);
            let window = scan::window(word, table.first, table.first + table.count);
            if window == 0 {
                continue;
            }
            let (is_present, is_young) = scan::masks(cells, scan::PRESENT, F::ACCESSED);
            *p = is_present & window;
            *y = is_young & window;
            if *y != 0 && self.job.mode != AgeMode::Test {
                let first = to_u64(word * scan::WORD);
                self.clear_word(cells, *y, table.base.saturating_add(first));
            }
        }
        self.report.mapped += ones(&present);
        self.report.young += ones(&young);
        self.work.sink.table(table.base, &present, &young);
    }

    /// Clear the entries of `cells` that `young` has; `base` is the gfn of the first. Flushes are
    /// owed at once, from the first to the last of them.
    fn clear_word(&mut self, cells: &[SpteCell], young: u64, base: Gfn) {
        let mut rest = young;
        while rest != 0 {
            let bit = rest.trailing_zeros();
            rest &= rest - 1;
            if let Some(cell) = cells.get(usize::try_from(bit).unwrap_or(0)) {
                self.clear(cell, cell.peek(), base.saturating_add(u64::from(bit)), Level::L1);
            }
        }
        let precise = self.job.mode == AgeMode::ClearFlush;
        if precise && !mmu_core::busted!("precise_age_forgets_its_own") {
            let first = base.saturating_add(u64::from(young.trailing_zeros()));
            let end = base.saturating_add(scan::PAGES - u64::from(young.leading_zeros()));
            let count = u64::from(young.count_ones());
            self.change.owe_many(self.work.debt, GfnRange::new(first, end), count);
        }
    }

    #[inline(always)]
    fn clear(&mut self, cell: &SpteCell, old: Spte, gfn: Gfn, level: Level) {
        self.report.lost += u64::from(!self.change.age(cell, old, gfn, level));
    }
}

fn ones(mask: &[u64; MASK_WORDS]) -> u64 {
    mask.iter().map(|word| u64::from(word.count_ones())).sum()
}
