//! The software machine of `examples/mini_vmm`, on page tables made by hand: what every scenario
//! takes for granted. Staleness included: a translation stays until a flush names it.

#[path = "../examples/mini_vmm/machine.rs"]
#[allow(dead_code, reason = "no flush by physical pages, memory looked at by a way of its own")]
mod machine;
#[path = "../examples/mini_vmm/soft/mod.rs"]
#[allow(dead_code, reason = "its caches for other CPUs are used elsewhere")]
mod soft;

use std::cell::Cell;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use machine::{
    Churn, Command, Exit, Flush, Layout, Machine, MachineError, Op, PAGE, Report, Vcpu, content,
};
use mmu_model::{Caches, Capacity, Ept, Format, Legacy, Mode, Npt};
use soft::SoftMachine;

/// First linear page of the guest's data; linear page `DATA + n` is meant for data page `n`.
const DATA: u64 = 0x10_0000;
/// Pages of one level 1 table.
const REACH: u64 = 512;
/// Nothing here takes longer than seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the tests need to know of a format.
#[derive(Clone, Copy, Debug)]
struct Bits {
    format: Format,
    /// Everything granted, in leaves (with the memory type) and in links.
    leaf: u64,
    link: u64,
    write: u64,
    accessed: u64,
    dirty: u64,
}

fn formats() -> [Bits; 4] {
    let legacy = Bits {
        format: Format::Legacy(Legacy::new(Mode::Long4)),
        leaf: 7,
        link: 7,
        write: 2,
        accessed: 1 << 5,
        dirty: 1 << 6,
    };
    let ept = Bits {
        format: Format::Ept(Ept::new()),
        leaf: 7 | 6 << 3,
        link: 7,
        write: 2,
        accessed: 1 << 8,
        dirty: 1 << 9,
    };
    let ept_plain = Bits {
        format: Format::Ept(Ept { accessed_dirty: false, ..Ept::new() }),
        accessed: 0,
        dirty: 0,
        ..ept
    };
    let npt = Bits { format: Format::Npt(Npt::new()), ..legacy };
    [legacy, npt, ept, ept_plain]
}

/// A machine and tables made by hand: root, one table each of level 3 and 2, then a level 1 table
/// for each 512 data pages.
struct World {
    machine: SoftMachine,
    bits: Bits,
    layout: Layout,
    spare: AtomicU64,
}

impl World {
    fn new(bits: Bits, data_pages: u64, vcpus: u32) -> Self {
        Self::with_caches(bits, data_pages, vcpus, Caches::unlimited())
    }

    fn with_caches(bits: Bits, data_pages: u64, vcpus: u32, caches: Caches) -> Self {
        let level_1 = data_pages.div_ceil(REACH);
        let tables = 0..3 + level_1 + 8;
        let data = tables.end..tables.end + data_pages;
        let layout = Layout { stub: 0..0, tables, data };
        let world = Self {
            machine: SoftMachine::with_caches(&layout, vcpus, bits.format, caches).unwrap(),
            bits,
            layout,
            spare: AtomicU64::new(3 + level_1),
        };
        world.store(0, index(DATA, 4), PAGE | bits.link);
        world.store(1, index(DATA, 3), (2 * PAGE) | bits.link);
        for n in 0..level_1 {
            world.link(n, 3 + n);
        }
        world
    }

    fn word(&self, page: u64, offset: u64) -> &AtomicU64 {
        let memory = self.machine.memory();
        let byte = page * PAGE + offset;
        assert!(byte + 8 <= memory.len && byte % 8 == 0);
        let place = memory.base.wrapping_add(usize::try_from(byte).unwrap());
        // SAFETY: inside the mapping, which lives as long as the machine, hence as long as `self`;
        // 8-byte aligned; memory of the machine is accessed atomically only.
        unsafe { AtomicU64::from_ptr(place.cast()) }
    }

    fn store(&self, table: u64, index: u64, entry: u64) {
        self.word(table, index * 8).store(entry, Ordering::Release);
    }

    /// The level 1 entry of data page `n`, found through the level 2 table.
    fn leaf(&self, n: u64) -> &AtomicU64 {
        let level_2 = self.word(2, index(DATA + n, 2) * 8);
        let table = (level_2.load(Ordering::Acquire) & 0xf_ffff_ffff_f000) / PAGE;
        self.word(table, index(DATA + n, 1) * 8)
    }

