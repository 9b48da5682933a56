//! Accessed and dirty bits as hardware sets them, at every level, for leaves of every size.

use core::sync::atomic::Ordering::SeqCst;

use arrayvec::ArrayVec;
use mmu_core::addr::{Gfn, Level, Pfn};
use mmu_core::spte::{Spte, SpteFormat};

use crate::guest::layout::{WIDE, entry_of};
use crate::guest::program::Program;
use crate::lab::Lab;
use crate::machine::memory::PAGE;
use crate::runner::Runner;
use crate::vcpu::BareVcpu;
use crate::virt::{LocalFlush, Vcpu, Virt};
use crate::vm::{Shape, Task, Vm, data_at, data_gfn};

type Places = ArrayVec<(Level, Pfn, usize), 5>;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    if !lab.features.accessed_dirty {
        lab.skip("accessed-dirty", "hardware sets no A and D");
        return;
    }
    let names = ["a-on-read-4k", "d-on-write-4k", "no-d-above-the-leaf-4k"];
    of_size(lab, lab.shape(2, Level::L1), names);
    let names = ["a-on-read-2m", "d-on-write-2m", "no-d-above-the-leaf-2m"];
    of_size(lab, lab.shape(2, Level::L2), names);
    let names = ["a-on-read-1g", "d-on-write-1g", "no-d-above-the-leaf-1g"];
    if lab.features.huge_1g {
        of_size(lab, lab.shape(2, Level::L3), names);
    } else {
        names.iter().for_each(|name| lab.skip(name, "no 1 GiB pages"));
    }
    let names = ["a-on-read-of-5-levels", "d-on-write-of-5-levels", "no-d-above-of-5-levels"];
    if lab.features.levels_5 {
        let mut shape = lab.shape(2, Level::L1);
        shape.caps.levels = 5;
        of_size(lab, shape, names);
    } else {
        names.iter().for_each(|name| lab.skip(name, "no tables of 5 levels"));
    }
    fetches(lab);
    guest_tables(lab);
}

/// Take A and D from every entry on the way, as hardware sees it.
fn clear<V: Virt>(vm: &Vm<V>, vcpu: &mut BareVcpu<V>, places: &Places) {
    let both = V::Format::ACCESSED | V::Format::DIRTY;
    for (_, frame, index) in places {
        vm.host().entry(*frame, *index).fetch_and(!both, SeqCst);
    }
    vcpu.machine().flush(LocalFlush::Context);
}

/// The entries now.
fn entries<V: Virt>(vm: &Vm<V>, places: &Places) -> ArrayVec<Spte, 5> {
    let load = |(_, frame, index): &(Level, Pfn, usize)| {
        Spte::from_raw(vm.host().entry(*frame, *index).load(SeqCst))
    };
    places.iter().map(load).collect()
}

fn prepare<V: Virt>(
    lab: &mut Lab<V>,
    vm: &Vm<V>,
    vcpu: &mut BareVcpu<V>,
    address: u64,
) -> Option<Places> {
    lab.went("accessed-dirty-warm-up", vcpu.perform(&Task::pages(Program::Write, address, 1)))?;
    let root = lab.went("accessed-dirty-root", vcpu.tdp().load_root())?;
    let mut actor = vm.actor();
    Some(vm.places(&mut actor, root, Gfn::new(address / PAGE)))
}

fn of_size<V: Virt>(lab: &mut Lab<V>, shape: Shape, names: [&str; 3]) {
    let level = shape.level;
    let vm = Vm::new(lab, shape);
    let mut actor = vm.actor();
    vm.open_window(&mut actor);
    let mut vcpu = vm.vcpu(0);
    // The same page of data, for 1 GiB through the window.
    let address = if level == Level::L3 { WIDE + vm.data.start() } else { data_at(0) };
    let Some(places) = prepare(lab, &vm, &mut vcpu, address) else { return };
    let [read, write, above] = names;
    let leaf = places.last().map(|place| place.0);
    if !lab.equal("leaf-has-the-size", leaf, Some(level)) {
        return;
    }
    clear(&vm, &mut vcpu, &places);
    lab.went(read, vcpu.perform(&Task::pages(Program::Read, address + 16, 1)));
    let found = entries(&vm, &places);
    let whole = found.len() == usize::from(shape.caps.levels - level.number() + 1);
    let all = whole && found.iter().all(|spte| spte.has(V::Format::ACCESSED));
    let none = !found.iter().any(|spte| spte.has(V::Format::DIRTY));
    lab.check(read, all && none, format_args!("{found:x?}"));

    clear(&vm, &mut vcpu, &places);
    lab.went(write, vcpu.perform(&Task::pages(Program::Write, address + 16, 1)));
    let found = entries(&vm, &places);
    let all = found.iter().all(|spte| spte.has(V::Format::ACCESSED));
    let (last, upper) = found.split_last().unwrap_or((&Spte::EMPTY, &[]));
    lab.check(write, all && last.has(V::Format::DIRTY), format_args!("{found:x?}"));
    let none = !upper.iter().any(|spte| spte.has(V::Format::DIRTY));
    lab.check(above, none, format_args!("{} entries above", upper.len()));
    drop(vcpu);
    drop(actor);
    lab.equal("accessed-dirty-frames-in-use", vm.end(), 0);
}

/// A fetch is an access, and an access to one page says nothing of its neighbour.
fn fetches<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(2, Level::L1));
    vm.data.word(0).store(super::faults::RET, SeqCst);
    let mut vcpu = vm.vcpu(0);
    let Some(other) = prepare(lab, &vm, &mut vcpu, data_at(1)) else { return };
    lab.went("a-on-fetch", vcpu.perform(&Task::pages(Program::Call, data_at(0), 1)));
    let Some(root) = lab.went("a-on-fetch", vcpu.tdp().load_root()) else { return };
    let places = vm.places(&mut vm.actor(), root, data_gfn(0));
    clear(&vm, &mut vcpu, &places);
    clear(&vm, &mut vcpu, &other);
    lab.went("a-on-fetch", vcpu.perform(&Task::pages(Program::Call, data_at(0), 1)));
    let found = entries(&vm, &places);
    let all = found.iter().all(|spte| spte.has(V::Format::ACCESSED));
    lab.check("a-on-fetch", all, format_args!("{found:x?}"));
    let neighbour = entries(&vm, &other).pop().unwrap_or(Spte::EMPTY);
    let untouched = !neighbour.has(V::Format::ACCESSED | V::Format::DIRTY);
    lab.check("no-a-for-the-neighbour", untouched, format_args!("{neighbour:x?}"));
}

/// The guest's own tables: a walk through them counts as a write.
fn guest_tables<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(2, Level::L1));
    let mut vcpu = vm.vcpu(0);
    if prepare(lab, &vm, &mut vcpu, data_at(0)).is_none() {
        return;
    }
    let Some(root) = lab.went("walks-are-writes", vcpu.tdp().load_root()) else { return };
    let table = Gfn::new(entry_of(data_at(0)) / PAGE);
    let places = vm.places(&mut vm.actor(), root, table);
    clear(&vm, &mut vcpu, &places);
    lab.went("walks-are-writes", vcpu.perform(&Task::pages(Program::Read, data_at(0), 1)));
    let leaf = entries(&vm, &places).pop().unwrap_or(Spte::EMPTY);
    let both = leaf.has(V::Format::ACCESSED) && leaf.has(V::Format::DIRTY);
    lab.check("walks-are-writes", both, format_args!("{leaf:x?}"));
}
