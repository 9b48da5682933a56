//! A fake MMU over a vector of bits, and a random number generator whose seed is printed.

use core::sync::atomic::{AtomicU64, Ordering};

use lru_age::{AgePass, AgeTable, PassOptions, PassReport};
use mmu_core::addr::{Gfn, GfnRange, Level, to_index, to_u64};
use mmu_core::traits::{
    AgeAbilities, AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, MASK_WORDS, UpperBits,
};

/// Pages of a block.
pub(crate) const BLOCK: u64 = 512;

/// Guest memory from gfn 0, in blocks that are a level-1 table, a part of a huge leaf, or nothing.
#[derive(Debug, Default)]
pub(crate) struct FakeMmu {
    blocks: Vec<FakeBlock>,
    /// Leave out tables in which nothing is young when asked to, as an MMU with non-leaf accessed
    /// bits would.
    pub(crate) skip_idle: bool,
    /// Say that answers are slow.
    pub(crate) slow: bool,
    /// Calls of `age`.
    pub(crate) calls: AtomicU64,
    /// Entries that these read.
    pub(crate) entries: AtomicU64,
    /// Largest number of entries of a call, 0 for no limit: at least one table or leaf is done.
    pub(crate) slice: u64,
    /// Flushes asked for.
    pub(crate) flushes: AtomicU64,
}

#[derive(Debug, Default)]
struct FakeBlock {
    present: [AtomicU64; MASK_WORDS],
    young: [AtomicU64; MASK_WORDS],
    /// 0, or the level of the leaf that maps the block. A 1 GiB leaf keeps its accessed bit in its
    /// first block.
    huge: AtomicU64,
    huge_young: AtomicU64,
}

/// How a page is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) level: Level,
    pub(crate) young: bool,
}

impl FakeMmu {
    pub(crate) fn new(blocks: u64) -> Self {
        let blocks = (0..blocks).map(|_| FakeBlock::default()).collect();
        Self { blocks, ..Self::default() }
    }

    pub(crate) fn pages(&self) -> u64 {
        to_u64(self.blocks.len()) * BLOCK
    }

    pub(crate) fn copy(&self) -> Self {
        let copy = Self::new(to_u64(self.blocks.len()));
        for (to, from) in copy.blocks.iter().zip(&self.blocks) {
            let words = |block: &FakeBlock| -> Vec<u64> {
                let all = block.present.iter().chain(&block.young);
                all.chain([&block.huge, &block.huge_young]).map(get).collect()
            };
            let all = to.present.iter().chain(&to.young).chain([&to.huge, &to.huge_young]);
            all.zip(words(from)).for_each(|(cell, word)| set(cell, word));
        }
        Self { skip_idle: self.skip_idle, slow: self.slow, ..copy }
    }

    pub(crate) fn leaf(&self, gfn: u64) -> Option<Leaf> {
        let block = self.block(gfn);
        let bit = |words: &[AtomicU64]| get(&words[word(gfn)]) >> (gfn % 64) & 1 == 1;
        match get(&block.huge) {
            0 if !bit(&block.present) => None,
            0 => Some(Leaf { level: Level::L1, young: bit(&block.young) }),
            2 => Some(Leaf { level: Level::L2, young: get(&block.huge_young) != 0 }),
            _ => {
                let first = self.block(gfn / Level::L3.pages() * Level::L3.pages());
                Some(Leaf { level: Level::L3, young: get(&first.huge_young) != 0 })
            }
        }
    }

    /// Map 4 KiB pages, not young; a huge leaf there is split first.
    pub(crate) fn map(&self, pages: core::ops::Range<u64>) {
        for gfn in pages {
            self.split(gfn);
            self.block(gfn).present[word(gfn)].fetch_or(1 << (gfn % 64), Ordering::Relaxed);
        }
    }

    pub(crate) fn unmap(&self, pages: core::ops::Range<u64>) {
        for gfn in pages {
            self.split(gfn);
            let block = self.block(gfn);
            for words in [&block.present, &block.young] {
                words[word(gfn)].fetch_and(!(1 << (gfn % 64)), Ordering::Relaxed);
            }
        }
    }

    /// The guest uses a page, if it is mapped.
    pub(crate) fn touch(&self, gfn: u64) {
        let block = self.block(gfn);
        match (get(&block.huge), self.leaf(gfn)) {
            (_, None) => {}
            (0, _) => {
                block.young[word(gfn)].fetch_or(1 << (gfn % 64), Ordering::Relaxed);
            }
            (2, _) => set(&block.huge_young, 1),
            _ => set(&self.block(gfn / Level::L3.pages() * Level::L3.pages()).huge_young, 1),
        }
    }

    /// Map the aligned block around `gfn` by one leaf, not young.
    pub(crate) fn map_huge(&self, gfn: u64, level: Level) {
        let base = Gfn::new(gfn).align_down(level).get();
        for gfn in (base..base + level.pages()).step_by(512) {
            let block = self.block(gfn);
            let words = block.present.iter().chain(&block.young);
            words.chain([&block.huge_young]).for_each(|cell| set(cell, 0));
            set(&block.huge, u64::from(level.number()));
        }
    }

    /// A 2 MiB leaf becomes 4 KiB leaves that inherit its accessed bit.
    pub(crate) fn split(&self, gfn: u64) {
        let block = self.block(gfn);
        if get(&block.huge) == 0 {
            return;
        }
        assert_eq!(get(&block.huge), 2, "the tests split 2 MiB leaves only");
        let young = if get(&block.huge_young) != 0 { u64::MAX } else { 0 };
        block.present.iter().for_each(|cell| set(cell, u64::MAX));
        block.young.iter().for_each(|cell| set(cell, young));
        [&block.huge, &block.huge_young].into_iter().for_each(|cell| set(cell, 0));
    }

