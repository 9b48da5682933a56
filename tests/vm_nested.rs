//! One VM with direct and shadow tables: a guest hypervisor and its guest share memory, and each
//! reaches what it may and nothing more (KVM rows 4.26, 4.31, 4.59, 6.14; issue of S1).

mod common;
mod shadow_support;
mod vm_support;

use mmu_core::addr::{Gfn, GfnRange, Gpa};
use mmu_core::slot::SlotFlags;
use mmu_core::stats::Counter;
use mmu_model::{AccessKind, Random};
use shadow_support::rig::some_kind;
use vm_support::{
    ALL, BACK, BLOCKS, End, LARGE, Machine, PAGES, READ, Setup, TABLES, first_table, leaf, link,
    slot, tables_at,
};

/// What a run came across.
#[derive(Debug, Default)]
struct Seen {
    l1_reached: u64,
    l2_reached: u64,
    reflected: u64,
    emulated: u64,
    unseen: u64,
    unsyncs: u64,
    huge: u64,
    prefetched: u64,
}

/// Any entry for a table at `level`; often one that leads on.
fn some_entry(random: &mut Random, level: u32) -> u64 {
    if random.chance(1, 8) {
        return 0;
    }
    let mut permits = 0;
    for (bit, chance) in [(1, 14), (2, 12), (4, 12), (1 << 8, 10), (1 << 9, 8)] {
        permits |= if random.chance(chance, 16) { bit } else { 0 };
    }
    if level == 2 && random.chance(1, 3) {
        return random.below(BLOCKS) << 21 | LARGE | BACK | permits;
    }
    let target = match level {
        1 if random.chance(1, 4) => random.below(TABLES),
        1 => random.below(BLOCKS) * 512 + TABLES + random.below(4),
        _ => first_table(level - 1) + random.below(tables_at(level - 1)),
    };
    target << 12 | permits | if level == 1 { BACK } else { 0 }
}

fn step(machine: &mut Machine, seen: &mut Seen) {
    let random = &mut machine.random;
    let address = machine.addresses[random.below(machine.addresses.len() as u64) as usize];
    let kind = some_kind(random);
    match random.below(100) {
        0..35 => edit(machine, seen),
        35..70 => {
            match machine.l2_access(address, kind) {
                End::Reached(_) => seen.l2_reached += 1,
                End::Reflected => seen.reflected += 1,
                End::Protected | End::Nowhere => {}
            }
            if kind == AccessKind::Write {
                written_by_l2(machine, address);
            }
            seen.huge += u64::from(machine.shadow(address).is_some_and(|found| found.level > 1));
        }
        70..85 => {
            let gfn = random.below(BLOCKS) * 512 + random.below(24);
            if let End::Reached(_) = machine.l1_access(gfn, kind) {
                seen.l1_reached += 1;
            }
        }
        85..90 => machine.flush(),
        90..92 => {
            let number = random.below(2);
            machine.point(number);
        }
        92..94 => {
            let block = random.below(BLOCKS);
            let _ = machine.take_back(block);
        }
        94 => {
            machine.note("zap all".to_owned());
            let _ = machine.vm.zap_all(&mut machine.notifier);
        }
        95..98 => track(machine),
        _ => machine.swap(),
    }
}

/// What L2 may write to, and is one of L1's tables, it does write to: an entry at random.
fn written_by_l2(machine: &mut Machine, address: u64) {
    let Some(found) = machine.shadow(address).filter(|found| found.writable()) else { return };
    let gfn = machine.judge(address, found.pa >> 12, READ);
    if gfn < TABLES {
        let index = machine.random.below(4);
        let entry = some_entry(&mut machine.random, 1);
        machine.note(format!("L2 sets {gfn}[{index}] = {entry:#x}"));
        machine.memory.set(gfn << 12 | index << 3, 8, entry);
        machine.remember();
    }
}

fn edit(machine: &mut Machine, seen: &mut Seen) {
    let random = &mut machine.random;
    let level = match random.below(8) {
        0 => 3 + random.below(2) as u32,
        1..4 => 2,
        _ => 1,
    };
    let table = first_table(level) + random.below(tables_at(level));
    let index = random.below(if level == 1 { 4 } else { 2 });
    let entry = some_entry(random, level);
    match machine.edit(table, index, entry) {
        End::Protected => seen.emulated += 1,
        _ => seen.unseen += 1,
    }
}

