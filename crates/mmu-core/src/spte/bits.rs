//! The width arithmetic of entries: single bits, bit ranges and the fields cut out of a `u64`.
//!
//! Owns every `as` cast under `spte/`; `format`, `config`, `reserved` and `mmio` build their masks
//! from these functions. All are `const`, total and free of state.

#![expect(clippy::as_conversions, reason = "the conversions other files must not make")]

use crate::addr::{Level, PAGE_SHIFT};

/// Bits 51:12, the widest frame address that an entry can hold (KVM row 1.27).
pub const FRAME: u64 = range(51, PAGE_SHIFT);

/// Only bit `number` set; nothing when `number` is 64 or more.
#[inline]
#[must_use]
pub const fn bit(number: u32) -> u64 {
    if number < u64::BITS { 1 << number } else { 0 }
}

/// Bits `high..=low` set, both included; nothing when `high < low`.
#[inline]
#[must_use]
pub const fn range(high: u32, low: u32) -> u64 {
    let mut mask = 0;
    let mut number = low;
    while number <= high {
        mask |= bit(number);
        number += 1;
    }
    mask
}

/// The address bits that must be 0 in a leaf at `level`, because it is a page of that size.
#[inline]
#[must_use]
pub const fn below_page(level: Level) -> u64 {
    (level.pages() - 1) << PAGE_SHIFT
}

/// A bit number given as `u8`, as capabilities hold them.
#[inline]
#[must_use]
pub const fn number(bits: u8) -> u32 {
    bits as u32
}

/// The lowest set bit of `mask`; 64 when it is empty.
#[inline]
#[must_use]
pub const fn lowest(mask: u64) -> u32 {
    mask.trailing_zeros()
}

/// `mask` when `condition` holds, else nothing.
#[inline]
#[must_use]
pub const fn when(condition: bool, mask: u64) -> u64 {
    if condition { mask } else { 0 }
}

/// Bit 7 of `raw` (page size) as an index, 0 or 1.
#[inline]
#[must_use]
pub const fn page_size_index(raw: u64) -> usize {
    ((raw >> 7) & 1) as usize
}

/// Are the masks of a layout table pairwise disjoint?
#[must_use]
pub const fn disjoint(fields: &[(&str, u64)]) -> bool {
    let mut seen = 0;
    let mut rest = fields;
    while let [(_, mask), tail @ ..] = rest {
        if seen & *mask != 0 {
            return false;
        }
        seen |= *mask;
        rest = tail;
    }
    true
}

/// All bits that a layout table names.
#[must_use]
pub const fn union(fields: &[(&str, u64)]) -> u64 {
    let mut seen = 0;
    let mut rest = fields;
    while let [(_, mask), tail @ ..] = rest {
        seen |= *mask;
        rest = tail;
    }
    seen
}
