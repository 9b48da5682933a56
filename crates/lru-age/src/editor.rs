//! [`AgeEditor`]: the one hand that changes a table.
//!
//! Having one tells you: nobody else changes any page, count or window of this table, so plain
//! stores suffice. It does not keep readers out, so every store leaves something they may see.
//!
//! Order of stores, for readers: words before the summary when a block becomes 4 KiB pages, summary
//! before the words when it becomes huge ([`crate::summary`]); the window last ([`crate::gen`]).

use mmu_core::addr::{GfnRange, Level};
use mmu_core::sync::AtomicU64;

use crate::r#gen::{ACTIVE_GENS, GenWindow, Label, MIN_NR_GENS, Seq};
use crate::index::Map;
use crate::pass::PassCounts;
use crate::region::Region;
use crate::summary::{self, Summary, Tally};
use crate::table::{AgeTable, maps};
use crate::word::{self, BLOCK_PAGES, Block, FULL, Mask, Planes, Rules, is_empty, mask};

const _: () = assert!(ACTIVE_GENS <= MIN_NR_GENS, "the active generations always exist");

/// What an access earns a page that was not referenced yet (KVM row 5.22).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Promotion {
    /// The first access seen only marks the page referenced; from the second on, each moves it to
    /// the youngest generation.
    #[default]
    SecondChance,
    /// Every access moves it to the youngest generation (what the row says of executable pages).
    Immediate,
}

/// How a page came to be mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arrival {
    /// For the first time, or after a long absence: its next use only marks it.
    #[default]
    New,
    /// Soon after it was evicted ([`Refault::is_recent`](crate::Refault::is_recent)), or otherwise
    /// known to be used: its next use promotes it (KVM row 5.38).
    WorkingSet,
}

/// The right to change a table. One at a time ([`AgeTable::edit`]); a pass holds one.
#[derive(Debug)]
pub struct AgeEditor<'t> {
    table: &'t AgeTable,
    window: GenWindow,
    /// Labels, youngest first.
    by_age: [Label; 4],
}

impl Drop for AgeEditor<'_> {
    fn drop(&mut self) {
        self.table.close();
    }
}

impl<'t> AgeEditor<'t> {
    /// Called by [`AgeTable::edit`] with the claim just taken.
    pub(crate) fn opened(table: &'t AgeTable) -> Self {
        let window = table.window();
        Self { table, window, by_age: window.by_age() }
    }