    /// Make table `page` the one for data pages `512 n` and on.
    fn link(&self, n: u64, page: u64) {
        let place = index(DATA + n * REACH, 2);
        self.store(2, place, (page * PAGE) | self.bits.link);
    }

    /// Map data page `n` where it belongs.
    fn map(&self, n: u64) {
        self.map_to(n, n, self.bits.leaf);
    }

    fn map_to(&self, n: u64, target: u64, flags: u64) {
        let entry = ((self.layout.data.start + target) * PAGE) | flags;
        self.leaf(n).store(entry, Ordering::Release);
    }

    fn vcpu(&self, id: u32) -> Box<dyn Vcpu> {
        let mut vcpu = self.machine.vcpu(id).unwrap();
        vcpu.set_root(0).unwrap();
        vcpu
    }

    fn flush(&self, gfns: &[std::ops::Range<u64>], tables: &[u64]) {
        let flush = Flush { gfns, pfns: &[], tables, everything: false };
        self.machine.flush(&flush).unwrap();
    }

    fn flush_everything(&self) {
        let flush = Flush { gfns: &[], pfns: &[], tables: &[], everything: true };
        self.machine.flush(&flush).unwrap();
    }
}

/// Ends the other threads of a scope also when an assertion fails, so that the failure is reported.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Index of a linear page in its table of `level`.
fn index(page: u64, level: u32) -> u64 {
    page >> (9 * (level - 1)) & 511
}

fn command(op: Op, first: u64, pages: u64) -> Command {
    Command { op, start: (DATA + first) * PAGE, pages, stride: 1, tag: 0x7a67, rounds: 1 }
}

/// Start a command and run it to its first exit.
fn once(vcpu: &mut dyn Vcpu, command: &Command) -> Exit {
    vcpu.start(command).unwrap();
    vcpu.run().unwrap()
}

/// Run a command that must not fault.
#[track_caller]
fn finish(vcpu: &mut dyn Vcpu, op: Op, first: u64, pages: u64) {
    match once(vcpu, &command(op, first, pages)) {
        Exit::Done(report) => assert_eq!((report.pages, report.mismatches), (pages, 0)),
        exit => panic!("{exit:?}"),
    }
}

/// Start a command and serve its faults by `serve(gva, error)`. Gives report and faults.
fn drive(vcpu: &mut dyn Vcpu, command: &Command, serve: impl Fn(u64, u32)) -> (Report, u64) {
    vcpu.start(command).unwrap();
    let mut faults = 0;
    loop {
        match vcpu.run().unwrap() {
            Exit::Done(report) => return (report, faults),
            Exit::Fault { gva, error } => {
                faults += 1;
                assert!(faults <= command.pages * 4, "a fault that does not end");
                serve(gva, error);
            }
            Exit::Kicked => {}
        }
    }
}

#[test]
fn demand_paging_on_two_threads() {
    const PAGES: u64 = 8 * REACH;
    for bits in formats() {
        let world = World::new(bits, 2 * PAGES, 2);
        thread::scope(|scope| {
            for id in 0..2 {
                let world = &world;
                scope.spawn(move || {
                    let mut vcpu = world.vcpu(id);
                    let first = u64::from(id) * PAGES;
                    let serve = |gva: u64, error| {
                        assert_eq!(error, 6, "a user write to an absent page");
                        assert_eq!(gva % PAGE, 0);
                        world.map(gva / PAGE - DATA);
                    };
                    let write = command(Op::Write, first, PAGES);
                    let (report, faults) = drive(vcpu.as_mut(), &write, serve);
                    assert_eq!((report.pages, faults), (PAGES, PAGES));
                    // What the other thread does to its pages is none of our business.
                    finish(vcpu.as_mut(), Op::Verify, first, PAGES);
                    finish(vcpu.as_mut(), Op::Increment, first, PAGES);
                });
            }
        });
        for n in 0..2 * PAGES {
            let gva = (DATA + n) * PAGE;
            let page = world.layout.data.start + n;
            let word = |offset| world.word(page, offset).load(Ordering::Acquire);
            assert_eq!(word(0), content(gva, 0x7a67));
            assert_eq!((word(2048), word(8)), (content(gva, 0x7a67), 1));
            let flags = bits.accessed | bits.dirty;
            assert_eq!(world.leaf(n).load(Ordering::Acquire) & flags, flags);
        }
    }
}

