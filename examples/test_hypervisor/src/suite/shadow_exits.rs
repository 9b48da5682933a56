//! Without nested tables: what shadow paging has to hear of stops the guest before it happens, and
//! the guest runs on the tables that the host says, whatever it believes its own to be.
//!
//! No MMU of the crates is used; the tables are four pages written here.

use core::sync::atomic::Ordering::Relaxed;

use mmu_core::addr::Level;

use crate::lab::Lab;
use crate::machine::memory::{BLOCK, Memory, PAGE};
use crate::virt::state::gpr::{RAX, RDI, RSI};
use crate::virt::{
    Exit, GuestState, HardwareLog, LocalFlush, Mode, Root, Translation, Vcpu, VcpuSetup, Virt,
};

/// What the guest does.
const PROGRAM: &[u8] = &[
    0x0f, 0x20, 0xd8, // mov %cr3, %rax
    0xe7, 0x10, // out %eax, $0x10
    0xb8, 0x00, 0x50, 0x00, 0x00, // mov $0x5000, %eax
    0x0f, 0x22, 0xd8, // mov %rax, %cr3
    0x0f, 0x01, 0x3f, // invlpg (%rdi)
    0x48, 0x89, 0x06, // mov %rax, (%rsi)
    0x0f, 0x20, 0xe0, // mov %cr4, %rax
    0x0d, 0x80, 0x00, 0x00, 0x00, // or $CR4.PGE, %eax
    0x0f, 0x22, 0xe0, // mov %rax, %cr4
    0x0f, 0x20, 0xc0, // mov %cr0, %rax
    0x25, 0xff, 0xff, 0xfe, 0xff, // and $~CR0.WP, %eax
    0x0f, 0x22, 0xc0, // mov %rax, %cr0
    0xf4, // hlt
];
/// Length of those of its instructions that exit and are not done.
const LENGTH: u64 = 3;

/// Where the store is in it.
const STORE: u64 = 16;

/// Linear address of the program, and the page in memory that it stands in.
const CODE: u64 = 0x1000;
const CODE_PAGE: u64 = 4;
/// Linear address that it writes to, and the pages in memory that are put there.
const WRITTEN: u64 = 0x7000;
const FIRST_PAGE: u64 = 5;
/// What the guest believes its CR3 to be.
const BELIEVED: u64 = 0x4000;
/// CR4.PGE, CR0.WP.
const PGE: u64 = 1 << 7;
const WP: u64 = 1 << 16;
/// Present, writable, accessed, dirty.
const ENTRY: u64 = 0x63;

/// See the file's head.
pub fn run<V: Virt>(lab: &mut Lab<V>) {
    let memory = Memory::new(BLOCK);
    let page = |number: u64| memory.start() + number * PAGE;
    for level in 0..3 {
        memory.word(level * PAGE).store(page(level + 1) | ENTRY, Relaxed);
    }
    let leaf = |linear: u64| memory.word(3 * PAGE + linear / PAGE * 8);
    leaf(CODE).store(page(CODE_PAGE) | ENTRY, Relaxed);
    memory.write(CODE_PAGE * PAGE, PROGRAM);

    let (translation, log) = (Translation::Shadow, HardwareLog::Off);
    let made = V::vcpu(VcpuSetup { translation, log, page_faults_exit: true });
    let Some(mut vcpu) = lab.went("a-vcpu-without-nested-tables", made) else { return };
    let root = Root { frame: memory.first(), levels: Level::L4, accessed_dirty: true };
    vcpu.set_root(root);
    *vcpu.state() = GuestState::new(Mode::Long, CODE, 0, BELIEVED);
    let state = vcpu.state();
    (state.gpr[RDI], state.gpr[RSI]) = (0x1234_5000, WRITTEN);
    let (cr0, cr4) = (state.cr0, state.cr4);

    // What it reads is what it believes.
    let exit = vcpu.run();
    let cr3 = Exit::Out { port: 0x10, size: 4, value: BELIEVED as u32 };
    lab.equal("the-guest-reads-its-own-cr3", exit, cr3);

    stops(lab, &mut vcpu, "cr3", 3, 0x5000);
    vcpu.state().cr3 = 0x5000;
    let exit = vcpu.run();
    let address = vcpu.state().gpr[RDI];
    let named = match exit {
        Exit::InvalidatePage { address: said } => said == address || said == 0,
        _ => false,
    };
    lab.check("invlpg", named, format_args!("{exit}"));
    vcpu.state().rip += LENGTH;
    vcpu.flush(LocalFlush::Linear(address));

    // The fault is the host's until the tables have the page.
    let fault = Exit::PageFault { address: WRITTEN, code: 2 };
    lab.equal("a-page-fault-is-the-hosts", vcpu.run(), fault);
    leaf(WRITTEN).store(page(FIRST_PAGE) | ENTRY, Relaxed);
    stops(lab, &mut vcpu, "cr4", 4, cr4 | PGE);
    let seen = memory.word(FIRST_PAGE * PAGE).load(Relaxed);
    lab.equal("the-page-put-there-is-written", seen, 0x5000);
    stops(lab, &mut vcpu, "cr0", 0, cr0 & !WP);
    lab.equal("the-program-ends", vcpu.run(), Exit::Halt);

    // Another page in its place, the address forgotten: the same instruction writes there.
    leaf(WRITTEN).store(page(FIRST_PAGE + 1) | ENTRY, Relaxed);
    vcpu.flush(LocalFlush::Linear(WRITTEN));
    let again = CODE + STORE;
    let state = vcpu.state();
    (state.rip, state.gpr[RAX]) = (again, 0x77);
    let exit = vcpu.run();
    let seen = memory.word((FIRST_PAGE + 1) * PAGE).load(Relaxed);
    lab.check("one-address-forgotten", seen == 0x77, format_args!("{seen:#x}, {exit}"));
}

/// The guest's next stop is a write of `value` to control register `register`, which is not done;
/// step over it.
fn stops<V: Virt>(lab: &mut Lab<V>, vcpu: &mut V::Vcpu, name: &str, register: u8, value: u64) {
    let exit = vcpu.run();
    let state = vcpu.state();
    let held = match exit {
        Exit::ControlWrite { register: written, .. } => {
            written == register && state.gpr[RAX] == value
        }
        _ => false,
    };
    lab.check(name, held, format_args!("{exit}, RAX {:#x}", state.gpr[RAX]));
    state.rip += LENGTH;
}
