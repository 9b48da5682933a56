//! A ring of dirty pages, from one vCPU to a consumer that is not trusted (KVM rows 3.47, B10).
//!
//! Owns [`DirtyRing`] and [`RingEntry`]. Its neighbours: the vCPU that owns the ring pushes; the
//! consumer, perhaps another process with the entries mapped, harvests through a [`RingConsumer`]
//! or on its own; whoever resets write protects the harvested pages again. No locks; resets are
//! claimed, and refused while another runs.
//!
//! # An entry's life
//!
//! Free (flags 0), pushed ([`DIRTY`](RingEntry::DIRTY)), harvested ([`RESET`](RingEntry::RESET)),
//! and free again when [`DirtyRing::reset`] has seen that. The vCPU makes the page's entry writable
//! before it pushes, `reset` hands the page out to be write protected after the consumer had it,
//! and the consumer reads the page's *content* after `reset` and the flush that follows it. So each
//! write is in the content read, or faults and is pushed once more. (`ORDERING[dirty-ring]`.)
//!
//! # What the consumer cannot do
//!
//! It may write anything to any entry at any time. Indices are not in the shared memory, and what
//! was pushed is kept in a private copy: of what the consumer wrote only the flag `RESET` is
//! believed, only in the oldest entry, and only up to what was pushed. A copy was chosen over
//! checking the consumer's slot and offset because an entry that it rewrote would pass any check,
//! and the page that really was pushed would never be write protected again: whatever else reads
//! that page's log would miss its writes. And offsets that nobody pushed never get near the tree,
//! so none of them can wrap (B10). The copy costs 16 bytes an entry.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use super::NoMemory;
use crate::addr::{PAGE_SIZE, to_index, to_u64};
use crate::sync::{AtomicU64, Ordering, load_own, plain};

/// Pages that a vCPU may push between two looks at [`DirtyRing::is_soft_full`]: those of a full
/// hardware log, and some of its own. Models have small rings.
const RESERVED: u64 = if cfg!(loom) { 1 } else { 64 + 512 };
/// Entries of the largest ring.
const MAX_ENTRIES: u64 = 65_536;
/// Bytes of an entry in shared memory.
const ENTRY_BYTES: u64 = 16;
/// Bytes of the smallest ring, but for the reserve: consumers map whole pages.
const MIN_BYTES: u64 = if cfg!(loom) { ENTRY_BYTES } else { PAGE_SIZE };
/// Offsets that one call of `reset`'s callback covers.
const BATCH: u64 = 64;

#[cfg(not(loom))]
const _: () = assert!(to_u64(size_of::<RingEntry>()) == ENTRY_BYTES, "the layout consumers know");

/// The slot of a dirty page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotKey {
    /// Address space.
    pub as_id: u16,
    /// Number of the slot in its address space.
    pub id: u16,
}

impl SlotKey {
    /// As the ring has it: address space in bits 31:16, id in 15:0.
    #[inline]
    #[must_use]
    pub fn to_raw(self) -> u32 {
        u32::from(self.as_id) << 16 | u32::from(self.id)
    }

    /// The inverse of [`to_raw`](Self::to_raw).
    #[inline]
    #[must_use]
    pub fn from_raw(raw: u32) -> Self {
        let [b0, b1, b2, b3] = raw.to_le_bytes();
        Self { as_id: u16::from_le_bytes([b2, b3]), id: u16::from_le_bytes([b0, b1]) }
    }
}

/// A page found dirty.
#[doc(alias = "kvm_dirty_gfn")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DirtyGfn {
    /// Its slot.
    pub key: SlotKey,
    /// Its number from the slot's first page, in 4 KiB pages.
    pub offset: u64,
}

/// An entry in the memory that producer and consumer share: 16 bytes, on little-endian machines
/// `u32` flags, `u32` slot ([`SlotKey::to_raw`]), `u64` offset, as KVM has it.
///
/// Nothing that it holds is trusted.
#[doc(alias = "kvm_dirty_gfn")]
#[derive(Debug, Default)]
#[repr(C)]
pub struct RingEntry {
    /// Flags in bits 31:0, the slot above.
    state: AtomicU64,
    offset: AtomicU64,
}

