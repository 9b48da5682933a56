//! Victims, coldest first.
//!
//! [`candidates`] lists single pages of the inactive generations, oldest generation first and by
//! gfn inside one; [`cold_blocks`] lists 2 MiB blocks in which *every* page is inactive, so that a
//! whole table can go at once. Both jump from block to block by the index and look at nothing in
//! between: the first victim costs a few loads however large the VM is.
//!
//! Both are hints by nature: accessed bits are as old as the last pass, and a TLB may hide a use.
//! Ask the MMU again before a page is unmapped ([`Candidate::recheck`], KVM row 5.32).
//!
//! No editor is needed. An iterator ends when a pass opens a new generation: start again.

use mmu_core::addr::{Gfn, GfnRange, Level, to_index};
use mmu_core::sync::AtomicU64;
use mmu_core::traits::{AgeAnswer, AgeRange};

use crate::r#gen::{ACTIVE_GENS, GenWindow, Seq};
use crate::index::Map;
use crate::kind::{Kind, Tier};
use crate::region::Region;
use crate::summary::{self, Summary};
use crate::table::AgeTable;
use crate::word::{self, BLOCK_PAGES, Block, Planes};

/// A page, or a 2 MiB block, that nobody used for at least [`ACTIVE_GENS`] generations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The pages: one, or for a block all of it that lies inside its range.
    pub range: GfnRange,
    /// Generation of the page; of the youngest page for a block.
    pub seq: Seq,
    /// How many pages of `range` are tracked.
    pub pages: u64,
    /// Size of the leaves that map it. To evict one block of a 1 GiB leaf, the leaf must be split
    /// or go as a whole.
    pub level: Level,
    /// Kind of its range.
    pub kind: Kind,
    /// Was it used before it grew old? A block of 4 KiB pages counts as used.
    pub tier: Tier,
}

/// What the MMU says about a candidate now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recheck {
    /// Mapped and not used since the last pass: evict it.
    Cold,
    /// Used meanwhile: tell [`AgeEditor::touch`](crate::AgeEditor::touch) and take another.
    Young,
    /// Not mapped any more: tell [`AgeEditor::forget`](crate::AgeEditor::forget).
    Unmapped,
}

impl Candidate {
    /// Ask the MMU whether the candidate is still cold. Nothing is written
    /// ([`AgeMode::Test`](mmu_core::traits::AgeMode::Test)); an entry that changes meanwhile counts
    /// as young.
    pub fn recheck<M: AgeRange>(&self, mmu: &M, reader: &mut M::Reader) -> Recheck {
        Recheck::of(mmu.test_age(reader, self.range))
    }
}

impl Recheck {
    /// What follows from an MMU's answer about all pages of a candidate.
    pub(crate) const fn of(answer: AgeAnswer) -> Self {
        match answer {
            AgeAnswer::Old => Self::Cold,
            AgeAnswer::Unmapped => Self::Unmapped,
            // What could not be told is not taken away.
            AgeAnswer::Young | AgeAnswer::Unknown => Self::Young,
        }
    }
}

/// The inactive pages: oldest generation first, by gfn inside one. A block that a huge leaf maps
/// is one candidate of 512 pages. The order is the same every time until pages change.
#[must_use]
pub fn candidates(table: &AgeTable) -> Candidates<'_> {
    Candidates { walk: Walk::new(table, None), group: 0, mask: 0, used: 0, seq: Seq::new(0) }
}

/// The same of the ranges of one kind.
#[must_use]
pub fn candidates_of(table: &AgeTable, kind: Kind) -> Candidates<'_> {
    Candidates { walk: Walk::new(table, Some(kind)), ..candidates(table) }
}

/// The blocks without an active page, by the generation of their youngest page, oldest first, then
/// by gfn. The first one is the coldest 2 MiB of the VM.
#[must_use]
pub fn cold_blocks(table: &AgeTable) -> ColdBlocks<'_> {
    ColdBlocks { walk: Walk::new(table, None) }
}

/// The same of the ranges of one kind.
#[must_use]
pub fn cold_blocks_of(table: &AgeTable, kind: Kind) -> ColdBlocks<'_> {
    ColdBlocks { walk: Walk::new(table, Some(kind)) }
}

/// See [`candidates`].
#[derive(Clone, Debug)]
pub struct Candidates<'t> {
    walk: Walk<'t>,
    /// The next group of the walk's block to load.
    group: u64,
    /// Pages of the group before that are still to be handed out, and their generation.
    mask: u64,
    /// Pages of the group before that were used before they grew old.
    used: u64,
    seq: Seq,
}

/// See [`cold_blocks`].
#[derive(Clone, Debug)]
pub struct ColdBlocks<'t> {
    walk: Walk<'t>,
}

/// Position in (generation, range, block).
#[derive(Clone, Debug)]
struct Walk<'t> {
    table: &'t AgeTable,
    window: GenWindow,
    /// The ranges listed; `None` for all.
    kind: Option<Kind>,
    /// The generation being listed.
    seq: Seq,
    region: usize,
    block: u64,
}

