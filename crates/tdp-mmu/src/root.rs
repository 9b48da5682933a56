//! Roots: shared by role, counted, invalidated at once, given back behind the vCPUs' backs.
//!
//! Owns `Roots` (the list: a fixed array, so finding a root follows no pointer that could dangle),
//! [`TdpMmu::invalidate_roots`] and its handle [`ZapAll`] (KVM rows 3.1 to 3.6).
//!
//! Life of a root: made with two references (the vCPU's and the MMU's own) -> shared by every vCPU
//! of the same role -> *invalid*: faults on it retry, vCPUs load another, unmaps still visit it ->
//! *quiet*: every vCPU has left it, unmaps skip it -> *ready*: every section that could see it has
//! ended -> *claimed*: its tree belongs to one thread, which gives the tables back -> the last
//! reference goes, and its frame too.
//!
//! Locking: the state word of each root is changed by compare-exchange; making a root takes a spin
//! lock (a leaf). Nothing here is on the path of a fault but one load.

use core::fmt;
use core::ops::Range;

use arrayvec::ArrayVec;

use mmu_core::addr::{Gfn, Level, Pfn, to_index, to_u64};
use mmu_core::flush::{FlushDebt, FlushScope};
use mmu_core::frame::{FrameList, OutOfFrames};
use mmu_core::role::RootRole;
use mmu_core::spin::SpinLock;
use mmu_core::spte::{Spte, SpteFormat};
use mmu_core::stats::{Counter, StatsShard};
use mmu_core::sync::{AtomicU64, Ordering, plain};
use mmu_core::trace::Event;
use mmu_core::traits::Host;
use mmu_core::vm::Actor;

use crate::harvest::{Harvested, harvest_table};
use crate::mmu::TdpMmu;
use crate::zap::{ZapReport, count_gone};

/// Roots that may exist at once, invalid ones included. A VM has one per role; the rest is room for
/// zap-alls that follow each other faster than their tables are given back, or than vCPUs drop what
/// they keep: each holds up to four roots, all of them valid after it loaded one.
pub const MAX_ROOTS: usize = if cfg!(loom) { 3 } else { 64 };

const IN_USE: u64 = 1 << 0;
const INVALID: u64 = 1 << 1;
const QUIET: u64 = 1 << 2;
const READY: u64 = 1 << 3;
const CLAIMED: u64 = 1 << 4;
const COUNT_SHIFT: u32 = 8;
const COUNT_ONE: u64 = 1 << COUNT_SHIFT;
const COUNT_MASK: u64 = 0xff_ffff << COUNT_SHIFT;
const ROLE_SHIFT: u32 = 32;
const ROLE_MASK: u64 = 0xffff << ROLE_SHIFT;
/// Above: how often the slot was reused, so that a pending zap-all recognises its roots.
const REUSE_ONE: u64 = 1 << 48;

/// One root: a state word (flags, reference count, role, reuse count) and its frame.
struct RootSlot {
    state: AtomicU64,
    /// Frame of the root table. Written before the state says `IN_USE`.
    frame: plain::AtomicU64,
}

/// Which roots a lookup wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RootFilter {
    /// Valid ones: faults, aging, lookups.
    Valid,
    /// All whose tree may still be walked by a vCPU: valid, or invalid and not quiet yet.
    InUse,
}

/// A root as found; valid at the moment of the lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FoundRoot {
    pub(crate) frame: Pfn,
    pub(crate) role: RootRole,
}

/// A vCPU's reference to a root. Released by [`Roots::put`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RootRef {
    index: usize,
    pub(crate) frame: Pfn,
    pub(crate) role: RootRole,
}

/// All roots of an MMU.
pub(crate) struct Roots {
    slots: [RootSlot; MAX_ROOTS],
    /// One past the highest slot ever used: how far lookups go. Never falls; changed under `lock`.
    reach: plain::AtomicU64,
    lock: SpinLock,
}

fn role_of(state: u64) -> RootRole {
    RootRole::from_word(u32::try_from((state & ROLE_MASK) >> ROLE_SHIFT).unwrap_or(0))
}

/// Names one life of a root slot: its index and reuse count.
///
/// Small, because a zap-all carries one for every root there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RootId {
    index: u8,
    reuse: u16,
}

impl RootId {
    #[inline]
    fn new(index: usize, state: u64) -> Self {
        let reuse = u16::try_from(state / REUSE_ONE).unwrap_or(0);
        Self { index: u8::try_from(index).unwrap_or(u8::MAX), reuse }
    }

    fn index(self) -> usize {
        usize::from(self.index)
    }
}

