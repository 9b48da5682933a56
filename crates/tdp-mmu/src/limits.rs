//! What besides its slot limits how a page may be mapped: memory attributes and write tracking.
//!
//! Owns [`Limits`], which faults ask for only in VMs that have any of this; the others pay a
//! branch. Asked after the fault's invalidation snapshot, in a section of its own; what is found is
//! stale only if an invalidation of the page comes in between, and then the fault retries
//! ([`mmu_core::attributes::table`], [`mmu_core::slot::track`]).

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::attributes::{self, Attributes};
use mmu_core::epoch::EpochGuard;
use mmu_core::fault::{PageFault, Privacy};
use mmu_core::notify::Snapshot;
use mmu_core::slot::{MAX_ADDRESS_SPACES, SlotMeta};
use mmu_core::spte::{LeafSpec, Spte, SpteConfig, SpteFormat};
use mmu_core::traits::Host;
use mmu_core::vm::VmCore;

use crate::resolve::Stop;
use crate::vcpu::TdpVcpu;

/// The limits of one fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    attributes: Attributes,
    /// Somebody wants to see every write to the page.
    tracked: bool,
    /// The largest level.
    pub(crate) level: Level,
}

impl Limits {
    /// The limits of `gfn`, found in `section`. Stale as soon as an invalidation of the page has
    /// begun after the caller's snapshot.
    pub(crate) fn of<H: Host>(
        vm: &VmCore<H>,
        section: &EpochGuard<'_>,
        gfn: Gfn,
        nx_huge_pages: bool,
    ) -> Self {
        let map = vm.slots().attributes().read(section);
        let attributes = map.get(gfn);
        let mut level = attributes::max_level(map, gfn, Level::MAX_LEAF);
        let mut tracked = false;
        let slots = vm.slots().read(section);
        // Memory of several address spaces is the same memory (KVM row 6.16).
        for space in 0..MAX_ADDRESS_SPACES {
            let slot = slots.find(space, gfn);
            let meta = slot.and_then(|slot| slots.meta(space, slot.id));
            if let Some(track) = meta.and_then(SlotMeta::track).filter(|track| track.is_used()) {
                tracked |= track.is_tracked(gfn);
                level = track.max_level(gfn, level);
            }
        }
        if nx_huge_pages && attributes.contains(Attributes::NO_EXEC) {
            // A huge leaf that is split under the mitigation gives fetches back.
            level = Level::L1;
        }
        Self { attributes, tracked, level }
    }

    /// Is the page private to the guest?
    pub(crate) const fn is_private(&self) -> bool {
        self.attributes.is_private()
    }

    /// The entry for a page, where `spec` says what it would be without limits; `None` when the
    /// access is not permitted (KVM row 8.16).
    pub(crate) fn leaf<F: SpteFormat>(
        &self,
        config: &SpteConfig<F>,
        spec: LeafSpec,
        pfn: Pfn,
        needed: Access,
    ) -> Option<Spte> {
        let mut access = self.attributes.restrict(spec.access);
        if self.attributes.contains(Attributes::NO_EXEC) && config.capabilities().mode_based_exec {
            // There, this is what lets user mode fetch.
            access = access.difference(Access::USER);
        }
        let mmu_writable = spec.mmu_writable && !self.tracked;
        let pfn = pfn.align_down(spec.level);
        let spec = LeafSpec { pfn, access, mmu_writable, ..spec };
        // Not asked of the entry itself: a prefetched one may be access-tracked, which permits
        // nothing, and one that is logged gets W later.
        let most = config.leaf(&LeafSpec { accessed: true, map_writable: true, ..spec });
        config.permits(most, needed).then(|| config.leaf(&spec))
    }
}

/// Does the access go to another kind of memory than the page is marked as?
#[cold]
pub(crate) fn differs<H: Host>(
    vm: &VmCore<H>,
    section: &EpochGuard<'_>,
    fault: &PageFault,
) -> bool {
    let private = vm.slots().attributes().read(section).get(fault.gfn()).is_private();
    fault.privacy.differs(private)
}

/// May a fault be handled without looking for limits?
#[inline(always)]
pub(crate) fn is_plain<H: Host>(vm: &VmCore<H>, fault: &PageFault) -> bool {
    vm.slots().is_plain() && !matches!(fault.privacy, Privacy::Private)
}

impl<F: SpteFormat, H: Host> TdpVcpu<F, H> {
    /// The limits for a fault, or why it ends here.
    #[cold]
    pub(crate) fn limits(&mut self, fault: &PageFault, snapshot: Snapshot) -> Result<Limits, Stop> {
        let gfn = fault.gfn();
        let nx_huge_pages = self.mmu.making().nx_huge_pages();
        let work = self.actor.shared();
        if work.vm.notify().must_retry(&work.section, snapshot, GfnRange::from_len(gfn, 1)) {
            return Err(Stop::Retry);
        }
        let limits = Limits::of(work.vm, work.section.epoch(), gfn, nx_huge_pages);
        let attributes = limits.attributes;
        if fault.privacy.differs(attributes.is_private()) {
            return Err(Stop::Memory { private: !attributes.is_private() });
        }
        if !attributes.restrict(fault.access()).contains(fault.access()) {
            return Err(Stop::Denied);
        }
        if limits.tracked && fault.access().contains(Access::WRITE) {
            return Err(Stop::WriteProtected);
        }
        Ok(limits)
    }
}
