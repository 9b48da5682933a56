//! Writes that somebody wants to see, in every MMU of the VM.
//!
//! Adds to [`Vm`]: write tracking for others than the MMUs themselves (KVM rows 3.54, 4.51, 6.16),
//! and what becomes of a write that was seen (rows 4.52, 4.54). The counts are the slots', which
//! faults of either MMU ask.

use core::fmt;

use mmu_core::addr::{Gfn, GfnRange, Gpa};
use mmu_core::direct::DirectTables;
use mmu_core::slot::{SlotError, SlotWriter, TrackError};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;
use shadow_mmu::WriterLock;

use crate::vm::{Shadow, Vm};

/// A page was not tracked, or not released. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WatchError {
    /// No slot of the address space has the page, or the VM tracks no pages
    /// ([`Vm::enable_tracking`]).
    NoSlot {
        /// Address space.
        space: u16,
        /// The page.
        gfn: Gfn,
    },
    /// The count would not change.
    Count(TrackError),
}

impl fmt::Display for WatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSlot { space, gfn } => {
                write!(f, "no slot of address space {space} counts trackers of gfn {gfn}")
            }
            Self::Count(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for WatchError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Count(error) => Some(error),
            Self::NoSlot { .. } => None,
        }
    }
}

impl<F: SpteFormat, H: Host, L: WriterLock<F, H>> Vm<F, H, L> {
    /// From now on pages can be tracked. A nested VM begins so.
    ///
    /// # Errors
    /// [`SlotError::NoMemory`]; nothing changed.
    pub fn enable_tracking(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
    ) -> Result<(), SlotError> {
        self.core().enable_write_tracking(writer, actor)
    }

    /// Write-protect `gfn` and keep it so, in every address space and every MMU, until as many
    /// [`untrack_write`](Self::untrack_write)s: faults of writes are
    /// [`FaultOutcome::WriteProtected`](mmu_core::fault::FaultOutcome), and no huge page is mapped
    /// over it. Flushed when this returns: every later write faults.
    ///
    /// # Errors
    /// [`WatchError`].
    #[doc(alias = "kvm_write_track_add_gfn")]
    pub fn track_write(
        &self,
        actor: &mut Actor<H>,
        space: u16,
        gfn: Gfn,
    ) -> Result<(), WatchError> {
        // No slot changes before it ends, so the counts are still the slot's when it does.
        let range = GfnRange::from_len(gfn, 1);
        let invalidation = self.core().invalidate(actor.participant(), range);
        let track = actor.page_track(space, gfn).ok_or(WatchError::NoSlot { space, gfn })?;
        let _ = track.track(gfn).map_err(WatchError::Count)?;
        // Also when it was tracked already: who did that may not have come this far.
        if let Some(direct) = self.tdp() {
            direct.protect_in(actor, &invalidation, gfn);
        }
        if let Some(Shadow { mmu, lock }) = self.shadow() {
            mmu.protect_in(actor, lock, &invalidation, gfn);
        }
        drop(invalidation);
        Ok(())
    }

    /// Take one [`track_write`](Self::track_write) back. Counts end with their slot: of one that
    /// was deleted or moved there is nothing to take back.
    ///
    /// # Errors
    /// [`WatchError`].
    #[doc(alias = "kvm_write_track_remove_gfn")]
    pub fn untrack_write(
        &self,
        actor: &mut Actor<H>,
        space: u16,
        gfn: Gfn,
    ) -> Result<(), WatchError> {
        let track = actor.page_track(space, gfn).ok_or(WatchError::NoSlot { space, gfn })?;
        let taken = match self.shadow() {
            // Shadows count in the same place, and keep what they count.
            Some(Shadow { lock, .. }) => lock.with(|writer| writer.untrack(&track, gfn)),
            None => track.untrack(gfn),
        };
        taken.map(|_| ()).map_err(WatchError::Count)
    }

    /// The emulator or the host wrote `bytes` bytes of guest memory from `at` on: shadows of tables
    /// there follow. Call after the write and before the vCPU goes on.
    #[doc(alias = "kvm_mmu_track_write")]
    pub fn guest_wrote(&self, actor: &mut Actor<H>, at: Gpa, bytes: u64) {
        if let Some(Shadow { lock, .. }) = self.shadow() {
            lock.with(|writer| writer.guest_wrote(actor, at, bytes));
        }
    }

    /// Give up the shadows of the table in `gfn`, so that the guest may write to it without an
    /// exit. Was there any?
    #[doc(alias = "kvm_mmu_unprotect_gfn_and_retry")]
    pub fn unprotect(&self, actor: &mut Actor<H>, gfn: Gfn) -> bool {
        self.shadow().is_some_and(|shadow| shadow.lock.with(|writer| writer.unprotect(actor, gfn)))
    }
}
