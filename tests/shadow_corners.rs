//! What KVM once got wrong about shadow pages, and figures for debuggers (KVM rows 3.61, 5.10; bugs
//! B03, B04, B49, B54, B68).

mod common;
mod shadow_support;
mod vm_support;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::Peek;
use mmu_core::addr::{Gfn, GfnRange, Gpa, Level, Pfn};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::{Capabilities, Ept};
use mmu_core::stats::Counter;
use mmu_core::traits::{
    AgeAnswer, AgeMode, AgeRange, AgeRequest, AgeSink, Effort, HostPage, MASK_WORDS, PageKind,
};
use mmu_model::{Access, AccessKind, PhysMem};
use shadow_mmu::guest::{EptCpu, NestedRequest, NestedWalker, Purpose};
use shadow_mmu::{ReclaimPolicy, RmapHistogram};
use shadow_support::memory::Memory;
use shadow_support::rig::{self, Rig, operation};
use vm_support::{BACK, End, LARGE, Machine, PAGES, READ, USED, leaf, link};

fn reached(machine: &Machine, gfn: u64) -> End {
    End::Reached(machine.backing.pfn(gfn).unwrap())
}

/// L2 has pages 600 and 601 at 0 and 0x1000.
fn machine(seed: u64) -> Machine {
    let mut machine = Machine::new(seed, 1000);
    machine.set_up_path();
    machine.set_up(0, 0, leaf(600));
    machine.set_up(0, 1, leaf(601));
    machine
}

fn leaves(machine: &Machine) -> u64 {
    let mmu = &machine.shadow_mmu().mmu;
    mmu.rmap_histogram(&mut machine.vm.core().actor().unwrap()).counts[0][1]
}

/// Bug B03: the guest's entry leads to where there is no memory, behind a present leaf of ours. No
/// entry is made for that; the leaf goes, flushed and off its list, when the guest flushes.
#[test]
fn an_entry_that_leads_nowhere_behind_a_present_leaf_is_emulated() {
    let mut machine = machine(1);
    machine.set_up(0, 0, leaf(600) & !2);
    assert_eq!(machine.l2_access(0, AccessKind::Read), reached(&machine, 600));
    assert!(matches!(machine.edit(0, 0, leaf(PAGES + 7)), End::Reached(_)));
    // The old leaf permits no write, so the walk leads to the new one.
    assert_eq!(machine.l2_access(0, AccessKind::Write), End::Nowhere);
    assert_eq!(leaves(&machine), 1, "the old leaf is on its list");
    machine.check();
    machine.flush();
    assert!(machine.shadow(0).is_none());
    assert_eq!(leaves(&machine), 0);
    assert_eq!(machine.l2_access(0, AccessKind::Write), End::Nowhere);
    machine.check();
    machine.finish();
}

/// Bug B04: another page of the guest's behind a present leaf, or another page of the host's
/// without a word. The old one is out of the tables, the list and the TLB before the new one is in.
#[test]
fn another_page_behind_a_present_leaf_takes_its_place() {
    let mut machine = machine(2);
    machine.set_up(0, 0, leaf(600) & !2);
    assert_eq!(machine.l2_access(0, AccessKind::Read), reached(&machine, 600));
    assert!(matches!(machine.edit(0, 0, leaf(700)), End::Reached(_)));
    assert_eq!(machine.l2_access(0, AccessKind::Write), reached(&machine, 700));
    assert_eq!(machine.l2_access(0, AccessKind::Read), reached(&machine, 700));
    assert_eq!(leaves(&machine), 1);
    machine.check();
    // The host breaks its word: no invalidation. The leaf of before is read-only, so this faults.
    machine.set_up(0, 1, leaf(601) & !2);
    assert_eq!(machine.l2_access(0x1000, AccessKind::Read), reached(&machine, 601));
    machine.back_with(1, false);
    machine.set_up(0, 1, leaf(601));
    machine.remember();
    assert_eq!(machine.l2_access(0x1000, AccessKind::Write), reached(&machine, 601));
    let everything = GfnRange::new(Gfn::new(0), Gfn::new(PAGES));
    let _ = machine.vm.unmap(&mut machine.notifier, everything);
    assert_eq!(leaves(&machine), 0);
    machine.check();
    machine.finish();
}

