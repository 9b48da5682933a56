//! Dirty logging, case by case: what is handed out, what is flushed, what it costs, what is
//! refused (KVM rows 0.2.2, 0.2.3, 3.39 to 3.48).

mod common;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{BASE, Core, DATA, Guest, M2, Modelled, Shape, code, gpa, linear, range, request};
use mmu_core::addr::{Gfn, GfnRange, Hva, Level};
use mmu_core::attributes::Attributes;
use mmu_core::dirty::RingSize;
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::slot::{LogOptions, SlotError, SlotFlags, SlotRequest};
use mmu_core::spte::{Capabilities, Ept, Npt};
use mmu_core::stats::Counter;
use mmu_model::{AccessKind, Caches, SoftCpu};
use tdp_mmu::{DirtyTracking, Harvest, LogError, TdpOptions, TdpVcpu};

use AccessKind::{Read, Write};

const WAYS: [DirtyTracking; 3] =
    [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit, DirtyTracking::HardwareLog];

fn shape(tracking: DirtyTracking, log: LogOptions) -> Shape {
    let mut options = TdpOptions::default();
    options.dirty = tracking;
    Shape { options, log, ..Shape::new(Capabilities::ept()) }
}

fn ring() -> LogOptions {
    let ring = RingSize::from_bytes(1 << 14).expect("1024 entries");
    LogOptions { bitmap: false, ring: Some(ring), initially_set: false }
}

/// A guest with a slot of `pages` at `base`, which is congruent with its memory, not logged.
fn guest(shape: Shape, base: u64, pages: u64, level: Level) -> Guest<Ept> {
    let mut guest = Guest::<Ept>::with(shape);
    guest.slot(0, base, pages, DATA + base - BASE, SlotFlags::empty());
    guest.host().set_resolver(linear(level));
    guest
}

