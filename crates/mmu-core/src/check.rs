//! Walks a tree and checks every entry against the rules: for tests, teardown and feature `prove`.
//!
//! Owns [`check_tree`], what it counts ([`TreeCount`]) and what it may find ([`CheckError`]). Reads
//! only, inside a pin; exact when nobody changes the tree meanwhile.
//! Checks invariants I1 (links lead to tables of the right place), I4 (no FROZEN at rest), I5 (the
//! writable triple), I6 (access-tracked entries), I7 (no reserved bit).

use arrayvec::ArrayVec;
use core::fmt;

use crate::addr::{Gfn, Level, Pfn};
use crate::epoch::EpochGuard;
use crate::frame::{PhysMap, TablePool};
use crate::spte::{Spte, SpteConfig, SpteFormat, SpteKind};

/// What stands in a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TreeCount {
    /// Leaves by level: 4 KiB, 2 MiB, 1 GiB.
    pub leaves: [u64; 3],
    /// Tables, the root included.
    pub tables: u64,
    /// MMIO entries.
    pub mmio: u64,
    /// Leaves with the accessed bit.
    pub young: u64,
    /// Leaves with the dirty bit.
    pub dirty: u64,
    /// Access-tracked leaves.
    pub tracked: u64,
}

impl TreeCount {
    /// 4 KiB pages mapped.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.leaves.iter().zip(Level::ALL).map(|(count, level)| count * level.pages()).sum()
    }

    /// Add another tree.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.leaves.iter_mut().zip(other.leaves) {
            *mine += theirs;
        }
        self.tables += other.tables;
        self.mmio += other.mmio;
        self.young += other.young;
        self.dirty += other.dirty;
        self.tracked += other.tracked;
    }
}

/// An entry that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckError {
    /// First gfn that the entry maps.
    pub gfn: Gfn,
    /// Its level.
    pub level: Level,
    /// The entry.
    pub spte: Spte,
    /// The rule.
    pub rule: Rule,
}

/// Rules that [`check_tree`] checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rule {
    /// I1: a link leads to a table that was made for another place.
    WrongPlace {
        /// The frame linked.
        frame: Pfn,
        /// Its first gfn.
        gfn: Gfn,
        /// Its level.
        level: Level,
    },
    /// I4: FROZEN at rest.
    Frozen,
    /// I5: writable, MMU-writable and host-writable do not go together.
    Writable,
    /// I7: a bit that hardware reserves.
    Reserved {
        /// The bits.
        bits: u64,
    },
    /// An entry of no known kind.
    Corrupt,
}

impl fmt::Display for CheckError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gfn, level, spte, rule } = self;
        let raw = spte.raw();
        write!(f, "{level} entry for gfn {gfn} holds {raw:#018x}: {rule:?}")
    }
}

impl core::error::Error for CheckError {}

/// Check the tree under the table `root` at `root_level`.
///
/// # Errors
/// The first entry that breaks a rule.
pub fn check_tree<F: SpteFormat, P: PhysMap>(
    config: &SpteConfig<F>,
    pool: &TablePool<P>,
    section: &EpochGuard<'_>,
    root: Pfn,
    root_level: Level,
) -> Result<TreeCount, CheckError> {
    let mut count = TreeCount { tables: 1, ..TreeCount::default() };
    let mut stack: ArrayVec<(Pfn, Level, Gfn, usize), 5> = ArrayVec::new();
    stack.push((root, root_level, Gfn::new(0), 0));
    while let Some((frame, level, base, index)) = stack.pop() {
        let Some(cell) = pool.table(section, frame).entries().get(index) else { continue };
        stack.push((frame, level, base, index + 1));
        let gfn = base.saturating_add(crate::addr::to_u64(index) * level.pages());
        let spte = cell.load();
        check_entry(config, spte, gfn, level, &mut count)?;
        if let (true, Some(below)) = (spte.is_table(level), level.down()) {
            let table = config.pfn(spte);
            let place = pool.place(table);
            // INVARIANT[I1]: a link leads to a table that was made for this very place.
            if place != (gfn, below) {
                let rule = Rule::WrongPlace { frame: table, gfn: place.0, level: place.1 };
                return Err(CheckError { gfn, level, spte, rule });
            }
            stack.push((table, below, gfn, 0));
        }
    }
    Ok(count)
}

fn check_entry<F: SpteFormat>(
    config: &SpteConfig<F>,
    spte: Spte,
    gfn: Gfn,
    level: Level,
    count: &mut TreeCount,
) -> Result<(), CheckError> {
    let broken = |rule| Err(CheckError { gfn, level, spte, rule });
    match config.kind(spte, level) {
        SpteKind::Empty => return Ok(()),
        // INVARIANT[I4]: none is left at rest.
        SpteKind::Frozen => return broken(Rule::Frozen),
        SpteKind::Corrupt => return broken(Rule::Corrupt),
        SpteKind::Mmio => {
            count.mmio += 1;
            return Ok(());
        }
        SpteKind::Table => count.tables += 1,
        SpteKind::Leaf => {
            // INVARIANT[I5]: W, MMU-writable and host-writable imply each other in this order.
            if !config.writable_invariants_hold(spte) {
                return broken(Rule::Writable);
            }
            if let Some(leaves) = count.leaves.get_mut(level.slot()) {
                *leaves += 1;
            }
            count.young += u64::from(config.is_accessed(spte));
            count.dirty += u64::from(config.is_dirty(spte));
            count.tracked += u64::from(config.is_access_tracked(spte));
        }
    }
    // INVARIANT[I7]: no bit that hardware reserves.
    match config.reserved_bits(spte, level) {
        0 => Ok(()),
        bits => broken(Rule::Reserved { bits }),
    }
}
