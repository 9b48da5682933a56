//! The MMU lock: a big-reader lock whose modes are types.
//!
//! Owns [`MmuLock`] and its guards. [`Shared`] is what faults and zaps of TDP tables hold: taking
//! it is one announcement in the thread's own epoch word ([`crate::epoch`]), so it is an epoch pin
//! too and writes no line that another vCPU writes. [`Exclusive`] waits until every announced
//! section has ended and keeps new Shared sections out; bare epoch pins (aging, fast faults,
//! lookups) are never kept out.
//!
//! Rank: below the slots writer, above every spin lock. An Exclusive holder may not wait for
//! anything but sections (it holds up all faults).

use alloc::sync::Arc;
use core::fmt;

use crate::epoch::{EpochDomain, EpochGuard, Participant};
use crate::sync::{AtomicU64, Backoff, Ordering, plain};

/// One VM's MMU lock.
#[doc(alias = "mmu_lock")]
pub struct MmuLock {
    domain: Arc<EpochDomain>,
    /// 1 while an Exclusive holder exists or waits for sections to end.
    writer: AtomicU64,
    /// Shared acquisitions that had to wait for an Exclusive holder; a figure.
    contended: plain::AtomicU64,
}

impl MmuLock {
    /// A free lock over `domain`.
    #[must_use]
    pub fn new(domain: Arc<EpochDomain>) -> Self {
        Self { domain, writer: AtomicU64::new(0), contended: plain::AtomicU64::new(0) }
    }

    /// Open a Shared section.
    ///
    /// # Panics
    /// In debug builds, when `participant` belongs to another domain.
    #[inline(always)]
    pub fn shared<'p>(&self, participant: &'p mut Participant) -> Shared<'p> {
        debug_assert!(Arc::ptr_eq(&self.domain, participant.domain()), "another VM's participant");
        loop {
            participant.announce();
            // ORDERING[mmu-writer]: Acquire, after the fence of the announcement. Pairs with the
            // Release in `Exclusive::drop`; with the fence in `exclusive` it is the Dekker pair:
            // either we see the writer, or its drain sees our odd word.
            let free = self.writer.load(Ordering::Acquire) == 0;
            if free || crate::busted!("shared_beside_exclusive") {
                return Shared { epoch: EpochGuard::announced(participant) };
            }
            participant.retire();
            self.wait_for_writer();
        }
    }

    /// The same, measured: `before` is called before each wait for an Exclusive holder and `after`,
    /// with what `before` returned, behind it. A section that opens at once calls neither. Apart
    /// from [`shared`](Self::shared), whose instructions are counted.
    ///
    /// # Panics
    /// As [`shared`](Self::shared).
    pub fn shared_measured<'p>(
        &self,
        participant: &'p mut Participant,
        before: impl Fn() -> u64,
        after: impl Fn(u64),
    ) -> Shared<'p> {
        debug_assert!(Arc::ptr_eq(&self.domain, participant.domain()), "another VM's participant");
        loop {
            participant.announce();
            // ORDERING[mmu-writer]: Acquire. As in `shared`.
            if self.writer.load(Ordering::Acquire) == 0 {
                return Shared { epoch: EpochGuard::announced(participant) };
            }
            participant.retire();
            let start = before();
            self.wait_for_writer();
            after(start);
        }
    }

    #[cold]
    fn wait_for_writer(&self) {
        // ORDERING[lock-figure]: Relaxed. A figure that orders nothing; read in `contended`.
        self.contended.fetch_add(1, plain::Ordering::Relaxed);
        let mut backoff = Backoff::new();
        // ORDERING[mmu-writer]: Acquire. Pairs with the Release in `Exclusive::drop`.
        while self.writer.load(Ordering::Acquire) != 0 {
            backoff.wait(self.domain.give_up_cpu());
        }
    }

    /// Keep every Shared section out, waiting for those that are open.
    pub fn exclusive<'p>(&'p self, participant: &'p mut Participant) -> Exclusive<'p> {
        debug_assert!(Arc::ptr_eq(&self.domain, participant.domain()), "another VM's participant");
        let mut backoff = Backoff::new();
        // ORDERING[mmu-writer]: Acquire. Pairs with the Release in `Exclusive::drop`.
        while self.writer.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            backoff.wait(self.domain.give_up_cpu());
        }
        if !crate::busted!("exclusive_without_drain") {
            self.domain.drain(Some(participant.index()));
        }
        participant.announce();
        Exclusive { lock: self, epoch: EpochGuard::announced(participant) }
    }

    /// Is somebody holding or waiting for Exclusive? A hint for long Shared work to make a pause.
    #[inline]
    #[must_use]
    pub fn needs_break(&self) -> bool {
        // ORDERING[mmu-writer]: Relaxed. A hint; the pause itself orders.
        self.writer.load(Ordering::Relaxed) != 0
    }

    /// Shared acquisitions that found an Exclusive holder, since the start.
    #[must_use]
    pub fn contended(&self) -> u64 {
        // ORDERING[lock-figure]: Relaxed. A figure; pairs with the fetch_add in `wait_for_writer`.
        self.contended.load(plain::Ordering::Relaxed)
    }
}

