//! A VMM whose guests run on page tables that the crates of this repository built.
//!
//! The guest is a program at CPL 3; its linear pages are the guest frames that `tdp-mmu` maps. On
//! /dev/kvm the real CPU walks the tables; without it a software CPU with a TLB of its own does.
//! In the scenario `shadow` it is an operating system with tables of its own, which `shadow-mmu`
//! follows.
//! Run `--help` for the commands.
//!
//! Reading order: `machine` (what a machine offers), `host` (the VMM as embedder of the crates),
//! `vmm` (the loop from exit to fault), `workload` (the program that writes all the time), `log`
//! (asking for dirty pages), `migrate`, `scenario/*`.
#![allow(clippy::cast_possible_truncation, reason = "an example on 64-bit hosts")]

mod cli;
mod host;
mod kvm;
mod log;
mod machine;
mod migrate;
mod nested;
mod pages;
#[path = "../test_hypervisor/protocol.rs"]
mod protocol;
mod report;
mod scenario;
mod soft;
mod vmm;
mod workload;

use std::process::ExitCode;

use cli::{CpuChoice, Options};
use nested::Missing;
use report::Report;

/// Exit status: nothing was checked, this machine lacks what the scenario needs.
const NOT_HERE: u8 = 3;

fn main() -> ExitCode {
    let options = match cli::parse() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("mini_vmm: {error}\n\n{}", cli::USAGE);
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let missing = error.is::<Missing>();
            eprintln!("mini_vmm: {}{error}", if missing { "SKIPPED: " } else { "" });
            if missing { ExitCode::from(NOT_HERE) } else { ExitCode::FAILURE }
        }
    }
}

/// Run the scenario, or all of them; did everything hold?
fn run(options: &Options) -> Result<bool, vmm::Error> {
    let mut options = options.clone();
    options.cpu = choose(options.cpu, options.format)?;
    let Some(name) = options.scenario.clone() else { return tour(&options) };
    if cli::NOT_YET.contains(&name.as_str()) {
        return Err(format!(
            "the scenario {name} has not landed yet; --help lists those that have"
        )
        .into());
    }
    let report = scenario::run(&name, &options)?;
    report.print();
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report.json())?;
        std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        println!("wrote {}", path.display());
    }
    if let Some(path) = &options.plot {
        report.draw(path)?;
        println!("drew {}", path.display());
    }
    Ok(report.ok())
}

/// kvm when it opens, else soft; says which and why.
fn choose(cpu: CpuChoice, format: cli::FormatChoice) -> Result<CpuChoice, vmm::Error> {
    let legacy = format == cli::FormatChoice::Legacy;
    match (cpu, kvm::available()) {
        (CpuChoice::Soft, _) => Ok(CpuChoice::Soft),
        (CpuChoice::Kvm, _) if !legacy => {
            Err("/dev/kvm walks ordinary tables only: use --format legacy, or --cpu soft".into())
        }
        (CpuChoice::Kvm, Err(why)) => {
            Err(format!("{why}; load a kvm module, or use --cpu soft").into())
        }
        (CpuChoice::Kvm, Ok(())) => Ok(CpuChoice::Kvm),
        (CpuChoice::Auto, Ok(())) if legacy => Ok(CpuChoice::Kvm),
        (CpuChoice::Auto, Ok(())) => Ok(CpuChoice::Soft),
        (CpuChoice::Auto, Err(why)) => {
            println!("no KVM ({why}): the software CPU walks the tables");
            Ok(CpuChoice::Soft)
        }
    }
}

/// Every capability that has landed, small enough to watch.
fn tour(options: &Options) -> Result<bool, vmm::Error> {
    println!("a tour of what has landed; `--help` lists the scenarios and their options");
    let mut reports: Vec<Report> = Vec::new();
    for name in scenario::NAMES {
        let mut one = options.clone();
        if name != "nested" {
            one.memory = one.memory.or(Some(16 << 20));
        }
        one.seconds = one.seconds.min(3);
        one.interval = one.interval.min(50);
        match scenario::run(name, &one) {
            Ok(report) => {
                report.print();
                reports.push(report);
            }
            Err(error) if error.is::<Missing>() => println!("\n{name}: SKIPPED: {error}"),
            Err(error) => return Err(error),
        }
    }
    if let Some(path) = &options.json {
        let all: Vec<_> = reports.iter().map(Report::json).collect();
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
        println!("wrote {}", path.display());
    }
    let failed: Vec<_> = reports.iter().filter(|r| !r.ok()).map(|r| r.scenario).collect();
    let skipped = scenario::NAMES.len() - reports.len();
    println!(
        "\ntour: {} of {} scenarios ok, {skipped} skipped",
        reports.len() - failed.len(),
        reports.len()
    );
    Ok(failed.is_empty())
}
