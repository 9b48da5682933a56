//! Another host page for a gfn that is mapped, without a fault in between.
//!
//! Owns [`TdpMmu::change_pte`] (KVM row 3.53): for a host that merges equal pages or copies one on
//! write, and knows that the guest will read on. The leaf is taken out, the flush is made, and then
//! a leaf of the new page is put in that only reads; the first write asks the resolver.
//!
//! Locking: an invalidation of the one gfn. The new leaf goes in under Shared, and only if no other
//! invalidation was in progress since ours began: who unmaps the gfn may have passed it while it
//! was empty. One that begins later waits for the section and finds the leaf.

use core::fmt;

use arrayvec::ArrayVec;

use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::epoch::EpochGuard;
use mmu_core::flush::FlushDebt;
use mmu_core::notify::Invalidation;
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::sync::relax;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::change::Change;
use crate::mmu::TdpMmu;
use crate::root::{FoundRoot, MAX_ROOTS, RootFilter};
use crate::zap::{ZapReport, pay_inside};

/// What a change of page came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct PageChange {
    /// Leaves that map the new page now: one in each tree that mapped the gfn by a 4 KiB leaf.
    /// Where the gfn is not mapped anew, the next access to it faults.
    pub changed: u64,
    /// What was taken out, with its accessed and dirty bits: the 4 KiB leaves that changed, and
    /// whatever got nothing in its place. That is a huge leaf, a leaf of a root that is being
    /// dropped, and any leaf while another invalidation is in progress.
    pub taken: ZapReport,
}

/// A page was not changed. Nothing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChangePteError {
    /// No entry can name the page.
    BadPage {
        /// The guest frame.
        gfn: Gfn,
        /// The page.
        pfn: Pfn,
        /// First page that cannot be named.
        max_pfn: Pfn,
    },
    /// A page of a mirror changes by removal only.
    Mirror {
        /// The guest frame.
        gfn: Gfn,
    },
    /// No entry can map the guest frame.
    BeyondPhysical {
        /// The guest frame.
        gfn: Gfn,
        /// First gfn that cannot be mapped.
        max_gfn: Gfn,
    },
}

impl fmt::Display for ChangePteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::BadPage { gfn, pfn, max_pfn } => {
                write!(f, "pfn {pfn} for gfn {gfn} is not below {max_pfn}")
            }
            Self::Mirror { gfn } => write!(f, "gfn {gfn} is mapped by an external table"),
            Self::BeyondPhysical { gfn, max_gfn } => {
                write!(f, "gfn {gfn} is not below {max_gfn}")
            }
        }
    }
}

impl core::error::Error for ChangePteError {}

/// A 4 KiB leaf that was taken out: of which root, and what it said.
struct Out {
    index: usize,
    root: FoundRoot,
    leaf: Spte,
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// Map `gfn` of address space `space`, where it is mapped by a 4 KiB leaf, to the host page
    /// `pfn` instead, for reading. When this returns, no vCPU uses the page from before, through
    /// whatever TLB. Permissions stay but for writes, the accessed bit stays, the dirty bit is
    /// reported (and in the log where it is what the log looks at). A huge leaf goes as a whole.
    ///
    /// The resolver has to answer `pfn` by now, or a fault finds two pages for one gfn
    /// ([`FaultError::StaleMapping`](mmu_core::fault::FaultError::StaleMapping)). A host that may
    /// be asked while it changes its answer begins the invalidation first: see
    /// [`change_pte_in`](Self::change_pte_in).
    ///
    /// # Errors
    /// [`ChangePteError`].
    ///
    /// # Panics
    /// When the actor is another VM's.
    #[doc(alias = "kvm_set_spte_gfn")]
    pub fn change_pte(
        &self,
        actor: &mut Actor<H>,
        space: u16,
        gfn: Gfn,
        pfn: Pfn,
    ) -> Result<PageChange, ChangePteError> {
        self.assert_own(actor);
        let range = GfnRange::from_len(gfn, 1);
        let invalidation = self.vm().invalidate(actor.participant(), range);
        let done = self.change_pte_in(actor, &invalidation, space, gfn, pfn);
        drop(invalidation);
        done
    }

