//! Shadow tables in every paging mode of a guest, on host tables of three, four and five levels.
//!
//! As `shadow_model`, with guests that change their mode, map pages of 2 MiB, 4 MiB and 1 GiB, and
//! have memory that the host backs by small and by huge pages. The specification walks the guest's
//! tables on its own: its masks, indices and reserved bits are written down here once more.

mod common;
mod shadow_support;

use std::collections::BTreeSet;
use std::sync::Arc;

use mmu_core::addr::{Gfn, GfnRange, Gpa, Level};
use mmu_core::fault::FaultOutcome;
use mmu_core::slot::{SlotFlags, SlotRequest};
use mmu_core::traits::{
    AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, CountOnly, Effort, MASK_WORDS,
};
use mmu_model::{Access, AccessKind};
use shadow_mmu::guest::{GuestRoot, GuestWalker, WriteProtect};
use shadow_mmu::rmap::RmapKey;
use shadow_mmu::{PageRole, ReclaimPolicy, ShadowError};
use shadow_support::kernel::{Kernel, Mode, POINTERS, caps, guest_cpu};
use shadow_support::rig::slot;
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

/// What an ager was told, page by page.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    mapped: BTreeSet<u64>,
    young: BTreeSet<u64>,
    unknown: BTreeSet<u64>,
}

impl AgeSink for Told {
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        for (mask, set) in [(present, &mut self.mapped), (young, &mut self.young)] {
            let has = |page: &u64| mask[(page / 64) as usize] >> (page % 64) & 1 != 0;
            set.extend((0..512).filter(has).map(|page| base.get() + page));
        }
    }

    fn huge(&mut self, base: Gfn, level: Level, young: bool) {
        let pages = base.get()..base.get() + level.pages();
        self.mapped.extend(pages.clone());
        if young {
            self.young.extend(pages);
        }
    }

    fn unknown(&mut self, range: GfnRange) {
        self.unknown.extend(range.start.get()..range.end.get());
    }
}

/// The block of 2 MiB that [`twice`] maps.
const BLOCK: u64 = 1024;

/// A guest whose block 2 is mapped by a page of 2 MiB at address 0, and some of it once more by
/// pages of 4 KiB from 2 MiB on: `aliases`, numbers of pages in the block. All is old.
fn twice(aliases: &[u64]) -> World<Kernel> {
    let mut world = large_page(block(2));
    world.memory.set((6 << 12) + 8, 8, ALL);
    for (index, page) in (0..).zip(aliases) {
        world.memory.set(index * 8, 8, (BLOCK + page) << 12 | ALL);
    }
    world.remember_all();
    world.access(0, AccessKind::Read, true);
    assert_eq!(world.shadow(0).unwrap().level, 2);
    for index in 0..aliases.len() {
        let number = at(&world, small(index));
        world.access(number, AccessKind::Read, true);
        assert_eq!(world.shadow(number).unwrap().level, 1);
    }
    let _ = age(&mut world, AgeMode::ClearFlush, Effort::Full, u64::MAX);
    world
}

/// Where alias `index` of [`twice`] is mapped.
const fn small(index: usize) -> u64 {
    1 << 21 | (index as u64) << 12
}

fn at(world: &World<Kernel>, gva: u64) -> usize {
    world.addresses.iter().position(|one| *one == gva).unwrap()
}

/// The processor reads an address, and sets A.
fn touch(world: &World<Kernel>, gva: u64) {
    let read = Access::user(AccessKind::Read);
    let host = world.rig.mmu.vm().host();
    assert!(world.rig.walker.translate(host, world.rig.register, gva, read).is_ok());
}

fn age(world: &mut World<Kernel>, mode: AgeMode, effort: Effort, budget: u64) -> (Told, AgeReport) {
    let range = GfnRange::from_len(Gfn::new(BLOCK), 512);
    let request = AgeRequest::new(range, mode).with_budget(budget).with_effort(effort);
    let (told, report) = ask(world, request);
    assert_eq!(report.young, told.young.len() as u64);
    (told, report)
}

fn ask(world: &mut World<Kernel>, request: AgeRequest) -> (Told, AgeReport) {
    let mut told = Told::default();
    let report = world.rig.mmu.age(&mut world.rig.notifier, request, &mut told);
    assert_eq!(report.next, request.range.end);
    assert_eq!(report.unknown, told.unknown.len() as u64);
    (told, report)
}

