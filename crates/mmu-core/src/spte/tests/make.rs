//! Constructors: golden values, every specification, splits and collapses (KVM rows 1.29, 1.43 and
//! 1.44).

use super::*;
use crate::sync::ENTRIES;
use model::{Rules, is};

#[test]
fn ordinary_entries_are_the_values_that_the_manuals_spell_out() {
    let ept = config::<Ept>(Capabilities::ept());
    let soft = config::<Ept>(Capabilities { accessed_dirty: false, ..Capabilities::ept() });
    let npt = config::<Npt>(Capabilities::npt());
    let legacy = config::<Legacy>(Capabilities::legacy());
    let pae = config::<Legacy>(Capabilities::pae());
    let spec = LeafSpec::new(Pfn::new(0x1234), Level::L1);
    let prefault = LeafSpec { accessed: false, ..spec };
    let user_read = LeafSpec { access: Access::READ | Access::USER, host_writable: false, ..spec };
    let device = LeafSpec { host_mmio: true, ..spec };
    // R W X WB ignore-PAT A D XU present, host- and MMU-writable, suppress #VE.
    assert_eq!(ept.leaf(&spec).raw(), 0x80a0_0000_0123_4f77);
    assert_eq!(ept.leaf(&device).raw(), 0x80a0_0000_0123_4f07);
    // Saved R, X and XU; A/D type 1; no R W X XU A.
    assert_eq!(soft.leaf(&prefault).raw(), 0xd0f0_0000_0123_4870);
    // P W U A D host- and MMU-writable present.
    assert_eq!(npt.leaf(&spec).raw(), 0x0123_4e67);
    assert_eq!(legacy.leaf(&user_read).raw(), 0x8000_0000_0123_4825);
    assert_eq!(ept.table(Pfn::new(0x1234), Level::L2).raw(), 0x8000_0000_0123_4d07);
    assert_eq!(soft.table(Pfn::new(0x1234), Level::L2).raw(), 0x9000_0000_0123_4c07);
    assert_eq!(npt.table(Pfn::new(0x1234), Level::L4).raw(), 0x0123_4827);
    assert_eq!(pae.table(Pfn::new(0x1234), Level::L3).raw(), 0x0123_4801);
}

#[cfg(not(loom))]
#[test]
fn a_huge_leaf_has_bit_7_and_an_aligned_frame() {
    let ept = config::<Ept>(Capabilities::ept());
    let at = |pfn, level| ept.leaf(&LeafSpec::new(Pfn::new(pfn), level));
    assert_eq!(at(0x1200, Level::L2).raw(), 0x80a0_0000_0120_0ff7);
    assert_eq!(at(0x4_0000, Level::L3).raw(), 0x80a0_0000_4000_0ff7);
    assert_eq!(at(0x1201, Level::L2), Spte::INVALID);
    assert_eq!(at(0x1200, Level::L3), Spte::INVALID);
    assert_eq!(at(0x1200, Level::L4), Spte::INVALID);
}

#[test]
fn impossible_entries_are_refused_and_no_class_takes_them() {
    let config = config::<Npt>(Capabilities { huge_1g: false, ..Capabilities::npt() });
    let end = config.max_pfn_exclusive();
    let leaf = config.leaf(&LeafSpec::new(Pfn::new(4), Level::L1));
    let refused = [
        config.leaf(&LeafSpec::new(end, Level::L1)),
        config.leaf(&LeafSpec::new(Pfn::new(1 << 40), Level::L1)),
        config.leaf(&LeafSpec::new(Pfn::new(!0), Level::L1)),
        config.leaf(&LeafSpec::new(Pfn::new(0), Level::L3)),
        config.table(end, Level::L2),
        config.table(Pfn::new(1), Level::L1),
        config.small_from_huge(leaf, Level::L1, 0),
        config.small_from_huge(leaf, Level::L2, 0),
        config.small_from_huge(
            config.leaf(&LeafSpec::new(Pfn::new(0), Level::L2)),
            Level::L2,
            ENTRIES,
        ),
        config.huge_from_small(Spte::EMPTY, Level::L2),
        config.huge_from_small(leaf, Level::L1),
        config.huge_from_small(leaf, Level::L3),
    ];
    for spte in refused {
        assert_eq!(spte, Spte::INVALID);
    }
    for level in Level::ALL {
        assert_eq!(config.kind(Spte::INVALID, level), SpteKind::Corrupt);
    }
    assert!(config.leaf(&LeafSpec::new(Pfn::new(end.get() - 1), Level::L1)).is_leaf(Level::L1));
}

