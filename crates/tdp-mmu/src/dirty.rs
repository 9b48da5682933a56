//! Dirty logging: which pages did the guest write (KVM rows 3.39 to 3.48)?
//!
//! Owns [`DirtyTracking`] (how a write is noticed), the calls that hand out a slot's bits
//! ([`TdpMmu::harvest_log`], [`TdpMmu::peek_log`], [`TdpMmu::clear_log`]), what enabling and
//! disabling cost, and the marks that faults and zaps leave. The bits are in
//! [`mmu_core::slot::DirtyLog`]; protecting entries again is in `rearm`.
//!
//! Why no write is missed: who makes an entry writable marks the page *afterwards*; a harvest takes
//! the bit *first*, protects the entry, and flushes before it hands the bit out. So either the bit
//! is taken and the entry is protected after the grant, or the mark is still there for the next
//! harvest. A harvest begins by waiting for the sections that are open, so the mark of a write that
//! happened before the call is there. A whole argument with all the pairs is in `docs/LOCKING.md`.
//!
//! Locking: Shared sections of at most one table; no Exclusive (upstream takes its lock for
//! writing here). Faults go on meanwhile.

use alloc::sync::Arc;
use core::fmt;

use mmu_core::addr::{Gfn, GfnRange, to_index, to_u64};
use mmu_core::dirty::{DirtyRing, WORD_PAGES};
use mmu_core::slot::{DirtyLog, Memslot};
use mmu_core::spte::{AdType, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::trace::Event;
use mmu_core::traits::Host;
use mmu_core::vm::{Actor, MarkError, SlotCopy, mark};

use arrayvec::ArrayVec;

use crate::collapse::CollapseReport;
use crate::leaf::LeafLog;
use crate::mmu::TdpMmu;
use crate::rearm::{Rearm, Run};
use crate::split::SplitReport;
use crate::vcpu::TdpVcpu;

/// How writes to logged slots are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyTracking {
    /// Entries are not writable; the first write to each faults. Works everywhere.
    WriteProtect,
    /// Entries are writable and clean; a harvest looks for D in all entries of the slot. The guest
    /// takes no fault; the harvest reads every entry. Where D is not to be had (no hardware A/D, or
    /// its use is for accesses only), the same as [`WriteProtect`](Self::WriteProtect).
    DirtyBit,
    /// Entries are writable and clean; the CPU writes the address of a page that it dirties to a
    /// log (PML), which the embedder hands over with [`TdpVcpu::log_hardware`]. Without D, the same
    /// as [`WriteProtect`](Self::WriteProtect).
    #[doc(alias = "PML")]
    HardwareLog,
}

/// What a call handed out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Harvest {
    /// Pages whose bit is in the answer.
    pub pages: u64,
    /// Entries that were looked at, the walks to them not counted.
    pub entries: u64,
    /// Huge leaves that were split on the way.
    pub splits: u64,
}

/// A log could not be read or cleared. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LogError {
    /// There is no such slot.
    NoSuchSlot {
        /// Address space.
        as_id: u16,
        /// Slot number.
        id: u16,
    },
    /// Writes to the slot are not logged.
    NotLogged {
        /// Address space.
        as_id: u16,
        /// Slot number.
        id: u16,
    },
    /// The VM logs to rings only.
    NoBitmap,
    /// The VM has no rings.
    NoRings,
    /// Another thread resets the rings.
    ResetBusy,
    /// The buffer has not one word for each 64 pages.
    BufferSize {
        /// Words given.
        words: usize,
        /// Words needed.
        wanted: usize,
    },
    /// The pages to clear do not begin at a multiple of 64, do not end at one or at the slot's end,
    /// or are not in the slot (KVM row 3.45).
    ClearRange {
        /// First page.
        first: u64,
        /// Number of pages.
        pages: u64,
        /// Pages of the slot.
        slot_pages: u64,
    },
}

impl fmt::Display for LogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoSuchSlot { as_id, id } => write!(f, "there is no slot {as_id}:{id}"),
            Self::NotLogged { as_id, id } => {
                write!(f, "writes to slot {as_id}:{id} are not logged; set LOG_DIRTY")
            }
            Self::NoBitmap => f.write_str("this VM logs to rings only, it has no bitmaps"),
            Self::NoRings => f.write_str("this VM has no dirty rings"),
            Self::ResetBusy => f.write_str("another thread resets the dirty rings"),
            Self::BufferSize { words, wanted } => {
                write!(f, "a buffer of {words} words where the slot needs {wanted}")
            }
            Self::ClearRange { first, pages, slot_pages } => write!(
                f,
                "{pages} pages from page {first} of a slot of {slot_pages}: not in whole words of \
                 64 pages inside the slot"
            ),
        }
    }
}

