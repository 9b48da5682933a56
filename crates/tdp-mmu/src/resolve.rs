//! The first half of a slow fault: from an address to the entry that should stand there.
//!
//! Owns [`Resolved`] (an entry to be installed, and what it rests on) and [`Stop`] (why there is
//! none). Nothing is held: the embedder's resolver may sleep. What is found here is checked again
//! inside the section that installs it (`map`). KVM rows 3.15, 3.18, 3.22, 3.25.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Level, PAGE_SIZE, Pfn};
use mmu_core::dirty::DirtyRing;
use mmu_core::fault::{EmulateReason, FaultError, FaultOutcome, PageFault};
use mmu_core::notify::Snapshot;
use mmu_core::slot::{self, Memslot};
use mmu_core::spte::{Spte, SpteConfig, SpteFormat};
use mmu_core::trace::Event;
use mmu_core::traits::{Host, HostPage, ResolveError};
use mmu_core::vm::SlotCopy;

use crate::leaf::{LeafFacts, LeafLog};
use crate::limits;
use crate::mmu::TdpMmu;
use crate::vcpu::TdpVcpu;

/// A fault whose page is known, and what that rests on.
pub(crate) struct Resolved {
    pub(crate) generation: u64,
    pub(crate) snapshot: Snapshot,
    pub(crate) wish: Wish,
}

/// A page that the caller has at hand.
#[derive(Clone, Copy)]
pub(crate) struct Given {
    pub(crate) page: HostPage,
    /// Taken before the caller learned of it.
    pub(crate) before: Snapshot,
}

/// An entry to be installed.
#[derive(Clone, Copy)]
pub(crate) struct Wish {
    pub(crate) gfn: Gfn,
    pub(crate) access: Access,
    pub(crate) prefetch: bool,
    pub(crate) goal: Level,
    /// What the goal would be if this were no fetch under the mitigation of huge pages; level 1
    /// where that makes no difference.
    pub(crate) nx_wanted: Level,
    pub(crate) leaf: Spte,
    /// The entry lets the guest write without telling: the log must be told now.
    pub(crate) mark: bool,
}

impl Wish {
    /// Everything that the entry will map.
    #[inline(always)]
    pub(crate) const fn pages(&self) -> GfnRange {
        GfnRange::entry(self.gfn, self.goal)
    }

    /// The part of the entry that maps the gfn, one level lower.
    #[cold]
    pub(crate) fn one_lower<F: SpteFormat>(self, config: &SpteConfig<F>) -> Self {
        let Some(below) = self.goal.down() else { return self };
        let leaf = config.small_from_huge(self.leaf, self.goal, self.gfn.index(below));
        Self { goal: below, leaf, ..self }
    }
}

impl<F: SpteFormat, H: Host> TdpVcpu<F, H> {
    /// Find slot and page, and make the entry.
    #[inline(always)]
    pub(crate) fn resolve(
        &mut self,
        fault: &PageFault,
        given: Option<Given>,
    ) -> Result<Resolved, Stop> {
        let (gfn, access) = (fault.gfn(), fault.access());
        let snapshot = match given {
            None => self.actor.vm().notify().snapshot(),
            Some(given) => given.before,
        };
        if !self.actor.keep_slot(self.role.space(), gfn) {
            return Err(Stop::NoSlot);
        }
        // After the snapshot: what is found here is covered by it.
        let plain = limits::is_plain(self.actor.vm(), fault);
        let limits = if plain { None } else { Some(self.limits(fault, snapshot)?) };
        let kept = self.actor.kept_slot().ok_or(Stop::NoSlot)?;
        let (slot, generation) = (kept.slot(), kept.generation());
        if slot.is_invalid() || self.actor.vm().notify().likely_in_progress(gfn) {
            return Err(Stop::Retry);
        }
        let write = access.contains(Access::WRITE);
        if slot.is_read_only() && write {
            return Err(Stop::ReadOnly { slot: slot.id });
        }
        let private = limits.is_some_and(|limits| limits.is_private());
        let page = match ask(self.actor.vm().host(), (slot, gfn), access, private, given) {
            Ok(page) if page.writable || !write => page,
            refused => {
                let (slot, source) = (slot.id, refused.err().unwrap_or(ResolveError::ReadOnly));
                return Err(self.resolve_failed(gfn, slot, snapshot, generation, source));
            }
        };
        if page.pfn >= self.mmu.config().max_pfn_exclusive() {
            return Err(Stop::BadPage { pfn: page.pfn });
        }
        let mut max = fault.max_level;
        if let Some(limits) = limits {
            max = max.min(limits.level);
        }
        let config = self.mmu.making();
        let goal = self.mmu.goal_level(kept, gfn, &page, max);
        // Huge leaves are not executable under the mitigation (KVM row 1.20).
        let nx = access.contains(Access::EXEC) && config.nx_huge_pages();
        let (goal, nx_wanted) = if nx { (Level::L1, goal) } else { (goal, Level::L1) };
        let prefetch = fault.prefetch;
        let log = self.mmu.leaf_log(kept, gfn, write && !prefetch);
        // Here, not in the section: it depends on nothing that a section protects.
        let kind = self.actor.vm().host().kind(slot, gfn, &page);
        let facts = LeafFacts::new(slot, page.writable, goal, log, prefetch)
            .of_kind(kind)
            .of_config(config);
        let leaf = match limits {
            None => self.leaf.leaf(config, facts, goal, page.pfn),
            Some(limits) => {
                let leaf = limits.leaf(config, facts.spec(), page.pfn, access);
                let leaf = leaf.ok_or(Stop::Denied)?;
                // The CPU is to set D: what is dirty from the start it would not tell of.
                if log == LeafLog::Clean { config.clear_dirty(leaf) } else { leaf }
            }
        };
        let mark = log == LeafLog::Marked && self.mmu.config().is_writable(leaf);
        if mark && self.actor.ring().is_some_and(DirtyRing::is_full) {
            self.mmu.vm().trace(|| Event::RingFull { gfn });
            return Err(Stop::RingFull);
        }
        let wish = Wish { gfn, access, prefetch, goal, nx_wanted, leaf, mark };
        Ok(Resolved { generation, snapshot, wish })
    }

