//! Entries around a shadow fault (KVM row 4.55): which are made, which are not, and that nothing
//! becomes wider by them.

mod common;
mod shadow_support;

use common::{Peek, no_ad};
use mmu_core::addr::{Gfn, GfnRange, Gva};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::{Capabilities, Legacy, SpteConfig};
use mmu_core::traits::{AgeAnswer, AgeMode, AgeRange, Effort};
use mmu_model::AccessKind;
use shadow_mmu::guest::{GuestRoot, Operation, Privilege, Request};
use shadow_mmu::{ReclaimPolicy, ShadowMmu};
use shadow_support::{A, D, LOWEST, P, U, W, World};

const ALL: u64 = P | W | U | A | D;
/// The guest's tables on the way to address 0: one of each level.
const WAY: [u64; 4] = [0, 2, 5, LOWEST];
/// The page at address 0.
const PAGE: u64 = 20;

/// A guest whose address `n` pages up leads to `PAGE + n`, for sixteen pages, with a window of
/// eight.
fn guest() -> World {
    let mut world = World::new(7, 1000, ReclaimPolicy::Fifo);
    for pair in WAY.windows(2) {
        put(&world, pair[0], 0, pair[1] << 12 | ALL);
    }
    for index in 0..16 {
        put(&world, LOWEST, index, (PAGE + index) << 12 | ALL);
    }
    world.rig.mmu.vm().host().have_at_hand();
    world.rig.lock.0.lock().unwrap().set_prefetch(8);
    world.load_cr3(0);
    world
}

/// Write an entry of a guest table; nobody is told.
fn put(world: &World, table: u64, index: u64, entry: u64) {
    world.memory.set(table * 4096 + index * 8, 8, entry);
}

fn fault(world: &mut World, page: u64, operation: Operation) -> FaultOutcome {
    let (root, request) =
        (GuestRoot::Cr3(world.root << 12), Request::new(operation, Privilege::User));
    let walk = world.guest.walk(&world.memory, &root, Gva::new(page << 12), request).unwrap();
    let (rig, guest, memory) = (&mut world.rig, &world.guest, &world.memory);
    rig.vcpu.fault(&rig.lock, guest, memory, &walk, request).unwrap()
}

/// Is the address mapped, and may it be written?
fn mapped(world: &World, page: u64) -> Option<bool> {
    let access = mmu_model::Access::supervisor(AccessKind::Read);
    let peek = Peek(world.rig.mmu.vm().host());
    let found = world.rig.walker.translate(&peek, world.rig.register, page << 12, access).ok()?;
    assert_eq!((found.pa >> 12) - common::DATA, PAGE + page, "page {page}");
    Some(found.writable())
}

fn pages(world: &World) -> Vec<u64> {
    (0..16).filter(|page| mapped(world, *page).is_some()).collect()
}

fn age(world: &mut World, page: u64) -> AgeAnswer {
    let gfn = Gfn::new(PAGE + page);
    let mmu = std::sync::Arc::clone(&world.rig.mmu);
    mmu.age_gfn(&mut world.rig.notifier, gfn, AgeMode::Test, Effort::Full)
}

#[test]
fn a_fault_fills_its_window_with_entries_that_nobody_has_used() {
    let mut world = guest();
    assert_eq!(fault(&mut world, 5, Operation::Read), FaultOutcome::Fixed);
    assert_eq!(pages(&world), (0..8).collect::<Vec<_>>());
    for page in 0..8 {
        let young = if page == 5 { AgeAnswer::Young } else { AgeAnswer::Old };
        assert_eq!(age(&mut world, page), young, "page {page}");
        assert_eq!(mapped(&world, page), Some(true), "what the guest permits at once");
    }
    assert_eq!(world.rig.stats().prefetched, 7);
    assert_eq!(fault(&mut world, 8, Operation::Read), FaultOutcome::Fixed);
    assert_eq!(pages(&world), (0..16).collect::<Vec<_>>());
    world.finish();
}

#[test]
fn windows_are_powers_of_two_and_one_is_none() {
    for (entries, expected) in [(0, 5..6), (1, 5..6), (2, 4..6), (5, 4..8), (8, 0..8), (99, 0..8)] {
        let mut world = guest();
        world.rig.lock.0.lock().unwrap().set_prefetch(entries);
        assert_eq!(fault(&mut world, 5, Operation::Read), FaultOutcome::Fixed);
        assert_eq!(pages(&world), expected.collect::<Vec<_>>(), "{entries}");
        world.finish();
    }
}

