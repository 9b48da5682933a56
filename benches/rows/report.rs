//! Figures as a table for people and as JSON for programs.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::catalogue::{Row, row};
use crate::harness::{Bench, Figure};

/// The table.
pub fn print(bench: &Bench) {
    if !bench.figures.is_empty() {
        println!(
            "{:<22} {:>10} {:>10} {:>10} {:<9} {:>8} {:>9}  {:>6}  note",
            "row", "median", "min", "max", "unit", "target", "KVM", "KVM/us"
        );
    }
    for figure in &bench.figures {
        let Row { unit, target, kvm, .. } = *row(figure.row);
        let number = |value: Option<f64>| value.map_or("-".into(), short);
        let ratio = kvm.map_or("-".into(), |kvm| format!("{:.1}x", kvm / figure.median()));
        let met = match target {
            Some(target) if figure.median() <= target => "",
            Some(_) => "above target; ",
            None => "",
        };
        println!(
            "{:<22} {:>10} {:>10} {:>10} {:<9} {:>8} {:>9}  {:>6}  {met}{}",
            figure.row,
            short(figure.median()),
            short(figure.min()),
            short(figure.max()),
            unit,
            number(target),
            number(kvm),
            ratio,
            figure.note
        );
    }
    for (row, why) in &bench.skipped {
        println!("{row:<22} SKIPPED: {why}");
    }
    println!(
        "\n{} measured, {} skipped{}; EPT, {} pages, medians of up to {} repetitions",
        bench.figures.len(),
        bench.skipped.len(),
        if bench.quick { " (--quick: not for comparison)" } else { "" },
        bench.pages(),
        bench.reps()
    );
}

fn short(value: f64) -> String {
    if value >= 1000.0 {
        format!("{value:.0}")
    } else if value >= 100.0 {
        format!("{value:.1}")
    } else if value >= 10.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.3}")
    }
}

/// The array that programs read.
pub fn write_json(bench: &Bench, path: &Path) -> std::io::Result<()> {
    let object = |figure: &Figure| {
        json!({
            "row": figure.row,
            "unit": row(figure.row).unit,
            "median": figure.median(),
            "min": figure.min(),
            "max": figure.max(),
            "n": figure.n,
            "reps": figure.values.len(),
        })
    };
    let rows: Vec<_> = bench.figures.iter().map(object).collect();
    fs::write(path, format!("{:#}\n", serde_json::Value::from(rows)))
}
