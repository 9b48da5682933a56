//! Guest walks against the walkers behind /dev/kvm: KVM's own, asked through KVM_TRANSLATE, and the
//! processor's, asked by programs that read, write and call into generated tables at CPL 3 (and, as
//! KVM emulates it, at CPL 0) and note the error code of every page fault.
//!
//! A capability that the processor does not offer is an input of our walk, as it is of KVM's. Every
//! set of tables gets a machine of its own and is written before that machine runs. Where /dev/kvm
//! does not open each test says so, loudly, and passes.

mod guest_support;
#[path = "common/skip.rs"]
mod skip;
#[path = "guest_support/vm.rs"]
mod vm;

use std::arch::global_asm;
use std::slice;
use std::time::Instant;

use guest_support::pages::Pages;
use guest_support::{A, D, LINK, NX, P, PS, U, W};
use kvm_bindings::kvm_regs;
use kvm_ioctls::Kvm;
use mmu_core::addr::{Gpa, Gva};
use mmu_model::Random;
use shadow_mmu::guest::{
    Cause, EntryWidth, Exchange, GuestControls, GuestCpu, GuestMem, GuestRoot, GuestWalker,
    NotMemory, Operation, Privilege, Request, WalkError, WriteProtect,
};
use vm::{
    CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PSE, CR4_SMAP, CR4_SMEP, Controls, EFER_LMA,
    EFER_LME, EFER_NXE, Offered, PAGE, Vm,
};

const NO_SUCH_GUESTS: &str = "this KVM has no such guests";

/// Skips aloud.
fn open(test: &str) -> Option<Kvm> {
    match vm::open() {
        Ok(kvm) => Some(kvm),
        Err(why) => {
            skip::aloud("no /dev/kvm", test, why);
            None
        }
    }
}

fn cpu(offered: &Offered) -> GuestCpu {
    GuestCpu {
        max_phys_bits: offered.max_phys_bits,
        nx: offered.nx,
        gbpages: offered.gbpages,
        pse36: true,
        la57: offered.la57,
        pku: offered.pku,
        amd: offered.amd,
    }
}

fn long_mode(root: u64) -> Controls {
    Controls {
        cr0: CR0_PE | CR0_PG | CR0_WP,
        cr3: root,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA | EFER_NXE,
    }
}

/// The guest's memory, for our walker: KVM sees the bits that it sets.
struct Shared<'v>(&'v Vm, u64);

impl GuestMem for Shared<'_> {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        if at.get() >= self.1 {
            return Err(NotMemory { at });
        }
        Ok(match width {
            EntryWidth::Eight => self.0.get(at.get()),
            EntryWidth::Four => self.0.get(at.get()) & 0xffff_ffff,
        })
    }

    fn compare_exchange(
        &self,
        _: Gpa,
        _: EntryWidth,
        _: u64,
        _: u64,
    ) -> Result<Exchange, NotMemory> {
        // Left for KVM to set.
        Ok(Exchange::ReadOnly)
    }
}

/// Translations asked of KVM in each mode.
const TRANSLATIONS: u64 = 120_000;
/// Pages of the machine that is asked.
const SMALL: u64 = 64;
/// First of its tables, one for each level.
const TABLE: u64 = 8;

/// A random entry: mostly a sound one, into the tables or the memory, sometimes out of it.
fn entry(random: &mut Random, level: u64, bits: u64) -> u64 {
    let mut value = LINK | random.next_u64() & 0xe18;
    for (wrong, chance) in [(P, 24), (W, 6), (U, 6)] {
        if random.chance(1, chance) {
            value &= !wrong;
        }
    }
    for (extra, chance) in [(A, 2), (D, 2), (PS, 4), (NX, 8), (1 << 51, 32), (1 << 52, 32)] {
        if random.chance(1, chance) {
            value |= extra;
        }
    }
    if random.chance(1, 32) {
        value |= 1 << random.below(64);
    }
    value |= match random.below(16) {
        0 => (SMALL + random.below(64)) * PAGE,
        _ if value & PS != 0 && level > 1 => random.below(4) << (12 + bits * (level - 1)),
        _ if level > 1 => (TABLE + level - 1) * PAGE,
        _ => random.below(SMALL) * PAGE,
    };
    if bits == 10 { value & 0xffff_ffff } else { value }
}

