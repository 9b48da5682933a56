//! Shadow pages: what is known of each table that this MMU built, and how one is found.
//!
//! Owns [`ShadowPage`] and [`Pages`], the table of them: by number, by (gfn, role) through buckets
//! whose links stand in the pages themselves, and in the order in which they were made. Nothing is
//! allocated before the first page. Plain values under the writer: who holds `&mut Pages` is the
//! only one here. Agers and lockless walks see entries and reverse maps, never this.

use alloc::boxed::Box;
use alloc::vec::Vec;

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Level, Pfn, to_index, to_u64};
use mmu_core::sync::ENTRIES;

use crate::chain::Chain;
use crate::marks::Marks;
use crate::radix::NoMemory;
use crate::role::{PageRole, RoleFlags};
use crate::spte_ref::PageId;
use crate::watch::Told;

/// Buckets of the hash (KVM row 4.21).
const BUCKETS: usize = 4096;

/// What an entry of an indirect page was made from: frame and permissions of the guest's entry
/// (KVM row 4.27). The reverse map is found by this and never by reading the guest again.
#[doc(alias = "shadowed_translation")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shadowed(u64);

impl Shadowed {
    pub(crate) fn new(gfn: Gfn, access: Access) -> Self {
        Self(gfn.get() << 8 | u64::from(access.bits()))
    }

    pub(crate) const fn gfn(self) -> Gfn {
        Gfn::new(self.0 >> 8)
    }

    pub(crate) fn access(self) -> Access {
        Access::from_bits_truncate(self.0.to_le_bytes()[0])
    }
}

/// A table of ours.
#[doc(alias = "kvm_mmu_page")]
#[derive(Debug)]
pub(crate) struct ShadowPage {
    /// The guest table that it shadows; of a direct page, the first frame that it maps.
    pub(crate) gfn: Gfn,
    pub(crate) role: PageRole,
    /// Where its entries stand.
    pub(crate) frame: Pfn,
    /// Entries that link it (KVM row 4.45).
    pub(crate) parents: Chain,
    /// By entry; empty in direct pages and above level 3.
    shadowed: Box<[Shadowed]>,
    /// The guest may write to the table without our noticing (KVM row 4.32: level 1 only).
    pub(crate) unsync: bool,
    /// Entries below which such pages are (KVM row 4.33).
    pub(crate) unsync_children: Marks,
    /// vCPUs whose root it is, or may be again soon.
    pub(crate) roots: u32,
    /// Writes to the guest table since an entry was last used (KVM row 4.53).
    pub(crate) writes: u8,
    /// Used since reclaim last looked.
    pub(crate) used: bool,
    /// How often reclaim found it in use, lately; `None` before it looked for the first time.
    pub(crate) credit: Option<u8>,
    /// Generation of the MMU that it was made in; an older one is obsolete.
    pub(crate) generation: u64,
    /// What direct tables beside know of its table.
    pub(crate) told: Option<Told>,
    /// In the bucket.
    next_in_bucket: Option<PageId>,
    older: Option<PageId>,
    newer: Option<PageId>,
    /// About to be taken apart, if nobody links it before.
    is_doomed: bool,
}

impl ShadowPage {
    /// Level of its entries.
    pub(crate) const fn level(&self) -> Level {
        self.role.level()
    }

    /// Does it map memory in a row?
    pub(crate) const fn is_direct(&self) -> bool {
        self.role.has(RoleFlags::DIRECT)
    }

    /// Frame and permissions that entry `index` stands for.
    pub(crate) fn shadowed(&self, index: usize) -> Shadowed {
        if self.is_direct() {
            let pages = to_u64(index) * self.level().pages();
            return Shadowed::new(self.gfn.saturating_add(pages), self.role.access());
        }
        self.shadowed.get(index).copied().unwrap_or_default()
    }

    /// Note what entry `index` is made from. Nothing in direct pages, where it follows.
    pub(crate) fn set_shadowed(&mut self, index: usize, shadowed: Shadowed) {
        if let Some(place) = self.shadowed.get_mut(index) {
            *place = shadowed;
        }
    }

    /// Does it shadow a table of the guest, which is then write-protected or out of sync?
    pub(crate) const fn shadows_a_table(&self) -> bool {
        !self.is_direct() && !self.role.has(RoleFlags::PASSTHROUGH)
    }
}

/// A page that is not in the table yet.
#[derive(Debug)]
pub(crate) struct NewPage {
    pub(crate) gfn: Gfn,
    pub(crate) role: PageRole,
    pub(crate) frame: Pfn,
    pub(crate) generation: u64,
}

/// The table of pages.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    pages: Vec<Option<ShadowPage>>,
    /// Numbers without a page; room for all of them is reserved with the pages.
    free: Vec<PageId>,
    /// First page of each bucket; allocated with the first page.
    buckets: Vec<Option<PageId>>,
    oldest: Option<PageId>,
    newest: Option<PageId>,
    live: u32,
    /// Arrays for indirect pages, taken before they are needed.
    spare: Vec<Box<[Shadowed]>>,
    /// Live pages that shadow a table (KVM row 4.26).
    indirect: u32,
    /// Pages that are about to be taken apart, and numbers of some that were; room for as many as
    /// there are numbers is reserved with the pages.
    doomed: Vec<PageId>,
}

