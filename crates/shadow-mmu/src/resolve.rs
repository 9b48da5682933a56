//! Shadow faults: the guest's side, found before anything is held.
//!
//! Owns [`Target`]: what a walk over the guest's tables led to, with the host's page and the level
//! to install it at. The host's resolver may sleep here; whether all of it is still true is asked
//! again under the writer (`fetch`). Takes no locks.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Gva, Level};
use mmu_core::dirty::DirtyRing;
use mmu_core::fault::{EmulateReason, FaultError, FaultOutcome};
use mmu_core::notify::Snapshot;
use mmu_core::slot::{self, Memslot};
use mmu_core::spte::SpteFormat;
use mmu_core::trace::Event;
use mmu_core::traits::{Host, HostPage, PageKind, ResolveError};

use crate::guest::{NestedRequest, Operation, Privilege, Purpose, Request, WalkPath};
use crate::root::Held;
use crate::spte_ref::PageId;
use crate::vcpu::ShadowVcpu;

/// What was accessed, by the guest's tables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accessed<'a> {
    /// The address that our tables translate.
    pub(crate) address: Gva,
    pub(crate) path: &'a WalkPath,
    /// What the entry may permit.
    pub(crate) access: Access,
    /// What the access needs.
    pub(crate) needed: Access,
}

/// What the guest's side of a fault was resolved to, with nothing held.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    pub(crate) gva: Gva,
    pub(crate) path: &'a WalkPath,
    /// What the entry may permit.
    pub(crate) access: Access,
    /// What the access needs.
    pub(crate) needed: Access,
    pub(crate) write: bool,
    pub(crate) prefetch: bool,
    pub(crate) page: HostPage,
    pub(crate) kind: PageKind,
    /// The level to install at, if no guest table is in the way.
    pub(crate) goal: Level,
    pub(crate) logged: bool,
    pub(crate) generation: u64,
    pub(crate) snapshot: Snapshot,
    pub(crate) root: PageId,
}

