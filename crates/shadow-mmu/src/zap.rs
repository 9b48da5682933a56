//! Taking away: entries, shadow pages, what maps a range.
//!
//! Adds to `Work`: `drop_entry`, the one way in which an entry loses what it has (leaf off its
//! reverse map, link off its child), `zap_page` (KVM row 4.47), and to
//! [`ShadowMmu`] the unmapping of guest frames that the host takes back. Flushes
//! are owed for all of it and paid before the writer is given up; a page's frame is reused only
//! after that and a grace period, so neither a CPU nor an ager can still be at it.

use mmu_core::addr::{Gfn, GfnRange, Level, to_u64};
use mmu_core::flush::FlushDebt;
use mmu_core::notify::Invalidation;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::sync::ENTRIES;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::blocks::Change;
use crate::mmu::ShadowMmu;
use crate::page::ShadowPage;
use crate::rmap::{RmapKey, SPACES};
use crate::role::RoleFlags;
use crate::spte_ref::{PageId, SpteRef};
use crate::writer::{Work, WriterLock};

/// Entries that an unmapping takes out before it lets others in.
const SLICE: u64 = 512;
/// Orphans that go with a page. More than one, so that they do not pile up.
const ORPHANS: u32 = 4;
/// Levels of leaves.
const LEAVES: [Level; 3] = [Level::L1, Level::L2, Level::L3];

/// What was unmapped. A page may be mapped by several entries, each of which counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct ShadowZap {
    /// Leaves taken out, of any size.
    pub leaves: u64,
    /// Of these, those that had been accessed.
    pub accessed: u64,
    /// Of these, those that had been written.
    pub dirty: u64,
}

/// What stood in an entry.
pub(crate) enum Dropped {
    /// Nothing.
    Nothing,
    /// A leaf, with the bits that the CPU set last.
    Leaf(Spte),
    /// A link to this page.
    Link(PageId),
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Which list a leaf in this entry is on.
    pub(crate) fn key_of(&self, spte: SpteRef) -> Option<RmapKey> {
        let page = self.writer.pages.get(spte.page())?;
        let gfn = page.shadowed(spte.index()).gfn();
        Some(RmapKey { space: page.role.space(), level: page.level(), gfn })
    }

    /// Empty an entry, whatever stands there.
    pub(crate) fn drop_entry(&mut self, spte: SpteRef) -> Dropped {
        let (Some(cell), Some(key)) = (self.cell(spte), self.key_of(spte)) else {
            self.broken();
            return Dropped::Nothing;
        };
        let level = key.level;
        if cell.peek().is_empty() {
            return Dropped::Nothing;
        }
        let old = self.take(cell, level);
        if old.is_leaf(level) {
            // Off the list after the entry is empty: an ager that holds the list finds nothing.
            if self.writer.rmap.remove(key, spte).is_err() {
                self.broken();
            }
            self.owe(key.gfn.align_down(level), level.pages());
            self.shard.inc(Counter::LeavesZapped);
            return Dropped::Leaf(old);
        }
        if old.is_table(level) {
            self.owe_everything();
            self.shard.inc(Counter::TablesUnlinked);
            if let Some(child) = self.unlinked(spte, old) {
                return Dropped::Link(child);
            }
            self.broken();
        }
        Dropped::Nothing
    }

    /// Take out every leaf on a list; how many, and what they had seen.
    pub(crate) fn zap_list(&mut self, key: RmapKey, done: &mut ShadowZap) {
        while let Some(spte) = self.writer.rmap.first(key) {
            let Dropped::Leaf(old) = self.drop_entry(spte) else {
                // A list names leaves only; going on would not end.
                return self.broken();
            };
            done.leaves += 1;
            done.accessed += u64::from(self.config().is_accessed(old));
            done.dirty += u64::from(self.config().is_dirty(old));
        }
    }

    /// Take a page apart (KVM row 4.47). If it is a root it stays, invalid, until its last vCPU has
    /// left it. With it go children that only a nested guest's page linked, some at once and the
    /// rest with the pages that go next; other orphans stay, to be found again by gfn and role.
    pub(crate) fn zap_page(&mut self, page: PageId) {
        self.zap_one(page);
        // INVARIANT[I23]: however many there are (bug B68).
        let orphans = if mmu_core::busted!("orphans_unbounded") { u32::MAX } else { ORPHANS };
        for _ in 0..orphans {
            let Some(orphan) = self.writer.pages.next_doomed() else { return };
            // Found again and linked meanwhile, it stays.
            if self.is_orphan(orphan) {
                self.zap_one(orphan);
            }
        }
    }

    fn zap_one(&mut self, id: PageId) {
        for index in 0..ENTRIES {
            if let Dropped::Link(child) = self.drop_entry(SpteRef::new(id, index)) {
                self.doom_orphan(child);
            }
        }
        while let Some(place) = self.first_parent(id) {
            if !matches!(self.drop_entry(place), Dropped::Link(child) if child == id) {
                return self.broken();
            }
        }
        self.clear_unsync(id);
        let Some(page) = self.writer.pages.get(id) else { return self.broken() };
        let (was_invalid, roots) = (page.role.has(RoleFlags::INVALID), page.roots);
        if !was_invalid {
            self.unaccount(id);
            self.writer.stats.pages_zapped += 1;
        }
        if roots == 0 {
            self.free(id);
        } else {
            // INVARIANT[I16]: an invalid page is found by nobody.
            self.writer.pages.invalidate(id);
            self.owe_reload();
        }
    }

