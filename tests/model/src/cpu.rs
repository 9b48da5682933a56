//! [`SoftCpu`]: a walker behind a TLB and a paging-structure cache.
//!
//! What is cached is used, however stale, until it is flushed, evicted, or an access through it
//! faults. The last is the rule of the manuals: a page fault or EPT violation forgets the cached
//! translations of its address, so that a retried access sees the tables as they are.

use std::ops::Range;

use crate::access::Access;
use crate::cache::Capacity;
use crate::format::{Format, Rules};
use crate::phys::PhysMem;
use crate::tlb::{Psc, Tlb, TlbEntry};
use crate::walk::{AccessedOn, Fault, Path, Translation, Walker};

/// What happens to an access that a cached translation does not permit. Hardware may do either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Denial {
    /// It faults; if the tables permit it by now, the fault is spurious.
    #[default]
    Fault,
    /// The tables are walked again.
    Walk,
}

/// The caches of a [`SoftCpu`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caches {
    /// Size of the TLB.
    pub tlb: Capacity,
    /// Size of the paging-structure cache.
    pub psc: Capacity,
    /// Decides what is evicted.
    pub seed: u64,
}

impl Caches {
    /// Caches that never evict: every forgotten flush shows.
    #[must_use]
    pub const fn unlimited() -> Self {
        Self { tlb: Capacity::Unlimited, psc: Capacity::Unlimited, seed: 0 }
    }

    /// Caches of the size of a present-day core's.
    #[must_use]
    pub const fn realistic(seed: u64) -> Self {
        Self { tlb: Capacity::Entries(2048), psc: Capacity::Entries(64), seed }
    }
}

/// Counters since the CPU was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Accesses served by the TLB.
    pub hits: u64,
    /// Walks, whatever their end.
    pub walks: u64,
    /// Walks that started below the root.
    pub short_walks: u64,
    /// Walks made to set the dirty bit behind a cached clean translation.
    pub dirty_walks: u64,
    /// Entries read by walks.
    pub entries_read: u64,
    /// Attempts that walks lost to changes by others.
    pub restarts: u64,
    /// Faults, cached denials included.
    pub faults: u64,
    /// Accesses denied by a cached translation.
    pub denials: u64,
}

/// A processor's translation machinery.
#[derive(Clone, Debug)]
pub struct SoftCpu {
    walker: Walker,
    root: u64,
    tlb: Tlb,
    psc: Psc,
    denial: Denial,
    stats: Stats,
    log: Option<Vec<u64>>,
}

impl SoftCpu {
    /// A processor with empty caches. `root` is the value of CR3, nCR3 or EPTP.
    #[must_use]
    pub fn new(format: &Format, root: u64, caches: Caches) -> Self {
        Self {
            walker: Walker::new(format),
            root,
            tlb: Tlb::new(caches.tlb, caches.seed),
            psc: Psc::new(caches.psc, caches.seed.wrapping_add(1)),
            denial: Denial::default(),
            stats: Stats::default(),
            log: None,
        }
    }

    /// Note, from now on, the page of each access whose walk sets a dirty bit (page-modification
    /// logging). Real logs have room for 512 pages and leave the guest when it is used up; here
    /// whoever runs the processor looks at [`SoftCpu::logged`] in time.
    pub fn log_dirtied(&mut self) {
        self.log.get_or_insert_default();
    }

    /// Number of pages in the log.
    #[must_use]
    pub fn logged(&self) -> usize {
        self.log.as_ref().map_or(0, Vec::len)
    }

