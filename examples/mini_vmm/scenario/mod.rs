//! The scenarios, and building the VM that each one wants.

mod access_tracking;
mod demand_paging;
mod dirty_log;
mod migration;
mod nested;
pub mod shadow;
mod stress;
mod tiering;

use std::sync::Arc;

use mmu_core::dirty::RingSize;
use mmu_core::slot::LogOptions;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt, SpteConfig, SpteFormat};
use tdp_mmu::DirtyTracking;

use super::cli::{CpuChoice, FormatChoice, LogMode, Options, Tracking};
use super::kvm::KvmMachine;
use super::machine::{Churn, Layout, Machine, PAGE};
use super::report::Report;
use super::soft::SoftMachine;
use super::vmm::{Error, Shape, Vmm};
use super::workload::Workload;

/// Shared memory of a dirty ring: small, so that rings do fill up.
const RING_BYTES: u64 = 16 << 10;

/// Scenarios in the order of the tour.
pub const NAMES: [&str; 8] = [
    "demand-paging",
    "access-tracking",
    "stress",
    "dirty-log",
    "migrate",
    "tiering",
    "shadow",
    "nested",
];

/// Run one scenario.
pub fn run(name: &str, options: &Options) -> Result<Report, Error> {
    match name {
        "nested" => return nested::run(options),
        "shadow" => return shadow::run(options),
        _ => {}
    }
    match options.format {
        FormatChoice::Legacy => run_as::<Legacy>(name, options, Capabilities::legacy()),
        FormatChoice::Npt => run_as::<Npt>(name, options, Capabilities::npt()),
        FormatChoice::Ept => run_as::<Ept>(name, options, Capabilities::ept()),
    }
}

fn run_as<F: SpteFormat>(
    name: &str,
    options: &Options,
    capabilities: Capabilities,
) -> Result<Report, Error> {
    let config = SpteConfig::<F>::new(capabilities)?;
    let builder = Builder { options, config };
    match name {
        "demand-paging" => demand_paging::run(&builder),
        "access-tracking" => access_tracking::run(&builder),
        "stress" => stress::run(&builder),
        "dirty-log" => dirty_log::run(&builder),
        "migrate" => migration::run(&builder),
        "tiering" => tiering::run(&builder),
        other => Err(format!("no scenario {other}; there are {}", NAMES.join(", ")).into()),
    }
}

/// Makes VMs for a scenario.
pub struct Builder<'a, F: SpteFormat> {
    /// What the user asked for.
    pub options: &'a Options,
    config: SpteConfig<F>,
}

impl<F: SpteFormat> Builder<'_, F> {
    /// A VM of this shape on the chosen machine.
    pub fn vmm(&self, shape: Shape) -> Result<Arc<Vmm<F>>, Error> {
        let vmm = self.quiet_vmm(shape)?;
        println!("\n{}", vmm.machine.description());
        Ok(vmm)
    }

    /// The same, for the second and later of several.
    pub fn quiet_vmm(&self, shape: Shape) -> Result<Arc<Vmm<F>>, Error> {
        let layout = shape.layout();
        let machine = self.machine(&layout, shape.vcpus)?;
        Vmm::new(machine, self.config.clone(), shape)
    }

    /// Pages for each vCPU; `kvm` and `soft` are the defaults in bytes.
    pub fn pages_each(&self, kvm: u64, soft: u64) -> u64 {
        let default = if self.options.cpu == CpuChoice::Kvm { kvm } else { soft };
        let memory = self.options.memory.map(|bytes| bytes / u64::from(self.options.vcpus));
        (self.options.per_vcpu.or(memory).unwrap_or(default) / PAGE).max(2)
    }

    fn machine(&self, layout: &Layout, vcpus: u32) -> Result<Arc<dyn Machine>, Error> {
        if self.options.cpu == CpuChoice::Kvm {
            return Ok(Arc::new(KvmMachine::new(layout, vcpus)?));
        }
        let format = match self.options.format {
            FormatChoice::Legacy => {
                mmu_model::Format::Legacy(mmu_model::Legacy::new(mmu_model::Mode::Long4))
            }
            FormatChoice::Npt => mmu_model::Format::Npt(mmu_model::Npt::new()),
            FormatChoice::Ept => mmu_model::Format::Ept(mmu_model::Ept::new()),
        };
        let machine = SoftMachine::new(layout, vcpus, format)?;
        if self.options.tracking == Tracking::HardwareLog {
            machine.log_dirtied();
        }
        Ok(Arc::new(machine))
    }

    /// Pages the workload touches; `kvm` and `soft` are the defaults in bytes.
    pub fn pages(&self, kvm: u64, soft: u64) -> u64 {
        let default = if self.options.cpu == CpuChoice::Kvm { kvm } else { soft };
        self.options.memory.unwrap_or(default) / PAGE
    }

    /// A shape with the kind of dirty log that the user asked for.
    pub fn logged_shape(&self, pages: u64) -> Result<Shape, Error> {
        let options = self.options;
        let tracking = match options.tracking {
            Tracking::WriteProtect => DirtyTracking::WriteProtect,
            Tracking::DirtyBit => DirtyTracking::DirtyBit,
            Tracking::HardwareLog if options.cpu == CpuChoice::Kvm => {
                return Err("/dev/kvm has no hardware log for a guest: use --cpu soft".into());
            }
            Tracking::HardwareLog => DirtyTracking::HardwareLog,
        };
        let rings = matches!(options.mode, LogMode::Ring | LogMode::Both);
        let log = LogOptions {
            bitmap: options.mode != LogMode::Ring,
            ring: if rings { Some(RingSize::from_bytes(RING_BYTES)?) } else { None },
            initially_set: options.mode == LogMode::Clear,
        };
        Ok(Shape { slots: options.slots, tracking, log, ..Shape::new(options.vcpus, pages) })
    }

    /// The program of the scenarios that watch writes; `delay` is the scenario's default.
    pub fn workload(&self, delay: u64) -> Workload {
        let mut random = mmu_model::Random::new(self.options.seed);
        let multiplier = if self.options.random { random.below(1 << 32) | 1 } else { 1 };
        let churn = Churn {
            multiplier,
            offset: self.options.seed,
            written: self.options.write_percent * 128 / 100,
            delay: self.options.delay.unwrap_or(delay),
        };
        Workload { churn, overlap: self.options.overlap }
    }

    /// An empty report of `scenario`.
    pub fn report(&self, scenario: &'static str, vmm: &Vmm<F>) -> Report {
        Report::new(scenario, vmm.machine.name(), vmm.shape.vcpus, vmm.shape.pages * PAGE)
    }
}
