//! Running programs on a vCPU of any kind.
//!
//! Owns [`Runner`], which vCPUs on nested tables (`vcpu.rs`), on shadow tables and on shadows of
//! nested tables (`shadow/`) implement, and the loops that are the same for all. No locks.

use mmu_core::fault::FaultOutcome;

use crate::guest::program::DONE;
use crate::trouble::Trouble;
use crate::virt::state::gpr::{R8, R9, R10, R11, RBX, RDI, RDX, RSI};
use crate::virt::{Exit, GuestState};
use crate::vm::{Done, Task};

/// Exits after which a guest that should have ended is given up.
const PATIENCE: u32 = 20_000_000;

/// What came of one entry.
#[derive(Clone, Copy, Debug)]
pub enum Progress {
    /// The host did what the exit asked for: on with the guest.
    On,
    /// Something else wants the CPU; on with the guest afterwards.
    Interrupted,
    /// The MMU does not let the guest go on, for now or for ever.
    Refused(FaultOutcome, Trouble),
    /// The guest stopped for another reason.
    Stopped(Exit),
}

/// A vCPU that runs programs.
pub trait Runner {
    /// The guest's registers.
    fn registers(&mut self) -> &mut GuestState;

    /// Run the guest until it exits once, and do what that asks of the host.
    ///
    /// # Errors
    /// [`Trouble`]: nobody can.
    fn proceed(&mut self) -> Result<Progress, Trouble>;

    /// Faults handled: fixed, spurious, to be retried.
    fn faults(&self) -> [u64; 3];

    /// Set the registers to begin `task`.
    fn begin(&mut self, task: &Task) {
        let state = self.registers();
        state.rip = task.program.entry();
        let gpr = &mut state.gpr;
        gpr[RDI] = task.address;
        gpr[RSI] = task.count;
        gpr[RDX] = task.stride;
        gpr[R8] = task.value;
        gpr[R11] = task.rounds;
        gpr[RBX] = 0;
    }

    /// What the program came to, if `exit` is its end.
    fn done(&mut self, exit: Exit) -> Result<Done, Trouble> {
        let state = self.registers();
        match exit {
            Exit::Out { port: DONE, .. } => {
                let gpr = &state.gpr;
                Ok(Done { wrong: gpr[RBX], last: (gpr[R9], gpr[R10]) })
            }
            exit => Err(Trouble::Exit(exit, state.rip)),
        }
    }

    /// Run the guest, handling its faults, until it stops for another reason.
    fn run(&mut self) -> Result<Exit, Trouble> {
        for _ in 0..PATIENCE {
            match self.proceed()? {
                Progress::On | Progress::Interrupted => {}
                Progress::Refused(_, trouble) => return Err(trouble),
                Progress::Stopped(exit) => return Ok(exit),
            }
        }
        Err(Trouble::Endless(self.registers().rip))
    }

    /// Run `task` to its end.
    fn perform(&mut self, task: &Task) -> Result<Done, Trouble> {
        self.begin(task);
        let exit = self.run()?;
        self.done(exit)
    }
}
