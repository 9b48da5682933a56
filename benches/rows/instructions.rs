//! Operations done an exact number of times, untimed, for `cargo xtask instructions`.
//!
//! What comes before the operations does not depend on their number, so that the difference between
//! two counts is theirs alone.

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::fault::FaultOutcome;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};

use crate::dirty::{collapse, split};
use crate::guest::Tables;
use crate::harness::Random;
use crate::host::{Shape, Vm, expect, forbidden_write, map, write};
use crate::shadow;
use crate::walk::{look, look_batch, look_once};

/// Rows that can be counted.
pub const NAMES: &[&str] = &[
    "fault_4k_seq",
    "fault_4k_rand",
    "fault_2m",
    "fault_1g",
    "spurious",
    "fast_fault",
    "fast_fault_tracked",
    "unmap_range",
    "age_0",
    "age_1",
    "age_50",
    "age_100",
    "age_bitmap",
    "walk_seq",
    "walk_rand",
    "walk_batch16",
    "walk_one",
    "wrprot",
    "clear_log64",
    "fast_fault_log",
    "split",
    "collapse",
    "guest_walk",
    "guest_walk_2d",
    "shadow_fault",
    "shadow_fault_nested",
    "shadow_age",
    "shadow_age_idle",
];

/// Pages that exist, however many are used.
const PAGES: u64 = 8192;

/// Do `row`'s operation `count` times.
pub fn run(row: &str, count: u64) -> Result<(), String> {
    if !NAMES.contains(&row) {
        return Err(format!("`{row}` cannot be counted; --instructions list names what can"));
    }
    if count > PAGES {
        return Err(format!("{count} operations: at most {PAGES}"));
    }
    if row.starts_with("guest_walk") {
        let tables = Tables::new(PAGES);
        match row {
            "guest_walk" => tables.walk(0..count),
            _ => tables.walk_nested(0..count),
        }
        return Ok(());
    }
    if row.starts_with("shadow") {
        shadow(row, count);
        return Ok(());
    }
    let level = match row {
        "fault_2m" | "split" | "collapse" => Level::L2,
        "fault_1g" => Level::L3,
        _ => Level::L1,
    };
    let shape = Shape::new(PAGES * level.pages());
    let accessed_dirty = row != "fast_fault_tracked";
    let smallest = if level == Level::L2 { Level::L1 } else { level };
    let mut vm = Vm::new(Shape { level, accessed_dirty, smallest, ..shape });
    let order = Random::new(5).permutation(PAGES);
    if row.starts_with("fault") {
        match row {
            "fault_4k_rand" => {
                map(&mut vm.vcpu, order[..count as usize].iter().map(|gfn| u64::from(*gfn)))
            }
            _ => map(&mut vm.vcpu, (0..count).map(|page| page * level.pages())),
        }
        return Ok(());
    }
    match row {
        "split" | "collapse" => vm.populate_huge(),
        "clear_log64" | "fast_fault_log" => {
            vm.log();
            vm.populate();
        }
        _ => vm.populate(),
    }
    match row {
        "wrprot" | "clear_log64" | "fast_fault_log" | "split" | "collapse" => {
            logged(row, &mut vm, count);
        }
        _ => on_mapped(row, &mut vm, &order, count),
    }
    Ok(())
}

fn shadow(row: &str, count: u64) {
    let order = Random::new(5).permutation(PAGES);
    let some = order[..count as usize].iter().map(|page| u64::from(*page));
    if row == "shadow_fault_nested" {
        let mut vm = shadow::NestedVm::new(PAGES);
        some.for_each(|page| vm.fault(page));
        return;
    }
    let mut vm = shadow::Vm::new(PAGES);
    match row {
        "shadow_fault" => some.for_each(|page| vm.fault(page)),
        _ => {
            (0..PAGES).for_each(|page| vm.fault(page));
            if row == "shadow_age_idle" {
                assert_eq!(vm.age(PAGES), PAGES);
            }
            let young = if row == "shadow_age" { count } else { 0 };
            assert_eq!(vm.age(count), young);
        }
    }
}

fn logged(row: &str, vm: &mut Vm, count: u64) {
    let mut words = vec![u64::MAX; (PAGES / 64) as usize];
    match row {
        "wrprot" => vm.log_first(count),
        "clear_log64" => {
            for (first, word) in (0..PAGES).step_by(64).zip(&mut words) {
                let left = count.saturating_sub(first).min(64);
                *word = if left == 64 { u64::MAX } else { (1 << left) - 1 };
            }
            let done = vm.mmu.clear_log(vm.vcpu.actor(), (0, 0), 0, PAGES, &words);
            assert_eq!(done.expect("a logged slot").pages, count);
        }
        "fast_fault_log" => {
            let done = vm.mmu.clear_log(vm.vcpu.actor(), (0, 0), 0, PAGES, &words);
            assert_eq!(done.expect("a logged slot").pages, PAGES);
            for gfn in 0..count {
                expect(vm.vcpu.fault(&forbidden_write(gfn)), FaultOutcome::Fixed);
            }
        }
        "split" => split(vm, count),
        _ => {
            split(vm, PAGES);
            collapse(vm, count);
        }
    }
}

fn on_mapped(row: &str, vm: &mut Vm, order: &[u32], count: u64) {
    let tables = vm.leaf_tables();
    let part = GfnRange::new(Gfn::new(0), Gfn::new(count));
    let all = AgeRequest::new(vm.range(), AgeMode::Clear);
    let some = all.for_range(part);
    match row {
        "spurious" => {
            (0..count).for_each(|gfn| expect(vm.vcpu.fault(&write(gfn)), FaultOutcome::Spurious));
        }
        "fast_fault" | "fast_fault_tracked" => {
            match row {
                "fast_fault" => vm.write_protect(&tables),
                _ => drop(vm.mmu.age(vm.vcpu.actor(), all, &mut CountOnly)),
            }
            for gfn in 0..count {
                expect(vm.vcpu.fault(&forbidden_write(gfn)), FaultOutcome::Fixed);
            }
        }
        "unmap_range" => assert_eq!(vm.mmu.unmap(vm.vcpu.actor(), part).pages(), count),
        "walk_seq" => look(vm, &(0..count as u32).collect::<Vec<_>>()),
        "walk_rand" => look(vm, &order[..count as usize]),
        "walk_batch16" => look_batch(vm, &order[..count as usize]),
        "walk_one" => look_once(vm, &order[..count as usize]),
        _ => {
            let percent = match row {
                "age_1" | "age_bitmap" => 1,
                "age_50" => 50,
                "age_100" => 100,
                _ => 0,
            };
            let mut random = Random::new(6);
            vm.set_accessed(&tables, || random.next() % 100 < percent);
            let report = if row == "age_bitmap" {
                let mut bits = vec![0; (PAGES / 64) as usize];
                vm.mmu.age_bitmap(vm.vcpu.actor(), some, &mut bits, &mut [])
            } else {
                vm.mmu.age(vm.vcpu.actor(), some, &mut CountOnly)
            };
            assert_eq!(report.mapped, count);
        }
    }
}
