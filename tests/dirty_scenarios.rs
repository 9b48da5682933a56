//! The scenarios `dirty-log` and `migrate` of `examples/mini_vmm`, small, on every machine and
//! format, in every mode: everything they check holds. And it does not hold when flushes are thrown
//! away: so the checks can fail.

#![allow(dead_code, reason = "modules of the example, of which the test uses a part")]

#[path = "../examples/mini_vmm/cli.rs"]
mod cli;
#[path = "../examples/mini_vmm/host.rs"]
mod host;
#[path = "../examples/mini_vmm/kvm/mod.rs"]
mod kvm;
#[path = "../examples/mini_vmm/log.rs"]
mod log;
#[path = "../examples/mini_vmm/machine.rs"]
mod machine;
#[path = "../examples/mini_vmm/migrate/mod.rs"]
mod migrate;
#[path = "../examples/mini_vmm/nested/mod.rs"]
mod nested;
#[path = "../examples/mini_vmm/pages.rs"]
mod pages;
#[path = "../examples/test_hypervisor/protocol.rs"]
mod protocol;
#[path = "../examples/mini_vmm/report.rs"]
mod report;
#[path = "../examples/mini_vmm/scenario/mod.rs"]
mod scenario;
#[path = "../examples/mini_vmm/soft/mod.rs"]
mod soft;
#[path = "../examples/mini_vmm/vmm.rs"]
mod vmm;
#[path = "../examples/mini_vmm/workload.rs"]
mod workload;

use std::sync::Arc;

use cli::{CpuChoice, FormatChoice, LogMode, Options, Tracking};
use log::Log;
use machine::Churn;
use mmu_core::spte::{Capabilities, Npt, SpteConfig};
use pages::Copied;
use tdp_mmu::DirtyTracking;
use vmm::{Shape, Vmm};
use workload::Workload;

const FORMATS: [FormatChoice; 3] = [FormatChoice::Legacy, FormatChoice::Npt, FormatChoice::Ept];
const MODES: [LogMode; 4] = [LogMode::Bitmap, LogMode::Clear, LogMode::Ring, LogMode::Both];
const TRACKINGS: [Tracking; 3] =
    [Tracking::WriteProtect, Tracking::DirtyBit, Tracking::HardwareLog];

fn options(cpu: CpuChoice) -> Options {
    Options {
        cpu,
        memory: Some(if cpu == CpuChoice::Kvm { 2 << 20 } else { 10 << 20 }),
        iterations: 3,
        random: true,
        write_percent: 70,
        ..Options::new(None)
    }
}

fn holds(name: &str, options: &Options) {
    let report =
        scenario::run(name, options).unwrap_or_else(|error| panic!("{error}: {options:?}"));
    let failed: Vec<_> = report.checks.iter().filter(|check| !check.ok).collect();
    assert!(report.ok(), "{failed:?}: {options:?}");
}

fn has_kvm(test: &str) -> bool {
    let available = kvm::available();
    if let Err(why) = &available {
        kvm::skip::aloud("no /dev/kvm", test, why);
    }
    available.is_ok()
}

#[test]
fn no_write_is_missed_in_any_mode_and_format() {
    for format in FORMATS {
        for mode in MODES {
            for tracking in TRACKINGS {
                let base = options(CpuChoice::Soft);
                holds("dirty-log", &Options { format, mode, tracking, ..base });
            }
        }
    }
}

#[test]
fn slots_that_end_within_a_word_and_disabling_under_running_vcpus_miss_nothing() {
    for mode in MODES {
        let base = options(CpuChoice::Soft);
        let run_while_disabling = true;
        // 2560 pages in 7 slots: 366 in each but the last.
        holds("dirty-log", &Options { mode, slots: 7, run_while_disabling, ..base.clone() });
        holds("dirty-log", &Options { mode, vcpus: 3, random: false, delay: Some(50), ..base });
    }
}

#[test]
fn no_write_is_missed_of_pages_that_all_vcpus_write() {
    let cpus = [CpuChoice::Soft, CpuChoice::Kvm];
    let kvm = has_kvm("no_write_is_missed_of_pages_that_all_vcpus_write");
    for cpu in cpus.into_iter().filter(|cpu| kvm || *cpu == CpuChoice::Soft) {
        for mode in MODES {
            for tracking in [Tracking::WriteProtect, Tracking::DirtyBit] {
                let base = options(cpu);
                // Few pages, so that the vCPUs meet on them all the time.
                let memory = Some(256 << 10);
                holds("dirty-log", &Options { mode, tracking, memory, overlap: true, ..base });
            }
        }
    }
}

