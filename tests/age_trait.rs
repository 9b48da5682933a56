//! What every MMU that can be aged does alike: one suite, run on the direct tables of each format
//! and on an MMU that finds mappings by reverse maps (KVM rows 5.1 to 5.6, 5.14 to 5.17, R18).

#[path = "../crates/mmu-core/tests/alias/mod.rs"]
mod alias;
mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use alias::AliasMmu;
use common::{BASE, Core, Guest, Modelled, TestHost, reported};
use mmu_core::addr::{Gfn, GfnRange, Level, to_u64};
use mmu_core::epoch::EpochDomain;
use mmu_core::lock::MmuLock;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt};
use mmu_core::traits::{
    AgeAbilities, AgeAnswer, AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, Effort,
    FAST_PAGE_BUDGET, MASK_WORDS,
};
use mmu_core::vm::Actor;
use mmu_model::{AccessKind, Caches, Random, SoftCpu};
use tdp_mmu::TdpMmu;

/// Pages that a subject has room for.
const PAGES: u64 = 2048;

/// An MMU under test, and a processor that uses it through caches that never evict.
trait Subject: Sized {
    type Mmu: AgeRange;

    fn new() -> Self;
    /// First of its gfns.
    fn first(&self) -> u64;
    fn mmu(&mut self) -> (&Self::Mmu, &mut <Self::Mmu as AgeRange>::Reader);
    /// Map a page, not accessed.
    fn map(&mut self, page: u64);
    fn unmap(&mut self, page: u64);
    fn touch(&mut self, page: u64);
    /// Run `work` while another thread holds the MMU lock.
    fn while_locked(&mut self, work: impl FnOnce(&mut Self));
    fn finish(self);

    fn range(&self, start: u64, end: u64) -> GfnRange {
        common::range(self.first() + start, self.first() + end)
    }

    fn age<S: AgeSink>(&mut self, request: AgeRequest, sink: &mut S) -> AgeReport {
        let (mmu, reader) = self.mmu();
        mmu.age(reader, request, sink)
    }

    fn ask(&mut self, request: AgeRequest) -> AgeAnswer {
        let (mmu, reader) = self.mmu();
        mmu.ask(reader, request)
    }
}

struct Direct<F: Modelled> {
    guest: Guest<F>,
    core: Arc<Mutex<Core>>,
}

impl<F: Modelled> Direct<F> {
    fn with(caps: Capabilities) -> Self {
        let mut guest = Guest::<F>::with_memory(caps, PAGES, Level::L1);
        let root = guest.root_register();
        let core = guest.host().add_core(SoftCpu::new(&guest.format, root, Caches::unlimited()));
        Self { guest, core }
    }
}

macro_rules! direct {
    ($($name:ident: $format:ty, $caps:expr;)*) => {
        $(struct $name(Direct<$format>);

        impl Subject for $name {
            type Mmu = TdpMmu<$format, TestHost>;

            fn new() -> Self {
                Self(Direct::with($caps))
            }

            fn first(&self) -> u64 {
                BASE
            }

            fn mmu(&mut self) -> (&Self::Mmu, &mut Actor<TestHost>) {
                (&self.0.guest.mmu, &mut self.0.guest.actor)
            }

            fn map(&mut self, page: u64) {
                let _ = self.0.guest.shrink(BASE + page);
            }

            fn unmap(&mut self, page: u64) {
                let _ = self.0.guest.unmap(common::range(BASE + page, BASE + page + 1));
            }

            fn touch(&mut self, page: u64) {
                let access = mmu_model::Access::user(AccessKind::Read);
                let Direct { guest, core } = &mut self.0;
                for _ in 0..3 {
                    let address = (BASE + page) << 12;
                    let found = core.lock().unwrap().cpu.access(guest.host(), address, access);
                    match found {
                        Ok(_) => return,
                        Err(fault) => {
                            let fault = reported(BASE + page, &fault);
                            let _ = guest.vcpu.fault(&fault).expect("memory");
                        }
                    }
                }
                panic!("{page:#x} cannot be read");
            }

            fn while_locked(&mut self, work: impl FnOnce(&mut Self)) {
                let vm = Arc::clone(self.0.guest.mmu.vm());
                let (held, is_held) = mpsc::channel();
                let (done, is_done) = mpsc::channel::<()>();
                std::thread::scope(|scope| {
                    let vm = &vm;
                    scope.spawn(move || {
                        let mut holder = vm.actor().unwrap();
                        let lock = vm.lock().exclusive(holder.participant());
                        held.send(()).unwrap();
                        is_done.recv_timeout(Duration::from_secs(60)).expect("it completes");
                        drop(lock);
                    });
                    is_held.recv().unwrap();
                    work(self);
                    done.send(()).unwrap();
                });
            }

            fn finish(mut self) {
                self.0.guest.check();
                self.0.guest.finish();
            }
        })*
    };
}

