//! Shadow paging rule by rule: one behaviour a test, on a guest whose tables lead one way.

mod common;
mod shadow_support;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use common::{DATA, TestHost};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Gva, Level};
use mmu_core::dirty::RingSize;
use mmu_core::fault::{EmulateReason, FaultOutcome};
use mmu_core::slot::{LogOptions, SlotFlags, SlotRequest};
use mmu_core::spte::Legacy;
use mmu_core::traits::{
    AgeAnswer, AgeMode, AgeRange, AgeRequest, AgeSink, CountOnly, Effort, MASK_WORDS,
};
use mmu_core::vm::Actor;
use mmu_model::AccessKind;
use shadow_mmu::guest::{GuestRoot, Operation, Privilege, Request};
use shadow_mmu::rmap::{MAX_ALIASES, RmapKey};
use shadow_mmu::{PageRole, ReclaimPolicy, RoleFlags, ShadowCount, ShadowError, ShadowMmu};
use shadow_support::rig::{Machine, slot};
use shadow_support::{A, D, LOWEST, P, PAGES, U, W, World};

const ALL: u64 = P | W | U | A | D;
/// The guest's tables on the way to address 0: one of each level.
const WAY: [u64; 4] = [0, 2, 5, LOWEST];
/// The page at address 0.
const PAGE: u64 = 20;

/// A guest whose address 0 leads to `PAGE`, and whose next ones to the pages after it.
fn guest() -> World {
    guest_with(1000, ReclaimPolicy::Fifo)
}

fn guest_with(quota: u32, policy: ReclaimPolicy) -> World {
    guest_on(Machine::default(), quota, policy)
}

fn guest_on(machine: Machine, quota: u32, policy: ReclaimPolicy) -> World {
    let mut world = World::on(machine, 7, quota, policy);
    for pair in WAY.windows(2) {
        put(&world, pair[0], 0, pair[1] << 12 | ALL);
    }
    for index in 0..8 {
        put(&world, LOWEST, index, (PAGE + index) << 12 | ALL);
    }
    world.load_cr3(0);
    world
}

/// Write an entry of a guest table; nobody is told.
fn put(world: &World, table: u64, index: u64, entry: u64) {
    world.memory.set(table * 4096 + index * 8, 8, entry);
}

/// The same through the emulator, which reports `bytes` bytes from the entry on.
fn write(world: &mut World, table: u64, index: u64, entry: u64, offset: u64, bytes: u64) {
    put(world, table, index, entry);
    let at = Gpa::new(table * 4096 + index * 8 + offset);
    let actor = world.rig.vcpu.actor();
    world.rig.lock.0.lock().unwrap().guest_wrote(actor, at, bytes);
}

fn request(operation: Operation) -> Request {
    Request::new(operation, Privilege::User)
}

/// One fault at a linear address, by a walk of the tables as they are.
fn fault(world: &mut World, gva: u64, operation: Operation) -> Result<FaultOutcome, ShadowError> {
    let root = GuestRoot::Cr3(world.root << 12);
    let walk = world.guest.walk(&world.memory, &root, Gva::new(gva), request(operation));
    let walk = walk.expect("the guest has no fault of its own");
    world.rig.vcpu.fault(&world.rig.lock, &world.guest, &world.memory, &walk, request(operation))
}

fn read(world: &mut World, gva: u64) {
    let outcome = fault(world, gva, Operation::Read).unwrap();
    assert!(matches!(outcome, FaultOutcome::Fixed | FaultOutcome::Spurious), "{outcome:?}");
}

/// What an address leads to by the shadow tables: page offset from the first host page, writable?
fn reached(world: &World, gva: u64) -> Option<(u64, bool)> {
    let access = mmu_model::Access::supervisor(AccessKind::Read);
    let peek = common::Peek(world.rig.mmu.vm().host());
    let found = world.rig.walker.translate(&peek, world.rig.register, gva, access).ok()?;
    Some(((found.pa >> 12) - DATA, found.writable()))
}

fn live(world: &World) -> u32 {
    world.rig.lock.0.lock().unwrap().live_pages()
}

/// The writer's books agree with the tables; what there is.
#[track_caller]
fn count(world: &mut World) -> ShadowCount {
    let (lock, actor) = (&world.rig.lock, &mut world.rig.notifier);
    lock.0.lock().unwrap().check(actor).unwrap()
}

/// The guest of address space `space` has its tables at `root`.
fn enter_space(world: &mut World, space: u16, root: u64) {
    world.role = world.role.in_space(space);
    world.load_cr3(root);
}

