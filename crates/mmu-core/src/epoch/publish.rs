//! Values that appear while readers look: replaced under a pin, or set once.
//!
//! Owns [`Published`]: two buffers and the index of the live one. Readers borrow the live buffer
//! for as long as their pin; the writer changes the other one, publishes it and waits for a grace
//! period before it may touch the buffer that was live. No allocation happens at publication.
//! And [`SetOnce`]: a place that is filled at most once and never changes again, so that reading it
//! needs no pin.
//!
//! UNSAFETY: this file, `frame/raw.rs` and `frame/arena.rs` are the only ones that use `unsafe`.
//! Here it is the shared borrow of a buffer that a writer will borrow mutably later; the epoch
//! keeps the two apart. And the one write to a place that nobody may read before it is over; a
//! state word keeps those apart.

use alloc::sync::Arc;
use core::fmt;

use super::{EpochDomain, EpochGuard, Participant};
use crate::addr::to_index;
use crate::sync::{AtomicU64, Ordering, load_own, relax};

#[cfg(not(loom))]
use core::cell::UnsafeCell;
#[cfg(loom)]
use loom::cell::UnsafeCell;

/// Double-buffered value: see the file's head.
pub struct Published<T> {
    domain: Arc<EpochDomain>,
    buffers: [UnsafeCell<T>; 2],
    /// 0 or 1: the buffer that readers borrow.
    live: AtomicU64,
}

// SAFETY: readers on any thread get `&T` (needs `T: Sync`); the one writer, on any thread, gets
// `&mut T` of the buffer that no reader holds (needs `T: Send`). See `read` and `Writer::spare`.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

impl<T> Published<T> {
    /// Publish `live`; `spare` is what the writer finds in the other buffer.
    ///
    /// The second value is the only writer there will ever be.
    #[must_use]
    pub fn new(domain: Arc<EpochDomain>, live: T, spare: T) -> (Arc<Self>, Writer<T>) {
        let buffers = [UnsafeCell::new(live), UnsafeCell::new(spare)];
        let shared = Arc::new(Self { domain, buffers, live: AtomicU64::new(0) });
        (Arc::clone(&shared), Writer { shared, settled: true })
    }

    /// Borrow the live value for as long as the section stays open.
    ///
    /// # Panics
    /// When `guard` belongs to another domain: its section would keep nobody from reusing the
    /// buffer.
    #[inline]
    pub fn read<'g>(&'g self, guard: &'g EpochGuard<'_>) -> &'g T {
        assert!(
            core::ptr::eq(Arc::as_ptr(&self.domain), Arc::as_ptr(guard.participant().domain())),
            "pinned in another domain"
        );
        // ORDERING[publish-index]: Acquire. Pairs with the Release in `Writer::publish`: the
        // buffer's content is complete.
        let index = to_index(self.live.load(Ordering::Acquire)) & 1;
        #[expect(clippy::indexing_slicing, reason = "masked to 0 or 1")]
        let cell = &self.buffers[index];
        let pointer = pointer_to(cell);
        // SAFETY: shared borrow of a live buffer.
        //   - valid: the buffer is a field of `self`, which outlives `'g`.
        //   - no `&mut`: `Writer::spare` borrows only the buffer that is not live, and
        //     `Writer::publish` waits, after this one stops being live, until every section that
        //     was open then has ended. `guard` keeps ours open for all of `'g`, and the assertion
        //     above says that the wait covers it.
        unsafe { &*pointer }
    }
}

/// The cell's pointer. Under loom this goes through its tracked access, which reports a racing
/// writer at the moment of the call.
#[inline]
fn pointer_to<T>(cell: &UnsafeCell<T>) -> *const T {
    #[cfg(not(loom))]
    return cell.get();
    #[cfg(loom)]
    return cell.with(|pointer| pointer);
}

impl<T> fmt::Debug for Published<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Published").finish_non_exhaustive()
    }
}

/// The only writer of a [`Published`].
///
/// Having a `Writer` tells you: nobody else changes the value, and the spare buffer has no reader.
pub struct Writer<T> {
    shared: Arc<Published<T>>,
    /// Has every reader of the spare buffer left? False only after a panic inside `publish`.
    settled: bool,
}

impl<T> Writer<T> {
    /// The live value, which only this writer can replace.
    #[must_use]
    pub fn live(&self) -> &T {
        // ORDERING[publish-index]: Relaxed. Only this writer changes it.
        let index = to_index(load_own(&self.shared.live)) & 1;
        #[expect(clippy::indexing_slicing, reason = "masked to 0 or 1")]
        let pointer = pointer_to(&self.shared.buffers[index]);
        // SAFETY: shared borrow of the live buffer for the borrow of `self`; only `spare` and
        // `publish` make `&mut`s or change which buffer is live, and they need `&mut self`.
        unsafe { &*pointer }
    }

    /// The buffer that readers do not see, to be made into the next value.
    pub fn spare(&mut self) -> &mut T {
        self.both().1
    }

