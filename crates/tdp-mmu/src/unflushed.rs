//! What was aged without a complete flush: what TLBs may still hide, and which upper entries may
//! not be believed.
//!
//! Owns [`Unflushed`]. A CPU that cached a translation does not set the accessed bit again, so a
//! precise pass that only flushed what it cleared itself would go on missing accesses: it asks here
//! what else is [`due`](Unflushed::due). And a CPU that cached an upper entry goes past it: a clear
//! bit there is worth something only if a flush completed after it was cleared. So this keeps, for
//! leaves and for the links of each level, the hull of what was cleared and not flushed, and the
//! ranges of the calls that are clearing now; what touches neither is believed
//! ([`Unflushed::trusts`]).
//!
//! Written by agers only; faults never look at it. Changes are made under a spin lock (a leaf);
//! two words are read without it.

use mmu_core::addr::{Gfn, GfnRange, Level};
use mmu_core::spin::{SpinGuard, SpinLock};
use mmu_core::sync::{AtomicU64, Ordering, plain};
use mmu_core::traits::{AgeMode, Effort};

/// Hulls: of leaves, whatever their size, and of links by level.
const HULLS: usize = 5;
/// Calls that may clear links at the same time. More may run; they leave links alone.
const WORKERS: usize = 8;

/// A range of gfns, protected by the lock of its owner.
#[derive(Debug)]
struct Hull {
    start: plain::AtomicU64,
    end: plain::AtomicU64,
}

/// What was cleared and not flushed, in hulls under a lock of their own (a leaf).
#[derive(Debug)]
pub(crate) struct Unflushed {
    lock: SpinLock,
    /// Cleared by calls that are over, and not flushed since.
    hulls: [Hull; HULLS],
    /// Ranges in which calls are clearing links; empty where there is none.
    workers: [Hull; WORKERS],
    /// Calls begun that clear; a precise pass forgets hulls only if none began while it flushed.
    begun: plain::AtomicU64,
    /// Those of them that are not over and will take the lock to say so.
    clearing: plain::AtomicU64,
    /// Those that will not take it.
    fast: AtomicU64,
    /// Calls begun that clear links.
    passes: AtomicU64,
}

/// What a precise pass must flush, and what it may forget when the flush is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) range: GfnRange,
    /// All of the call's range, of which hulls may be cut.
    done: GfnRange,
    begun: u64,
    /// Nobody was clearing when this was asked.
    quiet: bool,
}

/// What a call does to links on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Links {
    /// They are neither believed nor cleared.
    Ignore,
    /// They are believed where that is right.
    Believe,
    /// And cleared.
    Clear,
}

/// A call that ages: what it may believe of upper entries, and what it cleared of them.
#[derive(Debug)]
#[must_use = "an ager that began has to end"]
pub(crate) struct Pass {
    mode: AgeMode,
    effort: Effort,
    /// Its place among the workers, if it clears links.
    worker: Option<usize>,
    /// What others cleared without a flush, as of `seen` calls begun.
    hulls: [GfnRange; HULLS],
    others: [GfnRange; WORKERS],
    seen: u64,
    /// The links that this call cleared, by level; at level 1, leaves that reach out of its range.
    cleared: [GfnRange; HULLS],
}

impl Pass {
    /// May it clear links?
    pub(crate) const fn clears_links(&self) -> bool {
        self.worker.is_some()
    }

    /// A link at `level` was cleared; or, at level 1, a leaf that reaches out of the call's range.
    pub(crate) fn note(&mut self, range: GfnRange, level: Level) {
        if let Some(hull) = self.cleared.get_mut(level.slot()) {
            *hull = join(*hull, range);
        }
    }
}

impl Hull {
    const fn new() -> Self {
        Self { start: plain::AtomicU64::new(0), end: plain::AtomicU64::new(0) }
    }

    fn get(&self, _lock: &SpinGuard<'_>) -> GfnRange {
        // ORDERING[unflushed]: Relaxed. Protected by the lock.
        let word = |atom: &plain::AtomicU64| Gfn::new(atom.load(plain::Ordering::Relaxed));
        GfnRange::new(word(&self.start), word(&self.end))
    }

    fn set(&self, _lock: &SpinGuard<'_>, range: GfnRange) {
        // ORDERING[unflushed]: Relaxed. Protected by the lock; pairs with `get`.
        self.start.store(range.start.get(), plain::Ordering::Relaxed);
        // ORDERING[unflushed]: Relaxed. As above.
        self.end.store(range.end.get(), plain::Ordering::Relaxed);
    }

    fn add(&self, lock: &SpinGuard<'_>, range: GfnRange) {
        self.set(lock, join(self.get(lock), range));
    }