impl RingEntry {
    /// Flag: pushed, not yet harvested.
    #[doc(alias = "KVM_DIRTY_GFN_F_DIRTY")]
    pub const DIRTY: u64 = 1;
    /// Flag, set by the consumer: harvested.
    #[doc(alias = "KVM_DIRTY_GFN_F_RESET")]
    pub const RESET: u64 = 2;
    const FLAGS: u64 = 0xffff_ffff;

    /// State (flags in bits 31:0, slot above) and offset, as a consumer of its own reads them.
    #[must_use]
    pub fn read(&self) -> (u64, u64) {
        // ORDERING[dirty-ring]: Acquire. Pairs with the Release in `push`: the offset is the one
        // that was pushed with this state, or a later one.
        let state = self.state.load(Ordering::Acquire);
        // ORDERING[dirty-ring]: Relaxed. Ordered by the load above.
        (state, self.offset.load(Ordering::Relaxed))
    }

    /// Write state and offset as a consumer of its own may, rightly or not.
    pub fn write(&self, state: u64, offset: u64) {
        // ORDERING[dirty-ring]: Relaxed. Published by the store below.
        self.offset.store(offset, Ordering::Relaxed);
        // ORDERING[dirty-ring]: Release. Pairs with the Acquire in `is_harvested` and `read`.
        self.state.store(state, Ordering::Release);
    }

    /// The page, when there is one to harvest; it is marked harvested.
    fn harvest(&self) -> Option<DirtyGfn> {
        let (state, offset) = self.read();
        if state & (Self::DIRTY | Self::RESET) != Self::DIRTY {
            return None;
        }
        // ORDERING[dirty-ring]: Release. Pairs with the Acquire in `reset`, which may free the
        // entry: not before it was read here.
        self.state.store(state & !Self::FLAGS | Self::RESET, Ordering::Release);
        Some(DirtyGfn { key: key_of(state), offset })
    }
}

/// The slot in an entry's state.
fn key_of(state: u64) -> SlotKey {
    let [.., b4, b5, b6, b7] = state.to_le_bytes();
    SlotKey { as_id: u16::from_le_bytes([b6, b7]), id: u16::from_le_bytes([b4, b5]) }
}

/// An entry's state.
fn state_of(key: SlotKey, flags: u64) -> u64 {
    u64::from(key.to_raw()) << 32 | flags
}

/// A legal size of a ring.
///
/// Having one tells you: a power of two, at least one page, room for more than the reserve, at most
/// 65536 entries (KVM row 3.47).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize {
    entries: u64,
}

impl RingSize {
    /// The size of a ring that takes `bytes` of shared memory, 16 for each entry.
    ///
    /// # Errors
    /// [`RingSizeError`] names the rule. KVM answers `EINVAL`, and `E2BIG` for a ring too large.
    pub const fn from_bytes(bytes: u64) -> Result<Self, RingSizeError> {
        if !bytes.is_power_of_two() {
            return Err(RingSizeError::NotPowerOfTwo { bytes });
        }
        let reserved = RESERVED * ENTRY_BYTES;
        let minimum = if reserved > MIN_BYTES { reserved } else { MIN_BYTES };
        if bytes < minimum {
            return Err(RingSizeError::TooSmall { bytes, minimum });
        }
        let maximum = MAX_ENTRIES * ENTRY_BYTES;
        if bytes > maximum {
            return Err(RingSizeError::TooLarge { bytes, maximum });
        }
        Ok(Self { entries: bytes / ENTRY_BYTES })
    }

    /// Entries of the ring.
    #[must_use]
    pub const fn entries(self) -> u64 {
        self.entries
    }

    /// Bytes of shared memory.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.entries * ENTRY_BYTES
    }
}

/// A size that no ring has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingSizeError {
    /// Not a power of two.
    NotPowerOfTwo {
        /// Bytes asked for.
        bytes: u64,
    },
    /// Less than a page, or than the entries held in reserve.
    TooSmall {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes that would do, before rounding up to a power of two.
        minimum: u64,
    },
    /// More entries than a ring may have.
    #[doc(alias = "E2BIG")]
    TooLarge {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes of the largest ring.
        maximum: u64,
    },
}

