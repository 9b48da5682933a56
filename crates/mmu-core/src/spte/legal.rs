//! May this entry become that one, and what does the change owe?
//!
//! Owns [`SpteConfig::change_kind`]: a total, pure function over any two values, used by the one
//! funnel that writes entries, by the checkers and by the fuzz oracles. It knows nothing of locks:
//! that [`ChangeKind::Freeze`] and [`ChangeKind::Thaw`] are for removers only, the funnel enforces.

use core::fmt;

use bitflags::bitflags;

use super::bits::{FRAME, below_page, range, union, when};
use super::format::{AD_TYPE, AdType, PAGE_SIZE, SpteFormat};
use super::{Spte, SpteConfig, SpteKind};
use crate::addr::{Level, Pfn};

bitflags! {
    /// What differs between two leaves of the same frame.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct LeafChange: u16 {
        /// A was cleared.
        const AGED = 1 << 0;
        /// A was set.
        const ACCESSED = 1 << 1;
        /// Permissions were taken away to see the next access; always with `AGED` if A was set.
        const TRACKED = 1 << 2;
        /// Permissions came back after tracking.
        const RESTORED = 1 << 3;
        /// D was cleared.
        const CLEANED = 1 << 4;
        /// D was set.
        const DIRTIED = 1 << 5;
        /// W was cleared.
        const WRITE_LOST = 1 << 6;
        /// W was set.
        const WRITE_GAINED = 1 << 7;
        /// MMU-writable was cleared: the gfn is now write-protected.
        const PROTECTED = 1 << 8;
        /// MMU-writable was set.
        const UNPROTECTED = 1 << 9;
        /// Reads, fetches or user accesses are no longer permitted (tracking aside).
        const ACCESS_LOST = 1 << 10;
        /// Reads, fetches or user accesses are newly permitted (tracking aside).
        const ACCESS_GAINED = 1 << 11;
        /// The memory type differs.
        const MEMORY_TYPE = 1 << 12;
    }
}

/// A legal change of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChangeKind {
    /// The two values are equal.
    Same,
    /// A table was linked into a hole.
    Link,
    /// A leaf was put into a hole.
    Map,
    /// An MMIO entry was put into a hole, or renewed.
    MapMmio,
    /// An MMIO entry was dropped.
    UnmapMmio,
    /// A huge leaf became a table (which has to map the same pages).
    Split,
    /// A table became a huge leaf.
    Collapse,
    /// A table was taken out.
    Unlink,
    /// A leaf was taken out.
    Unmap,
    /// A remover took possession; the class that stood there.
    Freeze(SpteKind),
    /// The remover is done.
    Thaw,
    /// A of a link was cleared (`true`) or set.
    TableAged(bool),
    /// A leaf changed, its frame did not.
    Update(LeafChange),
}

impl ChangeKind {
    /// Must the TLBs be flushed before the lock is released, in a valid root? The master table of
    /// KVM rows 0.2.1 to 0.2.11, for a split into a fully populated table (0.2.8).
    #[inline]
    #[must_use]
    pub const fn needs_flush(self) -> bool {
        match self {
            Self::Same
            | Self::Link
            | Self::Map
            | Self::MapMmio
            | Self::UnmapMmio
            | Self::Split
            | Self::Thaw
            | Self::TableAged(_) => false,
            Self::Collapse | Self::Unlink | Self::Unmap => true,
            Self::Freeze(old) => old.is_present(),
            Self::Update(change) => change.intersects(
                LeafChange::PROTECTED.union(LeafChange::ACCESS_LOST).union(LeafChange::MEMORY_TYPE),
            ),
        }
    }

    /// May a writable TLB entry survive that the entry no longer justifies, so that a dirty-log
    /// pass owes one flush before it hands out its bits (KVM rows 0.2.2 and 0.2.3)?
    #[inline]
    #[must_use]
    pub const fn owes_log_flush(self) -> bool {
        match self {
            Self::Update(change) => {
                change.intersects(LeafChange::CLEANED.union(LeafChange::WRITE_LOST))
            }
            _ => false,
        }
    }

    /// Is a table page no longer linked, so that it has to be retired (KVM row 3.8)?
    #[inline]
    #[must_use]
    pub const fn removes_table(self) -> bool {
        matches!(self, Self::Collapse | Self::Unlink | Self::Freeze(SpteKind::Table))
    }

    /// Is a table page newly linked?
    #[inline]
    #[must_use]
    pub const fn adds_table(self) -> bool {
        matches!(self, Self::Link | Self::Split)
    }

    /// Does the level have one leaf less?
    #[inline]
    #[must_use]
    pub const fn removes_leaf(self) -> bool {
        matches!(self, Self::Split | Self::Unmap | Self::Freeze(SpteKind::Leaf))
    }

