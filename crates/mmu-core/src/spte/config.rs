//! What the CPU and the VM decide about a tree of entries, checked once.
//!
//! Owns [`Capabilities`] (plain facts), [`SpteConfig`] (the same facts, validated and turned into
//! masks) and the classification of entries. `make`, `track`, `permit`, `legal`, `reserved` and
//! `mmio` add the methods. A configuration is immutable and there is no global one: trees of two
//! formats, or of two A/D modes, live side by side (KVM row 1.45).

use core::fmt;
use core::marker::PhantomData;

use super::bits::{self, FRAME, bit, range, when};
use super::format::{AdType, MMIO_GEN_HIGH, MMIO_GEN_LOW, PAGE_SIZE, SUPPRESS_VE, SpteFormat};
use super::memtype::MemType;
use super::reserved::{ReservedBits, ReservedParams};
use super::{Spte, SpteKind};
use crate::addr::{Gfn, Level, PAGE_SHIFT, Pfn};

/// Fewest physical address bits that a configuration may have.
pub const MIN_PHYS_BITS: u8 = 36;
/// Most physical address bits that an entry can hold.
pub const MAX_PHYS_BITS: u8 = 52;
/// Address bits that move up in MMIO entries on CPUs with L1TF (KVM row 1.38).
pub const L1TF_BITS: u32 = 5;
/// Fewest bits of an encrypted machine's frame addresses; a lower encryption bit is a mistake.
const MIN_UNENCRYPTED_BITS: u32 = 32;
/// Entries of a PAE page-directory-pointer table.
const PAE_ROOT_ENTRIES: u64 = 4;

/// An MMIO pattern other than the format's own (KVM row 1.41).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MmioValue {
    /// Bits that are set.
    pub value: u64,
    /// Bits that are compared.
    pub mask: u64,
}

/// What the CPU offers and the VM wants. Start from [`ept`](Self::ept), [`npt`](Self::npt) or
/// [`legacy`](Self::legacy) and change fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Levels of the tables: 4, 5, or 3 for PAE (legacy format only; KVM row 1.28).
    pub levels: u8,
    /// Hardware sets A and D. Without it, accesses are tracked by taking permissions away and
    /// writes by taking W away (KVM rows 1.6 and 1.7).
    pub accessed_dirty: bool,
    /// With `accessed_dirty`: A works, but writes are tracked by W (KVM row 1.5).
    pub write_protect_only: bool,
    /// EFER.NXE is on under these tables. EPT entries have execute bits regardless.
    pub nx: bool,
    /// EPT: entries that allow fetches and not reads are legal (KVM row 1.19).
    pub exec_only: bool,
    /// EPT: bit 10 rules fetches of user mode (KVM row 1.17).
    pub mode_based_exec: bool,
    /// Physical address bits that hardware accepts, 36 to 52: the raw CPUID value on Intel; on AMD
    /// with encryption on, the value minus the reduction that CPUID 8000_001F reports.
    pub max_phys_bits: u8,
    /// Leaves of 2 MiB exist.
    pub huge_2m: bool,
    /// Leaves of 1 GiB exist.
    pub huge_1g: bool,
    /// Cache the absence of a memory slot in MMIO entries (KVM rows 1.34 to 1.39).
    pub mmio_caching: bool,
    /// MMIO pattern to use instead of the format's.
    pub mmio_value: Option<MmioValue>,
    /// Take execution away from every leaf above 4 KiB (KVM row 1.20).
    pub nx_huge_pages: bool,
    /// `(me_value, me_mask)`: address bits that encryption uses, and those to set in every table
    /// link and every leaf that is not host MMIO (KVM row 1.26).
    pub memory_encryption: Option<(u64, u64)>,
    /// `Some(address bits of the L1 cache)` on CPUs with L1TF (KVM row 1.42).
    pub l1tf_cache_bits: Option<u8>,
    /// EPT: memory type of leaves whose [`LeafSpec`](super::LeafSpec) names none.
    pub memory_type: MemType,
}

impl Capabilities {
    const BASELINE: Self = Self {
        levels: 4,
        accessed_dirty: true,
        write_protect_only: false,
        nx: true,
        exec_only: false,
        mode_based_exec: false,
        max_phys_bits: 46,
        huge_2m: true,
        huge_1g: true,
        mmio_caching: true,
        mmio_value: None,
        nx_huge_pages: false,
        memory_encryption: None,
        l1tf_cache_bits: None,
        memory_type: MemType::WB_IGNORE_PAT,
    };

