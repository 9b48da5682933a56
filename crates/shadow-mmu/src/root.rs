//! Roots: what a vCPU's tables begin with, for every paging mode on every kind of host.
//!
//! Owns [`RootKey`], which says what page a root is (KVM rows 4.28, 4.29, 4.61), and
//! [`PageRole::of_guest`], the role that control registers select (row 4.20). Where guest and host
//! have as many levels, the root shadows the guest's top table and all vCPUs share it. Where the
//! host has more, or the guest keeps its top entries in registers (PAE), the tables above the
//! guest's shadow nothing: they are one vCPU's own, made for one value of its registers, and are
//! filled by faults like others. Without paging the root maps memory in a row. All of them are
//! ordinary shadow pages: what walks, counts, reclaims or checks pages knows no special roots.
//! Values only.

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Gpa, Gva, Level, to_index};

use crate::error::ShadowError;
use crate::guest::{
    EntryFormat, EntryWidth, GuestControls, GuestCpu, GuestRoot, GuestWalker, ModeError,
    PaePointers, PagingMode, WalkPath, WriteProtect,
};
use crate::role::{PageRole, RoleFlags};
use crate::spte_ref::PageId;

/// What a root is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RootKey {
    /// Of the guest's top table.
    pub(crate) gfn: Gfn,
    /// Of the root, at the host's level.
    pub(crate) role: PageRole,
    /// The registers of PAE, which memory may not hold any more.
    pointers: Option<PaePointers>,
}

/// A root that a vCPU holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) page: PageId,
    pub(crate) key: RootKey,
}

impl RootKey {
    /// The root for the guest's tables at `root` on tables whose top is at `host`.
    pub(crate) fn of(
        guest: EntryFormat<'_>,
        root: &GuestRoot,
        role: PageRole,
        host: Level,
    ) -> Result<Self, ShadowError> {
        let mode = guest.mode();
        let flags = role.flags().difference(LAYOUT).union(layout(guest));
        let role = role.with_flags(flags).with_access(Access::ALL).with_quadrant(0);
        let Some(top) = mode.root_level() else {
            // Paging is off: one root for all.
            return Ok(Self { gfn: Gfn::new(0), role: role.at(host), pointers: None });
        };
        if role.level() != top || top > host {
            return Err(ShadowError::WrongLevel { role: role.level(), host });
        }
        let (gfn, pointers) = match (mode, root) {
            (PagingMode::Pae, GuestRoot::Pae(pointers)) => (Gfn::new(0), Some(*pointers)),
            (PagingMode::Pae, GuestRoot::Cr3(_)) | (_, GuestRoot::Pae(_)) => {
                return Err(ShadowError::WrongRoot { mode });
            }
            (_, GuestRoot::Cr3(cr3)) => (guest.table(*cr3), None),
        };
        let role = if top < host || pointers.is_some() {
            role.at(host).with_flags(flags.union(RoleFlags::PASSTHROUGH))
        } else {
            role
        };
        Ok(Self { gfn, role, pointers })
    }

    /// Did a walk that found `path` to `address` begin here? A vCPU may have loaded another root
    /// since, of any mode.
    pub(crate) fn begins(&self, path: &WalkPath, address: Gva) -> bool {
        let Some(first) = path.entries.first() else { return self.role.has(RoleFlags::DIRECT) };
        let table = Gfn::containing(first.gpa);
        match &self.pointers {
            None => !self.role.has(RoleFlags::DIRECT) && table == self.gfn,
            Some(pointers) => {
                let index = to_index(address.get() >> 30) % pointers.values().len();
                // No reserved bit is set in one.
                let pointer = pointers.values().get(index).copied().unwrap_or(0);
                table == Gfn::containing(Gpa::new(pointer))
            }
        }
    }

    /// Is the root one vCPU's own?
    pub(crate) const fn is_private(&self) -> bool {
        self.role.has(RoleFlags::PASSTHROUGH)
    }
}

/// Flags that the guest's format of tables decides.
const LAYOUT: RoleFlags =
    FORMAT.union(RoleFlags::DIRECT).union(RoleFlags::PASSTHROUGH).union(RoleFlags::INVALID);

/// Flags without which entries cannot be read.
const FORMAT: RoleFlags = RoleFlags::FOUR_BYTES
    .union(RoleFlags::PSE)
    .union(RoleFlags::PAE)
    .union(RoleFlags::NX)
    .union(RoleFlags::GUEST_MODE)
    .union(RoleFlags::AD_DISABLED)
    .union(RoleFlags::MODE_BASED);

/// Can the walker read the table that a page with this role shadows? A vCPU keeps roots of modes
/// that it has left.
pub(crate) fn reads(guest: EntryFormat<'_>, role: PageRole) -> bool {
    role.flags().intersection(FORMAT) == layout(guest).intersection(FORMAT)
}

fn layout(guest: EntryFormat<'_>) -> RoleFlags {
    let mut flags = RoleFlags::empty();
    flags.set(RoleFlags::DIRECT, guest.mode() == PagingMode::None);
    let nested = matches!(guest.mode(), PagingMode::Ept { .. } | PagingMode::Npt { .. });
    flags.set(RoleFlags::GUEST_MODE, nested);
    flags.set(RoleFlags::AD_DISABLED, !guest.has_accessed());
    flags.set(RoleFlags::MODE_BASED, guest.is_mode_based());
    flags.set(RoleFlags::NX, guest.mode() != PagingMode::None && guest.has_no_execute());
    flags.set(RoleFlags::PAE, guest.mode() == PagingMode::Pae);
    let four = guest.width() == EntryWidth::Four;
    flags.set(RoleFlags::FOUR_BYTES, four);
    flags.set(RoleFlags::PSE, four && guest.has_large_pages());
    flags
}

