//! Instructions per operation, counted by callgrind: exact and repeatable where wall time is not.
//!
//! The benchmark does `--instructions ROW N`: the row's operation N times, once, without timing;
//! `--instructions list` prints the rows that can be counted. Counting N and 2 N and taking the
//! difference removes what start-up costs.

use std::path::PathBuf;
use std::process::Command;

use crate::child;
use crate::{Error, Verdict};

const OPERATIONS: u64 = 2_000;

pub(crate) fn run(wanted: &[String]) -> Result<Verdict, Error> {
    let bench = build()?;
    let rows = if wanted.is_empty() { rows(&bench)? } else { wanted.to_vec() };
    let mut counted = 0_usize;
    for row in &rows {
        match (count(&bench, row, OPERATIONS), count(&bench, row, 2 * OPERATIONS)) {
            (Ok(once), Ok(twice)) if twice > once => {
                counted += 1;
                let tenths = (twice - once) * 10 / OPERATIONS;
                println!("{row:<24} {:>10}.{} instructions", tenths / 10, tenths % 10);
            }
            (Ok(once), Ok(twice)) => println!("{row:<24} FAILED: {once}, then {twice}"),
            (Err(error), _) | (_, Err(error)) => println!("{row:<24} FAILED: {error}"),
        }
    }
    let held = counted == rows.len() && counted > 0;
    println!(
        "instructions: {counted} of {} rows counted: {}",
        rows.len(),
        if held { "ok" } else { "FAILED" }
    );
    Ok(if held { Verdict::Held } else { Verdict::Failed })
}

/// Build the benchmark and find its executable.
fn build() -> Result<PathBuf, Error> {
    let mut cargo = child::cargo(&child::target());
    cargo.args(["bench", "--bench", "rows", "--no-run"]);
    let (ended, lines) = child::lines(&mut cargo, None)?;
    if !ended.success() {
        return Err(format!("the benchmark does not build\n{}", child::tail(&lines, 30)).into());
    }
    let named = |line: &String| {
        let path = line.trim().strip_prefix("Executable ")?.split_once('(')?.1;
        Some(child::root().join(path.strip_suffix(')')?))
    };
    lines.iter().find_map(named).ok_or_else(|| "cargo did not name the benchmark's program".into())
}

fn rows(bench: &PathBuf) -> Result<Vec<String>, Error> {
    let mut list = Command::new(bench);
    list.args(["--instructions", "list"]);
    let (ended, lines) = child::lines(&mut list, None)?;
    if !ended.success() {
        return Err(format!("`rows --instructions list`: {}", child::tail(&lines, 5)).into());
    }
    Ok(lines.iter().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
}

/// Instructions of the whole program that does `row` `operations` times.
fn count(bench: &PathBuf, row: &str, operations: u64) -> Result<u64, Error> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(bench).args([
        "--instructions",
        row,
        &operations.to_string(),
    ]);
    let (ended, lines) = child::lines(&mut valgrind, None)?;
    let collected = |line: &String| line.split_once("Collected : ")?.1.trim().parse().ok();
    match lines.iter().find_map(collected) {
        Some(total) if ended.success() => Ok(total),
        _ => Err(child::tail(&lines, 5).into()),
    }
}
