//! Which pages of a slot are write-tracked, and how large a page may be over them.
//!
//! Owns [`PageTrack`] (KVM rows 6.14 and 6.16): a count a gfn, 0 to 65535, of those who want to see
//! every write to it (a shadowed guest table, a device model), and for each 2 MiB and 1 GiB block
//! the number of tracked pages in it, so that "may a huge page lie here" is one load. A shadowed
//! table keeps huge pages away also while the guest may write to it unseen ([`PageTrack::block`]).
//!
//! Memory comes when a page is first tracked, for its 2 MiB block (1 KiB), its 1 GiB block and the
//! slot's list of those (32 bytes an element), and stays until the slot goes. A lookup follows at
//! most three references and takes no lock.
//!
//! Protocol. *Tracker*: raises the count, drains the Shared sections that are open, then, in a
//! section of its own, write-protects the gfn and splits or takes out a huge leaf over it, and
//! flushes, whatever the count was before: another tracker that raised it first may not have come
//! that far. *Fault*: asks in the Shared section in which it installs, maps no larger than
//! [`PageTrack::max_level`], and a tracked gfn without write permission. A fault that missed the
//! count had its section open before the drain, so its entry is there to be protected. Lowering a
//! count needs no wait: faults find out when they come.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::{Gfn, GfnRange, Level, to_index, to_u64};
use crate::epoch::publish::SetOnce;
use crate::slot::Memslot;
use crate::sync::{AtomicU64, ENTRIES, Ordering};

/// Bits of a count.
const COUNT_BITS: u32 = u16::BITS;
/// Counts in a word.
const COUNTS: usize = 4;

const _: () = assert!(to_u64(COUNTS) * 16 == 64, "counts fill a word");

/// Why a count was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackError {
    /// The slot does not have the page.
    Outside {
        /// The page.
        gfn: Gfn,
        /// The slot's pages.
        slot: GfnRange,
    },
    /// As many as can be counted track the page already.
    Overflow {
        /// The page.
        gfn: Gfn,
    },
    /// Nobody tracks the page.
    NotTracked {
        /// The page.
        gfn: Gfn,
    },
    /// No memory for the counts.
    NoMemory {
        /// Bytes asked for.
        bytes: u64,
    },
}

impl fmt::Display for TrackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside { gfn, slot } => write!(f, "gfn {gfn} is not in the slot of {slot}"),
            Self::Overflow { gfn } => write!(f, "gfn {gfn} is tracked {} times already", u16::MAX),
            Self::NotTracked { gfn } => write!(f, "gfn {gfn} is not tracked"),
            Self::NoMemory { bytes } => write!(f, "no memory for {bytes} bytes of track counts"),
        }
    }
}

impl core::error::Error for TrackError {}

/// The write-tracked pages of one slot. See the file's head for who does what when.
#[doc(alias = "gfn_write_track")]
#[doc(alias = "lpage_info")]
#[derive(Debug)]
pub struct PageTrack {
    slot: GfnRange,
    /// One for each 1 GiB block that the slot touches, the first that of its first page.
    blocks: SetOnce<Box<[SetOnce<HugeBlock>]>>,
}

/// What is known of 1 GiB.
#[derive(Debug)]
struct HugeBlock {
    /// Tracked pages in it, and blocks taken.
    tracked: AtomicU64,
    blocks: Box<[SetOnce<LargeBlock>]>,
}

/// What is known of 2 MiB.
#[derive(Debug)]
struct LargeBlock {
    /// Tracked pages in it, and blocks taken.
    tracked: AtomicU64,
    /// Four counts a word, the first page lowest.
    counts: Box<[AtomicU64]>,
}

impl PageTrack {
    /// Of a slot, with no page tracked. Takes no memory.
    #[must_use]
    pub fn new(slot: &Memslot) -> Self {
        Self { slot: slot.range(), blocks: SetOnce::new() }
    }

    /// The slot's pages.
    #[must_use]
    pub const fn range(&self) -> GfnRange {
        self.slot
    }

