//! The entry that a fault installs, without working it out each time.
//!
//! Owns [`LeafCache`], one per vCPU. Apart from the frame number, an entry depends on a few facts
//! that are the same from one fault to the next: the slot's flags, the host's permission, the
//! level, whether this is a write, and what kind of page it is. They make a key; while it stays the
//! same, an entry is one OR away. No memory is shared and nothing here can go stale: the key is
//! compared at every use, and has the one part of an MMU's configuration that may change.

use mmu_core::access::Access;
use mmu_core::addr::{Level, Pfn};
use mmu_core::slot::{Memslot, SlotFlags};
use mmu_core::spte::memtype::{Cache, MemType};
use mmu_core::spte::{LeafSpec, Spte, SpteConfig, SpteFormat};
use mmu_core::traits::{Backing, PageKind};

/// What the dirty log asks of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeafLog {
    /// The page is not logged; and what the access is does not matter.
    Off,
    /// Not writable yet: the write will fault.
    Protected,
    /// Writable at once, and the log is told: the access is a write.
    Marked,
    /// Writable and clean: the CPU sets D.
    Clean,
    /// Writable and dirty, which the next harvest finds: the access is a write.
    Dirty,
}

impl LeafLog {
    const fn bits(self) -> u32 {
        match self {
            Self::Off => 0,
            Self::Protected => 1,
            Self::Marked | Self::Dirty => 2,
            Self::Clean => 3,
        }
    }
}

/// What an entry depends on besides its frame, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LeafFacts(u32);

impl LeafFacts {
    const LOG: u32 = 0b11;
    const HOST_WRITABLE: u32 = 1 << 2;
    const PREFETCH: u32 = 1 << 3;
    /// Where the level stands.
    const LEVEL: u32 = 4;
    /// Where the slot's flags stand.
    const FLAGS: u32 = 8;
    const DEVICE: u32 = 1 << 25;
    /// Where the number of a memory type stands, 0 for none.
    const TYPE: u32 = 26;
    /// The mitigation of huge pages is on.
    const NX_HUGE: u32 = 1 << 30;
    /// No fault has these.
    const NONE: Self = Self(u32::MAX);

    /// `host_writable`: the host lets the guest write the page.
    #[inline(always)]
    pub(crate) fn new(
        slot: &Memslot,
        host_writable: bool,
        level: Level,
        log: LeafLog,
        prefetch: bool,
    ) -> Self {
        Self(
            (slot.flags.bits() << Self::FLAGS)
                | (u32::from(level.number()) << Self::LEVEL)
                | (u32::from(prefetch) * Self::PREFETCH)
                | (u32::from(host_writable) * Self::HOST_WRITABLE)
                | log.bits(),
        )
    }

    /// The same for a page of a certain kind.
    #[inline(always)]
    pub(crate) fn of_kind(self, kind: PageKind) -> Self {
        if kind == PageKind::RAM { self } else { self.of_special_kind(kind) }
    }

    /// The same under the configuration that the entry will be made by.
    #[inline(always)]
    pub(crate) fn of_config<F: SpteFormat>(self, config: &SpteConfig<F>) -> Self {
        Self(self.0 | (u32::from(config.nx_huge_pages()) * Self::NX_HUGE))
    }

    #[cold]
    fn of_special_kind(self, kind: PageKind) -> Self {
        let device = u32::from(kind.backing == Backing::Device) * Self::DEVICE;
        let code = |(code, _): &(u32, MemType)| (code + 1) << Self::TYPE;
        let known = kind.memory_type.and_then(|wanted| types().find(|(_, kind)| *kind == wanted));
        Self(self.0 | device | known.as_ref().map_or(0, code))
    }

    fn memory_type(self) -> Option<MemType> {
        let code = (self.0 >> Self::TYPE & 0xf).checked_sub(1)?;
        types().find(|(at, _)| *at == code).map(|(_, kind)| kind)
    }

    const fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    const fn has_flag(self, flag: SlotFlags) -> bool {
        self.has(flag.bits() << Self::FLAGS)
    }

    /// What the entry would say, with frame 0.
    pub(crate) fn spec(self) -> LeafSpec {
        let number = |level: &Level| u32::from(level.number()) == self.0 >> Self::LEVEL & 7;
        let level = Level::ALL.into_iter().find(number);
        let writable = self.has(Self::HOST_WRITABLE) && !self.has_flag(SlotFlags::READ_ONLY);
        LeafSpec {
            pfn: Pfn::new(0),
            level: level.unwrap_or(Level::L1),
            access: match () {
                () if self.has_flag(SlotFlags::INVALID) => Access::empty(),
                () if self.has_flag(SlotFlags::READ_ONLY) => Access::READ_ONLY,
                () => Access::ALL,
            },
            host_writable: writable,
            // A page that is logged gets W by a write, which the log then sees; or D tells.
            map_writable: writable && self.0 & Self::LOG != LeafLog::Protected.bits(),
            mmu_writable: writable,
            accessed: !self.has(Self::PREFETCH),
            memory_type: self.memory_type(),
            host_mmio: self.has(Self::DEVICE),
        }
    }
}

