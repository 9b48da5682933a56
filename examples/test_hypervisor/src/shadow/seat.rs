//! A vCPU's place between the machine and the shadow tables: the way into a guest and out.
//!
//! Owns [`Seat`]. As `vcpu.rs` for direct tables: the vCPU announces itself at its gate, then asks
//! whether its root is still good, which takes no lock; the writer's holder may be waiting at that
//! gate, so roots are loaded before. No locks held while the guest runs; belongs to the CPU that
//! made it.

use alloc::sync::Arc;

use mmu_core::addr::{Hpa, Pfn};
use mmu_core::spte::SpteFormat;
use shadow_mmu::ShadowVcpu;

use super::vm::ShadowVm;
use crate::host::BareHost;
use crate::machine::memory::PAGE;
use crate::trouble::Trouble;
use crate::virt::{Exit, Root, Vcpu, VcpuSetup, Virt};

/// See the file's head.
pub struct Seat<V: Virt, F: SpteFormat> {
    /// The VM.
    pub vm: Arc<ShadowVm<F>>,
    /// The MMU's half.
    pub shadow: ShadowVcpu<F, BareHost>,
    /// The machine's half.
    pub machine: V::Vcpu,
    /// Its gate.
    id: usize,
    /// The machine has a root, and nobody has said since that roots have gone.
    loaded: bool,
}

impl<V: Virt, F: SpteFormat> Seat<V, F> {
    /// vCPU number `id` of the VM, on the calling CPU.
    ///
    /// # Panics
    /// When the VM or the machine has no room for one more.
    pub fn new(vm: &Arc<ShadowVm<F>>, id: usize, setup: VcpuSetup) -> Self {
        let shadow = ShadowVcpu::new(&vm.mmu).unwrap_or_else(|error| panic!("vCPU {id}: {error}"));
        let machine = V::vcpu(setup).unwrap_or_else(|error| panic!("vCPU {id}: {error}"));
        Self { vm: Arc::clone(vm), shadow, machine, id, loaded: false }
    }

    /// The guest's root is another, or the same was loaded again: the next entry asks for it.
    pub fn unload(&mut self) {
        self.loaded = false;
    }

    /// Run the guest until it exits once. `load` loads the root that the guest has chosen.
    pub fn enter(
        &mut self,
        load: &dyn Fn(&mut Self) -> Result<Hpa, Trouble>,
    ) -> Result<Exit, Trouble> {
        let vm = Arc::clone(&self.vm);
        let gates = &vm.mmu.vm().host().gates;
        loop {
            if !self.loaded {
                let frame = Pfn::new(load(self)?.get() / PAGE);
                let config = vm.mmu.config();
                let (levels, accessed_dirty) = (config.levels(), config.ad_enabled());
                self.machine.set_root(Root { frame, levels, accessed_dirty });
                self.loaded = true;
            }
            // The announcement first, then the question: `ShadowVcpu::root_is_current` says why.
            let stale = gates.enter(self.id);
            stale.into_iter().for_each(|what| self.machine.flush(what));
            if self.shadow.root_is_current() {
                let exit = self.machine.run();
                gates.leave(self.id);
                return Ok(exit);
            }
            gates.leave(self.id);
            self.loaded = false;
        }
    }
}

impl<V: Virt, F: SpteFormat> Drop for Seat<V, F> {
    fn drop(&mut self) {
        self.shadow.drop_roots(&self.vm.writer);
    }
}
