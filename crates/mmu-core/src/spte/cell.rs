//! The atomic entry cell: the only place where table memory is read or written.
//!
//! Owns [`SpteCell`]. Reading yields a [`Spte`] snapshot; hardware and other threads may change the
//! cell at any time, so only a compare-exchange (or an exchange whose old value is accounted for)
//! commits. There is no read-modify-store. In `tdp-mmu` the module `change` is the only caller of
//! the mutators.

use super::Spte;
use crate::lock::Exclusive;
use crate::sync::{AtomicU64, Ordering};

/// One entry of a table page.
#[cfg_attr(not(loom), derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout))]
#[repr(transparent)]
#[derive(Debug)]
pub struct SpteCell(AtomicU64);

// A live entry is never a value that can be copied or viewed as plain bytes.
static_assertions::assert_not_impl_any!(SpteCell: Clone, Copy, zerocopy::Immutable);

impl SpteCell {
    /// A cell that holds `spte`. For tables that are made, not for tables in use.
    #[must_use]
    pub fn new(spte: Spte) -> Self {
        Self(AtomicU64::new(spte.raw()))
    }

    /// What the cell holds now.
    #[inline]
    #[must_use]
    pub fn load(&self) -> Spte {
        // ORDERING[publish-table]: Acquire. Pairs with the Release of `try_change`, `exchange` and
        // `store`: following a link finds the child's entries initialised.
        Spte::from_raw(self.0.load(Ordering::Acquire))
    }

    /// What the cell holds now, for scans that do not follow links (aging, harvest).
    #[inline]
    #[must_use]
    pub fn peek(&self) -> Spte {
        // ORDERING[scan]: Relaxed. Nothing is reached through the value; a change is committed by
        // `try_change`, which orders. Pairs with any writer of the cell.
        Spte::from_raw(self.0.load(Ordering::Relaxed))
    }

    /// Replace `old` by `new` if the cell still holds exactly `old`.
    ///
    /// # Errors
    /// What the cell holds instead; nothing was written (KVM row 3.9).
    #[inline]
    pub fn try_change(&self, old: Spte, new: Spte) -> Result<(), Spte> {
        if crate::busted!("store_instead_of_cmpxchg") {
            // ORDERING[publish-table]: Acquire. The breakage's read.
            let now = self.0.load(Ordering::Acquire);
            if now != old.raw() {
                return Err(Spte::from_raw(now));
            }
            // ORDERING[publish-table]: Release. The breakage's store: loses what came in between.
            self.0.store(new.raw(), Ordering::Release);
            return Ok(());
        }
        // ORDERING[scan]: what a scan saw with `peek` is compared and committed here.
        // ORDERING[publish-table]: AcqRel. Release pairs with the Acquire in `load`: a child table
        // is initialised before it is linked. Acquire: the lost value may be a link to follow.
        self.0
            .compare_exchange(old.raw(), new.raw(), Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
            .map_err(Spte::from_raw)
    }

    /// Put `new` in, whatever is there; the caller accounts for the value returned.
    #[inline]
    #[must_use]
    pub fn exchange(&self, new: Spte) -> Spte {
        // ORDERING[publish-table]: AcqRel. As `try_change`.
        Spte::from_raw(self.0.swap(new.raw(), Ordering::AcqRel))
    }

    /// Fill an entry of a table that nobody else can reach yet. The link that publishes the table
    /// orders this store.
    #[inline]
    pub fn init(&self, spte: Spte) {
        // ORDERING[publish-table]: Relaxed. Published by the Release of the link.
        self.0.store(spte.raw(), Ordering::Relaxed);
    }

    /// Plain store under the Exclusive lock. The old value must have no bit that the CPU, an ager
    /// or a fast fault may change at this moment (`needs_atomic_update`, KVM row 1.11); otherwise
    /// use [`exchange`](Self::exchange).
    #[inline]
    pub fn store(&self, _lock: &Exclusive<'_>, spte: Spte) {
        // ORDERING[publish-table]: Release. Pairs with the Acquire in `load`.
        self.0.store(spte.raw(), Ordering::Release);
    }
}
