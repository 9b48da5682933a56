//! What stands in the stub pages: descriptor tables, exception handlers, the guest program, and one
//! page for each vCPU.
//!
//! | physical page | holds |
//! |---|---|
//! | 0 | GDT, IDT |
//! | 1 | code: page fault handler, the other handlers, the guest program |
//! | 2 + n | vCPU n: mailbox (the command), TSS, kernel stack |
//!
//! The linear page of each is its physical page: far below the guest's data (4 GiB and up), and in
//! PML4 slot 0. Handlers run at CPL 0, which some hosts emulate instruction by instruction: they
//! are as short as they can be and leave all the work to the VMM. The program runs at CPL 3. It too
//! talks to the VMM by `out`, which the TSS's I/O permission bitmap allows, and IOPL 3 as well. One
//! of the two would do on a processor, but a host that runs CPL 3 code natively in its own user
//! mode loses IOPL on the way, and QEMU 7.2 takes no bitmap from a TSS that is busy.
//!
//! The program takes its parameters from the mailbox, not from registers: after an `out` exit KVM
//! finishes the instruction at the next entry, and registers set in between depend on how it does
//! that. The report is in registers, which every exit delivers.

use core::arch::global_asm;
use core::mem::{offset_of, size_of};
use std::sync::atomic::Ordering;

use x86::Ring;
use x86::bits64::task::TaskStateSegment;
use x86::segmentation::{
    BuildDescriptor, CodeSegmentType, DataSegmentType, Descriptor, DescriptorBuilder,
    SegmentDescriptorBuilder, SegmentSelector, SystemDescriptorTypes64,
};

use super::super::machine::{Command, FACTOR, MachineError, Op, PAGE};
use super::memory::GuestMemory;

/// `out` to this port: the program finished its command.
pub(super) const PORT_DONE: u16 = 0x40;
/// `out` to this port plus n: exception n. The port tells the vector, so that handlers change no
/// register.
pub(super) const PORT_EXCEPTION: u16 = 0x80;
/// Number of exception vectors.
pub(super) const VECTORS: u16 = 32;
/// What a fault from CPL 3 pushes: SS, RSP, RFLAGS, CS, RIP, error code.
pub(super) const FAULT_FRAME: u64 = 6 * 8;

const GDT: u64 = 0;
const IDT: u64 = 0x100;
const CODE: u64 = PAGE;
const FIRST_VCPU_PAGE: u64 = 2;
/// Offset of the TSS in a vCPU's page; the mailbox is at 0, the stack comes down from the end.
const TSS: u64 = 0x400;
/// Bytes from one handler to the next.
const HANDLER_SIZE: u64 = 16;

// Words of the mailbox, as byte offsets.
const OP: u64 = 0;
const START: u64 = 8;
const PAGES: u64 = 16;
const STRIDE: u64 = 24;
const TAG: u64 = 32;
const ROUNDS: u64 = 40;
const MASK: u64 = 48;
const WRITTEN: u64 = 56;
const DELAY: u64 = 64;

// Numbers by which the program knows the operations.
const WRITE: u64 = 0;
const READ: u64 = 1;
const VERIFY: u64 = 2;
const INCREMENT: u64 = 3;
const CHURN: u64 = 4;

