//! The VM in which `mini_vmm -- nested` boots the test hypervisor, on programs made by hand: any
//! /dev/kvm boots those. Where it does not open each test says so, loudly, and passes.

#[path = "../examples/mini_vmm/kvm/mod.rs"]
#[allow(dead_code, reason = "the other machine's parts")]
mod kvm;
#[path = "../examples/mini_vmm/machine.rs"]
#[allow(dead_code, reason = "the other machine's parts")]
mod machine;
#[path = "../examples/mini_vmm/nested/mod.rs"]
#[allow(dead_code, unused_imports, reason = "what a host must offer is the scenario's business")]
mod nested;

use std::time::Duration;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use nested::offer::Extension;
use nested::{Config, End, Image};

/// Where the program stands and starts.
const LOAD: u32 = 0x10_0000;
/// A program header.
const HEADER: usize = 56;

/// An ELF64 file that loads `code` at [`LOAD`], with a PVH note that says so.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    [4_u32, 4, 18].iter().for_each(|word| note.extend(word.to_le_bytes()));
    note.extend(b"Xen\0");
    note.extend(LOAD.to_le_bytes());
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    file[32] = 64;
    file[54..58].copy_from_slice(&[HEADER as u8, 0, 2, 0]);
    let start = 64 + 2 * HEADER;
    for (kind, offset, bytes) in [(4_u32, start, note.len()), (1, start + note.len(), code.len())] {
        let mut header = kind.to_le_bytes().to_vec();
        header.resize(8, 0);
        let size = bytes as u64;
        let words = [offset as u64, u64::from(LOAD), u64::from(LOAD), size, size, 4];
        words.iter().for_each(|word| header.extend(word.to_le_bytes()));
        file.extend(header);
    }
    file.extend(note);
    file.extend(code);
    file
}

/// Boots `code` and says what it printed and how it ended.
fn run(test: &str, code: &[u8], vcpus: u32, patience: Duration) -> Option<(Vec<String>, End)> {
    if let Err(why) = kvm::available() {
        kvm::skip::aloud("no /dev/kvm", test, why);
        return None;
    }
    let kvm = Kvm::new().expect("/dev/kvm");
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
    let image = Image::parse(&elf(code)).expect("a program");
    let config = Config { image: &image, command_line: "Z=1", vcpus, memory: 16 << 20, patience };
    let mut lines = Vec::new();
    let say = |line: &str| lines.push(line.to_owned());
    // With SVM there is nothing that firmware would have to set up.
    let end = nested::boot(&kvm, Extension::Svm, &cpuid, &config, say).expect("a VM");
    Some((lines, end))
}

const PATIENCE: Duration = Duration::from_secs(30);

/// Sets the serial line's clock, prints the command line, whose address stands in the start info at
/// EBX, then exits with 0x10.
const PRINT: [u8; 53] = [
    0x66, 0xba, 0xfb, 0x03, // mov dx, 0x3fb
    0xb0, 0x80, //       mov al, 0x80: what follows is the divisor
    0xee, //             out dx, al
    0xb2, 0xf8, //       mov dl, 0xf8
    0xb0, 0x41, //       mov al, 'A'
    0xee, //             out dx, al
    0xb2, 0xfb, //       mov dl, 0xfb
    0xb0, 0x03, //       mov al, 3
    0xee, //             out dx, al
    0x8b, 0x7b, 0x18, // mov edi, [ebx + 24]
    0x8a, 0x27, //       mov ah, [edi]
    0x84, 0xe4, //       test ah, ah
    0x74, 0x13, //       jz, to the end of the line
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, //             in al, dx
    0xa8, 0x20, //       test al, 0x20
    0x74, 0xfb, //       jz, back to `in`
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x88, 0xe0, //       mov al, ah
    0xee, //             out dx, al
    0x47, //             inc edi
    0xeb, 0xe7, //       jmp, to the next byte
    0xb0, 0x0a, //       mov al, newline
    0xee, //             out dx, al
    0xb0, 0x10, //       mov al, 0x10
    0xe6, 0xf4, //       out 0xf4, al
    0xf4, //             hlt
];

#[test]
fn a_program_finds_its_command_line_prints_and_exits() {
    let test = "a_program_finds_its_command_line_prints_and_exits";
    let Some((lines, end)) = run(test, &PRINT, 2, PATIENCE) else { return };
    assert_eq!((lines, end), (vec!["Z=1".to_owned()], End::Exit(0x10)));
}

#[test]
fn a_program_that_hangs_is_ended() {
    const JUMP_TO_ITSELF: [u8; 2] = [0xeb, 0xfe];
    let patience = Duration::from_millis(300);
    let Some((_, end)) = run("a_program_that_hangs_is_ended", &JUMP_TO_ITSELF, 2, patience) else {
        return;
    };
    assert_eq!(end, End::Silent);
}

#[test]
fn a_triple_fault_ends_the_run_and_says_where() {
    const UNDEFINED: [u8; 2] = [0x0f, 0x0b];
    let test = "a_triple_fault_ends_the_run_and_says_where";
    let Some((_, end)) = run(test, &UNDEFINED, 1, PATIENCE) else { return };
    let End::Stopped(why) = end else { panic!("{end:?}") };
    assert!(why.contains("Shutdown") && why.contains("rip"), "{why}");
}

#[test]
fn what_does_not_boot_is_refused_by_name() {
    let good = elf(&PRINT);
    let refused = |file: &[u8]| Image::parse(file).expect_err("refused").to_string();
    assert_eq!(Image::parse(&good).expect("a program").entry, LOAD);
    assert!(refused(b"MZ").contains("not a program for this boot"));
    let mut noteless = good.clone();
    noteless[64] = 6;
    assert!(refused(&noteless).contains("no PVH note"));
    let mut empty = good.clone();
    empty[64 + HEADER] = 6;
    assert!(refused(&empty).contains("nothing to load"));
    // Cut anywhere: refused, never a panic.
    for length in 0..good.len() {
        assert!(Image::parse(&good[..length]).is_err(), "cut at {length}");
    }
}
