//! What all MMUs of one VM share, and the handle through which a thread uses it.
//!
//! Owns [`VmCore`] (lock, slots, invalidations, frames, statistics, embedder) and [`Actor`] (a
//! thread's epoch record, its frame cache, its copy of the slot it used last). Here too: paying a
//! [`FlushDebt`], and the protocol of a slot change (KVM row 6.6).

use alloc::sync::Arc;
use core::fmt;

use crate::addr::{Gfn, Pfn};
use crate::dead::{Dead, DeadReason};
use crate::epoch::{EpochDomain, EpochError, EpochGuard, GiveUpCpu, Participant};
use crate::flush::{FlushDebt, FlushScope};
use crate::frame::{FrameList, MmuCache, OutOfFrames, TablePool};
use crate::latency::{Latencies, Wait};
use crate::lock::{MmuLock, Shared};
use crate::notify::Invalidations;
use crate::slot::{
    GENERATION_UPDATING, Memslot, SlotChange, SlotError, SlotLimits, SlotRequest, SlotTable,
    SlotWriter, plan,
};
use crate::stats::{Counter, Stats, StatsShard};
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
}

/// A VM that could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmError {
    /// The epoch domain could not be made.
    Epoch(EpochError),
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
        Ok(Actor { vm: Arc::clone(self), participant, cache: MmuCache::new(), slot: None })
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
        debt.with_batch(self.host(), scope, |batch| self.host().request(batch))
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
        self.host().wait(ticket);
        self.took(participant.index(), Wait::Flush, start);
        let (tables, changes) = debt.settle();
        shard.add(Counter::FlushPaid, changes);
        self.pool.retire(tables);
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
        let change = plan(writer.live(), writer.limits(), request)?;
        if change == SlotChange::Nothing {
            return Ok(change);
        }
        prepare(writer, 1)?;
        if let SlotChange::Delete(old) | SlotChange::Move { old, .. } = &change {
            writer.spare().apply_invalid(&change);
            let generation = writer.live().generation() | GENERATION_UPDATING;
            writer.spare().set_generation(generation);
            self.publish(writer, actor);
            zap(actor, old);
            // Cannot fail: this buffer held as many slots before, and gets no more.
            prepare(writer, 0)?;
        }
        writer.spare().apply(&change);
        let generation = writer.live().next_generation();
        writer.spare().set_generation(generation);
        self.publish(writer, actor);
        Ok(change)
    }
}

impl<H: Host> VmCore<H> {
    /// Make the spare set live; see [`SlotWriter::publish`].
    fn publish(&self, writer: &mut SlotWriter, actor: &mut Actor<H>) {
        let start = self.now();
        writer.publish(&mut actor.participant, &self.notify);
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

/// A copy of a slot, and of which set it is.
#[derive(Clone, Copy, Debug)]
struct SlotCopy {
    slot: Memslot,
    generation: u64,
}

/// A slot as a fault found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundSlot {
    /// The slot, or `None` where the guest has no memory.
    pub slot: Option<Memslot>,
    /// Generation of the set it is from; check it with [`VmCore::slots`] inside the section in
    /// which it is used.
    pub generation: u64,
}

/// A thread's handle on a VM: a vCPU, an ager, a notifier.
///
/// Having an `Actor` tells you: this thread has an epoch record of its own, and borrowing the
/// actor mutably proves that none of its sections is open.
pub struct Actor<H: Host> {
    vm: Arc<VmCore<H>>,
    participant: Participant,
    cache: MmuCache,
    slot: Option<SlotCopy>,
}

impl<H: Host> Actor<H> {
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
        self.vm.stats.shard(self.participant.index())
    }

    /// Make sure that `min` table frames can be taken. Call with no section open, which the
    /// mutable borrow proves.
    ///
    /// # Errors
    /// [`OutOfFrames`]; nothing changed.
    #[inline]
    pub fn top_up(&mut self, min: usize) -> Result<(), OutOfFrames> {
        self.cache.top_up(&self.vm.pool, min)
    }

    /// Open a Shared section, with what work inside it needs.
    #[inline(always)]
    pub fn shared(&mut self) -> SharedWork<'_, H> {
        let Self { vm, participant, cache, .. } = self;
        let stats = vm.stats.shard(participant.index());
        let section = if H::ENABLED {
            let index = participant.index();
            let after = |start| vm.took(index, Wait::Shared, start);
            vm.lock.shared_measured(participant, || vm.now(), after)
        } else {
            vm.lock.shared(participant)
        };
        SharedWork { section, cache, vm, stats }
    }

    /// Pin the epoch only: for lookups, aging and fast faults, which take no lock.
    #[inline(always)]
    pub fn pinned(&mut self) -> PinnedWork<'_, H> {
        let Self { vm, participant, .. } = self;
        let stats = vm.stats.shard(participant.index());
        PinnedWork { section: participant.pin(), vm, stats }
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
            self.vm.pool.give_back(list);
        }
    }

    /// The slot that holds `gfn` in address space `space`. Costs two loads when it is the slot of
    /// the last call and no slot changed since.
    #[inline]
    #[must_use]
    pub fn find_slot(&mut self, space: u16, gfn: Gfn) -> FoundSlot {
        match self.slot {
            Some(copy) if self.is_current(&copy, space, gfn) => {
                FoundSlot { slot: Some(copy.slot), generation: copy.generation }
            }
            _ => self.look_up_slot(space, gfn),
        }
    }

    #[inline(always)]
    fn is_current(&self, copy: &SlotCopy, space: u16, gfn: Gfn) -> bool {
        let fits = copy.slot.contains(gfn) && copy.slot.as_id == space;
        fits && copy.generation == self.vm.slots.generation()
    }

    /// Find the slot that holds `gfn` in address space `space` and keep it; `false` where the guest
    /// has no memory. [`kept_slot`](Self::kept_slot) is then it, without a copy.
    #[inline(always)]
    #[must_use]
    pub fn keep_slot(&mut self, space: u16, gfn: Gfn) -> bool {
        let current = self.slot.as_ref().is_some_and(|copy| self.is_current(copy, space, gfn));
        current || self.look_up_slot(space, gfn).slot.is_some()
    }

    /// The slot of the last successful [`keep_slot`](Self::keep_slot), and the generation of the
    /// set it is from; check that with [`VmCore::slots`] inside the section in which it is used.
    #[inline(always)]
    #[must_use]
    pub fn kept_slot(&self) -> Option<(&Memslot, u64)> {
        self.slot.as_ref().map(|copy| (&copy.slot, copy.generation))
    }

    #[cold]
    fn look_up_slot(&mut self, space: u16, gfn: Gfn) -> FoundSlot {
        self.stats().inc(Counter::SlotLookups);
        let section = self.participant.pin();
        let slots = self.vm.slots.read(&section);
        let generation = slots.generation();
        let slot = slots.find(space, gfn).copied();
        drop(section);
        if let Some(slot) = slot {
            self.slot = Some(SlotCopy { slot, generation });
        }
        FoundSlot { slot, generation }
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
}

impl<H: Host> Drop for Actor<H> {
    fn drop(&mut self) {
        self.cache.drain(&self.vm.pool);
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