/// The guest has not used it: no entry of ours may stand in for the first use.
#[test]
fn what_the_guest_has_not_accessed_ends_the_window() {
    for entry in [(PAGE + 3) << 12 | P | W | U, 0] {
        let mut world = guest();
        put(&world, LOWEST, 3, entry);
        assert_eq!(fault(&mut world, 5, Operation::Read), FaultOutcome::Fixed);
        assert_eq!(pages(&world), [0, 1, 2, 5]);
        world.finish();
    }
}

/// A clean page of the guest: the first write is noticed.
#[test]
fn a_clean_page_is_mapped_for_reads() {
    let mut world = guest();
    put(&world, LOWEST, 3, (PAGE + 3) << 12 | P | W | U | A);
    assert_eq!(fault(&mut world, 5, Operation::Write), FaultOutcome::Fixed);
    assert_eq!((mapped(&world, 3), mapped(&world, 4)), (Some(false), Some(true)));
    world.finish();
}

#[test]
fn nothing_that_is_being_taken_away_is_mapped() {
    let mut world = guest();
    let vm = std::sync::Arc::clone(world.rig.mmu.vm());
    let range = GfnRange::from_len(Gfn::new(PAGE + 2), 1);
    let guard = vm.notify().begin(world.rig.notifier.participant(), range);
    assert_eq!(fault(&mut world, 5, Operation::Read), FaultOutcome::Fixed);
    assert_eq!(pages(&world), [0, 1, 5]);
    drop(guard);
    assert_eq!(fault(&mut world, 6, Operation::Read), FaultOutcome::Fixed);
    assert_eq!(pages(&world), (0..8).collect::<Vec<_>>());
    world.finish();
}

/// Where writes are logged a fault has to mark them: what could be written is left out.
#[test]
fn in_a_logged_slot_only_what_is_read_is_mapped() {
    let mut world = guest();
    for page in 0..3 {
        put(&world, LOWEST, page, (PAGE + page) << 12 | P | U | A | D);
    }
    world.rig.log();
    assert_eq!(fault(&mut world, 5, Operation::Read), FaultOutcome::Fixed);
    assert_eq!(pages(&world), [0, 1, 2, 5]);
    assert!(world.rig.harvest());
    world.finish();
}

/// A guest table with a shadow, in sync: it stays so.
#[test]
fn a_table_is_mapped_for_reads_and_stays_in_sync() {
    let mut world = guest();
    put(&world, LOWEST, 2, LOWEST << 12 | ALL);
    put(&world, LOWEST, 3, 5 << 12 | ALL);
    let before = world.rig.stats().unsyncs;
    assert_eq!(fault(&mut world, 5, Operation::Read), FaultOutcome::Fixed);
    let look = mmu_model::Access::supervisor(AccessKind::Read);
    for page in [2, 3] {
        assert!(!world.rig.shadow(page << 12, look).unwrap().writable(), "page {page}");
    }
    assert_eq!(world.rig.stats().unsyncs, before);
    world.finish();
}

