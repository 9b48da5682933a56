//! Every pair of {fault, fast fault, zap leaf, zap root, age, CPU, lookup} on the shipped code, every
//! interleaving: tables of two entries, one gfn, and whatever the two operations do to it.
//!
//! The lock, the epoch and invalidations are the real ones (they have exhaustive models of their own in
//! `mmu-core`). The CPU is a thread that walks the live tables and sets A and D by compare-exchange; a
//! flush waits until it is between two accesses, and a reload keeps it out, which is their contract.
//! After the two have ended: the tree passes `check`, the gauges equal the recount, nothing of A, D or
//! the mapping is lost, no page that was taken away is mapped, and teardown leaves no frame in use.
#![cfg(loom)]

mod loom_common;

use std::sync::Arc;

use loom::thread;
use loom_common::{GFN, World, explore};
use mmu_core::access::PfErrorCode;
use mmu_core::addr::{GfnRange, Level};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::spte::{Ept, Legacy, SpteFormat};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use mmu_core::vm::Actor;
use tdp_mmu::{TdpVcpu, ZapReport};

use loom_common::ModelHost;

/// What a thread does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    /// A write fault.
    Fault,
    /// A write fault that the fast path may fix.
    Fast,
    /// The host takes the page away and gives another one.
    ZapLeaf,
    /// Zap-all, to the end.
    ZapRoot,
    /// Test and clear accessed bits.
    Age,
    /// The processor writes to the page.
    Cpu,
    /// Look the entry up.
    Lookup,
}

/// What a thread saw.
#[derive(Default)]
struct Seen {
    zapped: Option<ZapReport>,
    cpu_wrote: bool,
    young: u64,
}

/// A thread's tools, made before the threads start.
struct Hand<F: SpteFormat> {
    vcpu: TdpVcpu<F, ModelHost>,
    actor: Actor<ModelHost>,
}

fn run<F: SpteFormat>(world: &World<F>, hand: &mut Hand<F>, op: Op) -> Seen {
    let mut seen = Seen::default();
    match op {
        Op::Fault | Op::Fast => {
            let code = if op == Op::Fast {
                PfErrorCode::WRITE | PfErrorCode::PRESENT
            } else {
                PfErrorCode::WRITE
            };
            let fault = PageFault::new(GFN.address(), code);
            let outcome = hand.vcpu.fault(&fault).expect("memory and a page are there");
            assert!(
                matches!(
                    outcome,
                    FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry
                ),
                "{outcome:?}"
            );
        }
        Op::ZapLeaf => {
            let range = GfnRange::entry(GFN, Level::L1);
            let taken = world.vm.notify().begin(hand.actor.participant(), range);
            world.vm.host().replace_page();
            seen.zapped = Some(world.mmu.unmap(&mut hand.actor, range));
            drop(taken);
        }
        Op::ZapRoot => {
            seen.zapped = Some(world.mmu.invalidate_roots(&mut hand.actor).finish(&mut hand.actor));
        }
        Op::Age => {
            let range = GfnRange::entry(GFN, Level::L1);
            let request = AgeRequest { range, mode: AgeMode::Clear, budget: 16 };
            seen.young = world.mmu.age(&mut hand.actor, request, &mut CountOnly).young;
        }
        Op::Cpu => seen.cpu_wrote = world.cpu_write(),
        Op::Lookup => {
            for (level, spte) in world.mmu.lookup(&mut hand.actor, 0, GFN) {
                assert!(spte.is_empty() || spte.is_frozen() || spte.is_mmu_present());
                assert!(level == Level::L1 || !spte.is_leaf(level), "nothing is huge here");
            }
        }
    }
    seen
}

/// One pair, from one initial state.
fn pair<F: SpteFormat>(name: &str, first: Op, second: Op, mapped: bool) {
    explore(name, move || {
        let world = Arc::new(World::<F>::new());
        let mut hands =
            [(); 2].map(|()| Hand { vcpu: world.vcpu(), actor: world.vm.actor().expect("room") });
        if mapped {
            world.map_clean(&mut hands[0].vcpu);
        }
        let [mut other, mut own] = hands;
        let shared = Arc::clone(&world);
        let thread = thread::spawn(move || {
            let seen = run(&shared, &mut other, first);
            (seen, other)
        });
        let mine = run(&world, &mut own, second);
        let (theirs, other) = thread.join().expect("no panic");
        // A vCPU keeps the frame of a root that it has not left yet.
        own.vcpu.unload_root();
        drop(other);
        judge(&world, &mut own, [first, second], [&theirs, &mine], mapped);
        drop(own);
        world.tear_down();
    });
}