fn log(guest: &mut Guest<Ept>, base: u64, pages: u64, on: bool) {
    let flags = if on { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
    guest.slot(0, base, pages, DATA + base - BASE, flags);
}

fn harvest(guest: &mut Guest<Ept>, words: usize) -> (Harvest, Vec<u64>) {
    let mut bits = vec![0; words];
    let done = guest.mmu.harvest_log(&mut guest.actor, 0, 0, &mut bits).expect("a logged slot");
    (done, bits)
}

/// A write as the guest makes it: it faults if it must, and the dirty bit is set.
fn write(guest: &mut Guest<Ept>, gfn: u64) {
    for _ in 0..4 {
        if guest.touch(gfn, Write).is_ok() {
            return;
        }
        let _ = guest.fault(gfn, Write, Level::MAX_LEAF);
    }
    panic!("{gfn:#x} cannot be written");
}

/// Rows 3.41 to 3.44, B84, 1.43: in every mode, what was written is handed out once.
#[test]
fn what_was_written_is_handed_out_once() {
    for tracking in [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit] {
        let base = BASE + 37;
        let mut guest = guest(shape(tracking, LogOptions::default()), base, 300, Level::L1);
        guest.map(base..base + 200, Write, Level::L1);
        log(&mut guest, base, 300, true);
        assert_eq!(harvest(&mut guest, 5).0.pages, 0, "written before");
        for page in [0, 26, 27, 63, 64, 250, 299] {
            write(&mut guest, base + page);
        }
        // Entries that map nothing are passed over.
        let expected = [1 | 1 << 26 | 1 << 27 | 1 << 63, 1, 0, 1 << (250 - 192), 1 << (299 - 256)];
        assert_eq!(harvest(&mut guest, 5).1, expected, "{tracking:?}");
        assert_eq!(harvest(&mut guest, 5).0.pages, 0);
        write(&mut guest, base + 64);
        assert_eq!(harvest(&mut guest, 5).1, [0, 1, 0, 0, 0], "{tracking:?}");
        guest.check();
        guest.finish();
    }
}

/// Row 3.39: flushed on enabling whatever is found, and once; a call that took nothing flushes
/// nothing (rows 0.2.2, 0.2.3, 3.45).
#[test]
fn every_call_flushes_once_and_only_if_it_must() {
    for tracking in WAYS {
        let mut guest = guest(shape(tracking, LogOptions::default()), BASE, 512, Level::L2);
        log(&mut guest, BASE, 512, true);
        let batches = guest.host().take_batches();
        assert_eq!(batches.len(), 1, "nothing is mapped");
        assert!(batches[0].covers(range(BASE, BASE + 512)));
        log(&mut guest, BASE, 512, false);
        write(&mut guest, BASE + 5);
        guest.host().take_batches();
        log(&mut guest, BASE, 512, true);
        let batches = guest.host().take_batches();
        assert_eq!(batches.len(), 1, "{tracking:?}: {batches:?}");
        assert!(batches[0].covers(range(BASE, BASE + 512)));
        assert_eq!(harvest(&mut guest, 8).0.pages, 0, "{tracking:?}");
        assert_eq!(guest.host().take_batches(), []);
        for page in [3, 70, 400] {
            write(&mut guest, BASE + page);
            let one = GfnRange::from_len(Gfn::new(BASE + page), 1);
            let _ = guest.actor.mark_dirty(0, one).expect("no ring");
        }
        guest.host().take_batches();
        let mut seen = [0; 8];
        let peeked = guest.mmu.peek_log(&mut guest.actor, 0, 0, &mut seen).unwrap();
        assert_eq!(peeked.pages, 3);
        assert_eq!(guest.host().take_batches(), [], "who takes a bit flushes, a look does not");
        let clear = |guest: &mut Guest<Ept>, bits: &[u64; 8]| {
            let done = guest.mmu.clear_log(&mut guest.actor, (0, 0), 0, 512, bits).unwrap();
            (done.pages, guest.host().take_batches().len())
        };
        assert_eq!(clear(&mut guest, &[0, 0, 0, 0, 7 << 50, 0, 0, 0]), (0, 0));
        assert_eq!(clear(&mut guest, &[1 << 3, 0, 0, 0, 0, 0, 0, 0]), (1, 1));
        assert_eq!(harvest(&mut guest, 8).0.pages, 2);
        let batches = guest.host().take_batches();
        assert_eq!(batches.len(), 1);
        assert!(batches[0].covers(range(BASE + 70, BASE + 71)));
        guest.finish();
    }
}

/// Row 3.46, 8.12: with all bits set at first, enabling costs the same however much is mapped, and
/// the first harvest hands everything out.
#[test]
fn a_log_that_starts_all_set_is_enabled_without_a_look_at_any_entry() {
    let log_options = LogOptions { initially_set: true, ..LogOptions::default() };
    for tracking in WAYS {
        let costs = [1, 4 * M2].map(|mapped| {
            let mut guest = guest(shape(tracking, log_options), BASE, 4 * M2, Level::L1);
            guest.map(BASE..BASE + mapped, Write, Level::L1);
            let before = guest.host().lookups();
            log(&mut guest, BASE, 4 * M2, true);
            let cost = guest.host().lookups() - before;
            assert!(guest.found(BASE).unwrap().writable, "nothing is protected yet");
            let (done, words) = harvest(&mut guest, 32);
            assert_eq!((done.pages, words), (4 * M2, vec![u64::MAX; 32]));
            assert_eq!(harvest(&mut guest, 32).0.pages, 0);
            write(&mut guest, BASE);
            let one = GfnRange::from_len(Gfn::new(BASE), 1);
            if tracking == DirtyTracking::HardwareLog {
                let _ = guest.vcpu.log_hardware([one.start]).unwrap();
            }
            assert_eq!(harvest(&mut guest, 32).1[0], 1, "{tracking:?}");
            guest.finish();
            cost
        });
        assert_eq!(costs[0], costs[1], "{tracking:?}");
        assert!(costs[0] <= 1, "{costs:?}");
    }
}

/// A ring cannot say "all": with one, everything is protected, and the bits are set all the same.
#[test]
fn beside_a_ring_a_log_that_starts_all_set_protects_at_once() {
    let log_options = LogOptions { bitmap: true, initially_set: true, ..ring() };
    let shape = shape(DirtyTracking::WriteProtect, log_options);
    let mut guest = guest(shape, BASE, 64, Level::L1);
    guest.map([BASE + 9], Write, Level::L1);
    log(&mut guest, BASE, 64, true);
    assert!(!guest.found(BASE + 9).unwrap().writable);
    write(&mut guest, BASE + 9);
    let used = guest.vcpu.actor().ring().expect("a ring").consumer().map(|gfn| gfn.offset);
    assert_eq!(used.collect::<Vec<_>>(), [9]);
    assert_eq!(harvest(&mut guest, 1).1, [u64::MAX]);
    let _ = guest.mmu.reset_rings(&mut guest.actor).unwrap();
    guest.finish();
}

/// Rows 3.43, 3.46: a word of 64 pages may lie in two blocks of 2 MiB; both are split.
#[test]
fn a_word_across_two_huge_pages_protects_in_both() {
    let log_options = LogOptions { initially_set: true, ..LogOptions::default() };
    let mut options = TdpOptions::default();
    for (tracking, eager) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
        (options.dirty, options.eager_split) = (tracking, eager);
        let base = BASE + 480;
        let shape = Shape { options, log: log_options, ..Shape::new(Capabilities::ept()) };
        let mut guest = guest(shape, base, 2 * M2, Level::L2);
        // Blocks begin 32 pages into the slot and at the 544th page.
        guest.map([base + 40, base], Write, Level::L2);
        log(&mut guest, base, 2 * M2, true);
        assert_eq!(guest.entry(base + 40).0, Level::L2);
        let bits = [u64::MAX];
        let done = guest.mmu.clear_log(&mut guest.actor, (0, 0), 0, 64, &bits).unwrap();
        assert_eq!((done.pages, done.splits), (64, 1), "{tracking:?}");
        for page in [0, 32, 63, 64, 500] {
            let Some(found) = guest.found(base + page) else { continue };
            let (_, spte) = guest.entry(base + page);
            let armed = match tracking {
                DirtyTracking::WriteProtect => !found.writable,
                _ => !guest.config().is_dirty(spte),
            };
            assert_eq!((found.level, armed), (1, page < 64), "{tracking:?}: page {page}");
        }
        guest.check();
        guest.finish();
    }
}

