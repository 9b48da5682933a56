//! Who goes first among pages of the same age: kinds, tiers, and a controller that learns from
//! refaults (KVM rows 5.31, 5.33, 5.37).
//!
//! [`EvictPolicy`] is what [`AgeEditor::evict`](crate::AgeEditor::evict) asks; [`Plain`] has no
//! opinion, [`PidPolicy`] follows upstream's controller in integers.

use crate::evict::Candidate;
use crate::kind::{KINDS, Kind, TIERS, Tier};
use crate::refault::Refaults;

/// Pages below which a rate of refaults means nothing, and how many pages are taken between two
/// questions about the kind.
#[doc(alias = "MIN_LRU_BATCH")]
pub const POLICY_BATCH: u64 = 64;

/// Weight of the first tier against the others: 2 to 3.
const FIRST_TIER_GAIN: u64 = 2;
const OTHER_TIER_GAIN: u64 = 3;

/// How dear pages of [`Kind::Anon`] are against [`Kind::File`]: 0 to 200, and 201.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Swappiness(u8);

impl Swappiness {
    /// Never take anonymous pages.
    pub const FILE_ONLY: Self = Self(0);
    /// Upstream's default: files first, unless they refault much more.
    pub const DEFAULT: Self = Self(60);
    /// Both cost the same.
    pub const EQUAL: Self = Self(100);
    /// Anonymous pages first.
    pub const MAX: Self = Self(200);
    /// Never take file pages.
    #[doc(alias = "SWAPPINESS_ANON_ONLY")]
    pub const ANON_ONLY: Self = Self(201);

    /// `None` above 201.
    #[must_use]
    pub const fn new(value: u8) -> Option<Self> {
        if value <= Self::ANON_ONLY.0 { Some(Self(value)) } else { None }
    }

    /// 0 to 201.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// May pages of this kind go at all?
    #[must_use]
    pub const fn allows(self, kind: Kind) -> bool {
        match kind {
            Kind::Anon => self.0 != Self::FILE_ONLY.0,
            Kind::File => self.0 != Self::ANON_ONLY.0,
        }
    }
}

impl Default for Swappiness {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Which of the old pages go.
pub trait EvictPolicy {
    /// May pages of this kind go?
    fn allows(&self, kind: Kind) -> bool;

    /// The kind to take the next [`POLICY_BATCH`] pages from. When it has none, the other is asked
    /// whether it may go. Called with no lock held; must not edit the table.
    fn next_kind(&mut self) -> Kind;

    /// The highest tier of `kind` that may go; pages above it move to the next generation.
    fn highest_tier(&mut self, kind: Kind) -> Tier;

    /// The candidate is gone.
    fn evicted(&mut self, candidate: &Candidate);

    /// `pages` of the candidate were kept for their tier.
    fn protected(&mut self, candidate: &Candidate, pages: u64);
}

/// Both kinds alike, all tiers, nothing remembered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain {
    turn: Kind,
}

impl EvictPolicy for Plain {
    fn allows(&self, _: Kind) -> bool {
        true
    }

    fn next_kind(&mut self) -> Kind {
        self.turn = self.turn.other();
        self.turn
    }

    fn highest_tier(&mut self, _: Kind) -> Tier {
        Tier::Used
    }

    fn evicted(&mut self, _: &Candidate) {}

    fn protected(&mut self, _: &Candidate, _: u64) {}
}

/// Refaults against evictions, seen from the one whose turn it might be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rate {
    refaulted: u64,
    total: u64,
    gain: u64,
}

impl Rate {
    /// Does `other`, weighed by its gain, refault no more often than this one by its own? Compared
    /// crosswise, without a division. Too few refaults to judge count as none.
    fn tolerates(self, other: Self) -> bool {
        let wide = |a: u64, b: u64, c: u64| {
            u128::from(a).saturating_mul(u128::from(b)).saturating_mul(u128::from(c))
        };
        let own_total = self.total.saturating_add(POLICY_BATCH);
        other.refaulted < POLICY_BATCH
            || wide(other.refaulted, own_total, self.gain)
                <= wide(self.refaulted.saturating_add(1), other.total, other.gain)
    }
}

/// Takes the kind, and protects the tiers, that refault more: a proportional controller over
/// exponential averages (gain 2 to 3 between tiers, `swappiness` between kinds, a batch of 64).
///
/// Records evictions in the [`Refaults`] it was given; call
/// [`Refaults::age_counts`] once per generation, so that the averages move.
#[derive(Clone, Copy, Debug)]
pub struct PidPolicy<'r> {
    refaults: &'r Refaults,
    swappiness: Swappiness,
}

impl<'r> PidPolicy<'r> {
    /// A controller over the counts of `refaults`.
    #[must_use]
    pub const fn new(refaults: &'r Refaults, swappiness: Swappiness) -> Self {
        Self { refaults, swappiness }
    }

    /// All refaults and evictions of a kind, or of one tier of it.
    fn rate(&self, kind: Kind, tiers: &[Tier], gain: u64) -> Rate {
        let mut rate = Rate { refaulted: 0, total: 0, gain };
        for &tier in tiers {
            let counts = self.refaults.counts(kind, tier);
            rate.refaulted = rate.refaulted.saturating_add(counts.refaulted);
            let total = counts.evicted.saturating_add(counts.protected);
            rate.total = rate.total.saturating_add(total);
        }
        rate
    }
}

