//! Guest tables that direct tables beside map too: nobody writes to them unseen.
//!
//! Owns [`Told`], what direct tables know of a shadow page's table, and adds to the writer: having
//! a table watched, letting it go, and [`direct_write`](ShadowWriter::direct_write), the decision
//! about a write that was refused there. In KVM both MMUs ask one list of shadow pages; here they
//! share the counts of [`PageTrack`]: a table with a shadow blocks huge pages for as long as it has
//! one (KVM rows 4.26, 6.14), and is write-tracked while its shadow is in sync (rows 4.31, 4.32).
//!
//! A table is watched from the end of the section on that asks for it: inside an invalidation of
//! its frame its count is raised and direct entries are protected and flushed, with the writer
//! held. So who comes to need that ends its attempt, as for any other flush, and reads the guest's
//! entries in the next. Letting go needs no wait.

use alloc::sync::Arc;

use mmu_core::addr::{Gfn, GfnRange};
use mmu_core::slot::{MAX_ADDRESS_SPACES, PageTrack, SlotMeta, TrackError};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::page::ShadowPage;
use crate::role::RoleFlags;
use crate::spte_ref::PageId;
use crate::writer::{ShadowWriter, Work};

/// Tables that one section may ask to have watched; what does not fit is asked for in the next.
pub(crate) const MAX_WATCHED: usize = 16;

/// What direct tables beside were told of a shadow page's table.
#[derive(Debug)]
pub(crate) struct Told {
    /// Counts of the slot that the table stands in. Kept, so that what is taken back is taken from
    /// where it was given, whatever became of the slot.
    track: Arc<PageTrack>,
    /// Is the count raised, or are only huge pages blocked?
    watched: bool,
}

/// What to do about a write to a guest frame that direct tables refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum DirectWrite {
    /// No shadow relies on seeing it any more: let the guest try again.
    Retry,
    /// Somebody must see it: emulate it and report it
    /// ([`guest_wrote`](ShadowWriter::guest_wrote)), or give the shadows up
    /// ([`unprotect`](ShadowWriter::unprotect)).
    Protected,
}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// The guest itself writes to `gfn`, which its direct tables refused as write-protected. If all
    /// shadows of the frame may go out of sync they do, and the next fault grants the write (KVM
    /// rows 4.31, 4.32). Not for prefetches, which have no write to grant.
    #[doc(alias = "mmu_try_to_unsync_pages")]
    pub fn direct_write(&mut self, actor: &mut Actor<H>, gfn: Gfn) -> DirectWrite {
        self.work(actor, |work| {
            let tracked = work.is_tracked(gfn) && !mmu_core::busted!("unsync_despite_trackers");
            if !tracked && work.let_go_unsync(gfn, false) {
                DirectWrite::Retry
            } else {
                DirectWrite::Protected
            }
        })
    }

    /// Take back a count that somebody else has in `track`, not one that shadows have. Was it the
    /// last of all?
    ///
    /// # Errors
    /// [`TrackError::NotTracked`]: only shadows count the page; nothing changed.
    pub fn untrack(&mut self, track: &Arc<PageTrack>, gfn: Gfn) -> Result<bool, TrackError> {
        let own = self.pages.of_gfn(gfn).filter(|(_, page)| page.is_watched_in(track)).count();
        if usize::from(track.count(gfn)) <= own {
            return Err(TrackError::NotTracked { gfn });
        }
        track.untrack(gfn)
    }

    /// Have a page's table watched. If that cannot be, the page goes and `unwatched` says why.
    pub(crate) fn watch(&mut self, actor: &mut Actor<H>, id: PageId) {
        let Some(page) = self.pages.get(id).filter(|page| page.wants_watch()) else { return };
        let (space, gfn) = (page.role.space(), page.gfn);
        let Some(direct) = self.mmu.beside().cloned() else { return };
        let vm = Arc::clone(actor.vm());
        // No slot changes before it ends, so the counts are still the slot's when it does.
        let invalidation = vm.invalidate(actor.participant(), GfnRange::from_len(gfn, 1));
        let track = actor.page_track(space, gfn);
        let told = track.map(|track| self.tell(id, track));
        if told == Some(Ok(())) && !mmu_core::busted!("watch_without_protection") {
            direct.protect_in(actor, &invalidation, gfn);
        }
        drop(invalidation);
        self.own_invalidations += 1;
        match told {
            Some(Ok(())) => {}
            // Without a slot nothing can be written, nor a walk have read anything: the first that
            // does finds the page not watched. One that was read before is as good as gone.
            None if self.pages.get(id).is_some_and(|page| !page.unsync) => {}
            None => self.work(actor, |work| work.zap_page(id)),
            Some(Err(error)) => {
                self.unwatched = Some(error);
                self.work(actor, |work| work.zap_page(id));
            }
        }
    }

    /// Raise the counts for a page's table.
    fn tell(&mut self, id: PageId, track: Arc<PageTrack>) -> Result<(), TrackError> {
        let Some(page) = self.pages.get_mut(id) else { return Ok(()) };
        if page.told.as_ref().is_some_and(|told| !Arc::ptr_eq(&told.track, &track)) {
            page.forget_told();
        }
        let blocked = page.told.is_some();
        let _ = track.track(page.gfn)?;
        let blocked = blocked || mmu_core::busted!("huge_page_over_a_table");
        if !blocked && let Err(error) = track.block(page.gfn) {
            let _ = track.untrack(page.gfn);
            return Err(error);
        }
        page.told = Some(Told { track, watched: true });
        Ok(())
    }
}

