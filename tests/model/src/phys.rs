//! Physical memory as a page walker sees it: aligned 8-byte reads and compare-exchange.
//!
//! [`VecMem`] owns its words. [`MappedMem`] is a window on memory that somebody else owns and
//! other threads change meanwhile; it holds the only `unsafe` of this crate.
//!
//! Ordering: a walker that reads a pointer to a table must see what was stored in the table before
//! the pointer was published, so reads are Acquire; accessed and dirty bits are set by AcqRel
//! compare-exchange. That is weaker than what x86 gives.

use std::sync::atomic::{AtomicU64, Ordering};

/// Memory that can be read and compare-exchanged in aligned words of 8 bytes.
///
/// `None` means that there is no memory at that address, or that the address is not aligned.
pub trait PhysMem {
    /// The word at `pa`.
    fn read(&self, pa: u64) -> Option<u64>;

    /// Replace the word at `pa` by `new` if it is `old`; otherwise tell what it is.
    fn cas(&self, pa: u64, old: u64, new: u64) -> Option<Result<(), u64>>;
}

impl<M: PhysMem + ?Sized> PhysMem for &M {
    fn read(&self, pa: u64) -> Option<u64> {
        (**self).read(pa)
    }

    fn cas(&self, pa: u64, old: u64, new: u64) -> Option<Result<(), u64>> {
        (**self).cas(pa, old, new)
    }
}

fn read_word(word: &AtomicU64) -> u64 {
    // ORDERING[model-entry]: Acquire. Pairs with the Release of whoever links a table or stores an
    // entry (`VecMem::write`, the software under test): its contents are seen through the link.
    word.load(Ordering::Acquire)
}

fn cas_word(word: &AtomicU64, old: u64, new: u64) -> Result<(), u64> {
    // ORDERING[model-entry]: AcqRel, Acquire on failure. Pairs with loads of the entry by software
    // that harvests accessed and dirty bits.
    word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).map(|_| ())
}

/// Memory of its own, from physical address 0.
#[derive(Debug)]
pub struct VecMem {
    words: Vec<AtomicU64>,
}

impl VecMem {
    /// `pages` pages of zeroes.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        let words = (0..pages.saturating_mul(512)).map(|_| AtomicU64::new(0));
        Self { words: words.collect() }
    }

    /// Store a word. False when there is no memory at `pa`.
    #[must_use = "false means that nothing was stored"]
    pub fn write(&self, pa: u64, value: u64) -> bool {
        let Some(word) = self.word(pa) else {
            return false;
        };
        // ORDERING[model-entry]: Release. Pairs with the Acquire in `read_word`.
        word.store(value, Ordering::Release);
        true
    }

    fn word(&self, pa: u64) -> Option<&AtomicU64> {
        if pa % 8 != 0 {
            return None;
        }
        self.words.get(usize::try_from(pa / 8).ok()?)
    }
}

impl PhysMem for VecMem {
    fn read(&self, pa: u64) -> Option<u64> {
        self.word(pa).map(read_word)
    }

    fn cas(&self, pa: u64, old: u64, new: u64) -> Option<Result<(), u64>> {
        self.word(pa).map(|word| cas_word(word, old, new))
    }
}

/// A window on memory owned elsewhere, such as a shared mapping. Byte 0 is physical address 0.
#[derive(Debug)]
pub struct MappedMem {
    base: *mut u8,
    len: u64,
}

#[expect(unsafe_code, reason = "the one place that turns an address into a reference")]
mod mapped {
    use super::{AtomicU64, MappedMem};

    // SAFETY: `MappedMem::new` clauses 1 and 2: the memory outlives the value on whatever thread
    // it is, and is reached through atomics only.
    unsafe impl Send for MappedMem {}
    // SAFETY: as for Send; all methods take `&self` and go through atomics.
    unsafe impl Sync for MappedMem {}

    impl MappedMem {
        /// A window of `len` bytes at `base`.
        ///
        /// # Safety
        ///
        /// 1. `base` is aligned to 8 bytes and valid for reads and writes of `len` bytes, from any
        ///    thread, as long as the returned value lives.
        /// 2. In that time the memory is accessed atomically only (by this process; what other
        ///    processes do through a shared mapping is not visible to the language).
        #[must_use]
        pub const unsafe fn new(base: *mut u8, len: u64) -> Self {
            Self { base, len }
        }

        /// The word at `pa`, for accesses that are not the walker's.
        #[inline]
        #[must_use]
        pub fn word(&self, pa: u64) -> Option<&AtomicU64> {
            let end = pa.checked_add(8)?;
            if pa % 8 != 0 || end > self.len {
                return None;
            }
            let place = self.base.wrapping_add(usize::try_from(pa).ok()?);
            // SAFETY: clause 1 of `new`: pa + 8 <= len (checked above), so `place` is inside the
            // valid region; base and pa are multiples of 8, so it is aligned; the region lives as
            // long as `self`, which the returned reference borrows. Clause 2: atomic access only.
            Some(unsafe { AtomicU64::from_ptr(place.cast()) })
        }
    }
}

impl PhysMem for MappedMem {
    #[inline]
    fn read(&self, pa: u64) -> Option<u64> {
        self.word(pa).map(read_word)
    }

    #[inline]
    fn cas(&self, pa: u64, old: u64, new: u64) -> Option<Result<(), u64>> {
        self.word(pa).map(|word| cas_word(word, old, new))
    }
}

#[cfg(test)]
mod tests {
    use super::{MappedMem, PhysMem, VecMem};

    fn exercise(mem: &impl PhysMem, end: u64) {
        assert_eq!(mem.cas(8, 0, 7), Some(Ok(())));
        assert_eq!(mem.cas(8, 0, 9), Some(Err(7)), "the loser learns the value");
        assert_eq!(mem.read(8), Some(7));
        assert_eq!(mem.read(end - 8), Some(0));
        for nowhere in [end, end - 4, end + 8, 4, u64::MAX, u64::MAX - 7] {
            assert_eq!(mem.read(nowhere), None, "{nowhere:#x}");
            assert_eq!(mem.cas(nowhere, 0, 0), None, "{nowhere:#x}");
        }
    }

    #[test]
    fn vec_memory() {
        exercise(&VecMem::new(2), 8192);
        assert!(!VecMem::new(1).write(4096, 1));
    }

    #[test]
    #[expect(unsafe_code, reason = "makes a window")]
    fn mapped_memory() {
        let mut words = vec![0_u64; 512];
        // SAFETY: `words` is aligned, 4096 bytes long, outlives `mem` and is not touched meanwhile.
        let mem = unsafe { MappedMem::new(words.as_mut_ptr().cast(), 4096) };
        exercise(&mem, 4096);
        assert_eq!(words[1], 7);
    }
}
