//! The fuzz targets of fuzz/, each for a given time.
//!
//! With a seed and an empty corpus a target tries the same inputs each time, so that a run that
//! was longer vouches for a shorter one. They need the nightly toolchain and cargo-fuzz; where one
//! is missing this says so and fails, because a campaign that did not run proves nothing.

use std::fs;
use std::process::{Command, Stdio};

use crate::child;
use crate::{Error, Verdict};

pub(crate) fn run(seconds: u64, seed: Option<u64>, wanted: &[String]) -> Result<Verdict, Error> {
    let missing = missing();
    if !missing.is_empty() {
        for what in &missing {
            println!("fuzz: MISSING {what}");
        }
        println!("fuzz: NOT RUN, nothing was checked");
        return Ok(Verdict::Failed);
    }
    let targets = targets()?;
    if let Some(name) = wanted.iter().find(|name| !targets.contains(name)) {
        return Err(format!("fuzz: there is no target `{name}`, only {targets:?}").into());
    }
    let mut failed = 0_u32;
    let mut executions = 0_u64;
    let chosen = targets.iter().filter(|name| wanted.is_empty() || wanted.contains(name));
    let mut ran = 0_u32;
    for target in chosen {
        ran += 1;
        let mut fuzz = Command::new("cargo");
        fuzz.args(["+nightly", "fuzz", "run", target, "--"])
            .arg(format!("-max_total_time={seconds}"))
            .args(["-print_final_stats=1", "-rss_limit_mb=4096"])
            // 0: libFuzzer chooses one, and prints it.
            .arg(format!("-seed={}", seed.unwrap_or(0)))
            .current_dir(child::root())
            // Set by the `cargo` that started us; they would pin the stable toolchain.
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("CARGO")
            .env("RUST_BACKTRACE", "0")
            .env("CARGO_TARGET_DIR", child::target().join("fuzz"));
        let (ended, lines) = child::lines(&mut fuzz, None)?;
        let runs = number(&lines, "stat::number_of_executed_units:");
        let edges = coverage(&lines);
        let seed = number(&lines, "INFO: Seed:");
        executions += runs;
        if ended.success() && runs > 0 {
            println!("{target:<16} {runs:>12} executions, {edges} edges, seed {seed}: ok");
        } else {
            failed += 1;
            println!("{target:<16} {runs:>12} executions, seed {seed}: FAILED\n{}", reason(&lines));
        }
    }
    println!(
        "fuzz: {ran} targets, {executions} executions, {seconds} s each, {failed} failed: {}",
        if failed == 0 && ran > 0 { "ok" } else { "FAILED" }
    );
    Ok(if failed == 0 && ran > 0 { Verdict::Held } else { Verdict::Failed })
}

/// From the panic message to the way to reproduce it, without the stack traces; the last lines when
/// nothing panicked.
fn reason(lines: &[String]) -> String {
    let panicked = lines.iter().position(|line| line.contains("panicked at"));
    let Some(from) = panicked else { return child::tail(lines, 40) };
    let frame = |line: &&String| line.trim_start().starts_with('#') || line.contains(" at ./");
    let told: Vec<&str> =
        lines[from..].iter().filter(|line| !frame(line)).map(String::as_str).take(60).collect();
    told.join("\n")
}

/// What must be installed and is not, with the command that installs it.
fn missing() -> Vec<&'static str> {
    let works = |arguments: &[&str]| {
        let mut cargo = Command::new("cargo");
        cargo.args(arguments).env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
        let quiet = cargo.stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null());
        quiet.status().is_ok_and(|status| status.success())
    };
    let mut missing = Vec::new();
    if !works(&["+nightly", "--version"]) {
        missing.push("the nightly toolchain (rustup toolchain install nightly)");
    }
    if !works(&["fuzz", "--version"]) {
        missing.push("cargo-fuzz (cargo install cargo-fuzz)");
    }
    missing
}

fn targets() -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for entry in fs::read_dir(child::root().join("fuzz/fuzz_targets"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".rs").map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// The number after `label` on the last line that holds it; 0 when there is none.
fn number(lines: &[String], label: &str) -> u64 {
    let after = |line: &String| line.split_once(label)?.1.trim().parse().ok();
    lines.iter().rev().find_map(after).unwrap_or(0)
}

/// The last `cov: N` that libFuzzer reported.
fn coverage(lines: &[String]) -> u64 {
    let after = |line: &String| line.split_once("cov: ")?.1.split(' ').next()?.parse().ok();
    lines.iter().rev().find_map(after).unwrap_or(0)
}