    /// Is the block around `gfn` mapped by 4 KiB leaves, or by none?
    pub(crate) fn is_table(&self, gfn: u64) -> bool {
        get(&self.block(gfn).huge) == 0
    }

    fn block(&self, gfn: u64) -> &FakeBlock {
        &self.blocks[to_index(gfn / BLOCK)]
    }
}

impl AgeRange for FakeMmu {
    type Reader = ();

    fn age<S: AgeSink>(&self, _: &mut (), request: AgeRequest, sink: &mut S) -> AgeReport {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let slice = if self.slice == 0 { u64::MAX } else { self.slice };
        let request = request.with_budget(request.budget.min(slice));
        let mut report = AgeReport::empty(request.range.start);
        let end = request.range.end.min(Gfn::new(self.pages()));
        while report.next < end && (report.entries < request.budget || report.entries == 0) {
            let at = report.next.get();
            let block = self.block(at);
            match get(&block.huge) {
                0 => self.age_table(at, end.get(), request, sink, &mut report),
                huge => {
                    let level = if huge == 2 { Level::L2 } else { Level::L3 };
                    let base = Gfn::new(at).align_down(level);
                    let cell = &self.block(base.get()).huge_young;
                    let old = if request.mode == AgeMode::Test {
                        get(cell)
                    } else {
                        cell.swap(0, Ordering::Relaxed)
                    };
                    let part = GfnRange::entry(base, level).intersection(request.range);
                    report.mapped += part.len();
                    report.young += if old != 0 { part.len() } else { 0 };
                    report.entries += 1;
                    report.next = part.end;
                    sink.huge(base, level, old != 0);
                }
            }
        }
        if report.next >= end {
            report.next = request.range.end;
        }
        self.entries.fetch_add(report.entries, Ordering::Relaxed);
        report
    }

    fn abilities(&self) -> AgeAbilities {
        let mut abilities = AgeAbilities::HARDWARE_BITS;
        abilities.set(AgeAbilities::UPPER_BITS, self.skip_idle);
        abilities.set(AgeAbilities::FAST, !self.slow);
        abilities
    }

    fn flush_aged(&self, _: &mut (), _: GfnRange) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
    }
}

impl FakeMmu {
    fn age_table<S: AgeSink>(
        &self,
        from: u64,
        end: u64,
        request: AgeRequest,
        sink: &mut S,
        report: &mut AgeReport,
    ) {
        let base = from / BLOCK * BLOCK;
        let to = end.min(base + BLOCK);
        report.next = Gfn::new(to);
        let block = self.block(base);
        let skips = self.skip_idle && request.upper == UpperBits::Use;
        if skips && block.young.iter().all(|cell| get(cell) == 0) {
            report.entries += 1;
            report.idle += to - from;
            sink.idle(range(from..to));
            return;
        }
        let (mut present, mut young) = ([0; MASK_WORDS], [0; MASK_WORDS]);
        for i in 0..MASK_WORDS {
            let first = base + to_u64(i) * 64;
            let inside = below(to, first) & !below(from, first);
            present[i] = get(&block.present[i]) & inside;
            let seen = get(&block.young[i]) & inside;
            if request.mode != AgeMode::Test && seen != 0 {
                block.young[i].fetch_and(!seen, Ordering::Relaxed);
            }
            young[i] = seen & present[i];
            report.mapped += u64::from(present[i].count_ones());
            report.young += u64::from(young[i].count_ones());
        }
        // A table with nothing in it is reported in every second block and left out in the others.
        if present == [0; MASK_WORDS] && (base / BLOCK) % 2 == 1 {
            report.entries += 1;
            return;
        }
        report.entries += BLOCK;
        sink.table(Gfn::new(base), &present, &young);
    }
}

fn below(page: u64, base: u64) -> u64 {
    match page.saturating_sub(base) {
        bits @ 0..64 => (1 << bits) - 1,
        _ => u64::MAX,
    }
}

fn word(gfn: u64) -> usize {
    to_index(gfn % BLOCK / 64)
}

fn get(cell: &AtomicU64) -> u64 {
    cell.load(Ordering::Relaxed)
}

fn set(cell: &AtomicU64, word: u64) {
    cell.store(word, Ordering::Relaxed);
}

/// splitmix64.
#[derive(Debug)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// A run of pages inside `0..pages`, short ones more often.
    pub(crate) fn pages(&mut self, pages: u64) -> core::ops::Range<u64> {
        let start = self.below(pages);
        let length = 1 + (self.below(pages) >> self.below(10));
        start..pages.min(start + length)
    }
}

/// `[start, end)`.
pub(crate) fn range(pages: core::ops::Range<u64>) -> GfnRange {
    GfnRange::new(Gfn::new(pages.start), Gfn::new(pages.end))
}

/// A table over all of `mmu`.
pub(crate) fn table_over(mmu: &FakeMmu) -> AgeTable {
    let mut table = AgeTable::new(0);
    table.add_range(range(0..mmu.pages())).unwrap();
    table
}

/// One whole pass.
pub(crate) fn pass_with(table: &AgeTable, mmu: &FakeMmu, options: PassOptions) -> PassReport {
    let mut pass = AgePass::start_with(table, options).unwrap();
    while pass.step(mmu, &mut (), 4096).next.is_some() {}
    let report = pass.finish(0);
    table.check().unwrap();
    report
}

pub(crate) fn pass(table: &AgeTable, mmu: &FakeMmu) -> PassReport {
    pass_with(table, mmu, PassOptions::new(AgeMode::Clear))
}
