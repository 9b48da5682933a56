//! The program that writes all the time, on all vCPUs, and what memory must hold because of it.
//!
//! Each vCPU runs [`Op::Churn`] over its own share of the data, or all over all of it, each writing
//! words of its own in every page. Its progress is in the share's
//! control page, so memory alone says what every page must hold: [`Workload::verify`] needs neither
//! the vCPUs nor a copy, and a VM that has the memory can go on with the program.

use std::ops::Range;

use mmu_core::spte::SpteFormat;

use super::host::DATA_GFN;
use super::machine::{Churn, Command, Op, PAGE, content};
use super::vmm::{Error, Vmm, VmmVcpu};

/// Where the second word of a page is.
const SECOND: u64 = 2048;
/// Rounds of one command of a program that goes on until it is stopped: a stopped one is carried
/// through before the vCPU does something else.
const AT_ONCE: u64 = 16;

/// The program of all vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its parameters.
    pub churn: Churn,
    /// All vCPUs visit all pages.
    pub overlap: bool,
}

/// Where a vCPU works: its pages, the control page first, and where in each page.
struct Place {
    pages: Range<u64>,
    lane: u64,
}

impl Place {
    fn len(&self) -> u64 {
        self.pages.end - self.pages.start
    }

    /// The step that its vCPU is at.
    fn step<F: SpteFormat>(&self, vmm: &Vmm<F>) -> u64 {
        vmm.word(self.pages.start, self.lane)
    }
}

impl Workload {
    fn place<F: SpteFormat>(&self, vmm: &Vmm<F>, vcpu: u32) -> Place {
        if self.overlap {
            // The control pages of all come first; those behind one's own are visited as well.
            Place { pages: u64::from(vcpu)..vmm.shape.pages, lane: 8 * u64::from(vcpu) }
        } else {
            Place { pages: vmm.share(vcpu), lane: 0 }
        }
    }

    fn places<F: SpteFormat>(&self, vmm: &Vmm<F>) -> impl Iterator<Item = Place> {
        (0..vmm.shape.vcpus).map(|vcpu| self.place(vmm, vcpu))
    }

    /// The program of one vCPU to the end of round `rounds`.
    fn command<F: SpteFormat>(&self, vmm: &Vmm<F>, vcpu: u32, rounds: u64) -> Command {
        let place = self.place(vmm, vcpu);
        Command {
            op: Op::Churn(self.churn),
            start: (DATA_GFN + place.pages.start) * PAGE + place.lane,
            pages: place.len(),
            stride: 1,
            tag: 0,
            rounds,
        }
    }

    /// Write every page once, so that none is without contents; but for pages whose first word is a
    /// step.
    pub fn populate<F: SpteFormat>(&self, vcpu: &mut VmmVcpu<F>) -> Result<u64, Error> {
        let Range { start, end } = vcpu.vmm().share(vcpu.id);
        let first = if self.overlap { start.max(1) } else { start + 1 };
        Ok(vcpu.run_pages(Op::Write, first..end, self.churn.offset, 1)?.pages)
    }

    /// Run to the end of round `rounds`, counted from the first start.
    pub fn run<F: SpteFormat>(&self, vcpu: &mut VmmVcpu<F>, rounds: u64) -> Result<(), Error> {
        self.finish(vcpu)?;
        let command = self.command(vcpu.vmm(), vcpu.id, rounds);
        let _ = vcpu.run(&command)?;
        Ok(())
    }

    /// Carry a program that was stopped to its end.
    pub fn finish<F: SpteFormat>(&self, vcpu: &mut VmmVcpu<F>) -> Result<(), Error> {
        while vcpu.is_busy() {
            let _ = vcpu.go_on()?;
        }
        Ok(())
    }

    /// Run until [`Vmm::stop`].
    pub fn run_until_stopped<F: SpteFormat>(&self, vcpu: &mut VmmVcpu<F>) -> Result<(), Error> {
        loop {
            let done = match vcpu.is_busy() {
                true => vcpu.go_on()?,
                false => {
                    let rounds = self.rounds_of(vcpu.vmm(), vcpu.id)? + AT_ONCE;
                    let command = self.command(vcpu.vmm(), vcpu.id, rounds);
                    vcpu.run_until_stopped(&command)?
                }
            };
            if done.is_none() {
                return Ok(());
            }
        }
    }

    /// The step that each vCPU is at.
    pub fn steps<F: SpteFormat>(&self, vmm: &Vmm<F>) -> Vec<u64> {
        self.places(vmm).map(|place| place.step(vmm)).collect()
    }

    /// Rounds that a vCPU has completed.
    fn rounds_of<F: SpteFormat>(&self, vmm: &Vmm<F>, vcpu: u32) -> Result<u64, Error> {
        let place = self.place(vmm, vcpu);
        Ok(place.step(vmm) / self.churn.round(place.len())?)
    }

    /// Rounds that the vCPU that is ahead has completed.
    pub fn rounds<F: SpteFormat>(&self, vmm: &Vmm<F>) -> Result<u64, Error> {
        (0..vmm.shape.vcpus).try_fold(0, |most, vcpu| Ok(self.rounds_of(vmm, vcpu)?.max(most)))
    }

    /// Is data page `page` written by the program?
    pub fn writes<F: SpteFormat>(&self, vmm: &Vmm<F>, page: u64) -> bool {
        let mut visitors = self.places(vmm).filter(|place| place.pages.contains(&page));
        visitors.any(|place| self.churn.writes(page - place.pages.start))
    }

    /// Pages that do not hold what they must, by their vCPU's step; the VM stands still. Names the
    /// first.
    pub fn verify<F: SpteFormat>(&self, vmm: &Vmm<F>) -> Result<Wrong, Error> {
        let mut wrong = Wrong::default();
        for place in self.places(vmm) {
            let round = self.churn.round(place.len())?;
            let end = place.step(vmm);
            for page in place.pages.start + 1..place.pages.end {
                let gva = (DATA_GFN + page) * PAGE + place.lane;
                let index = page - place.pages.start;
                let before = |end| {
                    let visit = self.churn.last_visit(round, index, end);
                    match visit.filter(|_| self.churn.writes(index)) {
                        Some(step) => (step, content(gva, step)),
                        None if place.lane > 0 => (0, 0),
                        None => [content(gva, self.churn.offset); 2].into(),
                    }
                };
                // The step that was interrupted may have stored both words, one, or none.
                let (old, new) = (before(end), before(end + 1));
                let found = (vmm.word(page, place.lane), vmm.word(page, SECOND + place.lane));
                let first = found.0 == old.0 || found.0 == new.0;
                let second = found.1 == old.1 || found.1 == new.1;
                if !(first && second) {
                    wrong.note(format!("page {page} at step {end}: {found:x?}, not {old:x?}"));
                }
            }
        }
        Ok(wrong)
    }
}

/// What was wrong.
#[derive(Clone, Debug, Default)]
pub struct Wrong {
    /// Number of pages.
    pub pages: u64,
    first: String,
}

impl Wrong {
    fn note(&mut self, what: String) {
        if self.pages == 0 {
            self.first = what;
        }
        self.pages += 1;
    }

    /// In words.
    pub fn detail(&self) -> String {
        match self.pages {
            0 => "every page holds what its vCPU wrote".to_owned(),
            pages => format!("{pages} pages are wrong; {}", self.first),
        }
    }
}
