//! Taking pages away from the guest.
//!
//! Owns [`TdpMmu::unmap`] (a range, for the host's invalidations and for slots; KVM rows 3.33 to
//! 3.35) and [`ZapReport`]. Zap-all is in [`crate::root`].
//!
//! Locking: no Exclusive. `unmap` announces the range, drains the Shared sections that were open,
//! then zaps under Shared in slices of at most [`SLICE_ENTRIES`] entries; faults in the range retry
//! until it has ended, faults elsewhere never wait. It flushes before it ends, also when it found
//! nothing but another invalidation was in progress: that one may have cleared an entry whose flush
//! is still on the way.

use mmu_core::addr::{GfnRange, Level};
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::frame::PageTable;
use mmu_core::notify::Invalidation;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteConfig, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::trace::Event;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::change::{Change, Taken};
use crate::iter::{Cursor, LeafTable, Step, TdpIter};
use crate::mmu::TdpMmu;
use crate::root::RootFilter;
use crate::scan::{self, Line};
use crate::slice::{self, Found, Visit};

pub use crate::slice::SLICE_ENTRIES;

/// What was taken out (8.4: a zap reports accessed and dirty bits instead of losing them).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct ZapReport {
    /// Leaves, by level: 4 KiB, 2 MiB, 1 GiB.
    pub leaves: [u64; 3],
    /// 4 KiB pages under leaves whose accessed bit was set.
    pub young: u64,
    /// 4 KiB pages under leaves whose dirty bit was set, or that were writable where hardware has
    /// no dirty bit.
    pub dirty: u64,
    /// Tables unlinked.
    pub tables: u64,
}

impl ZapReport {
    /// 4 KiB pages under all leaves.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let levels = self.leaves.iter().zip(Level::ALL);
        levels.map(|(count, level)| count * level.pages()).sum()
    }

    /// Count a leaf that was taken out.
    #[inline]
    pub(crate) fn add_leaf<F: SpteFormat>(
        &mut self,
        config: &SpteConfig<F>,
        spte: Spte,
        level: Level,
    ) {
        if let Some(count) = self.leaves.get_mut(level.slot()) {
            *count += 1;
        }
        if config.is_accessed(spte) {
            self.young += level.pages();
        }
        if config.is_dirty(spte) {
            self.dirty += level.pages();
        }
    }

    /// Count 4 KiB leaves that were taken out: one bit each in `gone`, in `young` and `dirty` too
    /// if they were that.
    #[inline]
    pub(crate) fn add_word(&mut self, gone: u64, young: u64, dirty: u64) {
        let count = |bits: u64| u64::from(bits.count_ones());
        self.add_small(count(gone), count(young), count(dirty));
    }

    /// Count 4 KiB leaves that were taken out, and how many of them were young and dirty.
    #[inline]
    pub(crate) fn add_small(&mut self, leaves: u64, young: u64, dirty: u64) {
        if let Some(count) = self.leaves.first_mut() {
            *count += leaves;
        }
        self.young += young;
        self.dirty += dirty;
    }

    /// Count the leaves of a level-1 table that nobody changes. Returns the number of its MMIO
    /// entries.
    pub(crate) fn add_table<F: SpteFormat>(
        &mut self,
        config: &SpteConfig<F>,
        table: &PageTable,
    ) -> u64 {
        let used = scan::PRESENT | F::ACCESSED | F::DIRTY;
        let (mut leaves, mut alike, mut mmio) = (0, 0, 0);
        for cells in table.entries().chunks(scan::LINE) {
            let line = Line::read(cells);
            if line.any & scan::PRESENT == 0 {
                if line.any != Spte::EMPTY.raw() {
                    mmio += count_mmio(config, cells);
                }
                continue;
            }
            // The usual entry was accessed and written.
            if line.all & used == used {
                alike += mmu_core::addr::to_u64(cells.len());
                continue;
            }
            if line.all & scan::PRESENT == 0 {
                mmio += count_mmio(config, cells);
            }
            for leaf in cells.iter().map(SpteCell::peek).filter(|spte| spte.is_mmu_present()) {
                leaves += 1;
                self.young += u64::from(config.is_accessed(leaf));
                self.dirty += u64::from(config.is_dirty(leaf));
            }
        }
        if let Some(count) = self.leaves.first_mut() {
            *count += leaves + alike;
        }
        self.young += alike;
        self.dirty += alike;
        mmio
    }

    /// Add another report.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.leaves.iter_mut().zip(other.leaves) {
            *mine += theirs;
        }
        self.young += other.young;
        self.dirty += other.dirty;
        self.tables += other.tables;
    }
}

/// Statistics of a table that is gone.
pub(crate) fn count_gone(stats: &StatsShard) {
    stats.sub(Counter::Tables, 1);
    stats.inc(Counter::TablesUnlinked);
}

