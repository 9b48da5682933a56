//! Taking pages away under running guests: when the call returns, nobody uses them any more.

use core::hint::spin_loop;
use core::sync::atomic::Ordering;

use mmu_core::addr::{GfnRange, Level};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::SpteFormat;
use mmu_core::vm::Actor;

use crate::crowd;
use crate::guest::layout::{DATA, DATA_SLOT};
use crate::guest::program::Program;
use crate::host::BareHost;
use crate::lab::Lab;
use crate::machine::memory::Memory;
use crate::runner::Runner;
use crate::vcpu::BareVcpu;
use crate::virt::{Cause, Exit, LocalFlush, Vcpu, Virt};
use crate::vm::{Task, Vm, data_at, data_gfn};

/// Pages of a share.
const SHARE: u64 = 512;
/// Spins in which a guest goes over its whole share, so that one that still could would write.
const LONG: u32 = 20_000;
/// Most pages of a small zap.
const FEW: u64 = 128;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    alone(lab);
    shootdown(lab);
    moved(lab);
}

fn alone<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(2, Level::L1));
    let (mut vcpu, mut actor) = (vm.vcpu(0), vm.actor());
    lab.went("zap-warm-up", vcpu.perform(&Task::pages(Program::Write, data_at(0), 64)));
    lab.went("zap-warm-up", vcpu.perform(&Task::pages(Program::Read, data_at(64), 64)));
    if lab.features.accessed_dirty {
        forget_writes(lab, &vm, &mut vcpu);
        lab.went("zap-one-write", vcpu.perform(&Task::pages(Program::Write, data_at(100), 1)));
    }
    let gone = vm.mmu.unmap(&mut actor, GfnRange::from_len(data_gfn(0), 128));
    lab.equal("zap-reports-pages", (gone.pages(), gone.young), (128, 128));
    // Without D bits whatever is writable counts.
    let dirty = if lab.features.accessed_dirty { 65 } else { 128 };
    lab.equal("zap-reports-dirty-pages", gone.dirty, dirty);
    let exit = vcpu.attempt(&Task::pages(Program::Read, data_at(5), 1));
    let absent = matches!(exit, Ok(Exit::Nested(fault)) if fault.cause() == Cause::NotPresent);
    lab.check("a-zapped-page-faults", absent, format_args!("{exit:?}"));
    drop((vcpu, actor));
    lab.equal("zap-frames-in-use", vm.end(), 0);
}

/// Take D from pages 64 to 128: a page is mapped dirty where it may be written.
fn forget_writes<V: Virt>(lab: &mut Lab<V>, vm: &Vm<V>, vcpu: &mut BareVcpu<V>) {
    let Some(root) = lab.went("zap-root", vcpu.tdp().load_root()) else { return };
    let mut actor = vm.actor();
    for page in 64..128 {
        if let Some((_, frame, index)) = vm.places(&mut actor, root, data_gfn(page)).pop() {
            let entry = vm.host().entry(frame, index);
            entry.fetch_and(!V::Format::DIRTY, Ordering::SeqCst);
        }
    }
    vcpu.machine().flush(LocalFlush::Context);
}

/// Zap ranges that guests are writing to, and look whether they stand still.
fn shootdown<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2) as u64;
    let vm = Vm::new(lab, lab.shape(2 * vcpus, Level::L2));
    let (mut zapped, mut alive) = (0, 0);
    let mut random = lab.random();
    let crowd = crowd::run(lab, &vm, SHARE, 60, &mut |actor, step| {
        random = random.rotate_left(11) ^ step;
        let first = random % (SHARE * vcpus - FEW);
        // Now and then everything, else a few pages.
        let (first, pages) =
            if step % 16 == 15 { (0, SHARE * vcpus) } else { (first, 1 + random / 4096 % FEW) };
        let range = GfnRange::from_len(data_gfn(first), pages);
        let guard = vm.mmu.vm().invalidate(actor.participant(), range);
        zapped += vm.mmu.unmap_in(actor, &guard, range).pages();
        // Faults retry while the guard lives: nothing may change.
        let before = crowd::sum(&vm, first, pages.min(FEW));
        (0..LONG).for_each(|_| spin_loop());
        alive += u64::from(crowd::sum(&vm, first, pages.min(FEW)) != before);
        drop(guard);
    });
    lab.crowd("memory-while-zapped", &crowd);
    lab.check(
        "zapped-pages-stand-still",
        alive == 0 && zapped > 0,
        format_args!("{zapped} pages zapped, {alive} of 60 times somebody went on writing"),
    );
    lab.equal("zap-crowd-frames-in-use", vm.end(), 0);
}

/// Put the data somewhere else, behind the guests' backs.
fn swap<V: Virt>(vm: &Vm<V>, actor: &mut Actor<BareHost>, (from, to): (&Memory, &Memory)) {
    let bytes = vm.data_range().len() << 12;
    let _ = vm.set_slot(actor, DATA_SLOT, DATA, from.start(), 0, SlotFlags::empty());
    for (from, to) in from.words().iter().zip(to.words()) {
        to.store(from.load(Ordering::Acquire), Ordering::Relaxed);
        // Who still writes here, or reads, is found out.
        from.store(u64::MAX, Ordering::Relaxed);
    }
    let _ = vm.set_slot(actor, DATA_SLOT, DATA, to.start(), bytes, SlotFlags::empty());
}

fn moved<V: Virt>(lab: &mut Lab<V>) {
    let vcpus = lab.cpus.max(2) as u64;
    let vm = Vm::new(lab, lab.shape(2 * vcpus, Level::L2));
    let other = Memory::new(vm.data.bytes());
    let mut swaps = 0;
    // An even number of times, so that the data ends where it began.
    let crowd = crowd::run(lab, &vm, SHARE, 24, &mut |actor, step| {
        if step % 3 == 2 {
            let (here, there) = (&vm.data, &other);
            swap(&vm, actor, if swaps % 2 == 0 { (here, there) } else { (there, here) });
            swaps += 1;
        }
    });
    lab.equal("slots-were-moved", swaps, 8);
    lab.crowd("memory-while-slots-move", &crowd);
    lab.equal("moved-frames-in-use", vm.end(), 0);
}
