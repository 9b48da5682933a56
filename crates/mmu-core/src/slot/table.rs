//! The live memslots: readers look them up inside a pin, one writer replaces them.
//!
//! Owns [`SlotTable`] (what readers see), [`SlotWriter`] (the right to change it, one per VM) and
//! the generation word that validates per-thread copies. With them go the memory attributes, which
//! the same right protects, as in KVM. Neighbours: `snapshot` (one immutable
//! set), `rules` (what a request means), [`crate::epoch::publish`] (how a set is swapped),
//! [`crate::vm`] (the whole protocol of KVM row 6.6).
//!
//! Rank: a `SlotWriter` is the outermost lock of the MMU (KVM's slots_lock); embedders keep it in a
//! mutex of their own, which may sleep.

use alloc::sync::Arc;
use core::fmt;

use super::{Memslots, SlotLimits};
use crate::attributes::{AttributeTable, AttributeWriter};
use crate::epoch::publish::{Published, Writer};
use crate::epoch::{EpochDomain, EpochGuard, Participant};
use crate::notify::Invalidations;
use crate::sync::{AtomicU64, Ordering, plain};

/// Most gfns at which a VM's attributes may change: 32 MiB of memory if a guest makes it so, with
/// every page of 2 GiB unlike its neighbours.
pub const MAX_ATTRIBUTE_EDGES: usize = 1 << 20;

/// Memslots as readers see them.
#[doc(alias = "kvm_memslots")]
pub struct SlotTable {
    published: Arc<Published<Memslots>>,
    generation: Arc<AtomicU64>,
    attributes: AttributeTable,
    /// 1 once pages may be write-tracked.
    tracks: Arc<plain::AtomicU64>,
}

impl SlotTable {
    /// An empty set, and the only writer there will be.
    #[must_use]
    pub fn new(domain: Arc<EpochDomain>, limits: SlotLimits) -> (Self, SlotWriter) {
        let live = Memslots::new(&limits);
        let generation = Arc::new(AtomicU64::new(live.generation()));
        let spare = Memslots::new(&limits);
        let (published, writer) = Published::new(Arc::clone(&domain), live, spare);
        let (table, attributes) = AttributeTable::new(domain, MAX_ATTRIBUTE_EDGES);
        let tracks = Arc::new(plain::AtomicU64::new(0));
        let writer = SlotWriter {
            writer,
            generation: Arc::clone(&generation),
            limits,
            attributes,
            tracks: Arc::clone(&tracks),
        };
        (Self { published, generation, attributes: table, tracks }, writer)
    }

    /// May pages be write-tracked? A fault asks after its invalidation snapshot, and every tracker
    /// goes through an invalidation of its page.
    #[inline]
    #[must_use]
    pub fn tracks_writes(&self) -> bool {
        // ORDERING[track-enabled]: Relaxed. A fault that misses the store has an older snapshot
        // than the end of any tracker's invalidation, and retries.
        self.tracks.load(plain::Ordering::Relaxed) != 0
    }

    /// Does nothing but its slot limit how a page is mapped: no attributes, no tracking?
    #[inline]
    #[must_use]
    pub fn is_plain(&self) -> bool {
        !(self.attributes.any() | self.tracks_writes())
    }

    /// The memory attributes.
    #[inline]
    #[must_use]
    pub const fn attributes(&self) -> &AttributeTable {
        &self.attributes
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
    attributes: AttributeWriter,
    tracks: Arc<plain::AtomicU64>,
}

impl SlotWriter {
    /// The right to change memory attributes.
    pub fn attributes(&mut self) -> &mut AttributeWriter {
        &mut self.attributes
    }

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

    /// Faults look for tracked pages from here on.
    pub(crate) fn track_writes(&self) {
        // ORDERING[track-enabled]: Relaxed. Trackers reach the counts through the set that is
        // published next, and raise them in an invalidation: see `SlotTable::tracks_writes`.
        self.tracks.store(1, plain::Ordering::Relaxed);
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
