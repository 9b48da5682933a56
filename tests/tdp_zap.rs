//! Taking pages away: ranges, all at once, and what faults meanwhile (KVM rows 3.1 to 3.6, 3.33 to
//! 3.36).

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{BASE, Batch, DATA, G1, Guest, M2, Modelled, Shape, gpa, linear, range, request};
use mmu_core::access::PfErrorCode;
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::flush::FlushScope;
use mmu_core::slot::{SlotChange, SlotFlags, SlotRequest};
use mmu_core::spte::{Capabilities, Ept, Npt};
use mmu_core::stats::Counter;
use mmu_core::traits::AgeMode;
use mmu_model::{AccessKind, Random};
use tdp_mmu::root::{MAX_ROOTS, RootError, ZapProgress};
use tdp_mmu::{CollapseReport, SlotZap, TdpOptions, TdpVcpu, ZapReport};

use AccessKind::{Read, Write};

/// What is there goes, what is not stays; the flush covers exactly what went.
fn ranges<F: Modelled>(caps: Capabilities) {
    let mut random = Random::new(9);
    for _ in 0..12 {
        let mut guest = Guest::<F>::with_memory(caps, 4 * M2, Level::L1);
        let mut mapped: Vec<u64> = (0..300).map(|_| BASE + random.below(4 * M2)).collect();
        mapped.sort_unstable();
        mapped.dedup();
        guest.map(mapped.iter().copied(), Write, Level::L1);
        let start = BASE + random.below(4 * M2);
        let end = start + random.below(BASE + 4 * M2 - start + 1);
        let inside = mapped.iter().filter(|gfn| (start..end).contains(*gfn)).count() as u64;
        guest.host().take_batches();
        let report = guest.unmap(range(start, end));
        assert_eq!((report.leaves, report.pages()), ([inside, 0, 0], inside));
        for &gfn in &mapped {
            assert_eq!(guest.found(gfn).is_some(), !(start..end).contains(&gfn), "{gfn:#x}");
        }
        let batches = guest.host().take_batches();
        assert_eq!(batches.len(), usize::from(inside > 0));
        for batch in &batches {
            let gone = mapped.iter().filter(|gfn| (start..end).contains(*gfn));
            assert!(gone.into_iter().all(|gfn| batch.covers(range(*gfn, gfn + 1))));
            assert!(batch.ranges.iter().all(|r| range(start, end).covers(*r)), "{batch:?}");
            assert!(batch.tables.is_empty(), "tables stay");
        }
        // Again: nothing is there, nothing is flushed.
        assert_eq!(guest.unmap(range(start, end)), ZapReport::default());
        assert_eq!(guest.host().take_batches(), []);
        guest.check();
        guest.finish();
    }
}

#[test]
fn an_unmap_takes_its_range_and_nothing_else() {
    for_each_format!(ranges);
}

#[test]
fn a_range_that_touches_a_huge_page_takes_the_whole_page() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 2 * G1, Level::L3);
    let gfns = [BASE, BASE + M2, BASE + 2 * M2, BASE + 3 * M2];
    guest.map(gfns, Write, Level::L2);
    guest.map([BASE + G1], Write, Level::L3);
    guest.host().take_batches();
    let report = guest.unmap(range(BASE + M2 + 100, BASE + 2 * M2 + 1));
    assert_eq!((report.leaves, report.pages()), ([0, 2, 0], 2 * M2));
    let batches = guest.host().take_batches();
    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0].ranges, [range(BASE + M2, BASE + 3 * M2)], "whole pages are flushed");
    assert_eq!(gfns.map(|gfn| guest.found(gfn).is_some()), [true, false, false, true]);
    assert_eq!(guest.unmap(range(BASE + 2 * G1 - 1, BASE + 9 * G1)).leaves, [0, 0, 1]);
    assert_eq!(guest.check().leaves, [0, 2, 0]);
    guest.finish();
}

