//! VMRUN and what must stand around it.

use core::arch::{asm, global_asm};

use super::vmcb::Vmcb;

// With GIF clear the interrupt flag may be set: nothing is taken until VMRUN sets GIF, and then an
// interrupt ends the guest instead. VMRUN restores RAX, RSP and what the host's save area holds;
// FS, GS, TR, LDTR and the system call registers travel by VMSAVE and VMLOAD.
global_asm!(
    r#"
    .pushsection .text
    .balign 16
    .globl svm_enter
    # rdi: general registers, rsi: the guest's block, rdx: the host's page for VMSAVE
svm_enter:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushq %rdi
    pushq %rdx
    clgi
    sti
    movq %rdx, %rax
    vmsave
    movq %rsi, %rax
    vmload
    movq 8(%rdi), %rcx
    movq 16(%rdi), %rdx
    movq 24(%rdi), %rbx
    movq 40(%rdi), %rbp
    movq 48(%rdi), %rsi
    movq 64(%rdi), %r8
    movq 72(%rdi), %r9
    movq 80(%rdi), %r10
    movq 88(%rdi), %r11
    movq 96(%rdi), %r12
    movq 104(%rdi), %r13
    movq 112(%rdi), %r14
    movq 120(%rdi), %r15
    movq 56(%rdi), %rdi
    vmrun
    vmsave
    pushq %rdi
    movq 16(%rsp), %rdi
    popq 56(%rdi)
    movq %rcx, 8(%rdi)
    movq %rdx, 16(%rdi)
    movq %rbx, 24(%rdi)
    movq %rbp, 40(%rdi)
    movq %rsi, 48(%rdi)
    movq %r8, 64(%rdi)
    movq %r9, 72(%rdi)
    movq %r10, 80(%rdi)
    movq %r11, 88(%rdi)
    movq %r12, 96(%rdi)
    movq %r13, 104(%rdi)
    movq %r14, 112(%rdi)
    movq %r15, 120(%rdi)
    popq %rax
    vmload
    cli
    stgi
    popq %rdi
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    retq
    .popsection
    "#,
    options(att_syntax)
);

unsafe extern "C" {
    fn svm_enter(gpr: *mut u64, vmcb: u64, host: u64);
}

/// Run the guest of `vmcb` until it exits. RAX and RSP travel in the block, the other general
/// registers in `gpr`.
///
/// # Safety
/// SVM is on and the host's save area set, on this CPU; `host` is the physical address of a page
/// for the host's own VMSAVE; the block's intercepts and nested tables keep the guest away from
/// memory that is not its own; host interrupts are off.
pub unsafe fn enter(gpr: &mut [u64; 16], vmcb: &mut Vmcb, host: u64) {
    let block = core::ptr::from_mut(vmcb) as u64;
    // SAFETY: the caller's promise. Physical and virtual addresses are the same, and the function
    // keeps the C calling convention.
    unsafe { svm_enter(gpr.as_mut_ptr(), block, host) };
}

/// Forget this CPU's translation of `address` under `asid`.
pub fn invalidate(address: u64, asid: u32) {
    // SAFETY: INVLPGA drops a cached translation of a guest; the caller's CPU has SVM on, else it
    // is #UD and the run ends with a message.
    unsafe { asm!("invlpga rax, ecx", in("rax") address, in("ecx") asid, options(nostack)) };
}
