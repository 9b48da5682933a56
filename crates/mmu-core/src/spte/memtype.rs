//! Memory types of EPT leaf entries.
//!
//! Owns [`MemType`] and its encoding in bits 6:3 (KVM row 1.22, SDM 3C 28.2.7.2). `make` writes
//! it, `reserved` rejects the encodings that hardware rejects. NPT and legacy entries have no such
//! field of ours: their PWT, PCD and PAT bits stay 0 (KVM row 1.23).

use super::bits;

/// Bits 5:3 of an EPT leaf: the memory type.
pub const TYPE: u64 = bits::range(5, 3);
/// Bit 6 of an EPT leaf: ignore the guest's PAT.
pub const IGNORE_PAT: u64 = bits::bit(6);

/// A cache type with its SDM encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cache {
    /// Uncacheable.
    Uncacheable = 0,
    /// Write combining.
    WriteCombining = 1,
    /// Write through.
    WriteThrough = 4,
    /// Write protected.
    WriteProtected = 5,
    /// Write back.
    WriteBack = 6,
}

/// The memory type of one leaf: what it is by itself, and whether the guest's PAT may change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemType {
    /// Type of the page.
    pub cache: Cache,
    /// Use `cache` whatever the guest's PAT says.
    pub ignore_pat: bool,
}

impl MemType {
    /// Uncacheable, combined with the guest's PAT: what host MMIO gets.
    pub const UC: Self = Self { cache: Cache::Uncacheable, ignore_pat: false };
    /// Write back, combined with the guest's PAT: what RAM gets when devices do not snoop.
    pub const WB: Self = Self { cache: Cache::WriteBack, ignore_pat: false };
    /// Write back whatever the guest says: what RAM gets otherwise.
    pub const WB_IGNORE_PAT: Self = Self { cache: Cache::WriteBack, ignore_pat: true };

    /// Bits 6:3 of an EPT leaf.
    #[inline]
    #[must_use]
    pub const fn ept_bits(self) -> u64 {
        let cache = match self.cache {
            Cache::Uncacheable => 0,
            Cache::WriteCombining => 1,
            Cache::WriteThrough => 4,
            Cache::WriteProtected => 5,
            Cache::WriteBack => 6,
        };
        (cache << 3) | bits::when(self.ignore_pat, IGNORE_PAT)
    }

    /// The type in an EPT leaf; `None` for the encodings 2, 3 and 7, which misconfigure it.
    #[must_use]
    pub const fn from_ept(raw: u64) -> Option<Self> {
        let cache = match (raw & TYPE) >> 3 {
            0 => Cache::Uncacheable,
            1 => Cache::WriteCombining,
            4 => Cache::WriteThrough,
            5 => Cache::WriteProtected,
            6 => Cache::WriteBack,
            _ => return None,
        };
        Some(Self { cache, ignore_pat: raw & IGNORE_PAT != 0 })
    }
}
