//! The door between a vCPU's thread and KVM_RUN: who is inside, and how to get it out.
//!
//! Two things get a vCPU out of KVM_RUN: a *kick* ([`Door::kick`], which ends the `run`) and a
//! *closed door* ([`Door::close`], after which `run` waits outside until the door opens again).
//! Both *nudge*: they set `immediate_exit` in the vCPU's run page, then send its thread a signal.
//!
//! Why nothing is lost. Every transition happens under the door's mutex. A nudge happens only
//! while the thread is `inside`, that is after `enter` cleared `immediate_exit` and before `leave`:
//!
//! What ends the KVM_RUN, by where the thread is at the time of the nudge:
//!
//! - not yet in the system call: `immediate_exit`, which KVM reads at its start. EINTR.
//! - in the system call, past that check: the signal, which KVM looks for before each entry to the
//!   guest, and which interrupts the guest. EINTR.
//! - back from the system call: nothing; `leave` sees what was asked for.
//!
//! The store to `immediate_exit` precedes the signal, so a thread that took the signal before its
//! system call finds the byte set: the kernel's signal queue lock orders the two.
//!
//! Why nothing is left over. `enter` clears `immediate_exit`; `leave` clears `kicked`. A signal
//! that arrives after `leave` may interrupt the next KVM_RUN: `leave` then finds that nobody asked
//! for anything, and the vCPU goes back in. A thread is signalled at most once for each time it is
//! inside, so the queue of real-time signals does not fill up.

use core::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use std::{io, mem, ptr};

use kvm_bindings::kvm_run;

use super::super::machine::{MachineError, PAGE};
use super::memory::Mapping;

/// How long the closer of a door waits before it nudges again. Only a full signal queue needs that.
const NUDGE_AGAIN: Duration = Duration::from_millis(10);

/// The answer of [`Door::enter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Enter {
    /// Inside: call KVM_RUN, then [`Door::leave`].
    Go,
    /// Kicked while the door was closed: the run is over.
    Kicked,
}

/// The answer of [`Door::leave`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// The run is over; somebody kicked.
    Kicked,
    /// The run is over; nobody kicked.
    Quiet,
    /// The door was closed, or a stray signal came: enter again.
    Again,
}

/// How KVM_RUN came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Return {
    /// With an exit for the VMM.
    Exit,
    /// With EINTR.
    Interrupted,
}

#[derive(Debug, Default)]
struct State {
    /// A second mapping of the page KVM shares with the VMM. Ours, so that a kicker never touches
    /// memory that the vCPU's owner holds a `&mut kvm_run` to.
    page: Option<Mapping>,
    /// Between the first `enter` and the last `leave` of one `run`.
    running: bool,
    /// Between `enter` and `leave`.
    inside: Option<libc::pthread_t>,
    kicked: bool,
    closed: bool,
    /// A signal was sent since `enter`.
    signalled: bool,
}

impl State {
    /// Gets the thread out of KVM_RUN, or keeps it from going in, if it is inside.
    fn nudge(&mut self) {
        let (Some(thread), Some(page)) = (self.inside, &self.page) else {
            return;
        };
        // ORDERING[kvm-kick]: Relaxed. Read by the kernel in KVM_RUN; ordered by the signal that
        // follows, or by nothing at all if the system call sees it at once (module docs).
        page.byte(offset_of!(kvm_run, immediate_exit)).store(1, Ordering::Relaxed);
        if !self.signalled {
            // SAFETY: `thread` is inside, so it lives: it cannot end before `leave`, which needs
            // the mutex that our caller holds.
            let failed = unsafe { libc::pthread_kill(thread, kick_signal()) };
            // EAGAIN (the queue is full) leaves it to the next nudge.
            self.signalled = failed == 0;
        }
    }
}

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct Door {
    state: Mutex<State>,
    changed: Condvar,
}

impl Door {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock, and each field is valid at all times.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPU behind this door was created.
    ///
    /// # Errors
    /// `Unsupported` if there is one already; what `mmap` or `sigaction` says.
    pub(crate) fn install(&self, vcpu: &impl AsRawFd) -> Result<(), MachineError> {
        install_handler()?;
        let page = Mapping::new(vcpu, PAGE as usize)?;
        let mut state = self.lock();
        if state.page.replace(page).is_some() {
            return Err(MachineError::Unsupported { detail: "a vCPU that exists".to_owned() });
        }
        Ok(())
    }

    /// Called by the vCPU's thread before KVM_RUN. Waits while the door is closed.
    pub(crate) fn enter(&self) -> Enter {
        let mut state = self.lock();
        state.running = true;
        while state.closed && !state.kicked {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if mem::take(&mut state.kicked) {
            state.running = false;
            return Enter::Kicked;
        }
        if let Some(page) = &state.page {
            // ORDERING[kvm-kick]: Relaxed. Nudges come under the same mutex, so none is undone;
            // the system call that follows is made by this thread.
            page.byte(offset_of!(kvm_run, immediate_exit)).store(0, Ordering::Relaxed);
        }
        // SAFETY: no arguments, no preconditions.
        state.inside = Some(unsafe { libc::pthread_self() });
        state.signalled = false;
        Enter::Go
    }

    /// Called by the vCPU's thread after KVM_RUN.
    pub(crate) fn leave(&self, how: Return) -> Leave {
        let mut state = self.lock();
        state.inside = None;
        if state.closed {
            self.changed.notify_all();
        }
        // From here on a kick must end this run still, unless the run is over.
        if how == Return::Interrupted && !state.kicked {
            return Leave::Again;
        }
        state.running = false;
        if mem::take(&mut state.kicked) { Leave::Kicked } else { Leave::Quiet }
    }

    /// Ends the `run` that is going on, if any.
    pub(crate) fn kick(&self) {
        let mut state = self.lock();
        if state.running {
            state.kicked = true;
            state.nudge();
            self.changed.notify_all();
        }
    }

    /// Lets nobody in any longer, and asks whoever is inside to come out.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.nudge();
    }

