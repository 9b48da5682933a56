//! Grace periods without waiting: has everybody left who could still be looking?
//!
//! Owns [`Grace`], a small state machine under a lock of its user's (the table pool's). `start`
//! notes every open section; `elapsed` says whether all of those have ended. At most one period
//! runs at a time per `Grace`; what is retired while one runs needs the next.

use super::EpochDomain;
use crate::spin::SpinGuard;
use crate::sync::{Ordering, fence, plain};

/// A grace period, or none.
#[derive(Debug, Default)]
pub struct Grace {
    /// 1 while a period runs. Protected by the user's lock.
    running: plain::AtomicU64,
    /// Periods that ended; a figure for people. Protected likewise.
    completed: plain::AtomicU64,
}

impl Grace {
    /// No period running.
    #[must_use]
    pub const fn new() -> Self {
        Self { running: plain::AtomicU64::new(0), completed: plain::AtomicU64::new(0) }
    }

    /// Is a period running?
    #[must_use]
    pub fn is_running(&self, _lock: &SpinGuard<'_>) -> bool {
        // ORDERING[grace-state]: Relaxed. Protected by the lock whose guard the caller shows.
        self.running.load(plain::Ordering::Relaxed) == 1
    }

    /// Periods that ended since the start.
    #[must_use]
    pub fn completed(&self) -> u64 {
        // ORDERING[grace-state]: Relaxed. A figure.
        self.completed.load(plain::Ordering::Relaxed)
    }

    /// Begin a period: it covers everything that was made unreachable before this call. `domain`
    /// must be the same at every call, and only one `Grace` may exist per domain.
    ///
    /// Does nothing while a period runs.
    pub fn start(&self, domain: &EpochDomain, lock: &SpinGuard<'_>) {
        if self.is_running(lock) {
            return;
        }
        // ORDERING[grace-state]: Relaxed. Protected by the lock.
        self.running.store(1, plain::Ordering::Relaxed);
        // ORDERING[epoch-dekker]: SeqCst fence. Pairs with the fence in `Participant::announce`:
        // a section not noted below began after it and cannot reach what was unlinked before.
        fence(if crate::busted!("grace_without_fence") {
            Ordering::Release
        } else {
            Ordering::SeqCst
        });
        for (_, record) in domain.scan() {
            #[cfg(loom)]
            if record.contract.applies() {
                continue;
            }
            // ORDERING[epoch-exit]: Acquire. Pairs with the Release in `Participant::retire`.
            let word = record.word.load(Ordering::Acquire);
            // ORDERING[grace-seen]: Relaxed. Protected by the lock; pairs with the load in
            // `elapsed`.
            record.seen.store(word, plain::Ordering::Relaxed);
        }
    }

    /// Has the running period ended? Ends it if so. `false` when none runs.
    pub fn elapsed(&self, domain: &EpochDomain, lock: &SpinGuard<'_>) -> bool {
        if !self.is_running(lock) {
            return false;
        }
        // A record claimed since `start` carries `seen` of an older period; its word is then even
        // there or has moved on, or the comparison merely waits one section longer.
        let over = domain.scan().all(|(_, record)| {
            #[cfg(loom)]
            if record.contract.applies() {
                return record.contract.try_hold().is_some();
            }
            // ORDERING[grace-seen]: Relaxed. Pairs with the store in `start`, under the same lock.
            let seen = record.seen.load(plain::Ordering::Relaxed);
            // ORDERING[epoch-exit]: Acquire. Pairs with the Release in `Participant::retire`.
            seen & 1 == 0 || record.word.load(Ordering::Acquire) != seen
        });
        if over {
            // ORDERING[grace-state]: Relaxed. Protected by the lock.
            self.running.store(0, plain::Ordering::Relaxed);
            // ORDERING[grace-state]: Relaxed. Protected by the lock.
            self.completed.fetch_add(1, plain::Ordering::Relaxed);
        }
        over
    }
}