/// 8.4: a zap reports young and dirty pages instead of losing them.
#[test]
fn a_zap_reports_young_and_dirty_pages() {
    fn run<F: Modelled>(caps: Capabilities) {
        let mut guest = Guest::<F>::new(caps);
        guest.host().set_resolver(linear(Level::L2));
        guest.slot(0, BASE, 8 * M2, DATA, SlotFlags::empty());
        guest.slot(1, BASE + 8 * M2, 8, DATA + 8 * M2, SlotFlags::READ_ONLY);
        // Writable from the start counts as written; read-only does not.
        guest.map(BASE..BASE + 10, Write, Level::L1);
        guest.map([BASE + 8 * M2, BASE + 8 * M2 + 1], Read, Level::L1);
        guest.map([BASE + M2, BASE + 2 * M2], Write, Level::L2);
        // Four small pages and one huge one are old.
        let _ = guest.age(range(BASE, BASE + 3), AgeMode::Clear);
        let _ = guest.age(range(BASE + 8 * M2, BASE + 8 * M2 + 1), AgeMode::Clear);
        let _ = guest.age(range(BASE + M2, BASE + M2 + 1), AgeMode::Clear);
        let all = guest.unmap(GfnRange::ALL);
        let expected = ZapReport {
            leaves: [12, 2, 0],
            young: 8 + M2,
            dirty: 10 + 2 * M2,
            ..ZapReport::default()
        };
        assert_eq!(all, expected);
        guest.finish();
    }
    for_each_format!(run);
}

#[test]
fn empty_and_impossible_ranges_take_nothing() {
    let mut guest = Guest::<Npt>::with_memory(Capabilities::npt(), 64, Level::L1);
    guest.map(BASE..BASE + 64, Read, Level::L1);
    let top = guest.config().max_gfn_exclusive().get();
    let ranges = [
        range(BASE + 5, BASE + 5),
        range(BASE + 9, BASE + 5),
        range(u64::MAX, 0),
        range(top, u64::MAX),
        range(u64::MAX, u64::MAX),
    ];
    guest.host().take_batches();
    for range in ranges {
        assert_eq!(guest.unmap(range), ZapReport::default(), "{range:?}");
    }
    assert_eq!(guest.host().take_batches(), []);
    assert_eq!(guest.check().leaves, [64, 0, 0]);
    guest.finish();
}

/// Nothing may be owed that is not paid, also when there was nothing to take.
#[test]
fn an_empty_unmap_beside_another_invalidation_owes_nothing() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    guest.map([BASE], Write, Level::L1);
    let vm = Arc::clone(guest.mmu.vm());
    let mut other = vm.actor().unwrap();
    let begun = vm.notify().begin(other.participant(), range(BASE + 7, BASE + 9));
    for empty in [range(BASE + 3, BASE + 3), range(BASE + 9, BASE + 2)] {
        assert_eq!(guest.unmap(empty), ZapReport::default());
    }
    // A range in which the other may have cleared entries is flushed for safety.
    guest.host().take_batches();
    assert_eq!(guest.unmap(range(BASE + 7, BASE + 8)), ZapReport::default());
    let batches = guest.host().take_batches();
    assert!(batches.len() == 1 && batches[0].covers(range(BASE + 7, BASE + 8)), "{batches:?}");
    drop(begun);
    drop((other, vm));
    guest.check();
    guest.finish();
}

#[test]
fn everything_up_to_the_last_page_can_be_unmapped() {
    for bits in [36, 39, 46, 52] {
        let caps = Capabilities { max_phys_bits: bits, levels: 5, ..Capabilities::ept() };
        let mut guest = Guest::<Ept>::new(caps);
        guest.host().set_resolver(linear(Level::L1));
        let top = guest.config().max_gfn_exclusive().get();
        assert_eq!(top, 1 << (bits - 12));
        guest.slot(0, top - 16, 16, DATA, SlotFlags::empty());
        guest.map([top - 16, top - 1], Write, Level::L1);
        assert_eq!(guest.unmap(range(top - 1, top)).leaves, [1, 0, 0]);
        guest.map([top - 1], Write, Level::L1);
        assert_eq!(guest.unmap(range(0, u64::MAX)).leaves, [2, 0, 0]);
        assert_eq!(guest.check().pages(), 0);
        guest.finish();
    }
}

