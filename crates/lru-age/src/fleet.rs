//! [`Fleet`]: whose turn it is, when many VMs share one aging or evicting thread (KVM row 5.34).
//!
//! Three generations of eight bins of VMs. Turns are taken from the oldest generation, from a bin
//! chosen at random on; who has done its share goes to the youngest, who has not waits behind all
//! that are left of this one. A generation is over when its bins are empty, so nobody starts a
//! second round while another waits for its first; the random start keeps several threads, each
//! with its own fleet of the same VMs, from meeting at the same one.
//!
//! A turn is worth so many table entries, more for who weighs more; what a turn did not use or used
//! too much counts in the next. One owner, no lock, nothing allocated after [`Fleet::new`].

use alloc::boxed::Box;
use alloc::vec::Vec;

use mmu_core::addr::{to_index, to_u64};

use crate::AgeError;
use crate::random::Random;

/// Generations of VMs.
const GENS: u64 = 3;
/// Bins of a generation.
const BINS: u64 = 8;
const LISTS: usize = 24;
const _: () = assert!(GENS * BINS == 24, "a list for each bin of each generation");
/// The largest debt or credit, in turns.
const MAX_CARRY: u64 = 4;

/// Names a VM of a fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FleetVm(u32);

/// A turn: what its VM may spend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Turn {
    /// Whose it is.
    pub vm: FleetVm,
    /// The embedder's name for it.
    pub key: u64,
    /// Table entries to read at most, at least 1.
    pub entries: u64,
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There is more to do in this round: it waits behind all others of it (upstream's TAIL).
    More,
    /// Its round is done, or there is nothing to gain: to the youngest generation (YOUNG).
    Finished,
    /// It is over its limit: the next turn is its own again (HEAD).
    Urgent,
    /// It is going away: to the oldest generation, so that it is emptied first (OLD).
    Leaving,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    key: u64,
    /// Entries per turn.
    share: u64,
    /// Entries left over from earlier turns (positive) or owed.
    carry: i64,
    place: Place,
    previous: Option<u32>,
    next: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Never added, or removed.
    Free,
    /// In this list.
    Listed(usize),
    /// Its turn is under way.
    Running,
}

#[derive(Clone, Copy, Debug, Default)]
struct List {
    first: Option<u32>,
    last: Option<u32>,
}

/// Turns among many VMs that share one aging or evicting thread (KVM row 5.34): round robin in
/// rounds, so that nobody starts a second one while another waits for its first; a turn is worth
/// table entries by weight, and what it spent too much or too little counts in the next. One owner,
/// no lock; nothing is allocated after [`Fleet::new`].
#[derive(Debug)]
pub struct Fleet {
    members: Box<[Member]>,
    lists: [List; LISTS],
    random: Random,
    /// The oldest generation, whose turns are given out; the youngest is one above.
    seq: u64,
    /// The bin that turns come from.
    bin: u64,
    /// Bins of this generation found empty in a row.
    empty: u64,
    listed: u64,
}

impl Fleet {
    /// Room for `most` VMs. `seed` decides the order of equals.
    ///
    /// # Errors
    /// [`AgeError::NoMemoryFor`]; also for more than 2^32 - 1.
    pub fn new(most: u64, seed: u64) -> Result<Self, AgeError> {
        let bytes = most.saturating_mul(to_u64(size_of::<Member>()));
        let no_memory = AgeError::NoMemoryFor { bytes };
        if u32::try_from(most).is_err() {
            return Err(no_memory);
        }
        let mut members = Vec::new();
        members.try_reserve_exact(to_index(most)).map_err(|_| no_memory)?;
        let free =
            Member { key: 0, share: 0, carry: 0, place: Place::Free, previous: None, next: None };
        members.resize(to_index(most), free);
        let mut random = Random::new(seed);
        let bin = random.below(BINS);
        let (members, lists) = (members.into(), [List::default(); LISTS]);
        Ok(Self { members, lists, random, seq: 0, bin, empty: 0, listed: 0 })
    }

    /// A new VM, known to the embedder as `key`, with `entries` per turn. Its first turn comes in
    /// the current round.
    ///
    /// # Errors
    /// [`AgeError::FleetFull`].
    pub fn add(&mut self, key: u64, entries: u64) -> Result<FleetVm, AgeError> {
        let room = to_u64(self.members.len());
        let free = self.members.iter().position(|member| member.place == Place::Free);
        let vm = free.and_then(|at| u32::try_from(at).ok()).map(FleetVm);
        let vm = vm.ok_or(AgeError::FleetFull { room })?;
        if let Some(member) = self.member_mut(vm) {
            (member.key, member.share, member.carry) = (key, entries.max(1), 0);
        }
        let bin = self.random.below(BINS);
        self.push(vm, list(self.seq, bin), End::Tail);
        Ok(vm)
    }

    /// The VM is gone, also in the middle of its turn. Unknown ones are ignored.
    pub fn remove(&mut self, vm: FleetVm) {
        self.unlink(vm);
        if let Some(member) = self.member_mut(vm) {
            member.place = Place::Free;
        }
    }

