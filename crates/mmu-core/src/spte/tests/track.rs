//! Accessed, dirty and access tracking over every value of the flags (KVM row 1.7).

use super::*;
use model::{Rules, is};

struct Flags {
    tracked: u64,
}

impl ForFormat for Flags {
    fn run<F: Rules>(&mut self) {
        for caps in ad_variants(F::baseline()) {
            let config = config::<F>(caps);
            for counter in 0..1u64 << F::flags().len() {
                self.check(&config, Spte::from_raw(scatter(counter, F::flags()) | 0x5000));
            }
        }
    }
}

impl Flags {
    fn check<F: Rules>(&mut self, config: &SpteConfig<F>, spte: Spte) {
        let aged = config.age(spte);
        assert_eq!(config.age(aged), aged, "{spte:?}: twice");
        assert_eq!(config.clear_dirty(config.clear_dirty(spte)), config.clear_dirty(spte));
        assert!(
            !config.is_accessed(config.age_table(spte))
                && !config.is_dirty(config.clear_dirty(spte))
        );
        if !is(spte.raw(), 11) {
            // B84: passes that meet a hole, MMIO or FROZEN leave it alone.
            assert_eq!((aged, config.restore(spte), config.clear_dirty(spte)), (spte, spte, spte));
            assert!(!config.is_accessed(spte) && !config.is_dirty(spte));
            return;
        }
        let disabled = AdType::of(spte) == Some(AdType::Disabled);
        let was_tracked = config.is_access_tracked(spte);
        if !disabled {
            assert!(!was_tracked);
            assert_eq!(aged.raw(), spte.raw() & !(1 << F::accessed_bit()));
            return;
        }
        assert!(was_tracked || !config.is_accessed(aged));
        assert!(config.is_access_tracked(aged));
        // What a rule-abiding leaf goes through and comes back from.
        if !was_tracked && model::new_ok::<F>(config.capabilities(), spte.raw(), Level::L1) {
            self.tracked += 1;
            let w = spte.raw() & !2;
            assert_eq!(config.untrack(aged).raw(), w & !(1 << F::accessed_bit()), "{spte:?}");
            assert_eq!(config.restore(aged).raw(), w | 1 << F::accessed_bit(), "{spte:?}");
            assert_eq!(config.is_mmu_writable(aged), config.is_mmu_writable(spte));
            assert_eq!(config.access(aged), Access::empty());
            assert!(!config.permits(aged, Access::empty()));
            assert_eq!(config.reserved_bits(aged, Level::L1), 0);
        }
    }
}

// INVARIANT[I6].
#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn aging_is_idempotent_and_restoring_brings_back_all_but_w() {
    let mut test = Flags { tracked: 0 };
    each_format(&mut test);
    assert!(test.tracked > 500, "{}", test.tracked);
}

#[test]
fn a_and_d_are_told_the_same_with_and_without_hardware_support() {
    for caps in ad_variants(Capabilities::ept()) {
        let config = config::<Ept>(caps);
        let spec = LeafSpec::new(Pfn::new(8), Level::L1);
        let leaf = config.leaf(&spec);
        assert!(config.is_accessed(leaf) && config.is_dirty(leaf) && config.is_writable(leaf));
        let aged = config.age(leaf);
        assert!(!config.is_accessed(aged) && config.is_dirty(aged));
        let prefault = config.leaf(&LeafSpec { accessed: false, ..spec });
        assert!(!config.is_accessed(prefault));
        assert_eq!(config.is_access_tracked(prefault), !config.ad_enabled());
        let clean = config.clear_dirty(leaf);
        assert!(!config.is_dirty(clean) && config.is_mmu_writable(clean));
        // Where D does not tell of the next write, W makes it fault.
        assert_eq!(config.is_writable(clean), !config.dirty_by_write_protect());
        let again = config.writable_again(clean);
        assert!(config.is_writable(again));
        assert!(config.is_dirty(again) || config.ad_enabled());
    }
}

#[test]
fn the_type_field_reads_back_and_has_one_unused_value() {
    for ad in [AdType::Enabled, AdType::Disabled, AdType::WriteProtectOnly] {
        assert_eq!(AdType::of(Spte::from_raw(ad.bits())), Some(ad));
    }
    assert_eq!(AdType::of(Spte::from_raw(3 << 60)), None);
    assert_eq!(AdType::Enabled.bits(), 0);
}
