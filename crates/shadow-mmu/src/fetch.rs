//! Shadow faults: from a walk over the guest's tables to an entry of ours.
//!
//! Owns [`ShadowVcpu::fault`]. Phases (KVM rows 4.16, 4.18): walk the guest's tables -> find slot
//! and page with nothing held -> with the writer: take memory, make room -> in a section: stale? ->
//! walk down our tables, making shadow pages and linking them -> install.
//!
//! **Flush before trust.** A new shadow of a guest table relies on seeing the guest's writes to it,
//! and a CPU may still have a writable translation of the table. So an attempt that comes to owe a
//! flush ends there; it is paid, still with the writer held, and the next attempt finds its work
//! done and reads the guest's entries again. What an attempt reads after that, it may believe until
//! the writer is told of a write.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Gva, Level};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::{LeafSpec, Spte, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::traits::{Backing, Host};

use crate::error::ShadowError;
use crate::guest::{
    EntryFormat, GuestEntry, GuestMem, GuestWalk, GuestWalker, NestedRequest, NestedWalk,
    NestedWalker, Request, WalkPath,
};
use crate::page::{NewPage, ShadowPage, Shadowed};
use crate::prefetch::Neighbour;
use crate::resolve::{Accessed, Target, needed, nested_needs};
use crate::rmap::{MAX_ALIASES, RmapError, RmapKey, SPACES};
use crate::role::{ChildShape, PageRole, RoleFlags};
use crate::spte_ref::{PageId, SpteRef};
use crate::sync::Synced;
use crate::vcpu::ShadowVcpu;
use crate::writer::{ShadowWriter, Work, WriterLock};
use crate::zap::ShadowZap;

/// Attempts of one fault: each but the last made a page, gave one up or protected one, a few a
/// level, and the writer is held throughout.
const MAX_ATTEMPTS: usize = 4 * Level::ALL.len();
/// Shadow pages that one fault may make: one for each level below the root.
pub(crate) const PAGES_PER_FAULT: u32 = 4;

/// How an attempt ended.
pub(crate) enum Attempt {
    /// Done.
    Done(FaultOutcome),
    /// Done: this entry, which maps 4 KiB, was made.
    Filled(SpteRef),
    /// Something was changed that needs a flush first, or that needs another look.
    Again,
    /// Links are missing, for which there must be room first. Nothing was changed.
    Room,
}

/// Is there memory for whatever shadow pages and links the fault may make? Most faults make none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Unknown,
    Made,
}

