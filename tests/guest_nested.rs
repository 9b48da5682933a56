//! EPT and NPT as a guest's own tables, and walks in two dimensions, against the independent model:
//! every combination of permissions at every level, every bit of an entry, a fault at every
//! reference of a two-dimensional walk. Compared: exit qualification or EXITINFO1 bit by bit, the
//! faulting address, the entries read in their order, the entries changed.

mod guest_support;

use guest_support::chain::{Chain, table};
use guest_support::{KINDS, levels_of, nested_formats, nested_request, nested_walker, same_exit};
use mmu_core::addr::Gpa;
use mmu_model::{AccessKind, Ept, Format, NestedExit, NestedMachine, Npt, Rights, Trace, Why};
use shadow_mmu::guest::{NestedError, NestedWalk, NestedWalker};

const GPA: u64 = 0x00ab_cdef_1000 | 0x678;
const PAGE: u64 = 0x4000_0000;
const PS: u64 = 1 << 7;
/// Write-back, in a leaf of EPT.
const WB: u64 = 6 << 3;

const SUPERVISOR: Rights = Rights { user: false, writable: true, executable: true };
const USER: Rights = Rights { user: true, writable: true, executable: true };
/// Read, write, fetch for a supervisor-mode and for a user-mode address.
const OPERATIONS: [(AccessKind, Why); 4] = [
    (AccessKind::Read, Why::Page(USER)),
    (AccessKind::Write, Why::Page(USER)),
    (AccessKind::Fetch, Why::Page(SUPERVISOR)),
    (AccessKind::Fetch, Why::Page(USER)),
];

/// One nested format: the walker beside the model.
struct Nested {
    model: NestedMachine,
    walker: NestedWalker,
    format: Format,
    levels: u8,
    chain: Chain,
    trace: Trace,
    cases: u64,
    reached: u64,
}

impl Nested {
    fn new(format: Format, advanced: bool) -> Self {
        let levels = levels_of(&format);
        let guest = guest_support::machine(mmu_model::GuestMode::Off);
        Self {
            model: NestedMachine::new(guest, format, advanced),
            walker: nested_walker(&format, advanced),
            format,
            levels,
            chain: Chain::of(levels, 8, GPA),
            trace: Trace::default(),
            cases: 0,
            reached: 0,
        }
    }

    /// The entry of `level` that leads on: to the table below, or as a leaf to the page.
    fn leads(&self, level: u8, leaf: u8) -> u64 {
        if level > leaf {
            return table(level - 1);
        }
        let memory_type = if matches!(self.format, Format::Ept(_)) { WB } else { 0 };
        PAGE | memory_type | if level > 1 { PS } else { 0 }
    }

    fn compare(&mut self, kind: AccessKind, why: Why) {
        self.cases += 1;
        self.chain.forget();
        let root = table(self.levels);
        let predicted = self.model.second(&self.chain, root, GPA, (kind, why), &mut self.trace);
        let request = nested_request(kind, why);
        let ended = self.walker.walk(&self.chain, root, Gpa::new(GPA), request);
        if !same(&predicted, &ended) || !self.chain.agrees(&self.trace) {
            let entries: Vec<u64> = (1..=self.levels).map(|level| self.chain.get(level)).collect();
            panic!(
                "{:?} {kind:?} {why:?}\nmodel {predicted:x?}, reads {:x?}, writes {:x?}\nwalker \
                 {ended:x?}\nentries from level 1: {entries:x?}",
                self.format,
                self.trace.reads(),
                self.trace.writes(),
            );
        }
        self.reached += u64::from(ended.is_ok());
    }
}

fn same(predicted: &Result<u64, NestedExit>, ended: &Result<NestedWalk, NestedError>) -> bool {
    match (predicted, ended) {
        (Ok(pa), Ok(walk)) => walk.target().get() == *pa,
        (Err(exit), Err(NestedError::Fault(fault))) => same_exit(exit, fault),
        _ => false,
    }
}

/// Every combination of `choices` at the levels of `nested`, for leaves of three sizes.
fn every_combination(nested: &mut Nested, choices: &[u64], operations: &[(AccessKind, Why)]) {
    let levels = nested.levels;
    let combinations = choices.len().pow(u32::from(levels));
    for leaf in 1..=3 {
        for combination in 0..combinations {
            for (kind, why) in operations {
                let mut rest = combination;
                for level in 1..=levels {
                    let chosen = choices[rest % choices.len()];
                    rest /= choices.len();
                    nested.chain.set(level, chosen | nested.leads(level, leaf));
                }
                nested.compare(*kind, *why);
            }
        }
    }
}