    /// The live value and the spare buffer at once.
    ///
    /// # Panics
    /// When a callback panicked inside the latest publication: the spare buffer may have readers
    /// until [`publish`](Self::publish) is called again.
    pub fn both(&mut self) -> (&T, &mut T) {
        assert!(self.settled, "a publication was cut short by a panic");
        // ORDERING[publish-index]: Relaxed. Only this writer changes it.
        let index = to_index(load_own(&self.shared.live)) & 1;
        #[expect(clippy::indexing_slicing, reason = "0 or 1")]
        let cell = &self.shared.buffers[1 - index];
        #[cfg(not(loom))]
        let pointer = cell.get();
        #[cfg(loom)]
        let pointer = cell.with_mut(|pointer| pointer);
        // SAFETY: exclusive borrow of the buffer that is not live.
        //   - no reader: it was live last before the latest `publish`, which returned only after
        //     every section that could have borrowed it had ended; later readers see the other.
        //     A `publish` that a panic cut short left `settled` false, which was asserted.
        //   - no other `&mut`: this is the only writer, borrowed mutably.
        let spare = unsafe { &mut *pointer };
        #[expect(clippy::indexing_slicing, reason = "masked to 0 or 1")]
        let live = pointer_to(&self.shared.buffers[index]);
        // SAFETY: as in `live`; it is the other element of the array, so the two do not overlap.
        (unsafe { &*live }, spare)
    }

    /// Make the spare buffer live and wait until nobody reads the former one.
    ///
    /// # Panics
    /// When `participant` belongs to another domain.
    pub fn publish(&mut self, participant: &mut Participant) {
        self.publish_at(participant, |swap| swap());
    }

    /// The same, with `moment` choosing when the swap happens: it must call what it is given.
    ///
    /// # Panics
    /// As [`publish`](Self::publish).
    pub fn publish_at(
        &mut self,
        participant: &mut Participant,
        moment: impl FnOnce(&mut dyn FnMut()),
    ) {
        assert!(
            core::ptr::eq(Arc::as_ptr(&self.shared.domain), Arc::as_ptr(participant.domain())),
            "participant of another domain"
        );
        // ORDERING[publish-index]: Relaxed. Only this writer changes it.
        let index = load_own(&self.shared.live);
        self.settled = false;
        moment(&mut || {
            // ORDERING[publish-index]: Release. Pairs with the Acquire in `Published::read`.
            // Publishes: everything written through `spare`.
            self.shared.live.store(1 - (index & 1), Ordering::Release);
        });
        if !crate::busted!("publish_without_grace") {
            participant.synchronize();
        }
        self.settled = true;
    }
}

impl<T> fmt::Debug for Writer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

/// Nobody has set it.
const EMPTY: u64 = 0;
/// Somebody is moving a value in.
const FILLING: u64 = 1;
/// The value is there for good.
const FULL: u64 = 2;

/// A place for a value that comes later, once, from whichever thread needs it first.
///
/// Having a reference out of it tells you: the value stays where it is, unchanged, as long as the
/// place lives.
pub struct SetOnce<T> {
    state: AtomicU64,
    value: UnsafeCell<Option<T>>,
}

// SAFETY: readers on any thread get `&T` (needs `T: Sync`) of a value that another thread may have
// moved in (needs `T: Send`). The one write happens while `FILLING`, when nobody reads.
unsafe impl<T: Send + Sync> Sync for SetOnce<T> {}

impl<T> SetOnce<T> {
    /// An empty place.
    #[must_use]
    pub fn new() -> Self {
        Self { state: AtomicU64::new(EMPTY), value: UnsafeCell::new(None) }
    }

    /// The value, once it is there.
    #[inline]
    #[must_use]
    pub fn get(&self) -> Option<&T> {
        // ORDERING[set-once]: Acquire. Pairs with the Release in `get_or_set`: the value is
        // complete.
        if self.state.load(Ordering::Acquire) != FULL {
            return None;
        }
        let pointer = pointer_to(&self.value);
        // SAFETY: shared borrow of the value.
        //   - valid: it is a field of `self`, which outlives the borrow.
        //   - no `&mut`: the only write comes before `FULL`, and `FULL` is the last state.
        let value = unsafe { &*pointer };
        value.as_ref()
    }

    /// The value: what is there, or else `value`, which is dropped if somebody else was first.
    ///
    /// Waits for another thread that is moving its value in at this moment: some instructions,
    /// unless that thread is preempted.
    pub fn get_or_set(&self, value: T) -> &T {
        // ORDERING[set-once]: Relaxed. Decides who writes; nobody has written before.
        let claim =
            self.state.compare_exchange(EMPTY, FILLING, Ordering::Relaxed, Ordering::Relaxed);
        if claim.is_ok() {
            #[cfg(not(loom))]
            let pointer = self.value.get();
            #[cfg(loom)]
            let pointer = self.value.with_mut(|pointer| pointer);
            // SAFETY: the one write.
            //   - no reader: `get` reads only after `FULL`, which is stored below.
            //   - no other writer: of all exchanges of `EMPTY` one succeeds, and nothing stores
            //     `EMPTY` again.
            let place = unsafe { &mut *pointer };
            *place = Some(value);
            // ORDERING[set-once]: Release. Pairs with the Acquire in `get`.
            self.state.store(FULL, Ordering::Release);
        }
        loop {
            if let Some(value) = self.get() {
                return value;
            }
            relax();
        }
    }
}

impl<T> Default for SetOnce<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: fmt::Debug> fmt::Debug for SetOnce<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SetOnce").field(&self.get()).finish()
    }
}
