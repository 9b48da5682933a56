//! The test hypervisor on the emulators that are installed: the suites that show soonest whether
//! tables and exits are understood. `cargo xtask emulate` runs all of them. An emulator that is not
//! installed is skipped aloud, on the terminal itself: what a test that passes prints nobody sees.

use std::env;
use std::io::{self, Write};
use std::process::Command;

/// Short ones: the whole takes seconds, once the program is built.
const SUITES: &str = "faults,accessed-dirty,zap-all";

/// Whether `program` is installed; if not, say so.
fn installed(test: &str, program: &str, packages: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).any(|folder| folder.join(program).is_file());
    if !found {
        let what = format!("SKIPPED (no {program}): {test}: apt-get install {packages}\n");
        io::stderr().write_all(what.as_bytes()).expect("stderr takes a line");
    }
    found
}

/// Boots the program on `machine` and expects that it finds nothing wrong.
fn boots(machine: &str) {
    let mut xtask = Command::new(env!("CARGO_BIN_EXE_xtask"));
    xtask.args(["emulate", "all", "--machine", machine, "--suite", SUITES]);
    let output = xtask.output().expect("xtask runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let last = said.lines().last().unwrap_or_default();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{machine}: {}\n{said}{complained}", output.status);
    assert!(last.contains(" passed, 0 failed, ") && !last.starts_with("0 "), "{said}");
}

#[test]
fn the_hypervisor_finds_nothing_wrong_under_qemu() {
    let test = "the_hypervisor_finds_nothing_wrong_under_qemu";
    if installed(test, "qemu-system-x86_64", "qemu-system-x86") {
        boots("qemu-max-2");
    }
}

#[test]
fn the_hypervisor_finds_nothing_wrong_under_bochs() {
    let test = "the_hypervisor_finds_nothing_wrong_under_bochs";
    if installed(test, "bochs", "bochs bochsbios vgabios") {
        boots("bochs-haswell-1");
    }
}
