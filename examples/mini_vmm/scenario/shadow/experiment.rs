//! Reclaim under a quota: a loop over a hot set of tables with a scan beside it, by each policy.
//!
//! Each round the guest uses all tables of its hot set, then some of the others, one after the
//! other. A policy that goes by age alone drops the hot ones as often as any; one that asks for
//! accessed bits keeps them, and makes new only what the scan needs. Counted are *refills*, shadow
//! pages that are made after the warm-up, and how far the number of pages swings.

use shadow_mmu::ReclaimPolicy;

use super::picture;
use super::script::{Script, Trace};
use super::vm::{Moment, ShadowVm};
use super::{boot, nothing_left, rules};
use crate::cli::{CpuChoice, Options, PolicyChoice};
use crate::report::Report;
use crate::vmm::Error;

/// Percent of the refills by age alone that accessed bits must save at least.
const SAVED_PERCENT: u64 = 30;
/// The number of tables may swing by so much of the quota, in percent.
const SWING_PERCENT: u32 = 25;
/// Rounds of the scan over all its tables before counting begins.
const WARM_SCANS: u64 = 1;

/// A round of the trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Shadow pages made in it.
    pub refills: u64,
    /// Shadow pages at its end.
    pub tables: u32,
}

/// What a policy did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Course {
    /// All rounds.
    pub rounds: Vec<Round>,
    /// Shadow pages made after the warm-up.
    pub refills: u64,
    /// The most and the fewest shadow pages after it.
    pub extremes: Option<(u32, u32)>,
    /// Pages that were spared because they were used.
    pub spared: u64,
}

/// The trace for a quota: half of what it has for the hot set, many times of it for the scan.
pub fn trace(quota: u32, cpu: CpuChoice) -> Trace {
    let quota = u64::from(quota);
    let rounds = if cpu == CpuChoice::Kvm { 60 } else { 200 };
    Trace { hot: quota / 2, cold: quota * 5 / 2, step: (quota / 8).max(1), rounds }
}

/// Run it as the options say, and judge.
pub fn run(options: &Options, report: &mut Report) -> Result<(), Error> {
    let policies: &[(&str, ReclaimPolicy)] = match options.policy {
        PolicyChoice::Fifo => &[("fifo", ReclaimPolicy::Fifo)],
        PolicyChoice::Accessed => &[("accessed", ReclaimPolicy::Accessed)],
        PolicyChoice::Both => {
            &[("fifo", ReclaimPolicy::Fifo), ("accessed", ReclaimPolicy::Accessed)]
        }
    };
    let mut courses = Vec::new();
    for (name, policy) in policies {
        let course = follow(options, *policy, name, report)?;
        judge(options, name, &course, report);
        courses.push((*name, course));
    }
    if let [(_, fifo), (_, accessed)] = &courses[..] {
        let (fifo, accessed) = (fifo.refills, accessed.refills);
        let saved = fifo.saturating_sub(accessed) * 100 / fifo.max(1);
        report.metric("refills_saved_percent", saved as f64);
        report.check(
            "accessed-bits-save-refills",
            saved >= SAVED_PERCENT,
            format!("{accessed} refills instead of {fifo}: {saved} % fewer"),
        );
    }
    let trace = trace(options.quota, options.cpu);
    let title = format!(
        "At most {} shadow tables ({}): a loop over {} tables, a scan over {} others",
        options.quota, report.cpu, trace.hot, trace.cold
    );
    let lines: Vec<_> = courses.iter().map(|(name, course)| (*name, course)).collect();
    report.svg = Some(picture::draw(&title, &lines, options.quota, warm_rounds(&trace))?);
    Ok(())
}

/// Rounds before counting begins.
fn warm_rounds(trace: &Trace) -> u64 {
    trace.cold.div_ceil(trace.step) * WARM_SCANS
}

/// What a policy did, and whether the number of tables keeps still.
fn judge(options: &Options, name: &str, course: &Course, report: &mut Report) {
    report.count(format!("{name}_refills"), course.refills);
    report.count(format!("{name}_second_chances"), course.spared);
    let (most, fewest) = course.extremes.unwrap_or((0, 0));
    report.count(format!("{name}_tables_most"), u64::from(most));
    report.count(format!("{name}_tables_fewest"), u64::from(fewest));
    let swing = (most - fewest) * 100 / options.quota;
    report.check(
        format!("{name}-swings-by-a-quarter-at-most"),
        course.extremes.is_some() && swing <= SWING_PERCENT,
        format!("{fewest} to {most} tables: {swing} % of the quota of {}", options.quota),
    );
    for (at, round) in (0u64..).zip(&course.rounds) {
        report.timeline.push(serde_json::json!({
            "policy": name,
            "round": at,
            "refills": round.refills,
            "tables": round.tables,
        }));
    }
}

/// One policy.
fn follow(
    options: &Options,
    policy: ReclaimPolicy,
    name: &str,
    report: &mut Report,
) -> Result<Course, Error> {
    let trace = trace(options.quota, options.cpu);
    let warm = warm_rounds(&trace);
    let script = Script::hot_and_scan(&trace, options.seed);
    let (machinery, image, start) = boot(options, &script)?;
    let mut vm = ShadowVm::new(machinery, &start, rules(options, policy))?;
    let mut course = Course::default();
    let mut before = None;
    vm.run(|moment| course.note(moment, warm, trace.rounds, &mut before))?;
    let outcome = image.outcome();
    let remains = vm.finish()?;
    let expected = super::expect::expect(&script, options.seed);
    report.check(
        format!("{name}-result-is-the-models"),
        (outcome.result, outcome.refused) == (expected.result, expected.refused),
        format!("{:#x}", outcome.result),
    );
    nothing_left(name, &remains, report);
    Ok(course)
}

impl Course {
    /// An exit happened. `before` is what had been made when the last round ended.
    fn note(&mut self, moment: &Moment, warm: u64, rounds: u64, before: &mut Option<u64>) {
        let round = self.rounds.len() as u64;
        let counts = round > warm && round < rounds;
        if counts {
            let (most, fewest) = self.extremes.unwrap_or((moment.tables, moment.tables));
            self.extremes = Some((most.max(moment.tables), fewest.min(moment.tables)));
        }
        if moment.mark.is_none() {
            return;
        }
        let made = moment.stats.pages_made;
        let refills = before.map_or(0, |before| made - before);
        *before = Some(made);
        self.rounds.push(Round { refills, tables: moment.tables });
        if counts {
            self.refills += refills;
            self.spared = moment.stats.second_chances;
        }
    }
}
