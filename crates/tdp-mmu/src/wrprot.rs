//! Keeping the guest from writing to a page without being seen: for shadowed tables and trackers.
//!
//! Owns [`TdpMmu::write_protect_gfn`] (KVM row 3.54), and [`TdpMmu::track_write`], which also keeps
//! the page so (row 0.3.4).
//!
//! Unlike the protection of the dirty log, this one takes MMU-writable away too, so that no fast
//! fault grants W again; and it flushes whenever it took that, also where W was clear already: the
//! dirty log may have cleared W without a flush, and a TLB may still let writes through (KVM rows
//! 0.2.1 and B21).
//!
//! Locking: an invalidation of the one gfn, which drains the sections that were open. So what it
//! finds is all there is, and another thread that protects the same gfn and has not flushed yet is
//! noticed.

use alloc::sync::Arc;
use core::fmt;

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::direct::DirectTables;
use mmu_core::epoch::EpochGuard;
use mmu_core::flush::FlushDebt;
use mmu_core::notify::Invalidation;
use mmu_core::slot::{PageTrack, SlotMeta, TrackError};
use mmu_core::spte::SpteFormat;
use mmu_core::sync::relax;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::change::Change;
use crate::mmu::TdpMmu;
use crate::root::{FoundRoot, RootFilter};
use crate::zap::pay_inside;

/// What came of one tree.
enum Done {
    /// The leaf at this level could be written, or made writable.
    Protected(Level),
    Nothing,
}

/// Which trees to work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spaces {
    /// Those of one address space.
    One(u16),
    /// All.
    All,
}

/// A page was not tracked, or not released. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackWriteError {
    /// No slot of the address space has the page.
    NoSlot {
        /// Address space.
        space: u16,
        /// The page.
        gfn: Gfn,
    },
    /// The VM tracks no pages: call
    /// [`enable_write_tracking`](mmu_core::vm::VmCore::enable_write_tracking) first.
    NotEnabled,
    /// The MMU mirrors an external table, which does not know of write protection.
    Mirror,
    /// The count would not change.
    Count(TrackError),
}

