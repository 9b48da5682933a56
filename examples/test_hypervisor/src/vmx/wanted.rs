//! The control words that guests of this program run with.
//!
//! Owns [`Wanted`]: what follows from a [`VcpuSetup`]. `abilities` adds what the CPU insists on.
//! Values only.

use x86::vmx::vmcs::control::{
    EntryControls, ExitControls, PinbasedControls, PrimaryControls, SecondaryControls,
};

use super::abilities::Abilities;
use crate::virt::{HardwareLog, Translation, VcpuSetup, VirtError};

/// Kinds of control words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Pin-based execution controls.
    Pin,
    /// Primary processor-based execution controls.
    Primary,
    /// Secondary ones.
    Secondary,
    /// Exit controls.
    Exit,
    /// Entry controls.
    Entry,
}

impl Kind {
    /// For messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pin => "choosing pin-based controls",
            Self::Primary => "choosing primary controls",
            Self::Secondary => "choosing secondary controls",
            Self::Exit => "choosing exit controls",
            Self::Entry => "choosing entry controls",
        }
    }
}

/// Are there secondary controls?
pub const SECONDARY: u32 = PrimaryControls::SECONDARY_CONTROLS.bits();
/// Extended tables.
pub const EPT: u32 = SecondaryControls::ENABLE_EPT.bits();
/// Tagged translations.
pub const VPID: u32 = SecondaryControls::ENABLE_VPID.bits();
/// The hardware log.
pub const LOG: u32 = SecondaryControls::ENABLE_PML.bits();
/// Guests without paging, and in real mode.
const UNRESTRICTED: u32 = SecondaryControls::UNRESTRICTED_GUEST.bits();
/// The guest begins in 64-bit mode.
pub const LONG_GUEST: u32 = EntryControls::IA32E_MODE_GUEST.bits();

/// Control words, ready to be written.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Pin-based.
    pub pin: u32,
    /// Primary.
    pub primary: u32,
    /// Secondary.
    pub secondary: u32,
    /// Exit.
    pub exit: u32,
    /// Entry, without [`LONG_GUEST`].
    pub entry: u32,
    /// Exceptions that exit, a bit each.
    pub exceptions: u32,
}

/// Vector of page faults.
pub const PAGE_FAULT: u32 = 14;

impl Wanted {
    /// Are translations tagged?
    pub const fn has_vpid(&self) -> bool {
        self.secondary & VPID != 0
    }

    /// What a vCPU of this kind needs.
    ///
    /// # Errors
    /// The CPU does not offer it; the value is the bits that it lacks.
    pub fn new(abilities: &Abilities, setup: VcpuSetup) -> Result<Self, VirtError> {
        let pin = PinbasedControls::EXTERNAL_INTERRUPT_EXITING | PinbasedControls::NMI_EXITING;
        // Whatever would reach the host's own registers exits: ports, MSRs (without a bitmap),
        // debug registers, the APIC's task priority.
        let mut primary = PrimaryControls::HLT_EXITING
            | PrimaryControls::UNCOND_IO_EXITING
            | PrimaryControls::MOV_DR_EXITING
            | PrimaryControls::CR8_LOAD_EXITING
            | PrimaryControls::SECONDARY_CONTROLS;
        let mut secondary = 0;
        if abilities.allows(Kind::Secondary, VPID) {
            secondary |= VPID;
        }
        match setup.translation {
            Translation::Nested => {
                secondary |= EPT;
                // Without it, guests in real and protected mode are refused at entry.
                if abilities.allows(Kind::Secondary, UNRESTRICTED) {
                    secondary |= UNRESTRICTED;
                }
            }
            Translation::Shadow => {
                primary |= PrimaryControls::INVLPG_EXITING
                    | PrimaryControls::CR3_LOAD_EXITING
                    | PrimaryControls::CR3_STORE_EXITING;
            }
        }
        if setup.log == HardwareLog::On {
            secondary |= LOG;
        }
        let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE
            | ExitControls::SAVE_IA32_EFER
            | ExitControls::LOAD_IA32_EFER;
        let entry = EntryControls::LOAD_IA32_EFER;
        let page_faults = setup.page_faults_exit || setup.translation == Translation::Shadow;
        Ok(Self {
            pin: abilities.control(Kind::Pin, pin.bits())?,
            primary: abilities.control(Kind::Primary, primary.bits())?,
            secondary: abilities.control(Kind::Secondary, secondary)?,
            exit: abilities.control(Kind::Exit, exit.bits())?,
            entry: abilities.control(Kind::Entry, entry.bits())?,
            exceptions: if page_faults { 1 << PAGE_FAULT } else { 0 },
        })
    }
}
