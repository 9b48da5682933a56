//! Models of the dirty logs: marking against harvesting, and the ring between its three sides.
//!
//! A page's entry and content are one word: bit 0 says that the page is writable, the bits above
//! count its writes. So a write and the permission for it are one operation, as behind a flush.
#![cfg(loom)]

mod loom_common;

use std::sync::Arc;

use loom::thread;
use loom_common::{explore, explore_up_to};
use mmu_core::dirty::{DirtyBitmap, DirtyRing, RingConsumer, RingSize, SlotKey};
use mmu_core::sync::{AtomicU64, Ordering};

const W: u64 = 1;
const WRITE: u64 = 2;
const PAGES: u64 = 2;
const KEY: SlotKey = SlotKey { as_id: 1, id: 2 };

/// A guest page.
struct Page(AtomicU64);

impl Page {
    const fn over(word: AtomicU64) -> Self {
        Self(word)
    }

    fn protected() -> Self {
        Self::over(AtomicU64::new(0))
    }

    /// One write of the guest; `mark` is called after each time that the page was made writable.
    fn write(&self, mark: impl Fn()) {
        // Ends: an attempt fails only when another thread changed the word.
        loop {
            // Relaxed: the log alone must order what a harvester sees here.
            let seen = self.0.fetch_or(W, Ordering::Relaxed);
            if seen & W == 0 {
                mark();
            }
            let (old, new) = (seen | W, (seen | W) + WRITE);
            if self.0.compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return;
            }
        }
    }

    /// One write of a guest thread that finds the page writable, if it does.
    fn write_if_writable(&self) {
        let seen = self.0.load(Ordering::Relaxed);
        if seen & W != 0 {
            let new = seen + WRITE;
            let _ = self.0.compare_exchange(seen, new, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Write protect the page if it looks writable, as a re-arm does; the writes that its content
    /// then has.
    fn protect(&self) -> u64 {
        let seen = self.0.load(Ordering::Relaxed);
        let last = if seen & W == 0 { seen } else { self.0.fetch_and(!W, Ordering::Relaxed) };
        last / WRITE
    }

    fn writes(&self) -> u64 {
        self.0.load(Ordering::Relaxed) / WRITE
    }
}

/// Two pages, their log, and what the target of a migration has of them.
struct Logged {
    pages: [Page; 2],
    log: DirtyBitmap,
    copied: [AtomicU64; 2],
}

impl Logged {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            pages: [Page::protected(), Page::protected()],
            log: DirtyBitmap::new(PAGES).expect("memory"),
            copied: [AtomicU64::new(0), AtomicU64::new(0)],
        })
    }

    fn write(&self, page: usize) {
        self.pages[page].write(|| {
            let _ = self.log.set(page as u64);
        });
    }

    /// Copy the pages of `bits`. The newest copy wins, whoever made it.
    fn copy(&self, bits: u64) {
        for page in (0..2).filter(|page| bits >> page & 1 == 1) {
            self.copied[page].fetch_max(self.pages[page].protect(), Ordering::Relaxed);
        }
    }

    /// No write is missing from what was harvested, the last harvest included.
    fn assert_complete(&self) {
        self.log.settle();
        self.copy(self.log.take(0));
        for (page, copied) in self.pages.iter().zip(&self.copied) {
            assert_eq!(copied.load(Ordering::Relaxed), page.writes(), "a write was lost");
        }
    }
}

/// `vcpu` beside `other` beside a harvester in the first thread.
fn logged(
    name: &str,
    bound: Option<usize>,
    vcpu: fn(&Logged),
    other: Option<fn(&Logged)>,
    harvest: fn(&Logged),
) {
    explore_up_to(name, bound, move || {
        let logged = Logged::new();
        let spawn = |run: fn(&Logged)| {
            let logged = Arc::clone(&logged);
            thread::spawn(move || run(&logged))
        };
        let threads: Vec<_> = [Some(vcpu), other].into_iter().flatten().map(spawn).collect();
        harvest(&logged);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        logged.assert_complete();
    });
}

fn take(logged: &Logged) {
    logged.copy(logged.log.take(0));
}

fn write_twice(logged: &Logged) {
    logged.write(0);
    logged.write(0);
}

#[test]
fn no_write_is_lost_to_harvests() {
    logged("dirty::set_against_take_and_take", None, write_twice, None, |logged| {
        take(logged);
        take(logged);
    });
}

