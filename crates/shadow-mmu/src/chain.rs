//! A list of shadow entries whose head is one word.
//!
//! Owns [`Chain`]: empty, one or two references in place, or the number of a descriptor and a
//! count. Two users: the heads of reverse maps (`rmap`), where the lowest bit is a lock, and the
//! parents of a shadow page (KVM rows 4.41, 4.42, 4.45). The word is a value; changing it gives a
//! new one, which the owner stores.
//!
//! Of the descriptors of a list only the first is partly filled; how far follows from the count. A
//! reference that is removed leaves its place to the last one of the first descriptor.

use crate::desc::{DESC_REFS, DescId, DescPool, DescWriter};
use crate::spte_ref::{REF_BITS, SpteRef};

/// The reverse map's lock; always clear in a [`Chain`].
pub(crate) const LOCKED: u64 = 1 << 0;
/// The word holds a descriptor's number and a count.
const MANY: u64 = 1 << 1;
/// Where the first reference, or the descriptor's number, starts.
const FIRST: u32 = 2;
/// Where the second reference starts.
const SECOND: u32 = FIRST + REF_BITS;
/// Where the count starts.
const COUNT: u32 = FIRST + 32;
/// References that stand in place.
pub(crate) const INLINE: u32 = 2;
/// Descriptors that one more reference may take: those of the first list that leaves its word.
pub(crate) const SPILL: u32 = (INLINE + 1).div_ceil(DESC_REFS);
/// The longest list.
pub(crate) const MAX_LEN: u32 = (1 << (64 - COUNT)) - 1;

static_assertions::const_assert_eq!(SECOND + REF_BITS, 64);

/// See the file's head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain(u64);

/// Why a reference was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// [`MAX_LEN`] stand in it.
    Length,
    /// No descriptor was reserved.
    Unreserved,
}

impl Chain {
    /// Nothing.
    pub(crate) const EMPTY: Self = Self(0);

    pub(crate) const fn from_word(word: u64) -> Self {
        Self(word & !LOCKED)
    }

