//! The eviction driver (KVM rows 5.31 to 5.33): who goes, who stays, and that hot pages do.

use std::collections::{BTreeSet, VecDeque};

use lru_age::{
    AgeTable, Candidate, EvictEnd, EvictOptions, EvictReport, Kind, PassOptions, PidPolicy, Plain,
    Refaults, Seq, Swappiness, Take, Tier, Unit,
};
use mmu_core::addr::{Gfn, GfnRange, Level, to_index, to_u64};
use mmu_core::traits::AgeMode;

use crate::fake::{BLOCK, FakeMmu, Rng, pass, pass_with, range, table_over};

/// Evict with no preference; every victim is unmapped. Returns the report and the gfns.
fn evict(table: &AgeTable, mmu: &FakeMmu, options: EvictOptions) -> (EvictReport, Vec<u64>) {
    let mut gone = Vec::new();
    let report = table
        .edit()
        .unwrap()
        .evict(mmu, &mut (), &mut Plain::default(), &options, |v| take(mmu, v, &mut gone));
    table.check().unwrap();
    (report, gone)
}

fn take(mmu: &FakeMmu, victim: &Candidate, gone: &mut Vec<u64>) -> Take {
    let pages = victim.range.start.get()..victim.range.end.get();
    assert!(pages.clone().all(|gfn| mmu.leaf(gfn).is_none_or(|leaf| !leaf.young)), "{victim:?}");
    gone.extend(pages.clone().filter(|&gfn| mmu.leaf(gfn).is_some()));
    mmu.unmap(pages);
    Take::Evicted
}

/// One block per generation: 0 is the oldest (two of them, folded), then 1, ...
fn generations() -> (FakeMmu, AgeTable) {
    let mmu = FakeMmu::new(5);
    let table = table_over(&mmu);
    for block in 0..5 {
        mmu.map(block * BLOCK..(block + 1) * BLOCK);
        let mut pass = lru_age::AgePass::start(&table, AgeMode::Clear).unwrap();
        while pass.step(&mmu, &mut (), 4096).next.is_some() {}
        let _ = pass.finish((block + 1) * 1000);
    }
    (mmu, table)
}

#[test]
fn the_oldest_go_first_and_no_more_than_asked_for() {
    let (mmu, table) = generations();
    let tracked = table.tracked_pages();
    let (report, gone) = evict(&table, &mmu, EvictOptions::new(700));
    assert_eq!((report.evicted, report.end, report.checks), (700, EvictEnd::Enough, 700));
    assert_eq!(gone, (0..700).collect::<Vec<_>>());
    assert_eq!(table.tracked_pages(), tracked - 700);
    // The rest of what is not active, and then nothing.
    let (report, gone) = evict(&table, &mmu, EvictOptions::new(u64::MAX));
    assert_eq!(report.end, EvictEnd::NoneLeft);
    assert_eq!(gone, (700..4 * BLOCK).collect::<Vec<_>>());
    assert_eq!(evict(&table, &mmu, EvictOptions::new(1)).0.evicted, 0);
}

#[test]
fn limits_end_an_eviction_each_for_its_reason() {
    let (mmu, table) = generations();
    let min = table.window().min_seq();
    let options = EvictOptions { until: Some(min), ..EvictOptions::new(u64::MAX) };
    let in_oldest = table.pages_in(min);
    let (report, _) = evict(&table, &mmu, EvictOptions { checks: 3, ..options });
    assert_eq!((report.evicted, report.end), (3, EvictEnd::Checks));
    let (report, _) = evict(&table, &mmu, options);
    assert_eq!((report.evicted, report.end), (in_oldest - 3, EvictEnd::NoneLeft));
    let stopped = table.edit().unwrap().evict(
        &mmu,
        &mut (),
        &mut Plain::default(),
        &EvictOptions::new(u64::MAX),
        |_| Take::Stop,
    );
    assert_eq!((stopped.evicted, stopped.checks, stopped.end), (0, 1, EvictEnd::Stopped));
}

/// Row 5.33.
#[test]
fn a_generation_younger_than_the_time_to_live_stays() {
    for (min_ttl_ms, expected) in [(10_000, 0), (3_500, 1), (2_500, 2), (0, 2)] {
        let (mmu, table) = generations();
        // Born at 2000 and 3000: the two inactive generations.
        let births: Vec<u64> =
            lru_age::Histogram::of(&table, 5900).bins().map(|bin| bin.age_ms).collect();
        assert_eq!(births[..2], [3900, 2900]);
        let pages = table.window().seqs().take(2).map(|seq| table.pages_in(seq));
        let allowed: u64 = pages.take(expected).sum();
        let options = EvictOptions { min_ttl_ms, now_ms: 5900, ..EvictOptions::new(u64::MAX) };
        let (report, _) = evict(&table, &mmu, options);
        assert_eq!(report.evicted, allowed, "{min_ttl_ms}");
        let end = if expected < 2 { EvictEnd::TooYoung } else { EvictEnd::NoneLeft };
        assert_eq!(report.end, end, "{min_ttl_ms}");
    }
}

