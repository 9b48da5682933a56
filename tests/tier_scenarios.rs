//! The scenarios `tiering` and `access-tracking` of `examples/mini_vmm`, small: everything they
//! check holds. Of `tiering` on every machine and format, also while hot pages are taken away and
//! faults meet every half-way state. And it does not hold when a rule is broken: pages copied
//! before they are unmapped, flushes thrown away, memory given back that a fault took back. So the
//! checks can fail.

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

use cli::{CpuChoice, FormatChoice, Options, Trial};
use report::Report;

const FORMATS: [FormatChoice; 3] = [FormatChoice::Legacy, FormatChoice::Npt, FormatChoice::Ept];

fn options(cpu: CpuChoice) -> Options {
    Options {
        cpu,
        memory: Some(if cpu == CpuChoice::Kvm { 4 << 20 } else { 8 << 20 }),
        interval: 10,
        ..Options::new(None)
    }
}

fn tiered(options: &Options) -> Report {
    scenario::run("tiering", options).unwrap_or_else(|error| panic!("{error}: {options:?}"))
}

fn holds(options: &Options) -> Report {
    let report = tiered(options);
    let failed: Vec<_> = report.checks.iter().filter(|check| !check.ok).collect();
    assert!(report.ok(), "{failed:?}: {options:?}");
    report
}

fn counted(report: &Report, name: &str) -> u64 {
    let found = report.counters.iter().find(|(counter, _)| counter == name);
    found.unwrap_or_else(|| panic!("no count {name}")).1
}

fn has_kvm(test: &str) -> bool {
    let available = kvm::available();
    if let Err(why) = &available {
        kvm::skip::aloud("no /dev/kvm", test, why);
    }
    available.is_ok()
}

#[test]
fn cold_memory_goes_and_comes_back_in_any_format() {
    for (format, random) in FORMATS.into_iter().zip([false, true, false]) {
        let report = holds(&Options { format, random, ..options(CpuChoice::Soft) });
        let drawn = report.svg.as_deref().unwrap_or_default();
        assert!(drawn.starts_with("<svg") && drawn.trim_end().ends_with("</svg>"));
    }
}

#[test]
fn any_number_of_vcpus_and_any_part_that_is_hot_will_do() {
    let base = options(CpuChoice::Soft);
    let _ = holds(&Options { vcpus: 1, ..base.clone() });
    let _ = holds(&Options { vcpus: 3, hot: 40, ..base });
}

#[test]
fn cold_memory_goes_and_comes_back_on_a_real_cpu() {
    if has_kvm("cold_memory_goes_and_comes_back_on_a_real_cpu") {
        let _ = holds(&options(CpuChoice::Kvm));
    }
}

/// Pages are taken away whoever uses them, and faults of all vCPUs meet each step of it.
fn disturbed(cpu: CpuChoice, trial: Trial) -> Options {
    Options { trial, hot: 50, random: true, memory: Some(2 << 20), ..options(cpu) }
}

#[test]
fn nothing_is_lost_while_pages_in_use_are_taken_away() {
    for format in FORMATS {
        let report = holds(&Options { format, ..disturbed(CpuChoice::Soft, Trial::Disturbed) });
        assert!(counted(&report, "taken_back_in_time") > 0, "no fault met a page on its way out");
        assert!(counted(&report, "refaults") > 0);
    }
}

#[test]
fn nothing_is_lost_while_pages_in_use_are_taken_away_on_a_real_cpu() {
    if has_kvm("nothing_is_lost_while_pages_in_use_are_taken_away_on_a_real_cpu") {
        let report = holds(&disturbed(CpuChoice::Kvm, Trial::Disturbed));
        assert!(counted(&report, "taken_back_in_time") > 0, "no fault met a page on its way out");
    }
}

/// The names of the checks that failed.
fn failed(options: &Options) -> Vec<String> {
    let report = tiered(options);
    report.checks.iter().filter(|check| !check.ok).map(|check| check.name.to_string()).collect()
}

#[test]
fn writes_are_lost_if_pages_are_copied_before_they_are_unmapped() {
    let failed = failed(&disturbed(CpuChoice::Soft, Trial::CopyFirst));
    assert_eq!(failed, ["no-count-lost"]);
}

#[test]
fn contents_are_lost_if_memory_is_given_back_that_a_fault_took_back() {
    let failed = failed(&disturbed(CpuChoice::Soft, Trial::DropTakenBack));
    assert!(failed.iter().any(|name| name == "contents-verified-by-the-guest"), "{failed:?}");
}

#[test]
fn contents_are_lost_if_flushes_are_thrown_away() {
    let failed = failed(&disturbed(CpuChoice::Soft, Trial::ForgetFlushes));
    assert!(failed.iter().any(|name| name == "contents-verified-by-the-guest"), "{failed:?}");
}

fn tracked(options: &Options) -> Report {
    scenario::run("access-tracking", options).unwrap_or_else(|error| panic!("{error}: {options:?}"))
}

#[test]
fn the_phases_of_kvms_test_see_nine_of_ten_accesses_with_any_option() {
    let base = Options { memory: Some(4 << 20), warn_only: 0, ..options(CpuChoice::Soft) };
    let of = |overlap, random, generations, huge, format| Options {
        overlap,
        random,
        generations,
        huge,
        format,
        ..base.clone()
    };
    let cases = [
        of(false, false, false, true, FormatChoice::Legacy),
        of(true, true, false, false, FormatChoice::Npt),
        of(false, true, true, false, FormatChoice::Ept),
        Options { per_vcpu: Some(1 << 20), ..of(true, false, true, true, FormatChoice::Npt) },
    ];
    for case in cases {
        let report = tracked(&case);
        let failed: Vec<_> = report.checks.iter().filter(|check| !check.ok).collect();
        assert!(report.ok(), "{failed:?}: {case:?}");
        let judged = report.checks.iter().any(|check| check.name == "nine-of-ten-accesses-seen");
        assert!(judged, "{case:?}");
    }
}

#[test]
fn accesses_that_are_not_seen_fail_or_warn() {
    for (generations, warn_only) in [(false, 0), (true, 0), (false, 1)] {
        let base = Options { memory: Some(4 << 20), ..options(CpuChoice::Soft) };
        let trial = Trial::ForgetFlushes;
        let report = tracked(&Options { generations, warn_only, trial, ..base });
        let failed: Vec<&str> =
            report.checks.iter().filter(|check| !check.ok).map(|check| &*check.name).collect();
        let expected: &[&str] = if warn_only > 0 { &[] } else { &["nine-of-ten-accesses-seen"] };
        assert_eq!(failed, expected, "-l {generations} -w {warn_only}");
    }
}

#[test]
fn aging_beside_faults_is_tabled_for_1_to_8_vcpus_in_every_way() {
    let base = Options { parallel: true, per_vcpu: Some(1 << 20), ..options(CpuChoice::Soft) };
    let report = tracked(&base);
    let failed: Vec<_> = report.checks.iter().filter(|check| !check.ok).collect();
    assert!(report.ok(), "{failed:?}");
    for vcpus in [1, 2, 4, 8] {
        for way in ["off", "locked", "lockless", "skipping"] {
            let name = format!("{vcpus}_vcpus_{way}_wall_ms");
            let wall = report.metrics.iter().find(|(metric, _)| *metric == name);
            assert!(wall.is_some_and(|(_, wall)| *wall > 0.0), "{name}");
        }
    }
}
