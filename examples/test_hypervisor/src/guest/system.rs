//! What a 64-bit guest with tables of its own needs: an address space, descriptor tables, and a
//! handler for its page faults.
//!
//! Owns [`Space`]. Linear addresses, in every space:
//!
//! | linear | what |
//! |---|---|
//! | 0 to 2 MiB | the low block, for the supervisor |
//! | [`USER`], 2 MiB | the low block again, for user mode |
//! | [`DATA`] upward | the data, for both |
//!
//! In the low block: [`super::layout`]'s code and stacks, descriptors and task states from
//! [`GDT`] on, tables from where [`Ram`] takes them. No locks.

use core::sync::atomic::Ordering;

use mmu_core::addr::Level;

use super::layout::{self, CODE_64, DATA, LOW_BYTES};
use super::program::{self, Program};
use super::tree::Tree;
use crate::machine::memory::PAGE;
use crate::shadow::ram::Ram;
use crate::virt::{GuestState, Mode, Segment, Table};

/// Present, writable, user, accessed, dirty, large; no execute.
pub const P: u64 = 1;
/// See [`P`].
pub const W: u64 = 1 << 1;
/// See [`P`].
pub const U: u64 = 1 << 2;
/// See [`P`].
pub const A: u64 = 1 << 5;
/// See [`P`].
pub const D: u64 = 1 << 6;
/// See [`P`].
pub const PS: u64 = 1 << 7;
/// See [`P`].
pub const NX: u64 = 1 << 63;

/// First linear address of the low block as user mode sees it.
pub const USER: u64 = 2 << 20;
/// The descriptor tables in the low block.
pub const GDT: u64 = 0xc000;
const IDT: u64 = 0xd000;
/// A task state a vCPU.
const TASKS: u64 = 0xe000;
const TASK_BYTES: u64 = 0x80;
/// Stacks of handlers, a page a vCPU, growing down from the end.
const HANDLER_STACKS: u64 = 0x11_0000;

/// Null, 64-bit code, data, then both for user mode.
const DESCRIPTORS: [u64; 5] =
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
const CODE: u64 = 8;
const USER_DATA: u16 = 0x18;
const USER_CODE: u16 = 0x20;
/// An interrupt gate, present.
const GATE: u64 = 0x8e00;
const PAGE_FAULT: u64 = 14;

/// Code, stacks and descriptors into the low block.
pub fn prepare(ram: &Ram) {
    let low = &ram.low;
    let [code_64, code_32, _] = program::blobs();
    low.write(CODE_64, code_64);
    low.write(layout::CODE_32, code_32);
    let set = |at: u64, value: u64| low.word(at).store(value, Ordering::Relaxed);
    for (index, descriptor) in (0..).zip(DESCRIPTORS) {
        set(GDT + index * 8, descriptor);
    }
    let handler = Program::Handler.entry();
    let gate = handler & 0xffff | CODE << 16 | GATE << 32 | (handler >> 16 & 0xffff) << 48;
    set(IDT + PAGE_FAULT * 16, gate);
    set(IDT + PAGE_FAULT * 16 + 8, handler >> 32);
    for vcpu in 0..layout::MAX_STACKS {
        // RSP0 is at byte 4: its lower half ends one word, its upper half begins the next.
        let stack = HANDLER_STACKS + (vcpu + 1) * PAGE;
        set(TASKS + vcpu * TASK_BYTES, stack << 32);
    }
}

/// Who a program runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// CPL 0.
    Supervisor,
    /// CPL 3.
    User,
}

impl Ring {
    /// What is added to the address of code and stack in the low block.
    pub const fn base(self) -> u64 {
        match self {
            Self::Supervisor => 0,
            Self::User => USER,
        }
    }
}

/// Registers of vCPU `vcpu` in the space at `root`, about to run in `ring`.
pub fn registers(vcpu: usize, root: u64, ring: Ring) -> GuestState {
    let stack = layout::stack(vcpu) + ring.base();
    let mut state = GuestState::new(Mode::Long, CODE_64, stack, root);
    state.gdtr = Table { base: GDT, limit: (DESCRIPTORS.len() * 8 - 1) as u16 };
    state.idtr = Table { base: IDT, limit: (PAGE_FAULT * 16 + 15) as u16 };
    let task = TASKS + vcpu as u64 * TASK_BYTES;
    state.tr = Segment { selector: 0x28, base: task, limit: 0x67, access: 0x8b };
    match ring {
        Ring::Supervisor => state,
        Ring::User => state.in_user_mode(USER_CODE, USER_DATA),
    }
}

/// An address space.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// Its tables.
    pub tree: Tree,
}

impl Space {
    /// The low block mapped twice, small pages, accessed and dirty; no data yet.
    pub fn new(ram: &Ram) -> Self {
        let tree = Tree::new(ram, Level::L4, P | W | U | A);
        for offset in (0..LOW_BYTES).step_by(PAGE as usize) {
            let page = (ram.low.start() + offset) | P | W | A | D;
            tree.set(ram, offset, Level::L1, page);
            tree.set(ram, USER + offset, Level::L1, page | U);
        }
        Self { tree }
    }

    /// The same with all data from [`DATA`] on, in pages of `level`, for user mode, never used.
    pub fn with_data(ram: &Ram, level: Level) -> Self {
        let space = Self::new(ram);
        let large = if level == Level::L1 { 0 } else { PS };
        let bytes = level.pages() * PAGE;
        for offset in (0..ram.data.bytes()).step_by(bytes as usize) {
            let entry = (ram.data.start() + offset) | P | W | U | large;
            space.tree.set(ram, DATA + offset, level, entry);
        }
        space
    }

    /// Guest physical address of the small page's entry for `linear`.
    pub fn entry(&self, ram: &Ram, linear: u64) -> u64 {
        self.tree.place(ram, linear, Level::L1)
    }
}

/// Linear address at which a supervisor finds what is at `gpa` in the low block.
pub fn linear_of(ram: &Ram, gpa: u64) -> u64 {
    gpa - ram.low.start()
}