#[test]
fn used_kept_and_unmapped_pages_are_told_apart() {
    let (mmu, table) = generations();
    // Two mapped pages that were used and are referenced by now, one that is gone.
    [4, 200].iter().for_each(|&gfn| mmu.touch(gfn));
    mmu.unmap(100..101);
    let mut kept = 0;
    let report = table.edit().unwrap().evict(
        &mmu,
        &mut (),
        &mut Plain::default(),
        &EvictOptions::new(300),
        |victim| match victim.range.start.get() {
            6 => {
                kept += 1;
                Take::Kept
            }
            7 => Take::Young,
            _ => {
                mmu.unmap(victim.range.start.get()..victim.range.end.get());
                Take::Evicted
            }
        },
    );
    assert_eq!((report.evicted, report.young, report.unmapped, report.kept), (300, 3, 1, 1));
    assert_eq!((kept, report.end), (1, EvictEnd::Enough));
    let age = |gfn| table.page_age(Gfn::new(gfn));
    assert_eq!(age(7).unwrap().seq, table.window().max_seq(), "used at the last moment");
    assert_eq!([4, 100, 6, 8].map(|gfn| age(gfn).is_some()), [true, false, true, false]);
    assert!(age(4).unwrap().referenced);
    table.check().unwrap();
}

#[test]
fn blocks_go_whole_and_huge_leaves_as_one() {
    let mmu = FakeMmu::new(4);
    let table = table_over(&mmu);
    mmu.map(0..2 * BLOCK);
    mmu.map_huge(2 * BLOCK, Level::L2);
    (0..4).for_each(|_| {
        let _ = pass(&table, &mmu);
    });
    mmu.map(3 * BLOCK..4 * BLOCK);
    let _ = pass(&table, &mmu);
    // A page of block 1 is young again: the block stays as a whole.
    for _ in 0..2 {
        mmu.touch(BLOCK + 5);
        let _ = pass(&table, &mmu);
    }
    let mut sizes = Vec::new();
    let options = EvictOptions { unit: Unit::Blocks, ..EvictOptions::new(u64::MAX) };
    let report =
        table.edit().unwrap().evict(&mmu, &mut (), &mut Plain::default(), &options, |victim| {
            sizes.push((victim.range.start.get() / BLOCK, victim.pages, victim.level));
            Take::Evicted
        });
    sizes.sort_unstable();
    assert_eq!(sizes[..2], [(0, BLOCK, Level::L1), (2, BLOCK, Level::L2)]);
    assert!(sizes.iter().all(|&(block, ..)| block != 1));
    assert_eq!(report.evicted, to_u64(sizes.len()) * BLOCK);
    // Pages of block 1 can still go one by one, the huge leaf went once.
    assert!(evict(&table, &mmu, EvictOptions::new(u64::MAX)).1.contains(&(BLOCK + 6)));
}

/// Two ranges, one of each kind, all pages equally old; half of them seen used.
fn kinds() -> (FakeMmu, AgeTable) {
    let mmu = FakeMmu::new(4);
    let mut table = AgeTable::new(0);
    table.add_range_of(range(0..2 * BLOCK), Kind::Anon).unwrap();
    table.add_range_of(range(2 * BLOCK..4 * BLOCK), Kind::File).unwrap();
    mmu.map(0..4 * BLOCK);
    (0..4 * BLOCK).step_by(2).for_each(|gfn| mmu.touch(gfn));
    (0..4).for_each(|_| {
        let _ = pass(&table, &mmu);
    });
    (mmu, table)
}