impl<F: SpteFormat, H: Host> ShadowVcpu<F, H> {
    /// Handle an access of the guest to the linear address that `walk` translated.
    ///
    /// The caller walked the guest's tables ([`GuestWalker::walk`]), which gave the guest its own
    /// faults and set its accessed and dirty bits. `lock` is asked for the writer; until then
    /// nothing is held, and the host's resolver may sleep.
    ///
    /// [`FaultOutcome::Retry`]: something changed meanwhile; walk again.
    /// [`FaultOutcome::WriteProtected`]: the guest writes to a table of its own that has a shadow:
    /// emulate the write and report it ([`ShadowWriter::guest_wrote`]).
    /// [`FaultOutcome::RingFull`]: collect and reset the thread's ring first.
    ///
    /// # Errors
    /// [`ShadowError`]; no entry was changed. [`ShadowError::Unwatched`] is the exception: the
    /// shadow of the table that could not be watched was given up, so nothing is wider than before.
    pub fn fault<M, L>(
        &mut self,
        lock: &L,
        guest: &GuestWalker,
        mem: &M,
        walk: &GuestWalk,
        request: Request,
    ) -> Result<FaultOutcome, ShadowError>
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        let accessed = Accessed {
            address: walk.gva,
            path: &walk.path,
            access: guest.shadow_access(walk, request),
            needed: needed(request),
        };
        self.fault_at(lock, guest.format(), mem, accessed)
    }

    /// Handle an access of a nested guest to the physical address that `walk` translated by its
    /// hypervisor's tables, as [`fault`](Self::fault) does. `request` is what was walked for (KVM
    /// row 4.59).
    ///
    /// # Errors
    /// [`ShadowError`]; no entry was changed.
    #[doc(alias = "ept_page_fault")]
    pub fn nested_fault<M, L>(
        &mut self,
        lock: &L,
        nested: &NestedWalker,
        mem: &M,
        walk: &NestedWalk,
        request: NestedRequest,
    ) -> Result<FaultOutcome, ShadowError>
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        let (path, needed) = (&walk.path, nested_needs(request));
        let written = needed.contains(Access::WRITE);
        let access = if written { path.access } else { path.clean_access() };
        let address = Gva::new(walk.gpa.get());
        self.fault_at(lock, nested.format(), mem, Accessed { address, path, access, needed })
    }

    fn fault_at<M, L>(
        &mut self,
        lock: &L,
        guest: EntryFormat<'_>,
        mem: &M,
        accessed: Accessed<'_>,
    ) -> Result<FaultOutcome, ShadowError>
    where
        M: GuestMem + ?Sized,
        L: WriterLock<F, H>,
    {
        let target = match self.resolve(accessed)? {
            Ok(target) => target,
            Err(outcome) => return Ok(outcome),
        };
        self.actor.top_up(usize::try_from(PAGES_PER_FAULT).unwrap_or(4))?;
        lock.with(|writer| {
            let neighbours = writer.neighbours(guest, mem, &target, self.role);
            let outcome = self.install(writer, guest, mem, &target, &neighbours)?;
            if target.logged && target.write && outcome == FaultOutcome::Fixed {
                // With the writer held: a harvest that comes next finds the mark.
                let page = GfnRange::from_len(target.path.gfn, 1);
                let _ = self.actor.mark_dirty(self.role.space(), page);
            }
            Ok(outcome)
        })
    }

    /// Attempts, each in a section of its own, until one ends the fault.
    fn install<M: GuestMem + ?Sized>(
        &mut self,
        writer: &mut ShadowWriter<F, H>,
        guest: EntryFormat<'_>,
        mem: &M,
        target: &Target<'_>,
        neighbours: &[Neighbour],
    ) -> Result<FaultOutcome, ShadowError> {
        let own = writer.own_invalidations;
        writer.unwatched = None;
        let mut room = Room::Unknown;
        writer.reserve_leaf(target, self.role)?;
        for _ in 0..MAX_ATTEMPTS {
            let attempt = writer.work_with_frames(&mut self.actor, |work, cache| {
                let attempt = work.attempt(cache, guest, mem, target, (room, own));
                if let Attempt::Filled(place) = attempt {
                    work.prefetch(guest, mem, place, neighbours);
                }
                attempt
            });
            if let Some(error) = writer.unwatched.take() {
                return Err(error.into());
            }
            match attempt {
                Attempt::Done(outcome) => return Ok(outcome),
                Attempt::Filled(_) => return Ok(FaultOutcome::Fixed),
                Attempt::Again => {}
                Attempt::Room => {
                    // First what may fail. What goes to make room takes nothing of it away.
                    writer.reserve_tables(target, self.role)?;
                    let wanted = writer.work(&mut self.actor, |work| work.missing_pages(target));
                    writer.make_room(&mut self.actor, wanted);
                    room = Room::Made;
                }
            }
        }
        // Each attempt made progress; the guest may have others to make room for.
        Ok(FaultOutcome::Retry)
    }
}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// Take the memory that the leaf may need.
    fn reserve_leaf(&mut self, target: &Target<'_>, role: PageRole) -> Result<(), ShadowError> {
        let (space, gfn) = (role.space(), target.path.gfn);
        // Any up to the goal: tables with a shadow may be in the way of a huge leaf.
        for level in Level::ALL.into_iter().take_while(|level| *level <= target.goal) {
            self.rmap.reserve(RmapKey { space, level, gfn })?;
        }
        Ok(())
    }

    /// Take the memory that missing tables may need, and the leaf.
    fn reserve_tables(&mut self, target: &Target<'_>, role: PageRole) -> Result<(), ShadowError> {
        let tables = target.path.entries.iter().map(|entry| Gfn::containing(entry.gpa));
        self.reserve_pages(PAGES_PER_FAULT, role.space(), tables)?;
        // One for the leaf's list, too.
        Ok(self.reserve_links(PAGES_PER_FAULT + 1)?)
    }
}

