//! Filters and look-around (KVM rows 5.19, 5.26 to 5.29): what is looked at, and what follows.

use core::num::NonZeroU64;

use lru_age::{
    AgeTable, Candidate, EvictOptions, LookOptions, Participation, PassOptions, PassReport, Plain,
    Promotion, Recheck, Scan, SlowMmu, Take, WINDOW_PAGES, WorkingSet, candidates,
};
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::traits::AgeMode;

use crate::fake::{BLOCK, FakeMmu, pass, pass_with, range, table_over};

/// Sixteen mapped blocks and a table with filters, after one full pass that saw block 3 dense.
fn filtered() -> (FakeMmu, AgeTable) {
    let mmu = FakeMmu::new(16);
    let mut table = table_over(&mmu);
    table.enable_filters().unwrap();
    mmu.map(0..16 * BLOCK);
    touch_densely(&mmu, 3);
    let report = scan(&table, &mmu, Scan::Filtered);
    assert_eq!(report.counts.mapped, 16 * BLOCK, "no filter was written for the first pass");
    (mmu, table)
}

/// One page in each line of eight.
fn touch_densely(mmu: &FakeMmu, block: u64) {
    (0..BLOCK).step_by(8).for_each(|page| mmu.touch(block * BLOCK + page));
}

fn scan(table: &AgeTable, mmu: &FakeMmu, scan: Scan) -> PassReport {
    pass_with(table, mmu, PassOptions { scan, ..PassOptions::new(AgeMode::Clear) })
}

fn worth_a_look(table: &AgeTable) -> Vec<u64> {
    (0..16).filter(|block| table.is_worth_a_look(Gfn::new(block * BLOCK))).collect()
}

#[test]
fn a_filtered_pass_looks_where_the_last_one_found_much() {
    let (mmu, table) = filtered();
    assert_eq!(worth_a_look(&table), [3]);
    // Below the density of one in eight: not worth the next look.
    (0..63).for_each(|page| mmu.touch(3 * BLOCK + page));
    touch_densely(&mmu, 5);
    let report = scan(&table, &mmu, Scan::Filtered);
    assert_eq!((report.counts.mapped, report.counts.young), (BLOCK, 63));
    assert!(report.complete && worth_a_look(&table).is_empty());
    // What was left out kept its accessed bits; the next full pass finds them.
    let report = scan(&table, &mmu, Scan::Full);
    assert_eq!((report.counts.mapped, report.counts.young), (16 * BLOCK, 64));
    assert_eq!(worth_a_look(&table), [5]);
}

#[test]
fn pages_of_blocks_left_out_keep_their_age_whatever_gaps_mean() {
    let (mmu, table) = filtered();
    let report = scan(&table, &mmu, Scan::Filtered);
    assert_eq!(report.counts.unmapped_now, 0);
    assert_eq!(table.tracked_pages(), 16 * BLOCK);
}

#[test]
fn without_filters_a_filtered_pass_is_a_full_one() {
    let mmu = FakeMmu::new(4);
    let table = table_over(&mmu);
    mmu.map(0..4 * BLOCK);
    for _ in 0..3 {
        assert_eq!(scan(&table, &mmu, Scan::Filtered).counts.mapped, 4 * BLOCK);
    }
}

#[test]
fn noted_huge_and_unknown_blocks_are_always_looked_at() {
    let (mmu, table) = filtered();
    mmu.unmap(8 * BLOCK..9 * BLOCK);
    mmu.map_huge(9 * BLOCK, Level::L2);
    let _ = scan(&table, &mmu, Scan::Full);
    // 8 is empty and 9 huge; 12 is noted.
    table.note(Gfn::new(12 * BLOCK + 77));
    assert_eq!(worth_a_look(&table), [8, 9, 12]);
    assert!(!table.is_worth_a_look(Gfn::new(16 * BLOCK)), "outside the ranges");
    let report = scan(&table, &mmu, Scan::Filtered);
    assert_eq!(report.counts.mapped, 2 * BLOCK);
    // A note is good for one pass; one made while a pass runs is not lost to the next.
    assert_eq!(worth_a_look(&table), [8, 9]);
    let pass = lru_age::AgePass::start(&table, AgeMode::Clear).unwrap();
    table.note(Gfn::new(13 * BLOCK));
    let _ = pass.finish(0);
    assert_eq!(worth_a_look(&table), [8, 9, 13]);
}

