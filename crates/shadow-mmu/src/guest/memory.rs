//! What a walk needs from guest memory: one entry read, one entry compared and exchanged.
//!
//! Owns [`GuestMem`], the embedder's side of a walk (KVM rows 4.3 and 4.11); [`super::slots`] has
//! an implementation over memslots. Locks: none are held during a walk and none are needed.

use core::fmt;

use mmu_core::addr::Gpa;

/// Bytes of a table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryWidth {
    /// 32-bit paging.
    Four,
    /// Every other format.
    Eight,
}

impl EntryWidth {
    /// 4 or 8.
    #[inline]
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }
}

/// How a compare-exchange of an entry ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// The new value is in place.
    Done,
    /// The entry had another value: somebody was faster, the walk starts over.
    Lost,
    /// The memory is read-only for the guest: the entry stays as it is, and the walk goes on
    /// without its accessed and dirty bits, as with a table in ROM.
    ReadOnly,
}

/// There is no memory that a table may stand in: no slot, a slot that is going away, a device, or a
/// host page that cannot be had. The walk ends in a fault for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotMemory {
    /// Where an entry was looked for.
    pub at: Gpa,
}

impl fmt::Display for NotMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not memory", self.at)
    }
}

impl core::error::Error for NotMemory {}

/// The guest hypervisor's page-modification log has no room (SDM 3C 29.3.6): the nested guest must
/// exit before its page becomes dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogFull;

impl fmt::Display for LogFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the page-modification log is full")
    }
}

impl core::error::Error for LogFull {}

/// Guest-physical memory as a page walker uses it.
///
/// # Contract
/// Addresses are multiples of the width; whatever the guest's tables say may be asked for, so an
/// address need not be memory. Each call is one access, atomic with respect to the guest's own:
/// a torn entry is none that the guest ever wrote. A read orders what is read later through the
/// entry (Acquire); a successful exchange is seen by the guest's other CPUs before what follows it
/// (AcqRel). A page that an exchange changed is dirty for whoever logs the guest's writes.
pub trait GuestMem {
    /// The entry at `at`; 4-byte entries are zero-extended.
    ///
    /// # Errors
    /// [`NotMemory`] where no table can stand.
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory>;

    /// Replace the entry at `at` by `new` if it is `old`.
    ///
    /// # Errors
    /// [`NotMemory`] where no table can stand any more.
    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory>;

    /// A nested page is about to become dirty in its EPT leaf: put its address into the guest
    /// hypervisor's page-modification log, where that is on (KVM row 4.11).
    ///
    /// # Errors
    /// [`LogFull`]: the entry is left clean and the walk ends in [`super::Cause::LogFull`].
    #[inline]
    fn log_dirty(&self, gpa: Gpa) -> Result<(), LogFull> {
        let _ = gpa;
        Ok(())
    }
}

impl<M: GuestMem + ?Sized> GuestMem for &M {
    #[inline]
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        (**self).read(at, width)
    }

    #[inline]
    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        (**self).compare_exchange(at, width, old, new)
    }

    #[inline]
    fn log_dirty(&self, gpa: Gpa) -> Result<(), LogFull> {
        (**self).log_dirty(gpa)
    }
}
