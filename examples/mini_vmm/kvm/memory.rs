//! Guest physical memory: one memfd, mapped twice.
//!
//! The *base* mapping is the VMM's own. The *alias* is what KVM gets as the backing of its memory
//! slot. `madvise(MADV_DONTNEED)` on the alias removes page-table entries of this process but not
//! the data, which lives in the memfd; the kernel's MMU notifier makes KVM drop its translations
//! of those pages first, on every vCPU and wherever it runs. That is the flush of this machine.
//!
//! Guest and VMM use the memory at the same time, so it is accessed with atomics only.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::{mem, ptr};

use super::super::machine::{MachineError, MemFd, Memory, PAGE};

/// The error of the system call that just failed.
pub(super) fn last_error(call: &'static str) -> MachineError {
    MachineError::System { call, source: io::Error::last_os_error() }
}

/// Shared memory mapped by us alone, unmapped on drop.
#[derive(Debug)]
pub(super) struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; its bytes are accessed atomically.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`, shared and writable.
    pub(super) fn new(file: &impl AsRawFd, len: usize) -> Result<Self, MachineError> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: the kernel chooses the place (no hint, no MAP_FIXED), so no existing mapping is
        // touched; every other bad argument is answered with MAP_FAILED.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(last_error("mmap"));
        }
        Ok(Self { start: start.cast(), len })
    }

    /// The same, at a multiple of 2 MiB: then a slot's host and guest addresses agree in the bits
    /// that a 2 MiB page needs them to.
    fn aligned(file: &impl AsRawFd, len: usize) -> Result<Self, MachineError> {
        const ALIGN: usize = 2 << 20;
        let once = Self::new(file, len)?;
        let offset = once.start.align_offset(ALIGN);
        if offset == 0 {
            return Ok(once);
        }
        // A place that has room enough: found by mapping more, of which only the addresses count.
        let room = Self::new(file, len.saturating_add(ALIGN))?;
        let place = room.start.wrapping_add(room.start.align_offset(ALIGN));
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let fd = file.as_raw_fd();
        // SAFETY: MAP_FIXED replaces pages of `room` alone: `place` is at most ALIGN behind its
        // start and it is ALIGN longer than `len`. Nobody else knows those addresses.
        let start = unsafe { libc::mmap(place.cast(), len, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(last_error("mmap"));
        }
        let Self { start: begin, len: whole } = room;
        let before = place as usize - begin as usize;
        mem::forget(room);
        for (at, rest) in [(begin, before), (place.wrapping_add(len), whole - before - len)] {
            if rest > 0 {
                // SAFETY: the ends of `room` on both sides of the new mapping, which nobody uses
                // and nobody will unmap: it was forgotten.
                let _ = unsafe { libc::munmap(at.cast(), rest) };
            }
        }
        Ok(Self { start: start.cast(), len })
    }

    /// First byte.
    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }

    /// The byte at `offset`.
    ///
    /// # Panics
    /// If `offset` is out of bounds.
    pub(super) fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.len, "byte {offset:#x} is outside the mapping");
        let byte = self.start.wrapping_add(offset);
        // SAFETY: in bounds (checked above) of a mapping that lives as long as `self`; any bit
        // pattern is a valid u8; this process accesses the byte through atomics only.
        unsafe { AtomicU8::from_ptr(byte) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is exactly what `new` mapped, and no reference into it outlives
        // `self`: `byte` and `word` borrow it, and `Memory` promises no more than our lifetime.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// The memory of one machine.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    base: Mapping,
    alias: Mapping,
    file: MemFd,
    pages: u64,
}

impl GuestMemory {
    /// `pages` pages of zeroes. They cost host memory when they are first touched.
    pub(crate) fn new(pages: u64) -> Result<Self, MachineError> {
        let bytes =
            pages.checked_mul(PAGE).filter(|bytes| isize::try_from(*bytes).is_ok()).ok_or_else(
                || MachineError::Unsupported { detail: format!("a memory of {pages} pages") },
            )?;
        let file = MemFd::new(bytes)?;
        let len = bytes as usize;
        let (base, alias) = (Mapping::aligned(&file, len)?, Mapping::new(&file, len)?);
        Ok(Self { base, alias, file, pages })
    }

    /// Bytes of host memory in use.
    pub(super) fn allocated(&self) -> Result<u64, MachineError> {
        self.file.allocated()
    }

    /// Gives the host memory of these physical pages back. The kernel takes them out of both
    /// mappings, and so out of KVM, by itself. Pages beyond the memory are ignored.
    pub(super) fn give_back(&self, pages: &Range<u64>) -> Result<(), MachineError> {
        let end = pages.end.min(self.pages);
        if pages.start >= end {
            return Ok(());
        }
        self.file.give_back(pages.start * PAGE..end * PAGE)
    }

    /// The VMM's view.
    pub(super) fn memory(&self) -> Memory {
        Memory { base: self.base.start(), len: self.bytes() }
    }

    /// Bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.base.len as u64
    }

    /// Address of the alias, for KVM.
    pub(crate) fn alias_address(&self) -> u64 {
        self.alias.start() as u64
    }

    /// The word at physical address `at`.
    ///
    /// # Panics
    /// If `at` is misaligned or out of bounds.
    pub(super) fn word(&self, at: u64) -> &AtomicU64 {
        let in_bounds = at.checked_add(8).is_some_and(|end| end <= self.bytes());
        assert!(at % 8 == 0 && in_bounds, "no word at {at:#x}");
        let word = self.base.start().wrapping_add(at as usize);
        // SAFETY: aligned (the mapping starts on a page) and in bounds, checked above; the mapping
        // lives as long as `self`; any bit pattern is a valid u64; this process accesses the
        // memory through atomics only.
        unsafe { AtomicU64::from_ptr(word.cast()) }
    }

    /// Copies `bytes` to physical address `at`: for the stub, before any vCPU runs.
    ///
    /// # Panics
    /// If the bytes do not fit.
    pub(crate) fn store_bytes(&self, at: u64, bytes: &[u8]) {
        for (address, byte) in (at as usize..).zip(bytes) {
            // ORDERING[kvm-stub]: Relaxed. The vCPU that reads it starts after `KvmMachine::new`
            // has returned: whatever hands the machine to its thread orders the two.
            self.base.byte(address).store(*byte, Ordering::Relaxed);
        }
    }

    /// Makes KVM forget its translations of these physical pages. Complete on return, on all
    /// vCPUs; the data stays. Pages beyond the memory are ignored.
    pub(super) fn forget(&self, pages: &Range<u64>) -> Result<(), MachineError> {
        let end = pages.end.min(self.pages);
        if pages.start >= end {
            return Ok(());
        }
        let start = self.alias.start().wrapping_add((pages.start * PAGE) as usize);
        let len = ((end - pages.start) * PAGE) as usize;
        // SAFETY: the range lies in the alias (clipped above). For a shared file mapping
        // MADV_DONTNEED keeps the data, and this process never dereferences the alias.
        let failed = unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) };
        if failed != 0 {
            return Err(last_error("madvise(MADV_DONTNEED)"));
        }
        Ok(())
    }
}
