//! How long threads wait (KVM row 8.25), with a clock that the test moves: each wait is measured
//! exactly, by the participant that waited, and what need not wait is not measured.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::watched::WatchedGuest;
use common::{BASE, Guest, M2, gpa, linear, range, request};
use mmu_core::access::PfErrorCode;
use mmu_core::addr::Level;
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::latency::{Latency, Wait};
use mmu_core::slot::SlotFlags;
use mmu_core::spte::{Capabilities, Ept};
use mmu_model::AccessKind;

/// Wait until another thread has come as far as `there` says.
#[track_caller]
fn until(there: impl Fn() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < Duration::from_secs(60), "it never came there");
        std::thread::yield_now();
    }
}

fn write(gfn: u64) -> PageFault {
    PageFault::new(gpa(gfn), PfErrorCode::WRITE)
}

#[track_caller]
fn once(latency: Latency, nanos: u64) {
    assert_eq!((latency.count(), latency.total, latency.max), (1, nanos, nanos), "{latency}");
}

#[test]
fn a_fault_kept_out_by_exclusive_is_measured_and_others_are_not() {
    let mut guest = WatchedGuest::<Ept>::new(Capabilities::ept(), M2);
    assert_eq!(guest.vcpu.fault(&write(BASE)), Ok(FaultOutcome::Fixed));
    assert_eq!(guest.latency(Wait::Shared).count(), 0, "it did not wait");
    let mmu = Arc::clone(&guest.mmu);
    let held = guest.actor.exclusive();
    std::thread::scope(|scope| {
        let vcpu = &mut guest.vcpu;
        let fault = scope.spawn(move || vcpu.fault(&write(BASE + 1)));
        until(|| mmu.vm().lock().contended() == 1);
        mmu.vm().host().pass(7000);
        drop(held);
        assert_eq!(fault.join().unwrap(), Ok(FaultOutcome::Fixed));
    });
    once(guest.latency(Wait::Shared), 7000);
    once(guest.latency(Wait::ExclusiveHeld), 7000);
    once(guest.latency(Wait::Exclusive), 0);
    // The vCPU's stall, in its own shard.
    let fixed = guest.latency(Wait::FaultFixed);
    assert_eq!((fixed.count(), fixed.max), (2, 7000));
    let own = guest.vcpu.actor().participant().index();
    let other = guest.actor.participant().index();
    assert_eq!(guest.mmu.vm().latency().of(own, Wait::FaultFixed), fixed);
    assert_eq!(guest.mmu.vm().latency().of(other, Wait::FaultFixed).count(), 0);
}

#[test]
fn exclusive_waits_for_open_sections_and_says_how_long() {
    let mut guest = WatchedGuest::<Ept>::new(Capabilities::ept(), M2);
    let mmu = Arc::clone(&guest.mmu);
    let open = guest.vcpu.actor().shared();
    std::thread::scope(|scope| {
        let actor = &mut guest.actor;
        let writer = scope.spawn(move || drop(actor.exclusive()));
        until(|| mmu.vm().lock().needs_break());
        mmu.vm().host().pass(300);
        drop(open);
        writer.join().unwrap();
    });
    once(guest.latency(Wait::Exclusive), 300);
}

#[test]
fn an_invalidation_and_a_publication_measure_their_drains() {
    let mut guest = WatchedGuest::<Ept>::new(Capabilities::ept(), M2);
    let before = guest.latency(Wait::Publication);
    let mmu = Arc::clone(&guest.mmu);
    let open = guest.vcpu.actor().shared();
    std::thread::scope(|scope| {
        let (mmu2, actor) = (Arc::clone(&mmu), &mut guest.actor);
        let unmap = scope.spawn(move || mmu2.unmap(actor, range(BASE, BASE + 4)));
        until(|| mmu.vm().notify().in_progress() == 1);
        mmu.vm().host().pass(9000);
        drop(open);
        let _ = unmap.join().unwrap();
    });
    once(guest.latency(Wait::Invalidation), 9000);
    assert_eq!(guest.latency(Wait::Flush).count(), 0, "nothing was mapped");

    let generation = mmu.vm().slots().generation();
    let pinned = guest.vcpu.actor().pinned();
    std::thread::scope(|scope| {
        let (mmu2, actor, slots) = (Arc::clone(&mmu), &mut guest.actor, &mut guest.slots);
        let more = request(1, BASE + 4 * M2, 8, common::DATA, SlotFlags::empty());
        let change = scope.spawn(move || mmu2.set_slot(slots, actor, &more).map(drop));
        until(|| mmu.vm().slots().generation() != generation);
        mmu.vm().host().pass(50);
        drop(pinned);
        change.join().unwrap().expect("a legal slot");
    });
    let after = guest.latency(Wait::Publication);
    assert_eq!((after.count() - before.count(), after.total - before.total), (1, 50));
}

#[test]
fn a_flush_and_every_kind_of_fault_are_measured() {
    let mut guest = WatchedGuest::<Ept>::new(Capabilities::ept(), M2);
    let mmu = Arc::clone(&guest.mmu);
    // The host takes its time to find a page, and the flush to complete.
    let slow = Arc::downgrade(&mmu);
    let answer = linear(Level::L1);
    guest.host().inner.set_resolver(Arc::new(move |slot, gfn, want| {
        slow.upgrade().expect("alive").vm().host().pass(100);
        answer(slot, gfn, want)
    }));
    let slow = Arc::downgrade(&mmu);
    guest.host().inner.before_flush(Some(Arc::new(move |_| {
        slow.upgrade().expect("alive").vm().host().pass(40_000);
    })));
    assert_eq!(guest.vcpu.fault(&write(BASE)), Ok(FaultOutcome::Fixed));
    assert_eq!(guest.vcpu.fault(&write(BASE)), Ok(FaultOutcome::Spurious));
    assert!(matches!(guest.vcpu.fault(&write(1)), Ok(FaultOutcome::Emulate(_))));
    let begun = mmu.vm().notify().begin(guest.actor.participant(), range(BASE, BASE + 1));
    assert_eq!(guest.vcpu.fault(&write(BASE)), Ok(FaultOutcome::Retry));
    drop(begun);
    let _ = guest.mmu.unmap(&mut guest.actor, range(BASE, BASE + 1));
    once(guest.latency(Wait::FaultFixed), 100);
    once(guest.latency(Wait::FaultSpurious), 100);
    once(guest.latency(Wait::FaultOther), 0);
    once(guest.latency(Wait::FaultRetry), 0);
    once(guest.latency(Wait::Flush), 40_000);
    assert_eq!(guest.latency(Wait::Flush).percentile(500), 40_000);
    // A clock that goes back is no reason to report centuries.
    guest.host().clock.store(0, Ordering::SeqCst);
    assert_eq!(guest.latency(Wait::FaultFixed).max, 100);
}

#[test]
fn without_a_clock_nothing_is_measured() {
    let mut guest = Guest::<Ept>::with_memory(Capabilities::ept(), M2, Level::L1);
    guest.map([BASE], AccessKind::Write, Level::L1);
    let _ = guest.unmap(range(BASE, BASE + 1));
    drop(guest.actor.exclusive());
    for &wait in Wait::ALL {
        assert_eq!(guest.mmu.vm().latency().get(wait), Latency::default(), "{}", wait.name());
    }
    guest.finish();
}
