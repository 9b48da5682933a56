//! Any memory as tables, any machine, any access: the walkers beside the model, in one dimension
//! and in two. What is compared depends on whether a table's entry is met twice, see [`check`].

use std::cell::RefCell;

use mmu_core::addr::{Gpa, Gva};
use mmu_model::{
    AccessKind, Format, GuestAccess, GuestMachine, GuestMode, GuestRoots, GuestWords,
    NestedMachine, NestedVerdict, Trace, Vendor, Verdict,
};
use shadow_mmu::guest::{
    EntryWidth, Exchange, GuestMem, GuestRoot, NestedTables, NotMemory, PagingMode, WalkError,
};

use super::{chain, nested_formats, nested_walker, plane, request, walker};

/// Pages of memory.
pub const PAGES: u64 = 8;
const WORDS: usize = (PAGES * 512) as usize;

/// What to try: plain numbers, for a fuzzer to choose.
#[derive(Clone, Debug, Default)]
pub struct Any {
    pub mode: u8,
    pub width: u8,
    /// Bits of the machine: vendor, NXE, WP, SMEP, SMAP, PKE, PSE, PSE-36, GBPAGES.
    pub machine: u16,
    /// Which second dimension; none for half of the values.
    pub nested: u8,
    pub access: u8,
    pub pkru: u32,
    pub cr3: u64,
    pub nested_root: u8,
    pub address: u64,
    /// Word numbers and their values; the rest is zero.
    pub words: Vec<(u16, u64)>,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Reached,
    Faulted,
    NestedFault,
    Refused,
}

/// How much could be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// Everything.
    Whole,
    /// That it ends.
    End,
}

/// Memory of a few pages, in words of 8 bytes.
struct Words {
    words: RefCell<Vec<u64>>,
    log: RefCell<Vec<u64>>,
    /// Words of 8 bytes that were changed.
    changed: RefCell<Vec<u64>>,
}

impl Words {
    fn get(&self, at: u64, bytes: u64) -> Option<u64> {
        let word = *self.words.borrow().get(usize::try_from(at / 8).ok()?)?;
        Some(match (bytes, at % 8) {
            (4, 0) => word & 0xffff_ffff,
            (4, _) => word >> 32,
            _ => word,
        })
    }
}

impl GuestMem for Words {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        assert_eq!(at.get() % width.bytes(), 0);
        self.log.borrow_mut().push(at.get());
        self.get(at.get(), width.bytes()).ok_or(NotMemory { at })
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        if self.get(at.get(), width.bytes()).ok_or(NotMemory { at })? != old {
            return Ok(Exchange::Lost);
        }
        self.changed.borrow_mut().push(at.get() & !7);
        let mut words = self.words.borrow_mut();
        let word = &mut words[(at.get() / 8) as usize];
        *word = match (width, at.get() % 8) {
            (EntryWidth::Four, 0) => (*word & !0xffff_ffff) | new,
            (EntryWidth::Four, _) => (*word & 0xffff_ffff) | (new << 32),
            (EntryWidth::Eight, _) => new,
        };
        Ok(Exchange::Done)
    }
}

impl GuestWords for Words {
    fn word(&self, pa: u64, bytes: u8) -> Option<u64> {
        self.get(pa, u64::from(bytes))
    }
}

impl Any {
    fn machine(&self) -> GuestMachine {
        let bit = |number: u16| self.machine >> number & 1 != 0;
        let modes = [
            GuestMode::FourLevel,
            GuestMode::FiveLevel,
            GuestMode::TwoLevel,
            GuestMode::Pae,
            GuestMode::Off,
        ];
        GuestMachine {
            mode: modes[usize::from(self.mode) % modes.len()],
            vendor: if bit(0) { Vendor::Amd } else { Vendor::Intel },
            max_phys_bits: 32 + self.width % 21,
            nxe: bit(1),
            wp: bit(2),
            smep: bit(3),
            smap: bit(4),
            pke: bit(5),
            pse: bit(6),
            pse36: bit(7),
            gbpages: bit(8),
        }
    }

    fn access(&self) -> GuestAccess {
        let kinds = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch];
        let kind = kinds[usize::from(self.access) % 3];
        let who = super::EVERYBODY[usize::from(self.access) / 3 % 4];
        GuestAccess { kind, who, pkru: self.pkru }
    }

    fn format(&self) -> Option<Format> {
        let formats = [nested_formats(4), nested_formats(5)].concat();
        formats.get(usize::from(self.nested) % (2 * formats.len())).copied()
    }
}

