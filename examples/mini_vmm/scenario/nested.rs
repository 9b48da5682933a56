//! The test hypervisor on /dev/kvm: boots it as a guest, prints what it says, judges by that.

use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{env, fmt, fs};

use kvm_ioctls::Kvm;

use super::super::cli::{CpuChoice, Options};
use super::super::nested::{self, Config, End, Image, Missing};
use super::super::protocol::Reading;
use super::super::report::Report;
use super::super::vmm::Error;

/// What the program says when all its checks held.
const ALL_OK: u8 = 0x10;
/// Memory of the VM unless told otherwise.
const MEMORY: u64 = 512 << 20;
/// Longer silence means that it hangs. Generous: the host may itself be emulated.
const PATIENCE: Duration = Duration::from_secs(60);

/// Boot and judge it.
///
/// # Errors
/// [`Missing`] where it cannot run; what the machine says.
pub fn run(options: &Options) -> Result<Report, Error> {
    if options.cpu == CpuChoice::Soft {
        return Err(Missing::Kvm("the software CPU is no hypervisor: use --cpu kvm".into()).into());
    }
    let kvm = Kvm::new().map_err(|error| Missing::Kvm(format!("/dev/kvm: {error}")))?;
    let (extension, cpuid) = nested::offered(&kvm)?;
    let path = options.image.clone().unwrap_or_else(built);
    if !path.exists() {
        return Err(Missing::Image(path.display().to_string()).into());
    }
    let named = |error: &dyn fmt::Display| format!("{}: {error}", path.display());
    let file = fs::read(&path).map_err(|error| named(&error))?;
    let image = Image::parse(&file).map_err(|error| named(&error))?;
    let command_line = command_line(options);
    println!("\n/dev/kvm lends {extension}; booting {} `{command_line}`", path.display());
    let memory = options.memory.unwrap_or(MEMORY);
    let config = Config {
        image: &image,
        command_line: &command_line,
        vcpus: options.vcpus,
        memory,
        patience: PATIENCE,
    };
    let start = Instant::now();
    let mut reading = Reading::default();
    let end = nested::boot(&kvm, extension, &cpuid, &config, |line| {
        println!("{line}");
        reading.line(line);
    })?;
    let mut report = Report::new("nested", "kvm", options.vcpus, memory);
    report.seconds = start.elapsed().as_secs_f64();
    judge(&mut report, &reading, &end);
    Ok(report)
}

/// Where `cargo xtask emulate` and the command that [`Missing::Image`] names put the program.
fn built() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    target.join("hypervisor/release/test-hypervisor")
}

fn command_line(options: &Options) -> String {
    let mut line = format!("cpus={} seed={}", options.vcpus, options.seed);
    if let Some(suites) = &options.suite {
        line.push_str(" suite=");
        line.push_str(suites);
    }
    line
}

fn judge(report: &mut Report, reading: &Reading, end: &End) {
    for (suite, counts) in reading.suites() {
        report.check(suite.to_owned(), counts.failed == 0, counts.to_string());
    }
    let wrong = reading.wrong();
    let said = reading.counts();
    let detail = if wrong.is_empty() { said.to_string() } else { wrong.join("; ") };
    report.check("lines", wrong.is_empty(), detail);
    let ended = match end {
        End::Exit(code) => format!("exit code {code:#x}, expected {ALL_OK:#x}"),
        End::Silent => format!("silent for {} s", PATIENCE.as_secs()),
        End::Stopped(why) => why.clone(),
    };
    report.check("end", *end == End::Exit(ALL_OK), ended);
    report.count("passed", said.passed);
    report.count("failed", said.failed);
    report.count("skipped", said.skipped);
    report.count("notes", reading.notes.len() as u64);
}
