//! Look-around: a candidate that turns out to be used says something about its neighbours (KVM
//! rows 5.27, 5.28, 5.32, 5.41).
//!
//! Before a page goes, its accessed bit is tested and cleared. When it was used, the up to 64 pages
//! around it in the same table are taken in as a pass would, and a table in which many were used is
//! written down for the next filtered pass ([`crate::Scan`]): the evictor feeds the aging.
//!
//! The caller holds the editor, so the table is not contended; an MMU that cannot answer fast is
//! asked about the candidate alone ([`Participation`]).

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::traits::{AgeAbilities, AgeMode, AgeRange, AgeReport, AgeRequest};

use crate::AgeError;
use crate::editor::{AgeEditor, Promotion};
use crate::evict::{Candidate, Recheck};
use crate::observer::{Found, Observer, Taking};
use crate::pass::PassCounts;
use crate::runs::ask_all;

/// Pages that a look-around takes in at most.
#[doc(alias = "MIN_LRU_BATCH")]
pub const WINDOW_PAGES: u64 = 64;

/// Entries in a cache line of 64 bytes: one used page in each line makes a table dense.
const DENSITY: u64 = 8;

/// Was a table of which `looked` entries were read and `young` found used worth the reading (row
/// 5.27)? One used page for every line of entries read.
#[doc(alias = "suitable_to_scan")]
#[inline]
#[must_use]
pub const fn is_dense(young: u64, looked: u64) -> bool {
    young != 0 && young.saturating_mul(DENSITY) >= looked
}

/// The pages to look at around `gfn`: at most [`WINDOW_PAGES`], in the same 2 MiB block and inside
/// `bounds`, with `gfn` in the middle unless a border is near.
#[must_use]
pub fn window_around(gfn: Gfn, bounds: GfnRange) -> GfnRange {
    let block = GfnRange::entry(gfn, Level::L2).intersection(bounds);
    if block.len() <= WINDOW_PAGES {
        return block;
    }
    let half = WINDOW_PAGES / 2;
    let latest = block.end.get() - WINDOW_PAGES;
    let start = gfn.get().saturating_sub(half).clamp(block.start.get(), latest);
    GfnRange::from_len(Gfn::new(start), WINDOW_PAGES)
}

/// How an MMU takes part (KVM rows 5.17, 5.37): by what it can do at this moment, not by
/// configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Participation {
    /// It answers fast: it is asked by passes, and around candidates.
    AgingAndLookAround,
    /// It does not: it is asked about candidates only, before they go.
    EvictionOnly,
}

impl Participation {
    /// How `mmu` takes part now.
    #[must_use]
    pub fn of<M: AgeRange>(mmu: &M) -> Self {
        let fast = mmu.abilities().contains(AgeAbilities::FAST);
        if fast { Self::AgingAndLookAround } else { Self::EvictionOnly }
    }
}

/// What a check of a candidate found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct LookAround {
    /// Of the candidate. What it says is in the table already.
    pub verdict: Recheck,
    /// What was looked at besides the candidate; empty when nothing was.
    pub window: GfnRange,
    /// Counted over candidate and window.
    pub counts: PassCounts,
}

/// How to check a candidate. The mode always clears: it is refused here rather than in each check,
/// which has no way to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookOptions {
    mode: AgeMode,
    promotion: Promotion,
}

impl LookOptions {
    /// Clear without a flush, second chance.
    pub const DEFAULT: Self = Self { mode: AgeMode::Clear, promotion: Promotion::SecondChance };

    /// Clear, or clear and flush; second chance.
    ///
    /// # Errors
    /// [`AgeError::TestOnly`] for [`AgeMode::Test`], which would count one use again and again.
    pub const fn new(mode: AgeMode) -> Result<Self, AgeError> {
        match mode {
            AgeMode::Test => Err(AgeError::TestOnly),
            AgeMode::Clear | AgeMode::ClearFlush => Ok(Self { mode, ..Self::DEFAULT }),
        }
    }

    /// The same with another reward for a use.
    #[must_use]
    pub const fn with_promotion(self, promotion: Promotion) -> Self {
        Self { promotion, ..self }
    }

    /// What happens to accessed bits; never [`AgeMode::Test`].
    #[must_use]
    pub const fn mode(self) -> AgeMode {
        self.mode
    }

