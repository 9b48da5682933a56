//! A test that cannot do its work here passes, and says so on the terminal itself: what a test that
//! passes prints nobody sees.

use std::fmt::Display;
use std::io::{self, Write};

/// Say that `test` is skipped for want of `lacking`, and `why`.
pub(crate) fn aloud(lacking: &str, test: &str, why: impl Display) {
    let line = format!("SKIPPED ({lacking}): {test}: {why}\n");
    io::stderr().write_all(line.as_bytes()).expect("stderr takes a line");
}
