//! [`Tierer`]: the thread that ages the VM and takes its cold pages away.
//!
//! The chain: an aging pass opens a generation; `lru-age` offers pages of the oldest ones and asks
//! the MMU once more whether each was used; runs of what is still cold are unmapped, flushed,
//! written to the slow tier, and their memory given back. When a fault has brought a page back, the
//! distance between the two tells the table where the page belongs, and the pace whether too much
//! is taken.
//!
//! Unmapping happens inside an invalidation, writing outside: a fault on a page that is on its way
//! out does not wait for the disk, it takes the page back ([`SlowTier`]).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lru_age::{
    AgePass, AgeTable, Arrival, Candidate, EvictOptions, PidPolicy, Refaults, Swappiness, Take,
};
use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::spte::SpteFormat;
use mmu_core::traits::AgeMode;
use mmu_core::vm::Actor;
use mmu_model::Random;

use super::guest::Progress;
use super::pace::{Pace, Turn};
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
const STEP: u64 = 1 << 20;
/// How long a trial waits for all vCPUs to go on, which they do unless they have ended.
const LINGER: Duration = Duration::from_secs(2);
/// Sleep of a thread that may be told to stop.
const NAP: Duration = Duration::from_millis(5);

/// How pages are taken away.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Which, and by what rules.
    pub trial: Trial,
    /// Time between two passes, while there is something to do.
    pub every: Duration,
    /// Time that a vCPU needs to use a page again whose accessed bit was cleared.
    pub walk: Duration,
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

/// What was counted, in pages unless said.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Pages that were young when they were looked at once more.
    pub spared: u64,
    /// Pages that came back so soon that they should not have gone.
    pub early: u64,
    /// Turns in which the guest thrashed.
    pub thrashed: u64,
    /// Time each pass took.
    pub pass_ns: Vec<u64>,
    /// For each page that came back, the pages taken away between.
    pub distances: Vec<u64>,
}

/// Ages one VM and takes its pages away.
pub struct Tierer<'a, F: SpteFormat> {
    table: &'a AgeTable,
    progress: &'a Progress,
    clock: Instant,
    plan: Plan,
    pace: Pace,
    /// Time until the next pass.
    until_pass: Duration,
    /// Pages that the last pass found used.
    young: u64,
    refaults: Refaults,
    random: Random,
    /// Asks about pages, while `hand` takes them.
    eye: Actor<VmmHost>,
    hand: Hand<'a, F>,
    /// What was counted.
    pub tally: Tally,
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
        let (tier, actor) = (Arc::clone(tier), vmm.actor()?);
        Ok(Self {
            table,
            progress,
            clock,
            plan,
            pace: Pace::new(plan.every, plan.walk, vmm.shape.vcpus),
            until_pass: Duration::ZERO,
            young: 0,
            refaults: Refaults::new(vmm.shape.pages)?,
            random: Random::new(plan.seed),
            eye: vmm.actor()?,
            hand: Hand { vmm, tier, actor, trial: plan.trial, progress, run: 0..0, gone: 0 },
            tally: Tally::default(),
        })
    }

    /// Do its duty until told to stop; the next call goes on where this one ended.
    pub fn work(&mut self, duty: Duty, stop: &AtomicBool) -> Result<(), Error> {
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let mut turn = self.welcome()?;
            if self.until_pass.is_zero() {
                let young = self.pass()?;
                self.until_pass = self.pace.pass(young);
            }
            if duty == Duty::Tier {
                turn.gone = self.evict()?;
                self.tally.thrashed += u64::from(self.pace.after(&turn));
                self.progress.took_turn();
                // It may be worth more by now.
                self.until_pass = self.until_pass.min(self.between_passes());
            }
            let end = Instant::now() + self.pace.turn();
            while !stop.load(Ordering::Relaxed) && Instant::now() < end {
                std::thread::sleep(NAP.min(self.plan.every));
            }
            self.until_pass = self.until_pass.saturating_sub(begun.elapsed());
        }
        Ok(())
    }

    /// The time from one pass to the next, as things are.
    pub fn between_passes(&self) -> Duration {
        self.pace.pass(self.young)
    }

    /// Pages that came back: free their room in the file, and tell the table where they belong.
    pub fn welcome(&mut self) -> Result<Turn, Error> {
        let arrived = self.hand.tier.tidy()?;
        let mut editor = self.table.edit()?;
        let max_seq = self.table.window().max_seq();
        let pages = self.hand.vmm.shape.pages;
        let here = pages - self.hand.tier.away();
        let mut turn = Turn { pages, here, back: arrived.len() as u64, ..Turn::default() };
        for page in arrived {
            let gfn = Gfn::new(DATA_GFN + page);
            let refault = self.refaults.refault(gfn, max_seq);
            let recent = refault.filter(|refault| refault.is_recent());
            // A little more memory, and it had not gone.
            turn.early += u64::from(recent.is_some_and(|refault| refault.is_within(here)));
            self.tally.distances.extend(refault.map(|refault| refault.distance));
            let arrival = if recent.is_some() { Arrival::WorkingSet } else { Arrival::New };
            let _ = editor.insert(GfnRange::from_len(gfn, 1), Level::L1, arrival);
        }
        self.tally.early += turn.early;
        Ok(turn)
    }

    /// Look at all pages once and open a generation. Returns how many were used.
    fn pass(&mut self) -> Result<u64, Error> {
        let begun = Instant::now();
        let mut pass = AgePass::start(self.table, AgeMode::ClearFlush)?;
        self.progress.looking(true);
        while pass.step(&*self.hand.vmm.mmu, &mut self.eye, STEP).next.is_some() {}
        let report = pass.finish(self.clock.elapsed().as_millis() as u64);
        self.progress.looking(false);
        self.refaults.age_counts();
        self.tally.pass_ns.push(begun.elapsed().as_nanos() as u64);
        self.young = report.counts.young;
        Ok(self.young)
    }

    /// Take pages away. Returns how many are gone.
    fn evict(&mut self) -> Result<u64, Error> {
        let pages = self.hand.vmm.shape.pages;
        let most = (pages / SHARE).max(1);
        if self.plan.trial.is_disturbed() {
            let first = self.random.below(pages);
            let last = (first + RUN.min(most)).min(pages);
            return self.evict_all(first..last);
        }
        let mut editor = self.table.edit()?;
        let mut policy = PidPolicy::new(&self.refaults, Swappiness::DEFAULT);
        let options = EvictOptions::new(most);
        let (hand, mut failed) = (&mut self.hand, None);
        let mmu = Arc::clone(&hand.vmm.mmu);
        let report = editor.evict(&*mmu, &mut self.eye, &mut policy, &options, |victim| match hand
            .add(victim)
        {
            Ok(()) => Take::Evicted,
            Err(error) => {
                failed = Some(error);
                Take::Stop
            }
        });
        self.tally.spared += report.young;
        match failed {
            Some(error) => Err(error),
            None => hand.finish(),
        }
    }

    /// Take away all of `pages` that are in memory, whoever uses them.
    fn evict_all(&mut self, pages: Range<u64>) -> Result<u64, Error> {
        for page in pages {
            if self.hand.tier.place(page) == Place::Here {
                self.hand.add_page(page)?;
            }
            let _ = self.table.edit()?.forget(GfnRange::from_len(Gfn::new(DATA_GFN + page), 1));
        }
        self.hand.finish()
    }
}

