//! Timing, repetitions, pinned threads, and the figures they end in.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What is measured how, and what came of it.
pub struct Bench {
    /// Smaller sizes.
    pub quick: bool,
    /// Results, in the order of measurement.
    pub figures: Vec<Figure>,
    /// Rows that could not be measured, and why.
    pub skipped: Vec<(&'static str, String)>,
    /// Nanoseconds per tick of [`ticks`].
    pub ns_per_tick: f64,
    progress: bool,
}

/// A row's result.
pub struct Figure {
    pub row: &'static str,
    /// One value per repetition, ascending.
    pub values: Vec<f64>,
    /// Operations in one repetition.
    pub n: u64,
    pub note: String,
}

impl Figure {
    pub fn median(&self) -> f64 {
        let middle = self.values.len() / 2;
        if self.values.len() % 2 == 1 {
            self.values[middle]
        } else {
            (self.values[middle - 1] + self.values[middle]) / 2.0
        }
    }

    pub fn min(&self) -> f64 {
        self.values[0]
    }

    pub fn max(&self) -> f64 {
        self.values[self.values.len() - 1]
    }
}

impl Bench {
    pub fn new(quick: bool) -> Self {
        // Asked before this thread is pinned.
        cpus();
        pin(0);
        Self {
            quick,
            figures: Vec::new(),
            skipped: Vec::new(),
            ns_per_tick: calibrate(),
            progress: std::io::stderr().is_terminal(),
        }
    }

    /// Pages of 4 KiB in most rows: 4 GiB of them.
    pub fn pages(&self) -> u64 {
        if self.quick { 1 << 16 } else { 1 << 20 }
    }

    /// Repetitions of a row.
    pub fn reps(&self) -> usize {
        if self.quick { 5 } else { 11 }
    }

    /// Say on a terminal what is going on; a pipe sees nothing.
    pub fn progress(&self, what: &str) {
        if self.progress {
            eprint!("\r\x1b[K{what}");
        }
    }

    /// Note a result.
    pub fn record(&mut self, row: &'static str, n: u64, mut values: Vec<f64>, note: String) {
        if values.is_empty() {
            return self.skip(row, "no repetition succeeded".into());
        }
        values.sort_by(f64::total_cmp);
        self.progress("");
        self.figures.push(Figure { row, values, n, note });
    }

    /// Note that a row cannot be measured here.
    pub fn skip(&mut self, row: &'static str, why: String) {
        self.progress("");
        self.skipped.push((row, why));
    }

    /// Repeat `once`, which returns the nanoseconds that `n` operations took; one repetition more
    /// than is kept warms up.
    pub fn repeat(&mut self, row: &'static str, n: u64, mut once: impl FnMut() -> f64) {
        let reps = self.reps();
        let mut values = Vec::with_capacity(reps);
        for rep in 0..=reps {
            self.progress(&format!("{row}: {rep} of {reps}"));
            let ns = once();
            if rep > 0 {
                values.push(ns / n as f64);
            }
        }
        self.record(row, n, values, String::new());
    }
}

/// Nanoseconds that `work` takes.
pub fn time(work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_nanos() as f64
}

/// A clock cheap enough to be read around every fault.
#[inline]
pub fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: RDTSC reads a counter; every x86_64 CPU has it.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

fn calibrate() -> f64 {
    let (begun, first) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(20));
    let (ns, passed) = (begun.elapsed().as_nanos() as f64, ticks() - first);
    ns / passed as f64
}

