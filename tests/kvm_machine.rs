//! The /dev/kvm machine of `examples/mini_vmm`, on page tables made by hand: what every scenario
//! takes for granted. Where /dev/kvm does not open each test says so, loudly, and passes.

#[path = "../examples/mini_vmm/kvm/mod.rs"]
#[allow(dead_code, reason = "vCPUs for machine code have a test of their own")]
mod kvm;
#[path = "../examples/mini_vmm/machine.rs"]
#[allow(dead_code, reason = "the tests look at memory by a way of their own")]
mod machine;

use std::hint;
use std::ops::Range;
use std::slice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Barrier, Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvm::KvmMachine;
use machine::{Churn, Command, Exit, Flush, Layout, Machine, MachineError, Op, PAGE, Report, Vcpu};

const PRESENT: u64 = 1;
/// Present, writable, user.
const LINK: u64 = 7;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// First linear page of the guest's data.
const DATA: u64 = 0x10_0000;
/// Nothing here takes longer than seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// One test at a time: they measure, and they keep two vCPUs busy.
static ALONE: Mutex<()> = Mutex::new(());

/// A machine, tables made by hand, and an identity-like mapping of data: linear page `DATA + n` is
/// the `n`th page of `layout.data`.
struct World {
    machine: KvmMachine,
    layout: Layout,
    /// Next free page of `layout.tables`.
    next: Mutex<u64>,
    root: u64,
    /// Held while tables are linked, and by tests that unlink one.
    linking: Mutex<()>,
    /// Leaves put in by `serve`.
    installed: AtomicU64,
    stop: AtomicBool,
    _alone: MutexGuard<'static, ()>,
}

impl World {
    fn new(test: &str, vcpus: u32, pages: u64) -> Option<Self> {
        if let Err(why) = kvm::available() {
            kvm::skip::aloud("no /dev/kvm", test, why);
            return None;
        }
        let alone = ALONE.lock().unwrap_or_else(|broken| broken.into_inner());
        let layout = Layout { stub: 0..16, tables: 16..256, data: 256..256 + pages };
        let machine = KvmMachine::new(&layout, vcpus).expect("a machine");
        let world = Self {
            machine,
            next: Mutex::new(layout.tables.start + 1),
            root: layout.tables.start,
            layout,
            linking: Mutex::new(()),
            installed: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            _alone: alone,
        };
        for (linear, physical, count) in world.machine.pinned() {
            for page in 0..count {
                let leaf = world.leaf(linear + page);
                leaf.store(to(physical + page), SeqCst);
            }
        }
        Some(world)
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        let memory = self.machine.memory();
        assert!(at % 8 == 0 && at + 8 <= memory.len);
        let word = memory.base.wrapping_add(at as usize);
        // SAFETY: aligned and in bounds (asserted) of a mapping that lives as long as the machine;
        // everybody accesses it atomically.
        unsafe { AtomicU64::from_ptr(word.cast()) }
    }

    fn new_table(&self) -> u64 {
        let mut next = self.next.lock().unwrap();
        assert!(self.layout.tables.contains(&next), "out of tables");
        *next += 1;
        *next - 1
    }

    /// The entry of linear page `page` at `level` (1 is the leaf), with the tables above it.
    fn entry(&self, page: u64, level: u32) -> &AtomicU64 {
        let mut table = self.root;
        for above in (level..=4).rev() {
            let index = (page >> (9 * (above - 1))) & 511;
            let entry = self.word(table * PAGE + index * 8);
            if above == level {
                return entry;
            }
            if entry.load(SeqCst) == 0 {
                let link = to(self.new_table());
                // Another thread may have been faster: then our table stays unused.
                let _ = entry.compare_exchange(0, link, SeqCst, SeqCst);
            }
            table = (entry.load(SeqCst) & ADDRESS) / PAGE;
        }
        unreachable!("levels are 1 to 4");
    }

    fn leaf(&self, page: u64) -> &AtomicU64 {
        self.entry(page, 1)
    }

    fn data_leaf(&self, n: u64) -> &AtomicU64 {
        self.leaf(DATA + n)
    }

    /// A word of the `n`th data page.
    fn data(&self, n: u64, offset: u64) -> u64 {
        let at = (self.layout.data.start + n) * PAGE + offset;
        self.word(at).load(SeqCst)
    }

