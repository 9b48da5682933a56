//! A vCPU as the MMU sees it: a thread's actor and the root it runs on.
//!
//! Owns [`TdpVcpu`]. Its owner calls [`load_root`](TdpVcpu::load_root) before each entry into the
//! guest when [`root_is_current`](TdpVcpu::root_is_current) says no, and [`fault`](TdpVcpu::fault)
//! on each exit for a missing translation. [`switch_space`](TdpVcpu::switch_space) takes it into
//! another address space and back, on roots that it keeps.

use alloc::sync::Arc;
use core::fmt;

use arrayvec::ArrayVec;

use mmu_core::addr::Pfn;
use mmu_core::epoch::EpochError;
use mmu_core::role::RootRole;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::leaf::LeafCache;
use crate::mmio::MmioInfo;
use crate::mmu::TdpMmu;
use crate::recent::Recent;
use crate::root::{RootError, RootRef};

/// Roots that a vCPU keeps besides the one it runs on.
#[doc(alias = "KVM_MMU_NUM_PREV_ROOTS")]
pub const PREVIOUS_ROOTS: usize = 3;

/// One vCPU's use of a [`TdpMmu`].
pub struct TdpVcpu<F: SpteFormat, H: Host> {
    pub(crate) mmu: Arc<TdpMmu<F, H>>,
    pub(crate) actor: Actor<H>,
    pub(crate) root: Option<RootRef>,
    /// Roots that it ran on before, the last one first; each a counted reference.
    previous: ArrayVec<RootRef, PREVIOUS_ROOTS>,
    pub(crate) mmio: Option<MmioInfo>,
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
            previous: ArrayVec::new(),
            mmio: None,
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
    /// this CPU's TLB (KVM rows 0.2.12, 3.12). References to roots that became invalid are dropped:
    /// the caller must not enter the guest on them again.
    ///
    /// # Errors
    /// [`RootError`]; the former root, if still valid, stays loaded.
    pub fn load_root(&mut self) -> Result<Pfn, RootError> {
        if let Some(root) = self.root {
            if self.mmu.roots().is_valid(&root) {
                if !self.previous.is_empty() {
                    self.drop_obsolete_previous();
                }
                return Ok(root.frame);
            }
        }
        let root = self.mmu.root(&mut self.actor, self.role)?;
        self.drop_obsolete_roots();
        self.root = Some(root);
        Ok(root.frame)
    }

    /// Go on in address space `space`, as the CPU does when it enters or leaves SMM; returns what
    /// [`load_root`](Self::load_root) does, to be loaded with the same care. The root that is left
    /// is kept, with up to [`PREVIOUS_ROOTS`] of those before it: coming back to one that is still
    /// valid changes nothing that is shared and maps nothing again (KVM row 3.13, bug B64). It is
    /// recognised by its whole role.
    ///
    /// # Errors
    /// [`RootError::NoSuchSpace`], and as [`load_root`](Self::load_root) if there is no such root
    /// to come back to; the vCPU stays where it is.
    #[doc(alias = "fast_pgd_switch")]
    pub fn switch_space(&mut self, space: u8) -> Result<Pfn, RootError> {
        let role = self.mmu.role(space);
        if role == self.role {
            return self.load_root();
        }
        let valid = |root: &RootRef| self.mmu.roots().is_valid(root);
        let kept = self.previous.iter().position(|root| root.role == role && valid(root));
        let root = match kept.and_then(|at| self.previous.pop_at(at)) {
            Some(root) => root,
            None => self.first_root(space, role)?,
        };
        // A table of the other tree means nothing here.
        self.recent = Recent::NONE;
        self.role = role;
        if let Some(left) = self.root.replace(root) {
            if self.previous.is_full() {
                self.drop_obsolete_previous();
            }
            if self.previous.is_full() {
                // The one that was not used for longest.
                self.previous.pop().into_iter().for_each(|root| self.put(root));
            }
            self.previous.insert(0, left);
        }
        Ok(root.frame)
    }

    /// A root of a role that this vCPU keeps none of.
    #[cold]
    fn first_root(&mut self, space: u8, role: RootRole) -> Result<RootRef, RootError> {
        let work = self.actor.pinned();
        let spaces = work.vm.slots().read(&work.section).address_spaces();
        drop(work);
        if u16::from(space) >= spaces {
            return Err(RootError::NoSuchSpace { space, spaces });
        }
        self.drop_obsolete_previous();
        self.mmu.root(&mut self.actor, role)
    }

    /// Drop the references to roots that became invalid, each judged by itself (KVM row 3.14, bug
    /// B30). [`load_root`](Self::load_root) does; call it where the vCPU stays out of the guest
    /// without an [`unload_root`](Self::unload_root). The caller must not enter the guest on such a
    /// root again.
    #[doc(alias = "kvm_mmu_free_obsolete_roots")]
    pub fn drop_obsolete_roots(&mut self) {
        self.drop_obsolete_previous();
        if !self.root_is_current() {
            self.drop_current();
        }
    }

    fn drop_obsolete_previous(&mut self) {
        let mut at = 0;
        while let Some(root) = self.previous.get(at).copied() {
            if self.mmu.roots().is_valid(&root) {
                at += 1;
            } else {
                self.previous.remove(at);
                self.put(root);
            }
        }
    }

    fn drop_current(&mut self) {
        // A table of that tree means nothing any more.
        self.recent = Recent::NONE;
        self.root.take().into_iter().for_each(|root| self.put(root));
    }

    fn put(&self, root: RootRef) {
        self.mmu.put_root(self.actor.stats(), root);
    }

    /// Drop the references to the root and to those kept besides. Call before the vCPU blocks
    /// (halts, waits for its thread to be scheduled again): an invalid root keeps its place
    /// among the [`MAX_ROOTS`](crate::root::MAX_ROOTS) until every vCPU has dropped it.
    pub fn unload_root(&mut self) {
        self.drop_current();
        for root in core::mem::take(&mut self.previous) {
            self.put(root);
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