/// While a range is being taken away, faults in it retry and faults elsewhere neither wait nor
/// retry. The other vCPU faults in the middle of the flush.
#[test]
fn faults_in_the_range_retry_and_faults_elsewhere_do_not_wait() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 4 * M2, Level::L1);
    guest.map(BASE..BASE + 8, Write, Level::L1);
    let mut vcpu = TdpVcpu::new(&guest.mmu, 0).unwrap();
    let _ = vcpu.load_root().unwrap();
    let vcpu = Mutex::new(vcpu);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let results = Arc::clone(&seen);
    guest.host().before_flush(Some(Arc::new(move |_: &Batch| {
        let fault = |gfn| {
            let fault = PageFault::new(gpa(gfn), PfErrorCode::WRITE);
            vcpu.lock().unwrap().fault(&fault).unwrap()
        };
        let gfns = [BASE + 2, BASE + 4, BASE + 5, BASE + M2, BASE + 9];
        results.lock().unwrap().extend(gfns.map(fault));
    })));
    assert_eq!(guest.unmap(range(BASE + 2, BASE + 5)).leaves, [3, 0, 0]);
    guest.host().before_flush(None);
    use FaultOutcome::{Fixed, Retry, Spurious};
    assert_eq!(*seen.lock().unwrap(), [Retry, Retry, Spurious, Fixed, Fixed]);
    guest.map(BASE..BASE + 8, Write, Level::L1);
    assert_eq!(guest.check().leaves, [10, 0, 0]);
    guest.finish();
}

/// Two unmaps of the same page: the one that finds nothing must not return before the flush that
/// the other owes is complete; it flushes itself.
// INVARIANT[I11].
#[test]
fn overlapping_unmaps_each_return_flushed() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    guest.map(BASE..BASE + 64, Write, Level::L1);
    guest.host().take_batches();
    let mmu = Arc::downgrade(&guest.mmu);
    let depth = AtomicU64::new(0);
    guest.host().before_flush(Some(Arc::new(move |_: &Batch| {
        if depth.fetch_add(1, Ordering::Relaxed) == 0 {
            let mmu = mmu.upgrade().unwrap();
            let mut actor = mmu.vm().actor().unwrap();
            assert_eq!(mmu.unmap(&mut actor, range(BASE + 4, BASE + 6)), ZapReport::default());
        }
    })));
    assert_eq!(guest.unmap(range(BASE, BASE + 10)).leaves, [10, 0, 0]);
    guest.host().before_flush(None);
    let batches = guest.host().take_batches();
    assert_eq!(batches.len(), 2);
    assert!(batches.iter().all(|batch| batch.covers(range(BASE + 4, BASE + 6))), "{batches:?}");
    guest.check();
    guest.finish();
}

/// Row 3.34: a vCPU may still run on an invalid root, so unmaps visit it until it is quiet.
#[test]
fn an_unmap_visits_invalid_roots_while_a_zap_all_is_pending() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
    guest.map(BASE..BASE + 64, Write, Level::L1);
    let old_root = guest.root_register();
    let mmu = Arc::clone(&guest.mmu);
    let zap = mmu.invalidate_roots(&mut guest.actor);
    assert!(guest.found_in(old_root, BASE + 3).is_some(), "still there for who runs on it");
    let report = guest.mmu.unmap(guest.vcpu.actor(), range(BASE, BASE + 10));
    assert_eq!(report.leaves, [10, 0, 0]);
    assert!(guest.found_in(old_root, BASE + 3).is_none());
    // Both trees while the new one exists too.
    guest.map([BASE + 20], Write, Level::L1);
    assert_ne!(guest.root_register(), old_root);
    let report = guest.mmu.unmap(guest.vcpu.actor(), range(BASE + 20, BASE + 21));
    assert_eq!(report.leaves, [2, 0, 0]);
    assert_eq!(zap.finish(&mut guest.actor).leaves, [53, 0, 0]);
    drop(mmu);
    guest.check();
    guest.finish();
}

