//! The same guest where nothing traps: its tables are walked on top of those that `tdp-mmu` builds.
//!
//! The software CPU executes the kernel's instructions itself and delivers the guest's page faults
//! itself, and it walks in two dimensions: each entry of the guest's tables, and the page in the
//! end, is found through the VMM's tables (NPT or EPT). The VMM sees faults of the second dimension
//! only. No code of `shadow-mmu` takes part, so that what both runs compute cannot be wrong in the
//! same way.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use mmu_core::access::PfErrorCode;
use mmu_core::addr::Gpa;
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::spte::{SpteConfig, SpteFormat};
use mmu_model::{
    Access, AccessKind, Fault, FaultKind, Format, Legacy, MappedMem, Mode, PhysMem, SoftCpu, Stage,
    Walker,
};
use tdp_mmu::TdpVcpu;

use super::execute::Halt;
use super::image::{Image, Outcome, Start};
use super::interpreter::{Interpreter, Linear, Stopped, Translate};
use super::system::{Effect, System, Trouble};
use crate::host::VmmHost;
use crate::machine::{Machine, PAGE};
use crate::report::Report;
use crate::soft::SoftMachine;
use crate::vmm::{Error, Shape, Vmm};

/// Why an access stopped.
enum Stop {
    /// The guest's tables do not permit it.
    Guest { gva: u64, error: u32 },
    /// The VMM's tables do not.
    Host { gpa: u64, error: u32 },
    /// Something that must not be.
    Broken(String),
}

/// Guest memory as the walker of the guest's tables reaches it.
struct Behind<'a> {
    cpu: RefCell<&'a mut SoftCpu>,
    mem: &'a MappedMem,
    /// The fault of the second dimension that ended the walk.
    fault: Cell<Option<Fault>>,
}

impl Behind<'_> {
    fn reach(&self, gpa: u64, kind: AccessKind) -> Option<u64> {
        let access = Access { kind, user: true, stage: Stage::GuestTable };
        let reached = self.cpu.borrow_mut().access(self.mem, gpa, access);
        reached.map_err(|fault| self.fault.set(Some(fault))).ok()
    }
}

impl PhysMem for Behind<'_> {
    fn read(&self, gpa: u64) -> Option<u64> {
        self.mem.read(self.reach(gpa, AccessKind::Read)?)
    }

    fn cas(&self, gpa: u64, old: u64, new: u64) -> Option<Result<(), u64>> {
        self.mem.cas(self.reach(gpa, AccessKind::Write)?, old, new)
    }
}

/// A CPU that walks in two dimensions.
struct TwoDimensions<'a> {
    cpu: &'a mut SoftCpu,
    mem: &'a MappedMem,
    walker: &'a Walker,
    cr3: u64,
}

impl TwoDimensions<'_> {
    fn host(fault: &Fault) -> Stop {
        match fault.kind {
            FaultKind::NotPresent | FaultKind::Protection => {
                Stop::Host { gpa: fault.address, error: fault.page_fault_error() }
            }
            _ => Stop::Broken(format!("second dimension: {fault:x?}")),
        }
    }
}

impl Translate for TwoDimensions<'_> {
    type Stop = Stop;

    fn translate(&mut self, gva: u64, kind: AccessKind) -> Result<u64, Stop> {
        let fault = Cell::new(None);
        let behind = Behind { cpu: RefCell::new(self.cpu), mem: self.mem, fault };
        let walked = self.walker.translate(&behind, self.cr3, gva, Access::user(kind));
        if let Some(fault) = behind.fault.take() {
            return Err(Self::host(&fault));
        }
        let gpa = walked.map_err(|fault| match fault.kind {
            FaultKind::NotPresent | FaultKind::Protection | FaultKind::Reserved => {
                Stop::Guest { gva: fault.address, error: fault.page_fault_error() }
            }
            _ => Stop::Broken(format!("first dimension: {fault:x?}")),
        })?;
        let reached = self.cpu.access(self.mem, gpa.pa, Access::user(kind));
        reached.map_err(|fault| Self::host(&fault))
    }

    fn word(&self, pa: u64) -> Result<&AtomicU64, Stop> {
        self.mem.word(pa).ok_or_else(|| Stop::Broken(format!("no memory at {pa:#x}")))
    }
}

/// What a step came to.
enum Step {
    /// Go on.
    On,
    /// A fault of the second dimension; a page fault of the guest's may wait for it.
    Host { gpa: u64, error: u32 },
    /// The guest is done.
    Done,
}

/// The CPU.
struct TdpCpu {
    interpreter: Interpreter,
    system: System,
    walker: Walker,
    /// A page fault of the guest's that is being delivered.
    pending: Option<(u64, u32)>,
}

