//! Tables that somebody else keeps, and a tree of ours that mirrors them (KVM row 3.10).
//!
//! Owns [`ExternalTable`], what keeps the real tables (a security monitor of the processor, say),
//! and what an MMU made [`with_external`](TdpMmu::with_external) does instead of the usual: its
//! entries say what the external table holds, and no processor walks them.
//!
//! An entry is *claimed* by a compare-exchange to FROZEN, the external operation is made, and then
//! the entry becomes the new one, or the old one again if the operation failed. Who meets FROZEN
//! tries again. So an entry says present only while the external table holds the page, at most one
//! operation on an entry is under way, and a failure leaves both sides as they were.
//!
//! Locking: faults link and map under Shared. Pages are removed with nobody else inside, in
//! batches: under Exclusive claimed and blocked; outside, the flush of what was blocked, complete;
//! under Exclusive again removed. In between the claim keeps everybody off.
//!
//! What a mirror does not do: huge pages; aging (nothing is ever mapped, says the report), dirty
//! logging, write protection, change of a page. It is not dropped by a zap-all
//! ([`invalidate_roots`](TdpMmu::invalidate_roots) passes over it); [`destroy`](TdpMmu::destroy)
//! removes page by page and then table by table. An ordinary MMU pays one test in a fault that has
//! to walk.

use alloc::sync::Arc;
use core::fmt;

use arrayvec::ArrayVec;

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::dead::DeadReason;
use mmu_core::epoch::EpochGuard;
use mmu_core::fault::{EmulateReason, FaultError, FaultOutcome};
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::frame::MmuCache;
use mmu_core::paging::Paging;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::sync::relax;
use mmu_core::traits::Host;
use mmu_core::vm::{Actor, VmCore};

use crate::change::Change;
use crate::iter::{Cursor, TdpIter};
use crate::map::{MAX_LOST, Tools, put_back};
use crate::mmu::{TdpMmu, TdpOptions, WrongPaging};
use crate::resolve::Wish;
use crate::root::{FoundRoot, RootFilter, RootRef};
use crate::zap::ZapReport;

/// Pages, or tables, that are taken out between two flushes.
const BATCH: usize = 32;

/// Entries that one Exclusive section looks at.
const SLICE: usize = 512;

/// Which entry: of the tree of an address space, the one at `level` whose first gfn is `gfn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Address space.
    pub space: u16,
    /// First gfn that the entry maps.
    pub gfn: Gfn,
    /// Level of the entry; a table that it links is one lower.
    pub level: Level,
}

/// Why an external operation failed, in the words of the external table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExternalCode(pub u64);

/// The tables that a mirror mirrors.
///
/// Called with a section open: bounded work, no waiting, no call back into the MMU, no panic (the
/// entry would stay claimed). For one entry, one call at a time. `link` and `map` come from many
/// threads at once; `block`, `remove` and `free` from one, and nothing else with it. An operation
/// that fails has changed nothing.
#[doc(alias = "link_external_spt")]
pub trait ExternalTable: Send + Sync {
    /// Link an empty table at `at`, where nothing is. `table` names it until it is freed.
    ///
    /// # Errors
    /// The fault ends in [`FaultError::External`].
    fn link(&self, at: Place, table: Pfn) -> Result<(), ExternalCode>;

    /// Map `pfn` at `at`, where nothing is; the guest may do `access`.
    ///
    /// # Errors
    /// The fault ends in [`FaultError::External`].
    fn map(&self, at: Place, pfn: Pfn, access: Access) -> Result<(), ExternalCode>;

    /// Let no new translation of the page at `at` begin. A flush follows, then [`remove`]. A page
    /// whose removal failed is blocked again when that is repeated: it may be blocked already.
    ///
    /// # Errors
    /// The removal ends in [`RemoveError`].
    ///
    /// [`remove`]: Self::remove
    fn block(&self, at: Place) -> Result<(), ExternalCode>;

    /// Take `pfn` out, which is blocked, and which no processor has in its TLB any more.
    ///
    /// # Errors
    /// The removal ends in [`RemoveError`]; the page stays, blocked.
    fn remove(&self, at: Place, pfn: Pfn) -> Result<(), ExternalCode>;

