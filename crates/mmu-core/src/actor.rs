//! A thread's handle on a VM, and what it works with inside a section.
//!
//! Owns [`Actor`] (a thread's epoch record, its frame cache, its copy of the slot it used last),
//! the two kinds of section it opens ([`SharedWork`], [`PinnedWork`]), and marking pages dirty on
//! behalf of the host.

use alloc::sync::Arc;
use core::fmt;

use crate::addr::{Gfn, GfnRange, Level, Pfn};
use crate::dirty::{DirtyRing, RingFull, SlotKey};
use crate::epoch::{EpochGuard, Participant};
use crate::flush::{FlushDebt, FlushScope};
use crate::frame::{FrameList, MmuCache, OutOfFrames};
use crate::latency::Wait;
use crate::lock::Shared;
use crate::slot::{DirtyLog, Memslot, SlotMeta};
use crate::stats::{Counter, StatsShard};
use crate::traits::Host;
use crate::vm::VmCore;

/// A copy of a slot with what it carries, and of which set it is.
#[derive(Clone, Debug)]
pub struct SlotCopy {
    slot: Memslot,
    generation: u64,
    meta: SlotMeta,
}

impl SlotCopy {
    /// The slot.
    #[inline]
    #[must_use]
    pub const fn slot(&self) -> &Memslot {
        &self.slot
    }

    /// Generation of the set it is from.
    #[inline]
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// What it carries.
    #[inline]
    #[must_use]
    pub const fn meta(&self) -> &SlotMeta {
        &self.meta
    }

    /// Largest level, up to `cap`, at which an entry for `gfn` maps no page that is logged.
    #[inline]
    #[must_use]
    pub fn unlogged_level(&self, gfn: Gfn, cap: Level) -> Level {
        if self.slot.logs_dirty() { self.lower_for_log(gfn, cap) } else { cap }
    }

    #[cold]
    fn lower_for_log(&self, gfn: Gfn, cap: Level) -> Level {
        let Some(log) = self.meta.log() else { return cap };
        let mut level = cap;
        while let Some(below) = level.down() {
            // Relative to the slot; an entry that begins before it is not allowed anyway.
            let first = gfn.align_down(level).get().saturating_sub(self.slot.base_gfn.get());
            if !log.overlaps(first..first.saturating_add(level.pages())) {
                break;
            }
            level = below;
        }
        level
    }

    /// The log that a write to `gfn`, a page of the slot, must be recorded in.
    #[inline]
    #[must_use]
    pub fn log_of(&self, gfn: Gfn) -> Option<&Arc<DirtyLog>> {
        if !self.slot.logs_dirty() {
            return None;
        }
        self.meta.log().filter(|log| log.has(gfn.distance_from(self.slot.base_gfn)))
    }
}

/// Mark page `page` of `slot`, which is logged, in its bitmap and in `ring`.
///
/// # Errors
/// [`RingFull`]; nothing was marked.
pub fn mark(
    log: &DirtyLog,
    ring: Option<&DirtyRing>,
    slot: &Memslot,
    page: u64,
) -> Result<(), RingFull> {
    if let Some(ring) = ring {
        ring.push(SlotKey { as_id: slot.as_id, id: slot.id }, page)?;
    }
    log.set(page);
    Ok(())
}

/// A mark that found its ring full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkError {
    /// The first page that is not marked.
    pub next: Gfn,
    /// The ring.
    pub full: RingFull,
}

impl fmt::Display for MarkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {} is not marked dirty: {}", self.next, self.full)
    }
}

impl core::error::Error for MarkError {}

/// A slot as a fault found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundSlot {
    /// The slot, or `None` where the guest has no memory.
    pub slot: Option<Memslot>,
    /// Generation of the set it is from; check it with [`VmCore::slots`] inside the section in
    /// which it is used.
    pub generation: u64,
}

/// Pages that are marked dirty in one section: 4096 words of a bitmap.
const MARK_SLICE: u64 = 1 << 18;

/// A thread's handle on a VM: a vCPU, an ager, a notifier.
///
/// Having an `Actor` tells you: this thread has an epoch record of its own, and borrowing the
/// actor mutably proves that none of its sections is open.
pub struct Actor<H: Host> {
    vm: Arc<VmCore<H>>,
    pub(crate) participant: Participant,
    cache: MmuCache,
    slot: Option<SlotCopy>,
}