    /// Maps what faulted. A page that is there already counts as served by somebody else.
    fn serve(&self, gva: u64, error: u32) {
        assert_eq!(error & 0x19, 0, "gva {gva:#x}, error {error:#x}: only absent data pages fault");
        assert_eq!(error & 4, 4, "gva {gva:#x}, error {error:#x}: the guest is at CPL 3");
        let page = gva / PAGE;
        let target = self.layout.data.start + page - DATA;
        assert!(self.layout.data.contains(&target), "gva {gva:#x}");
        let leaf = to(target);
        let _linking = self.linking.lock().unwrap();
        if (self.leaf(page).compare_exchange(0, leaf, SeqCst, SeqCst)).is_ok() {
            self.installed.fetch_add(1, SeqCst);
        }
    }

    /// Runs `command` to its end; `None` if kicked while `stop` is set.
    fn drive(&self, vcpu: &mut dyn Vcpu, command: &Command) -> (Option<Report>, u64) {
        vcpu.start(command).expect("start");
        let mut faults = 0;
        loop {
            match vcpu.run().expect("run") {
                Exit::Done(report) => return (Some(report), faults),
                Exit::Fault { gva, error } => {
                    faults += 1;
                    self.serve(gva, error);
                }
                Exit::Kicked if self.stop.load(SeqCst) => return (None, faults),
                Exit::Kicked => panic!("nobody kicked"),
            }
        }
    }

    fn vcpu(&self, id: u32) -> Box<dyn Vcpu> {
        let mut vcpu = self.machine.vcpu(id).expect("a vCPU");
        vcpu.set_root(self.root).expect("a root");
        vcpu
    }

    /// What physical pages the first `count` data pages are.
    fn pfns(&self, count: u64) -> Range<u64> {
        let start = self.layout.data.start;
        start..start + count
    }

    fn flush_pages(&self, count: u64) {
        self.flush(&Flush {
            gfns: slice::from_ref(&(DATA..DATA + count)),
            pfns: slice::from_ref(&self.pfns(count)),
            ..NOTHING
        });
    }

    fn flush(&self, flush: &Flush<'_>) {
        self.machine.flush(flush).expect("flush");
    }

    /// Ends the endless programs. The kick is repeated: a thread may be outside `run` just now.
    fn finish(&self, running: &[thread::ScopedJoinHandle<'_, ()>]) {
        self.stop.store(true, SeqCst);
        while running.iter().any(|thread| !thread.is_finished()) {
            self.machine.kick_all();
            thread::sleep(Duration::from_millis(1));
        }
    }
}

const NOTHING: Flush<'_> = Flush { gfns: &[], pfns: &[], tables: &[], everything: false };

fn command(op: Op, first: u64, pages: u64, rounds: u64) -> Command {
    Command { op, start: (DATA + first) * PAGE, pages, stride: 1, tag: 7, rounds }
}

/// Rounds over `pages` pages that take a minute: endless for those who end it by a kick, and
/// an end of a test in which the kick gets lost.
fn endless(pages: u64) -> u64 {
    20_000_000_000 / pages
}

/// Ends a loop, also when a panic unwinds.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// An entry, leaf or link, that leads to physical page `page`.
fn to(page: u64) -> u64 {
    (page * PAGE) | LINK
}

/// Waits until `condition` holds.
fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "in vain: {what}");
        thread::yield_now();
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
fn a_page_is_faulted_in_on_demand() {
    let Some(world) = World::new("a_page_is_faulted_in_on_demand", 1, 4) else {
        return;
    };
    let mut vcpu = world.vcpu(0);
    vcpu.start(&command(Op::Write, 2, 1, 1)).unwrap();
    let gva = (DATA + 2) * PAGE;
    // Until it is mapped the same access faults again.
    for _ in 0..3 {
        assert_eq!(vcpu.run().unwrap(), Exit::Fault { gva, error: 6 });
    }
    world.serve(gva, 6);
    let report = Report { pages: 1, ..Report::default() };
    assert_eq!(vcpu.run().unwrap(), Exit::Done(report));
    assert_eq!(world.data(2, 0), machine::content(gva, 7));
    assert_eq!(world.data(2, 2048), machine::content(gva, 7));
    assert_eq!(world.data_leaf(2).load(SeqCst) & (ACCESSED | DIRTY), ACCESSED | DIRTY);
    // A write to a read-only page is a fault of another kind; a read of it is none.
    let leaf = world.data_leaf(2).load(SeqCst);
    world.data_leaf(2).store(leaf & !2, SeqCst);
    world.flush(&Flush { pfns: slice::from_ref(&world.pfns(4)), ..NOTHING });
    let (read, faults) = world.drive(&mut *vcpu, &command(Op::Verify, 2, 1, 1));
    assert_eq!((read, faults), (Some(report), 0));
    vcpu.start(&command(Op::Increment, 2, 1, 1)).unwrap();
    let fault = Exit::Fault { gva: gva + 8, error: 7 };
    assert_eq!(vcpu.run().unwrap(), fault);
    world.data_leaf(2).store(leaf, SeqCst);
    world.flush_pages(4);
    assert_eq!(vcpu.run().unwrap(), Exit::Done(report));
    assert_eq!(world.data(2, 8), 1);
}

