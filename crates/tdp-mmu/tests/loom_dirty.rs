//! Dirty logging against whatever writes, and whatever takes the record of a write away: every
//! interleaving, the shipped code on tables of two entries.
//!
//! As `loom_pairs`, which see. The guest writes through a TLB that forgets a page only when it is
//! flushed: a page that it has as written takes further writes without a look at its entry. Each
//! page counts its writes. Whoever is handed a bit copies the page afterwards, and the count; who
//! switches logging on copies everything. After a harvest the copies hold every write made before
//! the call; after one of a guest that has stopped, all.
#![cfg(loom)]

mod loom_common;

use std::sync::{Arc, Mutex};

use loom::thread;
use loom_common::{
    BOTH, GFN, Modelled, NEIGHBOUR, Vcpu, World, explore, explore_up_to, slot, take_fault,
    write_fault,
};
use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::slot::{LogOptions, SlotFlags, SlotRequest, SlotWriter};
use mmu_core::spte::{Ept, Legacy};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use tdp_mmu::{DirtyTracking, TdpOptions};

const PAGE: GfnRange = GfnRange::from_len(GFN, 1);
/// All pages of the slot.
const ALL: u64 = 0b1111;
/// Faults that one write may take: to split, to be made writable, and to lose races.
const FAULTS: u32 = 8;

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// The guest writes to the page; faults are handled by its vCPU.
    Write,
    /// The log is read and cleared, and the pages in it copied.
    Harvest,
    /// The guest writes if it may without a fault, on a CPU of its own; then a harvest.
    WriteAndHarvest,
    /// The log is read, cleared by a second call, and the pages in it copied.
    PeekAndClear,
    /// Logging is switched on, and everything copied.
    Enable,
    Disable,
    /// A prefault of the page beside it splits a huge leaf.
    Split,
    /// A huge write fault by a vCPU that knows that it may.
    Collapse,
    /// The host takes the page away and has a small one elsewhere.
    Zap,
    /// Zap-all, to the end.
    ZapRoot,
    /// Test and clear the accessed bits.
    Age,
}

/// What there is when the threads start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    logged: bool,
    /// One huge leaf for the page and the one beside it, or small ones for both.
    huge: bool,
    /// Both were written, the writes are not copied, and the TLB has the pages as written. If not,
    /// both were written, harvested, and copied.
    written: bool,
    /// The log starts with every bit set, and protects nothing before the first harvest.
    all_set: bool,
}

type Slots = Mutex<SlotWriter>;

fn log<F: Modelled>(world: &World<F>, slots: &Slots, vcpu: &mut Vcpu<F>, flags: SlotFlags) {
    let request = SlotRequest { flags, ..slot(4) };
    let mut writer = slots.lock().expect("no panic");
    let _ = world.mmu.set_slot(&mut writer, vcpu.actor(), &request).expect("a good request");
}

fn enable<F: Modelled>(world: &World<F>, slots: &Slots, vcpu: &mut Vcpu<F>) {
    log(world, slots, vcpu, SlotFlags::LOG_DIRTY);
    if !world.vm.log_options().initially_set {
        let _ = world.copy(ALL);
    }
}

/// Copy the pages of `bits`, which a call handed out before which there were those writes. Another
/// harvest may have them and not have come to its copy.
fn handed_out<F: Modelled>(world: &World<F>, bits: u64, before: [u64; 4]) {
    let copied = world.copy(bits);
    if !world.vm.host().is_shared() {
        let held = copied.iter().zip(before).all(|(copied, before)| *copied >= before);
        assert!(held, "a write before the call is missing (I9)");
    }
}

fn harvest<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>) {
    let before = world.writes();
    let mut words = [0];
    let _ = world.mmu.harvest_log(vcpu.actor(), 0, 0, &mut words).expect("logged");
    handed_out(world, words[0], before);
}

