//! How many guest tables in each large block have a shadow: over those no huge page may lie.
//!
//! Owns [`Blocks`] (KVM row 6.14, invariant I12): a huge leaf would let the guest write to a table
//! whose shadow relies on seeing writes. Plain counts under the writer; memory comes with the first
//! table in a part of memory.

use mmu_core::addr::{Gfn, Level};
use mmu_core::sync::plain::{AtomicU64, Ordering};

use crate::radix::{NoMemory, Radix};
use crate::rmap::SPACES;

const LARGE: [Level; 2] = [Level::L2, Level::L3];

/// See the file's head.
#[derive(Debug)]
pub(crate) struct Blocks {
    counts: [[Radix<AtomicU64>; 2]; SPACES],
}

impl Blocks {
    pub(crate) fn new(max_gfn_exclusive: Gfn) -> Self {
        let bits = u64::BITS - max_gfn_exclusive.get().saturating_sub(1).leading_zeros();
        let space = || LARGE.map(|level| Radix::new(bits.saturating_sub(level.shift()).max(1)));
        Self { counts: [space(), space()] }
    }

    fn of(&self, space: u16, level: Level) -> Option<&Radix<AtomicU64>> {
        self.counts.get(usize::from(space))?.get(level.slot().checked_sub(1)?)
    }

    /// Make room for the counts over `gfn`.
    pub(crate) fn reserve(&self, space: u16, gfn: Gfn) -> Result<(), NoMemory> {
        for level in LARGE {
            if let Some(counts) = self.of(space, level) {
                counts.provide(gfn.get() >> level.shift())?;
            }
        }
        Ok(())
    }

    /// One table more (or less) in `gfn`; the counts were reserved.
    pub(crate) fn count(&self, space: u16, gfn: Gfn, change: Change) {
        for level in LARGE {
            let counts = self.of(space, level);
            if let Some(count) = counts.and_then(|counts| counts.get(gfn.get() >> level.shift())) {
                // ORDERING[shadow-block]: Relaxed. Read and written by the writer only.
                let old = count.load(Ordering::Relaxed);
                let new = match change {
                    Change::More => old + 1,
                    Change::Less => old.saturating_sub(1),
                };
                // ORDERING[shadow-block]: Relaxed. As the load.
                count.store(new, Ordering::Relaxed);
            }
        }
    }

    /// The largest level, at most `cap`, of a leaf over `gfn`. Every address space counts: its
    /// memory may be the same (KVM row 4.60).
    pub(crate) fn max_level(&self, gfn: Gfn, cap: Level) -> Level {
        let shadowed = |level: Level| {
            (0..).zip(&self.counts).any(|(space, _)| {
                let counts = self.of(space, level);
                let count = counts.and_then(|counts| counts.get(gfn.get() >> level.shift()));
                // ORDERING[shadow-block]: Relaxed. As in `count`.
                count.is_some_and(|count| count.load(Ordering::Relaxed) != 0)
            })
        };
        let free = LARGE.into_iter().take_while(|level| *level <= cap && !shadowed(*level)).last();
        free.unwrap_or(Level::L1)
    }
}

/// Which way a count goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A table got a shadow.
    More,
    /// A shadow went.
    Less,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_large_page_lies_over_a_table_that_has_a_shadow() {
        let blocks = Blocks::new(Gfn::new(1 << 36));
        let table = Gfn::new(3 << 18 | 5 << 9 | 7);
        blocks.reserve(1, table).unwrap();
        assert_eq!(blocks.max_level(table, Level::L3), Level::L3);
        blocks.count(1, table, Change::More);
        blocks.count(1, table, Change::More);
        let near = Gfn::new(3 << 18);
        assert_eq!(blocks.max_level(table, Level::L3), Level::L1);
        assert_eq!(blocks.max_level(near, Level::L3), Level::L2, "another 2 MiB block");
        assert_eq!(blocks.max_level(near, Level::L1), Level::L1);
        assert_eq!(blocks.max_level(Gfn::new(4 << 18), Level::L3), Level::L3);
        blocks.count(1, table, Change::Less);
        assert_eq!(blocks.max_level(table, Level::L3), Level::L1, "one is left");
        blocks.count(1, table, Change::Less);
        assert_eq!(blocks.max_level(table, Level::L3), Level::L3);
    }
}
