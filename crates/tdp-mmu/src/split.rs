//! Splitting a huge leaf into a table of smaller ones, in place (KVM rows 0.2.8, 3.27).
//!
//! No flush: both forms translate every gfn to the same place with the same permissions. The CPU
//! may set A or D in the huge leaf until the exchange succeeds; then the compare-exchange fails and
//! the next attempt carries the bit over to every child.

use mmu_core::addr::{Gfn, Level, Pfn};
use mmu_core::frame::MmuCache;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::traits::Host;

use crate::change::Change;
use crate::map::put_back;
use crate::mmu::TdpMmu;

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
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
        change.fill_split(table, old, level);
        pool.set_place(frame, gfn.align_down(level), below);
        if change.set(cell, old, self.config().table(frame, level), level).is_err() {
            // Frames in the cache hold nothing but the non-present value.
            table.fill(Spte::EMPTY);
            put_back(pool, cache, frame);
            return None;
        }
        change.account_split(gfn.align_down(level), below);
        Some(frame)
    }
}
