//! Walks over the tables that a guest hypervisor made for its guest: EPT and NPT.
//!
//! Owns [`NestedWalker`] (KVM rows 4.59 and, for the codes, 4.15), what such a walk is for
//! ([`Purpose`]), and [`NestedTables`], through which [`super::walker`] reaches a nested guest's
//! own tables: a two-dimensional walk. Sources: SDM 3C 28.2.1, table 28-7, and 29.3; APM 2 15.25.
//! No locks.

use mmu_core::access::{Access, EptViolation, NpfInfo};
use mmu_core::addr::{Gpa, Level};

use super::cpu::{EptCpu, GuestControls, GuestCpu};
use super::descent::{Beneath, Flat, Halt, KeyVerdict, Located, Start, Stop, descend, halt};
use super::memory::GuestMem;
use super::mode::{ModeError, PHYS_BITS, PagingMode};
use super::permit::{Operation, Privilege, Request};
use super::rules::Rules;
use super::walk::{
    Cause, EntryMeaning, GuestWalk, NestedError, NestedFault, NestedReport, NestedWalk, WalkError,
};

/// What a nested guest's physical address is translated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// The translation of a linear address is complete; this is what the guest's own tables permit
    /// there ([`Access::ALL`] without paging).
    Final(Access),
    /// An entry of the guest's own tables.
    Table,
    /// The load of PAE pointers by a write to a control register, which has no linear address.
    Pointers,
}

/// One access to a nested guest's physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NestedRequest {
    /// What is done.
    pub operation: Operation,
    /// What for.
    pub purpose: Purpose,
}

/// Which second dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ept { accessed_dirty: bool, mode_based_execute: bool, advanced_info: bool },
    Npt,
}

/// A walker for one setting of a guest hypervisor's nested tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedWalker {
    rules: Rules,
    kind: Kind,
    levels: Level,
}

impl NestedWalker {
    /// For EPT of `levels`, as `cpu` offers it.
    ///
    /// # Errors
    /// [`ModeError::NestedLevels`], [`ModeError::PhysBits`].
    #[doc(alias = "kvm_init_shadow_ept_mmu")]
    pub fn ept(levels: Level, cpu: &EptCpu) -> Result<Self, ModeError> {
        let offered = levels == Level::L4 || (levels == Level::L5 && cpu.five_levels);
        if !offered {
            return Err(ModeError::NestedLevels { levels });
        }
        if !PHYS_BITS.contains(&cpu.max_phys_bits) {
            return Err(ModeError::PhysBits { bits: cpu.max_phys_bits });
        }
        let kind = Kind::Ept {
            accessed_dirty: cpu.accessed_dirty,
            mode_based_execute: cpu.mode_based_execute,
            advanced_info: cpu.advanced_info,
        };
        Ok(Self { rules: Rules::ept(levels, cpu), kind, levels })
    }

    /// For NPT, whose format is that of the hypervisor's own long mode: `cpu` and `controls` are
    /// the hypervisor's. Keys, SMEP, SMAP and write protection do not concern it.
    ///
    /// # Errors
    /// [`ModeError`]; [`ModeError::LongModeWithoutPae`] for a hypervisor that is not in long mode.
    #[doc(alias = "kvm_init_shadow_npt_mmu")]
    pub fn npt(cpu: &GuestCpu, controls: GuestControls) -> Result<Self, ModeError> {
        let levels = match PagingMode::of(cpu, controls)? {
            PagingMode::Long4 => Level::L4,
            PagingMode::Long5 => Level::L5,
            _ => return Err(ModeError::LongModeWithoutPae),
        };
        Ok(Self { rules: Rules::npt(levels, cpu, controls), kind: Kind::Npt, levels })
    }

    /// Its format.
    #[must_use]
    pub const fn mode(&self) -> PagingMode {
        self.rules.mode
    }

    pub(super) const fn rules(&self) -> &Rules {
        &self.rules
    }

    /// What `value` says as an entry of a table of `level`, by itself.
    #[must_use]
    pub fn meaning(&self, level: Level, value: u64) -> EntryMeaning {
        self.rules.meaning(level, value)
    }

