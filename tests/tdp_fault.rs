//! What comes of a fault: every outcome and every error with its values (KVM rows 0.3.x, 3.15 to
//! 3.25), page sizes, splitting, collapsing, prefaulting, access tracking.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{
    BASE, DATA, Found, G1, Guest, M2, Modelled, Shape, code, gpa, linear, range, request,
};
use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::fault::{EmulateReason, FaultError, FaultOutcome, PageFault};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt};
use mmu_core::stats::Counter;
use mmu_core::traits::{AgeMode, HostPage, ResolveError};
use mmu_model::{AccessKind, PhysMem, Random};
use tdp_mmu::TdpVcpu;

use AccessKind::{Fetch, Read, Write};

fn outcomes<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::without_root(Shape::new(caps));
    let max_gfn = guest.config().max_gfn_exclusive();
    let at = |gfn: u64| PageFault::new(gpa(gfn), PfErrorCode::empty());
    assert_eq!(guest.vcpu.fault(&at(BASE)), Err(FaultError::NoRoot));
    let _ = guest.vcpu.load_root().unwrap();
    for level in [Level::L4, Level::L5] {
        let result = guest.vcpu.fault(&at(BASE).at_most(level));
        assert_eq!(result, Err(FaultError::NotALeafLevel { level }));
    }
    for gfn in [max_gfn.get(), max_gfn.get() + 1, (1 << 52) - 1] {
        let error = FaultError::BeyondPhysical { gpa: gpa(gfn), max_gfn };
        assert_eq!(guest.vcpu.fault(&at(gfn)), Err(error));
    }
    let no_slot = |gfn| FaultOutcome::Emulate(EmulateReason::NoSlot { gfn, space: 0 });
    for gfn in [BASE, max_gfn.get() - 1] {
        assert_eq!(guest.vcpu.fault(&at(gfn)), Ok(no_slot(Gfn::new(gfn))));
    }
    guest.slot(3, BASE, 16, DATA, SlotFlags::empty());
    guest.slot(4, BASE + 16, 16, DATA + 64, SlotFlags::READ_ONLY);
    assert_eq!(guest.fault(BASE, Read, Level::L1), FaultOutcome::Fixed);
    assert_eq!(guest.fault(BASE, Read, Level::L1), FaultOutcome::Spurious);
    assert_eq!(guest.fault(BASE, Write, Level::L1), FaultOutcome::Spurious, "W at once");
    assert_eq!(guest.fault(BASE, Fetch, Level::L1), FaultOutcome::Spurious);
    assert!(guest.touch(BASE, Write).is_ok() && guest.touch(BASE, Fetch).is_ok());

    let gfn = Gfn::new(BASE + 17);
    let read_only = FaultOutcome::Emulate(EmulateReason::ReadOnly { gfn, slot: 4 });
    assert_eq!(guest.fault(BASE + 17, Write, Level::L1), read_only, "not mapped");
    assert_eq!(guest.fault(BASE + 17, Read, Level::L1), FaultOutcome::Fixed);
    assert_eq!(guest.fault(BASE + 17, Write, Level::L1), read_only, "mapped");
    assert_eq!(guest.found(BASE + 17).map(|found| found.writable), Some(false));
    let faults = [
        Counter::PfFixed,
        Counter::PfSpurious,
        Counter::PfEmulate,
        Counter::PfError,
        Counter::PfRetry,
        Counter::PfTaken,
    ];
    assert_eq!(faults.map(|counter| guest.stat(counter)), [2, 3, 4, 6, 0, 15]);
    assert_eq!(guest.check().leaves, [2, 0, 0]);
    guest.finish();
}

#[test]
fn outcomes_and_argument_errors_name_their_values() {
    for_each_format!(outcomes);
}

/// The host has the page read-only: reads are mapped without W, writes are emulated.
#[test]
fn a_page_the_host_has_read_only_is_mapped_for_reading() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 16, Level::L1);
    let read_only = |level| -> Arc<common::Resolve> {
        Arc::new(move |slot: &_, gfn, _| {
            linear(level)(slot, gfn, Access::READ).map(|page| HostPage { writable: false, ..page })
        })
    };
    guest.host().set_resolver(read_only(Level::L1));
    let gfn = Gfn::new(BASE + 1);
    let emulate = FaultOutcome::Emulate(EmulateReason::ReadOnly { gfn, slot: 0 });
    assert_eq!(guest.fault(BASE + 1, Write, Level::L1), emulate);
    assert_eq!(guest.fault(BASE + 1, Read, Level::L1), FaultOutcome::Fixed);
    assert_eq!(guest.fault(BASE + 1, Write, Level::L1), emulate);
    let (_, spte) = guest.entry(BASE + 1);
    assert!(!guest.config().is_host_writable(spte) && !guest.config().is_mmu_writable(spte));
    guest.check();
    guest.finish();
}

