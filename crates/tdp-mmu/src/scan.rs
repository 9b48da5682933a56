//! Level-1 tables read a cache line at a time: the loops that aging and zap-all live from.
//!
//! Owns [`Line`], eight entries joined by AND and by OR. Most lines are alike (all present and none
//! young; all present, accessed and dirty; all empty), and then two tests answer for eight entries.
//! No vector instructions: kernels have no vector registers to spare. Reads are relaxed and prove
//! nothing about a later moment; who changes an entry does so by compare-exchange.

use mmu_core::frame::PageTable;
use mmu_core::frame::raw::prefetch;
use mmu_core::spte::Spte;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::format::PAGE_SIZE;

/// Entries in a cache line.
pub(crate) const LINE: usize = 8;
/// Entries whose bits fill a mask word.
pub(crate) const WORD: usize = 64;
/// The same, as pages of a level-1 table.
pub(crate) const PAGES: u64 = 64;

/// Eight entries (or fewer, at a table's end): the bits all have, and the bits any has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line {
    pub(crate) all: u64,
    pub(crate) any: u64,
}

impl Line {
    #[inline(always)]
    pub(crate) fn read(cells: &[SpteCell]) -> Self {
        let mut line = Self { all: u64::MAX, any: 0 };
        for cell in cells {
            let raw = cell.peek().raw();
            line.all &= raw;
            line.any |= raw;
        }
        line
    }
}

/// Which of up to [`WORD`] entries have all bits of `first`, and which of those all of `second`
/// too.
#[inline(always)]
pub(crate) fn masks(cells: &[SpteCell], first: u64, second: u64) -> (u64, u64) {
    let both = first | second;
    let (mut has_first, mut has_both) = (0, 0);
    let mut shift = 0;
    for cells in cells.chunks(LINE) {
        let line = Line::read(cells);
        let full = (1 << cells.len()) - 1;
        let (one, two) = if line.any & first != first {
            (0, 0)
        } else if line.all & first == first && line.any & second != second {
            (full, 0)
        } else if line.all & both == both {
            (full, full)
        } else {
            mixed(cells, first, both)
        };
        has_first |= one << shift;
        has_both |= two << shift;
        shift += LINE;
    }
    (has_first, has_both)
}

/// The same for a line whose entries differ, entry by entry and without branches. Out of line:
/// inlined, it costs the usual line its registers.
#[inline(never)]
fn mixed(cells: &[SpteCell], first: u64, both: u64) -> (u64, u64) {
    let (mut has_first, mut has_both) = (0, 0);
    for (index, cell) in cells.iter().enumerate() {
        let raw = cell.peek().raw();
        has_first |= u64::from(raw & first == first) << index;
        has_both |= u64::from(raw & both == both) << index;
    }
    (has_first, has_both)
}

/// How many of the first entries are links without any bit of `mask`.
pub(crate) fn links_without(cells: &[SpteCell], mask: u64) -> usize {
    let mask = mask | PAGE_SIZE;
    let mut count = 0;
    for cells in cells.chunks(LINE) {
        let line = Line::read(cells);
        if line.all & PRESENT != 0 && line.any & mask == 0 {
            count += cells.len();
            continue;
        }
        let idle = |cell: &&SpteCell| cell.peek().raw() & (PRESENT | mask) == PRESENT;
        return count + cells.iter().take_while(idle).count();
    }
    count
}

/// Ask for the lines of mask word `word` of a table that will be scanned soon.
#[inline(always)]
pub(crate) fn fetch(table: Option<&PageTable>, word: usize) {
    if let Some(table) = table {
        for line in 0..WORD / LINE {
            prefetch(table, word * WORD + line * LINE);
        }
    }
}

/// The bits of `word` that lie in `first..end`, all indices of a table.
#[inline]
pub(crate) fn window(word: usize, first: usize, end: usize) -> u64 {
    let start = first.clamp(word * WORD, (word + 1) * WORD) - word * WORD;
    let stop = end.clamp(word * WORD, (word + 1) * WORD) - word * WORD;
    let below = |bit: usize| if bit == WORD { u64::MAX } else { (1 << bit) - 1 };
    below(stop) & !below(start)
}

/// A young or present entry says so by these.
pub(crate) const PRESENT: u64 = Spte::MMU_PRESENT;

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_model::Random;

    #[test]
    fn masks_are_those_of_a_plain_loop() {
        let (first, second) = (PRESENT, 1 << 8);
        let mut random = Random::new(1);
        for round in 0..2000 {
            let table = PageTable::new_empty();
            for (index, cell) in table.entries().iter().enumerate() {
                // Runs of equal lines, and lines where everything differs.
                let seed = match round % 3 {
                    0 => random.next_u64(),
                    1 if index % LINE == 0 => random.next_u64(),
                    1 => continue,
                    _ => round,
                };
                cell.init(Spte::from_raw((seed & 1) << 11 | (seed >> 1 & 1) << 8));
            }
            for cells in table.entries().chunks(WORD) {
                let (present, young) = masks(cells, first, second);
                for (index, cell) in cells.iter().enumerate() {
                    let raw = cell.peek().raw();
                    assert_eq!(present >> index & 1 == 1, raw & first != 0);
                    assert_eq!(young >> index & 1 == 1, raw & first != 0 && raw & second != 0);
                }
            }
        }
    }

    #[test]
    fn a_run_of_links_ends_where_a_plain_loop_ends_it() {
        let mut random = Random::new(2);
        for length in 0..200 {
            let table = PageTable::new_empty();
            let idle = PRESENT | 0x1000;
            let others = [0, idle | 1 << 8, idle | PAGE_SIZE, 1 << 8];
            for (index, cell) in table.entries().iter().enumerate() {
                let other = others[mmu_core::addr::to_index(random.below(4))];
                cell.init(Spte::from_raw(if index < length { idle } else { other }));
            }
            for first in (0..=length).step_by(7) {
                for end in [first, first + 1, length, 512] {
                    let cells = table.entries().get(first..end).unwrap_or(&[]);
                    let expected = length.min(end).saturating_sub(first).min(cells.len());
                    assert_eq!(links_without(cells, 1 << 8), expected, "{first}..{end}");
                }
            }
        }
    }

    #[test]
    fn a_window_holds_exactly_its_indices() {
        for first in (0..=512).step_by(7) {
            for end in (first..=512).step_by(5) {
                for word in 0..8 {
                    let mask = window(word, first, end);
                    for bit in 0..WORD {
                        let inside = (first..end).contains(&(word * WORD + bit));
                        assert_eq!(mask >> bit & 1 == 1, inside, "{first}..{end}, {word}, {bit}");
                    }
                }
            }
        }
    }
}
