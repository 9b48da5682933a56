//! What all MMUs of one VM share.
//!
//! Owns [`VmCore`]: lock, slots, invalidations, frames, logs, statistics, embedder. Here too:
//! paying a [`FlushDebt`], and the protocol of a slot change (KVM row 6.6). A thread uses it
//! through its [`Actor`].

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

pub use crate::actor::{Actor, FoundSlot, MarkError, PinnedWork, SharedWork, SlotCopy, mark};
use crate::dead::{Dead, DeadReason};
use crate::dirty::DirtyRing;
use crate::epoch::{EpochDomain, EpochError, EpochGuard, GiveUpCpu, Participant};
use crate::flush::{FlushDebt, FlushScope};
use crate::frame::TablePool;
use crate::latency::{Latencies, Wait};
use crate::lock::MmuLock;
use crate::notify::Invalidations;
use crate::paging::Paging;
use crate::slot::{
    DirtyLog, GENERATION_UPDATING, LogOptions, MAX_ADDRESS_SPACES, Memslot, PageTrack, SlotChange,
    SlotError, SlotLimits, SlotMeta, SlotRequest, SlotTable, SlotWriter, plan,
};
use crate::stats::{Counter, Stats};
use crate::trace::Event;
use crate::traits::Host;

/// The memory side of a VM.
#[doc(alias = "kvm_arch")]
pub struct VmCore<H: Host> {
    /// Who may still be looking.
    pub(crate) domain: Arc<EpochDomain>,
    lock: MmuLock,
    slots: SlotTable,
    notify: Invalidations,
    pool: TablePool<H>,
    stats: Stats,
    dead: Dead,
    latency: Latencies,
    options: VmOptions,
    /// One for each participant, or none.
    rings: Vec<DirtyRing>,
}

/// What a VM is, chosen when it is made and kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmOptions {
    /// How it logs writes.
    pub log: LogOptions,
    /// Which kind of MMU serves it; what a [`PagingPolicy`](crate::paging::PagingPolicy) said.
    pub paging: Paging,
}

/// A VM that could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmError {
    /// The epoch domain could not be made.
    Epoch(EpochError),
    /// No memory for a dirty ring for each participant.
    NoMemoryForRings {
        /// Participants asked for.
        participants: usize,
        /// Bytes of each ring.
        bytes: u64,
    },
    /// No memory for the statistics of that many participants.
    NoMemory {
        /// Participants asked for.
        participants: usize,
    },
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Epoch(error) => error.fmt(f),
            Self::NoMemoryForRings { participants, bytes } => {
                write!(f, "no memory for {participants} dirty rings of {bytes} bytes")
            }
            Self::NoMemory { participants } => {
                write!(f, "no memory for the statistics of {participants} participants")
            }
        }
    }
}

impl core::error::Error for VmError {}

impl<H: Host> VmCore<H> {
    /// A VM without slots. `participants` bounds the threads that may use it at once (vCPUs,
    /// agers, notifiers); `give_up_cpu` is what waits do when they last long.
    ///
    /// The [`SlotWriter`] is the only one.
    ///
    /// # Errors
    /// [`VmError`] names what could not be allocated, or a participant count out of range.
    pub fn new(
        host: H,
        participants: usize,
        limits: SlotLimits,
        give_up_cpu: GiveUpCpu,
    ) -> Result<(Arc<Self>, SlotWriter), VmError> {
        Self::with_log(host, participants, limits, give_up_cpu, LogOptions::default())
    }

