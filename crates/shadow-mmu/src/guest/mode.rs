//! Paging modes of a guest (SDM 3A 4.1.1; APM 2 5.1), and the formats of nested guests.

use core::fmt;
use core::ops::RangeInclusive;

use mmu_core::addr::Level;

use super::cpu::{GuestControls, GuestCpu};

/// Which tables the guest uses to translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PagingMode {
    /// CR0.PG = 0: linear addresses are physical.
    None,
    /// Two levels of 4-byte entries; 4 MiB pages with CR4.PSE.
    Bits32,
    /// Three levels of 8-byte entries; four PDPTEs cached when CR3 is loaded.
    Pae,
    /// Long mode with 48-bit linear addresses.
    Long4,
    /// Long mode with 57-bit linear addresses (CR4.LA57).
    Long5,
    /// A nested guest's EPT, built by the guest hypervisor.
    Ept {
        /// 4 or 5.
        levels: Level,
    },
    /// A nested guest's NPT: the guest hypervisor's own long mode, walked for user accesses.
    Npt {
        /// 4 or 5.
        levels: Level,
    },
}

impl PagingMode {
    /// The mode that control registers select.
    ///
    /// # Errors
    /// [`ModeError`] names a combination that no processor accepts.
    pub fn of(cpu: &GuestCpu, controls: GuestControls) -> Result<Self, ModeError> {
        let has = |bit: GuestControls| controls.contains(bit);
        if !PHYS_BITS.contains(&cpu.max_phys_bits) {
            return Err(ModeError::PhysBits { bits: cpu.max_phys_bits });
        }
        if has(GuestControls::NXE) && !cpu.nx {
            return Err(ModeError::NxUnsupported);
        }
        if has(GuestControls::PKE) && !cpu.pku {
            return Err(ModeError::KeysUnsupported);
        }
        if !has(GuestControls::PG) {
            return Ok(Self::None);
        }
        if !has(GuestControls::LME) {
            return Ok(if has(GuestControls::PAE) { Self::Pae } else { Self::Bits32 });
        }
        if !has(GuestControls::PAE) {
            return Err(ModeError::LongModeWithoutPae);
        }
        if !has(GuestControls::LA57) {
            return Ok(Self::Long4);
        }
        if cpu.la57 { Ok(Self::Long5) } else { Err(ModeError::La57Unsupported) }
    }

    /// Level of the table that CR3 (or the EPT pointer) names; `None` without paging.
    #[must_use]
    pub const fn root_level(self) -> Option<Level> {
        match self {
            Self::None => None,
            Self::Bits32 => Some(Level::L2),
            Self::Pae => Some(Level::L3),
            Self::Long4 => Some(Level::L4),
            Self::Long5 => Some(Level::L5),
            Self::Ept { levels } | Self::Npt { levels } => Some(levels),
        }
    }

    /// Bytes in an entry.
    #[must_use]
    pub const fn entry_bytes(self) -> u64 {
        match self {
            Self::Bits32 => 4,
            _ => 8,
        }
    }

    /// Entries in a table at `level`.
    #[must_use]
    pub const fn entries(self, level: Level) -> u64 {
        match (self, level) {
            (Self::Bits32, _) => 1024,
            (Self::Pae, Level::L3) => 4,
            _ => 512,
        }
    }

    /// log2 of the bytes that one entry at `level` maps.
    #[must_use]
    pub fn entry_shift(self, level: Level) -> u32 {
        let index_bits = if self == Self::Bits32 { 10 } else { 9 };
        12 + index_bits * (u32::from(level.number()) - 1)
    }

    /// Memory reads of a walk down to a 4 KiB page: the levels whose entries stand in memory. PAE
    /// reads its PDPTE from the register cache.
    #[must_use]
    pub fn table_reads(self) -> u32 {
        let levels = self.root_level().map_or(0, |level| u32::from(level.number()));
        if self == Self::Pae { levels - 1 } else { levels }
    }

    /// Memory reads of a two-dimensional walk when every guest-physical address is itself
    /// translated by `nested` tables: n*m + n + m, where n are this mode's reads and m the nested
    /// ones. With 4 and 4 levels 24, with 5 and 5 levels 35.
    #[must_use]
    pub fn two_dimensional_reads(self, nested: Self) -> u32 {
        let (n, m) = (self.table_reads(), nested.table_reads());
        n * m + n + m
    }
}

/// Physical address widths that exist.
pub(super) const PHYS_BITS: RangeInclusive<u8> = 32..=52;

