//! Roles: what makes two shadows of one guest table interchangeable.
//!
//! Owns [`PageRole`], one word beside the gfn in the key of a shadow page (KVM row 4.19).
//! Everything that changes what a shadow's entries mean is in it, so a control register that is
//! toggled leads to other pages and back to the old ones. Pages with different words are never
//! shared. Values only.

use core::fmt;

use bitflags::bitflags;

use mmu_core::access::Access;
use mmu_core::addr::Level;

bitflags! {
    /// Facts that are on or off for all entries of a shadow page.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct RoleFlags: u32 {
        /// The guest's entries have four bytes.
        const FOUR_BYTES = 1 << 0;
        /// Shadows no table: its entries map what lies in a row from the page's gfn on, under a
        /// huge page of the guest or where the guest has no paging (KVM row 4.25).
        const DIRECT = 1 << 1;
        /// Not to be found any more; goes when its last vCPU leaves.
        const INVALID = 1 << 2;
        /// The guest's EFER.NXE is set.
        const NX = 1 << 3;
        /// The guest's CR0.WP is set.
        const WP = 1 << 4;
        /// The guest has SMEP on and CR0.WP off (KVM row 4.13).
        const SMEP_AND_NOT_WP = 1 << 5;
        /// The guest has SMAP on and CR0.WP off.
        const SMAP_AND_NOT_WP = 1 << 6;
        /// The guest's entries have no accessed and dirty bits: its hypervisor left them off.
        const AD_DISABLED = 1 << 7;
        /// Shadows a table of a guest hypervisor, for its guest.
        const GUEST_MODE = 1 << 8;
        /// A top table of a host with more levels than the guest hypervisor's (KVM row 4.29).
        const PASSTHROUGH = 1 << 9;
        /// Mode-based execute, or guest-mode execute trap, in the guest hypervisor's tables.
        const MODE_BASED = 1 << 10;
        /// The guest's tables are PAE's, which reserves bits that long mode ignores (KVM bug B62).
        const PAE = 1 << 11;
        /// The guest has tables of four-byte entries and CR4.PSE set: bit 7 makes a page.
        const PSE = 1 << 12;
    }
}

/// Role of a shadow page, packed in one word.
#[doc(alias = "kvm_mmu_page_role")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRole(u32);

const LEVEL: u32 = 0b111;
const ACCESS_SHIFT: u32 = 3;
const QUADRANT_SHIFT: u32 = 7;
const SPACE_SHIFT: u32 = 9;
const FLAGS_SHIFT: u32 = 10;

static_assertions::const_assert!(Access::ALL.bits() <= 0b1111);
static_assertions::const_assert!(RoleFlags::all().bits() < 1 << (32 - FLAGS_SHIFT));

#[expect(clippy::as_conversions, reason = "widened, or masked to fit; `From` is not const")]
impl PageRole {
    /// A role at `level`, the level of the page's entries, in address space 0, that restricts
    /// nothing.
    #[must_use]
    pub const fn new(level: Level, flags: RoleFlags) -> Self {
        let access = Access::ALL.bits() as u32;
        Self(level.number() as u32 | access << ACCESS_SHIFT | flags.bits() << FLAGS_SHIFT)
    }

    /// Level of the page's entries.
    #[must_use]
    pub const fn level(self) -> Level {
        match self.0 & LEVEL {
            1 => Level::L1,
            2 => Level::L2,
            3 => Level::L3,
            5 => Level::L5,
            _ => Level::L4,
        }
    }

    /// What the guest's entries on the way to the page permit together; for a direct page, the
    /// guest's leaf included.
    #[must_use]
    pub const fn access(self) -> Access {
        Access::from_bits_truncate((self.0 >> ACCESS_SHIFT & 0b1111) as u8)
    }

    /// Which part of a guest table of 1024 entries, in roles of such: a half at level 1, a quarter
    /// at level 2.
    #[must_use]
    pub const fn quadrant(self) -> u32 {
        self.0 >> QUADRANT_SHIFT & 0b11
    }

    /// Address space whose slots it maps: 0 normal, 1 SMM.
    #[must_use]
    pub const fn space(self) -> u16 {
        (self.0 >> SPACE_SHIFT & 1) as u16
    }

    /// What is on.
    #[must_use]
    pub const fn flags(self) -> RoleFlags {
        RoleFlags::from_bits_truncate(self.0 >> FLAGS_SHIFT)
    }

    /// Is the flag on?
    #[must_use]
    pub const fn has(self, flag: RoleFlags) -> bool {
        self.flags().contains(flag)
    }

    /// Is any of the flags on?
    #[must_use]
    pub const fn intersects(self, flags: RoleFlags) -> bool {
        self.flags().intersects(flags)
    }

    const fn with(self, shift: u32, mask: u32, value: u32) -> Self {
        Self(self.0 & !(mask << shift) | (value & mask) << shift)
    }

    /// The same at another level.
    #[must_use]
    pub const fn at(self, level: Level) -> Self {
        self.with(0, LEVEL, level.number() as u32)
    }

    /// The same with other permissions.
    #[must_use]
    pub const fn with_access(self, access: Access) -> Self {
        self.with(ACCESS_SHIFT, 0b1111, access.bits() as u32)
    }

    /// The same for another part of the guest table.
    #[must_use]
    pub const fn with_quadrant(self, quadrant: u32) -> Self {
        self.with(QUADRANT_SHIFT, 0b11, quadrant)
    }

    /// The same in another address space, 0 or 1.
    #[must_use]
    pub const fn in_space(self, space: u16) -> Self {
        self.with(SPACE_SHIFT, 1, space as u32)
    }

