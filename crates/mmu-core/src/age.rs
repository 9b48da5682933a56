//! What an MMU answers about accessed bits: [`AgeRange`], its requests, answers and sinks.
//!
//! Owns the trait that `lru-age` drives and that each MMU implements: direct tables over their
//! entries, shadow paging over its reverse maps. One required call does the work,
//! [`AgeRange::age`]; the questions in everyday form (a bitmap, one gfn, any page of a range) are
//! provided methods over it. Nothing here takes a lock or allocates (KVM rows 5.1 to 5.17, 5.25).
//!
//! # Upper accessed bits
//!
//! Hardware sets A in the entries that lead to a leaf too. An MMU that has such bits and is asked
//! to use them ([`UpperBits::Use`]) clears them on its way down and leaves out, the next time, what
//! lies below a clear one: the cost of a pass follows what was touched, not what is mapped. The
//! caches of those entries make that a matter of flushes: a CPU that has an upper entry cached goes
//! past it without setting the bit. So **a clear upper bit is believed only if a flush completed
//! after it was cleared**, and what that leaves open is this:
//!
//! - Accesses made while the bit was clear and the flush not complete may be missed: those of the
//!   call itself with [`AgeMode::ClearFlush`], those until [`AgeRange::flush_aged`] with
//!   [`AgeMode::Clear`]. Without any flush nothing is believed and nothing is skipped.
//! - Every access made after that flush is seen by the next call that covers it.
//! - The leaf bit of a missed access stays set. A pass with [`UpperBits::Ignore`] finds it, so one
//!   such pass every N bounds how long anything can be missed to N passes.

use bitflags::bitflags;

use crate::addr::{Gfn, GfnRange, Level, to_index, to_u64};

/// What an aging call does to accessed bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgeMode {
    /// Look only; no entry is written (race table row R18).
    Test,
    /// Test and clear. No flush: a CPU that cached a translation need not set the bit again, so
    /// young pages may be missed by the next call, never invented (KVM row 5.2).
    Clear,
    /// Test and clear, then flush what was cleared, by one request that is complete before the call
    /// returns: the next call sees every access made after this one.
    ClearFlush,
}

/// What the accessed bits of upper (non-leaf) entries are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UpperBits {
    /// They are neither read nor written: every mapped page of the range is looked at. What KVM
    /// does.
    #[default]
    Ignore,
    /// They are cleared on the way, unless the mode is [`AgeMode::Test`], and what nobody walked
    /// into since is skipped ([`AgeSink::idle`]) where that may be believed. An MMU without
    /// [`AgeAbilities::UPPER_BITS`] looks at everything.
    Use,
}

/// How far a call may go to find an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effort {
    /// Everything in the range is answered, in slices of the budget. May wait for a lock of one
    /// reverse map, never for an MMU lock.
    #[default]
    Full,
    /// The call waits for nobody and reads at most [`AgeRequest::budget`] entries; what it cannot
    /// tell within that is told as unknown ([`AgeSink::unknown`]) and left alone (KVM rows 5.16,
    /// 5.17; 8.2). [`AgeMode::ClearFlush`] does not flush in this call, which would be a wait: the
    /// flush stays owed, as after [`AgeMode::Clear`].
    Fast,
}

/// The budget at which a fast question about one gfn is answered by an MMU with
/// [`AgeAbilities::FAST`]: the entries of a walk of five levels, rounded up.
pub const FAST_PAGE_BUDGET: u64 = 8;

bitflags! {
    /// What an MMU can do for aging at this moment. Facts, not settings: callers ask and adapt.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct AgeAbilities: u32 {
        /// With [`Effort::Fast`] every mapped page of the range is answered as far as the budget
        /// goes. Without it, some pages are answered as unknown whatever the budget, so that the
        /// MMU is worth asking at eviction time only and not in every pass.
        const FAST = 1 << 0;
        /// [`UpperBits::Use`] skips what nobody walked into.
        const UPPER_BITS = 1 << 1;
        /// Hardware sets the bits. Without it, looking is free but clearing costs the guest a fault
        /// at the next access to each page.
        const HARDWARE_BITS = 1 << 2;
    }
}

