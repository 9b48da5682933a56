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
use lru_age::{
    AgePass, AgeTable, EvictOptions, EvictReport, Kind, Plain, Promotion, Refaults, ScanPlan, Seq,
    Take, Tier, candidates, cold_blocks,
};
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
        let asked = |gfn| u64::from(request.range.contains(gfn));
        (present[0], young[0]) = (asked(HOT) | asked(COLD) << 1, asked(HOT));
        let mapped = u64::from(present[0].count_ones());
        let report = AgeReport { mapped, young: young[0], ..AgeReport::empty(request.range.end) };
        match self {
            Self::Pages => sink.table(HOT, &present, &young),
            Self::Huge => sink.huge(HOT, Level::L2, true),
        }
        report
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

/// Evict what the MMU says is cold, if nobody else edits.
fn evict(table: &AgeTable) -> Option<EvictReport> {
    let mut editor = table.edit().ok()?;
    let options = EvictOptions::new(2);
    let take = |victim: &lru_age::Candidate| {
        assert_eq!(victim.range.start, COLD, "the hot page is never given away");
        Take::Evicted
    };
    Some(editor.evict(&Shape::Pages, &mut (), &mut Plain::default(), &options, take))
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

/// T12: evicting against promoting. The page is gone or young, never both and never lost, and who
/// came second found the table whole.
#[test]
fn a_page_is_evicted_or_promoted() {
    model("age_evict_against_promote", Some(3), || {
        let table = table(4);
        let other = Arc::clone(&table);
        let other = thread::spawn(move || {
            let page = GfnRange::from_len(COLD, 1);
            other.edit().map(|mut editor| editor.touch(page, Promotion::Immediate).promoted)
        });
        let report = evict(&table);
        let promoted = other.join().unwrap();
        assert!(report.is_some() || promoted.is_ok());
        let gone = report.map_or(0, |report| report.evicted);
        let kept = table.page_age(COLD).is_some();
        assert_eq!((gone == 0, promoted == Ok(1)), (kept, kept && promoted.is_ok()));
        assert!(table.page_age(HOT).is_some());
        table.check().unwrap();
    });
}

/// T12: advancing against evicting. Both need the editor; whoever has it works on a window that
/// stands still.
#[test]
fn generations_advance_or_pages_go() {
    model("age_advance_against_evict", Some(2), || {
        let table = table(4);
        let before = table.window().max_seq();
        let other = Arc::clone(&table);
        let other = thread::spawn(move || evict(&other));
        let pass = AgePass::start(&table, AgeMode::Clear).ok().map(|mut pass| {
            let _ = pass.step(&Shape::Pages, &mut (), 1);
            pass.finish(9).window.max_seq()
        });
        let report = other.join().unwrap();
        assert!(report.is_some() || pass.is_some());
        let steps = u64::from(pass.is_some());
        assert_eq!(table.window().max_seq(), Seq::new(before.get() + steps));
        assert!(report.is_none_or(|report| report.evicted == 1));
        assert!(table.page_age(HOT).is_some());
        table.check().unwrap();
    });
}

/// Tag `age-refault`: of two faults on a page one learns that it was evicted.
#[test]
fn an_entry_of_an_evicted_page_is_taken_once() {
    model("age_refault_against_refault", None, || {
        let refaults = Arc::new(Refaults::new(8).unwrap());
        refaults.evicted(HOT, Seq::new(4), Kind::Anon, Tier::Used);
        let other = Arc::clone(&refaults);
        let other = thread::spawn(move || other.refault(HOT, Seq::new(5)).is_some());
        let mine = refaults.refault(HOT, Seq::new(5)).is_some();
        assert!(mine != other.join().unwrap(), "one of them");
        assert_eq!(refaults.refault(HOT, Seq::new(5)), None);
    });
}

/// Tag `age-refault`: a page that is evicted again while its last return is still looked up.
#[test]
fn an_eviction_beside_a_refault_is_remembered_or_taken() {
    model("age_evicted_against_refault", None, || {
        let refaults = Arc::new(Refaults::new(8).unwrap());
        refaults.evicted(HOT, Seq::new(4), Kind::Anon, Tier::Used);
        let other = Arc::clone(&refaults);
        let other = thread::spawn(move || other.refault(HOT, Seq::new(5)));
        refaults.evicted(HOT, Seq::new(5), Kind::Anon, Tier::Used);
        let first = other.join().unwrap();
        let second = refaults.refault(HOT, Seq::new(5));
        // The old entry, the new one, or both were taken; the new one was never lost.
        assert!(first.is_some() || second.is_some());
        let new = [first, second].into_iter().flatten().filter(|refault| refault.generations == 0);
        assert_eq!(new.count(), 1, "{first:?} {second:?}");
    });
}

/// Tag `age-plan`: every part is claimed by one thread.
#[test]
fn parts_of_a_pass_are_claimed_once() {
    model("age_claim_against_claim", None, || {
        let mut table = AgeTable::new(0);
        table.add_range(GfnRange::from_len(HOT, 6)).unwrap();
        let table: &'static AgeTable = Box::leak(Box::new(table));
        let plan: Arc<ScanPlan<'static>> = Arc::new(ScanPlan::new(table, 1));
        let other = Arc::clone(&plan);
        let claim = |plan: &ScanPlan<'_>| -> Vec<GfnRange> {
            core::iter::from_fn(|| plan.claim()).collect()
        };
        let other = thread::spawn(move || claim(&other));
        let mut all = claim(&plan);
        all.extend(other.join().unwrap());
        all.sort_by_key(|part| part.start);
        let expected = [0, 2, 4].map(|first| GfnRange::from_len(Gfn::new(first), 2));
        assert_eq!(all, expected);
    });
}