impl<'a, F: SpteFormat, H: Host> Work<'a, F, H> {
    /// One attempt to install.
    fn attempt<M: GuestMem + ?Sized>(
        &mut self,
        cache: &mut mmu_core::frame::MmuCache,
        guest: EntryFormat<'_>,
        mem: &M,
        target: &Target<'_>,
        (room, own): (Room, u64),
    ) -> Attempt {
        let pages = GfnRange::entry(target.path.gfn, target.goal);
        // INVARIANT[I11]: nobody else's invalidation has ended since; ours took nothing back.
        let snapshot = target.snapshot.after_own(self.writer.own_invalidations - own);
        if self.vm.slots().generation() != target.generation
            || self.vm.notify().must_retry(self.section, snapshot, pages)
            || !self.may_start(target)
        {
            return Attempt::Done(FaultOutcome::Retry);
        }
        // INVARIANT[I19]: all that the walk read is still there. What the guest overwrites from
        // here on is reported to the writer, which we have, or was overwritten through an entry
        // that this attempt will find and flush, and then the next one looks again (KVM row 4.18,
        // bug M1).
        if !target.path.entries.iter().all(|entry| entry.is_current(mem)) {
            return Attempt::Done(FaultOutcome::Retry);
        }
        let mut at = target.root;
        loop {
            let Some(page) = self.writer.pages.get_mut(at) else {
                self.broken();
                return Attempt::Done(FaultOutcome::Retry);
            };
            // Used: no flood of writes to it (KVM row 4.53).
            page.writes = 0;
            let (level, relies) = (page.level(), !page.unsync);
            // What is out of sync relies on no write: it is watched when it is synchronised.
            if relies && self.watch(at) {
                return Attempt::Again;
            }
            let place = SpteRef::new(at, shadow_index(target.gva, level));
            // Asked anew at each level: the tables that this attempt makes shadows of may lie in
            // the very page that is to be mapped.
            if level == self.writer.blocks.max_level(target.path.gfn, target.goal) {
                return self.install_leaf(place, target, level);
            }
            let next = match self.step_down(place, target) {
                Some(child) => Ok(child),
                None if room == Room::Unknown => return Attempt::Room,
                None => self.step_into(cache, guest, mem, place, target),
            };
            match next {
                Ok(child) => at = child,
                Err(attempt) => return attempt,
            }
        }
    }

    /// Shadow pages that the fault may have to make: those from the first missing link on.
    fn missing_pages(&self, target: &Target<'_>) -> u32 {
        let mut at = target.root;
        let goal = self.writer.blocks.max_level(target.path.gfn, target.goal);
        for _ in Level::ALL {
            let Some(page) = self.writer.pages.get(at) else { break };
            let level = page.level();
            if level <= goal {
                return 0;
            }
            match self.step_down(SpteRef::new(at, shadow_index(target.gva, level)), target) {
                Some(child) => at = child,
                None => return u32::from(level.number() - Level::L1.number()),
            }
        }
        PAGES_PER_FAULT
    }

    /// Does the root still stand for the tables that the walk began with?
    fn may_start(&self, target: &Target<'_>) -> bool {
        let Some(root) = self.writer.pages.get(target.root) else { return false };
        let first = entry_at(target.path, root.level());
        let same = first.is_none_or(|entry| Gfn::containing(entry.gpa) == root.gfn);
        self.writer.is_current(target.root) && same
    }

