//! Aging on one thread, tables out of the caches.

use mmu_core::traits::{AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, CountOnly, UpperBits};

use crate::harness::{Bench, Random, time};
use crate::host::{Shape, Vm};

/// `age_0` to `age_100`: the share of leaves whose accessed bit the CPU has set. `age_bitmap`: the
/// answer for every gfn, at 1 %.
pub fn shares(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let mut vm = Vm::new(Shape::new(bench.pages()));
    vm.populate();
    let tables = vm.leaf_tables();
    let mut random = Random::new(2);
    for (row, percent) in [("age_0", 0), ("age_1", 1), ("age_50", 50), ("age_100", 100)] {
        if wanted(row) {
            bench.repeat(row, vm.pages, || {
                let young = vm.set_accessed(&tables, || random.next() % 100 < percent);
                vm.evict();
                time(|| assert_eq!(pass(&mut vm, &mut CountOnly), young))
            });
        }
    }
    if wanted("age_bitmap") {
        let mut bits = vec![0; (vm.pages / 64) as usize];
        bench.repeat("age_bitmap", vm.pages, || {
            let young = vm.set_accessed(&tables, || random.next() % 100 < 1);
            vm.evict();
            let ns = time(|| assert_eq!(bitmap(&mut vm, &mut bits), young));
            assert_eq!(bits.iter().map(|w| u64::from(w.count_ones())).sum::<u64>(), young);
            ns
        });
    }
}

/// One call over everything that answers for each gfn; the young pages it saw.
pub fn bitmap(vm: &mut Vm, bits: &mut [u64]) -> u64 {
    let request = AgeRequest::new(vm.range(), AgeMode::Clear);
    vm.mmu.age_bitmap(vm.vcpu.actor(), request, bits, &mut []).young
}

/// One call over everything; the young pages it saw.
pub fn pass(vm: &mut Vm, sink: &mut impl AgeSink) -> u64 {
    let request = AgeRequest::new(vm.range(), AgeMode::Clear);
    vm.mmu.age(vm.vcpu.actor(), request, sink).young
}

/// The same as a call that uses upper accessed bits and flushes, so that the next may believe them.
pub fn upper_pass(vm: &mut Vm) -> AgeReport {
    let request = AgeRequest::new(vm.range(), AgeMode::ClearFlush).with_upper(UpperBits::Use);
    vm.mmu.age(vm.vcpu.actor(), request, &mut CountOnly)
}
