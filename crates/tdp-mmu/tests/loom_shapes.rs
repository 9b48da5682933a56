//! What pairs of one page do not show: huge leaves split and put together, two pages under one
//! entry, roots replaced, slots deleted. As in `loom_pairs`, with locks and sections by contract.
#![cfg(loom)]

mod loom_common;

use std::sync::Arc;

use loom::thread;
use loom_common::{
    BOTH, GFN, Modelled, NEIGHBOUR, Vcpu, World, explore, explore_up_to, slot, take_fault,
    write_fault,
};
use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::fault::{EmulateReason, FaultOutcome, PageFault};
use mmu_core::slot::SlotWriter;
use mmu_core::spte::{Ept, Legacy};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use tdp_mmu::ZapReport;

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// A write fault on a 4 KiB page; splits a huge leaf.
    Small(Gfn),
    /// A write fault that maps both pages by one entry; replaces a table.
    Huge(Gfn),
    /// A write that the processor repeats until it is through, and the faults that it takes.
    Write(Gfn),
    /// Fault, and where the root is not valid any more, load another and fault again.
    Reload,
    /// The host takes pages away and has others from then on.
    Zap(GfnRange),
    ZapRoot,
    /// The first table of a zap-all; the rest is left to whoever comes next.
    ZapStep,
    Age,
    /// The processor writes, or reads.
    Access(Gfn),
    Lookup,
    DeleteSlot,
}

/// What the pages are when the threads start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Empty,
    /// Both mapped by one huge leaf, used or neither accessed nor dirty.
    Huge,
    CleanHuge,
    /// Both mapped by leaves of a table.
    Small,
    CleanSmall,
    /// Mapped ahead of the guest, which has not touched it yet.
    Prefaulted,
}

#[derive(Debug, Default)]
struct Seen {
    zapped: Option<ZapReport>,
    read: Option<Gfn>,
    wrote: Option<Gfn>,
    young: u64,
}

fn one(gfn: Gfn) -> GfnRange {
    GfnRange::from_len(gfn, 1)
}

fn prepare<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>, state: State) {
    let config = world.mmu.config();
    let fixed = |vcpu: &mut Vcpu<F>, fault| {
        assert_eq!(take_fault(vcpu, &fault), FaultOutcome::Fixed);
    };
    match state {
        State::Empty => return,
        State::Huge | State::CleanHuge => {
            world.vm.host().set_huge(true);
            fixed(vcpu, write_fault(GFN, Level::L2, false));
            world.vm.host().set_huge(false);
        }
        State::Small | State::CleanSmall => {
            fixed(vcpu, write_fault(NEIGHBOUR, Level::L1, false));
            fixed(vcpu, write_fault(GFN, Level::L1, false));
            world.vm.host().set_huge(true);
        }
        State::Prefaulted => fixed(vcpu, PageFault::prefetch(GFN.address(), Access::READ)),
    }
    let clean: &[Gfn] = match state {
        State::CleanHuge => &[GFN],
        State::CleanSmall => &[GFN, NEIGHBOUR],
        _ => &[],
    };
    for &gfn in clean {
        world.adjust(gfn, |leaf| config.age(config.clear_dirty(leaf)).with(F::WRITABLE));
    }
    if state != State::Prefaulted {
        world.fill_tlb(BOTH);
    }
    // The other vCPU starts with as many frames as before.
    vcpu.actor().top_up(5).expect("frames");
}

/// The processor's write: faults until it is through, or the vCPU would have to load a root.
fn write<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>, gfn: Gfn) -> bool {
    for _ in 0..3 {
        if world.access(gfn).wrote {
            return true;
        }
        let _ = take_fault(vcpu, &write_fault(gfn, Level::L1, true));
    }
    false
}

