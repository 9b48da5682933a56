//! Taking pages away.

use crate::harness::{Bench, ticks, time};
use crate::host::{Shape, Vm};

/// `unmap_range`: everything in one call.
pub fn range(bench: &mut Bench, _: &dyn Fn(&str) -> bool) {
    let mut vm = Vm::new(Shape::new(bench.pages()));
    let range = vm.range();
    bench.repeat("unmap_range", vm.pages, || {
        vm.populate();
        let before = vm.mmu.vm().host().flushes();
        let mut gone = 0;
        let ns = time(|| gone = vm.mmu.unmap(vm.vcpu.actor(), range).pages());
        assert_eq!(gone, vm.pages);
        assert!(vm.mmu.vm().host().flushes() > before, "flushed");
        ns
    });
}

/// `zap_all_visible`: until a new root can be used, in all. `zap_all_visible_416`: the same with
/// 416 vCPUs registered. `zap_all_total`: until everything is given back, per page, accessed and
/// dirty bits harvested.
pub fn all(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let mut vm = Vm::new(Shape { participants: 440, ..Shape::new(bench.pages()) });
    let mut total = Vec::new();
    let ns_per_tick = bench.ns_per_tick;
    if wanted("zap_all_visible") || wanted("zap_all_total") {
        bench.repeat("zap_all_visible", 1, || {
            vm.populate();
            zap(&mut vm, &mut total, ns_per_tick)
        });
        let per_page = total.iter().skip(1).map(|ns| ns / vm.pages as f64).collect();
        bench.record("zap_all_total", vm.pages, per_page, String::new());
    }
    if wanted("zap_all_visible_416") {
        let _others: Vec<_> = (0..416).map(|_| vm.actor()).collect();
        bench.repeat("zap_all_visible_416", 1, || {
            vm.populate();
            zap(&mut vm, &mut total, ns_per_tick)
        });
    }
}

/// The visible part is returned, the whole is noted.
fn zap(vm: &mut Vm, total: &mut Vec<f64>, ns_per_tick: f64) -> f64 {
    let mut visible = 0.0;
    let whole = time(|| {
        let begun = ticks();
        let work = vm.mmu.invalidate_roots(vm.vcpu.actor());
        vm.vcpu.load_root().expect("frames");
        visible = (ticks() - begun) as f64 * ns_per_tick;
        let report = work.finish(vm.vcpu.actor());
        assert_eq!(report.pages(), vm.pages);
    });
    total.push(whole);
    visible
}
