//! Tests at their full length: `cargo test` runs their first minutes and says what it left out.

use std::time::Instant;

use crate::child;
use crate::{Error, Verdict};

/// A test whose length the environment sets.
struct Long {
    /// File in tests/, and the test.
    file: &'static str,
    test: &'static str,
    /// Variable and value.
    length: (&'static str, &'static str),
    /// How the line begins that says what it did.
    report: &'static str,
}

const TESTS: [Long; 1] = [Long {
    file: "guest_access",
    test: "half_a_billion_cases_agree_when_asked_for",
    length: ("GUEST_WALK_CASES", "long"),
    report: "CASES access, long:",
}];

pub(crate) fn run() -> Result<Verdict, Error> {
    let mut failed = 0_u32;
    let start = Instant::now();
    for Long { file, test, length: (variable, value), report } in TESTS {
        println!("{test}: {variable}={value}, some minutes");
        let mut cargo = child::cargo(&child::target());
        cargo.args(["test", "--release", "--test", file, test, "--", "--exact", "--nocapture"]);
        cargo.env(variable, value);
        let (ended, lines) = child::lines(&mut cargo, None)?;
        // A test that was skipped passes, too.
        let told = lines.iter().find_map(|line| Some(&line[line.find(report)?..]));
        match told.filter(|_| ended.success()) {
            Some(told) => println!("{test}: {told}"),
            None => {
                failed += 1;
                println!("FAILED {test}:\n{}", child::tail(&lines, 40));
            }
        }
    }
    let (all, seconds) = (TESTS.len(), start.elapsed().as_secs());
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!("long: {all} tests, {failed} failed, {seconds} s: {verdict}");
    Ok(if failed == 0 { Verdict::Held } else { Verdict::Failed })
}
