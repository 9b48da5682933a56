//! Epochs: who may still be looking.
//!
//! Owns [`EpochDomain`], one per VM, and [`Participant`], one per thread that uses the MMU. A
//! participant announces itself in one word of its own ([`Participant::pin`]): odd while inside,
//! one higher at every entry and exit. Nobody else writes that word, so a pin costs one store and
//! one full barrier and touches no cache line that another vCPU's pin writes.
//!
//! The same announcement serves three waits, all of which look at the odd values present after a
//! full barrier and need those, and only those, to change:
//! - [`Participant::synchronize`]: everything unpublished before the call is unreachable after it;
//! - the drain of [`crate::lock`] and [`crate::notify`];
//! - [`grace`]: the same without waiting, for frames that are given back later.
//!
//! Neighbours: `publish` (a value readers see through a pin), `lock` (Shared and Exclusive),
//! `frame::pool` (who waits for grace periods).
//!
//! The Dekker pair that everything rests on, tag `epoch-dekker`: the reader stores its word,
//! fences, then reads what is published; the waiter publishes, fences, then reads the words. In
//! every interleaving at least one of the two sees the other.

pub mod grace;
pub mod publish;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

#[cfg(loom)]
use crate::sync::contract::{Contract, Held};
use crate::sync::{AtomicU64, Backoff, Ordering, fence, load_own, plain};

/// Most participants a domain may have. Drains scan this many words at worst.
pub const MAX_PARTICIPANTS: usize = 4096;

/// One participant's announcement. Two cache lines, so that adjacent-line prefetch does not couple
/// neighbours.
#[repr(align(128))]
struct Record {
    /// Odd while its owner is inside a section. Written by its owner only.
    word: AtomicU64,
    /// 1 while a [`Participant`] owns the record. Changed only by register and drop.
    claimed: AtomicU64,
    /// The word as the running grace period saw it. Protected by the lock that owns the
    /// [`grace::Grace`].
    seen: plain::AtomicU64,
    /// Held by the section, in models that have sections by contract.
    #[cfg(loom)]
    contract: Contract,
}

impl Record {
    fn new() -> Self {
        Self {
            word: AtomicU64::new(0),
            claimed: AtomicU64::new(0),
            seen: plain::AtomicU64::new(0),
            #[cfg(loom)]
            contract: Contract::new(),
        }
    }
}

/// What an embedder may do instead of spinning, such as yielding to the scheduler. Called with no
/// lock held except where a lock's documentation says so.
pub type GiveUpCpu = fn();

/// All participants of one VM.
pub struct EpochDomain {
    records: Vec<Record>,
    /// One past the highest record ever claimed: how far waiters scan.
    high: AtomicU64,
    give_up_cpu: GiveUpCpu,
    /// 1 once a pool counts its grace periods here; a second one would overwrite its notes.
    pools: plain::AtomicU64,
}

impl EpochDomain {
    /// A domain for up to `capacity` participants. `give_up_cpu` is called when a wait lasts
    /// longer than a section should; [`crate::sync::relax`] is right on bare metal,
    /// `std::thread::yield_now` in a process.
    ///
    /// # Errors
    /// [`EpochError::Capacity`] for 0 or more than [`MAX_PARTICIPANTS`]; [`EpochError::NoMemory`]
    /// when the records (128 bytes each) cannot be allocated.
    pub fn new(capacity: usize, give_up_cpu: GiveUpCpu) -> Result<Arc<Self>, EpochError> {
        if capacity == 0 || capacity > MAX_PARTICIPANTS {
            return Err(EpochError::Capacity { asked: capacity, max: MAX_PARTICIPANTS });
        }
        let mut records = Vec::new();
        records.try_reserve_exact(capacity).map_err(|_| EpochError::NoMemory { capacity })?;
        records.resize_with(capacity, Record::new);
        Ok(Arc::new(Self {
            records,
            high: AtomicU64::new(0),
            give_up_cpu,
            pools: plain::AtomicU64::new(0),
        }))
    }