    /// What comes of a fault without a page.
    #[cold]
    pub(crate) fn stopped(
        &mut self,
        stop: Stop,
        fault: &PageFault,
    ) -> Result<FaultOutcome, FaultError> {
        match stop {
            Stop::NoSlot => Ok(self.no_slot(fault)),
            stop => stop.result(fault, self.role.space()),
        }
    }

    /// An error is the caller's only if nothing changed while the host was asked.
    #[cold]
    fn resolve_failed(
        &mut self,
        gfn: Gfn,
        slot: u16,
        snapshot: Snapshot,
        generation: u64,
        source: ResolveError,
    ) -> Stop {
        let work = self.actor.shared();
        let stale = work.vm.slots().generation() != generation
            || work.vm.notify().must_retry(&work.section, snapshot, GfnRange::from_len(gfn, 1));
        match source {
            _ if stale => Stop::Retry,
            ResolveError::ReadOnly => Stop::ReadOnly { slot },
            source => Stop::Failed { source },
        }
    }
}

/// The host's page, or the one given. Handed on as it is: a result that is taken apart and put
/// together again goes through memory, in pieces for which the CPU's next load has to wait.
#[inline(always)]
fn ask<H: Host>(
    host: &H,
    (slot, gfn): (&Memslot, Gfn),
    access: Access,
    private: bool,
    given: Option<Given>,
) -> Result<HostPage, ResolveError> {
    match given {
        Some(given) => Ok(given.page),
        None if private => host.resolve_private(slot, gfn, access),
        None => host.resolve(slot, gfn, access),
    }
}

/// Why a fault ends before it has a page. Small, and turned into a result out of line, so that the
/// usual fault carries none of it.
pub(crate) enum Stop {
    Retry,
    NoSlot,
    RingFull,
    ReadOnly { slot: u16 },
    BadPage { pfn: Pfn },
    Failed { source: ResolveError },
    Denied,
    WriteProtected,
    Memory { private: bool },
}

impl Stop {
    pub(crate) fn result(self, fault: &PageFault, space: u16) -> Result<FaultOutcome, FaultError> {
        let gfn = fault.gfn();
        match self {
            Self::Retry => Ok(FaultOutcome::Retry),
            Self::RingFull => Ok(FaultOutcome::RingFull),
            Self::NoSlot => Ok(FaultOutcome::Emulate(EmulateReason::NoSlot { gfn, space })),
            Self::ReadOnly { slot } => {
                Ok(FaultOutcome::Emulate(EmulateReason::ReadOnly { gfn, slot }))
            }
            Self::BadPage { pfn } => Err(FaultError::BadHostPage { gfn, pfn: pfn.get() }),
            Self::Failed { source } => Err(FaultError::Resolve { gfn, source }),
            Self::Denied => Ok(FaultOutcome::Emulate(EmulateReason::Denied { gfn })),
            Self::WriteProtected => Ok(FaultOutcome::WriteProtected),
            Self::Memory { private } => {
                let (gpa, size) = (gfn.address(), PAGE_SIZE);
                Err(FaultError::MemoryFault { gpa, size, private })
            }
        }
    }
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Level to map at (KVM row 3.22): the smallest of what the fault, the policy, the format, the
    /// host page, the slot's geometry and dirty logging allow, with gfn and pfn congruent.
    #[inline(always)]
    fn goal_level(&self, kept: &SlotCopy, gfn: Gfn, page: &HostPage, max: Level) -> Level {
        let cap = max.min(self.options().max_level).min(page.level);
        if cap == Level::L1 {
            return Level::L1;
        }
        self.huge_goal(kept.slot(), gfn, page, kept.unlogged_level(gfn, cap))
    }

    fn huge_goal(&self, slot: &Memslot, gfn: Gfn, page: &HostPage, cap: Level) -> Level {
        let mut level = slot::max_level(slot, gfn, cap.min(self.config().max_leaf_level()));
        while (gfn.get() ^ page.pfn.get()) & (level.pages() - 1) != 0 {
            level = level.down().unwrap_or(Level::L1);
        }
        level
    }
}