    /// EPT: 4 levels, hardware A/D, execute-only, all page sizes, MAXPHYADDR 46.
    #[must_use]
    pub const fn ept() -> Self {
        Self { exec_only: true, ..Self::BASELINE }
    }

    /// NPT: 4 levels, A/D, NX, all page sizes, MAXPHYADDR 48.
    #[must_use]
    pub const fn npt() -> Self {
        Self { max_phys_bits: 48, ..Self::BASELINE }
    }

    /// Legacy: 4 levels, A/D, NX, all page sizes, MAXPHYADDR 46.
    #[must_use]
    pub const fn legacy() -> Self {
        Self::BASELINE
    }

    /// Legacy with 3 levels (PAE): no 1 GiB pages.
    #[must_use]
    pub const fn pae() -> Self {
        Self { levels: 3, huge_1g: false, ..Self::BASELINE }
    }

    /// The A/D type of leaves.
    #[inline]
    #[must_use]
    pub const fn ad_type(&self) -> AdType {
        match (self.accessed_dirty, self.write_protect_only) {
            (false, _) => AdType::Disabled,
            (true, true) => AdType::WriteProtectOnly,
            (true, false) => AdType::Enabled,
        }
    }

    /// 3-level tables, whose top entries are PAE PDPTEs?
    #[inline]
    #[must_use]
    pub const fn is_pae(&self) -> bool {
        self.levels == 3
    }
}

/// [`Capabilities`] that no tree can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigError {
    /// The format has no tables of that many levels.
    Levels {
        /// Name of the format.
        format: &'static str,
        /// The number given.
        levels: u8,
    },
    /// Physical address bits outside 36 to 52.
    PhysBits {
        /// The number given.
        bits: u8,
    },
    /// Only EPT has this capability.
    NotThisFormat {
        /// Name of the format.
        format: &'static str,
        /// The capability.
        capability: &'static str,
    },
    /// PAE entries have no room for an A/D type: bits 62:52 are reserved.
    PaeAdType {
        /// The type asked for.
        ad_type: AdType,
    },
    /// 1 GiB pages without 2 MiB pages, or with PAE.
    HugePages {
        /// Levels of the tables.
        levels: u8,
    },
    /// Execution cannot be taken away without NX.
    NxHugePagesWithoutNx,
    /// The encryption bits are not address bits, or too low.
    EncryptionMask {
        /// The mask given.
        mask: u64,
        /// The bits that a mask may have.
        allowed: u64,
    },
    /// The encryption value has bits outside its mask.
    EncryptionValue {
        /// The value given.
        value: u64,
        /// The mask given.
        mask: u64,
    },
    /// The L1TF mitigation needs MAXPHYADDR <= cache bits <= 46, and bits that encryption leaves
    /// free.
    L1tf {
        /// The cache address bits given.
        cache_bits: u8,
        /// Physical address bits.
        max_phys_bits: u8,
    },
    /// The MMIO pattern uses bits that it may not, or that hold the gfn, the access or the
    /// generation, or it matches an entry that is not MMIO, or leaves open whether the guest gets
    /// #VE.
    Mmio {
        /// Bits that are set.
        value: u64,
        /// Bits that are compared.
        mask: u64,
        /// The bits at fault; 0 if the pattern matches EMPTY or FROZEN.
        bits: u64,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Levels { format, levels } => {
                write!(f, "{format} tables cannot have {levels} levels")
            }
            Self::PhysBits { bits } => {
                write!(f, "{bits} physical address bits are not in 36..=52")
            }
            Self::NotThisFormat { format, capability } => {
                write!(f, "{format} entries have no {capability}")
            }
            Self::PaeAdType { ad_type } => {
                write!(f, "PAE entries cannot hold the A/D type {ad_type:?}")
            }
            Self::HugePages { levels } => {
                write!(f, "1 GiB pages need 2 MiB pages and more than {levels} levels")
            }
            Self::NxHugePagesWithoutNx => f.write_str("non-executable huge pages need NX"),
            Self::EncryptionMask { mask, allowed } => {
                write!(f, "encryption mask {mask:#x} is not inside {allowed:#x}")
            }
            Self::EncryptionValue { value, mask } => {
                write!(f, "encryption value {value:#x} is not inside its mask {mask:#x}")
            }
            Self::L1tf { cache_bits, max_phys_bits } => write!(
                f,
                "no L1TF mask for {cache_bits} cache address bits, {max_phys_bits} physical"
            ),
            Self::Mmio { value, mask, bits } => {
                write!(f, "MMIO value {value:#x} mask {mask:#x} collides in bits {bits:#x}")
            }
        }
    }
}

