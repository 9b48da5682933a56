//! [`AttributeMap`]: the attributes of every gfn, as a value.
//!
//! Kept as edges: gfns at which the attributes change, ascending, each with what holds from there
//! on. Neighbouring runs therefore always differ, an edge inside a range is exactly what makes it
//! mixed, and a change adds at most two edges however long its range is.
//!
//! No locks, no ordering: whoever changes a map holds it by `&mut`. Memory is found beforehand
//! ([`AttributeMap::reserve_for`]).

use alloc::vec::Vec;
use arrayvec::ArrayVec;

use super::{AttributeError, Attributes};
use crate::addr::{Gfn, GfnRange};

/// Edges that one change may add.
const EDGES_PER_CHANGE: usize = 2;

/// From `from` on, up to the next edge, the attributes are `attributes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edge {
    from: Gfn,
    attributes: Attributes,
}

/// Neighbouring pages with the same attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The pages.
    pub range: GfnRange,
    /// Their attributes.
    pub attributes: Attributes,
}

/// The attributes of every gfn. See the file's head.
///
/// Having an `AttributeMap` tells you: it has at most the edges that it was made for. Looking up
/// costs the logarithm of their number, changing moves those behind the range.
#[derive(Debug)]
pub struct AttributeMap {
    /// Ascending; neighbours differ in their attributes; before the first, nothing is set.
    edges: Vec<Edge>,
    limit: usize,
}

impl AttributeMap {
    /// Nothing is set anywhere. `limit` bounds the gfns at which attributes may change, 16 bytes
    /// each; no memory is taken yet.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { edges: Vec::new(), limit }
    }

    /// Does no page have any attribute?
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.edges.is_empty()
    }

    /// Gfns at which the attributes change; what a map costs.
    #[must_use]
    pub fn edges(&self) -> usize {
        self.edges.len()
    }

    /// The attributes of `gfn`.
    #[must_use]
    pub fn get(&self, gfn: Gfn) -> Attributes {
        self.before(self.edges.partition_point(|edge| edge.from <= gfn))
    }

    /// What holds up to the edge `index`.
    fn before(&self, index: usize) -> Attributes {
        let last = index.checked_sub(1).and_then(|last| self.edges.get(last));
        last.map_or(Attributes::empty(), |edge| edge.attributes)
    }

    /// Do all pages of `range` have the same attributes? True of an empty range.
    #[must_use]
    pub fn is_uniform(&self, range: GfnRange) -> bool {
        let after = self.edges.partition_point(|edge| edge.from <= range.start);
        self.edges.get(after).is_none_or(|edge| edge.from >= range.end)
    }

    /// Do all pages of `range` have exactly `attributes`? True of an empty range.
    #[must_use]
    pub fn all_are(&self, range: GfnRange, attributes: Attributes) -> bool {
        range.is_empty() || (self.is_uniform(range) && self.get(range.start) == attributes)
    }

    /// `range` cut into runs, ascending, pages without attributes included. Neighbouring runs
    /// differ.
    pub fn runs(&self, range: GfnRange) -> impl Iterator<Item = Run> + '_ {
        let mut at = range.start;
        core::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let after = self.edges.partition_point(|edge| edge.from <= at);
            let end = self.edges.get(after).map_or(range.end, |edge| edge.from.min(range.end));
            let run = Run { range: GfnRange::new(at, end), attributes: self.before(after) };
            at = end;
            Some(run)
        })
    }

    /// Check a change and find the memory for it: [`set`](Self::set) does not fail afterwards.
    ///
    /// # Errors
    /// [`AttributeError`]; nothing is different, but memory may have been set aside.
    pub fn reserve_for(
        &mut self,
        range: GfnRange,
        attributes: Attributes,
    ) -> Result<(), AttributeError> {
        check(range, attributes)?;
        let needed = self.plan(range, attributes).edges(self.edges.len());
        if needed > self.limit {
            return Err(AttributeError::TooManyEdges { needed, limit: self.limit });
        }
        let no_memory = |_| AttributeError::NoMemory { needed };
        self.edges.try_reserve(EDGES_PER_CHANGE).map_err(no_memory)
    }

    /// Give `range` exactly `attributes`.
    ///
    /// # Errors
    /// As [`reserve_for`](Self::reserve_for); the map is as it was.
    pub fn set(&mut self, range: GfnRange, attributes: Attributes) -> Result<(), AttributeError> {
        self.reserve_for(range, attributes)?;
        let Plan { first, last, new } = self.plan(range, attributes);
        // The room is there and the iterator knows its length, so this does not allocate.
        self.edges.splice(first..last, new);
        Ok(())
    }

    /// What a change of `range` makes of the edges. A map in which the change was done already
    /// plans to replace edges by the same.
    fn plan(&self, range: GfnRange, attributes: Attributes) -> Plan {
        // Edges at both ends go too: whether there is one depends on what it then parts.
        let first = self.edges.partition_point(|edge| edge.from < range.start);
        let last = self.edges.partition_point(|edge| edge.from <= range.end);
        let (outside_before, outside_after) = (self.before(first), self.before(last));
        let mut new = ArrayVec::new_const();
        if outside_before != attributes {
            new.push(Edge { from: range.start, attributes });
        }
        if outside_after != attributes {
            new.push(Edge { from: range.end, attributes: outside_after });
        }
        Plan { first, last, new }
    }
}

/// Replace the edges `first..last` by `new`.
struct Plan {
    first: usize,
    last: usize,
    new: ArrayVec<Edge, EDGES_PER_CHANGE>,
}

impl Plan {
    /// Edges afterwards, of `now`.
    fn edges(&self, now: usize) -> usize {
        (now + self.new.len()).saturating_sub(self.last - self.first)
    }
}

/// Is it a change that can be asked for at all?
pub(super) fn check(range: GfnRange, attributes: Attributes) -> Result<(), AttributeError> {
    if range.is_empty() || !GfnRange::ALL.covers(range) {
        return Err(AttributeError::BadRange { range });
    }
    if !Attributes::all().contains(attributes) {
        return Err(AttributeError::UnknownFlags { bits: attributes.bits() });
    }
    Ok(())
}
