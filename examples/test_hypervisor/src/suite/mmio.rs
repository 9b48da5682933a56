//! Accesses to where there is no memory: the first finds no slot, the next exits with the entry
//! that says so, and both end when a slot is made.

use mmu_core::addr::{Gfn, Level};
use mmu_core::fault::{EmulateReason, FaultOutcome};
use mmu_core::slot::SlotFlags;
use mmu_core::stats::Counter;

use crate::guest::layout::HOLE;
use crate::guest::program::Program;
use crate::lab::Lab;
use crate::machine::memory::PAGE;
use crate::runner::Runner;
use crate::virt::{Cause, Exit, Virt};
use crate::vm::{Task, Vm, data_at, word};

const SLOT: u16 = 7;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(2, Level::L1));
    let mut vcpu = vm.vcpu(0);
    lab.went("mmio-warm-up", vcpu.perform(&Task::pages(Program::Write, data_at(0), 1)));
    lab.equal("mmio-is-cached", vm.mmu.config().mmio_enabled(), true);
    let gfn = Gfn::new(HOLE / PAGE);
    let emulate = FaultOutcome::Emulate(EmulateReason::NoSlot { gfn, space: 0 });
    let marked = match V::WORD {
        "ept" => Cause::Misconfigured,
        _ => Cause::Reserved,
    };
    let causes = [Cause::NotPresent, marked, marked];
    let names = ["first-access-finds-nothing", "second-access-hits-the-entry", "so-does-a-write"];
    let programs = [Program::Read, Program::Read, Program::Write];
    for ((name, cause), program) in names.into_iter().zip(causes).zip(programs) {
        let exit = vcpu.attempt(&Task::pages(program, HOLE + 0x20, 1));
        let Some(Exit::Nested(fault)) = lab.went(name, exit) else { continue };
        let right = fault.cause() == cause && fault.gpa.get() == HOLE + 0x20;
        lab.check(name, right, format_args!("{fault}"));
        lab.equal(name, vcpu.tdp().fault(&fault.page_fault()), Ok(emulate));
        let info = vcpu.tdp().mmio_info();
        lab.equal("the-vcpu-remembers", info.map(|info| info.gfn), Some(gfn));
    }
    let mut actor = vm.actor();
    let Some(tree) = lab.went("mmio-entries", vm.mmu.check(&mut actor)) else { return };
    lab.equal("mmio-entries", tree.mmio, 1);

    // A slot comes: the entry is of another generation, and the access goes through.
    let physical = vm.data.start();
    let _ = vm.set_slot(&mut actor, SLOT, HOLE, physical, PAGE, SlotFlags::empty());
    let written = vcpu.perform(&Task::pages(Program::Write, HOLE + 0x20, 1).value(0xfeed));
    lab.went("a-new-slot-is-memory", written);
    lab.equal("a-new-slot-is-memory", word(&vm.data, 0x20), 0xfeed);
    lab.equal("the-vcpu-forgets", vcpu.tdp().mmio_info(), None);
    // And goes.
    let _ = vm.set_slot(&mut actor, SLOT, HOLE, physical, 0, SlotFlags::empty());
    let exit = vcpu.attempt(&Task::pages(Program::Read, HOLE, 1));
    let absent = matches!(exit, Ok(Exit::Nested(fault)) if fault.cause() == Cause::NotPresent);
    lab.check("a-deleted-slot-is-nothing", absent, format_args!("{exit:?}"));
    let zapped = vm.mmu.vm().stats().get(Counter::LeavesZapped);
    lab.check("deleting-it-zapped-its-page", zapped >= 1, format_args!("{zapped} leaves"));
    drop((vcpu, actor));
    lab.equal("mmio-frames-in-use", vm.end(), 0);
}
