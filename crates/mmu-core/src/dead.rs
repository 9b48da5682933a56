//! A VM that cannot go on (KVM row 0.1.8).
//!
//! Owns [`DeadReason`] and the word that holds it. What cannot be, a hypervisor must not answer
//! with a crash that takes other guests along: the VM is marked, its faults end in an error from
//! then on, and everything else goes on as well as it can, so that its memory comes back. The mark
//! is one-way and the first reason stays.

use core::fmt;

use crate::sync::plain::{AtomicU64, Ordering};

/// Something that cannot be, and was. The guest may already have seen wrong memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeadReason {
    /// An entry in our tables that we did not make.
    CorruptEntry,
    /// An entry was changed into one that it may not become (found with feature `prove`; debug
    /// builds panic).
    IllegalChange,
    /// A page was taken away, and an external table kept it.
    ExternalTable,
    /// The embedder found that it cannot go on.
    Embedder,
}

impl DeadReason {
    const ALL: [Self; 4] =
        [Self::CorruptEntry, Self::IllegalChange, Self::Embedder, Self::ExternalTable];

    /// Not 0, which is "alive".
    const fn code(self) -> u64 {
        match self {
            Self::CorruptEntry => 1,
            Self::IllegalChange => 2,
            Self::Embedder => 3,
            Self::ExternalTable => 4,
        }
    }
}

impl fmt::Display for DeadReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CorruptEntry => "an entry in its tables is not one of ours",
            Self::IllegalChange => "an entry was changed into one that it may not become",
            Self::ExternalTable => "an external table kept a page that was taken away",
            Self::Embedder => "the embedder gave it up",
        })
    }
}

/// The mark.
#[derive(Debug, Default)]
pub(crate) struct Dead(AtomicU64);

impl Dead {
    pub(crate) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    #[cold]
    pub(crate) fn mark(&self, reason: DeadReason) {
        let code = reason.code();
        // ORDERING[vm-dead]: Relaxed. The first reason stays; nothing is read because of it. Pairs
        // with the load in `get`.
        let _ = self.0.compare_exchange(0, code, Ordering::Relaxed, Ordering::Relaxed);
    }

    #[inline(always)]
    pub(crate) fn get(&self) -> Option<DeadReason> {
        // ORDERING[vm-dead]: Relaxed. A fault that misses the mark is one that came before it.
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            code => Self::decode(code),
        }
    }

    #[cold]
    fn decode(code: u64) -> Option<DeadReason> {
        DeadReason::ALL.into_iter().find(|reason| reason.code() == code)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        for first in DeadReason::ALL {
            let dead = Dead::new();
            assert_eq!(dead.get(), None);
            dead.mark(first);
            for later in DeadReason::ALL {
                dead.mark(later);
                assert_eq!(dead.get(), Some(first));
            }
        }
    }
}
