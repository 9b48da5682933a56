//! The rules, one by one.

use lru_age::{
    AgeError, AgePass, AgeTable, GenWindow, Histogram, IdleBitmap, LookOptions, MAX_NR_GENS,
    MIN_NR_GENS, PassOptions, Promotion, Recheck, Seq, candidates, cold_blocks,
};
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::traits::{AgeMode, UpperBits};

use crate::fake::{BLOCK, FakeMmu, pass, pass_with, range, table_over};

fn passes(count: u64, table: &AgeTable, mmu: &FakeMmu) {
    for _ in 0..count {
        let _ = pass(table, mmu);
    }
}

fn seq_of(table: &AgeTable, gfn: u64) -> Option<u64> {
    table.page_age(Gfn::new(gfn)).map(|age| age.seq.get())
}

#[test]
fn the_first_access_marks_and_the_second_promotes() {
    let mmu = FakeMmu::new(1);
    let table = table_over(&mmu);
    mmu.map(0..512);
    assert_eq!(pass(&table, &mmu).counts.added, 512);
    assert_eq!(seq_of(&table, 9), Some(3));
    mmu.touch(9);
    let first = pass(&table, &mmu);
    assert_eq!((first.counts.second_chance, first.counts.promoted), (1, 0));
    assert_eq!(seq_of(&table, 9), Some(3));
    mmu.touch(9);
    let second = pass(&table, &mmu);
    assert_eq!((second.counts.second_chance, second.counts.promoted), (0, 1));
    assert_eq!((seq_of(&table, 9), seq_of(&table, 8)), (Some(5), Some(3)));
    // From then on every access promotes.
    mmu.touch(9);
    assert_eq!(pass(&table, &mmu).counts.promoted, 1);
}

#[test]
fn immediate_promotion_needs_one_access() {
    let mmu = FakeMmu::new(1);
    let table = table_over(&mmu);
    mmu.map(0..512);
    let _ = pass(&table, &mmu);
    mmu.touch(9);
    let options =
        PassOptions { promotion: Promotion::Immediate, ..PassOptions::new(AgeMode::Clear) };
    let report = pass_with(&table, &mmu, options);
    assert_eq!((report.counts.second_chance, report.counts.promoted), (0, 1));
    assert_eq!(seq_of(&table, 9), Some(4));
}

#[test]
fn the_access_that_faulted_a_page_in_is_its_first() {
    let mmu = FakeMmu::new(1);
    let table = table_over(&mmu);
    mmu.map(0..2);
    mmu.touch(0);
    let _ = pass(&table, &mmu);
    let referenced = [0, 1].map(|gfn| table.page_age(Gfn::new(gfn)).unwrap().referenced);
    assert_eq!(referenced, [true, false]);
    mmu.touch(0);
    mmu.touch(1);
    let counts = pass(&table, &mmu).counts;
    assert_eq!((counts.promoted, counts.second_chance), (1, 1));
}

#[test]
fn unmapped_pages_drop_out_and_return_as_new() {
    let mmu = FakeMmu::new(4);
    let table = table_over(&mmu);
    mmu.map(0..2048);
    (0..2048).for_each(|gfn| mmu.touch(gfn));
    let _ = pass(&table, &mmu);
    // Part of a table, a whole table that is still reported, and one that is left out.
    mmu.unmap(10..20);
    mmu.unmap(512..1536);
    let report = pass(&table, &mmu);
    assert_eq!((report.counts.unmapped_now, table.tracked_pages()), (1034, 1014));
    assert_eq!(seq_of(&table, 10), None);
    mmu.map(10..20);
    assert_eq!(pass(&table, &mmu).counts.added, 10);
    assert!(!table.page_age(Gfn::new(10)).unwrap().referenced);
}