impl fmt::Display for RingSizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotPowerOfTwo { bytes } => {
                write!(f, "a dirty ring of {bytes} bytes: must be a power of two")
            }
            Self::TooSmall { bytes, minimum } => {
                write!(f, "a dirty ring of {bytes} bytes: must be at least {minimum}")
            }
            Self::TooLarge { bytes, maximum } => {
                write!(f, "a dirty ring of {bytes} bytes: must be at most {maximum}")
            }
        }
    }
}

impl core::error::Error for RingSizeError {}

/// Nothing was pushed: every entry waits to be harvested and reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingFull {
    /// Entries of the ring.
    pub entries: u64,
}

impl fmt::Display for RingFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "all {} entries of the dirty ring are in use", self.entries)
    }
}

impl core::error::Error for RingFull {}

/// Another thread is resetting the ring; nothing was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetBusy;

impl fmt::Display for ResetBusy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the dirty ring is being reset by another thread")
    }
}

impl core::error::Error for ResetBusy {}

/// Why a reset ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetEnd {
    /// Everything that had been pushed when it began is free.
    Empty,
    /// The oldest entry left has not been harvested.
    NotHarvested,
    /// The budget is spent: call again.
    Budget,
}

/// What a reset did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a spent budget means that pages are left"]
pub struct ResetReport {
    /// Entries freed; each page pushed in them was handed to the callback.
    pub reset: u64,
    /// Of those, entries whose slot or offset the consumer had changed, which had no effect.
    pub rewritten: u64,
    /// Why it ended.
    pub end: ResetEnd,
}

/// What was pushed to an entry, where the consumer cannot change it. Between `reset_index` and
/// `dirty_index` it belongs to who resets, else to the producer; the indices order it.
#[derive(Debug, Default)]
struct Pushed {
    /// As in a state, without flags.
    slot: plain::AtomicU64,
    offset: plain::AtomicU64,
}

/// A ring of dirty pages; see the [module](self).
///
/// One thread at a time [`push`](Self::push)es: the vCPU's. Two would overwrite each other's pages.
///
/// Aligned so that vCPUs which write their indices share no cache line, nor a pair of them.
#[doc(alias = "kvm_dirty_ring")]
#[derive(Debug)]
#[repr(align(128))]
pub struct DirtyRing {
    entries: Box<[RingEntry]>,
    pushed: Box<[Pushed]>,
    /// Pages ever pushed. Written by the producer.
    dirty_index: AtomicU64,
    /// Entries ever freed, at most `dirty_index`. Written by the holder of `resetting`.
    reset_index: AtomicU64,
    /// 1 while somebody resets.
    resetting: AtomicU64,
}

