//! The bits of guest entries: one set of masks per format, computed once.
//!
//! Owns [`Rules`] (KVM rows 1.31, 1.32, 4.4 to 4.8): what is present, reserved, a leaf; where the
//! address, the permissions, the accessed and dirty bits stand. Sources: SDM 3A 4.3 to 4.5 and 3C
//! 29.3.2; APM 2 5.2 to 5.4 and 15.25. Everything here is about the guest's entries and the guest's
//! processor; the entries of our own tables have `mmu_core::spte`. Pure values, no locks.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Gpa, Level, PAGE_SHIFT};

use super::cpu::{EptCpu, GuestControls, GuestCpu};
use super::memory::EntryWidth;
use super::mode::PagingMode;
use super::permit::{PermissionRules, PermissionTable};
use super::walk::{Dirtiness, EntryMeaning};

const PAGE_SIZE_BIT: u64 = 1 << 7;
const NX: u64 = 1 << 63;
/// Physical address bits of an 8-byte entry.
const ADDRESS: u64 = bits(51, 12);
/// Bits 20:13 of a 4 MiB page's entry are bits 39:32 of its address.
const PSE36_SHIFT: u32 = 32 - 13;

/// Bits `high` down to `low`; none when `high` is below `low`.
const fn bits(high: u32, low: u32) -> u64 {
    if high < low { 0 } else { (u64::MAX >> (63 - high)) & (u64::MAX << low) }
}

/// Masks of one level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct LevelRules {
    /// Reserved in an entry that leads to a table.
    table_reserved: u64,
    /// Reserved in an entry that maps a page.
    leaf_reserved: u64,
    /// Bits that make an entry a leaf: all of them at level 1, bit 7 where large pages exist.
    leaf: LeafRule,
    /// log2 of the bytes that an entry maps.
    shift: u32,
    /// Entries in a table, less one.
    index: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LeafRule {
    /// Never a leaf; bit 7 is reserved or ignored.
    #[default]
    Never,
    /// A leaf when bit 7 is set.
    PageSizeBit,
    /// Always a leaf.
    Always,
}

/// Where permissions stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permissions {
    /// W, U, and NX the other way round.
    Legacy,
    /// R, W and X; bit 10 for user fetches.
    Ept { exec_only: bool, mode_based_execute: bool },
}

/// A format's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rules {
    pub(super) mode: PagingMode,
    pub(super) width: EntryWidth,
    /// An entry is present if any of these is set.
    present: u64,
    /// Where the next table stands.
    address: u64,
    /// 0 in formats without.
    pub(super) accessed: u64,
    /// 0 in formats without.
    pub(super) dirty: u64,
    pub(super) permit: PermissionTable,
    permissions: Permissions,
    /// Protection keys are in use.
    pub(super) keys: bool,
    /// Pages that become dirty are logged first.
    pub(super) logs_dirty: bool,
    /// Fetches are told apart in error codes.
    pub(super) reports_fetch: bool,
    /// Reserved in a pointer that PAE keeps in registers.
    pub(super) pointer_reserved: u64,
    /// Bits 20:13 of a 4 MiB page are address bits.
    pse36: bool,
    levels: [LevelRules; Level::ALL.len()],
}

impl Rules {
    /// The rules of a linear address space; `mode` is what `cpu` and `controls` select.
    pub(super) fn linear(mode: PagingMode, cpu: &GuestCpu, controls: GuestControls) -> Self {
        let nxe = controls.contains(GuestControls::NXE) && controls.contains(GuestControls::PAE);
        let smep = controls.contains(GuestControls::SMEP);
        let smap = controls.contains(GuestControls::SMAP);
        let width = u32::from(cpu.max_phys_bits);
        let mut rules = Self {
            mode,
            width: EntryWidth::Eight,
            present: 1,
            address: ADDRESS,
            accessed: 1 << 5,
            dirty: 1 << 6,
            permit: PermissionTable::new(PermissionRules::Linear { smep, smap }),
            permissions: Permissions::Legacy,
            keys: false,
            logs_dirty: false,
            reports_fetch: nxe || smep,
            pointer_reserved: bits(63, width) | bits(8, 5) | bits(2, 1),
            pse36: false,
            levels: [LevelRules::default(); Level::ALL.len()],
        };
        match mode {
            PagingMode::Bits32 => rules.bits32(cpu, controls),
            PagingMode::Pae => {
                // Bits 62:52 are reserved here, ignored in long mode.
                rules.legacy_levels(bits(62, width) | if nxe { 0 } else { NX }, cpu);
            }
            _ => {
                rules.keys = controls.contains(GuestControls::PKE);
                rules.legacy_levels(bits(51, width) | if nxe { 0 } else { NX }, cpu);
            }
        }
        rules
    }

