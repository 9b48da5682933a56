//! Writes that somebody wants to see, in a VM with direct and shadow tables (KVM rows 4.51, 4.60,
//! 6.16).

mod common;
mod shadow_support;
mod vm_support;

use mmu_core::addr::{Gfn, Gpa};
use mmu_core::slot::{SlotFlags, SlotRequest, TrackError};
use mmu_model::AccessKind::{Read, Write};
use secondary_mmu::WatchError;
use vm_support::{ALL, BACK, BLOCKS, End, LARGE, Machine, PAGES, Setup, leaf, slot};

fn reached(machine: &Machine, gfn: u64) -> End {
    End::Reached(machine.backing.pfn(gfn).unwrap())
}

/// L2 has pages 600 to 603 at 0, block 2 at 2 MiB, and L1's tables 0 and 6 at 0x4000.
fn machine(seed: u64, setup: Setup) -> Machine {
    let mut machine = Machine::with(seed, setup);
    (0..BLOCKS).for_each(|block| machine.back_with(block, block == 2));
    machine.set_up_path();
    (0..4).for_each(|number| machine.set_up(0, number, leaf(600 + number)));
    machine.set_up(6, 1, 2 << 21 | LARGE | BACK | ALL);
    machine
}

fn track(machine: &mut Machine, space: u16, gfn: u64) {
    machine.vm.track_write(&mut machine.notifier, space, Gfn::new(gfn)).unwrap();
    machine.tracked.insert(gfn);
}

fn untrack(machine: &mut Machine, space: u16, gfn: u64) {
    machine.tracked.remove(&gfn);
    machine.vm.untrack_write(&mut machine.notifier, space, Gfn::new(gfn)).unwrap();
}

/// Row 4.51: tracking begins on pages that both have mapped, and that their processors know.
#[test]
fn tracking_takes_writes_away_from_what_is_mapped() {
    let mut machine = machine(1, Setup::default());
    for gfn in [600, 601] {
        assert_eq!(machine.l1_access(gfn, Write), reached(&machine, gfn));
        assert_eq!(machine.l2_access((gfn - 600) << 12, Write), reached(&machine, gfn));
    }
    track(&mut machine, 0, 600);
    machine.check();
    assert_eq!(machine.l1_access(600, Write), End::Protected);
    assert_eq!(machine.l2_access(0, Write), End::Protected);
    assert_eq!(machine.l1_access(600, Read), reached(&machine, 600));
    assert_eq!(machine.l2_access(0, Read), reached(&machine, 600));
    assert_eq!(machine.l1_access(601, Write), reached(&machine, 601), "its neighbour");
    assert_eq!(machine.l2_access(0x1000, Write), reached(&machine, 601));
    // A second tracker, and the first goes.
    track(&mut machine, 0, 600);
    machine.vm.untrack_write(&mut machine.notifier, 0, Gfn::new(600)).unwrap();
    assert_eq!(machine.l1_access(600, Write), End::Protected);
    assert_eq!(machine.l2_access(0, Write), End::Protected);
    untrack(&mut machine, 0, 600);
    assert_eq!(machine.l1_access(600, Write), reached(&machine, 600));
    assert_eq!(machine.l2_access(0, Write), reached(&machine, 600));
    machine.finish();
}

/// A huge leaf over a tracked page goes, or is split when it is written.
#[test]
fn no_huge_page_is_written_over_a_tracked_page() {
    let mut machine = machine(2, Setup::default());
    assert_eq!(machine.l1_access(1100, Write), reached(&machine, 1100));
    assert_eq!(machine.l2_access(2 << 20, Write), reached(&machine, 1024));
    assert_eq!(machine.direct(1024).unwrap().level, 2);
    assert_eq!(machine.shadow(2 << 20).unwrap().level, 2);
    track(&mut machine, 0, 1026);
    machine.check();
    assert_eq!(machine.l1_access(1100, Write), reached(&machine, 1100));
    assert_eq!(machine.l2_access(2 << 20, Write), reached(&machine, 1024));
    assert_eq!(machine.direct(1100).unwrap().level, 1);
    assert_eq!(machine.shadow(2 << 20).unwrap().level, 1);
    assert_eq!(machine.l1_access(1026, Write), End::Protected);
    assert_eq!(machine.l2_access(2 << 20 | 0x2000, Write), End::Protected);
    untrack(&mut machine, 0, 1026);
    machine.check();
    machine.finish();
}

/// A lowest table that is tracked does not go out of sync: every write to it is seen.
#[test]
fn a_tracked_table_stays_in_sync() {
    let mut machine = machine(3, Setup::default());
    assert_eq!(machine.l2_access(0, Read), reached(&machine, 600));
    track(&mut machine, 0, 0);
    assert_eq!(machine.l1_access(0, Write), End::Protected);
    machine.memory.set(0, 8, leaf(700));
    machine.vm.guest_wrote(&mut machine.notifier, Gpa::new(0), 8);
    machine.remember();
    // At once, without a flush.
    assert_eq!(machine.l2_access(0, Read), reached(&machine, 700));
    assert_eq!(machine.shadow_mmu().lock.0.lock().unwrap().stats().unsyncs, 0);
    untrack(&mut machine, 0, 0);
    assert_eq!(machine.l1_access(0, Write), reached(&machine, 0));
    assert_eq!(machine.shadow_mmu().lock.0.lock().unwrap().stats().unsyncs, 1);
    // And one that is out of sync when tracking begins.
    track(&mut machine, 0, 0);
    assert_eq!(machine.l1_access(0, Write), End::Protected);
    untrack(&mut machine, 0, 0);
    machine.finish();
}