impl DirtyRing {
    /// An empty ring.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(size: RingSize) -> Result<Self, NoMemory> {
        Ok(Self {
            entries: filled(size.entries)?,
            pushed: filled(size.entries)?,
            dirty_index: AtomicU64::new(0),
            reset_index: AtomicU64::new(0),
            resetting: AtomicU64::new(0),
        })
    }

    /// Its size.
    #[must_use]
    pub const fn size(&self) -> RingSize {
        RingSize { entries: to_u64(self.entries.len()) }
    }

    /// Bytes of memory that it takes, the private copy included.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        to_u64(size_of_val(&*self.entries)) + to_u64(size_of_val(&*self.pushed))
    }

    /// The shared memory.
    #[inline]
    #[must_use]
    pub const fn entries(&self) -> &[RingEntry] {
        &self.entries
    }

    /// A consumer that follows the rules, at the oldest entry that was not harvested: for when no
    /// other consumer is at work and nobody resets. Else keep one, or its
    /// [`position`](RingConsumer::position).
    #[must_use]
    pub fn consumer(&self) -> RingConsumer<'_> {
        let freed = self.freed();
        let harvested = |index: &u64| {
            self.entry(*index).is_some_and(|entry| entry.read().0 & RingEntry::RESET != 0)
        };
        let skipped = (freed..freed + self.used()).take_while(harvested).count();
        RingConsumer { entries: &self.entries, at: freed + to_u64(skipped) }
    }

    /// Put a page into the ring. By the producer only, and after the page's entry was made
    /// writable.
    ///
    /// # Errors
    /// [`RingFull`]. Who leaves the guest as soon as [`is_soft_full`](Self::is_soft_full) does not
    /// see it.
    #[doc(alias = "kvm_dirty_ring_push")]
    pub fn push(&self, key: SlotKey, offset: u64) -> Result<(), RingFull> {
        let full = RingFull { entries: self.size().entries };
        let index = load_own(&self.dirty_index);
        if index.saturating_sub(self.freed()) >= full.entries {
            return Err(full);
        }
        let (Some(entry), Some(pushed)) = (self.entry(index), self.pushed(index)) else {
            return Err(full);
        };
        // ORDERING[dirty-pushed]: Relaxed. Ordered by `dirty_index` and `reset_index`.
        pushed.slot.store(state_of(key, 0), plain::Ordering::Relaxed);
        pushed.offset.store(offset, plain::Ordering::Relaxed);
        // ORDERING[dirty-index]: Release. Pairs with the Acquire in `reset`, which finds the copy
        // complete and the page's entry writable even if the consumer orders nothing. Before the
        // entry is shown: a consumer that harvested it may reset it at once.
        self.dirty_index.store(index + 1, Ordering::Release);
        // ORDERING[dirty-ring]: Relaxed. Published by the store below.
        entry.offset.store(offset, Ordering::Relaxed);
        // ORDERING[dirty-ring]: Release. Pairs with the Acquire in `RingEntry::read`.
        entry.state.store(state_of(key, RingEntry::DIRTY), Ordering::Release);
        Ok(())
    }

    /// Are all entries in use?
    #[inline]
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.used() >= self.size().entries
    }

    /// Is no more left than the reserve? Then the vCPU must leave to have the ring harvested, and
    /// not enter again before it was reset.
    #[inline]
    #[must_use]
    #[doc(alias = "KVM_EXIT_DIRTY_RING_FULL")]
    pub fn is_soft_full(&self) -> bool {
        self.used() >= self.size().entries.saturating_sub(RESERVED)
    }

    /// Entries in use: exact for the producer, but for entries that are being freed.
    #[must_use]
    pub fn used(&self) -> u64 {
        // First what is freed: it never exceeds what was pushed, not even what is pushed later.
        let freed = self.freed();
        // ORDERING[dirty-index]: Acquire. Pairs with the Release in `push`.
        self.dirty_index.load(Ordering::Acquire).saturating_sub(freed)
    }

    /// Free harvested entries, at most `budget`, and hand out the pages that were pushed in them:
    /// `apply(slot, base, mask)` for the pages `base + n` with bit `n` of `mask`.
    ///
    /// Pages of one slot that follow each other, forwards or backwards, come in one call as long as
    /// they lie within 64. Each page handed out was pushed, so `base` and the highest bit of `mask`
    /// never add up to more than a `u64` holds (B10); whether the slot is still there and still has
    /// the page, the caller must check. Write protect those pages again, flush, and only then may
    /// their content be read.
    ///
    /// Looks at no more entries than were in use when it began.
    ///
    /// # Errors
    /// [`ResetBusy`] while another thread is in here.
    #[doc(alias = "kvm_dirty_ring_reset")]
    pub fn reset(
        &self,
        budget: u64,
        mut apply: impl FnMut(SlotKey, u64, u64),
    ) -> Result<ResetReport, ResetBusy> {
        let claim = Claim::new(&self.resetting)?;
        // ORDERING[dirty-index]: Acquire. Pairs with the Release in `push`.
        let end = self.dirty_index.load(Ordering::Acquire);
        let mut report = ResetReport { reset: 0, rewritten: 0, end: ResetEnd::Empty };
        let mut batch: Option<Batch> = None;
        let mut index = load_own(&self.reset_index);
        while index < end {
            if report.reset >= budget {
                report.end = ResetEnd::Budget;
                break;
            }
            let Some((page, rewritten)) = self.free(index) else {
                report.end = ResetEnd::NotHarvested;
                break;
            };
            index += 1;
            report.reset += 1;
            report.rewritten += u64::from(rewritten);
            let joined = batch.and_then(|batch| batch.with(page));
            if let (None, Some(done)) = (joined, batch) {
                apply(done.key, done.base, done.mask);
            }
            batch = joined.or(Some(Batch::new(page)));
        }
        if let Some(done) = batch {
            apply(done.key, done.base, done.mask);
        }
        drop(claim);
        Ok(report)
    }

    /// Free entry `index` if it was harvested: what had been pushed to it, and whether the consumer
    /// changed that.
    fn free(&self, index: u64) -> Option<(DirtyGfn, bool)> {
        let (entry, pushed) = (self.entry(index)?, self.pushed(index)?);
        // Acquire, which is also what an honest consumer's Release pairs with.
        let (state, offset) = entry.read();
        if state & RingEntry::RESET == 0 {
            return None;
        }
        // ORDERING[dirty-pushed]: Relaxed. Ordered by the loads of the indices.
        let slot = pushed.slot.load(plain::Ordering::Relaxed);
        let was = pushed.offset.load(plain::Ordering::Relaxed);
        // ORDERING[dirty-ring]: Release. Pairs with the Acquire in `RingEntry::read`.
        entry.state.store(0, Ordering::Release);
        // ORDERING[dirty-index]: Release. Pairs with the Acquire in `freed`: the producer uses the
        // entry and its copy only after they were read and the flags cleared.
        self.reset_index.store(index + 1, Ordering::Release);
        let page = DirtyGfn { key: key_of(slot), offset: was };
        Some((page, offset != was || state & !RingEntry::FLAGS != slot))
    }

    /// Entries ever freed.
    fn freed(&self) -> u64 {
        // ORDERING[dirty-index]: Acquire. Pairs with the Release in `free`.
        self.reset_index.load(Ordering::Acquire)
    }

    fn entry(&self, index: u64) -> Option<&RingEntry> {
        self.entries.get(to_index(index) & (self.entries.len() - 1))
    }

    fn pushed(&self, index: u64) -> Option<&Pushed> {
        self.pushed.get(to_index(index) & (self.pushed.len() - 1))
    }
}

