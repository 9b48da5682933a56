//! Walks over a guest's own page tables: from linear to guest-physical addresses.
//!
//! Owns [`GuestWalker`] (KVM rows 4.1 to 4.17) for 32-bit, PAE, 4-level and 5-level paging and for
//! paging that is off; [`GuestRoot`] and the PAE pointers that stand in registers. Tables of a
//! nested guest's hypervisor are [`super::nested`]'s, and both together are a two-dimensional walk.
//! No locks; nothing is cached but what the control registers imply.

use core::fmt;

use arrayvec::ArrayVec;

use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, Gpa, Gva, Level};

use super::cpu::{GuestControls, GuestCpu};
use super::descent::{Beneath, Flat, Halt, KeyVerdict, Start, Stop, descend, halt};
use super::memory::{EntryWidth, GuestMem};
use super::mode::{ModeError, PagingMode};
use super::nested::{NestedTables, TwoDimensionalWalk};
use super::permit::{Operation, Privilege, Request};
use super::rules::Rules;
use super::walk::{
    Cause, Dirtiness, EntryMeaning, GuestFault, GuestWalk, NestedFault, WalkError, WalkPath,
};

/// The four pointers that PAE paging keeps in registers (KVM row 4.2). Made by
/// [`GuestWalker::load_pointers`] only: having one tells you that no reserved bit is set in it.
/// What memory holds by now is another matter; load again on the writes to CR3, CR0 and CR4 that
/// make a processor load.
#[doc(alias = "kvm_pdptr_read")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PaePointers([u64; 4]);

impl PaePointers {
    /// The four values.
    #[must_use]
    pub const fn values(&self) -> [u64; 4] {
        self.0
    }
}

/// Why PAE pointers cannot be loaded. All but a nested fault are #GP for the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointerError {
    /// A present pointer has a reserved bit.
    Reserved {
        /// Which of the four.
        index: usize,
        /// Its value.
        value: u64,
    },
    /// CR3 leads out of memory.
    NotMemory {
        /// Where the pointer was looked for.
        at: Gpa,
    },
    /// A fault for the guest hypervisor.
    Nested(NestedFault),
    /// Nested entries changed under every attempt: try again.
    Contended,
    /// The walker is not one of PAE paging.
    NotPae,
}

impl fmt::Display for PointerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reserved { index, value } => {
                write!(f, "PDPTE {index} is {value:#x}: a reserved bit")
            }
            Self::NotMemory { at } => write!(f, "the PDPTEs at {at} are not memory"),
            Self::Nested(fault) => write!(f, "the PDPTEs: {:?} at {}", fault.cause, fault.gpa),
            Self::Contended => f.write_str("the PDPTEs: nested entries changed at every attempt"),
            Self::NotPae => f.write_str("paging is not PAE"),
        }
    }
}

impl core::error::Error for PointerError {}

/// Where a guest's tables begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestRoot {
    /// CR3, all 64 bits: what does not belong to the address is dropped. Without paging it is not
    /// looked at.
    Cr3(u64),
    /// PAE paging.
    Pae(PaePointers),
}

