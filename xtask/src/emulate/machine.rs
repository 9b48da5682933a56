//! The machines: emulators with a processor of a kind, and how each is started.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::child;

/// Which tables a machine walks, and what runs on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// Nested tables of SVM, our program on bare metal.
    Npt,
    /// Extended tables of VMX, our program on bare metal.
    Ept,
    /// Linux with KVM on bare metal, our program as its guest.
    Nested,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Npt => "npt",
            Self::Ept => "ept",
            Self::Nested => "nested",
        })
    }
}

/// Who plays the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Emulator {
    Qemu,
    Bochs,
}

impl Emulator {
    fn program(self) -> &'static str {
        match self {
            Self::Qemu => "qemu-system-x86_64",
            Self::Bochs => "bochs",
        }
    }

    /// Debian's packages.
    pub(crate) fn packages(self) -> &'static str {
        match self {
            Self::Qemu => "qemu-system-x86",
            Self::Bochs => "bochs bochsbios vgabios",
        }
    }

    pub(crate) fn installed(self) -> bool {
        child::which(self.program()).is_some()
    }
}

/// One machine.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Emulator, model and number of CPUs that our program has.
    pub(crate) name: &'static str,
    pub(crate) group: Group,
    pub(crate) emulator: Emulator,
    /// The emulator's name of the processor.
    model: &'static str,
    /// CPUs of the emulated machine.
    cpus: u32,
    /// CPUs that our program sees.
    pub(crate) ours: u32,
    /// The suites that it runs unless told otherwise; `None`: all.
    pub(crate) suites: Option<&'static str>,
    /// Suites that the machine does not survive.
    pub(crate) without: Option<&'static str>,
    /// In place of the program: mini_vmm with these arguments, on the KVM that is there.
    pub(crate) scenarios: &'static [&'static str],
    /// Why it is not run with its group; it still is by its name.
    pub(crate) aside: Option<&'static str>,
}

impl Machine {
    const fn bare(
        name: &'static str,
        group: Group,
        emulator: Emulator,
        model: &'static str,
        cpus: u32,
    ) -> Self {
        Self {
            name,
            group,
            emulator,
            model,
            cpus,
            ours: cpus,
            suites: None,
            without: None,
            scenarios: &[],
            aside: None,
        }
    }

    /// So long may it run. Generous: the host is busy with other things, too.
    pub(crate) fn limit(&self) -> Duration {
        Duration::from_secs(if self.group == Group::Nested { 900 } else { 300 })
    }
}

/// The suites that the group `nested` runs: those in which a missing flush shows, also of a nested
/// table's shadow, and one that shows that the chain works.
const NESTED_SUITES: &str = "faults,flush,aging,zap,shadow-nested";
/// What mini_vmm does on a KVM with nested paging: flushes that are precise there, and 2 MiB pages,
/// which it refuses where KVM shadows.
const SCENARIOS: &[&str] = &[
    "demand-paging --cpu kvm --memory 16M",
    "access-tracking --cpu kvm --memory 8M",
    "dirty-log --cpu kvm --memory 8M --pages 2m --random",
    "stress --cpu kvm --seconds 2",
    "migrate --cpu kvm --memory 4M --random",
];

/// All of them.
pub(crate) const MACHINES: [Machine; 11] = [
    Machine::bare("qemu-max-1", Group::Npt, Emulator::Qemu, "max", 1),
    Machine::bare("qemu-max-2", Group::Npt, Emulator::Qemu, "max", 2),
    Machine::bare("qemu-epyc-2", Group::Npt, Emulator::Qemu, "EPYC", 2),
    Machine {
        name: "bochs-ryzen-1",
        group: Group::Npt,
        emulator: Emulator::Bochs,
        model: "ryzen",
        cpus: 1,
        ours: 1,
        suites: None,
        // A triple fault of a guest ends Bochs 2.7 itself: it has no SVM intercept of shutdown.
        without: Some("platform"),
        scenarios: &[],
        aside: None,
    },
    Machine::bare("bochs-haswell-1", Group::Ept, Emulator::Bochs, "corei7_haswell_4770", 1),
    Machine::bare("bochs-haswell-2", Group::Ept, Emulator::Bochs, "corei7_haswell_4770", 2),
    Machine::bare("bochs-skylake-1", Group::Ept, Emulator::Bochs, "corei7_skylake_x", 1),
    Machine::bare("bochs-skylake-2", Group::Ept, Emulator::Bochs, "corei7_skylake_x", 2),
    Machine {
        name: "qemu-kvm_amd-2",
        group: Group::Nested,
        emulator: Emulator::Qemu,
        model: "max",
        cpus: 2,
        ours: 2,
        suites: Some(NESTED_SUITES),
        without: None,
        scenarios: &[],
        aside: None,
    },
    Machine {
        name: "qemu-kvm_amd-vmm",
        group: Group::Nested,
        emulator: Emulator::Qemu,
        model: "max",
        cpus: 2,
        ours: 2,
        suites: None,
        without: None,
        scenarios: SCENARIOS,
        aside: Some("QEMU 7.2 on a busy host sometimes exits twice and spoils a guest's VMCB"),
    },
    // Bochs' CPUs take turns: a second one would make Linux slower and nothing more true.
    Machine {
        name: "bochs-kvm_intel-2",
        group: Group::Nested,
        emulator: Emulator::Bochs,
        model: "corei7_haswell_4770",
        cpus: 1,
        ours: 2,
        suites: Some(NESTED_SUITES),
        without: None,
        scenarios: &[],
        aside: None,
    },
];

