//! The slots of one address space: sorted by gfn, with an index by id and one by host address.
//!
//! Three sorted vectors of plain values that always name the same slots; [`Memslots`] is made of
//! them. Lookups are binary searches; a change moves the tail of each vector. With room reserved,
//! no change allocates.
//!
//! [`Memslots`]: crate::slot::Memslots

use alloc::collections::TryReserveError;
use alloc::vec::Vec;

use crate::addr::{Gfn, GfnRange, mask_index, to_index, to_u64};
use crate::slot::Memslot;

/// One address space.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Space {
    /// Sorted by `base_gfn`; no two share a page, so also sorted by their ends.
    slots: Vec<Memslot>,
    /// Sorted by `id`, each once.
    ids: Vec<IdEntry>,
    /// Sorted by `(first, base)`. Several may cover the same host page (KVM row 6.9).
    hosts: Vec<HostEntry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct IdEntry {
    id: u16,
    base: Gfn,
}

/// Host pages `first..end` of the slot at `base`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HostEntry {
    first: u64,
    end: u64,
    /// The largest `end` of this entry and all before it. It never decreases along the vector, so
    /// a search can skip every entry that ends too early even though slots may alias.
    reach: u64,
    base: Gfn,
}

impl HostEntry {
    fn of(slot: &Memslot) -> Self {
        let first = slot.hva_page();
        let end = first.saturating_add(slot.npages);
        Self { first, end, reach: end, base: slot.base_gfn }
    }

    const fn key(&self) -> (u64, Gfn) {
        (self.first, self.base)
    }
}

impl Space {
    /// The slots, sorted by gfn.
    #[inline]
    pub(super) fn slots(&self) -> &[Memslot] {
        &self.slots
    }

    /// Slots that can be inserted before anything allocates.
    pub(super) fn spare(&self) -> usize {
        let capacity = self.slots.capacity().min(self.ids.capacity()).min(self.hosts.capacity());
        capacity.saturating_sub(self.slots.len())
    }

    /// Room for `total` slots.
    pub(super) fn reserve_total(&mut self, total: usize) -> Result<(), TryReserveError> {
        let additional = total.saturating_sub(self.slots.len());
        self.slots.try_reserve(additional)?;
        self.ids.try_reserve(additional)?;
        self.hosts.try_reserve(additional)
    }

    /// Bytes allocated.
    pub(super) fn heap_bytes(&self) -> u64 {
        let each = [
            self.slots.capacity().saturating_mul(size_of::<Memslot>()),
            self.ids.capacity().saturating_mul(size_of::<IdEntry>()),
            self.hosts.capacity().saturating_mul(size_of::<HostEntry>()),
        ];
        each.into_iter().map(to_u64).sum()
    }

    /// Become equal to `other`.
    pub(super) fn copy_from(&mut self, other: &Self) {
        copy(&mut self.slots, &other.slots);
        copy(&mut self.ids, &other.ids);
        copy(&mut self.hosts, &other.hosts);
    }

    /// Index into [`Self::slots`] of the slot that has `gfn`. The slot found by the search is the
    /// last that starts at or before it, which in a gap is a neighbour: it must also contain it.
    #[inline]
    pub(super) fn position(&self, gfn: Gfn) -> Option<usize> {
        let at = self.slots.partition_point(|slot| slot.base_gfn <= gfn).checked_sub(1)?;
        self.get(at).filter(|slot| slot.contains(gfn)).map(|_| at)
    }

    /// The slot at an index. The guest chose the gfn that led to it, so the index is masked as well
    /// as checked: no speculated load leaves the slots (KVM row 6.2).
    #[inline]
    pub(super) fn get(&self, at: usize) -> Option<&Memslot> {
        if at >= self.slots.len() {
            return None;
        }
        self.slots.get(to_index(mask_index(to_u64(at), to_u64(self.slots.len()))))
    }

    pub(super) fn by_id(&self, id: u16) -> Option<&Memslot> {
        let at = self.ids.binary_search_by_key(&id, |entry| entry.id).ok()?;
        self.at_base(self.ids.get(at)?.base)
    }

