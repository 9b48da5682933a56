//! Huge leaves that are split and tables that a huge leaf replaces, against each operation that may
//! be in them: every interleaving, the shipped code on tables of two entries.
//!
//! As `loom_pairs`, which see. Besides: the processor may have cached the entry that leads to the
//! table, and a frame that a removed table gave back is used at once for something else, by a
//! stranger's leaf; who still reads or writes it is found out. At the end the tree passes `check`
//! (no FROZEN, every table in its place), the gauges equal a recount, debts are paid, no write and
//! no access is lost, every page that nobody took away is mapped, and no frame is in use.
#![cfg(loom)]

mod loom_common;

use std::sync::Arc;

use loom::thread;
use loom_common::{
    Accessed, BOTH, GFN, Modelled, NEIGHBOUR, Vcpu, World, explore, explore_up_to, take_fault,
    write_fault,
};
use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Level, PAGE_SIZE, Pfn};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::frame::FrameList;
use mmu_core::slot::LogOptions;
use mmu_core::spte::{Capabilities, Ept, Legacy, Spte};
use mmu_core::stats::Counter;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use tdp_mmu::{TdpOptions, ZapReport};

const PAGE: GfnRange = GfnRange::from_len(GFN, 1);
/// Between the page and the one that a stranger's leaf maps.
const STRANGE: u64 = 0x1000 * PAGE_SIZE;

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// A small write fault on the page: splits a huge leaf.
    Small,
    /// The same on the page beside it.
    SmallBeside,
    /// A huge write fault on the page: replaces a table. Whoever made a frame free by that uses it.
    Huge,
    /// The table is replaced by a call, without a fault. Frames as for `Huge`.
    CollapseRange,
    /// The table is taken out, so that a huge page may come back, and its frame used.
    Recover,
    /// The host gives the page another place and says which.
    ChangePage,
    /// Both before the guest asks: where entries are access-tracked, the fast path would take a
    /// fault on a page that is there.
    PrefaultSmall,
    PrefaultHuge,
    /// A write fault that the fast path fixes.
    Fast,
    /// The host takes the page away and has another one, and only small ones.
    ZapPage,
    /// The host takes both pages away and has another huge one.
    ZapBoth,
    /// Zap-all, to the end.
    ZapRoot,
    /// Test and clear the accessed bits.
    Age,
    /// The processor writes to the page, or reads it, twice.
    Access,
}

/// What there is when the threads start. Both vCPUs remember the table, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A huge leaf, accessed and dirty, and in the TLB.
    Huge,
    /// The same, neither accessed nor dirty.
    HugeClean,
    /// The same, write-protected too; W may be given back.
    HugeProtected,
    /// The page is mapped by a small leaf, accessed and dirty; the one beside it is not.
    Table,
    /// The same, neither accessed nor dirty.
    TableClean,
    /// The same, write-protected too; W may be given back.
    TableProtected,
    /// As `Table`, by a fetch under the NX mitigation: a huge page would be there otherwise.
    Executed,
    /// The same, neither accessed nor dirty.
    ExecutedClean,
}

impl State {
    fn is_executed(self) -> bool {
        matches!(self, Self::Executed | Self::ExecutedClean)
    }

    fn is_huge(self) -> bool {
        matches!(self, Self::Huge | Self::HugeClean | Self::HugeProtected)
    }

    /// Pages mapped, and written and accessed, when the threads start.
    fn pages(self) -> &'static [Gfn] {
        if self.is_huge() { &[NEIGHBOUR, GFN] } else { &[GFN] }
    }

    fn used(self) -> &'static [Gfn] {
        if matches!(self, Self::Huge | Self::Table | Self::Executed) { self.pages() } else { &[] }
    }
}

/// A frame in use for something else, and what its last entry maps.
#[derive(Debug)]
struct Reused {
    frame: Pfn,
    stranger: Spte,
}

/// What a thread saw.
#[derive(Debug, Default)]
struct Seen {
    fault: Option<FaultOutcome>,
    zapped: Option<ZapReport>,
    accessed: Accessed,
    young: u64,
    reused: Option<Reused>,
}

