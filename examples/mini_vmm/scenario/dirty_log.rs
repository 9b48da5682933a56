//! Which pages were written? The phases of KVM's dirty_log_perf_test, and what must hold.
//!
//! Holds: under vCPUs that write all the time, a copy brought up to date by the harvests alone is
//! equal to memory at the end, byte for byte; with vCPUs that stand still at each harvest, exactly
//! the pages that were written are harvested; pages are of 4 KiB while they are logged, and as
//! large as the host has them before and after.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mmu_core::addr::Level;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use mmu_core::vm::Actor;
use mmu_model::Random;

use super::{Builder, Error, Report};
use crate::cli::Options;
use crate::host::VmmHost;
use crate::log::Log;
use crate::machine::PAGE;
use crate::pages::{Copied, PageSet};
use crate::report::Series;
use crate::vmm::{Vmm, VmmVcpu};
use crate::workload::Workload;

/// How long vCPUs write between two harvests.
const BETWEEN: Duration = Duration::from_millis(10);
/// How long a harvest waits for each vCPU to have written since the last one.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pages of a leaf of 2 MiB.
const HUGE: u64 = 512;

/// What all phases need.
struct Bench<'a, F: SpteFormat> {
    vmm: &'a Arc<Vmm<F>>,
    workload: Workload,
    actor: Actor<VmmHost>,
    log: Log,
    report: Report,
    /// Rounds that every vCPU has done.
    rounds: u64,
}

/// Run it.
pub fn run<F: SpteFormat>(builder: &Builder<'_, F>) -> Result<Report, Error> {
    let options = builder.options;
    let pages = builder.pages(8 << 20, 64 << 20);
    let mut shape = builder.logged_shape(pages)?;
    if options.huge {
        shape.level = Level::L2;
    }
    let vmm = builder.vmm(shape)?;
    if options.huge && !vmm.machine.has_huge_pages() {
        return Err(
            "this host shadows: changing 2M entries under it is not safe; use --pages 4k, \
                    or --cpu soft"
                .into(),
        );
    }
    let begun = Instant::now();
    let mut bench = Bench {
        vmm: &vmm,
        workload: builder.workload(0),
        actor: vmm.actor()?,
        log: Log::new(&vmm, options.mode),
        report: builder.report("dirty-log", &vmm),
        rounds: 0,
    };
    let mut vcpus = (0..vmm.shape.vcpus).map(|id| vmm.vcpu(id)).collect::<Result<Vec<_>, _>>()?;

    let workload = bench.workload;
    let _ = bench.timed("populate_ms", |_| vmm.on_all(&mut vcpus, |v| workload.populate(v)))?;
    bench.round(&mut vcpus, "write_unlogged_ms")?;
    bench.sizes("page-sizes-before", bench.huge_sizes())?;
    bench.timed("enable_ms", |bench| bench.log.enable(&vmm, &mut bench.actor))?;
    bench.drain()?;
    bench.sizes("page-sizes-while-logging", [pages, 0, 0])?;
    bench.quiet(&mut vcpus, options.iterations)?;
    bench.host_writes()?;
    bench.running(&mut vcpus, options)?;
    let _ = vmm.on_all(&mut vcpus, |vcpu| workload.finish(vcpu))?;
    bench.rounds = workload.rounds(&vmm)?;
    if options.disturb {
        // What was taken away is mapped again.
        bench.round(&mut vcpus, "write_disturbed_ms")?;
    }
    if !options.run_while_disabling {
        bench.timed("disable_ms", |bench| bench.log.disable(&vmm, &mut bench.actor))?;
    }
    bench.sizes("page-sizes-after", bench.huge_sizes())?;
    bench.round(&mut vcpus, "write_after_ms")?;
    bench.sizes("page-sizes-after-another-round", bench.huge_sizes())?;
    let wrong = workload.verify(&vmm)?;
    bench.report.check("contents-are-what-vcpus-wrote", wrong.pages == 0, wrong.detail());

    let Bench { mut report, log, actor, .. } = bench;
    report.count("exits_with_a_full_ring", vmm.exits.ring_full.load(Ordering::Relaxed));
    report.percentiles("get", log.get_ns);
    report.percentiles("clear", log.clear_ns);
    report.seconds = begun.elapsed().as_secs_f64();
    drop((vcpus, actor));
    vmm.teardown(&mut report)?;
    Ok(report)
}

