//! A vCPU that runs any machine code at CPL 3, natively; each exception leaves to the VMM.

use super::super::machine::{CodeExit, CodeVcpu, MachineError, Registers};
use super::trap::{self, Frame, PORT_TRAP};
use super::vcpu::{KvmVcpu, Outcome};
use super::{KvmMachine, Shared};
use std::sync::Arc;

/// Where the guest's registers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In KVM: it has not run.
    Kvm,
    /// In the frame of the handler that left.
    Frame,
}

/// A vCPU for machine code.
#[derive(Debug)]
struct KvmCode {
    shared: Arc<Shared>,
    vcpu: KvmVcpu,
    registers: Registers,
    place: Place,
}

impl KvmMachine {
    /// vCPU 0, for machine code. The machine has no other vCPU, and none for programs.
    ///
    /// # Errors
    /// As [`Machine::vcpu`](super::super::machine::Machine::vcpu).
    pub fn code_vcpu(&self) -> Result<Box<dyn CodeVcpu>, MachineError> {
        trap::install(&self.shared.memory)?;
        let vcpu = KvmVcpu::new(Arc::clone(&self.shared), 0, &self.cpuid)?;
        let shared = Arc::clone(&self.shared);
        let registers = Registers::default();
        Ok(Box::new(KvmCode { shared, vcpu, registers, place: Place::Kvm }))
    }
}

impl KvmCode {
    fn trapped(&mut self, port: u16) -> Result<CodeExit, MachineError> {
        let (gva, rsp) = self.vcpu.cr2_and_rsp();
        let frame = Frame::new(&self.shared.memory, 0);
        if port != PORT_TRAP || rsp != frame.address() {
            let (vector, error) = frame.exception();
            let what = format!("port {port:#x}; the last exception was {vector}, code {error:#x}");
            return Err(self.vcpu.unexpected(&what));
        }
        self.registers = frame.load();
        self.place = Place::Frame;
        let (vector, error) = frame.exception();
        match vector {
            14 => Ok(CodeExit::Fault { gva, error }),
            13 => Ok(CodeExit::Protection),
            _ => Ok(CodeExit::Invalid),
        }
    }
}

impl CodeVcpu for KvmCode {
    fn registers(&mut self) -> &mut Registers {
        &mut self.registers
    }

    fn set_root(&mut self, root: u64) -> Result<(), MachineError> {
        use super::super::machine::Vcpu;
        self.vcpu.set_root(root)
    }

    fn run(&mut self) -> Result<CodeExit, MachineError> {
        match self.place {
            Place::Kvm => self.vcpu.begin_with(&self.registers),
            Place::Frame => Frame::new(&self.shared.memory, 0).store(&self.registers),
        }
        loop {
            match self.vcpu.run_once()? {
                Outcome::Port(port) => return self.trapped(port),
                Outcome::Other(what) => return Err(self.vcpu.unexpected(&what)),
                // Nobody kicks this vCPU but to have it go in again.
                Outcome::Interrupted => {}
            }
        }
    }
}
