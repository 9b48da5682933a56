//! `cargo bench --bench rows -- [--quick] [--json FILE] [ROW...]`: the figures of
//! `docs/PERFORMANCE.md`, measured.
//!
//! One row, one operation, one number with its spread, beside the target and the figure of KVM's
//! own code. Owns the command line; the rest stands in `rows/`: `catalogue` (which rows exist),
//! `harness` (timing, statistics, threads), `host` (the embedder and its VMs), and one file for
//! each kind of operation. Nothing here is a test; operations check their results all the same.
//!
//! Exit status: 0 when everything asked for was measured, 2 for a wrong command line or a row that
//! cannot be measured yet. Rows that this machine cannot measure are skipped with the reason.

#[path = "rows/age.rs"]
mod age;
#[path = "rows/catalogue.rs"]
mod catalogue;
#[path = "rows/dirty.rs"]
mod dirty;
#[path = "rows/fault.rs"]
mod fault;
#[path = "rows/guest.rs"]
mod guest;
#[path = "rows/harness.rs"]
mod harness;
#[path = "rows/host.rs"]
mod host;
#[path = "rows/instructions.rs"]
mod instructions;
#[path = "rows/limits.rs"]
mod limits;
#[path = "rows/pair.rs"]
mod pair;
#[path = "rows/report.rs"]
mod report;
#[path = "rows/shadow.rs"]
mod shadow;
#[path = "rows/stall.rs"]
mod stall;
#[path = "rows/tib.rs"]
mod tib;
#[path = "rows/walk.rs"]
mod walk;
#[path = "rows/zap.rs"]
mod zap;

use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::prelude::*;

use catalogue::{FAMILIES, NOT_YET};
use harness::Bench;

const USAGE: &str = "\
usage: cargo bench --bench rows -- [--quick] [--json FILE] [ROW...]
  --quick                smaller sizes, to see that everything works
  --json FILE            write an array of {row, unit, median, min, max, n, reps}
  --instructions ROW N   do the row's operation N times, untimed (for instruction counters)
  --instructions list    print the rows that --instructions knows
  --list                 print every row
";

/// What the command line asks for.
struct Request {
    quick: bool,
    json: Option<PathBuf>,
    rows: Vec<String>,
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("rows: {error}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut parser = lexopt::Parser::from_env();
    let mut request = Request { quick: false, json: None, rows: Vec::new() };
    while let Some(argument) = parser.next()? {
        match argument {
            // Given by cargo itself.
            Long("bench") => {}
            Long("quick") => request.quick = true,
            Long("json") => request.json = Some(parser.value()?.into()),
            Long("list") => {
                catalogue::names().for_each(|row| println!("{row}"));
                NOT_YET.iter().for_each(|row| println!("{row} (not yet)"));
                return Ok(ExitCode::SUCCESS);
            }
            Long("instructions") => {
                let row = parser.value()?.string()?;
                if row == "list" {
                    instructions::NAMES.iter().for_each(|row| println!("{row}"));
                    return Ok(ExitCode::SUCCESS);
                }
                instructions::run(&row, parser.value()?.parse()?)?;
                return Ok(ExitCode::SUCCESS);
            }
            Short('h') | Long("help") => {
                print!("{USAGE}");
                return Ok(ExitCode::SUCCESS);
            }
            Value(row) => request.rows.push(row.string()?),
            _ => return Err(format!("{}\n{USAGE}", argument.unexpected()).into()),
        }
    }
    measure(&request)
}

fn measure(request: &Request) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut missing = false;
    for row in &request.rows {
        if NOT_YET.contains(&row.as_str()) {
            println!("{row}: not yet: the operation is not built");
            missing = true;
        } else if !catalogue::names().any(|name| name == row) {
            return Err(format!("there is no row `{row}`; --list names them").into());
        }
    }
    let wanted = |name: &str| request.rows.is_empty() || request.rows.iter().any(|r| r == name);
    let mut bench = Bench::new(request.quick);
    for family in FAMILIES {
        if family.rows.iter().any(|row| wanted(row.name)) {
            (family.run)(&mut bench, &wanted);
        }
    }
    bench.figures.retain(|figure| wanted(figure.row));
    report::print(&bench);
    if request.rows.is_empty() {
        println!("\nnot yet: {}", NOT_YET.join(" "));
    }
    if let Some(path) = &request.json {
        report::write_json(&bench, path)?;
    }
    Ok(if missing { ExitCode::from(2) } else { ExitCode::SUCCESS })
}
