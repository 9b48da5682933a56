//! A guest hypervisor's EPT or NPT under shadow: what its guest reaches is what the hypervisor's
//! tables say, and never more.
//!
//! As `shadow_modes`, one dimension up: the addresses are a nested guest's physical ones. The
//! specification walks EPT and NPT on its own.

mod common;
mod shadow_support;

use common::{Modelled, five};
use mmu_core::spte::{Capabilities, Ept, Npt};
use mmu_model::{Access, AccessKind};
use shadow_mmu::ReclaimPolicy;
use shadow_support::nested::{EPT, Hypervisor, Kind, Mode};
use shadow_support::wide::{Seen, World};

fn run<F: Modelled + std::fmt::Debug>(caps: Capabilities, kind: Kind, levels: u32) {
    let mode = Mode { kind, levels };
    let mut sum = Seen::default();
    for seed in 0..48 {
        let quota = if seed % 4 == 3 { 12 } else { 1000 };
        let policy = if seed % 2 == 0 { ReclaimPolicy::Fifo } else { ReclaimPolicy::Accessed };
        World::new(seed, caps, Hypervisor::<F>::new(mode), quota, policy).run(&mut sum);
    }
    println!("{mode:?} on {} levels: {sum:?}", caps.levels);
    assert!(sum.reached[1] > 100 && sum.reached[2] > 100, "{sum:?}");
    assert!(sum.small > 100 && sum.huge > 50 && sum.unsyncs > 20, "{sum:?}");
}

#[test]
fn nested_ept_of_four_levels_is_never_wider() {
    run::<Ept>(Capabilities::ept(), EPT, 4);
    run::<Ept>(five(Capabilities::ept()), EPT, 4);
}

#[test]
fn nested_ept_of_five_levels_is_never_wider() {
    run::<Ept>(five(Capabilities::ept()), EPT, 5);
}

#[test]
fn nested_npt_is_never_wider() {
    run::<Npt>(Capabilities::npt(), Kind::Npt, 4);
    run::<Npt>(five(Capabilities::npt()), Kind::Npt, 4);
}

/// KVM row 4.39: a fault that the hypervisor gets invalidates its address, though nobody flushes.
#[test]
fn a_reflected_fault_invalidates_its_address() {
    const ALL: u64 = 7 | 1 << 8 | 1 << 9;
    const READ: u64 = 1 | 1 << 8 | 6 << 3;
    let mode = Mode { kind: EPT, levels: 4 };
    let caps = Capabilities::ept();
    let guest = Hypervisor::<Ept>::new(mode);
    let mut world = World::new(1, caps, guest, 1000, ReclaimPolicy::Fifo);
    for (table, next) in [(13, 10), (14, 10), (10, 6), (6, 0)] {
        world.memory.set(table << 12, 8, (next << 12) | ALL);
    }
    world.memory.set(0, 8, (600 << 12) | READ);
    // The nested guest may write to the table.
    world.memory.set(8, 8, ALL | 6 << 3);
    world.load();
    let number = |gpa: u64| mode.addresses().iter().position(|one| *one == gpa).unwrap();
    world.access(number(0), AccessKind::Read, true);
    world.access(number(0x1000), AccessKind::Write, true);
    assert!(world.is_writable(0), "the table is not out of sync");
    world.memory.set(0, 8, (700 << 12) | READ);
    world.remember_all();
    assert_eq!(world.shadow(number(0)).unwrap().pa >> 12, world.backing.pfn(600).unwrap());
    world.access(number(0), AccessKind::Write, true);
    world.check();
    world.access(number(0), AccessKind::Read, true);
    assert_eq!(world.shadow(number(0)).unwrap().pa >> 12, world.backing.pfn(700).unwrap());
    world.finish();
}

/// KVM row 4.34: what the hypervisor's entries permit together may come to nothing. Such an entry
/// goes when it follows its table; one that permits something stays.
#[test]
fn an_entry_that_permits_nothing_any_more_is_taken_out() {
    const READ: u64 = 1;
    const WRITE: u64 = 2;
    const EXEC: u64 = 4;
    const USED: u64 = 1 << 8 | 1 << 9;
    const WRITE_BACK: u64 = 6 << 3;
    // Below a link without X nothing is left of an entry that permits X only.
    for (link, stays) in [(READ | WRITE, false), (READ | WRITE | EXEC, true)] {
        let mode = Mode { kind: EPT, levels: 4 };
        let guest = Hypervisor::<Ept>::new(mode);
        let mut world = World::new(1, Capabilities::ept(), guest, 1000, ReclaimPolicy::Fifo);
        for (table, next) in [(13, 10), (14, 10), (10, 6)] {
            world.memory.set(table << 12, 8, (next << 12) | READ | WRITE | EXEC | USED);
        }
        world.memory.set(6 << 12, 8, link | USED);
        let page = 600 << 12 | WRITE_BACK | 1 << 8;
        world.memory.set(0, 8, page | READ);
        // The nested guest may write to the table.
        world.memory.set(8, 8, READ | WRITE | EXEC | USED | WRITE_BACK);
        world.load();
        let number = |gpa: u64| mode.addresses().iter().position(|one| *one == gpa).unwrap();
        world.access(number(0), AccessKind::Read, true);
        world.access(number(0x1000), AccessKind::Write, true);
        assert!(world.is_writable(0), "the table is not out of sync");
        assert!(world.shadow(number(0)).is_some());
        world.memory.set(0, 8, page | EXEC);
        // The same root once more: what the hypervisor's flush does, too.
        world.enter_anew();
        world.forget();
        let fetch = Access::user(AccessKind::Fetch);
        assert_eq!(world.shadow(number(0)), None, "not readable any more");
        assert_eq!(world.rig.shadow(0, fetch).is_some(), stays, "executable");
        (0..16).for_each(|_| world.check());
        world.access(number(0), AccessKind::Fetch, true);
        world.finish();
    }
}
