//! Accesses to where the guest has no memory (KVM rows 1.34 to 1.41, 3.20): the entries that make
//! them exit at once, what makes those stale, and the count that starts again.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{
    BASE, DATA, Guest, M2, Modelled, Shape, StopOnDrop, gpa, linear, range, reported, request,
};
use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, Gva, Level};
use mmu_core::dead::DeadReason;
use mmu_core::fault::{EmulateReason, FaultError, FaultOutcome, PageFault};
use mmu_core::slot::{SlotError, SlotFlags, SlotRequest};
use mmu_core::spte::{Capabilities, Ept, Legacy, MMIO_GEN_BITS, Npt, SpteFormat};
use mmu_core::stats::Counter;
use mmu_model::{AccessKind, FaultKind, PhysMem, Walker};
use tdp_mmu::TdpVcpu;

use AccessKind::{Read, Write};

const NONE: SlotFlags = SlotFlags::empty();
/// A gfn without memory in every test.
const DEVICE: u64 = BASE + 8 * M2 + 5;

fn no_slot(gfn: u64, space: u16) -> FaultOutcome {
    FaultOutcome::Emulate(EmulateReason::NoSlot { gfn: Gfn::new(gfn), space })
}

fn kind_of<F: Modelled>(guest: &mut Guest<F>, gfn: u64) -> FaultKind {
    guest.touch(gfn, Read).expect_err("nothing is mapped").kind
}

/// Entries stand for nothing in formats without a reserved address bit.
fn has_entries<F: SpteFormat>(caps: &Capabilities) -> bool {
    F::NAME == Ept::NAME || caps.max_phys_bits < 52
}

fn first_access<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, 64, Level::L1);
    let made = u64::from(has_entries::<F>(&caps));
    assert_eq!(guest.config().mmio_enabled(), made != 0);
    assert_eq!(kind_of(&mut guest, DEVICE), FaultKind::NotPresent);
    assert_eq!(guest.access(DEVICE), Ok(no_slot(DEVICE, 0)));
    let expected = if made != 0 { FaultKind::Reserved } else { FaultKind::NotPresent };
    assert_eq!(kind_of(&mut guest, DEVICE), expected, "as hardware sees it");
    assert_eq!(kind_of(&mut guest, DEVICE + 1), FaultKind::NotPresent, "its neighbour");
    assert_eq!(guest.check().mmio, made);
    assert_eq!(guest.stat(Counter::PfMmioMade), made);

    // The second access takes no frame, looks no slot up and makes nothing.
    guest.vcpu.forget_mmio();
    let before = (guest.host().provides(), guest.stat(Counter::SlotLookups));
    for _ in 0..3 {
        assert_eq!(guest.access(DEVICE), Ok(no_slot(DEVICE, 0)));
    }
    let lookups = guest.stat(Counter::SlotLookups) - before.1;
    assert_eq!((guest.host().provides(), lookups == 0), (before.0, made != 0));
    assert_eq!(guest.stat(Counter::PfMmioMade), made);
    assert_eq!(guest.stat(Counter::PfEmulate), 4);
    let (level, spte) = guest.entry(DEVICE);
    let stored = guest.config().mmio_gfn(spte);
    assert_eq!(stored, (made != 0).then_some(Gfn::new(DEVICE)), "{level}");
    guest.finish();
}

#[test]
fn a_second_access_to_no_memory_meets_a_reserved_bit_and_needs_no_slot() {
    for_each_format!(first_access);
}

