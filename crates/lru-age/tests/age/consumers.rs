//! Other consumers of accessed bits (KVM rows 5.39, 5.40): the idle bitmap and the region sampler.

use core::sync::atomic::Ordering;
use std::collections::BTreeSet;

use lru_age::{AgeError, Heard, IdleBitmap, RegionSampler, SampledRegion, SamplerLimits, Unheard};
use mmu_core::addr::{Gfn, GfnRange, Level, to_index, to_u64};

use crate::fake::{BLOCK, FakeMmu, Rng, pass, range, table_over};

/// Marking and reading at random against a set of pages.
#[test]
fn idle_pages_are_those_marked_and_not_used_since() {
    let mut idle_seen = 0;
    for seed in 0..20 {
        println!("seed {seed}");
        let mut rng = Rng(seed);
        let mmu = FakeMmu::new(4);
        let parts = [range(3..1000), range(1000..1010), range(1100..2048)];
        let mut bitmap = IdleBitmap::new(parts).unwrap();
        let inside = |gfn: u64| parts.iter().any(|part| part.contains(Gfn::new(gfn)));
        // Marked, and not used since.
        let mut model = BTreeSet::new();
        for _ in 0..300 {
            match rng.below(6) {
                0 => mmu.map(rng.pages(2048)),
                1 => {
                    for gfn in rng.pages(2048) {
                        mmu.touch(gfn);
                        if mmu.leaf(gfn).is_some() {
                            model.remove(&gfn);
                        }
                    }
                }
                2 => {
                    let first = rng.below(32) * 64;
                    let words = [rng.next() & rng.next(), u64::MAX, 0, rng.next()];
                    let words = &words[..to_index(1 + rng.below(4))];
                    for at in 0..64 * to_u64(words.len()) {
                        let set = words[to_index(at / 64)] >> (at % 64) & 1 == 1;
                        let gfn = first + at;
                        if set && gfn < 2048 && inside(gfn) && mmu.leaf(gfn).is_some() {
                            model.insert(gfn);
                        }
                    }
                    let first = Gfn::new(first);
                    bitmap.mark(first, words, &mmu, &mut (), &mut Unheard).unwrap();
                }
                _ => {
                    let first = rng.below(32);
                    let mut words = vec![u64::MAX; to_index(1 + rng.below(32 - first))];
                    bitmap.read(Gfn::new(first * 64), &mut words, &mmu, &mut ()).unwrap();
                    for (at, word) in words.iter().enumerate() {
                        for bit in 0..64 {
                            let gfn = (first + to_u64(at)) * 64 + bit;
                            let idle = word >> bit & 1 == 1;
                            assert_eq!(idle, model.contains(&gfn), "gfn {gfn}");
                            idle_seen += u64::from(idle);
                        }
                    }
                }
            }
        }
        assert!(bitmap.marked() >= to_u64(model.len()));
    }
    assert!(idle_seen > 10_000, "{idle_seen}");
}

#[test]
fn reading_leaves_accessed_bits_alone_and_marking_tells_what_it_cleared() {
    let mmu = FakeMmu::new(2);
    let table = table_over(&mmu);
    mmu.map(0..BLOCK);
    mmu.map_huge(BLOCK, Level::L2);
    (0..2 * BLOCK).for_each(|gfn| mmu.touch(gfn));
    let _ = pass(&table, &mmu);
    [5, 70, BLOCK + 9].iter().for_each(|&gfn| mmu.touch(gfn));
    let mut bitmap = IdleBitmap::new(table.ranges()).unwrap();
    assert_eq!(bitmap.memory_bytes(), 2 * BLOCK / 8);
    let mut editor = table.edit().unwrap();
    bitmap.mark(Gfn::new(0), &[u64::MAX], &mmu, &mut (), &mut editor).unwrap();
    // Row 5.9: one page of a huge leaf stands for all of them.
    bitmap.mark(Gfn::new(BLOCK), &[1], &mmu, &mut (), &mut editor).unwrap();
    drop(editor);
    let max = table.window().max_seq();
    let youngest = |gfn| table.page_age(Gfn::new(gfn)).unwrap().seq == max;
    assert_eq!([5, 6, 70, BLOCK + 400].map(youngest), [true, false, false, true]);
    assert!(mmu.leaf(70).unwrap().young, "not marked");
    let mut words = [0; 16];
    bitmap.read(Gfn::new(0), &mut words, &mmu, &mut ()).unwrap();
    assert_eq!((words[0], words[1], words[8]), (u64::MAX, 0, 1));
    mmu.touch(5);
    mmu.touch(BLOCK + 400);
    for _ in 0..2 {
        bitmap.read(Gfn::new(0), &mut words, &mmu, &mut ()).unwrap();
        assert_eq!((words[0], words[8]), (!(1 << 5), 0));
        assert!(mmu.leaf(5).unwrap().young, "the next pass sees it");
    }
    let refused = bitmap.read(Gfn::new(8), &mut words, &mmu, &mut ());
    assert_eq!(refused, Err(AgeError::Unaligned { gfn: Gfn::new(8) }));
    let refused = bitmap.mark(Gfn::new(63), &[1], &mmu, &mut (), &mut Unheard);
    assert_eq!(refused, Err(AgeError::Unaligned { gfn: Gfn::new(63) }));
}