static_assertions::const_assert!(MAX_ROOTS <= 255 && REUSE_ONE == 1 << 48);

impl Roots {
    pub(crate) fn new(give_up_cpu: fn()) -> Self {
        let slot = |_| RootSlot { state: AtomicU64::new(0), frame: plain::AtomicU64::new(0) };
        Self {
            slots: core::array::from_fn(slot),
            reach: plain::AtomicU64::new(0),
            lock: SpinLock::new(give_up_cpu),
        }
    }

    /// One past the highest index that may be a root: lookups of one gfn in few roots should not
    /// pay for all that could exist.
    #[inline]
    pub(crate) fn reach(&self) -> usize {
        // ORDERING[root-frame]: Relaxed. Pairs with the store in `insert`. A root whose making
        // happens before this call lies within reach; others need not be found.
        to_index(self.reach.load(plain::Ordering::Relaxed))
    }

    /// Frame and role of root `index` if it passes the filter. Call inside a section: invalidation
    /// drains the sections that saw a root valid before its tree is taken apart.
    #[inline]
    pub(crate) fn get(&self, index: usize, filter: RootFilter) -> Option<FoundRoot> {
        let slot = self.slots.get(index)?;
        // ORDERING[root-state]: Acquire. Pairs with the Release of the change that made the root:
        // its frame number and its table are initialised.
        let state = slot.state.load(Ordering::Acquire);
        let unwanted = match filter {
            RootFilter::Valid => INVALID,
            RootFilter::InUse => QUIET,
        };
        if state & IN_USE == 0 || state & unwanted != 0 {
            return None;
        }
        Some(FoundRoot { frame: slot.frame(), role: role_of(state) })
    }

    /// May a vCPU still fault on this root? One load of a line that is written only when roots
    /// are made, dropped or invalidated.
    #[inline]
    pub(crate) fn is_valid(&self, root: &RootRef) -> bool {
        // ORDERING[root-state]: Acquire. Pairs with the AcqRel of `invalidate_all`.
        let state = self.slots.get(root.index).map(|s| s.state.load(Ordering::Acquire));
        state.is_some_and(|state| state & (IN_USE | INVALID) == IN_USE)
    }

    /// A reference to the valid root of `role`, if there is one.
    fn find(&self, role: RootRole) -> Option<RootRef> {
        self.slots.iter().take(self.reach()).enumerate().find_map(|(index, slot)| {
            // ORDERING[root-state]: Acquire. As in `get`.
            let mut state = slot.state.load(Ordering::Acquire);
            // Bounded: each turn means that another vCPU took or dropped a reference.
            while state & (IN_USE | INVALID) == IN_USE && role_of(state) == role {
                // ORDERING[root-state]: AcqRel. Orders our use of the root after its making and
                // before our `put`.
                match slot.state.compare_exchange(
                    state,
                    state + COUNT_ONE,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                ) {
                    Ok(_) => return Some(RootRef { index, frame: slot.frame(), role }),
                    Err(now) => state = now,
                }
            }
            None
        })
    }

    /// Make `frame`, an empty table, the root of `role`, unless another thread was faster.
    fn insert(&self, role: RootRole, frame: Pfn) -> Result<Inserted, RootError> {
        let _lock = self.lock.lock();
        if let Some(root) = self.find(role) {
            return Ok(Inserted::Existing(root));
        }
        // ORDERING[root-state]: Relaxed. A slot leaves state 0 under the lock only.
        let free = |slot: &RootSlot| slot.state.load(Ordering::Relaxed) & IN_USE == 0;
        let Some(index) = self.slots.iter().position(free) else {
            return Err(RootError::TooManyRoots { max: MAX_ROOTS });
        };
        if let Some(slot) = self.slots.get(index) {
            let reach = to_u64(self.reach().max(index + 1));
            // ORDERING[root-frame]: Relaxed. Published by the Release below: who has to know of
            // this root knows that it lies within reach.
            self.reach.store(reach, plain::Ordering::Relaxed);
            // ORDERING[root-frame]: Relaxed. Published by the Release below.
            slot.frame.store(frame.get(), plain::Ordering::Relaxed);
            let role = u64::from(role.word()) << ROLE_SHIFT & ROLE_MASK;
            // ORDERING[root-state]: Relaxed. Free slots change under the lock only.
            let reuse = slot.state.load(Ordering::Relaxed) & !(REUSE_ONE - 1);
            let reuse = reuse.wrapping_add(REUSE_ONE);
            // ORDERING[root-state]: Release. Pairs with the Acquire in `get`, `find`, `is_valid`.
            slot.state.store(IN_USE | (2 * COUNT_ONE) | role | reuse, Ordering::Release);
        }
        Ok(Inserted::New(RootRef { index, frame, role }))
    }