/// Every memory type, numbered.
fn types() -> impl Iterator<Item = (u32, MemType)> {
    use Cache::{Uncacheable, WriteBack, WriteCombining, WriteProtected, WriteThrough};
    let caches = [Uncacheable, WriteCombining, WriteThrough, WriteProtected, WriteBack];
    let types = caches
        .into_iter()
        .flat_map(|cache| [false, true].map(|ignore_pat| MemType { cache, ignore_pat }));
    (0..).zip(types)
}

const _: () = assert!(
    SlotFlags::all().bits() < 1 << (LeafFacts::DEVICE.trailing_zeros() - LeafFacts::FLAGS),
    "the slot's flags end where the page's kind begins"
);

/// The last entry made, with frame 0.
#[derive(Debug)]
pub(crate) struct LeafCache {
    facts: LeafFacts,
    template: Spte,
}

impl LeafCache {
    pub(crate) const fn new() -> Self {
        Self { facts: LeafFacts::NONE, template: Spte::INVALID }
    }

    /// The entry that maps `pfn`, which is below the configuration's limit, at `level`, which is
    /// that of the facts (KVM row 1.43).
    #[inline(always)]
    pub(crate) fn leaf<F: SpteFormat>(
        &mut self,
        config: &SpteConfig<F>,
        facts: LeafFacts,
        level: Level,
        pfn: Pfn,
    ) -> Spte {
        debug_assert!(pfn < config.max_pfn_exclusive(), "checked by the fault");
        if self.facts != facts {
            self.renew(config, facts);
        }
        // The frame's bits are 0 in the template, encryption bits excepted, which no frame below
        // the limit has; and what is no entry at all (INVALID) stays none.
        let first = if level == Level::L1 { pfn } else { pfn.align_down(level) };
        self.template.with(first.address().get())
    }

    #[cold]
    fn renew<F: SpteFormat>(&mut self, config: &SpteConfig<F>, facts: LeafFacts) {
        let leaf = config.leaf(&facts.spec());
        let clean = facts.0 & LeafFacts::LOG == LeafLog::Clean.bits();
        let template = if clean { config.clear_dirty(leaf) } else { leaf };
        *self = Self { facts, template };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_core::addr::{Gfn, Hva, to_index};
    use mmu_core::spte::{Capabilities, Ept};

    /// Whatever comes before it, an entry is what the configuration would have made.
    #[test]
    fn a_cached_entry_is_the_one_that_would_be_made() {
        let tracking = Capabilities { accessed_dirty: false, ..Capabilities::ept() };
        let encrypted =
            Capabilities { memory_encryption: Some((1 << 45, 1 << 45)), ..Capabilities::ept() };
        for capabilities in [Capabilities::ept(), tracking, encrypted] {
            let config = SpteConfig::<Ept>::new(capabilities).expect("possible");
            let mut cache = LeafCache::new();
            for case in 0..1u64 << 13 {
                let logs = [LeafLog::Off, LeafLog::Protected, LeafLog::Marked, LeafLog::Clean];
                let bit = |n: u32| case >> n & 1 == 1;
                let mut flags = SlotFlags::empty();
                flags.set(SlotFlags::READ_ONLY, bit(0));
                flags.set(SlotFlags::LOG_DIRTY, bit(1));
                let slot = Memslot {
                    as_id: 0,
                    id: 0,
                    flags,
                    base_gfn: Gfn::new(0),
                    npages: 1 << 20,
                    hva: Hva::new(0),
                };
                let level = if bit(2) { Level::L2 } else { Level::L1 };
                let pfn = Pfn::new(0x1_2345 + case);
                let (log, prefetch) = (logs[mmu_core::addr::to_index(case) >> 6 & 3], bit(5));
                let facts = LeafFacts::new(&slot, bit(3), level, log, prefetch);
                let writable = bit(3) && !slot.is_read_only();
                let kind = PageKind {
                    backing: if bit(8) { Backing::Device } else { Backing::Ram },
                    memory_type: types().map(|(_, kind)| kind).nth(to_index(case >> 9)),
                };
                let facts = facts.of_kind(kind);
                let made = config.leaf(&LeafSpec {
                    pfn: pfn.align_down(level),
                    level,
                    access: slot.access(),
                    host_writable: writable,
                    map_writable: writable && log != LeafLog::Protected,
                    mmu_writable: writable,
                    accessed: !prefetch,
                    memory_type: kind.memory_type,
                    host_mmio: bit(8),
                });
                let made = if log == LeafLog::Clean { config.clear_dirty(made) } else { made };
                assert_eq!(cache.leaf(&config, facts, level, pfn), made, "case {case:#x}");
                assert_eq!(cache.leaf(&config, facts, level, pfn), made, "again, case {case:#x}");
            }
        }
    }
}
