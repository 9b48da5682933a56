//! The dirty log of a VM with direct and shadow tables: a page that either guest writes is logged,
//! and no other (KVM rows 3.43 to 3.47, 4.57, 4.59; invariants I9, I10).

mod common;
mod shadow_support;
mod vm_support;

use std::collections::BTreeSet;
use std::ops::Range;

use mmu_core::dirty::RingSize;
use mmu_core::slot::{LogOptions, SlotFlags};
use mmu_core::stats::Counter;
use mmu_model::{AccessKind, Random};
use secondary_mmu::VmLogError;
use tdp_mmu::{DirtyTracking, LogError, TdpOptions};
use vm_support::{ALL, BACK, BLOCKS, End, LARGE, Machine, PAGES, Setup, leaf, slot};

/// Where L2 has its pages: `600 + n` at `n` pages, and block 2 from 2 MiB on.
fn machine(seed: u64, setup: Setup) -> Machine {
    let mut machine = Machine::with(seed, setup);
    (0..BLOCKS).for_each(|block| machine.back_with(block, true));
    machine.set_up_path();
    (0..4).for_each(|number| machine.set_up(0, number, leaf(600 + number)));
    machine.set_up(6, 1, 2 << 21 | LARGE | BACK | ALL);
    machine
}

fn set_logging(machine: &mut Machine, flags: SlotFlags, pages: Option<Range<u64>>) {
    let request = slot(0, 0, PAGES, flags);
    let (vm, actor) = (&machine.vm, &mut machine.notifier);
    let _ = vm.set_slot(&mut machine.slots, actor, &request, pages).unwrap();
}

fn harvest(machine: &mut Machine) -> BTreeSet<u64> {
    let mut words = vec![0; (PAGES / 64) as usize];
    let pages = machine.vm.harvest_log(&mut machine.notifier, (0, 0), &mut words).unwrap();
    let set: BTreeSet<u64> =
        (0..PAGES).filter(|gfn| words[(gfn / 64) as usize] >> (gfn % 64) & 1 != 0).collect();
    assert_eq!(pages, set.len() as u64);
    set
}

/// The address of L2's for a page of those above.
fn address(gfn: u64) -> u64 {
    if gfn < 1024 { (gfn - 600) << 12 } else { (gfn - 1024) << 12 | 2 << 20 }
}

fn l1_writes(machine: &mut Machine, gfn: u64) {
    assert!(matches!(machine.l1_access(gfn, AccessKind::Write), End::Reached(_)), "{gfn}");
}

fn l2_writes(machine: &mut Machine, gfn: u64) {
    assert!(matches!(machine.l2_access(address(gfn), AccessKind::Write), End::Reached(_)), "{gfn}");
}

/// Pages that L2 reaches.
const SHARED: [u64; 8] = [600, 601, 602, 603, 1024, 1025, 1026, 1027];

fn options(dirty: DirtyTracking) -> Setup {
    let mut options = TdpOptions::default();
    options.dirty = dirty;
    Setup { options, ..Setup::default() }
}

/// The log holds exactly what was written since the last harvest, whoever wrote it.
#[test]
fn a_page_that_either_guest_writes_is_logged_and_no_other() {
    for dirty in [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit] {
        let mut machine = machine(1, options(dirty));
        for gfn in SHARED {
            l1_writes(&mut machine, gfn);
            l2_writes(&mut machine, gfn);
        }
        assert!(machine.stat(Counter::Pages2M) > 1, "both have huge leaves");
        set_logging(&mut machine, SlotFlags::LOG_DIRTY, None);
        let _ = harvest(&mut machine);
        let mut random = Random::new(7);
        for round in 0..300 {
            let mut written = BTreeSet::new();
            for _ in 0..random.below(6) {
                let gfn = SHARED[random.below(8) as usize];
                let write = random.chance(2, 3);
                let kind = if write { AccessKind::Write } else { AccessKind::Read };
                if random.chance(1, 2) {
                    assert!(matches!(machine.l1_access(gfn, kind), End::Reached(_)));
                } else {
                    assert!(matches!(machine.l2_access(address(gfn), kind), End::Reached(_)));
                }
                if write {
                    written.insert(gfn);
                }
            }
            assert_eq!(harvest(&mut machine), written, "round {round}, {dirty:?}");
            for gfn in SHARED {
                let shadow = machine.shadow(address(gfn));
                assert!(!shadow.is_some_and(|found| found.writable()), "{gfn} is not watched");
            }
        }
        machine.check();
        machine.finish();
    }
}

