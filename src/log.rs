//! The dirty log over every MMU of the VM.
//!
//! Adds to [`Vm`] the calls that hand out a slot's bits (KVM rows 3.43 to 3.47, 4.57). There is one
//! log for a slot, and either MMU marks in it. The one that hands out takes the bits first, then
//! both protect the pages, flushed, then the answer is given: a write in between is in the answer,
//! whose pages are read after the call (invariant I9).
//!
//! Before the first bit is taken whoever has made an entry writable has marked it: direct faults do
//! both in a section, which the direct harvest drains; shadow faults with the writer held, which is
//! asked for once.

use core::fmt;

use mmu_core::addr::{Gfn, to_index, to_u64};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;
use shadow_mmu::{ShadowLogError, WriterLock};
use tdp_mmu::LogError;

use crate::vm::{Shadow, Vm};

/// Pages in a word.
const WORD: u64 = 64;

/// A log could not be read or cleared. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmLogError {
    /// As direct tables say.
    Direct(LogError),
    /// As shadow tables alone say.
    Shadow(ShadowLogError),
    /// Shadow tables alone have no such call.
    NeedsDirect,
}

impl fmt::Display for VmLogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct(error) => error.fmt(f),
            Self::Shadow(error) => error.fmt(f),
            Self::NeedsDirect => f.write_str("a VM of shadow tables only logs to one bitmap"),
        }
    }
}

impl core::error::Error for VmLogError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Direct(error) => Some(error),
            Self::Shadow(error) => Some(error),
            Self::NeedsDirect => None,
        }
    }
}

impl<F: SpteFormat, H: Host, L: WriterLock<F, H>> Vm<F, H, L> {
    /// Read the bits of a slot and clear them: the pages that the guest, or a guest of its own,
    /// wrote since the last call. How many are there? As
    /// [`TdpMmu::harvest_log`](tdp_mmu::TdpMmu::harvest_log).
    ///
    /// # Errors
    /// [`VmLogError`]; nothing changed.
    #[doc(alias = "KVM_GET_DIRTY_LOG")]
    pub fn harvest_log(
        &self,
        actor: &mut Actor<H>,
        (space, id): (u16, u16),
        words: &mut [u64],
    ) -> Result<u64, VmLogError> {
        self.await_marks();
        let Some(direct) = self.tdp() else {
            let Some(Shadow { mmu, lock }) = self.shadow() else { return Ok(0) };
            return mmu.harvest_log(actor, lock, space, id, words).map_err(VmLogError::Shadow);
        };
        let taken = direct.harvest_log(actor, space, id, words).map_err(VmLogError::Direct)?;
        self.protect(actor, (space, id), 0, words);
        Ok(taken.pages)
    }

    /// Read the bits of a slot and leave them, as [`TdpMmu::peek_log`](tdp_mmu::TdpMmu::peek_log).
    ///
    /// # Errors
    /// [`VmLogError`]; nothing changed.
    pub fn peek_log(
        &self,
        actor: &mut Actor<H>,
        (space, id): (u16, u16),
        words: &mut [u64],
    ) -> Result<u64, VmLogError> {
        let direct = self.tdp().ok_or(VmLogError::NeedsDirect)?;
        self.await_marks();
        let seen = direct.peek_log(actor, space, id, words).map_err(VmLogError::Direct)?;
        Ok(seen.pages)
    }

    /// Clear bits of `pages` pages from page `first` of a slot, and notice the next write to each,
    /// as [`TdpMmu::clear_log`](tdp_mmu::TdpMmu::clear_log).
    ///
    /// # Errors
    /// [`VmLogError`]; nothing changed.
    #[doc(alias = "KVM_CLEAR_DIRTY_LOG")]
    pub fn clear_log(
        &self,
        actor: &mut Actor<H>,
        slot: (u16, u16),
        first: u64,
        pages: u64,
        bits: &[u64],
    ) -> Result<u64, VmLogError> {
        let direct = self.tdp().ok_or(VmLogError::NeedsDirect)?;
        let done = direct.clear_log(actor, slot, first, pages, bits).map_err(VmLogError::Direct)?;
        // More than were set, perhaps: those fault once and are marked again.
        self.protect(actor, slot, first, bits);
        Ok(done.pages)
    }

    /// Free the harvested entries of every ring, and notice the next write to each page in them, as
    /// [`TdpMmu::reset_rings`](tdp_mmu::TdpMmu::reset_rings).
    ///
    /// # Errors
    /// [`VmLogError`]; rings before the one that it names were reset.
    #[doc(alias = "KVM_RESET_DIRTY_RINGS")]
    pub fn reset_rings(&self, actor: &mut Actor<H>) -> Result<u64, VmLogError> {
        let direct = self.tdp().ok_or(VmLogError::NeedsDirect)?;
        let done = direct.reset_rings_beside(actor, |actor, space, base, mask| {
            if let Some(Shadow { mmu, lock }) = self.shadow() {
                mmu.protect_marked(actor, lock, space, base, mask);
            }
        });
        done.map(|done| done.pages).map_err(VmLogError::Direct)
    }

    /// Whoever has made a shadow entry writable has marked its page when this returns.
    fn await_marks(&self) {
        if let Some(Shadow { lock, .. }) = self.shadow() {
            lock.with(|_| ());
        }
    }

    /// Take write access to pages of a slot away in shadow tables: a bit each, from page `first`.
    fn protect(&self, actor: &mut Actor<H>, (space, id): (u16, u16), first: u64, words: &[u64]) {
        let Some(Shadow { mmu, lock }) = self.shadow() else { return };
        if mmu_core::busted!("harvest_forgets_the_shadow") {
            return;
        }
        let Some((base, pages)) = self.place_of(actor, (space, id)) else { return };
        for (number, word) in words.iter().enumerate() {
            let page = first + to_u64(number) * WORD;
            let left = pages.saturating_sub(page).min(WORD);
            let inside = if left == WORD { u64::MAX } else { (1 << left) - 1 };
            let mask = word & inside;
            if mask != 0 {
                mmu.protect_marked(actor, lock, space, base.saturating_add(page), mask);
            }
        }
        debug_assert!(to_index(pages) >= words.len().saturating_sub(1), "words of the slot");
    }

    fn place_of(&self, actor: &mut Actor<H>, (space, id): (u16, u16)) -> Option<(Gfn, u64)> {
        let work = actor.pinned();
        let slots = work.vm.slots().read(&work.section);
        slots.by_id(space, id).map(|slot| (slot.base_gfn, slot.npages))
    }
}
