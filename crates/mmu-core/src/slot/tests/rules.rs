//! The rules for requests: each by name, at the values next to its limit.

use alloc::collections::BTreeSet;
use alloc::format;

use super::*;

const MIB: u64 = 1 << 20;

/// A request that every rule accepts.
const GOOD: SlotRequest = SlotRequest {
    as_id: 1,
    id: 3,
    base: Gpa::new(16 * MIB),
    bytes: MIB,
    hva: Hva::new(64 * MIB),
    flags: SlotFlags::empty(),
};

#[track_caller]
fn refused(request: SlotRequest, want: SlotError) {
    refused_by(&Memslots::new(&LIMITS), &LIMITS, request, want);
}

#[track_caller]
fn refused_by(set: &Memslots, limits: &SlotLimits, request: SlotRequest, want: SlotError) {
    assert_eq!(plan(set, limits, &request), Err(want), "{request:?}");
}

#[track_caller]
fn creates(limits: &SlotLimits, request: SlotRequest) {
    let change = plan(&Memslots::new(limits), limits, &request);
    assert!(matches!(change, Ok(SlotChange::Create(_))), "{request:?}: {change:?}");
}

#[test]
fn a_good_request_creates_what_it_says() {
    let want = Memslot {
        as_id: 1,
        id: 3,
        flags: SlotFlags::empty(),
        base_gfn: Gfn::new(4096),
        npages: 256,
        hva: Hva::new(64 * MIB),
    };
    let change = plan(&Memslots::new(&LIMITS), &LIMITS, &GOOD);
    assert_eq!(change, Ok(SlotChange::Create(want)));
    assert_eq!(request(&want), GOOD);
}

#[test]
fn unknown_flags() {
    for bit in (2..32).filter(|bit| *bit != 16) {
        let flags = SlotFlags::from_bits_retain(1 << bit | 3);
        refused(SlotRequest { flags, ..GOOD }, SlotError::UnknownFlags { bits: 1 << bit });
    }
    let flags = SlotFlags::from_bits_retain(u32::MAX);
    refused(SlotRequest { flags, ..GOOD }, SlotError::UnknownFlags { bits: !0x1_0003 });
    creates(&LIMITS, SlotRequest { flags: SlotFlags::CALLER, ..GOOD });
}

#[test]
fn internal_flag() {
    let flags = SlotFlags::INVALID | SlotFlags::LOG_DIRTY;
    let want = SlotError::InternalFlag { flags: SlotFlags::INVALID };
    refused(SlotRequest { flags, ..GOOD }, want);
}

#[test]
fn size_unaligned() {
    for bytes in [1, 4095, 4097, MIB - 1, MIB + 1, 1 << 63 | 1, u64::MAX] {
        refused(SlotRequest { bytes, ..GOOD }, SlotError::SizeUnaligned { bytes });
    }
}

#[test]
fn gpa_unaligned() {
    for base in [1, 4095, 4097, 16 * MIB + 2048, u64::MAX].map(Gpa::new) {
        refused(SlotRequest { base, ..GOOD }, SlotError::GpaUnaligned { base });
    }
}

#[test]
fn hva_unaligned() {
    for hva in [1, 4095, 4097, 64 * MIB + 2048, u64::MAX].map(Hva::new) {
        refused(SlotRequest { hva, ..GOOD }, SlotError::HvaUnaligned { hva });
    }
}

#[test]
fn hva_not_canonical() {
    for bits in [48, 57] {
        let limits = SlotLimits { hva_bits: bits, ..LIMITS };
        let half = 1 << (bits - 1);
        // The last one is a good address with a tag in bits 57 to 62.
        for hva in [half, half + PAGE_SIZE, 1 << 62, 1 << 63, half.wrapping_neg() - PAGE_SIZE]
            .into_iter()
            .chain([(0x3f << 57) | (64 * MIB)])
            .map(Hva::new)
        {
            let want = SlotError::HvaNotCanonical { hva, bits };
            refused_by(&Memslots::new(&limits), &limits, SlotRequest { hva, ..GOOD }, want);
        }
        for hva in [0, half - MIB, half.wrapping_neg(), MIB.wrapping_neg() - PAGE_SIZE] {
            creates(&limits, SlotRequest { hva: Hva::new(hva), ..GOOD });
        }
    }
    for (hva_bits, hva) in [(63, 0), (64, 1 << 62), (65, 0), (u32::MAX, 1 << 63)] {
        creates(&SlotLimits { hva_bits, ..LIMITS }, SlotRequest { hva: Hva::new(hva), ..GOOD });
    }
    for hva_bits in [0, 1] {
        let limits = SlotLimits { hva_bits, ..LIMITS };
        let want = SlotError::HvaNotCanonical { hva: GOOD.hva, bits: hva_bits };
        refused_by(&Memslots::new(&limits), &limits, GOOD, want);
    }
}

