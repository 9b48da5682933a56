# Page tables and pages: walking, copying, dropping, taking and giving back. See os.rs.
# rbx operation -> rax its area.
.Los_area:
    mov rax, [rbx + 8]
    shl rax, 5
    lea rax, [r13 + rax + {areas_at}]
    ret
# rdi address, rbx area -> rdi the next page's.
.Los_next_page:
    mov rdx, [rbx + 16]
    mov ecx, 4096
    test edx, {huge}
    je 2f
    mov ecx, 0x200000
2:  add rdi, rcx
    ret
# rdi address, rbx area -> rax where its entry is, 0 if there is none; keeps rdi, r8.
.Los_lookup:
    xor r10d, r10d
    call .Los_walk_area
    test rax, rax
    je 2f
    mov rdx, [rax]
    test edx, 1
    je 3f
    mov rcx, [rbx + 16]
    test ecx, {huge}
    je 2f
    test edx, {huge}
    je 3f  # an empty table
2:  ret
3:  xor eax, eax
    ret
# rdi address, rbx area, r10 make tables? -> rax where its entry is, or 0.
.Los_walk_area:
    mov r11d, 12
    mov rdx, [rbx + 16]
    test edx, {huge}
    je 2f
    mov r11d, 21
2:  mov rax, [r13 + {cr3}]
    mov ecx, 39
3:  mov rdx, rdi
    shr rdx, cl
    and edx, 511
    add rax, r14
    lea rdx, [rax + rdx * 8]
    cmp ecx, r11d
    je 5f
    mov rax, [rdx]
    test eax, 1
    jne 4f
    test r10d, r10d
    je 6f
    push rcx
    push rdx
    call .Los_take_zeroed
    pop rdx
    pop rcx
    or rax, 7
    mov [rdx], rax
4:  and rax, -4096
    sub ecx, 9
    jmp 3b
5:  mov rax, rdx
    ret
6:  xor eax, eax
    ret
# -> rax a table of the top level with what all spaces share; keeps r8, r9.
.Los_new_space:
    call .Los_take_zeroed
    mov rcx, [r15 + {boot}]
    add rcx, r14
    lea rdx, [rax + r14]
    mov rsi, [rcx]
    mov [rdx], rsi
    mov rsi, [rcx + 8]
    mov [rdx + 8], rsi
    ret
# rdi table, esi its level -> rax a copy of it and of all below; both share the pages, and
# neither may write to them. Keeps esi, r8, r9.
.Los_copy_table:
    push rbx
    push rbp
    push r12
    lea rbx, [rdi + r14]
    call .Los_take_zeroed
    push rax
    lea rbp, [rax + r14]
    mov r12d, 512
2:  mov rdi, [rbx]
    test edi, 1
    je 6f
    cmp esi, 1
    je 3f
    test edi, {huge}
    jne 3f
    and rdi, -4096
    dec esi
    call .Los_copy_table
    inc esi
    or rax, 7
    mov [rbp], rax
    jmp 6f
3:  test edi, {writable}
    je 4f
    and rdi, -3
    mov [rbx], rdi
4:  mov [rbp], rdi
    and rdi, -4096
    call .Los_count
    inc qword ptr [rax]
6:  add rbx, 8
    add rbp, 8
    dec r12d
    jne 2b
    pop rax
    pop r12
    pop rbp
    pop rbx
    ret
# rdi table, esi its level: it goes with all below. Keeps esi.
.Los_drop_table:
    push rbx
    push r12
    push rdi
    lea rbx, [rdi + r14]
    mov r12d, 512
2:  mov rdi, [rbx]
    test edi, 1
    je 5f
    cmp esi, 1
    je 3f
    test edi, {huge}
    jne 4f
    and rdi, -4096
    dec esi
    call .Los_drop_table
    inc esi
    jmp 5f
3:  and rdi, -4096
    call .Los_put
    jmp 5f
4:  and rdi, -4096
    call .Los_put_huge
5:  add rbx, 8
    dec r12d
    jne 2b
    pop rdi
    call .Los_put
    pop r12
    pop rbx
    ret
# rdi page -> rax where its users are counted.
.Los_count:
    mov rax, rdi
    shr rax, 12
    sub rax, {memory_page}
    shl rax, 3
    add rax, [r15 + {counts}]
    ret
# -> rax a page with one user; changes rcx.
.Los_take:
    mov rax, [r15 + {free}]
    test rax, rax
    je 2f
    mov rcx, [rax + r14]
    mov [r15 + {free}], rcx
    jmp 3f
2:  mov rax, [r15 + {unused}]
    cmp rax, [r15 + {limit}]
    jae .Los_panic
    lea rcx, [rax + 4096]
    mov [r15 + {unused}], rcx
3:  push rdi
    push rax
    mov rdi, rax
    call .Los_count
    mov qword ptr [rax], 1
    pop rax
    pop rdi
    ret
.Los_take_zeroed:
    call .Los_take
    push rdi
    push rax
    lea rdi, [rax + r14]
    xor eax, eax
    mov ecx, 512
    rep stosq
    pop rax
    pop rdi
    ret
# The same for 2 MiB, as they are.
.Los_take_huge:
    mov rax, [r15 + {huge_free}]
    test rax, rax
    je 2f
    mov rcx, [rax + r14]
    mov [r15 + {huge_free}], rcx
    jmp 3b
2:  mov rax, [r15 + {huge_unused}]
    cmp rax, [r15 + {huge_limit}]
    jae .Los_panic
    lea rcx, [rax + 0x200000]
    mov [r15 + {huge_unused}], rcx
    jmp 3b
# rdi page: one user less; changes rax, rcx.
.Los_put:
    call .Los_count
    dec qword ptr [rax]
    jne 2f
    mov rcx, [r15 + {free}]
    mov [rdi + r14], rcx
    mov [r15 + {free}], rdi
2:  ret
.Los_put_of_area:  # by the size of the pages of area rbx
    mov rax, [rbx + 16]
    test eax, {huge}
    je .Los_put
.Los_put_huge:
    call .Los_count
    dec qword ptr [rax]
    jne 2f
    mov rcx, [r15 + {huge_free}]
    mov [rdi + r14], rcx
    mov [r15 + {huge_free}], rdi
2:  ret
