//! Known breakages: each line of docs/mutants.txt names a `cfg(busted = "...")` and the one test
//! that must notice it. A suite that lets one live has a hole.
//!
//! A line is `name [loom] ARGUMENTS... test`: the arguments of `cargo test` and, last, the test's
//! name. With `loom`, the test is a model. Only a failure of the named test counts: not a build
//! error, not a hang, not another test. First the same test must pass on the sound code.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::busted;
use crate::child::{self, Ended};
use crate::{Error, Verdict};

const LIST: &str = "docs/mutants.txt";
/// A kill takes less than this, the build not counted.
const LIMIT: Duration = Duration::from_secs(60);

struct Mutant {
    name: String,
    loom: bool,
    arguments: Vec<String>,
    test: String,
}

/// What is built.
#[derive(Clone, Copy, PartialEq)]
enum Code {
    Sound,
    Broken,
}

/// What became of a named test.
#[derive(PartialEq)]
enum Outcome {
    Passed,
    Failed,
    Hung,
    /// It did not build, or no test of that name ran.
    DidNotRun(String),
}

pub(crate) fn run(wanted: &[String]) -> Result<Verdict, Error> {
    let mut mutants = Vec::new();
    for line in child::list(LIST)? {
        mutants.push(parse(&line).ok_or_else(|| format!("{LIST}: cannot read `{line}`"))?);
    }
    if let Some(name) = wanted.iter().find(|name| !mutants.iter().any(|m| m.name == **name)) {
        return Err(format!("mutants: {LIST} names no `{name}`").into());
    }
    mutants.retain(|mutant| wanted.is_empty() || wanted.contains(&mutant.name));
    let mut killed = 0_usize;
    for mutant in &mutants {
        let start = Instant::now();
        let sound = attempt(mutant, Code::Sound)?;
        let verdict = if sound == Outcome::Passed {
            match attempt(mutant, Code::Broken)? {
                Outcome::Failed => {
                    killed += 1;
                    "killed".to_owned()
                }
                Outcome::Passed => "SURVIVED: the test passes on broken code".to_owned(),
                Outcome::Hung => format!("SURVIVED: the test hung for {} s", LIMIT.as_secs()),
                Outcome::DidNotRun(why) => format!("NOT RUN on broken code:\n{why}"),
            }
        } else {
            let why = if let Outcome::DidNotRun(why) = sound { why } else { String::new() };
            format!("NOT RUN: the test does not pass on sound code\n{why}")
        };
        let seconds = start.elapsed().as_secs();
        println!("{:<28} {:<44} {seconds:>3} s  {verdict}", mutant.name, mutant.test);
    }
    let held = killed == mutants.len() && !mutants.is_empty();
    println!(
        "mutants: {killed} of {} killed: {}",
        mutants.len(),
        if held { "ok" } else { "FAILED" }
    );
    Ok(if held { Verdict::Held } else { Verdict::Failed })
}

fn parse(line: &str) -> Option<Mutant> {
    let mut words = line.split_whitespace().map(str::to_owned).peekable();
    let name = words.next()?;
    let loom = words.next_if(|word| word == "loom").is_some();
    let mut arguments: Vec<String> = words.collect();
    let test = arguments.pop()?;
    Some(Mutant { name, loom, arguments, test })
}

/// Build, then run the one test within [`LIMIT`].
fn attempt(mutant: &Mutant, code: Code) -> Result<Outcome, Error> {
    let mut build = command(mutant, code)?;
    build.arg("--no-run");
    let (ended, lines) = child::lines(&mut build, None)?;
    if !ended.success() {
        return Ok(Outcome::DidNotRun(child::tail(&lines, 20)));
    }
    let mut test = command(mutant, code)?;
    test.args(["--", &mutant.test]);
    let (ended, lines) = child::lines(&mut test, Some(LIMIT))?;
    let ran = |result: &str| {
        lines.iter().any(|line| {
            line.starts_with("test ") && line.contains(&mutant.test) && line.ends_with(result)
        })
    };
    Ok(match ended {
        Ended::TimedOut => Outcome::Hung,
        Ended::Exit(_) if ran("FAILED") => Outcome::Failed,
        Ended::Exit(status) if ran("ok") && status.success() => Outcome::Passed,
        Ended::Exit(_) => Outcome::DidNotRun(child::tail(&lines, 20)),
    })
}

fn command(mutant: &Mutant, code: Code) -> Result<Command, Error> {
    let folder = if mutant.loom { "loom" } else { "mutants" };
    let mut cargo = child::cargo(&child::target().join(folder));
    if mutant.loom {
        child::rustflags(&mut cargo, "--cfg loom");
    }
    cargo.arg("test");
    if mutant.loom {
        cargo.arg("--release");
    }
    cargo.args(&mutant.arguments);
    if code == Code::Broken {
        busted::members(&mut cargo, &mutant.name)?;
    }
    Ok(cargo)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_line_names_mutant_arguments_and_test() {
        let mutant = parse("late-free loom -p mmu-core --test loom_epoch reader_pins").unwrap();
        assert!(mutant.loom);
        assert_eq!(mutant.name, "late-free");
        assert_eq!(mutant.arguments, ["-p", "mmu-core", "--test", "loom_epoch"]);
        assert_eq!(mutant.test, "reader_pins");
        assert!(parse("alone").is_none());
    }
}
