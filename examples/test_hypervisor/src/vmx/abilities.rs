//! What this CPU's VMX can do: its capability MSRs, and how control words follow from them.
//!
//! Owns [`Abilities`]. Everything is read when asked for; values only.

use bitflags::bitflags;
use x86::msr;

use super::wanted::Kind;
use crate::virt::{Features, VirtError};

bitflags! {
    /// IA32_VMX_EPT_VPID_CAP (SDM 3D A.10).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EptVpid: u64 {
        /// Entries may allow fetches only.
        const EXECUTE_ONLY = 1 << 0;
        /// Tables of 4 levels.
        const LEVELS_4 = 1 << 6;
        /// Tables of 5 levels.
        const LEVELS_5 = 1 << 7;
        /// Tables may be cached write-back.
        const WRITE_BACK = 1 << 14;
        /// Leaves of 2 MiB.
        const HUGE_2M = 1 << 16;
        /// Leaves of 1 GiB.
        const HUGE_1G = 1 << 17;
        /// INVEPT exists.
        const INVEPT = 1 << 20;
        /// Accessed and dirty bits.
        const ACCESSED_DIRTY = 1 << 21;
        /// INVEPT of one context.
        const INVEPT_SINGLE = 1 << 25;
        /// INVEPT of all contexts.
        const INVEPT_ALL = 1 << 26;
        /// INVVPID exists.
        const INVVPID = 1 << 32;
        /// INVVPID of one address.
        const INVVPID_ADDRESS = 1 << 40;
        /// INVVPID of one context.
        const INVVPID_SINGLE = 1 << 41;
        /// INVVPID of all contexts.
        const INVVPID_ALL = 1 << 42;
        const _ = !0;
    }
}

/// What VMX on this CPU can do.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// Number that VMXON regions and VMCSs begin with.
    pub revision: u32,
    /// Can controls that the first processors had fixed be chosen?
    true_controls: bool,
    /// EPT and VPID.
    pub ept_vpid: EptVpid,
}

/// CPUID.1:ECX, VMX.
const CPUID_VMX: u32 = 1 << 5;
/// Leaf of the sizes of addresses.
const CPUID_SIZES: u32 = 0x8000_0008;
/// IA32_FEATURE_CONTROL: locked, VMX outside SMX.
const LOCK: u64 = 1;
const OUTSIDE_SMX: u64 = 1 << 2;
/// IA32_VMX_BASIC: the "true" control MSRs exist.
const BASIC_TRUE: u64 = 1 << 55;

/// An MSR that the caller knows to exist.
fn msr(number: u32) -> u64 {
    // SAFETY: the program runs at CPL 0 and reading the MSRs that this file names has no effect
    // but the value.
    unsafe { msr::rdmsr(number) }
}

impl Abilities {
    /// What the CPU offers; `None` without VMX, with VMX locked away by the firmware, or without
    /// what a guest in extended tables needs at least.
    pub fn detect() -> Option<Self> {
        if core::arch::x86_64::__cpuid(1).ecx & CPUID_VMX == 0 {
            return None;
        }
        let control = msr(msr::IA32_FEATURE_CONTROL);
        if control & LOCK != 0 && control & OUTSIDE_SMX == 0 {
            return None;
        }
        let basic = msr(msr::IA32_VMX_BASIC);
        let mut abilities = Self {
            // Bit 31 is not part of the number.
            revision: basic as u32 & 0x7fff_ffff,
            true_controls: basic & BASIC_TRUE != 0,
            ept_vpid: EptVpid::empty(),
        };
        // The MSR exists where the controls may be 1.
        if abilities.allows(Kind::Primary, super::wanted::SECONDARY)
            && abilities.allows(Kind::Secondary, super::wanted::EPT)
        {
            abilities.ept_vpid = EptVpid::from_bits_retain(msr(msr::IA32_VMX_EPT_VPID_CAP));
        }
        let least = EptVpid::LEVELS_4 | EptVpid::WRITE_BACK | EptVpid::INVEPT | EptVpid::INVEPT_ALL;
        abilities.ept_vpid.contains(least).then_some(abilities)
    }

    /// Unlock VMX where the firmware has left the choice.
    pub fn unlock() {
        let control = msr(msr::IA32_FEATURE_CONTROL);
        if control & LOCK == 0 {
            // SAFETY: CPL 0; not locked, so the write is legal, and it gives VMX free and nothing
            // else.
            unsafe { msr::wrmsr(msr::IA32_FEATURE_CONTROL, control | LOCK | OUTSIDE_SMX) };
        }
    }

    /// The MSR that says which bits of a control word may be 1 (high half) and must be (low).
    fn limits(&self, kind: Kind) -> (u32, u32) {
        let number = match (kind, self.true_controls) {
            (Kind::Pin, true) => msr::IA32_VMX_TRUE_PINBASED_CTLS,
            (Kind::Pin, false) => msr::IA32_VMX_PINBASED_CTLS,
            (Kind::Primary, true) => msr::IA32_VMX_TRUE_PROCBASED_CTLS,
            (Kind::Primary, false) => msr::IA32_VMX_PROCBASED_CTLS,
            (Kind::Secondary, _) => msr::IA32_VMX_PROCBASED_CTLS2,
            (Kind::Exit, true) => msr::IA32_VMX_TRUE_EXIT_CTLS,
            (Kind::Exit, false) => msr::IA32_VMX_EXIT_CTLS,
            (Kind::Entry, true) => msr::IA32_VMX_TRUE_ENTRY_CTLS,
            (Kind::Entry, false) => msr::IA32_VMX_ENTRY_CTLS,
        };
        let value = msr(number);
        (value as u32, (value >> 32) as u32)
    }

    /// May all of `bits` be 1?
    pub fn allows(&self, kind: Kind, bits: u32) -> bool {
        self.limits(kind).1 & bits == bits
    }

    /// The control word that has `wanted` and what must be 1 besides.
    ///
    /// # Errors
    /// A wanted bit cannot be 1; the value is those.
    pub fn control(&self, kind: Kind, wanted: u32) -> Result<u32, VirtError> {
        let (must, may) = self.limits(kind);
        match wanted & !may {
            0 => Ok(wanted | must),
            missing => Err(VirtError { step: kind.name(), value: u64::from(missing) }),
        }
    }

    /// Bits of CR0 and CR4 that must be 1 in VMX operation.
    pub fn fixed_ones() -> (u64, u64) {
        (msr(msr::IA32_VMX_CR0_FIXED0), msr(msr::IA32_VMX_CR4_FIXED0))
    }

    /// In the words of both extensions.
    pub fn features(&self) -> Features {
        let has = |ability| self.ept_vpid.contains(ability);
        let may = |bits| self.allows(Kind::Secondary, bits);
        let vpid = may(super::wanted::VPID);
        Features {
            levels_5: has(EptVpid::LEVELS_5),
            huge_1g: has(EptVpid::HUGE_1G),
            accessed_dirty: has(EptVpid::ACCESSED_DIRTY),
            accessed_dirty_off: true,
            exec_only: has(EptVpid::EXECUTE_ONLY),
            log: may(super::wanted::LOG),
            flush_linear: vpid && has(EptVpid::INVVPID | EptVpid::INVVPID_ADDRESS),
            flush_context: has(EptVpid::INVEPT_SINGLE),
            phys_bits: core::arch::x86_64::__cpuid(CPUID_SIZES).eax as u8,
            tags: if vpid { u32::from(u16::MAX) } else { 0 },
        }
    }
}