#[test]
fn hva_wraps() {
    let half = 1 << 56;
    for (hva, bytes) in [
        (half - MIB, MIB + PAGE_SIZE),
        (half - PAGE_SIZE, 2 * PAGE_SIZE),
        // One page of the upper half, across the whole hole.
        (half - PAGE_SIZE, half.wrapping_neg() - half + 2 * PAGE_SIZE),
        // The end would be 2^64, which is no address.
        (MIB.wrapping_neg(), MIB),
        (MIB.wrapping_neg(), MIB + PAGE_SIZE),
        (64 * MIB, PAGE_SIZE.wrapping_neg()),
    ] {
        let hva = Hva::new(hva);
        refused(SlotRequest { hva, bytes, ..GOOD }, SlotError::HvaWraps { hva, bytes });
    }
}

#[test]
fn as_id_out_of_range() {
    for as_id in [2, 3, 8, u16::MAX] {
        refused(SlotRequest { as_id, ..GOOD }, SlotError::AsIdOutOfRange { as_id, limit: 2 });
    }
    let none = SlotLimits { address_spaces: 0, ..LIMITS };
    let want = SlotError::AsIdOutOfRange { as_id: 0, limit: 0 };
    refused_by(&Memslots::new(&none), &none, SlotRequest { as_id: 0, ..GOOD }, want);
    // Limits may promise more spaces than the set has; the set decides.
    let many = SlotLimits { address_spaces: u16::MAX, ..LIMITS };
    let want = SlotError::AsIdOutOfRange { as_id: 8, limit: 8 };
    refused_by(&Memslots::new(&many), &many, SlotRequest { as_id: 8, ..GOOD }, want);
    creates(&many, SlotRequest { as_id: 7, ..GOOD });
}

#[test]
fn id_out_of_range() {
    for id in [32764, 32765, 32767, 32768, u16::MAX] {
        refused(SlotRequest { id, ..GOOD }, SlotError::IdOutOfRange { id, limit: 32764 });
    }
    creates(&LIMITS, SlotRequest { id: 32763, ..GOOD });
    creates(&LIMITS, SlotRequest { id: 0, ..GOOD });
    let none = SlotLimits { slots_per_space: 0, ..LIMITS };
    let want = SlotError::IdOutOfRange { id: 0, limit: 0 };
    refused_by(&Memslots::new(&none), &none, SlotRequest { id: 0, ..GOOD }, want);
}

#[test]
fn gpa_wraps() {
    for base in [MIB.wrapping_neg(), PAGE_SIZE.wrapping_neg()].map(Gpa::new) {
        refused(SlotRequest { base, ..GOOD }, SlotError::GpaWraps { base, bytes: MIB });
    }
    let base = Gpa::new(MIB.wrapping_neg() - PAGE_SIZE);
    let want = SlotError::AboveMaxGfn { last: Gfn::new((1 << 52) - 2), limit: Gfn::new(1 << 40) };
    refused(SlotRequest { base, ..GOOD }, want);
}

#[test]
fn too_many_pages() {
    let limit = (1 << 31) - 1;
    for pages in [limit + 1, limit + 2, 1 << 32, (1 << 43) + 1] {
        let bytes = pages << PAGE_SHIFT;
        refused(SlotRequest { bytes, ..GOOD }, SlotError::TooManyPages { pages, limit });
    }
    creates(&LIMITS, SlotRequest { bytes: limit << PAGE_SHIFT, ..GOOD });
}

#[test]
fn total_pages() {
    let there = slot(0, 0, 0, 100);
    for total in [0, 100, 101, 355] {
        let limits = SlotLimits { total_pages: total, ..LIMITS };
        let want = SlotError::TotalPages { current: 100, added: 256, limit: total };
        refused_by(&set_of(&[there]), &limits, GOOD, want);
    }
    for total in [356, 357, u64::MAX] {
        let limits = SlotLimits { total_pages: total, ..LIMITS };
        assert!(plan(&set_of(&[there]), &limits, &GOOD).is_ok());
    }
    // A slot that exists already adds nothing, even when the limit was lowered since.
    let limits = SlotLimits { total_pages: 1, ..LIMITS };
    let moved = Memslot { base_gfn: Gfn::new(50), ..there };
    let change = plan(&set_of(&[there]), &limits, &request(&moved));
    assert_eq!(change, Ok(SlotChange::Move { old: there, new: moved }));
}

