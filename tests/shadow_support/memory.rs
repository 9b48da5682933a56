//! What a guest has for memory, and the host behind it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mmu_core::addr::{Gpa, Level, Pfn};
use mmu_core::traits::HostPage;
use shadow_mmu::guest::{EntryWidth, Exchange, GuestMem, NotMemory};

use crate::common::DATA;

/// Guest memory: words that the guest, its tables' walker and the host see. Only the first frames
/// are there; others hold nothing but zeros.
pub struct Memory {
    words: Vec<AtomicU64>,
    pages: u64,
    is_there: AtomicBool,
}

impl Memory {
    /// Memory of `pages`, of which `tables` are there.
    pub fn new(pages: u64, tables: u64) -> Self {
        let words = (0..tables * 512).map(|_| AtomicU64::new(0)).collect();
        Self { words, pages, is_there: AtomicBool::new(true) }
    }

    /// Let it be memory, or none: its slot came or went.
    pub fn set_there(&self, there: bool) {
        self.is_there.store(there, Ordering::SeqCst);
    }

    pub fn get(&self, at: u64, bytes: u64) -> Option<u64> {
        assert_eq!(at % bytes, 0);
        if at >> 12 >= self.pages || !self.is_there.load(Ordering::SeqCst) {
            return None;
        }
        let word = self.words.get((at / 8) as usize).map_or(0, |word| word.load(Ordering::SeqCst));
        Some(if bytes == 8 { word } else { word >> (at % 8 * 8) & u64::from(u32::MAX) })
    }

    /// Only tables are written.
    pub fn set(&self, at: u64, bytes: u64, value: u64) {
        let word = &self.words[(at / 8) as usize];
        let (shift, mask) =
            if bytes == 8 { (0, u64::MAX) } else { (at % 8 * 8, u64::from(u32::MAX)) };
        let old = word.load(Ordering::SeqCst);
        word.store(old & !(mask << shift) | value << shift, Ordering::SeqCst);
    }
}

impl GuestMem for Memory {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        self.get(at.get(), width.bytes()).ok_or(NotMemory { at })
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        // Nobody else writes meanwhile: a world has one thread.
        if self.read(at, width)? != old {
            return Ok(Exchange::Lost);
        }
        self.set(at.get(), width.bytes(), new);
        Ok(Exchange::Done)
    }
}

/// What the host has behind each block of 2 MiB: first frame, and how large its pages are.
pub struct Backing(Vec<AtomicU64>);

impl Backing {
    pub fn new(blocks: u64) -> Self {
        Self((0..blocks).map(AtomicU64::new).collect())
    }

    /// Blocks get a frame of their own each time, huge or small.
    pub fn set(&self, block: u64, number: u64, huge: bool) {
        self.0[block as usize].store(number << 1 | u64::from(huge), Ordering::SeqCst);
    }

    pub fn page(&self, gfn: u64) -> Option<HostPage> {
        let word = self.0.get((gfn / 512) as usize)?.load(Ordering::SeqCst);
        let (base, huge) = (DATA + (word >> 1) * 512, word & 1 != 0);
        // Small pages lie in no order.
        let offset = if huge { gfn % 512 } else { (gfn + 77) % 512 };
        let level = if huge { Level::L2 } else { Level::L1 };
        Some(HostPage { pfn: Pfn::new(base + offset), writable: true, level })
    }

    pub fn pfn(&self, gfn: u64) -> Option<u64> {
        self.page(gfn).map(|page| page.pfn.get())
    }
}
