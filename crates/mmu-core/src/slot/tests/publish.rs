//! What a publisher relies on: generations, memory found beforehand, the two halves of a change.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use super::*;

#[test]
fn generations_are_unique_across_spaces_and_updates() {
    for spaces in 1..=MAX_ADDRESS_SPACES {
        let mut set = Memslots::new(&SlotLimits::new(spaces, Gfn::new(1)));
        assert_eq!(set.address_spaces(), spaces);
        let mut seen = BTreeSet::new();
        for round in 0..100 {
            assert_eq!(set.generation(), round * u64::from(spaces));
            for as_id in 0..spaces {
                assert!(seen.insert(set.generation_in(as_id)), "{spaces} spaces, round {round}");
            }
            let (old, next) = (set.generation(), set.next_generation());
            set.set_generation(old | GENERATION_UPDATING);
            assert!(set.is_updating());
            for as_id in 0..spaces {
                assert!(seen.insert(set.generation_in(as_id)), "unlike any completed one");
            }
            assert_eq!(set.next_generation(), next, "the bit does not count");
            set.set_generation(next);
            assert!(!set.is_updating());
        }
    }
}

#[test]
fn generations_start_again_before_they_reach_the_update_bit() {
    for spaces in 1..=MAX_ADDRESS_SPACES {
        let mut set = Memslots::new(&SlotLimits::new(spaces, Gfn::new(1)));
        let step = u64::from(spaces);
        for below in 1..4 * step {
            set.set_generation(GENERATION_UPDATING - below);
            let next = set.next_generation();
            assert_eq!(next % step, 0, "{spaces} spaces, {below} below");
            set.set_generation(next);
            assert!(!set.is_updating());
            assert_eq!(set.generation_in(spaces - 1) & GENERATION_UPDATING, 0);
        }
        set.set_generation(u64::MAX);
        assert_eq!(set.next_generation(), 0);
    }
}

#[test]
fn a_set_has_between_one_and_all_address_spaces() {
    for (asked, got) in [(0, 1), (1, 1), (2, 2), (8, 8), (9, 8), (u16::MAX, 8)] {
        let set = Memslots::new(&SlotLimits::new(asked, Gfn::new(1)));
        assert_eq!(set.address_spaces(), got);
    }
}

/// Where the vectors are: unchanged means that nothing was allocated.
fn place(set: &Memslots, as_id: u16) -> (*const Memslot, usize) {
    (set.iter(as_id).as_slice().as_ptr(), set.spare(as_id) + set.len(as_id))
}

#[test]
fn after_reserve_like_no_change_allocates() {
    let live = set_of(&[slot(0, 0, 0, 4), slot(0, 1, 8, 4), slot(1, 0, 0, 4)]);
    let mut spare = Memslots::new(&LIMITS);
    assert_eq!(spare.reserve_like(&live, 1), Ok(()));
    assert_eq!(spare, Memslots::new(&LIMITS), "reserving changes no slot");
    let before = place(&spare, 0);
    spare.copy_from(&live);
    assert_eq!(spare, live);
    assert!(spare.spare(0) >= 1 && spare.spare(1) >= 1);

    let (old, moved) = (slot(0, 0, 0, 4), Memslot { base_gfn: Gfn::new(20), ..slot(0, 0, 0, 4) });
    let changes = [
        SlotChange::Create(slot(0, 2, 4, 4)),
        SlotChange::Move { old, new: moved },
        SlotChange::Flags { old: moved, new: Memslot { flags: SlotFlags::LOG_DIRTY, ..moved } },
        SlotChange::Delete(slot(0, 1, 8, 4)),
        SlotChange::Nothing,
    ];
    for change in &changes {
        spare.apply_invalid(change);
        spare.apply(change);
        assert_eq!(place(&spare, 0), before, "{change:?}");
    }
    let want = [slot(0, 2, 4, 4), Memslot { flags: SlotFlags::LOG_DIRTY, ..moved }];
    assert_eq!(spare.iter(0).copied().collect::<Vec<_>>(), want);
}

#[test]
fn a_reservation_that_fails_changes_nothing() {
    let live = set_of(&[slot(0, 0, 0, 4), slot(1, 0, 0, 4)]);
    let mut set = set_of(&[slot(0, 5, 0, 4)]);
    for extra in [usize::MAX, usize::MAX / 2, usize::MAX / 32] {
        let slots = crate::addr::to_u64(extra.saturating_add(1));
        assert_eq!(set.reserve_like(&live, extra), Err(SlotError::NoMemory { slots }));
        assert_eq!(set, set_of(&[slot(0, 5, 0, 4)]));
    }
}

