//! The loom models: found by file name, run, and compared with the committed list.
//!
//! A model prints `MODEL name executions=N bound=B` when it is through (`bound=none` when it
//! explored everything). The list, docs/loom_models.txt, keeps a model from vanishing unnoticed.

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

use crate::child;
use crate::{Error, Verdict};

const LIST: &str = "docs/loom_models.txt";
const PACKAGES: [&str; 4] = ["mmu-core", "tdp-mmu", "shadow-mmu", "lru-age"];

struct Model {
    executions: u64,
    bound: String,
}

pub(crate) fn run() -> Result<Verdict, Error> {
    let start = Instant::now();
    let listed = child::list(LIST)?;
    let mut models: BTreeMap<String, Model> = BTreeMap::new();
    let mut failures = Vec::new();
    for package in PACKAGES {
        let files = files(package)?;
        if files.is_empty() {
            continue;
        }
        let mut cargo = child::cargo(&child::target().join("loom"));
        child::rustflags(&mut cargo, "--cfg loom");
        cargo.args(["test", "--release", "--package", package]);
        for file in &files {
            cargo.args(["--test", file]);
        }
        cargo.args(["--no-fail-fast", "--", "--nocapture"]);
        let (ended, lines) = child::lines(&mut cargo, None)?;
        for line in &lines {
            if let Some((name, model)) = parse(line) {
                models.insert(name, model);
            }
        }
        if !ended.success() {
            failures.push(format!("{package}:\n{}", child::tail(&lines, 60)));
        }
    }
    Ok(judge(&models, &listed, &failures, start))
}

/// Names of the package's test files with models, without `.rs`.
fn files(package: &str) -> Result<Vec<String>, Error> {
    let folder = child::root().join("crates").join(package).join("tests");
    let mut names = Vec::new();
    if folder.is_dir() {
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some(stem) = name.strip_suffix(".rs").filter(|s| s.starts_with("loom_")) {
                names.push(stem.to_owned());
            }
        }
    }
    names.sort();
    Ok(names)
}

/// `MODEL name executions=N bound=B`, wherever in the line it starts: the test runner may have
/// begun the line.
fn parse(line: &str) -> Option<(String, Model)> {
    let mut words = line[line.find("MODEL ")?..].split_whitespace().skip(1);
    let name = words.next()?.to_owned();
    let executions = words.next()?.strip_prefix("executions=")?.parse().ok()?;
    let bound = words.next()?.strip_prefix("bound=")?.to_owned();
    Some((name, Model { executions, bound }))
}

fn judge(
    models: &BTreeMap<String, Model>,
    listed: &[String],
    failures: &[String],
    start: Instant,
) -> Verdict {
    let mut executions = 0_u64;
    let mut bounds: BTreeMap<&str, u32> = BTreeMap::new();
    for (name, model) in models {
        println!("{name:<48} {:>12} executions, bound {}", model.executions, model.bound);
        executions += model.executions;
        *bounds.entry(&model.bound).or_default() += 1;
    }
    let missing: Vec<&str> =
        listed.iter().map(String::as_str).filter(|name| !models.contains_key(*name)).collect();
    let unlisted: Vec<&str> = models
        .keys()
        .map(String::as_str)
        .filter(|name| !listed.iter().any(|l| l == name))
        .collect();
    for failure in failures {
        println!("FAILED {failure}");
    }
    for name in &missing {
        println!("MISSING {name}: {LIST} names it, but it did not report");
    }
    for name in &unlisted {
        println!("UNLISTED {name}: add it to {LIST}");
    }
    let held = failures.is_empty() && missing.is_empty() && unlisted.is_empty();
    let held = held && !models.is_empty();
    let bounds: Vec<String> = bounds.iter().map(|(bound, n)| format!("{bound} ({n})")).collect();
    println!(
        "loom: {} models of {} listed, {executions} executions, bounds: {}, {} s: {}",
        models.len(),
        listed.len(),
        if bounds.is_empty() { "-".to_owned() } else { bounds.join(", ") },
        start.elapsed().as_secs(),
        if held { "ok" } else { "FAILED" },
    );
    if held { Verdict::Held } else { Verdict::Failed }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_report_is_found_anywhere_in_a_line() {
        let (name, model) = parse("test a ... MODEL lock::drain executions=17 bound=none").unwrap();
        assert_eq!(
            (name.as_str(), model.executions, model.bound.as_str()),
            ("lock::drain", 17, "none")
        );
        assert!(parse("MODEL lock executions=many bound=2").is_none());
        assert!(parse("test a ... ok").is_none());
    }
}