impl Pages {
    /// Get the memory that adding `count` pages takes.
    ///
    /// # Errors
    /// [`NoMemory`]; no page has changed.
    pub(crate) fn reserve(&mut self, count: usize) -> Result<(), NoMemory> {
        if self.buckets.is_empty() {
            grow(&mut self.buckets, BUCKETS)?;
            self.buckets.resize(BUCKETS, None);
        }
        let missing = count.saturating_sub(self.free.len());
        if missing > 0 {
            grow(&mut self.pages, missing)?;
            // All numbers may be free at once.
            let all = self.pages.len() + missing;
            let more = all - self.free.len();
            grow(&mut self.free, more)?;
            let more = all - self.doomed.len().min(all);
            grow(&mut self.doomed, more)?;
            for _ in 0..missing {
                let number = u32::try_from(self.pages.len()).ok().and_then(PageId::new);
                self.free.push(number.ok_or(NoMemory { bytes: 0 })?);
                self.pages.push(None);
            }
        }
        let missing = count.saturating_sub(self.spare.len());
        grow(&mut self.spare, missing)?;
        for _ in 0..missing {
            let mut array = Vec::new();
            grow(&mut array, ENTRIES)?;
            array.resize(ENTRIES, Shadowed::default());
            self.spare.push(array.into_boxed_slice());
        }
        Ok(())
    }

    /// The page of this number.
    pub(crate) fn get(&self, id: PageId) -> Option<&ShadowPage> {
        self.pages.get(to_index(u64::from(id.get())))?.as_ref()
    }

    /// The page of this number.
    pub(crate) fn get_mut(&mut self, id: PageId) -> Option<&mut ShadowPage> {
        self.pages.get_mut(to_index(u64::from(id.get())))?.as_mut()
    }

    /// Put a page in, as the newest; `None` if nothing was [reserved](Self::reserve).
    pub(crate) fn add(&mut self, new: NewPage) -> Option<PageId> {
        let id = self.free.last().copied()?;
        let direct = new.role.has(RoleFlags::DIRECT);
        let tells = !direct && new.role.level() <= Level::L3;
        let shadowed = if tells { self.spare.pop()? } else { Box::default() };
        self.free.pop();
        let NewPage { gfn, role, frame, generation } = new;
        let bucket = bucket_of(gfn);
        let page = ShadowPage {
            gfn,
            role,
            frame,
            parents: Chain::EMPTY,
            shadowed,
            unsync: false,
            unsync_children: Marks::default(),
            roots: 0,
            writes: 0,
            used: false,
            credit: None,
            generation,
            told: None,
            next_in_bucket: self.buckets.get(bucket).copied().flatten(),
            older: None,
            newer: None,
            is_doomed: false,
        };
        self.indirect += u32::from(page.shadows_a_table());
        if let Some(place) = self.buckets.get_mut(bucket) {
            *place = Some(id);
        }
        if let Some(place) = self.pages.get_mut(to_index(u64::from(id.get()))) {
            *place = Some(page);
        }
        self.join_order(id);
        self.live += 1;
        Some(id)
    }

    /// Become the newest.
    fn join_order(&mut self, id: PageId) {
        let older = self.newest;
        match older.and_then(|newest| self.get_mut(newest)) {
            Some(newest) => newest.newer = Some(id),
            None => self.oldest = Some(id),
        }
        if let Some(page) = self.get_mut(id) {
            (page.older, page.newer) = (older, None);
        }
        self.newest = Some(id);
    }

    fn leave_order(&mut self, id: PageId) {
        let Some((older, newer)) = self.get(id).map(|page| (page.older, page.newer)) else {
            return;
        };
        match older.and_then(|older| self.get_mut(older)) {
            Some(older) => older.newer = newer,
            None => self.oldest = newer,
        }
        match newer.and_then(|newer| self.get_mut(newer)) {
            Some(newer) => newer.older = older,
            None => self.newest = older,
        }
    }

    /// Take a page out; it is linked by nothing and links nothing.
    pub(crate) fn remove(&mut self, id: PageId) -> Option<ShadowPage> {
        self.leave_order(id);
        let mut page = self.pages.get_mut(to_index(u64::from(id.get())))?.take()?;
        self.leave_bucket(&page, id);
        self.live -= 1;
        let counted = page.shadows_a_table() && !page.role.has(RoleFlags::INVALID);
        self.indirect -= u32::from(counted);
        // Reserved when the number was made.
        self.free.push(id);
        let mut array = core::mem::take(&mut page.shadowed);
        if !array.is_empty() && self.spare.len() < self.spare.capacity() {
            array.fill(Shadowed::default());
            self.spare.push(array);
        }
        Some(page)
    }