/// Walk, and compare: the end with its code and address, the reads in their order, what memory
/// holds after. Where an entry is met at two places of one walk and gets a bit there, the walk
/// starts over and the model does not: then only that it ends is compared.
pub fn check(any: &Any) -> (End, Compared) {
    let mut words = vec![0; WORDS];
    for (number, value) in &any.words {
        words[usize::from(*number) % WORDS] = *value;
    }
    let (log, changed) = (RefCell::default(), RefCell::default());
    let mem = Words { words: RefCell::new(words), log, changed };
    let machine = any.machine();
    let guest = walker(&machine);
    let mut roots = GuestRoots { cr3: any.cr3, pdptes: [0; 4] };
    let root = if guest.mode() == PagingMode::Pae {
        match guest.load_pointers(&mem, any.cr3) {
            Err(_) => return (End::Refused, Compared::Whole),
            Ok(pointers) => {
                roots.pdptes = pointers.values();
                assert!(roots.pdptes.iter().all(|value| machine.pointer_loads(*value)));
                GuestRoot::Pae(pointers)
            }
        }
    } else {
        GuestRoot::Cr3(any.cr3)
    };
    mem.log.borrow_mut().clear();
    let mut trace = Trace::default();
    let end = match any.format() {
        None => one_dimension(any, &mem, &root, roots, &mut trace),
        Some(format) => two_dimensions(any, format, &mem, &root, roots, &mut trace),
    };
    (end, if simple(&trace) { Compared::Whole } else { Compared::End })
}

fn one_dimension(
    any: &Any,
    mem: &Words,
    root: &GuestRoot,
    roots: GuestRoots,
    trace: &mut Trace,
) -> End {
    let (machine, access) = (any.machine(), any.access());
    let predicted = machine.predict(mem, roots, any.address, access, trace);
    let asked = request(&machine, access);
    let ended = walker(&machine).walk(mem, root, Gva::new(any.address), asked);
    assert!(!matches!(ended, Err(WalkError::Contended { .. } | WalkError::Nested { .. })));
    assert!(mem.log.borrow().len() <= 3 * 5, "{any:x?}: {ended:x?}");
    if simple(trace) {
        let agree = chain::same(&predicted, &ended);
        assert!(agree, "{any:x?}\nmodel {predicted:x?}\nwalker {ended:x?}");
        after(any, mem, trace);
    }
    match predicted {
        Verdict::Reaches { .. } => End::Reached,
        Verdict::PageFault { .. } => End::Faulted,
        Verdict::BadAddress => End::Refused,
    }
}

fn two_dimensions(
    any: &Any,
    format: Format,
    mem: &Words,
    root: &GuestRoot,
    roots: GuestRoots,
    trace: &mut Trace,
) -> End {
    let (machine, access) = (any.machine(), any.access());
    let nested_root = (u64::from(any.nested_root) % PAGES) << 12;
    let model = NestedMachine::new(machine, format, true);
    let predicted = model.predict(mem, nested_root, roots, any.address, access, trace);
    let nested = nested_walker(&format, true);
    let tables = NestedTables::new(&nested, nested_root);
    let asked = request(&machine, access);
    let gva = Gva::new(any.address);
    let ended = walker(&machine).walk_nested(mem, &tables, root, gva, asked);
    assert!(!matches!(ended, Err(WalkError::Contended { .. })), "{any:x?}: nobody interferes");
    if simple(trace) {
        let agree = plane::same(&predicted, &ended);
        assert!(agree, "{any:x?}\nmodel {predicted:x?}\nwalker {ended:x?}");
        after(any, mem, trace);
    }
    match predicted {
        NestedVerdict::Reaches { .. } => End::Reached,
        NestedVerdict::Guest(Verdict::BadAddress) => End::Refused,
        NestedVerdict::Guest(_) => End::Faulted,
        NestedVerdict::Exit(_) => End::NestedFault,
    }
}

/// Nothing is changed, or nothing is read twice.
fn simple(trace: &Trace) -> bool {
    let reads = trace.reads();
    let twice = (1..reads.len()).any(|at| reads[..at].contains(&reads[at]));
    trace.writes().is_empty() || !twice
}

fn after(any: &Any, mem: &Words, trace: &Trace) {
    assert_eq!(*mem.log.borrow(), trace.reads(), "{any:x?}");
    let bytes = any.machine().entry_bytes();
    for (at, new) in trace.writes() {
        let found = [mem.get(*at, 8), mem.get(*at, u64::from(bytes))];
        assert!(found.contains(&Some(*new)), "{any:x?}: {at:#x} should be {new:#x}, is {found:x?}");
    }
    let mut changed: Vec<u64> = trace.writes().iter().map(|(at, _)| at & !7).collect();
    let mut ours = mem.changed.borrow().clone();
    for list in [&mut changed, &mut ours] {
        list.sort_unstable();
        list.dedup();
    }
    assert_eq!(ours, changed, "{any:x?}: only what the model changes");
}

/// A value that says something as an entry: mostly sound, into the memory.
pub fn plausible(value: u64, choice: u64) -> u64 {
    let sound = ((value % PAGES) << 12) | 0x27;
    match choice % 16 {
        0 => value,
        1 => sound | 0x80,
        2 => sound & !(1 << (value >> 8 & 7)),
        3 => sound | 1 << (value >> 8 & 63),
        4..=6 => sound | 0x370,
        7 => sound | 0x40 | (sound << 32 & 0xffff_ffff_0000_0000),
        8..=10 => (sound & !0x20) | 0x300,
        _ => sound | 0x40,
    }
}