#[test]
fn idle_tables_keep_their_pages_and_silence_means_unmapped() {
    let mut mmu = FakeMmu::new(4);
    mmu.skip_idle = true;
    let table = table_over(&mmu);
    mmu.map(0..1024);
    (0..1024).for_each(|gfn| mmu.touch(gfn));
    let _ = pass(&table, &mmu);
    mmu.touch(3);
    let options = PassOptions { upper: UpperBits::Use, ..PassOptions::new(AgeMode::Clear) };
    let counts = pass_with(&table, &mmu, options).counts;
    assert_eq!((counts.unmapped_now, counts.idle, counts.mapped), (0, 3 * 512, 512));
    assert_eq!(table.tracked_pages(), 1024);
    // The second table is gone: told as idle, it is not missed; a pass that looks finds out.
    mmu.unmap(512..1024);
    assert_eq!(pass_with(&table, &mmu, options).counts.unmapped_now, 0);
    assert_eq!(pass(&table, &mmu).counts.unmapped_now, 512);
}

#[test]
fn the_window_stays_within_its_limits() {
    for max_gens in [3, 4] {
        let mmu = FakeMmu::new(1);
        let window = GenWindow::ending_at(Seq::new(7), max_gens).unwrap();
        let mut table = AgeTable::with_window(window, 0);
        table.add_range(range(0..512)).unwrap();
        for n in 1..40_u64 {
            mmu.map(0..n * 7);
            mmu.touch(n);
            let report = pass(&table, &mmu);
            let gens = report.window.nr_gens();
            assert!((MIN_NR_GENS..=max_gens).contains(&gens), "{:?}", report.window);
            assert_eq!(report.window.max_seq().get(), 7 + n);
            assert_eq!(report.window, table.window());
            assert_eq!(table.tracked_pages(), n * 7);
        }
        assert_eq!(table.window().nr_gens(), max_gens);
        let total: u64 = table.window().seqs().map(|seq| table.pages_in(seq)).sum();
        assert_eq!(total, table.tracked_pages());
        assert_eq!(table.pages_in(Seq::new(1)) + table.pages_in(Seq::new(1 << 60)), 0);
    }
}

#[test]
fn folding_moves_the_oldest_generation_whole() {
    let mmu = FakeMmu::new(2);
    let table = table_over(&mmu);
    // Generation by generation: many old pages, then few.
    for (count, pages) in [(0, 0..700), (1, 700..705), (2, 705..710), (3, 710..715)] {
        mmu.map(pages);
        let report = pass(&table, &mmu);
        assert_eq!(report.folded, if count == 3 { 700 } else { 0 }, "pass {count}");
    }
    assert_eq!([0, 699, 700, 704].map(|gfn| seq_of(&table, gfn)), [Some(4); 4]);
    assert_eq!([705, 710].map(|gfn| seq_of(&table, gfn)), [Some(5), Some(6)]);
    let folded: u64 = (0..5).map(|_| pass(&table, &mmu).folded).sum();
    // Once all pages are of one generation, each pass folds it into an empty one.
    assert_eq!(folded, 705 + 710 + 715 * 3);
    assert_eq!(table.pages_in(table.window().min_seq()), 715);
}

#[test]
fn numbers_run_out_with_an_error_and_without_a_wrap() {
    let mmu = FakeMmu::new(1);
    let near = Seq::new(Seq::MAX.get() - 3);
    let mut table = AgeTable::with_window(GenWindow::ending_at(near, MAX_NR_GENS).unwrap(), 0);
    table.add_range(range(0..512)).unwrap();
    mmu.map(0..512);
    for n in 1..=3 {
        mmu.touch(n);
        assert_eq!(pass(&table, &mmu).window.max_seq().get(), near.get() + n);
    }
    let refused = AgePass::start(&table, AgeMode::Clear).map(|_| ());
    assert_eq!(refused, Err(AgeError::SeqExhausted { max_seq: Seq::MAX }));
    assert_eq!(table.tracked_pages(), 512);
    // The refusal left the table open to others, and readable.
    assert_eq!(table.edit().unwrap().forget(range(0..12)), 12);
    assert_eq!(candidates(&table).count(), 500);
}

