//! The TDP MMU against its specification (T22): millions of random calls, every answer compared,
//! the tables read by an independent walker, the statistics recounted.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use common::Modelled;
use common::world::{Op, World};
use mmu_core::spte::Capabilities;
use mmu_model::Random;

/// Calls per format and seed.
const OPS: u64 = 45_000;
/// Seeds per format; with eight formats more than 2 * 10^6 calls.
const SEEDS: u64 = 6;
/// Calls between two looks at everything.
const CHECK_EVERY: u64 = 1500;

fn run<F: Modelled>(caps: Capabilities, total: &mut u64) {
    for seed in 0..SEEDS {
        let seed = seed << 8 | u64::from(caps.levels) << 1 | u64::from(caps.accessed_dirty);
        let mut random = Random::new(seed);
        let mut world = World::<F>::new(caps);
        world.populate(&mut random);
        for step in 0..OPS {
            let op = Op::decode(random.next_u64());
            let result = catch_unwind(AssertUnwindSafe(|| {
                world.run(op).expect("enough frames");
                if step % CHECK_EVERY == 0 {
                    world.compare();
                    world.settle();
                    world.compare();
                }
            }));
            if let Err(panic) = result {
                eprintln!("{} {caps:?}: seed {seed}, step {step}, {op:x?}", F::NAME);
                resume_unwind(panic);
            }
        }
        world.settle();
        world.compare();
        *total += world.ops;
        world.finish();
    }
}

#[test]
fn millions_of_random_calls_agree_with_the_specification() {
    let mut total = 0;
    for_each_format!(run, &mut total);
    println!("{total} calls compared");
    assert!(total >= 2_000_000);
}
