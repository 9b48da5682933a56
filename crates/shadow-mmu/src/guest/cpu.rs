//! What decides a guest walk besides the tables: the guest's CPUID and its control registers, and
//! for nested guests what their hypervisor was offered.

use bitflags::bitflags;

/// Capabilities of the guest's processor: inputs of a walk, never constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestCpu {
    /// Physical address width, 32 to 52.
    pub max_phys_bits: u8,
    /// No-execute pages exist (EFER.NXE may be set).
    pub nx: bool,
    /// 1 GiB pages exist.
    pub gbpages: bool,
    /// 4 MiB pages reach beyond 4 GiB (PSE-36).
    pub pse36: bool,
    /// 57-bit linear addresses exist.
    pub la57: bool,
    /// Protection keys for user pages exist.
    pub pku: bool,
    /// Bit 8 of upper-level entries is reserved (AMD).
    pub amd: bool,
}

impl GuestCpu {
    /// A long-mode processor with 48-bit physical addresses, NX and 1 GiB pages.
    #[must_use]
    pub const fn baseline() -> Self {
        Self {
            max_phys_bits: 48,
            nx: true,
            gbpages: true,
            pse36: true,
            la57: false,
            pku: false,
            amd: false,
        }
    }
}

bitflags! {
    /// The bits of CR0, CR4 and EFER that choose the tables and their rules. CR0.WP is not among
    /// them: a guest may own it, so it comes with each [`super::Request`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct GuestControls: u16 {
        /// CR0.PG: paging is on.
        const PG = 1 << 0;
        /// CR4.PSE: 4 MiB pages in 32-bit paging.
        const PSE = 1 << 2;
        /// CR4.PAE: 8-byte entries.
        const PAE = 1 << 3;
        /// CR4.LA57: five levels.
        const LA57 = 1 << 4;
        /// CR4.SMEP: supervisor does not execute user pages.
        const SMEP = 1 << 5;
        /// CR4.SMAP: supervisor does not access user pages unless EFLAGS.AC is set.
        const SMAP = 1 << 6;
        /// CR4.PKE: protection keys for user pages.
        const PKE = 1 << 7;
        /// EFER.LME: long mode.
        const LME = 1 << 8;
        /// EFER.NXE: the no-execute bit means something.
        const NXE = 1 << 9;
    }
}

impl GuestControls {
    /// Long mode with four levels and NX.
    pub const LONG: Self = Self::PG.union(Self::PAE).union(Self::LME).union(Self::NXE);
}

/// The EPT that a guest hypervisor may use: what its IA32_VMX_EPT_VPID_CAP says, and what it chose
/// in its VMCS and EPT pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EptCpu {
    /// Physical address width, 32 to 52.
    pub max_phys_bits: u8,
    /// Entries that permit execution only are no misconfiguration.
    pub exec_only: bool,
    /// 2 MiB pages exist.
    pub huge_2m: bool,
    /// 1 GiB pages exist.
    pub huge_1g: bool,
    /// "Mode-based execute control for EPT" is on: bit 2 is for supervisor-mode linear addresses,
    /// bit 10 for user-mode ones.
    pub mode_based_execute: bool,
    /// Accessed and dirty flags are on (EPT pointer bit 6).
    pub accessed_dirty: bool,
    /// Advanced exit information: bits 9 to 11 of a violation's qualification say what the guest's
    /// own tables permit.
    pub advanced_info: bool,
    /// Five levels exist.
    pub five_levels: bool,
}

impl EptCpu {
    /// Four levels, 46 address bits; no mode-based execute, no advanced information.
    #[must_use]
    pub const fn baseline() -> Self {
        Self {
            max_phys_bits: 46,
            exec_only: true,
            huge_2m: true,
            huge_1g: true,
            mode_based_execute: false,
            accessed_dirty: true,
            advanced_info: false,
            five_levels: false,
        }
    }
}
