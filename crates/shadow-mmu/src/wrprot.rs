//! Write protection of a guest frame: through its reverse maps.
//!
//! Adds to `Work` what protects the tables that have a shadow (KVM rows 4.26, 4.35) and pages
//! whose writes are logged, and to [`ShadowMmu`] the protection of a page that is tracked. A leaf
//! loses W and the right to have it back without asking; whatever it was before, the flush is owed
//! if it could write (row 0.2.1).

use mmu_core::addr::{Gfn, Level};
use mmu_core::notify::Invalidation;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::mmu::ShadowMmu;
use crate::rmap::{RmapKey, SPACES};
use crate::writer::{Work, WriterLock};

impl<F: SpteFormat, H: Host> ShadowMmu<F, H> {
    /// Take write access to `gfn` away from what shadow entries map, in every address space, and
    /// huge leaves over it; flushed when this returns. That somebody tracks the frame
    /// ([`PageTrack`](mmu_core::slot::PageTrack)), counted inside `invalidation`, keeps later
    /// faults from giving either again (KVM row 4.51).
    #[doc(alias = "kvm_mmu_slot_gfn_write_protect")]
    pub fn protect_in<L: WriterLock<F, H>>(
        &self,
        actor: &mut Actor<H>,
        lock: &L,
        invalidation: &Invalidation<'_>,
        gfn: Gfn,
    ) {
        debug_assert!(invalidation.range().contains(gfn), "the page was not invalidated");
        lock.with(|writer| {
            writer.work(actor, |work| {
                work.zap_huge_over(gfn);
                work.write_protect_everywhere(gfn);
                if invalidation.others_in_progress() {
                    // Another may have protected it; its flush may not be over.
                    work.owe(gfn, 1);
                }
            });
        });
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Take write access to a frame away from every entry of the address space.
    pub(crate) fn write_protect(&mut self, space: u16, gfn: Gfn) {
        for level in [Level::L1, Level::L2, Level::L3] {
            self.write_protect_list(RmapKey { space, level, gfn });
        }
    }

    /// The same in every address space: a table is one, whoever writes to it.
    pub(crate) fn write_protect_everywhere(&mut self, gfn: Gfn) {
        let spaces = if mmu_core::busted!("table_protected_in_one_space") { 1 } else { SPACES };
        (0..).take(spaces).for_each(|space| self.write_protect(space, gfn));
    }

    fn write_protect_list(&mut self, key: RmapKey) {
        let mut flush = false;
        // A list that is not changed can be walked by the writer while agers are on it.
        for spte in self.writer.rmap.entries(key) {
            let Some(cell) = self.cell(spte) else { return self.broken() };
            let config = self.config();
            let old = self.update(cell, key.level, |old| config.write_protected(old));
            flush |= old.is_some();
        }
        if flush {
            self.owe(key.gfn.align_down(key.level), key.level.pages());
        }
    }
}