    /// Forget `range`. What is left must stay one range: only what is cut off at an end goes.
    fn cut(&self, lock: &SpinGuard<'_>, range: GfnRange) {
        let hull = self.get(lock);
        if range.start <= hull.start {
            let start = hull.start.max(range.end);
            self.set(lock, GfnRange::new(start, hull.end.max(start)));
        } else if range.end >= hull.end {
            self.set(lock, GfnRange::new(hull.start, hull.end.min(range.start).max(hull.start)));
        }
    }
}

impl Unflushed {
    pub(crate) fn new(give_up_cpu: fn()) -> Self {
        Self {
            lock: SpinLock::new(give_up_cpu),
            hulls: [const { Hull::new() }; HULLS],
            workers: [const { Hull::new() }; WORKERS],
            begun: plain::AtomicU64::new(0),
            clearing: plain::AtomicU64::new(0),
            fast: AtomicU64::new(0),
            passes: AtomicU64::new(0),
        }
    }

    /// A call over `range` begins; before it reads or clears its first bit. `None` when it is to be
    /// fast and would have to wait. With [`AgeMode::ClearFlush`] the call flushes what it clears
    /// before its [`end`](Self::end).
    pub(crate) fn begin(
        &self,
        range: GfnRange,
        mode: AgeMode,
        links: Links,
        effort: Effort,
    ) -> Option<Pass> {
        let none = [NONE; HULLS];
        let others = [NONE; WORKERS];
        let (worker, seen) = (None, 0);
        let mut pass = Pass { mode, effort, worker, hulls: none, others, seen, cleared: none };
        if mode != AgeMode::Clear && links == Links::Ignore {
            // Neither asks nor tells anything.
            return Some(pass);
        }
        let lock = match effort {
            Effort::Full => self.lock.lock(),
            Effort::Fast => self.lock.try_lock()?,
        };
        if mode == AgeMode::Clear {
            let [leaves, ..] = &self.hulls;
            if !mmu_core::busted!("age_notes_too_late") {
                leaves.add(&lock, if effort == Effort::Fast { with_huge(range) } else { range });
            }
            count(&self.begun, 1);
            match effort {
                Effort::Full => count(&self.clearing, 1),
                Effort::Fast => {
                    // ORDERING[aged-fast]: Relaxed. Under the lock, as is the load in `due`.
                    self.fast.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        if links == Links::Clear {
            pass.worker = self.workers.iter().position(|worker| worker.get(&lock).is_empty());
            if let Some(worker) = pass.worker.and_then(|at| self.workers.get(at)) {
                worker.set(&lock, range);
                // ORDERING[upper-pass]: Release. Before this call clears a link: who finds that
                // link clear (Acquire) finds this count.
                self.passes.fetch_add(1, Ordering::Release);
            }
        }
        self.look(&lock, &mut pass);
        Some(pass)
    }

    /// What others have cleared.
    fn look(&self, lock: &SpinGuard<'_>, pass: &mut Pass) {
        // ORDERING[upper-pass]: Relaxed. Under the lock that every writer of it holds.
        pass.seen = self.passes.load(Ordering::Relaxed);
        for (known, hull) in pass.hulls.iter_mut().zip(&self.hulls) {
            *known = hull.get(lock);
        }
        for (at, (known, worker)) in pass.others.iter_mut().zip(&self.workers).enumerate() {
            *known = if pass.worker == Some(at) { NONE } else { worker.get(lock) };
        }
    }

    /// May the link at `level` that maps `range` be believed, which was just read (Acquire) and
    /// says that nobody walked into it?
    #[inline]
    pub(crate) fn trusts(&self, pass: &mut Pass, range: GfnRange, level: Level) -> bool {
        // ORDERING[upper-pass]: Relaxed. After the Acquire by which the link was read: if somebody
        // cleared it who began since we looked, his count is visible.
        if self.passes.load(Ordering::Relaxed) != pass.seen {
            match pass.effort {
                Effort::Full => self.look(&self.lock.lock(), pass),
                Effort::Fast => match self.lock.try_lock() {
                    Some(lock) => self.look(&lock, pass),
                    None => return false,
                },
            }
        }
        if mmu_core::busted!("trust_unflushed_upper") {
            return true;
        }
        let unflushed = pass.hulls.get(level.slot()).copied().unwrap_or(GfnRange::ALL);
        !overlaps(unflushed, range) && !pass.others.iter().any(|other| overlaps(*other, range))
    }

    /// The call is over.
    pub(crate) fn end(&self, pass: Pass) {
        if pass.mode == AgeMode::Clear && pass.effort == Effort::Fast {
            // ORDERING[aged-fast]: Release. What it cleared comes before; pairs with the Acquire in
            // `due`.
            self.fast.fetch_sub(1, Ordering::Release);
            return;
        }
        if pass.mode != AgeMode::Clear && pass.worker.is_none() {
            return;
        }
        let lock = self.lock.lock();
        if pass.mode == AgeMode::Clear {
            count(&self.clearing, u64::MAX);
            for (hull, cleared) in self.hulls.iter().zip(pass.cleared) {
                hull.add(&lock, cleared);
            }
        }
        if let Some(worker) = pass.worker.and_then(|at| self.workers.get(at)) {
            worker.set(&lock, NONE);
        }
    }

    /// What must be flushed for `range` besides what the caller itself cleared and will flush.
    pub(crate) fn due(&self, range: GfnRange) -> Option<Due> {
        let lock = self.lock.lock();
        let due = self.hulls.iter().map(|hull| hull.get(&lock).intersection(range));
        let due = due.fold(NONE, join);
        // ORDERING[unflushed]: Relaxed. Protected by the lock.
        let load = |atom: &plain::AtomicU64| atom.load(plain::Ordering::Relaxed);
        // ORDERING[aged-fast]: Acquire. Pairs with the Release in `end`: what a fast call cleared
        // that is over is visible before the flush is requested.
        let quiet = load(&self.clearing) == 0 && self.fast.load(Ordering::Acquire) == 0;
        let begun = load(&self.begun);
        (!due.is_empty()).then_some(Due { range: due, done: range, begun, quiet })
    }

    /// The flush of `due` is complete: forget it, unless somebody aged without a flush meanwhile.
    pub(crate) fn flushed(&self, due: Due) {
        let lock = self.lock.lock();
        // ORDERING[unflushed]: Relaxed. Protected by the lock.
        let same = due.quiet && self.begun.load(plain::Ordering::Relaxed) == due.begun;
        if same || mmu_core::busted!("hull_forgets_late_notes") {
            self.hulls.iter().for_each(|hull| hull.cut(&lock, due.done));
        }
    }
}

const NONE: GfnRange = GfnRange::new(Gfn::new(0), Gfn::new(0));

fn join(one: GfnRange, other: GfnRange) -> GfnRange {
    match (one.is_empty(), other.is_empty()) {
        (true, _) => other,
        (_, true) => one,
        _ => one.hull(other),
    }
}

/// `range` with all of the largest leaves that may reach out of it: for who cannot say later which.
fn with_huge(range: GfnRange) -> GfnRange {
    if range.is_empty() {
        return range;
    }
    let level = Level::MAX_LEAF;
    let last = Gfn::new(range.end.get() - 1);
    GfnRange::entry(range.start, level).hull(GfnRange::entry(last, level))
}

fn overlaps(one: GfnRange, other: GfnRange) -> bool {
    !one.intersection(other).is_empty()
}

/// Add to a word that the lock protects.
fn count(atom: &plain::AtomicU64, change: u64) {
    // ORDERING[unflushed]: Relaxed. Protected by the lock, which every caller holds.
    let before = atom.load(plain::Ordering::Relaxed);
    // ORDERING[unflushed]: Relaxed. As above.
    atom.store(before.wrapping_add(change), plain::Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GfnRange {
        GfnRange::new(Gfn::new(start), Gfn::new(end))
    }

    fn begin(all: &Unflushed, over: GfnRange, mode: AgeMode, links: Links) -> Pass {
        all.begin(over, mode, links, Effort::Full).expect("waits")
    }

    /// A call that clears and does not flush, from its begin to its end.
    fn note(all: &Unflushed, over: GfnRange) {
        all.end(begin(all, over, AgeMode::Clear, Links::Ignore));
    }

    /// A precise pass over a range: what it had to flush besides its own.
    fn precise(all: &Unflushed, over: GfnRange) -> Option<GfnRange> {
        let due = all.due(over)?;
        all.flushed(due);
        Some(due.range)
    }

    #[test]
    fn a_precise_pass_is_told_everything_aged_without_a_flush_before_it() {
        let all = Unflushed::new(mmu_core::sync::relax);
        assert_eq!(precise(&all, range(0, 100)), None);
        note(&all, range(10, 20));
        note(&all, range(40, 50));
        assert_eq!(precise(&all, range(0, 30)), Some(range(10, 30)));
        assert_eq!(precise(&all, range(0, 30)), None);
        assert_eq!(precise(&all, range(35, 38)), Some(range(35, 38)), "a hole is kept");
        assert_eq!(precise(&all, range(0, 100)), Some(range(30, 50)));
        assert_eq!(precise(&all, range(0, 100)), None);
    }

    #[test]
    fn nothing_is_forgotten_that_was_cleared_while_the_flush_was_on_its_way() {
        for effort in [Effort::Full, Effort::Fast] {
            let all = Unflushed::new(mmu_core::sync::relax);
            note(&all, range(10, 20));
            let due = all.due(range(0, 100)).expect("noted");
            note(&all, range(10, 20));
            all.flushed(due);
            assert_eq!(precise(&all, range(0, 100)), Some(range(10, 20)), "begun meanwhile");
            let pass = all.begin(range(10, 20), AgeMode::Clear, Links::Ignore, effort);
            let due = all.due(range(0, 100)).expect("noted");
            all.end(pass.expect("free"));
            all.flushed(due);
            // Fast, it cannot say which huge leaves it met.
            let hull = if effort == Effort::Fast { range(0, 100) } else { range(10, 20) };
            assert_eq!(precise(&all, range(0, 100)), Some(hull), "ended meanwhile");
            assert_eq!(precise(&all, range(0, 100)), None);
        }
    }

    #[test]
    fn a_second_precise_pass_flushes_too_while_the_first_is_not_complete() {
        let all = Unflushed::new(mmu_core::sync::relax);
        note(&all, range(10, 20));
        let first = all.due(range(0, 100)).expect("noted");
        assert_eq!(precise(&all, range(0, 100)), Some(range(10, 20)));
        all.flushed(first);
        assert_eq!(precise(&all, range(0, 100)), None);
    }

    /// What a call believes about the link at `level` for `range(first, last)`.
    fn believed(all: &Unflushed, over: GfnRange, level: Level) -> bool {
        let mut pass = begin(all, GfnRange::ALL, AgeMode::Test, Links::Believe);
        let believed = all.trusts(&mut pass, over, level);
        all.end(pass);
        believed
    }

    #[test]
    fn a_cleared_link_is_believed_once_it_is_flushed() {
        let all = Unflushed::new(mmu_core::sync::relax);
        let (block, beside) = (range(512, 1024), range(1024, 1536));
        let mut pass = begin(&all, range(0, 4096), AgeMode::Clear, Links::Clear);
        pass.note(block, Level::L2);
        assert!(all.trusts(&mut pass, beside, Level::L2), "its own work is no reason");
        assert!(!believed(&all, beside, Level::L2), "somebody is at work there");
        all.end(pass);
        assert!(!believed(&all, block, Level::L2), "not flushed");
        assert!(believed(&all, beside, Level::L2) && believed(&all, block, Level::L3));
        assert_eq!(precise(&all, range(0, 1 << 20)), Some(range(0, 4096)), "its leaves too");
        assert!(believed(&all, block, Level::L2));
        // Who flushes before he ends leaves nothing behind.
        let mut pass = begin(&all, range(0, 4096), AgeMode::ClearFlush, Links::Clear);
        pass.note(block, Level::L2);
        assert!(!believed(&all, block, Level::L2));
        all.end(pass);
        assert!(believed(&all, block, Level::L2));
        assert_eq!(precise(&all, range(0, 4096)), None);
    }

    #[test]
    fn who_is_at_work_is_asked_about_those_who_came_later() {
        let all = Unflushed::new(mmu_core::sync::relax);
        let mut first = begin(&all, range(0, 1024), AgeMode::ClearFlush, Links::Clear);
        assert!(all.trusts(&mut first, range(0, 512), Level::L2));
        let second = begin(&all, range(512, 2048), AgeMode::ClearFlush, Links::Clear);
        assert!(all.trusts(&mut first, range(0, 512), Level::L2), "elsewhere");
        assert!(!all.trusts(&mut first, range(512, 1024), Level::L2));
        all.end(second);
        all.end(first);
        // More than there is room for leave links alone.
        let many: [Pass; WORKERS] =
            core::array::from_fn(|_| begin(&all, range(0, 512), AgeMode::ClearFlush, Links::Clear));
        let late = begin(&all, range(0, 512), AgeMode::ClearFlush, Links::Clear);
        assert!(many.iter().all(Pass::clears_links) && !late.clears_links());
        many.into_iter().chain([late]).for_each(|pass| all.end(pass));
        assert!(believed(&all, range(0, 512), Level::L2));
    }

    #[test]
    fn who_is_fast_does_not_wait() {
        let all = Unflushed::new(mmu_core::sync::relax);
        let lock = all.lock.lock();
        let begun = all.begin(range(0, 9), AgeMode::Clear, Links::Ignore, Effort::Fast);
        assert!(begun.is_none());
        let look = all.begin(range(0, 9), AgeMode::Test, Links::Ignore, Effort::Full);
        all.end(look.expect("no lock is needed"));
        drop(lock);
        let pass = all.begin(range(0, 9), AgeMode::Clear, Links::Ignore, Effort::Fast);
        let pass = pass.expect("free");
        let lock = all.lock.lock();
        all.end(pass);
        drop(lock);
        let block = Level::MAX_LEAF.pages();
        assert_eq!(precise(&all, range(0, 2 * block)), Some(range(0, block)));
    }
}
