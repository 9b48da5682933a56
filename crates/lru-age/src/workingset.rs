//! [`Histogram`]: how many pages of a VM are how old (KVM row 5.36).
//!
//! Read from the table's counts: its cost does not depend on the size of the VM, and no editor is
//! needed.

use mmu_core::addr::Level;

use crate::r#gen::{GenWindow, Generation, MAX_NR_GENS, Seq};
use crate::kind::{KINDS, Kind};
use crate::table::{AgeTable, PAGE_SIZES};

/// Generations that a histogram can hold.
const MAX_BINS: usize = 4;
const _: () = assert!(MAX_NR_GENS == 4, "one bin per generation");

/// Reads of a table whose window moved meanwhile before the last one is taken as it is.
const MAX_READ_TRIES: u32 = 8;

/// Pages of one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bin {
    /// The generation.
    pub seq: Seq,
    /// When it was opened, on the embedder's clock, in milliseconds. Pages folded into it were
    /// there before.
    pub born_ms: u64,
    /// Time since then; 0 when the clock went backwards.
    pub age_ms: u64,
    pages: [[u64; PAGE_SIZES]; KINDS],
}

impl Bin {
    /// Pages (4 KiB), mapped by leaves of any size.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages.iter().flatten().sum()
    }

    /// Pages (4 KiB, whatever the leaf) mapped by leaves at `level`: 1, 2 or 3; 0 for others.
    #[must_use]
    pub fn pages_at(&self, level: Level) -> u64 {
        let sizes = self.pages.iter().filter_map(|sizes| sizes.get(level.slot()));
        sizes.sum()
    }

    /// Pages (4 KiB) of the ranges of one kind.
    #[must_use]
    pub fn pages_of(&self, kind: Kind) -> u64 {
        kind.of(&self.pages).iter().sum()
    }

    /// The slot of the generation.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.seq.generation()
    }
}

/// Pages by age, at one moment.
///
/// While a pass runs, pages that it moves may be counted in neither or both of two generations; a
/// whole pass is never in between. With no pass under way the numbers are exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Histogram {
    window: GenWindow,
    bins: [Option<Bin>; MAX_BINS],
}

impl Histogram {
    /// The histogram of `table` at `now_ms` of the embedder's clock.
    #[must_use]
    pub fn of(table: &AgeTable, now_ms: u64) -> Self {
        let mut histogram = Self::read(table, now_ms);
        for _ in 1..MAX_READ_TRIES {
            if histogram.window == table.window() {
                break;
            }
            histogram = Self::read(table, now_ms);
        }
        histogram
    }

    fn read(table: &AgeTable, now_ms: u64) -> Self {
        let window = table.window();
        let mut seqs = window.seqs();
        let bins = [(); MAX_BINS].map(|()| {
            seqs.next().map(|seq| {
                let born_ms = table.birth_ms(seq.generation());
                let age_ms = now_ms.saturating_sub(born_ms);
                Bin { seq, born_ms, age_ms, pages: table.pages_by_size(seq) }
            })
        });
        Self { window, bins }
    }

    /// The generations it covers.
    #[must_use]
    pub const fn window(&self) -> GenWindow {
        self.window
    }

    /// One bin per generation, oldest first.
    #[must_use]
    pub fn bins(&self) -> impl DoubleEndedIterator<Item = &Bin> {
        self.bins.iter().flatten()
    }

    /// Pages (4 KiB) of all generations.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bins().map(Bin::pages).sum()
    }

    /// Pages (4 KiB) of the active generations: what the VM used lately.
    #[must_use]
    pub fn active_pages(&self) -> u64 {
        self.bins().filter(|bin| self.window.is_active(bin.seq)).map(Bin::pages).sum()
    }
}