    /// The same inside an invalidation that the caller began, and in which it changed what the
    /// resolver answers.
    ///
    /// # Errors
    /// As [`change_pte`](Self::change_pte).
    ///
    /// # Panics
    /// When `gfn` is not inside the invalidation's range, or the actor is another VM's.
    pub fn change_pte_in(
        &self,
        actor: &mut Actor<H>,
        invalidation: &Invalidation<'_>,
        space: u16,
        gfn: Gfn,
        pfn: Pfn,
    ) -> Result<PageChange, ChangePteError> {
        self.assert_own(actor);
        let (max_gfn, max_pfn) =
            (self.config().max_gfn_exclusive(), self.config().max_pfn_exclusive());
        if self.external().is_some() {
            return Err(ChangePteError::Mirror { gfn });
        }
        if gfn >= max_gfn {
            return Err(ChangePteError::BeyondPhysical { gfn, max_gfn });
        }
        if pfn >= max_pfn {
            return Err(ChangePteError::BadPage { gfn, pfn, max_pfn });
        }
        let covered = invalidation.range().contains(gfn);
        assert!(covered, "gfn {gfn} is not inside the invalidation of {}", invalidation.range());
        let mut done = PageChange::default();
        let out = self.take_page_out(actor, invalidation, space, gfn, &mut done.taken);
        for Out { index, root, leaf } in out {
            let work = actor.shared();
            // In the section: whoever invalidates from here on waits for it.
            if invalidation.others_in_progress() {
                break;
            }
            if self.roots().get(index, RootFilter::Valid) != Some(root) {
                continue;
            }
            let section = work.section.epoch();
            let change = self.change(work.vm, work.stats, section, space);
            let new = self.config().other_page(leaf, pfn);
            done.changed += u64::from(put_in(&change, section, root, gfn, new));
        }
        Ok(done)
    }

    /// Take out whatever maps `gfn`, flushed. Returns the 4 KiB leaves.
    fn take_page_out(
        &self,
        actor: &mut Actor<H>,
        invalidation: &Invalidation<'_>,
        space: u16,
        gfn: Gfn,
        taken: &mut ZapReport,
    ) -> ArrayVec<Out, MAX_ROOTS> {
        let mut out = ArrayVec::new();
        let mut debt = FlushDebt::new();
        for index in self.changeable_roots() {
            let work = actor.shared();
            // Invalid roots too: a vCPU may still run on one.
            let Some(root) = self.roots().get(index, RootFilter::InUse) else { continue };
            if root.role.space() != space {
                continue;
            }
            let section = work.section.epoch();
            let change = self.change(work.vm, work.stats, section, space);
            let Some((leaf, level)) = take_out(&change, section, root, gfn, &mut debt) else {
                continue;
            };
            taken.add_leaf(self.config(), leaf, level);
            if level == Level::L1 {
                // There is room for every root.
                let _ = out.try_push(Out { index, root, leaf });
            }
        }
        pay_inside(actor, invalidation, GfnRange::from_len(gfn, 1), debt);
        out
    }
}

/// Take out the leaf that maps `gfn` in one tree.
fn take_out<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    section: &EpochGuard<'_>,
    root: FoundRoot,
    gfn: Gfn,
    debt: &mut FlushDebt,
) -> Option<(Spte, Level)> {
    // Again only when somebody else changed the entry in between: a fault on a neighbour splits a
    // leaf or takes a table away. None of them maps `gfn`, so this ends.
    loop {
        let (cell, spte, level) = last_entry(change, section, root, gfn);
        if spte.is_leaf(level) {
            let first = gfn.align_down(level);
            if let Some(old) = change.zap_leaf(cell, spte, first, level, debt) {
                return Some((old, level));
            }
        } else if !spte.is_frozen() {
            return None;
        }
        relax();
    }
}

/// Put `new` in the entry that maps `gfn` at level 1, if that is there and empty.
fn put_in<F: SpteFormat, H: Host>(
    change: &Change<'_, F, H>,
    section: &EpochGuard<'_>,
    root: FoundRoot,
    gfn: Gfn,
    new: Spte,
) -> bool {
    let (cell, spte, level) = last_entry(change, section, root, gfn);
    let done = level == Level::L1 && spte.is_empty() && change.map(cell, spte, new, gfn, level);
    if done && change.config.is_accessed(new) {
        // The access was another page's, through links that may have been cleared since.
        change.touch(root, gfn, level);
    }
    done
}

/// The entry for `gfn` that links no table.
fn last_entry<'g, F: SpteFormat, H: Host>(
    change: &Change<'g, F, H>,
    section: &'g EpochGuard<'_>,
    root: FoundRoot,
    gfn: Gfn,
) -> (&'g SpteCell, Spte, Level) {
    let (mut frame, mut level) = (root.frame, root.role.level());
    loop {
        let cell = change.pool().table(section, frame).cell(gfn, level);
        let spte = cell.load();
        if !spte.is_table(level) {
            return (cell, spte, level);
        }
        frame = change.config.pfn(spte);
        level = level.below();
    }
}
