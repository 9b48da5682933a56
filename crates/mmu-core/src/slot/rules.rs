//! Which slot changes are legal: [`plan`] turns a caller's request into a [`SlotChange`].
//!
//! A pure function of the current set, the limits and the request (KVM rows 6.4 and 6.5); it is the
//! only place where a caller's numbers are judged. All arithmetic on them is checked. The publisher
//! holds its mutex from `plan` until the change is published, so the current set cannot move.

use crate::addr::{Gfn, Hva, PAGE_SHIFT, PAGE_SIZE};
use crate::slot::{Memslot, Memslots, SlotError, SlotFlags, SlotRequest};

/// Most pages in one slot (KVM row 6.5): page counts within a slot fit a positive `i32`.
#[doc(alias = "KVM_MEM_MAX_NR_PAGES")]
pub const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;

/// What a VM allows. A limit beyond what [`Memslots`] can hold has no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotLimits {
    /// Address spaces, 1 to [`MAX_ADDRESS_SPACES`](crate::slot::MAX_ADDRESS_SPACES).
    pub address_spaces: u16,
    /// Slots per address space: ids are below.
    pub slots_per_space: u16,
    /// Every page of a slot is below: the host's (or the guest's smaller) physical address width.
    pub max_gfn_exclusive: Gfn,
    /// Most 4 KiB pages in all slots of all address spaces.
    pub total_pages: u64,
    /// Width of a canonical host address, sign bit included: 48 (4-level paging) or 57. What is
    /// mapped there, and whether the caller may use it, is the resolver's business.
    pub hva_bits: u32,
    /// Generation of the first, empty set, rounded down to a multiple of the address spaces, bit 63
    /// dropped. 0 but for who wants to see generations wrap.
    pub first_generation: u64,
}

impl SlotLimits {
    /// Slots per address space as in KVM on x86: 32767 less the 3 that KVM keeps for itself (KVM
    /// row 6.19).
    pub const SLOTS_PER_SPACE: u16 = 32764;
    /// Host addresses of 5-level paging: accepts every address that any x86-64 host can map.
    pub const HVA_BITS: u32 = 57;

    /// Limits of a VM whose guest pages are below `max_gfn_exclusive`, the rest as large as KVM
    /// has it.
    #[inline]
    #[must_use]
    pub const fn new(address_spaces: u16, max_gfn_exclusive: Gfn) -> Self {
        Self {
            address_spaces,
            slots_per_space: Self::SLOTS_PER_SPACE,
            max_gfn_exclusive,
            total_pages: u64::MAX,
            hva_bits: Self::HVA_BITS,
            first_generation: 0,
        }
    }
}

/// A legal change of the current set (KVM row 6.4). The `old` slots are as they stand in the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum SlotChange {
    /// The slot is already as asked for.
    Nothing,
    /// A slot comes into being.
    Create(Memslot),
    /// A slot goes away.
    Delete(Memslot),
    /// A slot gets another guest address, and perhaps other flags.
    Move {
        /// Before.
        old: Memslot,
        /// After.
        new: Memslot,
    },
    /// A slot gets other flags where it stands; no mapping has to go (KVM row 6.20).
    Flags {
        /// Before.
        old: Memslot,
        /// After.
        new: Memslot,
    },
}

impl SlotChange {
    /// The slot that must be made invalid and zapped before the change (KVM row 6.6).
    #[inline]
    #[must_use]
    pub const fn invalidates(&self) -> Option<&Memslot> {
        match self {
            Self::Delete(old) | Self::Move { old, .. } => Some(old),
            Self::Nothing | Self::Create(_) | Self::Flags { .. } => None,
        }
    }

    /// The slot as it stands after the change; `None` when it is gone or did not change.
    #[inline]
    #[must_use]
    pub const fn after(&self) -> Option<&Memslot> {
        match self {
            Self::Create(new) | Self::Move { new, .. } | Self::Flags { new, .. } => Some(new),
            Self::Nothing | Self::Delete(_) => None,
        }
    }
}

/// Check `request` against `current` and `limits`.
///
/// # Errors
/// Every rule of KVM rows 6.4 and 6.5 has its own [`SlotError`]; the first one broken is reported,
/// in this order: flags ([`UnknownFlags`](SlotError::UnknownFlags),
/// [`InternalFlag`](SlotError::InternalFlag)), alignment
/// ([`SizeUnaligned`](SlotError::SizeUnaligned), [`GpaUnaligned`](SlotError::GpaUnaligned),
/// [`HvaUnaligned`](SlotError::HvaUnaligned)), host range
/// ([`HvaNotCanonical`](SlotError::HvaNotCanonical), [`HvaWraps`](SlotError::HvaWraps)), names
/// ([`AsIdOutOfRange`](SlotError::AsIdOutOfRange), [`IdOutOfRange`](SlotError::IdOutOfRange)),
/// size ([`GpaWraps`](SlotError::GpaWraps), [`TooManyPages`](SlotError::TooManyPages)). Then, to
/// delete: [`NoSuchSlot`](SlotError::NoSuchSlot), [`Busy`](SlotError::Busy). To change:
/// `Busy`, [`SizeChanged`](SlotError::SizeChanged), [`HvaChanged`](SlotError::HvaChanged),
/// [`ReadOnlyToggled`](SlotError::ReadOnlyToggled). To create:
/// [`TotalPages`](SlotError::TotalPages). To create or move:
/// [`AboveMaxGfn`](SlotError::AboveMaxGfn), [`Overlap`](SlotError::Overlap).
pub fn plan(
    current: &Memslots,
    limits: &SlotLimits,
    request: &SlotRequest,
) -> Result<SlotChange, SlotError> {
    let &SlotRequest { as_id, id, .. } = request;
    check_flags(request.flags)?;
    check_alignment(request)?;
    check_host_range(request.hva, request.bytes, limits.hva_bits)?;
    check_names(current, limits, request)?;
    let npages = check_size(request)?;

    let old = current.by_id(as_id, id).copied();
    if old.is_some_and(|old| old.is_invalid()) {
        return Err(SlotError::Busy { as_id, id });
    }
    let base_gfn = Gfn::containing(request.base);
    let new = Memslot { as_id, id, flags: request.flags, base_gfn, npages, hva: request.hva };
    match old {
        None if npages == 0 => Err(SlotError::NoSuchSlot { as_id, id }),
        None => {
            check_total(current, limits, npages)?;
            check_place(current, limits, &new)?;
            Ok(SlotChange::Create(new))
        }
        Some(old) if npages == 0 => Ok(SlotChange::Delete(old)),
        Some(old) => {
            check_fixed(&old, &new)?;
            if old.base_gfn != new.base_gfn {
                check_place(current, limits, &new)?;
                Ok(SlotChange::Move { old, new })
            } else if old.flags != new.flags {
                Ok(SlotChange::Flags { old, new })
            } else {
                Ok(SlotChange::Nothing)
            }
        }
    }
}