#[test]
fn swappiness_decides_which_kind_goes() {
    for (swappiness, anon, file) in [
        (Swappiness::FILE_ONLY, 0, 2 * BLOCK),
        (Swappiness::ANON_ONLY, 2 * BLOCK, 0),
        // Without refaults files go first; when they run out, the others do.
        (Swappiness::DEFAULT, 2 * BLOCK, 2 * BLOCK),
    ] {
        let (mmu, table) = kinds();
        let refaults = Refaults::new(1 << 12).unwrap();
        let mut policy = PidPolicy::new(&refaults, swappiness);
        let mut gone = Vec::new();
        let options = EvictOptions::new(u64::MAX);
        let mut editor = table.edit().unwrap();
        let report =
            editor.evict(&mmu, &mut (), &mut policy, &options, |v| take(&mmu, v, &mut gone));
        drop(editor);
        assert_eq!(report.end, EvictEnd::NoneLeft);
        let files = to_u64(gone.iter().filter(|&&gfn| gfn >= 2 * BLOCK).count());
        assert_eq!((to_u64(gone.len()) - files, files), (anon, file), "{swappiness:?}");
        let left = Kind::ALL.map(|kind| {
            lru_age::Histogram::of(&table, 0).bins().map(|bin| bin.pages_of(kind)).sum::<u64>()
        });
        assert_eq!(left, [2 * BLOCK - anon, 2 * BLOCK - file]);
        if swappiness == Swappiness::DEFAULT {
            assert!(gone[..1024].iter().all(|&gfn| gfn >= 2 * BLOCK), "files first");
        }
        // Evictions were counted by kind and tier, and can be asked for.
        let counted = |kind| Tier::ALL.map(|tier| refaults.counts(kind, tier).evicted);
        assert_eq!(counted(Kind::Anon), [anon / 2, anon / 2]);
        assert_eq!(refaults.evictions(), anon + file);
        table.check().unwrap();
    }
}

/// Row 5.31: the tier that refaults is kept one generation longer, and no more.
#[test]
fn a_tier_that_refaults_is_protected() {
    let (mmu, table) = kinds();
    let refaults = Refaults::new(1 << 14).unwrap();
    for gfn in (1 << 20..(1 << 20) + 1000).map(Gfn::new) {
        refaults.evicted(gfn, table.window().min_seq(), Kind::Anon, Tier::Used);
        assert!(refaults.refault(gfn, table.window().max_seq()).is_some());
        refaults.evicted(gfn, table.window().min_seq(), Kind::Anon, Tier::Untouched);
    }
    let oldest = table.window().min_seq();
    let mut policy = PidPolicy::new(&refaults, Swappiness::ANON_ONLY);
    let mut gone = Vec::new();
    let options = EvictOptions::new(u64::MAX);
    let report = {
        let mut editor = table.edit().unwrap();
        editor.evict(&mmu, &mut (), &mut policy, &options, |v| take(&mmu, v, &mut gone))
    };
    assert!(gone.iter().all(|gfn| gfn % 2 == 1), "used pages stayed");
    assert_eq!((report.evicted, report.protected), (BLOCK, BLOCK));
    let age = table.page_age(Gfn::new(2)).unwrap();
    assert_eq!(age.seq, Seq::new(oldest.get() + 1), "one generation younger");
    assert_eq!(refaults.counts(Kind::Anon, Tier::Used).protected, BLOCK);
    table.check().unwrap();
}

/// A guest under a memory limit: a page that is not mapped is faulted in, the coldest go.
struct Limited {
    mmu: FakeMmu,
    table: AgeTable,
    refaults: Refaults,
    resident: u64,
    limit: u64,
    faults: u64,
    evicted: BTreeSet<u64>,
    now_ms: u64,
    order: Order,
    /// In the order of their faults.
    queue: VecDeque<u64>,
}

/// Who goes first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Who is the coldest by the table.
    Aged,
    /// Who was mapped first: a control that knows no ages.
    FirstIn,
}

impl Limited {
    fn new(blocks: u64, limit: u64, order: Order) -> Self {
        let mmu = FakeMmu::new(blocks);
        let table = table_over(&mmu);
        let refaults = Refaults::new(blocks * BLOCK).unwrap();
        let (evicted, queue) = (BTreeSet::new(), VecDeque::new());
        let (resident, faults, now_ms) = (0, 0, 0);
        Self { mmu, table, refaults, resident, limit, faults, evicted, now_ms, order, queue }
    }

    /// Returns whether it was an access to a page that had been evicted.
    fn access(&mut self, gfn: u64) -> bool {
        let mut refault = false;
        if self.mmu.leaf(gfn).is_none() {
            self.faults += 1;
            self.mmu.map(gfn..gfn + 1);
            self.resident += 1;
            refault = self.evicted.remove(&gfn);
            if self.order == Order::FirstIn {
                self.queue.push_back(gfn);
                self.mmu.touch(gfn);
                if self.resident > self.limit {
                    self.reclaim();
                }
                return refault;
            }
            let known = self.refaults.refault(Gfn::new(gfn), self.table.window().max_seq());
            assert_eq!(known.is_some(), refault, "there is room for every page");
            if known.is_some_and(|refault| refault.is_recent()) {
                let mut editor = self.table.edit().unwrap();
                let page = GfnRange::from_len(Gfn::new(gfn), 1);
                editor.insert(page, Level::L1, lru_age::Arrival::WorkingSet);
            }
        }
        self.mmu.touch(gfn);
        if self.resident > self.limit {
            self.reclaim();
        }
        refault
    }

