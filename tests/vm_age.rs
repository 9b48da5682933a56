//! Accessed bits of direct and shadow tables as one answer (KVM row 5.7).

mod common;
mod shadow_support;
mod vm_support;

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::traits::{
    AgeAbilities, AgeAnswer, AgeMode, AgeRange, AgeRequest, AgeSink, CountOnly, Effort, MASK_WORDS,
};
use mmu_model::AccessKind;
use vm_support::{ALL, BACK, BLOCKS, LARGE, Machine, PAGES, leaf, link};

fn ask(machine: &mut Machine, gfn: u64, mode: AgeMode) -> AgeAnswer {
    machine.vm.age_gfn(&mut machine.notifier, Gfn::new(gfn), mode, Effort::Full)
}

/// L2 maps page `number` of `0..4` at 4 KiB steps from 0 on, and what block 2 is from 2 MiB on.
fn machine(seed: u64) -> Machine {
    let mut machine = Machine::new(seed, 1000);
    machine.set_up_path();
    (0..4).for_each(|number| machine.set_up(0, number, leaf(600 + number)));
    machine.set_up(6, 1, 2 << 21 | LARGE | BACK | ALL);
    machine
}

/// A page that either uses is young, in every combination, and old once both were asked.
#[test]
fn a_page_is_young_if_either_mmu_says_so() {
    let mut machine = machine(1);
    for gfn in 600..604 {
        let _ = machine.l1_access(gfn, AccessKind::Read);
        let _ = machine.l2_access((gfn - 600) << 12, AccessKind::Read);
        let _ = ask(&mut machine, gfn, AgeMode::ClearFlush);
        assert_eq!(ask(&mut machine, gfn, AgeMode::Test), AgeAnswer::Old);
    }
    for (gfn, by_l1, by_l2) in [(600, false, false), (601, true, false), (602, false, true)] {
        if by_l1 {
            let _ = machine.l1_access(gfn, AccessKind::Read);
        }
        if by_l2 {
            let _ = machine.l2_access((gfn - 600) << 12, AccessKind::Read);
        }
        let young = if by_l1 || by_l2 { AgeAnswer::Young } else { AgeAnswer::Old };
        assert_eq!(ask(&mut machine, gfn, AgeMode::Test), young, "{gfn}");
        assert_eq!(ask(&mut machine, gfn, AgeMode::ClearFlush), young, "{gfn}");
        assert_eq!(ask(&mut machine, gfn, AgeMode::Test), AgeAnswer::Old, "{gfn}");
    }
    // By both at once: one answer, and both are clear after it.
    let _ = machine.l1_access(603, AccessKind::Read);
    let _ = machine.l2_access(3 << 12, AccessKind::Read);
    assert_eq!(ask(&mut machine, 603, AgeMode::ClearFlush), AgeAnswer::Young);
    assert_eq!(ask(&mut machine, 603, AgeMode::Test), AgeAnswer::Old);
    assert_eq!(ask(&mut machine, 1500, AgeMode::Test), AgeAnswer::Unmapped);
    machine.finish();
}

/// What was told of each gfn, whoever told it.
#[derive(Default)]
struct Told(Vec<(u64, bool)>);

impl AgeSink for Told {
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        let bit = |mask: &[u64; MASK_WORDS], n: u64| mask[(n / 64) as usize] >> (n % 64) & 1 != 0;
        for n in (0..512).filter(|n| bit(present, *n)) {
            self.0.push((base.get() + n, bit(young, n)));
        }
    }

    fn huge(&mut self, base: Gfn, level: Level, young: bool) {
        self.0.extend((0..level.pages()).map(|n| (base.get() + n, young)));
    }
}

/// Slices of any size come to the same as asking each MMU for everything.
#[test]
fn slices_of_both_mmus_tell_of_every_page_once_in_each() {
    for budget in [1, 3, 700, u64::MAX] {
        let mut machine = machine(2);
        (0..BLOCKS).for_each(|block| machine.back_with(block, block % 2 == 0));
        for gfn in [600, 601, 1030, 1600] {
            let _ = machine.l1_access(gfn, AccessKind::Read);
        }
        for address in [0x1000, 0x3000, 2 << 20] {
            let _ = machine.l2_access(address, AccessKind::Read);
        }
        let all = GfnRange::new(Gfn::new(0), Gfn::new(PAGES));
        let request = AgeRequest::new(all, AgeMode::Test);
        let (vm, actor) = (&machine.vm, &mut machine.notifier);
        let (mut direct, mut shadow, mut both) =
            (Told::default(), Told::default(), Told::default());
        let _ = vm.tdp().unwrap().age(actor, request, &mut direct);
        let _ = vm.shadow().unwrap().mmu.age(actor, request, &mut shadow);
        assert!(direct.0.len() >= 4 && shadow.0.len() >= 3);
        let mut at = all.start;
        let (mut mapped, mut young) = (0, 0);
        while at < all.end {
            let rest = request.for_range(GfnRange::new(at, all.end)).with_budget(budget);
            let report = vm.age(actor, rest, &mut both);
            assert!(report.next > at, "no progress");
            (at, mapped, young) = (report.next, mapped + report.mapped, young + report.young);
        }
        let mut expected = [direct.0, shadow.0].concat();
        expected.sort_unstable();
        both.0.sort_unstable();
        assert_eq!(both.0, expected, "budget {budget}");
        assert_eq!(mapped, expected.len() as u64);
        assert_eq!(young, expected.iter().filter(|(_, young)| *young).count() as u64);
        machine.finish();
    }
}

/// Bits of a bitmap are the union; a mode that clears, clears in both.
#[test]
fn a_bitmap_is_the_union_of_both() {
    let mut machine = machine(3);
    let range = GfnRange::from_len(Gfn::new(600), 4);
    for gfn in 600..604 {
        let _ = machine.l1_access(gfn, AccessKind::Read);
        let _ = machine.l2_access((gfn - 600) << 12, AccessKind::Read);
    }
    let clear = AgeRequest::new(range, AgeMode::ClearFlush);
    let _ = machine.vm.age(&mut machine.notifier, clear, &mut CountOnly);
    let _ = machine.l1_access(600, AccessKind::Write);
    let _ = machine.l2_access(0x2000, AccessKind::Write);
    let mut young = [0; 1];
    let _ = machine.vm.age_bitmap(&mut machine.notifier, clear, &mut young, &mut []);
    assert_eq!(young, [0b0101]);
    let _ = machine.vm.age_bitmap(&mut machine.notifier, clear, &mut young, &mut []);
    assert_eq!(young, [0]);
    machine.finish();
}

/// Fast answers are certain as long as shadow tables map nothing.
#[test]
fn abilities_are_those_of_the_tables_that_map_something() {
    let mut machine = machine(4);
    assert!(machine.vm.abilities().contains(AgeAbilities::FAST));
    let _ = machine.l1_access(600, AccessKind::Read);
    let _ = machine.l2_access(0, AccessKind::Read);
    assert!(!machine.vm.abilities().contains(AgeAbilities::FAST));
    assert!(machine.vm.abilities().contains(AgeAbilities::HARDWARE_BITS));
    // A list that somebody holds keeps nothing young from being told.
    let page = Gfn::new(600);
    let fast = machine.vm.age_gfn(&mut machine.notifier, page, AgeMode::Test, Effort::Fast);
    assert_eq!(fast, AgeAnswer::Young);
    let _ = machine.vm.zap_all(&mut machine.notifier);
    machine.set_up(0, 0, link(5));
    machine.finish();
}
