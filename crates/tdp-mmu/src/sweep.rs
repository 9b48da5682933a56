//! A walk over every entry of every root that gives way at least every [`SLICE_ENTRIES`] entries.
//!
//! Owns [`Sweep`], on which `dump` and `usage` stand: it remembers a root and a gfn between epoch
//! sections, so faults, zaps and grace periods go on while somebody looks. Reads only.

use core::ops::ControlFlow;

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::spte::SpteFormat;
use mmu_core::stats::Counter;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::iter::{Cursor, Step, TdpIter};
use crate::mmu::TdpMmu;
use crate::root::{FoundRoot, RootFilter};
use crate::zap::SLICE_ENTRIES;

/// What a sweep comes to.
pub(crate) enum Visit<'v, 'g> {
    /// A root, before its entries.
    Root,
    /// An entry, and the part of it that belongs to this sweep and was not shown yet.
    Entry(&'v Step<'g>, GfnRange),
}

/// How a slice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SliceEnd {
    /// The root has more entries.
    More,
    /// The root's entries are done, or it went away.
    Root,
    /// All roots are done.
    All,
}

/// Where a sweep stands between two slices.
#[derive(Debug)]
pub(crate) struct Sweep {
    range: GfnRange,
    space: Option<u16>,
    index: usize,
    root: Option<FoundRoot>,
    /// Everything before it has been shown.
    next: Gfn,
}

impl Sweep {
    /// Of the entries that map `range` in the roots of address space `space`, or in all.
    pub(crate) const fn new(range: GfnRange, space: Option<u16>) -> Self {
        Self { range, space, index: 0, root: None, next: range.start }
    }

    /// Visit entries in one epoch section, until `visit` breaks, the root ends or the slice is
    /// full.
    ///
    /// A link may be shown again after a pause, with the rest of its range. A leaf is shown once,
    /// in parts if huge pages are split or made meanwhile. What others change while the sweep
    /// passes may be shown as it was or as it is, or be missed.
    pub(crate) fn slice<F: SpteFormat, H: Host>(
        &mut self,
        mmu: &TdpMmu<F, H>,
        actor: &mut Actor<H>,
        mut visit: impl FnMut(&FoundRoot, Visit<'_, '_>) -> ControlFlow<()>,
    ) -> SliceEnd {
        let work = actor.pinned();
        let Some(root) = self.find_root(mmu) else { return SliceEnd::All };
        match self.root {
            None => {
                self.root = Some(root);
                if visit(&root, Visit::Root).is_break() {
                    return SliceEnd::More;
                }
            }
            Some(same) if same == root => {}
            Some(_) => {
                // Ours is gone, and another one stands in its place.
                self.start_root(self.index);
                return SliceEnd::Root;
            }
        }
        let cursor = Cursor::new(GfnRange::new(self.next, self.range.end), Level::L1);
        let pool = work.vm.pool();
        let iter = TdpIter::resume(pool, &work.section, root.frame, root.role.level(), cursor)
            .with_encryption(mmu.config().encryption_mask());
        let mut visited = 0;
        let mut end = SliceEnd::Root;
        for step in iter {
            visited += 1;
            let part = step.range().intersection(GfnRange::new(self.next, self.range.end));
            let flow = visit(&root, Visit::Entry(&step, part));
            // A link is come back to, everything else is done.
            let done = if step.spte.is_table(step.level) { step.gfn } else { step.range().end };
            self.next = self.next.max(done);
            if flow.is_break() || visited == SLICE_ENTRIES {
                end = SliceEnd::More;
                break;
            }
        }
        work.stats.max(Counter::MaxSlice, mmu_core::addr::to_u64(visited));
        if end == SliceEnd::Root {
            self.start_root(self.index + 1);
        }
        end
    }

    /// The root to go on with; moves on where there is none.
    fn find_root<F: SpteFormat, H: Host>(&mut self, mmu: &TdpMmu<F, H>) -> Option<FoundRoot> {
        while self.index < mmu.roots().reach() {
            let root = mmu.roots().get(self.index, RootFilter::InUse);
            let wanted =
                |root: &FoundRoot| self.space.is_none_or(|as_id| root.role.space() == as_id);
            if let Some(root) = root.filter(wanted) {
                return Some(root);
            }
            self.start_root(self.index + 1);
        }
        None
    }

    fn start_root(&mut self, index: usize) {
        *self = Self { index, ..Self::new(self.range, self.space) };
    }
}