    /// The same with other flags.
    #[must_use]
    pub const fn with_flags(self, flags: RoleFlags) -> Self {
        self.with(FLAGS_SHIFT, u32::MAX >> FLAGS_SHIFT, flags.bits())
    }

    /// The role of a page that entry `index` of this one links (KVM row 4.23): one level lower,
    /// with the permissions of the walk so far. `direct` says that the guest has no table there.
    /// Neither invalidity nor passing through is inherited (KVM bug B06).
    #[doc(alias = "kvm_mmu_child_role")]
    #[must_use]
    pub const fn child(self, index: usize, access: Access, shape: ChildShape) -> Self {
        let inherited = self.flags().difference(RoleFlags::INVALID.union(RoleFlags::PASSTHROUGH));
        let flags = match shape {
            ChildShape::Shadow => inherited.difference(RoleFlags::DIRECT),
            ChildShape::Direct => inherited.union(RoleFlags::DIRECT),
        };
        let child = self.at(self.level().below()).with_access(access).with_flags(flags);
        if !flags.contains(RoleFlags::FOUR_BYTES) || flags.contains(RoleFlags::DIRECT) {
            return child.with_quadrant(0);
        }
        // One level-2 entry of the guest maps 4 MiB, two of ours: the lowest bit of the index says
        // which half of the guest's table the child shadows. The guest's top table maps 4 GiB, four
        // tables of ours (KVM row 4.23).
        let part = match child.level() {
            Level::L1 => index as u32 & 1,
            Level::L2 => index as u32 & 3,
            _ => 0,
        };
        child.with_quadrant(part)
    }

    /// The packed word.
    #[must_use]
    pub const fn word(self) -> u32 {
        self.0
    }
}

/// Does a child shadow a table of the guest?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildShape {
    /// Yes.
    Shadow,
    /// No: it maps memory in a row.
    Direct,
}

impl fmt::Debug for PageRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageRole")
            .field("level", &self.level())
            .field("access", &self.access())
            .field("quadrant", &self.quadrant())
            .field("space", &self.space())
            .field("flags", &self.flags())
            .finish()
    }
}

/// How many shadow pages of one gfn can exist in an address space: 5 levels, 2 of PAE, or with
/// four-byte entries 2 halves and 4 quarters with and without PSE; 16 access sets; NX, WP and what
/// depends on it (3 of 8 combinations more than one), A/D, nesting and mode-based execute. The
/// counts of write tracking hold as many (KVM row 4.19).
const PAGES_OF_A_GFN: u32 = (5 + 2 + (2 + 4) * 2) * 16 * 2 * 5 * 2 * 2 * 2;

static_assertions::const_assert!(PAGES_OF_A_GFN >> u16::BITS == 0);

#[cfg(test)]
#[expect(clippy::as_conversions, reason = "small numbers of a test")]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_kept_apart() {
        let base = PageRole::new(Level::L4, RoleFlags::empty());
        for level in Level::ALL {
            for access in 0..16 {
                let access = Access::from_bits_truncate(access);
                for quadrant in 0..4 {
                    for space in 0..2 {
                        for flag in RoleFlags::all().iter() {
                            let role = base.at(level).with_access(access).in_space(space);
                            let role = role.with_quadrant(quadrant).with_flags(flag);
                            let seen = (role.level(), role.access(), role.quadrant());
                            assert_eq!(seen, (level, access, quadrant));
                            assert_eq!((role.space(), role.flags()), (space, flag));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn each_control_bit_makes_another_role() {
        let base = PageRole::new(Level::L4, RoleFlags::empty());
        let mut words: std::vec::Vec<u32> =
            RoleFlags::all().iter().map(|flag| base.with_flags(flag).word()).collect();
        words.push(base.word());
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), RoleFlags::all().iter().count() + 1);
    }

    #[test]
    fn a_child_inherits_the_mode_and_nothing_that_was_the_parents_alone() {
        let flags = RoleFlags::NX | RoleFlags::WP | RoleFlags::INVALID | RoleFlags::PASSTHROUGH;
        let parent = PageRole::new(Level::L4, flags).in_space(1);
        let child = parent.child(7, Access::READ_ONLY, ChildShape::Shadow);
        assert_eq!((child.level(), child.space()), (Level::L3, 1));
        assert_eq!(child.access(), Access::READ_ONLY);
        assert_eq!(child.flags(), RoleFlags::NX | RoleFlags::WP);
        let direct = child.child(0, Access::READ, ChildShape::Direct);
        assert!(direct.has(RoleFlags::DIRECT));
    }

    #[test]
    fn halves_of_a_table_of_four_byte_entries_are_told_apart() {
        let parent = PageRole::new(Level::L2, RoleFlags::FOUR_BYTES).with_quadrant(3);
        for index in 0..4 {
            let child = parent.child(index, Access::ALL, ChildShape::Shadow);
            assert_eq!(child.quadrant(), index as u32 % 2);
        }
        assert_eq!(parent.child(1, Access::ALL, ChildShape::Direct).quadrant(), 0);
        let top = PageRole::new(Level::L3, RoleFlags::FOUR_BYTES | RoleFlags::PASSTHROUGH);
        for index in 0..4 {
            let child = top.child(index, Access::ALL, ChildShape::Shadow);
            assert_eq!(child.quadrant(), index as u32, "a quarter of the guest's top table");
        }
        let above = PageRole::new(Level::L4, RoleFlags::FOUR_BYTES | RoleFlags::PASSTHROUGH);
        assert_eq!(above.child(1, Access::ALL, ChildShape::Shadow).quadrant(), 0);
    }
}
