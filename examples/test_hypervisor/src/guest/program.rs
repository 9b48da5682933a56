//! The programs that guests run: a few instructions each, copied into guest memory.
//!
//! Every program takes an address in RDI, a count in RSI, a stride in RDX and a value in R8 (the
//! 32- and 16-bit one: EDI, ESI, EDX), counts in RBX what it found wrong, and ends by writing to
//! the port [`DONE`]. They stand in the image's read-only data; no CPU executes them there.

use core::arch::global_asm;
use core::slice;

use super::layout::{CODE_16, CODE_32, CODE_64};

/// Written to by programs that have ended.
pub const DONE: u16 = 0x10;
/// Written to by the handler of page faults, with CR2 in R12 and the error code in R13. The guest
/// goes on where it was when it is run again.
pub const FAULT: u16 = 0x11;

global_asm!(
    r#"
    .pushsection .rodata
    .code64
    .globl guest_64
guest_64:

    .globl guest_read
guest_read:
1:  movq (%rdi), %rax
    addq %rdx, %rdi
    decq %rsi
    jnz 1b
    jmp guest_done

    .globl guest_write
guest_write:
1:  movq %r8, (%rdi)
    addq %rdx, %rdi
    decq %rsi
    jnz 1b
    jmp guest_done

    .globl guest_call
    # Calls what is at each address: RET.
guest_call:
1:  callq *%rdi
    addq %rdx, %rdi
    decq %rsi
    jnz 1b
    jmp guest_done

    .globl guest_fill
    # Words that tell where they are: address XOR value.
guest_fill:
1:  movq %rdi, %rax
    xorq %r8, %rax
    movq %rax, (%rdi)
    addq %rdx, %rdi
    decq %rsi
    jnz 1b
    jmp guest_done

    .globl guest_verify
guest_verify:
1:  movq %rdi, %rax
    xorq %r8, %rax
    cmpq (%rdi), %rax
    je 2f
    incq %rbx
    movq %rdi, %r9
    movq (%rdi), %r10
2:  addq %rdx, %rdi
    decq %rsi
    jnz 1b
    jmp guest_done

    .globl guest_rounds
    # R11 rounds over the same words: each must be what the last round left, address XOR value;
    # each becomes what the next round finds, with the value one higher.
guest_rounds:
1:  movq %rdi, %rcx
    movq %rsi, %rbp
2:  movq %rcx, %rax
    xorq %r8, %rax
    cmpq (%rcx), %rax
    je 3f
    incq %rbx
    movq %rcx, %r9
    movq (%rcx), %r10
3:  leaq 1(%r8), %rax
    xorq %rcx, %rax
    movq %rax, (%rcx)
    addq %rdx, %rcx
    decq %rbp
    jnz 2b
    incq %r8
    decq %r11
    jnz 1b
    jmp guest_done

    .globl guest_add
    # Adds one to each word, whoever else does.
guest_add:
1:  lock incq (%rdi)
    addq %rdx, %rdi
    decq %rsi
    jnz 1b
    jmp guest_done

    .globl guest_spin
    # Counts at an address until the host has had enough.
guest_spin:
1:  incq %rax
    movq %rax, (%rdi)
    jmp 1b

    .globl guest_invalidate
    # INVLPG of each address.
guest_invalidate:
1:  invlpg (%rdi)
    addq %rdx, %rdi
    decq %rsi
    jnz 1b
    jmp guest_done

    .globl guest_set_cr0
    # Control registers are written from RAX: not every CPU tells its hypervisor from where.
guest_set_cr0:
    movq %rdi, %rax
    movq %rax, %cr0
    jmp guest_done

    .globl guest_set_cr3
guest_set_cr3:
    movq %rdi, %rax
    movq %rax, %cr3
    jmp guest_done

    .globl guest_set_cr4
guest_set_cr4:
    movq %rdi, %rax
    movq %rax, %cr4
    jmp guest_done

    .globl guest_remap
    # R11 rounds over RSI pages from RDI on, whose entries in the guest's own table stand from R8
    # on. In each, page I and the page opposite change places: both words are read, both entries
    # exchanged, both addresses invalidated, both words must have changed places. The word behind
    # each counts. At the end of a round everything is flushed by loading CR3 with itself.
guest_remap:
    xorl %ecx, %ecx
    leaq -1(%rsi), %rbp
2:  movq %rcx, %rax
    shlq $12, %rax
    addq %rdi, %rax
    movq %rbp, %r9
    shlq $12, %r9
    addq %rdi, %r9
    movq (%rax), %r14
    movq (%r9), %r15
    movq (%r8,%rcx,8), %r10
    movq (%r8,%rbp,8), %rdx
    movq %rax, %r12
    movq %r8, %rax
    leaq (%rax,%rcx,8), %rdi
    movq %rdx, (%rdi)
    leaq (%rax,%rbp,8), %rdi
    movq %r10, (%rdi)
    movq %r12, %rdi
    invlpg (%rdi)
    movq %r9, %rdi
    invlpg (%rdi)
    cmpq (%r12), %r15
    jne 3f
    cmpq (%r9), %r14
    je 4f
3:  incq %rbx
4:  incq 8(%r12)
    incq 8(%r9)
    movq %rcx, %rax
    shlq $12, %rax
    movq %r12, %rdi
    subq %rax, %rdi
    incq %rcx
    decq %rbp
    cmpq %rbp, %rcx
    jb 2b
    movq %cr3, %rax
    movq %rax, %cr3
    decq %r11
    jnz guest_remap
    jmp guest_done

    .globl guest_handler
    # #PF: tell, then do the instruction again.
guest_handler:
    movq %cr2, %r12
    popq %r13
    outb %al, ${fault}
    iretq

    .globl guest_stop
    # Everything that exits: OUT of three sizes, CPUID, HLT.
guest_stop:
    movl $0x12345678, %eax
    movl $0x1234, %edx
    outb %al, %dx
    outw %ax, %dx
    outl %eax, %dx
    cpuid
    hlt
    jmp guest_done

    .globl guest_vmmcall
guest_vmmcall:
    vmmcall
    jmp guest_done

    .globl guest_vmcall
guest_vmcall:
    vmcall
    jmp guest_done

    .globl guest_undefined
    # No table of handlers: #UD, #GP, double fault, triple fault.
guest_undefined:
    ud2

guest_done:
    outb %al, ${done}
    jmp guest_done
guest_64_end:

    .code32
guest_32:
    xorl %ebx, %ebx
    movl %edi, %ecx
    movl %esi, %ebp
1:  movl %ecx, %eax
    xorl %edx, %eax
    movl %eax, (%ecx)
    addl $4, %ecx
    decl %ebp
    jnz 1b
1:  movl %edi, %eax
    xorl %edx, %eax
    cmpl (%edi), %eax
    je 2f
    incl %ebx
2:  addl $4, %edi
    decl %esi
    jnz 1b
3:  outb %al, ${done}
    jmp 3b
guest_32_end:

    .code16
guest_16:
    movw $0x3000, %ax
    movw %ax, %ds
    xorw %bx, %bx
    movw %di, %bp
    movw %si, %cx
1:  movw %di, %ax
    xorw %dx, %ax
    movw %ax, (%di)
    addw $2, %di
    decw %cx
    jnz 1b
    movw %bp, %di
1:  movw %di, %ax
    xorw %dx, %ax
    cmpw (%di), %ax
    je 2f
    incw %bx
2:  addw $2, %di
    decw %si
    jnz 1b
3:  outb %al, ${done}
    jmp 3b
guest_16_end:
    .code64
    .globl guest_64_end
    .globl guest_32
    .globl guest_32_end
    .globl guest_16
    .globl guest_16_end
    .popsection
    "#,
    done = const DONE,
    fault = const FAULT,
    options(att_syntax)
);

