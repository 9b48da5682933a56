//! The guest of the scenario: each vCPU counts in its hot pages all the time, reads a cold page now
//! and then, and everything that it must find in the end is known.
//!
//! Every page holds the words that `Op::Write` put there and, at byte 8, how often it was counted
//! in: as often as its vCPU has finished rounds while it was hot.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mmu_core::spte::SpteFormat;
use mmu_model::Random;

use crate::host::DATA_GFN;
use crate::machine::{Command, Op, PAGE};
use crate::vmm::{Error, Vmm, VmmVcpu};

/// Where the count of a page stands.
const COUNT: u64 = 8;

/// Which pages are hot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heat {
    /// Of so many pages of a vCPU one is hot, counted in percent.
    pub percent: u64,
    /// Every so many pages there is a hot one; otherwise they lie together.
    pub scattered: bool,
    /// Time between two cold pages that a vCPU reads.
    pub cold_every: Duration,
    /// Pages visited by one command, at least those that are hot.
    pub visits: u64,
}

/// The hot pages of one vCPU in one phase: so many from the first, `stride` apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hot {
    first: u64,
    pages: u64,
    stride: u64,
}

impl Heat {
    /// Hot pages of a vCPU in phase `phase`: other ones in each, until they are through.
    pub fn of<F: SpteFormat>(&self, vmm: &Vmm<F>, vcpu: u32, phase: u64) -> Hot {
        let share = vmm.share(vcpu);
        let len = share.end - share.start;
        if self.scattered {
            let stride = (100 / self.percent).max(1);
            let offset = phase % stride;
            let pages = len.saturating_sub(offset).div_ceil(stride);
            return Hot { first: share.start + offset, pages, stride };
        }
        let pages = (len * self.percent / 100).max(1);
        let places = (len / pages).max(1);
        Hot { first: share.start + phase % places * pages, pages, stride: 1 }
    }

    /// Hot pages of all vCPUs.
    pub fn pages<F: SpteFormat>(&self, vmm: &Vmm<F>, phase: u64) -> u64 {
        (0..vmm.shape.vcpus).map(|vcpu| self.of(vmm, vcpu, phase).pages).sum()
    }
}

impl Hot {
    fn contains(&self, page: u64) -> bool {
        let steps = page.checked_sub(self.first).filter(|steps| steps % self.stride == 0);
        steps.is_some_and(|steps| steps / self.stride < self.pages)
    }

    fn command(&self, op: Op, rounds: u64) -> Command {
        Command {
            op,
            start: (DATA_GFN + self.first) * PAGE,
            pages: self.pages,
            stride: self.stride,
            tag: 0,
            rounds,
        }
    }
}

/// What the vCPUs have done, for those who watch, and what they are to do.
#[derive(Debug)]
pub struct Progress {
    /// Commands that each vCPU has ended.
    commands: Vec<AtomicU64>,
    /// Pages visited by all.
    visits: AtomicU64,
    /// Which pages are hot.
    phase: AtomicU64,
    /// Times that the tiering thread has taken pages away.
    turns: AtomicU64,
    /// An aging pass is under way.
    looking: AtomicBool,
    stop: AtomicBool,
}

impl Progress {
    /// Nothing done yet, phase 0.
    pub fn new(vcpus: u32) -> Self {
        Self {
            commands: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
            visits: AtomicU64::new(0),
            phase: AtomicU64::new(0),
            turns: AtomicU64::new(0),
            looking: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        }
    }

    /// Commands that each vCPU has ended.
    pub fn commands(&self) -> Vec<u64> {
        self.commands.iter().map(|count| count.load(Ordering::Acquire)).collect()
    }

    /// Pages visited by all vCPUs.
    pub fn visits(&self) -> u64 {
        self.visits.load(Ordering::Relaxed)
    }

    /// The phase of the guest.
    pub fn phase(&self) -> u64 {
        self.phase.load(Ordering::Relaxed)
    }

    /// Other pages are hot from now on.
    pub fn enter_phase(&self, phase: u64) {
        self.phase.store(phase, Ordering::Relaxed);
    }

    /// Times that the tiering thread has taken pages away.
    pub fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// The tiering thread has taken pages away once more.
    pub fn took_turn(&self) {
        self.turns.fetch_add(1, Ordering::Relaxed);
    }

    /// An aging pass begins, or has ended.
    pub fn looking(&self, looking: bool) {
        self.looking.store(looking, Ordering::Release);
    }

    /// Is an aging pass under way, so that pages are between two generations?
    pub fn is_looking(&self) -> bool {
        self.looking.load(Ordering::Acquire)
    }