/// Row 4.18, bug M1: the guest changes an entry between the walk and the lock, at each level.
#[test]
fn an_entry_that_changes_between_walk_and_lock_is_not_used() {
    for table in WAY {
        for shadowed in [false, true] {
            let mut world = guest();
            if shadowed {
                // The tables have shadows already: the change is reported, and nothing was there.
                read(&mut world, 0x1000);
            }
            let root = GuestRoot::Cr3(0);
            let ask = request(Operation::Read);
            let walk = world.guest.walk(&world.memory, &root, Gva::new(0), ask).unwrap();
            let other = if table == LOWEST { 30 << 12 | ALL } else { 9 << 12 | ALL };
            write(&mut world, table, 0, other, 0, 8);
            let outcome = world
                .rig
                .vcpu
                .fault(&world.rig.lock, &world.guest, &world.memory, &walk, ask)
                .unwrap();
            assert_eq!(outcome, FaultOutcome::Retry, "table {table}, shadowed: {shadowed}");
            assert_eq!(reached(&world, 0), None, "table {table}, shadowed: {shadowed}");
            world.finish();
        }
    }
}

/// Row 4.44: more aliases than anybody should walk, and the frame starts over.
#[test]
fn a_frame_that_is_mapped_a_thousand_times_starts_over() {
    let mut world = guest();
    for table in [LOWEST, LOWEST + 1, LOWEST + 2] {
        put(&world, 5, table - LOWEST, table << 12 | ALL);
        (0..512).for_each(|index| put(&world, table, index, PAGE << 12 | ALL));
    }
    let key = RmapKey { space: 0, level: Level::L1, gfn: Gfn::new(PAGE) };
    let aliases = |world: &World| {
        let list = world.rig.mmu.rmaps().lock(key);
        list.map_or(0, |list| list.entries().count() as u64)
    };
    for number in 0..u64::from(MAX_ALIASES) {
        read(&mut world, number << 12);
        assert_eq!(aliases(&world), number + 1);
    }
    read(&mut world, u64::from(MAX_ALIASES) << 12);
    assert_eq!(aliases(&world), 1, "all went but the new one");
    let recycled = world.rig.lock.0.lock().unwrap().stats().rmap_recycled;
    assert_eq!(recycled, u64::from(MAX_ALIASES));
    assert_eq!(reached(&world, 0), None);
    world.finish();
}

/// Row 4.52: halves of an entry, a byte at its start, and writes that are none to an entry.
#[test]
fn what_the_guest_overwrites_is_undone_entry_by_entry() {
    let cases = [(0, 8, true), (0, 4, true), (4, 4, true), (0, 1, true), (1, 1, false)];
    for (offset, bytes, keeps_the_page) in cases {
        let mut world = guest();
        for gva in [0, 0x1000] {
            read(&mut world, gva);
        }
        let pages = live(&world);
        write(&mut world, LOWEST, 0, 30 << 12 | ALL, offset, bytes);
        assert_eq!(reached(&world, 0), None, "{bytes} bytes at {offset}");
        let neighbour = reached(&world, 0x1000).map(|(page, _)| page);
        let wanted = keeps_the_page.then_some(PAGE + 1);
        assert_eq!(neighbour, wanted, "{bytes} bytes at {offset}");
        assert_eq!(live(&world) == pages, keeps_the_page, "{bytes} bytes at {offset}");
        read(&mut world, 0);
        assert_eq!(reached(&world, 0).map(|(page, _)| page), Some(30));
        world.finish();
    }
    // Across two entries: the page goes.
    let mut world = guest();
    read(&mut world, 0x1000);
    write(&mut world, LOWEST, 0, 30 << 12 | ALL, 4, 8);
    assert_eq!(reached(&world, 0x1000), None);
    world.finish();
}

/// Row 4.53: above level 1 a table that is written and not used loses its shadow; use forgives.
#[test]
fn a_table_that_is_written_all_the_time_loses_its_shadow() {
    let mut world = guest();
    read(&mut world, 0);
    let floods = |world: &World| world.rig.lock.0.lock().unwrap().stats().floods;
    for index in [100, 101] {
        write(&mut world, 5, index, 0, 0, 8);
    }
    // A fault through the page: it is in use.
    put(&world, LOWEST, 1, (PAGE + 1) << 12 | ALL);
    read(&mut world, 0x1000);
    for index in [102, 103] {
        write(&mut world, 5, index, 0, 0, 8);
    }
    assert_eq!(floods(&world), 0);
    write(&mut world, 5, 104, 0, 0, 8);
    assert_eq!(floods(&world), 1);
    assert_eq!(reached(&world, 0), None);
    // The lowest tables are not counted: there a guest writes what it means to use.
    read(&mut world, 0);
    (0..20).for_each(|index| write(&mut world, LOWEST, 100 + index, 0, 0, 8));
    assert_eq!(floods(&world), 1);
    world.finish();
}

