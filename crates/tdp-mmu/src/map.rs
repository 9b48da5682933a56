//! Faults: from an exit to an entry.
//!
//! Owns [`TdpVcpu::fault`] and [`TdpVcpu::prefault`]. Phases (KVM rows 3.15 to 3.22): check
//! arguments -> fast path (`fast`) -> take memory -> note slot and invalidation sequence -> resolve
//! the page with nothing held -> Shared section: stale? -> walk down, linking and splitting ->
//! install.
//!
//! The resolver reports the host's page size together with the page, so the invalidation sequence
//! covers both; KVM has to look the size up again under its lock.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Gpa, Level, Pfn};
use mmu_core::epoch::EpochGuard;
use mmu_core::fault::{EmulateReason, FaultError, FaultOutcome, PageFault};
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::frame::cache::FRAMES_PER_FAULT;
use mmu_core::frame::{MmuCache, TablePool};
use mmu_core::lock::Shared;
use mmu_core::notify::Snapshot;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::traits::{Host, HostPage};
use mmu_core::vm::{SharedWork, VmCore};

use crate::change::Change;
use crate::dirty::DirtyTracking;
use crate::fast::FastPath;
use crate::mmu::TdpMmu;
use crate::recent::Recent;
use crate::resolve::{Given, Resolved, Wish};
use crate::root::{FoundRoot, RootRef};
use crate::vcpu::TdpVcpu;

/// Compare-exchanges that one fault may lose before it gives up its section and lets the vCPU try
/// again. Each loss means that somebody else made progress on the same entry.
pub(crate) const MAX_LOST: u32 = 8;

/// Times that [`TdpVcpu::prefault`] tries a page again while it is being taken away.
pub const PREFAULT_RETRIES: u32 = 64;

/// What a walk that installs works with.
pub(crate) struct Tools<'a, H: Host> {
    pub(crate) section: &'a Shared<'a>,
    pub(crate) cache: &'a mut MmuCache,
    pub(crate) vm: &'a VmCore<H>,
    pub(crate) stats: &'a StatsShard,
}

/// How far a prefault came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Prefault {
    /// The first gfn that was not mapped; the range's end when all were.
    pub next: Gfn,
    /// What the last page tried came to: [`FaultOutcome::Retry`] asks to call again (after loading
    /// the root, if it is not current), [`FaultOutcome::Emulate`] says why `next` cannot be mapped.
    pub outcome: FaultOutcome,
}

impl<F: SpteFormat, H: Host> TdpVcpu<F, H> {
    /// Handle a fault on a guest physical address.
    ///
    /// Bounded work, no allocation under a section, no lock shared with faults elsewhere. The
    /// resolver may sleep.
    ///
    /// # Errors
    /// [`FaultError`]; no entry was changed.
    pub fn fault(&mut self, fault: &PageFault) -> Result<FaultOutcome, FaultError> {
        if H::ENABLED {
            return self.fault_watched(fault);
        }
        self.fault_counted(fault)
    }

    #[inline(always)]
    pub(crate) fn fault_counted(&mut self, fault: &PageFault) -> Result<FaultOutcome, FaultError> {
        let mut counted = false;
        let result = self.handle(fault, &mut counted);
        if !counted {
            count(self.actor.stats(), &result);
        }
        result
    }

    /// Map pages before the guest touches them (KVM row 3.57), without the accessed bit, from
    /// `range.start` on, until one cannot be mapped.
    ///
    /// Bounded: a page that asks to be tried again [`PREFAULT_RETRIES`] times ends the call.
    ///
    /// # Errors
    /// As [`fault`](Self::fault), if nothing was mapped; later errors end the call with the
    /// progress made, and come back when it is repeated from there.
    pub fn prefault(&mut self, range: GfnRange, access: Access) -> Result<Prefault, FaultError> {
        let mut done = Prefault { next: range.start, outcome: FaultOutcome::Spurious };
        let mut retries = 0;
        while done.next < range.end {
            let result = if done.next < GfnRange::ALL.end {
                self.fault(&PageFault::prefetch(done.next.address(), access))
            } else {
                // The address does not fit in 64 bits; it must not become a low one.
                let max_gfn = self.mmu.config().max_gfn_exclusive();
                Err(FaultError::BeyondPhysical { gpa: Gpa::new(u64::MAX), max_gfn })
            };
            match result {
                Ok(outcome) => done.outcome = outcome,
                Err(error) if done.next == range.start => return Err(error),
                Err(_) => break,
            }
            match done.outcome {
                FaultOutcome::Fixed | FaultOutcome::Spurious => {
                    done.next = done.next.saturating_add(1);
                    retries = 0;
                }
                FaultOutcome::Retry if retries < PREFAULT_RETRIES && self.root_is_current() => {
                    retries += 1;
                    mmu_core::sync::relax();
                }
                _ => break,
            }
        }
        Ok(done)
    }

