//! Events (KVM row 3.60): what happens in a scenario is told, all of it, in the order in which it
//! happened, and nothing besides.

mod common;

use common::watched::WatchedGuest;
use common::{BASE, M2, gpa, linear, no_ad, range, request};
use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, Level};
use mmu_core::attributes::Attributes;
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::flush::FlushScope;
use mmu_core::slot::{SlotFlags, SlotRequest};
use mmu_core::spte::{Capabilities, Ept, Npt, Spte, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::trace::Event;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};

/// An event in a few words, gfns counted from `BASE`.
fn words(event: &Event) -> String {
    let what = |spte: Spte, level: Level| match spte {
        spte if spte.is_leaf(level) => "leaf",
        spte if spte.is_table(level) => "table",
        spte if spte.is_frozen() => "frozen",
        _ => "none",
    };
    let at = |gfn: Gfn| gfn.get().checked_sub(BASE).expect("at BASE or above");
    match *event {
        Event::Fault { gpa, code } => format!("fault {} {code:?}", at(Gfn::containing(gpa))),
        Event::FaultEnd { gpa, result } => {
            let result = result.expect("no error");
            let result = format!("{result:?}");
            let result = result.split(['(', ' ']).next().unwrap_or_default();
            format!("end {} {result}", at(Gfn::containing(gpa)))
        }
        Event::FastFault { gfn, .. } => format!("fast {}", at(gfn)),
        Event::Changed { gfn, level, old, new } => {
            let gfn = gfn.get().checked_sub(BASE).map_or("-".to_owned(), |gfn| gfn.to_string());
            format!("{level} {gfn} {} {}", what(old, level), what(new, level))
        }
        Event::Split { gfn, level } => format!("split {level} {}", at(gfn)),
        Event::Collapse { gfn, level } => format!("collapse {level} {}", at(gfn)),
        Event::RootMade { space, .. } => format!("root of {space}"),
        Event::RootsInvalidated { pending } => format!("roots invalid {pending}"),
        Event::RootFreed { .. } => "root freed".to_owned(),
        Event::UnmapBegin { range } => format!("unmap {}+{}", at(range.start), range.len()),
        Event::UnmapEnd { range, pages } => format!("unmapped {pages} at {}", at(range.start)),
        Event::Aged { range, mode, young } => {
            format!("aged {}+{} {mode:?} {young}", at(range.start), range.len())
        }
        Event::Slots { change, .. } => {
            let change = format!("{change:?}");
            format!("slots {}", change.split([' ', '(']).next().unwrap_or_default())
        }
        Event::FlushRequested { scope, tables } => format!("flush {scope:?} {tables}"),
        Event::FlushPaid { changes } => format!("paid {changes}"),
        Event::MmioMarked { gfn, generation, .. } => format!("mmio {} at {generation}", at(gfn)),
        Event::MmioHit { gfn, current } => {
            format!("mmio {} {}", at(gfn), if current { "current" } else { "stale" })
        }
        ref other => format!("{other:?}"),
    }
}

/// The events since the last call are these.
#[track_caller]
fn told<F: SpteFormat>(guest: &WatchedGuest<F>, expected: &[&str]) {
    let events = guest.host().take_events();
    let events: Vec<String> = events.iter().map(words).collect();
    assert_eq!(events, expected);
}

#[track_caller]
fn fault<F: SpteFormat>(
    guest: &mut WatchedGuest<F>,
    gfn: u64,
    code: PfErrorCode,
    level: Level,
) -> FaultOutcome {
    guest.vcpu.fault(&PageFault::new(gpa(gfn), code).at_most(level)).expect("no error")
}

const WRITE: PfErrorCode = PfErrorCode::WRITE;

#[test]
fn faults_tell_of_every_entry_and_how_they_end() {
    let mut guest = WatchedGuest::<Npt>::new(Capabilities::npt(), M2);
    let _ = fault(&mut guest, BASE + 1, WRITE, Level::L1);
    let links = ["512G - none table", "1G 0 none table", "2M 0 none table"];
    let mut all = vec!["fault 1 PfErrorCode(WRITE)"];
    all.extend(links);
    all.extend(["4K 1 none leaf", "end 1 Fixed"]);
    told(&guest, &all);
    let _ = fault(&mut guest, BASE + 2, WRITE, Level::L1);
    told(&guest, &["fault 2 PfErrorCode(WRITE)", "4K 2 none leaf", "end 2 Fixed"]);
    let _ = fault(&mut guest, BASE + 2, WRITE, Level::L1);
    told(&guest, &["fault 2 PfErrorCode(WRITE)", "end 2 Spurious"]);
    let _ = fault(&mut guest, BASE + M2, WRITE, Level::L1);
    let made = ["2M 512 none table", "4K 512 none none", "mmio 512 at 1", "end 512 Emulate"];
    let mut all = vec!["fault 512 PfErrorCode(WRITE)"];
    all.extend(made);
    told(&guest, &all);
    let _ = fault(&mut guest, BASE + M2, PfErrorCode::RESERVED, Level::L1);
    told(&guest, &["fault 512 PfErrorCode(RESERVED)", "mmio 512 current", "end 512 Emulate"]);
    guest.vcpu.forget_mmio();
    let _ = fault(&mut guest, BASE + M2, PfErrorCode::RESERVED, Level::L1);
    told(&guest, &["fault 512 PfErrorCode(RESERVED)", "mmio 512 current", "end 512 Emulate"]);
}

