//! Accesses to where the guest has no memory.
//!
//! Owns the MMIO entries of TDP trees: the fault that finds no slot makes one (KVM rows 3.20, 1.34
//! to 1.39), so that the next access exits with a reserved bit, and the fault that meets one ends
//! without a lock if no slot changed since (1.37). [`MmioInfo`] is what a vCPU remembers of its
//! last such access (1.40).
//!
//! An entry says "`gfn` had no slot at this generation". It may stay when slots change: its
//! generation is then another, and the next fault replaces it. Only the low
//! [`MMIO_GEN_BITS`] bits are kept, so the trees are dropped whenever those wrap
//! ([`TdpMmu::around_update`]).
//!
//! Locking: an entry is made in a Shared section and judged under a pin. Slots are looked up in the
//! section too, so the generation is that of the set in which no slot was found.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Gva, Level, PAGE_SHIFT};
use mmu_core::dead::DeadReason;
use mmu_core::fault::{EmulateReason, FaultError, FaultOutcome, PageFault, Privacy};
use mmu_core::slot::{GENERATION_UPDATING, SlotWriter};
use mmu_core::spte::{MMIO_GEN_BITS, Spte, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::trace::Event;
use mmu_core::traits::Host;
use mmu_core::vm::{Actor, SharedWork};

use crate::map::MAX_LOST;
use crate::mmu::TdpMmu;
use crate::root::RootRef;
use crate::vcpu::TdpVcpu;

/// What a vCPU remembers of its last access to where there is no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioInfo {
    /// The guest frame.
    pub gfn: Gfn,
    /// What the entry, or its lack, says about the access: always everything in TDP, where the
    /// guest's own tables decide.
    pub access: Access,
    /// A linear address by which the guest reached it, if the embedder said so
    /// ([`TdpVcpu::name_mmio`]). Its page counts.
    pub gva: Option<Gva>,
    /// Generation of the slots of the address space that the vCPU used.
    generation: u64,
}

impl<F: SpteFormat, H: Host> TdpVcpu<F, H> {
    /// The last access to where there is no memory, if no slot changed since: an emulator that asks
    /// need not look for a slot (KVM row 1.40). Judged in the address space that the vCPU is in.
    #[doc(alias = "vcpu_match_mmio_gpa")]
    #[inline]
    #[must_use]
    pub fn mmio_info(&self) -> Option<MmioInfo> {
        let now = self.mmu.generation_in(self.role.space());
        self.mmio.filter(|info| Some(info.generation) == now)
    }

    /// Is `gva` in the page by which the last such access was made?
    #[doc(alias = "vcpu_match_mmio_gva")]
    #[must_use]
    pub fn mmio_at(&self, gva: Gva) -> Option<MmioInfo> {
        let page = |gva: Gva| gva.get() >> PAGE_SHIFT;
        self.mmio_info().filter(|info| info.gva.is_some_and(|at| page(at) == page(gva)))
    }

    /// Say by which linear address the last such access was made. Forget it
    /// ([`forget_mmio`](Self::forget_mmio)) when the guest may have changed what it leads to:
    /// INVLPG, a load of CR3, another mode.
    #[doc(alias = "vcpu_cache_mmio_info")]
    pub fn name_mmio(&mut self, gva: Gva) {
        if let Some(info) = &mut self.mmio {
            info.gva = Some(gva);
        }
    }

    /// Forget the last such access.
    #[doc(alias = "vcpu_clear_mmio_info")]
    pub fn forget_mmio(&mut self) {
        self.mmio = None;
    }

    /// The fault's gfn has no slot: the access is the embedder's, and the next one comes here
    /// sooner.
    pub(crate) fn no_slot(&mut self, fault: &PageFault) -> FaultOutcome {
        let (gfn, space) = (fault.gfn(), self.role.space());
        let emulate = FaultOutcome::Emulate(EmulateReason::NoSlot { gfn, space });
        // Nobody accessed it, or not in the way an entry would stand for.
        if fault.prefetch || fault.privacy != Privacy::Shared {
            return emulate;
        }
        let Some(root) = self.root else { return emulate };
        let mut work = self.actor.shared();
        if !self.mmu.roots().is_valid(&root) {
            return FaultOutcome::Retry;
        }
        let slots = work.vm.slots();
        let set = slots.read(work.section.epoch());
        if set.find(space, gfn).is_some() {
            // Made since it was looked for.
            return FaultOutcome::Retry;
        }
        // What is remembered must not outlive an update in progress.
        if set.is_updating() || set.generation() != slots.generation() {
            return emulate;
        }
        let generation = set.generation_in(space);
        let (access, gva) = (Access::ALL, None);
        self.mmio = Some(MmioInfo { gfn, access, gva, generation });
        // No processor walks a mirror of an external table, so none would meet the entry.
        let spte = self.mmu.config().mmio(gfn, access, generation);
        if let Some(spte) = spte.filter(|_| self.mmu.external().is_none()) {
            if self.mmu.install_mmio(&mut work, &root, gfn, spte) {
                work.stats.inc(Counter::PfMmioMade);
                work.vm.trace(|| Event::MmioMarked { gfn, access, generation });
            }
        }
        emulate
    }

