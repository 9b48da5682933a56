//! Huge leaves in the place of tables (KVM rows 0.2.10, 3.29; 8.26).
//!
//! Owns [`TdpMmu::collapse`] and the taking apart of a table that a leaf replaced, which faults use
//! too. A table is collapsed as if by a fault: its page is resolved with nothing held, and what
//! that rests on is checked again in the one Shared section that puts the leaf in.
//!
//! No gfn is unmapped at any moment: the leaf takes the place of the link by one compare-exchange.
//! In the *same* section everything below is frozen. An unmap that begins later finds the leaf in
//! the tree and nothing else to look for: it relies on the entries below being FROZEN, so that no
//! fault still inside the old table installs a page that nobody would find.
//!
//! CPUs go on using a link that they cached until the flush, and may set A and D in the old entries
//! until those are frozen. What the freeze takes out and the leaf does not say is added to the leaf
//! (invariant I8).
//!
//! Small levels come first, and a table with tables under it stays: so no section visits more than
//! one table.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Level, Pfn, to_u64};
use mmu_core::epoch::EpochGuard;
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::frame::{PageTable, PhysMap, TablePool};
use mmu_core::notify::Snapshot;
use mmu_core::slot;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteConfig, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::trace::Event;
use mmu_core::traits::Host;
use mmu_core::vm::{Actor, SharedWork};

use crate::change::Change;
use crate::iter::{Cursor, TdpIter};
use crate::limits::Limits;
use crate::mmu::TdpMmu;
use crate::root::{FoundRoot, RootFilter};
use crate::slice::SLICE_ENTRIES;
use crate::zap::ZapReport;

/// Tables whose flush is paid at once.
const BATCH: u32 = 32;

/// Times that a table is tried while others change what its leaf rests on.
const MAX_TRIES: u32 = 4;

/// What a collapse did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct CollapseReport {
    /// Tables that a huge leaf replaced, by the leaf's level: 2 MiB, 1 GiB. The 2 MiB leaves that
    /// went into a 1 GiB one in the same call count in both.
    pub collapses: [u64; 2],
    /// Tables left because slots, invalidations or faults changed too much meanwhile. Another call
    /// may find them quiet.
    pub raced: u64,
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Replace tables that map pages of `range` in address space `space` by huge leaves, wherever
    /// slot, log, host page and policy allow, flushed when this returns (KVM row 3.29; 8.26).
    ///
    /// A table with no page mapped stays, as does one whose pages differ in what the host or the
    /// slot permits. Pages of the block that are not mapped yet are mapped by the leaf. Faults go
    /// on meanwhile. Asks the resolver with nothing held, once for each table.
    #[doc(alias = "kvm_tdp_mmu_recover_huge_pages")]
    pub fn collapse(&self, actor: &mut Actor<H>, space: u16, range: GfnRange) -> CollapseReport {
        self.assert_own(actor);
        let report = CollapseReport::default();
        let mut pass = Pass { mmu: self, space, debt: FlushDebt::new(), unpaid: 0, report };
        let most = self.options().max_level.min(self.config().max_leaf_level());
        for index in self.changeable_roots() {
            // A table of level 3 can go when those under it have.
            for level in [Level::L2, Level::L3].into_iter().filter(|level| *level <= most) {
                pass.tables(actor, index, range, level);
            }
        }
        pass.pay(actor);
        pass.report
    }

    /// The leaf `leaf` at `level` for `gfn` took the place of the link `old`, in this section: take
    /// the table apart, owe the flush (row 0.2.7), and add what the leaf does not say.
    #[cold]
    pub(crate) fn replace_table(
        &self,
        change: &Change<'_, F, H>,
        root: FoundRoot,
        (old, leaf): (Spte, Spte),
        gfn: Gfn,
        level: Level,
        debt: &mut FlushDebt,
    ) {
        change.stats.inc(Counter::Collapses);
        let pages = GfnRange::entry(gfn, level);
        change.trace(|| Event::Collapse { gfn: pages.start, level });
        change.owe(debt, pages);
        let mut gone = ZapReport::default();
        if let Some(below) = level.down() {
            change.remove_table(self.config().pfn(old), below, debt, &mut gone);
        }
        let used = Used {
            young: gone.young != 0 && !change.config.is_accessed(leaf),
            dirty: gone.dirty != 0 && !change.config.is_dirty(leaf),
        };
        if used.young || used.dirty {
            used.add(change, root, pages);
        }
        if used.young || change.config.is_accessed(leaf) {
            // What the leaf took over was accessed through links that may have been cleared since.
            change.touch(root, gfn, level);
        }
    }

    /// Must a leaf at `level` leave the table alone that `link`, the entry there, leads to? One
    /// that the NX mitigation asked for, for it would come back (KVM row 3.24); and taking tables
    /// under it apart as well could visit many times what a section may.
    #[cold]
    pub(crate) fn keeps_table(
        &self,
        pool: &TablePool<H>,
        section: &EpochGuard<'_>,
        link: Spte,
        level: Level,
    ) -> bool {
        let frame = self.config().pfn(link);
        if pool.is_marked(frame) {
            return true;
        }
        let Some(below) = level.down().filter(|below| *below > Level::L1) else { return false };
        let table = pool.table(section, frame);
        table.entries().iter().any(|cell| cell.load().is_table(below))
    }
}

