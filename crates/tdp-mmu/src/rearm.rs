//! Protecting entries again, so that the next write to a page is noticed.
//!
//! Owns [`Rearm`], one harvest's work on the trees of an address space: entries picked by bits
//! ([`Rearm::arm`]), all entries of a range ([`TdpMmu::protect`]), and D bits brought into the log
//! ([`Rearm::collect`]). KVM rows 3.41 to 3.43, 0.2.2, 0.2.3.
//!
//! Each entry is changed by compare-exchange, so a W or D that comes in between is seen. Invalid
//! roots are worked on too as long as a vCPU may run on them.

use mmu_core::addr::{Gfn, GfnRange, Level, Pfn, to_index, to_u64};
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::frame::MmuCache;
use mmu_core::frame::cache::FRAMES_PER_FAULT;
use mmu_core::slot::{DirtyLog, Memslot};
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::sync::ENTRIES;
use mmu_core::traits::Host;
use mmu_core::vm::{Actor, SharedWork};

use crate::change::Change;
use crate::dirty::{DirtyTracking, Harvest};
use crate::iter::{Cursor, LeafTable, TdpIter};
use crate::mmu::TdpMmu;
use crate::root::{FoundRoot, RootFilter};
use crate::scan;
use crate::slice::{self, Found, Visit};

/// Neighbouring pages, some of which are to be protected.
pub(crate) struct Run {
    /// Page of bit 0.
    start: Gfn,
    pub(crate) bits: [u64; Self::WORDS],
}

impl Run {
    /// Words of a run: the pages of one table.
    pub(crate) const WORDS: usize = if ENTRIES < scan::WORD { 1 } else { ENTRIES / scan::WORD };

    pub(crate) const fn new(start: Gfn) -> Self {
        Self { start, bits: [0; Self::WORDS] }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bits.iter().all(|word| *word == 0)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// From the first page to the last.
    fn hull(&self) -> GfnRange {
        let base = |index: usize| self.start.saturating_add(to_u64(index * scan::WORD));
        let mut words = (0..).zip(&self.bits).filter(|(_, word)| **word != 0);
        let Some((index, word)) = words.next() else { return GfnRange::from_len(self.start, 0) };
        let (last_index, last) = words.last().unwrap_or((index, word));
        let first = base(index).saturating_add(u64::from(word.trailing_zeros()));
        let end = u64::from(u64::BITS - last.leading_zeros());
        GfnRange::new(first, base(last_index).saturating_add(end))
    }
}

/// The bits of a word, ascending.
struct Bits(u64);

impl Iterator for Bits {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        if self.0 == 0 {
            return None;
        }
        let bit = u64::from(self.0.trailing_zeros());
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

/// The lowest `count` bits.
const fn below(count: u64) -> u64 {
    if count < scan::PAGES { (1 << count) - 1 } else { u64::MAX }
}

/// A harvest's work on the trees of one address space.
pub(crate) struct Rearm<'m, F: SpteFormat, H: Host> {
    mmu: &'m TdpMmu<F, H>,
    space: u16,
    tracking: DirtyTracking,
    debt: FlushDebt,
    pub(crate) report: Harvest,
}

/// What stands where a level-1 table was looked for.
enum Place {
    Table(Pfn),
    /// Nothing that can be written.
    Nothing,
    /// A huge leaf was split: look again in a new section, with a new frame.
    Again,
}

impl<'m, F: SpteFormat, H: Host> Rearm<'m, F, H> {
    pub(crate) fn new(mmu: &'m TdpMmu<F, H>, space: u16) -> Self {
        let tracking = mmu.dirty_tracking();
        Self { mmu, space, tracking, debt: FlushDebt::new(), report: Harvest::default() }
    }

    /// Owe the flush of `range`, whatever is found there.
    pub(crate) fn owe(&mut self, actor: &Actor<H>, range: GfnRange) {
        actor.stats().inc(Counter::FlushOwed);
        self.debt.owe(range);
    }

    /// Flush: what was taken may be handed out.
    pub(crate) fn finish(self, actor: &mut Actor<H>) -> Harvest {
        if !mmu_core::busted!("harvest_forgets_to_pay") {
            actor.pay(self.debt, FlushScope::Ranges);
        }
        self.report
    }

    /// The next write to each page of `run` is noticed once the debt is paid.
    pub(crate) fn arm(&mut self, actor: &mut Actor<H>, run: &Run) {
        let hull = run.hull();
        // Owed for every page taken, also where the entry is protected already: another pass may
        // have protected it and not flushed yet.
        if !mmu_core::busted!("harvest_without_flush") {
            self.owe(actor, hull);
        }
        for index in self.mmu.changeable_roots() {
            let mut next = Some(hull.start);
            while let Some(from) = next {
                // For splitting. Without a frame a huge leaf is protected as a whole.
                let _ = actor.top_up(FRAMES_PER_FAULT);
                next = self.arm_tree(&mut actor.shared(), index, run, from);
            }
        }
    }