#[test]
fn no_write_is_lost_to_a_harvest_beside_two_writers() {
    let other: fn(&Logged) = |logged| logged.pages[0].write_if_writable();
    let name = "dirty::set_against_access_against_take";
    logged(name, None, |logged| logged.write(0), Some(other), take);
}

#[test]
fn no_write_is_lost_to_two_harvesters() {
    logged("dirty::set_against_take_against_take", None, |l| l.write(0), Some(take), take);
}

#[test]
fn clearing_one_page_leaves_the_mark_of_its_neighbour() {
    let vcpu = |logged: &Logged| {
        logged.write(0);
        logged.write(1);
    };
    logged("dirty::set_against_take_bits", None, vcpu, None, |logged| {
        let bits = logged.log.take_bits(0, 0b01);
        assert_eq!(bits & !0b01, 0);
        logged.copy(bits);
        logged.copy(logged.log.take_bits(0, 0b10));
    });
}

fn settle_and_take(logged: &Logged) {
    logged.log.settle();
    take(logged);
}

/// A page made writable behind the back of its bit, all pages marked instead.
fn write_marking_all(logged: &Logged) {
    logged.pages[0].write(|| logged.log.mark_all());
}

#[test]
fn no_write_is_lost_when_all_pages_are_marked() {
    let vcpu = |logged: &Logged| {
        write_marking_all(logged);
        write_marking_all(logged);
    };
    logged("dirty::mark_all_against_settle_and_take", None, vcpu, None, settle_and_take);
}

#[test]
fn no_write_is_lost_when_two_mark_all_pages() {
    let other: fn(&Logged) = |logged| logged.pages[1].write(|| logged.log.mark_all());
    let name = "dirty::mark_all_against_mark_all_against_settle";
    logged(name, None, write_marking_all, Some(other), settle_and_take);
}

#[test]
fn no_write_is_lost_to_two_that_settle() {
    let name = "dirty::mark_all_against_settle_against_settle";
    logged(name, None, write_marking_all, Some(|logged| logged.log.settle()), settle_and_take);
}

/// Two pages and the ring of the vCPU that writes them.
struct Ringed {
    pages: [Page; 2],
    ring: DirtyRing,
}

impl Ringed {
    fn new() -> Arc<Self> {
        let size = RingSize::from_bytes(4 * 16).expect("legal in models");
        let ring = DirtyRing::new(size).expect("memory");
        Arc::new(Self { pages: [Page::protected(), Page::protected()], ring })
    }

    fn write(&self, page: usize) {
        self.pages[page].write(|| self.ring.push(KEY, page as u64).expect("room"));
    }

    /// Reset, and write protect what was handed out.
    fn reset(&self) {
        let report = self.ring.reset(u64::MAX, |key, base, mask| {
            assert_eq!(key, KEY);
            for bit in (0..64).filter(|bit| mask >> bit & 1 == 1) {
                let _ = self.pages[(base + bit) as usize].protect();
            }
        });
        assert_eq!(report.expect("one at a time").rewritten, 0);
    }

    /// Harvest what is there, reset, then copy: the order in which an honest consumer works.
    fn migrate(&self, consumer: &mut RingConsumer<'_>, copied: &mut [u64; 2]) {
        let pages: Vec<usize> = consumer.by_ref().map(|page| page.offset as usize).collect();
        self.reset();
        for page in pages {
            copied[page] = self.pages[page].writes();
        }
    }
}

/// A vCPU that writes `page` beside an honest consumer; page 0 has been written before.
fn ringed(name: &str, page: usize) {
    explore(name, move || {
        let ringed = Ringed::new();
        ringed.write(0);
        let vcpu = {
            let ringed = Arc::clone(&ringed);
            thread::spawn(move || ringed.write(page))
        };
        let mut copied = [0; 2];
        let mut consumer = ringed.ring.consumer();
        ringed.migrate(&mut consumer, &mut copied);
        vcpu.join().unwrap();
        ringed.migrate(&mut consumer, &mut copied);
        assert_eq!(copied, [ringed.pages[0].writes(), ringed.pages[1].writes()], "lost a write");
        assert_eq!(ringed.ring.used(), 0);
    });
}

#[test]
fn no_write_is_lost_to_a_consumer_that_resets_before_it_copies() {
    ringed("dirty::push_again_against_harvest_and_reset", 0);
}

