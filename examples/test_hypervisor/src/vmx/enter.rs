//! The way into the guest and back: VMLAUNCH, VMRESUME, and the address an exit comes to.
//!
//! Owns the general registers across an entry. CR2 is exchanged by the caller; SSE registers are
//! not the guest's to keep (a call may change them all). No locks; interrupts are off.

use core::arch::global_asm;

use x86::vmx::vmcs::host;

/// What came of an attempt to enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// The guest ran, or its state was refused: the exit reason says which.
    Exited,
    /// The instruction failed and says why in the VMCS.
    Failed,
    /// There is no current VMCS.
    NoVmcs,
}

/// How the VMCS is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum By {
    /// VMLAUNCH: the first time after VMCLEAR.
    Launch = 0,
    /// VMRESUME.
    Resume = 1,
}

unsafe extern "sysv64" {
    /// See the assembly below.
    fn vmx_enter(gpr: *mut [u64; 16], by: By) -> u64;
    /// Where exits come to. Not to be called.
    fn vmx_exit();
}

/// The address for the VMCS's host RIP.
pub fn exit_address() -> u64 {
    (vmx_exit as *const ()).addr() as u64
}

/// Enter the guest of the current VMCS with these registers (RSP is the VMCS's), until it exits.
///
/// # Safety
/// The current VMCS's host state is this CPU's own, with [`exit_address`] as RIP, and its controls
/// confine the guest and the processor's own writes to memory that is theirs.
pub unsafe fn enter(gpr: &mut [u64; 16], by: By) -> Entered {
    // SAFETY: the registers are exclusively ours; an exit finds the host as it was (the caller's
    // promise), with the stack where `vmx_enter` has noted it.
    match unsafe { vmx_enter(gpr, by) } {
        0 => Entered::Exited,
        1 => Entered::NoVmcs,
        _ => Entered::Failed,
    }
}

// An exit finds RSP as noted: on top of the stack is the pointer to the registers.
global_asm!(
    r#"
    .pushsection .text.vmx_enter,"ax",@progbits
    .globl vmx_enter
    .globl vmx_exit
vmx_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rdi
    mov eax, {host_rsp}
    vmwrite rax, rsp
    # Moves leave the flags as they are.
    test rsi, rsi
    mov rax, [rdi]
    mov rcx, [rdi + 8]
    mov rdx, [rdi + 16]
    mov rbx, [rdi + 24]
    mov rbp, [rdi + 40]
    mov rsi, [rdi + 48]
    mov r8, [rdi + 64]
    mov r9, [rdi + 72]
    mov r10, [rdi + 80]
    mov r11, [rdi + 88]
    mov r12, [rdi + 96]
    mov r13, [rdi + 104]
    mov r14, [rdi + 112]
    mov r15, [rdi + 120]
    mov rdi, [rdi + 56]
    jnz 1f
    vmlaunch
    jmp 2f
1:  vmresume
2:  mov eax, 1
    jc 3f
    mov eax, 2
3:  pop rdi
    jmp vmx_return

vmx_exit:
    xchg rdi, [rsp]
    mov [rdi], rax
    mov [rdi + 8], rcx
    mov [rdi + 16], rdx
    mov [rdi + 24], rbx
    mov [rdi + 40], rbp
    mov [rdi + 48], rsi
    mov [rdi + 64], r8
    mov [rdi + 72], r9
    mov [rdi + 80], r10
    mov [rdi + 88], r11
    mov [rdi + 96], r12
    mov [rdi + 104], r13
    mov [rdi + 112], r14
    mov [rdi + 120], r15
    pop rax
    mov [rdi + 56], rax
    xor eax, eax
vmx_return:
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    .popsection
    "#,
    host_rsp = const host::RSP,
);
