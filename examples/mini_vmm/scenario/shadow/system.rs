//! What a guest OS believes to have: control registers, its IDT, interrupts; and the instructions
//! that are for a kernel only.
//!
//! The hypervisor carries them out when they trap; the software CPU with two-dimensional paging
//! executes them as they come. Either is told by an [`Effect`] what else there is to do.

use iced_x86::{Code, Instruction, Register};

use super::execute::{ARITHMETIC, Bus, Halt, address, register, set_register};
use crate::machine::{RSP, Registers};

/// CR0: paging, write protection, and what a processor in long mode has set besides.
pub const CR0: u64 = CR0_PG | 1 << 5 | 1 << 4 | 1;
const CR0_PG: u64 = 1 << 31;
/// CR0.WP.
pub const CR0_WP: u64 = 1 << 16;
/// CR4.PAE.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.PGE.
const CR4_PGE: u64 = 1 << 7;
/// EFER: LME, LMA, NXE.
pub const EFER: u64 = 1 << 8 | 1 << 10 | 1 << 11;

/// The MSR by which the guest says how far it is: one of those left to hypervisors.
pub const MSR_MARK: u32 = 0x4000_0100;

/// The page fault's vector.
const PAGE_FAULT: u64 = 14;
/// Selectors of the guest's kernel.
const KERNEL_CODE: u64 = 0x08;
const KERNEL_DATA: u64 = 0x10;
/// RFLAGS.IF, and the bit that is always set.
const IF: u64 = 1 << 9;
const ONE: u64 = 1 << 1;

/// What an instruction means to whoever keeps the translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    Nothing,
    /// CR3 was loaded.
    Root,
    /// A register was written that decides how tables are read.
    Mode,
    /// INVLPG of this linear address.
    Invalidate(u64),
    /// The guest says how far it is.
    Mark(u64),
    /// HLT with interrupts off: the guest is done.
    Halted,
}

/// The registers that only a kernel may touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Base and limit of the IDT.
    pub idt: (u64, u16),
    /// RFLAGS.IF.
    pub interrupts: bool,
}

/// Why a guest's kernel does not get any further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble<S> {
    /// An access stopped.
    Stop(S),
    /// Its IDT has no entry.
    NoHandler,
}

impl System {
    /// As a boot loader leaves it: paging on with the tables at `cr3`, CR0.WP off.
    pub const fn new(cr3: u64) -> Self {
        let idt = (0, 0);
        Self { cr0: CR0, cr2: 0, cr3, cr4: CR4_PAE, efer: EFER, idt, interrupts: true }
    }

    /// Is it an instruction that traps at CPL 3? IRET does, because all of the guest believes to be
    /// at CPL 0, and returning there from CPL 3 is not possible.
    pub fn is_privileged(instruction: &Instruction) -> bool {
        matches!(
            instruction.code(),
            Code::Mov_cr_r64
                | Code::Mov_r64_cr
                | Code::Invlpg_m
                | Code::Lidt_m1664
                | Code::Wrmsr
                | Code::Iretq
                | Code::Cli
                | Code::Sti
                | Code::Hlt
        )
    }

