//! Random 64-bit values: everything is total, classes are exclusive, and words agree.

use proptest::prelude::*;

use super::*;
use model::Rules;

/// Everything that takes an entry, on any value at any level.
fn total<F: Rules>(old: u64, new: u64, pick: usize) {
    let configs = variants::<F>();
    let Some(config) = configs.get(pick % configs.len()) else { return };
    let caps = config.capabilities();
    let (old, new) = (Spte::from_raw(old), Spte::from_raw(new));
    for level in Level::ALL {
        assert_eq!(config.kind(new, level), model::class::<F>(caps, new.raw(), level));
        let got = config.change_kind(old, new, level);
        assert_eq!(model::letter(got), model::verdict::<F>(caps, old.raw(), new.raw(), level));
        if let Err(why) = got {
            assert!(!alloc::format!("{why}").is_empty());
        }
        assert!(!alloc::format!("{} {new:?}", config.describe(new, level)).is_empty());
        // Present leaves and holes are told apart by everything that asks.
        let leaf = new.is_leaf(level);
        assert!(!(leaf && new.is_table(level)));
        assert!(!leaf || (!config.is_mmio(new) && !new.is_frozen() && !new.is_empty()));
        let _ = config.small_from_huge(new, level, pick);
        let _ = config.huge_from_small(new, level);
        let _ = config.needs_atomic_update(new, level);
        let _ = config.reserved_bits(new, level);
    }
    assert_eq!(config.restore(config.age(new)).is_mmu_present(), new.is_mmu_present());
    assert_eq!(config.mmio_gfn(new).is_some(), config.is_mmio(new));
}

/// Nearly legal values: a made leaf with a few bits flipped.
fn nearly<F: Rules>(pfn: u64, flips: [u32; 2], pick: usize) {
    let configs = variants::<F>();
    let Some(config) = configs.get(pick % configs.len()) else { return };
    let leaf = config.leaf(&LeafSpec::new(Pfn::new(pfn), Level::L1));
    let flipped = flips.into_iter().fold(leaf.raw(), |raw, bit| raw ^ 1 << bit);
    total::<F>(leaf.raw(), flipped, pick);
    total::<F>(flipped, leaf.raw(), pick);
    total::<F>(Spte::EMPTY.raw(), flipped, pick);
}

proptest! {
    #[test]
    #[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
    fn any_two_values_are_judged_without_panic(old: u64, new: u64, pick: usize) {
        total::<Ept>(old, new, pick);
        total::<Npt>(old, new, pick);
        total::<Legacy>(old, new, pick);
    }

    #[test]
    #[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
    fn a_leaf_with_flipped_bits_is_judged_as_the_model_says(
        pfn in 0..1u64 << 24, flips in [0u32..64, 0u32..64], pick: usize,
    ) {
        nearly::<Ept>(pfn, flips, pick);
        nearly::<Npt>(pfn, flips, pick);
        nearly::<Legacy>(pfn, flips, pick);
    }
}