/// MMIO entries of a cache line in which not all entries map something.
fn count_mmio<F: SpteFormat>(config: &SpteConfig<F>, cells: &[SpteCell]) -> u64 {
    mmu_core::addr::to_u64(cells.iter().filter(|cell| config.is_mmio(cell.peek())).count())
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Remove every mapping of `range` from every root, flushed: when this returns, no vCPU uses
    /// one, and no fault that resolved its page before the call installs one.
    ///
    /// Leaves that reach beyond the range go as a whole. Tables stay (KVM row 3.33). A mirror that
    /// cannot remove a page marks the VM dead; see [`remove`](Self::remove).
    #[doc(alias = "kvm_tdp_mmu_unmap_gfn_range")]
    pub fn unmap(&self, actor: &mut Actor<H>, range: GfnRange) -> ZapReport {
        let vm = self.vm();
        let invalidation = vm.invalidate(actor.participant(), range);
        let report = self.unmap_in(actor, &invalidation, range);
        drop(invalidation);
        report
    }

    /// The same inside an invalidation that the caller began, which must cover `range`: for a host
    /// that takes pages away and changes them in between.
    ///
    /// # Panics
    /// When `range` is not inside the invalidation's range, or the actor is another VM's.
    pub fn unmap_in(
        &self,
        actor: &mut Actor<H>,
        invalidation: &Invalidation<'_>,
        range: GfnRange,
    ) -> ZapReport {
        self.assert_own(actor);
        let covered = range.is_empty() || invalidation.range().covers(range);
        assert!(covered, "{range} is not inside the invalidation of {}", invalidation.range());
        self.vm().trace(|| Event::UnmapBegin { range });
        if let Some(external) = self.external() {
            let report = self.remove_or_die(actor, external, range);
            self.vm().trace(|| Event::UnmapEnd { range, pages: report.pages() });
            return report;
        }
        let mut report = ZapReport::default();
        let mut debt = FlushDebt::new();
        for index in self.changeable_roots() {
            self.zap_root_range(actor, index, range, &mut debt, &mut report);
        }
        pay_inside(actor, invalidation, range, debt);
        self.vm().trace(|| Event::UnmapEnd { range, pages: report.pages() });
        report
    }

    /// Zap one root's leaves in `range`, in slices.
    fn zap_root_range(
        &self,
        actor: &mut Actor<H>,
        index: usize,
        range: GfnRange,
        debt: &mut FlushDebt,
        report: &mut ZapReport,
    ) {
        let mut cursor = Cursor::new(range, Level::L2);
        loop {
            let work = actor.shared();
            // Invalid roots too: a vCPU may still run on one (KVM row 3.34).
            let skip = mmu_core::busted!("unmap_skips_invalid_roots");
            let filter = if skip { RootFilter::Valid } else { RootFilter::InUse };
            let Some(root) = self.roots().get(index, filter) else { return };
            let change = self.change(work.vm, work.stats, work.section.epoch(), root.role.space());
            let pool = work.vm.pool();
            let section = work.section.epoch();
            let iter = TdpIter::resume(pool, section, root.frame, root.role.level(), cursor)
                .with_encryption(self.config().encryption_mask());
            match zap_slice(&change, iter, range, debt, report) {
                Some(next) => cursor = next,
                None => return,
            }
            work.stats.inc(Counter::Yields);
        }
    }
}

/// Pay what an operation on `range` owes inside its invalidation; call after the last entry was
/// looked at. Another invalidation may have emptied or protected some of our entries, and its flush
/// may not be over: then `range` is owed whatever was found.
pub(crate) fn pay_inside<H: Host>(
    actor: &mut Actor<H>,
    invalidation: &Invalidation<'_>,
    range: GfnRange,
    mut debt: FlushDebt,
) {
    let others = invalidation.others_in_progress() && !mmu_core::busted!("empty_entries_trusted");
    if !range.is_empty() && others {
        actor.stats().inc(Counter::FlushOwed);
        debt.owe(range);
    }
    if !mmu_core::busted!("unmap_forgets_to_pay") {
        actor.pay(debt, FlushScope::Ranges);
    }
}

/// Zap until the walk ends (`None`) or a slice is full.
fn zap_slice<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    iter: TdpIter<'_, H>,
    range: GfnRange,
    debt: &mut FlushDebt,
    report: &mut ZapReport,
) -> Option<Cursor> {
    slice::run(change.stats, iter, range, |found| match found {
        Found::Table(table) => {
            zap_table(change, &table, debt, report);
            Visit::Done
        }
        Found::Entry(step) => {
            zap_step(change, &step, debt, report);
            Visit::LookAgain
        }
    })
}

/// Zap the leaves of a level-1 table that are inside the walk's range.
fn zap_table<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    table: &LeafTable<'_>,
    debt: &mut FlushDebt,
    report: &mut ZapReport,
) {
    let mut taken = Taken::new();
    let mut base = table.base;
    for (word, cells) in table.table.entries().chunks(scan::WORD).enumerate() {
        scan::fetch(table.next, word);
        let window = scan::window(word, table.first, table.first + table.count);
        if window != 0 {
            let (present, _) = scan::masks(cells, scan::PRESENT, 0);
            change.zap_word(cells, present & window, base, &mut taken, debt);
        }
        base = base.saturating_add(mmu_core::addr::to_u64(scan::WORD));
    }
    change.settle(taken, debt, report);
}

#[inline]
fn zap_step<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    step: &Step<'_>,
    debt: &mut FlushDebt,
    report: &mut ZapReport,
) {
    if let Some(old) = change.zap_leaf(step.cell, step.spte, step.gfn, step.level, debt) {
        report.add_leaf(change.config, old, step.level);
    }
}
