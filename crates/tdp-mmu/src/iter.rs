//! The walk over a tree: pre-order, restartable, external.
//!
//! Owns [`TdpIter`] (KVM rows 2.1 to 2.11), its [`Step`] and its [`Cursor`]. An iterator lives
//! inside one section and hands out entries for that section's lifetime; to let others proceed it
//! is turned into a `Cursor` ([`TdpIter::suspend`]), the section is closed, and [`TdpIter::resume`]
//! goes on in the next one. An iterator that was suspended is gone, so it cannot hand out an entry
//! (row 2.10).
//!
//! Ordering: entries are read with [`SpteCell::load`], whose Acquire pairs with the Release of the
//! link, so a table is initialised when the walk enters it.

use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::epoch::EpochGuard;
use mmu_core::frame::{PageTable, PhysMap, TablePool};
use mmu_core::spte::Spte;
use mmu_core::spte::cell::SpteCell;
use mmu_core::sync::ENTRIES;

use crate::scan;

/// An entry as the walk found it: where it is, and a snapshot of what it held.
#[derive(Clone, Copy, Debug)]
pub struct Step<'g> {
    /// The entry. Others may have changed it since.
    pub cell: &'g SpteCell,
    /// What it held.
    pub spte: Spte,
    /// First gfn it maps; may lie before the walk's start (row 2.3).
    pub gfn: Gfn,
    /// Its level.
    pub level: Level,
}

impl Step<'_> {
    /// The gfns it maps.
    #[inline]
    #[must_use]
    pub const fn range(&self) -> GfnRange {
        GfnRange::from_len(self.gfn, self.level.pages())
    }
}

/// Where a suspended walk goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    next: Gfn,
    yielded: Option<Gfn>,
    end: Gfn,
    min_level: Level,
}

impl Cursor {
    /// A walk over `range` that visits no entry below `min_level`.
    #[must_use]
    pub const fn new(range: GfnRange, min_level: Level) -> Self {
        Self { next: range.start, yielded: None, end: range.end, min_level }
    }

    /// The gfn the walk is heading for.
    #[must_use]
    pub const fn next(&self) -> Gfn {
        self.next
    }

    /// The same walk, going on at `gfn`, or at its start if that lies before.
    #[must_use]
    pub fn moved_to(self, gfn: Gfn) -> Self {
        Self { next: self.next.max(gfn), ..self }
    }

    /// Where the walk ends.
    #[must_use]
    pub(crate) const fn end(&self) -> Gfn {
        self.end
    }

    /// Is nothing left?
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.next >= self.end
    }
}

/// A pre-order walk over the entries that map a range.
#[doc(alias = "tdp_iter")]
#[derive(Debug)]
pub struct TdpIter<'g, P: PhysMap> {
    pool: &'g TablePool<P>,
    section: &'g EpochGuard<'g>,
    /// The table at each level on the way to the current entry; index by `Level::slot`.
    path: [Option<&'g PageTable>; 5],
    root_level: Level,
    /// Address bits of links that are not frame address.
    encryption: u64,
    level: Level,
    /// Current entry's first gfn.
    gfn: Gfn,
    started: bool,
    /// The walk does not enter what is below the current entry.
    skip: bool,
    cursor: Cursor,
}

impl<'g, P: PhysMap> TdpIter<'g, P> {
    /// Walk the tree under the table `root`, which stands at `root_level`.
    #[must_use]
    pub fn new(
        pool: &'g TablePool<P>,
        section: &'g EpochGuard<'g>,
        root: Pfn,
        root_level: Level,
        cursor: Cursor,
    ) -> Self {
        let mut path = [None; 5];
        let min_level = cursor.min_level.min(root_level);
        let reach = GfnRange::from_len(Gfn::new(0), root_level.table_pages());
        let end = cursor.end.min(reach.end);
        if let Some(top) = path.get_mut(root_level.slot()) {
            *top = Some(pool.table(section, root));
        }
        Self {
            pool,
            section,
            path,
            root_level,
            encryption: 0,
            level: root_level,
            gfn: cursor.next.align_down(root_level),
            started: false,
            skip: false,
            cursor: Cursor { end, min_level, ..cursor },
        }
    }

