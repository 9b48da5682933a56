//! Segments, task state and interrupt handlers of the host.
//!
//! One GDT for all CPUs, with a TSS for each, whose selector is the CPU's number in disguise. Every
//! handler runs on a stack of its own kind and CPU. An exception of the host ends the run with a
//! message; the doorbell counts and returns.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use x86::bits64::task::TaskStateSegment;
use x86::dtables::{DescriptorTablePointer, lgdt, lidt};

use super::apic;
use super::cpu::{self, MAX_CPUS};
use super::exit::{Status, exit};
use super::serial;

/// Selectors of the host, as the boot code's table has them.
pub const CODE: u16 = 8;
/// Of CPU 0's TSS; the others follow, 16 bytes each.
const FIRST_TASK: u16 = 32;
/// Entries of the GDT.
const ENTRIES: usize = FIRST_TASK as usize / 8 + 2 * MAX_CPUS;
/// Bytes of a handler's stack.
const STACK: usize = 16 << 10;
/// Vectors of exceptions.
const EXCEPTIONS: usize = 32;
/// Distance between the stubs of two exceptions.
const STUB: usize = 16;

global_asm!(
    r#"
    .pushsection .text
    .balign 16
    .globl exception_stubs
exception_stubs:
    .irp base,0,8,16,24
    .irp offset,0,1,2,3,4,5,6,7
    .balign {stub}
    # 8, 10 to 14, 17, 21, 29 and 30 push an error code.
    .if ((0x60227d00 >> (\base + \offset)) & 1) == 0
    pushq $0
    .endif
    pushq $\base + \offset
    jmp exception_common
    .endr
    .endr
exception_common:
    movq %rsp, %rdi
    andq $-16, %rsp
    call {exception}
    ud2

    .balign 16
    .globl doorbell_stub
doorbell_stub:
    pushq %rax
    lock incq {doorbells}(%rip)
    movl ${eoi}, %eax
    movl $0, (%rax)
    popq %rax
    iretq
    .globl spurious_stub
spurious_stub:
    iretq
    .popsection
    "#,
    stub = const STUB,
    exception = sym exception,
    doorbells = sym DOORBELLS,
    eoi = const apic::BASE as u32 + apic::EOI,
    options(att_syntax)
);

unsafe extern "C" {
    safe static exception_stubs: u8;
    safe static doorbell_stub: u8;
    safe static spurious_stub: u8;
}

static DOORBELLS: AtomicU64 = AtomicU64::new(0);

/// Doorbells taken so far, by all CPUs.
pub fn doorbells() -> u64 {
    DOORBELLS.load(Ordering::Acquire)
}

/// What the stubs leave on the stack.
#[repr(C)]
struct Frame {
    vector: u64,
    code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

extern "C" fn exception(frame: &Frame) -> ! {
    let Frame { vector, code, rip, rsp, .. } = *frame;
    // SAFETY: reads a register.
    let cr2 = unsafe { x86::controlregs::cr2() };
    serial::print_anyway(format_args!(
        "\npanic: exception {vector} code {code:#x} on CPU {} at {rip:#x}, rsp {rsp:#x}, \
         cr2 {cr2:#x}\n",
        cpu::current()
    ));
    exit(Status::Failed)
}

/// Everything that descriptors need and CPUs read.
#[repr(C, align(64))]
struct Tables {
    gdt: [u64; ENTRIES],
    idt: [[u64; 2]; 256],
    tasks: [TaskStateSegment; MAX_CPUS],
}

struct Shared(UnsafeCell<Tables>);

// SAFETY: Rust code touches it in `begin` alone: CPU 0 before any other CPU runs, then each CPU
// its own TSS and that TSS's descriptor.
unsafe impl Sync for Shared {}

static TABLES: Shared = Shared(UnsafeCell::new(Tables {
    gdt: [0; ENTRIES],
    idt: [[0; 2]; 256],
    tasks: [const { TaskStateSegment::new() }; MAX_CPUS],
}));

/// Handlers' stacks: for the doorbell and for exceptions, of each CPU.
#[repr(align(16))]
struct Stacks(#[allow(dead_code)] UnsafeCell<[[[u8; STACK]; 2]; MAX_CPUS]>);

// SAFETY: never touched by Rust code as such; each stack is used by one CPU's handlers.
unsafe impl Sync for Stacks {}

static STACKS: Stacks = Stacks(UnsafeCell::new([[[0; STACK]; 2]; MAX_CPUS]));

/// A 64-bit interrupt gate on stack `ist` of the TSS.
fn gate(handler: u64, ist: u64) -> [u64; 2] {
    let low = (handler & 0xffff) | u64::from(CODE) << 16 | ist << 32 | 0x8e << 40;
    [low | (handler >> 16 & 0xffff) << 48, handler >> 32]
}

fn fill_idt(idt: &mut [[u64; 2]; 256]) {
    let stubs = &raw const exception_stubs as u64;
    for (vector, entry) in idt.iter_mut().enumerate().take(EXCEPTIONS) {
        *entry = gate(stubs + (vector * STUB) as u64, 2);
    }
    idt[apic::DOORBELL as usize] = gate(&raw const doorbell_stub as u64, 1);
    idt[apic::SPURIOUS as usize] = gate(&raw const spurious_stub as u64, 1);
}

/// Load this CPU's, number `number`.
pub fn begin(number: usize) {
    let tables = TABLES.0.get();
    // SAFETY: `Shared`'s rule: the parts that this call touches are touched by no other CPU now.
    let Tables { gdt, idt, tasks } = unsafe { &mut *tables };
    if number == 0 {
        gdt[1] = 0x00af_9b00_0000_ffff;
        gdt[2] = 0x00cf_9300_0000_ffff;
        // 32-bit code, for `paging.rs`.
        gdt[3] = 0x00cf_9b00_0000_ffff;
        fill_idt(idt);
    }
    let top = STACKS.0.get() as u64 + (number * 2 * STACK) as u64;
    tasks[number].ist[0] = top + STACK as u64;
    tasks[number].ist[1] = top + 2 * STACK as u64;
    let base = &raw const tasks[number] as u64;
    let limit = size_of::<TaskStateSegment>() as u64 - 1;
    let at = FIRST_TASK as usize / 8 + 2 * number;
    gdt[at] = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    gdt[at + 1] = base >> 32;
    // SAFETY: a table that lives for good, with the segments in use at the places in use.
    unsafe { lgdt(&DescriptorTablePointer::new(gdt)) };
    // SAFETY: a table that lives for good; its handlers are those above.
    unsafe { lidt(&DescriptorTablePointer::new(idt)) };
    let selector = FIRST_TASK + 16 * number as u16;
    // SAFETY: the selector of an available TSS that lives for good.
    unsafe { asm!("ltr {:x}", in(reg) selector, options(nostack, preserves_flags)) };
}

/// Number of the CPU whose task register holds `selector`.
pub fn number_of(selector: u16) -> usize {
    usize::from(selector.saturating_sub(FIRST_TASK)) / 16
}
