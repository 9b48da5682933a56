//! Configurations: what is refused, and what the rest reaches.

use alloc::string::ToString;

use super::*;
use model::Rules;

#[track_caller]
fn refused<F: SpteFormat>(caps: Capabilities, want: ConfigError) {
    let got = SpteConfig::<F>::new(caps).err();
    assert_eq!(got, Some(want));
    assert!(!want.to_string().is_empty());
}

#[test]
fn contradictions_are_refused_and_name_their_values() {
    let (ept, npt, legacy) = (Capabilities::ept(), Capabilities::npt(), Capabilities::legacy());
    for levels in [0, 1, 2, 3, 6, 255] {
        let format = "EPT";
        refused::<Ept>(Capabilities { levels, ..ept }, ConfigError::Levels { format, levels });
    }
    refused::<Npt>(
        Capabilities { levels: 3, ..npt },
        ConfigError::Levels { format: "NPT", levels: 3 },
    );
    for bits in [0, 35, 53, 255] {
        refused::<Ept>(Capabilities { max_phys_bits: bits, ..ept }, ConfigError::PhysBits { bits });
    }
    refused::<Npt>(
        Capabilities { exec_only: true, ..npt },
        ConfigError::NotThisFormat { format: "NPT", capability: "execute-only pages" },
    );
    refused::<Legacy>(
        Capabilities { mode_based_exec: true, ..legacy },
        ConfigError::NotThisFormat { format: "legacy", capability: "mode-based execute control" },
    );
    refused::<Legacy>(
        Capabilities { accessed_dirty: false, ..Capabilities::pae() },
        ConfigError::PaeAdType { ad_type: AdType::Disabled },
    );
    refused::<Legacy>(
        Capabilities { write_protect_only: true, ..Capabilities::pae() },
        ConfigError::PaeAdType { ad_type: AdType::WriteProtectOnly },
    );
    refused::<Legacy>(Capabilities { levels: 3, ..legacy }, ConfigError::HugePages { levels: 3 });
    refused::<Ept>(Capabilities { huge_2m: false, ..ept }, ConfigError::HugePages { levels: 4 });
    refused::<Npt>(
        Capabilities { nx: false, nx_huge_pages: true, ..npt },
        ConfigError::NxHugePagesWithoutNx,
    );
    refused::<Npt>(
        Capabilities { memory_encryption: Some((0, 1 << 52)), ..npt },
        ConfigError::EncryptionMask { mask: 1 << 52, allowed: bits::range(51, 32) },
    );
    refused::<Npt>(
        Capabilities { memory_encryption: Some((1 << 46, 1 << 47)), ..npt },
        ConfigError::EncryptionValue { value: 1 << 46, mask: 1 << 47 },
    );
    for cache_bits in [0, 45, 47, 255] {
        refused::<Ept>(
            Capabilities { l1tf_cache_bits: Some(cache_bits), ..ept },
            ConfigError::L1tf { cache_bits, max_phys_bits: 46 },
        );
    }
}

#[test]
fn moved_address_bits_must_not_be_encryption_bits() {
    let caps = Capabilities {
        max_phys_bits: 40,
        l1tf_cache_bits: Some(44),
        memory_encryption: Some((0, 1 << 47)),
        ..Capabilities::ept()
    };
    refused::<Ept>(caps, ConfigError::L1tf { cache_bits: 44, max_phys_bits: 40 });
    let apart = Capabilities { memory_encryption: Some((0, 1 << 49)), ..caps };
    assert!(SpteConfig::<Ept>::new(apart).is_ok());
}