fn peek_and_clear<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>) {
    let before = world.writes();
    let mut words = [0];
    let _ = world.mmu.peek_log(vcpu.actor(), 0, 0, &mut words).expect("logged");
    let _ = world.mmu.clear_log(vcpu.actor(), (0, 0), 0, 4, &words).expect("logged");
    handed_out(world, words[0], before);
}

fn write<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>, gfn: Gfn) {
    for _ in 0..FAULTS {
        let Err(fault) = world.write(gfn) else { return };
        // `Retry` is for the next turn; and so is what another thread is in the middle of, such as
        // a table that is unlinked and not frozen yet, whose entry permits the write.
        if take_fault(vcpu, &fault) != FaultOutcome::Fixed {
            thread::yield_now();
        }
    }
    panic!("{gfn} cannot be written");
}

fn zap<F: Modelled>(world: &World<F>, vcpu: &mut Vcpu<F>) {
    let host = world.vm.host();
    let invalidation = world.vm.notify().begin(vcpu.actor().participant(), PAGE);
    host.replace(PAGE);
    host.set_huge(false);
    let _ = world.mmu.unmap_in(vcpu.actor(), &invalidation, PAGE);
    let stale = host.is_stale(PAGE);
    host.release(PAGE);
    drop(invalidation);
    assert!(!stale, "used after the unmap returned (I11)");
}

fn run<F: Modelled>(world: &World<F>, slots: &Slots, vcpu: &mut Vcpu<F>, op: Op) {
    match op {
        Op::Write => write(world, vcpu, GFN),
        Op::Harvest => harvest(world, vcpu),
        Op::WriteAndHarvest => {
            let _ = world.write(GFN);
            harvest(world, vcpu);
        }
        Op::PeekAndClear => peek_and_clear(world, vcpu),
        Op::Enable => enable(world, slots, vcpu),
        Op::Disable => log(world, slots, vcpu, SlotFlags::empty()),
        Op::Split => {
            let fault = PageFault::prefetch(NEIGHBOUR.address(), Access::READ);
            let _ = take_fault(vcpu, &fault.at_most(Level::L1));
        }
        Op::Collapse => {
            let _ = take_fault(vcpu, &write_fault(GFN, Level::L2, false));
        }
        Op::Zap => zap(world, vcpu),
        Op::ZapRoot => {
            let zap = world.mmu.invalidate_roots(vcpu.actor());
            let _ = zap.finish(vcpu.actor());
        }
        Op::Age => {
            let request = AgeRequest::new(BOTH, AgeMode::Clear).with_budget(16);
            let _ = world.mmu.age(vcpu.actor(), request, &mut CountOnly);
        }
    }
}

fn prepare<F: Modelled>(world: &World<F>, slots: &Slots, vcpus: &mut [Vcpu<F>; 2], state: State) {
    let host = world.vm.host();
    host.run_cpu();
    host.set_huge(true);
    let [vcpu, other] = vcpus;
    if state.logged && !state.huge {
        enable(world, slots, vcpu);
    }
    let level = if state.huge { Level::L2 } else { Level::L1 };
    for gfn in [NEIGHBOUR, GFN] {
        let first = take_fault(vcpu, &write_fault(gfn, level, false));
        assert!(matches!(first, FaultOutcome::Fixed | FaultOutcome::Spurious));
        write(world, vcpu, gfn);
    }
    // Each remembers the table, if there is one.
    let _ = take_fault(other, &write_fault(GFN, level, false));
    if state.logged && state.huge {
        enable(world, slots, vcpu);
    }
    if !state.written {
        if state.logged {
            harvest(world, vcpu);
        } else {
            // What logging leaves behind.
            enable(world, slots, vcpu);
            harvest(world, vcpu);
            log(world, slots, vcpu, SlotFlags::empty());
        }
        assert_eq!(world.stale_copies(), 0);
    }
    for vcpu in vcpus {
        vcpu.actor().top_up(5).expect("frames");
        let _ = vcpu.actor().find_slot(0, GFN);
    }
}