#[test]
fn a_stale_leaf_stays_until_flushed() {
    for bits in formats() {
        let world = World::new(bits, REACH, 2);
        let mut vcpus = [world.vcpu(0), world.vcpu(1)];
        (0..4).for_each(|n| world.map(n));
        for vcpu in &mut vcpus {
            finish(vcpu.as_mut(), Op::Write, 0, 4);
        }
        (0..4).for_each(|n| world.leaf(n).store(0, Ordering::Release));
        for vcpu in &mut vcpus {
            finish(vcpu.as_mut(), Op::Verify, 0, 4);
        }
        world.flush(&[DATA + 1..DATA + 2, DATA + 3..DATA + 4], &[]);
        for vcpu in &mut vcpus {
            finish(vcpu.as_mut(), Op::Verify, 0, 1);
            finish(vcpu.as_mut(), Op::Verify, 2, 1);
            for gone in [1, 3] {
                let gva = (DATA + gone) * PAGE;
                let exit = once(vcpu.as_mut(), &command(Op::Verify, gone, 1));
                assert_eq!(exit, Exit::Fault { gva, error: 4 });
                world.map(gone);
                assert!(matches!(vcpu.run().unwrap(), Exit::Done(_)));
                world.leaf(gone).store(0, Ordering::Release);
            }
        }
        world.flush_everything();
        for vcpu in &mut vcpus {
            let exit = once(vcpu.as_mut(), &command(Op::Read, 0, 1));
            assert!(matches!(exit, Exit::Fault { error: 4, .. }));
        }
    }
}

#[test]
fn a_stale_table_stays_until_it_is_named() {
    for bits in formats() {
        let world = World::new(bits, REACH, 1);
        let mut vcpu = world.vcpu(0);
        (0..8).for_each(|n| world.map(n));
        finish(vcpu.as_mut(), Op::Read, 0, 1);
        // A second table, where everything leads to data page 100.
        let old = 3;
        let new = world.spare.fetch_add(1, Ordering::Relaxed);
        world.link(0, new);
        (0..8).for_each(|n| world.map_to(n, 100, bits.leaf));
        let via_new = |n| world.word(world.layout.data.start + n, 0);
        via_new(100).store(0, Ordering::Release);

        // Pages 1 and 2 are in no TLB, but the cached way leads to the old table.
        finish(vcpu.as_mut(), Op::Write, 1, 1);
        assert_ne!(via_new(1).load(Ordering::Acquire), 0, "written through the old table");
        // Not pages: a flush that names one forgets the ways to its table too.
        world.flush(&[], &[new]);
        finish(vcpu.as_mut(), Op::Write, 2, 1);
        assert_ne!(via_new(2).load(Ordering::Acquire), 0, "another table was named");
        world.flush(&[], &[old]);
        finish(vcpu.as_mut(), Op::Write, 3, 1);
        assert_eq!(via_new(3).load(Ordering::Acquire), 0);
        assert_ne!(via_new(100).load(Ordering::Acquire), 0, "written through the new table");
        // The leaf found through the old table is still there; only its page names it.
        finish(vcpu.as_mut(), Op::Verify, 2, 1);
    }
}

#[test]
fn accessed_comes_back_only_after_a_flush() {
    for bits in formats() {
        let world = World::new(bits, REACH, 1);
        let mut vcpu = world.vcpu(0);
        (0..2).for_each(|n| world.map(n));
        let young = |n| world.leaf(n).load(Ordering::Acquire) & bits.accessed;
        finish(vcpu.as_mut(), Op::Read, 0, 2);
        assert_eq!((young(0), young(1)), (bits.accessed, bits.accessed));
        for n in 0..2 {
            world.leaf(n).fetch_and(!bits.accessed, Ordering::AcqRel);
        }
        finish(vcpu.as_mut(), Op::Read, 0, 2);
        assert_eq!((young(0), young(1)), (0, 0));
        world.flush(slice::from_ref(&(DATA..DATA + 1)), &[]);
        finish(vcpu.as_mut(), Op::Read, 0, 2);
        assert_eq!((young(0), young(1)), (bits.accessed, 0));
    }
}

