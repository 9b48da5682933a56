//! The walk over a tree, children before parents (KVM row 2.16).
//!
//! Owns [`PostOrder`], an adapter of [`TdpIter`]: the order in which tables can be given back, for
//! an entry comes after everything that it leads to. It lives inside one section, as the walk that
//! it is made from, and takes memory for one entry a level.
//!
//! Ordering: as [`TdpIter`].

use arrayvec::ArrayVec;

use mmu_core::frame::PhysMap;

use crate::iter::{Step, TdpIter};

/// A post-order walk over the entries that map a range.
#[derive(Debug)]
pub struct PostOrder<'g, P: PhysMap> {
    walk: TdpIter<'g, P>,
    /// The entries from the root to the last one that `walk` gave, each to be handed out after
    /// what is below it: levels fall.
    path: ArrayVec<Step<'g>, 5>,
    /// The entry after those.
    ahead: Option<Step<'g>>,
}

impl<'g, P: PhysMap> PostOrder<'g, P> {
    /// The entries that are left of `walk`, in the other order.
    #[must_use]
    pub const fn new(walk: TdpIter<'g, P>) -> Self {
        Self { walk, path: ArrayVec::new_const(), ahead: None }
    }
}

impl<'g, P: PhysMap> Iterator for PostOrder<'g, P> {
    type Item = Step<'g>;

    /// The next entry, read again: what happened below it may have changed it.
    fn next(&mut self) -> Option<Step<'g>> {
        // At most five steps down before one is handed out.
        loop {
            let ahead = self.ahead.take().or_else(|| self.walk.next());
            match (self.path.last(), ahead) {
                // Lower than the last: below it.
                (last, Some(step)) if last.is_none_or(|last| step.level < last.level) => {
                    self.path.push(step);
                }
                (_, ahead) => {
                    self.ahead = ahead;
                    let step = self.path.pop()?;
                    return Some(Step { spte: step.cell.load(), ..step });
                }
            }
        }
    }
}