/// KVM row 4.57: nothing of L2's is written unseen when logging begins; 4.58: what stands small in
/// a row goes when it ends, and comes back huge.
#[test]
fn l2_pages_are_small_while_writes_are_logged_and_huge_again_after() {
    let mut machine = machine(2, Setup::default());
    l2_writes(&mut machine, 1024);
    l2_writes(&mut machine, 600);
    assert_eq!(machine.shadow(address(1024)).unwrap().level, 2);
    set_logging(&mut machine, SlotFlags::LOG_DIRTY, None);
    let found = machine.shadow(address(1024));
    assert!(found.is_none_or(|found| found.level == 1 && !found.writable()));
    assert!(!machine.shadow(address(600)).unwrap().writable());
    l2_writes(&mut machine, 1024);
    l2_writes(&mut machine, 1026);
    assert_eq!(machine.shadow(address(1024)).unwrap().level, 1);
    assert_eq!(harvest(&mut machine), BTreeSet::from([1024, 1026]));
    set_logging(&mut machine, SlotFlags::empty(), None);
    assert!(machine.shadow(address(1024)).is_none(), "it stood in a row");
    assert!(machine.shadow(address(600)).is_some(), "L1 has small pages there");
    l2_writes(&mut machine, 1024);
    assert_eq!(machine.shadow(address(1024)).unwrap().level, 2);
    machine.check();
    machine.finish();
}

/// KVM row 4.58: where the slot ends inside a huge page, or the host has none, nothing goes.
#[test]
fn small_pages_stay_where_no_huge_page_fits() {
    let mut machine = machine(3, Setup::default());
    machine.back_with(2, false);
    set_logging(&mut machine, SlotFlags::LOG_DIRTY, None);
    l2_writes(&mut machine, 1024);
    set_logging(&mut machine, SlotFlags::empty(), None);
    assert!(machine.shadow(address(1024)).is_some(), "the host has small pages");
    machine.finish();

    let slots = vec![slot(0, 0, 1024 + 256, SlotFlags::LOG_DIRTY)];
    let mut machine = machine_in(4, slots);
    l2_writes(&mut machine, 1024);
    let request = slot(0, 0, 1024 + 256, SlotFlags::empty());
    let (vm, actor) = (&machine.vm, &mut machine.notifier);
    let _ = vm.set_slot(&mut machine.slots, actor, &request, None).unwrap();
    assert!(machine.shadow(address(1024)).is_some(), "the slot ends inside");
    machine.finish();
}

fn machine_in(seed: u64, slots: Vec<mmu_core::slot::SlotRequest>) -> Machine {
    machine(seed, Setup { slots, ..Setup::default() })
}

/// Peek leaves the bits; clear protects the pages of both.
#[test]
fn bits_that_are_cleared_are_set_by_the_next_write_of_either() {
    let mut machine = machine(5, Setup::default());
    set_logging(&mut machine, SlotFlags::LOG_DIRTY, None);
    l1_writes(&mut machine, 600);
    l2_writes(&mut machine, 601);
    let mut words = vec![0; (PAGES / 64) as usize];
    for _ in 0..2 {
        let seen = machine.vm.peek_log(&mut machine.notifier, (0, 0), &mut words);
        assert_eq!(seen, Ok(2));
    }
    let bits = [u64::MAX];
    let (vm, actor) = (&machine.vm, &mut machine.notifier);
    assert_eq!(vm.clear_log(actor, (0, 0), 576, 64, &bits), Ok(2));
    assert!(matches!(
        vm.clear_log(actor, (0, 0), 5, 64, &bits),
        Err(VmLogError::Direct(LogError::ClearRange { .. }))
    ));
    assert!(!machine.shadow(address(601)).unwrap().writable());
    l2_writes(&mut machine, 601);
    l2_writes(&mut machine, 600);
    assert_eq!(harvest(&mut machine), BTreeSet::from([600, 601]));
    machine.finish();
}

/// A part of a slot is logged: the rest is written without an exit.
#[test]
fn only_the_pages_that_are_asked_for_are_logged() {
    let mut machine = machine(6, Setup::default());
    set_logging(&mut machine, SlotFlags::LOG_DIRTY, Some(0..1024));
    for gfn in SHARED {
        l1_writes(&mut machine, gfn);
        l2_writes(&mut machine, gfn);
    }
    assert_eq!(harvest(&mut machine), BTreeSet::from([600, 601, 602, 603]));
    machine.finish();
}

