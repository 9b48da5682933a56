//! The formats a second time, in literal bit numbers and plain sentences.
//!
//! Nothing here uses the constants or the functions under test, apart from plain data
//! ([`Capabilities`]) and the class names.

use super::*;

/// A format that the model knows.
pub(super) trait Rules: SpteFormat {
    /// Ordinary capabilities.
    fn baseline() -> Capabilities;
    /// The bit numbers that flags stand in: everything but the frame.
    fn flags() -> &'static [u32];
    /// A leaf that follows every rule?
    fn leaf_ok(caps: &Capabilities, raw: u64, level: Level) -> bool;
    /// A link that follows every rule?
    fn table_ok(caps: &Capabilities, raw: u64, level: Level) -> bool;
    /// Does it look like an MMIO entry?
    fn looks_like_mmio(caps: &Capabilities, raw: u64) -> bool;
    /// An MMIO entry that follows every rule?
    fn mmio_ok(caps: &Capabilities, raw: u64) -> bool;
    /// Number of the A bit.
    fn accessed_bit() -> u32;
    /// Number of the host-writable bit.
    fn host_writable_bit() -> u32;
}

/// Is bit `number` set?
pub(super) fn is(raw: u64, number: u32) -> bool {
    (raw >> number) & 1 != 0
}

/// Are all bits `high..=low` clear?
pub(super) fn none(raw: u64, high: u32, low: u32) -> bool {
    (low..=high).all(|number| !is(raw, number))
}

/// What bits 61:60 of a leaf must be.
pub(super) fn ad_field(caps: &Capabilities) -> u64 {
    if !caps.accessed_dirty {
        1
    } else if caps.write_protect_only {
        2
    } else {
        0
    }
}

/// The frame is below MAXPHYADDR and aligned.
fn frame_ok(caps: &Capabilities, raw: u64, level: Level) -> bool {
    let alignment = match level {
        Level::L1 => 0,
        Level::L2 => crate::sync::ENTRY_BITS,
        _ => 2 * crate::sync::ENTRY_BITS,
    };
    let top = u32::from(caps.max_phys_bits);
    (top > 51 || none(raw, 51, top)) && (alignment == 0 || none(raw, 12 + alignment - 1, 12))
}

/// Bit 7 says "leaf" above level 1, where such a leaf exists.
fn size_ok(caps: &Capabilities, raw: u64, level: Level) -> bool {
    match level {
        Level::L1 => !is(raw, 7),
        Level::L2 => is(raw, 7) && caps.huge_2m,
        Level::L3 => is(raw, 7) && caps.huge_1g,
        Level::L4 | Level::L5 => false,
    }
}

/// W, MMU-writable, host-writable: each needs the next.
fn triple_ok(w: bool, mmu: bool, host: bool) -> bool {
    matches!(
        (host, mmu, w),
        (true, true, true) | (true, true, false) | (true, false, false) | (false, false, false)
    )
}

impl Rules for Ept {
    fn baseline() -> Capabilities {
        Capabilities::ept()
    }

    fn flags() -> &'static [u32] {
        &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 52, 53, 54, 55, 60, 61, 62, 63]
    }

    fn leaf_ok(caps: &Capabilities, raw: u64, level: Level) -> bool {
        let disabled = ad_field(caps) == 1;
        let tracked = disabled && !is(raw, 0) && !is(raw, 2) && !is(raw, 10);
        let (r, x, xu) = if tracked {
            (is(raw, 52), is(raw, 54), is(raw, 62))
        } else {
            (is(raw, 0), is(raw, 2), is(raw, 10))
        };
        let fetches = x || (xu && caps.mode_based_exec);
        let saved_ok = if tracked {
            !is(raw, 1) && !is(raw, 8)
        } else {
            !is(raw, 52) && !is(raw, 54) && !is(raw, 62)
        };
        is(raw, 11)
            && is(raw, 63)
            && none(raw, 59, 56)
            && (raw >> 60) & 3 == ad_field(caps)
            && size_ok(caps, raw, level)
            && frame_ok(caps, raw, level)
            && !matches!((raw >> 3) & 7, 2 | 3 | 7)
            && saved_ok
            && (r || fetches)
            && (r || !is(raw, 1))
            && (r || caps.exec_only || !fetches)
            && triple_ok(is(raw, 1), is(raw, 55), is(raw, 53))
    }

    fn table_ok(caps: &Capabilities, raw: u64, _level: Level) -> bool {
        let ad = if caps.accessed_dirty { 0 } else { 1 };
        [0, 1, 2, 10, 11, 63].into_iter().all(|number| is(raw, number))
            && none(raw, 7, 3)
            && none(raw, 9, 9)
            && none(raw, 59, 52)
            && (raw >> 60) & 3 == ad
            && none(raw, 62, 62)
            && frame_ok(caps, raw, Level::L1)
    }

    fn looks_like_mmio(caps: &Capabilities, raw: u64) -> bool {
        caps.mmio_caching && raw & 7 == 6 && !is(raw, 63) && !is(raw, 11)
    }

    fn mmio_ok(caps: &Capabilities, raw: u64) -> bool {
        Self::looks_like_mmio(caps, raw) && !is(raw, 10) && frame_ok(caps, raw, Level::L1)
    }

    fn accessed_bit() -> u32 {
        8
    }

    fn host_writable_bit() -> u32 {
        53
    }
}

