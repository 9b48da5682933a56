//! What a slot carries besides its geometry.
//!
//! Owns [`SlotMeta`], which a set keeps beside the slots themselves, so that a [`Memslot`] stays a
//! plain value that a fault copies. The parts are shared between sets: a change of the slots copies
//! pointers, and whoever has a copy of a set may go on using its parts.
//!
//! [`Memslot`]: super::Memslot

use alloc::sync::Arc;

use super::log::DirtyLog;

/// The parts of a slot that are not plain values. Empty for most slots.
#[derive(Clone, Debug, Default)]
pub struct SlotMeta {
    log: Option<Arc<DirtyLog>>,
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
        Self { log }
    }

    /// Nothing there?
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.log.is_none()
    }
}

/// The same parts, not merely equal ones.
impl PartialEq for SlotMeta {
    fn eq(&self, other: &Self) -> bool {
        match (&self.log, &other.log) {
            (Some(mine), Some(theirs)) => Arc::ptr_eq(mine, theirs),
            (None, None) => true,
            _ => false,
        }
    }
}

impl Eq for SlotMeta {}
