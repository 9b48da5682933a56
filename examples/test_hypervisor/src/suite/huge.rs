//! Splitting and collapsing huge pages under guests that use them.

use mmu_core::addr::{GfnRange, Level};

use crate::crowd;
use crate::guest::program::Program;
use crate::lab::Lab;
use crate::runner::Runner;
use crate::virt::Virt;
use crate::vm::{Task, Vm, data_at, data_gfn, word};

/// Pages of a share: 4 MiB.
const SHARE: u64 = 1024;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    alone(lab);
    crowded(lab);
}

/// One vCPU, step by step: which leaves there are, and that memory stays what it is.
fn alone<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(8, Level::L2));
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    let range = vm.data_range();
    let fill = Task::words(Program::Fill, data_at(0), 8 << 17).value(lab.random());
    let verify = Task { program: Program::Verify, ..fill };
    lab.went("split-warm-up", vcpu.perform(&fill));
    let split = vm.mmu.split(&mut actor, 0, range);
    lab.equal("split-splits-each-leaf", (split.splits, split.out_of_frames), (4, None));
    let small = vm.leaf(&mut actor, data_gfn(700)).0;
    lab.equal("a-split-leaf-is-small", small, Level::L1);
    let faults = vcpu.faults;
    let done = lab.went("memory-survives-a-split", vcpu.perform(&verify));
    lab.equal("memory-survives-a-split", done.map(|done| done.wrong), Some(0));
    lab.equal("a-split-costs-no-fault", vcpu.faults, faults);
    let collapsed = vm.mmu.collapse(&mut actor, 0, range);
    lab.equal("collapse-collapses-each-table", collapsed.collapses, [4, 0]);
    let large = vm.leaf(&mut actor, data_gfn(700)).0;
    lab.equal("a-collapsed-leaf-is-huge", large, Level::L2);
    let done = lab.went("memory-survives-a-collapse", vcpu.perform(&verify));
    lab.equal("memory-survives-a-collapse", done.map(|done| done.wrong), Some(0));
    // A write after both lands where the host looks.
    let write = Task::pages(Program::Write, data_at(700), 1).value(0xabcd);
    lab.went("a-write-after-a-collapse", vcpu.perform(&write));
    lab.equal("a-write-after-a-collapse", word(&vm.data, 700 << 12), 0xabcd);
    drop((vcpu, actor));
    lab.equal("huge-frames-in-use", vm.end(), 0);
}

fn crowded<V: Virt>(lab: &mut Lab<V>) {
    let mib = 4 * lab.cpus.max(2) as u64;
    let vm = Vm::new(lab, lab.shape(mib, Level::L2));
    let (mut splits, mut collapses) = (0, 0);
    let mut random = lab.random();
    let crowd = crowd::run(lab, &vm, SHARE, 40, &mut |actor, step| {
        random = random.rotate_left(7) ^ step;
        let blocks = vm.data_range().len() / 512;
        let first = random % blocks;
        let range = GfnRange::from_len(data_gfn(512 * first), 512 * (1 + random / 64 % 4));
        if step % 2 == 0 {
            splits += vm.mmu.split(actor, 0, range).splits;
        } else {
            collapses += vm.mmu.collapse(actor, 0, vm.data_range()).collapses[0];
        }
    });
    lab.crowd("memory-while-pages-split-and-collapse", &crowd);
    lab.check(
        "pages-did-split-and-collapse",
        splits > 0 && collapses > 0,
        format_args!("{splits} splits, {collapses} collapses"),
    );
    lab.equal("huge-crowd-frames-in-use", vm.end(), 0);
}
