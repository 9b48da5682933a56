//! A sparse array that grows while others read it: nothing allocated before the first element, and
//! what is there never moves.
//!
//! Owns [`Radix`], which holds the heads of reverse maps by gfn, their descriptors and the frames
//! of shadow pages by number. A lookup is one `Acquire` load a level (tag `set-once`, in
//! `mmu_core`), and takes no lock. Memory is given back when the array is dropped.

use alloc::boxed::Box;
use alloc::vec::Vec;

use mmu_core::addr::{to_index, to_u64};
use mmu_core::epoch::publish::SetOnce;

/// log2 of the elements of a node: 4 KiB of words. Small in models, where each word costs.
const NODE_BITS: u32 = if cfg!(loom) { 3 } else { 9 };
/// Elements of a node.
const NODE: usize = 1 << NODE_BITS;

/// No memory for part of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoMemory {
    /// Bytes asked for.
    pub(crate) bytes: u64,
}

/// See the file's head.
#[derive(Debug)]
pub(crate) struct Radix<T> {
    /// Bits of an index that the levels below the root tell apart.
    shift: u32,
    root: SetOnce<Node<T>>,
}

#[derive(Debug)]
enum Node<T> {
    Inner(Box<[SetOnce<Node<T>>]>),
    Leaf(Box<[T]>),
}

impl<T: Default> Radix<T> {
    /// For indices below `1 << bits`.
    pub(crate) fn new(bits: u32) -> Self {
        let levels = bits.div_ceil(NODE_BITS).max(1);
        Self { shift: (levels - 1) * NODE_BITS, root: SetOnce::new() }
    }

    /// The element at `index`, if its part of the array was ever [provided](Self::provide).
    #[inline]
    pub(crate) fn get(&self, index: u64) -> Option<&T> {
        self.part(index)?.get(digit(index, 0))
    }

    /// For lookups of indices that lie near one another.
    pub(crate) fn near(&self) -> Near<'_, T> {
        Near { array: self, last: None }
    }

    /// The elements that were provided together with the one at `index`.
    #[inline]
    fn part(&self, index: u64) -> Option<&[T]> {
        let mut place = self.place(index)?;
        let mut shift = self.shift;
        loop {
            match place.get()? {
                Node::Leaf(elements) => return Some(elements),
                Node::Inner(places) => place = places.get(digit(index, shift))?,
            }
            shift = shift.saturating_sub(NODE_BITS);
        }
    }

    /// The element at `index`, with its memory; `None` beyond the end.
    ///
    /// # Errors
    /// [`NoMemory`]: the elements are as before, nodes on the way may have been made.
    pub(crate) fn provide(&self, index: u64) -> Result<Option<&T>, NoMemory> {
        let Some(mut place) = self.place(index) else { return Ok(None) };
        let mut shift = self.shift;
        loop {
            let node = match place.get() {
                Some(node) => node,
                None if shift == 0 => place.get_or_set(Node::Leaf(array()?)),
                None => place.get_or_set(Node::Inner(array()?)),
            };
            match node {
                Node::Leaf(elements) => return Ok(elements.get(digit(index, 0))),
                Node::Inner(places) => {
                    let Some(next) = places.get(digit(index, shift)) else { return Ok(None) };
                    place = next;
                }
            }
            shift = shift.saturating_sub(NODE_BITS);
        }
    }

    /// The root, unless `index` lies beyond the end.
    fn place(&self, index: u64) -> Option<&SetOnce<Node<T>>> {
        (index >> self.shift < to_u64(NODE)).then_some(&self.root)
    }

    /// The first index from `from` on, below `end`, whose element has memory: what a walk over a
    /// range goes to next, so that it pays for what is there and not for the range.
    pub(crate) fn next_provided(&self, from: u64, end: u64) -> Option<u64> {
        let mut index = from;
        while index < end {
            match self.missing_at(index)? {
                None => return Some(index),
                // The part under `shift` bits is missing: go on behind it.
                Some(shift) => index = ((index >> shift) + 1).checked_shl(shift)?,
            }
        }
        None
    }

    /// `Some(None)` if there is an element at `index`, else how many bits of the index are alike
    /// missing around it; `None` beyond the end.
    fn missing_at(&self, index: u64) -> Option<Option<u32>> {
        let mut place = self.place(index)?;
        let mut shift = self.shift;
        loop {
            match place.get() {
                None => return Some(Some(shift + NODE_BITS)),
                Some(Node::Leaf(_)) => return Some(None),
                Some(Node::Inner(places)) => place = places.get(digit(index, shift))?,
            }
            shift = shift.saturating_sub(NODE_BITS);
        }
    }

    /// Bytes of all nodes, for statistics: walks them.
    pub(crate) fn bytes(&self) -> u64 {
        self.root.get().map_or(0, Node::bytes)
    }
}

