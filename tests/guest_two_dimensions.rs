//! Walks in two dimensions against the independent model: a fault put at every reference in turn,
//! for every size of page on either side, every guest mode and both nested formats. Compared:
//! which of the two faults it is, its code bit by bit, its addresses, the reads in their order, the
//! changes.

mod guest_support;

use guest_support::plane::Plane;
use guest_support::{KERNEL, KINDS, NX, P, U, W, machine, nested_formats, request};
use mmu_core::access::{EptViolation, NpfInfo};
use mmu_core::addr::Gva;
use mmu_model::{AccessKind, Format, GuestAccess, GuestMachine, GuestMode, Who};
use shadow_mmu::guest::{GuestRoot, NestedReport, NestedTables, PaePointers, PointerError};

const LONG: u64 = 0x0000_7123_4567_8abc;
const LOW: u64 = 0x1234_5678;

const fn access(kind: AccessKind, who: Who) -> GuestAccess {
    GuestAccess { kind, who, pkru: 0 }
}

/// What may be wrong with an entry: not present, no reads (no users in formats where every present
/// page can be read), no writes, no fetches, a reserved bit, a memory type that does not exist.
fn wrongs(plane: &Plane, at: u64, value: u64) -> Vec<u64> {
    let ept = matches!(plane.format, Format::Ept(_)) && plane.is_nested(at);
    if plane.bytes(at) == 4 {
        return vec![value & !P, value & !U, value & !W, value | 1 << 21];
    }
    if ept {
        let types = value ^ 5 << 3;
        return vec![
            0,
            value & !1,
            value & !2,
            value & !4,
            value & !(1 << 10),
            1 << 51 | value,
            types,
        ];
    }
    vec![value & !P, value & !U, value & !W, value | NX, value | 1 << 51]
}

/// Put every wrong at every reference. Returns the cases and the references of the sound walk.
fn faults_at_every_reference(plane: &mut Plane) -> (u64, usize) {
    assert!(plane.compare(access(AccessKind::Read, KERNEL)), "nothing is wrong yet");
    let references = plane.mem.log.borrow().clone();
    let mut cases = 0;
    for at in &references {
        let bytes = plane.bytes(*at);
        let sound = plane.mem.get(*at, bytes).expect("an entry");
        for wrong in wrongs(plane, *at, sound) {
            plane.mem.set(*at, bytes, wrong);
            for kind in KINDS {
                for who in [Who::User, KERNEL] {
                    plane.compare(access(kind, who));
                    cases += 1;
                }
            }
        }
        plane.mem.set(*at, bytes, sound);
    }
    (cases, references.len())
}

/// Wide enough for regions of their own under five levels, with a reserved bit left.
fn guest(mode: GuestMode) -> GuestMachine {
    GuestMachine { smep: true, max_phys_bits: 51, ..machine(mode) }
}

#[test]
fn a_fault_at_every_reference_of_a_two_dimensional_walk_agrees_with_the_model() {
    let mut cases = 0;
    for nested_levels in [4, 5] {
        for format in nested_formats(nested_levels) {
            for (mode, guest_levels) in [(GuestMode::FourLevel, 4), (GuestMode::FiveLevel, 5)] {
                for guest_leaf in 1..=3 {
                    for host_leaf in 1..=3 {
                        let leaves = (guest_leaf, host_leaf);
                        let mut plane = Plane::new(guest(mode), format, LONG, leaves);
                        let (more, references) = faults_at_every_reference(&mut plane);
                        cases += more;
                        let n = usize::from(guest_levels + 1 - guest_leaf);
                        let m = usize::from(nested_levels + 1 - host_leaf);
                        assert_eq!(references, n * m + n + m, "{n} and {m} levels");
                    }
                }
            }
        }
    }
    eprintln!("CASES faults at references, long mode: {cases}");
    assert!(cases >= 3456 + 5040, "{cases}");
}

