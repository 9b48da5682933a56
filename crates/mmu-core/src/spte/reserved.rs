//! Which bits hardware rejects in an entry.
//!
//! Owns [`ReservedBits`], generated from a format and a few facts (KVM rows 1.31 and 1.32). The
//! same generator serves our own entries, with the host's facts, and guest entries, with the
//! guest's. `legal` refuses entries with reserved bits; `mmio` relies on hardware to refuse its
//! own.

use super::bits::{self, bit, range, when};
use super::format::{PAGE_SIZE, SpteFormat};
use super::memtype;
use super::{Spte, SpteConfig};
use crate::addr::Level;

/// Facts that decide which bits are reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedParams {
    /// Level of the root table; 3 in a format that allows it means PAE.
    pub root: Level,
    /// Physical address bits, at most 52.
    pub max_phys_bits: u8,
    /// EFER.NXE.
    pub nx: bool,
    /// 2 MiB leaves exist.
    pub huge_2m: bool,
    /// 1 GiB leaves exist.
    pub huge_1g: bool,
    /// EPT: fetch-only entries are legal.
    pub exec_only: bool,
    /// EPT: bit 10 is an execute permission.
    pub mode_based_exec: bool,
    /// Bit 8 of links at levels 4 and 5 is reserved (AMD).
    pub upper_global_reserved: bool,
    /// Address bits accepted although they are above `max_phys_bits` (encryption).
    pub accepted: u64,
    /// Address bits refused although they are below `max_phys_bits` (encryption).
    pub refused: u64,
}

/// Masks of reserved bits per level and page-size bit, and the bad values of bits 5:0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedBits {
    /// `[level.slot()][bit 7]`.
    masks: [[u64; 2]; 5],
    /// EPT: bit `n` is set if the value `n` of bits 5:0 is a misconfiguration.
    bad_low: u64,
    /// Hardware looks at an entry only if any of these is set.
    hw_present: u64,
    /// EPT with mode-based execute: bit 10 counts as an execute permission.
    user_exec: u64,
}

impl ReservedBits {
    /// The masks for tables of format `F`.
    #[must_use]
    pub fn new<F: SpteFormat>(params: &ReservedParams) -> Self {
        let user_exec = when(params.mode_based_exec, F::USER_EXEC);
        Self {
            masks: Level::ALL
                .map(|level| [false, true].map(|large| mask_at::<F>(params, level, large))),
            bad_low: if F::MISCONFIGURABLE { bad_low(params.exec_only) } else { 0 },
            hw_present: F::HW_PRESENT | user_exec,
            user_exec,
        }
    }

    /// Does hardware take the entry for present, so that reserved bits matter?
    #[inline]
    #[must_use]
    pub const fn is_hw_present(&self, raw: u64) -> bool {
        raw & self.hw_present != 0
    }

    /// Bits whose value makes hardware reject `raw` at `level`; 0 if it accepts the entry or
    /// takes it for not present.
    #[inline]
    #[must_use]
    #[expect(clippy::indexing_slicing, reason = "slot() < 5, and the other index is one bit")]
    pub const fn check(&self, raw: u64, level: Level) -> u64 {
        if !self.is_hw_present(raw) {
            return 0;
        }
        let reserved = self.masks[level.slot()][bits::page_size_index(raw)] & raw;
        reserved | self.misconfigured(raw)
    }

    /// The bits of 5:0 (and 10) that misconfigure an EPT entry.
    const fn misconfigured(&self, raw: u64) -> u64 {
        let user_exec = raw & self.user_exec;
        let low = (raw & range(5, 0)) | when(user_exec != 0, bit(2));
        let mut bad = 0;
        // 6 bits select one of 64.
        if (self.bad_low >> low) & 1 != 0 {
            bad = (raw & range(5, 0)) | user_exec;
        }
        bad
    }
}

/// Reserved bits of an entry at `level` whose bit 7 is `large`.
fn mask_at<F: SpteFormat>(params: &ReservedParams, level: Level, large: bool) -> u64 {
    let pae = params.root == Level::L3;
    let above = range(51, bits::number(params.max_phys_bits)) & !params.accepted | params.refused;
    let has_leaf = match level {
        Level::L1 => true,
        Level::L2 => params.huge_2m,
        Level::L3 => params.huge_1g && !pae,
        Level::L4 | Level::L5 => false,
    };
    let is_link = level != Level::L1 && !(large && has_leaf);
    let unaligned = when(large && has_leaf && level != Level::L1, bits::below_page(level));
    let page_size = when(!has_leaf, PAGE_SIZE);
    if F::MISCONFIGURABLE {
        return above | unaligned | page_size | when(is_link, range(6, 3));
    }
    if pae && level == Level::L3 {
        return above | range(63, 52) | range(8, 5) | range(2, 1);
    }
    let upper = matches!(level, Level::L4 | Level::L5) && params.upper_global_reserved;
    // Bit 12 of a large leaf is PAT.
    above
        | (unaligned & !bit(12))
        | page_size
        | when(!params.nx, F::NX)
        | when(pae, range(62, 52))
        | when(upper, bit(8))
}

/// Values of bits 5:0 that misconfigure an EPT entry: memory types 2, 3 and 7; writes without
/// reads; fetches without reads unless the CPU has them (SDM 3C 28.3.3.1).
fn bad_low(exec_only: bool) -> u64 {
    let mut bad = 0;
    for low in 0..64 {
        let bad_type = matches!((u64::from(low) & memtype::TYPE) >> 3, 2 | 3 | 7);
        let bad_access = match low & 7 {
            0b010 | 0b110 => true,
            0b100 => !exec_only,
            _ => false,
        };
        bad |= when(bad_type || bad_access, bit(low));
    }
    bad
}

impl<F: SpteFormat> SpteConfig<F> {
    /// Bits whose value makes hardware reject `spte` at `level`; 0 if it accepts the entry or
    /// takes it for not present (KVM row 1.33). The way to judge an access-tracked entry is to
    /// [`untrack`](Self::untrack) it first.
    #[inline]
    #[must_use]
    pub const fn reserved_bits(&self, spte: Spte, level: Level) -> u64 {
        self.reserved.check(spte.raw(), level)
    }

    /// The masks behind [`reserved_bits`](Self::reserved_bits).
    #[must_use]
    pub const fn reserved(&self) -> &ReservedBits {
        &self.reserved
    }
}