    /// The same, with other than the default dirty logs.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_log(
        host: H,
        participants: usize,
        limits: SlotLimits,
        give_up_cpu: GiveUpCpu,
        log: LogOptions,
    ) -> Result<(Arc<Self>, SlotWriter), VmError> {
        let options = VmOptions { log, ..VmOptions::default() };
        Self::with_options(host, participants, limits, give_up_cpu, options)
    }

    /// The same, with other than the default options.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_options(
        host: H,
        participants: usize,
        limits: SlotLimits,
        give_up_cpu: GiveUpCpu,
        options: VmOptions,
    ) -> Result<(Arc<Self>, SlotWriter), VmError> {
        let domain = EpochDomain::new(participants, give_up_cpu).map_err(VmError::Epoch)?;
        let stats = Stats::new(participants).ok_or(VmError::NoMemory { participants })?;
        let measured = if H::ENABLED { participants } else { 0 };
        let latency = Latencies::new(measured).ok_or(VmError::NoMemory { participants })?;
        let (slots, writer) = SlotTable::new(Arc::clone(&domain), limits);
        let vm = Self {
            lock: MmuLock::new(Arc::clone(&domain)),
            slots,
            notify: Invalidations::new(Arc::clone(&domain), 0),
            pool: TablePool::new(host, Arc::clone(&domain)),
            stats,
            dead: Dead::new(),
            latency,
            rings: rings(participants, &options.log)?,
            options,
            domain,
        };
        Ok((Arc::new(vm), writer))
    }

    /// Become a user of this VM. One per thread; dropping it gives its frames back.
    ///
    /// # Errors
    /// [`EpochError::Full`] when all participants exist.
    pub fn actor(self: &Arc<Self>) -> Result<Actor<H>, EpochError> {
        let participant = self.domain.register()?;
        Ok(Actor::new(Arc::clone(self), participant))
    }

    /// What waits do when they last long.
    #[must_use]
    pub fn give_up_cpu(&self) -> GiveUpCpu {
        self.domain.give_up_cpu()
    }

    /// The embedder.
    #[inline]
    #[must_use]
    pub fn host(&self) -> &H {
        self.pool.map()
    }

    /// The MMU lock.
    #[inline]
    #[must_use]
    pub fn lock(&self) -> &MmuLock {
        &self.lock
    }

    /// The live slots.
    #[inline]
    #[must_use]
    pub fn slots(&self) -> &SlotTable {
        &self.slots
    }

    /// Invalidations by the host.
    #[inline]
    #[must_use]
    pub fn notify(&self) -> &Invalidations {
        &self.notify
    }

    /// Table frames.
    #[inline]
    #[must_use]
    pub fn pool(&self) -> &TablePool<H> {
        &self.pool
    }

    /// How writes are logged.
    #[inline]
    #[must_use]
    pub fn log_options(&self) -> &LogOptions {
        &self.options.log
    }

    /// Which kind of MMU serves this VM; as it was made, whatever the policy says since.
    #[inline]
    #[must_use]
    pub fn paging(&self) -> Paging {
        self.options.paging
    }

    /// The dirty rings, one for each participant by its index; none if the VM has no rings. A
    /// ring's entries are shared with its consumer; its producer is the participant.
    #[inline]
    #[must_use]
    pub fn rings(&self) -> &[DirtyRing] {
        &self.rings
    }

    /// The dirty ring of the thread that has `section` open.
    #[inline]
    #[must_use]
    pub fn ring_of(&self, section: &EpochGuard<'_>) -> Option<&DirtyRing> {
        self.rings.get(section.participant().index())
    }

    /// Statistics, summed over all threads.
    #[inline]
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Why the VM must not run any more; `None` while it may. One relaxed load.
    #[inline(always)]
    #[must_use]
    pub fn is_dead(&self) -> Option<DeadReason> {
        self.dead.get()
    }

    /// Something impossible happened: from now on the VM's faults end in
    /// [`FaultError::Dead`](crate::fault::FaultError::Dead), permissions apart that a fault can
    /// give back by itself. Everything that gives memory back goes on working. The MMU calls this
    /// when it finds an entry that it did not make; embedders may for reasons of theirs, and ask
    /// [`is_dead`](Self::is_dead) before each entry into the guest (KVM row 0.1.8). The first
    /// reason stays.
    #[doc(alias = "kvm_vm_bugged")]
    pub fn mark_dead(&self, reason: DeadReason) {
        self.dead.mark(reason);
    }

    /// How long threads waited; empty unless the embedder has a clock
    /// ([`Trace::ENABLED`](crate::trace::Trace::ENABLED)).
    #[inline]
    #[must_use]
    pub fn latency(&self) -> &Latencies {
        &self.latency
    }

    /// Start the flush of a debt without paying it: the caller waits for the ticket, and only then
    /// may the debt's tables go.
    #[must_use]
    pub fn request(&self, debt: &FlushDebt, scope: FlushScope) -> H::Ticket {
        debt.with_batch(self.host(), scope, |batch| {
            self.trace(|| Event::FlushRequested { scope, tables: batch.tables() });
            self.host().request(batch)
        })
    }

    /// Pay a debt: ask for the flush, wait until it is complete, then retire the unlinked tables.
    /// `participant` proves that the caller has no section open. Nothing happens for an empty debt
    /// of scope [`FlushScope::Ranges`].
    pub fn pay(&self, participant: &mut Participant, debt: FlushDebt, scope: FlushScope) {
        if debt.is_empty() && scope == FlushScope::Ranges {
            return;
        }
        let shard = self.stats.shard(participant.index());
        shard.inc(Counter::FlushRequests);
        let start = self.now();
        let ticket = self.request(&debt, scope);
        let debt = if crate::busted!("retire_before_flush") {
            self.pool.retire(debt.settle().0);
            FlushDebt::new()
        } else {
            debt
        };
        if !crate::busted!("pay_without_wait") {
            self.host().wait(ticket);
        }
        self.took(participant.index(), Wait::Flush, start);
        let (tables, changes) = debt.settle();
        shard.add(Counter::FlushPaid, changes);
        self.pool.retire(tables);
        self.trace(|| Event::FlushPaid { changes });
    }

    /// Create, delete, move or change a memory slot (KVM rows 6.4 to 6.8).
    ///
    /// Deleting and moving publish the slot as INVALID first, so that faults on it retry; then
    /// `zap` must remove every mapping of the old slot, flush included, from every MMU of the VM;
    /// then the final set is published. Returns what the request meant.
    ///
    /// # Errors
    /// [`SlotError`] names the rule and the values; nothing changed.
    pub fn set_slot(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
        request: &SlotRequest,
        zap: impl FnOnce(&mut Actor<H>, &Memslot),
    ) -> Result<SlotChange, SlotError> {
        self.change_slot(writer, actor, request, None, zap)
    }

    /// The same; of a slot with [`SlotFlags::LOG_DIRTY`](crate::slot::SlotFlags::LOG_DIRTY) only
    /// `pages`, counted from its first page, are logged. A log that the slot has already is
    /// replaced when `pages` differs; its bits are carried over.
    ///
    /// # Errors
    /// As [`set_slot`](Self::set_slot); [`SlotError::LogRange`] when the slot has no such pages.
    pub fn set_slot_logging(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
        request: &SlotRequest,
        pages: Range<u64>,
        zap: impl FnOnce(&mut Actor<H>, &Memslot),
    ) -> Result<SlotChange, SlotError> {
        self.change_slot(writer, actor, request, Some(pages), zap)
    }

    fn change_slot(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
        request: &SlotRequest,
        logged: Option<Range<u64>>,
        zap: impl FnOnce(&mut Actor<H>, &Memslot),
    ) -> Result<SlotChange, SlotError> {
        let mut change = plan(writer.live(), writer.limits(), request)?;
        let before = writer.live().meta(request.as_id, request.id).cloned().unwrap_or_default();
        let now = writer.live().by_id(request.as_id, request.id).copied();
        if let (SlotChange::Nothing, Some(slot), Some(pages)) = (change, now, &logged) {
            if slot.logs_dirty() && before.log().is_none_or(|log| log.pages() != *pages) {
                change = SlotChange::Flags { old: slot, new: slot };
            }
        }
        if change == SlotChange::Nothing {
            return Ok(change);
        }
        let meta = self.meta_after(&change, before.clone(), logged)?;
        let replaced = match (before.log(), meta.log()) {
            (Some(old), Some(new)) if !Arc::ptr_eq(old, new) => Some((old, Arc::clone(new))),
            _ => None,
        };
        prepare(writer, 1)?;
        if let SlotChange::Delete(old) | SlotChange::Move { old, .. } = &change {
            writer.spare().apply_invalid(&change);
            let generation = writer.live().generation() | GENERATION_UPDATING;
            writer.spare().set_generation(generation);
            if !crate::busted!("delete_without_invalid") {
                self.publish(writer, actor);
            }
            if !crate::busted!("delete_without_zap") {
                zap(actor, old);
            }
            // Cannot fail: this buffer held as many slots before, and gets no more.
            prepare(writer, 0)?;
        }
        writer.spare().apply(&change);
        if change.after().is_some() {
            // Cannot fail: sets have room for the parts of every slot.
            writer.spare().set_meta(request.as_id, request.id, meta)?;
        }
        let generation = writer.live().next_generation();
        writer.spare().set_generation(generation);
        self.publish(writer, actor);
        if let Some((old, new)) = replaced {
            // Every section that could mark the old one is over.
            new.inherit(old);
        }
        self.trace(|| Event::Slots { change, generation });
        Ok(change)
    }

    /// From now on pages can be write-tracked, in the slots there are and in those that come (KVM
    /// row 6.16). Faults then look for it; there is no way back.
    ///
    /// # Errors
    /// [`SlotError::NoMemory`]; nothing changed.
    #[doc(alias = "kvm_page_track_write_tracking_enabled")]
    pub fn enable_write_tracking(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
    ) -> Result<(), SlotError> {
        if self.slots.tracks_writes() {
            return Ok(());
        }
        prepare(writer, 0)?;
        writer.with_both(|live, spare| {
            let all = (0..MAX_ADDRESS_SPACES).flat_map(|space| live.iter(space));
            for slot in all {
                let meta = live.meta(slot.as_id, slot.id).cloned().unwrap_or_default();
                let track = Some(Arc::new(PageTrack::new(slot)));
                spare.set_meta(slot.as_id, slot.id, meta.with_track(track))?;
            }
            spare.set_generation(live.next_generation());
            Ok(())
        })?;
        // Before the counts can be reached, so whoever reaches them finds that faults look.
        writer.track_writes();
        self.publish(writer, actor);
        Ok(())
    }

    /// What the slot carries after a change: a log that it had stays, unless other pages are asked
    /// for; one that it needs is made.
    fn meta_after(
        &self,
        change: &SlotChange,
        before: SlotMeta,
        logged: Option<Range<u64>>,
    ) -> Result<SlotMeta, SlotError> {
        let Some(new) = change.after() else { return Ok(SlotMeta::default()) };
        // Counts are of one place: a slot that moves starts with none.
        let fresh = matches!(change, SlotChange::Create(_) | SlotChange::Move { .. });
        let before = if fresh && self.slots.tracks_writes() {
            before.with_track(Some(Arc::new(PageTrack::new(new))))
        } else {
            before
        };
        if !new.logs_dirty() {
            return Ok(before.with_log(None));
        }
        let all = 0..new.npages;
        let kept = before.log().map(|log| log.pages());
        let pages = logged.or_else(|| kept.clone()).unwrap_or(all);
        if pages.is_empty() || pages.end > new.npages {
            let Range { start, end } = pages;
            return Err(SlotError::LogRange { start, end, pages: new.npages });
        }
        if kept.as_ref() == Some(&pages) {
            return Ok(before);
        }
        let log = DirtyLog::new(pages, &self.options.log)
            .map_err(|error| SlotError::NoMemoryForLog { bytes: error.bytes })?;
        Ok(before.with_log(Some(Arc::new(log))))
    }
}