direct! {
    EptTables: Ept, Capabilities::ept();
    TrackedTables: Ept, common::no_ad(Capabilities::ept());
    NptTables: Npt, common::five(Capabilities::npt());
    LegacyTables: Legacy, Capabilities::legacy();
}

/// Every page is mapped by one to three entries, and accessed through one of them.
struct Aliased {
    mmu: Arc<AliasMmu>,
    reader: (),
    entries: BTreeMap<u64, Vec<usize>>,
}

impl Subject for Aliased {
    type Mmu = AliasMmu;

    fn new() -> Self {
        let mmu = Arc::new(AliasMmu::new(PAGES, 4096));
        Self { mmu, reader: (), entries: BTreeMap::new() }
    }

    fn first(&self) -> u64 {
        0
    }

    fn mmu(&mut self) -> (&AliasMmu, &mut ()) {
        (&self.mmu, &mut self.reader)
    }

    fn map(&mut self, page: u64) {
        if !self.entries.contains_key(&page) {
            let entries = (0..=page % 3).map(|_| self.mmu.map(page, false)).collect();
            self.entries.insert(page, entries);
        }
    }

    fn unmap(&mut self, page: u64) {
        for entry in self.entries.remove(&page).unwrap_or_default() {
            let _ = self.mmu.unmap(page, entry);
        }
    }

    fn touch(&mut self, page: u64) {
        self.map(page);
        let entries = &self.entries[&page];
        self.mmu.touch(entries[page as usize / 3 % entries.len()]);
    }

    fn while_locked(&mut self, work: impl FnOnce(&mut Self)) {
        let mmu = Arc::clone(&self.mmu);
        // Held by this very thread: whoever wanted it would never get it.
        mmu.locked(|| work(self));
    }

    fn finish(mut self) {
        for page in 0..PAGES {
            self.unmap(page);
        }
        assert!(self.mmu.abilities().contains(AgeAbilities::FAST));
    }
}

/// What a call told, page by page.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    pages: BTreeMap<u64, bool>,
    unknown: BTreeSet<u64>,
}

impl AgeSink for Told {
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        for (word, (present, young)) in present.iter().zip(young).enumerate() {
            assert_eq!(young & !present, 0, "young is a subset of present");
            for bit in (0..64).filter(|bit| present >> bit & 1 != 0) {
                let gfn = base.get() + to_u64(word) * 64 + bit;
                assert!(self.pages.insert(gfn, young >> bit & 1 != 0).is_none(), "told twice");
            }
        }
    }

    fn huge(&mut self, base: Gfn, level: Level, _: bool) {
        panic!("no huge page here: {base} {level}");
    }

    fn unknown(&mut self, range: GfnRange) {
        self.unknown.extend(range.start.get()..range.end.get());
    }
}

impl Told {
    fn young(&self) -> BTreeSet<u64> {
        self.pages.iter().filter(|(_, young)| **young).map(|(gfn, _)| *gfn).collect()
    }
}

/// Random pages of a subject, mapped and old.
fn some<S: Subject>(subject: &mut S, random: &mut Random, count: u64) -> Vec<u64> {
    let pages: BTreeSet<u64> = (0..count).map(|_| random.below(PAGES)).collect();
    pages.iter().for_each(|page| subject.map(*page));
    let all = subject.range(0, PAGES);
    let clear = AgeRequest::new(all, AgeMode::ClearFlush);
    assert_eq!(subject.age(clear, &mut Told::default()).mapped, to_u64(pages.len()));
    pages.into_iter().collect()
}

/// Touch a share of the pages; which they are, as gfns.
fn touch<S: Subject>(s: &mut S, random: &mut Random, pages: &[u64]) -> BTreeSet<u64> {
    let touched: Vec<u64> = pages.iter().copied().filter(|_| random.chance(1, 3)).collect();
    touched.iter().for_each(|page| s.touch(*page));
    touched.into_iter().map(|page| s.first() + page).collect()
}

