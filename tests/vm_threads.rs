//! A guest hypervisor, its guest, the host and changes of slots at once, in a VM with direct and
//! shadow tables (KVM rows 4.26, 4.35, 6.7): nobody waits for ever, nobody reaches a page that was
//! taken away, and what is left when all is quiet is no wider than it may be.

mod common;
mod shadow_support;
mod vm_support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{Core, DATA, StopOnDrop, TestHost, reported};
use mmu_core::access;
use mmu_core::addr::{Gfn, GfnRange, Gpa};
use mmu_core::fault::FaultOutcome;
use mmu_core::slot::SlotFlags;
use mmu_core::spte::Ept;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use mmu_model::{Access, AccessKind, Random};
use secondary_mmu::Vcpu;
use shadow_mmu::guest::{NestedError, NestedRequest, NestedWalker, Purpose};
use shadow_support::memory::{Backing, Memory};
use shadow_support::rig::{Lock, operation, some_kind};
use vm_support::{
    BLOCKS, Machine, NestedVm, PAGES, Setup, TABLES, first_table, leaf, link, slot, tables_at,
};

/// What the threads share.
struct Shared<'a> {
    vm: &'a NestedVm,
    memory: &'a Memory,
    backing: &'a Backing,
    nested: &'a NestedWalker,
    pointer: u64,
    addresses: &'a [u64],
    /// Numbers of host blocks that were taken back, flushes and all.
    gone: Vec<AtomicBool>,
    stop: AtomicBool,
    /// Accesses of L2's.
    turns: AtomicU64,
    reached: AtomicU64,
    written: AtomicU64,
    protected: AtomicU64,
}

type Cpu<'a> = (&'a mut Vcpu<Ept, TestHost, Lock<Ept>>, &'a Mutex<Core>);

