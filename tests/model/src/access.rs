//! The vocabulary of an access: what is asked ([`Access`]), what is granted ([`Permissions`]), why
//! it is refused ([`FaultKind`]). Plain values, the same for every format.

/// Load, store or instruction fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AccessKind {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// Why a second-level format is asked. First-level formats do not look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// For the translation of a linear address that is complete.
    Final,
    /// For an entry of a guest table, on the way to the translation of a linear address.
    GuestTable,
    /// Without a linear address, such as the load of PDPTEs by MOV to CR3.
    NoLinear,
}

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Access {
    /// Load, store or fetch.
    pub kind: AccessKind,
    /// At CPL 3. For EPT with mode-based execute: the linear address is a user-mode one.
    pub user: bool,
    /// What the access is for.
    pub stage: Stage,
}

impl Access {
    /// An access at CPL 3 to its final address.
    #[must_use]
    pub const fn user(kind: AccessKind) -> Self {
        Self { kind, user: true, stage: Stage::Final }
    }

    /// An access below CPL 3 to its final address.
    #[must_use]
    pub const fn supervisor(kind: AccessKind) -> Self {
        Self { kind, user: false, stage: Stage::Final }
    }
}

/// What a translation permits. The permissions of a walk are those that every entry grants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Permissions(u8);

impl Permissions {
    /// Nothing at all.
    pub const NONE: Self = Self(0);
    /// Data reads.
    pub const READ: Self = Self(1);
    /// Data writes.
    pub const WRITE: Self = Self(2);
    /// Fetches; with mode-based execute, supervisor fetches.
    pub const EXECUTE: Self = Self(4);
    /// User fetches. Follows `EXECUTE` unless mode-based execute is on.
    pub const EXECUTE_USER: Self = Self(8);
    /// User accesses. Always there in EPT.
    pub const USER: Self = Self(16);
    /// Everything: what a walk starts with.
    pub const ALL: Self = Self(31);

    /// Does it hold all of `other`?
    #[inline]
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What both grant.
    #[inline]
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What either grants.
    #[inline]
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn when(self, condition: bool) -> Self {
        if condition { self } else { Self::NONE }
    }
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FaultKind {
    /// An entry was not present, or the address is wider than the tables translate.
    NotPresent,
    /// All entries were there, together they do not permit the access.
    Protection,
    /// A reserved bit, or in EPT any misconfiguration.
    Reserved,
    /// A linear address that is not canonical (long mode) or above 4 GiB (PAE). Hardware raises #GP
    /// or cannot form such an address.
    BadAddress,
    /// A table pointer led outside memory. Hardware would read whatever the bus returns.
    NoMemory,
    /// Other parties changed the entries at every one of very many attempts.
    Contended,
}

/// The five low bits of a #PF error code: P, W, U, RSVD, I.
pub(crate) const fn page_fault_code(kind: FaultKind, write: bool, user: bool, fetch: bool) -> u64 {
    let present = match kind {
        FaultKind::Protection => 1,
        FaultKind::Reserved => 1 | 8,
        _ => 0,
    };
    present | if write { 2 } else { 0 } | if user { 4 } else { 0 } | if fetch { 16 } else { 0 }
}
