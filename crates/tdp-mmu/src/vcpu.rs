//! A vCPU as the MMU sees it: a thread's actor and the root it runs on.
//!
//! Owns [`TdpVcpu`]. Its owner calls [`load_root`](TdpVcpu::load_root) before each entry into the
//! guest when [`root_is_current`](TdpVcpu::root_is_current) says no, and [`fault`](TdpVcpu::fault)
//! on each exit for a missing translation.

use alloc::sync::Arc;
use core::fmt;

use mmu_core::addr::Pfn;
use mmu_core::epoch::EpochError;
use mmu_core::role::RootRole;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::leaf::LeafCache;
use crate::mmu::TdpMmu;
use crate::recent::Recent;
use crate::root::{RootError, RootRef};

/// One vCPU's use of a [`TdpMmu`].
pub struct TdpVcpu<F: SpteFormat, H: Host> {
    pub(crate) mmu: Arc<TdpMmu<F, H>>,
    pub(crate) actor: Actor<H>,
    pub(crate) root: Option<RootRef>,
    pub(crate) leaf: LeafCache,
    pub(crate) recent: Recent,
    pub(crate) role: RootRole,
}

impl<F: SpteFormat, H: Host> TdpVcpu<F, H> {
    /// A vCPU of address space `space` (0 normal, 1 SMM), with no root loaded.
    ///
    /// # Errors
    /// [`EpochError::Full`] when the VM has as many participants as it was made for.
    pub fn new(mmu: &Arc<TdpMmu<F, H>>, space: u8) -> Result<Self, EpochError> {
        let actor = mmu.vm().actor()?;
        Ok(Self {
            mmu: Arc::clone(mmu),
            actor,
            root: None,
            leaf: LeafCache::new(),
            recent: Recent::NONE,
            role: mmu.role(space),
        })
    }

    /// The MMU.
    #[must_use]
    pub fn mmu(&self) -> &Arc<TdpMmu<F, H>> {
        &self.mmu
    }

    /// This thread's handle, for operations of the MMU that take one.
    pub fn actor(&mut self) -> &mut Actor<H> {
        &mut self.actor
    }

    /// The role of the roots this vCPU uses.
    #[must_use]
    pub fn role(&self) -> RootRole {
        self.role
    }

    /// Is a root loaded, and still valid? Ask before **every** entry into the guest, in this order:
    /// announce the entry where your [`TlbFlush::wait`](mmu_core::traits::TlbFlush::wait) looks for
    /// it, execute a full barrier, then ask; if the answer is no, take the announcement back and
    /// [`load_root`](Self::load_root). A zap-all makes roots invalid, then waits for announced
    /// vCPUs ([`FlushScope::Reload`](mmu_core::flush::FlushScope::Reload)); an answer taken before
    /// the announcement may be stale, and the CPU would walk tables that are being given back.
    #[must_use]
    pub fn root_is_current(&self) -> bool {
        self.root.is_some_and(|root| self.mmu.roots().is_valid(&root))
    }

    /// The frame of a valid root for this vCPU, to be loaded into CR3, EPTP or nCR3 with a flush of
    /// this CPU's TLB (KVM rows 0.2.12, 3.12). References to a former root are dropped: the caller
    /// must not enter the guest on it again.
    ///
    /// # Errors
    /// [`RootError`]; the former root, if still valid, stays loaded.
    pub fn load_root(&mut self) -> Result<Pfn, RootError> {
        if let Some(root) = self.root {
            if self.mmu.roots().is_valid(&root) {
                return Ok(root.frame);
            }
        }
        let root = self.mmu.root(&mut self.actor, self.role)?;
        self.unload_root();
        self.root = Some(root);
        Ok(root.frame)
    }

    /// Drop the reference to the root. Call before the vCPU blocks (halts, waits for its thread to
    /// be scheduled again): a root that became invalid keeps its place among the
    /// [`MAX_ROOTS`](crate::root::MAX_ROOTS) until every vCPU has dropped it.
    pub fn unload_root(&mut self) {
        // A table of that tree means nothing any more.
        self.recent = Recent::NONE;
        if let Some(root) = self.root.take() {
            self.mmu.put_root(self.actor.stats(), root);
        }
    }
}

impl<F: SpteFormat, H: Host> Drop for TdpVcpu<F, H> {
    fn drop(&mut self) {
        self.unload_root();
    }
}

impl<F: SpteFormat, H: Host> fmt::Debug for TdpVcpu<F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TdpVcpu")
            .field("role", &self.role)
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}
