//! Accessed bits of upper entries: what they let an aging pass leave out, and what caches of those
//! entries may hide (KVM row 5.25).

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use common::{BASE, Core, DATA, G1, Guest, M2, Modelled, Shape, linear, no_ad, range, reported};
use mmu_core::addr::{Gfn, GfnRange, Level, to_u64};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt};
use mmu_core::traits::{
    AgeAbilities, AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, CountOnly, Effort, MASK_WORDS,
    UpperBits,
};
use mmu_model::{AccessKind, Caches, Random, SoftCpu};

use AccessKind::Read;

/// First gfn of the second 512 GiB: under another entry of level 4.
const FAR: u64 = 1 << 27;

/// What a call said of each gfn that somebody asks about.
#[derive(Debug, Default)]
struct Told {
    asked: BTreeSet<u64>,
    young: BTreeSet<u64>,
    /// Old, or left out as idle.
    old: BTreeSet<u64>,
    idle: Vec<GfnRange>,
    unknown: Vec<GfnRange>,
}

impl Told {
    fn about(gfns: impl IntoIterator<Item = u64>) -> Self {
        Self { asked: gfns.into_iter().collect(), ..Self::default() }
    }

    fn tell(&mut self, range: GfnRange, young: impl Fn(u64) -> Option<bool>) {
        for &gfn in self.asked.range(range.start.get()..range.end.get()) {
            let side = match young(gfn) {
                Some(true) => &mut self.young,
                Some(false) => &mut self.old,
                None => continue,
            };
            assert!(side.insert(gfn), "{gfn:#x} told twice");
        }
        assert!(self.young.is_disjoint(&self.old));
    }
}

impl AgeSink for Told {
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        self.tell(GfnRange::from_len(base, M2), |gfn| {
            let (word, bit) = ((gfn % M2 / 64) as usize, gfn % 64);
            (present[word] >> bit & 1 != 0).then_some(young[word] >> bit & 1 != 0)
        });
    }

    fn huge(&mut self, base: Gfn, level: Level, young: bool) {
        self.tell(GfnRange::from_len(base, level.pages()), |_| Some(young));
    }

    fn idle(&mut self, range: GfnRange) {
        self.idle.push(range);
        self.tell(range, |_| Some(false));
    }

    fn unknown(&mut self, range: GfnRange) {
        self.unknown.push(range);
    }
}

fn request(range: GfnRange, mode: AgeMode) -> AgeRequest {
    AgeRequest::new(range, mode).with_upper(UpperBits::Use)
}

/// The guest with two slots of 2 GiB, one of them under another entry of level 4.
fn wide<F: Modelled>(caps: Capabilities, level: Level) -> Guest<F> {
    let mut guest = Guest::<F>::with(Shape { frames: 4096, ..Shape::new(caps) });
    guest.slot(0, BASE, 2 * G1, DATA, SlotFlags::empty());
    guest.slot(1, FAR, 2 * G1, DATA + 4 * G1, SlotFlags::empty());
    guest.host().set_resolver(linear(level));
    guest
}

fn core<F: Modelled>(guest: &mut Guest<F>) -> Arc<Mutex<Core>> {
    let root = guest.root_register();
    guest.host().add_core(SoftCpu::new(&guest.format, root, Caches::unlimited()))
}

/// A read by a processor with caches; faults are served with pages of at most `level`.
fn read<F: Modelled>(guest: &mut Guest<F>, core: &Arc<Mutex<Core>>, gfn: u64, level: Level) {
    let access = mmu_model::Access::user(Read);
    for _ in 0..4 {
        let found = core.lock().unwrap().cpu.access(guest.host(), gfn << 12, access);
        match found {
            Ok(_) => return,
            Err(fault) => {
                let fault = reported(gfn, &fault).at_most(level);
                let _ = guest.vcpu.fault(&fault).expect("memory");
            }
        }
    }
    panic!("{gfn:#x} cannot be read");
}

