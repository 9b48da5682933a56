//! The walk itself: down one dimension of tables, the same for every format.
//!
//! Owns [`descend`]. Each entry is read once an attempt, checked on the way down, and kept;
//! permissions are decided at the end; then accessed and dirty bits are set by compare-exchange,
//! top to leaf (KVM row 4.11). An exchange that is lost starts the walk over, a bounded number of
//! times. What the addresses of tables themselves need is [`Beneath`]'s: nothing, or a walk of
//! another dimension. No locks.

use arrayvec::ArrayVec;

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Gpa, Level, PAGE_SIZE};

use super::memory::{Exchange, GuestMem};
use super::permit::{Operation, Request};
use super::rules::Rules;
use super::walk::{Cause, Dirtiness, GuestEntry, MAX_WALK_LEVELS, NestedFault, WalkPath};

/// Attempts before a walk gives the vCPU back to the guest. Each lost one means that another CPU
/// has changed an entry, so the guest as a whole moves on.
pub const MAX_ATTEMPTS: u32 = 8;

/// Where tables stand: the dimension below.
pub(super) trait Beneath {
    /// What is kept of the place of an entry until it may be changed.
    type Place: Copy;

    /// Where memory has the table entry at `gpa`.
    fn locate<M: GuestMem + ?Sized>(&self, mem: &M, gpa: Gpa)
    -> Result<Located<Self::Place>, Stop>;

    /// May an accessed or dirty bit be set there? If not, whose fault that is.
    fn check_write(&self, place: Self::Place) -> Result<(), Stop>;
}

/// Where an entry stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Located<P> {
    /// In the memory that is read.
    pub(super) at: Gpa,
    /// Reads that finding it took.
    pub(super) loads: u32,
    pub(super) place: P,
}

/// Tables stand where their addresses say, and may be changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flat;

impl Beneath for Flat {
    type Place = ();

    #[inline]
    fn locate<M: GuestMem + ?Sized>(&self, _: &M, gpa: Gpa) -> Result<Located<()>, Stop> {
        Ok(Located { at: gpa, loads: 0, place: () })
    }

    #[inline]
    fn check_write(&self, (): ()) -> Result<(), Stop> {
        Ok(())
    }
}

/// Why a walk ended without a page.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stop {
    /// In this dimension.
    Here(Halt),
    /// In the one below.
    Beneath(NestedFault),
    /// Every attempt was lost.
    Contended,
}

/// A fault, before a format gives it a code.
#[derive(Clone, Copy, Debug)]
pub(super) struct Halt {
    pub(super) cause: Cause,
    /// Of the entry that decided.
    pub(super) level: Level,
    /// What the entries together permit, for [`Cause::Permission`].
    pub(super) access: Access,
    /// The protection key forbids it.
    pub(super) key: KeyVerdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyVerdict {
    Permits,
    Forbids,
}

/// Where to begin: the first table, and its level.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    pub(super) table: Gpa,
    pub(super) level: Level,
}

/// A fault that no permission decided.
pub(super) fn halt(cause: Cause, level: Level) -> Stop {
    let (access, key) = (Access::empty(), KeyVerdict::Permits);
    Stop::Here(Halt { cause, level, access, key })
}

/// One attempt's findings, before it is known to hold.
struct Attempt<P> {
    path: WalkPath,
    /// Beside the entries of `path`.
    places: ArrayVec<P, MAX_WALK_LEVELS>,
}

/// Walk from `start` to the page of `address` (invariant I19).
pub(super) fn descend<M: GuestMem + ?Sized, B: Beneath>(
    rules: &Rules,
    mem: &M,
    beneath: &B,
    start: Start,
    address: u64,
    request: Request,
) -> Result<WalkPath, Stop> {
    for attempts in 1..=MAX_ATTEMPTS {
        let mut attempt = read_down(rules, mem, beneath, start, address)?;
        let operation = request.operation;
        if mmu_core::busted!("mark_before_check") {
            let _ = mark(rules, mem, beneath, &mut attempt, address, operation)?;
        }
        check(rules, &attempt.path, request)?;
        if mark(rules, mem, beneath, &mut attempt, address, operation)? == Exchange::Lost {
            continue;
        }
        let mut path = attempt.path;
        path.attempts = attempts;
        // INVARIANT[I19]: each level once, from the first table down to the page.
        debug_assert!(
            path.entries.first().map(|entry| entry.level) == Some(start.level)
                && path.entries.last().map(|entry| entry.level) == Some(path.level)
                && path.entries.windows(2).all(|two| matches!(two, [upper, lower]
                    if upper.level.below() == lower.level)),
            "a walk of {address:#x} read {:?}",
            path.entries
        );
        return Ok(path);
    }
    Err(Stop::Contended)
}