/// Rows 4.31, 4.37: a table of the lowest level that is writable is out of sync, and INVLPG mends
/// one address; also in a root that the vCPU left.
#[test]
fn an_address_that_is_invalidated_follows_the_table_in_former_roots_too() {
    let mut world = guest();
    // Address 0x3000 is the table itself.
    put(&world, LOWEST, 3, LOWEST << 12 | ALL);
    for gva in [0, 0x1000] {
        read(&mut world, gva);
    }
    assert_eq!(fault(&mut world, 0x3000, Operation::Write), Ok(FaultOutcome::Fixed));
    assert_eq!(world.rig.lock.0.lock().unwrap().stats().unsyncs, 1);
    let first = world.rig.register;
    // Another root with the same tables below.
    put(&world, 1, 0, 2 << 12 | ALL);
    world.load_cr3(1);
    // Loading a root makes everything below it follow, and protects the table again.
    assert_eq!(reached(&world, 0x3000), None, "nothing is linked under the new root yet");
    read(&mut world, 0);
    assert_eq!(fault(&mut world, 0x3000, Operation::Write), Ok(FaultOutcome::Fixed));
    // Unseen.
    put(&world, LOWEST, 0, 30 << 12 | ALL);
    put(&world, LOWEST, 1, 31 << 12 | ALL);
    assert_eq!(reached(&world, 0).map(|(page, _)| page), Some(PAGE), "stale until a flush");
    let gva = Gva::new(0);
    world.rig.vcpu.guest_invalidated(&world.rig.lock, &world.guest, &world.memory, gva);
    assert_eq!(reached(&world, 0), None, "gone");
    assert_eq!(reached(&world, 0x1000).map(|(page, _)| page), Some(PAGE + 1), "not asked for");
    let current = world.rig.register;
    world.rig.register = first;
    assert_eq!(reached(&world, 0), None, "also in the former root");
    world.rig.register = current;
    world.rig.vcpu.guest_flushed(&world.rig.lock, &world.guest, &world.memory);
    assert_eq!(reached(&world, 0x1000), None, "a flush is for all addresses");
    world.rig.vcpu.guest_invalidated(
        &world.rig.lock,
        &world.guest,
        &world.memory,
        Gva::new(1 << 47),
    );
    world.finish();
}

/// Row 4.32: a table above the lowest level is never writable; the guest's write is emulated.
#[test]
fn tables_above_the_lowest_level_stay_protected() {
    let mut world = guest();
    for (index, table) in (3..).zip([0, 2, 5]) {
        put(&world, LOWEST, index, table << 12 | ALL);
        let gva = index << 12;
        assert_eq!(fault(&mut world, gva, Operation::Write), Ok(FaultOutcome::WriteProtected));
        read(&mut world, gva);
        assert_eq!(reached(&world, gva), Some((table, false)));
        assert_eq!(fault(&mut world, gva, Operation::Write), Ok(FaultOutcome::WriteProtected));
    }
    assert_eq!(world.rig.lock.0.lock().unwrap().stats().unsyncs, 0);
    world.finish();
}

/// Rows 4.12, 4.34: the guest's dirty bit is set by the first write, and a page made clean again
/// loses its write permission when it is synchronised.
#[test]
fn the_first_write_to_a_clean_page_is_noticed() {
    let mut world = guest();
    put(&world, LOWEST, 0, PAGE << 12 | P | W | U);
    read(&mut world, 0);
    assert_eq!(reached(&world, 0), Some((PAGE, false)));
    let entry = |world: &World| world.memory.get(LOWEST * 4096, 8).unwrap() & (A | D);
    assert_eq!(entry(&world), A);
    assert_eq!(fault(&mut world, 0, Operation::Write), Ok(FaultOutcome::Fixed));
    assert_eq!(entry(&world), A | D);
    assert_eq!(reached(&world, 0), Some((PAGE, true)));
    // The table goes out of sync, the guest cleans its entry, and flushes.
    put(&world, LOWEST, 3, LOWEST << 12 | ALL);
    assert_eq!(fault(&mut world, 0x3000, Operation::Write), Ok(FaultOutcome::Fixed));
    put(&world, LOWEST, 0, PAGE << 12 | P | W | U | A);
    world.rig.vcpu.guest_flushed(&world.rig.lock, &world.guest, &world.memory);
    assert_eq!(reached(&world, 0), Some((PAGE, false)));
    world.finish();
}