/// What nobody walked into costs one entry, wherever it hangs; what was touched is found.
fn untouched_parts_are_left_out<F: Modelled>(caps: Capabilities) {
    let mut guest = wide::<F>(caps, Level::L2);
    let blocks: Vec<u64> = (0..8).flat_map(|n| [n, G1 / M2 + n]).collect();
    let at = |first: u64, block: u64| first + block * M2;
    let near = blocks.iter().flat_map(|&n| [at(BASE, n), at(BASE, n) + 100]);
    let small: Vec<u64> = near.chain([FAR + 7, FAR + G1 + 9]).collect();
    guest.map(small.iter().copied(), Read, Level::L1);
    guest.map([at(BASE, 40), at(FAR, 41)], Read, Level::L2);
    let mapped = to_u64(small.len()) + 2 * M2;
    let first = guest.ask(request(GfnRange::ALL, AgeMode::ClearFlush), &mut CountOnly);
    assert_eq!((first.mapped, first.young, first.idle), (mapped, mapped, 0), "all is new");
    let nothing = guest.ask(request(GfnRange::ALL, AgeMode::Test), &mut CountOnly);
    let upper = guest.mmu.abilities().contains(AgeAbilities::UPPER_BITS);
    assert_eq!(upper, caps.accessed_dirty);
    let levels = u64::from(caps.levels);
    if !upper {
        assert_eq!((nothing.mapped, nothing.young, nothing.idle), (mapped, 0, 0));
        guest.check();
        return guest.finish();
    }
    // The root's entries, read once each; nothing else.
    assert!(nothing.entries <= M2, "{nothing:?}");
    assert_eq!((nothing.mapped, nothing.young), (0, 0));
    for (gfn, pages) in [(small[1], 1), (at(BASE, 40) + 3, M2), (FAR + 7, 1)] {
        guest.touch(gfn, Read).unwrap();
        let mut told = Told::about(small.iter().copied());
        let looked = guest.ask(request(GfnRange::ALL, AgeMode::Test), &mut told);
        assert_eq!(looked.young, pages);
        // A root, and on the way down a table of each level, come back to after each pause.
        assert!(looked.entries <= levels * (M2 + levels), "{looked:?}");
        assert!(looked.mapped < mapped && looked.idle > G1, "{looked:?}");
        let found = guest.ask(request(GfnRange::ALL, AgeMode::ClearFlush), &mut CountOnly);
        assert_eq!((found.young, found.mapped), (looked.young, looked.mapped));
        let found = guest.ask(request(GfnRange::ALL, AgeMode::ClearFlush), &mut CountOnly);
        assert_eq!((found.young, found.mapped), (0, 0));
    }
    // Who ignores upper bits sees everything, and changes none of them.
    let all = guest.age(GfnRange::ALL, AgeMode::ClearFlush);
    assert_eq!((all.mapped, all.young, all.idle), (mapped, 0, 0));
    let nothing = guest.ask(request(GfnRange::ALL, AgeMode::Clear), &mut CountOnly);
    assert!(nothing.entries <= M2 && nothing.mapped == 0);
    guest.check();
    guest.finish();
}

#[test]
fn what_nobody_walked_into_is_left_out() {
    for_each_format!(untouched_parts_are_left_out);
}

/// PAE page-directory-pointer entries have no accessed bit: they are entered, their tables are not.
#[test]
fn entries_without_an_accessed_bit_are_always_entered() {
    let caps = Capabilities::pae();
    let mut guest = Guest::<Legacy>::with(Shape::new(caps));
    guest.slot(0, 0, 2 * G1, DATA, SlotFlags::empty());
    let pages = [5, G1 + 5, G1 + M2 + 5];
    guest.map(pages, Read, Level::L1);
    let first = guest.ask(request(GfnRange::ALL, AgeMode::ClearFlush), &mut CountOnly);
    assert_eq!((first.mapped, first.young), (3, 3));
    let second = guest.ask(request(GfnRange::ALL, AgeMode::ClearFlush), &mut CountOnly);
    assert_eq!((second.mapped, second.young, second.idle), (0, 0, 3 * M2));
    guest.touch(G1 + 5, Read).unwrap();
    let third = guest.ask(request(GfnRange::ALL, AgeMode::ClearFlush), &mut CountOnly);
    assert_eq!((third.mapped, third.young, third.idle), (1, 1, 2 * M2));
    guest.check();
    guest.finish();
}

