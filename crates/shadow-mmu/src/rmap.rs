//! Reverse maps: which shadow entries map a guest frame.
//!
//! Owns [`Rmaps`], one list for each gfn at each level that a leaf may have, and [`RmapWriter`],
//! which changes them and exists once. Nothing is allocated before a gfn is first mapped; then 4
//! KiB of heads for the 512 gfns around it. A head is one word: up to two entries stand in it, more
//! in descriptors of one cache line (KVM rows 4.41 to 4.46, 6.15, P25).
//!
//! **Locks.** Changes need `&mut RmapWriter`, so there is one thread at a time that changes lists,
//! and it may read any without more. Everybody else reads under the bit lock of the one list
//! ([`Rmaps::lock`]), which the writer takes too. The lock protects the list and keeps what is on
//! it from going away; the entries it names change all the time. A list that is empty is not
//! locked. Under the bit lock nothing is waited for, and at most [`MAX_ALIASES`] and a few entries
//! are on a list.
//!
//! So an ager, which holds the lock of a list, can trust that the shadow pages of the entries on it
//! are alive: removal from the list comes before a page is freed (race R16).

use alloc::sync::Arc;
use core::fmt;

use mmu_core::addr::{Gfn, Level};
use mmu_core::sync::{AtomicU64, Backoff, Ordering, fence};

use crate::chain::{Chain, Full, INLINE, Iter, LOCKED, SPILL};
use crate::desc::{DescPool, DescWriter};
use crate::radix::{Near, NoMemory, Radix};
use crate::spte_ref::SpteRef;

/// Levels that a leaf may have.
const LEVELS: usize = 3;
/// Address spaces: normal and SMM.
pub const SPACES: usize = 2;

/// Above this many entries for one gfn a fault takes them all out instead of adding another, so
/// that no list becomes a burden to those who walk it (KVM row 4.44).
#[doc(alias = "RMAP_RECYCLE_THRESHOLD")]
pub const MAX_ALIASES: u32 = 1000;

/// Which list: the leaves at `level` that map the block of `gfn` in an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RmapKey {
    /// Address space: 0 normal, 1 SMM.
    pub space: u16,
    /// Level of the leaves, 1 to 3.
    pub level: Level,
    /// Any frame of the block.
    pub gfn: Gfn,
}

impl fmt::Display for RmapKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {} at {} in address space {}", self.gfn, self.level, self.space)
    }
}

/// Why a list was not changed; it is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RmapError {
    /// No memory for heads or descriptors.
    NoMemory {
        /// Bytes asked for; 0 if there is no number left for another descriptor.
        bytes: u64,
    },
    /// There is no such list: gfn beyond the limit, level of no leaf, or unknown address space.
    Outside {
        /// The list asked for.
        key: RmapKey,
    },
    /// [`RmapWriter::reserve`] was not called for this list since something was last added.
    NotReserved {
        /// The list.
        key: RmapKey,
    },
    /// As many entries as can be counted are on the list.
    Full {
        /// The list.
        key: RmapKey,
    },
    /// The entry to be removed is not on the list: the tables contradict each other, and the VM
    /// cannot go on (KVM row 4.46).
    Missing {
        /// The list.
        key: RmapKey,
        /// The entry.
        spte: SpteRef,
    },
}

impl fmt::Display for RmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMemory { bytes } => write!(f, "no memory for {bytes} bytes of reverse maps"),
            Self::Outside { key } => write!(f, "there is no reverse map for {key}"),
            Self::NotReserved { key } => write!(f, "nothing was reserved for {key}"),
            Self::Full { key } => write!(f, "the reverse map of {key} is full"),
            Self::Missing { key, spte } => write!(f, "{spte:?} is not in the reverse map of {key}"),
        }
    }
}

impl core::error::Error for RmapError {}

impl From<NoMemory> for RmapError {
    fn from(NoMemory { bytes }: NoMemory) -> Self {
        Self::NoMemory { bytes }
    }
}

/// Somebody else holds the list at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy;

