//! Looking up entries without changing anything (KVM row 2.15).
//!
//! Owns [`Walk`] (the entry for a gfn and how the walk got there), [`TdpMmu::lookup`], its words
//! ([`Path`]), the check of a path after an impossible fault, and [`Walker`], which answers many
//! questions in one section. Runs in epoch sections only.

use core::fmt;

use arrayvec::ArrayVec;

use mmu_core::addr::{Gfn, Level, Pfn};
use mmu_core::epoch::EpochGuard;
use mmu_core::frame::TablePool;
use mmu_core::frame::raw::prefetch;
use mmu_core::spte::{Spte, SpteConfig, SpteFormat, SpteKind};
use mmu_core::traits::Host;
use mmu_core::vm::{Actor, PinnedWork};

use crate::iter::Step;
use crate::mmu::TdpMmu;
use crate::recent::Recent;
use crate::root::{FoundRoot, RootFilter, RootRef};

/// The entries on the way to a gfn, from the root down; the last one is a leaf or not present.
pub type Walk = ArrayVec<(Level, Spte), 5>;

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// The entry that maps `gfn`, or the one that says it is not mapped.
    #[inline(always)]
    pub(crate) fn last_step<'g>(
        &self,
        pool: &'g TablePool<H>,
        section: &'g EpochGuard<'_>,
        recent: &mut Recent,
        root: &RootRef,
        gfn: Gfn,
    ) -> Step<'g> {
        let unlinked = pool.unlinked();
        if let Some((frame, level)) = recent.table(gfn, unlinked) {
            let cell = pool.table(section, frame).cell(gfn, level);
            let spte = cell.load();
            if !spte.is_table(level) {
                return Step { cell, spte, gfn: gfn.align_down(level), level };
            }
        }
        self.last_step_by_walk(pool, section, (recent, unlinked), root, gfn)
    }

    #[inline(never)]
    fn last_step_by_walk<'g>(
        &self,
        pool: &'g TablePool<H>,
        section: &'g EpochGuard<'_>,
        (recent, unlinked): (&mut Recent, u64),
        root: &RootRef,
        gfn: Gfn,
    ) -> Step<'g> {
        let (mut frame, mut level) = (root.frame, root.role.level());
        loop {
            let cell = pool.table(section, frame).cell(gfn, level);
            let spte = cell.load();
            if !spte.is_table(level) {
                recent.note(gfn, (frame, level), unlinked);
                return Step { cell, spte, gfn: gfn.align_down(level), level };
            }
            frame = self.config().pfn(spte);
            level = level.below();
        }
    }

    /// A view of the tree of address space `space` for many lookups, in one section: keep it for as
    /// long as a slice of work lasts and no longer. `None` when no root of that space exists.
    #[must_use]
    pub fn walker<'a>(&'a self, actor: &'a mut Actor<H>, space: u8) -> Option<Walker<'a, F, H>> {
        let work = actor.pinned();
        let role = self.role(space);
        let root = (0..self.roots().reach())
            .filter_map(|index| self.roots().get(index, RootFilter::Valid))
            .find(|root| root.role == role)?;
        Some(Walker { mmu: self, work, root, recent: (Gfn::new(u64::MAX), root.frame) })
    }

    /// What maps `gfn` in the tree of address space `space`: every entry from the root down.
    /// Empty when no root of that space exists. Ends with an entry that is not as we make it:
    /// where that leads, nobody knows.
    #[must_use]
    pub fn lookup(&self, actor: &mut Actor<H>, space: u8, gfn: Gfn) -> Walk {
        let work = actor.pinned();
        let role = self.role(space);
        let mut walk = Walk::new();
        let root = (0..self.roots().reach())
            .filter_map(|index| self.roots().get(index, RootFilter::Valid))
            .find(|root| root.role == role);
        let Some(root) = root.filter(|_| gfn < self.config().max_gfn_exclusive()) else {
            return walk;
        };
        let mut level = root.role.level();
        let mut table = work.vm.pool().table(&work.section, root.frame);
        // What links are made of, apart from the frame.
        let link = self.config().table(Pfn::new(0), Level::L2);
        loop {
            let spte = table.cell(gfn, level).load();
            walk.push((level, spte));
            if !spte.is_table(level) {
                return walk;
            }
            let frame = self.config().pfn(spte);
            let usual = spte.with(link.raw() & F::ACCESSED) == link.with(frame.address().get())
                && frame < self.config().max_pfn_exclusive();
            if !usual && self.is_bad(spte, level) {
                return walk;
            }
            table = work.vm.pool().table(&work.section, frame);
            level = level.below();
        }
    }
}

