//! What dirty logging costs: protecting a slot, clearing bits, the write that follows; and huge
//! leaves that become tables and come back.

use mmu_core::addr::Level;
use tdp_mmu::DirtyTracking;

use crate::fault::regain;
use crate::harness::{Bench, time};
use crate::host::{Shape, Vm};

/// `wrprot`: every page is writable and is protected, flush included; `wrprot_idle`: every page is
/// protected already. `clear_dirty`, `clear_dirty_idle`: the same with D bits instead of W.
pub fn protect(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let rows = [
        (DirtyTracking::WriteProtect, "wrprot", "wrprot_idle"),
        (DirtyTracking::DirtyBit, "clear_dirty", "clear_dirty_idle"),
    ];
    for (dirty, all, idle) in rows {
        if !wanted(all) && !wanted(idle) {
            continue;
        }
        let mut vm = Vm::new(Shape { dirty, ..Shape::new(bench.pages()) });
        vm.populate();
        vm.log();
        let tables = vm.leaf_tables();
        if wanted(all) {
            bench.repeat(all, vm.pages, || {
                vm.make_written(&tables);
                let ns = time(|| enable(&mut vm));
                assert!(vm.is_armed(&tables));
                ns
            });
        }
        if wanted(idle) {
            bench.repeat(idle, vm.pages, || time(|| enable(&mut vm)));
        }
    }
}

/// Make every write to the slot be logged.
fn enable(vm: &mut Vm) {
    let split = vm.mmu.log_enabled(vm.vcpu.actor(), 0, 0);
    assert!(split.out_of_frames.is_none(), "{split:?}");
}

/// `clear_log64`: every page is dirty and its bit is cleared, by masks of 64 pages, in one call.
/// `fast_fault_log`: a write to a protected page of a logged slot, mark included.
pub fn log(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let mut vm = Vm::new(Shape::new(bench.pages()));
    vm.log();
    vm.populate();
    let (pages, words) = (vm.pages, vec![u64::MAX; (vm.pages / 64) as usize]);
    let clear = |vm: &mut Vm| {
        let done = vm.mmu.clear_log(vm.vcpu.actor(), (0, 0), 0, pages, &words);
        assert_eq!(done.expect("a logged slot").pages, pages);
    };
    if wanted("clear_log64") {
        let tables = vm.leaf_tables();
        bench.repeat("clear_log64", pages, || {
            vm.make_written(&tables);
            let range = vm.range();
            assert_eq!(vm.vcpu.actor().mark_dirty(0, range), Ok(pages));
            let ns = time(|| clear(&mut vm));
            assert!(vm.is_armed(&tables));
            ns
        });
    }
    if wanted("fast_fault_log") {
        let range = vm.range();
        assert_eq!(vm.vcpu.actor().mark_dirty(0, range), Ok(pages));
        bench.repeat("fast_fault_log", pages, || {
            clear(&mut vm);
            time(|| regain(&mut vm))
        });
    }
}

/// `split`: 2 MiB leaves become tables. `collapse`: the tables become 2 MiB leaves. Per table, the
/// frames and the flush included.
pub fn sizes(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let shape = Shape { level: Level::L2, smallest: Level::L1, ..Shape::new(bench.pages()) };
    let mut vm = Vm::new(shape);
    let tables = vm.pages / Level::L2.pages();
    vm.populate_huge();
    if wanted("split") {
        bench.repeat("split", tables, || {
            let ns = time(|| split(&mut vm, tables));
            collapse(&mut vm, tables);
            ns
        });
    }
    if wanted("collapse") {
        bench.repeat("collapse", tables, || {
            split(&mut vm, tables);
            time(|| collapse(&mut vm, tables))
        });
    }
}

/// Split the first `tables` 2 MiB leaves.
pub fn split(vm: &mut Vm, tables: u64) {
    let range = vm.first(tables * Level::L2.pages());
    let report = vm.mmu.split(vm.vcpu.actor(), 0, range);
    assert_eq!((report.splits, report.out_of_frames), (tables, None));
}

/// Make 2 MiB leaves of the first `tables` tables.
pub fn collapse(vm: &mut Vm, tables: u64) {
    let range = vm.first(tables * Level::L2.pages());
    let report = vm.mmu.collapse(vm.vcpu.actor(), 0, range);
    assert_eq!((report.collapses, report.raced), ([tables, 0], 0));
}
