//! What a PVH loader says: command line, memory map, where ACPI's tables are.
//!
//! Owns [`BootInfo`], which disk boot fills in as well. The structures are those of Xen's
//! `hvm_start_info`, version 1.

use super::disk;
use crate::machine::memory;

/// hvm_start_info's magic.
const MAGIC: u32 = 0x336e_c578;
/// A RAM entry of the memory map.
const RAM: u32 = 1;

/// What the program must know about where it runs.
#[derive(Clone, Copy, Debug)]
pub struct BootInfo {
    /// The command line; empty if none was given.
    pub command_line: &'static str,
    /// End of the RAM that the program stands in.
    pub memory_end: u64,
    /// Physical address of ACPI's root pointer, if the loader knows.
    pub rsdp: Option<u64>,
}

/// Read what the loader left at `start_info`; 0 after booting from a disk.
pub fn boot_info(start_info: u32) -> BootInfo {
    if start_info == 0 {
        // SAFETY: EBX is 0 only after the boot sector; low memory is in the direct map for good,
        // and nobody writes there but `ap.rs`, to 0x8000 and up.
        let left = unsafe { disk::left_behind(memory::low_memory()) };
        let disk::DiskBoot { command_line, memory_end } = left;
        return BootInfo { command_line, memory_end, rsdp: None };
    }
    let at = u64::from(start_info);
    let word = |offset: u64| memory::read_u64(at + offset);
    let low = |offset: u64| (word(offset) & 0xffff_ffff) as u32;
    assert!(low(0) == MAGIC, "start information at {at:#x} is not PVH's");
    let command_line = match word(24) {
        0 => "",
        text => memory::read_text(text, 256),
    };
    let rsdp = Some(word(32)).filter(|address| *address != 0);
    let (map, entries) = if low(4) >= 1 { (word(40), low(48)) } else { (0, 0) };
    let mut memory_end = 0;
    for entry in 0..u64::from(entries) {
        let entry = map + entry * 24;
        let (start, bytes) = (memory::read_u64(entry), memory::read_u64(entry + 8));
        let kind = memory::read_u64(entry + 16) as u32;
        if kind == RAM && start <= 1 << 20 && start + bytes > 1 << 20 {
            memory_end = start + bytes;
        }
    }
    assert!(memory_end != 0, "the loader gave no memory map with RAM at 1 MiB");
    BootInfo { command_line, memory_end, rsdp }
}
