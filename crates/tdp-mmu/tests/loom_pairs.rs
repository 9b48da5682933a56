//! Every pair of {fault, fast fault, zap leaf, zap root, age, processor, lookup}, every
//! interleaving: the shipped code on tables of two entries, one gfn, and whatever the two
//! operations do to it.
//!
//! Locks and sections are there by their contract; they have exhaustive models of their own. The
//! processor is a thread that walks the live tables and sets A and D by compare-exchange; a flush
//! waits until it is between two accesses and empties its TLB, a reload keeps it out. When the two
//! have ended: the tree passes `check`, the gauges equal a recount, no A, D or mapping is lost, no
//! page that was taken away is mapped or cached, and teardown leaves no frame in use.
#![cfg(loom)]

mod loom_common;

use std::sync::Arc;

use loom::thread;
use loom_common::{
    Accessed, GFN, Modelled, Vcpu, World, explore, explore_shipped, explore_up_to, take_fault,
    write_fault,
};
use mmu_core::addr::{GfnRange, Level};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::{Ept, Legacy};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use tdp_mmu::ZapReport;

const PAGE: GfnRange = GfnRange::from_len(GFN, 1);

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// A write fault on a page that is not there.
    Fault,
    /// A write fault that the fast path fixes: it restores a tracked entry, or gives W back.
    Fast,
    /// The host takes the page away and has another one from then on.
    ZapLeaf,
    /// Zap-all, to the end.
    ZapRoot,
    /// Test and clear the accessed bit.
    Age,
    /// The processor writes to the page, or reads it.
    Access,
    Lookup,
}

/// What the page is when the threads start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No table but the root.
    Empty,
    /// Mapped, accessed and dirty, and in the TLB.
    Used,
    /// Mapped, neither accessed nor dirty (with hardware A/D).
    Clean,
    /// Write-protected, as for a dirty log, and clean; W may be given back.
    Protected,
    /// Access-tracked and clean (without hardware A/D).
    Tracked,
}

/// What a thread saw.
#[derive(Debug, Default)]
struct Seen {
    fault: Option<FaultOutcome>,
    zapped: Option<ZapReport>,
    accessed: Accessed,
    young: u64,
    /// The processor had a page that was taken away when the unmap returned.
    stale: bool,
}

fn prepare<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>, state: State) {
    if state == State::Empty {
        return;
    }
    assert_eq!(take_fault(vcpu, &write_fault(GFN, Level::L1, false)), FaultOutcome::Fixed);
    let config = world.mmu.config();
    match state {
        State::Empty | State::Used => {}
        State::Clean => world.adjust(GFN, |leaf| config.age(config.clear_dirty(leaf))),
        State::Protected => {
            world.adjust(GFN, |leaf| config.clear_dirty(leaf).without(F::WRITABLE));
        }
        State::Tracked => world.adjust(GFN, |leaf| config.age(config.clear_dirty(leaf))),
    }
    world.fill_tlb(PAGE);
}

fn run<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>, op: Op) -> Seen {
    let mut seen = Seen::default();
    match op {
        Op::Fault => seen.fault = Some(take_fault(vcpu, &write_fault(GFN, Level::L1, false))),
        Op::Fast => seen.fault = Some(take_fault(vcpu, &write_fault(GFN, Level::L1, true))),
        Op::ZapLeaf => {
            let notify = world.vm.notify();
            let invalidation = notify.begin(vcpu.actor().participant(), PAGE);
            world.vm.host().replace(PAGE);
            seen.zapped = Some(world.mmu.unmap_in(vcpu.actor(), &invalidation, PAGE));
            seen.stale = world.vm.host().is_stale(PAGE);
            drop(invalidation);
        }
        Op::ZapRoot => {
            let zap = world.mmu.invalidate_roots(vcpu.actor());
            seen.zapped = Some(zap.finish(vcpu.actor()));
        }
        Op::Age => {
            let request = AgeRequest::new(PAGE, AgeMode::Clear).with_budget(16);
            seen.young = world.mmu.age(vcpu.actor(), request, &mut CountOnly).young;
        }
        Op::Access => seen.accessed = world.access(GFN),
        Op::Lookup => {
            for (level, spte) in world.mmu.lookup(vcpu.actor(), 0, GFN) {
                let known = spte.is_empty() || spte.is_mmu_present();
                assert!(known && (level == Level::L1 || !spte.is_leaf(level)), "{spte:?}");
            }
        }
    }
    seen
}