/// What happened in a comparison of translations.
#[derive(Default)]
struct Tally {
    cases: u64,
    translated: u64,
    refused: u64,
}

impl Tally {
    fn print(&self, what: &str, begun: Instant) {
        eprintln!(
            "KVM_TRANSLATE, {what}: {} cases agree, {} translated, {} refused; {:.1} s",
            self.cases,
            self.translated,
            self.refused,
            begun.elapsed().as_secs_f64()
        );
        let enough = self.cases / 20;
        assert!(self.translated > enough && self.refused > enough, "{what}");
    }
}

/// Ask both for one address: by a supervisor's read, permissions apart.
fn ask(vm: &Vm, walker: &GuestWalker, root: &GuestRoot, gva: u64, tally: &mut Tally) {
    let request = Request::new(Operation::Read, Privilege::SupervisorAc);
    let mem = Shared(vm, SMALL * PAGE);
    let ours = walker.walk(&mem, root, Gva::new(gva), request);
    let theirs = vm.translate(gva);
    tally.cases += 1;
    match (&ours, theirs) {
        (Ok(walk), Some(pa)) => {
            assert_eq!(walk.gpa().get(), pa, "{gva:#x}: {walk:x?}");
            tally.translated += 1;
            // KVM has set the accessed bits that we left to it.
            for entry in &walk.path.entries {
                let now = mem.read(entry.gpa, entry.width).expect("a table");
                assert_eq!(now, entry.value | A, "{gva:#x}: {entry:x?}");
            }
        }
        (Err(WalkError::Fault(_)), None) => tally.refused += 1,
        _ => panic!("{gva:#x}: ours {ours:x?}, KVM's {theirs:x?}; {:?}", vm.offered),
    }
}

/// Long mode of so many levels, asked for addresses all over the linear address space.
fn long_translations(kvm: &Kvm, levels: u64, nxe: u64, test: &str) {
    let seed = 0x7001 + levels;
    let mut random = Random::new(seed);
    let begun = Instant::now();
    let vm = Vm::new(kvm, SMALL);
    let root = (TABLE + levels) * PAGE;
    let mut controls = long_mode(root);
    controls.efer = controls.efer & !EFER_NXE | nxe;
    let mut ours = GuestControls::LONG;
    ours.set(GuestControls::NXE, nxe != 0);
    if levels == 5 {
        controls.cr4 |= CR4_LA57;
        ours |= GuestControls::LA57;
    }
    let accepted = match vm.offered.la57 || levels == 4 {
        true => vm.set_controls(&controls),
        false => Err("its CPUID has no LA57".into()),
    };
    if let Err(why) = accepted.and_then(|()| probe(&vm, levels)) {
        assert_eq!(levels, 5, "four levels are there: {why}");
        skip::aloud(NO_SUCH_GUESTS, test, format_args!("5 levels: {why}"));
        return;
    }
    let walker = GuestWalker::new(&cpu(&vm.offered), ours).expect("what KVM offers");
    let mut tally = Tally::default();
    for _ in 0..TRANSLATIONS / 2 {
        let unused = 64 - (12 + 9 * levels);
        let gva = (random.next_u64() as i64 >> unused) as u64;
        for level in 1..=levels {
            let index = gva >> (12 + 9 * (level - 1)) & 511;
            vm.set((TABLE + level) * PAGE + index * 8, entry(&mut random, level, 9));
        }
        ask(&vm, &walker, &GuestRoot::Cr3(root), gva, &mut tally);
    }
    let what = format!("{levels} levels, NXE {}, seed {seed:#x}", nxe != 0);
    tally.print(&what, begun);
}