#[test]
fn huge_leaves_are_one_page_until_they_are_split() {
    let mmu = FakeMmu::new(1024);
    let table = table_over(&mmu);
    mmu.map_huge(0, Level::L3);
    mmu.map_huge(512 * BLOCK, Level::L2);
    mmu.map(513 * BLOCK..513 * BLOCK + 5);
    mmu.touch(77);
    let report = pass(&table, &mmu);
    assert_eq!(report.counts.added, 513 * BLOCK + 5);
    let histogram = Histogram::of(&table, 0);
    let bin = histogram.bins().find(|bin| bin.pages() != 0).unwrap();
    let pages = [Level::L1, Level::L2, Level::L3].map(|level| bin.pages_at(level));
    assert_eq!(pages, [5, BLOCK, 512 * BLOCK]);
    assert_eq!(bin.generation(), bin.seq.generation());
    // One access is an access to all of it: the second one, here, for the 1 GiB leaf.
    mmu.touch(300 * BLOCK);
    mmu.touch(512 * BLOCK + 9);
    let counts = pass(&table, &mmu).counts;
    assert_eq!((counts.promoted, counts.second_chance), (512 * BLOCK, BLOCK));
    mmu.split(512 * BLOCK);
    mmu.touch(512 * BLOCK + 1);
    assert_eq!(pass(&table, &mmu).counts.promoted, 1);
    let ages = [0, 1].map(|page| table.page_age(Gfn::new(512 * BLOCK + page)).unwrap());
    assert_eq!(ages.map(|age| (age.level, age.referenced)), [(Level::L1, true); 2]);
    assert!(ages[0].seq < ages[1].seq);
    // Collapsed again: as young as its youngest page.
    mmu.map_huge(512 * BLOCK, Level::L2);
    let _ = pass(&table, &mmu);
    assert_eq!(table.page_age(Gfn::new(512 * BLOCK)).unwrap().seq, ages[1].seq);
}

#[test]
fn candidates_come_oldest_first_and_never_from_active_generations() {
    let mmu = FakeMmu::new(3);
    let table = table_over(&mmu);
    mmu.map(0..1536);
    (0..1536).for_each(|gfn| mmu.touch(gfn));
    let _ = pass(&table, &mmu);
    assert_eq!(candidates(&table).count(), 0, "everything is active");
    for hot in [0..1500, 3..1400, 600..700] {
        hot.for_each(|gfn| mmu.touch(gfn));
        let _ = pass(&table, &mmu);
    }
    // Generations: 3 untouched, 4 the next colder, then 5 and 6, which with 7 open is one active.
    let listed: Vec<(u64, u64)> =
        candidates(&table).map(|found| (found.seq.get(), found.range.start.get())).collect();
    let mut expected: Vec<(u64, u64)> = (1500..1536).map(|gfn| (4, gfn)).collect();
    expected.extend((0..3).chain(1400..1500).map(|gfn| (4, gfn)));
    expected.sort_unstable();
    expected.extend((3..600).chain(700..1400).map(|gfn| (5, gfn)));
    assert_eq!(listed, expected);
    assert!(candidates(&table).all(|found| !table.window().is_active(found.seq)));
    // Block 1 holds active pages; of the others, the one with the older youngest page comes first.
    let blocks: Vec<u64> = cold_blocks(&table).map(|b| b.range.start.get() / BLOCK).collect();
    assert_eq!(blocks, [0, 2]);
}

#[test]
fn a_listing_ends_when_the_generations_move() {
    let mmu = FakeMmu::new(2);
    let table = table_over(&mmu);
    mmu.map(0..1024);
    passes(3, &table, &mmu);
    let (mut pages, mut blocks) = (candidates(&table), cold_blocks(&table));
    assert!(pages.next().is_some() && blocks.next().is_some());
    passes(8, &table, &mmu);
    // What was already read may still be handed out: 63 pages.
    assert!(pages.count() < 64);
    assert_eq!(blocks.next(), None);
}

