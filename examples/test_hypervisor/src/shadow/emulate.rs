//! The emulator: stores of a general register, which is how guests write to their tables.
//!
//! Owns [`Store`]. Anything else is not decoded; the caller then gives the table's shadow up and
//! lets the processor do it. Values only; no locks.

/// `mov [reg], reg` of 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// Number of the general register that is stored.
    pub register: usize,
    /// Length of the instruction.
    pub length: u64,
}

/// REX.W, with the bits that extend register numbers free.
const REX_W: u8 = 0x48;
const REX_R: u8 = 1 << 2;
const REX_B: u8 = 1 << 0;
/// MOV r/m64, r64.
const MOV: u8 = 0x89;

impl Store {
    /// The instruction that `bytes` begin with, if it is one.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let [rex, MOV, operands, ..] = *bytes else { return None };
        if rex & !(REX_R | REX_B) != REX_W {
            return None;
        }
        // Mode 0: an address in a register. RSP's and RBP's numbers mean other forms.
        if operands >> 6 != 0 || matches!(operands & 7, 4 | 5) {
            return None;
        }
        let upper = if rex & REX_R != 0 { 8 } else { 0 };
        Some(Self { register: usize::from(operands >> 3 & 7) + upper, length: 3 })
    }
}
