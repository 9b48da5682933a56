# The page fault handler: pages on demand, copies of shared ones, refusals. See os.rs.
# #PF. Saved: ten registers, 80 bytes; above them error code, rip.
.globl mini_vmm_os_page_fault
mini_vmm_os_page_fault:
    push rax
    push rcx
    push rdx
    push rbx
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    inc qword ptr [r15 + {faults}]
    mov rdi, cr2
    mov r8, [rsp + 80]
    mov rax, rdi
    shr rax, 39
    cmp eax, 2
    jne .Los_panic  # the kernel's own
    lea rbx, [r13 + {areas_at}]
    mov ecx, {areas}
2:  cmp rdi, [rbx]
    jb 3f
    cmp rdi, [rbx + 8]
    jb 4f
3:  add rbx, 32
    dec ecx
    jne 2b
    jmp .Los_refuse
4:  mov r9, [rbx + 16]
    test r9d, {readable}
    je .Los_refuse
    test r8d, 2
    je 5f
    test r9d, {writable}
    je .Los_refuse
5:  mov r10d, 1
    call .Los_walk_area
    mov rsi, rax  # where the entry is
    mov rdx, [rsi]
    test edx, 1
    jne 6f
    call .Los_take_of_area  # a page that nobody used
    mov rcx, r9
    or rcx, 1
    or rax, rcx
    mov [rsi], rax
    jmp .Los_handled
6:  test r9d, {huge}
    je 7f
    test edx, {huge}
    jne 7f
    push rdi  # an empty table where a large page will be
    mov rdi, rdx
    and rdi, -4096
    mov qword ptr [rsi], 0
    call .Los_put
    pop rdi
    invlpg [rdi]
    jmp 5b
7:  test edx, {readable}  # it was not for a while
    jne 11f
    or rdx, {readable}
    mov [rsi], rdx
    invlpg [rdi]
    jmp .Los_handled
11: test r8d, 2
    je .Los_handled
    mov r8, rdi  # a write to a page that may be another's too
    mov rdi, rdx
    and rdi, -4096
    call .Los_count
    mov rcx, [rax]
    cmp rcx, 1
    jne 8f
    or rdx, {writable}
    mov [rsi], rdx
    invlpg [r8]
    jmp .Los_handled
8:  inc qword ptr [r15 + {copies}]
    dec qword ptr [rax]
    push rsi
    push rdi
    mov r10d, 512
    test r9d, {huge}
    je 9f
    call .Los_take_huge
    mov r10d, 512 * 512
    jmp 10f
9:  call .Los_take
10: pop rsi
    add rsi, r14
    lea rdi, [rax + r14]
    mov rcx, r10
    rep movsq
    pop rsi
    mov rcx, r9
    or rcx, 1
    or rax, rcx
    mov [rsi], rax
    invlpg [r8]
.Los_handled:
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 8
    iretq
.Los_refuse:
    inc qword ptr [r15 + {refused}]
    lea rax, [rip + .Los_refused]
    mov [rsp + 88], rax
    jmp .Los_handled
# rbx area -> rax a page of its size, zeroed; keeps rdi.
.Los_take_of_area:
    mov rax, [rbx + 16]
    test eax, {huge}
    je .Los_take_zeroed
    call .Los_take_huge
    push rdi
    push rax
    lea rdi, [rax + r14]
    xor eax, eax
    mov ecx, 512 * 512
    rep stosq
    pop rax
    pop rdi
    ret
.globl mini_vmm_os_end
mini_vmm_os_end:
.popsection