    /// Are vCPUs to stop?
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// vCPUs end what they run and stop, or may run.
    pub fn stop(&self, stop: bool) {
        self.stop.store(stop, Ordering::Relaxed);
    }
}

/// The program of all vCPUs, and a record of what it did.
#[derive(Debug)]
pub struct Guest {
    heat: Heat,
    tag: u64,
    /// Rounds of each vCPU in each phase.
    rounds: Mutex<Vec<Vec<u64>>>,
}

impl Guest {
    /// A program that has not begun. Words depend on `tag`.
    pub fn new(heat: Heat, vcpus: u32, tag: u64) -> Self {
        Self { heat, tag, rounds: Mutex::new(vec![Vec::new(); vcpus as usize]) }
    }

    /// Write all pages of a vCPU.
    pub fn populate<F: SpteFormat>(&self, vcpu: &mut VmmVcpu<F>) -> Result<u64, Error> {
        let share = vcpu.vmm().share(vcpu.id);
        Ok(vcpu.run_pages(Op::Write, share, self.tag, 1)?.pages)
    }

    /// Read all pages of a vCPU; how many hold something else than it wrote.
    pub fn verify<F: SpteFormat>(&self, vcpu: &mut VmmVcpu<F>) -> Result<(u64, u64), Error> {
        let share = vcpu.vmm().share(vcpu.id);
        let report = vcpu.run_pages(Op::Verify, share, self.tag, 1)?;
        Ok((report.pages, report.mismatches))
    }

    /// Read the hot pages of a vCPU once.
    pub fn look<F: SpteFormat>(&self, vcpu: &mut VmmVcpu<F>) -> Result<u64, Error> {
        let hot = self.heat.of(vcpu.vmm(), vcpu.id, 0);
        Ok(vcpu.run(&hot.command(Op::Read, 1))?.pages)
    }

    /// Count in hot pages until told to stop. Returns how many cold pages held something else than
    /// was written there.
    pub fn run<F: SpteFormat>(
        &self,
        vcpu: &mut VmmVcpu<F>,
        progress: &Progress,
    ) -> Result<u64, Error> {
        let id = vcpu.id as usize;
        let mut random = Random::new(self.tag ^ (u64::from(vcpu.id) << 32) ^ progress.visits());
        let mut rounds: Vec<u64> = Vec::new();
        let mut next_cold = Instant::now() + self.heat.cold_every;
        let mut wrong = 0;
        while !progress.is_stopped() {
            let phase = progress.phase();
            let hot = self.heat.of(vcpu.vmm(), vcpu.id, phase);
            let turns = (self.heat.visits / hot.pages).max(1);
            let visited = vcpu.run(&hot.command(Op::Increment, turns))?.pages;
            rounds.resize(rounds.len().max(phase as usize + 1), 0);
            rounds[phase as usize] += turns;
            progress.visits.fetch_add(visited, Ordering::Relaxed);
            progress.commands[id].fetch_add(1, Ordering::Release);
            if Instant::now() >= next_cold {
                next_cold = Instant::now() + self.heat.cold_every;
                let share = vcpu.vmm().share(vcpu.id);
                let page = share.start + random.below(share.end - share.start);
                wrong += vcpu.run_pages(Op::Verify, page..page + 1, self.tag, 1)?.mismatches;
            }
        }
        let mut all = self.rounds.lock().map_err(|_| "a vCPU thread panicked")?;
        let mine = &mut all[id];
        mine.resize(mine.len().max(rounds.len()), 0);
        mine.iter_mut().zip(&rounds).for_each(|(sum, rounds)| *sum += rounds);
        Ok(wrong)
    }

    /// Pages whose count is not the number of rounds in which they were hot, read by the VMM from
    /// memory, where all pages are; no vCPU runs.
    pub fn miscounted<F: SpteFormat>(&self, vmm: &Vmm<F>) -> Result<u64, Error> {
        let all = self.rounds.lock().map_err(|_| "a vCPU thread panicked")?;
        let mut wrong = 0;
        for (vcpu, rounds) in (0..vmm.shape.vcpus).zip(all.iter()) {
            let hot: Vec<_> =
                (0..).zip(rounds).map(|(phase, n)| (self.heat.of(vmm, vcpu, phase), n)).collect();
            for page in vmm.share(vcpu) {
                let expected: u64 = hot
                    .iter()
                    .filter(|(hot, _)| hot.contains(page))
                    .map(|(_, rounds)| *rounds)
                    .sum();
                wrong += u64::from(vmm.word(page, COUNT) != expected);
            }
        }
        Ok(wrong)
    }
}
