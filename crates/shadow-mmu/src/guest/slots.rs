//! Guest memory by memslots, for walks.
//!
//! Owns [`SlotMem`] (KVM rows 4.3 and 4.11): a table may stand in a slot that is visible and has
//! memory, and nowhere else; a read-only slot is read and not written; a page whose entry was
//! changed is dirty. What lies at a host address is the embedder's ([`HostWords`]). No locks of its
//! own: the caller's epoch section keeps the slots.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, PAGE_SIZE};
use mmu_core::slot::{GfnToHvaError, Memslots};

use super::memory::{EntryWidth, Exchange, GuestMem, NotMemory};

/// Words of the host's mapping of guest memory. Atomic, and prepared for addresses whose page the
/// host has taken away: `None` then.
pub trait HostWords {
    /// The entry at `hva`, a multiple of its width; 4-byte entries are zero-extended. Acquire.
    fn load(&self, hva: Hva, width: EntryWidth) -> Option<u64>;

    /// Replace `old` by `new`; false if it was not `old` any more. AcqRel.
    fn compare_exchange(&self, hva: Hva, width: EntryWidth, old: u64, new: u64) -> Option<bool>;

    /// An entry in this page was changed. Dirty bitmaps have been told; a vCPU with a dirty ring
    /// puts the page there before it enters its guest.
    fn dirtied(&self, gfn: Gfn) {
        let _ = gfn;
    }
}

/// The slots of one address space, as memory for walks.
#[derive(Clone, Copy, Debug)]
pub struct SlotMem<'s, W> {
    slots: &'s Memslots,
    as_id: u16,
    words: &'s W,
}

impl<'s, W: HostWords> SlotMem<'s, W> {
    /// Memory as `slots` of address space `as_id` say, reached through `words`.
    #[must_use]
    pub const fn new(slots: &'s Memslots, as_id: u16, words: &'s W) -> Self {
        Self { slots, as_id, words }
    }

    /// Where the host has the entry. It lies in one page, so in one slot.
    fn find(&self, at: Gpa, access: Access) -> Result<Hva, GfnToHvaError> {
        let page = self.slots.resolve_hva(self.as_id, Gfn::containing(at), access)?;
        // A page's host address is a multiple of its size: nothing is carried.
        Ok(Hva::new(page.get() | (at.get() & (PAGE_SIZE - 1))))
    }
}

impl<W: HostWords> GuestMem for SlotMem<'_, W> {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        let hva = self.find(at, Access::READ).map_err(|_| NotMemory { at })?;
        self.words.load(hva, width).ok_or(NotMemory { at })
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        let hva = match self.find(at, Access::WRITE) {
            Ok(hva) => hva,
            Err(GfnToHvaError::ReadOnly { .. }) => return Ok(Exchange::ReadOnly),
            Err(GfnToHvaError::NoSlot { .. } | GfnToHvaError::Invalid { .. }) => {
                return Err(NotMemory { at });
            }
        };
        match self.words.compare_exchange(hva, width, old, new) {
            Some(true) => {
                let gfn = Gfn::containing(at);
                self.slots.mark_dirty(self.as_id, GfnRange::from_len(gfn, 1));
                self.words.dirtied(gfn);
                Ok(Exchange::Done)
            }
            Some(false) => Ok(Exchange::Lost),
            None => Err(NotMemory { at }),
        }
    }
}