impl<'t> Walk<'t> {
    fn new(table: &'t AgeTable, kind: Option<Kind>) -> Self {
        let window = table.window();
        Self { table, window, kind, seq: window.min_seq(), region: 0, block: 0 }
    }

    const fn position(&self) -> (Seq, usize, u64) {
        (self.seq, self.region, self.block)
    }

    /// Is a label still what it was when the walk began? Asked after every label that was read.
    fn is_current(&self) -> bool {
        mmu_core::busted!("labels_trusted") || self.window == self.table.window()
    }

    /// Go to the next block, from the current one on, that the generation's map names.
    fn seek(&mut self, map: impl Fn(&Self) -> Map) -> Option<Stop<'t>> {
        while self.seq.get() + ACTIVE_GENS <= self.window.max_seq().get() {
            while let Some(region) = self.table.regions().get(self.region) {
                let wanted = self.kind.is_none_or(|kind| kind == region.kind());
                let next = wanted.then(|| region.index().next(map(self), self.block)).flatten();
                if let Some(block) = next {
                    self.block = block;
                    let (cell, pages) = region.block(block)?;
                    return Some(Stop { region, cell, pages });
                }
                (self.region, self.block) = (self.region + 1, 0);
            }
            (self.region, self.block) = (0, 0);
            self.seq = Seq::new(self.seq.get() + 1);
        }
        None
    }

    fn candidate(&self, stop: &Stop<'_>, seen: Summary) -> Candidate {
        let base = stop.region.base_of(self.block);
        let block = GfnRange::from_len(base, BLOCK_PAGES);
        Candidate {
            range: block.intersection(stop.region.range()),
            seq: self.seq,
            pages: seen.total(),
            level: seen.level(),
            kind: stop.region.kind(),
            tier: Tier::of_mark(!seen.is_huge() || seen.referenced()),
        }
    }
}

/// A block that a walk arrived at.
struct Stop<'t> {
    region: &'t Region,
    cell: &'t AtomicU64,
    pages: &'t Block,
}

impl Iterator for ColdBlocks<'_> {
    type Item = Candidate;

    fn next(&mut self) -> Option<Candidate> {
        // Ends: every turn moves the walk on.
        loop {
            let stop = self.walk.seek(|walk| Map::youngest(walk.window.label(walk.seq)))?;
            let seen = summary::load(stop.cell);
            if !self.walk.is_current() {
                return None;
            }
            let found = self.walk.candidate(&stop, seen);
            self.walk.block += 1;
            // The index is a hint; the summary says whether a younger page arrived.
            let window = self.walk.window;
            let mut younger = window.seqs().rev().take_while(|&seq| seq > found.seq);
            let is_cold = younger.all(|seq| seen.count(window.label(seq)) == 0);
            if is_cold && seen.count(window.label(found.seq)) != 0 {
                return Some(found);
            }
        }
    }
}

impl Iterator for Candidates<'_> {
    type Item = Candidate;

    fn next(&mut self) -> Option<Candidate> {
        // Ends: every turn hands out a page or moves the walk on.
        loop {
            if self.mask != 0 {
                return self.pop();
            }
            let before = self.walk.position();
            let stop = self.walk.seek(|walk| Map::holding(walk.window.label(walk.seq)))?;
            if before != self.walk.position() {
                self.group = 0;
            }
            let seen = summary::load(stop.cell);
            let label = self.walk.window.label(self.walk.seq);
            if seen.is_huge() {
                let found = self.walk.candidate(&stop, seen);
                (self.walk.block, self.group) = (self.walk.block + 1, 0);
                if !self.walk.is_current() {
                    return None;
                }
                if seen.huge_label() == label {
                    return Some(found);
                }
                continue;
            }
            let Some(group) = stop.pages.get(to_index(self.group)) else {
                (self.walk.block, self.group) = (self.walk.block + 1, 0);
                continue;
            };
            let planes = Planes::from_words(word::load(group));
            (self.mask, self.used) = (planes.labelled(label), planes.referenced);
            self.seq = self.walk.seq;
            self.group += 1;
            if !self.walk.is_current() {
                self.mask = 0;
                return None;
            }
        }
    }
}

impl Candidates<'_> {
    /// The lowest page of the mask, which lies in the group before `self.group`.
    fn pop(&mut self) -> Option<Candidate> {
        let region = self.walk.table.regions().get(self.walk.region)?;
        let bit = u64::from(self.mask.trailing_zeros());
        self.mask &= self.mask - 1;
        let tier = Tier::of_mark(self.used >> bit & 1 == 1);
        let offset = (self.group - 1) * 64 + bit;
        let gfn = Gfn::new(region.base_of(self.walk.block).get() + offset);
        Some(Candidate {
            range: GfnRange::from_len(gfn, 1),
            seq: self.seq,
            pages: 1,
            level: Level::L1,
            kind: region.kind(),
            tier,
        })
    }
}
