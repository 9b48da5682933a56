//! The per-thread cache of table frames: allocation before any lock.
//!
//! Owns [`MmuCache`]. `top_up` may fail and is called with nothing held; `take` cannot fail after
//! it (KVM row 0.1.7). Frames in the cache are filled with the non-present value already, so
//! linking one costs no more than the link.

use arrayvec::ArrayVec;

use super::{FrameList, OutOfFrames, PhysMap, TablePool};
use crate::addr::{Level, Pfn, to_u64};
use crate::spte::Spte;

/// Frames a cache holds at most (KVM's default is the same order).
pub const CACHE_CAPACITY: usize = if cfg!(loom) { 6 } else { 32 };

/// Frames that one fault needs at most: a table at every level below a root of level 5.
pub const FRAMES_PER_FAULT: usize = Level::ALL.len();

/// Frames ready to be linked. Give them back with [`MmuCache::drain`] before dropping the cache.
#[doc(alias = "kvm_mmu_memory_cache")]
#[derive(Debug, Default)]
pub struct MmuCache {
    frames: ArrayVec<Pfn, CACHE_CAPACITY>,
}

impl MmuCache {
    /// An empty cache.
    #[must_use]
    pub const fn new() -> Self {
        Self { frames: ArrayVec::new_const() }
    }

    /// Frames in the cache.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// No frames?
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Make sure that `min` frames (at most [`CACHE_CAPACITY`]) can be taken. Call with no lock
    /// held and no epoch pinned.
    ///
    /// # Errors
    /// [`OutOfFrames`], also for more than [`CACHE_CAPACITY`]; the cache keeps what it had.
    #[inline]
    pub fn top_up<P: PhysMap>(
        &mut self,
        pool: &TablePool<P>,
        min: usize,
    ) -> Result<(), OutOfFrames> {
        if self.frames.len() >= min { Ok(()) } else { self.refill(pool, min) }
    }

    #[cold]
    fn refill<P: PhysMap>(&mut self, pool: &TablePool<P>, min: usize) -> Result<(), OutOfFrames> {
        if min > CACHE_CAPACITY {
            let (wanted, found) = (to_u64(min), to_u64(CACHE_CAPACITY));
            return Err(OutOfFrames { wanted, found, waiting: 0 });
        }
        let missing = min.saturating_sub(self.frames.len());
        let room = self.frames.remaining_capacity();
        // Half the room: a burst of threads should not strand the pool's last frames in caches.
        let want = missing.max(room / 2);
        let mut taken = pool.take(to_u64(missing), to_u64(want))?;
        while let Some(frame) = taken.pop(pool.map()) {
            pool.owned_table(frame).fill(Spte::EMPTY);
            let refused = self.put(frame);
            debug_assert!(refused.is_none(), "never takes more than there is room for");
        }
        Ok(())
    }

    /// A frame filled with the non-present value. `None` only when `top_up` was not called for
    /// enough.
    #[inline]
    pub fn take(&mut self) -> Option<Pfn> {
        self.frames.pop()
    }

    /// Put back a frame that was not linked and still holds nothing but the non-present value.
    /// Dropped frames would leak, so a full cache refuses: the frame comes back.
    #[inline]
    pub fn put(&mut self, frame: Pfn) -> Option<Pfn> {
        self.frames.try_push(frame).err().map(|full| full.element())
    }

    /// Give everything back to the pool.
    pub fn drain<P: PhysMap>(&mut self, pool: &TablePool<P>) {
        let mut list = FrameList::new();
        for frame in self.frames.drain(..) {
            list.push(pool.map(), frame);
        }
        pool.give_back(list);
    }
}