/// One slice of aging work. Made by [`new`](Self::new) and adapted by the methods after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AgeRequest {
    /// Guest pages to look at.
    pub range: GfnRange,
    /// What to do to the accessed bits.
    pub mode: AgeMode,
    /// Entries to read. With [`Effort::Full`]: stop after about so many (at least one table is
    /// always done, so every call makes progress). With [`Effort::Fast`]: never read more.
    pub budget: u64,
    /// What the accessed bits of upper entries are for.
    pub upper: UpperBits,
    /// How far to go.
    pub effort: Effort,
}

impl AgeRequest {
    /// All of `range`, without a budget, full effort, upper bits ignored.
    #[must_use]
    pub const fn new(range: GfnRange, mode: AgeMode) -> Self {
        let (upper, effort) = (UpperBits::Ignore, Effort::Full);
        Self { range, mode, budget: u64::MAX, upper, effort }
    }

    /// The same with another budget of entries.
    #[must_use]
    pub const fn with_budget(self, budget: u64) -> Self {
        Self { budget, ..self }
    }

    /// The same with another use of upper bits.
    #[must_use]
    pub const fn with_upper(self, upper: UpperBits) -> Self {
        Self { upper, ..self }
    }

    /// The same with another effort.
    #[must_use]
    pub const fn with_effort(self, effort: Effort) -> Self {
        Self { effort, ..self }
    }

    /// The same for another range: where a slice goes on.
    #[must_use]
    pub const fn for_range(self, range: GfnRange) -> Self {
        Self { range, ..self }
    }
}

/// What a slice of aging found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct AgeReport {
    /// Where to go on: the first gfn that this call says nothing about; `range.end` when all was
    /// done.
    pub next: Gfn,
    /// Guest pages (4 KiB) seen mapped.
    pub mapped: u64,
    /// Guest pages (4 KiB) seen young; a young huge leaf counts all its pages inside the range.
    pub young: u64,
    /// Entries read, at every level: what the slice cost.
    pub entries: u64,
    /// Leaves whose compare-exchange was lost to somebody else; they count as young.
    pub lost: u64,
    /// gfns (4 KiB) left out because nobody walked into what maps them, mapped or not.
    pub idle: u64,
    /// gfns (4 KiB) that a fast call could not tell, mapped or not.
    pub unknown: u64,
}

impl AgeReport {
    /// A report of nothing done yet, to resume at `next`.
    pub const fn empty(next: Gfn) -> Self {
        Self { next, mapped: 0, young: 0, entries: 0, lost: 0, idle: 0, unknown: 0 }
    }

    /// Add the counts of a later slice and take over its resume point.
    pub const fn merge(self, later: Self) -> Self {
        Self {
            next: later.next,
            mapped: self.mapped + later.mapped,
            young: self.young + later.young,
            entries: self.entries + later.entries,
            lost: self.lost + later.lost,
            idle: self.idle + later.idle,
            unknown: self.unknown + later.unknown,
        }
    }

    /// The report as one answer about all the pages it covers.
    #[must_use]
    pub const fn answer(&self) -> AgeAnswer {
        if self.young != 0 || self.lost != 0 {
            AgeAnswer::Young
        } else if self.unknown != 0 {
            AgeAnswer::Unknown
        } else if self.mapped != 0 || self.idle != 0 {
            AgeAnswer::Old
        } else {
            AgeAnswer::Unmapped
        }
    }
}

/// One answer about a page, or about all pages of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AgeAnswer {
    /// Used since it was last cleared; for a range: some page of it.
    Young,
    /// Not used: every page that is mapped.
    Old,
    /// Nothing is mapped.
    Unmapped,
    /// Nothing young was found, and not everything could be told ([`Effort::Fast`]).
    Unknown,
}

