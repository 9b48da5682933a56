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