/// Row 4.13: a supervisor writes to a read-only user page with CR0.WP clear; a user may not follow.
#[test]
fn without_write_protection_a_supervisor_writes_and_no_user_does() {
    let mut world = guest();
    put(&world, LOWEST, 0, PAGE << 12 | P | U | A | D);
    let ask = Request {
        write_protect: shadow_mmu::guest::WriteProtect::Off,
        ..Request::new(Operation::Write, Privilege::Supervisor)
    };
    let root = GuestRoot::Cr3(0);
    let walk = world.guest.walk(&world.memory, &root, Gva::new(0), ask).unwrap();
    let outcome = world.rig.vcpu.fault(&world.rig.lock, &world.guest, &world.memory, &walk, ask);
    assert_eq!(outcome, Ok(FaultOutcome::Fixed));
    let translate = |world: &World, access| {
        let peek = common::Peek(world.rig.mmu.vm().host());
        world.rig.walker.translate(&peek, world.rig.register, 0, access).is_ok()
    };
    assert!(translate(&world, mmu_model::Access::supervisor(AccessKind::Write)));
    assert!(!translate(&world, mmu_model::Access::user(AccessKind::Read)));
    // The user's read makes it the user's, and read-only.
    read(&mut world, 0);
    assert!(translate(&world, mmu_model::Access::user(AccessKind::Read)));
    assert!(!translate(&world, mmu_model::Access::supervisor(AccessKind::Write)));
    world.finish();
}

/// Row 3.37, bug B82: a slot that goes leaves no leaf and no shadow of a table that stood in it.
#[test]
fn a_slot_that_goes_leaves_nothing_behind() {
    let mut world = guest();
    (0..8).for_each(|index| read(&mut world, index << 12));
    assert!(live(&world) >= 4);
    let vm = Arc::clone(world.rig.mmu.vm());
    let request = mmu_core::slot::SlotRequest { bytes: 0, ..slot(PAGES, SlotFlags::empty()) };
    let (mmu, lock) = (&world.rig.mmu, &world.rig.lock);
    let gone =
        vm.set_slot(&mut world.rig.slots, &mut world.rig.notifier, &request, |actor, old| {
            let range = old.range();
            let invalidation = vm.notify().begin(actor.participant(), range);
            let _ = mmu.forget_range(actor, lock, &invalidation, range);
        });
    assert!(gone.is_ok());
    for index in 0..8 {
        assert_eq!(reached(&world, index << 12), None);
    }
    let (lock, actor) = (&world.rig.lock, &mut world.rig.notifier);
    let count = lock.0.lock().unwrap().check(actor).unwrap();
    assert_eq!(count.leaves, [0; 3]);
    // The root is the vCPU's, invalid, until it leaves it.
    assert_eq!(count.pages, 1);
    assert!(!world.rig.vcpu.root_is_current());
    let read = Request::new(Operation::Read, Privilege::User);
    let root = GuestRoot::Cr3(0);
    let walk = world.guest.walk(&world.memory, &root, Gva::new(0), read).unwrap();
    let outcome = world.rig.vcpu.fault(&world.rig.lock, &world.guest, &world.memory, &walk, read);
    let no_slot = EmulateReason::NoSlot { gfn: Gfn::new(PAGE), space: 0 };
    assert_eq!(outcome, Ok(FaultOutcome::Emulate(no_slot)));
    world.finish();
}

/// A slot that is read-only for the guest is mapped so, and writes are the emulator's.
#[test]
fn a_read_only_slot_is_never_writable() {
    let mut world = guest();
    let vm = Arc::clone(world.rig.mmu.vm());
    let request = slot(PAGES, SlotFlags::READ_ONLY);
    let gone = mmu_core::slot::SlotRequest { bytes: 0, ..slot(PAGES, SlotFlags::empty()) };
    for request in [gone, request] {
        let (slots, actor) = (&mut world.rig.slots, &mut world.rig.notifier);
        let _ = vm.set_slot(slots, actor, &request, |_, _| {}).unwrap();
    }
    read(&mut world, 0);
    assert_eq!(reached(&world, 0), Some((PAGE, false)));
    let read_only = EmulateReason::ReadOnly { gfn: Gfn::new(PAGE), slot: 0 };
    assert_eq!(fault(&mut world, 0, Operation::Write), Ok(FaultOutcome::Emulate(read_only)));
    world.finish();
}