// Position independent: the bytes are copied to guest memory and never run here. Registers of the
// program:
//   r15 its mailbox (set once, at creation)      r9  pages visited
//   rdi address of the page, rsi pages left      r10 mismatches
//   rbx first page, r12 pages, r13 stride        r11 first mismatch
//   r14 tag, rbp rounds left, r8 operation       rax expected word, rcx factor, rdx scratch
// Churn: rdx step, rdi other page's number, then its address, r12 other pages, r13 multiplier, r14
// offset, rbp step to end at, rsi mask of a round, rax and r8 scratch. All but these parameters is
// in the guest's memory, so the program may be stopped, or done elsewhere, at any point.
global_asm!(
    ".pushsection .rodata.mini_vmm_stub, \"a\", @progbits",
    ".balign 16",
    ".globl mini_vmm_stub_start",
    "mini_vmm_stub_start:",
    // A page fault: tell the VMM, which finds CR2 and the error code by itself; then drop the error
    // code and try the access again.
    "    out {page_fault}, al",
    "    add rsp, 8",
    "    iretq",
    // All other exceptions: tell the VMM, for good.
    ".globl mini_vmm_stub_handlers",
    ".balign {handler_size}",
    "mini_vmm_stub_handlers:",
    ".set .Lmini_vmm_vector, 0",
    ".rept {vectors}",
    "    .balign {handler_size}",
    "    .byte 0xe6, {exception} + .Lmini_vmm_vector", // out imm8, al
    "    hlt",
    "    .set .Lmini_vmm_vector, .Lmini_vmm_vector + 1",
    ".endr",
    ".globl mini_vmm_stub_program",
    ".balign 64",
    "mini_vmm_stub_program:",
    "    mov r8, [r15 + {op}]",
    "    mov rbx, [r15 + {start}]",
    "    mov r12, [r15 + {pages}]",
    "    mov r13, [r15 + {stride}]",
    "    mov r14, [r15 + {tag}]",
    "    mov rbp, [r15 + {rounds}]",
    "    movabs rcx, {factor}",
    "    xor r9d, r9d",
    "    xor r10d, r10d",
    "    xor r11d, r11d",
    "    cmp r8d, {churn}",
    "    je .Lmini_vmm_churn",
    "2:  mov rdi, rbx", // a round
    "    mov rsi, r12",
    "    test rsi, rsi",
    "    jz 9f",
    "3:  cmp r8d, {read}", // a page
    "    je 5f",
    "    mov rax, rdi",
    "    xor rax, r14",
    "    imul rax, rcx",
    "    cmp r8d, {verify}",
    "    je 6f",
    "    ja 7f",
    "    mov [rdi], rax", // write
    "    mov [rdi + 2048], rax",
    "    jmp 8f",
    "5:  mov rdx, [rdi]", // read
    "    jmp 8f",
    "6:  cmp [rdi], rax", // verify
    "    jne 4f",
    "    cmp [rdi + 2048], rax",
    "    je 8f",
    "4:  test r10, r10", // a mismatch
    "    cmovz r11, rdi",
    "    inc r10",
    "    jmp 8f",
    "7:  mov rdx, [rdi + 8]", // increment
    "    inc rdx",
    "    mov [rdi + 8], rdx",
    "8:  inc r9", // next page
    "    add rdi, r13",
    "    dec rsi",
    "    jnz 3b",
    "9:  dec rbp", // next round
    "    jnz 2b",
    "9:  out {done}, al",
    "    jmp mini_vmm_stub_program", // the next command is in the mailbox
    ".Lmini_vmm_churn:",
    "    mov rsi, [r15 + {mask}]",
    "2:  mov rdx, [rbx]", // a step
    "    cmp rdx, rbp",
    "    jae 9b",
    "    mov rdi, rdx",
    "    imul rdi, r13",
    "    add rdi, r14",
    "    and rdi, rsi",
    "    cmp rdi, r12",
    "    jae 5f",
    "    mov rax, rdi",
    "    imul rax, rcx",
    "    shr rax, 57",
    "    inc rdi",
    "    shl rdi, 12",
    "    add rdi, rbx",
    "    cmp rax, [r15 + {written}]",
    "    jae 4f",
    "    mov rax, rdx",
    "    rol rax, 32",
    "    xor rax, rdi",
    "    imul rax, rcx",
    "    mov [rdi], rdx", // write
    "    mov [rdi + 2048], rax",
    "    jmp 5f",
    "4:  mov rax, [rdi]", // read
    "5:  inc r9", // next step
    "    inc rdx",
    "    mov [rbx], rdx",
    "    mov r8, [r15 + {delay}]",
    "6:  sub r8, 1",
    "    jnc 6b",
    "    jmp 2b",
    ".globl mini_vmm_stub_end",
    "mini_vmm_stub_end:",
    ".popsection",
    page_fault = const PORT_EXCEPTION + x86::irq::PAGE_FAULT_VECTOR as u16,
    exception = const PORT_EXCEPTION,
    done = const PORT_DONE,
    vectors = const VECTORS,
    handler_size = const HANDLER_SIZE,
    op = const OP,
    start = const START,
    pages = const PAGES,
    stride = const STRIDE,
    tag = const TAG,
    rounds = const ROUNDS,
    mask = const MASK,
    written = const WRITTEN,
    delay = const DELAY,
    churn = const CHURN,
    read = const READ,
    verify = const VERIFY,
    factor = const FACTOR,
);

unsafe extern "C" {
    static mini_vmm_stub_start: u8;
    static mini_vmm_stub_handlers: u8;
    static mini_vmm_stub_program: u8;
    static mini_vmm_stub_end: u8;
}