impl<T> Node<T> {
    /// With those below, a few levels of them.
    fn bytes(&self) -> u64 {
        match self {
            Self::Leaf(elements) => to_u64(size_of_val::<[T]>(elements)),
            Self::Inner(places) => {
                let below: u64 = places.iter().filter_map(SetOnce::get).map(Self::bytes).sum();
                to_u64(size_of_val::<[SetOnce<Self>]>(places)) + below
            }
        }
    }
}

/// Looks up one element after the other, and finds the part that several lie in once: what is there
/// never moves. What is missing is missing until [`Near::forget`].
#[derive(Debug)]
pub(crate) struct Near<'a, T> {
    array: &'a Radix<T>,
    /// The part looked at last, by the indices' bits above it; without elements if it is missing.
    last: Option<(u64, &'a [T])>,
}

impl<'a, T: Default> Near<'a, T> {
    /// As [`Radix::get`], at the time of the first lookup in the part.
    #[inline]
    pub(crate) fn get(&mut self, index: u64) -> Option<&'a T> {
        let above = index >> NODE_BITS;
        let part = match self.last {
            Some((known, part)) if known == above => part,
            _ => {
                let part = self.array.part(index).unwrap_or_default();
                self.last = Some((above, part));
                part
            }
        };
        part.get(digit(index, 0))
    }

    /// Look again for what was missing.
    pub(crate) fn forget(&mut self) {
        self.last = self.last.filter(|(_, part)| !part.is_empty());
    }
}

/// The nine bits of `index` from bit `shift` on.
const fn digit(index: u64, shift: u32) -> usize {
    to_index(index >> shift) % NODE
}

/// A node's array of default values.
fn array<T: Default>() -> Result<Box<[T]>, NoMemory> {
    let mut array = Vec::new();
    let bytes = to_u64(NODE * size_of::<T>());
    array.try_reserve_exact(NODE).map_err(|_| NoMemory { bytes })?;
    array.resize_with(NODE, T::default);
    Ok(array.into_boxed_slice())
}

#[cfg(test)]
mod tests {
    use std::vec;

    use mmu_core::sync::plain::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn nothing_is_there_until_it_is_provided() {
        let array: Radix<AtomicU64> = Radix::new(36);
        assert_eq!(array.bytes(), 0);
        let last = (1 << 36) - 1;
        for index in [0, 511, 512, 1 << 20, last] {
            assert!(array.get(index).is_none() || index == 511, "{index:#x}");
            array.provide(index).unwrap().unwrap().store(index + 1, Ordering::Relaxed);
            assert_eq!(array.get(index).unwrap().load(Ordering::Relaxed), index + 1);
        }
        for beyond in [1 << 36, u64::MAX] {
            assert!(array.get(beyond).is_none());
            assert_eq!(array.provide(beyond).map(|element| element.is_some()), Ok(false));
        }
    }

    #[test]
    fn a_walk_goes_from_one_part_that_is_there_to_the_next() {
        let array: Radix<AtomicU64> = Radix::new(36);
        assert_eq!(array.next_provided(0, u64::MAX), None);
        for index in [700, 1 << 20, (1 << 36) - 1] {
            let _ = array.provide(index);
        }
        let mut found = vec![];
        let mut from = 0;
        while let Some(index) = array.next_provided(from, u64::MAX) {
            found.push(index);
            from = (index | 511) + 1;
        }
        assert_eq!(found, [512, 1 << 20, (1 << 36) - 512]);
        assert_eq!(array.next_provided(600, 1000), Some(600));
        assert_eq!(array.next_provided(0, 512), None);
        assert_eq!(array.next_provided(1 << 36, u64::MAX), None);
    }

    #[test]
    fn near_lookups_find_what_single_ones_find() {
        let array: Radix<AtomicU64> = Radix::new(36);
        let mut near = array.near();
        for index in [0, 1, 511, 512, 513, 0, 1 << 20, 512, (1 << 36) - 1, 1 << 36, u64::MAX] {
            // Before it is there, and after.
            assert_eq!(near.get(index).is_some(), array.get(index).is_some(), "{index:#x}");
            let _ = array.provide(index);
            near.forget();
            let found = (near.get(index), array.get(index));
            let same = found.0.zip(found.1).map(|(near, single)| core::ptr::eq(near, single));
            assert_eq!(same, array.get(index).map(|_| true), "{index:#x}");
        }
    }

    #[test]
    fn what_is_missing_is_looked_for_again_when_asked() {
        let array: Radix<AtomicU64> = Radix::new(36);
        let mut near = array.near();
        assert!(near.get(7).is_none());
        let _ = array.provide(7);
        assert!(near.get(7).is_none(), "not before");
        near.forget();
        assert!(near.get(7).is_some() && array.get(7).is_some());
    }

    #[test]
    fn a_small_array_is_one_node() {
        let array: Radix<AtomicU64> = Radix::new(1);
        let _ = array.provide(1);
        assert_eq!(array.bytes(), 4096);
    }
}