/// The visible part of a zap-all is O(roots): it reads no table, whatever is mapped.
#[test]
fn dropping_everything_reads_no_table() {
    for pages in [1, 64 * M2] {
        let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64 * M2, Level::L1);
        guest.map((0..pages).step_by(256).map(|page| BASE + page), Read, Level::L1);
        guest.host().take_batches();
        let before = guest.host().lookups();
        let mmu = Arc::clone(&guest.mmu);
        let zap = mmu.invalidate_roots(&mut guest.actor);
        assert_eq!(guest.host().lookups(), before, "{pages} pages");
        let batches = guest.host().take_batches();
        assert_eq!(batches.len(), 1);
        assert_eq!((batches[0].scope, batches[0].tables.len()), (FlushScope::Reload, 0));
        assert!(!guest.vcpu.root_is_current());
        assert_eq!(guest.found(BASE), None, "gone at once");
        assert_eq!(zap.finish(&mut guest.actor).leaves, [pages.div_ceil(256), 0, 0]);
        drop(mmu);
        guest.finish();
    }
}

fn big<F: Modelled>(caps: Capabilities) -> Guest<F> {
    let mut guest = Guest::<F>::with_memory(caps, 3 * G1, Level::L3);
    guest.map((0..40).map(|n| BASE + n * M2 + n), Write, Level::L1);
    guest.map((0..5).map(|n| BASE + G1 + n * M2), Write, Level::L2);
    guest.map([BASE + 2 * G1], Write, Level::L3);
    guest
}

/// Each step takes apart as many tables as it was asked to, frames come back on the way.
fn steps<F: Modelled>(caps: Capabilities) {
    for slice in [1, 2, 3, 7, 1000] {
        let mut guest = big::<F>(caps);
        let tables = guest.check().tables;
        let vm = Arc::clone(guest.mmu.vm());
        let mut zap = guest.mmu.invalidate_roots(&mut guest.actor);
        guest.vcpu.unload_root();
        let mut calls = 0;
        loop {
            let before = vm.stats().get(Counter::Tables);
            let progress = zap.step(&mut guest.actor, slice);
            calls += 1;
            let taken = before - vm.stats().get(Counter::Tables);
            assert!(taken <= slice as u64, "{taken} tables in a step of {slice}");
            if progress == ZapProgress::Done {
                break;
            }
        }
        let expected = tables.div_ceil(slice as u64);
        assert!((expected..=expected + 1).contains(&calls), "{calls} steps of {slice}");
        let report = zap.report();
        assert_eq!((report.leaves, report.tables), ([40, 5, 1], tables - 1));
        drop(zap);
        drop(vm);
        assert_eq!(guest.mmu.vm().pool().frames_in_use(), guest.cached());
        guest.finish();
    }
}

#[test]
fn a_zap_all_can_be_done_in_steps() {
    for_each_format!(steps);
}

/// Dropped at every point, resumed by the next zap-all: nothing is lost, nothing counted twice.
#[test]
fn a_zap_all_dropped_midway_is_finished_by_the_next() {
    for stop in 0..48 {
        let mut guest = big::<Ept>(Capabilities::ept());
        let mut zap = guest.mmu.invalidate_roots(&mut guest.actor);
        for _ in 0..stop {
            let _ = zap.step(&mut guest.actor, 1);
        }
        let first = zap.report();
        drop(zap);
        guest.map([BASE + 9], Write, Level::L1);
        let second = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
        let leaves: Vec<u64> = first.leaves.iter().zip(second.leaves).map(|(a, b)| a + b).collect();
        assert_eq!(leaves, [41, 5, 1], "stopped after {stop}");
        guest.vcpu.unload_root();
        assert_eq!(guest.mmu.vm().pool().frames_in_use(), guest.cached());
        guest.check();
        guest.finish();
    }
}

#[test]
fn several_zap_alls_share_the_work() {
    let mut guest = big::<Npt>(Capabilities::npt());
    let mut other = guest.mmu.vm().actor().unwrap();
    let mmu = Arc::clone(&guest.mmu);
    let mut first = mmu.invalidate_roots(&mut guest.actor);
    guest.map([BASE + 9], Write, Level::L1);
    let mut second = mmu.invalidate_roots(&mut other);
    let mut total = [0; 3];
    let (mut a, mut b) = (ZapProgress::Pending, ZapProgress::Pending);
    while a == ZapProgress::Pending || b == ZapProgress::Pending {
        a = first.step(&mut guest.actor, 2);
        b = second.step(&mut other, 3);
    }
    for report in [first.report(), second.report()] {
        total.iter_mut().zip(report.leaves).for_each(|(sum, leaves)| *sum += leaves);
    }
    assert_eq!(total, [41, 5, 1]);
    drop((first, second));
    drop(other);
    drop(mmu);
    guest.vcpu.unload_root();
    guest.check();
    guest.finish();
}

