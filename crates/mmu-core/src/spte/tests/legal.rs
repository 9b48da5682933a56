//! `change_kind` against the model: every flag combination, every pair of classes, every single
//! flipped bit.

use super::*;
use model::Rules;

/// Every value of the flags, installed into a hole and taken out again, at every level.
struct Flags {
    seen: u64,
}

impl ForFormat for Flags {
    fn run<F: Rules>(&mut self) {
        let frames: [u64; 3] = [0x1_4000_0000, 0x1_4000_1000, 1 << 50];
        for caps in ad_variants(F::baseline()) {
            let config = config::<F>(caps);
            for counter in 0..1u64 << F::flags().len() {
                let flags = scatter(counter, F::flags());
                for frame in frames {
                    self.check(&config, frame | flags);
                }
            }
        }
    }
}

impl Flags {
    fn check<F: Rules>(&mut self, config: &SpteConfig<F>, raw: u64) {
        let caps = config.capabilities();
        let spte = Spte::from_raw(raw);
        for level in Level::ALL {
            let kind = config.kind(spte, level);
            assert_eq!(kind, model::class::<F>(caps, raw, level), "{raw:#x} {level:?}");
            for (old, new) in [(Spte::EMPTY, spte), (spte, Spte::EMPTY)] {
                let got = config.change_kind(old, new, level);
                let want = model::verdict::<F>(caps, old.raw(), new.raw(), level);
                assert_eq!(
                    model::letter(got),
                    want,
                    "{} {old:?} -> {new:?} {level:?} {got:?}",
                    F::NAME
                );
            }
            self.seen += 1;
        }
    }
}

// INVARIANT[I3], INVARIANT[I5], INVARIANT[I6], INVARIANT[I7].
#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn every_flag_combination_is_classified_and_judged_as_the_model_says() {
    let mut test = Flags { seen: 0 };
    each_format(&mut test);
    assert!(test.seen >= (3 * 3 * 3 * 5) << 20, "{}", test.seen);
}

/// Entries of every class, what operations make of them, and all of that with one bit flipped.
fn population<F: Rules>(config: &SpteConfig<F>, level: Level) -> Vec<u64> {
    let page = Pfn::new(level.pages() * 4);
    let mut all = Vec::from([
        Spte::EMPTY,
        Spte::FROZEN,
        Spte::INVALID,
        Spte::from_raw(0),
        Spte::from_raw(!0),
        config.table(Pfn::new(9), level),
        config.table(Pfn::new(10), level),
    ]);
    for mut spec in [LeafSpec::new(page, level), LeafSpec::new(Pfn::new(level.pages()), level)] {
        all.push(config.leaf(&spec));
        spec.accessed = false;
        all.push(config.leaf(&spec));
        spec.host_writable = false;
        all.push(config.leaf(&spec));
    }
    all.extend(config.mmio(Gfn::new(0x77), Access::ALL, 5));
    for spte in all.clone() {
        all.push(config.age(spte));
        all.push(config.clear_dirty(spte));
    }
    let mut raw: Vec<u64> = all
        .iter()
        .flat_map(|spte| (0..=64).map(|bit| spte.raw() ^ 1u64.checked_shl(bit).unwrap_or(0)))
        .collect();
    raw.sort_unstable();
    raw.dedup();
    raw
}

struct Pairs {
    legal: u64,
    refused: u64,
}

impl ForFormat for Pairs {
    fn run<F: Rules>(&mut self) {
        for caps in ad_variants(F::baseline()) {
            let config = config::<F>(caps);
            for level in [Level::L1, Level::L2, Level::L4] {
                self.check(&config, level);
            }
        }
    }
}