    /// Unlink and forget the table at `at`, which is empty.
    ///
    /// # Errors
    /// The removal ends in [`RemoveError`]; the table stays.
    fn free(&self, at: Place, table: Pfn) -> Result<(), ExternalCode>;
}

/// The operation that failed in a removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoveStep {
    /// [`ExternalTable::block`]: the page is mapped as before.
    Block,
    /// [`ExternalTable::remove`]: the page is there on both sides, and blocked.
    Remove,
    /// [`ExternalTable::free`]: the table is there on both sides.
    Free,
}

/// A removal that did not come to its end. What went before is gone from both sides and stays so;
/// the rest is as it was. Pages of the same batch may be blocked: repeat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoveError {
    /// What was tried.
    pub step: RemoveStep,
    /// On which entry.
    pub at: Place,
    /// What the external table said.
    pub code: ExternalCode,
    /// What was removed before.
    pub removed: ZapReport,
}

impl fmt::Display for RemoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, at: Place { space, gfn, level }, code, removed } = self;
        write!(
            f,
            "{step:?} of the {level} entry for gfn {gfn} of address space {space} failed with \
             {:#x}, {} pages and {} tables after the first",
            code.0,
            removed.pages(),
            removed.tables
        )
    }
}

impl core::error::Error for RemoveError {}

type Failure = (RemoveStep, Place, ExternalCode);

/// A page that is claimed and blocked.
struct Blocked {
    at: Place,
    leaf: Spte,
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// An MMU that mirrors `external`: see the [module](crate::external). It maps 4 KiB pages only,
    /// whatever the options say.
    ///
    /// # Errors
    /// [`WrongPaging`] when the VM was made for shadow paging.
    pub fn with_external(
        vm: Arc<VmCore<H>>,
        config: mmu_core::spte::SpteConfig<F>,
        options: TdpOptions,
        external: Arc<dyn ExternalTable>,
    ) -> Result<Arc<Self>, WrongPaging> {
        if vm.paging() != Paging::Tdp {
            return Err(WrongPaging { paging: vm.paging() });
        }
        let options = TdpOptions { max_level: Level::L1, ..options };
        Ok(Arc::new(Self::make(vm, config, options, Some(external))))
    }

    /// As [`unmap`](Self::unmap) of a mirror, which marks the VM dead where this reports.
    ///
    /// # Errors
    /// [`RemoveError`] says how far it came.
    ///
    /// # Panics
    /// When the actor is another VM's.
    pub fn remove(&self, actor: &mut Actor<H>, range: GfnRange) -> Result<ZapReport, RemoveError> {
        self.assert_own(actor);
        let Some(external) = self.external() else { return Ok(self.unmap(actor, range)) };
        let invalidation = self.vm().invalidate(actor.participant(), range);
        let mut removed = ZapReport::default();
        let done = self.remove_pages(actor, external, range, &mut removed);
        drop(invalidation);
        finished(done, removed)
    }

    /// As [`destroy`](Self::destroy) of a mirror, which marks the VM dead where this reports. Pages
    /// first, then tables, lower ones before those that link them.
    ///
    /// # Errors
    /// [`RemoveError`] says how far it came; what is left can be destroyed by another call.
    ///
    /// # Panics
    /// When the actor is another VM's.
    pub fn try_destroy(&self, actor: &mut Actor<H>) -> Result<ZapReport, RemoveError> {
        self.assert_own(actor);
        let Some(external) = self.external() else { return Ok(self.destroy(actor)) };
        let invalidation = self.vm().invalidate(actor.participant(), GfnRange::ALL);
        let mut removed = ZapReport::default();
        let mut done = self.remove_pages(actor, external, GfnRange::ALL, &mut removed);
        for index in 0..self.roots().reach() {
            if done.is_ok() {
                done = self.free_tables(actor, external, index, &mut removed);
            }
        }
        drop(invalidation);
        let mut removed = finished(done, removed)?;
        // Nothing is left but roots.
        self.roots().invalidate(0..self.roots().reach());
        removed.merge(&self.invalidate_roots(actor).finish(actor));
        Ok(removed)
    }

