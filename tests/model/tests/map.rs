//! The map model against its own promises.

use std::collections::BTreeSet;

use mmu_model::{Backing, Fixed, MapModel, Page, Refusal};

fn backing(gfn: u64) -> Option<Backing> {
    (gfn < 100).then_some(Backing { pfn: gfn + 1000, writable: gfn < 50 })
}

#[test]
fn life_of_a_page() {
    let mut map = MapModel::new(backing);
    assert_eq!(map.touch(3, false), Err(Refusal::NotMapped));
    assert_eq!(map.fault(3, false), Ok(Fixed::Installed));
    assert_eq!(map.fault(3, true), Ok(Fixed::Spurious));
    let fresh = Page { pfn: 1003, writable: true, young: true, dirty: false };
    assert_eq!(map.get(3), Some(fresh));
    assert_eq!(map.age(0..10), BTreeSet::from([3]));
    assert!(map.age(0..10).is_empty() && !map.any_young(0..10));
    assert_eq!(map.touch(3, true), Ok(1003));
    assert!(map.any_young(3..4) && !map.any_young(4..10));
    assert_eq!(map.clean(0..10), BTreeSet::from([3]));
    assert_eq!(map.write_protect(3..4), BTreeSet::from([3]));
    assert_eq!(map.touch(3, true), Err(Refusal::ReadOnly));
    assert_eq!(map.touch(3, false), Ok(1003));
    assert_eq!(map.fault(3, true), Ok(Fixed::Installed));
    let written = Page { dirty: true, ..fresh };
    assert_eq!(map.zap(3..4).into_iter().collect::<Vec<_>>(), [(3, written)]);
    assert!(map.is_empty());
}

#[test]
fn what_the_host_does_not_give() {
    let mut map = MapModel::new(backing);
    assert_eq!(map.fault(100, false), Err(Refusal::NoBacking));
    assert_eq!(map.fault(60, true), Err(Refusal::BackingReadOnly));
    assert!(map.is_empty());
    assert_eq!(map.fault(60, false), Ok(Fixed::Installed));
    assert_eq!(map.fault(60, true), Err(Refusal::BackingReadOnly));
    assert_eq!(map.len(), 1);
}

#[test]
fn ranges_end_where_they_say() {
    let mut map = MapModel::new(backing);
    for gfn in 0..10 {
        assert!(map.fault(gfn, gfn % 2 == 0).is_ok());
    }
    assert_eq!(map.clean(3..7), BTreeSet::from([4, 6]));
    assert_eq!(map.zap(9..20).len(), 1);
    assert_eq!(map.range(5..u64::MAX).count(), 4);
    let (start, end) = (7, 3);
    assert!(map.zap(start..end).is_empty());
    assert!(map.age(start..end).is_empty());
}
