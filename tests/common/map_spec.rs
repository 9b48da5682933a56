//! The specification: what is mapped after which call, and what every call answers.
//!
//! [`Map`] is a sorted map of leaves per address space, plus the slots. It knows page sizes, since
//! unmapping and aging act on whole leaves, but no tables, locks, epochs or flushes. Written from
//! the behaviour rows (`docs/KVM_PARITY.md`), not from the sources: it shares no code with them.

use std::collections::{BTreeMap, BTreeSet};

/// Pages of a leaf of `level`.
pub const fn pages(level: u8) -> u64 {
    1 << (9 * (level - 1))
}

/// A slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub base: u64,
    pub pages: u64,
    pub pfn: u64,
    pub read_only: bool,
    pub log: bool,
}

impl Slot {
    fn holds(&self, first: u64, pages: u64) -> bool {
        self.base <= first && first + pages <= self.base + self.pages
    }
}

/// A mapped page of some size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    pub level: u8,
    pub pfn: u64,
    /// The processor may write.
    pub writable: bool,
    /// It may be given back the right to write without asking the host.
    pub may_write: bool,
    /// The host's page was writable when it was mapped.
    pub host_writable: bool,
    /// All rights were taken away to see the next access.
    pub tracked: bool,
    pub accessed: bool,
    pub dirty: bool,
}

/// What hardware and policy are like.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub max_gfn: u64,
    pub max_level: u8,
    /// The MMU relies on accessed and dirty bits.
    pub ad: bool,
    /// The processor sets them, relied on or not.
    pub hardware_ad: bool,
    /// An address bit is left that the processor rejects.
    pub mmio: bool,
}

/// A fault.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub space: u8,
    pub gfn: u64,
    pub write: bool,
    /// The error code says that a translation was present.
    pub present: bool,
    pub max_level: u8,
    pub prefetch: bool,
}

/// What the host has.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    pub level: u8,
    pub writable: bool,
}

/// What comes of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Fixed,
    Spurious,
    NoSlot,
    ReadOnly,
    Beyond,
}

/// What an unmap or a zap-all takes out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zapped {
    pub leaves: [u64; 3],
    pub young: u64,
    pub dirty: u64,
}

/// Leaves of one address space, by first gfn.
pub type Leaves = BTreeMap<u64, Leaf>;

/// The model.
#[derive(Clone, Debug)]
pub struct Map {
    pub rules: Rules,
    pub slots: BTreeMap<(u8, u16), Slot>,
    pub spaces: [Leaves; 2],
    /// Where smaller pages are, or were: space, level of the page that they take the place of, and
    /// its first gfn.
    below: BTreeSet<(u8, u8, u64)>,
    /// Entries that say "no memory here": space and gfn. Whether they still hold is the slots' to
    /// say.
    pub mmio: BTreeSet<(u8, u64)>,
}

impl Map {
    pub fn new(rules: Rules) -> Self {
        let spaces = [Leaves::new(), Leaves::new()];
        let (below, mmio) = (BTreeSet::new(), BTreeSet::new());
        Self { rules, slots: BTreeMap::new(), spaces, below, mmio }
    }

    pub fn slot_of(&self, space: u8, gfn: u64) -> Option<(u16, &Slot)> {
        let mut slots = self.slots.iter().filter(|((at, _), _)| *at == space);
        slots.find(|(_, slot)| slot.holds(gfn, 1)).map(|((_, id), slot)| (*id, slot))
    }

    /// The leaf that maps `gfn`, and its first gfn.
    pub fn leaf(&self, space: u8, gfn: u64) -> Option<(u64, Leaf)> {
        let (&first, &leaf) = self.spaces[usize::from(space)].range(..=gfn).next_back()?;
        (gfn < first + pages(leaf.level)).then_some((first, leaf))
    }

    /// The processor's view: frame and whether it may write.
    pub fn translate(&self, space: u8, gfn: u64) -> Option<(u64, u8, bool)> {
        let (first, leaf) = self.leaf(space, gfn).filter(|(_, leaf)| !leaf.tracked)?;
        Some((leaf.pfn + (gfn - first), leaf.level, leaf.writable))
    }

