//! Does everything that the writer keeps agree with the tables? For tests and debuggers.
//!
//! Adds [`ShadowWriter::check`]: walks all pages and compares. A page's parents are exactly the
//! entries that link it; a reverse map has exactly the leaves of its block; an entry is marked
//! exactly if something below it is out of sync; the counts are those of a recount (invariants I15
//! to I17, I24). Work in proportion to the tables, squared for the lists.

use core::fmt;

use mmu_core::addr::{Gfn, Level};
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::sync::ENTRIES;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::page::ShadowPage;
use crate::rmap::RmapKey;
use crate::role::RoleFlags;
use crate::spte_ref::{PageId, SpteRef};
use crate::writer::{ShadowWriter, Work};

/// What a check counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowCount {
    /// Shadow pages.
    pub pages: u64,
    /// Pages out of sync.
    pub unsync: u64,
    /// Leaves at level 1, 2 and 3.
    pub leaves: [u64; 3],
    /// Links.
    pub links: u64,
}

/// A contradiction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShadowFlaw {
    /// An entry is neither empty, nor a link, nor a leaf that may stand there.
    Entry {
        /// Where.
        at: SpteRef,
        /// What.
        spte: u64,
    },
    /// A leaf is not on its reverse map.
    NotOnList {
        /// The leaf.
        at: SpteRef,
        /// The list.
        key: RmapKey,
    },
    /// The lists of a level have entries that are no leaves.
    Listed {
        /// The level.
        level: Level,
        /// Entries on lists.
        listed: u64,
        /// Leaves.
        leaves: u64,
    },
    /// A link and the parents of what it links do not agree.
    Parents {
        /// The page linked.
        page: PageId,
        /// Its parents.
        parents: u32,
        /// Entries that link it.
        links: u32,
    },
    /// The mark of an entry does not say what is below it.
    Mark {
        /// The entry.
        at: SpteRef,
        /// Is something below it out of sync?
        below: bool,
    },
    /// Two pages have the same gfn, role and generation.
    Twice {
        /// One of them.
        page: PageId,
        /// Their gfn.
        gfn: Gfn,
    },
    /// The guest can write unseen to a table whose shadow is in sync.
    Writable {
        /// The entry that lets it.
        at: SpteRef,
        /// The table's frame.
        gfn: Gfn,
    },
}

impl fmt::Display for ShadowFlaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entry { at, spte } => write!(f, "{at:?} holds {spte:#018x}"),
            Self::NotOnList { at, key } => write!(f, "{at:?} is not in the reverse map of {key}"),
            Self::Listed { level, listed, leaves } => {
                write!(f, "{listed} entries in reverse maps of {level}, {leaves} leaves")
            }
            Self::Parents { page, parents, links } => {
                write!(f, "{page} has {parents} parents and {links} links")
            }
            Self::Mark { at, below } => write!(f, "{at:?}: out of sync below: {below}"),
            Self::Twice { page, gfn } => write!(f, "{page} is not the only one for gfn {gfn}"),
            Self::Writable { at, gfn } => {
                write!(f, "{at:?} lets the guest write to its table in gfn {gfn}")
            }
        }
    }
}

impl core::error::Error for ShadowFlaw {}

impl<F: SpteFormat, H: Host> ShadowWriter<F, H> {
    /// Compare everything; see the file's head.
    ///
    /// # Errors
    /// [`ShadowFlaw`]: the first contradiction.
    pub fn check(&mut self, actor: &mut Actor<H>) -> Result<ShadowCount, ShadowFlaw> {
        self.work(actor, |work| work.check())
    }
}

