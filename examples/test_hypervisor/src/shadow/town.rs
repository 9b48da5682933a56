//! Where crowds work on shadow tables: a VM, and an address space for each vCPU or one for all.
//!
//! Owns [`Town`]; [`L1`] is another such place, for the guests of another hypervisor. No locks.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::marker::PhantomData;

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::spte::Legacy;
use mmu_core::vm::Actor;

use super::l1::L1;
use super::nested::NestedCpu;
use super::vcpu::ShadowCpu;
use super::vm::ShadowVm;
use crate::crowd::Place;
use crate::guest::system::Space;
use crate::host::BareHost;
use crate::lab::Lab;
use crate::machine::memory::{Memory, PAGE};
use crate::virt::{Features, Virt};

/// A VM without nested tables and its guests' address spaces.
pub struct Town<V> {
    /// The VM.
    pub vm: Arc<ShadowVm<Legacy>>,
    /// vCPU n is in the n-th, in turn.
    pub spaces: Vec<Space>,
    features: Features,
    machine: PhantomData<fn() -> V>,
}

impl<V: Virt> Town<V> {
    /// With `mib` MiB of data, which each of `spaces` address spaces maps in pages of `level`.
    pub fn new(lab: &Lab<V>, mib: u64, level: Level, spaces: usize) -> Self {
        let vm = ShadowVm::new(lab.shadow_caps(), mib << 20);
        let spaces = (0..spaces).map(|_| Space::with_data(&vm.ram, level)).collect();
        Self { vm, spaces, features: lab.features, machine: PhantomData }
    }

    /// The space that vCPU `id` is in.
    pub fn space(&self, id: usize) -> Space {
        self.spaces[id % self.spaces.len()]
    }

    /// vCPU number `id` on the calling CPU.
    pub fn vcpu(&self, id: usize) -> ShadowCpu<V> {
        ShadowCpu::in_space(&self.vm, id, &self.features, self.space(id).tree.root)
    }
}

/// Pages `first` and following of the data, where the guest's physical memory has them.
pub fn pages(data: &Memory, first: u64, count: u64) -> GfnRange {
    GfnRange::from_len(Gfn::new(data.start() / PAGE + first), count)
}

impl<V: Virt> Place for Town<V> {
    type Vcpu = ShadowCpu<V>;

    fn member(&self, id: usize) -> ShadowCpu<V> {
        self.vcpu(id)
    }

    fn handle(&self) -> Actor<BareHost> {
        self.vm.actor()
    }

    fn memory(&self) -> &Memory {
        &self.vm.ram.data
    }
}

impl<V: Virt> Place for L1<V> {
    type Vcpu = NestedCpu<V>;

    fn member(&self, id: usize) -> NestedCpu<V> {
        self.vcpu(id)
    }

    fn handle(&self) -> Actor<BareHost> {
        self.vm.actor()
    }

    fn memory(&self) -> &Memory {
        &self.vm.ram.data
    }
}
