//! Which access a translation permits: a table computed once per set of control registers.
//!
//! Owns [`Request`] (what is asked) and [`PermissionTable`] (KVM row 4.9): 24 kinds of request by
//! 16 sets of [`Access`]. What a guest may change without an exit - CR0.WP, EFLAGS.AC, PKRU - is
//! part of each request and never stored, so none of it can be stale (KVM rows B42, B63). Pure
//! values, no locks.

use mmu_core::access::Access;

/// What is done to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Data read.
    Read,
    /// Data write, or a read followed by a write.
    Write,
    /// Instruction fetch.
    Fetch,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Fetch];
}

/// On whose behalf (SDM 3A 4.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Privilege {
    /// At CPL 3.
    User,
    /// Below CPL 3, with EFLAGS.AC clear.
    Supervisor,
    /// Below CPL 3, with EFLAGS.AC set: SMAP lets it pass.
    SupervisorAc,
    /// The processor's own access to a system structure (GDT, IDT, TSS ...), at any CPL. SMAP
    /// forbids it whatever EFLAGS.AC says.
    Implicit,
}

impl Privilege {
    /// Every privilege.
    pub const ALL: [Self; 4] = [Self::User, Self::Supervisor, Self::SupervisorAc, Self::Implicit];
}

/// CR0.WP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriteProtect {
    /// 0: a supervisor writes to read-only pages.
    Off,
    /// 1.
    On,
}

impl WriteProtect {
    /// Both values.
    pub const ALL: [Self; 2] = [Self::Off, Self::On];
}

/// One access to a linear address, with the registers that hold at this moment. Take them from the
/// vCPU for every request: the guest may own them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// What is done.
    pub operation: Operation,
    /// By whom.
    pub privilege: Privilege,
    /// CR0.WP.
    pub write_protect: WriteProtect,
    /// PKRU: looked at in long mode with CR4.PKE only.
    pub pkru: u32,
}

impl Request {
    /// A request with CR0.WP set and a PKRU that permits everything.
    #[must_use]
    pub const fn new(operation: Operation, privilege: Privilege) -> Self {
        Self { operation, privilege, write_protect: WriteProtect::On, pkru: 0 }
    }

    #[inline]
    fn index(self) -> usize {
        let operation = match self.operation {
            Operation::Read => 0,
            Operation::Write => 8,
            Operation::Fetch => 16,
        };
        let privilege = match self.privilege {
            Privilege::User => 0,
            Privilege::Supervisor => 2,
            Privilege::SupervisorAc => 4,
            Privilege::Implicit => 6,
        };
        let on = self.write_protect == WriteProtect::On || cfg!(busted = "ignore_request_wp");
        operation + privilege + usize::from(on)
    }

    /// Does the protection key forbid a data access to a user page (SDM 3A 4.6.2)?
    #[inline]
    pub(super) fn key_forbids(self, key: u32) -> bool {
        let rights = self.pkru >> (2 * (key & 15));
        let (all, writes) = (rights & 1 != 0, rights & 2 != 0);
        match self.operation {
            Operation::Fetch => false,
            Operation::Read => all,
            Operation::Write => all || (writes && !self.ignores_write_protection()),
        }
    }

    /// A supervisor's write with CR0.WP clear.
    #[inline]
    pub(super) fn ignores_write_protection(self) -> bool {
        self.privilege != Privilege::User && self.write_protect == WriteProtect::Off
    }
}

/// Which rules a table follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PermissionRules {
    /// Pages of a linear address space.
    Linear {
        /// CR4.SMEP.
        smep: bool,
        /// CR4.SMAP.
        smap: bool,
    },
    /// EPT: privilege is that of the linear address, looked at with mode-based execute only.
    Ept {
        /// "Mode-based execute control for EPT".
        mode_based_execute: bool,
    },
}

impl PermissionRules {
    /// Is `request` forbidden on a page that permits `access`? The definition; [`PermissionTable`]
    /// holds its values.
    #[must_use]
    pub fn forbid(self, request: Request, access: Access) -> bool {
        match self {
            Self::Linear { smep, smap } => linear_forbids(smep, smap, request, access),
            Self::Ept { mode_based_execute } => {
                let needed = match request.operation {
                    Operation::Read => Access::READ,
                    Operation::Write => Access::WRITE,
                    Operation::Fetch
                        if mode_based_execute && request.privilege == Privilege::User =>
                    {
                        Access::USER
                    }
                    Operation::Fetch => Access::EXEC,
                };
                !access.contains(needed)
            }
        }
    }
}

