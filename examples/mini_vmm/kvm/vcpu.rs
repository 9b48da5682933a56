//! One virtual CPU: its registers, and what its exits mean.
//!
//! Registers travel in the page shared with KVM (KVM_CAP_SYNC_REGS): an exit costs one system
//! call, KVM_RUN, and nothing is ever fetched or set by a call of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, ThreadId};

use kvm_bindings::{CpuId, kvm_dtable, kvm_segment};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use x86::bits64::rflags::RFlags;
use x86::controlregs::{Cr0, Cr4};
use x86::irq::{EXCEPTIONS, PAGE_FAULT_VECTOR, PageFaultError};

use super::super::machine::{Command, Exit, MachineError, PAGE, Registers, Report, Vcpu};
use super::autopsy::{self, LastSeen};
use super::door::{self, Door, Enter, Leave, Return};
use super::flush::HostPaging;
use super::stub::{self, PORT_DONE, PORT_EXCEPTION, Segment};
use super::{Shared, kvm_error};

// EFER: long mode enable, long mode active, no-execute enable.
const EFER: u64 = (1 << 8) | (1 << 10) | (1 << 11);

/// A vCPU of [`KvmMachine`](super::KvmMachine).
#[derive(Debug)]
pub(super) struct KvmVcpu {
    shared: Arc<Shared>,
    id: u32,
    fd: VcpuFd,
    /// Root page, once there is one.
    root: Option<u64>,
    /// A command was given and is not done.
    busy: bool,
    /// The thread that ran it last: a new one may have our signal blocked.
    thread: Option<ThreadId>,
}

/// What KVM_RUN said, with nothing borrowed.
pub(super) enum Outcome {
    /// An `out` to this port.
    Port(u16),
    /// It was interrupted.
    Interrupted,
    /// In words.
    Other(String),
}

impl KvmVcpu {
    pub(super) fn new(shared: Arc<Shared>, id: u32, cpuid: &CpuId) -> Result<Self, MachineError> {
        let fd = shared.vm.create_vcpu(u64::from(id)).map_err(kvm_error("KVM_CREATE_VCPU"))?;
        // Before the registers: KVM checks EFER against CPUID.
        fd.set_cpuid2(cpuid).map_err(kvm_error("KVM_SET_CPUID2"))?;
        let mut vcpu = Self { shared, id, fd, root: None, busy: false, thread: None };
        vcpu.set_registers()?;
        vcpu.door()?.install(&vcpu.fd)?;
        Ok(vcpu)
    }

    fn door(&self) -> Result<&Door, MachineError> {
        let door = self.shared.doors.get(self.id as usize);
        door.ok_or_else(|| MachineError::Unsupported {
            detail: format!("vCPU {}: there are {}", self.id, self.shared.doors.len()),
        })
    }

    /// Long mode, CPL 3, at the start of the program; all but CR3.
    fn set_registers(&mut self) -> Result<(), MachineError> {
        let mut sregs = self.fd.get_sregs().map_err(kvm_error("KVM_GET_SREGS"))?;
        let cr0 = Cr0::CR0_ENABLE_PAGING
            | Cr0::CR0_PROTECTED_MODE
            | Cr0::CR0_WRITE_PROTECT
            | Cr0::CR0_NUMERIC_ERROR
            | Cr0::CR0_EXTENSION_TYPE;
        sregs.cr0 = cr0.bits() as u64;
        sregs.cr4 = Cr4::CR4_ENABLE_PAE.bits() as u64;
        sregs.efer = EFER;
        sregs.cs = segment(&stub::USER_CODE);
        let data = segment(&stub::USER_DATA);
        (sregs.ss, sregs.ds, sregs.es) = (data, data, data);
        (sregs.fs, sregs.gs) = (data, data);
        sregs.tr = kvm_segment {
            base: stub::task(self.id),
            limit: stub::TASK_LIMIT,
            selector: stub::TASK.bits(),
            type_: stub::TASK_KIND,
            present: 1,
            ..kvm_segment::default()
        };
        sregs.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
        sregs.gdt = table(stub::GDT_REGISTER);
        sregs.idt = table(stub::IDT_REGISTER);
        let state = self.fd.sync_regs_mut();
        state.sregs = sregs;
        state.regs.rip = stub::entry();
        state.regs.r15 = stub::mailbox(self.id);
        // IOPL 3 for ports: see `stub.rs`.
        state.regs.rflags = (RFlags::FLAGS_A1 | RFlags::FLAGS_IOPL3).bits();
        for registers in [SyncReg::Register, SyncReg::SystemRegister] {
            self.fd.set_sync_dirty_reg(registers);
            self.fd.set_sync_valid_reg(registers);
        }
        Ok(())
    }