    pub(crate) const fn word(self) -> u64 {
        self.0
    }

    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) const fn is_many(self) -> bool {
        self.0 & MANY != 0
    }

    fn field(self, shift: u32, bits: u32) -> u32 {
        // Masked to at most 32 bits, so the conversion cannot fail.
        u32::try_from(self.0 >> shift & ((1 << bits) - 1)).unwrap_or(0)
    }

    pub(crate) fn inline(self) -> [Option<SpteRef>; 2] {
        let at = |shift| SpteRef::from_bits(self.field(shift, REF_BITS));
        if self.is_many() { [None, None] } else { [at(FIRST), at(SECOND)] }
    }

    /// The reference that is alone in a word that nobody holds.
    #[inline]
    pub(crate) fn only(word: u64) -> Option<SpteRef> {
        let chain = Self(word);
        if word & (LOCKED | MANY) == 0 && word >> SECOND == 0 {
            SpteRef::from_bits(chain.field(FIRST, REF_BITS))
        } else {
            None
        }
    }

    fn of_two(first: Option<SpteRef>, second: Option<SpteRef>) -> Self {
        let (first, second) = if first.is_some() { (first, second) } else { (second, None) };
        let bits = |spte: Option<SpteRef>| spte.map_or(0, |spte| u64::from(spte.bits()));
        Self(bits(first) << FIRST | bits(second) << SECOND)
    }

    fn many(desc: DescId, count: u32) -> Self {
        Self(MANY | u64::from(desc.bits()) << FIRST | u64::from(count) << COUNT)
    }

    fn desc(self) -> Option<DescId> {
        if self.is_many() { DescId::from_bits(self.field(FIRST, 32)) } else { None }
    }

    /// References in it.
    pub(crate) fn len(self) -> u32 {
        if self.is_many() {
            return self.field(COUNT, 64 - COUNT);
        }
        self.inline().iter().flatten().map(|_| 1).sum()
    }

    /// References in the first descriptor.
    fn head_len(self) -> u32 {
        (self.len().wrapping_sub(1)) % DESC_REFS + 1
    }

    /// The references. The caller is the writer, or holds the list's lock.
    pub(crate) fn iter(self, pool: &DescPool) -> Iter<'_> {
        Iter { pool, inline: self.inline(), desc: self.desc(), left: self.head_len() }
    }

    /// With `spte` added. It is not in it yet.
    pub(crate) fn push(self, writer: &mut DescWriter, spte: SpteRef) -> Result<Self, Full> {
        if let [first, second @ None] = self.inline()
            && !self.is_many()
        {
            let two = if first.is_some() { (first, Some(spte)) } else { (Some(spte), second) };
            return Ok(Self::of_two(two.0, two.1));
        }
        let len = self.len();
        if len == MAX_LEN {
            return Err(Full::Length);
        }
        match self.desc() {
            Some(desc) if self.head_len() < DESC_REFS => {
                writer.set(desc, self.head_len(), spte);
                Ok(Self::many(desc, len + 1))
            }
            Some(desc) => {
                let new = writer.take(Some(desc)).ok_or(Full::Unreserved)?;
                writer.set(new, 0, spte);
                Ok(Self::many(new, len + 1))
            }
            None => self.spill(writer, spte),
        }
    }

    /// The third reference: all go to a descriptor (in models, which have small ones, to three).
    fn spill(self, writer: &mut DescWriter, spte: SpteRef) -> Result<Self, Full> {
        if writer.spare() < SPILL {
            return Err(Full::Unreserved);
        }
        let [first, second] = self.inline();
        let mut chain: Option<(DescId, u32)> = None;
        for (len, one) in (0_u32..).zip([first, second, Some(spte)].into_iter().flatten()) {
            let slot = len % DESC_REFS;
            let desc = match chain {
                Some((desc, _)) if slot != 0 => desc,
                _ => writer.take(chain.map(|(desc, _)| desc)).ok_or(Full::Unreserved)?,
            };
            writer.set(desc, slot, one);
            chain = Some((desc, len + 1));
        }
        let (desc, count) = chain.ok_or(Full::Unreserved)?;
        Ok(Self::many(desc, count))
    }

    /// Without `spte`; `None` if it is not in it.
    pub(crate) fn remove(self, writer: &mut DescWriter, spte: SpteRef) -> Option<Self> {
        let Some(head) = self.desc() else {
            let [first, second] = self.inline();
            return match (first == Some(spte), second == Some(spte)) {
                (true, _) => Some(Self::of_two(second, None)),
                (_, true) => Some(Self::of_two(first, None)),
                _ => None,
            };
        };
        let (desc, slot) = self.find(writer.pool(), spte)?;
        let last = self.head_len() - 1;
        if let Some(moved) = writer.pool().get(head, last) {
            writer.set(desc, slot, moved);
        }
        let len = self.len() - 1;
        let rest = if last == 0 {
            let next = writer.pool().next(head);
            writer.give_back(head);
            next
        } else {
            Some(head)
        };
        let chain = rest.map_or(Self::EMPTY, |desc| Self::many(desc, len));
        Some(if len <= INLINE { chain.fold(writer) } else { chain })
    }

    /// Back into the word, from descriptors that hold at most two.
    fn fold(self, writer: &mut DescWriter) -> Self {
        let mut refs = self.iter(writer.pool());
        let folded = Self::of_two(refs.next(), refs.next());
        let mut desc = self.desc();
        while let Some(id) = desc {
            desc = writer.pool().next(id);
            writer.give_back(id);
        }
        folded
    }

    /// Where `spte` stands. The list's length bounds the search, and what adds to lists bounds that
    /// (`MAX_ALIASES` in `rmap`).
    fn find(self, pool: &DescPool, spte: SpteRef) -> Option<(DescId, u32)> {
        let (mut desc, mut filled) = (self.desc(), self.head_len());
        while let Some(id) = desc {
            if let Some(slot) = (0..filled).find(|slot| pool.get(id, *slot) == Some(spte)) {
                return Some((id, slot));
            }
            (desc, filled) = (pool.next(id), DESC_REFS);
        }
        None
    }
}

/// See [`Chain::iter`].
#[derive(Debug)]
pub(crate) struct Iter<'a> {
    pool: &'a DescPool,
    inline: [Option<SpteRef>; 2],
    desc: Option<DescId>,
    /// References of `desc` not given yet: those below this.
    left: u32,
}