fn slot_over_entries<F: Modelled>(caps: Capabilities) {
    let mut guest = Guest::<F>::with_memory(caps, 64, Level::L1);
    guest.map([BASE], Write, Level::L1);
    let block = BASE + 8 * M2;
    let made = if has_entries::<F>(&caps) { 5 } else { 0 };
    for gfn in block..block + 5 {
        assert_eq!(guest.access(gfn), Ok(no_slot(gfn, 0)));
    }
    assert_eq!(guest.check().mmio, made);
    // Unmapping takes pages; what maps nothing stays, exactly counted.
    let _ = guest.unmap(range(0, u64::MAX));
    assert_eq!(guest.check().mmio, made);

    // One entry goes at a time, or all with their table.
    guest.slot(1, block, M2, DATA + 8 * M2, NONE);
    assert_eq!(guest.check().mmio, made, "stale, and harmless");
    assert_eq!(guest.access(block), Ok(FaultOutcome::Fixed));
    assert_eq!(guest.check().mmio, made.saturating_sub(1));
    assert_eq!(guest.found(block).map(|found| found.pfn), Some(DATA + 8 * M2));
    guest.host().set_resolver(linear(Level::L2));
    if guest.config().max_leaf_level() >= Level::L2 {
        assert_eq!(guest.fault(block + 1, Write, Level::L2), FaultOutcome::Fixed);
        assert_eq!(guest.check().mmio, 0);
        assert_eq!(guest.found(block + 4).map(|found| found.level), Some(2));
    }

    // Gone again: nothing of it is left, and the next access makes an entry.
    let _ = guest.set_slot(&request(1, block, 0, 0, NONE)).expect("a legal request");
    assert!(guest.found(block).is_none());
    assert_eq!(guest.access(block + 2), Ok(no_slot(block + 2, 0)));
    let _ = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
    let _ = guest.root_register();
    assert_eq!(guest.check().mmio, 0);
    guest.finish();
}

#[test]
fn a_slot_over_mmio_entries_replaces_them_one_by_one_or_with_their_table() {
    for_each_format!(slot_over_entries);
}

/// Row 1.37: another slot changes, far away; the entry is of another generation and made anew.
#[test]
fn a_stale_entry_is_rebuilt_by_the_next_access() {
    let mut guest = Guest::<Npt>::with_memory(Capabilities::npt(), 64, Level::L1);
    assert_eq!(guest.access(DEVICE), Ok(no_slot(DEVICE, 0)));
    let generation = |guest: &mut Guest<Npt>| {
        let (_, spte) = guest.entry(DEVICE);
        guest.config().mmio_generation(spte).expect("an MMIO entry")
    };
    let first = generation(&mut guest);
    guest.slot(3, BASE + 64 * M2, 1, DATA, NONE);
    assert_eq!(generation(&mut guest), first, "nobody looked for it");
    assert_eq!(guest.vcpu.mmio_info(), None);
    assert_eq!(guest.access(DEVICE), Ok(no_slot(DEVICE, 0)));
    assert_ne!(generation(&mut guest), first);
    assert_eq!((guest.check().mmio, guest.stat(Counter::PfMmioMade)), (1, 2));
    guest.finish();
}

/// Rows 1.37, B26: while an update is in progress nothing is cached and nothing cached is believed.
#[test]
fn an_update_in_progress_defeats_entries_and_caches_nothing() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    guest.map([BASE], Write, Level::L1);
    assert_eq!(guest.access(DEVICE), Ok(no_slot(DEVICE, 0)));
    let mut other = TdpVcpu::new(&guest.mmu, 0).unwrap();
    other.load_root().unwrap();
    let device = PageFault::from_ept_misconfiguration(gpa(DEVICE));
    assert_eq!(other.fault(&device), Ok(no_slot(DEVICE, 0)));
    assert!(other.mmio_info().is_some());
    let asked = Arc::new(AtomicU64::new(0));
    let other = Arc::new(Mutex::new(other));
    let (count, vcpu) = (Arc::clone(&asked), Arc::clone(&other));
    // Called by the flush of the deletion: the slot is INVALID by now.
    guest.host().before_flush(Some(Arc::new(move |_| {
        let mut vcpu = vcpu.lock().unwrap();
        count.fetch_add(1, Ordering::Relaxed);
        assert_eq!(vcpu.mmio_info(), None);
        assert_eq!(vcpu.fault(&device), Ok(no_slot(DEVICE, 0)));
        let next = PageFault::new(gpa(DEVICE + 1), PfErrorCode::empty());
        assert_eq!(vcpu.fault(&next), Ok(no_slot(DEVICE + 1, 0)));
        assert_eq!(vcpu.mmio_info(), None, "not remembered either");
        let dying = PageFault::new(gpa(BASE + 1), PfErrorCode::empty());
        assert_eq!(vcpu.fault(&dying), Ok(FaultOutcome::Retry));
    })));
    let _ = guest.set_slot(&request(0, BASE, 0, 0, NONE)).expect("a legal request");
    guest.host().before_flush(None);
    drop(other);
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert_eq!((guest.check().mmio, guest.stat(Counter::PfMmioMade)), (1, 1));
    assert_eq!(kind_of(&mut guest, DEVICE + 1), FaultKind::NotPresent);
    guest.finish();
}