#[test]
fn the_values_told_are_those_of_the_entry() {
    let mut guest = WatchedGuest::<Npt>::new(Capabilities::npt(), M2);
    let _ = fault(&mut guest, BASE + 1, WRITE, Level::L1);
    let events = guest.host().take_events();
    let (level, spte) =
        *guest.mmu.lookup(&mut guest.actor, 0, Gfn::new(BASE + 1)).last().expect("a root");
    let told = Event::Changed { gfn: Gfn::new(BASE + 1), level, old: Spte::EMPTY, new: spte };
    assert!(events.contains(&told), "{events:?}");
    let outcome = Event::FaultEnd { gpa: gpa(BASE + 1), result: Ok(FaultOutcome::Fixed) };
    assert_eq!(events.last(), Some(&outcome));
}

#[test]
fn an_unmap_tells_of_the_leaves_and_of_its_flush() {
    let mut guest = WatchedGuest::<Ept>::new(Capabilities::ept(), M2);
    for gfn in [BASE, BASE + 1, BASE + 70] {
        let _ = fault(&mut guest, gfn, WRITE, Level::L1);
    }
    let _ = guest.host().take_events();
    let _ = guest.mmu.unmap(&mut guest.actor, range(BASE, BASE + 100));
    let leaves = ["4K 0 leaf none", "4K 1 leaf none", "4K 70 leaf none"];
    let mut all = vec!["unmap 0+100"];
    all.extend(leaves);
    all.extend(["flush Ranges 0", "paid 3", "unmapped 3 at 0"]);
    told(&guest, &all);
    let _ = guest.mmu.unmap(&mut guest.actor, range(BASE, BASE + 100));
    told(&guest, &["unmap 0+100", "unmapped 0 at 0"]);
}

#[test]
fn aging_and_the_fast_fault_after_it_are_told() {
    let mut guest = WatchedGuest::<Ept>::new(no_ad(Capabilities::ept()), M2);
    let _ = fault(&mut guest, BASE + 5, WRITE, Level::L1);
    let _ = guest.host().take_events();
    let age = |guest: &mut WatchedGuest<Ept>, mode| {
        let request = AgeRequest::new(range(BASE, BASE + 8), mode);
        let _ = guest.mmu.age(&mut guest.actor, request, &mut CountOnly);
    };
    age(&mut guest, AgeMode::Test);
    told(&guest, &["aged 0+8 Test 1"]);
    age(&mut guest, AgeMode::Clear);
    told(&guest, &["4K 5 leaf leaf", "aged 0+8 Clear 1"]);
    let _ = fault(&mut guest, BASE + 5, WRITE | PfErrorCode::PRESENT, Level::L1);
    let entry = "fault 5 PfErrorCode(PRESENT | WRITE)";
    told(&guest, &[entry, "4K 5 leaf leaf", "fast 5", "end 5 Fixed"]);
    age(&mut guest, AgeMode::ClearFlush);
    let events = guest.host().take_events();
    let events: Vec<String> = events.iter().map(words).collect();
    assert_eq!(events[..3], ["4K 5 leaf leaf", "aged 0+8 ClearFlush 1", "flush Ranges 0"]);
    assert!(events[3].starts_with("paid "), "{events:?}");
}