    /// Remove the pages of `range`, inside an invalidation, or let the VM die: who takes a page
    /// away has been promised that nobody uses it.
    #[cold]
    pub(crate) fn remove_or_die(
        &self,
        actor: &mut Actor<H>,
        external: &dyn ExternalTable,
        range: GfnRange,
    ) -> ZapReport {
        let mut removed = ZapReport::default();
        if self.remove_pages(actor, external, range, &mut removed).is_err() {
            self.vm().mark_dead(DeadReason::ExternalTable);
        }
        removed
    }

    fn remove_pages(
        &self,
        actor: &mut Actor<H>,
        external: &dyn ExternalTable,
        range: GfnRange,
        removed: &mut ZapReport,
    ) -> Result<(), Failure> {
        for index in 0..self.roots().reach() {
            let mut cursor = Cursor::new(range, Level::L1);
            while !cursor.is_done() {
                let (root, batch, blocked) = self.block_slice(actor, external, index, &mut cursor);
                let Some(root) = root else { break };
                if batch.is_empty() {
                    blocked?;
                    // Another remover's page, maybe.
                    relax();
                    continue;
                }
                self.remove_batch(actor, external, root, &batch, removed)?;
                blocked?;
            }
        }
        Ok(())
    }

    /// Claim and block the next pages, then flush them. Which, and what stopped it early. `cursor`
    /// is where to go on.
    fn block_slice(
        &self,
        actor: &mut Actor<H>,
        external: &dyn ExternalTable,
        index: usize,
        cursor: &mut Cursor,
    ) -> (Option<FoundRoot>, ArrayVec<Blocked, BATCH>, Result<(), Failure>) {
        let mut batch = ArrayVec::new();
        let mut debt = FlushDebt::new();
        let stats = self.shard(actor);
        let work = actor.exclusive();
        let Some(root) = self.roots().get(index, RootFilter::InUse) else {
            return (None, batch, Ok(()));
        };
        let space = root.role.space();
        let section = work.section.epoch();
        let change = self.change(work.vm, stats, section, space);
        let (frame, level) = (root.frame, root.role.level());
        let start = *cursor;
        *cursor = start.moved_to(start.end());
        let mut blocked = Ok(());
        let iter = TdpIter::resume(change.pool(), section, frame, level, start)
            .with_encryption(self.config().encryption_mask());
        for (visited, step) in iter.enumerate() {
            if visited == SLICE || batch.is_full() || step.spte.is_frozen() {
                *cursor = start.moved_to(step.gfn);
                break;
            }
            let at = Place { space, gfn: step.gfn, level: step.level };
            if !step.spte.is_leaf(step.level) || change.claim(step.cell, step.spte).is_err() {
                continue;
            }
            match external.block(at) {
                Ok(()) => {
                    if !mmu_core::busted!("mirror_removes_before_flush") {
                        change.owe(&mut debt, step.range());
                    }
                    let _ = batch.try_push(Blocked { at, leaf: step.spte });
                }
                Err(code) => {
                    change.release(step.cell, step.spte, step.spte, at.gfn, at.level);
                    blocked = Err((RemoveStep::Block, at, code));
                    break;
                }
            }
        }
        drop(work);
        // A processor may still use what it cached before the page was blocked.
        actor.pay(debt, FlushScope::Ranges);
        (Some(root), batch, blocked)
    }

    /// Take blocked and flushed pages out. After a failure the rest become what they were.
    fn remove_batch(
        &self,
        actor: &mut Actor<H>,
        external: &dyn ExternalTable,
        root: FoundRoot,
        batch: &[Blocked],
        removed: &mut ZapReport,
    ) -> Result<(), Failure> {
        let stats = self.shard(actor);
        let work = actor.exclusive();
        let section = work.section.epoch();
        let change = self.change(work.vm, stats, section, root.role.space());
        let mut done = Ok(());
        for Blocked { at, leaf } in batch {
            let cell = claimed(&change, section, root, *at);
            if done.is_ok() {
                let removal = external.remove(*at, self.config().pfn(*leaf));
                done = removal.map_err(|code| (RemoveStep::Remove, *at, code));
            }
            let now = if done.is_ok() { Spte::EMPTY } else { *leaf };
            change.release(cell, *leaf, now, at.gfn, at.level);
            if done.is_ok() {
                stats.inc(Counter::LeavesZapped);
                removed.add_leaf(self.config(), *leaf, at.level);
            }
        }
        done
    }