#[test]
fn no_write_is_missed_while_pages_and_roots_are_taken_away() {
    let cpus = [CpuChoice::Soft, CpuChoice::Kvm];
    let kvm = has_kvm("no_write_is_missed_while_pages_and_roots_are_taken_away");
    for cpu in cpus.into_iter().filter(|cpu| kvm || *cpu == CpuChoice::Soft) {
        for mode in MODES {
            for tracking in [Tracking::WriteProtect, Tracking::DirtyBit] {
                let base = Options { disturb: true, overlap: true, ..options(cpu) };
                let memory = Some(1 << 20);
                holds("dirty-log", &Options { mode, tracking, memory, iterations: 10, ..base });
            }
        }
        if cpu == CpuChoice::Soft {
            let (tracking, mode) = (Tracking::HardwareLog, LogMode::Both);
            let base = Options { disturb: true, overlap: true, huge: true, ..options(cpu) };
            holds("dirty-log", &Options { mode, tracking, ..base });
        }
    }
}

#[test]
fn page_sizes_are_exact_before_while_and_after_logging() {
    for format in FORMATS {
        for mode in MODES {
            for tracking in TRACKINGS {
                let base = options(CpuChoice::Soft);
                holds("dirty-log", &Options { format, mode, tracking, huge: true, ..base });
            }
        }
    }
}

#[test]
fn no_write_is_missed_on_a_real_cpu() {
    if !has_kvm("no_write_is_missed_on_a_real_cpu") {
        return;
    }
    for mode in MODES {
        for tracking in [Tracking::WriteProtect, Tracking::DirtyBit] {
            holds("dirty-log", &Options { mode, tracking, ..options(CpuChoice::Kvm) });
        }
    }
}

#[test]
fn a_running_vm_moves_in_any_mode() {
    for (mode, format) in MODES.into_iter().zip(FORMATS.into_iter().cycle()) {
        let memory = Some(4 << 20);
        holds(
            "migrate",
            &Options { mode, format, memory, overlap: true, ..options(CpuChoice::Soft) },
        );
    }
}

#[test]
fn a_running_vm_moves_on_a_real_cpu() {
    if !has_kvm("a_running_vm_moves_on_a_real_cpu") {
        return;
    }
    for mode in MODES {
        holds("migrate", &Options { mode, slots: 2, ..options(CpuChoice::Kvm) });
    }
}

/// Pages that differ from a copy that was brought up to date by harvests alone.
fn missed(tracking: DirtyTracking, forget_flushes: bool) -> usize {
    let shape = Shape { tracking, forget_flushes, ..Shape::new(2, 256) };
    let walks = mmu_model::Format::Npt(mmu_model::Npt::new());
    let machine = soft::SoftMachine::new(&shape.layout(), 2, walks).expect("memory");
    let config = SpteConfig::<Npt>::new(Capabilities::npt()).expect("a configuration");
    let vmm = Vmm::new(Arc::new(machine), config, shape).expect("a VM");
    let churn = Churn { multiplier: 5, offset: 1, written: 128, delay: 0 };
    let workload = Workload { churn, overlap: false };
    let mut vcpus: Vec<_> = (0..2).map(|id| vmm.vcpu(id).expect("a vCPU")).collect();
    let mut actor = vmm.actor().expect("room");
    let mut log = Log::new(&vmm, LogMode::Bitmap);
    let _ = vmm.on_all(&mut vcpus, |vcpu| workload.run(vcpu, 1)).expect("writes");
    log.enable(&vmm, &mut actor).expect("logging");
    let _ = log.harvest(&vmm, &mut actor).expect("a harvest");
    let mut copy = Copied::new(&vmm);
    for rounds in 2..5 {
        let _ = vmm.on_all(&mut vcpus, |vcpu| workload.run(vcpu, rounds)).expect("writes");
        let dirty = log.harvest(&vmm, &mut actor).expect("a harvest");
        copy.update(&vmm, &dirty);
    }
    copy.differing(&vmm).len()
}

#[test]
fn writes_are_missed_when_flushes_are_thrown_away() {
    for tracking in [DirtyTracking::WriteProtect, DirtyTracking::DirtyBit] {
        assert_eq!(missed(tracking, false), 0, "{tracking:?}");
        assert_eq!(missed(tracking, true), 256, "{tracking:?}");
    }
}
