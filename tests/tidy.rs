//! The house habits that a plain scan of the sources can check. Every failure says file and line
//! and what to do about it.
//!
//! Works on text with comments and literals blanked out ([`blank`]), not on a syntax tree: simple
//! and fast, right for code that rustfmt has laid out. Needs nothing but the checkout.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const FILE_LINES: usize = 600;
const FUNCTION_LINES: usize = 70;
const COLUMNS: usize = 100;
const UNSAFE_BLOCKS: usize = 25;
/// How far above an atomic operation its ordering comment may start.
const ORDERING_REACH: usize = 6;

/// Files in which `unsafe` may do anything.
const UNSAFE_FILES: [&str; 3] = [
    "crates/mmu-core/src/frame/raw.rs",
    "crates/mmu-core/src/frame/arena.rs",
    "crates/mmu-core/src/epoch/publish.rs",
];
/// Folder in which an unsafe trait may be declared and implemented, without unsafe blocks.
const UNSAFE_TRAITS: &str = "crates/mmu-core/src/frame";
/// Where the bare-metal example may be unsafe: next to the machine. Its embedder's one unsafe trait
/// is implemented in `host.rs`.
const HYPERVISOR: &str = "examples/test_hypervisor/src/";
const HYPERVISOR_UNSAFE: [&str; 5] = ["boot/", "machine/", "svm/", "vmx/", "guest/program.rs"];
/// The one file that names the atomics of `core`.
const ATOMICS: &str = "crates/mmu-core/src/sync.rs";

/// Crate roots that must forbid `unsafe`.
const FORBIDDING: [&str; 4] = [
    "crates/tdp-mmu/src/lib.rs",
    "crates/shadow-mmu/src/lib.rs",
    "crates/lru-age/src/lib.rs",
    "src/lib.rs",
];

/// Folders that hold what tools made.
const SKIPPED: [&str; 5] = ["target", ".git", "corpus", "artifacts", "coverage"];

struct Source {
    /// Path from the root of the checkout, with `/`.
    path: String,
    text: String,
    /// `text` with comments and literals blanked: same lines, same columns.
    code: String,
    /// Lines from here on (0-based) are tests.
    tests_from: usize,
}

impl Source {
    fn new(path: String, text: String) -> Self {
        let code = blank(&text);
        let tests_from = if is_test_path(&path) { 0 } else { first_test_line(&text) };
        Self { path, text, code, tests_from }
    }

    fn in_crates(&self) -> bool {
        self.path.starts_with("crates/") && self.path.contains("/src/")
    }

    /// The lines that ship: number (from 1), text, code.
    fn shipped(&self) -> impl Iterator<Item = (usize, &str, &str)> {
        self.text
            .lines()
            .zip(self.code.lines())
            .take(self.tests_from)
            .enumerate()
            .map(|(index, (text, code))| (index + 1, text, code))
    }

    /// The lines that are tests.
    fn tests(&self) -> impl Iterator<Item = &str> {
        self.text.lines().skip(self.tests_from)
    }
}

fn is_test_path(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.starts_with("tests/") || path.contains("/tests/")
}

/// Index of the `#[cfg(test)]`, or `all(test, ...)`, that opens a module of tests; the number of
/// lines when there is none.
fn first_test_line(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let opens = |index: usize| {
        let after = lines.iter().skip(index + 1).find(|line| !line.starts_with("#["));
        lines[index].starts_with("#[cfg(")
            && !words(lines[index], "test").is_empty()
            && after.is_some_and(|line| line.starts_with("mod ") && line.ends_with('{'))
    };
    (0..lines.len()).find(|index| opens(*index)).unwrap_or(lines.len())
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every text file of the checkout: path from the root, content.
fn files() -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<(String, String)>) {
        let mut entries: Vec<PathBuf> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            // `.git` is a file in a linked work tree.
            if SKIPPED.contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                walk(&path, found);
            } else if let Ok(text) = fs::read_to_string(&path) {
                let relative = path.strip_prefix(root()).unwrap();
                found.push((relative.to_string_lossy().replace('\\', "/"), text));
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), &mut found);
    found
}