#[test]
fn a_listing_goes_on_beside_edits() {
    let mmu = FakeMmu::new(3);
    let table = table_over(&mmu);
    mmu.map(0..1536);
    passes(3, &table, &mmu);
    let mut pages = candidates(&table);
    assert_eq!(pages.by_ref().take(64 + 64).count(), 128);
    // The rest of the block goes away; the next one is listed from its first page.
    let _ = table.edit().unwrap().forget(range(0..512));
    let _ = table.edit().unwrap().touch(range(600..700), Promotion::Immediate);
    let listed: Vec<u64> = pages.map(|found| found.range.start.get()).collect();
    assert_eq!(listed, (512..600).chain(700..1536).collect::<Vec<_>>());
}

#[test]
fn a_page_used_at_the_last_moment_survives() {
    let mmu = FakeMmu::new(2);
    let table = table_over(&mmu);
    mmu.map(0..8);
    mmu.map_huge(512, Level::L2);
    passes(3, &table, &mmu);
    mmu.touch(4);
    mmu.touch(900);
    mmu.unmap(6..7);
    let checked: Vec<Recheck> = candidates(&table).map(|c| c.recheck(&mmu, &mut ())).collect();
    let mut expected = vec![Recheck::Cold; 9];
    (expected[4], expected[8]) = (Recheck::Young, Recheck::Young);
    expected[6] = Recheck::Unmapped;
    assert_eq!(checked, expected);
    // Testing wrote nothing.
    assert!(mmu.leaf(4).unwrap().young && mmu.leaf(900).unwrap().young);
    let mut editor = table.edit().unwrap();
    assert_eq!(editor.touch(range(4..5), Promotion::Immediate).promoted, 1);
    assert_eq!(editor.forget(range(6..7)), 1);
    drop(editor);
    assert_eq!(candidates(&table).count(), 7);
}

#[test]
fn ranges_are_checked_and_refusals_change_nothing() {
    let mut table = AgeTable::new(0);
    let (low, high) = (range(100..612), range(1000..1001));
    table.add_range(high).unwrap();
    table.add_range(low).unwrap();
    let before = table.memory_bytes();
    let empty = GfnRange::new(Gfn::new(5), Gfn::new(5));
    assert_eq!(table.add_range(empty), Err(AgeError::EmptyRange { range: empty }));
    for given in [range(0..101), range(611..612), range(0..5000)] {
        let refused = Err(AgeError::Overlap { range: given, existing: low });
        assert_eq!(table.add_range(given), refused);
    }
    let past = GfnRange::new(Gfn::new(1 << 51), Gfn::new((1 << 52) + 1));
    assert_eq!(table.add_range(past), Err(AgeError::OutOfAddressSpace { range: past }));
    for given in [range(100..611), range(0..1)] {
        assert_eq!(table.remove_range(given), Err(AgeError::UnknownRange { range: given }));
    }
    assert_eq!(table.ranges().collect::<Vec<_>>(), [low, high]);
    assert_eq!(table.memory_bytes(), before);
    table.add_range(range(612..1000)).unwrap();
    table.check().unwrap();
}

#[test]
fn no_memory_is_an_error_that_names_the_size() {
    let mut table = AgeTable::new(0);
    let range = GfnRange::new(Gfn::new(0), GfnRange::ALL.end);
    let error = table.add_range(range).unwrap_err();
    let AgeError::OutOfMemory { range: given, bytes } = error else { panic!("{error}") };
    assert_eq!(given, range);
    assert!(bytes > 1 << 51, "{bytes}");
    assert!(error.to_string().contains(&bytes.to_string()), "{error}");
    assert_eq!((table.ranges().count(), table.tracked_pages()), (0, 0));
}