/// A file's page becomes writable where it is: the same frame, no invalidation. The entry must not
/// change its host-writable bit in place (row 1.8), and the guest must be able to write.
#[test]
fn a_page_that_the_host_makes_writable_in_place_becomes_writable() {
    for caps in [Capabilities::ept(), common::no_ad(Capabilities::ept())] {
        let mut guest = Guest::<Ept>::with_memory(caps, 16, Level::L1);
        let may_write = Arc::new(AtomicU64::new(0));
        let flag = Arc::clone(&may_write);
        guest.host().set_resolver(Arc::new(move |slot, gfn, _| {
            let page = linear(Level::L1)(slot, gfn, Access::READ)?;
            Ok(HostPage { writable: flag.load(Ordering::Relaxed) != 0, ..page })
        }));
        assert_eq!(guest.fault(BASE, Read, Level::L1), FaultOutcome::Fixed);
        may_write.store(1, Ordering::Relaxed);
        assert_eq!(guest.fault(BASE, Write, Level::L1), FaultOutcome::Fixed);
        assert!(guest.touch(BASE, Write).is_ok());
        guest.check();
        guest.finish();
    }
}

#[test]
fn every_answer_of_the_resolver_has_its_outcome() {
    let mut guest = Guest::<Npt>::with_memory(Capabilities::npt(), 16, Level::L1);
    let gfn = Gfn::new(BASE + 2);
    let errors = [
        ResolveError::NeedsIo,
        ResolveError::HwPoison,
        ResolveError::Interrupted,
        ResolveError::NoMemory,
    ];
    let before = guest.check();
    for source in errors {
        guest.host().set_resolver(Arc::new(move |_, _, _| Err(source)));
        let error = guest.try_fault(BASE + 2, Write, Level::L1).unwrap_err();
        assert_eq!(error, FaultError::Resolve { gfn, source });
        assert!(error.to_string().contains("0x100002"), "{error}");
    }
    guest.host().set_resolver(Arc::new(|_, _, _| Err(ResolveError::ReadOnly)));
    let emulate = FaultOutcome::Emulate(EmulateReason::ReadOnly { gfn, slot: 0 });
    assert_eq!(guest.fault(BASE + 2, Write, Level::L1), emulate);
    let limit = guest.config().max_pfn_exclusive().get();
    for pfn in [limit, limit + 1, 1 << 52, u64::MAX] {
        guest.host().set_resolver(Arc::new(move |_, _, _| {
            Ok(HostPage { pfn: Pfn::new(pfn), writable: true, level: Level::L3 })
        }));
        let error = guest.try_fault(BASE + 2, Write, Level::L3).unwrap_err();
        assert_eq!(error, FaultError::BadHostPage { gfn, pfn });
    }
    assert_eq!(guest.check(), before, "nothing was mapped, no table made");
    // The last frame there is.
    guest.host().set_resolver(Arc::new(move |_, _, _| {
        Ok(HostPage { pfn: Pfn::new(limit - 1), writable: true, level: Level::L1 })
    }));
    assert_eq!(guest.fault(BASE + 2, Write, Level::L1), FaultOutcome::Fixed);
    assert_eq!(guest.found(BASE + 2).map(|found| found.pfn), Some(limit - 1));
    guest.finish();
}

// INVARIANT[I7].
#[test]
fn a_reserved_bit_in_our_entry_is_reported_with_the_entry() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 16, Level::L1);
    guest.map([BASE], Read, Level::L1);
    let fault = PageFault::new(gpa(BASE), PfErrorCode::RESERVED | PfErrorCode::PRESENT);
    assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Spurious), "nothing wrong by now");
    let (_, spte) = guest.entry(BASE);
    let walk = guest.mmu.lookup(&mut guest.actor, 0, Gfn::new(BASE));
    let table = walk[walk.len() - 2].1.pfn();
    let place = table.address().get() + (BASE & 511) * 8;
    let bad = spte.raw() | 1 << 50;
    assert_eq!(guest.host().cas(place, spte.raw(), bad), Some(Ok(())));
    let error = guest.vcpu.fault(&fault).unwrap_err();
    assert_eq!(error, FaultError::ReservedBit { gpa: gpa(BASE), level: Level::L1, spte: bad });
    assert!(guest.mmu.check(&mut guest.actor).is_err(), "the checker finds it too");
    assert_eq!(guest.host().cas(place, bad, spte.raw()), Some(Ok(())));
    guest.finish();
}

