//! The page walker: from an address and an access to a translation or a fault.
//!
//! Like hardware it reads each entry once per attempt, looks at reserved bits on the way down and
//! at permissions at the end, sets accessed bits in the entries used and the dirty bit in the leaf
//! by compare-exchange, and starts over when an entry changed under it. It holds no lock and no
//! cache.

use crate::access::{Access, AccessKind, FaultKind, Permissions, page_fault_code};
use crate::format::{Entry, Format, Rules};
use crate::phys::PhysMem;

/// Attempts before a walk gives up with [`FaultKind::Contended`]. Each lost attempt means that
/// somebody else changed an entry in between, so reaching this is no accident.
const ATTEMPTS_MAX: u32 = 1 << 20;

/// Non-leaf entries on the longest path.
const PATH_MAX: usize = 4;

/// When accessed bits of non-leaf entries are set. Hardware may do either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessedOn {
    /// Once the access is known to be permitted: a fault sets nothing.
    #[default]
    Success,
    /// When the walk passes: a fault leaves the bits of the entries above it set.
    Passage,
}

/// A successful translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Physical address of the byte that was asked for.
    pub pa: u64,
    /// Level of the leaf: 1, 2 or 3.
    pub level: u8,
    /// What all entries together grant.
    pub permissions: Permissions,
    /// The leaf's dirty bit is set, or the format has none: a write needs no other walk.
    pub dirty: bool,
    /// This walk has set it.
    pub dirtied: bool,
    /// Entries read, over all attempts.
    pub reads: u32,
    /// Attempts lost to changes by others.
    pub restarts: u32,
}

impl Translation {
    /// Do all entries grant writes?
    #[must_use]
    pub const fn writable(&self) -> bool {
        self.permissions.contains(Permissions::WRITE)
    }

    /// Do all entries grant fetches (with mode-based execute: supervisor fetches)?
    #[must_use]
    pub const fn executable(&self) -> bool {
        self.permissions.contains(Permissions::EXECUTE)
    }

    /// Do all entries grant user accesses?
    #[must_use]
    pub const fn user(&self) -> bool {
        self.permissions.contains(Permissions::USER)
    }
}

/// A failed translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Why.
    pub kind: FaultKind,
    /// Level of the entry that decided; of the leaf for a missing permission.
    pub level: u8,
    /// The address that was asked for.
    pub address: u64,
    /// The access that was asked for.
    pub access: Access,
    /// The hardware's report, see [`Rules::fault_code`].
    pub code: u64,
    /// Entries read, over all attempts.
    pub reads: u32,
}

impl Fault {
    /// The fault as a #PF error code (P 1, W 2, U 4, RSVD 8, I 16), whatever the format.
    #[must_use]
    pub const fn page_fault_error(&self) -> u32 {
        let write = matches!(self.access.kind, AccessKind::Write);
        let fetch = matches!(self.access.kind, AccessKind::Fetch);
        // The code has five bits.
        page_fault_code(self.kind, write, self.access.user, fetch) as u32
    }
}

/// Where a walk is: in which table, and what the entries above grant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Level of the table.
    pub level: u8,
    /// Physical address of the table.
    pub table: u64,
    /// What the entries that led here grant together.
    pub permissions: Permissions,
}

/// The tables a walk went through below its start, for the paging-structure cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct Path {
    used: [Used; PATH_MAX],
    len: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Used {
    at: u64,
    entry: u64,
    accessed: u64,
    to: Step,
}

impl Path {
    /// The steps that a paging-structure cache may keep: those behind entries whose accessed bit is
    /// set, from the top until the first that is not.
    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        self.used
            .iter()
            .take(self.len)
            .take_while(|used| used.entry & used.accessed == used.accessed)
            .map(|used| used.to)
    }

    fn push(&mut self, used: Used) {
        if let Some(place) = self.used.get_mut(self.len) {
            *place = used;
            self.len += 1;
        }
    }
}

/// The end of one attempt.
enum Attempt {
    Translated(Step, u64, [bool; 2]),
    Faulted(FaultKind, u8, Permissions),
    Lost,
}

/// A walker for one format.
#[derive(Clone, Copy, Debug)]
pub struct Walker {
    rules: Rules,
    accessed_on: AccessedOn,
}

impl Walker {
    /// A walker that sets accessed bits on success only.
    #[must_use]
    pub fn new(format: &Format) -> Self {
        Self { rules: Rules::new(format), accessed_on: AccessedOn::Success }
    }

    /// The same walker with another choice of when to set accessed bits.
    #[must_use]
    pub const fn with_accessed_on(mut self, accessed_on: AccessedOn) -> Self {
        self.accessed_on = accessed_on;
        self
    }

    /// The format's rules.
    #[inline]
    #[must_use]
    pub const fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The step at which a full walk starts. `root` is the value of CR3, nCR3 or EPTP.
    #[must_use]
    pub const fn top(&self, root: u64) -> Step {
        Step {
            level: self.rules.levels(),
            table: self.rules.root_table(root),
            permissions: Permissions::ALL,
        }
    }

    /// Walk from the root.
    ///
    /// # Errors
    ///
    /// The fault that hardware would deliver.
    pub fn translate<M: PhysMem + ?Sized>(
        &self,
        mem: &M,
        root: u64,
        address: u64,
        access: Access,
    ) -> Result<Translation, Fault> {
        self.resume(mem, self.top(root), address, access, &mut Path::default())
    }

