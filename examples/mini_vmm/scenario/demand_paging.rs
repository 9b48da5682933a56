//! vCPUs fault their memory in, each its own share, and verify what they wrote.
//!
//! Holds: pages faulted = pages touched, no fault lost, none doubled beyond counted spurious ones.

use std::sync::atomic::Ordering;
use std::time::Instant;

use mmu_core::spte::SpteFormat;

use super::{Builder, Error, Report, Shape};
use crate::machine::Op;
use crate::report::Series;

/// Run it.
pub fn run<F: SpteFormat>(builder: &Builder<'_, F>) -> Result<Report, Error> {
    let pages = builder.pages(64 << 20, 1 << 30);
    let vmm = builder.vmm(Shape::new(builder.options.vcpus, pages))?;
    let mut report = builder.report("demand-paging", &vmm);
    let begun = Instant::now();
    let mut vcpus = (0..vmm.shape.vcpus).map(|id| vmm.vcpu(id)).collect::<Result<Vec<_>, _>>()?;
    let tag = builder.options.seed;

    // The first run loads the root and maps what the machine pins; it touches no data.
    let populate = Instant::now();
    let written = vmm.on_all(&mut vcpus, |vcpu| {
        vcpu.handling_ns = Some(Vec::new());
        let share = vcpu.vmm().share(vcpu.id);
        let report = vcpu.run_pages(Op::Write, share, tag, 1)?;
        Ok((report, vcpu.handling_ns.take().unwrap_or_default()))
    })?;
    let populate = populate.elapsed();
    let faults = vmm.exits.faults.load(Ordering::Relaxed);
    let spurious = vmm.exits.spurious.load(Ordering::Relaxed);
    let retried = vmm.exits.retried.load(Ordering::Relaxed);
    let mapped = {
        let mut actor = vmm.actor()?;
        let tree = vmm.mmu.check(&mut actor)?;
        let pinned: u64 = vmm.machine.pinned().iter().map(|(_, _, pages)| pages).sum();
        tree.pages() - pinned
    };

    let verified = vmm.on_all(&mut vcpus, |vcpu| {
        let share = vcpu.vmm().share(vcpu.id);
        vcpu.run_pages(Op::Verify, share, tag, 2)
    })?;
    let again = vmm.exits.faults.load(Ordering::Relaxed) - faults;
    report.seconds = begun.elapsed().as_secs_f64();

    let touched: u64 = written.iter().map(|(report, _)| report.pages).sum();
    let mismatches: u64 = verified.iter().map(|report| report.mismatches).sum();
    let read: u64 = verified.iter().map(|report| report.pages).sum();
    report.count("pages_touched", touched);
    report.count("faults", faults);
    report.check("every-page-touched", touched == pages, format!("{touched} of {pages}"));
    report.check("pages-mapped-are-pages-touched", mapped == touched, format!("{mapped} mapped"));
    report.check(
        "no-fault-lost-or-doubled",
        faults == touched + spurious + retried,
        format!("{faults} faults for {touched} pages, {spurious} spurious, {retried} retried"),
    );
    report.check("no-fault-on-mapped-pages", again == 0, format!("{again} while verifying"));
    report.check(
        "contents-verified-by-the-guest",
        mismatches == 0 && read == 2 * pages,
        format!("{read} pages read, {mismatches} mismatches"),
    );
    report.metric("populate_s", populate.as_secs_f64());
    report.metric("faults_per_s", faults as f64 / populate.as_secs_f64());
    report.metric(
        "exit_and_fault_us",
        populate.as_micros() as f64 * f64::from(vmm.shape.vcpus) / faults as f64,
    );
    let times: Vec<u64> = written.into_iter().flat_map(|(_, times)| times).collect();
    report.plot = Some((
        format!("demand paging on {}: time per fault inside the MMU", report.cpu),
        "share of faults, %".into(),
        "ns".into(),
        vec![Series { name: "fault".into(), points: distribution(times.clone()) }],
    ));
    report.percentiles("fault", times);
    drop(vcpus);
    vmm.teardown(&mut report)?;
    Ok(report)
}

/// Points of the cumulative distribution up to the 99th percentile.
fn distribution(mut times: Vec<u64>) -> Vec<(f64, f64)> {
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len().saturating_sub(1) * percent / 100).copied();
    (0..100).filter_map(|p| Some((p as f64, at(p)? as f64))).collect()
}
