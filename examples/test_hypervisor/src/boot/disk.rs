//! Booting from a raw disk, for machines whose firmware does not load an ELF file: the 512-byte
//! boot sector, and what it leaves behind for the program it loads.
//!
//! The sector's code stands in a section of its own, `.bootsector`, which is not part of the
//! loaded program; `cargo xtask emulate` copies it to the front of the disk. Behind it, sector 1
//! holds the command line and a header, and from sector 2 on comes the program as it stands
//! in memory (xtask/src/image.rs writes all of it). The sector enters the program where PVH does,
//! in the same state, but with EBX = 0: no start information. No locks; one CPU runs.

use core::arch::global_asm;
use core::slice;

/// Where the BIOS puts the boot sector.
const SECTOR_AT: usize = 0x7c00;
/// Where the boot sector puts sector 1: the command line.
const COMMAND_LINE_AT: usize = 0x7e00;
/// Bytes of the command line, a NUL included.
const COMMAND_LINE_BYTES: usize = 256;
/// Where the header is then.
const HEADER_AT: usize = COMMAND_LINE_AT + COMMAND_LINE_BYTES;

/// The header's words, 32 bits each, little endian: sectors of the program, from sector 2 on.
const SECTORS: usize = HEADER_AT;
/// Physical address that the program is loaded to.
const LOAD: usize = HEADER_AT + 4;
/// Physical address from which on memory is cleared after loading.
const CLEAR_FROM: usize = HEADER_AT + 8;
/// Bytes to clear.
const CLEAR_BYTES: usize = HEADER_AT + 12;
/// Physical address of the 32-bit entry.
const ENTRY: usize = HEADER_AT + 16;
/// Written by the boot sector: end of the memory that starts at 1 MiB.
const MEMORY_END: usize = HEADER_AT + 20;

/// What the boot sector leaves behind.
#[derive(Clone, Copy, Debug)]
pub struct DiskBoot {
    /// The command line, without its NUL; empty if it is no text.
    pub command_line: &'static str,
    /// End of the memory that starts at 1 MiB, below 4 GiB.
    pub memory_end: u64,
}

/// What the boot sector left behind.
///
/// # Safety
/// The program was entered by the boot sector, the first 64 KiB of physical memory are mapped at
/// `low` for as long as the program runs, and nobody writes to their bytes 0x7e00 to 0x8000.
pub unsafe fn left_behind(low: *const u8) -> DiskBoot {
    let text = low.wrapping_add(COMMAND_LINE_AT);
    // SAFETY: the caller's promise: 256 bytes inside the mapping, written by nobody, for good.
    let line: &'static [u8] = unsafe { slice::from_raw_parts(text, COMMAND_LINE_BYTES) };
    let end = low.wrapping_add(MEMORY_END).cast::<u32>();
    // SAFETY: as above; the word directly follows and any bits are a number.
    let end = unsafe { end.read_unaligned() };
    let text = line.split(|byte| *byte == 0).next().unwrap_or_default();
    let command_line = core::str::from_utf8(text).unwrap_or_default();
    DiskBoot { command_line, memory_end: u64::from(end) }
}