    /// The guest's access. False when it faults.
    pub fn touch(&mut self, space: u8, gfn: u64, write: bool) -> bool {
        let hardware = self.rules.hardware_ad;
        let Some((first, mut leaf)) = self.leaf(space, gfn) else { return false };
        if leaf.tracked || (write && !leaf.writable) {
            return false;
        }
        leaf.accessed |= hardware;
        leaf.dirty |= hardware && write;
        self.spaces[usize::from(space)].insert(first, leaf);
        true
    }

    pub fn fault(&mut self, fault: Fault, host: impl Fn(&Slot, u64) -> Host) -> Outcome {
        if fault.gfn >= self.rules.max_gfn {
            return Outcome::Beyond;
        }
        let Some((_, &slot)) = self.slot_of(fault.space, fault.gfn) else {
            if self.rules.mmio && !fault.prefetch {
                self.mmio.insert((fault.space, fault.gfn));
                // It stands in a table of small pages.
                for level in 2..=3 {
                    self.below.insert((fault.space, level, fault.gfn & !(pages(level) - 1)));
                }
            }
            return Outcome::NoSlot;
        };
        if let Some(outcome) = self.fast(fault, &slot) {
            return outcome;
        }
        let page = host(&slot, fault.gfn);
        if fault.write && (slot.read_only || !page.writable) {
            return Outcome::ReadOnly;
        }
        self.install(fault, &slot, page)
    }

    /// A permission that only has to be given back is, without asking the host.
    fn fast(&mut self, fault: Fault, slot: &Slot) -> Option<Outcome> {
        let may = !fault.prefetch && (!self.rules.ad || (fault.present && fault.write));
        let (first, old) = self.leaf(fault.space, fault.gfn).filter(|_| may)?;
        if permits(&old, fault.write) {
            return Some(Outcome::Spurious);
        }
        let gains_write = fault.write && old.may_write;
        let new = Leaf {
            tracked: false,
            accessed: old.accessed || old.tracked,
            writable: old.writable || gains_write,
            // Where no processor tells, the fault that lets a write pass does.
            dirty: old.dirty || (gains_write && !self.rules.ad),
            ..old
        };
        let gained = new.writable && !old.writable;
        if !permits(&new, fault.write) || (gained && slot.log && old.level > 1) {
            return None;
        }
        self.spaces[usize::from(fault.space)].insert(first, new);
        Some(Outcome::Fixed)
    }

    fn goal(&self, fault: Fault, slot: &Slot, page: Host) -> u8 {
        if slot.log {
            return 1;
        }
        let fits = |level: u8| {
            let mask = pages(level) - 1;
            (slot.base ^ slot.pfn) & mask == 0 && slot.holds(fault.gfn & !mask, mask + 1)
        };
        let most = fault.max_level.min(page.level).min(self.rules.max_level);
        (2..=most).rev().find(|level| fits(*level)).unwrap_or(1)
    }

    fn install(&mut self, fault: Fault, slot: &Slot, page: Host) -> Outcome {
        let mut goal = self.goal(fault, slot, page);
        if self.has_tables_below(fault.space, goal, fault.gfn & !(pages(goal) - 1)) {
            // Only as much goes at once as one table maps.
            goal -= 1;
        }
        while let Some((first, leaf)) = self.leaf(fault.space, fault.gfn) {
            if leaf.level <= goal {
                break;
            }
            self.split(fault.space, first, fault.gfn);
        }
        let first = fault.gfn & !(pages(goal) - 1);
        let old = self.leaf(fault.space, fault.gfn).filter(|(_, old)| old.level == goal);
        let writable = page.writable && !slot.read_only;
        let at_once = writable && (!slot.log || (fault.write && !fault.prefetch));
        let tracked = fault.prefetch && !self.rules.ad;
        // Smaller pages may have been written, and go without a report.
        let replaces = self.below.contains(&(fault.space, goal, first));
        let mut new = Leaf {
            level: goal,
            pfn: slot.pfn + (first - slot.base),
            writable: at_once && !tracked,
            may_write: writable,
            host_writable: writable,
            tracked,
            accessed: !fault.prefetch,
            dirty: (at_once && !tracked) || (writable && replaces),
        };
        if let Some((_, old)) = old {
            let same = fault.prefetch || permits(&old, fault.write);
            if same || new == old || !permits(&new, fault.write) {
                return Outcome::Spurious;
            }
            if old.host_writable == new.host_writable && old.may_write && new.may_write {
                new.writable |= old.writable;
                new.dirty |= old.dirty;
            }
        }
        let space = &mut self.spaces[usize::from(fault.space)];
        for level in goal + 1..=3 {
            self.below.insert((fault.space, level, fault.gfn & !(pages(level) - 1)));
        }
        let whole = first..first + pages(goal);
        self.below
            .retain(|&(at, level, gfn)| at != fault.space || level > goal || !whole.contains(&gfn));
        self.mmio.retain(|&(at, gfn)| at != fault.space || !whole.contains(&gfn));
        // Smaller pages in the way make place; what they say of their use stays.
        if space.range(whole.clone()).any(|(_, leaf)| leaf.level < goal && leaf.accessed) {
            (new.accessed, new.tracked) = (true, false);
        }
        space.retain(|at, _| !(first..first + pages(goal)).contains(at));
        space.insert(first, new);
        Outcome::Fixed
    }

