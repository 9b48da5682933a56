//! [`Kind`] and [`Tier`]: what makes one page cheaper to take away than another of the same age.
//!
//! Both are the evictor's business ([`crate::EvictPolicy`]); aging treats all pages alike.

/// What stands behind the pages of a range, as the columns of the `lru_gen` text name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Only the guest has the content: it must be written somewhere before the page can go.
    #[default]
    Anon,
    /// The content is in a file as well: a clean page can just be dropped.
    File,
}

/// Kinds of ranges.
pub(crate) const KINDS: usize = 2;

impl Kind {
    /// Both, in the order of the columns.
    pub const ALL: [Self; KINDS] = [Self::Anon, Self::File];

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Anon => Self::File,
            Self::File => Self::Anon,
        }
    }

    /// `values[self]`.
    #[inline]
    pub(crate) const fn of<T>(self, values: &[T; KINDS]) -> &T {
        let [anon, file] = values;
        match self {
            Self::Anon => anon,
            Self::File => file,
        }
    }

    /// `values[self]`, to change.
    #[inline]
    pub(crate) const fn of_mut<T>(self, values: &mut [T; KINDS]) -> &mut T {
        let [anon, file] = values;
        match self {
            Self::Anon => anon,
            Self::File => file,
        }
    }
}

/// How much a page was used before it grew old (KVM row 5.31). Upstream counts accesses through
/// file descriptors and knows four; a guest's page has its referenced mark, which makes two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Mapped and never seen used.
    #[default]
    Untouched,
    /// Seen used at least once.
    Used,
}

/// Tiers.
pub(crate) const TIERS: usize = 2;

impl Tier {
    /// Both, the cheapest first.
    pub const ALL: [Self; TIERS] = [Self::Untouched, Self::Used];

    /// The tier of a page with or without the referenced mark.
    #[inline]
    pub(crate) const fn of_mark(referenced: bool) -> Self {
        if referenced { Self::Used } else { Self::Untouched }
    }

    /// Its number in the text form.
    #[must_use]
    pub const fn number(self) -> u64 {
        match self {
            Self::Untouched => 0,
            Self::Used => 1,
        }
    }

    /// `values[self]`.
    #[inline]
    pub(crate) const fn of<T>(self, values: &[T; TIERS]) -> &T {
        let [untouched, used] = values;
        match self {
            Self::Untouched => untouched,
            Self::Used => used,
        }
    }
}
