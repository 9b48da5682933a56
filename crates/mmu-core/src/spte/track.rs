//! Accessed and dirty, with and without hardware.
//!
//! Owns the transitions between "used" and "not used": with hardware A/D they are bits; without,
//! an entry loses its permissions, which it keeps in bits 52, 54 and 62, and the fault that follows
//! tells of the access (KVM rows 1.5 to 1.7). Pure: aging and the fast fault path commit the
//! results by compare-exchange.

use super::format::{AD_TYPE, AdType, SpteFormat};
use super::{Spte, SpteConfig};

impl<F: SpteFormat> SpteConfig<F> {
    /// Present, and used since it was last [`age`](Self::age)d (KVM row 1.6)?
    #[inline]
    #[must_use]
    pub const fn is_accessed(&self, spte: Spte) -> bool {
        let both = F::ACCESSED | Spte::MMU_PRESENT;
        spte.raw() & both == both
    }

    /// Present, and of the type whose permissions are taken away to see accesses?
    #[inline]
    #[must_use]
    pub const fn is_ad_disabled(&self, spte: Spte) -> bool {
        spte.raw() & (AD_TYPE | Spte::MMU_PRESENT) == AdType::Disabled.bits() | Spte::MMU_PRESENT
    }

    /// Is it a leaf whose permissions were taken away to see the next access (KVM row 1.7)? The
    /// caller knows that `spte` is no table; tables always have permissions.
    #[doc(alias = "is_access_track_spte")]
    #[inline]
    #[must_use]
    pub const fn is_access_tracked(&self, spte: Spte) -> bool {
        self.is_ad_disabled(spte) && !spte.has(F::TRACK_SAVE)
    }

    /// The leaf as "not used": A clear; without hardware A/D also without permissions, R, X and XU
    /// saved, W not (a write must fault so that it is recorded). Idempotent; entries that are not
    /// present stay as they are. Never owes a flush (KVM row 0.2.4).
    #[doc(alias = "mark_spte_for_access_track")]
    #[inline]
    #[must_use]
    pub const fn age(&self, spte: Spte) -> Spte {
        if self.is_ad_disabled(spte) {
            self.track(spte)
        } else if spte.is_mmu_present() {
            spte.without(F::ACCESSED)
        } else {
            spte
        }
    }

    /// The table link as "not used": A clear, permissions untouched whatever the A/D type.
    #[inline]
    #[must_use]
    pub const fn age_table(&self, spte: Spte) -> Spte {
        if spte.is_mmu_present() { spte.without(F::ACCESSED) } else { spte }
    }

    /// Permissions saved and cleared. Only for entries of the type [`AdType::Disabled`].
    pub(super) const fn track(&self, spte: Spte) -> Spte {
        if self.is_access_tracked(spte) {
            return spte;
        }
        let saved = (spte.raw() & F::TRACK_SAVE) << F::TRACK_SHIFT;
        spte.without(F::TRACK_CLEAR | F::TRACK_SAVED | F::ACCESSED).with(saved)
    }

    /// The leaf with its saved permissions back in place, W excepted, and A as it was. An entry
    /// that is not access-tracked stays as it is.
    #[inline]
    #[must_use]
    pub const fn untrack(&self, spte: Spte) -> Spte {
        if !self.is_access_tracked(spte) {
            return spte;
        }
        let saved = (spte.raw() & F::TRACK_SAVED) >> F::TRACK_SHIFT;
        spte.without(F::TRACK_SAVED).with(saved)
    }

    /// The leaf as "used again": [`untrack`](Self::untrack)ed, and A set. An entry that is not
    /// access-tracked stays as it is.
    #[doc(alias = "restore_acc_track_spte")]
    #[inline]
    #[must_use]
    pub const fn restore(&self, spte: Spte) -> Spte {
        if self.is_access_tracked(spte) { self.untrack(spte).with(F::ACCESSED) } else { spte }
    }

    /// Present, and perhaps written since it was last [`clear_dirty`](Self::clear_dirty)ed. D; and
    /// W where no hardware sets D, because the fast fault path grants W without setting D.
    #[inline]
    #[must_use]
    pub const fn is_dirty(&self, spte: Spte) -> bool {
        if self.is_ad_disabled(spte) {
            spte.has(F::DIRTY | F::WRITABLE)
        } else {
            spte.is_mmu_present() && spte.has(F::DIRTY)
        }
    }

    /// The leaf so that its next write is noticed: D clear, and W too where D is not what dirty
    /// tracking uses (KVM row 1.5). Entries that are not present stay as they are. The flush may
    /// be deferred to the end of the pass (KVM rows 0.2.2 and 0.2.3).
    #[inline]
    #[must_use]
    pub const fn clear_dirty(&self, spte: Spte) -> Spte {
        if !spte.is_mmu_present() {
            spte
        } else if spte.has(AD_TYPE) {
            spte.without(F::DIRTY | F::WRITABLE)
        } else {
            spte.without(F::DIRTY)
        }
    }
}
