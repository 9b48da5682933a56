//! What an entry allows, and what follows from a change of it.
//!
//! Owns the predicates that the fault path, the setters and the dirty log ask of an entry (KVM
//! rows 1.10 to 1.12). Pure and cheap: each is a few mask operations.

use super::bits::when;
use super::format::{SUPPRESS_VE, SpteFormat};
use super::{Spte, SpteConfig};
use crate::access::Access;
use crate::addr::Level;

impl<F: SpteFormat> SpteConfig<F> {
    /// Present for the MMU, and hardware uses it for some access. Not so for access-tracked
    /// entries, nor for MMIO entries, which hardware rejects.
    #[inline]
    #[must_use]
    pub const fn is_hw_present(&self, spte: Spte) -> bool {
        spte.is_mmu_present() && self.reserved.is_hw_present(spte.raw())
    }

    /// Do two leaves of a frame agree in memory type and encryption? If not, one may not become the
    /// other in place: a TLB would go on with the old kind.
    #[inline]
    #[must_use]
    pub const fn same_memory(&self, a: Spte, b: Spte) -> bool {
        (a.raw() ^ b.raw()) & (F::MEMORY_TYPE | self.me_mask) == 0
    }

    /// Could hardware report an access through the entry to the guest, as a virtualization
    /// exception, where the MMU expects an exit? True if suppress-#VE is clear, except in the
    /// pattern W+X, which is a misconfiguration and exits whatever bit 63 says (KVM row 1.3).
    #[doc(alias = "is_ept_ve_possible")]
    #[inline]
    #[must_use]
    pub const fn may_raise_ve(&self, spte: Spte) -> bool {
        F::PRESENT & SUPPRESS_VE != 0
            && !spte.has(SUPPRESS_VE)
            && spte.raw() & F::HW_PRESENT != F::WRITABLE | F::EXEC
    }

    /// Does hardware allow an access that needs all of `needed`? An access-tracked entry permits
    /// nothing. [`Access::USER`] is what legacy entries grant by U; NPT and EPT grant it always,
    /// except that with mode-based execute it selects bit 10 for fetches.
    #[inline(always)]
    #[must_use]
    pub const fn permits(&self, spte: Spte, needed: Access) -> bool {
        let user = needed.contains(Access::USER);
        let fetch = needed.contains(Access::EXEC);
        let mut set = Spte::MMU_PRESENT;
        if needed.contains(Access::READ) {
            set |= F::READ;
        }
        if needed.contains(Access::WRITE) {
            set |= F::WRITABLE;
        }
        if user {
            set |= F::USER;
        }
        if fetch {
            set |= if user && self.caps.mode_based_exec { F::USER_EXEC } else { F::EXEC };
        }
        let clear = when(fetch && self.caps.nx, F::NX);
        spte.raw() & (set | clear) == set && self.is_hw_present(spte)
    }

    /// Everything that hardware allows. The result of [`leaf`](Self::leaf), decoded. For leaves
    /// and for links of 64-bit tables (a PAE PDPTE holds no permissions).
    #[inline]
    #[must_use]
    pub const fn access(&self, spte: Spte) -> Access {
        if !self.is_hw_present(spte) {
            return Access::empty();
        }
        let mut access = Access::empty();
        if spte.has(F::READ) {
            access = access.union(Access::READ);
        }
        if spte.has(F::WRITABLE) {
            access = access.union(Access::WRITE);
        }
        let exec =
            if F::EXEC != 0 { spte.has(F::EXEC) } else { !(self.caps.nx && spte.has(F::NX)) };
        if exec {
            access = access.union(Access::EXEC);
        }
        let user = if self.caps.mode_based_exec {
            spte.has(F::USER_EXEC)
        } else {
            F::USER == 0 || spte.has(F::USER)
        };
        if user { access.union(Access::USER) } else { access }
    }