/// Row 3.1: one root per role, however many vCPUs.
#[test]
fn vcpus_of_one_role_share_a_root() {
    let shape = Shape { spaces: 2, participants: 16, ..Shape::new(Capabilities::ept()) };
    let mut guest = Guest::<Ept>::with(shape);
    let root = guest.vcpu.load_root().unwrap();
    let mut vcpus: Vec<_> = (0..6).map(|n| TdpVcpu::new(&guest.mmu, n % 2).unwrap()).collect();
    let roots: Vec<_> = vcpus.iter_mut().map(|vcpu| vcpu.load_root().unwrap()).collect();
    for (index, found) in roots.iter().enumerate() {
        assert_eq!(*found == root, index % 2 == 0);
        assert_eq!(*found, roots[index % 2]);
    }
    assert_eq!(guest.stat(Counter::Tables), 2);
    // Leaving and coming back finds the same root: the MMU holds it too.
    vcpus.iter_mut().for_each(TdpVcpu::unload_root);
    guest.vcpu.unload_root();
    assert_eq!(guest.vcpu.load_root(), Ok(root));
    assert_eq!(vcpus[1].load_root(), Ok(roots[1]));
    drop(vcpus);
    assert_eq!(guest.stat(Counter::Tables), 2);
    guest.finish();
}

#[test]
fn threads_that_load_a_root_at_once_get_one() {
    for _ in 0..50 {
        let guest =
            Guest::<Ept>::without_root(Shape { frames: 64, ..Shape::new(Capabilities::ept()) });
        let barrier = std::sync::Barrier::new(4);
        let roots: Vec<_> = std::thread::scope(|scope| {
            let load = || {
                let mut vcpu = TdpVcpu::new(&guest.mmu, 0).unwrap();
                barrier.wait();
                vcpu.load_root().unwrap()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(load)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(roots.iter().all(|root| *root == roots[0]), "{roots:?}");
        assert_eq!(guest.stat(Counter::Tables), 1);
        guest.finish();
    }
}

/// Row 3.2: the frame of an invalid root stays until the last vCPU has left it, in any order.
#[test]
fn an_invalid_root_lives_until_the_last_reference_goes() {
    for finish_first in [false, true] {
        let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 64, Level::L1);
        let mut other = TdpVcpu::new(&guest.mmu, 0).unwrap();
        let old = other.load_root().unwrap();
        guest.map([BASE], Write, Level::L1);
        let zap = guest.mmu.invalidate_roots(&mut guest.actor);
        assert_ne!(guest.vcpu.load_root().unwrap(), old);
        if finish_first {
            let _ = zap.finish(&mut guest.actor);
            assert_eq!(guest.stat(Counter::Tables), 2, "the root that is used, and the old one");
            assert_ne!(other.load_root().unwrap(), old);
        } else {
            other.unload_root();
            let _ = zap.finish(&mut guest.actor);
        }
        assert_eq!(guest.stat(Counter::Tables), 1);
        drop(other);
        guest.check();
        guest.finish();
    }
}

#[test]
fn too_many_roots_is_an_error_that_finishing_mends() {
    let mut guest = Guest::<Ept>::new(Capabilities::ept());
    for _ in 1..MAX_ROOTS {
        drop(guest.mmu.invalidate_roots(&mut guest.actor));
        let _ = guest.vcpu.load_root().unwrap();
    }
    drop(guest.mmu.invalidate_roots(&mut guest.actor));
    let in_use = guest.mmu.vm().pool().frames_in_use() - guest.cached();
    for _ in 0..3 {
        let error = guest.vcpu.load_root().unwrap_err();
        assert_eq!(error, RootError::TooManyRoots { max: MAX_ROOTS });
        assert!(error.to_string().contains("64"), "{error}");
        let now = guest.mmu.vm().pool().frames_in_use() - guest.cached();
        assert_eq!(now, in_use, "nothing leaks");
    }
    let fault = PageFault::new(gpa(BASE), PfErrorCode::WRITE);
    assert_eq!(guest.vcpu.fault(&fault), Ok(FaultOutcome::Retry));
    let _ = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
    let _ = guest.vcpu.load_root().unwrap();
    guest.check();
    guest.finish();
}

/// Rows 6.6 and 3.37: when a slot is gone, so is every mapping of it, flushed.
#[test]
fn a_deleted_or_moved_slot_leaves_nothing_behind() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), 2 * M2, Level::L2);
    guest.slot(1, BASE + 2 * M2, 8, DATA + 4 * M2, SlotFlags::empty());
    guest.map([BASE, BASE + 2 * M2], Write, Level::L2);
    guest.map(BASE + M2..BASE + M2 + 9, Write, Level::L1);
    guest.host().take_batches();
    guest.slot(0, BASE + 8 * M2, 2 * M2, DATA, SlotFlags::empty());
    let batches = guest.host().take_batches();
    assert!(batches.iter().any(|batch| batch.covers(range(BASE, BASE + M2))), "{batches:?}");
    assert_eq!(guest.found(BASE), None);
    assert!(guest.found(BASE + 2 * M2).is_some(), "the other slot stays");
    guest.map([BASE + 8 * M2 + 3], Write, Level::L1);
    assert_eq!(guest.found(BASE + 8 * M2 + 3).map(|found| found.pfn), Some(DATA + 3));
    // Flags change nothing that is mapped.
    guest.slot(0, BASE + 8 * M2, 2 * M2, DATA, SlotFlags::LOG_DIRTY);
    assert!(guest.found(BASE + 8 * M2 + 3).is_some());
    guest.slot(0, 0, 0, DATA, SlotFlags::empty());
    guest.slot(1, 0, 0, DATA, SlotFlags::empty());
    assert_eq!(guest.check().leaves, [0; 3]);
    assert_eq!(guest.mmu.lookup(&mut guest.actor, 0, Gfn::new(BASE)).len(), 3, "tables stay");
    guest.finish();
}

