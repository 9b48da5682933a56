//! The entry for a page, for a table, for a part of a huge page, for a whole of small ones.
//!
//! Owns [`LeafSpec`] and the constructors (KVM rows 1.29, 1.43 and 1.44). Each is a pure function;
//! asked for something that no entry can say (a frame beyond MAXPHYADDR, a table at level 1) it
//! returns [`Spte::INVALID`], which [`change_kind`](SpteConfig::change_kind) refuses.

use super::bits::{self, FRAME, bit, when};
use super::format::{PAGE_SIZE, SpteFormat};
use super::memtype::MemType;
use super::{Spte, SpteConfig};
use crate::access::Access;
use crate::addr::{Level, PAGE_SHIFT, Pfn, to_u64};
use crate::sync::ENTRIES;

/// What a leaf shall say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafSpec {
    /// First frame of the page, aligned to the pages of `level`.
    pub pfn: Pfn,
    /// Level of the entry.
    pub level: Level,
    /// The most that the entry may permit.
    pub access: Access,
    /// The host mapping is writable. Otherwise no write is permitted, now or later.
    pub host_writable: bool,
    /// Grant W at once. If not, a write faults first and the fast path grants W: for a slot whose
    /// writes are logged.
    pub map_writable: bool,
    /// Writes may be granted without the lock. False while the gfn is write-protected because a
    /// guest table there is shadowed.
    pub mmu_writable: bool,
    /// The page is being accessed. False for a prefault: the first access will be noticed.
    pub accessed: bool,
    /// Memory type (EPT); `None` for the configuration's, or UC for host MMIO.
    pub memory_type: Option<MemType>,
    /// The frame is a device of the host: uncacheable unless `memory_type` says otherwise, and
    /// never encrypted (KVM rows 1.22 and 1.26).
    pub host_mmio: bool,
}

impl LeafSpec {
    /// An accessed, writable page of RAM that permits everything.
    #[inline]
    #[must_use]
    pub const fn new(pfn: Pfn, level: Level) -> Self {
        Self {
            pfn,
            level,
            access: Access::ALL,
            host_writable: true,
            map_writable: true,
            mmu_writable: true,
            accessed: true,
            memory_type: None,
            host_mmio: false,
        }
    }
}

impl<F: SpteFormat> SpteConfig<F> {
    /// The leaf for `spec` (KVM row 1.43).
    ///
    /// Permits the largest set inside `spec.access` that the format can express: writes and, unless
    /// the CPU has execute-only pages, fetches need [`Access::READ`]; without NX, fetches cannot be
    /// withheld; [`Access::USER`] matters to legacy entries and to mode-based execute only. With
    /// the huge-page mitigation a leaf above level 1 never permits fetches. D and W are set
    /// together. Not accessed and without hardware A/D means access-tracked.
    ///
    /// [`Spte::INVALID`] if the frame is not below
    /// [`max_pfn_exclusive`](Self::max_pfn_exclusive), is not aligned, or no leaf may stand at the
    /// level.
    #[doc(alias = "make_spte")]
    #[must_use]
    pub const fn leaf(&self, spec: &LeafSpec) -> Spte {
        if spec.level.number() > self.max_leaf.number()
            || !spec.pfn.is_aligned(spec.level)
            || spec.pfn.get() >= self.max_pfn.get()
        {
            return Spte::INVALID;
        }
        let tracked = !self.caps.accessed_dirty && !spec.accessed;
        let permissions = self.permission_bits(spec.access, spec.level);
        let writable = permissions & F::READ != 0
            && spec.access.contains(Access::WRITE)
            && spec.host_writable
            && spec.mmu_writable;
        let raw = Spte::MMU_PRESENT
            | F::PRESENT
            | self.ad_bits
            | spec.pfn.address().get()
            | permissions
            | self.memory_type_bits(spec)
            | when(!matches!(spec.level, Level::L1), PAGE_SIZE)
            | when(!spec.host_mmio, self.me_value)
            | when(spec.host_writable, F::HOST_WRITABLE)
            | when(writable, F::MMU_WRITABLE)
            | when(writable && spec.map_writable && !tracked, F::WRITABLE | F::DIRTY)
            | when(spec.accessed, F::ACCESSED);
        let spte = Spte::from_raw(raw);
        if tracked { self.track(spte) } else { spte }
    }