    /// Participants that may exist at once.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.records.len()
    }

    /// Become a participant.
    ///
    /// # Errors
    /// [`EpochError::Full`] when every record is taken.
    pub fn register(self: &Arc<Self>) -> Result<Participant, EpochError> {
        for (index, record) in self.records.iter().enumerate() {
            // ORDERING[epoch-claim]: Acquire. Pairs with the Release in `Participant::drop`: the
            // former owner's last word is ours to go on from.
            let claim = record.claimed.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed);
            if claim.is_ok() {
                let scanned = crate::addr::to_u64(index + 1);
                // ORDERING[epoch-high]: AcqRel, before any pin of this participant. Pairs with the
                // load in `scan` through the fences of `epoch-dekker`.
                if !crate::busted!("register_uncounted") {
                    self.high.fetch_max(scanned, Ordering::AcqRel);
                }
                return Ok(Participant { domain: Arc::clone(self), index });
            }
        }
        Err(EpochError::Full { capacity: self.records.len() })
    }

    /// The records a waiter must look at. Call after the full barrier.
    fn scan(&self) -> impl Iterator<Item = (usize, &Record)> {
        // ORDERING[epoch-high]: Acquire. Pairs with the fetch_max in `register`: a participant not
        // counted here pins after our fence and sees what was published before it.
        let high = crate::addr::to_index(self.high.load(Ordering::Acquire));
        self.records.iter().enumerate().take(high)
    }

    /// Wait until every section that was open at the call has ended, except `own`'s. Sections
    /// opened later are not waited for. What the caller wrote before the call is seen by them.
    pub(crate) fn drain(&self, own: Option<usize>) {
        if !crate::busted!("drain_without_fence") {
            // ORDERING[epoch-dekker]: SeqCst fence. Pairs with that in `Participant::announce`: a
            // section whose odd word we miss below began after it and sees what we published.
            fence(Ordering::SeqCst);
        }
        for (index, record) in self.scan() {
            if Some(index) == own {
                continue;
            }
            #[cfg(loom)]
            if record.contract.applies() {
                drop(record.contract.hold());
                continue;
            }
            // ORDERING[epoch-exit]: Acquire. Pairs with the Release in `Participant::retire`:
            // what the section did happens before what follows the drain.
            let seen = record.word.load(Ordering::Acquire);
            if seen & 1 == 0 {
                continue;
            }
            let mut backoff = Backoff::new();
            // ORDERING[epoch-exit]: Acquire. As above.
            while record.word.load(Ordering::Acquire) == seen {
                backoff.wait(self.give_up_cpu);
            }
        }
    }

    /// Sections open right now; a figure for people, stale when it is read.
    #[must_use]
    pub fn open_sections(&self) -> usize {
        // ORDERING[epoch-exit]: Acquire, though nothing depends on it: a figure.
        self.scan().filter(|(_, r)| r.word.load(Ordering::Acquire) & 1 == 1).count()
    }

    /// Take the domain's one right to count grace periods; `false` when it is taken.
    pub(crate) fn claim_grace(&self) -> bool {
        // ORDERING[grace-claim]: Relaxed. Decides which of two pools may exist, orders nothing.
        self.pools.swap(1, plain::Ordering::Relaxed) == 0
    }

    /// Give the right back: the pool is gone.
    pub(crate) fn unclaim_grace(&self) {
        // ORDERING[grace-claim]: Relaxed. As above.
        self.pools.store(0, plain::Ordering::Relaxed);
    }

    pub(crate) fn give_up_cpu(&self) -> GiveUpCpu {
        self.give_up_cpu
    }
}

impl fmt::Debug for EpochDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EpochDomain")
            .field("capacity", &self.records.len())
            .field("open_sections", &self.open_sections())
            .finish()
    }
}

/// A thread's membership in a domain.
///
/// Having a `Participant` tells you: nobody else announces through its record; borrowing it
/// mutably (as [`pin`](Self::pin) and [`synchronize`](Self::synchronize) do) proves that this
/// thread has no section open through it, so waiting cannot wait for oneself.
#[derive(Debug)]
pub struct Participant {
    domain: Arc<EpochDomain>,
    index: usize,
}

impl Participant {
    /// The domain.
    #[inline]
    #[must_use]
    pub fn domain(&self) -> &Arc<EpochDomain> {
        &self.domain
    }