struct AllSpecs {
    leaves: u64,
}

impl ForFormat for AllSpecs {
    fn run<F: Rules>(&mut self) {
        for config in variants::<F>() {
            for level in [Level::L1, Level::L2, Level::L3] {
                for spec in all_specs(Pfn::new(level.pages() * 3), level) {
                    self.check(&config, &spec);
                }
            }
        }
    }
}

impl AllSpecs {
    fn check<F: Rules>(&mut self, config: &SpteConfig<F>, spec: &LeafSpec) {
        let leaf = config.leaf(spec);
        if spec.level > config.max_leaf_level() {
            assert_eq!(leaf, Spte::INVALID);
            return;
        }
        self.leaves += 1;
        assert_eq!(config.kind(leaf, spec.level), SpteKind::Leaf);
        assert_eq!(config.pfn(leaf), spec.pfn);
        assert_eq!(config.is_host_writable(leaf), spec.host_writable);
        assert_eq!(config.is_accessed(leaf), spec.accessed);
        let tracked = config.is_access_tracked(leaf);
        // Without permissions there is nothing to save, and nobody may install the leaf (below).
        let permits = config.is_hw_present(config.untrack(leaf));
        assert!(!permits || tracked == (!config.ad_enabled() && !spec.accessed), "{spec:?}");
        assert!(config.writable_invariants_hold(leaf));
        assert_eq!(config.is_writable(leaf), config.is_dirty(leaf), "{spec:?}");
        let wants_write = spec.access.contains(Access::READ | Access::WRITE);
        let may_write = wants_write && spec.host_writable && spec.mmu_writable;
        assert_eq!(config.is_mmu_writable(leaf), may_write, "{spec:?}");
        assert_eq!(config.is_writable(leaf), may_write && spec.map_writable && !tracked);
        let restored = config.restore(leaf);
        if config.nx_huge_pages() && spec.level != Level::L1 {
            assert!(!config.permits(restored, Access::EXEC), "{spec:?}");
            assert!(!config.permits(restored, Access::EXEC | Access::USER), "{spec:?}");
        }
        // What permits something can be installed; what permits nothing cannot.
        let got = config.change_kind(Spte::EMPTY, leaf, spec.level);
        if permits {
            assert_eq!(got, Ok(ChangeKind::Map), "{spec:?} {leaf:?}");
        } else {
            assert_eq!(got, Err(IllegalChange::NoAccess { new: leaf }), "{spec:?}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn every_specification_makes_a_leaf_that_follows_the_rules() {
    let mut test = AllSpecs { leaves: 0 };
    each_format(&mut test);
    assert!(test.leaves > 50_000, "{}", test.leaves);
}

struct Tables;

impl ForFormat for Tables {
    fn run<F: Rules>(&mut self) {
        for config in variants::<F>() {
            for level in Level::ALL.into_iter().skip(1).filter(|&level| level <= config.levels()) {
                let table = config.table(Pfn::new(0x777), level);
                assert_eq!(config.kind(table, level), SpteKind::Table);
                assert_eq!(config.pfn(table), Pfn::new(0x777));
                assert!(model::new_ok::<F>(config.capabilities(), table.raw(), level));
                assert_eq!(config.change_kind(Spte::EMPTY, table, level), Ok(ChangeKind::Link));
                assert!(!config.is_dirty(table) || !config.ad_enabled());
                let pdpte = config.capabilities().is_pae() && level == Level::L3;
                if !pdpte {
                    assert_eq!(config.access(table), Access::ALL);
                    assert_eq!(config.is_accessed(table), config.ad_enabled());
                }
                let aged = config.age_table(table);
                let kind = config.change_kind(table, aged, level);
                let changes = config.is_accessed(table);
                let want = if changes { ChangeKind::TableAged(true) } else { ChangeKind::Same };
                assert_eq!(kind, Ok(want));
            }
        }
    }
}

#[test]
fn links_restrict_nothing_and_are_accessed() {
    each_format(&mut Tables);
}

struct Splits {
    children: u64,
}

impl ForFormat for Splits {
    fn run<F: Rules>(&mut self) {
        for config in variants::<F>() {
            for level in [Level::L2, Level::L3] {
                if level > config.max_leaf_level() {
                    continue;
                }
                for spec in all_specs(Pfn::new(level.pages() * 5), level) {
                    let made = config.leaf(&spec);
                    for huge in [made, config.age(made), config.clear_dirty(made)] {
                        self.check(&config, huge, level);
                    }
                }
            }
        }
    }
}

impl Splits {
    fn check<F: Rules>(&mut self, config: &SpteConfig<F>, huge: Spte, level: Level) {
        let Some(below) = level.down() else { return };
        let mitigated = config.nx_huge_pages();
        for index in [0, 1, ENTRIES / 2, ENTRIES - 1] {
            let small = config.small_from_huge(huge, level, index);
            self.children += 1;
            assert_eq!(config.kind(small, below), SpteKind::Leaf);
            let frame = huge.pfn().get() + to_u64(index) * below.pages();
            assert_eq!(small.pfn().get(), frame);
            assert_eq!(is(small.raw(), 7), below != Level::L1);
            assert_eq!(config.is_accessed(small), config.is_accessed(huge));
            assert_eq!(config.is_dirty(small), config.is_dirty(huge));
            assert_eq!(config.is_access_tracked(small), config.is_access_tracked(huge));
            let rest = !(bits::FRAME | 1 << 7);
            if !(mitigated && below == Level::L1) {
                assert_eq!(small.raw() & rest, huge.raw() & rest, "{huge:?}");
                assert_eq!(config.huge_from_small(small, level), huge);
                continue;
            }
            // Fetches come back, everything else is inherited.
            let fetches = F::EXEC | F::USER_EXEC | F::NX;
            let fetches = fetches | (F::EXEC | F::USER_EXEC) << F::TRACK_SHIFT;
            assert_eq!((small.raw() ^ huge.raw()) & rest & !fetches, 0, "{huge:?}");
            let readable = config.permits(config.untrack(huge), Access::READ);
            assert!(!readable || config.permits(config.untrack(small), Access::EXEC), "{small:?}");
            let none = config.small_from_huge_for(huge, level, index, Access::READ);
            assert!(!config.permits(config.untrack(none), Access::EXEC));
            let collapsed = config.huge_from_small(small, level);
            assert!(!config.permits(config.untrack(collapsed), Access::EXEC));
            assert!(!readable || collapsed == huge, "{small:?} {collapsed:?} {huge:?}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn children_of_a_split_translate_like_the_huge_page_and_collapse_back() {
    let mut test = Splits { children: 0 };
    each_format(&mut test);
    assert!(test.children > 100_000, "{}", test.children);
}

#[test]
fn encryption_bits_are_in_links_and_ram_but_not_in_devices() {
    let caps = Capabilities {
        max_phys_bits: 43,
        memory_encryption: Some((1 << 47, 1 << 47)),
        ..Capabilities::npt()
    };
    let config = config::<Npt>(caps);
    let spec = LeafSpec::new(Pfn::new(0x55), Level::L1);
    let ram = config.leaf(&spec);
    let device = config.leaf(&LeafSpec { host_mmio: true, ..spec });
    let table = config.table(Pfn::new(0x55), Level::L2);
    for (spte, encrypted) in [(ram, true), (device, false), (table, true)] {
        assert_eq!(is(spte.raw(), 47), encrypted);
        assert_eq!(config.pfn(spte), Pfn::new(0x55));
    }
    assert_eq!(config.change_kind(Spte::EMPTY, ram, Level::L1), Ok(ChangeKind::Map));
    assert_eq!(config.change_kind(Spte::EMPTY, device, Level::L1), Ok(ChangeKind::Map));
    assert_eq!(config.change_kind(Spte::EMPTY, table, Level::L2), Ok(ChangeKind::Link));
    let plain = table.without(1 << 47);
    assert_eq!(
        config.change_kind(Spte::EMPTY, plain, Level::L2),
        Err(IllegalChange::Missing { new: plain, bits: 1 << 47 })
    );
    // The same page, encrypted and not, is not the same page.
    assert!(matches!(
        config.change_kind(ram, device, Level::L1),
        Err(IllegalChange::OtherPage { .. })
    ));
}

#[test]
fn w_comes_back_alone_and_only_where_it_may() {
    let config = config::<Ept>(Capabilities { accessed_dirty: false, ..Capabilities::ept() });
    let spec = LeafSpec { map_writable: false, ..LeafSpec::new(Pfn::new(1), Level::L1) };
    let logged = config.leaf(&spec);
    assert_eq!(config.writable_again(logged).raw(), logged.raw() | 2);
    let protected = config.leaf(&LeafSpec { mmu_writable: false, ..spec });
    let tracked = config.age(logged);
    for fixed in [protected, tracked, Spte::EMPTY, Spte::FROZEN] {
        assert_eq!(config.writable_again(fixed), fixed);
    }
    let restored = config.writable_again(config.restore(tracked));
    assert!(config.permits(restored, Access::WRITE) && config.is_accessed(restored));
}