impl ShadowPage {
    /// Does the page rely on seeing writes that direct tables beside may hide?
    fn wants_watch(&self) -> bool {
        let watched = self.told.as_ref().is_some_and(|told| told.watched);
        self.shadows_a_table() && !self.role.has(RoleFlags::INVALID) && !watched
    }

    /// Is it counted in `track`?
    fn is_watched_in(&self, track: &Arc<PageTrack>) -> bool {
        self.told.as_ref().is_some_and(|told| told.watched && Arc::ptr_eq(&told.track, track))
    }

    /// The guest may write to the table unseen.
    pub(crate) fn unwatch(&mut self) {
        let gfn = self.gfn;
        if let Some(told) = self.told.as_mut().filter(|told| told.watched) {
            told.watched = false;
            // It was counted here.
            let _ = told.track.untrack(gfn);
        }
    }

    /// The table has no shadow any more, as far as this page goes.
    pub(crate) fn forget_told(&mut self) {
        self.unwatch();
        if let Some(told) = self.told.take() {
            told.track.unblock(self.gfn);
        }
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Have a page's table watched, from the end of the section on. Is there anything to be done?
    pub(crate) fn watch(&mut self, id: PageId) -> bool {
        if self.writer.mmu.beside().is_none() || mmu_core::busted!("table_unwatched") {
            return false;
        }
        let wanted = self.writer.pages.get(id).is_some_and(ShadowPage::wants_watch);
        if wanted && !self.to_watch.contains(&id) {
            // What does not fit is found again.
            let _ = self.to_watch.try_push(id);
        }
        wanted
    }

    /// Let the guest write unseen to the tables in `gfn`.
    pub(crate) fn unwatch_all(&mut self, gfn: Gfn) {
        if self.writer.mmu.beside().is_some() {
            self.writer.pages.for_each_of(gfn, ShadowPage::unwatch);
        }
    }

    /// Does anybody but shadow pages want to see every write to the frame?
    pub(crate) fn is_tracked(&self, gfn: Gfn) -> bool {
        if !self.vm.slots().tracks_writes() {
            return false;
        }
        let slots = self.vm.slots().read(self.section.epoch());
        (0..MAX_ADDRESS_SPACES).any(|space| {
            let slot = slots.find(space, gfn);
            let meta = slot.and_then(|slot| slots.meta(space, slot.id));
            let track = meta.and_then(SlotMeta::track).filter(|track| track.is_used());
            track.is_some_and(|track| usize::from(track.count(gfn)) > self.watched_in(gfn, track))
        })
    }

    fn watched_in(&self, gfn: Gfn, track: &Arc<PageTrack>) -> usize {
        self.writer.pages.of_gfn(gfn).filter(|(_, page)| page.is_watched_in(track)).count()
    }
}
