//! A guest's physical memory.
//!
//! | guest physical | what |
//! |---|---|
//! | 0 to 2 MiB | code, tables, stacks: one block, the slot [`LOW_SLOT`] |
//! | [`DATA`] upward | data, as much as the VM was made with: the slot [`DATA_SLOT`] |
//! | [`WIDE`], 1 GiB | the host's first GiB, for leaves of that size: the slot [`WIDE_SLOT`] |
//! | elsewhere | nothing |
//!
//! Linear addresses are physical addresses in every mode, up to 4 GiB.

use super::program;
use crate::machine::memory::{Memory, PAGE};

/// Slot of code, tables, stacks.
pub const LOW_SLOT: u16 = 0;
/// Slot of data.
pub const DATA_SLOT: u16 = 1;
/// Slot of the wide window.
pub const WIDE_SLOT: u16 = 2;

/// Bytes of the low block.
pub const LOW_BYTES: u64 = 2 << 20;
/// First byte of data.
pub const DATA: u64 = 1 << 30;
/// First byte of the window on the host's first GiB.
pub const WIDE: u64 = 2 << 30;
/// Where there is nothing.
pub const HOLE: u64 = 0x7000_0000;

/// 64-bit programs.
pub const CODE_64: u64 = 0x1000;
/// 32-bit programs.
pub const CODE_32: u64 = 0x2000;
/// 16-bit programs.
pub const CODE_16: u64 = 0x3000;
/// The top table of long mode, its table of level 3, four of level 2.
pub const LEVEL_4: u64 = 0x4000;
const LEVEL_3: u64 = 0x5000;
/// The tables of level 2; one for each GiB.
pub const LEVEL_2: u64 = 0x6000;
/// The directory of 32-bit paging.
pub const DIRECTORY: u64 = 0xa000;
/// The pointer table of PAE paging, whose directories are those of long mode.
pub const POINTERS: u64 = 0xb000;
/// Data of real-mode programs: 32 KiB.
pub const REAL_DATA: u64 = 0x3_0000;
/// Bytes of that.
pub const REAL_BYTES: u64 = 0x8000;
/// Stacks, a page for each vCPU, growing down from the end.
const STACKS: u64 = 0x10_0000;
/// As many as there is room for.
pub const MAX_STACKS: u64 = 16;

/// Present, writable.
const LINK: u64 = 3;
/// The same, a large page, for user mode as well, accessed and dirty: so that the guest's own
/// walks write nothing unless a suite asks for it.
const LARGE: u64 = 0xe7;

/// End of the stack of vCPU `vcpu`.
pub const fn stack(vcpu: usize) -> u64 {
    STACKS + (vcpu as u64 + 1) * PAGE
}

/// Guest physical address of the entry of the guest's own tables that maps `linear`.
pub const fn entry_of(linear: u64) -> u64 {
    LEVEL_2 + (linear >> 21) * 8
}

/// Fill the low block: programs and tables.
pub fn prepare(low: &Memory) {
    let [code_64, code_32, code_16] = program::blobs();
    low.write(CODE_64, code_64);
    low.write(CODE_32, code_32);
    low.write(CODE_16, code_16);
    let set =
        |at: u64, value: u64| low.word(at).store(value, core::sync::atomic::Ordering::Relaxed);
    // A bit is never set where it is already: links are accessed from the start.
    set(LEVEL_4, LEVEL_3 | LINK | 0x20);
    for gib in 0..4 {
        set(LEVEL_3 + gib * 8, (LEVEL_2 + gib * PAGE) | LINK | 0x20);
        set(POINTERS + gib * 8, (LEVEL_2 + gib * PAGE) | 1);
    }
    for large in 0..2048 {
        set(LEVEL_2 + large * 8, large << 21 | LARGE);
    }
    // Two entries of 4 MiB a word.
    for pair in 0..512 {
        let entry = |index: u64| index << 22 | LARGE;
        set(DIRECTORY + pair * 8, entry(2 * pair) | entry(2 * pair + 1) << 32);
    }
}
