//! Accessed bits of links: what nobody walked into is left out of an aging pass (KVM row 5.25).
//!
//! Owns the rules by which a pass clears, believes and mends those bits; `age` walks, `unflushed`
//! knows what is flushed. An access that misses the TLB sets A in every entry on its way, so a link
//! with A clear has nothing young below it, if three things are right:
//!
//! 1. **No cache goes past it.** A CPU enters a link into its paging-structure caches, and a leaf
//!    below it into its TLB, only with A set in that link; from then on it may go past it. So a
//!    clear bit is believed only if a flush completed after it was cleared. [`AgeMode::ClearFlush`]
//!    owes the flush of a link's whole reach with its leaves' and pays once, at its end;
//!    [`AgeMode::Clear`] leaves the link unbelieved until somebody flushes it.
//! 2. **It is cleared before anything below it is read**, and only by a call whose range covers it.
//!    The CPU may set the link before the leaf or after it: either the leaf is young when it is
//!    read, or the link is set again, or the access is older than the flush. A call that stops
//!    inside such a link sets it again (`leave`): what it did not get to may be young.
//! 3. **Nothing young is put below it behind the CPU's back.** A new link is born with A set. A
//!    leaf that inherits accesses from others, when a huge leaf replaces a table or a page changes
//!    its place, sets A in the links above it after it is put in (`touch`); each is a
//!    read-modify-write, so whoever clears the link later reads the leaf, and whoever cleared it
//!    before is undone. Split leaves stand under a link that is born set. A leaf that a fault makes
//!    is young because an access is about to come again, and that one sets the links itself; until
//!    it does (or never, if the vCPU is not resumed) the leaf alone is young and a pass may miss
//!    it. A prefaulted leaf is old.
//!
//! What a pass misses is therefore an access made while the link was clear and not yet flushed: for
//! `ClearFlush` one made during the call itself. The leaf stays young, so a pass that ignores upper
//! bits finds it. PAE page-directory-pointer entries have no A, nor has any link without hardware
//! A/D: those are always entered.

use mmu_core::addr::{Gfn, GfnRange, Level, to_u64};
use mmu_core::spte::SpteFormat;
use mmu_core::spte::cell::SpteCell;
use mmu_core::sync::{Ordering, fence};
use mmu_core::traits::{AgeMode, AgeSink, Host};

use crate::age::Slice;
use crate::change::Change;
use crate::iter::{Step, TdpIter};
use crate::root::FoundRoot;

/// Tries to set a bit in a link that others change meanwhile. Each loss means that the CPU or an
/// ager changed the bit, or that the link went.
const MAX_TRIES: u32 = 8;

/// The link of each level that a walk decided to enter last: a walk that comes back to it after a
/// pause, to go on below, does not ask again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entered([Option<Gfn>; 5]);

impl Entered {
    pub(crate) const NONE: Self = Self([None; 5]);

    fn has(&self, gfn: Gfn, level: Level) -> bool {
        self.0.get(level.slot()).is_some_and(|entered| *entered == Some(gfn))
    }

    fn note(&mut self, gfn: Gfn, level: Level) {
        if let Some(entered) = self.0.get_mut(level.slot()) {
            *entered = Some(gfn);
        }
    }
}

impl<F: SpteFormat, H: Host, S: AgeSink> Slice<'_, '_, F, H, S> {
    /// Has nobody walked into the link `step` since it was last cleared? If somebody has, it is
    /// cleared, and the walk enters it.
    #[inline]
    pub(crate) fn is_idle(&mut self, step: &Step<'_>) -> bool {
        let (gfn, level) = (step.gfn, step.level);
        if !self.change.config.has_table_accessed(level) || self.work.entered.has(gfn, level) {
            return false;
        }
        let range = step.range();
        if !self.change.config.is_accessed(step.spte) {
            if self.mmu.unflushed().trusts(self.work.pass, range, level) {
                return true;
            }
        } else if self.work.pass.clears_links() && self.job.range.covers(range) {
            self.clear_link(step, range);
        }
        self.work.entered.note(gfn, level);
        false
    }

    /// How many links from `step` on are idle, at most `most`, and what they map; `step` is.
    #[inline]
    pub(crate) fn idle_run(
        &mut self,
        iter: &TdpIter<'_, H>,
        step: &Step<'_>,
        most: usize,
    ) -> (usize, GfnRange) {
        let one = (1, step.range());
        let links = if cfg!(loom) { 1 } else { iter.links_without(F::ACCESSED, most) };
        if links == 1 {
            return one;
        }
        // ORDERING[upper-pass]: Acquire. After the relaxed reads of the links, before `trusts`
        // reads the count: who cleared one of them is seen to have begun.
        fence(Ordering::Acquire);
        let range = GfnRange::from_len(step.gfn, to_u64(links).saturating_mul(step.level.pages()));
        if self.mmu.unflushed().trusts(self.work.pass, range, step.level) {
            (links, range)
        } else {
            one
        }
    }

    /// Clear A of a link. A lost exchange leaves it to the other: the CPU sets no more than A, an
    /// ager is at work in the range, or the link is gone.
    fn clear_link(&mut self, step: &Step<'_>, range: GfnRange) {
        if self.change.age_table(step.cell, step.spte, step.gfn, step.level) {
            self.work.pass.note(range, step.level);
            let precise = self.job.mode == AgeMode::ClearFlush;
            if precise && !mmu_core::busted!("upper_clear_without_flush") {
                self.change.owe(self.work.debt, range);
            }
        }
    }

    /// The call ends before the gfn `stop`: the links that it cleared and did not get through are
    /// set again.
    pub(crate) fn leave(&mut self, root: FoundRoot, stop: Gfn) {
        if !self.work.pass.clears_links() || mmu_core::busted!("leave_upper_clear") {
            return;
        }
        // Those on the way to `stop`: entered, and perhaps cleared.
        let entered = self.work.entered;
        self.change.above(root, stop, Level::L1, |change, cell, gfn, level| {
            if entered.has(gfn, level) {
                change.use_table(cell, gfn, level);
            }
        });
    }
}

impl<F: SpteFormat, H: Host> Change<'_, F, H> {
    /// A leaf at `level` for `gfn` was put in that says of itself that it was accessed: so were the
    /// links above it.
    pub(crate) fn touch(&self, root: FoundRoot, gfn: Gfn, level: Level) {
        if !mmu_core::busted!("collapse_hides_accesses") {
            self.above(root, gfn, level, |change, cell, gfn, level| {
                change.use_table(cell, gfn, level);
            });
        }
    }

    /// Visit the links with an accessed bit above the entry at `level` for `gfn`, from the root.
    fn above(
        &self,
        root: FoundRoot,
        gfn: Gfn,
        level: Level,
        visit: impl Fn(&Self, &SpteCell, Gfn, Level),
    ) {
        let (mut frame, mut at) = (root.frame, root.role.level());
        while at > level {
            let cell = self.pool().table(self.section, frame).cell(gfn, at);
            let link = cell.load();
            if !link.is_table(at) {
                return;
            }
            if self.config.has_table_accessed(at) {
                visit(self, cell, gfn.align_down(at), at);
            }
            frame = self.config.pfn(link);
            at = at.below();
        }
    }

    /// Set A in a link, by a read-modify-write whether it is set or not.
    fn use_table(&self, cell: &SpteCell, gfn: Gfn, level: Level) {
        for _ in 0..MAX_TRIES {
            let old = cell.load();
            if !old.is_table(level) {
                return;
            }
            if self.adjust_table(cell, old, old.with(F::ACCESSED), gfn, level) {
                return;
            }
        }
    }
}
