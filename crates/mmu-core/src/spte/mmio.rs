//! Entries that cache "no memory slot is here".
//!
//! Owns their encoding (KVM rows 1.34 to 1.39): a pattern that hardware rejects, so that every
//! access exits; the gfn; the low 18 bits of the memslots generation that makes the entry stale;
//! and, in the formats with room for it, the access. `config` chose and checked the pattern.

use super::bits::{FRAME, lowest, number, range, when};
use super::config::{L1TF_BITS, MmioValue};
use super::format::{MMIO_GEN_HIGH, MMIO_GEN_LOW, SUPPRESS_VE, SpteFormat};
use super::{Spte, SpteConfig};
use crate::access::Access;
use crate::addr::{Gfn, Gpa, PAGE_SHIFT};

/// Bits of the memslots generation that an entry holds (KVM row 1.37).
pub const MMIO_GEN_BITS: u32 = 18;
/// Bit of the memslots generation that says "an update is in progress".
pub const MMIO_GEN_IN_PROGRESS: u64 = 1 << 63;

const GEN_MASK: u64 = range(MMIO_GEN_BITS - 1, 0);
const LOW_SHIFT: u32 = lowest(MMIO_GEN_LOW);
const HIGH_SHIFT: u32 = lowest(MMIO_GEN_HIGH);
const LOW_BITS: u32 = MMIO_GEN_LOW.count_ones();

const _: () = assert!(LOW_BITS + MMIO_GEN_HIGH.count_ones() == MMIO_GEN_BITS);

/// The generation where an entry holds it.
const fn generation_bits(generation: u64) -> u64 {
    ((generation << LOW_SHIFT) & MMIO_GEN_LOW)
        | (((generation & GEN_MASK) >> LOW_BITS) << HIGH_SHIFT)
}

impl<F: SpteFormat> SpteConfig<F> {
    /// Are MMIO entries in use? Not if the capabilities say so, nor if the format has no reserved
    /// address bit left (legacy and NPT with MAXPHYADDR 52).
    #[inline]
    #[must_use]
    pub const fn mmio_enabled(&self) -> bool {
        self.mmio.is_some()
    }

    /// Is it an MMIO entry? Never true of a present, empty or frozen entry.
    #[inline]
    #[must_use]
    pub const fn is_mmio(&self, spte: Spte) -> bool {
        match self.mmio {
            // The mask holds MMU_PRESENT.
            Some(MmioValue { value, mask }) => spte.raw() & mask == value,
            None => false,
        }
    }

    /// The level-1 entry that says "`gfn` had no slot at `generation`". The low
    /// [`MMIO_GEN_BITS`] bits of the generation are kept, and of `access` WRITE and USER where the
    /// format has room.
    ///
    /// `None` if MMIO entries are not in use or the gfn is above MAXPHYADDR (KVM row 1.39).
    #[doc(alias = "make_mmio_spte")]
    #[must_use]
    pub const fn mmio(&self, gfn: Gfn, access: Access, generation: u64) -> Option<Spte> {
        let Some(MmioValue { value, .. }) = self.mmio else {
            return None;
        };
        let phys_bits = number(self.caps.max_phys_bits);
        if gfn.get() >> (phys_bits - PAGE_SHIFT) != 0 {
            return None;
        }
        let address = gfn.address().get();
        let moved = (address & self.l1tf) << L1TF_BITS;
        let allowed = when(access.contains(Access::WRITE), F::WRITABLE)
            | when(access.contains(Access::USER), F::USER);
        let raw = value
            | generation_bits(generation)
            | (allowed & F::MMIO_ACCESS)
            | (address & !self.l1tf)
            | moved
            | self.l1tf;
        Some(Spte::from_raw(raw))
    }

    /// The gfn of an MMIO entry; `None` for any other entry.
    #[doc(alias = "get_mmio_spte_gfn")]
    #[must_use]
    pub const fn mmio_gfn(&self, spte: Spte) -> Option<Gfn> {
        if !self.is_mmio(spte) {
            return None;
        }
        let plain = range(number(self.caps.max_phys_bits) - 1, PAGE_SHIFT) & !self.l1tf;
        let moved = (spte.raw() >> L1TF_BITS) & self.l1tf;
        Some(Gfn::containing(Gpa::new((spte.raw() & plain) | moved)))
    }

    /// The low [`MMIO_GEN_BITS`] bits of the generation of an MMIO entry; `None` for any other
    /// entry.
    #[doc(alias = "get_mmio_spte_generation")]
    #[must_use]
    pub const fn mmio_generation(&self, spte: Spte) -> Option<u64> {
        if !self.is_mmio(spte) {
            return None;
        }
        let low = (spte.raw() & MMIO_GEN_LOW) >> LOW_SHIFT;
        let high = (spte.raw() & MMIO_GEN_HIGH) >> HIGH_SHIFT;
        Some(low | high << LOW_BITS)
    }

    /// What an MMIO entry permits: READ and the stored WRITE and USER; everything in formats that
    /// store nothing. `None` for any other entry.
    #[must_use]
    pub const fn mmio_access(&self, spte: Spte) -> Option<Access> {
        if !self.is_mmio(spte) {
            return None;
        }
        if F::MMIO_ACCESS == 0 {
            return Some(Access::ALL);
        }
        let mut access = Access::READ;
        if spte.has(F::WRITABLE) {
            access = access.union(Access::WRITE);
        }
        if spte.has(F::USER) {
            access = access.union(Access::USER);
        }
        Some(access)
    }

    /// Is it an MMIO entry that still holds at memslots generation `generation`? Never while an
    /// update is in progress (KVM row 1.37).
    #[doc(alias = "check_mmio_spte")]
    #[must_use]
    pub const fn mmio_is_current(&self, spte: Spte, generation: u64) -> bool {
        match self.mmio_generation(spte) {
            Some(stored) => {
                generation & MMIO_GEN_IN_PROGRESS == 0 && stored == generation & GEN_MASK
            }
            None => false,
        }
    }

    /// Was a pattern asked for by which the guest handles its MMIO accesses itself, as #VE (KVM
    /// row 1.41)? Such a pattern says that suppress-#VE is clear.
    #[inline]
    #[must_use]
    pub const fn mmio_raises_ve(&self) -> bool {
        match self.mmio {
            Some(MmioValue { value, mask }) => {
                mask & SUPPRESS_VE != 0 && self.may_raise_ve(Spte::from_raw(value))
            }
            None => false,
        }
    }

    /// Every bit that an MMIO entry may have set, and those that it must have.
    pub(super) const fn mmio_layout(&self, pattern: MmioValue) -> (u64, u64) {
        let gfn = range(number(self.caps.max_phys_bits) - 1, PAGE_SHIFT);
        let fields = gfn | (self.l1tf << L1TF_BITS) | MMIO_GEN_LOW | MMIO_GEN_HIGH | F::MMIO_ACCESS;
        let must = pattern.value | self.l1tf;
        (fields | must, must)
    }
}

const _: () = assert!((MMIO_GEN_LOW | MMIO_GEN_HIGH) & (FRAME | Spte::MMU_PRESENT) == 0);
