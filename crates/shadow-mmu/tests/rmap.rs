//! Reverse maps by behaviour: lists that hold what was added, and what they cost.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(clippy::as_conversions, reason = "small numbers of a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mmu_core::addr::{Gfn, Level};
use mmu_core::sync::relax;
use shadow_mmu::rmap::{RmapError, RmapKey, RmapWriter, Rmaps};
use shadow_mmu::{PageId, SpteRef};

const LEVELS: [Level; 3] = [Level::L1, Level::L2, Level::L3];

fn key(space: u16, level: Level, gfn: u64) -> RmapKey {
    RmapKey { space, level, gfn: Gfn::new(gfn) }
}

fn entry(number: u32) -> SpteRef {
    SpteRef::new(PageId::new(number / 512).unwrap(), number as usize % 512)
}

fn add(writer: &mut RmapWriter, key: RmapKey, number: u32) -> u32 {
    writer.reserve(key).unwrap();
    writer.add(key, entry(number)).unwrap()
}

fn set(entries: impl Iterator<Item = SpteRef>) -> BTreeSet<SpteRef> {
    let all: Vec<_> = entries.collect();
    let set: BTreeSet<_> = all.iter().copied().collect();
    assert_eq!(all.len(), set.len(), "an entry is given once");
    set
}

#[test]
fn a_walk_over_a_range_ends_inside_a_block() {
    let (rmaps, mut writer) = Rmaps::new(Gfn::new(1 << 36), relax);
    for level in LEVELS {
        add(&mut writer, key(0, level, 1 << 20), level.number().into());
        let (start, end) = (Gfn::new((1 << 20) + 100), Gfn::new((1 << 20) + 200));
        let next = |from: Gfn| rmaps.next(0, level, from, end);
        assert_eq!(next(start), Some(start), "the middle of a block is in it");
        let last = Gfn::new(end.get() - 1);
        assert_eq!(next(last), Some(last));
        assert_eq!(next(end), None, "behind the last page there is nothing, at {level}");
        assert_eq!(next(Gfn::new(end.get() + 1)), None);
    }
}

#[test]
fn lists_of_spaces_levels_and_blocks_are_apart_and_random_changes_agree_with_sets() {
    let seed = 0x0a11_a5e5_u64;
    let mut state = seed;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (state >> 33) % below
    };
    let (rmaps, mut writer) = Rmaps::new(Gfn::new(1 << 36), relax);
    let mut model: BTreeMap<(u16, u8, u64), BTreeSet<SpteRef>> = BTreeMap::new();
    let gfns = [0, 1, 511, 512, (1 << 18) - 1, 1 << 18, (1 << 36) - 1];
    for step in 0..60_000_u32 {
        let space = random(2) as u16;
        let level = LEVELS[random(3) as usize];
        let gfn = gfns[random(7) as usize];
        let key = key(space, level, gfn);
        let block = (space, level.number(), gfn >> level.shift());
        let entries = model.entry(block).or_default();
        if random(100) < if step / 15_000 % 2 == 0 { 60 } else { 40 } {
            assert_eq!(add(&mut writer, key, step) as usize, entries.len() + 1);
            entries.insert(entry(step));
        } else if let Some(old) = entries.iter().nth(random(5) as usize).copied() {
            writer.remove(key, old).unwrap();
            entries.remove(&old);
        } else {
            let stranger = entry(1 << 30);
            let missing = RmapError::Missing { key, spte: stranger };
            assert_eq!(writer.remove(key, stranger), Err(missing), "seed {seed:#x}");
        }
        assert_eq!(&set(writer.entries(key)), entries, "seed {seed:#x}, step {step}");
        let locked = rmaps.lock(key).map(|list| set(list.entries())).unwrap_or_default();
        assert_eq!(&locked, entries, "seed {seed:#x}, step {step}");
    }
    for level in LEVELS {
        let of_level = model.iter().filter(|((_, number, _), _)| *number == level.number());
        let want: usize = of_level.map(|(_, entries)| entries.len()).sum();
        assert_eq!(writer.mapped(level), want as u64, "seed {seed:#x}");
    }
}

/// P25: eight bytes a mapping at 1, 2 and 9 aliases, and nothing up front.
#[test]
fn a_mapping_costs_eight_bytes_and_an_unmapped_slot_nothing() {
    const PAGES: u64 = 1 << 18;
    for (aliases, most) in [(1, 8.0), (2, 4.0), (9, 8.0), (15, 4.9)] {
        let (rmaps, mut writer) = Rmaps::new(Gfn::new(1 << 36), relax);
        assert_eq!(rmaps.bytes(), 0);
        for number in 0..PAGES as u32 * aliases {
            let _ = add(&mut writer, key(0, Level::L1, u64::from(number) % PAGES), number);
        }
        let each = rmaps.bytes() as f64 / (PAGES * u64::from(aliases)) as f64;
        // The nodes that lead to heads and descriptors come on top.
        assert!(each < most * 1.01 + 0.4, "{aliases} aliases: {each:.2} bytes a mapping");
        println!("{aliases:>2} aliases: {each:.2} bytes a mapping");
    }
}

