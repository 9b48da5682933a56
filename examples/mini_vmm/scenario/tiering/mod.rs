//! A guest whose cold memory is taken away while it runs.
//!
//! Part of the guest's pages is hot; the others are read now and then. A thread ages the VM, writes
//! cold pages to a file and gives their memory back to the host; a fault brings a page back. Then
//! other pages become hot, and in the end the guest reads everything.
//!
//! Holds: resident memory, which is what the host has allocated, falls below 1.3 x the hot set in
//! each phase; the guest finds in every page what it wrote, and no count is lost; in the end the
//! slow tier is empty. The guest's speed on its hot pages is compared with that of a VM that
//! nobody ages, in interleaved pairs: a figure, not a check.
//!
//! | file | owns |
//! |---|---|
//! | `slow` | the file, and where each page is: why nothing is lost |
//! | `evict` | aging, choosing victims, taking them away |
//! | `pace` | how often, by what comes of it |
//! | `guest` | the program of the vCPUs, and what memory must hold because of it |
//! | `watch` | samples, the live view |
//! | `picture` | what `--plot` draws |

mod evict;
mod guest;
mod pace;
mod picture;
mod slow;
mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lru_age::AgeTable;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};

use super::{Builder, Error, Report, Shape};
use crate::cli::Trial;
use crate::host::Pager;
use crate::machine::PAGE;
use crate::vmm::{Vmm, VmmVcpu};
use evict::{Duty, Plan, Tierer};
use guest::{Guest, Heat, Progress};
use picture::Scene;
use slow::SlowTier;
use watch::{Sample, Watch, mib};

/// Resident memory is to fall below the hot set times this, in percent.
const LIMIT_PERCENT: u64 = 130;
/// How often other pages become hot, counting the first.
const PHASES: u64 = 2;
/// Pairs of runs with and without aging.
const PAIRS: usize = 5;
/// A run of a pair, and the time for which a phase goes on when it is where it should be: at least
/// so many times the time between two turns.
const RUN_PASSES: u32 = 4;
/// A run of a pair takes no longer than this.
const RUN_AT_MOST: Duration = Duration::from_secs(4);
/// Time that a phase may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often the cost of using a page again is measured.
const WALKS: u32 = 3;
/// Pages are taken away so many times in a trial.
const TRIAL_TURNS: u64 = 12;
/// Pages of a vCPU at least, so that some are hot and some are not.
const FEWEST: u64 = 16;
/// Pages that a vCPU visits in one command: a millisecond or a few.
const VISITS: u64 = 1 << 16;
/// The same where somebody waits for the ends of commands.
const VISITS_DISTURBED: u64 = 1 << 12;
/// Time between two cold pages that a vCPU reads.
const COLD_EVERY: Duration = Duration::from_millis(50);

/// A VM, its vCPUs and the program that they run.
struct Stage<F: SpteFormat> {
    vmm: Arc<Vmm<F>>,
    vcpus: Vec<VmmVcpu<F>>,
    guest: Guest,
    progress: Arc<Progress>,
    /// Cold pages that held something else than was written there.
    wrong: u64,
}

impl<F: SpteFormat> Stage<F> {
    /// A VM all of whose pages are written.
    fn new(vmm: Arc<Vmm<F>>, heat: Heat, tag: u64) -> Result<Self, Error> {
        let ids = 0..vmm.shape.vcpus;
        let mut vcpus = ids.map(|id| vmm.vcpu(id)).collect::<Result<Vec<_>, _>>()?;
        let guest = Guest::new(heat, vmm.shape.vcpus, tag);
        let progress = Arc::new(Progress::new(vmm.shape.vcpus));
        let _ = vmm.on_all(&mut vcpus, |vcpu| guest.populate(vcpu))?;
        Ok(Self { vmm, vcpus, guest, progress, wrong: 0 })
    }