    /// Free every table below a root that maps nothing.
    fn free_tables(
        &self,
        actor: &mut Actor<H>,
        external: &dyn ExternalTable,
        index: usize,
        removed: &mut ZapReport,
    ) -> Result<(), Failure> {
        loop {
            let before = removed.tables;
            let mut debt = FlushDebt::new();
            let stats = self.shard(actor);
            let work = actor.exclusive();
            let Some(root) = self.roots().get(index, RootFilter::InUse) else { return Ok(()) };
            let section = work.section.epoch();
            let change = self.change(work.vm, stats, section, root.role.space());
            let done = free_some(&change, external, root, section, &mut debt, removed);
            drop(work);
            actor.pay(debt, FlushScope::Ranges);
            done?;
            if removed.tables == before {
                return Ok(());
            }
        }
    }

    fn shard(&self, actor: &mut Actor<H>) -> &StatsShard {
        self.vm().stats().shard(actor.participant().index())
    }

    /// The second half of a fault: walk down, linking, and map the page, in the external table
    /// first.
    #[cold]
    pub(crate) fn install_in_mirror(
        &self,
        tools: Tools<'_, H>,
        external: &dyn ExternalTable,
        root: &RootRef,
        fault: &Wish,
    ) -> Result<FaultOutcome, FaultError> {
        let Tools { section, cache, vm, stats } = tools;
        let space = root.role.space();
        let change = self.change(vm, stats, section.epoch(), space);
        let config = self.config();
        let (mut frame, mut level) = (root.frame, root.role.level());
        let mut lost = 0;
        // Ends: each turn goes down a level or counts a loss.
        while lost <= MAX_LOST {
            let cell = change.pool().table(section.epoch(), frame).cell(fault.gfn, level);
            let old = cell.load();
            if old.is_table(level) {
                (frame, level) = (config.pfn(old), level.below());
                continue;
            }
            if old.is_frozen() {
                return Ok(FaultOutcome::Retry);
            }
            if old.is_leaf(level) {
                return self.found_in_mirror(old, fault);
            }
            let at = Place { space, gfn: fault.gfn.align_down(level), level };
            let done = if level > Level::L1 {
                link(&change, cache, external, cell, old, at)
            } else {
                let leaf = config.writable_again(config.restore(fault.leaf));
                let (pfn, access) = (config.pfn(leaf), config.access(leaf));
                claimed_change(&change, cell, old, leaf, at, || external.map(at, pfn, access))
            };
            match done {
                Ok(true) if level == Level::L1 => return Ok(FaultOutcome::Fixed),
                Ok(true) => {}
                Ok(false) => lost += 1,
                Err(ExternalCode(code)) => {
                    return Err(FaultError::External { gfn: at.gfn, level, code });
                }
            }
        }
        Ok(FaultOutcome::Retry)
    }

    /// The page is mapped. What a mirror has may not change but by a removal: who gives the guest
    /// another page, or more rights, invalidates the gfn.
    fn found_in_mirror(&self, old: Spte, fault: &Wish) -> Result<FaultOutcome, FaultError> {
        let config = self.config();
        let (gfn, mapped, resolved) = (fault.gfn, config.pfn(old), config.pfn(fault.leaf));
        if fault.prefetch || config.permits(old, fault.access) {
            Ok(FaultOutcome::Spurious)
        } else if mapped != resolved {
            Err(FaultError::StaleMapping { gfn, mapped, resolved })
        } else {
            Ok(FaultOutcome::Emulate(EmulateReason::Denied { gfn }))
        }
    }
}

fn finished(done: Result<(), Failure>, removed: ZapReport) -> Result<ZapReport, RemoveError> {
    match done {
        Ok(()) => Ok(removed),
        Err((step, at, code)) => Err(RemoveError { step, at, code, removed }),
    }
}

