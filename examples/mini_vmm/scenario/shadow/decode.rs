//! Decoding: bytes of the guest's code to an instruction, or an error that names them.

use std::fmt;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

/// The longest instruction there is.
pub const LONGEST: usize = 15;

/// An instruction that the VMM cannot carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// Where it stands.
    pub rip: u64,
    /// Its bytes; if it has no end, all that there are.
    pub bytes: Vec<u8>,
    /// What it is, or what is wrong with it.
    pub what: String,
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the instruction at {:#x} is not known:", self.rip)?;
        for byte in &self.bytes {
            write!(f, " {byte:02x}")?;
        }
        write!(f, " ({})", self.what)
    }
}

impl std::error::Error for Unknown {}

/// What the bytes at `rip` are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// An instruction.
    Instruction(Instruction),
    /// The beginning of one: more bytes are needed.
    Short,
    /// None.
    Unknown(Unknown),
}

/// Decode the instruction that begins with `bytes` and stands at `rip`, in 64-bit mode.
pub fn decode(rip: u64, bytes: &[u8]) -> Decoded {
    let bytes = &bytes[..bytes.len().min(LONGEST)];
    let mut decoder = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => Decoded::Instruction(instruction),
        DecoderError::NoMoreBytes if bytes.len() < LONGEST => Decoded::Short,
        _ => Decoded::Unknown(Unknown { rip, bytes: bytes.to_vec(), what: "no code".to_owned() }),
    }
}

/// The VMM does not carry this instruction out, which begins with `bytes`.
pub fn unknown(instruction: &Instruction, bytes: &[u8]) -> Unknown {
    Unknown {
        rip: instruction.ip(),
        bytes: bytes[..bytes.len().min(instruction.len())].to_vec(),
        what: format!("{:?}", instruction.code()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_instructions_or_named() {
        let Decoded::Instruction(load) = decode(0x1000, &[0x0f, 0x22, 0xd8, 0x90]) else {
            panic!("mov cr3, rax")
        };
        assert_eq!((load.len(), load.next_ip()), (3, 0x1003));
        assert_eq!(decode(0x1000, &[0x0f, 0x22]), Decoded::Short);
        let Decoded::Unknown(error) = decode(0x1000, &[0x06; 15]) else { panic!("push es") };
        assert!(format!("{error}").starts_with("the instruction at 0x1000 is not known: 06 06"));
        let Decoded::Instruction(call) = decode(0x2000, &[0x0f, 0x01, 0xd9]) else {
            panic!("vmmcall")
        };
        let error = unknown(&call, &[0x0f, 0x01, 0xd9, 0x90, 0x90]);
        assert_eq!(error.bytes, [0x0f, 0x01, 0xd9]);
        assert_eq!(
            format!("{error}"),
            "the instruction at 0x2000 is not known: 0f 01 d9 (Vmmcall)"
        );
    }
}