#[test]
fn a_full_pass_every_n_bounds_what_filters_miss() {
    let (mmu, table) = filtered();
    let every = Scan::FullEvery(NonZeroU64::new(4).unwrap());
    for _ in 0..12 {
        let full = table.window().max_seq().get() % 4 == 0;
        let report = scan(&table, &mmu, every);
        assert_eq!(report.counts.mapped == 16 * BLOCK, full, "{report:?}");
    }
}

#[test]
fn budgets_bound_what_is_left_out_too_and_change_nothing() {
    let (mmu, table) = filtered();
    let options = PassOptions { scan: Scan::Filtered, ..PassOptions::new(AgeMode::Clear) };
    let mut pass = lru_age::AgePass::start_with(&table, options).unwrap();
    let mut steps = 0;
    let mut at = Gfn::new(0);
    while let Some(next) = pass.step(&mmu, &mut (), 1).next {
        assert!(next > at, "every step moves on");
        (at, steps) = (next, steps + 1);
    }
    // One block left out, or one looked at, a step.
    assert_eq!(steps, 15);
    assert_eq!(pass.finish(0).counts.mapped, BLOCK);
}

#[test]
fn what_filters_left_out_widens_the_working_set() {
    let (mmu, table) = filtered();
    touch_densely(&mmu, 3);
    touch_densely(&mmu, 5);
    let _ = scan(&table, &mmu, Scan::Filtered);
    let set = WorkingSet::of(&table, 1).unwrap();
    assert_eq!((set.low, set.pages, set.high), (64, 64, 64 + 15 * BLOCK));
}

/// Old pages, of which some were used once and so promote at the next use.
fn old_pages(mmu: &FakeMmu, table: &AgeTable) {
    mmu.map(0..mmu.pages());
    (0..mmu.pages()).for_each(|gfn| mmu.touch(gfn));
    for _ in 0..4 {
        let _ = pass(table, mmu);
    }
}

#[test]
fn the_neighbours_of_a_used_candidate_are_promoted() {
    let mmu = FakeMmu::new(2);
    let mut table = table_over(&mmu);
    table.enable_filters().unwrap();
    old_pages(&mmu, &table);
    let victim = candidates(&table).find(|found| found.range.start == Gfn::new(300)).unwrap();
    let max = table.window().max_seq();
    // Inside the window, at its borders, and just outside.
    [300, 268, 331, 267, 332].iter().for_each(|&gfn| mmu.touch(gfn));
    let look = {
        let mut editor = table.edit().unwrap();
        editor.look_around(&victim, &mmu, &mut (), LookOptions::DEFAULT)
    };
    assert_eq!(look.verdict, Recheck::Young);
    assert_eq!(look.window, GfnRange::from_len(Gfn::new(268), WINDOW_PAGES));
    assert_eq!(look.counts.promoted, 3);
    let youngest = |gfn| table.page_age(Gfn::new(gfn)).unwrap().seq == max;
    assert_eq!([300, 268, 331, 267, 332].map(youngest), [true, true, true, false, false]);
    let young = |gfn| mmu.leaf(gfn).unwrap().young;
    assert_eq!([300, 268, 331, 267, 332].map(young), [false, false, false, true, true]);
    assert!(!table.is_worth_a_look(Gfn::new(300)), "three of 64 are not dense");
    table.check().unwrap();
}

#[test]
fn a_dense_look_around_feeds_the_next_filtered_pass() {
    let mmu = FakeMmu::new(2);
    let mut table = table_over(&mmu);
    table.enable_filters().unwrap();
    old_pages(&mmu, &table);
    let victim = candidates(&table).find(|found| found.range.start == Gfn::new(300)).unwrap();
    (300..308).for_each(|gfn| mmu.touch(gfn));
    let mut editor = table.edit().unwrap();
    let look = editor.look_around(&victim, &mmu, &mut (), LookOptions::DEFAULT);
    drop(editor);
    assert_eq!(look.counts.promoted, 8);
    assert_eq!([300, 700].map(|gfn| table.is_worth_a_look(Gfn::new(gfn))), [true, false]);
}

