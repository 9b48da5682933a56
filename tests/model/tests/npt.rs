//! NPT: the APM's "Nested paging" and "Page translation", by hand.

mod common;

use common::{KINDS, Tables, at_stage, bits, user};
use mmu_model::{
    Access, AccessKind, Entry, Fault, FaultKind, Format, Npt, Rules, Stage, Translation, Walker,
};

const ADDRESS: u64 = 0x12_3456_7000;
const NX: u64 = 1 << 63;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;

fn walk_leaf(npt: Npt, leaf: u64, access: Access) -> Result<Translation, Fault> {
    let tables = Tables::new(npt.levels);
    tables.link(1, ADDRESS, 7);
    tables.set(1, ADDRESS, leaf);
    Walker::new(&Format::Npt(npt)).translate(&tables.mem, tables.root(), ADDRESS, access)
}

#[test]
fn exit_information() {
    use AccessKind::{Fetch, Read, Write};
    let cases = [
        (0, Read, 0x1_0000_0004),
        (0, Write, 0x1_0000_0006),
        (0, Fetch, 0x1_0000_0014),
        (0x9005, Write, 0x1_0000_0007),
        (NX | 0x9007, Fetch, 0x1_0000_0015),
        (0x9003, Read, 0x1_0000_0005),
        (0x9003, Write, 0x1_0000_0007),
        (1 << 51 | 0x9007, Read, 0x1_0000_000d),
        (1 << 51 | 0x9007, Write, 0x1_0000_000f),
    ];
    for (leaf, kind, information) in cases {
        // A nested access is a user access whatever the guest's CPL.
        for access in [user(kind), Access::supervisor(kind)] {
            let fault = walk_leaf(Npt::new(), leaf, access).unwrap_err();
            assert_eq!(fault.code, information, "{leaf:#x} {kind:?}");
        }
    }
}

#[test]
fn guest_table_walks_are_writes() {
    let access = at_stage(AccessKind::Read, Stage::GuestTable);
    let absent = walk_leaf(Npt::new(), 0, access).unwrap_err();
    assert_eq!(absent.code, 0x2_0000_0006);
    let read_only = walk_leaf(Npt::new(), 0x9005, access).unwrap_err();
    assert_eq!(read_only.code, 0x2_0000_0007);
    let tables = Tables::new(4);
    tables.link(1, ADDRESS, 7);
    tables.set(1, ADDRESS, 0x9007);
    let found = Walker::new(&Format::Npt(Npt::new()))
        .translate(&tables.mem, tables.root(), ADDRESS, access)
        .unwrap();
    assert!(found.dirty);
    assert_eq!(tables.get(1, ADDRESS), 0x9007 | A | D);
}

#[test]
fn every_permission_with_every_access() {
    for entry in 0..8_u64 {
        for nx in [0, NX] {
            for kind in KINDS {
                let user_ok = entry & 4 != 0;
                let expected = entry & 1 != 0
                    && user_ok
                    && match kind {
                        AccessKind::Read => true,
                        AccessKind::Write => entry & 2 != 0,
                        AccessKind::Fetch => nx == 0,
                    };
                for access in [user(kind), Access::supervisor(kind)] {
                    let found = walk_leaf(Npt::new(), entry | nx | 0x9000, access);
                    assert_eq!(found.is_ok(), expected, "{entry} {nx:#x} {kind:?}");
                }
            }
        }
    }
}

#[test]
fn every_single_bit() {
    // 40 address bits as an emulator has them; 1 GiB pages; NX on.
    let rows = [
        (1, 0x07_u64, "51:40"),
        (2, 0x87, "51:40 20:13"),
        (3, 0x87, "51:40 29:13"),
        (2, 0x07, "51:40"),
        (3, 0x07, "51:40"),
        (4, 0x07, "51:40 8:7"),
        (5, 0x07, "51:40 8:7"),
    ];
    let npt = Npt { levels: 5, max_phys_bits: 40, ..Npt::new() };
    let no_nx = Rules::new(&Format::Npt(Npt { nxe: false, ..npt }));
    let rules = Rules::new(&Format::Npt(npt));
    for (level, base, reserved) in rows {
        for bit in 1..64_u32 {
            if bit == 7 && (level == 2 || level == 3) {
                continue;
            }
            let entry = base ^ 1 << bit;
            let expected = bits(reserved) >> bit & 1 != 0;
            let found = rules.decode(level, entry) == Entry::Reserved;
            assert_eq!(found, expected, "level {level} base {base:#x} bit {bit}");
            let found = no_nx.decode(level, entry) == Entry::Reserved;
            assert_eq!(found, expected || bit == 63, "NXE=0, level {level} bit {bit}");
        }
        assert_eq!(rules.decode(level, base & !1), Entry::Absent);
        assert_eq!(rules.decode(level, !1), Entry::Absent);
    }
    let no_1g = Rules::new(&Format::Npt(Npt { huge_1g: false, ..npt }));
    assert_eq!(no_1g.decode(3, 0x87), Entry::Reserved);
    assert!(matches!(no_1g.decode(2, 0x87), Entry::Leaf { .. }));
}

#[test]
fn accessed_and_dirty_on_every_level() {
    for levels in [4, 5] {
        for kind in KINDS {
            let npt = Npt { levels, ..Npt::new() };
            let tables = Tables::new(levels);
            tables.link(1, ADDRESS, 7);
            tables.set(1, ADDRESS, 0x9007);
            let found = Walker::new(&Format::Npt(npt))
                .translate(&tables.mem, tables.root(), ADDRESS, user(kind))
                .unwrap();
            assert_eq!(found.reads, u32::from(levels));
            for level in 2..=levels {
                assert_eq!(tables.get(level, ADDRESS) & (A | D), A);
            }
            let dirty = kind == AccessKind::Write;
            assert_eq!(tables.get(1, ADDRESS) & (A | D), if dirty { A | D } else { A });
            assert_eq!(found.dirty, dirty);
        }
    }
}

#[test]
fn as_page_fault_error() {
    let fault = walk_leaf(Npt::new(), 0x9005, user(AccessKind::Write)).unwrap_err();
    assert_eq!(fault.page_fault_error(), 7);
    let fault = walk_leaf(Npt::new(), 0, user(AccessKind::Fetch)).unwrap_err();
    assert_eq!(fault.page_fault_error(), 0x14);
    let fault = walk_leaf(Npt::new(), 1 << 51 | 1, user(AccessKind::Read)).unwrap_err();
    assert_eq!((fault.kind, fault.page_fault_error()), (FaultKind::Reserved, 0xd));
}
