//! The quickest memory for walks: one entry for each level of one walk, reads logged.

use std::cell::Cell;

use mmu_core::addr::{Gpa, Gva, PAGE_SIZE};
use mmu_model::{GuestAccess, GuestMachine, GuestRoots, GuestWords, Trace, Verdict};
use shadow_mmu::guest::{
    Cause, EntryWidth, Exchange, GuestMem, GuestRoot, GuestWalk, GuestWalker, NotMemory, Request,
    WalkError,
};

use super::{request, root, walker};

/// Levels at most.
const LEVELS: usize = 5;
/// Reads logged at most; more are counted.
const LOG: usize = 8;

/// One entry for each level. Level n's table is page `TABLES + n`.
pub struct Chain {
    /// By level, from level 1.
    places: [u64; LEVELS],
    values: [Cell<u64>; LEVELS],
    reads: [Cell<u64>; LOG],
    read: Cell<usize>,
    changed: [Cell<u64>; LOG],
    change: Cell<usize>,
    bytes: u8,
}

/// First table.
const TABLES: u64 = 0x10;

/// Where level `level`'s table stands.
pub const fn table(level: u8) -> u64 {
    (TABLES + level as u64) * PAGE_SIZE
}

impl Chain {
    /// The chain for walks of `address` in the machine's mode.
    pub fn new(machine: &GuestMachine, address: u64) -> Self {
        Self::of(machine.first_level(), machine.entry_bytes(), address)
    }

    /// A chain of `levels` tables with entries of `bytes` bytes.
    pub fn of(levels: u8, bytes: u8, address: u64) -> Self {
        let bits = if bytes == 4 { 10 } else { 9 };
        let mut places = [u64::MAX; LEVELS];
        for level in 1..=levels {
            let shift = 12 + bits * (u32::from(level) - 1);
            let index = address >> shift & ((1 << bits) - 1);
            places[usize::from(level) - 1] = table(level) + index * u64::from(bytes);
        }
        Self {
            places,
            values: Default::default(),
            reads: Default::default(),
            read: Cell::new(0),
            changed: Default::default(),
            change: Cell::new(0),
            bytes,
        }
    }

    #[inline]
    pub fn set(&self, level: u8, value: u64) {
        self.values[usize::from(level) - 1].set(value);
    }

    #[inline]
    pub fn get(&self, level: u8) -> u64 {
        self.values[usize::from(level) - 1].get()
    }

    #[inline]
    fn find(&self, at: u64) -> Option<&Cell<u64>> {
        // By the page, which tells the level, then the place in it.
        let level = (at / PAGE_SIZE).wrapping_sub(TABLES + 1) as usize;
        (self.places.get(level) == Some(&at)).then(|| &self.values[level])
    }

    pub fn forget(&self) {
        self.read.set(0);
        self.change.set(0);
    }

    /// Was read and changed what `trace` says, in that order?
    #[inline]
    pub fn agrees(&self, trace: &Trace) -> bool {
        let (reads, writes) = (trace.reads(), trace.writes());
        self.read.get() == reads.len()
            && self.change.get() == writes.len()
            && self.reads.iter().zip(reads).all(|(ours, theirs)| ours.get() == *theirs)
            && self.changed.iter().zip(writes).all(|(ours, (at, _))| ours.get() == *at)
            && writes.iter().all(|(at, new)| self.find(*at).map(Cell::get) == Some(*new))
    }
}

impl GuestMem for Chain {
    #[inline]
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        assert_eq!(width.bytes(), u64::from(self.bytes));
        let read = self.read.get();
        if let Some(place) = self.reads.get(read) {
            place.set(at.get());
        }
        self.read.set(read + 1);
        self.find(at.get()).map(Cell::get).ok_or(NotMemory { at })
    }

    #[inline]
    fn compare_exchange(
        &self,
        at: Gpa,
        _: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        let value = self.find(at.get()).ok_or(NotMemory { at })?;
        assert_eq!(value.get(), old, "nobody else changes it");
        value.set(new);
        let change = self.change.get();
        if let Some(place) = self.changed.get(change) {
            place.set(at.get());
        }
        self.change.set(change + 1);
        Ok(Exchange::Done)
    }
}

impl GuestWords for Chain {
    #[inline]
    fn word(&self, pa: u64, _: u8) -> Option<u64> {
        self.find(pa).map(Cell::get)
    }
}

