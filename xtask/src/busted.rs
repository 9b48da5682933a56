//! Known breakages in a build: `cfg(busted)` for the crates of the project and for nobody else.
//!
//! A build for tests holds all of them, and the environment variable [`VARIABLE`] picks one when a
//! test runs. An image of a bare machine has no environment: one is built in.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use crate::Error;
use crate::child;

/// Names the breakage: to a test when it runs, to the compiler where one is built in.
pub(crate) const VARIABLE: &str = "BUSTED";

/// A compiler wrapper that lets the crates of this workspace be broken when they run. Cargo keys
/// what it builds by the wrapper's path, so dependencies are not built again and sound artifacts
/// stay apart.
///
/// # Errors
/// What the file system says.
pub(crate) fn wrapper() -> Result<PathBuf, Error> {
    script("busted", "--cfg busted")
}

/// Break all that `cargo` builds by `name`, for good: to cargo the crates of this project are
/// strangers in a workspace that only uses them. The caller chooses a target directory for this
/// breakage alone.
///
/// # Errors
/// A name that is none; what the file system says.
pub(crate) fn built_in(cargo: &mut Command, name: &str) -> Result<(), Error> {
    if name.contains(|c: char| !c.is_alphanumeric() && c != '-' && c != '_') {
        return Err(format!("`{name}` holds more than letters, digits, - and _").into());
    }
    let wrapper = script("busted-built-in", "--cfg busted --cfg 'busted=\"built_in\"'")?;
    cargo.env("RUSTC_WRAPPER", wrapper).env(VARIABLE, name);
    Ok(())
}

/// A wrapper that adds `flags` to every call of the compiler.
fn script(name: &str, flags: &str) -> Result<PathBuf, Error> {
    let folder = child::target().join("mutants-rustc");
    fs::create_dir_all(&folder)?;
    let path = fs::canonicalize(folder)?.join(name);
    let script = format!("#!/bin/sh\nexec \"$@\" {flags}\n");
    // Written only when it differs: its age must not make cargo build again.
    if fs::read_to_string(&path).ok().as_deref() != Some(script.as_str()) {
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(path)
}
