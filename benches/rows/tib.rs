//! Aging a VM of 1 TiB in 4 KiB pages: 268 million entries that really exist, 2 GiB of tables.

use std::fs;

use mmu_core::addr::Pfn;
use mmu_core::frame::raw;
use mmu_core::spte::{Ept, SpteFormat};

use crate::age::upper_pass;
use crate::harness::{Bench, Random, time};
use crate::host::{Shape, Vm, map};

const ROWS: [&str; 3] = ["age_1tib_full", "age_1tib_hot1", "age_1tib_idle"];
/// Memory that must be available: tables, and room for others.
const NEEDED_GIB: u64 = 6;

/// `age_1tib_full`: every link accessed, every leaf old. `age_1tib_hot1`: 1 % of the 2 MiB regions
/// touched, every leaf in them and the links above. `age_1tib_idle`: nothing touched. Milliseconds
/// per call that uses upper accessed bits, clears them, and flushes once; the note has the entries
/// that it read.
pub fn rows(bench: &mut Bench, wanted: &dyn Fn(&str) -> bool) {
    let available = available_gib();
    if available < NEEDED_GIB && !bench.quick {
        for row in ROWS.into_iter().filter(|row| wanted(row)) {
            bench.skip(row, format!("needs {NEEDED_GIB} GiB, {available} GiB are available"));
        }
        return;
    }
    // `--quick` does 16 GiB and says so by `n`.
    let pages: u64 = if bench.quick { 1 << 22 } else { 1 << 28 };
    let mut vm = Vm::new(Shape::new(pages));
    for first in (0..pages).step_by(1 << 20) {
        bench.progress(&format!("mapping 1 TiB: {} %", first * 100 / pages));
        map(&mut vm.vcpu, first..first + (1 << 20));
    }
    let tables = vm.leaf_tables();
    vm.set_accessed(&tables, || false);
    let mut random = Random::new(3);
    for row in ROWS.into_iter().filter(|row| wanted(row)) {
        let reps = bench.reps().min(7);
        let (mut values, mut entries) = (Vec::new(), 0);
        for rep in 0..reps {
            bench.progress(&format!("{row}: {rep} of {reps}"));
            let hot: Vec<usize> = match row {
                "age_1tib_hot1" => (0..tables.len()).filter(|_| random.next() % 100 == 0).collect(),
                _ => Vec::new(),
            };
            set_links(&mut vm, row == "age_1tib_full", &hot);
            let touched: Vec<Pfn> = hot.iter().map(|index| tables[*index]).collect();
            let young = vm.set_accessed(&touched, || true);
            vm.evict();
            let mut found = None;
            values.push(time(|| found = Some(upper_pass(&mut vm))) / 1e6);
            let found = found.expect("one pass");
            assert_eq!(found.young, young);
            entries = found.entries;
        }
        bench.record(row, pages, values, format!("{entries} entries read"));
    }
}

/// The CPU's role in the upper levels: A in every link on the way to a hot table, or in all.
fn set_links(vm: &mut Vm, all: bool, hot: &[usize]) {
    let root = vm.vcpu.load_root().expect("frames");
    let host = vm.mmu.vm().host();
    let mut tables = vec![root];
    let mut level = vm.mmu.config().levels();
    while let Some(below) = level.down() {
        let mut next = Vec::new();
        // Leaf tables (of which there are 512 per entry and level) below each link.
        let leaves = 1usize << (9 * (usize::from(level.number()) - 2));
        for cell in tables.iter().flat_map(|frame| raw::table(host, *frame).entries()) {
            let link = cell.peek();
            if !link.is_table(level) {
                continue;
            }
            let reach = next.len() * leaves..(next.len() + 1) * leaves;
            let from = hot.partition_point(|index| *index < reach.start);
            let touched = all || hot.get(from).is_some_and(|index| reach.contains(index));
            let cold = link.without(Ept::ACCESSED);
            cell.init(if touched { cold.with(Ept::ACCESSED) } else { cold });
            next.push(link.pfn());
        }
        tables = next;
        level = below;
    }
}

fn available_gib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) >> 20
}
