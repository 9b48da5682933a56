//! Guest memory: the low block and the data, at the addresses where they are.
//!
//! Owns [`Ram`], which walks over guest tables read ([`GuestMem`]). No slot is logged, so nobody
//! has to be told of the bits that walks set. Atomic words; no locks.

use core::sync::atomic::{AtomicU64, Ordering};

use mmu_core::addr::Gpa;
use shadow_mmu::guest::{EntryWidth, Exchange, GuestMem, NotMemory};

use crate::guest::layout::LOW_BYTES;
use crate::machine::memory::{Memory, PAGE};

/// Where in the low block tables begin, and where they end.
const TABLES: u64 = 0x2_0000;
const TABLES_END: u64 = 0x10_0000;

/// A guest's memory. See the file's head.
#[derive(Debug)]
pub struct Ram {
    /// Code, stacks, tables.
    pub low: Memory,
    /// Data.
    pub data: Memory,
    /// The next page for a table.
    next: AtomicU64,
}

impl Ram {
    /// With `bytes` of data.
    pub fn new(bytes: u64) -> Self {
        let (low, data) = (Memory::new(LOW_BYTES), Memory::new(bytes));
        Self { low, data, next: AtomicU64::new(TABLES) }
    }

    /// Guest physical address of an empty page for a table.
    ///
    /// # Panics
    /// When there is none left.
    pub fn table(&self) -> u64 {
        let offset = self.next.fetch_add(PAGE, Ordering::Relaxed);
        assert!(offset < TABLES_END, "no room for more guest tables");
        self.low.start() + offset
    }

    /// The word at `gpa`; `None` outside.
    pub fn word(&self, gpa: u64) -> Option<&AtomicU64> {
        [&self.low, &self.data].into_iter().find_map(|memory| {
            let offset = gpa.checked_sub(memory.start())?;
            (offset < memory.bytes()).then(|| memory.word(offset))
        })
    }

    /// The word at `gpa`, which is there.
    ///
    /// # Panics
    /// When it is not.
    pub fn at(&self, gpa: u64) -> &AtomicU64 {
        self.word(gpa).unwrap_or_else(|| panic!("{gpa:#x} is not the guest's"))
    }
}

/// The part of a word that an entry at `gpa` is: shift and mask.
const fn part(gpa: u64, width: EntryWidth) -> (u64, u64) {
    match width {
        EntryWidth::Eight => (0, u64::MAX),
        EntryWidth::Four => (gpa % 8 * 8, u32::MAX as u64),
    }
}

impl GuestMem for Ram {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        let word = self.word(at.get()).ok_or(NotMemory { at })?;
        let (shift, mask) = part(at.get(), width);
        Ok(word.load(Ordering::Acquire) >> shift & mask)
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        let word = self.word(at.get()).ok_or(NotMemory { at })?;
        let (shift, mask) = part(at.get(), width);
        // The other half of the word may change meanwhile: only the entry's counts.
        let exchanged = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
            let rest = now & !(mask << shift);
            (now >> shift & mask == old).then_some(rest | new << shift)
        });
        Ok(if exchanged.is_ok() { Exchange::Done } else { Exchange::Lost })
    }
}
