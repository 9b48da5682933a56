//! [`Fleet`]: whose turn it is, when many VMs share one aging or evicting thread (KVM row 5.34).
//!
//! Two generations of eight bins of VMs: the one whose turns are given out, and the next (upstream
//! keeps a third for readers without its lock). Turns are taken from the older, from a bin chosen
//! at random on; who has done its share goes to the younger, who has not waits behind all that are
//! left of this one. A generation is over when its bins are empty, so nobody starts a second round
//! while another waits for its first; the random start keeps several threads, each with its own
//! fleet of the same VMs, from meeting at the same one.
//!
//! A turn is worth so many table entries, more for who weighs more; what a turn did not use or used
//! too much counts in the next. One owner, no lock, nothing allocated after [`Fleet::new`].

use alloc::boxed::Box;
use alloc::vec::Vec;

use mmu_core::addr::{to_index, to_u64};

use crate::AgeError;
use crate::random::Random;

/// Generations of VMs.
const GENS: u64 = 2;
/// Bins of a generation.
const BINS: u64 = 8;
const LISTS: usize = 16;
const _: () = assert!(GENS * BINS == 16, "a list for each bin of each generation");
/// The largest debt or credit, in turns.
const MAX_CARRY: u64 = 4;

/// Names a VM of a fleet, and after its removal nobody: its place may be given to another, its name
/// is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FleetVm {
    at: u32,
    /// VMs that were added to the fleet before it.
    number: u64,
}

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
    /// Its round is done, or there is nothing to gain: to the next generation (YOUNG).
    Finished,
    /// It is over its limit: the next turn is its own again (HEAD).
    Urgent,
    /// It is going away: anywhere in this generation, so that it is emptied first (OLD).
    Leaving,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    key: u64,
    /// As in the [`FleetVm`] that names it.
    number: u64,
    /// Entries per turn.
    share: u64,
    /// Entries left over from earlier turns (positive) or owed.
    carry: i64,
    place: Place,
    previous: Option<u32>,
    next: Option<u32>,
}

