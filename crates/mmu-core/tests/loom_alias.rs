//! Races of an ager with whoever changes a chain of aliases (KVM rows R14 to R16): the trait
//! implemented over reverse maps, without the MMU lock. Real reverse maps have models of their own
//! where they stand.
#![cfg(loom)]

mod alias;
mod loom_common;

use std::sync::Arc;

use alias::AliasMmu;
use loom::thread;
use loom_common::explore;
use mmu_core::addr::{Gfn, GfnRange};
use mmu_core::traits::{AgeMode, AgeRange, AgeReport, AgeRequest, CountOnly, Effort};

const GFN: u64 = 0;

fn age(mmu: &AliasMmu, effort: Effort) -> AgeReport {
    let page = GfnRange::from_len(Gfn::new(GFN), 1);
    let request = AgeRequest::new(page, AgeMode::Clear).with_effort(effort);
    mmu.age(&mut (), request, &mut CountOnly)
}

/// The page has two aliases, both young. One ages, the other runs `change`.
fn race(
    name: &str,
    effort: Effort,
    change: impl Fn(&AliasMmu, [usize; 2]) -> u64 + Send + Sync + Copy + 'static,
    judge: impl Fn(&AliasMmu, AgeReport, u64) + Send + Sync + 'static,
) {
    explore(name, move || {
        let mmu = Arc::new(AliasMmu::new(1, 3));
        let entries = [mmu.map(GFN, true), mmu.map(GFN, true)];
        let other = Arc::clone(&mmu);
        let changer = thread::spawn(move || change(&other, entries));
        let report = age(&mmu, effort);
        let changed = changer.join().expect("no panic");
        judge(&mmu, report, changed);
    });
}

/// R14: the chain changes: one alias goes, its descriptor and its page are freed and used again.
#[test]
fn a_chain_that_changes_is_never_seen_half_way() {
    let change = |mmu: &AliasMmu, entries: [usize; 2]| {
        let young = mmu.unmap(GFN, entries[1]);
        let again = mmu.map(GFN, false);
        assert_eq!(again, entries[1], "what was freed is used again");
        u64::from(young)
    };
    race("alias::age_against_unmap_and_map", Effort::Full, change, |mmu, report, _| {
        assert_eq!((report.mapped, report.young, report.unknown), (1, 1, 0));
        assert!(report.entries <= 2 && mmu.abilities().bits() != 0);
        let again = age(mmu, Effort::Full);
        assert_eq!((again.mapped, again.young, again.entries), (1, 0, 2));
    });
}

/// R15: an entry is zapped while its chain is held: it is absent, or the exchange is lost; nothing
/// comes back.
#[test]
fn an_entry_that_is_zapped_under_the_ager_stays_zapped() {
    let change = |mmu: &AliasMmu, [first, second]: [usize; 2]| {
        u64::from(mmu.unmap(GFN, first)) + u64::from(mmu.unmap(GFN, second))
    };
    race("alias::age_against_unmap_of_all", Effort::Full, change, |mmu, report, zapped| {
        // Each access is told by the ager or by the zap; a lost exchange is told by both.
        assert!(report.young > 0 || report.lost > 0 || zapped == 2, "{report:?} {zapped}");
        let again = age(mmu, Effort::Full);
        assert_eq!((again.mapped, again.entries), (0, 0), "nothing was resurrected");
    });
}

/// R16, by who does not wait: the chain is held and the page unknown, or the answer is whole.
#[test]
fn a_fast_ager_waits_for_no_chain() {
    let change = |mmu: &AliasMmu, entries: [usize; 2]| u64::from(mmu.unmap(GFN, entries[0]));
    race("alias::fast_age_against_unmap", Effort::Fast, change, |mmu, report, _| {
        assert_eq!(report.unknown + report.mapped, 1, "{report:?}");
        let again = age(mmu, Effort::Full);
        let young = u64::from(report.unknown != 0);
        assert_eq!((again.mapped, again.young), (1, young), "what was unknown is as it was");
    });
}

/// Two agers of one chain: one at a time; the page is young to one of them at least.
#[test]
fn two_agers_take_turns() {
    let change = |mmu: &AliasMmu, _: [usize; 2]| age(mmu, Effort::Full).young;
    race("alias::age_against_age", Effort::Full, change, |mmu, report, other| {
        assert!(report.young + other >= 1);
        assert_eq!(age(mmu, Effort::Full).young, 0);
    });
}
