//! Which blocks hold pages of a label, and which block is the coldest: found in a few loads.
//!
//! Eight bit maps over the blocks of a range, each with a tree of "any bit below?" words above it,
//! 64 to one. The eight words that describe the same 64 blocks share a cache line.
//!
//! The holder of the editor writes; readers take what they find as a hint and look at the block's
//! summary, so nothing here is ordered.

use alloc::boxed::Box;

use arrayvec::ArrayVec;
use mmu_core::addr::{to_index, to_u64};
use mmu_core::sync::plain::{AtomicU64, Ordering};

use crate::r#gen::Label;
use crate::region::zeroed;

/// Levels of the tree: 64^8 blocks of 2 MiB exceed any guest physical address space.
const MAX_LEVELS: usize = 8;
/// Bit maps.
const MAPS: u64 = 8;

/// One of the eight bit maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Map(u64);

impl Map {
    /// Blocks with at least one page of `label`.
    pub(crate) const fn holding(label: Label) -> Self {
        Self(label.get())
    }

    /// Blocks whose youngest page has `label`.
    pub(crate) const fn youngest(label: Label) -> Self {
        Self(4 + label.get())
    }
}

/// The bit maps of one range.
#[derive(Debug)]
pub(crate) struct BlockIndex {
    words: Box<[AtomicU64]>,
    /// First word and number of 64-bit columns, leaves first.
    levels: ArrayVec<(u64, u64), MAX_LEVELS>,
}

impl BlockIndex {
    /// Empty maps over `blocks` blocks; `None` when the allocator has no memory.
    pub(crate) fn new(blocks: u64) -> Option<Self> {
        let levels = shape(blocks);
        let words = zeroed(MAPS * levels.iter().map(|&(_, columns)| columns).sum::<u64>())?;
        Some(Self { words, levels })
    }

    /// Bytes that maps over `blocks` blocks take.
    pub(crate) fn bytes(blocks: u64) -> u64 {
        8 * MAPS * shape(blocks).iter().map(|&(_, columns)| columns).sum::<u64>()
    }

    /// The first block at or after `from` in a map.
    #[inline]
    pub(crate) fn next(&self, map: Map, from: u64) -> Option<u64> {
        let mut level = 0;
        let mut at = from;
        // Ends: `at` (in blocks) never falls, and at one place only so many levels can be climbed.
        loop {
            let bits = self.word(level, at / 64, map)? & (u64::MAX << (at % 64));
            if bits != 0 {
                at = (at & !63) + u64::from(bits.trailing_zeros());
                if level == 0 {
                    return Some(at);
                }
                level -= 1;
                at *= 64;
            } else {
                level += 1;
                at = at / 64 + 1;
            }
        }
    }

    /// Change the maps of `block` from one set to another: one bit per map.
    pub(crate) fn update(&self, block: u64, old: u64, new: u64) {
        let mut flips = old ^ new;
        while flips != 0 {
            let map = u64::from(flips.trailing_zeros());
            flips &= flips - 1;
            self.flip(block, Map(map), new >> map & 1 == 1);
        }
    }

    /// The maps that say something about `block`, from the leaves.
    pub(crate) fn maps_of(&self, block: u64) -> u64 {
        (0..MAPS).fold(0, |set, map| {
            let word = self.word(0, block / 64, Map(map)).unwrap_or(0);
            set | (word >> (block % 64) & 1) << map
        })
    }

    /// Is every upper word what the words below say? The first wrong column otherwise.
    pub(crate) fn check(&self) -> Result<(), u64> {
        for (level, &(_, columns)) in self.levels.iter().enumerate().rev().skip(1) {
            for column in 0..columns {
                for map in (0..MAPS).map(Map) {
                    let below = self.word(level, column, map).unwrap_or(0) != 0;
                    let above = self.word(level + 1, column / 64, map).unwrap_or(0);
                    if below != (above >> (column % 64) & 1 == 1) {
                        return Err(column);
                    }
                }
            }
        }
        Ok(())
    }

    fn flip(&self, block: u64, map: Map, on: bool) {
        let mut at = block;
        for level in 0..self.levels.len() {
            let Some(cell) = self.cell(level, at / 64, map) else { return };
            // ORDERING[age-index]: Relaxed. Pairs with Relaxed in `word`: a hint. Only the holder
            // of the editor stores, so load and store need not be one operation.
            let old = cell.load(Ordering::Relaxed);
            let bit = 1 << (at % 64);
            let new = if on { old | bit } else { old & !bit };
            cell.store(new, Ordering::Relaxed);
            // The word above only says whether this one is 0.
            if (old == 0) == (new == 0) {
                return;
            }
            at /= 64;
        }
    }

    #[inline]
    fn word(&self, level: usize, column: u64, map: Map) -> Option<u64> {
        // ORDERING[age-index]: Relaxed. Pairs with Relaxed in `flip`: a hint; whoever follows it
        // loads the block's summary.
        self.cell(level, column, map).map(|cell| cell.load(Ordering::Relaxed))
    }

    #[inline]
    fn cell(&self, level: usize, column: u64, map: Map) -> Option<&AtomicU64> {
        let &(first, columns) = self.levels.get(level)?;
        if column >= columns {
            return None;
        }
        self.words.get(to_index(first + column * MAPS + map.0))
    }
}

/// (first word, columns) of each level over `blocks` blocks.
fn shape(blocks: u64) -> ArrayVec<(u64, u64), MAX_LEVELS> {
    let mut levels = ArrayVec::new();
    let (mut first, mut columns) = (0, blocks.div_ceil(64));
    while levels.try_push((first, columns)).is_ok() && columns > 1 {
        first += columns * MAPS;
        columns = columns.div_ceil(64);
    }
    debug_assert!(columns <= 1, "{} levels reach over {blocks} blocks", to_u64(levels.len()));
    levels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_finds_exactly_the_blocks_that_were_set() {
        let map = Map::youngest(Label::new(2));
        for blocks in [1, 63, 64, 65, 4096, 4097, 300_000] {
            let index = BlockIndex::new(blocks).unwrap();
            let set: alloc::vec::Vec<u64> = (0..blocks)
                .filter(|block| block % 977 == 3 || block % 64 == 63 || block + 1 == blocks)
                .collect();
            for &block in &set {
                index.update(block, 0, 1 << map.0 | 1);
            }
            index.check().unwrap();
            let (mut found, mut from) = (alloc::vec::Vec::new(), 0);
            while let Some(block) = index.next(map, from) {
                found.push(block);
                from = block + 1;
            }
            assert_eq!(found, set, "{blocks} blocks");
            assert_eq!(index.next(Map(3), 0), None);
            for &block in &set {
                assert_eq!(index.maps_of(block), 1 << map.0 | 1);
                index.update(block, 1 << map.0 | 1, 1);
            }
            index.check().unwrap();
            assert_eq!(index.next(map, 0), None);
            assert_eq!(index.next(Map(0), 0), set.first().copied());
        }
    }

    #[test]
    fn the_largest_address_space_has_few_enough_levels() {
        assert!(shape(1 << 43).len() <= MAX_LEVELS);
        assert_eq!(shape(1).as_slice(), [(0, 1)]);
    }
}