const LEGACY_FLAGS: &[u32] =
    &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 51, 52, 54, 58, 60, 61, 62, 63];

fn legacy_leaf_ok(caps: &Capabilities, raw: u64, level: Level) -> bool {
    let disabled = ad_field(caps) == 1;
    let tracked = disabled && !is(raw, 0);
    let present = if tracked {
        is(raw, 52) && !is(raw, 1) && !is(raw, 5)
    } else {
        is(raw, 0) && !is(raw, 52)
    };
    is(raw, 11)
        && present
        && none(raw, 4, 3)
        && none(raw, 8, 8)
        && none(raw, 59, 53)
        && none(raw, 62, 62)
        && (raw >> 60) & 3 == ad_field(caps)
        && (caps.nx || !is(raw, 63))
        && size_ok(caps, raw, level)
        && frame_ok(caps, raw, level)
        && triple_ok(is(raw, 1), is(raw, 10), is(raw, 9))
}

fn legacy_table_ok(caps: &Capabilities, raw: u64, level: Level) -> bool {
    let ad = if caps.accessed_dirty { 0 } else { 1 };
    let pdpte = caps.levels == 3 && level == Level::L3;
    let low_ok = if pdpte {
        is(raw, 0) && none(raw, 10, 1)
    } else {
        is(raw, 0) && is(raw, 1) && is(raw, 2) && none(raw, 4, 3) && none(raw, 10, 6)
    };
    low_ok
        && is(raw, 11)
        && none(raw, 59, 52)
        && (raw >> 60) & 3 == ad
        && none(raw, 63, 62)
        && frame_ok(caps, raw, Level::L1)
}

fn legacy_looks_like_mmio(caps: &Capabilities, raw: u64) -> bool {
    caps.mmio_caching && caps.max_phys_bits < 52 && is(raw, 0) && is(raw, 51) && !is(raw, 11)
}

fn legacy_mmio_ok(caps: &Capabilities, raw: u64) -> bool {
    let without_mark = raw & !(1 << 51);
    legacy_looks_like_mmio(caps, raw)
        && !is(raw, 10)
        && !is(raw, 63)
        && frame_ok(caps, without_mark, Level::L1)
}

macro_rules! legacy_rules {
    ($format:ident, $baseline:expr) => {
        impl Rules for $format {
            fn baseline() -> Capabilities {
                $baseline
            }

            fn flags() -> &'static [u32] {
                LEGACY_FLAGS
            }

            fn leaf_ok(caps: &Capabilities, raw: u64, level: Level) -> bool {
                legacy_leaf_ok(caps, raw, level)
            }

            fn table_ok(caps: &Capabilities, raw: u64, level: Level) -> bool {
                legacy_table_ok(caps, raw, level)
            }

            fn looks_like_mmio(caps: &Capabilities, raw: u64) -> bool {
                legacy_looks_like_mmio(caps, raw)
            }

            fn mmio_ok(caps: &Capabilities, raw: u64) -> bool {
                legacy_mmio_ok(caps, raw)
            }

            fn accessed_bit() -> u32 {
                5
            }

            fn host_writable_bit() -> u32 {
                9
            }
        }
    };
}