unsafe extern "C" {
    safe static guest_64: u8;
    safe static guest_64_end: u8;
    safe static guest_32: u8;
    safe static guest_32_end: u8;
    safe static guest_16: u8;
    safe static guest_16_end: u8;
    safe static guest_read: u8;
    safe static guest_write: u8;
    safe static guest_call: u8;
    safe static guest_fill: u8;
    safe static guest_verify: u8;
    safe static guest_rounds: u8;
    safe static guest_add: u8;
    safe static guest_spin: u8;
    safe static guest_invalidate: u8;
    safe static guest_set_cr0: u8;
    safe static guest_set_cr3: u8;
    safe static guest_set_cr4: u8;
    safe static guest_remap: u8;
    safe static guest_handler: u8;
    safe static guest_stop: u8;
    safe static guest_vmmcall: u8;
    safe static guest_vmcall: u8;
    safe static guest_undefined: u8;
}

/// The 64-, 32- and 16-bit programs, to be copied to [`CODE_64`], [`CODE_32`], [`CODE_16`].
pub fn blobs() -> [&'static [u8]; 3] {
    let bytes = |begin: *const u8, end: *const u8| {
        // SAFETY: two labels of the read-only data above, in this order; nothing writes there.
        unsafe { slice::from_raw_parts(begin, end as usize - begin as usize) }
    };
    [
        bytes(&raw const guest_64, &raw const guest_64_end),
        bytes(&raw const guest_32, &raw const guest_32_end),
        bytes(&raw const guest_16, &raw const guest_16_end),
    ]
}

