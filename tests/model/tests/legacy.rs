//! Ordinary paging: the SDM's and APM's rules for long mode and PAE, by hand.

mod common;

use common::{KINDS, Tables, bits, user};
use mmu_model::{
    Access, AccessKind, Entry, Fault, FaultKind, Format, Legacy, Mode, Rules, Translation, Vendor,
    Walker,
};

const NX: u64 = 1 << 63;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;

fn long(legacy: Legacy) -> Format {
    Format::Legacy(legacy)
}

fn walk(
    legacy: Legacy,
    tables: &Tables,
    address: u64,
    access: Access,
) -> Result<Translation, Fault> {
    Walker::new(&long(legacy)).translate(&tables.mem, tables.root(), address, access)
}

#[test]
fn every_permission_with_every_access() {
    const ADDRESS: u64 = 0x12_3456_7000;
    for choice in 0..4 {
        let legacy =
            Legacy { wp: choice & 1 != 0, nxe: choice & 2 != 0, ..Legacy::new(Mode::Long4) };
        // Where the weak entry is must not matter.
        for weak in 1..=4_u8 {
            for flags in 0..16_u64 {
                let (w, u, nx) = (flags & 1, flags >> 1 & 1, flags >> 2 & 1);
                let p = flags >> 3 & 1;
                let tables = Tables::new(4);
                tables.link(1, ADDRESS, 7);
                tables.set(1, ADDRESS, 0x9007);
                let strong = tables.get(weak, ADDRESS) & !7;
                tables.set(weak, ADDRESS, strong | p | w << 1 | u << 2 | nx << 63);
                for kind in KINDS {
                    for is_user in [true, false] {
                        let access =
                            if is_user { Access::user(kind) } else { Access::supervisor(kind) };
                        let reserved = nx == 1 && !legacy.nxe;
                        let denied = is_user && u == 0
                            || match kind {
                                AccessKind::Read => false,
                                AccessKind::Write => w == 0 && (is_user || legacy.wp),
                                AccessKind::Fetch => nx == 1,
                            };
                        let who = u64::from(is_user) << 2
                            | u64::from(kind == AccessKind::Write) << 1
                            | u64::from(kind == AccessKind::Fetch && legacy.nxe) << 4;
                        let expected = match (p, reserved, denied) {
                            (0, ..) => Some(who),
                            (_, true, _) => Some(who | 9),
                            (_, _, true) => Some(who | 1),
                            _ => None,
                        };
                        let found = walk(legacy, &tables, ADDRESS, access);
                        let code = found.err().map(|fault| fault.code);
                        assert_eq!(code, expected, "{legacy:?} {weak} {flags:#x} {access:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_single_bit_in_long_mode() {
    let rows = [
        (1, 0x07_u64, "51:46"),
        (2, 0x87, "51:46 20:13"),
        (3, 0x87, "51:46 29:13"),
        (2, 0x07, "51:46"),
        (3, 0x07, "51:46"),
        (4, 0x07, "51:46 7"),
        (5, 0x07, "51:46 7"),
    ];
    for vendor in [Vendor::Intel, Vendor::Amd] {
        let rules = Rules::new(&long(Legacy { vendor, ..Legacy::new(Mode::Long5) }));
        for (level, base, reserved) in rows {
            for bit in 1..64_u32 {
                if bit == 7 && (level == 2 || level == 3) {
                    continue;
                }
                let amd_only = vendor == Vendor::Amd && level >= 4 && bit == 8;
                let expected = bits(reserved) >> bit & 1 != 0 || amd_only;
                let found = rules.decode(level, base ^ 1 << bit) == Entry::Reserved;
                assert_eq!(found, expected, "{vendor:?} level {level} {base:#x} bit {bit}");
            }
        }
    }
    let small = Rules::new(&long(Legacy { gbpages: false, ..Legacy::new(Mode::Long4) }));
    assert_eq!(small.decode(3, 0x87), Entry::Reserved);
}

#[test]
fn every_single_bit_in_pae() {
    let rows = [
        (1, 0x07_u64, "62:40"),
        (2, 0x87, "62:40 20:13"),
        (2, 0x07, "62:40"),
        (3, 0x01, "63:40 8:5 2:1"),
    ];
    let pae = Legacy { max_phys_bits: 40, ..Legacy::new(Mode::Pae) };
    for nxe in [true, false] {
        let rules = Rules::new(&long(Legacy { nxe, ..pae }));
        for (level, base, reserved) in rows {
            for bit in 1..64_u32 {
                if bit == 7 && level == 2 {
                    continue;
                }
                let expected = bits(reserved) >> bit & 1 != 0 || (!nxe && bit == 63);
                let found = rules.decode(level, base ^ 1 << bit) == Entry::Reserved;
                assert_eq!(found, expected, "nxe {nxe} level {level} {base:#x} bit {bit}");
            }
        }
    }
}

#[test]
fn pae_has_four_entries_without_permissions_at_a_32_byte_boundary() {
    const ADDRESS: u64 = 0xc765_4321;
    let pae = Legacy::new(Mode::Pae);
    let tables = Tables::new(3);
    // The root is 32 bytes into a page; entry 3 of it.
    assert!(tables.mem.write(0x3000 + 32 + 3 * 8, 0x2001));
    tables.set(2, ADDRESS, 0x1007);
    tables.set(1, ADDRESS, 0x9007);
    let root = 0x3000 + 32 + 0b11000;
    let found = Walker::new(&long(pae))
        .translate(&tables.mem, root, ADDRESS, user(AccessKind::Write))
        .unwrap();
    assert_eq!((found.pa, found.reads), (0x9321, 3));
    assert!(found.writable() && found.user() && found.executable());
    let pdpte = mmu_model::PhysMem::read(&tables.mem, 0x3000 + 32 + 3 * 8);
    assert_eq!(pdpte, Some(0x2001), "a PDPTE has no accessed bit");
    assert_eq!(tables.get(2, ADDRESS), 0x1007 | A);
    assert_eq!(tables.get(1, ADDRESS), 0x9007 | A | D);
    let beyond = Walker::new(&long(pae))
        .translate(&tables.mem, root, 1 << 32, user(AccessKind::Read))
        .unwrap_err();
    assert_eq!(beyond.kind, FaultKind::BadAddress);
}

#[test]
fn pae_2m_page() {
    let tables = Tables::new(3);
    tables.set(3, 0x4000_0000, 0x2001);
    tables.set(2, 0x4000_0000, 0x60_0000 | 0x85 | 1 << 12);
    let found = walk(Legacy::new(Mode::Pae), &tables, 0x4012_3456, user(AccessKind::Read)).unwrap();
    assert_eq!((found.pa, found.level, found.reads), (0x72_3456, 2, 2));
    assert!(!found.writable() && !found.dirty);
}

#[test]
fn huge_pages_and_their_pat_bit() {
    const ADDRESS: u64 = 0x7f12_3456_7890;
    for (level, mask) in [(2, 0x1f_ffff_u64), (3, 0x3fff_ffff)] {
        let tables = Tables::new(4);
        tables.link(level, ADDRESS, 7);
        tables.set(level, ADDRESS, 0x40_0000_0000 | 0x87 | 1 << 12);
        let access = user(AccessKind::Write);
        let found = walk(Legacy::new(Mode::Long4), &tables, ADDRESS, access).unwrap();
        assert_eq!(found.pa, 0x40_0000_0000 | ADDRESS & mask);
        assert_eq!(tables.get(level, ADDRESS) & (A | D), A | D);
    }
}

#[test]
fn canonical_addresses() {
    for (mode, top, width) in [(Mode::Long4, 4, 48), (Mode::Long5, 5, 57)] {
        let tables = Tables::new(top);
        let high = u64::MAX << (width - 1);
        let low = (1 << (width - 1)) - 4096;
        for address in [high, low] {
            tables.link(1, address, 7);
            tables.set(1, address, 0x9007);
            let found = walk(Legacy::new(mode), &tables, address, user(AccessKind::Read));
            assert_eq!(found.unwrap().pa, 0x9000);
        }
        for address in [1 << (width - 1), high - 1, 1 << 63] {
            let access = user(AccessKind::Read);
            let fault = walk(Legacy::new(mode), &tables, address, access).unwrap_err();
            assert_eq!((fault.kind, fault.code), (FaultKind::BadAddress, 0));
        }
    }
}

#[test]
fn nx_needs_nxe() {
    const ADDRESS: u64 = 0x5000;
    let tables = Tables::new(4);
    tables.link(1, ADDRESS, 7);
    tables.set(1, ADDRESS, NX | 0x9007);
    let fetch = user(AccessKind::Fetch);
    let on = Legacy::new(Mode::Long4);
    assert_eq!(walk(on, &tables, ADDRESS, fetch).unwrap_err().code, 0x15);
    assert!(!walk(on, &tables, ADDRESS, user(AccessKind::Read)).unwrap().executable());
    let off = Legacy { nxe: false, ..on };
    let read = user(AccessKind::Read);
    assert_eq!(walk(off, &tables, ADDRESS, read).unwrap_err().code, 0xd);
}
