//! A host for models: frames from an arena, flushes that have nothing to do.

use core::ptr::NonNull;

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Level, Pfn};
use mmu_core::flush::FlushBatch;
use mmu_core::frame::{Arena, FrameMeta, PageTable, PhysMap};
use mmu_core::slot::Memslot;
use mmu_core::traits::{HostPage, PfnResolver, ResolveError, TlbFlush, Trace};

pub(crate) struct ModelHost(Arena);

impl ModelHost {
    pub(crate) fn new(frames: u64) -> Self {
        Self(Arena::with_capacity(frames, Pfn::new(1)).expect("memory"))
    }
}

// SAFETY: every clause is the arena's, to which every call goes.
unsafe impl PhysMap for ModelHost {
    fn provide(&self) -> Option<Pfn> {
        self.0.provide()
    }

    fn reclaim(&self, frame: Pfn) {
        self.0.reclaim(frame);
    }

    fn table(&self, frame: Pfn) -> NonNull<PageTable> {
        self.0.table(frame)
    }

    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta> {
        self.0.meta(frame)
    }
}

impl TlbFlush for ModelHost {
    type Ticket = ();

    fn request(&self, _: &FlushBatch<'_>) {}

    fn wait(&self, (): ()) {}
}

impl Trace for ModelHost {}

impl PfnResolver for ModelHost {
    fn resolve(&self, _: &Memslot, gfn: Gfn, _: Access) -> Result<HostPage, ResolveError> {
        Ok(HostPage { pfn: Pfn::new(gfn.get()), writable: true, level: Level::L1 })
    }
}