    fn age(&mut self) {
        self.now_ms += 1000;
        let _ = pass_with(&self.table, &self.mmu, PassOptions::new(AgeMode::Clear));
        self.refaults.age_counts();
    }

    fn reclaim(&mut self) {
        let wanted = self.resident - self.limit * 15 / 16;
        let mut gone = Vec::new();
        if self.order == Order::FirstIn {
            gone.extend(self.queue.drain(..to_index(wanted)));
            gone.iter().for_each(|&gfn| self.mmu.unmap(gfn..gfn + 1));
        }
        let mut policy = PidPolicy::new(&self.refaults, Swappiness::DEFAULT);
        // Ends: every pass makes what nobody used a candidate.
        loop {
            if self.order == Order::FirstIn {
                break;
            }
            let (mmu, options) = (&self.mmu, EvictOptions::new(wanted - to_u64(gone.len())));
            let report =
                self.table.edit().unwrap().evict(mmu, &mut (), &mut policy, &options, |victim| {
                    take(mmu, victim, &mut gone)
                });
            if report.end == EvictEnd::Enough {
                break;
            }
            let _ = pass_with(&self.table, &self.mmu, PassOptions::new(AgeMode::Clear));
        }
        self.resident -= to_u64(gone.len());
        self.evicted.extend(gone);
    }
}

/// Refaults of hot pages while a scan goes by: 30 rounds of 4096 accesses, 16384 pages scanned.
fn displaced(seed: u64, order: Order) -> u64 {
    let mut rng = Rng(seed);
    // Hot pages all over 64 blocks, room for twice as many.
    let mut guest = Limited::new(64, 8192, order);
    let hot: Vec<u64> = (0..4096).map(|n| n * 8 + rng.below(4)).collect();
    let mut scan = (0..64 * BLOCK).filter(|page| page % 8 >= 4);
    let mut refaults = 0;
    for round in 0..40 {
        for (at, &gfn) in hot.iter().enumerate() {
            let refault = guest.access(gfn);
            assert!(round >= 10 || !refault, "there is room for all");
            refaults += u64::from(refault);
            if round >= 10 && at % 2 == 0 {
                if let Some(page) = scan.next() {
                    let _ = guest.access(page);
                }
            }
        }
        guest.age();
    }
    assert!(guest.faults >= 4096 + 16384, "the scan went through: {}", guest.faults);
    refaults
}

#[test]
fn a_one_time_scan_does_not_displace_the_hot_set() {
    for seed in 0..10 {
        let [aged, control] = [Order::Aged, Order::FirstIn].map(|order| displaced(seed, order));
        println!("seed {seed}: {aged} hot pages displaced, {control} without ages");
        assert_eq!(aged, 0, "seed {seed}");
        // What the scan would do if it could: each hot page is thrown out at least once.
        assert!(control > 4096, "seed {seed}");
    }
}

#[test]
fn pages_that_came_back_soon_are_kept_longer() {
    let mmu = FakeMmu::new(1);
    let table = table_over(&mmu);
    mmu.map(0..2);
    let mut editor = table.edit().unwrap();
    assert_eq!(editor.insert(range(0..1), Level::L1, lru_age::Arrival::WorkingSet), 1);
    assert_eq!(editor.insert(range(1..2), Level::L1, lru_age::Arrival::New), 1);
    assert_eq!(editor.insert(range(0..2), Level::L1, lru_age::Arrival::New), 0, "known");
    drop(editor);
    let marks = [0, 1].map(|gfn| table.page_age(Gfn::new(gfn)).unwrap().referenced);
    assert_eq!(marks, [true, false]);
    (0..2).for_each(|_| {
        let _ = pass(&table, &mmu);
    });
    (0..2).for_each(|gfn| mmu.touch(gfn));
    let counts = pass(&table, &mmu).counts;
    assert_eq!((counts.promoted, counts.second_chance), (1, 1));
    // A whole block by a huge leaf, and part of one.
    let table = table_over(&mmu);
    let mut editor = table.edit().unwrap();
    assert_eq!(editor.insert(range(0..BLOCK), Level::L2, lru_age::Arrival::New), BLOCK);
    drop(editor);
    assert_eq!(table.page_age(Gfn::new(9)).unwrap().level, Level::L2);
    table.check().unwrap();
}