#[test]
fn only_a_used_single_page_within_reach_is_looked_around() {
    let mut mmu = FakeMmu::new(3);
    let table = table_over(&mmu);
    mmu.map_huge(2 * BLOCK, Level::L2);
    old_pages(&mmu, &table);
    mmu.map_huge(2 * BLOCK, Level::L2);
    for _ in 0..3 {
        let _ = pass(&table, &mmu);
    }
    let look = |mmu: &FakeMmu, gfn| {
        let victim = candidates(&table).find(|found| found.range.contains(Gfn::new(gfn))).unwrap();
        table.edit().unwrap().look_around(&victim, mmu, &mut (), LookOptions::DEFAULT)
    };
    // Cold: the neighbour's use stays for the next pass to see.
    mmu.touch(9);
    let cold = look(&mmu, 10);
    assert_eq!((cold.verdict, cold.window.len(), cold.counts.promoted), (Recheck::Cold, 0, 0));
    assert!(mmu.leaf(9).unwrap().young);
    // Used, but the MMU answers slowly.
    mmu.touch(10);
    mmu.slow = true;
    let alone = look(&mmu, 10);
    assert_eq!((alone.verdict, alone.window.len()), (Recheck::Young, 0));
    assert!(mmu.leaf(9).unwrap().young);
    mmu.slow = false;
    // A huge leaf has no neighbours in its table.
    mmu.touch(2 * BLOCK + 9);
    let huge = look(&mmu, 2 * BLOCK);
    assert_eq!((huge.verdict, huge.window.len()), (Recheck::Young, 0));
    // Gone meanwhile.
    mmu.unmap(20..21);
    let gone = look(&mmu, 20);
    assert_eq!((gone.verdict, gone.counts.unmapped_now), (Recheck::Unmapped, 1));
    assert_eq!(table.page_age(Gfn::new(20)), None);
    table.check().unwrap();
}

#[test]
fn the_first_use_seen_by_a_look_around_is_a_second_chance_too() {
    let mmu = FakeMmu::new(1);
    let table = table_over(&mmu);
    mmu.map(0..BLOCK);
    for _ in 0..4 {
        let _ = pass(&table, &mmu);
    }
    for (promotion, promoted) in [(Promotion::SecondChance, 0), (Promotion::Immediate, 1)] {
        let victim = candidates(&table).next().unwrap();
        mmu.touch(victim.range.start.get());
        let options = LookOptions::DEFAULT.with_promotion(promotion);
        let look = table.edit().unwrap().look_around(&victim, &mmu, &mut (), options);
        assert_eq!((look.verdict, look.counts.promoted), (Recheck::Young, promoted));
    }
}

/// An MMU may answer in as many slices as it likes: the answer is that of the whole candidate.
#[test]
fn a_candidate_is_checked_to_its_end_in_however_many_slices() {
    let mut mmu = FakeMmu::new(512);
    let table = table_over(&mmu);
    mmu.map_huge(0, Level::L3);
    for _ in 0..4 {
        let _ = pass(&table, &mmu);
    }
    // All of the leaf, where candidates are blocks of it.
    let block = candidates(&table).next().unwrap();
    let victim = Candidate { range: range(0..512 * BLOCK), pages: 512 * BLOCK, ..block };
    // Split meanwhile, and partly unmapped; only its last page is used.
    (0..512).for_each(|block| mmu.map_huge(block * BLOCK, Level::L2));
    mmu.unmap(300 * BLOCK..302 * BLOCK);
    mmu.split(511 * BLOCK);
    mmu.touch(512 * BLOCK - 1);
    mmu.slice = 1;
    let calls = mmu.calls.load(core::sync::atomic::Ordering::Relaxed);
    let mut editor = table.edit().unwrap();
    let look = editor.look_around(&victim, &mmu, &mut (), LookOptions::DEFAULT);
    drop(editor);
    assert_eq!(mmu.calls.load(core::sync::atomic::Ordering::Relaxed) - calls, 512);
    assert_eq!(look.verdict, Recheck::Young);
    assert_eq!((look.counts.young, look.counts.unmapped_now), (1, 2 * BLOCK));
    assert_eq!(table.tracked_pages(), 510 * BLOCK);
    assert!(!mmu.leaf(512 * BLOCK - 1).unwrap().young, "it was cleared");
    table.check().unwrap();
}

