//! Looking entries up.

use std::hint::black_box;

use mmu_core::addr::{Gfn, Level};

use crate::harness::{Bench, Random, time};
use crate::host::{Shape, Vm};

/// Lookups in one section: a walker is not kept for longer than a slice of work.
const SLICE: usize = 4096;
/// Lookups that overlap.
const BATCH: usize = 16;

type Look = fn(&mut Vm, &[u32]);

/// `walk_seq`, `walk_rand`, `walk_batch16`: through a walker; `walk_one`: each in a section of its
/// own, with every entry on the way.
pub fn rows(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let pages = bench.pages();
    let mut vm = Vm::new(Shape::new(pages));
    vm.populate();
    let sequence: Vec<u32> = (0..pages as u32).collect();
    let random = Random::new(4).permutation(pages);
    let rows: [(_, Look, _); 4] = [
        ("walk_seq", look, &sequence),
        ("walk_rand", look, &random),
        ("walk_batch16", look_batch, &random),
        ("walk_one", look_once, &sequence),
    ];
    for (row, work, gfns) in rows {
        if wanted(row) {
            bench.repeat(row, pages, || time(|| work(&mut vm, gfns)));
        }
    }
}

/// One after the other.
pub fn look(vm: &mut Vm, gfns: &[u32]) {
    for slice in gfns.chunks(SLICE) {
        let mut walker = vm.mmu.walker(vm.vcpu.actor(), 0).expect("a root");
        for gfn in slice {
            let (level, spte) = walker.entry(Gfn::new(u64::from(*gfn)));
            assert!(black_box(spte).is_leaf(level));
        }
    }
}

/// Sixteen at a time.
pub fn look_batch(vm: &mut Vm, gfns: &[u32]) {
    for slice in gfns.chunks(SLICE) {
        let walker = vm.mmu.walker(vm.vcpu.actor(), 0).expect("a root");
        for batch in slice.chunks_exact(BATCH) {
            let batch: &[u32; BATCH] = batch.try_into().expect("of that size");
            let found = walker.entries(&batch.map(|gfn| Gfn::new(u64::from(gfn))));
            assert!(black_box(found).iter().all(|(level, spte)| spte.is_leaf(*level)));
        }
    }
}

/// By the call that also says how it got there.
pub fn look_once(vm: &mut Vm, gfns: &[u32]) {
    for gfn in gfns {
        let walk = vm.mmu.lookup(vm.vcpu.actor(), 0, Gfn::new(u64::from(*gfn)));
        assert!(black_box(walk).last().is_some_and(|(level, _)| *level == Level::L1));
    }
}