#[test]
fn the_first_write_sets_dirty_behind_a_cached_clean_page() {
    for bits in formats() {
        let world = World::new(bits, REACH, 1);
        let mut vcpu = world.vcpu(0);
        world.map(0);
        let dirty = || world.leaf(0).load(Ordering::Acquire) & bits.dirty;
        finish(vcpu.as_mut(), Op::Read, 0, 1);
        assert_eq!(dirty(), 0);
        finish(vcpu.as_mut(), Op::Write, 0, 1);
        assert_eq!(dirty(), bits.dirty);
        world.leaf(0).fetch_and(!bits.dirty, Ordering::AcqRel);
        finish(vcpu.as_mut(), Op::Write, 0, 1);
        assert_eq!(dirty(), 0, "cached as dirty");
        world.flush(slice::from_ref(&(DATA..DATA + 1)), &[]);
        finish(vcpu.as_mut(), Op::Write, 0, 1);
        assert_eq!(dirty(), bits.dirty);
    }
}

#[test]
fn a_cpu_logs_the_pages_that_it_dirties() {
    for bits in formats().into_iter().filter(|bits| bits.dirty != 0) {
        let world = World::new(bits, REACH, 2);
        world.machine.log_dirtied();
        let mut vcpu = world.vcpu(0);
        (0..REACH).for_each(|n| world.map(n));
        finish(vcpu.as_mut(), Op::Read, 0, 8);
        assert_eq!(vcpu.take_log(), []);
        finish(vcpu.as_mut(), Op::Write, 2, 3);
        finish(vcpu.as_mut(), Op::Write, 0, 4);
        assert_eq!(vcpu.take_log(), [2, 3, 4, 0, 1].map(|n| DATA + n), "each page once");
        // Clean again, but for the CPU that has it cached as dirty.
        world.leaf(3).fetch_and(!bits.dirty, Ordering::AcqRel);
        finish(vcpu.as_mut(), Op::Write, 3, 1);
        assert_eq!(vcpu.take_log(), []);
        world.flush(slice::from_ref(&(DATA + 3..DATA + 4)), &[]);
        finish(vcpu.as_mut(), Op::Write, 3, 1);
        assert_eq!(vcpu.take_log(), [DATA + 3]);
        // The guest is left before the log of a real CPU would be full.
        vcpu.start(&command(Op::Write, 0, REACH)).unwrap();
        let mut logged = 0;
        while let Exit::Kicked = vcpu.run().unwrap() {
            let log = vcpu.take_log().len();
            assert!((1..512).contains(&log));
            logged += log;
        }
        assert_eq!(logged as u64 + vcpu.take_log().len() as u64, REACH - 5);
    }
}

#[test]
fn error_codes() {
    for bits in formats() {
        let world = World::new(bits, REACH, 1);
        let mut vcpu = world.vcpu(0);
        let gva = DATA * PAGE;
        let mut fault = |op: Op, entry: u64| {
            world.leaf(0).store(entry, Ordering::Release);
            world.flush_everything();
            let seen = Cell::new(0);
            let serve = |at, error| {
                assert_eq!(at, gva);
                seen.set(error);
                world.map(0);
            };
            assert_eq!(drive(vcpu.as_mut(), &command(op, 0, 1), serve).1, 1);
            seen.get()
        };
        let page = world.layout.data.start * PAGE;
        let read_only = page | bits.leaf & !bits.write;
        assert_eq!(fault(Op::Read, 0), 4);
        assert_eq!(fault(Op::Write, 0), 6);
        assert_eq!(fault(Op::Write, read_only), 7);
        assert_eq!(fault(Op::Read, page | bits.leaf | 1 << 51), 0xd);
        assert_eq!(fault(Op::Write, page | bits.leaf | 1 << 51), 0xf);
    }
}