fn prepare<F: Modelled>(world: &World<F>, vcpus: &mut [Vcpu<F>; 2], state: State) {
    world.vm.host().set_huge(true);
    let level = if state.is_huge() { Level::L2 } else { Level::L1 };
    let fault = match state {
        state if state.is_executed() => {
            PageFault::new(GFN.address(), PfErrorCode::FETCH).at_most(Level::L2)
        }
        _ => write_fault(GFN, level, false),
    };
    for (vcpu, outcome) in vcpus.iter_mut().zip([FaultOutcome::Fixed, FaultOutcome::Spurious]) {
        assert_eq!(take_fault(vcpu, &fault), outcome);
    }
    assert_eq!(world.vm.stats().get(Counter::NxSplits), u64::from(state.is_executed()));
    let config = world.mmu.config();
    match state {
        State::Huge | State::Table | State::Executed => {}
        State::HugeClean | State::TableClean | State::ExecutedClean => {
            world.adjust(GFN, |leaf| config.age(config.clear_dirty(leaf)));
        }
        State::HugeProtected | State::TableProtected => {
            world.adjust(GFN, |leaf| config.age(config.clear_dirty(leaf)).without(F::WRITABLE));
        }
    }
    assert_eq!(world.leaf(GFN).map(|(_, level)| level), Some(level));
    world.fill_tlb(BOTH);
    if !state.is_huge() {
        world.fill_upper();
    }
}

/// Use a free frame, by preference one that was given back, for something else.
fn reuse<F: Modelled>(world: &World<F>, stranger: Spte) -> Option<Reused> {
    let pool = world.vm.pool();
    let frame = pool.take(1, 1).ok()?.pop(pool.map())?;
    let [first, last] = pool.owned_table(frame).entries();
    first.init(Spte::EMPTY);
    last.init(stranger);
    Some(Reused { frame, stranger })
}

fn prefault(level: Level) -> PageFault {
    PageFault::prefetch(GFN.address(), Access::WRITE).at_most(level)
}

fn zap<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>, range: GfnRange) -> ZapReport {
    let host = world.vm.host();
    let invalidation = world.vm.notify().begin(vcpu.actor().participant(), range);
    host.replace(range);
    // One page of another place makes a huge one impossible.
    host.set_huge(range == BOTH);
    let report = world.mmu.unmap_in(vcpu.actor(), &invalidation, range);
    let stale = host.is_stale(range);
    host.release(range);
    drop(invalidation);
    assert!(!stale, "used after the unmap returned (I11)");
    report
}

fn change_page<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>) -> ZapReport {
    let host = world.vm.host();
    let invalidation = world.vm.notify().begin(vcpu.actor().participant(), PAGE);
    host.replace(PAGE);
    host.set_huge(false);
    let page = host.page(GFN);
    let done = world.mmu.change_pte_in(vcpu.actor(), &invalidation, 0, GFN, page);
    let stale = host.is_stale(PAGE);
    host.release(PAGE);
    drop(invalidation);
    assert!(!stale, "the old page is used after the call returned (I11)");
    done.expect("a page in range").taken
}

fn run<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>, op: Op, stranger: Spte) -> Seen {
    let mut seen = Seen::default();
    match op {
        Op::Small => seen.fault = Some(take_fault(vcpu, &write_fault(GFN, Level::L1, false))),
        Op::SmallBeside => {
            seen.fault = Some(take_fault(vcpu, &write_fault(NEIGHBOUR, Level::L1, false)));
        }
        Op::Huge => {
            seen.fault = Some(take_fault(vcpu, &write_fault(GFN, Level::L2, false)));
            seen.reused = reuse(world, stranger);
        }
        Op::CollapseRange => {
            let _ = world.mmu.collapse(vcpu.actor(), 0, BOTH);
            seen.reused = reuse(world, stranger);
        }
        Op::Recover => {
            seen.zapped = Some(world.mmu.recover_nx(vcpu.actor(), 1).zapped);
            seen.reused = reuse(world, stranger);
        }
        Op::ChangePage => seen.zapped = Some(change_page(world, vcpu)),
        Op::PrefaultSmall => seen.fault = Some(take_fault(vcpu, &prefault(Level::L1))),
        Op::PrefaultHuge => {
            seen.fault = Some(take_fault(vcpu, &prefault(Level::L2)));
            seen.reused = reuse(world, stranger);
        }
        Op::Fast => seen.fault = Some(take_fault(vcpu, &write_fault(GFN, Level::L1, true))),
        Op::ZapPage => seen.zapped = Some(zap(world, vcpu, PAGE)),
        Op::ZapBoth => seen.zapped = Some(zap(world, vcpu, BOTH)),
        Op::ZapRoot => {
            let zap = world.mmu.invalidate_roots(vcpu.actor());
            seen.zapped = Some(zap.finish(vcpu.actor()));
        }
        Op::Age => {
            let request = AgeRequest::new(BOTH, AgeMode::Clear).with_budget(16);
            seen.young = world.mmu.age(vcpu.actor(), request, &mut CountOnly).young;
        }
        Op::Access => {
            let accesses = [world.access(GFN), world.access(GFN)];
            seen.accessed.read = accesses.iter().any(|accessed| accessed.read);
            seen.accessed.wrote = accesses.iter().any(|accessed| accessed.wrote);
        }
    }
    seen
}

