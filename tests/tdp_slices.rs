//! No operation visits more than 512 entries between two points where others may proceed; the
//! counter `max_slice` shows the largest (KVM rows 2.8, 3.33; 8.3).

mod common;

use common::{BASE, DATA, Guest, M2, Modelled, linear, no_ad, range};
use mmu_core::access::Access;
use mmu_core::addr::{GfnRange, Level};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept, Npt};
use mmu_core::stats::Counter;
use mmu_core::traits::AgeMode;
use mmu_model::AccessKind;

/// 2 MiB blocks of the guests here.
const BLOCKS: u64 = 8;

/// Small pages in every other block, and dense in the first three; huge ones in the rest.
fn populated<F: Modelled>(caps: Capabilities) -> Guest<F> {
    let mut guest = Guest::<F>::with_memory(caps, BLOCKS * M2, Level::L2);
    let dense = range(BASE, BASE + 3 * M2);
    for gfn in dense.start.get()..dense.end.get() {
        guest.map([gfn], AccessKind::Write, Level::L1);
    }
    for block in 3..BLOCKS {
        let level = if block % 2 == 0 { Level::L1 } else { Level::L2 };
        guest.map([BASE + block * M2], AccessKind::Write, level);
    }
    guest
}

#[track_caller]
fn within_bounds<F: Modelled>(guest: &Guest<F>, what: &str) {
    let max = guest.stat(Counter::MaxSlice);
    assert!((1..=512).contains(&max), "{what}: {max} entries");
}

fn every_operation<F: Modelled>(caps: Capabilities) {
    // Ranges that begin and end inside tables: a table's part, whole tables, a part again.
    let ranges = [
        range(BASE, BASE + BLOCKS * M2),
        range(BASE + 7, BASE + 3 * M2 - 5),
        range(BASE + M2 - 1, BASE + M2 + 1),
        GfnRange::ALL,
    ];
    for wanted in ranges {
        let mut guest = populated::<F>(caps);
        for mode in [AgeMode::Test, AgeMode::Clear, AgeMode::ClearFlush] {
            let report = guest.age(wanted, mode);
            assert!(report.mapped > 0, "{wanted:?} {mode:?}");
            within_bounds(&guest, "age");
        }
        assert!(guest.mmu.dump(&mut guest.actor, None, wanted).count() > 0);
        within_bounds(&guest, "dump");
        let _ = guest.mmu.usage(&mut guest.actor);
        within_bounds(&guest, "usage");
        let logged = SlotFlags::LOG_DIRTY;
        guest.slot(0, BASE, BLOCKS * M2, DATA, logged);
        within_bounds(&guest, "logging enabled");
        guest.slot(0, BASE, BLOCKS * M2, DATA, SlotFlags::empty());
        within_bounds(&guest, "logging disabled");
        let report = guest.unmap(wanted);
        assert!(report.pages() > 0, "{wanted:?}");
        within_bounds(&guest, "unmap");
        guest.host().set_resolver(linear(Level::L1));
        let part = wanted.intersection(range(BASE, BASE + 600));
        let _ = guest.vcpu.prefault(part, Access::READ).expect("no error");
        within_bounds(&guest, "prefault");
        guest.check();
        guest.finish();
    }
}

#[test]
fn no_operation_visits_more_than_512_entries_at_a_time() {
    every_operation::<Ept>(Capabilities::ept());
    every_operation::<Ept>(no_ad(Capabilities::ept()));
    every_operation::<Npt>(Capabilities::npt());
}

#[test]
fn the_largest_slice_is_shown_and_not_the_sum() {
    let mut guest = populated::<Ept>(Capabilities::ept());
    // One page in one table: the walk passes a few entries of the tables above.
    let _ = guest.age(range(BASE, BASE + 1), AgeMode::Test);
    let small = guest.stat(Counter::MaxSlice);
    assert!((1..512).contains(&small), "{small}");
    for _ in 0..3 {
        let _ = guest.age(range(BASE, BASE + 3 * M2), AgeMode::Test);
    }
    assert_eq!(guest.stat(Counter::MaxSlice), 512, "a table at a time");
    let _ = guest.age(range(BASE, BASE + 1), AgeMode::Test);
    assert_eq!(guest.stat(Counter::MaxSlice), 512, "a maximum does not fall");
    guest.finish();
}
