//! A software CPU that runs the guest's code at CPL 3 on the tables that its VMM gives it.
//!
//! Translations come from the software machine's caches, which forget nothing by themselves: a
//! missing flush shows.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use mmu_model::{Access, AccessKind, FaultKind, MappedMem, SoftCpu};

use super::interpreter::{Interpreter, Stopped, Translate};
use super::system::System;
use crate::machine::{CodeExit, CodeVcpu, MachineError, PAGE, Registers};
use crate::soft::SoftMachine;

/// Instructions executed before flushes get their turn.
const CHUNK: u32 = 1024;

/// A vCPU of the software machine that runs machine code.
#[derive(Debug)]
pub struct SoftCode {
    machine: Arc<SoftMachine>,
    interpreter: Interpreter,
}

impl SoftCode {
    /// The only vCPU of `machine`.
    pub fn new(machine: Arc<SoftMachine>) -> Self {
        Self { machine, interpreter: Interpreter::new(Registers::default()) }
    }
}

/// Why an access of the CPU's stopped.
enum Stop {
    Fault { gva: u64, error: u32 },
    Broken(String),
}

struct OneDimension<'a> {
    cpu: &'a mut SoftCpu,
    mem: &'a MappedMem,
}

impl Translate for OneDimension<'_> {
    type Stop = Stop;

    #[inline]
    fn translate(&mut self, gva: u64, kind: AccessKind) -> Result<u64, Stop> {
        self.cpu.access(self.mem, gva, Access::user(kind)).map_err(|fault| match fault.kind {
            FaultKind::NotPresent | FaultKind::Protection | FaultKind::Reserved => {
                Stop::Fault { gva: fault.address, error: fault.page_fault_error() }
            }
            _ => Stop::Broken(format!("{fault:x?}")),
        })
    }

    #[inline]
    fn word(&self, pa: u64) -> Result<&AtomicU64, Stop> {
        self.mem.word(pa).ok_or_else(|| Stop::Broken(format!("no memory at {pa:#x}")))
    }
}

impl CodeVcpu for SoftCode {
    fn registers(&mut self) -> &mut Registers {
        &mut self.interpreter.registers
    }

    fn set_root(&mut self, root: u64) -> Result<(), MachineError> {
        self.machine.with_cpu(0, |cpu, _| cpu.set_root(root * PAGE))
    }

    fn run(&mut self) -> Result<CodeExit, MachineError> {
        loop {
            let Self { machine, interpreter } = self;
            let stopped = machine.with_cpu(0, |cpu, mem| {
                let mut memory = OneDimension { cpu, mem };
                (0..CHUNK).find_map(|_| interpreter.step(&mut memory).err())
            })?;
            return match stopped {
                None => continue,
                Some(Stopped::Stop(Stop::Fault { gva, error })) => {
                    Ok(CodeExit::Fault { gva, error })
                }
                Some(Stopped::Stop(Stop::Broken(detail))) => {
                    Err(MachineError::UnexpectedExit { vcpu: 0, detail })
                }
                Some(Stopped::Other(instruction, _)) if System::is_privileged(&instruction) => {
                    Ok(CodeExit::Protection)
                }
                Some(Stopped::Other(..) | Stopped::NoCode(_)) => Ok(CodeExit::Invalid),
            };
        }
    }

    fn instructions(&self) -> Option<u64> {
        Some(self.interpreter.executed)
    }
}