#[test]
fn copying_takes_over_everything_and_drops_the_rest() {
    let mut live = set_of(&[slot(0, 0, 0, 4)]);
    live.set_generation(6);
    let mut wide = Memslots::new(&SlotLimits::new(8, Gfn::new(1)));
    assert_eq!(wide.insert(slot(7, 0, 0, 1)), Ok(()));
    wide.copy_from(&live);
    assert_eq!(wide, live);
    assert_eq!((wide.address_spaces(), wide.generation(), wide.total_pages()), (2, 6, 4));
}

#[test]
fn a_deletion_goes_through_invalid_and_can_be_taken_back() {
    let (keep, gone) = (slot(0, 0, 0, 4), slot(0, 1, 8, 4));
    let mut set = set_of(&[keep, gone]);
    let change = SlotChange::Delete(gone);
    set.apply_invalid(&change);
    let marked = set.by_id(0, 1).copied();
    assert_eq!(marked, Some(Memslot { flags: SlotFlags::INVALID, ..gone }));
    assert_eq!(set.total_pages(), 8, "the pages are still taken");
    set.undo_invalid(&change);
    assert_eq!(set, set_of(&[keep, gone]));
    set.apply_invalid(&change);
    set.apply(&change);
    assert_eq!(set, set_of(&[keep]));
}

#[test]
fn a_move_may_overlap_where_the_slot_was() {
    let (old, new) = (slot(0, 1, 8, 4), Memslot { base_gfn: Gfn::new(10), ..slot(0, 1, 8, 4) });
    let mut set = set_of(&[old, slot(0, 0, 0, 8), slot(0, 2, 14, 1)]);
    let asked = request(&new);
    let change = SlotChange::Move { old, new };
    assert_eq!(plan(&set, &LIMITS, &asked), Ok(change));
    assert_eq!(change.invalidates(), Some(&old));
    set.apply_invalid(&change);
    set.apply(&change);
    assert_eq!(set.by_id(0, 1), Some(&new));
    assert_eq!(set.find(0, Gfn::new(9)), None);
    assert_eq!(plan(&set, &LIMITS, &asked), Ok(SlotChange::Nothing));
}

#[test]
fn sets_refuse_what_would_break_them() {
    let taken = slot(0, 1, 8, 4);
    let mut set = set_of(&[taken, slot(0, 2, 20, 4)]);
    let overlap = |id, other: Memslot| SlotError::Overlap {
        as_id: 0,
        id,
        other: other.id,
        taken: other.range(),
    };
    assert_eq!(set.insert(slot(0, 1, 0, 1)), Err(SlotError::IdTaken { as_id: 0, id: 1 }));
    assert_eq!(set.insert(slot(0, 3, 11, 1)), Err(overlap(3, taken)));
    assert_eq!(set.replace(slot(0, 2, 7, 2)), Err(overlap(2, taken)));
    let missing = SlotError::NoSuchSlot { as_id: 1, id: 1 };
    assert_eq!(set.replace(slot(1, 1, 8, 4)), Err(missing));
    let outside = SlotError::AsIdOutOfRange { as_id: 2, limit: 2 };
    assert_eq!(set.insert(slot(2, 1, 8, 4)), Err(outside));
    assert_eq!(set.replace(slot(2, 1, 8, 4)), Err(outside));
    assert_eq!(set.remove(2, 1), None);
    assert_eq!(set.remove(0, 9), None);
    let end = 1 << 52;
    let malformed = [
        slot(0, 1, 0, 0),
        Memslot { npages: end + 1, ..slot(0, 1, 0, 1) },
        Memslot { npages: u64::MAX, ..slot(0, 1, 0, 1) },
        Memslot { base_gfn: Gfn::new(end), ..slot(0, 1, 0, 1) },
        Memslot { base_gfn: Gfn::new(end - 1), ..slot(0, 1, 0, 2) },
        Memslot { base_gfn: Gfn::new(u64::MAX), ..slot(0, 1, 0, 1) },
        Memslot { hva: Hva::new(1), ..slot(0, 1, 0, 1) },
        at_host_page(slot(0, 1, 0, 2), end - 1),
    ];
    for slot in malformed {
        assert_eq!(set.insert(slot), Err(SlotError::Malformed { slot }));
        assert_eq!(set.replace(slot), Err(SlotError::Malformed { slot }));
    }
    assert_eq!(set, set_of(&[taken, slot(0, 2, 20, 4)]), "nothing of that changed the set");
    assert_eq!(set.replace(slot(0, 2, 0, 8)), Ok(slot(0, 2, 20, 4)));
    assert_eq!(set.total_pages(), 12);
}
