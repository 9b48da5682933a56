//! Aging without a lock: read and clear accessed bits, a table at a time.
//!
//! Implements [`AgeRange`] for [`TdpMmu`] (KVM rows 5.1 to 5.9, 5.13). Only an epoch is pinned, for
//! at most [`SLICE_ENTRIES`](crate::zap::SLICE_ENTRIES) entries at a time, so aging never waits for
//! the MMU lock and holds nobody up. Each clearing is one compare-exchange without retry: a lost
//! one means that the entry is in use or going away, and counts as young (race table R1 to R13).

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::trace::Event;
use mmu_core::traits::{AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, Host, MASK_WORDS};
use mmu_core::vm::Actor;

use crate::change::Change;
use crate::iter::{Cursor, LeafTable, Step, TdpIter};
use crate::mmu::TdpMmu;
use crate::root::RootFilter;
use crate::scan;
use crate::slice::{self, Found, Visit};

impl<F: SpteFormat, H: Host> AgeRange for TdpMmu<F, H> {
    type Reader = Actor<H>;

    /// Every valid root is looked at. With more than one (address spaces), a table's gfns may be
    /// reported once per root.
    fn age<S: AgeSink>(
        &self,
        reader: &mut Actor<H>,
        request: AgeRequest,
        sink: &mut S,
    ) -> AgeReport {
        self.assert_own(reader);
        if request.mode == AgeMode::Clear && !mmu_core::busted!("age_notes_too_late") {
            self.unflushed().note(request.range);
        }
        let mut total = AgeReport::empty(request.range.end);
        let mut debt = FlushDebt::new();
        let mut range = request.range;
        let mut first = true;
        for index in self.changeable_roots() {
            // The budget bounds the first root; the others catch up with it.
            let budget = if first { request.budget } else { u64::MAX };
            let job = Job { range, mode: request.mode, budget };
            let Some(report) = self.age_root(reader, index, job, sink, &mut debt) else {
                continue;
            };
            let next = if first { report.next } else { total.next };
            total = total.merge(report);
            total.next = next;
            range.end = range.end.min(next);
            first = false;
        }
        if request.mode != AgeMode::Test {
            reader.stats().add(Counter::LeavesAged, total.young);
        }
        let done = GfnRange::new(request.range.start, total.next);
        let mut due = None;
        match request.mode {
            AgeMode::Test => {}
            // Once more: a precise pass beside this one may have forgotten the first note.
            AgeMode::Clear if mmu_core::busted!("age_notes_once") => {}
            AgeMode::Clear => self.unflushed().note(request.range),
            // What was aged without a flush before may still hide accesses in TLBs.
            AgeMode::ClearFlush => due = self.unflushed().due(done),
        }
        if let Some(due) = due.filter(|_| !mmu_core::busted!("precise_age_forgets_others")) {
            reader.stats().inc(Counter::FlushOwed);
            debt.owe(due.range);
        }
        let (mode, young) = (request.mode, total.young);
        self.vm().trace(|| Event::Aged { range: done, mode, young });
        reader.pay(debt, FlushScope::Ranges);
        if let Some(due) = due {
            self.unflushed().flushed(due);
        }
        total
    }
}

/// What to do to one root.
#[derive(Clone, Copy)]
struct Job {
    range: GfnRange,
    mode: AgeMode,
    budget: u64,
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Age one root's part of the range, in sections. `None` when there is no such root.
    fn age_root<S: AgeSink>(
        &self,
        reader: &mut Actor<H>,
        index: usize,
        job: Job,
        sink: &mut S,
        debt: &mut FlushDebt,
    ) -> Option<AgeReport> {
        let mut cursor = Cursor::new(job.range, Level::L2);
        let mut report: Option<AgeReport> = None;
        loop {
            let work = reader.pinned();
            let Some(root) = self.roots().get(index, RootFilter::Valid) else { return report };
            let pool = work.vm.pool();
            let change = self.change(work.vm, work.stats, &work.section, root.role.space());
            let iter = TdpIter::resume(pool, &work.section, root.frame, root.role.level(), cursor)
                .with_encryption(self.config().encryption_mask());
            let done = report.get_or_insert(AgeReport::empty(job.range.end));
            let mut slice = Slice { change, job, sink, debt, report: done };
            match slice.run(iter) {
                Some(next) if slice.report.entries < job.budget => cursor = next,
                Some(next) => {
                    done.next = next.next();
                    return report;
                }
                None => return report,
            }
        }
    }
}