/// Change the entry from `old` to `new` around an external operation. `Ok(false)` when somebody
/// else changed the entry first: then nothing was done.
fn claimed_change<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    cell: &SpteCell,
    old: Spte,
    new: Spte,
    at: Place,
    operation: impl FnOnce() -> Result<(), ExternalCode>,
) -> Result<bool, ExternalCode> {
    if change.claim(cell, old).is_err() {
        return Ok(false);
    }
    let done = operation();
    let now = if done.is_ok() { new } else { old };
    change.release(cell, old, now, at.gfn, at.level);
    done.map(|()| true)
}

/// Link an empty table; its frame goes back if that is not to be.
fn link<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    cache: &mut MmuCache,
    external: &dyn ExternalTable,
    cell: &SpteCell,
    old: Spte,
    at: Place,
) -> Result<bool, ExternalCode> {
    // top_up provided one for every level.
    let Some(frame) = cache.take() else { return Ok(false) };
    change.pool().set_place(frame, at.gfn, at.level.below());
    let new = change.config.table(frame, at.level);
    let done = claimed_change(change, cell, old, new, at, || external.link(at, frame));
    if done != Ok(true) {
        put_back(change.pool(), cache, frame);
    }
    done
}

/// The entry that we claimed: it is there until we release it.
fn claimed<'g, F: SpteFormat, H: Host>(
    change: &Change<'g, F, H>,
    section: &'g EpochGuard<'_>,
    root: FoundRoot,
    at: Place,
) -> &'g SpteCell {
    let (mut frame, mut level) = (root.frame, root.role.level());
    loop {
        let cell = change.pool().table(section, frame).cell(at.gfn, level);
        let spte = cell.load();
        if level <= at.level || !spte.is_table(level) {
            debug_assert!(spte.is_frozen(), "a claimed entry was changed (I4): {spte:?}");
            return cell;
        }
        (frame, level) = (change.config.pfn(spte), level.below());
    }
}

/// Free at most [`BATCH`] empty tables, each after those below it.
fn free_some<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    external: &dyn ExternalTable,
    root: FoundRoot,
    section: &EpochGuard<'_>,
    debt: &mut FlushDebt,
    removed: &mut ZapReport,
) -> Result<(), Failure> {
    let pool = change.pool();
    let most = removed.tables + mmu_core::addr::to_u64(BATCH);
    // The tables on the way down, each with the next entry to look at.
    let mut stack: ArrayVec<(Pfn, Level, usize), 5> = ArrayVec::new();
    stack.push((root.frame, root.role.level(), 0));
    while let Some((frame, level, index)) = stack.pop() {
        let table = pool.table(section, frame);
        if let Some(cell) = table.entries().get(index) {
            stack.push((frame, level, index + 1));
            let spte = cell.load();
            if spte.is_table(level) {
                stack.push((change.config.pfn(spte), level.below(), 0));
            }
            continue;
        }
        // The root itself is not linked by anything.
        let Some(&(parent, above, next)) = stack.last() else { break };
        let entries = pool.table(section, parent).entries();
        let Some(cell) = next.checked_sub(1).and_then(|index| entries.get(index)) else { break };
        let old = cell.load();
        let empty = table.entries().iter().all(|cell| cell.load().is_empty());
        if !empty || change.claim(cell, old).is_err() {
            continue;
        }
        let at = Place { space: change.space, gfn: pool.place(frame).0, level: above };
        let at = Place { gfn: at.gfn.align_down(above), ..at };
        if let Err(code) = external.free(at, frame) {
            change.release(cell, old, old, at.gfn, above);
            return Err((RemoveStep::Free, at, code));
        }
        change.release(cell, old, Spte::EMPTY, at.gfn, above);
        pool.note_unlinked();
        if !mmu_core::busted!("mirror_frees_without_flush") {
            change.owe(debt, GfnRange::from_len(at.gfn, above.pages()));
        }
        debt.owe_table(pool.map(), frame);
        removed.tables += 1;
        if removed.tables == most {
            break;
        }
    }
    Ok(())
}