/// A walker for one setting of a guest's control registers. Make a new one when they change; it is
/// small and cheap. CR0.WP, EFLAGS.AC and PKRU are not part of it: see [`Request`].
///
/// ```
/// use mmu_core::addr::{Gpa, Gva};
/// use shadow_mmu::guest::{
///     EntryWidth, Exchange, GuestControls, GuestCpu, GuestMem, GuestRoot, GuestWalker, NotMemory,
///     Operation, Privilege, Request, WalkError,
/// };
///
/// /// Four tables in a row, each with one entry that leads to the next, and a page behind them.
/// struct Tables;
///
/// impl GuestMem for Tables {
///     fn read(&self, at: Gpa, _: EntryWidth) -> Result<u64, NotMemory> {
///         // Present, writable, user, accessed.
///         Ok(if at.get() & 0xfff == 0 { at.get() + 0x1027 } else { 0 })
///     }
///     fn compare_exchange(
///         &self,
///         _: Gpa,
///         _: EntryWidth,
///         _: u64,
///         _: u64,
///     ) -> Result<Exchange, NotMemory> {
///         Ok(Exchange::ReadOnly)
///     }
/// }
///
/// let walker = GuestWalker::new(&GuestCpu::baseline(), GuestControls::LONG)?;
/// let root = GuestRoot::Cr3(0x1000);
/// let read = Request::new(Operation::Read, Privilege::User);
/// let walk = walker.walk(&Tables, &root, Gva::new(0x123), read)?;
/// assert_eq!(walk.gpa(), Gpa::new(0x5123));
/// assert_eq!(walk.path.loads, 4);
/// // 2 MiB further there is nothing.
/// let error = walker.walk(&Tables, &root, Gva::new(0x20_0000), read).unwrap_err();
/// assert!(matches!(error, WalkError::Fault(fault) if fault.code.bits() == 4));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestWalker {
    rules: Rules,
    smep: Smep,
}

/// CR4.SMEP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Smep {
    Off,
    On,
}

impl GuestWalker {
    /// The walker for `controls` on `cpu`.
    ///
    /// # Errors
    /// [`ModeError`] names what no such processor accepts.
    pub fn new(cpu: &GuestCpu, controls: GuestControls) -> Result<Self, ModeError> {
        let mode = PagingMode::of(cpu, controls)?;
        let smep = if controls.contains(GuestControls::SMEP) { Smep::On } else { Smep::Off };
        Ok(Self { rules: Rules::linear(mode, cpu, controls), smep })
    }

    /// Its paging mode.
    #[must_use]
    pub const fn mode(&self) -> PagingMode {
        self.rules.mode
    }

    /// What `value` says as an entry of a table of `level`, by itself.
    #[must_use]
    pub fn meaning(&self, level: Level, value: u64) -> EntryMeaning {
        self.rules.meaning(level, value)
    }

    /// Load the four pointers of PAE paging from where `cr3` says (KVM row 4.2).
    ///
    /// # Errors
    /// [`PointerError`]; the processor raises #GP and loads nothing.
    pub fn load_pointers<M: GuestMem + ?Sized>(
        &self,
        mem: &M,
        cr3: u64,
    ) -> Result<PaePointers, PointerError> {
        self.load_through(mem, &Flat, cr3)
    }

    /// The same for a nested guest, whose CR3 is an address of its own.
    ///
    /// # Errors
    /// As [`Self::load_pointers`], and [`PointerError::Nested`].
    pub fn load_nested_pointers<M: GuestMem + ?Sized>(
        &self,
        mem: &M,
        nested: &NestedTables<'_>,
        cr3: u64,
    ) -> Result<PaePointers, PointerError> {
        self.load_through(mem, &nested.pointers(), cr3)
    }

    fn load_through<M: GuestMem + ?Sized, B: Beneath>(
        &self,
        mem: &M,
        beneath: &B,
        cr3: u64,
    ) -> Result<PaePointers, PointerError> {
        if self.rules.mode != PagingMode::Pae {
            return Err(PointerError::NotPae);
        }
        let mut pointers = PaePointers([0; 4]);
        // Bits 31:5. The four stand in one page.
        let mut at = Gpa::new(cr3 & 0xffff_ffe0);
        for (index, place) in pointers.0.iter_mut().enumerate() {
            let located = beneath.locate(mem, at).map_err(|stop| match stop {
                Stop::Beneath(fault) => PointerError::Nested(fault),
                Stop::Here(_) | Stop::Contended => PointerError::Contended,
            })?;
            let read = mem.read(located.at, EntryWidth::Eight);
            let value = read.map_err(|error| PointerError::NotMemory { at: error.at })?;
            if value & 1 != 0 && value & self.rules.pointer_reserved != 0 {
                return Err(PointerError::Reserved { index, value });
            }
            *place = value;
            at = Gpa::new(at.get() + EntryWidth::Eight.bytes());
        }
        Ok(pointers)
    }