fn judge<F: Modelled>(world: &World<F>, slots: &Slots, vcpus: &mut [Vcpu<F>; 2], ops: [Op; 2]) {
    for vcpu in vcpus.iter_mut().filter(|vcpu| !vcpu.root_is_current()) {
        vcpu.unload_root();
    }
    let [vcpu, other] = vcpus;
    world.check(vcpu);
    if ops.contains(&Op::Disable) {
        // Logging can be switched on again, whatever the two left behind, and misses nothing.
        enable(world, slots, vcpu);
        write(world, other, GFN);
        write(world, other, NEIGHBOUR);
    }
    harvest(world, vcpu);
    assert_eq!(world.stale_copies(), 0, "a write is missing (I9)");
    harvest(world, vcpu);
    world.check(vcpu);
}

fn body<F: Modelled>(dirty: DirtyTracking, state: State, ops: [Op; 2]) {
    let mut options = TdpOptions::default();
    options.dirty = dirty;
    // So that a huge leaf can be met in a slot that is logged.
    options.eager_split = !(state.logged && state.huge);
    // Beside a fault that collapses, or one that has to make each page writable, disabling leaves
    // the tables as they are: with its own collapse these do not end within minutes.
    options.collapse_on_disable = dirty == DirtyTracking::DirtyBit && !ops.contains(&Op::Collapse);
    let log = LogOptions { initially_set: state.all_set, ..LogOptions::default() };
    let (world, mut vcpus, slots) = World::<F>::with(options, log);
    let slots = Arc::new(Mutex::new(slots));
    prepare(&world, &slots, &mut vcpus, state);
    world.vm.host().share(ops == [Op::Harvest; 2]);
    let [mut vcpu, mut other] = vcpus;
    let (shared, theirs) = (Arc::clone(&world), Arc::clone(&slots));
    let thread = thread::spawn(move || {
        run(&shared, &theirs, &mut other, ops[1]);
        other
    });
    run(&world, &slots, &mut vcpu, ops[0]);
    let other = thread.join().expect("no panic");
    let mut vcpus = [vcpu, other];
    judge(&world, &slots, &mut vcpus, ops);
    world.tear_down(vcpus);
}

const LOGGED: State = State { logged: true, huge: false, written: true, all_set: false };
const HARVESTED: State = State { written: false, ..LOGGED };
const LOGGED_HUGE: State = State { huge: true, written: false, ..LOGGED };
const ALL_SET: State = State { huge: true, all_set: true, ..LOGGED };
const UNLOGGED: State = State { logged: false, ..LOGGED };
const UNLOGGED_HUGE: State = State { huge: true, ..UNLOGGED };
const LEFT_PROTECTED: State = State { written: false, ..UNLOGGED };

macro_rules! logs {
    ($($name:ident: $format:ty, $mode:ident, $state:ident, $first:ident, $second:ident;)*) => {
        $(#[test]
        fn $name() {
            explore(concat!("tdp::", stringify!($name)), || {
                let ops = [Op::$first, Op::$second];
                body::<$format>(DirtyTracking::$mode, $state, ops);
            });
        })*
    };
}

