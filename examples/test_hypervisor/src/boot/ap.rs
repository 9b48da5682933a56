//! Starting the application processors, one after the other: INIT, SIPI, wait for arrival.

use core::sync::atomic::{AtomicU32, Ordering};

use super::entry::AP_PAGE;
use crate::machine::{apic, clock, memory};

unsafe extern "C" {
    /// CPUs that have arrived in long mode; counted by `entry.rs`.
    safe static boot_arrived: AtomicU32;
    /// The code that they begin with.
    safe static ap_page_begin: u8;
    safe static ap_page_end: u8;
}

/// Spins of the wait for one CPU; minutes on a slow emulator.
const PATIENCE: u64 = 4_000_000_000;

/// Start the CPUs of these APIC ids, in this order: they get the next CPU numbers.
///
/// # Panics
/// When one does not arrive.
pub fn start(apic_ids: &[u8]) {
    memory::copy_low(AP_PAGE, (&raw const ap_page_begin, &raw const ap_page_end));
    for &id in apic_ids {
        let before = boot_arrived.load(Ordering::Acquire);
        apic::send_init(id);
        clock::delay_us(10_000);
        for _ in 0..2 {
            if boot_arrived.load(Ordering::Acquire) == before {
                apic::send_startup(id, AP_PAGE);
                clock::delay_us(200);
            }
        }
        let mut spins = 0;
        while boot_arrived.load(Ordering::Acquire) == before {
            core::hint::spin_loop();
            spins += 1;
            assert!(spins < PATIENCE, "CPU with APIC id {id} did not start");
        }
    }
}
