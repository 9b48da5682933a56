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

/// How dirty pages are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogMode {
    /// A bitmap per slot; taking it protects its pages again.
    Bitmap,
    /// A bitmap per slot; looking at it changes nothing, clearing parts of it protects those.
    Clear,
    /// A ring per vCPU.
    Ring,
    /// Rings and bitmaps at once.
    Both,
}

/// How writes are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// Write-protected entries: the first write of a page faults.
    WriteProtect,
    /// The dirty bits of the entries.
    DirtyBit,
    /// The CPU lists the pages that it dirties; the software CPU can.
    HardwareLog,
}

/// How a tiered VM's pages are taken away. The last three are wrong, to see that it shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trial {
    /// Take cold pages away.
    #[default]
    Cold,
    /// Take any pages away, hot ones too, and linger wherever faults can meet them.
    Disturbed,
    /// The same, and copy pages before they are unmapped. Loses what is written in between.
    CopyFirst,
    /// The same, and give the memory of pages back that faults took back. Loses them.
    DropTakenBack,
    /// As `Disturbed`, and throw flushes away.
    ForgetFlushes,
}

impl Trial {
    /// Are the pages chosen without regard to their age?
    pub fn is_disturbed(self) -> bool {
        self != Self::Cold
    }
}

/// Which shadow pages go first when there are too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyChoice {
    /// Those made first.
    Fifo,
    /// Those whose accessed bits are clear.
    Accessed,
    /// One after the other, compared.
    Both,
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
    /// How dirty pages are asked for.
    pub mode: LogMode,
    /// How writes are noticed.
    pub tracking: Tracking,
    /// Pages of 2 MiB where logging does not forbid them.
    pub huge: bool,
    /// Harvests; rounds of a migration.
    pub iterations: u64,
    /// Share of the pages that is written, in percent.
    pub write_percent: u64,
    /// Turns of an empty loop after each access; `None`: the scenario's default.
    pub delay: Option<u64>,
    /// Memory slots.
    pub slots: u64,
    /// Logging is disabled under running vCPUs.
    pub run_while_disabling: bool,
    /// vCPUs visit their pages in a pseudo-random order.
    pub random: bool,
    /// Unmap, age and drop roots while dirty pages are harvested.
    pub disturb: bool,
    /// All vCPUs visit all pages, and write words of their own there.
    pub overlap: bool,
    /// Take a VM here.
    pub listen: Option<String>,
    /// Send a VM there.
    pub to: Option<String>,
    /// Seconds that a peer may take for a frame.
    pub timeout: u64,
    /// Bytes for each vCPU (`access-tracking`); `None`: the scenario's default.
    pub per_vcpu: Option<u64>,
    /// Age by generations where KVM's test can.
    pub generations: bool,
    /// What becomes of accesses that were not seen: 0 a failed check, more a warning, less either,
    /// as the machine has it.
    pub warn_only: i64,
    /// Share of the pages that are hot, in percent.
    pub hot: u64,
    /// Milliseconds between two aging passes.
    pub interval: u64,
    /// Folder of the slow tier's file; `None`: that of temporary files.
    pub slow: Option<PathBuf>,
    /// How pages are taken away; other than the default only in tests.
    pub trial: Trial,
    /// The test hypervisor (`nested`); `None`: where it is built.
    pub image: Option<PathBuf>,
    /// Its suites, separated by commas; `None`: all.
    pub suite: Option<String>,
    /// Shadow pages that there may be.
    pub quota: u32,
    /// Which of them go first.
    pub policy: PolicyChoice,
}

