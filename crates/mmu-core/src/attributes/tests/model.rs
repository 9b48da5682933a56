//! Random changes against one value a gfn.

#![expect(clippy::indexing_slicing, reason = "a test's model")]

use super::*;

const GFNS: u64 = 96;
const STEPS: u32 = 400;
const SEEDS: u64 = 40;
/// Few, so that runs often meet their like.
const VALUES: [Attributes; 4] =
    [Attributes::empty(), Attributes::PRIVATE, Attributes::NO_WRITE, Attributes::NO_EXEC];

fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    *seed >> 33
}

/// What a map of one value a gfn says.
struct Naive(Vec<Attributes>);

impl Naive {
    fn of(&self, range: GfnRange) -> &[Attributes] {
        &self.0[to_index(range.start.get())..to_index(range.end.get())]
    }

    fn edges(&self) -> usize {
        let first = usize::from(!self.0[0].is_empty());
        first + self.0.windows(2).filter(|pair| pair[0] != pair[1]).count()
    }
}

fn agree(map: &AttributeMap, naive: &Naive, asked: GfnRange, context: &str) {
    assert_eq!(map.edges(), naive.edges(), "{context}: not coalesced");
    assert_eq!(map.is_empty(), naive.0.iter().all(|a| a.is_empty()), "{context}");
    for (gfn, expected) in naive.0.iter().enumerate() {
        assert_eq!(map.get(Gfn::new(to_u64(gfn))), *expected, "{context}: gfn {gfn}");
    }
    let expected = naive.of(asked);
    let uniform = expected.windows(2).all(|pair| pair[0] == pair[1]);
    assert_eq!(map.is_uniform(asked), uniform, "{context}: {asked}");
    for value in VALUES {
        let all = expected.iter().all(|a| *a == value);
        assert_eq!(map.all_are(asked, value), all, "{context}: {asked} {value:?}");
    }
    let mut seen = Vec::new();
    let mut last = None;
    for run in map.runs(asked) {
        assert_eq!(run.range.start.get(), asked.start.get() + to_u64(seen.len()), "{context}");
        assert_ne!(last, Some(run.attributes), "{context}: neighbours alike");
        seen.extend((0..run.range.len()).map(|_| run.attributes));
        last = Some(run.attributes);
    }
    assert_eq!(seen, expected, "{context}: runs of {asked}");
}

#[test]
fn the_map_says_what_one_value_a_gfn_would_say() {
    for seed in 0..SEEDS {
        let mut random = seed;
        // Some maps are so small that changes are refused.
        let limit = if seed % 2 == 0 { usize::MAX } else { 6 };
        let mut map = AttributeMap::new(limit);
        let mut naive = Naive(vec![Attributes::empty(); to_index(GFNS)]);
        let mut refused = 0;
        for step in 0..STEPS {
            let span = |random: &mut u64| {
                let start = next(random) % (GFNS - 1);
                range(start, (start + 1 + next(random) % 24).min(GFNS - 1))
            };
            let (changed, asked) = (span(&mut random), span(&mut random));
            let value = VALUES[to_index(next(&mut random) % to_u64(VALUES.len()))];
            let context = format!("seed {seed} step {step}: {changed} becomes {value:?}");
            let mut after = Naive(naive.0.clone());
            after.0[to_index(changed.start.get())..to_index(changed.end.get())].fill(value);
            match map.set(changed, value) {
                Ok(()) => naive = after,
                Err(error) => {
                    let needed = after.edges();
                    assert_eq!(error, AttributeError::TooManyEdges { needed, limit }, "{context}");
                    assert!(needed > limit, "{context}");
                    refused += 1;
                }
            }
            agree(&map, &naive, asked, &context);
        }
        assert_eq!(refused > 0, limit != usize::MAX, "seed {seed}: {refused} refused");
    }
}
