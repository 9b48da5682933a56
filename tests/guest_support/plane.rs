//! A nested guest's tables and its hypervisor's, built so that every entry of a two-dimensional
//! walk is a word of its own; the walker beside the model.

use mmu_core::access::Access;
use mmu_core::addr::{Gva, PAGE_SIZE};
use mmu_model::{
    Format, GuestAccess, GuestMachine, GuestMode, GuestRoots, NestedMachine, NestedVerdict, Trace,
    Verdict,
};
use shadow_mmu::guest::{
    GuestRoot, GuestWalker, NestedTables, NestedWalker, TwoDimensionalWalk, WalkError,
};

use super::chain::same as same_guest;
use super::pages::Pages;
use super::{LINK, PS, levels_of, linear, nested_walker, request, root, same_exit, walker};

/// Write-back, in a leaf of EPT.
const WB: u64 = 6 << 3;
/// First page of the hypervisor's nested tables.
const NESTED: u64 = 0x1000;
/// Where guest pages lie inside their region: an index at every level, an offset in every size.
const OFFSET: u64 = 0x1765_4000;

/// Both dimensions.
pub struct Plane {
    pub mem: Pages,
    pub machine: GuestMachine,
    pub model: NestedMachine,
    pub format: Format,
    pub guest: GuestWalker,
    pub nested: NestedWalker,
    pub eptp: u64,
    pub roots: GuestRoots,
    pub address: u64,
    root: GuestRoot,
    levels: u8,
    next: u64,
    trace: Trace,
}

impl Plane {
    /// A guest of this mode whose leaf stands at `guest_leaf`, below nested leaves at `host_leaf`.
    pub fn new(
        machine: GuestMachine,
        format: Format,
        address: u64,
        (guest_leaf, host_leaf): (u8, u8),
    ) -> Self {
        let levels = levels_of(&format);
        let guest = walker(&machine);
        let mut plane = Self {
            mem: Pages::new(),
            machine,
            model: NestedMachine::new(machine, format, true),
            format,
            guest,
            nested: nested_walker(&format, true),
            eptp: NESTED * PAGE_SIZE,
            roots: GuestRoots::default(),
            address,
            root: GuestRoot::Cr3(0),
            levels,
            next: NESTED + 1,
            trace: Trace::default(),
        };
        let first = machine.first_level();
        plane.roots.cr3 = plane.guest_page(first.max(1));
        plane.roots.pdptes = [plane.roots.cr3 | 1; 4];
        plane.root = root(&guest, plane.roots);
        for level in (1..=first).rev().filter(|level| *level >= guest_leaf) {
            plane.nest(plane.guest_page(level), host_leaf);
            let leads = if level > guest_leaf {
                LINK | plane.guest_page(level - 1)
            } else {
                LINK | plane.data() | if level > 1 { PS } else { 0 }
            };
            let at = plane.target(plane.guest_place(level), host_leaf);
            plane.mem.set(at, machine.entry_bytes(), leads);
        }
        let gpa = if first == 0 { address } else { plane.data_gpa(guest_leaf) };
        plane.nest(gpa & !0xfff, host_leaf);
        plane
    }

    /// Guest pages lie in regions of their own: another entry at the top. 32-bit guests reach 4
    /// GiB only, and are 1 GiB apart.
    fn region(&self, number: u64) -> u64 {
        match self.machine.mode {
            GuestMode::TwoLevel => number << 30,
            _ if self.levels == 5 => number << 48,
            _ => number << 39,
        }
    }

    /// The guest's table of `level`.
    fn guest_page(&self, level: u8) -> u64 {
        self.region(u64::from(level)) | OFFSET
    }

    fn guest_place(&self, level: u8) -> u64 {
        let bits = if self.machine.entry_bytes() == 4 { 10 } else { 9 };
        let index = self.address >> (12 + bits * (u32::from(level) - 1)) & ((1 << bits) - 1);
        self.guest_page(level) + index * u64::from(self.machine.entry_bytes())
    }

    /// The guest's data, aligned for every size.
    fn data(&self) -> u64 {
        let number = if self.machine.mode == GuestMode::TwoLevel { 3 } else { 7 };
        self.region(number)
    }

    fn data_gpa(&self, guest_leaf: u8) -> u64 {
        let bits = if self.machine.entry_bytes() == 4 { 10 } else { 9 };
        let size = 1_u64 << (12 + bits * (u32::from(guest_leaf) - 1));
        self.data() | self.address & (size - 1)
    }

    /// Where a guest's page lies in the hypervisor's memory.
    pub fn target(&self, gpa: u64, host_leaf: u8) -> u64 {
        let number = match self.machine.mode {
            GuestMode::TwoLevel => gpa >> 30,
            _ => gpa >> if self.levels == 5 { 48 } else { 39 },
        };
        let size = 1_u64 << (12 + 9 * (u32::from(host_leaf) - 1));
        (16 + number) << 30 | gpa & (size - 1)
    }

