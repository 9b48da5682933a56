//! Events of an MMU, for those who want to watch (KVM row 3.60).
//!
//! Owns [`Trace`], which every embedder implements (an empty `impl` will do), and [`Event`]. With
//! [`Trace::ENABLED`] false, the default, no event is put together and no clock is read: the calls
//! vanish at compile time.

use crate::addr::{Gfn, Level};

/// Something that happened. Values are those of the moment; others may have changed them since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A huge leaf became a table of leaves one level lower.
    Split {
        /// First gfn of the huge leaf.
        gfn: Gfn,
        /// Level it stood at.
        level: Level,
    },
    /// A table gave way to a huge leaf.
    Collapse {
        /// First gfn of the huge leaf.
        gfn: Gfn,
        /// Level it stands at.
        level: Level,
    },
}

/// Receives the events of a VM.
///
/// Called on the thread that caused the event, often inside a section: it must not wait, must not
/// enter the MMU again, and should be short.
pub trait Trace {
    /// Are events wanted? A constant, so that those who say no pay nothing.
    const ENABLED: bool = false;

    /// An event. Called only if [`ENABLED`](Self::ENABLED).
    #[inline(always)]
    fn event(&self, event: &Event) {
        let _ = event;
    }

    /// A clock in nanoseconds, for waits and stalls. Read only if [`ENABLED`](Self::ENABLED).
    #[inline(always)]
    fn now(&self) -> u64 {
        0
    }
}
