//! The no_std gate: tests/no_std is a static program that links the crates without std. That it
//! links, runs and exits with 0 proves that the crates ask for nothing but `core` and `alloc`.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::child;
use crate::{Error, Verdict};

const PROGRAM: &str = "no-std-gate";

pub(crate) fn run() -> Result<Verdict, Error> {
    let target = child::target().join("no_std");
    let mut build = child::cargo(&target);
    build.args(["build", "--release", "--manifest-path", "tests/no_std/Cargo.toml"]);
    let (ended, lines) = child::lines(&mut build, None)?;
    if !ended.success() {
        println!("{}\nno-std: it does not link: FAILED", child::tail(&lines, 60));
        return Ok(Verdict::Failed);
    }
    let program = target.join("release").join(PROGRAM);
    let mut wrong = Vec::new();
    let (ended, lines) = child::lines(&mut Command::new(&program), None)?;
    if !ended.success() {
        wrong.push(format!("it ran and failed: {}", child::tail(&lines, 5)));
    }
    wrong.extend(std_symbols(&program)?);
    let image = fs::read(&program)?;
    if contains(&image, b"library/std/") {
        wrong.push("the image holds a source path of std".to_owned());
    }
    if has_interpreter(&image) {
        wrong.push("the image asks for a dynamic loader".to_owned());
    }
    for what in &wrong {
        println!("no-std: {what}");
    }
    println!(
        "no-std: {} bytes, static, {}: {}",
        image.len(),
        lines.first().map_or("silent", String::as_str),
        if wrong.is_empty() { "ok" } else { "FAILED" }
    );
    Ok(if wrong.is_empty() { Verdict::Held } else { Verdict::Failed })
}

/// Symbols of std in the program.
fn std_symbols(program: &Path) -> Result<Vec<String>, Error> {
    let (ended, lines) = child::lines(Command::new("nm").arg("--demangle").arg(program), None)?;
    if !ended.success() {
        return Err(format!("nm failed: {}", child::tail(&lines, 5)).into());
    }
    if lines.len() < 10 {
        return Err("nm lists no symbols: was the image stripped?".into());
    }
    let is_std = |line: &&String| {
        line.match_indices("std::").any(|(at, _)| {
            !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
        })
    };
    Ok(lines.iter().filter(is_std).map(|line| format!("a symbol of std: {line}")).collect())
}

fn contains(image: &[u8], pattern: &[u8]) -> bool {
    image.windows(pattern.len()).any(|window| window == pattern)
}

/// Is there a PT_INTERP program header (ELF64, little endian)?
fn has_interpreter(image: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    let field = |at: usize, size: usize| {
        let bytes = image.get(at..at + size).unwrap_or_default();
        bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let index = |value: u64| usize::try_from(value).unwrap_or(usize::MAX / 2);
    let (table, size, count) = (index(field(32, 8)), index(field(54, 2)), field(56, 2));
    (0..count).any(|n| field(table + index(n) * size, 4) == PT_INTERP)
}
