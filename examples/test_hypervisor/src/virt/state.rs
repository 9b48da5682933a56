//! A guest's registers, and the states that guests begin in.
//!
//! Owns [`GuestState`] and its parts. Segments are kept as VMX describes them; `svm` packs the
//! access rights its own way. Values only; no locks.

use x86::controlregs::{Cr0, Cr4};

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// First linear address.
    pub base: u64,
    /// Last offset, in bytes.
    pub limit: u32,
    /// Access rights as bits 23:8 of a descriptor's second word: type 3:0, S 4, DPL 6:5, P 7,
    /// AVL 12, L 13, D/B 14, G 15.
    pub access: u16,
}

impl Segment {
    /// Not usable: no P bit.
    pub const NONE: Self = Self { selector: 0, base: 0, limit: 0, access: 0 };

    /// Present?
    pub const fn is_present(&self) -> bool {
        self.access & 0x80 != 0
    }

    const fn flat(selector: u16, access: u16) -> Self {
        Self { selector, base: 0, limit: u32::MAX, access }
    }

    const fn real(paragraph: u16, access: u16) -> Self {
        Self { selector: paragraph, base: (paragraph as u64) << 4, limit: 0xffff, access }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Linear address.
    pub base: u64,
    /// Last offset.
    pub limit: u16,
}

/// How the guest's CPU works when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 16-bit, no paging.
    Real,
    /// 32-bit, no paging.
    Protected,
    /// 32-bit, 4 KiB and 4 MiB pages, tables of two levels.
    Paged32,
    /// 32-bit with PAE.
    Pae,
    /// 64-bit, 4 levels.
    Long,
}

/// A guest's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
#[repr(C)]
pub struct GuestState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the order of their numbers.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: Table,
    pub idtr: Table,
    /// With PAE paging, the four entries at CR3: VMX takes them from here, SVM from memory.
    pub pdpte: [u64; 4],
}

/// Numbers of registers in [`GuestState::gpr`].
pub mod gpr {
    /// RAX.
    pub const RAX: usize = 0;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
    /// RSI.
    pub const RSI: usize = 6;
    /// RDI.
    pub const RDI: usize = 7;
    /// R8.
    pub const R8: usize = 8;
    /// R9.
    pub const R9: usize = 9;
    /// R10.
    pub const R10: usize = 10;
    /// R11.
    pub const R11: usize = 11;
    /// R12.
    pub const R12: usize = 12;
    /// R13.
    pub const R13: usize = 13;
}

/// The bit that is always set, and IF: if this program is itself a guest, on some machines an
/// interrupt for *its* host does not end a guest of ours that has interrupts off.
const RFLAGS: u64 = 1 << 1 | 1 << 9;
/// EFER.LME and LMA, NXE.
const EFER_LONG: u64 = 1 << 8 | 1 << 10 | 1 << 11;

/// IOPL 3: programs in user mode end with OUT like others.
const IOPL: u64 = 3 << 12;

impl GuestState {
    /// The same at CPL 3, whose 64-bit code and data segments have these selectors.
    pub fn in_user_mode(mut self, code: u16, data: u16) -> Self {
        let user = |segment: Segment, selector: u16| Segment {
            selector: selector | 3,
            access: segment.access | 3 << 5,
            ..segment
        };
        self.cs = user(self.cs, code);
        for segment in [&mut self.es, &mut self.ss, &mut self.ds, &mut self.fs, &mut self.gs] {
            *segment = user(*segment, data);
        }
        self.rflags |= IOPL;
        self
    }

    /// A guest about to execute at `ip` in `mode`, with its stack below `stack` and, where the mode
    /// pages, its tables at `tables`. There are no descriptor tables: the first exception is a
    /// triple fault. Interrupts are on, and none is ever injected.
    pub fn new(mode: Mode, ip: u64, stack: u64, tables: u64) -> Self {
        let mut state = Self { rip: ip, rflags: RFLAGS, ..Self::default() };
        state.gpr[gpr::RSP] = stack;
        // Busy 32-bit (or 64-bit) TSS: VMX insists on one.
        state.tr = Segment { selector: 0, base: 0, limit: 0x67, access: 0x8b };
        state.ldtr = Segment::NONE;
        let (code, data) = match mode {
            Mode::Real => (Segment::real(0, 0x9b), Segment::real(0, 0x93)),
            Mode::Long => (Segment::flat(8, 0xa09b), Segment::flat(0x10, 0xc093)),
            _ => (Segment::flat(8, 0xc09b), Segment::flat(0x10, 0xc093)),
        };
        state.cs = code;
        [state.es, state.ss, state.ds, state.fs, state.gs] = [data; 5];
        let mut cr0 = Cr0::CR0_EXTENSION_TYPE | Cr0::CR0_NUMERIC_ERROR;
        let mut cr4 = Cr4::empty();
        if mode != Mode::Real {
            cr0 |= Cr0::CR0_PROTECTED_MODE;
        }
        if matches!(mode, Mode::Paged32 | Mode::Pae | Mode::Long) {
            cr0 |= Cr0::CR0_ENABLE_PAGING | Cr0::CR0_WRITE_PROTECT;
            state.cr3 = tables;
        }
        match mode {
            Mode::Real | Mode::Protected => {}
            Mode::Paged32 => cr4 |= Cr4::CR4_ENABLE_PSE,
            Mode::Pae => cr4 |= Cr4::CR4_ENABLE_PAE,
            Mode::Long => {
                cr4 |= Cr4::CR4_ENABLE_PAE;
                state.efer = EFER_LONG;
            }
        }
        state.cr0 = cr0.bits() as u64;
        state.cr4 = cr4.bits() as u64;
        state
    }
}