    /// The table.
    #[must_use]
    pub const fn table(&self) -> &'t AgeTable {
        self.table
    }

    /// Pages of `range` are no longer mapped: a zap told us before a pass would find out. Returns
    /// how many of them were tracked.
    pub fn forget(&mut self, range: GfnRange) -> u64 {
        let mut counts = PassCounts::default();
        for region in self.table.regions_in(range) {
            let part = region.range().intersection(range);
            self.unmapped(region, part, &mut counts);
        }
        counts.unmapped_now
    }

    /// The tracked pages of `range` were used: seen outside a pass, as by a look-around. What a
    /// huge leaf maps is used as a whole, also outside of `range`: it has one accessed bit. Returns
    /// `young`, `promoted`, `again` and `second_chance`.
    pub fn touch(&mut self, range: GfnRange, promotion: Promotion) -> PassCounts {
        let mut counts = PassCounts::default();
        let rules = self.rules(promotion);
        for region in self.table.regions_in(range) {
            let part = region.range().intersection(range);
            let mut at = part.start;
            while at < part.end {
                let block = region.block_of(at);
                at = region.base_of(block).saturating_add(BLOCK_PAGES);
                let Some((cell, pages)) = region.block(block) else { break };
                let old = summary::load_own(cell);
                if old.is_huge() {
                    let leaf = GfnRange::entry(region.base_of(block), old.level());
                    at = at.max(leaf.end);
                    self.touch_leaf(region, leaf, old.level(), rules, &mut counts);
                    continue;
                }
                let mut present = region.mask(block, part);
                for (word, group) in present.iter_mut().zip(pages) {
                    *word &= word::tracked(word::load_own(group));
                    counts.young += u64::from(word.count_ones());
                }
                self.pages(region, block, &present, &present, &present, rules, &mut counts);
            }
        }
        self.table.hear(counts.young);
        counts
    }

    /// The blocks of `leaf` that are tracked under a leaf of that level were used.
    fn touch_leaf(
        &self,
        region: &Region,
        leaf: GfnRange,
        level: Level,
        rules: Rules,
        counts: &mut PassCounts,
    ) {
        let part = region.range().intersection(leaf);
        let mut at = part.start;
        while at < part.end {
            let block = region.block_of(at);
            at = region.base_of(block).saturating_add(BLOCK_PAGES);
            let Some((cell, _)) = region.block(block) else { return };
            if summary::load_own(cell).level() == level {
                counts.young += BLOCK_PAGES;
                self.huge(region, block, level, true, rules, counts);
            }
        }
    }

    /// A 2 MiB part of a leaf of 1 GiB was found used and taken in: so were the other parts, which
    /// share its accessed bit.
    pub(crate) fn share(&self, range: GfnRange, rules: Rules, counts: &mut PassCounts) {
        let leaf = GfnRange::entry(range.start, Level::L3);
        let Some(region) = self.table.region_at(range.start) else { return };
        for rest in [GfnRange::new(leaf.start, range.start), GfnRange::new(range.end, leaf.end)] {
            if !mmu_core::busted!("parts_kept_apart") {
                self.touch_leaf(region, rest, Level::L3, rules, counts);
            }
        }
    }

    /// Pages of `range` were mapped by leaves at `level`: track them in the youngest generation now
    /// instead of when a pass finds them. Pages that were tracked stay where they are; as
    /// [`Arrival::WorkingSet`] they count as used once more. Blocks that `range` covers in part, or
    /// whose range ends inside them, are taken as 4 KiB pages. Returns the pages that are new.
    pub fn insert(&mut self, range: GfnRange, level: Level, arrival: Arrival) -> u64 {
        let mut counts = PassCounts::default();
        let rules = self.rules(Promotion::SecondChance);
        let used = arrival == Arrival::WorkingSet;
        for region in self.table.regions_in(range) {
            let part = region.range().intersection(range);
            let mut at = part.start;
            while at < part.end {
                let block = region.block_of(at);
                let end = region.base_of(block).saturating_add(BLOCK_PAGES).min(part.end);
                if level > Level::L1 && end.distance_from(at) == BLOCK_PAGES {
                    self.huge(region, block, level, used, rules, &mut counts);
                } else {
                    let present = region.mask(block, GfnRange::new(at, end));
                    let young = if used { present } else { mask(0, 0) };
                    self.pages(region, block, &present, &present, &young, rules, &mut counts);
                }
                at = end;
            }
        }
        counts.added
    }

    /// The pages of `range` that are in generation `seq` go to the next one: old enough to leave,
    /// and kept for another reason (KVM row 5.31). A block of a huge leaf moves as a whole. Returns
    /// how many moved: none from a generation that does not exist or is the youngest. For a
    /// [`WorkingSet`](crate::WorkingSet) of more than one interval they count as used.
    pub fn protect(&mut self, range: GfnRange, seq: Seq) -> u64 {
        if !self.window.contains(seq) || seq == self.window.max_seq() {
            return 0;
        }
        let (from, to) = (self.window.label(seq), self.window.label(seq.next()));
        let mut moved = 0;
        for region in self.table.regions_in(range) {
            let part = region.range().intersection(range);
            let mut at = part.start;
            while at < part.end {
                let block = region.block_of(at);
                at = region.base_of(block).saturating_add(BLOCK_PAGES);
                let Some((cell, pages)) = region.block(block) else { break };
                let old = summary::load_own(cell);
                let new = if old.is_huge() {
                    old.relabelled(from, to)
                } else {
                    relabel_pages(pages, &region.mask(block, part), old, from, to)
                };
                moved += old.count(from) - new.count(from);
                self.commit(region, block, cell, old, new);
            }
        }
        moved
    }

    /// The rules of this editor's window.
    pub(crate) const fn rules(&self, promotion: Promotion) -> Rules {
        let immediate = match promotion {
            Promotion::SecondChance => 0,
            Promotion::Immediate => u64::MAX,
        };
        let [youngest, previous, ..] = self.by_age;
        Rules { youngest, previous, immediate }
    }

    /// What an MMU said about the `looked` pages of a block that 4 KiB leaves map.
    #[inline]
    #[expect(clippy::too_many_arguments, reason = "three masks of one block and where they go")]
    pub(crate) fn pages(
        &self,
        region: &Region,
        block: u64,
        looked: &Mask,
        present: &Mask,
        young: &Mask,
        rules: Rules,
        counts: &mut PassCounts,
    ) {
        let Some((cell, pages)) = region.block(block) else { return };
        let old = summary::load_own(cell);
        // The common answers cost one word: nothing used in a full block, nothing in an empty one.
        if is_empty(young) {
            let nothing = old == Summary::EMPTY && is_empty(present);
            if nothing || (old.total() == BLOCK_PAGES && !old.is_huge() && *present == FULL) {
                return;
            }
        }
        if old.is_huge() {
            for (group, full) in pages.iter().zip(FULL) {
                let split = Planes::uniform(full, old.huge_label(), old.referenced());
                word::store(group, [0; 4], split.to_words());
            }
        }
        let (left, entered) = observe_pages(pages, looked, present, young, rules, counts);
        let new = old.as_pages().changed(left, entered, rules.youngest);
        self.commit(region, block, cell, old, new);
    }

    /// A huge leaf at `level` maps the whole block.
    pub(crate) fn huge(
        &self,
        region: &Region,
        block: u64,
        level: Level,
        young: bool,
        rules: Rules,
        counts: &mut PassCounts,
    ) {
        let Some((cell, pages)) = region.block(block) else { return };
        let old = summary::load_own(cell);
        let known = old.total();
        counts.added += BLOCK_PAGES - known;
        counts.added_idle += if young { 0 } else { BLOCK_PAGES - known };
        let mut label = if known == 0 { rules.youngest } else { self.youngest_of(old) };
        if !young && !old.is_huge() && known != 0 {
            counts.merged += known - old.count(label);
        }
        let mut referenced = old.referenced() || any_referenced(old, pages);
        if young && known != 0 {
            if referenced || rules.immediate != 0 {
                if label != rules.youngest {
                    counts.promoted += known;
                    counts.again += old.count(rules.previous);
                }
                label = rules.youngest;
            } else {
                counts.second_chance += known;
            }
        }
        referenced |= young;
        self.commit(region, block, cell, old, Summary::huge(level, label, referenced));
        if !old.is_huge() && known != 0 {
            clear(pages);
        }
    }

    /// No page of `range`, inside the region's, is mapped.
    pub(crate) fn unmapped(&self, region: &Region, range: GfnRange, counts: &mut PassCounts) {
        let mut at = range.start;
        while at < range.end {
            let block = region.block_of(at);
            let base = region.base_of(block);
            at = base.saturating_add(BLOCK_PAGES);
            let Some((cell, pages)) = region.block(block) else { return };
            let old = summary::load_own(cell);
            if old == Summary::EMPTY {
                continue;
            }
            if range.covers(region.range().intersection(GfnRange::new(base, at))) {
                counts.unmapped_now += old.total();
                if !old.is_huge() {
                    clear(pages);
                }
                self.commit(region, block, cell, old, Summary::EMPTY);
            } else {
                let none = mask(0, 0);
                let looked = region.mask(block, range);
                let rules = self.rules(Promotion::SecondChance);
                self.pages(region, block, &looked, &none, &none, rules, counts);
            }
        }
    }

    /// Open a new youngest generation at `now_ms`; the oldest is folded into the next when there
    /// are as many as there may be (row 5.23). Returns the pages folded; `None` when the numbers
    /// are exhausted, and nothing changed.
    pub(crate) fn open_generation(&mut self, now_ms: u64) -> Option<u64> {
        let next = self.window.advanced()?;
        let mut folded = 0;
        if self.window.nr_gens() >= self.window.max_gens() {
            folded = self.fold();
        }
        self.table.set_birth_ms(next.max_seq().generation(), now_ms);
        self.publish(self.window.advanced()?);
        while self.window.nr_gens() > MIN_NR_GENS && self.table.pages_in(self.window.min_seq()) == 0
        {
            self.publish(self.window.trimmed());
        }
        Some(folded)
    }

    /// Merge the two oldest generations by relabelling the smaller: a page is rewritten only into
    /// a group at least as large as its own, so over time the cost follows what was used, not what
    /// is mapped.
    fn fold(&mut self) -> u64 {
        let mut oldest_two = self.window.seqs();
        let (Some(oldest), Some(next)) = (oldest_two.next(), oldest_two.next()) else { return 0 };
        let (folded, kept) = (self.table.pages_in(oldest), self.table.pages_in(next));
        let (oldest, next) = (self.window.label(oldest), self.window.label(next));
        let (from, to) = if folded <= kept { (oldest, next) } else { (next, oldest) };
        for region in self.table.regions() {
            let mut at = 0;
            while let Some(block) = region.index().next(Map::holding(from), at) {
                self.relabel(region, block, from, to);
                at = block + 1;
            }
        }
        self.publish(self.window.folded(to));
        folded
    }

    fn relabel(&self, region: &Region, block: u64, from: Label, to: Label) {
        let Some((cell, pages)) = region.block(block) else { return };
        let old = summary::load_own(cell);
        if !old.is_huge() {
            for group in pages {
                let words = word::load_own(group);
                let planes = Planes::from_words(words);
                let after = planes.relabelled(planes.labelled(from), to);
                word::store(group, words, after.to_words());
            }
        }
        self.commit(region, block, cell, old, old.relabelled(from, to));
    }

    fn publish(&mut self, window: GenWindow) {
        self.table.window_cell().publish(window);
        self.window = window;
        self.by_age = window.by_age();
    }

    /// The one place where a summary changes: counts and index follow.
    #[inline]
    fn commit(&self, region: &Region, block: u64, cell: &AtomicU64, old: Summary, new: Summary) {
        if old == new {
            return;
        }
        summary::store(cell, new);
        self.table.totals(region.kind()).replace(old, new);
        region.index().update(block, maps(old, self.by_age), maps(new, self.by_age));
    }

    /// The youngest label that a block holds.
    fn youngest_of(&self, summary: Summary) -> Label {
        let [youngest, ..] = self.by_age;
        let mut held = self.by_age.into_iter().filter(|&label| summary.count(label) != 0);
        held.next().unwrap_or(youngest)
    }
}

