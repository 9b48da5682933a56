//! Shadow tables against the guest's own: an access through them reaches what the guest's tables
//! say, and nothing that they have not said since the guest last flushed the address.
//!
//! The guest has a few tables, small enough that every address is looked at after every step. It
//! edits them, with and without flushes, and accesses memory through a processor whose TLB forgets
//! nothing by itself; the host takes pages back meanwhile. The specification below walks the
//! guest's tables on its own and remembers what each address meant since its last flush.

mod common;
mod shadow_support;

use shadow_mmu::ReclaimPolicy;
use shadow_support::World;

fn run(seed: u64, steps: u64, quota: u32, policy: ReclaimPolicy) -> shadow_mmu::ShadowStats {
    let mut world = World::new(seed, quota, policy);
    world.furnish();
    world.load_cr3(0);
    for step in 0..steps {
        if step == steps / 2 {
            world.rig.log();
        }
        world.step();
        world.check();
    }
    let stats = world.rig.stats();
    world.finish();
    stats
}

fn add(sum: &mut shadow_mmu::ShadowStats, one: shadow_mmu::ShadowStats) {
    sum.pages_made += one.pages_made;
    sum.pages_zapped += one.pages_zapped;
    sum.pages_recycled += one.pages_recycled;
    sum.second_chances += one.second_chances;
    sum.unsyncs += one.unsyncs;
    sum.syncs += one.syncs;
    sum.table_writes += one.table_writes;
    sum.floods += one.floods;
}

#[test]
fn shadow_tables_are_the_guests_tables_and_never_wider() {
    let mut sum = shadow_mmu::ShadowStats::default();
    for seed in 1..=400 {
        add(&mut sum, run(seed, 2_000, 1000, ReclaimPolicy::Fifo));
    }
    println!("{sum:?}");
    assert!(sum.unsyncs > 1000 && sum.syncs > 1000 && sum.table_writes > 10_000, "{sum:?}");
}

#[test]
fn a_small_quota_changes_nothing_that_the_guest_sees() {
    let mut sum = shadow_mmu::ShadowStats::default();
    for seed in 1001..=1050 {
        add(&mut sum, run(seed, 2_000, 10, ReclaimPolicy::Fifo));
        add(&mut sum, run(seed, 2_000, 10, ReclaimPolicy::Accessed));
    }
    println!("{sum:?}");
    assert!(sum.pages_recycled > 1000 && sum.second_chances > 100, "{sum:?}");
}
