//! What memory slots cost (KVM row 6.23).
//!
//! Owns [`SlotOverhead`]. KVM pays about 0.05 % of the guest's memory for write tracking and 0.2 %
//! for reverse maps where they are allocated; here a slot costs the same few bytes however large it
//! is, and what it costs is asked, not assumed. Pure.

use core::mem::size_of;

use super::{Memslots, SlotWriter};
use crate::addr::{PAGE_SIZE, to_u64};

/// Bytes that the slots of a VM take, by what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotOverhead {
    /// The set that readers see: slots, indexes, and room for more.
    pub live: u64,
    /// The set that the next change is prepared in.
    pub spare: u64,
    /// 4 KiB pages of guest memory that all this describes.
    pub guest_pages: u64,
}

impl SlotOverhead {
    /// Bytes in all.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.live.saturating_add(self.spare)
    }

    /// Bytes per million bytes of guest memory, rounded up; 0 without guest memory.
    #[must_use]
    pub fn per_million(&self) -> u64 {
        let guest = u128::from(self.guest_pages) * u128::from(PAGE_SIZE);
        if guest == 0 {
            return 0;
        }
        let share = (u128::from(self.bytes()) * 1_000_000).div_ceil(guest);
        u64::try_from(share).unwrap_or(u64::MAX)
    }
}

impl Memslots {
    /// Bytes that this set takes, spare room included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        to_u64(size_of::<Self>()).saturating_add(self.heap_bytes())
    }
}

impl SlotWriter {
    /// What the slots cost at the moment.
    ///
    /// # Panics
    /// When a callback panicked inside the latest publication.
    pub fn overhead(&mut self) -> SlotOverhead {
        self.with_both(|live, spare| SlotOverhead {
            live: live.bytes(),
            spare: spare.bytes(),
            guest_pages: live.total_pages(),
        })
    }
}