impl Shared<'_> {
    /// A processor reached a host page, and has it now.
    fn judge(&self, pa: u64) {
        let number = ((pa >> 12) - DATA) / 512;
        assert!(
            !self.gone[number as usize].load(Ordering::SeqCst),
            "block {number} was taken back"
        );
        self.reached.fetch_add(1, Ordering::Relaxed);
    }

    /// Each change makes what L2 is about to map stale: it gets somewhere between two of them.
    fn let_l2_run(&self, turns: u64) {
        let before = self.turns.load(Ordering::Relaxed);
        for _ in 0..turns * 64 {
            let now = self.turns.load(Ordering::Relaxed);
            if now >= before + turns || self.stop.load(Ordering::Relaxed) {
                break;
            }
            std::thread::yield_now();
        }
    }

    /// L1 writes an entry; by its own mapping, or as its emulator.
    fn l1_writes(&self, (vcpu, core): &mut Cpu<'_>, table: u64, index: u64, entry: u64) {
        let at = table << 12 | index << 3;
        for _ in 0..64 {
            let stale = std::mem::take(&mut core.lock().unwrap().reload);
            if stale || !vcpu.root_is_current() {
                let root = vcpu.enter_guest().unwrap().get() | 0x5e;
                let mut core = core.lock().unwrap();
                core.cpu.set_root(root);
                core.cpu.flush_all();
            }
            let mut inside = core.lock().unwrap();
            let write = Access::user(AccessKind::Write);
            let reached = inside.cpu.access(self.vm.core().host(), table << 12, write);
            let fault = match reached {
                Ok(pa) => {
                    self.judge(pa);
                    self.memory.set(at, 8, entry);
                    self.written.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err(fault) => fault,
            };
            drop(inside);
            match vcpu.fault(&reported(table, &fault)).unwrap() {
                FaultOutcome::WriteProtected => {
                    self.memory.set(at, 8, entry);
                    let (direct, vm) = (vcpu.direct().unwrap(), self.vm);
                    vm.guest_wrote(direct.actor(), Gpa::new(at), 8);
                    self.protected.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                FaultOutcome::Emulate(_) => return,
                FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn l1(&self, mut cpu: Cpu<'_>, seed: u64) {
        let mut random = Random::new(seed);
        while !self.stop.load(Ordering::Relaxed) {
            let level = if random.chance(3, 4) { 1 } else { 2 + random.below(2) as u32 };
            let table = first_table(level) + random.below(tables_at(level));
            let entry = match level {
                _ if random.chance(1, 12) => 0,
                1 if random.chance(1, 4) => leaf(random.below(TABLES)),
                1 => leaf(random.below(BLOCKS) * 512 + TABLES + random.below(4)),
                _ => link(first_table(level - 1) + random.below(tables_at(level - 1))),
            };
            self.l1_writes(&mut cpu, table, random.below(4), entry);
            self.let_l2_run(8);
        }
    }

    fn l2_enters(&self, (vcpu, core): &mut Cpu<'_>) {
        let root = vcpu.enter_nested(self.nested, self.memory, self.pointer).unwrap().get() | 0x5e;
        let mut core = core.lock().unwrap();
        core.cpu.set_root(root);
        core.cpu.flush_all();
    }

    fn l2(&self, mut cpu: Cpu<'_>, seed: u64) {
        let mut random = Random::new(seed);
        self.l2_enters(&mut cpu);
        while !self.stop.load(Ordering::Relaxed) {
            let stale = std::mem::take(&mut cpu.1.lock().unwrap().reload);
            if stale || !cpu.0.root_is_current() {
                self.l2_enters(&mut cpu);
            }
            if random.chance(1, 20) {
                cpu.0.nested_flushed(self.nested, self.memory);
                cpu.1.lock().unwrap().cpu.flush_all();
            }
            self.turns.fetch_add(1, Ordering::Relaxed);
            let number = random.below(self.addresses.len() as u64) as usize;
            let (address, kind) = (self.addresses[number], some_kind(&mut random));
            let mut inside = cpu.1.lock().unwrap();
            let reached = inside.cpu.access(self.vm.core().host(), address, Access::user(kind));
            if let Ok(pa) = reached {
                self.judge(pa);
                continue;
            }
            drop(inside);
            let purpose = Purpose::Final(access::Access::ALL);
            let request = NestedRequest { operation: operation(kind), purpose };
            match self.nested.walk(self.memory, self.pointer, Gpa::new(address), request) {
                Ok(walk) => {
                    let vcpu = &mut *cpu.0;
                    let _ = vcpu.nested_fault(self.nested, self.memory, &walk, request).unwrap();
                }
                Err(NestedError::Fault(_)) => {
                    cpu.0.nested_invalidated(self.nested, self.memory, Gpa::new(address));
                    cpu.1.lock().unwrap().cpu.flush_address(address);
                }
                // The exchange of an entry was lost too often.
                Err(_) => {}
            }
        }
    }

    /// The host takes pages back, ages them, and now and then drops everything.
    fn host(&self, seed: u64) {
        let mut random = Random::new(seed);
        let mut actor = self.vm.core().actor().unwrap();
        let mut behind: Vec<u64> = (0..BLOCKS).collect();
        for number in BLOCKS..self.gone.len() as u64 {
            self.let_l2_run(32);
            let block = random.below(BLOCKS);
            let range = GfnRange::from_len(Gfn::new(block * 512), 512);
            let invalidation = self.vm.core().invalidate(actor.participant(), range);
            self.backing.set(block, number, random.chance(1, 2));
            let _ = self.vm.unmap_in(&mut actor, &invalidation, range);
            drop(invalidation);
            let old = std::mem::replace(&mut behind[block as usize], number);
            self.gone[old as usize].store(true, Ordering::SeqCst);
            let all = GfnRange::new(Gfn::new(0), Gfn::new(PAGES));
            let mode = [AgeMode::Test, AgeMode::Clear, AgeMode::ClearFlush];
            let mode = mode[random.below(3) as usize];
            let _ = self.vm.age(&mut actor, AgeRequest::new(all, mode), &mut CountOnly);
            if random.chance(1, 16) {
                let _ = self.vm.zap_all(&mut actor);
            }
            let page = Gfn::new(random.below(TABLES));
            if self.vm.track_write(&mut actor, 0, page).is_ok() {
                self.vm.untrack_write(&mut actor, 0, page).unwrap();
            }
        }
    }
}

/// The last block is a slot of its own, which goes and comes, with its log or without.
fn slots(shared: &Shared<'_>, machine_slots: &mut mmu_core::slot::SlotWriter, seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let mut actor = shared.vm.core().actor().unwrap();
    let start = (BLOCKS - 1) * 512;
    let mut rounds = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        shared.let_l2_run(64);
        let gone = slot(1, start, 0, SlotFlags::empty());
        let _ = shared.vm.set_slot(machine_slots, &mut actor, &gone, None).unwrap();
        let range = GfnRange::from_len(Gfn::new(start), 512);
        let request = AgeRequest::new(range, AgeMode::Test);
        let left = shared.vm.age(&mut actor, request, &mut CountOnly);
        assert_eq!(left.mapped, 0, "a slot is gone and mapped");
        let flags = if random.chance(1, 2) { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
        for flags in [flags, flags ^ SlotFlags::LOG_DIRTY] {
            let back = slot(1, start, 512, flags);
            let _ = shared.vm.set_slot(machine_slots, &mut actor, &back, None).unwrap();
            let mut words = [0; 8];
            let logged = shared.vm.harvest_log(&mut actor, (0, 1), &mut words).is_ok();
            assert_eq!(logged, flags.contains(SlotFlags::LOG_DIRTY));
        }
        rounds += 1;
    }
    rounds
}

#[test]
fn hypervisor_guest_host_and_slots_at_once() {
    const ROUNDS: u64 = 600;
    for seed in [0x51, 0x52] {
        println!("seed {seed:#x}");
        let last = (BLOCKS - 1) * 512;
        let parts = vec![
            slot(0, 0, last, SlotFlags::empty()),
            slot(1, last, PAGES - last, SlotFlags::empty()),
        ];
        let mut machine = Machine::with(seed, Setup { slots: parts, ..Setup::default() });
        machine.set_up_path();
        (0..BLOCKS).for_each(|block| machine.backing.set(block, block, false));
        let (vm, backing) = (Arc::clone(&machine.vm), Arc::clone(&machine.backing));
        let shared = Shared {
            vm: &vm,
            memory: &machine.memory,
            backing: &backing,
            nested: &machine.nested,
            pointer: machine.pointer,
            addresses: &machine.addresses,
            gone: (0..BLOCKS + ROUNDS).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            turns: AtomicU64::new(0),
            reached: AtomicU64::new(0),
            written: AtomicU64::new(0),
            protected: AtomicU64::new(0),
        };
        let (l1, l2) = ((&mut machine.l1, &*machine.cpu1), (&mut machine.l2, &*machine.cpu2));
        let (shared, slot_writer) = (&shared, &mut machine.slots);
        let rounds = std::thread::scope(|scope| {
            let changer = scope.spawn(move || {
                let _stop = StopOnDrop(&shared.stop);
                slots(shared, slot_writer, seed + 1)
            });
            for (number, cpu) in [l1, l2].into_iter().enumerate() {
                scope.spawn(move || {
                    let _stop = StopOnDrop(&shared.stop);
                    if number == 0 { shared.l1(cpu, seed + 2) } else { shared.l2(cpu, seed + 3) }
                });
            }
            {
                let _stop = StopOnDrop(&shared.stop);
                shared.host(seed + 4);
            }
            changer.join().unwrap()
        });
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (written, protected) = (count(&shared.written), count(&shared.protected));
        let stats = *vm.shadow().unwrap().lock.0.lock().unwrap().stats();
        println!("{rounds} slot changes, {written} writes, {protected} emulated, {stats:?}");
        assert!(rounds > 0 && written > 0 && protected > 0 && count(&shared.reached) > 0);
        assert!(stats.unsyncs > 0 && stats.syncs > 0, "{stats:?}");
        // All is quiet: what L1 flushes now is followed exactly.
        machine.enter_l1();
        machine.enter_l2();
        machine.flush();
        machine.check();
        machine.finish();
    }
}