#[test]
fn two_vcpus_fault_in_every_page_once() {
    const PAGES: u64 = 1024;
    let Some(world) = World::new("two_vcpus_fault_in_every_page_once", 2, PAGES) else {
        return;
    };
    let half = PAGES / 2;
    let written = Barrier::new(2);
    let work = |id: u64| {
        let mut vcpu = world.vcpu(id as u32);
        let start = Instant::now();
        let (report, faults) = world.drive(&mut *vcpu, &command(Op::Write, id * half, half, 1));
        let a_fault = start.elapsed() / half as u32;
        assert_eq!((report.unwrap().pages, faults), (half, half));
        written.wait();
        // The other one's pages: they are there, and hold what it wrote.
        let other = command(Op::Verify, (1 - id) * half, half, 1);
        let (report, faults) = world.drive(&mut *vcpu, &other);
        let report = report.unwrap();
        assert_eq!((report.pages, report.mismatches, faults), (half, 0, 0));
        (vcpu, a_fault)
    };
    let (first, second) = thread::scope(|scope| {
        let other = scope.spawn(|| work(1));
        (work(0), other.join().unwrap())
    });
    assert_eq!(world.installed.load(SeqCst), PAGES);
    eprintln!("a fault, 2 vCPUs: {:?} and {:?}", first.1, second.1);
    for mut vcpu in [first.0, second.0] {
        let (report, faults) = world.drive(&mut *vcpu, &command(Op::Verify, 0, PAGES, 3));
        let report = report.unwrap();
        assert_eq!((report.pages, report.mismatches, faults), (3 * PAGES, 0, 0));
        // A page that does not hold what it should is found, and named.
        let at = (world.layout.data.start + 77) * PAGE + 2048;
        let right = world.word(at).fetch_add(1, SeqCst);
        let report = world.drive(&mut *vcpu, &command(Op::Verify, 0, PAGES, 2)).0.unwrap();
        world.word(at).store(right, SeqCst);
        assert_eq!((report.mismatches, report.first_mismatch), (2, (DATA + 77) * PAGE));
    }
}

#[test]
fn churn_stops_anywhere_and_goes_on_from_guest_memory_alone() {
    const PAGES: u64 = 300;
    let test = "churn_stops_anywhere_and_goes_on_from_guest_memory_alone";
    let Some(world) = World::new(test, 2, PAGES) else {
        return;
    };
    let churn = Churn { multiplier: 0x9e37_79b9, offset: 77, written: 64, delay: 3 };
    // A range of 300 pages: the control page and 299 others, so 512 steps make a round.
    let whole = |rounds| Command { op: Op::Churn(churn), ..command(Op::Read, 0, PAGES, rounds) };
    let check = || {
        // A step that was interrupted has stored a part of what it stores, or nothing.
        let end = world.data(0, 0);
        let mut expected = vec![None; PAGES as usize];
        for step in 0..end {
            let other = (step * churn.multiplier + churn.offset) % 512;
            if let Some(visit) = expected.get_mut(other as usize + 1) {
                *visit = Some(step);
            }
        }
        let current = (end * churn.multiplier + churn.offset) % 512 + 1;
        for (n, visit) in (0..PAGES).zip(expected).skip(1) {
            assert_eq!(churn.last_visit(512, n, end), visit);
            let wanted = match visit.filter(|_| churn.writes(n)) {
                Some(step) => (step, machine::content((DATA + n) * PAGE, step)),
                None => (0, 0),
            };
            let found = (world.data(n, 0), world.data(n, 2048));
            assert!(found == wanted || n == current, "page {n}, step {end}: {found:?} {wanted:?}");
        }
        end
    };
    let mut vcpu = world.vcpu(0);
    let (report, faults) = world.drive(&mut *vcpu, &whole(1));
    assert_eq!((report.unwrap().pages, faults), (512, PAGES));
    assert_eq!(check(), 512);
    let mut other = world.vcpu(1);
    thread::scope(|scope| {
        let running = [scope.spawn(|| {
            let (report, _) = world.drive(&mut *other, &whole(endless(512)));
            assert_eq!(report, None, "only the kick ends it");
        })];
        thread::sleep(Duration::from_millis(50));
        world.finish(&running);
    });
    let stopped = check();
    assert!(stopped > 512, "it went on");
    // The first one, which knows nothing of that, goes on from there.
    let rounds = stopped / 512 + 2;
    let (report, _) = world.drive(&mut *vcpu, &whole(rounds));
    assert_eq!(report.unwrap().pages, rounds * 512 - stopped);
    assert_eq!(check(), rounds * 512);
}