/// The right to reset; given back when it drops, also by a callback that panics.
struct Claim<'a>(&'a AtomicU64);

impl<'a> Claim<'a> {
    fn new(word: &'a AtomicU64) -> Result<Self, ResetBusy> {
        // ORDERING[dirty-reset]: Acquire. Pairs with the Release in `drop`: `reset_index` is as the
        // last holder left it.
        let claimed = word.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed);
        claimed.map(|_| Self(word)).map_err(|_| ResetBusy)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        // ORDERING[dirty-reset]: Release. Pairs with the Acquire in `new`.
        self.0.store(0, Ordering::Release);
    }
}

/// Pages of one slot that lie within [`BATCH`]: `base + n` for each bit `n`. Each was pushed, so
/// none of these sums overflows.
#[derive(Clone, Copy)]
struct Batch {
    key: SlotKey,
    base: u64,
    mask: u64,
}

impl Batch {
    const fn new(page: DirtyGfn) -> Self {
        Self { key: page.key, base: page.offset, mask: 1 }
    }

    /// The batch with one page more, if that lies near enough.
    fn with(self, page: DirtyGfn) -> Option<Self> {
        if page.key != self.key {
            return None;
        }
        if let Some(ahead) = page.offset.checked_sub(self.base) {
            return (ahead < BATCH).then(|| Self { mask: self.mask | 1 << ahead, ..self });
        }
        let behind = self.base.checked_sub(page.offset)?;
        // The highest page must stay within the mask.
        let fits = behind <= u64::from(self.mask.leading_zeros());
        fits.then(|| Self { base: page.offset, mask: self.mask << behind | 1, ..self })
    }
}

/// A consumer that follows the rules. An iterator that gives the pages pushed since, and goes on
/// giving when more are pushed.
///
/// A page given is harvested: [`DirtyRing::reset`] may free its entry. Read the page's content
/// after that, not before; see the [module](self).
#[derive(Debug)]
pub struct RingConsumer<'a> {
    entries: &'a [RingEntry],
    at: u64,
}

impl<'a> RingConsumer<'a> {
    /// A consumer of shared memory, at the entry that is filled first.
    #[must_use]
    pub const fn new(entries: &'a [RingEntry]) -> Self {
        Self::resume(entries, 0)
    }

    /// A consumer that goes on after `harvested` pages: another's
    /// [`position`](Self::position).
    #[must_use]
    pub const fn resume(entries: &'a [RingEntry], harvested: u64) -> Self {
        Self { entries, at: harvested }
    }

    /// Pages harvested since the ring was made, by this consumer and those that it resumed.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.at
    }
}