#[test]
fn a_fault_on_a_stale_root_retries_until_the_root_is_loaded() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 16, Level::L1);
    guest.map([BASE], Write, Level::L1);
    let zap = guest.mmu.invalidate_roots(&mut guest.actor);
    let fault = PageFault::new(gpa(BASE), PfErrorCode::WRITE);
    for prefetch in [false, true] {
        let fault = PageFault { prefetch, ..fault };
        assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Retry));
    }
    assert!(!guest.vcpu.root_is_current());
    let root = guest.vcpu.load_root().unwrap();
    assert!(guest.vcpu.root_is_current());
    assert_eq!(guest.vcpu.load_root(), Ok(root), "the same until it is invalidated");
    assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Fixed));
    assert_eq!(zap.finish(&mut guest.actor).leaves, [1, 0, 0]);
    guest.check();
    guest.finish();
}

/// What happens while the host is asked for the page.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    RootInvalidated,
    SlotDeleted,
    SlotMoved,
    OtherSlotCreated,
    Invalidation { first: u64, end: u64, ends: bool },
}

/// Row 3.15: the resolver interleaves events; the answer it gives is used only if none matters.
#[test]
fn a_page_resolved_before_an_event_is_thrown_away() {
    let inside = Meanwhile::Invalidation { first: BASE + 5, end: BASE + 6, ends: false };
    let elsewhere = Meanwhile::Invalidation { first: BASE + 6, end: BASE + 9, ends: false };
    let ended = Meanwhile::Invalidation { first: BASE + 5, end: BASE + 6, ends: true };
    let ended_elsewhere = Meanwhile::Invalidation { first: BASE, end: BASE + 2, ends: true };
    let gfn = Gfn::new(BASE + 5);
    let gone = FaultOutcome::Emulate(EmulateReason::NoSlot { gfn, space: 0 });
    let cases = [
        (Meanwhile::RootInvalidated, FaultOutcome::Retry, FaultOutcome::Fixed),
        (Meanwhile::SlotDeleted, FaultOutcome::Retry, gone),
        (Meanwhile::SlotMoved, FaultOutcome::Retry, gone),
        (Meanwhile::OtherSlotCreated, FaultOutcome::Retry, FaultOutcome::Fixed),
        (inside, FaultOutcome::Retry, FaultOutcome::Fixed),
        (elsewhere, FaultOutcome::Fixed, FaultOutcome::Spurious),
        (ended, FaultOutcome::Retry, FaultOutcome::Fixed),
        // One sequence number serves all ranges: cautious, not wrong.
        (ended_elsewhere, FaultOutcome::Retry, FaultOutcome::Fixed),
    ];
    for (event, first, second) in cases {
        for failing in [false, true] {
            interleave(event, failing, first, second);
        }
    }
}

/// `failing`: the resolver reports an error after the event, which counts only if nothing changed.
fn interleave(event: Meanwhile, failing: bool, first: FaultOutcome, second: FaultOutcome) {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 16, Level::L1);
    let slots = Arc::clone(&guest.slots);
    let mmu = Arc::clone(&guest.mmu);
    let actor = Mutex::new(mmu.vm().actor().unwrap());
    let calls = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&calls);
    guest.host().set_resolver(Arc::new(move |slot, gfn, want| {
        if count.fetch_add(1, Ordering::Relaxed) == 0 {
            let mut actor = actor.lock().unwrap();
            let mut slots = slots.lock().unwrap();
            let mut set = |request| {
                let _ = mmu.set_slot(&mut slots, &mut actor, &request).expect("legal");
            };
            match event {
                Meanwhile::RootInvalidated => {
                    let _ = mmu.invalidate_roots(&mut actor).finish(&mut actor);
                }
                Meanwhile::SlotDeleted => set(request(0, BASE, 0, DATA, SlotFlags::empty())),
                Meanwhile::SlotMoved => set(request(0, 0, 16, DATA, SlotFlags::empty())),
                Meanwhile::OtherSlotCreated => set(request(1, 0, 16, DATA, SlotFlags::empty())),
                Meanwhile::Invalidation { first, end, ends: true } => {
                    let _ = mmu.unmap(&mut actor, range(first, end));
                }
                Meanwhile::Invalidation { first, end, ends: false } => {
                    // It goes on as long as the VM lives.
                    let begun = mmu.vm().notify().begin(actor.participant(), range(first, end));
                    std::mem::forget(begun);
                }
            }
            if failing {
                return Err(ResolveError::NoMemory);
            }
        }
        linear(Level::L1)(slot, gfn, want)
    }));
    let before = guest.check();
    let fault = PageFault::new(gpa(BASE + 5), PfErrorCode::WRITE);
    let result = guest.vcpu.fault(&fault);
    let open = matches!(event, Meanwhile::Invalidation { ends: false, .. });
    if failing && first != FaultOutcome::Retry {
        let error = FaultError::Resolve { gfn: fault.gfn(), source: ResolveError::NoMemory };
        assert_eq!(result, Err(error), "{event:?}");
    } else if failing && matches!(event, Meanwhile::RootInvalidated) {
        // The root does not matter to the host's answer.
        assert!(result.is_err(), "{event:?}");
    } else {
        assert_eq!(result, Ok(first), "{event:?} {failing}");
    }
    if first == FaultOutcome::Retry && !matches!(event, Meanwhile::RootInvalidated) {
        assert_eq!(guest.check(), before, "{event:?}: nothing was installed");
    }
    if open {
        // In the range faults retry without asking the host.
        let asked = calls.load(Ordering::Relaxed);
        if first == FaultOutcome::Retry {
            assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Retry));
            assert_eq!(calls.load(Ordering::Relaxed), asked);
        }
        guest.host().set_resolver(linear(Level::L1));
        return;
    }
    let _ = guest.vcpu.load_root().unwrap();
    assert_eq!(guest.vcpu.fault(&fault), Ok(second), "{event:?} {failing}");
    guest.host().set_resolver(linear(Level::L1));
    guest.check();
    guest.finish();
}