fn run<F: Modelled>(
    world: &World<F>,
    vcpu: &mut Vcpu<F>,
    slots: &mut Option<SlotWriter>,
    op: Op,
) -> Seen {
    let mut seen = Seen::default();
    match op {
        Op::Small(gfn) => drop(take_fault(vcpu, &write_fault(gfn, Level::L1, false))),
        Op::Huge(gfn) => drop(take_fault(vcpu, &write_fault(gfn, Level::L2, false))),
        Op::Write(gfn) => seen.wrote = write(world, vcpu, gfn).then_some(gfn),
        Op::Reload => {
            let mut outcome = take_fault(vcpu, &write_fault(GFN, Level::L1, false));
            if !vcpu.root_is_current() {
                vcpu.load_root().expect("frames and room");
                outcome = take_fault(vcpu, &write_fault(GFN, Level::L1, false));
            }
            assert!(outcome != FaultOutcome::Retry || !vcpu.root_is_current());
        }
        Op::Zap(range) => {
            let notify = world.vm.notify();
            let invalidation = notify.begin(vcpu.actor().participant(), range);
            world.vm.host().replace(range);
            seen.zapped = Some(world.mmu.unmap_in(vcpu.actor(), &invalidation, range));
            assert!(!world.vm.host().is_stale(range), "used after the unmap returned (I11)");
            drop(invalidation);
        }
        Op::ZapRoot => {
            let zap = world.mmu.invalidate_roots(vcpu.actor());
            seen.zapped = Some(zap.finish(vcpu.actor()));
        }
        Op::ZapStep => {
            let mut zap = world.mmu.invalidate_roots(vcpu.actor());
            let _ = zap.step(vcpu.actor(), 1);
            seen.zapped = Some(zap.report());
        }
        Op::Age => {
            let request = AgeRequest { range: BOTH, mode: AgeMode::Clear, budget: 16 };
            seen.young = world.mmu.age(vcpu.actor(), request, &mut CountOnly).young;
        }
        Op::Access(gfn) => {
            let accessed = world.access(gfn);
            seen.read = accessed.read.then_some(gfn);
            seen.wrote = accessed.wrote.then_some(gfn);
        }
        Op::Lookup => {
            for (_, spte) in world.mmu.lookup(vcpu.actor(), 0, GFN) {
                // FROZEN where a table is being replaced.
                assert!(spte.is_empty() || spte.is_frozen() || spte.is_mmu_present(), "{spte:?}");
            }
        }
        Op::DeleteSlot => {
            let writer = slots.as_mut().expect("one thread deletes");
            let change = world.mmu.set_slot(writer, vcpu.actor(), &slot(0)).expect("legal");
            assert!(world.leaf(GFN).is_none(), "mapped after its slot was deleted: {change:?}");
        }
    }
    seen
}

/// What must hold when both have ended, on top of what `World::check` looks at.
fn judge<F: Modelled>(world: &World<F>, vcpus: &mut [Vcpu<F>; 2], ops: [Op; 2], seen: &[Seen; 2]) {
    let config = world.mmu.config();
    let leaf = |gfn| world.leaf(gfn).map(|(leaf, _)| leaf);
    let zaps = || seen.iter().filter_map(|seen| seen.zapped);
    for gfn in seen.iter().filter_map(|seen| seen.wrote) {
        let dirty = leaf(gfn).is_some_and(|leaf| config.is_dirty(leaf));
        assert!(dirty || zaps().any(|report| report.dirty > 0), "a write was lost (I8)");
    }
    for gfn in seen.iter().filter_map(|seen| seen.read).filter(|_| config.ad_enabled()) {
        let young = leaf(gfn).is_some_and(|leaf| config.is_accessed(leaf))
            || zaps().any(|report| report.young > 0)
            || seen.iter().any(|seen| seen.young > 0);
        assert!(young, "an access was lost (I8)");
    }
    for op in ops {
        match op {
            // Nobody faults on what is taken away here.
            Op::Zap(range) => {
                let faulted = |op: &Op| matches!(op, Op::Small(gfn) | Op::Huge(gfn) | Op::Write(gfn)
                    if range.contains(*gfn));
                let gone = (range.start.get()..range.end.get()).map(Gfn::new);
                if !ops.iter().any(faulted) && !ops.iter().any(|op| matches!(op, Op::Huge(_))) {
                    gone.for_each(|gfn| assert_eq!(leaf(gfn), None, "still mapped (I11)"));
                }
            }
            Op::Small(gfn) | Op::Huge(gfn) => {
                let taken = |op: &Op| {
                    matches!(op, Op::Zap(_) | Op::ZapRoot | Op::ZapStep | Op::DeleteSlot)
                        || matches!(op, Op::Huge(_) | Op::Small(_))
                };
                if ops.iter().filter(|op| taken(op)).count() == 1 {
                    assert!(leaf(gfn).is_some(), "the fault was for nothing");
                }
            }
            _ => {}
        }
    }
    for vcpu in vcpus.iter_mut().filter(|vcpu| !vcpu.root_is_current()) {
        vcpu.unload_root();
    }
    let [vcpu, other] = vcpus;
    if ops.contains(&Op::ZapStep) {
        // What is left of the invalid root goes with the next zap-all.
        other.unload_root();
        vcpu.unload_root();
        let _ = world.mmu.destroy(vcpu.actor());
    }
    let _ = world.check(vcpu);
}

fn body<F: Modelled>(state: State, ops: [Op; 2]) {
    let (world, [mut vcpu, mut other], writer) = World::<F>::new();
    prepare(&world, &mut vcpu, state);
    if ops.iter().any(|op| matches!(op, Op::Access(_) | Op::Write(_))) {
        world.vm.host().run_cpu();
    }
    let mut slots = Some(writer);
    let shared = Arc::clone(&world);
    let thread = thread::spawn(move || {
        let seen = run(&shared, &mut other, &mut None, ops[1]);
        (seen, other)
    });
    let mine = run(&world, &mut vcpu, &mut slots, ops[0]);
    let (theirs, other) = thread.join().expect("no panic");
    let mut vcpus = [vcpu, other];
    judge(&world, &mut vcpus, ops, &[mine, theirs]);
    world.tear_down(vcpus);
    drop(slots);
}

