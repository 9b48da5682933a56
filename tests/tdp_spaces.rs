//! vCPUs that change their address space on roots that they keep (KVM rows 3.13, 3.14, 6.17, bugs
//! B30, B64), and the two ways in which a slot goes (row 3.37).

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{BASE, DATA, Guest, M2, Shape, StopOnDrop, gpa, request};
use mmu_core::access::PfErrorCode;
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::slot::{SlotFlags, SlotRequest};
use mmu_core::spte::{Capabilities, Ept};
use mmu_core::stats::Counter;
use mmu_model::AccessKind;
use tdp_mmu::{RootError, SlotZap, TdpOptions, TdpVcpu};

const NONE: SlotFlags = SlotFlags::empty();

fn write(gfn: u64) -> PageFault {
    PageFault::new(gpa(gfn), PfErrorCode::WRITE)
}

/// `spaces` address spaces, each with its own memory at `BASE`.
fn guest(spaces: u16, options: TdpOptions) -> Guest<Ept> {
    let mut guest =
        Guest::<Ept>::with(Shape { spaces, options, ..Shape::new(Capabilities::ept()) });
    for as_id in 0..spaces {
        let slot = request(0, BASE, 64, DATA + u64::from(as_id) * M2, NONE);
        let _ = guest.set_slot(&SlotRequest { as_id, ..slot }).expect("a legal slot");
    }
    guest
}

/// Row 6.17, bug B64.
#[test]
fn entering_and_leaving_a_space_at_a_high_rate_rebuilds_nothing() {
    let mut guest = guest(2, TdpOptions::default());
    let mut frames = [guest.vcpu.load_root().unwrap(); 2];
    assert_eq!(guest.vcpu.fault(&write(BASE)), Ok(FaultOutcome::Fixed));
    frames[1] = guest.vcpu.switch_space(1).unwrap();
    assert_eq!(guest.vcpu.fault(&write(BASE)), Ok(FaultOutcome::Fixed));
    let [normal, smm] = frames.map(|root| guest.found_in(root.address().get(), BASE));
    assert_eq!((normal.unwrap().pfn, smm.unwrap().pfn), (DATA, DATA + M2), "an overlay");
    let state = |guest: &mut Guest<Ept>| (guest.check(), guest.host().provides());
    let before = state(&mut guest);
    for n in 0..10_000u16 {
        assert_eq!(guest.vcpu.switch_space((n % 2) as u8), Ok(frames[usize::from(n % 2)]));
        assert!(guest.vcpu.root_is_current());
        if n % 1000 < 2 {
            assert_eq!(guest.vcpu.fault(&write(BASE)), Ok(FaultOutcome::Spurious));
        }
    }
    assert_eq!(state(&mut guest), before);
    guest.finish();
}

/// Rows 3.13, 3.14, bug B30: a root that became invalid while another was in use.
#[test]
fn a_kept_root_that_became_invalid_is_never_used_again_and_dropped_by_itself() {
    let mut guest = guest(4, TdpOptions::default());
    let old: Vec<_> = (0..4).map(|space| guest.vcpu.switch_space(space).unwrap()).collect();
    assert_eq!(guest.check().tables, 4);
    let _ = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
    assert!(!guest.vcpu.root_is_current());
    // The roots' frames stay until their last reference is dropped.
    assert_eq!(guest.stat(Counter::Tables), 4);
    let fresh = guest.vcpu.switch_space(0).unwrap();
    assert!(!old.contains(&fresh), "the frames are still held or in use");
    guest.vcpu.drop_obsolete_roots();
    assert_eq!(guest.stat(Counter::Tables), 1, "each judged by itself");
    assert!(guest.vcpu.root_is_current());
    for space in [1, 2, 3, 0] {
        let _ = guest.vcpu.switch_space(space).unwrap();
        assert_eq!(guest.vcpu.fault(&write(BASE + 1)), Ok(FaultOutcome::Fixed));
    }
    guest.check();
    guest.vcpu.unload_root();
    guest.finish();
}

