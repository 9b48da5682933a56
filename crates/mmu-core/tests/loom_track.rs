//! Models of write tracking: places that are set once, and a tracker against a fault.
#![cfg(loom)]

mod loom_common;

use std::sync::Arc;

use loom::thread;
use loom_common::explore;
use mmu_core::addr::{Gfn, Hva};
use mmu_core::epoch::EpochDomain;
use mmu_core::epoch::publish::SetOnce;
use mmu_core::lock::MmuLock;
use mmu_core::slot::{Memslot, PageTrack, SlotFlags};
use mmu_core::sync::{AtomicU64, Ordering, relax};

#[test]
fn a_place_is_set_once_and_everybody_finds_the_same() {
    explore("set_once::set_get_against_set", || {
        let place = Arc::new(SetOnce::new());
        let others: Vec<_> = (0..2_u64)
            .map(|thread| {
                let place = Arc::clone(&place);
                thread::spawn(move || match thread {
                    0 => Some(**place.get_or_set(Box::new(thread))),
                    _ => place.get().map(|value: &Box<u64>| **value),
                })
            })
            .collect();
        let mine = **place.get_or_set(Box::new(7));
        for other in others {
            let theirs = other.join().unwrap();
            assert!(theirs.is_none_or(|theirs| theirs == mine), "{theirs:?} and {mine}");
        }
    });
}

/// W of the one entry there is.
const WRITABLE: u64 = 1;

#[test]
fn no_tracked_page_stays_writable() {
    explore("track::fault_against_track", || {
        let domain = EpochDomain::new(2, relax).expect("in range");
        let lock = Arc::new(MmuLock::new(Arc::clone(&domain)));
        let (base_gfn, hva) = (Gfn::new(0), Hva::new(0));
        let slot = Memslot { as_id: 0, id: 0, flags: SlotFlags::empty(), base_gfn, npages: 2, hva };
        let track = Arc::new(PageTrack::new(&slot));
        let entry = Arc::new(AtomicU64::new(0));
        let mut vcpu = domain.register().expect("room");
        let fault = {
            let (lock, track, entry) = (Arc::clone(&lock), Arc::clone(&track), Arc::clone(&entry));
            thread::spawn(move || {
                let _section = lock.shared(&mut vcpu);
                if !track.is_tracked(Gfn::new(1)) {
                    entry.store(WRITABLE, Ordering::Relaxed);
                }
            })
        };
        let mut tracker = domain.register().expect("room");
        assert_eq!(track.track(Gfn::new(1)), Ok(true));
        tracker.synchronize();
        {
            let _section = lock.shared(&mut tracker);
            entry.swap(0, Ordering::Relaxed);
        }
        fault.join().unwrap();
        assert_eq!(entry.load(Ordering::Relaxed), 0, "writable though tracked");
    });
}
