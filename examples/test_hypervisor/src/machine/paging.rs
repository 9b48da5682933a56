//! The host's own paging: 4 levels, or 5 while a guest's nested tables have 5.
//!
//! SVM walks nested tables with as many levels as the host's own paging has when it enters the
//! guest, and CR4.LA57 cannot change while paging is on. So a CPU leaves long mode for a few
//! instructions and comes back; the direct map is below 4 GiB, where both modes see the same.

use core::arch::global_asm;

use mmu_core::addr::Level;
use x86::controlregs::{Cr4, cr4};

global_asm!(
    r#"
    .pushsection .boot,"ax",@progbits
    .code64
    .globl paging_switch
    # edi: the new CR3, esi: CR4.LA57 to be toggled. What the C convention wants kept goes to the
    # stack: outside 64-bit mode nobody promises for the upper halves and for R8 to R15.
paging_switch:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushq $24
    leaq 1f(%rip), %rax
    pushq %rax
    lretq
    .code32
1:  movl %cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl %cr4, %ebx
    xorl %esi, %ebx
    movl %ebx, %cr4
    movl %edi, %cr3
    orl $0x80000000, %eax
    movl %eax, %cr0
    ljmp $8, $2f
    .code64
2:  movl %esp, %esp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    retq
    .popsection

    .pushsection .data,"aw",@progbits
    .balign 4096
    .globl paging_level5
paging_level5:
    .quad boot_level4 + 3
    .skip 0x1000 - 8
    .popsection
    "#,
    options(att_syntax)
);

unsafe extern "C" {
    fn paging_switch(cr3: u32, toggle: u32);
    /// Top tables of the two trees, in the first 4 GiB like all of the image.
    safe static boot_level4: u8;
    safe static paging_level5: u8;
}

/// Go on with so many levels.
///
/// # Panics
/// When it is neither 4 nor 5.
pub fn use_levels(levels: Level) {
    // SAFETY: reads a register.
    let now = unsafe { cr4() };
    let wanted = match levels {
        Level::L5 => true,
        Level::L4 => false,
        _ => panic!("tables of {} levels", levels.number()),
    };
    if now.contains(Cr4::CR4_ENABLE_LA57) != wanted {
        switch(wanted);
    }
}

#[cold]
fn switch(five: bool) {
    let top = if five { &raw const paging_level5 } else { &raw const boot_level4 };
    let cr3 = top as u64 as u32;
    let toggle = Cr4::CR4_ENABLE_LA57.bits() as u32;
    // SAFETY: interrupts are off but in a halt and in `take_interrupts`, so nothing is delivered
    // while the descriptor table cannot be used. Code, stack, tables are in the first 4 GiB, mapped
    // alike by both trees; all registers that the ABI keeps are kept.
    unsafe { paging_switch(cr3, toggle) };
}