    /// Map the guest's page in nested tables of its own.
    pub fn nest(&mut self, gpa: u64, host_leaf: u8) {
        let ept = matches!(self.format, Format::Ept(_));
        let link = if ept { 7 | 1 << 10 } else { LINK };
        let link = match self.format {
            Format::Ept(ept) if !ept.mode_based_execute => 7,
            _ => link,
        };
        let mut table = self.eptp;
        self.mem.add(table / PAGE_SIZE);
        for level in (host_leaf..=self.levels).rev() {
            let index = gpa >> (12 + 9 * (u32::from(level) - 1)) & 511;
            let at = table + 8 * index;
            if level == host_leaf {
                let size = 1_u64 << (12 + 9 * (u32::from(level) - 1));
                let page = self.target(gpa, host_leaf) & !(size - 1);
                let large = if level > 1 { PS } else { 0 };
                self.mem.set(at, 8, page | link | large | if ept { WB } else { 0 });
                return;
            }
            let there = self.mem.get(at, 8).expect("a table");
            table = if there == 0 {
                let new = self.next * PAGE_SIZE;
                self.next += 1;
                self.mem.add(new / PAGE_SIZE);
                self.mem.set(at, 8, new | link);
                new
            } else {
                there & 0x000f_ffff_ffff_f000
            };
        }
    }

    /// Is this an entry of the nested tables?
    pub fn is_nested(&self, at: u64) -> bool {
        (NESTED..self.next).contains(&(at / PAGE_SIZE))
    }

    /// Size of the entry at this place.
    pub fn bytes(&self, at: u64) -> u8 {
        if self.is_nested(at) { 8 } else { self.machine.entry_bytes() }
    }

    /// One access in both dimensions by the library, with nothing undone.
    pub fn walk(&self, access: GuestAccess) -> Result<TwoDimensionalWalk, WalkError> {
        let tables = NestedTables::new(&self.nested, self.eptp);
        let gva = Gva::new(self.address);
        let request = request(&self.machine, access);
        self.guest.walk_nested(&self.mem, &tables, &self.root, gva, request)
    }

    /// Compare one access on memory as it is, and leave it as it was. True if it reached a page.
    pub fn compare(&mut self, access: GuestAccess) -> bool {
        self.mem.forget();
        let predicted = self.model.predict(
            &self.mem,
            self.eptp,
            self.roots,
            self.address,
            access,
            &mut self.trace,
        );
        let ended = self.walk(access);
        let reads_agree = *self.mem.log.borrow() == self.trace.reads();
        if !same(&predicted, &ended) || !reads_agree || !self.changes_agree() {
            panic!(
                "{:?}\n{:?}\n{access:?}\nmodel {predicted:x?}, reads {:x?}, writes {:x?}\nwalker \
                 {ended:x?}, reads {:x?}, changed {:x?}",
                self.machine,
                self.format,
                self.trace.reads(),
                self.trace.writes(),
                self.mem.log.borrow(),
                self.mem.journal.borrow(),
            );
        }
        if let Ok(walk) = &ended {
            assert_eq!(walk.loads() as usize, self.trace.reads().len());
        }
        self.mem.roll_back();
        ended.is_ok()
    }

    /// The same words were changed, in the same order, to the same values. The model, which changes
    /// nothing, names a nested entry that two translations use twice.
    fn changes_agree(&self) -> bool {
        let journal = self.mem.journal.borrow();
        let mut writes: Vec<(u64, u64)> = Vec::new();
        for write in self.trace.writes() {
            if !writes.contains(write) {
                writes.push(*write);
            }
        }
        journal.len() == writes.len()
            && journal.iter().zip(writes).all(|((at, bytes, _), (theirs, new))| {
                *at == theirs && self.mem.get(*at, *bytes) == Some(new)
            })
    }
}

/// Do the two say the same?
pub fn same(predicted: &NestedVerdict, ended: &Result<TwoDimensionalWalk, WalkError>) -> bool {
    match (predicted, ended) {
        (NestedVerdict::Reaches { pa, gpa, rights }, Ok(walk)) => {
            let access = walk.guest.path.access | Access::READ;
            walk.page.target().get() == *pa
                && walk.guest.gpa().get() == *gpa
                && access == linear(*rights)
        }
        (NestedVerdict::Exit(exit), Err(WalkError::Nested { fault, .. })) => same_exit(exit, fault),
        (NestedVerdict::Guest(verdict), Err(error)) => {
            matches!(verdict, Verdict::PageFault { .. } | Verdict::BadAddress)
                && same_guest(verdict, &Err(*error))
        }
        _ => false,
    }
}
