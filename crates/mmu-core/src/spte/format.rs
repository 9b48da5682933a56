//! Where each format keeps its bits: hardware fields, KVM's software fields, and the proof that
//! they do not overlap.
//!
//! Owns [`SpteFormat`] and the three zero-sized formats. Everything here is a constant; what a
//! given CPU or VM makes of it is [`SpteConfig`](super::SpteConfig). The layout tables
//! ([`SpteFormat::LEAF`] and its siblings) are the single list of what a bit means in which class
//! of entry: the assertions at the end of the file, the legality check and the dump all read them.
//!
//! # Hardware bits that this layout would collide with (KVM row 9.7)
//!
//! Software fields live in bits that hardware ignores *under the controls that these tables are
//! used with*. Turning one of these on needs another layout first:
//!
//! | format | bit | control that gives it a meaning | our use |
//! |---|---|---|---|
//! | EPT | 57 | guest-paging verification (verify guest paging) | free |
//! | EPT | 58 | guest-paging verification (paging-write access) | free |
//! | EPT | 60 | supervisor shadow-stack control | A/D type |
//! | EPT | 61 | sub-page write permissions | A/D type |
//! | EPT | 10 | mode-based execute control | user execute, as hardware means it |
//! | EPT | 63 | EPT-violation #VE | suppress #VE, as hardware means it |
//! | legacy | 62:59 | CR4.PKE, CR4.PKS (protection keys) | A/D type; not saved permissions |
//! | legacy | 11 | HLAT paging (restart) | MMU-present |
//! | legacy | W=0 with D=1 | CR4.CET (shadow-stack page) | a write-protected dirty page |
//! | NPT | 60 | supervisor shadow stack (SSS) | A/D type |
//!
//! EPT bits 56 to 59 are not used at all.

use core::fmt::Debug;

use static_assertions::assert_impl_all;

use super::Spte;
use super::bits::{FRAME, bit, disjoint, range, union};
use super::memtype;

mod sealed {
    /// Keeps [`super::SpteFormat`] closed: other layouts would escape the assertions below.
    pub trait Sealed {}
}

/// Named fields of one class of entry. The masks are pairwise disjoint.
pub type Fields = &'static [(&'static str, u64)];

/// Bit 7: the entry is a leaf above level 1 (KVM row 1.21).
pub const PAGE_SIZE: u64 = bit(7);
/// Bits 61:60: how this entry tracks A and D (KVM row 1.5).
pub const AD_TYPE: u64 = range(61, 60);
/// Bit 63 of an EPT entry: an access that it refuses exits, and is not reported to the guest as a
/// virtualization exception (#VE).
pub const SUPPRESS_VE: u64 = bit(63);
/// log2 of the lowest bit of [`AD_TYPE`].
pub const AD_TYPE_SHIFT: u32 = 60;
/// Low half of the MMIO generation: its bits 6:0 (KVM row 1.37).
pub const MMIO_GEN_LOW: u64 = range(9, 3);
/// High half of the MMIO generation: its bits 17:7 (KVM row 1.37).
pub const MMIO_GEN_HIGH: u64 = range(62, 52);

/// How an entry tracks accesses and writes (KVM row 1.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AdType {
    /// Hardware (or an emulation of it) sets A and D. The value 0, so that PAE entries, whose bits
    /// 62:52 are reserved, can have it.
    #[default]
    Enabled = 0,
    /// Neither bit comes from hardware: accesses are tracked by taking the permissions away,
    /// writes by taking W away. A and D are software bits.
    Disabled = 1,
    /// A works, dirty tracking has to use W (an L2 running while PML is on for L1).
    WriteProtectOnly = 2,
}

impl AdType {
    /// The type as it stands in bits 61:60.
    #[inline]
    #[must_use]
    pub const fn bits(self) -> u64 {
        match self {
            Self::Enabled => 0,
            Self::Disabled => 1 << AD_TYPE_SHIFT,
            Self::WriteProtectOnly => 2 << AD_TYPE_SHIFT,
        }
    }

    /// The type of an entry; `None` for the unused encoding 3.
    #[inline]
    #[must_use]
    pub const fn of(spte: Spte) -> Option<Self> {
        match (spte.raw() & AD_TYPE) >> AD_TYPE_SHIFT {
            0 => Some(Self::Enabled),
            1 => Some(Self::Disabled),
            2 => Some(Self::WriteProtectOnly),
            _ => None,
        }
    }
}

