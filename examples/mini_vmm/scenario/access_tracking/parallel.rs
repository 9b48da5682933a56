//! `-p`: what aging costs vCPUs that fault, and what faults cost aging (KVM rows 5.42, 5.43).
//!
//! 1, 2, 4 and 8 vCPUs fault fresh memory in while another thread ages it in a loop, in each of
//! the ways of [`Aging`]; the figures are the ones that were published for KVM: the vCPUs' wall
//! time and the average time of a pass. Absolute times depend on the machine; ratios count.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mmu_core::spte::SpteFormat;
use mmu_core::traits::{AgeMode, AgeRange, AgeReport, AgeRequest, CountOnly, UpperBits};
use mmu_core::vm::Actor;

use super::{Builder, Error, Report, Shape, touch};
use crate::host::VmmHost;
use crate::machine::{Op, PAGE};
use crate::report::Series;
use crate::vmm::Vmm;

/// Numbers of vCPUs.
const VCPUS: [u32; 4] = [1, 2, 4, 8];

/// How memory is aged meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aging {
    /// Not at all.
    Off,
    /// With the MMU lock held exclusively, as KVM did: faults wait for each pass.
    Locked,
    /// Without a lock.
    Lockless,
    /// The same, and what nobody walked into is left out; a flush after each pass.
    Skipping,
}

impl Aging {
    const ALL: [Self; 4] = [Self::Off, Self::Locked, Self::Lockless, Self::Skipping];

    const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Locked => "locked",
            Self::Lockless => "lockless",
            Self::Skipping => "skipping",
        }
    }
}

/// What one run showed.
#[derive(Clone, Copy, Debug)]
struct Run {
    vcpus: u32,
    aging: Aging,
    wall: Duration,
    passes: u64,
    /// Average of a pass, with what it had to wait for, but for its flush.
    pass: Duration,
    /// Average of a flush after a pass.
    flush: Duration,
    /// Average number of table entries that a pass read.
    entries: u64,
}

/// Run it.
pub(super) fn run<F: SpteFormat>(builder: &Builder<'_, F>) -> Result<Report, Error> {
    let each = builder.pages_each(4 << 20, 64 << 20);
    let most = VCPUS.into_iter().max().unwrap_or(1);
    let begun = Instant::now();
    let cpu = builder.vmm(Shape::new(1, 1))?.machine.name();
    let mut report = Report::new("access-tracking", cpu, most, each * PAGE * u64::from(most));
    let mut runs = Vec::new();
    let mut verified = 0;
    for vcpus in VCPUS {
        for aging in Aging::ALL {
            let (run, pages) = one(builder, Shape::new(vcpus, each * u64::from(vcpus)), aging)?;
            verified += pages;
            runs.push(run);
        }
    }
    report.count("pages_of_each_vcpu", each);
    let detail = format!("{verified} pages in {} runs", runs.len());
    report.check("contents-verified-by-the-guest", verified > 0, detail);
    let idle: Vec<_> = runs
        .iter()
        .filter(|run| run.aging != Aging::Off && run.passes == 0)
        .map(|run| (run.vcpus, run.aging))
        .collect();
    report.check("every-ager-made-passes", idle.is_empty(), format!("none in {idle:?}"));
    print(&runs, each);
    for run in &runs {
        let name = format!("{}_vcpus_{}", run.vcpus, run.aging.name());
        report.metric(format!("{name}_wall_ms"), run.wall.as_secs_f64() * 1e3);
        if run.aging != Aging::Off {
            report.metric(format!("{name}_pass_us"), run.pass.as_secs_f64() * 1e6);
            report.metric(format!("{name}_pass_entries"), run.entries as f64);
        }
        if run.aging == Aging::Skipping {
            report.metric(format!("{name}_flush_us"), micros(run.flush));
        }
    }
    let series = |aging: Aging| Series {
        name: format!("aging {}", aging.name()),
        points: of(&runs, aging)
            .map(|run| (f64::from(run.vcpus), run.wall.as_secs_f64() * 1e3))
            .collect(),
    };
    report.plot = Some((
        format!("vCPUs fault {} MiB each, while memory is aged, on {cpu}", (each * PAGE) >> 20),
        "vCPUs".into(),
        "wall time, ms".into(),
        Aging::ALL.map(series).to_vec(),
    ));
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn of(runs: &[Run], aging: Aging) -> impl Iterator<Item = &Run> {
    runs.iter().filter(move |run| run.aging == aging)
}

/// One VM: fault all in, meanwhile age; then the guest verifies. Returns the pages verified too.
fn one<F: SpteFormat>(
    builder: &Builder<'_, F>,
    shape: Shape,
    aging: Aging,
) -> Result<(Run, u64), Error> {
    let vmm = builder.quiet_vmm(shape)?;
    let tag = builder.options.seed;
    let mut vcpus = (0..vmm.shape.vcpus).map(|id| vmm.vcpu(id)).collect::<Result<Vec<_>, _>>()?;
    let mut ager = Ager { vmm: &vmm, eye: vmm.actor()?, holder: vmm.actor()?, aging };
    let done = AtomicBool::new(false);
    let (touched, aged) = std::thread::scope(|scope| {
        let thread = scope.spawn(|| ager.age_until(&done));
        let touched = touch(&vmm, &mut vcpus, Op::Write, 0, 1, tag);
        done.store(true, Ordering::Relaxed);
        (touched, thread.join())
    });
    let (_, wall) = touched?;
    let Aged { passes, time, flush, entries } = aged.map_err(|_| "the aging thread panicked")?;
    let (verified, _) = touch(&vmm, &mut vcpus, Op::Verify, 0, 1, tag)?;
    let run = Run {
        vcpus: vmm.shape.vcpus,
        aging,
        wall,
        passes,
        pass: (time - flush) / u32::try_from(passes.max(1)).unwrap_or(u32::MAX),
        flush: flush / u32::try_from(passes.max(1)).unwrap_or(u32::MAX),
        entries: entries / passes.max(1),
    };
    drop((vcpus, ager));
    let mut end = Report::new("access-tracking", vmm.machine.name(), run.vcpus, 0);
    vmm.teardown(&mut end)?;
    match end.checks.iter().find(|check| !check.ok) {
        None => Ok((run, verified)),
        Some(check) => Err(format!("{run:?}: {}: {}", check.name, check.detail).into()),
    }
}

/// What an aging thread did.
#[derive(Clone, Copy, Debug, Default)]
struct Aged {
    passes: u64,
    time: Duration,
    /// Of that, in flushes.
    flush: Duration,
    entries: u64,
}

/// Ages a VM in a loop.
struct Ager<'a, F: SpteFormat> {
    vmm: &'a Arc<Vmm<F>>,
    eye: Actor<VmmHost>,
    /// Holds the lock, where it is held.
    holder: Actor<VmmHost>,
    aging: Aging,
}

