//! The scenarios, and building the VM that each one wants.

mod access_tracking;
mod demand_paging;
mod stress;

use std::sync::Arc;

use mmu_core::spte::{Capabilities, Ept, Legacy, Npt, SpteConfig, SpteFormat};

use super::cli::{CpuChoice, FormatChoice, Options};
use super::kvm::KvmMachine;
use super::machine::{Layout, Machine, PAGE};
use super::report::Report;
use super::soft::SoftMachine;
use super::vmm::{Error, Shape, Vmm};

/// Scenarios in the order of the tour.
pub const NAMES: [&str; 3] = ["demand-paging", "access-tracking", "stress"];

/// Run one scenario.
pub fn run(name: &str, options: &Options) -> Result<Report, Error> {
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
        let layout = shape.layout();
        let machine = self.machine(&layout, shape.vcpus)?;
        println!("\n{}", machine.description());
        Vmm::new(machine, self.config.clone(), shape)
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
        Ok(Arc::new(SoftMachine::new(layout, vcpus, format)?))
    }

    /// Pages the workload touches; `kvm` and `soft` are the defaults in bytes.
    pub fn pages(&self, kvm: u64, soft: u64) -> u64 {
        let default = if self.options.cpu == CpuChoice::Kvm { kvm } else { soft };
        self.options.memory.unwrap_or(default) / PAGE
    }

    /// An empty report of `scenario`.
    pub fn report(&self, scenario: &'static str, vmm: &Vmm<F>) -> Report {
        Report::new(scenario, vmm.machine.name(), vmm.shape.vcpus, vmm.shape.pages * PAGE)
    }
}