/// The assembled code, with the addresses it has in the guest.
fn code() -> &'static [u8] {
    let start = &raw const mini_vmm_stub_start;
    let len = guest_address(&raw const mini_vmm_stub_end) - CODE;
    // SAFETY: the two symbols are the ends of one block of bytes in this program's read-only data
    // (the assembly above).
    unsafe { core::slice::from_raw_parts(start, len as usize) }
}

/// Where in the guest the code at `symbol` stands.
fn guest_address(symbol: *const u8) -> u64 {
    CODE + (symbol as u64 - (&raw const mini_vmm_stub_start) as u64)
}

/// A segment as both the GDT and KVM's register files want it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) selector: SegmentSelector,
    pub(super) ring: Ring,
    /// Type field of the descriptor.
    pub(super) kind: u8,
    /// 64-bit code.
    pub(super) long: bool,
}

const KERNEL_CODE: SegmentSelector = SegmentSelector::new(1, Ring::Ring0);

/// The program's code segment.
pub(super) const USER_CODE: Segment = Segment {
    selector: SegmentSelector::new(4, Ring::Ring3),
    ring: Ring::Ring3,
    kind: CodeSegmentType::ExecuteReadAccessed as u8,
    long: true,
};
/// The program's data segment.
pub(super) const USER_DATA: Segment = Segment {
    selector: SegmentSelector::new(3, Ring::Ring3),
    ring: Ring::Ring3,
    kind: DataSegmentType::ReadWriteAccessed as u8,
    long: false,
};
/// Selector and type of the TSS. Nothing ever reloads TR, so the GDT has no descriptor for it.
pub(super) const TASK: SegmentSelector = SegmentSelector::new(5, Ring::Ring0);
/// Type of the loaded TSS.
pub(super) const TASK_KIND: u8 = SystemDescriptorTypes64::TssBusy as u8;
/// Bytes of the I/O permission bitmap, which follows the TSS: ports below 0x100, all allowed (0),
/// and the byte of ones that must end it.
const BITMAP: u64 = 0x100 / 8 + 1;
/// Limit of the TSS, with its bitmap.
pub(super) const TASK_LIMIT: u32 = size_of::<TaskStateSegment>() as u32 + BITMAP as u32 - 1;

/// Base and limit of the GDT.
pub(super) const GDT_REGISTER: (u64, u16) = (GDT, 5 * 8 - 1);
/// Base and limit of the IDT.
pub(super) const IDT_REGISTER: (u64, u16) = (IDT, VECTORS * 16 - 1);

/// Pages the stub takes, with `vcpus` vCPUs.
pub(super) const fn pages(vcpus: u32) -> u64 {
    FIRST_VCPU_PAGE + vcpus as u64
}

/// Where the program starts.
pub(super) fn entry() -> u64 {
    guest_address(&raw const mini_vmm_stub_program)
}

/// A vCPU's mailbox.
pub(super) const fn mailbox(vcpu: u32) -> u64 {
    (FIRST_VCPU_PAGE + vcpu as u64) * PAGE
}

/// A vCPU's TSS.
pub(super) const fn task(vcpu: u32) -> u64 {
    mailbox(vcpu) + TSS
}

/// Top of a vCPU's kernel stack.
pub(super) const fn stack_top(vcpu: u32) -> u64 {
    mailbox(vcpu) + PAGE
}

fn segment(builder: DescriptorBuilder, ring: Ring) -> DescriptorBuilder {
    builder.present().dpl(ring).limit_granularity_4kb()
}

fn code_segment(ring: Ring) -> u64 {
    let kind = CodeSegmentType::ExecuteReadAccessed;
    let builder = DescriptorBuilder::code_descriptor(0u32, 0xf_ffff, kind);
    let descriptor: Descriptor = segment(builder, ring).l().finish();
    descriptor.as_u64()
}

fn data_segment(ring: Ring) -> u64 {
    let kind = DataSegmentType::ReadWriteAccessed;
    let builder = DescriptorBuilder::data_descriptor(0u32, 0xf_ffff, kind);
    let descriptor: Descriptor = segment(builder, ring).db().finish();
    descriptor.as_u64()
}

/// An interrupt gate to `offset` at CPL 0: present, DPL 0, no stack of its own.
fn gate(offset: u64) -> [u64; 2] {
    let kind = SystemDescriptorTypes64::InterruptGate as u64;
    let low = (offset & 0xffff)
        | (u64::from(KERNEL_CODE.bits()) << 16)
        | (kind << 40)
        | (1 << 47)
        | (((offset >> 16) & 0xffff) << 48);
    [low, offset >> 32]
}

/// Bytes of the code.
pub(super) fn code_bytes() -> u64 {
    code().len() as u64
}

