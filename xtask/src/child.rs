//! Child processes: where they run, and their output line by line.

use std::env;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, IsTerminal};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The root of the checkout.
pub(crate) fn root() -> PathBuf {
    let here = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.parent().map_or(here.clone(), Path::to_path_buf)
}

/// Where cargo puts what it makes.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// `cargo`, as it was called, started in the root of the checkout with a target directory of its
/// own so that its flags do not throw away the everyday build.
pub(crate) fn cargo(target: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).env("CARGO_TARGET_DIR", target);
    command
}

/// Add to `RUSTFLAGS`, keeping what the caller has set.
pub(crate) fn rustflags(command: &mut Command, flags: &str) {
    let before = env::var("RUSTFLAGS").unwrap_or_default();
    command.env("RUSTFLAGS", format!("{before} {flags}").trim());
}

/// How a child ended.
pub(crate) enum Ended {
    /// By itself.
    Exit(ExitStatus),
    /// Killed for running longer than allowed.
    TimedOut,
}

impl Ended {
    /// Did it end by itself and report success?
    pub(crate) fn success(&self) -> bool {
        matches!(self, Self::Exit(status) if status.success())
    }
}

/// Run to the end and collect stdout and stderr, lines in order of arrival. A terminal sees the
/// lines as they come.
pub(crate) fn lines(
    command: &mut Command,
    limit: Option<Duration>,
) -> io::Result<(Ended, Vec<String>)> {
    let start = Instant::now();
    if limit.is_some() {
        command.process_group(0);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| named(command.get_program(), &error))?;
    let (sender, receiver) = std::sync::mpsc::channel();
    let mut readers = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let sender = sender.clone();
        readers.push(thread::spawn(move || forward(stdout, &sender)));
    }
    if let Some(stderr) = child.stderr.take() {
        readers.push(thread::spawn(move || forward(stderr, &sender)));
    }
    let watched = io::stderr().is_terminal();
    let mut seen = Vec::new();
    let mut ended = None;
    let mut open = true;
    while open || ended.is_none() {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => {
                if watched {
                    eprintln!("{line}");
                }
                seen.push(line);
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                open = false;
                thread::sleep(Duration::from_millis(5));
            }
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
        }
        if ended.is_none() {
            ended = child.try_wait()?.map(Ended::Exit);
        }
        if ended.is_none() && limit.is_some_and(|limit| start.elapsed() > limit) {
            kill(&mut child)?;
            return Ok((Ended::TimedOut, seen));
        }
    }
    for reader in readers {
        let _ = reader.join();
    }
    Ok((ended.unwrap_or(Ended::TimedOut), seen))
}

/// End a child that leads a process group, and what it started: that must not go on running.
pub(crate) fn kill(child: &mut Child) -> io::Result<()> {
    Command::new("kill").args(["-9", "--", &format!("-{}", child.id())]).status()?;
    child.wait().map(drop)
}

/// The same, but first asked: what the child has still to write it writes.
pub(crate) fn end(child: &mut Child, patience: Duration) -> io::Result<()> {
    let group = format!("-{}", child.id());
    Command::new("kill").args(["-INT", "--", &group]).status()?;
    let start = Instant::now();
    while start.elapsed() < patience {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    kill(child)
}

/// Where a program is, if it is installed.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

fn forward(stream: impl io::Read, sender: &std::sync::mpsc::Sender<String>) {
    for line in BufReader::new(stream).split(b'\n') {
        let Ok(line) = line else { return };
        if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
            return;
        }
    }
}

pub(crate) fn named(program: &OsStr, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", program.to_string_lossy()))
}

/// The lines that explain a failure: the last `count`.
pub(crate) fn tail(lines: &[String], count: usize) -> String {
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Lines of a committed list, without comments and blank lines.
pub(crate) fn list(relative: &str) -> Result<Vec<String>, crate::Error> {
    let path = root().join(relative);
    let text = std::fs::read_to_string(&path).map_err(|error| named(path.as_os_str(), &error))?;
    let lines = text.lines().map(str::trim);
    Ok(lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect())
}
