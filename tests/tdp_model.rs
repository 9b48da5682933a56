//! The TDP MMU against its specification (T22): millions of random calls, every answer compared,
//! the tables read by an independent walker, the statistics recounted.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use common::Modelled;
use common::world::{Op, World};
use mmu_core::spte::Capabilities;
use mmu_core::stats::Counter;
use mmu_model::Random;

/// Calls per format and seed.
const OPS: u64 = 42_000;
/// Seeds per format; with eight formats 10^7 calls.
const SEEDS: u64 = 30;
/// Calls between two looks at everything.
const CHECK_EVERY: u64 = 1500;

/// What must happen often, or the calls missed something.
const HAPPENS: [Counter; 9] = [
    Counter::PfFixed,
    Counter::PfFast,
    Counter::PfSpurious,
    Counter::PfEmulate,
    Counter::Splits,
    Counter::Collapses,
    Counter::LeavesZapped,
    Counter::LeavesAged,
    Counter::TablesUnlinked,
];

fn run<F: Modelled>(caps: Capabilities, total: &mut u64, happened: &mut [u64; 9]) {
    for seed in 0..SEEDS {
        let seed = seed << 8 | u64::from(caps.levels) << 1 | u64::from(caps.accessed_dirty);
        let mut random = Random::new(seed);
        let mut world = World::<F>::new(caps);
        world.populate(&mut random);
        for step in 0..OPS {
            let word = random.next_u64();
            let op = Op::decode(word);
            let result = catch_unwind(AssertUnwindSafe(|| {
                world.run(op).expect("enough frames");
                if step % CHECK_EVERY == 0 {
                    world.ask_log(word);
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
        for (sum, counter) in happened.iter_mut().zip(HAPPENS) {
            *sum += world.guest.stat(counter);
        }
        world.finish();
    }
}

// INVARIANT[I1], INVARIANT[I3], INVARIANT[I4], INVARIANT[I5], INVARIANT[I24].
#[test]
fn millions_of_random_calls_agree_with_the_specification() {
    let (mut total, mut happened) = (0, [0; 9]);
    for_each_format!(run, &mut total, &mut happened);
    println!("{total} calls compared");
    assert!(total >= 10_000_000);
    for (count, counter) in happened.into_iter().zip(HAPPENS) {
        println!("{:>16} {count}", counter.name());
        assert!(count >= 10_000, "{} happened {count} times", counter.name());
    }
}
