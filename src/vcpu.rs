//! A vCPU: which of its VM's MMUs it runs on.
//!
//! Owns [`Vcpu`]: a handle on each MMU that there is, and which one the vCPU is on. The guest
//! itself runs on direct tables where there are any, a guest of its own on shadow tables. That
//! changes only when the other tables are loaded, so a nested entry that fails leaves the vCPU
//! where it was (KVM bug B47); and what a guest hypervisor flushes of its guest's goes to the
//! shadow tables whichever the vCPU is on (bug B77).
//!
//! A vCPU is two participants of its VM, one for each MMU. An address that shadow tables translate
//! is a guest's guest's: a flush by guest frames means everything on a CPU that is on them.

use alloc::sync::Arc;
use core::fmt;

use mmu_core::addr::{Gpa, Hpa};
use mmu_core::epoch::EpochError;
use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use shadow_mmu::guest::{
    GuestMem, GuestRoot, GuestWalker, NestedRequest, NestedWalk, NestedWalker,
};
use shadow_mmu::{DirectWrite, PageRole, ShadowError, ShadowVcpu, WriterLock};
use tdp_mmu::{RootError, TdpVcpu};

use crate::vm::{Shadow, Vm};

/// Whose addresses the vCPU's tables translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runs {
    /// The guest's own: its physical ones, by direct tables, or its linear ones, by shadow tables.
    Guest,
    /// The physical ones of a guest of its own, by shadow tables.
    Nested,
}

/// Why a vCPU did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuError {
    /// The VM has no such tables.
    NoMmu {
        /// Whose addresses they would translate.
        wanted: Runs,
    },
    /// The vCPU is not on those tables.
    NotOn {
        /// What it is on.
        runs: Runs,
    },
    /// There is no root of direct tables.
    Root(RootError),
    /// The fault cannot be handled by direct tables.
    Fault(FaultError),
    /// Shadow tables cannot do it.
    Shadow(ShadowError),
}

impl fmt::Display for VcpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMmu { wanted } => write!(f, "the VM has no tables for {wanted:?}"),
            Self::NotOn { runs } => write!(f, "the vCPU is on tables for {runs:?}"),
            Self::Root(error) => error.fmt(f),
            Self::Fault(error) => error.fmt(f),
            Self::Shadow(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for VcpuError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Root(error) => Some(error),
            Self::Fault(error) => Some(error),
            Self::Shadow(error) => Some(error),
            Self::NoMmu { .. } | Self::NotOn { .. } => None,
        }
    }
}

impl From<RootError> for VcpuError {
    fn from(error: RootError) -> Self {
        Self::Root(error)
    }
}

impl From<FaultError> for VcpuError {
    fn from(error: FaultError) -> Self {
        Self::Fault(error)
    }
}

impl From<ShadowError> for VcpuError {
    fn from(error: ShadowError) -> Self {
        Self::Shadow(error)
    }
}

/// One vCPU's use of a [`Vm`]. See the file's head.
pub struct Vcpu<F: SpteFormat, H: Host, L: WriterLock<F, H>> {
    vm: Arc<Vm<F, H, L>>,
    direct: Option<TdpVcpu<F, H>>,
    shadow: Option<ShadowVcpu<F, H>>,
    runs: Runs,
    space: u8,
}

