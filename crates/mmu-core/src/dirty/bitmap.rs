//! One bit a page: which pages of a slot were written since they were harvested last.
//!
//! Owns [`DirtyBitmap`]. Its neighbours: the MMU's faults, which mark; the reading and clearing of
//! logs, which takes marks and write protects again. No locks.

use alloc::boxed::Box;
use core::ops::Range;

use super::NoMemory;
use crate::addr::{to_index, to_u64};
use crate::sync::{AtomicU64, Ordering};

/// Pages in one word of a [`DirtyBitmap`].
pub const WORD_PAGES: u64 = 64;

/// The dirty log of one slot, one bit for each 4 KiB page, page 0 the slot's first.
///
/// # No write is lost
///
/// *Marker*: makes the page's entry writable by compare-exchange, then [`set`](Self::set)s its bit.
/// *Harvester*: [`take`](Self::take)s the bit, then looks at the entry and write protects it, then
/// flushes, then reads the page. (`ORDERING[dirty-bit]` in the code.)
///
/// - `take` returned the bit: the compare-exchange happens before what the harvester does next,
///   also if others changed the word in between, because every change of a word is a
///   read-modify-write and continues the marker's release. So the harvester finds the entry
///   writable and protects it, and later writes fault and mark again.
/// - `take` did not: the bit is set afterwards, and the next harvest has it.
///
/// Everybody who follows this may run at the same time, harvesters too: each bit goes to one of
/// them. A page that is marked without having been written costs a copy, nothing else.
///
/// KVM allocates twice the size and keeps the words harvested last in the second half until they
/// are copied to user space (row 6.12). Here the harvester copies words into its caller's buffer
/// as it takes them, so one half is enough.
#[doc(alias = "dirty_bitmap")]
#[derive(Debug)]
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    /// 1 while every page counts as dirty, whatever the words say.
    all: AtomicU64,
    pages: u64,
}

impl DirtyBitmap {
    /// A log of `pages` pages, none of them dirty.
    ///
    /// # Errors
    /// [`NoMemory`].
    #[doc(alias = "kvm_alloc_dirty_bitmap")]
    pub fn new(pages: u64) -> Result<Self, NoMemory> {
        let words = zeroed(pages.div_ceil(WORD_PAGES))?;
        Ok(Self { words, all: AtomicU64::new(0), pages })
    }

    /// A log of `pages` pages, all of them dirty (KVM row 3.46). Bits beyond `pages` are clear.
    ///
    /// # Errors
    /// [`NoMemory`].
    #[doc(alias = "KVM_DIRTY_LOG_INITIALLY_SET")]
    pub fn new_all_set(pages: u64) -> Result<Self, NoMemory> {
        let log = Self::new(pages)?;
        let _ = log.set_range(0..pages);
        Ok(log)
    }

    /// Pages that have a bit.
    #[inline]
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Words of [`WORD_PAGES`] bits; word `n` begins with page `n * WORD_PAGES`, in bit 0.
    #[inline]
    #[must_use]
    pub const fn words(&self) -> usize {
        self.words.len()
    }