/// Row 3.39, 3.21: without frames to split it, a huge leaf is protected as a whole, and its first
/// write splits it; never by the fast path.
#[test]
fn a_huge_page_that_cannot_be_split_is_protected_as_a_whole() {
    for tracking in WAYS {
        let mut guest = guest(shape(tracking, LogOptions::default()), BASE, 2 * M2, Level::L2);
        guest.map([BASE, BASE + M2], Write, Level::L2);
        while guest.actor.take_frame().is_some() {}
        let taken = guest.host().provides();
        guest.host().refuse(taken, u64::MAX);
        log(&mut guest, BASE, 2 * M2, true);
        let found = guest.found(BASE + M2).unwrap();
        assert_eq!((found.level, found.writable), (2, false), "{tracking:?}");
        guest.host().refuse(u64::MAX, u64::MAX);
        let fast = guest.stat(Counter::PfFast);
        assert_eq!(guest.fault(BASE + M2 + 5, Write, Level::L2), FaultOutcome::Fixed);
        assert_eq!(guest.stat(Counter::PfFast), fast);
        assert_eq!(guest.found(BASE + M2 + 5).unwrap().level, 1);
        let found = guest.found(BASE + M2 + 6).unwrap();
        assert_eq!((found.level, found.writable), (1, false), "its neighbours");
        assert_eq!(harvest(&mut guest, 16).1[8], 1 << 5, "{tracking:?}");
        // Frames that this test took out of the cache are not given back.
        let lost = guest.mmu.vm().pool().frames_in_use();
        assert!(lost > 0);
    }
}

/// Row 3.21: what the fast path grants, it marks.
#[test]
fn a_fast_fault_marks_the_page() {
    for (log_options, rings) in [(LogOptions::default(), 0), (ring(), 1)] {
        let shape = shape(DirtyTracking::WriteProtect, log_options);
        let mut guest = guest(shape, BASE, 64, Level::L1);
        guest.map(BASE..BASE + 64, Write, Level::L1);
        log(&mut guest, BASE, 64, true);
        let fast = guest.stat(Counter::PfFast);
        assert_eq!(guest.fault(BASE + 7, Write, Level::L1), FaultOutcome::Fixed);
        assert_eq!(guest.stat(Counter::PfFast), fast + 1);
        assert_eq!(guest.stat(Counter::PagesMarkedDirty), 1);
        let ring = guest.vcpu.actor().ring();
        assert_eq!(ring.map_or(0, |ring| ring.used()), rings);
        if rings == 0 {
            assert_eq!(harvest(&mut guest, 1).1, [1 << 7]);
        }
        guest.finish();
    }
}

