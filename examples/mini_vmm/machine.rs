//! What a machine offers to the VMM: guest memory, vCPUs that run guest programs on page tables
//! the VMM supplies, and TLB flushes that are complete when they return.
//!
//! Two machines implement it: `kvm` (the processor behind /dev/kvm) and `soft` (a software CPU with
//! a TLB and a paging-structure cache of its own). Scenarios know only this file.
//!
//! Vocabulary: the *guest* is the program at CPL 3. Its linear page numbers are the `Gfn`s of the
//! MMU under test; the machine's physical page numbers (offsets into [`Memory`]) are its `Pfn`s.

use std::fmt;
use std::ops::Range;

/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// The machine's physical memory as the VMM sees it: one shared mapping, byte 0 is physical
/// address 0. Guest and VMM use it at the same time, so it is only ever accessed atomically.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// First byte, page aligned, valid for `len` bytes as long as the machine lives.
    pub base: *mut u8,
    /// Bytes.
    pub len: u64,
}

// SAFETY: the mapping is shared memory that lives as long as the machine, and every access goes
// through atomics (see `host.rs` and the machines).
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// Where things stand in physical memory. Decided by the scenario, obeyed by the machine.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Pages the machine itself may use (stub, GDT, IDT, TSS, program, stacks). Starts at 0.
    pub stub: Range<u64>,
    /// Pages that page tables are made of.
    pub tables: Range<u64>,
    /// Pages of guest data.
    pub data: Range<u64>,
}

/// A guest program: visits `pages` pages starting at linear address `start`, `stride` pages apart,
/// `rounds` times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// What is done to each page.
    pub op: Op,
    /// Linear address of the first page, page aligned.
    pub start: u64,
    /// Number of pages visited per round.
    pub pages: u64,
    /// Distance between visited pages, in pages (1 = every page). Never 0.
    pub stride: u64,
    /// Mixed into the expected content: the word at byte 0 of page `gva` is `content(gva, tag)`.
    pub tag: u64,
    /// How often the range is walked. Never 0.
    pub rounds: u64,
}

/// What a [`Command`] does to each page. The word at byte 0 of the page is the only one touched
/// by `Read` and `Increment`; `Write` and `Verify` touch the words at byte 0 and at byte 2048.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Store `content(gva, tag)`.
    Write,
    /// Load and ignore.
    Read,
    /// Load and compare with `content(gva, tag)`; a difference counts as a mismatch.
    Verify,
    /// Add 1 to the word at byte 8 (plain load, add, store: one vCPU owns the page).
    Increment,
}

/// The word a page must hold after `Op::Write`.
pub const fn content(gva: u64, tag: u64) -> u64 {
    (gva ^ tag.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What a finished [`Command`] reports. Computed by the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Pages visited, over all rounds.
    pub pages: u64,
    /// Pages whose content differed (`Op::Verify`).
    pub mismatches: u64,
    /// Linear address of the first mismatch, 0 when there is none.
    pub first_mismatch: u64,
}

/// Why a vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The command finished.
    Done(Report),
    /// A page fault. The access is retried by the next [`Vcpu::run`].
    Fault {
        /// Faulting linear address (CR2).
        gva: u64,
        /// The #PF error code: P 1, W 2, U 4, RSVD 8, I 16.
        error: u32,
    },
    /// [`Machine::kick_all`] or a signal: nothing happened to the guest.
    Kicked,
}

/// One virtual CPU. Owned by its thread.
pub trait Vcpu: Send {
    /// Give it a program. It must be idle (fresh, or the last exit was `Done`).
    fn start(&mut self, command: &Command) -> Result<(), MachineError>;

    /// Use the tables rooted at page `root` from the next `run` on. Flushes this vCPU's TLB.
    fn set_root(&mut self, root: u64) -> Result<(), MachineError>;

    /// Run until something happens.
    fn run(&mut self) -> Result<Exit, MachineError>;
}

/// What a flush must forget.
#[derive(Clone, Copy, Debug)]
pub struct Flush<'a> {
    /// Linear pages whose translations changed.
    pub gfns: &'a [Range<u64>],
    /// Physical data pages those translations led to (empty: not known, flush by `gfns` alone or
    /// everything).
    pub pfns: &'a [Range<u64>],
    /// Physical pages of tables that were unlinked.
    pub tables: &'a [u64],
    /// Every translation of the machine, and every vCPU out of the guest.
    pub everything: bool,
}

/// A machine: its memory, its vCPUs, its TLBs.
pub trait Machine: Send + Sync {
    /// "kvm" or "soft".
    fn name(&self) -> &'static str;

    /// One line for people: what walks the tables and how flushes are done.
    fn description(&self) -> String;

    /// Physical memory.
    fn memory(&self) -> Memory;

    /// Create vCPU `id` (0-based, each id once).
    fn vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, MachineError>;

    /// When this returns, no vCPU uses a translation named by `flush` that was cached before the
    /// call. vCPUs may run all the while. Callable from any thread that is not inside
    /// [`Vcpu::run`], several at once.
    fn flush(&self, flush: &Flush<'_>) -> Result<(), MachineError>;

    /// Make every vCPU that is inside [`Vcpu::run`] return soon (`Exit::Kicked` unless something
    /// else happens first). A vCPU outside `run` is not affected by a kick from before.
    fn kick_all(&self);

    /// Linear pages that must be mapped, supervisor and user, to these physical pages in every
    /// root a vCPU loads: (linear page, physical page, count). Empty for a machine without stub.
    fn pinned(&self) -> Vec<(u64, u64, u64)>;
}

/// A machine failed; the scenario cannot go on.
#[derive(Debug)]
#[non_exhaustive]
pub enum MachineError {
    /// A system call failed. Names the call and what it was for.
    System {
        /// The call, such as `KVM_CREATE_VM`.
        call: &'static str,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// The vCPU stopped for a reason that no guest program of ours causes.
    UnexpectedExit {
        /// Which vCPU.
        vcpu: u32,
        /// The exit and the registers, in words.
        detail: String,
    },
    /// The layout or a command does not fit the machine.
    Unsupported {
        /// What, and what to do instead.
        detail: String,
    },
}

impl fmt::Display for MachineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System { call, source } => write!(f, "{call}: {source}"),
            Self::UnexpectedExit { vcpu, detail } => {
                write!(f, "vCPU {vcpu} stopped unexpectedly: {detail}")
            }
            Self::Unsupported { detail } => write!(f, "not supported: {detail}"),
        }
    }
}

impl std::error::Error for MachineError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::System { source, .. } => Some(source),
            _ => None,
        }
    }
}
