//! The walk over a tree (KVM rows 2.1 to 2.11) against a naive recursive walker on random trees.

mod common;

use std::collections::BTreeSet;

use common::{BASE, DATA, G1, Guest, M2, Modelled, TABLE, TestHost, range};
use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::epoch::EpochGuard;
use mmu_core::frame::TablePool;
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt};
use mmu_model::{AccessKind, Random};
use tdp_mmu::{Cursor, PostOrder, Step, TdpIter};

/// Gfn, level, value.
type Visit = (u64, u8, u64);

/// Everything the walk must visit, found without thinking: every entry of every table, in order.
fn naive(
    pool: &TablePool<TestHost>,
    section: &EpochGuard<'_>,
    (table, level, base): (Pfn, Level, u64),
    wanted: GfnRange,
    min_level: Level,
    found: &mut Vec<Visit>,
) {
    for (index, cell) in pool.table(section, table).entries().iter().enumerate() {
        let gfn = base + index as u64 * level.pages();
        if gfn + level.pages() <= wanted.start.get() || gfn >= wanted.end.get() {
            continue;
        }
        let spte = cell.load();
        found.push((gfn, level.number(), spte.raw()));
        if let Some(below) = level.down().filter(|_| level > min_level && spte.is_table(level)) {
            naive(pool, section, (spte.pfn(), below, gfn), wanted, min_level, found);
        }
    }
}

/// A guest with a random tree.
fn random_tree<F: Modelled>(caps: Capabilities, random: &mut Random) -> (Guest<F>, Pfn, Level) {
    let mut guest = Guest::<F>::with_memory(caps, 4 * G1, Level::L3);
    for _ in 0..40 {
        let gfn = BASE + random.below(3) * G1 + random.below(3) * M2 + random.below(TABLE);
        let level = Level::ALL[random.below(8).min(2) as usize];
        let level = if random.chance(1, 2) { Level::L1 } else { level };
        let _ = guest.fault(gfn, AccessKind::Write, level);
    }
    let root = guest.vcpu.load_root().unwrap();
    let level = guest.config().levels();
    (guest, root, level)
}

fn random_range(random: &mut Random) -> GfnRange {
    let point = |random: &mut Random| match random.below(4) {
        0 => BASE + random.below(4 * G1),
        1 => BASE + random.below(4) * G1 + random.below(3) * M2,
        2 => BASE + random.below(2) * G1 + random.below(2 * TABLE),
        _ => random.below(BASE),
    };
    let (a, b) = (point(random), point(random));
    range(a.min(b), a.max(b))
}

fn agrees_with_a_naive_walk<F: Modelled>(caps: Capabilities) {
    for seed in 0..6 {
        let mut random = Random::new(seed);
        let (mut guest, root, top) = random_tree::<F>(caps, &mut random);
        for _ in 0..24 {
            let wanted = random_range(&mut random);
            // Above the root's level it means the root's level.
            let min_level = Level::ALL[random.below(5) as usize];
            let work = guest.actor.pinned();
            let pool = work.vm.pool();
            let mut expected = Vec::new();
            let whole = (root, top, 0);
            naive(pool, &work.section, whole, wanted, min_level.min(top), &mut expected);
            let cursor = Cursor::new(wanted, min_level);
            let mut iter = TdpIter::new(pool, &work.section, root, top, cursor);
            let found: Vec<Visit> = iter
                .by_ref()
                .map(|step| (step.gfn.get(), step.level.number(), step.spte.raw()))
                .collect();
            assert_eq!(found, expected, "seed {seed}, {wanted:?}, {min_level:?}");
            assert!(found.iter().all(|visit| visit.1 >= min_level.min(top).number()));
            assert!(iter.next().is_none() && iter.cursor().is_done(), "the end is the end");
        }
        guest.finish();
    }
}

