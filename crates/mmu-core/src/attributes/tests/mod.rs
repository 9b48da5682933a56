//! Attributes: the map against one value a gfn, and the table's protocol on real threads.

mod model;
mod protocol;

use alloc::sync::Arc;
use alloc::vec::Vec;
use alloc::{format, vec};

use super::*;
use crate::addr::{to_index, to_u64};

fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start), Gfn::new(end))
}

#[test]
fn restrictions_take_away_and_never_give() {
    for bits in 0..=Attributes::all().bits() {
        let attributes = Attributes::from_bits_retain(bits);
        for access in (0..=Access::ALL.bits()).map(Access::from_bits_retain) {
            let left = attributes.restrict(access);
            assert!(access.contains(left), "{attributes:?} of {access:?}");
            for more in Attributes::all() {
                let fewer = (attributes | more).restrict(access);
                assert!(left.contains(fewer), "{more:?} added to {attributes:?}: {access:?}");
                assert_eq!(fewer, more.restrict(left), "two sources are their union");
            }
        }
    }
    assert_eq!(Attributes::PRIVATE.restrict(Access::ALL), Access::ALL);
    assert_eq!(Attributes::NO_READ.restrict(Access::ALL), Access::EXEC | Access::USER);
    assert_eq!(Attributes::NO_WRITE.restrict(Access::ALL), Access::READ_ONLY);
    assert_eq!(Attributes::NO_EXEC.restrict(Access::ALL), Access::ALL - Access::EXEC);
    assert_eq!(Attributes::PRIVATE.bits(), 8, "the KVM interface's value");
}

#[test]
fn what_cannot_be_asked_is_refused_by_name() {
    let mut map = AttributeMap::new(8);
    let end = GfnRange::ALL.end.get();
    for bad in [range(5, 5), range(6, 5), range(end - 1, end + 1), range(end, end + 1)] {
        let error = AttributeError::BadRange { range: bad };
        assert_eq!(map.set(bad, Attributes::PRIVATE), Err(error));
    }
    let unknown = Attributes::from_bits_retain(0x18);
    let error = AttributeError::UnknownFlags { bits: 0x18 };
    assert_eq!(map.set(range(0, 1), unknown), Err(error));
    assert!(map.is_empty());
    map.set(GfnRange::ALL, Attributes::PRIVATE).expect("everything is a range");
    assert!(map.get(Gfn::new(end - 1)).is_private() && !map.get(Gfn::new(end)).is_private());
}

#[test]
fn a_full_map_refuses_and_stays_as_it_was() {
    let mut map = AttributeMap::new(4);
    map.set(range(10, 20), Attributes::PRIVATE).expect("two edges");
    map.set(range(30, 40), Attributes::PRIVATE).expect("four edges");
    let before: Vec<Run> = map.runs(range(0, 100)).collect();
    let error = AttributeError::TooManyEdges { needed: 6, limit: 4 };
    assert_eq!(map.set(range(12, 13), Attributes::empty()), Err(error));
    assert_eq!(map.runs(range(0, 100)).collect::<Vec<_>>(), before);
    // What needs no more edges is still possible.
    map.set(range(20, 30), Attributes::PRIVATE).expect("joins two runs");
    assert_eq!(map.edges(), 2);
    map.set(range(12, 13), Attributes::empty()).expect("four edges again");
}

#[test]
fn a_huge_page_needs_the_same_attributes_everywhere() {
    let mut map = AttributeMap::new(64);
    let (large, huge) = (Level::L2.pages(), Level::L3.pages());
    let level = |map: &AttributeMap, gfn, cap| max_level(map, Gfn::new(gfn), cap);
    assert_eq!(level(&map, 5, Level::L3), Level::L3);
    map.set(range(huge + large, huge + 2 * large), Attributes::PRIVATE).expect("room");
    assert_eq!(level(&map, huge - 1, Level::L3), Level::L3, "the 1 GiB page before");
    assert_eq!(level(&map, huge, Level::L3), Level::L2, "a sibling of the same 1 GiB");
    assert_eq!(level(&map, huge + large, Level::L3), Level::L2, "the private 2 MiB page");
    assert_eq!(level(&map, huge, Level::L1), Level::L1, "the cap holds");
    map.set(range(huge + large + 7, huge + large + 8), Attributes::empty()).expect("room");
    assert_eq!(level(&map, huge + large, Level::L3), Level::L1, "one shared page in it");
    assert_eq!(level(&map, huge + 2 * large, Level::L3), Level::L2, "the next is whole");
    map.set(range(huge, 2 * huge), Attributes::NO_EXEC).expect("room");
    assert_eq!(level(&map, huge + large + 7, Level::L3), Level::L3, "all alike again");
}
