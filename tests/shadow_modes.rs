//! Shadow tables in every paging mode of a guest, on host tables of three, four and five levels.
//!
//! As `shadow_model`, with guests that change their mode, map pages of 2 MiB, 4 MiB and 1 GiB, and
//! have memory that the host backs by small and by huge pages. The specification walks the guest's
//! tables on its own: its masks, indices and reserved bits are written down here once more.

mod common;
mod shadow_support;

use mmu_core::addr::{Gfn, GfnRange, Gpa};
use mmu_core::fault::FaultOutcome;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use mmu_model::AccessKind;
use shadow_mmu::guest::{GuestRoot, GuestWalker, WriteProtect};
use shadow_mmu::{PageRole, ReclaimPolicy, ShadowError};
use shadow_support::kernel::{Kernel, Mode, POINTERS, caps, guest_cpu};
use shadow_support::wide::{Guest, PAGES, PHYS, Seen, World, tables_of};
use shadow_support::{A, D, P, PS, U, W};

fn world(seed: u64, levels: u8, mode: Mode, quota: u32, policy: ReclaimPolicy) -> World<Kernel> {
    World::new(seed, caps(levels), Kernel::new(mode), quota, policy)
}

/// Every mode first for some seeds, on tables of `levels`.
fn all_modes(levels: u8) -> Seen {
    let mut sum = Seen::default();
    for (number, mode) in (0..).zip(Mode::all(levels)) {
        for seed in 0..12 {
            let quota = if seed % 4 == 3 { 12 } else { 1000 };
            let seed = seed + 100 * number + 10_000 * u64::from(levels);
            let policy = if seed % 2 == 0 { ReclaimPolicy::Fifo } else { ReclaimPolicy::Accessed };
            world(seed, levels, mode, quota, policy).run(&mut sum);
        }
    }
    println!("{levels} levels: {sum:?}");
    assert!(sum.reached[1] > 1000 && sum.reached[2] > 1000, "{sum:?}");
    assert!(sum.small > 1000 && sum.huge > 200 && sum.unsyncs > 100, "{sum:?}");
    sum
}

#[test]
fn every_mode_on_tables_of_three_levels_is_never_wider() {
    let _ = all_modes(3);
}

#[test]
fn every_mode_on_tables_of_four_levels_is_never_wider() {
    assert!(all_modes(4).reached[3] > 100, "pages of 1 GiB");
}

#[test]
fn every_mode_on_tables_of_five_levels_is_never_wider() {
    assert!(all_modes(5).reached[3] > 100, "pages of 1 GiB");
}

const ALL: u64 = P | W | U | A | D;

/// A guest in long mode whose address 0 is in the 2 MiB page `entry`, with memory behind block 1
/// in small pages and behind block 2 in a huge one.
fn large_page(entry: u64) -> World<Kernel> {
    let mut world = world(1, 4, Mode::Long4, 1000, ReclaimPolicy::Fifo);
    world.backing.set(1, 50, false);
    world.backing.set(2, 51, true);
    for (table, next) in [(13, 10), (14, 10), (10, 6)] {
        world.memory.set(table << 12, 8, next << 12 | ALL);
    }
    world.memory.set(6 << 12, 8, entry);
    world.load();
    world
}

/// The 2 MiB page of a block.
const fn block(number: u64) -> u64 {
    (number * 512) << 12 | PS | ALL
}

/// Bug B01: the host, not the guest's processor, changes the entry of a page of 2 MiB, and nobody
/// is told. The row of small entries below it is not taken for a row of the new page.
#[test]
fn a_row_of_another_page_is_not_reused() {
    let mut world = large_page(block(1));
    world.access(0, AccessKind::Write, true);
    assert_eq!(world.shadow(0).unwrap().pa >> 12, world.backing.pfn(512).unwrap());
    world.backing.set(3, 52, false);
    world.memory.set(6 << 12, 8, block(3));
    world.remember_all();
    let next = world.addresses.iter().position(|gva| *gva == 0x1000).unwrap();
    world.access(next, AccessKind::Write, true);
    assert_eq!(world.shadow(next).unwrap().pa >> 12, world.backing.pfn(3 * 512 + 1).unwrap());
    assert_eq!(world.shadow(0), None, "an entry of the old row is reached through the new page");
    (0..16).for_each(|_| world.check());
    world.finish();
}