/// Rows 4.60, 6.16: who tracks a page in one address space sees what is written in the other.
#[test]
fn a_page_that_is_tracked_in_one_space_is_protected_in_all() {
    let normal = slot(0, 0, PAGES, SlotFlags::empty());
    let slots = vec![normal, SlotRequest { as_id: 1, ..normal }];
    let mut machine = machine(4, Setup { slots, ..Setup::default() });
    assert_eq!(machine.l1_access(600, Write), reached(&machine, 600));
    assert_eq!(machine.l2_access(0, Write), reached(&machine, 600));
    track(&mut machine, 1, 600);
    machine.check();
    assert_eq!(machine.l1_access(600, Write), End::Protected);
    assert_eq!(machine.l2_access(0, Write), End::Protected);
    untrack(&mut machine, 1, 600);
    assert_eq!(machine.l1_access(600, Write), reached(&machine, 600));
    machine.finish();
}

/// A table of L1's with a shadow is protected from its direct mappings in the other space, too.
#[test]
fn a_table_is_protected_in_the_direct_tables_of_every_space() {
    let normal = slot(0, 0, PAGES, SlotFlags::empty());
    let slots = vec![normal, SlotRequest { as_id: 1, ..normal }];
    let mut machine = machine(5, Setup { slots, ..Setup::default() });
    let mut smm = secondary_mmu::Vcpu::new(&machine.vm, 1).unwrap();
    let _ = smm.enter_guest().unwrap();
    let fault = |gfn: u64| {
        let write = mmu_core::access::PfErrorCode::WRITE;
        mmu_core::fault::PageFault::new(common::gpa(gfn), write)
    };
    use mmu_core::fault::FaultOutcome::{Fixed, Spurious, WriteProtected};
    assert_eq!(smm.fault(&fault(6)), Ok(Fixed));
    assert_eq!(smm.fault(&fault(6)), Ok(Spurious));
    assert_eq!(machine.l2_access(0, Read), reached(&machine, 600));
    assert_eq!(smm.fault(&fault(6)), Ok(WriteProtected));
    assert_eq!(smm.fault(&fault(9)), Ok(WriteProtected), "which it had not mapped");
    // The lowest may go out of sync for it.
    assert_eq!(smm.fault(&fault(0)), Ok(Fixed));
    assert_eq!(machine.shadow_mmu().lock.0.lock().unwrap().stats().unsyncs, 1);
    drop(smm);
    machine.finish();
}

#[test]
fn pages_that_nobody_can_track_are_named() {
    let mut machine = machine(6, Setup::default());
    let (vm, actor) = (&machine.vm, &mut machine.notifier);
    let far = Gfn::new(PAGES);
    let no_slot = Err(WatchError::NoSlot { space: 0, gfn: far });
    assert_eq!(vm.track_write(actor, 0, far), no_slot);
    assert_eq!(vm.untrack_write(actor, 0, far), no_slot);
    let page = Gfn::new(600);
    let none = Err(WatchError::Count(TrackError::NotTracked { gfn: page }));
    assert_eq!(vm.untrack_write(actor, 0, page), none);
    machine.finish();
}

/// Bug B35: what a slot carries is counted while its flags are being changed. Nothing is lost.
#[test]
fn what_is_counted_while_a_slot_changes_is_kept() {
    for round in 0..20 {
        let mut machine = machine(7 + round, Setup::default());
        let core = std::sync::Arc::clone(machine.vm.core());
        let mut other = core.actor().unwrap();
        // The change copies what it needs, then waits until nothing is being taken away.
        let far = mmu_core::addr::GfnRange::from_len(Gfn::new(PAGES - 1), 1);
        let guard = core.invalidate(other.participant(), far);
        std::thread::scope(|scope| {
            let (vm, slots) = (&machine.vm, &mut machine.slots);
            let mut changer = core.actor().unwrap();
            let change = scope.spawn(move || {
                let request = slot(0, 0, PAGES, SlotFlags::LOG_DIRTY);
                vm.set_slot(slots, &mut changer, &request, None).map(|_| ())
            });
            (0..round * 50).for_each(|_| std::thread::yield_now());
            // The first count of its block takes memory.
            vm.track_write(&mut machine.notifier, 0, Gfn::new(1100)).unwrap();
            drop(guard);
            change.join().unwrap().unwrap();
        });
        machine.tracked.insert(1100);
        let track = machine.notifier.page_track(0, Gfn::new(1100)).unwrap();
        assert_eq!(track.count(Gfn::new(1100)), 1);
        assert_eq!(machine.l1_access(1100, Write), End::Protected);
        untrack(&mut machine, 0, 1100);
        assert_eq!(machine.l1_access(1100, Write), reached(&machine, 1100));
        drop((other, core));
        machine.finish();
    }
}

/// Shadows count in the same place as others who track: what they count is not taken by a call that
/// has nothing to take back.
#[test]
fn a_shadow_keeps_its_count_whoever_takes_back_too_much() {
    let mut machine = machine(6, Setup::default());
    assert_eq!(machine.l2_access(0, Read), reached(&machine, 600));
    // Table 6 is of level 2: its shadow never goes out of sync.
    assert_eq!(machine.l1_access(6, Write), End::Protected);
    let page = Gfn::new(6);
    let untrack = |machine: &mut Machine| machine.vm.untrack_write(&mut machine.notifier, 0, page);
    let none = Err(WatchError::Count(TrackError::NotTracked { gfn: page }));
    assert_eq!(untrack(&mut machine), none);
    assert_eq!(machine.l1_access(6, Write), End::Protected, "nobody else counted");
    machine.vm.track_write(&mut machine.notifier, 0, page).unwrap();
    assert_eq!(untrack(&mut machine), Ok(()));
    assert_eq!(untrack(&mut machine), none);
    assert_eq!(machine.l1_access(6, Write), End::Protected);
    machine.check();
    machine.finish();
}
