//! Changing memory attributes: [`TdpMmu::set_attributes`].
//!
//! The map and its protocol are [`mmu_core::attributes`]; what faults make of it is in `limits`.

use mmu_core::addr::GfnRange;
use mmu_core::attributes::{AttributeError, AttributeWriter, Attributes};
use mmu_core::spte::SpteFormat;
use mmu_core::trace::Event;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::mmu::TdpMmu;
use crate::zap::ZapReport;

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Give the pages of `range` exactly `attributes` (KVM row 3.55). When this returns, nothing
    /// that was mapped under other attributes is mapped in the range, flushed, and no fault that
    /// looked at others installs anything there. Nothing happens if the range has them already.
    ///
    /// Huge leaves that reach beyond the range go as a whole, and their other pages come back in
    /// the largest size that is still uniform; huge leaves elsewhere stay (KVM row 8.7).
    ///
    /// The host must convert the memory itself, if it does, before guests may rely on it: with
    /// private memory of its own kind, between an unmap and the call.
    ///
    /// For a VM with one MMU; with several, follow the protocol of
    /// [`mmu_core::attributes::table`] and unmap in each.
    ///
    /// # Errors
    /// [`AttributeError`]; nothing was changed or unmapped.
    ///
    /// # Panics
    /// When writer or actor are another VM's.
    #[doc(alias = "kvm_vm_set_mem_attributes")]
    pub fn set_attributes(
        &self,
        writer: &mut AttributeWriter,
        actor: &mut Actor<H>,
        range: GfnRange,
        attributes: Attributes,
    ) -> Result<ZapReport, AttributeError> {
        self.assert_own(actor);
        let Some(change) = writer.prepare(range, attributes)? else {
            return Ok(ZapReport::default());
        };
        let vm = self.vm();
        let invalidation = vm.invalidate(actor.participant(), range);
        let all = if mmu_core::busted!("attributes_without_unmap") { 0 } else { range.len() };
        let gone = GfnRange::from_len(range.start, all);
        let report = self.unmap_in(actor, &invalidation, gone);
        change.commit(actor.participant(), &invalidation);
        drop(invalidation);
        vm.trace(|| Event::AttributesSet { range, attributes });
        Ok(report)
    }
}
