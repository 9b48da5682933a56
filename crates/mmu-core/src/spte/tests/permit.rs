//! Predicates over every value of the flags.

use super::*;
use model::{Rules, is};

struct Permits;

impl ForFormat for Permits {
    /// `permits` and `access` say the same, bit by bit.
    fn run<F: Rules>(&mut self) {
        let base = F::baseline();
        let config = config::<F>(base);
        // Without NX, bit 63 takes nothing away.
        let without_nx = self::config::<F>(Capabilities { nx: false, ..base });
        for counter in 0..1u64 << F::flags().len() {
            let spte = Spte::from_raw(scatter(counter, F::flags()) | 0x5000);
            check_permits(&config, spte);
            check_permits(&without_nx, spte);
        }
    }
}

fn check_permits<F: Rules>(config: &SpteConfig<F>, spte: Spte) {
    let access = config.access(spte);
    let present = config.is_hw_present(spte);
    for needed in [Access::READ, Access::WRITE, Access::USER, Access::EXEC, access] {
        let want = present && access.contains(needed);
        assert_eq!(config.permits(spte, needed), want, "{spte:?} {needed:?}");
    }
    assert!(!present || is(spte.raw(), 11));
}

#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn permits_agrees_with_access() {
    each_format(&mut Permits);
}

struct Made;