impl<F: SpteFormat, H: Host, L: WriterLock<F, H>> Vcpu<F, H, L> {
    /// A vCPU of address space `space` (0 normal, 1 SMM), without a root.
    ///
    /// # Errors
    /// [`EpochError`]: the VM has as many participants as it was made for.
    pub fn new(vm: &Arc<Vm<F, H, L>>, space: u8) -> Result<Self, EpochError> {
        let direct = vm.tdp().map(|mmu| TdpVcpu::new(mmu, space)).transpose()?;
        let shadow = vm.shadow().map(|shadow| ShadowVcpu::new(&shadow.mmu)).transpose()?;
        Ok(Self { vm: Arc::clone(vm), direct, shadow, runs: Runs::Guest, space })
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> &Arc<Vm<F, H, L>> {
        &self.vm
    }

    /// Whose addresses its tables translate.
    #[must_use]
    pub fn runs(&self) -> Runs {
        self.runs
    }

    /// The handle on direct tables, for calls that have nothing to do with shadow tables.
    pub fn direct(&mut self) -> Option<&mut TdpVcpu<F, H>> {
        self.direct.as_mut()
    }

    /// The handle on shadow tables, with the lock of their writer: a guest without direct tables
    /// loads its roots and has its faults handled by it, and so may guests of its own.
    pub fn shadow(&mut self) -> Option<(&mut ShadowVcpu<F, H>, &L)> {
        let lock = &self.vm.shadow()?.lock;
        self.shadow.as_mut().map(|shadow| (shadow, lock))
    }

    /// Go on as the guest itself, on direct tables: their root, to be loaded as
    /// [`TdpVcpu::load_root`] says. What a guest of its own ran on is kept.
    ///
    /// # Errors
    /// [`VcpuError::NoMmu`] in a VM of shadow tables only, [`VcpuError::Root`]; the vCPU stays
    /// where it is.
    pub fn enter_guest(&mut self) -> Result<Hpa, VcpuError> {
        let wanted = Runs::Guest;
        let direct = self.direct.as_mut().ok_or(VcpuError::NoMmu { wanted })?;
        let root = direct.load_root()?;
        self.runs = Runs::Guest;
        Ok(root.address())
    }

    /// In a VM of shadow tables only: go on as the guest itself, on shadows of its tables at
    /// `root`. As [`ShadowVcpu::load_guest_root`].
    ///
    /// # Errors
    /// [`VcpuError::NoMmu`] in a VM whose guest is on direct tables, [`VcpuError::Shadow`]; the
    /// vCPU stays where it is.
    pub fn enter_shadowed<M: GuestMem + ?Sized>(
        &mut self,
        guest: &GuestWalker,
        mem: &M,
        root: &GuestRoot,
        role: PageRole,
    ) -> Result<Hpa, VcpuError> {
        let wanted = Runs::Guest;
        let role = role.in_space(u16::from(self.space));
        if self.direct.is_some() {
            return Err(VcpuError::NoMmu { wanted });
        }
        let (shadow, lock) = self.shadow().ok_or(VcpuError::NoMmu { wanted })?;
        let address = shadow.load_guest_root(lock, guest, mem, root, role)?;
        self.runs = wanted;
        Ok(address)
    }

    /// The guest enters a guest of its own, on the nested tables at `root`: its EPT pointer or
    /// nested CR3. As [`ShadowVcpu::load_nested_root`].
    ///
    /// # Errors
    /// [`VcpuError::NoMmu`] in a VM of direct tables only, [`VcpuError::Shadow`]; the vCPU stays
    /// where it is.
    pub fn enter_nested<M: GuestMem + ?Sized>(
        &mut self,
        nested: &NestedWalker,
        mem: &M,
        root: u64,
    ) -> Result<Hpa, VcpuError> {
        let wanted = Runs::Nested;
        let space = u16::from(self.space);
        if mmu_core::busted!("nested_entry_not_rolled_back") {
            self.runs = wanted;
        }
        let (shadow, lock) = self.shadow().ok_or(VcpuError::NoMmu { wanted })?;
        let address = shadow.load_nested_root(lock, nested, mem, root, space)?;
        self.runs = wanted;
        Ok(address)
    }

    /// Is the root that the vCPU is on still good? Ask before every entry, as
    /// [`TdpVcpu::root_is_current`] says; if not, enter anew.
    #[must_use]
    pub fn root_is_current(&mut self) -> bool {
        match (self.runs, &self.direct) {
            (Runs::Guest, Some(direct)) => direct.root_is_current(),
            _ => self.shadow().is_some_and(|(shadow, _)| shadow.root_is_current()),
        }
    }

    /// Handle a fault of the guest itself on a physical address, as [`TdpVcpu::fault`] does. A
    /// write to a table that has a shadow is granted if the shadow may go out of sync, else
    /// [`FaultOutcome::WriteProtected`]: emulate and report it ([`Vm::guest_wrote`]) or give the
    /// shadow up ([`Vm::unprotect`]).
    ///
    /// # Errors
    /// [`VcpuError::NotOn`] while a guest of its own runs, [`VcpuError::NoMmu`] without direct
    /// tables, [`VcpuError::Fault`]; no entry was changed.
    pub fn fault(&mut self, fault: &PageFault) -> Result<FaultOutcome, VcpuError> {
        if self.runs != Runs::Guest {
            return Err(VcpuError::NotOn { runs: self.runs });
        }
        let wanted = Runs::Guest;
        let direct = self.direct.as_mut().ok_or(VcpuError::NoMmu { wanted })?;
        let outcome = direct.fault(fault)?;
        let Some(Shadow { lock, .. }) = self.vm.shadow() else { return Ok(outcome) };
        if outcome != FaultOutcome::WriteProtected || fault.prefetch {
            return Ok(outcome);
        }
        match lock.with(|writer| writer.direct_write(direct.actor(), fault.gfn())) {
            DirectWrite::Protected => Ok(outcome),
            DirectWrite::Retry => match direct.fault(fault)? {
                // Somebody else synchronised the table meanwhile.
                FaultOutcome::WriteProtected => Ok(FaultOutcome::Retry),
                outcome => Ok(outcome),
            },
        }
    }

    /// Handle an access of a guest's guest to the physical address that `walk` translated by the
    /// tables it was [entered](Self::enter_nested) on, as [`ShadowVcpu::nested_fault`] does.
    ///
    /// # Errors
    /// [`VcpuError::NotOn`] while the guest itself runs, [`VcpuError::Shadow`]; no entry was
    /// changed.
    pub fn nested_fault<M: GuestMem + ?Sized>(
        &mut self,
        nested: &NestedWalker,
        mem: &M,
        walk: &NestedWalk,
        request: NestedRequest,
    ) -> Result<FaultOutcome, VcpuError> {
        if self.runs != Runs::Nested {
            return Err(VcpuError::NotOn { runs: self.runs });
        }
        let wanted = Runs::Nested;
        let (shadow, lock) = self.shadow().ok_or(VcpuError::NoMmu { wanted })?;
        Ok(shadow.nested_fault(lock, nested, mem, walk, request)?)
    }

    /// The guest flushed what its guest's tables translate (INVEPT, or an address space of its
    /// guest's), as [`ShadowVcpu::nested_flushed`]; whatever the vCPU is on.
    pub fn nested_flushed<M: GuestMem + ?Sized>(&mut self, nested: &NestedWalker, mem: &M) {
        if self.runs == Runs::Guest && mmu_core::busted!("flush_of_the_current_mmu") {
            return;
        }
        if let Some((shadow, lock)) = self.shadow() {
            shadow.nested_flushed(lock, nested, mem);
        }
    }

    /// A nested fault at `gpa` goes to the guest, as [`ShadowVcpu::nested_invalidated`]; whatever
    /// the vCPU is on.
    pub fn nested_invalidated<M: GuestMem + ?Sized>(
        &mut self,
        nested: &NestedWalker,
        mem: &M,
        gpa: Gpa,
    ) {
        if let Some((shadow, lock)) = self.shadow() {
            shadow.nested_invalidated(lock, nested, mem, gpa);
        }
    }

    /// Leave every root: before the vCPU blocks for long. The next entry loads one.
    pub fn unload_roots(&mut self) {
        if let Some((shadow, lock)) = self.shadow() {
            shadow.drop_roots(lock);
        }
        if let Some(direct) = &mut self.direct {
            direct.unload_root();
        }
    }
}

impl<F: SpteFormat, H: Host, L: WriterLock<F, H>> Drop for Vcpu<F, H, L> {
    fn drop(&mut self) {
        self.unload_roots();
    }
}

impl<F: SpteFormat, H: Host, L: WriterLock<F, H>> fmt::Debug for Vcpu<F, H, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("runs", &self.runs)
            .field("direct", &self.direct)
            .field("shadow", &self.shadow)
            .finish_non_exhaustive()
    }
}
