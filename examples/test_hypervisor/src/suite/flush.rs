//! What a processor forgets when it is told to: one address, one guest, everything.
//!
//! A translation that is cached does not set A again. So A is cleared behind the processor's back,
//! something is forgotten, and the next access must set A. Without forgetting it may or may not.

use core::sync::atomic::Ordering::SeqCst;

use mmu_core::addr::Level;
use mmu_core::spte::SpteFormat;

use crate::guest::program::Program;
use crate::lab::Lab;
use crate::runner::Runner;
use crate::virt::{LocalFlush, Vcpu, Virt};
use crate::vm::{Task, Vm, data_at, data_gfn};

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    if !lab.features.accessed_dirty {
        lab.skip("flushes-are-seen", "hardware sets no A");
        return;
    }
    let vm = Vm::new(lab, lab.shape(2, Level::L1));
    let mut vcpu = vm.vcpu(0);
    let read = Task::pages(Program::Read, data_at(0), 1);
    lab.went("flush-warm-up", vcpu.perform(&read));
    let Some(root) = lab.went("flush-root", vcpu.tdp().load_root()) else { return };
    let places = vm.places(&mut vm.actor(), root, data_gfn(0));
    let Some((_, frame, index)) = places.last().copied() else { return };
    let entry = vm.host().entry(frame, index);
    let accessed = V::Format::ACCESSED;
    // INVLPGA names a page of the guest and drops the whole translation; INVVPID leaves what is
    // cached under guest physical addresses alone, so A need not be set again there.
    let linear = (V::WORD == "npt").then_some(("one-address", LocalFlush::Linear(data_at(0))));
    if linear.is_none() {
        lab.skip("one-address", "guest physical translations outlive it");
    }
    let others = [("one-guest", LocalFlush::Context), ("everything", LocalFlush::All)];
    // Often enough for the tags of this CPU to run out more than once.
    let rounds = 3 * u64::from(lab.features.tags.min(64));
    // For the record: a processor may forget whenever it likes.
    let mut stale = 0;
    for _ in 0..rounds {
        entry.fetch_and(!accessed, SeqCst);
        lab.went("flush-nothing", vcpu.perform(&read));
        stale += u64::from(entry.load(SeqCst) & accessed == 0);
    }
    for (name, what) in linear.into_iter().chain(others) {
        let mut missed = 0;
        for _ in 0..rounds {
            entry.fetch_and(!accessed, SeqCst);
            vcpu.machine().flush(what);
            if lab.went(name, vcpu.perform(&read)).is_none() {
                return;
            }
            missed += u64::from(entry.load(SeqCst) & accessed == 0);
        }
        lab.check(
            name,
            missed == 0,
            format_args!("{missed} of {rounds} accesses not seen, {stale} without a flush"),
        );
    }
    drop(vcpu);
    lab.equal("flush-frames-in-use", vm.end(), 0);
}
