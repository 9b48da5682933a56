//! What can go wrong with shadow tables.

use core::fmt;

use mmu_core::fault::FaultError;
use mmu_core::frame::OutOfFrames;
use mmu_core::slot::TrackError;

use crate::radix::NoMemory;
use crate::rmap::RmapError;

/// Why a call on shadow tables did nothing. Entries are as they were; memory that was taken for
/// shadow pages or lists may have been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShadowError {
    /// As for a fault on direct tables.
    Fault(FaultError),
    /// No memory to keep track of pages with. Free some and try again.
    NoMemory {
        /// Bytes asked for; 0 if there is no number left for another page or descriptor.
        bytes: u64,
    },
    /// Direct tables beside cannot be kept from letting the guest write to a table of its own.
    Unwatched(TrackError),
    /// A reverse map contradicts an entry: the VM is dead from now on.
    Rmap(RmapError),
    /// The role's level is not that of the guest's top tables, or they have more levels than this
    /// MMU's.
    WrongLevel {
        /// Level of the role.
        role: mmu_core::addr::Level,
        /// Level of the MMU's top tables.
        host: mmu_core::addr::Level,
    },
    /// PAE begins with pointers in registers, and only PAE does.
    WrongRoot {
        /// The guest's paging mode.
        mode: crate::guest::PagingMode,
    },
}

impl From<FaultError> for ShadowError {
    fn from(error: FaultError) -> Self {
        Self::Fault(error)
    }
}

impl From<OutOfFrames> for ShadowError {
    fn from(error: OutOfFrames) -> Self {
        Self::Fault(error.into())
    }
}

impl From<NoMemory> for ShadowError {
    fn from(NoMemory { bytes }: NoMemory) -> Self {
        Self::NoMemory { bytes }
    }
}

impl From<TrackError> for ShadowError {
    fn from(error: TrackError) -> Self {
        Self::Unwatched(error)
    }
}

impl From<RmapError> for ShadowError {
    fn from(error: RmapError) -> Self {
        match error {
            RmapError::NoMemory { bytes } => Self::NoMemory { bytes },
            error => Self::Rmap(error),
        }
    }
}

impl fmt::Display for ShadowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(error) => error.fmt(f),
            Self::NoMemory { bytes } => write!(f, "no memory for {bytes} bytes of shadow pages"),
            Self::Unwatched(error) => error.fmt(f),
            Self::Rmap(error) => error.fmt(f),
            Self::WrongLevel { role, host } => {
                write!(f, "a root at {role} for tables whose top is at {host}")
            }
            Self::WrongRoot { mode } => write!(f, "not a root of paging mode {mode:?}"),
        }
    }
}

impl core::error::Error for ShadowError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Fault(error) => Some(error),
            Self::Rmap(error) => Some(error),
            Self::Unwatched(error) => Some(error),
            _ => None,
        }
    }
}