fn linear_forbids(smep: bool, smap: bool, request: Request, access: Access) -> bool {
    let user_page = access.contains(Access::USER);
    let kind_forbids = match request.operation {
        Operation::Read => !access.contains(Access::READ),
        Operation::Write => !access.contains(Access::WRITE) && !request.ignores_write_protection(),
        Operation::Fetch => !access.contains(Access::EXEC),
    };
    let mode_forbids = match (request.privilege, request.operation) {
        (Privilege::User, _) => !user_page,
        (_, Operation::Fetch) => user_page && smep,
        (Privilege::SupervisorAc, _) => false,
        (Privilege::Supervisor | Privilege::Implicit, _) => user_page && smap,
    };
    kind_forbids || mode_forbids
}

/// Kinds of request that a table tells apart.
const REQUESTS: usize = 24;

/// The answers of [`PermissionRules::forbid`] for every request and every access, two loads away.
#[doc(alias = "permission_fault")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PermissionTable {
    /// By request; bit `a` says that a page permitting `a` forbids it.
    forbidden: [u16; REQUESTS],
}

impl PermissionTable {
    /// The table of `rules`.
    #[must_use]
    pub fn new(rules: PermissionRules) -> Self {
        let mut table = Self { forbidden: [0; REQUESTS] };
        for operation in Operation::ALL {
            for privilege in Privilege::ALL {
                for write_protect in WriteProtect::ALL {
                    let request = Request { operation, privilege, write_protect, pkru: 0 };
                    let mut word = 0;
                    for bits in 0..=Access::ALL.bits() {
                        let access = Access::from_bits_retain(bits);
                        word |= u16::from(rules.forbid(request, access)) << bits;
                    }
                    if let Some(place) = table.forbidden.get_mut(request.index()) {
                        *place = word;
                    }
                }
            }
        }
        table
    }

    /// Is `request` forbidden on a page that permits `access`? Protection keys are not part of it.
    #[inline]
    #[must_use]
    pub fn forbids(&self, request: Request, access: Access) -> bool {
        // Every index is below the length; a request that were not would be forbidden.
        let word = self.forbidden.get(request.index()).copied().unwrap_or(u16::MAX);
        word >> (access.bits() & 15) & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_holds_what_the_rules_say() {
        let mut rules = std::vec::Vec::new();
        for bits in 0..4 {
            rules.push(PermissionRules::Linear { smep: bits & 1 != 0, smap: bits & 2 != 0 });
        }
        rules.push(PermissionRules::Ept { mode_based_execute: false });
        rules.push(PermissionRules::Ept { mode_based_execute: true });
        for rules in rules {
            let table = PermissionTable::new(rules);
            for operation in Operation::ALL {
                for privilege in Privilege::ALL {
                    for write_protect in WriteProtect::ALL {
                        let request = Request { operation, privilege, write_protect, pkru: 0 };
                        for bits in 0..16 {
                            let access = Access::from_bits_retain(bits);
                            assert_eq!(
                                table.forbids(request, access),
                                rules.forbid(request, access),
                                "{rules:?} {request:?} {access:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_key_never_forbids_a_fetch_and_wd_yields_to_a_supervisor_without_wp() {
        let all = Request { pkru: u32::MAX, ..Request::new(Operation::Fetch, Privilege::User) };
        assert!((0..16).all(|key| !all.key_forbids(key)));
        let write =
            Request { pkru: 2 << 6, ..Request::new(Operation::Write, Privilege::Supervisor) };
        assert!(write.key_forbids(3) && !write.key_forbids(2));
        let without = Request { write_protect: WriteProtect::Off, ..write };
        assert!(!without.key_forbids(3));
        assert!(Request { privilege: Privilege::User, ..without }.key_forbids(3));
        assert!(!Request { operation: Operation::Read, ..write }.key_forbids(3));
        assert!(Request { pkru: 1, ..without }.key_forbids(0), "AD holds without WP too");
    }
}
