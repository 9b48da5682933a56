//! The guest's memory, as the hypervisor reaches it: by physical address for walks over the guest's
//! tables, by linear address for instructions that it carries out.

use std::fmt;
use std::ops::Range;

use mmu_core::addr::{Gpa, Gva};
use shadow_mmu::guest::{
    EntryWidth, Exchange, GuestMem, GuestRoot, GuestWalker, NotMemory, Operation, Privilege,
    Request, WalkError,
};

use super::execute::Bus;
use super::layout::MEMORY;
use crate::machine::{Memory, PAGE};

/// Guest-physical memory.
#[derive(Clone, Copy, Debug)]
pub struct GuestMemory {
    memory: Memory,
    /// Where it begins in the machine's.
    start: u64,
    bytes: u64,
}

impl GuestMemory {
    /// These pages of the machine are the guest's memory.
    pub fn new(memory: Memory, pages: &Range<u64>) -> Self {
        Self { memory, start: pages.start * PAGE, bytes: (pages.end - pages.start) * PAGE }
    }

    /// Where the word at `at` is in the machine's memory.
    fn place(&self, at: Gpa) -> Option<u64> {
        let offset = at.get().checked_sub(MEMORY).filter(|offset| *offset < self.bytes)?;
        (offset % 8 == 0).then_some(self.start + offset)
    }

    fn entry(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        // Long mode has entries of 8 bytes only.
        let wide = width == EntryWidth::Eight;
        self.place(at).filter(|_| wide).ok_or(NotMemory { at })
    }
}

impl GuestMem for GuestMemory {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        Ok(self.memory.load(self.entry(at, width)?))
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        let done = self.memory.exchange(self.entry(at, width)?, old, new);
        Ok(if done { Exchange::Done } else { Exchange::Lost })
    }
}

/// Why an address cannot be accessed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotReached {
    /// The guest's tables do not permit it.
    Fault {
        /// The address.
        gva: u64,
        /// The error code.
        error: u32,
    },
    /// There is no memory, or there are no tables.
    Nothing(String),
}

impl fmt::Display for NotReached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault { gva, error } => write!(f, "#PF {error:#x} at {gva:#x}"),
            Self::Nothing(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for NotReached {}

/// Linear memory by the guest's tables, without its CPU; remembers what was written.
#[derive(Debug)]
pub struct Emulated<'a> {
    memory: &'a GuestMemory,
    walker: &'a GuestWalker,
    root: GuestRoot,
    written: Vec<Gpa>,
}

impl<'a> Emulated<'a> {
    /// By the tables at `root`.
    pub fn new(memory: &'a GuestMemory, walker: &'a GuestWalker, root: GuestRoot) -> Self {
        Self { memory, walker, root, written: Vec::new() }
    }

    /// The words that were written.
    pub fn into_written(self) -> Vec<Gpa> {
        self.written
    }

    fn reach(&self, gva: u64, operation: Operation) -> Result<(Gpa, u64), NotReached> {
        let request = Request::new(operation, Privilege::User);
        let walk = self.walker.walk(self.memory, &self.root, Gva::new(gva), request);
        let walk = walk.map_err(|error| match error {
            WalkError::Fault(fault) => NotReached::Fault { gva, error: fault.code.bits() as u32 },
            error => NotReached::Nothing(error.to_string()),
        })?;
        let gpa = walk.gpa();
        let nothing = || NotReached::Nothing(format!("{gva:#x} leads to {gpa}, not to memory"));
        Ok((gpa, self.memory.place(gpa).ok_or_else(nothing)?))
    }

    /// Code at `rip`: `count` bytes, or fewer if the next page is not there.
    pub fn code(&self, rip: u64, count: usize) -> Result<Vec<u8>, NotReached> {
        let mut bytes = Vec::new();
        let mut at = rip & !7;
        while bytes.len() < count + (rip % 8) as usize {
            match self.reach(at, Operation::Fetch) {
                Ok((_, place)) => bytes.extend(self.memory.memory.load(place).to_le_bytes()),
                Err(error) if at <= rip => return Err(error),
                Err(_) => break,
            }
            at += 8;
        }
        bytes.drain(..(rip % 8) as usize);
        bytes.truncate(count);
        Ok(bytes)
    }
}

impl Bus for Emulated<'_> {
    type Stop = NotReached;

    fn load(&mut self, gva: u64) -> Result<u64, NotReached> {
        let (_, place) = self.reach(gva, Operation::Read)?;
        Ok(self.memory.memory.load(place))
    }

    fn store(&mut self, gva: u64, value: u64) -> Result<(), NotReached> {
        let (gpa, place) = self.reach(gva, Operation::Write)?;
        self.memory.memory.store(place, value);
        self.written.push(gpa);
        Ok(())
    }
}