/// Words of a per-table bit mask: bit `i` is the entry `i` of a level-1 table.
pub const MASK_WORDS: usize = 8;

/// Receives what an aging slice found, in ascending gfn order.
///
/// What is told of a page is one of: a bit of [`table`](Self::table), a [`huge`](Self::huge) leaf,
/// [`idle`](Self::idle), [`unknown`](Self::unknown), or nothing, which means that it is not mapped.
pub trait AgeSink {
    /// A level-1 table was scanned: bit `i` of `present` and `young` is gfn `base + i`. Bits
    /// outside the requested range are 0; `young` is a subset of `present`. A gfn whose bits are
    /// clear is not mapped, unless `unknown` tells of it right afterwards.
    fn table(&mut self, base: Gfn, present: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]);

    /// A huge leaf at `level` (2 or 3) that maps `level.pages()` pages from `base`, which may lie
    /// before the requested range.
    fn huge(&mut self, base: Gfn, level: Level, young: bool);

    /// Nobody walked into what maps `range` (inside the requested one): every page of it that is
    /// mapped is as old as it was at the last call. Told with [`UpperBits::Use`] only.
    fn idle(&mut self, range: GfnRange) {
        let _ = range;
    }

    /// Nothing could be told of `range` (inside the requested one), and nothing was done to it.
    /// Told with [`Effort::Fast`] only.
    fn unknown(&mut self, range: GfnRange) {
        let _ = range;
    }
}

/// Ignores everything: for callers that want the counts of [`AgeReport`] only.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountOnly;

impl AgeSink for CountOnly {
    #[inline]
    fn table(&mut self, _: Gfn, _: &[u64; MASK_WORDS], _: &[u64; MASK_WORDS]) {}
    #[inline]
    fn huge(&mut self, _: Gfn, _: Level, _: bool) {}
}

/// An MMU whose mappings can be aged (KVM rows 5.1 to 5.9).
///
/// No MMU lock is taken and nothing is allocated: a call completes while another thread holds the
/// lock exclusively.
pub trait AgeRange {
    /// The calling thread's handle. One per thread; an epoch is pinned through it.
    type Reader;

    /// What this MMU can do now. May change from call to call: with shadow pages about, fast
    /// answers are no longer certain.
    fn abilities(&self) -> AgeAbilities;

    /// Age one slice.
    ///
    /// Races: an entry that changes under the call counts as young and is left alone (R1 to R13).
    fn age<S: AgeSink>(
        &self,
        reader: &mut Self::Reader,
        request: AgeRequest,
        sink: &mut S,
    ) -> AgeReport;

    /// Flush what calls with [`AgeMode::Clear`] cleared in `range`, complete on return: from then
    /// on TLBs hide no access to it, and cleared upper bits are believed. One request to the
    /// embedder, none if nothing was cleared since the last one.
    fn flush_aged(&self, reader: &mut Self::Reader, range: GfnRange);

    /// Answer `request` as a whole, in slices. With [`AgeMode::Test`] it ends at the first young
    /// page, or little after it (KVM row 5.4).
    fn ask(&self, reader: &mut Self::Reader, request: AgeRequest) -> AgeAnswer {
        // Small slices of a look, so that a young page ends it early.
        let looks = request.mode == AgeMode::Test && request.effort == Effort::Full;
        let request = if looks { request.with_budget(LOOK_BUDGET) } else { request };
        let mut total = AgeReport::empty(request.range.start);
        while total.next < request.range.end {
            let rest = GfnRange::new(total.next, request.range.end);
            let slice = self.age(reader, request.for_range(rest), &mut CountOnly);
            // An MMU without progress said all that it will say.
            let stuck = slice.next <= rest.start;
            total = total.merge(slice);
            let found = looks && total.answer() == AgeAnswer::Young;
            if stuck || found || request.effort == Effort::Fast {
                break;
            }
        }
        total.answer()
    }