#[test]
fn mismatches_are_counted() {
    let world = World::new(formats()[0], REACH, 1);
    let mut vcpu = world.vcpu(0);
    (0..100).for_each(|n| world.map(n));
    finish(vcpu.as_mut(), Op::Write, 0, 100);
    let start = world.layout.data.start;
    world.word(start + 40, 0).store(1, Ordering::Release);
    world.word(start + 60, 2048).store(1, Ordering::Release);
    world.word(start + 70, 8).store(1, Ordering::Release);
    let verify = Command { rounds: 3, ..command(Op::Verify, 0, 100) };
    let expected = Report { pages: 300, mismatches: 6, first_mismatch: (DATA + 40) * PAGE };
    assert_eq!(once(vcpu.as_mut(), &verify), Exit::Done(expected));
    // Every 20th page: 0, 20, 40, 60, 80.
    let strided = Command { stride: 20, pages: 5, ..verify };
    let expected = Report { pages: 15, mismatches: 6, ..expected };
    assert_eq!(once(vcpu.as_mut(), &strided), Exit::Done(expected));
    let nothing = command(Op::Write, 0, 0);
    assert_eq!(once(vcpu.as_mut(), &nothing), Exit::Done(Report::default()));
}

/// What churn left on page `n` of a range whose control page says `end`, found by doing the steps
/// one by one; and that the formula of the VMM says the same.
fn last_visits(churn: &Churn, pages: u64, end: u64) -> Vec<Option<u64>> {
    let round = churn.round(pages).unwrap();
    let mut last = vec![None; usize::try_from(pages).unwrap()];
    for step in 0..end {
        let other = step.wrapping_mul(churn.multiplier).wrapping_add(churn.offset) % round;
        if let Some(visit) = last.get_mut(usize::try_from(other + 1).unwrap()) {
            *visit = Some(step);
        }
    }
    for (n, visit) in last.iter().enumerate().skip(1) {
        assert_eq!(churn.last_visit(round, n as u64, end), *visit, "page {n}, {end} steps");
    }
    last
}

#[test]
fn churn_stops_anywhere_and_goes_on_from_guest_memory_alone() {
    const PAGES: u64 = 300;
    let churn = Churn { multiplier: 0x9e37_79b9, offset: 77, written: 64, delay: 1 };
    for bits in formats() {
        let world = World::new(bits, REACH, 2);
        let whole =
            |rounds| Command { op: Op::Churn(churn), rounds, ..command(Op::Read, 0, PAGES) };
        let check = |end: u64| {
            assert_eq!(world.word(world.layout.data.start, 0).load(Ordering::Acquire), end);
            let mut written = 0;
            for (n, visit) in last_visits(&churn, PAGES, end).into_iter().enumerate().skip(1) {
                let n = n as u64;
                let word = |at| world.word(world.layout.data.start + n, at).load(Ordering::Acquire);
                let expected = match visit.filter(|_| churn.writes(n)) {
                    Some(step) => (step, content((DATA + n) * PAGE, step)),
                    None => (0, 0),
                };
                assert_eq!((word(0), word(2048)), expected, "page {n} after {end} steps");
                written += u64::from(expected.1 != 0);
            }
            written
        };
        let serve = |gva: u64, _| world.map(gva / PAGE - DATA);
        let mut vcpu = world.vcpu(0);
        // A range of 300 pages: the control page and 299 others, so 512 steps make a round.
        assert_eq!(drive(vcpu.as_mut(), &whole(1), serve).1, PAGES);
        assert!((100..200).contains(&check(512)), "half of the pages");
        // Another vCPU, which has no state of it, goes on.
        let mut other = world.vcpu(1);
        let (report, _) = drive(other.as_mut(), &whole(3), serve);
        assert_eq!(report.pages, 1024);
        check(3 * 512);
        assert_eq!(drive(vcpu.as_mut(), &whole(3), serve).0.pages, 0);
    }
}

#[test]
fn a_kick_ends_runs_and_is_not_remembered() {
    let world = World::new(formats()[0], REACH, 2);
    (0..REACH).for_each(|n| world.map(n));
    // A kick before `run` does nothing to it.
    let mut vcpu = world.vcpu(0);
    world.machine.kick_all();
    finish(vcpu.as_mut(), Op::Write, 0, REACH);

    let (out, exits) = mpsc::channel();
    thread::scope(|scope| {
        let world = &world;
        scope.spawn(move || {
            // Minutes of work, not eternity: a lost kick must fail the test, not hang it.
            let endless = Command { rounds: 20_000_000, ..command(Op::Verify, 0, REACH) };
            let _ = out.send(once(vcpu.as_mut(), &endless));
            let _ = out.send(vcpu.run().unwrap());
        });
        for _ in 0..2 {
            let deadline = Instant::now() + PATIENCE;
            // A kick may come before `run` is entered, so kick until the vCPU comes out.
            let exit = loop {
                world.machine.kick_all();
                match exits.recv_timeout(Duration::from_millis(1)) {
                    Ok(exit) => break exit,
                    Err(_) => assert!(Instant::now() < deadline, "the kick was ignored"),
                }
            };
            assert_eq!(exit, Exit::Kicked);
        }
    });
}

