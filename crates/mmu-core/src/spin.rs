//! A spin lock for what is rare and short: the pool's lists, the root list, invalidation ranges.
//!
//! Owns [`SpinLock`]. It holds no data: what it protects stands beside it in
//! [`plain`](crate::sync::plain) atomics, and functions that touch it ask for the guard. That costs
//! nothing on x86 and needs no `unsafe`. Lock order: a leaf; nothing is taken under it but, under
//! the pool's, whatever lock its [`PhysMap`](crate::frame::PhysMap) has of its own.

use core::fmt;

#[cfg(loom)]
use crate::sync::contract::{Contract, Held};
use crate::sync::{AtomicU64, Backoff, Ordering};

/// A test-and-set lock.
pub struct SpinLock {
    /// 1 while held.
    held: AtomicU64,
    give_up_cpu: fn(),
    #[cfg(loom)]
    contract: Contract,
}

impl SpinLock {
    /// A free lock. `give_up_cpu` is called when a wait lasts long (a preempted holder).
    #[must_use]
    pub fn new(give_up_cpu: fn()) -> Self {
        Self {
            held: AtomicU64::new(0),
            give_up_cpu,
            #[cfg(loom)]
            contract: Contract::new(),
        }
    }

    /// Take the lock, waiting for it.
    pub fn lock(&self) -> SpinGuard<'_> {
        #[cfg(loom)]
        if let Some(held) = self.by_contract() {
            return held;
        }
        let mut backoff = Backoff::new();
        loop {
            if let Some(guard) = self.try_lock() {
                return guard;
            }
            backoff.wait(self.give_up_cpu);
        }
    }

    /// Take the lock if it is free.
    pub fn try_lock(&self) -> Option<SpinGuard<'_>> {
        // ORDERING[spin]: Acquire. Pairs with the Release in `SpinGuard::drop`.
        self.held.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).ok().map(|_| {
            SpinGuard {
                lock: self,
                #[cfg(loom)]
                held: None,
            }
        })
    }

    /// The lock, taken, in models that have it by contract.
    #[cfg(loom)]
    pub(crate) fn by_contract(&self) -> Option<SpinGuard<'_>> {
        // Lazily: a guard that is made and dropped would free the lock.
        self.contract.hold().map(|held| SpinGuard { lock: self, held: Some(held) })
    }
}

impl fmt::Debug for SpinLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpinLock").finish_non_exhaustive()
    }
}

/// Holds a [`SpinLock`].
#[derive(Debug)]
#[must_use]
pub struct SpinGuard<'a> {
    lock: &'a SpinLock,
    #[cfg(loom)]
    held: Held<'a>,
}

impl Drop for SpinGuard<'_> {
    fn drop(&mut self) {
        #[cfg(loom)]
        if self.held.is_some() {
            return;
        }
        // ORDERING[spin]: Release. Pairs with the Acquire in `SpinLock::try_lock`.
        self.lock.held.store(0, Ordering::Release);
    }
}