#[test]
fn more_spaces_than_are_kept_are_found_again_by_role() {
    let mut guest = guest(8, TdpOptions::default());
    let roots: Vec<_> = (0..8).map(|space| guest.vcpu.switch_space(space).unwrap()).collect();
    for space in (0..8).rev().chain(0..8) {
        assert_eq!(guest.vcpu.switch_space(space), Ok(roots[usize::from(space)]));
    }
    let before = guest.vcpu.role();
    for space in [8, 9, 255] {
        let error = RootError::NoSuchSpace { space, spaces: 8 };
        assert_eq!(guest.vcpu.switch_space(space), Err(error));
        assert!(error.to_string().contains(&space.to_string()));
    }
    assert_eq!((guest.vcpu.role(), guest.vcpu.root_is_current()), (before, true));
    assert_eq!(guest.check().tables, 8);
    guest.finish();
}

#[test]
fn a_switch_without_frames_leaves_the_vcpu_where_it_is() {
    let mut guest = guest(2, TdpOptions::default());
    let root = guest.vcpu.load_root().unwrap();
    while guest.vcpu.actor().take_frame().is_some() {}
    guest.host().refuse(0, u64::MAX);
    let mut lonely = TdpVcpu::new(&guest.mmu, 0).unwrap();
    assert_eq!(lonely.load_root(), Ok(root));
    let mut held = Vec::new();
    while lonely.actor().top_up(1).is_ok() {
        held.extend(lonely.actor().take_frame());
    }
    assert!(matches!(lonely.switch_space(1), Err(RootError::OutOfFrames(_))));
    assert_eq!((lonely.role().space(), lonely.root_is_current()), (0, true));
    held.into_iter().for_each(|frame| lonely.actor().put_frame(frame));
    guest.host().refuse(u64::MAX, u64::MAX);
    assert!(lonely.switch_space(1).is_ok());
}

/// Row 3.37: a slot comes and goes while vCPUs use it and another one.
fn slots_go(slot_zap: SlotZap) {
    let mut options = TdpOptions::default();
    options.slot_zap = slot_zap;
    let mut guest = guest(1, options);
    guest.host().record(false);
    let (stop, faults) = (AtomicBool::new(false), AtomicU64::new(0));
    let mmu = std::sync::Arc::clone(&guest.mmu);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let mut vcpu = TdpVcpu::new(&mmu, 0).expect("room");
            let (stop, faults) = (&stop, &faults);
            let _ = scope.spawn(move || {
                let mut page = 0;
                while !stop.load(Ordering::Acquire) {
                    vcpu.load_root().expect("a root");
                    page = (page + 1) % 32;
                    let _ = vcpu.fault(&write(BASE + page)).expect("no error");
                    let _ = vcpu.fault(&write(BASE + M2 + page)).expect("no error");
                    faults.fetch_add(2, Ordering::Relaxed);
                }
            });
        }
        let _stop = StopOnDrop(&stop);
        for n in 0..60 {
            guest.slot(1, BASE + M2, 32, DATA + 4 * M2, NONE);
            while faults.load(Ordering::Relaxed) < n * 100 {
                std::thread::yield_now();
            }
            guest.slot(1, BASE + M2, 0, 0, NONE);
            for page in 0..32 {
                assert_eq!(guest.found(BASE + M2 + page), None, "{slot_zap:?}");
            }
        }
    });
    drop(mmu);
    guest.map([BASE], AccessKind::Write, mmu_core::addr::Level::L1);
    let root = guest.root_register();
    guest.slot(2, BASE + M2, 1, DATA, NONE);
    guest.slot(2, BASE + M2, 0, 0, NONE);
    let kept = slot_zap == SlotZap::Range;
    assert_eq!(guest.vcpu.root_is_current(), kept);
    assert_eq!((guest.root_register() == root, guest.found(BASE).is_some()), (kept, kept));
    guest.check();
    guest.finish();
}

#[test]
fn a_deleted_slot_takes_its_mappings_or_all_along_while_vcpus_run() {
    slots_go(SlotZap::Range);
    slots_go(SlotZap::All);
}
