//! Shadow and second-level page-table entries: what every bit means and which change is legal.
//!
//! Owns everything about an entry that is a pure function of its 64 bits. [`Spte`] is a snapshot;
//! [`SpteFormat`] says where a format keeps its bits; [`SpteConfig`] adds what the CPU and the VM
//! decide (levels, A/D, MAXPHYADDR) and makes, reads and judges entries:
//!
//! | file | what it answers |
//! |---|---|
//! | `format` | where is a bit, and does it overlap another |
//! | `config` | which configurations exist, and which class is an entry of |
//! | `make` | the entry for a page, a table, a split, a collapse |
//! | `track` | accessed, dirty, and access tracking without hardware A/D |
//! | `permit` | what an entry allows, and what a change of it costs |
//! | `legal` | may this entry become that one |
//! | `reserved` | which bits hardware rejects |
//! | `mmio` | entries that cache "there is no memory here" |
//! | `memtype` | EPT memory types |
//! | `describe` | an entry in words |
//!
//! Nothing here reads memory, locks, orders or panics.

use core::fmt;

use crate::addr::{Hpa, Level, Pfn};

pub mod bits;
pub mod cell;
pub mod config;
pub mod describe;
pub mod format;
pub mod legal;
pub mod make;
pub mod memtype;
pub mod mmio;
pub mod permit;
pub mod reserved;
pub mod track;

pub use config::{Capabilities, ConfigError, MmioValue, SpteConfig};
pub use format::{AdType, Ept, Legacy, Npt, SpteFormat};
pub use legal::{ChangeKind, IllegalChange, LeafChange};
pub use make::LeafSpec;
pub use memtype::MemType;
pub use mmio::{MMIO_GEN_BITS, MMIO_GEN_IN_PROGRESS};
pub use reserved::{ReservedBits, ReservedParams};

#[cfg(test)]
mod tests;

/// One page-table entry as it was read, or as it shall be written.
///
/// Having an `Spte` tells you what an entry was at one moment. It does not tell you what the entry
/// is now: hardware and other CPUs change it, so only a compare-exchange against this value acts
/// on it.
#[doc(alias = "u64 spte")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Spte(u64);

impl Spte {
    /// Bit 11: the entry is present for the MMU, whatever hardware thinks of it (KVM row 1.1).
    pub const MMU_PRESENT: u64 = bits::bit(11);

    /// The value of an entry that maps nothing: bit 63, suppress #VE (KVM row 1.2).
    #[doc(alias = "SHADOW_NONPRESENT_VALUE")]
    pub const EMPTY: Self = Self(bits::bit(63));

    /// A remover is at work: whoever meets it retries, only the remover replaces it (KVM row 1.4).
    #[doc(alias = "FROZEN_SPTE")]
    #[doc(alias = "REMOVED_SPTE")]
    pub const FROZEN: Self = Self(Self::EMPTY.0 | 0x1a0);

    /// What a constructor returns when it is asked for an impossible entry: not present for the MMU
    /// or for hardware, and [`SpteKind::Corrupt`], which no legal change leads to.
    pub const INVALID: Self = Self(Self::EMPTY.0 | bits::bit(9));

    /// Wrap the bits of an entry. Any value is fine; [`SpteConfig::kind`] classifies it.
    #[inline]
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The bits.
    #[inline]
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Is any bit of `mask` set?
    #[inline]
    #[must_use]
    pub const fn has(self, mask: u64) -> bool {
        self.0 & mask != 0
    }

    /// With the bits of `mask` set.
    #[inline]
    #[must_use]
    pub const fn with(self, mask: u64) -> Self {
        Self(self.0 | mask)
    }

    /// With the bits of `mask` clear.
    #[inline]
    #[must_use]
    pub const fn without(self, mask: u64) -> Self {
        Self(self.0 & !mask)
    }

    /// Present for the MMU? An access-tracked leaf is, an MMIO entry is not (KVM row 1.1).
    #[doc(alias = "is_shadow_present_pte")]
    #[inline]
    #[must_use]
    pub const fn is_mmu_present(self) -> bool {
        self.has(Self::MMU_PRESENT)
    }

    /// Is it exactly [`FROZEN`](Self::FROZEN)?
    #[inline]
    #[must_use]
    pub const fn is_frozen(self) -> bool {
        self.0 == Self::FROZEN.0
    }

    /// Is it exactly [`EMPTY`](Self::EMPTY)?
    #[inline]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == Self::EMPTY.0
    }

    /// Present, and maps a page instead of linking a table (KVM row 1.13)?
    #[doc(alias = "is_last_spte")]
    #[inline]
    #[must_use]
    pub const fn is_leaf(self, level: Level) -> bool {
        self.is_mmu_present() && (matches!(level, Level::L1) || self.has(format::PAGE_SIZE))
    }

    /// Present, and links a lower table?
    #[inline]
    #[must_use]
    pub const fn is_table(self, level: Level) -> bool {
        self.is_mmu_present() && !matches!(level, Level::L1) && !self.has(format::PAGE_SIZE)
    }

    /// Bits 51:12 as a frame number. With memory encryption use [`SpteConfig::pfn`], which strips
    /// the encryption bits.
    #[inline]
    #[must_use]
    pub const fn pfn(self) -> Pfn {
        Pfn::containing(Hpa::new(self.0 & bits::FRAME))
    }
}

impl fmt::Debug for Spte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            f.write_str("Spte(EMPTY)")
        } else if self.is_frozen() {
            f.write_str("Spte(FROZEN)")
        } else if self.is_mmu_present() {
            let large = if self.has(format::PAGE_SIZE) { ", PS" } else { "" };
            write!(f, "Spte({:#x}, present{large}, pfn {})", self.0, self.pfn())
        } else {
            write!(f, "Spte({:#x}, not present)", self.0)
        }
    }
}

impl fmt::LowerHex for Spte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// The class of an entry. Every value belongs to exactly one ([`SpteConfig::kind`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SpteKind {
    /// Maps nothing: [`Spte::EMPTY`].
    Empty,
    /// A remover owns it: [`Spte::FROZEN`].
    Frozen,
    /// Not present; caches that no memory slot is here.
    Mmio,
    /// Links a table one level down.
    Table,
    /// Maps a page of the entry's level.
    Leaf,
    /// None of the others: memory was overwritten, or the entry belongs to another configuration.
    Corrupt,
}

impl SpteKind {
    /// [`Leaf`](Self::Leaf) or [`Table`](Self::Table)?
    #[inline]
    #[must_use]
    pub const fn is_present(self) -> bool {
        matches!(self, Self::Leaf | Self::Table)
    }
}
