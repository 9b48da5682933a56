//! What the processes of the guest do: operations, one after the other, and two workloads made of
//! them.
//!
//! [`Script::random`] has everything that a guest's tables go through: several processes, forks and
//! copies on write, areas that come, go and change, of small and large pages, accesses that are
//! refused. [`Script::hot_and_scan`] is the trace of the experiment with reclaim: a loop over a hot
//! set of tables, and a scan beside it.

use mmu_model::Random;

use super::layout::{HUGE, READABLE, USER, WRITABLE, op};
use crate::machine::PAGE;

/// Bytes of a large page, and of what a table of the lowest level maps.
pub const LARGE: u64 = 2 << 20;
/// Bytes of an encoded operation.
pub const ENCODED: u64 = 32;

/// What an area permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rights {
    /// Nothing: its pages are kept.
    Nothing,
    /// Reads.
    Read,
    /// Reads and writes.
    Write,
}

impl Rights {
    /// As flags of an area.
    const fn flags(self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Read => READABLE,
            Self::Write => READABLE | WRITABLE,
        }
    }
}

/// The pages of an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Of 4 KiB.
    Small,
    /// Of 2 MiB.
    Large,
}

/// Words: the first one's address, how many, bytes from one to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Words {
    /// Linear address, aligned.
    pub start: u64,
    /// Not 0.
    pub count: u64,
    /// A multiple of 8.
    pub stride: u64,
}

/// An area of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// One behind the last.
    pub end: u64,
    /// What it permits.
    pub rights: Rights,
    /// Its pages.
    pub pages: Pages,
}

/// One thing that a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It ends.
    Exit,
    /// Area number so comes to be.
    Map(u64, Area),
    /// It goes, with what is in it.
    Unmap(u64),
    /// It permits something else.
    Protect(u64, Rights),
    /// Process number so begins: a copy of this one, but for its script. Its digest differs.
    Fork(u64, u64),
    /// Write words that depend on the digest and their addresses.
    Write(Words),
    /// Read words into the digest.
    Read(Words),
    /// Tell the VMM a number.
    Mark(u64),
}

/// What each process does; process 0 is there from the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// By number of the process; each ends with [`Operation::Exit`].
    pub processes: Vec<Vec<Operation>>,
}

impl Operation {
    /// As the guest reads it; process number n begins at `begin(n)`.
    pub fn encode(&self, begin: impl Fn(u64) -> u64) -> [u64; 4] {
        match *self {
            Self::Exit => [op::EXIT, 0, 0, 0],
            Self::Map(number, area) => {
                let size = if area.pages == Pages::Large { HUGE } else { 0 };
                [op::MAP, number, area.start, area.end | area.rights.flags() | size]
            }
            Self::Unmap(number) => [op::UNMAP, number, 0, 0],
            Self::Protect(number, rights) => [op::PROTECT, number, rights.flags(), 0],
            Self::Fork(child, tag) => [op::FORK, child, begin(child), tag],
            Self::Write(words) => [op::WRITE, words.start, words.count, words.stride],
            Self::Read(words) => [op::READ, words.start, words.count, words.stride],
            Self::Mark(number) => [op::MARK, number, 0, 0],
        }
    }
}

/// Small pages of an area at most: what all processes use together fits into memory.
const SMALL_PAGES: u64 = 48;
/// Areas whose pages are small always; the two after them may have large ones.
const SMALL_AREAS: u64 = 4;
/// Where an area of small pages may begin, and where the next one's place is.
const PLACE: u64 = 4 * LARGE;
/// From there on the areas are that may have large pages.
const LARGE_PLACE: u64 = USER + (1 << 30);

/// A process while its script is made.
#[derive(Clone, Debug)]
struct Draft {
    number: usize,
    areas: [Option<Area>; 6],
    /// Operations that it still does.
    left: u64,
}

