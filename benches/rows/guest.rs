//! Walks over a guest's own tables.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use mmu_core::addr::{Gpa, Gva, PAGE_SIZE};
use shadow_mmu::guest::{
    EntryWidth, EptCpu, Exchange, GuestControls, GuestCpu, GuestMem, GuestRoot, GuestWalker,
    NestedTables, NestedWalker, NotMemory, Operation, Privilege, Request,
};

use crate::harness::{Bench, time};

/// Present, writable, user, accessed, dirty.
const OPEN: u64 = 0x67;
/// Read, write, execute, write-back, accessed, dirty.
const NESTED: u64 = 0x337;

/// Guest memory that holds tables and nothing else.
pub struct Tables {
    words: Vec<AtomicU64>,
    /// Page of the guest's PML4, and of the hypervisor's.
    root: u64,
    eptp: u64,
}

impl GuestMem for Tables {
    #[inline]
    fn read(&self, at: Gpa, _: EntryWidth) -> Result<u64, NotMemory> {
        let word = self.words.get((at.get() / 8) as usize).ok_or(NotMemory { at })?;
        Ok(word.load(Ordering::Acquire))
    }

    #[inline]
    fn compare_exchange(
        &self,
        at: Gpa,
        _: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        let word = self.words.get((at.get() / 8) as usize).ok_or(NotMemory { at })?;
        Ok(match word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Exchange::Done,
            Err(_) => Exchange::Lost,
        })
    }
}

impl Tables {
    /// Tables that map `pages` pages, linear to physical as it is, and a nested dimension that maps
    /// all of that and the tables in the same way.
    pub fn new(pages: u64) -> Self {
        let mut words = Vec::new();
        // The tables stand from page 0 on; entries lead into the range they map, which has nothing
        // else in it.
        let mut tables = 0;
        let root = dimension(&mut words, &mut tables, pages, OPEN);
        let eptp = dimension(&mut words, &mut tables, pages, NESTED);
        let words = words.into_iter().map(AtomicU64::new).collect();
        Self { words, root, eptp }
    }

    /// Page of the guest's top table.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Page of the hypervisor's top table.
    pub fn eptp(&self) -> u64 {
        self.eptp
    }

    pub fn walk(&self, pages: impl Iterator<Item = u64>) {
        let walker = GuestWalker::new(&GuestCpu::baseline(), GuestControls::LONG);
        let walker = walker.expect("a processor that exists");
        let root = GuestRoot::Cr3(self.root * PAGE_SIZE);
        let write = Request::new(Operation::Write, Privilege::User);
        for page in pages {
            let gva = Gva::new(page * PAGE_SIZE);
            let walk = walker.walk(self, &root, gva, write).expect("mapped");
            assert_eq!(black_box(walk).path.gfn.get(), page);
        }
    }

    pub fn walk_nested(&self, pages: impl Iterator<Item = u64>) {
        let walker = GuestWalker::new(&GuestCpu::baseline(), GuestControls::LONG);
        let walker = walker.expect("a processor that exists");
        let ept = NestedWalker::ept(mmu_core::addr::Level::L4, &EptCpu::baseline());
        let ept = ept.expect("four levels");
        let tables = NestedTables::new(&ept, self.eptp * PAGE_SIZE);
        let root = GuestRoot::Cr3(self.root * PAGE_SIZE);
        let write = Request::new(Operation::Write, Privilege::User);
        for page in pages {
            let gva = Gva::new(page * PAGE_SIZE);
            let walk = walker.walk_nested(self, &tables, &root, gva, write).expect("mapped");
            assert_eq!(black_box(walk).page.path.gfn.get(), page);
        }
    }
}

/// Four levels of tables that map pages `0..pages` to themselves; returns the root's page.
fn dimension(words: &mut Vec<u64>, tables: &mut u64, pages: u64, flags: u64) -> u64 {
    let memory_type = if flags == NESTED { 0x30 } else { 0 };
    let (mut first, mut count) = (0, pages);
    for level in 1..=4 {
        let page = *tables;
        let entries = count.div_ceil(512) * 512;
        let flags = if level == 1 { flags } else { flags & !memory_type };
        let value = |entry| if entry < count { ((first + entry) * PAGE_SIZE) | flags } else { 0 };
        words.extend((0..entries).map(value));
        *tables += entries / 512;
        (first, count) = (page, entries / 512);
    }
    assert_eq!(count, 1, "one root");
    first
}

/// `guest_walk`: four levels, one dimension; `guest_walk_2d`: 24 reads in two.
pub fn rows(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let pages = bench.pages();
    let tables = Tables::new(pages);
    if wanted("guest_walk") {
        bench.repeat("guest_walk", pages, || time(|| tables.walk(0..pages)));
    }
    if wanted("guest_walk_2d") {
        bench.repeat("guest_walk_2d", pages, || time(|| tables.walk_nested(0..pages)));
    }
}
