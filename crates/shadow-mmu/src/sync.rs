//! Pages out of sync: the guest writes to its lowest tables unseen, until it flushes.
//!
//! Adds to [`Work`]: letting a page go out of sync when its table becomes writable (KVM rows 4.31,
//! 4.32), and making pages follow their tables again (rows 4.34, 4.35). Before a table is read for
//! that it is write-protected and the flush is paid, so nothing that the guest writes later goes
//! unseen. A guest that changes a present entry and does not flush may go on using the old one, as
//! on a real CPU.

use arrayvec::ArrayVec;

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Gpa, Level, to_u64};
use mmu_core::spte::{LeafSpec, Spte, SpteFormat};
use mmu_core::sync::ENTRIES;
use mmu_core::traits::Host;

use crate::guest::{EntryFormat, GuestLeaf, GuestMem};
use crate::page::{ShadowPage, Shadowed};
use crate::role::RoleFlags;
use crate::root::reads;
use crate::spte_ref::{PageId, SpteRef};
use crate::writer::Work;

/// Pages that are protected, flushed and synchronised together (KVM row 4.33).
const BATCH: usize = 16;
/// Steps of the search for a batch, once it has found one: tables that are linked many times are
/// met by many ways. Marks are exact, so the first page is found straight away.
const STEPS: u64 = 1024;