    /// Does the level have one leaf more?
    #[inline]
    #[must_use]
    pub const fn adds_leaf(self) -> bool {
        matches!(self, Self::Map | Self::Collapse)
    }

    /// Is it a change that only a remover may make: to FROZEN, or away from it (KVM row 1.4)?
    #[inline]
    #[must_use]
    pub const fn is_for_removers(self) -> bool {
        matches!(self, Self::Freeze(_) | Self::Thaw)
    }
}

/// Why an entry may not become another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IllegalChange {
    /// The tree has no such level.
    Level {
        /// Level of the entry.
        level: Level,
        /// Level of the root table.
        root: Level,
    },
    /// The old value is of no class, or is a link that we do not make.
    OldCorrupt {
        /// The old value.
        old: Spte,
    },
    /// The new value is of no class.
    NewCorrupt {
        /// The new value.
        new: Spte,
    },
    /// Hardware would reject the new entry.
    Reserved {
        /// The new value.
        new: Spte,
        /// The bits at fault.
        bits: u64,
    },
    /// An access through the new entry could be reported to the guest instead of exiting: its
    /// suppress-#VE bit is clear, and it is no MMIO entry that was configured so (KVM row 1.3).
    ViolationException {
        /// The new value.
        new: Spte,
    },
    /// The new entry has bits that its class does not use.
    Stray {
        /// The new value.
        new: Spte,
        /// The bits at fault.
        bits: u64,
    },
    /// The new entry lacks bits that its class always has.
    Missing {
        /// The new value.
        new: Spte,
        /// The bits at fault.
        bits: u64,
    },
    /// The new leaf has an A/D type that is not the tree's, or not the old leaf's.
    AdType {
        /// The new value.
        new: Spte,
        /// The type it must have; `None` if the old leaf's is no type.
        expected: Option<AdType>,
    },
    /// W without MMU-writable, or MMU-writable without host-writable.
    Writable {
        /// The new value.
        new: Spte,
    },
    /// A leaf that permits nothing and is not access-tracked, or has nothing to restore.
    NoAccess {
        /// The new value.
        new: Spte,
    },
    /// Leaves of different frames: a guest would see other memory without a flush in between.
    OtherPage {
        /// Frame of the old leaf.
        old: Pfn,
        /// Frame of the new leaf.
        new: Pfn,
    },
    /// A table replaced by another table.
    OtherTable {
        /// Frame of the old table.
        old: Pfn,
        /// Frame of the new table.
        new: Pfn,
    },
    /// Host-writable changed while the leaf stayed present.
    HostWritable {
        /// The old value.
        old: Spte,
        /// The new value.
        new: Spte,
    },
    /// A frozen entry replaced by something other than EMPTY.
    Frozen {
        /// The new value.
        new: Spte,
    },
}

impl fmt::Display for IllegalChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Level { level, root } => {
                write!(f, "level {level} is above the root level {root}")
            }
            Self::OldCorrupt { old } => write!(f, "old {old:?} is corrupt"),
            Self::NewCorrupt { new } => write!(f, "new {new:?} is corrupt"),
            Self::Reserved { new, bits } => write!(f, "{new:?} has reserved bits {bits:#x}"),
            Self::ViolationException { new } => write!(f, "{new:?} may raise #VE in the guest"),
            Self::Stray { new, bits } => write!(f, "{new:?} has stray bits {bits:#x}"),
            Self::Missing { new, bits } => write!(f, "{new:?} lacks bits {bits:#x}"),
            Self::AdType { new, expected: Some(expected) } => {
                write!(f, "{new:?} is not of A/D type {expected:?}")
            }
            Self::AdType { new, expected: None } => {
                write!(f, "{new:?} replaces a leaf without A/D type")
            }
            Self::Writable { new } => write!(f, "{new:?} is writable without leave"),
            Self::NoAccess { new } => write!(f, "{new:?} permits nothing"),
            Self::OtherPage { old, new } => write!(f, "leaf of {old} became leaf of {new}"),
            Self::OtherTable { old, new } => write!(f, "table {old} became table {new}"),
            Self::HostWritable { old, new } => {
                write!(f, "host-writable changed from {old:?} to {new:?}")
            }
            Self::Frozen { new } => write!(f, "frozen entry became {new:?}"),
        }
    }
}

impl core::error::Error for IllegalChange {}

