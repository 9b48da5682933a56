//! Generations: [`Seq`] numbers them, [`GenWindow`] says which exist (KVM row 5.21).
//!
//! A page belongs to one of at most four generations. The window of those that exist slides up: a
//! finished pass opens a new youngest one and, when four exist, folds the oldest into the next.
//!
//! What a page stores is not `seq mod 4` but a [`Label`], and the window maps one to the other.
//! Folding may then keep the label of the larger of the two generations and rewrite only the
//! pages of the smaller: a VM that has been cold for an hour would otherwise be rewritten whole by
//! every pass.
//!
//! The window is one atomic word, so every reader sees a window that existed. `max_seq += 1` is
//! its Release store; readers load it with Acquire.

use core::fmt;

use mmu_core::sync::{AtomicU64, Ordering};

use crate::AgeError;

/// Fewest generations that exist at any time.
pub const MIN_NR_GENS: u64 = 2;
/// Most generations that exist at any time.
pub const MAX_NR_GENS: u64 = 4;
/// The youngest generations, whose pages count as active: never offered for eviction.
pub const ACTIVE_GENS: u64 = 2;

/// Number of a generation. Higher is younger; it never wraps ([`Seq::MAX`]).
#[doc(alias = "max_seq")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Seq(u64);

impl Seq {
    /// The last number that a window can reach: 2^52 - 1. At a pass per microsecond that is 142
    /// years; then [`AgeError::SeqExhausted`], never a wrap.
    pub const MAX: Self = Self((1 << (64 - SEQ_SHIFT)) - 1);

    /// Wrap a number. Numbers past [`Seq::MAX`] may be asked about; no window holds them.
    #[inline]
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    #[inline]
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Its generation: the number modulo [`MAX_NR_GENS`].
    #[inline]
    #[must_use]
    pub const fn generation(self) -> Generation {
        Generation(self.0 % MAX_NR_GENS)
    }