impl TdpCpu {
    fn new(start: &Start) -> Self {
        let system = System::new(start.cr3);
        let interpreter = Interpreter::new(start.registers);
        Self { interpreter, system, walker: walker(), pending: None }
    }

    /// One instruction, or one delivery.
    fn step(&mut self, cpu: &mut SoftCpu, mem: &MappedMem) -> Result<Step, Error> {
        let cr3 = self.system.cr3;
        let mut memory = TwoDimensions { cpu, mem, walker: &self.walker, cr3 };
        if let Some((gva, error)) = self.pending {
            let registers = &mut self.interpreter.registers;
            let mut bus = Linear(&mut memory);
            return match self.system.page_fault(&mut bus, registers, gva, error) {
                Ok(()) => {
                    self.pending = None;
                    Ok(Step::On)
                }
                Err(Trouble::Stop(Stop::Host { gpa, error })) => Ok(Step::Host { gpa, error }),
                Err(Trouble::Stop(Stop::Broken(what))) => Err(what.into()),
                Err(Trouble::Stop(Stop::Guest { .. }) | Trouble::NoHandler) => {
                    Err(format!("the page fault at {gva:#x} cannot be delivered").into())
                }
            };
        }
        let stop = match self.interpreter.step(&mut memory) {
            Ok(()) => return Ok(Step::On),
            Err(Stopped::NoCode(unknown)) => return Err(unknown.into()),
            Err(Stopped::Other(instruction, unknown)) => {
                if !System::is_privileged(&instruction) {
                    return Err(unknown.into());
                }
                let registers = &mut self.interpreter.registers;
                match self.system.execute(&mut Linear(&mut memory), registers, &instruction) {
                    Ok(Effect::Halted) => return Ok(Step::Done),
                    // No translation of the guest's is cached.
                    Ok(_) => return Ok(Step::On),
                    Err(Halt::Unknown) => return Err(unknown.into()),
                    Err(Halt::Stop(stop)) => stop,
                }
            }
            Err(Stopped::Stop(stop)) => stop,
        };
        match stop {
            Stop::Guest { gva, error } => {
                self.pending = Some((gva, error));
                Ok(Step::On)
            }
            Stop::Host { gpa, error } => Ok(Step::Host { gpa, error }),
            Stop::Broken(what) => Err(what.into()),
        }
    }
}

/// The walker of the guest's tables.
fn walker() -> Walker {
    Walker::new(&Format::Legacy(Legacy { gbpages: false, ..Legacy::new(Mode::Long4) }))
}

/// What the run came to.
#[derive(Clone, Copy, Debug)]
pub struct TdpRun {
    /// What the guest said.
    pub outcome: Outcome,
    /// Faults of the second dimension.
    pub faults: u64,
}

/// Run the guest that `load` puts into memory on tables of `config`, which the software CPU walks
/// as `format`. The VM's own checks go into `report`.
pub fn run<F: SpteFormat>(
    config: SpteConfig<F>,
    format: Format,
    pages: u64,
    load: impl Fn(&Image) -> Result<Start, Error>,
    report: &mut Report,
) -> Result<TdpRun, Error> {
    let shape = Shape::new(1, pages);
    let machine = Arc::new(SoftMachine::new(&shape.layout(), 1, format)?);
    let image = Image::new(machine.memory(), shape.layout().data.start, pages);
    let mut cpu = TdpCpu::new(&load(&image)?);
    let vmm = Vmm::new(Arc::<SoftMachine>::clone(&machine), config, shape)?;
    let mut vcpu = TdpVcpu::new(&vmm.mmu, 0)?;
    let root = vcpu.load_root()?;
    machine.with_cpu(0, |cpu, _| cpu.set_root(root.get() * PAGE))?;
    let mut faults = 0;
    loop {
        let step = machine.with_cpu(0, |soft, mem| cpu.step(soft, mem))??;
        match step {
            Step::On => {}
            Step::Done => break,
            Step::Host { gpa, error } => {
                faults += 1;
                resolve(&mut vcpu, gpa, error)?;
            }
        }
    }
    let outcome = image.outcome();
    drop(vcpu);
    vmm.teardown(report)?;
    Ok(TdpRun { outcome, faults })
}

fn resolve<F: SpteFormat>(
    vcpu: &mut TdpVcpu<F, VmmHost>,
    gpa: u64,
    error: u32,
) -> Result<(), Error> {
    let code = PfErrorCode::from_bits_retain(u64::from(error));
    match vcpu.fault(&PageFault::new(Gpa::new(gpa), code))? {
        FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry => Ok(()),
        other => Err(format!("guest access at {gpa:#x}: {other:?}").into()),
    }
}
