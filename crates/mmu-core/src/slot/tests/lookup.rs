//! Lookups by gfn, id and host address: gaps, hints, aliases, and what each failure is called.

use alloc::vec::Vec;

use super::*;

/// Every set of up to three slots of one to three pages within eight gfns.
#[test]
fn gaps_have_no_slot_in_any_small_set() {
    const END: u64 = 8;
    let mut checked = 0;
    let choices: Vec<_> = (0..END).flat_map(|at| (1..4).map(move |n| (at, n))).collect();
    for a in &choices {
        for b in &choices {
            for c in &choices {
                let mut set = Memslots::new(&LIMITS);
                let mut naive = Vec::new();
                for (id, &(base, npages)) in (0..).zip([a, b, c]) {
                    let new = slot(0, id, base, npages);
                    if set.insert(new).is_ok() {
                        naive.push(new);
                    }
                }
                let mut hint = 0;
                for gfn in (0..END + 4).chain((0..END + 4).rev()).map(Gfn::new) {
                    let want = naive.iter().find(|slot| slot.contains(gfn));
                    assert_eq!(set.find(0, gfn), want, "{naive:?} {gfn}");
                    assert_eq!(set.find_from_hint(0, gfn, &mut hint), want, "{naive:?} {gfn}");
                    assert_eq!(set.find(1, gfn), None, "the other space has no slots");
                }
                checked += 1;
            }
        }
    }
    assert_eq!(checked, 24 * 24 * 24);
}

#[test]
fn any_hint_is_correct() {
    let set = set_of(&[slot(0, 0, 2, 2), slot(0, 1, 6, 2), slot(0, 2, 8, 1)]);
    for start in [0, 1, 2, 3, 1000, usize::MAX] {
        for gfn in (0..12).map(Gfn::new) {
            let mut hint = start;
            let found = set.find_from_hint(0, gfn, &mut hint);
            assert_eq!(found, set.find(0, gfn), "hint {start} gfn {gfn}");
            match found {
                Some(slot) => assert_eq!(set.iter(0).nth(hint), Some(slot)),
                None => assert_eq!(hint, start, "a miss says nothing about the next lookup"),
            }
        }
    }
}

#[test]
fn lookups_at_the_ends_of_the_number_line() {
    let top = (1 << 52) - 1;
    let last = Memslot { base_gfn: Gfn::new(top), ..at_host_page(slot(0, 1, 0, 1), top) };
    let set = set_of(&[slot(0, 0, 0, 1), last]);
    assert_eq!(set.find(0, Gfn::new(0)).map(|slot| slot.id), Some(0));
    assert_eq!(set.find(0, Gfn::new(top)).map(|slot| slot.id), Some(1));
    for gfn in [1, top - 1, top + 1, u64::MAX - 1, u64::MAX] {
        assert_eq!(set.find(0, Gfn::new(gfn)), None, "{gfn:#x}");
    }
    assert_eq!(hits(&set, u64::MAX - 1, u64::MAX).len(), 1);
    assert_eq!(set.resolve_hva(0, Gfn::new(top), Access::ALL), Ok(Hva::new(top << PAGE_SHIFT)));
}

#[test]
fn address_spaces_do_not_see_each_other() {
    let set = set_of(&[slot(0, 7, 4, 4), slot(1, 7, 6, 4), slot(1, 8, 0, 1)]);
    assert_eq!(set.find(0, Gfn::new(6)).map(|slot| slot.as_id), Some(0));
    assert_eq!(set.find(1, Gfn::new(6)).map(|slot| slot.as_id), Some(1));
    assert_eq!(set.by_id(0, 8), None);
    assert_eq!((set.len(0), set.len(1), set.len(2)), (1, 2, 0));
    assert_eq!(set.total_pages(), 9);
    for as_id in [2, 3, 7, 8, u16::MAX] {
        assert_eq!(set.find(as_id, Gfn::new(6)), None);
        assert_eq!(set.find_from_hint(as_id, Gfn::new(6), &mut 0), None);
        assert_eq!(set.by_id(as_id, 7), None);
        assert_eq!(set.iter(as_id).len(), 0);
        assert_eq!(set.overlapping(as_id, GfnRange::ALL).count(), 0);
        assert_eq!(set.spare(as_id), 0);
    }
}

