//! The TDP MMU of one VM: its configuration and its roots.
//!
//! Owns [`TdpMmu`] and [`TdpOptions`]; the operations stand in files of their own (`map`, `zap`,
//! `age`, `root`, `walk`).

use alloc::sync::Arc;
use core::fmt;
use core::ops::Range;

use mmu_core::addr::Level;
use mmu_core::check::{CheckError, TreeCount, check_tree};
use mmu_core::dead::DeadReason;
use mmu_core::epoch::EpochGuard;
use mmu_core::paging::Paging;
use mmu_core::role::RootRole;
use mmu_core::slot::{Memslot, SlotChange, SlotError, SlotRequest, SlotWriter, plan};
use mmu_core::spte::{MMIO_GEN_BITS, SpteConfig, SpteFormat};
use mmu_core::stats::StatsShard;
use mmu_core::traits::Host;
use mmu_core::vm::{Actor, VmCore};

use crate::change::Change;
use crate::collapse::CollapseReport;
use crate::dirty::DirtyTracking;
use crate::external::ExternalTable;
use crate::nx::Nx;
use crate::root::{RootFilter, Roots};
use crate::split::SplitReport;
use crate::unflushed::Unflushed;
use crate::zap::ZapReport;

/// What goes when a memory slot is deleted or moved (KVM row 3.37).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SlotZap {
    /// The mappings of its range: work in proportion to the slot's tables, nothing else is missed.
    #[default]
    Range,
    /// Everything: the visible part is O(roots), and the vCPUs map again what they use. KVM's way
    /// for ordinary VMs, which embedders may have come to rely on.
    #[doc(alias = "KVM_X86_QUIRK_SLOT_ZAP_ALL")]
    All,
}

/// Policy of a [`TdpMmu`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TdpOptions {
    /// Largest page that faults map. The format's configuration may allow less.
    pub max_level: Level,
    /// How writes to logged slots are noticed.
    pub dirty: DirtyTracking,
    /// Split huge leaves when logging begins, instead of at the first write to each (KVM row 3.28).
    pub eager_split: bool,
    /// Map huge pages again when logging ends, instead of at the next fault that finds them split
    /// (KVM row 3.29).
    pub collapse_on_disable: bool,
    /// What goes when a memory slot is deleted or moved.
    pub slot_zap: SlotZap,
}

impl Default for TdpOptions {
    fn default() -> Self {
        Self {
            max_level: Level::MAX_LEAF,
            dirty: DirtyTracking::WriteProtect,
            eager_split: true,
            collapse_on_disable: true,
            slot_zap: SlotZap::Range,
        }
    }
}

/// The VM was made for another kind of MMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongPaging {
    /// What it was made for.
    pub paging: Paging,
}

impl fmt::Display for WrongPaging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the VM was made for {}", self.paging)
    }
}

impl core::error::Error for WrongPaging {}

/// Page tables in format `F` for the guest memory of one VM, shared by all its vCPUs.
pub struct TdpMmu<F: SpteFormat, H: Host> {
    vm: Arc<VmCore<H>>,
    config: SpteConfig<F>,
    nx: Nx<F>,
    options: TdpOptions,
    roots: Roots,
    unflushed: Unflushed,
    /// What a mirror mirrors.
    external: Option<Arc<dyn ExternalTable>>,
}

