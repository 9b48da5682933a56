//! The state of one range of gfns: words, summaries and index of its blocks.
//!
//! Blocks are aligned to 2 MiB; a range that starts or ends inside one has that block to itself,
//! and the pages outside the range are never tracked. Memory is allocated once, here, and may fail.

use alloc::boxed::Box;

use mmu_core::addr::{Gfn, GfnRange, Level, to_index};
use mmu_core::sync::AtomicU64;

use crate::index::BlockIndex;
use crate::kind::Kind;
use crate::summary;
use crate::word::{BLOCK_PAGES, Block, Mask, mask};

/// Bytes of the words of one block.
const BLOCK_BYTES: u64 = 256;
const _: () = assert!(size_of::<Block>() == 256 || cfg!(loom), "four bits for each of 512 pages");

/// One range.
#[derive(Debug)]
pub(crate) struct Region {
    range: GfnRange,
    kind: Kind,
    summaries: Box<[AtomicU64]>,
    blocks: Box<[Block]>,
    index: BlockIndex,
}

impl Region {
    /// Nothing tracked in `range`; `None` when the allocator has no memory.
    pub(crate) fn new(range: GfnRange, kind: Kind) -> Option<Self> {
        let blocks = blocks_of(range);
        Some(Self {
            range,
            kind,
            summaries: zeroed(blocks)?,
            blocks: zeroed(blocks)?,
            index: BlockIndex::new(blocks)?,
        })
    }

    /// Bytes that a region over `range` allocates.
    pub(crate) fn bytes(range: GfnRange) -> u64 {
        let blocks = blocks_of(range);
        blocks * (BLOCK_BYTES + 8) + BlockIndex::bytes(blocks)
    }

    #[inline]
    pub(crate) const fn range(&self) -> GfnRange {
        self.range
    }

    #[inline]
    pub(crate) const fn kind(&self) -> Kind {
        self.kind
    }

    #[inline]
    pub(crate) const fn index(&self) -> &BlockIndex {
        &self.index
    }

    /// Number of blocks.
    pub(crate) fn len(&self) -> u64 {
        blocks_of(self.range)
    }

    /// The block that holds `gfn`, which is not before the range.
    #[inline]
    pub(crate) const fn block_of(&self, gfn: Gfn) -> u64 {
        gfn.distance_from(self.range.start.align_down(Level::L2)) / BLOCK_PAGES
    }

    /// First gfn of a block; before the range when that starts inside the block.
    #[inline]
    pub(crate) const fn base_of(&self, block: u64) -> Gfn {
        self.range.start.align_down(Level::L2).saturating_add(block * BLOCK_PAGES)
    }

    /// Summary and pages of a block; `None` past the last one.
    #[inline]
    pub(crate) fn block(&self, block: u64) -> Option<(&AtomicU64, &Block)> {
        let at = to_index(block);
        self.summaries.get(at).zip(self.blocks.get(at))
    }

    /// Tracked pages of the blocks from that of `gfn` on, for the holder of the editor.
    pub(crate) fn tracked_from(&self, gfn: Gfn) -> u64 {
        let first = to_index(self.block_of(gfn));
        let rest = self.summaries.get(first..).unwrap_or_default();
        rest.iter().map(|cell| summary::load_own(cell).total()).sum()
    }

    /// The pages of a block that lie in `range`, itself inside the region's.
    pub(crate) fn mask(&self, block: u64, range: GfnRange) -> Mask {
        let base = self.base_of(block);
        mask(range.start.distance_from(base), range.end.distance_from(base))
    }
}

fn blocks_of(range: GfnRange) -> u64 {
    range.end.distance_from(range.start.align_down(Level::L2)).div_ceil(BLOCK_PAGES)
}

/// `count` zeroed elements. The allocator's own zeroing, which is lazy for large sizes on most
/// hosts: words that no 4 KiB page ever uses cost address space only.
#[cfg(not(loom))]
pub(crate) fn zeroed<T: zerocopy::FromZeros>(count: u64) -> Option<Box<[T]>> {
    zerocopy::FromZeros::new_box_zeroed_with_elems(to_index(count)).ok()
}

/// The same where the model checker's atomics have no all-zero form.
#[cfg(loom)]
pub(crate) fn zeroed<T: Default>(count: u64) -> Option<Box<[T]>> {
    let mut elements = alloc::vec::Vec::new();
    elements.try_reserve_exact(to_index(count)).ok()?;
    elements.resize_with(to_index(count), T::default);
    Some(elements.into_boxed_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unaligned_ranges_share_no_page_with_their_neighbours() {
        let range = GfnRange::new(Gfn::new(1000), Gfn::new(2049));
        let region = Region::new(range, Kind::Anon).unwrap();
        assert_eq!((region.len(), region.base_of(0)), (4, Gfn::new(512)));
        let pages: u32 = (0..region.len())
            .flat_map(|block| region.mask(block, range))
            .map(u64::count_ones)
            .sum();
        assert_eq!(u64::from(pages), range.len());
        assert_eq!((region.block_of(range.start), region.block_of(Gfn::new(2048))), (0, 3));
        assert!(region.block(4).is_none());
    }

    #[test]
    fn a_range_that_no_machine_can_hold_is_refused() {
        assert!(Region::new(GfnRange::ALL, Kind::File).is_none());
        assert!(Region::bytes(GfnRange::ALL) > 1 << 50);
    }
}
