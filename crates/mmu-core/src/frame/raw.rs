//! Frames from raw memory: every pointer that the MMU follows is followed here.
//!
//! Owns [`PhysMap`], the only unsafe trait, the step from its pointers to references, and the
//! prefetch hint. UNSAFETY: `unsafe` stands in this file, in `arena.rs` (an implementor) and in
//! `epoch/publish.rs`, nowhere else; what they rely on is the numbered contract below.

use core::ptr::NonNull;

use super::{FrameMeta, PageTable};
use crate::addr::Pfn;

/// Gives frames to a [`TablePool`](super::TablePool) and finds them again by number, in O(1): a
/// direct map.
///
/// # Safety
/// The implementor promises, for as long as `&self` is valid:
/// 1. A frame returned by [`provide`](Self::provide) is not returned again before
///    [`reclaim`](Self::reclaim) took it back, and is used by nobody but through this trait and by
///    page walkers (CPUs), which touch it by aligned 8-byte atomic accesses only.
/// 2. For a provided frame, [`table`](Self::table) returns a pointer to its 4096 bytes, aligned to
///    4096, mapped, initialised, readable and writable; [`meta`](Self::meta) a pointer to a
///    `FrameMeta` that belongs to this frame alone. Both pointers stay valid and the same for all
///    of the implementor's life, also after `reclaim` (type-stable frames).
/// 3. Given any other number, `table` and `meta` do not return (they may panic).
/// 4. Moving the implementor does not move frames or metas.
pub unsafe trait PhysMap {
    /// A frame for tables; its content is unspecified. `None` when there is none left.
    fn provide(&self) -> Option<Pfn>;

    /// Take a frame back that `provide` gave. No reader is left.
    fn reclaim(&self, frame: Pfn);

    /// The frame's memory.
    fn table(&self, frame: Pfn) -> NonNull<PageTable>;

    /// The frame's metadata.
    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta>;
}

/// The table in `frame`, which `map` must have provided.
///
/// The reference lives as long as the map, longer than the table is linked; callers tie it to an
/// epoch guard where it matters what the table means.
#[inline(always)]
pub fn table<P: PhysMap + ?Sized>(map: &P, frame: Pfn) -> &PageTable {
    let pointer = map.table(frame);
    // SAFETY: `PhysMap` clause 2 (a frame it did not provide does not return, clause 3).
    //   - valid, aligned and mapped for the life of `map`, which the reference borrows.
    //   - every bit pattern is a valid `PageTable`: 512 atomic words (zerocopy's FromBytes derive).
    //   - only shared references and atomic accesses to a frame ever exist (clause 1).
    unsafe { pointer.as_ref() }
}

/// The metadata of `frame`.
#[inline]
pub fn meta<P: PhysMap + ?Sized>(map: &P, frame: Pfn) -> &FrameMeta {
    let pointer = map.meta(frame);
    // SAFETY: `PhysMap` clause 2: valid for the life of `map`, belongs to this frame alone, and
    // consists of atomics, to which only shared references exist.
    unsafe { pointer.as_ref() }
}

/// Ask the CPU to fetch the cache line of entry `index`. A hint.
#[inline]
pub fn prefetch(table: &PageTable, index: usize) {
    #[cfg(all(target_arch = "x86_64", not(loom)))]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let entries = table.entries();
        let Some(line) = entries.get(index).map(core::ptr::from_ref) else { return };
        // SAFETY: a prefetch reads nothing architecturally and faults on no address; SSE is part
        // of the x86_64 baseline.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom))))]
    let _ = (table, index);
}

/// `base + index` tables.
///
/// # Safety
/// `base` points to an allocation of more than `index` tables.
pub(super) unsafe fn nth_table(base: NonNull<PageTable>, index: usize) -> NonNull<PageTable> {
    // SAFETY: the caller promises that the result is inside the same allocation.
    unsafe { base.add(index) }
}