impl<F: SpteFormat, H: Host> Work<'_, F, H> {
    fn check(&self) -> Result<ShadowCount, ShadowFlaw> {
        let mut count = ShadowCount::default();
        let mut at = self.writer.pages.oldest();
        while let Some(id) = at {
            self.check_page(id, &mut count)?;
            at = self.writer.pages.newer_than(id);
        }
        for level in [Level::L1, Level::L2, Level::L3] {
            let leaves = count.leaves.get(level.slot()).copied().unwrap_or(0);
            // As counted all along, and list by list.
            for listed in [self.writer.rmap.mapped(level), self.writer.rmap.recount(level)] {
                if listed != leaves {
                    return Err(ShadowFlaw::Listed { level, listed, leaves });
                }
            }
        }
        Ok(count)
    }

    fn check_page(&self, id: PageId, count: &mut ShadowCount) -> Result<(), ShadowFlaw> {
        let Some(page) = self.writer.pages.get(id) else { return Ok(()) };
        count.pages += 1;
        count.unsync += u64::from(page.unsync);
        self.check_parents(id, page)?;
        // INVARIANT[I16]: the key is unique among pages that can be found.
        let same =
            |other: &ShadowPage| other.role == page.role && other.generation == page.generation;
        let twins = self.writer.pages.of_gfn(page.gfn).filter(|(_, other)| same(other)).count();
        let found = !page.role.intersects(RoleFlags::INVALID | RoleFlags::PASSTHROUGH);
        if twins > 1 && found {
            return Err(ShadowFlaw::Twice { page: id, gfn: page.gfn });
        }
        for index in 0..ENTRIES {
            self.check_entry(page, SpteRef::new(id, index), count)?;
        }
        Ok(())
    }

    fn check_parents(&self, id: PageId, page: &ShadowPage) -> Result<(), ShadowFlaw> {
        // INVARIANT[I15]: as lists go.
        let pool = self.writer.rmap.desc_pool();
        let links = page.parents.iter(pool).filter(|place| self.child_at(*place) == Some(id));
        let links = u32::try_from(links.count()).unwrap_or(u32::MAX);
        let parents = page.parents.len();
        if parents != links {
            return Err(ShadowFlaw::Parents { page: id, parents, links });
        }
        Ok(())
    }

    fn check_entry(
        &self,
        page: &ShadowPage,
        at: SpteRef,
        count: &mut ShadowCount,
    ) -> Result<(), ShadowFlaw> {
        let level = page.level();
        let spte = self.cell(at).map_or(Spte::EMPTY, SpteCell::load);
        let marked = page.unsync_children.next(at.index()) == Some(at.index());
        let wrong = ShadowFlaw::Entry { at, spte: spte.raw() };
        if spte.is_table(level) {
            count.links += 1;
            let child = self.child_at(at).ok_or(wrong)?;
            let linked = self.writer.pages.get(child).ok_or(wrong)?;
            if !linked.parents.iter(self.writer.rmap.desc_pool()).any(|place| place == at) {
                let (parents, links) = (linked.parents.len(), linked.parents.len() + 1);
                return Err(ShadowFlaw::Parents { page: child, parents, links });
            }
            // INVARIANT[I17]: what is out of sync can be found from every root above it.
            let below = linked.needs_sync();
            return if below == marked { Ok(()) } else { Err(ShadowFlaw::Mark { at, below }) };
        }
        if marked {
            return Err(ShadowFlaw::Mark { at, below: false });
        }
        if spte.is_leaf(level) {
            if let Some(leaves) = count.leaves.get_mut(level.slot()) {
                *leaves += 1;
            }
            return self.check_leaf(at);
        }
        if spte.is_empty() { Ok(()) } else { Err(wrong) }
    }

    fn check_leaf(&self, at: SpteRef) -> Result<(), ShadowFlaw> {
        let Some(key) = self.key_of(at) else { return Ok(()) };
        // INVARIANT[I15]: together with the counts, list and leaves are the same set.
        if !self.writer.rmap.entries(key).any(|entry| entry == at) {
            return Err(ShadowFlaw::NotOnList { at, key });
        }
        let spte = self.cell(at).map_or(Spte::EMPTY, SpteCell::load);
        let config = self.config();
        let reserved = config.reserved_bits(spte, key.level) & spte.raw();
        if reserved != 0 {
            return Err(ShadowFlaw::Entry { at, spte: spte.raw() });
        }
        if !config.is_writable(spte) {
            return Ok(());
        }
        // INVARIANT[I17]: a table whose shadow is in sync is write-protected.
        let first = key.gfn.align_down(key.level);
        let in_sync = |page: &ShadowPage| {
            page.shadows_a_table() && !page.unsync && !page.role.has(RoleFlags::INVALID)
        };
        for page in 0..key.level.pages() {
            let gfn = first.saturating_add(page);
            if self.writer.pages.of_gfn(gfn).any(|(_, page)| in_sync(page)) {
                return Err(ShadowFlaw::Writable { at, gfn });
            }
        }
        Ok(())
    }
}
