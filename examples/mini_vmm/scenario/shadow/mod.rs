//! A guest operating system on shadow tables: a kernel that runs at CPL 3 and whose tables the CPU
//! never walks.
//!
//! What is compared, and why it proves something. The guest's processes digest every word that they
//! read and every access that is refused to them ([`os`]). The same memory image runs twice: on
//! shadow tables, where whatever the kernel does to its tables and registers traps; and on tables
//! of `tdp-mmu`, where a CPU with two-dimensional paging executes the kernel as it is ([`tdp`]). A
//! third answer comes from a model that knows neither pages nor tables ([`expect`]). If a shadow
//! entry led elsewhere than the guest's tables do, outlived an INVLPG or a load of CR3, let a write
//! through to a page that is shared or was protected, or did not let one through that is permitted,
//! a digest would differ, or the counts of faults, copies and refusals.
//!
//! Then the experiment with reclaim ([`experiment`]): a loop over a hot set of tables with a scan
//! beside it, under a quota, once for each policy.
//!
//! | file | owns |
//! |---|---|
//! | `os`, `layout` | the guest operating system |
//! | `script`, `expect` | what its processes do, and what must come out |
//! | `image` | the loader |
//! | `decode`, `execute`, `system` | instructions |
//! | `memory`, `vm` | the hypervisor |
//! | `disturb` | what its host does meanwhile |
//! | `interpreter`, `soft`, `tdp` | software CPUs of one and two dimensions |
//! | `experiment`, `picture` | reclaim by policy |

mod decode;
mod disturb;
mod execute;
mod expect;
mod experiment;
mod image;
mod interpreter;
mod layout;
mod memory;
mod os;
mod picture;
mod script;
mod soft;
mod system;
mod tdp;
mod vm;

use std::sync::Arc;
use std::time::Instant;

use mmu_core::spte::{Capabilities, Ept, Npt, SpteConfig};
use shadow_mmu::ReclaimPolicy;

use crate::cli::{CpuChoice, FormatChoice, Options, PolicyChoice, Trial};
use crate::kvm::KvmMachine;
use crate::machine::{Machine, PAGE};
use crate::report::Report;
use crate::soft::SoftMachine;
use crate::vmm::{Error, Shape};
use disturb::Disturbed;
use image::{Image, Outcome};
use script::Script;
use soft::SoftCode;
use tdp::TdpRun;
use vm::{Machinery, Remains, Rules, ShadowVm};

/// Pages of guest memory: some are small, the rest for pages of 2 MiB.
const PAGES: u64 = (48 << 20) / PAGE;
/// Operations of a turn.
const QUANTUM: u64 = 3;
/// Processes of the workload.
const PROCESSES: u64 = 6;
/// Operations of each, on the software CPU and on /dev/kvm.
const OPERATIONS: [u64; 2] = [60, 40];