/// CPUs this process may use, as it started: threads that are pinned see one.
pub fn cpus() -> usize {
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Keep this thread on one CPU.
pub fn pin(cpu: usize) {
    // SAFETY: an all-zero `cpu_set_t` is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `cpu` is below the number of CPUs, far below the 1024 of a set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: 0 is this thread; the set is read only and has the size given.
    let done = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
    if done != 0 {
        eprintln!("rows: cannot stay on CPU {cpu}: {}", std::io::Error::last_os_error());
    }
}

/// CPU time of this thread, nanoseconds.
fn cpu_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists on Linux, and `time` is ours to write.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// What two threads did at the same time.
pub struct Overlap {
    /// Of the slower one, nanoseconds.
    pub wall: f64,
    /// Share of the time in which both ran.
    pub overlap: f64,
    /// Share of its time that the less lucky one had its CPU.
    pub cpu: f64,
}

impl Overlap {
    /// A figure only counts when both threads really ran side by side.
    pub fn is_valid(&self) -> bool {
        self.overlap > 0.90 && self.cpu > 0.97
    }
}

/// Run two jobs at the same moment, each on a CPU of its own.
pub fn both<A: Send, B: Send>(
    ns_per_tick: f64,
    first: &mut A,
    second: &mut B,
    one: impl Fn(&mut A) + Sync,
    two: impl Fn(&mut B) + Sync,
) -> Overlap {
    let (here, ready) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let timed = |cpu: usize, job: &mut dyn FnMut()| {
        pin(cpu);
        // The other thread starts out on this CPU: it must be let go before anybody spins.
        here.fetch_add(1, Ordering::SeqCst);
        while here.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        ready.fetch_add(1, Ordering::SeqCst);
        while ready.load(Ordering::SeqCst) < 2 {
            std::hint::spin_loop();
        }
        let (begun, used) = (ticks(), cpu_time());
        job();
        let (ended, used) = (ticks(), cpu_time() - used);
        (begun, ended, used)
    };
    let (a, b) = std::thread::scope(|scope| {
        let timed = &timed;
        let (one, two) = (&one, &two);
        let a = scope.spawn(move || timed(0, &mut || one(first)));
        let b = scope.spawn(move || timed(1, &mut || two(second)));
        (a.join().expect("measured thread"), b.join().expect("measured thread"))
    });
    let long = |(begun, ended, _): (u64, u64, f64)| (ended - begun) as f64 * ns_per_tick;
    let common = a.1.min(b.1).saturating_sub(a.0.max(b.0)) as f64;
    let whole = (a.1.max(b.1) - a.0.min(b.0)) as f64;
    Overlap {
        wall: long(a).max(long(b)),
        overlap: common / whole,
        cpu: (a.2 / long(a)).min(b.2 / long(b)),
    }
}

/// What a neighbour did meanwhile.
pub struct Beside {
    /// Times it ran.
    pub turns: u64,
    /// For how long.
    pub lasted: Duration,
    /// Share of its time that the less lucky thread had its CPU: below 0.97, the figures are the
    /// scheduler's.
    pub cpu: f64,
}

/// Run `neighbour` over and over on the second CPU while `work` runs on the first.
pub fn beside<N: Send>(
    neighbour: &mut N,
    again: impl Fn(&mut N) + Sync,
    work: impl FnOnce(),
) -> Beside {
    let (running, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let turns = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            pin(1);
            let (begun, used) = (Instant::now(), cpu_time());
            while !stop.load(Ordering::Relaxed) {
                again(neighbour);
                turns.fetch_add(1, Ordering::Relaxed);
                running.store(true, Ordering::Relaxed);
            }
            let lasted = begun.elapsed();
            (lasted, (cpu_time() - used) / lasted.as_nanos() as f64)
        });
        while !running.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        let (begun, used) = (Instant::now(), cpu_time());
        work();
        let own = (cpu_time() - used) / begun.elapsed().as_nanos() as f64;
        stop.store(true, Ordering::Relaxed);
        let (lasted, its) = thread.join().expect("neighbour thread");
        Beside { turns: turns.load(Ordering::Relaxed), lasted, cpu: own.min(its) }
    })
}

/// Numbers that are the same in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// 0 to `count - 1` in a random order.
    pub fn permutation(&mut self, count: u64) -> Vec<u32> {
        let mut order: Vec<u32> = (0..count as u32).collect();
        for last in (1..order.len()).rev() {
            order.swap(last, self.next() as usize % (last + 1));
        }
        order
    }
}

/// The value below which `share` of `times` lie.
pub fn percentile(times: &mut [u32], share: f64) -> f64 {
    let at = ((times.len() - 1) as f64 * share) as usize;
    f64::from(*times.select_nth_unstable(at).1)
}
