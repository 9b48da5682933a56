//! Table frames: where page tables live and how they come and go.
//!
//! Owns [`PageTable`] (a frame seen as entries), [`FrameMeta`] (16 bytes about each frame),
//! [`PhysMap`] (what the embedder gives, the only unsafe trait), and through its files the
//! [`Arena`] (a ready-made `PhysMap`), the [`TablePool`] and the per-thread [`MmuCache`].
//!
//! Frames are type-stable: from the moment a [`PhysMap`] provides one until the pool is dropped it
//! is a `[SpteCell; ENTRIES]` and nothing else, so a stale reader can be wrong but never undefined.
//! What keeps it from being wrong is the epoch: a frame is reused only after the flush that its
//! removal owed is complete and a grace period has passed (invariant I13).

pub mod arena;
pub mod cache;
pub mod pool;
pub mod raw;

use core::fmt;

use crate::addr::{Gfn, Level, Pfn};
use crate::spte::Spte;
use crate::spte::cell::SpteCell;
use crate::sync::ENTRIES;
use crate::sync::plain::{AtomicU64, Ordering};

pub use arena::{Arena, ArenaError};
pub use cache::{CACHE_CAPACITY, MmuCache};
pub use pool::{OutOfFrames, TablePool};
pub use raw::PhysMap;

/// A frame seen as a table.
#[cfg_attr(not(loom), derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout))]
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct PageTable([SpteCell; ENTRIES]);

#[cfg(not(loom))]
static_assertions::assert_eq_size!(PageTable, [u8; 4096]);
static_assertions::assert_not_impl_any!(PageTable: Clone, Copy, zerocopy::Immutable);

impl PageTable {
    /// A table of empty entries. Frames in use come from a [`PhysMap`]; this is for those who
    /// implement one.
    #[must_use]
    pub fn new_empty() -> Self {
        Self(core::array::from_fn(|_| SpteCell::new(Spte::EMPTY)))
    }

    /// The entries.
    #[inline]
    #[must_use]
    pub fn entries(&self) -> &[SpteCell; ENTRIES] {
        &self.0
    }

    /// The entry that maps `gfn` in a table at `level`.
    #[inline]
    #[must_use]
    pub fn cell(&self, gfn: Gfn, level: Level) -> &SpteCell {
        #[expect(clippy::indexing_slicing, reason = "Gfn::index is below ENTRIES")]
        &self.0[gfn.index(level)]
    }

    /// Fill every entry of a table that nobody else can reach.
    pub fn fill(&self, spte: Spte) {
        for cell in &self.0 {
            cell.init(spte);
        }
    }
}

/// What the MMU keeps about a frame: 16 bytes.
///
/// Both words belong to whoever owns the frame at the moment (the pool, a cache, the thread that is
/// about to link it, the table's tree); the hand-overs order them. The mark of a linked table
/// anybody may take off who found the table in a section.
#[derive(Debug, zerocopy::FromBytes)]
#[repr(C)]
pub struct FrameMeta {
    /// While linked: gfn << 8 | mark | level. Else unspecified.
    place: AtomicU64,
    /// While in a list: the next frame's pfn plus 1; 0 ends the list.
    next: AtomicU64,
}

static_assertions::assert_eq_size!(FrameMeta, [u8; 16]);

/// The table stands where a huge page would, were it not executed.
const MARK: u64 = 1 << 7;
/// The level.
const LEVEL: u64 = 0xf;

impl FrameMeta {
    /// Of a frame in no list.
    #[must_use]
    pub const fn new() -> Self {
        Self { place: AtomicU64::new(0), next: AtomicU64::new(0) }
    }

    /// Note what the frame is about to become: a table at `level` whose first entry maps `gfn`.
    #[inline]
    pub fn set_place(&self, gfn: Gfn, level: Level) {
        // ORDERING[frame-meta]: Relaxed. Written by the frame's owner before the link publishes it;
        // pairs with the load in `place`.
        self.place.store(gfn.get() << 8 | u64::from(level.number()), Ordering::Relaxed);
    }

