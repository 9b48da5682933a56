//! The instructions that any program uses, executed one at a time: moves, arithmetic, jumps, calls,
//! strings.
//!
//! The software CPUs run all of the guest's code by it, the hypervisor what a trapped write stands
//! for. Memory is whatever the [`Bus`] makes of an address, in aligned words of 8 bytes. An
//! instruction changes registers only after its accesses succeeded, so it may be stopped at any of
//! them and be tried again.

use iced_x86::{Instruction, MemorySize, Mnemonic, OpKind, Register};

use crate::machine::{RSP, Registers};

/// Memory by linear address, with every permission checked.
pub trait Bus {
    /// Why an access did not come about.
    type Stop;

    /// The word at `gva`, which is aligned.
    fn load(&mut self, gva: u64) -> Result<u64, Self::Stop>;

    /// Store the word at `gva`, which is aligned.
    fn store(&mut self, gva: u64, value: u64) -> Result<(), Self::Stop>;
}

/// Why an instruction was not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt<S> {
    /// An access stopped.
    Stop(S),
    /// It is none of those that are known here.
    Unknown,
}

impl<S> From<S> for Halt<S> {
    fn from(stop: S) -> Self {
        Self::Stop(stop)
    }
}

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
/// The flags that arithmetic sets.
pub const ARITHMETIC: u64 = CF | PF | ZF | SF | OF;

/// Index of a 64-bit or 32-bit general register, and its bytes.
fn general(register: Register) -> Option<(usize, u32)> {
    let index = |first: Register| (register as usize).checked_sub(first as usize);
    let wide = index(Register::RAX).filter(|index| *index < 16).map(|index| (index, 8));
    wide.or_else(|| index(Register::EAX).filter(|index| *index < 16).map(|index| (index, 4)))
}

/// The value of a general register of either width.
pub fn register(registers: &Registers, name: Register) -> Option<u64> {
    let (index, bytes) = general(name)?;
    let value = registers.general[index];
    Some(if bytes == 4 { value & u64::from(u32::MAX) } else { value })
}

/// Set a general register; a 32-bit one clears the upper half.
pub fn set_register(registers: &mut Registers, name: Register, value: u64) -> Option<()> {
    let (index, bytes) = general(name)?;
    registers.general[index] = if bytes == 4 { value & u64::from(u32::MAX) } else { value };
    Some(())
}

/// The linear address of the memory operand. Segments begin at 0.
pub fn address(registers: &Registers, instruction: &Instruction) -> Option<u64> {
    if instruction.is_ip_rel_memory_operand() {
        return Some(instruction.ip_rel_memory_address());
    }
    if instruction.segment_prefix() != Register::None {
        return None;
    }
    let of = |name: Register| match name {
        Register::None => Some(0),
        name => general(name).filter(|(_, bytes)| *bytes == 8).map(|(at, _)| registers.general[at]),
    };
    let base = of(instruction.memory_base())?;
    let index = of(instruction.memory_index())?;
    let scaled = index.wrapping_mul(u64::from(instruction.memory_index_scale()));
    Some(base.wrapping_add(scaled).wrapping_add(instruction.memory_displacement64()))
}

/// One instruction at work.
struct Step<'a, B> {
    bus: &'a mut B,
    registers: &'a mut Registers,
    instruction: &'a Instruction,
}

type Done<B, T = ()> = Result<T, Halt<<B as Bus>::Stop>>;

/// Execute an instruction, which stands at rip.
///
/// # Errors
/// [`Halt`]; nothing was done, but for words that a repeated string instruction stored before and
/// counted.
pub fn execute<B: Bus>(
    bus: &mut B,
    registers: &mut Registers,
    instruction: &Instruction,
) -> Done<B> {
    if instruction.has_lock_prefix() {
        return Err(Halt::Unknown);
    }
    Step { bus, registers, instruction }.run()
}

