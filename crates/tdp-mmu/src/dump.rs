//! What a tree maps, in runs and in words (KVM rows 3.62, 8.24).
//!
//! Owns [`TdpMmu::dump`] and its iterator [`Dump`], which merges neighbours that are alike into a
//! [`Run`]. A run prints as one line. Between two runs no section is open, so whoever prints them
//! may take its time; while it looks for one, a section lasts for at most
//! [`SLICE_ENTRIES`](crate::zap::SLICE_ENTRIES) entries. vCPUs go on faulting meanwhile.

use core::fmt;
use core::ops::ControlFlow;

use mmu_core::access::Access;
use mmu_core::addr::{GfnRange, Level, Pfn};
use mmu_core::spte::{SpteConfig, SpteFormat, SpteKind};
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::iter::Step;
use crate::mmu::TdpMmu;
use crate::root::FoundRoot;
use crate::sweep::{SliceEnd, Sweep, Visit};

/// Neighbouring entries of one tree that say the same of pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Address space of the tree.
    pub space: u16,
    /// Frame of the tree's root table.
    pub root: Pfn,
    /// The guest pages, inside the range asked for.
    pub range: GfnRange,
    /// Size of the pages.
    pub level: Level,
    /// What the entries are.
    pub kind: RunKind,
    /// Entries with the accessed bit.
    pub young: u64,
    /// Entries with the dirty bit, or writable where hardware has none.
    pub dirty: u64,
}

/// What the entries of a [`Run`] have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// They map pages.
    Leaf {
        /// The page behind the run's first gfn; the others follow it.
        pfn: Pfn,
        /// What they allow, or would allow if they were not access-tracked.
        access: Access,
        /// The host let the guest write.
        host_writable: bool,
        /// W may be given back by a fast fault.
        mmu_writable: bool,
        /// Permissions are taken away to see the next access.
        tracked: bool,
    },
    /// They cache that no slot is there.
    Mmio {
        /// The access that was asked for.
        access: Access,
        /// Low bits of the memslots generation at which they hold.
        generation: u64,
    },
}

impl Run {
    /// The part of a step that lies in `part`, if the step maps anything.
    fn of<F: SpteFormat>(
        config: &SpteConfig<F>,
        root: &FoundRoot,
        step: &Step<'_>,
        part: GfnRange,
    ) -> Option<Self> {
        let spte = step.spte;
        let kind = match config.kind(spte, step.level) {
            SpteKind::Leaf => RunKind::Leaf {
                pfn: config.pfn(spte).saturating_add(part.start.distance_from(step.gfn)),
                access: config.access(config.untrack(spte)),
                host_writable: config.is_host_writable(spte),
                mmu_writable: config.is_mmu_writable(spte),
                tracked: config.is_access_tracked(spte),
            },
            SpteKind::Mmio => RunKind::Mmio {
                access: config.mmio_access(spte)?,
                generation: config.mmio_generation(spte)?,
            },
            SpteKind::Empty | SpteKind::Frozen | SpteKind::Table | SpteKind::Corrupt => {
                return None;
            }
        };
        (!part.is_empty()).then(|| Self {
            space: root.role.space(),
            root: root.frame,
            range: part,
            level: step.level,
            kind,
            young: u64::from(config.is_accessed(spte)),
            dirty: u64::from(config.is_dirty(spte)),
        })
    }

    /// Take `next` in, if it goes on where this run ends; else nothing changes.
    fn merge(&mut self, next: &Self) -> bool {
        let follows = self.range.end == next.range.start
            && (self.space, self.root, self.level) == (next.space, next.root, next.level)
            && next.kind == self.kind.after(self.range.len());
        if follows {
            self.range.end = next.range.end;
            self.young += next.young;
            self.dirty += next.dirty;
        }
        follows
    }
}

