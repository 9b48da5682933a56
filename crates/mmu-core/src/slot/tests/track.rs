//! Write tracking against a plain map of counts.

use alloc::collections::BTreeMap;
use alloc::format;
use std::thread;

use super::*;
use crate::addr::to_index;
use crate::slot::{PageTrack, TrackError};

const STEPS: u32 = 4_000;

/// Counts of tracked gfns, nothing else.
struct Naive(BTreeMap<u64, u16>);

impl Naive {
    fn allows(&self, level: Level, gfn: u64) -> bool {
        let first = gfn / level.pages() * level.pages();
        level == Level::L1 || self.0.range(first..first + level.pages()).next().is_none()
    }
}

#[test]
fn counts_and_levels_are_those_of_a_plain_map() {
    let (block, huge) = (Level::L2.pages(), Level::L3.pages());
    for seed in 0..12_u64 {
        // Aligned or not, in one 1 GiB block or in several.
        let base = [0, 5, huge - 3 * block, 7 * huge + 9][to_index(seed % 4)];
        let pages = [huge + 2 * block, 3 * block][to_index(seed % 2)];
        let track = PageTrack::new(&slot(0, 0, base, pages));
        assert!(!track.is_used());
        let (mut naive, mut random) = (Naive(BTreeMap::new()), Rng(seed));
        for step in 0..STEPS {
            // Near the slot's ends and the blocks' borders, and now and then outside.
            let at = [base, base + block, base + pages, huge, 8 * huge][to_index(random.below(5))];
            let gfn = (at + random.below(8)).saturating_sub(4);
            let context = format!("seed {seed} step {step} gfn {gfn:#x}");
            let inside = (base..base + pages).contains(&gfn);
            let count = naive.0.get(&gfn).copied().unwrap_or(0);
            let page = Gfn::new(gfn);
            if random.below(2) == 0 {
                let outside = TrackError::Outside { gfn: page, slot: track.range() };
                let expected = if inside { Ok(count == 0) } else { Err(outside) };
                assert_eq!(track.track(page), expected, "{context}");
                if inside {
                    naive.0.insert(gfn, count + 1);
                }
            } else {
                let missing = TrackError::NotTracked { gfn: page };
                let expected = if count == 0 { Err(missing) } else { Ok(count == 1) };
                assert_eq!(track.untrack(page), expected, "{context}");
                naive.0.entry(gfn).and_modify(|count| *count -= 1);
                naive.0.retain(|_, count| *count != 0);
            }
            let asked = (gfn + random.below(3)).saturating_sub(1);
            let count = naive.0.get(&asked).copied().unwrap_or(0);
            assert_eq!(track.count(Gfn::new(asked)), count, "{context}: {asked:#x}");
            assert_eq!(track.is_tracked(Gfn::new(asked)), count != 0, "{context}: {asked:#x}");
            let mut largest = Level::L1;
            for level in [Level::L1, Level::L2, Level::L3] {
                // Of a gfn outside the slot nothing is known.
                if (base..base + pages).contains(&asked) {
                    let allowed = naive.allows(level, asked);
                    assert_eq!(track.allows(level, Gfn::new(asked)), allowed, "{context}: {level}");
                    largest = if allowed { level } else { largest };
                    let capped = track.max_level(Gfn::new(asked), level);
                    assert_eq!(capped, largest, "{context}: {asked:#x}");
                }
            }
        }
    }
}

#[test]
fn a_count_that_would_wrap_is_refused() {
    let track = PageTrack::new(&slot(0, 0, 10, 20));
    let (gfn, neighbour) = (Gfn::new(12), Gfn::new(13));
    track.track(neighbour).expect("room");
    for _ in 0..u16::MAX {
        track.track(gfn).expect("room");
    }
    assert_eq!(track.track(gfn), Err(TrackError::Overflow { gfn }));
    assert_eq!((track.count(gfn), track.count(neighbour)), (u16::MAX, 1));
    for _ in 0..u16::MAX {
        track.untrack(gfn).expect("counted");
    }
    assert_eq!(track.untrack(gfn), Err(TrackError::NotTracked { gfn }));
    assert!(!track.allows(Level::L3, gfn), "the neighbour is tracked still");
    track.untrack(neighbour).expect("counted");
    assert!(track.allows(Level::L3, gfn));
}

#[test]
fn the_largest_slot_is_tracked_at_its_ends() {
    let base = Gfn::new(1 << 40);
    let track = PageTrack::new(&slot(0, 0, base.get(), MAX_SLOT_PAGES));
    let last = base.saturating_add(MAX_SLOT_PAGES - 1);
    for gfn in [base, last] {
        assert_eq!(track.track(gfn), Ok(true));
        assert!(track.is_tracked(gfn) && !track.allows(Level::L2, gfn));
    }
    assert!(track.allows(Level::L3, base.saturating_add(Level::L3.pages())));
    let outside = last.saturating_add(1);
    assert_eq!(
        track.track(outside),
        Err(TrackError::Outside { gfn: outside, slot: track.range() })
    );
    assert!(!track.is_tracked(outside) && !track.is_tracked(Gfn::new(u64::MAX)));
}

#[test]
fn trackers_on_all_threads_leave_nothing_behind() {
    let track = PageTrack::new(&slot(0, 0, 0, 2 * Level::L3.pages()));
    let far = Gfn::new(Level::L3.pages() + 3);
    thread::scope(|scope| {
        for thread in 0..4_u64 {
            let track = &track;
            scope.spawn(move || {
                for turn in 0..20_000 {
                    // Neighbours in one word, and one that all of them share.
                    let own = Gfn::new(thread + 4);
                    assert_eq!(track.track(own), Ok(true), "turn {turn}");
                    let _ = track.track(far).expect("room");
                    assert!(!track.allows(Level::L2, own) && !track.allows(Level::L3, far));
                    assert_eq!(track.untrack(own), Ok(true), "turn {turn}");
                    let _ = track.untrack(far).expect("counted");
                }
            });
        }
    });
    for gfn in [Gfn::new(4), far] {
        assert!(track.is_used() && !track.is_tracked(gfn) && track.allows(Level::L3, gfn));
    }
}

/// Row 6.14: a page that is blocked counts for huge pages and for nothing else, beside counts.
#[test]
fn blocked_pages_keep_huge_pages_away_and_are_not_tracked() {
    let (block, huge) = (Level::L2.pages(), Level::L3.pages());
    let track = PageTrack::new(&slot(0, 0, 5, 2 * huge));
    let (page, near) = (Gfn::new(huge + 7), Gfn::new(huge + 7 + block));
    assert!(track.block(Gfn::new(4)).is_err(), "outside");
    assert!(!track.is_used());
    track.block(page).unwrap();
    track.block(page).unwrap();
    assert_eq!((track.count(page), track.is_tracked(page)), (0, false));
    assert_eq!(track.untrack(page), Err(TrackError::NotTracked { gfn: page }));
    assert_eq!(track.max_level(page, Level::L3), Level::L1);
    assert_eq!(track.max_level(near, Level::L3), Level::L2);
    assert_eq!(track.max_level(Gfn::new(7), Level::L3), Level::L3, "another 1 GiB");
    // Counts come and go beside it.
    assert_eq!(track.track(page), Ok(true));
    track.unblock(page);
    track.unblock(page);
    assert_eq!(track.max_level(page, Level::L3), Level::L1, "it is tracked");
    assert_eq!(track.untrack(page), Ok(true));
    assert_eq!(track.max_level(page, Level::L3), Level::L3);
    track.unblock(Gfn::new(4));
    assert_eq!(track.max_level(near, Level::L3), Level::L3);
}
