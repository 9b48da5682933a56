//! Several vCPUs that work on their memory and check it while the host does something to it.
//!
//! Each vCPU has a share of the data and goes over it round after round: every word must be what
//! the round before left there, so a lost write, a stale translation or a page at the wrong place
//! shows, whenever it happens. CPU 0 runs the host's steps and between them a slice of its own
//! vCPUs; the other CPUs run theirs all the time. With one CPU the vCPUs take turns.
//!
//! Lock: one around each vCPU's result; leaves.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mmu_core::fault::{EmulateReason, FaultOutcome};
use mmu_core::vm::Actor;

use crate::guest::program::Program;
use crate::host::BareHost;
use crate::lab::Lab;
use crate::machine::lock::Lock;
use crate::machine::memory::{Memory, PAGE};
use crate::machine::{apic, cpu};
use crate::runner::{Progress, Runner};
use crate::trouble::Trouble;
use crate::vcpu::BareVcpu;
use crate::virt::Virt;
use crate::vm::{Done, Task, Vm, data_at, word};

/// Fewest vCPUs.
const FEWEST: usize = 2;
/// Ticks of a slice on CPU 0, before something random is added.
const SLICE: u32 = 50_000;
/// Distance between the words that are used.
pub const STRIDE: u64 = 64;
/// Rounds that a vCPU makes before it looks whether it is to stop.
const BATCH: u64 = 2;

/// A VM that a crowd can work in: its guests see the data from [`data_at`] on.
pub trait Place: Sync {
    /// Its vCPUs.
    type Vcpu: Runner;

    /// vCPU number `id` on the calling CPU.
    fn member(&self, id: usize) -> Self::Vcpu;

    /// A handle for a CPU that is no vCPU at the moment.
    fn handle(&self) -> Actor<BareHost>;

    /// All data.
    fn memory(&self) -> &Memory;
}

impl<V: Virt> Place for Vm<V> {
    type Vcpu = BareVcpu<V>;

    fn member(&self, id: usize) -> BareVcpu<V> {
        self.vcpu(id)
    }

    fn handle(&self) -> Actor<BareHost> {
        self.actor()
    }

    fn memory(&self) -> &Memory {
        &self.data
    }
}

/// One vCPU's part.
#[derive(Clone, Copy, Debug)]
struct Part {
    id: usize,
    pages: u64,
    /// Rounds it has made: what its words hold now.
    rounds: u64,
    wrong: u64,
    faults: [u64; 3],
    trouble: Option<Trouble>,
}

impl Part {
    fn task(&self, program: Program) -> Task {
        let (count, first) = (self.pages * PAGE / STRIDE, self.id as u64 * self.pages);
        let words = Task { stride: STRIDE, ..Task::words(program, data_at(first), count) };
        Task { value: self.rounds, rounds: BATCH, ..words }
    }

    fn finished(&mut self, done: Done) {
        self.rounds += BATCH;
        self.wrong += done.wrong;
    }
}

/// A vCPU at work.
struct Worker<R> {
    vcpu: R,
    part: Part,
    busy: bool,
}

impl<R: Runner> Worker<R> {
    fn new(vcpu: R, id: usize, pages: u64) -> Self {
        let trouble = None;
        let part = Part { id, pages, rounds: 0, wrong: 0, faults: [0; 3], trouble };
        let mut worker = Self { vcpu, part, busy: false };
        // What round 0 finds.
        let filled = worker.vcpu.perform(&part.task(Program::Fill));
        worker.note(filled.map(|_| ()));
        worker
    }

    fn note<T>(&mut self, result: Result<T, Trouble>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(trouble) => {
                self.part.trouble.get_or_insert(trouble);
                None
            }
        }
    }

    /// Go on until something interrupts, or a batch is done.
    fn slice(&mut self) {
        if !self.busy {
            self.vcpu.begin(&self.part.task(Program::Rounds));
            self.busy = true;
        }
        let end = loop {
            match self.vcpu.proceed() {
                Ok(Progress::On) => {}
                Ok(Progress::Interrupted) => return,
                // Its slot is on its way back, or its page is let go again: let CPU 0, if it is
                // this one, do its part.
                Ok(Progress::Refused(
                    FaultOutcome::Emulate(EmulateReason::NoSlot { .. })
                    | FaultOutcome::WriteProtected,
                    _,
                )) => return,
                Ok(Progress::Refused(_, trouble)) | Err(trouble) => break Err(trouble),
                Ok(Progress::Stopped(exit)) => break self.vcpu.done(exit),
            }
        };
        self.busy = false;
        if let Some(done) = self.note(end) {
            self.part.finished(done);
        }
    }

    fn finish(mut self) -> Part {
        while self.busy && self.part.trouble.is_none() {
            self.slice();
        }
        if self.part.trouble.is_none() {
            let verified = self.vcpu.perform(&self.part.task(Program::Verify));
            if let Some(done) = self.note(verified) {
                self.part.wrong += done.wrong;
            }
        }
        self.part.faults = self.vcpu.faults();
        self.part
    }
}