    /// Run the guest, and `meanwhile` beside it, to the end of which it runs.
    fn run<T>(&mut self, meanwhile: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let Self { vmm, vcpus, guest, progress, .. } = self;
        progress.stop(false);
        let (ran, done) = std::thread::scope(|scope| {
            let vcpus = scope.spawn(|| {
                vmm.on_all(vcpus, |vcpu| {
                    let ran = guest.run(vcpu, progress);
                    // One that failed ends the others too.
                    ran.inspect_err(|_| progress.stop(true))
                })
            });
            let done = meanwhile();
            progress.stop(true);
            (vcpus.join(), done)
        });
        let ran = ran.map_err(|_| "a thread of the guest panicked")?;
        self.wrong += ran?.iter().sum::<u64>();
        done
    }

    /// Time that a vCPU needs to use a page again whose accessed bit was cleared and flushed: the
    /// least of a few times, by hot pages.
    fn walk(&mut self) -> Result<Duration, Error> {
        let Self { vmm, vcpus, guest, .. } = self;
        let mut actor = vmm.actor()?;
        let mut look = || {
            let begun = Instant::now();
            let pages: u64 = vmm.on_all(vcpus, |vcpu| guest.look(vcpu))?.iter().sum();
            Ok::<_, Error>((begun.elapsed(), pages / u64::from(vmm.shape.vcpus)))
        };
        let mut least = Duration::MAX;
        for _ in 0..WALKS {
            let (warm, _) = look()?;
            let request = AgeRequest::new(vmm.all_gfns(), AgeMode::ClearFlush);
            let _ = vmm.mmu.age(&mut actor, request, &mut CountOnly);
            let (cold, pages) = look()?;
            let walk = cold.saturating_sub(warm).as_nanos() / u128::from(pages.max(1));
            least = least.min(Duration::from_nanos(walk as u64));
        }
        Ok(least)
    }

    /// Pages that the guest visits each second, in a run of `time`.
    fn speed(&mut self, time: Duration) -> Result<f64, Error> {
        let before = self.progress.visits();
        let begun = Instant::now();
        self.run(|| {
            std::thread::sleep(time);
            Ok(())
        })?;
        Ok((self.progress.visits() - before) as f64 / begun.elapsed().as_secs_f64())
    }
}

/// Run the tiering thread, and `meanwhile` beside it, which is told by its argument whether the
/// thread is still at work.
fn beside<F: SpteFormat, T>(
    tierer: &mut Tierer<'_, F>,
    duty: Duty,
    meanwhile: impl FnOnce(&dyn Fn() -> bool) -> Result<T, Error>,
) -> Result<T, Error> {
    let stop = AtomicBool::new(false);
    let (worked, done) = std::thread::scope(|scope| {
        let thread = scope.spawn(|| tierer.work(duty, &stop));
        let done = meanwhile(&|| !thread.is_finished());
        stop.store(true, Ordering::Relaxed);
        (thread.join(), done)
    });
    worked.map_err(|_| "the tiering thread panicked")??;
    done
}

/// What all steps need.
struct Bench<'a, F: SpteFormat> {
    stage: Stage<F>,
    tierer: Tierer<'a, F>,
    watch: Watch<'a, F>,
    heat: Heat,
    every: Duration,
    report: Report,
}