    /// Was any page tracked, ever? One load; faults on slots that never were pay no more.
    #[inline]
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.blocks.get().is_some()
    }

    /// How many track `gfn`; 0 outside the slot.
    #[must_use]
    pub fn count(&self, gfn: Gfn) -> u16 {
        let Some(block) = self.huge(gfn).and_then(|huge| huge.large(gfn)) else { return 0 };
        let Some((word, shift)) = block.place(gfn) else { return 0 };
        // ORDERING[track-count]: Relaxed. In a section: raised before it, or its tracker waits for
        // the section (`epoch-dekker`).
        count_in(word.load(Ordering::Relaxed), shift)
    }

    /// Does anybody track `gfn`?
    #[inline]
    #[must_use]
    pub fn is_tracked(&self, gfn: Gfn) -> bool {
        self.is_used() && self.count(gfn) != 0
    }

    /// May a leaf at `level` lie over `gfn`, as far as tracking goes? Level 1 always may; what the
    /// slot's geometry says is [`max_level`](super::max_level)'s.
    #[must_use]
    pub fn allows(&self, level: Level, gfn: Gfn) -> bool {
        match level {
            Level::L1 => true,
            Level::L2 => {
                let block = self.huge(gfn).and_then(|huge| huge.large(gfn));
                block.is_none_or(|block| is_clear(&block.tracked))
            }
            Level::L3 => self.huge(gfn).is_none_or(|huge| is_clear(&huge.tracked)),
            Level::L4 | Level::L5 => false,
        }
    }

    /// The largest level, at most `cap`, that [`allows`](Self::allows) a leaf over `gfn`.
    #[must_use]
    pub fn max_level(&self, gfn: Gfn, cap: Level) -> Level {
        let mut level = cap;
        while !self.allows(level, gfn) {
            level = level.below();
        }
        level
    }

    /// Count one more who tracks `gfn`. Is it the first? In any case the caller goes on with the
    /// protocol of the file's head.
    ///
    /// # Errors
    /// [`TrackError`]; nothing is counted.
    #[doc(alias = "kvm_write_track_add_gfn")]
    pub fn track(&self, gfn: Gfn) -> Result<bool, TrackError> {
        let (huge, large) = self.provide(gfn)?;
        // Before the count: nobody may find a tracked page in a clear block. Taken back if it was
        // counted already; too much for a moment only makes pages small.
        raise(&huge.tracked);
        raise(&large.tracked);
        let old =
            large.change(gfn, |count| count.checked_add(1).ok_or(TrackError::Overflow { gfn }));
        if old != Ok(0) {
            large.lower(huge);
        }
        Ok(old? == 0)
    }

    /// Count one less. Was it the last?
    ///
    /// # Errors
    /// [`TrackError::NotTracked`], also outside the slot.
    #[doc(alias = "kvm_write_track_remove_gfn")]
    pub fn untrack(&self, gfn: Gfn) -> Result<bool, TrackError> {
        let missing = TrackError::NotTracked { gfn };
        let huge = self.huge(gfn).ok_or(missing)?;
        let large = huge.large(gfn).ok_or(missing)?;
        let old = large.change(gfn, |count| count.checked_sub(1).ok_or(missing))?;
        if old == 1 {
            large.lower(huge);
        }
        Ok(old == 1)
    }

    /// Let no leaf larger than 4 KiB lie over `gfn`, whether its writes are tracked or not: it is a
    /// table that has a shadow (KVM row 6.14). Each call is taken back by an
    /// [`unblock`](Self::unblock). Faults find out as they do of a count.
    ///
    /// # Errors
    /// [`TrackError`]; nothing is blocked.
    #[doc(alias = "kvm_mmu_gfn_disallow_lpage")]
    pub fn block(&self, gfn: Gfn) -> Result<(), TrackError> {
        let (huge, large) = self.provide(gfn)?;
        raise(&huge.tracked);
        raise(&large.tracked);
        Ok(())
    }

    /// Take one [`block`](Self::block) back; without one, this would free a tracked page's blocks.
    #[doc(alias = "kvm_mmu_gfn_allow_lpage")]
    pub fn unblock(&self, gfn: Gfn) {
        let Some(huge) = self.huge(gfn) else { return };
        if let Some(large) = huge.large(gfn) {
            large.lower(huge);
        }
    }

    /// Which 1 GiB block of the slot `gfn` is in; `None` outside the slot.
    fn index(&self, gfn: Gfn) -> Option<usize> {
        let first = self.slot.start.align_down(Level::L3);
        let inside = self.slot.contains(gfn);
        inside.then(|| to_index(gfn.distance_from(first) >> Level::L3.shift()))
    }

    fn huge(&self, gfn: Gfn) -> Option<&HugeBlock> {
        self.blocks.get()?.get(self.index(gfn)?)?.get()
    }

    /// The blocks of `gfn`, with their memory.
    fn provide(&self, gfn: Gfn) -> Result<(&HugeBlock, &LargeBlock), TrackError> {
        let outside = TrackError::Outside { gfn, slot: self.slot };
        let index = self.index(gfn).ok_or(outside)?;
        let blocks = match self.blocks.get() {
            Some(blocks) => blocks,
            None => {
                let span = self.slot.end.distance_from(self.slot.start.align_down(Level::L3));
                self.blocks.get_or_set(array(to_index(span.div_ceil(Level::L3.pages())))?)
            }
        };
        let place = blocks.get(index).ok_or(outside)?;
        let huge = match place.get() {
            Some(huge) => huge,
            None => {
                let blocks = array(ENTRIES)?;
                place.get_or_set(HugeBlock { tracked: AtomicU64::new(0), blocks })
            }
        };
        let place = huge.blocks.get(gfn.index(Level::L2)).ok_or(outside)?;
        let large = match place.get() {
            Some(large) => large,
            None => {
                let counts = array(ENTRIES.div_ceil(COUNTS))?;
                place.get_or_set(LargeBlock { tracked: AtomicU64::new(0), counts })
            }
        };
        Ok((huge, large))
    }
}

