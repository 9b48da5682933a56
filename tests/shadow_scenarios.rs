//! The scenario `shadow` of `examples/mini_vmm`: a guest operating system computes the same on
//! shadow tables, on tables of `tdp-mmu` and in a model, whatever the host does meanwhile. And it
//! does not when flushes are thrown away: so the checks can fail. What the hypervisor cannot carry
//! out is an error that names the bytes.

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

use cli::{CpuChoice, FormatChoice, Options, PolicyChoice, Trial};
use report::Report;

fn options(seed: u64) -> Options {
    Options { cpu: CpuChoice::Soft, seed, ..Options::new(None) }
}

fn holds(options: &Options) -> Report {
    let report = scenario::run("shadow", options);
    let report = report.unwrap_or_else(|error| panic!("{error}: {options:?}"));
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
fn a_guest_computes_the_same_on_shadow_tables_and_on_tdp_tables() {
    let one = PolicyChoice::Accessed;
    for seed in 1..7 {
        let format = if seed % 2 == 0 { FormatChoice::Ept } else { FormatChoice::Npt };
        let report = holds(&Options { format, policy: one, ..options(seed) });
        assert!(counted(&report, "tdp_faults") > 0);
    }
}

#[test]
fn a_guest_does_not_notice_what_its_host_does_to_its_tables() {
    let policy = PolicyChoice::Accessed;
    for seed in 1..5 {
        let _ = holds(&Options { disturb: true, quota: 40, policy, ..options(seed) });
    }
}

#[test]
fn the_software_cpu_repeats_itself() {
    let [first, second] = [(); 2].map(|()| holds(&options(3)));
    assert_eq!(first.counters, second.counters);
    assert_eq!(first.metrics, second.metrics);
}

#[test]
fn policies_differ_and_a_picture_shows_it() {
    let report = holds(&options(1));
    let [fifo, accessed] = ["fifo", "accessed"].map(|policy| {
        (
            counted(&report, &format!("{policy}_refills")),
            counted(&report, &format!("{policy}_second_chances")),
        )
    });
    assert!(accessed.0 * 10 <= fifo.0 * 7, "{accessed:?} and {fifo:?}");
    assert_eq!(fifo.1, 0, "age alone spares nobody");
    assert!(accessed.1 > 0);
    let drawn = report.svg.as_deref().unwrap_or_default();
    assert!(drawn.starts_with("<svg") && drawn.trim_end().ends_with("</svg>"));
    assert_eq!(report.timeline.len(), 400, "200 rounds each");
}

#[test]
fn either_policy_will_do_with_any_quota() {
    for (quota, policy) in
        [(32, PolicyChoice::Fifo), (40, PolicyChoice::Accessed), (128, PolicyChoice::Both)]
    {
        let _ = holds(&Options { quota, policy, ..options(7) });
    }
}

#[test]
fn the_result_is_wrong_if_flushes_are_thrown_away() {
    // Not with every seed: the guest must edit a table through a translation that should be gone,
    // and use what the old entry led to.
    let wrong = (1..9).filter(|seed| {
        let trial = Trial::ForgetFlushes;
        match scenario::run("shadow", &Options { trial, ..options(*seed) }) {
            Ok(report) => {
                let failed = report.checks.iter().filter(|check| !check.ok);
                failed.map(|check| &*check.name).any(|name| name.contains("result"))
            }
            // The guest's kernel stumbles, or its own checks find it out.
            Err(error) => {
                println!("{error}");
                true
            }
        }
    });
    assert!(wrong.count() > 2);
}

/// Code that no kernel of ours has, and what is said about it.
const STRANGE: [(&[u8], &str); 4] = [
    (&[0x0f, 0x0b], "0f 0b (Ud2)"),
    (&[0x0f, 0x32], "0f 32 (Rdmsr)"),
    (&[0x44, 0x0f, 0x22, 0xc0], "44 0f 22 c0 (Mov_cr_r64)"),
    // CR0 without paging.
    (&[0x31, 0xc0, 0x0f, 0x22, 0xc0], "0f 22 c0 (Mov_cr_r64)"),
];

fn strange(cpu: CpuChoice) {
    for (code, said) in STRANGE {
        let options = Options { cpu, ..options(1) };
        let error = scenario::shadow::run_code(&options, code).expect_err("strange code");
        let error = error.to_string();
        assert!(error.starts_with("the instruction at 0x10000"), "{error}");
        assert!(error.ends_with(&format!("is not known: {said}")), "{error}");
    }
}

#[test]
fn an_unknown_instruction_is_an_error_that_names_its_bytes() {
    strange(CpuChoice::Soft);
    // Bytes that are no instruction in 64-bit mode.
    let error = scenario::shadow::run_code(&options(1), &[0x06; 16]).expect_err("no code");
    assert!(error.to_string().contains("is not known: 06 06 06"), "{error}");
}

#[test]
fn an_unknown_instruction_is_an_error_on_a_real_cpu() {
    if has_kvm("an_unknown_instruction_is_an_error_on_a_real_cpu") {
        strange(CpuChoice::Kvm);
    }
}

#[test]
fn a_guest_computes_the_same_on_a_real_cpu() {
    if has_kvm("a_guest_computes_the_same_on_a_real_cpu") {
        let policy = PolicyChoice::Accessed;
        let _ = holds(&Options { cpu: CpuChoice::Kvm, disturb: true, policy, ..options(2) });
    }
}