/// Take in the masks of one block. Returns the pages that left each label and how many entered the
/// youngest.
#[inline]
fn observe_pages(
    pages: &Block,
    looked: &Mask,
    present: &Mask,
    young: &Mask,
    rules: Rules,
    counts: &mut PassCounts,
) -> (Tally, u64) {
    let mut left = Tally::default();
    let mut entered = 0;
    let masks = looked.iter().zip(present.iter().zip(young));
    for (group, (&looked, (&present, &young))) in pages.iter().zip(masks) {
        let words = word::load_own(group);
        if young & looked == 0 && (word::tracked(words) ^ present) & looked == 0 {
            continue;
        }
        let before = Planes::from_words(words);
        let seen = before.observe(looked, present, young, rules);
        word::store(group, words, seen.after.to_words());
        counts.second_chance += u64::from(seen.second_chance.count_ones());
        if seen.gone | seen.fresh | seen.promoted != 0 {
            let (fresh, promoted) = (seen.fresh.count_ones(), seen.promoted.count_ones());
            left.add(before, seen.gone | seen.promoted);
            entered += u64::from(fresh + promoted);
            counts.added += u64::from(fresh);
            counts.added_idle += u64::from((seen.fresh & !young).count_ones());
            counts.promoted += u64::from(promoted);
            counts.again += u64::from(seen.again.count_ones());
            counts.unmapped_now += u64::from(seen.gone.count_ones());
        }
    }
    (left, entered)
}