    /// Hardware met a reserved bit: an MMIO entry, or corruption. `None` if the fault goes the
    /// usual way: the entry is stale, or has changed since.
    ///
    /// A reserved bit in any other entry of ours is no race: say which entry of the path, and let
    /// nobody go on in such a VM (KVM rows 1.33, 0.1.8).
    #[cold]
    pub(crate) fn reserved_fault(
        &mut self,
        fault: &PageFault,
    ) -> Result<Option<FaultOutcome>, FaultError> {
        let (gfn, space) = (fault.gfn(), self.role.space());
        let emulate = Some(FaultOutcome::Emulate(EmulateReason::NoSlot { gfn, space }));
        if self.mmio_info().is_some_and(|info| info.gfn == gfn) {
            self.mmu.vm().trace(|| Event::MmioHit { gfn, current: true });
            return Ok(emulate);
        }
        let Some(root) = self.root else { return Ok(None) };
        let work = self.actor.pinned();
        // A root that became invalid since may be taken apart by now.
        if !self.mmu.roots().is_valid(&root) {
            return Ok(None);
        }
        let config = self.mmu.config();
        let (level, bad) = match self.mmu.inspect(work.vm.pool(), &work.section, &root, gfn) {
            Err(bad) => bad,
            Ok(spte) => {
                let Some(stored) = config.mmio_gfn(spte) else { return Ok(None) };
                if stored == gfn {
                    let now = self.mmu.generation_in(space);
                    let now = now.filter(|&now| config.mmio_is_current(spte, now));
                    work.vm.trace(|| Event::MmioHit { gfn, current: now.is_some() });
                    let Some(generation) = now else { return Ok(None) };
                    let access = config.mmio_access(spte).unwrap_or(Access::ALL);
                    self.mmio = Some(MmioInfo { gfn, access, gva: None, generation });
                    return Ok(emulate);
                }
                // Entries are made where they stand for.
                (Level::L1, spte)
            }
        };
        work.vm.mark_dead(DeadReason::CorruptEntry);
        Err(FaultError::ReservedBit { gpa: fault.gpa, level, spte: bad.raw() })
    }
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Generation of the slots of address space `space`; `None` while an update is in progress.
    #[inline]
    fn generation_in(&self, space: u16) -> Option<u64> {
        let generation = self.vm().slots().generation();
        let updating = generation & GENERATION_UPDATING != 0;
        (!updating).then(|| generation.wrapping_add(u64::from(space)))
    }

    /// Put an MMIO entry where nothing is mapped; `false` if it cannot stand there, or stands there
    /// already. Whoever loses a race leaves it at that: the entry only saves time.
    fn install_mmio(
        &self,
        work: &mut SharedWork<'_, H>,
        root: &RootRef,
        gfn: Gfn,
        new: Spte,
    ) -> bool {
        let SharedWork { section, cache, vm, stats, .. } = work;
        let change = self.change(vm, stats, section.epoch(), root.role.space());
        let (mut frame, mut level) = (root.frame, root.role.level());
        let mut lost = 0;
        while lost < MAX_LOST {
            let cell = vm.pool().table(section.epoch(), frame).cell(gfn, level);
            let old = cell.load();
            if old.is_table(level) {
                (frame, level) = (self.config().pfn(old), level.below());
                continue;
            }
            // No leaf is there but one whose slot came after this fault looked.
            if old.is_frozen() || old.is_mmu_present() || old == new {
                return false;
            }
            if level == Level::L1 {
                if change.set(cell, old, new, gfn, level).is_ok() {
                    return true;
                }
            } else if let Some(child) = self.link_table(&change, cache, cell, old, gfn, level) {
                (frame, level) = (child, level.below());
                continue;
            }
            lost += 1;
        }
        false
    }

    /// Change memory slots by `update`, which may publish one set of them.
    ///
    /// MMIO entries hold [`MMIO_GEN_BITS`] bits of the generation; when those start again, every
    /// tree is dropped, so that no entry can be taken for one of the new count (KVM row 1.37).
    /// [`set_slot`](Self::set_slot) does this by itself. Who calls
    /// [`VmCore::set_slot`](mmu_core::vm::VmCore::set_slot) or
    /// [`VmCore::enable_write_tracking`](mmu_core::vm::VmCore::enable_write_tracking) directly does
    /// it here, with several MMUs one inside the other.
    #[doc(alias = "kvm_mmu_invalidate_mmio_sptes")]
    pub fn around_update<R>(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
        update: impl FnOnce(&mut SlotWriter, &mut Actor<H>) -> R,
    ) -> R {
        let wraps = self.config().mmio_enabled() && writer.live().next_wraps(MMIO_GEN_BITS);
        if !wraps {
            return update(writer, actor);
        }
        // Before: entries of the former count, whose numbers come again at once, must not be
        // reached once the new one begins.
        if !mmu_core::busted!("wrap_keeps_trees_before") {
            drop(self.invalidate_roots(actor));
        }
        let result = update(writer, actor);
        // After: roots made in between hold entries of the old count, whose numbers come again at
        // the end of the new one.
        if !mmu_core::busted!("wrap_keeps_trees_after") {
            let _ = self.invalidate_roots(actor).finish(actor);
        }
        result
    }
}