/// Takes pages away, in runs of pages that lie together.
struct Hand<'a, F: SpteFormat> {
    vmm: &'a Vmm<F>,
    tier: Arc<SlowTier>,
    actor: Actor<VmmHost>,
    trial: Trial,
    progress: &'a Progress,
    /// Pages to be taken next, all in memory.
    run: Range<u64>,
    gone: u64,
}

impl<F: SpteFormat> Hand<'_, F> {
    /// Take a victim, now or with those that follow.
    fn add(&mut self, victim: &Candidate) -> Result<(), Error> {
        let first = victim.range.start.get() - DATA_GFN;
        (first..first + victim.range.len()).try_for_each(|page| self.add_page(page))
    }

    fn add_page(&mut self, page: u64) -> Result<(), Error> {
        if page != self.run.end || self.run.end - self.run.start == RUN {
            self.take_away()?;
            self.run = page..page;
        }
        self.run.end += 1;
        Ok(())
    }

    /// Take what is left. Returns how many pages are gone since the last call.
    fn finish(&mut self) -> Result<u64, Error> {
        self.take_away()?;
        Ok(std::mem::take(&mut self.gone))
    }

    fn take_away(&mut self) -> Result<(), Error> {
        let pages = std::mem::replace(&mut self.run, 0..0);
        if pages.is_empty() {
            return Ok(());
        }
        let gfns = GfnRange::new(Gfn::new(DATA_GFN + pages.start), Gfn::new(DATA_GFN + pages.end));
        if self.trial == Trial::CopyFirst {
            self.tier.write(pages.clone())?;
            self.linger();
        }
        let vm = Arc::clone(self.vmm.mmu.vm());
        let invalidation = vm.invalidate(self.actor.participant(), gfns);
        let _ = self.vmm.mmu.unmap_in(&mut self.actor, &invalidation, gfns);
        self.tier.leave(pages.clone());
        drop(invalidation);
        if self.trial != Trial::CopyFirst {
            self.linger();
            self.tier.write(pages.clone())?;
            self.linger();
        }
        if self.trial == Trial::DropTakenBack {
            self.tier.drop_taken_back(pages.clone());
        }
        self.gone += self.tier.go(pages)?;
        Ok(())
    }

    /// In a trial: until every vCPU has visited all its hot pages, so that faults meet what is half
    /// done.
    fn linger(&self) {
        let patience = Instant::now() + LINGER;
        let before = self.progress.commands();
        // The second that ends has begun after now.
        let met = |now: &[u64]| now.iter().zip(&before).all(|(now, before)| now - before >= 2);
        while self.trial.is_disturbed() && !self.progress.is_stopped() && Instant::now() < patience
        {
            if met(&self.progress.commands()) {
                break;
            }
            std::thread::yield_now();
        }
    }
}