impl Iterator for Iter<'_> {
    type Item = SpteRef;

    fn next(&mut self) -> Option<SpteRef> {
        if let Some(spte) = self.inline.iter_mut().find_map(Option::take) {
            return Some(spte);
        }
        let desc = self.desc?;
        self.left -= 1;
        let spte = self.pool.get(desc, self.left);
        if self.left == 0 {
            (self.desc, self.left) = (self.pool.next(desc), DESC_REFS);
        }
        spte
    }
}

#[cfg(test)]
#[expect(clippy::as_conversions, reason = "small numbers of a test")]
mod tests {
    use std::collections::BTreeSet;
    use std::vec::Vec;

    use super::*;
    use crate::spte_ref::PageId;

    fn spte(number: u32) -> SpteRef {
        SpteRef::new(PageId::new(number / 512).unwrap(), number as usize % 512)
    }

    fn contents(chain: Chain, writer: &DescWriter) -> BTreeSet<SpteRef> {
        let all: Vec<_> = chain.iter(writer.pool()).collect();
        let set: BTreeSet<_> = all.iter().copied().collect();
        assert_eq!(all.len(), set.len(), "each reference is given once");
        assert_eq!(all.len(), chain.len() as usize);
        set
    }

    /// The smallest number of descriptors that hold `len` references: only the first is not full.
    fn descriptors(len: u32) -> u32 {
        if len <= INLINE { 0 } else { len.div_ceil(DESC_REFS) }
    }

    #[test]
    fn lists_of_every_length_hold_what_was_added() {
        let (_pool, mut writer) = DescPool::new();
        let mut chain = Chain::EMPTY;
        let mut model = BTreeSet::new();
        for number in 0..100 {
            writer.reserve(SPILL).unwrap();
            chain = chain.push(&mut writer, spte(number)).unwrap();
            model.insert(spte(number));
            assert_eq!(contents(chain, &writer), model);
            assert_eq!(writer.in_use(), descriptors(number + 1));
        }
        for number in (0..100).step_by(3).chain((0..100).filter(|n| n % 3 != 0)) {
            chain = chain.remove(&mut writer, spte(number)).unwrap();
            assert!(model.remove(&spte(number)));
            assert_eq!(contents(chain, &writer), model);
            assert_eq!(writer.in_use(), descriptors(chain.len()));
        }
        assert_eq!((chain, writer.in_use()), (Chain::EMPTY, 0));
    }

    #[test]
    fn random_additions_and_removals_agree_with_a_set() {
        let seed = 0x5eed_c4a1_u64;
        let mut state = seed;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        let (_pool, mut writer) = DescPool::new();
        let mut chains = [Chain::EMPTY; 4];
        let mut models = [const { BTreeSet::new() }; 4];
        for step in 0..40_000_u32 {
            let which = random(4) as usize;
            // Grows to some thousands and shrinks again.
            let grow = random(100) < if step / 10_000 % 2 == 0 { 65 } else { 35 };
            let (chain, model) = (&mut chains[which], &mut models[which]);
            if grow {
                let new = spte(step);
                writer.reserve(SPILL).unwrap();
                *chain = chain.push(&mut writer, new).unwrap();
                model.insert(new);
            } else if let Some(old) = model.iter().nth(random(8) as usize).copied() {
                *chain = chain.remove(&mut writer, old).unwrap();
                model.remove(&old);
            } else {
                assert_eq!(chain.remove(&mut writer, spte(u32::MAX >> 2)), None);
            }
            if step % 997 == 0 {
                let used: u32 = chains.iter().map(|chain| descriptors(chain.len())).sum();
                assert_eq!(writer.in_use(), used, "seed {seed:#x}, step {step}");
                for (chain, model) in chains.iter().zip(&models) {
                    assert_eq!(&contents(*chain, &writer), model, "seed {seed:#x}, step {step}");
                }
            }
        }
        assert!(chains.iter().all(|chain| chain.len() > 15), "the lists became long");
    }

    #[test]
    fn without_a_reserved_descriptor_nothing_changes() {
        let (_pool, mut writer) = DescPool::new();
        let mut chain = Chain::EMPTY;
        for number in 0..INLINE {
            chain = chain.push(&mut writer, spte(number)).unwrap();
        }
        assert_eq!(chain.push(&mut writer, spte(9)), Err(Full::Unreserved));
        assert_eq!(chain.len(), INLINE);
        assert_eq!(chain.remove(&mut writer, spte(9)), None);
    }
}