impl EvictPolicy for PidPolicy<'_> {
    fn allows(&self, kind: Kind) -> bool {
        self.swappiness.allows(kind)
    }

    fn next_kind(&mut self) -> Kind {
        if !self.allows(Kind::Anon) {
            return Kind::File;
        }
        if !self.allows(Kind::File) {
            return Kind::Anon;
        }
        let weight = u64::from(self.swappiness.get());
        let anon = self.rate(Kind::Anon, &Tier::ALL, weight);
        let file = self.rate(Kind::File, &Tier::ALL, u64::from(Swappiness::MAX.get()) - weight);
        // At 200 a file page is dearer than anything: its gain is 0.
        if weight < u64::from(Swappiness::MAX.get()) && anon.tolerates(file) {
            Kind::File
        } else {
            Kind::Anon
        }
    }

    fn highest_tier(&mut self, kind: Kind) -> Tier {
        let first = self.rate(kind, &[Tier::Untouched], FIRST_TIER_GAIN);
        let used = self.rate(kind, &[Tier::Used], OTHER_TIER_GAIN);
        if first.tolerates(used) { Tier::Used } else { Tier::Untouched }
    }

    fn evicted(&mut self, candidate: &Candidate) {
        for offset in 0..candidate.range.len() {
            let gfn = candidate.range.start.saturating_add(offset);
            self.refaults.evicted(gfn, candidate.seq, candidate.kind, candidate.tier);
        }
    }

    fn protected(&mut self, candidate: &Candidate, pages: u64) {
        self.refaults.protected(candidate.kind, candidate.tier, pages);
    }
}

const _: () = assert!(KINDS == 2 && TIERS == 2, "the controller compares two of each");

#[cfg(test)]
mod tests {
    use mmu_core::addr::Gfn;

    use super::*;
    use crate::Seq;

    /// `evictions` pages of each sort evicted; `refaults` of them back at once.
    fn history(sorts: &[(Kind, Tier, u64, u64)]) -> Refaults {
        let refaults = Refaults::new(1 << 14).unwrap();
        let mut gfn = 0;
        for &(kind, tier, evictions, returns) in sorts {
            for n in 0..evictions {
                refaults.evicted(Gfn::new(gfn), Seq::new(4), kind, tier);
                if n < returns {
                    assert!(refaults.refault(Gfn::new(gfn), Seq::new(4)).is_some());
                }
                gfn += 1;
            }
        }
        refaults
    }

    /// Row 5.31: steps of the controller, one row each.
    #[test]
    fn tiers_that_refault_more_than_the_first_are_protected() {
        // Refaults of 1000 evictions: first tier, used pages; the highest tier that goes.
        let table = [
            (0, 0, Tier::Used),
            (0, 63, Tier::Used),
            (0, 64, Tier::Untouched),
            // The margin is 2 to 3: used pages may refault half as often again.
            (100, 140, Tier::Used),
            (100, 170, Tier::Untouched),
            (500, 700, Tier::Used),
            (500, 900, Tier::Untouched),
        ];
        for (first, used, highest) in table {
            let refaults = history(&[
                (Kind::Anon, Tier::Untouched, 1000, first),
                (Kind::Anon, Tier::Used, 1000, used),
            ]);
            let mut policy = PidPolicy::new(&refaults, Swappiness::EQUAL);
            assert_eq!(policy.highest_tier(Kind::Anon), highest, "{first} {used}");
            assert_eq!(policy.highest_tier(Kind::File), Tier::Used, "it has no history");
        }
    }

    #[test]
    fn the_kind_that_refaults_less_goes_weighed_by_swappiness() {
        // Swappiness, refaults of 1000 anonymous and of 1000 file pages, the kind that goes.
        let table = [
            (100, 0, 0, Kind::File),
            (100, 100, 300, Kind::Anon),
            (100, 300, 100, Kind::File),
            (60, 100, 130, Kind::File),
            (60, 100, 300, Kind::Anon),
            (150, 300, 200, Kind::Anon),
            (200, 900, 0, Kind::Anon),
            (0, 0, 900, Kind::File),
            (201, 900, 0, Kind::Anon),
        ];
        for (swappiness, anon, file, goes) in table {
            let refaults = history(&[
                (Kind::Anon, Tier::Used, 1000, anon),
                (Kind::File, Tier::Used, 1000, file),
            ]);
            let swappiness = Swappiness::new(swappiness).unwrap();
            let mut policy = PidPolicy::new(&refaults, swappiness);
            assert_eq!(policy.next_kind(), goes, "{swappiness:?} {anon} {file}");
        }
    }

    #[test]
    fn averages_forget_by_halves() {
        let refaults = history(&[(Kind::Anon, Tier::Used, 1001, 101)]);
        for (evicted, refaulted) in [(1001, 101), (500, 50), (250, 25), (125, 12)] {
            let counts = refaults.counts(Kind::Anon, Tier::Used);
            assert_eq!((counts.evicted, counts.refaulted), (evicted, refaulted));
            refaults.age_counts();
        }
    }

    #[test]
    fn swappiness_ends_at_201() {
        assert_eq!(Swappiness::new(201), Some(Swappiness::ANON_ONLY));
        assert_eq!(Swappiness::new(202), None);
        let allowed = |value| Kind::ALL.map(|kind| Swappiness::new(value).unwrap().allows(kind));
        assert_eq!(
            [0, 1, 200, 201].map(allowed),
            [[false, true], [true, true], [true, true], [true, false]]
        );
    }

    #[test]
    fn rates_of_any_size_compare_without_overflow() {
        let huge = Rate { refaulted: u64::MAX, total: u64::MAX, gain: 3 };
        assert!(huge.tolerates(Rate { gain: 3, ..huge }));
        assert!(!Rate { refaulted: 0, total: 0, gain: 2 }.tolerates(huge));
    }
}
