//! Any sequence of operations on a generation table against the page-by-page model of its tests:
//! after each one every page, count, list and histogram is compared.

#![no_main]

#[path = "../../crates/lru-age/tests/age/fake.rs"]
#[expect(dead_code, reason = "other tests use more of it")]
mod fake;
#[path = "../../crates/lru-age/tests/age/model.rs"]
mod model;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;

/// Operations of one input at most; longer inputs find nothing that two of these would not.
const OPERATIONS: usize = 64;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Decides the window, the filters and the MMU.
    seed: u64,
    operations: Vec<u64>,
}

fuzz_target!(|input: Input| {
    let mut trace = model::Trace::new(input.seed);
    for &word in input.operations.iter().take(OPERATIONS) {
        trace.act_on(word);
    }
});
