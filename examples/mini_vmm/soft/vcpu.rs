//! A software vCPU: executes a [`Command`] page by page through its core's caches.
//!
//! The core is locked for a chunk of pages at a time, translation and data access together, so
//! that whoever locks the core knows that no access through an old translation is under way.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mmu_model::{Access, AccessKind, Fault, FaultKind, SoftCpu};

use super::super::machine::{
    Churn, Command, Exit, FACTOR, MachineError, Op, PAGE, Report, Vcpu, content,
};
use super::{Core, Shared};

/// Pages executed before flushes and kicks get their turn: a few microseconds.
const CHUNK: u32 = 64;
/// Turns of the empty loop of [`Churn::delay`] before kicks get their turn, but for one page.
const IDLE: u64 = 1 << 15;

/// Pages in a CPU's log with which it leaves its guest: real ones have room for 512.
const LOG_FULL: usize = 256;

/// Where `Op::Write` and `Op::Verify` have their second word.
const SECOND_WORD: u64 = 2048;
/// The word of `Op::Increment`.
const COUNTER: u64 = 8;

/// Why a page could not be completed.
enum Stop {
    Fault(Fault),
    /// The translation leads to a physical address without memory.
    NoMemory {
        gva: u64,
        pa: u64,
    },
}

/// A command and how far it got.
#[derive(Clone, Copy, Debug)]
struct Program {
    command: Command,
    rounds_left: u64,
    pages_left: u64,
    gva: u64,
    report: Report,
}

impl Program {
    fn new(command: &Command) -> Self {
        Self {
            command: *command,
            rounds_left: command.rounds,
            pages_left: command.pages,
            gva: command.start,
            report: Report::default(),
        }
    }

    /// The next page, if there is one.
    fn next(&mut self) -> Option<u64> {
        if self.pages_left == 0 {
            self.rounds_left = self.rounds_left.saturating_sub(1);
            if self.rounds_left == 0 || self.command.pages == 0 {
                return None;
            }
            self.pages_left = self.command.pages;
            self.gva = self.command.start;
        }
        Some(self.gva)
    }

    /// Pages of a chunk.
    fn chunk(&self) -> u64 {
        match self.command.op {
            Op::Churn(churn) => (IDLE / churn.delay.saturating_add(1)).clamp(1, u64::from(CHUNK)),
            _ => u64::from(CHUNK),
        }
    }

    /// What [`Churn::delay`] asks for a chunk; outside the lock of the core.
    fn idle(&self) {
        if let Op::Churn(churn) = self.command.op {
            for turn in 0..churn.delay.saturating_mul(self.chunk()) {
                std::hint::black_box(turn);
            }
        }
    }

    /// The page is done.
    fn advance(&mut self, matched: bool) {
        if !matched {
            if self.report.mismatches == 0 {
                self.report.first_mismatch = self.gva;
            }
            self.report.mismatches += 1;
        }
        self.report.pages += 1;
        self.pages_left -= 1;
        // Wraps at most behind the last page (see `check`).
        self.gva = self.gva.wrapping_add(self.command.stride * PAGE);
    }
}

/// A command that the machine can execute.
fn check(command: &Command) -> Result<(), MachineError> {
    let unsupported = |detail: String| Err(MachineError::Unsupported { detail });
    let aligned = match command.op {
        Op::Churn(churn) => churn.begins_at(command.start),
        _ => command.start % PAGE == 0,
    };
    if !aligned || command.stride == 0 || command.rounds == 0 {
        return unsupported(format!("misaligned start, no stride or no rounds: {command:?}"));
    }
    let steps = command.pages.saturating_sub(1);
    let length = command.stride.checked_mul(PAGE).and_then(|step| step.checked_mul(steps));
    if length.and_then(|length| command.start.checked_add(length)).is_none() {
        return unsupported(format!("beyond the address space: {command:?}"));
    }
    if let Op::Churn(churn) = command.op {
        let _ = churn.limit(command.pages, command.rounds)?;
    }
    Ok(())
}

