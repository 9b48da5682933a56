//! What a machine offers to the VMM: guest memory, vCPUs that run guest programs on page tables
//! the VMM supplies, and TLB flushes that are complete when they return.
//!
//! Two machines implement it: `kvm` (the processor behind /dev/kvm) and `soft` (a software CPU with
//! a TLB and a paging-structure cache of its own). Scenarios know only this file.
//!
//! Vocabulary: the *guest* is the program at CPL 3. Its linear page numbers are the `Gfn`s of the
//! MMU under test; the machine's physical page numbers (offsets into [`Memory`]) are its `Pfn`s.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};

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

impl Memory {
    /// The word at physical address `at`.
    ///
    /// # Panics
    /// If it is misaligned or out of bounds.
    fn word(&self, at: u64) -> &AtomicU64 {
        let fits = at.checked_add(8).is_some_and(|end| end <= self.len);
        assert!(at % 8 == 0 && fits, "no word at {at:#x}");
        let word = self.base.wrapping_add(at as usize);
        // SAFETY: aligned and in bounds (asserted) of a mapping that lives as long as the machine,
        // which whoever holds a `Memory` keeps alive; everybody accesses it atomically.
        unsafe { AtomicU64::from_ptr(word.cast()) }
    }

    /// The word at physical address `at`, which must be aligned and in bounds.
    pub fn load(&self, at: u64) -> u64 {
        // ORDERING[guest-data]: Acquire. What a vCPU stored before this word is seen as well; pairs
        // with the stores of guests.
        self.word(at).load(Ordering::Acquire)
    }

    /// Store the word at physical address `at`, which must be aligned and in bounds.
    pub fn store(&self, at: u64, value: u64) {
        // ORDERING[guest-data]: Release. Pairs with the loads of guests and of `load`.
        self.word(at).store(value, Ordering::Release);
    }

    /// Replace the word at physical address `at`, aligned and in bounds, if it is `old`; was it?
    pub fn exchange(&self, at: u64, old: u64, new: u64) -> bool {
        // ORDERING[guest-data]: AcqRel, and Acquire where it fails. A read and a store of the
        // guest's memory, as above.
        let (done, lost) = (Ordering::AcqRel, Ordering::Acquire);
        self.word(at).compare_exchange(old, new, done, lost).is_ok()
    }
}

/// The host memory that a machine's memory is made of: a file without a name, to be mapped.
#[derive(Debug)]
pub struct MemFd(File);

impl MemFd {
    /// `bytes` zeroes. They cost host memory when they are first touched.
    pub fn new(bytes: u64) -> Result<Self, MachineError> {
        // SAFETY: the name is a NUL-terminated literal; nothing else is passed by pointer.
        let fd = unsafe { libc::memfd_create(c"mini_vmm".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            let source = io::Error::last_os_error();
            return Err(MachineError::System { call: "memfd_create", source });
        }
        // SAFETY: `fd` is open, fresh, and owned by nobody else.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(bytes).map_err(|source| MachineError::System { call: "ftruncate", source })?;
        Ok(Self(file))
    }

    /// Bytes of host memory that it occupies now.
    pub fn allocated(&self) -> Result<u64, MachineError> {
        blocks(&self.0)
    }

    /// Give the host memory of `bytes` back, whatever maps it; they are zeroes from then on.
    pub fn give_back(&self, bytes: Range<u64>) -> Result<(), MachineError> {
        // Not MADV_DONTNEED: of shared memory that forgets translations and frees nothing.
        punch(&self.0, bytes)
    }
}

impl AsRawFd for MemFd {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Bytes that a file occupies, which are fewer than its length where it has holes.
pub fn blocks(file: &File) -> Result<u64, MachineError> {
    let metadata = file.metadata();
    let metadata = metadata.map_err(|source| MachineError::System { call: "fstat", source })?;
    Ok(metadata.blocks() * 512)
}

/// Make a hole of `bytes` of a file: they are zeroes from then on, and what held them is free.
pub fn punch(file: &File, bytes: Range<u64>) -> Result<(), MachineError> {
    let (Ok(start), Ok(len)) = (bytes.start.try_into(), (bytes.end - bytes.start).try_into())
    else {
        return Err(MachineError::Unsupported { detail: format!("a hole at {bytes:#x?}") });
    };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: takes numbers only; what the file's mappings hold changes, which is accessed
    // atomically, as it is by everybody who shares it.
    let failed = unsafe { libc::fallocate(file.as_raw_fd(), mode, start, len) };
    if failed != 0 {
        let source = io::Error::last_os_error();
        return Err(MachineError::System { call: "fallocate(PUNCH_HOLE)", source });
    }
    Ok(())
}

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
/// `rounds` times. [`Op::Churn`] has an order of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// What is done to each page.
    pub op: Op,
    /// Linear address of the first page, page aligned but for [`Op::Churn`].
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
    /// Write a new version of one page after another; see [`Churn`].
    Churn(Churn),
}

/// A program whose progress is in guest memory: it can be stopped anywhere, and whoever has its
/// memory can go on with it and can tell what every page must hold.
///
/// The first page of the range is the *control page*; the word at its byte 0 is the number of
/// the next step. Step `s` picks one of the other pages, `(s * multiplier + offset) mod 2^k`, where
/// `2^k` is the first power of two that counts them all; a number beyond the last page is skipped.
/// So each *round* of `2^k` steps visits each page once. A visit either reads the page or stores
/// the step at byte 0 and `content(gva, step)` at byte 2048; then the next step is stored. A step
/// that was interrupted is done again and stores the same.
///
/// vCPUs may visit the same pages if their words are apart: a range may begin at any word of the
/// first half of its control page, and all the words above are then counted from there.
///
/// Of [`Command`], `rounds` counts rounds from step 0, so a command that was done already ends at
/// once, and `stride` and `tag` are not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Churn {
    /// Odd. 1 visits pages in their order.
    pub multiplier: u64,
    /// Where the first round begins.
    pub offset: u64,
    /// Of 128 pages about so many are written, always the same; the others are read.
    pub written: u64,
    /// Turns of an empty loop after each step.
    pub delay: u64,
}

