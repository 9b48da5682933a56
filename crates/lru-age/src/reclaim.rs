//! [`AgeEditor::evict`]: take cold pages away, coldest first, each checked once more (KVM rows 5.31
//! to 5.33).
//!
//! The library chooses and keeps the books; the embedder unmaps, flushes, writes out. Per victim:
//! still in the generation it was listed in? tier allowed? still cold by the MMU's word (with a
//! look-around)? Only then the embedder is asked, and what it answers is recorded. The editor is
//! held meanwhile: no pass runs, faults are not hindered.

use mmu_core::traits::AgeRange;

use crate::editor::{AgeEditor, Promotion};
use crate::evict::{Candidate, Candidates, ColdBlocks, Recheck, candidates_of, cold_blocks_of};
use crate::r#gen::Seq;
use crate::kind::{KINDS, Kind};
use crate::lookaround::{LookOptions, Participation};
use crate::policy::{EvictPolicy, POLICY_BATCH};
use crate::table::AgeTable;

/// What is taken at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unit {
    /// Single pages, and huge leaves as a whole.
    #[default]
    Pages,
    /// 2 MiB blocks in which every page is inactive. Tiers are not asked.
    Blocks,
}

/// What became of a victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// It is unmapped; the table forgets it.
    Evicted,
    /// It was used at the last moment (a zap says so) and is mapped again or still: it is promoted.
    Young,
    /// It stays, and may be offered again.
    Kept,
    /// It stays, and no more are wanted.
    Stop,
}

/// How much to take, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvictOptions {
    /// Pages (4 KiB) to take at most; the last victim may exceed it.
    pub pages: u64,
    /// Candidates to look at at most: bounds the time when most are used.
    pub checks: u64,
    /// The youngest generation to take from; `None` for all that are not active.
    pub until: Option<Seq>,
    /// Generations opened less than this long ago are not touched, whatever the need (row 5.33).
    pub min_ttl_ms: u64,
    /// The embedder's clock.
    pub now_ms: u64,
    /// What is taken at a time.
    pub unit: Unit,
    /// How a candidate is checked.
    pub look: LookOptions,
}

impl EvictOptions {
    /// `pages` single pages, as many checks as it takes, from every inactive generation.
    #[must_use]
    pub const fn new(pages: u64) -> Self {
        Self {
            pages,
            checks: u64::MAX,
            until: None,
            min_ttl_ms: 0,
            now_ms: 0,
            unit: Unit::Pages,
            look: LookOptions::DEFAULT,
        }
    }
}

/// Why an eviction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvictEnd {
    /// Enough pages were taken.
    Enough,
    /// There is no candidate left: another pass may make some.
    NoneLeft,
    /// What is left is younger than the time to live allows.
    TooYoung,
    /// The rest of a generation was kept for its tier and is now one younger: another call would
    /// look at it again.
    Protected,
    /// As many candidates were looked at as were allowed.
    Checks,
    /// The embedder said stop.
    Stopped,
}

/// What an eviction did, in 4 KiB pages unless said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct EvictReport {
    /// Taken.
    pub evicted: u64,
    /// Found used when checked, or by the embedder.
    pub young: u64,
    /// Of the neighbours of those, promoted on the way.
    pub promoted: u64,
    /// Found unmapped when checked.
    pub unmapped: u64,
    /// Kept for their tier.
    pub protected: u64,
    /// Kept by the embedder.
    pub kept: u64,
    /// Candidates, of one or more pages, that were looked at.
    pub checks: u64,
    /// How the MMU took part when it began: with look-arounds or without.
    pub participation: Participation,
    /// Why it ended.
    pub end: EvictEnd,
}