    /// The rules of an NPT of `levels`, which are those of the hypervisor's own long mode. Its
    /// write protection and keys do not matter: every nested access is a user access.
    pub(super) fn npt(levels: Level, cpu: &GuestCpu, controls: GuestControls) -> Self {
        let relevant = (controls & GuestControls::NXE) | GuestControls::PAE | GuestControls::PG;
        let cpu = GuestCpu { amd: true, ..*cpu };
        Self::linear(PagingMode::Npt { levels }, &cpu, relevant)
    }

    /// The rules of an EPT of `levels`.
    pub(super) fn ept(levels: Level, cpu: &EptCpu) -> Self {
        let high = bits(51, u32::from(cpu.max_phys_bits));
        let mbe = cpu.mode_based_execute;
        let mode = PagingMode::Ept { levels };
        let mut rules = Self {
            mode,
            width: EntryWidth::Eight,
            present: bits(2, 0) | if mbe { 1 << 10 } else { 0 },
            address: ADDRESS,
            accessed: if cpu.accessed_dirty { 1 << 8 } else { 0 },
            dirty: if cpu.accessed_dirty { 1 << 9 } else { 0 },
            permit: PermissionTable::new(PermissionRules::Ept { mode_based_execute: mbe }),
            permissions: Permissions::Ept { exec_only: cpu.exec_only, mode_based_execute: mbe },
            keys: false,
            logs_dirty: cpu.accessed_dirty,
            reports_fetch: true,
            pointer_reserved: 0,
            pse36: false,
            levels: [LevelRules::default(); Level::ALL.len()],
        };
        for (place, level) in rules.levels.iter_mut().zip(Level::ALL) {
            let large = match level {
                Level::L2 => cpu.huge_2m,
                Level::L3 => cpu.huge_1g,
                _ => false,
            };
            *place = LevelRules {
                table_reserved: high | bits(6, 3) | if large { 0 } else { PAGE_SIZE_BIT },
                leaf_reserved: high
                    | match level {
                        Level::L2 => bits(20, 12),
                        Level::L3 => bits(29, 12),
                        _ => 0,
                    },
                leaf: leaf_rule(level, large),
                shift: mode.entry_shift(level),
                index: mode.entries(level) - 1,
            };
        }
        rules
    }

    /// Levels of PAE and long mode, where `high` is reserved in every entry.
    fn legacy_levels(&mut self, high: u64, cpu: &GuestCpu) {
        for (place, level) in self.levels.iter_mut().zip(Level::ALL) {
            let large = match level {
                Level::L2 => true,
                Level::L3 => cpu.gbpages && self.mode != PagingMode::Pae,
                _ => false,
            };
            let top = level >= Level::L4;
            *place = LevelRules {
                table_reserved: high
                    | if large { 0 } else { PAGE_SIZE_BIT }
                    | if top && cpu.amd { 1 << 8 } else { 0 },
                // Bit 12 of a large page belongs to its memory type.
                leaf_reserved: high
                    | match level {
                        Level::L2 => bits(20, 13),
                        Level::L3 => bits(29, 13),
                        _ => 0,
                    },
                leaf: leaf_rule(level, large),
                shift: self.mode.entry_shift(level),
                index: self.mode.entries(level) - 1,
            };
        }
    }

    /// The two levels of 32-bit paging. Without CR4.PSE bit 7 is ignored; with PSE-36 a 4 MiB page
    /// has as many address bits as the processor, at most 40.
    fn bits32(&mut self, cpu: &GuestCpu, controls: GuestControls) {
        let pse = controls.contains(GuestControls::PSE);
        self.width = EntryWidth::Four;
        self.address = bits(31, 12);
        self.pse36 = cpu.pse36;
        let first_reserved =
            if cpu.pse36 { u32::from(cpu.max_phys_bits.min(40)) - PSE36_SHIFT } else { 13 };
        for (place, level) in self.levels.iter_mut().zip([Level::L1, Level::L2]) {
            *place = LevelRules {
                table_reserved: 0,
                leaf_reserved: if level == Level::L2 { bits(21, first_reserved) } else { 0 },
                leaf: leaf_rule(level, pse),
                shift: self.mode.entry_shift(level),
                index: self.mode.entries(level) - 1,
            };
        }
    }

    #[inline]
    fn level(&self, level: Level) -> LevelRules {
        self.levels.get(level.slot()).copied().unwrap_or_default()
    }

    /// Are there two kinds of execution?
    pub(super) const fn is_mode_based(&self) -> bool {
        matches!(self.permissions, Permissions::Ept { mode_based_execute: true, .. })
    }

    /// Is the entry present (KVM row 4.4)?
    #[inline]
    pub(super) const fn is_present(&self, value: u64) -> bool {
        value & self.present != 0
    }

