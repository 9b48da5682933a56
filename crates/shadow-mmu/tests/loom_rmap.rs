//! Models of reverse maps: an ager on a list beside the writer. Runs under `--cfg loom` only, where
//! a descriptor holds one reference.
//!
//! A shadow page is a word here: 1 while the page lives. The writer frees a page as it will in a
//! zap: off the list, then gone. The ager may find any entry that is on the list, once, and none of
//! a page that is gone (races R14 to R16).
#![cfg(loom)]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops when surprised")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as Counter, Ordering as Plain};

use loom::thread;
use mmu_core::addr::{Gfn, Level};
use mmu_core::sync::{AtomicU64, Ordering, relax};
use shadow_mmu::rmap::{RmapKey, RmapWriter, Rmaps};
use shadow_mmu::{PageId, SpteRef};

fn explore(name: &str, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 100_000;
    let executions = Arc::new(Counter::new(0));
    let counted = Arc::clone(&executions);
    builder.check(move || {
        counted.fetch_add(1, Plain::Relaxed);
        body();
    });
    println!("MODEL {name} executions={} bound=none", executions.load(Plain::Relaxed));
}

const fn key(gfn: u64) -> RmapKey {
    RmapKey { space: 0, level: Level::L1, gfn: Gfn::new(gfn) }
}

fn entry(page: u32) -> SpteRef {
    SpteRef::new(PageId::new(page).unwrap(), 0)
}

/// The list of gfn 0 with entries of pages 0 to `len`, and the pages, all alive.
fn world(len: u32) -> (Arc<Rmaps>, RmapWriter, Arc<[AtomicU64; 4]>) {
    let (rmaps, mut writer) = Rmaps::new(Gfn::new(2), relax);
    for page in 0..len {
        add(&mut writer, 0, page);
    }
    // The memory is there: models are about lists.
    writer.reserve(key(1)).unwrap();
    (rmaps, writer, Arc::new(core::array::from_fn(|_| AtomicU64::new(1))))
}

fn add(writer: &mut RmapWriter, gfn: u64, page: u32) {
    writer.reserve(key(gfn)).unwrap();
    let _ = writer.add(key(gfn), entry(page)).unwrap();
}

/// The pages of the entries on the list of gfn 0, each of them looked at.
fn look(rmaps: &Rmaps, pages: &[AtomicU64; 4]) -> Vec<u32> {
    let Some(list) = rmaps.lock(key(0)) else { return Vec::new() };
    let mut seen: Vec<u32> = list.entries().map(|entry| entry.page().get()).collect();
    for page in &seen {
        let alive = pages[*page as usize].load(Ordering::Relaxed);
        assert_eq!(alive, 1, "page {page} is on the list and gone (R16)");
    }
    seen.sort_unstable();
    seen
}

/// An ager beside `change`; what it saw is one of `allowed`.
fn race(
    name: &str,
    len: u32,
    allowed: &'static [&'static [u32]],
    change: fn(&mut RmapWriter, &[AtomicU64; 4]),
) {
    explore(name, move || {
        let (rmaps, mut writer, pages) = world(len);
        let ager = {
            let (rmaps, pages) = (Arc::clone(&rmaps), Arc::clone(&pages));
            thread::spawn(move || look(&rmaps, &pages))
        };
        change(&mut writer, &pages);
        let seen = ager.join().unwrap();
        assert!(allowed.contains(&seen.as_slice()), "the ager saw {seen:?} (R14)");
    });
}

fn zap(writer: &mut RmapWriter, pages: &[AtomicU64; 4], page: u32) {
    writer.remove(key(0), entry(page)).unwrap();
    pages[page as usize].store(0, Ordering::Relaxed);
}

#[test]
fn an_ager_sees_a_list_before_or_after_an_entry_is_added() {
    race("rmap::age_against_first", 0, &[&[], &[0]], |writer, _| add(writer, 0, 0));
    race("rmap::age_against_second", 1, &[&[0], &[0, 1]], |writer, _| add(writer, 0, 1));
    race("rmap::age_against_spill", 2, &[&[0, 1], &[0, 1, 2]], |writer, _| add(writer, 0, 2));
}

#[test]
fn a_page_is_not_freed_while_an_ager_holds_a_list_that_it_is_on() {
    race("rmap::age_against_zap_of_one", 1, &[&[0], &[]], |writer, pages| zap(writer, pages, 0));
    race("rmap::age_against_zap_of_two", 2, &[&[0, 1], &[1]], |writer, pages| {
        zap(writer, pages, 0);
    });
    race("rmap::age_against_fold", 3, &[&[0, 1, 2], &[1, 2]], |writer, pages| {
        zap(writer, pages, 0);
    });
}

/// A descriptor is used again at once, for another list: the ager holds the lock of its own.
#[test]
fn a_descriptor_that_moves_to_another_list_is_not_read_by_an_ager_of_the_first() {
    race("rmap::age_against_reuse", 3, &[&[0, 1, 2], &[0, 1]], |writer, _| {
        writer.remove(key(0), entry(2)).unwrap();
        for page in [3, 2, 1] {
            add(writer, 1, page);
        }
    });
}

#[test]
fn two_agers_hold_a_list_one_after_the_other() {
    explore("rmap::age_against_age", || {
        let (rmaps, _writer, pages) = world(3);
        let inside = Arc::new(AtomicU64::new(0));
        let hold = move |rmaps: &Rmaps, inside: &AtomicU64| {
            let list = rmaps.lock(key(0)).unwrap();
            assert_eq!(inside.swap(1, Ordering::Relaxed), 0, "two hold the list");
            assert_eq!(list.entries().count(), 3);
            inside.store(0, Ordering::Relaxed);
        };
        let other = {
            let (rmaps, inside) = (Arc::clone(&rmaps), Arc::clone(&inside));
            thread::spawn(move || hold(&rmaps, &inside))
        };
        hold(&rmaps, &inside);
        other.join().unwrap();
        drop(pages);
    });
}