    /// One KVM_RUN.
    fn enter_guest(&mut self) -> Outcome {
        let state = self.fd.sync_regs_mut();
        let (rip, rsp, cr2) = (state.regs.rip, state.regs.rsp, state.sregs.cr2);
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, _)) => return Outcome::Port(port),
            Ok(VcpuExit::Shutdown) => {}
            Ok(exit) => return Outcome::Other(format!("{exit:?}")),
            Err(error) if error.errno() == libc::EINTR => return Outcome::Interrupted,
            Err(error) => return Outcome::Other(format!("KVM_RUN: {error}")),
        }
        Outcome::Other(self.triple_fault(&LastSeen { rip, rsp, cr2 }))
    }

    /// All that is known of a triple fault.
    fn triple_fault(&self, last: &LastSeen) -> String {
        let events = match self.fd.get_vcpu_events() {
            Ok(events) => autopsy::events(&events),
            Err(error) => format!("KVM_GET_VCPU_EVENTS: {error}"),
        };
        let mut text = format!(
            "triple fault; do the tables map the pinned pages, writable and executable? {events}; \
             {last}"
        );
        if let Some(root) = self.root {
            let walks = autopsy::walks(&self.shared.memory, root, self.id, last);
            text.push_str(&format!("; {walks}; KVM's registers, perhaps reset"));
        }
        text
    }

    /// One KVM_RUN, when the door lets us; for who takes no notice of kicks.
    pub(super) fn run_once(&mut self) -> Result<Outcome, MachineError> {
        self.unblock()?;
        if self.door()?.enter() == Enter::Kicked {
            return Ok(Outcome::Interrupted);
        }
        let outcome = self.enter_guest();
        let how = match outcome {
            Outcome::Interrupted => Return::Interrupted,
            Outcome::Port(_) | Outcome::Other(_) => Return::Exit,
        };
        let _ = self.door()?.leave(how);
        Ok(outcome)
    }

    /// Begin with these registers, at CPL 3; it has not run.
    pub(super) fn begin_with(&mut self, registers: &Registers) {
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] =
            registers.general;
        let (rip, rflags) = (registers.rip, registers.rflags | RFlags::FLAGS_A1.bits());
        let regs = &mut self.fd.sync_regs_mut().regs;
        (regs.rax, regs.rcx, regs.rdx, regs.rbx) = (rax, rcx, rdx, rbx);
        (regs.rsp, regs.rbp, regs.rsi, regs.rdi) = (rsp, rbp, rsi, rdi);
        (regs.r8, regs.r9, regs.r10, regs.r11) = (r8, r9, r10, r11);
        (regs.r12, regs.r13, regs.r14, regs.r15) = (r12, r13, r14, r15);
        (regs.rip, regs.rflags) = (rip, rflags);
        self.fd.set_sync_dirty_reg(SyncReg::Register);
    }

    /// Where the last page fault was, and the stack pointer.
    pub(super) fn cr2_and_rsp(&mut self) -> (u64, u64) {
        let state = self.fd.sync_regs_mut();
        (state.sregs.cr2, state.regs.rsp)
    }

    /// A new thread may have our signal blocked.
    fn unblock(&mut self) -> Result<(), MachineError> {
        let thread = thread::current().id();
        if self.thread != Some(thread) {
            door::unblock_signal()?;
            self.thread = Some(thread);
        }
        Ok(())
    }

    /// The meaning of an `out`.
    fn port_exit(&mut self, port: u16) -> Result<Exit, MachineError> {
        let state = self.fd.sync_regs_mut();
        if port == PORT_DONE {
            self.busy = false;
            return Ok(Exit::Done(Report {
                pages: state.regs.r9,
                mismatches: state.regs.r10,
                first_mismatch: state.regs.r11,
            }));
        }
        let vector = port.wrapping_sub(PORT_EXCEPTION);
        if vector >= stub::VECTORS {
            return Err(self.unexpected(&format!("an `out` to port {port:#x}")));
        }
        let (gva, rsp) = (state.sregs.cr2, state.regs.rsp);
        if vector == u16::from(PAGE_FAULT_VECTOR) {
            let frame = stub::stack_top(self.id) - stub::FAULT_FRAME;
            // ORDERING[kvm-stub]: Relaxed. Written by this vCPU before the exit to this thread.
            let word = (self.shared.memory.word(frame)).load(Ordering::Relaxed);
            let error = PageFaultError::from_bits_truncate(word as u32);
            // A fault of the handlers themselves has another frame, or no U in its error code.
            if rsp == frame && error.contains(PageFaultError::US) {
                let error = word as u32;
                return Ok(Exit::Fault { gva, error });
            }
        }
        let name = EXCEPTIONS.get(usize::from(vector)).map(|one| one.mnemonic);
        let name = name.unwrap_or("reserved");
        Err(self.unexpected(&format!("exception {vector} ({name})")))
    }

    pub(super) fn unexpected(&mut self, what: &str) -> MachineError {
        let state = self.fd.sync_regs_mut();
        let (regs, sregs) = (&state.regs, &state.sregs);
        let mut detail = format!(
            "{what}; cs {:#x} rip {:#x} rsp {:#x} rflags {:#x} cr2 {:#x} cr3 {:#x} rax {:#x} \
             rdi {:#x} rsi {:#x} r9 {:#x}",
            sregs.cs.selector,
            regs.rip,
            regs.rsp,
            regs.rflags,
            sregs.cr2,
            sregs.cr3,
            regs.rax,
            regs.rdi,
            regs.rsi,
            regs.r9,
        );
        let stack = stub::task(self.id)..stub::stack_top(self.id);
        if stack.contains(&regs.rsp) && regs.rsp % 8 == 0 {
            detail.push_str("; stack");
            for at in (regs.rsp..stack.end).step_by(8) {
                // ORDERING[kvm-stub]: Relaxed. As for the error code.
                let word = self.shared.memory.word(at);
                let word = word.load(Ordering::Relaxed);
                detail.push_str(&format!(" {word:#x}"));
            }
        }
        MachineError::UnexpectedExit { vcpu: self.id, detail }
    }
}

