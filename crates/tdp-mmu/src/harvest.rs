//! A table that is taken apart: what stood in it.
//!
//! Owns [`harvest_table`] and [`Harvested`]. The table belongs to the caller (the tree of a claimed
//! root, see `root`): plain reads and stores, no section, no lock.

use mmu_core::addr::{Level, Pfn};
use mmu_core::frame::PageTable;
use mmu_core::spte::{Spte, SpteConfig, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};

use crate::zap::ZapReport;

/// What a harvest found in a table.
#[derive(Debug, Default)]
pub(crate) struct Harvested {
    pub(crate) report: ZapReport,
    /// MMIO entries.
    mmio: u64,
}

impl Harvested {
    /// Tell the statistics.
    pub(crate) fn count(&self, stats: &StatsShard) {
        for (level, leaves) in Level::ALL.into_iter().zip(self.report.leaves) {
            if leaves != 0 {
                stats.sub(Counter::pages(level), leaves);
                stats.add(Counter::LeavesZapped, leaves);
            }
        }
        if self.mmio != 0 {
            stats.sub(Counter::MmioSptes, self.mmio);
        }
    }
}

/// Count the leaves of a quiet table from entry `next` on, up to the first link, which is
/// returned.
pub(crate) fn harvest_table<F: SpteFormat>(
    config: &SpteConfig<F>,
    table: &PageTable,
    level: Level,
    next: usize,
    found: &mut Harvested,
) -> Option<(usize, Pfn)> {
    if level == Level::L1 {
        // Done in one go, and their link emptied; others may be resumed.
        found.mmio += found.report.add_table(config, table);
        return None;
    }
    for (index, cell) in table.entries().iter().enumerate().skip(next) {
        let spte = cell.peek();
        if !spte.is_mmu_present() {
            continue;
        }
        if !spte.is_leaf(level) {
            return Some((index, config.pfn(spte)));
        }
        found.report.add_leaf(config, spte, level);
        cell.init(Spte::EMPTY);
    }
    None
}
