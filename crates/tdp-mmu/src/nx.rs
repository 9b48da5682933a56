//! The NX mitigation of huge pages (iTLB multihit; KVM rows 1.20, 3.24, 3.30 to 3.32, 3.38).
//!
//! Under it no huge leaf can be executed: a fetch splits, or maps 4 KiB to begin with. Owns the
//! switch ([`TdpMmu::set_nx_huge_pages`]), and the way back to huge pages for what is not executed
//! any more ([`TdpMmu::recover_nx`]).
//!
//! A table that stands where a huge leaf would, if nothing were fetched there, is *marked* in the
//! notes about its frame before it is linked. A fault for data that would put a huge leaf in its
//! place goes one level down instead, or two pages would throw each other out for ever. The gauge
//! [`Counter::NxSplits`] counts marked tables.
//!
//! There is no thread here: the embedder's timer calls `recover_nx`, whenever it likes.

use mmu_core::addr::{Gfn, GfnRange, Level, Pfn, to_index, to_u64};
use mmu_core::epoch::EpochGuard;
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::frame::TablePool;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Capabilities, ConfigError, Spte, SpteConfig, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::sync::plain::{AtomicU64, Ordering};
use mmu_core::trace::Event;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::change::Change;
use crate::iter::{Cursor, TdpIter};
use crate::mmu::TdpMmu;
use crate::root::{FoundRoot, RootFilter, ZapAll};
use crate::slice::SLICE_ENTRIES;
use crate::zap::ZapReport;

/// May huge pages be executed?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NxHugePages {
    /// Yes.
    Off,
    /// No: the CPU could be brought down by a guest that changes the size of a page it executes.
    On,
}

/// What [`TdpMmu::recover_nx`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct NxReport {
    /// Marked tables that were taken out; the next access there may map a huge page.
    pub recovered: u64,
    /// Tables that are marked no more and stay: their slot is logged, so no huge page would come.
    pub unmarked: u64,
    /// What the tables taken out mapped.
    pub zapped: ZapReport,
}

/// The switch, and where the search for marked tables goes on.
#[derive(Debug)]
pub(crate) struct Nx<F: SpteFormat> {
    /// The configuration with the other choice than the MMU was made with.
    other: Result<SpteConfig<F>, ConfigError>,
    /// Is `other` in force?
    switched: AtomicU64,
    hand_root: AtomicU64,
    hand_gfn: AtomicU64,
}

impl<F: SpteFormat> Nx<F> {
    pub(crate) fn new(config: &SpteConfig<F>) -> Self {
        let nx_huge_pages = !config.nx_huge_pages();
        let other = SpteConfig::new(Capabilities { nx_huge_pages, ..*config.capabilities() });
        let [switched, hand_root, hand_gfn] = [const { AtomicU64::new(0) }; 3];
        Self { other, switched, hand_root, hand_gfn }
    }
}

/// A marked table as it was found.
struct Marked {
    /// First gfn, and the level of the link.
    gfn: Gfn,
    level: Level,
    frame: Pfn,
}

/// Where a search came to.
enum Search {
    Found(Marked),
    Pause(Cursor),
    End,
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// The configuration by which new leaves are made. To be asked after the root they go into was
    /// found valid, so that no root has leaves of an older choice than the roots before it.
    #[inline]
    pub(crate) fn making(&self) -> &SpteConfig<F> {
        // ORDERING[nx-switch]: Relaxed. Stored before roots become invalid: who still sees the old
        // choice finds its root invalid, or installs into a tree that is about to go.
        if self.nx().switched.load(Ordering::Relaxed) == 0 {
            return self.config();
        }
        self.nx().other.as_ref().unwrap_or(self.config())
    }

    /// Is the mitigation on? [`config`](Self::config) only knows how the MMU was made.
    #[must_use]
    pub fn nx_huge_pages(&self) -> NxHugePages {
        if self.making().nx_huge_pages() { NxHugePages::On } else { NxHugePages::Off }
    }

