//! The one hand that changes shadow tables.
//!
//! Owns [`ShadowWriter`]: the table of shadow pages and the reverse maps' writer, for the embedder
//! to keep in a mutex; and `Work`, the writer at work inside a Shared section, with the debt that
//! it runs up. The section is what an invalidation drains
//! ([`Invalidations::begin`](mmu_core::notify::Invalidations::begin)): a fault checks in it that
//! nothing was taken back, and installs before it ends.
//!
//! Lock order: the embedder's mutex around the writer, then the section, then bit locks of reverse
//! maps. A debt is paid after the section, with the mutex still held: pages that were taken out
//! must be out of every TLB before somebody else trusts that they are. What direct tables beside
//! are asked to protect (`watch`) is protected then, too.

use alloc::sync::Arc;
use core::fmt;

use arrayvec::ArrayVec;

use mmu_core::addr::{Gfn, GfnRange};
use mmu_core::dead::DeadReason;
use mmu_core::direct::DirectTables;
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::frame::MmuCache;
use mmu_core::lock::Shared;
use mmu_core::slot::TrackError;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{SpteConfig, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::traits::Host;
use mmu_core::vm::{Actor, SharedWork, VmCore};

use crate::blocks::Blocks;
use crate::mmu::ShadowMmu;
use crate::page::Pages;
use crate::reclaim::ReclaimPolicy;
use crate::rmap::{RmapWriter, Rmaps};
use crate::spte_ref::{PageId, SpteRef};
use crate::stats::ShadowStats;
use crate::watch::MAX_WATCHED;

/// Changes a VM's shadow tables; one for a [`ShadowMmu`]. See the file's head.
pub struct ShadowWriter<F: SpteFormat, H: Host> {
    pub(crate) mmu: Arc<ShadowMmu<F, H>>,
    pub(crate) pages: Pages,
    pub(crate) rmap: RmapWriter,
    pub(crate) blocks: Blocks,
    pub(crate) stats: ShadowStats,
    /// Pages of an older one are obsolete.
    pub(crate) generation: u64,
    /// Shadow pages that there may be.
    pub(crate) quota: u32,
    pub(crate) policy: ReclaimPolicy,
    /// Entries of the window that a fault fills.
    pub(crate) window: usize,
    /// Invalidations that the writer made itself.
    pub(crate) own_invalidations: u64,
    /// Why a table could not be watched.
    pub(crate) unwatched: Option<TrackError>,
}

/// Where the embedder keeps the writer: a mutex, or whatever lets one thread at a time have it.
///
/// With the writer held this crate waits for vCPUs' flushes and bit locks, and where a table gets a
/// shadow that direct tables beside map, for the sections that are open. So nothing that is called
/// inside a section (an `AgeSink`, a `Trace`, `resolve_now`) may ask for the writer.
pub trait WriterLock<F: SpteFormat, H: Host> {
    /// Do `work` with the writer.
    fn with<R>(&self, work: impl FnOnce(&mut ShadowWriter<F, H>) -> R) -> R;
}

impl<F: SpteFormat, H: Host> ShadowMmu<F, H> {
    /// A shadow MMU without pages, and its only writer. `quota` is how many shadow pages there may
    /// be (KVM row 4.48); faults make room when it is reached.
    #[must_use]
    pub fn create(
        vm: Arc<VmCore<H>>,
        config: SpteConfig<F>,
        quota: u32,
    ) -> (Arc<Self>, ShadowWriter<F, H>) {
        Self::make(vm, config, quota, None)
    }

    /// The same for the guests of a guest that `direct` serves in the same VM: what its tables map
    /// is kept from writing unseen to a table that has a shadow (KVM row 4.26). The VM tracks
    /// writes ([`enable_write_tracking`](VmCore::enable_write_tracking)).
    #[must_use]
    pub fn create_beside(
        vm: Arc<VmCore<H>>,
        config: SpteConfig<F>,
        quota: u32,
        direct: Arc<dyn DirectTables<H>>,
    ) -> (Arc<Self>, ShadowWriter<F, H>) {
        debug_assert!(vm.slots().tracks_writes(), "direct tables would not be asked");
        Self::make(vm, config, quota, Some(direct))
    }

    fn make(
        vm: Arc<VmCore<H>>,
        config: SpteConfig<F>,
        quota: u32,
        beside: Option<Arc<dyn DirectTables<H>>>,
    ) -> (Arc<Self>, ShadowWriter<F, H>) {
        let (rmaps, rmap) = Rmaps::new(config.max_gfn_exclusive(), vm.give_up_cpu());
        let mmu = Arc::new(Self::new(vm, config, rmaps, beside));
        let writer = ShadowWriter {
            mmu: Arc::clone(&mmu),
            pages: Pages::default(),
            rmap,
            blocks: Blocks::new(mmu.config().max_gfn_exclusive()),
            stats: ShadowStats::default(),
            generation: 0,
            quota,
            policy: ReclaimPolicy::default(),
            window: 1,
            own_invalidations: 0,
            unwatched: None,
        };
        (mmu, writer)
    }
}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// The MMU.
    #[must_use]
    pub fn mmu(&self) -> &Arc<ShadowMmu<F, H>> {
        &self.mmu
    }

    /// What happened so far.
    #[must_use]
    pub const fn stats(&self) -> &ShadowStats {
        &self.stats
    }

    /// Shadow pages that there are.
    #[must_use]
    pub const fn live_pages(&self) -> u32 {
        self.pages.live()
    }

    /// Open a section, do `work` in it, pay for it.
    pub(crate) fn work<R>(
        &mut self,
        actor: &mut Actor<H>,
        work: impl FnOnce(&mut Work<'_, F, H>) -> R,
    ) -> R {
        self.work_with_frames(actor, |tools, _| work(tools))
    }

    /// The same, with the thread's table frames.
    pub(crate) fn work_with_frames<R>(
        &mut self,
        actor: &mut Actor<H>,
        work: impl FnOnce(&mut Work<'_, F, H>, &mut MmuCache) -> R,
    ) -> R {
        let SharedWork { section, cache, vm, stats, .. } = actor.shared();
        let mut tools = Work {
            writer: self,
            section: &section,
            vm,
            shard: stats,
            debt: FlushDebt::new(),
            scope: FlushScope::Ranges,
            to_watch: ArrayVec::new(),
        };
        let done = work(&mut tools, cache);
        let Work { debt, scope, to_watch, .. } = tools;
        drop(section);
        actor.pay(debt, scope);
        for page in to_watch {
            self.watch(actor, page);
        }
        done
    }
}

impl<F: SpteFormat, H: Host> fmt::Debug for ShadowWriter<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShadowWriter")
            .field("pages", &self.pages.live())
            .field("quota", &self.quota)
            .finish_non_exhaustive()
    }
}