    /// Does the walk end at this entry (KVM row 4.7)?
    #[inline]
    pub(super) fn is_leaf(&self, level: Level, value: u64) -> bool {
        match self.level(level).leaf {
            LeafRule::Never => false,
            LeafRule::PageSizeBit => value & PAGE_SIZE_BIT != 0,
            LeafRule::Always => true,
        }
    }

    /// Is a present entry rejected: a reserved bit, or in EPT any misconfiguration (KVM row 4.5)?
    #[inline]
    pub(super) fn is_rejected(&self, level: Level, value: u64) -> bool {
        let rules = self.level(level);
        let leaf = self.is_leaf(level, value);
        let reserved = if leaf { rules.leaf_reserved } else { rules.table_reserved };
        if value & reserved != 0 {
            return true;
        }
        let Permissions::Ept { exec_only, mode_based_execute } = self.permissions else {
            return false;
        };
        let (read, write) = (value & 1 != 0, value & 2 != 0);
        let execute = value & 4 != 0 || (mode_based_execute && value & 1 << 10 != 0);
        let unreadable = !read && (write || (execute && !exec_only));
        // Memory types 2, 3 and 7 do not exist; in an entry that leads to a table the field is
        // reserved.
        unreadable || (leaf && matches!(value >> 3 & 7, 2 | 3 | 7))
    }

    /// What one entry permits (KVM row 4.6).
    #[inline]
    pub(super) fn access(&self, value: u64) -> Access {
        let when = |bit: u64, access: Access| if bit != 0 { access } else { Access::empty() };
        let write = when(value & 2, Access::WRITE);
        match self.permissions {
            // NX without EFER.NXE is a reserved bit and was rejected.
            Permissions::Legacy => {
                Access::READ
                    | write
                    | when(value & 4, Access::USER)
                    | when(!value & NX, Access::EXEC)
            }
            Permissions::Ept { mode_based_execute, .. } => {
                // Without a bit of their own a user's fetches follow the others, also where the
                // host tells them apart.
                let user = value & if mode_based_execute { 1 << 10 } else { 4 };
                when(value & 1, Access::READ)
                    | write
                    | when(value & 4, Access::EXEC)
                    | when(user, Access::USER)
            }
        }
    }

    /// The table that an entry, or a root register, names.
    #[inline]
    pub(super) const fn table(&self, value: u64) -> Gpa {
        Gpa::new(value & self.address)
    }

    /// Where the entry for `address` stands in a table.
    #[inline]
    pub(super) fn entry_at(&self, table: Gpa, level: Level, address: u64) -> Gpa {
        let rules = self.level(level);
        let index = (address >> rules.shift) & rules.index;
        Gpa::new(table.get() + index * self.width.bytes())
    }

    /// The 4 KiB frame that `address` has in the page of a leaf (KVM row 4.8).
    #[inline]
    pub(super) fn frame(&self, level: Level, value: u64, address: u64) -> Gfn {
        let offset = (1 << self.level(level).shift) - 1;
        let mut page = value & self.address & !offset;
        if self.pse36 && level == Level::L2 {
            page |= (value & bits(20, 13)) << PSE36_SHIFT;
        }
        Gfn::new((page | (address & offset)) >> PAGE_SHIFT)
    }

    /// What a leaf says about writes.
    #[inline]
    pub(super) const fn dirtiness(&self, leaf: u64) -> Dirtiness {
        if self.dirty == 0 {
            Dirtiness::Untracked
        } else if leaf & self.dirty == 0 {
            Dirtiness::Clean
        } else {
            Dirtiness::Dirty
        }
    }

    /// What an entry says by itself.
    pub(super) fn meaning(&self, level: Level, value: u64) -> EntryMeaning {
        if !self.is_present(value) {
            return EntryMeaning::Absent;
        }
        if self.is_rejected(level, value) {
            return EntryMeaning::Rejected;
        }
        let access = self.access(value);
        if self.is_leaf(level, value) {
            let gfn = self.frame(level, value, 0);
            let accessed = value & self.accessed == self.accessed;
            EntryMeaning::Page { gfn, access, accessed, dirty: self.dirtiness(value) }
        } else {
            EntryMeaning::Table { table: self.table(value), access }
        }
    }

    /// The protection key of a leaf.
    #[inline]
    pub(super) const fn key(value: u64) -> u32 {
        // Four bits: the conversion loses nothing.
        #[expect(clippy::as_conversions, reason = "four bits")]
        {
            (value >> 59 & 15) as u32
        }
    }
}

const fn leaf_rule(level: Level, large: bool) -> LeafRule {
    match level {
        Level::L1 => LeafRule::Always,
        _ if large => LeafRule::PageSizeBit,
        _ => LeafRule::Never,
    }
}
