//! [`Memslots`]: one set of slots for every address space, as readers see it.
//!
//! A set is written by its publisher through `&mut` and never again once readers can see it. The
//! publisher keeps two sets of equal capacity and replays each change on the one that is not
//! published (KVM row 6.1). To delete or move a slot (KVM row 6.6) it publishes a set with the slot
//! marked invalid ([`Memslots::apply_invalid`]), waits for readers, has the MMU zap the slot, then
//! publishes the set without it ([`Memslots::apply`]). Memory is found beforehand
//! ([`Memslots::reserve_like`]), so nothing fails in the middle. No locks, no ordering: those are
//! the publisher's.

use alloc::vec::Vec;
use core::fmt;

use crate::access::Access;
use crate::addr::{Gfn, GfnRange, Hva, PAGE_SHIFT, PAGE_SIZE, to_u64};
use crate::slot::space::Space;
use crate::slot::{Memslot, SlotChange, SlotError, SlotFlags, SlotLimits, SlotMeta};

/// Most address spaces in a set. KVM uses two on x86; the rest is room for privilege levels.
pub const MAX_ADDRESS_SPACES: u16 = 8;

/// Bit of a generation: an update is in progress, old and new set may both be seen (KVM row 6.3).
#[doc(alias = "KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS")]
pub const GENERATION_UPDATING: u64 = 1 << 63;

/// Why a gfn has no host address that an access may use (KVM row 6.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GfnToHvaError {
    /// No slot has the page: emulate the access.
    NoSlot {
        /// Address space.
        as_id: u16,
        /// The page.
        gfn: Gfn,
    },
    /// The slot is being deleted or moved: retry.
    Invalid {
        /// The slot.
        slot: u16,
        /// The page.
        gfn: Gfn,
    },
    /// A write to a read-only slot: emulate the access.
    ReadOnly {
        /// The slot.
        slot: u16,
        /// The page.
        gfn: Gfn,
    },
}

impl fmt::Display for GfnToHvaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoSlot { as_id, gfn } => {
                write!(f, "no slot of address space {as_id} has gfn {gfn}")
            }
            Self::Invalid { slot, gfn } => write!(f, "slot {slot} of gfn {gfn} is going away"),
            Self::ReadOnly { slot, gfn } => write!(f, "slot {slot} of gfn {gfn} is read-only"),
        }
    }
}

impl core::error::Error for GfnToHvaError {}

/// The slots of every address space.
///
/// Having a `&Memslots` tells you: per address space, ids are unique and no page has two slots. It
/// does not tell you that it is the current set; compare [`generation`](Self::generation).
#[doc(alias = "kvm_memslots")]
#[derive(Debug, PartialEq, Eq)]
pub struct Memslots {
    generation: u64,
    total_pages: u64,
    address_spaces: u16,
    /// Those from `address_spaces` on stay empty.
    spaces: [Space; MAX_ADDRESS_SPACES_USIZE],
    /// What slots carry besides; few do. Sorted by `(as_id, id)`.
    metas: Vec<MetaEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct MetaEntry {
    key: (u16, u16),
    meta: SlotMeta,
}

#[expect(clippy::as_conversions, reason = "widening in a const, where `usize::from` is not const")]
const MAX_ADDRESS_SPACES_USIZE: usize = MAX_ADDRESS_SPACES as usize;

impl Memslots {
    /// A set without slots, of the first generation and with the address spaces of `limits`: at
    /// least one, at most [`MAX_ADDRESS_SPACES`]. Does not allocate.
    #[must_use]
    pub fn new(limits: &SlotLimits) -> Self {
        let address_spaces = limits.address_spaces.clamp(1, MAX_ADDRESS_SPACES);
        let spaces = core::array::from_fn(|_| Space::default());
        let first = limits.first_generation & !GENERATION_UPDATING;
        let beyond = first.checked_rem(u64::from(address_spaces)).unwrap_or(0);
        let generation = first.saturating_sub(beyond);
        Self { generation, total_pages: 0, address_spaces, spaces, metas: Vec::new() }
    }

    /// Number of address spaces; valid ids are below.
    #[inline]
    #[must_use]
    pub const fn address_spaces(&self) -> u16 {
        self.address_spaces
    }