/// One collapse.
struct Pass<'m, F: SpteFormat, H: Host> {
    mmu: &'m TdpMmu<F, H>,
    space: u16,
    debt: FlushDebt,
    /// Tables in `debt`.
    unpaid: u32,
    report: CollapseReport,
}

/// Where the walk for tables came to.
enum Found {
    /// A table is linked at the level, for this gfn and on.
    Table(Gfn),
    /// The slice is full; go on there.
    Pause(Cursor),
    End,
}

/// What came of one try.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Try {
    Collapsed,
    /// The table stays, for a reason that will not go away by itself.
    Stays,
    /// Something changed meanwhile.
    Raced,
}

/// A huge leaf to be made, and what that rests on.
struct Block {
    index: usize,
    /// First gfn and its frame.
    gfn: Gfn,
    pfn: Pfn,
    level: Level,
    snapshot: Snapshot,
    generation: u64,
}

impl<F: SpteFormat, H: Host> Pass<'_, F, H> {
    fn pay(&mut self, actor: &mut Actor<H>) {
        self.unpaid = 0;
        actor.pay(core::mem::take(&mut self.debt), FlushScope::Ranges);
    }

    /// A dying tree is not worth the work.
    fn root(&self, index: usize) -> Option<FoundRoot> {
        let root = self.mmu.roots().get(index, RootFilter::Valid)?;
        (root.role.space() == self.space).then_some(root)
    }

    /// Collapse what can be of the tables linked at `level`.
    fn tables(&mut self, actor: &mut Actor<H>, index: usize, range: GfnRange, level: Level) {
        let mut cursor = Cursor::new(range, level);
        loop {
            match self.find(actor, index, cursor, level) {
                Found::End => return,
                Found::Pause(next) => cursor = next,
                Found::Table(gfn) => {
                    cursor = cursor.moved_to(GfnRange::entry(gfn, level).end);
                    self.table(actor, index, gfn, level);
                }
            }
        }
    }

    fn find(&self, actor: &mut Actor<H>, index: usize, cursor: Cursor, level: Level) -> Found {
        let work = actor.pinned();
        let Some(root) = self.root(index) else { return Found::End };
        let pool = work.vm.pool();
        let iter = TdpIter::resume(pool, &work.section, root.frame, root.role.level(), cursor)
            .with_encryption(self.mmu.config().encryption_mask());
        let mut visited = 0;
        for step in iter {
            let link = step.spte.is_table(step.level);
            if link && step.level == level {
                return Found::Table(step.gfn);
            }
            visited += usize::from(!link);
            work.stats.max(Counter::MaxSlice, to_u64(visited));
            if visited == SLICE_ENTRIES {
                return Found::Pause(cursor.moved_to(step.range().end));
            }
        }
        Found::End
    }

    fn table(&mut self, actor: &mut Actor<H>, index: usize, gfn: Gfn, level: Level) {
        for _ in 0..MAX_TRIES {
            match self.try_table(actor, index, gfn, level) {
                Try::Raced => {}
                Try::Stays => return,
                Try::Collapsed => {
                    let count = self.report.collapses.get_mut(level.slot().saturating_sub(1));
                    if let Some(count) = count {
                        *count += 1;
                    }
                    self.unpaid += 1;
                    if self.unpaid == BATCH {
                        self.pay(actor);
                    }
                    return;
                }
            }
        }
        self.report.raced += 1;
    }

    fn try_table(&mut self, actor: &mut Actor<H>, index: usize, gfn: Gfn, level: Level) -> Try {
        let snapshot = self.mmu.vm().notify().snapshot();
        if !actor.keep_slot(self.space, gfn) {
            return Try::Stays;
        }
        let Some((at, child)) = self.first_leaf(actor, index, gfn, level) else {
            return Try::Stays;
        };
        let limits = self.limits(actor, at);
        let Some(kept) = actor.kept_slot() else { return Try::Stays };
        let slot = kept.slot();
        // Geometry first: what a slot carries knows its own pages only (KVM row 3.29, B07).
        if slot.is_invalid()
            || slot::max_level(slot, gfn, level) < level
            || kept.unlogged_level(gfn, level) < level
            || limits.is_some_and(|limits| limits.level < level)
        {
            return Try::Stays;
        }
        let config = self.mmu.config();
        let host_writable = config.is_host_writable(child);
        let want = if host_writable { Access::READ | Access::WRITE } else { Access::READ };
        let host = self.mmu.vm().host();
        let page = match limits {
            Some(limits) if limits.is_private() => host.resolve_private(slot, at, want),
            _ => host.resolve(slot, at, want),
        };
        let Ok(page) = page else { return Try::Stays };
        let writable = page.writable && !slot.is_read_only();
        let congruent = (at.get() ^ page.pfn.get()) & (level.pages() - 1) == 0;
        if page.level < level
            || !congruent
            || page.pfn != config.pfn(child)
            || writable != host_writable
        {
            return Try::Stays;
        }
        let (pfn, generation) = (page.pfn.align_down(level), kept.generation());
        let block = Block { index, gfn, pfn, level, snapshot, generation };
        self.replace(&mut actor.shared(), &block)
    }

    /// What attributes and write tracking say. Asked after the snapshot, as by a fault.
    fn limits(&self, actor: &mut Actor<H>, gfn: Gfn) -> Option<Limits> {
        let work = actor.pinned();
        let nx_huge_pages = self.mmu.making().nx_huge_pages();
        let limited = !work.vm.slots().is_plain();
        limited.then(|| Limits::of(work.vm, &work.section, gfn, nx_huge_pages))
    }

    /// The first leaf in the table that the entry at `level` for `gfn` links.
    fn first_leaf(
        &self,
        actor: &mut Actor<H>,
        index: usize,
        gfn: Gfn,
        level: Level,
    ) -> Option<(Gfn, Spte)> {
        let work = actor.pinned();
        let (pool, below) = (work.vm.pool(), level.down()?);
        let cell = self.entry(pool, &work.section, self.root(index)?, gfn, level)?;
        let link = cell.load();
        if !link.is_table(level) {
            return None;
        }
        let table = pool.table(&work.section, self.mmu.config().pfn(link));
        let cells = (0u64..).zip(table.entries());
        work.stats.max(Counter::MaxSlice, to_u64(table.entries().len()));
        cells
            .map(|(at, cell)| (gfn.saturating_add(at * below.pages()), cell.load()))
            .find(|(_, spte)| spte.is_leaf(below))
    }

    /// The entry at `level` for `gfn`, if links lead there.
    fn entry<'g, P: PhysMap>(
        &self,
        pool: &'g TablePool<P>,
        section: &'g EpochGuard<'_>,
        root: FoundRoot,
        gfn: Gfn,
        level: Level,
    ) -> Option<&'g SpteCell> {
        let (mut frame, mut at) = (root.frame, root.role.level());
        while at > level {
            let link = pool.table(section, frame).cell(gfn, at).load();
            if !link.is_table(at) {
                return None;
            }
            frame = self.mmu.config().pfn(link);
            at = at.below();
        }
        (at == level).then(|| pool.table(section, frame).cell(gfn, level))
    }

    /// Put the leaf in, if nothing has changed.
    fn replace(&mut self, work: &mut SharedWork<'_, H>, block: &Block) -> Try {
        let SharedWork { section, vm, stats, .. } = &*work;
        let &Block { index, gfn, pfn, level, snapshot, generation } = block;
        let pages = GfnRange::entry(gfn, level);
        // As a fault: what invalidates, logs or tracks from here on waits for this section.
        if vm.slots().generation() != generation || vm.notify().must_retry(section, snapshot, pages)
        {
            return Try::Raced;
        }
        let Some(root) = self.root(index) else { return Try::Stays };
        let (pool, epoch) = (vm.pool(), section.epoch());
        let change = self.mmu.change(vm, stats, epoch, self.space);
        let Some(cell) = self.entry(pool, epoch, root, gfn, level) else { return Try::Stays };
        let old = cell.load();
        if !old.is_table(level) {
            return Try::Stays;
        }
        let frame = change.config.pfn(old);
        // What is executed stays small until `recover_nx` finds it.
        if pool.is_marked(frame) {
            return Try::Stays;
        }
        let table = pool.table(epoch, frame);
        let Some(leaf) = huge_leaf(self.mmu.making(), table, level, pfn) else { return Try::Stays };
        if change.set(cell, old, leaf, gfn, level).is_err() {
            return Try::Raced;
        }
        self.mmu.replace_table(&change, root, (old, leaf), gfn, level, &mut self.debt);
        Try::Collapsed
    }
}

