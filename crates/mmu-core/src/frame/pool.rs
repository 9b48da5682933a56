//! The table pool: free frames, frames waiting for a grace period, and the count that must be zero
//! at the end.
//!
//! Owns [`TablePool`]. A frame's life: provided by the [`PhysMap`] -> free -> in a thread's
//! [`MmuCache`](super::MmuCache) -> linked -> unlinked (a value owned by a
//! [`FlushDebt`](crate::flush::FlushDebt)) -> flush complete, retired here -> grace period -> free.
//! It goes back to the `PhysMap` when the pool is dropped.
//!
//! Lock: one spin lock, a leaf; taken once per batch of frames, never on a path that takes no
//! table.

use alloc::sync::Arc;
use core::fmt;

use super::{FrameList, PageTable, PhysMap, raw};
use crate::addr::{Gfn, Level, Pfn};
use crate::epoch::grace::Grace;
use crate::epoch::{EpochDomain, EpochGuard};
use crate::spin::{SpinGuard, SpinLock};
use crate::sync;
use crate::sync::plain::{AtomicU64, Ordering};

/// A list whose head stands in atomics, because what a lock protects must be shareable.
#[derive(Debug, Default)]
struct LockedList {
    head: AtomicU64,
    tail: AtomicU64,
    len: AtomicU64,
}

impl LockedList {
    fn take(&self, _lock: &SpinGuard<'_>) -> FrameList {
        // ORDERING[pool-list]: Relaxed. Protected by the lock whose guard the caller shows; pairs
        // with `put` under the same lock.
        let word = |atom: &AtomicU64| atom.swap(0, Ordering::Relaxed);
        let pfn = |word: u64| word.checked_sub(1).map(Pfn::new);
        FrameList { head: pfn(word(&self.head)), tail: pfn(word(&self.tail)), len: word(&self.len) }
    }

    fn put(&self, list: FrameList, _lock: &SpinGuard<'_>) {
        let word = |pfn: Option<Pfn>| pfn.map_or(0, |pfn| pfn.get() + 1);
        // ORDERING[pool-list]: Relaxed. Protected by the lock; pairs with `take`.
        self.head.store(word(list.head), Ordering::Relaxed);
        // ORDERING[pool-list]: Relaxed. As above.
        self.tail.store(word(list.tail), Ordering::Relaxed);
        // ORDERING[pool-list]: Relaxed. As above.
        self.len.store(list.len, Ordering::Relaxed);
    }

    fn append<P: PhysMap>(&self, map: &P, more: FrameList, lock: &SpinGuard<'_>) {
        let mut list = self.take(lock);
        list.append(map, more);
        self.put(list, lock);
    }

    fn len(&self) -> u64 {
        // ORDERING[pool-list]: Relaxed. A figure, exact under the lock.
        self.len.load(Ordering::Relaxed)
    }
}

/// A word on lines of its own: read by every fault, hardly ever written.
#[derive(Debug, Default)]
#[repr(align(128))]
struct ReadMostly(sync::AtomicU64);

/// The frames of one VM's page tables.
pub struct TablePool<P: PhysMap> {
    map: P,
    domain: Arc<EpochDomain>,
    lock: SpinLock,
    /// Frames to hand out. Content unspecified.
    free: LockedList,
    /// Retired before the running grace period began.
    covered: LockedList,
    /// Retired since; the next period covers them.
    waiting: LockedList,
    grace: Grace,
    /// Frames taken from the map, over the pool's life.
    provided: AtomicU64,
    /// Tables taken out of live trees.
    unlinked: ReadMostly,
}

impl<P: PhysMap> TablePool<P> {
    /// An empty pool over `map`. A domain has one pool at a time: the notes of a grace period stand
    /// in the participants' records.
    ///
    /// # Panics
    /// When the domain has a pool already.
    #[must_use]
    pub fn new(map: P, domain: Arc<EpochDomain>) -> Self {
        assert!(domain.claim_grace(), "the domain has a table pool already");
        let lock = SpinLock::new(domain.give_up_cpu());
        Self {
            map,
            domain,
            lock,
            free: LockedList::default(),
            covered: LockedList::default(),
            waiting: LockedList::default(),
            grace: Grace::new(),
            provided: AtomicU64::new(0),
            unlinked: ReadMostly(sync::AtomicU64::new(0)),
        }
    }