impl<B: Bus> Step<'_, B> {
    fn run(&mut self) -> Done<B> {
        use Mnemonic as M;
        let next = self.instruction.next_ip();
        match self.instruction.mnemonic() {
            M::Mov => {
                let value = self.read(1)?;
                self.write(0, value)?;
            }
            M::Lea => {
                let at = address(self.registers, self.instruction).ok_or(Halt::Unknown)?;
                self.write(0, at)?;
            }
            M::Add | M::Sub | M::And | M::Or | M::Xor | M::Cmp | M::Test => self.binary()?,
            M::Inc | M::Dec | M::Not => self.unary()?,
            M::Shl | M::Shr | M::Rol => self.shift()?,
            M::Imul => self.multiply()?,
            M::Push => {
                let value = self.read(0)?;
                self.push(value)?;
            }
            M::Pop => {
                let value = self.bus.load(self.registers.general[RSP])?;
                self.registers.general[RSP] = self.registers.general[RSP].wrapping_add(8);
                self.set(0, value)?;
            }
            M::Stosq | M::Movsq => return self.string(),
            M::Nop => {}
            _ => return self.jump(),
        }
        self.registers.rip = next;
        Ok(())
    }

    /// Instructions that go elsewhere.
    fn jump(&mut self) -> Done<B> {
        use Mnemonic as M;
        let next = self.instruction.next_ip();
        let flag = |flag: u64| self.registers.rflags & flag != 0;
        let goes = match self.instruction.mnemonic() {
            M::Ret if self.instruction.op_count() == 0 => {
                let to = self.bus.load(self.registers.general[RSP])?;
                self.registers.general[RSP] = self.registers.general[RSP].wrapping_add(8);
                self.registers.rip = to;
                return Ok(());
            }
            M::Call | M::Jmp => true,
            M::Je => flag(ZF),
            M::Jne => !flag(ZF),
            M::Jb => flag(CF),
            M::Jae => !flag(CF),
            M::Ja => !flag(CF) && !flag(ZF),
            M::Jbe => flag(CF) || flag(ZF),
            _ => return Err(Halt::Unknown),
        };
        if self.instruction.op0_kind() != OpKind::NearBranch64 {
            return Err(Halt::Unknown);
        }
        if self.instruction.mnemonic() == M::Call {
            self.push(next)?;
        }
        self.registers.rip = if goes { self.instruction.near_branch64() } else { next };
        Ok(())
    }

    /// Bytes of an operand: those of a register, else of a memory operand, which have 8.
    fn width(&self, operand: u32) -> Done<B, u32> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => {
                let name = self.instruction.op_register(operand);
                general(name).map(|(_, bytes)| bytes).ok_or(Halt::Unknown)
            }
            OpKind::Memory if is_word(self.instruction.memory_size()) => Ok(8),
            _ => Err(Halt::Unknown),
        }
    }

    fn word_address(&self) -> Done<B, u64> {
        let at = address(self.registers, self.instruction);
        at.filter(|at| at % 8 == 0).ok_or(Halt::Unknown)
    }

    fn read(&mut self, operand: u32) -> Done<B, u64> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => {
                let name = self.instruction.op_register(operand);
                register(self.registers, name).ok_or(Halt::Unknown)
            }
            OpKind::Memory => {
                let _ = self.width(operand)?;
                let at = self.word_address()?;
                Ok(self.bus.load(at)?)
            }
            OpKind::Immediate8
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => Ok(self.instruction.immediate(operand)),
            _ => Err(Halt::Unknown),
        }
    }

    fn write(&mut self, operand: u32, value: u64) -> Done<B> {
        if self.instruction.op_kind(operand) == OpKind::Memory {
            let _ = self.width(operand)?;
            let at = self.word_address()?;
            return Ok(self.bus.store(at, value)?);
        }
        self.set(operand, value)
    }

    fn set(&mut self, operand: u32, value: u64) -> Done<B> {
        if self.instruction.op_kind(operand) != OpKind::Register {
            return Err(Halt::Unknown);
        }
        let name = self.instruction.op_register(operand);
        set_register(self.registers, name, value).ok_or(Halt::Unknown)
    }

    fn push(&mut self, value: u64) -> Done<B> {
        let to = self.registers.general[RSP].wrapping_sub(8);
        self.bus.store(to, value)?;
        self.registers.general[RSP] = to;
        Ok(())
    }

    /// Set the arithmetic flags: those of `value`, which has `bytes`, with these for carry and
    /// overflow.
    fn flags(&mut self, value: u64, bytes: u32, carry: bool, overflow: bool) {
        let sign = value >> (bytes * 8 - 1) & 1 != 0;
        let even = (value as u8).count_ones() % 2 == 0;
        let set = [(CF, carry), (PF, even), (ZF, value == 0), (SF, sign), (OF, overflow)];
        let set = set.into_iter().filter(|(_, on)| *on).fold(0, |all, (flag, _)| all | flag);
        self.registers.rflags = self.registers.rflags & !ARITHMETIC | set;
    }

    fn binary(&mut self) -> Done<B> {
        use Mnemonic as M;
        let bytes = self.width(0)?;
        let mask = mask(bytes);
        let (a, b) = (self.read(0)? & mask, self.read(1)? & mask);
        let sign = |value: u64| value >> (bytes * 8 - 1) & 1 != 0;
        let (result, carry, overflow, keep) = match self.instruction.mnemonic() {
            M::Add => {
                let sum = a.wrapping_add(b) & mask;
                (sum, sum < a, sign(a) == sign(b) && sign(sum) != sign(a), true)
            }
            kind @ (M::Sub | M::Cmp) => {
                let rest = a.wrapping_sub(b) & mask;
                (rest, a < b, sign(a) != sign(b) && sign(rest) != sign(a), kind == M::Sub)
            }
            M::And => (a & b, false, false, true),
            M::Or => (a | b, false, false, true),
            M::Xor => (a ^ b, false, false, true),
            M::Test => (a & b, false, false, false),
            _ => return Err(Halt::Unknown),
        };
        if keep {
            self.write(0, result)?;
        }
        self.flags(result, bytes, carry, overflow);
        Ok(())
    }

    fn unary(&mut self) -> Done<B> {
        use Mnemonic as M;
        let bytes = self.width(0)?;
        let value = self.read(0)? & mask(bytes);
        let (result, extreme) = match self.instruction.mnemonic() {
            M::Inc => (value.wrapping_add(1), 1 << (bytes * 8 - 1)),
            M::Dec => (value.wrapping_sub(1), mask(bytes) >> 1),
            _ => return self.write(0, !value & mask(bytes)),
        };
        let result = result & mask(bytes);
        self.write(0, result)?;
        let carry = self.registers.rflags & CF != 0;
        self.flags(result, bytes, carry, result == extreme);
        Ok(())
    }

    fn shift(&mut self) -> Done<B> {
        use Mnemonic as M;
        let bytes = self.width(0)?;
        let count = match self.instruction.op_kind(1) {
            OpKind::Immediate8 => u32::from(self.instruction.immediate8()),
            OpKind::Register if self.instruction.op_register(1) == Register::CL => {
                self.registers.general[1] as u32
            }
            _ => return Err(Halt::Unknown),
        };
        let count = count & if bytes == 8 { 63 } else { 31 };
        let value = self.read(0)? & mask(bytes);
        if count == 0 {
            return self.write(0, value);
        }
        let bits = bytes * 8;
        let (result, carry) = match self.instruction.mnemonic() {
            M::Shl => (value << count & mask(bytes), value >> (bits - count) & 1 != 0),
            M::Shr => (value >> count, value >> (count - 1) & 1 != 0),
            _ => {
                let turned = (value << count | value >> (bits - count)) & mask(bytes);
                self.write(0, turned)?;
                // A rotation leaves the flags of results alone.
                self.registers.rflags = self.registers.rflags & !CF | turned & CF;
                return Ok(());
            }
        };
        self.write(0, result)?;
        // The overflow flag is undefined for counts above 1; nobody looks at it.
        self.flags(result, bytes, carry, false);
        Ok(())
    }

    fn multiply(&mut self) -> Done<B> {
        if self.instruction.op_count() != 2 {
            return Err(Halt::Unknown);
        }
        let bytes = self.width(0)?;
        let (a, b) = (self.read(0)?, self.read(1)?);
        let wide = if bytes == 8 {
            i128::from(a as i64) * i128::from(b as i64)
        } else {
            i128::from(a as i32) * i128::from(b as i32)
        };
        let result = wide as u64 & mask(bytes);
        let short = if bytes == 8 { i128::from(result as i64) } else { i128::from(result as i32) };
        self.write(0, result)?;
        self.flags(result, bytes, wide != short, wide != short);
        Ok(())
    }

    /// One turn of a string instruction; rip stays where it is until the last. The direction flag
    /// is clear.
    fn string(&mut self) -> Done<B> {
        const RCX: usize = 1;
        const RSI: usize = 6;
        const RDI: usize = 7;
        let moves = self.instruction.mnemonic() == Mnemonic::Movsq;
        let repeats = self.instruction.has_rep_prefix();
        let [rcx, rsi, rdi] = [RCX, RSI, RDI].map(|index| self.registers.general[index]);
        if repeats && rcx == 0 {
            self.registers.rip = self.instruction.next_ip();
            return Ok(());
        }
        if rdi % 8 != 0 || (moves && rsi % 8 != 0) {
            return Err(Halt::Unknown);
        }
        let value = if moves { self.bus.load(rsi)? } else { self.registers.general[0] };
        self.bus.store(rdi, value)?;
        self.registers.general[RDI] = rdi.wrapping_add(8);
        if moves {
            self.registers.general[RSI] = rsi.wrapping_add(8);
        }
        if repeats {
            self.registers.general[RCX] = rcx - 1;
        }
        if !repeats || rcx == 1 {
            self.registers.rip = self.instruction.next_ip();
        }
        Ok(())
    }
}

