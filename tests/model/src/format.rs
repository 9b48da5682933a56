//! What the hardware means by the bits of a paging-structure entry, and how it reports a fault.
//!
//! Sources: Intel SDM volume 3, "Paging" and "The extended page-table mechanism (EPT)"; AMD APM
//! volume 2, "Page translation and protection" and "Nested paging". [`Format`] says which machine
//! is meant, [`Rules`] is that machine's rules as masks. Pure functions, no memory, no state.

use crate::access::{Access, AccessKind, FaultKind, Permissions, Stage, page_fault_code};

/// Who gets to see the difference between the two vendors' long mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Bit 8 of PML4 and PML5 entries is ignored.
    Intel,
    /// Bit 8 of PML4 and PML5 entries must be zero.
    Amd,
}

/// Paging modes of [`Legacy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 32-bit linear addresses, three levels, the top one of four entries.
    Pae,
    /// 48-bit linear addresses.
    Long4,
    /// 57-bit linear addresses.
    Long5,
}

/// Intel extended page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ept {
    /// 4 or 5.
    pub levels: u8,
    /// Physical address bits, 32 to 52.
    pub max_phys_bits: u8,
    /// Execute-only translations are supported.
    pub exec_only: bool,
    /// "Mode-based execute control" is on: bit 2 is for supervisor, bit 10 for user fetches.
    pub mode_based_execute: bool,
    /// Accessed and dirty flags are enabled in the EPTP.
    pub accessed_dirty: bool,
    /// 2 MiB pages are supported.
    pub huge_2m: bool,
    /// 1 GiB pages are supported.
    pub huge_1g: bool,
}

impl Ept {
    /// Four levels, 46 address bits, everything but mode-based execute.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            levels: 4,
            max_phys_bits: 46,
            exec_only: true,
            mode_based_execute: false,
            accessed_dirty: true,
            huge_2m: true,
            huge_1g: true,
        }
    }
}

impl Default for Ept {
    fn default() -> Self {
        Self::new()
    }
}

/// AMD nested page tables: the host's long-mode format, walked for user accesses, with accessed
/// and dirty bits always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Npt {
    /// 4 or 5.
    pub levels: u8,
    /// Physical address bits, 32 to 52.
    pub max_phys_bits: u8,
    /// The host's EFER.NXE.
    pub nxe: bool,
    /// 1 GiB pages are supported.
    pub huge_1g: bool,
}

impl Npt {
    /// Four levels, 48 address bits, NX and 1 GiB pages.
    #[must_use]
    pub const fn new() -> Self {
        Self { levels: 4, max_phys_bits: 48, nxe: true, huge_1g: true }
    }
}

impl Default for Npt {
    fn default() -> Self {
        Self::new()
    }
}

/// Ordinary page tables with 8-byte entries. Without SMEP, SMAP and protection keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Legacy {
    /// Levels and address width.
    pub mode: Mode,
    /// Whose long mode.
    pub vendor: Vendor,
    /// Physical address bits, 32 to 52.
    pub max_phys_bits: u8,
    /// EFER.NXE.
    pub nxe: bool,
    /// CR0.WP.
    pub wp: bool,
    /// CPUID says that 1 GiB pages are supported.
    pub gbpages: bool,
}

impl Legacy {
    /// `mode` with 46 address bits, NX, WP and 1 GiB pages, Intel's reserved bits.
    #[must_use]
    pub const fn new(mode: Mode) -> Self {
        Self { mode, vendor: Vendor::Intel, max_phys_bits: 46, nxe: true, wp: true, gbpages: true }
    }
}

/// Which machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Intel's second level.
    Ept(Ept),
    /// AMD's second level.
    Npt(Npt),
    /// A first level, or shadow tables.
    Legacy(Legacy),
}

/// What one entry says at one level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Not present; no other bit counts.
    Absent,
    /// Present with a reserved bit, or misconfigured.
    Reserved,
    /// Points to a table of the next lower level.
    Table {
        /// Physical address of the table.
        table: u64,
        /// What it grants.
        permissions: Permissions,
    },
    /// Maps a page of this level's size.
    Leaf {
        /// Physical address of the page's first byte.
        page: u64,
        /// What it grants.
        permissions: Permissions,
    },
}

#[derive(Clone, Copy, Debug, Default)]
struct LevelRules {
    /// Reserved in an entry that points to a table.
    table_reserved: u64,
    /// Reserved in an entry that maps a page.
    leaf_reserved: u64,
    /// Bit 7 set means that the entry maps a page (level 1 always does).
    may_be_huge: bool,
    /// The accessed bit, 0 when there is none.
    accessed: u64,
    /// The entry grants everything (PDPTEs of PAE have no permission bits).
    grants_all: bool,
}

