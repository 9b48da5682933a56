//! Huge leaves of nested guests that become rows of small ones before writes to them are logged.
//!
//! Adds to the writer what eager splitting takes (KVM row 4.57): memory, beforehand, for one split;
//! and to `Work` the split itself. The row is a direct page, found by gfn and role like any other,
//! so aliases share it. Where memory or the quota ends, huge leaves go instead and come back small
//! by faults.
//!
//! For a moment the entry is empty, and a CPU that comes by waits for the writer. Both forms
//! translate alike, so what TLBs have is flushed with the write protection that follows.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Level, to_u64};
use mmu_core::frame::MmuCache;
use mmu_core::spte::{LeafSpec, Spte, SpteFormat};
use mmu_core::sync::ENTRIES;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::error::ShadowError;
use crate::rmap::{MAX_ALIASES, RmapKey};
use crate::role::ChildShape;
use crate::spte_ref::SpteRef;
use crate::writer::{ShadowWriter, Work};

/// Levels of huge leaves, the larger first: its parts are split next.
const HUGE: [Level; 2] = [Level::L3, Level::L2];

/// A huge leaf that is to be split.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HugeLeaf {
    key: RmapKey,
    spte: SpteRef,
}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// A huge leaf over `gfn`, with the memory that splitting it takes; `None` if there is none, no
    /// memory, or hardly any quota left.
    pub(crate) fn splittable(
        &mut self,
        actor: &mut Actor<H>,
        space: u16,
        gfn: Gfn,
    ) -> Option<HugeLeaf> {
        let keys = HUGE.map(|level| RmapKey { space, level, gfn });
        let found = |key: RmapKey| self.rmap.first(key).map(|spte| HugeLeaf { key, spte });
        let leaf = keys.into_iter().find_map(found)?;
        let full = self.pages.live() >= self.quota.saturating_sub(1);
        (!full && self.reserve_split(actor, leaf.key).is_ok()).then_some(leaf)
    }

    fn reserve_split(&mut self, actor: &mut Actor<H>, key: RmapKey) -> Result<(), ShadowError> {
        actor.top_up(1)?;
        self.reserve_pages(1, key.space, core::iter::empty())?;
        let level = key.level.below();
        let first = key.gfn.align_down(key.level);
        for index in 0..ENTRIES {
            let gfn = first.saturating_add(to_u64(index) * level.pages());
            self.rmap.reserve(RmapKey { level, gfn, ..key })?;
        }
        // One for the link, too.
        Ok(self.reserve_links(u32::try_from(ENTRIES).unwrap_or(u32::MAX) + 1)?)
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Replace a huge leaf by a link to a row of smaller ones. Memory was reserved; `false` if a
    /// frame was not.
    pub(crate) fn split(&mut self, cache: &mut MmuCache, leaf: HugeLeaf) -> bool {
        let HugeLeaf { key, spte } = leaf;
        let (Some(cell), Some(parent)) = (self.cell(spte), self.writer.pages.get(spte.page()))
        else {
            self.broken();
            return false;
        };
        let access = parent.shadowed(spte.index()).access();
        let role = parent.role.child(spte.index(), access, ChildShape::Direct);
        let first = key.gfn.align_down(key.level);
        let row = match self.writer.pages.find(first, role, self.writer.generation) {
            Some(row) => row,
            None => match self.make_page(cache, first, role) {
                Ok(row) => row,
                Err(_) => return false,
            },
        };
        let _ = self.unlink_excess(row);
        let old = self.take(cell, key.level);
        if self.writer.rmap.remove(key, spte).is_err() {
            self.broken();
        }
        let level = key.level.below();
        for index in 0..ENTRIES {
            let offset = to_u64(index) * level.pages();
            let part = RmapKey { level, gfn: first.saturating_add(offset), ..key };
            let place = SpteRef::new(row, index);
            let Some(cell) = self.cell(place) else {
                self.broken();
                return false;
            };
            // What the row has already came by a fault, of the same page.
            let room = cell.peek().is_empty() && self.writer.rmap.len(part) < MAX_ALIASES;
            if room && self.writer.rmap.add(part, place).is_ok() {
                self.put(cell, self.part_of(old, access, level, offset), level);
            }
        }
        self.link(spte, row);
        self.writer.stats.splits += 1;
        true
    }

    /// The part of the huge leaf `old` that begins `offset` pages from its start. Made anew from
    /// what the guest permits, which a huge leaf may have been made without.
    fn part_of(&self, old: Spte, access: Access, level: Level, offset: u64) -> Spte {
        let config = self.config();
        let leaf = config.leaf(&LeafSpec {
            access,
            host_writable: config.is_host_writable(old),
            mmu_writable: config.is_mmu_writable(old),
            map_writable: config.is_writable(old),
            accessed: config.is_accessed(old),
            ..LeafSpec::new(config.pfn(old).saturating_add(offset), level)
        });
        config.keep_writes(old, config.keep_kind(old, leaf))
    }
}
