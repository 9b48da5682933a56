//! Descriptors: what a list of entries stands in that is too long for one word.
//!
//! Owns [`DescPool`], the descriptors of a shadow MMU, type-stable and found by a 32-bit number,
//! and [`DescWriter`], which says which of them are free and exists once. A descriptor is one cache
//! line: fifteen references and the number of the next (KVM row 4.42, P25). Who may touch one: the
//! writer, and an ager that holds the bit lock of the list that the descriptor belongs to. So a
//! descriptor may be used again as soon as it was taken out under that lock.

use alloc::sync::Arc;

use mmu_core::sync::{AtomicU64, Ordering};

use crate::radix::{NoMemory, Radix};
use crate::spte_ref::SpteRef;

/// Words of a descriptor. Small in models, so that lists of some entries have several.
const WORDS: usize = if cfg!(loom) { 1 } else { 8 };
/// References in a descriptor.
pub(crate) const DESC_REFS: u32 = if cfg!(loom) { 1 } else { 15 };
/// Where the number of the next descriptor stands.
const NEXT: u32 = DESC_REFS;
/// Bits of a descriptor's number; in models those of what one fault reserves.
const DESC_BITS: u32 = if cfg!(loom) { 6 } else { 32 };

static_assertions::const_assert!(DESC_REFS == if WORDS == 8 { 15 } else { 1 });

/// Number of a descriptor; 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DescId(u32);

impl DescId {
    pub(crate) const fn from_bits(bits: u32) -> Option<Self> {
        if bits == 0 { None } else { Some(Self(bits)) }
    }

    pub(crate) const fn bits(self) -> u32 {
        self.0
    }
}

#[derive(Debug)]
#[repr(align(64))]
struct Desc([AtomicU64; WORDS]);

impl Default for Desc {
    fn default() -> Self {
        Self(core::array::from_fn(|_| AtomicU64::new(0)))
    }
}

/// All descriptors of a shadow MMU.
#[doc(alias = "pte_list_desc")]
#[derive(Debug)]
pub(crate) struct DescPool {
    descs: Radix<Desc>,
}

impl DescPool {
    /// None yet, and the one who may hand them out.
    pub(crate) fn new() -> (Arc<Self>, DescWriter) {
        let pool = Arc::new(Self { descs: Radix::new(DESC_BITS) });
        let writer = DescWriter { pool: Arc::clone(&pool), free: 0, spare: 0, made: 0, in_use: 0 };
        (pool, writer)
    }

    /// Half a word: reference or number of the next.
    fn half(&self, id: DescId, slot: u32) -> Option<(&AtomicU64, u32)> {
        let Desc(words) = self.descs.get(u64::from(id.0))?;
        let word = words.get(usize::try_from(slot / 2).ok()?)?;
        Some((word, slot % 2 * 32))
    }

    fn load(&self, id: DescId, slot: u32) -> u32 {
        let Some((word, shift)) = self.half(id, slot) else { return 0 };
        // ORDERING[rmap-chain]: Relaxed. Read by the writer, or under the list's bit lock, whose
        // Acquire orders (`rmap-lock`).
        let word = word.load(Ordering::Relaxed);
        // Masked, so the conversion cannot fail.
        u32::try_from(word >> shift & u64::from(u32::MAX)).unwrap_or(0)
    }

    fn store(&self, id: DescId, slot: u32, value: u32) {
        let Some((word, shift)) = self.half(id, slot) else { return };
        // ORDERING[rmap-chain]: Relaxed. One writer, and the list's bit lock keeps agers out; its
        // Release publishes (`rmap-lock`).
        let rest = word.load(Ordering::Relaxed) & !(u64::from(u32::MAX) << shift);
        // ORDERING[rmap-chain]: Relaxed. As above.
        word.store(rest | u64::from(value) << shift, Ordering::Relaxed);
    }

    /// The reference at `slot`, below [`DESC_REFS`].
    pub(crate) fn get(&self, id: DescId, slot: u32) -> Option<SpteRef> {
        SpteRef::from_bits(self.load(id, slot))
    }

    /// The descriptor after `id`.
    pub(crate) fn next(&self, id: DescId) -> Option<DescId> {
        DescId::from_bits(self.load(id, NEXT))
    }

    /// Bytes of all descriptors that were ever made, and of the way to them.
    pub(crate) fn bytes(&self) -> u64 {
        self.descs.bytes()
    }
}

/// Hands descriptors out. There is one for a [`DescPool`], and whoever borrows it mutably is the
/// only one who changes lists.
#[derive(Debug)]
pub(crate) struct DescWriter {
    pool: Arc<DescPool>,
    /// The first free one; 0 if none.
    free: u32,
    /// How many are free.
    spare: u32,
    /// Numbers from 1 to this one exist.
    made: u32,
    in_use: u32,
}

impl DescWriter {
    /// Make sure that the next `count` calls of [`take`](Self::take) succeed.
    ///
    /// # Errors
    /// [`NoMemory`]; also when all numbers are used, with 0 bytes.
    pub(crate) fn reserve(&mut self, count: u32) -> Result<(), NoMemory> {
        let exhausted = NoMemory { bytes: 0 };
        while self.spare < count {
            let id = DescId(self.made.checked_add(1).ok_or(exhausted)?);
            self.pool.descs.provide(u64::from(id.0))?.ok_or(exhausted)?;
            self.made = id.0;
            self.put(id);
        }
        Ok(())
    }

    fn put(&mut self, id: DescId) {
        self.pool.store(id, NEXT, self.free);
        self.free = id.0;
        self.spare += 1;
    }

    /// How many can be taken.
    pub(crate) const fn spare(&self) -> u32 {
        self.spare
    }

    /// A descriptor with nothing in it but `next`; `None` if none was reserved.
    pub(crate) fn take(&mut self, next: Option<DescId>) -> Option<DescId> {
        let id = DescId::from_bits(self.free)?;
        self.free = self.pool.load(id, NEXT);
        self.pool.store(id, NEXT, next.map_or(0, DescId::bits));
        self.spare -= 1;
        self.in_use += 1;
        Some(id)
    }

    /// A descriptor that is in no list any more.
    pub(crate) fn give_back(&mut self, id: DescId) {
        self.put(id);
        self.in_use -= 1;
    }

    /// Write the reference at `slot`, below [`DESC_REFS`]. The list is locked, or no ager can find
    /// it.
    pub(crate) fn set(&mut self, id: DescId, slot: u32, spte: SpteRef) {
        self.pool.store(id, slot, spte.bits());
    }

    /// The descriptors, to read.
    pub(crate) fn pool(&self) -> &DescPool {
        &self.pool
    }

    /// Descriptors in lists.
    pub(crate) const fn in_use(&self) -> u32 {
        self.in_use
    }
}
