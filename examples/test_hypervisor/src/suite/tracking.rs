//! Access tracking where hardware sets no accessed bit: permissions are taken away, and the fault
//! that follows tells of the access.

use mmu_core::access::Access;
use mmu_core::addr::Level;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly, UpperBits};

use crate::guest::program::Program;
use crate::lab::Lab;
use crate::runner::Runner;
use crate::virt::{Cause, Exit, Virt};
use crate::vm::{Task, Vm, data_at, data_gfn};

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    let names = ["tracked-leaf-permits-nothing", "an-access-is-seen-by-its-fault"];
    if !lab.features.accessed_dirty_off {
        names.iter().for_each(|name| lab.skip(name, "A and D cannot be turned off"));
        return;
    }
    let mut shape = lab.shape(2, Level::L1);
    shape.caps.accessed_dirty = false;
    let vm = Vm::new(lab, shape);
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    lab.went(names[0], vcpu.perform(&Task::pages(Program::Write, data_at(0), 8)));
    // The leaf's bits are the software's now, which sets them; nobody sets those of the links.
    let way = vm.mmu.lookup(&mut actor, 0, data_gfn(3));
    let mut links = way.iter().filter(|(level, _)| *level != Level::L1);
    let alone = links.all(|(_, spte)| spte.raw() & V::Format::ACCESSED == 0);
    lab.check("hardware-leaves-links-alone", alone, format_args!("{way:x?}"));
    let range = vm.data_range();
    let request = AgeRequest::new(range, AgeMode::ClearFlush);
    let first = vm.mmu.age(&mut actor, request, &mut CountOnly);
    lab.equal("written-pages-are-young", (first.mapped, first.young), (8, 8));
    let (level, leaf) = vm.leaf(&mut actor, data_gfn(3));
    let config = vm.mmu.config();
    let nothing = config.is_access_tracked(leaf) && !config.is_hw_present(leaf);
    lab.check(names[0], nothing, format_args!("{level} {leaf:x?}"));
    // A read, then a write: two faults, the second because W was not saved.
    let read = vcpu.attempt(&Task::pages(Program::Read, data_at(3), 1));
    if let Some(Exit::Nested(fault)) = lab.went(names[1], read) {
        let right = fault.access() == Access::READ && fault.cause() == Cause::NotPresent;
        lab.check("a-tracked-page-looks-absent", right, format_args!("{fault}"));
    }
    lab.went(names[1], vcpu.perform(&Task::pages(Program::Read, data_at(3), 1)));
    let second = vm.mmu.age(&mut actor, request, &mut CountOnly);
    lab.equal(names[1], (second.mapped, second.young), (8, 1));
    // No bits in links either: a pass that asks for them looks at everything.
    let by_links = request.with_upper(UpperBits::Use);
    let third = vm.mmu.age(&mut actor, by_links, &mut CountOnly);
    lab.equal("links-without-bits-hide-nothing", (third.mapped, third.idle), (8, 0));
    lab.went("a-write-comes-back", vcpu.perform(&Task::pages(Program::Write, data_at(3), 1)));
    let (_, leaf) = vm.leaf(&mut actor, data_gfn(3));
    lab.check("a-write-comes-back", config.is_writable(leaf), format_args!("{leaf:x?}"));
    drop((vcpu, actor));
    lab.equal("tracking-frames-in-use", vm.end(), 0);
}