    /// The one after it.
    #[inline]
    pub(crate) const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// How many generations younger `self` is than `older`; 0 when it is not.
    #[inline]
    #[must_use]
    pub const fn younger_by(self, older: Self) -> u64 {
        self.0.saturating_sub(older.0)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Which of the four slots a generation uses: its [`Seq`] modulo 4.
#[doc(alias = "lru_gen_from_seq")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation(u64);

impl Generation {
    /// 0 to 3.
    #[inline]
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// The two generation bits that a page stores. Only a [`GenWindow`] says what they mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label(u64);

impl Label {
    pub(crate) const ALL: [Self; 4] = [Self(0), Self(1), Self(2), Self(3)];

    #[inline]
    pub(crate) const fn new(bits: u64) -> Self {
        Self(bits & 3)
    }

    #[inline]
    pub(crate) const fn get(self) -> u64 {
        self.0
    }
}

/// The generations that exist, as they were when it was read.
///
/// Having one tells you: `MIN_NR_GENS <= max - min + 1 <= MAX_NR_GENS`, and that these were the
/// generations at one moment. It does not tell you that they still are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct GenWindow(u64);

// Bits of the word: 0..8 label of each generation, 8..10 generations - 1, 10..12 most generations
// - 1, 12..64 max_seq.
const LEN_SHIFT: u32 = 8;
const LIMIT_SHIFT: u32 = 10;
const SEQ_SHIFT: u32 = 12;
/// Generation `g` starts with label `g`.
const IDENTITY: u64 = 0b11_10_01_00;

impl GenWindow {
    /// Where a table starts: `max_seq` = 3 = `MIN_NR_GENS` + 1 by row 5.21. The row gives no
    /// `min_seq`; 0 is ours, so that the window starts full, with four empty generations 0 to 3.
    /// The first pass leaves out the ones that stayed empty.
    pub const START: Self = Self::pack(MIN_NR_GENS + 1, MAX_NR_GENS, MAX_NR_GENS, IDENTITY);

    /// A full window of `max_gens` generations (3 or 4) that ends at `max_seq`. A table that keeps
    /// three folds one pass earlier: less history, and colder pages become victims sooner.
    ///
    /// # Errors
    /// [`AgeError::BadWindow`] for other counts (with two, everything would be active), for a
    /// `max_seq` past [`Seq::MAX`], and for one too low for so many generations.
    pub const fn ending_at(max_seq: Seq, max_gens: u64) -> Result<Self, AgeError> {
        let max = max_seq.get();
        let count = MIN_NR_GENS < max_gens && max_gens <= MAX_NR_GENS;
        if !count || max > Seq::MAX.get() || max + 1 < max_gens {
            return Err(AgeError::BadWindow { max_seq: max, max_gens });
        }
        Ok(Self::pack(max, max_gens, max_gens, IDENTITY))
    }

    const fn pack(max: u64, len: u64, limit: u64, labels: u64) -> Self {
        Self((max << SEQ_SHIFT) | ((limit - 1) << LIMIT_SHIFT) | ((len - 1) << LEN_SHIFT) | labels)
    }

    /// The youngest generation.
    #[inline]
    #[must_use]
    pub const fn max_seq(self) -> Seq {
        Seq(self.0 >> SEQ_SHIFT)
    }

    /// The oldest generation.
    #[inline]
    #[must_use]
    pub const fn min_seq(self) -> Seq {
        Seq(self.max_seq().0 + 1 - self.nr_gens())
    }

    /// How many generations exist: `MIN_NR_GENS` to [`max_gens`](Self::max_gens).
    #[inline]
    #[must_use]
    pub const fn nr_gens(self) -> u64 {
        ((self.0 >> LEN_SHIFT) & 3) + 1
    }

    /// How many may exist before a pass folds the oldest: 3 or 4.
    #[inline]
    #[must_use]
    pub const fn max_gens(self) -> u64 {
        ((self.0 >> LIMIT_SHIFT) & 3) + 1
    }

    /// Does generation `seq` exist?
    #[inline]
    #[must_use]
    pub const fn contains(self, seq: Seq) -> bool {
        self.min_seq().0 <= seq.0 && seq.0 <= self.max_seq().0
    }

    /// Is `seq` one of the [`ACTIVE_GENS`] youngest (or younger than all)?
    #[inline]
    #[must_use]
    pub const fn is_active(self, seq: Seq) -> bool {
        seq.0.saturating_add(ACTIVE_GENS) > self.max_seq().0
    }

    /// Every generation, oldest first.
    pub fn seqs(self) -> impl DoubleEndedIterator<Item = Seq> {
        (self.min_seq().0..=self.max_seq().0).map(Seq)
    }

    const fn labels(self) -> u64 {
        self.0 & 0xff
    }

    /// The label of generation `seq`, or of the slot it will have when it is opened.
    #[inline]
    pub(crate) const fn label(self, seq: Seq) -> Label {
        Label::new(self.labels() >> (2 * seq.generation().get()))
    }

    /// The generation that a label stands for; `None` for a label that is free.
    #[inline]
    pub(crate) fn seq_of(self, label: Label) -> Option<Seq> {
        self.seqs().find(|&seq| self.label(seq) == label)
    }

    /// The labels from youngest to oldest, then the free ones.
    pub(crate) fn by_age(self) -> [Label; 4] {
        let max = self.max_seq().0;
        // Slots below a young max_seq wrap below zero; only the value modulo 4 matters.
        [0, 1, 2, 3].map(|age| self.label(Seq(max.wrapping_sub(age))))
    }

    /// The oldest generation folded into the next one, which goes on under `survivor` (the label
    /// of one of the two). The other label is free.
    pub(crate) fn folded(self, survivor: Label) -> Self {
        let (oldest, next) = (self.min_seq(), Seq(self.min_seq().0 + 1));
        let mut labels = self.labels();
        if self.label(oldest) == survivor {
            let (a, b) = (2 * oldest.generation().get(), 2 * next.generation().get());
            let swap = ((labels >> a) ^ (labels >> b)) & 3;
            labels ^= (swap << a) | (swap << b);
        }
        self.without_oldest(labels)
    }

    /// The oldest generation, which is empty, gone.
    pub(crate) const fn trimmed(self) -> Self {
        self.without_oldest(self.labels())
    }

    /// A new youngest generation; `None` at [`Seq::MAX`]. The caller keeps `nr_gens` within the
    /// limit.
    pub(crate) const fn advanced(self) -> Option<Self> {
        let max = self.max_seq().0;
        if max >= Seq::MAX.0 {
            return None;
        }
        Some(Self::pack(max + 1, self.nr_gens() + 1, self.max_gens(), self.labels()))
    }

    const fn without_oldest(self, labels: u64) -> Self {
        Self::pack(self.max_seq().0, self.nr_gens() - 1, self.max_gens(), labels)
    }
}

impl fmt::Debug for GenWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GenWindow({}..={})", self.min_seq(), self.max_seq())
    }
}

/// The window that everybody reads and the holder of the editor writes.
#[derive(Debug)]
pub(crate) struct WindowCell(AtomicU64);

impl WindowCell {
    pub(crate) fn new(window: GenWindow) -> Self {
        Self(AtomicU64::new(window.0))
    }