/// 8.4: what a slot takes along when it goes is reported, and what comes back when logging ends.
#[test]
fn a_change_of_a_slot_reports_what_it_took_out_and_put_in() {
    for slot_zap in [SlotZap::Range, SlotZap::All] {
        let mut options = TdpOptions::default();
        options.slot_zap = slot_zap;
        let mut guest = Guest::<Ept>::with(Shape { options, ..Shape::new(Capabilities::ept()) });
        guest.host().set_resolver(linear(Level::L2));
        let slot = |base, flags| request(0, base, M2, DATA, flags);
        let change =
            |guest: &mut Guest<Ept>, request: &SlotRequest| guest.set_slot(request).expect("legal");
        let made = change(&mut guest, &slot(BASE, SlotFlags::empty()));
        let nothing = (ZapReport::default(), CollapseReport::default());
        assert_eq!((made.zapped, made.collapsed), nothing);
        guest.map([BASE], Write, Level::L2);
        let logged = change(&mut guest, &slot(BASE, SlotFlags::LOG_DIRTY));
        assert_eq!((logged.zapped, logged.collapsed), nothing);
        let plain = change(&mut guest, &slot(BASE, SlotFlags::empty()));
        assert_eq!((plain.zapped, plain.collapsed.collapses), (ZapReport::default(), [1, 0]));
        let moved = change(&mut guest, &slot(BASE + M2, SlotFlags::empty()));
        assert!(matches!(moved.change, SlotChange::Move { .. }), "{moved:?}");
        assert_eq!((moved.zapped.leaves, moved.zapped.dirty), ([0, 1, 0], M2), "{slot_zap:?}");
        guest.vcpu.load_root().expect("a root");
        guest.map([BASE + M2 + 5], Read, Level::L1);
        let gone = SlotRequest { bytes: 0, ..slot(BASE + M2, SlotFlags::empty()) };
        assert_eq!(change(&mut guest, &gone).zapped.leaves, [1, 0, 0], "{slot_zap:?}");
        guest.vcpu.load_root().expect("a root");
        guest.check();
        guest.finish();
    }
}