    /// Is there a table under the table that a page of `level` would take the place of?
    fn has_tables_below(&self, space: u8, level: u8, first: u64) -> bool {
        let inside = |gfn: u64| (first..first + pages(level)).contains(&gfn);
        self.below.iter().any(|&(at, of, gfn)| at == space && of < level && inside(gfn))
    }

    /// Pages of `start..end` become as large as slot and host allow: what is left of pages that
    /// were smaller.
    pub fn collapse(&mut self, space: u8, start: u64, end: u64, host: impl Fn(&Slot, u64) -> Host) {
        for level in 2..=self.rules.max_level {
            let wanted = |&&(at, of, first): &&(u8, u8, u64)| {
                at == space && of == level && first < end && start < first + pages(level)
            };
            let blocks: Vec<u64> = self.below.iter().filter(wanted).map(|block| block.2).collect();
            for first in blocks {
                self.collapse_block(space, level, first, &host);
            }
        }
    }

    fn collapse_block(
        &mut self,
        space: u8,
        level: u8,
        first: u64,
        host: impl Fn(&Slot, u64) -> Host,
    ) {
        let whole = first..first + pages(level);
        let parts: Vec<(u64, Leaf)> = self.spaces[usize::from(space)]
            .range(whole.clone())
            .map(|(first, leaf)| (*first, *leaf))
            .collect();
        let Some(&(at, one)) = parts.first() else { return };
        let Some((_, &slot)) = self.slot_of(space, first) else { return };
        let page = host(&slot, at);
        let fits = (slot.base ^ slot.pfn) & (pages(level) - 1) == 0
            && slot.holds(first, pages(level))
            && page.level >= level
            && !slot.log;
        let writable = page.writable && !slot.read_only;
        let alike = parts.iter().all(|(gfn, leaf)| {
            leaf.pfn == slot.pfn + (gfn - slot.base)
                && leaf.host_writable == writable
                && leaf.may_write == one.may_write
        });
        if !fits || !alike || self.has_tables_below(space, level, first) {
            return;
        }
        let any = |what: fn(&Leaf) -> bool| parts.iter().any(|(_, leaf)| what(leaf));
        let new = Leaf {
            level,
            pfn: slot.pfn + (first - slot.base),
            writable: any(|leaf| leaf.writable),
            tracked: !any(|leaf| !leaf.tracked),
            accessed: any(|leaf| leaf.accessed),
            dirty: any(|leaf| leaf.dirty),
            ..one
        };
        let leaves = &mut self.spaces[usize::from(space)];
        leaves.retain(|gfn, _| !whole.contains(gfn));
        leaves.insert(first, new);
        self.below.remove(&(space, level, first));
        self.mmio.retain(|&(at, gfn)| at != space || !whole.contains(&gfn));
    }

    /// Split the leaf at `first` into leaves one level lower.
    fn split(&mut self, space: u8, first: u64, _: u64) {
        let leaves = &mut self.spaces[usize::from(space)];
        let Some(huge) = leaves.remove(&first) else { return };
        self.below.insert((space, huge.level, first));
        let level = huge.level - 1;
        for index in 0..512 {
            let offset = index * pages(level);
            leaves.insert(first + offset, Leaf { level, pfn: huge.pfn + offset, ..huge });
        }
    }

