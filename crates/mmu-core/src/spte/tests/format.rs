//! Bit positions against a second source, and the layout of every class.

use super::*;
use crate::spte::format::{Fields, MMIO_GEN_HIGH, MMIO_GEN_LOW, PAGE_SIZE};
use model::Rules;
use x86::bits64::paging::{PDEntry, PDFlags, PDPTFlags, PML4Flags, PML5Flags, PTFlags};

#[test]
fn legacy_bits_are_those_of_the_x86_crate() {
    let pairs = [
        (Legacy::READ, PTFlags::P.bits()),
        (Legacy::WRITABLE, PTFlags::RW.bits()),
        (Legacy::USER, PTFlags::US.bits()),
        (Legacy::ACCESSED, PTFlags::A.bits()),
        (Legacy::DIRTY, PTFlags::D.bits()),
        (Legacy::NX, PTFlags::XD.bits()),
        (PAGE_SIZE, PDFlags::PS.bits()),
        (PAGE_SIZE, PDPTFlags::PS.bits()),
        (Legacy::HOST_WRITABLE, PTFlags::USER_9.bits()),
        (Legacy::MMU_WRITABLE, PTFlags::USER_10.bits()),
        (Spte::MMU_PRESENT, PTFlags::USER_11.bits()),
    ];
    for (ours, theirs) in pairs {
        assert_eq!(ours, theirs);
    }
    let link = Legacy::READ | Legacy::WRITABLE | Legacy::USER | Legacy::ACCESSED;
    let pml4 = PML4Flags::P | PML4Flags::RW | PML4Flags::US | PML4Flags::A;
    let pml5 = PML5Flags::P | PML5Flags::RW | PML5Flags::US | PML5Flags::A;
    assert_eq!((link, link), (pml4.bits(), pml5.bits()));
}

#[test]
fn the_x86_crate_reads_our_legacy_entries() {
    let config = config::<Legacy>(Capabilities::legacy());
    let table = PDEntry(config.table(Pfn::new(0x123), Level::L2).raw());
    assert!(table.is_present() && table.is_writeable() && table.is_accessed() && !table.is_page());
    assert_eq!(table.address().as_u64(), 0x12_3000);
    let huge = PDEntry(config.leaf(&LeafSpec::new(Pfn::new(0x200), Level::L2)).raw());
    assert!(huge.is_present() && huge.is_page() && huge.is_dirty());
    assert!(!huge.is_instruction_fetching_disabled());
    assert_eq!(huge.address().as_u64(), 0x20_0000);
}

#[test]
fn software_bits_are_where_kvm_has_them() {
    assert_eq!((Ept::HOST_WRITABLE, Ept::MMU_WRITABLE), (1 << 53, 1 << 55));
    assert_eq!((Npt::HOST_WRITABLE, Npt::MMU_WRITABLE), (1 << 9, 1 << 10));
    assert_eq!((Ept::ACCESSED, Ept::DIRTY), (1 << 8, 1 << 9));
    assert_eq!(Ept::TRACK_SAVED, 1 << 52 | 1 << 54 | 1 << 62);
    assert_eq!(Npt::TRACK_SAVED, 1 << 52);
    assert_eq!(Spte::EMPTY.raw(), 1 << 63);
    assert_eq!(Spte::FROZEN.raw(), 1 << 63 | 0x1a0);
    assert_eq!((MMIO_GEN_LOW, MMIO_GEN_HIGH), (0x3f8, 0x7ff0_0000_0000_0000));
}

/// No field of a class shares a bit with another, said once more at run time with its name.
fn overlaps(fields: Fields) -> Vec<(&'static str, &'static str)> {
    let mut found = Vec::new();
    for (index, &(name, mask)) in fields.iter().enumerate() {
        for &(other, other_mask) in fields.iter().skip(index + 1) {
            if mask & other_mask != 0 {
                found.push((name, other));
            }
        }
    }
    found
}

struct Layouts;

impl ForFormat for Layouts {
    fn run<F: Rules>(&mut self) {
        for fields in [F::LEAF, F::TRACKED_LEAF, F::TABLE, F::MMIO_ENTRY] {
            assert_eq!(overlaps(fields), [], "{}", F::NAME);
            assert!(bits::disjoint(fields));
            assert_eq!(bits::union(fields), fields.iter().fold(0, |all, (_, mask)| all | mask));
        }
    }
}

// INVARIANT[I7].
#[test]
fn no_two_fields_of_a_class_overlap() {
    each_format(&mut Layouts);
    assert!(!bits::disjoint(&[("a", 3), ("b", 2)]));
}

#[test]
fn memory_types_read_back_and_bad_ones_do_not() {
    for raw in (0..16u64).map(|n| n << 3) {
        match MemType::from_ept(raw) {
            Some(kind) => assert_eq!(kind.ept_bits(), raw),
            None => assert!(matches!((raw >> 3) & 7, 2 | 3 | 7)),
        }
    }
}

#[test]
fn entries_are_printed_in_words() {
    let config = config::<Ept>(Capabilities {
        accessed_dirty: false,
        max_phys_bits: 40,
        ..Capabilities::ept()
    });
    let spec = LeafSpec { map_writable: false, ..LeafSpec::new(Pfn::new(0x400), Level::L1) };
    let leaf = config.leaf(&spec);
    let mmio = config.mmio(Gfn::new(0xfee00), Access::ALL, 9).unwrap_or(Spte::EMPTY);
    let cases = [
        (Spte::EMPTY, Level::L1, "empty"),
        (Spte::FROZEN, Level::L1, "frozen"),
        (mmio, Level::L1, "mmio gfn 0xfee00 generation 9"),
        (
            config.table(Pfn::new(2), Level::L2),
            Level::L2,
            "table 0x2 R W X XU A/D-type=1 suppress-VE",
        ),
        (
            leaf,
            Level::L1,
            "leaf 4K 0x400 R X memory-type=6 ignore-PAT A XU host-writable MMU-writable \
             A/D-type=1 suppress-VE",
        ),
        (
            config.age(leaf).with(1 << 57),
            Level::L1,
            "leaf 4K 0x400 memory-type=6 ignore-PAT saved-R host-writable saved-X MMU-writable \
             A/D-type=1 saved-XU suppress-VE unknown=0x200000000000000",
        ),
        (Spte::from_raw(0x10), Level::L1, "corrupt 0x10"),
    ];
    for (spte, level, want) in cases {
        assert_eq!(alloc::format!("{}", config.describe(spte, level)), want);
    }
    let words = [(Spte::EMPTY, "Spte(EMPTY)"), (Spte::FROZEN, "Spte(FROZEN)")];
    for (spte, want) in words {
        assert_eq!(alloc::format!("{spte:?}"), want);
    }
    assert_eq!(
        alloc::format!("{:?} {:?}", Spte::from_raw(0x1881), Spte::from_raw(6)),
        "Spte(0x1881, present, PS, pfn 0x1) Spte(0x6, not present)"
    );
}
