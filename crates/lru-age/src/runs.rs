//! Runs of pages in masks, and [`Heard`]: who else is to know that pages were used.
//!
//! Whoever clears accessed bits for a purpose of his own takes them away from the next pass. The
//! clearing consumers here (idle bitmap, region sampler, sampled working set) therefore tell a
//! `Heard` what they found young; the table's editor is one.

use mmu_core::addr::{Gfn, GfnRange, Level, to_u64};
use mmu_core::traits::{AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, MASK_WORDS};

use crate::editor::{AgeEditor, Promotion};

/// Gets to know which pages were found used by somebody who cleared their accessed bits (KVM row
/// 5.39: upstream keeps a young flag for the same reason).
pub trait Heard {
    /// The pages of `range` were used.
    fn young(&mut self, range: GfnRange);
}

/// Nobody keeps generations: nothing is lost by clearing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unheard;

impl Heard for Unheard {
    fn young(&mut self, _: GfnRange) {}
}

impl Heard for AgeEditor<'_> {
    fn young(&mut self, range: GfnRange) {
        let _ = self.touch(range, Promotion::SecondChance);
    }
}

/// Calls of the MMU for one range before it is given up: each must make progress.
const MAX_CALLS: u64 = 1 << 20;

/// Ask about the whole of `range`, in as many calls as the MMU needs.
pub(crate) fn ask<M: AgeRange, S: AgeSink>(
    mmu: &M,
    reader: &mut M::Reader,
    range: GfnRange,
    mode: AgeMode,
    sink: &mut S,
) -> AgeReport {
    ask_all(mmu, reader, AgeRequest::new(range, mode), sink)
}

/// Ask the whole of `request`, in as many calls as the MMU needs.
pub(crate) fn ask_all<M: AgeRange, S: AgeSink>(
    mmu: &M,
    reader: &mut M::Reader,
    request: AgeRequest,
    sink: &mut S,
) -> AgeReport {
    let range = request.range;
    let mut total = AgeReport::empty(range.start);
    for _ in 0..MAX_CALLS {
        let rest = GfnRange::new(total.next, range.end);
        if rest.is_empty() {
            break;
        }
        let slice = mmu.age(reader, request.for_range(rest), sink);
        // An MMU without progress said all that it will say.
        let stuck = slice.next <= rest.start;
        total = total.merge(slice);
        if stuck {
            break;
        }
    }
    total
}

/// Every run of set bits, as gfns from `base` on.
pub(crate) fn runs(base: Gfn, mask: &[u64; MASK_WORDS], mut each: impl FnMut(GfnRange)) {
    for (word, &bits) in mask.iter().enumerate() {
        let first = base.saturating_add(64 * to_u64(word));
        let mut at = 0;
        while at < 64 {
            let rest = bits >> at;
            if rest == 0 {
                break;
            }
            at += u64::from(rest.trailing_zeros());
            let length = u64::from((bits >> at).trailing_ones());
            each(GfnRange::from_len(first.saturating_add(at), length));
            at += length;
        }
    }
}

/// Hands on what was mapped and what was young, in runs inside one range.
pub(crate) struct Runs<P, Y> {
    pub(crate) range: GfnRange,
    pub(crate) present: P,
    pub(crate) young: Y,
}

impl<P: FnMut(GfnRange), Y: FnMut(GfnRange)> AgeSink for Runs<P, Y> {
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        runs(base, present, &mut self.present);
        runs(base, young, &mut self.young);
    }

    fn huge(&mut self, base: Gfn, level: Level, young: bool) {
        let part = GfnRange::entry(base, level).intersection(self.range);
        (self.present)(part);
        if young {
            (self.young)(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_exactly_the_set_bits() {
        let mut mask = [0; MASK_WORDS];
        (mask[0], mask[1], mask[3], mask[7]) = (u64::MAX, 0b1011, 1 << 63, 1 << 63 | 1);
        let mut seen = alloc::vec::Vec::new();
        runs(Gfn::new(512), &mask, |run| seen.push((run.start.get() - 512, run.len())));
        let expected = [(0, 64), (64, 2), (67, 1), (255, 1), (448, 1), (511, 1)];
        assert_eq!(seen, expected);
    }
}
