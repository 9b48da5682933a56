//! The caches of the software CPU: stale until flushed, and exactly what is named is flushed.

mod common;

use common::{Tables, user};
use mmu_model::{
    AccessKind, AccessedOn, Caches, Capacity, Denial, Ept, FaultKind, Format, Legacy, Mode, Npt,
    PhysMem, SoftCpu, VecMem,
};

use AccessKind::{Fetch, Read, Write};

/// Accessed and dirty bits of a format.
fn formats() -> [(Format, u64, u64); 4] {
    let ept = Ept::new();
    let ept_plain = Ept { accessed_dirty: false, ..ept };
    [
        (Format::Legacy(Legacy::new(Mode::Long4)), 1 << 5, 1 << 6),
        (Format::Npt(Npt::new()), 1 << 5, 1 << 6),
        (Format::Ept(ept), 1 << 8, 1 << 9),
        (Format::Ept(ept_plain), 0, 0),
    ]
}

fn cpu(format: &Format, tables: &Tables) -> SoftCpu {
    SoftCpu::new(format, tables.root(), Caches::unlimited())
}

#[test]
fn a_stale_leaf_stays_until_flushed() {
    for (format, ..) in formats() {
        let tables = Tables::new(4);
        tables.link(1, 0, 7);
        tables.set(1, 0x3000, 0x9007);
        tables.set(1, 0x4000, 0xb007);
        let mut cpu = cpu(&format, &tables);
        assert_eq!(cpu.access(&tables.mem, 0x3010, user(Read)), Ok(0x9010));
        assert_eq!(cpu.access(&tables.mem, 0x4010, user(Read)), Ok(0xb010));
        tables.set(1, 0x3000, 0);
        tables.set(1, 0x4000, 0);
        assert_eq!(cpu.access(&tables.mem, 0x3020, user(Read)), Ok(0x9020));
        cpu.flush_pages(2..3);
        cpu.flush_tables(&[0x1000, 0x2000, 0x3000]);
        assert_eq!(cpu.access(&tables.mem, 0x3020, user(Read)), Ok(0x9020));
        cpu.flush_pages(3..4);
        let fault = cpu.access(&tables.mem, 0x3020, user(Read)).unwrap_err();
        assert_eq!(fault.kind, FaultKind::NotPresent);
        assert_eq!(cpu.access(&tables.mem, 0x4010, user(Read)), Ok(0xb010));
        cpu.flush_all();
        assert!(cpu.access(&tables.mem, 0x4010, user(Read)).is_err());
    }
}

#[test]
fn a_stale_table_stays_until_flushed() {
    for (format, ..) in formats() {
        let tables = Tables::new(4);
        tables.link(1, 0, 7);
        for page in 0..4 {
            tables.set(1, page << 12, 0x9007);
            // A second level 1 table in page 6, where everything leads to page 10.
            assert!(tables.mem.write(0x6000 + page * 8, 0xa007));
        }
        let mut cpu = cpu(&format, &tables);
        assert_eq!(cpu.access(&tables.mem, 0, user(Read)), Ok(0x9000));
        let walks = *cpu.stats();
        assert_eq!((walks.entries_read, walks.short_walks), (4, 0));

        tables.set(2, 0, 0x6007);
        // Another page: not in the TLB, but the way to the old table is cached.
        assert_eq!(cpu.access(&tables.mem, 0x1000, user(Read)), Ok(0x9000));
        assert_eq!(cpu.stats().entries_read, 5);
        cpu.flush_pages(0..512);
        assert_eq!(cpu.access(&tables.mem, 0x2000, user(Read)), Ok(0x9000));
        cpu.flush_tables(&[0x6000]);
        assert_eq!(cpu.access(&tables.mem, 0x3000, user(Read)), Ok(0x9000));
        cpu.flush_tables(&[0x1000]);
        cpu.flush_pages(1..2);
        assert_eq!(cpu.access(&tables.mem, 0x1000, user(Read)), Ok(0xa000));
        assert_eq!(cpu.access(&tables.mem, 0x2000, user(Read)), Ok(0x9000), "TLB");
    }
}