/// Row 3.47: a full ring keeps the page protected, on the fast path and on the slow one.
#[test]
fn a_full_ring_stops_writes_until_it_is_reset() {
    let shape = shape(DirtyTracking::WriteProtect, ring());
    let mut guest = guest(shape, BASE, 2048, Level::L1);
    log(&mut guest, BASE, 2048, true);
    guest.map([BASE + 1500], Read, Level::L1);
    guest.map(BASE..BASE + 1024, Write, Level::L1);
    for page in [1500, 1600] {
        assert_eq!(guest.fault(BASE + page, Write, Level::L1), FaultOutcome::RingFull);
        assert!(guest.found(BASE + page).is_none_or(|found| !found.writable));
    }
    let error = guest.vcpu.log_hardware([Gfn::new(BASE + 9)]).unwrap_err();
    assert_eq!((error.next, error.full.entries), (Gfn::new(BASE + 9), 1024));
    // Nothing was harvested: nothing is freed.
    assert_eq!(guest.mmu.reset_rings(&mut guest.actor).unwrap().pages, 0);
    assert_eq!(guest.fault(BASE + 1500, Write, Level::L1), FaultOutcome::RingFull);
    let vm = Arc::clone(guest.mmu.vm());
    let pages: usize = vm.rings().iter().map(|ring| ring.consumer().count()).sum();
    guest.host().take_batches();
    let done = guest.mmu.reset_rings(&mut guest.actor).unwrap();
    assert_eq!((pages, done.pages), (1024, 1024));
    assert_eq!(guest.host().take_batches().len(), 1);
    assert!(!guest.found(BASE).unwrap().writable);
    assert_eq!(guest.fault(BASE + 1500, Write, Level::L1), FaultOutcome::Fixed);
    drop(vm);
    guest.finish();
}

/// Row 8.15: what others than vCPUs write, in both kinds of log.
#[test]
fn pages_that_the_host_writes_are_handed_out() {
    let log_options = LogOptions { bitmap: true, ..ring() };
    let shape = shape(DirtyTracking::WriteProtect, log_options);
    let mut guest = guest(shape, BASE, 200, Level::L1);
    assert_eq!(guest.actor.mark_dirty(0, GfnRange::ALL), Ok(0), "not logged");
    log(&mut guest, BASE, 200, true);
    assert_eq!(guest.actor.mark_dirty(0, range(BASE + 60, BASE + 70)), Ok(10));
    assert_eq!(guest.actor.mark_dirty(0, range(BASE + 190, u64::MAX)), Ok(10));
    assert_eq!(guest.actor.mark_dirty(1, GfnRange::ALL), Ok(0), "another space");
    let expected = [0xf << 60, 0x3f, 0, 0xc0];
    assert_eq!(harvest(&mut guest, 4).1[..2], expected[..2]);
    assert_eq!(guest.actor.ring().unwrap().used(), 20);
    guest.finish();
}

/// A slot may be large and what is logged of it small: marking costs what is logged.
#[test]
fn marking_costs_what_is_logged_not_what_there_is() {
    let pages = 1 << 30;
    let mut guest = guest(shape(DirtyTracking::WriteProtect, ring()), BASE, pages, Level::L1);
    let change = request(0, BASE, pages, DATA, SlotFlags::LOG_DIRTY);
    let _ = guest.set_slot_logging(&change, pages - 3..pages).unwrap();
    let start = Instant::now();
    assert_eq!(guest.actor.mark_dirty(0, GfnRange::ALL), Ok(3));
    assert!(start.elapsed() < Duration::from_secs(1));
    guest.finish();
}