/// A KVM without guests of a mode may take the registers and walk nothing.
fn probe(vm: &Vm, levels: u64) -> Result<(), String> {
    for level in 2..=levels {
        vm.set((TABLE + level) * PAGE, ((TABLE + level - 1) * PAGE) | LINK);
    }
    vm.set((TABLE + 1) * PAGE, (5 * PAGE) | LINK);
    match vm.translate(0x123) {
        Some(pa) if pa == 5 * PAGE + 0x123 => Ok(()),
        other => Err(format!("0x123 leads to {other:x?}")),
    }
}

#[test]
fn translations_agree_with_kvm() {
    let test = "translations_agree_with_kvm";
    let Some(kvm) = open(test) else { return };
    for levels in [4, 5] {
        for nxe in [EFER_NXE, 0] {
            long_translations(&kvm, levels, nxe, test);
        }
    }
}

/// 32-bit and PAE paging, where KVM takes such control registers. Nothing runs in these modes.
#[test]
fn translations_of_the_older_modes_agree_with_kvm() {
    let test = "translations_of_the_older_modes_agree_with_kvm";
    let Some(kvm) = open(test) else { return };
    let (seed, begun) = (0x7002, Instant::now());
    let mut random = Random::new(seed);
    for (mode, levels, cr4, ours) in [
        ("32-bit", 2_u64, 0, GuestControls::PG),
        ("32-bit with PSE", 2, CR4_PSE, GuestControls::PG | GuestControls::PSE),
        ("PAE", 2, CR4_PAE, GuestControls::PG | GuestControls::PAE | GuestControls::NXE),
    ] {
        let vm = Vm::new(&kvm, SMALL);
        let root = (TABLE + levels) * PAGE;
        let pae = cr4 & CR4_PAE != 0;
        let bits = if pae { 9 } else { 10 };
        let cr3 = if pae { TABLE * PAGE } else { root };
        for pointer in 0..4 {
            vm.set(TABLE * PAGE + 8 * pointer, root | P);
        }
        let efer = if pae { EFER_NXE } else { 0 };
        let controls = Controls { cr0: CR0_PE | CR0_PG | CR0_WP, cr3, cr4, efer };
        let accepted = vm.set_controls(&controls);
        if let Err(why) = accepted.and_then(|()| probe(&vm, levels)) {
            skip::aloud(NO_SUCH_GUESTS, test, format_args!("{mode}: {why}"));
            continue;
        }
        let walker = GuestWalker::new(&cpu(&vm.offered), ours).expect("what KVM offers");
        let our_root = if pae {
            let mem = Shared(&vm, SMALL * PAGE);
            GuestRoot::Pae(walker.load_pointers(&mem, cr3).expect("sound pointers"))
        } else {
            GuestRoot::Cr3(cr3)
        };
        let mut tally = Tally::default();
        for _ in 0..TRANSLATIONS / 4 {
            let gva = random.next_u64() & 0xffff_ffff;
            for level in 1..=levels {
                let index = gva >> (12 + bits * (level - 1)) & ((1 << bits) - 1);
                let value = entry(&mut random, level, bits);
                let at = (TABLE + level) * PAGE;
                if pae {
                    vm.set(at + 8 * index, value);
                } else {
                    vm.set_bytes(at + 4 * index, &(value as u32).to_le_bytes());
                }
            }
            ask(&vm, &walker, &our_root, gva, &mut tally);
        }
        tally.print(&format!("{mode}, seed {seed:#x}"), begun);
    }
}

