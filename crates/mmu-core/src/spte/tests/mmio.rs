//! MMIO entries at every MAXPHYADDR (KVM rows 1.34 to 1.39, 1.42).

use super::*;
use model::Rules;

/// Gfns at the edges of `bits` physical address bits.
fn edge_gfns(bits: u8) -> Vec<Gfn> {
    let frame_bits = u32::from(bits) - 12;
    (0..frame_bits)
        .flat_map(|bit| [1u64 << bit, (1 << bit) - 1, (1 << frame_bits) - 1 - (1 << bit)])
        .chain([(1 << frame_bits) - 1])
        .map(Gfn::new)
        .collect()
}

struct Widths {
    entries: u64,
}

impl ForFormat for Widths {
    fn run<F: Rules>(&mut self) {
        for max_phys_bits in 36..=52 {
            for l1tf_cache_bits in [None, Some(44), Some(46)] {
                if l1tf_cache_bits.is_some_and(|bits| bits < max_phys_bits) {
                    continue;
                }
                let caps = Capabilities { max_phys_bits, l1tf_cache_bits, ..F::baseline() };
                let config = config::<F>(caps);
                assert_eq!(config.mmio_enabled(), F::NAME == "EPT" || max_phys_bits < 52);
                self.check(&config);
            }
        }
    }
}

impl Widths {
    fn check<F: Rules>(&mut self, config: &SpteConfig<F>) {
        let bits = config.capabilities().max_phys_bits;
        for gfn in edge_gfns(bits) {
            for generation in [0, 1, 0x7f, 0x80, 0x2_aaaa, 0x3_ffff] {
                for access in [Access::READ, Access::ALL] {
                    let Some(spte) = config.mmio(gfn, access, generation) else {
                        assert!(!config.mmio_enabled());
                        continue;
                    };
                    self.entries += 1;
                    assert_eq!(config.kind(spte, Level::L1), SpteKind::Mmio);
                    assert_eq!(config.mmio_gfn(spte), Some(gfn), "{bits} {spte:?}");
                    assert_eq!(config.mmio_generation(spte), Some(generation));
                    assert!(!spte.is_mmu_present() && !spte.is_frozen() && !spte.is_empty());
                    assert!(!config.is_hw_present(spte));
                    // The point of it: hardware takes it for present and rejects it.
                    assert_ne!(config.reserved_bits(spte, Level::L1), 0, "{bits} {spte:?}");
                    let wanted = if F::NAME == "EPT" {
                        Access::ALL
                    } else {
                        access.difference(Access::EXEC)
                    };
                    assert_eq!(config.mmio_access(spte), Some(wanted));
                    let map = config.change_kind(Spte::EMPTY, spte, Level::L1);
                    assert_eq!(map, Ok(ChangeKind::MapMmio), "{spte:?}");
                    check_l1tf(config.capabilities(), spte);
                }
            }
        }
        let beyond = Gfn::new(1 << (bits - 12));
        assert_eq!(config.mmio(beyond, Access::ALL, 0), None);
        assert_eq!(config.mmio(Gfn::new(!0), Access::ALL, 0), None);
    }
}