/// Run it.
pub fn run<F: SpteFormat>(builder: &Builder<'_, F>) -> Result<Report, Error> {
    let options = builder.options;
    let begun = Instant::now();
    let pages = builder.pages(32 << 20, 64 << 20);
    if pages < u64::from(options.vcpus) * FEWEST {
        return Err(format!("{pages} pages: tiering takes {FEWEST} for each vCPU at least").into());
    }
    let trial = match options.trial {
        Trial::Cold if options.disturb => Trial::Disturbed,
        trial => trial,
    };
    let heat = Heat {
        percent: options.hot,
        scattered: options.random,
        cold_every: COLD_EVERY,
        visits: if trial.is_disturbed() { VISITS_DISTURBED } else { VISITS },
    };
    let every = Duration::from_millis(options.interval);
    let shape =
        Shape { forget_flushes: trial == Trial::ForgetFlushes, ..Shape::new(options.vcpus, pages) };
    // A VM that nobody ages, to compare with.
    let mut still = match trial.is_disturbed() {
        true => None,
        false => Some(Stage::new(builder.quiet_vmm(shape.clone())?, heat, options.seed)?),
    };
    let full_speed = still.as_mut().map_or(Ok(0.0), |still| still.speed(every * RUN_PASSES))?;

    let mut stage = Stage::new(builder.vmm(shape)?, heat, options.seed)?;
    let walk = stage.walk()?;
    let (vmm, progress) = (Arc::clone(&stage.vmm), Arc::clone(&stage.progress));
    let folder = options.slow.clone().unwrap_or_else(std::env::temp_dir);
    let first = vmm.layout.data.start;
    let tier = Arc::new(SlowTier::new(Arc::clone(&vmm.machine), first, pages, &folder)?);
    if !vmm.mmu.vm().host().set_pager(Arc::clone(&tier) as Arc<dyn Pager>) {
        return Err("the VM has a pager already".into());
    }
    let mut table = AgeTable::new(0);
    table.add_range(vmm.all_gfns())?;
    let clock = Instant::now();
    let plan = Plan { trial, every, walk, seed: options.seed };
    let hot = heat.pages(&vmm, 0);
    let limit = hot * PAGE * LIMIT_PERCENT / 100;
    let mut bench = Bench {
        tierer: Tierer::new(&vmm, &tier, &table, &progress, plan, clock)?,
        watch: Watch::new(&vmm, (&tier, &table), &progress, clock, (full_speed, limit)),
        report: builder.report("tiering", &vmm),
        stage,
        heat,
        every,
    };
    bench.report.count("hot_pages", hot);
    bench.report.metric("use_after_clearing_us_per_page", walk.as_secs_f64() * 1e6);
    if trial.is_disturbed() {
        bench.disturb()?;
    } else {
        bench.phases()?;
    }
    if let Some(still) = still {
        bench.pairs(still)?;
    }
    bench.bring_back(&tier)?;
    let Bench { stage, tierer, mut report, watch, .. } = bench;
    report.svg = Some(picture(&watch, &report)?);
    let speeds = watch::speeds(&watch.samples);
    report.timeline = watch.samples.iter().zip(&speeds).map(|(s, v)| watch::json(s, v)).collect();
    report.seconds = begun.elapsed().as_secs_f64();
    drop((tierer, stage, watch));
    drop((progress, table));
    vmm.teardown(&mut report)?;
    Ok(report)
}

fn picture<F: SpteFormat>(watch: &Watch<'_, F>, report: &Report) -> Result<String, Error> {
    let title = format!(
        "tiering on {}: {} vCPUs, {:.0} MiB of memory, {:.0} MiB of it hot",
        report.cpu,
        report.vcpus,
        mib(report.memory_bytes),
        mib(watch.limit) * 100.0 / LIMIT_PERCENT as f64
    );
    Ok(picture::draw(&Scene {
        title: &title,
        samples: &watch.samples,
        marks: &watch.marks,
        pages: report.memory_bytes / PAGE,
        limit: watch.limit,
        full_speed: watch.full_speed,
    })?)
}