    /// The embedder's frame source.
    #[inline]
    #[must_use]
    pub fn map(&self) -> &P {
        &self.map
    }

    /// The table in `frame`, for as long as the section is open.
    #[inline]
    #[must_use]
    pub fn table<'g>(&'g self, _section: &'g EpochGuard<'_>, frame: Pfn) -> &'g PageTable {
        raw::table(&self.map, frame)
    }

    /// The table in a frame that the caller owns: not linked yet, or unlinked and past its grace
    /// period.
    #[inline]
    #[must_use]
    pub fn owned_table(&self, frame: Pfn) -> &PageTable {
        raw::table(&self.map, frame)
    }

    /// Tables taken out of live trees so far, to be read inside a section. While it stays the same
    /// from one section to the next, a table that was reached in the first may be used in the
    /// second, as if it had just been reached.
    #[inline]
    #[must_use]
    pub fn unlinked(&self) -> u64 {
        // ORDERING[table-unlinked]: Acquire, after the fence of the section's announcement. Pairs
        // with the Release in `note_unlinked`; through `epoch-dekker`, either we see that, or the
        // grace period of the table waits for our section.
        self.unlinked.0.load(sync::Ordering::Acquire)
    }

    /// A table was taken out of a tree that vCPUs use: to be called after its link is gone and
    /// before the table is retired.
    pub fn note_unlinked(&self) {
        // ORDERING[table-unlinked]: Release. Pairs with the Acquire in `unlinked`: who sees the
        // count walks, and finds the link gone.
        self.unlinked.0.fetch_add(1, sync::Ordering::Release);
    }

    /// Note the place of a frame that is about to be linked.
    #[inline]
    pub fn set_place(&self, frame: Pfn, gfn: Gfn, level: Level) {
        raw::meta(&self.map, frame).set_place(gfn, level);
    }

    /// Place of a linked table: its first gfn and its level.
    #[inline]
    #[must_use]
    pub fn place(&self, frame: Pfn) -> (Gfn, Level) {
        raw::meta(&self.map, frame).place()
    }

    /// Mark a table whose place was set and that is about to be linked: it stands where a huge page
    /// would, were nothing executed there (KVM row 3.30).
    #[doc(alias = "nx_huge_page_disallowed")]
    pub fn mark(&self, frame: Pfn) {
        raw::meta(&self.map, frame).mark();
    }

    /// Is a linked table marked?
    #[inline]
    #[must_use]
    pub fn is_marked(&self, frame: Pfn) -> bool {
        raw::meta(&self.map, frame).is_marked()
    }

    /// Take the mark from a table. Was it marked? One caller is told so for each mark.
    pub fn unmark(&self, frame: Pfn) -> bool {
        raw::meta(&self.map, frame).unmark()
    }

    /// Take up to `want` frames in one go, at least `min`.
    ///
    /// # Errors
    /// [`OutOfFrames`] when fewer than `min` can be had, now and after grace periods that have
    /// already ended; nothing is taken then.
    pub fn take(&self, min: u64, want: u64) -> Result<FrameList, OutOfFrames> {
        let lock = self.lock.lock();
        self.advance(&lock);
        let mut taken = FrameList::new();
        let mut free = self.free.take(&lock);
        while taken.len() < want {
            match free.pop(&self.map).or_else(|| self.provide()) {
                Some(frame) => taken.push(&self.map, frame),
                None => break,
            }
        }
        if taken.len() >= min {
            self.free.put(free, &lock);
            return Ok(taken);
        }
        let found = taken.len();
        free.append(&self.map, taken);
        self.free.put(free, &lock);
        // INVARIANT[I14]: reclamation that lags is reported with its extent.
        let waiting = self.covered.len() + self.waiting.len();
        Err(OutOfFrames { wanted: min, found, waiting })
    }

    fn provide(&self) -> Option<Pfn> {
        let frame = self.map.provide()?;
        // ORDERING[pool-figure]: Relaxed. A count; pairs with `frames_provided`.
        self.provided.fetch_add(1, Ordering::Relaxed);
        Some(frame)
    }

    /// Give back frames that nobody else ever saw.
    pub fn give_back(&self, frames: FrameList) {
        let lock = self.lock.lock();
        self.free.append(&self.map, frames, &lock);
    }

    /// Give back frames that were linked: unlinked now, their flush complete. They become free
    /// after a grace period.
    pub fn retire(&self, frames: FrameList) {
        if frames.is_empty() {
            return;
        }
        let lock = self.lock.lock();
        let list = if crate::busted!("retire_without_grace") { &self.free } else { &self.waiting };
        list.append(&self.map, frames, &lock);
        self.advance(&lock);
    }

    /// Let grace periods make progress without waiting. Returns the frames still waiting.
    pub fn poll(&self) -> u64 {
        let lock = self.lock.lock();
        self.advance(&lock);
        self.covered.len() + self.waiting.len()
    }

    fn advance(&self, lock: &SpinGuard<'_>) {
        if self.covered.len() + self.waiting.len() == 0 {
            return;
        }
        // Twice: a period that just ended lets the next one begin, and with no section open that
        // one is over at once.
        for _ in 0..2 {
            if crate::busted!("retire_joins_a_grace") && self.grace.is_running(lock) {
                self.covered.append(&self.map, self.waiting.take(lock), lock);
            }
            // INVARIANT[I13]: a frame is free when everybody pinned at its retirement has left.
            if self.grace.elapsed(&self.domain, lock) {
                let covered = self.covered.take(lock);
                self.free.append(&self.map, covered, lock);
            }
            if !self.grace.is_running(lock) && self.waiting.len() > 0 {
                let waiting = self.waiting.take(lock);
                self.covered.put(waiting, lock);
                self.grace.start(&self.domain, lock);
            }
        }
    }

    /// Frames retired whose grace period is not over.
    #[must_use]
    pub fn frames_waiting(&self) -> u64 {
        let _lock = self.lock.lock();
        self.covered.len() + self.waiting.len()
    }

    /// Frames that are linked, cached or owed to a flush: all that are neither free nor waiting.
    #[must_use]
    pub fn frames_in_use(&self) -> u64 {
        let _lock = self.lock.lock();
        self.frames_provided() - self.free.len() - self.covered.len() - self.waiting.len()
    }

    /// Frames ever taken from the map.
    #[must_use]
    pub fn frames_provided(&self) -> u64 {
        // ORDERING[pool-figure]: Relaxed. A figure.
        self.provided.load(Ordering::Relaxed)
    }

    /// Grace periods that ended.
    #[must_use]
    pub fn grace_periods(&self) -> u64 {
        self.grace.completed()
    }
}

impl<P: PhysMap> Drop for TablePool<P> {
    fn drop(&mut self) {
        // `&mut self`: no section can be open, so waiting frames need wait no longer.
        self.domain.unclaim_grace();
        let lock = self.lock.lock();
        for list in [&self.free, &self.covered, &self.waiting] {
            let mut frames = list.take(&lock);
            while let Some(frame) = frames.pop(&self.map) {
                self.map.reclaim(frame);
            }
        }
    }
}

impl<P: PhysMap> fmt::Debug for TablePool<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TablePool")
            .field("provided", &self.frames_provided())
            .field("in_use", &self.frames_in_use())
            .field("waiting", &self.frames_waiting())
            .finish_non_exhaustive()
    }
}

/// The pool cannot give what a call needs. Nothing changed; add frames, or end the sections that
/// hold up the frames that wait, and call again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfFrames {
    /// Frames needed at least.
    pub wanted: u64,
    /// Frames that were free.
    pub found: u64,
    /// Frames that wait for a grace period.
    pub waiting: u64,
}

impl fmt::Display for OutOfFrames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wanted, found, waiting } = self;
        write!(f, "{wanted} table frames needed, {found} free, {waiting} waiting for readers")
    }
}

impl core::error::Error for OutOfFrames {}
