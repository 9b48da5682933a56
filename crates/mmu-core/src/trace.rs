//! Events of an MMU, for those who want to watch (KVM row 3.60).
//!
//! Owns [`Trace`], which every embedder implements (an empty `impl` will do), and [`Event`]. With
//! [`Trace::ENABLED`] false, the default, no event is put together and no clock is read: the calls
//! vanish at compile time.

use crate::access::{Access, PfErrorCode};
use crate::addr::{Gfn, GfnRange, Gpa, Level, Pfn};
use crate::attributes::Attributes;
use crate::fault::{FaultError, FaultOutcome};
use crate::flush::FlushScope;
use crate::slot::SlotChange;
use crate::spte::Spte;
use crate::traits::AgeMode;

/// Something that happened. Values are those of the moment; others may have changed them since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A fault came in (`kvm_page_fault`).
    Fault {
        /// The address.
        gpa: Gpa,
        /// What the access was.
        code: PfErrorCode,
    },
    /// That fault is over.
    FaultEnd {
        /// The address.
        gpa: Gpa,
        /// What came of it.
        result: Result<FaultOutcome, FaultError>,
    },
    /// The fast path gave permissions back without the lock (`fast_page_fault`). The change itself
    /// is a [`Changed`](Self::Changed) before it.
    FastFault {
        /// The page.
        gfn: Gfn,
        /// The entry now.
        new: Spte,
    },
    /// An entry of a tree was replaced (`kvm_tdp_mmu_spte_changed`). The entries of a table made
    /// by a split, and those of a tree that is taken apart after a zap-all, are not told one by
    /// one.
    Changed {
        /// First gfn that it maps.
        gfn: Gfn,
        /// Its level.
        level: Level,
        /// What it held.
        old: Spte,
        /// What it holds.
        new: Spte,
    },
    /// A huge leaf became a table of leaves one level lower.
    Split {
        /// First gfn of the huge leaf.
        gfn: Gfn,
        /// Level it stood at.
        level: Level,
    },
    /// A table gave way to a huge leaf.
    Collapse {
        /// First gfn of the huge leaf.
        gfn: Gfn,
        /// Level it stands at.
        level: Level,
    },
    /// A root was made.
    RootMade {
        /// Its table.
        frame: Pfn,
        /// Its address space.
        space: u16,
    },
    /// A zap-all made roots invalid (`kvm_mmu_zap_all_fast`).
    RootsInvalidated {
        /// How many wait for their vCPUs to leave them.
        pending: u64,
    },
    /// The last reference to a root went.
    RootFreed {
        /// Its table.
        frame: Pfn,
    },
    /// A range is being unmapped (`kvm_unmap_hva_range`).
    UnmapBegin {
        /// The pages.
        range: GfnRange,
    },
    /// That range is unmapped and flushed.
    UnmapEnd {
        /// The pages.
        range: GfnRange,
        /// 4 KiB pages that were mapped.
        pages: u64,
    },
    /// A slice was aged or looked at (`kvm_age_hva`, `kvm_test_age_hva`).
    Aged {
        /// The pages looked at.
        range: GfnRange,
        /// How.
        mode: AgeMode,
        /// 4 KiB pages that were young.
        young: u64,
    },
    /// The memory slots changed and the change is visible to all.
    Slots {
        /// The change.
        change: SlotChange,
        /// Generation of the set that is live now.
        generation: u64,
    },
    /// A flush was requested from the embedder.
    FlushRequested {
        /// How much.
        scope: FlushScope,
        /// Unlinked tables that wait for it.
        tables: u64,
    },
    /// A flush is complete and its debt paid.
    FlushPaid {
        /// Entry changes that it was owed for.
        changes: u64,
    },
    /// An MMIO entry was made (`mark_mmio_spte`).
    MmioMarked {
        /// The page.
        gfn: Gfn,
        /// What the access needed.
        access: Access,
        /// Generation of the memory slots.
        generation: u64,
    },
    /// A fault met an MMIO entry (`handle_mmio_page_fault`, `check_mmio_spte`).
    MmioHit {
        /// The page.
        gfn: Gfn,
        /// Does the entry still hold?
        current: bool,
    },
    /// A page was pushed on a dirty ring (`kvm_dirty_ring_push`).
    RingPush {
        /// The page.
        gfn: Gfn,
    },
    /// Harvested entries of a dirty ring were reset (`kvm_dirty_ring_reset`).
    RingReset {
        /// How many.
        entries: u64,
    },
    /// A dirty ring is full and its vCPU must leave the guest (`kvm_dirty_ring_exit`).
    RingFull {
        /// The page that found no room.
        gfn: Gfn,
    },
    /// Memory attributes were set (`kvm_vm_set_mem_attributes`).
    AttributesSet {
        /// The pages.
        range: GfnRange,
        /// What they are now.
        attributes: Attributes,
    },
    /// The recovery worker zapped a small page table that execution had asked for.
    NxRecovered {
        /// Its first gfn.
        gfn: Gfn,
        /// Level of the entry that was emptied.
        level: Level,
    },
}

/// Receives the events of a VM.
///
/// Called on the thread that caused the event, often inside a section: it must not wait, must not
/// enter the MMU again, and should be short.
pub trait Trace {
    /// Are events wanted? A constant, so that those who say no pay nothing.
    const ENABLED: bool = false;

    /// An event. Called only if [`ENABLED`](Self::ENABLED).
    #[inline(always)]
    fn event(&self, event: &Event) {
        let _ = event;
    }

    /// A clock in nanoseconds, for waits and stalls. Read only if [`ENABLED`](Self::ENABLED).
    #[inline(always)]
    fn now(&self) -> u64 {
        0
    }
}