impl core::error::Error for LogError {}

/// Has `words` one word for each 64 of `pages` pages?
fn has_words(words: &[u64], pages: u64) -> Result<(), LogError> {
    let (words, wanted) = (words.len(), to_index(pages.div_ceil(WORD_PAGES)));
    if words == wanted { Ok(()) } else { Err(LogError::BufferSize { words, wanted }) }
}

/// The bits of `mask` for which page `base + bit` lies in a slot of `pages` pages.
fn in_slot(base: u64, mask: u64, pages: u64) -> u64 {
    match pages.checked_sub(base) {
        None | Some(0) => 0,
        Some(left) if left >= WORD_PAGES => mask,
        Some(left) => mask & ((1 << left) - 1),
    }
}

impl Harvest {
    /// Add the counts of another.
    pub const fn merge(&mut self, other: Self) {
        self.pages += other.pages;
        self.entries += other.entries;
        self.splits += other.splits;
    }
}

/// A slot that is logged, as found.
struct Logged {
    slot: Memslot,
    log: Arc<DirtyLog>,
}

impl Logged {
    /// The gfns that are logged.
    fn range(&self) -> GfnRange {
        let pages = self.log.pages();
        let start = self.slot.base_gfn.saturating_add(pages.start);
        GfnRange::from_len(start, pages.end - pages.start)
    }
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// How writes are noticed, given what the CPU offers.
    #[inline]
    #[must_use]
    pub fn dirty_tracking(&self) -> DirtyTracking {
        match self.options().dirty {
            _ if self.config().capabilities().ad_type() != AdType::Enabled => {
                DirtyTracking::WriteProtect
            }
            // A ring lists events, and a D bit that is found later is none.
            DirtyTracking::DirtyBit if !self.vm().rings().is_empty() => DirtyTracking::WriteProtect,
            wanted => wanted,
        }
    }

    /// What the log of a slot asks of an entry for `gfn`.
    #[inline(always)]
    pub(crate) fn leaf_log(&self, kept: &SlotCopy, gfn: Gfn, write: bool) -> LeafLog {
        if kept.slot().logs_dirty() { self.logged_leaf(kept, gfn, write) } else { LeafLog::Off }
    }

    #[cold]
    fn logged_leaf(&self, kept: &SlotCopy, gfn: Gfn, write: bool) -> LeafLog {
        // What a mirror maps is not logged.
        if kept.log_of(gfn).is_none() || self.external().is_some() {
            return LeafLog::Off;
        }
        match (self.dirty_tracking(), write) {
            (DirtyTracking::WriteProtect, false) => LeafLog::Protected,
            (DirtyTracking::WriteProtect | DirtyTracking::HardwareLog, true) => LeafLog::Marked,
            (DirtyTracking::DirtyBit | DirtyTracking::HardwareLog, false) => LeafLog::Clean,
            (DirtyTracking::DirtyBit, true) => LeafLog::Dirty,
        }
    }

    /// Must the log be told when the fast path gives W back? Where the CPU does not tell itself.
    #[inline]
    pub(crate) fn must_mark(&self, kept: &SlotCopy, gfn: Gfn) -> bool {
        kept.log_of(gfn).is_some() && self.dirty_tracking() == DirtyTracking::WriteProtect
    }

    /// Mark a page of `kept`, which is logged, that was made writable. The ring had room when the
    /// fault began, and nobody else pushes.
    #[cold]
    pub(crate) fn mark_write(
        &self,
        kept: Option<&SlotCopy>,
        ring: Option<&DirtyRing>,
        stats: &StatsShard,
        gfn: Gfn,
    ) {
        let Some(kept) = kept else { return };
        if let Some(log) = kept.log_of(gfn) {
            stats.inc(Counter::PagesMarkedDirty);
            let slot = kept.slot();
            // INVARIANT[I9]: the entry is writable by now.
            let marked = mark(log, ring, slot, gfn.distance_from(slot.base_gfn));
            debug_assert!(marked.is_ok(), "room was asked for before the entry was changed");
            if ring.is_some() && marked.is_ok() {
                self.vm().trace(|| Event::RingPush { gfn });
            }
        }
    }

