//! Direct tables beside shadow tables in one VM.
//!
//! Owns [`DirectTables`], what a shadow MMU asks of the MMU that serves the guest itself while the
//! shadow serves the guest's own guests: to let nobody write to a guest table unseen. MMUs are
//! siblings and know one another only so. What the two count together stands in
//! [`PageTrack`]. Locks are those of an invalidation.

use alloc::sync::Arc;

use crate::addr::Gfn;
use crate::notify::Invalidation;
use crate::slot::{PageTrack, SlotMeta};
use crate::traits::Host;
use crate::vm::Actor;

/// Tables that map guest frames directly, in the same VM.
pub trait DirectTables<H: Host>: Send + Sync {
    /// Take write access to `gfn` away, in every address space, and the means to have it back
    /// without asking. Flushed when this returns, whoever took it. `invalidation` covers `gfn`;
    /// that the frame's count was raised in it keeps later faults from giving the access again.
    fn protect_in(&self, actor: &mut Actor<H>, invalidation: &Invalidation<'_>, gfn: Gfn);
}

impl<H: Host> Actor<H> {
    /// The write-track counts of the slot that has `gfn` in address space `space`; `None` where
    /// there is no slot, one that is going away, or one that counts nothing. Inside an invalidation
    /// the slot stays.
    #[must_use]
    pub fn page_track(&mut self, space: u16, gfn: Gfn) -> Option<Arc<PageTrack>> {
        let work = self.pinned();
        let slots = work.vm.slots().read(&work.section);
        let slot = slots.find(space, gfn).filter(|slot| !slot.is_invalid())?;
        slots.meta(space, slot.id).and_then(SlotMeta::track).cloned()
    }
}