/// Rows 4.48, 4.49, B56, B67: the quota holds, roots stay, and with accessed bits what is used all
/// the time outlives what was made later and never used again.
#[test]
fn under_a_quota_used_tables_stay_and_roots_always() {
    const QUOTA: u32 = 14;
    const HOT: u64 = 6;
    const SCAN: u64 = PAGES - LOWEST - HOT;
    let refills = |policy| {
        let mut world = guest_with(QUOTA, policy);
        // Every page from the first lowest table on is one, and maps a page to read.
        for table in LOWEST..PAGES {
            put(&world, 5, table - LOWEST, table << 12 | ALL);
            put(&world, table, 0, 4 << 12 | P | U | A | D);
        }
        for turn in 0..600 {
            for number in [turn % HOT, turn * 5 % HOT, HOT + turn % SCAN] {
                world.enter();
                read(&mut world, number << 21);
                // The processor walks there, and sets A on the way.
                let access = mmu_model::Access::user(AccessKind::Read);
                let host = world.rig.mmu.vm().host();
                assert!(
                    world
                        .rig
                        .walker
                        .translate(host, world.rig.register, number << 21, access)
                        .is_ok()
                );
            }
            // What a fault needs may come on top, if reclaim took part of its way.
            assert!(live(&world) <= QUOTA + 3, "the quota holds");
            assert!(world.rig.vcpu.root_is_current(), "roots are spared");
        }
        let made = world.rig.lock.0.lock().unwrap().stats().pages_made;
        world.finish();
        made
    };
    let (fifo, accessed) = (refills(ReclaimPolicy::Fifo), refills(ReclaimPolicy::Accessed));
    println!("pages made: {fifo} first in first out, {accessed} by accessed bits");
    assert!(accessed * 10 <= fifo * 7, "{accessed} of {fifo}");
}

/// Rows 5.7, 5.9, 5.10: any alias makes a page young, and ranges that start inside a block miss
/// nothing.
#[test]
fn a_page_is_young_if_any_entry_that_maps_it_is() {
    let mut world = guest();
    for index in 0..3 {
        put(&world, LOWEST, index, PAGE << 12 | ALL);
        read(&mut world, index << 12);
    }
    let age = |world: &mut World, mode| {
        world.rig.mmu.age_gfn(&mut world.rig.notifier, Gfn::new(PAGE), mode, Effort::Full)
    };
    assert_eq!(age(&mut world, AgeMode::ClearFlush), AgeAnswer::Young);
    assert_eq!(age(&mut world, AgeMode::Test), AgeAnswer::Old);
    // One of three is used.
    let access = mmu_model::Access::user(AccessKind::Read);
    let host = world.rig.mmu.vm().host();
    assert!(world.rig.walker.translate(host, world.rig.register, 0x2000, access).is_ok());
    assert_eq!(age(&mut world, AgeMode::Test), AgeAnswer::Young);
    let part = GfnRange::new(Gfn::new(PAGE - 3), Gfn::new(PAGE + 1));
    let request = AgeRequest::new(part, AgeMode::Clear);
    let report = world.rig.mmu.age(&mut world.rig.notifier, request, &mut CountOnly);
    assert_eq!((report.mapped, report.young, report.entries), (1, 1, 3));
    let elsewhere = GfnRange::new(Gfn::new(PAGE + 1), Gfn::new(PAGES));
    assert_eq!(world.rig.mmu.test_age(&mut world.rig.notifier, elsewhere), AgeAnswer::Unmapped);
    world.finish();
}

/// Row 5.3: aging completes while another thread has the writer for as long as it likes.
#[test]
fn aging_does_not_wait_for_the_writer() {
    let mut world = guest();
    read(&mut world, 0);
    let held = world.rig.lock.0.lock().unwrap();
    let mode = AgeMode::Clear;
    let answer = world.rig.mmu.age_gfn(&mut world.rig.notifier, Gfn::new(PAGE), mode, Effort::Full);
    assert_eq!(answer, AgeAnswer::Young);
    drop(held);
    world.finish();
}

/// Ages all guest memory; did that flush everything, not only what was found young?
fn flushes_all(
    mmu: &ShadowMmu<Legacy, TestHost>,
    actor: &mut Actor<TestHost>,
    mode: AgeMode,
) -> bool {
    let host = mmu.vm().host();
    let _ = host.take_batches();
    let range = GfnRange::from_len(Gfn::new(0), PAGES);
    let _ = mmu.age(actor, AgeRequest::new(range, mode), &mut CountOnly);
    host.take_batches().iter().any(|batch| batch.covers(GfnRange::ALL))
}

/// Row 5.5: what was cleared without a flush is flushed for by the next precise pass, or when that
/// is asked for; and then by nobody again.
#[test]
fn what_was_cleared_without_a_flush_is_flushed_once() {
    use AgeMode::{Clear, ClearFlush, Test};
    let mut world = guest();
    read(&mut world, 0);
    let (mmu, actor) = (Arc::clone(&world.rig.mmu), &mut world.rig.notifier);
    mmu.vm().host().record(true);
    let all = GfnRange::from_len(Gfn::new(0), PAGES);
    for _ in 0..2 {
        assert!(!flushes_all(&mmu, actor, Test));
        assert!(!flushes_all(&mmu, actor, ClearFlush), "nothing is owed for others");
        assert!(!flushes_all(&mmu, actor, Clear), "it does not flush");
        assert!(flushes_all(&mmu, actor, ClearFlush), "owed for the last one");
        assert!(!flushes_all(&mmu, actor, ClearFlush), "paid");
        assert!(!flushes_all(&mmu, actor, Clear));
        for flushes in [1, 0] {
            let _ = mmu.vm().host().take_batches();
            mmu.flush_aged(actor, all);
            assert_eq!(mmu.vm().host().take_batches().len(), flushes);
        }
    }
    mmu.vm().host().record(false);
    world.finish();
}

