//! Taking pages and tables away under guests on shadow tables: when the call returns nobody uses
//! them any more, and the guests' memory is as they left it.

use core::hint::spin_loop;

use mmu_core::addr::Level;

use crate::crowd;
use crate::guest::program::Program;
use crate::lab::Lab;
use crate::runner::Runner;
use crate::shadow::l1::L1;
use crate::shadow::town::{Town, pages};
use crate::virt::Virt;
use crate::vm::{Task, data_at};

/// Pages of a share.
const SHARE: u64 = 256;
/// Spins in which a guest goes over its whole share, so that one that still could would write.
const LONG: u32 = 20_000;
/// Most pages of a small zap.
const FEW: u64 = 64;
/// Steps of the host.
const STEPS: u64 = 32;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    alone(lab);
    shootdown(lab);
    everything(lab);
    nested(lab);
}

fn alone<V: Virt>(lab: &mut Lab<V>) {
    let town = Town::new(lab, 2, Level::L1, 1);
    let (mut vcpu, mut actor) = (town.vcpu(0), town.vm.actor());
    lab.went("shadow-zap-warm-up", vcpu.perform(&Task::pages(Program::Write, data_at(0), 64)));
    lab.went("shadow-zap-warm-up", vcpu.perform(&Task::pages(Program::Read, data_at(64), 64)));
    let gone = town.vm.unmap(&mut actor, pages(&town.vm.ram.data, 0, 128), || {});
    let told = (gone.leaves, gone.accessed, gone.dirty);
    lab.equal("a-zap-tells-of-accesses", told, (128, 128, 64));
    let before = vcpu.counts.faults[0];
    lab.went("after-a-zap", vcpu.perform(&Task::pages(Program::Read, data_at(0), 128)));
    lab.equal("zapped-pages-fault", vcpu.counts.faults[0] - before, 128);
    drop((vcpu, actor));
    lab.equal("shadow-zap-left", town.vm.end(), (0, 0));
}

/// Zap ranges that guests are writing to, and look whether they stand still.
fn shootdown<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2) as u64;
    // All in one space: what one vCPU's fault puts in serves the others.
    let town = Town::new(lab, 2 * vcpus, Level::L1, 1);
    let (mut zapped, mut alive) = (0, 0);
    let mut random = lab.random();
    let crowd = crowd::run(lab, &town, SHARE, STEPS, &mut |actor, step| {
        random = random.rotate_left(11) ^ step;
        let first = random % (SHARE * vcpus - FEW);
        // Now and then everything, else a few pages.
        let (first, count) =
            if step % 16 == 15 { (0, SHARE * vcpus) } else { (first, 1 + random / 4096 % FEW) };
        let range = pages(&town.vm.ram.data, first, count);
        // Faults retry meanwhile: nothing may change.
        let look = || {
            let before = crowd::sum(&town, first, count.min(FEW));
            (0..LONG).for_each(|_| spin_loop());
            alive += u64::from(crowd::sum(&town, first, count.min(FEW)) != before);
        };
        zapped += town.vm.unmap(actor, range, look).leaves;
    });
    lab.crowd("memory-while-shadows-are-zapped", &crowd);
    lab.check(
        "zapped-shadows-stand-still",
        alive == 0 && zapped > 0,
        format_args!("{zapped} leaves zapped, {alive} of {STEPS} times somebody went on writing"),
    );
    lab.equal("shadow-shootdown-left", town.vm.end(), (0, 0));
}

/// All tables go, roots too, and come back.
fn everything<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2);
    let town = Town::new(lab, 2 * vcpus as u64, Level::L1, vcpus);
    let crowd = crowd::run(lab, &town, SHARE, STEPS, &mut |actor, step| match step % 2 {
        0 => town.vm.drop_everything(actor),
        _ => drop(town.vm.shrink(actor, 4)),
    });
    lab.crowd("memory-while-all-shadows-are-dropped", &crowd);
    let zapped = town.vm.stats().pages_zapped;
    lab.check("shadows-were-dropped", zapped > STEPS, format_args!("{zapped} shadow pages"));
    lab.equal("dropped-shadows-left", town.vm.end(), (0, 0));
}

/// The same under the guests of another hypervisor.
fn nested<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2) as u64;
    let l1 = L1::new(lab, vcpus * (2 << 20), Level::L1);
    let (mut zapped, mut alive) = (0, 0);
    let mut random = lab.random();
    let crowd = crowd::run(lab, &l1, SHARE, STEPS, &mut |actor, step| {
        random = random.rotate_left(11) ^ step;
        let (first, count) = (random % (SHARE * vcpus - FEW), 1 + random / 4096 % FEW);
        if step % 8 == 7 {
            return l1.vm.drop_everything(actor);
        }
        let look = || {
            let before = crowd::sum(&l1, first, count);
            (0..LONG).for_each(|_| spin_loop());
            alive += u64::from(crowd::sum(&l1, first, count) != before);
        };
        zapped += l1.vm.unmap(actor, pages(&l1.vm.ram.data, first, count), look).leaves;
    });
    lab.crowd("l2s-memory-while-zapped", &crowd);
    lab.check(
        "l2s-zapped-pages-stand-still",
        alive == 0 && zapped > 0,
        format_args!("{zapped} leaves zapped, {alive} of {STEPS} times somebody went on writing"),
    );
    lab.equal("nested-zap-left", l1.vm.end(), (0, 0));
}
