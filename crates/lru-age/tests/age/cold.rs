//! Cold ranges against a page-by-page reading of the table.

use lru_age::{AgeTable, Seq, cold_ranges};
use mmu_core::addr::{Gfn, Level};

use crate::fake::{BLOCK, FakeMmu, Rng, pass, range};

/// Runs of pages that are old enough, the slow way.
fn expected(table: &AgeTable, until: Seq, min_pages: u64) -> Vec<(u64, u64)> {
    let window = table.window();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for part in table.ranges() {
        let mut open = None;
        for gfn in part.start.get()..=part.end.get() {
            let age = table.page_age(Gfn::new(gfn)).filter(|_| gfn < part.end.get());
            let cold = age.is_some_and(|age| age.seq <= until && !window.is_active(age.seq));
            match (open, cold) {
                (None, true) => open = Some(gfn),
                (Some(start), false) => {
                    runs.push((start, gfn));
                    open = None;
                }
                _ => {}
            }
        }
    }
    runs.retain(|(start, end)| end - start >= min_pages);
    runs
}

#[test]
fn cold_ranges_are_the_longest_runs_of_old_pages() {
    let mut listed = 0;
    for seed in 0..30 {
        println!("seed {seed}");
        let mut rng = Rng(seed);
        let mmu = FakeMmu::new(8);
        let mut table = AgeTable::new(0);
        // Two ranges that touch, and one apart that begins and ends inside blocks.
        for part in [0..1024, 1024..2048, 2100..4000] {
            table.add_range(range(part)).unwrap();
        }
        for _ in 0..8 {
            for _ in 0..6 {
                let pages = rng.pages(8 * BLOCK);
                match rng.below(6) {
                    0 | 1 => mmu.map(pages),
                    2 => mmu.map_huge(pages.start, Level::L2),
                    3 => mmu.unmap(pages.start..pages.end.min(pages.start + 90)),
                    _ => pages.for_each(|gfn| mmu.touch(gfn)),
                }
            }
            let _ = pass(&table, &mmu);
            for until in table.window().seqs() {
                for min_pages in [0, 1, 64, 600] {
                    let found: Vec<(u64, u64)> = cold_ranges(&table, until, min_pages)
                        .map(|run| (run.start.get(), run.end.get()))
                        .collect();
                    assert_eq!(found, expected(&table, until, min_pages), "{until} {min_pages}");
                    listed += found.len();
                }
            }
        }
    }
    assert!(listed > 3000, "{listed}");
}

#[test]
fn a_list_of_cold_ranges_ends_when_the_generations_move() {
    let mmu = FakeMmu::new(4);
    let mut table = AgeTable::new(0);
    table.add_range(range(0..4 * BLOCK)).unwrap();
    for gfn in (0..4 * BLOCK).step_by(2) {
        mmu.map(gfn..gfn + 1);
    }
    (0..4).for_each(|_| {
        let _ = pass(&table, &mmu);
    });
    let mut ranges = cold_ranges(&table, table.window().min_seq(), 1);
    assert_eq!(ranges.next(), Some(range(0..1)));
    let _ = pass(&table, &mmu);
    assert_eq!(ranges.next(), None);
}