impl<F: SpteFormat> Ager<'_, F> {
    fn age_until(&mut self, done: &AtomicBool) -> Aged {
        let mut aged = Aged::default();
        // Once at least, also where the vCPUs are done before this thread gets to run.
        while self.aging != Aging::Off && (aged.passes == 0 || !done.load(Ordering::Relaxed)) {
            let begun = Instant::now();
            let (entries, flush) = self.pass();
            aged.entries += entries;
            aged.flush += flush;
            aged.time += begun.elapsed();
            aged.passes += 1;
            // Faults that wait for the lock get their turn.
            std::thread::yield_now();
        }
        aged
    }

    /// Look at all memory once; entries read, and the time that a flush took.
    fn pass(&mut self) -> (u64, Duration) {
        let Self { vmm, eye, holder, aging } = self;
        let range = vmm.all_gfns();
        let request = AgeRequest::new(range, AgeMode::Clear);
        let mut flush = Duration::ZERO;
        let found = match aging {
            Aging::Off => AgeReport::empty(range.end),
            Aging::Lockless => vmm.mmu.age(eye, request, &mut CountOnly),
            Aging::Locked => {
                let core = Arc::clone(vmm.mmu.vm());
                let lock = core.lock().exclusive(holder.participant());
                let found = vmm.mmu.age(eye, request, &mut CountOnly);
                drop(lock);
                found
            }
            Aging::Skipping => {
                let request = request.with_upper(UpperBits::Use);
                let found = vmm.mmu.age(eye, request, &mut CountOnly);
                let begun = Instant::now();
                vmm.mmu.flush_aged(eye, range);
                flush = begun.elapsed();
                found
            }
        };
        (found.entries, flush)
    }
}

/// The table, for people.
fn print(runs: &[Run], each: u64) {
    println!(
        "\n{each} pages faulted in by each vCPU; vCPU wall time, and average time of a pass:\n"
    );
    let ways = ["locked", "lockless", "skipping"].map(|way| format!("{way:>24}"));
    println!("  vCPUs   aging off{}", ways.concat());
    println!("            wall ms{}    flush us", "     wall ms     pass us".repeat(3));
    for vcpus in VCPUS {
        let mut line = format!("  {vcpus:>5}");
        for run in runs.iter().filter(|run| run.vcpus == vcpus) {
            let wall = run.wall.as_secs_f64() * 1e3;
            line += &format!("{wall:>12.1}");
            if run.aging != Aging::Off {
                line += &format!("{:>12.1}", micros(run.pass));
            }
            if run.aging == Aging::Skipping {
                line += &format!("{:>12.1}", micros(run.flush));
            }
        }
        println!("{line}");
    }
    println!();
}