#[test]
fn a_fault_costs() {
    const PAGES: u64 = 2048;
    let Some(world) = World::new("a_fault_costs", 1, PAGES) else {
        return;
    };
    let mut vcpu = world.vcpu(0);
    // Tables first, so that only leaves are left to do.
    (0..PAGES).for_each(|n| assert_eq!(world.data_leaf(n).load(SeqCst), 0));
    let timed = |vcpu: &mut dyn Vcpu, op, rounds| {
        let start = Instant::now();
        let (report, faults) = world.drive(vcpu, &command(op, 0, PAGES, rounds));
        let time = start.elapsed() / (PAGES * rounds) as u32;
        assert_eq!(report.unwrap().pages, PAGES * rounds);
        (time, faults)
    };
    eprintln!("{}: {}", world.machine.name(), world.machine.description());
    let (fault, faults) = timed(&mut *vcpu, Op::Write, 1);
    assert_eq!(faults, PAGES);
    let (warm, faults) = timed(&mut *vcpu, Op::Read, 100);
    assert_eq!(faults, 0);
    world.flush_pages(PAGES);
    let (cold, faults) = timed(&mut *vcpu, Op::Read, 1);
    assert_eq!(faults, 0);
    eprintln!("one vCPU, a page: fault exit {fault:?}, after a flush {cold:?}, warm {warm:?}");
    let start = Instant::now();
    for _ in 0..1000 {
        let (report, _) = world.drive(&mut *vcpu, &command(Op::Read, 0, 1, 1));
        assert_eq!(report.unwrap().pages, 1);
    }
    eprintln!("a command of one page: {:?}", start.elapsed() / 1000);
}

#[test]
fn accessed_bits_come_back_after_a_flush() {
    const PAGES: u64 = 512;
    const ROUNDS: usize = 20;
    let Some(world) = World::new("accessed_bits_come_back_after_a_flush", 2, PAGES) else {
        return;
    };
    let young = || {
        let is_young = |n: &u64| world.data_leaf(*n).load(SeqCst) & ACCESSED != 0;
        (0..PAGES).filter(is_young).count() as u64
    };
    let touch = |id| {
        let mut vcpu = world.vcpu(id);
        world.drive(&mut *vcpu, &command(Op::Read, 0, PAGES, endless(PAGES)));
    };
    thread::scope(|scope| {
        let running = [scope.spawn(|| touch(0)), scope.spawn(|| touch(1))];
        until("all pages touched", || young() == PAGES);
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            for n in 0..PAGES {
                world.data_leaf(n).fetch_and(!ACCESSED, SeqCst);
            }
            let start = Instant::now();
            world.flush_pages(PAGES);
            times.push(start.elapsed());
            until("all pages touched again", || young() == PAGES);
        }
        eprintln!("flush of {PAGES} pages, 2 vCPUs running: {:?}", median(times));
        world.finish(&running);
    });
    assert_eq!(world.installed.load(SeqCst), PAGES);
}

