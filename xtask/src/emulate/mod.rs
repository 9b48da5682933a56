//! The test hypervisor under emulators: builds it, boots it on every machine of a group, reads what
//! it prints, and judges.
//!
//! | file | owns |
//! |---|---|
//! | `machine` | the machines, and how each is started |
//! | `program` | what is built: the program, its disk, a static mini_vmm |
//! | `image` | the layout of the disk |
//! | `linux` | Debian's kernel with KVM, for the machines of the group `nested` |
//! | `run` | one run: serial port, time limit |
//! | `skips` | which checks may be skipped where |
//!
//! What the program prints is read by `examples/test_hypervisor/protocol.rs`, its file by
//! mini_vmm's `nested/image.rs`.

#[path = "../../../examples/mini_vmm/nested/image.rs"]
mod elf;
mod image;
mod linux;
mod machine;
mod program;
#[path = "../../../examples/test_hypervisor/protocol.rs"]
mod protocol;
mod run;
mod skips;

use std::fs;
use std::path::{Path, PathBuf};

use crate::child;
use crate::{Error, Verdict};
use linux::Linux;
use machine::{Boot, Emulator, Group, MACHINES, Machine};
use protocol::{Counts, Mark};
use run::{End, Run};
use skips::{Skips, Suites};

/// What QEMU exits with when the program says that all is well: (0x10 << 1) | 1.
const QEMU_ALL_OK: i32 = 0x21;
/// As the value of --suite and as a group: everything.
const ALL: &str = "all";
/// Memory of the program's machine in Linux.
const NESTED_MEMORY: &str = "256M";

/// What the command line asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// Suites, separated by commas, or `all`; `None`: what the machine runs by default.
    pub(crate) suites: Option<String>,
    /// Only the machine of this name.
    pub(crate) machine: Option<String>,
    /// Build with this known breakage.
    pub(crate) busted: Option<String>,
    /// The run must end, and this check must fail in it.
    pub(crate) must_fail: Option<String>,
    /// Seed of what is random.
    pub(crate) seed: Option<u64>,
}

/// Run the machines of `groups`; an empty list or `all` means all.
///
/// # Errors
/// A group or machine that does not exist; what cannot be built.
pub(crate) fn run(groups: &[String], options: &Options) -> Result<Verdict, Error> {
    let machines = choose(groups, options)?;
    let mut campaign = Campaign {
        options,
        elf: program::hypervisor(options.busted.as_deref())?,
        skips: Skips::load()?,
        linux: None,
        total: Counts::default(),
    };
    for machine in &machines {
        campaign.machine(machine);
    }
    for line in campaign.skips.unused() {
        campaign.fail(&line);
    }
    Ok(campaign.verdict())
}

fn choose(groups: &[String], options: &Options) -> Result<Vec<&'static Machine>, Error> {
    let known = [Group::Npt, Group::Ept, Group::Nested];
    for name in groups {
        if name != ALL && !known.iter().any(|group| group.to_string() == *name) {
            return Err(format!("emulate: `{name}` is not npt, ept, nested or all").into());
        }
    }
    let all = groups.is_empty() || groups.iter().any(|name| name == ALL);
    let mut machines: Vec<&Machine> = MACHINES.iter().collect();
    machines.retain(|machine| all || groups.contains(&machine.group.to_string()));
    if let Some(name) = &options.machine {
        machines.retain(|machine| machine.name == name);
        if machines.is_empty() {
            let names: Vec<&str> = MACHINES.iter().map(|machine| machine.name).collect();
            return Err(
                format!("emulate: no machine {name} there; all: {}", names.join(" ")).into()
            );
        }
        return Ok(machines);
    }
    machines.retain(|machine| {
        if let Some(why) = machine.aside {
            println!("{:<18} NOT RUN, only by name (--machine): {why}", machine.name);
        }
        machine.aside.is_none()
    });
    Ok(machines)
}

struct Campaign<'a> {
    options: &'a Options,
    elf: PathBuf,
    skips: Skips,
    /// Built when the first machine wants it.
    linux: Option<(Linux, PathBuf)>,
    total: Counts,
}