/// Bug B54: an entry that is synchronised keeps its accessed bit.
#[test]
fn a_page_that_was_used_is_young_after_it_was_synchronised() {
    let mut machine = machine(3);
    for address in [0, 0x1000] {
        assert!(matches!(machine.l2_access(address, AccessKind::Write), End::Reached(_)));
    }
    let (vm, actor) = (&machine.vm, &mut machine.notifier);
    let mmu = Arc::clone(&vm.shadow().unwrap().mmu);
    let old = mmu.age_gfn(actor, Gfn::new(601), AgeMode::ClearFlush, Effort::Full);
    assert_eq!(old, AgeAnswer::Young);
    // Both lose the right to be executed: both are synchronised, one is young.
    for index in [0, 1] {
        let entry = (600 + index) << 12 | READ | 2 | USED | BACK;
        assert!(matches!(machine.edit(0, index, entry), End::Reached(_)));
    }
    machine.flush();
    for (address, gfn, young) in [(0, 600, AgeAnswer::Young), (0x1000, 601, AgeAnswer::Old)] {
        assert!(!machine.shadow(address).unwrap().executable(), "{gfn} was synchronised");
        let actor = &mut machine.notifier;
        let answer = mmu.age_gfn(actor, Gfn::new(gfn), AgeMode::Test, Effort::Full);
        assert_eq!(answer, young, "{gfn}");
    }
    machine.finish();
}

/// What L1 has for its guest in the tests below: 160 tables at level 1, each with one page.
const MANY: u64 = 160;

fn many_tables() -> (Rig<Ept>, Memory, NestedWalker) {
    const EPT: u64 = 7 | 1 << 8 | 1 << 9;
    let backing = |gfn| {
        let pfn = Pfn::new(common::DATA + gfn);
        Some(HostPage { pfn, writable: true, level: Level::L1 })
    };
    let caps = Capabilities::ept();
    let mut rig = Rig::<Ept>::new(
        rig::Machine::default(),
        1,
        caps,
        1000,
        ReclaimPolicy::Fifo,
        PAGES,
        backing,
    );
    let memory = Memory::new(PAGES, 4 + MANY);
    for table in 1..3 {
        memory.set(table << 12, 8, (table + 1) << 12 | EPT);
    }
    for number in 0..MANY {
        memory.set(3 << 12 | number << 3, 8, (4 + number) << 12 | EPT);
        memory.set((4 + number) << 12, 8, (600 + number % 40) << 12 | EPT | 6 << 3);
    }
    let walker = NestedWalker::ept(Level::L4, &EptCpu::baseline()).unwrap();
    let root = rig.vcpu.load_nested_root(&rig.lock, &walker, &memory, 1 << 12, 0).unwrap();
    rig.set_register(root);
    let purpose = Purpose::Final(mmu_core::access::Access::ALL);
    let request = NestedRequest { operation: operation(AccessKind::Read), purpose };
    for number in 0..MANY {
        let walk = walker.walk(&memory, 1 << 12, Gpa::new(number << 21), request).unwrap();
        let done = rig.vcpu.nested_fault(&rig.lock, &walker, &memory, &walk, request);
        assert_eq!(done, Ok(FaultOutcome::Fixed));
    }
    (rig, memory, walker)
}

/// Bug B68: a nested page takes its children with it, a few at a time, and every turn gets on.
#[test]
fn pages_that_go_with_their_parents_go_in_bounded_turns() {
    // Everything is obsolete.
    let (mut rig, ..) = many_tables();
    let (lock, notifier) = (&rig.lock, &mut rig.notifier);
    lock.0.lock().unwrap().invalidate_all(notifier);
    let (mut turns, mut more) = (0, true);
    while more {
        let mut writer = lock.0.lock().unwrap();
        let before = writer.live_pages();
        more = writer.zap_obsolete(notifier);
        let gone = before - writer.live_pages();
        assert!(gone <= 24, "{gone} pages in one turn");
        assert!(gone > 0 || !more, "a turn without progress");
        turns += 1;
        writer.check(notifier).unwrap();
    }
    assert!(turns > MANY / 24, "{turns}");
    assert_eq!(lock.0.lock().unwrap().live_pages(), 1, "the vCPU's root");
    rig.finish();
    // The page above them all is given up.
    let (mut rig, ..) = many_tables();
    let (lock, notifier) = (&rig.lock, &mut rig.notifier);
    let mut writer = lock.0.lock().unwrap();
    let before = writer.live_pages();
    assert!(writer.unprotect(notifier, Gfn::new(3)));
    assert!(before - writer.live_pages() <= 24, "{} are left", writer.live_pages());
    writer.check(notifier).unwrap();
    // Nothing leads to the rest: it is not used, and goes when others do.
    drop(writer);
    let looks = |rig: &Rig<Ept>, number: u64| {
        let peek = Peek(rig.mmu.vm().host());
        let access = Access::user(AccessKind::Read);
        rig.walker.translate(&peek, rig.register, number << 21, access).is_ok()
    };
    assert!((0..MANY).all(|number| !looks(&rig, number)));
    rig.finish();
}