    /// First gfn and level of a linked table.
    #[inline]
    #[must_use]
    pub fn place(&self) -> (Gfn, Level) {
        // ORDERING[frame-meta]: Relaxed. Read after following the link, whose Acquire orders it.
        let word = self.place.load(Ordering::Relaxed);
        let level = Level::ALL.into_iter().find(|l| u64::from(l.number()) == word & LEVEL);
        (Gfn::new(word >> 8), level.unwrap_or(Level::L1))
    }

    /// Mark a table that is about to be linked, after [`set_place`](Self::set_place), which takes
    /// marks off.
    fn mark(&self) {
        // ORDERING[frame-meta]: Relaxed. As `set_place`.
        self.place.fetch_or(MARK, Ordering::Relaxed);
    }

    /// Is the table marked?
    #[inline]
    fn is_marked(&self) -> bool {
        // ORDERING[frame-meta]: Relaxed. As `place`.
        self.place.load(Ordering::Relaxed) & MARK != 0
    }

    /// Take the mark. Was there one? Of several callers one is told so.
    fn unmark(&self) -> bool {
        // ORDERING[frame-meta]: Relaxed. The exchange decides who counts it; nothing is published.
        self.is_marked() && self.place.fetch_and(!MARK, Ordering::Relaxed) & MARK != 0
    }

    #[inline]
    fn set_next(&self, next: Option<Pfn>) {
        let link = next.map_or(0, |pfn| pfn.get() + 1);
        // ORDERING[frame-meta]: Relaxed. The list's owner (a lock, or exclusive ownership) orders.
        self.next.store(link, Ordering::Relaxed);
    }

    #[inline]
    fn next(&self) -> Option<Pfn> {
        // ORDERING[frame-meta]: Relaxed. As `set_next`.
        self.next.load(Ordering::Relaxed).checked_sub(1).map(Pfn::new)
    }
}

impl Default for FrameMeta {
    fn default() -> Self {
        Self::new()
    }
}

/// A chain of frames through their metas, owned by the value: a list that allocates nothing.
#[must_use = "frames that are dropped are leaked"]
#[derive(Debug, Default)]
pub struct FrameList {
    head: Option<Pfn>,
    tail: Option<Pfn>,
    len: u64,
}

impl FrameList {
    /// No frames.
    pub const fn new() -> Self {
        Self { head: None, tail: None, len: 0 }
    }

    /// Number of frames.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// No frames?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Add a frame that is in no list.
    pub fn push<P: PhysMap>(&mut self, map: &P, frame: Pfn) {
        raw::meta(map, frame).set_next(self.head);
        if self.head.is_none() {
            self.tail = Some(frame);
        }
        self.head = Some(frame);
        self.len += 1;
    }

    /// Take a frame.
    pub fn pop<P: PhysMap>(&mut self, map: &P) -> Option<Pfn> {
        let frame = self.head?;
        self.head = raw::meta(map, frame).next();
        if self.head.is_none() {
            self.tail = None;
        }
        self.len -= 1;
        Some(frame)
    }

    /// Take over all frames of `other`.
    pub fn append<P: PhysMap>(&mut self, map: &P, other: Self) {
        let Some(tail) = other.tail else { return };
        raw::meta(map, tail).set_next(self.head);
        if self.head.is_none() {
            self.tail = other.tail;
        }
        self.head = other.head;
        self.len += other.len;
    }

    /// The frame pushed last.
    pub(crate) const fn first(&self) -> Option<Pfn> {
        self.head
    }

    /// The frame that was pushed before `frame` of the same list.
    pub(crate) fn after<P: PhysMap>(map: &P, frame: Pfn) -> Option<Pfn> {
        raw::meta(map, frame).next()
    }
}

impl fmt::Display for FrameList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} table frames", self.len)
    }
}
