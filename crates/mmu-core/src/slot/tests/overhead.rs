//! What slots cost, as reported (KVM row 6.23).

use alloc::sync::Arc;
use core::mem::size_of;

use super::*;
use crate::epoch::EpochDomain;
use crate::notify::Invalidations;
use crate::slot::SlotOverhead;

/// The sizes of the plain values in a set, written down by hand: a slot, its entry by id, its entry
/// by host address.
const PER_SLOT: u64 = 48 + 16 + 32;

fn set(slots: u16, pages: u64) -> Memslots {
    let mut set = Memslots::new(&LIMITS);
    for id in 0..slots {
        set.insert(slot(0, id, u64::from(id) * pages, pages)).expect("apart");
    }
    set
}

#[test]
fn a_slot_costs_the_same_however_large_it_is() {
    let (small, large) = (set(20, 1), set(20, 1 << 28));
    assert_eq!(small.bytes(), large.bytes());
    let empty = set(0, 1).bytes();
    assert_eq!(empty, u64::try_from(size_of::<Memslots>()).unwrap(), "nothing allocated yet");
    let heap = small.bytes() - empty;
    // Vectors double their room.
    assert!((20 * PER_SLOT..=2 * 32 * PER_SLOT).contains(&heap), "{heap} bytes for 20 slots");
}

#[test]
fn the_share_of_guest_memory_is_rounded_up() {
    let none = SlotOverhead::default();
    assert_eq!((none.bytes(), none.per_million()), (0, 0));
    let some = SlotOverhead { live: 4096, spare: 4096, guest_pages: 2_000_000 };
    assert_eq!((some.bytes(), some.per_million()), (8192, 1));
    let one = SlotOverhead { guest_pages: 1, ..some };
    assert_eq!(one.per_million(), 2_000_000);
}

#[test]
fn a_writer_reports_both_sets_and_the_guest_memory() {
    let domain = EpochDomain::new(2, crate::sync::relax).expect("in range");
    let idle = Invalidations::new(Arc::clone(&domain), 0);
    let mut own = domain.register().expect("room");
    let (_table, mut writer) = SlotTable::new(domain, LIMITS);
    let empty = writer.overhead();
    assert_eq!((empty.live, empty.spare, empty.guest_pages), (set(0, 1).bytes(), empty.live, 0));
    for turn in 1..=2 {
        // The spare set has been live before; the second turn makes it equal.
        writer.with_both(|live, spare| {
            spare.reserve_like(live, 1).expect("memory");
            spare.copy_from(live);
            let _ = spare.remove(0, 3);
            spare.insert(slot(0, 3, 0, 1 << 18)).expect("free");
        });
        writer.publish(&mut own, &idle);
        let now = writer.overhead();
        assert_eq!(now.guest_pages, 1 << 18);
        assert!(now.live > empty.live, "turn {turn}");
        assert_eq!(now.spare > empty.spare, turn == 2);
        assert!(now.per_million() <= 3, "1 GiB: {now:?}");
    }
}