#[test]
fn the_walk_visits_what_a_naive_walk_visits_in_the_same_order() {
    for_each_format!(agrees_with_a_naive_walk);
    agrees_with_a_naive_walk::<Legacy>(Capabilities {
        max_phys_bits: 36,
        ..Capabilities::legacy()
    });
}

// INVARIANT[I23].
#[test]
fn a_walk_that_always_yields_ends_and_misses_nothing() {
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let (mut guest, root, top) = random_tree::<Ept>(Capabilities::ept(), &mut random);
        let wanted = random_range(&mut random);
        let min_level = Level::ALL[random.below(3) as usize];
        let mut cursor = Cursor::new(wanted, min_level);
        let mut found = BTreeSet::new();
        let (mut sections, mut expected) = (0, Vec::new());
        'walk: loop {
            let work = guest.actor.pinned();
            let pool = work.vm.pool();
            sections += 1;
            let mut iter = TdpIter::resume(pool, &work.section, root, top, cursor);
            loop {
                let Some(step) = iter.next() else {
                    naive(pool, &work.section, (root, top, 0), wanted, min_level, &mut expected);
                    break 'walk;
                };
                found.insert((step.gfn.get(), step.level.number(), step.spte.raw()));
                match iter.suspend() {
                    Ok(next) => {
                        assert!(next.next() >= cursor.next(), "seed {seed}: it went back");
                        cursor = next;
                        continue 'walk;
                    }
                    Err(same) => iter = same,
                }
            }
        }
        let expected: BTreeSet<Visit> = expected.into_iter().collect();
        assert_eq!(found, expected, "seed {seed}, {wanted:?}, {min_level:?}");
        assert!(sections <= 2 + found.len(), "seed {seed}: {sections} for {}", found.len());
        guest.finish();
    }
}

#[test]
fn a_walk_that_yields_on_its_first_entry_visits_it_again() {
    let mut guest = Guest::<Npt>::with_memory(Capabilities::npt(), G1, Level::L1);
    guest.map([BASE], AccessKind::Read, Level::L1);
    let (root, top) = (guest.vcpu.load_root().unwrap(), Level::L4);
    // The root's own level: one entry in all.
    let cursor = Cursor::new(range(BASE, BASE + 1), Level::L4);
    let work = guest.actor.pinned();
    let pool = work.vm.pool();
    let mut iter = TdpIter::new(pool, &work.section, root, top, cursor);
    assert_eq!(iter.next().map(|step| step.gfn), Some(Gfn::new(0)));
    let cursor = iter.suspend().expect("nothing yielded before");
    assert!(!cursor.is_done() && cursor.next() == Gfn::new(BASE));
    drop(work);

    let work = guest.actor.pinned();
    let mut iter = TdpIter::resume(work.vm.pool(), &work.section, root, top, cursor);
    assert_eq!(iter.next().map(|step| step.gfn), Some(Gfn::new(0)), "not skipped");
    let mut iter = iter.suspend().expect_err("no progress since it was resumed");
    assert!(iter.next().is_none());
    assert!(iter.suspend().expect("the end is progress").is_done());
    drop(work);
    guest.finish();
}

#[test]
fn a_yield_before_the_first_entry_loses_nothing() {
    let mut guest = Guest::<Npt>::new(Capabilities::npt());
    let root = guest.vcpu.load_root().unwrap();
    let work = guest.actor.pinned();
    let cursor = Cursor::new(range(5, 9), Level::L1);
    let iter = TdpIter::new(work.vm.pool(), &work.section, root, Level::L4, cursor);
    let cursor = iter.suspend().expect("a new walk may be put off");
    let iter = TdpIter::resume(work.vm.pool(), &work.section, root, Level::L4, cursor);
    assert_eq!(iter.count(), 1, "the root's entry, which is empty");
    drop(work);
    guest.finish();
}

