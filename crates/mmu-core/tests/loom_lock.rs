//! Models of the spin lock and of the MMU lock with its drain.
#![cfg(loom)]

mod loom_common;

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::thread::{self, JoinHandle};
use loom_common::explore;
use mmu_core::epoch::{EpochDomain, Participant};
use mmu_core::lock::MmuLock;
use mmu_core::spin::SpinLock;
use mmu_core::sync::{AtomicU64, Ordering, relax};

/// A cell that only the spin lock protects. loom reports an access that is not ordered after every
/// earlier one.
struct Guarded {
    lock: SpinLock,
    cell: UnsafeCell<u64>,
    entered: AtomicU64,
}

impl Guarded {
    fn new() -> Arc<Self> {
        let (cell, entered) = (UnsafeCell::new(0), AtomicU64::new(0));
        Arc::new(Self { lock: SpinLock::new(relax), cell, entered })
    }

    fn enter(&self) {
        let _held = self.lock.lock();
        self.touch();
    }

    fn touch(&self) {
        self.cell.with_mut(|_| ());
        let before = self.entered.load(Ordering::Relaxed);
        self.entered.store(before + 1, Ordering::Relaxed);
    }
}

#[test]
fn a_spin_lock_lets_one_in_at_a_time() {
    explore("spin::lock_against_lock", || {
        let guarded = Guarded::new();
        let other = {
            let guarded = Arc::clone(&guarded);
            thread::spawn(move || (0..2).for_each(|_| guarded.enter()))
        };
        guarded.enter();
        other.join().unwrap();
        assert_eq!(guarded.entered.load(Ordering::Relaxed), 3, "an entry was lost");
    });
}

#[test]
fn a_spin_lock_that_is_only_tried_lets_one_in_at_a_time() {
    explore("spin::lock_against_try_lock", || {
        let guarded = Guarded::new();
        let others: Vec<_> = (0..2)
            .map(|_| {
                let guarded = Arc::clone(&guarded);
                thread::spawn(move || {
                    guarded.lock.try_lock().map(|_held| guarded.touch()).is_some()
                })
            })
            .collect();
        guarded.enter();
        let tried = others.into_iter().map(|other| u64::from(other.join().unwrap())).sum::<u64>();
        assert_eq!(guarded.entered.load(Ordering::Relaxed), 1 + tried);
    });
}

/// What the MMU lock protects: Shared holders read `cell`, Exclusive holders write it.
struct Locked {
    domain: Arc<EpochDomain>,
    lock: MmuLock,
    cell: UnsafeCell<u64>,
}

#[derive(Clone, Copy)]
enum Role {
    Shared,
    Exclusive,
    Pin,
}

impl Locked {
    fn new() -> Arc<Self> {
        let domain = EpochDomain::new(3, relax).expect("in range");
        let lock = MmuLock::new(Arc::clone(&domain));
        Arc::new(Self { domain, lock, cell: UnsafeCell::new(0) })
    }

    fn act(&self, role: Role, own: &mut Participant) {
        match role {
            Role::Shared => {
                let _held = self.lock.shared(own);
                self.cell.with(|_| ());
            }
            Role::Exclusive => {
                let _held = self.lock.exclusive(own);
                self.cell.with_mut(|_| ());
            }
            // Not kept out and keeps nobody out for good: nothing of the lock's may be touched.
            Role::Pin => drop(own.pin()),
        }
    }

    fn spawn(self: &Arc<Self>, roles: &'static [Role]) -> JoinHandle<Participant> {
        let locked = Arc::clone(self);
        let mut own = locked.domain.register().expect("room");
        thread::spawn(move || {
            roles.iter().for_each(|&role| locked.act(role, &mut own));
            own
        })
    }
}

/// The first thread does `mine`, the others one list each.
fn holders(name: &str, mine: &'static [Role], others: &'static [&'static [Role]]) {
    explore(name, move || {
        let locked = Locked::new();
        let mut own = locked.domain.register().expect("room");
        let others: Vec<_> = others.iter().map(|roles| locked.spawn(roles)).collect();
        mine.iter().for_each(|&role| locked.act(role, &mut own));
        for other in others {
            other.join().unwrap();
        }
        assert!(!locked.lock.needs_break());
        assert_eq!(locked.domain.open_sections(), 0);
    });
}

#[test]
fn exclusive_waits_for_shared_and_keeps_it_out() {
    holders("lock::shared_against_exclusive", &[Role::Exclusive], &[&[Role::Shared, Role::Shared]]);
}

#[test]
fn exclusive_keeps_exclusive_out() {
    holders("lock::exclusive_against_exclusive", &[Role::Exclusive], &[&[Role::Exclusive]]);
}

#[test]
fn exclusive_is_handed_on_to_a_shared_section() {
    holders(
        "lock::exclusive_shared_against_exclusive",
        &[Role::Exclusive],
        &[&[Role::Exclusive, Role::Shared]],
    );
}

#[test]
fn a_pin_is_not_kept_out_by_exclusive() {
    holders("lock::pin_against_exclusive", &[Role::Exclusive], &[&[Role::Pin, Role::Pin]]);
}

#[test]
fn a_pin_neither_helps_nor_hinders_a_shared_section() {
    holders(
        "lock::pin_shared_against_exclusive",
        &[Role::Exclusive],
        &[&[Role::Pin, Role::Shared]],
    );
}