/// A program, by what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Read a word at each address.
    Read,
    /// Write the value at each address.
    Write,
    /// Call each address.
    Call,
    /// Write words that tell where they are.
    Fill,
    /// Check such words.
    Verify,
    /// Check and renew such words, again and again.
    Rounds,
    /// Add one to each word, atomically.
    Add,
    /// Count at an address for ever.
    Spin,
    /// INVLPG of each address.
    Invalidate,
    /// Write the address to CR0.
    SetCr0,
    /// Write the address to CR3.
    SetCr3,
    /// Write the address to CR4.
    SetCr4,
    /// Let pages change places by entries of the guest's own table, again and again.
    Remap,
    /// The handler of page faults.
    Handler,
    /// OUT, CPUID, HLT.
    Stop,
    /// VMMCALL.
    VmmCall,
    /// VMCALL.
    VmCall,
    /// An undefined instruction.
    Undefined,
    /// Fill and verify in 32-bit code.
    Small32,
    /// Fill and verify in 16-bit code.
    Small16,
}

impl Program {
    /// Guest physical address of its first instruction.
    pub fn entry(self) -> u64 {
        let at = match self {
            Self::Read => &raw const guest_read,
            Self::Write => &raw const guest_write,
            Self::Call => &raw const guest_call,
            Self::Fill => &raw const guest_fill,
            Self::Verify => &raw const guest_verify,
            Self::Rounds => &raw const guest_rounds,
            Self::Add => &raw const guest_add,
            Self::Spin => &raw const guest_spin,
            Self::Invalidate => &raw const guest_invalidate,
            Self::SetCr0 => &raw const guest_set_cr0,
            Self::SetCr3 => &raw const guest_set_cr3,
            Self::SetCr4 => &raw const guest_set_cr4,
            Self::Remap => &raw const guest_remap,
            Self::Handler => &raw const guest_handler,
            Self::Stop => &raw const guest_stop,
            Self::VmmCall => &raw const guest_vmmcall,
            Self::VmCall => &raw const guest_vmcall,
            Self::Undefined => &raw const guest_undefined,
            Self::Small32 => return CODE_32,
            Self::Small16 => return CODE_16,
        };
        CODE_64 + (at as u64 - &raw const guest_64 as u64)
    }
}
