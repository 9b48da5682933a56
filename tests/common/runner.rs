//! A processor that runs a guest on a thread of its own, beside whatever changes its tables.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::spte::SpteFormat;
use mmu_model::AccessKind;
use tdp_mmu::{TdpMmu, TdpVcpu};

use super::{Core, TestHost, code, gpa};

/// How long an access may fault.
const PATIENCE: Duration = Duration::from_secs(30);

/// A core, its vCPU, and the seed that failures name.
pub struct Runner<'a, F: SpteFormat> {
    mmu: &'a Arc<TdpMmu<F, TestHost>>,
    core: Arc<Mutex<Core>>,
    vcpu: TdpVcpu<F, TestHost>,
    seed: u64,
}

impl<'a, F: SpteFormat> Runner<'a, F> {
    /// On a root of address space 0, which must stay valid.
    pub fn new(mmu: &'a Arc<TdpMmu<F, TestHost>>, core: Arc<Mutex<Core>>, seed: u64) -> Self {
        let mut vcpu = TdpVcpu::new(mmu, 0).expect("room");
        let root = vcpu.load_root().expect("a root");
        core.lock().unwrap().cpu.set_root(root.address().get());
        Self { mmu, core, vcpu, seed }
    }

    /// Access `gfn`, faulting until the access passes: then `passed` gets the physical address,
    /// while no flush can come in between. `present` makes up what error codes say. `over` ends it
    /// early by what came of a fault. Did the access pass?
    pub fn access(
        &mut self,
        gfn: u64,
        kind: AccessKind,
        mut present: impl FnMut() -> bool,
        passed: impl FnOnce(u64),
        mut over: impl FnMut(Result<FaultOutcome, FaultError>) -> bool,
    ) -> bool {
        let access = mmu_model::Access::user(kind);
        let (start, seed) = (Instant::now(), self.seed);
        loop {
            assert!(start.elapsed() < PATIENCE, "seed {seed}: {gfn:#x} is never mapped");
            let mut core = self.core.lock().unwrap();
            if let Ok(pa) = core.cpu.access(self.mmu.vm().host(), gfn << 12, access) {
                passed(pa);
                return true;
            }
            drop(core);
            let fault = PageFault::new(gpa(gfn), code(kind, present()));
            if over(self.vcpu.fault(&fault)) {
                return false;
            }
        }
    }
}