/// What must hold when both have ended.
fn judge<F: Modelled>(
    world: &World<F>,
    vcpus: &mut [Vcpu<F>; 2],
    state: State,
    ops: [Op; 2],
    seen: [Seen; 2],
) {
    let config = world.mmu.config();
    assert!(seen.iter().all(|seen| !seen.stale), "used after the unmap returned (I11)");
    let leaf = world.leaf(GFN).map(|(leaf, _)| leaf);
    for vcpu in vcpus.iter_mut().filter(|vcpu| !vcpu.root_is_current()) {
        // Entries of an invalid root are nobody's; what is left of it is its frame.
        assert_eq!(leaf, None, "mapped after a zap-all");
        vcpu.unload_root();
    }
    let [vcpu, _] = vcpus;
    assert_eq!(world.check(vcpu), [u64::from(leaf.is_some()), 0, 0]);

    let zaps = || seen.iter().filter_map(|seen| seen.zapped);
    let zapped: u64 = zaps().map(|report| report.pages()).sum();
    let was = u64::from(state != State::Empty);
    let installs = zapped + u64::from(leaf.is_some()) - was;
    let fixed = seen.iter().filter(|seen| seen.fault == Some(FaultOutcome::Fixed)).count();
    assert!(installs <= u64::try_from(fixed).expect("few"), "mapped by nobody");
    if was == 1 && zaps().next().is_none() {
        assert!(leaf.is_some(), "nobody took the page away");
    }

    // Where no hardware records a write, who was allowed to write has to count as having done so.
    let may_have = !config.ad_enabled() && fixed > 0;
    let wrote = seen.iter().any(|seen| seen.accessed.wrote) || state == State::Used || may_have;
    let dirty = zaps().any(|report| report.dirty > 0) || leaf.is_some_and(|l| config.is_dirty(l));
    assert!(dirty || !wrote, "a write was lost (I8)");
    let read = seen.iter().any(|seen| seen.accessed.read) || state == State::Used;
    let young = zaps().any(|report| report.young > 0)
        || seen.iter().any(|seen| seen.young > 0)
        || leaf.is_some_and(|leaf| config.is_accessed(leaf))
        // Without hardware A/D only a fault tells of an access, and an access without one is not
        // an access that the tracking could see.
        || !config.ad_enabled();
    assert!(young || !read, "an access was lost (I8)");
    for (op, seen) in ops.iter().zip(&seen) {
        let restored = *op == Op::Fast && seen.fault == Some(FaultOutcome::Fixed);
        if restored && ops.iter().filter(|op| matches!(op, Op::Fast | Op::Fault)).count() == 2 {
            assert!(leaf.is_some_and(|leaf| config.is_writable(leaf)), "W was lost (I8)");
        }
    }
}

fn body<F: Modelled>(ops: [Op; 2], state: State) {
    let (world, [mut vcpu, mut other], slots) = World::<F>::new();
    prepare(&world, &mut vcpu, state);
    if ops.contains(&Op::Access) {
        world.vm.host().run_cpu();
    }
    let shared = Arc::clone(&world);
    let thread = thread::spawn(move || {
        let seen = run(&shared, &mut other, ops[1]);
        (seen, other)
    });
    let mine = run(&world, &mut vcpu, ops[0]);
    let (theirs, other) = thread.join().expect("no panic");
    let mut vcpus = [vcpu, other];
    judge(&world, &mut vcpus, state, ops, [mine, theirs]);
    world.tear_down(vcpus);
    drop(slots);
}

macro_rules! pairs {
    ($($name:ident: $format:ty, $state:ident, $first:ident, $second:ident;)*) => {
        $(#[test]
        fn $name() {
            explore(concat!("tdp::", stringify!($name)), || {
                body::<$format>([Op::$first, Op::$second], State::$state);
            });
        })*
    };
}

