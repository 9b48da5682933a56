//! [`RegionSampler`]: how often parts of a VM are used, at a cost that does not grow with the VM
//! (KVM row 5.40, in the manner of DAMON).
//!
//! Memory is divided into regions whose pages are thought to be used alike. Each sample checks one
//! page at random per region; after so many samples, neighbours that were used equally often are
//! merged and large regions are split at random places, and only differences that exist survive.
//! What it finds is an estimate; what it costs is two questions per region and sample.
//!
//! One owner, no lock. Nothing is allocated after [`RegionSampler::new`].

use alloc::vec::Vec;

use mmu_core::addr::{Gfn, GfnRange, to_index, to_u64};
use mmu_core::traits::{AgeMode, AgeRange};

use crate::AgeError;
use crate::random::Random;
use crate::runs::{Heard, Runs, ask};

/// Bounds of a sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SamplerLimits {
    /// Regions at least, as far as there are pages and adjacent regions to tell apart.
    pub min_regions: u64,
    /// Regions at most: what a sample costs.
    pub max_regions: u64,
    /// Samples between two aggregations: the largest count of accesses a region can have.
    pub samples: u64,
}

impl SamplerLimits {
    /// 10 to 1000 regions, 20 samples: DAMON's own.
    pub const DEFAULT: Self = Self { min_regions: 10, max_regions: 1000, samples: 20 };
}

/// A part of the VM whose pages seem to be used alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampledRegion {
    /// Its pages.
    pub range: GfnRange,
    /// Samples of the last aggregation that found it used, 0 to [`SamplerLimits::samples`].
    pub accesses: u64,
    /// Aggregations since its accesses last changed much.
    pub age: u64,
}

/// A region and what is known of it.
#[derive(Clone, Copy, Debug)]
struct Region {
    range: GfnRange,
    /// The page that the next check looks at; `None` before it was prepared.
    page: Option<Gfn>,
    accesses: u64,
    last: u64,
    age: u64,
}

impl Region {
    const fn new(range: GfnRange) -> Self {
        Self { range, page: None, accesses: 0, last: 0, age: 0 }
    }

    /// Two neighbours as one: counts weighed by size.
    fn merged(self, above: Self) -> Self {
        let (a, b) = (self.range.len(), above.range.len());
        let mean = |x: u64, y: u64| {
            let sum = u128::from(x) * u128::from(a) + u128::from(y) * u128::from(b);
            u64::try_from(sum / u128::from((a + b).max(1))).unwrap_or(u64::MAX)
        };
        Self {
            range: GfnRange::new(self.range.start, above.range.end),
            page: self.page,
            accesses: mean(self.accesses, above.accesses),
            last: mean(self.last, above.last),
            age: mean(self.age, above.age),
        }
    }
}

/// How often parts of a VM are used, at a cost that does not grow with the VM (KVM row 5.40): one
/// page at random is checked per region and sample; regions are merged and split by what is found.
/// An estimate. One owner, no lock; nothing is allocated after [`RegionSampler::new`].
#[derive(Debug)]
pub struct RegionSampler {
    /// Sorted, disjoint. Never more than `limits.max_regions`.
    regions: Vec<Region>,
    /// What the last aggregation found.
    found: Vec<SampledRegion>,
    limits: SamplerLimits,
    random: Random,
    pages: u64,
    /// Samples since the last aggregation.
    taken: u64,
    /// Regions after the last split but one.
    before: u64,
}

impl RegionSampler {
    /// Sample these ranges, which must be sorted and disjoint, as those of a table are; ranges that
    /// touch count as one. `seed` decides which pages are looked at.
    ///
    /// # Errors
    /// [`AgeError::EmptyRange`], [`AgeError::OutOfAddressSpace`], [`AgeError::Overlap`] (also for
    /// ranges that are not sorted), [`AgeError::NoMemoryFor`], [`AgeError::BadLimits`] for no
    /// samples, no regions, a minimum above the maximum, or more ranges than regions.
    pub fn new(
        ranges: impl IntoIterator<Item = GfnRange>,
        limits: SamplerLimits,
        seed: u64,
    ) -> Result<Self, AgeError> {
        let SamplerLimits { min_regions, max_regions, samples } = limits;
        let bad = AgeError::BadLimits { min_regions, max_regions, samples };
        if samples == 0 || max_regions == 0 || min_regions > max_regions {
            return Err(bad);
        }
        let bytes = max_regions.saturating_mul(to_u64(size_of::<Region>()));
        let no_memory = AgeError::NoMemoryFor { bytes };
        let (mut regions, mut found): (Vec<Region>, Vec<SampledRegion>) = (Vec::new(), Vec::new());
        regions.try_reserve_exact(to_index(max_regions)).map_err(|_| no_memory)?;
        found.try_reserve_exact(to_index(max_regions)).map_err(|_| no_memory)?;
        for range in ranges {
            if range.is_empty() {
                return Err(AgeError::EmptyRange { range });
            }
            if !GfnRange::ALL.covers(range) {
                return Err(AgeError::OutOfAddressSpace { range });
            }
            if let Some(last) = regions.last().filter(|last| last.range.end > range.start) {
                return Err(AgeError::Overlap { range, existing: last.range });
            }
            if to_u64(regions.len()) == max_regions {
                return Err(bad);
            }
            regions.push(Region::new(range));
        }
        let pages = regions.iter().map(|region| region.range.len()).sum();
        let random = Random::new(seed);
        let mut sampler = Self { regions, found, limits, random, pages, taken: 0, before: 0 };
        sampler.divide();
        Ok(sampler)
    }