impl core::error::Error for ConfigError {}

/// Validated capabilities of one format, as masks. Makes, reads and judges entries.
#[derive(Clone, Debug)]
pub struct SpteConfig<F: SpteFormat> {
    pub(super) caps: Capabilities,
    pub(super) root: Level,
    pub(super) max_leaf: Level,
    /// A/D type bits of every leaf.
    pub(super) ad_bits: u64,
    /// Encryption bits that leaves and links carry, and all that are not frame address.
    pub(super) me_value: u64,
    pub(super) me_mask: u64,
    pub(super) max_pfn: Pfn,
    pub(super) max_gfn: Gfn,
    pub(super) reserved: ReservedBits,
    /// What MMIO entries look like; `None` when they are not used. The mask holds
    /// [`Spte::MMU_PRESENT`], so that one comparison classifies.
    pub(super) mmio: Option<MmioValue>,
    /// Address bits that MMIO entries have set and hold shifted (0 without L1TF).
    pub(super) l1tf: u64,
    format: PhantomData<F>,
}

impl<F: SpteFormat> SpteConfig<F> {
    /// Check the capabilities and turn them into masks.
    ///
    /// MMIO caching is switched off, not refused, where the format has no reserved address bit
    /// left to use (KVM row 1.35); see [`mmio_enabled`](Self::mmio_enabled).
    ///
    /// # Errors
    /// [`ConfigError`] names the first contradiction and its values.
    pub fn new(caps: Capabilities) -> Result<Self, ConfigError> {
        let levels = ConfigError::Levels { format: F::NAME, levels: caps.levels };
        let root = match Level::new(caps.levels) {
            Ok(root) if caps.levels >= F::MIN_LEVELS => root,
            Ok(_) | Err(_) => return Err(levels),
        };
        check_features::<F>(&caps)?;
        let (me_value, me_mask) = encryption(&caps)?;
        let l1tf = l1tf_mask(&caps, me_mask)?;
        let mmio = mmio_pattern::<F>(&caps, me_mask, l1tf)?;
        let phys_bits = bits::number(caps.max_phys_bits);
        let frame_bits = bits::lowest(me_mask).min(phys_bits);
        let reach = if caps.is_pae() {
            root.pages().saturating_mul(PAE_ROOT_ENTRIES).min(root.table_pages())
        } else {
            root.table_pages()
        };
        Ok(Self {
            caps,
            root,
            max_leaf: match (caps.huge_2m, caps.huge_1g) {
                (_, true) => Level::L3,
                (true, false) => Level::L2,
                (false, false) => Level::L1,
            },
            ad_bits: caps.ad_type().bits(),
            me_value,
            me_mask,
            max_pfn: Pfn::new(bit(frame_bits - PAGE_SHIFT)),
            max_gfn: Gfn::new(bit(phys_bits - PAGE_SHIFT).min(reach)),
            reserved: ReservedBits::new::<F>(&host_reserved::<F>(&caps, root, me_value, me_mask)),
            mmio,
            l1tf,
            format: PhantomData,
        })
    }

    /// The facts that this configuration was made from.
    #[must_use]
    pub const fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    /// Level of the root table.
    #[inline]
    #[must_use]
    pub const fn levels(&self) -> Level {
        self.root
    }

    /// Does hardware maintain A and D in leaves?
    #[inline]
    #[must_use]
    pub const fn ad_enabled(&self) -> bool {
        self.caps.accessed_dirty
    }

    /// Does hardware set A in links at `level`? Not in PAE page-directory-pointer entries, where
    /// the bit is reserved.
    #[inline]
    #[must_use]
    pub const fn has_table_accessed(&self, level: Level) -> bool {
        self.caps.accessed_dirty && !self.is_pdpte(level)
    }