legacy_rules!(Npt, Capabilities::npt());
legacy_rules!(Legacy, Capabilities::legacy());

/// The class of a value.
pub(super) fn class<F: Rules>(caps: &Capabilities, raw: u64, level: Level) -> SpteKind {
    let leaf_level = match level {
        Level::L1 => true,
        Level::L2 => caps.huge_2m,
        Level::L3 => caps.huge_1g,
        Level::L4 | Level::L5 => false,
    };
    if is(raw, 11) {
        match (level, is(raw, 7)) {
            (Level::L1, _) => SpteKind::Leaf,
            (_, false) => SpteKind::Table,
            (_, true) if leaf_level => SpteKind::Leaf,
            (_, true) => SpteKind::Corrupt,
        }
    } else if raw == 1 << 63 {
        SpteKind::Empty
    } else if raw == 0x8000_0000_0000_01a0 {
        SpteKind::Frozen
    } else if level == Level::L1 && F::looks_like_mmio(caps, raw) {
        SpteKind::Mmio
    } else {
        SpteKind::Corrupt
    }
}

/// Does a new value follow every rule of its class?
pub(super) fn new_ok<F: Rules>(caps: &Capabilities, raw: u64, level: Level) -> bool {
    match class::<F>(caps, raw, level) {
        SpteKind::Empty | SpteKind::Frozen => true,
        SpteKind::Mmio => F::mmio_ok(caps, raw),
        SpteKind::Table => F::table_ok(caps, raw, level),
        SpteKind::Leaf => F::leaf_ok(caps, raw, level),
        SpteKind::Corrupt => false,
    }
}

/// What a step may be called, by class: row = old, column = new, both in the order
/// empty, frozen, MMIO, table, leaf. `.` = refused, `?` = depends on the values.
const STEPS: [&str; 5] = [
    // empty:  =       freeze  mmio    link    map
    "=FILM", // empty
    "T=...", // frozen: thaw only
    "uFILM", // MMIO
    "UFU?C", // table
    "ZFZS?", // leaf
];

/// The verdict on a change, as a letter of [`STEPS`]; `=` for equal values, `.` for a refusal, `a`
/// for a link that aged, `l` for a leaf that changed in place.
pub(super) fn verdict<F: Rules>(caps: &Capabilities, old: u64, new: u64, level: Level) -> char {
    let order =
        [SpteKind::Empty, SpteKind::Frozen, SpteKind::Mmio, SpteKind::Table, SpteKind::Leaf];
    let place = |raw| order.into_iter().position(|kind| kind == class::<F>(caps, raw, level));
    let (Some(row), Some(column)) = (place(old), place(new)) else {
        return '.';
    };
    if level.number() > caps.levels || !new_ok::<F>(caps, new, level) {
        return '.';
    }
    if old == new {
        return '=';
    }
    let letter = STEPS.get(row).and_then(|line| line.chars().nth(column)).unwrap_or('.');
    if letter != '?' {
        return letter;
    }
    let differs = old ^ new;
    let same_frame = none(differs, 51, 12);
    if row == 3 {
        let only_a = differs == 1 << F::accessed_bit();
        return if same_frame && only_a { 'a' } else { '.' };
    }
    let same_kind = none(differs, 61, 60) && !is(differs, F::host_writable_bit());
    if same_frame && same_kind { 'l' } else { '.' }
}

/// The letter of a result of [`SpteConfig::change_kind`].
pub(super) fn letter(result: Result<ChangeKind, IllegalChange>) -> char {
    match result {
        Ok(ChangeKind::Same) => '=',
        Ok(ChangeKind::Freeze(_)) => 'F',
        Ok(ChangeKind::Thaw) => 'T',
        Ok(ChangeKind::MapMmio) => 'I',
        Ok(ChangeKind::UnmapMmio) => 'u',
        Ok(ChangeKind::Link) => 'L',
        Ok(ChangeKind::Map) => 'M',
        Ok(ChangeKind::Unlink) => 'U',
        Ok(ChangeKind::Unmap) => 'Z',
        Ok(ChangeKind::Collapse) => 'C',
        Ok(ChangeKind::Split) => 'S',
        Ok(ChangeKind::TableAged(_)) => 'a',
        Ok(ChangeKind::Update(_)) => 'l',
        Err(_) => '.',
    }
}
