//! loom's atomics, explored completely.
//!
//! Owns the [`AtomicU64`] of models. To find operations whose order matters, loom 0.7 remembers one
//! access to each location, the latest. A thread that loads a word and then writes it hides another
//! thread's earlier load behind its own, so loom never tries that write before that load: with `x`
//! 0 at first, `{ x.load(); x.store(1) }` beside `x.load()` runs once and gives 0.
//!
//! So each load first touches a word that stands for its thread and location, and whoever writes
//! the location after a load of its own touches the words of those who loaded before that: an order
//! that loom sees. The touches are relaxed read-modify-writes; they order nothing, except, through
//! fences, threads whose sequentially consistent fences have that order anyway.

#![expect(missing_docs, reason = "as those of `core`")]

use core::hash::{Hash, Hasher};

use loom::sync::atomic::AtomicU64 as Word;
pub use loom::sync::atomic::{Ordering, fence};

use super::plain;

/// Threads of a model, the first included.
const THREADS: usize = 3;

#[derive(Debug)]
pub struct AtomicU64 {
    value: Word,
    /// What was written last.
    written: plain::AtomicU64,
    touched: [Word; THREADS],
    /// When each thread loaded last; 0 if not since the last write.
    loaded: [plain::AtomicU64; THREADS],
    clock: plain::AtomicU64,
}

impl AtomicU64 {
    #[must_use]
    pub fn new(value: u64) -> Self {
        Self {
            value: Word::new(value),
            written: plain::AtomicU64::new(value),
            touched: core::array::from_fn(|_| Word::new(0)),
            loaded: core::array::from_fn(|_| plain::AtomicU64::new(0)),
            clock: plain::AtomicU64::new(0),
        }
    }

    pub fn load(&self, order: Ordering) -> u64 {
        let me = current_thread();
        self.touch(me);
        // Noted twice: others may act between the two operations.
        self.note_load(me);
        let value = self.value.load(order);
        self.note_load(me);
        value
    }

    /// See [`load_own`](super::load_own).
    pub(super) fn own(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    pub fn store(&self, value: u64, order: Ordering) {
        self.write(|word| (word.store(value, order), Some(value)));
    }

    pub fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.write(|word| (word.swap(value, order), Some(value)))
    }

    pub fn compare_exchange(
        &self,
        old: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        self.write(|word| {
            let result = word.compare_exchange(old, new, success, failure);
            (result, result.is_ok().then_some(new))
        })
    }

    pub fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.write(|word| {
            let old = word.fetch_add(value, order);
            (old, Some(old.wrapping_add(value)))
        })
    }

    pub fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
        self.write(|word| {
            let old = word.fetch_sub(value, order);
            (old, Some(old.wrapping_sub(value)))
        })
    }

    pub fn fetch_max(&self, value: u64, order: Ordering) -> u64 {
        self.write(|word| {
            let old = word.fetch_max(value, order);
            (old, Some(old.max(value)))
        })
    }

    pub fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
        self.write(|word| {
            let old = word.fetch_and(value, order);
            (old, Some(old & value))
        })
    }

    pub fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
        self.write(|word| {
            let old = word.fetch_or(value, order);
            (old, Some(old | value))
        })
    }

    /// Touch what a load of this thread would hide, then write.
    fn write<R>(&self, write: impl FnOnce(&Word) -> (R, Option<u64>)) -> R {
        let me = current_thread();
        let mine = self.loaded_at(me);
        for thread in (0..THREADS).filter(|&thread| thread != me) {
            let theirs = self.loaded_at(thread);
            if theirs != 0 && theirs < mine {
                self.touch(thread);
            }
        }
        let (result, written) = write(&self.value);
        if let Some(value) = written {
            self.written.store(value, Ordering::Relaxed);
        }
        // Not before: until then, somebody else's write must still find our own load.
        self.loaded.iter().for_each(|at| at.store(0, Ordering::Relaxed));
        result
    }

    fn touch(&self, thread: usize) {
        if let Some(word) = self.touched.get(thread) {
            word.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn note_load(&self, thread: usize) {
        let now = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(at) = self.loaded.get(thread) {
            at.store(now, Ordering::Relaxed);
        }
    }

    fn loaded_at(&self, thread: usize) -> u64 {
        self.loaded.get(thread).map_or(0, |at| at.load(Ordering::Relaxed))
    }
}

impl Default for AtomicU64 {
    fn default() -> Self {
        Self::new(0)
    }
}

/// Number of the thread in its model.
fn current_thread() -> usize {
    /// Keeps the last number hashed, which is what tells threads of a model apart.
    struct Last(usize);
    impl Hasher for Last {
        fn finish(&self) -> u64 {
            0
        }
        fn write(&mut self, _: &[u8]) {}
        fn write_usize(&mut self, number: usize) {
            self.0 = number;
        }
    }
    let mut last = Last(usize::MAX);
    loom::thread::current().id().hash(&mut last);
    assert!(last.0 < THREADS, "a model of more than {THREADS} threads: raise THREADS");
    last.0
}
