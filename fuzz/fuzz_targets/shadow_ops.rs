//! Any sequence of calls on a shadow MMU, for a guest in any mode whose tables hold anything: never
//! wider than the guest's tables have been since it last flushed, after each call. The guest's
//! tables are walked by an independent model, ours by an independent processor; at the end nothing
//! may be left.

#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/shadow_support/mod.rs"]
mod shadow_support;

use common::{Modelled, five, no_ad};
use libfuzzer_sys::fuzz_target;
use mmu_core::spte::{Capabilities, Ept, Npt};
use mmu_model::Random;
use shadow_mmu::ReclaimPolicy;
use shadow_support::hostile::Call;
use shadow_support::kernel::{self, Kernel};
use shadow_support::nested::{EPT, Hypervisor, Kind, Mode};
use shadow_support::wide::{Guest, World};

/// Calls of one input at most; longer inputs find nothing that two of these would not.
const CALLS: usize = 128;
/// Addresses that an input adds.
const ADDRESSES: usize = 6;
/// Bytes of a call.
const CALL: usize = 11;
/// Entries of random tables.
const FILLED: usize = 160;

/// Not by `Arbitrary`, which ends a list at every second byte: inputs grow call by call.
struct Input<'a> {
    kind: u8,
    quota: u8,
    seed: u8,
    /// Bit 0: an honest guest's tables. Bit 1: random ones, over them.
    tables: u8,
    /// Looked at beside those that the guest's tables mostly lead to.
    addresses: &'a [[u8; 8]],
    calls: &'a [[u8; CALL]],
}

fuzz_target!(|data: &[u8]| {
    let Some((&[kind, quota, seed, tables], rest)) = data.split_first_chunk() else { return };
    let (addresses, rest) = rest.split_at((8 * ADDRESSES).min(rest.len()));
    let (addresses, calls) = (addresses.as_chunks().0, rest.as_chunks().0);
    let input = Input { kind, quota, seed, tables, addresses, calls };
    let levels = 3 + input.kind / 16 % 3;
    match input.kind % 16 {
        0..10 => {
            let modes = kernel::Mode::all(levels);
            let mode = modes[usize::from(input.kind) % modes.len()];
            check(kernel::caps(levels), Kernel::new(mode), &input);
        }
        10 => nested::<Ept>(Capabilities::ept(), EPT, 4, &input),
        11 => nested::<Ept>(five(Capabilities::ept()), EPT, 4, &input),
        12 => nested::<Ept>(five(Capabilities::ept()), EPT, 5, &input),
        // Accesses are tracked by permissions.
        13 => nested::<Ept>(no_ad(Capabilities::ept()), EPT, 4, &input),
        14 => nested::<Npt>(Capabilities::npt(), Kind::Npt, 4, &input),
        _ => nested::<Npt>(five(Capabilities::npt()), Kind::Npt, 4, &input),
    }
});

fn nested<F: Modelled>(caps: Capabilities, kind: Kind, levels: u32, input: &Input<'_>) {
    check(caps, Hypervisor::<F>::new(Mode { kind, levels }), input);
}

fn check<G: Guest>(caps: Capabilities, guest: G, input: &Input<'_>) {
    let policy = if input.quota & 1 == 0 { ReclaimPolicy::Fifo } else { ReclaimPolicy::Accessed };
    let quota = if input.quota < 64 { 4 + u32::from(input.quota) / 2 } else { 1000 };
    let mut world = World::new(u64::from(input.seed), caps, guest, quota, policy);
    world.extra = input.addresses.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    world.list_addresses();
    let mut random = Random::new(u64::from(input.tables));
    if input.tables & 1 == 1 {
        world.furnish_well(&mut random);
    }
    for _ in 0..if input.tables & 2 == 0 { 0 } else { FILLED } {
        let (place, value) = (random.next_u64() as u16, random.next_u64());
        world.furnish(place, value);
    }
    world.load();
    for &[what, low, high, ref value @ ..] in input.calls.iter().take(CALLS) {
        let place = u16::from_le_bytes([low, high]);
        world.call(Call { what, place, value: u64::from_le_bytes(*value) });
    }
    world.finish();
}
