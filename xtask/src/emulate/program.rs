//! Building what runs in the emulators: the test hypervisor, its disk, and a static mini_vmm.

use std::fs;
use std::path::{Path, PathBuf};

use super::image;
use crate::Error;
use crate::busted;
use crate::child;

const MANIFEST: &str = "examples/test_hypervisor/Cargo.toml";
const PROGRAM: &str = "test-hypervisor";
/// The static link needs a target by name: else its flags reach build scripts and macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Build the test hypervisor, sound or with a known breakage; where the program is.
///
/// # Errors
/// It does not build.
pub(crate) fn hypervisor(busted: Option<&str>) -> Result<PathBuf, Error> {
    let folder = match busted {
        None => child::target().join("hypervisor"),
        Some(name) => child::target().join("hypervisor-busted").join(name),
    };
    let mut cargo = child::cargo(&folder);
    cargo.args(["build", "--release", "--manifest-path", MANIFEST]);
    if let Some(name) = busted {
        busted::built_in(&mut cargo, name)?;
    }
    let (ended, lines) = child::lines(&mut cargo, None)?;
    if !ended.success() {
        return Err(format!("{MANIFEST} does not build:\n{}", child::tail(&lines, 40)).into());
    }
    Ok(fs::canonicalize(folder)?.join("release").join(PROGRAM))
}

/// Put a disk that boots `program` into `folder`.
///
/// # Errors
/// The program is not one that boots; what the file system says.
pub(crate) fn disk(program: &Path, command_line: &str, folder: &Path) -> Result<PathBuf, Error> {
    let elf = fs::read(program)?;
    let disk = image::disk(&elf, command_line)
        .map_err(|error| format!("{}: {error}", program.display()))?;
    let path = folder.join("disk.img");
    fs::write(&path, disk)?;
    Ok(path)
}

/// Build mini_vmm so that it runs where nothing else is installed.
///
/// # Errors
/// It does not build.
pub(crate) fn mini_vmm() -> Result<PathBuf, Error> {
    let folder = child::target().join("static");
    let mut cargo = child::cargo(&folder);
    child::rustflags(&mut cargo, "-C target-feature=+crt-static");
    cargo.args(["build", "--release", "--example", "mini_vmm", "--target", TARGET]);
    // It waits for the guest all the time: building fast counts more than running fast.
    let quick = [("LTO", "off"), ("CODEGEN_UNITS", "16"), ("DEBUG", "none"), ("STRIP", "symbols")];
    cargo.envs(quick.map(|(name, value)| (format!("CARGO_PROFILE_RELEASE_{name}"), value)));
    let (ended, lines) = child::lines(&mut cargo, None)?;
    if !ended.success() {
        return Err(format!("mini_vmm does not build:\n{}", child::tail(&lines, 40)).into());
    }
    Ok(fs::canonicalize(folder)?.join(TARGET).join("release/examples/mini_vmm"))
}