/// Reading costs what is marked, not what is read.
#[test]
fn words_in_which_nothing_is_idle_are_not_asked_about() {
    let mmu = FakeMmu::new(16);
    mmu.map(0..16 * BLOCK);
    mmu.map_huge(4 * BLOCK, Level::L2);
    let parts = [range(10..9 * BLOCK), range(9 * BLOCK + 3..16 * BLOCK)];
    let mut bitmap = IdleBitmap::new(parts).unwrap();
    let mut words = vec![0; 16 * 8];
    let mut cost = |bitmap: &mut IdleBitmap| {
        let count = || [&mmu.calls, &mmu.entries].map(|n| n.load(Ordering::Relaxed));
        let before = count();
        bitmap.read(Gfn::new(0), &mut words, &mmu, &mut ()).unwrap();
        let [calls, entries] = count();
        let seen: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        (seen, calls - before[0], entries - before[1])
    };
    assert_eq!(cost(&mut bitmap), (0, 0, 0), "nothing is marked");
    let mark = |bitmap: &mut IdleBitmap, first, words: &[u64]| {
        bitmap.mark(Gfn::new(first), words, &mmu, &mut (), &mut Unheard).unwrap();
    };
    // The end of one table and the start of the next are one run.
    mark(&mut bitmap, 2 * BLOCK - 64, &[1 << 63, 1]);
    assert_eq!(cost(&mut bitmap), (2, 1, 2 * BLOCK));
    // A huge leaf is one entry; the first word of a part begins inside it.
    mark(&mut bitmap, 4 * BLOCK + 64, &[0b110]);
    mark(&mut bitmap, 9 * BLOCK, &[u64::MAX]);
    assert_eq!(cost(&mut bitmap), (4 + 61, 3, 3 * BLOCK + 1));
    // What was used is asked about once more at most.
    mmu.touch(2 * BLOCK - 1);
    mmu.touch(2 * BLOCK);
    mmu.touch(4 * BLOCK + 500);
    assert_eq!(cost(&mut bitmap), (61, 3, 3 * BLOCK + 1));
    assert_eq!(cost(&mut bitmap), (61, 1, BLOCK));
}

#[test]
fn bitmaps_and_samplers_refuse_ranges_that_are_none() {
    let empty = range(5..5);
    assert_eq!(IdleBitmap::new([empty]).unwrap_err(), AgeError::EmptyRange { range: empty });
    let [low, high] = [range(0..10), range(9..20)];
    let overlap = AgeError::Overlap { range: high, existing: low };
    assert_eq!(IdleBitmap::new([low, high]).unwrap_err(), overlap);
    let limits = SamplerLimits::DEFAULT;
    assert_eq!(RegionSampler::new([low, high], limits, 0).unwrap_err(), overlap);
    for (min_regions, max_regions, samples) in [(0, 0, 5), (5, 4, 5), (1, 5, 0), (1, 1, 5)] {
        let limits = SamplerLimits { min_regions, max_regions, samples };
        let parts = [range(0..10), range(10..20)];
        let bad = AgeError::BadLimits { min_regions, max_regions, samples };
        assert_eq!(RegionSampler::new(parts, limits, 0).unwrap_err(), bad);
    }
}

