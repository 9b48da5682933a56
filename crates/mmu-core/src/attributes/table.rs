//! The live attributes: faults look them up inside a pin, one writer replaces them.
//!
//! Owns [`AttributeTable`] (what readers see), [`AttributeWriter`] (the right to change it, one per
//! VM) and [`AttributeChange`] (a change that can no longer fail). Neighbours: `map` (the value),
//! [`crate::epoch::publish`] (how it is swapped), [`crate::notify`] (why faults notice).
//!
//! The protocol (KVM row 3.55), which an MMU runs in this order:
//!
//! 1. [`AttributeWriter::prepare`]: nothing to do, or the memory is there.
//! 2. `Invalidations::begin` over the range of the change.
//! 3. Unmap the range from every root, with huge leaves that reach beyond it, flushed.
//! 4. [`AttributeChange::commit`]: the new map is published.
//! 5. The invalidation ends.
//!
//! A fault takes its invalidation snapshot *before* it looks attributes up, and its last check, in
//! the Shared section in which it installs, asks about all pages that the entry will map. So a
//! fault that saw the old map meets the invalidation, or a sequence number newer than its snapshot,
//! and retries: also one outside the range whose huge page straddles its head or tail, because that
//! page overlaps the range. The range need not be widened to huge pages, as KVM must, whose check
//! asks about the faulting gfn only; and faults beside it go on undisturbed.
//!
//! Rank: the outermost, as `SlotWriter`, which the `AttributeWriter` is a part of.

use alloc::sync::Arc;
use core::fmt;

use super::{AttributeError, AttributeMap, Attributes};
use crate::addr::GfnRange;
use crate::epoch::publish::{Published, Writer};
use crate::epoch::{EpochDomain, EpochGuard, Participant};
use crate::notify::Invalidation;
use crate::sync::plain::{AtomicU64, Ordering};

/// Attributes as readers see them.
#[doc(alias = "kvm_get_memory_attributes")]
pub struct AttributeTable {
    published: Arc<Published<AttributeMap>>,
    any: Arc<AtomicU64>,
}

impl AttributeTable {
    /// No attributes, and the only writer there will be. `limit` bounds the gfns at which
    /// attributes may change (16 bytes each, twice); no memory is taken before it is needed.
    #[must_use]
    pub fn new(domain: Arc<EpochDomain>, limit: usize) -> (Self, AttributeWriter) {
        let any = Arc::new(AtomicU64::new(0));
        let empty = || AttributeMap::new(limit);
        let (published, writer) = Published::new(Arc::clone(&domain), empty(), empty());
        let writer = AttributeWriter { domain, writer, any: Arc::clone(&any), missing: None };
        (Self { published, any }, writer)
    }

    /// May any page have attributes? One load, so that VMs without them pay a branch.
    ///
    /// A fault that asks after it took its invalidation snapshot may rely on a `false`: of a change
    /// that is over it sees the effect, and on one that is not it retries.
    #[inline]
    #[must_use]
    pub fn any(&self) -> bool {
        // ORDERING[attributes-any]: Relaxed. The snapshot's Acquire (`invalidate-seq`) came first:
        // it brings the stores of every change whose invalidation it has seen end.
        self.any.load(Ordering::Relaxed) != 0
    }

    /// The current map, for as long as the section is open.
    ///
    /// # Panics
    /// When the section is in another VM's domain.
    #[inline]
    #[must_use]
    pub fn read<'g>(&'g self, section: &'g EpochGuard<'_>) -> &'g AttributeMap {
        self.published.read(section)
    }
}

impl fmt::Debug for AttributeTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttributeTable").field("any", &self.any()).finish_non_exhaustive()
    }
}

/// The right to change a VM's memory attributes.
///
/// Having an `AttributeWriter` tells you: nobody else changes them, and the spare map has no
/// reader.
pub struct AttributeWriter {
    domain: Arc<EpochDomain>,
    writer: Writer<AttributeMap>,
    any: Arc<AtomicU64>,
    /// The change that the live map has and the spare one lacks.
    missing: Option<(GfnRange, Attributes)>,
}

impl AttributeWriter {
    /// The current attributes.
    #[must_use]
    pub fn live(&self) -> &AttributeMap {
        self.writer.live()
    }

    /// Find the memory to give `range` exactly `attributes`; `None` when it has them already.
    /// Dropping the answer changes nothing.
    ///
    /// # Errors
    /// [`AttributeError`]; the attributes are as they were.
    pub fn prepare(
        &mut self,
        range: GfnRange,
        attributes: Attributes,
    ) -> Result<Option<AttributeChange<'_>>, AttributeError> {
        super::map::check(range, attributes)?;
        if self.live().all_are(range, attributes) {
            return Ok(None);
        }
        self.catch_up()?;
        self.writer.spare().reserve_for(range, attributes)?;
        Ok(Some(AttributeChange { writer: self, range, attributes }))
    }

    /// Make the spare map equal to the live one. It lags by one change at most, which is cheaper
    /// to repeat than the whole map is to copy.
    fn catch_up(&mut self) -> Result<(), AttributeError> {
        if let Some((range, attributes)) = self.missing {
            self.writer.spare().set(range, attributes)?;
            self.missing = None;
        }
        Ok(())
    }
}

impl fmt::Debug for AttributeWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttributeWriter").field("live", self.live()).finish_non_exhaustive()
    }
}

/// A change of attributes that can no longer fail.
///
/// Having one tells you: its memory is there, and some page of the range will change. Nothing has
/// changed yet.
#[must_use = "nothing changes before `commit`"]
#[derive(Debug)]
pub struct AttributeChange<'w> {
    writer: &'w mut AttributeWriter,
    range: GfnRange,
    attributes: Attributes,
}

impl AttributeChange<'_> {
    /// The pages that change: what to invalidate and to unmap.
    #[must_use]
    pub fn range(&self) -> GfnRange {
        self.range
    }

    /// Publish the change and wait for readers of the former map. Unmap first (step 3 of the
    /// protocol in the file's head), else what is mapped outlives its attributes.
    ///
    /// # Panics
    /// When the invalidation does not cover the range, or `participant` is another VM's; nothing
    /// was changed then.
    pub fn commit(self, participant: &mut Participant, invalidation: &Invalidation<'_>) {
        let Self { writer, range, attributes } = self;
        let covered = invalidation.range().covers(range);
        assert!(covered, "{range} is not inside the invalidation of {}", invalidation.range());
        // Here, not only in `publish`: the spare map must not have a change that never went live.
        let own = core::ptr::eq(Arc::as_ptr(&writer.domain), Arc::as_ptr(participant.domain()));
        assert!(own, "participant of another domain");
        let done = writer.writer.spare().set(range, attributes);
        debug_assert!(done.is_ok(), "`prepare` found the memory: {done:?}");
        let any = u64::from(!writer.writer.spare().is_empty());
        writer.missing = Some((range, attributes));
        writer.writer.publish(participant);
        // ORDERING[attributes-any]: Relaxed. The invalidation is still in progress: a fault that
        // misses this store retries (see `AttributeTable::any`).
        writer.any.store(any, Ordering::Relaxed);
    }
}
