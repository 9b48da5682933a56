//! [`MapModel`]: what a mapping layer (a TDP or a shadow MMU) must look like from outside.
//!
//! A sorted map from guest pages to host pages with the three facts that matter: writable, young,
//! dirty. It knows no tables, sizes, locks or flushes. `young` and `dirty` are exact: touched or
//! written since last cleared. An implementation may report more, never less, except where a TLB
//! that was not flushed hides a touch.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// What the host has for a guest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Host page number.
    pub pfn: u64,
    /// The host lets the guest write it.
    pub writable: bool,
}

/// A mapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Host page number.
    pub pfn: u64,
    /// The guest can write without a fault.
    pub writable: bool,
    /// Touched since it was mapped or last aged.
    pub young: bool,
    /// Written since it was mapped or last cleaned.
    pub dirty: bool,
}

/// How a fault was resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fixed {
    /// A page was mapped, or became writable.
    Installed,
    /// Nothing was missing.
    Spurious,
}

/// Why there is no access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The page is not mapped; a fault may map it.
    NotMapped,
    /// The page is mapped read-only; a fault may make it writable.
    ReadOnly,
    /// The host has nothing there.
    NoBacking,
    /// The host forbids writing.
    BackingReadOnly,
}

/// The model. `B` tells what the host has for a guest page at the moment of a fault.
#[derive(Clone, Debug)]
pub struct MapModel<B> {
    pages: BTreeMap<u64, Page>,
    backing: B,
}

impl<B: Fn(u64) -> Option<Backing>> MapModel<B> {
    /// A model with nothing mapped.
    #[must_use]
    pub const fn new(backing: B) -> Self {
        Self { pages: BTreeMap::new(), backing }
    }

    /// Resolve a fault: the page becomes mapped, as writable as the host allows, and young (also
    /// dirty for a write, since the guest is about to do it).
    ///
    /// # Errors
    ///
    /// [`Refusal::NoBacking`] or [`Refusal::BackingReadOnly`]; nothing changes then.
    pub fn fault(&mut self, gfn: u64, write: bool) -> Result<Fixed, Refusal> {
        if let Some(page) = self.pages.get(&gfn) {
            if page.writable || !write {
                return Ok(Fixed::Spurious);
            }
        }
        let backing = (self.backing)(gfn).ok_or(Refusal::NoBacking)?;
        if write && !backing.writable {
            return Err(Refusal::BackingReadOnly);
        }
        let was_dirty = self.pages.get(&gfn).is_some_and(|page| page.dirty);
        let page = Page {
            pfn: backing.pfn,
            writable: backing.writable,
            young: true,
            dirty: write || was_dirty,
        };
        self.pages.insert(gfn, page);
        Ok(Fixed::Installed)
    }

    /// The guest's access itself. Gives the host page.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotMapped`] or [`Refusal::ReadOnly`]: the guest faults.
    pub fn touch(&mut self, gfn: u64, write: bool) -> Result<u64, Refusal> {
        let page = self.pages.get_mut(&gfn).ok_or(Refusal::NotMapped)?;
        if write && !page.writable {
            return Err(Refusal::ReadOnly);
        }
        page.young = true;
        page.dirty |= write;
        Ok(page.pfn)
    }

    /// Unmap. Gives what was mapped.
    pub fn zap(&mut self, range: Range<u64>) -> BTreeMap<u64, Page> {
        let gfns: Vec<u64> = self.range(range).map(|(gfn, _)| gfn).collect();
        let taken = gfns.into_iter();
        taken.filter_map(|gfn| self.pages.remove_entry(&gfn)).collect()
    }

    /// Which pages are young? They are not afterwards.
    pub fn age(&mut self, range: Range<u64>) -> BTreeSet<u64> {
        self.change(range, |page| std::mem::take(&mut page.young))
    }

    /// Which pages are dirty? They are not afterwards, and stay writable.
    pub fn clean(&mut self, range: Range<u64>) -> BTreeSet<u64> {
        self.change(range, |page| std::mem::take(&mut page.dirty))
    }

    /// Which pages are writable? They are not afterwards.
    pub fn write_protect(&mut self, range: Range<u64>) -> BTreeSet<u64> {
        self.change(range, |page| std::mem::take(&mut page.writable))
    }

    /// Is any page of the range young? Changes nothing.
    #[must_use]
    pub fn any_young(&self, range: Range<u64>) -> bool {
        self.range(range).any(|(_, page)| page.young)
    }

    /// One page.
    #[must_use]
    pub fn get(&self, gfn: u64) -> Option<Page> {
        self.pages.get(&gfn).copied()
    }

    /// The mapped pages of a range, ascending.
    pub fn range(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Page)> + '_ {
        // A `BTreeMap` panics on a reversed range.
        let end = range.end.max(range.start);
        let pages = self.pages.range(range.start..end);
        pages.map(|(&gfn, &page)| (gfn, page))
    }

    /// Pages mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Nothing mapped?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    fn change(&mut self, range: Range<u64>, f: impl Fn(&mut Page) -> bool) -> BTreeSet<u64> {
        let end = range.end.max(range.start);
        let pages = self.pages.range_mut(range.start..end);
        let changed = pages.filter_map(|(&gfn, page)| f(page).then_some(gfn));
        changed.collect()
    }
}
