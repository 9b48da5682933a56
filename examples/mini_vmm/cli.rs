//! The command line: scenario and options, with errors that say what to do.

use std::path::PathBuf;

/// Which machine runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuChoice {
    /// kvm when /dev/kvm opens, else soft.
    Auto,
    /// The processor behind /dev/kvm.
    Kvm,
    /// The software CPU.
    Soft,
}

/// Format of the tables; the software CPU walks all three, /dev/kvm only `Legacy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatChoice {
    /// Ordinary x86-64 tables.
    Legacy,
    /// AMD nested paging.
    Npt,
    /// Intel EPT.
    Ept,
}

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// `None`: the tour.
    pub scenario: Option<String>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes the workload touches; `None`: the scenario's default.
    pub memory: Option<u64>,
    /// Machine.
    pub cpu: CpuChoice,
    /// Table format.
    pub format: FormatChoice,
    /// Write a report here.
    pub json: Option<PathBuf>,
    /// Draw a picture here (SVG).
    pub plot: Option<PathBuf>,
    /// Age while vCPUs fault (`access-tracking -p`).
    pub parallel: bool,
    /// Seed of what is random.
    pub seed: u64,
    /// Seconds of stress.
    pub seconds: u64,
}

/// How to use it.
pub const USAGE: &str = "\
mini_vmm: guests on page tables that the crates of this repository built

    cargo run --release --example mini_vmm                    the tour
    cargo run --release --example mini_vmm -- SCENARIO [OPTIONS]

scenarios
    demand-paging      vCPUs fault their memory in and verify it
    access-tracking    age the guest's memory: touch, mark idle, touch again
    stress             faults, zaps, aging, slot deletion and re-creation at once

options
    --vcpus N          number of vCPUs (2)
    --memory SIZE      what the workload touches, such as 64M or 1G
    --cpu kvm|soft     the CPU behind /dev/kvm, or the software CPU (kvm when it opens)
    --format legacy|npt|ept   format of the tables; npt and ept need --cpu soft (legacy)
    -p                 access-tracking: age while the vCPUs fault
    --seconds N        stress: how long (5)
    --seed N           seed of what is random
    --json FILE        write checks, counters and metrics as one JSON object
    --plot FILE        draw what was measured, as SVG
";

/// Scenarios whose names are reserved and that have not landed.
pub const NOT_YET: [&str; 6] =
    ["dirty-log", "migrate", "tiering", "passthrough", "shadow", "nested"];

/// Parse the arguments.
pub fn parse() -> Result<Options, String> {
    use lexopt::prelude::*;
    let mut options = Options {
        scenario: None,
        vcpus: 2,
        memory: None,
        cpu: CpuChoice::Auto,
        format: FormatChoice::Legacy,
        json: None,
        plot: None,
        parallel: false,
        seed: 1,
        seconds: 5,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next().map_err(|error| error.to_string())? {
        let text = |parser: &mut lexopt::Parser| -> Result<String, String> {
            let value = parser.value().map_err(|error| error.to_string())?;
            value.into_string().map_err(|raw| format!("{raw:?} is not text"))
        };
        match argument {
            Long("vcpus") => options.vcpus = number(&text(&mut parser)?, 1, 64)? as u32,
            Long("memory") => options.memory = Some(size(&text(&mut parser)?)?),
            Long("seed") => options.seed = number(&text(&mut parser)?, 0, u64::MAX)?,
            Long("seconds") => options.seconds = number(&text(&mut parser)?, 1, 86_400)?,
            Long("json") => options.json = Some(text(&mut parser)?.into()),
            Long("plot") => options.plot = Some(text(&mut parser)?.into()),
            Short('p') => options.parallel = true,
            Long("cpu") => {
                options.cpu = match text(&mut parser)?.as_str() {
                    "kvm" => CpuChoice::Kvm,
                    "soft" => CpuChoice::Soft,
                    other => return Err(format!("--cpu {other}: must be kvm or soft")),
                }
            }
            Long("format") => {
                options.format = match text(&mut parser)?.as_str() {
                    "legacy" => FormatChoice::Legacy,
                    "npt" => FormatChoice::Npt,
                    "ept" => FormatChoice::Ept,
                    other => return Err(format!("--format {other}: must be legacy, npt or ept")),
                }
            }
            Long("help") | Short('h') => {
                print!("{USAGE}");
                std::process::exit(0);
            }
            Value(name) if options.scenario.is_none() => {
                options.scenario = Some(name.to_string_lossy().into_owned());
            }
            other => return Err(other.unexpected().to_string()),
        }
    }
    Ok(options)
}

fn number(text: &str, min: u64, max: u64) -> Result<u64, String> {
    let value: u64 = text.parse().map_err(|_| format!("{text} is not a number"))?;
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{value} is not in {min}..={max}"))
    }
}

/// Bytes from `64M`, `1G`, `4096`; a multiple of 4 KiB.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let value: u64 = digits.parse().map_err(|_| format!("{text}: sizes look like 64M or 1G"))?;
    let bytes = value.checked_mul(1 << shift).filter(|bytes| *bytes <= 1 << 40);
    match bytes {
        Some(bytes) if bytes >= 4096 && bytes % 4096 == 0 => Ok(bytes),
        _ => Err(format!("{text}: must be a multiple of 4K, from 4K to 1024G")),
    }
}
