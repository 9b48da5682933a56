//! What can go wrong, with the values that did.
//!
//! Every error leaves the table as it was. Nothing here locks or orders anything.

use core::fmt;

use mmu_core::addr::{Gfn, GfnRange};

use crate::Seq;

/// Why a table, a pass or a window refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AgeError {
    /// The range holds no page.
    EmptyRange {
        /// The range given.
        range: GfnRange,
    },
    /// The range reaches past the last gfn that a 64-bit guest physical address can name.
    OutOfAddressSpace {
        /// The range given.
        range: GfnRange,
    },
    /// The range shares a page with one that the table already holds.
    Overlap {
        /// The range given.
        range: GfnRange,
        /// The lowest range in its way.
        existing: GfnRange,
    },
    /// No range of exactly this extent was added.
    UnknownRange {
        /// The range given.
        range: GfnRange,
    },
    /// The allocator had no memory for the range.
    OutOfMemory {
        /// The range given.
        range: GfnRange,
        /// Bytes that the range needs in all.
        bytes: u64,
    },
    /// The allocator had no memory for something whose size its user chose.
    NoMemoryFor {
        /// Bytes asked for.
        bytes: u64,
    },
    /// A word of a bitmap starts at a multiple of 64 pages.
    Unaligned {
        /// The gfn given.
        gfn: Gfn,
    },
    /// No sampler works within these limits.
    BadLimits {
        /// Regions at least.
        min_regions: u64,
        /// Regions at most.
        max_regions: u64,
        /// Samples per aggregation.
        samples: u64,
    },
    /// The fleet has as many VMs as it has room for.
    FleetFull {
        /// Its room.
        room: u64,
    },
    /// Somebody else holds the table's editor: a pass is under way.
    Busy,
    /// Passes, look-arounds and the start of a sampled interval must clear what they read;
    /// [`AgeMode::Test`](mmu_core::traits::AgeMode::Test) would count one access again and again.
    TestOnly,
    /// Another pass finished since this one started (KVM row 5.23: at most one increment per
    /// requested sequence number).
    Superseded {
        /// The youngest generation when the pass started.
        started: Seq,
        /// The youngest generation now.
        max_seq: Seq,
    },
    /// The youngest generation is [`Seq::MAX`]: no pass can start any more.
    SeqExhausted {
        /// The youngest generation.
        max_seq: Seq,
    },
    /// A window of that many generations, or one that ends there, cannot exist.
    BadWindow {
        /// Youngest generation asked for.
        max_seq: u64,
        /// Generations asked for.
        max_gens: u64,
    },
    /// A recount disagrees with what the table keeps: memory corruption, or a bug in this crate.
    Inconsistent {
        /// What disagrees.
        what: Inconsistency,
        /// First gfn of the block or range concerned.
        gfn: Gfn,
        /// What the table keeps.
        kept: u64,
        /// What the recount says.
        recounted: u64,
    },
}

/// What a recount found wrong ([`AgeTable::check`](crate::AgeTable::check)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Inconsistency {
    /// A block's summary against its pages.
    Summary,
    /// Bits of pages that are not tracked.
    Untracked,
    /// The victim index against the summaries.
    Index,
    /// The pages per generation against the summaries.
    Totals,
    /// Pages in a generation outside the window.
    Window,
}

impl fmt::Display for AgeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EmptyRange { range } => write!(f, "range {range} is empty"),
            Self::OutOfAddressSpace { range } => {
                write!(f, "range {range} reaches past the guest physical address space")
            }
            Self::Overlap { range, existing } => {
                write!(f, "range {range} overlaps {existing}, which is already there")
            }
            Self::UnknownRange { range } => write!(f, "range {range} was never added"),
            Self::OutOfMemory { range, bytes } => {
                write!(f, "no memory for the {bytes} bytes of range {range}")
            }
            Self::NoMemoryFor { bytes } => write!(f, "no memory for {bytes} bytes"),
            Self::Unaligned { gfn } => write!(f, "gfn {gfn} is not a multiple of 64"),
            Self::BadLimits { min_regions, max_regions, samples } => write!(
                f,
                "no sampler has {min_regions} to {max_regions} regions and {samples} samples"
            ),
            Self::FleetFull { room } => write!(f, "the fleet has room for {room} VMs"),
            Self::Busy => f.write_str("a pass or another edit is under way"),
            Self::TestOnly => f.write_str("the mode must clear the accessed bits it reads"),
            Self::Superseded { started, max_seq } => {
                write!(f, "the pass started at generation {started}, another reached {max_seq}")
            }
            Self::SeqExhausted { max_seq } => {
                write!(f, "generation {max_seq} is the last one that can be numbered")
            }
            Self::BadWindow { max_seq, max_gens } => {
                write!(f, "no window of {max_gens} generations ends at {max_seq}")
            }
            Self::Inconsistent { what, gfn, kept, recounted } => {
                write!(f, "{what:?} at gfn {gfn}: kept {kept:#x}, recounted {recounted:#x}")
            }
        }
    }
}

impl core::error::Error for AgeError {}