/// The leaf at `level` that says what the leaves of `table` say together, for the frames from
/// `first` on; `None` when one leaf cannot. The table may change meanwhile.
///
/// Used, written and writable is what one of them is: rather a page copied for nothing than a write
/// forgotten. Access-tracked is what all of them are.
fn huge_leaf<F: SpteFormat>(
    config: &SpteConfig<F>,
    table: &PageTable,
    level: Level,
    first: Pfn,
) -> Option<Spte> {
    let below = level.down()?;
    let volatile = F::ACCESSED | F::DIRTY | F::WRITABLE;
    let mut common = None;
    let (mut used, mut tracked) = (0, true);
    // What a leaf that was looked at says besides its frame: as a rule the others say the same.
    let mut like = None;
    for (index, cell) in (0u64..).zip(table.entries()) {
        let spte = cell.load();
        let pfn = first.saturating_add(index * below.pages());
        let says = spte.without(volatile).raw() ^ pfn.address().get();
        if like == Some(says) {
            used |= spte.raw() & volatile;
            continue;
        }
        // A slot has the whole block, so an MMIO entry in it is stale.
        if spte.is_empty() || config.is_mmio(spte) {
            continue;
        }
        if !spte.is_leaf(below) || config.pfn(spte) != pfn {
            return None;
        }
        used |= spte.raw() & volatile;
        tracked &= config.is_access_tracked(spte);
        let huge = config.huge_from_small(config.untrack(spte), level).without(volatile);
        if common.is_some_and(|known| known != huge) {
            return None;
        }
        common = Some(huge);
        like = Some(says);
    }
    let leaf = common.filter(|leaf| config.is_hw_present(*leaf))?.with(used);
    Some(if tracked { config.age(leaf) } else { leaf })
}

