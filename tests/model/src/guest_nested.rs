//! A nested guest's paging in two dimensions: its own tables, every one of whose entries stands at
//! an address that the guest hypervisor's EPT or NPT translates.
//!
//! Sources: Intel SDM volume 3C, "EPT and memory typing", table "Exit qualification for EPT
//! violations"; AMD APM volume 2, "Nested paging". The guest dimension is [`GuestMachine`]'s, the
//! meaning of nested entries is [`Rules`]'; this file has the order in which they are used.

use crate::access::{Access, AccessKind, FaultKind, Permissions, Stage};
use crate::format::{Entry, Format, Rules};
use crate::guest::{GuestAccess, GuestMachine, GuestRoots, GuestWords};
use crate::guest::{Rights, Says, Trace, Verdict};

/// What the hypervisor is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedExit {
    /// EPT violation: exit qualification, guest-physical address.
    Violation(u64, u64),
    /// EPT misconfiguration: guest-physical address.
    Misconfiguration(u64),
    /// Nested page fault: EXITINFO1, EXITINFO2.
    NestedPageFault(u64, u64),
}

/// How an access in two dimensions ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedVerdict {
    /// At this address of the hypervisor; the rights are those of the guest's own tables.
    Reaches {
        /// The hypervisor's physical address.
        pa: u64,
        /// The nested guest's.
        gpa: u64,
        /// What the guest's own tables permit.
        rights: Rights,
    },
    /// In the guest's own dimension.
    Guest(Verdict),
    /// In the hypervisor's.
    Exit(NestedExit),
}

/// A guest below a hypervisor.
#[derive(Clone, Copy, Debug)]
pub struct NestedMachine {
    /// The guest's own paging.
    pub guest: GuestMachine,
    rules: Rules,
    format: Format,
    advanced: bool,
}

/// Why the nested tables are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// For an entry of a guest table.
    Table,
    /// For the four pointers of PAE, by a load of CR3.
    Pointers,
    /// To set an accessed or dirty bit in a guest table.
    Update,
    /// For the page, of which the guest's own tables say this.
    Page(Rights),
}

impl NestedMachine {
    /// `guest` below nested tables of `format`; `advanced` says that the processor has advanced
    /// exit information for EPT violations.
    #[must_use]
    pub fn new(guest: GuestMachine, format: Format, advanced: bool) -> Self {
        Self { guest, rules: Rules::new(&format), format, advanced }
    }

    /// Follow one access. `root` is the EPT pointer or nested CR3.
    pub fn predict<M: GuestWords + ?Sized>(
        &self,
        mem: &M,
        root: u64,
        roots: GuestRoots,
        address: u64,
        access: GuestAccess,
        trace: &mut Trace,
    ) -> NestedVerdict {
        trace.clear();
        match self.guest_half(mem, root, roots, address, access, trace) {
            Err(verdict) => verdict,
            Ok((gpa, rights)) => {
                match self.nested(mem, root, gpa, access.kind, Why::Page(rights), trace) {
                    Err(exit) => NestedVerdict::Exit(exit),
                    Ok((pa, _)) => NestedVerdict::Reaches { pa, gpa, rights },
                }
            }
        }
    }

    fn guest_half<M: GuestWords + ?Sized>(
        &self,
        mem: &M,
        root: u64,
        roots: GuestRoots,
        address: u64,
        access: GuestAccess,
        trace: &mut Trace,
    ) -> Result<(u64, Rights), NestedVerdict> {
        let guest = &self.guest;
        if !guest.usable(address) {
            return Err(NestedVerdict::Guest(Verdict::BadAddress));
        }
        if guest.first_level() == 0 {
            return Ok((address, Rights::EVERYTHING));
        }
        let fault = |code| NestedVerdict::Guest(Verdict::PageFault { code });
        let describes = guest.describes(access);
        let first = guest.first_table(roots, address);
        let mut table = first.ok_or(fault(describes))?;
        let mut rights = Rights::EVERYTHING;
        let mut used = Vec::new();
        for level in (1..=guest.first_level()).rev() {
            let gpa = guest.place(level, table, address);
            let (pa, grants) = self
                .nested(mem, root, gpa, AccessKind::Read, Why::Table, trace)
                .map_err(NestedVerdict::Exit)?;
            trace.note_read(pa);
            let entry = mem.word(pa, guest.entry_bytes()).ok_or(fault(describes))?;
            used.push((gpa, pa, grants, entry));
            rights = guest.with(rights, entry);
            match guest.says(level, entry, address) {
                Says::NotPresent => return Err(fault(describes)),
                Says::Reserved => return Err(fault(1 | 1 << 3 | describes)),
                Says::Table(next) => table = next,
                Says::Page(target) => {
                    if let Some(code) = guest.judge(rights, entry, access) {
                        return Err(fault(code));
                    }
                    let last = used.len() - 1;
                    for (index, (gpa, pa, grants, old)) in used.into_iter().enumerate() {
                        let new = GuestMachine::used(old, index == last, access);
                        if new == old {
                            continue;
                        }
                        if !grants.contains(Permissions::WRITE) {
                            let exit = self.exit(
                                FaultKind::Protection,
                                gpa,
                                grants,
                                AccessKind::Write,
                                Why::Update,
                            );
                            return Err(NestedVerdict::Exit(exit));
                        }
                        trace.note_write(pa, new);
                    }
                    return Ok((target, rights));
                }
            }
        }
        Err(fault(describes))
    }