/// The rings that the options ask for.
fn rings(participants: usize, log: &LogOptions) -> Result<Vec<DirtyRing>, VmError> {
    let Some(size) = log.ring else { return Ok(Vec::new()) };
    let no_memory = VmError::NoMemoryForRings { participants, bytes: size.bytes() };
    let mut rings = Vec::new();
    rings.try_reserve_exact(participants).map_err(|_| no_memory)?;
    for _ in 0..participants {
        rings.push(DirtyRing::new(size).map_err(|_| no_memory)?);
    }
    Ok(rings)
}

impl<H: Host> VmCore<H> {
    /// Make the spare set live; see [`SlotWriter::publish`].
    fn publish(&self, writer: &mut SlotWriter, actor: &mut Actor<H>) {
        let start = self.now();
        writer.publish(&mut actor.participant, &self.notify);
        // Nobody reads the former set any more: logs that are gone from the new one go now, not
        // with the next change.
        writer.spare().forget_metas();
        self.took(actor.participant.index(), Wait::Publication, start);
    }
}

/// Copy the live set to the spare one, with room for `extra` more slots.
fn prepare(writer: &mut SlotWriter, extra: usize) -> Result<(), SlotError> {
    writer.with_both(|live, spare| {
        spare.reserve_like(live, extra)?;
        spare.copy_from(live);
        Ok(())
    })
}

impl<H: Host> fmt::Debug for VmCore<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmCore")
            .field("lock", &self.lock)
            .field("slots", &self.slots)
            .field("notify", &self.notify)
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}
