//! The dirty log over shadow tables: by write protection, through reverse maps.
//!
//! Adds to [`ShadowMmu`] what enabling, harvesting and clearing a slot's log mean for its entries
//! (KVM rows 3.43 to 3.46 as far as they concern rmaps, 4.57). A page that is logged is mapped
//! small and writable only by a fault that marks it, with the writer held; a harvest takes the
//! marks and the write permissions with the writer held too, and its flush is paid before the words
//! are given out (invariants I9, I10).

use alloc::sync::Arc;
use core::fmt;

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Level, to_index, to_u64};
use mmu_core::slot::{DirtyLog, Memslot};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::{Host, HostPage};
use mmu_core::vm::Actor;

use crate::mmu::ShadowMmu;
use crate::page::ShadowPage;
use crate::rmap::RmapKey;
use crate::spte_ref::SpteRef;
use crate::writer::{ShadowWriter, Work, WriterLock};
use crate::zap::{Dropped, ShadowZap};

/// Pages in a word.
const WORD: u64 = 64;
/// Words that are harvested before others have a turn with the writer.
const SLICE: usize = 8;

/// Why a log was not harvested. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShadowLogError {
    /// There is no such slot.
    NoSlot {
        /// Address space.
        space: u16,
        /// The slot.
        id: u16,
    },
    /// The slot's writes are not logged in a bitmap.
    NotLogged {
        /// The slot.
        id: u16,
    },
    /// The buffer is not one word for each 64 pages.
    BufferSize {
        /// Words given.
        words: usize,
        /// Words wanted.
        wanted: usize,
    },
}

impl fmt::Display for ShadowLogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSlot { space, id } => write!(f, "address space {space} has no slot {id}"),
            Self::NotLogged { id } => write!(f, "slot {id} has no dirty bitmap"),
            Self::BufferSize { words, wanted } => {
                write!(f, "a buffer of {words} words for a log of {wanted}")
            }
        }
    }
}

impl core::error::Error for ShadowLogError {}

impl<F: SpteFormat, H: Host> ShadowMmu<F, H> {
    /// The slot's writes are logged from now on: the set of slots says so already. Its pages lose
    /// write access, larger ones go and come back small; beside direct tables they are split as far
    /// as memory goes, so that a nested guest has no faults to take for what it only reads (KVM row
    /// 4.57). Flushed when this returns.
    #[doc(alias = "kvm_shadow_mmu_try_split_huge_pages")]
    pub fn log_enabled<L: WriterLock<F, H>>(&self, actor: &mut Actor<H>, lock: &L, slot: &Memslot) {
        let (space, range) = (slot.as_id, slot.range());
        let mut at = range.start;
        while at < range.end {
            at = lock.with(|writer| {
                let split = self.beside().is_some() && writer.split_over(actor, space, at);
                writer.work(actor, |work| {
                    if split {
                        // What is small was huge in TLBs, and may have been writable there alone.
                        work.owe(at.align_down(Level::L2), Level::L2.pages());
                    }
                    work.protect_slice(space, range, at)
                })
            });
        }
    }

    /// The slot's writes are not logged any more: what stands small in a row although the host has
    /// huge pages goes, and comes back huge by a fault (KVM row 4.58). Entries that stand for small
    /// pages of the guest stay. Flushed when this returns; the host's resolver is asked with
    /// nothing held.
    #[doc(alias = "kvm_mmu_zap_collapsible_sptes")]
    pub fn log_disabled<L: WriterLock<F, H>>(
        &self,
        actor: &mut Actor<H>,
        lock: &L,
        slot: &Memslot,
    ) {
        let end = slot.range().end;
        let space = slot.as_id;
        let mut at = slot.range().start;
        while let Some(gfn) = self.rmaps().next(space, Level::L1, at, end) {
            let block = GfnRange::entry(gfn, Level::L2);
            at = block.end;
            // The slot's bounds first: what lies outside it is not asked about (KVM row 4.58).
            if !slot.range().covers(block) {
                continue;
            }
            // Nor is a page that nothing maps: the host may have to find one.
            let Some(gfn) = lock.with(|writer| writer.first_in_row(space, block)) else { continue };
            let huge = |page: HostPage| page.level > Level::L1;
            if actor.vm().host().resolve(slot, gfn, Access::READ).is_ok_and(huge) {
                lock.with(|writer| writer.work(actor, |work| work.drop_rows(space, block)));
            }
        }
    }

