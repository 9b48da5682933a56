//! A pass by several threads (issue: multi-threaded passes over disjoint ranges): any number of
//! them, in any order, gives what one gives.

use std::sync::mpsc;

use lru_age::{
    AgePass, AgeTable, Harvest, Histogram, PassCounts, PassOptions, PassReport, ScanPlan,
    candidates,
};
use mmu_core::addr::{Gfn, GfnRange, Level, to_index, to_u64};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, UpperBits};

use crate::fake::{BLOCK, FakeMmu, Rng, range};

const BLOCKS: u64 = 40;
const OPTIONS: PassOptions =
    PassOptions { upper: UpperBits::Use, ..PassOptions::new(AgeMode::Clear) };

fn table() -> AgeTable {
    let mut table = AgeTable::new(0);
    for part in [range(10..3000), range(3000..9000), range(9100..BLOCKS * BLOCK)] {
        table.add_range(part).unwrap();
    }
    table
}

fn dump(table: &AgeTable) -> impl PartialEq + core::fmt::Debug {
    let pages: Vec<_> = (0..BLOCKS * BLOCK).map(|gfn| table.page_age(Gfn::new(gfn))).collect();
    let order: Vec<_> = candidates(table).collect();
    (table.window(), pages, order, Histogram::of(table, 1 << 40))
}

/// One pass in parts of `size` blocks, absorbed in an order that `rng` decides.
fn in_parts(table: &AgeTable, mmu: &FakeMmu, size: u64, rng: &mut Rng) -> PassReport {
    let mut pass = AgePass::start_with(table, OPTIONS).unwrap();
    let (plan, request) = (ScanPlan::new(table, size), pass.request());
    let mut harvests = Vec::new();
    while let Some(part) = plan.claim() {
        let mut harvest = Harvest::new(size).unwrap();
        assert_eq!(harvest.collect(mmu, &mut (), request.for_range(part)), part);
        harvests.push(harvest);
    }
    assert_eq!(plan.claim(), None);
    while !harvests.is_empty() {
        assert!(pass.progress().next.is_some(), "not complete before the last part");
        let at = to_index(rng.below(to_u64(harvests.len())));
        pass.absorb(&harvests.swap_remove(at));
    }
    assert_eq!((pass.progress().next, pass.progress().percent), (None, 100));
    pass.finish(0)
}

#[test]
fn parts_in_any_order_give_what_one_walk_gives() {
    for seed in 0..12 {
        println!("seed {seed}");
        let mut rng = Rng(seed);
        let mut once = FakeMmu::new(BLOCKS);
        once.skip_idle = seed % 2 == 1;
        let tables = [(); 4].map(|()| table());
        for _ in 0..8 {
            for _ in 0..8 {
                let pages = rng.pages(BLOCKS * BLOCK);
                match rng.below(5) {
                    0 => once.map(pages),
                    1 => once.unmap(pages.start..pages.end.min(pages.start + 600)),
                    2 => once.map_huge(pages.start, Level::L2),
                    _ => pages.for_each(|gfn| once.touch(gfn)),
                }
            }
            let mut reports = Vec::new();
            let mut states = Vec::new();
            for (table, size) in tables.iter().zip([0, 1, 3, 64]) {
                let mmu = once.copy();
                reports.push(if size == 0 {
                    let mut pass = AgePass::start_with(table, OPTIONS).unwrap();
                    while pass.step(&mmu, &mut (), 5000).next.is_some() {}
                    pass.finish(0)
                } else {
                    in_parts(table, &mmu, size, &mut rng)
                });
                table.check().unwrap();
                states.push(dump(table));
            }
            for (report, state) in reports.iter().zip(&states) {
                assert!(report.complete);
                // A part that ends in a huge leaf reads its entry once more than one walk does.
                let counts = |report: &PassReport| PassCounts { entries: 0, ..report.counts };
                let others = counts(&reports[0]);
                assert_eq!((counts(report), report.window), (others, reports[0].window));
                assert!(state == &states[0]);
            }
            let some = range(rng.pages(BLOCKS * BLOCK));
            let _ = once.ask(&mut (), AgeRequest::new(some, AgeMode::Clear));
        }
    }
}

#[test]
fn threads_share_a_pass_and_every_access_is_counted_once() {
    let mmu = FakeMmu::new(BLOCKS);
    mmu.map(0..BLOCKS * BLOCK);
    let table = table();
    let covered: u64 = table.ranges().map(GfnRange::len).sum();
    for round in 0..6 {
        let touched: Vec<u64> = (0..BLOCKS * BLOCK).filter(|gfn| gfn % 7 == round).collect();
        touched.iter().for_each(|&gfn| mmu.touch(gfn));
        let young =
            touched.iter().filter(|&&gfn| table.ranges().any(|r| r.contains(Gfn::new(gfn))));
        let young = to_u64(young.count());
        let plan = ScanPlan::new(&table, 2);
        let mut pass = AgePass::start(&table, AgeMode::Clear).unwrap();
        std::thread::scope(|scope| {
            let (send, receive) = mpsc::sync_channel(4);
            for _ in 0..3 {
                let (send, plan, mmu, request) = (send.clone(), &plan, &mmu, pass.request());
                scope.spawn(move || {
                    while let Some(part) = plan.claim() {
                        let mut harvest = Harvest::new(2).unwrap();
                        harvest.collect(mmu, &mut (), request.for_range(part));
                        send.send(harvest).unwrap();
                    }
                });
            }
            drop(send);
            receive.iter().for_each(|harvest| pass.absorb(&harvest));
        });
        let report = pass.finish(0);
        assert!(report.complete);
        assert_eq!((report.counts.mapped, report.counts.young), (covered, young));
        table.check().unwrap();
    }
}

#[test]
fn parts_cover_the_ranges_once_and_stay_inside_them() {
    let table = table();
    for size in [0, 1, 7, 100] {
        let plan = ScanPlan::new(&table, size);
        let parts: Vec<GfnRange> = core::iter::from_fn(|| plan.claim()).collect();
        let pages: u64 = parts.iter().map(|part| part.len()).sum();
        assert_eq!(pages, table.ranges().map(GfnRange::len).sum::<u64>());
        assert!(parts.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(parts.iter().all(|part| table.ranges().any(|range| range.covers(*part))));
    }
}

#[test]
fn a_harvest_takes_what_it_has_room_for_and_strangers_are_ignored() {
    let mmu = FakeMmu::new(BLOCKS);
    mmu.map(0..BLOCKS * BLOCK);
    let table = table();
    let mut harvest = Harvest::new(2).unwrap();
    let taken = harvest.collect(&mmu, &mut (), AgeRequest::new(range(10..3000), AgeMode::Clear));
    assert_eq!((taken, harvest.range()), (range(10..1024), range(10..1024)));
    assert_eq!(harvest.report().mapped, 1014);
    let mut pass = AgePass::start(&table, AgeMode::Clear).unwrap();
    pass.absorb(&harvest);
    let _ = harvest.collect(&mmu, &mut (), AgeRequest::new(range(9000..9200), AgeMode::Clear));
    pass.absorb(&harvest);
    let report = pass.finish(0);
    assert_eq!((report.complete, table.tracked_pages()), (false, 1014));
}