/// Row 5.5: a flush that was asked for and is not complete is nobody's excuse.
#[test]
fn a_precise_pass_during_the_flush_of_another_flushes_too() {
    let mut world = guest();
    read(&mut world, 0);
    let (mmu, actor) = (Arc::clone(&world.rig.mmu), &mut world.rig.notifier);
    let host = mmu.vm().host();
    let other = Arc::new(Mutex::new(mmu.vm().actor().unwrap()));
    // Inside the flush of the first.
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (inner, noted, asks) = (Arc::clone(&mmu), Arc::clone(&seen), Arc::clone(&other));
    host.before_flush(Some(Arc::new(move |_| {
        // Not inside its own.
        if let Ok(mut asks) = asks.try_lock() {
            noted.lock().unwrap().push(flushes_all(&inner, &mut asks, AgeMode::ClearFlush));
        }
    })));
    host.record(true);
    assert!(!flushes_all(&mmu, actor, AgeMode::Clear));
    let _ = flushes_all(&mmu, actor, AgeMode::ClearFlush);
    assert_eq!(*seen.lock().unwrap(), [true], "believed in a flush that is not complete");
    host.before_flush(None);
    assert!(flushes_all(&mmu, actor, AgeMode::ClearFlush), "the passes could not tell");
    assert!(!flushes_all(&mmu, actor, AgeMode::ClearFlush), "all is paid");
    host.record(false);
    drop(other);
    world.finish();
}

/// Row 5.5: what a call has cleared that is not over, and will not flush, is flushed for as well.
#[test]
fn a_precise_pass_inside_a_call_flushes_what_that_one_cleared() {
    let mut world = guest();
    read(&mut world, 0);
    let mmu = Arc::clone(&world.rig.mmu);
    let mut other = mmu.vm().actor().unwrap();
    mmu.vm().host().record(true);
    let mut inside = Inside { mmu: &mmu, actor: &mut other, flushed: Vec::new() };
    let all = GfnRange::from_len(Gfn::new(0), PAGES);
    let request = AgeRequest::new(all, AgeMode::Clear);
    let report = mmu.age(&mut world.rig.notifier, request, &mut inside);
    assert_eq!((report.young, inside.flushed), (1, vec![true]), "a TLB hides the page's uses");
    mmu.vm().host().record(false);
    drop(other);
    world.finish();
}

/// Does a precise pass when it is told of a table.
struct Inside<'a> {
    mmu: &'a ShadowMmu<Legacy, TestHost>,
    actor: &'a mut Actor<TestHost>,
    flushed: Vec<bool>,
}

impl AgeSink for Inside<'_> {
    fn table(&mut self, _: Gfn, _: &[u64; MASK_WORDS], _: &[u64; MASK_WORDS]) {
        self.flushed.push(flushes_all(self.mmu, self.actor, AgeMode::ClearFlush));
    }

    fn huge(&mut self, _: Gfn, _: Level, _: bool) {}
}

/// Arguments that no honest caller gives are errors, and change nothing.
#[test]
fn a_root_of_another_level_is_refused() {
    let mut world = guest();
    let role = PageRole::new(Level::L5, RoleFlags::empty());
    let gfn = Gfn::new(1);
    let refused = world.rig.vcpu.load_root(&world.rig.lock, &world.guest, &world.memory, gfn, role);
    assert_eq!(refused, Err(ShadowError::WrongLevel { role: Level::L5, host: Level::L4 }));
    assert_eq!(live(&world), 1);
    assert!(world.rig.vcpu.root_is_current());
    world.finish();
}

