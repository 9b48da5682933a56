//! Which MMU a vCPU is on, and which MMUs a VM has (KVM rows 4.39, 4.59; bugs B47, B77; S1).

mod common;
mod shadow_support;
mod vm_support;

use std::sync::{Arc, Mutex};

use common::{TestHost, gpa};
use mmu_core::access::PfErrorCode;
use mmu_core::addr::{Gfn, GfnRange, Gpa};
use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::paging::{Paging, PagingPolicy};
use mmu_core::slot::{SlotFlags, SlotLimits, SlotWriter};
use mmu_core::spte::{Capabilities, Ept, SpteConfig};
use mmu_core::vm::{Actor, VmCore, VmOptions};
use mmu_model::AccessKind;
use secondary_mmu::{Runs, Vcpu, VcpuError, VmMmuError};
use shadow_mmu::ShadowError;
use shadow_mmu::guest::{GuestControls, GuestCpu, GuestRoot, GuestWalker, WriteProtect};
use shadow_mmu::role::PageRole;
use shadow_support::memory::Memory;
use shadow_support::rig::Lock;
use tdp_mmu::{TdpOptions, WrongPaging};
use vm_support::{End, Machine, NestedVm, leaf, slot};

fn reached(machine: &Machine, gfn: u64) -> End {
    End::Reached(machine.backing.pfn(gfn).unwrap())
}

/// Tables for L2: two pages, at 0 and 0x1000.
fn machine(seed: u64) -> Machine {
    let mut machine = Machine::new(seed, 1000);
    machine.set_up_path();
    machine.set_up(0, 0, leaf(600));
    machine.set_up(0, 1, leaf(601));
    machine
}

fn write(gfn: u64) -> PageFault {
    PageFault::new(gpa(gfn), PfErrorCode::WRITE)
}

/// Let `call` be without memory for tables, from its `n`th frame on.
fn starved<R>(machine: &mut Machine, n: u64, call: impl FnOnce(&mut Machine) -> R) -> R {
    let from = machine.host().provides() + n;
    machine.host().refuse(from, u64::MAX);
    let result = call(machine);
    machine.host().refuse(u64::MAX, u64::MAX);
    result
}

/// Bug B47: an entry that fails leaves the vCPU on the tables that it was on, and nothing that
/// comes after is mistaken.
#[test]
fn a_nested_entry_that_fails_leaves_the_vcpu_where_it_was() {
    let mut machine = machine(1);
    machine.enter_l1();
    let _ = machine.l1_access(700, AccessKind::Write);
    let enter = |machine: &mut Machine, pointer| {
        machine.l1.enter_nested(&machine.nested, &machine.memory, pointer)
    };
    let pointer = machine.pointer;
    let no_frames = |result| {
        matches!(result, Err(VcpuError::Shadow(ShadowError::Fault(FaultError::OutOfFrames(_)))))
    };
    assert!(no_frames(starved(&mut machine, 0, |machine| enter(machine, pointer))));
    assert_eq!(machine.l1.runs(), Runs::Guest);
    assert!(machine.l1.root_is_current(), "it is on direct tables still");
    assert_eq!(machine.l1.fault(&write(700)), Ok(FaultOutcome::Spurious));
    assert_eq!(machine.l1_access(701, AccessKind::Write), reached(&machine, 701));
    // From one nested root to another: it stays on the last. Frames at hand come first.
    let mut last = enter(&mut machine, pointer).unwrap();
    let mut at = pointer;
    loop {
        let next = at + (1 << 12);
        match starved(&mut machine, 0, |machine| enter(machine, next)) {
            Ok(root) => (last, at) = (root, next),
            refused => {
                assert!(no_frames(refused));
                break;
            }
        }
        assert!(at - pointer < 64 << 12, "frames without end");
    }
    assert_eq!(machine.l1.runs(), Runs::Nested);
    assert!(machine.l1.root_is_current());
    assert_eq!(enter(&mut machine, at), Ok(last));
    assert_eq!(machine.l1.fault(&write(700)), Err(VcpuError::NotOn { runs: Runs::Nested }));
    let _ = machine.l1.enter_guest().unwrap();
    assert_eq!(machine.l1.fault(&write(700)), Ok(FaultOutcome::Spurious));
    machine.finish();
}