/// KVM rows 4.25, 4.56: small entries, a huge one, and small ones again, as the guest's page moves.
#[test]
fn rows_and_huge_leaves_take_turns() {
    let mut world = large_page(block(1));
    for (number, huge) in [(1, false), (2, true), (1, false), (2, true)] {
        world.memory.set(6 << 12, 8, block(number));
        let actor = world.rig.vcpu.actor();
        world.rig.lock.0.lock().unwrap().guest_wrote(actor, Gpa::new(6 << 12), 8);
        world.remember_all();
        world.access(0, AccessKind::Write, true);
        let found = world.shadow(0).unwrap();
        assert_eq!(found.level, if huge { 2 } else { 1 });
        assert_eq!(found.pa >> 12, world.backing.pfn(number * 512).unwrap());
    }
    world.finish();
}

/// KVM row 4.25: the guest's page of 2 MiB permits less, then more; what small entries permit
/// follows, though they stand in a page of their own.
#[test]
fn a_row_permits_what_the_guests_page_does() {
    let mut world = large_page(block(1) & !W);
    world.access(0, AccessKind::Read, true);
    assert!(!world.shadow(0).unwrap().writable());
    // Without a flush and without a report: permissions that are added need neither.
    world.memory.set(6 << 12, 8, block(1));
    world.remember_all();
    world.access(0, AccessKind::Write, true);
    assert!(world.shadow(0).unwrap().writable());
    world.finish();
}

/// A huge page of the guest that covers its own tables is mapped small, whoever comes first.
#[test]
fn no_huge_leaf_lies_over_the_tables_that_lead_to_it() {
    let mut world = large_page(block(0));
    world.backing.set(0, 53, true);
    world.access(0, AccessKind::Write, true);
    assert_eq!(world.shadow(0).unwrap().level, 1);
    assert!(!world.is_writable(6), "the guest writes to its table unseen");
    (0..16).for_each(|_| world.check());
    world.finish();
}

/// KVM row 1.30: a root where no memory is leads nowhere and harms nobody.
#[test]
fn a_root_outside_memory_leads_nowhere() {
    let mut world = large_page(block(1));
    for gfn in [PAGES + 5, 1 << 33, (1 << (PHYS - 12)) - 1] {
        world.guest.root = GuestRoot::Cr3(gfn << 12);
        world.enter_anew();
        world.forget();
        world.access(0, AccessKind::Read, true);
        assert_eq!(world.shadow(0), None);
    }
    world.load();
    world.access(0, AccessKind::Read, true);
    assert!(world.shadow(0).is_some());
    (0..16).for_each(|_| world.check());
    world.finish();
}

/// Bug B90: what no guest has is refused by name.
#[test]
fn roots_that_do_not_fit_are_refused() {
    let mut world = large_page(block(1));
    let cr3 = GuestRoot::Cr3(13 << 12);
    for (mode, root) in [(Mode::Pae, cr3), (Mode::Long5, cr3)] {
        let guest = GuestWalker::new(&guest_cpu(), mode.controls()).unwrap();
        let role = PageRole::of_guest(&guest_cpu(), mode.controls(), WriteProtect::On).unwrap();
        let (vcpu, lock, memory) = (&mut world.rig.vcpu, &world.rig.lock, &world.memory);
        let refused = vcpu.load_guest_root(lock, &guest, memory, &root, role).unwrap_err();
        match mode {
            Mode::Pae => assert!(matches!(refused, ShadowError::WrongRoot { .. }), "{refused}"),
            _ => assert!(matches!(refused, ShadowError::WrongLevel { .. }), "{refused}"),
        }
    }
    world.access(0, AccessKind::Read, true);
    assert!(world.shadow(0).is_some(), "the vCPU is on its former root");
    world.finish();
}