// Real accesses. Registers of the program:
//   rsi record: address, operation, error code, CR2 or what was read      r12 records left
//   r13 its stack      r14 where the handler resumes it
global_asm!(
    ".pushsection .rodata.guest_kvm_stub, \"a\", @progbits",
    ".balign 16",
    ".globl guest_kvm_handler",
    "guest_kvm_handler:",
    "    pop rdx",
    "    mov [rsi + 16], rdx",
    "    mov rdx, cr2",
    "    mov [rsi + 24], rdx",
    "    mov [rsp], r14",
    "    iretq",
    ".balign 16",
    ".globl guest_kvm_program",
    "guest_kvm_program:",
    "    mov rsp, r13",
    "    mov rdi, [rsi]",
    "    mov eax, [rsi + 8]",
    "    mov qword ptr [rsi + 16], -1",
    "    cmp eax, 1",
    "    je 2f",
    "    ja 3f",
    "    mov rdx, [rdi + 8]",
    "    mov [rsi + 24], rdx",
    "    jmp 4f",
    "2:  mov [rdi + 16], rsi",
    "    jmp 4f",
    "3:  call rdi",
    ".globl guest_kvm_resume",
    "guest_kvm_resume:",
    "4:  add rsi, 32",
    "    dec r12",
    "    jnz guest_kvm_program",
    "    out 0x40, al",
    "    hlt",
    ".globl guest_kvm_end",
    "guest_kvm_end:",
    ".popsection",
);

unsafe extern "C" {
    static guest_kvm_handler: u8;
    static guest_kvm_program: u8;
    static guest_kvm_resume: u8;
    static guest_kvm_end: u8;
}

/// The stub's bytes, and the offsets of program and resume point.
fn stub() -> (&'static [u8], u64, u64) {
    let start = &raw const guest_kvm_handler;
    let from = |place: *const u8| place as usize - start as usize;
    let bytes = from(&raw const guest_kvm_end);
    // SAFETY: the two symbols delimit bytes of this program's read-only data.
    let code = unsafe { slice::from_raw_parts(start, bytes) };
    let offsets = [&raw const guest_kvm_program, &raw const guest_kvm_resume].map(from);
    (code, offsets[0] as u64, offsets[1] as u64)
}

// Pages of a machine that runs. All of the stub is mapped where it lies, by entry 0 of the PML4.
const CODE: u64 = 1;
const KERNEL_STACK: u64 = 2;
const STACK: u64 = 3;
const RECORDS: u64 = 8;
const RECORD_PAGES: u64 = 32;
/// Records of 32 bytes.
const ACCESSES: u64 = RECORD_PAGES * PAGE / 32;
const TABLES: u64 = 64;
/// Tables of each level below the top that the generated part has; they are shared freely.
const POOL: [u64; 4] = [0, 48, 24, 12];
/// Places used in each generated table.
const USED: u64 = 16;
/// Data: aligned for 2 MiB.
const DATA: u64 = 512;
const PAGES: u64 = 512 + 4 * 512;

/// One machine's worth of tables and accesses.
struct Batch {
    vm: Vm,
    /// The same tables, walked by us.
    ours: Pages,
    root: u64,
    places: Vec<u64>,
}

/// How the accesses are made.
#[derive(Clone, Copy, Debug)]
struct Setting {
    ring: u8,
    nxe: bool,
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
}

impl Batch {
    fn new(kvm: &Kvm, random: &mut Random, setting: &Setting) -> Self {
        let vm = Vm::new(kvm, PAGES);
        let (code, ..) = stub();
        vm.set_bytes(CODE * PAGE, code);
        vm.install(CODE * PAGE, (KERNEL_STACK + 1) * PAGE);
        for page in DATA..PAGES {
            // A `ret`, and the page's number.
            vm.set(page * PAGE, 0xc3);
            vm.set(page * PAGE + 8, page);
        }
        let root = TABLES * PAGE;
        let mut batch = Self { vm, ours: Pages::new(), root, places: Vec::new() };
        batch.map_stub(setting);
        batch.generate(random);
        for page in 0..PAGES {
            if (TABLES..DATA).contains(&page) {
                for word in 0..512 {
                    let at = page * PAGE + 8 * word;
                    batch.ours.set(at, 8, batch.vm.get(at));
                }
            }
        }
        batch
    }