    /// 4 KiB pages in all slots.
    #[inline]
    #[must_use]
    pub const fn total_pages(&self) -> u64 {
        self.total_pages
    }

    /// Slots in an address space; 0 when there is no such space.
    #[inline]
    #[must_use]
    pub fn len(&self, as_id: u16) -> usize {
        self.iter(as_id).len()
    }

    /// Does no address space have a slot?
    #[inline]
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.total_pages == 0
    }

    /// Slots that can be inserted into an address space before anything allocates.
    #[must_use]
    pub fn spare(&self, as_id: u16) -> usize {
        self.space(as_id).map_or(0, Space::spare)
    }
}

/// Generations (KVM row 6.3).
impl Memslots {
    /// Changes with every update; [`GENERATION_UPDATING`] is set while one is in progress.
    ///
    /// Without that bit it is a multiple of the number of address spaces: all spaces of a set
    /// change together here, and [`generation_in`](Self::generation_in) tells them apart.
    #[inline]
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// The generation of one address space: never equal to that of another space or of another
    /// completed update, because sets advance by the number of spaces (with two: 0, 2, 4... and 1,
    /// 3, 5...). Something cached for (gfn, generation) thus cannot be taken for another space's.
    #[inline]
    #[must_use]
    pub fn generation_in(&self, as_id: u16) -> u64 {
        self.generation.wrapping_add(u64::from(as_id))
    }

    /// Is an update in progress? What is cached now must not outlive it.
    #[inline]
    #[must_use]
    pub const fn is_updating(&self) -> bool {
        self.generation & GENERATION_UPDATING != 0
    }

    /// The generation of the set once the update of this one is complete, bit 63 clear. Starts
    /// again at 0 before the last space's number would reach bit 63 (after 2^60 updates or more).
    #[must_use]
    pub fn next_generation(&self) -> u64 {
        let step = u64::from(self.address_spaces);
        let low = self.generation & !GENERATION_UPDATING;
        let aligned = low.saturating_sub(low.checked_rem(step).unwrap_or(0));
        let next = aligned.saturating_add(step);
        if next <= GENERATION_UPDATING.saturating_sub(step) { next } else { 0 }
    }

    /// Do the low `bits` bits of the generation start again with the next completed update? Who
    /// keeps no more of it must forget everything then (KVM row 1.37).
    #[must_use]
    pub fn next_wraps(&self, bits: u32) -> bool {
        let low = self.generation & !GENERATION_UPDATING;
        low.checked_shr(bits) != self.next_generation().checked_shr(bits)
    }

    /// Publisher: name the set. `generation` comes from [`next_generation`](Self::next_generation),
    /// or is the old one with [`GENERATION_UPDATING`].
    pub const fn set_generation(&mut self, generation: u64) {
        self.generation = generation;
    }
}

/// Lookups.
impl Memslots {
    /// The slot that has `gfn`, also when it is invalid. `None` in a gap (KVM row 6.2).
    #[inline]
    #[must_use]
    pub fn find(&self, as_id: u16, gfn: Gfn) -> Option<&Memslot> {
        let space = self.space(as_id)?;
        space.get(space.position(gfn)?)
    }

    /// The same as [`find`](Self::find), trying first the place where a former lookup ended, and
    /// leaving the place of this one there. Any `hint` is correct, whatever set it came from; 0 to
    /// begin.
    #[inline]
    #[must_use]
    pub fn find_from_hint(&self, as_id: u16, gfn: Gfn, hint: &mut usize) -> Option<&Memslot> {
        let space = self.space(as_id)?;
        if let Some(slot) = space.get(*hint).filter(|slot| slot.contains(gfn)) {
            return Some(slot);
        }
        let at = space.position(gfn)?;
        *hint = at;
        space.get(at)
    }

    /// The slot with a number.
    #[must_use]
    pub fn by_id(&self, as_id: u16, id: u16) -> Option<&Memslot> {
        self.space(as_id)?.by_id(id)
    }

    /// What a slot carries besides its geometry; `None` when that is nothing.
    #[must_use]
    pub fn meta(&self, as_id: u16, id: u16) -> Option<&SlotMeta> {
        let at = self.metas.binary_search_by_key(&(as_id, id), |entry| entry.key).ok()?;
        self.metas.get(at).map(|entry| &entry.meta)
    }

