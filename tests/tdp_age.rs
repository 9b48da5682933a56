//! Aging without a lock (KVM rows 5.1 to 5.9, 5.11, 5.13).

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use common::{BASE, DATA, G1, Guest, M2, Modelled, Shape, no_ad, range};
use mmu_core::addr::{Gfn, GfnRange, Level, to_u64};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt};
use mmu_core::stats::Counter;
use mmu_core::traits::{AgeMode, AgeReport, AgeRequest, AgeSink, CountOnly, Effort, MASK_WORDS};
use mmu_model::{AccessKind, Caches, Random, SoftCpu};
use tdp_mmu::zap::SLICE_ENTRIES;

use AccessKind::{Fetch, Read, Write};

/// What a sink was told: gfn to (level, young). Checks the order and the shape on the way.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    pages: BTreeMap<u64, (u8, bool)>,
    last: u64,
}

impl AgeSink for Seen {
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        assert!(base.is_aligned(Level::L2) && base.get() >= self.last, "{base:?} after {self:?}");
        self.last = base.get();
        for (word, (present, young)) in present.iter().zip(young).enumerate() {
            assert_eq!(young & !present, 0, "young is a subset of present");
            for bit in (0..64).filter(|bit| present >> bit & 1 != 0) {
                let gfn = base.get() + to_u64(word) * 64 + bit;
                let twice = self.pages.insert(gfn, (1, young >> bit & 1 != 0));
                assert!(twice.is_none(), "{gfn:#x} told twice");
            }
        }
    }

    fn huge(&mut self, base: Gfn, level: Level, young: bool) {
        assert!(base.is_aligned(level) && level > Level::L1 && base.get() >= self.last);
        self.last = base.get();
        assert!(self.pages.insert(base.get(), (level.number(), young)).is_none());
    }
}

/// A guest with small and huge pages: 4 KiB in the first 2 MiB, then two of 2 MiB, then a 1 GiB.
fn mixed<F: Modelled>(caps: Capabilities) -> Guest<F> {
    let mut guest = Guest::<F>::with_memory(caps, 2 * G1, Level::L3);
    guest.map((0..M2).step_by(3).map(|page| BASE + page), Read, Level::L1);
    guest.map([BASE + M2, BASE + 3 * M2], Write, Level::L2);
    guest.map((0..9).map(|page| BASE + 4 * M2 + page), Read, Level::L1);
    guest.map([BASE + G1], Write, Level::L3);
    guest
}

/// Use a page the way a guest does: faults are served.
fn touch<F: Modelled>(guest: &mut Guest<F>, gfn: u64, kind: AccessKind) {
    if guest.touch(gfn, kind).is_err() {
        let _ = guest.fault(gfn, kind, Level::L1);
        guest.touch(gfn, kind).expect("the fault was served");
    }
}

fn exactly_the_touched_pages<F: Modelled>(caps: Capabilities) {
    let mut random = Random::new(5);
    let mut guest = mixed::<F>(caps);
    let small: Vec<u64> = (0..M2).step_by(3).map(|page| BASE + page).collect();
    let mapped = to_u64(small.len()) + 2 * M2 + 9 + G1;
    let all = guest.age(GfnRange::ALL, AgeMode::Test);
    assert_eq!((all.mapped, all.young), (mapped, mapped), "a fault is an access");
    for round in 0..6 {
        let cleared = guest.age(GfnRange::ALL, AgeMode::Clear);
        assert_eq!(cleared.mapped, mapped);
        let again = guest.age(GfnRange::ALL, AgeMode::Clear);
        assert_eq!((again.mapped, again.young, again.lost), (mapped, 0, 0), "round {round}");
        // Nothing anybody can see has changed but the accessed bits.
        let kinds = [Read, Write, Fetch];
        let touched: Vec<u64> = small.iter().copied().filter(|_| random.chance(1, 5)).collect();
        for &gfn in &touched {
            let kind = kinds[random.below(3) as usize];
            touch(&mut guest, gfn, kind);
        }
        let huge = random.chance(1, 2);
        if huge {
            touch(&mut guest, BASE + M2 + random.below(M2), Read);
        }
        let mut seen = Seen::default();
        let report = guest.age_into(GfnRange::ALL, AgeMode::Test, u64::MAX, &mut seen);
        let expected = to_u64(touched.len()) + if huge { M2 } else { 0 };
        assert_eq!((report.mapped, report.young), (mapped, expected));
        for gfn in &small {
            assert_eq!(seen.pages[gfn], (1, touched.contains(gfn)), "round {round} {gfn:#x}");
        }
        assert_eq!(seen.pages[&(BASE + M2)], (2, huge));
        assert_eq!(seen.pages[&(BASE + 3 * M2)], (2, false));
        assert_eq!(seen.pages[&(BASE + G1)], (3, false));
        assert_eq!(to_u64(seen.pages.len()), to_u64(small.len()) + 2 + 9 + 1);
    }
    guest.check();
    guest.finish();
}