fn exactly_what_was_touched<S: Subject>() {
    let (mut subject, mut random) = (S::new(), Random::new(3));
    let pages = some(&mut subject, &mut random, 700);
    for round in 0..6 {
        let touched = touch(&mut subject, &mut random, &pages);
        let all = subject.range(0, PAGES);
        // Looking writes nothing (R18): twice the same.
        let mut looks = [Told::default(), Told::default()];
        let reports: Vec<_> = looks
            .iter_mut()
            .map(|told| subject.age(AgeRequest::new(all, AgeMode::Test), told))
            .collect();
        assert_eq!((&looks[0], reports[0]), (&looks[1], reports[1]));
        let mut told = Told::default();
        let report = subject.age(AgeRequest::new(all, AgeMode::ClearFlush), &mut told);
        assert_eq!((told.young(), &told), (touched, &looks[0]), "round {round}");
        assert_eq!((report.mapped, report.next), (to_u64(pages.len()), all.end));
        assert_eq!(report.young, to_u64(told.young().len()));
        let again = subject.age(AgeRequest::new(all, AgeMode::Test), &mut Told::default());
        assert_eq!((again.mapped, again.young), (report.mapped, 0));
    }
    subject.finish();
}

fn slices_and_questions_agree<S: Subject>() {
    let (mut subject, mut random) = (S::new(), Random::new(4));
    let pages = some(&mut subject, &mut random, 900);
    for budget in [0, 1, 500, 513, 1500, u64::MAX] {
        let touched = touch(&mut subject, &mut random, &pages);
        let (start, end) = (random.below(300), PAGES - random.below(300));
        let asked = subject.range(start, end);
        let inside: BTreeSet<u64> =
            touched.iter().copied().filter(|gfn| asked.contains(Gfn::new(*gfn))).collect();
        // A bitmap, one page at a time, and the whole in slices.
        let words = vec![0; (end - start).div_ceil(64) as usize];
        let mut bits = words;
        let request = AgeRequest::new(asked, AgeMode::Test);
        let (mmu, reader) = subject.mmu();
        let report = mmu.age_bitmap(reader, request, &mut bits, &mut []);
        let is_set = |gfn: u64| bits[((gfn - asked.start.get()) / 64) as usize];
        for gfn in asked.start.get()..asked.end.get() {
            let bit = is_set(gfn) >> ((gfn - asked.start.get()) % 64) & 1 != 0;
            assert_eq!(bit, inside.contains(&gfn), "{gfn:#x}");
            if random.chance(1, 40) {
                let answer = mmu.age_gfn(reader, Gfn::new(gfn), AgeMode::Test, Effort::Full);
                assert_eq!(answer == AgeAnswer::Young, inside.contains(&gfn));
            }
        }
        assert_eq!(report.young, to_u64(inside.len()));
        let mut told = Told::default();
        let mut total = AgeReport::empty(asked.start);
        while total.next < asked.end {
            let rest = GfnRange::new(total.next, asked.end);
            let request = AgeRequest::new(rest, AgeMode::ClearFlush).with_budget(budget);
            let slice = subject.age(request, &mut told);
            assert!(slice.next > total.next, "every slice makes progress");
            total = total.merge(slice);
        }
        assert_eq!((told.young(), total.young), (inside.clone(), to_u64(inside.len())));
        let rest = subject.age(
            AgeRequest::new(subject.range(0, PAGES), AgeMode::ClearFlush),
            &mut Told::default(),
        );
        assert_eq!(rest.young, to_u64(touched.len() - inside.len()), "outside nothing was cleared");
    }
    subject.finish();
}

