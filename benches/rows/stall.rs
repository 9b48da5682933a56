//! Faults while somebody else works: what a vCPU feels of an ager and of an unmap.

use mmu_core::addr::{Gfn, GfnRange};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::Ept;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use tdp_mmu::TdpVcpu;

use crate::harness::{Bench, beside, cpus, percentile, ticks};
use crate::host::{BenchHost, Shape, Vm, map, write};

/// Every fault's time, in ticks, retries included.
fn timed_faults(vcpu: &mut TdpVcpu<Ept, BenchHost>, gfns: std::ops::Range<u64>) -> Vec<u32> {
    let mut times = Vec::with_capacity((gfns.end - gfns.start) as usize);
    let mut before = ticks();
    for gfn in gfns {
        loop {
            match vcpu.fault(&write(gfn)).expect("frames") {
                FaultOutcome::Fixed => break,
                FaultOutcome::Retry => {}
                other => panic!("{other:?}"),
            }
        }
        let now = ticks();
        times.push(u32::try_from(now - before).unwrap_or(u32::MAX));
        before = now;
    }
    times
}

/// Mean, p99.99 and maximum of a run, nanoseconds.
fn summary(times: &mut [u32], ns_per_tick: f64) -> [f64; 3] {
    let sum: f64 = times.iter().map(|t| f64::from(*t)).sum();
    let mean = sum / times.len() as f64;
    [mean, percentile(times, 0.9999), percentile(times, 1.0)].map(|t| t * ns_per_tick)
}

/// `age_while_faulting`: mean time of a fault on fresh pages while another thread ages everything
/// over and over; the note has the same without it, and the rate of the ager.
pub fn aging(bench: &mut Bench, _: &dyn Fn(&str) -> bool) {
    const ROW: &str = "age_while_faulting";
    if cpus() < 2 {
        return bench.skip(ROW, "needs two CPUs".into());
    }
    let pages = bench.pages();
    let mut vm = Vm::new(Shape::new(2 * pages));
    let (mut alone, mut with, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    let mut shares = Vec::new();
    for rep in 0..bench.reps() {
        bench.progress(&format!("{ROW}: {rep} of {}", bench.reps()));
        vm.reset();
        map(&mut vm.vcpu, 0..pages);
        let mut times = timed_faults(&mut vm.vcpu, pages..2 * pages);
        alone.push(summary(&mut times, bench.ns_per_tick));
        vm.reset();
        map(&mut vm.vcpu, 0..pages);
        let mut ager = vm.actor();
        let entries = std::sync::atomic::AtomicU64::new(0);
        let (mmu, range) = (vm.mmu.clone(), vm.range());
        let again = |ager: &mut _| {
            let request = AgeRequest::new(range, AgeMode::Clear);
            let seen = mmu.age(ager, request, &mut CountOnly).entries;
            entries.fetch_add(seen, std::sync::atomic::Ordering::Relaxed);
        };
        let mut times = Vec::new();
        let run = beside(&mut ager, again, || {
            times = timed_faults(&mut vm.vcpu, pages..2 * pages);
        });
        with.push(summary(&mut times, bench.ns_per_tick));
        rates.push(entries.into_inner() as f64 / run.lasted.as_nanos() as f64);
        shares.push(run.cpu);
    }
    let middle = |all: &[[f64; 3]], which: usize| median(all.iter().map(|r| r[which]).collect());
    let note = format!(
        "{}alone {:.1}, p99.99 {:.0} against {:.0} alone, ager {:.2} G entries/s",
        busy(shares),
        middle(&alone, 0),
        middle(&with, 1),
        middle(&alone, 1),
        median(rates)
    );
    bench.record(ROW, pages, with.iter().map(|r| r[0]).collect(), note);
}

/// `unmap_stall_max` and `unmap_stall_p9999`: the longest fault while a neighbour maps and unmaps
/// 512 MiB elsewhere; the notes have the same without the neighbour, which is the OS's noise.
pub fn unmap(bench: &mut Bench, _: &dyn Fn(&str) -> bool) {
    const ROWS: [&str; 2] = ["unmap_stall_p9999", "unmap_stall_max"];
    if cpus() < 2 {
        return ROWS.iter().for_each(|row| bench.skip(row, "needs two CPUs".into()));
    }
    let pages = bench.pages();
    let block = (512 << 20) / 4096 / if bench.quick { 8 } else { 1 };
    let mut vm = Vm::new(Shape::new(pages + block));
    let (mut alone, mut with, mut turns) = (Vec::new(), Vec::new(), 0);
    let mut shares = Vec::new();
    for rep in 0..bench.reps() {
        bench.progress(&format!("unmap_stall: {rep} of {}", bench.reps()));
        vm.reset();
        let mut times = timed_faults(&mut vm.vcpu, 0..pages);
        alone.push(summary(&mut times, bench.ns_per_tick));
        vm.reset();
        let mut other = vm.vcpu();
        let mmu = vm.mmu.clone();
        let elsewhere = GfnRange::new(Gfn::new(pages), Gfn::new(pages + block));
        let again = |other: &mut TdpVcpu<Ept, BenchHost>| {
            map(other, elsewhere.start.get()..elsewhere.end.get());
            let gone = mmu.unmap(other.actor(), elsewhere);
            assert_eq!(gone.pages(), block);
        };
        let mut times = Vec::new();
        let run = beside(&mut other, again, || {
            times = timed_faults(&mut vm.vcpu, 0..pages);
        });
        turns += run.turns;
        shares.push(run.cpu);
        with.push(summary(&mut times, bench.ns_per_tick));
    }
    for (row, which) in ROWS.into_iter().zip([1, 2]) {
        let noise = median(alone.iter().map(|r| r[which]).collect());
        let note = format!("{}alone {noise:.0}; {turns} unmaps", busy(shares.clone()));
        bench.record(row, pages, with.iter().map(|r| r[which]).collect(), note);
    }
}

/// A warning when the threads did not have their CPUs to themselves.
fn busy(shares: Vec<f64>) -> String {
    let share = median(shares);
    if share > 0.97 {
        return String::new();
    }
    format!("NOT VALID, a thread had {:.0} % of its CPU; ", share * 100.0)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
