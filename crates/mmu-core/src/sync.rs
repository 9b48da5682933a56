//! The one door to atomics. No other file names `core::sync::atomic`; under `cfg(loom)` the model
//! checker's types stand here, so every model runs the code that ships.
//!
//! Also here: [`ENTRY_BITS`], which shrinks tables from 512 to 2 entries under loom, [`relax`],
//! [`Backoff`], and [`plain`], atomics that models need not explore.

#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(loom)]
pub use modelled::{AtomicU64, Ordering, fence};

#[cfg(loom)]
pub mod contract;
#[cfg(loom)]
mod modelled;

/// Atomics that order nothing: statistics, and words that another lock or exclusive ownership
/// protects. Models leave them out, because each one would multiply their interleavings.
pub mod plain {
    pub use core::sync::atomic::{AtomicU64, Ordering};
}

/// A relaxed load by the only thread that may write `word` at this moment: its owner, or who holds
/// the lock that writers take. No order of operations can change what it gives, and models do not
/// try any.
#[inline(always)]
pub fn load_own(word: &AtomicU64) -> u64 {
    #[cfg(not(loom))]
    return word.load(Ordering::Relaxed);
    #[cfg(loom)]
    return word.own();
}

/// log2 of the entries in a table page: 9 on hardware, 1 in loom models (where each entry costs
/// interleavings).
pub const ENTRY_BITS: u32 = if cfg!(loom) { 1 } else { 9 };

/// Entries in a table page.
pub const ENTRIES: usize = 1 << ENTRY_BITS;

/// One step of a wait loop: tells the CPU (or loom's scheduler) that somebody else must move.
#[inline]
pub fn relax() {
    #[cfg(not(loom))]
    core::hint::spin_loop();
    #[cfg(loom)]
    loom::thread::yield_now();
}

/// A wait loop's patience: spins for a while, then lets the embedder's hook give the CPU away, so
/// that waiting for a preempted thread does not burn its time slice.
#[derive(Debug)]
pub struct Backoff {
    steps: u32,
}

/// Spins before the hook is asked: about a microsecond, longer than any section stays open unless
/// its thread was preempted.
const SPINS: u32 = 64;

impl Backoff {
    /// A fresh loop.
    #[inline]
    #[must_use]
    pub const fn new() -> Self {
        Self { steps: 0 }
    }

    /// Wait one step; `give_up_cpu` is called when spinning has not helped.
    #[inline]
    pub fn wait(&mut self, give_up_cpu: fn()) {
        if cfg!(loom) || self.steps < SPINS {
            self.steps = self.steps.saturating_add(1);
            relax();
        } else {
            give_up_cpu();
        }
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}
