//! The two caches of a processor's page walker. Both may be stale until they are flushed.
//!
//! [`Tlb`] keeps leaf translations with their permissions and whether the dirty bit was set when
//! the entry was made. [`Psc`], the paging-structure cache, keeps the tables that prefixes of
//! addresses lead to, so that a walk starts lower. Neither keeps anything about absent entries. A
//! flush forgets what it names and nothing else.

use std::ops::Range;

use crate::access::Permissions;
use crate::cache::{Cache, Capacity};
use crate::format::Rules;
use crate::walk::Step;

/// Sizes of leaves: 4 KiB, 2 MiB, 1 GiB.
const LEAF_LEVELS: std::ops::RangeInclusive<u8> = 1..=3;

/// Shift from a 4 KiB page number to a number in units of what an entry of `level` covers.
#[inline]
const fn page_shift(level: u8) -> u32 {
    9 * (level as u32).saturating_sub(1)
}

/// A cached translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlbEntry {
    /// Physical address of the page's first byte.
    pub page: u64,
    /// Size of the page, by level.
    pub level: u8,
    /// What the entries together granted when they were read.
    pub permissions: Permissions,
    /// The dirty bit was set, or does not exist.
    pub dirty: bool,
}

impl TlbEntry {
    /// The physical address of `address`.
    #[inline]
    #[must_use]
    pub const fn physical(&self, address: u64) -> u64 {
        self.page | (address & Rules::offset_mask(self.level))
    }
}

/// A translation lookaside buffer.
#[derive(Clone, Debug)]
pub struct Tlb {
    cache: Cache<TlbEntry>,
}

impl Tlb {
    /// An empty one. `seed` decides what is evicted.
    #[must_use]
    pub fn new(capacity: Capacity, seed: u64) -> Self {
        Self { cache: Cache::new(capacity, seed) }
    }