impl<F: SpteFormat> SpteConfig<F> {
    /// Classify the change of an entry at `level` from `old` to `new`, both any 64 bits. Of `old`
    /// only the class matters (and the frame, if it is present); `new` is judged in full.
    ///
    /// # Errors
    /// - [`Level`](IllegalChange::Level): the tree has no such level.
    /// - [`OldCorrupt`](IllegalChange::OldCorrupt), [`NewCorrupt`](IllegalChange::NewCorrupt): a
    ///   value of no class.
    /// - [`ViolationException`](IllegalChange::ViolationException): `new` would go to the guest.
    /// - [`Reserved`](IllegalChange::Reserved), [`Stray`](IllegalChange::Stray),
    ///   [`Missing`](IllegalChange::Missing), [`AdType`](IllegalChange::AdType),
    ///   [`Writable`](IllegalChange::Writable), [`NoAccess`](IllegalChange::NoAccess): `new` is not
    ///   an entry that this configuration makes.
    /// - [`OtherPage`](IllegalChange::OtherPage), [`OtherTable`](IllegalChange::OtherTable),
    ///   [`HostWritable`](IllegalChange::HostWritable), [`Frozen`](IllegalChange::Frozen): each
    ///   value is fine, the step is not. An empty entry has to stand in between.
    pub fn change_kind(
        &self,
        old: Spte,
        new: Spte,
        level: Level,
    ) -> Result<ChangeKind, IllegalChange> {
        use SpteKind::{Corrupt, Empty, Frozen, Leaf, Mmio, Table};
        if level > self.root {
            return Err(IllegalChange::Level { level, root: self.root });
        }
        let was = self.kind(old, level);
        let is = self.kind(new, level);
        if self.may_raise_ve(new) && !(is == Mmio && self.mmio_raises_ve()) {
            return Err(IllegalChange::ViolationException { new });
        }
        match is {
            Empty | Frozen => {}
            Corrupt => return Err(IllegalChange::NewCorrupt { new }),
            Mmio => self.check_mmio(new)?,
            Table => self.check_table(new, level)?,
            Leaf => self.check_leaf(new, level)?,
        }
        if was == Corrupt {
            return Err(IllegalChange::OldCorrupt { old });
        }
        if old == new {
            return Ok(ChangeKind::Same);
        }
        match (was, is) {
            (Corrupt, _) => Err(IllegalChange::OldCorrupt { old }),
            (_, Corrupt) => Err(IllegalChange::NewCorrupt { new }),
            (Frozen, Empty) => Ok(ChangeKind::Thaw),
            (Frozen, Frozen | Mmio | Table | Leaf) => Err(IllegalChange::Frozen { new }),
            (Empty | Mmio | Table | Leaf, Frozen) => Ok(ChangeKind::Freeze(was)),
            (Empty, Empty) => Ok(ChangeKind::Same),
            (Empty | Mmio, Table) => Ok(ChangeKind::Link),
            (Empty | Mmio, Leaf) => Ok(ChangeKind::Map),
            (Empty | Mmio, Mmio) => Ok(ChangeKind::MapMmio),
            (Mmio, Empty) => Ok(ChangeKind::UnmapMmio),
            (Leaf, Table) => Ok(ChangeKind::Split),
            (Table, Leaf) => Ok(ChangeKind::Collapse),
            (Table, Empty | Mmio) => Ok(ChangeKind::Unlink),
            (Leaf, Empty | Mmio) => Ok(ChangeKind::Unmap),
            (Table, Table) => self.table_change(old, new),
            (Leaf, Leaf) => self.leaf_change(old, new),
        }
    }

    /// Is `new` an MMIO entry with nothing but its fields?
    fn check_mmio(&self, new: Spte) -> Result<(), IllegalChange> {
        let Some(pattern) = self.mmio else {
            return Err(IllegalChange::NewCorrupt { new });
        };
        let (allowed, must) = self.mmio_layout(pattern);
        only(new, allowed, must)
    }

    /// Is `new` a link as [`table`](Self::table) makes it, A aside?
    fn check_table(&self, new: Spte, level: Level) -> Result<(), IllegalChange> {
        self.check_reserved(new, level)?;
        let made = self.table_bits(level);
        // In a PAE PDPTE the place of A is reserved, which was checked.
        only(new, made | FRAME | F::ACCESSED, made & !F::ACCESSED)
    }

    /// Is `new` a leaf as [`leaf`](Self::leaf) makes it, or as a legal update leaves it?
    fn check_leaf(&self, new: Spte, level: Level) -> Result<(), IllegalChange> {
        let plain = self.untrack(new);
        self.check_reserved(plain, level)?;
        // INVARIANT[I6]: a tracked leaf has something to restore, and its fields leave no room
        // for W.
        if !self.is_hw_present(plain) {
            return Err(IllegalChange::NoAccess { new });
        }
        let fields = if self.is_access_tracked(new) {
            const { union(F::TRACKED_LEAF) }
        } else {
            const { union(F::LEAF) }
        };
        let page_size = when(level != Level::L1, PAGE_SIZE);
        let unused = below_page(level) | when(page_size == 0, PAGE_SIZE);
        only(new, fields & !unused, F::PRESENT | page_size)?;
        if AdType::of(new) != Some(self.ad_type()) {
            return Err(IllegalChange::AdType { new, expected: Some(self.ad_type()) });
        }
        if !self.writable_invariants_hold(new) {
            return Err(IllegalChange::Writable { new });
        }
        Ok(())
    }

