//! Known breakages: each line of docs/mutants.txt names a `busted!("...")` in the code and the one
//! test that must notice it. A suite that lets one live has a hole.
//!
//! A line is `name [loom] ARGUMENTS... test`: the arguments of `cargo test` and, last, the test's
//! name. With `loom`, the test is a model. Only a failure of the named test counts: not a build
//! error, not a hang, not another test. First the same test must pass with nothing broken.
//!
//! There are two builds with `cfg(busted)`, one of them under loom; each holds every breakage, and
//! the environment variable `BUSTED` picks one. What shipped code holds is `false`.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::busted::{self, VARIABLE};
use crate::child::{self, Ended};
use crate::{Error, Verdict};

const LIST: &str = "docs/mutants.txt";
/// A kill takes less than this, the build not counted.
const LIMIT: Duration = Duration::from_secs(60);
/// What makes builds quick.
const QUICK: [(&str, &str); 5] = [
    ("TEST_OPT_LEVEL", "1"),
    ("TEST_DEBUG", "0"),
    ("RELEASE_LTO", "off"),
    ("RELEASE_CODEGEN_UNITS", "16"),
    ("RELEASE_DEBUG", "0"),
];

#[derive(Debug)]
struct Mutant {
    name: String,
    loom: bool,
    arguments: Vec<String>,
    test: String,
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

impl Outcome {
    /// What it says of a test on broken code.
    fn of_broken(&self) -> String {
        match self {
            Self::Failed => "killed".to_owned(),
            Self::Passed => "SURVIVED: the test passes on broken code".to_owned(),
            Self::Hung => format!("SURVIVED: the test hung for {} s", LIMIT.as_secs()),
            Self::DidNotRun(why) => format!("NOT RUN on broken code:\n{why}"),
        }
    }

    /// Why nothing can be said of a test that does not pass on sound code.
    fn of_sound(&self) -> String {
        let why = if let Self::DidNotRun(why) = self { why.as_str() } else { "" };
        format!("NOT RUN: the test does not pass on sound code\n{why}")
    }
}

pub(crate) fn run(wanted: &[String]) -> Result<Verdict, Error> {
    let mut mutants = Vec::new();
    for line in child::list(LIST)? {
        mutants.push(parse(&line).ok_or_else(|| format!("{LIST}: cannot read `{line}`"))?);
    }
    let kinds = ["loom", "plain"];
    let fits = |mutant: &Mutant, word: &String| {
        mutant.name == *word || *word == kinds[usize::from(!mutant.loom)]
    };
    if let Some(word) = wanted.iter().find(|word| !mutants.iter().any(|m| fits(m, word))) {
        return Err(format!("mutants: {LIST} names no `{word}`").into());
    }
    mutants.retain(|mutant| wanted.is_empty() || wanted.iter().any(|word| fits(mutant, word)));
    let wrapper = busted::wrapper()?;
    let broken = build(&mutants, &wrapper)?;
    // What each test makes of sound code.
    let mut sound = BTreeMap::new();
    let mut killed = 0_usize;
    for (number, mutant) in (1..).zip(&mutants) {
        let start = Instant::now();
        let outcome = match sound.entry((mutant.loom, &mutant.arguments, &mutant.test)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(match broken.get(&(mutant.loom, &mutant.arguments)) {
                Some(why) => Outcome::DidNotRun(why.clone()),
                None => attempt(mutant, &wrapper, None)?,
            }),
        };
        let verdict = if *outcome == Outcome::Passed {
            let outcome = attempt(mutant, &wrapper, Some(&mutant.name))?;
            killed += usize::from(outcome == Outcome::Failed);
            outcome.of_broken()
        } else {
            outcome.of_sound()
        };
        let (seconds, all) = (start.elapsed().as_secs(), mutants.len());
        let Mutant { name, test, .. } = mutant;
        println!("{number:>3}/{all} {name:<32} {test:<60} {seconds:>3} s  {verdict}");
    }
    let held = killed == mutants.len() && !mutants.is_empty();
    println!(
        "mutants: {killed} of {} killed: {}",
        mutants.len(),
        if held { "ok" } else { "FAILED" }
    );
    Ok(if held { Verdict::Held } else { Verdict::Failed })
}

/// A build of `cargo test`.
type Build<'m> = (bool, &'m Vec<String>);

/// Build every test file that is needed, once. The builds that failed, and why.
fn build<'m>(mutants: &'m [Mutant], wrapper: &Path) -> Result<BTreeMap<Build<'m>, String>, Error> {
    let mut done: BTreeMap<Build<'m>, Option<String>> = BTreeMap::new();
    for mutant in mutants {
        let key = (mutant.loom, &mutant.arguments);
        if done.contains_key(&key) {
            continue;
        }
        let start = Instant::now();
        let (ended, lines) = child::lines(command(mutant, wrapper).arg("--no-run"), None)?;
        let kind = if mutant.loom { " under loom" } else { "" };
        let seconds = start.elapsed().as_secs();
        println!("built {}{kind} in {seconds} s", mutant.arguments.join(" "));
        let why = (!ended.success()).then(|| child::tail(&lines, 20));
        done.insert(key, why);
    }
    Ok(done.into_iter().filter_map(|(key, why)| Some((key, why?))).collect())
}

fn parse(line: &str) -> Option<Mutant> {
    let mut words = line.split_whitespace().map(str::to_owned).peekable();
    let name = words.next()?;
    let loom = words.next_if(|word| word == "loom").is_some();
    let mut arguments: Vec<String> = words.collect();
    let test = arguments.pop()?;
    Some(Mutant { name, loom, arguments, test })
}

/// Run the one test within [`LIMIT`], sound or with a breakage.
fn attempt(mutant: &Mutant, wrapper: &Path, broken: Option<&str>) -> Result<Outcome, Error> {
    let mut test = command(mutant, wrapper);
    match broken {
        Some(name) => test.env(VARIABLE, name),
        None => test.env_remove(VARIABLE),
    };
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

fn command(mutant: &Mutant, wrapper: &Path) -> Command {
    let folder = if mutant.loom { "loom" } else { "mutants" };
    let mut cargo = child::cargo(&child::target().join(folder));
    if mutant.loom {
        child::rustflags(&mut cargo, "--cfg loom");
    }
    cargo.arg("test");
    if mutant.loom {
        cargo.arg("--release");
    }
    // The tests are short, their builds are not.
    for (setting, value) in QUICK {
        cargo.env(format!("CARGO_PROFILE_{setting}"), value);
    }
    cargo.args(&mutant.arguments).env("RUSTC_WORKSPACE_WRAPPER", wrapper);
    cargo
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
