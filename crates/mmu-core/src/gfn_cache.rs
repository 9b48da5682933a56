//! A translation that the VMM itself keeps: a guest page that it reads or writes again and again
//! (a clock, a steal-time record), without asking the host each time.
//!
//! Owns [`GfnCache`] (KVM row 6.22). It follows the protocol of faults, with the fault's own parts:
//! [`refresh`](GfnCache::refresh) notes the invalidation sequence, *then* finds the slot and asks
//! the host; [`get`](GfnCache::get) checks both inside a Shared section, for which every
//! invalidation waits before the MMU unmaps anything. So there is no moment at which the cache is
//! told and faults are not, or the other way round (KVM row B40): the range that faults read is the
//! range that the cache reads, and a refresh in the middle of an invalidation gives a translation
//! that no `get` accepts.
//!
//! No memory is shared, nothing is registered: a cache that nobody asks costs nobody anything.

use core::fmt;
use core::marker::PhantomData;

use crate::access::Access;
use crate::addr::{Gfn, GfnRange, Hva, Pfn};
use crate::notify::Snapshot;
use crate::slot::GfnToHvaError;
use crate::traits::{Host, ResolveError};
use crate::vm::{Actor, SharedWork};

/// Why a gfn has no translation to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GfnCacheError {
    /// The slots have none. [`GfnToHvaError::Invalid`] passes: try again.
    Slot(GfnToHvaError),
    /// The host has none.
    Resolve {
        /// The page.
        gfn: Gfn,
        /// Why.
        source: ResolveError,
    },
}

impl fmt::Display for GfnCacheError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slot(error) => error.fmt(f),
            Self::Resolve { gfn, source } => write!(f, "gfn {gfn}: {source}"),
        }
    }
}

impl core::error::Error for GfnCacheError {}

#[derive(Clone, Copy, Debug)]
struct Kept {
    pfn: Pfn,
    hva: Hva,
    generation: u64,
    snapshot: Snapshot,
}

/// The host page of one gfn, for as long as it is that. Belongs to one VM: give it actors and
/// sections of that VM only.
#[doc(alias = "gfn_to_pfn_cache")]
#[derive(Debug)]
pub struct GfnCache {
    as_id: u16,
    gfn: Gfn,
    access: Access,
    kept: Option<Kept>,
}

/// A translation that holds while the section is open.
///
/// Having a `CachedPage` tells you: whoever takes the page away waits for your section. Writes
/// through it are not in the dirty log; the caller says what it wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedPage<'w> {
    pfn: Pfn,
    hva: Hva,
    section: PhantomData<&'w ()>,
}

impl CachedPage<'_> {
    /// The host page.
    #[must_use]
    pub const fn pfn(self) -> Pfn {
        self.pfn
    }

    /// Where the host maps it for the VMM.
    #[must_use]
    pub const fn hva(self) -> Hva {
        self.hva
    }
}

impl GfnCache {
    /// A cache for accesses of kind `access` to `gfn` in address space `as_id`; empty.
    #[must_use]
    pub const fn new(as_id: u16, gfn: Gfn, access: Access) -> Self {
        Self { as_id, gfn, access, kept: None }
    }

    /// The page.
    #[must_use]
    pub const fn gfn(&self) -> Gfn {
        self.gfn
    }

    /// Ask the slots and the host. May sleep, as the resolver may. That it succeeded does not say
    /// that [`get`](Self::get) will: the page may be on its way out.
    ///
    /// # Errors
    /// [`GfnCacheError`]; the cache is then empty.
    pub fn refresh<H: Host>(&mut self, actor: &mut Actor<H>) -> Result<(), GfnCacheError> {
        let Self { as_id, gfn, access, .. } = *self;
        self.kept = None;
        // First: what the host says after this is what it has after the invalidations counted.
        let snapshot = actor.vm().notify().snapshot();
        let found = actor.find_slot(as_id, gfn);
        let missing = GfnCacheError::Slot(GfnToHvaError::NoSlot { as_id, gfn });
        let slot = found.slot.ok_or(missing)?;
        let read_only = GfnToHvaError::ReadOnly { slot: slot.id, gfn };
        if slot.is_invalid() {
            return Err(GfnCacheError::Slot(GfnToHvaError::Invalid { slot: slot.id, gfn }));
        }
        let write = access.contains(Access::WRITE);
        if write && slot.is_read_only() {
            return Err(GfnCacheError::Slot(read_only));
        }
        let hva = slot.hva_of(gfn).ok_or(missing)?;
        let page = actor.vm().host().resolve(&slot, gfn, access);
        let page = page.map_err(|source| GfnCacheError::Resolve { gfn, source })?;
        if write && !page.writable {
            return Err(GfnCacheError::Resolve { gfn, source: ResolveError::ReadOnly });
        }
        let generation = found.generation;
        self.kept = Some(Kept { pfn: page.pfn, hva, generation, snapshot });
        Ok(())
    }

    /// The translation, if it still holds; else [`refresh`](Self::refresh). Any invalidation that
    /// ended since the last refresh makes it ask again, wherever it was: one comparison tells.
    #[must_use]
    pub fn get<'w, H: Host>(&self, work: &'w SharedWork<'_, H>) -> Option<CachedPage<'w>> {
        let Kept { pfn, hva, generation, snapshot } = self.kept?;
        let stale = work.vm.slots().generation() != generation
            || work.vm.notify().must_retry(
                &work.section,
                snapshot,
                GfnRange::from_len(self.gfn, 1),
            );
        let stale = stale && !crate::busted!("cache_trusted_for_ever");
        (!stale).then_some(CachedPage { pfn, hva, section: PhantomData })
    }

    /// Forget the translation.
    pub const fn clear(&mut self) {
        self.kept = None;
    }
}
