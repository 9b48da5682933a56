//! The machine and the interface to it: CPUs, doorbells, memory, and every way a guest can stop.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering};

use mmu_core::addr::Level;

use crate::guest::program::Program;
use crate::lab::Lab;
use crate::machine::memory::{BLOCK, Memory};
use crate::machine::{cpu, descriptors};
use crate::runner::Runner;
use crate::virt::state::gpr::{RAX, RDX};
use crate::virt::{Exit, Vcpu, VcpuSetup, Virt};
use crate::vm::{Task, Vm, data_at};

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    cpus(lab);
    memory(lab);
    stops(lab);
    interrupts(lab);
    refusals(lab);
}

fn cpus<V: Virt>(lab: &mut Lab<V>) {
    let seen = AtomicU64::new(0);
    cpu::on_all(lab.cpus, &|number| {
        let own = u64::from(cpu::current() == number);
        seen.fetch_add(own << (8 * number), Ordering::AcqRel);
    });
    let wanted = (0..lab.cpus).fold(0, |all, number| all | 1 << (8 * number));
    lab.equal("cpus-know-their-numbers", seen.into_inner(), wanted);

    let before = descriptors::doorbells();
    let last = lab.cpus - 1;
    cpu::ring(last);
    let mut spins = 0_u64;
    while descriptors::doorbells() == before && spins < 1 << 32 {
        cpu::take_interrupts();
        spins += 1;
    }
    lab.equal("a-doorbell-is-heard-once", descriptors::doorbells() - before, 1);
}

fn memory<V: Virt>(lab: &mut Lab<V>) {
    let first = Memory::new(2 * BLOCK);
    let second = Memory::new(BLOCK);
    let apart = second.start() >= first.start() + first.bytes() || second.start() < first.start();
    lab.check("memory-is-given-once", apart, format_args!("{first:?} {second:?}"));
    first.word(8).store(1, Ordering::Relaxed);
    let place = first.start();
    drop(first);
    let again = Memory::new(2 * BLOCK);
    let clean = again.words().iter().all(|word| word.load(Ordering::Relaxed) == 0);
    let same = again.start() == place;
    lab.check("memory-comes-back-clean", same && clean, format_args!("{again:?}"));
    // More than the heap holds, one after the other.
    let mut sum = 0;
    for round in 0..30_u8 {
        let block = Box::new([round; 1 << 20]);
        sum += u64::from(core::hint::black_box(&block)[1 << 19]);
    }
    lab.equal("the-heap-takes-back", sum, (0..30).sum());
}

/// Everything a program can do that ends a run.
fn stops<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(2, Level::L1));
    let setup = VcpuSetup { page_faults_exit: true, ..VcpuSetup::NESTED };
    let mut vcpu = vm.vcpu_with(0, setup);
    vcpu.begin(&Task::pages(Program::Stop, 0, 0));
    let expected = [
        Exit::Out { port: 0x1234, size: 1, value: 0x78 },
        Exit::Out { port: 0x1234, size: 2, value: 0x5678 },
        Exit::Out { port: 0x1234, size: 4, value: 0x1234_5678 },
        Exit::Cpuid,
        Exit::Halt,
    ];
    for (wanted, name) in expected.into_iter().zip(["out-8", "out-16", "out-32", "cpuid", "hlt"]) {
        if let Some(exit) = lab.went(name, vcpu.run()) {
            lab.equal(name, exit, wanted);
        }
    }
    // RAX and RDX are as the program left them: nobody emulated CPUID.
    let gpr = vcpu.state().gpr;
    lab.equal("registers-survive", (gpr[RAX], gpr[RDX]), (0x1234_5678, 0x1234));
    let call = if V::WORD == "npt" { Program::VmmCall } else { Program::VmCall };
    for (name, program, wanted) in
        [("hypercall", call, Exit::Call), ("triple-fault", Program::Undefined, Exit::Shutdown)]
    {
        vcpu.begin(&Task::pages(program, 0, 0));
        if let Some(exit) = lab.went(name, vcpu.run()) {
            lab.equal(name, exit, wanted);
        }
    }
    drop(vcpu);
    // Linear addresses end at 4 GiB in the guest's tables.
    let beyond = 5 << 30 | 0x123;
    let mut vcpu = vm.vcpu_with(1, setup);
    vcpu.begin(&Task::pages(Program::Write, beyond, 1));
    if let Some(exit) = lab.went("guest-page-fault", vcpu.run()) {
        lab.equal("guest-page-fault", exit, Exit::PageFault { address: beyond, code: 2 });
    }
    drop(vcpu);
    lab.equal("platform-frames-in-use", vm.end(), 0);
}