/// What the entries of a table said that its leaf does not: CPUs may have noted it after the leaf
/// was made, and a prefaulted leaf says nothing of use.
struct Used {
    young: bool,
    dirty: bool,
}

impl Used {
    /// Add it to whatever maps `pages` now: the new leaf, or what another fault or collapse has
    /// made of it since (INVARIANT[I8]). Unmaps are no concern: those in progress when this section
    /// began kept it from changing anything, later ones wait for it.
    fn add<F: SpteFormat, H: Host>(
        &self,
        change: &Change<'_, F, H>,
        root: FoundRoot,
        pages: GfnRange,
    ) {
        // Each turn but the last means that somebody split or replaced a leaf in between.
        loop {
            let (pool, level) = (change.pool(), root.role.level());
            let cursor = Cursor::new(pages, Level::L1);
            let iter = TdpIter::new(pool, change.section, root.frame, level, cursor)
                .with_encryption(change.config.encryption_mask());
            let mut whole = true;
            for step in iter {
                if step.spte.is_frozen() {
                    // Of a table that was just taken out: its leaf stands further up.
                    whole = false;
                } else if step.spte.is_leaf(step.level) {
                    whole &= self.add_to(change, step.cell, step.spte, step.gfn, step.level);
                }
            }
            if whole {
                return;
            }
        }
    }

    /// `false` when the leaf is none any more.
    fn add_to<F: SpteFormat, H: Host>(
        &self,
        change: &Change<'_, F, H>,
        cell: &SpteCell,
        mut old: Spte,
        gfn: Gfn,
        level: Level,
    ) -> bool {
        while old.is_leaf(level) {
            let mut new = old;
            if self.young {
                new = change.config.restore(new).with(F::ACCESSED);
            }
            if self.dirty {
                new = new.with(F::DIRTY);
            }
            if new == old {
                return true;
            }
            match change.set(cell, old, new, gfn, level) {
                Ok(()) => return true,
                Err(now) => old = now,
            }
        }
        false
    }
}