    /// Entry 0 of the PML4: the first 2 MiB, small pages. For a program at CPL 0 they are the
    /// supervisor's.
    fn map_stub(&self, setting: &Setting) {
        let open = if setting.ring == 3 { LINK } else { P | W };
        for level in 1..4 {
            self.vm.set((TABLES + level - 1) * PAGE, ((TABLES + level) * PAGE) | open);
        }
        for page in 0..DATA {
            self.vm.set((TABLES + 3) * PAGE + 8 * page, (page * PAGE) | open | A | D);
        }
    }

    fn pool(level: u64) -> u64 {
        // By level from 1: the page of its first table.
        let first = TABLES + 8;
        first + POOL.iter().skip(1).take(level as usize - 1).sum::<u64>()
    }

    /// Tables with random entries at the same places in each; any entry may lead to any table of
    /// the level below.
    fn generate(&mut self, random: &mut Random) {
        let mut places = Vec::new();
        while (places.len() as u64) < USED {
            let place = 1 + random.below(511);
            // The upper half's first entry is not the guest's own on some hosts.
            if place != 256 && !places.contains(&place) {
                places.push(place);
            }
        }
        let offered = self.vm.offered;
        for level in 1..=4_u64 {
            let tables = if level == 4 { 1 } else { POOL[level as usize] };
            for table in 0..tables {
                let page = if level == 4 { TABLES } else { Self::pool(level) + table };
                for place in &places {
                    let value = generated(random, level, &offered);
                    self.vm.set(page * PAGE + 8 * place, value);
                }
            }
        }
        self.places = places;
    }

    fn address(&self, random: &mut Random) -> u64 {
        let mut address = 0;
        for level in 1..=4 {
            let place = self.places[random.below(USED) as usize];
            address |= place << (12 + 9 * (level - 1));
        }
        (address << 16) as i64 as u64 >> 16 | if address >> 47 & 1 != 0 { !0 << 48 } else { 0 }
    }
}

/// An entry that a program meets: never out of memory.
fn generated(random: &mut Random, level: u64, offered: &Offered) -> u64 {
    let mut value = LINK | random.next_u64() & 0x07f0_0000_0000_0e00;
    for (wrong, chance) in [(P, 32), (W, 10), (U, 16)] {
        if random.chance(1, chance) {
            value &= !wrong;
        }
    }
    for (extra, chance) in [(A, 2), (D, 2), (NX, 12)] {
        if random.chance(1, chance) {
            value |= extra;
        }
    }
    let large = match level {
        2 => random.chance(1, 4),
        // Where pages of 1 GiB exist they would reach out of memory; elsewhere the bit is reserved.
        3 => !offered.gbpages && random.chance(1, 24),
        4 => random.chance(1, 32),
        _ => false,
    };
    if large {
        value |= PS;
    }
    let reserved = [51, u64::from(offered.max_phys_bits), 8];
    if random.chance(1, 24) {
        let bit = reserved[random.below(3) as usize];
        // Bit 8 is the global bit of a leaf; at the top it is AMD's.
        if bit < 52 && (bit != 8 || level == 4) {
            value |= 1 << bit;
        }
    }
    match level {
        2 if large => {
            let misaligned = if random.chance(1, 16) { 1 << (13 + random.below(8)) } else { 0 };
            value | ((DATA + 512 * random.below(4)) * PAGE) | misaligned
        }
        1 => value | ((DATA + random.below(PAGES - DATA)) * PAGE),
        _ => value | ((Batch::pool(level - 1) + random.below(POOL[level as usize - 1])) * PAGE),
    }
}

const OPERATIONS: [Operation; 3] = [Operation::Read, Operation::Write, Operation::Fetch];