    /// What a use earns.
    #[must_use]
    pub const fn promotion(self) -> Promotion {
        self.promotion
    }
}

impl AgeEditor<'_> {
    /// Ask the MMU whether `candidate` is still cold, clear its accessed bit, and take the answer
    /// in: a used page is promoted or marked, one that is not mapped is forgotten. If it was used,
    /// look around.
    pub fn look_around<M: AgeRange>(
        &mut self,
        candidate: &Candidate,
        mmu: &M,
        reader: &mut M::Reader,
        options: LookOptions,
    ) -> LookAround {
        let mut found = Found::default();
        let victim = self.take_in(candidate.range, mmu, reader, options, &mut found);
        let nothing = GfnRange::new(candidate.range.start, candidate.range.start);
        let verdict = Recheck::of(victim.answer());
        if verdict == Recheck::Young && candidate.level == Level::L3 {
            self.share(candidate.range, self.rules(options.promotion), &mut found.counts);
        }
        self.table().hear(found.counts.young);
        let slow = Participation::of(mmu) == Participation::EvictionOnly;
        if verdict != Recheck::Young || candidate.range.len() != 1 || slow {
            return LookAround { verdict, window: nothing, counts: found.counts };
        }
        let gfn = candidate.range.start;
        let bounds = self.table().region_at(gfn).map_or(candidate.range, |r| r.range());
        let window = window_around(gfn, bounds);
        let around = self.take_in(window, mmu, reader, options, &mut found);
        self.table().hear(around.young);
        // The candidate itself is old by now, and was young.
        if is_dense(around.young + victim.young, window.len()) {
            self.table().note(gfn);
        }
        LookAround { verdict, window, counts: found.counts }
    }

    /// Ask about `range`, a candidate or a window, and take the answers in. A call of the MMU that
    /// makes no progress in it is the last, so the work is bounded by the range.
    fn take_in<M: AgeRange>(
        &self,
        range: GfnRange,
        mmu: &M,
        reader: &mut M::Reader,
        options: LookOptions,
        found: &mut Found,
    ) -> AgeReport {
        let Some(region) = self.table().region_at(range.start) else {
            return AgeReport::empty(range.start);
        };
        let how = Taking { promotion: options.promotion, next_filter: None };
        let mut sink = Observer::new(self, region, range, how, found);
        let total = ask_all(mmu, reader, AgeRequest::new(range, options.mode), &mut sink);
        // Of what lies behind, an MMU without progress said nothing.
        sink.gap(total.next);
        found.add(&total);
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row 5.27.
    #[test]
    fn one_used_page_in_each_line_of_entries_is_dense() {
        let table = [(0, 0, false), (0, 512, false), (1, 8, true), (1, 9, false), (63, 512, false)];
        for (young, looked, dense) in table.into_iter().chain([(64, 512, true), (512, 512, true)]) {
            assert_eq!(is_dense(young, looked), dense, "{young} of {looked}");
        }
        assert!(is_dense(u64::MAX, u64::MAX));
    }

    /// Row 5.28.
    #[test]
    fn windows_stay_in_table_and_range_and_are_centred_where_they_can_be() {
        let bounds = GfnRange::new(Gfn::new(0), Gfn::new(1 << 20));
        for (gfn, first) in [(0, 0), (31, 0), (32, 0), (33, 1), (256, 224), (480, 448), (511, 448)]
        {
            for block in [0, 512, 512 * 77] {
                let window = window_around(Gfn::new(block + gfn), bounds);
                assert_eq!(window.start.get(), block + first, "{gfn}");
                assert_eq!(window.len(), WINDOW_PAGES);
            }
        }
        // A range that begins or ends inside the table cuts the window.
        let short = GfnRange::new(Gfn::new(500), Gfn::new(530));
        assert_eq!(window_around(Gfn::new(511), short), GfnRange::from_len(Gfn::new(500), 12));
        assert_eq!(window_around(Gfn::new(512), short), GfnRange::from_len(Gfn::new(512), 18));
        let low = GfnRange::new(Gfn::new(100), Gfn::new(1 << 20));
        assert_eq!(window_around(Gfn::new(101), low), GfnRange::from_len(Gfn::new(100), 64));
    }
}