/// What PAE's registers hold counts, not what memory holds by now, and each value of them has a
/// root of its own.
#[test]
fn pae_pointers_are_the_registers() {
    let mut world = world(1, 3, Mode::Pae, 1000, ReclaimPolicy::Fifo);
    for (table, entry) in [(6, block(1)), (7, block(2))] {
        world.memory.set(table << 12, 8, entry);
    }
    world.load();
    let cr3 = POINTERS << 12;
    let mut registers = Vec::new();
    for table in [6, 7, 6, 7] {
        world.memory.set(cr3, 8, table << 12 | P);
        world.guest.root =
            GuestRoot::Pae(world.guest.walker.load_pointers(&world.memory, cr3).unwrap());
        world.enter_anew();
        world.forget();
        // Not loaded: nothing changes.
        world.memory.set(cr3, 8, 0);
        world.access(0, AccessKind::Write, true);
        let gfn = if table == 6 { 512 } else { 1024 };
        assert_eq!(world.shadow(0).unwrap().pa >> 12, world.backing.pfn(gfn).unwrap());
        registers.push(world.rig.register);
    }
    assert_eq!(registers[0], registers[2], "former roots are kept");
    assert_ne!(registers[0], registers[1]);
    world.finish();
}

/// Bug B62: a table that long mode and PAE both use has a shadow for each, because PAE reserves
/// bits that long mode ignores.
#[test]
fn modes_share_no_shadow_of_a_table() {
    let mut world = large_page(6 << 12);
    world.memory.set(6 << 12, 8, ALL);
    world.memory.set(0, 8, (1000 << 12) | ALL | (1 << 55));
    world.access(0, AccessKind::Read, true);
    assert!(world.shadow(0).is_some());
    world.guest = Kernel::new(Mode::Pae);
    world.memory.set(POINTERS << 12, 8, (6 << 12) | P);
    let pointers = world.guest.walker.load_pointers(&world.memory, POINTERS << 12).unwrap();
    world.guest.root = GuestRoot::Pae(pointers);
    world.switched();
    world.memory.set(8, 8, (1001 << 12) | ALL);
    world.remember_all();
    let next = world.addresses.iter().position(|gva| *gva == 0x1000).unwrap();
    world.access(next, AccessKind::Read, true);
    assert!(world.shadow(next).is_some());
    world.check();
    world.finish();
}

/// A pass over part of a block that has large lists goes on behind it, and ends: no budget ends it.
#[test]
fn a_pass_that_ends_within_a_block_ends() {
    let mut world = large_page(block(1));
    world.backing.set(1, 54, true);
    world.access(0, AccessKind::Write, true);
    for (start, pages) in [(0, 100), (512, 100), (520, 1), (0, 2048), (700, 3000), (2048, 10)] {
        let range = GfnRange::from_len(Gfn::new(start), pages);
        let inside = range.intersection(GfnRange::from_len(Gfn::new(512), 512)).len();
        let request = AgeRequest::new(range, AgeMode::Test);
        let (mmu, actor) = (&world.rig.mmu, &mut world.rig.notifier);
        let report = mmu.age(actor, request, &mut CountOnly);
        assert_eq!((report.next, report.mapped, report.young), (range.end, inside, inside));
    }
    world.finish();
}

/// A vCPU asks about a walk that began at another root: nothing of it is mapped under this one,
/// also where roots are the vCPU's own and above the guest's tables.
#[test]
fn a_walk_from_another_root_is_walked_again() {
    for (levels, mode) in [(4, Mode::Long4), (5, Mode::Long4), (4, Mode::Bits32 { pse: true })] {
        let mut world = world(1, levels, mode, 1000, ReclaimPolicy::Fifo);
        let (top, low) = (mode.top(), tables_of(1).start);
        let tops = tables_of(top).start;
        // Both roots lead to address 0, by tables of their own.
        for root in 0..2 {
            for level in (2..=top).rev() {
                let (table, next) =
                    (tables_of(level).start + root, tables_of(level - 1).start + root);
                world.memory.set(table << 12, mode.bytes(), next << 12 | ALL);
            }
            world.memory.set((low + root) << 12, mode.bytes(), (600 + root) << 12 | ALL);
        }
        let enter = |world: &mut World<Kernel>, root: u64| {
            world.guest.root = GuestRoot::Cr3((tops + root) << 12);
            world.enter_anew();
            world.forget();
        };
        enter(&mut world, 0);
        let walk = world.guest.walk(&world.memory, 0, AccessKind::Read, true).unwrap().unwrap();
        enter(&mut world, 1);
        let outcome = world.guest.fault(&mut world.rig, &world.memory, &walk);
        assert_eq!(outcome, Ok(FaultOutcome::Retry), "{mode:?} on {levels} levels");
        world.check();
        world.finish();
    }
}
