//! [`Tierer`]: the thread that ages the VM and takes its cold pages away.
//!
//! The chain: an aging pass opens a generation; the pages of the oldest ones are candidates; each
//! is asked once more whether it was used; what is still cold is unmapped, flushed, written to the
//! slow tier, and its memory given back. Pages that faults brought back are told to the table.
//!
//! Unmapping happens inside an invalidation, writing outside: a fault on a page that is on its way
//! out does not wait for the disk, it takes the page back ([`SlowTier`]).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lru_age::{AgePass, AgeTable, Candidate, PassReport, Promotion, Recheck, candidates};
use mmu_core::addr::{Gfn, GfnRange};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::AgeMode;
use mmu_core::vm::Actor;
use mmu_model::Random;

use super::guest::Progress;
use super::slow::{Place, SlowTier};
use crate::cli::Trial;
use crate::host::{DATA_GFN, VmmHost};
use crate::vmm::{Error, Vmm};

/// Pages unmapped, written and given back at a time: 1 MiB of buffer, and an invalidation that
/// other faults hardly notice.
const RUN: u64 = 256;
/// Of so many pages one may leave after each pass, so that guests feel it little.
const SHARE: u64 = 8;
/// Table entries of one step of a pass.
const STEP: u64 = 1 << 14;
/// How long a trial waits for all vCPUs to go on, which they do unless they have ended.
const LINGER: Duration = Duration::from_secs(2);

/// Sleep of a thread that may be told to stop.
const NAP: Duration = Duration::from_millis(5);

/// How pages are taken away.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Which, and by what rules.
    pub trial: Trial,
    /// Time between two passes.
    pub every: Duration,
    /// Of what is random.
    pub seed: u64,
}

/// What the tiering thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Age, and take pages away.
    Tier,
    /// Age only.
    Look,
}

/// Ages one VM and takes its pages away.
pub struct Tierer<'a, F: SpteFormat> {
    vmm: &'a Vmm<F>,
    tier: Arc<SlowTier>,
    table: &'a AgeTable,
    progress: &'a Progress,
    actor: Actor<VmmHost>,
    plan: Plan,
    random: Random,
    clock: Instant,
    /// Pages that were young when they were looked at once more.
    pub spared: u64,
    /// Time each pass took.
    pub pass_ns: Vec<u64>,
}

impl<'a, F: SpteFormat> Tierer<'a, F> {
    /// Keeps ages in `table`, which has all the data, and births by `clock`.
    pub fn new(
        vmm: &'a Vmm<F>,
        tier: &Arc<SlowTier>,
        table: &'a AgeTable,
        progress: &'a Progress,
        plan: Plan,
        clock: Instant,
    ) -> Result<Self, Error> {
        Ok(Self {
            vmm,
            tier: Arc::clone(tier),
            table,
            progress,
            actor: vmm.actor()?,
            random: Random::new(plan.seed),
            plan,
            clock,
            spared: 0,
            pass_ns: Vec::new(),
        })
    }

    /// Do its duty until told to stop.
    pub fn work(&mut self, duty: Duty, stop: &AtomicBool) -> Result<(), Error> {
        while !stop.load(Ordering::Relaxed) {
            self.tidy()?;
            let _ = self.pass()?;
            if duty == Duty::Tier {
                let _ = self.evict()?;
                self.progress.took_turn();
            }
            let next = Instant::now() + self.plan.every;
            while !stop.load(Ordering::Relaxed) && Instant::now() < next {
                std::thread::sleep(NAP.min(self.plan.every));
            }
        }
        Ok(())
    }

    /// Look at all pages once and open a generation.
    pub fn pass(&mut self) -> Result<PassReport, Error> {
        let begun = Instant::now();
        let mode = AgeMode::ClearFlush;
        let mut pass = AgePass::start(self.table, mode)?;
        while pass.step(&*self.vmm.mmu, &mut self.actor, STEP).next.is_some() {}
        let report = pass.finish(self.clock.elapsed().as_millis() as u64);
        self.pass_ns.push(begun.elapsed().as_nanos() as u64);
        Ok(report)
    }