/// What must hold when both have ended.
fn judge<F: Modelled>(
    world: &World<F>,
    vcpus: &mut [Vcpu<F>; 2],
    (state, ops): (State, [Op; 2]),
    seen: &[Seen; 2],
) {
    let config = world.mmu.config();
    let leaf = |gfn| world.leaf(gfn).map(|(leaf, _)| leaf);
    for vcpu in vcpus.iter_mut().filter(|vcpu| !vcpu.root_is_current()) {
        assert_eq!(leaf(GFN).or(leaf(NEIGHBOUR)), None, "mapped after a zap-all");
        vcpu.unload_root();
    }
    world.check(&mut vcpus[0]);
    for Reused { frame, stranger } in seen.iter().filter_map(|seen| seen.reused.as_ref()) {
        let pool = world.vm.pool();
        let now = pool.owned_table(*frame).entries().each_ref().map(|cell| cell.load());
        assert_eq!(now, [Spte::EMPTY, *stranger], "written to after it was given back (I13)");
        let mut frames = FrameList::new();
        frames.push(pool.map(), *frame);
        pool.give_back(frames);
    }

    let zaps = || seen.iter().filter_map(|seen| seen.zapped);
    if zaps().next().is_none() {
        for &gfn in state.pages() {
            assert!(leaf(gfn).is_some(), "nobody took {gfn} away");
        }
        for (op, seen) in ops.iter().zip(seen) {
            let gfn = if *op == Op::SmallBeside { NEIGHBOUR } else { GFN };
            let done = seen.fault.is_some_and(|outcome| outcome != FaultOutcome::Retry);
            let may = || leaf(gfn).is_some_and(|leaf| config.permits(leaf, Access::WRITE));
            let aged = ops.contains(&Op::Age) && !config.ad_enabled();
            if done && !may() && ops.contains(&Op::CollapseRange) {
                // The leaf was put together before the fault gave W back: the guest faults again.
                let again = write_fault(gfn, Level::L1, true);
                assert_eq!(take_fault(&mut vcpus[0], &again), FaultOutcome::Fixed);
            }
            assert!(!done || may() || aged, "the fault gave nothing: {op:?}");
        }
    }
    let count = |has: &dyn Fn(Spte) -> bool| {
        u64::try_from([NEIGHBOUR, GFN].into_iter().filter_map(leaf).filter(|l| has(*l)).count())
            .expect("few")
    };
    let at_first = u64::try_from(state.used().len()).expect("few");
    let is_new = |done| u64::from(done && at_first == 0);
    let wrote = at_first + is_new(seen.iter().any(|seen| seen.accessed.wrote));
    let dirty = zaps().map(|zap| zap.dirty).sum::<u64>() + count(&|leaf| config.is_dirty(leaf));
    assert!(dirty >= wrote, "a write was lost (I8)");
    let read = at_first + is_new(seen.iter().any(|seen| seen.accessed.read));
    let young = zaps().map(|zap| zap.young).sum::<u64>()
        + seen.iter().map(|seen| seen.young).sum::<u64>()
        + count(&|leaf| config.is_accessed(leaf));
    assert!(young >= read || !config.ad_enabled(), "an access was lost (I8)");
}

fn body<F: Modelled>(state: State, ops: [Op; 2]) {
    let nx_huge_pages = state.is_executed();
    let capabilities = Capabilities { nx_huge_pages, ..F::capabilities() };
    let (world, mut vcpus, slots) =
        World::<F>::made(capabilities, TdpOptions::default(), LogOptions::default());
    prepare(&world, &mut vcpus, state);
    let (leaf, _) = world.leaf(GFN).expect("mapped");
    let stranger = Spte::from_raw(leaf.with(F::ACCESSED).raw() ^ STRANGE);
    if ops.contains(&Op::Access) {
        world.vm.host().run_cpu();
    }
    let [mut vcpu, mut other] = vcpus;
    let shared = Arc::clone(&world);
    let thread = thread::spawn(move || {
        let seen = run(&shared, &mut other, ops[1], stranger);
        (seen, other)
    });
    let mine = run(&world, &mut vcpu, ops[0], stranger);
    let (theirs, other) = thread.join().expect("no panic");
    let mut vcpus = [vcpu, other];
    judge(&world, &mut vcpus, (state, ops), &[mine, theirs]);
    world.tear_down(vcpus);
    drop(slots);
}