    /// R, X, XU, U and NX for an access set at a level.
    const fn permission_bits(&self, access: Access, level: Level) -> u64 {
        let read = access.contains(Access::READ);
        let small = matches!(level, Level::L1);
        let may_fetch = (read || self.caps.exec_only) && (small || !self.caps.nx_huge_pages);
        let exec = may_fetch && access.contains(Access::EXEC);
        let user_exec = if self.caps.mode_based_exec {
            may_fetch && access.contains(Access::USER)
        } else {
            exec
        };
        when(read, F::READ)
            | when(exec, F::EXEC)
            | when(user_exec, F::USER_EXEC)
            | when(!exec && self.caps.nx, F::NX)
            | when(F::USER_ALWAYS || access.contains(Access::USER), F::USER)
    }

    /// Memory type bits of a leaf; none in formats that have none.
    const fn memory_type_bits(&self, spec: &LeafSpec) -> u64 {
        let kind = match spec.memory_type {
            Some(kind) => kind,
            None if spec.host_mmio => MemType::UC,
            None => self.caps.memory_type,
        };
        kind.ept_bits() & F::MEMORY_TYPE
    }

    /// The entry at `level` that links the table in frame `pfn` (KVM row 1.29): it restricts
    /// nothing, has A set (or the type "disabled" instead) and is never dirty. A PAE PDPTE has P
    /// and the address only, because its other low bits are reserved.
    ///
    /// [`Spte::INVALID`] at level 1 and for a frame not below
    /// [`max_pfn_exclusive`](Self::max_pfn_exclusive).
    #[doc(alias = "make_nonleaf_spte")]
    #[must_use]
    pub const fn table(&self, pfn: Pfn, level: Level) -> Spte {
        if matches!(level, Level::L1) || pfn.get() >= self.max_pfn.get() {
            return Spte::INVALID;
        }
        Spte::from_raw(pfn.address().get() | self.table_bits(level))
    }

    /// A link at `level` without its address.
    pub(super) const fn table_bits(&self, level: Level) -> u64 {
        let common = Spte::MMU_PRESENT | F::PRESENT | F::READ | self.me_value;
        if self.is_pdpte(level) {
            return common;
        }
        common
            | F::WRITABLE
            | F::EXEC
            | F::USER_EXEC
            | F::USER
            | if self.caps.accessed_dirty { F::ACCESSED } else { self.ad_bits }
    }

    /// Child `index` of the table that replaces a huge leaf, for a table that permits everything
    /// (KVM row 1.44). See [`small_from_huge_for`](Self::small_from_huge_for).
    #[doc(alias = "make_small_spte")]
    #[must_use]
    pub const fn small_from_huge(&self, huge: Spte, level_of_huge: Level, index: usize) -> Spte {
        self.small_from_huge_for(huge, level_of_huge, index, Access::ALL)
    }

    /// Child `index` of the table that replaces a huge leaf (KVM row 1.44). A, D, W, access
    /// tracking and software bits are inherited. At level 1 the huge-page mitigation, if on, gives
    /// fetches back as far as `access` has them.
    ///
    /// [`Spte::INVALID`] if `huge` is no leaf above level 1 or the table has no such index.
    #[must_use]
    pub const fn small_from_huge_for(
        &self,
        huge: Spte,
        level_of_huge: Level,
        index: usize,
        access: Access,
    ) -> Spte {
        let Some(level) = level_of_huge.down() else {
            return Spte::INVALID;
        };
        if !huge.is_leaf(level_of_huge) || index >= ENTRIES {
            return Spte::INVALID;
        }
        let offset = (to_u64(index) << level.shift()) << PAGE_SHIFT;
        let child = huge.with(offset);
        if !matches!(level, Level::L1) {
            return child;
        }
        let child = child.without(PAGE_SIZE);
        if self.caps.nx_huge_pages { self.with_fetches(child, access) } else { child }
    }

