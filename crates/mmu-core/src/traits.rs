//! What the embedder gives to an MMU ([`TlbFlush`], [`PfnResolver`], [`Trace`], together [`Host`])
//! and what an MMU gives to its users ([`AgeRange`], which stands in [`crate::age`]).
//!
//! Frames have a contract of their own in [`crate::frame::PhysMap`], the only unsafe trait.

use core::fmt;

use crate::access::Access;
use crate::addr::{Gfn, Level, Pfn};
pub use crate::age::{
    AgeAbilities, AgeAnswer, AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, CountOnly, Effort,
    FAST_PAGE_BUDGET, MASK_WORDS, UpperBits,
};
use crate::flush::FlushBatch;
use crate::frame::PhysMap;
use crate::slot::Memslot;
use crate::spte::MemType;
pub use crate::trace::Trace;

/// TLB shootdown with completion.
///
/// # Contract
/// [`request`](Self::request) starts forgetting what the batch names, on every vCPU of the VM.
/// [`wait`](Self::wait) returns only when no vCPU uses a translation, or a cached upper-level
/// entry, that the batch names and that was cached before `request`; a vCPU outside guest mode
/// counts as done if it flushes before it enters again. Forgetting more is allowed.
///
/// The change that makes the flush necessary is visible to every CPU before `request` is called
/// (the MMU orders that); `request` must not be reordered before it.
///
/// Neither call may enter this MMU again: they run with work of the MMU half done, though with no
/// lock held and no epoch pinned.
pub trait TlbFlush {
    /// Names a flush that was started.
    type Ticket;

    /// Start a flush. Must not wait for vCPUs.
    fn request(&self, batch: &FlushBatch<'_>) -> Self::Ticket;

    /// Wait until the flush is complete.
    fn wait(&self, ticket: Self::Ticket);

    /// Make every vCPU hand over its hardware log, complete when this returns: each one leaves the
    /// guest and calls `TdpVcpu::log_hardware`. For embedders whose CPUs have such a log and that
    /// ask the MMU to use it; others need not implement it.
    #[doc(alias = "kvm_arch_sync_dirty_log")]
    fn sync_hardware_log(&self) {}
}

/// A host page that backs a guest frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPage {
    /// The page.
    pub pfn: Pfn,
    /// May the guest be given write access?
    pub writable: bool,
    /// Largest naturally aligned block around `pfn` that the host maps as one page. The MMU lowers
    /// it to what slot, alignment and configuration allow.
    pub level: Level,
}

/// What stands behind a host page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Memory. Persistent memory and whatever else the host maps cacheable is this, whoever manages
    /// its pages (KVM row B74).
    #[default]
    Ram,
    /// Registers of a device: uncacheable unless a type is named, and never encrypted.
    Device,
}

/// How a host page is to be mapped, apart from where it is and who may write (KVM rows 1.22 to
/// 1.24).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PageKind {
    /// What stands behind it.
    pub backing: Backing,
    /// Memory type of its leaf, in formats whose leaves have one (EPT); `None` for what follows
    /// from the configuration and `backing`.
    pub memory_type: Option<MemType>,
}

impl PageKind {
    /// Memory as the configuration says.
    pub const RAM: Self = Self { backing: Backing::Ram, memory_type: None };
    /// A device.
    #[doc(alias = "kvm_is_mmio_pfn")]
    pub const DEVICE: Self = Self { backing: Backing::Device, memory_type: None };
}

/// Why a guest frame has no host page right now (KVM rows 3.25, 6.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResolveError {
    /// The host page must be read in first; the caller decides whether the vCPU waits.
    NeedsIo,
    /// The host page is lost to a memory error.
    HwPoison,
    /// A write to memory that the host maps read-only.
    ReadOnly,
    /// The thread was interrupted; nothing happened.
    Interrupted,
    /// The host has no memory there.
    NoMemory,
}

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NeedsIo => "the host page must be read in first",
            Self::HwPoison => "the host page is poisoned",
            Self::ReadOnly => "the host maps the page read-only",
            Self::Interrupted => "interrupted by a signal",
            Self::NoMemory => "the host has no memory there",
        })
    }
}

impl core::error::Error for ResolveError {}

/// Finds the host page behind a guest frame.
///
/// Called with no lock held and no epoch pinned: it may sleep. It may be called for a slot that was
/// just deleted or changed; the MMU then throws the answer away. The host must report every change
/// of an answer through an invalidation (`begin` before the change, `end` after it).
pub trait PfnResolver {
    /// The page behind `gfn` of `slot`. `access` is what the guest wanted.
    ///
    /// # Errors
    /// See [`ResolveError`]; passed on to the caller of the fault.
    fn resolve(&self, slot: &Memslot, gfn: Gfn, access: Access) -> Result<HostPage, ResolveError>;

    /// The page behind `gfn` of `slot`, if the host has it at hand: what
    /// [`resolve`](Self::resolve) would say without waiting, taking memory or reading it in. Asked
    /// inside a section, for pages that nobody has asked for yet; must not sleep, nor call the MMU.
    /// `None` costs the guest a fault, no more, and is what an embedder says that does not know.
    #[inline(always)]
    #[doc(alias = "gfn_to_page_many_atomic")]
    fn resolve_now(&self, slot: &Memslot, gfn: Gfn) -> Option<HostPage> {
        let _ = (slot, gfn);
        None
    }

    /// How the page that [`resolve`](Self::resolve) just gave for `gfn` is to be mapped; true of
    /// the whole block that `page` stands in, and part of the answer: a change of it is reported
    /// like any other. Asked once for each entry that is made. Everything is RAM unless said
    /// otherwise.
    #[inline(always)]
    fn kind(&self, slot: &Memslot, gfn: Gfn, page: &HostPage) -> PageKind {
        let _ = (slot, gfn, page);
        PageKind::RAM
    }

    /// The private page behind `gfn` of `slot`, where the VMM has marked it so. The same page as
    /// the shared one unless the embedder says otherwise: memory that is converted in place.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    fn resolve_private(
        &self,
        slot: &Memslot,
        gfn: Gfn,
        access: Access,
    ) -> Result<HostPage, ResolveError> {
        self.resolve(slot, gfn, access)
    }
}

/// Everything an MMU needs from its embedder. Implemented for whatever implements the parts.
pub trait Host: PhysMap + TlbFlush + PfnResolver + Trace + Send + Sync {}

impl<T: PhysMap + TlbFlush + PfnResolver + Trace + Send + Sync> Host for T {}
