//! Any 64 bits under any configuration: classifying, judging and describing an entry never panics,
//! the answers agree with each other, and whatever the constructors make is legal and says what
//! was asked for.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Level, Pfn};
use mmu_core::spte::{
    AdType, Capabilities, ChangeKind, Ept, LeafSpec, Legacy, MMIO_GEN_BITS, MMIO_GEN_IN_PROGRESS,
    Npt, Spte, SpteConfig, SpteFormat, SpteKind,
};
use mmu_core::sync::ENTRIES;

#[derive(Arbitrary, Debug)]
struct Input {
    format: Format,
    levels: u8,
    phys_bits: u8,
    l1tf_cache_bits: Option<u8>,
    memory_encryption: Option<(u64, u64)>,
    flags: u16,
    level: u8,
    old: u64,
    new: u64,
    /// Nearby values find more than two random ones.
    flipped: u64,
    pfn: u64,
    access: u8,
    leaf: u8,
    gfn: u64,
    generation: u64,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Format {
    Ept,
    Npt,
    Legacy,
}

impl Input {
    fn flag(&self, bit: u32) -> bool {
        self.flags >> bit & 1 != 0
    }

    fn capabilities(&self) -> Capabilities {
        let baseline = match self.format {
            Format::Ept => Capabilities::ept(),
            Format::Npt => Capabilities::npt(),
            Format::Legacy => Capabilities::legacy(),
        };
        Capabilities {
            // Mostly values that exist; a few that must be refused.
            levels: 3 + self.levels % 4,
            accessed_dirty: self.flag(0),
            write_protect_only: self.flag(1),
            nx: self.flag(2),
            exec_only: self.flag(3),
            mode_based_exec: self.flag(4),
            huge_2m: self.flag(5),
            huge_1g: self.flag(6),
            mmio_caching: self.flag(7),
            nx_huge_pages: self.flag(8),
            max_phys_bits: 35 + self.phys_bits % 19,
            l1tf_cache_bits: self.l1tf_cache_bits,
            memory_encryption: self.memory_encryption,
            ..baseline
        }
    }