fn interrupts<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(2, Level::L1));
    let mut vcpu = vm.vcpu(0);
    // Everything the program needs is mapped first.
    if lab
        .went("interrupt-warm-up", vcpu.perform(&Task::pages(Program::Write, data_at(0), 1)))
        .is_none()
    {
        return;
    }
    vcpu.begin(&Task::pages(Program::Spin, data_at(0), 1));
    let rip = vcpu.state().rip;
    let before = descriptors::doorbells();
    // Interrupts are off: it is pending when the guest is entered.
    cpu::ring(cpu::current());
    if let Some(exit) = lab.went("a-pending-interrupt-ends-the-run", vcpu.enter()) {
        let stayed = vcpu.state().rip == rip;
        let taken = descriptors::doorbells() - before;
        lab.check(
            "a-pending-interrupt-ends-the-run",
            exit == Exit::Interrupt && stayed && taken == 1,
            format_args!("{exit}, taken {taken}, the guest did not start: {stayed}"),
        );
    }
    if lab.cpus < 2 {
        lab.skip("a-doorbell-stops-a-guest", "one CPU");
        return;
    }
    // CPU 1 spins in a guest until CPU 0 rings; the guest's counter shows that it ran.
    let (vm, stopped) = (&vm, AtomicU64::new(0));
    let counter = vm.data.word(0);
    counter.store(0, Ordering::Release);
    cpu::on_all(2, &|number| {
        if number == 1 {
            let mut vcpu = vm.vcpu(1);
            vcpu.begin(&Task::pages(Program::Spin, data_at(0), 1));
            let exit = loop {
                match vcpu.enter() {
                    Ok(Exit::Nested(fault)) => drop(vcpu.handle(&fault)),
                    other => break other,
                }
            };
            stopped.store(1 + u64::from(matches!(exit, Ok(Exit::Interrupt))), Ordering::Release);
        } else {
            while counter.load(Ordering::Acquire) < 1000 {
                core::hint::spin_loop();
            }
            cpu::ring(1);
        }
    });
    let count = counter.load(Ordering::Acquire);
    let stopped = stopped.into_inner() == 2;
    lab.check("a-doorbell-stops-a-guest", stopped, format_args!("after {count} counts"));
}

/// A state that no processor enters is refused, and the next entry works.
fn refusals<V: Virt>(lab: &mut Lab<V>) {
    let vm = Vm::new(lab, lab.shape(2, Level::L1));
    let mut vcpu = vm.vcpu(0);
    vcpu.begin(&Task::pages(Program::Write, data_at(0), 1));
    let good = *vcpu.state();
    vcpu.state().cr4 |= 1 << 40;
    if let Some(exit) = lab.went("a-bad-state-is-refused", vcpu.enter()) {
        let refused = matches!(exit, Exit::Invalid { .. });
        lab.check("a-bad-state-is-refused", refused, format_args!("{exit}"));
    }
    *vcpu.state() = good;
    let done = vcpu.run().and_then(|exit| vcpu.done(exit));
    if lab.went("a-refusal-leaves-nothing-behind", done).is_some() {
        let tag = vcpu.machine().tag();
        lab.check("a-refusal-leaves-nothing-behind", true, format_args!("tag {tag}"));
    }
}