impl fmt::Debug for MmuLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmuLock")
            .field("writer", &self.needs_break())
            .field("contended", &self.contended())
            .finish_non_exhaustive()
    }
}

/// A Shared section, which is an epoch section too.
///
/// Having a `Shared` tells you: no Exclusive holder exists, and an invalidation or root
/// invalidation that drains after this section was opened waits for its end. It does not tell you
/// that an entry stays what you read: other Shared holders and the CPU change entries, so only a
/// compare-exchange commits.
#[derive(Debug)]
#[must_use]
pub struct Shared<'p> {
    epoch: EpochGuard<'p>,
}

impl<'p> Shared<'p> {
    /// The epoch section this one is.
    #[inline]
    #[must_use]
    pub fn epoch(&self) -> &EpochGuard<'p> {
        &self.epoch
    }
}

/// The Exclusive lock, which is an epoch section too.
///
/// Having an `Exclusive` tells you: no Shared section is open. Epoch pins may be: agers and fast
/// faults go on, by compare-exchange.
#[derive(Debug)]
#[must_use]
pub struct Exclusive<'p> {
    lock: &'p MmuLock,
    epoch: EpochGuard<'p>,
}

impl<'p> Exclusive<'p> {
    /// The epoch section this one is.
    #[inline]
    #[must_use]
    pub fn epoch(&self) -> &EpochGuard<'p> {
        &self.epoch
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        // ORDERING[mmu-writer]: Release. Pairs with the Acquire loads in `shared` and `exclusive`.
        self.lock.writer.store(0, Ordering::Release);
    }
}

static_assertions::assert_not_impl_any!(Shared<'_>: Clone, Copy);
static_assertions::assert_not_impl_any!(Exclusive<'_>: Clone, Copy);

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::plain::AtomicU64 as Plain;

    #[test]
    fn exclusive_excludes_shared_and_exclusive() {
        let domain = EpochDomain::new(4, std::thread::yield_now).expect("in range");
        let lock = MmuLock::new(Arc::clone(&domain));
        let cell = Plain::new(0);
        std::thread::scope(|scope| {
            for writer in [true, true, false, false] {
                let mut own = domain.register().expect("room");
                let (lock, cell) = (&lock, &cell);
                scope.spawn(move || {
                    for _ in 0..5_000 {
                        if writer {
                            let _held = lock.exclusive(&mut own);
                            let before = cell.load(Ordering::Relaxed);
                            cell.store(before + 1, Ordering::Relaxed);
                        } else {
                            let _held = lock.shared(&mut own);
                            let first = cell.load(Ordering::Relaxed);
                            assert_eq!(first, cell.load(Ordering::Relaxed));
                        }
                    }
                });
            }
        });
        assert_eq!(cell.load(Ordering::Relaxed), 10_000, "no increment lost");
        assert!(!lock.needs_break());
    }

    #[test]
    fn pins_are_not_kept_out_by_exclusive() {
        let domain = EpochDomain::new(2, std::thread::yield_now).expect("in range");
        let lock = MmuLock::new(Arc::clone(&domain));
        let mut owner = domain.register().expect("room");
        let mut ager = domain.register().expect("room");
        let held = lock.exclusive(&mut owner);
        drop(ager.pin());
        drop(held);
    }
}