    /// Map a page that the caller has at hand instead of the resolver's answer (KVM row 3.58): to
    /// fill a guest's memory before it runs, or where the page's owner holds it while it is mapped.
    /// Everything else is as for [`fault`](Self::fault) with the same `fault`; make it a prefetch
    /// for an entry without the accessed bit.
    ///
    /// `before` was taken ([`Invalidations::snapshot`](mmu_core::notify::Invalidations::snapshot))
    /// before the caller learned of the page: if an invalidation began since, the page may be
    /// another's by now, and the answer is `Retry`.
    ///
    /// # Errors
    /// As [`fault`](Self::fault).
    #[doc(alias = "kvm_tdp_mmu_map_private_pfn")]
    pub fn install_page(
        &mut self,
        fault: &PageFault,
        page: HostPage,
        before: Snapshot,
    ) -> Result<FaultOutcome, FaultError> {
        let mut counted = false;
        let result = match self.checked(fault) {
            Ok(true) => self.slow(fault, Some(Given { page, before }), &mut counted),
            Ok(false) => Ok(FaultOutcome::Retry),
            Err(error) => Err(error),
        };
        if !counted {
            count(self.actor.stats(), &result);
        }
        result
    }

    /// Are the arguments sound, and is the root current?
    #[inline(always)]
    fn checked(&self, fault: &PageFault) -> Result<bool, FaultError> {
        let max_gfn = self.mmu.config().max_gfn_exclusive();
        if fault.gfn() >= max_gfn {
            return Err(FaultError::BeyondPhysical { gpa: fault.gpa, max_gfn });
        }
        if !fault.max_level.may_be_leaf() {
            return Err(FaultError::NotALeafLevel { level: fault.max_level });
        }
        let Some(root) = &self.root else { return Err(FaultError::NoRoot) };
        Ok(self.mmu.roots().is_valid(root))
    }

    // Inlined, like its parts below: the whole of a fault is two barriers and some hundred plain
    // instructions, and what calls would save and restore is a good part of those.
    #[inline(always)]
    fn handle(
        &mut self,
        fault: &PageFault,
        counted: &mut bool,
    ) -> Result<FaultOutcome, FaultError> {
        if !self.checked(fault)? {
            return Ok(FaultOutcome::Retry);
        }
        let Some(root) = &self.root else { return Err(FaultError::NoRoot) };
        if self.mmu.may_be_fast(fault) {
            // Fixed and spurious faults are counted where they are found.
            match self.mmu.fast_fault(&mut self.actor, &mut self.recent, root, fault) {
                FastPath::Fixed => {
                    *counted = true;
                    return Ok(FaultOutcome::Fixed);
                }
                FastPath::Spurious => {
                    *counted = true;
                    return Ok(FaultOutcome::Spurious);
                }
                FastPath::Slow => {}
                FastPath::Reserved => {
                    if let Some(outcome) = self.reserved_fault(fault)? {
                        return Ok(outcome);
                    }
                }
            }
        }
        self.slow(fault, None, counted)
    }