fn sources() -> Vec<Source> {
    let rust = files().into_iter().filter(|(path, _)| path.ends_with(".rs"));
    rust.map(|(path, text)| Source::new(path, text)).collect()
}

fn crate_sources() -> Vec<Source> {
    sources().into_iter().filter(Source::in_crates).collect()
}

/// `text` with comments, string literals and character literals replaced by spaces.
fn blank(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = literal_end(&bytes, at);
        if end == at {
            out.push(bytes[at]);
            at += 1;
        } else {
            out.extend(bytes[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

/// One past the comment or literal that starts at `at`; `at` itself when none does.
fn literal_end(text: &[char], at: usize) -> usize {
    let next = |offset: usize| text.get(at + offset).copied().unwrap_or('\0');
    let word_before = at > 0 && text.get(at - 1).is_some_and(|c| c.is_alphanumeric() || *c == '_');
    match (text[at], next(1)) {
        ('/', '/') => find(text, at, &['\n']),
        ('/', '*') => (find(text, at + 2, &['*', '/']) + 2).min(text.len()),
        ('"', _) => quoted_end(text, at + 1),
        ('r', '"' | '#') if !word_before => raw_end(text, at),
        // A lifetime has no closing quote two or more characters on.
        ('\'', '\\') => (find(text, at + 3, &['\'']) + 1).min(text.len()),
        ('\'', _) if next(2) == '\'' => at + 3,
        _ => at,
    }
}

fn find(text: &[char], from: usize, pattern: &[char]) -> usize {
    (from..text.len()).find(|at| text[*at..].starts_with(pattern)).unwrap_or(text.len())
}

fn quoted_end(text: &[char], mut at: usize) -> usize {
    while at < text.len() {
        match text[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

fn raw_end(text: &[char], at: usize) -> usize {
    let hashes = text[at + 1..].iter().take_while(|c| **c == '#').count();
    if text.get(at + 1 + hashes) != Some(&'"') {
        return at;
    }
    let mut close = vec!['"'];
    close.extend(std::iter::repeat_n('#', hashes));
    (find(text, at + 2 + hashes, &close) + close.len()).min(text.len())
}

/// Byte offsets at which `word` stands with no identifier character on either side.
fn words(text: &str, word: &str) -> Vec<usize> {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let whole = |at: &usize| {
        !part(text[..*at].chars().next_back()) && !part(text[at + word.len()..].chars().next())
    };
    text.match_indices(word).map(|(at, _)| at).filter(whole).collect()
}

/// What stands between `open` and `]`, at every place in `text`.
fn tags<'a>(text: &'a str, open: &str) -> Vec<&'a str> {
    let after = |(at, _): (usize, &str)| text[at + open.len()..].split(']').next();
    text.match_indices(open).filter_map(after).filter(|tag| !tag.is_empty()).collect()
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

#[track_caller]
fn none(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}\n{} to mend", wrong.join("\n"), wrong.len());
}

#[test]
fn files_are_short() {
    let mut wrong = Vec::new();
    for source in crate_sources() {
        let lines = source.shipped().count();
        if lines > FILE_LINES {
            wrong.push(format!(
                "{}:{FILE_LINES}: {lines} lines without tests, at most {FILE_LINES}: split it by \
                 noun",
                source.path
            ));
        }
    }
    none(&wrong);
}

#[test]
fn functions_are_short() {
    let mut wrong = Vec::new();
    for source in crate_sources() {
        for offset in words(&source.code, "fn") {
            let (Some((start, end)), line) =
                (body(&source.code, offset), line_of(&source.code, offset))
            else {
                continue;
            };
            let lines = source.code[start..end].matches('\n').count() + 1;
            if line <= source.tests_from && lines > FUNCTION_LINES {
                wrong.push(format!(
                    "{}:{line}: a function of {lines} lines, at most {FUNCTION_LINES}: give its \
                     parts names",
                    source.path
                ));
            }
        }
    }
    none(&wrong);
}

/// From `fn` to the closing brace of its body; `None` for a declaration or a pointer type.
fn body(code: &str, offset: usize) -> Option<(usize, usize)> {
    let mut nesting = 0_usize;
    let mut depth = 0_usize;
    for (at, c) in code[offset..].char_indices() {
        match c {
            '(' | '[' => nesting += 1,
            ')' | ']' if nesting == 0 => return None,
            ')' | ']' => nesting -= 1,
            ';' if nesting == 0 && depth == 0 => return None,
            '{' => depth += 1,
            '}' if depth == 0 => return None,
            '}' if depth == 1 => return Some((offset, offset + at)),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

#[test]
fn lines_are_narrow() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (index, line) in source.text.lines().enumerate() {
            let columns = line.chars().count();
            if columns > COLUMNS {
                wrong.push(format!(
                    "{}:{}: {columns} columns, at most {COLUMNS}: wrap it",
                    source.path,
                    index + 1
                ));
            }
        }
    }
    none(&wrong);
}

#[test]
fn files_say_what_they_are() {
    let bare = |source: &Source| !source.text.starts_with("//!") && !source.text.starts_with("#!");
    let wrong: Vec<String> = sources()
        .iter()
        .filter(|source| bare(source))
        .map(|source| {
            format!("{}:1: start with `//!`: what it owns, its neighbours, its locks", source.path)
        })
        .collect();
    none(&wrong);
}

#[test]
fn nothing_is_left_for_later() {
    let marks = [concat!("TO", "DO"), concat!("X", "XX"), concat!("HA", "CK")];
    let macros = [concat!("to", "do!"), concat!("unimple", "mented!")];
    let mut wrong = Vec::new();
    for (path, text) in files() {
        let checked = [".rs", ".toml", ".sh", "/run"].iter().any(|end| path.ends_with(end));
        for (index, line) in text.lines().enumerate().filter(|_| checked) {
            let mark = marks.iter().find(|mark| !words(line, mark).is_empty());
            let left = macros.iter().find(|name| line.contains(*name));
            if let Some(found) = mark.or(left) {
                wrong.push(format!("{path}:{}: {found}: do it now or open an issue", index + 1));
            }
        }
    }
    none(&wrong);
}

#[test]
fn atomics_come_through_one_door() {
    let doors = [concat!("core::sync::", "atomic"), concat!("std::sync::", "atomic")];
    let mut wrong = Vec::new();
    for source in crate_sources().iter().filter(|source| source.path != ATOMICS) {
        for (line, _, code) in source.shipped() {
            if doors.iter().any(|door| code.contains(door)) {
                wrong.push(format!("{}:{line}: use `mmu_core::sync` ({ATOMICS})", source.path));
            }
        }
    }
    none(&wrong);
}

#[test]
fn unsafe_stays_in_its_files() {
    let mut wrong = Vec::new();
    for source in crate_sources().iter().filter(|s| !UNSAFE_FILES.contains(&s.path.as_str())) {
        for (line, _, code) in source.shipped() {
            for at in words(code, "unsafe") {
                let what = code[at + "unsafe".len()..].trim_start();
                let declares = ["trait", "impl", "fn"].iter().any(|word| what.starts_with(word));
                if !(source.path.starts_with(UNSAFE_TRAITS) && declares) {
                    wrong.push(format!(
                        "{}:{line}: `unsafe` belongs in {}",
                        source.path,
                        UNSAFE_FILES.join(" or ")
                    ));
                }
            }
        }
    }
    none(&wrong);
}

#[test]
fn the_hypervisor_is_safe_above_the_machine() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.path.starts_with(HYPERVISOR)) {
        let file = &source.path[HYPERVISOR.len()..];
        if HYPERVISOR_UNSAFE.iter().any(|place| file.starts_with(place)) {
            continue;
        }
        for (line, _, code) in source.shipped() {
            for at in words(code, "unsafe") {
                let what = code[at + "unsafe".len()..].trim_start();
                if file != "host.rs" || !what.starts_with("impl PhysMap for ") {
                    let places = HYPERVISOR_UNSAFE.join(" or ");
                    wrong.push(format!("{}:{line}: `unsafe` belongs in {places}", source.path));
                }
            }
        }
    }
    none(&wrong);
}

#[test]
fn unsafe_blocks_are_few() {
    let mut places = Vec::new();
    for source in crate_sources() {
        for (line, _, code) in source.shipped() {
            let blocks = words(code, "unsafe").into_iter();
            let opens = |at: &usize| code[at + "unsafe".len()..].trim_start().starts_with('{');
            places.extend(blocks.filter(opens).map(|_| format!("{}:{line}", source.path)));
        }
    }
    assert!(
        places.len() <= UNSAFE_BLOCKS,
        "{} unsafe blocks, at most {UNSAFE_BLOCKS}: find a safe way for one of\n{}",
        places.len(),
        places.join("\n")
    );
}

#[test]
fn other_crates_forbid_unsafe() {
    let all = sources();
    let forbids = |path: &str| {
        all.iter().any(|s| s.path == path && s.code.contains("#![forbid(unsafe_code)]"))
    };
    let wrong: Vec<String> = FORBIDDING
        .iter()
        .filter(|path| !forbids(path))
        .map(|path| format!("{path}:1: add `#![forbid(unsafe_code)]`"))
        .collect();
    none(&wrong);
}

#[test]
fn atomic_operations_say_their_ordering() {
    let orders = ["Relaxed", "Acquire", "Release", "AcqRel", "SeqCst"];
    let mut wrong = Vec::new();
    // The door itself, and what stands behind it in models only.
    let door = |path: &str| path == ATOMICS || path.starts_with("crates/mmu-core/src/sync/");
    for source in crate_sources().iter().filter(|source| !door(&source.path)) {
        let lines: Vec<(usize, &str, &str)> = source.shipped().collect();
        for (index, (line, _, code)) in lines.iter().enumerate() {
            let named = |order: &str| !words(code, &format!("Ordering::{order}")).is_empty();
            if !orders.iter().any(|order| named(order)) || code.trim().starts_with("use ") {
                continue;
            }
            let from = statement_start(&lines, index).saturating_sub(ORDERING_REACH);
            let near = &lines[from..=index];
            if !near.iter().any(|(_, text, _)| text.contains("ORDERING[")) {
                wrong.push(format!(
                    "{}:{line}: say `ORDERING[tag]` with the partner, at most {ORDERING_REACH} \
                     lines above",
                    source.path
                ));
            }
        }
    }
    none(&wrong);
}

/// Index of the line on which the statement of line `index` starts.
fn statement_start(lines: &[(usize, &str, &str)], index: usize) -> usize {
    let ends = |code: &str| code.trim().is_empty() || code.trim_end().ends_with([';', '{', '}']);
    let mut start = index;
    while start > 0 && !ends(lines[start - 1].2) {
        start -= 1;
    }
    start
}

#[test]
fn ordering_tags_have_both_ends_and_an_entry() {
    let list = fs::read_to_string(root().join("docs/ORDERING.md")).unwrap_or_default();
    let mut sites: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in crate_sources() {
        for (line, text, _) in source.shipped() {
            for tag in tags(text, "ORDERING[") {
                let place = format!("{}:{line}", source.path);
                sites.entry(tag.to_owned()).or_default().push(place);
            }
        }
    }
    let mut wrong = Vec::new();
    for (tag, places) in &sites {
        if places.len() < 2 {
            wrong.push(format!("{}: ORDERING[{tag}] has no partner: tag it too", places[0]));
        }
        if !list.contains(&format!("`{tag}`")) {
            wrong.push(format!("{}: add `{tag}` to docs/ORDERING.md", places[0]));
        }
    }
    none(&wrong);
}

/// Rows of docs/INVARIANTS.md: id, whether it is asserted, tests named.
fn invariants() -> Vec<(String, bool, Vec<String>)> {
    let text = fs::read_to_string(root().join("docs/INVARIANTS.md")).unwrap();
    let mut rows = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("| I")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [id, _, asserted, tested] = cells[..] else {
            panic!("docs/INVARIANTS.md: `{line}` has {} columns, expected 4", cells.len());
        };
        if id == "ID" {
            continue;
        }
        let tests = tested.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        rows.push((id.to_owned(), asserted != "not yet", tests));
    }
    rows
}

#[test]
fn invariants_are_asserted_and_tested() {
    let all = sources();
    let mut shipped = BTreeSet::new();
    let mut tested = BTreeSet::new();
    for source in &all {
        let lines = source.shipped().filter(|_| source.path.starts_with("crates/"));
        shipped.extend(lines.flat_map(|(_, text, _)| tags(text, "INVARIANT[")));
        tested.extend(source.tests().flat_map(|text| tags(text, "INVARIANT[")));
    }
    let rows = invariants();
    let mut wrong = Vec::new();
    for (id, asserted, tests) in &rows {
        if *asserted && !shipped.contains(id.as_str()) {
            wrong.push(format!("docs/INVARIANTS.md: {id}: no INVARIANT[{id}] in crates/"));
        }
        if *asserted && !tested.contains(id.as_str()) {
            wrong.push(format!("docs/INVARIANTS.md: {id}: no test says INVARIANT[{id}]"));
        }
        for test in tests {
            let name = test.rsplit("::").next().unwrap_or(test);
            if !all.iter().any(|source| !words(&source.code, &format!("fn {name}")).is_empty()) {
                wrong.push(format!("docs/INVARIANTS.md: {id}: there is no `fn {name}`"));
            }
        }
    }
    for id in shipped.iter().filter(|id| !rows.iter().any(|(row, _, _)| row == *id)) {
        wrong.push(format!("docs/INVARIANTS.md: INVARIANT[{id}] is used but has no row"));
    }
    none(&wrong);
}

#[test]
fn no_file_names_a_machine() {
    let paths = [concat!("/wo", "rk"), concat!("/tmp/", "target"), concat!(".lib", "rary")];
    let mut wrong = Vec::new();
    for (path, text) in files() {
        for (index, line) in text.lines().enumerate() {
            let found = paths.iter().find(|place| {
                words(line, place).iter().any(|at| {
                    // `a/b/c` names a folder of the project, not one of the machine.
                    let before = line[..*at].chars().next_back();
                    !before.is_some_and(|c| c.is_alphanumeric() || "._-*".contains(c))
                })
            });
            if let Some(place) = found {
                wrong.push(format!("{path}:{}: `{place}` exists on one machine only", index + 1));
            }
        }
    }
    none(&wrong);
}

#[test]
fn links_between_documents_resolve() {
    let mut wrong = Vec::new();
    for (path, text) in files().iter().filter(|(path, _)| path.ends_with(".md")) {
        let folder = root().join(path).parent().unwrap().to_owned();
        let mut fenced = false;
        for (index, line) in text.lines().enumerate() {
            fenced ^= line.trim_start().starts_with("```");
            for (at, _) in line.match_indices("](").filter(|_| !fenced) {
                let target = line[at + 2..].split([')', '#', ' ']).next().unwrap_or_default();
                let outside = target.contains("://") || target.starts_with("mailto:");
                if !target.is_empty() && !outside && !folder.join(target).exists() {
                    wrong.push(format!("{path}:{}: {target} does not exist", index + 1));
                }
            }
        }
    }
    none(&wrong);
}

/// The files and folders that the table of docs/ARCHITECTURE.md names, by crate.
fn architecture() -> BTreeMap<String, BTreeSet<String>> {
    let text = fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    let mut named: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut of = String::new();
    for line in text.lines().skip_while(|line| *line != "| crate | file | owns |").skip(2) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, files, _] = cells[..] else { break };
        if !name.is_empty() {
            of = name.trim_matches('`').to_owned();
        }
        let files = files.split('`').skip(1).step_by(2).map(|file| file.trim_end_matches('/'));
        named.entry(of.clone()).or_default().extend(files.map(str::to_owned));
    }
    named
}

/// Each file of a crate, and each folder of modules, has a place in the table of the architecture,
/// and nothing else has.
#[test]
fn the_architecture_names_every_file_of_the_crates() {
    let mut held: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources() {
        let parts: Vec<&str> = source.path.split('/').collect();
        let (of, first) = match parts[..] {
            ["src", first, ..] => ("secondary-mmu", first),
            ["crates", of, "src", first, ..] => (of, first),
            _ => continue,
        };
        let stem = first.trim_end_matches(".rs");
        if stem != "lib" {
            held.entry(of.to_owned()).or_default().insert(stem.to_owned());
        }
    }
    let (named, none_of) = (architecture(), BTreeSet::new());
    let mut wrong = Vec::new();
    for of in held.keys().chain(named.keys()).collect::<BTreeSet<_>>() {
        let (held, named) = (held.get(of).unwrap_or(&none_of), named.get(of).unwrap_or(&none_of));
        for stem in held.difference(named) {
            wrong.push(format!("docs/ARCHITECTURE.md: crates/{of}/src: add `{stem}` to the table"));
        }
        for stem in named.difference(held) {
            wrong.push(format!("docs/ARCHITECTURE.md: crates/{of}/src has no `{stem}`"));
        }
    }
    none(&wrong);
}

#[test]
fn ignored_tests_are_explained_and_listed() {
    let list = fs::read_to_string(root().join("docs/TESTING.md")).unwrap();
    let bare = concat!("#[ign", "ore]");
    let reasoned = concat!("#[ign", "ore =");
    let mut wrong = Vec::new();
    for source in sources() {
        let lines: Vec<&str> = source.text.lines().map(str::trim).collect();
        for (index, line) in lines.iter().enumerate() {
            if line.starts_with(bare) {
                wrong.push(format!("{}:{}: give the reason", source.path, index + 1));
            }
            if !line.starts_with(bare) && !line.starts_with(reasoned) {
                continue;
            }
            let name =
                lines[index..].iter().find_map(|line| line.strip_prefix("fn ")?.split('(').next());
            if !name.is_some_and(|name| list.contains(&format!("`{name}`"))) {
                wrong.push(format!(
                    "{}:{}: list `{}` in docs/TESTING.md",
                    source.path,
                    index + 1,
                    name.unwrap_or("?")
                ));
            }
        }
    }
    none(&wrong);
}

/// Each breakage in the code is in the list, with a test that exists, and in the table that says
/// what it breaks.
#[test]
fn breakages_are_listed_explained_and_noticed_by_a_test() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    let (list, table) = (read("docs/mutants.txt"), read("docs/FLUSHES.md"));
    let all = sources();
    let ours = |path: &str| path.starts_with("crates/") || path.starts_with("src/");
    let crates = all.iter().filter(|source| ours(&source.path));
    let held: BTreeSet<&str> =
        crates.flat_map(|source| source.text.lines()).flat_map(breakages).collect();
    let mut wrong = Vec::new();
    let mut listed = BTreeSet::new();
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let (Some(name), Some(test)) = (line.split(' ').next(), line.rsplit(' ').next()) else {
            continue;
        };
        listed.insert(name);
        // Models are made by macros, so their names stand without a `fn`.
        if !all.iter().any(|source| !words(&source.code, test).is_empty()) {
            wrong.push(format!("docs/mutants.txt: {name}: there is no test `{test}`"));
        }
        for word in [name, test] {
            if !table.contains(&format!("`{word}`")) {
                wrong.push(format!("docs/FLUSHES.md: `{word}` of docs/mutants.txt is missing"));
            }
        }
    }
    wrong.extend(held.difference(&listed).map(|name| format!("{name}: not in docs/mutants.txt")));
    wrong.extend(listed.difference(&held).map(|name| format!("{name}: no code holds it")));
    none(&wrong);
}

/// The breakages that a line of code names.
fn breakages(line: &str) -> impl Iterator<Item = &str> {
    line.split(concat!("busted", "!(\"")).skip(1).filter_map(|rest| rest.split('"').next())
}

#[test]
fn the_scanner_blanks_comments_and_literals_only() {
    let text = "let a = \"x // y\"; // z\nlet b = 'c'; fn f<'a>() { r#\"{\"# }\n/* { */ '\\n'";
    let code = blank(text);
    assert_eq!(code.lines().count(), 3);
    assert!(!code.contains(['x', 'z', '"', '\\']), "{code}");
    assert!(code.contains("fn f<'a>() {"), "{code}");
    assert_eq!(code.matches('{').count(), 1, "{code}");
    assert_eq!(tags("ORDERING[a] and ORDERING[b]: x", "ORDERING["), ["a", "b"]);
}