/// Bug B77: what L1 flushes of L2's goes to the shadow tables, whichever the vCPU is on, and never
/// to L1's own.
#[test]
fn a_flush_of_the_nested_guest_reaches_its_tables_from_anywhere() {
    for on_guest in [true, false] {
        let mut machine = machine(2);
        let _ = machine.l1_access(600, AccessKind::Write);
        let _ = machine.l1_access(700, AccessKind::Write);
        assert_eq!(machine.l2_access(0, AccessKind::Read), reached(&machine, 600));
        assert_eq!(machine.l2_access(0x1000, AccessKind::Read), reached(&machine, 601));
        // Unseen: the table goes out of sync.
        assert!(matches!(machine.edit(0, 0, leaf(700)), End::Reached(_)));
        assert!(matches!(machine.edit(0, 1, leaf(701)), End::Reached(_)));
        if on_guest {
            let _ = machine.l2.enter_guest().unwrap();
        }
        let runs = machine.l2.runs();
        let stale =
            |machine: &Machine, address| machine.shadow(address).map(|found| found.pa >> 12);
        let host = |machine: &Machine, gfn| machine.backing.pfn(gfn);
        assert_eq!(stale(&machine, 0), host(&machine, 600));
        // One address, then everything.
        machine.l2.nested_invalidated(&machine.nested, &machine.memory, Gpa::new(0));
        assert_ne!(stale(&machine, 0), host(&machine, 600));
        assert_eq!(stale(&machine, 0x1000), host(&machine, 601));
        machine.flush();
        assert_ne!(stale(&machine, 0x1000), host(&machine, 601));
        assert_eq!(machine.l2.runs(), runs, "the vCPU stays where it is");
        for gfn in [600, 700] {
            assert_eq!(machine.direct(gfn).map(|found| found.pa >> 12), host(&machine, gfn));
        }
        assert_eq!(machine.l2_access(0, AccessKind::Read), reached(&machine, 700));
        machine.check();
        machine.finish();
    }
}

/// Faults go to the tables that the vCPU is on, and to no others.
#[test]
fn faults_go_where_the_vcpu_runs() {
    let mut machine = machine(3);
    machine.enter_l1();
    machine.enter_l2();
    assert_eq!(machine.l2.fault(&write(700)), Err(VcpuError::NotOn { runs: Runs::Nested }));
    let request = shadow_mmu::guest::NestedRequest {
        operation: shadow_mmu::guest::Operation::Read,
        purpose: shadow_mmu::guest::Purpose::Final(mmu_core::access::Access::ALL),
    };
    let walk = machine.nested.walk(&machine.memory, machine.pointer, Gpa::new(0), request).unwrap();
    let refused = machine.l1.nested_fault(&machine.nested, &machine.memory, &walk, request);
    assert_eq!(refused, Err(VcpuError::NotOn { runs: Runs::Guest }));
    assert!(machine.direct(600).is_none() && machine.shadow(0).is_none());
    let fixed = machine.l2.nested_fault(&machine.nested, &machine.memory, &walk, request);
    assert_eq!(fixed, Ok(FaultOutcome::Fixed));
    assert!(machine.direct(600).is_none() && machine.shadow(0).is_some());
    machine.finish();
}

/// Roots are kept across switches: L1 and L2 take turns and nothing is mapped again.
#[test]
fn taking_turns_costs_no_faults() {
    let mut machine = machine(4);
    machine.swap();
    let _ = machine.l1_access(600, AccessKind::Write);
    let _ = machine.l2_access(0, AccessKind::Write);
    let _ = machine.l1.enter_nested(&machine.nested, &machine.memory, machine.pointer).unwrap();
    let before = machine.host().provides();
    let pages = machine.shadow_mmu().lock.0.lock().unwrap().stats().pages_made;
    for _ in 0..100 {
        let root = machine.l1.enter_nested(&machine.nested, &machine.memory, machine.pointer);
        assert!(root.is_ok() && machine.shadow(0).is_some());
        let _ = machine.l1.enter_guest().unwrap();
        assert_eq!(machine.l1.fault(&write(600)), Ok(FaultOutcome::Spurious));
    }
    assert_eq!(machine.host().provides(), before);
    assert_eq!(machine.shadow_mmu().lock.0.lock().unwrap().stats().pages_made, pages);
    machine.finish();
}

fn core(paging: Paging) -> (Arc<VmCore<TestHost>>, SlotWriter, Actor<TestHost>) {
    let config = SpteConfig::<Ept>::new(Capabilities::ept()).unwrap();
    let limits = SlotLimits::new(2, config.max_gfn_exclusive());
    let options = VmOptions { paging, ..VmOptions::default() };
    let host = TestHost::new(1024);
    let made = VmCore::with_options(host, 8, limits, std::thread::yield_now, options);
    let (core, slots) = made.unwrap();
    let actor = core.actor().unwrap();
    (core, slots, actor)
}

fn lock(writer: shadow_mmu::ShadowWriter<Ept, TestHost>) -> Lock<Ept> {
    Lock(Mutex::new(writer))
}