/// The cost of a pass follows what was touched: 64 times the memory, less than twice the entries.
#[test]
fn the_cost_of_a_pass_follows_touched_memory_and_not_mapped_memory() {
    fn entries<F: Modelled>(caps: Capabilities, tables: u64, spread: bool) -> (u64, u64) {
        const TOUCHED: u64 = 8;
        let shape = Shape { frames: 2 * tables + 64, ..Shape::new(caps) };
        let mut guest = Guest::<F>::with(shape);
        guest.slot(0, BASE, tables * M2, DATA, SlotFlags::empty());
        guest.host().set_resolver(linear(Level::L2));
        // One fault each for a huge page, then split: as many tables, all of whose entries exist.
        guest.map((0..tables).map(|table| BASE + table * M2), Read, Level::L2);
        let split = guest.mmu.split(&mut guest.actor, 0, GfnRange::ALL);
        assert_eq!(split.splits, tables);
        let all = request(GfnRange::ALL, AgeMode::ClearFlush);
        assert_eq!(guest.ask(all, &mut CountOnly).mapped, tables * M2);
        let distance = if spread { tables / TOUCHED } else { 1 };
        for table in 0..TOUCHED {
            for page in 0..M2 {
                guest.touch(BASE + table * distance * M2 + page, Read).unwrap();
            }
        }
        let pass = guest.ask(all, &mut CountOnly);
        assert_eq!((pass.young, pass.mapped), (TOUCHED * M2, TOUCHED * M2));
        assert_eq!(pass.idle, (tables - TOUCHED) * M2);
        let full = guest.age(GfnRange::ALL, AgeMode::ClearFlush);
        assert!(full.entries > tables * M2);
        guest.finish();
        (pass.entries, full.entries)
    }
    fn run<F: Modelled>(caps: Capabilities) {
        if !caps.accessed_dirty {
            return;
        }
        for spread in [false, true] {
            let (small, _) = entries::<F>(caps, 16, spread);
            let (large, full) = entries::<F>(caps, 16 * 64, spread);
            println!("{} entries of 16 tables, {large} of 1024, of {full} in all", small);
            assert!(large < 2 * small, "{small} entries became {large}, spread: {spread}");
        }
    }
    for_each_format!(run);
}

/// Calls with a small budget stop inside links that they cleared. What they did not get to stays
/// young for whoever comes next, also if nobody goes on.
#[test]
fn a_call_that_stops_hides_nothing() {
    fn run<F: Modelled>(caps: Capabilities) {
        let mut random = Random::new(11);
        for budget in [0, 600, 1500, 4000] {
            for goes_on in [true, false] {
                let mut guest = wide::<F>(caps, Level::L1);
                let mut gfns = BTreeSet::new();
                for _ in 0..300 {
                    let first = [BASE, BASE + G1, FAR, FAR + G1][random.below(4) as usize];
                    gfns.insert(first + random.below(6) * M2 + random.below(M2));
                }
                guest.map(gfns.iter().copied(), Read, Level::L1);
                let mode = [AgeMode::Clear, AgeMode::ClearFlush][random.below(2) as usize];
                let mut told = Told::about(gfns.iter().copied());
                let mut total = AgeReport::empty(Gfn::new(0));
                while total.next < GfnRange::ALL.end {
                    let rest = GfnRange::new(total.next, GfnRange::ALL.end);
                    let slice = guest.ask(request(rest, mode).with_budget(budget), &mut told);
                    assert!(slice.next > rest.start, "every call makes progress");
                    total = total.merge(slice);
                    if !goes_on {
                        break;
                    }
                }
                guest.mmu.flush_aged(&mut guest.actor, GfnRange::ALL);
                let mut rest = Told::about(gfns.iter().copied());
                let _ = guest.ask(request(GfnRange::ALL, mode), &mut rest);
                let found: BTreeSet<u64> = &told.young | &rest.young;
                assert_eq!(found, gfns, "budget {budget}");
                assert!(goes_on == rest.young.is_empty(), "some are left if nobody goes on");
                guest.check();
                guest.finish();
            }
        }
    }
    for_each_format!(run);
}

