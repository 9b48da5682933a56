//! A vCPU whose guest belongs to another hypervisor: its nested tables are shadowed, and hardware
//! walks the shadow.
//!
//! Owns [`NestedCpu`]. The other hypervisor (L1) is played by a suite, which writes tables of the
//! machine's own format into guest memory; its guest (L2) runs here. A nested fault that L1's
//! tables account for goes to L1, as [`Exit::Nested`] in the words of its processor; of the others
//! the MMU makes entries. Belongs to the CPU that made it. No locks but the writer's.

use alloc::sync::Arc;

use mmu_core::access::Access;
use mmu_core::addr::{Gpa, Level};
use mmu_core::fault::FaultOutcome;
use shadow_mmu::guest::{
    EptCpu, GuestControls, NestedError, NestedReport, NestedRequest, NestedWalker, Operation,
    Purpose,
};

use super::paging::guest_cpu;
use super::seat::Seat;
use super::vm::ShadowVm;
use crate::runner::{Progress, Runner};
use crate::trouble::Trouble;
use crate::virt::{
    Exit, Features, GuestState, LocalFlush, NestedFault, RawFault, Stage, Vcpu, VcpuSetup, Virt,
};

/// A walker for the tables that L1 makes on machine `V`: four levels, with accessed and dirty bits
/// where the processor has them.
pub fn walker<V: Virt>(features: &Features) -> NestedWalker {
    let made = if V::WORD == "npt" {
        NestedWalker::npt(&guest_cpu(features.phys_bits), GuestControls::LONG)
    } else {
        let cpu = EptCpu {
            max_phys_bits: features.phys_bits,
            exec_only: features.exec_only,
            huge_1g: features.huge_1g,
            accessed_dirty: features.accessed_dirty,
            ..EptCpu::baseline()
        };
        NestedWalker::ept(Level::L4, &cpu)
    };
    made.unwrap_or_else(|error| panic!("{error}"))
}

/// See the file's head.
pub struct NestedCpu<V: Virt> {
    /// Its place.
    pub seat: Seat<V, V::Format>,
    /// Faults of the MMU's: fixed, spurious, to be retried.
    pub counts: [u64; 3],
    /// Faults that L1 was told of.
    pub reflected: u64,
    walker: NestedWalker,
    root: u64,
}

impl<V: Virt> NestedCpu<V> {
    /// vCPU number `id` of the VM on the calling CPU, for an L2 on the tables at `root`.
    pub fn new(vm: &Arc<ShadowVm<V::Format>>, id: usize, features: &Features, root: u64) -> Self {
        let seat = Seat::new(vm, id, VcpuSetup::NESTED);
        let walker = walker::<V>(features);
        Self { seat, counts: [0; 3], reflected: 0, walker, root }
    }

    /// L1 enters L2 with these registers.
    pub fn start(&mut self, state: GuestState) {
        *self.seat.machine.state() = state;
    }

    /// L1 enters L2 on other tables, or on the same after a flush.
    pub fn set_root(&mut self, root: u64) {
        self.root = root;
        self.seat.unload();
    }

    /// L1 executed INVEPT, or flushed L2's ASID.
    pub fn flush(&mut self) {
        let Self { seat: Seat { vm, shadow, machine, .. }, walker, .. } = self;
        shadow.nested_flushed(&vm.writer, walker, &*vm.ram);
        machine.flush(LocalFlush::Context);
    }

    /// Run L2 until it exits once.
    pub fn enter(&mut self) -> Result<Exit, Trouble> {
        let (walker, root) = (self.walker, self.root);
        self.seat.enter(&|seat| {
            let vm = Arc::clone(&seat.vm);
            let loaded = seat.shadow.load_nested_root(&vm.writer, &walker, &*vm.ram, root, 0);
            loaded.map_err(|error| Trouble::Shadow(0, error))
        })
    }

    fn nested_fault(&mut self, fault: NestedFault) -> Result<Progress, Trouble> {
        let Some(request) = request_of(&fault) else {
            return Err(Trouble::Exit(Exit::Nested(fault), self.seat.machine.state().rip));
        };
        let Self { seat: Seat { vm, shadow, .. }, walker, .. } = self;
        let walk = match walker.walk(&*vm.ram, self.root, fault.gpa, request) {
            Ok(walk) => walk,
            Err(NestedError::Fault(own)) => return Ok(self.reflect(fault, own.gpa, own.report)),
            Err(NestedError::Contended { .. }) => return Ok(Progress::On),
        };
        let outcome = shadow.nested_fault(&vm.writer, walker, &*vm.ram, &walk, request);
        let address = fault.gpa.get();
        let count = match outcome.map_err(|error| Trouble::Shadow(address, error))? {
            FaultOutcome::Fixed => 0,
            FaultOutcome::Spurious => 1,
            FaultOutcome::Retry => 2,
            other => return Ok(Progress::Refused(other, Trouble::Outcome(fault, other))),
        };
        self.counts[count] += 1;
        Ok(Progress::On)
    }

    /// L1 gets the fault, which it need not flush any more.
    fn reflect(&mut self, fault: NestedFault, gpa: Gpa, report: NestedReport) -> Progress {
        let Self { seat: Seat { vm, shadow, machine, .. }, walker, .. } = self;
        shadow.nested_invalidated(&vm.writer, walker, &*vm.ram, gpa);
        machine.flush(LocalFlush::Context);
        self.reflected += 1;
        let raw = match report {
            NestedReport::Npf(info) => RawFault::Npf(info),
            NestedReport::EptViolation(qualification) => RawFault::Violation(qualification),
            NestedReport::EptMisconfig => RawFault::Misconfiguration,
            NestedReport::LogFull => return Progress::Stopped(Exit::LogFull),
        };
        Progress::Stopped(Exit::Nested(NestedFault { gpa, raw, ..fault }))
    }
}

/// What was walked for; `None` if hardware does not say.
fn request_of(fault: &NestedFault) -> Option<NestedRequest> {
    let operation = match fault.access() {
        Access::READ => Operation::Read,
        Access::WRITE => Operation::Write,
        Access::EXEC => Operation::Fetch,
        _ => return None,
    };
    let purpose = match fault.stage() {
        // What L2's own tables permit is asked for by advanced exit information only.
        Stage::Final => Purpose::Final(Access::ALL),
        Stage::GuestTable => Purpose::Table,
        Stage::Unknown => return None,
    };
    Some(NestedRequest { operation, purpose })
}

impl<V: Virt> Runner for NestedCpu<V> {
    fn registers(&mut self) -> &mut GuestState {
        self.seat.machine.state()
    }

    fn proceed(&mut self) -> Result<Progress, Trouble> {
        match self.enter()? {
            Exit::Nested(fault) => self.nested_fault(fault),
            Exit::Interrupt => Ok(Progress::Interrupted),
            exit => Ok(Progress::Stopped(exit)),
        }
    }

    fn faults(&self) -> [u64; 3] {
        self.counts
    }
}