/// The reverse maps of a shadow MMU. See the file's head.
#[doc(alias = "kvm_rmap_head")]
#[derive(Debug)]
pub struct Rmaps {
    heads: [[Radix<AtomicU64>; LEVELS]; SPACES],
    descs: Arc<DescPool>,
    give_up_cpu: fn(),
}

/// Changes reverse maps. There is one for an [`Rmaps`]; borrowing it mutably is KVM's `mmu_lock`
/// held for write.
#[derive(Debug)]
pub struct RmapWriter {
    rmaps: Arc<Rmaps>,
    descs: DescWriter,
    /// Entries on lists, by level.
    mapped: [u64; LEVELS],
}

impl Rmaps {
    /// Empty, for gfns below `max_gfn_exclusive`, with the only writer there will be. `give_up_cpu`
    /// is called when a wait for a bit lock lasts long (a preempted holder).
    #[must_use]
    pub fn new(max_gfn_exclusive: Gfn, give_up_cpu: fn()) -> (Arc<Self>, RmapWriter) {
        let bits = u64::BITS - max_gfn_exclusive.get().saturating_sub(1).leading_zeros();
        let level_bits = |level: Level| bits.saturating_sub(level.shift()).max(1);
        let space = || [Level::L1, Level::L2, Level::L3].map(|level| Radix::new(level_bits(level)));
        let (descs, writer) = DescPool::new();
        let rmaps = Arc::new(Self { heads: [space(), space()], descs, give_up_cpu });
        let writer = RmapWriter { rmaps: Arc::clone(&rmaps), descs: writer, mapped: [0; LEVELS] };
        (rmaps, writer)
    }

    fn heads(&self, space: u16, level: Level) -> Option<&Radix<AtomicU64>> {
        self.heads.get(usize::from(space))?.get(level.slot())
    }

    fn head(&self, key: RmapKey) -> Option<&AtomicU64> {
        self.heads(key.space, key.level)?.get(key.gfn.get() >> key.level.shift())
    }

    /// Hold the list still; `None` when it is empty. Waits for another holder, who waits for
    /// nothing.
    #[doc(alias = "kvm_rmap_lock_readonly")]
    #[must_use]
    pub fn lock(&self, key: RmapKey) -> Option<RmapGuard<'_>> {
        self.lock_head(self.head(key)?)
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// [`Busy`]: somebody holds the list.
    pub fn try_lock(&self, key: RmapKey) -> Result<Option<RmapGuard<'_>>, Busy> {
        self.head(key).map_or(Ok(None), |head| self.try_lock_head(head))
    }

    fn lock_head<'a>(&'a self, head: &'a AtomicU64) -> Option<RmapGuard<'a>> {
        let mut backoff = Backoff::new();
        loop {
            if let Ok(list) = self.try_lock_head(head) {
                return list;
            }
            backoff.wait(self.give_up_cpu);
        }
    }

    fn try_lock_head<'a>(&'a self, head: &'a AtomicU64) -> Result<Option<RmapGuard<'a>>, Busy> {
        // ORDERING[rmap-lock]: Relaxed. Compared again by the exchange.
        let seen = head.load(Ordering::Relaxed);
        if seen == 0 {
            return Ok(None);
        }
        if seen & LOCKED != 0 {
            return Err(Busy);
        }
        self.lock_seen(head, seen).map(Some)
    }

    /// Lock a list whose word, which is neither 0 nor locked, is `seen`.
    #[inline]
    fn lock_seen<'a>(&'a self, head: &'a AtomicU64, seen: u64) -> Result<RmapGuard<'a>, Busy> {
        // ORDERING[rmap-lock]: Acquire. Pairs with the Release of `RmapGuard::drop` and `replace`:
        // the descriptors are those that the head speaks of.
        head.compare_exchange(seen, seen | LOCKED, Ordering::Acquire, Ordering::Relaxed)
            .map(|_| RmapGuard { head, chain: Chain::from_word(seen), rmaps: self })
            .map_err(|_| Busy)
    }

    /// For walks from page to page over the lists at `level` of an address space; `None` if there
    /// are no such lists.
    pub(crate) fn walk(&self, space: u16, level: Level) -> Option<Lists<'_>> {
        let heads = self.heads(space, level)?.near();
        Some(Lists { rmaps: self, heads, shift: level.shift() })
    }

    /// The first frame from `from` on, below `end`, that may have a list at `level`: whole parts
    /// without memory are left out. For walks over a range.
    #[must_use]
    pub fn next(&self, space: u16, level: Level, from: Gfn, end: Gfn) -> Option<Gfn> {
        let heads = self.heads(space, level)?;
        let shift = level.shift();
        let last = end.get().checked_sub(1)? >> shift;
        let index = heads.next_provided(from.get() >> shift, last + 1)?;
        let next = Gfn::new(index << shift).max(from);
        // The end may lie in the same block as `from`.
        (next < end || mmu_core::busted!("walk_without_end")).then_some(next)
    }

    /// Bytes of heads and descriptors, with the way to them: what stays allocated until the MMU
    /// goes. Walks them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let heads: u64 = self.heads.iter().flatten().map(Radix::bytes).sum();
        heads + self.descs.bytes()
    }
}

