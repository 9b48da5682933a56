//! What a slot carries besides its geometry.
//!
//! Owns [`SlotMeta`], which a set keeps beside the slots themselves, so that a [`Memslot`] stays a
//! plain value that a fault copies. The parts are shared between sets: a change of the slots copies
//! pointers, and whoever has a copy of a set may go on using its parts.
//!
//! [`Memslot`]: super::Memslot

use alloc::sync::Arc;

use super::log::DirtyLog;
use super::track::PageTrack;

/// The parts of a slot that are not plain values. Empty for most slots.
#[derive(Clone, Debug, Default)]
pub struct SlotMeta {
    log: Option<Arc<DirtyLog>>,
    track: Option<Arc<PageTrack>>,
}

impl SlotMeta {
    /// The dirty log; `None` when writes are not logged.
    #[inline]
    #[must_use]
    pub fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref()
    }

    /// The same with another log.
    #[must_use]
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Self {
        Self { log, track: self.track.clone() }
    }

    /// The write-track counts; `None` where the VM tracks no pages.
    #[inline]
    #[must_use]
    pub fn track(&self) -> Option<&Arc<PageTrack>> {
        self.track.as_ref()
    }

    /// The same with other write-track counts.
    #[must_use]
    pub fn with_track(&self, track: Option<Arc<PageTrack>>) -> Self {
        Self { log: self.log.clone(), track }
    }

    /// Nothing there?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.log.is_none() && self.track.is_none()
    }
}

/// The same parts, not merely equal ones.
impl PartialEq for SlotMeta {
    fn eq(&self, other: &Self) -> bool {
        same(&self.log, &other.log) && same(&self.track, &other.track)
    }
}

fn same<T>(mine: &Option<Arc<T>>, theirs: &Option<Arc<T>>) -> bool {
    match (mine, theirs) {
        (Some(mine), Some(theirs)) => Arc::ptr_eq(mine, theirs),
        (None, None) => true,
        _ => false,
    }
}

impl Eq for SlotMeta {}