/// Row 1.37: 2^18 updates make the count start again. An entry of the first update would hold at
/// the one that has its number.
#[test]
fn when_the_generation_wraps_every_tree_goes_and_no_entry_is_taken_for_a_new_one() {
    for spaces in [1, 2, 3] {
        let shape = Shape { spaces, ..Shape::new(Capabilities::ept()) };
        // The number that comes after the wrap, as the old count had it.
        let step = u64::from(spaces);
        let wrap = (1u64 << MMIO_GEN_BITS).next_multiple_of(step);
        let start = wrap - 3 * step;
        let mut guest = Guest::<Ept>::with(Shape { generation: start, ..shape });
        let generation = |guest: &Guest<Ept>| guest.mmu.vm().slots().generation();
        guest.slot(0, BASE, 64, DATA, NONE);
        guest.map([BASE], Write, Level::L1);
        // As made a whole count ago: it has the number that the wrap leads to.
        let old = guest.config().mmio(Gfn::new(DEVICE), Access::ALL, wrap).expect("in use");
        assert_eq!(guest.access(DEVICE), Ok(no_slot(DEVICE, 0)));
        let (_, made) = guest.entry(DEVICE);
        let walk = guest.mmu.lookup(&mut guest.actor, 0, Gfn::new(DEVICE));
        let place = walk[walk.len() - 2].1.pfn().address().get() + (DEVICE & 511) * 8;
        assert_eq!(guest.host().cas(place, made.raw(), old.raw()), Some(Ok(())));

        let root = guest.root_register();
        guest.slot(1, BASE + 64 * M2, 1, DATA, NONE);
        assert_eq!((generation(&guest), guest.root_register()), (wrap - step, root));
        guest.map([BASE], Write, Level::L1);

        // Requests that fail, or mean nothing, drop nothing.
        let beyond = guest.set_slot(&request(2, BASE, 1, DATA, NONE));
        assert!(matches!(beyond, Err(SlotError::Overlap { .. })), "{beyond:?}");
        let _ = guest.set_slot(&request(0, BASE, 64, DATA, NONE)).expect("nothing changes");
        assert!(guest.vcpu.root_is_current());

        guest.slot(2, DEVICE, 1, DATA + 100, NONE);
        assert_eq!(generation(&guest), wrap);
        assert!(!guest.vcpu.root_is_current());
        guest.vcpu.load_root().unwrap();
        assert!(guest.found(BASE).is_none(), "everything is gone");
        assert_eq!(guest.check().mmio, 0);
        assert_eq!(guest.access(DEVICE), Ok(FaultOutcome::Fixed), "memory, not a device");
        guest.map([BASE], Write, Level::L1);
        guest.slot(3, BASE + 80 * M2, 1, DATA, NONE);
        assert!(guest.vcpu.root_is_current(), "once is enough");
        guest.finish();
    }
}