    /// The page that the entry must link, if it does.
    fn step_down(&self, place: SpteRef, target: &Target<'_>) -> Option<PageId> {
        // What is linked may lag behind the guest's table until the guest flushes.
        let child = self.child_at(place)?;
        let page = self.writer.pages.get(child)?;
        let parent = self.writer.pages.get(place.page())?;
        ((page.gfn, page.role) == child_of(parent, place.index(), target)).then_some(child)
    }

    /// The page that the entry must link, linked; it does not link it yet.
    fn step_into<M: GuestMem + ?Sized>(
        &mut self,
        cache: &mut mmu_core::frame::MmuCache,
        guest: EntryFormat<'_>,
        mem: &M,
        place: SpteRef,
        target: &Target<'_>,
    ) -> Result<PageId, Attempt> {
        let Some(parent) = self.writer.pages.get(place.page()) else {
            self.broken();
            return Err(Attempt::Done(FaultOutcome::Retry));
        };
        let (level, path) = (parent.level(), target.path);
        let (gfn, role) = child_of(parent, place.index(), target);
        if self.linked_child(place, level)?.is_some() {
            // Another table of the guest, or another view of it (KVM rows 4.24, 4.25; bug B01).
            let _ = self.drop_entry(place);
            return Err(Attempt::Again);
        }
        // What passes through is this vCPU's alone, and not found.
        let shared = !role.has(RoleFlags::PASSTHROUGH);
        let found = self.writer.pages.find(gfn, role, self.writer.generation);
        let child = match found.filter(|_| shared) {
            Some(child) => child,
            None => self.make_page(cache, gfn, role)?,
        };
        // INVARIANT[I18]: nothing out of sync is linked (KVM rows 4.21, 4.40).
        self.in_sync(guest, mem, child)?;
        if self.owes() {
            return Err(Attempt::Again);
        }
        if self.unlink_excess(child) {
            return Err(Attempt::Again);
        }
        self.note_shadowed(place, path, level);
        self.link(place, child);
        Ok(child)
    }

    /// What the entry links now; a leaf in the way is taken out.
    fn linked_child(&mut self, place: SpteRef, level: Level) -> Result<Option<PageId>, Attempt> {
        let Some(cell) = self.cell(place) else {
            self.broken();
            return Err(Attempt::Done(FaultOutcome::Retry));
        };
        let now = cell.load();
        if now.is_leaf(level) {
            let _ = self.drop_entry(place);
            return Err(Attempt::Again);
        }
        Ok(if now.is_table(level) { self.page_in(self.config().pfn(now)) } else { None })
    }

    /// Synchronise a page that is about to be linked, and all below it: making an entry present
    /// asks for no flush, so the guest may rely on what its table says now (KVM row 4.40).
    fn in_sync<M: GuestMem + ?Sized>(
        &mut self,
        guest: EntryFormat<'_>,
        mem: &M,
        page: PageId,
    ) -> Result<(), Attempt> {
        match self.sync_tree(guest, mem, page) {
            Synced::All => Ok(()),
            // Also if the page itself went: it is looked up again.
            Synced::More => Err(Attempt::Again),
        }
    }

    /// A page for (gfn, role). Every write to the table is seen from the next attempt on.
    pub(crate) fn make_page(
        &mut self,
        cache: &mut mmu_core::frame::MmuCache,
        gfn: Gfn,
        role: PageRole,
    ) -> Result<PageId, Attempt> {
        let stop = || Attempt::Done(FaultOutcome::Retry);
        let frame = cache.take().ok_or_else(stop)?;
        let generation = self.writer.generation;
        let Some(page) = self.writer.pages.add(NewPage { gfn, role, frame, generation }) else {
            let _ = cache.put(frame);
            return Err(stop());
        };
        self.vm.pool().set_place(frame, Gfn::new(u64::from(page.get())), role.level());
        self.writer.mmu.set_frame(page, Some(frame));
        self.shard.inc(Counter::Tables);
        self.writer.stats.pages_made += 1;
        if self.writer.pages.get(page).is_some_and(ShadowPage::shadows_a_table) {
            self.account(role.space(), gfn);
            self.watch(page);
        }
        Ok(page)
    }