/// S1: what a VM has is said when it is made, and a policy that changes later changes nothing.
#[test]
fn the_kind_of_mmu_is_chosen_once() {
    let config = || SpteConfig::<Ept>::new(Capabilities::ept()).unwrap();
    let policy = PagingPolicy::new(Paging::Shadow);
    let (shadow, mut slots, mut actor) = core(policy.get());
    policy.set(Paging::Tdp);
    let wrong = Some(VmMmuError::Paging(WrongPaging { paging: Paging::Shadow }));
    let options = TdpOptions::default();
    assert_eq!(NestedVm::direct(Arc::clone(&shadow), config(), options).err(), wrong);
    let rights = (&mut slots, &mut actor);
    let nested = NestedVm::nested(Arc::clone(&shadow), rights, config(), options, 100, lock);
    assert_eq!(nested.err(), wrong);
    let vm = NestedVm::shadow_only(Arc::clone(&shadow), config(), 100, lock).unwrap();
    assert!(vm.tdp().is_none() && vm.shadow().is_some());
    let mut vcpu = Vcpu::new(&vm, 0).unwrap();
    assert_eq!(vcpu.enter_guest(), Err(VcpuError::NoMmu { wanted: Runs::Guest }));

    let (tdp, _slots, _actor) = core(policy.get());
    policy.set(Paging::Shadow);
    let refused = NestedVm::shadow_only(Arc::clone(&tdp), config(), 100, lock);
    assert_eq!(refused.err(), Some(VmMmuError::Paging(WrongPaging { paging: Paging::Tdp })));
    let vm = NestedVm::direct(tdp, config(), options).unwrap();
    assert!(vm.tdp().is_some() && vm.shadow().is_none());
    let mut vcpu = Vcpu::new(&vm, 0).unwrap();
    let nested = machine(5);
    let entered = vcpu.enter_nested(&nested.nested, &nested.memory, nested.pointer);
    assert_eq!(entered, Err(VcpuError::NoMmu { wanted: Runs::Nested }));
    assert!(vcpu.enter_guest().is_ok() && vcpu.root_is_current());
    nested.finish();
}

/// A VM of shadow tables only: the same calls about memory, and its guest's faults by the handle.
#[test]
fn a_vm_of_shadow_tables_alone_has_the_same_calls() {
    let (core, mut slots, mut actor) = core(Paging::Shadow);
    let config = SpteConfig::<Ept>::new(Capabilities::ept()).unwrap();
    let vm = NestedVm::shadow_only(Arc::clone(&core), config, 100, lock).unwrap();
    vm.enable_tracking(&mut slots, &mut actor).unwrap();
    let request = slot(0, 0, 512, SlotFlags::LOG_DIRTY);
    let _ = vm.set_slot(&mut slots, &mut actor, &request, None).unwrap();
    let memory = Memory::new(512, 4);
    let mut vcpu = Vcpu::new(&vm, 0).unwrap();
    let cpu = GuestCpu::baseline();
    let guest = GuestWalker::new(&cpu, GuestControls::empty()).unwrap();
    let role = PageRole::of_guest(&cpu, GuestControls::empty(), WriteProtect::On).unwrap();
    let write = |vcpu: &mut Vcpu<Ept, TestHost, Lock<Ept>>, gfn: u64| {
        let root = GuestRoot::Cr3(0);
        let _ = vcpu.enter_shadowed(&guest, &memory, &root, role).unwrap();
        assert_eq!(vcpu.runs(), Runs::Guest);
        let (shadow, lock) = vcpu.shadow().unwrap();
        let request = shadow_mmu::guest::Request {
            operation: shadow_mmu::guest::Operation::Write,
            privilege: shadow_mmu::guest::Privilege::Supervisor,
            write_protect: WriteProtect::On,
            pkru: 0,
        };
        let gva = mmu_core::addr::Gva::new(gfn << 12);
        let walk = guest.walk(&memory, &root, gva, request).unwrap();
        shadow.fault(lock, &guest, &memory, &walk, request).unwrap()
    };
    assert_eq!(write(&mut vcpu, 7), FaultOutcome::Fixed);
    let mut words = [0; 8];
    assert_eq!(vm.harvest_log(&mut actor, (0, 0), &mut words), Ok(1));
    assert_eq!(words[0], 1 << 7);
    vm.track_write(&mut actor, 0, Gfn::new(7)).unwrap();
    assert_eq!(write(&mut vcpu, 7), FaultOutcome::WriteProtected);
    vm.untrack_write(&mut actor, 0, Gfn::new(7)).unwrap();
    assert_eq!(write(&mut vcpu, 7), FaultOutcome::Fixed);
    let gone = vm.unmap(&mut actor, GfnRange::from_len(Gfn::new(0), 512));
    assert_eq!((gone.shadow.leaves, gone.direct.pages()), (1, 0));
    assert!(vcpu.root_is_current());
    let _ = vm.zap_all(&mut actor);
    assert!(!vcpu.root_is_current());
    drop(vcpu);
    let _ = vm.destroy(&mut actor);
    drop((vm, actor, slots));
    assert_eq!(core.pool().frames_in_use(), 0);
}
