//! A known breakage in a build: `cfg(busted = "NAME")` for the crates of the project and for
//! nobody else.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use crate::Error;
use crate::child;

/// Break what `cargo` builds. A member of the workspace gets it by the workspace's wrapper: cargo
/// keys what it makes by the wrapper's path, so sound artifacts stay apart and dependencies are not
/// built again.
///
/// # Errors
/// A name that is none; what the file system says.
pub(crate) fn members(cargo: &mut Command, name: &str) -> Result<(), Error> {
    cargo.env("RUSTC_WORKSPACE_WRAPPER", wrapper(name)?);
    Ok(())
}

/// The same for all crates: to cargo, those of this project are strangers in a workspace that only
/// uses them. The caller chooses a target directory for this breakage alone.
///
/// # Errors
/// A name that is none; what the file system says.
pub(crate) fn everything(cargo: &mut Command, name: &str) -> Result<(), Error> {
    cargo.env("RUSTC_WRAPPER", wrapper(name)?);
    Ok(())
}

/// A compiler wrapper that says `cfg(busted = "name")`.
fn wrapper(name: &str) -> Result<PathBuf, Error> {
    if name.contains(|c: char| !c.is_alphanumeric() && c != '-' && c != '_') {
        return Err(format!("`{name}` holds more than letters, digits, - and _").into());
    }
    let folder = child::target().join("mutants-rustc");
    fs::create_dir_all(&folder)?;
    let path = fs::canonicalize(folder)?.join(name);
    fs::write(&path, format!("#!/bin/sh\nexec \"$@\" --cfg 'busted=\"{name}\"'\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}
