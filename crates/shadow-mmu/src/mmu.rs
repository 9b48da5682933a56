//! The shadow MMU of a VM: what all its threads share.
//!
//! Owns [`ShadowMmu`]: configuration, reverse maps, and where the frame of each shadow page is.
//! What only one thread at a time may touch is the [`ShadowWriter`](crate::writer::ShadowWriter),
//! made together with it; the embedder keeps that in a mutex of its own, and borrowing it mutably
//! is KVM's `mmu_lock` held for write. Aging and lookups need only what is here and take no lock.

use alloc::sync::Arc;
use core::fmt;

use mmu_core::addr::Pfn;
use mmu_core::direct::DirectTables;
use mmu_core::epoch::EpochGuard;
use mmu_core::frame::PageTable;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{SpteConfig, SpteFormat};
use mmu_core::sync::{AtomicU64, Ordering, plain};
use mmu_core::traits::Host;
use mmu_core::vm::VmCore;

use crate::age::Unflushed;
use crate::radix::{Near, NoMemory, Radix};
use crate::rmap::Rmaps;
use crate::spte_ref::{PageId, SpteRef};

/// Bits of a shadow page's number; in models one node's.
const PAGE_BITS: u32 = if cfg!(loom) { 3 } else { PageId::LIMIT.ilog2() + 1 };

/// The shadow page tables of a VM, in format `F`. See the file's head.
pub struct ShadowMmu<F: SpteFormat, H: Host> {
    vm: Arc<VmCore<H>>,
    config: SpteConfig<F>,
    rmaps: Arc<Rmaps>,
    /// Frame number plus 1 of each shadow page, by its number; 0 for none.
    frames: Radix<plain::AtomicU64>,
    unflushed: Unflushed,
    /// How often roots became bad.
    reloads: AtomicU64,
    /// What maps the same memory directly, if anything does.
    beside: Option<Arc<dyn DirectTables<H>>>,
}

impl<F: SpteFormat, H: Host> ShadowMmu<F, H> {
    pub(crate) fn new(
        vm: Arc<VmCore<H>>,
        config: SpteConfig<F>,
        rmaps: Arc<Rmaps>,
        beside: Option<Arc<dyn DirectTables<H>>>,
    ) -> Self {
        let (frames, unflushed) = (Radix::new(PAGE_BITS), Unflushed::new());
        Self { vm, config, rmaps, frames, unflushed, reloads: AtomicU64::new(0), beside }
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> &Arc<VmCore<H>> {
        &self.vm
    }

    /// What entries look like.
    #[must_use]
    pub fn config(&self) -> &SpteConfig<F> {
        &self.config
    }

    /// The reverse maps.
    #[must_use]
    pub fn rmaps(&self) -> &Arc<Rmaps> {
        &self.rmaps
    }

    /// What maps the same memory directly.
    pub(crate) fn beside(&self) -> Option<&Arc<dyn DirectTables<H>>> {
        self.beside.as_ref()
    }

    pub(crate) fn unflushed(&self) -> &Unflushed {
        &self.unflushed
    }

    /// A root is no good any more; before the flush that makes vCPUs look.
    pub(crate) fn note_reload(&self) {
        // ORDERING[shadow-reload]: Release. Pairs with `reloads`. A vCPU that the flush after this
        // does not wait for announces itself, and looks, after the flush's fence.
        self.reloads.fetch_add(1, Ordering::Release);
    }

    /// As long as this stays the same, a root that was good is good.
    pub(crate) fn reloads(&self) -> u64 {
        // ORDERING[shadow-reload]: Acquire. Pairs with `note_reload`.
        self.reloads.load(Ordering::Acquire)
    }

    /// Make room for the frame of a page.
    pub(crate) fn reserve_frame(&self, page: PageId) -> Result<(), NoMemory> {
        self.frames.provide(u64::from(page.get())).map(|_| ())
    }

    /// Note where the page's entries stand, before any of them is in a reverse map.
    pub(crate) fn set_frame(&self, page: PageId, frame: Option<Pfn>) {
        if let Some(place) = self.frames.get(u64::from(page.get())) {
            // ORDERING[shadow-frame]: Relaxed. Written by the writer before an entry of the page is
            // put on a list, which publishes it (`rmap-lock`), and after the last was taken off.
            place.store(frame.map_or(0, |frame| frame.get() + 1), plain::Ordering::Relaxed);
        }
    }

    /// For lookups of entries whose pages are often the same.
    pub(crate) fn cells(&self) -> Cells<'_, F, H> {
        Cells { mmu: self, frames: self.frames.near() }
    }
}

/// Finds entries by the names that stand on lists.
pub(crate) struct Cells<'a, F: SpteFormat, H: Host> {
    mmu: &'a ShadowMmu<F, H>,
    frames: Near<'a, plain::AtomicU64>,
}

impl<'a, F: SpteFormat, H: Host> Cells<'a, F, H> {
    /// Before a block of 512 pages: shadow pages made since the last one are found.
    pub(crate) fn forget(&mut self) {
        self.frames.forget();
    }

    /// The entry that a list names. For who holds the list still: `None` only if the tables
    /// contradict each other. For who does not: an entry whose page may be gone.
    pub(crate) fn get<'g>(
        &mut self,
        section: &'g EpochGuard<'_>,
        spte: SpteRef,
    ) -> Option<&'g SpteCell>
    where
        'a: 'g,
    {
        self.near(section, spte, &mut None)
    }

    /// The same; `last` is the table that the last one stands in, looked up in this section.
    #[inline]
    pub(crate) fn near<'g>(
        &mut self,
        section: &'g EpochGuard<'_>,
        spte: SpteRef,
        last: &mut Option<(u64, &'g PageTable)>,
    ) -> Option<&'g SpteCell>
    where
        'a: 'g,
    {
        let place = self.frames.get(u64::from(spte.page().get()))?;
        // ORDERING[shadow-frame]: Relaxed. After the Acquire of the list's head, or by the writer:
        // pairs with the store in `set_frame`. Who does not hold the list may read the frame of
        // another page by now, which is a table as well.
        let word = place.load(plain::Ordering::Relaxed);
        let table = match *last {
            Some((known, table)) if known == word => table,
            _ => {
                let frame = Pfn::new(word.checked_sub(1)?);
                let table = self.mmu.vm.pool().table(section, frame);
                *last = Some((word, table));
                table
            }
        };
        table.entries().get(spte.index())
    }
}

impl<F: SpteFormat, H: Host> fmt::Debug for ShadowMmu<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShadowMmu").field("config", &self.config).finish_non_exhaustive()
    }
}
