//! The one funnel: every store to an entry of a TDP tree goes through here.
//!
//! Owns [`Change`]: what a thread needs to change entries (configuration, its statistics) and the
//! only calls of the mutators of [`SpteCell`]. Each change is checked against the legality table
//! ([`SpteConfig::change_kind`], in debug builds and with feature `prove`), committed by one
//! compare-exchange, and accounted for only if that succeeded (KVM rows 3.8, 3.9).
//!
//! Who may write the same entry at the same moment, and why nothing is lost: `docs/LOCKING.md`.

use mmu_core::addr::{Gfn, GfnRange, Level, PAGE_SIZE, Pfn, to_index, to_u64};
use mmu_core::dead::DeadReason;
use mmu_core::epoch::EpochGuard;
use mmu_core::flush::FlushDebt;
use mmu_core::frame::{PageTable, TablePool};
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteConfig, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::sync::{ENTRIES, relax};
use mmu_core::trace::Event;
use mmu_core::traits::Host;
use mmu_core::vm::VmCore;

use arrayvec::ArrayVec;

use crate::dirty::DirtyTracking;
use crate::zap::ZapReport;

/// A thread's means to change entries.
#[derive(Debug)]
pub(crate) struct Change<'a, F: SpteFormat, H: Host> {
    pub(crate) config: &'a SpteConfig<F>,
    pub(crate) vm: &'a VmCore<H>,
    pub(crate) stats: &'a StatsShard,
    pub(crate) section: &'a EpochGuard<'a>,
    /// Address space of the tree.
    pub(crate) space: u16,
    pub(crate) tracking: DirtyTracking,
    /// The level that a fault would map at if it were no fetch: tables linked up to there are
    /// marked (KVM row 3.30).
    pub(crate) nx_wanted: Level,
}

/// Leaves taken out of a level-1 table and not accounted for yet.
#[derive(Debug)]
#[must_use]
pub(crate) struct Taken {
    report: ZapReport,
    /// Neighbours whose flush is not owed yet.
    run: GfnRange,
}

impl Taken {
    pub(crate) fn new() -> Self {
        let none = Gfn::new(0);
        Self { report: ZapReport::default(), run: GfnRange::new(none, none) }
    }
}