impl Script {
    /// A workload of `processes` processes, each of about `operations` operations.
    pub fn random(seed: u64, processes: u64, operations: u64) -> Self {
        let mut random = Random::new(seed);
        let mut made: Vec<Vec<Operation>> = (0..processes).map(|_| Vec::new()).collect();
        let mut waiting = vec![Draft { number: 0, areas: [None; 6], left: operations }];
        let mut next = 1;
        while let Some(mut draft) = waiting.pop() {
            let mut script = Vec::new();
            while draft.left > 0 {
                draft.left -= 1;
                // All of them come to be: the first process forks the rest in the end.
                let forced = draft.number == 0 && draft.left < processes - next;
                if next < processes && (forced || random.chance(1, operations / 8 + 1)) {
                    script.push(Operation::Fork(next, random.next_u64()));
                    waiting.push(Draft {
                        number: next as usize,
                        left: operations / 2 + random.below(operations / 2 + 1),
                        ..draft.clone()
                    });
                    next += 1;
                } else {
                    script.push(draft.operation(&mut random));
                }
            }
            script.push(Operation::Exit);
            made[draft.number] = script;
        }
        Self { processes: made }
    }

    /// A loop over `hot` tables of the lowest level, `rounds` times, and after each round about
    /// `step` of `cold` others, one after the other and around again. Each round ends with its
    /// number as a mark.
    pub fn hot_and_scan(trace: &Trace, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let area = |start: u64, tables: u64| Area {
            start,
            end: start + tables * LARGE,
            rights: Rights::Write,
            pages: Pages::Small,
        };
        let far = USER + (1 << 30);
        let words = |start, count| Words { start, count, stride: LARGE };
        let mut script = vec![
            Operation::Map(0, area(USER, trace.hot)),
            Operation::Map(1, area(far, trace.cold)),
            Operation::Write(words(USER, trace.hot)),
            Operation::Write(words(far, trace.cold)),
        ];
        let mut at = 0;
        for round in 0..trace.rounds {
            script.push(Operation::Read(words(USER, trace.hot)));
            let count = (1 + random.below(2 * trace.step - 1)).min(trace.cold - at);
            script.push(Operation::Read(words(far + at * LARGE, count)));
            at = (at + count) % trace.cold;
            script.push(Operation::Mark(round));
        }
        script.push(Operation::Exit);
        Self { processes: vec![script] }
    }
}

/// How large the loop and the scan are, in tables of the lowest level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Used in each round.
    pub hot: u64,
    /// Scanned.
    pub cold: u64,
    /// Of these, in one round, on average.
    pub step: u64,
    /// Rounds.
    pub rounds: u64,
}

impl Draft {
    fn operation(&mut self, random: &mut Random) -> Operation {
        let number = random.below(6);
        let Some(area) = self.areas[number as usize] else { return self.map(number, random) };
        match random.below(20) {
            0 => {
                self.areas[number as usize] = None;
                Operation::Unmap(number)
            }
            1..4 => {
                let rights = match (area.rights, random.below(3)) {
                    (Rights::Nothing | Rights::Read, 0 | 1) => Rights::Write,
                    (_, 0) => Rights::Nothing,
                    _ => Rights::Read,
                };
                self.areas[number as usize] = Some(Area { rights, ..area });
                Operation::Protect(number, rights)
            }
            4..12 => Operation::Write(some_words(&area, random)),
            _ => Operation::Read(some_words(&area, random)),
        }
    }

    fn map(&mut self, number: u64, random: &mut Random) -> Operation {
        let rights = if random.chance(1, 4) { Rights::Read } else { Rights::Write };
        let small = (1 + random.below(SMALL_PAGES)) * PAGE;
        let area = if number < SMALL_AREAS {
            let start = USER + number * PLACE + random.below(1024) * PAGE;
            Area { start, end: start + small, rights, pages: Pages::Small }
        } else {
            let start = LARGE_PLACE + (number - SMALL_AREAS) * LARGE;
            let large = random.chance(1, 2);
            let (bytes, pages) = if large { (LARGE, Pages::Large) } else { (small, Pages::Small) };
            Area { start, end: start + bytes, rights, pages }
        };
        self.areas[number as usize] = Some(area);
        Operation::Map(number, area)
    }
}

/// Words of an area, and now and then some before or behind it.
fn some_words(area: &Area, random: &mut Random) -> Words {
    let strides = [8, 64, PAGE, PAGE + 8, LARGE / 16];
    let stride = strides[random.below(strides.len() as u64) as usize];
    let at = area.start + random.below((area.end - area.start) / 8) * 8;
    let start = if random.chance(1, 16) && at > USER + 2 * PAGE { at - 2 * PAGE } else { at };
    let over = if random.chance(1, 16) { 3 } else { 0 };
    let count = ((area.end - start.min(area.end - 8)).div_ceil(stride) + over).min(40);
    Words { start, count: count.max(1), stride }
}
