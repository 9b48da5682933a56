//! Checks docs/KVM_PARITY.md: a row for every ID of docs/kvm_ids.txt, legal statuses, and a place
//! and a proof that exist behind every row that claims to be done.
//!
//! Reads the source tree only; needs nothing installed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const TABLE: &str = "docs/KVM_PARITY.md";
const IDS: &str = "docs/kvm_ids.txt";
const HEADER: &str = "| ID | status | where | test or reason |";
const BUILT: &str = "built";
const NOT_YET: &str = "not yet";
const NON_GOAL: &str = "non-goal";

struct Row {
    line: usize,
    id: String,
    status: String,
    place: String,
    proof: String,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(relative: &str) -> String {
    let path = root().join(relative);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (index, line) in read(TABLE).lines().enumerate() {
        if !line.starts_with('|') || line == HEADER || line.starts_with("|---") {
            continue;
        }
        let line_number = index + 1;
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [id, status, place, proof] = cells[..] else {
            panic!("{TABLE}:{line_number}: {} columns, expected 4 ({HEADER})", cells.len());
        };
        rows.push(Row {
            line: line_number,
            id: id.to_owned(),
            status: status.to_owned(),
            place: place.to_owned(),
            proof: proof.to_owned(),
        });
    }
    rows
}

/// ID to priority letter.
fn ids() -> BTreeMap<String, char> {
    let mut ids = BTreeMap::new();
    for (index, line) in read(IDS).lines().enumerate() {
        let (id, letter) = line.split_once(' ').unwrap_or_else(|| {
            panic!("{IDS}:{}: expected `ID letter`, found `{line}`", index + 1);
        });
        let letter = match letter {
            "A" => 'A',
            "B" => 'B',
            "C" => 'C',
            "-" => '-',
            other => panic!("{IDS}:{}: priority `{other}` is not A, B, C or -", index + 1),
        };
        let before = ids.insert(id.to_owned(), letter);
        assert!(before.is_none(), "{IDS}:{}: {id} is listed twice", index + 1);
    }
    ids
}

/// The text between each pair of backticks.
fn backticked(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// The targets of the markdown links.
fn links(cell: &str) -> Vec<&str> {
    cell.match_indices("](")
        .filter_map(|(at, _)| cell[at + 2..].split(')').next())
        .map(|target| target.split('#').next().unwrap_or(target))
        .collect()
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                rust_files(&path, found);
            }
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// Names of the tree's test functions: those with `#[test]` among the lines just above.
fn test_functions() -> BTreeSet<String> {
    let mut files = Vec::new();
    rust_files(&root(), &mut files);
    let mut names = BTreeSet::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if line.starts_with("#[test]") {
                is_test = true;
            } else if let Some(rest) = line.strip_prefix("fn ") {
                if is_test {
                    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
                    names.insert(rest[..end.unwrap_or(rest.len())].to_owned());
                }
                is_test = false;
            } else if !line.starts_with("#[") && !line.starts_with("//") {
                is_test = false;
            }
        }
    }
    names
}

/// `text` contains `word` with no letter, digit or dash on either side.
fn has_word(text: &str, word: &str) -> bool {
    let boundary = |c: Option<char>| !c.is_some_and(|c| c.is_alphanumeric() || c == '-');
    text.match_indices(word).any(|(at, _)| {
        boundary(text[..at].chars().next_back()) && boundary(text[at + word.len()..].chars().next())
    })
}

#[test]
fn every_id_has_exactly_one_row() {
    let ids = ids();
    assert!(ids.len() > 300, "{IDS} holds only {} IDs: was it cut?", ids.len());
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for row in rows() {
        if !ids.contains_key(&row.id) {
            wrong.push(format!("{TABLE}:{}: `{}` is not in {IDS}", row.line, row.id));
        }
        if !seen.insert(row.id.clone()) {
            wrong.push(format!("{TABLE}:{}: second row of {}", row.line, row.id));
        }
    }
    for id in ids.keys().filter(|id| !seen.contains(*id)) {
        wrong.push(format!("{TABLE}: no row for {id}: add one"));
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn statuses_are_legal_and_stand_in_their_column_only() {
    let ids = ids();
    let mut wrong = Vec::new();
    for row in rows() {
        if ![BUILT, NOT_YET, NON_GOAL].contains(&row.status.as_str()) {
            wrong.push(format!("{TABLE}:{}: status `{}`", row.line, row.status));
        }
        if row.status == NON_GOAL && ids.get(&row.id) == Some(&'A') {
            wrong.push(format!(
                "{TABLE}:{}: {} is priority A: it cannot be a non-goal",
                row.line, row.id
            ));
        }
        if row.place.is_empty() || row.proof.is_empty() {
            wrong.push(format!("{TABLE}:{}: an empty column", row.line));
        }
        for word in [BUILT, NOT_YET, NON_GOAL] {
            if [&row.id, &row.place, &row.proof].iter().any(|cell| has_word(cell, word)) {
                wrong.push(format!(
                    "{TABLE}:{}: `{word}` outside the status column: use another word",
                    row.line
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn built_rows_name_a_place_that_exists() {
    let mut wrong = Vec::new();
    for row in rows().iter().filter(|row| row.status == BUILT) {
        let paths = backticked(&row.place);
        let links = links(&row.place);
        if paths.is_empty() && links.is_empty() {
            wrong.push(format!("{TABLE}:{}: {} names no `path`", row.line, row.id));
        }
        for path in paths.iter().filter(|path| !root().join(path).exists()) {
            wrong.push(format!("{TABLE}:{}: `{path}` does not exist", row.line));
        }
        for link in links.iter().filter(|link| !root().join("docs").join(link).exists()) {
            wrong.push(format!("{TABLE}:{}: link {link} leads nowhere", row.line));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn built_rows_name_a_proof_that_exists() {
    let functions = test_functions();
    let mut wrong = Vec::new();
    for row in rows().iter().filter(|row| row.status == BUILT) {
        let tests = backticked(&row.proof);
        let links = links(&row.proof);
        if tests.is_empty() && links.is_empty() {
            wrong.push(format!(
                "{TABLE}:{}: {} names no `path::test` and no document",
                row.line, row.id
            ));
        }
        for test in tests {
            let name = test.rsplit("::").next().unwrap_or(test);
            if !functions.contains(name) {
                wrong.push(format!("{TABLE}:{}: there is no test `{name}`", row.line));
            }
        }
        for link in links.iter().filter(|link| !root().join("docs").join(link).exists()) {
            wrong.push(format!("{TABLE}:{}: link {link} leads nowhere", row.line));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