    /// Walk from a step below the root, as a processor does that has the upper entries cached.
    /// `path` receives the tables passed, also when the walk faults.
    ///
    /// # Errors
    ///
    /// The fault that hardware would deliver.
    pub fn resume<M: PhysMem + ?Sized>(
        &self,
        mem: &M,
        from: Step,
        address: u64,
        access: Access,
        path: &mut Path,
    ) -> Result<Translation, Fault> {
        path.len = 0;
        if let Some(kind) = self.rules.refuse(address) {
            return Err(self.fault(kind, from.level, Permissions::NONE, address, access, 0));
        }
        let mut reads = 0;
        for restarts in 0..ATTEMPTS_MAX {
            match self.attempt(mem, from, address, access, path, &mut reads) {
                Attempt::Lost => {}
                Attempt::Translated(leaf, pa, [dirty, dirtied]) => {
                    return Ok(Translation {
                        pa,
                        level: leaf.level,
                        permissions: leaf.permissions,
                        dirty,
                        dirtied,
                        reads,
                        restarts,
                    });
                }
                Attempt::Faulted(kind, level, permissions) => {
                    return Err(self.fault(kind, level, permissions, address, access, reads));
                }
            }
        }
        let kind = FaultKind::Contended;
        Err(self.fault(kind, from.level, Permissions::NONE, address, access, reads))
    }

    /// The fault of an access that `permissions` deny, found at `level`.
    pub(crate) const fn denied(
        &self,
        level: u8,
        permissions: Permissions,
        address: u64,
        access: Access,
    ) -> Fault {
        self.fault(FaultKind::Protection, level, permissions, address, access, 0)
    }

    const fn fault(
        &self,
        kind: FaultKind,
        level: u8,
        permissions: Permissions,
        address: u64,
        access: Access,
        reads: u32,
    ) -> Fault {
        Fault {
            kind,
            level,
            address,
            access,
            code: self.rules.fault_code(kind, permissions, access),
            reads,
        }
    }

    #[inline]
    fn attempt<M: PhysMem + ?Sized>(
        &self,
        mem: &M,
        from: Step,
        address: u64,
        access: Access,
        path: &mut Path,
        reads: &mut u32,
    ) -> Attempt {
        path.len = 0;
        let mut step = from;
        for level in (1..=from.level).rev() {
            let at = self.rules.entry_address(step.table, level, address);
            let Some(entry) = mem.read(at) else {
                return Attempt::Faulted(FaultKind::NoMemory, level, step.permissions);
            };
            *reads += 1;
            match self.rules.decode(level, entry) {
                Entry::Absent => {
                    return Attempt::Faulted(FaultKind::NotPresent, level, step.permissions);
                }
                Entry::Reserved => {
                    return Attempt::Faulted(FaultKind::Reserved, level, step.permissions);
                }
                Entry::Table { table, permissions } => {
                    step = Step {
                        level: level - 1,
                        table,
                        permissions: step.permissions.and(permissions),
                    };
                    let accessed = self.rules.accessed(level);
                    let mut used = Used { at, entry, accessed, to: step };
                    if self.accessed_on == AccessedOn::Passage && !used.mark(mem) {
                        return Attempt::Lost;
                    }
                    path.push(used);
                }
                Entry::Leaf { page, permissions } => {
                    step.level = level;
                    step.permissions = step.permissions.and(permissions);
                    let leaf = (at, entry, page | (address & Rules::offset_mask(level)));
                    return self.finish(mem, step, leaf, access, path);
                }
            }
        }
        // Level 1 entries are never tables, so only a start below level 1 comes here.
        Attempt::Faulted(FaultKind::NotPresent, from.level, step.permissions)
    }

    /// The leaf was reached: permissions, then accessed bits from the top, then the leaf's bits.
    #[inline]
    fn finish<M: PhysMem + ?Sized>(
        &self,
        mem: &M,
        leaf: Step,
        (at, entry, pa): (u64, u64, u64),
        access: Access,
        path: &mut Path,
    ) -> Attempt {
        if !leaf.permissions.contains(self.rules.needs(access)) {
            return Attempt::Faulted(FaultKind::Protection, leaf.level, leaf.permissions);
        }
        for used in path.used.iter_mut().take(path.len) {
            if !used.mark(mem) {
                return Attempt::Lost;
            }
        }
        let dirty = self.rules.dirty();
        let mut wanted = entry | self.rules.accessed(leaf.level);
        if self.rules.writes(access) {
            wanted |= dirty;
        }
        if wanted != entry && mem.cas(at, entry, wanted) != Some(Ok(())) {
            return Attempt::Lost;
        }
        let dirtied = wanted & !entry & dirty != 0;
        Attempt::Translated(leaf, pa, [wanted & dirty == dirty, dirtied])
    }
}

impl Used {
    /// Set the accessed bit. False when the entry is no longer what was read.
    #[inline]
    fn mark<M: PhysMem + ?Sized>(&mut self, mem: &M) -> bool {
        let wanted = self.entry | self.accessed;
        if wanted == self.entry {
            return true;
        }
        if mem.cas(self.at, self.entry, wanted) != Some(Ok(())) {
            return false;
        }
        self.entry = wanted;
        true
    }
}