/// The path to a gfn after a fault that should not have been (KVM row 1.33).
impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Is it an entry that we do not make: of no class, or present with bits that hardware
    /// reserves? MMIO entries have such bits on purpose.
    fn is_bad(&self, spte: Spte, level: Level) -> bool {
        match self.config().kind(spte, level) {
            SpteKind::Empty | SpteKind::Frozen | SpteKind::Mmio => false,
            SpteKind::Table | SpteKind::Leaf => self.config().reserved_bits(spte, level) != 0,
            SpteKind::Corrupt => true,
        }
    }

    /// The last entry on the way to `gfn`. No entry is followed before it was looked at.
    ///
    /// # Errors
    /// The first entry that we do not make.
    #[cold]
    pub(crate) fn inspect(
        &self,
        pool: &TablePool<H>,
        section: &EpochGuard<'_>,
        root: &RootRef,
        gfn: Gfn,
    ) -> Result<Spte, (Level, Spte)> {
        let (mut frame, mut level) = (root.frame, root.role.level());
        loop {
            let spte = pool.table(section, frame).cell(gfn, level).load();
            if self.is_bad(spte, level) {
                return Err((level, spte));
            }
            if !spte.is_table(level) {
                return Ok(spte);
            }
            frame = self.config().pfn(spte);
            level = level.below();
        }
    }

    /// [`lookup`](Self::lookup) in words, for the message that an impossible fault leaves behind.
    #[must_use]
    pub fn path(&self, actor: &mut Actor<H>, space: u8, gfn: Gfn) -> Path<'_, F> {
        Path { config: self.config(), gfn, walk: self.lookup(actor, space, gfn) }
    }
}

/// The entries on the way to a gfn, ready to print: one a line, from the root down, with the bits
/// that hardware rejects.
#[derive(Clone, Debug)]
pub struct Path<'m, F: SpteFormat> {
    config: &'m SpteConfig<F>,
    gfn: Gfn,
    /// The entries.
    pub walk: Walk,
}

impl<F: SpteFormat> fmt::Display for Path<'_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {}:", self.gfn)?;
        for &(level, spte) in &self.walk {
            let words = self.config.describe(spte, level);
            write!(f, "\n  {level} [{}] {:#018x} {words}", self.gfn.index(level), spte.raw())?;
            match self.config.reserved_bits(spte, level) {
                0 => {}
                bits => write!(f, ", reserved {bits:#x}")?,
            }
        }
        Ok(())
    }
}

/// Looks up one gfn after another in one section.
///
/// An answer is what an entry held at some moment while the walker existed. Neighbours are found
/// without walking from the root again.
pub struct Walker<'a, F: SpteFormat, H: Host> {
    mmu: &'a TdpMmu<F, H>,
    work: PinnedWork<'a, H>,
    root: FoundRoot,
    /// The level-1 table met last: its first gfn and its frame.
    recent: (Gfn, Pfn),
}

impl<F: SpteFormat, H: Host> Walker<'_, F, H> {
    /// The entry that maps `gfn`, or the one that says that it is not mapped, and its level. A gfn
    /// that no entry can map is not mapped.
    #[inline]
    pub fn entry(&mut self, gfn: Gfn) -> (Level, Spte) {
        if gfn.align_down(Level::L2) == self.recent.0 {
            let table = self.work.vm.pool().table(&self.work.section, self.recent.1);
            let spte = table.cell(gfn, Level::L1).load();
            // A table that was taken apart meanwhile answers nothing.
            if !spte.is_frozen() {
                return (Level::L1, spte);
            }
        }
        self.walk(gfn)
    }

    fn walk(&mut self, gfn: Gfn) -> (Level, Spte) {
        let (pool, section) = (self.work.vm.pool(), &self.work.section);
        let mut level = self.root.role.level();
        let mut frame = self.root.frame;
        if gfn >= self.mmu.config().max_gfn_exclusive() {
            return (level, Spte::EMPTY);
        }
        loop {
            let spte = pool.table(section, frame).cell(gfn, level).load();
            if !spte.is_table(level) {
                if level == Level::L1 {
                    self.recent = (gfn.align_down(Level::L2), frame);
                }
                return (level, spte);
            }
            frame = self.mmu.config().pfn(spte);
            level = level.below();
        }
    }

    /// The same for `N` gfns that need not be neighbours: the walks overlap, so that each waits for
    /// memory while the others do.
    #[must_use]
    pub fn entries<const N: usize>(&self, gfns: &[Gfn; N]) -> [(Level, Spte); N] {
        let (pool, section) = (self.work.vm.pool(), &self.work.section);
        let config = self.mmu.config();
        let mut level = self.root.role.level();
        let mut found = [(level, Spte::EMPTY); N];
        let root = Some(pool.table(section, self.root.frame));
        let reach = config.max_gfn_exclusive();
        let mut tables = gfns.map(|gfn| if gfn < reach { root } else { None });
        loop {
            for ((table, gfn), answer) in tables.iter_mut().zip(gfns).zip(&mut found) {
                let Some(here) = *table else { continue };
                let spte = here.cell(*gfn, level).load();
                *answer = (level, spte);
                *table = spte.is_table(level).then(|| {
                    let below = pool.table(section, config.pfn(spte));
                    prefetch(below, gfn.index(level.below()));
                    below
                });
            }
            match level.down() {
                Some(below) if tables.iter().any(Option::is_some) => level = below,
                _ => return found,
            }
        }
    }
}

impl<F: SpteFormat, H: Host> fmt::Debug for Walker<'_, F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walker").field("root", &self.root).finish_non_exhaustive()
    }
}