#[test]
fn memory_is_four_and_a_seventh_bits_per_page() {
    let mut table = AgeTable::new(0);
    let empty = table.memory_bytes();
    table.add_range(range(0..1 << 20)).unwrap();
    let bytes = table.memory_bytes() - empty;
    assert!(bytes * 8 * 1000 < (1 << 20) * 4150, "{bytes} bytes for 2^20 pages");
    table.remove_range(range(0..1 << 20)).unwrap();
    assert!(table.memory_bytes() < empty + 2000);
}

#[test]
fn removing_a_range_takes_its_pages_along() {
    let mmu = FakeMmu::new(4);
    let mut table = AgeTable::new(0);
    let parts = [range(0..700), range(700..1100), range(1100..2048)];
    parts.iter().for_each(|&part| table.add_range(part).unwrap());
    mmu.map(0..2048);
    mmu.map_huge(1536, Level::L2);
    let _ = pass(&table, &mmu);
    assert_eq!(table.tracked_pages(), 2048);
    table.remove_range(parts[2]).unwrap();
    assert_eq!((table.tracked_pages(), seq_of(&table, 1536)), (1100, None));
    table.check().unwrap();
    table.remove_range(parts[0]).unwrap();
    table.add_range(parts[0]).unwrap();
    assert_eq!((table.tracked_pages(), seq_of(&table, 0)), (400, None));
}

#[test]
fn one_pass_at_a_time() {
    let mmu = FakeMmu::new(2);
    let table = table_over(&mmu);
    mmu.map(0..1024);
    let test_only = AgePass::start(&table, AgeMode::Test).map(|_| ());
    assert_eq!(test_only, Err(AgeError::TestOnly));
    // Nor can a candidate be checked without clearing.
    assert_eq!(LookOptions::new(AgeMode::Test), Err(AgeError::TestOnly));
    assert_eq!(LookOptions::new(AgeMode::Clear), Ok(LookOptions::DEFAULT));
    let flushing = LookOptions::new(AgeMode::ClearFlush).unwrap();
    let flushing = flushing.with_promotion(Promotion::Immediate);
    assert_eq!(flushing.mode(), AgeMode::ClearFlush);
    assert_eq!(flushing.promotion(), Promotion::Immediate);
    let mut first = AgePass::start(&table, AgeMode::Clear).unwrap();
    assert_eq!(AgePass::start(&table, AgeMode::Clear).map(|_| ()), Err(AgeError::Busy));
    assert_eq!(table.edit().map(|_| ()), Err(AgeError::Busy));
    assert_eq!(table.check(), Err(AgeError::Busy));
    assert_eq!(first.step(&mmu, &mut (), 1).percent, 50);
    let paused = first.pause();
    // Another pass overtakes the paused one.
    let _ = pass(&table, &mmu);
    let late = paused.resume(&table).map(|_| ());
    let superseded = AgeError::Superseded { started: Seq::new(3), max_seq: Seq::new(4) };
    assert_eq!(late, Err(superseded));
    // A pass that is dropped lets go and moves nothing.
    let second = AgePass::start(&table, AgeMode::Clear).unwrap();
    drop(second);
    assert_eq!(table.window().max_seq(), Seq::new(4));
}

#[test]
fn a_pass_survives_ranges_that_come_and_go_while_it_is_paused() {
    let mmu = FakeMmu::new(4);
    let mut table = AgeTable::new(0);
    table.add_range(range(0..512)).unwrap();
    table.add_range(range(1024..1536)).unwrap();
    mmu.map(0..2048);
    let mut pass = AgePass::start(&table, AgeMode::Clear).unwrap();
    assert_eq!(pass.step(&mmu, &mut (), 1).next, Some(Gfn::new(1024)));
    let paused = pass.pause();
    table.remove_range(range(1024..1536)).unwrap();
    table.add_range(range(512..700)).unwrap();
    let mut pass = paused.resume(&table).unwrap();
    let progress = pass.step(&mmu, &mut (), u64::MAX);
    assert_eq!((progress.next, progress.percent), (None, 100));
    assert_eq!(pass.editor().forget(range(690..2048)), 10);
    let report = pass.finish(1);
    assert!(report.complete);
    assert_eq!((report.counts.added, table.tracked_pages()), (700, 690));
    table.check().unwrap();
}