    /// A table got a shadow: no huge page over it, and nobody writes to it unseen (KVM row 4.26).
    fn account(&mut self, space: u16, gfn: Gfn) {
        self.writer.blocks.count(space, gfn, crate::blocks::Change::More);
        self.zap_huge_over(gfn);
        self.write_protect_everywhere(gfn);
    }

    /// Note what guest entry the entry stands for; a link is dropped by it, too.
    fn note_shadowed(&mut self, place: SpteRef, path: &WalkPath, level: Level) {
        let Some(page) = self.writer.pages.get_mut(place.page()) else { return };
        let access = entry_below(path, level).map_or(path.access, |entry| entry.above);
        page.set_shadowed(place.index(), Shadowed::new(path.gfn.align_down(level), access));
    }
}

/// Index of the entry of ours that maps `gva` in a page at `level`.
pub(crate) fn shadow_index(gva: Gva, level: Level) -> usize {
    Gfn::new(gva.get() >> 12).index(level)
}

/// The guest's entry that a shadow entry at `level` stands for; `None` where the guest has no table
/// any more.
pub(crate) fn entry_at(path: &WalkPath, level: Level) -> Option<&GuestEntry> {
    path.entries.iter().find(|entry| entry.level == level)
}

/// What the entry of `parent` must link on the way to the target: a shadow of the guest's table;
/// above those another table that passes through, below them one that maps memory in a row.
fn child_of(parent: &ShadowPage, index: usize, target: &Target<'_>) -> (Gfn, PageRole) {
    let (level, path) = (parent.level(), target.path);
    if let Some(entry) = entry_below(path, level) {
        let role = parent.role.child(index, entry.above, ChildShape::Shadow);
        return (Gfn::containing(entry.gpa), role);
    }
    if parent.role.has(RoleFlags::PASSTHROUGH) {
        let role = parent.role.child(index, Access::ALL, ChildShape::Shadow);
        let flags = role.flags().union(RoleFlags::PASSTHROUGH);
        return (parent.gfn, role.with_flags(flags));
    }
    // The whole row permits what the guest's leaf does (KVM row 4.25).
    let role = parent.role.child(index, target.access, ChildShape::Direct);
    (path.gfn.align_down(level), role)
}