fn check_flags(flags: SlotFlags) -> Result<(), SlotError> {
    let bits = flags.bits() & !SlotFlags::all().bits();
    if bits != 0 {
        return Err(SlotError::UnknownFlags { bits });
    }
    let internal = flags.difference(SlotFlags::CALLER);
    if internal.is_empty() { Ok(()) } else { Err(SlotError::InternalFlag { flags: internal }) }
}

fn check_alignment(request: &SlotRequest) -> Result<(), SlotError> {
    let &SlotRequest { base, bytes, hva, .. } = request;
    if bytes & (PAGE_SIZE - 1) != 0 {
        Err(SlotError::SizeUnaligned { bytes })
    } else if !base.is_page_aligned() {
        Err(SlotError::GpaUnaligned { base })
    } else if !hva.is_page_aligned() {
        Err(SlotError::HvaUnaligned { hva })
    } else {
        Ok(())
    }
}

/// Canonical: bit `bits - 1` and all above it agree, and agree over the whole range.
fn check_host_range(hva: Hva, bytes: u64, bits: u32) -> Result<(), SlotError> {
    let sign = bits.clamp(1, u64::BITS) - 1;
    let upper = |address: Hva| address.get() >> sign;
    if upper(hva) != 0 && upper(hva) != u64::MAX >> sign {
        return Err(SlotError::HvaNotCanonical { hva, bits });
    }
    // The end, too, must be an address: a range that ends at 2^64 is refused.
    let inside = hva.checked_add(bytes).is_some()
        && hva.checked_add(bytes.saturating_sub(1)).map(upper) == Some(upper(hva));
    if inside { Ok(()) } else { Err(SlotError::HvaWraps { hva, bytes }) }
}

fn check_names(
    current: &Memslots,
    limits: &SlotLimits,
    request: &SlotRequest,
) -> Result<(), SlotError> {
    let &SlotRequest { as_id, id, .. } = request;
    let spaces = limits.address_spaces.min(current.address_spaces());
    if as_id >= spaces {
        return Err(SlotError::AsIdOutOfRange { as_id, limit: spaces });
    }
    if id >= limits.slots_per_space {
        return Err(SlotError::IdOutOfRange { id, limit: limits.slots_per_space });
    }
    Ok(())
}

/// Pages asked for.
fn check_size(request: &SlotRequest) -> Result<u64, SlotError> {
    let &SlotRequest { base, bytes, .. } = request;
    if base.checked_add(bytes).is_none() {
        return Err(SlotError::GpaWraps { base, bytes });
    }
    let pages = bytes >> PAGE_SHIFT;
    if pages > MAX_SLOT_PAGES {
        return Err(SlotError::TooManyPages { pages, limit: MAX_SLOT_PAGES });
    }
    Ok(pages)
}

fn check_total(current: &Memslots, limits: &SlotLimits, added: u64) -> Result<(), SlotError> {
    let (current, limit) = (current.total_pages(), limits.total_pages);
    match current.checked_add(added) {
        Some(total) if total <= limit => Ok(()),
        _ => Err(SlotError::TotalPages { current, added, limit }),
    }
}

fn check_fixed(old: &Memslot, new: &Memslot) -> Result<(), SlotError> {
    if old.npages != new.npages {
        Err(SlotError::SizeChanged { old_pages: old.npages, new_pages: new.npages })
    } else if old.hva != new.hva {
        Err(SlotError::HvaChanged { old: old.hva, new: new.hva })
    } else if old.is_read_only() != new.is_read_only() {
        Err(SlotError::ReadOnlyToggled { old: old.flags, new: new.flags })
    } else {
        Ok(())
    }
}

/// The guest range of a slot that is created or moved; it has at least one page.
fn check_place(current: &Memslots, limits: &SlotLimits, new: &Memslot) -> Result<(), SlotError> {
    let last = new.base_gfn.saturating_add(new.npages.saturating_sub(1));
    if last >= limits.max_gfn_exclusive {
        return Err(SlotError::AboveMaxGfn { last, limit: limits.max_gfn_exclusive });
    }
    current.check_free(new)
}