/// A page-table format. Masks are `u64` with the bits in place; 0 means that the format has no
/// such bit.
///
/// Sealed: [`Ept`], [`Npt`] and [`Legacy`].
pub trait SpteFormat:
    sealed::Sealed + Copy + Clone + Default + Debug + PartialEq + Eq + Send + Sync + 'static
{
    /// For messages.
    const NAME: &'static str;
    /// Fewest levels of a table.
    const MIN_LEVELS: u8;

    /// Bits of every MMU-present entry besides [`Spte::MMU_PRESENT`] (KVM row 1.14).
    const PRESENT: u64;
    /// Reads allowed; in legacy and NPT entries this is the P bit.
    const READ: u64;
    /// Hardware W.
    const WRITABLE: u64;
    /// Fetches allowed (by the supervisor, with mode-based execute).
    const EXEC: u64;
    /// Fetches by user mode allowed, with mode-based execute (KVM row 1.17).
    const USER_EXEC: u64;
    /// Fetches forbidden.
    const NX: u64;
    /// User-mode accesses allowed.
    const USER: u64;
    /// Is [`USER`](Self::USER) set whatever the access set says (KVM row 1.15)?
    const USER_ALWAYS: bool;
    /// Hardware takes the entry for present if any of these is set.
    const HW_PRESENT: u64;
    /// Memory type and its modifier in a leaf.
    const MEMORY_TYPE: u64;
    /// Hardware judges bits 5:0 together and reports a misconfiguration (KVM row 1.32)? True of
    /// EPT alone.
    const MISCONFIGURABLE: bool;

    /// A: hardware's, or software's at the same place (KVM row 1.6).
    const ACCESSED: u64;
    /// D: hardware's, or software's at the same place (KVM row 1.6).
    const DIRTY: u64;
    /// The host mapping was writable when it was faulted in (KVM row 1.8).
    const HOST_WRITABLE: u64;
    /// W may be granted again without the MMU lock (KVM row 1.9).
    const MMU_WRITABLE: u64;

    /// Permissions that access tracking saves (KVM row 1.7). W is not among them.
    const TRACK_SAVE: u64;
    /// Distance from a saved permission to where it is saved.
    const TRACK_SHIFT: u32 = 52;
    /// Permissions that access tracking clears, besides A.
    const TRACK_CLEAR: u64;
    /// Where the saved permissions are.
    const TRACK_SAVED: u64 = Self::TRACK_SAVE << Self::TRACK_SHIFT;

    /// Default bits that make an MMIO entry, and the bits that are compared with them (KVM rows
    /// 1.34 and 1.35).
    const MMIO: (u64, u64);
    /// Bits of an MMIO entry that hold W and U.
    const MMIO_ACCESS: u64;
    /// Every bit that an MMIO mask may use, whatever the configuration (KVM row 1.36).
    const MMIO_ALLOWED: u64 = bit(63) | FRAME | bit(10) | range(2, 0);

    /// Fields of a leaf that hardware may use.
    const LEAF: Fields;
    /// Fields of an access-tracked leaf.
    const TRACKED_LEAF: Fields;
    /// Fields of a link to a lower table.
    const TABLE: Fields;
    /// Fields of an MMIO entry. `must be 0` names what keeps the class apart from the others.
    const MMIO_ENTRY: Fields;
}

/// Intel's second-level tables (SDM 3C 28.3.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ept;

/// AMD's nested tables: the 64-bit legacy format, every access being a user access (APM 2 15.25).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Npt;

/// The first-level format, as shadow paging builds it: 4 or 5 levels, or PAE with 3 (SDM 3A 4.4
/// and 4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Legacy;

impl sealed::Sealed for Ept {}
impl sealed::Sealed for Npt {}
impl sealed::Sealed for Legacy {}

impl SpteFormat for Ept {
    const NAME: &'static str = "EPT";
    const MIN_LEVELS: u8 = 4;

    const PRESENT: u64 = SUPPRESS_VE;
    const READ: u64 = bit(0);
    const WRITABLE: u64 = bit(1);
    const EXEC: u64 = bit(2);
    const USER_EXEC: u64 = bit(10);
    const NX: u64 = 0;
    const USER: u64 = 0;
    const USER_ALWAYS: bool = false;
    const HW_PRESENT: u64 = range(2, 0);
    const MEMORY_TYPE: u64 = memtype::TYPE | memtype::IGNORE_PAT;
    const MISCONFIGURABLE: bool = true;

    const ACCESSED: u64 = bit(8);
    const DIRTY: u64 = bit(9);
    const HOST_WRITABLE: u64 = bit(53);
    const MMU_WRITABLE: u64 = bit(55);

