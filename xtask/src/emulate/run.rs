//! One run of an emulator: its serial port is read while it runs, and it is ended when it takes
//! too long.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::machine::SERIAL;
use super::protocol::Reading;
use crate::child;

/// What the emulator itself says, in the folder of the run.
const OUTPUT: &str = "output.txt";
/// Between two looks at the serial port.
const PAUSE: Duration = Duration::from_millis(30);
/// So long may an emulator that is told to end take: Bochs writes in large pieces.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// What the script that runs in Linux says at its start and at its end.
const LINUX_UP: &str = "chain: up";
const LINUX_STATUS: &str = "chain: status ";
/// And behind each of several commands: its status, and itself.
pub(crate) const LINUX_RAN: &str = "chain: ran ";

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself.
    Exit(ExitStatus),
    /// Killed after so many seconds.
    TimedOut(u64),
}

/// What a run left behind.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) end: End,
    pub(crate) reading: Reading,
    /// Linux has come up; the exit status of what it ran.
    pub(crate) linux_up: bool,
    pub(crate) linux_status: Option<i32>,
    /// The commands that it ran, with `0` in front where they succeeded.
    pub(crate) ran: Vec<String>,
    pub(crate) took: Duration,
    folder: PathBuf,
}

impl Run {
    /// The last lines of the serial port and of the emulator, and where all of them are.
    pub(crate) fn explain(&self) -> String {
        let mut text = String::new();
        for (name, count) in [(SERIAL, 25), (OUTPUT, 8)] {
            let path = self.folder.join(name);
            let bytes = fs::read(&path).unwrap_or_default();
            let lines: Vec<String> =
                String::from_utf8_lossy(&bytes).lines().map(|line| format!("    {line}")).collect();
            text += &format!("  {} ends in:\n{}\n", path.display(), child::tail(&lines, count));
        }
        text
    }
}

/// Run `command`, which writes [`SERIAL`] in `folder`. A terminal sees the program's lines as they
/// come.
///
/// # Errors
/// It cannot be started; what the file system says.
pub(crate) fn run(command: &mut Command, folder: &Path, limit: Duration) -> io::Result<Run> {
    let serial = folder.join(SERIAL);
    match fs::remove_file(&serial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let output = File::create(folder.join(OUTPUT))?;
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()
        .map_err(|error| child::named(command.get_program(), &error))?;
    let mut port = Port { path: serial, at: 0, rest: Vec::new() };
    let mut run = Run {
        end: End::TimedOut(limit.as_secs()),
        reading: Reading::default(),
        linux_up: false,
        linux_status: None,
        ran: Vec::new(),
        took: Duration::ZERO,
        folder: folder.to_owned(),
    };
    loop {
        // In this order: what was said before the end is read after it.
        let ended = child.try_wait()?;
        port.read(|line| run.line(line))?;
        if let Some(status) = ended {
            run.end = End::Exit(status);
            break;
        }
        if start.elapsed() > limit {
            child::end(&mut child, LAST_WORDS)?;
            port.read(|line| run.line(line))?;
            break;
        }
        thread::sleep(PAUSE);
    }
    run.took = start.elapsed();
    Ok(run)
}

impl Run {
    fn line(&mut self, line: &str) {
        let line = line.trim_end();
        let ours = self.reading.line(line);
        self.linux_up |= line.starts_with(LINUX_UP);
        if let Some(status) = line.strip_prefix(LINUX_STATUS) {
            self.linux_status = status.parse().ok();
        }
        self.ran.extend(line.strip_prefix(LINUX_RAN).map(str::to_owned));
        if ours && io::stderr().is_terminal() {
            eprintln!("    {line}");
        }
    }
}

/// The serial port's file, of which so much was read.
struct Port {
    path: PathBuf,
    at: u64,
    rest: Vec<u8>,
}

impl Port {
    /// Hand over the lines that have come since the last call.
    fn read(&mut self, mut line: impl FnMut(&str)) -> io::Result<()> {
        use std::io::{Seek, SeekFrom};
        let mut file = match File::open(&self.path) {
            // Bochs makes it with the first byte.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        file.seek(SeekFrom::Start(self.at))?;
        self.at += file.read_to_end(&mut self.rest)? as u64;
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let bytes: Vec<u8> = self.rest.drain(..=end).collect();
            line(&String::from_utf8_lossy(&bytes));
        }
        Ok(())
    }
}