    /// Follow one access in the nested dimension alone.
    ///
    /// # Errors
    ///
    /// What the hypervisor is shown.
    pub fn second<M: GuestWords + ?Sized>(
        &self,
        mem: &M,
        root: u64,
        gpa: u64,
        (kind, why): (AccessKind, Why),
        trace: &mut Trace,
    ) -> Result<u64, NestedExit> {
        trace.clear();
        self.nested(mem, root, gpa, kind, why, trace).map(|(pa, _)| pa)
    }

    /// The nested dimension for one address.
    fn nested<M: GuestWords + ?Sized>(
        &self,
        mem: &M,
        root: u64,
        gpa: u64,
        kind: AccessKind,
        why: Why,
        trace: &mut Trace,
    ) -> Result<(u64, Permissions), NestedExit> {
        let none = Permissions::NONE;
        if self.rules.refuse(gpa).is_some() {
            return Err(self.exit(FaultKind::NotPresent, gpa, none, kind, why));
        }
        let access = self.asked(kind, why);
        let mut table = self.rules.root_table(root);
        let mut grants = Permissions::ALL;
        let mut used = Vec::new();
        for level in (1..=self.rules.levels()).rev() {
            let index = (gpa >> (12 + 9 * (u32::from(level) - 1))) & 511;
            let at = table + 8 * index;
            trace.note_read(at);
            let missing = self.exit(FaultKind::NotPresent, gpa, none, kind, why);
            let entry = mem.word(at, 8).ok_or(missing)?;
            used.push((level, at, entry));
            match self.rules.decode(level, entry) {
                Entry::Absent => return Err(missing),
                Entry::Reserved => {
                    return Err(self.exit(FaultKind::Reserved, gpa, none, kind, why));
                }
                Entry::Table { table: next, permissions } => {
                    grants = grants.and(permissions);
                    table = next;
                }
                Entry::Leaf { page, permissions } => {
                    grants = grants.and(permissions);
                    if !grants.contains(self.rules.needs(access)) {
                        return Err(self.exit(FaultKind::Protection, gpa, grants, kind, why));
                    }
                    let dirties = self.rules.writes(access);
                    for (used_level, at, old) in used {
                        let dirty =
                            if used_level == level && dirties { self.rules.dirty() } else { 0 };
                        let new = old | self.rules.accessed(used_level) | dirty;
                        if new != old {
                            trace.note_write(at, new);
                        }
                    }
                    let size = 1 << (12 + 9 * (u32::from(level) - 1));
                    return Ok((page | gpa & (size - 1), grants));
                }
            }
        }
        Err(self.exit(FaultKind::NotPresent, gpa, none, kind, why))
    }

    fn exit(
        &self,
        kind: FaultKind,
        gpa: u64,
        grants: Permissions,
        access: AccessKind,
        why: Why,
    ) -> NestedExit {
        let code = self.rules.fault_code(kind, grants, self.asked(access, why));
        match (self.format, why) {
            (Format::Ept(_), _) if kind == FaultKind::Reserved => NestedExit::Misconfiguration(gpa),
            (Format::Ept(_), Why::Page(rights)) if self.advanced => {
                // Bit 9: a user-mode linear address. Bit 10: a read/write page. Bit 11: an
                // execute-disable page.
                let user = if rights.user { 1 << 9 } else { 0 };
                let writable = if rights.writable { 1 << 10 } else { 0 };
                let disabled = if rights.executable { 0 } else { 1 << 11 };
                NestedExit::Violation(code | user | writable | disabled, gpa)
            }
            (Format::Ept(_), _) => NestedExit::Violation(code, gpa),
            _ => NestedExit::NestedPageFault(code, gpa),
        }
    }

    /// The access as the nested rules see it: "user" is the linear address being a user-mode one.
    /// AMD has no load of pointers: entries of that table are entries like others.
    const fn asked(&self, kind: AccessKind, why: Why) -> Access {
        let stage = match (why, self.format) {
            (Why::Page(_), _) => Stage::Final,
            (Why::Pointers, Format::Ept(_)) => Stage::NoLinear,
            _ => Stage::GuestTable,
        };
        let user = match why {
            Why::Page(rights) => rights.user,
            _ => false,
        };
        Access { kind, user, stage }
    }
}
