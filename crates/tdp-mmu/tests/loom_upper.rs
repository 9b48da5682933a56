//! Passes that use upper accessed bits, against a processor and against what changes the tree:
//! every interleaving, the shipped code on tables of two entries (KVM row 5.25).
//!
//! Everything is old, flushed and believed when the threads start. One makes two precise passes;
//! the other is a processor, or changes the tree and then is one. Its TLB and its cache of upper
//! entries never evict. What it touches after a pass has returned, or before the first began, must
//! be told young by a later pass that leaves out what nobody walked into. What it touches during a
//! pass may be missed by such passes, but stays young for one that looks at everything.
#![cfg(loom)]

mod loom_common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use loom::thread;
use loom_common::{
    BOTH, GFN, Modelled, NEIGHBOUR, Order, Vcpu, World, explore, explore_up_to, take_fault,
    write_fault,
};
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::spte::Legacy;
use mmu_core::traits::{AgeMode, AgeRange, AgeReport, AgeRequest, CountOnly, UpperBits};

/// What the other thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// Touches the page, twice: the second time through what it has cached.
    Touch(Order),
    /// Faults the neighbour in, which may link a table, and touches it.
    Fault(Order),
    /// Splits the huge leaf by a small fault on the page, and touches it.
    Split,
    /// Touches the page, and replaces its table by a huge leaf.
    Collapse,
    /// Touches the page, and the host takes it away.
    Zap,
    /// Makes a pass too, and touches the page.
    Pass,
}

/// What there is when the threads start: old, flushed, in no cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Empty,
    Table,
    Huge,
}

/// Passes that the first thread has begun and ended: the time of an access. Not modelled: it is
/// read and written between steps that are.
#[derive(Debug, Default)]
struct Clock(AtomicU64);

impl Clock {
    fn tick(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Is a pass under way?
    fn within(&self) -> bool {
        self.now() % 2 == 1
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// An access, and when it was made.
#[derive(Clone, Copy, Debug)]
struct Touched {
    gfn: Gfn,
    /// It began and ended outside of passes, after so many ticks.
    owed: Option<u64>,
}

/// What the other thread did.
#[derive(Debug, Default)]
struct Seen {
    touched: Vec<Touched>,
    zapped_young: u64,
    report: Option<AgeReport>,
}

fn request(mode: AgeMode) -> AgeRequest {
    AgeRequest::new(BOTH, mode).with_upper(UpperBits::Use)
}

fn age<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>, mode: AgeMode) -> AgeReport {
    world.mmu.age(vcpu.actor(), request(mode), &mut CountOnly)
}

fn touch<F: Modelled>(world: &World<F>, clock: &Clock, gfn: Gfn, order: Order, seen: &mut Seen) {
    let (before, within) = (clock.now(), clock.within());
    if world.touch(gfn, order) {
        let owed = (!within && clock.now() == before).then_some(before);
        seen.touched.push(Touched { gfn, owed });
    }
}

fn run<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>, clock: &Clock, op: Op) -> Seen {
    let mut seen = Seen::default();
    match op {
        Op::Touch(order) => {
            touch(world, clock, GFN, order, &mut seen);
            touch(world, clock, GFN, order, &mut seen);
        }
        Op::Fault(order) => {
            let _ = take_fault(vcpu, &write_fault(NEIGHBOUR, Level::L1, false));
            touch(world, clock, NEIGHBOUR, order, &mut seen);
        }
        Op::Split => {
            let _ = take_fault(vcpu, &write_fault(GFN, Level::L1, false));
            touch(world, clock, GFN, Order::LinksFirst, &mut seen);
        }
        Op::Collapse => {
            touch(world, clock, GFN, Order::LeafFirst, &mut seen);
            world.vm.host().set_huge(true);
            let _ = world.mmu.collapse(vcpu.actor(), 0, BOTH);
        }
        Op::Zap => {
            touch(world, clock, GFN, Order::LinksFirst, &mut seen);
            let page = GfnRange::from_len(GFN, 1);
            let invalidation = world.vm.notify().begin(vcpu.actor().participant(), page);
            world.vm.host().replace(page);
            seen.zapped_young = world.mmu.unmap_in(vcpu.actor(), &invalidation, page).young;
            drop(invalidation);
        }
        Op::Pass => {
            seen.report = Some(age(world, vcpu, AgeMode::ClearFlush));
            touch(world, clock, GFN, Order::LinksFirst, &mut seen);
        }
    }
    seen
}

fn prepare<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>, state: State) {
    world.vm.host().set_huge(state == State::Huge);
    if state != State::Empty {
        let level = if state == State::Huge { Level::L2 } else { Level::L1 };
        let _ = take_fault(vcpu, &write_fault(GFN, level, false));
    }
    let _ = age(world, vcpu, AgeMode::ClearFlush);
    let again = age(world, vcpu, AgeMode::Test);
    assert_eq!(again.young, 0);
    assert_eq!(again.idle != 0, state == State::Table, "left out where it can be");
    world.vm.host().run_cpu();
}