    /// The translation of `address`. A smaller page is preferred when there are several (hardware
    /// may use any).
    #[inline]
    #[must_use]
    pub fn lookup(&self, address: u64) -> Option<&TlbEntry> {
        let page = address >> 12;
        for level in LEAF_LEVELS {
            if self.cache.len_at(level) == 0 {
                continue;
            }
            let found = self.cache.get(level, page >> page_shift(level));
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Remember the translation of `address`.
    pub fn insert(&mut self, address: u64, entry: TlbEntry) {
        let number = (address >> 12) >> page_shift(entry.level);
        self.cache.insert(entry.level, number, entry);
    }

    /// Forget every translation, of whatever size, of a page in `pages` (numbers of 4 KiB pages).
    pub fn forget_pages(&mut self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        for level in LEAF_LEVELS {
            let shift = page_shift(level);
            self.cache.remove_range(level, pages.start >> shift, (pages.end - 1) >> shift);
        }
    }

    /// Forget the translations of one address.
    pub fn forget_address(&mut self, address: u64) {
        let page = address >> 12;
        self.forget_pages(page..page + 1);
    }

    /// Forget everything.
    pub fn clear(&mut self) {
        self.cache.clear();
    }

    /// Translations held.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.cache.len()
    }

    /// Holds nothing?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A paging-structure cache: prefixes of addresses to the tables they lead to.
#[derive(Clone, Debug)]
pub struct Psc {
    cache: Cache<Step>,
}

impl Psc {
    /// An empty one. `seed` decides what is evicted.
    #[must_use]
    pub fn new(capacity: Capacity, seed: u64) -> Self {
        Self { cache: Cache::new(capacity, seed) }
    }

    /// The lowest table known for `address`, below a root of level `top`.
    #[inline]
    #[must_use]
    pub fn lookup(&self, address: u64, top: u8) -> Option<Step> {
        for level in 1..top {
            if self.cache.len_at(level) == 0 {
                continue;
            }
            let found = self.cache.get(level, prefix(address, level));
            if found.is_some() {
                return found.copied();
            }
        }
        None
    }

    /// Remember that `address` leads to a table.
    #[inline]
    pub fn insert(&mut self, address: u64, step: Step) {
        self.cache.insert(step.level, prefix(address, step.level), step);
    }

    /// Forget whatever leads to one of these tables (physical addresses).
    pub fn forget_tables(&mut self, tables: &[u64]) {
        if tables.is_empty() || self.cache.len() == 0 {
            return;
        }
        let mut sorted = tables.to_vec();
        sorted.sort_unstable();
        self.cache.remove_if(|_, _, step| sorted.binary_search(&step.table).is_ok());
    }

    /// Forget whatever walks for `pages` (numbers of 4 KiB pages) would use.
    pub fn forget_pages(&mut self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        for level in 1..5 {
            let shift = page_shift(level + 1);
            self.cache.remove_range(level, pages.start >> shift, (pages.end - 1) >> shift);
        }
    }

    /// Forget what a walk for `address` would use.
    pub fn forget_address(&mut self, address: u64) {
        for level in 1..5 {
            self.cache.remove(level, prefix(address, level));
        }
    }

    /// Forget everything.
    pub fn clear(&mut self) {
        self.cache.clear();
    }

    /// Tables held.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.cache.len()
    }

    /// Holds nothing?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The part of an address that selects a table of `level`.
#[inline]
const fn prefix(address: u64, level: u8) -> u64 {
    (address >> 12) >> page_shift(level + 1)
}

#[cfg(test)]
mod tests {
    use super::{Psc, Tlb, TlbEntry};
    use crate::access::Permissions;
    use crate::cache::Capacity;
    use crate::walk::Step;

    fn entry(level: u8, page: u64) -> TlbEntry {
        TlbEntry { page, level, permissions: Permissions::ALL, dirty: false }
    }

    #[test]
    fn finds_pages_of_every_size() {
        let mut tlb = Tlb::new(Capacity::Unlimited, 0);
        tlb.insert(0x1234, entry(1, 0xa000));
        tlb.insert(0x20_1234, entry(2, 0x40_0000));
        tlb.insert(0x4000_1234, entry(3, 0x8000_0000));
        let physical = |address| tlb.lookup(address).map(|found| found.physical(address));
        assert_eq!(physical(0x1fff), Some(0xafff));
        assert_eq!(physical(0x2000), None);
        assert_eq!(physical(0x3f_ffff), Some(0x5f_ffff));
        assert_eq!(physical(0x7fff_ffff), Some(0xbfff_ffff));
        assert_eq!(physical(0x8000_0000), None);
    }

    #[test]
    fn forgets_exactly_the_named_pages() {
        let mut tlb = Tlb::new(Capacity::Unlimited, 0);
        for page in 0..1024 {
            tlb.insert(page << 12, entry(1, page << 12));
        }
        tlb.insert(0x4000_0000, entry(2, 0));
        tlb.insert(0x8000_0000, entry(3, 0));
        tlb.forget_pages(5..7);
        assert_eq!(tlb.len(), 1024);
        assert!(tlb.lookup(5 << 12).is_none() && tlb.lookup(6 << 12).is_none());
        assert!(tlb.lookup(4 << 12).is_some() && tlb.lookup(7 << 12).is_some());
        // One 4 KiB page in the middle takes the whole larger page with it.
        tlb.forget_pages(0x4_00ff..0x4_0100);
        assert!(tlb.lookup(0x4000_0000).is_none());
        tlb.forget_pages(0xb_ffff..0xc_0000);
        assert!(tlb.lookup(0x8000_0000).is_none());
        tlb.forget_pages(9..9);
        assert_eq!(tlb.len(), 1022);
        // A range larger than the table is done by a scan.
        tlb.forget_pages(8..1 << 40);
        assert_eq!(tlb.len(), 6);
        tlb.forget_pages(0..u64::MAX);
        assert!(tlb.is_empty());
    }

    #[test]
    fn the_lowest_known_table_wins() {
        let mut psc = Psc::new(Capacity::Unlimited, 0);
        let step = |level, table| Step { level, table, permissions: Permissions::ALL };
        psc.insert(0, step(3, 0x3000));
        psc.insert(0, step(2, 0x2000));
        psc.insert(0, step(1, 0x1000));
        assert_eq!(psc.lookup(0x1f_ffff, 4), Some(step(1, 0x1000)));
        assert_eq!(psc.lookup(0x20_0000, 4), Some(step(2, 0x2000)));
        assert_eq!(psc.lookup(0x4000_0000, 4), Some(step(3, 0x3000)));
        assert_eq!(psc.lookup(0x80_0000_0000, 4), None);
        psc.forget_tables(&[0x9000, 0x1000]);
        assert_eq!(psc.lookup(0, 4), Some(step(2, 0x2000)));
        psc.forget_address(0);
        assert!(psc.is_empty());
        for block in 0..4 {
            psc.insert(block << 21, step(1, 0x1000 * block));
        }
        psc.insert(0, step(2, 0x2000));
        psc.forget_pages(0x3ff..0x401);
        assert_eq!(psc.lookup(1 << 21, 4), None);
        assert_eq!(psc.lookup(2 << 21, 4), None);
        assert_eq!(psc.lookup(3 << 21, 4), Some(step(1, 0x3000)));
        assert_eq!(psc.lookup(0, 4), Some(step(1, 0)), "and the table above is forgotten");
        psc.forget_pages(5..5);
        psc.forget_pages(0..1 << 40);
        assert!(psc.is_empty());
    }
}