    /// Is any page of `range` young? Writes nothing. KVM's `test_young`.
    #[doc(alias = "kvm_test_age_gfn")]
    fn test_age(&self, reader: &mut Self::Reader, range: GfnRange) -> AgeAnswer {
        self.ask(reader, AgeRequest::new(range, AgeMode::Test))
    }

    /// Ask about one page. A huge leaf that maps it answers, and is cleared, as a whole (row 5.9).
    #[doc(alias = "kvm_age_gfn")]
    fn age_gfn(
        &self,
        reader: &mut Self::Reader,
        gfn: Gfn,
        mode: AgeMode,
        effort: Effort,
    ) -> AgeAnswer {
        let request = AgeRequest::new(GfnRange::from_len(gfn, 1), mode).with_effort(effort);
        self.ask(reader, request.with_budget(FAST_PAGE_BUDGET))
    }

    /// One answer per gfn, in one call (KVM rows 5.14, 8.1): bit `i` of `young` is
    /// `request.range.start + i`, and so of `unknown`. Both are cleared first; gfns beyond a
    /// bitmap's end are only counted, so `unknown` may be empty for who does not want it. Stops as
    /// [`age`](Self::age) does; a call that goes on at `next` takes the rest of the bitmaps.
    fn age_bitmap(
        &self,
        reader: &mut Self::Reader,
        request: AgeRequest,
        young: &mut [u64],
        unknown: &mut [u64],
    ) -> AgeReport {
        young.fill(0);
        unknown.fill(0);
        self.age(reader, request, &mut Bitmaps { range: request.range, young, unknown })
    }
}

/// Entries that a look reads between two points where it may end.
const LOOK_BUDGET: u64 = 512;

/// Bits in a word of a bitmap.
const WORD: u64 = 64;

/// Turns answers into bits.
struct Bitmaps<'a> {
    range: GfnRange,
    young: &'a mut [u64],
    unknown: &'a mut [u64],
}

impl AgeSink for Bitmaps<'_> {
    #[inline]
    fn table(&mut self, base: Gfn, _: &[u64; MASK_WORDS], young: &[u64; MASK_WORDS]) {
        let first = self.range.start.get();
        for (word, gfn) in young.iter().zip((base.get()..).step_by(to_index(WORD))) {
            if *word == 0 {
                continue;
            }
            // Bits outside the range are 0, so what falls below its start is nothing.
            if gfn < first {
                let below = first - gfn;
                if below < WORD {
                    or(self.young, 0, word >> below);
                }
                continue;
            }
            let (index, shift) = ((gfn - first) / WORD, (gfn - first) % WORD);
            or(self.young, index, word << shift);
            if shift != 0 {
                or(self.young, index + 1, word >> (WORD - shift));
            }
        }
    }

    fn huge(&mut self, base: Gfn, level: Level, young: bool) {
        if young {
            set(self.young, self.range, GfnRange::from_len(base, level.pages()));
        }
    }

    fn unknown(&mut self, range: GfnRange) {
        set(self.unknown, self.range, range);
    }
}

/// Set the bits of `part` in a bitmap of `all`.
fn set(bits: &mut [u64], all: GfnRange, part: GfnRange) {
    let part = part.intersection(all);
    let size = to_u64(bits.len()).saturating_mul(WORD);
    let end = part.end.distance_from(all.start).min(size);
    let mut at = part.start.distance_from(all.start);
    while at < end {
        let stop = (at / WORD + 1) * WORD;
        let count = end.min(stop) - at;
        or(bits, at / WORD, u64::MAX >> (WORD - count) << (at % WORD));
        at += count;
    }
}

