//! The dirty bitmap and the dirty ring against naive models, with random operations, and the ring
//! against a consumer that writes what it likes into the shared memory.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use mmu_core::dirty::{
    DirtyBitmap, DirtyRing, ResetEnd, ResetReport, RingConsumer, RingEntry, RingFull, RingSize,
    SlotKey,
};
use mmu_model::Random;

/// What a bitmap should say: a flag for each page, and whether all were marked at once.
struct Pages {
    dirty: Vec<bool>,
    all: bool,
}

impl Pages {
    fn word(&self, word: usize, all: bool) -> u64 {
        let pages = self.dirty.iter().skip(word * 64).take(64);
        pages.enumerate().fold(0, |bits, (n, &dirty)| bits | u64::from(dirty || all) << n)
    }

    fn clear(&mut self, word: usize, mask: u64) {
        let pages = self.dirty.iter_mut().skip(word * 64).take(64).enumerate();
        pages.filter(|(n, _)| mask >> n & 1 == 1).for_each(|(_, dirty)| *dirty = false);
    }

    fn set(&mut self, start: u64, end: u64) -> u64 {
        let pages = self.dirty.iter_mut().enumerate();
        let inside = pages.filter(|(n, dirty)| (start..end).contains(&(*n as u64)) && !**dirty);
        inside.map(|(_, dirty)| *dirty = true).count() as u64
    }
}

#[test]
fn a_bitmap_does_what_a_flag_for_each_page_does() {
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let count = random.below(300);
        let preset = random.chance(1, 4);
        let log = if preset { DirtyBitmap::new_all_set(count) } else { DirtyBitmap::new(count) };
        let log = log.unwrap();
        let mut model = Pages { dirty: vec![preset; count as usize], all: false };
        for step in 0..300 {
            let at = format!("seed {seed}, step {step}, {count} pages");
            // Beyond the end too, and far beyond it.
            let mut page = || random.below(count + 20) | u64::from(random.chance(1, 30)) << 63;
            let (from, to) = (page(), page());
            let word = random.below(count.div_ceil(64) + 2) as usize;
            let mask = random.next_u64() & random.next_u64();
            match random.below(8) {
                0 | 1 => {
                    let news = model.set(from, from.saturating_add(1));
                    assert_eq!(log.set(from), news == 1, "{at}");
                }
                2 => assert_eq!(log.set_range(from..to), model.set(from, to), "{at}"),
                3 => {
                    log.mark_all();
                    model.all = true;
                }
                4 => {
                    log.settle();
                    if std::mem::take(&mut model.all) {
                        model.dirty.fill(true);
                    }
                }
                5 => {
                    assert_eq!(log.take(word), model.word(word, false), "{at}");
                    model.clear(word, u64::MAX);
                }
                6 => {
                    assert_eq!(log.take_bits(word, mask), model.word(word, false) & mask, "{at}");
                    model.clear(word, mask);
                }
                _ => assert_eq!(log.peek(word), model.word(word, model.all), "{at}"),
            }
            let dirty = model.dirty.iter().filter(|dirty| **dirty || model.all).count();
            assert_eq!(log.count(), dirty as u64, "{at}");
        }
    }
}

/// A ring of the smallest size, its pages in the order in which they were pushed, and what of them
/// was handed out.
struct Ring {
    ring: Arc<DirtyRing>,
    pushed: VecDeque<(SlotKey, u64)>,
    random: Random,
}

impl Ring {
    fn new(seed: u64) -> Self {
        let size = RingSize::from_bytes(16 << 10).unwrap();
        let ring = Arc::new(DirtyRing::new(size).unwrap());
        Self { ring, pushed: VecDeque::new(), random: Random::new(seed) }
    }

    /// Pages that follow each other, jump, repeat, and stand at both ends of what a number holds.
    fn push(&mut self, at: &str) {
        let key = SlotKey { as_id: self.random.below(2) as u16, id: self.random.below(2) as u16 };
        let near = self.random.below(200);
        let end = self.random.chance(1, 2);
        let offset = if end { u64::MAX - near } else { near };
        let size = self.ring.size().entries();
        let want = if self.pushed.len() as u64 == size {
            Err(RingFull { entries: size })
        } else {
            self.pushed.push_back((key, offset));
            Ok(())
        };
        assert_eq!(self.ring.push(key, offset), want, "{at}");
        let used = self.pushed.len() as u64;
        let full = (self.ring.is_soft_full(), self.ring.is_full());
        assert_eq!((self.ring.used(), full), (used, (used >= size - 576, used == size)), "{at}");
    }

