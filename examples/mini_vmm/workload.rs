//! The program that writes all the time, on all vCPUs, and what memory must hold because of it.
//!
//! Each vCPU runs [`Op::Churn`] over its own share of the data. Its progress is in the share's
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
    /// Its parameters; each vCPU begins elsewhere in its order.
    pub churn: Churn,
}

impl Workload {
    /// The range of one vCPU, and its program to the end of round `rounds`.
    fn command<F: SpteFormat>(&self, vmm: &Vmm<F>, vcpu: u32, rounds: u64) -> Command {
        let share = vmm.share(vcpu);
        Command {
            op: Op::Churn(self.churn),
            start: (DATA_GFN + share.start) * PAGE,
            pages: share.end - share.start,
            stride: 1,
            tag: 0,
            rounds,
        }
    }

    /// Write every page but the control pages once, so that no page is without contents.
    pub fn populate<F: SpteFormat>(&self, vcpu: &mut VmmVcpu<F>) -> Result<u64, Error> {
        let Range { start, end } = vcpu.vmm().share(vcpu.id);
        Ok(vcpu.run_pages(Op::Write, start + 1..end, self.churn.offset, 1)?.pages)
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
        (0..vmm.shape.vcpus).map(|vcpu| vmm.word(vmm.share(vcpu).start, 0)).collect()
    }

    /// Rounds that a vCPU has completed.
    fn rounds_of<F: SpteFormat>(&self, vmm: &Vmm<F>, vcpu: u32) -> Result<u64, Error> {
        let share = vmm.share(vcpu);
        let round = self.churn.round(share.end - share.start)?;
        Ok(vmm.word(share.start, 0) / round)
    }

    /// Rounds that the vCPU that is ahead has completed.
    pub fn rounds<F: SpteFormat>(&self, vmm: &Vmm<F>) -> Result<u64, Error> {
        (0..vmm.shape.vcpus).try_fold(0, |most, vcpu| Ok(self.rounds_of(vmm, vcpu)?.max(most)))
    }

    /// Is data page `page` written by the program?
    pub fn writes<F: SpteFormat>(&self, vmm: &Vmm<F>, page: u64) -> bool {
        let mut shares = (0..vmm.shape.vcpus).map(|vcpu| vmm.share(vcpu));
        let share = shares.find(|share| share.contains(&page));
        share.is_some_and(|share| self.churn.writes(page - share.start))
    }

    /// Pages that do not hold what they must, by their vCPU's step; the VM stands still. Names the
    /// first.
    pub fn verify<F: SpteFormat>(&self, vmm: &Vmm<F>) -> Result<Wrong, Error> {
        let mut wrong = Wrong::default();
        for vcpu in 0..vmm.shape.vcpus {
            let share = vmm.share(vcpu);
            let round = self.churn.round(share.end - share.start)?;
            let end = vmm.word(share.start, 0);
            for page in share.start + 1..share.end {
                let gva = (DATA_GFN + page) * PAGE;
                let index = page - share.start;
                let before = |end| {
                    let visit = self.churn.last_visit(round, index, end);
                    match visit.filter(|_| self.churn.writes(index)) {
                        Some(step) => (step, content(gva, step)),
                        None => [content(gva, self.churn.offset); 2].into(),
                    }
                };
                // The step that was interrupted may have stored both words, one, or none.
                let (old, new) = (before(end), before(end + 1));
                let found = (vmm.word(page, 0), vmm.word(page, SECOND));
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