/// The embedder wants to see every write to some page, or no more.
fn track(machine: &mut Machine) {
    let gfn = machine.random.below(TABLES + 4);
    let (vm, actor) = (&machine.vm, &mut machine.notifier);
    if machine.tracked.remove(&gfn) {
        vm.untrack_write(actor, 0, Gfn::new(gfn)).unwrap();
    } else {
        vm.track_write(actor, 0, Gfn::new(gfn)).unwrap();
        machine.tracked.insert(gfn);
    }
    machine.note(format!("tracked: {:?}", machine.tracked));
}

/// The shadow of L1's tables is what they say and never more, whoever writes to them.
#[test]
fn a_guest_and_its_guest_reach_what_they_may() {
    let mut seen = Seen::default();
    for seed in 0..40 {
        let mut machine = Machine::new(seed, if seed % 4 == 3 { 12 } else { 1000 });
        if seed % 2 == 0 {
            machine.host().have_at_hand();
            machine.shadow_mmu().lock.0.lock().unwrap().set_prefetch(8);
        }
        for _ in 0..1_500 {
            step(&mut machine, &mut seen);
            machine.check();
        }
        let stats = *machine.shadow_mmu().lock.0.lock().unwrap().stats();
        seen.unsyncs += stats.unsyncs;
        seen.prefetched += stats.prefetched;
        machine.finish();
    }
    println!("{seen:?}");
    assert!(seen.l1_reached > 1_000 && seen.l2_reached > 1_000, "{seen:?}");
    assert!(seen.emulated > 500 && seen.unseen > 500 && seen.unsyncs > 100, "{seen:?}");
    assert!(seen.reflected > 100 && seen.huge > 100, "{seen:?}");
    assert!(seen.prefetched > 100, "{seen:?}");
}

/// KVM rows 4.26, 4.31: a write of L1's to a table of its own is seen, or the table is out of sync.
#[test]
fn a_table_that_l1_has_mapped_is_protected_when_it_gets_a_shadow() {
    let mut machine = Machine::new(1, 1000);
    machine.set_up_path();
    machine.set_up(0, 1, leaf(600));
    // L1 wrote its tables just now: they are writable, by its TLB too.
    for table in [12, 9, 6, 0] {
        assert!(matches!(machine.l1_access(table, AccessKind::Write), End::Reached(_)));
    }
    assert_eq!(machine.l2_access(0x1000, AccessKind::Read), reached(&machine, 600));
    for table in [12, 9, 6] {
        assert_eq!(machine.l1_access(table, AccessKind::Write), End::Protected, "{table}");
    }
    // At level 1 the guest may go ahead.
    let before = machine.shadow_mmu().lock.0.lock().unwrap().stats().unsyncs;
    assert!(matches!(machine.edit(0, 1, leaf(700)), End::Reached(_)));
    assert_eq!(machine.shadow_mmu().lock.0.lock().unwrap().stats().unsyncs, before + 1);
    // Until L1 flushes the old page may be used, and is.
    assert_eq!(machine.l2_access(0x1000, AccessKind::Read), reached(&machine, 600));
    machine.flush();
    assert_eq!(machine.l2_access(0x1000, AccessKind::Read), reached(&machine, 700));
    // In sync again, so the next write is noticed again.
    assert!(matches!(machine.edit(0, 1, leaf(800)), End::Reached(_)));
    assert_eq!(machine.shadow_mmu().lock.0.lock().unwrap().stats().unsyncs, before + 2);
    machine.flush();
    assert_eq!(machine.l2_access(0x1000, AccessKind::Read), reached(&machine, 800));
    machine.check();
    machine.finish();
}

fn reached(machine: &Machine, gfn: u64) -> End {
    End::Reached(machine.backing.pfn(gfn).unwrap())
}

