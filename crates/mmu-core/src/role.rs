//! Roles: what makes two page-table trees interchangeable.
//!
//! Owns [`RootRole`], one word that two roots share exactly when a vCPU may use either (KVM row
//! 3.1). Shadow pages get richer roles in `shadow-mmu`; this one describes direct (TDP) roots.

use core::fmt;

use crate::addr::Level;

/// Role of a TDP root, packed in one word: equal words, same tree.
#[doc(alias = "kvm_mmu_page_role")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RootRole(u32);

impl RootRole {
    const LEVEL_MASK: u32 = 0b111;
    const AD_DISABLED: u32 = 1 << 3;
    const GUEST_MODE: u32 = 1 << 4;
    const SPACE_SHIFT: u32 = 8;

    /// A root at `level` for address space `space` (0 normal, 1 SMM).
    #[must_use]
    pub fn new(level: Level, space: u8) -> Self {
        Self(u32::from(level.number()) | u32::from(space) << Self::SPACE_SHIFT)
    }

    /// The same, without the processor's accessed and dirty bits.
    #[must_use]
    pub const fn with_ad_disabled(self) -> Self {
        Self(self.0 | Self::AD_DISABLED)
    }

    /// The same, for a nested guest.
    #[must_use]
    pub const fn with_guest_mode(self) -> Self {
        Self(self.0 | Self::GUEST_MODE)
    }

    /// Level of the root table.
    #[inline]
    #[must_use]
    pub const fn level(self) -> Level {
        match self.0 & Self::LEVEL_MASK {
            1 => Level::L1,
            2 => Level::L2,
            3 => Level::L3,
            5 => Level::L5,
            _ => Level::L4,
        }
    }

    /// Are accessed and dirty bits off?
    #[must_use]
    pub const fn is_ad_disabled(self) -> bool {
        self.0 & Self::AD_DISABLED != 0
    }

    /// Is it for a nested guest?
    #[must_use]
    pub const fn is_guest_mode(self) -> bool {
        self.0 & Self::GUEST_MODE != 0
    }

    /// Number of the address space whose slots it maps.
    #[must_use]
    pub fn space(self) -> u16 {
        u16::from(self.0.to_le_bytes()[1])
    }

    /// The packed word.
    #[must_use]
    pub const fn word(self) -> u32 {
        self.0
    }

    /// From a packed word that `word` gave.
    #[must_use]
    pub const fn from_word(word: u32) -> Self {
        Self(word)
    }
}

impl fmt::Debug for RootRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootRole")
            .field("level", &self.level())
            .field("space", &self.space())
            .field("ad_disabled", &self.is_ad_disabled())
            .field("guest_mode", &self.is_guest_mode())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_round_trip_through_their_word() {
        for level in [Level::L3, Level::L4, Level::L5] {
            for space in [0, 1] {
                let plain = RootRole::new(level, space);
                for role in [plain, plain.with_ad_disabled(), plain.with_guest_mode()] {
                    let again = RootRole::from_word(role.word());
                    assert_eq!(again, role);
                    assert_eq!((again.level(), again.space()), (level, u16::from(space)));
                }
                assert_ne!(plain, plain.with_ad_disabled());
            }
        }
    }
}
