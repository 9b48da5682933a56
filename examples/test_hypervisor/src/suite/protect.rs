//! Write protection: a tracked page faults on every write, reads go on, and nobody writes it until
//! it is let go.

use core::hint::spin_loop;

use mmu_core::access::Access;
use mmu_core::addr::Level;
use mmu_core::fault::FaultOutcome;

use crate::crowd;
use crate::guest::program::Program;
use crate::lab::Lab;
use crate::runner::Runner;
use crate::trouble::Trouble;
use crate::virt::{Cause, Virt};
use crate::vm::{Task, Vm, data_at, data_gfn, word};

/// Spins in which a guest goes over its whole share, so that one that still could would write.
const LONG: u32 = 20_000;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    alone(lab);
    crowded(lab);
}

/// Let pages of the VM be tracked.
fn enable<V: Virt>(lab: &mut Lab<V>, vm: &Vm<V>) {
    let mut actor = vm.actor();
    let enabled = vm.mmu.vm().enable_write_tracking(&mut vm.slots.lock(), &mut actor);
    lab.went("write-tracking", enabled);
}

fn alone<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(4, Level::L2));
    enable(lab, &vm);
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    let write = |value| Task::pages(Program::Write, data_at(9), 1).value(value);
    lab.went("protect-warm-up", vcpu.perform(&write(1)));
    lab.equal("protect-begins-huge", vm.leaf(&mut actor, data_gfn(9)).0, Level::L2);
    lab.went("track-write", vm.mmu.track_write(&mut actor, 0, data_gfn(9)));
    let read = vcpu.perform(&Task::pages(Program::Read, data_at(9), 1));
    lab.check("a-protected-page-is-read", read.is_ok(), format_args!("{read:?}"));
    let name = "a-protected-page-is-not-written";
    match vcpu.perform(&write(2)) {
        Err(Trouble::Outcome(fault, outcome)) => {
            let kind = fault.access() == Access::WRITE && fault.cause() == Cause::Protection;
            let held = kind && outcome == FaultOutcome::WriteProtected;
            lab.check(name, held, format_args!("{fault}: {outcome:?}"));
        }
        other => {
            lab.check(name, false, format_args!("{other:?}"));
        }
    }
    lab.equal("the-write-was-not-done", word(&vm.data, 9 << 12), 1);
    let neighbour = vcpu.perform(&Task::pages(Program::Write, data_at(10), 1));
    lab.check("its-neighbour-is-written", neighbour.is_ok(), format_args!("{neighbour:?}"));
    // The huge page was protected as a whole; writing the neighbour has split it.
    lab.equal("a-protected-page-is-small", vm.leaf(&mut actor, data_gfn(9)).0, Level::L1);
    lab.went("untrack-write", vm.mmu.untrack_write(&mut actor, 0, data_gfn(9)));
    lab.went("a-page-let-go-is-written", vcpu.perform(&write(3)));
    lab.equal("a-page-let-go-is-written", word(&vm.data, 9 << 12), 3);
    drop((vcpu, actor));
    lab.equal("protect-frames-in-use", vm.end(), 0);
}

/// Track pages that guests are writing to, and look whether they stand still.
fn crowded<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2) as u64;
    let vm = Vm::new(lab, lab.shape(2 * vcpus, Level::L2));
    enable(lab, &vm);
    let (mut tracked, mut alive) = (0, 0);
    let mut random = lab.random();
    let crowd = crowd::run(lab, &vm, 512, 60, &mut |actor, step| {
        random = random.rotate_left(13) ^ step;
        let page = random % (512 * vcpus);
        if vm.mmu.track_write(actor, 0, data_gfn(page)).is_err() {
            return;
        }
        tracked += 1;
        let before = crowd::sum(&vm, page, 1);
        (0..LONG).for_each(|_| spin_loop());
        alive += u64::from(crowd::sum(&vm, page, 1) != before);
        tracked -= u64::from(vm.mmu.untrack_write(actor, 0, data_gfn(page)).is_err());
    });
    lab.crowd("memory-while-protected", &crowd);
    lab.check(
        "protected-pages-stand-still",
        alive == 0 && tracked == 60,
        format_args!("{tracked} pages tracked, {alive} times somebody went on writing"),
    );
    lab.equal("protect-crowd-frames-in-use", vm.end(), 0);
}
