//! EPT: the tables of the SDM's chapter on the extended page-table mechanism, by hand.

mod common;

use common::{KINDS, Tables, at_stage, bits, user};
use mmu_model::{
    Access, AccessKind, Entry, Ept, Fault, FaultKind, Format, Permissions, Rules, Stage,
    Translation, Walker,
};

/// Write-back memory type.
const WB: u64 = 6 << 3;
const ADDRESS: u64 = 0x12_3456_7000;

fn walk_leaf(ept: Ept, leaf: u64, access: Access) -> Result<Translation, Fault> {
    let tables = Tables::new(ept.levels);
    let links = if ept.mode_based_execute { 0x407 } else { 7 };
    tables.link(1, ADDRESS, links);
    tables.set(1, ADDRESS, leaf);
    Walker::new(&Format::Ept(ept)).translate(&tables.mem, tables.root(), ADDRESS | 0x10, access)
}

#[test]
fn qualifications_seen_on_processors() {
    use AccessKind::{Fetch, Read, Write};
    let cases = [
        (0, Read, 0x181),
        (0, Write, 0x182),
        (0, Fetch, 0x184),
        (1, Write, 0x18a),
        (1, Fetch, 0x18c),
        (3, Fetch, 0x19c),
        (5, Write, 0x1aa),
        (4, Read, 0x1a1),
    ];
    for (rwx, kind, qualification) in cases {
        let leaf = if rwx == 0 { 0 } else { rwx | WB | 0x9000 };
        let fault = walk_leaf(Ept::new(), leaf, user(kind)).unwrap_err();
        assert_eq!(fault.code, qualification, "rwx {rwx} {kind:?}");
        let kind = if rwx == 0 { FaultKind::NotPresent } else { FaultKind::Protection };
        assert_eq!((fault.kind, fault.level), (kind, 1));
        assert_eq!(fault.reads, 4);
    }
}

#[test]
fn every_rwx_with_every_access() {
    // Row: bits 2:0. Columns: read, write, fetch: 'y' yes, 'v' violation, 'm' misconfiguration.
    let with_exec_only = ["vvv", "yvv", "mmm", "yyv", "vvy", "yvy", "mmm", "yyy"];
    for exec_only in [true, false] {
        for (rwx, row) in (0_u64..).zip(with_exec_only) {
            let row = if rwx == 4 && !exec_only { "mmm" } else { row };
            for (kind, expected) in KINDS.into_iter().zip(row.chars()) {
                let ept = Ept { exec_only, ..Ept::new() };
                let found = match walk_leaf(ept, rwx | WB | 0x9000, user(kind)) {
                    Ok(translation) => {
                        assert_eq!(translation.pa, 0x9010);
                        'y'
                    }
                    Err(fault) if fault.kind == FaultKind::Reserved => {
                        assert_eq!(fault.code, 0, "a misconfiguration has no qualification");
                        'm'
                    }
                    Err(_) => 'v',
                };
                assert_eq!(found, expected, "rwx {rwx} {kind:?} exec_only {exec_only}");
            }
        }
    }
}

#[test]
fn memory_types() {
    for memory_type in 0..8_u64 {
        let result = walk_leaf(Ept::new(), 7 | memory_type << 3 | 0x9000, user(AccessKind::Read));
        // UC, WC, WT, WP, WB exist.
        let legal = [0, 1, 4, 5, 6].contains(&memory_type);
        assert_eq!(result.is_ok(), legal, "type {memory_type}");
    }
}

/// Reserved bits of an entry with R, W and X, by level and kind of entry, 46 address bits.
const RESERVED: [(u8, bool, &str); 7] = [
    (1, true, "51:46"),
    (2, true, "51:46 20:12"),
    (3, true, "51:46 29:12"),
    (2, false, "51:46 6:3"),
    (3, false, "51:46 6:3"),
    (4, false, "51:46 7:3"),
    (5, false, "51:46 7:3"),
];

