//! Machine code on a software CPU: fetch, decode, execute, whatever translates addresses.
//!
//! Owns [`Interpreter`]: registers, and what was decoded lately. An instruction is remembered with
//! its physical address and its bytes, and both are looked at each time: new code is never taken
//! for old.

use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::Instruction;
use mmu_model::AccessKind;

use super::decode::{Decoded, LONGEST, Unknown, decode, unknown};
use super::execute::{Bus, Halt, execute};
use crate::machine::{PAGE, Registers};

/// How a software CPU gets at memory.
pub trait Translate {
    /// Why it does not.
    type Stop;

    /// The physical address of `gva` for such an access.
    fn translate(&mut self, gva: u64, kind: AccessKind) -> Result<u64, Self::Stop>;

    /// The word at a physical address that a translation gave.
    fn word(&self, pa: u64) -> Result<&AtomicU64, Self::Stop>;
}

/// Memory by linear address.
#[derive(Debug)]
pub struct Linear<'a, T>(pub &'a mut T);

impl<T: Translate> Bus for Linear<'_, T> {
    type Stop = T::Stop;

    #[inline]
    fn load(&mut self, gva: u64) -> Result<u64, T::Stop> {
        let pa = self.0.translate(gva, AccessKind::Read)?;
        // ORDERING[soft-data]: Acquire, as every load of an x86 guest.
        Ok(self.0.word(pa)?.load(Ordering::Acquire))
    }

    #[inline]
    fn store(&mut self, gva: u64, value: u64) -> Result<(), T::Stop> {
        let pa = self.0.translate(gva, AccessKind::Write)?;
        // ORDERING[soft-data]: Release, as every store of an x86 guest. Pairs with the VMM's loads.
        self.0.word(pa)?.store(value, Ordering::Release);
        Ok(())
    }
}

/// Why an instruction was not executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopped<S> {
    /// An access stopped.
    Stop(S),
    /// It is for others to carry out.
    Other(Instruction, Unknown),
    /// It is none.
    NoCode(Unknown),
}

impl<S> From<S> for Stopped<S> {
    fn from(stop: S) -> Self {
        Self::Stop(stop)
    }
}

/// Words of a page that hold the longest instruction wherever it begins.
const WORDS: usize = 3;
/// Instructions that are remembered, a power of two.
const REMEMBERED: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Known {
    pa: u64,
    words: [u64; WORDS],
    instruction: Instruction,
}

/// A software CPU's state.
#[derive(Debug)]
pub struct Interpreter {
    /// Registers.
    pub registers: Registers,
    /// Instructions executed.
    pub executed: u64,
    known: Vec<Option<Known>>,
}

impl Interpreter {
    /// With these registers.
    pub fn new(registers: Registers) -> Self {
        Self { registers, executed: 0, known: vec![None; REMEMBERED] }
    }

    /// Execute the next instruction.
    ///
    /// # Errors
    /// [`Stopped`]; it did nothing, and rip is at it.
    pub fn step<T: Translate>(&mut self, memory: &mut T) -> Result<(), Stopped<T::Stop>> {
        let (instruction, bytes) = self.fetch(memory)?;
        match execute(&mut Linear(memory), &mut self.registers, &instruction) {
            Ok(()) => {
                self.executed += 1;
                Ok(())
            }
            Err(Halt::Stop(stop)) => Err(Stopped::Stop(stop)),
            Err(Halt::Unknown) => {
                let bytes = bytes_of(&bytes, self.registers.rip);
                Err(Stopped::Other(instruction, unknown(&instruction, &bytes)))
            }
        }
    }

    /// The instruction at rip, and the words from its first on.
    fn fetch<T: Translate>(
        &mut self,
        memory: &mut T,
    ) -> Result<(Instruction, [u64; WORDS]), Stopped<T::Stop>> {
        let rip = self.registers.rip;
        let pa = memory.translate(rip, AccessKind::Fetch)?;
        let mut words = [0; WORDS];
        let here = ((PAGE - pa % PAGE).div_ceil(8) as usize).min(WORDS);
        load_words(memory, pa & !7, &mut words[..here])?;
        let place = pa as usize % REMEMBERED;
        if let Some(known) = &self.known[place] {
            if known.pa == pa && known.words == words && known.instruction.ip() == rip {
                return Ok((known.instruction, words));
            }
        }
        let bytes = bytes_of(&words, rip);
        let present = ((PAGE - pa % PAGE) as usize).min(LONGEST);
        match decode(rip, &bytes[..present]) {
            Decoded::Instruction(instruction) => {
                self.known[place] = Some(Known { pa, words, instruction });
                return Ok((instruction, words));
            }
            Decoded::Unknown(unknown) => return Err(Stopped::NoCode(unknown)),
            Decoded::Short => {}
        }
        // It goes on in the next page.
        let next = (rip | (PAGE - 1)).wrapping_add(1);
        let pa = memory.translate(next, AccessKind::Fetch)?;
        load_words(memory, pa, &mut words[here..])?;
        match decode(rip, &bytes_of(&words, rip)) {
            Decoded::Instruction(instruction) => Ok((instruction, words)),
            Decoded::Unknown(unknown) => Err(Stopped::NoCode(unknown)),
            Decoded::Short => Err(Stopped::NoCode(Unknown {
                rip,
                bytes: bytes_of(&words, rip).to_vec(),
                what: "no end".to_owned(),
            })),
        }
    }
}

fn load_words<T: Translate>(memory: &T, pa: u64, words: &mut [u64]) -> Result<(), T::Stop> {
    for (at, word) in (pa..).step_by(8).zip(words) {
        // ORDERING[soft-data]: Acquire, as every fetch. Pairs with the loader's and guest's stores.
        *word = memory.word(at)?.load(Ordering::Acquire);
    }
    Ok(())
}

/// The bytes at `rip`, which is in the first word.
fn bytes_of(words: &[u64; WORDS], rip: u64) -> [u8; LONGEST] {
    let mut all = [0; WORDS * 8];
    for (place, word) in all.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let mut bytes = [0; LONGEST];
    let from = (rip % 8) as usize;
    bytes.copy_from_slice(&all[from..from + LONGEST]);
    bytes
}