    /// Mark those of `range` dirty that are logged. Returns how many are.
    #[doc(alias = "mark_page_dirty_in_slot")]
    pub fn mark_dirty(&self, as_id: u16, range: GfnRange) -> u64 {
        if self.metas.is_empty() {
            return 0;
        }
        let mut marked = 0;
        for slot in self.overlapping(as_id, range).filter(|slot| slot.logs_dirty()) {
            if let Some(log) = self.meta(as_id, slot.id).and_then(SlotMeta::log) {
                let both = slot.range().intersection(range);
                let first = both.start.distance_from(slot.base_gfn);
                marked += log.set_range(first..first + both.len());
            }
        }
        marked
    }

    /// Slots that carry something, as `(address space, id)`; ascending.
    pub fn metas(&self) -> impl Iterator<Item = ((u16, u16), &SlotMeta)> {
        self.metas.iter().map(|entry| (entry.key, &entry.meta))
    }

    /// The slots of an address space, ascending by gfn; none when there is no such space.
    #[inline]
    pub fn iter(&self, as_id: u16) -> core::slice::Iter<'_, Memslot> {
        self.space(as_id).map_or(&[][..], Space::slots).iter()
    }

    /// The slots of an address space that share a page with `range`, ascending by gfn.
    pub fn overlapping(&self, as_id: u16, range: GfnRange) -> impl Iterator<Item = &Memslot> {
        self.space(as_id).into_iter().flat_map(move |space| space.overlapping(range))
    }

    /// Call `visit` with every slot, of any address space, that maps host memory in
    /// `hva_start..hva_end`, and the guest pages that do (KVM rows 3.51, 6.9).
    ///
    /// Pages touched in part count, so the end is rounded up. Slots may map the same host memory:
    /// each is visited. Invalid slots are visited too, for they may still be mapped. Ascending by
    /// address space, then by host address.
    ///
    /// Cost per address space: one binary search, then the entries from the first slot that
    /// reaches into the range to the last that starts in it. Without aliases inside one address
    /// space those are the slots visited.
    pub fn for_each_hva_range(
        &self,
        hva_start: Hva,
        hva_end: Hva,
        mut visit: impl FnMut(&Memslot, GfnRange),
    ) {
        if hva_start >= hva_end {
            return;
        }
        // In pages: rounding a byte address up could wrap, a page number cannot.
        let first = hva_start.get() >> PAGE_SHIFT;
        let end = hva_end.get().div_ceil(PAGE_SIZE);
        for space in &self.spaces {
            space.for_each_host_range(first, end, &mut visit);
        }
    }

    /// Where the host maps `gfn`, for an access that needs `access` (KVM row 6.10).
    ///
    /// Whether the answer is writable is [`Memslot::is_read_only`].
    ///
    /// # Errors
    /// [`GfnToHvaError::NoSlot`] in a gap; [`GfnToHvaError::Invalid`] while the slot is deleted or
    /// moved; [`GfnToHvaError::ReadOnly`] when `access` has [`Access::WRITE`] and the slot is
    /// read-only.
    #[inline]
    pub fn resolve_hva(&self, as_id: u16, gfn: Gfn, access: Access) -> Result<Hva, GfnToHvaError> {
        let missing = GfnToHvaError::NoSlot { as_id, gfn };
        let slot = self.find(as_id, gfn).ok_or(missing)?;
        if slot.is_invalid() {
            return Err(GfnToHvaError::Invalid { slot: slot.id, gfn });
        }
        if slot.is_read_only() && access.contains(Access::WRITE) {
            return Err(GfnToHvaError::ReadOnly { slot: slot.id, gfn });
        }
        slot.hva_of(gfn).ok_or(missing)
    }

    /// Are the pages of `slot` free, or its own already?
    ///
    /// # Errors
    /// [`SlotError::Overlap`] names the first slot that has one of them.
    pub(super) fn check_free(&self, slot: &Memslot) -> Result<(), SlotError> {
        let &Memslot { as_id, id, .. } = slot;
        match self.overlapping(as_id, slot.range()).find(|other| other.id != id) {
            None => Ok(()),
            Some(other) => {
                Err(SlotError::Overlap { as_id, id, other: other.id, taken: other.range() })
            }
        }
    }

    /// Bytes allocated.
    pub(super) fn heap_bytes(&self) -> u64 {
        self.spaces.iter().map(Space::heap_bytes).sum()
    }

    fn space(&self, as_id: u16) -> Option<&Space> {
        self.spaces.get(..usize::from(self.address_spaces))?.get(usize::from(as_id))
    }
}