/// The guest's memory is in the other address space, too.
fn add_space(world: &mut World<Kernel>) {
    let vm = Arc::clone(world.rig.mmu.vm());
    let second = SlotRequest { as_id: 1, ..slot(PAGES, SlotFlags::empty()) };
    let (slots, actor) = (&mut world.rig.slots, &mut world.rig.notifier);
    let _ = vm.set_slot(slots, actor, &second, |_, _| {}).unwrap();
}

/// Go on in an address space, with the tables at `root`.
fn enter(world: &mut World<Kernel>, root: GuestRoot, space: u16) {
    (world.guest.root, world.guest.role) = (root, world.guest.role.in_space(space));
    world.enter_anew();
    world.forget();
}

/// The pages of [`twice`]'s block, by their numbers in it.
fn block_pages(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().map(|page| BLOCK + page).collect()
}

fn key(level: Level, page: u64) -> RmapKey {
    RmapKey { space: 0, level, gfn: Gfn::new(BLOCK + page) }
}

/// Rows 5.6, 5.10: of a block whose list somebody holds a fast call tells nothing, and does nothing
/// to the pages that it could have read: what is young stays young.
#[test]
fn a_fast_call_clears_nothing_that_it_cannot_tell() {
    const PAGE: u64 = 5;
    let mut world = twice(&[PAGE]);
    // By the small page only.
    touch(&world, small(0));
    let rmaps = Arc::clone(world.rig.mmu.rmaps());
    let held = rmaps.lock(key(Level::L2, 0)).expect("the huge leaf");
    let (told, report) = age(&mut world, AgeMode::Clear, Effort::Fast, u64::MAX);
    assert_eq!(told, Told { unknown: block_pages(0..512), ..Told::default() });
    assert_eq!((report.entries, report.mapped), (0, 0));
    drop(held);
    let (told, _) = age(&mut world, AgeMode::Clear, Effort::Fast, u64::MAX);
    assert_eq!(told.young, block_pages([PAGE]), "a use was forgotten");
    assert_eq!((told.mapped, told.unknown), (block_pages(0..512), BTreeSet::new()));
    world.finish();
}

/// A page is told once: young if anything says so, whatever could not be read beside; unknown else.
#[test]
fn what_is_told_young_is_not_told_unknown() {
    const PAGE: u64 = 5;
    let mut world = twice(&[PAGE]);
    let rmaps = Arc::clone(world.rig.mmu.rmaps());
    for young in [false, true] {
        if young {
            touch(&world, 0);
        }
        let held = rmaps.lock(key(Level::L1, PAGE)).expect("the small leaf");
        let (told, _) = age(&mut world, AgeMode::Clear, Effort::Fast, u64::MAX);
        let (all, none) = (block_pages(0..512), BTreeSet::new());
        let unknown = if young { none.clone() } else { block_pages([PAGE]) };
        assert_eq!(told.young, if young { all.clone() } else { none });
        assert_eq!((told.mapped, told.unknown), (all, unknown));
        drop(held);
    }
    world.finish();
}

/// The same where a page is mapped in two address spaces, and somebody holds the list of one: what
/// the other says is an answer if it says young, and else nothing was done to it.
#[test]
fn young_in_one_address_space_is_an_answer() {
    let one = |pages: &BTreeSet<u64>| pages.first().copied();
    for (level, number) in [(Level::L1, 1), (Level::L2, 2)] {
        let mut world = large_page(block(number));
        add_space(&mut world);
        let root = world.guest.root;
        for space in [0, 1] {
            enter(&mut world, root, space);
            world.access(0, AccessKind::Read, true);
            assert_eq!(world.shadow(0).unwrap().level, level.number());
        }
        let (first, rmaps) = (number * 512, Arc::clone(world.rig.mmu.rmaps()));
        for (held, young) in [(0, true), (0, false), (1, true), (1, false)] {
            let range = GfnRange::from_len(Gfn::new(first), level.pages());
            let request = |mode| AgeRequest::new(range, mode);
            let _ = ask(&mut world, request(AgeMode::ClearFlush));
            let used = if young { 1 - held } else { held };
            enter(&mut world, root, used);
            touch(&world, 0);
            let list = rmaps.lock(RmapKey { space: held, level, gfn: range.start });
            assert!(list.is_some());
            let fast = request(AgeMode::Clear).with_effort(Effort::Fast);
            let (told, _) = ask(&mut world, fast);
            let answer = (one(&told.young), one(&told.unknown));
            let wanted = if young { (Some(first), None) } else { (None, Some(first)) };
            assert_eq!(answer, wanted, "{level}: space {held} is held, used was {used}");
            drop(list);
            let (left, _) = ask(&mut world, request(AgeMode::Test));
            assert_eq!(one(&left.young).is_some(), !young, "{level}: a use was forgotten");
        }
        world.finish();
    }
}