impl Pairs {
    fn check<F: Rules>(&mut self, config: &SpteConfig<F>, level: Level) {
        let values = population(config, level);
        for &old in &values {
            for &new in &values {
                let got = config.change_kind(Spte::from_raw(old), Spte::from_raw(new), level);
                let want = model::verdict::<F>(config.capabilities(), old, new, level);
                assert_eq!(
                    model::letter(got),
                    want,
                    "{} {old:#x} -> {new:#x} {level:?} {got:?}",
                    F::NAME
                );
                if got.is_ok() {
                    self.legal += 1;
                } else {
                    self.refused += 1;
                }
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn every_pair_of_near_legal_values_is_judged_as_the_model_says() {
    let mut test = Pairs { legal: 0, refused: 0 };
    each_format(&mut test);
    assert!(test.legal > 100_000 && test.refused > 1_000_000, "{} {}", test.legal, test.refused);
}

struct Every;

impl ForFormat for Every {
    /// The other configurations, with one value of each class against its flipped bits.
    fn run<F: Rules>(&mut self) {
        for config in variants::<F>() {
            for level in Level::ALL {
                for raw in population(&config, level) {
                    for other in [Spte::EMPTY, config.table(Pfn::new(9), level)] {
                        for (old, new) in [(other.raw(), raw), (raw, other.raw())] {
                            let got =
                                config.change_kind(Spte::from_raw(old), Spte::from_raw(new), level);
                            let want = model::verdict::<F>(config.capabilities(), old, new, level);
                            assert_eq!(
                                model::letter(got),
                                want,
                                "{} {:?} {old:#x} -> {new:#x} {level:?} {got:?}",
                                F::NAME,
                                config.capabilities()
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn every_configuration_is_judged_as_the_model_says() {
    each_format(&mut Every);
}

#[test]
fn what_operations_make_of_a_leaf_is_named_and_owes_what_kvm_owes() {
    let enabled = config::<Ept>(Capabilities::ept());
    let disabled = config::<Ept>(Capabilities { accessed_dirty: false, ..Capabilities::ept() });
    let spec = LeafSpec::new(Pfn::new(4), Level::L1);
    let logged = LeafSpec { map_writable: false, ..spec };
    let protected = LeafSpec { mmu_writable: false, ..spec };
    let no_fetch = LeafSpec { access: Access::ALL.difference(Access::EXEC), ..spec };
    let device = LeafSpec { memory_type: Some(MemType::UC), ..spec };
    let leaf = enabled.leaf(&spec);
    let soft = disabled.leaf(&spec);
    use LeafChange as C;
    // (configuration, old, new, change, flush at once, flush at the end of the log pass)
    let cases = [
        (&enabled, leaf, enabled.age(leaf), C::AGED, false, false),
        (&enabled, enabled.age(leaf), leaf, C::ACCESSED, false, false),
        (&enabled, leaf, enabled.clear_dirty(leaf), C::CLEANED, false, true),
        (&enabled, enabled.clear_dirty(leaf), leaf, C::DIRTIED, false, false),
        (&enabled, leaf, enabled.leaf(&logged), C::WRITE_LOST.union(C::CLEANED), false, true),
        (
            &enabled,
            enabled.leaf(&logged),
            enabled.writable_again(enabled.leaf(&logged)),
            C::WRITE_GAINED,
            false,
            false,
        ),
        (&enabled, enabled.leaf(&logged), enabled.leaf(&protected), C::PROTECTED, true, false),
        (&enabled, enabled.leaf(&protected), enabled.leaf(&logged), C::UNPROTECTED, false, false),
        (&enabled, leaf, enabled.leaf(&no_fetch), C::ACCESS_LOST, true, false),
        (&enabled, enabled.leaf(&no_fetch), leaf, C::ACCESS_GAINED, false, false),
        (&enabled, leaf, enabled.leaf(&device), C::MEMORY_TYPE, true, false),
        (
            &disabled,
            soft,
            disabled.age(soft),
            C::AGED.union(C::TRACKED).union(C::WRITE_LOST),
            false,
            true,
        ),
        (
            &disabled,
            disabled.age(soft),
            disabled.restore(disabled.age(soft)),
            C::ACCESSED.union(C::RESTORED),
            false,
            false,
        ),
    ];
    for (config, old, new, change, flush, log_flush) in cases {
        let kind = config.change_kind(old, new, Level::L1);
        assert_eq!(kind, Ok(ChangeKind::Update(change)), "{old:?} -> {new:?}");
        assert_eq!(kind.map(ChangeKind::needs_flush), Ok(flush), "{change:?}");
        assert_eq!(kind.map(ChangeKind::owes_log_flush), Ok(log_flush), "{change:?}");
    }
}

#[test]
fn steps_between_classes_owe_what_the_flush_table_says() {
    use ChangeKind as K;
    // (kind, flush, removes a table, adds a table, removes a leaf, adds a leaf, remover only)
    let cases = [
        (K::Same, 0b00_0000),
        (K::Link, 0b00_1000),
        (K::Map, 0b00_0010),
        (K::MapMmio, 0b00_0000),
        (K::UnmapMmio, 0b00_0000),
        (K::Split, 0b00_1100),
        (K::Collapse, 0b11_0010),
        (K::Unlink, 0b11_0000),
        (K::Unmap, 0b10_0100),
        (K::Freeze(SpteKind::Empty), 0b00_0001),
        (K::Freeze(SpteKind::Mmio), 0b00_0001),
        (K::Freeze(SpteKind::Table), 0b11_0001),
        (K::Freeze(SpteKind::Leaf), 0b10_0101),
        (K::Thaw, 0b00_0001),
        (K::TableAged(true), 0b00_0000),
        (K::TableAged(false), 0b00_0000),
    ];
    for (kind, want) in cases {
        let got = [
            kind.needs_flush(),
            kind.removes_table(),
            kind.adds_table(),
            kind.removes_leaf(),
            kind.adds_leaf(),
            kind.is_for_removers(),
        ]
        .into_iter()
        .fold(0, |all, bit| all << 1 | u32::from(bit));
        assert_eq!(got, want, "{kind:?}: {got:#b}");
        assert!(!kind.owes_log_flush());
    }
}

#[test]
fn refusals_carry_the_values_at_fault() {
    let config = config::<Ept>(Capabilities::ept());
    let leaf = |pfn, level| config.leaf(&LeafSpec::new(Pfn::new(pfn), level));
    let small = leaf(5, Level::L1);
    let read_only =
        config.leaf(&LeafSpec { host_writable: false, ..LeafSpec::new(Pfn::new(5), Level::L1) });
    let tables = (config.table(Pfn::new(1), Level::L2), config.table(Pfn::new(2), Level::L2));
    use IllegalChange as I;
    let cases = [
        (Spte::EMPTY, small, Level::L5, I::Level { level: Level::L5, root: Level::L4 }),
        (Spte::from_raw(0), small, Level::L1, I::OldCorrupt { old: Spte::from_raw(0) }),
        (small, Spte::INVALID, Level::L1, I::NewCorrupt { new: Spte::INVALID }),
        (small, leaf(6, Level::L1), Level::L1, I::OtherPage { old: Pfn::new(5), new: Pfn::new(6) }),
        (tables.0, tables.1, Level::L2, I::OtherTable { old: Pfn::new(1), new: Pfn::new(2) }),
        (small, read_only, Level::L1, I::HostWritable { old: small, new: read_only }),
        (Spte::FROZEN, small, Level::L1, I::Frozen { new: small }),
        (
            Spte::EMPTY,
            small.with(1 << 51),
            Level::L1,
            I::Reserved { new: small.with(1 << 51), bits: 1 << 51 },
        ),
        (
            Spte::EMPTY,
            small.with(1 << 57),
            Level::L1,
            I::Stray { new: small.with(1 << 57), bits: 1 << 57 },
        ),
        (
            Spte::EMPTY,
            small.without(1 << 63),
            Level::L1,
            I::ViolationException { new: small.without(1 << 63) },
        ),
        (
            Spte::EMPTY,
            tables.0.without(1 << 10),
            Level::L2,
            I::Missing { new: tables.0.without(1 << 10), bits: 1 << 10 },
        ),
        (
            Spte::EMPTY,
            small.with(1 << 61),
            Level::L1,
            I::AdType { new: small.with(1 << 61), expected: Some(AdType::Enabled) },
        ),
        (
            Spte::EMPTY,
            small.without(1 << 55),
            Level::L1,
            I::Writable { new: small.without(1 << 55) },
        ),
        (Spte::EMPTY, small.without(0x407), Level::L1, I::NoAccess { new: small.without(0x407) }),
    ];
    for (old, new, level, want) in cases {
        assert_eq!(config.change_kind(old, new, level), Err(want));
        assert!(!alloc::format!("{want}").is_empty());
    }
}

/// Every value of the low and the high twelve bits of an EPT entry, with a frame and without.
fn each_flag_value(mut visit: impl FnMut(u64)) {
    for flags in 0..1u64 << 24 {
        let raw = flags & 0xfff | flags >> 12 << 52;
        visit(raw);
        visit(raw | 0x1_4000_0000);
    }
}

/// KVM row 1.3: whatever a funnel that asks the table stores, hardware does not hand an access to
/// the guest as #VE; the pattern W+X is a misconfiguration, which exits.
#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn nothing_that_may_be_stored_raises_a_violation_exception() {
    let exits = |raw: u64| model::is(raw, 63) || raw & 7 == 6;
    let mut stored = [0u64; 2];
    for caps in [Capabilities::ept(), Capabilities { accessed_dirty: false, ..Capabilities::ept() }]
    {
        let config = config::<Ept>(caps);
        each_flag_value(|raw| {
            let new = Spte::from_raw(raw);
            assert_eq!(config.may_raise_ve(new), !exits(raw), "{raw:#x}");
            for level in [Level::L1, Level::L2] {
                for old in [Spte::EMPTY, Spte::FROZEN] {
                    if config.change_kind(old, new, level).is_ok() {
                        assert!(exits(raw), "{old:?} to {raw:#x} at {level:?}");
                        stored[usize::from(model::is(raw, 63))] += 1;
                    }
                }
            }
        });
    }
    assert!(stored.iter().all(|count| *count > 100), "both patterns: {stored:?}");
    // Where there is no such bit, bit 63 is something else.
    assert!(!config::<Npt>(Capabilities::npt()).may_raise_ve(Spte::from_raw(0)));
}

/// KVM row 1.41: a pattern that clears the bit on purpose is stored; one that leaves it open is no
/// configuration.
#[test]
fn only_a_pattern_that_says_so_gives_the_guest_its_mmio_accesses() {
    let with = |value, mask| Capabilities {
        mmio_value: Some(MmioValue { value, mask }),
        ..Capabilities::ept()
    };
    let asked = config::<Ept>(with(0, 1 << 63 | 7));
    let spte = asked.mmio(Gfn::new(0x10), Access::ALL, 3).unwrap_or(Spte::EMPTY);
    assert!(asked.mmio_raises_ve() && asked.may_raise_ve(spte));
    assert_eq!(asked.change_kind(Spte::EMPTY, spte, Level::L1), Ok(ChangeKind::MapMmio));
    let usual = config::<Ept>(Capabilities::ept());
    assert!(!usual.mmio_raises_ve());
    let refused = usual.change_kind(Spte::EMPTY, spte, Level::L1);
    assert_eq!(refused, Err(IllegalChange::ViolationException { new: spte }));
    assert_eq!(
        SpteConfig::<Ept>::new(with(2, 7)).err(),
        Some(ConfigError::Mmio { value: 2, mask: 7, bits: 1 << 63 })
    );
    assert!(SpteConfig::<Ept>::new(with(6, 7)).is_ok(), "W+X exits in any case");
}
