//! The campaigns: tests too long, too special or too picky for `cargo test`. Run as
//! `cargo xtask CAMPAIGN`.
//!
//! Each ends in one summary line and an exit status: 0 when everything held, 1 when something
//! failed or could not be run, 2 for a wrong command line.
//! A terminal sees progress; a pipe sees what matters.

mod busted;
mod child;
mod emulate;
mod fuzz;
mod instructions;
mod long;
mod loom;
mod mutants;
mod no_std;

use std::process::ExitCode;

use lexopt::prelude::*;

const USAGE: &str = "\
usage: cargo xtask CAMPAIGN
  loom                       every interleaving of the models in crates/*/tests/loom_*.rs
  fuzz [--seconds N] [--seed N] [TARGET...]
                             the targets of fuzz/, N seconds each (default 60), from a seed that
                             is printed
  instructions [ROW...]      instructions per operation of the benchmark's rows, by callgrind
  mutants [NAME|plain|loom...]
                             each known breakage of docs/mutants.txt must be noticed by its test;
                             plain: those that need no model, loom: those that do
  no-std                     a static program of the crates without std: links, runs, holds no std
  emulate [npt|ept|nested|all] [--machine NAME] [--suite NAME,...] [--seed N]
          [--busted NAME [--must-fail CHECK]]
                             the test hypervisor under emulators; --busted breaks the code on
                             purpose, and --must-fail names the check that has to notice
  long                       tests at their full length: guest walks, 613 million cases
";

/// What a campaign found.
enum Verdict {
    Held,
    Failed,
    /// The command line is wrong.
    NotRun,
}

/// Why a campaign could not be carried out.
type Error = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match campaign() {
        Ok(Verdict::Held) => ExitCode::SUCCESS,
        Ok(Verdict::Failed) => ExitCode::FAILURE,
        Ok(Verdict::NotRun) => ExitCode::from(2),
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

fn campaign() -> Result<Verdict, Error> {
    let mut parser = lexopt::Parser::from_env();
    let mut words: Vec<String> = Vec::new();
    let mut seconds = 60_u64;
    let mut emulate = emulate::Options::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("seconds") => seconds = parser.value()?.parse()?,
            Long("machine") => emulate.machine = Some(parser.value()?.string()?),
            Long("suite") => emulate.suites = Some(parser.value()?.string()?),
            Long("seed") => emulate.seed = Some(parser.value()?.parse()?),
            Long("busted") => emulate.busted = Some(parser.value()?.string()?),
            Long("must-fail") => emulate.must_fail = Some(parser.value()?.string()?),
            Short('h') | Long("help") => {
                print!("{USAGE}");
                return Ok(Verdict::Held);
            }
            Value(word) => words.push(word.string()?),
            _ => return wrong(&argument.unexpected().to_string()),
        }
    }
    let Some((name, rest)) = words.split_first() else { return wrong("no campaign named") };
    match name.as_str() {
        "loom" => loom::run(),
        "fuzz" => fuzz::run(seconds, emulate.seed, rest),
        "instructions" => instructions::run(rest),
        "mutants" => mutants::run(rest),
        "no-std" => no_std::run(),
        "emulate" => emulate::run(rest, &emulate),
        "long" => long::run(),
        other => wrong(&format!("`{other}` is not a campaign")),
    }
}

fn wrong(what: &str) -> Result<Verdict, Error> {
    eprint!("xtask: {what}\n{USAGE}");
    Ok(Verdict::NotRun)
}