/// A CPU that has an upper entry cached goes past it. Until a flush nobody believes it; what was
/// accessed before the flush, and only that, may be missed by who believes; a full pass finds it.
#[test]
fn a_cleared_link_is_believed_after_a_flush_and_not_before() {
    fn run<F: Modelled>(caps: Capabilities) {
        let mut guest = wide::<F>(caps, Level::L1);
        let core = core(&mut guest);
        let pages: Vec<u64> = (0..8).map(|page| BASE + page).collect();
        guest.map(pages.iter().copied(), Read, Level::L1);
        read(&mut guest, &core, pages[0], Level::L1);
        let all = |mode| request(GfnRange::ALL, mode);
        let young = |guest: &mut Guest<F>, mode| guest.ask(all(mode), &mut CountOnly).young;
        assert_eq!(young(&mut guest, AgeMode::Clear), 8);
        // Not in the TLB, but the way to its table is in the other cache.
        read(&mut guest, &core, pages[1], Level::L1);
        assert!(core.lock().unwrap().cpu.stats().short_walks > 0);
        assert_eq!(young(&mut guest, AgeMode::Test), 1, "not flushed: not believed");
        assert_eq!(young(&mut guest, AgeMode::Clear), 1);
        read(&mut guest, &core, pages[2], Level::L1);
        guest.mmu.flush_aged(&mut guest.actor, GfnRange::ALL);
        assert_eq!(young(&mut guest, AgeMode::Test), 0, "accessed before the flush: missed");
        assert!(guest.young(pages[2]));
        read(&mut guest, &core, pages[3], Level::L1);
        assert_eq!(young(&mut guest, AgeMode::Test), 2, "accessed after the flush: seen");
        assert_eq!(young(&mut guest, AgeMode::ClearFlush), 2);
        // Nothing was cleared since: nothing is asked of the host.
        let _ = guest.host().take_batches();
        guest.mmu.flush_aged(&mut guest.actor, GfnRange::ALL);
        assert_eq!(guest.host().take_batches(), []);
        read(&mut guest, &core, pages[4], Level::L1);
        assert_eq!(guest.age(GfnRange::ALL, AgeMode::Test).young, 1, "a full pass sees all");
        guest.check();
        guest.finish();
    }
    run::<Ept>(Capabilities::ept());
    run::<Npt>(Capabilities::npt());
    run::<Legacy>(Capabilities::legacy());
}

/// A processor may have cached the way to a table in which nothing is young: it went there for a
/// page that is not mapped. A precise pass that clears the links on that way owes their flush, and
/// no leaf owes it for them.
#[test]
fn a_link_with_nothing_young_below_it_is_flushed_for_itself() {
    fn run<F: Modelled>(caps: Capabilities) {
        let mut guest = wide::<F>(caps, Level::L1);
        let core = core(&mut guest);
        let [mapped, absent] = [BASE + 3, BASE + 300];
        guest.map([mapped], Read, Level::L1);
        // The leaf is old and in no cache, the links above it are as they were born: accessed.
        assert_eq!(guest.age(GfnRange::ALL, AgeMode::ClearFlush).young, 1);
        {
            let cpu = &mut core.lock().unwrap().cpu;
            cpu.speculate(guest.host(), absent << 12, mmu_model::Access::user(Read));
            let top = cpu.walker().rules().levels();
            assert!(cpu.psc().lookup(mapped << 12, top).is_some_and(|step| step.level == 1));
            assert!(cpu.tlb().lookup(mapped << 12).is_none());
        }
        assert!(!guest.young(mapped));
        let all = |mode| request(GfnRange::ALL, mode);
        let cleared = guest.ask(all(AgeMode::ClearFlush), &mut CountOnly);
        assert_eq!((cleared.mapped, cleared.young), (1, 0), "entered, and nothing young in it");
        assert_eq!(guest.ask(all(AgeMode::Test), &mut CountOnly).mapped, 0, "idle by now");
        read(&mut guest, &core, mapped, Level::L1);
        assert!(guest.young(mapped));
        let seen = guest.ask(all(AgeMode::Test), &mut CountOnly);
        assert_eq!((seen.mapped, seen.young), (1, 1), "the access set the links again");
        guest.check();
        guest.finish();
    }
    run::<Ept>(Capabilities::ept());
    run::<Npt>(Capabilities::npt());
    run::<Legacy>(Capabilities::legacy());
}