logs! {
    harvest_against_write: Legacy, WriteProtect, LOGGED, Harvest, Write;
    harvest_against_fast_fault: Legacy, WriteProtect, HARVESTED, Harvest, Write;
    harvest_against_fast_fault_without_hardware_bits: Ept, WriteProtect, HARVESTED, Harvest, Write;
    harvest_of_a_write_beside_its_fault: Legacy, WriteProtect, HARVESTED, WriteAndHarvest, Write;
    harvest_against_harvest: Legacy, WriteProtect, LOGGED, Harvest, Harvest;
    peek_and_clear_against_write: Legacy, WriteProtect, LOGGED, PeekAndClear, Write;
    harvest_against_split_by_a_write: Legacy, WriteProtect, LOGGED_HUGE, Harvest, Write;
    harvest_against_split: Legacy, WriteProtect, LOGGED_HUGE, Harvest, Split;
    harvest_against_huge_fault: Legacy, WriteProtect, LOGGED, Harvest, Collapse;
    first_harvest_against_write_to_a_huge_page: Legacy, WriteProtect, ALL_SET, Harvest, Write;
    first_harvest_against_split: Legacy, WriteProtect, ALL_SET, Harvest, Split;
    first_harvest_against_collapse: Legacy, WriteProtect, ALL_SET, Harvest, Collapse;
    harvest_against_zap: Legacy, WriteProtect, LOGGED, Harvest, Zap;
    harvest_against_zap_root: Legacy, WriteProtect, LOGGED, Harvest, ZapRoot;
    harvest_against_age: Legacy, WriteProtect, LOGGED, Harvest, Age;
    harvest_against_age_without_hardware_bits: Ept, WriteProtect, LOGGED, Harvest, Age;
    enable_against_write: Legacy, WriteProtect, UNLOGGED, Enable, Write;
    enable_against_fast_fault: Legacy, WriteProtect, LEFT_PROTECTED, Enable, Write;
    enable_against_write_to_a_huge_page: Legacy, WriteProtect, UNLOGGED_HUGE, Enable, Write;
    enable_against_split: Legacy, WriteProtect, UNLOGGED_HUGE, Enable, Split;
    disable_against_write: Legacy, WriteProtect, HARVESTED, Disable, Write;
    disable_against_collapse: Legacy, WriteProtect, HARVESTED, Disable, Collapse;

    d_bit_harvest_against_write: Legacy, DirtyBit, LOGGED, Harvest, Write;
    d_bit_harvest_against_first_write: Legacy, DirtyBit, HARVESTED, Harvest, Write;
    d_bit_peek_and_clear_against_write: Legacy, DirtyBit, LOGGED, PeekAndClear, Write;
    d_bit_harvest_against_split_by_a_write: Legacy, DirtyBit, LOGGED_HUGE, Harvest, Write;
    d_bit_harvest_against_split: Legacy, DirtyBit, LOGGED_HUGE, Harvest, Split;
    d_bit_harvest_against_huge_fault: Legacy, DirtyBit, LOGGED, Harvest, Collapse;
    d_bit_first_harvest_against_write_to_a_huge_page: Legacy, DirtyBit, ALL_SET, Harvest, Write;
    d_bit_first_harvest_against_split: Legacy, DirtyBit, ALL_SET, Harvest, Split;
    d_bit_first_harvest_against_collapse: Legacy, DirtyBit, ALL_SET, Harvest, Collapse;
    d_bit_harvest_against_zap: Legacy, DirtyBit, LOGGED, Harvest, Zap;
    d_bit_enable_against_write: Legacy, DirtyBit, UNLOGGED, Enable, Write;
    d_bit_enable_against_write_to_a_huge_page: Legacy, DirtyBit, UNLOGGED_HUGE, Enable, Write;
    d_bit_enable_against_split: Legacy, DirtyBit, UNLOGGED_HUGE, Enable, Split;
    d_bit_disable_against_write: Legacy, DirtyBit, HARVESTED, Disable, Write;
    d_bit_disable_against_collapse: Legacy, DirtyBit, HARVESTED, Disable, Collapse;
}

/// Two that sweep every entry, or wait for everybody: unbounded, these did not end within minutes.
macro_rules! bounded {
    ($($name:ident: $bound:literal, $state:ident, $first:ident, $second:ident;)*) => {
        $(#[test]
        fn $name() {
            explore_up_to(concat!("tdp::", stringify!($name)), $bound, || {
                let ops = [Op::$first, Op::$second];
                body::<Legacy>(DirtyTracking::DirtyBit, $state, ops);
            });
        })*
    };
}

bounded! {
    d_bit_harvest_against_age: 5, LOGGED, Harvest, Age;
    d_bit_harvest_against_harvest: 4, LOGGED, Harvest, Harvest;
    d_bit_harvest_against_zap_root: 5, LOGGED, Harvest, ZapRoot;
}
