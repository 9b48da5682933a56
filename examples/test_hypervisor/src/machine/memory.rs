//! Physical memory: the direct map, and blocks of it to give away.
//!
//! Owns [`Memory`] (2 MiB blocks that belong to whoever holds the value) and what else reads
//! physical addresses: tables of the firmware, and the page below 1 MiB that other CPUs begin in.
//! The direct map is the identity and never changes, so an address in it is a physical address.
//!
//! Lock: one, around the list of blocks; a leaf.

use core::slice;
use core::sync::atomic::{AtomicU64, Ordering};

use mmu_core::addr::Pfn;

use super::heap;
use super::lock::Lock;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of a block.
pub const BLOCK: u64 = 2 << 20;
/// Bytes of the heap.
const HEAP: u64 = 24 << 20;
/// What the direct map maps as memory ends here at the latest; devices follow.
const MAP_END: u64 = 3 << 30;
/// As many blocks as that makes.
const MAX_BLOCKS: usize = (MAP_END / BLOCK) as usize;
/// Least memory that the suites can do with.
const LEAST: u64 = 200 << 20;

unsafe extern "C" {
    /// One past the image; a symbol of link.ld.
    safe static image_end: u8;
}

/// Which blocks are free.
struct Blocks {
    free: [bool; MAX_BLOCKS],
}

static BLOCKS: Lock<Blocks> = Lock::new(Blocks { free: [false; MAX_BLOCKS] });

/// Take possession of the memory behind the image, up to `end`.
///
/// # Panics
/// When it is less than the suites need.
pub fn begin(end: u64) {
    let heap = (&raw const image_end as u64).next_multiple_of(BLOCK);
    let first = heap + HEAP;
    let end = end.min(MAP_END) / BLOCK * BLOCK;
    assert!(end >= LEAST, "{} MiB of memory, {} needed", end >> 20, LEAST >> 20);
    // SAFETY: `heap..first` is RAM (below `end`), mapped writable for good, behind the image, and
    // kept out of the list of blocks below.
    unsafe { heap::begin(heap as usize, HEAP as usize) };
    let mut blocks = BLOCKS.lock();
    let range = (first / BLOCK) as usize..(end / BLOCK) as usize;
    blocks.free[range].fill(true);
}

/// Contiguous memory, given back when this drops. Shared with guests and page walkers, so that it
/// is seen as atomic words only.
#[derive(Debug)]
pub struct Memory {
    start: u64,
    blocks: usize,
}

impl Memory {
    /// `bytes` rounded up to blocks, zeroed.
    ///
    /// # Panics
    /// When there is not so much left.
    pub fn new(bytes: u64) -> Self {
        let count = bytes.div_ceil(BLOCK) as usize;
        let mut blocks = BLOCKS.lock();
        let fits = |at: &usize| blocks.free[*at..at + count].iter().all(|free| *free);
        let at = (0..=MAX_BLOCKS - count).find(fits);
        let at = at.unwrap_or_else(|| panic!("no {} MiB of memory left", bytes >> 20));
        blocks.free[at..at + count].fill(false);
        drop(blocks);
        let memory = Self { start: at as u64 * BLOCK, blocks: count };
        memory.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
        memory
    }

    /// Its first page.
    pub const fn first(&self) -> Pfn {
        Pfn::new(self.start / PAGE)
    }

    /// Physical address of its first byte.
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// Bytes.
    pub const fn bytes(&self) -> u64 {
        self.blocks as u64 * BLOCK
    }

    /// All of it.
    pub fn words(&self) -> &[AtomicU64] {
        let words = (self.bytes() / 8) as usize;
        // SAFETY: the blocks are RAM in the direct map, 8-byte aligned, initialised whatever they
        // hold, and belong to `self` alone as long as it lives. Others (guests, page walkers)
        // change them under us, which is what atomics are for.
        unsafe { slice::from_raw_parts(self.start as *const AtomicU64, words) }
    }

    /// The word at byte `offset`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn word(&self, offset: u64) -> &AtomicU64 {
        &self.words()[(offset / 8) as usize]
    }

    /// Write `bytes` to byte `offset`, a multiple of 8; the rest of the last word becomes 0.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        for (index, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let at = offset + index as u64 * 8;
            self.word(at).store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let at = (self.start / BLOCK) as usize;
        BLOCKS.lock().free[at..at + self.blocks].fill(true);
    }
}

/// Physical address of something in the image or on the heap.
pub fn physical<T>(at: &T) -> u64 {
    core::ptr::from_ref(at) as u64
}

/// The direct map of the lowest memory.
pub fn low_memory() -> *const u8 {
    // Not null for the compiler's sake: nobody asks for the byte at address 0.
    core::ptr::without_provenance(0)
}

/// Read firmware's bytes at `at`.
pub fn read_u8(at: u64) -> u8 {
    assert!((8..MAP_END).contains(&at), "{at:#x} is not memory");
    // SAFETY: mapped for good (asserted), any byte is a u8; volatile, because firmware wrote it
    // behind the compiler's back.
    unsafe { (at as *const u8).read_volatile() }
}

/// Read a little-endian word of firmware's; need not be aligned.
pub fn read_u32(at: u64) -> u32 {
    (0..4).fold(0, |word, i| word | u32::from(read_u8(at + i)) << (8 * i))
}

/// As [`read_u32`].
pub fn read_u64(at: u64) -> u64 {
    u64::from(read_u32(at)) | u64::from(read_u32(at + 4)) << 32
}

/// The NUL-terminated text at `at`, at most `most` bytes long; empty if it is no text.
pub fn read_text(at: u64, most: u64) -> &'static str {
    let bytes = (0..most).find(|i| read_u8(at + i) == 0).unwrap_or(most);
    // SAFETY: mapped for good (`read_u8` asserted the bounds of both ends), and nothing is written
    // there any more: loaders leave the text outside the image and below `begin`'s memory, or in
    // low memory.
    let text = unsafe { slice::from_raw_parts(at as *const u8, bytes as usize) };
    core::str::from_utf8(text).unwrap_or("")
}

/// Copy the code `begin..end` to the page `to` below 1 MiB.
pub fn copy_low(to: usize, (begin, end): (*const u8, *const u8)) {
    let bytes = end as usize - begin as usize;
    assert!(to >= 0x8000 && bytes <= PAGE as usize && to + bytes <= 0x9_0000);
    let to: *mut u8 = core::ptr::without_provenance_mut(to);
    // SAFETY: the source is a part of the image; the target is a page of low memory (asserted)
    // that nobody uses: the boot sector's leavings end below it, the BIOS's data begin above.
    unsafe { core::ptr::copy_nonoverlapping(begin, to, bytes) };
}