    const TRACK_SAVE: u64 = Self::READ | Self::EXEC | Self::USER_EXEC;
    const TRACK_CLEAR: u64 = Self::TRACK_SAVE | Self::WRITABLE;

    const MMIO: (u64, u64) = (Self::WRITABLE | Self::EXEC, range(2, 0) | bit(63));
    const MMIO_ACCESS: u64 = 0;

    const LEAF: Fields = &[
        ("R", Self::READ),
        ("W", Self::WRITABLE),
        ("X", Self::EXEC),
        ("memory-type", memtype::TYPE),
        ("ignore-PAT", memtype::IGNORE_PAT),
        ("PS", PAGE_SIZE),
        ("A", Self::ACCESSED),
        ("D", Self::DIRTY),
        ("XU", Self::USER_EXEC),
        ("present", Spte::MMU_PRESENT),
        ("frame", FRAME),
        ("host-writable", Self::HOST_WRITABLE),
        ("MMU-writable", Self::MMU_WRITABLE),
        ("A/D-type", AD_TYPE),
        ("suppress-VE", Self::PRESENT),
    ];
    const TRACKED_LEAF: Fields = &[
        ("memory-type", memtype::TYPE),
        ("ignore-PAT", memtype::IGNORE_PAT),
        ("PS", PAGE_SIZE),
        ("D", Self::DIRTY),
        ("present", Spte::MMU_PRESENT),
        ("frame", FRAME),
        ("saved-R", Self::READ << Self::TRACK_SHIFT),
        ("host-writable", Self::HOST_WRITABLE),
        ("saved-X", Self::EXEC << Self::TRACK_SHIFT),
        ("MMU-writable", Self::MMU_WRITABLE),
        ("A/D-type", AD_TYPE),
        ("saved-XU", Self::USER_EXEC << Self::TRACK_SHIFT),
        ("suppress-VE", Self::PRESENT),
    ];
    const TABLE: Fields = &[
        ("R", Self::READ),
        ("W", Self::WRITABLE),
        ("X", Self::EXEC),
        ("A", Self::ACCESSED),
        ("XU", Self::USER_EXEC),
        ("present", Spte::MMU_PRESENT),
        ("frame", FRAME),
        ("A/D-type", AD_TYPE),
        ("suppress-VE", Self::PRESENT),
    ];
    const MMIO_ENTRY: Fields = &[
        ("misconfigured RWX, suppress-VE", Self::MMIO.1),
        ("generation 6:0", MMIO_GEN_LOW),
        ("must be 0", Spte::MMU_PRESENT | Self::USER_EXEC),
        ("gfn", FRAME),
        ("generation 17:7", MMIO_GEN_HIGH),
    ];
}

/// Bits 0, 1 and 2, A, D and NX of every format that is not EPT.
mod legacy {
    use super::{bit, range};

    pub(super) const P: u64 = bit(0);
    pub(super) const W: u64 = bit(1);
    pub(super) const U: u64 = bit(2);
    pub(super) const A: u64 = bit(5);
    pub(super) const D: u64 = bit(6);
    pub(super) const HOST_WRITABLE: u64 = bit(9);
    pub(super) const MMU_WRITABLE: u64 = bit(10);
    pub(super) const NX: u64 = bit(63);
    /// An address bit that no CPU with MAXPHYADDR below 52 accepts, and P so that it is looked at.
    pub(super) const MMIO: u64 = bit(51) | P;
    pub(super) const MMIO_GFN: u64 = range(50, 12);
}