    #[inline]
    pub(crate) fn load(&self) -> GenWindow {
        // ORDERING[age-window]: Acquire. Pairs with Release in `publish`. A reader that knows
        // generation n sees every page as the pass that opened n left it, and the birth of n.
        GenWindow(self.0.load(Ordering::Acquire))
    }

    pub(crate) fn publish(&self, window: GenWindow) {
        // ORDERING[age-window]: Release. Pairs with Acquire in `load`. Publishes: the pages
        // relabelled by a fold, the counts, and the birth of the generation that this opens.
        self.0.store(window.0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// INVARIANT: the labels of all four slots are distinct, and the window has a legal width.
    fn check(window: GenWindow) {
        let mut seen = window.by_age().map(Label::get);
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3], "{window:?}");
        assert!((MIN_NR_GENS..=MAX_NR_GENS).contains(&window.nr_gens()), "{window:?}");
        assert_eq!(window.max_seq().get() - window.min_seq().get() + 1, window.nr_gens());
        for seq in window.seqs() {
            assert_eq!(window.seq_of(window.label(seq)), Some(seq), "{window:?}");
        }
    }

    #[test]
    fn a_table_starts_with_the_documented_window() {
        let window = GenWindow::START;
        check(window);
        assert_eq!((window.min_seq(), window.max_seq()), (Seq(0), Seq(3)));
        assert_eq!(window.max_gens(), MAX_NR_GENS);
        let active: [bool; 4] = [0, 1, 2, 3].map(|n| window.is_active(Seq(n)));
        assert_eq!(active, [false, false, true, true]);
    }

    #[test]
    fn slots_are_reused_every_fourth_generation() {
        assert_eq!(Seq(7).generation(), Seq(3).generation());
        assert_ne!(Seq(7).generation(), Seq(6).generation());
    }

    #[test]
    fn folding_keeps_either_label_and_frees_the_other() {
        let mut windows = [GenWindow::START; 2];
        for round in 0_u64..64 {
            for (which, window) in windows.iter_mut().enumerate() {
                let oldest = window.min_seq();
                let survivor_is_oldest = (round >> which) & 1 == 0;
                let survivor_seq = if survivor_is_oldest { oldest } else { Seq(oldest.get() + 1) };
                let survivor = window.label(survivor_seq);
                let folded = window.folded(survivor);
                assert_eq!(folded.label(Seq(oldest.get() + 1)), survivor);
                assert_eq!(folded.seq_of(survivor), Some(Seq(oldest.get() + 1)));
                *window = folded.advanced().unwrap();
                check(*window);
            }
        }
    }

    #[test]
    fn numbers_end_and_do_not_wrap() {
        let window = GenWindow::ending_at(Seq::MAX, 4).unwrap();
        check(window);
        assert_eq!(window.max_seq(), Seq::MAX);
        assert!(window.is_active(Seq::MAX));
        assert!(!window.contains(Seq(Seq::MAX.get() + 1)));
        assert_eq!(window.trimmed().advanced(), None);
        let last = GenWindow::ending_at(Seq(Seq::MAX.get() - 1), 3).unwrap();
        assert_eq!(last.trimmed().advanced().unwrap().max_seq(), Seq::MAX);
    }

    #[test]
    fn impossible_windows_are_refused_with_their_values() {
        for (max_seq, max_gens) in [(3, 2), (3, 5), (2, 4), (1, 3), (Seq::MAX.get() + 1, 4)] {
            let refused = GenWindow::ending_at(Seq(max_seq), max_gens);
            assert_eq!(refused, Err(AgeError::BadWindow { max_seq, max_gens }));
        }
        check(GenWindow::ending_at(Seq(2), 3).unwrap());
    }
}