/// Fast: within the budget; each gfn is told, unknown, or not mapped; what is unknown is left
/// alone; nothing is flushed, and whoever is precise later owes it.
fn fast_calls_keep_their_bound<S: Subject>() {
    let (mut subject, mut random) = (S::new(), Random::new(5));
    let pages = some(&mut subject, &mut random, 900);
    let all = subject.range(0, PAGES);
    for budget in [0, 1, 3, 40, 511, 700, 1100, 3000, u64::MAX] {
        let touched = touch(&mut subject, &mut random, &pages);
        for mode in [AgeMode::Test, AgeMode::Clear] {
            let request = AgeRequest::new(all, mode).with_budget(budget);
            let mut told = Told::default();
            let report = subject.age(request.with_effort(Effort::Fast), &mut told);
            assert!(report.entries <= budget, "{report:?} of {budget}");
            assert_eq!(report.next, all.end);
            assert_eq!(report.unknown, to_u64(told.unknown.len()));
            let known = |gfn: &u64| !told.unknown.contains(gfn);
            let expected: BTreeSet<u64> = touched.iter().copied().filter(known).collect();
            assert_eq!(told.young(), expected, "budget {budget}");
            assert!(told.pages.keys().all(known), "told and unknown");
            assert!(budget != 0 || told.pages.is_empty());
            if mode == AgeMode::Clear {
                let mut rest = Told::default();
                let _ = subject.age(AgeRequest::new(all, AgeMode::ClearFlush), &mut rest);
                let left: BTreeSet<u64> = touched.difference(&expected).copied().collect();
                assert_eq!(rest.young(), left, "what was unknown was left alone");
            }
        }
    }
    // One page is within the bound that is stated for it, where answers are fast at all.
    let page = pages[7];
    subject.touch(page);
    let gfn = Gfn::new(subject.first() + page);
    let (mmu, reader) = subject.mmu();
    let asked = mmu.age_gfn(reader, gfn, AgeMode::Clear, Effort::Fast);
    assert_eq!(asked, AgeAnswer::Young, "{FAST_PAGE_BUDGET} entries will do");
    assert_eq!(mmu.age_gfn(reader, gfn, AgeMode::Clear, Effort::Fast), AgeAnswer::Old);
    subject.touch(page);
    let one = AgeRequest::new(GfnRange::from_len(gfn, 1), AgeMode::ClearFlush);
    assert_eq!(subject.ask(one), AgeAnswer::Old, "hidden by a TLB: nothing was flushed");
    subject.touch(page);
    assert_eq!(subject.ask(one), AgeAnswer::Young, "what was owed is flushed");
    subject.finish();
}

/// Row 5.2, and how it is mended: by a precise call or by a flush of what was aged.
fn caches_hide_until_a_flush<S: Subject>() {
    let mut subject = S::new();
    (0..40).for_each(|page| subject.touch(page));
    let all = subject.range(0, PAGES);
    let young =
        |subject: &mut S, mode| subject.age(AgeRequest::new(all, mode), &mut Told::default()).young;
    assert_eq!(young(&mut subject, AgeMode::Clear), 40);
    for flush in [false, true] {
        (3..9).for_each(|page| subject.touch(page));
        assert_eq!(young(&mut subject, AgeMode::Clear), 0, "hidden, and none invented");
        if flush {
            let (mmu, reader) = subject.mmu();
            mmu.flush_aged(reader, all);
        } else {
            assert_eq!(young(&mut subject, AgeMode::ClearFlush), 0);
        }
        (3..20).for_each(|page| subject.touch(page));
        assert_eq!(young(&mut subject, AgeMode::Clear), 17);
    }
    subject.finish();
}

fn answers_are_told_apart<S: Subject>() {
    let mut subject = S::new();
    let all = subject.range(0, PAGES);
    let look = |subject: &mut S, range| {
        let (mmu, reader) = subject.mmu();
        mmu.test_age(reader, range)
    };
    assert_eq!(look(&mut subject, all), AgeAnswer::Unmapped);
    subject.map(PAGES - 1);
    assert_eq!(look(&mut subject, all), AgeAnswer::Old, "what is mapped ahead is not accessed");
    subject.touch(PAGES - 1);
    assert_eq!(look(&mut subject, all), AgeAnswer::Young);
    let (front, back) = (subject.range(0, PAGES - 1), subject.range(PAGES - 1, PAGES));
    assert_eq!(look(&mut subject, front), AgeAnswer::Unmapped);
    assert_eq!(look(&mut subject, back), AgeAnswer::Young);
    assert_eq!(subject.ask(AgeRequest::new(all, AgeMode::Clear)), AgeAnswer::Young);
    assert_eq!(subject.ask(AgeRequest::new(all, AgeMode::Clear)), AgeAnswer::Old);
    let nothing = AgeRequest::new(all, AgeMode::Clear).with_budget(0);
    assert_eq!(subject.ask(nothing.with_effort(Effort::Fast)), AgeAnswer::Unknown);
    subject.unmap(PAGES - 1);
    assert_eq!(look(&mut subject, all), AgeAnswer::Unmapped);
    subject.finish();
}

