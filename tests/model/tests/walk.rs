//! The walker among others: lost races, garbage, tables outside memory.

mod common;

use std::cell::Cell;

use common::{KINDS, Tables, user};
use mmu_model::{
    Access, AccessKind, AccessedOn, Ept, FaultKind, Format, Legacy, Mode, Npt, Path, Permissions,
    PhysMem, Random, Step, VecMem, Walker,
};

const A: u64 = 1 << 5;
const D: u64 = 1 << 6;

fn npt() -> Format {
    Format::Npt(Npt::new())
}

/// Memory in which somebody changes an entry just before the n-th compare-exchange.
struct Meddler<'a> {
    mem: &'a VecMem,
    countdown: Cell<u32>,
    at: u64,
    to: u64,
}

impl PhysMem for Meddler<'_> {
    fn read(&self, pa: u64) -> Option<u64> {
        self.mem.read(pa)
    }

    fn cas(&self, pa: u64, old: u64, new: u64) -> Option<Result<(), u64>> {
        let left = self.countdown.get();
        self.countdown.set(left.wrapping_sub(1));
        if left == 0 {
            assert!(self.mem.write(self.at, self.to));
        }
        self.mem.cas(pa, old, new)
    }
}

#[test]
fn a_lost_compare_exchange_starts_the_walk_over() {
    // The leaf is re-pointed before its own bits are set (the fourth compare-exchange).
    let tables = Tables::new(4);
    tables.link(1, 0, 7);
    tables.set(1, 0, 0x9007);
    let mem =
        Meddler { mem: &tables.mem, countdown: Cell::new(3), at: Tables::place(1, 0), to: 0xa007 };
    let found =
        Walker::new(&npt()).translate(&mem, tables.root(), 0x123, user(AccessKind::Write)).unwrap();
    assert_eq!((found.pa, found.restarts, found.reads), (0xa123, 1, 8));
    assert_eq!(tables.get(1, 0), 0xa007 | A | D);
    // Zapped before: the walk sees that, and the new entry stays untouched.
    let tables = Tables::new(4);
    tables.link(1, 0, 7);
    tables.set(1, 0, 0x9007);
    let mem = Meddler { mem: &tables.mem, countdown: Cell::new(3), at: Tables::place(1, 0), to: 0 };
    let fault = Walker::new(&npt())
        .translate(&mem, tables.root(), 0x123, user(AccessKind::Write))
        .unwrap_err();
    assert_eq!((fault.kind, fault.reads), (FaultKind::NotPresent, 8));
    assert_eq!(tables.get(1, 0), 0);
}

/// Memory in which every compare-exchange is lost.
struct Unlucky<'a>(&'a VecMem);

impl PhysMem for Unlucky<'_> {
    fn read(&self, pa: u64) -> Option<u64> {
        self.0.read(pa)
    }

    fn cas(&self, _: u64, old: u64, _: u64) -> Option<Result<(), u64>> {
        Some(Err(!old))
    }
}

#[test]
fn an_endless_race_ends() {
    let tables = Tables::new(4);
    tables.link(1, 0, 7);
    tables.set(1, 0, 0x9007);
    let fault = Walker::new(&npt())
        .translate(&Unlucky(&tables.mem), tables.root(), 0, user(AccessKind::Read))
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Contended);
}

#[test]
fn a_fault_sets_nothing_unless_on_passage() {
    for (accessed_on, expected) in [(AccessedOn::Success, 0), (AccessedOn::Passage, A)] {
        for leaf in [0, 0x9003, 0x9007 | 1 << 51] {
            let tables = Tables::new(4);
            tables.link(1, 0, 7);
            tables.set(1, 0, leaf);
            let walker = Walker::new(&npt()).with_accessed_on(accessed_on);
            let result = walker.translate(&tables.mem, tables.root(), 0, user(AccessKind::Read));
            assert!(result.is_err());
            assert_eq!(tables.get(1, 0), leaf);
            for level in 2..=4 {
                assert_eq!(tables.get(level, 0) & A, expected, "level {level}");
            }
        }
    }
}