/// The lists at one level of an address space, for who takes them one after the other.
#[derive(Debug)]
pub(crate) struct Lists<'a> {
    rmaps: &'a Rmaps,
    heads: Near<'a, AtomicU64>,
    shift: u32,
}

impl<'a> Lists<'a> {
    /// Before a block of 512 pages: lists that came since the last one are there.
    pub(crate) fn forget(&mut self) {
        self.heads.forget();
    }

    /// What the list says, without its lock; `None` when it is empty.
    #[inline]
    pub(crate) fn peek(&mut self, gfn: Gfn) -> Option<Peek<'a>> {
        let head = self.heads.get(gfn.get() >> self.shift)?;
        // ORDERING[rmap-lock]: Acquire. Pairs with the Release of `replace` and `Held::release`:
        // the frames of the pages that the word names are set.
        let word = head.load(Ordering::Acquire);
        (word != 0).then_some(Peek { head, word })
    }

    /// Hold the list still, if it is as it was seen.
    ///
    /// # Errors
    /// [`Busy`]: it is not, or somebody holds it.
    #[inline]
    pub(crate) fn lock_as(&self, peek: &Peek<'a>) -> Result<RmapGuard<'a>, Busy> {
        self.rmaps.lock_seen(peek.head, peek.word)
    }

    /// As [`Rmaps::lock`].
    pub(crate) fn lock(&mut self, gfn: Gfn) -> Option<RmapGuard<'a>> {
        self.rmaps.lock_head(self.heads.get(gfn.get() >> self.shift)?)
    }

    /// As [`Rmaps::try_lock`].
    pub(crate) fn try_lock(&mut self, gfn: Gfn) -> Result<Option<RmapGuard<'a>>, Busy> {
        let head = self.heads.get(gfn.get() >> self.shift);
        head.map_or(Ok(None), |head| self.rmaps.try_lock_head(head))
    }
}

/// What a list said a moment ago. The pages of its entries may be gone by now: what was read from
/// them counts only if the list [is as it was](Self::stands) after that.
#[derive(Debug)]
pub(crate) struct Peek<'a> {
    head: &'a AtomicU64,
    word: u64,
}

impl Peek<'_> {
    /// The entry, if there is one only and nobody is about to change that.
    #[inline]
    pub(crate) fn only(&self) -> Option<SpteRef> {
        Chain::only(self.word)
    }

    /// The entries, if they stand in the head and nobody is about to change them.
    #[inline]
    pub(crate) fn entries(&self) -> Option<[Option<SpteRef>; 2]> {
        let chain = Chain::from_word(self.word);
        (self.word & LOCKED == 0 && !chain.is_many()).then(|| chain.inline())
    }

    /// Did the list say the same all the time? (Or again: an entry was taken off and put back, and
    /// what was read of it is not older than that.)
    #[inline]
    pub(crate) fn stands(&self) -> bool {
        // ORDERING[rmap-lock]: Acquire fence. What was read of the entries was read before the head
        // is read again; pairs with the Release of `Held::release`, before which a page's entries
        // change hands.
        fence(Ordering::Acquire);
        self.head.load(Ordering::Relaxed) == self.word
    }
}