/// A log of other pages of a slot that is logged already has the bits of the old one.
#[test]
fn other_pages_of_a_logged_slot_forget_nothing() {
    for tracking in [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit] {
        let base = BASE + 5;
        let mut guest = guest(shape(tracking, LogOptions::default()), base, 400, Level::L1);
        let change = request(0, base, 400, DATA + 5, SlotFlags::LOG_DIRTY);
        let _ = guest.set_slot_logging(&change, 30..200).unwrap();
        for page in [29, 30, 150, 199, 200] {
            write(&mut guest, base + page);
        }
        let _ = guest.set_slot_logging(&change, 100..333).unwrap();
        let (_, words) = harvest(&mut guest, 7);
        let has = |page: u64| words[(page / 64) as usize] >> (page % 64) & 1 == 1;
        assert_eq!([30, 150, 199, 201].map(has), [false, true, true, false], "{tracking:?}");
        write(&mut guest, base + 150);
        assert_eq!(harvest(&mut guest, 7).1, [0, 0, 1 << (150 - 128), 0, 0, 0, 0]);
        guest.finish();
    }
}

/// Limits of attributes go another way to an entry: it must be clean there too, or the CPU tells
/// nobody of the writes.
#[test]
fn a_page_that_is_read_is_clean_also_where_attributes_are_set() {
    for tracking in [DirtyTracking::DirtyBit, DirtyTracking::HardwareLog] {
        let mut guest = guest(shape(tracking, LogOptions::default()), BASE, 64, Level::L1);
        log(&mut guest, BASE, 64, true);
        let (mmu, actor) = (Arc::clone(&guest.mmu), &mut guest.actor);
        let elsewhere = range(BASE + 40, BASE + 41);
        let _ = mmu
            .set_attributes(
                guest.slots.lock().unwrap().attributes(),
                actor,
                elsewhere,
                Attributes::PRIVATE,
            )
            .expect("a change");
        guest.map([BASE + 3], Read, Level::L1);
        let (_, spte) = guest.entry(BASE + 3);
        assert!(guest.config().is_writable(spte) && !guest.config().is_dirty(spte), "{tracking:?}");
        assert_eq!(harvest(&mut guest, 1).0.pages, 0);
        drop(mmu);
        guest.finish();
    }
}

/// Where D is the log, nothing that takes a dirty leaf away may forget it.
#[test]
fn dirty_bits_that_go_away_are_kept_in_the_log() {
    let shape = shape(DirtyTracking::DirtyBit, LogOptions::default());
    let mut guest = guest(shape, BASE, 128, Level::L1);
    log(&mut guest, BASE, 128, true);
    write(&mut guest, BASE + 7);
    write(&mut guest, BASE + 70);
    assert_eq!(guest.unmap(range(BASE, BASE + 64)).dirty, 1);
    assert_eq!(harvest(&mut guest, 2).1, [1 << 7, 1 << 6]);
    write(&mut guest, BASE + 1);
    let _ = guest.mmu.invalidate_roots(&mut guest.actor).finish(&mut guest.actor);
    assert_eq!(harvest(&mut guest, 2).1, [u64::MAX; 2], "nobody knows which");
    let _ = guest.vcpu.load_root().unwrap();
    assert_eq!(harvest(&mut guest, 2).0.pages, 0);
    guest.finish();
}

/// Splitting a long range gives way, also where nothing is left to split.
#[test]
fn a_split_of_small_pages_only_is_sliced() {
    let blocks = 600;
    let shape = Shape { frames: 1300, ..Shape::new(Capabilities::ept()) };
    let mut guest = guest(shape, BASE, blocks * M2, Level::L1);
    guest.map((0..blocks).map(|block| BASE + block * M2), Write, Level::L1);
    let all = range(BASE, BASE + blocks * M2);
    let done = guest.mmu.split(&mut guest.actor, 0, all);
    assert_eq!((done.splits, done.out_of_frames), (0, None));
    assert_eq!(guest.stat(Counter::MaxSlice), 512, "and then somebody else");
    guest.finish();
}

/// Each address space has its own log and its own trees.
#[test]
fn the_log_of_one_space_leaves_the_other_alone() {
    let options = LogOptions::default();
    let shape = Shape { spaces: 2, ..shape(DirtyTracking::WriteProtect, options) };
    let mut guest = guest(shape, BASE, 64, Level::L1);
    let second = SlotRequest { as_id: 1, ..request(0, BASE, 64, DATA, SlotFlags::LOG_DIRTY) };
    let _ = guest.set_slot(&second).unwrap();
    log(&mut guest, BASE, 64, true);
    let mut smm = TdpVcpu::new(&guest.mmu, 1).unwrap();
    let root = smm.load_root().unwrap().address().get();
    guest.map([BASE + 1], Write, Level::L1);
    let _ = smm.fault(&PageFault::new(gpa(BASE + 2), code(Write, false))).unwrap();
    assert_eq!(harvest(&mut guest, 1).1, [1 << 1]);
    assert!(guest.found_in(root, BASE + 2).unwrap().writable);
    assert!(!guest.found(BASE + 1).unwrap().writable);
    let mut words = [0];
    let _ = guest.mmu.harvest_log(&mut guest.actor, 1, 0, &mut words).unwrap();
    assert_eq!(words, [1 << 2]);
    assert!(!guest.found_in(root, BASE + 2).unwrap().writable);
    drop(smm);
    guest.finish();
}

