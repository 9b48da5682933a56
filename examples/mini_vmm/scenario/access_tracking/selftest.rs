//! The phases of KVM's access_tracking_perf_test, in its order and with its thresholds (KVM row
//! 5.42): populate, write and read what is populated, mark all idle, write to idle memory, mark,
//! read from idle memory, mark. With `-l` pages are marked by generations.
//!
//! Options are the test's: `-b` bytes for each vCPU, `-v` vCPUs, `-o` all vCPUs use the same
//! memory, `-r` in random order, `-s` size of the host's pages, `-m` format of the tables, `-w`
//! warn only, `-l`. What it needs a running kernel for has no counterpart: the backing of host
//! memory is always a memfd, and there are no page frame numbers to ask for that could be missing.
//!
//! Marking flushes here, so the threshold holds on machines whose TLBs forget nothing, on which
//! KVM's test, whose marking does not flush, can only warn. Under `-w -1` it fails therefore.

use std::sync::Arc;
use std::time::Instant;

use lru_age::{AgePass, AgeTable, PassOptions, Promotion};
use mmu_core::addr::Level;
use mmu_core::spte::SpteFormat;
use mmu_core::traits::AgeMode;
use mmu_core::vm::Actor;

use super::{Builder, Error, Report, Shape, pass, per_page};
use crate::cli::Trial;
use crate::host::VmmHost;
use crate::machine::Churn;
use crate::vmm::{Vmm, VmmVcpu};
use crate::workload::Workload;

/// Pages that may still be idle when all were accessed, in percent.
const STILL_IDLE: u64 = 10;
/// Of 128 pages all are written.
const WRITE: u64 = 128;
/// Of 128 pages none is.
const READ: u64 = 0;

/// What all phases need.
struct Phases<'a, F: SpteFormat> {
    vmm: Arc<Vmm<F>>,
    vcpus: Vec<VmmVcpu<F>>,
    actor: Actor<VmmHost>,
    workload: Workload,
    /// Rounds that every vCPU has done.
    rounds: u64,
    marks: Marks,
    /// What was found at each marking, in words.
    found: Vec<String>,
    /// Did each marking see enough?
    ok: bool,
    report: &'a mut Report,
}

/// How pages are marked idle.
enum Marks {
    /// Their accessed bits are cleared.
    Bits,
    /// A generation is opened; the newest that held nearly all pages when one was looked for.
    Generations(Box<AgeTable>, Option<u64>),
}

/// Run it; figures and a check go into `report`.
pub(super) fn run<F: SpteFormat>(
    builder: &Builder<'_, F>,
    report: &mut Report,
) -> Result<(), Error> {
    let options = builder.options;
    let each = builder.pages_each(8 << 20, 64 << 20);
    let regions = if options.overlap { 1 } else { u64::from(options.vcpus) };
    let mut shape = Shape::new(options.vcpus, (each * regions).max(u64::from(options.vcpus) + 1));
    shape.forget_flushes = options.trial == Trial::ForgetFlushes;
    if options.huge {
        shape.level = Level::L2;
    }
    let vmm = builder.quiet_vmm(shape)?;
    if options.huge && !vmm.machine.has_huge_pages() {
        return Err("this host shadows: 2M entries are not safe on it; use -s 4k".into());
    }
    let vcpus = (0..vmm.shape.vcpus).map(|id| vmm.vcpu(id)).collect::<Result<Vec<_>, _>>()?;
    let marks = match options.generations {
        false => Marks::Bits,
        true => {
            let mut table = AgeTable::new(0);
            table.add_range(vmm.all_gfns())?;
            Marks::Generations(Box::new(table), None)
        }
    };
    let mut phases = Phases {
        actor: vmm.actor()?,
        workload: builder.workload(0),
        vcpus,
        vmm,
        rounds: 0,
        marks,
        found: Vec::new(),
        ok: true,
        report,
    };
    phases.all()?;
    let Phases { vmm, vcpus, actor, found, ok, report, .. } = phases;
    let detail = found.join("; ");
    if ok || options.warn_only <= 0 {
        report.check("nine-of-ten-accesses-seen", ok, detail);
    } else {
        println!("  warning: accesses were not seen: {detail}");
    }
    drop((vcpus, actor));
    let mut end = Report::new("access-tracking", report.cpu, report.vcpus, report.memory_bytes);
    vmm.teardown(&mut end)?;
    let failed: Vec<_> = end.checks.iter().filter(|check| !check.ok).collect();
    report.check("second-vm-ends-well", failed.is_empty(), format!("{failed:?}"));
    Ok(())
}

impl<F: SpteFormat> Phases<'_, F> {
    fn all(&mut self) -> Result<(), Error> {
        self.access("populate", WRITE)?;
        if matches!(self.marks, Marks::Generations(..)) {
            let _ = self.mark("initial")?;
            self.access("populate_again", WRITE)?;
        }
        self.access("write_to_populated", WRITE)?;
        self.access("read_from_populated", READ)?;
        // What is seen at the first marking is not judged: pages may be idle from before.
        let _ = self.mark("after_populating")?;
        self.access("write_to_idle", WRITE)?;
        self.judge("after_writing")?;
        self.access("read_from_idle", READ)?;
        self.judge("after_reading")
    }

    /// Every vCPU visits all its pages once.
    fn access(&mut self, name: &str, written: u64) -> Result<(), Error> {
        self.rounds += 1;
        let workload =
            Workload { churn: Churn { written, ..self.workload.churn }, ..self.workload };
        let rounds = self.rounds;
        let begun = Instant::now();
        let _ = self.vmm.on_all(&mut self.vcpus, |vcpu| workload.run(vcpu, rounds))?;
        per_page(self.report, &format!("selftest_{name}"), self.vmm.shape.pages, begun.elapsed());
        Ok(())
    }

    /// Mark all pages idle; how many were not accessed since the last time.
    fn mark(&mut self, name: &str) -> Result<u64, Error> {
        let pages = self.vmm.shape.pages;
        let begun = Instant::now();
        let idle = match &mut self.marks {
            Marks::Bits => {
                let (young, _) = pass(&self.vmm, &mut self.actor, AgeMode::ClearFlush);
                pages - young.count
            }
            Marks::Generations(table, newest) => {
                let promotion = Promotion::Immediate;
                let options = PassOptions { promotion, ..PassOptions::new(AgeMode::ClearFlush) };
                let mut pass = AgePass::start_with(table, options)?;
                while pass.step(&*self.vmm.mmu, &mut self.actor, 1 << 16).next.is_some() {}
                let _ = pass.finish(0);
                // All that was accessed is in one generation, and in a newer one than last time.
                let window = table.window();
                let most = window.seqs().max_by_key(|seq| table.pages_in(*seq));
                let most = most.ok_or("a table without generations")?;
                let newer = newest.is_none_or(|newest| most.get() > newest);
                *newest = Some(most.get());
                if newer { pages - table.pages_in(most) } else { pages }
            }
        };
        per_page(self.report, &format!("selftest_mark_{name}"), pages, begun.elapsed());
        Ok(idle)
    }

    /// Mark all pages idle, all of which were accessed.
    fn judge(&mut self, name: &str) -> Result<(), Error> {
        let idle = self.mark(name)?;
        let pages = self.vmm.shape.pages;
        self.ok &= idle < (pages * STILL_IDLE).div_ceil(100);
        self.found.push(format!("{name} {idle} of {pages} pages still idle"));
        Ok(())
    }
}