/// Row 5.10: a fast call never reads more entries than it may, and a use that it does not tell is
/// there for the next call.
#[test]
fn a_fast_call_keeps_to_its_budget_and_forgets_no_use() {
    // Two pages, one of them by three leaves.
    let aliases = [5, 7, 7, 7];
    let leaves = 1 + aliases.len() as u64;
    let mut world = twice(&aliases);
    for mode in [AgeMode::Test, AgeMode::Clear] {
        for budget in 0..=leaves {
            let _ = age(&mut world, AgeMode::ClearFlush, Effort::Full, u64::MAX);
            (0..aliases.len()).for_each(|index| touch(&world, small(index)));
            let (told, report) = age(&mut world, mode, Effort::Fast, budget);
            assert!(report.entries <= budget, "{mode:?}: {} of {budget}", report.entries);
            let (left, _) = age(&mut world, AgeMode::Test, Effort::Full, u64::MAX);
            let used = block_pages([5, 7]);
            for page in &used {
                let known = told.young.contains(page) && !told.unknown.contains(page);
                let kept = told.unknown.contains(page) && left.young.contains(page);
                assert!(known || kept, "{mode:?}, {budget}: {page} {told:?}");
            }
            assert!(told.young.is_subset(&used), "{mode:?}, {budget}: {told:?}");
            assert_eq!(told.unknown.is_empty(), budget == leaves, "{mode:?}, {budget}");
        }
    }
    world.finish();
}

/// Row 5.10: a range that ends inside a huge page is looked at once, and then all is told.
#[test]
fn a_range_that_ends_inside_a_huge_page_is_looked_at_once() {
    let mut world = twice(&[5]);
    for (first, end, entries) in [(0, 1, 1), (5, 6, 2), (0, 100, 2), (100, 511, 1), (0, 512, 2)] {
        touch(&world, 0);
        let range = GfnRange::new(Gfn::new(BLOCK + first), Gfn::new(BLOCK + end));
        // Ends also what would go on for ever.
        let request = AgeRequest::new(range, AgeMode::Clear).with_budget(1000);
        let report = world.rig.mmu.age(&mut world.rig.notifier, request, &mut CountOnly);
        let pages = end - first;
        let wanted = AgeReport { mapped: pages, young: pages, entries, ..report };
        assert_eq!((report.next, report), (range.end, wanted));
    }
    world.finish();
}

/// Rows 4.26, 4.60: a frame that becomes a table in one address space lies under no huge leaf of
/// the other, before and after.
#[test]
fn no_huge_leaf_lies_over_a_table_of_another_address_space() {
    for (data, other) in [(0, 1), (1, 0)] {
        let mut world = large_page(block(2));
        add_space(&mut world);
        let root = world.guest.root;
        enter(&mut world, root, data);
        world.access(0, AccessKind::Write, true);
        assert_eq!(world.shadow(0).unwrap().level, 2);
        // An empty table, but a table.
        enter(&mut world, GuestRoot::Cr3((BLOCK + 3) << 12), other);
        let huge = RmapKey { space: data, level: Level::L2, gfn: Gfn::new(BLOCK) };
        assert!(world.rig.mmu.rmaps().lock(huge).is_none(), "writes to the table go unseen");
        enter(&mut world, root, data);
        assert_eq!(world.shadow(0), None);
        world.access(0, AccessKind::Write, true);
        assert_eq!(world.shadow(0).unwrap().level, 1);
        (0..16).for_each(|_| world.check());
        world.finish();
    }
}
