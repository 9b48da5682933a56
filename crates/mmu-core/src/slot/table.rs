//! The live memslots: readers look them up inside a pin, one writer replaces them.
//!
//! Owns [`SlotTable`] (what readers see), [`SlotWriter`] (the right to change it, one per VM) and
//! the generation word that validates per-thread copies. Neighbours: `snapshot` (one immutable
//! set), `rules` (what a request means), [`crate::epoch::publish`] (how a set is swapped),
//! [`crate::vm`] (the whole protocol of KVM row 6.6).
//!
//! Rank: a `SlotWriter` is the outermost lock of the MMU (KVM's slots_lock); embedders keep it in a
//! mutex of their own, which may sleep.

use alloc::sync::Arc;
use core::fmt;

use super::{Memslots, SlotLimits};
use crate::epoch::publish::{Published, Writer};
use crate::epoch::{EpochDomain, EpochGuard, Participant};
use crate::notify::Invalidations;
use crate::sync::{AtomicU64, Ordering};

/// Memslots as readers see them.
#[doc(alias = "kvm_memslots")]
pub struct SlotTable {
    published: Arc<Published<Memslots>>,
    generation: Arc<AtomicU64>,
}

impl SlotTable {
    /// An empty set, and the only writer there will be.
    #[must_use]
    pub fn new(domain: Arc<EpochDomain>, limits: SlotLimits) -> (Self, SlotWriter) {
        let live = Memslots::new(&limits);
        let generation = Arc::new(AtomicU64::new(live.generation()));
        let (published, writer) = Published::new(domain, live, Memslots::new(&limits));
        let writer = SlotWriter { writer, generation: Arc::clone(&generation), limits };
        (Self { published, generation }, writer)
    }

    /// The current set, for as long as the section is open.
    #[inline]
    #[must_use]
    pub fn read<'g>(&'g self, section: &'g EpochGuard<'_>) -> &'g Memslots {
        self.published.read(section)
    }

    /// Generation of the set that is live or about to be. A copy of a slot taken from a set of
    /// this generation is current; checked inside a Shared section it stays so until the section
    /// ends.
    #[inline]
    #[must_use]
    pub fn generation(&self) -> u64 {
        // ORDERING[slot-generation]: Acquire. Pairs with the Release in `SlotWriter::publish`.
        self.generation.load(Ordering::Acquire)
    }
}

impl fmt::Debug for SlotTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotTable").field("generation", &self.generation()).finish()
    }
}

/// The right to change a VM's memslots.
///
/// Having a `SlotWriter` tells you: nobody else changes them, and the spare set has no reader.
pub struct SlotWriter {
    writer: Writer<Memslots>,
    generation: Arc<AtomicU64>,
    limits: SlotLimits,
}

impl SlotWriter {
    /// The rules that requests are checked against.
    #[must_use]
    pub fn limits(&self) -> &SlotLimits {
        &self.limits
    }

    /// The current set.
    #[must_use]
    pub fn live(&self) -> &Memslots {
        self.writer.live()
    }

    /// The set that becomes current with the next publication.
    pub(crate) fn spare(&mut self) -> &mut Memslots {
        self.writer.spare()
    }

    /// Both sets at once, to make the spare one from the live one.
    pub(crate) fn with_both<R>(&mut self, f: impl FnOnce(&Memslots, &mut Memslots) -> R) -> R {
        let (live, spare) = self.writer.both();
        f(live, spare)
    }

    /// Publish the spare set at a moment when no invalidation is in progress (KVM row 6.8), then
    /// wait for every section that may use the former set: no fault installs an entry from it
    /// afterwards.
    pub(crate) fn publish(&mut self, participant: &mut Participant, idle: &Invalidations) {
        let generation = self.writer.spare().generation();
        let word = &self.generation;
        self.writer.publish_at(participant, |swap| {
            idle.when_idle(|| {
                // ORDERING[slot-generation]: Release, before the swap. Pairs with the Acquire in
                // `SlotTable::generation`: a copy taken from the old set no longer validates.
                word.store(generation, Ordering::Release);
                swap();
            });
        });
    }
}

impl fmt::Debug for SlotWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotWriter").field("limits", &self.limits).finish_non_exhaustive()
    }
}