#[test]
fn flushes_are_complete_while_vcpus_run() {
    const PAGES: u64 = REACH;
    for bits in formats() {
        let world = World::new(bits, 3 * PAGES, 2);
        (0..PAGES).for_each(|n| world.map(n));
        let stop = AtomicBool::new(false);
        let rounds = AtomicU64::new(0);
        thread::scope(|scope| {
            let (world, stop, rounds) = (&world, &stop, &rounds);
            scope.spawn(move || {
                let mut vcpu = world.vcpu(0);
                while !stop.load(Ordering::Acquire) {
                    match once(vcpu.as_mut(), &command(Op::Write, 0, PAGES)) {
                        Exit::Done(_) => rounds.fetch_add(1, Ordering::AcqRel),
                        exit => panic!("{exit:?}"),
                    };
                }
            });
            let _stop = StopOnDrop(stop);
            let deadline = Instant::now() + PATIENCE;
            for round in 1..200 {
                // Everything moves to other pages; after the flush nobody writes the old ones.
                let (from, to) = if round % 2 == 1 { (0, PAGES) } else { (PAGES, 0) };
                (0..PAGES).for_each(|n| world.map_to(n, to + n, bits.leaf));
                world.flush(slice::from_ref(&(DATA..DATA + PAGES)), &[]);
                let start = world.layout.data.start;
                for n in 0..PAGES {
                    world.word(start + from + n, 0).store(7, Ordering::Release);
                }
                let seen = rounds.load(Ordering::Acquire);
                while rounds.load(Ordering::Acquire) < seen + 2 {
                    assert!(Instant::now() < deadline, "the vCPU starves");
                    thread::yield_now();
                }
                for n in 0..PAGES {
                    let word = |base| world.word(start + base + n, 0).load(Ordering::Acquire);
                    assert_eq!(word(from), 7, "written after the flush, round {round}");
                    assert_eq!(word(to), content((DATA + n) * PAGE, 0x7a67));
                }
            }
        });
    }
}

#[test]
fn bounded_caches_work_as_well() {
    let caches = Caches { tlb: Capacity::Entries(64), psc: Capacity::Entries(4), seed: 1 };
    for bits in formats() {
        let world = World::with_caches(bits, 4 * REACH, 1, caches);
        let mut vcpu = world.vcpu(0);
        let serve = |gva: u64, _| world.map(gva / PAGE - DATA);
        let write = command(Op::Write, 0, 4 * REACH);
        assert_eq!(drive(vcpu.as_mut(), &write, serve).1, 4 * REACH);
        finish(vcpu.as_mut(), Op::Verify, 0, 4 * REACH);
    }
}

#[test]
fn what_the_machine_refuses() {
    let world = World::new(formats()[0], REACH, 1);
    let refused = |result: Result<(), MachineError>| {
        assert!(matches!(result, Err(MachineError::Unsupported { .. })));
    };
    refused(world.machine.vcpu(1).map(|_| ()));
    let mut vcpu = world.machine.vcpu(0).unwrap();
    refused(world.machine.vcpu(0).map(|_| ()));
    refused(vcpu.run().map(|_| ()));
    refused(vcpu.set_root(world.layout.data.end));
    let good = command(Op::Read, 0, 1);
    let churn = Churn { multiplier: 1, offset: 0, written: 128, delay: 0 };
    for bad in [
        Command { stride: 0, ..good },
        Command { rounds: 0, ..good },
        Command { start: 8, ..good },
        Command { pages: u64::MAX, ..good },
        Command { stride: u64::MAX, pages: 2, ..good },
        Command { op: Op::Churn(churn), pages: 1, ..good },
        Command { op: Op::Churn(churn), pages: 4, rounds: u64::MAX, ..good },
        Command { op: Op::Churn(Churn { multiplier: 2, ..churn }), pages: 4, ..good },
    ] {
        refused(vcpu.start(&bad));
    }
    vcpu.start(&good).unwrap();
    refused(vcpu.start(&good));
    refused(vcpu.run().map(|_| ()));
    let empty = Layout { stub: 0..0, tables: 0..0, data: 0..0 };
    refused(SoftMachine::new(&empty, 1, world.bits.format).map(|_| ()));
    assert_eq!(world.machine.name(), "soft");
    assert!(world.machine.pinned().is_empty());
    assert!(world.machine.description().contains("4-level long-mode"));
}

