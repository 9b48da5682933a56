//! A VM with its MMUs: which there are, chosen when it is made and kept.
//!
//! Owns [`Vm`]: direct tables, direct tables and shadow tables for the guest's own guests, or
//! shadow tables alone. What concerns guest memory goes to each MMU that there is (`memory`, `log`,
//! `track`, `age`), in the order that their protocols ask for; what a vCPU does goes to the one
//! that it runs on (`vcpu`). Locks are those of the MMUs; the shadow MMU's writer is in the lock
//! that the embedder gives.

use alloc::sync::Arc;
use core::fmt;

use mmu_core::paging::Paging;
use mmu_core::slot::{SlotError, SlotWriter};
use mmu_core::spte::{SpteConfig, SpteFormat};
use mmu_core::traits::Host;
use mmu_core::vm::{Actor, VmCore};
use shadow_mmu::{ShadowMmu, ShadowWriter, WriterLock};
use tdp_mmu::{TdpMmu, TdpOptions, WrongPaging};

/// A shadow MMU and the lock around its writer.
pub struct Shadow<F: SpteFormat, H: Host, L> {
    /// The MMU.
    pub mmu: Arc<ShadowMmu<F, H>>,
    /// Where its writer is.
    pub lock: L,
}

enum Mmus<F: SpteFormat, H: Host, L> {
    Direct(Arc<TdpMmu<F, H>>),
    Nested(Arc<TdpMmu<F, H>>, Shadow<F, H, L>),
    Shadow(Shadow<F, H, L>),
}

/// A VM whose tables are in format `F`. See the file's head.
pub struct Vm<F: SpteFormat, H: Host, L> {
    core: Arc<VmCore<H>>,
    mmus: Mmus<F, H, L>,
}

/// A VM could not get its MMUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VmMmuError {
    /// It was made for another kind of paging.
    Paging(WrongPaging),
    /// Its slots cannot count who wants to see writes.
    Slots(SlotError),
}

impl fmt::Display for VmMmuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Paging(error) => error.fmt(f),
            Self::Slots(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for VmMmuError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Paging(error) => Some(error),
            Self::Slots(error) => Some(error),
        }
    }
}

impl From<WrongPaging> for VmMmuError {
    fn from(error: WrongPaging) -> Self {
        Self::Paging(error)
    }
}

impl From<SlotError> for VmMmuError {
    fn from(error: SlotError) -> Self {
        Self::Slots(error)
    }
}

impl<F: SpteFormat, H: Host, L: WriterLock<F, H>> Vm<F, H, L> {
    /// Direct tables only: the guest has no guests of its own, or none whose tables it makes.
    ///
    /// # Errors
    /// [`VmMmuError::Paging`]: the VM was made for shadow paging.
    pub fn direct(
        core: Arc<VmCore<H>>,
        config: SpteConfig<F>,
        options: TdpOptions,
    ) -> Result<Arc<Self>, VmMmuError> {
        let direct = TdpMmu::try_new(Arc::clone(&core), config, options)?;
        Ok(Arc::new(Self { core, mmus: Mmus::Direct(direct) }))
    }

    /// Shadow tables only, up to `quota` pages of them, for the guest and for guests of its own.
    ///
    /// # Errors
    /// [`VmMmuError::Paging`]: the VM was made for two-dimensional paging.
    pub fn shadow_only(
        core: Arc<VmCore<H>>,
        config: SpteConfig<F>,
        quota: u32,
        lock: impl FnOnce(ShadowWriter<F, H>) -> L,
    ) -> Result<Arc<Self>, VmMmuError> {
        match core.paging() {
            Paging::Shadow => {}
            paging @ Paging::Tdp => return Err(WrongPaging { paging }.into()),
        }
        let (mmu, writer) = ShadowMmu::create(Arc::clone(&core), config, quota);
        let shadow = Shadow { mmu, lock: lock(writer) };
        Ok(Arc::new(Self { core, mmus: Mmus::Shadow(shadow) }))
    }

    /// What the MMUs share.
    #[must_use]
    pub fn core(&self) -> &Arc<VmCore<H>> {
        &self.core
    }

    /// The direct tables; `None` in a VM of shadow tables only.
    #[must_use]
    pub fn tdp(&self) -> Option<&Arc<TdpMmu<F, H>>> {
        match &self.mmus {
            Mmus::Direct(direct) | Mmus::Nested(direct, _) => Some(direct),
            Mmus::Shadow(_) => None,
        }
    }

    /// The shadow tables; `None` in a VM of direct tables only.
    #[must_use]
    pub fn shadow(&self) -> Option<&Shadow<F, H, L>> {
        match &self.mmus {
            Mmus::Nested(_, shadow) | Mmus::Shadow(shadow) => Some(shadow),
            Mmus::Direct(_) => None,
        }
    }
}

impl<F: SpteFormat, H: Host + 'static, L: WriterLock<F, H>> Vm<F, H, L> {
    /// Direct tables for the guest, and up to `quota` shadow pages for guests of its own. Writes
    /// are tracked from now on ([`VmCore::enable_write_tracking`]), in whose favour `slots` is.
    /// `lock` puts the shadow MMU's writer where one thread at a time has it.
    ///
    /// # Errors
    /// [`VmMmuError`]; the VM has no MMU, but may track writes.
    pub fn nested(
        core: Arc<VmCore<H>>,
        (slots, actor): (&mut SlotWriter, &mut Actor<H>),
        config: SpteConfig<F>,
        options: TdpOptions,
        quota: u32,
        lock: impl FnOnce(ShadowWriter<F, H>) -> L,
    ) -> Result<Arc<Self>, VmMmuError> {
        let direct = TdpMmu::try_new(Arc::clone(&core), config.clone(), options)?;
        core.enable_write_tracking(slots, actor)?;
        let (mmu, writer) =
            ShadowMmu::create_beside(Arc::clone(&core), config, quota, Arc::clone(&direct) as _);
        let shadow = Shadow { mmu, lock: lock(writer) };
        Ok(Arc::new(Self { core, mmus: Mmus::Nested(direct, shadow) }))
    }
}

impl<F: SpteFormat, H: Host, L> fmt::Debug for Shadow<F, H, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shadow").field("mmu", &self.mmu).finish_non_exhaustive()
    }
}

impl<F: SpteFormat, H: Host, L: WriterLock<F, H>> fmt::Debug for Vm<F, H, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("tdp", &self.tdp())
            .field("shadow", &self.shadow())
            .finish_non_exhaustive()
    }
}