/// An access while a precise call flushes leaves a young leaf under links that say idle. Whatever
/// takes its place and inherits the access sets the links.
#[test]
fn what_inherits_an_access_is_not_left_under_idle_links() {
    fn hidden<F: Modelled>(caps: Capabilities) -> Guest<F> {
        let mut guest = wide::<F>(caps, Level::L2);
        let core = core(&mut guest);
        guest.map((0..M2).map(|page| BASE + page), Read, Level::L1);
        read(&mut guest, &core, BASE, Level::L1);
        let all = request(GfnRange::ALL, AgeMode::ClearFlush);
        let host = Arc::clone(guest.mmu.vm());
        let late = Arc::clone(&core);
        let hook = move |_: &common::Batch| {
            let access = mmu_model::Access::user(Read);
            let mut core = late.lock().unwrap();
            core.cpu.access(host.host(), (BASE + 5) << 12, access).expect("mapped");
        };
        guest.host().before_flush(Some(Arc::new(hook)));
        assert_eq!(guest.ask(all, &mut CountOnly).young, M2);
        guest.host().before_flush(None);
        assert!(guest.young(BASE + 5));
        let missed = guest.ask(request(GfnRange::ALL, AgeMode::Test), &mut CountOnly);
        assert_eq!(missed.young, 0, "made during the call");
        guest
    }
    fn run<F: Modelled>(caps: Capabilities) {
        let look = request(GfnRange::ALL, AgeMode::Test);
        let block = range(BASE, BASE + M2);
        let mut guest = hidden::<F>(caps);
        assert_eq!(guest.mmu.collapse(&mut guest.actor, 0, block).collapses, [1, 0]);
        assert_eq!(guest.ask(look, &mut CountOnly).young, M2, "a huge page in place of a table");
        guest.check();
        guest.finish();

        let mut guest = hidden::<F>(caps);
        let (actor, gfn) = (&mut guest.actor, Gfn::new(BASE + 5));
        let page = mmu_core::addr::Pfn::new(DATA + 16 * G1);
        let done = guest.mmu.change_pte(actor, 0, gfn, page).expect("a good page");
        assert_eq!(done.changed, 1);
        assert_eq!(guest.ask(look, &mut CountOnly).young, 1, "another page");
        guest.check();
        guest.finish();
    }
    run::<Ept>(Capabilities::ept());
    run::<Npt>(Capabilities::npt());
    run::<Legacy>(Capabilities::legacy());
}

/// What an access of a page owes to whoever asks, by what was cleared and flushed when.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Its leaf was cleared and not flushed since: a TLB may hide an access.
    leaf: bool,
    /// Links above it may have been: an access may go past them. It is hidden once they are
    /// flushed, and then only.
    links: bool,
    /// Accessed, not cleared since, and not hidden.
    must: bool,
    /// Accessed, and perhaps hidden.
    may: bool,
}

impl Known {
    const FRESH: Self = Self { leaf: false, links: false, must: false, may: false };

    fn accessed(&mut self) {
        self.must |= !self.leaf;
        self.may |= self.leaf;
    }

    fn flushed(&mut self) {
        if self.links && self.must {
            (self.must, self.may) = (false, true);
        }
        (self.leaf, self.links) = (false, false);
    }
}

/// A guest, two processors that never forget by themselves, and what is known of every page.
struct Trial<F: Modelled> {
    guest: Guest<F>,
    cores: [Arc<Mutex<Core>>; 2],
    pages: BTreeMap<u64, Known>,
    random: Random,
    passes: u64,
    idle: u64,
    missed: u64,
    owed: u64,
}

impl<F: Modelled> Trial<F> {
    fn new(caps: Capabilities, seed: u64) -> Self {
        let mut guest = wide::<F>(caps, Level::L2);
        let cores = [core(&mut guest), core(&mut guest)];
        let firsts = [BASE, BASE + G1, FAR, FAR + G1];
        let blocks = firsts.into_iter().flat_map(|first| (0..3).map(move |n| first + n * M2));
        let offsets = [0, 1, 63, 64, 300, 511];
        let pages = blocks.flat_map(|first| offsets.map(|page| (first + page, Known::FRESH)));
        let pages = pages.collect();
        let random = Random::new(seed);
        Self { guest, cores, pages, random, passes: 0, idle: 0, missed: 0, owed: 0 }
    }

    fn page(&mut self) -> u64 {
        let at = self.random.below(to_u64(self.pages.len())) as usize;
        *self.pages.keys().nth(at).expect("in range")
    }

    fn part(&mut self) -> GfnRange {
        let page = self.page();
        let block = page / M2 * M2;
        match self.random.below(6) {
            0 => range(page, page + 1),
            1 => range(block, block + M2),
            2 => range(block, block + G1),
            3 => range(page, page + G1),
            _ => GfnRange::ALL,
        }
    }

    fn access(&mut self) {
        let gfn = self.page();
        let core = Arc::clone(&self.cores[self.random.below(2) as usize]);
        let level = if self.random.chance(1, 3) { Level::L2 } else { Level::L1 };
        read(&mut self.guest, &core, gfn, level);
        let known = self.pages.get_mut(&gfn).expect("one of ours");
        known.accessed();
    }