/// Read entries down to the leaf, each once.
#[inline]
fn read_down<M: GuestMem + ?Sized, B: Beneath>(
    rules: &Rules,
    mem: &M,
    beneath: &B,
    start: Start,
    address: u64,
) -> Result<Attempt<B::Place>, Stop> {
    let mut entries = ArrayVec::new();
    let mut places = ArrayVec::new();
    let (mut level, mut table, mut above) = (start.level, start.table, Access::ALL);
    let mut loads = 0;
    // The level strictly falls, and what is read at level 1 is a leaf.
    loop {
        let found = beneath.locate(mem, rules.entry_at(table, level, address))?;
        let read = mem.read(found.at, rules.width);
        let value = read.map_err(|_| halt(Cause::NotMemory, level))?;
        loads += found.loads + 1;
        if !rules.is_present(value) {
            return Err(halt(Cause::NotPresent, level));
        }
        if rules.is_rejected(level, value) {
            return Err(halt(Cause::Reserved, level));
        }
        entries.push(GuestEntry { gpa: found.at, level, width: rules.width, above, value });
        places.push(found.place);
        above &= rules.access(value);
        if rules.is_leaf(level, value) {
            let gfn = rules.frame(level, value, address);
            return Ok(Attempt { path: path(rules, entries, gfn, level, above, loads), places });
        }
        table = rules.table(value);
        level = level.below();
    }
}

#[inline]
fn path(
    rules: &Rules,
    entries: ArrayVec<GuestEntry, MAX_WALK_LEVELS>,
    gfn: Gfn,
    level: Level,
    access: Access,
    loads: u32,
) -> WalkPath {
    let dirty = rules.dirtiness(entries.last().map_or(0, |leaf| leaf.value));
    WalkPath { entries, gfn, level, access, dirty, loads, attempts: 1 }
}

/// Do the entries together permit the request (KVM rows 4.9 and 4.10)?
#[inline]
fn check(rules: &Rules, path: &WalkPath, request: Request) -> Result<(), Stop> {
    let mut key = KeyVerdict::Permits;
    if rules.keys && path.access.contains(Access::USER) {
        let leaf = path.entries.last().map_or(0, |leaf| leaf.value);
        if request.key_forbids(Rules::key(leaf)) {
            key = KeyVerdict::Forbids;
        }
    }
    if key == KeyVerdict::Forbids || rules.permit.forbids(request, path.access) {
        let (cause, level, access) = (Cause::Permission, path.level, path.access);
        return Err(Stop::Here(Halt { cause, level, access, key }));
    }
    Ok(())
}

/// Set what the processor would set. [`Exchange::Lost`] when an entry has changed since it was
/// read; bits set before that stay, as with a processor.
#[inline]
fn mark<M: GuestMem + ?Sized, B: Beneath>(
    rules: &Rules,
    mem: &M,
    beneath: &B,
    attempt: &mut Attempt<B::Place>,
    address: u64,
    operation: Operation,
) -> Result<Exchange, Stop> {
    let path = &mut attempt.path;
    let leaf_level = path.level;
    for (entry, place) in path.entries.iter_mut().zip(&attempt.places) {
        let dirties = entry.level == leaf_level && operation == Operation::Write;
        let wanted = rules.accessed | if dirties { rules.dirty } else { 0 };
        if entry.value & wanted == wanted {
            continue;
        }
        beneath.check_write(*place)?;
        if dirties && rules.logs_dirty && entry.value & rules.dirty == 0 {
            // Before the bit is set: a page that is dirty and not in the log would be lost.
            let page = Gpa::new(address & !(PAGE_SIZE - 1));
            mem.log_dirty(page).map_err(|_| halt(Cause::LogFull, entry.level))?;
        }
        let new = entry.value | wanted;
        match mem.compare_exchange(entry.gpa, entry.width, entry.value, new) {
            Ok(Exchange::Done) => {
                entry.value = new;
                if dirties {
                    path.dirty = Dirtiness::Dirty;
                }
            }
            Ok(Exchange::ReadOnly) => {}
            Ok(Exchange::Lost) if mmu_core::busted!("skip_walk_restart") => {}
            Ok(Exchange::Lost) => return Ok(Exchange::Lost),
            Err(_) => return Err(halt(Cause::NotMemory, entry.level)),
        }
    }
    Ok(Exchange::Done)
}
