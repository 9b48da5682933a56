//! Starting the application processors, one after the other: INIT, SIPI, wait for arrival.

use core::sync::atomic::{AtomicU32, Ordering};

use super::acpi;
use super::entry::AP_PAGE;
use crate::machine::{apic, clock, cpu, memory};

unsafe extern "C" {
    /// CPUs that have arrived in long mode; counted by `entry.rs`.
    safe static boot_arrived: AtomicU32;
    /// The code that they begin with.
    safe static ap_page_begin: u8;
    safe static ap_page_end: u8;
}

/// Spins of the wait for one CPU; minutes on a slow emulator.
const PATIENCE: u64 = 4_000_000_000;

/// Start CPUs until there are `most`, or no more. They get their numbers in the firmware's order.
///
/// # Panics
/// When one does not arrive.
pub fn start(rsdp: Option<u64>, most: usize) {
    memory::copy_low(AP_PAGE, (&raw const ap_page_begin, &raw const ap_page_end));
    let own = apic::id();
    let others = acpi::apic_ids(rsdp).into_iter().filter(|id| *id != own);
    for id in others.take(most - 1) {
        start_one(id);
    }
}

fn start_one(id: u8) {
    let before = cpu::count();
    let arrived = boot_arrived.load(Ordering::Acquire);
    apic::send_init(id);
    clock::delay_us(10_000);
    for _ in 0..2 {
        // One that has arrived ignores the second message; this saves the delay.
        if boot_arrived.load(Ordering::Acquire) == arrived {
            apic::send_startup(id, AP_PAGE);
            clock::delay_us(200);
        }
    }
    let mut spins = 0;
    while cpu::count() == before {
        core::hint::spin_loop();
        spins += 1;
        assert!(spins < PATIENCE, "CPU with APIC id {id} did not start");
    }
}