/// Four pointers of PAE paging at address 0.
pub struct Pointers(pub [u64; 4]);

impl GuestMem for Pointers {
    fn read(&self, at: Gpa, _: EntryWidth) -> Result<u64, NotMemory> {
        self.0.get((at.get() / 8) as usize).copied().ok_or(NotMemory { at })
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        _: EntryWidth,
        _: u64,
        _: u64,
    ) -> Result<Exchange, NotMemory> {
        Err(NotMemory { at })
    }
}

/// One setting of a machine and one address: the walker beside the model.
pub struct Pair {
    pub machine: GuestMachine,
    pub walker: GuestWalker,
    pub chain: Chain,
    pub address: u64,
    roots: GuestRoots,
    root: GuestRoot,
    trace: Trace,
    /// Cases compared.
    pub cases: u64,
    /// Second accesses, on the tables as the first has left them.
    pub again: u64,
    /// Cases that ended in a translation.
    pub reached: u64,
}

impl Pair {
    pub fn new(machine: GuestMachine, address: u64) -> Self {
        let walker = walker(&machine);
        let first = table(machine.first_level());
        let roots = GuestRoots { cr3: first, pdptes: [first | 1; 4] };
        Self {
            machine,
            walker,
            chain: Chain::new(&machine, address),
            address,
            roots,
            root: root(&walker, roots),
            trace: Trace::default(),
            cases: 0,
            again: 0,
            reached: 0,
        }
    }

    /// Compare one access on the chain as it is, then the same access again if the first has
    /// changed the tables.
    #[inline]
    pub fn compare(&mut self, access: GuestAccess, request: Request) {
        self.cases += 1;
        if self.once(access, request) {
            self.again += 1;
            self.once(access, request);
        }
    }

    #[inline]
    fn once(&mut self, access: GuestAccess, request: Request) -> bool {
        self.chain.forget();
        let chain = &self.chain;
        let predicted =
            self.machine.predict(chain, self.roots, self.address, access, &mut self.trace);
        let ended = self.walker.walk(chain, &self.root, Gva::new(self.address), request);
        if !same(&predicted, &ended) || !chain.agrees(&self.trace) {
            self.mismatch(access, &predicted, &ended);
        }
        self.reached += u64::from(ended.is_ok());
        !self.trace.writes().is_empty()
    }

    #[cold]
    fn mismatch(
        &self,
        access: GuestAccess,
        predicted: &Verdict,
        ended: &Result<GuestWalk, WalkError>,
    ) -> ! {
        let entries: Vec<String> =
            (1..=self.machine.first_level()).map(|l| format!("{:#x}", self.chain.get(l))).collect();
        panic!(
            "{:?}\n{access:?} at {:#x}\nmodel {predicted:x?}, reads {:x?}, writes {:x?}\nwalker \
             {ended:x?}\nentries from level 1, after: {entries:?}, {} reads, {} changes",
            self.machine,
            self.address,
            self.trace.reads(),
            self.trace.writes(),
            self.chain.read.get(),
            self.chain.change.get(),
        )
    }
}

/// Do the two say the same?
#[inline]
pub fn same(predicted: &Verdict, ended: &Result<GuestWalk, WalkError>) -> bool {
    match (predicted, ended) {
        (Verdict::Reaches { pa, level, rights }, Ok(walk)) => {
            let access = walk.path.access;
            walk.gpa().get() == *pa
                && (walk.path.level.number() == *level || *level == 0)
                && access.contains(mmu_core::access::Access::USER) == rights.user
                && access.contains(mmu_core::access::Access::WRITE) == rights.writable
                && access.contains(mmu_core::access::Access::EXEC) == rights.executable
        }
        (Verdict::PageFault { code }, Err(WalkError::Fault(fault))) => {
            let present = fault.code.bits() & 1 != 0;
            fault.code.bits() == *code
                && present == matches!(fault.cause, Cause::Reserved | Cause::Permission)
        }
        (Verdict::BadAddress, Err(WalkError::NotCanonical { .. })) => true,
        _ => false,
    }
}

/// An access and its request.
pub fn asked(
    machine: &GuestMachine,
    kind: mmu_model::AccessKind,
    who: mmu_model::Who,
    pkru: u32,
) -> (GuestAccess, Request) {
    let access = GuestAccess { kind, who, pkru };
    (access, request(machine, access))
}
