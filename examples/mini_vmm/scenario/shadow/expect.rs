//! What the workload must compute, found without any page table: processes are maps from addresses
//! to words, a fork copies the map.
//!
//! It knows the operations and nothing of pages, tables, faults or turns, so it has no mistake in
//! common with the guest or with whoever runs it.

use std::collections::HashMap;

use super::layout::FACTOR;
use super::script::{Area, Operation, Rights, Script, Words};

/// What is to be compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// Sum of the digests of all processes.
    pub result: u64,
    /// Accesses that were refused.
    pub refused: u64,
}

#[derive(Clone, Debug)]
struct Process {
    number: usize,
    digest: u64,
    areas: [Option<Area>; 6],
    words: HashMap<u64, u64>,
}

/// Run the script.
pub fn expect(script: &Script, digest: u64) -> Expected {
    let mut expected = Expected::default();
    let areas = [None; 6];
    let mut waiting = vec![Process { number: 0, digest, areas, words: HashMap::new() }];
    while let Some(mut process) = waiting.pop() {
        for operation in &script.processes[process.number] {
            if let Operation::Fork(child, tag) = operation {
                waiting.push(Process {
                    number: *child as usize,
                    digest: process.digest ^ tag,
                    ..process.clone()
                });
            } else {
                expected.refused += process.run(operation);
            }
        }
        expected.result = expected.result.wrapping_add(process.digest);
    }
    expected
}

impl Process {
    /// One operation; how many accesses were refused.
    fn run(&mut self, operation: &Operation) -> u64 {
        match operation {
            Operation::Exit | Operation::Mark(_) | Operation::Fork(..) => 0,
            Operation::Map(number, area) => {
                self.areas[*number as usize] = Some(*area);
                0
            }
            Operation::Unmap(number) => {
                if let Some(gone) = self.areas[*number as usize].take() {
                    self.words.retain(|at, _| !(gone.start..gone.end).contains(at));
                }
                0
            }
            Operation::Protect(number, rights) => {
                if let Some(area) = &mut self.areas[*number as usize] {
                    area.rights = *rights;
                }
                0
            }
            Operation::Write(words) => self.access(words, Rights::Write),
            Operation::Read(words) => self.access(words, Rights::Read),
        }
    }

    fn access(&mut self, words: &Words, needed: Rights) -> u64 {
        let mut refused = 0;
        for number in 0..words.count {
            let at = words.start + number * words.stride;
            let mut areas = self.areas.iter().flatten();
            let area = areas.find(|area| (area.start..area.end).contains(&at));
            let permitted = area.is_some_and(|area| area.rights >= needed);
            self.digest = match (permitted, needed) {
                (false, _) => {
                    refused += 1;
                    !(self.digest ^ at)
                }
                (true, Rights::Nothing | Rights::Read) => {
                    self.digest ^ self.words.get(&at).copied().unwrap_or(0)
                }
                (true, Rights::Write) => {
                    let word = (self.digest ^ at).wrapping_mul(FACTOR);
                    self.words.insert(at, word);
                    word
                }
            };
            self.digest = self.digest.rotate_left(7).wrapping_mul(FACTOR);
        }
        refused
    }
}