/// The pages of `looked` that carry `from` get `to`. Returns the summary of the block after it.
fn relabel_pages(pages: &Block, looked: &Mask, old: Summary, from: Label, to: Label) -> Summary {
    let mut left = Tally::default();
    let mut entered = 0;
    for (group, &looked) in pages.iter().zip(looked) {
        let words = word::load_own(group);
        let before = Planes::from_words(words);
        let moved = before.labelled(from) & looked;
        left.add(before, moved);
        entered += u64::from(moved.count_ones());
        word::store(group, words, before.relabelled(moved, to).to_words());
    }
    old.changed(left, entered, to)
}

fn any_referenced(summary: Summary, pages: &Block) -> bool {
    let word = |group| Planes::from_words(word::load_own(group)).referenced;
    summary != Summary::EMPTY && !summary.is_huge() && pages.iter().any(|group| word(group) != 0)
}

fn clear(pages: &Block) {
    for group in pages {
        word::store(group, word::load_own(group), [0; 4]);
    }
}

#[cfg(test)]
mod tests {
    use mmu_core::addr::Gfn;

    use super::*;

    /// Folding must not rewrite the many cold pages for the sake of the few that are newer.
    #[test]
    fn folding_keeps_the_label_of_the_larger_generation() {
        for (older, newer) in [(500, 12), (12, 500)] {
            let mut table = AgeTable::new(0);
            table.add_range(GfnRange::from_len(Gfn::new(0), BLOCK_PAGES)).unwrap();
            let mut editor = table.edit().unwrap();
            let mut counts = PassCounts::default();
            let [region] = table.regions() else { panic!("one range was added") };
            let (first, all) = (mask(0, older), mask(0, older + newer));
            let none = mask(0, 0);
            let rules = editor.rules(Promotion::SecondChance);
            editor.pages(region, 0, &first, &first, &none, rules, &mut counts);
            let _ = editor.open_generation(0).unwrap();
            let rules = editor.rules(Promotion::SecondChance);
            editor.pages(region, 0, &all, &all, &none, rules, &mut counts);
            let labels = [3, 4].map(|seq| table.window().label(Seq::new(seq)));
            assert_eq!([3, 4].map(|seq| table.pages_in(Seq::new(seq))), [older, newer]);
            let folded: u64 = (0..3).filter_map(|_| editor.open_generation(0)).sum();
            let window = table.window();
            assert_eq!((folded, window.min_seq()), (older, Seq::new(4)));
            let [older_label, newer_label] = labels;
            let survivor = if older > newer { older_label } else { newer_label };
            assert_eq!(window.label(Seq::new(4)), survivor, "{older} into {newer}");
            assert_eq!(table.pages_in(Seq::new(4)), BLOCK_PAGES);
            drop(editor);
            table.check().unwrap();
        }
    }
}