    fn root(&self, index: usize) -> Option<FoundRoot> {
        let root = self.mmu.roots().get(index, RootFilter::InUse)?;
        (root.role.space() == self.space).then_some(root)
    }

    /// Protect the pages of `run` from `from` on in one tree. Where to go on, if not all was done.
    fn arm_tree(
        &mut self,
        work: &mut SharedWork<'_, H>,
        index: usize,
        run: &Run,
        from: Gfn,
    ) -> Option<Gfn> {
        let root = self.root(index)?;
        let SharedWork { section, cache, vm, stats, .. } = work;
        let change = self.mmu.change(vm, stats, section.epoch(), self.space);
        let mut start = run.start;
        for word in run.bits {
            // The pages before `from` are done.
            let mut todo = word & !below(from.distance_from(start));
            while todo != 0 {
                // A run need not begin where a table does: the part of the word in one table.
                let gfn = start.saturating_add(u64::from(todo.trailing_zeros()));
                let end = gfn.align_down(Level::L2).saturating_add(Level::L2.pages());
                let here = todo & below(end.distance_from(start));
                match self.find_table(&change, cache, root, gfn) {
                    Place::Table(frame) => self.arm_word(&change, frame, start, here),
                    Place::Nothing => {}
                    Place::Again => return Some(gfn),
                }
                todo &= !here;
            }
            start = start.saturating_add(scan::PAGES);
        }
        None
    }

    /// Protect the pages `start + bit` of `here`, all in the level-1 table in `frame`.
    fn arm_word(&mut self, change: &Change<'_, F, H>, frame: Pfn, start: Gfn, here: u64) {
        self.report.entries += u64::from(here.count_ones());
        let table = change.pool().table(change.section, frame);
        for bit in Bits(here) {
            let gfn = start.saturating_add(bit);
            let _ = self.protect_leaf(change, table.cell(gfn, Level::L1), gfn, Level::L1);
        }
    }

    /// The level-1 table that has the entry for `gfn`. A writable huge leaf on the way is split, or
    /// protected as a whole.
    fn find_table(
        &mut self,
        change: &Change<'_, F, H>,
        cache: &mut MmuCache,
        root: FoundRoot,
        gfn: Gfn,
    ) -> Place {
        let (mut frame, mut level) = (root.frame, root.role.level());
        while level > Level::L1 {
            let cell = change.pool().table(change.section, frame).cell(gfn, level);
            let old = cell.load();
            if old.is_table(level) {
                frame = change.config.pfn(old);
                level = level.below();
            } else if !old.is_leaf(level) || self.may_stay(old, level) {
                return Place::Nothing;
            } else if cache.is_empty() {
                if let Some(gone) = self.protect_leaf(change, cell, gfn, level) {
                    self.mark_huge(change, gone, gfn, level);
                }
                return Place::Nothing;
            } else {
                let child = self.mmu.split_leaf(change, cache, cell, old, gfn, level);
                self.report.splits += u64::from(child.is_some());
                return Place::Again;
            }
        }
        Place::Table(frame)
    }

    /// Is nothing to be done about a huge leaf? Where leaves are split eagerly, one that collecting
    /// D bits has protected already is split all the same: its first write would have to do it.
    fn may_stay(&self, leaf: Spte, level: Level) -> bool {
        self.protected(leaf, level) == leaf && !self.mmu.options().eager_split
    }

    /// The D of a huge leaf was the record of writes to any of its pages.
    fn mark_huge(&self, change: &Change<'_, F, H>, old: Spte, gfn: Gfn, level: Level) {
        if change.config.is_dirty(old) {
            change.keep_dirty(gfn.align_down(level), level.pages());
        }
    }

    /// The leaf so that its next write is noticed. A huge leaf must fault even where the CPU sets
    /// D: one D bit, or one logged address, would stand for all its pages.
    #[inline(always)]
    fn protected(&self, leaf: Spte, level: Level) -> Spte {
        let config = self.mmu.config();
        match (self.tracking, level) {
            (DirtyTracking::WriteProtect, _) => config.without_write(leaf),
            (_, Level::L1) => config.clear_dirty(leaf),
            _ => config.without_write(config.clear_dirty(leaf)),
        }
    }

    /// Protect one leaf; what it was, if it changed. Others may change it meanwhile: each failure
    /// is their progress, and A, D and W change at most once each for every turn here.
    #[inline(always)]
    fn protect_leaf(
        &self,
        change: &Change<'_, F, H>,
        cell: &SpteCell,
        gfn: Gfn,
        level: Level,
    ) -> Option<Spte> {
        let mut old = cell.load();
        while old.is_leaf(level) {
            let new = self.protected(old, level);
            if new == old {
                return None;
            }
            match change.adjust(cell, old, new, gfn, level) {
                Ok(()) => return Some(old),
                Err(now) => old = now,
            }
        }
        None
    }