// Labels are used as distances from the start of the sector: what the linker thinks of this
// section's address does not matter.
//
// A chunk is read below 1 MiB, where the BIOS can write, and then copied up. For that DS
// and ES get a 4 GiB limit in protected mode and keep it in real mode; this is done anew for each
// chunk because the BIOS may do the same with other limits.
global_asm!(
    r#"
    .set CHUNK_SECTORS, 64
    .set CHUNK_SEGMENT, 0x1000

    .pushsection .bootsector,"",@progbits
    .code16
boot_sector:
    cli
    cld
    ljmp $0, $(boot_flat - boot_sector + {at})
boot_flat:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw ${at}, %sp
    sti
    movb %dl, boot_drive - boot_sector + {at}

    # A20, by the port that every machine with this firmware has.
    inb $0x92, %al
    orb $2, %al
    andb $0xfe, %al
    outb %al, $0x92

    # Sector 1, then set the packet up for the chunks.
    call boot_read
    jc boot_no_disk
    movl $2, boot_packet - boot_sector + {at} + 8
    movl $CHUNK_SEGMENT << 16, boot_packet - boot_sector + {at} + 4

    # Memory: CX (AX) KiB from 1 MiB on, DX (BX) times 64 KiB from 16 MiB on.
    xorw %cx, %cx
    xorw %dx, %dx
    movw $0xe801, %ax
    int $0x15
    jc boot_no_memory
    testw %cx, %cx
    jnz 1f
    movw %ax, %cx
    movw %bx, %dx
1:  movzwl %dx, %edx
    movzwl %cx, %ecx
    shll $10, %ecx
    addl $0x100000, %ecx
    shll $16, %edx
    jz 1f
    leal 0x1000000(%edx), %ecx
1:  movl %ecx, {memory_end}

    movl {sectors}, %ebp
    movl {load}, %edi
boot_chunk:
    movl $CHUNK_SECTORS, %eax
    cmpl %eax, %ebp
    ja 1f
    movl %ebp, %eax
1:  movw %ax, boot_packet - boot_sector + {at} + 2
    pushl %eax
    pushl %edi
    call boot_read
    popl %edi
    popl %eax
    jc boot_no_disk
    addl %eax, boot_packet - boot_sector + {at} + 8
    subl %eax, %ebp

    cli
    lgdtl boot_gdt_pointer - boot_sector + {at}
    movl %cr0, %ecx
    incw %cx
    movl %ecx, %cr0
    movw $16, %dx
    movw %dx, %ds
    movw %dx, %es
    decw %cx
    movl %ecx, %cr0
    movl %eax, %ecx
    shll $7, %ecx
    movl $CHUNK_SEGMENT << 4, %esi
    rep movsl (%esi), %es:(%edi)
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    sti
    testl %ebp, %ebp
    jnz boot_chunk

    cli
    movl {clear_from}, %edi
    movl {clear_bytes}, %ecx
    movl {entry}, %ebp
    movl %cr0, %eax
    incw %ax
    movl %eax, %cr0
    ljmpl $8, $(boot_protected - boot_sector + {at})

    # Read what the packet says; carry: it could not be read.
boot_read:
    movw $(boot_packet - boot_sector + {at}), %si
    movb boot_drive - boot_sector + {at}, %dl
    movb $0x42, %ah
    int $0x13
    ret

    # Say on the serial port what is missing, and stop.
boot_no_disk:
    movw $(boot_text_disk - boot_sector + {at}), %si
    jmp boot_say
boot_no_memory:
    movw $(boot_text_memory - boot_sector + {at}), %si
boot_say:
    movw $0x3fb, %dx
    movb $3, %al
    outb %al, %dx
    movb $0xfd, %dl
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    lodsb
    movb $0xf8, %dl
    outb %al, %dx
    movb $0xfd, %dl
    testb %al, %al
    jnz 1b
    cli
2:  hlt
    jmp 2b

    .code32
boot_protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw %ax, %fs
    movw %ax, %gs
    xorl %eax, %eax
    rep stosb
    xorl %ebx, %ebx
    jmp *%ebp

    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00cf9a000000ffff
    .quad 0x00cf92000000ffff
boot_gdt_pointer:
    .word 23
    .long boot_gdt - boot_sector + {at}
    # Size, reserved, sectors, offset and segment to read to, first sector.
boot_packet:
    .byte 16, 0
    .word 1
    .word {line}, 0
    .quad 1
boot_drive:
    .byte 0
boot_text_disk:
    .asciz "boot sector: cannot read the disk\n"
boot_text_memory:
    .asciz "boot sector: the BIOS does not say how much memory there is\n"
    .org 510
    .byte 0x55, 0xaa
    .popsection
    .code64
    "#,
    at = const SECTOR_AT,
    line = const COMMAND_LINE_AT,
    sectors = const SECTORS,
    load = const LOAD,
    clear_from = const CLEAR_FROM,
    clear_bytes = const CLEAR_BYTES,
    entry = const ENTRY,
    memory_end = const MEMORY_END,
    options(att_syntax)
);