/// What a batch came to.
#[derive(Default)]
struct Outcome {
    accesses: u64,
    faults: [u64; 32],
    /// Entries whose accessed bit the processor has set and we have not: allowed to it.
    more_accessed: u64,
    /// Accesses that could not be made.
    skipped: u64,
}

/// Make the accesses, then the same walks, and compare.
fn compare(kvm: &Kvm, random: &mut Random, setting: &Setting, outcome: &mut Outcome) {
    let mut batch = Batch::new(kvm, random, setting);
    let records: Vec<(u64, usize)> =
        (0..ACCESSES).map(|_| (batch.address(random), random.below(3) as usize)).collect();
    for (at, (address, operation)) in (RECORDS * PAGE..).step_by(32).zip(&records) {
        batch.vm.set(at, *address);
        batch.vm.set(at + 8, *operation as u64);
    }
    let (_, program, resume) = stub();
    let regs = kvm_regs {
        rip: CODE * PAGE + program,
        rsp: (STACK + 1) * PAGE,
        rsi: RECORDS * PAGE,
        r12: ACCESSES,
        r13: (STACK + 1) * PAGE,
        r14: CODE * PAGE + resume,
        rflags: 2 | if setting.ac { 1 << 18 } else { 0 },
        ..kvm_regs::default()
    };
    let mut controls = long_mode(batch.root);
    for (on, bit) in [(setting.smep, CR4_SMEP), (setting.smap, CR4_SMAP)] {
        controls.cr4 |= if on { bit } else { 0 };
    }
    if !setting.wp {
        controls.cr0 &= !CR0_WP;
    }
    if !setting.nxe {
        controls.efer &= !EFER_NXE;
    }
    if let Err(why) = batch.vm.set_controls(&controls) {
        skip::aloud(NO_SUCH_GUESTS, "real accesses", format_args!("{setting:?}: {why}"));
        outcome.skipped += ACCESSES;
        return;
    }
    batch.vm.run(&controls, &regs, setting.ring).expect("the program runs to its end");
    check(&batch, setting, &records, outcome);
}

fn check(batch: &Batch, setting: &Setting, records: &[(u64, usize)], outcome: &mut Outcome) {
    let mut ours = GuestControls::LONG;
    ours.set(GuestControls::NXE, setting.nxe);
    ours.set(GuestControls::SMEP, setting.smep);
    ours.set(GuestControls::SMAP, setting.smap);
    let walker = GuestWalker::new(&cpu(&batch.vm.offered), ours).expect("what KVM offers");
    let privilege = match (setting.ring, setting.ac) {
        (3, _) => Privilege::User,
        (_, true) => Privilege::SupervisorAc,
        (_, false) => Privilege::Supervisor,
    };
    let write_protect = if setting.wp { WriteProtect::On } else { WriteProtect::Off };
    let mut written = vec![0; PAGES as usize];
    for (at, (address, operation)) in (RECORDS * PAGE..).step_by(32).zip(records) {
        let operation = OPERATIONS[*operation];
        let request = Request { operation, privilege, write_protect, pkru: 0 };
        let root = GuestRoot::Cr3(batch.root);
        let found = walker.walk(&batch.ours, &root, Gva::new(*address), request);
        let (code, value) = (batch.vm.get(at + 16), batch.vm.get(at + 24));
        let what = format!("{setting:?} {operation:?} of {address:#x}: {found:x?}");
        outcome.accesses += 1;
        match found {
            Ok(walk) => {
                assert_eq!(code, u64::MAX, "no fault: {what}");
                let page = walk.path.gfn.get();
                match operation {
                    Operation::Read => assert_eq!(value, page, "{what}"),
                    Operation::Write => written[page as usize] = at,
                    Operation::Fetch => {}
                }
            }
            Err(WalkError::Fault(fault)) => {
                assert_eq!(code, fault.code.bits(), "{what}");
                // A read is of the second word of the page, a write of its third.
                let offset = value - address;
                assert!(
                    matches!(
                        (operation, offset),
                        (Operation::Read, 8) | (Operation::Write, 16) | (Operation::Fetch, 0)
                    ),
                    "CR2 {value:#x}: {what}"
                );
                assert_ne!(fault.cause, Cause::NotMemory, "{what}");
                outcome.faults[code as usize] += 1;
            }
            Err(error) => panic!("{error}: {what}"),
        }
    }
    for (page, record) in (0..).zip(&written).skip(DATA as usize) {
        assert_eq!(batch.vm.get(page * PAGE + 16), *record, "what page {page:#x} was given last");
    }
    bits(batch, setting, outcome);
}

