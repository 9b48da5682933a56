# The kernel's start, its scheduler and the operations of processes. See os.rs.
.pushsection .rodata.mini_vmm_guest_os, "a", @progbits
.balign 16
.globl mini_vmm_os_start
mini_vmm_os_start:
    mov rax, cr0
    or rax, {wp}
    mov cr0, rax
    mov rax, cr4
    or rax, 0x80  # global pages
    mov cr4, rax
    lidt [r15 + {idtr}]
    cli
    mov rax, cr3
    mov [r15 + {boot}], rax
    movabs r14, {offset}
    lea r12, [r15 + {processes} + {process} * {most}]
    lea r13, [r15 + {processes}]
    call .Los_new_space
    mov [r13 + {cr3}], rax
    lea r13, [r12 - {process}]  # the first comes next
.Los_schedule:
    mov ecx, {most}
2:  add r13, {process}
    cmp r13, r12
    jb 3f
    lea r13, [r15 + {processes}]
3:  mov rax, [r13]
    test rax, rax
    jne 4f
    dec ecx
    jne 2b
    hlt  # nobody is left
4:  mov rax, [r13 + {cr3}]
    cmp rax, [r15 + {loaded}]
    je 5f
    mov [r15 + {loaded}], rax
    inc qword ptr [r15 + {switches}]
    mov cr3, rax
5:  mov rbp, [r15 + {quantum}]
.Los_operation:
    mov rbx, [r13 + {next}]
    add qword ptr [r13 + {next}], 32
    mov rax, [rbx]
    cmp eax, {op_exit}
    je .Los_exit
    cmp eax, {op_map}
    je .Los_map
    cmp eax, {op_unmap}
    je .Los_unmap
    cmp eax, {op_protect}
    je .Los_protect
    cmp eax, {op_fork}
    je .Los_fork
    cmp eax, {op_write}
    je .Los_access
    cmp eax, {op_read}
    je .Los_access
    cmp eax, {op_mark}
    je .Los_mark
.Los_panic:
    ud2
.Los_done:
    dec rbp
    jne .Los_operation
    jmp .Los_schedule
.Los_mark:
    mov rax, [rbx + 8]
    mov ecx, {msr_mark}
    xor edx, edx
    wrmsr
    jmp .Los_done
# Operation: words at rdi, rsi of them, rdx apart; r8 digest, rcx factor, r9 operation.
.Los_access:
    mov r9, rax
    mov rdi, [rbx + 8]
    mov rsi, [rbx + 16]
    mov rdx, [rbx + 24]
    mov r8, [r13 + {digest}]
    movabs rcx, {factor}
2:  cmp r9d, {op_write}
    je 3f
    mov rax, [rdi]
    xor r8, rax
    jmp 4f
3:  mov rax, r8
    xor rax, rdi
    imul rax, rcx
    mov [rdi], rax
    mov r8, rax
    jmp 4f
.Los_refused:  # where an access goes on that was refused
    xor r8, rdi
    not r8
4:  rol r8, 7
    imul r8, rcx
    add rdi, rdx
    dec rsi
    jne 2b
    mov [r13 + {digest}], r8
    jmp .Los_done
# Operation: area, start, end with flags.
.Los_map:
    call .Los_area
    mov rcx, [rbx + 16]
    mov [rax], rcx
    mov rcx, [rbx + 24]
    mov rdx, rcx
    and rdx, -4096
    mov [rax + 8], rdx
    and ecx, 4095
    mov [rax + 16], rcx
    jmp .Los_done
# Operation: area.
.Los_unmap:
    call .Los_area
    mov rbx, rax
    mov rdi, [rbx]
2:  cmp rdi, [rbx + 8]
    jae 4f
    call .Los_lookup
    test rax, rax
    je 3f
    mov rdx, [rax]
    mov qword ptr [rax], 0
    invlpg [rdi]
    push rdi
    mov rdi, rdx
    and rdi, -4096
    call .Los_put_of_area
    pop rdi
3:  call .Los_next_page
    jmp 2b
4:  xor eax, eax
    mov [rbx], rax
    mov [rbx + 8], rax
    jmp .Los_done
# Operation: area, what it permits from now on. What it gains comes when it is asked for.
.Los_protect:
    call .Los_area
    mov r8, [rbx + 16]
    mov rbx, rax
    mov rcx, [rbx + 16]
    and rcx, -7
    or rcx, r8
    mov [rbx + 16], rcx
    or r8, -7
    mov rdi, [rbx]
2:  cmp rdi, [rbx + 8]
    jae .Los_done
    call .Los_lookup
    test rax, rax
    je 3f
    mov rdx, [rax]
    mov rcx, rdx
    and rcx, r8
    cmp rcx, rdx
    je 3f
    mov [rax], rcx
    invlpg [rdi]
3:  call .Los_next_page
    jmp 2b
# Operation: process, its first operation, what its digest differs by.
.Los_fork:
    mov rdi, [rbx + 8]
    shl rdi, 8
    lea r9, [r15 + rdi + {processes}]
    mov rax, [r9]
    test rax, rax
    jne .Los_panic
    mov rax, [rbx + 16]
    mov [r9 + {next}], rax
    mov rax, [r13 + {digest}]
    xor rax, [rbx + 24]
    mov [r9 + {digest}], rax
    mov ecx, {areas} * 4
    lea rsi, [r13 + {areas_at}]
    lea rdi, [r9 + {areas_at}]
    rep movsq
    call .Los_new_space
    mov [r9 + {cr3}], rax
    mov rdx, [r13 + {cr3}]
    mov rdi, [rdx + r14 + 16]
    test edi, 1
    je 2f
    lea r8, [rax + r14 + 16]
    and rdi, -4096
    mov esi, 3
    call .Los_copy_table
    or rax, 7
    mov [r8], rax
2:  mov eax, 1
    mov [r9], rax
    mov rax, [r13 + {cr3}]
    mov cr3, rax  # entries are read-only now
    jmp .Los_done
.Los_exit:
    mov rax, [r13 + {digest}]
    add [r15 + {result}], rax
    xor eax, eax
    mov [r13], rax
    mov rax, [r15 + {boot}]
    mov [r15 + {loaded}], rax
    mov cr3, rax
    mov rdi, [r13 + {cr3}]
    push rdi
    mov rdi, [rdi + r14 + 16]
    test edi, 1
    je 2f
    and rdi, -4096
    mov esi, 3
    call .Los_drop_table
2:  pop rdi
    call .Los_put
    jmp .Los_schedule