    /// The slow path: resolve the page, unless it was `given`, and install it.
    #[inline(always)]
    fn slow(
        &mut self,
        fault: &PageFault,
        given: Option<Given>,
        counted: &mut bool,
    ) -> Result<FaultOutcome, FaultError> {
        if let Some(reason) = self.actor.vm().is_dead() {
            return Err(FaultError::Dead { reason });
        }
        self.actor.top_up(FRAMES_PER_FAULT)?;
        let resolved = match self.resolve(fault, given) {
            Ok(resolved) => resolved,
            Err(stop) => return self.stopped(stop, fault),
        };
        let Some(root) = &self.root else { return Err(FaultError::NoRoot) };
        // Only a leaf that takes a table's place owes a flush.
        let mut debt = None;
        let outcome = {
            let work = self.actor.shared();
            self.mmu.install(work, &mut self.recent, root, resolved, &mut debt, counted)
        };
        if let Some(debt) = debt.filter(|_| !mmu_core::busted!("fault_forgets_to_pay")) {
            self.actor.pay(debt, FlushScope::Ranges);
        }
        outcome
    }
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Install the page, if nothing happened meanwhile: in the table of the last fault when it has
    /// the entry, else by a walk.
    #[inline(always)]
    fn install(
        &self,
        work: SharedWork<'_, H>,
        recent: &mut Recent,
        root: &RootRef,
        resolved: Resolved,
        debt: &mut Option<FlushDebt>,
        counted: &mut bool,
    ) -> Result<FaultOutcome, FaultError> {
        let Resolved { generation, snapshot, wish: fault } = resolved;
        // Taken apart, so that only the section is in memory and not all that comes with it.
        let SharedWork { section, cache, vm, stats, slot } = work;
        // The authoritative checks: what invalidates from here on waits for this section.
        if !self.roots().is_valid(root) && !mmu_core::busted!("skip_root_recheck") {
            return Ok(FaultOutcome::Retry);
        }
        let current = vm.slots().generation() == generation;
        if !(current || mmu_core::busted!("install_skips_generation"))
            || vm.notify().must_retry(&section, snapshot, fault.pages())
        {
            return Ok(FaultOutcome::Retry);
        }
        let unlinked = vm.pool().unlinked();
        let change = self.change(vm, stats, section.epoch(), root.role.space());
        // Twice, so that for the usual level what depends on it is a constant.
        let done = if fault.goal == Level::L1 {
            install_near(&change, recent, unlinked, &fault, Level::L1)
        } else {
            install_near(&change, recent, unlinked, &fault, fault.goal)
        };
        match done {
            // The usual ends are counted here, where the outcome is still a constant.
            Near::Fixed => {
                if fault.mark {
                    self.mark_write(slot.as_ref(), vm.ring_of(section.epoch()), stats, fault.gfn);
                }
                *counted = true;
                stats.inc(Counter::PfTaken);
                stats.inc(Counter::PfFixed);
                return Ok(FaultOutcome::Fixed);
            }
            Near::Spurious => {
                *counted = true;
                stats.inc(Counter::PfTaken);
                stats.inc(Counter::PfSpurious);
                return Ok(FaultOutcome::Spurious);
            }
            // Rare enough to look at from the root.
            Near::Walk => {}
        }
        // Put together here, so that the usual fault keeps it in registers.
        let Wish { gfn, access, prefetch, goal, nx_wanted, leaf, mark } = fault;
        let fault = Wish { gfn, access, prefetch, goal, nx_wanted, leaf, mark };
        let tools = Tools { section: &section, cache, vm, stats };
        let outcome = self.install_by_walk(tools, recent, unlinked, root, &fault, debt);
        if mark && outcome == Ok(FaultOutcome::Fixed) {
            self.mark_write(slot.as_ref(), vm.ring_of(section.epoch()), stats, gfn);
        }
        outcome
    }