/// The same expectations with and without hardware accessed bits.
#[test]
fn every_touched_page_is_young_and_no_other() {
    for_each_format!(exactly_the_touched_pages);
}

/// Rows 5.11, I21: where a page is, what it permits (tracking undone) and whether it is dirty
/// survive aging.
fn aging_changes_accessed_only<F: Modelled>(caps: Capabilities) {
    let mut guest = mixed::<F>(caps);
    touch(&mut guest, BASE + M2, Write);
    let gfns = [BASE, BASE + 3, BASE + M2 + 7, BASE + 3 * M2, BASE + G1 + 99];
    let facts = |guest: &mut Guest<F>, gfn| {
        let (level, spte) = guest.entry(gfn);
        let config = guest.config();
        let rights =
            config.access(config.untrack(spte)).difference(mmu_core::access::Access::WRITE);
        let writable = (config.is_host_writable(spte), config.is_mmu_writable(spte));
        (level, config.pfn(spte), rights, writable, config.is_dirty(spte))
    };
    let before = gfns.map(|gfn| facts(&mut guest, gfn));
    let walks = gfns.map(|gfn| guest.found(gfn));
    for mode in [AgeMode::Clear, AgeMode::ClearFlush, AgeMode::Clear] {
        let _ = guest.age(GfnRange::ALL, mode);
        assert_eq!(gfns.map(|gfn| facts(&mut guest, gfn)), before);
        if caps.accessed_dirty {
            assert_eq!(gfns.map(|gfn| guest.found(gfn)), walks, "the guest sees no difference");
        } else {
            assert!(gfns.iter().all(|gfn| guest.found(*gfn).is_none()), "the next access faults");
        }
        guest.check();
    }
    guest.finish();
}

// INVARIANT[I21].
#[test]
fn aging_loses_nothing_but_the_accessed_bit() {
    for_each_format!(aging_changes_accessed_only);
}

/// Row R18.
fn test_writes_nothing<F: Modelled>(caps: Capabilities) {
    let mut guest = mixed::<F>(caps);
    let _ = guest.age(range(BASE, BASE + 99), AgeMode::Clear);
    let gfns: Vec<u64> = (0..M2).chain([M2, 3 * M2, G1]).map(|page| BASE + page).collect();
    let before: Vec<_> = gfns.iter().map(|gfn| guest.entry(*gfn)).collect();
    let aged = guest.stat(Counter::LeavesAged);
    guest.host().take_batches();
    let first = guest.age(GfnRange::ALL, AgeMode::Test);
    let second = guest.age(GfnRange::ALL, AgeMode::Test);
    assert_eq!(first, second);
    let after: Vec<_> = gfns.iter().map(|gfn| guest.entry(*gfn)).collect();
    assert_eq!(before, after);
    assert_eq!(guest.stat(Counter::LeavesAged), aged);
    assert_eq!(guest.host().take_batches(), []);
    guest.finish();
}

#[test]
fn looking_writes_nothing() {
    for_each_format!(test_writes_nothing);
}