/// KVM row 3.47: what is reset in a ring is protected in both.
#[test]
fn rings_tell_of_the_writes_of_both_guests() {
    let ring = Some(RingSize::from_bytes(1 << 16).unwrap());
    let log = LogOptions { bitmap: false, ring, ..LogOptions::default() };
    let mut machine = machine(7, Setup { log, ..Setup::default() });
    set_logging(&mut machine, SlotFlags::LOG_DIRTY, None);
    let core = std::sync::Arc::clone(machine.vm.core());
    let mut consumers: Vec<_> = core.rings().iter().map(|ring| ring.consumer()).collect();
    let mut take = |machine: &mut Machine| {
        let mut told = BTreeSet::new();
        for page in consumers.iter_mut().flatten() {
            assert_eq!((page.key.as_id, page.key.id), (0, 0));
            told.insert(page.offset);
        }
        let reset = machine.vm.reset_rings(&mut machine.notifier).unwrap();
        (told, reset)
    };
    for _ in 0..3 {
        l1_writes(&mut machine, 600);
        l2_writes(&mut machine, 601);
        l2_writes(&mut machine, 602);
        l2_writes(&mut machine, 602);
        assert_eq!(take(&mut machine), (BTreeSet::from([600, 601, 602]), 3));
    }
    assert_eq!(take(&mut machine), (BTreeSet::new(), 0));
    drop(consumers);
    drop(core);
    machine.finish();
}

/// L2 writes beyond what it shares with L1: a page that is first used by L2 alone.
#[test]
fn a_page_that_only_l2_has_ever_used_is_logged() {
    let mut machine = machine(8, Setup::default());
    set_logging(&mut machine, SlotFlags::LOG_DIRTY, None);
    l2_writes(&mut machine, 603);
    assert!(machine.direct(603).is_none());
    assert_eq!(harvest(&mut machine), BTreeSet::from([603]));
    assert_eq!(harvest(&mut machine), BTreeSet::new());
    let _ = machine.l2_access(address(603), AccessKind::Read);
    assert_eq!(harvest(&mut machine), BTreeSet::new(), "it was read");
    machine.finish();
}

/// KVM row 4.57: huge leaves become rows that map what they mapped, for reads at once.
#[test]
fn huge_pages_of_l2_are_split_when_logging_begins() {
    let mut machine = machine(9, Setup::default());
    l2_writes(&mut machine, 1024);
    assert_eq!(machine.shadow(address(1024)).unwrap().level, 2);
    let made = machine.shadow_mmu().lock.0.lock().unwrap().stats().pages_made;
    set_logging(&mut machine, SlotFlags::LOG_DIRTY, None);
    let stats = *machine.shadow_mmu().lock.0.lock().unwrap().stats();
    assert_eq!((stats.splits, stats.pages_made), (1, made + 1));
    for gfn in 1024..1536 {
        let found = machine.shadow(address(gfn)).expect("it is mapped still");
        assert_eq!((found.level, found.writable()), (1, false), "{gfn}");
        assert_eq!(Some(found.pa >> 12), machine.backing.pfn(gfn), "{gfn}");
        assert!(found.executable(), "{gfn}");
    }
    let before = machine.stat(Counter::Pages4K);
    let _ = machine.l2_access(address(1025), AccessKind::Read);
    assert_eq!(machine.stat(Counter::Pages4K), before, "without a fault");
    l2_writes(&mut machine, 1027);
    assert_eq!(harvest(&mut machine), BTreeSet::from([1027]));
    machine.check();
    machine.finish();
}

/// Where the quota or memory ends huge leaves go instead.
#[test]
fn huge_pages_that_cannot_be_split_go() {
    for starve in [true, false] {
        let mut machine = machine(10, Setup::default());
        l2_writes(&mut machine, 1024);
        if starve {
            let taken: Vec<_> = std::iter::from_fn(|| {
                machine.notifier.top_up(1).ok()?;
                machine.notifier.take_frame()
            })
            .collect();
            set_logging(&mut machine, SlotFlags::LOG_DIRTY, None);
            taken.into_iter().for_each(|frame| machine.notifier.put_frame(frame));
        } else {
            let mut writer = machine.shadow_mmu().lock.0.lock().unwrap();
            let live = writer.live_pages();
            writer.set_quota(live + 1);
            drop(writer);
            set_logging(&mut machine, SlotFlags::LOG_DIRTY, None);
        }
        assert_eq!(machine.shadow_mmu().lock.0.lock().unwrap().stats().splits, 0);
        assert!(machine.shadow(address(1024)).is_none());
        l2_writes(&mut machine, 1024);
        assert_eq!(harvest(&mut machine), BTreeSet::from([1024]));
        machine.check();
        machine.finish();
    }
}

