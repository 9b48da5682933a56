//! Pages of every size under trees of every height: each word where it should be, leaves of the
//! size that was offered.

use mmu_core::addr::Level;

use crate::guest::layout::WIDE;
use crate::guest::program::Program;
use crate::lab::Lab;
use crate::machine::memory::PAGE;
use crate::runner::Runner;
use crate::virt::Virt;
use crate::vm::{Shape, Task, Vm, data_at, word};

/// Data in MiB, for pages below 1 GiB.
const MIB: u64 = 8;
/// Distance between the words that are used.
const STRIDE: u64 = 512;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    four(lab);
    five(lab);
}

fn four<V: Virt>(lab: &mut Lab<V>) {
    of_height(lab, 4, ["4k-of-4-levels", "2m-of-4-levels", "1g-of-4-levels"]);
}

fn five<V: Virt>(lab: &mut Lab<V>) {
    let names = ["4k-of-5-levels", "2m-of-5-levels", "1g-of-5-levels"];
    if lab.features.levels_5 {
        of_height(lab, 5, names);
        // And back: the host may have had to change its own paging.
        of_height(lab, 4, ["4k-after-5-levels", "2m-after-5-levels", "1g-after-5-levels"]);
    } else {
        names.iter().for_each(|name| lab.skip(name, "no tables of 5 levels"));
    }
}

fn of_height<V: Virt>(lab: &mut Lab<V>, levels: u8, names: [&str; 3]) {
    for (name, level) in names.into_iter().zip(Level::ALL) {
        if level == Level::L3 && !lab.features.huge_1g {
            lab.skip(name, "no 1 GiB pages");
            continue;
        }
        let mut shape = lab.shape(MIB, level);
        shape.caps.levels = levels;
        filled(lab, name, shape, level);
    }
}

/// Fill and verify all data, through leaves of `level`.
fn filled<V: Virt>(lab: &mut Lab<V>, name: &str, shape: Shape, level: Level) {
    let vm = Vm::new(lab, shape);
    let mut actor = vm.actor();
    vm.open_window(&mut actor);
    let start = if level == Level::L3 { WIDE + vm.data.start() } else { data_at(0) };
    let mut vcpu = vm.vcpu(0);
    let count = shape.data / STRIDE;
    let value = lab.random();
    let task = |program| Task { stride: STRIDE, ..Task::words(program, start, count).value(value) };
    let filled = vcpu.perform(&task(Program::Fill));
    let Some(_) = lab.went(name, filled) else { return };
    let Some(done) = lab.went(name, vcpu.perform(&task(Program::Verify))) else { return };
    let offsets = (0..shape.data).step_by(STRIDE as usize);
    let wrong = offsets.filter(|at| word(&vm.data, *at) != (start + at) ^ value).count();
    let Some(tree) = lab.went(name, vm.mmu.check(&mut actor)) else { return };
    let leaves = tree.leaves[level.slot()];
    // With 4 KiB pages the low block's are counted too.
    let enough = (shape.data / PAGE).div_ceil(level.pages());
    let sized = if level == Level::L1 { leaves >= enough } else { leaves >= enough.min(4) };
    let huge_only = level == Level::L1 || tree.leaves[0] == 0;
    lab.check(
        name,
        done.wrong == 0 && wrong == 0 && sized && huge_only,
        format_args!(
            "{count} words, {} wrong for the guest, {wrong} for the host, leaves {:?}",
            done.wrong, tree.leaves
        ),
    );
    drop(vcpu);
    drop(actor);
    lab.equal("sizes-frames-in-use", vm.end(), 0);
}
