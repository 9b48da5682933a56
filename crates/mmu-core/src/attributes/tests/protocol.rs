//! The table: what readers see of a change, and that nobody acts on what is over.

use core::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;
use crate::epoch::{EpochDomain, Participant};
use crate::lock::MmuLock;
use crate::notify::Invalidations;

const LIMIT: usize = 64;

#[expect(clippy::expect_used, reason = "a test helper")]
fn world() -> (Arc<EpochDomain>, AttributeTable, AttributeWriter, Invalidations) {
    let domain = EpochDomain::new(4, std::thread::yield_now).expect("in range");
    let (table, writer) = AttributeTable::new(Arc::clone(&domain), LIMIT);
    let notify = Invalidations::new(Arc::clone(&domain), 0);
    (domain, table, writer, notify)
}

#[expect(clippy::expect_used, reason = "a test helper")]
fn set(
    writer: &mut AttributeWriter,
    notify: &Invalidations,
    participant: &mut Participant,
    range: GfnRange,
    attributes: Attributes,
) -> bool {
    let change = writer.prepare(range, attributes).expect("room");
    let Some(change) = change else { return false };
    let invalidation = notify.begin(participant, change.range());
    change.commit(participant, &invalidation);
    true
}

#[test]
fn a_change_is_seen_once_committed_and_the_flag_tells_whether_there_are_any() {
    let (domain, table, mut writer, notify) = world();
    let mut me = domain.register().expect("room");
    assert!(!table.any());
    assert!(!set(&mut writer, &notify, &mut me, range(0, 9), Attributes::empty()), "no change");
    assert_eq!(notify.in_progress(), 0);
    drop(writer.prepare(range(2, 5), Attributes::PRIVATE).expect("room").expect("a change"));
    assert!(!table.any() && writer.live().is_empty(), "prepared, not committed");
    // Both buffers are used, and repeat each other's changes.
    for turn in 0..6 {
        let here = range(turn * 10, turn * 10 + 5);
        assert!(set(&mut writer, &notify, &mut me, here, Attributes::PRIVATE));
        assert!(!set(&mut writer, &notify, &mut me, here, Attributes::PRIVATE), "has them already");
        let pin = me.pin();
        let map = table.read(&pin);
        assert_eq!(map.edges(), to_index(turn + 1) * 2);
        assert!(table.any() && map.all_are(here, Attributes::PRIVATE));
    }
    assert!(set(&mut writer, &notify, &mut me, GfnRange::ALL, Attributes::empty()));
    assert!(!table.any());
}

#[test]
fn a_refused_change_leaves_the_live_map_and_the_writer_usable() {
    let (domain, table, mut writer, notify) = world();
    let mut me = domain.register().expect("room");
    for turn in 0..to_u64(LIMIT / 2) {
        let here = range(turn * 2 + 1, turn * 2 + 2);
        assert!(set(&mut writer, &notify, &mut me, here, Attributes::NO_WRITE));
    }
    let error = AttributeError::TooManyEdges { needed: LIMIT + 2, limit: LIMIT };
    assert_eq!(writer.prepare(range(900, 901), Attributes::PRIVATE).err(), Some(error));
    let bad = AttributeError::BadRange { range: range(3, 3) };
    assert_eq!(writer.prepare(range(3, 3), Attributes::PRIVATE).err(), Some(bad));
    assert!(set(&mut writer, &notify, &mut me, range(1, 2), Attributes::empty()));
    assert!(set(&mut writer, &notify, &mut me, range(900, 901), Attributes::PRIVATE));
    assert!(table.read(&me.pin()).get(Gfn::new(900)).is_private());
}

#[test]
#[should_panic(expected = "not inside the invalidation")]
fn a_change_outside_its_invalidation_panics() {
    let (domain, _table, mut writer, notify) = world();
    let mut me = domain.register().expect("room");
    let change = writer.prepare(range(2, 5), Attributes::PRIVATE).expect("room").expect("change");
    let invalidation = notify.begin(&mut me, range(2, 4));
    change.commit(&mut me, &invalidation);
}

/// A fault that passes its last check has looked at attributes that hold: checked by installing
/// what was looked up into a cell that the change "unmaps".
#[test]
fn no_fault_installs_by_attributes_that_are_over() {
    let (domain, table, mut writer, notify) = world();
    let lock = MmuLock::new(Arc::clone(&domain));
    let mut me = domain.register().expect("room");
    let pages = range(0, 512);
    // 0: not mapped; 1: mapped shared; 2: mapped private.
    let mapped = crate::sync::AtomicU64::new(0);
    let done = AtomicBool::new(false);
    let (installed, retried) = thread::scope(|scope| {
        let faults = scope.spawn(|| {
            let mut vcpu = domain.register().expect("room");
            let (mut installed, mut retried) = (0_u64, 0_u64);
            while !done.load(Ordering::Relaxed) {
                let snapshot = notify.snapshot();
                let private = table.any() && {
                    let pin = vcpu.pin();
                    table.read(&pin).get(Gfn::new(3)).is_private()
                };
                let section = lock.shared(&mut vcpu);
                if notify.must_retry(&section, snapshot, pages) {
                    retried += 1;
                } else {
                    mapped.store(1 + u64::from(private), crate::sync::Ordering::Relaxed);
                    installed += 1;
                }
            }
            (installed, retried)
        });
        for turn in 0..2_000_u64 {
            let value = if turn % 2 == 0 { Attributes::PRIVATE } else { Attributes::empty() };
            let change = writer.prepare(range(3, 4), value).expect("room").expect("a change");
            // The range only: the fault maps a huge page around it.
            let invalidation = notify.begin(&mut me, change.range());
            mapped.store(0, crate::sync::Ordering::Relaxed);
            change.commit(&mut me, &invalidation);
            assert_eq!(mapped.load(crate::sync::Ordering::Relaxed), 0, "turn {turn}: not drained");
            drop(invalidation);
            // Often in the middle of a fault, sometimes after one has installed.
            while turn % 20 == 0 && mapped.load(crate::sync::Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            for _ in 0..turn % 50 {
                crate::sync::relax();
            }
            let now = mapped.load(crate::sync::Ordering::Relaxed);
            assert!([0, 1 + u64::from(value.is_private())].contains(&now), "turn {turn}: {now}");
        }
        done.store(true, Ordering::Relaxed);
        faults.join().expect("no panic")
    });
    assert!(installed >= 100, "{installed} installed, {retried} retried");
}