/// The writer inside a section.
pub(crate) struct Work<'a, F: SpteFormat, H: Host> {
    pub(crate) writer: &'a mut ShadowWriter<F, H>,
    pub(crate) section: &'a Shared<'a>,
    pub(crate) vm: &'a VmCore<H>,
    pub(crate) shard: &'a StatsShard,
    pub(crate) debt: FlushDebt,
    /// How the debt is to be paid.
    pub(crate) scope: FlushScope,
    /// Pages whose tables direct tables beside are to let nobody write to unseen, from the end of
    /// the section on.
    pub(crate) to_watch: ArrayVec<PageId, MAX_WATCHED>,
}

impl<'a, F: SpteFormat, H: Host> Work<'a, F, H> {
    pub(crate) fn config(&self) -> &SpteConfig<F> {
        self.writer.mmu.config()
    }

    /// Is anything to be paid before what was done may be relied on?
    pub(crate) fn owes(&self) -> bool {
        !self.debt.is_empty() || !self.to_watch.is_empty()
    }

    /// The place of an entry; `None` if the page does not live, which is a contradiction.
    pub(crate) fn cell(&self, spte: SpteRef) -> Option<&'a SpteCell> {
        let frame = self.writer.pages.get(spte.page())?.frame;
        let section = self.section;
        self.vm.pool().table(section.epoch(), frame).entries().get(spte.index())
    }

    /// The page whose entries stand in `frame`, as the frame's owner noted it.
    pub(crate) fn page_in(&self, frame: mmu_core::addr::Pfn) -> Option<PageId> {
        let (number, _) = self.vm.pool().place(frame);
        u32::try_from(number.get()).ok().and_then(PageId::new)
    }

    /// The tables contradict each other: this VM cannot go on, its host can (KVM row 4.46).
    pub(crate) fn broken(&self) {
        debug_assert!(false, "the shadow tables contradict each other (I15)");
        self.vm.mark_dead(DeadReason::IllegalChange);
    }

    /// A linear address may go on reaching what a changed link led to: nobody knows which, so all
    /// go.
    pub(crate) fn owe_everything(&mut self) {
        self.owe_range(GfnRange::ALL);
    }

    /// A root is no good any more: every vCPU leaves the guest and looks at its root before it goes
    /// on (KVM row 4.47).
    pub(crate) fn owe_reload(&mut self) {
        self.writer.mmu.note_reload();
        self.scope = FlushScope::Reload;
        self.owe_everything();
    }

    /// Frames of `pages` pages from `gfn` on are stale in TLBs.
    pub(crate) fn owe(&mut self, gfn: Gfn, pages: u64) {
        self.owe_range(GfnRange::from_len(gfn, pages));
    }

    fn owe_range(&mut self, range: GfnRange) {
        self.shard.inc(Counter::FlushOwed);
        self.debt.owe(range);
    }
}