impl<H: Host> Actor<H> {
    pub(crate) fn new(vm: Arc<VmCore<H>>, participant: Participant) -> Self {
        Self { vm, participant, cache: MmuCache::new(), slot: None }
    }

    /// The VM.
    #[inline]
    #[must_use]
    pub fn vm(&self) -> &Arc<VmCore<H>> {
        &self.vm
    }

    /// The epoch membership.
    #[inline]
    pub fn participant(&mut self) -> &mut Participant {
        &mut self.participant
    }

    /// The VM and the epoch membership at once.
    #[inline]
    pub(crate) fn parts(&mut self) -> (&VmCore<H>, &mut Participant) {
        (&self.vm, &mut self.participant)
    }

    /// This thread's statistics.
    #[inline]
    #[must_use]
    pub fn stats(&self) -> &StatsShard {
        self.vm.stats().shard(self.participant.index())
    }

    /// Make sure that `min` table frames can be taken. Call with no section open, which the
    /// mutable borrow proves.
    ///
    /// # Errors
    /// [`OutOfFrames`]; nothing changed.
    #[inline]
    pub fn top_up(&mut self, min: usize) -> Result<(), OutOfFrames> {
        self.cache.top_up(self.vm.pool(), min)
    }

    /// Open a Shared section, with what work inside it needs.
    #[inline(always)]
    pub fn shared(&mut self) -> SharedWork<'_, H> {
        let Self { vm, participant, cache, slot } = self;
        let stats = vm.stats().shard(participant.index());
        let section = if H::ENABLED {
            let index = participant.index();
            let after = |start| vm.took(index, Wait::Shared, start);
            vm.lock().shared_measured(participant, || vm.now(), after)
        } else {
            vm.lock().shared(participant)
        };
        SharedWork { section, cache, vm, stats, slot }
    }

    /// Pin the epoch only: for lookups, aging and fast faults, which take no lock.
    #[inline(always)]
    pub fn pinned(&mut self) -> PinnedWork<'_, H> {
        let Self { vm, participant, slot, .. } = self;
        let stats = vm.stats().shard(participant.index());
        PinnedWork { section: participant.pin(), vm, stats, slot }
    }

    /// Take a frame that [`top_up`](Self::top_up) provided.
    #[inline]
    pub fn take_frame(&mut self) -> Option<Pfn> {
        self.cache.take()
    }

    /// Put a frame back that was not linked and is still empty.
    pub fn put_frame(&mut self, frame: Pfn) {
        if let Some(frame) = self.cache.put(frame) {
            let mut list = FrameList::new();
            list.push(self.vm.host(), frame);
            self.vm.pool().give_back(list);
        }
    }

    /// The slot that holds `gfn` in address space `space`. Costs two loads when it is the slot of
    /// the last call and no slot changed since.
    #[inline]
    #[must_use]
    pub fn find_slot(&mut self, space: u16, gfn: Gfn) -> FoundSlot {
        match &self.slot {
            Some(copy) if self.is_current(copy, space, gfn) => {
                FoundSlot { slot: Some(copy.slot), generation: copy.generation }
            }
            _ => self.look_up_slot(space, gfn),
        }
    }

    #[inline(always)]
    fn is_current(&self, copy: &SlotCopy, space: u16, gfn: Gfn) -> bool {
        let fits = copy.slot.contains(gfn) && copy.slot.as_id == space;
        fits && copy.generation == self.vm.slots().generation()
    }

    /// Find the slot that holds `gfn` in address space `space` and keep it; `false` where the guest
    /// has no memory. [`kept_slot`](Self::kept_slot) is then it, without a copy.
    #[inline(always)]
    #[must_use]
    pub fn keep_slot(&mut self, space: u16, gfn: Gfn) -> bool {
        let current = self.slot.as_ref().is_some_and(|copy| self.is_current(copy, space, gfn));
        current || self.look_up_slot(space, gfn).slot.is_some()
    }

    /// The slot of the last successful [`keep_slot`](Self::keep_slot). Check its generation with
    /// [`VmCore::slots`] inside the section in which it is used.
    #[inline(always)]
    #[must_use]
    pub fn kept_slot(&self) -> Option<&SlotCopy> {
        self.slot.as_ref()
    }

    #[cold]
    fn look_up_slot(&mut self, space: u16, gfn: Gfn) -> FoundSlot {
        self.stats().inc(Counter::SlotLookups);
        let section = self.participant.pin();
        let slots = self.vm.slots().read(&section);
        let generation = slots.generation();
        let slot = slots.find(space, gfn).copied();
        let meta = slot.and_then(|slot| slots.meta(slot.as_id, slot.id)).cloned();
        drop(section);
        if let Some(slot) = slot {
            self.slot = Some(SlotCopy { slot, generation, meta: meta.unwrap_or_default() });
        }
        FoundSlot { slot, generation }
    }

    /// Note that the host wrote pages of `range`, or let a device write them: those that are logged
    /// count as dirty (KVM row 6.13). Call after the write and before it is reported as done.
    /// Returns how many pages are logged.
    ///
    /// # Errors
    /// [`MarkError`]: this thread's ring is full. Pages before `next` are marked; harvest and reset
    /// the ring, then go on there.
    #[doc(alias = "mark_page_dirty")]
    pub fn mark_dirty(&mut self, space: u16, range: GfnRange) -> Result<u64, MarkError> {
        if self.vm.rings().is_empty() {
            return Ok(self.mark_in_slices(space, range));
        }
        let work = self.pinned();
        let slots = work.vm.slots().read(&work.section);
        let Some(ring) = work.vm.ring_of(&work.section) else { return Ok(0) };
        let mut marked = 0;
        for slot in slots.overlapping(space, range).filter(|slot| slot.logs_dirty()) {
            let Some(log) = slots.meta(space, slot.id).and_then(SlotMeta::log) else { continue };
            let both = slot.range().intersection(range);
            let first = both.start.distance_from(slot.base_gfn);
            // Not page by page over what is not logged: a slot may have billions of those.
            let logged = log.pages();
            for page in first.max(logged.start)..(first + both.len()).min(logged.end) {
                let next = slot.base_gfn.saturating_add(page);
                mark(log, Some(ring), slot, page).map_err(|full| MarkError { next, full })?;
                work.stats.inc(Counter::PagesMarkedDirty);
                marked += 1;
            }
        }
        Ok(marked)
    }

    /// Mark in bitmaps, which takes time for each page that is logged, without holding up who waits
    /// for sections.
    fn mark_in_slices(&mut self, space: u16, range: GfnRange) -> u64 {
        let mut left = range;
        let mut marked = 0;
        while !left.is_empty() {
            let work = self.pinned();
            let slots = work.vm.slots().read(&work.section);
            let Some(slot) = slots.overlapping(space, left).next() else { break };
            let here = slot.range().intersection(left);
            let pages = if slot.logs_dirty() { here.len().min(MARK_SLICE) } else { here.len() };
            let slice = GfnRange::from_len(here.start, pages);
            let count = slots.mark_dirty(space, slice);
            work.stats.add(Counter::PagesMarkedDirty, count);
            marked += count;
            left.start = slice.end;
        }
        marked
    }

    /// This thread's dirty ring.
    #[inline]
    #[must_use]
    pub fn ring(&self) -> Option<&DirtyRing> {
        self.vm.rings().get(self.participant.index())
    }

    /// Pay a debt; see [`VmCore::pay`].
    pub fn pay(&mut self, debt: FlushDebt, scope: FlushScope) {
        self.vm.pay(&mut self.participant, debt, scope);
    }
}