    /// Regions now: what the next sample costs, at two questions each.
    #[must_use]
    pub fn regions(&self) -> u64 {
        to_u64(self.regions.len())
    }

    /// Check one page of every region, then clear another for the next check. Call it at even
    /// times; the guest runs in between. Returns the regions when this sample ended an aggregation.
    ///
    /// `heard` gets the pages that clearing found used.
    pub fn sample<M: AgeRange, Y: Heard>(
        &mut self,
        mmu: &M,
        reader: &mut M::Reader,
        heard: &mut Y,
    ) -> Option<&[SampledRegion]> {
        for region in &mut self.regions {
            if let Some(page) = region.page {
                let range = GfnRange::from_len(page, 1);
                let report =
                    ask(mmu, reader, range, AgeMode::Test, &mut mmu_core::traits::CountOnly);
                region.accesses += u64::from(report.young != 0 || report.lost != 0);
            }
            let offset = self.random.below(region.range.len());
            let page = region.range.start.saturating_add(offset);
            let range = GfnRange::from_len(page, 1);
            let young = |run| heard.young(run);
            let mut sink = Runs { range, present: |_| {}, young };
            let _ = ask(mmu, reader, range, AgeMode::Clear, &mut sink);
            region.page = Some(page);
        }
        // The first sample only prepares: one more than the others make a full aggregation.
        self.taken += 1;
        if self.taken <= self.limits.samples {
            return None;
        }
        self.taken = 1;
        self.aggregate();
        Some(&self.found)
    }

    /// What the last aggregation found; empty before the first.
    #[must_use]
    pub fn found(&self) -> &[SampledRegion] {
        &self.found
    }

    fn aggregate(&mut self) {
        // Counts within a tenth of the most possible are alike, as far as samples can tell.
        let alike = (self.limits.samples / 10).max(1);
        for region in &mut self.regions {
            let same = region.accesses.abs_diff(region.last) <= alike;
            region.age = if same { region.age.saturating_add(1) } else { 0 };
        }
        self.merge(alike);
        self.found.clear();
        for region in &mut self.regions {
            let Region { range, accesses, age, .. } = *region;
            self.found.push(SampledRegion { range, accesses, age });
            (region.last, region.accesses) = (accesses, 0);
        }
        self.split();
    }

    /// Merge neighbours that are alike, up to the size that keeps `min_regions` of them.
    fn merge(&mut self, alike: u64) {
        let most = (self.pages / self.limits.min_regions.max(1)).max(1);
        let mut kept = 0_usize;
        for at in 0..self.regions.len() {
            let Some(&region) = self.regions.get(at) else { break };
            let below = kept.checked_sub(1).and_then(|last| self.regions.get_mut(last));
            match below {
                Some(last)
                    if last.range.end == region.range.start
                        && last.accesses.abs_diff(region.accesses) <= alike
                        && last.range.len() + region.range.len() <= most =>
                {
                    *last = last.merged(region);
                }
                _ => {
                    if let Some(slot) = self.regions.get_mut(kept) {
                        *slot = region;
                    }
                    kept += 1;
                }
            }
        }
        self.regions.truncate(kept);
    }

    /// Split regions at random places while there is room: in two, or in three when the number did
    /// not change last time and is small.
    fn split(&mut self) {
        let count = self.regions();
        let max = self.limits.max_regions;
        if count <= max / 2 {
            let parts = if count == self.before && count < max / 3 { 3 } else { 2 };
            self.before = count;
            for _ in 1..parts {
                self.split_each(count);
            }
        }
    }

    /// One more cut in each of the first `count` regions, not far from their middle. New regions go
    /// to the end; sorting puts them in place.
    fn split_each(&mut self, count: u64) {
        for at in 0..to_index(count) {
            if self.regions() >= self.limits.max_regions {
                break;
            }
            let Some(region) = self.regions.get_mut(at) else { break };
            let pages = region.range.len();
            // Between one and nine tenths.
            let cut = pages / 10 + self.random.below(pages - 2 * (pages / 10));
            if cut == 0 || cut >= pages {
                continue;
            }
            let middle = region.range.start.saturating_add(cut);
            let above = GfnRange::new(middle, region.range.end);
            region.range = GfnRange::new(region.range.start, middle);
            let upper = Region { range: above, page: None, ..*region };
            if region.page.is_some_and(|page| page >= middle) {
                region.page = None;
            }
            self.regions.push(upper);
        }
        self.regions.sort_unstable_by_key(|region| region.range.start);
    }

    /// Cut into equal parts until there are `min_regions`, as far as there are pages.
    fn divide(&mut self) {
        let wanted = self.limits.min_regions.min(self.limits.max_regions);
        let most = (self.pages / wanted.max(1)).max(1);
        for at in 0..self.regions.len() {
            let Some(region) = self.regions.get_mut(at) else { break };
            let end = region.range.end;
            let mut cut = region.range.start.saturating_add(most);
            if cut >= end {
                continue;
            }
            region.range = GfnRange::new(region.range.start, cut);
            while cut < end && to_u64(self.regions.len()) < self.limits.max_regions {
                let last = to_u64(self.regions.len()) + 1 == self.limits.max_regions;
                let next = if last { end } else { cut.saturating_add(most).min(end) };
                self.regions.push(Region::new(GfnRange::new(cut, next)));
                cut = next;
            }
            if cut < end {
                // No room for another: the region stays whole.
                if let Some(region) = self.regions.get_mut(at) {
                    region.range = GfnRange::new(region.range.start, end);
                }
            }
        }
        self.regions.sort_unstable_by_key(|region| region.range.start);
    }
}