    /// Bytes of memory that the bits take.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        to_u64(size_of_val(&*self.words))
    }

    /// Mark a page. Was it clear? A page that does not exist is not marked: `false`.
    ///
    /// Always a read-modify-write, though a page already marked looks as if a load would do. It
    /// would not: the load could give the bit of before a harvest that goes on to look at the entry
    /// of before the marker's compare-exchange. That harvester would leave the entry writable and
    /// the marker would leave the bit clear, and no later write would be seen.
    #[inline]
    #[doc(alias = "mark_page_dirty")]
    pub fn set(&self, page: u64) -> bool {
        if page >= self.pages {
            return false;
        }
        let bit = 1 << (page % WORD_PAGES);
        self.or(page / WORD_PAGES, bit) != 0
    }

    /// Mark `pages`, as far as they exist. How many were clear?
    pub fn set_range(&self, pages: Range<u64>) -> u64 {
        let end = pages.end.min(self.pages);
        let mut at = pages.start;
        let mut news = 0;
        while at < end {
            let next = (at / WORD_PAGES + 1).saturating_mul(WORD_PAGES).min(end);
            let mask = low_bits(next - at) << (at % WORD_PAGES);
            news += u64::from(self.or(at / WORD_PAGES, mask).count_ones());
            at = next;
        }
        news
    }

    /// Mark the pages of `mask` in word `word`, as far as they exist.
    #[inline]
    pub fn set_word(&self, word: usize, mask: u64) {
        let first = to_u64(word).saturating_mul(WORD_PAGES);
        let _ = self.or(to_u64(word), mask & low_bits(self.pages.saturating_sub(first)));
    }

    /// Mark every page, in constant time. The bits follow with the next [`settle`](Self::settle).
    pub fn mark_all(&self) {
        // ORDERING[dirty-all]: Release. Pairs with the AcqRel swap in `settle`: who lowers the flag
        // sees the entries that its raisers changed before. All of them, as a store would not give.
        self.all.fetch_or(1, Ordering::Release);
    }

    /// Turn a [`mark_all`](Self::mark_all) into bits. A harvest begins with this.
    ///
    /// The flag is lowered before the bits are set. So a `mark_all` that comes during this raises
    /// the flag again, for the next harvest; the other order would lower it unseen. Who calls this
    /// while another thread does may return before that one has set its bits, and then leaves them
    /// to a later harvest, as bits that are set a moment too late.
    pub fn settle(&self) {
        // ORDERING[dirty-all]: Acquire, a hint without which every harvest would write the flag's
        // line. If it gives an old 0, `mark_all` counts as later than this.
        if self.all.load(Ordering::Acquire) == 0 {
            return;
        }
        // ORDERING[dirty-all]: AcqRel. Pairs with the Release in `mark_all`.
        if self.all.swap(0, Ordering::AcqRel) != 0 {
            let _ = self.set_range(0..self.pages);
        }
    }

    /// Take a word's bits and leave 0 (KVM row 3.44). 0 when there is no such word.
    ///
    /// A raised `mark_all` is not among them; [`settle`](Self::settle) first.
    #[inline]
    #[must_use = "the bits are nowhere else now"]
    pub fn take(&self, word: usize) -> u64 {
        self.take_bits(word, u64::MAX)
    }

    /// Take those bits of a word that are in `mask`: they are returned and cleared, the others stay
    /// (KVM row 3.45). 0 when there is no such word.
    ///
    /// Bits of `mask` that were clear, or that stand for no page, have no effect.
    #[inline]
    #[must_use = "the bits are nowhere else now"]
    pub fn take_bits(&self, word: usize, mask: u64) -> u64 {
        let Some(cell) = self.words.get(word) else { return 0 };
        // ORDERING[dirty-bit]: Relaxed. Most words are clear, and a harvest that finds one so has
        // happened before the marks that it does not see. (A marker may not skip its write.)
        if cell.load(Ordering::Relaxed) & mask == 0 {
            return 0;
        }
        // ORDERING[dirty-bit]: AcqRel. Pairs with the AcqRel in `or`: the entries of the pages
        // taken are writable in the eyes of whoever took them.
        cell.fetch_and(!mask, Ordering::AcqRel) & mask
    }

    /// A word's bits, all of its pages while `mark_all` is raised. Nothing is cleared, so nothing
    /// may be concluded for the entries: this is for reports.
    #[must_use]
    pub fn peek(&self, word: usize) -> u64 {
        // ORDERING[dirty-all]: Acquire. Pairs with the Release in `mark_all`.
        let all = self.all.load(Ordering::Acquire) != 0;
        // ORDERING[dirty-bit]: Acquire. Pairs with the AcqRel in `or`.
        let bits = |cell: &AtomicU64| cell.load(Ordering::Acquire);
        let first = to_u64(word).saturating_mul(WORD_PAGES);
        let own = if all { low_bits(self.pages.saturating_sub(first)) } else { 0 };
        self.words.get(word).map_or(0, bits) | own
    }

    /// Pages that are marked. Exact while nobody marks or harvests.
    #[must_use]
    pub fn count(&self) -> u64 {
        (0..self.words()).map(|word| u64::from(self.peek(word).count_ones())).sum()
    }

    /// Set the bits of `mask`; returns those that were clear.
    #[inline]
    fn or(&self, word: u64, mask: u64) -> u64 {
        let Some(cell) = self.words.get(to_index(word)) else { return 0 };
        // ORDERING[dirty-bit]: AcqRel. Pairs with the AcqRel in `take` and `take_bits`. Release
        // publishes the entry made writable before; Acquire orders a marker that finds the bit
        // cleared after the harvest that did it.
        mask & !cell.fetch_or(mask, Ordering::AcqRel)
    }
}

