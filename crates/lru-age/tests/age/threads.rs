//! Readers beside a pass: every answer is one that was true, and nothing is listed that is hot.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;

use lru_age::{AgePass, AgeTable, Histogram, PassOptions, candidates, cold_blocks};
use mmu_core::addr::{Gfn, Level};
use mmu_core::traits::AgeMode;

use crate::fake::{BLOCK, FakeMmu, Rng, range};

const BLOCKS: u64 = 16;
const PAGES: u64 = BLOCKS * BLOCK;
/// Used before every pass, so never inactive and never untracked. In a table that stays one.
const HOT: u64 = 100;
/// The same in a block that is split and collapsed all the time.
const RESHAPED: u64 = 9 * BLOCK + 7;
/// Mapped, never used: only grows older.
const COLD: u64 = 4 * BLOCK + 3;

fn whole_pass(table: &AgeTable, mmu: &FakeMmu, now_ms: u64) {
    mmu.touch(HOT);
    mmu.touch(RESHAPED);
    let options = PassOptions::new(AgeMode::Clear);
    let mut pass = AgePass::start_with(table, options).unwrap();
    while pass.step(mmu, &mut (), 700).next.is_some() {}
    let _ = pass.finish(now_ms);
}

/// Counts how often it looked.
fn read(table: &AgeTable, done: &AtomicBool, looks: &AtomicU64) {
    let (mut last_cold, mut last_max) = (0, 0);
    while !done.load(Ordering::Acquire) {
        for hot in [HOT, RESHAPED] {
            // A page used before every pass is at most one pass behind the window read later.
            let before = table.window();
            let age = table.page_age(Gfn::new(hot)).expect("a hot page stays tracked");
            assert!(age.seq.get() + 1 >= before.max_seq().get(), "{hot}: {age:?} in {before:?}");
            assert!(age.referenced);
        }
        let cold = table.page_age(Gfn::new(COLD)).expect("a cold page stays tracked").seq.get();
        assert!(cold >= last_cold, "the window only moves up");
        last_cold = cold;
        let listed = candidates(table).find(|found| found.range.contains(Gfn::new(HOT)));
        assert_eq!(listed, None);
        let blocks = cold_blocks(table).find(|found| found.range.contains(Gfn::new(RESHAPED)));
        assert_eq!(blocks, None);
        let histogram = Histogram::of(table, u64::MAX);
        assert!(histogram.bins().count() >= 2);
        assert!(histogram.window().max_seq().get() >= last_max);
        last_max = histogram.window().max_seq().get();
        looks.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn readers_beside_a_pass_see_only_what_was_true() {
    let mmu = FakeMmu::new(BLOCKS);
    let mut table = AgeTable::new(0);
    table.add_range(range(0..PAGES)).unwrap();
    mmu.map(0..PAGES);
    // Twice, so that the hot pages are promoted from now on.
    (0..3).for_each(|now_ms| whole_pass(&table, &mmu, now_ms));
    let done = AtomicBool::new(false);
    let looks = [AtomicU64::new(0), AtomicU64::new(0)];
    let (table, done) = (&table, &done);
    std::thread::scope(|scope| {
        let readers = looks.each_ref().map(|looks| scope.spawn(move || read(table, done, looks)));
        let mut rng = Rng(7);
        println!("seed 7");
        let mut now_ms = 3;
        // Until each reader had its share of time; one that panicked will not get any more.
        let is_waiting = |(looks, reader): (&AtomicU64, &ScopedJoinHandle<'_, ()>)| {
            looks.load(Ordering::Relaxed) < 500 && !reader.is_finished()
        };
        while now_ms < 5000 || looks.iter().zip(&readers).any(is_waiting) {
            now_ms += 1;
            for _ in 0..20 {
                mmu.touch(rng.below(4 * BLOCK));
            }
            match rng.below(4) {
                0 => mmu.map_huge(RESHAPED, Level::L2),
                1 => mmu.split(RESHAPED),
                2 => mmu.unmap(10 * BLOCK..10 * BLOCK + rng.below(2 * BLOCK)),
                _ => mmu.map(10 * BLOCK..12 * BLOCK),
            }
            whole_pass(table, &mmu, now_ms);
        }
        done.store(true, Ordering::Release);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    table.check().unwrap();
}
