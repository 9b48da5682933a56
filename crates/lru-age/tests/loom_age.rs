//! Readers beside the editor, every interleaving. Runs under `--cfg loom`
//! only, where a block has two pages.
//!
//! The reader is always the spawned thread: loom remembers one last access per atomic, so a writer
//! that runs second and loads before it stores would hide the race from it.
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc as StdArc;

use loom::sync::Arc;
use loom::thread;
use lru_age::{AgePass, AgeTable, Promotion, candidates, cold_blocks};
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::traits::{AgeAbilities, AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink};

const HOT: Gfn = Gfn::new(0);
const COLD: Gfn = Gfn::new(1);

/// Two pages: in a table with the first one young, or under one young leaf.
#[derive(Clone, Copy)]
enum Shape {
    Pages,
    Huge,
}

impl AgeRange for Shape {
    type Reader = ();

    fn age<S: AgeSink>(&self, _: &mut (), request: AgeRequest, sink: &mut S) -> AgeReport {
        let (mut present, mut young) = ([0; 8], [0; 8]);
        (present[0], young[0]) = (0b11, 0b01);
        match self {
            Self::Pages => sink.table(HOT, &present, &young),
            Self::Huge => sink.huge(HOT, Level::L2, true),
        }
        AgeReport { mapped: 2, young: 1, ..AgeReport::empty(request.range.end) }
    }

    fn abilities(&self) -> AgeAbilities {
        AgeAbilities::FAST
    }

    fn flush_aged(&self, _: &mut (), _: GfnRange) {}
}

fn look(table: &AgeTable, shape: Shape) -> AgePass<'_> {
    let mut pass = AgePass::start(table, AgeMode::Clear).unwrap();
    assert_eq!(pass.step(&shape, &mut (), 1).next, None);
    pass
}

/// Both pages tracked, the hot one referenced, after `passes` passes.
fn table(passes: u64) -> Arc<AgeTable> {
    let mut table = AgeTable::new(0);
    table.add_range(GfnRange::from_len(HOT, 2)).unwrap();
    for now_ms in 0..passes {
        let _ = look(&table, Shape::Pages).finish(now_ms);
    }
    Arc::new(table)
}

fn model(name: &str, bound: Option<usize>, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = bound;
    builder.max_branches = 20_000;
    let executions = StdArc::new(AtomicU64::new(0));
    let counter = StdArc::clone(&executions);
    builder.check(move || {
        counter.fetch_add(1, Ordering::Relaxed);
        body();
    });
    let executions = executions.load(Ordering::Relaxed);
    let bound = bound.map_or_else(|| "none".to_owned(), |bound| bound.to_string());
    println!("MODEL {name} executions={executions} bound={bound}");
    assert!(executions > 5, "the model explores something");
}

/// Tags `age-summary` and `age-word`: a page stays tracked while its block becomes huge, and while
/// it is split again.
#[test]
fn a_page_stays_tracked_while_its_block_is_reshaped() {
    let cases = [
        ("age_collapse_against_reader", [Shape::Pages, Shape::Huge]),
        ("age_split_against_reader", [Shape::Huge, Shape::Pages]),
    ];
    for (name, shapes) in cases {
        model(name, None, move || {
            let table = table(1);
            let [before, during] = shapes;
            drop(look(&table, before));
            let reader = Arc::clone(&table);
            let reader = thread::spawn(move || {
                let age = reader.page_age(HOT).unwrap();
                assert!(age.referenced);
            });
            drop(look(&table, during));
            reader.join().unwrap();
        });
    }
}

/// Tags `age-window`, `age-word` and `age-totals`: a label that a fold freed and the next
/// generation took is never read with its old meaning.
#[test]
fn a_hot_page_never_looks_old_while_labels_are_reused() {
    model("age_label_reuse_against_reader", Some(2), || {
        // Four generations exist, so the next pass folds and the one after reuses the label.
        let table = table(4);
        let reader = Arc::clone(&table);
        let reader = thread::spawn(move || {
            let window = reader.window();
            let age = reader.page_age(HOT).unwrap();
            assert!(age.seq.get() + 1 >= window.max_seq().get(), "{age:?} in {window:?}");
            let found = candidates(&reader).next();
            assert!(found.is_none_or(|found| found.range.start == COLD), "{found:?}");
            assert_eq!(cold_blocks(&reader).next(), None);
        });
        let _ = look(&table, Shape::Pages).finish(9);
        drop(look(&table, Shape::Pages));
        reader.join().unwrap();
    });
}

/// Tag `age-editor`: two who want to edit never do so at once, and neither loses a change.
#[test]
fn editors_hand_the_table_over_whole() {
    model("age_two_editors", None, || {
        let table = table(1);
        let other = Arc::clone(&table);
        let other = thread::spawn(move || {
            let both = GfnRange::from_len(HOT, 2);
            other.edit().map(|mut editor| editor.touch(both, Promotion::SecondChance).young)
        });
        let mine = table.edit().map(|mut editor| editor.forget(GfnRange::from_len(COLD, 1)));
        let theirs = other.join().unwrap();
        assert!(mine.is_ok() || theirs.is_ok());
        table.check().unwrap();
        assert_eq!(table.tracked_pages(), if mine.is_ok() { 1 } else { 2 });
    });
}