    /// Translate `gpa` by the tables at `root` (EPT pointer or nested CR3; what does not belong to
    /// the address is dropped), and set accessed and dirty bits where the format has them on.
    ///
    /// # Errors
    /// [`NestedError::Fault`] is for the guest hypervisor.
    pub fn walk<M: GuestMem + ?Sized>(
        &self,
        mem: &M,
        root: u64,
        gpa: Gpa,
        request: NestedRequest,
    ) -> Result<NestedWalk, NestedError> {
        let start = Start { table: self.rules.table(root), level: self.levels };
        let reach = self.rules.mode.entry_shift(self.levels) + 9;
        let found = if gpa.get() >> reach != 0 {
            Err(halt(Cause::NotPresent, self.levels))
        } else {
            descend(&self.rules, mem, &Flat, start, gpa.get(), self.check(request))
        };
        match found {
            Ok(path) => Ok(NestedWalk { gpa, path }),
            Err(Stop::Here(halt)) => Err(NestedError::Fault(self.fault(gpa, request, halt))),
            Err(Stop::Beneath(fault)) => Err(NestedError::Fault(fault)),
            Err(Stop::Contended) => Err(NestedError::Contended { gpa }),
        }
    }

    /// Does an access to a guest table count as a write? AMD: always. Intel: with accessed and
    /// dirty flags on, and not for PAE pointers (SDM 3C 29.3.5).
    const fn counts_as_write(&self, purpose: Purpose) -> bool {
        match (self.kind, purpose) {
            (_, Purpose::Final(_)) => false,
            (Kind::Npt, _) => true,
            (Kind::Ept { accessed_dirty, .. }, Purpose::Table) => accessed_dirty,
            (Kind::Ept { .. }, Purpose::Pointers) => false,
        }
    }

    /// What the entries must permit. With mode-based execute it is the linear address that is a
    /// user's, whatever the CPL; NPT sees nothing but user accesses.
    fn check(&self, request: NestedRequest) -> Request {
        let operation = match request.purpose {
            purpose if self.counts_as_write(purpose) => Operation::Write,
            _ => request.operation,
        };
        let privilege = match (self.kind, request.purpose) {
            (Kind::Npt, _) => Privilege::User,
            (Kind::Ept { .. }, Purpose::Final(linear)) if linear.contains(Access::USER) => {
                Privilege::User
            }
            (Kind::Ept { .. }, _) => Privilege::Supervisor,
        };
        Request::new(operation, privilege)
    }

    fn fault(&self, gpa: Gpa, request: NestedRequest, halt: Halt) -> NestedFault {
        let report = match (self.kind, halt.cause) {
            (_, Cause::LogFull) => NestedReport::LogFull,
            (Kind::Ept { .. }, Cause::Reserved) => NestedReport::EptMisconfig,
            (Kind::Ept { mode_based_execute, advanced_info, .. }, _) => {
                let mut qualification = self.qualification(request);
                if halt.cause == Cause::Permission {
                    qualification |= permitted(halt.access, mode_based_execute);
                }
                if advanced_info {
                    qualification |= advanced(request.purpose);
                }
                NestedReport::EptViolation(qualification)
            }
            (Kind::Npt, _) => NestedReport::Npf(self.npf_info(request, halt.cause)),
        };
        NestedFault { gpa, level: halt.level, cause: halt.cause, report }
    }

    /// Bits 0 to 2, 7 and 8: the access. One to a guest table that counts as a write is both a
    /// read and a write.
    fn qualification(&self, request: NestedRequest) -> EptViolation {
        let access = match request.operation {
            _ if self.counts_as_write(request.purpose) => EptViolation::READ | EptViolation::WRITE,
            Operation::Read => EptViolation::READ,
            Operation::Write => EptViolation::WRITE,
            Operation::Fetch => EptViolation::FETCH,
        };
        access
            | match request.purpose {
                Purpose::Final(_) => EptViolation::LINEAR_VALID | EptViolation::FINAL,
                Purpose::Table => EptViolation::LINEAR_VALID,
                Purpose::Pointers => EptViolation::empty(),
            }
    }

    fn npf_info(&self, request: NestedRequest, cause: Cause) -> NpfInfo {
        // Nested accesses are user accesses.
        let mut info = NpfInfo::USER
            | match request.purpose {
                Purpose::Final(_) => NpfInfo::GUEST_FINAL,
                Purpose::Table | Purpose::Pointers => NpfInfo::GUEST_TABLE,
            };
        info |= match self.check(request).operation {
            Operation::Read => NpfInfo::empty(),
            Operation::Write => NpfInfo::WRITE,
            Operation::Fetch if self.rules.reports_fetch => NpfInfo::FETCH,
            Operation::Fetch => NpfInfo::empty(),
        };
        info | match cause {
            Cause::Permission => NpfInfo::PRESENT,
            Cause::Reserved => NpfInfo::PRESENT | NpfInfo::RESERVED,
            Cause::NotPresent | Cause::NotMemory | Cause::LogFull => NpfInfo::empty(),
        }
    }
}