/// A fault between the drop of the trees and the publication makes an entry of the old count.
#[test]
fn an_entry_made_while_the_generation_wraps_is_dropped_too() {
    let wrap = 1u64 << MMIO_GEN_BITS;
    let shape = Shape { generation: wrap - 1, ..Shape::new(Capabilities::ept()) };
    let mut guest = Guest::<Ept>::with(shape);
    let (mmu, slots) = (Arc::clone(&guest.mmu), Arc::clone(&guest.slots));
    let mut vcpu = TdpVcpu::new(&mmu, 0).unwrap();
    vcpu.load_root().unwrap();
    let fault = PageFault::new(gpa(DEVICE), PfErrorCode::empty());
    let new = request(0, BASE, 64, DATA, NONE);
    mmu.around_update(&mut slots.lock().unwrap(), &mut guest.actor, |writer, actor| {
        assert_eq!(vcpu.fault(&fault), Ok(FaultOutcome::Retry), "the old tree is out of use");
        vcpu.load_root().unwrap();
        assert_eq!(vcpu.fault(&fault), Ok(no_slot(DEVICE, 0)));
        assert_eq!(mmu.check(actor).unwrap().mmio, 1);
        let change = mmu.vm().set_slot(writer, actor, &new, |_, _| unreachable!("a new slot"));
        let _ = change.expect("a legal slot");
    });
    assert!(!vcpu.root_is_current());
    vcpu.load_root().unwrap();
    guest.vcpu.load_root().unwrap();
    assert_eq!(guest.mmu.check(&mut guest.actor).unwrap().mmio, 0);
    drop(vcpu);
    drop(slots);
    drop(mmu);
    guest.finish();
}

/// Rows 1.40, B13: what a vCPU remembers is stamped with the slots of the space it is in.
#[test]
fn what_a_vcpu_remembers_is_of_the_space_that_it_uses() {
    let shape = Shape { spaces: 2, ..Shape::new(Capabilities::ept()) };
    let mut guest = Guest::<Ept>::with(shape);
    guest.slot(0, BASE, 64, DATA, NONE);
    guest.vcpu.switch_space(1).unwrap();
    let device = PageFault::new(gpa(BASE + 3), PfErrorCode::empty());
    let at = Gva::new(0xffff_8000_0000_3123);
    assert_eq!(guest.vcpu.fault(&device), Ok(no_slot(BASE + 3, 1)), "memory of the other space");
    guest.vcpu.name_mmio(at);
    let info = guest.vcpu.mmio_at(Gva::new(at.get() | 0xfff)).expect("the same page");
    assert_eq!((info.gfn, info.access, info.gva), (Gfn::new(BASE + 3), Access::ALL, Some(at)));
    assert_eq!(guest.vcpu.mmio_at(Gva::new(at.get() + 4096)), None);

    // The same vCPU in the other space, where the page is memory.
    guest.vcpu.switch_space(0).unwrap();
    assert_eq!((guest.vcpu.mmio_info(), guest.vcpu.mmio_at(at)), (None, None));
    let misconfigured = PageFault::from_ept_misconfiguration(gpa(BASE + 3));
    assert_eq!(guest.vcpu.fault(&misconfigured), Ok(FaultOutcome::Fixed));

    // Back, and then a slot of this space comes.
    guest.vcpu.switch_space(1).unwrap();
    assert_eq!(guest.vcpu.mmio_info(), Some(info));
    assert_eq!(guest.vcpu.fault(&misconfigured), Ok(no_slot(BASE + 3, 1)));
    let slot = SlotRequest { as_id: 1, ..request(0, BASE, 64, DATA + 64, NONE) };
    let _ = guest.set_slot(&slot).expect("a legal slot");
    assert_eq!(guest.vcpu.mmio_info(), None);
    assert_eq!(guest.vcpu.fault(&misconfigured), Ok(FaultOutcome::Fixed));

    // On demand.
    let device = PageFault::new(gpa(DEVICE), PfErrorCode::empty());
    assert_eq!(guest.vcpu.fault(&device), Ok(no_slot(DEVICE, 1)));
    assert!(guest.vcpu.mmio_info().is_some());
    guest.vcpu.forget_mmio();
    assert_eq!(guest.vcpu.mmio_info(), None);
    guest.check();
    guest.finish();
}