impl HugeBlock {
    fn large(&self, gfn: Gfn) -> Option<&LargeBlock> {
        self.blocks.get(gfn.index(Level::L2))?.get()
    }
}

impl LargeBlock {
    /// The word that has the count of `gfn`, and from which bit on.
    fn place(&self, gfn: Gfn) -> Option<(&AtomicU64, u32)> {
        let index = gfn.index(Level::L1);
        let word = self.counts.get(index / COUNTS)?;
        // Four bits at most, so the conversion cannot fail.
        let place = u32::try_from(index % COUNTS).ok()?;
        Some((word, place * COUNT_BITS))
    }

    /// One tracked page less, here and in the block around.
    fn lower(&self, huge: &HugeBlock) {
        lower(&self.tracked);
        lower(&huge.tracked);
    }

    /// Replace the count of `gfn` by what `new` makes of it, and return the count before.
    ///
    /// Each turn but the last means that another thread changed one of the word's four counts.
    fn change(
        &self,
        gfn: Gfn,
        new: impl Fn(u16) -> Result<u16, TrackError>,
    ) -> Result<u16, TrackError> {
        // Every gfn has a place: see `ENTRIES` in `provide`.
        let (word, shift) = self.place(gfn).ok_or(TrackError::NotTracked { gfn })?;
        // ORDERING[track-count]: Relaxed. Compared again by the exchange.
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            let old = count_in(seen, shift);
            let count = new(old)?;
            let mask = u64::from(u16::MAX) << shift;
            let next = (seen & !mask) | (u64::from(count) << shift);
            // ORDERING[track-count]: Relaxed. A tracker's drain has the fence (`epoch-dekker`).
            let done = word.compare_exchange(seen, next, Ordering::Relaxed, Ordering::Relaxed);
            match done {
                Ok(_) => return Ok(old),
                Err(current) => seen = current,
            }
        }
    }
}

/// The count in `word` from bit `shift` on.
fn count_in(word: u64, shift: u32) -> u16 {
    // Masked, so the conversion cannot fail.
    u16::try_from((word >> shift) & u64::from(u16::MAX)).unwrap_or(u16::MAX)
}

fn is_clear(tracked: &AtomicU64) -> bool {
    // ORDERING[track-count]: Relaxed. As in `PageTrack::count`.
    tracked.load(Ordering::Relaxed) == 0
}

fn raise(tracked: &AtomicU64) {
    // ORDERING[track-count]: Relaxed. A tracker's drain has the fence (`epoch-dekker`).
    tracked.fetch_add(1, Ordering::Relaxed);
}

fn lower(tracked: &AtomicU64) {
    // ORDERING[track-count]: Relaxed. Late is allowed: the block counts as tracked a while longer.
    tracked.fetch_sub(1, Ordering::Relaxed);
}

/// `length` default values, or [`TrackError::NoMemory`].
fn array<T: Default>(length: usize) -> Result<Box<[T]>, TrackError> {
    let mut array = Vec::new();
    let bytes = to_u64(length).saturating_mul(to_u64(size_of::<T>()));
    array.try_reserve_exact(length).map_err(|_| TrackError::NoMemory { bytes })?;
    array.resize_with(length, T::default);
    Ok(array.into_boxed_slice())
}
