//! A vCPU without nested tables: the processor walks shadows of the guest's own.
//!
//! Owns [`ShadowCpu`]. Page faults come to the host first: the guest's tables are walked, which
//! says whose the fault is. The guest's own are injected; of the others the MMU makes entries, or
//! says that a table of the guest's was written to, which is emulated. Writes of control registers
//! and INVLPG say what the guest flushes. Belongs to the CPU that made it. No locks but the
//! writer's, by way of the MMU.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use mmu_core::access::PfErrorCode;
use mmu_core::addr::{Gfn, Gpa, Gva};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::Legacy;
use shadow_mmu::guest::{GuestCpu, GuestFault, WalkError};
use shadow_mmu::{OnWriteProtected, WriteRetry, WriterLock};

use super::emulate::Store;
use super::paging::{Paging, guest_cpu};
use super::seat::Seat;
use super::vm::ShadowVm;
use crate::guest::system::{self, Ring};
use crate::runner::{Progress, Runner};
use crate::trouble::Trouble;
use crate::virt::state::gpr::RDI;
use crate::virt::{
    Exit, Features, GuestPageFault, GuestState, HardwareLog, LocalFlush, Translation, Vcpu,
    VcpuSetup, Virt,
};

/// Length of INVLPG of an address in a register, and of a write of a control register.
const LENGTH: u64 = 3;
/// Longest instruction.
const LONGEST: usize = 15;

/// What a vCPU had to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowCounts {
    /// Faults of the MMU's: fixed, spurious, to be retried.
    pub faults: [u64; 3],
    /// Faults of the guest's own, injected.
    pub injected: u64,
    /// Writes to tables that were emulated, and those for which a shadow was given up.
    pub emulated: u64,
    /// See [`emulated`](Self::emulated).
    pub given_up: u64,
}

/// See the file's head.
pub struct ShadowCpu<V: Virt> {
    /// Its place.
    pub seat: Seat<V, Legacy>,
    /// What it had to do.
    pub counts: ShadowCounts,
    cpu: GuestCpu,
    paging: Option<Paging>,
    retry: WriteRetry,
}

impl<V: Virt> ShadowCpu<V> {
    /// vCPU number `id` of the VM on the calling CPU.
    pub fn new(vm: &Arc<ShadowVm<Legacy>>, id: usize, features: &Features) -> Self {
        let (translation, log) = (Translation::Shadow, HardwareLog::Off);
        let setup = VcpuSetup { translation, log, page_faults_exit: true };
        let seat = Seat::new(vm, id, setup);
        let cpu = guest_cpu(features.phys_bits);
        let (counts, retry) = (ShadowCounts::default(), WriteRetry::new());
        Self { seat, counts, cpu, paging: None, retry }
    }

    /// The same, about to run as the supervisor of the space at `root`.
    pub fn in_space(vm: &Arc<ShadowVm<Legacy>>, id: usize, features: &Features, root: u64) -> Self {
        let mut vcpu = Self::new(vm, id, features);
        vcpu.start(system::registers(id, root, Ring::Supervisor));
        vcpu
    }

    /// Begin with these registers.
    pub fn start(&mut self, state: GuestState) {
        *self.seat.machine.state() = state;
        self.paging = None;
        self.seat.unload();
    }

    /// Go on with these registers, whose control registers are as they were: nothing is flushed.
    pub fn resume(&mut self, state: GuestState) {
        let now = self.seat.machine.state();
        let same =
            (now.cr0, now.cr3, now.cr4, now.efer) == (state.cr0, state.cr3, state.cr4, state.efer);
        if same {
            *now = state;
        } else {
            self.start(state);
        }
    }

    /// What its control registers mean.
    pub fn paging(&mut self) -> Result<Paging, Trouble> {
        match self.paging {
            Some(paging) => Ok(paging),
            None => {
                let state = self.seat.machine.state();
                let paging = Paging::new(&self.cpu, state, &self.seat.vm.ram)?;
                self.paging = Some(paging);
                Ok(paging)
            }
        }
    }

    /// Run the guest until it exits once.
    pub fn enter(&mut self) -> Result<Exit, Trouble> {
        let Paging { walker, role, root, .. } = self.paging()?;
        self.seat.enter(&|seat| {
            let vm = Arc::clone(&seat.vm);
            let loaded = seat.shadow.load_guest_root(&vm.writer, &walker, &*vm.ram, &root, role);
            loaded.map_err(|error| Trouble::Shadow(0, error))
        })
    }

