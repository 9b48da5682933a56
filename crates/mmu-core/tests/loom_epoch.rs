//! Models of epochs: pins, published values, grace periods, the table pool.
#![cfg(loom)]

mod loom_common;

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::thread;
use loom_common::explore;
use mmu_core::addr::Pfn;
use mmu_core::epoch::publish::{Published, Writer};
use mmu_core::epoch::{EpochDomain, Participant};
use mmu_core::frame::{Arena, FrameList, PhysMap, TablePool};
use mmu_core::spte::Spte;
use mmu_core::sync::{AtomicU64, Ordering, relax};

fn domain(capacity: usize) -> Arc<EpochDomain> {
    EpochDomain::new(capacity, relax).expect("in range")
}

/// Something that is reached through a link and destroyed when nobody can reach it.
struct Reachable {
    linked: AtomicU64,
    /// loom reports a destruction that a use is not ordered before, and the other way round.
    thing: UnsafeCell<u64>,
}

impl Reachable {
    fn new() -> Arc<Self> {
        Arc::new(Self { linked: AtomicU64::new(1), thing: UnsafeCell::new(7) })
    }

    fn use_it(&self, reader: &mut Participant) {
        let _section = reader.pin();
        if self.linked.load(Ordering::Acquire) == 1 {
            self.thing.with(|_| ());
            // Still there later in the same section.
            self.thing.with(|_| ());
        }
    }

    fn destroy(&self, writer: &mut Participant) {
        self.linked.store(0, Ordering::Release);
        writer.synchronize();
        self.thing.with_mut(|_| ());
    }
}

fn pins_against_synchronize(readers: usize, turns: usize) {
    let domain = domain(readers + 1);
    let thing = Reachable::new();
    let mut writer = domain.register().expect("room");
    let readers: Vec<_> = (0..readers)
        .map(|_| {
            let thing = Arc::clone(&thing);
            let mut reader = domain.register().expect("room");
            thread::spawn(move || {
                for _ in 0..turns {
                    thing.use_it(&mut reader);
                }
                reader
            })
        })
        .collect();
    thing.destroy(&mut writer);
    for reader in readers {
        reader.join().unwrap();
    }
    assert_eq!(domain.open_sections(), 0);
}

#[test]
fn what_was_unlinked_before_synchronize_is_unreachable_after_it() {
    explore("epoch::pin_against_synchronize", || pins_against_synchronize(1, 2));
}

#[test]
fn synchronize_waits_for_every_reader() {
    explore("epoch::pin_pin_against_synchronize", || pins_against_synchronize(2, 1));
}

/// The participant registers while the waiter scans: it is waited for, or it sees the change.
#[test]
fn a_reader_that_registers_late_is_waited_for_or_sees_the_change() {
    explore("epoch::register_against_synchronize", || {
        let domain = domain(2);
        let thing = Reachable::new();
        let mut writer = domain.register().expect("room");
        let reader = {
            let (thing, domain) = (Arc::clone(&thing), Arc::clone(&domain));
            thread::spawn(move || thing.use_it(&mut domain.register().expect("room")))
        };
        thing.destroy(&mut writer);
        reader.join().unwrap();
    });
}

/// Two threads take each other's records over; neither announces through the other's.
#[test]
fn a_record_has_one_owner_at_a_time() {
    explore("epoch::register_against_register", || {
        let domain = domain(2);
        let thing = Reachable::new();
        let others: Vec<_> = (0..2)
            .map(|_| {
                let (thing, domain) = (Arc::clone(&thing), Arc::clone(&domain));
                thread::spawn(move || thing.use_it(&mut domain.register().expect("room")))
            })
            .collect();
        for other in others {
            other.join().unwrap();
        }
        let mut writer = domain.register().expect("both records are free again");
        assert!(writer.index() < 2);
        thing.destroy(&mut writer);
    });
}

fn read_against_publish(readers: usize) {
    let domain = domain(readers + 1);
    let (published, writer) = Published::new(Arc::clone(&domain), [1, 1], [0, 0]);
    let mut owner = domain.register().expect("room");
    let readers: Vec<_> = (0..readers)
        .map(|_| {
            let published = Arc::clone(&published);
            let mut reader = domain.register().expect("room");
            thread::spawn(move || {
                let section = reader.pin();
                let &[first, second] = published.read(&section);
                assert_eq!(first, second, "a value half written");
                drop(section);
                reader
            })
        })
        .collect();
    let mut writer: Writer<[u64; 2]> = writer;
    *writer.spare() = [2, 2];
    writer.publish(&mut owner);
    // The buffer that was live at first: loom reports a reader there.
    *writer.spare() = [3, 3];
    for reader in readers {
        reader.join().unwrap();
    }
    assert_eq!(writer.live(), &[2, 2]);
}

#[test]
fn a_published_value_is_not_written_while_somebody_reads_it() {
    explore("epoch::read_against_publish", || read_against_publish(1));
}

#[test]
fn a_published_value_waits_for_every_reader() {
    explore("epoch::read_read_against_publish", || read_against_publish(2));
}

const OLD: Spte = Spte::from_raw(0x1000);
const NEW: Spte = Spte::from_raw(0x2000);

/// A pool with one frame, linked and holding `OLD`.
struct Linked {
    pool: TablePool<Arena>,
    /// The frame's number, or 0.
    link: AtomicU64,
}