    /// The A/D type of the leaves (KVM row 1.5).
    #[inline]
    #[must_use]
    pub const fn ad_type(&self) -> AdType {
        self.caps.ad_type()
    }

    /// Are writes tracked by W, not by D (KVM row 1.5)?
    #[inline]
    #[must_use]
    pub const fn dirty_by_write_protect(&self) -> bool {
        self.ad_bits != 0
    }

    /// One past the highest gfn that an entry of this tree may map: what MAXPHYADDR and the levels
    /// both reach.
    #[inline]
    #[must_use]
    pub const fn max_gfn_exclusive(&self) -> Gfn {
        self.max_gfn
    }

    /// One past the highest frame that an entry can name, encryption bits excluded.
    #[inline]
    #[must_use]
    pub const fn max_pfn_exclusive(&self) -> Pfn {
        self.max_pfn
    }

    /// The highest level at which a leaf may stand.
    #[inline]
    #[must_use]
    pub const fn max_leaf_level(&self) -> Level {
        self.max_leaf
    }

    /// Is execution taken away from leaves above 4 KiB?
    #[inline]
    #[must_use]
    pub const fn nx_huge_pages(&self) -> bool {
        self.caps.nx_huge_pages
    }

    /// The frame of a present entry, without encryption bits (KVM row 1.26).
    #[inline]
    #[must_use]
    pub const fn pfn(&self, spte: Spte) -> Pfn {
        spte.without(self.me_mask).pfn()
    }

    /// Address bits of entries that memory encryption takes from the frame number (KVM row 1.26).
    #[inline]
    #[must_use]
    pub const fn encryption_mask(&self) -> u64 {
        self.me_mask
    }

    /// The one class that `spte` belongs to when it stands at `level`.
    ///
    /// Looks at the shape only: a leaf may still have reserved bits
    /// ([`reserved_bits`](Self::reserved_bits)). MMIO entries stand at level 1 only, leaves at most
    /// at [`max_leaf_level`](Self::max_leaf_level); elsewhere such values are
    /// [`SpteKind::Corrupt`].
    #[inline]
    #[must_use]
    pub const fn kind(&self, spte: Spte, level: Level) -> SpteKind {
        if spte.is_mmu_present() {
            if matches!(level, Level::L1) {
                SpteKind::Leaf
            } else if !spte.has(PAGE_SIZE) {
                SpteKind::Table
            } else if level.number() <= self.max_leaf.number() {
                SpteKind::Leaf
            } else {
                SpteKind::Corrupt
            }
        } else if spte.is_empty() {
            SpteKind::Empty
        } else if spte.is_frozen() {
            SpteKind::Frozen
        } else if matches!(level, Level::L1) && self.is_mmio(spte) {
            SpteKind::Mmio
        } else {
            SpteKind::Corrupt
        }
    }

    /// Is an entry at `level` a PAE page-directory-pointer entry?
    pub(super) const fn is_pdpte(&self, level: Level) -> bool {
        self.caps.is_pae() && matches!(level, Level::L3)
    }
}

/// The capabilities that do not involve masks.
fn check_features<F: SpteFormat>(caps: &Capabilities) -> Result<(), ConfigError> {
    if !(MIN_PHYS_BITS..=MAX_PHYS_BITS).contains(&caps.max_phys_bits) {
        return Err(ConfigError::PhysBits { bits: caps.max_phys_bits });
    }
    let foreign = [
        (caps.exec_only, "execute-only pages"),
        (caps.mode_based_exec, "mode-based execute control"),
    ];
    for (wanted, capability) in foreign {
        if wanted && !F::MISCONFIGURABLE {
            return Err(ConfigError::NotThisFormat { format: F::NAME, capability });
        }
    }
    if caps.is_pae() && caps.ad_type() != AdType::Enabled {
        return Err(ConfigError::PaeAdType { ad_type: caps.ad_type() });
    }
    if caps.huge_1g && (!caps.huge_2m || caps.is_pae()) {
        return Err(ConfigError::HugePages { levels: caps.levels });
    }
    if caps.nx_huge_pages && F::NX != 0 && !caps.nx {
        return Err(ConfigError::NxHugePagesWithoutNx);
    }
    Ok(())
}