    /// Present, with hardware W?
    #[doc(alias = "is_writable_pte")]
    #[inline]
    #[must_use]
    pub const fn is_writable(&self, spte: Spte) -> bool {
        let both = F::WRITABLE | Spte::MMU_PRESENT;
        spte.raw() & both == both
    }

    /// Present, and W may be granted again without the MMU lock (KVM row 1.9)?
    #[inline]
    #[must_use]
    pub const fn is_mmu_writable(&self, spte: Spte) -> bool {
        let both = F::MMU_WRITABLE | Spte::MMU_PRESENT;
        spte.raw() & both == both
    }

    /// Present, and the host mapping was writable when it was faulted in (KVM row 1.8)?
    #[inline]
    #[must_use]
    pub const fn is_host_writable(&self, spte: Spte) -> bool {
        let both = F::HOST_WRITABLE | Spte::MMU_PRESENT;
        spte.raw() & both == both
    }

    /// Can hardware or a lockless path change more than A of this entry, so that a plain store
    /// would lose something (KVM row 1.11)? A is left out: its loss is tolerated, for links too.
    #[doc(alias = "spte_has_volatile_bits")]
    #[inline]
    #[must_use]
    pub const fn needs_atomic_update(&self, spte: Spte, level: Level) -> bool {
        if !spte.is_leaf(level) {
            return false;
        }
        let writable = spte.has(F::WRITABLE);
        (!writable && spte.has(F::MMU_WRITABLE))
            || self.is_ad_disabled(spte)
            || (writable && !spte.has(F::DIRTY))
    }

    /// `new`, which replaces the leaf `old` of the same frame, with the W and D of the old one:
    /// what the guest wrote stays known (invariant I8), and what it may write it may go on writing.
    #[inline]
    #[must_use]
    pub const fn keep_writes(&self, old: Spte, new: Spte) -> Spte {
        let both = self.is_mmu_writable(new) && self.is_mmu_writable(old);
        new.with(old.raw() & (F::DIRTY | when(both, F::WRITABLE)))
    }

    /// `new`, which replaces the leaf `old` of the same frame, with what the old one says of the
    /// frame itself: memory type and encryption (KVM rows 1.22, 1.26).
    #[inline]
    #[must_use]
    pub const fn keep_kind(&self, old: Spte, new: Spte) -> Spte {
        let kind = F::MEMORY_TYPE | self.me_mask;
        if new.is_mmu_present() { new.without(kind).with(old.raw() & kind) } else { new }
    }

    /// The leaf so that its next write faults, for a dirty log: W clear, everything else as it
    /// was. The flush may be deferred to the end of the pass (KVM row 0.2.2).
    #[inline]
    #[must_use]
    pub const fn without_write(&self, leaf: Spte) -> Spte {
        if leaf.is_mmu_present() { leaf.without(F::WRITABLE) } else { leaf }
    }

    /// Does replacing the leaf `old` by the leaf `new` owe a flush before the lock is released?
    /// Exactly when MMU-writable goes away, even if W was already clear: write-protection for the
    /// dirty log may have left a writable TLB entry behind (KVM rows 0.2.1 and 1.12).
    #[doc(alias = "leaf_spte_change_needs_tlb_flush")]
    #[inline]
    #[must_use]
    pub const fn leaf_flush_needed(&self, old: Spte, new: Spte) -> bool {
        self.is_mmu_writable(old) && !self.is_mmu_writable(new)
    }

    /// W implies MMU-writable, MMU-writable implies host-writable (KVM row 1.10).
    #[doc(alias = "check_spte_writable_invariants")]
    #[inline]
    #[must_use]
    pub const fn writable_invariants_hold(&self, spte: Spte) -> bool {
        (!spte.has(F::WRITABLE) || spte.has(F::MMU_WRITABLE))
            && (!spte.has(F::MMU_WRITABLE) || spte.has(F::HOST_WRITABLE))
    }
}