/// The guest's entry one level lower, whose table a child shadows.
fn entry_below(path: &WalkPath, level: Level) -> Option<&GuestEntry> {
    entry_at(path, level.down()?)
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Put the leaf in.
    fn install_leaf(&mut self, place: SpteRef, target: &Target<'_>, level: Level) -> Attempt {
        let (Some(cell), Some(page)) = (self.cell(place), self.writer.pages.get(place.page()))
        else {
            self.broken();
            return Attempt::Done(FaultOutcome::Retry);
        };
        let (space, direct) = (page.role.space(), page.is_direct());
        let gfn = target.path.gfn.align_down(level);
        let mut access = target.access;
        let writable = access.contains(Access::WRITE) && target.page.writable;
        let mut may_write = true;
        if writable && !self.may_write(gfn, level, target) {
            if target.write {
                return Attempt::Done(FaultOutcome::WriteProtected);
            }
            // As a clean page: the write will ask.
            may_write = false;
        }
        if !target.page.writable {
            access = access.difference(Access::WRITE);
        }
        // INVARIANT[I20]: what the guest's entries permit together, less what the host does not.
        let leaf = self.leaf_for(target, level, access, may_write);
        let old = cell.load();
        if old.is_leaf(level) && self.config().pfn(old) == self.config().pfn(leaf) {
            return self.widen(place, target, level, leaf);
        }
        if old.is_mmu_present() {
            // Another page, or a table where a page fits now: gone and flushed first (KVM row
            // 4.56).
            let _ = self.drop_entry(place);
            return Attempt::Again;
        }
        let key = RmapKey { space, level, gfn };
        match self.writer.rmap.add_within(key, place, MAX_ALIASES) {
            Ok(_) => {}
            Err(RmapError::Full { .. }) => {
                let mut gone = ShadowZap::default();
                self.zap_list(key, &mut gone);
                self.writer.stats.rmap_recycled += gone.leaves;
                return Attempt::Again;
            }
            // Reserved for other lists than this one: the level went down meanwhile.
            Err(_) => return Attempt::Done(FaultOutcome::Retry),
        }
        if !direct && let Some(page) = self.writer.pages.get_mut(place.page()) {
            page.set_shadowed(place.index(), Shadowed::new(gfn, target.access));
        }
        self.put(cell, leaf, level);
        if level == Level::L1 {
            return Attempt::Filled(place);
        }
        Attempt::Done(FaultOutcome::Fixed)
    }

    /// The entry is there for the same page: make it permit what is asked, if it does not.
    fn widen(&mut self, place: SpteRef, target: &Target<'_>, level: Level, leaf: Spte) -> Attempt {
        let Some(cell) = self.cell(place) else {
            self.broken();
            return Attempt::Done(FaultOutcome::Retry);
        };
        let (now, config) = (cell.load(), self.config());
        // What was written stays so.
        let forget = mmu_core::busted!("widen_forgets_writes");
        let wider = |old| if forget { leaf } else { config.keep_writes(old, leaf) };
        let permitted = config.permits(now, target.needed);
        if now == wider(now) || (permitted && config.is_accessed(now)) {
            return Attempt::Done(FaultOutcome::Spurious);
        }
        let kind = config.change_kind(now, wider(now), level);
        if kind.is_ok_and(|kind| !kind.needs_flush() && !kind.owes_log_flush()) {
            // Somebody may have aged it meanwhile: it is used now.
            let _ = self.update(cell, level, wider);
            // What is compared when the page is synchronised is what the entry permits now.
            if let Some(page) = self.writer.pages.get_mut(place.page()) {
                let gfn = target.path.gfn.align_down(level);
                page.set_shadowed(place.index(), Shadowed::new(gfn, target.access));
            }
            return Attempt::Done(FaultOutcome::Fixed);
        }
        let _ = self.drop_entry(place);
        Attempt::Again
    }

    fn leaf_for(&self, target: &Target<'_>, level: Level, access: Access, may_write: bool) -> Spte {
        let pfn = target.page.pfn.align_down(level);
        self.config().leaf(&LeafSpec {
            access,
            host_writable: target.page.writable,
            map_writable: may_write && (target.write || !target.logged),
            // The fast path is TDP's: a shadow entry gets W by a fault only.
            mmu_writable: may_write,
            accessed: !target.prefetch,
            memory_type: target.kind.memory_type,
            host_mmio: target.kind.backing == Backing::Device,
            ..LeafSpec::new(pfn, level)
        })
    }

    /// May entries let the guest write to the frame unseen? If a shadow of it can go out of sync,
    /// it does (KVM rows 4.31, 4.32).
    fn may_write(&mut self, gfn: Gfn, level: Level, target: &Target<'_>) -> bool {
        if level > Level::L1 {
            // No table with a shadow lies under a huge leaf (`Blocks`).
            return true;
        }
        if self.is_tracked(gfn) {
            return false;
        }
        self.let_go_unsync(gfn, target.prefetch)
    }

    /// Take huge leaves over a table out, in every address space: what they map comes back small.
    pub(crate) fn zap_huge_over(&mut self, gfn: Gfn) {
        let mut gone = ShadowZap::default();
        let spaces = if mmu_core::busted!("huge_zapped_in_one_space") { 1 } else { SPACES };
        for space in (0..).take(spaces) {
            for level in [Level::L2, Level::L3] {
                self.zap_list(RmapKey { space, level, gfn }, &mut gone);
            }
        }
    }
}
