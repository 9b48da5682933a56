//! Memory slots: which guest pages exist, and where the host maps them.
//!
//! [`Memslot`] is one run of guest pages. [`Memslots`] (`snapshot`) is one immutable set for every
//! address space, with an index by gfn, by id and by host address. [`plan`] (`rules`) checks a
//! caller's [`SlotRequest`] (`request`) against the current set and says what would change.
//! [`max_level`] (`hugepage`) is how large a page a slot's geometry allows.
//!
//! All of that is pure: no locks, no atomics, no ordering. Whoever changes a set holds it by
//! `&mut`; readers share sets that are no longer written to. Only [`table`] publishes.

mod hugepage;
mod log;
mod meta;
mod overhead;
mod request;
mod rules;
mod snapshot;
mod space;
pub mod table;
pub mod track;

use bitflags::bitflags;

pub use hugepage::max_level;
pub use log::{DirtyLog, LogOptions};
pub use meta::SlotMeta;
pub use overhead::SlotOverhead;
pub use request::{SlotError, SlotRequest};
pub use rules::{MAX_SLOT_PAGES, SlotChange, SlotLimits, plan};
pub use snapshot::{GENERATION_UPDATING, GfnToHvaError, MAX_ADDRESS_SPACES, Memslots};
pub use table::{SlotTable, SlotWriter};
pub use track::{PageTrack, TrackError};

use crate::access::Access;
use crate::addr::{Gfn, GfnRange, Hva, PAGE_SHIFT, PAGE_SIZE, mask_index};

bitflags! {
    /// Properties of a slot. The values that callers may give equal those of the KVM interface, so
    /// an embedder can pass them through with `from_bits_retain`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct SlotFlags: u32 {
        /// Writes to the slot are recorded in its dirty log.
        #[doc(alias = "KVM_MEM_LOG_DIRTY_PAGES")]
        const LOG_DIRTY = 1 << 0;
        /// The guest may not write; its writes exit to the VMM (KVM row 6.18).
        #[doc(alias = "KVM_MEM_READONLY")]
        const READ_ONLY = 1 << 1;
        /// Being deleted or moved: nothing may be mapped, faults retry (KVM row 6.6). Set by the
        /// publisher only; refused from callers.
        #[doc(alias = "KVM_MEMSLOT_INVALID")]
        const INVALID = 1 << 16;
    }
}

impl SlotFlags {
    /// The flags that a caller may give.
    pub const CALLER: Self = Self::LOG_DIRTY.union(Self::READ_ONLY);
}

/// One run of guest pages and the host memory behind it.
///
/// Having a `Memslot` from a [`Memslots`] tells you: it has at least one page, its guest and host
/// ranges do not wrap, its host address is page aligned, and no other slot of its address space had
/// one of its guest pages in that set. It does not tell you that the slot still exists, or that the
/// host maps anything there.
#[doc(alias = "kvm_memory_slot")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Memslot {
    /// Address space (0 = normal, 1 = SMM on x86; KVM row 6.17).
    pub as_id: u16,
    /// Number within the address space, chosen by the caller.
    pub id: u16,
    /// Flags in effect.
    pub flags: SlotFlags,
    /// First guest page.
    pub base_gfn: Gfn,
    /// Length in 4 KiB pages.
    pub npages: u64,
    /// Host address of the first page.
    pub hva: Hva,
}

const _: () = assert!(size_of::<Memslot>() <= 48, "a lookup should touch one cache line");

/// Pages that a 64-bit byte address can name, guest or host.
const ADDRESSABLE_PAGES: u64 = 1 << (u64::BITS - PAGE_SHIFT);

impl Memslot {
    /// The guest pages of the slot.
    #[inline]
    #[must_use]
    pub const fn range(&self) -> GfnRange {
        GfnRange::from_len(self.base_gfn, self.npages)
    }

    /// Is `gfn` one of the slot's pages?
    #[inline]
    #[must_use]
    pub const fn contains(&self, gfn: Gfn) -> bool {
        // One comparison: a gfn before the slot wraps to a distance that no slot has.
        gfn.get().wrapping_sub(self.base_gfn.get()) < self.npages
    }

    /// Is the guest kept from writing?
    #[inline]
    #[must_use]
    pub const fn is_read_only(&self) -> bool {
        self.flags.contains(SlotFlags::READ_ONLY)
    }

    /// Are writes recorded in the dirty log?
    #[inline]
    #[must_use]
    pub const fn logs_dirty(&self) -> bool {
        self.flags.contains(SlotFlags::LOG_DIRTY)
    }

    /// Is the slot being deleted or moved? A fault on it retries (KVM row 6.6).
    #[inline]
    #[must_use]
    pub const fn is_invalid(&self) -> bool {
        self.flags.contains(SlotFlags::INVALID)
    }

    /// Host address of the page `gfn`; `None` when it is outside the slot.
    ///
    /// A guest picks `gfn`. A CPU that mispredicts the bounds check must not compute a host address
    /// outside the slot from it (KVM row 6.10), so the offset is also masked, without a branch.
    #[inline]
    #[must_use]
    pub fn hva_of(&self, gfn: Gfn) -> Option<Hva> {
        if !self.contains(gfn) {
            return None;
        }
        let offset = mask_index(gfn.distance_from(self.base_gfn), self.npages);
        let bytes = offset.checked_mul(PAGE_SIZE)?;
        self.hva.checked_add(bytes)
    }

    /// The most that a mapping of the slot may permit: everything, no writes if read-only, nothing
    /// at all while the slot is invalid.
    #[inline]
    #[must_use]
    pub const fn access(&self) -> Access {
        if self.is_invalid() {
            Access::empty()
        } else if self.is_read_only() {
            Access::READ_ONLY
        } else {
            Access::ALL
        }
    }

    /// Host page number of the first page.
    const fn hva_page(&self) -> u64 {
        self.hva.get() >> PAGE_SHIFT
    }

    /// May the slot stand in a set: has pages, wraps nowhere, host address aligned.
    const fn is_well_formed(&self) -> bool {
        match ADDRESSABLE_PAGES.checked_sub(self.npages) {
            Some(last_start) => {
                self.npages != 0
                    && self.base_gfn.get() <= last_start
                    && self.hva_page() <= last_start
                    && self.hva.is_page_aligned()
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests;
