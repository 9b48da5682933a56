//! Handlers for a guest whose every exception is the VMM's: they save the registers in memory,
//! leave, and take them up again.
//!
//! So the VMM may change any register between two runs: it never depends on how KVM finishes an
//! `out`. Handlers are the same for page faults, general protection faults and invalid opcodes;
//! what is left is the stub's business still.

use core::arch::global_asm;
use std::sync::atomic::Ordering;

use super::super::machine::{MachineError, PAGE, RSP, Registers};
use super::memory::GuestMemory;
use super::stub;

/// `out` to this port: an exception, and the frame is in memory.
pub(super) const PORT_TRAP: u16 = 0x41;

/// Where the code stands: behind the stub's, in the same page.
const CODE: u64 = PAGE + TRAPS;
const TRAPS: u64 = PAGE / 2;

/// Order of the general registers in the frame, lowest address first, by their numbers.
const SAVED: [usize; 15] = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
/// Behind them: vector, error code, rip, cs, rflags, rsp, ss.
const VECTOR: u64 = 15 * 8;
const ERROR: u64 = 16 * 8;
const RIP: u64 = 17 * 8;
const RFLAGS: u64 = 19 * 8;
const STACK: u64 = 20 * 8;
/// Bytes of a frame.
const FRAME: u64 = 22 * 8;

global_asm!(
    ".pushsection .rodata.mini_vmm_traps, \"a\", @progbits",
    ".balign 16",
    ".globl mini_vmm_traps_start",
    "mini_vmm_traps_start:",
    ".globl mini_vmm_trap_invalid",
    "mini_vmm_trap_invalid:",
    "    push 0",
    "    push {invalid}",
    "    jmp 2f",
    ".globl mini_vmm_trap_protection",
    "mini_vmm_trap_protection:",
    "    push {protection}",
    "    jmp 2f",
    ".globl mini_vmm_trap_fault",
    "mini_vmm_trap_fault:",
    "    push {fault}",
    "2:  push r15",
    "    push r14",
    "    push r13",
    "    push r12",
    "    push r11",
    "    push r10",
    "    push r9",
    "    push r8",
    "    push rdi",
    "    push rsi",
    "    push rbp",
    "    push rbx",
    "    push rdx",
    "    push rcx",
    "    push rax",
    "    out {port}, al",
    "    pop rax",
    "    pop rcx",
    "    pop rdx",
    "    pop rbx",
    "    pop rbp",
    "    pop rsi",
    "    pop rdi",
    "    pop r8",
    "    pop r9",
    "    pop r10",
    "    pop r11",
    "    pop r12",
    "    pop r13",
    "    pop r14",
    "    pop r15",
    "    add rsp, 16",
    "    iretq",
    ".globl mini_vmm_traps_end",
    "mini_vmm_traps_end:",
    ".popsection",
    port = const PORT_TRAP,
    invalid = const x86::irq::INVALID_OPCODE_VECTOR,
    protection = const x86::irq::GENERAL_PROTECTION_FAULT_VECTOR,
    fault = const x86::irq::PAGE_FAULT_VECTOR,
);

unsafe extern "C" {
    static mini_vmm_traps_start: u8;
    static mini_vmm_trap_invalid: u8;
    static mini_vmm_trap_protection: u8;
    static mini_vmm_trap_fault: u8;
    static mini_vmm_traps_end: u8;
}

/// Distance of `symbol` from the start.
fn offset(symbol: *const u8) -> u64 {
    symbol as u64 - (&raw const mini_vmm_traps_start) as u64
}

fn code() -> &'static [u8] {
    let start = &raw const mini_vmm_traps_start;
    let len = offset(&raw const mini_vmm_traps_end);
    // SAFETY: the two symbols are the ends of one block of bytes in this program's read-only data
    // (the assembly above).
    unsafe { core::slice::from_raw_parts(start, len as usize) }
}

/// Puts the handlers in. Before any vCPU runs.
///
/// # Errors
/// `Unsupported` if they do not fit behind the stub.
pub(super) fn install(memory: &GuestMemory) -> Result<(), MachineError> {
    let (stub, traps) = (stub::code_bytes(), code());
    if stub > TRAPS || traps.len() as u64 > PAGE - TRAPS {
        return Err(MachineError::Unsupported {
            detail: format!("a stub of {stub} bytes and {} more in one page", traps.len()),
        });
    }
    memory.store_bytes(CODE, traps);
    let handlers = [
        (x86::irq::INVALID_OPCODE_VECTOR, &raw const mini_vmm_trap_invalid),
        (x86::irq::GENERAL_PROTECTION_FAULT_VECTOR, &raw const mini_vmm_trap_protection),
        (x86::irq::PAGE_FAULT_VECTOR, &raw const mini_vmm_trap_fault),
    ];
    for (vector, handler) in handlers {
        stub::set_handler(memory, vector, CODE + offset(handler));
    }
    Ok(())
}

/// A frame of vCPU `vcpu`, which left by [`PORT_TRAP`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame<'a> {
    memory: &'a GuestMemory,
    at: u64,
}

impl<'a> Frame<'a> {
    /// Where the frame is.
    pub(super) fn new(memory: &'a GuestMemory, vcpu: u32) -> Self {
        Self { memory, at: stub::stack_top(vcpu) - FRAME }
    }

    /// Its address, which rsp is at the `out`. Else a handler had a fault itself.
    pub(super) fn address(&self) -> u64 {
        self.at
    }

    fn word(&self, offset: u64) -> u64 {
        // ORDERING[kvm-stub]: Relaxed. Written by the vCPU before the exit to this thread.
        self.memory.word(self.at + offset).load(Ordering::Relaxed)
    }

    fn set(&self, offset: u64, value: u64) {
        // ORDERING[kvm-stub]: Relaxed. Read by the vCPU when this thread has entered KVM_RUN.
        self.memory.word(self.at + offset).store(value, Ordering::Relaxed);
    }

    /// Vector and error code.
    pub(super) fn exception(&self) -> (u64, u32) {
        (self.word(VECTOR), self.word(ERROR) as u32)
    }

    /// The guest's registers.
    pub(super) fn load(&self) -> Registers {
        let mut general = [0; 16];
        for (at, index) in (0..).step_by(8).zip(SAVED) {
            general[index] = self.word(at);
        }
        general[RSP] = self.word(STACK);
        Registers { general, rip: self.word(RIP), rflags: self.word(RFLAGS) }
    }

    /// The registers that the guest goes on with.
    pub(super) fn store(&self, registers: &Registers) {
        for (at, index) in (0..).step_by(8).zip(SAVED) {
            self.set(at, registers.general[index]);
        }
        self.set(STACK, registers.general[RSP]);
        self.set(RIP, registers.rip);
        self.set(RFLAGS, registers.rflags);
    }
}