/// Changes, for the publisher. Each fails without side effects or cannot fail.
impl Memslots {
    /// Find the memory to become `other` with `extra` more slots in each address space.
    ///
    /// # Errors
    /// [`SlotError::NoMemory`]; the slots are as before.
    pub fn reserve_like(&mut self, other: &Self, extra: usize) -> Result<(), SlotError> {
        let spaces = usize::from(other.address_spaces);
        for (space, like) in self.spaces.iter_mut().zip(&other.spaces).take(spaces) {
            let total = like.slots().len().saturating_add(extra);
            let no_memory = SlotError::NoMemory { slots: to_u64(total) };
            space.reserve_total(total).map_err(|_| no_memory)?;
        }
        // One for each slot: any of them may get parts later without an allocation.
        let slots: usize = other.spaces.iter().map(|space| space.slots().len()).sum();
        let metas = slots.saturating_add(extra);
        let room = metas.saturating_sub(self.metas.len());
        self.metas.try_reserve(room).map_err(|_| SlotError::NoMemory { slots: to_u64(metas) })
    }

    /// Become equal to `other`, its generation included. Does not allocate after
    /// [`reserve_like`](Self::reserve_like).
    pub fn copy_from(&mut self, other: &Self) {
        self.generation = other.generation;
        self.total_pages = other.total_pages;
        self.address_spaces = other.address_spaces;
        for (space, like) in self.spaces.iter_mut().zip(&other.spaces) {
            space.copy_from(like);
        }
        self.metas.clone_from(&other.metas);
    }

    /// Let go of what the slots carry, but not of the memory for it: of a set that waits to be
    /// overwritten.
    pub(crate) fn forget_metas(&mut self) {
        self.metas.clear();
    }

    /// Give the slot `id` of a space other parts. Allocates only when nothing was reserved by
    /// [`reserve_like`](Self::reserve_like).
    ///
    /// # Errors
    /// [`SlotError::NoSuchSlot`], [`SlotError::NoMemory`]; the set is as before.
    pub fn set_meta(&mut self, as_id: u16, id: u16, meta: SlotMeta) -> Result<(), SlotError> {
        if self.by_id(as_id, id).is_none() {
            return Err(SlotError::NoSuchSlot { as_id, id });
        }
        let key = (as_id, id);
        match self.metas.binary_search_by_key(&key, |entry| entry.key) {
            Ok(at) if meta.is_empty() => {
                self.metas.remove(at);
            }
            Ok(at) => {
                if let Some(entry) = self.metas.get_mut(at) {
                    entry.meta = meta;
                }
            }
            Err(_) if meta.is_empty() => {}
            Err(at) => {
                let slots = to_u64(self.metas.len()).saturating_add(1);
                self.metas.try_reserve(1).map_err(|_| SlotError::NoMemory { slots })?;
                self.metas.insert(at, MetaEntry { key, meta });
            }
        }
        Ok(())
    }

    /// Add a slot. Allocates only when [`spare`](Self::spare) is 0.
    ///
    /// # Errors
    /// [`SlotError::AsIdOutOfRange`], [`SlotError::Malformed`], [`SlotError::IdTaken`],
    /// [`SlotError::Overlap`], [`SlotError::NoMemory`]; the set is as before.
    pub fn insert(&mut self, slot: Memslot) -> Result<(), SlotError> {
        let Memslot { as_id, id, .. } = slot;
        self.check_slot(&slot)?;
        if self.by_id(as_id, id).is_some() {
            return Err(SlotError::IdTaken { as_id, id });
        }
        self.check_free(&slot)?;
        let space = self.space_mut(as_id)?;
        let total = space.slots().len().saturating_add(1);
        let no_memory = SlotError::NoMemory { slots: to_u64(total) };
        space.reserve_total(total).map_err(|_| no_memory)?;
        space.insert(slot);
        self.total_pages = self.total_pages.saturating_add(slot.npages);
        Ok(())
    }