#[test]
fn impossible_tables_are_errors_not_faults() {
    for bits in formats() {
        let world = World::new(bits, REACH, 1);
        let mut vcpu = world.vcpu(0);
        let mut unexpected = |entry: u64, level: u64| {
            if level == 2 {
                world.store(2, index(DATA, 2), entry);
            } else {
                world.leaf(0).store(entry, Ordering::Release);
            }
            world.flush_everything();
            let read = command(Op::Read, 0, 1);
            let _ = vcpu.start(&read);
            let error = vcpu.run().unwrap_err();
            assert!(matches!(error, MachineError::UnexpectedExit { vcpu: 0, .. }), "{error}");
        };
        unexpected(1 << 40 | bits.leaf, 1);
        unexpected(1 << 40 | bits.link, 2);
    }
}

/// Prints nanoseconds, the memory access and the host's own misses included.
#[test]
fn speed() {
    const PAGES: u64 = 32_768;
    for bits in formats() {
        let world = World::new(bits, 2 * PAGES, 2);
        let begin = Instant::now();
        let times = thread::scope(|scope| {
            let run = |id: u32| {
                let world = &world;
                scope.spawn(move || {
                    let mut vcpu = world.vcpu(id);
                    let first = u64::from(id) * PAGES;
                    let serve = |gva: u64, _| world.map(gva / PAGE - DATA);
                    let write = command(Op::Write, first, PAGES);
                    let started = Instant::now();
                    assert_eq!(drive(vcpu.as_mut(), &write, serve).1, PAGES);
                    let faulted = started.elapsed();
                    let started = Instant::now();
                    finish(vcpu.as_mut(), Op::Read, first, PAGES);
                    let hit = started.elapsed();
                    world.flush(slice::from_ref(&(DATA + first..DATA + first + PAGES)), &[]);
                    let started = Instant::now();
                    finish(vcpu.as_mut(), Op::Read, first, PAGES);
                    [faulted, hit, started.elapsed()]
                })
            };
            let threads = [run(0), run(1)];
            threads.map(|thread| thread.join().unwrap())
        });
        let [faulted, hit, walked] =
            [0, 1, 2].map(|i| (times[0][i] + times[1][i]).as_nanos() / u128::from(2 * PAGES));
        println!(
            "{:?}: {:?} in all; a page: demand-faulted {faulted} ns, re-read through the TLB {hit} \
             ns, re-read after a flush {walked} ns",
            bits.format,
            begin.elapsed()
        );
        // A hundred times what an idle machine needs: only a wrong algorithm gets there.
        assert!(hit < 5_000 && walked < 10_000, "{hit} ns, {walked} ns");
    }
}

#[test]
fn memory_that_is_given_back_is_free_and_zero() {
    let world = World::new(formats()[0], 8, 1);
    let data = world.layout.data.clone();
    let memory = world.machine.memory();
    data.clone().for_each(|page| memory.store(page * PAGE + 8, page));
    let before = world.machine.allocated().unwrap();
    // The last range reaches beyond the memory, as far as nothing is there.
    for pages in [data.start + 2..data.start + 4, data.end - 1..data.end + 9, 1 << 40..1 << 41] {
        world.machine.give_back(&pages).unwrap();
    }
    assert_eq!(world.machine.allocated().unwrap(), before - 3 * PAGE);
    let held: Vec<u64> = data.clone().map(|page| memory.load(page * PAGE + 8)).collect();
    let kept = |index: u64| ![2, 3, 7].contains(&index);
    let expected = data.clone().map(|page| if kept(page - data.start) { page } else { 0 });
    assert_eq!(held, expected.collect::<Vec<_>>());
}