impl ForFormat for Made {
    /// A leaf permits what it was asked to permit, as far as the format can say it.
    fn run<F: Rules>(&mut self) {
        for config in variants::<F>() {
            let caps = config.capabilities();
            for spec in all_specs(Pfn::new(3), Level::L1).filter(|spec| spec.accessed) {
                let leaf = config.leaf(&spec);
                let asked = spec.access;
                let read = asked.contains(Access::READ);
                if F::NAME != "EPT" && !read {
                    assert_eq!(config.access(leaf), Access::empty());
                    continue;
                }
                let mut want = asked & Access::READ;
                let fetch = read || caps.exec_only;
                if asked.contains(Access::EXEC) && fetch || F::NAME != "EPT" && !caps.nx {
                    want |= Access::EXEC;
                }
                let write = spec.host_writable && spec.map_writable && spec.mmu_writable;
                if asked.contains(Access::WRITE) && read && write {
                    want |= Access::WRITE;
                }
                let user = match F::NAME {
                    "legacy" => asked.contains(Access::USER),
                    "EPT" if caps.mode_based_exec => asked.contains(Access::USER) && fetch,
                    "EPT" => !want.is_empty(),
                    _ => true,
                };
                if user {
                    want |= Access::USER;
                }
                assert_eq!(config.access(leaf), want, "{} {caps:?} {spec:?}", F::NAME);
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "exhaustive arithmetic without unsafe; too slow")]
fn a_leaf_permits_what_was_asked_and_no_more() {
    each_format(&mut Made);
}

#[test]
fn with_mode_based_execute_user_fetches_have_their_own_bit() {
    let config = config::<Ept>(Capabilities { mode_based_exec: true, ..Capabilities::ept() });
    let with = |access| config.leaf(&LeafSpec { access, ..LeafSpec::new(Pfn::new(1), Level::L1) });
    let user = with(Access::READ | Access::USER);
    let supervisor = with(Access::READ | Access::EXEC);
    assert!(config.permits(user, Access::USER | Access::EXEC));
    assert!(!config.permits(user, Access::EXEC));
    assert!(config.permits(supervisor, Access::EXEC));
    assert!(!config.permits(supervisor, Access::USER | Access::EXEC));
    // Reads of user mode need no bit of their own.
    assert!(config.permits(supervisor, Access::USER | Access::READ));
    // An entry with bit 10 alone is present to hardware (KVM row 1.17).
    let alone = Spte::from_raw(1 << 63 | 1 << 11 | 1 << 10);
    assert!(config.is_hw_present(alone));
}

/// KVM row 1.10: exactly four combinations of host-writable, MMU-writable and W.
// INVARIANT[I5].
#[test]
fn four_of_eight_writable_combinations_are_legal() {
    let config = config::<Npt>(Capabilities::npt());
    let legal: Vec<u64> = (0..8u64)
        .filter(|n| {
            let raw = (n >> 2) << 9 | ((n >> 1) & 1) << 10 | (n & 1) << 1;
            config.writable_invariants_hold(Spte::from_raw(raw))
        })
        .collect();
    assert_eq!(legal, [0b000, 0b100, 0b110, 0b111]);
}

/// KVM row 1.11, as a table: (W, MMU-writable, D, A, A/D disabled) -> atomic?
#[test]
fn volatile_entries_need_an_atomic_update() {
    for bits in 0..32u64 {
        let [w, mmu, d, a, soft] = [0, 1, 2, 3, 4].map(|place| (bits >> place) & 1);
        let raw = 1 | 1 << 11 | w << 1 | mmu << 10 | d << 6 | a << 5 | soft << 60;
        let want = (w == 0 && mmu == 1) || soft == 1 || (w == 1 && d == 0);
        let config = config::<Legacy>(Capabilities::legacy());
        let spte = Spte::from_raw(raw);
        assert_eq!(config.needs_atomic_update(spte, Level::L1), want, "{bits:#b}");
        // Links and holes have nothing to lose.
        assert!(!config.needs_atomic_update(spte, Level::L2));
        assert!(!config.needs_atomic_update(spte.without(1 << 11), Level::L1));
        assert_eq!(config.needs_atomic_update(spte.with(1 << 7), Level::L2), want);
    }
}

/// KVM row 1.12: MMU-writable 1 -> 0, whatever W was.
#[test]
fn losing_mmu_writable_owes_a_flush_even_without_w() {
    let config = config::<Ept>(Capabilities::ept());
    let leaf = config.leaf(&LeafSpec::new(Pfn::new(1), Level::L1));
    let logged = leaf.without(1 << 1);
    let protected = logged.without(1 << 55);
    assert!(config.leaf_flush_needed(leaf, protected));
    assert!(config.leaf_flush_needed(logged, protected));
    assert!(!config.leaf_flush_needed(leaf, logged));
    assert!(!config.leaf_flush_needed(protected, leaf));
    assert!(!config.leaf_flush_needed(leaf, config.age(leaf)));
}

#[test]
fn leaves_of_other_memory_are_told_apart_whatever_they_permit() {
    let encrypted =
        Capabilities { memory_encryption: Some((1 << 45, 1 << 45)), ..Capabilities::ept() };
    let config = config::<Ept>(encrypted);
    let plain = LeafSpec::new(Pfn::new(7), Level::L1);
    for spec in all_specs(Pfn::new(7), Level::L1) {
        let leaf = config.leaf(&spec);
        if leaf == Spte::INVALID {
            continue;
        }
        // The configuration's type ignores the PAT, the one that the specs name does not.
        let same = spec.memory_type.is_none() && !spec.host_mmio;
        assert_eq!(config.same_memory(leaf, config.leaf(&plain)), same, "{spec:?}");
        assert!(config.same_memory(leaf, config.age(leaf)));
    }
}

/// KVM row 1.23: PWT, PCD and PAT of entries that are not EPT stay 0, whatever is asked for.
#[test]
fn nested_and_legacy_leaves_name_no_memory_type() {
    fn run<F: SpteFormat>(caps: Capabilities) {
        let config = config::<F>(caps);
        for level in [Level::L1, Level::L2, Level::L3] {
            let pat = if level == Level::L1 { 7 } else { 12 };
            for mut spec in all_specs(Pfn::new(level.pages() * 3), level) {
                if spec.memory_type.is_some() {
                    spec.memory_type =
                        Some(MemType { cache: memtype::Cache::WriteProtected, ..MemType::WB });
                }
                let raw = config.leaf(&spec).raw();
                let no_type = [3, 4, pat].iter().all(|bit| raw >> bit & 1 == 0);
                assert!(no_type || raw == Spte::INVALID.raw(), "{} {spec:?}: {raw:#x}", F::NAME);
            }
        }
    }
    run::<Npt>(Capabilities::npt());
    run::<Legacy>(Capabilities::legacy());
}

struct Kept;

impl ForFormat for Kept {
    /// Also where neither leaf may be written any more: a page that is write-tracked was written
    /// before it was.
    fn run<F: Rules>(&mut self) {
        for config in variants::<F>() {
            let new = LeafSpec { mmu_writable: false, ..LeafSpec::new(Pfn::new(3), Level::L1) };
            let written = config.leaf(&LeafSpec::new(Pfn::new(3), Level::L1));
            for old in [written, config.write_protected(written)] {
                let kept = config.keep_writes(old, config.leaf(&new));
                assert!(config.is_dirty(old) && config.is_dirty(kept), "{old:?} {kept:?}");
                assert!(!config.is_writable(kept), "{kept:?}");
            }
        }
    }
}

#[test]
fn a_leaf_that_replaces_a_written_one_says_so() {
    each_format(&mut Kept);
}