    /// VMs, those whose turn is under way included.
    #[must_use]
    pub fn len(&self) -> u64 {
        to_u64(self.members.iter().filter(|member| member.place != Place::Free).count())
    }

    /// No VM at all?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rounds begun: every VM that was there all the time had its share in each that is over.
    #[must_use]
    pub const fn rounds(&self) -> u64 {
        self.seq
    }

    /// The next turn; `None` when every VM is away in a turn of its own. Give it back with
    /// [`done`](Self::done).
    pub fn turn(&mut self) -> Option<Turn> {
        if self.listed == 0 {
            return None;
        }
        // Ends: within three generations of bins there is a VM.
        loop {
            let first = self.lists.get(list(self.seq, self.bin)).and_then(|list| list.first);
            if let Some(vm) = first.map(FleetVm) {
                self.empty = 0;
                self.unlink(vm);
                let member = self.member_mut(vm)?;
                member.place = Place::Running;
                let share = i64::try_from(member.share).unwrap_or(i64::MAX);
                let entries = share.saturating_add(member.carry).max(1);
                let (key, entries) = (member.key, u64::try_from(entries).unwrap_or(1));
                return Some(Turn { vm, key, entries });
            }
            self.bin = (self.bin + 1) % BINS;
            self.empty += 1;
            if self.empty == BINS {
                (self.seq, self.empty) = (self.seq + 1, 0);
                self.bin = self.random.below(BINS);
            }
        }
    }

    /// The turn is over after `spent` entries. A turn that was removed meanwhile is ignored.
    pub fn done(&mut self, turn: Turn, spent: u64, outcome: Outcome) {
        let (seq, at) = (self.seq, self.bin);
        let any = self.random.below(BINS);
        let Some(member) = self.member_mut(turn.vm) else { return };
        if member.place != Place::Running || member.key != turn.key {
            return;
        }
        let share = i64::try_from(member.share).unwrap_or(i64::MAX);
        let spent = i64::try_from(spent).unwrap_or(i64::MAX);
        let limit = share.saturating_mul(i64::try_from(MAX_CARRY).unwrap_or(1));
        let left = share.saturating_add(member.carry).saturating_sub(spent);
        // Who had nothing to do saves nothing up.
        let most = if outcome == Outcome::Finished { 0 } else { limit };
        member.carry = left.clamp(-limit, most);
        match outcome {
            // The bin before this one is the last that turns come to.
            Outcome::More => self.push(turn.vm, list(seq, (at + BINS - 1) % BINS), End::Tail),
            Outcome::Urgent => self.push(turn.vm, list(seq, at), End::Head),
            Outcome::Leaving => self.push(turn.vm, list(seq, any), End::Tail),
            Outcome::Finished => self.push(turn.vm, list(seq + 1, any), End::Tail),
        }
    }

    fn member_mut(&mut self, vm: FleetVm) -> Option<&mut Member> {
        self.members.get_mut(usize::try_from(vm.0).ok()?)
    }

    fn link_mut(&mut self, vm: Option<u32>) -> Option<&mut Member> {
        vm.and_then(|vm| self.member_mut(FleetVm(vm)))
    }

    fn push(&mut self, vm: FleetVm, at: usize, end: End) {
        let Some(&List { first, last }) = self.lists.get(at) else { return };
        let (previous, next) = match end {
            End::Head => (None, first),
            End::Tail => (last, None),
        };
        if let Some(member) = self.member_mut(vm) {
            (member.place, member.previous, member.next) = (Place::Listed(at), previous, next);
        }
        if let Some(member) = self.link_mut(previous) {
            member.next = Some(vm.0);
        }
        if let Some(member) = self.link_mut(next) {
            member.previous = Some(vm.0);
        }
        if let Some(list) = self.lists.get_mut(at) {
            match end {
                End::Head => *list = List { first: Some(vm.0), last: last.or(Some(vm.0)) },
                End::Tail => *list = List { first: first.or(Some(vm.0)), last: Some(vm.0) },
            }
        }
        self.listed += 1;
    }

    fn unlink(&mut self, vm: FleetVm) {
        let Some(&mut Member { place: Place::Listed(at), previous, next, .. }) =
            self.member_mut(vm)
        else {
            return;
        };
        if let Some(member) = self.link_mut(previous) {
            member.next = next;
        }
        if let Some(member) = self.link_mut(next) {
            member.previous = previous;
        }
        if let Some(list) = self.lists.get_mut(at) {
            if list.first == Some(vm.0) {
                list.first = next;
            }
            if list.last == Some(vm.0) {
                list.last = previous;
            }
        }
        self.listed -= 1;
    }
}

/// Which end of a bin.
#[derive(Clone, Copy)]
enum End {
    Head,
    Tail,
}

fn list(seq: u64, bin: u64) -> usize {
    to_index(seq % GENS * BINS + bin)
}
