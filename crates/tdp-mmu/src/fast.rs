//! Faults fixed without a lock: restore an access-tracked entry, give W back (KVM row 3.21).
//!
//! Runs in an epoch section only and needs no memory, so an exhausted pool cannot fail it. Direct
//! MMUs only: the gfn of an entry is its place, so a value that comes back (ABA) means the same.

use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::Level;
use mmu_core::dead::DeadReason;
use mmu_core::dirty::DirtyRing;
use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Spte, SpteConfig, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::trace::Event;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::limits;
use crate::mmu::TdpMmu;
use crate::recent::Recent;
use crate::root::RootRef;

/// Compare-exchanges tried before the slow path takes over.
const MAX_TRIES: u32 = 4;

/// What the fast path made of a fault.
pub(crate) enum FastPath {
    /// Done.
    Outcome(FaultOutcome),
    /// Not its business, or races lost: go the slow way.
    Slow,
}

/// Could the fast path fix it? Not-present faults are worth a look only where entries are
/// access-tracked by taking their permissions away.
#[inline]
fn can_be_fast<F: SpteFormat>(config: &SpteConfig<F>, fault: &PageFault) -> bool {
    if fault.prefetch {
        return false;
    }
    if fault.code.contains(PfErrorCode::PRESENT) {
        fault.code.contains(PfErrorCode::WRITE) || !config.ad_enabled()
    } else {
        !config.ad_enabled()
    }
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Is the fault for [`fast_fault`](Self::fast_fault) at all?
    #[inline(always)]
    pub(crate) fn may_be_fast(&self, fault: &PageFault) -> bool {
        fault.code.contains(PfErrorCode::RESERVED) || can_be_fast(self.config(), fault)
    }

    /// Fix the fault without a lock, if that can be done.
    #[inline(never)]
    pub(crate) fn fast_fault(
        &self,
        actor: &mut Actor<H>,
        recent: &mut Recent,
        root: &RootRef,
        fault: &PageFault,
    ) -> Result<FastPath, FaultError> {
        if fault.code.contains(PfErrorCode::RESERVED) {
            return self.reserved_fault(actor, root, fault);
        }
        Ok(self.try_fast(actor, recent, root, fault))
    }

    #[inline(always)]
    fn try_fast(
        &self,
        actor: &mut Actor<H>,
        recent: &mut Recent,
        root: &RootRef,
        fault: &PageFault,
    ) -> FastPath {
        let space = root.role.space();
        // Before the section: the copy is validated inside by its generation.
        if !actor.keep_slot(space, fault.gfn()) {
            return FastPath::Slow;
        }
        let work = actor.pinned();
        let Some(kept) = work.slot else { return FastPath::Slow };
        let flags = kept.slot().flags;
        let config = self.config();
        if !self.roots().is_valid(root) || work.vm.slots().generation() != kept.generation() {
            return FastPath::Slow;
        }
        if flags.contains(SlotFlags::INVALID) {
            return FastPath::Slow;
        }
        if !limits::is_plain(work.vm, fault) && limits::differs(work.vm, &work.section, fault) {
            return FastPath::Slow;
        }
        let change = self.change(work.vm, work.stats, &work.section, space);
        for _ in 0..MAX_TRIES {
            let pool = work.vm.pool();
            let step = self.last_step(pool, &work.section, recent, root, fault.gfn());
            let old = step.spte;
            if !old.is_leaf(step.level) {
                return FastPath::Slow;
            }
            if config.permits(old, fault.access()) {
                return FastPath::Outcome(FaultOutcome::Spurious);
            }
            let new = fixed(config, old, fault.access());
            let gains_write = config.is_writable(new) && !config.is_writable(old);
            // A huge leaf that is written while its slot is logged is split, which takes a frame.
            let huge = step.level > Level::L1
                && flags.intersects(SlotFlags::READ_ONLY | SlotFlags::LOG_DIRTY);
            if (gains_write && huge) || !config.permits(new, fault.access()) {
                return FastPath::Slow;
            }
            let mark = gains_write && self.must_mark(kept, fault.gfn());
            if mark && work.ring.is_some_and(DirtyRing::is_full) {
                return FastPath::Slow;
            }
            if change.set(step.cell, old, new, step.gfn, step.level).is_ok() {
                // After the exchange: a harvest that misses the mark has not looked at the entry.
                if mark {
                    self.mark_write(Some(kept), work.ring, work.stats, fault.gfn());
                }
                work.stats.inc(Counter::PfFast);
                change.trace(|| Event::FastFault { gfn: fault.gfn(), new });
                return FastPath::Outcome(FaultOutcome::Fixed);
            }
        }
        FastPath::Slow
    }

    /// A reserved bit in one of our entries is no race: say which entry of the path, and let
    /// nobody go on in such a VM (KVM rows 1.33, 0.1.8).
    #[cold]
    fn reserved_fault(
        &self,
        actor: &mut Actor<H>,
        root: &RootRef,
        fault: &PageFault,
    ) -> Result<FastPath, FaultError> {
        let work = actor.pinned();
        // A root that became invalid since may be taken apart by now.
        if !self.roots().is_valid(root) {
            return Ok(FastPath::Slow);
        }
        match self.first_bad(work.vm.pool(), &work.section, root, fault.gfn()) {
            Some((level, spte)) => {
                work.vm.mark_dead(DeadReason::CorruptEntry);
                Err(FaultError::ReservedBit { gpa: fault.gpa, level, spte: spte.raw() })
            }
            // An MMIO entry, or the entry changed since.
            None => Ok(FastPath::Slow),
        }
    }
}

/// The entry with access tracking undone and, for a write, W given back if that is allowed.
#[inline]
fn fixed<F: SpteFormat>(config: &SpteConfig<F>, old: Spte, access: Access) -> Spte {
    let mut new = old;
    if config.is_access_tracked(new) {
        new = config.restore(new);
    }
    if access.contains(Access::WRITE) && config.is_mmu_writable(new) {
        new = config.writable_again(new);
        // Where no CPU sets D, this fault is the only one to know of the write: aging may take W
        // away again before anybody else looks (INVARIANT[I8]).
        #[cfg(not(busted = "grant_write_unrecorded"))]
        if config.is_ad_disabled(new) && config.is_writable(new) {
            new = new.with(F::DIRTY);
        }
    }
    new
}