#[test]
fn no_write_of_another_page_is_lost_to_a_consumer_that_resets_before_it_copies() {
    ringed("dirty::push_against_harvest_and_reset", 1);
}

/// All three sides at once, in a full ring. Every page is harvested once, in order, and handed out
/// once.
#[test]
fn producer_consumer_and_reset_agree() {
    explore("dirty::push_against_harvest_against_reset", || {
        let size = RingSize::from_bytes(2 * 16).expect("legal in models");
        let ring = Arc::new(DirtyRing::new(size).expect("memory"));
        (0..2).for_each(|page| ring.push(KEY, page * 64).expect("room"));
        let mut harvested: Vec<u64> = ring.consumer().take(1).map(|page| page.offset).collect();
        let producer = {
            let ring = Arc::clone(&ring);
            // Into the entry that is being reset.
            thread::spawn(move || u64::from(ring.push(KEY, 2 * 64).is_ok()))
        };
        let consumer = {
            let ring = Arc::clone(&ring);
            thread::spawn(move || {
                let pages = RingConsumer::resume(ring.entries(), 1).take(2);
                pages.map(|page| page.offset).collect::<Vec<_>>()
            })
        };
        let mut handed = Vec::new();
        let _ = ring.reset(u64::MAX, |_, base, mask| handed.push((base, mask))).unwrap();
        let pushed = 2 + producer.join().unwrap();
        harvested.extend(consumer.join().unwrap());
        harvested.extend(ring.consumer().map(|page| page.offset));
        let _ = ring.reset(u64::MAX, |_, base, mask| handed.push((base, mask))).unwrap();
        assert_eq!(harvested, (0..pushed).map(|page| page * 64).collect::<Vec<_>>());
        assert_eq!(handed, (0..pushed).map(|page| (page * 64, 1)).collect::<Vec<_>>());
    });
}

/// A consumer that overwrites an entry while it is pushed: what was pushed is still handed out,
/// once, after it was made writable, and nothing else is.
#[test]
fn a_hostile_consumer_cannot_change_what_is_handed_out() {
    explore("dirty::push_against_forged_entry_against_reset", || {
        let ringed = Ringed::new();
        let producer = {
            let ringed = Arc::clone(&ringed);
            thread::spawn(move || {
                for (page, offset) in ringed.pages.iter().zip([0, 64]) {
                    page.write(|| ringed.ring.push(KEY, offset).expect("room"));
                }
            })
        };
        let forger = {
            let ringed = Arc::clone(&ringed);
            thread::spawn(move || ringed.ring.entries()[0].write(u64::MAX, 7))
        };
        let mut handed = Vec::new();
        let mut reset = || {
            let report = ringed.ring.reset(u64::MAX, |key, base, mask| {
                let page = &ringed.pages[handed.len()];
                assert_ne!(page.0.load(Ordering::Relaxed), 0, "handed out while protected");
                handed.push((key, base, mask));
            });
            report.expect("one at a time").reset
        };
        assert!(reset() <= 1, "of an entry that nobody harvested");
        producer.join().unwrap();
        forger.join().unwrap();
        // Left alone, the ring gives back what is harvested.
        ringed.ring.entries().iter().for_each(|entry| entry.write(2, 0));
        let _ = reset();
        assert_eq!(handed, [(KEY, 0, 1), (KEY, 64, 1)]);
    });
}

#[test]
fn two_resets_do_not_overlap() {
    explore("dirty::reset_against_reset", || {
        let ringed = Ringed::new();
        ringed.write(0);
        ringed.write(1);
        assert_eq!(ringed.ring.consumer().count(), 2);
        let handed = Arc::new(AtomicU64::new(0));
        let reset = |ringed: &Ringed, handed: &AtomicU64| {
            let done = ringed.ring.reset(1, |_, _, mask| {
                handed.fetch_add(u64::from(mask.count_ones()), Ordering::Relaxed);
            });
            done.map_or(0, |report| report.reset)
        };
        let other = {
            let (ringed, handed) = (Arc::clone(&ringed), Arc::clone(&handed));
            thread::spawn(move || reset(&ringed, &handed))
        };
        let freed = reset(&ringed, &handed) + other.join().unwrap();
        assert!(freed >= 1, "both were refused");
        assert_eq!(ringed.ring.used(), 2 - freed);
        assert_eq!(handed.load(Ordering::Relaxed), freed);
    });
}
