//! Any sequence of calls on a TDP MMU against the specification of what is mapped: every answer is
//! compared, the tables are read by an independent walker, at the end the statistics are recounted
//! and nothing may be left.

#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;

use arbitrary::Arbitrary;
use common::Modelled;
use common::world::{Op, World};
use libfuzzer_sys::fuzz_target;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt};
use mmu_model::Random;

/// Calls of one input at most; longer inputs find nothing that two of these would not.
const CALLS: usize = 256;

#[derive(Arbitrary, Debug)]
struct Input {
    kind: u8,
    /// Decides where the first slots are.
    seed: u8,
    /// `provide` fails from this call on, unless it is 255.
    frames: u8,
    calls: Vec<u64>,
}

fuzz_target!(|input: Input| {
    match input.kind % 6 {
        0 => check::<Ept>(Capabilities::ept(), &input),
        1 => check::<Ept>(common::no_ad(Capabilities::ept()), &input),
        2 => check::<Ept>(common::five(Capabilities::ept()), &input),
        3 => check::<Npt>(Capabilities::npt(), &input),
        4 => check::<Npt>(common::no_ad(Capabilities::npt()), &input),
        _ => check::<Legacy>(Capabilities::legacy(), &input),
    }
});

fn check<F: Modelled>(caps: Capabilities, input: &Input) {
    let shape = common::Shape { spaces: 2, frames: 192, ..common::Shape::new(caps) };
    let mut world = World::<F>::with(shape);
    world.populate(&mut Random::new(u64::from(input.seed)));
    if input.frames != u8::MAX {
        world.guest.host().refuse(u64::from(input.frames), u64::MAX);
    }
    for call in input.calls.iter().take(CALLS) {
        if call >> 59 == 0x1f {
            world.ask_log(*call);
            continue;
        }
        // A call may fail for want of frames; the model then has not changed either.
        if world.run(Op::decode(*call)).is_err() {
            world.settle();
        }
    }
    world.compare();
    world.settle();
    world.compare();
    world.finish();
}
