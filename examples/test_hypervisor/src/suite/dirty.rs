//! Dirty logging, by write protection, by D bits and by the hardware's own log: no write is missed,
//! none is invented, and a copy made from what the log says becomes the memory.

use alloc::collections::BTreeSet;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use mmu_core::addr::Level;
use mmu_core::slot::SlotFlags;
use mmu_core::vm::Actor;
use tdp_mmu::DirtyTracking;

use crate::crowd;
use crate::guest::layout::DATA_SLOT;
use crate::guest::program::Program;
use crate::host::BareHost;
use crate::lab::Lab;
use crate::machine::memory::{Memory, PAGE};
use crate::runner::Runner;
use crate::virt::Virt;
use crate::vm::{Task, Vm, data_at, data_gfn};

/// Names of a mode's checks.
struct Mode {
    tracking: DirtyTracking,
    exact: &'static str,
    again: &'static str,
    crowd: &'static str,
    copy: &'static str,
}

const MODES: [Mode; 3] = [
    Mode {
        tracking: DirtyTracking::WriteProtect,
        exact: "write-protect-log-is-exact",
        again: "write-protect-log-sees-the-next-write",
        crowd: "memory-while-write-protected",
        copy: "write-protect-copy-is-the-memory",
    },
    Mode {
        tracking: DirtyTracking::DirtyBit,
        exact: "d-bit-log-is-exact",
        again: "d-bit-log-sees-the-next-write",
        crowd: "memory-while-d-bits-are-cleared",
        copy: "d-bit-copy-is-the-memory",
    },
    Mode {
        tracking: DirtyTracking::HardwareLog,
        exact: "hardware-log-is-exact",
        again: "hardware-log-sees-the-next-write",
        crowd: "memory-while-hardware-logs",
        copy: "hardware-log-copy-is-the-memory",
    },
];

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    for mode in &MODES {
        if mode.tracking == DirtyTracking::HardwareLog && !lab.features.log {
            for name in [mode.exact, mode.again, mode.crowd, mode.copy] {
                lab.skip(name, "no hardware log of dirty pages");
            }
            continue;
        }
        exact(lab, mode);
        crowded(lab, mode);
    }
}

/// The pages of the data that are in the log, which forgets them.
fn harvest<V: Virt>(vm: &Vm<V>, actor: &mut Actor<BareHost>) -> BTreeSet<u64> {
    let mut words = vec![0; vm.data_range().len().div_ceil(64) as usize];
    let taken = vm.mmu.harvest_log(actor, 0, DATA_SLOT, &mut words);
    let _ = taken.unwrap_or_else(|error| panic!("{error}"));
    let pages = (0..).zip(words).flat_map(|(index, word)| {
        (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| index * 64 + bit)
    });
    pages.collect()
}

/// One vCPU writes pages by chance; the log holds those and no others.
fn exact<V: Virt>(lab: &mut Lab<V>, mode: &Mode) {
    let mut shape = lab.shape(8, Level::L2);
    shape.tracking = mode.tracking;
    let vm = Vm::new(lab, shape);
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    // Everything is mapped huge and written before the log begins.
    lab.went(mode.exact, vcpu.perform(&Task::pages(Program::Write, data_at(0), 2048)));
    lab.equal("huge-before-the-log", vm.leaf(&mut actor, data_gfn(9)).0, Level::L2);
    vm.set_data(&mut actor, SlotFlags::LOG_DIRTY);
    let begun = harvest(&vm, &mut actor);
    lab.check("a-log-begins-empty", begun.is_empty(), format_args!("{} pages", begun.len()));
    for (name, writes) in [(mode.exact, 700), (mode.again, 90)] {
        let mut written = BTreeSet::new();
        for _ in 0..writes {
            let page = lab.random() % 2048;
            let write = Task::pages(Program::Write, data_at(page), 1).value(page);
            if lab.went(name, vcpu.perform(&write)).is_none() {
                return;
            }
            written.insert(page);
            // Reading is not writing.
            let read = Task::pages(Program::Read, data_at(lab.random() % 2048), 1);
            lab.went(name, vcpu.perform(&read));
        }
        let found = harvest(&vm, &mut actor);
        let missed: Vec<&u64> = written.difference(&found).take(5).collect();
        let invented: Vec<&u64> = found.difference(&written).take(5).collect();
        lab.check(
            name,
            missed.is_empty() && invented.is_empty() && !found.is_empty(),
            format_args!("{} pages, missed {missed:?}, invented {invented:?}", found.len()),
        );
    }
    vm.set_data(&mut actor, SlotFlags::empty());
    lab.equal("huge-after-the-log", vm.leaf(&mut actor, data_gfn(9)).0, Level::L2);
    drop((vcpu, actor));
    lab.equal("dirty-frames-in-use", vm.end(), 0);
}

/// Copy pages of the data.
fn copy(from: &Memory, to: &Memory, pages: impl IntoIterator<Item = u64>) {
    for page in pages {
        let words = (page * PAGE / 8) as usize..((page + 1) * PAGE / 8) as usize;
        for (from, to) in from.words()[words.clone()].iter().zip(&to.words()[words]) {
            to.store(from.load(Ordering::Acquire), Ordering::Relaxed);
        }
    }
}

/// vCPUs write while the host copies what the log names, as a migration does.
fn crowded<V: Virt>(lab: &mut Lab<V>, mode: &Mode) {
    let mib = lab.cpus.max(2) as u64;
    let mut shape = lab.shape(mib * 2, Level::L2);
    shape.tracking = mode.tracking;
    let vm = Vm::new(lab, shape);
    let target = Memory::new(mib << 21);
    let (mut harvests, mut pages) = (0, 0);
    let crowd = crowd::run(lab, &vm, 512, 24, &mut |actor, step| match step {
        3 => {
            vm.set_data(actor, SlotFlags::LOG_DIRTY);
            copy(&vm.data, &target, 0..vm.data_range().len());
        }
        4.. => {
            let dirty = harvest(&vm, actor);
            harvests += 1;
            pages += dirty.len();
            copy(&vm.data, &target, dirty);
        }
        _ => {}
    });
    lab.crowd(mode.crowd, &crowd);
    let mut actor = vm.actor();
    let last = harvest(&vm, &mut actor);
    let count = last.len();
    copy(&vm.data, &target, last);
    let both = vm.data.words().iter().zip(target.words());
    let different = both.filter(|(a, b)| a.load(Ordering::Relaxed) != b.load(Ordering::Relaxed));
    let different = different.count();
    lab.check(
        mode.copy,
        different == 0 && pages > 0,
        format_args!(
            "{harvests} harvests under load, {pages} pages, {count} at the end, {different} words \
             differ"
        ),
    );
    drop(actor);
    lab.equal("dirty-crowd-frames-in-use", vm.end(), 0);
}
