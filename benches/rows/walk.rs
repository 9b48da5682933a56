//! Looking entries up.

use std::hint::black_box;

use mmu_core::addr::Gfn;

use crate::harness::{Bench, Random, time};
use crate::host::{Shape, Vm};

/// `walk_seq` and `walk_rand`.
pub fn rows(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let pages = bench.pages();
    let mut vm = Vm::new(Shape::new(pages));
    vm.populate();
    if wanted("walk_seq") {
        bench.repeat("walk_seq", pages, || time(|| look(&mut vm, 0..pages)));
    }
    if wanted("walk_rand") {
        let order = Random::new(4).permutation(pages);
        bench.repeat("walk_rand", pages, || {
            time(|| look(&mut vm, order.iter().map(|gfn| u64::from(*gfn))))
        });
    }
}

/// One lookup per gfn.
pub fn look(vm: &mut Vm, gfns: impl Iterator<Item = u64>) {
    for gfn in gfns {
        black_box(vm.mmu.lookup(vm.vcpu.actor(), 0, Gfn::new(gfn)));
    }
}