/// What must hold when both have ended.
fn judge<F: SpteFormat>(
    world: &World<F>,
    hand: &mut Hand<F>,
    ops: [Op; 2],
    seen: [&Seen; 2],
    mapped: bool,
) {
    world.check(&mut hand.actor);
    let walk = world.mmu.lookup(&mut hand.actor, 0, GFN);
    let leaf = walk.last().map(|(_, spte)| *spte).filter(|spte| spte.is_leaf(Level::L1));
    let config = world.mmu.config();
    if let Some(leaf) = leaf {
        assert_eq!(leaf.pfn(), world.vm.host().page(), "maps a page that was taken away");
    }
    let zaps = ops.iter().any(|op| matches!(op, Op::ZapLeaf | Op::ZapRoot));
    let zapped: Vec<&ZapReport> = seen.iter().filter_map(|seen| seen.zapped.as_ref()).collect();
    if mapped && !zaps {
        assert!(leaf.is_some(), "nobody took the page away");
    }
    if seen.iter().any(|seen| seen.cpu_wrote) {
        let reported = zapped.iter().any(|report| report.dirty > 0);
        assert!(reported || leaf.is_some_and(|leaf| config.is_dirty(leaf)), "D was lost");
        let aged = ops.contains(&Op::Age);
        let young = zapped.iter().any(|report| report.young > 0);
        let accessed = leaf.is_some_and(|leaf| config.is_accessed(leaf));
        assert!(young || accessed || aged, "A was lost");
    }
    if mapped && zaps {
        // Unmap and zap-all together took out what was there, once.
        let pages: u64 = zapped.iter().map(|report| report.pages()).sum();
        assert!(pages >= 1 || leaf.is_some(), "a mapping vanished unreported");
    }
}

macro_rules! pairs {
    ($($name:ident: $format:ty, $first:ident, $second:ident, $mapped:expr;)*) => {
        $(#[test]
        fn $name() {
            pair::<$format>(stringify!($name), Op::$first, Op::$second, $mapped);
        })*
    };
}

pairs! {
    fault_against_fault: Legacy, Fault, Fault, false;
    fault_against_zap_leaf: Legacy, Fault, ZapLeaf, false;
    fault_against_zap_leaf_of_a_mapped_page: Legacy, Fault, ZapLeaf, true;
    fault_against_zap_root: Legacy, Fault, ZapRoot, false;
    fault_against_zap_root_of_a_mapped_page: Legacy, Fault, ZapRoot, true;
    fault_against_age: Legacy, Fault, Age, true;
    fault_against_cpu: Legacy, Fault, Cpu, false;
    fault_against_lookup: Legacy, Fault, Lookup, false;
    zap_leaf_against_zap_leaf: Legacy, ZapLeaf, ZapLeaf, true;
    zap_leaf_against_zap_root: Legacy, ZapLeaf, ZapRoot, true;
    zap_leaf_against_age: Legacy, ZapLeaf, Age, true;
    zap_leaf_against_cpu: Legacy, ZapLeaf, Cpu, true;
    zap_leaf_against_lookup: Legacy, ZapLeaf, Lookup, true;
    zap_root_against_zap_root: Legacy, ZapRoot, ZapRoot, true;
    zap_root_against_age: Legacy, ZapRoot, Age, true;
    zap_root_against_cpu: Legacy, ZapRoot, Cpu, true;
    zap_root_against_lookup: Legacy, ZapRoot, Lookup, true;
    age_against_age: Legacy, Age, Age, true;
    age_against_cpu: Legacy, Age, Cpu, true;
    age_against_lookup: Legacy, Age, Lookup, true;
    cpu_against_cpu: Legacy, Cpu, Cpu, true;
    cpu_against_lookup: Legacy, Cpu, Lookup, true;
    lookup_against_lookup: Legacy, Lookup, Lookup, true;
    fast_fault_against_fault: Ept, Fast, Fault, true;
    fast_fault_against_fast_fault: Ept, Fast, Fast, true;
    fast_fault_against_zap_leaf: Ept, Fast, ZapLeaf, true;
    fast_fault_against_zap_root: Ept, Fast, ZapRoot, true;
    fast_fault_against_age: Ept, Fast, Age, true;
    fast_fault_against_cpu: Ept, Fast, Cpu, true;
    fast_fault_against_lookup: Ept, Fast, Lookup, true;
}