/// Two vCPUs increment pages of their own (even and odd) while `disturb` is called `times` times.
fn increment_while(world: &World, pages: u64, times: u32, mut disturb: impl FnMut(u32)) -> u64 {
    const ROUNDS: u64 = 2_000;
    let rounds = AtomicU64::new(0);
    let ready = AtomicU64::new(0);
    let quit = AtomicBool::new(false);
    let faults = AtomicU64::new(0);
    let work = |id: u32| {
        let mut vcpu = world.vcpu(id);
        let mut done = 0;
        while !quit.load(SeqCst) {
            let command =
                Command { stride: 2, ..command(Op::Increment, id.into(), pages / 2, ROUNDS) };
            let (report, exits) = world.drive(&mut *vcpu, &command);
            assert_eq!(report.unwrap().pages, pages / 2 * ROUNDS);
            faults.fetch_add(exits, SeqCst);
            done += ROUNDS;
            ready.fetch_or(1 << id, SeqCst);
        }
        for n in (u64::from(id)..pages).step_by(2) {
            assert_eq!(world.data(n, 8), done, "increments of page {n} by vCPU {id}");
        }
        rounds.fetch_add(done, SeqCst);
    };
    thread::scope(|scope| {
        let _quit = SetOnDrop(&quit);
        let running = [scope.spawn(|| work(0)), scope.spawn(|| work(1))];
        let finished = || running.iter().any(|thread| thread.is_finished());
        until("both vCPUs run", || ready.load(SeqCst) == 3 || finished());
        (0..times).for_each(&mut disturb);
    });
    assert!(rounds.load(SeqCst) >= 2 * ROUNDS);
    faults.load(SeqCst)
}

#[test]
fn zapped_pages_refault_and_nothing_is_lost() {
    const PAGES: u64 = 512;
    const TIMES: u32 = 30;
    let Some(world) = World::new("zapped_pages_refault_and_nothing_is_lost", 2, PAGES) else {
        return;
    };
    let mut times = Vec::new();
    let faults = increment_while(&world, PAGES, TIMES, |_| {
        for n in 0..PAGES {
            let old = world.data_leaf(n).swap(0, SeqCst);
            assert_eq!(old & (PRESENT | ACCESSED | DIRTY), PRESENT | ACCESSED | DIRTY);
        }
        let start = Instant::now();
        world.flush_pages(PAGES);
        times.push(start.elapsed());
        let ready = ACCESSED | DIRTY;
        until("every page is back", || {
            (0..PAGES).all(|n| world.data_leaf(n).load(SeqCst) & ready == ready)
        });
    });
    // Each page once at first, and once for each time it was zapped: no fault without a zap.
    assert_eq!(faults, PAGES * u64::from(TIMES + 1));
    assert_eq!(world.installed.load(SeqCst), faults);
    eprintln!("flush of {PAGES} zapped pages, 2 vCPUs running: {:?}", median(times));
}

#[test]
fn increments_are_counted_exactly() {
    const PAGES: u64 = 64;
    let Some(world) = World::new("increments_are_counted_exactly", 2, PAGES) else {
        return;
    };
    let faults = increment_while(&world, PAGES, 20, |_| thread::sleep(Duration::from_millis(1)));
    assert_eq!(faults, PAGES);
}

