//! Why a guest could not go on, in words.

use core::fmt;

use mmu_core::dirty::RingFull;
use mmu_core::fault::{FaultError, FaultOutcome};
use tdp_mmu::root::RootError;

use crate::virt::{Exit, NestedFault};

/// Why a guest could not go on.
#[derive(Clone, Copy, Debug)]
pub enum Trouble {
    /// The MMU could not map the page.
    Fault(NestedFault, FaultError),
    /// What the MMU made of the fault is not for the loop to deal with.
    Outcome(NestedFault, FaultOutcome),
    /// No root to run on.
    Root(RootError),
    /// The guest stopped in a way that its program does not.
    Exit(Exit, u64),
    /// Pages that hardware logged found no room.
    Log(RingFull),
    /// It goes on for ever.
    Endless(Exit),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault, error) => write!(f, "{fault}: {error}"),
            Self::Outcome(fault, outcome) => write!(f, "{fault}: {outcome:?}"),
            Self::Root(error) => error.fmt(f),
            Self::Exit(exit, rip) => write!(f, "at rip {rip:#x}: {exit}"),
            Self::Log(full) => full.fmt(f),
            Self::Endless(exit) => write!(f, "no end in sight, last {exit}"),
        }
    }
}