impl Iterator for RingConsumer<'_> {
    type Item = DirtyGfn;

    fn next(&mut self) -> Option<DirtyGfn> {
        let index = self.at.checked_rem(to_u64(self.entries.len()))?;
        let page = self.entries.get(to_index(index))?.harvest()?;
        self.at = self.at.wrapping_add(1);
        Some(page)
    }
}

/// `count` empty elements, or an error instead of an abort when there is no memory.
fn filled<T: Default>(count: u64) -> Result<Box<[T]>, NoMemory> {
    let bytes = count.saturating_mul(to_u64(size_of::<T>()));
    let mut elements = Vec::new();
    elements.try_reserve_exact(to_index(count)).map_err(|_| NoMemory { bytes })?;
    elements.resize_with(to_index(count), T::default);
    Ok(elements.into_boxed_slice())
}

#[cfg(all(test, not(loom)))]
#[expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    const A: SlotKey = SlotKey { as_id: 1, id: 7 };
    const B: SlotKey = SlotKey { as_id: 0, id: 7 };

    fn ring() -> DirtyRing {
        DirtyRing::new(RingSize::from_bytes(16 << 10).unwrap()).unwrap()
    }

    /// Push, harvest, reset: the batches that the callback got.
    fn batches(pages: &[(SlotKey, u64)]) -> Vec<(SlotKey, u64, u64)> {
        let ring = ring();
        pages.iter().for_each(|&(key, offset)| ring.push(key, offset).unwrap());
        assert_eq!(ring.consumer().count(), pages.len());
        let mut got = Vec::new();
        let report = ring.reset(u64::MAX, |key, base, mask| got.push((key, base, mask))).unwrap();
        let reset = to_u64(pages.len());
        assert_eq!(report, ResetReport { reset, rewritten: 0, end: ResetEnd::Empty });
        got
    }

    #[test]
    fn sizes_are_judged_as_by_kvm() {
        let of = |bytes| RingSize::from_bytes(bytes).map(RingSize::entries);
        let minimum = 576 * 16;
        assert_eq!(of(0), Err(RingSizeError::NotPowerOfTwo { bytes: 0 }));
        assert_eq!(of(12 << 10), Err(RingSizeError::NotPowerOfTwo { bytes: 12 << 10 }));
        assert_eq!(of(8 << 10), Err(RingSizeError::TooSmall { bytes: 8 << 10, minimum }));
        assert_eq!(of(16 << 10), Ok(1024));
        assert_eq!(of(1 << 20), Ok(65_536));
        let maximum = 1 << 20;
        assert_eq!(of(2 << 20), Err(RingSizeError::TooLarge { bytes: 2 << 20, maximum }));
        assert_eq!(of(1 << 63), Err(RingSizeError::TooLarge { bytes: 1 << 63, maximum }));
        assert_eq!(ring().size().bytes(), 16 << 10);
        assert_eq!(ring().bytes(), 32 << 10);
    }

    #[test]
    fn entries_look_as_kvm_lays_them_out() {
        let ring = ring();
        ring.push(SlotKey { as_id: 0x1234, id: 0x5678 }, 9).unwrap();
        let entry = &ring.entries()[0];
        assert_eq!(entry.read(), (0x1234_5678_0000_0001, 9));
        assert_eq!(core::mem::offset_of!(RingEntry, offset), 8);
        assert_eq!(SlotKey::from_raw(0x1234_5678), SlotKey { as_id: 0x1234, id: 0x5678 });
        assert_eq!(SlotKey::from_raw(0x1234_5678).to_raw(), 0x1234_5678);
        let page = ring.consumer().next().unwrap();
        assert_eq!(page, DirtyGfn { key: SlotKey::from_raw(0x1234_5678), offset: 9 });
        assert_eq!(entry.read(), (0x1234_5678_0000_0002, 9));
    }

    #[test]
    fn a_ring_fills_up_and_goes_on_after_a_reset() {
        let ring = ring();
        let mut consumer = ring.consumer();
        for round in 0..3 {
            for offset in 0..1024 {
                assert_eq!(ring.is_soft_full(), offset >= 1024 - 576, "{offset} in {round}");
                assert_eq!((ring.is_full(), ring.used()), (false, offset));
                ring.push(A, offset).unwrap();
            }
            assert!(ring.is_full());
            assert_eq!(ring.push(A, 0), Err(RingFull { entries: 1024 }));
            assert_eq!(consumer.by_ref().take(1000).count(), 1000);
            let mut masks = 0;
            let report = ring.reset(900, |_, _, mask| masks += mask.count_ones()).unwrap();
            assert_eq!((report.reset, report.end), (900, ResetEnd::Budget));
            // One that starts anew goes on where the other stopped.
            assert_eq!(ring.consumer().map(|page| page.offset).next(), Some(1000));
            consumer.at += 1;
            let report = ring.reset(1 << 20, |_, _, mask| masks += mask.count_ones()).unwrap();
            assert_eq!((report.reset, report.end), (101, ResetEnd::NotHarvested));
            assert_eq!(consumer.by_ref().count(), 23);
            let report = ring.reset(23, |_, _, mask| masks += mask.count_ones()).unwrap();
            assert_eq!((report.reset, report.end, masks), (23, ResetEnd::Empty, 1024));
        }
    }

    #[test]
    fn neighbours_are_handed_out_together_in_both_directions() {
        assert_eq!(batches(&[(A, 5), (A, 6), (A, 68)]), [(A, 5, 1 << 63 | 0b11)]);
        assert_eq!(batches(&[(A, 5), (A, 69)]), [(A, 5, 1), (A, 69, 1)]);
        assert_eq!(batches(&[(A, 70), (A, 69), (A, 7)]), [(A, 7, 0b11 << 62 | 1)]);
        assert_eq!(batches(&[(A, 70), (A, 6)]), [(A, 70, 1), (A, 6, 1)]);
        assert_eq!(batches(&[(A, 70), (A, 80), (A, 10)]), [(A, 70, 1 << 10 | 1), (A, 10, 1)]);
        assert_eq!(batches(&[(A, 5), (A, 5), (B, 5), (A, 5)]), [(A, 5, 1), (B, 5, 1), (A, 5, 1)]);
    }

    /// KVM row B10: the second offset is 63 after the first, modulo 2^64.
    #[test]
    fn a_mask_never_wraps_past_the_last_offset() {
        let last = 0xffff_ffff_ffff_ffc1;
        assert_eq!(batches(&[(A, last), (A, 0)]), [(A, last, 1), (A, 0, 1)]);
        assert_eq!(batches(&[(A, 0), (A, last)]), [(A, 0, 1), (A, last, 1)]);
        assert_eq!(batches(&[(A, last), (A, u64::MAX)]), [(A, last, 1 << 62 | 1)]);
        assert_eq!(batches(&[(A, u64::MAX), (A, last - 1)]), [(A, last - 1, 1 << 63 | 1)]);
    }

    /// KVM row B10, as the consumer would have it.
    #[test]
    fn what_a_consumer_writes_into_an_entry_is_not_handed_out() {
        let ring = ring();
        (0..3).for_each(|offset| ring.push(A, offset).unwrap());
        let state = state_of(B, RingEntry::RESET);
        ring.entries()[0].write(state, 0xffff_ffff_ffff_ffc1);
        ring.entries()[1].write(state_of(A, RingEntry::RESET | 0xff00), 0);
        ring.entries()[2].write(state, 2);
        // Never pushed: not looked at.
        ring.entries()[3].write(state, 3);
        let mut got = Vec::new();
        let report = ring.reset(u64::MAX, |key, base, mask| got.push((key, base, mask))).unwrap();
        assert_eq!(report, ResetReport { reset: 3, rewritten: 3, end: ResetEnd::Empty });
        assert_eq!((got.as_slice(), ring.used()), ([(A, 0, 0b111)].as_slice(), 0));
    }

    #[test]
    fn a_reset_within_a_reset_is_refused() {
        let ring = ring();
        ring.push(A, 1).unwrap();
        assert_eq!(ring.consumer().count(), 1);
        let report =
            ring.reset(9, |_, _, _| assert_eq!(ring.reset(9, |_, _, _| ()), Err(ResetBusy)));
        assert_eq!(report.unwrap().reset, 1);
        assert_eq!(ring.reset(0, |_, _, _| ()).unwrap().end, ResetEnd::Empty);
    }
}