#[test]
fn flushes_of_scattered_and_unknown_pages_are_complete() {
    const PAGES: u64 = 512;
    let test = "flushes_of_scattered_and_unknown_pages_are_complete";
    let Some(world) = World::new(test, 2, PAGES) else {
        return;
    };
    let (mut few, mut many, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
    let zaps = AtomicU64::new(0);
    let faults = increment_while(&world, PAGES, 30, |turn| {
        let step = [37, 3, 2][turn as usize % 3];
        let pages: Vec<u64> = (0..PAGES).step_by(step).collect();
        for n in &pages {
            world.data_leaf(*n).store(0, SeqCst);
        }
        zaps.fetch_add(pages.len() as u64, SeqCst);
        let first = world.layout.data.start;
        let gfns: Vec<_> = pages.iter().map(|n| DATA + n..DATA + n + 1).collect();
        let pfns: Vec<_> = pages.iter().map(|n| first + n..first + n + 1).collect();
        let (pfns, times) = match step {
            37 => (&pfns[..], &mut few),
            3 => (&pfns[..], &mut many),
            _ => (&[][..], &mut unknown),
        };
        let start = Instant::now();
        world.flush(&Flush { gfns: &gfns, pfns, ..NOTHING });
        times.push(start.elapsed());
        until("every page is back", || {
            pages.iter().all(|n| world.data_leaf(*n).load(SeqCst) & DIRTY != 0)
        });
    });
    assert_eq!(faults, PAGES + zaps.load(SeqCst));
    let times = [median(few), median(many), median(unknown)];
    eprintln!("flush of 14 pages, 171 pages, {PAGES} pages by gfn: {times:?}");
}

#[test]
fn a_kick_ends_the_run_that_goes_on_and_no_other() {
    const KICKS: u64 = 300;
    let Some(world) = World::new("a_kick_ends_the_run_that_goes_on_and_no_other", 1, 4) else {
        return;
    };
    let mut vcpu = world.vcpu(0);
    assert!(world.drive(&mut *vcpu, &command(Op::Increment, 0, 1, 1)).0.is_some());
    // From before: not remembered.
    for _ in 0..100 {
        world.machine.kick_all();
        assert!(world.drive(&mut *vcpu, &command(Op::Read, 0, 1, 1)).0.is_some());
    }
    vcpu.start(&command(Op::Increment, 0, 1, endless(1))).unwrap();
    let (sender, receiver) = mpsc::channel();
    let goes_on = |turn: u64| {
        // The word moves: the guest runs.
        let seen = world.data(0, 8);
        until(&format!("the guest runs, turn {turn}"), || world.data(0, 8) != seen);
    };
    let mut times = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            let sender = sender;
            for _ in 0..KICKS {
                let exit = vcpu.run();
                sender.send((exit, Instant::now())).unwrap();
            }
        });
        for turn in 0..KICKS {
            goes_on(turn);
            let start = Instant::now();
            // Once only: a lost kick would hang here.
            world.machine.kick_all();
            let (exit, end) = receiver.recv_timeout(PATIENCE).expect("the kick got lost");
            assert_eq!(exit.unwrap(), Exit::Kicked, "turn {turn}");
            times.push(end - start);
        }
    });
    eprintln!("from kick to exit: {:?}", median(times));
}

#[test]
fn kicks_at_any_moment_lose_nothing() {
    const PAGES: u64 = 64;
    let Some(world) = World::new("kicks_at_any_moment_lose_nothing", 2, PAGES) else {
        return;
    };
    let kicks = AtomicU64::new(0);
    let quit = AtomicBool::new(false);
    let work = |id: u32| {
        let mut vcpu = world.vcpu(id);
        for round in 1..=150 {
            let first = u64::from(id) * PAGES / 2;
            // Half of the rounds fault.
            if round % 2 == 0 {
                (first..first + PAGES / 2).for_each(|n| world.data_leaf(n).store(0, SeqCst));
                world.flush_pages(PAGES);
            }
            let command = command(Op::Increment, first, PAGES / 2, 50);
            vcpu.start(&command).unwrap();
            let report = loop {
                match vcpu.run().unwrap() {
                    Exit::Done(report) => break report,
                    Exit::Fault { gva, error } => world.serve(gva, error),
                    Exit::Kicked => drop(kicks.fetch_add(1, SeqCst)),
                }
            };
            assert_eq!(report.pages, PAGES / 2 * 50);
            assert_eq!(world.data(first, 8), 50 * round);
        }
    };
    thread::scope(|scope| {
        let kicker = scope.spawn(|| {
            let everything = Flush { everything: true, ..NOTHING };
            for turn in 0u64.. {
                world.machine.kick_all();
                if turn % 64 == 0 {
                    world.flush(&everything);
                }
                if quit.load(SeqCst) {
                    break;
                }
            }
        });
        let running = [scope.spawn(|| work(0)), scope.spawn(|| work(1))];
        let all_right = running.map(|thread| thread.join().is_ok());
        quit.store(true, SeqCst);
        kicker.join().unwrap();
        assert_eq!(all_right, [true, true]);
    });
    eprintln!("runs ended by kicks: {}", kicks.load(SeqCst));
    assert!(kicks.load(SeqCst) > 0);
}