/// Counts what clearing found.
#[derive(Default)]
struct Told(u64);

impl Heard for Told {
    fn young(&mut self, range: GfnRange) {
        self.0 += range.len();
    }
}

fn covers(found: &[SampledRegion], parts: &[GfnRange]) {
    let mut at = found.iter();
    for part in parts {
        let mut next = part.start;
        while next < part.end {
            let region = at.next().expect("a region for every page");
            assert_eq!(region.range.start, next);
            next = region.range.end;
        }
        assert_eq!(next, part.end, "regions do not cross ranges");
    }
    assert!(at.next().is_none());
}

/// A hot eighth of 64 blocks is found, at a cost that the limits bound, and found again after it
/// moved.
#[test]
fn a_sampler_finds_what_is_hot_at_a_bounded_cost() {
    for seed in 0..10 {
        println!("seed {seed}");
        let mut rng = Rng(seed);
        let blocks = 64;
        let mmu = FakeMmu::new(blocks);
        mmu.map(0..blocks * BLOCK);
        let parts = [range(0..20 * BLOCK), range(21 * BLOCK..blocks * BLOCK)];
        let limits = SamplerLimits { min_regions: 10, max_regions: 100, samples: 20 };
        let mut sampler = RegionSampler::new(parts, limits, seed).unwrap();
        let mut told = Told::default();
        let mut aggregations = 0;
        for hot in [8 * BLOCK..16 * BLOCK, 40 * BLOCK..48 * BLOCK] {
            for sample in 0..60 * 20 {
                hot.clone().filter(|gfn| (gfn + sample) % 4 != 0).for_each(|gfn| mmu.touch(gfn));
                let regions = sampler.regions();
                assert!((2..=100).contains(&regions), "{regions}");
                if let Some(found) = sampler.sample(&mmu, &mut (), &mut told) {
                    aggregations += 1;
                    covers(found, &parts);
                    assert!(found.iter().all(|region| region.accesses <= limits.samples));
                }
            }
            // Where most samples found use, weighed by pages.
            let is_hot = |region: &&SampledRegion| region.accesses * 2 >= limits.samples;
            let mut right = 0;
            let mut wrong = 0;
            for region in sampler.found().iter().filter(is_hot) {
                let inside = region.range.intersection(range(hot.clone())).len();
                (right, wrong) = (right + inside, wrong + region.range.len() - inside);
            }
            let wanted = hot.end - hot.start;
            assert!(right * 100 >= wanted * 90, "seed {seed}: {right} of {wanted} found");
            assert!(wrong * 100 <= wanted * 25, "seed {seed}: {wrong} wrongly");
        }
        assert_eq!(aggregations, (2 * 60 * 20 - 1) / 20);
        assert!(told.0 > 0);
        let _ = rng.next();
    }
}

#[test]
fn nothing_to_tell_apart_leaves_few_old_regions() {
    let mmu = FakeMmu::new(16);
    mmu.map(0..16 * BLOCK);
    let limits = SamplerLimits { min_regions: 4, max_regions: 64, samples: 5 };
    let all = range(0..16 * BLOCK);
    let mut sampler = RegionSampler::new([all], limits, 3).unwrap();
    assert_eq!(sampler.regions(), 4);
    for _ in 0..5 * 40 + 1 {
        let _ = sampler.sample(&mmu, &mut (), &mut Unheard);
    }
    let found = sampler.found();
    covers(found, &[all]);
    assert!(found.len() <= 8, "merged again each time: {}", found.len());
    assert!(found.iter().all(|region| region.accesses == 0 && region.age >= 30), "{found:?}");
}

#[test]
fn one_page_is_a_region_too() {
    let mmu = FakeMmu::new(1);
    mmu.map(0..1);
    let limits = SamplerLimits { min_regions: 3, max_regions: 9, samples: 2 };
    let mut sampler = RegionSampler::new([range(0..1)], limits, 3).unwrap();
    for _ in 0..20 {
        mmu.touch(0);
        let _ = sampler.sample(&mmu, &mut (), &mut Unheard);
    }
    let expected = [SampledRegion { range: range(0..1), accesses: 2, age: 8 }];
    assert_eq!(sampler.found(), expected);
}