    /// Waits until nobody is inside. The door must be closed.
    pub(super) fn wait_empty(&self) {
        let mut state = self.lock();
        while state.inside.is_some() {
            state.nudge();
            state = self
                .changed
                .wait_timeout(state, NUDGE_AGAIN)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Lets the vCPU in again.
    pub(super) fn open(&self) {
        self.lock().closed = false;
        self.changed.notify_all();
    }
}

/// The signal that interrupts KVM_RUN: a real-time one, which no library of ours uses.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// Installs the handler of [`kick_signal`], once. It does nothing: the signal is there to interrupt
/// a system call, hence no SA_RESTART.
fn install_handler() -> Result<(), MachineError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: sigaction is a plain C struct for which all zeroes means: default action, empty
        // mask, no flags.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // SAFETY: `action` is initialised; its handler touches nothing, so it is safe in any
        // thread at any time; the old action is not asked for.
        let failed = unsafe { libc::sigaction(kick_signal(), &raw const action, ptr::null_mut()) };
        if failed == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
        }
    });
    (*installed).map_err(|code| MachineError::System {
        call: "sigaction",
        source: io::Error::from_raw_os_error(code),
    })
}

/// Makes sure that the calling thread does not block [`kick_signal`].
pub(crate) fn unblock_signal() -> Result<(), MachineError> {
    // SAFETY: sigset_t is a plain C array of bits; all zeroes is the empty set.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `set` is a valid set, and the signal number is one the C library hands out.
    let failed = unsafe { libc::sigaddset(&raw mut set, kick_signal()) };
    if failed != 0 {
        return Err(super::memory::last_error("sigaddset"));
    }
    // SAFETY: `set` is initialised; the old set is not asked for.
    let code = unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) };
    if code != 0 {
        return Err(MachineError::System {
            call: "pthread_sigmask",
            source: io::Error::from_raw_os_error(code),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::{Kvm, VcpuFd};

    use super::*;

    /// A door with a vCPU behind it that never runs.
    fn door(test: &str) -> Option<(Door, VcpuFd)> {
        if let Err(why) = super::super::available() {
            super::super::skip::aloud("no /dev/kvm", test, why);
            return None;
        }
        let kvm = Kvm::new().expect("/dev/kvm");
        let vm = kvm.create_vm().expect("a VM");
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        let door = Door::default();
        door.install(&vcpu).expect("a door");
        unblock_signal().expect("the signal");
        Some((door, vcpu))
    }

    /// The moment that a running guest hardly ever shows: the thread kicks itself, so the signal is
    /// over before the system call.
    #[test]
    fn a_kick_between_enter_and_the_system_call_is_not_lost() {
        let test = "a_kick_between_enter_and_the_system_call_is_not_lost";
        let Some((door, mut vcpu)) = door(test) else {
            return;
        };
        assert_eq!(door.enter(), Enter::Go);
        door.kick();
        let error = vcpu.run().expect_err("KVM_RUN after a kick");
        assert_eq!(error.errno(), libc::EINTR);
        assert_eq!(door.leave(Return::Interrupted), Leave::Kicked);
        // It is over with that run.
        assert_eq!(door.enter(), Enter::Go);
        assert_eq!(vcpu.get_kvm_run().immediate_exit, 0);
        assert_eq!(door.leave(Return::Exit), Leave::Quiet);
    }

    #[test]
    fn an_exit_answers_the_kick_that_came_with_it() {
        let Some((door, _vcpu)) = door("an_exit_answers_the_kick_that_came_with_it") else {
            return;
        };
        door.kick();
        assert_eq!(door.enter(), Enter::Go);
        door.kick();
        assert_eq!(door.leave(Return::Exit), Leave::Kicked);
        door.kick();
        assert_eq!(door.enter(), Enter::Go);
        assert_eq!(door.leave(Return::Exit), Leave::Quiet);
    }

    #[test]
    fn an_interruption_that_nobody_asked_for_does_not_end_the_run() {
        let test = "an_interruption_that_nobody_asked_for_does_not_end_the_run";
        let Some((door, _vcpu)) = door(test) else {
            return;
        };
        assert_eq!(door.enter(), Enter::Go);
        assert_eq!(door.leave(Return::Interrupted), Leave::Again);
        // Between the two the vCPU is still in its run: a kick ends it.
        door.kick();
        assert_eq!(door.enter(), Enter::Kicked);
    }

    #[test]
    fn a_kick_ends_the_wait_at_a_closed_door() {
        let Some((door, _vcpu)) = door("a_kick_ends_the_wait_at_a_closed_door") else {
            return;
        };
        assert_eq!(door.enter(), Enter::Go);
        assert_eq!(door.leave(Return::Interrupted), Leave::Again);
        door.close();
        door.wait_empty();
        door.kick();
        assert_eq!(door.enter(), Enter::Kicked);
        door.open();
        assert_eq!(door.enter(), Enter::Go);
        assert_eq!(door.leave(Return::Exit), Leave::Quiet);
    }
}