#[test]
fn the_other_guest_modes_agree_with_the_model_at_every_reference_too() {
    let mut cases = 0;
    for nested_levels in [4, 5] {
        for format in nested_formats(nested_levels) {
            for mode in [GuestMode::Off, GuestMode::TwoLevel, GuestMode::Pae] {
                for guest_leaf in 1..=2 {
                    for host_leaf in 1..=3 {
                        let leaves = (guest_leaf, host_leaf);
                        let mut plane = Plane::new(guest(mode), format, LOW, leaves);
                        let (more, references) = faults_at_every_reference(&mut plane);
                        cases += more;
                        let n = match mode {
                            GuestMode::Off => 0,
                            _ => usize::from(3 - guest_leaf),
                        };
                        let m = usize::from(nested_levels + 1 - host_leaf);
                        assert_eq!(references, n * m + n + m, "{mode:?}, {n} and {m} levels");
                    }
                }
            }
        }
    }
    eprintln!("CASES faults at references, other modes: {cases}");
    assert!(cases > 0);
}

/// KVM row 4.59 and design source S4: what a two-dimensional walk costs.
#[test]
fn loads_are_those_of_the_formula() {
    let expected = [((4, 4), 24), ((5, 5), 35), ((4, 5), 29), ((5, 4), 29)];
    for ((guest_levels, nested_levels), loads) in expected {
        for format in nested_formats(nested_levels) {
            let mode = if guest_levels == 5 { GuestMode::FiveLevel } else { GuestMode::FourLevel };
            let plane = Plane::new(guest(mode), format, LONG, (1, 1));
            let walk = plane.walk(access(AccessKind::Write, Who::User)).expect("nothing is wrong");
            assert_eq!(walk.loads(), loads);
            assert_eq!(plane.mem.log.borrow().len(), loads as usize);
            let formula = plane.guest.mode().two_dimensional_reads(plane.nested.mode());
            assert_eq!(formula, loads);
            let tables = NestedTables::new(&plane.nested, plane.eptp);
            let asked = request(&plane.machine, access(AccessKind::Read, Who::User));
            let root = GuestRoot::Cr3(plane.roots.cr3);
            let gva = Gva::new(plane.address);
            let target = plane.guest.nested_gva_to_gpa(&plane.mem, &tables, &root, gva, asked);
            assert_eq!(target, Ok(walk.page.target()), "the emulator asks the same");
        }
    }
}

/// The pointers of PAE are loaded through the nested tables: with EPT as plain reads without a
/// linear address, with NPT as accesses to a guest table (SDM 3C 29.3.5; APM 2 15.25.6).
#[test]
fn pae_pointers_are_loaded_through_the_nested_tables() {
    for format in nested_formats(4) {
        let mut plane = Plane::new(guest(GuestMode::Pae), format, LOW, (1, 1));
        plane.nest(0x5000, 1);
        let second = plane.target(0x5000, 1) + 8;
        plane.mem.set(second, 8, 0x7001);
        let tables = NestedTables::new(&plane.nested, plane.eptp);
        let load = |cr3| plane.guest.load_nested_pointers(&plane.mem, &tables, cr3);
        let loaded = load(0x5000).map(|pointers| PaePointers::values(&pointers));
        assert_eq!(loaded, Ok([0, 0x7001, 0, 0]), "{format:?}");
        plane.mem.set(second, 8, 0x7003);
        assert_eq!(load(0x5000), Err(PointerError::Reserved { index: 1, value: 0x7003 }));
        let Err(PointerError::Nested(fault)) = load(0x7fff_f000) else {
            panic!("there is nothing");
        };
        let expected = match format {
            Format::Ept(_) => NestedReport::EptViolation(EptViolation::READ),
            _ => NestedReport::Npf(NpfInfo::from_bits_retain(0x2_0000_0006)),
        };
        assert_eq!((fault.report, fault.gpa.get()), (expected, 0x7fff_f000));
    }
}