impl Churn {
    /// Steps of a round over a range of `pages` pages, the control page included.
    ///
    /// # Errors
    /// `Unsupported` without a page to visit, or with an even multiplier.
    pub fn round(&self, pages: u64) -> Result<u64, MachineError> {
        let steps = pages.checked_sub(1).filter(|others| *others > 0);
        match steps.and_then(u64::checked_next_power_of_two) {
            Some(steps) if self.multiplier % 2 == 1 => Ok(steps),
            _ => Err(MachineError::Unsupported {
                detail: format!("{self:?} over {pages} pages: 2 pages at least, odd multiplier"),
            }),
        }
    }

    /// The step at which `rounds` rounds are over.
    ///
    /// # Errors
    /// As [`Churn::round`], and if steps cannot count so many rounds.
    pub fn limit(&self, pages: u64, rounds: u64) -> Result<u64, MachineError> {
        self.round(pages)?.checked_mul(rounds).ok_or_else(|| MachineError::Unsupported {
            detail: format!("{rounds} rounds over {pages} pages: too many steps"),
        })
    }

    /// May a range begin at this address?
    pub fn begins_at(&self, start: u64) -> bool {
        start % 8 == 0 && start % PAGE < PAGE / 2
    }

    /// Is page `index` of the range written? 0 is the control page, which is.
    pub fn writes(&self, index: u64) -> bool {
        match index.checked_sub(1) {
            Some(other) => other.wrapping_mul(FACTOR) >> 57 < self.written,
            None => true,
        }
    }

    /// The last step before `end` that visited page `index` (not the control page), in rounds of
    /// `round` steps. Computed backwards from the page: it shares nothing with the guest's way.
    pub fn last_visit(&self, round: u64, index: u64, end: u64) -> Option<u64> {
        // Newton: the inverse modulo 2^64, doubling the bits that are right.
        let inverse = (0..6)
            .fold(1u64, |x, _| x.wrapping_mul(2u64.wrapping_sub(self.multiplier.wrapping_mul(x))));
        let first = index.wrapping_sub(1).wrapping_sub(self.offset).wrapping_mul(inverse);
        let first = first & (round - 1);
        let last = end.checked_sub(1)?;
        Some(first + last.checked_sub(first)? / round * round)
    }
}

/// The factor of [`content`], and what tells the written pages of [`Churn`] from the others.
pub const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// The word a page must hold after `Op::Write`.
pub const fn content(gva: u64, tag: u64) -> u64 {
    (gva ^ tag.rotate_left(32)).wrapping_mul(FACTOR)
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

    /// Linear pages that the CPU has logged as dirtied since the last call; empty for one without
    /// such a log. Called after every [`run`](Self::run).
    fn take_log(&mut self) -> Vec<u64> {
        Vec::new()
    }

    /// Run until something happens.
    fn run(&mut self) -> Result<Exit, MachineError>;
}

/// The registers of a vCPU that runs machine code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// By their numbers in instructions: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
    pub general: [u64; 16],
    /// The next instruction.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
}

/// Number of rsp among the general registers.
pub const RSP: usize = 4;

/// Why a vCPU that runs machine code stopped. The instruction at rip has done nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeExit {
    /// A page fault.
    Fault {
        /// Faulting linear address (CR2).
        gva: u64,
        /// The #PF error code.
        error: u32,
    },
    /// A general protection fault: the instruction is not for CPL 3.
    Protection,
    /// The processor does not know the instruction.
    Invalid,
}

/// A virtual CPU that runs any machine code at CPL 3. It leaves its guest at each exception; what
/// becomes of that is for the VMM to say, in [`registers`](Self::registers) and memory.
pub trait CodeVcpu: Send {
    /// The registers, between two runs.
    fn registers(&mut self) -> &mut Registers;

    /// Use the tables rooted at page `root` from the next `run` on. Flushes this vCPU's TLB.
    fn set_root(&mut self, root: u64) -> Result<(), MachineError>;

    /// Run until an exception.
    fn run(&mut self) -> Result<CodeExit, MachineError>;

    /// Instructions executed so far, where somebody counts.
    fn instructions(&self) -> Option<u64> {
        None
    }
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

    /// Whether entries of 2 MiB may be made, split and removed while vCPUs run, with the flushes
    /// that the MMU asks for.
    fn has_huge_pages(&self) -> bool {
        true
    }

    /// Bytes of host memory that the machine's memory occupies now.
    fn allocated(&self) -> Result<u64, MachineError> {
        Err(MachineError::Unsupported { detail: "a count of the host memory in use".into() })
    }

    /// Give the host memory of these physical pages back: what they hold is lost, and they are
    /// zeroes when they are touched again. No vCPU has a translation that leads to one.
    fn give_back(&self, pages: &Range<u64>) -> Result<(), MachineError> {
        Err(MachineError::Unsupported { detail: format!("giving pages {pages:x?} back") })
    }

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