/// One software vCPU.
#[derive(Debug)]
pub(super) struct SoftVcpu {
    shared: Arc<Shared>,
    id: u32,
    root: Option<u64>,
    program: Option<Program>,
}

impl SoftVcpu {
    pub(super) fn new(shared: Arc<Shared>, id: u32) -> Self {
        Self { shared, id, root: None, program: None }
    }

    fn core(&self) -> Result<&Core, MachineError> {
        let index = usize::try_from(self.id).ok();
        let core = index.and_then(|index| self.shared.cores.get(index));
        core.ok_or_else(|| self.unsupported("there is no such vCPU"))
    }

    fn unsupported(&self, what: &str) -> MachineError {
        MachineError::Unsupported { detail: format!("vCPU {}: {what}", self.id) }
    }

    fn exit(&self, stop: Stop) -> Result<Exit, MachineError> {
        let detail = match stop {
            Stop::Fault(fault) => match fault.kind {
                FaultKind::NotPresent | FaultKind::Protection | FaultKind::Reserved => {
                    return Ok(Exit::Fault { gva: fault.address, error: fault.page_fault_error() });
                }
                FaultKind::BadAddress | FaultKind::NoMemory | FaultKind::Contended => {
                    format!("{fault:x?} with the root at page {:x?}", self.root)
                }
            },
            Stop::NoMemory { gva, pa } => {
                format!("{gva:#x} is mapped to {pa:#x}, where there is no memory")
            }
        };
        Err(MachineError::UnexpectedExit { vcpu: self.id, detail })
    }
}

impl Vcpu for SoftVcpu {
    fn start(&mut self, command: &Command) -> Result<(), MachineError> {
        if self.program.is_some() {
            return Err(self.unsupported("a second command before the first is done"));
        }
        check(command)?;
        self.program = Some(Program::new(command));
        Ok(())
    }

    fn set_root(&mut self, root: u64) -> Result<(), MachineError> {
        if root >= self.shared.mapping.memory.len / PAGE {
            return Err(self.unsupported(&format!("a root at page {root:#x}, beyond the memory")));
        }
        self.core()?.lock().set_root(root * PAGE);
        self.root = Some(root);
        Ok(())
    }

    fn take_log(&mut self) -> Vec<u64> {
        self.core().map(|core| core.lock().take_log()).unwrap_or_default()
    }

    fn run(&mut self) -> Result<Exit, MachineError> {
        let core = self.core()?;
        let (Some(mut program), Some(_)) = (self.program, self.root) else {
            return Err(self.unsupported("run without a command and a root"));
        };
        // ORDERING[soft-kick]: Acquire, here and below. Pairs with the Release in `kick_all`.
        let kicks = self.shared.kicks.load(Ordering::Acquire);
        // Ends: each chunk completes pages of a finite program, or stops.
        loop {
            let chunk = {
                let mut cpu = core.lock();
                Guest { shared: &self.shared, cpu: &mut cpu }.execute(&mut program)
            };
            let exit = match chunk {
                ControlFlow::Break(Ok(report)) => {
                    self.program = None;
                    return Ok(Exit::Done(report));
                }
                ControlFlow::Break(Err(stop)) => self.exit(stop),
                ControlFlow::Continue(()) => {
                    program.idle();
                    let full = core.lock().logged() >= LOG_FULL;
                    if !full && self.shared.kicks.load(Ordering::Acquire) == kicks {
                        continue;
                    }
                    Ok(Exit::Kicked)
                }
            };
            self.program = Some(program);
            return exit;
        }
    }
}

/// A vCPU while its core is locked.
struct Guest<'a> {
    shared: &'a Shared,
    cpu: &'a mut SoftCpu,
}