    /// Walk from the root to the goal and install the page.
    #[inline(never)]
    fn install_by_walk(
        &self,
        tools: Tools<'_, H>,
        recent: &mut Recent,
        unlinked: u64,
        root: &RootRef,
        fault: &Wish,
        debt: &mut Option<FlushDebt>,
    ) -> Result<FaultOutcome, FaultError> {
        if let Some(external) = self.external() {
            return self.install_in_mirror(tools, external, root, fault);
        }
        let Tools { section, cache, vm, stats } = tools;
        let change = self.change(vm, stats, section.epoch(), root.role.space());
        let change = Change { nx_wanted: fault.nx_wanted, ..change };
        let pool = vm.pool();
        let epoch = section.epoch();
        let (mut frame, mut level) = (root.frame, root.role.level());
        let (mut fault, mut lost) = (*fault, 0);
        loop {
            let (cell, old);
            (frame, level, cell, old) = self.descend(pool, epoch, frame, level, &fault);
            if old.is_frozen() {
                return Ok(FaultOutcome::Retry);
            }
            if level == fault.goal
                && old.is_table(level)
                && self.keeps_table(pool, epoch, old, level)
            {
                fault = fault.one_lower(self.making());
                continue;
            }
            if level == fault.goal {
                recent.note(fault.gfn, (frame, level), unlinked);
            }
            if level > fault.goal {
                if let Some(child) = self.grow(&change, cache, cell, old, fault.gfn, level) {
                    (frame, level) = (child, level.below());
                    continue;
                }
            } else if !old.is_mmu_present() {
                if change.map(cell, old, fault.leaf, fault.gfn, level) {
                    return Ok(FaultOutcome::Fixed);
                }
            } else if old.is_leaf(level)
                && (fault.prefetch || change.config.permits(old, fault.access))
            {
                return Ok(FaultOutcome::Spurious);
            } else {
                let root = FoundRoot { frame: root.frame, role: root.role };
                let done = self.change_leaf(&change, root, cell, old, &fault, debt);
                if let Some(result) = done {
                    return result;
                }
            }
            if lost == MAX_LOST {
                return Ok(FaultOutcome::Retry);
            }
            lost += 1;
        }
    }

    /// Follow links from the table in `frame` until the goal or an entry that is no link.
    #[inline(always)]
    fn descend<'g>(
        &self,
        pool: &'g TablePool<H>,
        epoch: &'g EpochGuard<'_>,
        mut frame: Pfn,
        mut level: Level,
        fault: &Wish,
    ) -> (Pfn, Level, &'g SpteCell, Spte) {
        loop {
            let cell = pool.table(epoch, frame).cell(fault.gfn, level);
            let old = cell.load();
            if level <= fault.goal || !old.is_table(level) {
                return (frame, level, cell, old);
            }
            frame = self.config().pfn(old);
            level = level.below();
        }
    }

    /// A table where there is none yet: split the leaf that is there, or link an empty one.
    /// `None` when the race was lost.
    #[inline(never)]
    fn grow(
        &self,
        change: &Change<'_, F, H>,
        cache: &mut MmuCache,
        cell: &SpteCell,
        old: Spte,
        gfn: Gfn,
        level: Level,
    ) -> Option<Pfn> {
        if old.is_mmu_present() {
            self.split_leaf(change, cache, cell, old, gfn, level)
        } else {
            self.link_table(change, cache, cell, old, gfn, level)
        }
    }

    /// Link an empty table under an entry that has none. `None` when the race was lost.
    pub(crate) fn link_table(
        &self,
        change: &Change<'_, F, H>,
        cache: &mut MmuCache,
        cell: &SpteCell,
        old: Spte,
        gfn: Gfn,
        level: Level,
    ) -> Option<Pfn> {
        // top_up provided one for every level.
        let frame = cache.take()?;
        if change.link(cell, old, frame, gfn, level).is_err() {
            put_back(change.pool(), cache, frame);
            return None;
        }
        Some(frame)
    }

    /// The entry at the goal level is there already: a leaf that allows less than the access needs,
    /// or a table that gives way to a huge leaf (KVM row 3.20). `None` when the race was lost.
    #[inline(never)]
    fn change_leaf(
        &self,
        change: &Change<'_, F, H>,
        root: FoundRoot,
        cell: &SpteCell,
        old: Spte,
        fault: &Wish,
        debt: &mut Option<FlushDebt>,
    ) -> Option<Result<FaultOutcome, FaultError>> {
        let config = self.config();
        let (level, mut new) = (fault.goal, fault.leaf);
        if old.is_table(level) && config.is_mmu_writable(new) {
            // Pages below may have been written, and a prefaulted leaf need not say so. Before the
            // exchange: who splits the leaf right after it takes over what it says.
            new = new.with(F::DIRTY);
        }
        if old.is_leaf(level) {
            let (mapped, resolved) = (config.pfn(old), config.pfn(new));
            if mapped != resolved {
                let gfn = fault.gfn;
                return Some(Err(FaultError::StaleMapping { gfn, mapped, resolved }));
            }
            if new == old || !config.permits(new, fault.access) {
                // What this gfn may be given is there, and the access needs more.
                let reason = EmulateReason::Denied { gfn: fault.gfn };
                return Some(Ok(FaultOutcome::Emulate(reason)));
            }
            if config.is_host_writable(old) != config.is_host_writable(new)
                || !config.same_memory(old, new)
            {
                return self.remake_leaf(change, cell, old, fault, debt);
            }
            // What the guest was allowed to write, and did, stays.
            new = config.keep_writes(old, new);
        }
        if change.set(cell, old, new, fault.gfn, level).is_err() {
            return None;
        }
        if old.is_table(level) {
            // In the same section, see `collapse`.
            let debt = debt.get_or_insert_default();
            self.replace_table(change, root, (old, new), fault.gfn, level, debt);
        }
        Some(Ok(FaultOutcome::Fixed))
    }

    /// The host made its page writable where it is, or calls it another kind of memory. The bits
    /// that say so are immutable while the entry is present (row 1.8), so it is emptied first.
    /// Nobody finds it empty with the flush unpaid: either the new leaf stands there when this
    /// returns, or somebody else's.
    #[cold]
    fn remake_leaf(
        &self,
        change: &Change<'_, F, H>,
        cell: &SpteCell,
        old: Spte,
        wish: &Wish,
        debt: &mut Option<FlushDebt>,
    ) -> Option<Result<FaultOutcome, FaultError>> {
        let first = wish.gfn.align_down(wish.goal);
        let gone = change.zap_leaf(cell, old, first, wish.goal, debt.get_or_insert_default())?;
        let mut leaf = wish.leaf;
        let told = change.tracking != DirtyTracking::HardwareLog;
        if told && change.config.is_dirty(gone) && change.config.is_mmu_writable(leaf) {
            // The same page, and it was written (INVARIANT[I8]). A CPU that logs would be silent
            // about a page that is dirty from the start.
            leaf = leaf.with(F::DIRTY);
        }
        let outcome = match change.set(cell, Spte::EMPTY, leaf, wish.gfn, wish.goal) {
            Ok(()) => FaultOutcome::Fixed,
            Err(_) => FaultOutcome::Retry,
        };
        Some(Ok(outcome))
    }
}