    /// Reset; what is handed out must be the oldest pages, each once or more, in few enough calls.
    fn reset(&mut self, at: &str) -> ResetReport {
        let budget = if self.random.chance(1, 3) { self.random.below(100) } else { u64::MAX };
        let (mut handed, mut bits) = (BTreeSet::new(), 0);
        let report = self.ring.reset(budget, |key, base, mask| {
            assert!(mask & 1 == 1, "{at}: a batch begins with a page");
            let highest = u64::from(63 - mask.leading_zeros());
            assert!(base.checked_add(highest).is_some(), "{at}: {base:#x} and {mask:#x} wrap");
            handed.extend((0..64).filter(|n| mask >> n & 1 == 1).map(|n| (key, base + n)));
            bits += u64::from(mask.count_ones());
        });
        let report = report.unwrap();
        assert!(report.reset <= budget && bits <= report.reset, "{at}: {report:?}, {bits} pages");
        let left = self.pushed.len() as u64;
        assert!(report.reset <= left, "{at}: {report:?} of {left}");
        let want: BTreeSet<_> = self.pushed.drain(..report.reset as usize).collect();
        assert_eq!(handed, want, "{at}: {report:?}");
        assert_eq!(report.end == ResetEnd::Empty, report.reset == left, "{at}: {report:?}");
        report
    }
}

#[test]
fn a_ring_hands_every_page_to_its_consumer_and_then_out_to_be_reset() {
    for seed in 0..60 {
        let mut ring = Ring::new(seed);
        let shared = Arc::clone(&ring.ring);
        let mut consumer = RingConsumer::new(shared.entries());
        // Pages pushed and not yet harvested: the last of `pushed`.
        let mut waiting = 0;
        for step in 0..200 {
            let at = format!("seed {seed}, step {step}");
            match ring.random.below(4) {
                0 | 1 => {
                    for _ in 0..ring.random.below(100) {
                        let before = ring.pushed.len();
                        ring.push(&at);
                        waiting += ring.pushed.len() - before;
                    }
                }
                2 => {
                    let most = ring.random.below(200) as usize;
                    let first = ring.pushed.len() - waiting;
                    let want: Vec<_> = ring.pushed.iter().skip(first).take(most).copied().collect();
                    let got: Vec<_> =
                        consumer.by_ref().take(most).map(|page| (page.key, page.offset)).collect();
                    assert_eq!(got, want, "{at}");
                    waiting -= got.len();
                }
                _ => {
                    let harvested = (ring.pushed.len() - waiting) as u64;
                    let report = ring.reset(&at);
                    assert_eq!(report.rewritten, 0, "{at}");
                    let stopped = report.end == ResetEnd::Budget || report.reset == harvested;
                    assert!(stopped, "{at}: {report:?}, {harvested} were harvested");
                }
            }
        }
    }
}

/// Writes rubbish, flags of all kinds or a plausible page.
fn scribble(entry: &RingEntry, random: &mut Random) {
    let (state, offset) = match random.below(4) {
        0 => (random.next_u64(), random.next_u64()),
        1 => (random.below(4), 0xffff_ffff_ffff_ffc1),
        2 => (RingEntry::RESET | random.below(4) << 32, random.below(2)),
        _ => (RingEntry::DIRTY | RingEntry::RESET | 0xff00, u64::MAX),
    };
    entry.write(state, offset);
}

/// KVM rows 3.47 and B10.
#[test]
fn nothing_that_a_consumer_writes_changes_what_is_handed_out() {
    for seed in 0..60 {
        let mut ring = Ring::new(seed);
        for step in 0..300 {
            let at = format!("seed {seed}, step {step}");
            match ring.random.below(3) {
                0 => (0..ring.random.below(100)).for_each(|_| ring.push(&at)),
                1 => {
                    for _ in 0..ring.random.below(3000) {
                        let entry = ring.random.below(1024) as usize;
                        scribble(&ring.ring.entries()[entry], &mut ring.random);
                    }
                }
                _ => {
                    let _ = ring.reset(&at);
                }
            }
        }
        // Left alone, the ring is as good as new.
        ring.ring.entries().iter().for_each(|entry| entry.write(RingEntry::RESET, 0));
        while ring.reset(&format!("seed {seed}, end")).end == ResetEnd::Budget {}
        assert_eq!((ring.ring.used(), ring.pushed.len()), (0, 0), "seed {seed}");
        let shared = Arc::clone(&ring.ring);
        let first = shared.consumer();
        ring.push(&format!("seed {seed}, again"));
        let got: Vec<_> = first.map(|page| (page.key, page.offset)).collect();
        assert_eq!(Vec::from(ring.pushed), got, "seed {seed}");
    }
}

/// The same while the consumer writes all the time, from a thread of its own.
#[test]
fn nothing_that_a_consumer_writes_meanwhile_changes_what_is_handed_out() {
    let seed = 47;
    let mut ring = Ring::new(seed);
    let stop = Arc::new(AtomicBool::new(false));
    let consumer = {
        let (shared, stop) = (Arc::clone(&ring.ring), Arc::clone(&stop));
        thread::spawn(move || {
            let mut random = Random::new(seed + 1);
            while !stop.load(Ordering::Relaxed) {
                shared.entries().iter().for_each(|entry| scribble(entry, &mut random));
            }
        })
    };
    let (mut reset, mut rewritten, mut step) = (0, 0, 0);
    while reset < 3_000 {
        let at = format!("seed {seed}, step {step}");
        (0..ring.random.below(20)).for_each(|_| ring.push(&at));
        let report = ring.reset(&at);
        (reset, rewritten, step) = (reset + report.reset, rewritten + report.rewritten, step + 1);
        thread::yield_now();
    }
    stop.store(true, Ordering::Relaxed);
    consumer.join().unwrap();
    assert!(rewritten > 0, "the consumer never came in between");
}