    /// Tables that [`log`](Self::log) needs.
    pub fn splits_for_log(&self, space: u8, slot: &Slot) -> u64 {
        let leaf = |first| self.leaf(space, first).map_or(1, |(_, leaf)| leaf.level);
        let levels = self.overlapping(space, slot.base, slot.base + slot.pages);
        levels.into_iter().map(|first| [0, 1, 513][usize::from(leaf(first) - 1)]).sum()
    }

    /// Writes to a slot begin to be logged: small pages, which the guest may not write yet. A huge
    /// page stays one where `was_split`, told its first gfn and level, says so.
    pub fn log(&mut self, space: u8, slot: &Slot, mut was_split: impl FnMut(u64, u8) -> bool) {
        if slot.read_only {
            return;
        }
        let range = (slot.base, slot.base + slot.pages);
        for _ in 0..2 {
            for first in self.overlapping(space, range.0, range.1) {
                let level = self.leaf(space, first).map_or(1, |(_, leaf)| leaf.level);
                if level > 1 && was_split(first, level) {
                    self.split(space, first, first);
                }
            }
        }
        for first in self.overlapping(space, range.0, range.1) {
            if let Some(leaf) = self.spaces[usize::from(space)].get_mut(&first) {
                leaf.writable = false;
            }
        }
    }

    fn overlapping(&self, space: u8, start: u64, end: u64) -> Vec<u64> {
        if start >= end {
            return Vec::new();
        }
        let before = self.leaf(space, start).map(|(first, _)| first);
        let rest = self.spaces[usize::from(space)].range(start..end).map(|(first, _)| *first);
        before.into_iter().filter(|first| *first < start).chain(rest).collect()
    }

    /// Take leaves out of every space, whole.
    pub fn unmap(&mut self, start: u64, end: u64) -> Zapped {
        let mut zapped = Zapped::default();
        for space in 0..2 {
            for first in self.overlapping(space, start, end) {
                if let Some(leaf) = self.spaces[usize::from(space)].remove(&first) {
                    zapped.add(&leaf, self.rules.ad);
                }
            }
        }
        zapped
    }

    /// Everything goes.
    pub fn zap_all(&mut self) -> Zapped {
        self.below.clear();
        self.mmio.clear();
        self.unmap(0, u64::MAX)
    }

    /// Look at accessed bits, and clear them: `(mapped, young)` pages, and whether anything was.
    pub fn age(&mut self, start: u64, end: u64, clear: bool) -> (u64, u64) {
        let (mut mapped, mut young) = (0, 0);
        for space in 0..2 {
            for first in self.overlapping(space, start, end) {
                let ad = self.rules.ad;
                let space = &mut self.spaces[usize::from(space)];
                let Some(leaf) = space.get_mut(&first) else { continue };
                let inside = end.min(first + pages(leaf.level)) - start.max(first);
                mapped += inside;
                if !leaf.accessed {
                    continue;
                }
                young += inside;
                if clear {
                    leaf.accessed = false;
                    leaf.tracked = !ad;
                    leaf.writable &= ad;
                }
            }
        }
        (mapped, young)
    }

    /// Leaves by level.
    pub fn count(&self) -> [u64; 3] {
        let mut count = [0; 3];
        for leaf in self.spaces.iter().flat_map(|space| space.values()) {
            count[usize::from(leaf.level - 1)] += 1;
        }
        count
    }
}

/// Does hardware let the access pass?
fn permits(leaf: &Leaf, write: bool) -> bool {
    !leaf.tracked && (!write || leaf.writable)
}

impl Zapped {
    fn add(&mut self, leaf: &Leaf, ad: bool) {
        let pages = pages(leaf.level);
        self.leaves[usize::from(leaf.level - 1)] += 1;
        self.young += if leaf.accessed { pages } else { 0 };
        // Where the dirty bit is not relied on, a writable page may have been written.
        let dirty = leaf.dirty || (!ad && leaf.writable);
        self.dirty += if dirty { pages } else { 0 };
    }
}