#[test]
fn nothing_is_cached_for_prefetches_private_accesses_read_only_slots_and_impossible_gfns() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    let one = range(DEVICE, DEVICE + 1);
    let done = guest.vcpu.prefault(one, Access::READ).expect("no error");
    assert_eq!((done.next, done.outcome), (one.start, no_slot(DEVICE, 0)));
    let private = PageFault::new(gpa(DEVICE), PfErrorCode::empty()).private();
    assert_eq!(guest.vcpu.fault(&private), Ok(no_slot(DEVICE, 0)));
    guest.slot(1, BASE + 8 * M2, 4, DATA, SlotFlags::READ_ONLY);
    let gfn = Gfn::new(BASE + 8 * M2);
    let denied = FaultOutcome::Emulate(EmulateReason::ReadOnly { gfn, slot: 1 });
    assert_eq!(guest.fault(gfn.get(), Write, Level::L1), denied);
    let max_gfn = guest.config().max_gfn_exclusive();
    for gfn in [max_gfn.get(), max_gfn.get() + 1, (1 << 52) - 1] {
        let fault = PageFault::from_ept_misconfiguration(gpa(gfn));
        let error = FaultError::BeyondPhysical { gpa: gpa(gfn), max_gfn };
        assert_eq!(guest.vcpu.fault(&fault), Err(error));
    }
    assert_eq!(guest.vcpu.mmio_info(), None);
    assert_eq!((guest.check().mmio, guest.stat(Counter::PfMmioMade)), (0, 0));
    guest.finish();
}

#[test]
fn without_caching_every_access_goes_the_long_way() {
    let caps = Capabilities { mmio_caching: false, ..Capabilities::ept() };
    let mut guest = Guest::<Ept>::with_memory(caps, 64, Level::L1);
    for _ in 0..3 {
        assert_eq!(kind_of(&mut guest, DEVICE), FaultKind::NotPresent);
        assert_eq!(guest.access(DEVICE), Ok(no_slot(DEVICE, 0)));
    }
    assert_eq!((guest.check().mmio, guest.stat(Counter::PfMmioMade)), (0, 0));
    assert!(guest.vcpu.mmio_info().is_some(), "which needs no entry");
    guest.finish();
}

/// An MMIO entry stands where its gfn says; any other is corruption.
#[test]
fn an_mmio_entry_for_another_gfn_is_corruption() {
    let mut guest = Guest::<Legacy>::with_memory(Capabilities::legacy(), 64, Level::L1);
    assert_eq!(guest.access(DEVICE), Ok(no_slot(DEVICE, 0)));
    let (_, made) = guest.entry(DEVICE);
    let walk = guest.mmu.lookup(&mut guest.actor, 0, Gfn::new(DEVICE));
    let place = walk[walk.len() - 2].1.pfn().address().get() + (DEVICE & 511) * 8;
    let generation = guest.config().mmio_generation(made).expect("an MMIO entry");
    let bad = guest.config().mmio(Gfn::new(BASE), Access::ALL, generation).expect("in use");
    assert_eq!(guest.host().cas(place, made.raw(), bad.raw()), Some(Ok(())));
    guest.vcpu.forget_mmio();
    let error = FaultError::ReservedBit { gpa: gpa(DEVICE), level: Level::L1, spte: bad.raw() };
    assert_eq!(guest.access(DEVICE), Err(error));
    assert_eq!(guest.mmu.vm().is_dead(), Some(DeadReason::CorruptEntry));
    guest.finish();
}