    /// Go on with a suspended walk, in a new section: from the root towards the gfn it was heading
    /// for. The entry that was current is visited again (row 2.9).
    #[must_use]
    pub fn resume(
        pool: &'g TablePool<P>,
        section: &'g EpochGuard<'g>,
        root: Pfn,
        root_level: Level,
        cursor: Cursor,
    ) -> Self {
        Self::new(pool, section, root, root_level, cursor)
    }

    /// The same walk over a tree whose links carry bits of `mask` that are not frame address
    /// ([`SpteConfig::encryption_mask`](mmu_core::spte::SpteConfig::encryption_mask)).
    #[inline]
    #[must_use]
    pub fn with_encryption(self, mask: u64) -> Self {
        Self { encryption: mask, ..self }
    }

    /// Stop here, to close the section and go on later.
    ///
    /// # Errors
    /// The iterator itself when it has not advanced by a gfn since it was resumed: two walks that
    /// yield to each other would otherwise never finish (row 2.8, invariant I23).
    pub fn suspend(self) -> Result<Cursor, Self> {
        // INVARIANT[I23]: a walk that gives way has moved on.
        if self.cursor.yielded == Some(self.cursor.next) {
            return Err(self);
        }
        Ok(Cursor { yielded: Some(self.cursor.next), ..self.cursor })
    }

    /// Leave out everything below the current entry: the next step is the one after it in its own
    /// table, or in one above (KVM row 2.16). Does nothing before the first step.
    #[inline]
    pub const fn skip_subtree(&mut self) {
        self.skip = self.started;
    }

    /// How many entries, from the current one on and in its table, are links without `bit`: at most
    /// `most`, at least the current one. Reads them relaxed: see [`scan`].
    pub(crate) fn links_without(&self, bit: u64, most: usize) -> usize {
        let Some(table) = self.table() else { return 1 };
        let pages = self.level.pages();
        let inside = self.cursor.end.distance_from(self.gfn).div_ceil(pages);
        let most = most.min(usize::try_from(inside).unwrap_or(ENTRIES));
        let first = self.gfn.index(self.level) + 1;
        let end = (first + most.saturating_sub(1)).min(ENTRIES);
        let cells = table.entries().get(first..end).unwrap_or(&[]);
        1 + scan::links_without(cells, bit)
    }

    /// Leave out the current entry with everything below it, and the entries after it in its table,
    /// so many in all.
    pub(crate) fn skip_entries(&mut self, entries: usize) {
        let more = mmu_core::addr::to_u64(entries.saturating_sub(1));
        if more != 0 {
            self.gfn = self.gfn.saturating_add(more.saturating_mul(self.level.pages()));
            self.cursor.next = self.gfn;
        }
        self.skip_subtree();
    }

    /// Where the walk is heading: every entry for gfns before this has been visited.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Entries from the current step's child table, when the step is a level-2 link and the walk
    /// does not descend itself (`min_level` 2): the table and the part of it inside the walk.
    #[inline]
    #[must_use]
    pub fn leaf_table(&self, step: &Step<'_>, range: GfnRange) -> Option<LeafTable<'g>> {
        if step.level != Level::L2 || !step.spte.is_table(Level::L2) {
            return None;
        }
        let inside = step.range().intersection(range);
        let first = inside.start.index(Level::L1);
        let count = usize::try_from(inside.len()).unwrap_or(0).min(ENTRIES - first);
        let table = self.pool.table(self.section, self.frame(step.spte));
        let next_link = self.next_link();
        let next = next_link.map(|link| self.pool.table(self.section, self.frame(link)));
        let next_link = next_link.unwrap_or(Spte::EMPTY);
        Some(LeafTable { table, base: step.gfn, first, count, next, next_link })
    }

    /// The entry after the current one, if it is a link: what a scan comes to next.
    #[inline]
    fn next_link(&self) -> Option<Spte> {
        if cfg!(loom) {
            // A hint is not worth the interleavings.
            return None;
        }
        let link = self.table()?.entries().get(self.gfn.index(self.level) + 1)?.load();
        link.is_table(self.level).then_some(link)
    }

    #[inline]
    fn frame(&self, link: Spte) -> Pfn {
        link.without(self.encryption).pfn()
    }

    fn table(&self) -> Option<&'g PageTable> {
        self.path.get(self.level.slot()).copied().flatten()
    }