    fn leaf(&self, level: Level) -> LeafSpec {
        LeafSpec {
            access: Access::from_bits_truncate(self.access),
            host_writable: self.leaf & 1 != 0,
            map_writable: self.leaf & 2 != 0,
            mmu_writable: self.leaf & 4 != 0,
            accessed: self.leaf & 8 != 0,
            host_mmio: self.leaf & 16 != 0,
            ..LeafSpec::new(Pfn::new(self.pfn & ((1 << 40) - 1)).align_down(level), level)
        }
    }
}

fuzz_target!(|input: Input| {
    match input.format {
        Format::Ept => check::<Ept>(&input),
        Format::Npt => check::<Npt>(&input),
        Format::Legacy => check::<Legacy>(&input),
    }
});

fn check<F: SpteFormat>(input: &Input) {
    let config = match SpteConfig::<F>::new(input.capabilities()) {
        Ok(config) => config,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let level = Level::new(1 + input.level % 5).expect("1 to 5");
    let old = Spte::from_raw(input.old);
    for new in [Spte::from_raw(input.new), Spte::from_raw(input.old ^ input.flipped)] {
        classes_agree(&config, new, level);
        changes_agree(&config, old, new, level);
    }
    constructed_leaf(&config, &input.leaf(level));
    constructed_table(&config, Pfn::new(input.pfn & ((1 << 40) - 1)), level);
    constructed_mmio(&config, Gfn::new(input.gfn), input.access, input.generation);
}

/// Exactly one class, and the predicates say the same.
fn classes_agree<F: SpteFormat>(config: &SpteConfig<F>, spte: Spte, level: Level) {
    let kind = config.kind(spte, level);
    assert_eq!(kind == SpteKind::Empty, spte.is_empty());
    assert_eq!(kind == SpteKind::Frozen, spte.is_frozen());
    if kind.is_present() {
        assert!(spte.is_mmu_present());
        assert_eq!(kind == SpteKind::Leaf, spte.is_leaf(level), "{spte:?} at {level}");
        assert!(config.mmio_gfn(spte).is_none(), "{spte:?} is present and MMIO");
    }
    if kind == SpteKind::Mmio {
        assert!(!spte.is_mmu_present() && config.mmio_gfn(spte).is_some());
        assert!(!config.mmio_is_current(spte, generation_of(config, spte, true)));
        assert!(config.mmio_is_current(spte, generation_of(config, spte, false)));
    }
    let legal = config.change_kind(Spte::EMPTY, spte, level).is_ok();
    if legal && config.is_access_tracked(spte) {
        assert!(config.access(spte).is_empty(), "{spte:?} is tracked and permits something");
    }
    let _ = config.permits(spte, Access::READ);
    let _ = config.needs_atomic_update(spte, level);
    assert!(!format!("{:?} {}", spte, config.describe(spte, level)).is_empty());
    assert_eq!(config.age(config.age(spte)), config.age(spte), "aging twice");
    assert_eq!(config.restore(config.restore(spte)), config.restore(spte), "restoring twice");
    // The unused A/D type is nobody's entry: there it is enough not to panic.
    let cleaned = config.clear_dirty(spte);
    assert!(!config.is_dirty(cleaned) || AdType::of(spte).is_none(), "{spte:?} stays dirty");
}

fn generation_of<F: SpteFormat>(config: &SpteConfig<F>, spte: Spte, updating: bool) -> u64 {
    let stored = config.mmio_generation(spte).expect("an MMIO entry");
    assert!(stored >> MMIO_GEN_BITS == 0);
    if updating { stored | MMIO_GEN_IN_PROGRESS } else { stored }
}

/// What is called legal keeps the rules that no configuration may break.
fn changes_agree<F: SpteFormat>(config: &SpteConfig<F>, old: Spte, new: Spte, level: Level) {
    let change = match config.change_kind(old, new, level) {
        Ok(change) => change,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    assert!(level <= config.levels());
    // An MMIO entry is meant to be rejected by hardware.
    let rejected = new.is_mmu_present() && config.reserved_bits(new, level) != 0;
    assert!(!rejected, "{new:?} is legal and has reserved bits");
    assert!(!old.is_frozen() || new.is_frozen() || new.is_empty(), "{old:?} became {new:?}");
    if new.is_leaf(level) {
        assert!(config.writable_invariants_hold(new), "{new:?}");
        assert!(config.pfn(new) < config.max_pfn_exclusive());
    }
    if old.is_leaf(level) && new.is_leaf(level) {
        assert_eq!(config.pfn(old), config.pfn(new), "another page in one step");
        if config.leaf_flush_needed(old, new) {
            assert!(change.needs_flush(), "{old:?} to {new:?} owes a flush");
        }
    }
    if old.is_mmu_present() && !new.is_mmu_present() {
        assert!(change.needs_flush(), "{old:?} was taken out without a flush");
    }
    assert_eq!(config.change_kind(new, new, level), Ok(ChangeKind::Same));
}

/// A leaf says what was asked for, may be put into a hole, aged, restored, split and collapsed.
fn constructed_leaf<F: SpteFormat>(config: &SpteConfig<F>, spec: &LeafSpec) {
    let leaf = config.leaf(spec);
    let fits = spec.level <= config.max_leaf_level() && spec.pfn < config.max_pfn_exclusive();
    if !fits {
        assert_eq!(config.kind(leaf, spec.level), SpteKind::Corrupt, "{spec:?}");
        return;
    }
    assert_eq!(config.kind(leaf, spec.level), SpteKind::Leaf, "{spec:?}");
    if !spec.host_mmio {
        assert_eq!(config.pfn(leaf), spec.pfn);
    }
    assert!(config.writable_invariants_hold(leaf));
    assert_eq!(config.is_writable(leaf), leaf.has(F::DIRTY), "W and D are set together");
    assert!(!config.is_writable(leaf) || (spec.map_writable && spec.host_writable));
    if config.change_kind(Spte::EMPTY, leaf, spec.level) != Ok(ChangeKind::Map) {
        // Only a leaf that permits nothing may be refused.
        assert!(!spec.access.contains(Access::READ), "{spec:?} made {leaf:?}");
        return;
    }
    let aged = config.age(leaf);
    let change = config.change_kind(leaf, aged, spec.level).expect("aging is legal");
    assert!(!change.needs_flush(), "aging owes no flush");
    assert!(!config.is_accessed(aged));
    let restored = config.restore(aged);
    assert_eq!(
        config.access(restored).difference(Access::WRITE),
        config.access(config.restore(leaf)).difference(Access::WRITE),
        "{leaf:?} aged and restored"
    );
    assert!(config.change_kind(aged, restored, spec.level).is_ok());
    let clean = config.clear_dirty(leaf);
    assert!(!config.is_dirty(clean) && config.change_kind(leaf, clean, spec.level).is_ok());
    if let Some(below) = spec.level.down() {
        for index in [0, 1, ENTRIES - 1] {
            let small = config.small_from_huge(leaf, spec.level, index);
            let step = u64::try_from(index).expect("small") * below.pages();
            assert_eq!(small.pfn().get(), leaf.pfn().get() + step, "child {index} of {leaf:?}");
            assert_eq!(config.kind(small, below), SpteKind::Leaf);
        }
    }
}

fn constructed_table<F: SpteFormat>(config: &SpteConfig<F>, pfn: Pfn, level: Level) {
    let table = config.table(pfn, level);
    if level == Level::L1 || pfn >= config.max_pfn_exclusive() {
        assert_eq!(config.kind(table, level), SpteKind::Corrupt);
    } else if level <= config.levels() {
        assert_eq!(config.kind(table, level), SpteKind::Table);
        assert_eq!(config.pfn(table), pfn);
        assert_eq!(config.change_kind(Spte::EMPTY, table, level), Ok(ChangeKind::Link));
    }
}

fn constructed_mmio<F: SpteFormat>(config: &SpteConfig<F>, gfn: Gfn, access: u8, generation: u64) {
    let access = Access::from_bits_truncate(access);
    if let Some(spte) = config.mmio(gfn, access, generation) {
        assert_eq!(config.kind(spte, Level::L1), SpteKind::Mmio);
        assert_eq!(config.mmio_gfn(spte), Some(gfn));
        assert_eq!(config.mmio_generation(spte), Some(generation & ((1 << MMIO_GEN_BITS) - 1)));
        let change = config.change_kind(Spte::EMPTY, spte, Level::L1);
        assert_eq!(change, Ok(ChangeKind::MapMmio));
    }
}