/// A slot that is being deleted is INVALID while its pages are taken away: faults on it retry,
/// faults elsewhere do not wait.
#[test]
fn faults_on_a_slot_that_is_being_deleted_retry() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 16, Level::L1);
    guest.slot(1, BASE + 64, 16, DATA + 64, SlotFlags::empty());
    guest.map([BASE, BASE + 64], Write, Level::L1);
    let mut other = TdpVcpu::new(&guest.mmu, 0).unwrap();
    let _ = other.load_root().unwrap();
    let other = Mutex::new(other);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let results = Arc::clone(&seen);
    guest.host().before_flush(Some(Arc::new(move |_: &common::Batch| {
        let mut vcpu = other.lock().unwrap();
        for gfn in [BASE, BASE + 1, BASE + 64, BASE + 65] {
            let fault = PageFault::new(gpa(gfn), PfErrorCode::WRITE);
            results.lock().unwrap().push(vcpu.fault(&fault));
        }
        let prefault = vcpu.prefault(range(BASE, BASE + 4), Access::WRITE).unwrap();
        assert_eq!(prefault.next, Gfn::new(BASE), "M15: it ends, and says that it got nowhere");
        assert_eq!(prefault.outcome, FaultOutcome::Retry);
    })));
    guest.slot(0, BASE, 0, DATA, SlotFlags::empty());
    guest.host().before_flush(None);
    let expected = [
        Ok(FaultOutcome::Retry),
        Ok(FaultOutcome::Retry),
        Ok(FaultOutcome::Spurious),
        Ok(FaultOutcome::Fixed),
    ];
    assert_eq!(*seen.lock().unwrap(), expected);
    assert_eq!(guest.check().leaves, [2, 0, 0]);
    guest.finish();
}

/// Rows 3.22, 6.14: the level is the largest that fault, policy, hardware, host and the alignment
/// of slot and page allow.
// INVARIANT[I12].
#[test]
fn the_page_size_is_the_largest_that_everything_allows() {
    let shift = |level: Level| level.pages();
    let mut cases = 0;
    for hardware in Level::ALL.into_iter().take(3) {
        for policy in Level::ALL.into_iter().take(3) {
            for host in Level::ALL {
                for fault in Level::ALL.into_iter().take(3) {
                    let caps = Capabilities {
                        huge_2m: hardware >= Level::L2,
                        huge_1g: hardware >= Level::L3,
                        ..Capabilities::npt()
                    };
                    let mut shape = Shape { frames: 16, ..Shape::new(caps) };
                    shape.options.max_level = policy;
                    let mut guest = Guest::<Npt>::with(shape);
                    guest.slot(0, BASE, 2 * G1, DATA, SlotFlags::empty());
                    guest.host().set_resolver(linear(host));
                    let gfn = BASE + M2 + 3;
                    guest.map([gfn], Write, fault);
                    let level = hardware.min(policy).min(host).min(fault);
                    let expected = Found {
                        pfn: DATA + M2 + 3,
                        level: level.number(),
                        writable: true,
                        executable: true,
                    };
                    assert_eq!(guest.found(gfn), Some(expected), "{hardware:?} {policy:?}");
                    assert_eq!(guest.check().pages(), shift(level));
                    guest.finish();
                    cases += 1;
                }
            }
        }
    }
    assert_eq!(cases, 135);
}

