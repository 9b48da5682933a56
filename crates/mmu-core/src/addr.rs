//! Addresses, page numbers and levels that cannot be mixed up.
//!
//! Owns the only conversions between them. [`Gva`], [`Gpa`], [`Hva`] and [`Hpa`] count bytes;
//! [`Gfn`] and [`Pfn`] count 4 KiB pages. [`Level`] is 1 (4 KiB leaf) to 5 (PML5), KVM's numbering.
//! Nothing here locks or orders anything.

// The arithmetic of this file is the one place where widths change; every cast is between u64,
// u32 and usize on the 64-bit targets the crate supports.
#![expect(clippy::as_conversions, reason = "the conversions other files must not make")]

use core::fmt;

use crate::sync::{ENTRIES, ENTRY_BITS};

/// log2 of the bytes in a 4 KiB page.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a 4 KiB page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

const _: () = assert!(usize::BITS == 64, "the MMU targets 64-bit hosts");

macro_rules! byte_address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wrap a byte address.
            #[inline]
            #[must_use]
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// The byte address.
            #[inline]
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// Is it a multiple of [`PAGE_SIZE`]?
            #[inline]
            #[must_use]
            pub const fn is_page_aligned(self) -> bool {
                self.0 & (PAGE_SIZE - 1) == 0
            }

            /// `self + bytes`, or `None` when it wraps.
            #[inline]
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

macro_rules! page_number {
    ($(#[$doc:meta])* $name:ident, $bytes:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wrap a page number.
            #[inline]
            #[must_use]
            pub const fn new(number: u64) -> Self {
                Self(number)
            }

            /// The page number.
            #[inline]
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The page that holds a byte address.
            #[inline]
            #[must_use]
            pub const fn containing(address: $bytes) -> Self {
                Self(address.get() >> PAGE_SHIFT)
            }

            /// First byte of the page. Page numbers of 52 bits and more wrap; validated numbers
            /// (slots, table frames) are below that.
            #[inline]
            #[must_use]
            pub const fn address(self) -> $bytes {
                $bytes::new(self.0 << PAGE_SHIFT)
            }

            /// `self + pages`, or `None` when it wraps.
            #[inline]
            #[must_use]
            pub const fn checked_add(self, pages: u64) -> Option<Self> {
                match self.0.checked_add(pages) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// `self + pages`, stopping at the largest number instead of wrapping.
            #[inline]
            #[must_use]
            pub const fn saturating_add(self, pages: u64) -> Self {
                Self(self.0.saturating_add(pages))
            }

            /// Pages from `earlier` up to `self`; 0 when `earlier` is later.
            #[inline]
            #[must_use]
            pub const fn distance_from(self, earlier: Self) -> u64 {
                self.0.saturating_sub(earlier.0)
            }

            /// Rounded down to a multiple of the pages that one entry at `level` maps.
            #[inline]
            #[must_use]
            pub const fn align_down(self, level: Level) -> Self {
                Self(self.0 & !(level.pages() - 1))
            }

            /// Is it a multiple of the pages that one entry at `level` maps?
            #[inline]
            #[must_use]
            pub const fn is_aligned(self, level: Level) -> bool {
                self.0 & (level.pages() - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

byte_address! {
    /// Guest virtual (linear) address.
    #[doc(alias = "gva_t")]
    Gva
}
byte_address! {
    /// Guest physical address.
    #[doc(alias = "gpa_t")]
    Gpa
}
byte_address! {
    /// Host virtual address: where the VMM maps guest memory.
    #[doc(alias = "hva_t")]
    Hva
}
byte_address! {
    /// Host physical address: what table entries hold.
    #[doc(alias = "hpa_t")]
    Hpa
}
page_number! {
    /// Guest frame number: `Gpa` / 4096.
    #[doc(alias = "gfn_t")]
    Gfn, Gpa
}
page_number! {
    /// Host page frame number: `Hpa` / 4096.
    #[doc(alias = "kvm_pfn_t")]
    Pfn, Hpa
}

impl Gfn {
    /// Index of this gfn's entry in a table at `level`.
    #[inline]
    #[must_use]
    pub const fn index(self, level: Level) -> usize {
        ((self.0 >> level.shift()) as usize) & (ENTRIES - 1)
    }
}

/// Level of a table, or of an entry in it: 1 = 4 KiB leaf table, 2 = 2 MiB, 3 = 1 GiB, 4 = PML4,
/// 5 = PML5.
#[doc(alias = "PG_LEVEL_4K")]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// 4 KiB pages.
    L1 = 1,
    /// 2 MiB pages, or links to level-1 tables.
    L2 = 2,
    /// 1 GiB pages, or links to level-2 tables.
    L3 = 3,
    /// 512 GiB per entry; never a leaf.
    L4 = 4,
    /// 256 TiB per entry; never a leaf.
    L5 = 5,
}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Self; 5] = [Self::L1, Self::L2, Self::L3, Self::L4, Self::L5];
    /// The highest level at which a leaf may stand (1 GiB).
    pub const MAX_LEAF: Self = Self::L3;

    /// Level from its number.
    ///
    /// # Errors
    /// [`BadLevel`] names a number outside 1 to 5.
    #[inline]
    pub const fn new(number: u8) -> Result<Self, BadLevel> {
        match number {
            1 => Ok(Self::L1),
            2 => Ok(Self::L2),
            3 => Ok(Self::L3),
            4 => Ok(Self::L4),
            5 => Ok(Self::L5),
            _ => Err(BadLevel { number }),
        }
    }

    /// 1 to 5.
    #[inline]
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// 0 to 4, to index arrays with one element per level.
    #[inline]
    #[must_use]
    pub const fn slot(self) -> usize {
        self as usize - 1
    }

    /// log2 of the 4 KiB pages that one entry maps.
    #[inline]
    #[must_use]
    pub const fn shift(self) -> u32 {
        (self as u32 - 1) * ENTRY_BITS
    }

    /// 4 KiB pages that one entry maps.
    #[inline]
    #[must_use]
    pub const fn pages(self) -> u64 {
        1 << self.shift()
    }

    /// 4 KiB pages that a whole table at this level maps.
    #[inline]
    #[must_use]
    pub const fn table_pages(self) -> u64 {
        1 << (self.shift() + ENTRY_BITS)
    }

    /// The level below; `None` below level 1.
    #[inline]
    #[must_use]
    pub const fn down(self) -> Option<Self> {
        match self {
            Self::L1 => None,
            Self::L2 => Some(Self::L1),
            Self::L3 => Some(Self::L2),
            Self::L4 => Some(Self::L3),
            Self::L5 => Some(Self::L4),
        }
    }

    /// The level below; level 1 stays. Without a branch: for walks that know where they stop.
    #[inline]
    #[must_use]
    pub const fn below(self) -> Self {
        match self.number() - 1 {
            0 | 1 => Self::L1,
            2 => Self::L2,
            3 => Self::L3,
            _ => Self::L4,
        }
    }

    /// The level above; `None` above level 5.
    #[inline]
    #[must_use]
    pub const fn up(self) -> Option<Self> {
        match self {
            Self::L1 => Some(Self::L2),
            Self::L2 => Some(Self::L3),
            Self::L3 => Some(Self::L4),
            Self::L4 => Some(Self::L5),
            Self::L5 => None,
        }
    }

    /// May a leaf stand at this level?
    #[inline]
    #[must_use]
    pub const fn may_be_leaf(self) -> bool {
        (self as u8) <= (Self::MAX_LEAF as u8)
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L{}", self.number())
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::L1 => "4K",
            Self::L2 => "2M",
            Self::L3 => "1G",
            Self::L4 => "512G",
            Self::L5 => "256T",
        })
    }
}

/// A level number outside 1 to 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadLevel {
    /// The number given.
    pub number: u8,
}

