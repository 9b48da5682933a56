//! Names for the places where shadow entries stand, small enough for reverse maps.
//!
//! Owns [`PageId`] (a shadow page, by its number in the table of pages) and [`SpteRef`] (one of its
//! entries, in 31 bits). A pointer would take 64; 31 bits let two of them stand beside a lock bit
//! in the head of a reverse map, and fifteen in a descriptor of one cache line. Values only.

use core::fmt;

use mmu_core::addr::to_index;
use mmu_core::sync::{ENTRIES, ENTRY_BITS};

/// Bits of a [`SpteRef`] as [`SpteRef::bits`] gives them.
pub(crate) const REF_BITS: u32 = 31;

/// Number of a shadow page, below [`PageId::LIMIT`]. Numbers are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(u32);

impl PageId {
    /// How many shadow pages there can be: four million, 16 GiB of tables.
    pub const LIMIT: u32 = (1 << (31 - 9)) - 1;

    /// The page with this number; `None` from [`LIMIT`](Self::LIMIT) on.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        if number < Self::LIMIT { Some(Self(number)) } else { None }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shadow page {}", self.0)
    }
}

/// One entry of a shadow page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpteRef(u32);

static_assertions::const_assert!(PageId::LIMIT < 1 << (REF_BITS - 9) && ENTRY_BITS <= 9);

impl SpteRef {
    /// The entry `index` of `page`; the index counts modulo the entries of a table.
    #[must_use]
    pub fn new(page: PageId, index: usize) -> Self {
        // Below `ENTRIES`, so the conversion cannot fail.
        let index = u32::try_from(index % ENTRIES).unwrap_or(0);
        Self(page.0 << ENTRY_BITS | index)
    }

    /// The shadow page that the entry is in.
    #[must_use]
    pub const fn page(self) -> PageId {
        PageId(self.0 >> ENTRY_BITS)
    }

    /// Index of the entry in its page.
    #[must_use]
    pub fn index(self) -> usize {
        to_index(u64::from(self.0)) % ENTRIES
    }

    /// Not 0, and below `1 << REF_BITS`.
    pub(crate) const fn bits(self) -> u32 {
        self.0 + 1
    }

    /// What [`bits`](Self::bits) gave; `None` for 0.
    pub(crate) const fn from_bits(bits: u32) -> Option<Self> {
        match bits.checked_sub(1) {
            Some(word) => Some(Self(word)),
            None => None,
        }
    }
}

impl fmt::Debug for SpteRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "entry {} of {}", self.index(), self.page())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_of_the_first_and_the_last_page_has_a_name_of_its_own() {
        let last = PageId::LIMIT - 1;
        for number in [0, 1, last] {
            let page = PageId::new(number).unwrap();
            for index in [0, 1, ENTRIES - 1] {
                let entry = SpteRef::new(page, index);
                assert_eq!((entry.page(), entry.index()), (page, index));
                assert_ne!(entry.bits(), 0);
                assert!(u64::from(entry.bits()) < 1 << REF_BITS);
                assert_eq!(SpteRef::from_bits(entry.bits()), Some(entry));
            }
        }
        assert_eq!(PageId::new(PageId::LIMIT), None);
        assert_eq!(SpteRef::from_bits(0), None);
    }
}