/// A format's rules in a form that is quick to apply.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    format: Format,
    levels: u8,
    /// An entry is present if any of these is set.
    present: u64,
    /// Physical address bits of an entry.
    address: u64,
    dirty: u64,
    by_level: [LevelRules; 6],
}

const PAGE_SIZE_BIT: u64 = 1 << 7;
const NX: u64 = 1 << 63;

/// Bits `high` down to `low`, the manuals' `high:low`. Nothing when `low > high`.
const fn bits(high: u32, low: u32) -> u64 {
    if low > high {
        return 0;
    }
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

/// log2 of the bytes an entry of this level covers.
#[inline]
const fn shift(level: u8) -> u32 {
    12 + 9 * (level as u32 - 1)
}

impl Rules {
    /// The rules of `format`. Values out of range are taken as the nearest legal ones.
    #[must_use]
    pub fn new(format: &Format) -> Self {
        match *format {
            Format::Ept(ept) => Self::ept(ept),
            Format::Npt(npt) => Self::long_mode(
                *format,
                npt.levels.clamp(4, 5),
                npt.max_phys_bits,
                Vendor::Amd,
                npt.nxe,
                npt.huge_1g,
            ),
            Format::Legacy(legacy) => match legacy.mode {
                Mode::Pae => Self::pae(legacy),
                Mode::Long4 | Mode::Long5 => Self::long_mode(
                    *format,
                    if legacy.mode == Mode::Long5 { 5 } else { 4 },
                    legacy.max_phys_bits,
                    legacy.vendor,
                    legacy.nxe,
                    legacy.gbpages,
                ),
            },
        }
    }

    fn ept(ept: Ept) -> Self {
        let width = u32::from(ept.max_phys_bits.clamp(32, 52));
        let high = bits(51, width);
        let accessed = if ept.accessed_dirty { 1 << 8 } else { 0 };
        let mut by_level = [LevelRules::default(); 6];
        for (level, rules) in (0_u8..).zip(&mut by_level) {
            rules.accessed = accessed;
            rules.may_be_huge = match level {
                2 => ept.huge_2m,
                3 => ept.huge_1g,
                _ => false,
            };
            rules.table_reserved = high
                | match level {
                    4 | 5 => bits(7, 3),
                    _ if rules.may_be_huge => bits(6, 3),
                    _ => bits(7, 3),
                };
            rules.leaf_reserved = high
                | match level {
                    2 => bits(20, 12),
                    3 => bits(29, 12),
                    _ => 0,
                };
        }
        Self {
            format: Format::Ept(ept),
            levels: ept.levels.clamp(4, 5),
            present: bits(2, 0) | if ept.mode_based_execute { 1 << 10 } else { 0 },
            address: bits(51, 12),
            dirty: if ept.accessed_dirty { 1 << 9 } else { 0 },
            by_level,
        }
    }

    fn long_mode(
        format: Format,
        levels: u8,
        max_phys_bits: u8,
        vendor: Vendor,
        nxe: bool,
        huge_1g: bool,
    ) -> Self {
        let width = u32::from(max_phys_bits.clamp(32, 52));
        let high = bits(51, width) | if nxe { 0 } else { NX };
        let top = match vendor {
            Vendor::Intel => PAGE_SIZE_BIT,
            Vendor::Amd => bits(8, 7),
        };
        let mut by_level = [LevelRules::default(); 6];
        for (level, rules) in (0_u8..).zip(&mut by_level) {
            rules.accessed = 1 << 5;
            rules.may_be_huge = level == 2 || (level == 3 && huge_1g);
            rules.table_reserved = high
                | match level {
                    4 | 5 => top,
                    _ if rules.may_be_huge => 0,
                    _ => PAGE_SIZE_BIT,
                };
            // Bit 12 of a huge leaf is its PAT bit.
            rules.leaf_reserved = high
                | match level {
                    2 => bits(20, 13),
                    3 => bits(29, 13),
                    _ => 0,
                };
        }
        Self { format, levels, present: 1, address: bits(51, 12), dirty: 1 << 6, by_level }
    }

    fn pae(legacy: Legacy) -> Self {
        let width = u32::from(legacy.max_phys_bits.clamp(32, 52));
        let high = bits(62, width) | if legacy.nxe { 0 } else { NX };
        let mut by_level = [LevelRules::default(); 6];
        by_level[1] = LevelRules { leaf_reserved: high, accessed: 1 << 5, ..LevelRules::default() };
        by_level[2] = LevelRules {
            table_reserved: high,
            leaf_reserved: high | bits(20, 13),
            may_be_huge: true,
            accessed: 1 << 5,
            ..LevelRules::default()
        };
        by_level[3] = LevelRules {
            table_reserved: bits(63, width) | bits(8, 5) | bits(2, 1),
            grants_all: true,
            ..LevelRules::default()
        };
        Self {
            format: Format::Legacy(legacy),
            levels: 3,
            present: 1,
            address: bits(51, 12),
            dirty: 1 << 6,
            by_level,
        }
    }

    /// The format these rules are for.
    #[must_use]
    pub const fn format(&self) -> &Format {
        &self.format
    }

    /// The level of the root table.
    #[inline]
    #[must_use]
    pub const fn levels(&self) -> u8 {
        self.levels
    }

    /// The accessed bit of an entry at `level`; 0 when hardware sets none there.
    #[inline]
    #[must_use]
    pub fn accessed(&self, level: u8) -> u64 {
        self.level(level).accessed
    }

    /// The dirty bit of a leaf; 0 when hardware sets none.
    #[inline]
    #[must_use]
    pub const fn dirty(&self) -> u64 {
        self.dirty
    }

    /// Physical address of the root table that a root register with this value names.
    #[must_use]
    pub const fn root_table(&self, register: u64) -> u64 {
        match self.format {
            Format::Legacy(Legacy { mode: Mode::Pae, .. }) => register & bits(31, 5),
            _ => register & self.address,
        }
    }

    /// Physical address of the entry that `address` selects in a table of `level`.
    #[inline]
    #[must_use]
    pub const fn entry_address(&self, table: u64, level: u8, address: u64) -> u64 {
        table | (((address >> shift(level)) & 0x1ff) << 3)
    }

    /// Bytes of the page that a leaf of `level` maps, minus one.
    #[inline]
    #[must_use]
    pub const fn offset_mask(level: u8) -> u64 {
        (1 << shift(level)) - 1
    }

    /// Why `address` cannot be walked at all, if so.
    #[inline]
    #[must_use]
    pub const fn refuse(&self, address: u64) -> Option<FaultKind> {
        let width = shift(self.levels + 1);
        match self.format {
            Format::Legacy(Legacy { mode: Mode::Pae, .. }) if address >> 32 != 0 => {
                Some(FaultKind::BadAddress)
            }
            Format::Legacy(Legacy { mode: Mode::Pae, .. }) => None,
            Format::Legacy(_) => {
                let unused = 64 - width;
                let canonical = (((address << unused) as i64) >> unused) as u64;
                if canonical == address { None } else { Some(FaultKind::BadAddress) }
            }
            _ if address >> width != 0 => Some(FaultKind::NotPresent),
            _ => None,
        }
    }

    #[inline]
    fn level(&self, level: u8) -> &LevelRules {
        // Out of range (there is no such level) reads the last, which is as strict as any.
        &self.by_level[usize::from(level).min(5)]
    }

    /// What `entry` says when found in a table of `level` (1 to 5).
    #[inline]
    #[must_use]
    pub fn decode(&self, level: u8, entry: u64) -> Entry {
        if entry & self.present == 0 {
            return Entry::Absent;
        }
        let rules = self.level(level);
        let leaf = level <= 1 || (rules.may_be_huge && entry & PAGE_SIZE_BIT != 0);
        let reserved = if leaf { rules.leaf_reserved } else { rules.table_reserved };
        if entry & reserved != 0 || self.misconfigured(entry, leaf) {
            return Entry::Reserved;
        }
        let permissions = if rules.grants_all { Permissions::ALL } else { self.permissions(entry) };
        let address = entry & self.address;
        if leaf {
            let page = address & !Self::offset_mask(level.max(1));
            Entry::Leaf { page, permissions }
        } else {
            Entry::Table { table: address, permissions }
        }
    }

    /// EPT: a combination of permissions or a memory type that is not allowed.
    #[inline]
    const fn misconfigured(&self, entry: u64, leaf: bool) -> bool {
        let Format::Ept(ept) = self.format else {
            return false;
        };
        let read = entry & 1 != 0;
        let write = entry & 2 != 0;
        let execute = entry & 4 != 0 || (ept.mode_based_execute && entry & (1 << 10) != 0);
        let memory_type = (entry >> 3) & 7;
        (!read && write)
            || (!read && execute && !ept.exec_only)
            || (leaf && matches!(memory_type, 2 | 3 | 7))
    }

    #[inline]
    const fn permissions(&self, entry: u64) -> Permissions {
        let write = Permissions::WRITE.when(entry & 2 != 0);
        match self.format {
            Format::Ept(ept) => {
                let user_bit = if ept.mode_based_execute { 1 << 10 } else { 4 };
                Permissions::READ
                    .when(entry & 1 != 0)
                    .or(write)
                    .or(Permissions::EXECUTE.when(entry & 4 != 0))
                    .or(Permissions::EXECUTE_USER.when(entry & user_bit != 0))
                    .or(Permissions::USER)
            }
            // With NXE off bit 63 is reserved and was rejected before.
            Format::Npt(_) | Format::Legacy(_) => Permissions::READ
                .or(write)
                .or(Permissions::USER.when(entry & 4 != 0))
                .or(Permissions::EXECUTE.or(Permissions::EXECUTE_USER).when(entry & NX == 0)),
        }
    }

    /// Does the access count as a write at this stage?
    ///
    /// AMD: nested walks for guest tables are always writes. Intel: they are when accessed and
    /// dirty flags are enabled.
    #[inline]
    #[must_use]
    pub const fn writes(&self, access: Access) -> bool {
        let table = matches!(access.stage, Stage::GuestTable);
        match self.format {
            _ if matches!(access.kind, AccessKind::Write) => true,
            Format::Ept(ept) => table && ept.accessed_dirty,
            Format::Npt(_) => table,
            Format::Legacy(_) => false,
        }
    }

    /// The permissions that `access` needs.
    #[inline]
    #[must_use]
    pub const fn needs(&self, access: Access) -> Permissions {
        let kind = match access.kind {
            AccessKind::Read => Permissions::READ,
            AccessKind::Write => Permissions::WRITE,
            AccessKind::Fetch if access.user => Permissions::EXECUTE_USER,
            AccessKind::Fetch => Permissions::EXECUTE,
        };
        match self.format {
            Format::Ept(_) => kind.or(Permissions::WRITE.when(self.writes(access))),
            Format::Npt(_) => {
                kind.or(Permissions::WRITE.when(self.writes(access))).or(Permissions::USER)
            }
            // With CR0.WP clear a supervisor writes wherever it can read.
            Format::Legacy(legacy) if !access.user && !legacy.wp && self.writes(access) => {
                Permissions::READ
            }
            Format::Legacy(_) => kind.or(Permissions::USER.when(access.user)),
        }
    }

    /// How the hardware reports a fault: the #PF error code, NPF EXITINFO1, or the EPT violation's
    /// exit qualification (0 for an EPT misconfiguration, which has none).
    ///
    /// `permissions` are those of the whole walk, looked at for [`FaultKind::Protection`] only.
    #[must_use]
    pub const fn fault_code(
        &self,
        kind: FaultKind,
        permissions: Permissions,
        access: Access,
    ) -> u64 {
        if matches!(kind, FaultKind::BadAddress) {
            return 0;
        }
        match self.format {
            Format::Ept(ept) => self.ept_qualification(ept, kind, permissions, access),
            Format::Npt(npt) => {
                let fetch = npt.nxe && matches!(access.kind, AccessKind::Fetch);
                let stage = match access.stage {
                    Stage::GuestTable => 1 << 33,
                    Stage::Final | Stage::NoLinear => 1 << 32,
                };
                stage | page_fault_code(kind, self.writes(access), true, fetch)
            }
            Format::Legacy(legacy) => {
                let fetch = legacy.nxe && matches!(access.kind, AccessKind::Fetch);
                page_fault_code(kind, self.writes(access), access.user, fetch)
            }
        }
    }

    const fn ept_qualification(
        &self,
        ept: Ept,
        kind: FaultKind,
        permissions: Permissions,
        access: Access,
    ) -> u64 {
        if matches!(kind, FaultKind::Reserved) {
            return 0;
        }
        let access_bits = match access.kind {
            AccessKind::Read if self.writes(access) => 3,
            AccessKind::Write
                if matches!(access.stage, Stage::GuestTable) && ept.accessed_dirty =>
            {
                3
            }
            AccessKind::Read => 1,
            AccessKind::Write => 2,
            AccessKind::Fetch => 4,
        };
        let stage = match access.stage {
            Stage::Final => 0x180,
            Stage::GuestTable => 0x80,
            Stage::NoLinear => 0,
        };
        let mut code = access_bits | stage;
        // Bits 6:3 say what the entries together would permit; clear if one is not present.
        if matches!(kind, FaultKind::Protection) {
            if permissions.contains(Permissions::READ) {
                code |= 1 << 3;
            }
            if permissions.contains(Permissions::WRITE) {
                code |= 1 << 4;
            }
            if permissions.contains(Permissions::EXECUTE) {
                code |= 1 << 5;
            }
            if ept.mode_based_execute && permissions.contains(Permissions::EXECUTE_USER) {
                code |= 1 << 6;
            }
        }
        code
    }
}