/// `count` zeroed words. The allocator's own zeroing, which is lazy for large sizes on most hosts:
/// the log of a slot that is never written costs address space only.
#[cfg(not(loom))]
fn zeroed(count: u64) -> Result<Box<[AtomicU64]>, NoMemory> {
    let bytes = count.saturating_mul(to_u64(size_of::<AtomicU64>()));
    zerocopy::FromZeros::new_box_zeroed_with_elems(to_index(count)).map_err(|_| NoMemory { bytes })
}

/// The same where the model checker's atomics have no all-zero form.
#[cfg(loom)]
fn zeroed(count: u64) -> Result<Box<[AtomicU64]>, NoMemory> {
    let bytes = count.saturating_mul(to_u64(size_of::<AtomicU64>()));
    let mut words = alloc::vec::Vec::new();
    words.try_reserve_exact(to_index(count)).map_err(|_| NoMemory { bytes })?;
    words.resize_with(to_index(count), AtomicU64::default);
    Ok(words.into_boxed_slice())
}

/// The lowest `count` bits; all of them from 64 on.
const fn low_bits(count: u64) -> u64 {
    if count >= WORD_PAGES { u64::MAX } else { (1 << count) - 1 }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_bit_is_taken_once_and_bits_of_no_page_never() {
        let log = DirtyBitmap::new(70).unwrap();
        assert_eq!((log.pages(), log.words(), log.bytes(), log.count()), (70, 2, 16, 0));
        assert!(log.set(69) && !log.set(69) && !log.set(70) && !log.set(u64::MAX));
        assert_eq!((log.peek(1), log.take(1), log.take(1), log.take(2)), (1 << 5, 1 << 5, 0, 0));
        assert_eq!(log.set_range(60..1000), 10);
        assert_eq!(log.set_range(u64::MAX - 1..u64::MAX), 0);
        assert_eq!(log.take_bits(1, 0b1000_0110), 0b110);
        assert_eq!((log.take_bits(1, u64::MAX), log.take_bits(9, u64::MAX)), (0b11_1001, 0));
        let all = DirtyBitmap::new_all_set(70).unwrap();
        assert_eq!((all.take(0), all.take(1)), (u64::MAX, 0b11_1111));
    }

    #[test]
    fn marking_all_is_seen_at_once_and_taken_after_settling() {
        let log = DirtyBitmap::new(70).unwrap();
        log.mark_all();
        assert_eq!((log.count(), log.peek(1), log.peek(2), log.take(1)), (70, 0b11_1111, 0, 0));
        log.settle();
        assert_eq!((log.take(0), log.take(1), log.count()), (u64::MAX, 0b11_1111, 0));
        log.settle();
        assert_eq!(log.count(), 0);
    }

    #[test]
    fn a_log_without_pages_is_empty_and_one_without_memory_is_refused() {
        let log = DirtyBitmap::new_all_set(0).unwrap();
        log.mark_all();
        log.settle();
        assert_eq!((log.words(), log.count(), log.set(0)), (0, 0, false));
        let refused = DirtyBitmap::new(u64::MAX).unwrap_err();
        assert_eq!(refused, NoMemory { bytes: 1 << 61 });
    }
}
