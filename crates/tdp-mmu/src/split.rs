//! Splitting a huge leaf into a table of smaller ones, in place (KVM rows 0.2.8, 3.27).
//!
//! No flush: both forms translate every gfn to the same place with the same permissions. The CPU
//! may set A or D in the huge leaf until the exchange succeeds; then the compare-exchange fails and
//! the next attempt carries the bit over to every child.

use mmu_core::addr::{Gfn, GfnRange, Level, Pfn, to_u64};
use mmu_core::frame::cache::FRAMES_PER_FAULT;
use mmu_core::frame::{MmuCache, OutOfFrames};
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::traits::Host;
use mmu_core::vm::{Actor, SharedWork};

use crate::change::Change;
use crate::iter::{Cursor, TdpIter};
use crate::map::put_back;
use crate::mmu::TdpMmu;
use crate::root::RootFilter;
use crate::slice::SLICE_ENTRIES;

/// How far a split came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct SplitReport {
    /// Huge leaves that were split, 1 GiB leaves and the 2 MiB leaves they became both counted.
    pub splits: u64,
    /// Frames ran out before all was split: what is left splits when it is written, or by another
    /// call. Nothing is half done.
    pub out_of_frames: Option<OutOfFrames>,
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Split every huge leaf that maps a page of `range` in address space `space`, down to 4 KiB
    /// (KVM row 3.28; 8.26). No flush is owed: each page stays mapped as it was. Faults go on
    /// meanwhile; with the range's goal level unchanged they may map huge pages again.
    #[doc(alias = "kvm_tdp_mmu_try_split_huge_pages")]
    pub fn split(&self, actor: &mut Actor<H>, space: u16, range: GfnRange) -> SplitReport {
        self.assert_own(actor);
        let mut report = SplitReport::default();
        for index in self.changeable_roots() {
            let mut next = Some(Cursor::new(range, Level::L2));
            while let Some(cursor) = next {
                if let Err(error) = actor.top_up(FRAMES_PER_FAULT) {
                    report.out_of_frames = Some(error);
                    return report;
                }
                next = self.split_slice(&mut actor.shared(), (index, space), cursor, &mut report);
            }
        }
        report
    }

    /// Split the next huge leaf, or pass over a slice without any. Where to go on.
    fn split_slice(
        &self,
        work: &mut SharedWork<'_, H>,
        (index, space): (usize, u16),
        cursor: Cursor,
        report: &mut SplitReport,
    ) -> Option<Cursor> {
        let root = self.roots().get(index, RootFilter::InUse)?;
        if root.role.space() != space {
            return None;
        }
        let SharedWork { section, cache, vm, stats, .. } = work;
        let change = self.change(vm, stats, section.epoch(), space);
        let level = root.role.level();
        let iter = TdpIter::resume(change.pool(), section.epoch(), root.frame, level, cursor)
            .with_encryption(change.config.encryption_mask());
        let mut visited = 0;
        for step in iter {
            let here = cursor.moved_to(step.gfn);
            if step.spte.is_leaf(step.level) {
                if visited != 0 {
                    // Filling a table is a slice of its own.
                    return Some(here);
                }
                let (cell, old) = (step.cell, step.spte);
                let child = self.split_leaf(&change, cache, cell, old, step.gfn, step.level);
                report.splits += u64::from(child.is_some());
                // To the same entry: its children may be huge, or somebody changed it.
                return Some(here);
            }
            // A link at level 2 leads to nothing that this walk counts, so it counts itself.
            let counts = step.level == Level::L2 || !step.spte.is_table(step.level);
            visited += usize::from(counts);
            stats.max(Counter::MaxSlice, to_u64(visited));
            if visited == SLICE_ENTRIES {
                return Some(cursor.moved_to(step.range().end));
            }
        }
        None
    }

    /// Replace the huge leaf `old` at `level` by a table of `ENTRIES` leaves one level lower.
    /// `None` when the entry changed meanwhile (look again) or no frame was topped up.
    pub(crate) fn split_leaf(
        &self,
        change: &Change<'_, F, H>,
        cache: &mut MmuCache,
        cell: &SpteCell,
        old: Spte,
        gfn: Gfn,
        level: Level,
    ) -> Option<Pfn> {
        let below = level.down()?;
        let frame = cache.take()?;
        let pool = change.pool();
        let table = pool.owned_table(frame);
        change.fill_split(self.making(), table, old, level);
        if change.link(cell, old, frame, gfn, level).is_err() {
            // Frames in the cache hold nothing but the non-present value.
            table.fill(Spte::EMPTY);
            put_back(pool, cache, frame);
            return None;
        }
        change.account_split(gfn.align_down(level), below);
        Some(frame)
    }
}