#[test]
fn every_single_bit() {
    let rules = Rules::new(&Format::Ept(Ept { levels: 5, ..Ept::new() }));
    for (level, leaf, reserved) in RESERVED {
        let base = match (level, leaf) {
            (1, _) => 7,
            (_, true) => 0x87,
            (_, false) => 7,
        };
        for bit in 0..64_u32 {
            let entry = base ^ (1 << bit);
            // These have meanings of their own, covered elsewhere.
            let other = bit < 3 || (leaf && (3..6).contains(&bit)) || (level < 4 && bit == 7);
            if other && level != 1 {
                continue;
            }
            let mut expected = bits(reserved) >> bit & 1 != 0;
            if level == 1 && bit < 6 {
                // -WX; memory types 1, 2, 4 next to 0.
                expected = bit == 0 || bit == 4;
            }
            let found = rules.decode(level, entry) == Entry::Reserved;
            assert_eq!(found, expected, "level {level} leaf {leaf} bit {bit}");
        }
    }
}

#[test]
fn unsupported_huge_pages_are_misconfigurations() {
    let without = Rules::new(&Format::Ept(Ept { huge_2m: false, huge_1g: false, ..Ept::new() }));
    let with = Rules::new(&Format::Ept(Ept::new()));
    for level in [2, 3] {
        assert_eq!(without.decode(level, 0x87), Entry::Reserved);
        assert!(matches!(with.decode(level, 0x87), Entry::Leaf { .. }));
    }
    // Bit 7 is ignored in a level 1 entry.
    assert!(matches!(without.decode(1, 0x87), Entry::Leaf { .. }));
}

#[test]
fn bits_of_an_absent_entry_do_not_count() {
    for mode_based_execute in [false, true] {
        let rules = Rules::new(&Format::Ept(Ept { mode_based_execute, ..Ept::new() }));
        for level in 1..=4 {
            assert_eq!(rules.decode(level, !0x407), Entry::Absent);
            let only_user_execute = rules.decode(level, 0x400);
            assert_eq!(only_user_execute != Entry::Absent, mode_based_execute);
        }
    }
}

#[test]
fn mode_based_execute() {
    let ept = Ept { mode_based_execute: true, ..Ept::new() };
    let fetch_user = user(AccessKind::Fetch);
    let fetch_supervisor = Access::supervisor(AccessKind::Fetch);
    // (entry, supervisor fetch, user fetch): None is permitted.
    let cases = [
        (0x005, None, Some(0x18c | 1 << 5)),
        (0x401, Some(0x18c | 1 << 6), None),
        (0x405, None, None),
        (0x001, Some(0x18c), Some(0x18c)),
        (0x400, Some(0x184 | 1 << 6), None),
    ];
    for (entry, supervisor, user) in cases {
        let leaf = entry | WB | 0x9000;
        let code = |access| walk_leaf(ept, leaf, access).err().map(|fault| fault.code);
        assert_eq!(code(fetch_supervisor), supervisor, "{entry:#x} supervisor");
        assert_eq!(code(fetch_user), user, "{entry:#x} user");
    }
    // User-execute alone is execute-only.
    let without = Ept { exec_only: false, ..ept };
    let fault = walk_leaf(without, 0x400 | WB | 0x9000, fetch_user).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Reserved);
    // With the control off bit 10 is ignored and X is for everybody.
    let found = walk_leaf(Ept::new(), 5 | WB | 0x9000, fetch_user).unwrap();
    assert!(found.permissions.contains(Permissions::EXECUTE_USER));
    let fault = walk_leaf(Ept::new(), 0x401 | WB | 0x9000, fetch_user).unwrap_err();
    assert_eq!(fault.code, 0x18c);
}

#[test]
fn stages() {
    use AccessKind::{Read, Write};
    // (A/D, leaf, kind, stage, qualification)
    let cases = [
        (true, 0, Read, Stage::GuestTable, 0x083),
        (true, 0, Write, Stage::GuestTable, 0x083),
        (true, 1, Read, Stage::GuestTable, 0x08b),
        (false, 0, Read, Stage::GuestTable, 0x081),
        (false, 0, Write, Stage::GuestTable, 0x082),
        (false, 1, Write, Stage::GuestTable, 0x08a),
        (true, 0, Read, Stage::NoLinear, 0x001),
    ];
    for (accessed_dirty, rwx, kind, stage, qualification) in cases {
        let ept = Ept { accessed_dirty, ..Ept::new() };
        let leaf = if rwx == 0 { 0 } else { rwx | WB | 0x9000 };
        let fault = walk_leaf(ept, leaf, at_stage(kind, stage)).unwrap_err();
        assert_eq!(fault.code, qualification, "{kind:?} {stage:?}");
    }
    // Without A/D a read-only page will do for reading a guest table.
    let ept = Ept { accessed_dirty: false, ..Ept::new() };
    assert!(walk_leaf(ept, 1 | WB | 0x9000, at_stage(Read, Stage::GuestTable)).is_ok());
}