    /// Drop one reference. Returns the frame when it was the last one, which happens to invalid
    /// roots only (KVM row 3.2).
    fn put(&self, index: usize) -> Option<Pfn> {
        let slot = self.slots.get(index)?;
        // ORDERING[root-state]: AcqRel. The last put happens after all uses before other puts.
        let state = slot.state.fetch_sub(COUNT_ONE, Ordering::AcqRel);
        debug_assert!(state & COUNT_MASK != 0, "root reference dropped twice");
        if state & COUNT_MASK != COUNT_ONE {
            return None;
        }
        debug_assert!(state & QUIET != 0, "last reference to a root in use (row 3.2)");
        let frame = slot.frame();
        // ORDERING[root-state]: Release. Pairs with the load in `insert`, which reuses the slot.
        slot.state.store(state & !(REUSE_ONE - 1), Ordering::Release);
        Some(frame)
    }

    /// Change root `index` by `next` as long as that gives a value; the last state it replaced.
    fn update(&self, index: usize, next: impl Fn(u64) -> Option<u64>) -> Option<u64> {
        let slot = self.slots.get(index)?;
        // ORDERING[root-state]: Acquire. As in `get`.
        let mut state = slot.state.load(Ordering::Acquire);
        loop {
            let new = next(state)?;
            // ORDERING[root-state]: AcqRel. Pairs with the Acquire loads of `get` and `is_valid`.
            match slot.state.compare_exchange(state, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(state),
                Err(now) => state = now,
            }
        }
    }

    /// Set `set` on root `index` if it has all of `all` and none of `none`.
    fn mark(&self, index: usize, all: u64, none: u64, set: u64) -> bool {
        let fits = |state: u64| state & all == all && state & none == 0;
        self.update(index, |state| fits(state).then_some(state | set)).is_some()
    }

    /// These roots become invalid, and nothing else happens yet.
    pub(crate) fn invalidate(&self, roots: Range<usize>) {
        for index in roots {
            self.mark(index, IN_USE, INVALID, INVALID);
        }
    }

    /// Roots that are invalid and not quiet.
    fn invalid(&self) -> Pending {
        let name = |(index, slot): (usize, &RootSlot)| {
            // ORDERING[root-state]: Acquire. As in `get`.
            let state = slot.state.load(Ordering::Acquire);
            let invalid = state & (IN_USE | INVALID | QUIET) == IN_USE | INVALID;
            invalid.then_some(RootId::new(index, state))
        };
        self.slots.iter().take(self.reach()).enumerate().filter_map(name).collect()
    }

    /// Set `set` on root `id`, if it still lives.
    fn promote(&self, id: RootId, set: u64) {
        let index = id.index();
        let _ = self.update(index, |state| {
            let same = RootId::new(index, state) == id;
            (state & (IN_USE | INVALID) == IN_USE | INVALID && same).then_some(state | set)
        });
    }

    /// Give a claim up, so that another thread may go on with the root.
    fn unclaim(&self, index: usize) {
        if let Some(slot) = self.slots.get(index) {
            // ORDERING[root-state]: AcqRel. The next claimer sees which entries were emptied.
            slot.state.fetch_and(!CLAIMED, Ordering::AcqRel);
        }
    }
}

impl RootSlot {
    #[inline]
    fn frame(&self) -> Pfn {
        // ORDERING[root-frame]: Relaxed. Ordered by the Acquire load of the state.
        Pfn::new(self.frame.load(plain::Ordering::Relaxed))
    }
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = (0..self.reach()).filter_map(|index| self.get(index, RootFilter::InUse));
        f.debug_list().entries(used).finish()
    }
}

enum Inserted {
    New(RootRef),
    Existing(RootRef),
}

/// A root could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RootError {
    /// No frame for the root table.
    OutOfFrames(OutOfFrames),
    /// All roots exist: finish the zap-alls that are pending ([`ZapAll::finish`]), or let vCPUs
    /// load their roots so that invalid ones are dropped.
    TooManyRoots {
        /// [`MAX_ROOTS`].
        max: usize,
    },
    /// The VM has fewer address spaces.
    NoSuchSpace {
        /// The one asked for.
        space: u8,
        /// How many there are.
        spaces: u16,
    },
}

impl fmt::Display for RootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfFrames(error) => error.fmt(f),
            Self::TooManyRoots { max } => {
                write!(f, "all {max} roots exist; finish pending zap-alls")
            }
            Self::NoSuchSpace { space, spaces } => {
                write!(f, "address space {space} is none of the VM's {spaces}")
            }
        }
    }
}

