//! A small Linux with KVM: Debian's kernel, an initramfs with its KVM modules, busybox and what is
//! to be run; and a CD of all that for Bochs.
//!
//! The kernel's package is fetched by `apt-get download` and kept under the target directory;
//! nothing is installed.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Error;
use crate::child;

/// Depends on the current kernel for virtual machines: small, with a serial console.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// One of them loads.
const VENDORS: [&str; 2] = ["kvm-intel", "kvm-amd"];
/// Programs that this needs here, and Debian's packages that bring them.
const TOOLS: [(&str, &str); 4] =
    [("busybox", "busybox-static"), ("cpio", "cpio"), ("dpkg", "dpkg"), ("xz", "xz-utils")];
/// The same for CDs; `grub-mkrescue` finds its parts by itself and calls the others.
const CD_TOOLS: [(&str, &str); 3] =
    [("grub-mkrescue", "grub-common grub-pc-bin"), ("xorriso", "xorriso"), ("mformat", "mtools")];

/// Console on the serial port, errors only; a panic ends the emulator. The guest is trusted.
pub(crate) const COMMAND_LINE: &str =
    "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check";

/// An unpacked kernel package.
#[derive(Debug)]
pub(crate) struct Linux {
    pub(crate) kernel: PathBuf,
    /// Where its modules are.
    modules: PathBuf,
}