/// Row 4.33: tables that are linked many times on every level are met by many ways, millions of
/// them here; the search for what is out of sync takes few.
#[test]
fn the_search_for_tables_out_of_sync_does_not_take_every_way() {
    const WAYS: u64 = 256;
    let mut world = guest();
    for (table, next, entries) in [(0, 2, WAYS), (2, 5, 512), (5, LOWEST, 512)] {
        (0..entries).for_each(|index| put(&world, table, index, next << 12 | ALL));
    }
    // Address 0x1000 of each block is the table itself.
    put(&world, LOWEST, 1, LOWEST << 12 | ALL);
    for index in 0..WAYS {
        read(&mut world, index << 39 | index << 30 | index << 21);
    }
    assert_eq!(live(&world), 4, "one shadow for each table");
    assert_eq!(count(&mut world).links, 3 * WAYS);
    assert_eq!(fault(&mut world, 0x1000, Operation::Write), Ok(FaultOutcome::Fixed));
    assert_eq!(count(&mut world).unsync, 1);
    put(&world, LOWEST, 0, 30 << 12 | ALL);
    let before = world.rig.stats().sync_steps;
    world.load_cr3(0);
    let steps = world.rig.stats().sync_steps - before;
    // One search to protect, one to synchronise, one that finds nothing.
    assert!((3..=3 * 1025).contains(&steps), "{steps} steps");
    assert_eq!(count(&mut world).unsync, 0);
    let last = WAYS - 1;
    for gva in [0, last << 39 | last << 30 | last << 21] {
        assert_eq!(reached(&world, gva), None, "{gva:#x} does not follow its table");
    }
    world.finish();
}

/// Rows 4.44, 4.45: a table that is linked too often is not linked by its first parent any more.
#[test]
fn a_table_that_is_linked_a_thousand_times_loses_a_link_for_each_more() {
    const PARENTS: u64 = 3 * 512;
    let mut world = guest();
    for index in 0..3 {
        put(&world, 2, index, (5 + index) << 12 | ALL);
        (0..512).for_each(|entry| put(&world, 5 + index, entry, LOWEST << 12 | ALL));
    }
    for number in 0..PARENTS {
        read(&mut world, number << 21);
        assert_eq!(reached(&world, number << 21).map(|(page, _)| page), Some(PAGE));
    }
    let most = u64::from(MAX_ALIASES);
    assert_eq!(world.rig.stats().links_recycled, PARENTS - most);
    // Those above the table: one and three.
    assert_eq!(count(&mut world).links, 1 + 3 + most);
    // What lost its link gets it back, and is in sync like the others.
    assert_eq!(fault(&mut world, 3 << 12, Operation::Write), Ok(FaultOutcome::Fixed));
    let lost = (0..PARENTS).find(|number| reached(&world, number << 21).is_none()).unwrap();
    read(&mut world, lost << 21);
    assert_eq!(reached(&world, lost << 21).map(|(page, _)| page), Some(PAGE));
    assert_eq!(count(&mut world).links, 1 + 3 + most);
    world.finish();
}

/// Row 3.47: a write that the full ring could not tell ends before it changes anything, and goes on
/// when the ring was read and reset.
#[test]
fn a_full_ring_stops_a_write_before_anything_is_changed() {
    let ring = RingSize::from_bytes(1 << 14).unwrap();
    let log = LogOptions { bitmap: false, ring: Some(ring), initially_set: false };
    let machine = Machine { log, ..Machine::default() };
    let mut world = guest_on(machine, 1000, ReclaimPolicy::Fifo);
    put(&world, LOWEST, 3, LOWEST << 12 | ALL);
    world.rig.log();
    read(&mut world, 0);
    assert_eq!(reached(&world, 0), Some((PAGE, false)));
    assert_eq!(fault(&mut world, 0x2000, Operation::Write), Ok(FaultOutcome::Fixed));
    assert_eq!(reached(&world, 0x2000), Some((PAGE + 2, true)));
    // The host writes for the vCPU, until there is room for nothing more.
    let all = GfnRange::from_len(Gfn::new(0), PAGES);
    while world.rig.vcpu.actor().mark_dirty(0, all).is_ok() {}
    assert_eq!(world.rig.vcpu.actor().ring().unwrap().used(), ring.entries());
    let before = (world.rig.stats(), count(&mut world));
    // A page that is mapped, one that is not, and a table that would go out of sync.
    let pages = [(0, Some((PAGE, false))), (0x1000, None), (0x3000, None)];
    for (gva, now) in pages {
        assert_eq!(fault(&mut world, gva, Operation::Write), Ok(FaultOutcome::RingFull));
        assert_eq!(reached(&world, gva), now, "{gva:#x}");
    }
    assert_eq!((world.rig.stats(), count(&mut world)), before, "something was changed");
    read(&mut world, 0x1000);
    assert_eq!(reached(&world, 0x1000), Some((PAGE + 1, false)), "reading tells nothing");
    let rig = &mut world.rig;
    let ring = rig.vcpu.actor().ring().unwrap();
    let told: BTreeSet<u64> = ring.consumer().map(|page| page.offset).collect();
    assert!(told.contains(&(PAGE + 2)), "{told:?}");
    let mmu = Arc::clone(&rig.mmu);
    let mut protect = |space, first, mask| {
        mmu.protect_marked(&mut rig.notifier, &rig.lock, space, Gfn::new(first), mask);
    };
    let _ = ring.reset(u64::MAX, |key, first, mask| protect(key.as_id, first, mask)).unwrap();
    assert_eq!(reached(&world, 0x2000), Some((PAGE + 2, false)), "the next write is told");
    let again = [(0, PAGE), (0x1000, PAGE + 1), (0x2000, PAGE + 2), (0x3000, LOWEST)];
    for (gva, page) in again {
        assert_eq!(fault(&mut world, gva, Operation::Write), Ok(FaultOutcome::Fixed));
        assert_eq!(reached(&world, gva), Some((page, true)));
    }
    let told = world.rig.vcpu.actor().ring().unwrap().consumer().map(|page| page.offset);
    assert!(told.eq(again.map(|(_, page)| page)));
    world.finish();
}

