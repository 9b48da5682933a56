//! A ready-made [`PhysMap`]: one contiguous block of frames with a direct map.
//!
//! Owns [`Arena`]. Either it allocates its frames ([`Arena::with_capacity`]), or the embedder hands
//! it memory that is also guest-physical memory of a machine ([`Arena::from_raw_parts`]), which is
//! how `mini_vmm` lets the CPU walk the tables. Finding a table is one subtraction, one compare and
//! one addition.

use alloc::vec::Vec;
use core::fmt;
use core::ptr::NonNull;

use zerocopy::FromZeros;

use super::{FrameMeta, PageTable, PhysMap, raw};
use crate::addr::{Pfn, to_index, to_u64};
use crate::spin::SpinLock;
use crate::sync::plain::{AtomicU64, Ordering};
use crate::sync::relax;

/// A contiguous block of table frames.
pub struct Arena {
    base: NonNull<PageTable>,
    base_pfn: Pfn,
    metas: Vec<FrameMeta>,
    /// Frames never provided yet start here. Protected by `lock`.
    fresh: AtomicU64,
    /// Reclaimed frames: head pfn plus 1. Protected by `lock`.
    reclaimed: AtomicU64,
    lock: SpinLock,
    /// The tables, when the arena owns them. Never read: `base` points into it.
    owned: Vec<PageTable>,
}

// SAFETY: `base` points to tables, which are atomics that any thread may use through `&`; the other
// fields are `Send` and `Sync` by themselves.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Allocate `frames` frames; they get the numbers from `base_pfn` on. For tables that no
    /// hardware walks: models, tests, software CPUs.
    ///
    /// # Errors
    /// [`ArenaError`]: no frames, numbers beyond 52-bit physical addresses, or no memory.
    pub fn with_capacity(frames: u64, base_pfn: Pfn) -> Result<Self, ArenaError> {
        check_numbers(frames, base_pfn)?;
        let mut tables = new_tables(to_index(frames)).ok_or(ArenaError::NoMemory { frames })?;
        let base = NonNull::new(tables.as_mut_ptr()).ok_or(ArenaError::NoMemory { frames })?;
        Self::new(base, frames, base_pfn, tables)
    }

    /// Use memory that the embedder owns.
    ///
    /// # Errors
    /// As [`with_capacity`](Self::with_capacity), and [`ArenaError::Unaligned`].
    ///
    /// # Safety
    /// 1. `base` points to `frames` × 4096 mapped bytes, readable and writable, which stay mapped
    ///    there until the arena is dropped.
    /// 2. Until then nobody else touches them, except page walkers and readers that use aligned
    ///    8-byte atomic accesses, and no Rust reference to them exists.
    pub unsafe fn from_raw_parts(
        base: NonNull<u8>,
        frames: u64,
        base_pfn: Pfn,
    ) -> Result<Self, ArenaError> {
        check_numbers(frames, base_pfn)?;
        let base: NonNull<PageTable> = base.cast();
        if !base.is_aligned() {
            return Err(ArenaError::Unaligned { address: to_u64(base.addr().get()) });
        }
        Self::new(base, frames, base_pfn, Vec::new())
    }

    fn new(
        base: NonNull<PageTable>,
        frames: u64,
        base_pfn: Pfn,
        owned: Vec<PageTable>,
    ) -> Result<Self, ArenaError> {
        let metas = FrameMeta::new_vec_zeroed(to_index(frames));
        let metas = metas.map_err(|_| ArenaError::NoMemory { frames })?;
        Ok(Self {
            base,
            base_pfn,
            metas,
            fresh: AtomicU64::new(0),
            reclaimed: AtomicU64::new(0),
            lock: SpinLock::new(relax),
            owned,
        })
    }

    /// Frames in the block.
    #[must_use]
    pub fn frames(&self) -> u64 {
        to_u64(self.metas.len())
    }

    /// Index of a frame of this block.
    ///
    /// # Panics
    /// When the number is not one of this block's: an entry that no code of ours wrote.
    #[inline(always)]
    fn index(&self, frame: Pfn) -> usize {
        let index = to_index(frame.get().wrapping_sub(self.base_pfn.get()));
        assert!(index < self.metas.len(), "{frame:?} is not a table frame of this arena (I1)");
        index
    }
}

/// Tables straight from the allocator's zero pages: a table that is never used costs nothing. What
/// they hold does not matter, a cache fills each frame before it is linked.
#[cfg(not(loom))]
fn new_tables(count: usize) -> Option<Vec<PageTable>> {
    PageTable::new_vec_zeroed(count).ok()
}