#[test]
fn a_start_inside_a_huge_page_visits_the_whole_page_first() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), G1, Level::L2);
    guest.map([BASE, BASE + M2], AccessKind::Write, Level::L2);
    let root = guest.vcpu.load_root().unwrap();
    let work = guest.actor.pinned();
    let wanted = range(BASE + 100, BASE + M2 + 1);
    let cursor = Cursor::new(wanted, Level::L1);
    let iter = TdpIter::new(work.vm.pool(), &work.section, root, Level::L4, cursor);
    let visits: Vec<(u64, Level, bool)> =
        iter.map(|step| (step.gfn.get(), step.level, step.spte.is_leaf(step.level))).collect();
    let expected = [
        (0, Level::L4, false),
        (BASE, Level::L3, false),
        (BASE, Level::L2, true),
        (BASE + M2, Level::L2, true),
    ];
    assert_eq!(visits, expected, "the first and the last reach beyond the range");
    drop(work);
    guest.finish();
}

/// Row 2.6: the walk follows what the caller, or anybody, has just written.
#[test]
fn a_page_split_under_the_walk_is_entered() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 2 * M2, Level::L2);
    guest.map([BASE], AccessKind::Write, Level::L2);
    let root = guest.vcpu.load_root().unwrap();
    let work = guest.actor.pinned();
    let cursor = Cursor::new(range(BASE, BASE + M2), Level::L1);
    let mut iter = TdpIter::new(work.vm.pool(), &work.section, root, Level::L4, cursor);
    let huge = iter.find(|step| step.spte.is_leaf(step.level)).expect("the huge page");
    assert_eq!((huge.gfn, huge.level), (Gfn::new(BASE), Level::L2));
    let fault = mmu_core::fault::PageFault::new(
        Gfn::new(BASE + 3).address(),
        mmu_core::access::PfErrorCode::WRITE,
    );
    let _ = guest.vcpu.fault(&fault.at_most(Level::L1)).unwrap();
    let children: Vec<u64> = iter.map(|step| step.gfn.get()).collect();
    assert_eq!(children, (BASE..BASE + M2).collect::<Vec<u64>>());
    drop(work);
    guest.check();
    guest.finish();
}

/// Row 2.6, the other way: a table taken away is not entered.
#[test]
fn a_table_replaced_under_the_walk_is_not_entered() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 2 * M2, Level::L2);
    guest.map([BASE, BASE + 7, BASE + M2], AccessKind::Write, Level::L1);
    let root = guest.vcpu.load_root().unwrap();
    let work = guest.actor.pinned();
    let cursor = Cursor::new(range(BASE, BASE + 2 * M2), Level::L1);
    let mut iter = TdpIter::new(work.vm.pool(), &work.section, root, Level::L4, cursor);
    let link = iter.find(|step| step.level == Level::L2).expect("the table");
    assert!(link.spte.is_table(Level::L2));
    let fault = mmu_core::fault::PageFault::new(
        Gfn::new(BASE + 3).address(),
        mmu_core::access::PfErrorCode::WRITE,
    );
    let _ = guest.vcpu.fault(&fault.at_most(Level::L2)).unwrap();
    let next = iter.next().expect("the next block");
    assert_eq!((next.gfn, next.level), (Gfn::new(BASE + M2), Level::L2));
    assert_eq!(iter.count(), 512, "that one is entered");
    drop(work);
    guest.check();
    guest.finish();
}

#[test]
fn impossible_ranges_give_empty_walks() {
    let mut guest = Guest::<Legacy>::new(Capabilities::legacy());
    guest.slot(0, BASE, 8, DATA, SlotFlags::empty());
    let root = guest.vcpu.load_root().unwrap();
    let reach = 1 << 36;
    let empty = [
        range(5, 5),
        range(9, 5),
        range(u64::MAX, 0),
        range(reach, reach + 1),
        range(reach, u64::MAX),
        range(u64::MAX, u64::MAX),
    ];
    let work = guest.actor.pinned();
    for wanted in empty {
        for min_level in Level::ALL {
            let cursor = Cursor::new(wanted, min_level);
            let iter = TdpIter::new(work.vm.pool(), &work.section, root, Level::L4, cursor);
            assert_eq!(iter.count(), 0, "{wanted:?}");
        }
    }
    // The last gfn of the reach, and everything.
    for (wanted, entries) in [(range(reach - 1, u64::MAX), 1), (range(0, u64::MAX), 512)] {
        let cursor = Cursor::new(wanted, Level::L1);
        let iter = TdpIter::new(work.vm.pool(), &work.section, root, Level::L4, cursor);
        assert_eq!(iter.count(), entries, "{wanted:?}");
    }
    drop(work);
    guest.finish();
}

