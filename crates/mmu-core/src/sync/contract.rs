//! Locks and sections by their contract, for models of what is built on them.
//!
//! The spin lock, the MMU lock's drain, the epoch and invalidations have exhaustive models of their
//! own. Where every interleaving of theirs is multiplied by those of an operation on tables,
//! exploration does not end. There a model calls [`set`], and what is made from then on promises
//! the same by loom's own mutex: a lock is one, a section holds its participant's, and a drain
//! takes each participant's in turn, which is to wait for the section that is open.

use core::cell::Cell;

use loom::sync::{Mutex, MutexGuard};

std::thread_local! {
    /// A model runs on one thread of the system.
    static BY_CONTRACT: Cell<bool> = const { Cell::new(false) };
}

/// Make locks and sections by contract, or as they ship, in models run by the calling thread.
pub fn set(by_contract: bool) {
    BY_CONTRACT.set(by_contract);
}

/// A mutex where the model is by contract, nothing where it is of the shipped code.
#[derive(Debug)]
pub(crate) struct Contract(Option<Mutex<()>>);

/// Holds the mutex of a [`Contract`], if it has one.
pub(crate) type Held<'a> = Option<MutexGuard<'a, ()>>;

impl Contract {
    pub(crate) fn new() -> Self {
        Self(BY_CONTRACT.get().then(|| Mutex::new(())))
    }

    /// Is it there?
    pub(crate) fn applies(&self) -> bool {
        self.0.is_some()
    }

    /// Wait for it and hold it.
    pub(crate) fn hold(&self) -> Held<'_> {
        self.0.as_ref().and_then(|mutex| mutex.lock().ok())
    }

    /// Hold it if nobody does.
    pub(crate) fn try_hold(&self) -> Held<'_> {
        self.0.as_ref().and_then(|mutex| mutex.try_lock().ok())
    }
}
