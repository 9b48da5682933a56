//! The local APIC: start-up messages and the doorbell.
//!
//! The doorbell is the one interrupt that CPUs send each other. Its handler
//! (`descriptors.rs`) does nothing but count and acknowledge: what matters is that a CPU that runs
//! a guest leaves it.

use x86::apic::xapic::{
    XAPIC_EOI, XAPIC_ICR0, XAPIC_ICR1, XAPIC_ID, XAPIC_LVT_LINT0, XAPIC_LVT_TIMER, XAPIC_SVR,
    XAPIC_TIMER_DIV_CONF, XAPIC_TIMER_INIT_COUNT,
};
use x86::msr::{IA32_APIC_BASE, rdmsr};

use super::port;

/// Where the registers are after reset, and stay.
pub const BASE: u64 = 0xfee0_0000;
/// Offset of the register that ends an interrupt.
pub const EOI: u32 = XAPIC_EOI;
/// The doorbell's vector.
pub const DOORBELL: u8 = 0xf0;
/// Vector of interrupts that went away before they were taken.
pub const SPURIOUS: u8 = 0xff;

/// IA32_APIC_BASE: x2APIC mode, enabled.
const X2APIC: u64 = 1 << 10;
const ENABLED: u64 = 1 << 11;
/// The software enable bit of the spurious vector register.
const SOFTWARE_ENABLE: u32 = 1 << 8;
/// A message is still on its way.
const PENDING: u32 = 1 << 12;
/// A local interrupt is off.
const MASKED: u32 = 1 << 16;
/// The timer counts at the bus's own rate, once.
const DIVIDE_BY_1: u32 = 0xb;
/// Mask registers of the two old interrupt controllers.
const PICS: [u16; 2] = [0x21, 0xa1];
/// Delivery modes, level "assert".
const FIXED: u32 = 0x4000;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;

fn register(offset: u32) -> *mut u32 {
    (BASE + u64::from(offset)) as *mut u32
}

fn write(offset: u32, value: u32) {
    // SAFETY: the local APIC's registers, in the uncached part of the direct map. What is written
    // makes CPUs start in `ap.rs`'s page or take the doorbell, for which both are prepared.
    unsafe { register(offset).write_volatile(value) }
}

fn read(offset: u32) -> u32 {
    // SAFETY: as for `write`; the registers that are read have no side effects.
    unsafe { register(offset).read_volatile() }
}

/// Turn the calling CPU's on.
///
/// # Panics
/// When the firmware left it off, elsewhere or in x2APIC mode.
pub fn begin() {
    // SAFETY: every CPU with long mode has this MSR.
    let base = unsafe { rdmsr(IA32_APIC_BASE) };
    let usual = base & !0xfff == BASE && base & (X2APIC | ENABLED) == ENABLED;
    assert!(usual, "IA32_APIC_BASE is {base:#x}");
    write(XAPIC_SVR, SOFTWARE_ENABLE | u32::from(SPURIOUS));
    // The old interrupt controllers' vectors are exceptions'. First they fall silent, then the pin
    // that they speak through is closed: what they had said already would stay pending behind it.
    PICS.iter().for_each(|data| port::write8(*data, 0xff));
    write(XAPIC_LVT_LINT0, MASKED);
    write(XAPIC_LVT_TIMER, MASKED);
}

/// Ring at the calling CPU once, after about `ticks` ticks of its timer; 0 takes that back.
pub fn ring_later(ticks: u32) {
    write(XAPIC_TIMER_DIV_CONF, DIVIDE_BY_1);
    write(XAPIC_LVT_TIMER, if ticks == 0 { MASKED } else { u32::from(DOORBELL) });
    write(XAPIC_TIMER_INIT_COUNT, ticks);
}

fn send(apic_id: u8, message: u32) {
    write(XAPIC_ICR1, u32::from(apic_id) << 24);
    write(XAPIC_ICR0, message);
    while read(XAPIC_ICR0) & PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// Put a CPU into the state that waits for a start-up message.
pub fn send_init(apic_id: u8) {
    send(apic_id, INIT);
}

/// Start a CPU in real mode at `page`, an address below 1 MiB.
pub fn send_startup(apic_id: u8, page: usize) {
    send(apic_id, STARTUP | (page >> 12) as u32);
}

/// Ring at a CPU.
pub fn ring(apic_id: u8) {
    send(apic_id, FIXED | u32::from(DOORBELL));
}

/// APIC id of the calling CPU.
pub fn id() -> u8 {
    (read(XAPIC_ID) >> 24) as u8
}