fn body<F: Modelled>(state: State, op: Op, passes: u64) {
    let (world, [mut vcpu, mut other], slots) = World::<F>::new();
    prepare(&world, &mut vcpu, state);
    let clock = Arc::new(Clock::default());
    let (shared, theirs) = (Arc::clone(&world), Arc::clone(&clock));
    let thread = thread::spawn(move || {
        let seen = run(&shared, &mut other, &theirs, op);
        (seen, other)
    });
    // The pages told young by each pass, and the tick at which it began.
    let mut told = Vec::new();
    for _ in 0..passes {
        clock.tick();
        let begun = clock.now();
        told.push((begun, age(&world, &mut vcpu, AgeMode::ClearFlush)));
        clock.tick();
    }
    let (seen, mut other) = thread.join().expect("no panic");
    let leaf = world.leaf(GFN).or(world.leaf(NEIGHBOUR));
    let still_young = leaf.is_some_and(|(leaf, _)| world.mmu.config().is_accessed(leaf));
    let late = age(&world, &mut vcpu, AgeMode::Test);
    let young = |report: &AgeReport| report.young + report.lost > 0;
    let elsewhere = seen.zapped_young > 0 || seen.report.as_ref().is_some_and(young);
    for access in &seen.touched {
        // Young to whoever looked after it: to a pass that began later, or to the last look.
        let later = |begun: u64| access.owed.is_none_or(|owed| begun > owed);
        let passed = told.iter().any(|(begun, report)| later(*begun) && young(report));
        let found = passed || young(&late) || elsewhere;
        let owed = access.owed.is_some();
        assert!(found || !owed, "{access:?} is lost: {told:?}, {late:?}, {seen:?}");
        assert!(found || still_young, "{access:?} left no trace (I8)");
    }
    world.check(&mut other);
    world.tear_down([vcpu, other]);
    drop(slots);
}

macro_rules! upper {
    ($($name:ident: $format:ty, $state:ident, $op:expr, $passes:literal $(, $bound:literal)?;)*)
    => {
        $(#[test]
        fn $name() {
            let name = concat!("tdp::", stringify!($name));
            upper!(@run name, || body::<$format>(State::$state, $op, $passes) $(, $bound)?);
        })*
    };
    (@run $name:ident, $body:expr) => { explore($name, $body) };
    (@run $name:ident, $body:expr, $bound:literal) => { explore_up_to($name, $bound, $body) };
}

upper! {
    upper_pass_against_touches: Legacy, Table, Op::Touch(Order::LinksFirst), 2;
    upper_pass_against_touches_leaf_first: Legacy, Table, Op::Touch(Order::LeafFirst), 2;
    upper_pass_against_touches_of_a_huge_page: Legacy, Huge, Op::Touch(Order::LinksFirst), 2;
    upper_pass_against_fault: Legacy, Table, Op::Fault(Order::LeafFirst), 1;
    upper_pass_against_link: Legacy, Empty, Op::Fault(Order::LinksFirst), 1;
    upper_pass_against_split: Legacy, Huge, Op::Split, 1;
    upper_pass_against_collapse: Legacy, Table, Op::Collapse, 1, 2;
    upper_pass_against_zap: Legacy, Table, Op::Zap, 1;
    upper_pass_against_pass: Legacy, Table, Op::Pass, 1;
}