// INVARIANT[I12].
#[test]
fn a_slot_that_is_not_aligned_gets_the_pages_that_fit() {
    // Base, length, host frame, gfn: the level that fits.
    let cases = [
        (BASE, G1, DATA, BASE, 3),
        (BASE, G1 - 1, DATA, BASE, 2),
        (BASE, G1 - 1, DATA, BASE + G1 - 2, 1),
        (BASE + 1, G1, DATA + 1, BASE + 1, 1),
        (BASE + 1, G1, DATA + 1, BASE + M2, 2),
        (BASE, G1, DATA + 1, BASE, 1),
        (BASE, G1, DATA + M2, BASE, 2),
        (BASE + M2, 2 * G1, DATA + M2, BASE + M2, 2),
        (BASE + M2, 2 * G1, DATA + M2, BASE + G1, 3),
        (BASE + M2, 2 * G1, DATA + M2 + 256, BASE + G1, 1),
        (BASE, M2, DATA, BASE + 511, 2),
        (BASE + 1, M2, DATA + 1, BASE + 511, 1),
    ];
    for (base, pages, pfn, gfn, level) in cases {
        let mut guest = Guest::<Ept>::new(Capabilities::ept());
        guest.host().set_resolver(linear(Level::L3));
        guest.slot(0, base, pages, pfn, SlotFlags::empty());
        guest.map([gfn], Read, Level::L3);
        let found = guest.found(gfn).unwrap();
        let what = format!("{base:#x} {pages:#x} {pfn:#x} {gfn:#x}");
        assert_eq!((found.pfn, found.level), (pfn + gfn - base, level), "{what}");
        // A slot that logs writes has small pages only.
        guest.slot(1, base + 8 * G1, pages, pfn, SlotFlags::LOG_DIRTY);
        guest.map([gfn + 8 * G1], Read, Level::L3);
        let logged = guest.found(gfn + 8 * G1).unwrap();
        assert_eq!((logged.pfn, logged.level, logged.writable), (found.pfn, 1, false), "{what}");
        guest.finish();
    }
}

/// The host's block need not be aligned with the guest's: the level is lowered, not the page moved.
#[test]
fn a_host_page_that_is_not_congruent_is_mapped_small() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), G1, Level::L3);
    for (offset, level) in [(0, 3), (G1, 3), (M2, 2), (7 * M2, 2), (1, 1), (256, 1), (M2 + 8, 1)] {
        guest.host().set_resolver(Arc::new(move |slot, gfn, want| {
            let page = linear(Level::L3)(slot, gfn, want)?;
            Ok(HostPage { pfn: Pfn::new(page.pfn.get() + offset), ..page })
        }));
        guest.map([BASE + 33], Write, Level::L3);
        let found = guest.found(BASE + 33).unwrap();
        assert_eq!((found.pfn, found.level), (DATA + 33 + offset, level), "{offset:#x}");
        let _ = guest.unmap(GfnRange::ALL);
    }
    guest.finish();
}

/// Row 3.27: every gfn leads where it led, with the same rights and bits; no flush.
fn split<F: Modelled>(caps: Capabilities) {
    for dirty in [false, true] {
        let mut guest = Guest::<F>::with_memory(caps, G1, Level::L3);
        guest.map([BASE], if dirty { Write } else { Read }, Level::L3);
        if dirty {
            let _ = guest.touch(BASE + 5, Write).unwrap();
        }
        let (_, huge) = guest.entry(BASE);
        let before: Vec<Found> =
            (0..G1).step_by(61).map(|page| guest.found(BASE + page).unwrap()).collect();
        guest.host().take_batches();
        // The page is there: nothing but the size changes.
        assert_eq!(guest.shrink(BASE + 3 * M2 + 9), FaultOutcome::Spurious);
        assert_eq!(guest.stat(Counter::Splits), 2);
        assert_eq!(guest.check().leaves, [512, 511, 0]);
        for (index, page) in (0..G1).step_by(61).enumerate() {
            let after = guest.found(BASE + page).unwrap();
            let level = if page / M2 == 3 { 1 } else { 2 };
            assert_eq!(after, Found { level, ..before[index] }, "{page:#x}");
        }
        for page in [0, 3 * M2, 3 * M2 + 9, G1 - 1] {
            let (_, small) = guest.entry(BASE + page);
            let config = guest.config();
            assert_eq!(config.is_accessed(small), config.is_accessed(huge));
            assert_eq!(config.is_dirty(small), config.is_dirty(huge));
            assert_eq!(config.access(small), config.access(huge));
        }
        assert_eq!(guest.host().take_batches(), [], "both forms mean the same");
        guest.finish();
    }
}

#[test]
fn a_split_changes_no_translation() {
    for_each_format!(split);
}