#[test]
fn accessed_is_set_again_only_after_a_flush() {
    for (format, accessed, _) in formats() {
        let tables = Tables::new(4);
        tables.link(1, 0, 7);
        tables.set(1, 0, 0x9007);
        let mut cpu = cpu(&format, &tables);
        assert!(cpu.access(&tables.mem, 0, user(Read)).is_ok());
        for level in 1..=4 {
            assert_eq!(tables.get(level, 0) & accessed, accessed);
            tables.set(level, 0, tables.get(level, 0) & !accessed);
        }
        assert!(cpu.access(&tables.mem, 0, user(Read)).is_ok());
        for level in 1..=4 {
            assert_eq!(tables.get(level, 0) & accessed, 0);
        }
        // The leaf alone is walked again while the way to it is cached.
        cpu.flush_pages(0..1);
        assert!(cpu.access(&tables.mem, 0, user(Read)).is_ok());
        assert_eq!(tables.get(1, 0) & accessed, accessed);
        for level in 2..=4 {
            assert_eq!(tables.get(level, 0) & accessed, 0);
        }
        cpu.flush_all();
        assert!(cpu.access(&tables.mem, 0, user(Read)).is_ok());
        for level in 1..=4 {
            assert_eq!(tables.get(level, 0) & accessed, accessed);
        }
    }
}

#[test]
fn a_write_through_a_clean_translation_walks_and_sets_dirty() {
    for (format, _, dirty) in formats() {
        let tables = Tables::new(4);
        tables.link(1, 0, 7);
        tables.set(1, 0, 0x9007);
        let mut cpu = cpu(&format, &tables);
        assert!(cpu.access(&tables.mem, 0, user(Read)).is_ok());
        assert_eq!(tables.get(1, 0) & dirty, 0);
        assert!(cpu.access(&tables.mem, 0, user(Write)).is_ok());
        assert_eq!(tables.get(1, 0) & dirty, dirty);
        assert_eq!(cpu.stats().dirty_walks, u64::from(dirty != 0));
        // Now cached as dirty: not set again without a flush.
        tables.set(1, 0, tables.get(1, 0) & !dirty);
        assert!(cpu.access(&tables.mem, 0, user(Write)).is_ok());
        assert_eq!(tables.get(1, 0) & dirty, 0);
        cpu.flush_pages(0..1);
        assert!(cpu.access(&tables.mem, 0, user(Write)).is_ok());
        assert_eq!(tables.get(1, 0) & dirty, dirty);
    }
}

#[test]
fn the_dirty_walk_sees_that_the_page_is_gone() {
    for (format, _, dirty) in formats() {
        let tables = Tables::new(4);
        tables.link(1, 0, 7);
        tables.set(1, 0, 0x9007);
        let mut cpu = cpu(&format, &tables);
        assert!(cpu.access(&tables.mem, 0, user(Read)).is_ok());
        tables.set(1, 0, 0);
        assert_eq!(cpu.access(&tables.mem, 0, user(Write)).is_err(), dirty != 0);
        // The fault took the stale translation with it.
        assert_eq!(cpu.access(&tables.mem, 0, user(Read)).is_err(), dirty != 0);
    }
}

#[test]
fn a_cached_denial_is_spurious_once_or_walks() {
    for (format, ..) in formats() {
        for denial in [Denial::Fault, Denial::Walk] {
            let tables = Tables::new(4);
            tables.link(1, 0, 7);
            tables.set(1, 0, 0x9005);
            let mut cpu = cpu(&format, &tables).with_choices(AccessedOn::Success, denial);
            assert!(cpu.access(&tables.mem, 0, user(Read)).is_ok());
            tables.set(1, 0, 0x9007);
            let first = cpu.access(&tables.mem, 0, user(Write));
            assert_eq!(first.is_ok(), denial == Denial::Walk);
            if let Err(fault) = first {
                assert_eq!((fault.kind, fault.reads), (FaultKind::Protection, 0));
                assert_eq!(fault.page_fault_error(), 7);
                if matches!(format, Format::Ept(_)) {
                    assert_eq!(fault.code, 0x1aa);
                }
            }
            assert_eq!(cpu.access(&tables.mem, 0, user(Write)), Ok(0x9000));
        }
    }
}