/// KVM row 6.14: no page of 2 MiB lies over a table that has a shadow, in either MMU.
#[test]
fn direct_leaves_are_small_over_tables_that_have_a_shadow() {
    let mut machine = Machine::new(2, 1000);
    (0..BLOCKS).for_each(|block| machine.back_with(block, true));
    machine.set_up_path();
    machine.set_up(0, 0, leaf(600));
    assert_eq!(machine.l2_access(0, AccessKind::Read), reached(&machine, 600));
    let _ = machine.l1_access(100, AccessKind::Write);
    assert_eq!(machine.direct(100).unwrap().level, 1, "table 0 is in the way");
    let _ = machine.l1_access(1024, AccessKind::Write);
    assert_eq!(machine.direct(1024).unwrap().level, 2, "nothing is");
    // Table 0 goes out of sync, and is in the way all the same.
    assert!(matches!(machine.edit(0, 0, leaf(601)), End::Reached(_)));
    let _ = machine.vm.unmap(&mut machine.notifier, GfnRange::from_len(Gfn::new(0), 512));
    let _ = machine.l1_access(100, AccessKind::Write);
    assert_eq!(machine.direct(100).unwrap().level, 1);
    // The shadows go, the lower with the top one, and with them what was in the way.
    assert!(machine.vm.unprotect(&mut machine.notifier, Gfn::new(12)));
    assert!(!machine.vm.unprotect(&mut machine.notifier, Gfn::new(0)));
    let _ = machine.vm.unmap(&mut machine.notifier, GfnRange::from_len(Gfn::new(0), 512));
    let _ = machine.l1_access(100, AccessKind::Write);
    assert_eq!(machine.direct(100).unwrap().level, 2);
    machine.finish();
}

/// The huge page that L1 has over its tables loses write access as a whole, then comes apart.
#[test]
fn a_huge_page_over_a_table_is_written_no_more() {
    let mut machine = Machine::new(3, 1000);
    (0..BLOCKS).for_each(|block| machine.back_with(block, true));
    machine.set_up_path();
    machine.set_up(0, 0, leaf(600));
    let _ = machine.l1_access(9, AccessKind::Write);
    assert_eq!(machine.direct(9).unwrap().level, 2);
    assert_eq!(machine.l2_access(0, AccessKind::Read), reached(&machine, 600));
    assert!(!machine.direct(9).unwrap().writable());
    assert_eq!(machine.l1_access(9, AccessKind::Write), End::Protected);
    assert_eq!(machine.l1_access(100, AccessKind::Write), reached(&machine, 100));
    machine.check();
    machine.finish();
}

/// KVM rows 3.34, 3.36, 6.6: what goes, goes from both.
#[test]
fn unmap_zap_all_and_the_end_of_a_slot_reach_both_mmus() {
    let slots =
        vec![slot(0, 0, 512, SlotFlags::empty()), slot(1, 512, PAGES - 512, SlotFlags::empty())];
    let mut machine = Machine::with(4, Setup { slots, ..Setup::default() });
    machine.set_up_path();
    machine.set_up(0, 1, leaf(600));
    let map = |machine: &mut Machine| {
        assert_eq!(machine.l1_access(600, AccessKind::Write), reached(machine, 600));
        assert_eq!(machine.l2_access(0x1000, AccessKind::Write), reached(machine, 600));
        assert!(machine.direct(600).is_some() && machine.shadow(0x1000).is_some());
    };
    map(&mut machine);
    let gone = machine.take_back(1);
    assert_eq!((gone.direct.pages(), gone.shadow.leaves), (1, 1));
    assert!(machine.direct(600).is_none() && machine.shadow(0x1000).is_none());
    map(&mut machine);
    let _ = machine.vm.zap_all(&mut machine.notifier);
    assert!(!machine.l1.root_is_current() && !machine.l2.root_is_current());
    map(&mut machine);
    let change = |machine: &mut Machine, pages| {
        let request = slot(1, 512, pages, SlotFlags::empty());
        let (vm, actor) = (&machine.vm, &mut machine.notifier);
        let _ = vm.set_slot(&mut machine.slots, actor, &request, None).unwrap();
    };
    change(&mut machine, 0);
    assert!(machine.direct(600).is_none() && machine.shadow(0x1000).is_none());
    assert_eq!(machine.l1_access(600, AccessKind::Read), End::Nowhere);
    assert_eq!(machine.l2_access(0x1000, AccessKind::Read), End::Nowhere);
    change(&mut machine, PAGES - 512);
    map(&mut machine);
    machine.check();
    machine.finish();
}