/// Candidates of one kind, of either unit.
enum Supply<'t> {
    Pages(Candidates<'t>),
    Blocks(ColdBlocks<'t>),
}

impl<'t> Supply<'t> {
    fn new(table: &'t AgeTable, unit: Unit, kind: Kind) -> Self {
        match unit {
            Unit::Pages => Self::Pages(candidates_of(table, kind)),
            Unit::Blocks => Self::Blocks(cold_blocks_of(table, kind)),
        }
    }

    /// The next candidate that is still where it was listed: a look-around may have moved it.
    fn next(&mut self, table: &AgeTable) -> Option<Candidate> {
        match self {
            Self::Pages(all) => all.find(|found| {
                let age = table.page_age(found.range.start);
                age.is_some_and(|age| age.seq == found.seq)
            }),
            Self::Blocks(all) => all.next(),
        }
    }
}

impl AgeEditor<'_> {
    /// Take cold pages away until enough are gone or an end of [`EvictEnd`] is reached. `take` gets
    /// each victim that is cold by the MMU's last word, unmaps it, and says what became of it; it
    /// must not edit this table. `policy` chooses among pages of the same age.
    ///
    /// Every candidate is looked at once per call, so it ends; a page that turns out used is marked
    /// or promoted as in a pass and not offered again before the next pass.
    pub fn evict<M: AgeRange, P: EvictPolicy>(
        &mut self,
        mmu: &M,
        reader: &mut M::Reader,
        policy: &mut P,
        options: &EvictOptions,
        mut take: impl FnMut(&Candidate) -> Take,
    ) -> EvictReport {
        let table = self.table();
        let mut supplies = Kind::ALL.map(|kind| Supply::new(table, options.unit, kind));
        let mut run = Run {
            options,
            report: EvictReport::new(Participation::of(mmu)),
            dry: [false; KINDS],
            last: [None; KINDS],
        };
        let mut turn = Turn { kind: Kind::Anon, left: 0 };
        loop {
            let Some(kind) = run.next_kind(&mut turn, policy) else { return run.report };
            let Some(victim) = kind.of_mut(&mut supplies).next(table) else {
                *kind.of_mut(&mut run.dry) = true;
                continue;
            };
            if !run.may_take(table, &victim, kind) {
                continue;
            }
            run.report.checks += 1;
            turn.left = turn.left.saturating_sub(victim.pages);
            if options.unit == Unit::Pages && victim.tier > policy.highest_tier(kind) {
                let moved = self.protect(victim.range, victim.seq);
                run.report.protected += moved;
                *kind.of_mut(&mut run.last) = Some(victim.seq);
                policy.protected(&victim, moved);
                continue;
            }
            let mut look = self.look_around(&victim, mmu, reader, options.look);
            if mmu_core::busted!("evict_unchecked") {
                look.verdict = Recheck::Cold;
            }
            run.report.promoted += look.counts.promoted;
            match look.verdict {
                Recheck::Cold => {}
                Recheck::Young => {
                    run.report.young += victim.pages;
                    continue;
                }
                Recheck::Unmapped => {
                    run.report.unmapped += victim.pages;
                    continue;
                }
            }
            match take(&victim) {
                Take::Evicted => {
                    policy.evicted(&victim);
                    run.report.evicted += self.forget(victim.range);
                }
                Take::Young => {
                    run.report.young += victim.pages;
                    let _ = self.touch(victim.range, Promotion::Immediate);
                }
                Take::Kept => run.report.kept += victim.pages,
                Take::Stop => return EvictReport { end: EvictEnd::Stopped, ..run.report },
            }
        }
    }
}

/// The kind whose turn it is, and for how many pages yet.
struct Turn {
    kind: Kind,
    left: u64,
}

/// One eviction under way.
struct Run<'o> {
    options: &'o EvictOptions,
    report: EvictReport,
    /// Kinds without candidates.
    dry: [bool; KINDS],
    /// The last generation to take from, by kind: those after it hold what was just protected.
    last: [Option<Seq>; KINDS],
}

impl EvictReport {
    const fn new(participation: Participation) -> Self {
        Self {
            participation,
            evicted: 0,
            young: 0,
            promoted: 0,
            unmapped: 0,
            protected: 0,
            kept: 0,
            checks: 0,
            end: EvictEnd::NoneLeft,
        }
    }
}

impl Run<'_> {
    /// The kind to take the next candidate from; `None` when it is over, and why in the report.
    fn next_kind<P: EvictPolicy>(&mut self, turn: &mut Turn, policy: &mut P) -> Option<Kind> {
        if self.report.evicted >= self.options.pages {
            self.report.end = EvictEnd::Enough;
            return None;
        }
        if self.report.checks >= self.options.checks {
            self.report.end = EvictEnd::Checks;
            return None;
        }
        if turn.left == 0 {
            *turn = Turn { kind: policy.next_kind(), left: POLICY_BATCH };
        }
        let order = [turn.kind, turn.kind.other()];
        order.into_iter().find(|&kind| !*kind.of(&self.dry) && policy.allows(kind))
    }

    /// Does its generation allow it to go? If not, neither do the younger ones of its kind.
    fn may_take(&mut self, table: &AgeTable, victim: &Candidate, kind: Kind) -> bool {
        if self.options.until.is_some_and(|until| victim.seq > until) {
            *kind.of_mut(&mut self.dry) = true;
            return false;
        }
        if kind.of(&self.last).is_some_and(|last| victim.seq > last) {
            *kind.of_mut(&mut self.dry) = true;
            self.report.end = EvictEnd::Protected;
            return false;
        }
        let born_ms = table.birth_ms(victim.seq.generation());
        if self.options.now_ms.saturating_sub(born_ms) < self.options.min_ttl_ms {
            *kind.of_mut(&mut self.dry) = true;
            self.report.end = EvictEnd::TooYoung;
            return false;
        }
        true
    }
}