/// Row 3.61: the histogram is that of a recount over the tables.
#[test]
fn the_histogram_is_that_of_a_recount() {
    let (mut rig, ..) = many_tables();
    let mut aliases: BTreeMap<u64, u32> = BTreeMap::new();
    for number in 0..MANY {
        let peek = Peek(rig.mmu.vm().host());
        let access = Access::user(AccessKind::Read);
        let found = rig.walker.translate(&peek, rig.register, number << 21, access).unwrap();
        *aliases.entry(found.pa >> 12).or_default() += 1;
    }
    let mut expected = RmapHistogram::default();
    for count in aliases.values() {
        assert_eq!(*count, 4);
        expected.counts[0][3] += 1;
    }
    expected.counts[0][0] = PAGES - aliases.len() as u64;
    expected.counts[1][0] = PAGES / 512;
    expected.counts[2][0] = 1;
    let mmu = Arc::clone(&rig.mmu);
    let found = mmu.rmap_histogram(&mut rig.notifier);
    assert_eq!(found, expected, "\n{found}");
    assert!(found.to_string().starts_with("4K: 0:2008 1:0 2:0 4:40 8:0"), "{found}");
    rig.finish();
}

/// Bug B49: a VM that never had a shadow entry has lists of no entries.
#[test]
fn the_histogram_of_a_vm_without_reverse_maps_is_empty() {
    let mut machine = Machine::new(4, 1000);
    let mmu = Arc::clone(&machine.shadow_mmu().mmu);
    let found = mmu.rmap_histogram(&mut machine.notifier);
    let mut expected = RmapHistogram::default();
    (expected.counts[0][0], expected.counts[1][0]) = (PAGES, PAGES / 512);
    expected.counts[2][0] = 1;
    assert_eq!(found, expected);
    assert_eq!(machine.stat(Counter::Pages4K), 0);
    machine.finish();
}

/// The pages that were told of, young or not.
#[derive(Default)]
struct Told(BTreeMap<u64, bool>);

impl AgeSink for Told {
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        let bit = |mask: &[u64; MASK_WORDS], n: u64| mask[(n / 64) as usize] >> (n % 64) & 1 != 0;
        for n in (0..512).filter(|n| bit(present, *n)) {
            self.0.insert(base.get() + n, bit(young, n));
        }
    }

    fn huge(&mut self, base: Gfn, level: Level, young: bool) {
        self.0.extend((0..level.pages()).map(|n| (base.get() + n, young)));
    }
}

/// Row 5.10: a range that begins inside a large page and ends in the next meets both, wherever it
/// begins.
#[test]
fn a_range_across_the_border_of_two_large_pages_meets_both() {
    for (first, pages) in [(1535, 2), (1024, 1024), (1200, 400), (1535, 1), (1536, 1), (1530, 200)]
    {
        let mut machine = Machine::new(5, 1000);
        (0..4).for_each(|block| machine.back_with(block, true));
        machine.set_up(12, 0, link(9));
        machine.set_up(9, 0, link(6));
        for block in [2, 3] {
            machine.set_up(6, block - 2, block << 21 | LARGE | BACK | vm_support::ALL);
        }
        for block in [2, 3] {
            let end = machine.l2_access((block - 2) << 21, AccessKind::Read);
            assert_eq!(end, reached(&machine, block * 512));
            assert_eq!(machine.shadow((block - 2) << 21).unwrap().level, 2);
        }
        let mmu = Arc::clone(&machine.shadow_mmu().mmu);
        let range = GfnRange::from_len(Gfn::new(first), pages);
        let actor = &mut machine.notifier;
        let mut told = Told::default();
        let report = mmu.age(actor, AgeRequest::new(range, AgeMode::ClearFlush), &mut told);
        assert_eq!((report.mapped, report.young), (pages, pages), "{range:?}");
        assert!((first..first + pages).all(|gfn| told.0.get(&gfn) == Some(&true)), "{range:?}");
        // Each large page that was met is old as a whole, the other is young.
        for block in [2, 3] {
            let met = first < (block + 1) * 512 && block * 512 < first + pages;
            let page = Gfn::new(block * 512 + 7);
            let answer = mmu.age_gfn(actor, page, AgeMode::Test, Effort::Full);
            assert_eq!(answer, if met { AgeAnswer::Old } else { AgeAnswer::Young }, "{range:?}");
        }
        machine.finish();
    }
}