/// Row 0.2.7: a huge page takes the place of a table; the flush names the table and is complete
/// before the table can be used again.
fn collapse<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, G1, Level::L3);
    guest.map([BASE + M2, BASE + 5 * M2], Write, Level::L2);
    let tables = guest.check().tables;
    let waiting = guest.mmu.vm().pool().frames_in_use();
    guest.host().take_batches();
    let at_flush = Arc::new(AtomicU64::new(0));
    let (seen, vm) = (Arc::clone(&at_flush), Arc::downgrade(guest.mmu.vm()));
    guest.host().before_flush(Some(Arc::new(move |_: &common::Batch| {
        let vm = vm.upgrade().unwrap();
        seen.store(vm.pool().frames_in_use(), Ordering::Relaxed);
    })));
    guest.map([BASE + 3 * M2], Write, Level::L3);
    guest.host().before_flush(None);
    assert_eq!(at_flush.load(Ordering::Relaxed), waiting, "not given back before the flush");
    let batches = guest.host().take_batches();
    assert_eq!(batches.len(), 1);
    assert!(batches[0].covers(range(BASE, BASE + G1)), "{batches:?}");
    assert_eq!(batches[0].tables.len(), 1, "the table of level 2");
    let count = guest.check();
    assert_eq!((count.leaves, count.tables), ([0, 0, 1], tables - 1));
    assert_eq!(guest.stat(Counter::Collapses), 1);
    for page in [0, 1, M2, 5 * M2, G1 - 1] {
        let found = guest.found(BASE + page).unwrap();
        assert_eq!((found.pfn, found.level), (DATA + page, 3));
    }
    guest.finish();
}

#[test]
fn a_huge_page_replaces_a_table_and_pays_for_it() {
    for_each_format!(collapse);
}

fn prefault<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::new(caps);
    guest.slot(0, BASE, 40, DATA, SlotFlags::empty());
    guest.slot(1, BASE + 40, 8, DATA + 40, SlotFlags::READ_ONLY);
    let ad = caps.accessed_dirty;
    let mut prefault = |from, to, access| guest.vcpu.prefault(range(from, to), access);
    let done = prefault(BASE, BASE + 10, Access::WRITE).unwrap();
    assert_eq!((done.next.get(), done.outcome), (BASE + 10, FaultOutcome::Fixed));
    let done = prefault(BASE, BASE + 10, Access::READ).unwrap();
    assert_eq!((done.next.get(), done.outcome), (BASE + 10, FaultOutcome::Spurious));
    // As far as it goes: the slot that follows is read-only, then there is none.
    let done = prefault(BASE + 5, BASE + 45, Access::WRITE).unwrap();
    let gfn = Gfn::new(BASE + 40);
    let read_only = FaultOutcome::Emulate(EmulateReason::ReadOnly { gfn, slot: 1 });
    assert_eq!((done.next, done.outcome), (gfn, read_only));
    let done = prefault(BASE + 40, BASE + 100, Access::READ).unwrap();
    let gfn = Gfn::new(BASE + 48);
    let no_slot = FaultOutcome::Emulate(EmulateReason::NoSlot { gfn, space: 0 });
    assert_eq!((done.next, done.outcome), (gfn, no_slot));
    let done = prefault(BASE + 9, BASE + 9, Access::READ).unwrap();
    assert_eq!(done.next.get(), BASE + 9, "an empty range");
    let done = prefault(BASE + 9, BASE + 3, Access::READ).unwrap();
    assert_eq!(done.next.get(), BASE + 9, "a reversed range");
    assert_eq!(guest.check().leaves, [48, 0, 0]);
    assert_eq!(guest.check().young, 0, "nobody accessed them");
    assert_eq!(guest.check().tracked, if ad { 0 } else { 48 });
    // The first access is noticed.
    for page in [0, 39, 47] {
        assert!(!guest.young(BASE + page));
        if !ad {
            assert!(guest.touch(BASE + page, Read).is_err(), "its rights are kept back");
            assert_eq!(guest.fault(BASE + page, Read, Level::L1), FaultOutcome::Fixed);
        }
        let _ = guest.touch(BASE + page, Read).unwrap();
        assert!(guest.young(BASE + page));
        assert!(!guest.young(BASE + page - 1));
    }
    // A prefault is not a use: what is mapped and young stays young.
    let _ = guest.vcpu.prefault(range(BASE, BASE + 1), Access::READ).unwrap();
    assert!(guest.young(BASE));
    guest.check();
    guest.finish();
}

#[test]
fn prefaulted_pages_are_mapped_and_not_young() {
    for_each_format!(prefault);
}