/// Row 5.9: the bit of a huge page is one: a page of it makes all young, or old.
#[test]
fn a_huge_page_ages_as_a_whole() {
    fn run<F: Modelled>(caps: Capabilities) {
        for (level, first) in [(Level::L2, BASE + M2), (Level::L3, BASE + G1)] {
            let mut guest = mixed::<F>(caps);
            let pages = level.pages();
            // One page of it, in the middle: counted as one, cleared as a whole.
            let one = range(first + pages / 2, first + pages / 2 + 1);
            let mut seen = Seen::default();
            let report = guest.age_into(one, AgeMode::Clear, u64::MAX, &mut seen);
            assert_eq!((report.mapped, report.young), (1, 1));
            assert_eq!(seen.pages, BTreeMap::from([(first, (level.number(), true))]));
            let whole = range(first, first + pages);
            let report = guest.age(whole, AgeMode::Test);
            assert_eq!((report.mapped, report.young), (pages, 0), "its neighbours are old too");
            touch(&mut guest, first + 1, Read);
            assert_eq!(guest.age(one, AgeMode::Test).young, 1);
            // Row 5.10: a range that begins in the last page of one and ends in the next.
            let across = range(first + pages - 1, first + pages + 1);
            assert_eq!(guest.age(across, AgeMode::Clear).young, 1);
            assert_eq!(guest.age(whole, AgeMode::Test).young, 0);
            guest.finish();
        }
    }
    for_each_format!(run);
}

/// What was cleared by one page of a huge leaf and not flushed hides accesses to all of it: a
/// precise pass over another page owes the flush too.
#[test]
fn a_huge_page_that_was_cleared_by_one_page_is_flushed_by_any() {
    fn run<F: Modelled>(caps: Capabilities) {
        for (effort, level) in [(Effort::Full, Level::L2), (Effort::Fast, Level::L3)] {
            let mut guest = Guest::<F>::with_memory(caps, 2 * G1, level);
            let root = guest.root_register();
            let cpu = SoftCpu::new(&guest.format, root, Caches::unlimited());
            let core = guest.host().add_core(cpu);
            guest.map([BASE], Read, level);
            let read = |guest: &Guest<F>| {
                let access = mmu_model::Access::user(Read);
                core.lock().unwrap().cpu.access(guest.host(), (BASE + 9) << 12, access).is_ok()
            };
            assert!(read(&guest));
            let one = |page| range(BASE + page, BASE + page + 1);
            let clear = AgeRequest::new(one(200), AgeMode::Clear).with_effort(effort);
            assert_eq!(guest.ask(clear, &mut CountOnly).young, 1);
            assert!(read(&guest), "from the TLB");
            assert_eq!(guest.age(one(9), AgeMode::ClearFlush).young, 0, "hidden");
            if !read(&guest) {
                let _ = guest.fault(BASE + 9, Read, level);
            }
            assert_eq!(guest.age(one(300), AgeMode::Test).young, 1);
            guest.check();
            guest.finish();
        }
    }
    for_each_format!(run);
}

/// A precise pass flushes a huge leaf that it clears, for all of its pages whichever it was asked
/// about: no TLB hides the next access.
#[test]
fn a_precise_pass_over_one_page_of_a_huge_page_hides_none_of_it() {
    fn run<F: Modelled>(caps: Capabilities) {
        for level in [Level::L2, Level::L3] {
            let mut guest = Guest::<F>::with_memory(caps, 2 * G1, level);
            let root = guest.root_register();
            let cpu = SoftCpu::new(&guest.format, root, Caches::unlimited());
            let core = guest.host().add_core(cpu);
            let read = |guest: &mut Guest<F>| {
                let access = mmu_model::Access::user(Read);
                for _ in 0..4 {
                    let address = (BASE + 9) << 12;
                    let found = core.lock().unwrap().cpu.access(guest.host(), address, access);
                    match found {
                        Ok(_) => return,
                        Err(_) => guest.map([BASE + 9], Read, level),
                    }
                }
                panic!("cannot be read");
            };
            read(&mut guest);
            let whole = range(BASE, BASE + level.pages());
            for (asked, pages) in [(whole, level.pages()), (range(BASE + 200, BASE + 201), 1)] {
                assert_eq!(guest.age(asked, AgeMode::ClearFlush).young, pages);
                assert_eq!(guest.age(whole, AgeMode::Test).young, 0);
                read(&mut guest);
                assert_eq!(guest.age(whole, AgeMode::Test).young, level.pages(), "{asked:?}");
            }
            guest.check();
            guest.finish();
        }
    }
    for_each_format!(run);
}