    /// Translate `gva` for one access, as the processor does: check, then set accessed and dirty
    /// bits. Takes no lock, reads each entry once an attempt, ends.
    ///
    /// # Errors
    /// [`WalkError::Fault`] is for the guest; its tables are as they were, but for bits that an
    /// attempt had set before it was lost.
    #[doc(alias = "walk_addr_generic")]
    pub fn walk<M: GuestMem + ?Sized>(
        &self,
        mem: &M,
        root: &GuestRoot,
        gva: Gva,
        request: Request,
    ) -> Result<GuestWalk, WalkError> {
        self.walk_through(mem, &Flat, root, gva, request)
    }

    /// Translate a nested guest's `gva` in both dimensions: its own tables, each of whose entries
    /// stands at an address that `nested` translates, then the page (KVM row 4.59).
    ///
    /// # Errors
    /// [`WalkError::Fault`] is for the nested guest, [`WalkError::Nested`] for its hypervisor.
    pub fn walk_nested<M: GuestMem + ?Sized>(
        &self,
        mem: &M,
        nested: &NestedTables<'_>,
        root: &GuestRoot,
        gva: Gva,
        request: Request,
    ) -> Result<TwoDimensionalWalk, WalkError> {
        let guest = self.walk_through(mem, nested, root, gva, request)?;
        nested.finish(mem, guest, request.operation)
    }

    /// The guest-physical address behind `gva`, for the emulator (KVM row 4.17).
    ///
    /// # Errors
    /// As [`Self::walk`].
    #[doc(alias = "kvm_mmu_gva_to_gpa_read")]
    pub fn gva_to_gpa<M: GuestMem + ?Sized>(
        &self,
        mem: &M,
        root: &GuestRoot,
        gva: Gva,
        request: Request,
    ) -> Result<Gpa, WalkError> {
        self.walk(mem, root, gva, request).map(|walk| walk.gpa())
    }

    /// The same for a nested guest: the address is its hypervisor's.
    ///
    /// # Errors
    /// As [`Self::walk_nested`].
    pub fn nested_gva_to_gpa<M: GuestMem + ?Sized>(
        &self,
        mem: &M,
        nested: &NestedTables<'_>,
        root: &GuestRoot,
        gva: Gva,
        request: Request,
    ) -> Result<Gpa, WalkError> {
        self.walk_nested(mem, nested, root, gva, request).map(|walk| walk.page.target())
    }

    /// What a shadow of the page that `walk` found for `request` may permit (KVM rows 4.12, 4.13).
    ///
    /// A clean page that was not written is not writable, so that its first write is noticed. A
    /// supervisor that writes to a read-only page with CR0.WP clear gets a writable page that is
    /// the supervisor's alone; with SMEP it must not be executable then, for it was a user's. That
    /// holds for memory only: an MMIO page keeps [`WalkPath::access`].
    #[must_use]
    pub fn shadow_access(&self, walk: &GuestWalk, request: Request) -> Access {
        if request.operation != Operation::Write {
            return walk.path.clean_access();
        }
        let access = walk.path.access;
        if access.contains(Access::WRITE) || !request.ignores_write_protection() {
            return access;
        }
        let lost = match self.smep {
            Smep::On => Access::USER | Access::EXEC,
            Smep::Off => Access::USER,
        };
        access.difference(lost) | Access::WRITE
    }