/// How far a synchronisation came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Synced {
    /// Nothing below is out of sync.
    All,
    /// A flush is owed first, or there is more: call again when it is paid. Something was done.
    More,
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Entries are about to let the guest write to `gfn`. Its shadows at level 1 go out of sync;
    /// `false` if that cannot be, and the frame stays protected.
    pub(crate) fn let_go_unsync(&mut self, gfn: Gfn, prefetch: bool) -> bool {
        let shadows =
            |page: &ShadowPage| page.shadows_a_table() && !page.role.has(RoleFlags::INVALID);
        let keeps = |page: &ShadowPage| {
            shadows(page) && (page.level() > Level::L1 || (prefetch && !page.unsync))
        };
        if self.writer.pages.of_gfn(gfn).any(|(_, page)| keeps(page)) {
            return false;
        }
        // One at a time: marking changes pages.
        while let Some(id) = self.in_sync_shadow(gfn) {
            self.mark_unsync(id);
            self.writer.stats.unsyncs += 1;
        }
        self.unwatch_all(gfn);
        true
    }

    fn in_sync_shadow(&self, gfn: Gfn) -> Option<PageId> {
        let in_sync = |page: &ShadowPage| {
            page.shadows_a_table() && !page.unsync && !page.role.has(RoleFlags::INVALID)
        };
        self.writer.pages.of_gfn(gfn).find(|(_, page)| in_sync(page)).map(|(id, _)| id)
    }

    /// Make the pages at and below `top` follow their tables: a batch of them.
    pub(crate) fn sync_tree<M: GuestMem + ?Sized>(
        &mut self,
        guest: EntryFormat<'_>,
        mem: &M,
        top: PageId,
    ) -> Synced {
        let batch = self.unsync_below(top);
        if batch.is_empty() {
            return Synced::All;
        }
        for id in &batch {
            let Some(page) = self.writer.pages.get(*id) else { continue };
            self.write_protect_everywhere(page.gfn);
            self.watch(*id);
        }
        if !self.owes() {
            for id in &batch {
                self.sync_page(guest, mem, *id);
            }
        }
        Synced::More
    }

    /// The first pages at and below `top` that are out of sync: some, if there are any.
    fn unsync_below(&mut self, top: PageId) -> ArrayVec<PageId, BATCH> {
        let mut found = ArrayVec::new();
        let mut steps = 0;
        let mut stack: ArrayVec<(PageId, usize), { Level::ALL.len() }> = ArrayVec::new();
        stack.push((top, 0));
        while let Some((id, from)) = stack.pop() {
            steps += 1;
            let enough = steps > STEPS && !mmu_core::busted!("sync_takes_every_way");
            if enough && !found.is_empty() {
                break;
            }
            let Some(page) = self.writer.pages.get(id) else { continue };
            if page.unsync && (found.contains(&id) || found.try_push(id).is_err()) {
                continue;
            }
            let Some(index) = page.unsync_children.next(from) else { continue };
            if found.is_full() {
                break;
            }
            let _ = stack.try_push((id, index + 1));
            if let Some(child) = self.child_at(SpteRef::new(id, index)) {
                let _ = stack.try_push((child, 0));
            }
        }
        self.writer.stats.sync_steps += steps;
        found
    }

    /// What an entry links.
    pub(crate) fn child_at(&self, place: SpteRef) -> Option<PageId> {
        let level = self.writer.pages.get(place.page())?.level();
        let now = self.cell(place)?.load();
        if now.is_table(level) { self.page_in(self.config().pfn(now)) } else { None }
    }

    /// Make a page at level 1 follow its table, which is write-protected and flushed.
    fn sync_page<M: GuestMem + ?Sized>(&mut self, guest: EntryFormat<'_>, mem: &M, id: PageId) {
        for index in 0..ENTRIES {
            if !self.sync_entry(guest, mem, SpteRef::new(id, index)) {
                // The table is no memory any more (KVM row 4.34).
                return self.zap_page(id);
            }
        }
        self.clear_unsync(id);
        self.writer.stats.syncs += 1;
    }

    /// Make one entry at level 1 follow the guest's; `false` if that cannot be read.
    pub(crate) fn sync_entry<M: GuestMem + ?Sized>(
        &mut self,
        guest: EntryFormat<'_>,
        mem: &M,
        spte: SpteRef,
    ) -> bool {
        let Some(cell) = self.cell(spte) else { return true };
        let now = cell.load();
        if now.is_empty() {
            return true;
        }
        let Some(page) = self.writer.pages.get(spte.page()) else { return true };
        if !reads(guest, page.role) {
            let _ = self.drop_entry(spte);
            return true;
        }
        let (at, width) = (entry_address(page, spte.index()), guest.width());
        let (role, shadowed) = (page.role, page.shadowed(spte.index()));
        let Ok(value) = mem.read(at, width) else { return false };
        let leaf = guest.leaf(value).filter(|leaf| leaf.accessed && leaf.gfn == shadowed.gfn());
        let Some(leaf) = leaf else {
            let _ = self.drop_entry(spte);
            return true;
        };
        let access = role.access() & leaf.clean_access();
        if access != shadowed.access() {
            self.change_access(spte, access, shadowed);
        }
        true
    }

    /// The guest's entry permits something else now: so does ours, for the same host page (KVM row
    /// 4.34). No W for tables that have a shadow: that is for a fault to decide. An entry that
    /// would permit nothing goes.
    fn change_access(&mut self, spte: SpteRef, access: Access, old: Shadowed) {
        let Some(cell) = self.cell(spte) else { return self.broken() };
        let config = self.config();
        let free = self.writer.pages.of_gfn(old.gfn()).all(|(_, page)| !page.shadows_a_table());
        // What the CPU notes and what an ager takes meanwhile is in `now`, each time.
        let leaf = |now: Spte| {
            let leaf = config.leaf(&LeafSpec {
                access,
                host_writable: config.is_host_writable(now),
                mmu_writable: free && config.is_mmu_writable(now),
                map_writable: config.is_writable(now),
                accessed: config.is_accessed(now),
                ..LeafSpec::new(config.pfn(now), Level::L1)
            });
            let leaf = config.keep_kind(now, leaf);
            let forget = mmu_core::busted!("sync_forgets_writes");
            if forget { leaf } else { config.keep_writes(now, leaf) }
        };
        if !config.is_hw_present(config.untrack(leaf(cell.load())))
            && !mmu_core::busted!("sync_keeps_empty_leaves")
        {
            let _ = self.drop_entry(spte);
            return;
        }
        let owes = |old, new| {
            config
                .change_kind(old, new, Level::L1)
                .is_ok_and(|kind| kind.needs_flush() || kind.owes_log_flush())
        };
        let replaced = self.update(cell, Level::L1, leaf);
        if replaced.is_some_and(|old| owes(old, leaf(old))) {
            self.owe(old.gfn(), 1);
        }
        if let Some(page) = self.writer.pages.get_mut(spte.page()) {
            page.set_shadowed(spte.index(), Shadowed::new(old.gfn(), access));
        }
    }
}

/// Where the guest's entry stands that entry `index` of a shadow of its table is made from.
fn entry_address(page: &ShadowPage, index: usize) -> Gpa {
    let table = page.gfn.address().get();
    let index = to_u64(index);
    if page.role.has(RoleFlags::FOUR_BYTES) {
        // Half of the guest's 1024 entries.
        let first = u64::from(page.role.quadrant()) * to_u64(ENTRIES);
        return Gpa::new(table + (first + index) * 4);
    }
    Gpa::new(table + index * 8)
}

impl GuestLeaf {
    /// What may be mapped so that the first write is noticed (KVM row 4.12).
    pub(crate) fn clean_access(&self) -> Access {
        if self.clean { self.access.difference(Access::WRITE) } else { self.access }
    }
}