impl<F: SpteFormat> Bench<'_, F> {
    /// One set of hot pages after the other: each time wait until resident memory is where it
    /// should be, and a little longer.
    fn phases(&mut self) -> Result<(), Error> {
        let Self { stage, tierer, watch, heat, every, report } = self;
        let (vmm, progress) = (Arc::clone(&stage.vmm), Arc::clone(&stage.progress));
        let held = *every * RUN_PASSES;
        let seen = beside(tierer, Duty::Tier, |at_work| {
            let phases = || {
                let mut seen = Vec::new();
                for phase in 0..PHASES {
                    progress.enter_phase(phase);
                    watch.mark(if phase == 0 { "guest starts" } else { "hot set moves" });
                    let hot = heat.pages(&vmm, phase) * PAGE;
                    watch.limit = hot * LIMIT_PERCENT / 100;
                    let go_on = || at_work() && !progress.is_stopped();
                    seen.push((hot, wait(watch, &progress, held, go_on)?));
                }
                Ok(seen)
            };
            stage.run(phases)
        })?;
        let mut detail = Vec::new();
        for (phase, (hot, waited)) in (0..).zip(&seen) {
            let (time, share) = (waited.time.as_secs_f64(), waited.resident as f64 / *hot as f64);
            report.metric(format!("phase_{phase}_until_small_s"), time);
            report.metric(format!("phase_{phase}_resident_mib"), mib(waited.resident));
            report.metric(format!("phase_{phase}_resident_by_hot_set"), share);
            let resident = mib(waited.resident);
            detail.push(format!("{resident:.1} MiB, {share:.2} x hot, after {time:.1} s"));
        }
        let ok = seen.iter().all(|(_, waited)| waited.fell);
        report.check("resident-falls-below-1.3-x-hot-set", ok, detail.join("; "));
        Ok(())
    }

    /// Take any pages away, wherever the guest is, many times.
    fn disturb(&mut self) -> Result<(), Error> {
        let Self { stage, tierer, watch, .. } = self;
        let progress = Arc::clone(&stage.progress);
        watch.mark("any pages are taken away");
        beside(tierer, Duty::Tier, |at_work| {
            stage.run(|| {
                let begun = Instant::now();
                while watch.look()?.turns < TRIAL_TURNS && begun.elapsed() < PATIENCE {
                    if !at_work() || progress.is_stopped() {
                        break;
                    }
                }
                Ok(())
            })
        })
    }

    /// Compare the guest's speed with that of a VM that nobody ages.
    fn pairs(&mut self, mut still: Stage<F>) -> Result<(), Error> {
        let Self { stage, tierer, watch, every, report, .. } = self;
        // At least one pass in each.
        let time = tierer.between_passes().clamp(*every * RUN_PASSES, RUN_AT_MOST);
        let mut ratios = Vec::new();
        for pair in 0..PAIRS {
            let mut tiered = || beside(tierer, Duty::Tier, |_| stage.speed(time));
            // Each is first as often as the other: a machine that warms up favours neither.
            let (with, without) = if pair % 2 == 0 {
                let without = still.speed(time)?;
                (tiered()?, without)
            } else {
                (tiered()?, still.speed(time)?)
            };
            ratios.push(with / without.max(1.0));
        }
        ratios.sort_by(f64::total_cmp);
        let at = |index: usize| ratios.get(index).copied().unwrap_or(0.0) * 100.0;
        report.metric("guest_speed_while_tiered_percent", at(PAIRS / 2));
        report.metric("guest_speed_while_tiered_percent_min", at(0));
        report.metric("guest_speed_while_tiered_percent_max", at(PAIRS - 1));
        watch.skip();
        let Stage { vmm, vcpus, wrong, .. } = still;
        drop(vcpus);
        let mut other = Report::new("tiering", report.cpu, report.vcpus, report.memory_bytes);
        vmm.teardown(&mut other)?;
        let failed: Vec<_> = other.checks.iter().filter(|check| !check.ok).collect();
        let ok = failed.is_empty() && wrong == 0;
        report.check("vm-without-aging-ends-well", ok, format!("{wrong} mismatches {failed:?}"));
        Ok(())
    }

    /// The guest reads everything; nothing is taken away any more.
    fn bring_back(&mut self, tier: &SlowTier) -> Result<(), Error> {
        let Self { stage, tierer, watch, report, .. } = self;
        watch.mark("guest reads everything");
        let Stage { vmm, vcpus, guest, .. } = stage;
        let verified = beside(tierer, Duty::Look, |_| {
            std::thread::scope(|scope| {
                let thread = scope.spawn(|| vmm.on_all(vcpus, |vcpu| guest.verify(vcpu)));
                let mut looked = Ok(());
                while !thread.is_finished() && looked.is_ok() {
                    looked = watch.look().map(drop);
                }
                let verified = thread.join().map_err(|_| "a thread of the guest panicked")?;
                looked.and(verified)
            })
        })?;
        let _ = watch.look()?;
        let _ = tierer.welcome()?;
        let (read, wrong) =
            verified.iter().fold((0, stage.wrong), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        let pages = stage.vmm.shape.pages;
        let detail = format!("{read} of {pages} pages read, {wrong} mismatches");
        report.check("contents-verified-by-the-guest", read == pages && wrong == 0, detail);
        let (away, bytes, moved) = (tier.away(), tier.file_bytes()?, tier.moved());
        let detail = format!("{away} pages and {bytes} bytes of the file left");
        report.check("slow-tier-empty", away == 0 && bytes == 0, detail);
        let damaged = tier.moves.damaged.load(Ordering::Relaxed);
        report.check("sums-agree", damaged == 0, format!("{} pages read back", moved.back));
        let miscounted = match away {
            0 => stage.guest.miscounted(&stage.vmm)?,
            // Looking at a page that is away would bring a page of zeroes into being.
            away => away,
        };
        let detail = format!("{miscounted} pages hold a wrong count");
        report.check("no-count-lost", miscounted == 0, detail);
        report.check("pages-were-taken-away", moved.out > 0, format!("{} pages", moved.out));
        self.figures(tier)
    }

    /// Everything that was counted.
    fn figures(&mut self, tier: &SlowTier) -> Result<(), Error> {
        let Self { tierer, report, .. } = self;
        let moved = tier.moved();
        report.count("pages_taken_away", moved.out);
        report.count("refaults", moved.back);
        report.count("taken_back_in_time", moved.taken_back);
        report.count("waits_for_a_page_in_transit", tier.moves.waits.load(Ordering::Relaxed));
        let mut tally = std::mem::take(&mut tierer.tally);
        report.count("spared_at_the_last_look", tally.spared);
        report.count("refaults_too_early", tally.early);
        report.count("turns_in_which_the_guest_thrashed", tally.thrashed);
        report.count("aging_passes", tally.pass_ns.len() as u64);
        report.percentiles("pass", tally.pass_ns);
        report.percentiles("refault", tier.take_back_ns());
        tally.distances.sort_unstable();
        let middle = tally.distances.get(tally.distances.len() / 2);
        report.metric("refault_distance_pages_p50", middle.copied().unwrap_or(0) as f64);
        Ok(())
    }
}

/// How a phase went.
struct Waited {
    /// Did resident memory fall below the limit?
    fell: bool,
    /// Until it did, or until patience ended.
    time: Duration,
    /// The least that was resident, in bytes.
    resident: u64,
}

/// Look until resident memory is below the limit, then as long as `held`. Nothing counts before
/// every vCPU has come round to all its hot pages.
fn wait<F: SpteFormat>(
    watch: &mut Watch<'_, F>,
    progress: &Progress,
    held: Duration,
    go_on: impl Fn() -> bool,
) -> Result<Waited, Error> {
    let begun = Instant::now();
    let mut waited = Waited { fell: false, time: PATIENCE, resident: u64::MAX };
    let before = progress.commands();
    let moved = || progress.commands().iter().zip(&before).all(|(now, before)| now - before >= 2);
    while go_on() && begun.elapsed() < PATIENCE {
        let Sample { resident, .. } = watch.look()?;
        if !moved() {
            continue;
        }
        waited.resident = waited.resident.min(resident);
        if resident < watch.limit && !waited.fell {
            (waited.fell, waited.time) = (true, begun.elapsed());
        }
        if waited.fell && begun.elapsed() > waited.time + held {
            break;
        }
    }
    Ok(waited)
}
