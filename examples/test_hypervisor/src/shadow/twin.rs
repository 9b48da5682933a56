//! The same guest on tables that hardware nests: what the processor itself makes of the guest's own
//! tables, for suites to compare with.
//!
//! Owns [`Twin`]: direct tables over the same memory at the same addresses. Page faults of its
//! guests exit and are not delivered. No locks.

use alloc::sync::Arc;

use mmu_core::slot::{SlotLimits, SlotWriter};
use mmu_core::spte::SpteConfig;
use mmu_core::vm::VmCore;
use tdp_mmu::{TdpMmu, TdpOptions};

use super::ram::Ram;
use super::vm::slot;
use crate::guest::layout::{DATA_SLOT, LOW_SLOT};
use crate::host::BareHost;
use crate::lab::Lab;
use crate::vcpu::{BareVcpu, Mmu};
use crate::virt::{VcpuSetup, Virt};

/// Table frames.
const FRAMES: u64 = 512;

/// See the file's head.
pub struct Twin<V: Virt> {
    mmu: Arc<Mmu<V>>,
    _slots: SlotWriter,
}

impl<V: Virt> Twin<V> {
    /// Over this memory.
    pub fn new(lab: &Lab<V>, ram: &Ram) -> Self {
        let config = SpteConfig::new(lab.caps()).unwrap_or_else(|error| panic!("{error}"));
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let core = VmCore::new(BareHost::new(FRAMES), 4, limits, core::hint::spin_loop);
        let (core, mut slots) = core.unwrap_or_else(|error| panic!("{error}"));
        let mmu = TdpMmu::new(core, config, TdpOptions::default());
        let mut actor = mmu.vm().actor().unwrap_or_else(|error| panic!("{error}"));
        for (id, memory) in [(LOW_SLOT, &ram.low), (DATA_SLOT, &ram.data)] {
            let made = mmu.set_slot(&mut slots, &mut actor, &slot(id, memory));
            let _ = made.unwrap_or_else(|error| panic!("slot {id}: {error}"));
        }
        Self { mmu, _slots: slots }
    }

    /// A vCPU on the calling CPU.
    pub fn vcpu(&self) -> BareVcpu<V> {
        let setup = VcpuSetup { page_faults_exit: true, ..VcpuSetup::NESTED };
        BareVcpu::new(&self.mmu, 0, setup)
    }
}