    /// Empty the log: numbers of 4 KiB pages, in the order of the writes.
    pub fn take_log(&mut self) -> Vec<u64> {
        self.log.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The same processor with other choices where hardware has a choice.
    #[must_use]
    pub const fn with_choices(mut self, accessed_on: AccessedOn, denial: Denial) -> Self {
        self.walker = self.walker.with_accessed_on(accessed_on);
        self.denial = denial;
        self
    }

    /// Translate `address` for one access, from the caches if they can.
    ///
    /// # Errors
    ///
    /// The fault that hardware would deliver. The caches forget the address.
    #[inline]
    pub fn access<M: PhysMem + ?Sized>(
        &mut self,
        mem: &M,
        address: u64,
        access: Access,
    ) -> Result<u64, Fault> {
        if let Some(&entry) = self.tlb.lookup(address) {
            let rules = self.walker.rules();
            if entry.permissions.contains(rules.needs(access)) {
                if entry.dirty || !rules.writes(access) {
                    self.stats.hits += 1;
                    return Ok(entry.physical(address));
                }
                self.stats.dirty_walks += 1;
            } else {
                self.stats.denials += 1;
                if self.denial == Denial::Fault {
                    self.stats.faults += 1;
                    self.forget_address(address);
                    let permissions = entry.permissions;
                    return Err(self.walker.denied(entry.level, permissions, address, access));
                }
            }
        }
        self.walk(mem, address, access).map(|translation| translation.pa)
    }

    /// Walk as if for `access`, without the TLB, and cache what was found; do not fault. A
    /// processor may do this at any time for any address.
    pub fn speculate<M: PhysMem + ?Sized>(&mut self, mem: &M, address: u64, access: Access) {
        let (result, path) = self.walk_only(mem, address, access);
        self.remember(address, result.ok().as_ref(), &path);
    }

    #[inline(never)]
    fn walk<M: PhysMem + ?Sized>(
        &mut self,
        mem: &M,
        address: u64,
        access: Access,
    ) -> Result<Translation, Fault> {
        let (result, path) = self.walk_only(mem, address, access);
        match &result {
            Ok(translation) => self.remember(address, Some(translation), &path),
            Err(_) => {
                self.stats.faults += 1;
                self.forget_address(address);
            }
        }
        result
    }

    #[inline]
    fn walk_only<M: PhysMem + ?Sized>(
        &mut self,
        mem: &M,
        address: u64,
        access: Access,
    ) -> (Result<Translation, Fault>, Path) {
        self.stats.walks += 1;
        let top = self.walker.rules().levels();
        let from = match self.psc.lookup(address, top) {
            Some(step) => {
                self.stats.short_walks += 1;
                step
            }
            None => self.walker.top(self.root),
        };
        let mut path = Path::default();
        let result = self.walker.resume(mem, from, address, access, &mut path);
        let dirtied = result.as_ref().is_ok_and(|translation| translation.dirtied);
        if let Some(log) = self.log.as_mut().filter(|_| dirtied) {
            log.push(address >> 12);
        }
        let (reads, restarts) = match &result {
            Ok(translation) => (translation.reads, translation.restarts),
            Err(fault) => (fault.reads, 0),
        };
        self.stats.entries_read += u64::from(reads);
        self.stats.restarts += u64::from(restarts);
        (result, path)
    }

    #[inline]
    fn remember(&mut self, address: u64, translation: Option<&Translation>, path: &Path) {
        for step in path.steps() {
            self.psc.insert(address, step);
        }
        if let Some(translation) = translation {
            let entry = TlbEntry {
                page: translation.pa & !Rules::offset_mask(translation.level),
                level: translation.level,
                permissions: translation.permissions,
                dirty: translation.dirty,
            };
            self.tlb.insert(address, entry);
        }
    }

    fn forget_address(&mut self, address: u64) {
        self.tlb.forget_address(address);
        self.psc.forget_address(address);
    }

    /// Use the tables at `root` from now on, with empty caches.
    pub fn set_root(&mut self, root: u64) {
        self.root = root;
        self.flush_all();
    }

    /// The value given to `new` or `set_root` last.
    #[must_use]
    pub const fn root(&self) -> u64 {
        self.root
    }

    /// Forget everything.
    pub fn flush_all(&mut self) {
        self.tlb.clear();
        self.psc.clear();
    }

    /// Forget the leaf translations of these pages (numbers of 4 KiB pages). The paging-structure
    /// cache keeps what it has.
    pub fn flush_pages(&mut self, pages: Range<u64>) {
        self.tlb.forget_pages(pages);
    }

    /// Forget the ways to every table that maps a page of these (numbers of 4 KiB pages), as
    /// invalidations by address do. Leaf translations stay.
    pub fn flush_upper(&mut self, pages: Range<u64>) {
        self.psc.forget_pages(pages);
    }

    /// Forget the ways to these tables (physical addresses), as when they were unlinked. Leaf
    /// translations that were found through them stay.
    pub fn flush_tables(&mut self, tables: &[u64]) {
        self.psc.forget_tables(tables);
    }

    /// Counters.
    #[must_use]
    pub const fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The TLB, to look at.
    #[must_use]
    pub const fn tlb(&self) -> &Tlb {
        &self.tlb
    }

    /// The paging-structure cache, to look at.
    #[must_use]
    pub const fn psc(&self) -> &Psc {
        &self.psc
    }

    /// The walker.
    #[must_use]
    pub const fn walker(&self) -> &Walker {
        &self.walker
    }
}
