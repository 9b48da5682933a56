//! The boot loader: puts the guest operating system into memory, with tables to start on, and reads
//! its results.

use crate::machine::{Memory, PAGE, RSP, Registers};
use crate::vmm::Error;

use super::layout::{
    COUNTS_PAGE, DATA, DATA_PAGE, KERNEL, MEMORY, MOST_PROCESSES, PROCESS_PAGE, ROW, STACK_PAGE,
    process, word,
};
use super::os;
use super::script::{ENCODED, LARGE, Script};

/// Entries of a table: present, writable, for user code.
const ENTRY: u64 = 7;
/// A leaf of 2 MiB.
const LARGE_ENTRY: u64 = ENTRY | 1 << 7;
/// Pages between the start of memory and the pages of 2 MiB that processes get.
pub const SMALL_BYTES: u64 = 12 << 20;
/// Number of r15 among the general registers.
const R15: usize = 15;

/// A guest's memory, as its loader sees it.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    memory: Memory,
    /// Where the guest's memory begins in the machine's.
    start: u64,
    /// Bytes of it.
    bytes: u64,
}

/// How the guest begins.
#[derive(Clone, Debug)]
pub struct Start {
    /// Registers.
    pub registers: Registers,
    /// Its tables.
    pub cr3: u64,
}

/// What the guest said in the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Sum of the digests of its processes.
    pub result: u64,
    /// Accesses that it refused.
    pub refused: u64,
    /// Page faults that it handled.
    pub faults: u64,
    /// Pages that it copied on write.
    pub copies: u64,
    /// Address spaces that it switched to.
    pub switches: u64,
}

impl Image {
    /// Guest memory of `pages` pages from physical page `start` of the machine on.
    pub fn new(memory: Memory, start: u64, pages: u64) -> Self {
        Self { memory, start: start * PAGE, bytes: pages * PAGE }
    }

    fn store(&self, offset: u64, value: u64) {
        self.memory.store(self.start + offset, value);
    }

    fn data(&self, word: u64) -> u64 {
        self.memory.load(self.start + DATA_PAGE * PAGE + word)
    }

    /// Put the guest in, which runs `script`; `stub` pages of the machine's, from linear 0 on, are
    /// mapped in each of its spaces.
    pub fn load(
        &self,
        script: &Script,
        digest: u64,
        quantum: u64,
        stub: u64,
    ) -> Result<Start, Error> {
        let counts = self.bytes / PAGE * 8;
        let scripts = COUNTS_PAGE * PAGE + counts.next_multiple_of(PAGE);
        let operations: u64 = script.processes.iter().map(|one| one.len() as u64).sum();
        let tables = (scripts + operations * ENCODED).next_multiple_of(PAGE);
        let fits = KERNEL + tables <= LARGE && stub * PAGE <= KERNEL;
        if !fits || self.bytes % LARGE != 0 || self.bytes <= SMALL_BYTES {
            return Err(
                format!("{operations} operations in {} bytes do not fit", self.bytes).into()
            );
        }
        if script.processes.len() as u64 > MOST_PROCESSES {
            return Err(
                format!("{} processes: {MOST_PROCESSES} at most", script.processes.len()).into()
            );
        }
        self.code()?;
        self.scripts(script, scripts, digest);
        let unused = self.tables(tables, stub);
        let words = [
            (word::NEXT, MEMORY + unused),
            (word::LIMIT, MEMORY + SMALL_BYTES),
            (word::HUGE_NEXT, MEMORY + SMALL_BYTES),
            (word::HUGE_LIMIT, MEMORY + self.bytes),
            (word::QUANTUM, quantum),
            (word::COUNTS, KERNEL + COUNTS_PAGE * PAGE),
        ];
        for (word, value) in words {
            self.store(DATA_PAGE * PAGE + word, value);
        }
        let mut registers = Registers { rip: KERNEL, rflags: 2, ..Registers::default() };
        registers.general[RSP] = KERNEL + (STACK_PAGE + 1) * PAGE;
        registers.general[R15] = DATA;
        Ok(Start { registers, cr3: MEMORY + tables })
    }

    /// The kernel's code, and its IDT: one gate.
    fn code(&self) -> Result<(), Error> {
        let code = os::code();
        if code.len() as u64 > DATA_PAGE * PAGE {
            return Err(format!("a kernel of {} bytes does not fit", code.len()).into());
        }
        self.replace_code(code);
        let handler = os::page_fault_handler();
        // Present, an interrupt gate, to selector 8.
        let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        let gate = DATA_PAGE * PAGE + word::IDT + 14 * 16;
        self.store(gate, low);
        self.store(gate + 8, handler >> 32);
        self.store(DATA_PAGE * PAGE + word::IDTR - 6, 0xff << 48);
        self.store(DATA_PAGE * PAGE + word::IDTR + 2, DATA + word::IDT);
        Ok(())
    }

    /// Put code where the kernel's is.
    pub fn replace_code(&self, code: &[u8]) {
        for (at, bytes) in (0..).step_by(8).zip(code.chunks(8)) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            self.store(at, u64::from_le_bytes(word));
        }
    }

    /// Scripts from `at` on, and the first process.
    fn scripts(&self, script: &Script, at: u64, digest: u64) {
        let begin = |number: u64| {
            let before: usize = script.processes.iter().take(number as usize).map(Vec::len).sum();
            KERNEL + at + before as u64 * ENCODED
        };
        let operations = script.processes.iter().flatten();
        for (at, operation) in (at..).step_by(ENCODED as usize).zip(operations) {
            for (at, word) in (at..).step_by(8).zip(operation.encode(begin)) {
                self.store(at, word);
            }
        }
        let first = PROCESS_PAGE * PAGE;
        self.store(first + process::STATE, 1);
        self.store(first + process::NEXT, begin(0));
        self.store(first + process::DIGEST, digest);
    }

    /// The tables to start on, from `at` on; where they end.
    fn tables(&self, at: u64, stub: u64) -> u64 {
        let table = |number: u64| at + number * PAGE;
        let link = |from: u64, index: u64, to: u64| {
            self.store(table(from) + index * 8, (MEMORY + table(to)) | ENTRY);
        };
        link(0, 0, 1);
        link(1, 0, 2);
        link(2, 0, 3);
        for page in 0..stub {
            self.store(table(3) + page * 8, (page * PAGE) | ENTRY);
        }
        for page in 0..at / PAGE {
            self.store(table(3) + (KERNEL / PAGE + page) * 8, (MEMORY + page * PAGE) | ENTRY);
        }
        link(0, ROW >> 39, 4);
        link(4, 0, 5);
        for large in 0..self.bytes / LARGE {
            self.store(table(5) + large * 8, (MEMORY + large * LARGE) | LARGE_ENTRY);
        }
        table(6)
    }

    /// What the guest said.
    pub fn outcome(&self) -> Outcome {
        Outcome {
            result: self.data(word::RESULT),
            refused: self.data(word::REFUSED),
            faults: self.data(word::FAULTS),
            copies: self.data(word::COPIES),
            switches: self.data(word::SWITCHES),
        }
    }
}
