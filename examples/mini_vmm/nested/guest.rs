//! The VM that boots a program by PVH: flat memory from 0, KVM's interrupt controllers and timer,
//! a serial port that only writes, and the port by which the program ends the run.
//!
//! Every vCPU has a thread that runs it; what its guest writes to a port travels to the caller of
//! [`boot`] over a channel. Neighbours: `kvm::door` gets vCPUs out of KVM_RUN, `kvm::memory` is
//! the memory. No locks but the doors'.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use acpi_tables::Aml;
use acpi_tables::madt::{EnabledStatus, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_pit_config, kvm_segment};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use x86::bits64::rflags::RFlags;
use x86::controlregs::Cr0;
use x86::msr::IA32_FEATURE_CONTROL;

use super::super::kvm::door::{self, Door, Enter, Leave, Return};
use super::super::kvm::memory::GuestMemory;
use super::super::machine::{MachineError, PAGE};
use super::image::Image;
use super::offer::Extension;

/// COM1: data, line control, and the line status that says that it takes more. While a bit of line
/// control is set, what goes to the data port is the divisor of the line's clock.
const SERIAL: u16 = 0x3f8;
const SERIAL_CONTROL: u16 = SERIAL + 3;
const SERIAL_DIVISOR: u8 = 0x80;
const SERIAL_STATUS: u16 = SERIAL + 5;
const SERIAL_IDLE: u8 = 0x60;
/// The program writes here what became of it, and stops.
const EXIT: u16 = 0xf4;

/// Low memory ends here; above it, up to 640 KiB, is what the program is told.
const TOLD: u64 = 0x9_0000;
const INFO: u64 = TOLD;
const MEMORY_MAP: u64 = TOLD + 0x100;
const COMMAND_LINE: u64 = TOLD + 0x200;
const COMMAND_LINE_BYTES: usize = 0x800;
/// ACPI's root pointer, and the tables behind it.
const ROOT_POINTER: u64 = TOLD + 0x1000;
const ROOT_TABLE: u64 = TOLD + 0x1100;
const CPU_TABLE: u64 = TOLD + 0x1200;
/// PC memory: a hole from 640 KiB to 1 MiB.
const LOW_END: u64 = 0xa_0000;
const HIGH: u64 = 1 << 20;

/// `hvm_start_info`, as the PVH boot protocol has it.
const INFO_MAGIC: u32 = 0x336e_c578;
const INFO_VERSION: u32 = 1;
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Where KVM may keep three pages and one of its own for a VMX processor in real mode.
const TASK_PAGES: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// Where a CPU's local APIC is, and who made ACPI's tables.
const APIC: u32 = 0xfee0_0000;
const OEM: [u8; 6] = *b"MINIVM";
const OEM_TABLE: [u8; 8] = *b"NESTED  ";

/// IA32_FEATURE_CONTROL as firmware leaves it: locked, VMX outside SMX.
const VMX_ENABLED: u64 = 0b101;

/// CPUID leaves that hold the number of the CPU that asks.
const FEATURES: u32 = 1;
const TOPOLOGIES: [u32; 2] = [0xb, 0x1f];

/// What to boot, and on what.
#[derive(Clone, Debug)]
pub struct Config<'a> {
    /// The program.
    pub image: &'a Image,
    /// What it is told.
    pub command_line: &'a str,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of memory, a multiple of the page size, below the devices.
    pub memory: u64,
    /// So long may it be silent.
    pub patience: Duration,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The program wrote this to the exit port.
    Exit(u8),
    /// It said nothing for too long.
    Silent,
    /// A vCPU stopped for a reason that the program does not ask for.
    Stopped(String),
}

/// What a vCPU's thread reports.
#[derive(PartialEq)]
enum Event {
    Out(u16, u8),
    End(End),
}