/// Holds the bit lock of a list that is not empty.
///
/// Having an `RmapGuard` tells you: nothing is added to the list or removed from it, so the shadow
/// pages of its entries are alive. It does not tell you: what the entries hold.
#[derive(Debug)]
#[must_use]
pub struct RmapGuard<'a> {
    head: &'a AtomicU64,
    chain: Chain,
    rmaps: &'a Rmaps,
}

impl RmapGuard<'_> {
    /// How many entries are on the list.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> u32 {
        self.chain.len()
    }

    /// The entries on the list, in no order.
    #[must_use]
    pub fn entries(&self) -> Entries<'_> {
        Entries(self.chain.iter(&self.rmaps.descs))
    }
}

impl Drop for RmapGuard<'_> {
    fn drop(&mut self) {
        // ORDERING[rmap-lock]: Release. Pairs with the Acquire in `lock` and `replace`: our reads
        // of descriptors come before the next holder's writes.
        self.head.store(self.chain.word(), Ordering::Release);
    }
}

/// The entries on a list.
#[derive(Debug)]
pub struct Entries<'a>(Iter<'a>);

impl Iterator for Entries<'_> {
    type Item = SpteRef;

    fn next(&mut self) -> Option<SpteRef> {
        self.0.next()
    }
}

impl RmapWriter {
    /// The reverse maps, for readers.
    #[must_use]
    pub fn rmaps(&self) -> &Arc<Rmaps> {
        &self.rmaps
    }

    /// Get the memory that adding one entry to this list may take.
    ///
    /// # Errors
    /// [`RmapError::NoMemory`], [`RmapError::Outside`]; no list has changed.
    pub fn reserve(&mut self, key: RmapKey) -> Result<(), RmapError> {
        let outside = RmapError::Outside { key };
        let heads = self.rmaps.heads(key.space, key.level).ok_or(outside)?;
        let head = heads.provide(key.gfn.get() >> key.level.shift())?.ok_or(outside)?;
        if chain_of(head).len() >= INLINE {
            self.descs.reserve(SPILL)?;
        }
        Ok(())
    }

    /// Put an entry that maps the block on its list; how many are on it now? The caller does
    /// something about it above [`MAX_ALIASES`].
    ///
    /// # Errors
    /// [`RmapError::NotReserved`], [`RmapError::Full`]; the list is as before.
    #[doc(alias = "rmap_add")]
    pub fn add(&mut self, key: RmapKey, spte: SpteRef) -> Result<u32, RmapError> {
        self.add_within(key, spte, u32::MAX)
    }

    /// The same if fewer than `most` entries are on the list, else [`RmapError::Full`].
    pub(crate) fn add_within(
        &mut self,
        key: RmapKey,
        spte: SpteRef,
        most: u32,
    ) -> Result<u32, RmapError> {
        let rmaps = &*self.rmaps;
        let head = rmaps.head(key).ok_or(RmapError::NotReserved { key })?;
        let added = replace(rmaps, head, |chain| {
            if chain.len() >= most {
                return Err(RmapError::Full { key });
            }
            chain.push(&mut self.descs, spte).map_err(|why| match why {
                Full::Length => RmapError::Full { key },
                Full::Unreserved => RmapError::NotReserved { key },
            })
        })?;
        if let Some(mapped) = self.mapped.get_mut(key.level.slot()) {
            *mapped += 1;
        }
        Ok(added.len())
    }

    /// Take an entry off the list that [`add`](Self::add) put it on. When this returns, no ager
    /// that found it there is still at it.
    ///
    /// # Errors
    /// [`RmapError::Missing`].
    #[doc(alias = "rmap_remove")]
    pub fn remove(&mut self, key: RmapKey, spte: SpteRef) -> Result<(), RmapError> {
        let missing = RmapError::Missing { key, spte };
        let rmaps = &*self.rmaps;
        let head = rmaps.head(key).ok_or(missing)?;
        let _ = replace(rmaps, head, |chain| chain.remove(&mut self.descs, spte).ok_or(missing))?;
        if let Some(mapped) = self.mapped.get_mut(key.level.slot()) {
            *mapped -= 1;
        }
        Ok(())
    }