/// What a change of a memory slot did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct SlotUpdate {
    /// What the request meant.
    pub change: SlotChange,
    /// What a slot that was deleted or moved had mapped, in every tree, with its accessed and dirty
    /// bits; with [`SlotZap::All`] what everything had. Nothing of other changes, nor of the trees
    /// that [`around_update`](TdpMmu::around_update) drops.
    pub zapped: ZapReport,
    /// Huge pages that were split where logging began
    /// ([`eager_split`](TdpOptions::eager_split)), and what kept the rest huge.
    pub split: SplitReport,
    /// Huge pages that came back where logging ended
    /// ([`collapse_on_disable`](TdpOptions::collapse_on_disable)).
    pub collapsed: CollapseReport,
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// An MMU without roots; [`TdpVcpu::load_root`](crate::TdpVcpu::load_root) makes the first.
    ///
    /// # Panics
    /// When the VM was made for shadow paging. Who does not know uses [`try_new`](Self::try_new).
    #[must_use]
    pub fn new(vm: Arc<VmCore<H>>, config: SpteConfig<F>, options: TdpOptions) -> Arc<Self> {
        assert!(vm.paging() == Paging::Tdp, "the VM was made for {}", vm.paging());
        Arc::new(Self::make(vm, config, options, None))
    }

    /// The same for a VM that may have been made for shadow paging.
    ///
    /// # Errors
    /// [`WrongPaging`] says what it was made for.
    pub fn try_new(
        vm: Arc<VmCore<H>>,
        config: SpteConfig<F>,
        options: TdpOptions,
    ) -> Result<Arc<Self>, WrongPaging> {
        match vm.paging() {
            Paging::Tdp => Ok(Arc::new(Self::make(vm, config, options, None))),
            paging @ Paging::Shadow => Err(WrongPaging { paging }),
        }
    }

    pub(crate) fn make(
        vm: Arc<VmCore<H>>,
        config: SpteConfig<F>,
        options: TdpOptions,
        external: Option<Arc<dyn ExternalTable>>,
    ) -> Self {
        let give_up_cpu = vm.give_up_cpu();
        let (roots, unflushed) = (Roots::new(give_up_cpu), Unflushed::new(give_up_cpu));
        let nx = Nx::new(&config);
        Self { vm, config, nx, options, roots, unflushed, external }
    }

    /// The VM.
    #[inline]
    #[must_use]
    pub fn vm(&self) -> &Arc<VmCore<H>> {
        &self.vm
    }

    /// Format and capabilities of the entries. The mitigation of huge pages is as the MMU was made;
    /// what is in force says [`nx_huge_pages`](Self::nx_huge_pages).
    #[inline]
    #[must_use]
    pub fn config(&self) -> &SpteConfig<F> {
        &self.config
    }

    /// Policy.
    #[inline]
    #[must_use]
    pub fn options(&self) -> &TdpOptions {
        &self.options
    }

    /// Operations that change or read tables through an actor of another VM would wait for the
    /// wrong sections.
    pub(crate) fn assert_own(&self, actor: &Actor<H>) {
        assert!(Arc::ptr_eq(actor.vm(), &self.vm), "the actor belongs to another VM");
    }

    /// The means to change entries of a tree of address space `space`.
    #[inline(always)]
    pub(crate) fn change<'a>(
        &'a self,
        vm: &'a VmCore<H>,
        stats: &'a StatsShard,
        section: &'a EpochGuard<'a>,
        space: u16,
    ) -> Change<'a, F, H> {
        let tracking = self.dirty_tracking();
        let nx_wanted = Level::L1;
        Change { config: &self.config, vm, stats, section, space, tracking, nx_wanted }
    }

    #[inline]
    pub(crate) fn nx(&self) -> &Nx<F> {
        &self.nx
    }

    #[inline]
    pub(crate) fn roots(&self) -> &Roots {
        &self.roots
    }

    /// The table that this MMU mirrors, if it is a mirror.
    #[inline]
    pub(crate) fn external(&self) -> Option<&dyn ExternalTable> {
        self.external.as_deref()
    }

    /// Indices of the roots whose entries may be changed without asking anybody else: none of a
    /// mirror.
    pub(crate) fn changeable_roots(&self) -> Range<usize> {
        if self.external.is_some() { 0..0 } else { 0..self.roots.reach() }
    }

    #[inline]
    pub(crate) fn unflushed(&self) -> &Unflushed {
        &self.unflushed
    }

    /// Role of the root that a vCPU in address space `space` uses.
    #[must_use]
    pub fn role(&self, space: u8) -> RootRole {
        let role = RootRole::new(self.config.levels(), space);
        if self.config.ad_enabled() { role } else { role.with_ad_disabled() }
    }

    /// Create, delete, move or change a memory slot; this MMU's mappings of a slot that goes away
    /// are gone, flushed, when this returns, in every address space (KVM row 6.6), and reported.
    /// For a VM with one MMU; with several, call [`VmCore::set_slot`] and zap in each.
    ///
    /// # Errors
    /// [`SlotError`] names the rule and the values; nothing changed.
    pub fn set_slot(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
        request: &SlotRequest,
    ) -> Result<SlotUpdate, SlotError> {
        self.change_slot(writer, actor, request, None, |_, _| {})
    }

    /// The same; of a slot with `LOG_DIRTY` only `pages`, counted from its first page, are logged.
    ///
    /// # Errors
    /// As [`set_slot`](Self::set_slot), and [`SlotError::LogRange`].
    pub fn set_slot_logging(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
        request: &SlotRequest,
        pages: Range<u64>,
    ) -> Result<SlotUpdate, SlotError> {
        self.change_slot(writer, actor, request, Some(pages), |_, _| {})
    }

    /// The same for a VM with another MMU beside this one, which `zap_beside` asks to remove every
    /// mapping of a slot that goes away, flushed. `pages` are the pages that are logged; `None`:
    /// all. What a change of flags asks of the other MMU is its caller's to do.
    ///
    /// # Errors
    /// As [`set_slot_logging`](Self::set_slot_logging).
    pub fn set_slot_beside(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
        request: &SlotRequest,
        pages: Option<Range<u64>>,
        zap_beside: impl FnOnce(&mut Actor<H>, &Memslot),
    ) -> Result<SlotUpdate, SlotError> {
        self.change_slot(writer, actor, request, pages, zap_beside)
    }

    fn change_slot(
        &self,
        writer: &mut SlotWriter,
        actor: &mut Actor<H>,
        request: &SlotRequest,
        logged: Option<Range<u64>>,
        zap_beside: impl FnOnce(&mut Actor<H>, &Memslot),
    ) -> Result<SlotUpdate, SlotError> {
        self.assert_own(actor);
        let (mut zapped, mut split) = (ZapReport::default(), SplitReport::default());
        let mut collapsed = CollapseReport::default();
        if writer.live().next_wraps(MMIO_GEN_BITS) {
            // Requests that are bad or mean nothing drop no tree, however many there are.
            let change = plan(writer.live(), writer.limits(), request)?;
            if change == SlotChange::Nothing && logged.is_none() {
                return Ok(SlotUpdate { change, zapped, split, collapsed });
            }
        }
        let zap = |actor: &mut Actor<H>, old: &Memslot| {
            zapped = self.zap_slot(actor, old);
            zap_beside(actor, old);
        };
        let update = |writer: &mut SlotWriter, actor: &mut Actor<H>| match logged {
            None => self.vm.set_slot(writer, actor, request, zap),
            Some(pages) => self.vm.set_slot_logging(writer, actor, request, pages, zap),
        };
        let change = self.around_update(writer, actor, update)?;
        if let SlotChange::Flags { old, new } = &change {
            match (old.logs_dirty(), new.logs_dirty()) {
                (true, true) => split = self.log_resized(actor, new.as_id, new.id),
                (false, true) => split = self.log_enabled(actor, new.as_id, new.id),
                (true, false) => collapsed = self.log_disabled(actor, new),
                (false, false) => {}
            }
        }
        Ok(SlotUpdate { change, zapped, split, collapsed })
    }

    /// Remove the mappings of a slot that goes away, whose faults retry already.
    fn zap_slot(&self, actor: &mut Actor<H>, old: &Memslot) -> ZapReport {
        match self.options.slot_zap {
            SlotZap::Range => self.unmap(actor, old.range()),
            SlotZap::All => self.invalidate_roots(actor).finish(actor),
        }
    }

    /// Give everything back: for the end of a VM, when no vCPU exists any more. Waits for what is
    /// pending (KVM rows 3.5, 3.6). A mirror that cannot be removed marks the VM dead and keeps its
    /// memory; see [`try_destroy`](Self::try_destroy).
    pub fn destroy(&self, actor: &mut Actor<H>) -> ZapReport {
        if self.external.is_none() {
            return self.invalidate_roots(actor).finish(actor);
        }
        self.try_destroy(actor).unwrap_or_else(|error| {
            self.vm.mark_dead(DeadReason::ExternalTable);
            error.removed
        })
    }

    /// Walk every valid root and check each entry (invariants I1, I4 to I7), counting what is
    /// mapped. Exact when nobody changes the tables meanwhile.
    ///
    /// # Errors
    /// The first entry that breaks a rule.
    pub fn check(&self, actor: &mut Actor<H>) -> Result<TreeCount, CheckError> {
        self.assert_own(actor);
        let mut total = TreeCount::default();
        for index in 0..self.roots.reach() {
            let work = actor.pinned();
            let Some(root) = self.roots.get(index, RootFilter::InUse) else { continue };
            let count = check_tree(
                &self.config,
                work.vm.pool(),
                &work.section,
                root.frame,
                root.role.level(),
            )?;
            // INVARIANT[I24]: the recount that the gauges must equal.
            total.merge(&count);
        }
        Ok(total)
    }
}

impl<F: SpteFormat, H: Host> fmt::Debug for TdpMmu<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TdpMmu")
            .field("format", &F::NAME)
            .field("config", &self.config)
            .field("roots", &self.roots)
            .finish_non_exhaustive()
    }
}