    /// The page fault at `address` is the guest's, or ours.
    fn page_fault(&mut self, address: u64, code: u64) -> Result<Progress, Trouble> {
        let paging = self.paging()?;
        let Seat { vm, shadow, machine, .. } = &mut self.seat;
        let request = paging.request(code, machine.state());
        let gva = Gva::new(address);
        let walk = match paging.walker.walk(&*vm.ram, &paging.root, gva, request) {
            Ok(walk) => walk,
            Err(WalkError::Fault(fault)) => {
                self.inject(&paging, fault);
                return Ok(Progress::On);
            }
            Err(WalkError::Contended { .. }) => return Ok(Progress::On),
            Err(error) => return Err(Trouble::Walk(error)),
        };
        let outcome = shadow.fault(&vm.writer, &paging.walker, &*vm.ram, &walk, request);
        let outcome = outcome.map_err(|error| Trouble::Shadow(address, error))?;
        let count = match outcome {
            FaultOutcome::Fixed => 0,
            FaultOutcome::Spurious => 1,
            FaultOutcome::Retry => 2,
            FaultOutcome::WriteProtected => {
                self.table_write(&paging, walk.gpa())?;
                return Ok(Progress::On);
            }
            other => {
                let trouble = Trouble::ShadowOutcome(address, other);
                return Ok(Progress::Refused(other, trouble));
            }
        };
        self.counts.faults[count] += 1;
        Ok(Progress::On)
    }

    /// The guest gets its fault. A processor has forgotten the address by then, so a guest that
    /// mends its entry in the handler need not flush.
    fn inject(&mut self, paging: &Paging, fault: GuestFault) {
        if fault.code.contains(PfErrorCode::PRESENT) {
            self.forget(paging, fault.gva);
        }
        let code = fault.code.bits() as u32;
        self.seat.machine.inject(GuestPageFault { address: fault.gva.get(), code });
        self.counts.injected += 1;
    }

    /// The guest flushed one address.
    fn forget(&mut self, paging: &Paging, gva: Gva) {
        let Seat { vm, shadow, machine, .. } = &mut self.seat;
        shadow.guest_invalidated(&vm.writer, &paging.walker, &*vm.ram, gva);
        machine.flush(LocalFlush::Linear(gva.get()));
    }

    /// The guest writes to a table of its own that has a shadow, at `gpa`.
    fn table_write(&mut self, paging: &Paging, gpa: Gpa) -> Result<(), Trouble> {
        let (rip, bytes) = self.instruction(paging)?;
        let Seat { vm, shadow, machine, .. } = &mut self.seat;
        if let Some(store) = Store::decode(&bytes) {
            let state = machine.state();
            let value = state.gpr[store.register];
            state.rip += store.length;
            vm.write(shadow.actor(), gpa.get(), value);
            self.counts.emulated += 1;
            self.retry.forget();
            return Ok(());
        }
        let gfn = Gfn::containing(gpa);
        let retry = &mut self.retry;
        let next = vm.writer.with(|writer| retry.cannot_emulate(writer, shadow.actor(), rip, gfn));
        self.counts.given_up += 1;
        match next {
            OnWriteProtected::Retry => Ok(()),
            OnWriteProtected::Emulate => Err(Trouble::Instruction(rip, bytes)),
        }
    }

    /// The instruction that the guest is at; zeros where its code cannot be read.
    fn instruction(&mut self, paging: &Paging) -> Result<(u64, [u8; LONGEST]), Trouble> {
        let state = *self.seat.machine.state();
        let (ram, request) = (&self.seat.vm.ram, paging.fetch(&state));
        let mut bytes = [0; LONGEST];
        for (at, byte) in (state.rip..).zip(&mut bytes) {
            let place = paging.walker.gva_to_gpa(&**ram, &paging.root, Gva::new(at), request);
            let gpa = place.map_err(Trouble::Walk)?.get();
            let word = ram.word(gpa & !7).map_or(0, |word| word.load(Ordering::Acquire));
            *byte = word.to_le_bytes()[(gpa % 8) as usize];
        }
        Ok((state.rip, bytes))
    }

    fn control_write(&mut self, register: u8, value: u64) -> Result<Progress, Trouble> {
        let state = self.seat.machine.state();
        match register {
            0 => state.cr0 = value,
            3 => state.cr3 = value,
            4 => state.cr4 = value,
            _ => {
                let exit = Exit::ControlWrite { register, value };
                return Ok(Progress::Stopped(exit));
            }
        }
        state.rip += LENGTH;
        // All of them flush what is not global, and no page is.
        self.paging = None;
        self.seat.unload();
        Ok(Progress::On)
    }

    fn invalidate_page(&mut self, address: u64) -> Result<Progress, Trouble> {
        let paging = self.paging()?;
        let state = self.seat.machine.state();
        // Not every CPU says which address: the guest programs use RDI.
        let address = if address == 0 { state.gpr[RDI] } else { address };
        state.rip += LENGTH;
        self.forget(&paging, Gva::new(address));
        Ok(Progress::On)
    }
}

impl<V: Virt> Runner for ShadowCpu<V> {
    fn registers(&mut self) -> &mut GuestState {
        self.seat.machine.state()
    }

    fn proceed(&mut self) -> Result<Progress, Trouble> {
        match self.enter()? {
            Exit::PageFault { address, code } => self.page_fault(address, code),
            Exit::ControlWrite { register, value } => self.control_write(register, value),
            Exit::InvalidatePage { address } => self.invalidate_page(address),
            Exit::Interrupt => Ok(Progress::Interrupted),
            exit => Ok(Progress::Stopped(exit)),
        }
    }

    fn faults(&self) -> [u64; 3] {
        self.counts.faults
    }
}