/// Boot the program; `line` gets every line that it prints, as it comes. Returns when the run has
/// ended and no vCPU runs any longer.
///
/// # Errors
/// `Unsupported` if the program or its command line does not fit into the memory, `System` if a
/// call fails.
pub fn boot(
    kvm: &Kvm,
    extension: Extension,
    cpuid: &CpuId,
    config: &Config<'_>,
    mut line: impl FnMut(&str),
) -> Result<End, MachineError> {
    let vm = Vm::new(kvm, config)?;
    let mut vcpus = Vec::new();
    for id in 0..config.vcpus {
        vcpus.push(vm.vcpu(id, extension, cpuid, config.image.entry)?);
    }
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for (fd, door) in vcpus.iter_mut().zip(&vm.doors) {
            let sender = sender.clone();
            scope.spawn(move || drive(fd, door, &sender));
        }
        drop(sender);
        let end = listen(&receiver, config.patience, &mut line);
        // Until the last sender is gone: a kick reaches only who is in its run at that moment.
        while receiver.recv_timeout(KICK_AGAIN) != Err(RecvTimeoutError::Disconnected) {
            vm.doors.iter().for_each(Door::kick);
        }
        Ok(end)
    })
}

/// How long a kicked VM has before it is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(2);

/// Takes what the vCPUs report until the run has ended.
fn listen(events: &Receiver<Event>, patience: Duration, line: &mut impl FnMut(&str)) -> End {
    let mut text = Vec::new();
    let mut control = 0;
    let end = loop {
        match events.recv_timeout(patience) {
            Ok(Event::Out(SERIAL_CONTROL, byte)) => control = byte,
            Ok(Event::Out(..)) if control & SERIAL_DIVISOR != 0 => {}
            Ok(Event::Out(_, b'\n')) => {
                line(String::from_utf8_lossy(&text).trim_end());
                text.clear();
            }
            Ok(Event::Out(_, byte)) => text.push(byte),
            Ok(Event::End(end)) => break end,
            Err(RecvTimeoutError::Timeout) => break End::Silent,
            Err(RecvTimeoutError::Disconnected) => {
                break End::Stopped("every vCPU's thread has gone".to_owned());
            }
        }
    };
    if !text.is_empty() {
        line(String::from_utf8_lossy(&text).trim_end());
    }
    end
}

/// Runs a vCPU until somebody kicks it or the run has ended.
fn drive(fd: &mut VcpuFd, door: &Door, events: &Sender<Event>) {
    // Nobody listens any longer once the run has ended.
    let report = |event| drop(events.send(event));
    if let Err(error) = door::unblock_signal() {
        return report(Event::End(End::Stopped(error.to_string())));
    }
    while door.enter() == Enter::Go {
        let mut how = Return::Exit;
        match fd.run() {
            Ok(VcpuExit::IoOut(port @ (SERIAL | SERIAL_CONTROL), bytes)) => {
                bytes.iter().for_each(|byte| report(Event::Out(port, *byte)));
            }
            Ok(VcpuExit::IoOut(EXIT, bytes)) => {
                let code = bytes.first().copied().unwrap_or(u8::MAX);
                report(Event::End(End::Exit(code)));
            }
            // Nothing else is there: writes go nowhere, reads find a floating bus.
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
            Ok(VcpuExit::IoIn(SERIAL_STATUS, bytes)) => bytes.fill(SERIAL_IDLE),
            Ok(VcpuExit::IoIn(_, bytes) | VcpuExit::MmioRead(_, bytes)) => bytes.fill(u8::MAX),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                how = Return::Interrupted;
            }
            other => {
                let what = format!("{other:?}");
                let at = fd.get_regs().map_or(0, |registers| registers.rip);
                report(Event::End(End::Stopped(format!("{what} at rip {at:#x}"))));
                door.leave(Return::Exit);
                return;
            }
        }
        if door.leave(how) == Leave::Kicked {
            return;
        }
    }
}

/// The VM; its vCPUs are made one by one.
struct Vm {
    // The VM goes before the memory that it uses.
    vm: VmFd,
    memory: GuestMemory,
    doors: Vec<Door>,
}