    /// The entries on a list, without its lock: nobody else changes it.
    #[must_use]
    pub fn entries(&self, key: RmapKey) -> Entries<'_> {
        Entries(self.chain(key).iter(self.descs.pool()))
    }

    /// One entry on a list.
    #[must_use]
    pub fn first(&self, key: RmapKey) -> Option<SpteRef> {
        self.entries(key).next()
    }

    /// The descriptors, for the lists of parents that stand in shadow pages.
    pub(crate) fn descs(&mut self) -> &mut DescWriter {
        &mut self.descs
    }

    /// The descriptors, to read.
    pub(crate) fn desc_pool(&self) -> &Arc<DescPool> {
        &self.rmaps.descs
    }

    /// How many entries are on a list.
    #[must_use]
    pub fn len(&self, key: RmapKey) -> u32 {
        self.chain(key).len()
    }

    fn chain(&self, key: RmapKey) -> Chain {
        self.rmaps.head(key).map_or(Chain::EMPTY, chain_of)
    }

    /// Entries on all lists of a level, counted list by list: for checks.
    pub(crate) fn recount(&self, level: Level) -> u64 {
        let mut entries = 0;
        for space in (0..).take(SPACES) {
            let mut at = Gfn::new(0);
            while let Some(gfn) = self.rmaps.next(space, level, at, Gfn::new(u64::MAX)) {
                entries += u64::from(self.len(RmapKey { space, level, gfn }));
                at = gfn.align_down(level).saturating_add(level.pages());
            }
        }
        entries
    }

    /// Entries on all lists of a level.
    #[must_use]
    pub fn mapped(&self, level: Level) -> u64 {
        self.mapped.get(level.slot()).copied().unwrap_or(0)
    }

    /// Descriptors on lists.
    #[must_use]
    pub const fn descriptors(&self) -> u32 {
        self.descs.in_use()
    }
}

/// What a list says to the writer.
fn chain_of(head: &AtomicU64) -> Chain {
    // ORDERING[rmap-lock]: Relaxed. Only the writer, borrowed by who asks, changes it but for the
    // bit lock, which `from_word` leaves out.
    Chain::from_word(head.load(Ordering::Relaxed))
}

/// Replace a list by what `change` makes of it, under its lock; gives the new one.
fn replace<E>(
    rmaps: &Rmaps,
    head: &AtomicU64,
    change: impl FnOnce(Chain) -> Result<Chain, E>,
) -> Result<Chain, E> {
    // ORDERING[rmap-lock]: Relaxed. Only the writer, whose borrow `change` holds, changes more than
    // the lock bit.
    let old = Chain::from_word(head.load(Ordering::Relaxed));
    if old.is_empty() {
        let new = change(old)?;
        // ORDERING[rmap-lock]: Release. Pairs with the Acquire in `lock`. An empty list is never
        // locked, so nobody else stores here.
        head.store(new.word(), Ordering::Release);
        return Ok(new);
    }
    let held = take(rmaps, head, old);
    match change(old) {
        Ok(new) => {
            held.release(new);
            Ok(new)
        }
        Err(error) => {
            held.release(old);
            Err(error)
        }
    }
}

/// The writer's hold on a list that it is about to change.
struct Held<'a>(&'a AtomicU64);

/// Take the bit lock of a list whose word is `old` but for the lock.
fn take<'a>(rmaps: &Rmaps, head: &'a AtomicU64, old: Chain) -> Held<'a> {
    if mmu_core::busted!("list_changed_without_its_lock") {
        return Held(head);
    }
    let mut backoff = Backoff::new();
    let locked = old.word() | LOCKED;
    // ORDERING[rmap-lock]: Acquire. Pairs with the Release in `RmapGuard::drop`: the reads of who
    // held it before come before our writes.
    while head.compare_exchange(old.word(), locked, Ordering::Acquire, Ordering::Relaxed).is_err() {
        backoff.wait(rmaps.give_up_cpu);
    }
    Held(head)
}

impl Held<'_> {
    fn release(self, new: Chain) {
        // ORDERING[rmap-lock]: Release. Pairs with the Acquire in `lock`: descriptors are complete.
        self.0.store(new.word(), Ordering::Release);
    }
}