#[test]
fn a_split_and_a_huge_page_in_place_of_a_table_are_told() {
    let mut guest = WatchedGuest::<Ept>::new(Capabilities::ept(), M2);
    guest.host().inner.set_resolver(linear(Level::L2));
    let _ = fault(&mut guest, BASE, WRITE, Level::L2);
    let _ = guest.host().take_events();
    let small = PageFault::prefetch(gpa(BASE + 3), Access::READ).at_most(Level::L1);
    let _ = guest.vcpu.fault(&small).expect("no error");
    let events: Vec<String> = guest.host().take_events().iter().map(words).collect();
    assert_eq!(events[1..], ["2M 0 leaf table", "split 2M 0", "end 3 Spurious"]);
    let _ = guest.mmu.unmap(&mut guest.actor, range(BASE + 2, BASE + M2));
    let _ = guest.host().take_events();
    let _ = fault(&mut guest, BASE + 2, WRITE, Level::L2);
    let events: Vec<String> = guest.host().take_events().iter().map(words).collect();
    let mut expected = vec!["fault 2 PfErrorCode(WRITE)", "2M 0 table leaf", "collapse 2M 0"];
    expected.extend(["4K 0 leaf frozen", "4K 1 leaf frozen"]);
    let seen = |kind: &str| events.iter().filter(|event| event.ends_with(kind)).count();
    assert_eq!(events[..5], expected);
    assert_eq!((seen("none frozen"), seen("leaf frozen")), (510, 2));
    assert_eq!(events[515..], ["flush Ranges 1", "paid 1", "end 2 Fixed"]);
}

#[test]
fn a_zap_all_and_the_life_of_roots_are_told() {
    let mut guest = WatchedGuest::<Npt>::new(Capabilities::npt(), M2);
    let _ = fault(&mut guest, BASE, WRITE, Level::L1);
    let _ = guest.host().take_events();
    let zap = guest.mmu.invalidate_roots(&mut guest.actor);
    assert_eq!(
        zap_words(&guest),
        ["roots invalid 1".to_owned(), format!("flush {:?} 0", FlushScope::Reload)]
    );
    guest.vcpu.load_root().unwrap();
    assert_eq!(zap_words(&guest), ["root of 0"]);
    let _ = zap.finish(&mut guest.actor);
    assert_eq!(zap_words(&guest), ["root freed"]);
}

fn zap_words<F: SpteFormat>(guest: &WatchedGuest<F>) -> Vec<String> {
    guest.host().take_events().iter().map(words).collect()
}

#[test]
fn slot_changes_are_told_when_they_are_in_force() {
    let mut guest = WatchedGuest::<Npt>::new(Capabilities::npt(), M2);
    guest.slot(1, BASE + 4 * M2, 8, SlotFlags::empty());
    let events = guest.host().take_events();
    let [Event::Slots { generation, .. }] = events[..] else { panic!("{events:?}") };
    assert_eq!(generation, guest.mmu.vm().slots().generation());
    let _ = fault(&mut guest, BASE + 4 * M2 + 1, WRITE, Level::L1);
    let _ = guest.host().take_events();
    let gone = SlotRequest { bytes: 0, ..request(1, BASE + 4 * M2, 0, 0, SlotFlags::empty()) };
    let _ = guest.mmu.set_slot(&mut guest.slots, &mut guest.actor, &gone).expect("legal");
    let expected = ["unmap 2048+8", "4K 2049 leaf none", "flush Ranges 0", "paid 1"];
    let mut expected = expected.to_vec();
    expected.extend(["unmapped 1 at 2048", "slots Delete"]);
    told(&guest, &expected);
}

#[test]
fn attributes_are_told_when_they_are_in_force() {
    let mut guest = WatchedGuest::<Npt>::new(Capabilities::npt(), M2);
    let _ = fault(&mut guest, BASE + 1, WRITE, Level::L1);
    let _ = guest.host().take_events();
    let (pages, private) = (range(BASE + 1, BASE + 3), Attributes::PRIVATE);
    let writer = guest.slots.attributes();
    let _ = guest.mmu.set_attributes(writer, &mut guest.actor, pages, private).expect("legal");
    let events = guest.host().take_events();
    let set = Event::AttributesSet { range: pages, attributes: private };
    assert_eq!(events.last(), Some(&set), "{events:?}");
}

#[test]
fn the_recovery_of_a_table_is_told() {
    let caps = Capabilities { nx_huge_pages: true, ..Capabilities::npt() };
    let mut guest = WatchedGuest::<Npt>::new(caps, 2 * M2);
    guest.host().inner.set_resolver(linear(Level::L2));
    let fetch = PfErrorCode::FETCH | PfErrorCode::USER;
    let _ = fault(&mut guest, BASE + 1, fetch, Level::L2);
    assert_eq!(guest.mmu.vm().stats().get(Counter::NxSplits), 1, "made for the fetch");
    let _ = guest.host().take_events();
    assert_eq!(guest.mmu.recover_nx(&mut guest.actor, 1).recovered, 1);
    let events = guest.host().take_events();
    let told = Event::NxRecovered { gfn: Gfn::new(BASE), level: Level::L2 };
    assert!(events.contains(&told), "{events:?}");
    assert_eq!(guest.mmu.vm().stats().get(Counter::NxSplits), 0);
}
