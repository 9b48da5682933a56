//! A hypervisor on bare metal whose guests' memory is managed by the crates, to see what real page
//! walkers make of their tables.
//!
//! It boots by PVH or from a disk, finds SVM or VMX, and runs suites: each makes VMs whose nested
//! tables are `tdp-mmu`'s, runs small guests on them, and checks what the processor did. It is also
//! the crates' first foreign user: no std, its own allocator, frames, interrupts and TLB shootdown.
//! For those who write a hypervisor: `host.rs` and `vcpu.rs` are all that the crates ask for.
//!
//! | where | what |
//! |---|---|
//! | `boot/` | entry, page tables of the host, other CPUs |
//! | `machine/` | the machine below: serial line, APIC, memory, heap |
//! | `virt/` | what a virtualization extension is; `svm/` and `vmx/` are the two |
//! | `host.rs`, `vcpu.rs` | the embedder's side of the crates |
//! | `shadow/` | the same for shadow paging, and for another hypervisor's guests |
//! | `guest/` | memory layout and programs of the guests |
//! | `suite/` | the checks |
//!
//! Output and exit codes are an interface: docs/PLATFORMS.md.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod crowd;
mod guest;
mod host;
mod lab;
mod machine;
mod options;
mod runner;
mod shadow;
mod suite;
mod svm;
mod trouble;
mod vcpu;
mod virt;
mod vm;
mod vmx;

use lab::Lab;
use machine::cpu;
use machine::exit::{Status, exit};
use options::Options;
use svm::Svm;
use virt::Virt;
use vmx::Vmx;

/// Every CPU's first Rust function; `number` counts them in the order of arrival.
extern "C" fn arrived(number: u32, start_info: u32) -> ! {
    let number = number as usize;
    if number != 0 {
        cpu::begin(number);
        cpu::serve(number);
    }
    machine::serial::begin();
    let info = boot::pvh::boot_info(start_info);
    // Before memory is given away: the text may stand in it.
    let options = Options::parse(info.command_line);
    machine::memory::begin(info.memory_end);
    cpu::begin(0);
    boot::ap::start(info.rsdp, options.cpus);
    let status = match options.format.as_deref() {
        Some("npt") => run_if_there::<Svm>(&options),
        Some(_) => run_if_there::<Vmx>(&options),
        None => run_if_there::<Svm>(&options).or_else(|| run_if_there::<Vmx>(&options)),
    };
    exit(status.unwrap_or_else(|| panic!("this machine has neither SVM nor VMX to offer")))
}

/// Run the suites on machine `V`; `None` if this is no such machine.
fn run_if_there<V: Virt>(options: &Options) -> Option<Status> {
    let features = V::detect()?;
    let cpus = cpu::count();
    println!("test_hypervisor: {}, {cpus} CPUs, seed {}, {features:?}", V::NAME, options.seed);
    cpu::on_all(cpus, &|number| {
        V::enable().unwrap_or_else(|error| panic!("CPU {number}: {error}"));
    });
    let mut lab = Lab::<V>::new(features, cpus, options.seed);
    for (name, run) in suite::all::<V>() {
        if options.wants(name) {
            println!("suite {name}");
            run(&mut lab);
        }
    }
    let lab::Tally { passed, failed, skipped } = lab.tally;
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    let good = failed == 0 && passed > 0;
    Some(if good { Status::Passed } else { Status::Failed })
}