impl<F: SpteFormat, H: Host> ShadowVcpu<F, H> {
    /// Find slot and page.
    pub(crate) fn resolve<'a>(
        &mut self,
        accessed: Accessed<'a>,
    ) -> Result<Result<Target<'a>, FaultOutcome>, FaultError> {
        let Accessed { address, path, access, needed } = accessed;
        let space = self.role.space();
        let gfn = path.gfn;
        // Without paging addresses have 32 bits, which is what our tables are sure to tell apart.
        let unpaged = path.entries.is_empty().then_some(Gfn::new(1 << 20));
        let max_gfn = self.mmu.config().max_gfn_exclusive();
        let max_gfn = unpaged.unwrap_or(max_gfn).min(max_gfn);
        if gfn >= max_gfn {
            return Err(FaultError::BeyondPhysical { gpa: gfn.address(), max_gfn });
        }
        let Some(Held { page: root, key }) = self.root else { return Err(FaultError::NoRoot) };
        if !key.begins(path, address) {
            return Ok(Err(FaultOutcome::Retry));
        }
        if let Some(reason) = self.actor.vm().is_dead() {
            return Err(FaultError::Dead { reason });
        }
        let snapshot = self.actor.vm().notify().snapshot();
        if !self.actor.keep_slot(space, gfn) {
            return Ok(Err(FaultOutcome::Emulate(EmulateReason::NoSlot { gfn, space })));
        }
        let kept = self.actor.kept_slot().ok_or(FaultError::NoRoot)?;
        let (slot, generation) = (*kept.slot(), kept.generation());
        if slot.is_invalid() {
            return Ok(Err(FaultOutcome::Retry));
        }
        let write = needed.contains(Access::WRITE);
        if write && let Some(outcome) = self.refuses_writes(&slot, gfn) {
            return Ok(Err(outcome));
        }
        let wanted = if write { Access::WRITE } else { Access::READ };
        let host = self.actor.vm().host();
        let page = match host.resolve(&slot, gfn, wanted) {
            Ok(page) if page.writable || !write => page,
            refused => {
                let source = refused.err().unwrap_or(ResolveError::ReadOnly);
                return self.refused(gfn, slot.id, snapshot, generation, source);
            }
        };
        if page.pfn >= self.mmu.config().max_pfn_exclusive() {
            return Err(FaultError::BadHostPage { gfn, pfn: page.pfn.get() });
        }
        let kind = self.actor.vm().host().kind(&slot, gfn, &page);
        let logged = slot.logs_dirty();
        let goal = self.goal(&slot, path, access, page);
        let page = HostPage { writable: page.writable && !slot.is_read_only(), ..page };
        Ok(Ok(Target {
            gva: address,
            path,
            access,
            needed,
            write,
            prefetch: false,
            page,
            kind,
            goal,
            logged,
            generation,
            snapshot,
            root,
        }))
    }

    /// What becomes of a write to a slot that takes none now; said before anything permits it.
    fn refuses_writes(&self, slot: &Memslot, gfn: Gfn) -> Option<FaultOutcome> {
        if slot.is_read_only() {
            return Some(FaultOutcome::Emulate(EmulateReason::ReadOnly { gfn, slot: slot.id }));
        }
        let full = slot.logs_dirty() && self.actor.ring().is_some_and(DirtyRing::is_full);
        if !full || mmu_core::busted!("full_ring_ignored") {
            return None;
        }
        self.actor.vm().trace(|| Event::RingFull { gfn });
        Some(FaultOutcome::RingFull)
    }

    /// The largest level to install at, as far as guest, host and slot go.
    fn goal(&mut self, slot: &Memslot, path: &WalkPath, access: Access, page: HostPage) -> Level {
        let (gfn, config) = (path.gfn, self.mmu.config());
        // A huge leaf without X would be asked for X for ever.
        let fetched = config.nx_huge_pages() && access.contains(Access::EXEC);
        let cap = if slot.logs_dirty() || fetched { Level::L1 } else { config.max_leaf_level() };
        let cap = self.untracked(gfn, cap.min(path.level).min(page.level));
        let congruent = |level: Level| (gfn.get() ^ page.pfn.get()) & (level.pages() - 1) == 0;
        let mut goal = slot::max_level(slot, gfn, cap);
        while !congruent(goal) {
            goal = goal.below();
        }
        goal
    }

    /// The largest level, at most `cap`, at which no page lies whose writes somebody wants to see,
    /// in any address space (KVM row 6.16).
    fn untracked(&mut self, gfn: Gfn, cap: Level) -> Level {
        let work = self.actor.pinned();
        if !work.vm.slots().tracks_writes() {
            return cap;
        }
        let slots = work.vm.slots().read(&work.section);
        (0..slot::MAX_ADDRESS_SPACES).fold(cap, |cap, space| {
            let slot = slots.find(space, gfn);
            let meta = slot.and_then(|slot| slots.meta(space, slot.id));
            let track = meta.and_then(|meta| meta.track()).filter(|track| track.is_used());
            track.map_or(cap, |track| track.max_level(gfn, cap))
        })
    }

    /// The host has no page: an error, unless what was asked for is not true any more.
    fn refused<'a>(
        &mut self,
        gfn: Gfn,
        slot: u16,
        snapshot: Snapshot,
        generation: u64,
        source: ResolveError,
    ) -> Result<Result<Target<'a>, FaultOutcome>, FaultError> {
        let work = self.actor.shared();
        let page = GfnRange::from_len(gfn, 1);
        if work.vm.slots().generation() != generation
            || work.vm.notify().must_retry(&work.section, snapshot, page)
        {
            return Ok(Err(FaultOutcome::Retry));
        }
        match source {
            ResolveError::ReadOnly => {
                Ok(Err(FaultOutcome::Emulate(EmulateReason::ReadOnly { gfn, slot })))
            }
            ResolveError::Interrupted => Ok(Err(FaultOutcome::Retry)),
            source => Err(FaultError::Resolve { gfn, source }),
        }
    }
}

/// What an operation needs of an entry.
const fn needed_of(operation: Operation) -> Access {
    match operation {
        Operation::Read => Access::READ,
        Operation::Write => Access::WRITE,
        Operation::Fetch => Access::EXEC,
    }
}

/// What an access needs of an entry.
pub(crate) fn needed(request: Request) -> Access {
    match request.privilege {
        Privilege::User => needed_of(request.operation) | Access::USER,
        Privilege::Supervisor | Privilege::SupervisorAc | Privilege::Implicit => {
            needed_of(request.operation)
        }
    }
}

/// What a nested guest's access needs. Where fetches are of two kinds, the linear address says
/// which.
pub(crate) const fn nested_needs(request: NestedRequest) -> Access {
    match (request.operation, request.purpose) {
        (Operation::Fetch, Purpose::Final(linear)) if linear.contains(Access::USER) => {
            Access::EXEC.union(Access::USER)
        }
        (operation, _) => needed_of(operation),
    }
}