/// A nested guest with one page, whose entry in L1's table is `entry`, on a host of `caps` that
/// calls each page `kind`; what the host's entry says after a read.
fn one_page(caps: Capabilities, kind: PageKind, entry: u64) -> (Rig<Ept>, u64) {
    const EPT: u64 = 7 | 1 << 8 | 1 << 9;
    let backing = |gfn| {
        let pfn = Pfn::new(common::DATA + gfn);
        Some(HostPage { pfn, writable: true, level: Level::L1 })
    };
    let machine = rig::Machine::default();
    let mut rig = Rig::<Ept>::new(machine, 1, caps, 100, ReclaimPolicy::Fifo, PAGES, backing);
    rig.mmu.vm().host().set_kinds(Arc::new(move |_, _| kind));
    let memory = Memory::new(PAGES, 4);
    for table in 0..3 {
        memory.set(table << 12, 8, (table + 1) << 12 | EPT);
    }
    memory.set(3 << 12, 8, entry);
    let nested = NestedWalker::ept(Level::L4, &EptCpu::baseline()).unwrap();
    let root = rig.vcpu.load_nested_root(&rig.lock, &nested, &memory, 0, 0).unwrap();
    rig.set_register(root);
    let purpose = Purpose::Final(mmu_core::access::Access::ALL);
    let read = NestedRequest { operation: operation(AccessKind::Read), purpose };
    let walk = nested.walk(&memory, 0, Gpa::new(0), read).unwrap();
    let outcome = rig.vcpu.nested_fault(&rig.lock, &nested, &memory, &walk, read);
    assert_eq!(outcome, Ok(FaultOutcome::Fixed));
    let peek = Peek(rig.mmu.vm().host());
    let below = |table: u64| peek.read(table & 0x000f_ffff_ffff_f000).unwrap();
    let leaf = (0..4).fold(root.get(), |table, _| below(table));
    (rig, leaf)
}

/// Where the host tells a user's fetches from a supervisor's and L1's tables do not, both follow
/// the one bit that there is.
#[test]
fn without_a_bit_for_user_fetches_they_follow_the_others() {
    let caps = Capabilities { mode_based_exec: true, ..Capabilities::ept() };
    for execute in [false, true] {
        let entry = 600 << 12 | READ | 2 | USED | BACK | if execute { 4 } else { 0 };
        let (rig, leaf) = one_page(caps, PageKind::RAM, entry);
        let fetch = Access::user(AccessKind::Fetch);
        let passes = rig.walker.translate(&Peek(rig.mmu.vm().host()), rig.register, 0, fetch);
        assert_eq!(passes.is_ok(), execute, "{leaf:#x}");
        assert_eq!((leaf >> 2 & 1, leaf >> 10 & 1), (u64::from(execute), u64::from(execute)));
        rig.finish();
    }
}

/// Rows 1.22, 1.24: a device that L1 hands to L2 is mapped as the device that it is.
#[test]
fn a_nested_guests_device_is_uncacheable() {
    let entry = 600 << 12 | READ | 2 | USED | BACK;
    for (kind, memory_type) in [(PageKind::RAM, 6), (PageKind::DEVICE, 0)] {
        let (rig, leaf) = one_page(Capabilities::ept(), kind, entry);
        assert_eq!(leaf >> 3 & 7, memory_type, "{kind:?}: {leaf:#x}");
        rig.finish();
    }
}