macro_rules! models {
    ($($name:ident: $format:ty, $state:ident, $first:expr, $second:expr;)*) => {
        $(#[test]
        fn $name() {
            explore(concat!("tdp::", stringify!($name)), || {
                body::<$format>(State::$state, [$first, $second]);
            });
        })*
    };
}

models! {
    // A huge leaf is split by a fault on one of its pages.
    split_against_split: Legacy, Huge, Op::Small(GFN), Op::Small(NEIGHBOUR);
    split_against_zap_leaf: Legacy, Huge, Op::Small(GFN), Op::Zap(one(GFN));
    split_against_zap_leaf_of_the_other_page: Legacy, Huge, Op::Small(GFN), Op::Zap(one(NEIGHBOUR));
    split_against_zap_root: Legacy, Huge, Op::Small(GFN), Op::ZapRoot;
    split_against_age: Legacy, Huge, Op::Small(GFN), Op::Age;
    split_against_access: Legacy, CleanHuge, Op::Small(GFN), Op::Access(NEIGHBOUR);
    split_against_lookup: Legacy, Huge, Op::Small(GFN), Op::Lookup;
    split_against_collapse: Legacy, Huge, Op::Small(GFN), Op::Huge(NEIGHBOUR);

    // A table is replaced by a huge leaf.
    collapse_against_collapse: Legacy, Small, Op::Huge(GFN), Op::Huge(NEIGHBOUR);
    collapse_against_fault: Legacy, Small, Op::Huge(GFN), Op::Small(NEIGHBOUR);
    collapse_against_zap_leaf: Legacy, Small, Op::Huge(GFN), Op::Zap(one(GFN));
    collapse_against_zap_leaf_of_the_other_page: Legacy, Small,
        Op::Huge(GFN), Op::Zap(one(NEIGHBOUR));
    collapse_against_zap_root: Legacy, Small, Op::Huge(GFN), Op::ZapRoot;
    collapse_against_age: Legacy, Small, Op::Huge(GFN), Op::Age;
    collapse_against_access: Legacy, CleanSmall, Op::Huge(GFN), Op::Access(NEIGHBOUR);
    collapse_against_lookup: Legacy, Small, Op::Huge(GFN), Op::Lookup;
    huge_fault_against_zap_leaf_of_the_other_page: Legacy, Empty,
        Op::Huge(GFN), Op::Zap(one(NEIGHBOUR));
    huge_fault_against_fault: Legacy, Empty, Op::Huge(GFN), Op::Small(NEIGHBOUR);

    // Two pages under one entry: what one unmap finds empty, the other may not have flushed yet.
    unmap_of_two_pages_against_unmap_of_one: Legacy, Small, Op::Zap(BOTH), Op::Zap(one(GFN));

    // Writes without hardware A/D, seen by their faults only.
    write_against_age_of_a_prefaulted_page: Ept, Prefaulted, Op::Write(GFN), Op::Age;
    write_against_zap_leaf_of_a_prefaulted_page: Ept, Prefaulted, Op::Write(GFN), Op::Zap(one(GFN));

    // A root that goes while vCPUs use it.
    reload_against_zap_root: Legacy, Small, Op::Reload, Op::ZapRoot;
    reload_against_zap_leaf: Legacy, Small, Op::Reload, Op::Zap(one(GFN));
}

#[test]
fn a_deleted_slot_maps_nothing() {
    explore("tdp::delete_slot_against_fault", || {
        body::<Legacy>(State::Small, [Op::DeleteSlot, Op::Age]);
    });
}

#[test]
fn a_fault_and_the_deletion_of_its_slot() {
    explore("tdp::fault_against_delete_slot", || {
        let (world, [mut vcpu, mut other], mut slots) = World::<Legacy>::new();
        let shared = Arc::clone(&world);
        let thread = thread::spawn(move || {
            let code = PfErrorCode::WRITE;
            let outcome = other.fault(&PageFault::new(GFN.address(), code)).expect("memory");
            let gone = EmulateReason::NoSlot { gfn: GFN, space: 0 };
            let known = [FaultOutcome::Fixed, FaultOutcome::Retry, FaultOutcome::Emulate(gone)];
            assert!(known.contains(&outcome), "{outcome:?}");
            drop(shared);
            other
        });
        let _ = run(&world, &mut vcpu, &mut None::<SlotWriter>, Op::Lookup);
        let _ = world.mmu.set_slot(&mut slots, vcpu.actor(), &slot(0)).expect("legal");
        assert!(world.leaf(GFN).is_none(), "mapped when its slot was gone (I11)");
        let other = thread.join().expect("no panic");
        assert!(world.leaf(GFN).is_none(), "mapped after its slot was deleted (I11)");
        let _ = world.check(&mut vcpu);
        world.tear_down([vcpu, other]);
    });
}

#[test]
fn a_zap_all_left_half_done_is_finished_by_the_next() {
    explore_up_to("tdp::zap_root_against_a_step_of_it", 3, || {
        body::<Legacy>(State::Small, [Op::ZapRoot, Op::ZapStep]);
    });
}