    /// Take the slot's marks into `words`, a bit a page from its first page on, and make the pages
    /// clean. Complete: a write made before the call is in `words` or in those of the next call; a
    /// write after it marks the page again. How many pages were dirty?
    ///
    /// With direct tables beside, their MMU takes the marks, and this MMU is asked to
    /// [`protect`](Self::protect_marked) them before its flush.
    ///
    /// # Errors
    /// [`ShadowLogError`].
    pub fn harvest_log<L: WriterLock<F, H>>(
        &self,
        actor: &mut Actor<H>,
        lock: &L,
        space: u16,
        id: u16,
        words: &mut [u64],
    ) -> Result<u64, ShadowLogError> {
        let (slot, log) = self.log_of(actor, space, id)?;
        let wanted = to_index(slot.npages.div_ceil(WORD));
        if words.len() != wanted {
            return Err(ShadowLogError::BufferSize { words: words.len(), wanted });
        }
        let mut dirty = 0;
        let mut first = 0;
        for part in words.chunks_mut(SLICE) {
            lock.with(|writer| {
                writer.work(actor, |work| {
                    for (number, word) in (first..).zip(part.iter_mut()) {
                        *word = log.take(number, u64::MAX);
                        dirty += u64::from(word.count_ones());
                        let base = slot.base_gfn.saturating_add(number * WORD);
                        work.protect_mask(space, base, *word);
                    }
                });
            });
            first += to_u64(part.len());
        }
        Ok(dirty)
    }

    /// Take write access to the pages of `mask`, bit by bit from `base` on, away; flushed when this
    /// returns.
    #[doc(alias = "kvm_arch_mmu_enable_log_dirty_pt_masked")]
    pub fn protect_marked<L: WriterLock<F, H>>(
        &self,
        actor: &mut Actor<H>,
        lock: &L,
        space: u16,
        base: Gfn,
        mask: u64,
    ) {
        lock.with(|writer| writer.work(actor, |work| work.protect_mask(space, base, mask)));
    }

    fn log_of(
        &self,
        actor: &mut Actor<H>,
        space: u16,
        id: u16,
    ) -> Result<(Memslot, Arc<DirtyLog>), ShadowLogError> {
        let work = actor.pinned();
        let slots = work.vm.slots().read(&work.section);
        let slot = slots.by_id(space, id).copied().ok_or(ShadowLogError::NoSlot { space, id })?;
        let log = slots.meta(space, id).and_then(|meta| meta.log()).cloned();
        let log = log.filter(|log| log.has_bitmap());
        Ok((slot, log.ok_or(ShadowLogError::NotLogged { id })?))
    }
}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// Split the huge leaves over `gfn`, as far as memory goes. Was there any?
    fn split_over(&mut self, actor: &mut Actor<H>, space: u16, gfn: Gfn) -> bool {
        let mut any = false;
        while let Some(leaf) = self.splittable(actor, space, gfn) {
            if !self.work_with_frames(actor, |work, cache| work.split(cache, leaf)) {
                break;
            }
            any = true;
        }
        any
    }

    /// The first page of `range` that a small leaf maps that stands in a row.
    fn first_in_row(&self, space: u16, range: GfnRange) -> Option<Gfn> {
        let mut at = range.start;
        loop {
            let gfn = self.rmap.rmaps().next(space, Level::L1, at, range.end)?;
            if self.entry_in_row(RmapKey { space, level: Level::L1, gfn }).is_some() {
                return Some(gfn);
            }
            at = gfn.saturating_add(1);
        }
    }

    fn entry_in_row(&self, key: RmapKey) -> Option<SpteRef> {
        let in_row =
            |spte: &SpteRef| self.pages.get(spte.page()).is_some_and(ShadowPage::is_direct);
        self.rmap.entries(key).find(in_row)
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    /// Take out the small leaves of a block that stand in a row.
    fn drop_rows(&mut self, space: u16, block: GfnRange) {
        let mut left = block;
        while let Some(gfn) = self.writer.first_in_row(space, left) {
            let key = RmapKey { space, level: Level::L1, gfn };
            while let Some(spte) = self.writer.entry_in_row(key) {
                if !matches!(self.drop_entry(spte), Dropped::Leaf(_)) {
                    return self.broken();
                }
            }
            left.start = gfn.saturating_add(1);
        }
    }

    /// Protect the pages whose bits are set.
    fn protect_mask(&mut self, space: u16, base: Gfn, mut mask: u64) {
        while mask != 0 {
            let bit = u64::from(mask.trailing_zeros());
            mask &= mask - 1;
            self.write_protect(space, base.saturating_add(bit));
        }
    }

    /// Protect a block of 2 MiB of a slot, from `at` on; where to go on.
    fn protect_slice(&mut self, space: u16, range: GfnRange, at: Gfn) -> Gfn {
        let mut gone = ShadowZap::default();
        for level in [Level::L2, Level::L3] {
            // INVARIANT[I10]: nothing larger than 4 KiB is written unseen.
            self.zap_list(RmapKey { space, level, gfn: at }, &mut gone);
        }
        let end = at.align_down(Level::L2).saturating_add(Level::L2.pages()).min(range.end);
        let mut gfn = at;
        while let Some(next) = self.writer.rmap.rmaps().next(space, Level::L1, gfn, end) {
            self.write_protect(space, next);
            gfn = next.saturating_add(1);
        }
        end
    }
}
