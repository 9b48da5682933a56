//! The first instructions: 32-bit entry, page tables of the direct map, long mode, a stack.
//!
//! Owns the code that both kinds of CPU run before Rust: the boot processor from `boot_entry`
//! (PVH and the boot sector: 32-bit, flat, EBX = start information or 0), the others from the page
//! that `ap.rs` copies below 1 MiB. Both meet in `boot_paged`. The direct map is the identity: the
//! first 4 GiB in pages of 2 MiB, the last GiB of them, where devices are, uncached. Stacks have
//! no guard pages: what lies below the first is its neighbour.

use core::arch::global_asm;

use crate::machine::cpu::MAX_CPUS;

/// Bytes of stack for each CPU.
pub const STACK: usize = 64 << 10;

/// Physical address of the page that application processors begin in.
pub const AP_PAGE: usize = 0x8000;

global_asm!(
    r#"
    # XEN_ELFNOTE_PHYS32_ENTRY: where a PVH loader enters, in 32-bit protected mode.
    .pushsection .note.pvh,"a",@note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long boot_entry
    .popsection

    .pushsection .boot,"ax",@progbits
    .code32
    .globl boot_entry
boot_entry:
    cli
    cld
    movl %ebx, boot_start_info

    # One top table, one of level 3, four of level 2.
    movl $boot_level3 + 3, boot_level4
    movl $boot_level2 + 3, %eax
    xorl %ecx, %ecx
1:  movl %eax, boot_level3(,%ecx,8)
    addl $0x1000, %eax
    incl %ecx
    cmpl $4, %ecx
    jb 1b
    # Present, writable, 2 MiB; from 3 GiB on also PWT and PCD.
    movl $0x83, %eax
    xorl %ecx, %ecx
1:  movl %eax, boot_level2(,%ecx,8)
    addl $0x200000, %eax
    incl %ecx
    cmpl $1536, %ecx
    jne 2f
    orl $0x18, %eax
2:  cmpl $2048, %ecx
    jb 1b

    .globl boot_paged
boot_paged:
    # PAE, OSFXSR, OSXMMEXCPT
    movl %cr4, %eax
    orl $0x620, %eax
    movl %eax, %cr4
    movl $boot_level4, %eax
    movl %eax, %cr3
    # EFER: LME, NXE
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x900, %eax
    wrmsr
    # CR0: PG, WP, NE, ET, MP, PE; not EM, TS, CD, NW
    movl $0x80010033, %eax
    movl %eax, %cr0
    lgdt entry_gdt_register
    ljmp $8, $entry_long

    .code64
entry_long:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    # Numbers in the order of arrival; one too many stays here.
    movl $1, %edi
    lock xaddl %edi, boot_arrived(%rip)
    cmpl ${max_cpus}, %edi
    jae 2f
    leal 1(%rdi), %eax
    imull ${stack}, %eax, %eax
    leaq boot_stacks(%rip), %rsp
    addq %rax, %rsp
    movl boot_start_info(%rip), %esi
    xorl %ebp, %ebp
    call {entry}
2:  cli
    hlt
    jmp 2b

    .balign 8
entry_gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cf9b000000ffff
entry_gdt_register:
    .word 31
    .long entry_gdt
    .long 0

    # Copied to {ap_page}: addresses in it are written as offsets from there.
    .code16
    .globl ap_page_begin
ap_page_begin:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl ap_gdt_register - ap_page_begin + {ap_page}
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $24, $(ap_flat - ap_page_begin + {ap_page})
    .code32
ap_flat:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $boot_paged, %eax
    jmp *%eax
    .balign 8
ap_gdt_register:
    .word 31
    .long entry_gdt
    .globl ap_page_end
ap_page_end:
    .code64
    .popsection

    .pushsection .data,"aw",@progbits
    .balign 4
boot_start_info:
    .long 0
    .globl boot_arrived
boot_arrived:
    .long 0
    .popsection

    .pushsection .bss,"aw",@nobits
    .balign 4096
    .globl boot_level4
boot_level4:
    .skip 0x1000
boot_level3:
    .skip 0x1000
boot_level2:
    .skip 0x4000
boot_stacks:
    .skip {stack} * {max_cpus}
    .popsection
    "#,
    entry = sym crate::arrived,
    stack = const STACK,
    max_cpus = const MAX_CPUS,
    ap_page = const AP_PAGE,
    options(att_syntax)
);