pairs! {
    fault_against_fault: Legacy, Empty, Fault, Fault;
    fault_against_fast_fault: Legacy, Protected, Fault, Fast;
    fault_against_fast_fault_of_a_tracked_page: Ept, Tracked, Fault, Fast;
    fault_against_zap_leaf: Legacy, Empty, Fault, ZapLeaf;
    fault_against_zap_leaf_of_a_used_page: Legacy, Used, Fault, ZapLeaf;
    fault_against_zap_root: Legacy, Empty, Fault, ZapRoot;
    fault_against_zap_root_with_a_used_page: Legacy, Used, Fault, ZapRoot;
    fault_against_age: Legacy, Empty, Fault, Age;
    fault_against_age_of_a_protected_page: Legacy, Protected, Fault, Age;
    fault_against_access: Legacy, Empty, Fault, Access;
    fault_against_access_to_a_protected_page: Legacy, Protected, Fault, Access;
    fault_against_lookup: Legacy, Empty, Fault, Lookup;

    fast_fault_against_fast_fault: Legacy, Protected, Fast, Fast;
    fast_fault_against_fast_fault_of_a_tracked_page: Ept, Tracked, Fast, Fast;
    fast_fault_against_zap_leaf: Legacy, Protected, Fast, ZapLeaf;
    fast_fault_against_zap_leaf_of_a_tracked_page: Ept, Tracked, Fast, ZapLeaf;
    fast_fault_against_zap_root: Legacy, Protected, Fast, ZapRoot;
    fast_fault_against_zap_root_with_a_tracked_page: Ept, Tracked, Fast, ZapRoot;
    fast_fault_against_age: Legacy, Protected, Fast, Age;
    fast_fault_against_age_of_a_tracked_page: Ept, Tracked, Fast, Age;
    fast_fault_against_access: Legacy, Protected, Fast, Access;
    fast_fault_against_access_to_a_tracked_page: Ept, Tracked, Fast, Access;
    fast_fault_against_lookup: Legacy, Protected, Fast, Lookup;

    zap_leaf_against_zap_root: Legacy, Used, ZapLeaf, ZapRoot;
    zap_leaf_against_age: Legacy, Used, ZapLeaf, Age;
    zap_leaf_against_age_without_hardware_bits: Ept, Used, ZapLeaf, Age;
    zap_leaf_against_access: Legacy, Clean, ZapLeaf, Access;
    zap_leaf_against_lookup: Legacy, Used, ZapLeaf, Lookup;

    zap_root_against_age: Legacy, Used, ZapRoot, Age;
    zap_root_against_access: Legacy, Clean, ZapRoot, Access;
    zap_root_against_lookup: Legacy, Used, ZapRoot, Lookup;

    age_against_age: Legacy, Used, Age, Age;
    age_against_age_without_hardware_bits: Ept, Used, Age, Age;
    age_against_access: Legacy, Clean, Age, Access;
    age_against_access_to_a_used_page: Legacy, Used, Age, Access;
    age_against_access_without_hardware_bits: Ept, Used, Age, Access;
    age_against_lookup: Legacy, Used, Age, Lookup;

    access_against_access: Legacy, Clean, Access, Access;
    access_against_lookup: Legacy, Clean, Access, Lookup;
    lookup_against_lookup: Legacy, Used, Lookup, Lookup;
}

/// An operation that waits for everybody, against itself: two drains, two flushes and two of every
/// lock between them. Unbounded, these did not end within minutes.
macro_rules! bounded {
    ($($name:ident: $bound:literal, $state:ident, $first:ident, $second:ident;)*) => {
        $(#[test]
        fn $name() {
            explore_up_to(concat!("tdp::", stringify!($name)), $bound, || {
                body::<Legacy>([Op::$first, Op::$second], State::$state);
            });
        })*
    };
}

bounded! {
    zap_leaf_against_zap_leaf: 4, Used, ZapLeaf, ZapLeaf;
    zap_root_against_zap_root: 4, Used, ZapRoot, ZapRoot;
}

/// Pairs with the locks and sections that ship: a check of the contract by which the others run.
macro_rules! shipped {
    ($($name:ident: $bound:literal, $state:ident, $first:ident, $second:ident;)*) => {
        $(#[test]
        fn $name() {
            explore_shipped(concat!("tdp::", stringify!($name)), $bound, || {
                body::<Legacy>([Op::$first, Op::$second], State::$state);
            });
        })*
    };
}

shipped! {
    shipped_locks_fault_against_zap_leaf: 2, Empty, Fault, ZapLeaf;
    shipped_locks_fault_against_zap_root: 2, Used, Fault, ZapRoot;
    shipped_locks_zap_leaf_against_zap_leaf: 2, Used, ZapLeaf, ZapLeaf;
    shipped_locks_zap_leaf_against_zap_root: 2, Used, ZapLeaf, ZapRoot;
}