    /// Free the room of pages that came back.
    pub fn tidy(&mut self) -> Result<(), Error> {
        let _ = self.tier.tidy()?;
        Ok(())
    }

    /// Take pages away. Returns how many are gone.
    pub fn evict(&mut self) -> Result<u64, Error> {
        let most = (self.vmm.shape.pages / SHARE).max(1);
        if self.plan.trial.is_disturbed() {
            let first = self.random.below(self.vmm.shape.pages);
            let last = (first + RUN.min(most)).min(self.vmm.shape.pages);
            return self.evict_all(first..last);
        }
        let mut gone = 0;
        let mut run = 0..0;
        for victim in candidates(self.table) {
            let page = victim.range.start.get() - DATA_GFN;
            let full = run.end - run.start == RUN;
            if page != run.end || full {
                gone += self.take_away(std::mem::replace(&mut run, page..page))?;
                if gone >= most {
                    break;
                }
            }
            if self.is_cold(&victim)? {
                run.end = page + 1;
            }
        }
        Ok(gone + self.take_away(run)?)
    }

    /// Take away all of `pages` that are in memory.
    fn evict_all(&mut self, pages: Range<u64>) -> Result<u64, Error> {
        let mut gone = 0;
        let mut run = pages.start..pages.start;
        for page in pages {
            if self.tier.place(page) == Place::Here {
                run.end = page + 1;
            } else {
                gone += self.take_away(std::mem::replace(&mut run, page + 1..page + 1))?;
            }
        }
        Ok(gone + self.take_away(run)?)
    }

    /// Was a candidate left alone until now? Tells the table what it did not know.
    fn is_cold(&mut self, victim: &Candidate) -> Result<bool, Error> {
        match victim.recheck(&*self.vmm.mmu, &mut self.actor) {
            Recheck::Cold => Ok(true),
            Recheck::Young => {
                self.spared += victim.pages;
                let _ = self.table.edit()?.touch(victim.range, Promotion::Immediate);
                Ok(false)
            }
            Recheck::Unmapped => {
                let _ = self.table.edit()?.forget(victim.range);
                Ok(false)
            }
        }
    }

    /// Take a run of pages away, all of them in memory.
    fn take_away(&mut self, pages: Range<u64>) -> Result<u64, Error> {
        if pages.is_empty() {
            return Ok(0);
        }
        let gfns = GfnRange::new(Gfn::new(DATA_GFN + pages.start), Gfn::new(DATA_GFN + pages.end));
        if self.plan.trial == Trial::CopyFirst {
            self.tier.write(pages.clone())?;
            self.linger();
        }
        let vm = Arc::clone(self.vmm.mmu.vm());
        let invalidation = vm.invalidate(self.actor.participant(), gfns);
        let _ = self.vmm.mmu.unmap_in(&mut self.actor, &invalidation, gfns);
        self.tier.leave(pages.clone());
        drop(invalidation);
        let _ = self.table.edit()?.forget(gfns);
        self.linger();
        if self.plan.trial != Trial::CopyFirst {
            self.tier.write(pages.clone())?;
        }
        self.linger();
        if self.plan.trial == Trial::DropTakenBack {
            self.tier.drop_taken_back(pages.clone());
        }
        self.tier.go(pages)
    }

    /// In a trial: until every vCPU has visited all its hot pages, so that faults meet what is half
    /// done.
    fn linger(&self) {
        let patience = Instant::now() + LINGER;
        let before = self.progress.commands();
        // The second that ends has begun after now.
        let met = |now: &[u64]| now.iter().zip(&before).all(|(now, before)| now - before >= 2);
        while self.plan.trial.is_disturbed() && Instant::now() < patience {
            if met(&self.progress.commands()) {
                break;
            }
            std::thread::yield_now();
        }
    }
}