impl Linked {
    fn new(domain: &Arc<EpochDomain>, frames: u64) -> Arc<Self> {
        let arena = Arena::with_capacity(frames, Pfn::new(1)).expect("memory");
        let pool = TablePool::new(arena, Arc::clone(domain));
        let frame = pool.take(1, 1).expect("room").pop(pool.map()).expect("taken");
        pool.owned_table(frame).fill(OLD);
        Arc::new(Self { link: AtomicU64::new(frame.get()), pool })
    }

    /// Follow the link; what is behind it stays what it was.
    fn follow(&self, reader: &mut Participant) {
        let section = reader.pin();
        // Relaxed: the epoch alone must keep the frame.
        let frame = self.link.load(Ordering::Relaxed);
        if frame != 0 {
            let table = self.pool.table(&section, Pfn::new(frame));
            for cell in table.entries() {
                assert_eq!(cell.load(), OLD, "reused under a reader (I13)");
            }
        }
    }

    /// Unlink, and give the frame back.
    fn unlink(&self) {
        let frame = Pfn::new(self.link.load(Ordering::Relaxed));
        self.link.store(0, Ordering::Release);
        let mut list = FrameList::new();
        list.push(self.pool.map(), frame);
        self.pool.retire(list);
    }

    /// Take what is there and use it for something else.
    fn reuse(&self) -> u64 {
        let mut taken = self.pool.take(0, 1).expect("no minimum");
        let count = taken.len();
        while let Some(frame) = taken.pop(self.pool.map()) {
            self.pool.owned_table(frame).fill(NEW);
            let mut list = FrameList::new();
            list.push(self.pool.map(), frame);
            self.pool.give_back(list);
        }
        count
    }

    fn assert_nothing_lost(&self) {
        self.pool.poll();
        assert_eq!(self.pool.poll(), 0, "no section is open, so nothing waits");
        assert_eq!(self.pool.frames_in_use(), 0);
    }
}

// INVARIANT[I13].
#[test]
fn a_retired_frame_is_not_handed_out_while_a_reader_may_see_it() {
    explore("epoch::pin_against_retire_and_take", || {
        let domain = domain(1);
        let linked = Linked::new(&domain, 1);
        let reader = {
            let linked = Arc::clone(&linked);
            let mut reader = domain.register().expect("room");
            thread::spawn(move || {
                linked.follow(&mut reader);
                linked.follow(&mut reader);
                reader
            })
        };
        linked.unlink();
        linked.reuse();
        linked.reuse();
        reader.join().unwrap();
        linked.assert_nothing_lost();
        assert_eq!(linked.reuse(), 1, "the frame is free again");
    });
}

#[test]
fn a_retired_frame_waits_for_every_reader() {
    explore("epoch::pin_pin_against_retire_and_take", || {
        let domain = domain(2);
        let linked = Linked::new(&domain, 1);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let linked = Arc::clone(&linked);
                let mut reader = domain.register().expect("room");
                thread::spawn(move || {
                    linked.follow(&mut reader);
                    reader
                })
            })
            .collect();
        linked.unlink();
        linked.reuse();
        for reader in readers {
            reader.join().unwrap();
        }
        linked.assert_nothing_lost();
    });
}

/// What is retired while a period runs is not covered by that period.
#[test]
fn a_frame_retired_during_a_grace_period_waits_for_the_next() {
    explore("epoch::pin_against_two_retirements", || {
        let domain = domain(2);
        let linked = Linked::new(&domain, 2);
        let early = linked.pool.take(1, 1).expect("room");
        // Keeps the first period running until the middle of the writer's work.
        let mut other = domain.register().expect("room");
        let section = other.pin();
        linked.pool.retire(early);
        let reader = {
            let linked = Arc::clone(&linked);
            let mut reader = domain.register().expect("room");
            thread::spawn(move || {
                linked.follow(&mut reader);
                reader
            })
        };
        linked.unlink();
        drop(section);
        // Each call ends at most one period and begins the next.
        assert!(linked.pool.poll() <= 1);
        linked.reuse();
        reader.join().unwrap();
        linked.assert_nothing_lost();
    });
}

/// A thread may take a frame while another retires one and a third reads.
#[test]
fn frames_are_taken_and_retired_at_once() {
    explore("epoch::pin_against_retire_against_take", || {
        let domain = domain(1);
        let linked = Linked::new(&domain, 1);
        let reader = {
            let linked = Arc::clone(&linked);
            let mut reader = domain.register().expect("room");
            thread::spawn(move || {
                linked.follow(&mut reader);
                reader
            })
        };
        let taker = {
            let linked = Arc::clone(&linked);
            thread::spawn(move || linked.reuse())
        };
        linked.unlink();
        taker.join().unwrap();
        reader.join().unwrap();
        linked.assert_nothing_lost();
    });
}

/// The arena is the pool's only source; nothing is provided twice.
#[test]
fn an_arena_provides_each_frame_once() {
    explore("arena::provide_against_provide", || {
        let arena = Arc::new(Arena::with_capacity(2, Pfn::new(1)).expect("memory"));
        let other = {
            let arena = Arc::clone(&arena);
            thread::spawn(move || {
                let frame = arena.provide();
                frame.into_iter().for_each(|frame| arena.reclaim(frame));
                arena.provide()
            })
        };
        let mine = arena.provide();
        let theirs = other.join().unwrap();
        assert!(mine.is_some() && theirs.is_some());
        assert_ne!(mine, theirs);
        assert_eq!(arena.provide(), None);
    });
}
