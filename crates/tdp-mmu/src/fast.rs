//! Faults fixed without a lock: restore an access-tracked entry, give W back (KVM row 3.21).
//!
//! Runs in an epoch section only and needs no memory, so an exhausted pool cannot fail it. Direct
//! MMUs only: the gfn of an entry is its place, so a value that comes back (ABA) means the same.

use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::Level;
use mmu_core::dirty::DirtyRing;
use mmu_core::fault::PageFault;
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

/// What the fast path made of a fault. The first two are counted.
pub(crate) enum FastPath {
    Fixed,
    Spurious,
    /// Not its business, or races lost: go the slow way.
    Slow,
    /// Hardware met a reserved bit: see [`TdpMmu::reserved_fault`].
    Reserved,
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
        // No processor walks a mirror, its entries do not change in place, and nobody takes short
        // cuts to them.
        (fault.code.contains(PfErrorCode::RESERVED) || can_be_fast(self.config(), fault))
            && self.external().is_none()
    }

    /// Fix the fault without a lock, if that can be done.
    #[inline(never)]
    pub(crate) fn fast_fault(
        &self,
        actor: &mut Actor<H>,
        recent: &mut Recent,
        root: &RootRef,
        fault: &PageFault,
    ) -> FastPath {
        if fault.code.contains(PfErrorCode::RESERVED) {
            return FastPath::Reserved;
        }
        let space = root.role.space();
        // Before the section: the copy is validated inside by its generation.
        if !actor.keep_slot(space, fault.gfn()) {
            return FastPath::Slow;
        }
        let work = actor.pinned();
        let Some(kept) = work.slot.as_ref() else { return FastPath::Slow };
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
        let access = fault.access();
        for _ in 0..MAX_TRIES {
            let pool = work.vm.pool();
            let step = self.last_step(pool, &work.section, recent, root, fault.gfn());
            let old = step.spte;
            if !old.is_leaf(step.level) {
                return FastPath::Slow;
            }
            if config.permits(old, access) {
                work.stats.inc(Counter::PfTaken);
                work.stats.inc(Counter::PfSpurious);
                return FastPath::Spurious;
            }
            let new = fixed(config, old, access);
            let gains_write = config.is_writable(new) && !config.is_writable(old);
            // A huge leaf that is written while its slot is logged is split, which takes a frame.
            let huge = step.level > Level::L1
                && flags.intersects(SlotFlags::READ_ONLY | SlotFlags::LOG_DIRTY);
            if (gains_write && huge) || !config.permits(new, access) {
                return FastPath::Slow;
            }
            let mark = gains_write && self.must_mark(kept, fault.gfn());
            if mark && work.vm.ring_of(&work.section).is_some_and(DirtyRing::is_full) {
                return FastPath::Slow;
            }
            if change.adjust(step.cell, old, new, step.gfn, step.level).is_ok() {
                // After the exchange: a harvest that misses the mark has not looked at the entry.
                if mark && !mmu_core::busted!("fast_fault_unmarked") {
                    let ring = work.vm.ring_of(&work.section);
                    self.mark_write(Some(kept), ring, work.stats, fault.gfn());
                }
                work.stats.inc(Counter::PfTaken);
                work.stats.inc(Counter::PfFixed);
                work.stats.inc(Counter::PfFast);
                change.trace(|| Event::FastFault { gfn: fault.gfn(), new });
                return FastPath::Fixed;
            }
        }
        FastPath::Slow
    }
}

/// The entry with access tracking undone and, for a write, W given back if that is allowed.
#[inline(always)]
fn fixed<F: SpteFormat>(config: &SpteConfig<F>, old: Spte, access: Access) -> Spte {
    if config.is_ad_disabled(old) {
        return fixed_without_ad(config, old, access);
    }
    let grant = access.contains(Access::WRITE) && config.is_mmu_writable(old);
    if grant { config.writable_again(old) } else { old }
}

/// The same for an entry whose A and D no CPU sets.
#[inline(always)]
fn fixed_without_ad<F: SpteFormat>(config: &SpteConfig<F>, old: Spte, access: Access) -> Spte {
    let mut new = config.restore(old);
    if access.contains(Access::WRITE) && config.is_mmu_writable(new) {
        new = config.writable_again(new);
        // This fault is the only one to know of the write: aging may take W away again before
        // anybody else looks (INVARIANT[I8]).
        if config.is_writable(new) && !mmu_core::busted!("grant_write_unrecorded") {
            new = new.with(F::DIRTY);
        }
    }
    new
}