/// A flush just after the one before meets the vCPU on its way in: it must come out again, however
/// far it got.
#[test]
fn a_structural_flush_meets_a_vcpu_at_any_point_of_entry() {
    let test = "a_structural_flush_meets_a_vcpu_at_any_point_of_entry";
    let Some(world) = World::new(test, 1, 4) else {
        return;
    };
    let work = || {
        let mut vcpu = world.vcpu(0);
        world.drive(&mut *vcpu, &command(Op::Increment, 0, 1, endless(1)));
    };
    thread::scope(|scope| {
        let running = [scope.spawn(work)];
        until("the guest runs", || world.data(0, 8) != 0);
        let everything = Flush { everything: true, ..NOTHING };
        let mut longest = Duration::ZERO;
        for turn in 0..3000u32 {
            // How far it gets depends on how long we wait.
            (0..turn % 64 * 16).for_each(|_| hint::spin_loop());
            let start = Instant::now();
            world.flush(&everything);
            longest = longest.max(start.elapsed());
        }
        eprintln!("the longest of 3000 structural flushes: {longest:?}");
        assert!(longest < Duration::from_secs(2), "a vCPU was not told to come out");
        assert!(!running[0].is_finished());
        world.finish(&running);
    });
}

#[test]
fn structural_flushes_while_vcpus_run_go_unnoticed() {
    const PAGES: u64 = 64;
    const TIMES: u32 = 50;
    let Some(world) = World::new("structural_flushes_while_vcpus_run_go_unnoticed", 2, PAGES)
    else {
        return;
    };
    let mut times = Vec::new();
    let everything = Flush { everything: true, ..NOTHING };
    let faults = increment_while(&world, PAGES, TIMES, |turn| {
        let start = Instant::now();
        world.flush(&everything);
        times.push(start.elapsed());
        if turn % 4 == 0 {
            // Two at once, and each must have an effect.
            for n in 0..PAGES {
                world.data_leaf(n).fetch_and(!ACCESSED, SeqCst);
            }
            thread::scope(|scope| {
                scope.spawn(|| world.flush(&everything));
                world.flush(&everything);
            });
            until("every page is young again", || {
                (0..PAGES).all(|n| world.data_leaf(n).load(SeqCst) & ACCESSED != 0)
            });
        }
    });
    assert_eq!(faults, PAGES);
    eprintln!("structural flush, 2 vCPUs running: {:?}", median(times));
}

/// A table is unlinked, another linked in its place, and its frame used again the next time, while
/// two vCPUs use all pages below.
#[test]
fn a_replaced_table_is_served_right() {
    const PAGES: u64 = 512;
    const TIMES: u32 = 20;
    let Some(world) = World::new("a_replaced_table_is_served_right", 2, PAGES) else {
        return;
    };
    let mut spare = world.new_table();
    let faults = increment_while(&world, PAGES, TIMES, |_| {
        {
            let _linking = world.linking.lock().unwrap();
            let link = world.entry(DATA, 2);
            let old = (link.swap(0, SeqCst) & ADDRESS) / PAGE;
            world.flush(&Flush {
                gfns: slice::from_ref(&(DATA..DATA + PAGES)),
                pfns: slice::from_ref(&world.pfns(PAGES)),
                tables: &[old],
                ..NOTHING
            });
            // Nobody uses it any longer.
            for index in 0..512 {
                world.word(old * PAGE + index * 8).store(0, SeqCst);
            }
            link.store(to(spare), SeqCst);
            spare = old;
        }
        until("every page is back", || {
            (0..PAGES).all(|n| world.data_leaf(n).load(SeqCst) & DIRTY != 0)
        });
    });
    assert_eq!(faults, PAGES * u64::from(TIMES + 1));
    assert_eq!(world.installed.load(SeqCst), faults);
}

