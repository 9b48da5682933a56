//! Guest memory that comes and goes: every MMU of the VM lets go of it.
//!
//! Adds to [`Vm`]: changes of slots, unmapping, zap-all and the end (KVM rows 3.34 to 3.37, 6.6).
//! One invalidation covers both MMUs, so that neither maps again what the other still has to let go
//! of. Locks: as in `docs/LOCKING.md`; the shadow MMU's writer is taken a slice at a time.

use core::ops::Range;

use mmu_core::addr::GfnRange;
use mmu_core::notify::Invalidation;
use mmu_core::slot::{Memslot, SlotChange, SlotError, SlotRequest, SlotWriter};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;
use shadow_mmu::{ShadowZap, WriterLock};
use tdp_mmu::ZapReport;

use crate::vm::{Shadow, Vm};

/// What was unmapped, of each kind of table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Unmapped {
    /// Of direct tables.
    pub direct: ZapReport,
    /// Of shadow tables.
    pub shadow: ShadowZap,
}

impl<F: SpteFormat, H: Host, L: WriterLock<F, H>> Vm<F, H, L> {
    /// Create, delete, move or change a memory slot; what any MMU had mapped of a slot that goes
    /// away is gone, flushed, when this returns, and shadows of tables that stood in it with it.
    /// Where logging begins, no write goes unlogged any more. `pages` of the slot, counted from its
    /// first, are logged; `None`: all.
    ///
    /// # Errors
    /// [`SlotError`] names the rule and the values; nothing changed.
    pub fn set_slot(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
        request: &SlotRequest,
        pages: Option<Range<u64>>,
    ) -> Result<SlotChange, SlotError> {
        let forget = |actor: &mut Actor<H>, old: &Memslot| self.forget_slot(actor, old);
        let change = match (self.tdp(), pages) {
            (Some(direct), pages) => {
                direct.set_slot_beside(writer, actor, request, pages, forget)?.change
            }
            (None, None) => self.core().set_slot(writer, actor, request, forget)?,
            (None, Some(pages)) => {
                self.core().set_slot_logging(writer, actor, request, pages, forget)?
            }
        };
        if let (Some(Shadow { mmu, lock }), SlotChange::Flags { old, new }) =
            (self.shadow(), &change)
        {
            if new.logs_dirty() {
                mmu.log_enabled(actor, lock, new);
            } else if old.logs_dirty() {
                mmu.log_disabled(actor, lock, new);
            }
        }
        Ok(change)
    }

    fn forget_slot(&self, actor: &mut Actor<H>, old: &Memslot) {
        let Some(Shadow { mmu, lock }) = self.shadow() else { return };
        if mmu_core::busted!("slot_end_forgets_the_shadow") {
            return;
        }
        let range = old.range();
        let invalidation = self.core().invalidate(actor.participant(), range);
        let _ = mmu.forget_range(actor, lock, &invalidation, range);
    }

    /// The host takes the pages of `range` back, as a call of its own: begin an invalidation, and
    /// [`unmap_in`](Self::unmap_in).
    pub fn unmap(&self, actor: &mut Actor<H>, range: GfnRange) -> Unmapped {
        let invalidation = self.core().invalidate(actor.participant(), range);
        self.unmap_in(actor, &invalidation, range)
    }

    /// Unmap the guest frames of `range`, which `invalidation` covers, from every MMU, in every
    /// address space; flushed when this returns.
    #[doc(alias = "kvm_unmap_gfn_range")]
    pub fn unmap_in(
        &self,
        actor: &mut Actor<H>,
        invalidation: &Invalidation<'_>,
        range: GfnRange,
    ) -> Unmapped {
        let mut gone = Unmapped::default();
        if let Some(direct) = self.tdp() {
            gone.direct = direct.unmap_in(actor, invalidation, range);
        }
        if let Some(Shadow { mmu, lock }) = self.shadow() {
            gone.shadow = mmu.unmap_in(actor, lock, invalidation, range);
        }
        gone
    }

    /// Drop everything: no vCPU runs on a table of before once both MMUs are marked; what they are
    /// made of is given back in slices behind the vCPUs' backs (KVM row 3.36).
    #[doc(alias = "kvm_mmu_zap_all_fast")]
    pub fn zap_all(&self, actor: &mut Actor<H>) -> ZapReport {
        let direct = self.tdp().map(|direct| direct.invalidate_roots(actor));
        if let Some(Shadow { lock, .. }) = self.shadow() {
            lock.with(|writer| writer.invalidate_all(actor));
            while lock.with(|writer| writer.zap_obsolete(actor)) {}
        }
        direct.map(|zap| zap.finish(actor)).unwrap_or_default()
    }

    /// Give everything back: for the end of a VM, when no [`Vcpu`](crate::vcpu::Vcpu) of it exists
    /// any more (KVM rows 3.5, 3.6).
    pub fn destroy(&self, actor: &mut Actor<H>) -> ZapReport {
        let shadow = self.shadow();
        if let Some(Shadow { lock, .. }) = shadow {
            lock.with(|writer| writer.invalidate_all(actor));
            while lock.with(|writer| writer.zap_obsolete(actor)) {}
        }
        self.tdp().map(|direct| direct.destroy(actor)).unwrap_or_default()
    }
}