#[test]
fn a_prefault_maps_huge_pages_and_reports_errors_by_progress() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 4 * M2, Level::L2);
    let done = guest.vcpu.prefault(range(BASE + 5, BASE + 2 * M2), Access::WRITE).unwrap();
    assert_eq!(done.next.get(), BASE + 2 * M2);
    assert_eq!(guest.check().leaves, [0, 2, 0]);
    let failing = |slot: &_, gfn: Gfn, want| match gfn.get() {
        g if g == BASE + 3 * M2 => Err(ResolveError::NeedsIo),
        _ => linear(Level::L1)(slot, gfn, want),
    };
    guest.host().set_resolver(Arc::new(failing));
    let end = BASE + 4 * M2;
    let done = guest.vcpu.prefault(range(BASE + 3 * M2 - 4, end), Access::READ).unwrap();
    assert_eq!(done.next.get(), BASE + 3 * M2, "what was done is reported");
    let error = guest.vcpu.prefault(range(BASE + 3 * M2, end), Access::READ).unwrap_err();
    let gfn = Gfn::new(BASE + 3 * M2);
    assert_eq!(error, FaultError::Resolve { gfn, source: ResolveError::NeedsIo });
    guest.finish();
}

/// Rows 1.7, 3.21, 5.8: without hardware A/D an aged page has no rights; the fault that follows
/// restores them without lock and without asking the host. W comes back with a write only.
#[test]
fn an_access_tracked_page_is_restored_by_the_fast_path() {
    fn run<F: Modelled>(caps: Capabilities, level: Level) {
        let mut guest = Guest::<F>::with_memory(caps, G1, level);
        guest.map([BASE], Write, level);
        let asked = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&asked);
        guest.host().set_resolver(Arc::new(move |slot, gfn, want| {
            count.fetch_add(1, Ordering::Relaxed);
            linear(Level::L3)(slot, gfn, want)
        }));
        let pages = level.pages();
        for (kind, writable) in [(Read, false), (Write, true), (Fetch, false), (Write, true)] {
            let report = guest.age(GfnRange::ALL, AgeMode::Clear);
            assert_eq!((report.mapped, report.young), (pages, pages));
            assert_eq!(guest.check().tracked, 1);
            assert!(guest.touch(BASE, kind).is_err());
            // Somebody holds the lock: the fast path takes none.
            let mut holder = guest.mmu.vm().actor().unwrap();
            let vm = Arc::clone(guest.mmu.vm());
            let held = vm.lock().exclusive(holder.participant());
            let fast = guest.stat(Counter::PfFast);
            let fault = PageFault::new(gpa(BASE), code(kind, false));
            assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Fixed));
            assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Spurious));
            assert_eq!(guest.stat(Counter::PfFast), fast + 1);
            drop(held);
            assert!(guest.touch(BASE, kind).is_ok() && guest.young(BASE));
            let found = guest.found(BASE).unwrap();
            assert_eq!((found.pfn, found.level), (DATA, level.number()));
            assert_eq!(found.writable, writable, "{kind:?}");
            let (_, spte) = guest.entry(BASE);
            assert!(guest.config().is_dirty(spte), "what was written stays dirty");
        }
        assert_eq!(asked.load(Ordering::Relaxed), 0);
        guest.check();
        guest.finish();
    }
    for level in [Level::L1, Level::L2, Level::L3] {
        run::<Ept>(common::no_ad(Capabilities::ept()), level);
        run::<Npt>(common::no_ad(Capabilities::npt()), level);
        run::<Legacy>(common::no_ad(common::five(Capabilities::legacy())), level);
    }
}

/// M7: whatever a page is like, a fault on it is settled in a few exits.
#[test]
fn no_access_needs_more_than_four_exits() {
    fn run<F: Modelled>(caps: Capabilities) {
        let mut random = Random::new(u64::from(caps.levels));
        let mut guest = Guest::<F>::new(caps);
        guest.host().set_resolver(linear(Level::L3));
        guest.slot(0, BASE, G1, DATA, SlotFlags::empty());
        guest.slot(1, BASE + G1, G1, DATA + G1, SlotFlags::LOG_DIRTY);
        guest.slot(2, BASE + 2 * G1, G1, DATA + 2 * G1, SlotFlags::READ_ONLY);
        for _ in 0..3000 {
            let gfn = BASE + random.below(3) * G1 + random.below(2) * M2 + random.below(4);
            match random.below(6) {
                0 => {
                    let _ = guest.age(range(gfn, gfn + 1), AgeMode::Clear);
                }
                1 => {
                    let _ = guest.unmap(range(gfn, gfn + 1));
                }
                _ => {}
            }
            let kind = [Read, Write, Fetch][random.below(3) as usize];
            let level = Level::ALL[random.below(3) as usize];
            let mut exits = 0;
            while let Err(fault) = guest.touch(gfn, kind) {
                exits += 1;
                assert!(exits <= 4, "{gfn:#x} {kind:?}: {fault:?}");
                let present = fault.kind == mmu_model::FaultKind::Protection;
                let fault = PageFault::new(gpa(gfn), code(kind, present)).at_most(level);
                if let FaultOutcome::Emulate(reason) = guest.vcpu.fault(&fault).unwrap() {
                    let gfn = fault.gfn();
                    assert_eq!(reason, EmulateReason::ReadOnly { gfn, slot: 2 });
                    break;
                }
            }
        }
        guest.check();
        guest.finish();
    }
    for_each_format!(run);
}