macro_rules! shapes {
    ($($(#[$test:meta])* fn $name:ident($format:ty, $state:ident, $first:ident, $second:ident);)*)
    => {
        $($(#[$test])*
        fn $name() {
            explore(concat!("tdp::", stringify!($name)), || {
                body::<$format>(State::$state, [Op::$first, Op::$second]);
            });
        })*
    };
}

shapes! {
    #[test]
    fn split_against_collapse(Legacy, HugeClean, Small, Huge);
    #[test]
    fn split_against_zap_of_the_page(Legacy, Huge, Small, ZapPage);
    #[test]
    fn split_against_zap_of_all_of_it(Legacy, Huge, Small, ZapBoth);
    #[test]
    fn split_against_zap_root(Legacy, Huge, Small, ZapRoot);
    #[test]
    fn split_against_age(Legacy, Huge, Small, Age);
    #[test]
    fn split_against_age_without_hardware_bits(Ept, Huge, PrefaultSmall, Age);
    #[test]
    fn split_against_fast_fault(Legacy, HugeProtected, Small, Fast);
    #[test]
    fn split_beside_a_fast_fault(Legacy, HugeProtected, SmallBeside, Fast);
    #[test]
    fn split_against_split(Legacy, HugeClean, Small, SmallBeside);
    #[test]
    fn split_against_access(Legacy, HugeClean, Small, Access);

    #[test]
    fn collapse_against_fault_below(Legacy, Table, Huge, SmallBeside);
    #[test]
    fn collapse_against_zap(Legacy, Table, Huge, ZapBoth);
    #[test]
    fn collapse_against_zap_root(Legacy, Table, Huge, ZapRoot);
    #[test]
    fn collapse_against_age(Legacy, Table, Huge, Age);
    #[test]
    fn collapse_against_age_without_hardware_bits(Ept, Table, PrefaultHuge, Age);
    #[test]
    fn collapse_against_fast_fault(Legacy, TableProtected, Huge, Fast);
    #[test]
    fn collapse_against_access_through_the_table(Legacy, TableClean, Huge, Access);

    #[test]
    fn collapse_of_a_range_against_fault_below(Legacy, Table, CollapseRange, SmallBeside);
    #[test]
    fn collapse_of_a_range_against_zap(Legacy, Table, CollapseRange, ZapBoth);
    #[test]
    fn collapse_of_a_range_against_zap_of_the_page(Legacy, Table, CollapseRange, ZapPage);
    #[test]
    fn collapse_of_a_range_against_age(Legacy, Table, CollapseRange, Age);
    #[test]
    fn collapse_of_a_range_against_fast_fault(Legacy, TableProtected, CollapseRange, Fast);
    #[test]
    fn collapse_of_a_range_against_access(Legacy, TableClean, CollapseRange, Access);

    #[test]
    fn change_of_page_against_fault(Legacy, Table, ChangePage, Small);
    #[test]
    fn change_of_page_against_fast_fault(Legacy, TableProtected, ChangePage, Fast);
    #[test]
    fn change_of_page_against_split(Legacy, Huge, ChangePage, SmallBeside);
    #[test]
    fn change_of_page_against_collapse(Legacy, Table, ChangePage, Huge);
    #[test]
    fn change_of_page_against_age(Legacy, Table, ChangePage, Age);
    #[test]
    fn change_of_page_against_zap(Legacy, Table, ChangePage, ZapRoot);
    #[test]
    fn change_of_page_against_access(Legacy, TableClean, ChangePage, Access);

    #[test]
    fn recover_against_fault_below(Legacy, Executed, Recover, SmallBeside);
    #[test]
    fn recover_against_huge_fault(Legacy, Executed, Recover, Huge);
    #[test]
    fn recover_against_age(Legacy, Executed, Recover, Age);
    #[test]
    fn recover_against_access(Legacy, ExecutedClean, Recover, Access);
    #[test]
    fn recover_against_recover(Legacy, Executed, Recover, Recover);
}

/// Two that wait for everybody: unbounded, these did not end within minutes.
macro_rules! bounded {
    ($($name:ident: $bound:literal, $state:ident, $first:ident, $second:ident;)*) => {
        $(#[test]
        fn $name() {
            explore_up_to(concat!("tdp::", stringify!($name)), $bound, || {
                body::<Legacy>(State::$state, [Op::$first, Op::$second]);
            });
        })*
    };
}

bounded! {
    collapse_of_a_range_against_zap_root: 5, Table, CollapseRange, ZapRoot;
    recover_against_zap_of_the_page: 4, Executed, Recover, ZapPage;
    recover_against_zap_root: 4, Executed, Recover, ZapRoot;
}