impl<'a, F: SpteFormat, H: Host> Change<'a, F, H> {
    /// Table frames.
    #[inline(always)]
    pub(crate) fn pool(&self) -> &'a TablePool<H> {
        self.vm.pool()
    }

    /// A dirty leaf went away. Where its D bit was the log, the log gets a mark instead; after the
    /// leaf was taken out, so that no harvest sees neither.
    #[inline(always)]
    pub(crate) fn keep_dirty(&self, gfn: Gfn, pages: u64) {
        if self.tracking == DirtyTracking::DirtyBit {
            self.mark_log(GfnRange::from_len(gfn, pages));
        }
    }

    #[cold]
    fn mark_log(&self, range: GfnRange) {
        let _ = self.vm.slots().read(self.section).mark_dirty(self.space, range);
    }

    /// Tell who wants to know; nothing is put together if nobody does.
    #[inline(always)]
    pub(crate) fn trace(&self, event: impl FnOnce() -> Event) {
        if H::ENABLED {
            self.vm.host().event(&event());
        }
    }

    /// Tell of a committed change of the entry that maps `gfn`.
    #[inline(always)]
    fn changed(&self, gfn: Gfn, level: Level, old: Spte, new: Spte) {
        self.trace(|| Event::Changed { gfn: gfn.align_down(level), level, old, new });
    }

    /// The compare-exchange that every change of a live entry is. Statistics are the caller's.
    #[inline(always)]
    fn exchange(
        &self,
        cell: &SpteCell,
        old: Spte,
        new: Spte,
        gfn: Gfn,
        level: Level,
    ) -> Result<(), Spte> {
        self.prove(old, new, level);
        let done = cell.try_change(old, new);
        if done.is_ok() {
            self.changed(gfn, level, old, new);
        }
        done
    }

    /// Replace `old` by `new` in the entry at `level` that maps `gfn`.
    ///
    /// # Errors
    /// What the entry holds instead: somebody else changed it; nothing was written or counted.
    #[inline(always)]
    pub(crate) fn set(
        &self,
        cell: &SpteCell,
        old: Spte,
        new: Spte,
        gfn: Gfn,
        level: Level,
    ) -> Result<(), Spte> {
        // INVARIANT[I4]: only `freeze` deals in FROZEN.
        debug_assert!(!old.is_frozen(), "FROZEN is replaced by its owner only (I4)");
        let done = self.exchange(cell, old, new, gfn, level);
        match done {
            Ok(()) => self.account(old, new, level),
            Err(_) => self.stats.inc(Counter::CasLost),
        }
        done
    }

    /// Put the leaf `new` in an entry for `gfn` that maps nothing; `false` when somebody else
    /// changed it.
    #[inline(always)]
    pub(crate) fn map(
        &self,
        cell: &SpteCell,
        old: Spte,
        new: Spte,
        gfn: Gfn,
        level: Level,
    ) -> bool {
        debug_assert!(!old.is_mmu_present() && new.is_leaf(level), "{old:?} to {new:?}");
        let done = self.exchange(cell, old, new, gfn, level).is_ok();
        self.stats.inc(if done { Counter::pages(level) } else { Counter::CasLost });
        if done && !old.is_empty() {
            self.account_mmio(old, new);
        }
        done
    }

    /// Change bits of a leaf that stays a leaf; as [`set`](Self::set), without statistics to keep.
    #[inline(always)]
    pub(crate) fn adjust(
        &self,
        cell: &SpteCell,
        old: Spte,
        new: Spte,
        gfn: Gfn,
        level: Level,
    ) -> Result<(), Spte> {
        debug_assert!(old.is_leaf(level) && new.is_leaf(level), "{old:?} to {new:?}");
        let done = self.exchange(cell, old, new, gfn, level);
        if done.is_err() {
            self.stats.inc(Counter::CasLost);
        }
        done
    }

    /// Take the entry `old` of a mirror for ourselves: until we [`release`](Self::release) it, it
    /// is FROZEN and nobody else changes it (KVM row 3.10).
    ///
    /// # Errors
    /// What the entry holds instead; nothing was written.
    pub(crate) fn claim(&self, cell: &SpteCell, old: Spte) -> Result<(), Spte> {
        // INVARIANT[I4]: who claims is the owner.
        debug_assert!(!old.is_frozen(), "FROZEN is replaced by its owner only (I4)");
        let done = cell.try_change(old, Spte::FROZEN);
        if done.is_err() {
            self.stats.inc(Counter::CasLost);
        }
        done
    }

    /// End a claim: the entry, which was `was`, becomes `new`, or `was` again.
    pub(crate) fn release(&self, cell: &SpteCell, was: Spte, new: Spte, gfn: Gfn, level: Level) {
        self.prove(was, new, level);
        let held = cell.exchange(new);
        debug_assert!(held.is_frozen(), "a claimed entry was changed (I4): {held:?}");
        if was != new {
            self.account(was, new, level);
            self.changed(gfn, level, was, new);
        }
    }

    /// Clear the accessed bit, or access-track. One attempt: a lost one means that the entry is in
    /// use or going away, and counts as young (KVM rows 5.4, 5.5).
    #[inline]
    pub(crate) fn age(&self, cell: &SpteCell, old: Spte, gfn: Gfn, level: Level) -> bool {
        // INVARIANT[I21]: only A, or the permissions that tracking gives back.
        let new = self.config.age(old);
        self.exchange(cell, old, new, gfn, level).is_ok()
    }

    /// Clear the accessed bit of a link. One attempt, as for [`age`](Self::age).
    #[inline]
    pub(crate) fn age_table(&self, cell: &SpteCell, old: Spte, gfn: Gfn, level: Level) -> bool {
        self.adjust_table(cell, old, self.config.age_table(old), gfn, level)
    }

    /// Change the accessed bit of a link, or write what it holds; `false` when somebody else
    /// changed it.
    #[inline]
    pub(crate) fn adjust_table(
        &self,
        cell: &SpteCell,
        old: Spte,
        new: Spte,
        gfn: Gfn,
        level: Level,
    ) -> bool {
        debug_assert!(old.is_table(level) && new.is_table(level), "{old:?} to {new:?}");
        self.prove(old, new, level);
        let done = cell.try_change(old, new).is_ok();
        if done && old != new {
            self.changed(gfn, level, old, new);
        }
        done
    }

    /// Fill the entries of a table that is not linked yet.
    pub(crate) fn fill_split(
        &self,
        config: &SpteConfig<F>,
        table: &PageTable,
        huge: Spte,
        level: Level,
    ) {
        let Some(below) = level.down() else { return };
        // They differ in their address, whose low bits the first has clear.
        let mut child = config.small_from_huge(huge, level, 0);
        let step = below.pages() * PAGE_SIZE;
        debug_assert!(
            config.small_from_huge(huge, level, ENTRIES - 1)
                == child.with(step * to_u64(ENTRIES - 1)),
            "{huge:?}"
        );
        for cell in table.entries() {
            cell.init(child);
            child = Spte::from_raw(child.raw().wrapping_add(step));
        }
    }

    /// Link the table in `frame` for `gfn` where `old` stands, in an entry at `level`.
    ///
    /// # Errors
    /// As [`set`](Self::set); the frame was not linked.
    pub(crate) fn link(
        &self,
        cell: &SpteCell,
        old: Spte,
        frame: Pfn,
        gfn: Gfn,
        level: Level,
    ) -> Result<(), Spte> {
        let gfn = gfn.align_down(level);
        self.pool().set_place(frame, gfn, level.below());
        let marked = level <= self.nx_wanted;
        if marked {
            // Before the link: whoever finds the table finds the mark.
            self.pool().mark(frame);
        }
        self.set(cell, old, self.config.table(frame, level), gfn, level)?;
        if marked {
            self.stats.inc(Counter::NxSplits);
        }
        Ok(())
    }

    /// Statistics of a committed change.
    #[inline]
    fn account(&self, old: Spte, new: Spte, level: Level) {
        let (was, is) = (old.is_mmu_present(), new.is_mmu_present());
        // No work for the usual hole.
        if (!was && !old.is_empty()) || (!is && !new.is_empty()) {
            self.account_mmio(old, new);
        }
        if !was && !is {
            return;
        }
        let (was_leaf, is_leaf) = (was && old.is_leaf(level), is && new.is_leaf(level));
        if was_leaf != is_leaf {
            let pages = Counter::pages(level);
            if is_leaf { self.stats.inc(pages) } else { self.stats.sub(pages, 1) }
        }
        let (was_table, is_table) = (was && !was_leaf, is && !is_leaf);
        if was_table != is_table {
            if is_table {
                self.stats.inc(Counter::Tables);
            } else {
                self.stats.sub(Counter::Tables, 1);
                self.stats.inc(Counter::TablesUnlinked);
            }
        }
    }

    /// The gauge of MMIO entries, after a change from or to something that maps nothing.
    #[cold]
    fn account_mmio(&self, old: Spte, new: Spte) {
        match (self.config.is_mmio(old), self.config.is_mmio(new)) {
            (false, true) => self.stats.inc(Counter::MmioSptes),
            (true, false) => self.stats.sub(Counter::MmioSptes, 1),
            _ => {}
        }
    }

    /// Account for the children that a split of the leaf at `gfn` made: they were never linked one
    /// by one.
    pub(crate) fn account_split(&self, gfn: Gfn, child_level: Level) {
        let children = mmu_core::addr::to_u64(mmu_core::sync::ENTRIES);
        self.stats.add(Counter::pages(child_level), children);
        self.stats.inc(Counter::Splits);
        self.trace(|| Event::Split { gfn, level: child_level.up().unwrap_or(Level::MAX_LEAF) });
    }

    #[inline]
    fn prove(&self, old: Spte, new: Spte, level: Level) {
        if cfg!(any(debug_assertions, feature = "prove")) {
            // INVARIANT[I3], INVARIANT[I5], INVARIANT[I6], INVARIANT[I7]: the legality table.
            let kind = self.config.change_kind(old, new, level);
            debug_assert!(kind.is_ok(), "illegal change at {level:?} (I3 to I7): {kind:?}");
            if kind.is_err() {
                // In production one VM goes, not its host.
                self.vm.mark_dead(DeadReason::IllegalChange);
            }
        }
    }

    /// Take a leaf out. Others may change its bits meanwhile, so this tries until the value taken
    /// out is the value seen; ends early when the entry stops being a leaf. Returns that value.
    pub(crate) fn zap_leaf(
        &self,
        cell: &SpteCell,
        mut old: Spte,
        gfn: Gfn,
        level: Level,
        debt: &mut FlushDebt,
    ) -> Option<Spte> {
        // Each failure means that another thread or the CPU changed the entry in between; a CPU
        // sets A and D once each, an ager clears A once, so this ends after a few turns.
        while old.is_leaf(level) {
            match self.set(cell, old, Spte::EMPTY, gfn, level) {
                Ok(()) => {
                    #[cfg(not(busted = "zap_without_flush"))]
                    self.owe(debt, GfnRange::from_len(gfn, level.pages()));
                    self.stats.inc(Counter::LeavesZapped);
                    if self.config.is_dirty(old) {
                        self.keep_dirty(gfn, level.pages());
                    }
                    return Some(old);
                }
                Err(current) => old = current,
            }
        }
        None
    }

    /// Take the leaves of a level-1 table out whose bits `present` has; `cells` are the entries and
    /// `base` is the gfn of the first. As [`zap_leaf`](Self::zap_leaf), but the table's statistics
    /// are kept in `taken` until [`settle`](Self::settle).
    pub(crate) fn zap_word(
        &self,
        cells: &[SpteCell],
        mut present: u64,
        base: Gfn,
        taken: &mut Taken,
        debt: &mut FlushDebt,
    ) {
        let (mut gone, mut young, mut dirty) = (0u64, 0u64, 0u64);
        while present != 0 {
            let bit = present.trailing_zeros();
            present &= present - 1;
            let Some(cell) = cells.get(to_index(u64::from(bit))) else { break };
            let mut old = cell.peek();
            // Bounded as in `zap_leaf`.
            while old.is_leaf(Level::L1) {
                self.prove(old, Spte::EMPTY, Level::L1);
                match cell.try_change(old, Spte::EMPTY) {
                    Ok(()) => {
                        let gfn = base.saturating_add(u64::from(bit));
                        self.changed(gfn, Level::L1, old, Spte::EMPTY);
                        gone |= 1 << bit;
                        young |= u64::from(self.config.is_accessed(old)) << bit;
                        dirty |= u64::from(self.config.is_dirty(old)) << bit;
                        break;
                    }
                    Err(current) => {
                        self.stats.inc(Counter::CasLost);
                        old = current;
                    }
                }
            }
        }
        taken.report.add_word(gone, young, dirty);
        if self.tracking == DirtyTracking::DirtyBit && dirty != 0 {
            self.keep_dirty_word(base, dirty);
        }
        while gone != 0 {
            let first = gone.trailing_zeros();
            let count = (gone >> first).trailing_ones();
            let start = base.saturating_add(u64::from(first));
            if taken.run.end != start {
                self.owe_run(taken, debt);
                taken.run.start = start;
            }
            taken.run.end = start.saturating_add(u64::from(count));
            // Shifted in two steps: together they may be all 64.
            gone &= (u64::MAX << first) << (count - 1) << 1;
        }
    }

    /// As [`keep_dirty`](Self::keep_dirty), for the pages of `dirty`.
    #[cold]
    fn keep_dirty_word(&self, base: Gfn, mut dirty: u64) {
        while dirty != 0 {
            self.keep_dirty(base.saturating_add(u64::from(dirty.trailing_zeros())), 1);
            dirty &= dirty - 1;
        }
    }

    /// Owe the flush of the leaves taken since the last time.
    fn owe_run(&self, taken: &mut Taken, debt: &mut FlushDebt) {
        let pages = taken.run.len();
        if pages != 0 && cfg!(not(busted = "zap_without_flush")) {
            self.owe_many(debt, taken.run, pages);
        }
        taken.run = GfnRange::new(taken.run.end, taken.run.end);
    }

    /// Account for what [`zap_word`](Self::zap_word) took from a table.
    pub(crate) fn settle(&self, mut taken: Taken, debt: &mut FlushDebt, report: &mut ZapReport) {
        self.owe_run(&mut taken, debt);
        let leaves: u64 = taken.report.leaves.iter().sum();
        if leaves != 0 {
            self.stats.sub(Counter::pages(Level::L1), leaves);
            self.stats.add(Counter::LeavesZapped, leaves);
            report.merge(&taken.report);
        }
    }

    /// Owe a flush for one change, counted.
    pub(crate) fn owe(&self, debt: &mut FlushDebt, range: GfnRange) {
        self.owe_many(debt, range, 1);
    }

    /// Owe a flush for `changes` in `range`, counted.
    pub(crate) fn owe_many(&self, debt: &mut FlushDebt, range: GfnRange, changes: u64) {
        self.stats.add(Counter::FlushOwed, changes);
        debt.owe_many(range, changes);
    }

    /// Freeze a table that was just unlinked, and everything under it, so that no fault that is
    /// still inside installs anything; count what was mapped and let `debt` carry the tables to
    /// their grace period (KVM row 3.7). `level` is the table's own.
    pub(crate) fn remove_table(
        &self,
        table: Pfn,
        level: Level,
        debt: &mut FlushDebt,
        report: &mut ZapReport,
    ) {
        let pool = self.pool();
        pool.note_unlinked();
        let mut stack: ArrayVec<(Pfn, Level, usize), 5> = ArrayVec::new();
        stack.push((table, level, 0));
        while let Some((frame, level, index)) = stack.pop() {
            let whole = level == Level::L1;
            if whole {
                self.freeze_leaves(frame, report);
            }
            let cells = pool.owned_table(frame).entries();
            let Some(cell) = cells.get(index).filter(|_| !whole) else {
                crate::nx::forget(pool, self.stats, frame);
                debt.owe_table(pool.map(), frame);
                continue;
            };
            stack.push((frame, level, index + 1));
            let old = freeze(cell);
            self.account(old, Spte::EMPTY, level);
            if H::ENABLED {
                let offset = to_u64(index).saturating_mul(level.pages());
                let gfn = pool.place(frame).0.saturating_add(offset);
                self.changed(gfn, level, old, Spte::FROZEN);
            }
            if old.is_leaf(level) {
                report.add_leaf(self.config, old, level);
                self.stats.inc(Counter::LeavesZapped);
                if self.tracking == DirtyTracking::DirtyBit && self.config.is_dirty(old) {
                    let (first, _) = pool.place(frame);
                    let offset = to_u64(index).saturating_mul(level.pages());
                    self.keep_dirty(first.saturating_add(offset), level.pages());
                }
            } else if let (true, Some(below)) = (old.is_table(level), level.down()) {
                stack.push((self.config.pfn(old), below, 0));
            }
        }
    }
}