/// How a crowd got on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Crowd {
    /// vCPUs.
    pub vcpus: usize,
    /// Rounds that all of them made.
    pub rounds: u64,
    /// Words that were not what they should have been, seen by guests or, at the end, by the host.
    pub wrong: u64,
    /// Faults handled: fixed, spurious, retried.
    pub faults: [u64; 3],
    /// What ended a vCPU early.
    pub trouble: Option<Trouble>,
}

/// Run a crowd over `pages` pages a vCPU while `host` does `steps` steps.
pub fn run<V: Virt, P: Place>(
    lab: &Lab<V>,
    vm: &P,
    pages: u64,
    steps: u64,
    host: &mut (dyn FnMut(&mut Actor<BareHost>, u64) + Send),
) -> Crowd {
    let vcpus = lab.cpus.max(FEWEST);
    assert!(vcpus as u64 * pages * PAGE <= vm.memory().bytes());
    let (stop, host) = (AtomicBool::new(false), Lock::new(host));
    let filled = AtomicUsize::new(0);
    let parts: Lock<Vec<Part>> = Lock::new(Vec::new());
    cpu::on_all(lab.cpus, &|number| {
        let ids = (number..vcpus).step_by(lab.cpus);
        let worker = |id| Worker::new(vm.member(id), id, pages);
        let mut workers: Vec<Worker<P::Vcpu>> = ids.map(worker).collect();
        filled.fetch_add(1, Ordering::AcqRel);
        if number == 0 {
            while filled.load(Ordering::Acquire) < lab.cpus {
                core::hint::spin_loop();
            }
            let mut actor = vm.handle();
            let mut host = host.lock();
            for step in 0..steps {
                host(&mut actor, step);
                for worker in &mut workers {
                    // Not always the same length, or the same step meets the same instruction.
                    apic::ring_later(SLICE + (cpu::tsc() as u32 >> 4) % SLICE);
                    worker.slice();
                    apic::ring_later(0);
                }
            }
            stop.store(true, Ordering::Release);
        } else {
            while !stop.load(Ordering::Acquire) {
                workers.iter_mut().for_each(Worker::slice);
            }
        }
        let ended: Vec<Part> = workers.into_iter().map(Worker::finish).collect();
        parts.lock().extend(ended);
    });
    let mut crowd = Crowd { vcpus, ..Crowd::default() };
    for part in parts.lock().iter() {
        crowd.rounds += part.rounds;
        crowd.wrong += part.wrong + wrong_words(vm, part);
        crowd.trouble = crowd.trouble.or(part.trouble);
        crowd.faults.iter_mut().zip(part.faults).for_each(|(all, one)| *all += one);
    }
    crowd
}

/// The words that a crowd uses in these pages of the data, summed up.
pub fn sum(vm: &impl Place, first: u64, pages: u64) -> u64 {
    let words = &vm.memory().words()[(first * 512) as usize..((first + pages) * 512) as usize];
    let used = words.iter().step_by(STRIDE as usize / 8);
    used.fold(0, |sum, word| sum.wrapping_mul(31).wrapping_add(word.load(Ordering::Acquire)))
}

/// Words of a vCPU's share that the host finds wrong at the end.
fn wrong_words(vm: &impl Place, part: &Part) -> u64 {
    let start = part.id as u64 * part.pages * PAGE;
    let words = (start..start + part.pages * PAGE).step_by(STRIDE as usize);
    let is_wrong = |offset: &u64| word(vm.memory(), *offset) != (data_at(0) + offset) ^ part.rounds;
    words.filter(is_wrong).count() as u64
}

impl<V: Virt> Lab<V> {
    /// Check that a crowd got through with its memory as it should be.
    pub fn crowd(&mut self, name: &str, crowd: &Crowd) -> bool {
        let Crowd { vcpus, rounds, wrong, faults, trouble } = *crowd;
        if let Some(trouble) = trouble {
            return self.check(name, false, format_args!("{trouble}"));
        }
        self.check(
            name,
            wrong == 0 && rounds > 0,
            format_args!(
                "{vcpus} vCPUs, {rounds} rounds, {wrong} words wrong, faults: {} fixed, {} \
                 spurious, {} retried",
                faults[0], faults[1], faults[2]
            ),
        )
    }
}