#[test]
fn overlap() {
    let set = set_of(&[slot(0, 0, 10, 4), slot(0, 1, 20, 4), slot(1, 2, 0, 1000)]);
    let range = |start, end| GfnRange::new(Gfn::new(start), Gfn::new(end));
    for (base, npages, other) in [
        (10, 4, Some((0, range(10, 14)))),
        (7, 4, Some((0, range(10, 14)))),
        (13, 1, Some((0, range(10, 14)))),
        (11, 1, Some((0, range(10, 14)))),
        (0, 100, Some((0, range(10, 14)))),
        (14, 7, Some((1, range(20, 24)))),
        (23, 9, Some((1, range(20, 24)))),
        (14, 6, None),
        (0, 10, None),
        (24, 9, None),
    ] {
        let asked = request(&slot(0, 9, base, npages));
        match other {
            None => assert!(plan(&set, &LIMITS, &asked).is_ok(), "{asked:?}"),
            Some((other, taken)) => {
                let want = SlotError::Overlap { as_id: 0, id: 9, other, taken };
                refused_by(&set, &LIMITS, asked, want);
            }
        }
    }
    // Moving onto another slot is refused, also when the own pages come first.
    let moved = Memslot { base_gfn: Gfn::new(17), ..slot(0, 0, 10, 4) };
    let want = SlotError::Overlap { as_id: 0, id: 0, other: 1, taken: range(20, 24) };
    refused_by(&set, &LIMITS, request(&moved), want);
}

#[test]
fn above_max_gfn() {
    for bits in [1, 20, 27, 40] {
        let limit = 1u64 << bits;
        let limits = SlotLimits::new(1, Gfn::new(limit));
        for (base, npages) in [(limit, 1), (limit - 1, 2), (limit + 1, 1), (0, limit + 1)] {
            let asked = request(&slot(0, 0, base, npages.min(MAX_SLOT_PAGES)));
            let last = Gfn::new(base + npages - 1);
            let limit = Gfn::new(limit);
            if npages <= MAX_SLOT_PAGES {
                let want = SlotError::AboveMaxGfn { last, limit };
                refused_by(&Memslots::new(&limits), &limits, asked, want);
            }
        }
        creates(&limits, request(&slot(0, 0, limit - 1, 1)));
    }
    let there = slot(0, 0, 0, 2);
    let moved = Memslot { base_gfn: Gfn::new((1 << 40) - 1), ..there };
    let want = SlotError::AboveMaxGfn { last: Gfn::new(1 << 40), limit: Gfn::new(1 << 40) };
    refused_by(&set_of(&[there]), &LIMITS, request(&moved), want);
}

#[test]
fn delete_of_an_absent_slot() {
    let set = set_of(&[slot(0, 3, 0, 1)]);
    let delete = SlotRequest { bytes: 0, ..GOOD };
    refused_by(&set, &LIMITS, delete, SlotError::NoSuchSlot { as_id: 1, id: 3 });
    let delete = SlotRequest { as_id: 0, ..delete };
    // Only the name matters: neither address needs to be that of the slot.
    assert_eq!(plan(&set, &LIMITS, &delete), Ok(SlotChange::Delete(slot(0, 3, 0, 1))));
}

#[test]
fn size_changed() {
    let there = slot(0, 0, 10, 4);
    for new_pages in [1, 3, 5, MAX_SLOT_PAGES] {
        let want = SlotError::SizeChanged { old_pages: 4, new_pages };
        let asked = Memslot { npages: new_pages, ..there };
        refused_by(&set_of(&[there]), &LIMITS, request(&asked), want);
    }
}

#[test]
fn hva_changed() {
    let there = slot(0, 0, 10, 4);
    for new in [0, there.hva.get() - PAGE_SIZE, there.hva.get() + PAGE_SIZE].map(Hva::new) {
        let want = SlotError::HvaChanged { old: there.hva, new };
        refused_by(&set_of(&[there]), &LIMITS, request(&Memslot { hva: new, ..there }), want);
        let moved = Memslot { hva: new, base_gfn: Gfn::new(0), ..there };
        refused_by(&set_of(&[there]), &LIMITS, request(&moved), want);
    }
}

