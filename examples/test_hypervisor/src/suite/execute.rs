//! Execution: forbidden by NX, allowed alone, and withheld from huge pages.

use core::sync::atomic::Ordering::Relaxed;

use mmu_core::access::Access;
use mmu_core::addr::{GfnRange, Level};
use mmu_core::attributes::Attributes;
use mmu_core::fault::FaultOutcome;

use super::faults::{RET, restrict};
use crate::guest::program::Program;
use crate::lab::Lab;
use crate::runner::Runner;
use crate::trouble::Trouble;
use crate::virt::{Cause, Exit, Virt};
use crate::vm::{Shape, Task, Vm, data_at, data_gfn};

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    no_execute(lab);
    execute_only(lab);
    huge(lab);
    recovery(lab);
}

/// A VM whose data is RET all over.
fn returning<V: Virt>(lab: &Lab<V>, shape: Shape) -> Vm<V> {
    let vm = Vm::new(lab, shape);
    vm.data.words().iter().for_each(|word| word.store(RET, Relaxed));
    vm
}

fn no_execute<V: Virt>(lab: &mut Lab<V>) {
    let vm = returning(lab, lab.shape(2, Level::L1));
    let mut vcpu = vm.vcpu(0);
    let call = Task::pages(Program::Call, data_at(0), 1);
    restrict(&vm, data_gfn(0), Attributes::NO_EXEC);
    lab.went("nx-page-can-be-read", vcpu.perform(&Task { program: Program::Read, ..call }));
    let name = "nx-page-is-not-executed";
    match vcpu.perform(&call) {
        Err(Trouble::Outcome(fault, FaultOutcome::Emulate(reason))) => {
            let right = fault.access() == Access::EXEC && fault.cause() == Cause::Protection;
            lab.check(name, right, format_args!("{fault}: {reason}"));
        }
        other => drop(lab.check(name, false, format_args!("{other:?}"))),
    }
    restrict(&vm, data_gfn(0), Attributes::empty());
    let done = vcpu.perform(&call);
    lab.check("nx-taken-back", done.is_ok(), format_args!("{done:?}"));
}

fn execute_only<V: Virt>(lab: &mut Lab<V>) {
    let (fetch, read) = ("execute-only-is-executed", "execute-only-is-not-read");
    if !lab.features.exec_only {
        lab.skip(fetch, "no execute-only entries");
        lab.skip(read, "no execute-only entries");
        return;
    }
    let vm = returning(lab, lab.shape(2, Level::L1));
    let mut vcpu = vm.vcpu(0);
    restrict(&vm, data_gfn(0), Attributes::NO_READ | Attributes::NO_WRITE);
    let call = Task::pages(Program::Call, data_at(0), 1);
    let done = vcpu.perform(&call);
    lab.check(fetch, done.is_ok(), format_args!("{done:?}"));
    let exit = vcpu.attempt(&Task { program: Program::Read, ..call });
    let refused = matches!(exit, Ok(Exit::Nested(fault))
        if fault.access() == Access::READ && fault.cause() == Cause::Protection);
    lab.check(read, refused, format_args!("{exit:?}"));
}

/// The mitigation: a huge page is mapped without X, and a fetch gets a small one.
fn huge<V: Virt>(lab: &mut Lab<V>) {
    let mut shape = lab.shape(4, Level::L2);
    shape.caps.nx_huge_pages = true;
    let vm = returning(lab, shape);
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    let read = Task::pages(Program::Read, data_at(0), 1024);
    lab.went("huge-pages-are-read", vcpu.perform(&read));
    let leaf = vm.leaf(&mut actor, data_gfn(3));
    let withheld = !vm.mmu.config().access(leaf.1).contains(Access::EXEC);
    lab.check("huge-leaf-without-x", leaf.0 == Level::L2 && withheld, format_args!("{leaf:x?}"));
    let exit = vcpu.attempt(&Task::pages(Program::Call, data_at(3), 1));
    let name = "fetch-from-a-huge-page-faults";
    let Some(Exit::Nested(fault)) = lab.went(name, exit) else { return };
    let right = fault.access() == Access::EXEC && fault.cause() == Cause::Protection;
    lab.check(name, right, format_args!("{fault}"));
    let called = vcpu.perform(&Task::pages(Program::Call, data_at(3), 1));
    lab.check("fetch-gets-a-small-page", called.is_ok(), format_args!("{called:?}"));
    let (level, spte) = vm.leaf(&mut actor, data_gfn(3));
    let small = level == Level::L1 && vm.mmu.config().access(spte).contains(Access::EXEC);
    lab.check("small-leaf-with-x", small, format_args!("{level} {spte:x?}"));
    let other = vm.leaf(&mut actor, data_gfn(512 + 3)).0;
    lab.equal("the-other-huge-page-stays", other, Level::L2);
}

/// Small tables that execution asked for are taken back, and huge pages return.
fn recovery<V: Virt>(lab: &mut Lab<V>) {
    let mut shape = lab.shape(8, Level::L2);
    shape.caps.nx_huge_pages = true;
    let vm = returning(lab, shape);
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    let read = Task::pages(Program::Read, data_at(0), 2048);
    // One page of each 2 MiB is executed.
    let call = Task { stride: 2 << 20, ..Task::pages(Program::Call, data_at(7), 4) };
    lab.went("nx-recovery-warm-up", vcpu.perform(&read));
    lab.went("nx-recovery-warm-up", vcpu.perform(&call));
    let small = (0..4).filter(|i| vm.leaf(&mut actor, data_gfn(512 * i)).0 == Level::L1).count();
    lab.equal("execution-made-small-tables", small, 4);
    let report = vm.mmu.recover_nx(&mut actor, 1);
    // The low block's, whose code is executed, is one more.
    lab.equal("nx-recovery-takes-tables-out", report.recovered, 5);
    lab.went("nx-recovery-read", vcpu.perform(&read));
    let huge = (0..4).filter(|i| vm.leaf(&mut actor, data_gfn(512 * i)).0 == Level::L2).count();
    lab.equal("huge-pages-come-back", huge, 4);
    // A split leaves every page mapped, executable ones among them: such a fault may find nothing
    // left to do.
    let called = vcpu.perform(&call);
    let small = (0..4).filter(|i| vm.leaf(&mut actor, data_gfn(512 * i)).0 == Level::L1).count();
    let again = called.is_ok() && small == 4;
    let detail = format_args!("{called:?}, {small} tables");
    lab.check("execution-splits-them-again", again, detail);
    let range = GfnRange::from_len(data_gfn(0), 2048);
    let gone = vm.mmu.unmap(&mut actor, range);
    lab.equal("nx-recovery-left-all-mapped", gone.pages(), 2048);
    drop((vcpu, actor));
    lab.equal("execute-frames-in-use", vm.end(), 0);
}