    fn doom_orphan(&mut self, child: PageId) {
        if self.is_orphan(child) {
            self.writer.pages.doom(child);
        }
    }

    /// Is it a page that nobody needs, nor will find?
    fn is_orphan(&self, page: PageId) -> bool {
        let orphan = |page: &ShadowPage| {
            // What passes through is found by nobody: it is one vCPU's.
            page.role.intersects(RoleFlags::GUEST_MODE | RoleFlags::PASSTHROUGH)
                && page.parents.is_empty()
                && page.roots == 0
                && !page.role.has(RoleFlags::INVALID)
        };
        self.writer.pages.get(page).is_some_and(orphan)
    }

    pub(crate) fn first_parent(&self, page: PageId) -> Option<SpteRef> {
        let parents = self.writer.pages.get(page)?.parents;
        parents.iter(self.writer.rmap.desc_pool()).next()
    }

    /// The guest table that the page shadowed needs no protection on its account.
    fn unaccount(&mut self, id: PageId) {
        let Some(page) = self.writer.pages.get_mut(id) else { return };
        page.forget_told();
        if page.shadows_a_table() {
            let (space, gfn) = (page.role.space(), page.gfn);
            self.writer.blocks.count(space, gfn, Change::Less);
        }
    }

    /// Give the frame of a page back that nothing links: after the flush that is owed.
    pub(crate) fn free(&mut self, id: PageId) {
        let Some(page) = self.writer.pages.remove(id) else { return self.broken() };
        // INVARIANT[I13]: the debt keeps the frame until CPUs and agers are done.
        self.debt.owe_table(self.vm.host(), page.frame);
        self.writer.mmu.set_frame(id, None);
        self.shard.sub(Counter::Tables, 1);
    }
}

impl<F: SpteFormat, H: Host> ShadowMmu<F, H> {
    /// Unmap guest frames that the host takes back, in every address space: when this returns, no
    /// vCPU reaches them through shadow tables. The writer is taken for a slice at a time; the
    /// invalidation keeps faults from mapping the frames again.
    ///
    /// The caller has begun `invalidation` over a range that covers `range`, which drained the
    /// sections that were open, and ends it afterwards.
    pub fn unmap_in<L: WriterLock<F, H>>(
        &self,
        actor: &mut Actor<H>,
        lock: &L,
        invalidation: &Invalidation<'_>,
        range: GfnRange,
    ) -> ShadowZap {
        debug_assert!(invalidation.range().covers(range), "the range was not invalidated (I11)");
        let mut done = ShadowZap::default();
        let mut at = Some(Position::start(range));
        while let Some(position) = at {
            at = lock.with(|writer| {
                writer.work(actor, |work| work.unmap_slice(range, position, &mut done))
            });
        }
        if invalidation.others_in_progress() {
            // Another may have taken the leaves out; its flush may not be over.
            let mut debt = FlushDebt::new();
            actor.stats().inc(Counter::FlushOwed);
            debt.owe(range);
            actor.pay(debt, mmu_core::flush::FlushScope::Ranges);
        }
        done
    }
}

/// Where an unmapping goes on: a list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    space: u16,
    level: Level,
    gfn: Gfn,
}

impl Position {
    const fn start(range: GfnRange) -> Self {
        Self { space: 0, level: Level::L1, gfn: range.start }
    }

    /// The first list of the next level, or of the next address space; `None` after the last.
    fn turn(self, range: GfnRange) -> Option<Self> {
        let later = LEAVES.into_iter().find(|level| *level > self.level);
        let (space, level) = match later {
            Some(level) => (self.space, level),
            None => (self.space + 1, Level::L1),
        };
        (usize::from(space) < SPACES).then_some(Self { space, level, gfn: range.start })
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Unmap until the end (`None`) or until others should have a turn.
    fn unmap_slice(
        &mut self,
        range: GfnRange,
        from: Position,
        done: &mut ShadowZap,
    ) -> Option<Position> {
        let mut at = from;
        let before = done.leaves;
        let mut lists = 0;
        loop {
            let rmaps = self.writer.rmap.rmaps();
            let Some(gfn) = rmaps.next(at.space, at.level, at.gfn, range.end) else {
                at = at.turn(range)?;
                continue;
            };
            // INVARIANT[I23]: each turn goes on by a block at least.
            self.zap_list(RmapKey { space: at.space, level: at.level, gfn }, done);
            lists += 1;
            at.gfn = gfn.align_down(at.level).saturating_add(at.level.pages());
            if done.leaves - before >= SLICE || lists >= 16 * to_u64(ENTRIES) {
                return Some(at);
            }
        }
    }
}