#[test]
fn the_path_offers_only_tables_behind_accessed_entries() {
    let tables = Tables::new(4);
    tables.link(1, 0, 7);
    let walker = Walker::new(&npt());
    let mut path = Path::default();
    let top = walker.top(tables.root());
    let read = user(AccessKind::Read);
    let steps = |path: &Path| path.steps().map(|step| step.level).collect::<Vec<_>>();

    assert!(walker.resume(&tables.mem, top, 0, read, &mut path).is_err());
    assert_eq!(steps(&path), [0_u8; 0]);
    tables.set(4, 0, 0x3007 | A);
    assert!(walker.resume(&tables.mem, top, 0, read, &mut path).is_err());
    assert_eq!(steps(&path), [3]);
    tables.set(1, 0, 0x9007);
    assert!(walker.resume(&tables.mem, top, 0, read, &mut path).is_ok());
    assert_eq!(steps(&path), [3, 2, 1]);
}

#[test]
fn resumed_walks_keep_the_permissions_from_above() {
    let tables = Tables::new(4);
    tables.set(1, 0, 0x9007);
    let walker = Walker::new(&npt());
    let from =
        Step { level: 1, table: 0x1000, permissions: Permissions::READ.or(Permissions::USER) };
    let mut path = Path::default();
    let mut resume = |kind| walker.resume(&tables.mem, from, 0, user(kind), &mut path);
    assert_eq!(resume(AccessKind::Read).unwrap().reads, 1);
    assert_eq!(resume(AccessKind::Write).unwrap_err().code, 0x1_0000_0007);
    assert_eq!(resume(AccessKind::Fetch).unwrap_err().code, 0x1_0000_0015);
}

#[test]
fn tables_outside_memory() {
    let walker = Walker::new(&npt());
    let read = user(AccessKind::Read);
    let tables = Tables::new(4);
    let fault = walker.translate(&tables.mem, 1 << 40, 0, read).unwrap_err();
    assert_eq!((fault.kind, fault.level, fault.reads), (FaultKind::NoMemory, 4, 0));
    tables.set(4, 0, 1 << 40 | 7);
    let fault = walker.translate(&tables.mem, tables.root(), 0, read).unwrap_err();
    assert_eq!((fault.kind, fault.level, fault.reads), (FaultKind::NoMemory, 3, 1));
    assert_eq!(tables.get(4, 0), 1 << 40 | 7);
}

#[test]
fn a_table_that_contains_itself() {
    let tables = Tables::new(4);
    tables.set(4, 0, 0x4007);
    let read = user(AccessKind::Read);
    let found = Walker::new(&npt()).translate(&tables.mem, tables.root(), 0x18, read);
    let found = found.unwrap();
    assert_eq!((found.pa, found.reads, found.restarts), (0x4018, 8, 1));
    assert_eq!(tables.get(4, 0), 0x4007 | A);
}

#[test]
fn random_memory_never_panics() {
    let formats = [
        Format::Ept(Ept { levels: 5, mode_based_execute: true, ..Ept::new() }),
        Format::Ept(Ept { accessed_dirty: false, max_phys_bits: 52, ..Ept::new() }),
        Format::Npt(Npt { levels: 5, ..Npt::new() }),
        Format::Legacy(Legacy::new(Mode::Pae)),
        Format::Legacy(Legacy::new(Mode::Long4)),
        // Nonsense is taken as the nearest sense.
        Format::Npt(Npt { levels: 77, max_phys_bits: 200, ..Npt::new() }),
    ];
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let mem = VecMem::new(8);
        for word in 0..8 * 512 {
            // Mostly plausible: few reserved bits, pointers into or just behind memory.
            let value = random.below(10) << 12 | random.next_u64() & 0xfe7;
            let noise = if random.chance(1, 8) { random.next_u64() } else { 0 };
            assert!(mem.write(word * 8, value ^ noise));
        }
        for format in &formats {
            let walker = Walker::new(format);
            for _ in 0..300 {
                let access =
                    Access { user: random.chance(1, 2), ..user(KINDS[random.below(3) as usize]) };
                let address = random.next_u64() >> random.below(64);
                let root = random.next_u64() & 0x7fff;
                match walker.translate(&mem, root, address, access) {
                    Ok(found) => assert!(found.reads >= u32::from(4 - found.level.min(3))),
                    Err(fault) => assert!(fault.page_fault_error() < 32, "seed {seed}"),
                }
            }
        }
    }
}