impl core::error::Error for RootError {}

impl<F: SpteFormat, H: Host> TdpMmu<F, H> {
    /// A reference to the root of `role`, made if there is none.
    pub(crate) fn root(&self, actor: &mut Actor<H>, role: RootRole) -> Result<RootRef, RootError> {
        if let Some(root) = self.roots().find(role) {
            return Ok(root);
        }
        actor.top_up(1).map_err(RootError::OutOfFrames)?;
        let Some(frame) = actor.take_frame() else {
            return Err(RootError::OutOfFrames(OutOfFrames { wanted: 1, found: 0, waiting: 0 }));
        };
        self.vm().pool().set_place(frame, Gfn::new(0), role.level());
        match self.roots().insert(role, frame) {
            Ok(Inserted::New(root)) => {
                actor.stats().inc(Counter::Tables);
                self.vm().trace(|| Event::RootMade { frame, space: role.space() });
                Ok(root)
            }
            Ok(Inserted::Existing(root)) => {
                actor.put_frame(frame);
                Ok(root)
            }
            Err(error) => {
                actor.put_frame(frame);
                Err(error)
            }
        }
    }

    /// Drop a reference; the root's frame is given back with the last one.
    pub(crate) fn put_root(&self, stats: &StatsShard, root: RootRef) {
        self.put_root_index(stats, root.index);
    }

    fn put_root_index(&self, stats: &StatsShard, index: usize) {
        if let Some(frame) = self.roots().put(index) {
            count_gone(stats);
            let mut frames = FrameList::new();
            frames.push(self.vm().host(), frame);
            // No flush: whoever held the reference has loaded another root since (row 0.2.6). No
            // grace period: whoever could find the root without one was waited for before its tree
            // was taken apart.
            self.vm().pool().give_back(frames);
            self.vm().trace(|| Event::RootFreed { frame });
        }
    }

    /// Drop every mapping of every root, at once: roots become invalid, vCPUs are asked to leave
    /// the guest and load their roots again. Takes O(roots) and waits for nobody (KVM row 3.36).
    ///
    /// Until [`ZapAll::finish`] (or enough [`ZapAll::step`]s) the tables are not given back, and
    /// vCPUs that have not left yet may still use the old mappings. A mirror stays as it is.
    #[doc(alias = "kvm_mmu_zap_all_fast")]
    pub fn invalidate_roots(&self, actor: &mut Actor<H>) -> ZapAll<'_, F, H> {
        self.assert_own(actor);
        self.roots().invalidate(self.changeable_roots());
        // Before the reload is requested: only these may become quiet by it.
        let pending = self.roots().invalid();
        self.vm().trace(|| Event::RootsInvalidated { pending: to_u64(pending.len()) });
        let debt = FlushDebt::new();
        let ticket = (!pending.is_empty()).then(|| {
            actor.stats().inc(Counter::FlushRequests);
            self.vm().request(&debt, FlushScope::Reload)
        });
        drop(debt);
        let report = ZapReport::default();
        ZapAll { mmu: self, pending, ticket, current: None, report }
    }
}

type Pending = ArrayVec<RootId, MAX_ROOTS>;

/// A zap-all whose visible part is over: the tables of invalid roots, to be given back in slices.
///
/// Dropping it early loses nothing: the next zap-all of this MMU goes on where it stopped.
#[must_use = "tables are given back by step or finish"]
pub struct ZapAll<'m, F: SpteFormat, H: Host> {
    mmu: &'m TdpMmu<F, H>,
    /// Roots that become quiet when `ticket` is complete.
    pending: Pending,
    /// The reload that was requested and not waited for.
    ticket: Option<H::Ticket>,
    current: Option<Harvest>,
    report: ZapReport,
}

/// A root that is being taken apart: the tables from the root down to the one being emptied, with
/// the next entry of each. An entry is emptied after what it leads to, so whoever takes over from
/// the root finds all that is left and nothing twice.
#[derive(Debug)]
struct Harvest {
    root: usize,
    stack: ArrayVec<(Pfn, Level, usize), 5>,
}

/// Progress of a zap-all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZapProgress {
    /// There is more to do.
    Pending,
    /// Every invalid root's tables are given back.
    Done,
}