#[test]
fn ranges_are_looked_at_to_their_borders_only() {
    let mmu = FakeMmu::new(1);
    let mut table = AgeTable::new(0);
    table.add_range(range(100..120)).unwrap();
    old_pages(&mmu, &table);
    let victim = candidates(&table).next().unwrap();
    (90..130).for_each(|gfn| mmu.touch(gfn));
    let mut editor = table.edit().unwrap();
    let look = editor.look_around(&victim, &mmu, &mut (), LookOptions::DEFAULT);
    assert_eq!(look.window, range(100..120));
    assert_eq!(look.counts.promoted, 20);
    assert!(mmu.leaf(99).unwrap().young && mmu.leaf(120).unwrap().young);
}

/// Rows 5.17, 5.37: what an MMU can do decides how it is asked, at run time, and is reported.
#[test]
fn a_slow_mmu_is_asked_only_before_its_pages_go() {
    let mut mmu = FakeMmu::new(2);
    let table = table_over(&mmu);
    old_pages(&mmu, &table);
    assert_eq!(Participation::of(&mmu), Participation::AgingAndLookAround);
    mmu.slow = true;
    assert_eq!(Participation::of(&mmu), Participation::EvictionOnly);
    (0..2 * BLOCK).for_each(|gfn| mmu.touch(gfn));
    let calls = mmu.calls.load(core::sync::atomic::Ordering::Relaxed);
    let report = pass(&table, &mmu);
    assert_eq!(mmu.calls.load(core::sync::atomic::Ordering::Relaxed), calls, "left alone");
    assert!(report.complete);
    assert_eq!((report.counts.young, report.counts.unknown), (0, 2 * BLOCK));
    let set = WorkingSet::of(&table, 1).unwrap();
    assert_eq!((set.low, set.high), (0, 2 * BLOCK), "nothing is known");
    // Before a page goes, it is asked about that page.
    let report = table.edit().unwrap().evict(
        &mmu,
        &mut (),
        &mut Plain::default(),
        &EvictOptions { checks: 5, ..EvictOptions::new(100) },
        |_| Take::Evicted,
    );
    assert_eq!(report.participation, Participation::EvictionOnly);
    assert_eq!((report.young, report.evicted), (5, 0), "they were used, and stay");
    assert!(mmu.leaf(5).unwrap().young, "the neighbours were not asked");
    // Unless the pass is told to ask.
    let options = PassOptions { slow: SlowMmu::Ask, ..PassOptions::new(AgeMode::Clear) };
    assert_eq!(pass_with(&table, &mmu, options).counts.young, 2 * BLOCK - 5);
}

#[test]
fn a_pass_that_clears_upper_bits_flushes_once_per_range() {
    let mmu = FakeMmu::new(2);
    let mut table = AgeTable::new(0);
    table.add_range(range(0..BLOCK)).unwrap();
    table.add_range(range(BLOCK..2 * BLOCK)).unwrap();
    let mut pass = lru_age::AgePass::start(&table, AgeMode::Clear).unwrap();
    while pass.step(&mmu, &mut (), 100).next.is_some() {}
    pass.flush(&mmu, &mut ());
    let _ = pass.finish(0);
    assert_eq!(mmu.flushes.load(core::sync::atomic::Ordering::Relaxed), 2);
}

/// With a full pass every n, upper bits are not asked either.
#[test]
fn a_full_pass_every_n_looks_below_idle_entries_too() {
    let mut mmu = FakeMmu::new(4);
    mmu.skip_idle = true;
    let table = table_over(&mmu);
    mmu.map(0..4 * BLOCK);
    let scan = Scan::FullEvery(NonZeroU64::new(3).unwrap());
    let upper = mmu_core::traits::UpperBits::Use;
    let options = PassOptions { scan, upper, ..PassOptions::new(AgeMode::Clear) };
    let looked: Vec<u64> =
        (0..6).map(|_| pass_with(&table, &mmu, options).counts.mapped / BLOCK).collect();
    assert_eq!(looked, [4, 0, 0, 4, 0, 0], "generations 3 and 6 look at everything");
}