impl Options {
    /// The scenario `scenario` with every default.
    pub fn new(scenario: Option<String>) -> Self {
        Self {
            scenario,
            vcpus: 2,
            memory: None,
            cpu: CpuChoice::Auto,
            format: FormatChoice::Legacy,
            json: None,
            plot: None,
            parallel: false,
            seed: 1,
            seconds: 5,
            mode: LogMode::Bitmap,
            tracking: Tracking::WriteProtect,
            huge: false,
            iterations: 8,
            write_percent: 100,
            delay: None,
            slots: 1,
            run_while_disabling: false,
            random: false,
            overlap: false,
            disturb: false,
            listen: None,
            to: None,
            timeout: 10,
            per_vcpu: None,
            generations: false,
            warn_only: -1,
            hot: 25,
            interval: 250,
            slow: None,
            trial: Trial::default(),
            image: None,
            suite: None,
            quota: 64,
            policy: PolicyChoice::Both,
        }
    }
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
    dirty-log          which pages were written: enable, harvest under writing vCPUs, disable
    migrate            a running VM moves into another process, or within this one
    tiering            cold memory of a running guest goes to a file, and comes back when used
    nested             the test hypervisor as a guest, where /dev/kvm lends SVM or VMX
    shadow             a guest operating system at CPL 3 on shadow tables, and the same on TDP
                       tables; which tables go under a quota

options
    -v, --vcpus N      number of vCPUs (2)
    --memory SIZE      what the workload touches, such as 64M or 1G
    -b SIZE            access-tracking: the same for each vCPU
    --cpu kvm|soft     the CPU behind /dev/kvm, or the software CPU (kvm when it opens)
    -m, --format legacy|npt|ept  format of the tables; npt and ept need --cpu soft (legacy)
    -p                 access-tracking: age while 1, 2, 4 and 8 vCPUs fault, by several ways
    -l                 access-tracking: age by generations
    -w N               access-tracking: accesses that are not seen fail (0), warn (1), or what
                       suits the machine (-1)
    --seconds N        stress: how long (5)
    --mode bitmap|clear|ring|both   dirty-log, migrate: how dirty pages are asked for (bitmap)
    --tracking wp|dirty-bit|hardware-log   and how writes are noticed (wp); a hardware log
                       needs --cpu soft
    -s, --pages 4k|2m  dirty-log, access-tracking: largest page, if logging permits it (4k)
    --iterations N     dirty-log: harvests of each kind (8); migrate: rounds at most
    --write-percent N  share of the pages that the vCPUs write; they read the others (100)
    --delay N          turns of an empty loop after each access: a slower writer (dirty-log 0,
                       migrate 100000)
    --slots N          memory slots (1)
    -e                 dirty-log: vCPUs run on while logging is disabled
    --disturb          dirty-log: unmap, age and drop roots while vCPUs write and pages are
                       harvested; tiering: take any pages away, hot ones too; shadow:
                       take pages and tables away, and age
    --hot N            tiering: share of the pages that is hot, in percent (25)
    --interval N       tiering: milliseconds between two aging passes (250)
    --slow FOLDER      tiering: where the file with the cold pages is (the temporary folder)
    -o                 vCPUs visit each other's pages too (dirty-log, migrate, access-tracking)
    -r, --random       vCPUs visit their pages in a pseudo-random order; tiering: hot pages lie
                       scattered
    --listen ADDR      migrate: take a VM here, such as 127.0.0.1:7000
    --to ADDR          migrate: send a VM there; without both, both ends in one command
    --timeout N        migrate: seconds that a peer may take for a frame (10)
    --image FILE       nested: the test hypervisor (target/hypervisor/release/test-hypervisor)
    --suite NAME,...   nested: these suites only
    --quota N          shadow: shadow tables that there may be (64)
    --policy fifo|accessed|both   shadow: which of them go first (both, compared)
    --seed N           seed of what is random
    --json FILE        write checks, counters and metrics as one JSON object
    --plot FILE        draw what was measured, as SVG

exit status
    0 all held, 1 something did not, 2 wrong command line, 3 this machine lacks what the
    scenario needs and nothing was checked
";

/// Scenarios whose names are reserved and that have not landed.
pub const NOT_YET: [&str; 1] = ["passthrough"];

/// Parse the arguments.
pub fn parse() -> Result<Options, String> {
    use lexopt::prelude::*;
    let mut options = Options::new(None);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next().map_err(|error| error.to_string())? {
        let text = |parser: &mut lexopt::Parser| -> Result<String, String> {
            let value = parser.value().map_err(|error| error.to_string())?;
            value.into_string().map_err(|raw| format!("{raw:?} is not text"))
        };
        match argument {
            Short('b') => options.per_vcpu = Some(size(&text(&mut parser)?)?),
            Short('l') => options.generations = true,
            Short('w') => {
                let value = text(&mut parser)?;
                let number = value.parse().map_err(|_| format!("-w {value}: not a number"))?;
                options.warn_only = number;
            }
            Long("vcpus") | Short('v') => {
                options.vcpus = number(&text(&mut parser)?, 1, 64)? as u32
            }
            Long("memory") => options.memory = Some(size(&text(&mut parser)?)?),
            Long("seed") => options.seed = number(&text(&mut parser)?, 0, u64::MAX)?,
            Long("seconds") => options.seconds = number(&text(&mut parser)?, 1, 86_400)?,
            Long("json") => options.json = Some(text(&mut parser)?.into()),
            Long("plot") => options.plot = Some(text(&mut parser)?.into()),
            Short('p') => options.parallel = true,
            Short('e') => options.run_while_disabling = true,
            Long("random") | Short('r') => options.random = true,
            Long("disturb") => options.disturb = true,
            Short('o') => options.overlap = true,
            Long("iterations") => options.iterations = number(&text(&mut parser)?, 1, 1000)?,
            Long("write-percent") => options.write_percent = number(&text(&mut parser)?, 0, 100)?,
            Long("delay") => options.delay = Some(number(&text(&mut parser)?, 0, 1 << 20)?),
            Long("slots") => options.slots = number(&text(&mut parser)?, 1, 256)?,
            Long("timeout") => options.timeout = number(&text(&mut parser)?, 1, 3600)?,
            Long("hot") => options.hot = number(&text(&mut parser)?, 1, 90)?,
            Long("interval") => options.interval = number(&text(&mut parser)?, 1, 60_000)?,
            Long("slow") => options.slow = Some(text(&mut parser)?.into()),
            Long("image") => options.image = Some(text(&mut parser)?.into()),
            Long("suite") => options.suite = Some(text(&mut parser)?),
            Long("quota") => options.quota = number(&text(&mut parser)?, 32, 1 << 10)? as u32,
            Long("policy") => {
                let policies = [
                    ("fifo", PolicyChoice::Fifo),
                    ("accessed", PolicyChoice::Accessed),
                    ("both", PolicyChoice::Both),
                ];
                options.policy = one_of("--policy", &text(&mut parser)?, &policies)?;
            }
            Long("listen") => options.listen = Some(text(&mut parser)?),
            Long("to") => options.to = Some(text(&mut parser)?),
            Long("mode") => {
                let modes = [
                    ("bitmap", LogMode::Bitmap),
                    ("clear", LogMode::Clear),
                    ("ring", LogMode::Ring),
                    ("both", LogMode::Both),
                ];
                options.mode = one_of("--mode", &text(&mut parser)?, &modes)?;
            }
            Long("tracking") => {
                let ways = [
                    ("wp", Tracking::WriteProtect),
                    ("dirty-bit", Tracking::DirtyBit),
                    ("hardware-log", Tracking::HardwareLog),
                ];
                options.tracking = one_of("--tracking", &text(&mut parser)?, &ways)?;
            }
            Long("pages") | Short('s') => {
                let sizes = [("4k", false), ("2m", true)];
                options.huge = one_of("--pages", &text(&mut parser)?, &sizes)?;
            }
            Long("cpu") => {
                let cpus = [("kvm", CpuChoice::Kvm), ("soft", CpuChoice::Soft)];
                options.cpu = one_of("--cpu", &text(&mut parser)?, &cpus)?;
            }
            Long("format") | Short('m') => {
                let formats = [
                    ("legacy", FormatChoice::Legacy),
                    ("npt", FormatChoice::Npt),
                    ("ept", FormatChoice::Ept),
                ];
                options.format = one_of("--format", &text(&mut parser)?, &formats)?;
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

/// The value that goes by the name `text`.
fn one_of<T: Copy>(option: &str, text: &str, values: &[(&str, T)]) -> Result<T, String> {
    let found = values.iter().find(|(name, _)| *name == text);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = values.iter().map(|(name, _)| *name).collect();
        format!("{option} {text}: must be {}", names.join(" or "))
    })
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