fn mask(bytes: u32) -> u64 {
    u64::MAX >> (64 - bytes * 8)
}

fn is_word(size: MemorySize) -> bool {
    matches!(size, MemorySize::UInt64 | MemorySize::Int64)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::super::decode::{Decoded, decode};
    use super::*;

    const RAX: usize = 0;
    const RCX: usize = 1;
    const RSI: usize = 6;
    const RDI: usize = 7;

    /// Words, and addresses at which accesses stop.
    #[derive(Default)]
    struct Words {
        words: BTreeMap<u64, u64>,
        stops: BTreeSet<u64>,
    }

    impl Bus for Words {
        type Stop = u64;

        fn load(&mut self, gva: u64) -> Result<u64, u64> {
            assert_eq!(gva % 8, 0);
            if self.stops.contains(&gva) {
                return Err(gva);
            }
            Ok(self.words.get(&gva).copied().unwrap_or(0))
        }

        fn store(&mut self, gva: u64, value: u64) -> Result<(), u64> {
            let _ = self.load(gva)?;
            self.words.insert(gva, value);
            Ok(())
        }
    }

    fn instruction(code: &[u8]) -> Instruction {
        let Decoded::Instruction(instruction) = decode(0x1000, code) else { panic!("{code:x?}") };
        instruction
    }

    fn at_start() -> Registers {
        let general = core::array::from_fn(|index| 0x8000 + 0x100 * index as u64);
        Registers { general, rip: 0x1000, rflags: 2 }
    }

    fn run(words: &mut Words, registers: &mut Registers, code: &[u8]) -> Result<(), Halt<u64>> {
        registers.rip = 0x1000;
        execute(words, registers, &instruction(code))
    }

    /// Code, rax, rcx before; rax and flags after.
    const ARITHMETIC_CASES: [(&[u8], u64, u64, u64, u64); 14] = [
        (&[0x48, 0x01, 0xc8], u64::MAX, 1, 0, CF | PF | ZF), // add rax, rcx
        (&[0x01, 0xc8], 0xffff_ffff, 1, 0, CF | PF | ZF),    // add eax, ecx
        (&[0x48, 0x01, 0xc8], i64::MAX as u64, 1, 1 << 63, PF | SF | OF),
        (&[0x48, 0x29, 0xc8], 3, 5, u64::MAX - 1, CF | SF), // sub rax, rcx
        (&[0x48, 0x39, 0xc8], 5, 5, 5, PF | ZF),            // cmp rax, rcx
        (&[0x48, 0x39, 0xc8], 1 << 63, 1, 1 << 63, PF | OF),
        (&[0x85, 0xc8], 1 << 40 | 2, 2, 1 << 40 | 2, 0), // test eax, ecx
        (&[0x48, 0x83, 0xe0, 0xfd], 7, 0, 5, PF),        // and rax, -3
        (&[0xff, 0xc8], 0, 0, 0xffff_ffff, PF | SF),     // dec eax
        (&[0x48, 0xff, 0xc0], i64::MAX as u64, 0, 1 << 63, PF | SF | OF), // inc rax
        (&[0x48, 0xd3, 0xe8], 0x180, 8, 1, CF),          // shr rax, cl
        (&[0x48, 0xc1, 0xc0, 0x07], 3 << 62, 0, 0x60, 0), // rol rax, 7
        (&[0x48, 0xf7, 0xd0], 5, 0, !5, 0),              // not rax
        (&[0x48, 0x0f, 0xaf, 0xc1], 1 << 40, 1 << 30, 0, CF | PF | ZF | OF), // imul rax, rcx
    ];

    #[test]
    fn results_and_flags_are_the_manuals() {
        for (code, rax, rcx, result, flags) in ARITHMETIC_CASES {
            let mut registers = at_start();
            (registers.general[RAX], registers.general[RCX]) = (rax, rcx);
            run(&mut Words::default(), &mut registers, code).unwrap();
            assert_eq!(registers.general[RAX], result, "{code:x?} {rax:#x} {rcx:#x}");
            let imul = code.get(1) == Some(&0x0f);
            // Undefined after a multiplication but for carry and overflow.
            let defined = if imul { CF | OF } else { ARITHMETIC };
            let (found, flags) = (registers.rflags & defined, flags & defined);
            assert_eq!(found, flags, "{code:x?} {rax:#x} {rcx:#x}");
            assert_eq!(registers.rip, 0x1000 + code.len() as u64);
        }
    }

    #[test]
    fn jumps_go_by_carry_and_zero() {
        // je, jne, jb, jae, ja, jbe, over 16 bytes; taken with none, CF, ZF.
        let cases = [
            (0x74, [false, false, true]),
            (0x75, [true, true, false]),
            (0x72, [false, true, false]),
            (0x73, [true, false, true]),
            (0x77, [true, false, false]),
            (0x76, [false, true, true]),
            (0xeb, [true, true, true]),
        ];
        for (opcode, taken) in cases {
            for (flags, taken) in [0, CF, ZF].into_iter().zip(taken) {
                let mut registers = Registers { rflags: 2 | flags, ..at_start() };
                run(&mut Words::default(), &mut registers, &[opcode, 0x10]).unwrap();
                assert_eq!(registers.rip, if taken { 0x1012 } else { 0x1002 }, "{opcode:#x}");
            }
        }
    }

    /// Instructions that access memory.
    const ACCESSING: [&[u8]; 9] = [
        &[0x48, 0x89, 0x47, 0x08], // mov [rdi + 8], rax
        &[0x4a, 0x8b, 0x04, 0x3f], // mov rax, [rdi + r15]
        &[0x48, 0xff, 0x07],       // inc qword ptr [rdi]
        &[0x48, 0x83, 0x07, 0x20], // add qword ptr [rdi], 32
        &[0x56],                   // push rsi
        &[0x5e],                   // pop rsi
        &[0xe8, 0, 1, 0, 0],       // call
        &[0xc3],                   // ret
        &[0x48, 0xa5],             // movsq
    ];

    #[test]
    fn an_access_that_stops_leaves_everything_as_it_was() {
        for code in ACCESSING {
            // Where does it go, undisturbed? Then each of these addresses stops it.
            let stops = (0..0x2_0000).step_by(8).collect();
            let mut all = Words { stops, ..Words::default() };
            let mut stopped = 0;
            let mut registers = at_start();
            while let Err(halt) = run(&mut all, &mut registers, code) {
                let Halt::Stop(at) = halt else { panic!("{code:x?}: {halt:?}") };
                assert_eq!(registers, at_start(), "{code:x?} stopped at {at:#x}");
                assert!(all.words.is_empty());
                all.stops.remove(&at);
                stopped += 1;
                assert!(stopped < 4, "{code:x?}");
            }
            assert!(stopped > 0, "{code:x?}");
            assert_ne!(registers, at_start());
        }
    }

    #[test]
    fn a_repeated_string_instruction_goes_on_where_it_stopped() {
        let code = [0xf3, 0x48, 0xab]; // rep stosq
        let mut registers = at_start();
        (registers.general[RAX], registers.general[RCX]) = (7, 3);
        let start = registers.general[RDI];
        let mut words = Words { stops: [start + 8].into(), ..Words::default() };
        run(&mut words, &mut registers, &code).unwrap();
        assert_eq!((registers.rip, registers.general[RCX]), (0x1000, 2), "not over");
        assert_eq!(run(&mut words, &mut registers, &code), Err(Halt::Stop(start + 8)));
        assert_eq!(registers.general[RDI], start + 8);
        words.stops.clear();
        run(&mut words, &mut registers, &code).unwrap();
        run(&mut words, &mut registers, &code).unwrap();
        assert_eq!((registers.rip, registers.general[RCX]), (0x1003, 0), "over");
        assert_eq!(words.words.len(), 3);
        // And none at all is over at once.
        run(&mut words, &mut registers, &code).unwrap();
        assert_eq!((registers.rip, words.words.len()), (0x1003, 3));
        assert_eq!(registers.general[RSI], at_start().general[RSI]);
    }

    #[test]
    fn what_is_not_known_is_said_so() {
        let strange: [&[u8]; 6] = [
            &[0x88, 0x07],             // mov [rdi], al
            &[0x89, 0x07],             // mov [rdi], eax
            &[0x48, 0x89, 0x47, 0x01], // mov [rdi + 1], rax: misaligned
            &[0x65, 0x48, 0x89, 0x07], // mov gs:[rdi], rax
            &[0xf0, 0x48, 0xff, 0x07], // lock inc
            &[0xff, 0xe0],             // jmp rax
        ];
        for code in strange {
            let mut registers = at_start();
            let halt = run(&mut Words::default(), &mut registers, code);
            assert_eq!(halt, Err(Halt::Unknown), "{code:x?}");
            assert_eq!(registers, at_start());
        }
    }
}
