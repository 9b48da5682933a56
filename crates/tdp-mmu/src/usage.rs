//! What the tables of a VM cost and what they map (KVM row 8.24).
//!
//! Owns [`TableUsage`], [`TdpMmu::usage`] for a whole VM and [`TdpMmu::usage_by_slot`]. Counted by
//! looking, in bounded sections (`sweep`): nothing is kept up to date for it on any fault. The
//! gauges of [`mmu_core::stats`] answer at once what they can.

use core::ops::ControlFlow;

use mmu_core::addr::{Gfn, GfnRange, Level, PAGE_SIZE, to_u64};
use mmu_core::slot::Memslot;
use mmu_core::spte::{SpteConfig, SpteFormat, SpteKind};
use mmu_core::sync::ENTRIES;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::iter::Step;
use crate::mmu::TdpMmu;
use crate::sweep::{SliceEnd, Sweep, Visit};

/// Tables and what they map, of a VM or of one memory slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableUsage {
    /// Tables by their level, roots included; index by [`Level::slot`].
    pub tables: [u64; 5],
    /// Entries in use by level: leaves, links and MMIO entries.
    pub used: [u64; 5],
    /// Leaves by level: 4 KiB, 2 MiB, 1 GiB.
    pub leaves: [u64; 3],
    /// 4 KiB pages that those leaves map (of a slot: inside it), by level.
    pub pages: [u64; 3],
    /// MMIO entries.
    pub mmio: u64,
    /// 4 KiB pages that the slot has, or all slots together.
    pub slot_pages: u64,
}

impl TableUsage {
    /// Bytes of the tables at `level`.
    #[must_use]
    pub fn table_bytes(&self, level: Level) -> u64 {
        self.tables.get(level.slot()).map_or(0, |tables| tables.saturating_mul(PAGE_SIZE))
    }

    /// Bytes of all tables.
    #[must_use]
    pub fn all_table_bytes(&self) -> u64 {
        Level::ALL.iter().map(|&level| self.table_bytes(level)).sum()
    }

    /// Bytes mapped by leaves at `level`; 0 above the levels where leaves stand.
    #[must_use]
    pub fn mapped_bytes(&self, level: Level) -> u64 {
        self.pages.get(level.slot()).map_or(0, |pages| pages.saturating_mul(PAGE_SIZE))
    }

    /// 4 KiB pages mapped.
    #[must_use]
    pub fn mapped_pages(&self) -> u64 {
        self.pages.iter().sum()
    }

    /// How much of the slots' memory is mapped, in parts per thousand, rounded down; 0 without
    /// slots. Trees of a pending zap-all count too, so 1000 is a bound that has to be kept.
    #[must_use]
    pub fn populated_per_mille(&self) -> u64 {
        per_mille(self.mapped_pages(), self.slot_pages)
    }

    /// How full the tables at `level` are, in parts per thousand, rounded down; 0 without tables.
    #[must_use]
    pub fn filled_per_mille(&self, level: Level) -> u64 {
        let at = |of: &[u64; 5]| of.get(level.slot()).copied().unwrap_or(0);
        per_mille(at(&self.used), at(&self.tables).saturating_mul(to_u64(ENTRIES)))
    }

    fn add<F: SpteFormat>(&mut self, config: &SpteConfig<F>, step: &Step<'_>, part: GfnRange) {
        let (spte, at) = (step.spte, step.level.slot());
        match config.kind(spte, step.level) {
            SpteKind::Leaf => {
                bump(&mut self.leaves, at, 1);
                bump(&mut self.pages, at, part.len());
            }
            SpteKind::Mmio => self.mmio += 1,
            SpteKind::Table => bump(&mut self.tables, at.saturating_sub(1), 1),
            SpteKind::Empty | SpteKind::Frozen | SpteKind::Corrupt => return,
        }
        bump(&mut self.used, at, 1);
    }
}

fn bump(counts: &mut [u64], at: usize, by: u64) {
    if let Some(count) = counts.get_mut(at) {
        *count += by;
    }
}

fn per_mille(part: u64, whole: u64) -> u64 {
    part.saturating_mul(1000).checked_div(whole).unwrap_or(0).min(1000)
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// What all trees of the VM cost and map, those of a pending zap-all included until no vCPU can
    /// use them. Takes time in proportion to the tables; exact when nobody changes them meanwhile.
    ///
    /// # Panics
    /// When the actor is another VM's.
    #[must_use]
    pub fn usage(&self, actor: &mut Actor<H>) -> TableUsage {
        let mut usage = self.usage_in(actor, None, GfnRange::ALL);
        let work = actor.pinned();
        usage.slot_pages = work.vm.slots().read(&work.section).total_pages();
        usage
    }

    /// The same for each memory slot, ascending by address space and gfn. A table that maps parts
    /// of several slots counts for each of them; so does a leaf, with the pages inside each.
    ///
    /// `visit` is called with no section open. Slots made or deleted meanwhile may be missed.
    ///
    /// # Panics
    /// When the actor is another VM's.
    pub fn usage_by_slot(
        &self,
        actor: &mut Actor<H>,
        mut visit: impl FnMut(&Memslot, &TableUsage),
    ) {
        let (mut space, mut from) = (0, Gfn::new(0));
        loop {
            let work = actor.pinned();
            let slots = work.vm.slots().read(&work.section);
            if space >= slots.address_spaces() {
                return;
            }
            let rest = GfnRange::new(from, GfnRange::ALL.end);
            let Some(slot) = slots.overlapping(space, rest).next().copied() else {
                (space, from) = (space + 1, Gfn::new(0));
                continue;
            };
            drop(work);
            from = slot.range().end;
            let mut usage = self.usage_in(actor, Some(space), slot.range());
            usage.slot_pages = slot.npages;
            visit(&slot, &usage);
        }
    }

    fn usage_in(&self, actor: &mut Actor<H>, space: Option<u16>, range: GfnRange) -> TableUsage {
        self.assert_own(actor);
        let mut usage = TableUsage::default();
        let mut sweep = Sweep::new(range, space);
        // Per level: entries before it have been counted. A sweep shows links again after a pause.
        let mut counted = [Gfn::new(0); 5];
        loop {
            let end = sweep.slice(self, actor, |root, visit| {
                match visit {
                    Visit::Root => {
                        bump(&mut usage.tables, root.role.level().slot(), 1);
                        counted = [Gfn::new(0); 5];
                    }
                    Visit::Entry(step, part) => {
                        let before = counted.get_mut(step.level.slot());
                        if let Some(before) = before.filter(|before| step.gfn >= **before) {
                            *before = step.range().end;
                            usage.add(self.config(), step, part);
                        }
                    }
                }
                ControlFlow::Continue(())
            });
            if end == SliceEnd::All {
                return usage;
            }
        }
    }
}