/// Loom's atomics must be constructed one by one.
#[cfg(loom)]
fn new_tables(count: usize) -> Option<Vec<PageTable>> {
    let mut tables = Vec::new();
    tables.try_reserve_exact(count).ok()?;
    tables.resize_with(count, PageTable::new_empty);
    Some(tables)
}

fn check_numbers(frames: u64, base_pfn: Pfn) -> Result<(), ArenaError> {
    if frames == 0 {
        return Err(ArenaError::NoFrames);
    }
    match base_pfn.checked_add(frames) {
        Some(end) if end.get() <= 1 << 40 => Ok(()),
        _ => Err(ArenaError::BeyondPhysical { base: base_pfn, frames }),
    }
}

// SAFETY: clause by clause.
//   1. `provide` hands out each index once: from `fresh`, which only grows, or from the list that
//      only `reclaim` fills, both under `lock`. Nobody else uses the memory: it is the arena's own
//      Vec, or `from_raw_parts` clause 2.
//   2. `base` is valid, aligned and initialised for `metas.len()` tables: own Vec of zeroed
//      tables, or `from_raw_parts` clause 1 and its alignment check. The Vecs are never
//      resized, so pointers stay the same.
//   3. `index` panics for other numbers.
//   4. Moving the arena moves the Vec headers, not what they point to.
unsafe impl PhysMap for Arena {
    fn provide(&self) -> Option<Pfn> {
        let _guard = self.lock.lock();
        // ORDERING[arena-list]: Relaxed. Protected by `lock`; pairs with `reclaim`.
        let head = self.reclaimed.load(Ordering::Relaxed);
        if let Some(frame) = head.checked_sub(1).map(Pfn::new) {
            let next = raw::meta(self, frame).next().map_or(0, |pfn| pfn.get() + 1);
            // ORDERING[arena-list]: Relaxed. Protected by `lock`.
            self.reclaimed.store(next, Ordering::Relaxed);
            return Some(frame);
        }
        // ORDERING[arena-list]: Relaxed. Protected by `lock`.
        let fresh = self.fresh.load(Ordering::Relaxed);
        if fresh >= self.frames() {
            return None;
        }
        // ORDERING[arena-list]: Relaxed. Protected by `lock`.
        self.fresh.store(fresh + 1, Ordering::Relaxed);
        self.base_pfn.checked_add(fresh)
    }

    fn reclaim(&self, frame: Pfn) {
        let _guard = self.lock.lock();
        // ORDERING[arena-list]: Relaxed. Protected by `lock`; pairs with `provide`.
        let head = self.reclaimed.load(Ordering::Relaxed);
        raw::meta(self, frame).set_next(head.checked_sub(1).map(Pfn::new));
        // ORDERING[arena-list]: Relaxed. Protected by `lock`.
        self.reclaimed.store(frame.get() + 1, Ordering::Relaxed);
    }

    #[inline(always)]
    fn table(&self, frame: Pfn) -> NonNull<PageTable> {
        let index = self.index(frame);
        // SAFETY: `base` points to `metas.len()` tables in one allocation and `index` is below.
        unsafe { raw::nth_table(self.base, index) }
    }

    #[inline]
    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta> {
        #[expect(clippy::indexing_slicing, reason = "index() is below the length")]
        NonNull::from(&self.metas[self.index(frame)])
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena")
            .field("base_pfn", &self.base_pfn)
            .field("frames", &self.frames())
            .field("owned", &!self.owned.is_empty())
            .finish_non_exhaustive()
    }
}

/// An arena could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ArenaError {
    /// Zero frames.
    NoFrames,
    /// The last frame's number does not fit a 52-bit physical address.
    BeyondPhysical {
        /// First frame.
        base: Pfn,
        /// Frames asked for.
        frames: u64,
    },
    /// The memory does not start at a multiple of 4096.
    Unaligned {
        /// Where it starts.
        address: u64,
    },
    /// The frames or their metadata cannot be allocated.
    NoMemory {
        /// Frames asked for.
        frames: u64,
    },
}

impl fmt::Display for ArenaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoFrames => f.write_str("an arena needs at least one frame"),
            Self::BeyondPhysical { base, frames } => {
                write!(f, "{frames} frames from {base} end beyond 52-bit physical addresses")
            }
            Self::Unaligned { address } => {
                write!(f, "table memory at {address:#x} is not 4096-byte aligned")
            }
            Self::NoMemory { frames } => write!(f, "no memory for {frames} table frames"),
        }
    }
}

impl core::error::Error for ArenaError {}