impl Member {
    const FREE: Self = Self {
        key: 0,
        number: 0,
        share: 0,
        carry: 0,
        place: Place::Free,
        previous: None,
        next: None,
    };
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
    /// The older generation, whose turns are given out; the younger is one above.
    seq: u64,
    /// The bin that turns come from.
    bin: u64,
    /// Bins of this generation found empty in a row.
    empty: u64,
    listed: u64,
    /// VMs ever added.
    added: u64,
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
        members.resize(to_index(most), Member::FREE);
        let mut random = Random::new(seed);
        let bin = random.below(BINS);
        let (members, lists) = (members.into(), [List::default(); LISTS]);
        Ok(Self { members, lists, random, seq: 0, bin, empty: 0, listed: 0, added: 0 })
    }

    /// A new VM, known to the embedder as `key`, with `entries` per turn. Its first turn comes in
    /// the current round.
    ///
    /// # Errors
    /// [`AgeError::FleetFull`].
    pub fn add(&mut self, key: u64, entries: u64) -> Result<FleetVm, AgeError> {
        let room = to_u64(self.members.len());
        let free = self.members.iter().position(|member| member.place == Place::Free);
        let at = free.and_then(|at| u32::try_from(at).ok());
        let at = at.ok_or(AgeError::FleetFull { room })?;
        let number = self.added;
        self.added += 1;
        if let Some(member) = self.member_mut(at) {
            *member = Member { key, number, share: entries.max(1), ..Member::FREE };
        }
        let bin = self.random.below(BINS);
        self.push(at, list(self.seq, bin), End::Tail);
        Ok(FleetVm { at, number })
    }

    /// The VM is gone, also in the middle of its turn. One that was removed before is ignored.
    pub fn remove(&mut self, vm: FleetVm) {
        if self.named_mut(vm).is_none() {
            return;
        }
        self.unlink(vm.at);
        if let Some(member) = self.member_mut(vm.at) {
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
        // Ends: within two generations of bins there is a VM. The older one is empty when the next
        // takes its place, so its lists are free for the one after.
        loop {
            let first = self.lists.get(list(self.seq, self.bin)).and_then(|list| list.first);
            if let Some(at) = first {
                self.empty = 0;
                self.unlink(at);
                let member = self.member_mut(at)?;
                let vm = FleetVm { at, number: member.number };
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
        let Some(member) = self.named_mut(turn.vm) else { return };
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
            Outcome::More => self.push(turn.vm.at, list(seq, (at + BINS - 1) % BINS), End::Tail),
            Outcome::Urgent => self.push(turn.vm.at, list(seq, at), End::Head),
            Outcome::Leaving => self.push(turn.vm.at, list(seq, any), End::Tail),
            Outcome::Finished => self.push(turn.vm.at, list(seq + 1, any), End::Tail),
        }
    }

    /// The VM of this name, unless it was removed.
    fn named_mut(&mut self, vm: FleetVm) -> Option<&mut Member> {
        let named =
            |member: &&mut Member| member.place != Place::Free && member.number == vm.number;
        self.member_mut(vm.at).filter(named)
    }

    fn member_mut(&mut self, at: u32) -> Option<&mut Member> {
        self.members.get_mut(usize::try_from(at).ok()?)
    }

    fn link_mut(&mut self, at: Option<u32>) -> Option<&mut Member> {
        at.and_then(|at| self.member_mut(at))
    }

    fn push(&mut self, vm: u32, at: usize, end: End) {
        let Some(&List { first, last }) = self.lists.get(at) else { return };
        let (previous, next) = match end {
            End::Head => (None, first),
            End::Tail => (last, None),
        };
        if let Some(member) = self.member_mut(vm) {
            (member.place, member.previous, member.next) = (Place::Listed(at), previous, next);
        }
        if let Some(member) = self.link_mut(previous) {
            member.next = Some(vm);
        }
        if let Some(member) = self.link_mut(next) {
            member.previous = Some(vm);
        }
        if let Some(list) = self.lists.get_mut(at) {
            match end {
                End::Head => *list = List { first: Some(vm), last: last.or(Some(vm)) },
                End::Tail => *list = List { first: first.or(Some(vm)), last: Some(vm) },
            }
        }
        self.listed += 1;
    }

    fn unlink(&mut self, vm: u32) {
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
            if list.first == Some(vm) {
                list.first = next;
            }
            if list.last == Some(vm) {
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

#[cfg(test)]
mod tests {
    use alloc::collections::{BTreeMap, VecDeque};

    use super::*;

    /// The same rules with a list for every bin of every generation there ever is.
    struct Unlimited {
        lists: BTreeMap<(u64, u64), VecDeque<u64>>,
        random: Random,
        seq: u64,
        bin: u64,
    }

    impl Unlimited {
        fn list(&mut self, seq: u64, bin: u64) -> &mut VecDeque<u64> {
            self.lists.entry((seq, bin)).or_default()
        }

        fn add(&mut self, key: u64) {
            let (seq, bin) = (self.seq, self.random.below(BINS));
            self.list(seq, bin).push_back(key);
        }

        fn remove(&mut self, key: u64) {
            self.lists.values_mut().for_each(|list| list.retain(|&other| other != key));
        }

        fn turn(&mut self) -> Option<u64> {
            if self.lists.values().all(VecDeque::is_empty) {
                return None;
            }
            loop {
                for _ in 0..BINS {
                    let (seq, bin) = (self.seq, self.bin);
                    if let Some(key) = self.list(seq, bin).pop_front() {
                        return Some(key);
                    }
                    self.bin = (self.bin + 1) % BINS;
                }
                self.seq += 1;
                self.bin = self.random.below(BINS);
            }
        }

        fn done(&mut self, key: u64, outcome: Outcome) {
            let (seq, at, any) = (self.seq, self.bin, self.random.below(BINS));
            match outcome {
                Outcome::More => self.list(seq, (at + BINS - 1) % BINS).push_back(key),
                Outcome::Finished => self.list(seq + 1, any).push_back(key),
                Outcome::Urgent => self.list(seq, at).push_front(key),
                Outcome::Leaving => self.list(seq, any).push_back(key),
            }
        }
    }

    /// Two generations of lists are enough: nobody is ever two rounds ahead.
    #[test]
    fn the_order_of_turns_is_that_of_lists_without_number() {
        for seed in 0..50 {
            let mut work = Random::new(seed + 1000);
            let mut fleet = Fleet::new(12, seed).unwrap();
            let mut random = Random::new(seed);
            let bin = random.below(BINS);
            let mut model = Unlimited { lists: BTreeMap::new(), random, seq: 0, bin };
            let (mut there, mut running) = (Vec::new(), Vec::<Turn>::new());
            for key in 0..3000 {
                match work.below(8) {
                    0 if there.len() < 12 => {
                        there.push((key, fleet.add(key, 10).unwrap()));
                        model.add(key);
                    }
                    1 if there.len() > 3 => {
                        let at = to_index(work.below(to_u64(there.len())));
                        let (gone, vm) = there.swap_remove(at);
                        fleet.remove(vm);
                        model.remove(gone);
                        running.retain(|turn| turn.key != gone);
                    }
                    2..5 => {
                        let turn = fleet.turn();
                        assert_eq!(turn.map(|turn| turn.key), model.turn(), "seed {seed}");
                        running.extend(turn);
                    }
                    _ if !running.is_empty() => {
                        let at = to_index(work.below(to_u64(running.len())));
                        let turn = running.swap_remove(at);
                        let outcome = match work.below(6) {
                            0 => Outcome::More,
                            1 => Outcome::Urgent,
                            2 => Outcome::Leaving,
                            _ => Outcome::Finished,
                        };
                        fleet.done(turn, 10, outcome);
                        model.done(turn.key, outcome);
                    }
                    _ => {}
                }
                assert_eq!(fleet.rounds(), model.seq, "seed {seed}");
            }
            assert!(fleet.rounds() > 20, "{}", fleet.rounds());
        }
    }
}
