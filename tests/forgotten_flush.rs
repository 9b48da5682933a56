//! A VM whose embedder throws flushes away goes wrong visibly: the software CPU's caches are real.
//!
//! The same steps are run with flushes and without; with them everything holds, without them each
//! check says what went wrong. So a flush that the library forgot would show in the scenarios.

#![allow(dead_code, reason = "modules of the example, of which the test uses a part")]

#[path = "../examples/mini_vmm/host.rs"]
mod host;
#[path = "../examples/mini_vmm/machine.rs"]
mod machine;
#[path = "../examples/mini_vmm/report.rs"]
mod report;
#[path = "../examples/mini_vmm/soft/mod.rs"]
mod soft;
#[path = "../examples/mini_vmm/vmm.rs"]
mod vmm;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use machine::Op;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt, SpteConfig, SpteFormat};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use vmm::{Shape, Vmm, VmmVcpu};

const PAGES: u64 = 1024;

#[derive(Clone, Copy, PartialEq)]
enum Flushes {
    Paid,
    Forgotten,
}

fn boot<F: SpteFormat>(
    config: SpteConfig<F>,
    walks: mmu_model::Format,
    flushes: Flushes,
) -> (Arc<Vmm<F>>, VmmVcpu<F>) {
    let forget_flushes = flushes == Flushes::Forgotten;
    let shape = Shape { forget_flushes, ..Shape::new(1, PAGES) };
    let machine = soft::SoftMachine::new(&shape.layout(), 1, walks).expect("memory");
    let vmm = Vmm::new(Arc::new(machine), config, shape).expect("a VM");
    let mut vcpu = vmm.vcpu(0).expect("vCPU 0");
    vcpu.run_pages(Op::Write, 0..PAGES, 1, 1).expect("populate");
    (vmm, vcpu)
}

/// Faults that the guest takes when it touches everything again after an unmap of everything.
fn faults_after_unmap<F: SpteFormat>(vmm: &Arc<Vmm<F>>, vcpu: &mut VmmVcpu<F>) -> u64 {
    let mut actor = vmm.actor().expect("room");
    let zapped = vmm.mmu.unmap(&mut actor, vmm.all_gfns());
    assert_eq!(zapped.pages(), PAGES);
    let before = vmm.exits.faults.load(Ordering::Relaxed);
    vcpu.run_pages(Op::Verify, 0..PAGES, 1, 1).expect("verify");
    vmm.exits.faults.load(Ordering::Relaxed) - before
}

/// Pages that a second precise pass finds young after the guest touched all of them.
fn young_after_precise_pass<F: SpteFormat>(vmm: &Arc<Vmm<F>>, vcpu: &mut VmmVcpu<F>) -> u64 {
    let mut actor = vmm.actor().expect("room");
    let request = AgeRequest::new(vmm.all_gfns(), AgeMode::ClearFlush);
    assert_eq!(vmm.mmu.age(&mut actor, request, &mut CountOnly).young, PAGES);
    vcpu.run_pages(Op::Verify, 0..PAGES, 1, 1).expect("verify");
    vmm.mmu.age(&mut actor, request, &mut CountOnly).young
}

fn on_every_format(check: impl Fn(&str, Flushes, u64, u64)) {
    fn one<F: SpteFormat>(
        capabilities: Capabilities,
        walks: mmu_model::Format,
        check: &impl Fn(&str, Flushes, u64, u64),
    ) {
        let config = SpteConfig::<F>::new(capabilities).expect("a baseline");
        for flushes in [Flushes::Paid, Flushes::Forgotten] {
            let (vmm, mut vcpu) = boot(config.clone(), walks, flushes);
            let faults = faults_after_unmap(&vmm, &mut vcpu);
            let (vmm, mut vcpu) = boot(config.clone(), walks, flushes);
            let young = young_after_precise_pass(&vmm, &mut vcpu);
            check(F::NAME, flushes, faults, young);
        }
    }
    let long = mmu_model::Legacy::new(mmu_model::Mode::Long4);
    one::<Legacy>(Capabilities::legacy(), mmu_model::Format::Legacy(long), &check);
    one::<Npt>(Capabilities::npt(), mmu_model::Format::Npt(mmu_model::Npt::new()), &check);
    one::<Ept>(Capabilities::ept(), mmu_model::Format::Ept(mmu_model::Ept::new()), &check);
}

// INVARIANT[I11].
#[test]
fn paid_flushes_are_seen_by_the_guest_and_forgotten_ones_are_missed() {
    on_every_format(|format, flushes, faults, young| match flushes {
        Flushes::Paid => {
            assert_eq!(faults, PAGES, "{format}: every unmapped page faults again");
            assert_eq!(young, PAGES, "{format}: every access after a precise pass is seen");
        }
        Flushes::Forgotten => {
            assert_eq!(faults, 0, "{format}: the guest goes on using unmapped pages");
            assert_eq!(young, 0, "{format}: cached translations hide every access");
        }
    });
}