    /// Logging of `slot` was switched on: split, protect, and flush whatever is found (KVM row
    /// 3.39), unless the log starts with all bits set. When this returns every write to a logged
    /// page is logged.
    /// [`set_slot`](Self::set_slot) calls it; a VM with several MMUs calls it on each.
    ///
    /// The split is best effort: what it leaves for want of frames stays huge, protected, and is
    /// split by its first write.
    pub fn log_enabled(&self, actor: &mut Actor<H>, as_id: u16, id: u16) -> SplitReport {
        self.begin_log(actor, as_id, id, DirtyTracking::WriteProtect)
    }

    /// The slot was logged already, and other pages of it are from now on. As
    /// [`log_enabled`](Self::log_enabled), except that D bits that nobody has reported are kept.
    pub fn log_resized(&self, actor: &mut Actor<H>, as_id: u16, id: u16) -> SplitReport {
        self.begin_log(actor, as_id, id, self.dirty_tracking())
    }

    /// `was`: what has recorded writes until now.
    fn begin_log(
        &self,
        actor: &mut Actor<H>,
        as_id: u16,
        id: u16,
        was: DirtyTracking,
    ) -> SplitReport {
        let mut split = SplitReport::default();
        let Ok(target) = self.logged(actor, as_id, id) else { return split };
        let range = target.range();
        let mut pass = Rearm::new(self, as_id);
        if !target.log.starts_set() && !target.slot.is_read_only() {
            if self.options().eager_split {
                split = self.split(actor, as_id, range);
            }
            match was {
                DirtyTracking::DirtyBit => pass.collect(actor, range, (&target.slot, &target.log)),
                _ => pass.protect(actor, range),
            }
            // Whatever the pass found: an earlier pass may not have flushed yet. Where nothing is
            // protected now, each bit is taken by a harvest first, which flushes (KVM row 3.46).
            if !mmu_core::busted!("enable_without_flush") {
                pass.owe(actor, range);
            }
        }
        let _ = pass.finish(actor);
        split
    }

    /// Logging of `slot` was switched off: huge pages come back, if
    /// [`collapse_on_disable`](crate::TdpOptions::collapse_on_disable) says so (KVM row 3.29). What
    /// is writable stays so, what is not is made writable by its next write.
    /// [`set_slot`](Self::set_slot) calls it; a VM with several MMUs calls it on each.
    pub fn log_disabled(&self, actor: &mut Actor<H>, slot: &Memslot) -> CollapseReport {
        if self.options().collapse_on_disable {
            self.collapse(actor, slot.as_id, slot.range())
        } else {
            CollapseReport::default()
        }
    }

    /// Read the bits of a slot and clear them: the pages written since the last call (KVM row
    /// 3.44). Page `i` of the slot is bit `i % 64` of `words[i / 64]`; pages that are not logged
    /// are 0. A write after the call finds its bit clear and sets it again, flush included; read
    /// the pages after the call.
    ///
    /// Serialise with changes of the slot: a harvest that began before a move protects the slot's
    /// old place, and takes marks of its new one.
    ///
    /// # Errors
    /// [`LogError`]; nothing changed.
    #[doc(alias = "KVM_GET_DIRTY_LOG")]
    pub fn harvest_log(
        &self,
        actor: &mut Actor<H>,
        as_id: u16,
        id: u16,
        words: &mut [u64],
    ) -> Result<Harvest, LogError> {
        let target = self.logged_bits(actor, as_id, id)?;
        has_words(words, target.slot.npages)?;
        let mut pass = Rearm::new(self, as_id);
        self.begin_harvest(actor, &target, target.range(), &mut pass);
        let all = u64::MAX;
        self.take_words(actor, &target, 0, words, |_| all, &mut pass);
        Ok(pass.finish(actor))
    }

    /// Read the bits of a slot and leave them (the first half of manual protection, KVM row 3.44).
    /// [`clear_log`](Self::clear_log) clears them before the pages are read. Serialise both with
    /// changes of the slot.
    ///
    /// # Errors
    /// [`LogError`]; nothing changed.
    pub fn peek_log(
        &self,
        actor: &mut Actor<H>,
        as_id: u16,
        id: u16,
        words: &mut [u64],
    ) -> Result<Harvest, LogError> {
        let target = self.logged_bits(actor, as_id, id)?;
        has_words(words, target.slot.npages)?;
        let mut pass = Rearm::new(self, as_id);
        self.begin_harvest(actor, &target, target.range(), &mut pass);
        for (word, out) in (0u64..).zip(words.iter_mut()) {
            *out = target.log.peek(word);
            pass.report.pages += u64::from(out.count_ones());
        }
        Ok(pass.finish(actor))
    }