#[test]
fn overlapping_slots_agree_with_a_scan() {
    let set = set_of(&[slot(0, 0, 1, 2), slot(0, 1, 3, 1), slot(0, 2, 6, 3), slot(0, 3, 12, 1)]);
    for start in 0..15 {
        for end in 0..15 {
            let range = GfnRange::new(Gfn::new(start), Gfn::new(end));
            let shares = |slot: &&Memslot| (start..end).any(|gfn| slot.contains(Gfn::new(gfn)));
            let want: Vec<_> = set.iter(0).filter(shares).collect();
            assert_eq!(set.overlapping(0, range).collect::<Vec<_>>(), want, "{range}");
        }
    }
}

/// (address space, slot, first gfn, pages) of every visit.
fn hits(set: &Memslots, start: u64, end: u64) -> Vec<(u16, u16, u64, u64)> {
    let mut hits = Vec::new();
    set.for_each_hva_range(Hva::new(start), Hva::new(end), |slot, range| {
        hits.push((slot.as_id, slot.id, range.start.get(), range.len()));
    });
    hits
}

#[test]
fn every_alias_of_host_memory_is_visited() {
    let set = set_of(&[
        at_host_page(slot(0, 0, 0, 8), 100),
        at_host_page(slot(0, 1, 50, 2), 102),
        at_host_page(slot(0, 2, 60, 2), 102),
        at_host_page(slot(0, 3, 70, 1), 107),
        at_host_page(slot(1, 0, 0, 4), 101),
    ]);
    let page = |n: u64| n << PAGE_SHIFT;
    let want = [(0, 0, 2, 1), (0, 1, 50, 1), (0, 2, 60, 1), (1, 0, 1, 1)];
    assert_eq!(hits(&set, page(102), page(103)), want);
    // Slots 1 and 2 start after slot 0 and end before the range: only the long one reaches it.
    assert_eq!(hits(&set, page(105), page(106)), [(0, 0, 5, 1)]);
    assert_eq!(hits(&set, page(99), page(101)), [(0, 0, 0, 1)]);
    assert_eq!(hits(&set, page(107), page(200)), [(0, 0, 7, 1), (0, 3, 70, 1)]);
    assert_eq!(hits(&set, page(108), page(200)), []);
    assert_eq!(hits(&set, 0, u64::MAX).len(), 5);
}

#[test]
fn host_ranges_count_pages_touched_in_part() {
    let set = set_of(&[at_host_page(slot(0, 0, 40, 2), 1), at_host_page(slot(0, 1, 0, 1), 3)]);
    assert_eq!(hits(&set, 0x1fff, 0x2000), [(0, 0, 40, 1)]);
    assert_eq!(hits(&set, 0x1fff, 0x2001), [(0, 0, 40, 2)]);
    assert_eq!(hits(&set, 0x2000, 0x3001), [(0, 0, 41, 1), (0, 1, 0, 1)]);
    assert_eq!(hits(&set, 0xfff, 0x1000), []);
    assert_eq!(hits(&set, 0xfff, 0x1001), [(0, 0, 40, 1)]);
    for (start, end) in [(0x1000, 0x1000), (0x2000, 0x1000), (u64::MAX, 0), (u64::MAX, u64::MAX)] {
        assert_eq!(hits(&set, start, end), [], "{start:#x}..{end:#x} is empty");
    }
}

#[test]
fn invalid_slots_are_still_found_on_the_host_side() {
    let gone = Memslot { flags: SlotFlags::INVALID, ..at_host_page(slot(0, 0, 5, 1), 9) };
    assert_eq!(hits(&set_of(&[gone]), 0x9000, 0xa000), [(0, 0, 5, 1)]);
}

