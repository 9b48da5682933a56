//! One slot by itself: its range, its host addresses, its permissions.

use super::*;

#[test]
fn a_slot_has_its_pages_and_no_others() {
    let slot = at_host_page(slot(0, 3, 10, 4), 100);
    for gfn in 0..20 {
        let inside = (10..14).contains(&gfn);
        let want = inside.then(|| Hva::new((100 + gfn - 10) << PAGE_SHIFT));
        assert_eq!(slot.contains(Gfn::new(gfn)), inside, "{gfn}");
        assert_eq!(slot.hva_of(Gfn::new(gfn)), want, "{gfn}");
    }
    assert_eq!(slot.range(), GfnRange::new(Gfn::new(10), Gfn::new(14)));
}

#[test]
fn flags_say_what_a_mapping_may_permit() {
    let with = |flags| Memslot { flags, ..slot(0, 0, 0, 1) };
    assert_eq!(with(SlotFlags::empty()).access(), Access::ALL);
    assert_eq!(with(SlotFlags::LOG_DIRTY).access(), Access::ALL);
    assert_eq!(with(SlotFlags::READ_ONLY).access(), Access::READ_ONLY);
    assert_eq!(with(SlotFlags::INVALID).access(), Access::empty());
    assert_eq!(with(SlotFlags::all()).access(), Access::empty());
    assert!(with(SlotFlags::LOG_DIRTY).logs_dirty());
    assert!(!with(SlotFlags::READ_ONLY).logs_dirty());
    assert!(with(SlotFlags::INVALID).is_invalid());
    assert!(!with(SlotFlags::CALLER).is_invalid());
}

/// The fields are public, so nothing may depend on a slot being one that a set would take.
#[test]
fn no_field_values_panic() {
    for seed in 0..20_000 {
        let mut rng = Rng(seed);
        let slot = Memslot {
            as_id: rng.small(u16::MAX),
            id: rng.small(u16::MAX),
            flags: SlotFlags::all(),
            base_gfn: Gfn::new(rng.edge()),
            npages: rng.edge(),
            hva: Hva::new(rng.edge()),
        };
        for gfn in [slot.base_gfn, Gfn::new(rng.edge()), Gfn::new(u64::MAX)] {
            if let Some(hva) = slot.hva_of(gfn) {
                assert!(slot.contains(gfn) && hva >= slot.hva, "seed {seed}: {slot:?} {gfn}");
            }
            let level = max_level(&slot, gfn, Level::L5);
            assert!(level.may_be_leaf(), "seed {seed}: {slot:?} {gfn}");
        }
    }
}