impl fmt::Display for TrackWriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSlot { space, gfn } => {
                write!(f, "no slot of address space {space} holds gfn {gfn}")
            }
            Self::NotEnabled => f.write_str("the VM does not track writes"),
            Self::Mirror => f.write_str("an external table protects no pages"),
            Self::Count(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for TrackWriteError {}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Write-protect `gfn` and keep it so, in every address space, until as many
    /// [`untrack_write`](Self::untrack_write)s: faults of writes are
    /// [`FaultOutcome::WriteProtected`](mmu_core::fault::FaultOutcome), and no huge page is mapped
    /// over it. Flushed when this returns: every later write faults.
    ///
    /// The count is that of the slot which has the page, and goes with it. For a VM with one MMU.
    ///
    /// # Errors
    /// [`TrackWriteError`].
    #[doc(alias = "kvm_write_track_add_gfn")]
    pub fn track_write(
        &self,
        actor: &mut Actor<H>,
        space: u16,
        gfn: Gfn,
    ) -> Result<(), TrackWriteError> {
        self.assert_own(actor);
        if self.external().is_some() {
            return Err(TrackWriteError::Mirror);
        }
        let vm = self.vm();
        let range = GfnRange::from_len(gfn, 1);
        // No slot changes before it ends, so the counts are still the slot's when it does.
        let invalidation = vm.invalidate(actor.participant(), range);
        let track = self.track_of(actor, space, gfn)?;
        let _ = track.track(gfn).map_err(TrackWriteError::Count)?;
        // Also when it was tracked already: who did that may not have come this far.
        if !mmu_core::busted!("track_without_protection") {
            self.write_protect_in(actor, &invalidation, Spaces::All, gfn, Level::L1);
        }
        drop(invalidation);
        Ok(())
    }

    /// Take one [`track_write`](Self::track_write) back. After the last, writes fault once more and
    /// are then allowed, and huge pages come back as faults ask for them. In a VM with shadow
    /// tables beside, which count in the same place, use the VM's.
    ///
    /// # Errors
    /// [`TrackWriteError`].
    #[doc(alias = "kvm_write_track_remove_gfn")]
    pub fn untrack_write(
        &self,
        actor: &mut Actor<H>,
        space: u16,
        gfn: Gfn,
    ) -> Result<(), TrackWriteError> {
        self.assert_own(actor);
        let track = self.track_of(actor, space, gfn)?;
        track.untrack(gfn).map(|_| ()).map_err(TrackWriteError::Count)
    }

    fn track_of(
        &self,
        actor: &mut Actor<H>,
        space: u16,
        gfn: Gfn,
    ) -> Result<Arc<PageTrack>, TrackWriteError> {
        let work = actor.pinned();
        let slots = work.vm.slots().read(&work.section);
        let slot = slots.find(space, gfn).ok_or(TrackWriteError::NoSlot { space, gfn })?;
        let track = slots.meta(space, slot.id).and_then(SlotMeta::track);
        track.cloned().ok_or(TrackWriteError::NotEnabled)
    }

    /// Write-protect the leaf at `min_level` or above that maps `gfn` in address space `space`: the
    /// guest's next write faults, and only a fault that maps the page anew makes it writable
    /// again. Flushed when this returns. Was there anything to protect?
    ///
    /// Nothing of a mirror is protected. A huge leaf is protected as a whole. To keep faults from
    /// making the page writable, track it first.
    #[doc(alias = "kvm_tdp_mmu_write_protect_gfn")]
    pub fn write_protect_gfn(
        &self,
        actor: &mut Actor<H>,
        space: u16,
        gfn: Gfn,
        min_level: Level,
    ) -> bool {
        let vm = self.vm();
        let range = GfnRange::from_len(gfn, 1);
        let invalidation = vm.invalidate(actor.participant(), range);
        let found = self.write_protect_in(actor, &invalidation, Spaces::One(space), gfn, min_level);
        drop(invalidation);
        found
    }

    /// The same inside an invalidation of `gfn`.
    pub(crate) fn write_protect_in(
        &self,
        actor: &mut Actor<H>,
        invalidation: &Invalidation<'_>,
        spaces: Spaces,
        gfn: Gfn,
        min_level: Level,
    ) -> bool {
        self.assert_own(actor);
        if gfn >= self.config().max_gfn_exclusive() {
            return false;
        }
        let mut debt = FlushDebt::new();
        let mut found = false;
        for index in self.changeable_roots() {
            let work = actor.shared();
            // Invalid roots too: a vCPU may still run on one.
            let Some(root) = self.roots().get(index, RootFilter::InUse) else { continue };
            if spaces != Spaces::All && spaces != Spaces::One(root.role.space()) {
                continue;
            }
            let section = work.section.epoch();
            let change = self.change(work.vm, work.stats, section, root.role.space());
            loop {
                match protect_tree(&change, section, root, gfn, min_level) {
                    Some(Done::Protected(level)) => {
                        // Also where W was clear already: see the file's head.
                        if !mmu_core::busted!("protect_without_flush") {
                            change.owe(&mut debt, GfnRange::entry(gfn, level));
                        }
                        found = true;
                    }
                    Some(Done::Nothing) => {}
                    None => {
                        relax();
                        continue;
                    }
                }
                break;
            }
        }
        pay_inside(actor, invalidation, GfnRange::from_len(gfn, 1), debt);
        found
    }
}

impl<F: SpteFormat, H: Host> DirectTables<H> for TdpMmu<F, H> {
    fn protect_in(&self, actor: &mut Actor<H>, invalidation: &Invalidation<'_>, gfn: Gfn) {
        self.write_protect_in(actor, invalidation, Spaces::All, gfn, Level::L1);
    }
}

/// Protect the leaf that maps `gfn`; `None` when the table that has it is being taken away, to be
/// tried again from the root.
fn protect_tree<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    section: &EpochGuard<'_>,
    root: FoundRoot,
    gfn: Gfn,
    min_level: Level,
) -> Option<Done> {
    let (mut frame, mut level) = (root.frame, root.role.level());
    while level >= min_level {
        let cell = change.pool().table(section, frame).cell(gfn, level);
        let mut old = cell.load();
        // Each failure means that another thread or the CPU changed the entry in between, as in
        // `Change::zap_leaf`.
        while old.is_leaf(level) {
            let new = change.config.write_protected(old);
            if new == old {
                return Some(Done::Nothing);
            }
            match change.set(cell, old, new, gfn, level) {
                Ok(()) => return Some(Done::Protected(level)),
                Err(current) => old = current,
            }
        }
        if old.is_frozen() {
            return None;
        }
        if !old.is_table(level) {
            break;
        }
        frame = change.config.pfn(old);
        level = level.down()?;
    }
    Some(Done::Nothing)
}