/// A page of 1 GiB comes apart down to small ones, whatever its guest may not do stays forbidden.
#[test]
fn a_page_of_1_gib_is_split_to_the_bottom() {
    use mmu_core::spte::{Capabilities, Ept, SpteConfig};
    use shadow_mmu::guest::{EptCpu, NestedRequest, NestedWalker, Operation, Purpose};
    const HUGE: u64 = 1 << 18;
    let config = SpteConfig::<Ept>::new(Capabilities::ept()).unwrap();
    let limits = mmu_core::slot::SlotLimits::new(1, config.max_gfn_exclusive());
    let host = common::TestHost::new(4096);
    host.record(false);
    host.set_resolver(common::linear(mmu_core::addr::Level::L3));
    let made = mmu_core::vm::VmCore::new(host, 8, limits, std::thread::yield_now);
    let (core, mut slots) = made.unwrap();
    let mut actor = core.actor().unwrap();
    let lock = |writer| shadow_support::rig::Lock(std::sync::Mutex::new(writer));
    let rights = (&mut slots, &mut actor);
    let options = TdpOptions::default();
    let vm =
        vm_support::NestedVm::nested(core.clone(), rights, config, options, 2000, lock).unwrap();
    let none = SlotFlags::empty();
    for request in [
        common::request(0, 0, 64, common::DATA, none),
        common::request(1, HUGE, HUGE, common::DATA + HUGE, none),
    ] {
        let _ = vm.set_slot(&mut slots, &mut actor, &request, None).unwrap();
    }
    // L1's tables: top table 1, then 2, whose second entry is a page of 1 GiB without X.
    let memory = shadow_support::memory::Memory::new(64, 4);
    memory.set(1 << 12, 8, 2 << 12 | ALL);
    memory.set(2 << 12 | 8, 8, HUGE << 12 | (ALL & !4) | BACK | LARGE);
    let nested = NestedWalker::ept(mmu_core::addr::Level::L4, &EptCpu::baseline()).unwrap();
    let mut vcpu = secondary_mmu::Vcpu::new(&vm, 0).unwrap();
    let root = vcpu.enter_nested(&nested, &memory, 1 << 12).unwrap();
    let purpose = Purpose::Final(mmu_core::access::Access::ALL);
    let request = NestedRequest { operation: Operation::Write, purpose };
    let walk =
        nested.walk(&memory, 1 << 12, mmu_core::addr::Gpa::new(HUGE << 12), request).unwrap();
    let done = vcpu.nested_fault(&nested, &memory, &walk, request);
    assert_eq!(done, Ok(mmu_core::fault::FaultOutcome::Fixed));
    let walker = mmu_model::Walker::new(&<Ept as common::Modelled>::model(&Capabilities::ept()));
    let look = |page: u64| {
        let access = mmu_model::Access::user(AccessKind::Read);
        walker.translate(&common::Peek(core.host()), root.get() | 0x5e, page << 12, access).ok()
    };
    assert_eq!(look(HUGE).unwrap().level, 3);
    let logged = common::request(1, HUGE, HUGE, common::DATA + HUGE, SlotFlags::LOG_DIRTY);
    let _ = vm.set_slot(&mut slots, &mut actor, &logged, None).unwrap();
    let stats = *vm.shadow().unwrap().lock.0.lock().unwrap().stats();
    assert_eq!(stats.splits, 1 + 512);
    for page in (HUGE..2 * HUGE).step_by(511) {
        let found = look(page).expect("it is mapped still");
        assert_eq!((found.level, found.writable(), found.executable()), (1, false, false));
        assert_eq!(found.pa >> 12, common::DATA + page);
    }
    vm.shadow().unwrap().lock.0.lock().unwrap().check(&mut actor).unwrap();
    drop(vcpu);
    let _ = vm.destroy(&mut actor);
    drop((vm, actor, slots));
    assert_eq!(core.pool().frames_in_use(), 0);
}