    /// The leaf at `level_of_huge` that replaces a table, from one of its leaves (KVM row 1.44):
    /// the frame is rounded down, everything else is inherited, and the huge-page mitigation, if
    /// on, takes fetches away.
    ///
    /// [`Spte::INVALID`] if `small` is not present or no leaf may stand at the level.
    #[doc(alias = "make_huge_spte")]
    #[must_use]
    pub const fn huge_from_small(&self, small: Spte, level_of_huge: Level) -> Spte {
        if !small.is_mmu_present()
            || matches!(level_of_huge, Level::L1)
            || level_of_huge.number() > self.max_leaf.number()
        {
            return Spte::INVALID;
        }
        let huge = small.without(bits::below_page(level_of_huge)).with(PAGE_SIZE);
        if self.caps.nx_huge_pages { self.without_fetches(huge) } else { huge }
    }

    /// The leaf with W granted again, as the fast fault path does (KVM row 1.9): W alone, D is left
    /// to hardware. Unchanged if W may not be granted without the lock, or while it is
    /// access-tracked ([`restore`](Self::restore) first).
    #[inline]
    #[must_use]
    pub const fn writable_again(&self, spte: Spte) -> Spte {
        let needed = F::MMU_WRITABLE | F::READ | Spte::MMU_PRESENT;
        if spte.raw() & needed == needed { spte.with(F::WRITABLE) } else { spte }
    }

    /// The leaf without W and without the right to grant W, whether it has W now or not (KVM rows
    /// 0.2.1 and B21). D stays: what was written was written.
    #[inline]
    #[must_use]
    pub const fn write_protected(&self, leaf: Spte) -> Spte {
        if leaf.is_mmu_present() { leaf.without(F::WRITABLE | F::MMU_WRITABLE) } else { leaf }
    }

    /// The 4 KiB leaf with another frame, which is below
    /// [`max_pfn_exclusive`](Self::max_pfn_exclusive): reads and fetches as before, in place or
    /// saved, A as before; clean, and writable neither now nor without asking the host again (KVM
    /// row 3.53). For an entry that was emptied in between.
    #[doc(alias = "kvm_mmu_changed_pte_notifier_make_spte")]
    #[inline]
    #[must_use]
    pub const fn other_page(&self, leaf: Spte, pfn: Pfn) -> Spte {
        if !leaf.is_mmu_present() || pfn.get() >= self.max_pfn.get() {
            return Spte::INVALID;
        }
        let writes = F::WRITABLE | F::MMU_WRITABLE | F::HOST_WRITABLE | F::DIRTY;
        let kept = leaf.without((FRAME & !self.me_mask) | writes);
        kept.with(pfn.address().get())
    }

    /// The same permissions with the fetches of `access`, in place or saved.
    const fn with_fetches(&self, leaf: Spte, access: Access) -> Spte {
        let shift = if self.is_access_tracked(leaf) { F::TRACK_SHIFT } else { 0 };
        let readable = leaf.has(F::READ << shift);
        let within = if readable { access } else { access.difference(Access::READ) };
        let wanted = self.permission_bits(within, Level::L1);
        let execute = F::EXEC | F::USER_EXEC;
        leaf.without((execute << shift) | F::NX)
            .with(((wanted & execute) << shift) | wanted & F::NX)
    }

    /// The same permissions without fetches, in place or saved.
    const fn without_fetches(&self, leaf: Spte) -> Spte {
        let shift = if self.is_access_tracked(leaf) { F::TRACK_SHIFT } else { 0 };
        leaf.without((F::EXEC | F::USER_EXEC) << shift).with(when(self.caps.nx, F::NX))
    }
}

/// Bit 7 keeps its place when a page is split: the children of a 1 GiB leaf are large too.
const _: () = assert!(PAGE_SIZE == bit(7));