impl<F: SpteFormat> Bench<'_, F> {
    /// Do it and note how long it took.
    fn timed<T>(
        &mut self,
        name: &str,
        what: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let begun = Instant::now();
        let done = what(self)?;
        self.report.metric(name, begun.elapsed().as_secs_f64() * 1e3);
        Ok(done)
    }

    /// Every vCPU visits each of its pages once.
    fn round(&mut self, vcpus: &mut [VmmVcpu<F>], name: &str) -> Result<(), Error> {
        self.rounds += 1;
        let (workload, rounds, vmm) = (self.workload, self.rounds, Arc::clone(self.vmm));
        self.timed(name, |_| vmm.on_all(vcpus, |vcpu| workload.run(vcpu, rounds)))?;
        Ok(())
    }

    /// Leaves when all data is mapped and nothing is logged.
    fn huge_sizes(&self) -> [u64; 3] {
        let mut sizes = [self.vmm.shape.pages, 0, 0];
        if self.vmm.shape.level == Level::L1 {
            return sizes;
        }
        for slot in 0..self.vmm.shape.slots {
            let pages = self.vmm.slot_pages(slot);
            let huge = (pages.end / HUGE).saturating_sub(pages.start.div_ceil(HUGE));
            sizes[0] -= huge * HUGE;
            sizes[1] += huge;
        }
        sizes
    }

    fn sizes(&mut self, check: &'static str, expected: [u64; 3]) -> Result<(), Error> {
        let sizes = self.vmm.sizes(&mut self.actor)?;
        let detail = format!("{sizes:?} leaves of 4K, 2M and 1G, {expected:?} expected");
        self.report.check(check, sizes == expected, detail);
        Ok(())
    }

    fn harvest(&mut self) -> Result<PageSet, Error> {
        self.log.harvest(self.vmm, &mut self.actor)
    }

    /// The first harvest: what enabling left in the log.
    fn drain(&mut self) -> Result<(), Error> {
        let first = self.harvest()?;
        self.report.count("pages_in_the_first_harvest", first.len());
        let again = self.harvest()?.len();
        let detail = format!("{again} pages harvested, nobody wrote");
        self.report.check("nothing-written-nothing-harvested", again == 0, detail);
        Ok(())
    }

    /// Harvests under vCPUs that stand still: exact.
    fn quiet(&mut self, vcpus: &mut [VmmVcpu<F>], iterations: u64) -> Result<(), Error> {
        let vmm = self.vmm;
        let written = (0..vmm.shape.pages).filter(|page| self.workload.writes(vmm, *page));
        let written: Vec<u64> = written.collect();
        let (mut missed, mut invented, mut found) = (0, 0, 0);
        let mut write_ms = Vec::new();
        for _ in 0..iterations {
            self.rounds += 1;
            let (workload, rounds) = (self.workload, self.rounds);
            let begun = Instant::now();
            let _ = vmm.on_all(vcpus, |vcpu| workload.run(vcpu, rounds))?;
            write_ms.push(begun.elapsed().as_secs_f64() * 1e3);
            let dirty = self.harvest()?;
            missed += written.iter().filter(|page| !dirty.contains(**page)).count();
            found += dirty.len();
            invented += dirty.iter().filter(|page| !self.workload.writes(vmm, *page)).count();
        }
        let average = write_ms.iter().sum::<f64>() / write_ms.len().max(1) as f64;
        self.report.metric("write_logged_ms", average);
        let detail = format!(
            "{found} pages harvested in {iterations} rounds of {} written: {missed} missed, \
             {invented} not written",
            written.len()
        );
        self.report.check("harvests-are-exact", missed == 0 && invented == 0, detail);
        Ok(())
    }

    /// Pages that the VMM writes are harvested if it says so.
    fn host_writes(&mut self) -> Result<(), Error> {
        let vmm = self.vmm;
        let pages = [1, vmm.shape.pages / 2 + 1, vmm.shape.pages - 1];
        let mut expected = PageSet::new(vmm.shape.pages);
        for page in pages {
            // The same words again: whoever verifies contents later finds them right.
            vmm.fill_page(page, vmm.page(page));
            expected.insert(page);
            let _ = self.actor.mark_dirty(0, vmm.gfns(page..page + 1))?;
        }
        let dirty = self.harvest()?;
        let detail =
            format!("{} pages marked by the VMM, {} harvested", expected.len(), dirty.len());
        self.report.check("host-writes-are-harvested", dirty == expected, detail);
        Ok(())
    }

    /// Harvests under vCPUs that write all the time: nothing is missed.
    fn running(&mut self, vcpus: &mut [VmmVcpu<F>], options: &Options) -> Result<(), Error> {
        let vmm = self.vmm;
        // One for each log: none leans on what another found.
        let logs = self.log.harvest_each(vmm, &mut self.actor)?.len();
        let mut copies: Vec<_> = (0..logs).map(|_| Copied::new(vmm)).collect();
        let workload = self.workload;
        let before = workload.steps(vmm);
        let mut points = Vec::new();
        let done = AtomicBool::new(false);
        let differing = std::thread::scope(|scope| {
            let run = move || {
                vmm.on_all(vcpus, |vcpu| {
                    workload.run_until_stopped(vcpu)?;
                    Ok(())
                })
            };
            let running = scope.spawn(run);
            let disturber =
                options.disturb.then(|| scope.spawn(|| disturb(vmm, options.seed, &done)));
            let steps = || workload.steps(vmm);
            let watched = self.watch(&mut copies, options.iterations, steps, &mut points);
            done.store(true, Ordering::Relaxed);
            let disturbed = disturber.map_or(Ok(Ok(())), |thread| thread.join());
            let disabled = match options.run_while_disabling {
                true => self.timed("disable_ms", |bench| bench.log.disable(vmm, &mut bench.actor)),
                false => Ok(()),
            };
            vmm.stop();
            let ran = running.join().map_err(|_| "the vCPUs' thread panicked")?;
            vmm.unstop();
            let _ = ran?;
            disabled?;
            disturbed.map_err(|_| "the disturber panicked")??;
            watched
        })?;
        let after = workload.steps(vmm);
        let wrote = before.iter().zip(&after).all(|(before, after)| before < after);
        let detail = format!("steps {before:?}, then {after:?}");
        self.report.check("vcpus-wrote-all-the-time", wrote, detail);
        let detail = match differing.first() {
            None => format!("{} pages are as harvested, by each of {logs} logs", vmm.shape.pages),
            Some(page) => format!("{} pages differ, page {page} first", differing.len()),
        };
        self.report.check("no-write-is-missed", differing.is_empty(), detail);
        let rate = points.iter().map(|(_, pages)| pages).sum::<f64>() * PAGE as f64;
        let seconds = points.last().map_or(1.0, |(at, _)| *at);
        self.report.metric("dirty_rate_mib_per_s", rate / seconds / f64::from(1 << 20));
        self.report.plot = Some((
            format!("dirty pages by harvest on {}, vCPUs writing all the time", self.report.cpu),
            "s".into(),
            "pages".into(),
            vec![Series { name: "pages harvested".into(), points }],
        ));
        Ok(())
    }

    /// Harvest and copy while vCPUs write; the pages that differ, in one of the copies, when they
    /// stand still and the last harvest is in.
    fn watch(
        &mut self,
        copies: &mut [Copied],
        iterations: u64,
        steps: impl Fn() -> Vec<u64>,
        points: &mut Vec<(f64, f64)>,
    ) -> Result<Vec<u64>, Error> {
        let begun = Instant::now();
        let mut pages = 0;
        for _ in 0..iterations {
            let (before, since) = (steps(), Instant::now());
            std::thread::sleep(BETWEEN);
            // A busy host may leave a vCPU out for longer than that.
            let all_wrote = || steps().iter().zip(&before).all(|(now, before)| now > before);
            while !all_wrote() && since.elapsed() < PATIENCE {
                std::thread::sleep(BETWEEN);
            }
            let dirty = self.harvest_into(copies)?;
            pages += dirty.len();
            points.push((begun.elapsed().as_secs_f64(), dirty.len() as f64));
        }
        let _still = self.vmm.pause();
        pages += self.harvest_into(copies)?.len();
        self.report.count("pages_harvested_running", pages);
        Ok(copies.iter().flat_map(|copy| copy.differing(self.vmm)).collect())
    }

    /// Bring each copy up to date by its log; all pages that were harvested.
    fn harvest_into(&mut self, copies: &mut [Copied]) -> Result<PageSet, Error> {
        let mut all = PageSet::new(self.vmm.shape.pages);
        let each = self.log.harvest_each(self.vmm, &mut self.actor)?;
        for (dirty, copy) in each.iter().zip(copies) {
            copy.update(self.vmm, dirty);
            all.union(dirty);
        }
        Ok(all)
    }
}

/// Take away what the harvests look for, in every way there is, until `done`.
fn disturb<F: SpteFormat>(vmm: &Vmm<F>, seed: u64, done: &AtomicBool) -> Result<(), Error> {
    let mut actor = vmm.actor()?;
    let mut random = Random::new(seed);
    while !done.load(Ordering::Relaxed) {
        let start = random.below(vmm.shape.pages);
        let end = (start + 1 + random.below(128)).min(vmm.shape.pages);
        let range = vmm.gfns(start..end);
        match random.below(16) {
            0 => {
                let _ = vmm.mmu.invalidate_roots(&mut actor).finish(&mut actor);
            }
            1..6 => {
                let request = AgeRequest::new(range, AgeMode::ClearFlush);
                let _ = vmm.mmu.age(&mut actor, request, &mut CountOnly);
            }
            _ => {
                let _ = vmm.mmu.unmap(&mut actor, range);
            }
        }
        std::thread::sleep(Duration::from_micros(random.below(500)));
    }
    Ok(())
}