/// Children first, found without thinking; `enter` says below which entries there is anything.
fn naive_below(
    pool: &TablePool<TestHost>,
    section: &EpochGuard<'_>,
    (table, level, base): (Pfn, Level, u64),
    wanted: GfnRange,
    (parents_first, enter): (bool, &dyn Fn(Visit) -> bool),
    found: &mut Vec<Visit>,
) {
    for (index, cell) in pool.table(section, table).entries().iter().enumerate() {
        let gfn = base + index as u64 * level.pages();
        if gfn + level.pages() <= wanted.start.get() || gfn >= wanted.end.get() {
            continue;
        }
        let spte = cell.load();
        let visit = (gfn, level.number(), spte.raw());
        if parents_first {
            found.push(visit);
        }
        if let Some(below) = level.down().filter(|_| spte.is_table(level) && enter(visit)) {
            let child = (spte.pfn(), below, gfn);
            naive_below(pool, section, child, wanted, (parents_first, enter), found);
        }
        if !parents_first {
            found.push(visit);
        }
    }
}

fn visit(step: &Step<'_>) -> Visit {
    (step.gfn.get(), step.level.number(), step.spte.raw())
}

/// Row 2.16.
#[test]
fn what_is_below_an_entry_can_be_left_out_and_nothing_else_is() {
    for seed in 0..30 {
        let mut random = Random::new(seed);
        let (mut guest, root, top) = random_tree::<Ept>(Capabilities::ept(), &mut random);
        let wanted = random_range(&mut random);
        let salt = random.next_u64();
        // Any choice that depends on the place alone.
        let enter = |(gfn, level, _): Visit| {
            (gfn ^ u64::from(level) ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 62 != 0
        };
        let work = guest.actor.pinned();
        let pool = work.vm.pool();
        let mut expected = Vec::new();
        let whole = (root, top, 0);
        naive_below(pool, &work.section, whole, wanted, (true, &enter), &mut expected);
        let mut iter = TdpIter::new(pool, &work.section, root, top, Cursor::new(wanted, Level::L1));
        // Before the first step there is nothing to leave out.
        iter.skip_subtree();
        let mut found = Vec::new();
        while let Some(step) = iter.next() {
            found.push(visit(&step));
            if !enter(visit(&step)) {
                iter.skip_subtree();
            }
        }
        assert_eq!(found, expected, "seed {seed}, {wanted:?}");
        assert!(iter.cursor().is_done());
        drop(work);
        guest.finish();
    }
}

/// Row 2.16.
#[test]
fn a_post_order_walk_visits_children_before_their_parents() {
    for seed in 0..30 {
        let mut random = Random::new(seed);
        let (mut guest, root, top) = random_tree::<Npt>(Capabilities::npt(), &mut random);
        let wanted = random_range(&mut random);
        let work = guest.actor.pinned();
        let pool = work.vm.pool();
        let mut expected = Vec::new();
        let whole = (root, top, 0);
        naive_below(pool, &work.section, whole, wanted, (false, &|_| true), &mut expected);
        let cursor = Cursor::new(wanted, Level::L1);
        let iter = TdpIter::new(pool, &work.section, root, top, cursor);
        let found: Vec<Visit> = PostOrder::new(iter).map(|step| visit(&step)).collect();
        assert_eq!(found, expected, "seed {seed}, {wanted:?}");
        drop(work);
        guest.finish();
    }
}