macro_rules! legacy_format {
    ($format:ident, $name:literal, $min_levels:literal, $user_always:literal) => {
        impl SpteFormat for $format {
            const NAME: &'static str = $name;
            const MIN_LEVELS: u8 = $min_levels;

            const PRESENT: u64 = 0;
            const READ: u64 = legacy::P;
            const WRITABLE: u64 = legacy::W;
            const EXEC: u64 = 0;
            const USER_EXEC: u64 = 0;
            const NX: u64 = legacy::NX;
            const USER: u64 = legacy::U;
            const USER_ALWAYS: bool = $user_always;
            const HW_PRESENT: u64 = legacy::P;
            const MEMORY_TYPE: u64 = 0;
            const MISCONFIGURABLE: bool = false;

            const ACCESSED: u64 = legacy::A;
            const DIRTY: u64 = legacy::D;
            const HOST_WRITABLE: u64 = legacy::HOST_WRITABLE;
            const MMU_WRITABLE: u64 = legacy::MMU_WRITABLE;

            const TRACK_SAVE: u64 = legacy::P;
            const TRACK_CLEAR: u64 = legacy::P | legacy::W;

            const MMIO: (u64, u64) = (legacy::MMIO, legacy::MMIO);
            const MMIO_ACCESS: u64 = legacy::W | legacy::U;

            const LEAF: Fields = &[
                ("P", legacy::P),
                ("W", legacy::W),
                ("U", legacy::U),
                ("A", legacy::A),
                ("D", legacy::D),
                ("PS", PAGE_SIZE),
                ("host-writable", legacy::HOST_WRITABLE),
                ("MMU-writable", legacy::MMU_WRITABLE),
                ("present", Spte::MMU_PRESENT),
                ("frame", FRAME),
                ("A/D-type", AD_TYPE),
                ("NX", legacy::NX),
            ];
            const TRACKED_LEAF: Fields = &[
                ("U", legacy::U),
                ("D", legacy::D),
                ("PS", PAGE_SIZE),
                ("host-writable", legacy::HOST_WRITABLE),
                ("MMU-writable", legacy::MMU_WRITABLE),
                ("present", Spte::MMU_PRESENT),
                ("frame", FRAME),
                ("saved-P", legacy::P << Self::TRACK_SHIFT),
                ("A/D-type", AD_TYPE),
                ("NX", legacy::NX),
            ];
            const TABLE: Fields = &[
                ("P", legacy::P),
                ("W", legacy::W),
                ("U", legacy::U),
                ("A", legacy::A),
                ("present", Spte::MMU_PRESENT),
                ("frame", FRAME),
                ("A/D-type", AD_TYPE),
            ];
            const MMIO_ENTRY: Fields = &[
                ("reserved bit and P", legacy::MMIO),
                ("W", legacy::W),
                ("U", legacy::U),
                ("generation 6:0", MMIO_GEN_LOW),
                ("must be 0", Spte::MMU_PRESENT | bit(10) | bit(63)),
                ("gfn", legacy::MMIO_GFN),
                ("generation 17:7", MMIO_GEN_HIGH),
            ];
        }
    };
}

legacy_format!(Npt, "NPT", 4, true);
legacy_format!(Legacy, "legacy", 3, false);

macro_rules! assert_layout {
    ($format:ident) => {
        assert_impl_all!($format: SpteFormat, Send, Sync, Copy);
        const _: () = {
            type F = $format;
            assert!(disjoint(F::LEAF) && disjoint(F::TRACKED_LEAF));
            assert!(disjoint(F::TABLE) && disjoint(F::MMIO_ENTRY));
            assert!(union(F::TABLE) & !union(F::LEAF) == 0);
            // Saved permissions go where nothing else of a leaf is.
            assert!(F::TRACK_SAVED & union(F::LEAF) == 0);
            assert!(union(F::TRACKED_LEAF) & (F::TRACK_CLEAR | F::ACCESSED | F::HW_PRESENT) == 0);
            assert!(F::TRACK_SAVE & F::WRITABLE == 0 && F::TRACK_SAVE & !F::TRACK_CLEAR == 0);
            // FROZEN and EMPTY: no permission, no frame, not present, and not MMIO.
            let void = Spte::FROZEN.raw() | Spte::EMPTY.raw();
            assert!(void & (F::HW_PRESENT | F::USER_EXEC | FRAME | Spte::MMU_PRESENT) == 0);
            assert!(Spte::FROZEN.raw() & F::MMIO.1 != F::MMIO.0);
            assert!(Spte::EMPTY.raw() & F::MMIO.1 != F::MMIO.0);
            // An MMIO entry: a value inside its mask, the mask where masks are allowed, and no
            // generation in it.
            assert!(F::MMIO.0 & !F::MMIO.1 == 0 && F::MMIO.1 & !F::MMIO_ALLOWED == 0);
            assert!((F::MMIO.1 | F::MMIO_ACCESS) & (MMIO_GEN_LOW | MMIO_GEN_HIGH) == 0);
            assert!(disjoint(&[("mask", F::MMIO.1), ("access", F::MMIO_ACCESS)]));
        };
    };
}

assert_layout!(Ept);
assert_layout!(Npt);
assert_layout!(Legacy);

const _: () = assert!(MMIO_GEN_LOW.count_ones() + MMIO_GEN_HIGH.count_ones() == 18);
// PAE reserves bits 62:52, so nothing but an A/D type or saved permissions may stand there.
const _: () =
    assert!(union(Legacy::LEAF) & range(62, 52) == AD_TYPE && AdType::Enabled.bits() == 0);