/// Accessed and dirty bits after all that. A processor may set accessed bits early, on the way to a
/// fault or by speculation; it may not forget one, nor set a dirty bit without a write.
fn bits(batch: &Batch, setting: &Setting, outcome: &mut Outcome) {
    // The first four tables lead to the stub.
    let tables = (TABLES + 8..DATA).chain([TABLES]);
    for page in tables {
        for place in &batch.places {
            let at = page * PAGE + 8 * place;
            let (theirs, ours) = (batch.vm.get(at), batch.ours.get(at, 8).expect("copied"));
            assert_eq!(theirs & !A, ours & !A, "{setting:?}: the entry at {at:#x}");
            assert!(theirs & A >= ours & A, "{setting:?}: the entry at {at:#x} was accessed");
            outcome.more_accessed += u64::from(theirs & A > ours & A);
        }
    }
}

fn print(name: &str, seed: u64, outcome: &Outcome, begun: Instant) {
    let faults: u64 = outcome.faults.iter().sum();
    let codes: Vec<String> = (0..32)
        .filter(|code| outcome.faults[*code] > 0)
        .map(|code| format!("{code:#x} {}", outcome.faults[code]))
        .collect();
    eprintln!(
        "REAL ACCESSES {name}, seed {seed:#x}: {} agree, {faults} of them faults ({}); {} entries \
         were accessed earlier than ours; {:.1} s",
        outcome.accesses,
        codes.join(", "),
        outcome.more_accessed,
        begun.elapsed().as_secs_f64()
    );
    assert!(faults > outcome.accesses / 10 && faults < outcome.accesses * 9 / 10, "{faults}");
}

#[test]
fn real_accesses_at_cpl_3_end_as_ours_do() {
    let Some(kvm) = open("real_accesses_at_cpl_3_end_as_ours_do") else { return };
    let (seed, begun) = (0x7003, Instant::now());
    let mut random = Random::new(seed);
    let mut outcome = Outcome::default();
    for batch in 0..28 {
        let nxe = batch % 4 != 3;
        let setting = Setting { ring: 3, nxe, wp: true, smep: false, smap: false, ac: false };
        compare(&kvm, &mut random, &setting, &mut outcome);
    }
    print("at CPL 3", seed, &outcome, begun);
    assert!(outcome.accesses >= 100_000);
}

/// What a supervisor may do: WP, SMEP, SMAP and EFLAGS.AC in every combination.
#[test]
fn accesses_at_cpl_0_end_as_ours_do() {
    let Some(kvm) = open("accesses_at_cpl_0_end_as_ours_do") else { return };
    let (seed, begun) = (0x7004, Instant::now());
    let mut random = Random::new(seed);
    let mut outcome = Outcome::default();
    for bits in 0..16 {
        let setting = Setting {
            ring: 0,
            nxe: true,
            wp: bits & 1 != 0,
            smep: bits & 2 != 0,
            smap: bits & 4 != 0,
            ac: bits & 8 != 0,
        };
        compare(&kvm, &mut random, &setting, &mut outcome);
    }
    print("at CPL 0", seed, &outcome, begun);
    assert_eq!(outcome.accesses + outcome.skipped, 16 * ACCESSES);
}
