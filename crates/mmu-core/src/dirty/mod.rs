//! Records of which guest pages were written: the bitmap of a slot, the ring of a vCPU.
//!
//! Pure structures: they count pages from 0 and know no slot, no tree and no lock of the MMU. The
//! MMU marks a page *after* it made the page's entry writable, and write protects the entry again
//! *after* it took the mark. With that order no write is lost: see [`DirtyBitmap`].
//!
//! [`DirtyBitmap`] (`bitmap`) has any number of markers and harvesters. [`DirtyRing`] (`ring`) has
//! one producer, and a consumer that is not trusted. Neither waits for anything, so both may be
//! used in a section.

mod bitmap;
pub mod ring;

use core::fmt;

pub use bitmap::{DirtyBitmap, WORD_PAGES};
pub use ring::{
    DirtyGfn, DirtyRing, ResetBusy, ResetEnd, ResetReport, RingConsumer, RingEntry, RingFull,
    RingSize, RingSizeError, SlotKey,
};

/// The allocator had no memory for a log; nothing was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory {
    /// Bytes asked for; the largest number if that many cannot be counted.
    pub bytes: u64,
}

impl fmt::Display for NoMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no memory for a dirty log of {} bytes", self.bytes)
    }
}

impl core::error::Error for NoMemory {}