    /// The slots that share a page with `range`, in ascending order.
    pub(super) fn overlapping(&self, range: GfnRange) -> impl Iterator<Item = &Memslot> {
        let first = self.slots.partition_point(|slot| slot.range().end <= range.start);
        // `overlaps` takes an empty range for a point; it has no page to share.
        let most = if range.is_empty() { 0 } else { self.slots.len() };
        let slots = self.slots.iter().skip(first).take(most);
        slots.take_while(move |slot| slot.range().overlaps(range))
    }

    /// Call `visit` with every slot that maps some of the host pages `first..end`, and the guest
    /// pages that do.
    pub(super) fn for_each_host_range(
        &self,
        first: u64,
        end: u64,
        visit: &mut impl FnMut(&Memslot, GfnRange),
    ) {
        let skip = self.hosts.partition_point(|entry| entry.reach <= first);
        for entry in self.hosts.iter().skip(skip).take_while(|entry| entry.first < end) {
            let (from, to) = (entry.first.max(first), entry.end.min(end));
            if from >= to {
                continue;
            }
            if let Some(slot) = self.at_base(entry.base) {
                let start = entry.base.saturating_add(from.saturating_sub(entry.first));
                visit(slot, GfnRange::from_len(start, to.saturating_sub(from)));
            }
        }
    }

    /// Add a well-formed slot whose pages and id are free.
    pub(super) fn insert(&mut self, slot: Memslot) {
        let at = self.slots.partition_point(|other| other.base_gfn < slot.base_gfn);
        self.slots.insert(at, slot);
        let at = self.ids.partition_point(|other| other.id < slot.id);
        self.ids.insert(at, IdEntry { id: slot.id, base: slot.base_gfn });
        let entry = HostEntry::of(&slot);
        let at = self.hosts.partition_point(|other| other.key() < entry.key());
        self.hosts.insert(at, entry);
        self.update_reach(at);
    }

    /// Take a slot out; `None` when there is none with that id.
    pub(super) fn remove(&mut self, id: u16) -> Option<Memslot> {
        let slot = *self.by_id(id)?;
        let base = slot.base_gfn;
        if let Ok(at) = self.slots.binary_search_by_key(&base, |slot| slot.base_gfn) {
            self.slots.remove(at);
        }
        if let Ok(at) = self.ids.binary_search_by_key(&id, |entry| entry.id) {
            self.ids.remove(at);
        }
        let key = HostEntry::of(&slot).key();
        if let Ok(at) = self.hosts.binary_search_by_key(&key, HostEntry::key) {
            self.hosts.remove(at);
            self.update_reach(at);
        }
        Some(slot)
    }

    /// Overwrite the slot that has the same id; its new pages are free. `None` when there is none.
    /// Never allocates: what is removed makes the room.
    pub(super) fn replace(&mut self, new: Memslot) -> Option<Memslot> {
        let old = *self.by_id(new.id)?;
        let geometry = |slot: &Memslot| (slot.base_gfn, slot.npages, slot.hva);
        if geometry(&old) == geometry(&new) {
            // No index changes, so only one word is written.
            let at = self.position(old.base_gfn)?;
            *self.slots.get_mut(at)? = new;
        } else {
            self.remove(new.id)?;
            self.insert(new);
        }
        Some(old)
    }

    fn at_base(&self, base: Gfn) -> Option<&Memslot> {
        let at = self.slots.binary_search_by_key(&base, |slot| slot.base_gfn).ok()?;
        self.slots.get(at)
    }

    /// Recompute `reach` from the entry at `from` on.
    fn update_reach(&mut self, from: usize) {
        let before = from.checked_sub(1).and_then(|at| self.hosts.get(at));
        let mut reach = before.map_or(0, |entry| entry.reach);
        for entry in self.hosts.iter_mut().skip(from) {
            reach = reach.max(entry.end);
            entry.reach = reach;
        }
    }
}

fn copy<T: Copy>(to: &mut Vec<T>, from: &[T]) {
    to.clear();
    to.extend_from_slice(from);
}