/// What came of a look at the table of the last fault.
enum Near {
    Fixed,
    Spurious,
    Walk,
}

/// Install the page in the table of the last fault, if that has the entry and maps nothing there.
/// `level` is the goal.
#[inline(always)]
fn install_near<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    recent: &Recent,
    unlinked: u64,
    fault: &Wish,
    level: Level,
) -> Near {
    let Some(frame) = recent.table_at(fault.gfn, level, unlinked) else { return Near::Walk };
    let cell = change.pool().table(change.section, frame).cell(fault.gfn, level);
    let old = cell.load();
    if old.is_leaf(level) {
        let enough = fault.prefetch || change.config.permits(old, fault.access);
        return if enough { Near::Spurious } else { Near::Walk };
    }
    let free = !old.is_mmu_present() && !old.is_frozen();
    let done = free && change.map(cell, old, fault.leaf, fault.gfn, level);
    if done { Near::Fixed } else { Near::Walk }
}

/// A frame that lost its race goes back where it came from (INVARIANT[I22]).
pub(crate) fn put_back<P: mmu_core::frame::PhysMap>(
    pool: &mmu_core::frame::TablePool<P>,
    cache: &mut MmuCache,
    frame: mmu_core::addr::Pfn,
) {
    if let Some(frame) = cache.put(frame) {
        let mut list = mmu_core::frame::FrameList::new();
        list.push(pool.map(), frame);
        pool.give_back(list);
    }
}

/// Count a fault by what came of it.
#[inline(never)]
fn count(stats: &StatsShard, result: &Result<FaultOutcome, FaultError>) {
    stats.inc(Counter::PfTaken);
    stats.inc(match result {
        Ok(FaultOutcome::Fixed) => Counter::PfFixed,
        Ok(FaultOutcome::Spurious) => Counter::PfSpurious,
        Ok(FaultOutcome::Retry) => Counter::PfRetry,
        Ok(FaultOutcome::Emulate(_)) => Counter::PfEmulate,
        Ok(FaultOutcome::RingFull) => Counter::PfRingFull,
        Ok(FaultOutcome::WriteProtected) => Counter::PfWriteProtected,
        Err(_) => Counter::PfError,
    });
}