    /// Clear bits of `pages` pages from page `first` of a slot, and notice the next write to each
    /// (KVM row 3.45). `bits` has one word for each 64 pages; bits that are not set in the log are
    /// ignored. Both borders are multiples of 64; the slot's end counts as one.
    ///
    /// # Errors
    /// [`LogError`]; nothing changed.
    #[doc(alias = "KVM_CLEAR_DIRTY_LOG")]
    pub fn clear_log(
        &self,
        actor: &mut Actor<H>,
        (as_id, id): (u16, u16),
        first: u64,
        pages: u64,
        bits: &[u64],
    ) -> Result<Harvest, LogError> {
        let target = self.logged_bits(actor, as_id, id)?;
        let slot_pages = target.slot.npages;
        let end = first.checked_add(pages).filter(|end| *end <= slot_pages);
        let whole = |end: u64| end % WORD_PAGES == 0 || end == slot_pages;
        if first % WORD_PAGES != 0 || !end.is_some_and(whole) {
            return Err(LogError::ClearRange { first, pages, slot_pages });
        }
        has_words(bits, pages)?;
        let mut pass = Rearm::new(self, as_id);
        // Not collected: a page whose D nobody has reported keeps it. Nor waited for anybody: who
        // is making a page writable marks it afterwards, again if its bit is taken here.
        target.log.settle();
        let mask = |at: usize| bits.get(at).copied().unwrap_or(0);
        let mut taken = [0; Run::WORDS];
        for (index, chunk) in bits.chunks(Run::WORDS).enumerate() {
            let offset = index * Run::WORDS;
            let word = first / WORD_PAGES + to_u64(offset);
            if let Some(taken) = taken.get_mut(..chunk.len()) {
                self.take_words(actor, &target, word, taken, |at| mask(offset + at), &mut pass);
            }
        }
        Ok(pass.finish(actor))
    }

    /// Find a slot that is logged.
    fn logged(&self, actor: &mut Actor<H>, as_id: u16, id: u16) -> Result<Logged, LogError> {
        self.assert_own(actor);
        let work = actor.pinned();
        let slots = work.vm.slots().read(&work.section);
        let slot = *slots.by_id(as_id, id).ok_or(LogError::NoSuchSlot { as_id, id })?;
        let log = slots.meta(as_id, id).and_then(|meta| meta.log());
        let log = log.filter(|_| slot.logs_dirty()).ok_or(LogError::NotLogged { as_id, id })?;
        Ok(Logged { slot, log: Arc::clone(log) })
    }

    fn logged_bits(&self, actor: &mut Actor<H>, as_id: u16, id: u16) -> Result<Logged, LogError> {
        let target = self.logged(actor, as_id, id)?;
        if target.log.has_bitmap() { Ok(target) } else { Err(LogError::NoBitmap) }
    }

    /// Bring what was written before now into the bitmap.
    fn begin_harvest(
        &self,
        actor: &mut Actor<H>,
        target: &Logged,
        range: GfnRange,
        pass: &mut Rearm<'_, F, H>,
    ) {
        match self.dirty_tracking() {
            DirtyTracking::WriteProtect => {}
            DirtyTracking::HardwareLog if mmu_core::busted!("harvest_without_hardware_log") => {}
            DirtyTracking::HardwareLog => self.vm().host().sync_hardware_log(),
            DirtyTracking::DirtyBit => pass.collect(actor, range, (&target.slot, &target.log)),
        }
        // Who made an entry writable, or took a dirty one out, before this call, has marked it
        // when its section is over.
        if !mmu_core::busted!("harvest_without_drain") {
            actor.participant().synchronize();
        }
        // After the walk: a root that was quiet by then has raised the flag (see `roots_gone`).
        target.log.settle();
    }

    /// Take the bits of `words.len()` words from word `first` on, as far as `mask` has them, and
    /// notice the next write to each.
    fn take_words(
        &self,
        actor: &mut Actor<H>,
        target: &Logged,
        first: u64,
        words: &mut [u64],
        mask: impl Fn(usize) -> u64,
        pass: &mut Rearm<'_, F, H>,
    ) {
        for (index, chunk) in words.chunks_mut(Run::WORDS).enumerate() {
            let offset = index * Run::WORDS;
            let word = first + to_u64(offset);
            let mut run = Run::new(target.slot.base_gfn.saturating_add(word * WORD_PAGES));
            for (at, (out, bits)) in chunk.iter_mut().zip(&mut run.bits).enumerate() {
                // INVARIANT[I9]: first the bit, then the entry, and the flush before it is out.
                *out = target.log.take(word + to_u64(at), mask(offset + at));
                *bits = *out;
            }
            pass.report.pages += run.pages();
            if !run.is_empty() {
                pass.arm(actor, &run);
            }
        }
    }