impl PageRole {
    /// The role of a root for a guest with these control registers (KVM row 4.20): its level is
    /// that of the guest's top tables, [`Level::L3`] without paging. What no entry depends on is
    /// not in it, so that shadow pages outlive changes of it: SMEP and SMAP matter with CR0.WP
    /// clear only, and without paging nothing does (KVM row 3.64).
    ///
    /// # Errors
    /// [`ModeError`]: no processor accepts the registers.
    #[doc(alias = "kvm_calc_cpu_role")]
    pub fn of_guest(
        cpu: &GuestCpu,
        controls: GuestControls,
        protect: WriteProtect,
    ) -> Result<Self, ModeError> {
        let guest = GuestWalker::new(cpu, controls)?;
        let mut flags = layout(guest.format());
        let Some(level) = guest.mode().root_level() else {
            return Ok(Self::new(Level::L3, flags));
        };
        let ignored = protect == WriteProtect::Off;
        flags.set(RoleFlags::WP, !ignored);
        let smep = controls.contains(GuestControls::SMEP);
        let smap = controls.contains(GuestControls::SMAP);
        flags.set(RoleFlags::SMEP_AND_NOT_WP, smep && ignored);
        flags.set(RoleFlags::SMAP_AND_NOT_WP, smap && ignored);
        Ok(Self::new(level, flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{EptCpu, NestedWalker};

    const CPU: GuestCpu = GuestCpu { la57: true, pku: true, ..GuestCpu::baseline() };

    fn role(controls: GuestControls, protect: WriteProtect) -> PageRole {
        PageRole::of_guest(&CPU, controls, protect).unwrap()
    }

    #[test]
    fn a_role_has_what_entries_depend_on_and_nothing_else() {
        use GuestControls as C;
        use WriteProtect::{Off, On};
        let long = role(C::LONG, On);
        assert_eq!(long, PageRole::new(Level::L4, RoleFlags::NX | RoleFlags::WP));
        assert_eq!(role(C::LONG | C::SMEP | C::SMAP | C::PKE, On), long, "nothing of it counts");
        let off = role(C::LONG, Off);
        let others = [
            off,
            role(C::LONG | C::SMEP, Off),
            role(C::LONG | C::SMAP, Off),
            role(C::LONG | C::LA57, On),
            role(C::LONG.difference(C::NXE), On),
            role(C::PG | C::PAE | C::NXE, On),
            role(C::PG, On),
            role(C::PG | C::PSE, On),
            role(C::empty(), On),
        ];
        for (number, one) in others.iter().enumerate() {
            assert_ne!(*one, long);
            assert!(!others[..number].contains(one), "{one:?} twice");
        }
        // Nothing matters without paging, and PSE nowhere but in 32-bit paging.
        let all = C::PSE | C::SMEP | C::SMAP | C::NXE | C::PAE | C::LME;
        assert_eq!(role(all, Off), role(C::empty(), On));
        assert_eq!(role(C::LONG | C::PSE, On), long);
    }

    #[test]
    fn registers_that_no_processor_accepts_have_no_role() {
        let controls = GuestControls::PG | GuestControls::LME;
        let refused = PageRole::of_guest(&CPU, controls, WriteProtect::On);
        assert_eq!(refused, Err(ModeError::LongModeWithoutPae));
    }

    /// INVLPG and INVEPT look at all roots that a vCPU keeps: none is read as what it is not.
    #[test]
    fn a_table_is_read_by_a_walker_of_its_format_only() {
        let long = GuestWalker::new(&CPU, GuestControls::LONG).unwrap();
        let plain = EptCpu { mode_based_execute: false, ..EptCpu::baseline() };
        let modes = EptCpu { mode_based_execute: true, ..EptCpu::baseline() };
        let without = EptCpu { accessed_dirty: false, ..EptCpu::baseline() };
        let nested = [plain, modes, without].map(|cpu| NestedWalker::ept(Level::L4, &cpu).unwrap());
        let formats: [EntryFormat<'_>; 4] =
            [long.format(), nested[0].format(), nested[1].format(), nested[2].format()];
        for (number, written) in formats.iter().enumerate() {
            let role = PageRole::new(Level::L4, RoleFlags::empty());
            let key = RootKey::of(*written, &GuestRoot::Cr3(0x5000), role, Level::L4).unwrap();
            for (reader, format) in formats.iter().enumerate() {
                assert_eq!(reads(*format, key.role), reader == number, "{number} by {reader}");
            }
        }
    }

    #[test]
    fn a_root_is_shared_where_the_host_has_as_many_levels() {
        let guest = GuestWalker::new(&CPU, GuestControls::LONG).unwrap();
        let long = role(GuestControls::LONG, WriteProtect::On);
        let cr3 = GuestRoot::Cr3(0x5018);
        let same = RootKey::of(guest.format(), &cr3, long, Level::L4).unwrap();
        assert_eq!((same.gfn, same.role), (Gfn::new(5), long));
        assert!(!same.is_private());
        let above = RootKey::of(guest.format(), &cr3, long, Level::L5).unwrap();
        assert!(above.is_private());
        assert_eq!((above.gfn, above.role.level()), (Gfn::new(5), Level::L5));
    }
}