    /// Take a slot out and return it; `None` when there is none. Never allocates.
    pub fn remove(&mut self, as_id: u16, id: u16) -> Option<Memslot> {
        let slot = self.space_mut(as_id).ok()?.remove(id)?;
        if let Ok(at) = self.metas.binary_search_by_key(&(as_id, id), |entry| entry.key) {
            self.metas.remove(at);
        }
        self.total_pages = self.total_pages.saturating_sub(slot.npages);
        Some(slot)
    }

    /// Overwrite the slot that has the same address space and id, and return the old one. Never
    /// allocates; cheap when only the flags differ.
    ///
    /// # Errors
    /// [`SlotError::AsIdOutOfRange`], [`SlotError::Malformed`], [`SlotError::NoSuchSlot`],
    /// [`SlotError::Overlap`] with a third slot; the set is as before.
    pub fn replace(&mut self, slot: Memslot) -> Result<Memslot, SlotError> {
        let Memslot { as_id, id, .. } = slot;
        self.check_slot(&slot)?;
        self.check_free(&slot)?;
        let missing = SlotError::NoSuchSlot { as_id, id };
        let old = self.space_mut(as_id)?.replace(slot).ok_or(missing)?;
        let others = self.total_pages.saturating_sub(old.npages);
        self.total_pages = others.saturating_add(slot.npages);
        Ok(old)
    }

    /// Carry out a change that [`plan`](crate::slot::plan) made from a set with the same slots.
    /// Cannot fail, and does not allocate, when one slot is [`spare`](Self::spare) in the address
    /// space.
    ///
    /// A change that does not fit this set is a bug of the caller: debug builds panic, release
    /// builds leave the set as it is.
    pub fn apply(&mut self, change: &SlotChange) {
        let done = match *change {
            SlotChange::Nothing => Ok(()),
            SlotChange::Create(new) => self.insert(new),
            SlotChange::Delete(old) => {
                let missing = SlotError::NoSuchSlot { as_id: old.as_id, id: old.id };
                self.remove(old.as_id, old.id).map(|_| ()).ok_or(missing)
            }
            SlotChange::Move { new, .. } | SlotChange::Flags { new, .. } => {
                self.replace(new).map(|_| ())
            }
        };
        debug_assert!(done.is_ok(), "a slot change does not fit the set: {done:?}");
    }

    /// First half of a change that deletes or moves: mark the old slot invalid, so that faults on
    /// it retry while it is zapped (KVM row 6.6). Other changes do nothing here. Never fails,
    /// never allocates; [`apply`](Self::apply) goes on from here,
    /// [`undo_invalid`](Self::undo_invalid) goes back.
    pub fn apply_invalid(&mut self, change: &SlotChange) {
        if let Some(&old) = change.invalidates() {
            let marked = Memslot { flags: old.flags.union(SlotFlags::INVALID), ..old };
            let done = self.replace(marked);
            debug_assert!(done.is_ok(), "a slot change does not fit the set: {done:?}");
        }
    }

    /// Take back [`apply_invalid`](Self::apply_invalid): the change failed before it was applied,
    /// and the original slot stands again (KVM row 6.6).
    pub fn undo_invalid(&mut self, change: &SlotChange) {
        if let Some(&old) = change.invalidates() {
            let done = self.replace(old);
            debug_assert!(done.is_ok(), "a slot change does not fit the set: {done:?}");
        }
    }

    fn check_slot(&self, slot: &Memslot) -> Result<(), SlotError> {
        if slot.as_id >= self.address_spaces {
            let limit = self.address_spaces;
            return Err(SlotError::AsIdOutOfRange { as_id: slot.as_id, limit });
        }
        if slot.is_well_formed() { Ok(()) } else { Err(SlotError::Malformed { slot: *slot }) }
    }

    fn space_mut(&mut self, as_id: u16) -> Result<&mut Space, SlotError> {
        let limit = self.address_spaces;
        let mut spaces = self.spaces.iter_mut().take(usize::from(limit));
        spaces.nth(usize::from(as_id)).ok_or(SlotError::AsIdOutOfRange { as_id, limit })
    }
}