#[test]
fn arguments_outside_are_errors_and_change_nothing() {
    let (rmaps, mut writer) = Rmaps::new(Gfn::new(1 << 20), relax);
    let strangers = [
        key(2, Level::L1, 0),
        key(0, Level::L4, 0),
        key(0, Level::L5, 0),
        key(0, Level::L1, u64::MAX),
        key(1, Level::L3, 1 << 60),
    ];
    for key in strangers {
        assert_eq!(writer.reserve(key), Err(RmapError::Outside { key }));
        assert_eq!(writer.add(key, entry(0)), Err(RmapError::NotReserved { key }));
        let missing = RmapError::Missing { key, spte: entry(0) };
        assert_eq!(writer.remove(key, entry(0)), Err(missing));
        assert!(rmaps.lock(key).is_none());
        assert_eq!((writer.len(key), writer.entries(key).count()), (0, 0));
    }
    let unprepared = key(0, Level::L1, 7);
    let not_reserved = RmapError::NotReserved { key: unprepared };
    assert_eq!(writer.add(unprepared, entry(0)), Err(not_reserved));
    assert_eq!(rmaps.bytes(), 0);
}

#[test]
fn a_walk_over_a_range_skips_what_was_never_mapped() {
    let (rmaps, mut writer) = Rmaps::new(Gfn::new(1 << 36), relax);
    let next = |level, from, end| rmaps.next(0, level, Gfn::new(from), Gfn::new(end)).map(Gfn::get);
    assert_eq!(next(Level::L1, 0, 1 << 36), None);
    let _ = add(&mut writer, key(0, Level::L1, 5_000_000), 0);
    let _ = add(&mut writer, key(0, Level::L2, 5_000_000), 1);
    assert_eq!(next(Level::L1, 0, 1 << 36), Some(5_000_000 & !511));
    assert_eq!(next(Level::L1, 5_000_000, 1 << 36), Some(5_000_000));
    assert_eq!(next(Level::L1, 0, 5_000_000 & !511), None);
    assert_eq!(next(Level::L2, 0, 1 << 36), Some(5_000_000 >> 18 << 18));
    assert_eq!(next(Level::L3, 0, 1 << 36), None);
    // An end inside a block.
    assert_eq!(next(Level::L2, 5_000_000, 5_000_001), Some(5_000_000));
    assert_eq!(next(Level::L2, 5_000_001, 5_000_001), None);
    assert_eq!(next(Level::L2, 5_000_002, 5_000_001), None);
}

/// On real threads: agers hold lists still while the writer changes them, with pages that "die".
#[test]
fn agers_on_threads_never_find_a_page_that_is_gone() {
    use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    const LISTS: u64 = 8;
    const PAGES: u32 = 64;
    let (rmaps, mut writer) = Rmaps::new(Gfn::new(LISTS), std::thread::yield_now);
    let alive: Arc<Vec<AtomicU64>> = Arc::new((0..PAGES).map(|_| AtomicU64::new(0)).collect());
    let stop = AtomicBool::new(false);
    let seen = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for gfn in 0..LISTS {
                        let Some(list) = rmaps.lock(key(0, Level::L1, gfn)) else { continue };
                        for entry in list.entries() {
                            let page = entry.page().get() as usize;
                            assert_eq!(alive[page].load(Ordering::Relaxed), 1, "{entry:?}");
                            seen.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        let page = |number: u32| SpteRef::new(PageId::new(number).unwrap(), 0);
        for turn in 0..2_000_u64 {
            for number in 0..PAGES {
                let key = key(0, Level::L1, (turn + u64::from(number)) % LISTS);
                alive[number as usize].store(1, Ordering::Relaxed);
                writer.reserve(key).unwrap();
                let _ = writer.add(key, page(number)).unwrap();
            }
            for number in 0..PAGES {
                let key = key(0, Level::L1, (turn + u64::from(number)) % LISTS);
                writer.remove(key, page(number)).unwrap();
                alive[number as usize].store(0, Ordering::Relaxed);
            }
        }
        // However slow the machine: the agers have seen something.
        while seen.load(Ordering::Relaxed) == 0 {
            let key = key(0, Level::L1, 0);
            alive[0].store(1, Ordering::Relaxed);
            writer.reserve(key).unwrap();
            let _ = writer.add(key, page(0)).unwrap();
            std::thread::yield_now();
            writer.remove(key, page(0)).unwrap();
            alive[0].store(0, Ordering::Relaxed);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!((writer.descriptors(), writer.mapped(Level::L1)), (0, 0));
}