/// A slot with tables in it goes and comes again: the new memory is watched as the old was.
#[test]
fn a_slot_with_tables_that_comes_again_is_watched_again() {
    let mut machine = Machine::new(5, 1000);
    machine.set_up_path();
    machine.set_up(0, 1, leaf(600));
    assert_eq!(machine.l2_access(0x1000, AccessKind::Read), reached(&machine, 600));
    let change = |machine: &mut Machine, pages| {
        let request = slot(0, 0, pages, SlotFlags::empty());
        let (vm, actor) = (&machine.vm, &mut machine.notifier);
        let _ = vm.set_slot(&mut machine.slots, actor, &request, None).unwrap();
    };
    change(&mut machine, 0);
    assert_eq!(machine.shadow_mmu().lock.0.lock().unwrap().live_pages(), 1, "its root");
    // L2 enters while there is no memory: a root without a table.
    machine.enter_l2();
    change(&mut machine, PAGES);
    assert!(matches!(machine.l1_access(12, AccessKind::Write), End::Reached(_)));
    assert_eq!(machine.l2_access(0x1000, AccessKind::Read), reached(&machine, 600));
    for table in [12, 9, 6] {
        assert_eq!(machine.l1_access(table, AccessKind::Write), End::Protected, "{table}");
    }
    machine.check();
    machine.finish();
}

/// KVM row 4.54: what cannot be emulated is let through by giving the shadow up.
#[test]
fn a_table_whose_shadow_is_given_up_is_written_at_once() {
    let mut machine = Machine::new(6, 1000);
    machine.set_up_path();
    machine.set_up(0, 1, leaf(600));
    let _ = machine.l2_access(0x1000, AccessKind::Read);
    assert_eq!(machine.l1_access(6, AccessKind::Write), End::Protected);
    assert!(machine.vm.unprotect(&mut machine.notifier, Gfn::new(6)));
    assert_eq!(machine.l1_access(6, AccessKind::Write), reached(&machine, 6));
    assert!(!machine.vm.unprotect(&mut machine.notifier, Gfn::new(6)), "there is none");
    machine.memory.set(6 << 12, 8, link(1));
    machine.remember();
    machine.flush();
    assert_eq!(machine.l2_access(0x1000, AccessKind::Read), End::Reflected);
    machine.memory.set(1 << 12 | 8, 8, 700 << 12 | ALL | BACK);
    machine.vm.guest_wrote(&mut machine.notifier, Gpa::new(1 << 12 | 8), 8);
    machine.remember();
    assert_eq!(machine.l2_access(0x1000, AccessKind::Read), reached(&machine, 700));
    machine.finish();
}

/// A table that is out of sync stays so while L2 goes on: nobody relies on seeing L1's writes to
/// it.
#[test]
fn a_table_out_of_sync_is_written_without_exits_until_it_is_followed() {
    let mut machine = Machine::new(6, 1000);
    machine.set_up_path();
    for index in 0..4 {
        machine.set_up(0, index, leaf(600 + index));
    }
    assert_eq!(machine.l2_access(0, AccessKind::Read), reached(&machine, 600));
    let written = End::Reached(machine.backing.pfn(0).unwrap());
    assert_eq!(machine.l1_access(0, AccessKind::Write), written);
    let flushes = machine.stat(Counter::FlushRequests);
    for index in 1..4 {
        let read = machine.l2_access(index << 12, AccessKind::Read);
        assert_eq!(read, reached(&machine, 600 + index));
        assert!(machine.direct(0).is_some_and(|found| found.writable()), "after read {index}");
    }
    assert_eq!(machine.stat(Counter::FlushRequests), flushes);
    assert_eq!(machine.shadow_mmu().lock.0.lock().unwrap().stats().unsyncs, 1);
    machine.finish();
}

/// Rows of large pages that are made again with other permissions count against the quota.
#[test]
fn the_quota_holds_where_rows_are_made_again() {
    const QUOTA: u32 = 8;
    for seed in 0..20 {
        let mut machine = Machine::new(seed, QUOTA);
        machine.set_up(12, 0, link(9));
        machine.set_up(9, 0, link(6));
        machine.set_up(9, 1, link(7));
        // Not dirty: mapped for reads first.
        let clean = 7 | 1 << 8 | LARGE | BACK;
        for (table, index, block) in [(6, 0, 0), (6, 1, 1), (7, 0, 2), (7, 1, 3)] {
            machine.set_up(table, index, block << 21 | clean);
        }
        for kind in [AccessKind::Read, AccessKind::Write] {
            for address in [0x3000, 1 << 21, 1 << 30, 1 << 30 | 1 << 21] {
                let _ = machine.l2_access(address, kind);
                let live = machine.shadow_mmu().lock.0.lock().unwrap().live_pages();
                assert!(live <= QUOTA, "seed {seed}: {live} pages");
            }
        }
        machine.finish();
    }
}