/// The five top cache address bits are set, so that no cached line has that address.
fn check_l1tf(caps: &Capabilities, spte: Spte) {
    if let Some(bits) = caps.l1tf_cache_bits {
        assert_eq!((spte.raw() >> (bits - 5)) & 0x1f, 0x1f, "{spte:?}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn entries_round_trip_and_hardware_rejects_them_at_every_width() {
    let mut test = Widths { entries: 0 };
    each_format(&mut test);
    assert!(test.entries > 50_000, "{}", test.entries);
}

#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn all_generations_round_trip_and_more_bits_are_cut() {
    let ept = config::<Ept>(Capabilities::ept());
    let npt = config::<Npt>(Capabilities::npt());
    for generation in 0..1u64 << MMIO_GEN_BITS {
        let above = generation | 5 << MMIO_GEN_BITS;
        let pair = [
            ept.mmio(Gfn::new(0xabc), Access::ALL, above).and_then(|s| ept.mmio_generation(s)),
            npt.mmio(Gfn::new(0xabc), Access::ALL, above).and_then(|s| npt.mmio_generation(s)),
        ];
        assert_eq!(pair, [Some(generation); 2]);
    }
}

#[test]
fn an_entry_is_current_at_its_generation_only_and_never_during_an_update() {
    let config = config::<Ept>(Capabilities::ept());
    let spte = config.mmio(Gfn::new(1), Access::ALL, 77).unwrap_or(Spte::EMPTY);
    assert!(config.mmio_is_current(spte, 77));
    assert!(config.mmio_is_current(spte, 77 + (1 << MMIO_GEN_BITS)));
    assert!(!config.mmio_is_current(spte, 78));
    assert!(!config.mmio_is_current(spte, 77 | MMIO_GEN_IN_PROGRESS));
    assert!(!config.mmio_is_current(Spte::EMPTY, 0));
    assert_eq!(config.mmio_gfn(Spte::FROZEN), None);
    assert_eq!(config.mmio_access(Spte::EMPTY), None);
}

/// (MAXPHYADDR, C-bit) -> lowest reserved address bit, `None` if none is left.
#[test]
fn with_encryption_the_reserved_bit_moves_out_of_the_way_of_the_c_bit() {
    let cases = [
        (43, 47, Some(43)),
        (43, 43, Some(44)),
        (48, 48, Some(49)),
        (51, 51, None),
        (50, 51, Some(50)),
        (52, 51, None),
    ];
    for (max_phys_bits, c_bit, lowest) in cases {
        let caps = Capabilities {
            max_phys_bits,
            memory_encryption: Some((1 << c_bit, 1 << c_bit)),
            ..Capabilities::npt()
        };
        let config = config::<Npt>(caps);
        let spte = config.mmio(Gfn::new(0), Access::empty(), 0);
        let want = lowest.map(|bit| Spte::from_raw(bits::range(51, bit) | 1));
        assert_eq!(spte, want, "{max_phys_bits} {c_bit}");
        if let Some(spte) = spte {
            assert_ne!(config.reserved_bits(spte, Level::L1), 0);
        }
    }
}

#[test]
fn without_caching_nothing_is_mmio() {
    let config = config::<Ept>(Capabilities { mmio_caching: false, ..Capabilities::ept() });
    assert_eq!(config.mmio(Gfn::new(1), Access::ALL, 0), None);
    assert_eq!(config.kind(Spte::from_raw(6), Level::L1), SpteKind::Corrupt);
}

#[test]
fn an_own_pattern_replaces_the_formats() {
    // Without suppress-#VE and without permissions: the guest gets #VE (KVM row 1.41).
    let mmio_value = Some(MmioValue { value: 0, mask: 1 << 63 | 7 });
    let config = config::<Ept>(Capabilities { mmio_value, ..Capabilities::ept() });
    let spte = config.mmio(Gfn::new(0x10), Access::ALL, 3).unwrap_or(Spte::EMPTY);
    assert_eq!(spte.raw(), 0x1_0000 | 3 << 3);
    assert_eq!(config.mmio_gfn(spte), Some(Gfn::new(0x10)));
    for other in [Spte::EMPTY, Spte::FROZEN, Spte::INVALID] {
        assert!(!config.is_mmio(other));
    }
}

/// KVM row 1.42. A CPU with L1TF may use the frame of an entry that is not present, or that it
/// rejects, to read its first-level cache. So each such entry names frame 0, which holds nothing;
/// or, access-tracked, the guest's own page, which it may read anyway; or, MMIO, an address that no
/// cache line has.
struct NotPresent {
    tracked: u64,
    mmio: u64,
}

impl ForFormat for NotPresent {
    fn run<F: Rules>(&mut self) {
        let caps = Capabilities { l1tf_cache_bits: Some(46), ..F::baseline() };
        let caps = Capabilities { max_phys_bits: 44, ..caps };
        for caps in ad_variants(caps) {
            let config = config::<F>(caps);
            for void in [Spte::EMPTY, Spte::FROZEN, Spte::INVALID] {
                assert_eq!(void.raw() & bits::FRAME, 0, "{void:?}");
            }
            let own = Pfn::new(0x4000);
            for spec in all_specs(own, Level::L1).chain(all_specs(own, Level::L2)) {
                let leaf = config.leaf(&spec);
                for spte in [leaf, config.age(leaf), config.clear_dirty(leaf)] {
                    let rejected = config.reserved_bits(spte, spec.level) != 0;
                    if config.is_hw_present(spte) && !rejected || spte == Spte::INVALID {
                        continue;
                    }
                    self.tracked += u64::from(config.is_access_tracked(spte));
                    assert_eq!(config.pfn(spte), own, "{spte:?}");
                    assert_eq!(spte.raw() & bits::FRAME, own.address().get(), "{spte:?}");
                }
            }
            for gfn in edge_gfns(44) {
                let Some(spte) = config.mmio(gfn, Access::ALL, 0x1_2345) else { continue };
                self.mmio += 1;
                assert_eq!(spte.raw() >> 41 & 0x1f, 0x1f, "{spte:?}");
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn with_l1tf_no_entry_that_is_not_present_names_memory_of_others() {
    let mut test = NotPresent { tracked: 0, mmio: 0 };
    each_format(&mut test);
    assert!(test.tracked > 100 && test.mmio > 100, "{} {}", test.tracked, test.mmio);
}
