//! Memory attributes: what the VMM says of guest pages besides where they are.
//!
//! [`Attributes`] are the flags of one page; [`AttributeMap`] (`map`) has them for every gfn, as a
//! pure value; [`AttributeTable`] and [`AttributeWriter`] (`table`) publish it (KVM rows 3.55,
//! 3.17, 8.16, 8.7). Attributes belong to gfns, not to slots: they hold in every address space,
//! outlive slots, and may be given to pages that no slot has.
//!
//! Two rules for whoever maps pages:
//!
//! * **Intersection.** A mapping permits what the slot permits and no attribute takes away
//!   ([`Attributes::restrict`]).
//! * **One page, one answer.** A huge page is mapped only where all of its pages have the same
//!   attributes ([`max_level`]).
//!
//! The protocol that keeps both true while attributes change stands in [`table`]. No locks here.

mod map;
pub mod table;

use bitflags::bitflags;
use core::fmt;

pub use map::{AttributeMap, Run};
pub use table::{AttributeChange, AttributeTable, AttributeWriter};

use crate::access::Access;
use crate::addr::{Gfn, GfnRange, Level};

bitflags! {
    /// What the VMM says of a guest page. Nothing is the normal state: shared memory that permits
    /// what its slot permits.
    ///
    /// Restrictions take away, so that combining two sources of them (the VMM, an introspector) is
    /// a union of flags and never gives a permission back.
    #[doc(alias = "kvm_memory_attributes")]
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Attributes: u64 {
        /// The guest may not read, nor write: no CPU grants writes without reads.
        const NO_READ = 1 << 0;
        /// The guest may not write.
        const NO_WRITE = 1 << 1;
        /// The guest may not fetch instructions, in any mode.
        const NO_EXEC = 1 << 2;
        /// The page is private to the guest; the value equals the KVM interface's.
        #[doc(alias = "KVM_MEMORY_ATTRIBUTE_PRIVATE")]
        const PRIVATE = 1 << 3;
    }
}

impl Attributes {
    /// The flags that take permissions away.
    pub const RESTRICTIONS: Self = Self::NO_READ.union(Self::NO_WRITE).union(Self::NO_EXEC);

    /// Is the page private to the guest?
    #[inline]
    #[must_use]
    pub const fn is_private(self) -> bool {
        self.contains(Self::PRIVATE)
    }

    /// What is left of `access` (KVM row 8.16): never more than was there.
    #[inline]
    #[must_use]
    pub const fn restrict(self, access: Access) -> Access {
        let mut left = access;
        if self.contains(Self::NO_READ) {
            left = left.difference(Access::READ.union(Access::WRITE));
        }
        if self.contains(Self::NO_WRITE) {
            left = left.difference(Access::WRITE);
        }
        if self.contains(Self::NO_EXEC) {
            left = left.difference(Access::EXEC);
        }
        left
    }
}

/// The largest level, at most `cap`, at which one entry around `gfn` covers only pages whose
/// attributes are the same (KVM row 3.55's "mixed" flag, asked instead of stored).
#[must_use]
pub fn max_level(map: &AttributeMap, gfn: Gfn, cap: Level) -> Level {
    let mut level = cap;
    while !map.is_uniform(GfnRange::entry(gfn, level)) {
        match level.down() {
            Some(down) => level = down,
            None => break,
        }
    }
    level
}

/// Why attributes were not changed. They are as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttributeError {
    /// The range is empty, or reaches beyond the gfns that an address can name.
    BadRange {
        /// The range given.
        range: GfnRange,
    },
    /// Flags that do not exist.
    UnknownFlags {
        /// All flags given.
        bits: u64,
    },
    /// The pages would have to be told apart in more places than the map was made for.
    TooManyEdges {
        /// Places needed.
        needed: usize,
        /// Places there may be.
        limit: usize,
    },
    /// No memory.
    NoMemory {
        /// Places for which there is none.
        needed: usize,
    },
}

impl fmt::Display for AttributeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadRange { range } => write!(f, "no attributes can be given to {range}"),
            Self::UnknownFlags { bits } => write!(f, "unknown attributes in {bits:#x}"),
            Self::TooManyEdges { needed, limit } => {
                write!(f, "attributes would change at {needed} gfns, at most {limit}")
            }
            Self::NoMemory { needed } => write!(f, "no memory for {needed} changes of attributes"),
        }
    }
}

impl core::error::Error for AttributeError {}

#[cfg(all(test, not(loom)))]
mod tests;