    /// Carry out a privileged instruction, which stands at rip.
    ///
    /// # Errors
    /// [`Halt`]; nothing was done.
    pub fn execute<B: Bus>(
        &mut self,
        bus: &mut B,
        registers: &mut Registers,
        instruction: &Instruction,
    ) -> Result<Effect, Halt<B::Stop>> {
        let effect = match instruction.code() {
            Code::Mov_cr_r64 => {
                let value = register(registers, instruction.op1_register());
                self.write_control(instruction.op0_register(), value.ok_or(Halt::Unknown)?)
            }
            Code::Mov_r64_cr => {
                let value = match instruction.op1_register() {
                    Register::CR0 => self.cr0,
                    Register::CR2 => self.cr2,
                    Register::CR3 => self.cr3,
                    Register::CR4 => self.cr4,
                    _ => return Err(Halt::Unknown),
                };
                set_register(registers, instruction.op0_register(), value).map(|()| Effect::Nothing)
            }
            Code::Invlpg_m => address(registers, instruction).map(Effect::Invalidate),
            Code::Lidt_m1664 => {
                // Limit and base, the base at the start of a word.
                let at = address(registers, instruction).filter(|at| at % 8 == 6);
                let at = at.ok_or(Halt::Unknown)?;
                let limit = bus.load(at - 6)? >> 48;
                self.idt = (bus.load(at + 2)?, limit as u16);
                Some(Effect::Nothing)
            }
            Code::Wrmsr => {
                let [eax, ecx, edx] = [Register::EAX, Register::ECX, Register::EDX]
                    .map(|name| register(registers, name).unwrap_or(0));
                let mark = ecx == u64::from(MSR_MARK);
                mark.then_some(Effect::Mark(edx << 32 | eax))
            }
            Code::Cli | Code::Sti => {
                self.interrupts = instruction.code() == Code::Sti;
                Some(Effect::Nothing)
            }
            // Nothing interrupts this guest.
            Code::Hlt if self.interrupts => None,
            Code::Hlt => Some(Effect::Halted),
            Code::Iretq => return self.interrupt_return(bus, registers),
            _ => None,
        };
        let effect = effect.ok_or(Halt::Unknown)?;
        registers.rip = instruction.next_ip();
        Ok(effect)
    }

    fn write_control(&mut self, register: Register, value: u64) -> Option<Effect> {
        match register {
            Register::CR0 if value & !CR0_WP == CR0 => {
                self.cr0 = value;
                Some(Effect::Mode)
            }
            Register::CR3 => {
                self.cr3 = value;
                Some(Effect::Root)
            }
            Register::CR4 if value & !CR4_PGE == CR4_PAE => {
                self.cr4 = value;
                Some(Effect::Mode)
            }
            _ => None,
        }
    }

    /// IRET to the privilege that the guest has all the time.
    fn interrupt_return<B: Bus>(
        &mut self,
        bus: &mut B,
        registers: &mut Registers,
    ) -> Result<Effect, Halt<B::Stop>> {
        let frame = registers.general[RSP];
        if frame % 8 != 0 {
            return Err(Halt::Unknown);
        }
        let mut words = [0; 5];
        for (at, word) in (frame..).step_by(8).zip(&mut words) {
            *word = bus.load(at)?;
        }
        let [rip, cs, rflags, rsp, ss] = words;
        if (cs, ss) != (KERNEL_CODE, KERNEL_DATA) {
            return Err(Halt::Unknown);
        }
        self.interrupts = rflags & IF != 0;
        registers.rip = rip;
        registers.rflags = rflags & ARITHMETIC | ONE;
        registers.general[RSP] = rsp;
        Ok(Effect::Nothing)
    }

    /// Deliver a page fault, as a processor does, to the handler that the guest's IDT names.
    ///
    /// # Errors
    /// [`Trouble`]; registers are as they were.
    pub fn page_fault<B: Bus>(
        &mut self,
        bus: &mut B,
        registers: &mut Registers,
        gva: u64,
        error: u32,
    ) -> Result<(), Trouble<B::Stop>> {
        let (base, limit) = self.idt;
        let gate = PAGE_FAULT * 16;
        if gate + 15 > u64::from(limit) || base % 8 != 0 {
            return Err(Trouble::NoHandler);
        }
        let low = bus.load(base + gate).map_err(Trouble::Stop)?;
        let high = bus.load(base + gate + 8).map_err(Trouble::Stop)?;
        if low >> 47 & 1 == 0 {
            return Err(Trouble::NoHandler);
        }
        let handler = low & 0xffff | (low >> 48) << 16 | high << 32;
        let rflags = registers.rflags & !IF | if self.interrupts { IF } else { 0 };
        let rsp = registers.general[RSP];
        let words = [KERNEL_DATA, rsp, rflags, KERNEL_CODE, registers.rip, u64::from(error)];
        let mut top = rsp & !15;
        for word in words {
            top -= 8;
            bus.store(top, word).map_err(Trouble::Stop)?;
        }
        self.cr2 = gva;
        // An interrupt gate.
        self.interrupts = false;
        registers.general[RSP] = top;
        registers.rip = handler;
        Ok(())
    }
}