/// Without frames the access is an error as any other is, and nothing is half done.
#[test]
fn an_entry_that_finds_no_table_leaves_everything_as_it_was() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    guest.map([BASE], Write, Level::L1);
    let before = guest.check();
    let provided = guest.host().provides();
    guest.host().refuse(provided, u64::MAX);
    let mut refused = 0;
    for n in 0..64 {
        // Far apart, so that each needs tables.
        match guest.access(DEVICE + n * 512 * M2) {
            Ok(outcome) => assert_eq!(outcome, no_slot(DEVICE + n * 512 * M2, 0)),
            Err(FaultError::OutOfFrames(_)) => refused += 1,
            Err(error) => panic!("{error}"),
        }
        guest.check();
    }
    assert!(refused > 32, "{refused}");
    guest.host().refuse(u64::MAX, u64::MAX);
    assert!(guest.check().mmio < 32 && before.mmio == 0);
    guest.finish();
}

/// A slot comes and goes over the gfns that two vCPUs access all the time. Memory is seen only
/// while there is a slot, a device only while there is none, and counts stay exact.
fn threads<F: Modelled>(caps: Capabilities) {
    const PAGES: u64 = 8;
    // Near the wrap, so that it happens.
    let generation = (1 << MMIO_GEN_BITS) - 60;
    let mut guest = Guest::<F>::with(Shape { generation, ..Shape::new(caps) });
    guest.host().record(false);
    // Even: a slot is there for sure (2 mod 4), or none is (0 mod 4); odd: neither is sure.
    let phase = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let (memory, device) = (AtomicU64::new(0), AtomicU64::new(0));
    let (walker, mmu) = (Walker::new(&guest.format), Arc::clone(&guest.mmu));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let mut vcpu = TdpVcpu::new(&guest.mmu, 0).expect("room");
            let (walker, phase, stop) = (&walker, &phase, &stop);
            let (mmu, memory, device) = (&mmu, &memory, &device);
            let _ = scope.spawn(move || {
                let mut gfn = BASE;
                while !stop.load(Ordering::Acquire) {
                    gfn = BASE + (gfn + 1) % PAGES;
                    let before = phase.load(Ordering::SeqCst);
                    let root = vcpu.load_root().expect("a root").address().get();
                    let access = mmu_model::Access::user(Read);
                    let host = mmu.vm().host();
                    let seen = walker.translate(&common::Peek(host), root, gfn << 12, access);
                    let outcome = match seen {
                        Ok(_) => FaultOutcome::Fixed,
                        Err(fault) => vcpu.fault(&reported(gfn, &fault)).expect("no error"),
                    };
                    if !vcpu.root_is_current() || phase.load(Ordering::SeqCst) != before {
                        continue;
                    }
                    match (outcome, before % 4) {
                        (FaultOutcome::Emulate(_), 0) => device.fetch_add(1, Ordering::Relaxed),
                        (FaultOutcome::Fixed | FaultOutcome::Spurious, 2) => {
                            memory.fetch_add(1, Ordering::Relaxed)
                        }
                        (FaultOutcome::Retry, _) | (_, 1 | 3) => continue,
                        other => panic!("gfn {gfn:#x}: {other:?}"),
                    };
                }
            });
        }
        let _stop = StopOnDrop(&stop);
        let end = Instant::now() + Duration::from_millis(400);
        while Instant::now() < end || phase.load(Ordering::Relaxed) < 200 {
            for pages in [PAGES, 0] {
                phase.fetch_add(1, Ordering::SeqCst);
                guest.slot(0, BASE, pages, DATA, NONE);
                phase.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    });
    assert!(memory.load(Ordering::Relaxed) > 100 && device.load(Ordering::Relaxed) > 100);
    assert!(guest.mmu.vm().slots().generation() > 1 << MMIO_GEN_BITS, "it wrapped");
    drop(mmu);
    guest.vcpu.load_root().unwrap();
    let _ = guest.mmu.check(&mut guest.actor).expect("well-formed trees");
    guest.finish();
}

#[test]
fn memory_and_devices_that_change_places_are_never_taken_for_each_other() {
    threads::<Ept>(Capabilities::ept());
    threads::<Npt>(Capabilities::npt());
}