    fn check_reserved(&self, new: Spte, level: Level) -> Result<(), IllegalChange> {
        match self.reserved_bits(new, level) {
            0 => Ok(()),
            bits => Err(IllegalChange::Reserved { new, bits }),
        }
    }

    /// Two links: only A may differ. As `new` is one that we make, any other difference off the
    /// frame is a fault of `old`.
    fn table_change(&self, old: Spte, new: Spte) -> Result<ChangeKind, IllegalChange> {
        let changed = Spte::from_raw(old.raw() ^ new.raw());
        if changed.has(FRAME) {
            return Err(IllegalChange::OtherTable { old: self.pfn(old), new: self.pfn(new) });
        }
        if changed.has(!F::ACCESSED) {
            return Err(IllegalChange::OldCorrupt { old });
        }
        Ok(ChangeKind::TableAged(old.has(F::ACCESSED)))
    }

    /// Two leaves: same frame, same A/D type, same host-writable; the rest is an update.
    fn leaf_change(&self, old: Spte, new: Spte) -> Result<ChangeKind, IllegalChange> {
        let changed = Spte::from_raw(old.raw() ^ new.raw());
        if changed.has(FRAME) {
            // INVARIANT[I3]: an empty entry has to stand in between.
            return Err(IllegalChange::OtherPage { old: self.pfn(old), new: self.pfn(new) });
        }
        if changed.has(AD_TYPE) {
            return Err(IllegalChange::AdType { new, expected: AdType::of(old) });
        }
        if changed.has(F::HOST_WRITABLE) {
            return Err(IllegalChange::HostWritable { old, new });
        }
        Ok(ChangeKind::Update(self.differences(old, new)))
    }

    /// What differs between two leaves.
    fn differences(&self, old: Spte, new: Spte) -> LeafChange {
        let lost = |mask: u64| old.raw() & !new.raw() & mask != 0;
        let gained = |mask: u64| new.raw() & !old.raw() & mask != 0;
        let (before, after) = (self.granted(old), self.granted(new));
        let (was_tracked, is_tracked) = (self.is_access_tracked(old), self.is_access_tracked(new));
        [
            (LeafChange::AGED, lost(F::ACCESSED)),
            (LeafChange::ACCESSED, gained(F::ACCESSED)),
            (LeafChange::TRACKED, !was_tracked && is_tracked),
            (LeafChange::RESTORED, was_tracked && !is_tracked),
            (LeafChange::CLEANED, lost(F::DIRTY)),
            (LeafChange::DIRTIED, gained(F::DIRTY)),
            (LeafChange::WRITE_LOST, lost(F::WRITABLE)),
            (LeafChange::WRITE_GAINED, gained(F::WRITABLE)),
            (LeafChange::PROTECTED, lost(F::MMU_WRITABLE)),
            (LeafChange::UNPROTECTED, gained(F::MMU_WRITABLE)),
            (LeafChange::ACCESS_LOST, before & !after != 0),
            (LeafChange::ACCESS_GAINED, after & !before != 0),
            (LeafChange::MEMORY_TYPE, lost(F::MEMORY_TYPE) || gained(F::MEMORY_TYPE)),
        ]
        .into_iter()
        .filter(|&(_, differs)| differs)
        .fold(LeafChange::empty(), |all, (flag, _)| all | flag)
    }

    /// Reads, fetches and user accesses that a leaf permits, tracking undone; a set bit permits.
    fn granted(&self, leaf: Spte) -> u64 {
        let plain = self.untrack(leaf).raw();
        (plain & (F::READ | F::EXEC | F::USER_EXEC | F::USER)) | (!plain & F::NX)
    }
}

/// `new` has all of `must` and nothing outside `allowed`.
const fn only(new: Spte, allowed: u64, must: u64) -> Result<(), IllegalChange> {
    let missing = must & !new.raw();
    let stray = new.raw() & !allowed;
    if missing != 0 {
        Err(IllegalChange::Missing { new, bits: missing })
    } else if stray != 0 {
        Err(IllegalChange::Stray { new, bits: stray })
    } else {
        Ok(())
    }
}

/// Saved permissions and an A/D type never meet the frame address.
const _: () = assert!(AD_TYPE & FRAME == 0 && range(62, 52) & FRAME == 0);