    /// Put a page among those that are to be taken apart. Without room it stays an orphan, which is
    /// found again or reclaimed.
    pub(crate) fn doom(&mut self, id: PageId) {
        let room = self.doomed.len() < self.doomed.capacity();
        let Some(page) = self.get_mut(id).filter(|page| room && !page.is_doomed) else { return };
        page.is_doomed = true;
        self.doomed.push(id);
    }

    /// One of those pages, not among them any more.
    pub(crate) fn next_doomed(&mut self) -> Option<PageId> {
        loop {
            let id = self.doomed.pop()?;
            // One that went otherwise left its number here.
            if let Some(page) = self.get_mut(id).filter(|page| page.is_doomed) {
                page.is_doomed = false;
                return Some(id);
            }
        }
    }

    /// Let nobody find the page any more: it stays for the vCPUs whose root it is.
    pub(crate) fn invalidate(&mut self, id: PageId) {
        let Some(page) = self.get_mut(id) else { return };
        let shadows = page.shadows_a_table();
        if page.role.has(RoleFlags::INVALID) {
            return;
        }
        page.role = page.role.with_flags(page.role.flags().union(RoleFlags::INVALID));
        self.indirect -= u32::from(shadows);
    }

    fn leave_bucket(&mut self, page: &ShadowPage, id: PageId) {
        let bucket = bucket_of(page.gfn);
        let mut at = self.buckets.get(bucket).copied().flatten();
        if at == Some(id) {
            if let Some(place) = self.buckets.get_mut(bucket) {
                *place = page.next_in_bucket;
            }
            return;
        }
        while let Some(current) = at.and_then(|at| self.get_mut(at)) {
            if current.next_in_bucket == Some(id) {
                current.next_in_bucket = page.next_in_bucket;
                return;
            }
            at = current.next_in_bucket;
        }
    }

    /// The shadows of the guest table in `gfn`, in any role; direct pages that start there too.
    pub(crate) fn of_gfn(&self, gfn: Gfn) -> impl Iterator<Item = (PageId, &ShadowPage)> {
        let first = self.buckets.get(bucket_of(gfn)).copied().flatten();
        let in_bucket = core::iter::successors(first, |id| self.get(*id)?.next_in_bucket);
        in_bucket
            .filter_map(|id| Some((id, self.get(id)?)))
            .filter(move |(_, page)| page.gfn == gfn)
    }

    /// Change every page of `gfn`.
    pub(crate) fn for_each_of(&mut self, gfn: Gfn, mut change: impl FnMut(&mut ShadowPage)) {
        let mut at = self.buckets.get(bucket_of(gfn)).copied().flatten();
        while let Some(page) = at.and_then(|id| self.get_mut(id)) {
            at = page.next_in_bucket;
            if page.gfn == gfn {
                change(page);
            }
        }
    }

    /// The page of `gfn` in `role` that was made in `generation`.
    pub(crate) fn find(&self, gfn: Gfn, role: PageRole, generation: u64) -> Option<PageId> {
        let fits = |page: &ShadowPage| page.role == role && page.generation == generation;
        self.of_gfn(gfn).find(|(_, page)| fits(page)).map(|(id, _)| id)
    }

    /// The page made first of those that live.
    pub(crate) const fn oldest(&self) -> Option<PageId> {
        self.oldest
    }

    /// The page made last.
    pub(crate) const fn newest(&self) -> Option<PageId> {
        self.newest
    }

    /// The next `count` numbers that pages will get.
    pub(crate) fn upcoming(&self, count: u32) -> impl Iterator<Item = PageId> {
        self.free.iter().rev().take(to_index(u64::from(count))).copied()
    }

    /// Count a page as made just now, if it is of the same generation: obsolete pages stay first.
    pub(crate) fn renew(&mut self, id: PageId) {
        let generation = |id: PageId| self.get(id).map(|page| page.generation);
        if self.newest != Some(id) && generation(id) == self.newest.and_then(generation) {
            self.leave_order(id);
            self.join_order(id);
        }
    }

    /// The page made next after `id`.
    pub(crate) fn newer_than(&self, id: PageId) -> Option<PageId> {
        self.get(id)?.newer
    }

    /// Live pages.
    pub(crate) const fn live(&self) -> u32 {
        self.live
    }

    /// Live pages that shadow a table of the guest.
    pub(crate) const fn indirect(&self) -> u32 {
        self.indirect
    }
}

/// Spread out, so that a guest whose tables lie in a row, or 2 MiB apart, fills all buckets. A
/// guest that aims for one bucket makes lookups as long as its quota of pages, nothing worse.
fn bucket_of(gfn: Gfn) -> usize {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    to_index(gfn.get().wrapping_mul(GOLDEN) >> (u64::BITS - BUCKETS.ilog2()))
}

/// Room for `more` elements.
fn grow<T>(vec: &mut Vec<T>, more: usize) -> Result<(), NoMemory> {
    let bytes = to_u64(more).saturating_mul(to_u64(size_of::<T>()));
    vec.try_reserve(more).map_err(|_| NoMemory { bytes })
}