/// Row 5.3.
fn aging_completes_while_somebody_holds_the_mmu_lock<S: Subject>() {
    let mut subject = S::new();
    (0..100).for_each(|page| subject.touch(page));
    subject.while_locked(|subject| {
        let all = subject.range(0, PAGES);
        let modes = [AgeMode::Test, AgeMode::Clear, AgeMode::ClearFlush, AgeMode::Test];
        let young =
            modes.map(|mode| subject.age(AgeRequest::new(all, mode), &mut Told::default()).young);
        assert_eq!(young, [100, 100, 0, 0]);
        let (mmu, reader) = subject.mmu();
        mmu.flush_aged(reader, all);
    });
    subject.finish();
}

macro_rules! suite {
    ($($(#[$test:meta])* fn $check:ident();)*) => {
        mod suite {
            $($(#[$test])*
            fn $check() {
                super::$check::<super::EptTables>();
                super::$check::<super::TrackedTables>();
                super::$check::<super::NptTables>();
                super::$check::<super::LegacyTables>();
                super::$check::<super::Aliased>();
            })*
        }
    };
}

suite! {
    #[test]
    fn exactly_what_was_touched();
    #[test]
    fn slices_and_questions_agree();
    #[test]
    fn fast_calls_keep_their_bound();
    #[test]
    fn caches_hide_until_a_flush();
    #[test]
    fn answers_are_told_apart();
    #[test]
    fn aging_completes_while_somebody_holds_the_mmu_lock();
}

/// Which MMU is fast is known at run time, and changes.
#[test]
fn abilities_are_facts_of_the_moment() {
    let mut direct = EptTables::new();
    assert_eq!(direct.mmu().0.abilities(), AgeAbilities::all());
    direct.finish();
    let mut tracked = TrackedTables::new();
    assert_eq!(tracked.mmu().0.abilities(), AgeAbilities::FAST);
    tracked.finish();
    let mut aliased = Aliased::new();
    assert!(aliased.mmu.abilities().contains(AgeAbilities::FAST));
    aliased.map(5);
    assert_eq!(aliased.mmu.abilities(), AgeAbilities::HARDWARE_BITS);
    // And so it is: a chain that somebody holds makes its page unknown, not the caller wait.
    let mmu = Arc::clone(&aliased.mmu);
    let gfn = Gfn::new(5);
    let ask = |mode| mmu.age_gfn(&mut (), gfn, mode, Effort::Fast);
    aliased.touch(5);
    assert_eq!(mmu.chain_held(5, || ask(AgeMode::Clear)), AgeAnswer::Unknown);
    assert_eq!(ask(AgeMode::Clear), AgeAnswer::Young);
    aliased.finish();
}

/// R12: who holds the lock exclusively stores plainly over an entry that it found without volatile
/// bits. Before the ager's exchange: that is lost, and the store stays. After it: what the ager did
/// may be undone. No other bit is touched. (Models cannot show it: in loom a store and an exchange
/// that race have no order.)
#[test]
fn a_plain_store_beside_an_ager_loses_no_more_than_the_accessed_bit() {
    let domain = EpochDomain::new(1, std::thread::yield_now).expect("in range");
    let lock = Arc::new(MmuLock::new(Arc::clone(&domain)));
    let holder = Arc::new(Mutex::new(domain.register().expect("room")));
    for before in [true, false] {
        let mmu = Arc::new(AliasMmu::new(1, 1));
        let entry = mmu.map(0, true);
        let read = mmu.entry(entry);
        assert!(mmu.config().is_accessed(read));
        let stored = mmu.config().write_protected(read);
        let (lock, holder) = (Arc::clone(&lock), Arc::clone(&holder));
        let store = move |cell: &SpteCell| {
            let mut holder = holder.lock().unwrap();
            cell.store(&lock.exclusive(&mut holder), stored);
        };
        if before {
            mmu.step_in(Some(Box::new(store)));
        } else {
            let aged = mmu.config().age(read);
            let cell = mmu.cell(entry);
            cell.try_change(read, aged).expect("alone");
            store(cell);
        }
        let answer = mmu.age_gfn(&mut (), Gfn::new(0), AgeMode::Clear, Effort::Full);
        assert_eq!(answer, AgeAnswer::Young, "it was used, or is said to be once more");
        let now = mmu.entry(entry);
        let expected = if before { stored } else { mmu.config().age(stored) };
        assert_eq!(now, expected);
        mmu.step_in(None);
        assert!(mmu.unmap(0, entry) == before, "a zap tells what is left");
    }
}