#[test]
fn read_only_toggled() {
    let with = |flags| Memslot { flags, ..slot(0, 0, 10, 4) };
    let (none, rom) = (SlotFlags::empty(), SlotFlags::READ_ONLY);
    for (old, new) in [(none, rom), (rom, none), (SlotFlags::LOG_DIRTY, SlotFlags::CALLER)] {
        let want = SlotError::ReadOnlyToggled { old, new };
        refused_by(&set_of(&[with(old)]), &LIMITS, request(&with(new)), want);
    }
}

#[test]
fn no_memory() {
    let mut set = Memslots::new(&LIMITS);
    let want = SlotError::NoMemory { slots: u64::MAX };
    assert_eq!(set.reserve_like(&set_of(&[slot(0, 0, 0, 1)]), usize::MAX), Err(want));
}

#[test]
fn busy() {
    let gone = Memslot { flags: SlotFlags::INVALID, ..slot(0, 0, 10, 4) };
    let good = Memslot { flags: SlotFlags::empty(), ..gone };
    let want = SlotError::Busy { as_id: 0, id: 0 };
    let delete = SlotRequest { bytes: 0, ..request(&good) };
    refused_by(&set_of(&[gone]), &LIMITS, request(&good), want);
    refused_by(&set_of(&[gone]), &LIMITS, delete, want);
}

#[test]
fn changes_are_told_apart() {
    let there = slot(0, 0, 10, 4);
    let set = set_of(&[there]);
    let logged = Memslot { flags: SlotFlags::LOG_DIRTY, ..there };
    let moved = Memslot { base_gfn: Gfn::new(100), ..there };
    let both = Memslot { flags: SlotFlags::LOG_DIRTY, ..moved };
    for (new, want) in [
        (there, SlotChange::Nothing),
        (logged, SlotChange::Flags { old: there, new: logged }),
        (moved, SlotChange::Move { old: there, new: moved }),
        (both, SlotChange::Move { old: there, new: both }),
    ] {
        assert_eq!(plan(&set, &LIMITS, &request(&new)), Ok(want));
        let zaps = matches!(want, SlotChange::Move { .. });
        assert_eq!(want.invalidates(), zaps.then_some(&there), "no zap for flags (KVM row 6.20)");
    }
}

#[test]
fn every_message_is_different_and_has_the_values() {
    let hva = Hva::new(0x77);
    let (flags, slot) = (SlotFlags::INVALID, slot(21, 22, 0x23, 24));
    let taken = GfnRange::new(Gfn::new(0x77), Gfn::new(0x78));
    let errors = [
        (SlotError::UnknownFlags { bits: 0x77 }, "0x77"),
        (SlotError::InternalFlag { flags }, "0x10000"),
        (SlotError::SizeUnaligned { bytes: 0x77 }, "0x77"),
        (SlotError::GpaUnaligned { base: Gpa::new(0x77) }, "0x77"),
        (SlotError::HvaUnaligned { hva }, "0x77"),
        (SlotError::HvaNotCanonical { hva, bits: 48 }, "48"),
        (SlotError::HvaWraps { hva, bytes: 0x88 }, "0x88"),
        (SlotError::AsIdOutOfRange { as_id: 77, limit: 2 }, "77"),
        (SlotError::IdOutOfRange { id: 77, limit: 2 }, "77"),
        (SlotError::GpaWraps { base: Gpa::new(0x77), bytes: 0x88 }, "0x77"),
        (SlotError::TooManyPages { pages: 77, limit: 2 }, "77"),
        (SlotError::TotalPages { current: 77, added: 88, limit: 2 }, "77 + 88"),
        (SlotError::Overlap { as_id: 1, id: 2, other: 3, taken }, "1:3 at [0x77, 0x78)"),
        (SlotError::AboveMaxGfn { last: Gfn::new(0x77), limit: Gfn::new(2) }, "0x77"),
        (SlotError::NoSuchSlot { as_id: 1, id: 2 }, "1:2"),
        (SlotError::SizeChanged { old_pages: 77, new_pages: 88 }, "88"),
        (SlotError::HvaChanged { old: hva, new: Hva::new(0x88) }, "0x88"),
        (SlotError::ReadOnlyToggled { old: flags, new: SlotFlags::CALLER }, "0x3"),
        (SlotError::NoMemory { slots: 77 }, "77"),
        (SlotError::Busy { as_id: 1, id: 2 }, "1:2"),
        (SlotError::Malformed { slot }, "21:22"),
        (SlotError::IdTaken { as_id: 1, id: 2 }, "1:2"),
    ];
    let mut seen = BTreeSet::new();
    for (error, value) in errors {
        let message = format!("{error}");
        assert!(message.contains(value), "{message:?} lacks {value}");
        assert!(seen.insert(message));
    }
}