#[test]
fn permissions_from_above_are_cached_with_the_table() {
    let tables = Tables::new(4);
    tables.link(1, 0, 7);
    tables.set(3, 0, 0x2005);
    tables.set(1, 0x1000, 0x9007);
    tables.set(1, 0x2000, 0x9007);
    let mut cpu = cpu(&Format::Npt(Npt::new()), &tables);
    assert!(cpu.access(&tables.mem, 0x1000, user(Read)).is_ok());
    tables.set(3, 0, 0x2007);
    // Through the cached prefix: still read-only. The fault heals it.
    assert!(cpu.access(&tables.mem, 0x2000, user(Write)).is_err());
    assert!(cpu.access(&tables.mem, 0x2000, user(Write)).is_ok());
    assert!(cpu.access(&tables.mem, 0x2000, user(Fetch)).is_ok());
}

#[test]
fn huge_pages_are_cached_whole_and_flushed_by_any_part() {
    let tables = Tables::new(4);
    tables.link(2, 0, 7);
    tables.set(2, 0x20_0000, 0x87);
    let mut cpu = cpu(&Format::Ept(Ept::new()), &tables);
    assert_eq!(cpu.access(&tables.mem, 0x20_1234, user(Read)), Ok(0x1234));
    tables.set(2, 0x20_0000, 0);
    assert_eq!(cpu.access(&tables.mem, 0x3f_ffff, user(Read)), Ok(0x1f_ffff));
    assert_eq!((cpu.stats().hits, cpu.stats().walks), (1, 1));
    cpu.flush_pages(0x3ff..0x400);
    assert!(cpu.access(&tables.mem, 0x20_1234, user(Read)).is_err());
}

#[test]
fn a_new_root_starts_empty() {
    let tables = Tables::new(4);
    tables.link(1, 0, 7);
    tables.set(1, 0, 0x9007);
    let mut cpu = cpu(&Format::Npt(Npt::new()), &tables);
    assert!(cpu.access(&tables.mem, 0, user(Read)).is_ok());
    assert_eq!((cpu.tlb().len(), cpu.psc().len()), (1, 3));
    cpu.set_root(0x7000);
    assert!(cpu.tlb().is_empty() && cpu.psc().is_empty());
    assert!(cpu.access(&tables.mem, 0, user(Read)).is_err());
    assert_eq!(cpu.root(), 0x7000);
}

#[test]
fn speculation_caches_tables_that_lead_nowhere_yet() {
    let tables = Tables::new(4);
    tables.link(1, 0, 7);
    let format = Format::Npt(Npt::new());
    let mut cpu = cpu(&format, &tables).with_choices(AccessedOn::Passage, Denial::Fault);
    cpu.speculate(&tables.mem, 0x1000, user(Read));
    assert_eq!((cpu.tlb().len(), cpu.psc().len()), (0, 3));
    assert_eq!(cpu.stats().faults, 0);
    // The table is replaced. A page that never faulted goes through the old one.
    assert!(tables.mem.write(0x6000, 0xa007));
    tables.set(1, 0, 0x9007);
    tables.set(2, 0, 0x6007);
    assert_eq!(cpu.access(&tables.mem, 0, user(Read)), Ok(0x9000));
}

#[test]
fn bounded_caches_are_correct_and_reproducible() {
    let mem = VecMem::new(600);
    // 512 level 1 tables would be too many; one, with 512 different pages behind it.
    for (at, entry) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)] {
        assert!(mem.write(at, entry));
    }
    for page in 0..512_u64 {
        assert!(mem.write(0x4000 + page * 8, (page + 40) << 12 | 7));
    }
    let run = |seed| {
        let caches = Caches { tlb: Capacity::Entries(64), psc: Capacity::Entries(2), seed };
        let mut cpu = SoftCpu::new(&Format::Npt(Npt::new()), 0x1000, caches);
        let mut random = mmu_model::Random::new(99);
        for _ in 0..20_000 {
            let page = random.below(512) * random.below(512) / 512;
            let found = cpu.access(&mem, page << 12 | 8, user(Read));
            assert_eq!(found, Ok((page + 40) << 12 | 8));
        }
        assert!(cpu.tlb().len() <= 64 && cpu.psc().len() <= 2);
        *cpu.stats()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    assert!(run(1).hits > 1000);
    assert!(mem.read(0x4000).is_some_and(|entry| entry & 0x20 != 0));
    let realistic = SoftCpu::new(&Format::Npt(Npt::new()), 0, Caches::realistic(3));
    assert!(realistic.tlb().is_empty());
}