impl Campaign<'_> {
    fn fail(&mut self, what: &str) {
        println!("  [FAIL] {what}");
        self.total.add(Mark::Fail);
    }

    /// Run and judge one machine.
    fn machine(&mut self, machine: &Machine) {
        if !machine.emulator.installed() {
            println!(
                "{:<18} SKIPPED: apt-get install {}",
                machine.name,
                machine.emulator.packages()
            );
            return self.total.add(Mark::Skip);
        }
        match self.attempt(machine) {
            Ok(run) => self.judge(machine, &run),
            Err(error) => self.fail(&format!("{}: {error}", machine.name)),
        }
    }

    fn attempt(&mut self, machine: &Machine) -> Result<Run, Error> {
        let run = self.run(machine)?;
        // Known: of about 120 boots of Linux on two of QEMU's CPUs one dies early.
        let died = machine.group == Group::Nested
            && machine.emulator == Emulator::Qemu
            && !run.linux_up
            && matches!(run.end, End::Exit(_));
        if died {
            println!("{}: Linux died before it was up; once more\n{}", machine.name, run.explain());
            return self.run(machine);
        }
        Ok(run)
    }

    fn run(&mut self, machine: &Machine) -> Result<Run, Error> {
        let folder = child::target().join("emulate").join(machine.name);
        fs::create_dir_all(&folder)?;
        let folder = fs::canonicalize(folder)?;
        let line = self.command_line(machine);
        let mut command = match (machine.group, machine.emulator) {
            (Group::Nested, emulator) => {
                let (linux, initramfs) = self.linux(machine, &folder)?;
                let kernel = linux.kernel.as_path();
                if emulator == Emulator::Bochs {
                    let cd = linux.cd(&folder, &initramfs)?;
                    machine.command(&folder, &Boot::Cd(&cd))?
                } else {
                    let (initramfs, command_line) = (initramfs.as_path(), linux::COMMAND_LINE);
                    machine.command(&folder, &Boot::Linux { kernel, initramfs, command_line })?
                }
            }
            (_, Emulator::Qemu) => {
                machine.command(&folder, &Boot::Program { elf: &self.elf, command_line: &line })?
            }
            (_, Emulator::Bochs) => {
                let disk = program::disk(&self.elf, &line, &folder)?;
                machine.command(&folder, &Boot::Disk(&disk))?
            }
        };
        Ok(run::run(&mut command, &folder, machine.limit())?)
    }

    fn suites(&self, machine: &Machine) -> Option<&str> {
        self.options.suites.as_deref().or(machine.suites).filter(|suites| *suites != ALL)
    }

    fn command_line(&self, machine: &Machine) -> String {
        let mut line = format!("cpus={} seed={}", machine.ours, self.options.seed.unwrap_or(1));
        if let Some(suites) = self.suites(machine) {
            line += &format!(" suite={suites}");
        }
        if let Some(suites) = machine.without {
            line += &format!(" without={suites}");
        }
        line
    }

    /// Linux that boots the program in a VM, for the run in `folder`.
    fn linux(&mut self, machine: &Machine, folder: &Path) -> Result<(&Linux, PathBuf), Error> {
        if self.linux.is_none() {
            self.linux = Some((Linux::get()?, program::mini_vmm()?));
        }
        let (linux, mini_vmm) = self.linux.as_ref().ok_or("no Linux")?;
        if !machine.scenarios.is_empty() {
            let each = |scenario: &&str| {
                format!("mini_vmm {scenario}\necho \"{}$? {scenario}\"\n", run::LINUX_RAN)
            };
            let script: String = machine.scenarios.iter().map(each).collect();
            let initramfs = linux.initramfs(folder, &[mini_vmm], script.trim_end())?;
            return Ok((linux, initramfs));
        }
        let name = self.elf.file_name().unwrap_or_default().to_string_lossy();
        let mut script = format!(
            "mini_vmm nested --image /bin/{name} --vcpus {} --memory {NESTED_MEMORY} --seed {}",
            machine.ours,
            self.options.seed.unwrap_or(1)
        );
        if let Some(suites) = self.suites(machine) {
            script += &format!(" --suite {suites}");
        }
        let initramfs = linux.initramfs(folder, &[mini_vmm, &self.elf], &script)?;
        Ok((linux, initramfs))
    }

    /// mini_vmm's scenarios: each is one check.
    fn judge_scenarios(&mut self, machine: &Machine, run: &Run) {
        let seconds = run.took.as_secs_f64();
        println!("{:<18} {seconds:>6.1} s  mini_vmm on the KVM of this Linux", machine.name);
        let mut good = true;
        for scenario in machine.scenarios {
            if run.ran.contains(&format!("0 {scenario}")) {
                println!("  [ok  ] {scenario}");
                self.total.add(Mark::Ok);
            } else {
                self.fail(scenario);
                good = false;
            }
        }
        if let Some(what) = badly_ended(machine, run) {
            self.fail(&what);
            good = false;
        }
        if !good {
            print!("{}", run.explain());
        }
    }

    fn judge(&mut self, machine: &Machine, run: &Run) {
        if !machine.scenarios.is_empty() {
            return self.judge_scenarios(machine, run);
        }
        let counts = run.reading.counts();
        println!(
            "{:<18} {:>6.1} s  {counts}, {} notes: {}",
            machine.name,
            run.took.as_secs_f64(),
            run.reading.notes.len(),
            run.reading.headline.as_deref().unwrap_or("(it never said what it is)")
        );
        let suites = run.reading.suites();
        let suites: Vec<_> =
            suites.iter().map(|(name, n)| format!("{name} {}", n.passed)).collect();
        println!("  passed: {}", suites.join(", "));
        if let Some(name) = &self.options.must_fail {
            return self.judge_broken(name, run);
        }
        let some = self.suites(machine).is_some() || machine.without.is_some();
        let suites = if some { Suites::Some } else { Suites::All };
        let mut wrong = run.reading.wrong();
        wrong.extend(badly_ended(machine, run));
        wrong.extend(self.skips.judge(machine.name, &run.reading, suites));
        self.total.passed += counts.passed;
        self.total.skipped += counts.skipped;
        if wrong.is_empty() {
            return;
        }
        for what in &wrong {
            self.fail(what);
        }
        print!("{}", run.explain());
    }

    /// The program was broken on purpose: did the check that is there for it fail?
    fn judge_broken(&mut self, name: &str, run: &Run) {
        let named = |check: &&protocol::Check| check.name == *name;
        let found = run.reading.checks.iter().filter(named);
        let marks: Vec<Mark> = found.map(|check| check.mark).collect();
        if marks.contains(&Mark::Fail) {
            println!("  [ok  ] {name} failed, as it must");
            return self.total.add(Mark::Ok);
        }
        let what = if marks.is_empty() { "did not run" } else { "passes on broken code" };
        self.fail(&format!("{name} {what}"));
        print!("{}", run.explain());
    }

    fn verdict(&self) -> Verdict {
        println!("{}", self.total);
        let held = self.total.failed == 0 && self.total.passed > 0;
        if held { Verdict::Held } else { Verdict::Failed }
    }
}

/// What is wrong with how a run ended, whatever the program has printed.
fn badly_ended(machine: &Machine, run: &Run) -> Option<String> {
    let status = match run.end {
        End::TimedOut(seconds) => return Some(format!("still running after {seconds} s")),
        End::Exit(status) => status,
    };
    if machine.group == Group::Nested {
        return match run.linux_status {
            Some(0) => None,
            Some(3) => Some("mini_vmm could not run the program there".to_owned()),
            Some(status) => Some(format!("mini_vmm ended with status {status}")),
            None if run.linux_up => Some("Linux died under it".to_owned()),
            None => Some(format!("Linux did not come up; the emulator said {status}")),
        };
    }
    // Bochs' status is the same whatever happened.
    let bad = machine.emulator == Emulator::Qemu && status.code() != Some(QEMU_ALL_OK);
    bad.then(|| format!("the emulator ended with {status}, not with {QEMU_ALL_OK}"))
}
