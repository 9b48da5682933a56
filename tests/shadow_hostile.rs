//! Any calls on a shadow MMU for a guest whose tables hold anything, in every mode: what the fuzz
//! target `shadow_ops` looks for with guidance, drawn at random here. After each call no address
//! permits more than the guest's tables have since it last flushed.

mod common;
mod shadow_support;

use common::{Modelled, five, no_ad};
use mmu_core::spte::{Capabilities, Ept, Npt};
use mmu_model::Random;
use shadow_mmu::ReclaimPolicy;
use shadow_support::hostile::Call;
use shadow_support::kernel::{self, Kernel};
use shadow_support::nested::{EPT, Hypervisor, Kind, Mode};
use shadow_support::wide::{Guest, World};

/// Calls for one guest.
const CALLS: u64 = 400;

fn run<G: Guest>(seed: u64, caps: Capabilities, guest: G) -> u64 {
    let mut random = Random::new(seed);
    let policy = if seed % 2 == 0 { ReclaimPolicy::Fifo } else { ReclaimPolicy::Accessed };
    let mut world = World::new(seed, caps, guest, 1000, policy);
    world.extra = (0..6).map(|_| random.next_u64()).collect();
    world.list_addresses();
    world.furnish_well(&mut random);
    if random.chance(1, 2) {
        for _ in 0..160 {
            world.furnish(random.next_u64() as u16, random.next_u64());
        }
    }
    world.load();
    for _ in 0..CALLS {
        let (what, place) = (random.next_u64() as u8, random.next_u64() as u16);
        world.call(Call { what, place, value: random.next_u64() });
    }
    let made = world.rig.stats().pages_made;
    world.finish();
    made
}

#[test]
fn any_calls_on_any_tables_are_never_wider() {
    let mut made = 0;
    for levels in 3..=5 {
        for (number, mode) in (0..).zip(kernel::Mode::all(levels)) {
            for seed in 0..16 {
                let seed = seed + 100 * number + 10_000 * u64::from(levels);
                made += run(seed, kernel::caps(levels), Kernel::new(mode));
            }
        }
    }
    println!("{made} pages made");
    assert!(made > 8_000, "{made}");
}

fn nested<F: Modelled>(caps: Capabilities, kind: Kind, levels: u32) {
    let mut made = 0;
    for seed in 0..32 {
        made += run(seed, caps, Hypervisor::<F>::new(Mode { kind, levels }));
    }
    println!("{kind:?}, {levels} levels: {made} pages made");
    assert!(made > 500, "{made}");
}

#[test]
fn any_calls_on_any_nested_tables_are_never_wider() {
    nested::<Ept>(Capabilities::ept(), EPT, 4);
    nested::<Ept>(five(Capabilities::ept()), EPT, 5);
    // Accesses are tracked by permissions.
    nested::<Ept>(no_ad(Capabilities::ept()), EPT, 4);
    nested::<Npt>(Capabilities::npt(), Kind::Npt, 4);
}