    /// Number of its record, below the domain's capacity. Also indexes per-thread statistics.
    #[inline]
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Enter a section: nothing reachable now is given back before the guard drops.
    #[inline]
    pub fn pin(&mut self) -> EpochGuard<'_> {
        self.announce();
        EpochGuard::announced(self)
    }

    /// Wait until every section of other participants that is open now has ended.
    pub fn synchronize(&mut self) {
        self.domain.drain(Some(self.index));
    }

    #[inline]
    fn record(&self) -> &Record {
        #[expect(clippy::indexing_slicing, reason = "register handed out this index")]
        &self.domain.records[self.index]
    }

    /// Open a section. Ends with [`retire`](Self::retire).
    #[inline(always)]
    pub(crate) fn announce(&self) {
        #[cfg(loom)]
        if self.record().contract.applies() {
            return;
        }
        let word = &self.record().word;
        // ORDERING[epoch-own]: Relaxed. Only this thread writes the word; pairs with the stores
        // below and in `retire`.
        let value = load_own(word);
        // Odd already: a guard was leaked. What it protected cannot be borrowed any more (we hold
        // the participant), so that section ends here and the next one begins.
        let open = value.wrapping_add(1) | 1;
        if crate::busted!("announce_relaxed") {
            // ORDERING[epoch-exit]: Relaxed. The breakage: says nothing of the former section.
            word.store(open, Ordering::Relaxed);
        } else {
            // ORDERING[epoch-exit]: Release. Pairs with the Acquire loads of waiters: one that
            // waits for our former section may miss the value that ended it and read this one.
            word.store(open, Ordering::Release);
        }
        // ORDERING[epoch-dekker]: SeqCst fence. Pairs with the fence in `EpochDomain::drain` and
        // `Grace::start`: either they see our odd word, or we see what they published.
        fence(Ordering::SeqCst);
    }

    /// Close the section.
    #[inline(always)]
    pub(crate) fn retire(&self) {
        #[cfg(loom)]
        if self.record().contract.applies() {
            return;
        }
        let word = &self.record().word;
        // ORDERING[epoch-own]: Relaxed. Only this thread writes the word.
        let value = load_own(word);
        // ORDERING[epoch-exit]: Release. Pairs with the Acquire loads of waiters: our reads and
        // writes inside the section are over before they go on.
        word.store(value.wrapping_add(1), Ordering::Release);
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        // ORDERING[epoch-own]: Relaxed. Only this thread writes the word.
        if load_own(&self.record().word) & 1 == 1 {
            // A leaked guard would hold up every drain for ever.
            self.retire();
        }
        // ORDERING[epoch-claim]: Release. Pairs with the Acquire in `EpochDomain::register`.
        self.record().claimed.store(0, Ordering::Release);
    }
}

/// An open section.
///
/// Having an `&'g EpochGuard` tells you: tables, slots and roots reached through it stay what they
/// are for `'g`. It does not tell you that they are still linked, nor that the MMU lock is held.
#[derive(Debug)]
pub struct EpochGuard<'p> {
    participant: &'p Participant,
    #[cfg(loom)]
    held: Held<'p>,
}

impl<'p> EpochGuard<'p> {
    /// A guard for a section that the caller announced and will retire when this one drops.
    #[inline]
    pub(crate) fn announced(participant: &'p Participant) -> Self {
        Self {
            participant,
            #[cfg(loom)]
            held: participant.record().contract.hold(),
        }
    }

    /// The participant that opened the section.
    #[inline]
    #[must_use]
    pub fn participant(&self) -> &Participant {
        self.participant
    }
}

impl Drop for EpochGuard<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        #[cfg(loom)]
        drop(self.held.take());
        self.participant.retire();
    }
}

/// A domain could not be made or joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EpochError {
    /// A capacity of 0 or beyond the maximum.
    Capacity {
        /// Participants asked for.
        asked: usize,
        /// [`MAX_PARTICIPANTS`].
        max: usize,
    },
    /// The records cannot be allocated.
    NoMemory {
        /// Participants asked for.
        capacity: usize,
    },
    /// Every record is taken; drop a participant or make the domain larger.
    Full {
        /// Participants the domain was made for.
        capacity: usize,
    },
}

impl fmt::Display for EpochError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Capacity { asked, max } => {
                write!(f, "a domain of {asked} participants: must be 1 to {max}")
            }
            Self::NoMemory { capacity } => {
                write!(f, "no memory for the records of {capacity} participants")
            }
            Self::Full { capacity } => {
                write!(f, "all {capacity} participants of the domain are registered")
            }
        }
    }
}

impl core::error::Error for EpochError {}

#[cfg(all(test, not(loom)))]
mod tests;
