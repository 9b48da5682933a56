//! Dropping everything at once: vCPUs leave, the old tree is taken apart behind their backs, the
//! new one is filled on demand.

use mmu_core::addr::Level;

use crate::crowd;
use crate::guest::program::Program;
use crate::lab::Lab;
use crate::runner::Runner;
use crate::virt::Virt;
use crate::vm::{Task, Vm, data_at};
use tdp_mmu::root::ZapProgress;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    alone(lab);
    crowded(lab);
}

fn alone<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(4, Level::L1));
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    let fill = Task::words(Program::Fill, data_at(0), 4 << 17).value(lab.random());
    lab.went("zap-all-warm-up", vcpu.perform(&fill));
    let mut zap = vm.mmu.invalidate_roots(&mut actor);
    lab.equal("the-root-is-stale", vcpu.tdp().root_is_current(), false);
    let mut steps = 1;
    while zap.step(&mut actor, 1) == ZapProgress::Pending {
        steps += 1;
        // The vCPU that still holds the old root must drop it for the last step.
        vcpu.tdp().unload_root();
    }
    let report = zap.report();
    drop(zap);
    lab.check(
        "everything-was-zapped",
        report.pages() >= 1024,
        format_args!("{} pages in {steps} steps", report.pages()),
    );
    let done = lab.went("memory-is-mapped-again", {
        vcpu.perform(&Task { program: Program::Verify, ..fill })
    });
    lab.equal("memory-is-mapped-again", done.map(|done| done.wrong), Some(0));
    lab.equal("the-new-root-is-current", vcpu.tdp().root_is_current(), true);
    drop((vcpu, actor));
    lab.equal("zap-all-frames-in-use", vm.end(), 0);
}

fn crowded<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2) as u64;
    let vm = Vm::new(lab, lab.shape(2 * vcpus, Level::L1));
    let (mut pages, mut times) = (0, 0);
    let crowd = crowd::run(lab, &vm, 512, 24, &mut |actor, step| match step % 4 {
        1 => {
            pages += vm.mmu.invalidate_roots(actor).finish(actor).pages();
            times += 1;
        }
        3 => {
            // Begun here, and left to the next one.
            let mut zap = vm.mmu.invalidate_roots(actor);
            let _ = zap.step(actor, 2);
            times += 1;
        }
        _ => {}
    });
    lab.crowd("memory-while-everything-goes", &crowd);
    lab.check("everything-went", pages > 0, format_args!("{times} times, {pages} pages"));
    let roots = vm.mmu.vm().stats().get(mmu_core::stats::Counter::PfFixed);
    let detail = format_args!("{roots} pages mapped");
    lab.check("faults-refilled", roots > 1024 * vcpus, detail);
    lab.equal("zap-all-crowd-frames-in-use", vm.end(), 0);
}