/// Row 3.45: which ranges of pages may be cleared; and what else is refused, with nothing changed.
#[test]
fn arguments_that_make_no_sense_are_refused_and_change_nothing() {
    let mut guest =
        guest(shape(DirtyTracking::WriteProtect, LogOptions::default()), BASE, 200, Level::L1);
    log(&mut guest, BASE, 200, true);
    write(&mut guest, BASE + 199);
    let words = [u64::MAX; 4];
    let none = LogError::NoSuchSlot { as_id: 3, id: 9 };
    let mut out = [7; 4];
    assert_eq!(guest.mmu.harvest_log(&mut guest.actor, 3, 9, &mut out), Err(none));
    assert_eq!(guest.mmu.peek_log(&mut guest.actor, 3, 9, &mut out), Err(none));
    let size = LogError::BufferSize { words: 3, wanted: 4 };
    assert_eq!(guest.mmu.harvest_log(&mut guest.actor, 0, 0, &mut out[..3]), Err(size));
    assert_eq!(guest.mmu.peek_log(&mut guest.actor, 0, 0, &mut out[..3]), Err(size));
    assert_eq!(guest.mmu.reset_rings(&mut guest.actor), Err(LogError::NoRings));
    assert_eq!(out, [7; 4]);
    let illegal = [
        (1, 64),
        (63, 64),
        (0, 63),
        (0, 65),
        (0, 201),
        (64, 137),
        (256, 0),
        (192, 9),
        (u64::MAX, 1),
        (u64::MAX - 63, 64),
        (0, u64::MAX),
        (64, u64::MAX - 63),
        (1 << 63, 1 << 63),
    ];
    for (first, pages) in illegal {
        let error = LogError::ClearRange { first, pages, slot_pages: 200 };
        let result = guest.mmu.clear_log(&mut guest.actor, (0, 0), first, pages, &words);
        assert_eq!(result, Err(error), "{first} {pages}");
        assert!(error.to_string().contains(&first.to_string()));
    }
    let legal = [(0, 0, 0), (0, 64, 1), (0, 200, 4), (64, 64, 1), (64, 136, 3), (192, 0, 0)];
    for (first, pages, count) in legal {
        let few = &[0; 5][..count + 1];
        let wrong = LogError::BufferSize { words: count + 1, wanted: count };
        let actor = &mut guest.actor;
        assert_eq!(guest.mmu.clear_log(actor, (0, 0), first, pages, few), Err(wrong));
        let done = guest.mmu.clear_log(actor, (0, 0), first, pages, &few[..count]).unwrap();
        assert_eq!(done.pages, 0);
    }
    // Bits beyond the slot's end mean nothing; the one page is still there.
    let done = guest.mmu.clear_log(&mut guest.actor, (0, 0), 192, 8, &[u64::MAX]).unwrap();
    assert_eq!(done.pages, 1);
    log(&mut guest, BASE, 200, false);
    let off = LogError::NotLogged { as_id: 0, id: 0 };
    assert_eq!(guest.mmu.harvest_log(&mut guest.actor, 0, 0, &mut out), Err(off));
    guest.finish();
    let mut guest = self::guest(shape(DirtyTracking::WriteProtect, ring()), BASE, 200, Level::L1);
    log(&mut guest, BASE, 200, true);
    assert_eq!(guest.mmu.harvest_log(&mut guest.actor, 0, 0, &mut out), Err(LogError::NoBitmap));
    guest.finish();
}