#[test]
fn a_new_root_takes_effect_at_the_next_run() {
    let Some(mut world) = World::new("a_new_root_takes_effect_at_the_next_run", 1, 2) else {
        return;
    };
    let mut vcpu = world.vcpu(0);
    let write = command(Op::Write, 0, 1, 1);
    let verify = command(Op::Verify, 0, 1, 1);
    let mismatches =
        |world: &World, vcpu: &mut dyn Vcpu| world.drive(vcpu, &verify).0.unwrap().mismatches;
    assert_eq!(world.drive(&mut *vcpu, &write).1, 1);
    // In the second root the same linear page is the other data page, which is empty.
    let first = world.root;
    let second = world.new_table();
    world.root = second;
    for (linear, physical, count) in world.machine.pinned() {
        for page in 0..count {
            world.leaf(linear + page).store(to(physical + page), SeqCst);
        }
    }
    world.data_leaf(0).store(to(world.layout.data.start + 1), SeqCst);
    for _ in 0..3 {
        vcpu.set_root(second).unwrap();
        assert_eq!(mismatches(&world, &mut *vcpu), 1);
        vcpu.set_root(first).unwrap();
        assert_eq!(mismatches(&world, &mut *vcpu), 0);
    }
    // Also in the middle of a fault, and the same root again after a change.
    world.root = first;
    world.data_leaf(0).store(0, SeqCst);
    let start = Instant::now();
    vcpu.set_root(first).unwrap();
    eprintln!("the same root again: {:?}", start.elapsed());
    vcpu.start(&verify).unwrap();
    assert!(matches!(vcpu.run().unwrap(), Exit::Fault { error: 4, .. }));
    vcpu.set_root(second).unwrap();
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, Exit::Done(Report { mismatches: 1, .. })), "{exit:?}");
}

#[test]
fn misuse_is_refused() {
    let Some(world) = World::new("misuse_is_refused", 1, 2) else {
        return;
    };
    let unsupported =
        |result: Result<(), MachineError>| matches!(result, Err(MachineError::Unsupported { .. }));
    let mut vcpu = world.machine.vcpu(0).unwrap();
    assert!(unsupported(world.machine.vcpu(1).map(drop)));
    assert!(world.machine.vcpu(0).is_err());
    assert!(unsupported(vcpu.run().map(drop)));
    assert!(unsupported(vcpu.set_root(world.machine.memory().len / PAGE)));
    vcpu.set_root(world.root).unwrap();
    assert!(unsupported(vcpu.run().map(drop)));
    let good = command(Op::Read, 0, 1, 1);
    let bad = [
        Command { stride: 0, ..good },
        Command { rounds: 0, ..good },
        Command { start: 0, ..good },
        Command { start: good.start + 8, ..good },
        Command { pages: u64::MAX, ..good },
        Command { start: 1 << 47, ..good },
    ];
    for command in bad {
        assert!(unsupported(vcpu.start(&command)), "{command:?}");
    }
    vcpu.start(&good).unwrap();
    assert!(unsupported(vcpu.start(&good)));
    let tight = Layout { stub: 0..2, tables: 2..8, data: 8..16 };
    assert!(unsupported(KvmMachine::new(&tight, 1).map(drop)));
    let overlap = Layout { stub: 0..16, tables: 8..16, data: 16..32 };
    assert!(unsupported(KvmMachine::new(&overlap, 1).map(drop)));
}

/// Tables that do not map the stub, and a reserved bit: the machine fails in words, not in silence.
#[test]
fn an_unexpected_exit_is_told_with_registers() {
    let Some(world) = World::new("an_unexpected_exit_is_told_with_registers", 1, 2) else {
        return;
    };
    let mut vcpu = world.machine.vcpu(0).unwrap();
    vcpu.set_root(world.new_table()).unwrap();
    vcpu.start(&command(Op::Read, 0, 1, 1)).unwrap();
    let failed = vcpu.run();
    let Err(MachineError::UnexpectedExit { vcpu: 0, detail }) = failed else {
        panic!("{failed:?}");
    };
    assert!(detail.contains("triple fault") && detail.contains("rip"), "{detail}");
    eprintln!("{detail}");
}

#[test]
fn memory_that_is_given_back_is_free_and_zero() {
    let Some(world) = World::new("memory_that_is_given_back_is_free_and_zero", 1, 8) else {
        return;
    };
    let data = world.layout.data.clone();
    let memory = world.machine.memory();
    data.clone().for_each(|page| memory.store(page * PAGE + 8, page));
    let before = world.machine.allocated().expect("a count");
    for pages in [data.start + 2..data.start + 4, data.end - 1..data.end + 9, 1 << 40..1 << 41] {
        world.machine.give_back(&pages).expect("a hole");
    }
    assert_eq!(world.machine.allocated().expect("a count"), before - 3 * PAGE);
    for page in data.clone() {
        let expected = if [2, 3, 7].contains(&(page - data.start)) { 0 } else { page };
        assert_eq!(memory.load(page * PAGE + 8), expected, "page {page}");
    }
}