#[inline]
fn or(bits: &mut [u64], index: u64, mask: u64) {
    if let Some(word) = bits.get_mut(to_index(index)) {
        *word |= mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    fn bits(words: &[u64]) -> alloc::vec::Vec<u64> {
        let all = 0..to_u64(words.len()) * WORD;
        all.filter(|bit| {
            words.get(to_index(bit / WORD)).is_some_and(|w| w >> (bit % WORD) & 1 == 1)
        })
        .collect()
    }

    #[test]
    fn bitmaps_begin_where_the_range_begins_and_end_where_they_end() {
        for start in [0, 1, 63, 64, 70, 511, 512, 600] {
            let (mut young, mut unknown) = ([0; 4], [0; 2]);
            let asked = range(start, start + 700);
            let mut sink = Bitmaps { range: asked, young: &mut young, unknown: &mut unknown };
            let mut mask = [0; MASK_WORDS];
            let gfns = [start, start + 1, start + 130, start + 255, start + 256, start + 699];
            for base in [0, 512, 1024] {
                for gfn in gfns.iter().filter(|gfn| **gfn / 512 * 512 == base) {
                    if let Some(word) = mask.get_mut(to_index(gfn % 512 / 64)) {
                        *word |= 1 << (gfn % 64);
                    }
                }
                sink.table(Gfn::new(base), &mask, &mask);
                mask = [0; MASK_WORDS];
            }
            sink.unknown(range(start + 60, start + 130));
            assert_eq!(bits(&young), [0, 1, 130, 255], "start {start}: 256 bits were given");
            assert_eq!(bits(&unknown), (60..128).collect::<alloc::vec::Vec<_>>());
        }
    }

    #[test]
    fn a_huge_leaf_sets_the_bits_of_its_part_of_the_range() {
        let (mut young, mut unknown) = ([0; 9], []);
        let asked = range(500, 1030);
        let mut sink = Bitmaps { range: asked, young: &mut young, unknown: &mut unknown };
        sink.huge(Gfn::new(0), Level::L2, true);
        sink.huge(Gfn::new(512), Level::L2, false);
        sink.huge(Gfn::new(1024), Level::L2, true);
        let expected = (0..12).chain(524..530).collect::<alloc::vec::Vec<_>>();
        assert_eq!(bits(&young), expected);
    }

    /// Pages that are old but one; each call answers one table.
    struct Tables {
        young: u64,
        calls: core::cell::Cell<u64>,
    }

    impl AgeRange for Tables {
        type Reader = ();

        fn abilities(&self) -> AgeAbilities {
            AgeAbilities::empty()
        }

        fn age<S: AgeSink>(&self, _: &mut (), request: AgeRequest, _: &mut S) -> AgeReport {
            self.calls.set(self.calls.get() + 1);
            let end = request.range.end.min(Gfn::new((request.range.start.get() / 512 + 1) * 512));
            let part = GfnRange::new(request.range.start, end);
            let young = u64::from(part.contains(Gfn::new(self.young)));
            AgeReport { mapped: part.len(), young, ..AgeReport::empty(end) }
        }

        fn flush_aged(&self, _: &mut (), _: GfnRange) {}
    }

    #[test]
    fn a_look_ends_at_the_first_young_page_and_a_clear_does_not() {
        let all = range(0, 512 * 100);
        let mmu = Tables { young: 512 * 7 + 3, calls: core::cell::Cell::new(0) };
        assert_eq!(mmu.test_age(&mut (), all), AgeAnswer::Young);
        assert_eq!(mmu.calls.replace(0), 8);
        assert_eq!(mmu.ask(&mut (), AgeRequest::new(all, AgeMode::Clear)), AgeAnswer::Young);
        assert_eq!(mmu.calls.replace(0), 100);
        assert_eq!(mmu.test_age(&mut (), range(0, 512)), AgeAnswer::Old);
        let fast = AgeRequest::new(all, AgeMode::Test).with_effort(Effort::Fast);
        assert_eq!((mmu.calls.replace(0), mmu.ask(&mut (), fast)), (1, AgeAnswer::Old));
        assert_eq!(mmu.calls.get(), 1, "one call, whatever it leaves out");
    }
}
