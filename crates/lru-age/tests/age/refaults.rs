//! Refault distance (KVM row 5.38) against a model that forgets nothing.

use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::HashMap;

use lru_age::{Kind, Refault, Refaults, Seq, Tier};
use mmu_core::addr::Gfn;

use crate::fake::Rng;

#[test]
fn distances_and_generations_are_those_of_the_model() {
    for seed in 0..8 {
        println!("seed {seed}");
        let mut rng = Rng(seed);
        let refaults = Refaults::new(1 << 12).unwrap();
        assert_eq!((refaults.memory_bytes(), refaults.granule()), (8 << 12, 1));
        let mut model = HashMap::new();
        let (mut evictions, mut max) = (0, 3 + rng.below(1000));
        let mut missed = 0;
        for _ in 0..40_000 {
            let gfn = rng.below(2048) * (1 + 511 * (seed % 2));
            match rng.below(4) {
                0 | 1 => {
                    let seq = max - rng.below(3);
                    let kind = Kind::ALL[usize::from(rng.below(2) == 0)];
                    let tier = Tier::ALL[usize::from(rng.below(2) == 0)];
                    refaults.evicted(Gfn::new(gfn), Seq::new(seq), kind, tier);
                    model.insert(gfn, (evictions, seq, kind, tier));
                    evictions += 1;
                }
                2 => max += u64::from(rng.below(50) == 0),
                _ => {
                    let expected = model.remove(&gfn).map(|(at, seq, kind, tier)| Refault {
                        distance: evictions - at,
                        generations: (max - seq) % 256,
                        kind,
                        tier,
                    });
                    let found = refaults.refault(Gfn::new(gfn), Seq::new(max));
                    if found.is_none() && expected.is_some() {
                        missed += 1;
                        continue;
                    }
                    assert_eq!(found, expected);
                }
            }
        }
        assert_eq!(refaults.evictions(), evictions);
        // Half full buckets overflow now and then; nothing else is forgotten.
        assert!(missed < 200, "{missed} forgotten");
    }
}

#[test]
fn recent_means_that_the_generation_would_still_exist() {
    let refaults = Refaults::new(8).unwrap();
    for (generations, recent) in [(0, true), (3, true), (4, false), (100, false)] {
        refaults.evicted(Gfn::new(1), Seq::new(7), Kind::Anon, Tier::Used);
        let refault = refaults.refault(Gfn::new(1), Seq::new(7 + generations)).unwrap();
        assert_eq!((refault.generations, refault.is_recent()), (generations, recent));
        assert!(refault.is_within(1) && !refault.is_within(0));
    }
    assert_eq!(refaults.counts(Kind::Anon, Tier::Used).refaulted, 2);
    assert_eq!(refaults.refault(Gfn::new(1), Seq::new(8)), None, "taken once");
}

#[test]
fn memory_is_bounded_and_the_oldest_are_forgotten_first() {
    let refaults = Refaults::new(1 << 10).unwrap();
    for gfn in 0..100_000 {
        refaults.evicted(Gfn::new(gfn), Seq::new(4), Kind::File, Tier::Untouched);
    }
    let known = |range: core::ops::Range<u64>| {
        range.filter(|&gfn| refaults.refault(Gfn::new(gfn), Seq::new(4)).is_some()).count()
    };
    assert_eq!(known(0..90_000), 0);
    assert!(known(99_500..100_000) > 450, "the last half of the capacity is there");
    assert!(known(90_000..100_000) < 1 << 10);
}

/// Of two faults on one page one learns that it was evicted.
#[test]
fn every_entry_is_taken_once_by_whoever_comes_first() {
    let refaults = Refaults::new(1 << 14).unwrap();
    let pages = 4096_u64;
    for round in 0..8 {
        for gfn in 0..pages {
            refaults.evicted(Gfn::new(gfn), Seq::new(4 + round), Kind::Anon, Tier::Used);
        }
        let taken = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for gfn in 0..pages {
                        let found = refaults.refault(Gfn::new(gfn), Seq::new(5 + round));
                        taken.fetch_add(u64::from(found.is_some()), Ordering::Relaxed);
                    }
                });
            }
        });
        let taken = taken.into_inner();
        assert!(taken <= pages && taken > pages * 9 / 10, "{taken} of {pages}");
    }
    assert!(refaults.counts(Kind::Anon, Tier::Used).refaulted <= 8 * pages);
}