    fn unmap(&mut self) {
        let part = self.part();
        let part = if part == GfnRange::ALL { range(BASE, BASE + M2) } else { part };
        // A huge leaf goes as a whole, and takes what is known of its other pages with it.
        let reach = GfnRange::new(part.start.align_down(Level::L2), Gfn::new(part.end.get() + M2));
        let _ = self.guest.unmap(part);
        for (_, known) in self.pages.range_mut(reach.start.get()..reach.end.get()) {
            known.must = false;
            known.may = false;
        }
    }

    fn flush(&mut self) {
        let part = self.part();
        self.guest.mmu.flush_aged(&mut self.guest.actor, part);
        for (_, known) in self.pages.range_mut(part.start.get()..part.end.get()) {
            known.flushed();
        }
    }

    fn pass(&mut self) {
        let part = self.part();
        let modes = [AgeMode::Test, AgeMode::Clear, AgeMode::ClearFlush, AgeMode::ClearFlush];
        let mode = modes[self.random.below(4) as usize];
        let upper = if self.random.chance(1, 6) { UpperBits::Ignore } else { UpperBits::Use };
        let effort = if self.random.chance(1, 6) { Effort::Fast } else { Effort::Full };
        let budget = [u64::MAX, u64::MAX, 1, 700, 2000][self.random.below(5) as usize];
        let asked = AgeRequest::new(part, mode).with_upper(upper).with_effort(effort);
        let mut told = Told::about(self.pages.keys().copied());
        let report = self.guest.ask(asked.with_budget(budget), &mut told);
        assert!(effort == Effort::Full || report.entries <= budget, "{report:?}");
        self.passes += 1;
        self.idle += report.idle;
        let what = format!("{asked:?}, {report:?}");
        let done = GfnRange::new(part.start, report.next);
        for (&gfn, known) in &mut self.pages {
            let at = Gfn::new(gfn);
            let blind = told.unknown.iter().any(|range| range.contains(at));
            if done.contains(at) && !blind {
                let young = told.young.contains(&gfn);
                assert!(young || !known.must, "{gfn:#x} is old: {known:?}, {what}");
                self.owed += u64::from(known.must);
                self.missed += u64::from(known.may && !young);
                known.may = false;
            }
            if mode == AgeMode::Test {
                continue;
            }
            // Cleared, be it with the huge leaf of a neighbour. Flushed before the call returned?
            if told.young.contains(&gfn) {
                known.must = false;
                known.leaf = true;
            }
            // The links above any page may have been cleared.
            known.links |= upper == UpperBits::Use && done.contains(at);
            if mode == AgeMode::ClearFlush && effort == Effort::Full {
                // A huge leaf is flushed as a whole.
                if done.contains(at) || told.young.contains(&gfn) {
                    known.flushed();
                }
            }
        }
    }

    fn shape(&mut self) {
        let gfn = self.page();
        if self.random.chance(1, 2) {
            let _ = self.guest.shrink(gfn);
        } else {
            let block = GfnRange::entry(Gfn::new(gfn), Level::L2);
            let _ = self.guest.mmu.collapse(&mut self.guest.actor, 0, block);
        }
    }

    fn run(mut self, steps: u64) -> (u64, u64, u64) {
        for _ in 0..steps {
            match self.random.below(100) {
                0..70 => self.access(),
                70..88 => self.pass(),
                88..92 => self.flush(),
                92..97 => self.shape(),
                _ => self.unmap(),
            }
        }
        self.guest.check();
        self.guest.finish();
        (self.idle, self.missed, self.owed)
    }
}

/// No page is called old that was touched since it was last cleared and flushed. The processors'
/// TLBs and paging-structure caches never evict, so what may be hidden is hidden.
#[test]
fn what_was_touched_after_a_flushed_clear_is_never_called_old() {
    fn run<F: Modelled>(caps: Capabilities) {
        let (mut idle, mut missed, mut owed) = (0, 0, 0);
        for seed in 0..12 {
            println!("seed {seed}");
            let counts = Trial::<F>::new(caps, seed).run(1500);
            (idle, missed, owed) = (idle + counts.0, missed + counts.1, owed + counts.2);
        }
        println!("{}: {owed} accesses owed and seen, {missed} that may be hidden missed", F::NAME);
        assert_eq!(idle != 0, caps.accessed_dirty, "upper bits are used where there are any");
        assert!(owed > 1000 && missed > 0);
    }
    run::<Ept>(Capabilities::ept());
    run::<Ept>(no_ad(Capabilities::ept()));
    run::<Npt>(Capabilities::npt());
    run::<Legacy>(common::five(Capabilities::legacy()));
}