impl Vm {
    /// A VM with the program in its memory.
    fn new(kvm: &Kvm, config: &Config<'_>) -> Result<Self, MachineError> {
        let call = |call| {
            move |error: kvm_ioctls::Error| MachineError::System { call, source: error.into() }
        };
        let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        vm.set_tss_address(TASK_PAGES).map_err(call("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(IDENTITY_MAP).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
        vm.create_pit2(timer).map_err(call("KVM_CREATE_PIT2"))?;
        let memory = GuestMemory::new(config.memory / PAGE)?;
        let doors = (0..config.vcpus).map(|_| Door::default()).collect();
        let this = Self { vm, memory, doors };
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: this.memory.bytes(),
            userspace_addr: this.memory.alias_address(),
        };
        // SAFETY: the region is the whole alias, which stays mapped as long as `this` holds the VM.
        // What the guest writes there this process reads atomically, if at all.
        unsafe { this.vm.set_user_memory_region(region) }
            .map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        this.load(config)?;
        this.tell(config)?;
        Ok(this)
    }

    /// Puts the program into memory.
    fn load(&self, config: &Config<'_>) -> Result<(), MachineError> {
        for segment in &config.image.segments {
            let (start, end) = (segment.start, segment.end);
            if start < HIGH || end > self.memory.bytes() {
                return Err(MachineError::Unsupported {
                    detail: format!(
                        "a segment at {start:#x} to {end:#x}: memory for it lies from {HIGH:#x} to \
                         {:#x}",
                        self.memory.bytes()
                    ),
                });
            }
            self.memory.store_bytes(start, &segment.bytes);
        }
        Ok(())
    }

    /// Puts down what the boot protocol tells a program: command line and memory map.
    fn tell(&self, config: &Config<'_>) -> Result<(), MachineError> {
        let mut line = config.command_line.as_bytes().to_vec();
        line.push(0);
        if line.len() > COMMAND_LINE_BYTES {
            let detail = format!("a command line of {} bytes", line.len());
            return Err(MachineError::Unsupported { detail });
        }
        self.memory.store_bytes(COMMAND_LINE, &line);
        let ranges = [(0, TOLD, RAM), (TOLD, LOW_END, RESERVED), (HIGH, self.memory.bytes(), RAM)];
        let mut map = Vec::new();
        for (start, end, kind) in ranges {
            map.extend(start.to_le_bytes());
            map.extend((end - start).to_le_bytes());
            map.extend(u64::from(kind).to_le_bytes());
        }
        self.memory.store_bytes(MEMORY_MAP, &map);
        let mut info = Vec::new();
        // Magic, version, flags, number of modules.
        [INFO_MAGIC, INFO_VERSION, 0, 0].iter().for_each(|word| info.extend(word.to_le_bytes()));
        // Modules, command line, ACPI's root pointer, memory map.
        let pointers = [0, COMMAND_LINE, ROOT_POINTER, MEMORY_MAP];
        pointers.iter().for_each(|word| info.extend(word.to_le_bytes()));
        [ranges.len() as u32, 0].iter().for_each(|word| info.extend(word.to_le_bytes()));
        self.memory.store_bytes(INFO, &info);
        self.list_cpus(config.vcpus);
        Ok(())
    }

    /// Puts down the ACPI tables that say which CPUs there are.
    fn list_cpus(&self, vcpus: u32) {
        let mut cpus = MADT::new(OEM, OEM_TABLE, 1, LocalInterruptController::Address(APIC));
        for id in 0..vcpus as u8 {
            cpus.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
        }
        let mut root = XSDT::new(OEM, OEM_TABLE, 1);
        root.add_entry(CPU_TABLE);
        let pointer = Rsdp::new(OEM, ROOT_TABLE);
        let tables: [(u64, &dyn Aml); 3] =
            [(ROOT_POINTER, &pointer), (ROOT_TABLE, &root), (CPU_TABLE, &cpus)];
        for (at, table) in tables {
            let mut bytes: Vec<u8> = Vec::new();
            table.to_aml_bytes(&mut bytes);
            self.memory.store_bytes(at, &bytes);
        }
    }

    /// vCPU `id`. The first starts at `entry`; the others wait for INIT and SIPI.
    fn vcpu(
        &self,
        id: u32,
        extension: Extension,
        cpuid: &CpuId,
        entry: u32,
    ) -> Result<VcpuFd, MachineError> {
        let call = |call| {
            move |error: kvm_ioctls::Error| MachineError::System { call, source: error.into() }
        };
        let fd = self.vm.create_vcpu(u64::from(id)).map_err(call("KVM_CREATE_VCPU"))?;
        // Before the registers and the MSR: KVM checks both against CPUID.
        fd.set_cpuid2(&numbered(cpuid, id)).map_err(call("KVM_SET_CPUID2"))?;
        if extension == Extension::Vmx {
            let index = IA32_FEATURE_CONTROL;
            let entry = kvm_msr_entry { index, data: VMX_ENABLED, ..kvm_msr_entry::default() };
            let msrs = Msrs::from_entries(&[entry]).map_err(|error| MachineError::Unsupported {
                detail: format!("a list of one MSR: {error:?}"),
            })?;
            let written = fd.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))?;
            if written != 1 {
                let detail = "KVM does not take IA32_FEATURE_CONTROL".to_owned();
                return Err(MachineError::Unsupported { detail });
            }
        }
        if id == 0 {
            self.boot_registers(&fd, entry)?;
        }
        let door = self.doors.get(id as usize);
        let door = door.ok_or_else(|| MachineError::Unsupported {
            detail: format!("vCPU {id}: there are {}", self.doors.len()),
        })?;
        door.install(&fd)?;
        Ok(fd)
    }

    /// The state that PVH promises: protected mode with flat segments, no paging, EBX at the start
    /// info.
    fn boot_registers(&self, fd: &VcpuFd, entry: u32) -> Result<(), MachineError> {
        let call = |call| {
            move |error: kvm_ioctls::Error| MachineError::System { call, source: error.into() }
        };
        let mut sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        sregs.cs = flat(CODE);
        let data = flat(DATA);
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        // Present and busy: VM entry on VMX refuses anything else.
        sregs.tr = kvm_segment {
            limit: TASK_LIMIT,
            type_: BUSY_TASK,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
        sregs.cr0 = (Cr0::CR0_PROTECTED_MODE | Cr0::CR0_EXTENSION_TYPE).bits() as u64;
        sregs.cr4 = 0;
        sregs.efer = 0;
        fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
        let mut regs = fd.get_regs().map_err(call("KVM_GET_REGS"))?;
        regs.rip = u64::from(entry);
        regs.rbx = INFO;
        regs.rflags = RFlags::FLAGS_A1.bits();
        fd.set_regs(&regs).map_err(call("KVM_SET_REGS"))
    }
}

/// Segment types: code, execute and read, accessed; data, read and write, accessed; a busy task.
const CODE: u8 = 11;
const DATA: u8 = 3;
const BUSY_TASK: u8 = 11;
const TASK_LIMIT: u32 = 0x67;

/// A 32-bit segment of 4 GiB. The selectors have no descriptors behind them: the program loads
/// its own.
fn flat(kind: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector: if kind == CODE { 0x8 } else { 0x10 },
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

/// `cpuid` as CPU `id` sees it.
fn numbered(cpuid: &CpuId, id: u32) -> CpuId {
    let mut cpuid = cpuid.clone();
    for leaf in cpuid.as_mut_slice() {
        if leaf.function == FEATURES {
            leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24;
        } else if TOPOLOGIES.contains(&leaf.function) {
            leaf.edx = id;
        }
    }
    cpuid
}
