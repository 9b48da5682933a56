//! Every slicing of a pass gives the same result (KVM row 5.23).

use lru_age::{AgePass, AgeTable, Histogram, candidates};
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};

use crate::fake::{BLOCK, FakeMmu, Rng, range};

const BLOCKS: u64 = 9;
const PAGES: u64 = BLOCKS * BLOCK;

/// Everything that can be asked of a table.
fn dump(table: &AgeTable) -> impl PartialEq + core::fmt::Debug {
    let pages: Vec<_> = (0..PAGES).map(|gfn| table.page_age(Gfn::new(gfn))).collect();
    let order: Vec<_> = candidates(table).collect();
    (table.window(), pages, order, Histogram::of(table, 1 << 40))
}

#[test]
fn every_slicing_of_a_pass_gives_the_same_result() {
    for seed in 1000..1020 {
        println!("seed {seed}");
        let mut rng = Rng(seed);
        let layout: [GfnRange; 3] = [range(0..700), range(700..2048), range(2300..PAGES)];
        let once = FakeMmu::new(BLOCKS);
        let mut tables = [(); 4].map(|()| AgeTable::new(0));
        tables.iter_mut().for_each(|table| {
            layout.iter().for_each(|&part| table.add_range(part).unwrap());
        });
        for now_ms in 1..12 {
            for _ in 0..6 {
                let pages = rng.pages(PAGES);
                match rng.below(5) {
                    0 => once.map(pages),
                    1 => once.unmap(pages.start..pages.end.min(pages.start + 100)),
                    2 => once.map_huge(pages.start, Level::L2),
                    _ => pages.for_each(|gfn| once.touch(gfn)),
                }
            }
            let mut reports = Vec::new();
            for (table, budget) in tables.iter().zip([u64::MAX, 1, 513, 1 + rng.below(3000)]) {
                let mmu = once.copy();
                let mut pass = AgePass::start(table, AgeMode::ClearFlush).unwrap();
                let mut steps = 0_u64;
                while pass.step(&mmu, &mut (), budget).next.is_some() {
                    steps += 1;
                    assert!(steps < PAGES, "a pass ends");
                }
                table.edit().unwrap_err();
                reports.push(pass.finish(now_ms));
            }
            for (table, report) in tables.iter().zip(&reports) {
                assert_eq!((report, dump(table)), (&reports[0], dump(&tables[0])));
                table.check().unwrap();
            }
            // The copies had their bits cleared; the original keeps some of them.
            let cleared = range(rng.pages(PAGES));
            let request = AgeRequest::new(cleared, AgeMode::Clear);
            let _ = once.age(&mut (), request, &mut CountOnly);
        }
    }
}
