//! The dirty log of one slot: which of its pages are logged, and the bits.
//!
//! Owns [`DirtyLog`] and [`LogOptions`] (KVM rows 6.12, 6.13). A log is made before the set that
//! carries it is published and goes when the last copy of that set does; in between only its bits
//! change, so every reader of the set may mark.

use core::ops::Range;

use crate::addr::to_index;
use crate::dirty::{DirtyBitmap, NoMemory, RingSize, WORD_PAGES};

/// How a VM logs writes. Chosen when the VM is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// Give each logged slot a bitmap, of one bit a page.
    pub bitmap: bool,
    /// Give each participant a ring of this size: what it makes writable, or writes, goes there.
    /// Bitmap and ring may be used together; each tells of every write.
    #[doc(alias = "KVM_CAP_DIRTY_LOG_RING")]
    pub ring: Option<RingSize>,
    /// A bitmap starts with every bit set, and enabling protects nothing: pages are protected as
    /// their bits are cleared for the first time (KVM row 3.46). In a VM with rings the bits are
    /// set and everything is protected all the same: a ring does not tell of all pages at once.
    #[doc(alias = "KVM_DIRTY_LOG_INITIALLY_SET")]
    pub initially_set: bool,
}

impl Default for LogOptions {
    /// A bitmap, all clear; no ring.
    fn default() -> Self {
        Self { bitmap: true, ring: None, initially_set: false }
    }
}

/// The dirty log of a slot.
///
/// Having a `DirtyLog` from a set tells you that the slot was logged in that set. Pages are counted
/// from the slot's first page.
#[derive(Debug)]
pub struct DirtyLog {
    /// The pages that are logged.
    pages: Range<u64>,
    /// First page of the bitmap: `pages.start` at the begin of its word.
    first: u64,
    bitmap: Option<DirtyBitmap>,
    starts_set: bool,
}

impl DirtyLog {
    /// A log of the slot pages `pages`.
    ///
    /// # Errors
    /// [`NoMemory`] for the bitmap.
    pub fn new(pages: Range<u64>, options: &LogOptions) -> Result<Self, NoMemory> {
        let first = pages.start / WORD_PAGES * WORD_PAGES;
        let count = pages.end.saturating_sub(first);
        let starts_set = options.bitmap && options.initially_set && options.ring.is_none();
        let bitmap = if options.bitmap { Some(DirtyBitmap::new(count)?) } else { None };
        if let Some(bits) = bitmap.as_ref().filter(|_| options.initially_set) {
            let _ = bits.set_range(pages.start - first..count);
        }
        Ok(Self { pages, first, bitmap, starts_set })
    }

    /// The pages that are logged.
    #[inline]
    #[must_use]
    pub fn pages(&self) -> Range<u64> {
        self.pages.clone()
    }

    /// Is the page logged?
    #[inline]
    #[must_use]
    pub fn has(&self, page: u64) -> bool {
        self.pages.contains(&page)
    }

    /// Is one of `pages` logged?
    #[must_use]
    pub fn overlaps(&self, pages: Range<u64>) -> bool {
        pages.start < self.pages.end && self.pages.start < pages.end
    }

    /// Did the log start with all bits set, and nothing protected?
    #[must_use]
    pub const fn starts_set(&self) -> bool {
        self.starts_set
    }

    /// Is there a bitmap?
    #[inline]
    #[must_use]
    pub const fn has_bitmap(&self) -> bool {
        self.bitmap.is_some()
    }

    /// Bytes of memory that the log takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bitmap.as_ref().map_or(0, DirtyBitmap::bytes)
    }

    /// Set the bit of a page that is logged. Call after the write became possible (see
    /// [`crate::dirty`]).
    #[inline]
    pub fn set(&self, page: u64) {
        if let Some(bits) = self.bitmap.as_ref().filter(|_| self.has(page)) {
            let _ = bits.set(page - self.first);
        }
    }

    /// Set the bits of those of `pages` that are logged, and say how many are.
    pub fn set_range(&self, pages: Range<u64>) -> u64 {
        let (start, end) = (pages.start.max(self.pages.start), pages.end.min(self.pages.end));
        if start >= end {
            return 0;
        }
        if let Some(bits) = &self.bitmap {
            let _ = bits.set_range(start - self.first..end - self.first);
        }
        end - start
    }

    /// Set the bits of pages `page + i` for each bit `i` of `mask`, as far as they are logged.
    pub fn set_mask(&self, page: u64, mask: u64) {
        let Some(bits) = &self.bitmap else { return };
        let (word, shift) = (page / WORD_PAGES, page % WORD_PAGES);
        let mut both = [(word, mask << shift), (word + 1, 0)];
        if shift != 0 {
            both[1].1 = mask >> (WORD_PAGES - shift);
        }
        for (word, mask) in both {
            let logged = mask & self.window(word);
            if let (true, Some(at)) = (logged != 0, word.checked_sub(self.first / WORD_PAGES)) {
                bits.set_word(to_index(at), logged);
            }
        }
    }

    /// All logged pages count as dirty from now on; constant time.
    pub fn set_all(&self) {
        if let Some(bits) = &self.bitmap {
            bits.mark_all();
        }
    }

    /// Begin a harvest: what [`set_all`](Self::set_all) said becomes bits.
    pub fn settle(&self) {
        if let Some(bits) = &self.bitmap {
            bits.settle();
        }
    }

    /// Take the bits of `mask` in word `word` of the slot: bit `i` is page `word * 64 + i`.
    #[must_use = "the bits are nowhere else now"]
    pub fn take(&self, word: u64, mask: u64) -> u64 {
        self.at(word).map_or(0, |(bits, at)| bits.take_bits(at, mask) & self.window(word))
    }

    /// Take over the bits of a log that this one replaces. When nobody marks that one any more.
    pub fn inherit(&self, old: &Self) {
        old.settle();
        for word in old.pages.start / WORD_PAGES..old.pages.end.div_ceil(WORD_PAGES) {
            self.set_mask(word * WORD_PAGES, old.peek(word));
        }
    }

    /// Look at a word of the slot.
    #[must_use]
    pub fn peek(&self, word: u64) -> u64 {
        self.at(word).map_or(0, |(bits, at)| bits.peek(at) & self.window(word))
    }

    fn at(&self, word: u64) -> Option<(&DirtyBitmap, usize)> {
        let bits = self.bitmap.as_ref()?;
        let at = word.checked_sub(self.first / WORD_PAGES)?;
        Some((bits, usize::try_from(at).ok()?))
    }

    /// The bits of a word whose pages are logged.
    #[must_use]
    pub fn window(&self, word: u64) -> u64 {
        let base = word.saturating_mul(WORD_PAGES);
        let below = |page: u64| match page.saturating_sub(base) {
            bits if bits >= WORD_PAGES => u64::MAX,
            bits => (1 << bits) - 1,
        };
        below(self.pages.end) & !below(self.pages.start)
    }
}