/// Bits 3 to 6 of a violation's qualification: what the nested entries together permit.
fn permitted(access: Access, mode_based_execute: bool) -> EptViolation {
    let mut bits = EptViolation::empty();
    bits.set(EptViolation::READABLE, access.contains(Access::READ));
    bits.set(EptViolation::WRITABLE, access.contains(Access::WRITE));
    bits.set(EptViolation::EXECUTABLE, access.contains(Access::EXEC));
    let user = mode_based_execute && access.contains(Access::USER);
    bits.set(EptViolation::USER_EXECUTABLE, user);
    bits
}

/// Bits 9 to 11: what the guest's own tables permit, where the linear address is translated.
fn advanced(purpose: Purpose) -> EptViolation {
    let Purpose::Final(linear) = purpose else {
        return EptViolation::empty();
    };
    let mut bits = EptViolation::empty();
    bits.set(EptViolation::USER_LINEAR, linear.contains(Access::USER));
    bits.set(EptViolation::WRITABLE_LINEAR, linear.contains(Access::WRITE));
    bits.set(EptViolation::NO_EXECUTE_LINEAR, !linear.contains(Access::EXEC));
    bits
}

/// A nested guest's tables and where they begin: the second dimension of a walk.
#[derive(Clone, Copy, Debug)]
pub struct NestedTables<'w> {
    walker: &'w NestedWalker,
    root: u64,
    purpose: Purpose,
}

/// A translation in both dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TwoDimensionalWalk {
    /// From linear to nested guest's physical address. Its entries stand where their `gpa` says in
    /// the hypervisor's memory.
    pub guest: GuestWalk,
    /// From there to the hypervisor's physical address.
    pub page: NestedWalk,
}

impl TwoDimensionalWalk {
    /// Reads of memory that the last attempt took: n*m + n + m of them with n levels above and m
    /// below, where every page is a small one.
    #[must_use]
    pub const fn loads(&self) -> u32 {
        self.guest.path.loads + self.page.path.loads
    }
}

impl<'w> NestedTables<'w> {
    /// Tables that begin at `root`: EPT pointer or nested CR3.
    #[must_use]
    pub const fn new(walker: &'w NestedWalker, root: u64) -> Self {
        Self { walker, root, purpose: Purpose::Table }
    }

    /// The same, to load PAE pointers through.
    pub(super) const fn pointers(&self) -> Self {
        Self { purpose: Purpose::Pointers, ..*self }
    }

    /// The second half of a two-dimensional walk: the page itself.
    pub(super) fn finish<M: GuestMem + ?Sized>(
        &self,
        mem: &M,
        guest: GuestWalk,
        operation: Operation,
    ) -> Result<TwoDimensionalWalk, WalkError> {
        let gva = guest.gva;
        let request = NestedRequest { operation, purpose: Purpose::Final(guest.path.access) };
        match self.walker.walk(mem, self.root, guest.gpa(), request) {
            Ok(page) => Ok(TwoDimensionalWalk { guest, page }),
            Err(NestedError::Fault(fault)) => Err(WalkError::Nested { gva, fault }),
            Err(NestedError::Contended { .. }) => Err(WalkError::Contended { gva }),
        }
    }
}

/// A guest table's entry in the nested dimension.
#[derive(Clone, Copy, Debug)]
pub(super) struct NestedPlace {
    gpa: Gpa,
    level: Level,
    access: Access,
}

impl Beneath for NestedTables<'_> {
    type Place = NestedPlace;

    fn locate<M: GuestMem + ?Sized>(
        &self,
        mem: &M,
        gpa: Gpa,
    ) -> Result<Located<NestedPlace>, Stop> {
        let request = NestedRequest { operation: Operation::Read, purpose: self.purpose };
        match self.walker.walk(mem, self.root, gpa, request) {
            Ok(walk) => {
                let (level, access) = (walk.path.level, walk.path.access);
                let place = NestedPlace { gpa, level, access };
                Ok(Located { at: walk.target(), loads: walk.path.loads, place })
            }
            Err(NestedError::Fault(fault)) => Err(Stop::Beneath(fault)),
            Err(NestedError::Contended { .. }) => Err(Stop::Contended),
        }
    }

    /// Fails for EPT without accessed and dirty flags only: where an access to a guest table counts
    /// as a write, the entry could not have been read either.
    fn check_write(&self, place: NestedPlace) -> Result<(), Stop> {
        if place.access.contains(Access::WRITE) {
            return Ok(());
        }
        let request = NestedRequest { operation: Operation::Write, purpose: self.purpose };
        let NestedPlace { level, access, .. } = place;
        let key = KeyVerdict::Permits;
        let halt = Halt { cause: Cause::Permission, level, access, key };
        Err(Stop::Beneath(self.walker.fault(place.gpa, request, halt)))
    }
}