impl Vcpu for KvmVcpu {
    fn start(&mut self, command: &Command) -> Result<(), MachineError> {
        if self.busy {
            return Err(MachineError::Unsupported {
                detail: format!("vCPU {}: a second command before the first is done", self.id),
            });
        }
        let stub_pages = stub::pages(self.shared.vcpus());
        stub::post(&self.shared.memory, self.id, stub_pages, command)?;
        self.busy = true;
        Ok(())
    }

    fn set_root(&mut self, root: u64) -> Result<(), MachineError> {
        if root >= self.shared.memory.bytes() / PAGE {
            return Err(MachineError::Unsupported {
                detail: format!("a root at page {root:#x}, beyond the memory"),
            });
        }
        // Loading CR3 flushes nothing if KVM shadows, nor if it does not change. A vCPU that had no
        // root has cached nothing.
        let unflushed = match self.root {
            None => false,
            Some(old) => old == root || self.shared.paging == HostPaging::Shadowing,
        };
        if unflushed {
            self.shared.structural_flush()?;
        }
        // The rest of the system registers is what the last exit delivered.
        self.fd.sync_regs_mut().sregs.cr3 = root * PAGE;
        self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
        self.root = Some(root);
        Ok(())
    }

    fn run(&mut self) -> Result<Exit, MachineError> {
        if !self.busy || self.root.is_none() {
            return Err(MachineError::Unsupported {
                detail: format!("vCPU {}: run without a command and a root", self.id),
            });
        }
        self.unblock()?;
        loop {
            if self.door()?.enter() == Enter::Kicked {
                return Ok(Exit::Kicked);
            }
            let outcome = self.enter_guest();
            let how = match outcome {
                Outcome::Interrupted => Return::Interrupted,
                Outcome::Port(_) | Outcome::Other(_) => Return::Exit,
            };
            let left = self.door()?.leave(how);
            match outcome {
                // What the guest asked for comes first; the kick has been answered by returning.
                Outcome::Port(port) => return self.port_exit(port),
                Outcome::Other(what) => return Err(self.unexpected(&what)),
                Outcome::Interrupted if left == Leave::Kicked => return Ok(Exit::Kicked),
                Outcome::Interrupted => {}
            }
        }
    }
}

fn segment(segment: &Segment) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: segment.selector.bits(),
        type_: segment.kind,
        present: 1,
        dpl: segment.ring as u8,
        db: u8::from(!segment.long),
        s: 1,
        l: u8::from(segment.long),
        g: 1,
        ..kvm_segment::default()
    }
}

fn table((base, limit): (u64, u16)) -> kvm_dtable {
    kvm_dtable { base, limit, ..kvm_dtable::default() }
}