#[test]
fn mmio_patterns_that_collide_are_refused() {
    let all_ones = 7 | 1 << 63;
    // (value, mask, bits at fault)
    let cases = [
        (1 << 3 | 6, all_ones | 1 << 3, 1 << 3),
        (6, all_ones | 1 << 52, 1 << 52),
        (6, all_ones | 1 << 45, 1 << 45),
        (6 | 1 << 11, all_ones | 1 << 11, 1 << 11),
        (6 | 1 << 46, all_ones, 1 << 46),
        // Would match EMPTY and FROZEN.
        (1 << 63, all_ones, 0),
        (0, 0, 0),
    ];
    for (value, mask, at_fault) in cases {
        refused::<Ept>(
            Capabilities { mmio_value: Some(MmioValue { value, mask }), ..Capabilities::ept() },
            ConfigError::Mmio { value, mask, bits: at_fault },
        );
    }
    // Bits that hold moved gfn bits on CPUs with L1TF.
    let moved = MmioValue { value: 1 << 48 | 6, mask: 1 << 48 | all_ones };
    let caps = Capabilities { mmio_value: Some(moved), ..Capabilities::ept() };
    assert!(SpteConfig::<Ept>::new(caps).is_ok());
    refused::<Ept>(
        Capabilities { l1tf_cache_bits: Some(46), ..caps },
        ConfigError::Mmio { value: moved.value, mask: moved.mask, bits: 1 << 48 },
    );
}

struct Reach;

impl ForFormat for Reach {
    fn run<F: Rules>(&mut self) {
        for max_phys_bits in 36..=52 {
            for levels in [4, 5] {
                let caps = Capabilities { max_phys_bits, levels, ..F::baseline() };
                let config = config::<F>(caps);
                let phys = 1u64 << (max_phys_bits - 12);
                assert_eq!(config.max_pfn_exclusive(), Pfn::new(phys));
                let reach = config.levels().table_pages();
                assert_eq!(config.max_gfn_exclusive(), Gfn::new(phys.min(reach)));
                assert_eq!(config.levels().number(), levels);
                assert_eq!(config.max_leaf_level(), Level::L3);
                // KVM row 1.27: every frame bit survives.
                for pfn in (0..max_phys_bits - 12).map(|bit| Pfn::new(1 << bit)) {
                    assert_eq!(config.pfn(config.leaf(&LeafSpec::new(pfn, Level::L1))), pfn);
                    assert_eq!(config.pfn(config.table(pfn, Level::L2)), pfn);
                }
            }
        }
    }
}

#[test]
fn frames_and_gfns_reach_what_maxphyaddr_and_levels_allow() {
    each_format(&mut Reach);
}

#[cfg(not(loom))]
#[test]
fn pae_reaches_four_gigabytes() {
    let config = config::<Legacy>(Capabilities::pae());
    assert_eq!(config.max_gfn_exclusive(), Gfn::new(1 << 20));
    assert_eq!(config.levels(), Level::L3);
    assert_eq!(config.max_leaf_level(), Level::L2);
}

#[test]
fn encryption_bits_are_not_frame_bits() {
    let caps = Capabilities {
        max_phys_bits: 46,
        memory_encryption: Some((0, bits::range(45, 40))),
        ..Capabilities::ept()
    };
    let config = config::<Ept>(caps);
    assert_eq!(config.max_pfn_exclusive(), Pfn::new(1 << 28));
    let leaf = config.leaf(&LeafSpec::new(Pfn::new(7), Level::L1));
    // A key id that is not the value is refused.
    assert_eq!(config.reserved_bits(leaf.with(1 << 41), Level::L1), 1 << 41);
}

#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn pae_entries_never_use_the_high_bits() {
    for caps in [
        Capabilities::pae(),
        Capabilities { nx_huge_pages: true, ..Capabilities::pae() },
        Capabilities { max_phys_bits: 36, ..Capabilities::pae() },
    ] {
        let config = config::<Legacy>(caps);
        for level in [Level::L1, Level::L2] {
            for spec in all_specs(Pfn::new(level.pages()), level) {
                let leaf = config.leaf(&spec);
                for spte in [leaf, config.age(leaf), config.clear_dirty(leaf)] {
                    assert_eq!(spte.raw() & bits::range(62, 52), 0);
                }
            }
        }
        for level in [Level::L2, Level::L3] {
            let high = config.table(Pfn::new(1), level).raw() & bits::range(63, 52);
            assert_eq!(high, 0);
        }
    }
}