/// `(me_value, me_mask)`, checked (KVM row 1.26).
fn encryption(caps: &Capabilities) -> Result<(u64, u64), ConfigError> {
    let Some((value, mask)) = caps.memory_encryption else {
        return Ok((0, 0));
    };
    let allowed = FRAME & range(51, MIN_UNENCRYPTED_BITS);
    if mask & !allowed != 0 {
        return Err(ConfigError::EncryptionMask { mask, allowed });
    }
    if value & !mask != 0 {
        return Err(ConfigError::EncryptionValue { value, mask });
    }
    Ok((value, mask))
}

/// The top five cache address bits, which MMIO entries have set (KVM row 1.42).
fn l1tf_mask(caps: &Capabilities, me_mask: u64) -> Result<u64, ConfigError> {
    let Some(cache_bits) = caps.l1tf_cache_bits else {
        return Ok(0);
    };
    let top = bits::number(cache_bits);
    let refused = ConfigError::L1tf { cache_bits, max_phys_bits: caps.max_phys_bits };
    if cache_bits < caps.max_phys_bits || top + L1TF_BITS >= 52 {
        return Err(refused);
    }
    let mask = range(top - 1, top - L1TF_BITS);
    if (mask | mask << L1TF_BITS) & me_mask != 0 {
        return Err(refused);
    }
    Ok(mask)
}

/// What MMIO entries look like, if there are any (KVM rows 1.34 to 1.36).
fn mmio_pattern<F: SpteFormat>(
    caps: &Capabilities,
    me_mask: u64,
    l1tf: u64,
) -> Result<Option<MmioValue>, ConfigError> {
    if !caps.mmio_caching {
        return Ok(None);
    }
    let Some(MmioValue { value, mask }) = caps.mmio_value.or(default_mmio::<F>(caps, me_mask))
    else {
        return Ok(None);
    };
    let gfn = range(bits::number(caps.max_phys_bits) - 1, PAGE_SHIFT);
    let taken = gfn | l1tf | l1tf << L1TF_BITS | F::MMIO_ACCESS | MMIO_GEN_LOW | MMIO_GEN_HIGH;
    let collision = (mask & (taken | !F::MMIO_ALLOWED)) | (value & !mask);
    // The guest gets #VE only if the pattern says so in words (KVM row 1.3).
    let exits =
        mask & SUPPRESS_VE != 0 || mask == 0 || value & F::HW_PRESENT == F::WRITABLE | F::EXEC;
    let collision = collision | when(!exits, F::PRESENT & SUPPRESS_VE);
    let matches_other =
        Spte::EMPTY.raw() & mask == value || Spte::FROZEN.raw() & mask == value || mask == 0;
    if collision != 0 || matches_other {
        return Err(ConfigError::Mmio { value, mask, bits: collision });
    }
    Ok(Some(MmioValue { value, mask: mask | Spte::MMU_PRESENT }))
}

/// The format's own pattern. Legacy formats need an address bit that this CPU reserves: bit 51, or
/// with encryption every bit from the lowest reserved one up (KVM row 1.35).
fn default_mmio<F: SpteFormat>(caps: &Capabilities, me_mask: u64) -> Option<MmioValue> {
    let (value, mask) = F::MMIO;
    if F::MISCONFIGURABLE {
        return Some(MmioValue { value, mask });
    }
    let mut lowest = bits::number(caps.max_phys_bits);
    if me_mask == 0 {
        return (lowest < 52).then_some(MmioValue { value, mask });
    }
    while me_mask & bit(lowest) != 0 {
        lowest += 1;
    }
    let value = range(51, lowest) | F::READ;
    (lowest < 52).then_some(MmioValue { value, mask: value })
}

/// What hardware rejects in our own entries.
fn host_reserved<F: SpteFormat>(
    caps: &Capabilities,
    root: Level,
    me_value: u64,
    me_mask: u64,
) -> ReservedParams {
    ReservedParams {
        root,
        max_phys_bits: caps.max_phys_bits,
        nx: caps.nx,
        huge_2m: caps.huge_2m,
        huge_1g: caps.huge_1g,
        exec_only: caps.exec_only,
        mode_based_exec: caps.mode_based_exec,
        // Bit 8 of upper tables is MBZ on AMD; NPT tables exist nowhere else.
        upper_global_reserved: F::USER_ALWAYS,
        accepted: when(me_mask != 0, me_value),
        refused: me_mask & !me_value,
    }
}