const RWX: [u64; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

#[test]
fn ept_permissions_agree_with_the_model_at_every_level() {
    for (levels, expected) in [(4, 98_304), (5, 786_432)] {
        let mut cases = 0;
        for accessed_dirty in [false, true] {
            let format = Format::Ept(Ept { levels, accessed_dirty, ..Ept::new() });
            let mut nested = Nested::new(format, false);
            every_combination(&mut nested, &RWX, &OPERATIONS);
            assert!(nested.reached > nested.cases / 100);
            cases += nested.cases;
        }
        eprintln!("CASES EPT permissions, {levels} levels: {cases}");
        assert_eq!(cases, expected);
    }
}

#[test]
fn mode_based_execute_agrees_with_the_model_at_every_level() {
    let choices: Vec<u64> = RWX.iter().flat_map(|rwx| [*rwx, rwx | 1 << 10]).collect();
    let mut cases = 0;
    for (accessed_dirty, exec_only) in [(false, true), (true, false)] {
        let mode_based_execute = true;
        let ept = Ept { accessed_dirty, exec_only, mode_based_execute, ..Ept::new() };
        let mut nested = Nested::new(Format::Ept(ept), false);
        every_combination(&mut nested, &choices, &OPERATIONS);
        assert!(nested.reached > nested.cases / 100);
        cases += nested.cases;
    }
    eprintln!("CASES mode-based execute: {cases}");
    assert_eq!(cases, 1_572_864);
}

#[test]
fn npt_permissions_agree_with_the_model_at_every_level() {
    let flags = [1, 2, 4, 1 << 63];
    let choices: Vec<u64> = (0..16)
        .map(|set| (0..4).filter(|bit| set >> bit & 1 != 0).map(|bit| flags[bit]).sum())
        .collect();
    let tables = KINDS.map(|kind| (kind, Why::Page(USER)));
    let operations = [tables[0], tables[1], tables[2], (AccessKind::Read, Why::Table)];
    let mut cases = 0;
    for nxe in [false, true] {
        let mut nested = Nested::new(Format::Npt(Npt { nxe, ..Npt::new() }), false);
        every_combination(&mut nested, &choices, &operations);
        assert!(nested.reached > nested.cases / 10_000);
        cases += nested.cases;
    }
    eprintln!("CASES NPT permissions: {cases}");
    assert_eq!(cases, 1_572_864);
}

/// Everything that a nested walk may be for.
fn every_use() -> Vec<(AccessKind, Why)> {
    let mut uses = vec![(AccessKind::Read, Why::Table), (AccessKind::Write, Why::Update)];
    uses.push((AccessKind::Read, Why::Pointers));
    for kind in KINDS {
        for bits in 0..8 {
            let rights =
                Rights { user: bits & 1 != 0, writable: bits & 2 != 0, executable: bits & 4 != 0 };
            uses.push((kind, Why::Page(rights)));
        }
    }
    uses
}

#[test]
fn every_bit_of_a_nested_entry_agrees_with_the_model() {
    let mut cases = 0;
    let uses = every_use();
    for levels in [4, 5] {
        for mut format in nested_formats(levels) {
            for (width, huge, advanced) in
                [(36, false, false), (46, true, true), (52, true, false), (48, false, true)]
            {
                match &mut format {
                    Format::Ept(ept) => {
                        ept.max_phys_bits = width;
                        (ept.huge_1g, ept.huge_2m) = (huge, huge || width == 48);
                    }
                    Format::Npt(npt) => {
                        (npt.max_phys_bits, npt.huge_1g) = (width, huge);
                    }
                    Format::Legacy(_) => unreachable!("no second dimension"),
                }
                let mut nested = Nested::new(format, advanced);
                for leaf in 1..=3 {
                    one_bit_each(&mut nested, leaf, &uses);
                }
                cases += nested.cases;
            }
        }
    }
    eprintln!("CASES bits of nested entries: {cases}");
    // 4 formats in 4 shapes, leaves of 3 sizes, 64 bits at each level, 27 uses.
    assert_eq!(cases, 4 * 4 * 3 * 64 * (4 + 5) * 27);
}

/// A walk in which nothing is wrong, with each bit of each entry the other way.
fn one_bit_each(nested: &mut Nested, leaf: u8, uses: &[(AccessKind, Why)]) {
    for changed in 1..=nested.levels {
        for bit in 0..64 {
            for (kind, why) in uses {
                for level in 1..=nested.levels {
                    let flipped = if level == changed { 1 << bit } else { 0 };
                    nested.chain.set(level, (7 | nested.leads(level, leaf)) ^ flipped);
                }
                nested.compare(*kind, *why);
            }
        }
    }
}

#[test]
fn an_address_beyond_the_reach_of_nested_tables_is_not_present() {
    for format in nested_formats(4) {
        let nested = Nested::new(format, false);
        for gpa in [1 << 48, 1 << 51, !0xfff] {
            let mut trace = Trace::default();
            let (kind, why) = OPERATIONS[0];
            let root = table(4);
            let predicted = nested.model.second(&nested.chain, root, gpa, (kind, why), &mut trace);
            let request = nested_request(kind, why);
            let ended = nested.walker.walk(&nested.chain, root, Gpa::new(gpa), request);
            assert!(same(&predicted, &ended), "{gpa:#x}: {predicted:x?} {ended:x?}");
            assert!(ended.is_err() && nested.chain.agrees(&trace));
        }
    }
}