    fn step(&self) -> Option<Step<'g>> {
        let cell = self.table()?.cell(self.gfn, self.level);
        Some(Step { cell, spte: cell.load(), gfn: self.gfn, level: self.level })
    }

    /// Into the child table of the current entry, read again: the walk follows what the caller
    /// just wrote and does not enter a table unlinked meanwhile (row 2.6).
    fn try_down(&mut self) -> bool {
        if self.level == self.cursor.min_level {
            return false;
        }
        let (Some(child_level), Some(step)) = (self.level.down(), self.step()) else {
            return false;
        };
        if !step.spte.is_table(self.level) {
            return false;
        }
        let frame = self.frame(step.spte);
        if let Some(slot) = self.path.get_mut(child_level.slot()) {
            *slot = Some(self.pool.table(self.section, frame));
        }
        self.level = child_level;
        self.gfn = self.cursor.next.align_down(child_level);
        true
    }

    /// To the next entry of the same table.
    fn try_side(&mut self) -> bool {
        if self.gfn.index(self.level) == ENTRIES - 1 {
            return false;
        }
        self.gfn = self.gfn.saturating_add(self.level.pages());
        self.cursor.next = self.gfn;
        true
    }

    /// To the parent's entry.
    fn try_up(&mut self) -> bool {
        match self.level.up() {
            Some(up) if self.level < self.root_level => {
                self.level = up;
                self.gfn = self.gfn.align_down(up);
                true
            }
            _ => false,
        }
    }

    fn advance(&mut self) -> bool {
        let skip = core::mem::take(&mut self.skip);
        if !skip && self.try_down() {
            return true;
        }
        // At most five levels to climb.
        loop {
            if self.try_side() {
                return true;
            }
            if !self.try_up() {
                self.cursor.next = self.cursor.end.max(self.cursor.next);
                return false;
            }
        }
    }
}

impl<'g, P: PhysMap> Iterator for TdpIter<'g, P> {
    type Item = Step<'g>;

    #[inline]
    fn next(&mut self) -> Option<Step<'g>> {
        if self.cursor.is_done() {
            return None;
        }
        if self.started {
            if !self.advance() || self.cursor.is_done() {
                return None;
            }
        } else {
            self.started = true;
        }
        self.step()
    }
}

/// A level-1 table, or a part of it, to be scanned in one loop.
#[derive(Clone, Copy, Debug)]
pub struct LeafTable<'g> {
    /// The table.
    pub table: &'g PageTable,
    /// Gfn of its entry 0.
    pub base: Gfn,
    /// First entry inside the walk's range.
    pub first: usize,
    /// Entries inside the walk's range.
    pub count: usize,
    /// The table for the gfns after this one's, if the walk met it: to be fetched ahead.
    pub next: Option<&'g PageTable>,
    /// The link to that table as it was then; empty without one.
    pub next_link: Spte,
}

impl<'g> LeafTable<'g> {
    /// The entries inside the range, with their gfns.
    #[inline]
    pub fn steps(&self) -> impl Iterator<Item = Step<'g>> + use<'g> {
        let cells = self.cells();
        let first = self.base.saturating_add(mmu_core::addr::to_u64(self.first));
        let mut gfn = first.get();
        cells.iter().map(move |cell| {
            let at = Gfn::new(gfn);
            gfn += 1;
            Step { cell, spte: cell.peek(), gfn: at, level: Level::L1 }
        })
    }

    /// The entries inside the range.
    #[inline]
    #[must_use]
    pub fn cells(&self) -> &'g [SpteCell] {
        self.table.entries().get(self.first..self.first + self.count).unwrap_or(&[])
    }
}