    fn walk_through<M: GuestMem + ?Sized, B: Beneath>(
        &self,
        mem: &M,
        beneath: &B,
        root: &GuestRoot,
        gva: Gva,
        request: Request,
    ) -> Result<GuestWalk, WalkError> {
        if !self.is_canonical(gva) {
            return Err(WalkError::NotCanonical { gva });
        }
        let Some(start) = self.start(root, gva)? else {
            return Ok(unpaged(gva));
        };
        let found = match start {
            First::Table(start) => descend(&self.rules, mem, beneath, start, gva.get(), request),
            First::Absent => Err(halt(Cause::NotPresent, Level::L3)),
        };
        match found {
            Ok(path) => Ok(GuestWalk { gva, path }),
            Err(Stop::Here(halt)) => Err(WalkError::Fault(self.fault(gva, request, halt))),
            Err(Stop::Beneath(fault)) => Err(WalkError::Nested { gva, fault }),
            Err(Stop::Contended) => Err(WalkError::Contended { gva }),
        }
    }

    pub(super) const fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Long mode: the unused upper bits repeat the highest used one. Elsewhere addresses have 32
    /// bits.
    pub(crate) fn is_canonical(&self, gva: Gva) -> bool {
        let used = match self.rules.mode {
            PagingMode::None | PagingMode::Npt { .. } | PagingMode::Ept { .. } => return true,
            PagingMode::Bits32 | PagingMode::Pae => return gva.get() >> 32 == 0,
            PagingMode::Long4 => 48,
            PagingMode::Long5 => 57,
        };
        let upper = gva.get() >> (used - 1);
        upper == 0 || upper == u64::MAX >> (used - 1)
    }

    fn start(&self, root: &GuestRoot, gva: Gva) -> Result<Option<First>, WalkError> {
        let level = match self.rules.mode.root_level() {
            None => return Ok(None),
            Some(level) => level,
        };
        match (self.rules.mode, root) {
            (PagingMode::Pae, GuestRoot::Pae(pointers)) => {
                let [first, second, third, fourth] = pointers.0;
                let pointer = match gva.get() >> 30 & 3 {
                    0 => first,
                    1 => second,
                    2 => third,
                    _ => fourth,
                };
                if pointer & 1 == 0 {
                    return Ok(Some(First::Absent));
                }
                let table = self.rules.table(pointer);
                Ok(Some(First::Table(Start { table, level: level.below() })))
            }
            (PagingMode::Pae, GuestRoot::Cr3(_)) | (_, GuestRoot::Pae(_)) => {
                Err(WalkError::WrongRoot)
            }
            (_, GuestRoot::Cr3(cr3)) => {
                Ok(Some(First::Table(Start { table: self.rules.table(*cr3), level })))
            }
        }
    }

    /// The error code (SDM 3A 4.7). W, U and I/D describe the access, the others what stopped it.
    fn fault(&self, gva: Gva, request: Request, halt: Halt) -> GuestFault {
        let mut code = match halt.cause {
            Cause::NotPresent | Cause::NotMemory | Cause::LogFull => PfErrorCode::empty(),
            Cause::Reserved => PfErrorCode::PRESENT | PfErrorCode::RESERVED,
            Cause::Permission => PfErrorCode::PRESENT,
        };
        if halt.key == KeyVerdict::Forbids {
            code |= PfErrorCode::PKEY;
        }
        match request.operation {
            Operation::Write => code |= PfErrorCode::WRITE,
            Operation::Fetch if self.rules.reports_fetch => code |= PfErrorCode::FETCH,
            Operation::Read | Operation::Fetch => {}
        }
        if request.privilege == Privilege::User {
            code |= PfErrorCode::USER;
        }
        GuestFault { gva, code, level: halt.level, cause: halt.cause }
    }
}

/// The first table of a walk.
enum First {
    Table(Start),
    /// PAE: its pointer is not present.
    Absent,
}

/// Without paging every linear address is a physical one that permits everything.
fn unpaged(gva: Gva) -> GuestWalk {
    let path = WalkPath {
        entries: ArrayVec::new(),
        gfn: Gfn::containing(Gpa::new(gva.get())),
        level: Level::L2,
        access: Access::ALL,
        dirty: Dirtiness::Untracked,
        loads: 0,
        attempts: 1,
    };
    GuestWalk { gva, path }
}
