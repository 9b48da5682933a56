//! The level-1 table that a vCPU remembers from its last fault: used while it is linked, never
//! after.

mod common;

use common::{BASE, Guest, M2, Modelled};
use mmu_core::addr::Level;
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::spte::Capabilities;
use mmu_core::stats::Counter;
use mmu_model::AccessKind::Write;
use tdp_mmu::TdpVcpu;

fn replaced<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, 4 * M2, Level::L2);
    // The vCPU remembers the table of these pages.
    guest.map([BASE, BASE + 1, BASE + 2], Write, Level::L1);
    // Another one puts a huge page in its place.
    let mut other = TdpVcpu::new(&guest.mmu, 0).unwrap();
    other.load_root().unwrap();
    let huge = PageFault::new(common::gpa(BASE + 9), common::code(Write, false)).at_most(Level::L2);
    assert_eq!(other.fault(&huge), Ok(FaultOutcome::Fixed));
    assert_eq!(guest.stat(Counter::Collapses), 1);
    drop(other);
    // The next small fault must walk: it splits the huge page and finds the access allowed.
    assert_eq!(guest.shrink(BASE + 3), FaultOutcome::Spurious);
    assert_eq!(guest.stat(Counter::Splits), 1);
    assert_eq!(guest.check().leaves, [M2, 0, 0]);
    guest.finish();
}

#[test]
fn a_table_that_was_replaced_is_not_used_again() {
    for_each_format!(replaced);
}

fn reloaded<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, 4 * M2, Level::L1);
    guest.map([BASE, BASE + 1], Write, Level::L1);
    let zap = guest.mmu.invalidate_roots(guest.vcpu.actor());
    let gone = {
        guest.vcpu.load_root().unwrap();
        zap.finish(guest.vcpu.actor())
    };
    assert_eq!(gone.pages(), 2);
    guest.map([BASE + 1, BASE + 2], Write, Level::L1);
    assert_eq!(guest.check().leaves, [2, 0, 0]);
    guest.finish();
}

#[test]
fn a_table_of_a_former_root_is_not_used_again() {
    for_each_format!(reloaded);
}