impl Guest<'_> {
    /// Execute a chunk. Breaks when the program is done or stops.
    fn execute(&mut self, program: &mut Program) -> ControlFlow<Result<Report, Stop>> {
        if let Op::Churn(churn) = program.command.op {
            return self.churn(program, &churn);
        }
        for _ in 0..CHUNK {
            let Some(gva) = program.next() else {
                return ControlFlow::Break(Ok(program.report));
            };
            match self.page(&program.command, gva) {
                Ok(matched) => program.advance(matched),
                Err(stop) => return ControlFlow::Break(Err(stop)),
            }
        }
        ControlFlow::Continue(())
    }

    /// A chunk of [`Op::Churn`]: nothing of its progress is kept outside guest memory.
    fn churn(&mut self, program: &mut Program, churn: &Churn) -> ControlFlow<Result<Report, Stop>> {
        let Command { start, pages, rounds, .. } = program.command;
        let (round, others) = ((pages - 1).next_power_of_two(), pages - 1);
        for _ in 0..program.chunk() {
            match self.churn_step(churn, start, others, round, rounds) {
                Ok(true) => program.report.pages += 1,
                Ok(false) => return ControlFlow::Break(Ok(program.report)),
                Err(stop) => return ControlFlow::Break(Err(stop)),
            }
        }
        ControlFlow::Continue(())
    }

    /// One step; false if there is none left.
    fn churn_step(
        &mut self,
        churn: &Churn,
        control: u64,
        others: u64,
        round: u64,
        rounds: u64,
    ) -> Result<bool, Stop> {
        let step = self.load(control)?;
        if step / round >= rounds {
            return Ok(false);
        }
        let other = step.wrapping_mul(churn.multiplier).wrapping_add(churn.offset) % round;
        if other < others {
            let gva = control + (other + 1) * PAGE;
            if other.wrapping_mul(FACTOR) >> 57 < churn.written {
                self.store(gva, step)?;
                self.store(gva + SECOND_WORD, content(gva, step))?;
            } else {
                let _ = self.load(gva)?;
            }
        }
        self.store(control, step + 1)?;
        Ok(true)
    }

    /// Do one page. False if its content was not what was expected. A page that stops half-way is
    /// done again from its beginning, which no operation minds.
    #[inline]
    fn page(&mut self, command: &Command, gva: u64) -> Result<bool, Stop> {
        let expected = content(gva, command.tag);
        match command.op {
            Op::Write => {
                self.store(gva, expected)?;
                self.store(gva + SECOND_WORD, expected)?;
                Ok(true)
            }
            Op::Read => self.load(gva).map(|_| true),
            Op::Verify => {
                Ok(self.load(gva)? == expected && self.load(gva + SECOND_WORD)? == expected)
            }
            Op::Increment => {
                let count = self.load(gva + COUNTER)?;
                self.store(gva + COUNTER, count.wrapping_add(1))?;
                Ok(true)
            }
            // Does not go by pages.
            Op::Churn(_) => Ok(true),
        }
    }

    #[inline]
    fn load(&mut self, gva: u64) -> Result<u64, Stop> {
        let word = self.word(gva, AccessKind::Read)?;
        // ORDERING[soft-data]: Acquire, as every load of an x86 guest. Pairs with guests' stores.
        Ok(word.load(Ordering::Acquire))
    }

    #[inline]
    fn store(&mut self, gva: u64, value: u64) -> Result<(), Stop> {
        let word = self.word(gva, AccessKind::Write)?;
        // ORDERING[soft-data]: Release, as every store of an x86 guest. Pairs with guests' loads
        // and with the VMM's.
        word.store(value, Ordering::Release);
        Ok(())
    }

    #[inline]
    fn word(&mut self, gva: u64, kind: AccessKind) -> Result<&AtomicU64, Stop> {
        let mem = &self.shared.mem;
        let pa = self.cpu.access(mem, gva, Access::user(kind)).map_err(Stop::Fault)?;
        mem.word(pa).ok_or(Stop::NoMemory { gva, pa })
    }
}