/// One section's worth of aging.
struct Slice<'a, F: SpteFormat, H: Host, S: AgeSink> {
    change: Change<'a, F, H>,
    job: Job,
    sink: &'a mut S,
    debt: &'a mut FlushDebt,
    report: &'a mut AgeReport,
}

impl<F: SpteFormat, H: Host, S: AgeSink> Slice<'_, F, H, S> {
    /// Age until the walk ends (`None`) or the section has lasted long enough.
    fn run(&mut self, iter: TdpIter<'_, H>) -> Option<Cursor> {
        let stats = self.change.stats;
        slice::run(stats, iter, self.job.range, |found| {
            self.report.entries += 1;
            match found {
                Found::Table(table) => self.table(&table),
                Found::Entry(step) if step.spte.is_leaf(step.level) => self.huge(&step),
                Found::Entry(_) => {}
            }
            Visit::Done
        })
    }

    fn huge(&mut self, step: &Step<'_>) {
        let young = self.change.config.is_accessed(step.spte);
        let pages = step.range().intersection(self.job.range).len();
        self.report.mapped += pages;
        if young {
            self.report.young += pages;
            self.clear(step.cell, step.spte, step.gfn, step.level);
        }
        self.sink.huge(step.gfn, step.level, young);
    }

    /// The loop that aging lives from: lines of eight entries read at once, a write only where the
    /// bit is set. Reading an entry twice is harmless: what was young at the first look was used.
    fn table(&mut self, table: &LeafTable<'_>) {
        let mut present = [0u64; MASK_WORDS];
        let mut young = [0u64; MASK_WORDS];
        self.report.entries += mmu_core::addr::to_u64(table.count);
        let words = table.table.entries().chunks(scan::WORD);
        for (word, (cells, (p, y))) in words.zip(present.iter_mut().zip(&mut young)).enumerate() {
            scan::fetch(table.next, word);
            let window = scan::window(word, table.first, table.first + table.count);
            if window == 0 {
                continue;
            }
            let (is_present, is_young) = scan::masks(cells, scan::PRESENT, F::ACCESSED);
            *p = is_present & window;
            *y = is_young & window;
            if *y != 0 && self.job.mode != AgeMode::Test {
                let first = mmu_core::addr::to_u64(word * scan::WORD);
                self.clear_word(cells, *y, table.base.saturating_add(first));
            }
        }
        self.report.mapped += ones(&present);
        self.report.young += ones(&young);
        self.sink.table(table.base, &present, &young);
    }

    /// Clear the entries of `cells` that `young` has; `base` is the gfn of the first.
    fn clear_word(&mut self, cells: &[SpteCell], mut young: u64, base: Gfn) {
        while young != 0 {
            let bit = young.trailing_zeros();
            young &= young - 1;
            if let Some(cell) = cells.get(usize::try_from(bit).unwrap_or(0)) {
                self.clear(cell, cell.peek(), base.saturating_add(u64::from(bit)), Level::L1);
            }
        }
    }

    fn clear(&mut self, cell: &SpteCell, old: Spte, gfn: Gfn, level: Level) {
        if self.job.mode == AgeMode::Test {
            return;
        }
        if !self.change.age(cell, old, gfn, level) {
            self.report.lost += 1;
        }
        let precise = self.job.mode == AgeMode::ClearFlush;
        if precise && !mmu_core::busted!("precise_age_forgets_its_own") {
            self.change.owe(self.debt, GfnRange::from_len(gfn, level.pages()));
        }
    }
}

fn ones(mask: &[u64; MASK_WORDS]) -> u64 {
    mask.iter().map(|word| u64::from(word.count_ones())).sum()
}