/// Ranges of pages to be logged that no slot has.
#[test]
fn only_pages_of_the_slot_can_be_logged() {
    let mut guest =
        guest(shape(DirtyTracking::WriteProtect, LogOptions::default()), BASE, 100, Level::L1);
    let change = request(0, BASE, 100, DATA, SlotFlags::LOG_DIRTY);
    let ends = [(0, 0), (5, 5), (9, 3), (0, 101), (100, 101), (u64::MAX, u64::MAX), (0, u64::MAX)];
    for (start, end) in ends {
        let error = SlotError::LogRange { start, end, pages: 100 };
        assert_eq!(guest.set_slot_logging(&change, start..end), Err(error));
    }
    let mut out = [0; 2];
    let off = Err(LogError::NotLogged { as_id: 0, id: 0 });
    assert_eq!(guest.mmu.harvest_log(&mut guest.actor, 0, 0, &mut out), off, "nothing changed");
    let _ = guest.set_slot_logging(&change, 99..100).unwrap();
    guest.map(BASE..BASE + 100, Write, Level::L1);
    assert_eq!(harvest(&mut guest, 2).1, [0, 1 << (99 - 64)]);
    guest.finish();
}

/// Read-only slots may be logged: nothing but the host writes there.
#[test]
fn a_read_only_slot_is_logged_for_the_host() {
    for tracking in WAYS {
        let mut guest = Guest::<Ept>::with(shape(tracking, LogOptions::default()));
        let both = SlotFlags::READ_ONLY | SlotFlags::LOG_DIRTY;
        guest.slot(0, BASE, 64, DATA, both);
        guest.map([BASE + 1], Read, Level::L1);
        assert!(matches!(guest.fault(BASE + 1, Write, Level::L1), FaultOutcome::Emulate(_)));
        assert_eq!(harvest(&mut guest, 1).0.pages, 0);
        assert_eq!(guest.actor.mark_dirty(0, range(BASE + 2, BASE + 3)), Ok(1));
        assert_eq!(harvest(&mut guest, 1).1, [1 << 2]);
        guest.finish();
    }
}

fn core<F: Modelled>(guest: &mut Guest<F>) -> Arc<Mutex<Core>> {
    let root = guest.vcpu.load_root().unwrap().address().get();
    guest.host().add_core(SoftCpu::new(&guest.format, root, Caches::unlimited()))
}

/// Rows 0.2.2, 0.2.3: with the flush thrown away the processor goes on writing unseen.
#[test]
fn writes_through_stale_translations_are_missed_without_the_flush() {
    for tracking in [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit] {
        for forget in [false, true] {
            let mut guest = guest(shape(tracking, LogOptions::default()), BASE, 64, Level::L1);
            log(&mut guest, BASE, 64, true);
            let core = core(&mut guest);
            let mut seen = [0; 2];
            for seen in &mut seen {
                for _ in 0..2 {
                    let access = mmu_model::Access::user(Write);
                    let mut core = core.lock().unwrap();
                    if core.cpu.access(guest.mmu.vm().host(), (BASE + 4) << 12, access).is_ok() {
                        break;
                    }
                    drop(core);
                    guest.map([BASE + 4], Write, Level::L1);
                }
                if forget {
                    guest.host().forget_flushes();
                }
                *seen = harvest(&mut guest, 1).0.pages;
            }
            assert_eq!(seen, [1, u64::from(!forget)], "{tracking:?}");
            guest.finish();
        }
    }
}

/// Row B37: a creation with a log that is refused late leaves no slot and no log.
#[test]
fn a_slot_that_is_refused_leaves_no_log() {
    let mut guest = Guest::<Npt>::new(Capabilities::npt());
    let log = SlotFlags::LOG_DIRTY;
    let legal = request(0, BASE, 64, DATA, log);
    let pages = 3..65;
    let error = SlotError::LogRange { start: 3, end: 65, pages: 64 };
    assert_eq!(guest.set_slot_logging(&legal, pages), Err(error));
    guest.slot(1, BASE, 64, DATA, SlotFlags::empty());
    assert!(guest.set_slot(&SlotRequest { hva: Hva::new(1 << 40), ..legal }).is_err(), "overlap");
    let none = LogError::NoSuchSlot { as_id: 0, id: 0 };
    assert_eq!(guest.mmu.harvest_log(&mut guest.actor, 0, 0, &mut [0]), Err(none));
    guest.finish();
}