impl fmt::Display for BadLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level {} is not in 1..=5", self.number)
    }
}

impl core::error::Error for BadLevel {}

/// Guest pages `start..end`. Empty when `start >= end`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GfnRange {
    /// First gfn.
    pub start: Gfn,
    /// One past the last gfn.
    pub end: Gfn,
}

impl GfnRange {
    /// Every gfn that a 64-bit guest physical address can name.
    pub const ALL: Self = Self { start: Gfn::new(0), end: Gfn::new(1 << (64 - PAGE_SHIFT)) };

    /// `start..end`.
    #[inline]
    #[must_use]
    pub const fn new(start: Gfn, end: Gfn) -> Self {
        Self { start, end }
    }

    /// `pages` pages from `start`; the end stops at the largest gfn instead of wrapping.
    #[inline]
    #[must_use]
    pub const fn from_len(start: Gfn, pages: u64) -> Self {
        Self { start, end: start.saturating_add(pages) }
    }

    /// The range that one entry at `level` covers around `gfn`.
    #[inline]
    #[must_use]
    pub const fn entry(gfn: Gfn, level: Level) -> Self {
        Self::from_len(gfn.align_down(level), level.pages())
    }

    /// Number of pages.
    #[inline]
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.distance_from(self.start)
    }

    /// No pages at all?
    #[inline]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start.get() >= self.end.get()
    }

    /// Is `gfn` inside?
    #[inline]
    #[must_use]
    pub const fn contains(self, gfn: Gfn) -> bool {
        self.start.get() <= gfn.get() && gfn.get() < self.end.get()
    }

    /// Is the whole of `other` inside?
    #[inline]
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.start.get() <= other.start.get() && other.end.get() <= self.end.get()
    }

    /// Do the two share a page?
    #[inline]
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.get() < other.end.get() && other.start.get() < self.end.get()
    }

    /// The shared pages; empty when there are none.
    #[inline]
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self { start, end: self.end.min(other.end).max(start) }
    }

    /// The smallest range that covers both.
    #[inline]
    #[must_use]
    pub fn hull(self, other: Self) -> Self {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }
}

impl fmt::Debug for GfnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start.get(), self.end.get())
    }
}

impl fmt::Display for GfnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A count or index that fits the host's pointer width, as `u64`.
#[inline]
#[must_use]
pub const fn to_u64(count: usize) -> u64 {
    count as u64
}

/// A `u64` used as an index. Lossless on the 64-bit hosts that the crate builds for.
#[inline]
#[must_use]
pub const fn to_index(value: u64) -> usize {
    value as usize
}

/// `index` when it is below `length`, else 0, by arithmetic that no branch decides: a CPU that
/// mispredicts the bounds check around it does not get an index outside either (KVM rows 6.2, 6.10
/// and B45). It does not replace that check.
///
/// Exact for every index and every length up to 2^63.
#[doc(alias = "array_index_nospec")]
#[inline]
#[must_use]
pub fn mask_index(index: u64, length: u64) -> u64 {
    // Opaque to the compiler, which would else drop the mask because of the check before it.
    let (index, length) = core::hint::black_box((index, length));
    // The top bit is set if the index has it, or if the difference went below 0.
    let outside = (index | length.wrapping_sub(1).wrapping_sub(index)) >> 63;
    index & outside.wrapping_sub(1)
}

#[cfg(test)]
mod tests;
