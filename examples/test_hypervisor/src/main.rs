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
//! | `guest/` | memory layout and programs of the guests |
//! | `suite/` | the checks |
//!
//! Output and exit codes are an interface: docs/PLATFORMS.md.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod machine;
mod virt;

use machine::cpu;
use machine::exit::{Status, exit};

/// Every CPU's first Rust function; `number` counts them in the order of arrival.
extern "C" fn arrived(number: u32, start_info: u32) -> ! {
    let number = number as usize;
    if number != 0 {
        cpu::begin(number);
        cpu::serve(number);
    }
    machine::serial::begin();
    let info = boot::pvh::boot_info(start_info);
    machine::memory::begin(info.memory_end);
    cpu::begin(0);
    println!("hello {info:?}");
    let ids = boot::acpi::apic_ids(info.rsdp);
    println!("{ids:?}");
    let own = machine::apic::id();
    for id in ids {
        if id != own {
            boot::ap::start(&[id]);
        }
    }
    println!("{} cpus", cpu::count());
    exit(Status::Passed)
}