impl<F: SpteFormat, H: Host> ZapAll<'_, F, H> {
    /// Do a slice: at most `tables` tables are taken apart. The first call waits until every vCPU
    /// has left the invalid roots.
    pub fn step(&mut self, actor: &mut Actor<H>, tables: usize) -> ZapProgress {
        self.mmu.assert_own(actor);
        self.quiesce(actor);
        let mut left = tables.max(1);
        while left > 0 {
            let Some(mut harvest) = self.current.take().or_else(|| self.claim()) else {
                return ZapProgress::Done;
            };
            let frames = self.take_apart(&mut harvest, actor.stats(), &mut left);
            // Nobody can reach these: the tree has been quiet since before it was claimed.
            actor.vm().pool().give_back(frames);
            if harvest.stack.is_empty() {
                self.mmu.put_root_index(actor.stats(), harvest.root);
            } else {
                self.current = Some(harvest);
            }
        }
        ZapProgress::Pending
    }

    /// Do all of it. Returns what was mapped, this call's and earlier steps'.
    pub fn finish(mut self, actor: &mut Actor<H>) -> ZapReport {
        while self.step(actor, usize::MAX) == ZapProgress::Pending {}
        self.report
    }

    /// What has been taken out so far.
    pub fn report(&self) -> ZapReport {
        self.report
    }

    /// Wait until the pending roots are quiet.
    fn quiesce(&mut self, actor: &mut Actor<H>) {
        let Some(ticket) = self.ticket.take() else { return };
        // After this no vCPU walks the trees. Faults that found a root valid may be installing
        // entries; they are waited for below.
        if !mmu_core::busted!("zap_all_without_reload") {
            self.mmu.vm().host().wait(ticket);
        }
        if !mmu_core::busted!("zap_all_forgets_dirty") {
            self.mmu.roots_gone(actor);
        }
        for &id in &self.pending {
            self.mmu.roots().promote(id, QUIET);
        }
        // Unmaps visit roots that are not quiet, faults such as they found valid; after this none
        // is inside. An unmap that skips a quiet root skips what such a fault puts there, and
        // may: nobody runs on it any more.
        if !mmu_core::busted!("zap_all_without_drain") {
            actor.participant().synchronize();
        }
        for id in core::mem::take(&mut self.pending) {
            self.mmu.roots().promote(id, READY);
        }
    }

    /// The next ready root that nobody takes apart.
    fn claim(&self) -> Option<Harvest> {
        let roots = self.mmu.roots();
        let all = IN_USE | INVALID | QUIET | READY;
        let root = (0..roots.reach()).find(|&index| roots.mark(index, all, CLAIMED, CLAIMED))?;
        let slot = roots.slots.get(root)?;
        // ORDERING[root-state]: Relaxed. Ordered by the AcqRel of the claim.
        let role = role_of(slot.state.load(Ordering::Relaxed));
        let mut stack = ArrayVec::new();
        stack.push((slot.frame(), role.level(), 0));
        Some(Harvest { root, stack })
    }

    /// Take tables apart, lowest first, until `left` is used up or the root is empty. Returns the
    /// frames below the root that are free now.
    fn take_apart(
        &mut self,
        harvest: &mut Harvest,
        stats: &StatsShard,
        left: &mut usize,
    ) -> FrameList {
        let pool = self.mmu.vm().pool();
        let config = self.mmu.config();
        let mut frames = FrameList::new();
        while *left > 0 {
            let Some(&(frame, level, next)) = harvest.stack.last() else { break };
            let mut found = Harvested::default();
            let link = harvest_table(config, pool.owned_table(frame), level, next, &mut found);
            found.count(stats);
            self.report.merge(&found.report);
            if let (Some((index, child)), Some(below)) = (link, level.down()) {
                if let Some(top) = harvest.stack.last_mut() {
                    top.2 = index;
                }
                harvest.stack.push((child, below, 0));
                continue;
            }
            harvest.stack.pop();
            *left -= 1;
            if let Some((parent, _, index)) = harvest.stack.last_mut() {
                if let Some(cell) = pool.owned_table(*parent).entries().get(*index) {
                    cell.init(Spte::EMPTY);
                }
                *index += 1;
                self.report.tables += 1;
                count_gone(stats);
                crate::nx::forget(pool, stats, frame);
                frames.push(pool.map(), frame);
            }
        }
        frames
    }
}

impl<F: SpteFormat, H: Host> Drop for ZapAll<'_, F, H> {
    fn drop(&mut self) {
        // The ticket of an unfinished reload is lost with us; the roots stay invalid, and the next
        // zap-all requests a reload for them again.
        if let Some(harvest) = self.current.take() {
            self.mmu.roots().unclaim(harvest.root);
        }
    }
}

impl<F: SpteFormat, H: Host> fmt::Debug for ZapAll<'_, F, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZapAll")
            .field("pending", &self.pending)
            .field("current", &self.current)
            .field("report", &self.report)
            .finish_non_exhaustive()
    }
}