#[test]
fn permissions_of_all_levels_count_together() {
    let tables = Tables::new(4);
    let walker = Walker::new(&Format::Ept(Ept::new()));
    for weak in 1..=4 {
        tables.link(1, ADDRESS, 7);
        tables.set(1, ADDRESS, 0x9000 | WB | 7);
        tables.set(weak, ADDRESS, tables.get(weak, ADDRESS) & !2);
        let write = user(AccessKind::Write);
        let fault = walker.translate(&tables.mem, tables.root(), ADDRESS, write).unwrap_err();
        assert_eq!(fault.code, 0x182 | 5 << 3, "level {weak}");
        assert_eq!(fault.kind, FaultKind::Protection);
        // An absent entry below clears the permission bits, a misconfiguration below wins.
        if weak > 1 {
            tables.set(1, ADDRESS, 0);
            let absent = walker.translate(&tables.mem, tables.root(), ADDRESS, write);
            assert_eq!(absent.unwrap_err().code, 0x182);
            tables.set(1, ADDRESS, 6);
            let broken = walker.translate(&tables.mem, tables.root(), ADDRESS, write);
            assert_eq!(broken.unwrap_err().kind, FaultKind::Reserved);
        }
    }
}

#[test]
fn accessed_and_dirty() {
    const A: u64 = 1 << 8;
    const D: u64 = 1 << 9;
    for leaf_level in 1..=3 {
        for (kind, stage, bits) in [
            (AccessKind::Read, Stage::Final, A),
            (AccessKind::Fetch, Stage::Final, A),
            (AccessKind::Write, Stage::Final, A | D),
            (AccessKind::Read, Stage::GuestTable, A | D),
        ] {
            for accessed_dirty in [true, false] {
                let ept = Ept { accessed_dirty, ..Ept::new() };
                let tables = Tables::new(4);
                let size = if leaf_level > 1 { 0x80 } else { 0 };
                let leaf = 0x40_0000_0000 | size | WB | 7;
                tables.link(leaf_level, ADDRESS, 7);
                tables.set(leaf_level, ADDRESS, leaf);
                let found = Walker::new(&Format::Ept(ept))
                    .translate(&tables.mem, tables.root(), ADDRESS, at_stage(kind, stage))
                    .unwrap();
                let set = if accessed_dirty { bits } else { 0 };
                assert_eq!(tables.get(leaf_level, ADDRESS), leaf | set);
                assert_eq!(found.dirty, !accessed_dirty || bits & D != 0);
                assert_eq!(found.reads, 5 - u32::from(leaf_level));
                for level in leaf_level + 1..=4 {
                    let expected = if accessed_dirty { A } else { 0 };
                    assert_eq!(tables.get(level, ADDRESS) & (A | D), expected);
                }
            }
        }
    }
}

#[test]
fn huge_pages_keep_their_offset() {
    for (level, mask) in [(2, 0x1f_ffff_u64), (3, 0x3fff_ffff)] {
        let tables = Tables::new(5);
        let address = ADDRESS | 0x1_2345_6789 & mask | 1 << 49;
        tables.link(level, address, 7);
        tables.set(level, address, 0x40_0000_0000 | 0x80 | WB | 7);
        let format = Format::Ept(Ept { levels: 5, ..Ept::new() });
        let found = Walker::new(&format)
            .translate(&tables.mem, tables.root(), address, user(AccessKind::Read))
            .unwrap();
        assert_eq!(found.pa, 0x40_0000_0000 | address & mask);
        assert!(found.writable() && found.executable());
        assert_eq!((found.level, found.reads), (level, 6 - u32::from(level)));
    }
}

#[test]
fn address_beyond_the_tables() {
    let tables = Tables::new(4);
    tables.link(1, 0, 7);
    tables.set(1, 0, 0x9000 | WB | 7);
    let walker = Walker::new(&Format::Ept(Ept::new()));
    let fault =
        walker.translate(&tables.mem, tables.root(), 1 << 48, user(AccessKind::Read)).unwrap_err();
    assert_eq!((fault.kind, fault.code, fault.reads), (FaultKind::NotPresent, 0x181, 0));
}