#[test]
fn a_pass_that_resumes_inside_a_table_leaves_the_pages_before_alone() {
    let mmu = FakeMmu::new(3);
    let mut table = AgeTable::new(0);
    table.add_range(range(0..700)).unwrap();
    mmu.map(0..1400);
    let mut early = AgePass::start(&table, AgeMode::Clear).unwrap();
    assert_eq!(early.step(&mmu, &mut (), u64::MAX).next, None);
    let early = early.pause();
    table.remove_range(range(0..700)).unwrap();
    table.add_range(range(0..1400)).unwrap();
    let mut whole = AgePass::start(&table, AgeMode::Clear).unwrap();
    assert_eq!(whole.step(&mmu, &mut (), u64::MAX).counts.added, 1400);
    drop(whole);
    let mut early = early.resume(&table).unwrap();
    assert_eq!(early.progress().next, Some(Gfn::new(700)));
    let counts = early.step(&mmu, &mut (), u64::MAX).counts;
    assert_eq!((counts.added, counts.unmapped_now), (700, 0));
    assert_eq!(table.tracked_pages(), 1400);
}

#[test]
fn a_pass_may_be_forced_and_says_so() {
    let mmu = FakeMmu::new(2);
    let table = table_over(&mmu);
    mmu.map(0..1024);
    let mut pass = AgePass::start(&table, AgeMode::Clear).unwrap();
    let _ = pass.step(&mmu, &mut (), 1);
    let report = pass.finish(1);
    assert!(!report.complete);
    assert_eq!((report.window.max_seq().get(), table.tracked_pages()), (4, 512));
    // Nothing to look at is everything looked at.
    let nothing = AgeTable::new(0);
    assert!(AgePass::start(&nothing, AgeMode::Clear).unwrap().finish(1).complete);
}

/// One accessed bit for 1 GiB: whoever clears it by a question about a part tells all parts.
#[test]
fn parts_of_a_leaf_of_1_gib_are_as_young_as_each_other() {
    let mmu = FakeMmu::new(513);
    let table = table_over(&mmu);
    mmu.map_huge(0, Level::L3);
    mmu.map(512 * BLOCK..513 * BLOCK);
    mmu.touch(3);
    passes(4, &table, &mmu);
    let max = table.window().max_seq();
    let young = || table.pages_in(max);
    let victim = candidates(&table).nth(7).unwrap();
    assert_eq!((victim.level, victim.range.len()), (Level::L3, BLOCK));
    mmu.touch(100 * BLOCK);
    let look = {
        let mut editor = table.edit().unwrap();
        editor.look_around(&victim, &mmu, &mut (), LookOptions::DEFAULT)
    };
    assert_eq!((look.verdict, look.counts.promoted), (Recheck::Young, 512 * BLOCK));
    assert_eq!(young(), 512 * BLOCK);
    table.check().unwrap();
    // The same by a consumer that asks about one page.
    passes(3, &table, &mmu);
    let max = table.window().max_seq();
    mmu.touch(100 * BLOCK);
    let mut idle = IdleBitmap::new(table.ranges()).unwrap();
    let mut editor = table.edit().unwrap();
    idle.mark(Gfn::new(64), &[1], &mmu, &mut (), &mut editor).unwrap();
    drop(editor);
    assert_eq!(table.pages_in(max), 512 * BLOCK);
    table.check().unwrap();
}
