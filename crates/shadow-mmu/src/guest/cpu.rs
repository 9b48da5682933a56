//! What decides a guest walk besides the tables: the guest's CPUID and its control registers.

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
    /// The bits of CR0, CR4 and EFER that a walk looks at.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct GuestControls: u16 {
        /// CR0.PG: paging is on.
        const PG = 1 << 0;
        /// CR0.WP: supervisor writes respect read-only pages.
        const WP = 1 << 1;
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
