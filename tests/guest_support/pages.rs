//! Guest memory of whole pages, for tables of any shape: reads and changes counted, pages that are
//! no memory or read-only, and others that interfere.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use mmu_core::addr::{Gpa, PAGE_SIZE};
use mmu_model::GuestWords;
use shadow_mmu::guest::{EntryWidth, Exchange, GuestMem, NotMemory};

/// Sparse memory: pages that were never written are not there.
#[derive(Default)]
pub struct Pages {
    words: RefCell<BTreeMap<u64, Vec<u8>>>,
    /// Pages that cannot be written.
    read_only: RefCell<Vec<u64>>,
    /// Addresses read, in order.
    pub log: RefCell<Vec<u64>>,
    /// Address, size and old value of the words changed by walks, in order.
    pub journal: RefCell<Vec<(u64, u8, u64)>>,
    /// Compare-exchanges asked for.
    pub exchanges: Cell<u64>,
    /// Compare-exchanges still to be lost.
    pub lose: Cell<u64>,
    /// Called with the number of each read, before it.
    pub before_read: RefCell<Option<Hook>>,
}

/// Memory, the number of the read, its address.
type Hook = Box<dyn Fn(&Pages, usize, u64)>;

impl Pages {
    pub fn new() -> Self {
        Self::default()
    }

    /// A page of zeroes.
    pub fn add(&self, page: u64) {
        self.words.borrow_mut().entry(page).or_insert_with(|| vec![0; PAGE_SIZE as usize]);
    }

    pub fn remove(&self, page: u64) {
        self.words.borrow_mut().remove(&page);
    }

    pub fn protect(&self, page: u64) {
        self.read_only.borrow_mut().push(page);
    }

    pub fn set(&self, at: u64, bytes: u8, value: u64) {
        let mut words = self.words.borrow_mut();
        let page = words.entry(at / PAGE_SIZE).or_insert_with(|| vec![0; PAGE_SIZE as usize]);
        let offset = (at % PAGE_SIZE) as usize;
        let bytes = usize::from(bytes);
        page[offset..offset + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    }

    pub fn get(&self, at: u64, bytes: u8) -> Option<u64> {
        let words = self.words.borrow();
        let page = words.get(&(at / PAGE_SIZE))?;
        let offset = (at % PAGE_SIZE) as usize;
        let mut word = [0; 8];
        let bytes = usize::from(bytes);
        word[..bytes].copy_from_slice(page.get(offset..offset + bytes)?);
        Some(u64::from_le_bytes(word))
    }

    /// Undo what walks have changed.
    pub fn roll_back(&self) {
        let mut journal = self.journal.borrow_mut();
        while let Some((at, bytes, old)) = journal.pop() {
            self.set(at, bytes, old);
        }
    }

    pub fn forget(&self) {
        self.log.borrow_mut().clear();
        self.journal.borrow_mut().clear();
        self.exchanges.set(0);
    }
}

const fn bytes(width: EntryWidth) -> u8 {
    match width {
        EntryWidth::Four => 4,
        EntryWidth::Eight => 8,
    }
}

impl GuestMem for Pages {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        let number = self.log.borrow().len();
        if let Some(interfere) = &*self.before_read.borrow() {
            interfere(self, number, at.get());
        }
        self.log.borrow_mut().push(at.get());
        assert_eq!(at.get() % width.bytes(), 0, "{at} is not aligned");
        self.get(at.get(), bytes(width)).ok_or(NotMemory { at })
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        self.exchanges.set(self.exchanges.get() + 1);
        let found = self.get(at.get(), bytes(width)).ok_or(NotMemory { at })?;
        if self.read_only.borrow().contains(&(at.get() / PAGE_SIZE)) {
            return Ok(Exchange::ReadOnly);
        }
        if self.lose.get() > 0 {
            self.lose.set(self.lose.get() - 1);
            return Ok(Exchange::Lost);
        }
        if found != old {
            return Ok(Exchange::Lost);
        }
        self.journal.borrow_mut().push((at.get(), bytes(width), found));
        self.set(at.get(), bytes(width), new);
        Ok(Exchange::Done)
    }
}

impl GuestWords for Pages {
    fn word(&self, pa: u64, bytes: u8) -> Option<u64> {
        self.get(pa, bytes)
    }
}
