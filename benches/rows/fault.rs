//! Faults on one thread.

use mmu_core::addr::Level;
use mmu_core::fault::FaultOutcome;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};

use crate::harness::{Bench, Random, time};
use crate::host::{Shape, Vm, expect, forbidden_write, map, write};

/// `fault_4k_seq` and `fault_4k_rand`: every page once, table zeroing included.
pub fn small(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let pages = bench.pages();
    let mut vm = Vm::new(Shape::new(pages));
    if wanted("fault_4k_seq") {
        bench.repeat("fault_4k_seq", pages, || {
            vm.reset();
            time(|| map(&mut vm.vcpu, 0..pages))
        });
    }
    if wanted("fault_4k_rand") {
        let order = Random::new(1).permutation(pages);
        bench.repeat("fault_4k_rand", pages, || {
            vm.reset();
            time(|| map(&mut vm.vcpu, order.iter().map(|gfn| u64::from(*gfn))))
        });
    }
}

/// `fault_2m` and `fault_1g`: 64 GiB and 8 TiB.
pub fn huge(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let shrink = if bench.quick { 8 } else { 1 };
    for (row, level, count) in [("fault_2m", Level::L2, 32_768), ("fault_1g", Level::L3, 8192)] {
        if !wanted(row) {
            continue;
        }
        let count = count / shrink;
        let step = level.pages();
        let mut vm = Vm::new(Shape { level, ..Shape::new(count * step) });
        bench.repeat(row, count, || {
            vm.reset();
            time(|| map(&mut vm.vcpu, (0..count).map(|page| page * step)))
        });
    }
}

/// `spurious`: a not-present fault on a page that is mapped, as when another vCPU was faster.
pub fn spurious(bench: &mut Bench, _: &dyn Fn(&str) -> bool) {
    let mut vm = Vm::new(Shape::new(bench.pages()));
    vm.populate();
    bench.repeat("spurious", vm.pages, || {
        time(|| {
            for gfn in 0..vm.pages {
                expect(vm.vcpu.fault(&write(gfn)), FaultOutcome::Spurious);
            }
        })
    });
}

/// `fast_fault`: W given back to a page that was write-protected. `fast_fault_tracked`: the
/// permissions of a page that was aged without hardware A/D, and W.
pub fn fast(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    if wanted("fast_fault") {
        let mut vm = Vm::new(Shape::new(bench.pages()));
        vm.populate();
        let tables = vm.leaf_tables();
        bench.repeat("fast_fault", vm.pages, || {
            vm.write_protect(&tables);
            time(|| regain(&mut vm))
        });
    }
    if wanted("fast_fault_tracked") {
        let mut vm = Vm::new(Shape { accessed_dirty: false, ..Shape::new(bench.pages()) });
        vm.populate();
        bench.repeat("fast_fault_tracked", vm.pages, || {
            let range = vm.range();
            let request = AgeRequest::new(range, AgeMode::Clear);
            let report = vm.mmu.age(vm.vcpu.actor(), request, &mut CountOnly);
            assert_eq!(report.young, vm.pages);
            time(|| regain(&mut vm))
        });
    }
}

/// A write to every page, each of which the fast path must allow.
pub fn regain(vm: &mut Vm) {
    for gfn in 0..vm.pages {
        expect(vm.vcpu.fault(&forbidden_write(gfn)), FaultOutcome::Fixed);
    }
}

/// `table_bytes_per_gib` and `meta_bytes_per_table`: counted, not timed.
pub fn space(bench: &mut Bench, _: &dyn Fn(&str) -> bool) {
    use mmu_core::frame::{FrameMeta, PageTable};
    use mmu_core::stats::Counter;
    let mut vm = Vm::new(Shape::new(bench.pages()));
    vm.populate();
    let tables = vm.mmu.vm().stats().get(Counter::Tables);
    let meta = size_of::<FrameMeta>();
    let bytes = tables * (size_of::<PageTable>() + meta) as u64;
    let gib = vm.pages as f64 / f64::from(1 << 18);
    let mib = bytes as f64 / f64::from(1 << 20) / gib;
    bench.record("table_bytes_per_gib", vm.pages, vec![mib], format!("{tables} tables"));
    bench.record("meta_bytes_per_table", 1, vec![meta as f64], String::new());
}
