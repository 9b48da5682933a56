//! How long reverse maps are: a histogram for debuggers (KVM row 3.61).
//!
//! Owns [`RmapHistogram`]. Each list is held for a moment by its bit lock, agers and faults go on,
//! and what they change meanwhile is in the figures or not. Where nothing was ever mapped there is
//! nothing to walk (bug B49).

use core::fmt;

use mmu_core::addr::{Gfn, GfnRange, Level, to_index};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::mmu::ShadowMmu;
use crate::rmap::{RmapKey, SPACES};

/// Buckets: no entries, 1, 2 to 3, 4 to 7 and so on; the last is 512 and more.
pub const RMAP_BUCKETS: usize = 11;
/// Levels of leaves.
const LEAVES: [Level; 3] = [Level::L1, Level::L2, Level::L3];

/// Blocks of the slots' memory by the number of shadow entries that map them.
#[doc(alias = "kvm_mmu_rmaps_stat")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RmapHistogram {
    /// By level, from pages of 4 KiB on, then by bucket.
    pub counts: [[u64; RMAP_BUCKETS]; LEAVES.len()],
}

/// The bucket of a list of `entries`.
fn bucket(entries: u32) -> usize {
    let bucket = entries.checked_ilog2().map_or(0, |log| log + 1);
    to_index(u64::from(bucket)).min(RMAP_BUCKETS - 1)
}

impl<F: SpteFormat, H: Host> ShadowMmu<F, H> {
    /// Count lists by their length, over all slots of all address spaces. A block that a slot has a
    /// part of counts.
    pub fn rmap_histogram(&self, actor: &mut Actor<H>) -> RmapHistogram {
        let mut found = RmapHistogram::default();
        for space in (0..).take(SPACES) {
            let mut from = Gfn::new(0);
            while let Some(slot) = next_slot(actor, space, from) {
                for (level, counts) in LEAVES.into_iter().zip(&mut found.counts) {
                    self.count_lists((space, level), slot, counts);
                }
                from = slot.end;
            }
        }
        found
    }

    fn count_lists(
        &self,
        (space, level): (u16, Level),
        slot: GfnRange,
        counts: &mut [u64; RMAP_BUCKETS],
    ) {
        let first = slot.start.align_down(level);
        let blocks = slot.end.distance_from(first).div_ceil(level.pages());
        let (mut mapped, mut at) = (0, first);
        while let Some(gfn) = self.rmaps().next(space, level, at, slot.end) {
            let list = self.rmaps().lock(RmapKey { space, level, gfn });
            let entries = list.map_or(0, |list| list.len());
            if entries > 0 {
                mapped += 1;
                if let Some(count) = counts.get_mut(bucket(entries)) {
                    *count += 1;
                }
            }
            at = gfn.align_down(level).saturating_add(level.pages());
        }
        if let Some(none) = counts.first_mut() {
            *none += blocks.saturating_sub(mapped);
        }
    }
}

/// The pages of the first slot that has one from `from` on.
fn next_slot<H: Host>(actor: &mut Actor<H>, space: u16, from: Gfn) -> Option<GfnRange> {
    let work = actor.pinned();
    let slots = work.vm.slots().read(&work.section);
    let rest = GfnRange::new(from, GfnRange::ALL.end);
    slots.overlapping(space, rest).next().map(|slot| slot.range())
}

impl fmt::Display for RmapHistogram {
    /// A line a level: its buckets from left to right.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (level, counts) in LEAVES.into_iter().zip(&self.counts) {
            write!(f, "{level}:")?;
            for (number, count) in (0..).zip(counts) {
                let from: u64 = if number == 0 { 0 } else { 1 << (number - 1) };
                write!(f, " {from}:{count}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_double() {
        let expected =
            [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (511, 9), (512, 10)];
        for (entries, number) in expected {
            assert_eq!(bucket(entries), number, "{entries}");
        }
        assert_eq!(bucket(u32::MAX), RMAP_BUCKETS - 1);
    }
}