/// An open Shared section and its tools.
#[derive(Debug)]
pub struct SharedWork<'a, H: Host> {
    /// The section; ends when this drops.
    pub section: Shared<'a>,
    /// The thread's frames.
    pub cache: &'a mut MmuCache,
    /// The VM.
    pub vm: &'a VmCore<H>,
    /// The thread's statistics.
    pub stats: &'a StatsShard,
    /// The slot of the last [`Actor::keep_slot`].
    pub slot: &'a Option<SlotCopy>,
}

/// An open epoch section and its tools.
#[derive(Debug)]
pub struct PinnedWork<'a, H: Host> {
    /// The section; ends when this drops.
    pub section: EpochGuard<'a>,
    /// The VM.
    pub vm: &'a VmCore<H>,
    /// The thread's statistics.
    pub stats: &'a StatsShard,
    /// The slot of the last [`Actor::keep_slot`].
    pub slot: &'a Option<SlotCopy>,
}

impl<H: Host> Drop for Actor<H> {
    fn drop(&mut self) {
        self.cache.drain(self.vm.pool());
    }
}

impl<H: Host> fmt::Debug for Actor<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Actor")
            .field("index", &self.participant.index())
            .field("cached_frames", &self.cache.len())
            .finish_non_exhaustive()
    }
}