/// A pass in slices finds what a pass in one finds, whatever the budget.
#[test]
fn slices_of_any_budget_find_the_same() {
    let mut random = Random::new(77);
    for budget in [0, 1, 2, 100, 511, 512, 513, 1000, 1500, 5000, u64::MAX] {
        let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 2 * G1, Level::L3);
        for _ in 0..400 {
            let gfn = BASE + random.below(12) * M2 + random.below(M2);
            guest.map([gfn], Read, Level::L1);
        }
        guest.map([BASE + 20 * M2, BASE + G1], Read, Level::L2);
        let start = BASE + random.below(M2);
        let asked = range(start, BASE + 2 * G1);
        let mut whole = Seen::default();
        let expected = guest.age_into(asked, AgeMode::Test, u64::MAX, &mut whole);
        let mut sliced = Seen::default();
        let mut total = AgeReport::empty(asked.start);
        let mut slices = 0;
        while total.next < asked.end {
            let rest = GfnRange::new(total.next, asked.end);
            let slice = guest.age_into(rest, AgeMode::Clear, budget, &mut sliced);
            assert!(slice.next > total.next, "every slice makes progress");
            let most = budget.saturating_add(2 * to_u64(SLICE_ENTRIES));
            assert!(slice.entries <= most, "{} entries for a budget of {budget}", slice.entries);
            total = total.merge(slice);
            slices += 1;
        }
        assert_eq!(total.next, asked.end);
        assert_eq!(sliced.pages, whole.pages, "budget {budget}");
        assert_eq!((total.mapped, total.young), (expected.mapped, expected.young));
        assert!(slices == 1 || budget < 10_000);
        assert_eq!(guest.age(asked, AgeMode::Test).young, 0);
        guest.finish();
    }
}

#[test]
fn ranges_are_exact_and_empty_ones_find_nothing() {
    let mut guest = mixed::<Npt>(Capabilities::npt());
    for (start, end) in [(5, 9), (0, 1), (1, 1), (9, 2), (60, 70), (63, 64), (64, 65), (0, 512)] {
        let mut seen = Seen::default();
        let asked = range(BASE + start, BASE + end);
        let report = guest.age_into(asked, AgeMode::Test, u64::MAX, &mut seen);
        let expected = (start..end.max(start)).filter(|page| page % 3 == 0).count();
        assert_eq!(report.mapped, to_u64(expected), "{asked:?}");
        assert!(seen.pages.keys().all(|gfn| asked.contains(Gfn::new(*gfn))), "{seen:?}");
        assert_eq!(report.next, asked.end);
    }
    for nowhere in [range(0, BASE), range(BASE + 2 * G1, u64::MAX), range(u64::MAX, u64::MAX)] {
        assert_eq!(guest.age(nowhere, AgeMode::Clear).mapped, 0);
    }
    guest.finish();
}

/// Row 5.13: an invalid root is about to vanish; aging leaves it alone.
#[test]
fn invalid_roots_are_ignored() {
    let mut guest = mixed::<Ept>(Capabilities::ept());
    let old = guest.root_register();
    let zap = guest.mmu.invalidate_roots(&mut guest.actor);
    let report = guest.mmu.vm().actor().map(|mut actor| {
        let request =
            mmu_core::traits::AgeRequest::new(GfnRange::ALL, AgeMode::Clear).with_budget(9);
        use mmu_core::traits::{AgeRange, CountOnly};
        guest.mmu.age(&mut actor, request, &mut CountOnly)
    });
    let report = report.unwrap();
    assert_eq!((report.mapped, report.entries), (0, 0));
    assert_eq!(report.next, GfnRange::ALL.end);
    assert!(guest.found_in(old, BASE).is_some());
    let zapped = zap.finish(&mut guest.actor);
    assert_eq!(zapped.young, zapped.pages(), "they were all young still");
    guest.finish();
}