/// Control registers that no processor accepts, or a processor that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModeError {
    /// EFER.LME with CR0.PG and CR4.PAE = 0.
    LongModeWithoutPae,
    /// CR4.LA57 on a processor without it.
    La57Unsupported,
    /// EFER.NXE on a processor without no-execute pages.
    NxUnsupported,
    /// CR4.PKE on a processor without protection keys.
    KeysUnsupported,
    /// A physical address width outside 32 to 52.
    PhysBits {
        /// The width given.
        bits: u8,
    },
    /// Nested tables of other than four levels, or five where they exist.
    NestedLevels {
        /// The levels asked for.
        levels: Level,
    },
}

impl fmt::Display for ModeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unsupported = match self {
            Self::LongModeWithoutPae => {
                return f.write_str("EFER.LME and CR0.PG are set, CR4.PAE is not");
            }
            Self::PhysBits { bits } => {
                return write!(f, "{bits} physical address bits: there are 32 to 52");
            }
            Self::NestedLevels { levels } => {
                let levels = levels.number();
                return write!(f, "nested tables of {levels} levels are not offered");
            }
            Self::La57Unsupported => "CR4.LA57",
            Self::NxUnsupported => "EFER.NXE",
            Self::KeysUnsupported => "CR4.PKE",
        };
        write!(f, "{unsupported} is set; the guest's CPUID does not offer it")
    }
}

impl core::error::Error for ModeError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_registers_select_the_mode_of_the_manual() {
        use GuestControls as C;
        let cpu = GuestCpu { la57: true, ..GuestCpu::baseline() };
        let long = C::PG.union(C::PAE).union(C::LME);
        let table = [
            (C::empty(), Ok(PagingMode::None)),
            (C::LME.union(C::PAE), Ok(PagingMode::None)),
            (C::PG, Ok(PagingMode::Bits32)),
            (C::PG.union(C::PSE), Ok(PagingMode::Bits32)),
            (C::PG.union(C::PAE), Ok(PagingMode::Pae)),
            (long, Ok(PagingMode::Long4)),
            (long.union(C::LA57), Ok(PagingMode::Long5)),
            (C::PG.union(C::LME), Err(ModeError::LongModeWithoutPae)),
        ];
        for (controls, want) in table {
            assert_eq!(PagingMode::of(&cpu, controls), want, "{controls:?}");
        }
        let old = GuestCpu::baseline();
        let error = PagingMode::of(&old, long.union(C::LA57));
        assert_eq!(error, Err(ModeError::La57Unsupported));
    }

    #[test]
    fn bits_that_the_processor_does_not_have_are_refused_by_name() {
        let cpu = GuestCpu { nx: false, ..GuestCpu::baseline() };
        let refused = [
            (cpu, GuestControls::NXE, ModeError::NxUnsupported),
            (cpu, GuestControls::PKE, ModeError::KeysUnsupported),
        ];
        for (cpu, controls, error) in refused {
            assert_eq!(PagingMode::of(&cpu, controls), Err(error));
            assert!(std::string::ToString::to_string(&error).contains("CPUID"), "{error}");
        }
        for bits in [0, 31, 53, 255] {
            let cpu = GuestCpu { max_phys_bits: bits, ..GuestCpu::baseline() };
            let error = PagingMode::of(&cpu, GuestControls::PG);
            assert_eq!(error, Err(ModeError::PhysBits { bits }));
        }
    }

    #[test]
    fn every_mode_covers_its_linear_address_width() {
        let widths = [
            (PagingMode::Bits32, 32),
            (PagingMode::Pae, 32),
            (PagingMode::Long4, 48),
            (PagingMode::Long5, 57),
        ];
        for (mode, width) in widths {
            let root = mode.root_level().expect("paging is on");
            let entries = mode.entries(root).ilog2();
            assert_eq!(mode.entry_shift(root) + entries, width, "{mode:?}");
        }
    }

    #[test]
    fn two_dimensional_walks_cost_what_the_formula_says() {
        let ept = |levels| PagingMode::Ept { levels };
        assert_eq!(PagingMode::Long4.two_dimensional_reads(ept(Level::L4)), 24);
        assert_eq!(PagingMode::Long5.two_dimensional_reads(ept(Level::L5)), 35);
        assert_eq!(PagingMode::None.two_dimensional_reads(ept(Level::L4)), 4);
        assert_eq!(PagingMode::Pae.two_dimensional_reads(ept(Level::L4)), 14);
    }
}
