//! A fault as those see it who watch: its events and the time it kept the vCPU from running (KVM
//! rows 3.60, 8.25). Not part of a VM whose embedder does not watch.

use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::latency::Wait;
use mmu_core::spte::SpteFormat;
use mmu_core::trace::Event;
use mmu_core::traits::Host;

use crate::vcpu::TdpVcpu;

impl<F: SpteFormat, H: Host> TdpVcpu<F, H> {
    /// [`fault`](Self::fault), told and measured.
    pub(crate) fn fault_watched(&mut self, fault: &PageFault) -> Result<FaultOutcome, FaultError> {
        let (gpa, code) = (fault.gpa, fault.code);
        let start = self.mmu.vm().now();
        self.mmu.vm().trace(|| Event::Fault { gpa, code });
        let result = self.fault_counted(fault);
        let wait = match result {
            Ok(FaultOutcome::Fixed) => Wait::FaultFixed,
            Ok(FaultOutcome::Spurious) => Wait::FaultSpurious,
            Ok(FaultOutcome::Retry) => Wait::FaultRetry,
            Ok(_) | Err(_) => Wait::FaultOther,
        };
        let index = self.actor.participant().index();
        self.mmu.vm().took(index, wait, start);
        self.mmu.vm().trace(|| Event::FaultEnd { gpa, result });
        result
    }
}