/// Makes `handler` that of exception `vector`. Before any vCPU runs.
pub(super) fn set_handler(memory: &GuestMemory, vector: u8, handler: u64) {
    let bytes = gate(handler).map(u64::to_le_bytes).concat();
    memory.store_bytes(IDT + u64::from(vector) * 16, &bytes);
}

/// Fills the stub pages.
pub(super) fn install(memory: &GuestMemory, vcpus: u32) -> Result<(), MachineError> {
    let code = code();
    if code.len() as u64 > PAGE {
        return Err(MachineError::Unsupported {
            detail: format!("a stub of {} bytes: it has one page", code.len()),
        });
    }
    memory.store_bytes(CODE, code);

    let segments = [
        0,
        code_segment(Ring::Ring0),
        data_segment(Ring::Ring0),
        data_segment(Ring::Ring3),
        code_segment(Ring::Ring3),
    ];
    memory.store_bytes(GDT, &segments.map(u64::to_le_bytes).concat());

    let handlers = guest_address(&raw const mini_vmm_stub_handlers);
    for vector in 0..u64::from(VECTORS) {
        let handler = if vector == u64::from(x86::irq::PAGE_FAULT_VECTOR) {
            CODE
        } else {
            handlers + vector * HANDLER_SIZE
        };
        let bytes = gate(handler).map(u64::to_le_bytes).concat();
        memory.store_bytes(IDT + vector * 16, &bytes);
    }

    for vcpu in 0..vcpus {
        let stack = stack_top(vcpu).to_le_bytes();
        memory.store_bytes(task(vcpu) + offset_of!(TaskStateSegment, rsp) as u64, &stack);
        memory.store_bytes(task(vcpu) + u64::from(TASK_LIMIT), &[0xff]);
        let bitmap = size_of::<TaskStateSegment>() as u16;
        memory.store_bytes(
            task(vcpu) + offset_of!(TaskStateSegment, iomap_base) as u64,
            &bitmap.to_le_bytes(),
        );
    }
    Ok(())
}

/// Puts `command` into the mailbox of an idle vCPU.
///
/// # Errors
/// `Unsupported` if the command never ends, or leads out of the lower half or into the stub.
pub(super) fn post(
    memory: &GuestMemory,
    vcpu: u32,
    stub_pages: u64,
    command: &Command,
) -> Result<(), MachineError> {
    let stride = command.stride.checked_mul(PAGE).filter(|bytes| *bytes != 0);
    let end = stride
        .and_then(|stride| stride.checked_mul(command.pages))
        .and_then(|bytes| bytes.checked_add(command.start))
        .filter(|end| *end <= 1 << 47);
    let (Some(stride), Some(_)) = (stride, end) else {
        return Err(MachineError::Unsupported {
            detail: format!("{command:?}: it must stay in the lower half, with a stride"),
        });
    };
    let aligned = match command.op {
        Op::Churn(churn) => churn.begins_at(command.start),
        _ => command.start % PAGE == 0,
    };
    if !aligned || command.start < stub_pages * PAGE || command.rounds == 0 {
        return Err(MachineError::Unsupported {
            detail: format!("{command:?}: whole pages above the stub, and at least one round"),
        });
    }
    let op = match command.op {
        Op::Write => WRITE,
        Op::Read => READ,
        Op::Verify => VERIFY,
        Op::Increment => INCREMENT,
        Op::Churn(_) => CHURN,
    };
    let mut words = [
        (OP, op),
        (START, command.start),
        (PAGES, command.pages),
        (STRIDE, stride),
        (TAG, command.tag.rotate_left(32)),
        (ROUNDS, command.rounds),
        (MASK, 0),
        (WRITTEN, 0),
        (DELAY, 0),
    ];
    if let Op::Churn(churn) = command.op {
        let round = churn.round(command.pages)?;
        let limit = churn.limit(command.pages, command.rounds)?;
        words = [
            (OP, op),
            (START, command.start),
            (PAGES, command.pages - 1),
            (STRIDE, churn.multiplier),
            (TAG, churn.offset),
            (ROUNDS, limit),
            (MASK, round - 1),
            (WRITTEN, churn.written),
            (DELAY, churn.delay),
        ];
    }
    for (offset, word) in words {
        // ORDERING[kvm-stub]: Relaxed. Read by the guest after this thread, or one that it hands
        // the vCPU to, has entered KVM_RUN.
        memory.word(mailbox(vcpu) + offset).store(word, Ordering::Relaxed);
    }
    Ok(())
}
