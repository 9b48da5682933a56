//! Why a guest could not go on, in words.

use core::fmt;

use mmu_core::dirty::RingFull;
use mmu_core::fault::{FaultError, FaultOutcome};
use shadow_mmu::ShadowError;
use shadow_mmu::guest::{ModeError, PointerError, WalkError};
use tdp_mmu::root::RootError;

use crate::virt::{Exit, NestedFault};

/// Why a guest could not go on.
#[derive(Clone, Copy, Debug)]
pub enum Trouble {
    /// The MMU could not map the page.
    Fault(NestedFault, FaultError),
    /// What the MMU made of the fault is not for the loop to deal with.
    Outcome(NestedFault, FaultOutcome),
    /// The shadow MMU could not handle the fault at this address.
    Shadow(u64, ShadowError),
    /// What the shadow MMU made of the fault at this address is not for the loop to deal with.
    ShadowOutcome(u64, FaultOutcome),
    /// The guest's own tables cannot be walked.
    Walk(WalkError),
    /// The guest's control registers are none that a processor accepts.
    Mode(ModeError),
    /// The guest's PAE pointers cannot be loaded.
    Pointers(PointerError),
    /// An instruction at this address writes to a table and cannot be emulated.
    Instruction(u64, [u8; 15]),
    /// No root to run on.
    Root(RootError),
    /// The guest stopped in a way that its program does not.
    Exit(Exit, u64),
    /// Pages that hardware logged found no room.
    Log(RingFull),
    /// It goes on for ever, and is here now.
    Endless(u64),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault, error) => write!(f, "{fault}: {error}"),
            Self::Outcome(fault, outcome) => write!(f, "{fault}: {outcome:?}"),
            Self::Shadow(address, error) => write!(f, "at {address:#x}: {error}"),
            Self::ShadowOutcome(address, outcome) => write!(f, "at {address:#x}: {outcome:?}"),
            Self::Walk(error) => error.fmt(f),
            Self::Mode(error) => error.fmt(f),
            Self::Pointers(error) => error.fmt(f),
            Self::Instruction(rip, bytes) => {
                write!(f, "at rip {rip:#x}: {bytes:02x?} is no store that can be emulated")
            }
            Self::Root(error) => error.fmt(f),
            Self::Exit(exit, rip) => write!(f, "at rip {rip:#x}: {exit}"),
            Self::Log(full) => full.fmt(f),
            Self::Endless(rip) => write!(f, "no end in sight at rip {rip:#x}"),
        }
    }
}
