//! Dropping everything, and what stood in memory that is gone.
//!
//! Adds to [`ShadowWriter`] the two halves of a zap-all (KVM row 3.36): the visible one makes every
//! page obsolete at once and costs a number and a reload; the deferred one takes them apart in
//! slices behind the vCPUs' backs. And to [`ShadowMmu`] what a slot's end asks for (row 3.37, bug
//! B82): leaves that map its frames, and shadows of tables that stood in them.

use mmu_core::addr::GfnRange;
use mmu_core::notify::Invalidation;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::mmu::ShadowMmu;
use crate::page::ShadowPage;
use crate::role::RoleFlags;
use crate::spte_ref::PageId;
use crate::writer::{ShadowWriter, Work, WriterLock};
use crate::zap::ShadowZap;

/// Pages taken apart before others have a turn.
const SLICE: u32 = 16;

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// Make every shadow page obsolete: no vCPU runs on one when this returns, faults make new
    /// ones. In constant time but for the vCPUs' leaving. Go on with
    /// [`zap_obsolete`](Self::zap_obsolete).
    #[doc(alias = "kvm_mmu_zap_all_fast")]
    pub fn invalidate_all(&mut self, actor: &mut Actor<H>) {
        // 64 bits do not come round (bug M11).
        self.generation += 1;
        self.work(actor, |work| work.owe_reload());
    }

    /// Take some obsolete pages apart. Are there more? A page that is still a vCPU's root goes when
    /// the vCPU loads another.
    #[must_use]
    pub fn zap_obsolete(&mut self, actor: &mut Actor<H>) -> bool {
        self.work(actor, |work| {
            let before = work.writer.stats.pages_zapped;
            // Orphans that go with a page count, too (bug B68).
            while work.writer.stats.pages_zapped - before < u64::from(SLICE) {
                let Some(id) = work.oldest_obsolete() else { return false };
                work.zap_page(id);
            }
            true
        })
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Those made first come first, so the search ends at the first page that is not obsolete or at
    /// one that cannot go: roots, of which there are few.
    fn oldest_obsolete(&self) -> Option<PageId> {
        let generation = self.writer.generation;
        let mut at = self.writer.pages.oldest();
        while let Some((id, page)) = at.and_then(|id| Some((id, self.writer.pages.get(id)?))) {
            if page.generation == generation {
                return None;
            }
            if !page.role.has(RoleFlags::INVALID) {
                return Some(id);
            }
            at = self.writer.pages.newer_than(id);
        }
        None
    }

    /// Take apart up to a slice of shadows of tables that stand in `range`. Were there more?
    fn zap_tables_in(&mut self, range: GfnRange) -> bool {
        let stands = |page: &ShadowPage| {
            range.contains(page.gfn) && page.shadows_a_table() && !page.role.has(RoleFlags::INVALID)
        };
        let mut gone = 0;
        let mut at = self.writer.pages.oldest();
        while let Some(id) = at {
            at = self.writer.pages.newer_than(id);
            if self.writer.pages.get(id).is_some_and(stands) {
                self.zap_page(id);
                gone += 1;
                // Others may have gone with it.
                at = at.filter(|next| self.writer.pages.get(*next).is_some());
            }
            if gone == SLICE {
                return true;
            }
        }
        false
    }
}

impl<F: SpteFormat, H: Host> ShadowMmu<F, H> {
    /// The memory of `range` is no memory any more: unmap it, and give up shadows of tables that
    /// stood in it. For the deletion or the move of a slot; call it where
    /// [`set_slot`](mmu_core::vm::VmCore::set_slot) asks for the old range to be zapped.
    pub fn forget_range<L: WriterLock<F, H>>(
        &self,
        actor: &mut Actor<H>,
        lock: &L,
        invalidation: &Invalidation<'_>,
        range: GfnRange,
    ) -> ShadowZap {
        let done = self.unmap_in(actor, lock, invalidation, range);
        while lock.with(|writer| writer.work(actor, |work| work.zap_tables_in(range))) {}
        done
    }
}