    /// Switch the mitigation (KVM row 3.32). All mappings are dropped, as by
    /// [`invalidate_roots`](Self::invalidate_roots), whose handle this returns: the choice is in
    /// force when its first [`step`](ZapAll::step) has returned. `None` when it was chosen
    /// already.
    ///
    /// # Errors
    /// [`ConfigError`] when the format cannot withhold execution with these capabilities; nothing
    /// changed.
    pub fn set_nx_huge_pages(
        &self,
        actor: &mut Actor<H>,
        choice: NxHugePages,
    ) -> Result<Option<ZapAll<'_, F, H>>, ConfigError> {
        let made_with = self.config().nx_huge_pages();
        let switched = u64::from(made_with != (choice == NxHugePages::On));
        if let (1, Err(error)) = (switched, &self.nx().other) {
            return Err(*error);
        }
        // ORDERING[nx-switch]: Relaxed. The roots' states, changed next, order it.
        let before = self.nx().switched.swap(switched, Ordering::Relaxed);
        Ok((before != switched).then(|| self.invalidate_roots(actor)))
    }

    /// Take some of the marked tables out, so that huge pages come back where nothing is executed
    /// any more: one `ratio`th of them, rounded up, going round the trees from one call to the next
    /// (KVM row 3.31). A `ratio` of 0 does nothing. The tables are flushed when this returns.
    ///
    /// For a timer of the embedder's; every minute with a ratio of 60 visits each table about once
    /// an hour. Faults on the block of a table that is being taken out retry meanwhile.
    #[doc(alias = "kvm_recover_nx_huge_pages")]
    pub fn recover_nx(&self, actor: &mut Actor<H>, ratio: u64) -> NxReport {
        self.assert_own(actor);
        let mut report = NxReport::default();
        let marked = self.vm().stats().get(Counter::NxSplits);
        let reach = self.roots().reach();
        if ratio == 0 || marked == 0 || reach == 0 {
            return report;
        }
        let wanted = marked.div_ceil(ratio);
        // ORDERING[nx-hand]: Relaxed. Any place to start is right.
        let first = to_index(self.nx().hand_root.load(Ordering::Relaxed)) % reach;
        // ORDERING[nx-hand]: Relaxed. As above.
        let from = Gfn::new(self.nx().hand_gfn.load(Ordering::Relaxed));
        // Every root once, and the beginning of the first again.
        for turn in 0..=reach {
            let index = (first + turn) % reach;
            let start = if turn == 0 { from } else { Gfn::new(0) };
            let end = if turn == reach { from } else { GfnRange::ALL.end };
            let mut cursor = Cursor::new(GfnRange::new(start, end), Level::L2);
            while report.recovered + report.unmarked < wanted {
                match self.find_marked(actor, index, cursor) {
                    Search::End => break,
                    Search::Pause(next) => cursor = next,
                    Search::Found(table) => {
                        cursor = cursor.moved_to(GfnRange::entry(table.gfn, table.level).end);
                        self.recover_table(actor, index, &table, &mut report);
                    }
                }
            }
            if report.recovered + report.unmarked >= wanted {
                // ORDERING[nx-hand]: Relaxed. A hint for the next call.
                self.nx().hand_root.store(to_u64(index), Ordering::Relaxed);
                // ORDERING[nx-hand]: Relaxed. As above.
                self.nx().hand_gfn.store(cursor.next().get(), Ordering::Relaxed);
                break;
            }
        }
        report
    }

    /// The next marked table in a root.
    fn find_marked(&self, actor: &mut Actor<H>, index: usize, cursor: Cursor) -> Search {
        let work = actor.pinned();
        let Some(root) = self.roots().get(index, RootFilter::Valid) else { return Search::End };
        let pool = work.vm.pool();
        let iter = TdpIter::resume(pool, &work.section, root.frame, root.role.level(), cursor)
            .with_encryption(self.config().encryption_mask());
        let mut visited = 0;
        for step in iter {
            if step.spte.is_table(step.level) {
                let frame = self.config().pfn(step.spte);
                // An entry that begins before the cursor was looked at when it came by.
                if pool.is_marked(frame) && step.gfn >= cursor.next() {
                    let (gfn, level) = (step.gfn, step.level);
                    return Search::Found(Marked { gfn, level, frame });
                }
            }
            visited += 1;
            work.stats.max(Counter::MaxSlice, to_u64(visited));
            if visited == SLICE_ENTRIES {
                // Back to the same entry if it is a link to tables: below it nothing was seen.
                let below = step.spte.is_table(step.level) && step.level > Level::L2;
                let next = if below { step.gfn } else { step.range().end };
                return Search::Pause(cursor.moved_to(next));
            }
        }
        Search::End
    }

    /// Take a marked table out, flush included, or only its mark.
    fn recover_table(
        &self,
        actor: &mut Actor<H>,
        index: usize,
        table: &Marked,
        report: &mut NxReport,
    ) {
        let pages = GfnRange::entry(table.gfn, table.level);
        if self.unmark_logged(actor, index, table) {
            report.unmarked += 1;
            return;
        }
        // Nobody may find the block empty and think that it is flushed: an unmap of it that comes
        // now sees this one in progress, and flushes itself (KVM rows B31, B70).
        let vm = self.vm();
        let invalidation = vm.invalidate(actor.participant(), pages);
        let mut debt = FlushDebt::new();
        let work = actor.shared();
        let gone = self.roots().get(index, RootFilter::Valid).and_then(|root| {
            let section = work.section.epoch();
            let change = self.change(work.vm, work.stats, section, root.role.space());
            let cell = self.still_linked(work.vm.pool(), section, root, table)?;
            unlink(&change, cell, table, &mut debt)
        });
        drop(work);
        let early = mmu_core::busted!("recover_ends_before_its_flush");
        let invalidation = Some(invalidation).filter(|_| !early);
        actor.pay(debt, FlushScope::Ranges);
        drop(invalidation);
        if let Some(gone) = gone {
            report.recovered += 1;
            report.zapped.merge(&gone);
            self.vm().trace(|| Event::NxRecovered { gfn: table.gfn, level: table.level });
        }
    }

    /// Pages that are logged stay small; their tables need not be looked at again. In the table's
    /// own address space (KVM row B32).
    fn unmark_logged(&self, actor: &mut Actor<H>, index: usize, table: &Marked) -> bool {
        let work = actor.pinned();
        let Some(root) = self.roots().get(index, RootFilter::Valid) else { return false };
        let slots = work.vm.slots().read(&work.section);
        let pages = GfnRange::entry(table.gfn, table.level);
        let logged = slots.overlapping(root.role.space(), pages).any(|slot| slot.logs_dirty());
        // The mark of this table, not that of one that came to its frame since.
        let here = || self.still_linked(work.vm.pool(), &work.section, root, table).is_some();
        logged && here() && forget(work.vm.pool(), work.stats, table.frame)
    }

    /// The entry that links this very table, if one still does (KVM row 3.38).
    fn still_linked<'g>(
        &self,
        pool: &'g TablePool<H>,
        section: &'g EpochGuard<'_>,
        root: FoundRoot,
        table: &Marked,
    ) -> Option<&'g SpteCell> {
        let (mut frame, mut level) = (root.frame, root.role.level());
        loop {
            let cell = pool.table(section, frame).cell(table.gfn, level);
            let link = cell.load();
            if !link.is_table(level) {
                return None;
            }
            let child = self.config().pfn(link);
            if level == table.level {
                // The frame may have come back as another table, which is not marked.
                return (child == table.frame && pool.is_marked(child)).then_some(cell);
            }
            (frame, level) = (child, level.below());
        }
    }
}

/// Empty the entry as long as it links the table; a CPU may set A in it meanwhile.
fn unlink<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    cell: &SpteCell,
    table: &Marked,
    debt: &mut FlushDebt,
) -> Option<ZapReport> {
    let mut old = cell.load();
    while old.is_table(table.level) && change.config.pfn(old) == table.frame {
        match change.set(cell, old, Spte::EMPTY, table.gfn, table.level) {
            Ok(()) => {
                let mut gone = ZapReport { tables: 1, ..ZapReport::default() };
                if !mmu_core::busted!("recover_without_flush") {
                    change.owe(debt, GfnRange::entry(table.gfn, table.level));
                }
                change.remove_table(table.frame, table.level.below(), debt, &mut gone);
                return Some(gone);
            }
            Err(now) => old = now,
        }
    }
    None
}

/// A table goes, or is no longer of interest: take its mark, if it has one. Was it marked?
pub(crate) fn forget<P: mmu_core::frame::PhysMap>(
    pool: &TablePool<P>,
    stats: &StatsShard,
    frame: Pfn,
) -> bool {
    let marked = pool.unmark(frame);
    if marked {
        stats.sub(Counter::NxSplits, 1);
    }
    marked
}