#[test]
fn every_failure_to_find_a_host_address_has_its_name() {
    let rom = Memslot { flags: SlotFlags::READ_ONLY, ..at_host_page(slot(0, 1, 10, 2), 100) };
    let gone = Memslot { flags: SlotFlags::READ_ONLY | SlotFlags::INVALID, ..slot(0, 2, 20, 1) };
    let ram = Memslot { flags: SlotFlags::LOG_DIRTY, ..at_host_page(slot(0, 3, 30, 1), 300) };
    let set = set_of(&[rom, gone, ram]);
    let resolve = |gfn, access| set.resolve_hva(0, Gfn::new(gfn), access);

    assert_eq!(resolve(11, Access::READ), Ok(Hva::new(101 << PAGE_SHIFT)));
    assert_eq!(resolve(11, Access::EXEC), Ok(Hva::new(101 << PAGE_SHIFT)));
    let read_only = GfnToHvaError::ReadOnly { slot: 1, gfn: Gfn::new(11) };
    assert_eq!(resolve(11, Access::WRITE), Err(read_only));
    assert_eq!(resolve(11, Access::ALL), Err(read_only));
    // Being deleted wins over being read-only: the retry may find something else there.
    let invalid = GfnToHvaError::Invalid { slot: 2, gfn: Gfn::new(20) };
    assert_eq!(resolve(20, Access::READ), Err(invalid));
    assert_eq!(resolve(20, Access::WRITE), Err(invalid));
    assert_eq!(resolve(30, Access::ALL), Ok(Hva::new(300 << PAGE_SHIFT)));
    for gfn in [9, 12, 19, 21, 31, u64::MAX] {
        let want = GfnToHvaError::NoSlot { as_id: 0, gfn: Gfn::new(gfn) };
        assert_eq!(resolve(gfn, Access::READ), Err(want));
    }
    let want = GfnToHvaError::NoSlot { as_id: 9, gfn: Gfn::new(10) };
    assert_eq!(set.resolve_hva(9, Gfn::new(10), Access::READ), Err(want));
    for (error, word) in [(read_only, "read-only"), (invalid, "going"), (want, "no slot")] {
        assert!(alloc::format!("{error}").contains(word), "{error}");
    }
}

/// KVM row 6.19: the largest set there may be, inserted in an order that is not ascending.
#[test]
fn ten_thousand_slots_are_all_found() {
    const COUNT: u16 = 10_000;
    let base = |id: u16| u64::from(id) * 4;
    let mut set = Memslots::new(&LIMITS);
    for n in 0..COUNT {
        // 7919 is coprime to the count, so every id comes once.
        let id = u16::try_from(u32::from(n) * 7919 % u32::from(COUNT)).unwrap_or(u16::MAX);
        let request = request(&slot(0, id, base(id), 3));
        let change = plan(&set, &LIMITS, &request);
        assert!(matches!(change, Ok(SlotChange::Create(_))), "{change:?}");
        set.apply(&change.unwrap_or(SlotChange::Nothing));
    }
    let mut hint = 0;
    for id in 0..COUNT {
        for gfn in base(id)..base(id) + 4 {
            let want = (gfn % 4 != 3).then_some(id);
            let gfn = Gfn::new(gfn);
            assert_eq!(set.find(0, gfn).map(|slot| slot.id), want);
            assert_eq!(set.find_from_hint(0, gfn, &mut hint).map(|slot| slot.id), want);
        }
        let hva = slot(0, id, base(id), 3).hva.get();
        assert_eq!(hits(&set, hva, hva + 1), [(0, id, base(id), 1)]);
    }
    for id in (0..COUNT).rev() {
        assert_eq!(set.remove(0, id).map(|slot| slot.id), Some(id));
    }
    assert!(set.is_empty());
}