/// Invariant I8, row 4.34: that a page was written stays known when its entry follows the guest's
/// and permits less, and when it is used again.
#[test]
fn what_was_written_stays_known_when_an_entry_changes() {
    for used_again in [false, true] {
        let mut world = guest();
        put(&world, LOWEST, 3, LOWEST << 12 | ALL);
        for gva in [0, 0x3000] {
            assert_eq!(fault(&mut world, gva, Operation::Write), Ok(FaultOutcome::Fixed));
        }
        put(&world, LOWEST, 0, PAGE << 12 | P | U | A | D);
        world.load_cr3(0);
        assert_eq!(reached(&world, 0), Some((PAGE, false)));
        if used_again {
            let (mode, effort) = (AgeMode::ClearFlush, Effort::Full);
            let (mmu, notifier) = (&world.rig.mmu, &mut world.rig.notifier);
            assert_eq!(mmu.age_gfn(notifier, Gfn::new(PAGE), mode, effort), AgeAnswer::Young);
            assert_eq!(fault(&mut world, 0, Operation::Read), Ok(FaultOutcome::Fixed));
        }
        let range = GfnRange::from_len(Gfn::new(PAGE), 1);
        let vm = Arc::clone(world.rig.mmu.vm());
        let invalidation = vm.notify().begin(world.rig.notifier.participant(), range);
        let (lock, actor) = (&world.rig.lock, &mut world.rig.notifier);
        let gone = world.rig.mmu.unmap_in(actor, lock, &invalidation, range);
        drop(invalidation);
        assert_eq!((gone.leaves, gone.dirty), (1, 1), "used again: {used_again}");
        world.finish();
    }
}

/// Rows 4.26, 4.35, 4.60: a frame that is a table in one address space is protected in the other,
/// too: when it gets a shadow, and before that is made to follow.
#[test]
fn a_table_is_protected_in_every_address_space() {
    const TABLE: u64 = 30;
    for (data, other) in [(0, 1), (1, 0)] {
        let mut world = guest();
        let vm = Arc::clone(world.rig.mmu.vm());
        let second = SlotRequest { as_id: 1, ..slot(PAGES, SlotFlags::empty()) };
        let (slots, actor) = (&mut world.rig.slots, &mut world.rig.notifier);
        let _ = vm.set_slot(slots, actor, &second, |_, _| {}).unwrap();
        // To one guest a page at 0x2000, to the other the table that leads to its address 0.
        put(&world, LOWEST, 2, TABLE << 12 | ALL);
        for (table, next) in [(1, 3), (3, 6), (6, TABLE), (TABLE, PAGE)] {
            put(&world, table, 0, next << 12 | ALL);
        }
        enter_space(&mut world, data, 0);
        assert_eq!(fault(&mut world, 0x2000, Operation::Write), Ok(FaultOutcome::Fixed));
        assert_eq!(reached(&world, 0x2000), Some((TABLE, true)));
        let register = world.rig.register;
        enter_space(&mut world, other, 1);
        read(&mut world, 0);
        assert_eq!(reached(&world, 0).map(|(page, _)| page), Some(PAGE));
        world.rig.register = register;
        assert_eq!(reached(&world, 0x2000), Some((TABLE, false)), "writes would go unseen");
        let _ = count(&mut world);
        // It goes out of sync by a write in the one, and follows at a flush in the other.
        enter_space(&mut world, data, 0);
        assert_eq!(fault(&mut world, 0x2000, Operation::Write), Ok(FaultOutcome::Fixed));
        assert_eq!(count(&mut world).unsync, 1);
        put(&world, TABLE, 0, (PAGE + 1) << 12 | ALL);
        enter_space(&mut world, other, 1);
        assert_eq!(reached(&world, 0), None);
        assert_eq!(count(&mut world).unsync, 0);
        world.rig.register = register;
        assert_eq!(reached(&world, 0x2000), Some((TABLE, false)), "writes would go unseen");
        world.finish();
    }
}