/// Run it.
pub fn run(options: &Options) -> Result<Report, Error> {
    let begun = Instant::now();
    let name = if options.cpu == CpuChoice::Kvm { "kvm" } else { "soft" };
    let mut report = Report::new("shadow", name, 1, PAGES * PAGE);
    workload(options, &mut report)?;
    experiment::run(options, &mut report)?;
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// A machine for a guest of [`PAGES`], whose loader puts `script` in; and the image.
fn boot(options: &Options, script: &Script) -> Result<(Machinery, Image, image::Start), Error> {
    let layout = Shape::new(1, PAGES).layout();
    let (machine, cpu): (Arc<dyn Machine>, Box<dyn crate::machine::CodeVcpu>) =
        if options.cpu == CpuChoice::Kvm {
            let machine = Arc::new(KvmMachine::new(&layout, 1)?);
            let cpu = machine.code_vcpu()?;
            (machine, cpu)
        } else {
            let format = mmu_model::Legacy::new(mmu_model::Mode::Long4);
            let format = mmu_model::Format::Legacy(format);
            let machine = Arc::new(SoftMachine::new(&layout, 1, format)?);
            (Arc::<SoftMachine>::clone(&machine), Box::new(SoftCode::new(machine)))
        };
    let image = Image::new(machine.memory(), layout.data.start, PAGES);
    let stub = machine.pinned().iter().map(|(_, _, pages)| pages).sum();
    let start = image.load(script, options.seed, QUANTUM, stub)?;
    Ok((Machinery { machine, cpu, layout }, image, start))
}

/// The rules of a VM.
fn rules(options: &Options, policy: ReclaimPolicy) -> Rules {
    let forget_flushes = options.trial == Trial::ForgetFlushes;
    Rules { quota: options.quota, policy, forget_flushes, disturb: None }
}

/// The random workload, on both kinds of tables.
fn workload(options: &Options, report: &mut Report) -> Result<(), Error> {
    let kvm = options.cpu == CpuChoice::Kvm;
    let script = Script::random(options.seed, PROCESSES, OPERATIONS[usize::from(kvm)]);
    let (machinery, image, start) = boot(options, &script)?;
    println!("\n{}", machinery.machine.description());
    let has_large = machinery.machine.has_huge_pages();
    let policy = match options.policy {
        PolicyChoice::Fifo => ReclaimPolicy::Fifo,
        PolicyChoice::Accessed | PolicyChoice::Both => ReclaimPolicy::Accessed,
    };
    let disturb = options.disturb.then_some(options.seed);
    let rules = Rules { disturb, ..rules(options, policy) };
    let mut vm = ShadowVm::new(machinery, &start, rules)?;
    let (mut most, mut large) = (0, 0);
    vm.run(|moment| {
        most = most.max(moment.tables);
        large = large.max(moment.large);
    })?;
    let outcome = image.outcome();
    count(&vm, &outcome, report);
    report.count("large_leaves_most", large);
    let (counts, stats) = (vm.counts, vm.stats());
    let remains = vm.finish()?;
    let tdp = on_tdp(options, &script, report)?;
    report.count("tdp_faults", tdp.faults);
    judge(&script, options.seed, &outcome, &tdp, report);
    // A busy host may give a table up before the guest's writes or a synchronisation do.
    let needed = if disturb.is_some() { 2 } else { 4 };
    let ways = [counts.emulated, stats.unsyncs, stats.syncs, stats.floods];
    report.check(
        "tables-were-followed-in-every-way",
        ways.iter().take(needed).all(|count| *count > 0),
        format!(
            "{} writes emulated, {} tables out of sync, {} synchronised, {} flooded",
            counts.emulated, stats.unsyncs, stats.syncs, stats.floods
        ),
    );
    report.check(
        "large-pages-where-the-machine-has-them",
        (large > 0) == has_large,
        format!("{large} leaves of 2 MiB at most"),
    );
    report.check(
        "tables-within-the-quota",
        most <= options.quota,
        format!("{most} at most, {} allowed", options.quota),
    );
    if disturb.is_some() {
        disturbed(&remains, report);
    }
    nothing_left("workload", &remains, report);
    Ok(())
}

/// What happened, by name.
fn count(vm: &ShadowVm, outcome: &Outcome, report: &mut Report) {
    let (counts, stats) = (vm.counts, vm.stats());
    for (name, count) in [
        ("exits_page_fault", counts.faults),
        ("faults_injected", counts.injected),
        ("table_writes_emulated", counts.emulated),
        ("privileged_instructions", counts.privileged),
        ("cr3_loads", counts.roots),
        ("invlpg", counts.invalidated),
        ("shadow_pages_made", stats.pages_made),
        ("shadow_pages_unsync", stats.unsyncs),
        ("shadow_pages_synced", stats.syncs),
        ("shadow_floods", stats.floods),
        ("guest_page_faults", outcome.faults),
        ("guest_copies_on_write", outcome.copies),
        ("guest_switches", outcome.switches),
        ("guest_accesses_refused", outcome.refused),
    ] {
        report.count(name, count);
    }
    if let Some(instructions) = vm.instructions() {
        report.count("guest_instructions", instructions);
    }
}

/// The same on tables of `tdp-mmu`.
fn on_tdp(options: &Options, script: &Script, report: &mut Report) -> Result<TdpRun, Error> {
    let load = |image: &Image| image.load(script, options.seed, QUANTUM, 0);
    if options.format == FormatChoice::Ept {
        let config = SpteConfig::<Ept>::new(Capabilities::ept())?;
        let format = mmu_model::Format::Ept(mmu_model::Ept::new());
        return tdp::run(config, format, PAGES, load, report);
    }
    let config = SpteConfig::<Npt>::new(Capabilities::npt())?;
    let format = mmu_model::Format::Npt(mmu_model::Npt::new());
    tdp::run(config, format, PAGES, load, report)
}

/// Three answers to one question.
fn judge(script: &Script, seed: u64, outcome: &Outcome, tdp: &TdpRun, report: &mut Report) {
    let expected = expect::expect(script, seed);
    report.check(
        "same-result-as-on-tdp-tables",
        *outcome == tdp.outcome,
        format!("{:#x} and {:#x}", outcome.result, tdp.outcome.result),
    );
    let found = (outcome.result, outcome.refused);
    report.check(
        "same-result-as-the-model",
        found == (expected.result, expected.refused),
        format!("{:#x} with {} accesses refused", expected.result, expected.refused),
    );
    let busy = outcome.copies > 0 && outcome.refused > 0 && outcome.switches > 0;
    report.check(
        "the-guest-was-busy",
        busy,
        format!(
            "{} faults, {} copies, {} refusals, {} switches",
            outcome.faults, outcome.copies, outcome.refused, outcome.switches
        ),
    );
}

/// The host was busy, too.
fn disturbed(remains: &Remains, report: &mut Report) {
    let Disturbed { unmapped, shrunk, dropped, aged } = remains.disturbed;
    report.check(
        "the-host-was-busy",
        [unmapped, shrunk, dropped, aged].iter().all(|count| *count > 0),
        format!(
            "{unmapped} leaves unmapped, {shrunk} tables given up, {dropped} times all dropped, \
             {aged} pages aged while the guest ran"
        ),
    );
}

/// Nothing is left of a VM.
fn nothing_left(run: &str, remains: &Remains, report: &mut Report) {
    let flaw = remains.flaw.clone();
    report.check(
        format!("{run}-books-agree"),
        flaw.is_none(),
        flaw.unwrap_or_else(|| "entries, lists and links recounted".to_owned()),
    );
    let Remains { tables, frames, leaves, .. } = *remains;
    report.check(
        format!("{run}-nothing-left"),
        tables == 0 && frames == 0 && leaves == 0,
        format!("{tables} tables, {frames} frames, {leaves} leaves"),
    );
}

/// Run a guest whose kernel is this code.
#[cfg(test)]
pub fn run_code(options: &Options, code: &[u8]) -> Result<(), Error> {
    let script = Script { processes: vec![vec![script::Operation::Exit]] };
    let (machinery, image, start) = boot(options, &script)?;
    image.replace_code(code);
    ShadowVm::new(machinery, &start, rules(options, ReclaimPolicy::Accessed))?.run(|_| {})
}
