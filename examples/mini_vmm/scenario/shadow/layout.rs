//! Where everything is in the guest operating system: what its code and the loader agree on.

use crate::host::DATA_GFN;
use crate::machine::PAGE;

/// Where the kernel is: its first page is the first of memory.
pub const KERNEL: u64 = 0x10_0000;
/// Where memory is mapped in a row.
pub const ROW: u64 = 1 << 39;
/// First linear address of processes.
pub const USER: u64 = 2 << 39;
/// First physical address of memory.
pub const MEMORY: u64 = DATA_GFN * PAGE;
/// From a physical address to the row.
pub const OFFSET: u64 = ROW - MEMORY;

/// Pages of the kernel, counted from [`KERNEL`]: code, data, processes, stack, users' counts.
pub const DATA_PAGE: u64 = 2;
/// Processes.
pub const PROCESS_PAGE: u64 = 3;
/// The stack comes down from this page's end.
pub const STACK_PAGE: u64 = 4;
/// A word for each page of memory: how many use it.
pub const COUNTS_PAGE: u64 = 5;
/// The kernel's data.
pub const DATA: u64 = KERNEL + DATA_PAGE * PAGE;
/// From the data to the processes.
pub const PROCESSES: u64 = PROCESS_PAGE * PAGE - DATA_PAGE * PAGE;

/// Bytes of a process.
pub const PROCESS: u64 = 256;
/// Number of processes.
pub const MOST_PROCESSES: u64 = 16;
/// Areas of a process.
pub const AREAS: u64 = 6;

/// Words of the data page, as byte offsets.
pub mod word {
    /// First free page, physical; each holds the next.
    pub const FREE: u64 = 0;
    /// First page that was never used.
    pub const NEXT: u64 = 8;
    /// End of those.
    pub const LIMIT: u64 = 16;
    /// The same three for pages of 2 MiB.
    pub const HUGE_FREE: u64 = 24;
    /// See [`HUGE_FREE`].
    pub const HUGE_NEXT: u64 = 32;
    /// See [`HUGE_FREE`].
    pub const HUGE_LIMIT: u64 = 40;
    /// CR3 as it was at the start.
    pub const BOOT: u64 = 48;
    /// Operations of a turn.
    pub const QUANTUM: u64 = 56;
    /// Sum of the digests of processes that ended.
    pub const RESULT: u64 = 64;
    /// Linear address of the counts.
    pub const COUNTS: u64 = 72;
    /// Page faults handled.
    pub const FAULTS: u64 = 80;
    /// Accesses refused.
    pub const REFUSED: u64 = 88;
    /// Pages copied because somebody else used them too.
    pub const COPIES: u64 = 96;
    /// Loads of CR3 for another process.
    pub const SWITCHES: u64 = 104;
    /// CR3 as it was loaded last.
    pub const LOADED: u64 = 120;
    /// Limit and base of the IDT.
    pub const IDTR: u64 = 0x1f6;
    /// The IDT.
    pub const IDT: u64 = 0x400;
}

/// Words of a process, as byte offsets.
pub mod process {
    /// 0: none, 1: it runs.
    pub const STATE: u64 = 0;
    /// Its tables.
    pub const CR3: u64 = 8;
    /// Its next operation.
    pub const NEXT: u64 = 16;
    /// Its digest.
    pub const DIGEST: u64 = 24;
    /// Its areas: start, end, what is permitted, unused.
    pub const AREAS: u64 = 64;
}

/// An area that may be read: the bit of its flags, and of an entry, where it says user.
pub const READABLE: u64 = 1 << 2;
/// An area that may be written: the bit of its flags, and of an entry.
pub const WRITABLE: u64 = 1 << 1;
/// An area of 2 MiB pages: the bit of its flags, and of an entry.
pub const HUGE: u64 = 1 << 7;

/// Factor of digests: odd, with bits all over.
pub const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Numbers of the operations; see `script.rs`.
pub mod op {
    /// The process ends.
    pub const EXIT: u64 = 0;
    /// An area appears.
    pub const MAP: u64 = 1;
    /// It goes.
    pub const UNMAP: u64 = 2;
    /// It permits something else.
    pub const PROTECT: u64 = 3;
    /// A process like this one appears.
    pub const FORK: u64 = 4;
    /// Words are written.
    pub const WRITE: u64 = 5;
    /// Words are read.
    pub const READ: u64 = 6;
    /// The VMM is told a number.
    pub const MARK: u64 = 7;
}