/// Under a huge page of the guest that the host has in small ones: the row goes on.
#[test]
fn a_row_is_filled_around_its_fault() {
    const BLOCK: u64 = 512;
    let host = common::TestHost::new(256);
    host.record(false);
    host.have_at_hand();
    let config = SpteConfig::<Legacy>::new(Capabilities::legacy()).unwrap();
    let limits = mmu_core::slot::SlotLimits::new(1, config.max_gfn_exclusive());
    let made = mmu_core::vm::VmCore::new(host, 2, limits, std::thread::yield_now);
    let (vm, mut slots) = made.unwrap();
    let mut actor = vm.actor().unwrap();
    // The slot ends before the window does.
    let request = shadow_support::rig::slot(BLOCK + 14, mmu_core::slot::SlotFlags::empty());
    let _ = vm.set_slot(&mut slots, &mut actor, &request, |_, _| {}).unwrap();
    let (mmu, mut writer) = ShadowMmu::create(std::sync::Arc::clone(&vm), config, 100);
    writer.set_prefetch(8);
    let lock = shadow_support::rig::Lock(std::sync::Mutex::new(writer));
    let memory = shadow_support::memory::Memory::new(BLOCK + 14, 8);
    for (table, next) in [(1, 2), (2, 3)] {
        memory.set(table << 12, 8, next << 12 | ALL);
    }
    memory.set(3 << 12, 8, BLOCK << 12 | shadow_support::PS | ALL);
    let world = World::new(1, 10, ReclaimPolicy::Fifo);
    let (guest, role) = (&world.guest, world.role);
    let mut vcpu = shadow_mmu::ShadowVcpu::new(&mmu).unwrap();
    let root = vcpu.load_root(&lock, guest, &memory, Gfn::new(1), role).unwrap();
    let request = Request::new(Operation::Read, Privilege::User);
    let mut fault = |page: u64| {
        let gva = Gva::new(page << 12);
        let walk = guest.walk(&memory, &GuestRoot::Cr3(1 << 12), gva, request).unwrap();
        vcpu.fault(&lock, guest, &memory, &walk, request).unwrap()
    };
    assert_eq!(fault(10), FaultOutcome::Fixed);
    let mapped: Vec<u64> = (0..32)
        .filter(|page| {
            let access = mmu_model::Access::supervisor(AccessKind::Read);
            let peek = Peek(vm.host());
            world.rig.walker.translate(&peek, root.get(), page << 12, access).is_ok()
        })
        .collect();
    assert_eq!(mapped, [8, 9, 10, 11, 12, 13]);
    vcpu.drop_roots(&lock);
    world.finish();
}

/// Without accessed bits of our own whatever stands counts as used, so nothing is made ahead.
#[test]
fn without_accessed_bits_there_is_no_window() {
    let caps = no_ad(Capabilities::ept());
    let config = SpteConfig::<mmu_core::spte::Ept>::new(caps).unwrap();
    assert!(!config.ad_enabled());
    let mut rig = shadow_support::rig::Rig::<mmu_core::spte::Ept>::new(
        shadow_support::rig::Machine::default(),
        1,
        caps,
        100,
        ReclaimPolicy::Fifo,
        64,
        |gfn| {
            let pfn = mmu_core::addr::Pfn::new(common::DATA + gfn);
            let level = mmu_core::addr::Level::L1;
            Some(mmu_core::traits::HostPage { pfn, writable: true, level })
        },
    );
    rig.mmu.vm().host().have_at_hand();
    rig.lock.0.lock().unwrap().set_prefetch(8);
    let memory = shadow_support::memory::Memory::new(64, 8);
    let world = World::new(1, 10, ReclaimPolicy::Fifo);
    for (table, next) in [(1, 2), (2, 3), (3, 4)] {
        memory.set(table << 12, 8, next << 12 | ALL);
    }
    (0..8).for_each(|index| memory.set(4 << 12 | index << 3, 8, (20 + index) << 12 | ALL));
    let guest = &world.guest;
    let _ = rig.vcpu.load_root(&rig.lock, guest, &memory, Gfn::new(1), world.role).unwrap();
    let request = Request::new(Operation::Read, Privilege::User);
    let walk = guest.walk(&memory, &GuestRoot::Cr3(1 << 12), Gva::new(0), request).unwrap();
    let outcome = rig.vcpu.fault(&rig.lock, guest, &memory, &walk, request);
    assert_eq!(outcome, Ok(FaultOutcome::Fixed));
    assert_eq!(rig.stats().prefetched, 0);
    world.finish();
    rig.finish();
}

/// As `shadow_tables_are_the_guests_tables_and_never_wider`, with a window.
#[test]
fn shadow_tables_with_a_window_are_never_wider() {
    let mut prefetched = 0;
    for seed in 2001..=2060 {
        let mut world = World::new(seed, 1000, ReclaimPolicy::Accessed);
        world.rig.mmu.vm().host().have_at_hand();
        world.rig.lock.0.lock().unwrap().set_prefetch(8);
        world.furnish();
        world.load_cr3(0);
        for step in 0..1_500 {
            if step == 1_000 {
                world.rig.log();
            }
            world.step();
            world.check();
        }
        prefetched += world.rig.stats().prefetched;
        world.finish();
    }
    println!("{prefetched} entries prefetched");
    assert!(prefetched > 1_000, "{prefetched}");
}