/// PAE: three levels, four entries in the root, nothing above 4 GiB.
#[test]
fn pae_tables_map_the_first_four_gigabytes() {
    let mut guest = Guest::<Legacy>::new(Capabilities::pae());
    guest.host().set_resolver(linear(Level::L3));
    guest.slot(0, 0, 4 * G1, DATA, SlotFlags::empty());
    assert_eq!(guest.config().max_gfn_exclusive().get(), 4 * G1);
    for gfn in [0, 4 * G1 - 1, G1 + 3, 2 * G1 + M2] {
        guest.map([gfn], Write, Level::L3);
        let found = guest.found(gfn).unwrap();
        assert_eq!((found.pfn, found.level), (DATA + gfn, 2));
        assert_eq!(guest.shrink(gfn), FaultOutcome::Spurious);
        let found = guest.found(gfn).unwrap();
        assert_eq!((found.pfn, found.level), (DATA + gfn, 1));
        let _ = guest.touch(gfn, Write).unwrap();
    }
    let error = guest.try_fault(4 * G1, Read, Level::L1).unwrap_err();
    let max_gfn = Gfn::new(4 * G1);
    assert_eq!(error, FaultError::BeyondPhysical { gpa: gpa(4 * G1), max_gfn });
    assert_eq!(guest.check().leaves, [4 * 512, 0, 0]);
    guest.finish();
}

/// Row 1.26: table links carry the encryption bit; the frame they lead to does not.
#[test]
fn encrypted_tables_are_walked_by_their_frames() {
    let bit = 1 << 47;
    let caps = Capabilities { memory_encryption: Some((bit, bit)), ..Capabilities::npt() };
    let mut guest = Guest::<Npt>::with_memory(caps, G1, Level::L1);
    guest.map((0..M2).step_by(5).map(|page| BASE + page), Write, Level::L1);
    let (_, spte) = guest.entry(BASE + 5);
    assert_eq!(guest.config().pfn(spte), Pfn::new(DATA + 5));
    assert_eq!(spte.raw() & bit, bit);
    let report = guest.age(range(BASE, BASE + M2), AgeMode::Clear);
    assert_eq!((report.mapped, report.young), (103, 103));
    guest.host().set_resolver(linear(Level::L2));
    let fault = PageFault::new(gpa(BASE + 1), PfErrorCode::WRITE);
    assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Fixed), "a huge page");
    let fault = fault.at_most(Level::L1);
    assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Spurious), "split again");
    let count = guest.mmu.check(&mut guest.actor).unwrap();
    assert_eq!(count.leaves, [512, 0, 0]);
    assert_eq!(guest.unmap(range(BASE, BASE + 9)).leaves, [9, 0, 0]);
    guest.finish();
}

/// I11: a huge page reaches beyond the faulting gfn; if any of it is being taken away it must not
/// be installed, or the invalidation would end with its range mapped.
#[test]
fn a_huge_page_that_reaches_into_an_invalidation_is_not_installed() {
    for outside in [range(BASE + M2, BASE + 2 * M2), range(0, BASE), range(0, 0)] {
        huge_beside(outside, FaultOutcome::Fixed);
    }
    for inside in [range(BASE + 100, BASE + 101), range(0, BASE + 1), range(BASE + 511, BASE + G1)]
    {
        huge_beside(inside, FaultOutcome::Retry);
    }
}

/// A fault on page 5 of a 2 MiB page while `taken` is being invalidated.
fn huge_beside(taken: GfnRange, expected: FaultOutcome) {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 2 * M2, Level::L2);
    let mut other = guest.mmu.vm().actor().unwrap();
    let vm = Arc::clone(guest.mmu.vm());
    let begun = vm.notify().begin(other.participant(), taken);
    let _ = guest.mmu.unmap(&mut guest.actor, taken);
    let fault = PageFault::new(gpa(BASE + 5), PfErrorCode::WRITE);
    assert_eq!(guest.vcpu.fault(&fault), Ok(expected), "{taken:?}");
    for gfn in [BASE, BASE + 100, BASE + 511] {
        let reaches = guest.found(gfn).is_some() && taken.contains(Gfn::new(gfn));
        assert!(!reaches, "{gfn:#x} is mapped while {taken:?} is taken away");
    }
    drop(begun);
    drop((other, vm));
    guest.check();
    guest.finish();
}