/// Fail with the packages that are missing.
fn need(tools: &[(&str, &str)]) -> Result<(), Error> {
    let missing = tools.iter().filter(|(program, _)| child::which(program).is_none());
    let packages: Vec<&str> = missing.map(|(_, package)| *package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    Err(format!("missing: apt-get install {}", packages.join(" ")).into())
}

impl Linux {
    /// The kernel, fetched and unpacked if it is not there yet.
    ///
    /// # Errors
    /// A tool is missing, or the package cannot be had.
    pub(crate) fn get() -> Result<Self, Error> {
        need(&TOOLS)?;
        let folder = child::target().join("emulate/linux");
        let tree = folder.join("tree");
        if !tree.join("complete").exists() {
            fs::create_dir_all(&folder)?;
            let package = fetch(&folder)?;
            let unpacked = folder.join("unpacking");
            let _ = fs::remove_dir_all(&unpacked);
            let _ = fs::remove_dir_all(&tree);
            succeed(Command::new("dpkg").arg("-x").args([&package, &unpacked]))?;
            fs::write(unpacked.join("complete"), "")?;
            fs::rename(&unpacked, &tree)?;
        }
        let tree = fs::canonicalize(tree)?;
        let kernel = find(&tree.join("boot"), &|name| name.starts_with("vmlinuz-"))?;
        Ok(Self { kernel, modules: tree })
    }

    /// Put an initramfs into `folder` that runs `script` with `programs` in /bin.
    ///
    /// # Errors
    /// A module is missing; what the file system and `cpio` say.
    pub(crate) fn initramfs(
        &self,
        folder: &Path,
        programs: &[&Path],
        script: &str,
    ) -> Result<PathBuf, Error> {
        let root = folder.join("initramfs");
        let _ = fs::remove_dir_all(&root);
        for name in ["bin", "dev", "lib", "proc", "sys"] {
            fs::create_dir_all(root.join(name))?;
        }
        let busybox = child::which("busybox").ok_or("no busybox")?;
        for program in programs.iter().copied().chain([busybox.as_path()]) {
            let name = program.file_name().ok_or("a program without a name")?;
            fs::copy(program, root.join("bin").join(name))?;
        }
        let mut load = String::new();
        for vendor in VENDORS {
            let mut order = Vec::new();
            self.module(vendor, &root.join("lib"), &mut order)?;
            // Those that both need are there the second time; the one for the other vendor's
            // processors says so and is not.
            let commands = order.iter().map(|file| format!("insmod /lib/{file} 2> /dev/null\n"));
            load.extend(commands);
        }
        let init = root.join("init");
        fs::write(&init, INIT.replace("{load}", &load).replace("{script}", script))?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        archive(&root, &folder.join("initramfs.cpio"))
    }

    /// Copy a module and those it depends on to `to`; their names in the order of loading.
    fn module(&self, name: &str, to: &Path, order: &mut Vec<String>) -> Result<(), Error> {
        let file = format!("{name}.ko");
        if order.contains(&file) {
            return Ok(());
        }
        // In files' names `-` and `_` are the same.
        let plain = |text: &str| text.replace('_', "-");
        let wanted = plain(&file);
        let source = find(&self.modules, &|found| plain(found).starts_with(&wanted))?;
        let target = to.join(&file);
        if source.extension().is_some_and(|end| end == "xz") {
            let unpacked = fs::File::create(&target)?;
            succeed(Command::new("xz").arg("-dc").arg(&source).stdout(unpacked))?;
        } else {
            fs::copy(&source, &target)?;
        }
        for needed in dependencies(&fs::read(&target)?) {
            self.module(&plain(&needed), to, order)?;
        }
        order.push(file);
        Ok(())
    }

    /// Put a CD into `folder` that boots this kernel with `initramfs`.
    ///
    /// # Errors
    /// A tool is missing; what the file system and `grub-mkrescue` say.
    pub(crate) fn cd(&self, folder: &Path, initramfs: &Path) -> Result<PathBuf, Error> {
        need(&CD_TOOLS)?;
        let root = folder.join("cd");
        let _ = fs::remove_dir_all(&root);
        let boot = root.join("boot");
        fs::create_dir_all(boot.join("grub"))?;
        fs::copy(&self.kernel, boot.join("vmlinuz"))?;
        fs::copy(initramfs, boot.join("initramfs"))?;
        let menu = format!(
            "set timeout=0\nlinux /boot/vmlinuz {COMMAND_LINE}\ninitrd /boot/initramfs\nboot\n"
        );
        fs::write(boot.join("grub/grub.cfg"), menu)?;
        let cd = folder.join("linux.iso");
        let mut make = Command::new("grub-mkrescue");
        // BIOS alone: parts for UEFI would only be copied.
        if let Some(modules) = grub_for_bios() {
            make.arg("-d").arg(modules);
        }
        succeed(make.arg("-o").args([&cd, &root]))?;
        Ok(cd)
    }
}

/// GRUB's parts for machines with a BIOS, where Debian puts them.
fn grub_for_bios() -> Option<PathBuf> {
    Some(PathBuf::from("/usr/lib/grub/i386-pc")).filter(|folder| folder.is_dir())
}

/// What runs first in Linux. Its lines that start with `chain:` are read by `run.rs`.
const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
ifconfig lo up
{load}echo \"chain: up: $(uname -r) after $(cut -d' ' -f1 /proc/uptime) s\" \\
    $(cd /sys/module && grep -s . kvm*/parameters/nested kvm*/parameters/[en]pt \\
        kvm/parameters/tdp_mmu)
{script}
echo \"chain: status $?\"
# The serial port has a buffer.
sleep 1
poweroff -f
";

/// Fetch the kernel's package into `folder`.
fn fetch(folder: &Path) -> Result<PathBuf, Error> {
    let packages = |name: &str| name.ends_with(".deb");
    if let Ok(package) = find(folder, &packages) {
        return Ok(package);
    }
    let (ended, lines) =
        child::lines(Command::new("apt-cache").args(["depends", META_PACKAGE]), None)?;
    let name = lines.iter().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let Some(name) = name.filter(|_| ended.success()) else {
        return Err(format!(
            "apt knows no {META_PACKAGE} (apt-get update?); or put a Debian kernel package for \
             virtual machines into {}",
            folder.display()
        )
        .into());
    };
    let name = format!("linux-image-{name}");
    println!("fetching {name}");
    succeed(Command::new("apt-get").args(["download", "-qq", &name]).current_dir(folder))?;
    find(folder, &packages)
}

/// Modules that a module says it needs: its `.modinfo` holds strings `key=value`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"depends=";
    let mut strings = module.split(|byte| *byte == 0);
    let list = strings.find_map(|text| text.strip_prefix(KEY)).unwrap_or_default();
    let names = String::from_utf8_lossy(list).into_owned();
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The first file below `folder` whose name is wanted, in alphabetical order of paths.
fn find(folder: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<PathBuf, Error> {
    let mut folders = vec![folder.to_owned()];
    let mut found = Vec::new();
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if wanted(&entry.file_name().to_string_lossy()) {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found.into_iter().next().ok_or_else(|| format!("not found in {}", folder.display()).into())
}

/// Write the files below `root` as an initramfs.
fn archive(root: &Path, to: &Path) -> Result<PathBuf, Error> {
    let mut names = vec![".".to_owned()];
    let mut folders = vec![root.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            names.push(path.strip_prefix(root)?.to_string_lossy().into_owned());
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    // A folder comes before what it holds.
    names.sort();
    let mut cpio = Command::new("cpio")
        .args(["--quiet", "-o", "-H", "newc", "-R", "0:0"])
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(fs::File::create(to)?)
        .spawn()?;
    let list = cpio.stdin.take().ok_or("cpio takes no list")?;
    { list }.write_all(names.join("\n").as_bytes())?;
    if !cpio.wait()?.success() {
        return Err(format!("cpio could not write {}", to.display()).into());
    }
    Ok(fs::canonicalize(to)?)
}

/// Run a command that must succeed.
fn succeed(command: &mut Command) -> Result<(), Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{program} failed: {}", said.trim()).into())
}

#[cfg(test)]
mod tests {
    use super::dependencies;

    #[test]
    fn a_module_says_what_it_needs() {
        let info = |line: &str| format!("\x7fELF\0license=GPL\0{line}\0name=kvm\0").into_bytes();
        assert_eq!(dependencies(&info("depends=kvm,ccp")), ["kvm", "ccp"]);
        assert_eq!(dependencies(&info("depends=")), [""; 0]);
        assert_eq!(dependencies(b""), [""; 0]);
    }
}
