//! The entry that a fault makes where the guest has no memory, against memory that comes there:
//! every interleaving, the shipped code on tables of two entries.
//!
//! As `loom_pairs`, which see. One vCPU faults on a gfn without a slot, another thread makes a slot
//! over it. Whatever the first left behind, accesses find memory from then on: by a vCPU that knows
//! nothing, and by the one that remembers that there was none.
#![cfg(loom)]

mod loom_common;

use std::sync::Arc;

use loom::thread;
use loom_common::{Modelled, Vcpu, World, explore, frame, slot};
use mmu_core::access::PfErrorCode;
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::slot::SlotRequest;
use mmu_core::spte::{Ept, Legacy};

/// Where the slot comes, beside the one that every world has.
const NEW: GfnRange = GfnRange::new(Gfn::new(4), Gfn::new(6));
const DEVICE: Gfn = Gfn::new(5);
/// Faults that one access may take: one that finds a stale entry, one that loses to it.
const FAULTS: u32 = 3;

/// A read of the page, by what stands there; then nothing but memory will do.
fn read<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>) {
    for _ in 0..FAULTS {
        let reserved = world.mmio(DEVICE);
        let code = if reserved { PfErrorCode::RESERVED } else { PfErrorCode::empty() };
        let fault = PageFault::new(DEVICE.address(), code | PfErrorCode::WRITE);
        match vcpu.fault(&fault.at_most(Level::L1)).expect("memory") {
            FaultOutcome::Fixed | FaultOutcome::Spurious => return,
            FaultOutcome::Retry => {}
            other => panic!("{other:?}, but the slot is there"),
        }
    }
    panic!("the page is never mapped");
}

fn body<F: Modelled>() {
    let (world, [mut vcpu, mut other], mut slots) = World::<F>::new();
    let first = thread::spawn(move || {
        let fault = PageFault::new(DEVICE.address(), PfErrorCode::WRITE).at_most(Level::L1);
        let outcome = other.fault(&fault).expect("memory");
        use FaultOutcome::{Emulate, Fixed, Retry};
        assert!(matches!(outcome, Emulate(_) | Fixed | Retry), "{outcome:?}");
        other
    });
    let base = NEW.start.address();
    let request = SlotRequest { id: 1, base, ..slot(NEW.len()) };
    let _ = world.mmu.set_slot(&mut slots, vcpu.actor(), &request).expect("a good request");
    let mut other = first.join().expect("no panic");
    for vcpu in [&mut other, &mut vcpu] {
        read(&world, vcpu);
    }
    let leaf = world.leaf(DEVICE).expect("mapped");
    assert_eq!(frame(leaf, DEVICE), world.vm.host().page(DEVICE));
    world.check(&mut vcpu);
    world.tear_down([vcpu, other]);
    drop(slots);
}

#[test]
fn mmio_entry_against_slot_creation() {
    explore("tdp::mmio_entry_against_slot_creation", body::<Ept>);
}

#[test]
fn mmio_entry_against_slot_creation_with_hardware_bits() {
    explore("tdp::mmio_entry_against_slot_creation_with_hardware_bits", body::<Legacy>);
}