/// The serial port's file, in the folder of a run.
pub(crate) const SERIAL: &str = "serial.txt";
/// Bochs' configuration, and what its debugger is told: to go on.
const BOCHSRC: &str = "bochsrc";
const DEBUGGER: &str = "debugger";
/// Instructions in a second of Linux under Bochs.
const LINUX_IPS: u32 = 50_000_000;
const TEMPLATE: &str = "examples/test_hypervisor/bochsrc";

/// What a machine boots.
pub(crate) enum Boot<'a> {
    /// Our program, for QEMU.
    Program { elf: &'a Path, command_line: &'a str },
    /// A disk with our program, for Bochs.
    Disk(&'a Path),
    /// Linux, for QEMU.
    Linux { kernel: &'a Path, initramfs: &'a Path, command_line: &'a str },
    /// A CD with Linux, for Bochs.
    Cd(&'a Path),
}

impl Machine {
    /// The command that runs this machine in `folder`, which is made ready. Serial output goes to
    /// [`SERIAL`] there.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn command(&self, folder: &Path, boot: &Boot<'_>) -> io::Result<Command> {
        let mut command = Command::new(self.emulator.program());
        command.current_dir(folder);
        match self.emulator {
            Emulator::Qemu => self.qemu(&mut command, boot),
            Emulator::Bochs => {
                fs::write(folder.join(BOCHSRC), self.bochsrc(boot)?)?;
                fs::write(folder.join(DEBUGGER), "c\n")?;
                command.args(["-q", "-f", BOCHSRC, "-rc", DEBUGGER]);
            }
        }
        Ok(command)
    }

    fn qemu(&self, command: &mut Command, boot: &Boot<'_>) {
        command.args(["-accel", "tcg", "-M", "q35", "-m", "1024", "-no-reboot", "-nodefaults"]);
        command.args(["-vga", "none", "-display", "none", "-monitor", "none"]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        command.args(["-cpu", self.model, "-smp", &self.cpus.to_string()]);
        command.args(["-serial", &format!("file:{SERIAL}")]);
        match boot {
            Boot::Program { elf, command_line } => {
                command.arg("-kernel").arg(elf).args(["-append", command_line]);
            }
            Boot::Linux { kernel, initramfs, command_line } => {
                command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
                command.args(["-append", command_line]);
            }
            Boot::Disk(path) => {
                command.arg("-drive").arg(format!("file={},format=raw", path.display()));
            }
            Boot::Cd(path) => {
                command.arg("-cdrom").arg(path);
            }
        }
    }

    /// The text of the configuration: the test hypervisor's template, and what a CD wants
    /// differently. Of two lines that say the same thing Bochs obeys the later one.
    fn bochsrc(&self, boot: &Boot<'_>) -> io::Result<String> {
        let (medium, more) = match boot {
            Boot::Disk(path) => (path, String::new()),
            Boot::Cd(path) => {
                let drive = format!("type=cdrom, path=\"{}\", status=inserted", path.display());
                let memory = "memory: guest=1024, host=1024";
                // Linux' clock must go about as fast as its CPU computes, or it finds itself late.
                let cpu =
                    format!("cpu: model={}, count={}, ips={LINUX_IPS}", self.model, self.cpus);
                (path, format!("\nata0-master: {drive}\nboot: cdrom\n{memory}\n{cpu}\n"))
            }
            Boot::Program { .. } | Boot::Linux { .. } => {
                return Err(io::Error::other("Bochs boots from a medium, not from files"));
            }
        };
        let template = fs::read_to_string(child::root().join(TEMPLATE))?;
        let text = template
            .replace("{model}", self.model)
            .replace("{cpus}", &self.cpus.to_string())
            .replace("{disk}", &medium.display().to_string())
            .replace("{serial}", SERIAL);
        Ok(text + &more)
    }
}
