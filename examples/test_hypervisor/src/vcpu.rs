//! A vCPU: the loop between the machine's and the MMU's half.
//!
//! Owns [`BareVcpu`]. What it does around an entry is the rest of what the crates ask of an
//! embedder (`host.rs`). It belongs to the CPU that made it. No locks.

use alloc::sync::Arc;
use alloc::vec::Vec;

use mmu_core::addr::Gfn;
use mmu_core::fault::FaultOutcome;
use tdp_mmu::{TdpMmu, TdpVcpu};

use crate::host::BareHost;
use crate::trouble::Trouble;
use crate::virt::{Exit, GuestState, HardwareLog, NestedFault, Root, Vcpu, VcpuSetup, Virt};

/// The MMU of machine `V`'s format.
pub type Mmu<V> = TdpMmu<<V as Virt>::Format, BareHost>;

/// A vCPU of machine `V`.
pub struct BareVcpu<V: Virt> {
    mmu: Arc<Mmu<V>>,
    /// Its gate.
    id: usize,
    tdp: TdpVcpu<V::Format, BareHost>,
    machine: V::Vcpu,
    logs: bool,
    loaded: bool,
    /// Nested faults handled, by outcome: fixed, spurious, to be retried.
    pub faults: [u64; 3],
}

impl<V: Virt> BareVcpu<V> {
    /// vCPU number `id` of the VM, on the calling CPU.
    ///
    /// # Panics
    /// When the VM or the machine has no room for one more.
    pub fn new(mmu: &Arc<Mmu<V>>, id: usize, setup: VcpuSetup) -> Self {
        let tdp = TdpVcpu::new(mmu, 0).unwrap_or_else(|error| panic!("vCPU {id}: {error}"));
        let machine = V::vcpu(setup).unwrap_or_else(|error| panic!("vCPU {id}: {error}"));
        let logs = setup.log == HardwareLog::On;
        Self { mmu: Arc::clone(mmu), id, tdp, machine, logs, loaded: false, faults: [0; 3] }
    }

    /// The guest's registers.
    pub fn state(&mut self) -> &mut GuestState {
        self.machine.state()
    }

    /// The machine's half.
    pub fn machine(&mut self) -> &mut V::Vcpu {
        &mut self.machine
    }

    /// The MMU's half.
    pub fn tdp(&mut self) -> &mut TdpVcpu<V::Format, BareHost> {
        &mut self.tdp
    }

    /// Run the guest until it exits once.
    pub fn enter(&mut self) -> Result<Exit, Trouble> {
        let mmu = Arc::clone(&self.mmu);
        let gates = &mmu.vm().host().gates;
        loop {
            // The announcement first, then the question: `TdpVcpu::root_is_current` says why.
            let stale = gates.enter(self.id);
            stale.into_iter().for_each(|what| self.machine.flush(what));
            if self.loaded && self.tdp.root_is_current() {
                let exit = self.machine.run();
                let logged = self.take_log();
                gates.leave(self.id);
                return logged.map(|()| exit);
            }
            gates.leave(self.id);
            let frame = self.tdp.load_root().map_err(Trouble::Root)?;
            let config = mmu.config();
            let (levels, accessed_dirty) = (config.levels(), config.ad_enabled());
            self.machine.set_root(Root { frame, levels, accessed_dirty });
            self.loaded = true;
        }
    }

    /// Hand over what hardware logged, before this vCPU is seen to have left.
    fn take_log(&mut self) -> Result<(), Trouble> {
        if !self.logs {
            return Ok(());
        }
        let mut pages: Vec<Gfn> = Vec::new();
        self.machine.take_log(&mut |page| pages.push(page));
        self.tdp.log_hardware(pages).map(drop).map_err(|error| Trouble::Log(error.full))
    }

    /// Let the MMU handle a nested fault; what came of it, if the guest cannot simply go on.
    pub fn handle(&mut self, fault: &NestedFault) -> Result<Option<FaultOutcome>, Trouble> {
        let outcome = self.tdp.fault(&fault.page_fault());
        let count = match outcome.map_err(|error| Trouble::Fault(*fault, error))? {
            FaultOutcome::Fixed => 0,
            FaultOutcome::Spurious => 1,
            FaultOutcome::Retry => 2,
            other => return Ok(Some(other)),
        };
        self.faults[count] += 1;
        Ok(None)
    }
}
