//! Links between shadow pages, both ways, and the marks that lead to pages out of sync.
//!
//! Adds to [`Work`]: linking a child (KVM row 4.30), taking a link out, and keeping two properties
//! that the checker compares: a page's parents are exactly the entries that link it (row 4.45), and
//! an entry is marked exactly if something below it is out of sync (row 4.33). Under the writer.

use alloc::sync::Arc;

use arrayvec::ArrayVec;

use mmu_core::addr::Level;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::traits::Host;

use crate::chain::{Chain, Iter, SPILL};
use crate::page::ShadowPage;
use crate::radix::NoMemory;
use crate::rmap::MAX_ALIASES;
use crate::spte_ref::{PageId, SpteRef};
use crate::writer::{ShadowWriter, Work};

/// Tables above one another.
const LEVELS: usize = Level::ALL.len();

impl ShadowPage {
    /// Is it out of sync, or anything below it?
    pub(crate) const fn needs_sync(&self) -> bool {
        self.unsync || !self.unsync_children.is_empty()
    }
}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// Get the memory that `count` links may take.
    pub(crate) fn reserve_links(&mut self, count: u32) -> Result<(), NoMemory> {
        self.rmap.descs().reserve(SPILL * count)
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Link `child` in an entry that maps nothing. The memory was reserved. Permissions are the
    /// leaves' business: a link restricts nothing.
    pub(crate) fn link(&mut self, place: SpteRef, child: PageId) {
        let Some((level, frame)) = self.level_and_frame(place, child) else { return self.broken() };
        let Some(cell) = self.cell(place) else { return self.broken() };
        if !self.add_parent(child, place) {
            return self.broken();
        }
        let mut table = self.config().table(frame, level);
        if self.config().ad_enabled() {
            // The CPU sets A when it comes this way: that is what reclaim asks (KVM row 4.49).
            table = table.without(F::ACCESSED);
        }
        self.put(cell, table, level);
        if self.writer.pages.get(child).is_some_and(ShadowPage::needs_sync) {
            self.raise(place);
        }
    }

    /// Is the page linked as often as may be? Then not by its first parent any more, so that no
    /// list becomes a burden to those who walk it: as leaves, KVM row 4.44.
    pub(crate) fn unlink_excess(&mut self, child: PageId) -> bool {
        let full = |page: &ShadowPage| page.parents.len() >= MAX_ALIASES;
        if !self.writer.pages.get(child).is_some_and(full)
            || mmu_core::busted!("links_without_bound")
        {
            return false;
        }
        if let Some(place) = self.first_parent(child) {
            let _ = self.drop_entry(place);
            self.writer.stats.links_recycled += 1;
        }
        true
    }

    fn level_and_frame(
        &self,
        place: SpteRef,
        child: PageId,
    ) -> Option<(Level, mmu_core::addr::Pfn)> {
        let level = self.writer.pages.get(place.page())?.level();
        Some((level, self.writer.pages.get(child)?.frame))
    }

    fn add_parent(&mut self, child: PageId, place: SpteRef) -> bool {
        let ShadowWriter { pages, rmap, .. } = &mut *self.writer;
        let Some(page) = pages.get_mut(child) else { return false };
        match page.parents.push(rmap.descs(), place) {
            Ok(parents) => page.parents = parents,
            Err(_) => return false,
        }
        true
    }

    /// The entry `place`, which held the link `old`, links nothing any more. What it led to; its
    /// frame is still that page's.
    pub(crate) fn unlinked(&mut self, place: SpteRef, old: Spte) -> Option<PageId> {
        let child = self.page_in(self.config().pfn(old))?;
        self.lower(place);
        let accessed = self.config().is_accessed(old);
        let ShadowWriter { pages, rmap, .. } = &mut *self.writer;
        let page = pages.get_mut(child)?;
        page.parents = page.parents.remove(rmap.descs(), place)?;
        // What the CPU noted in the link goes to the page, for reclaim to see (KVM row 4.49).
        page.used |= accessed;
        Some(child)
    }

    /// A page is out of sync now: mark the way to it, in every tree.
    pub(crate) fn mark_unsync(&mut self, page: PageId) {
        let Some(parents) = self.set_unsync(page) else { return };
        self.climb(parents, Climb::Mark);
    }

    fn set_unsync(&mut self, page: PageId) -> Option<Chain> {
        let page = self.writer.pages.get_mut(page)?;
        // INVARIANT[I17]: above level 1 every write is seen (KVM row 4.32).
        debug_assert!(page.level() == Level::L1 && !page.is_direct(), "{page:?} (I17)");
        let had = page.needs_sync();
        page.unsync = true;
        (!had).then_some(page.parents)
    }

    /// A page is in sync again.
    pub(crate) fn clear_unsync(&mut self, page: PageId) {
        let Some(page) = self.writer.pages.get_mut(page) else { return };
        let had = page.needs_sync();
        page.unsync = false;
        if had && !page.needs_sync() {
            let parents = page.parents;
            self.climb(parents, Climb::Clear);
        }
    }

    /// Something below the entry is out of sync.
    fn raise(&mut self, place: SpteRef) {
        if let Some(parents) = self.mark(place, Climb::Mark) {
            self.climb(parents, Climb::Mark);
        }
    }

    /// Nothing below the entry is, or nothing is below it.
    fn lower(&mut self, place: SpteRef) {
        if let Some(parents) = self.mark(place, Climb::Clear) {
            self.climb(parents, Climb::Clear);
        }
    }

    /// Change the mark of one entry; its page's parents, if that changes what they have to say.
    fn mark(&mut self, place: SpteRef, way: Climb) -> Option<Chain> {
        let page = self.writer.pages.get_mut(place.page())?;
        let had = page.needs_sync();
        match way {
            Climb::Mark => page.unsync_children.set(place.index()),
            Climb::Clear => page.unsync_children.clear(place.index()),
        };
        (page.needs_sync() != had).then_some(page.parents)
    }

    /// Carry a change of mark upwards, from these entries on. A stack of one list a level: an entry
    /// is in a page of a higher level than what it links, and each page is changed once.
    fn climb(&mut self, from: Chain, way: Climb) {
        let pool = Arc::clone(self.writer.rmap.desc_pool());
        let mut stack: ArrayVec<Iter<'_>, LEVELS> = ArrayVec::new();
        stack.push(from.iter(&pool));
        while let Some(top) = stack.last_mut() {
            let Some(place) = top.next() else {
                stack.pop();
                continue;
            };
            if let Some(parents) = self.mark(place, way)
                && stack.try_push(parents.iter(&pool)).is_err()
            {
                self.broken();
            }
        }
    }
}

/// What is carried upwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Climb {
    Mark,
    Clear,
}