    /// Free the harvested entries of every ring, and notice the next write to each page in them.
    /// Read the pages after this call (KVM row 3.47). Entries that the consumer has not marked
    /// stay.
    ///
    /// Serialise with changes of the slots. What the consumer wrote into the ring is not trusted:
    /// the pages are those that were pushed.
    ///
    /// # Errors
    /// [`LogError::NoRings`], [`LogError::ResetBusy`] while another thread is at it; rings before
    /// that one were reset.
    #[doc(alias = "KVM_RESET_DIRTY_RINGS")]
    pub fn reset_rings(&self, actor: &mut Actor<H>) -> Result<Harvest, LogError> {
        self.reset_rings_beside(actor, |_, _, _, _| {})
    }

    /// The same for a VM with another MMU beside this one: `protect_beside` notices the next write
    /// to the pages of a mask there too, flushed: address space, first page, and a bit for each of
    /// 64 pages.
    ///
    /// # Errors
    /// As [`reset_rings`](Self::reset_rings).
    pub fn reset_rings_beside(
        &self,
        actor: &mut Actor<H>,
        mut protect_beside: impl FnMut(&mut Actor<H>, u16, Gfn, u64),
    ) -> Result<Harvest, LogError> {
        self.assert_own(actor);
        let vm = Arc::clone(actor.vm());
        if vm.rings().is_empty() {
            return Err(LogError::NoRings);
        }
        let mut passes: ArrayVec<(u16, Rearm<'_, F, H>), 8> = ArrayVec::new();
        let mut busy = false;
        for ring in vm.rings() {
            let done = ring.reset(u64::MAX, |key, base, mask| {
                let Ok(target) = self.logged(actor, key.as_id, key.id) else { return };
                let mask = in_slot(base, mask, target.slot.npages);
                if mask == 0 {
                    return;
                }
                let at = passes.iter().position(|(space, _)| *space == key.as_id);
                let at = at.or_else(|| {
                    passes.try_push((key.as_id, Rearm::new(self, key.as_id))).ok()?;
                    Some(passes.len() - 1)
                });
                let Some((_, pass)) = at.and_then(|at| passes.get_mut(at)) else { return };
                let mut run = Run::new(target.slot.base_gfn.saturating_add(base));
                if let Some(word) = run.bits.first_mut() {
                    *word = mask;
                }
                pass.report.pages += run.pages();
                pass.arm(actor, &run);
                let base = target.slot.base_gfn.saturating_add(base);
                protect_beside(actor, key.as_id, base, mask);
            });
            match done {
                Ok(done) => vm.trace(|| Event::RingReset { entries: done.reset }),
                Err(_) => busy = true,
            }
        }
        let mut all = Harvest::default();
        for (_, pass) in passes {
            all.merge(pass.finish(actor));
        }
        if busy { Err(LogError::ResetBusy) } else { Ok(all) }
    }

    /// The trees of invalid roots are about to be taken apart unseen, D bits and all: where those
    /// are the log, everything counts as written. Before the roots become quiet, after the last
    /// vCPU has left them: a harvest that still walks them finds the bits, one that does not finds
    /// this.
    pub(crate) fn roots_gone(&self, actor: &mut Actor<H>) {
        if self.dirty_tracking() == DirtyTracking::DirtyBit {
            let work = actor.pinned();
            let slots = work.vm.slots().read(&work.section);
            slots.metas().filter_map(|(_, meta)| meta.log()).for_each(|log| log.set_all());
        }
    }
}

impl<F: SpteFormat, H: Host> TdpVcpu<F, H> {
    /// Hand over what the CPU logged: the guest physical addresses in its buffer, in any order,
    /// whatever they are (KVM row 3.48). Call at each exit, and for
    /// [`sync_hardware_log`](mmu_core::traits::TlbFlush::sync_hardware_log). Returns how many of
    /// them were pages of logged slots.
    #[doc(alias = "vmx_flush_pml_buffer")]
    ///
    /// # Errors
    /// [`MarkError`] when this vCPU's ring is full: pages from `next` on are not logged yet. A vCPU
    /// that stays out of the guest while its ring
    /// [`is_soft_full`](mmu_core::dirty::DirtyRing::is_soft_full) does not see it.
    pub fn log_hardware(&mut self, pages: impl IntoIterator<Item = Gfn>) -> Result<u64, MarkError> {
        let space = self.role.space();
        let mut marked = 0;
        for gfn in pages {
            marked += self.actor.mark_dirty(space, GfnRange::from_len(gfn, 1))?;
        }
        Ok(marked)
    }
}
