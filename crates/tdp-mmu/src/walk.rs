//! Looking up entries without changing anything (KVM row 2.15).
//!
//! Owns [`Walk`] (the entry for a gfn and how the walk got there) and [`TdpMmu::lookup`]. Runs in an
//! epoch section only.

use arrayvec::ArrayVec;

use mmu_core::addr::{Gfn, Level};
use mmu_core::epoch::EpochGuard;
use mmu_core::frame::TablePool;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::iter::Step;
use crate::mmu::TdpMmu;
use crate::root::{RootFilter, RootRef};

/// The entries on the way to a gfn, from the root down; the last one is a leaf or not present.
pub type Walk = ArrayVec<(Level, Spte), 5>;

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// The entry that maps `gfn`, or the one that says it is not mapped. `None` when the walk met
    /// a root without tables (cannot happen) or `gfn` is out of reach.
    #[inline]
    pub(crate) fn last_step<'g>(
        &self,
        pool: &'g TablePool<H>,
        section: &'g EpochGuard<'_>,
        root: &RootRef,
        gfn: Gfn,
    ) -> Option<Step<'g>> {
        let mut level = root.role.level();
        let mut table = pool.table(section, root.frame);
        loop {
            let cell = table.cell(gfn, level);
            let spte = cell.load();
            if !spte.is_table(level) {
                return Some(Step { cell, spte, gfn: gfn.align_down(level), level });
            }
            table = pool.table(section, self.config().pfn(spte));
            level = level.down()?;
        }
    }

    /// What maps `gfn` in the tree of address space `space`: every entry from the root down.
    /// Empty when no root of that space exists.
    #[must_use]
    pub fn lookup(&self, actor: &mut Actor<H>, space: u8, gfn: Gfn) -> Walk {
        let work = actor.pinned();
        let role = self.role(space);
        let mut walk = Walk::new();
        let root = (0..self.roots().capacity())
            .filter_map(|index| self.roots().get(index, RootFilter::Valid))
            .find(|root| root.role == role);
        let Some(root) = root.filter(|_| gfn < self.config().max_gfn_exclusive()) else {
            return walk;
        };
        let mut level = root.role.level();
        let mut table = work.vm.pool().table(&work.section, root.frame);
        loop {
            let spte = table.cell(gfn, level).load();
            walk.push((level, spte));
            let Some(below) = level.down().filter(|_| spte.is_table(level)) else { return walk };
            table = work.vm.pool().table(&work.section, self.config().pfn(spte));
            level = below;
        }
    }
}