impl RunKind {
    /// What an entry says that goes on `pages` pages later.
    const fn after(self, pages: u64) -> Self {
        match self {
            Self::Leaf { pfn, access, host_writable, mmu_writable, tracked } => {
                let pfn = pfn.saturating_add(pages);
                Self::Leaf { pfn, access, host_writable, mmu_writable, tracked }
            }
            Self::Mmio { .. } => self,
        }
    }
}

/// One line: address space, root, gfns, page size, what it is, permissions (`rwxu`), for leaves
/// `h` host-writable, `m` MMU-writable, `t` access-tracked, and how many entries are young and
/// dirty. Every line has its fields in the same order, separated by one space; a field that does
/// not hold is `-`.
impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { space, root, range, level, kind, young, dirty } = self;
        write!(f, "as {space} root {root} gfn {}-{} {level} ", range.start, range.end)?;
        match *kind {
            RunKind::Leaf { pfn, access, host_writable, mmu_writable, tracked } => {
                write!(f, "pfn {pfn} {} ", Letters(access))?;
                f.write_str(if host_writable { "h" } else { "-" })?;
                f.write_str(if mmu_writable { "m" } else { "-" })?;
                f.write_str(if tracked { "t" } else { "-" })?;
                write!(f, " young {young} dirty {dirty}")
            }
            RunKind::Mmio { access, generation } => {
                write!(f, "mmio {generation:#x} {}", Letters(access))
            }
        }
    }
}

struct Letters(Access);

impl fmt::Display for Letters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letters =
            [(Access::READ, "r"), (Access::WRITE, "w"), (Access::EXEC, "x"), (Access::USER, "u")];
        for (access, letter) in letters {
            f.write_str(if self.0.contains(access) { letter } else { "-" })?;
        }
        Ok(())
    }
}

/// The runs of one tree after the other, ascending by gfn; see [`TdpMmu::dump`].
pub struct Dump<'a, F: SpteFormat, H: Host> {
    mmu: &'a TdpMmu<F, H>,
    actor: &'a mut Actor<H>,
    sweep: Sweep,
    /// The run that may still grow.
    open: Option<Run>,
}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// What maps the pages of `range`, in the trees of address space `space` or in all of them,
    /// those of a pending zap-all included that a vCPU may still use.
    ///
    /// Exact when nobody changes the trees. Else each page is shown at most once a tree, as it was
    /// at some moment of the dump; a page whose entry is being replaced may be missing.
    ///
    /// # Panics
    /// When the actor is another VM's.
    #[doc(alias = "ptdump")]
    #[doc(alias = "kvm_mmu_print_sptes")]
    pub fn dump<'a>(
        &'a self,
        actor: &'a mut Actor<H>,
        space: Option<u16>,
        range: GfnRange,
    ) -> Dump<'a, F, H> {
        self.assert_own(actor);
        Dump { mmu: self, actor, sweep: Sweep::new(range, space), open: None }
    }
}

impl<F: SpteFormat, H: Host> Iterator for Dump<'_, F, H> {
    type Item = Run;

    /// Each turn of the loop moves the sweep on.
    fn next(&mut self) -> Option<Run> {
        let Self { mmu, actor, sweep, open } = self;
        loop {
            let mut complete = None;
            let end = sweep.slice(mmu, actor, |root, visit| {
                let Visit::Entry(step, part) = visit else { return ControlFlow::Continue(()) };
                let Some(run) = Run::of(mmu.config(), root, step, part) else {
                    return ControlFlow::Continue(());
                };
                if open.as_mut().is_some_and(|open| open.merge(&run)) {
                    return ControlFlow::Continue(());
                }
                complete = open.replace(run);
                if complete.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            if complete.is_some() {
                return complete;
            }
            match end {
                SliceEnd::More => {}
                SliceEnd::Root if open.is_none() => {}
                SliceEnd::Root | SliceEnd::All => return open.take(),
            }
        }
    }
}

impl<F: SpteFormat, H: Host> fmt::Debug for Dump<'_, F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dump")
            .field("sweep", &self.sweep)
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}