#[test]
fn both_address_spaces_are_aged() {
    let shape = Shape { spaces: 2, ..Shape::new(Capabilities::ept()) };
    let mut guest = Guest::<Ept>::with(shape);
    guest.slot(0, BASE, 64, DATA, SlotFlags::empty());
    let smm = mmu_core::slot::SlotRequest {
        as_id: 1,
        ..common::request(0, BASE, 64, DATA + 64, SlotFlags::empty())
    };
    let _ = guest.set_slot(&smm).unwrap();
    guest.map([BASE, BASE + 1], Read, Level::L1);
    let mut other = tdp_mmu::TdpVcpu::new(&guest.mmu, 1).unwrap();
    let _ = other.load_root().unwrap();
    let fault = mmu_core::fault::PageFault::new(
        common::gpa(BASE + 1),
        mmu_core::access::PfErrorCode::empty(),
    );
    let _ = other.fault(&fault).unwrap();
    let report = guest.age(GfnRange::ALL, AgeMode::Clear);
    assert_eq!((report.mapped, report.young), (3, 3));
    assert_eq!(guest.age(GfnRange::ALL, AgeMode::Test).young, 0);
    drop(other);
    guest.finish();
}

/// Row 5.3: no lock. Somebody holds it exclusively for as long as aging takes.
#[test]
fn aging_completes_while_the_lock_is_held_exclusively() {
    fn run<F: Modelled>(caps: Capabilities) {
        let mut guest = mixed::<F>(caps);
        let vm = Arc::clone(guest.mmu.vm());
        let (held, is_held) = mpsc::channel();
        let (done, is_done) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let vm = &vm;
            scope.spawn(move || {
                let mut holder = vm.actor().unwrap();
                let lock = vm.lock().exclusive(holder.participant());
                held.send(()).unwrap();
                is_done.recv_timeout(Duration::from_secs(60)).expect("aging completes");
                drop(lock);
            });
            is_held.recv().unwrap();
            let modes = [AgeMode::Test, AgeMode::Clear, AgeMode::ClearFlush, AgeMode::Test];
            let young = modes.map(|mode| guest.age(GfnRange::ALL, mode).young);
            assert!(young[0] > G1 && young[1] == young[0] && young[2..] == [0, 0], "{young:?}");
            done.send(()).unwrap();
        });
        drop(vm);
        guest.finish();
    }
    for_each_format!(run);
}

/// Row 5.2: without a flush a page that a TLB holds may be missed, never invented; with the flush
/// none is missed. With access tracking the flush is what makes the next access fault.
#[test]
fn a_tlb_hides_accesses_until_a_precise_pass() {
    fn run<F: Modelled>(caps: Capabilities) {
        const PAGES: u64 = 64;
        let mut guest = Guest::<F>::with_memory(caps, PAGES, Level::L1);
        let root = guest.root_register();
        let core = guest.host().add_core(SoftCpu::new(&guest.format, root, Caches::unlimited()));
        let read = |guest: &mut Guest<F>, gfn: u64| {
            let access = mmu_model::Access::user(Read);
            for _ in 0..4 {
                let found = core.lock().unwrap().cpu.access(guest.host(), gfn << 12, access);
                match found {
                    Ok(pa) => return assert_eq!(pa >> 12, DATA + gfn - BASE),
                    Err(_) => guest.map([gfn], Read, Level::L1),
                }
            }
            panic!("{gfn:#x} cannot be read");
        };
        (BASE..BASE + PAGES).for_each(|gfn| read(&mut guest, gfn));
        let all = range(BASE, BASE + PAGES);
        assert_eq!(guest.age(all, AgeMode::Clear).young, PAGES);
        (BASE..BASE + 10).for_each(|gfn| read(&mut guest, gfn));
        assert_eq!(guest.age(all, AgeMode::Clear).young, 0, "hidden, and none invented");
        // This pass is precise for what comes after it, also where it cleared nothing itself.
        assert_eq!(guest.age(all, AgeMode::ClearFlush).young, 0);
        (BASE + 3..BASE + 20).for_each(|gfn| read(&mut guest, gfn));
        assert_eq!(guest.age(all, AgeMode::ClearFlush).young, 17);
        assert_eq!(guest.age(all, AgeMode::ClearFlush).young, 0);
        // And for what it cleared itself.
        (BASE + 3..BASE + 20).for_each(|gfn| read(&mut guest, gfn));
        assert_eq!(guest.age(all, AgeMode::ClearFlush).young, 17);
        guest.check();
        guest.finish();
    }
    for_each_format!(run);
    run::<Legacy>(no_ad(Capabilities::legacy()));
}
