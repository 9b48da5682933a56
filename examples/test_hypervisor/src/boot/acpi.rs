//! Which CPUs there are: ACPI's MADT, and nothing else of ACPI.

use arrayvec::ArrayVec;

use crate::machine::cpu::MAX_CPUS;
use crate::machine::memory::{read_u8, read_u32, read_u64};

/// "RSD PTR ", "APIC".
const RSDP: u64 = u64::from_le_bytes(*b"RSD PTR ");
const MADT: u32 = u32::from_le_bytes(*b"APIC");
/// Where firmware puts the root pointer when nobody says.
const BIOS: core::ops::Range<u64> = 0xe_0000..0x10_0000;

/// APIC ids of the CPUs that may be used, as the firmware lists them. Empty without ACPI.
pub fn apic_ids(rsdp: Option<u64>) -> ArrayVec<u8, MAX_CPUS> {
    let mut ids = ArrayVec::new();
    let found = rsdp.or_else(|| BIOS.step_by(16).find(|at| is_rsdp(*at)));
    let Some(madt) = found.and_then(find_madt) else { return ids };
    let end = madt + u64::from(read_u32(madt + 4));
    let mut at = madt + 44;
    while at + 8 <= end {
        let (kind, bytes) = (read_u8(at), read_u8(at + 1));
        // Type 0: a processor's local APIC; bit 0 of the flags: enabled.
        if kind == 0 && read_u8(at + 4) & 1 != 0 && !ids.is_full() {
            ids.push(read_u8(at + 3));
        }
        at += u64::from(bytes.max(2));
    }
    ids
}

fn is_rsdp(at: u64) -> bool {
    let sum = |bytes: u64| (0..bytes).fold(0_u8, |sum, i| sum.wrapping_add(read_u8(at + i)));
    read_u64(at) == RSDP && sum(20) == 0
}

fn find_madt(rsdp: u64) -> Option<u64> {
    let wide = read_u8(rsdp + 15) >= 2 && read_u64(rsdp + 24) != 0;
    let (root, entry) =
        if wide { (read_u64(rsdp + 24), 8) } else { (u64::from(read_u32(rsdp + 16)), 4) };
    let count = u64::from(read_u32(root + 4)).saturating_sub(36) / entry;
    let tables = (0..count).map(|i| root + 36 + i * entry);
    let address = |at: u64| if wide { read_u64(at) } else { u64::from(read_u32(at)) };
    tables.map(address).find(|table| read_u32(*table) == MADT)
}