    /// Protect every leaf of `range`, which logging begins for (KVM rows 3.41, 3.42).
    #[doc(alias = "kvm_tdp_mmu_wrprot_slot")]
    pub(crate) fn protect(&mut self, actor: &mut Actor<H>, range: GfnRange) {
        self.sweep(actor, range, |_, _, _| {});
    }

    /// Bring the D bits of `range`, pages of `slot`, into its log.
    pub(crate) fn collect(
        &mut self,
        actor: &mut Actor<H>,
        range: GfnRange,
        (slot, log): (&Memslot, &DirtyLog),
    ) {
        self.sweep(actor, range, |base, level, dirty| {
            let pages = GfnRange::from_len(base, scan::PAGES.max(level.pages()));
            let inside = pages.intersection(slot.range());
            if level > Level::L1 {
                let first = inside.start.distance_from(slot.base_gfn);
                let _ = log.set_range(first..first + inside.len());
                return;
            }
            // The slot may begin inside the word.
            let skip = inside.start.distance_from(base);
            log.set_mask(inside.start.distance_from(slot.base_gfn), dirty >> skip);
        });
    }

    /// Protect every leaf of `range`, and tell of those that were dirty: first gfn and level of a
    /// huge leaf, or of a word of 64 entries and which of them.
    ///
    /// Owes no flush: whoever begins to log owes the whole range, and of what is told the bit is
    /// set, in this section; who takes the bit flushes before the page is read.
    fn sweep(
        &mut self,
        actor: &mut Actor<H>,
        range: GfnRange,
        mut dirty: impl FnMut(Gfn, Level, u64),
    ) {
        for index in self.mmu.changeable_roots() {
            let mut next = Some(Cursor::new(range, Level::L2));
            while let Some(cursor) = next {
                let work = actor.shared();
                let Some(root) = self.root(index) else { break };
                let section = work.section.epoch();
                let change = self.mmu.change(work.vm, work.stats, section, self.space);
                let level = root.role.level();
                let iter = TdpIter::resume(work.vm.pool(), section, root.frame, level, cursor)
                    .with_encryption(change.config.encryption_mask());
                next = slice::run(work.stats, iter, range, |found| {
                    self.sweep_found(&change, found, &mut dirty)
                });
                work.stats.inc(Counter::Yields);
            }
        }
    }

    fn sweep_found(
        &mut self,
        change: &Change<'_, F, H>,
        found: Found<'_>,
        dirty: &mut impl FnMut(Gfn, Level, u64),
    ) -> Visit {
        let step = match found {
            Found::Table(table) => {
                self.sweep_table(change, &table, dirty);
                return Visit::Done;
            }
            Found::Entry(step) => step,
        };
        self.report.entries += 1;
        if let Some(old) = self.protect_leaf(change, step.cell, step.gfn, step.level) {
            if change.config.is_dirty(old) {
                dirty(step.gfn, step.level, 0);
            }
        }
        Visit::LookAgain
    }

    fn sweep_table(
        &mut self,
        change: &Change<'_, F, H>,
        table: &LeafTable<'_>,
        dirty: &mut impl FnMut(Gfn, Level, u64),
    ) {
        self.report.entries += to_u64(table.count);
        let armed = match self.tracking {
            DirtyTracking::WriteProtect => F::WRITABLE,
            DirtyTracking::DirtyBit | DirtyTracking::HardwareLog => F::DIRTY,
        };
        let mut base = table.base;
        for (word, cells) in table.table.entries().chunks(scan::WORD).enumerate() {
            scan::fetch(table.next, word);
            let window = scan::window(word, table.first, table.first + table.count);
            let (_, todo) = scan::masks(cells, scan::PRESENT, armed);
            let todo = todo & window;
            if todo != 0 {
                self.sweep_word(change, cells, base, todo, dirty);
            }
            base = base.saturating_add(scan::PAGES);
        }
    }

    fn sweep_word(
        &mut self,
        change: &Change<'_, F, H>,
        cells: &[SpteCell],
        base: Gfn,
        todo: u64,
        dirty: &mut impl FnMut(Gfn, Level, u64),
    ) {
        let mut found = 0;
        for bit in Bits(todo) {
            let Some(cell) = cells.get(to_index(bit)) else { break };
            let gfn = base.saturating_add(bit);
            let old = self.protect_leaf(change, cell, gfn, Level::L1);
            found |= u64::from(old.is_some_and(|old| change.config.is_dirty(old))) << bit;
        }
        if found != 0 {
            dirty(base, Level::L1, found);
        }
    }
}
