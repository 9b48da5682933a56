//! Two threads that fault in different places: what they cost each other.

use std::sync::atomic::{AtomicU64, Ordering};

use mmu_core::spte::Ept;
use tdp_mmu::TdpVcpu;

use crate::harness::{Bench, both, cpus};
use crate::host::{BenchHost, Shape, Vm, map};

type Vcpu = TdpVcpu<Ept, BenchHost>;

const ROUNDS: u64 = 200_000;

/// `line_transfer_ns`: one way, the time a cache line takes from one CPU to the other.
pub fn line(bench: &mut Bench, _: &dyn Fn(&str) -> bool) {
    if cpus() < 2 {
        return bench.skip("line_transfer_ns", "needs two CPUs".into());
    }
    let reps = bench.reps();
    let mut values = Vec::new();
    for _ in 0..reps * 4 {
        let ball = AtomicU64::new(0);
        let turn = |mine: &mut u64| {
            for round in 0..ROUNDS {
                while ball.load(Ordering::Acquire) != 2 * round + *mine {
                    std::hint::spin_loop();
                }
                ball.store(2 * round + *mine + 1, Ordering::Release);
            }
        };
        let run = both(bench.ns_per_tick, &mut 0, &mut 1, turn, turn);
        if run.is_valid() && values.len() < reps {
            values.push(run.wall / (2 * ROUNDS) as f64);
        }
    }
    bench.record("line_transfer_ns", ROUNDS, values, String::new());
}

/// `fault_2t_halves` and `fault_2t_blocks`: wall time per page of two threads that share the work.
pub fn faults(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let pages = bench.pages();
    let half = pages / 2;
    if wanted("fault_2t_halves") {
        rows(bench, "fault_2t_halves", move |vcpu, thread| {
            map(vcpu, thread * half..(thread + 1) * half);
        });
    }
    if wanted("fault_2t_blocks") {
        rows(bench, "fault_2t_blocks", move |vcpu, thread| {
            for block in (thread * 512..pages).step_by(1024) {
                map(vcpu, block..block + 512);
            }
        });
    }
}

fn rows(bench: &mut Bench, row: &'static str, work: impl Fn(&mut Vcpu, u64) + Sync) {
    if cpus() < 2 {
        return bench.skip(row, "needs two CPUs".into());
    }
    let pages = bench.pages();
    let mut vm = Vm::new(Shape::new(pages));
    let reps = bench.reps();
    // The same machine minutes ago is no baseline: one thread alone, in turn with the two.
    let (mut alone, mut values, mut tried) = (Vec::new(), Vec::new(), 0);
    let (mut overlap, mut cpu) = (0.0_f64, 0.0_f64);
    while values.len() < reps && tried < 8 * reps {
        bench.progress(&format!("{row}: {} of {reps}, {tried} tried", values.len()));
        tried += 1;
        vm.reset();
        let begun = crate::harness::ticks();
        work(&mut vm.vcpu, 0);
        work(&mut vm.vcpu, 1);
        let once = (crate::harness::ticks() - begun) as f64 * bench.ns_per_tick;
        vm.reset();
        let mut second = vm.vcpu();
        let run = {
            let (one, two) = (|v: &mut &mut Vcpu| work(v, 0), |v: &mut Vcpu| work(v, 1));
            both(bench.ns_per_tick, &mut &mut vm.vcpu, &mut second, one, two)
        };
        overlap = overlap.max(run.overlap);
        cpu = cpu.max(run.cpu);
        if tried > 1 && run.is_valid() {
            alone.push(once / pages as f64);
            values.push(run.wall / pages as f64);
        }
    }
    if values.is_empty() {
        let why = format!(
            "none of {tried} repetitions had both threads running side by side \
             (best overlap {:.0} %, best share of a CPU {:.0} %): is the machine busy?",
            overlap * 100.0,
            cpu * 100.0
        );
        return bench.skip(row, why);
    }
    alone.sort_by(f64::total_cmp);
    let mut sorted = values.clone();
    sorted.sort_by(f64::total_cmp);
    let scaling = alone[alone.len() / 2] / sorted[sorted.len() / 2];
    let best = alone[0] / sorted[0];
    let note = format!(
        "scaling {scaling:.2} (best runs {best:.2}); {} of {tried} repetitions valid",
        values.len()
    );
    bench.record(row, pages, values, note);
}