impl<F: SpteFormat, H: Host> Change<'_, F, H> {
    /// Freeze a level-1 table that was unlinked, and count what was mapped, in one for all.
    fn freeze_leaves(&self, frame: Pfn, report: &mut ZapReport) {
        let pool = self.pool();
        let (mut leaves, mut young, mut dirty) = (0, 0, 0);
        for index in 0..ENTRIES {
            // Looked up for each entry: tests stand at these steps, and it costs next to nothing.
            let Some(cell) = pool.owned_table(frame).entries().get(index) else { break };
            let old = freeze(cell);
            let gfn = || pool.place(frame).0.saturating_add(to_u64(index));
            if H::ENABLED {
                self.changed(gfn(), Level::L1, old, Spte::FROZEN);
            }
            if !old.is_leaf(Level::L1) {
                self.account(old, Spte::EMPTY, Level::L1);
                continue;
            }
            leaves += 1;
            young += u64::from(self.config.is_accessed(old));
            if self.config.is_dirty(old) {
                dirty += 1;
                if self.tracking == DirtyTracking::DirtyBit {
                    self.keep_dirty(gfn(), 1);
                }
            }
        }
        self.stats.sub(Counter::pages(Level::L1), leaves);
        self.stats.add(Counter::LeavesZapped, leaves);
        report.add_small(leaves, young, dirty);
    }
}

/// Exchange FROZEN in until what comes out is not FROZEN: then the entry is ours (KVM row 1.4).
fn freeze(cell: &SpteCell) -> Spte {
    loop {
        let old = cell.exchange(Spte::FROZEN);
        if !old.is_frozen() {
            return old;
        }
        relax();
    }
}
