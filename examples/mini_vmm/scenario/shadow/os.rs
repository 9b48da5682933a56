//! A small guest operating system, in machine code.
//!
//! It has processes, each with an address space of its own: page tables that it builds itself, in
//! its own memory. Pages come when they are touched, from a free list, zeroed; a fork shares all
//! pages read-only and counts their users, and whoever writes gets a copy; areas are mapped,
//! unmapped and protected, of 4 KiB or of 2 MiB pages. What a process does stands in its script
//! (`script.rs`), one operation after the other; the scheduler takes turns. An access that its
//! areas do not permit is refused by the page fault handler, which goes on behind it and says so in
//! the process's digest. So the digest tells whether every access reached the memory that it
//! should.
//!
//! It believes to be alone on a processor, at CPL 0: loads CR0, CR3, CR4 and the IDT, invalidates
//! addresses, returns from interrupts. Its memory begins at 4 GiB and is mapped in a row by 2 MiB
//! pages, through which it writes to its tables; kernel and stub are mapped in every space. It has
//! one privilege level, so its tables say user for everything, but for areas that are closed: those
//! have pages for supervisors, of which there are none.
//!
//! | linear | holds |
//! |---|---|
//! | `KERNEL` | code, data, processes, stack, then counts of users, then scripts |
//! | `ROW` | all memory in a row |
//! | `USER` | areas of the process |
//!
//! Registers, everywhere: r15 data, r14 what to add to a physical address, r13 the process, r12 the
//! end of processes, rbp operations left of the turn. `layout.rs` has the offsets. The code is in
//! `os.s` (operations), `tables.s` (memory) and `fault.s` (the page fault handler).

use core::arch::global_asm;

use crate::host::DATA_GFN;

use super::layout::{
    AREAS, FACTOR, HUGE, KERNEL, MOST_PROCESSES, OFFSET, PROCESS, PROCESSES, READABLE, WRITABLE,
    op, process, word,
};
use super::system::{CR0_WP, MSR_MARK};

// Position independent: the bytes are copied to guest memory and never run here.
global_asm!(
    include_str!("os.s"),
    include_str!("tables.s"),
    include_str!("fault.s"),
    wp = const CR0_WP,
    msr_mark = const MSR_MARK,
    offset = const OFFSET,
    factor = const FACTOR,
    memory_page = const DATA_GFN,
    processes = const PROCESSES,
    process = const PROCESS,
    most = const MOST_PROCESSES,
    areas = const AREAS,
    areas_at = const process::AREAS,
    cr3 = const process::CR3,
    next = const process::NEXT,
    digest = const process::DIGEST,
    idtr = const word::IDTR,
    boot = const word::BOOT,
    loaded = const word::LOADED,
    switches = const word::SWITCHES,
    quantum = const word::QUANTUM,
    result = const word::RESULT,
    counts = const word::COUNTS,
    faults = const word::FAULTS,
    refused = const word::REFUSED,
    copies = const word::COPIES,
    free = const word::FREE,
    unused = const word::NEXT,
    limit = const word::LIMIT,
    huge_free = const word::HUGE_FREE,
    huge_unused = const word::HUGE_NEXT,
    huge_limit = const word::HUGE_LIMIT,
    readable = const READABLE,
    writable = const WRITABLE,
    huge = const HUGE,
    op_exit = const op::EXIT,
    op_map = const op::MAP,
    op_unmap = const op::UNMAP,
    op_protect = const op::PROTECT,
    op_fork = const op::FORK,
    op_write = const op::WRITE,
    op_read = const op::READ,
    op_mark = const op::MARK,
);

unsafe extern "C" {
    static mini_vmm_os_start: u8;
    static mini_vmm_os_page_fault: u8;
    static mini_vmm_os_end: u8;
}

/// The assembled code, which the guest has at [`KERNEL`], and where it begins.
pub fn code() -> &'static [u8] {
    let start = &raw const mini_vmm_os_start;
    let len = (&raw const mini_vmm_os_end) as u64 - start as u64;
    // SAFETY: the two symbols are the ends of one block of bytes in this program's read-only data
    // (the assembly above).
    unsafe { core::slice::from_raw_parts(start, len as usize) }
}

/// Linear address of the page fault handler.
pub fn page_fault_handler() -> u64 {
    KERNEL + (&raw const mini_vmm_os_page_fault) as u64 - (&raw const mini_vmm_os_start) as u64
}
