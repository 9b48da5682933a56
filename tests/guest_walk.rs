//! Guest walks, rule by rule: what a directed scenario says better than a space of cases.

mod guest_support;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;

use guest_support::pages::Pages;
use guest_support::{
    A, D, EVERYBODY, KINDS, LINK, NX, P, PS, U, W, machine, registers, request, walker,
};
use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, Gpa, Gva, Hva, Level};
use mmu_core::dirty::NoMemory;
use mmu_core::slot::{DirtyLog, LogOptions, Memslot, Memslots, SlotFlags, SlotLimits, SlotMeta};
use mmu_core::spte::{Capabilities, LeafSpec, Legacy, SpteConfig};
use mmu_model::{AccessKind, GuestAccess, GuestMachine, GuestMode, Random, Who};
use shadow_mmu::guest::{
    Cause, Dirtiness, EntryMeaning, EntryWidth, EptCpu, Exchange, GuestControls, GuestCpu,
    GuestMem, GuestRoot, GuestWalk, GuestWalker, HostWords, LogFull, ModeError, NestedError,
    NestedReport, NestedRequest, NestedWalker, NotMemory, Operation, PagingMode, PointerError,
    Privilege, Purpose, Request, SlotMem, WalkError, WriteProtect,
};

const ADDRESS: u64 = 0x0000_1234_5678_9abc;
/// Page of the guest's PML4; the others follow.
const ROOT: u64 = 0x10;

/// Indices of `address` from level 1.
fn index(address: u64, level: u8) -> u64 {
    address >> (12 + 9 * (u32::from(level) - 1)) & 511
}

/// Four levels with `leaf` at the end, everything above it open.
fn four_levels(leaf: u64) -> Pages {
    let mem = Pages::new();
    for level in 2..=4 {
        mem.set(place(level), 8, (ROOT + 5 - u64::from(level)) << 12 | LINK);
    }
    mem.set(place(1), 8, leaf);
    mem
}

/// Where the entry of `level` stands in those.
fn place(level: u8) -> u64 {
    ((ROOT + 4 - u64::from(level)) << 12) | (index(ADDRESS, level) * 8)
}

fn long() -> GuestWalker {
    walker(&machine(GuestMode::FourLevel))
}

const USER_READ: Request = Request::new(Operation::Read, Privilege::User);
const USER_WRITE: Request = Request::new(Operation::Write, Privilege::User);

fn walk(walker: &GuestWalker, mem: &Pages, request: Request) -> Result<GuestWalk, WalkError> {
    walker.walk(mem, &GuestRoot::Cr3(ROOT << 12), Gva::new(ADDRESS), request)
}

fn code(result: Result<GuestWalk, WalkError>) -> u64 {
    match result {
        Err(WalkError::Fault(fault)) => fault.code.bits(),
        other => panic!("a page fault was due: {other:?}"),
    }
}

// KVM row 4.2.

fn pae() -> GuestWalker {
    walker(&GuestMachine { max_phys_bits: 36, ..machine(GuestMode::Pae) })
}

#[test]
fn pae_pointers_changed_in_memory_are_not_seen_until_they_are_loaded() {
    let mem = Pages::new();
    mem.set(0x1020, 8, 0x2001);
    mem.set(0x2000, 8, 0x3000 | LINK);
    mem.set(0x3000, 8, 0x4000 | LINK);
    let walker = pae();
    let pointers = walker.load_pointers(&mem, 0x1020).expect("nothing is reserved");
    assert_eq!(pointers.values(), [0x2001, 0, 0, 0]);
    let root = GuestRoot::Pae(pointers);
    mem.set(0x1020, 8, 0);
    mem.forget();
    let found = walker.walk(&mem, &root, Gva::new(0x123), USER_READ).expect("as loaded");
    assert_eq!(found.gpa(), Gpa::new(0x4123));
    assert_eq!(*mem.log.borrow(), [0x2000, 0x3000], "two levels stand in memory");
    // The second gigabyte's pointer is not present: a fault without a look at memory.
    mem.set(0x1028, 8, 0x2001);
    mem.forget();
    let absent = walker.walk(&mem, &root, Gva::new(0x4000_0123), USER_READ);
    assert_eq!(code(absent), 4);
    assert!(mem.log.borrow().is_empty());
    let reloaded = GuestRoot::Pae(walker.load_pointers(&mem, 0x1020).expect("still sound"));
    assert_eq!(code(walker.walk(&mem, &reloaded, Gva::new(0x123), USER_READ)), 4);
    assert!(walker.walk(&mem, &reloaded, Gva::new(0x4000_0123), USER_READ).is_ok());
}

#[test]
fn every_bit_of_a_pae_pointer_loads_as_the_model_says() {
    for max_phys_bits in [32, 36, 40, 52] {
        let machine = GuestMachine { max_phys_bits, ..machine(GuestMode::Pae) };
        let walker = walker(&machine);
        for bit in 0..64 {
            for present in [0, P] {
                let value = 1 << bit | present;
                let mem = Pages::new();
                mem.set(0x1038, 8, value);
                let loaded = walker.load_pointers(&mem, 0x1020);
                let expected = machine.pointer_loads(value);
                assert_eq!(loaded.is_ok(), expected, "{max_phys_bits} bits, {value:#x}");
                if !expected {
                    assert_eq!(loaded, Err(PointerError::Reserved { index: 3, value }));
                }
            }
        }
    }
    let nowhere = pae().load_pointers(&Pages::new(), 0x1020);
    assert_eq!(nowhere, Err(PointerError::NotMemory { at: Gpa::new(0x1020) }));
    assert_eq!(long().load_pointers(&Pages::new(), 0), Err(PointerError::NotPae));
    let pointers = pae().load_pointers(&four_levels(0), ROOT << 12).map(GuestRoot::Pae);
    let wrong = long().walk(&Pages::new(), &pointers.expect("zeroes"), Gva::new(0), USER_READ);
    assert_eq!(wrong, Err(WalkError::WrongRoot));
    let wrong = pae().walk(&Pages::new(), &GuestRoot::Cr3(0), Gva::new(0), USER_READ);
    assert_eq!(wrong, Err(WalkError::WrongRoot));
}

// KVM rows 4.3 and 4.11: memory by slots.

/// Host memory: pages at host addresses, and those the host has taken away.
#[derive(Default)]
struct Host {
    words: RefCell<BTreeMap<u64, u64>>,
    gone: Cell<Option<u64>>,
    dirtied: RefCell<Vec<Gfn>>,
}

impl HostWords for Host {
    fn load(&self, hva: Hva, _: EntryWidth) -> Option<u64> {
        if self.gone.get() == Some(hva.get() >> 12) {
            return None;
        }
        Some(self.words.borrow().get(&hva.get()).copied().unwrap_or(0))
    }

    fn compare_exchange(&self, hva: Hva, width: EntryWidth, old: u64, new: u64) -> Option<bool> {
        let found = self.load(hva, width)?;
        if found == old {
            self.words.borrow_mut().insert(hva.get(), new);
        }
        Some(found == old)
    }

    fn dirtied(&self, gfn: Gfn) {
        self.dirtied.borrow_mut().push(gfn);
    }
}

/// Where the host maps guest page 0.
const HVA: u64 = 0x7000_0000_0000;

fn slots(flags: SlotFlags, space: u16) -> Memslots {
    let mut slots = Memslots::new(&SlotLimits::new(2, Gfn::new(1 << 40)));
    let slot = Memslot {
        as_id: space,
        id: 3,
        flags,
        base_gfn: Gfn::new(ROOT),
        npages: 4,
        hva: Hva::new(HVA + (ROOT << 12)),
    };
    slots.insert(slot).expect("room");
    slots
}

fn host() -> Host {
    let host = Host::default();
    for level in 2..=4 {
        let link = (ROOT + 5 - u64::from(level)) << 12 | LINK;
        host.words.borrow_mut().insert(HVA + place(level), link);
    }
    host.words.borrow_mut().insert(HVA + place(1), 0x7777_7000 | LINK);
    host
}

fn walk_slots(slots: &Memslots, host: &Host, request: Request) -> Result<GuestWalk, WalkError> {
    let mem = SlotMem::new(slots, 0, host);
    long().walk(&mem, &GuestRoot::Cr3(ROOT << 12), Gva::new(ADDRESS), request)
}

#[test]
fn a_table_stands_in_a_visible_slot_with_memory_or_nowhere() {
    let host = host();
    let all = slots(SlotFlags::empty(), 0);
    let found = walk_slots(&all, &host, USER_WRITE).expect("all four tables are there");
    assert_eq!(found.gpa(), Gpa::new(0x7777_7abc));
    let missing = |result: Result<GuestWalk, WalkError>, level| {
        let Err(WalkError::Fault(fault)) = result else { panic!("a fault was due: {result:?}") };
        // As if the entry were not present.
        assert_eq!((fault.cause, fault.level), (Cause::NotMemory, level));
        assert_eq!(fault.code, PfErrorCode::WRITE | PfErrorCode::USER);
    };
    // No slot; a slot of the other address space; one that is going away.
    let none = Memslots::new(&SlotLimits::new(1, Gfn::new(1 << 40)));
    missing(walk_slots(&none, &host, USER_WRITE), Level::L4);
    missing(walk_slots(&slots(SlotFlags::empty(), 1), &host, USER_WRITE), Level::L4);
    let mut going = slots(SlotFlags::empty(), 0);
    let slot = *going.by_id(0, 3).expect("inserted");
    going.replace(Memslot { flags: SlotFlags::INVALID, ..slot }).expect("the same slot");
    missing(walk_slots(&going, &host, USER_WRITE), Level::L4);
    // The slot ends before the last table.
    let mut short = slots(SlotFlags::empty(), 0);
    short.replace(Memslot { npages: 3, ..slot }).expect("the same slot");
    missing(walk_slots(&short, &host, USER_WRITE), Level::L1);
    // The host has taken the page of level 2's table away.
    host.gone.set(Some((HVA >> 12) + ROOT + 2));
    missing(walk_slots(&all, &host, USER_WRITE), Level::L2);
}

#[test]
fn tables_in_a_read_only_slot_are_read_and_keep_their_bits() {
    let host = host();
    let before = host.words.borrow().clone();
    let found = walk_slots(&slots(SlotFlags::READ_ONLY, 0), &host, USER_WRITE);
    let found = found.expect("the page itself is writable");
    assert_eq!((found.path.dirty, found.path.loads), (Dirtiness::Clean, 4));
    assert_eq!(*host.words.borrow(), before);
    assert!(host.dirtied.borrow().is_empty());
}

#[test]
fn a_page_whose_entry_got_a_bit_is_dirty_in_the_log() {
    let host = host();
    let mut slots = slots(SlotFlags::LOG_DIRTY, 0);
    let log: Result<DirtyLog, NoMemory> = DirtyLog::new(0..4, &LogOptions::default());
    let log = Arc::new(log.expect("memory"));
    slots.set_meta(0, 3, SlotMeta::default().with_log(Some(Arc::clone(&log)))).expect("a slot");
    // Everything accessed but level 2's entry.
    for level in [1, 3, 4] {
        *host.words.borrow_mut().get_mut(&(HVA + place(level))).expect("an entry") |= A;
    }
    walk_slots(&slots, &host, USER_READ).expect("nothing is wrong");
    assert_eq!(log.peek(0), 1 << 2);
    assert_eq!(*host.dirtied.borrow(), [Gfn::new(ROOT + 2)]);
    // A write dirties the leaf, and its table with it.
    walk_slots(&slots, &host, USER_WRITE).expect("nothing is wrong");
    assert_eq!(log.peek(0), 1 << 2 | 1 << 3);
    // Nothing left to set: nothing is dirtied.
    let _ = log.take(0, u64::MAX);
    walk_slots(&slots, &host, USER_WRITE).expect("nothing is wrong");
    assert_eq!(log.peek(0), 0);
}

// KVM rows 4.4 to 4.8.

#[test]
fn without_a_present_bit_no_other_bit_counts() {
    for (mode, present) in [
        (GuestMode::FourLevel, 1),
        (GuestMode::FiveLevel, 1),
        (GuestMode::Pae, 1),
        (GuestMode::TwoLevel, 1),
    ] {
        let machine = machine(mode);
        let mut chain = guest_support::chain::Pair::new(machine, 0x1234_5678);
        let all = if mode == GuestMode::TwoLevel { 0xffff_ffff } else { u64::MAX };
        for level in 1..=machine.first_level() {
            for upper in level + 1..=machine.first_level() {
                chain.chain.set(upper, LINK | guest_support::chain::table(upper - 1));
            }
            chain.chain.set(level, all & !present);
            let access = GuestAccess { kind: AccessKind::Read, who: Who::User, pkru: 0 };
            chain.compare(access, request(&machine, access));
            assert_eq!(chain.reached, 0);
        }
    }
    // EPT: any of bits 2:0, and bit 10 with mode-based execute.
    for mode_based_execute in [false, true] {
        let cpu = EptCpu { mode_based_execute, ..EptCpu::baseline() };
        let walker = NestedWalker::ept(Level::L4, &cpu).expect("four levels");
        let request =
            NestedRequest { operation: Operation::Read, purpose: Purpose::Final(Access::ALL) };
        for bit in 0..64 {
            let mem = Pages::new();
            mem.set(ROOT << 12, 8, 1 << bit);
            let Err(NestedError::Fault(fault)) =
                walker.walk(&mem, ROOT << 12, Gpa::new(0), request)
            else {
                panic!("nothing is mapped")
            };
            let present = bit < 3 || (mode_based_execute && bit == 10);
            let absent = fault.cause == Cause::NotPresent && fault.level == Level::L4;
            assert_eq!(absent, !present, "bit {bit}: {fault:?}");
        }
    }
}

#[test]
fn each_entry_keeps_what_the_entries_above_it_permit() {
    let mem = four_levels(0x7000 | P | W | U | NX);
    mem.set(place(4), 8, (ROOT + 1) << 12 | P | W | U);
    mem.set(place(3), 8, (ROOT + 2) << 12 | P | U);
    mem.set(place(2), 8, (ROOT + 3) << 12 | P | W);
    let found = walk(&long(), &mem, Request::new(Operation::Read, Privilege::Supervisor));
    let path = found.expect("a supervisor may read").path;
    let above: Vec<Access> = path.entries.iter().map(|entry| entry.above).collect();
    let no_write = Access::ALL.difference(Access::WRITE);
    assert_eq!(
        above,
        [Access::ALL, Access::ALL, no_write, no_write.difference(Access::USER)],
        "not counting the entry's own bits"
    );
    assert_eq!(path.access, Access::READ);
    // NX is ANDed the other way round: one entry is enough to forbid.
    assert_eq!(path.entries.len(), 4);
}

/// What synchronisation will ask of single entries is what a walk finds in them.
#[test]
fn an_entry_by_itself_means_what_a_walk_finds_in_it() {
    const SEED: u64 = 0x3ea9;
    let mut random = Random::new(SEED);
    let mut counts = [0_u64; 4];
    let base = machine(GuestMode::FourLevel);
    for case in 0..40_000 {
        let machine = GuestMachine { nxe: case % 2 == 0, gbpages: case % 4 < 2, ..base };
        let walker = walker(&machine);
        let level = 1 + random.below(4) as u8;
        let mut value = random.next_u64() & (0xfff | 0x3f << 20);
        for bit in [63, 51, 13, 59, 40] {
            value |= u64::from(random.chance(1, 8)) << bit;
        }
        value |= u64::from(random.chance(3, 4));
        let mem = four_levels(0);
        mem.set(place(level), 8, value);
        let supervisor = Request::new(Operation::Read, Privilege::Supervisor);
        let found = walk(&walker, &mem, supervisor);
        let at = Level::new(level).expect("1 to 4");
        let meaning = walker.meaning(at, value);
        let what = format!("seed {SEED:#x}, {case}: {value:#x} at {at:?}: {meaning:?}, {found:?}");
        match (meaning, found) {
            (EntryMeaning::Absent, Err(WalkError::Fault(fault))) => {
                assert_eq!((fault.cause, fault.level), (Cause::NotPresent, at), "{what}");
                counts[0] += 1;
            }
            (EntryMeaning::Rejected, Err(WalkError::Fault(fault))) => {
                assert_eq!((fault.cause, fault.level), (Cause::Reserved, at), "{what}");
                counts[1] += 1;
            }
            (EntryMeaning::Table { table, access }, Err(WalkError::Fault(fault))) => {
                // There is nothing below.
                assert_eq!(Some(fault.level), at.down(), "{what}");
                assert_eq!(table.get(), value & 0x000f_ffff_ffff_f000, "{what}");
                assert_eq!(access.contains(Access::WRITE), value & W != 0, "{what}");
                counts[2] += 1;
            }
            (EntryMeaning::Page { gfn, access, accessed, dirty }, Ok(walk)) => {
                assert_eq!(gfn, walk.path.gfn.align_down(at), "{what}");
                assert_eq!((access, dirty), (walk.path.access, walk.path.dirty), "{what}");
                assert_eq!((walk.path.level, accessed), (at, value & A != 0), "{what}");
                counts[3] += 1;
            }
            _ => panic!("{what}"),
        }
    }
    assert!(counts.iter().all(|count| *count > 1000), "{counts:?}");
    // Without accessed bits every entry counts as used.
    let cpu = EptCpu { accessed_dirty: false, ..EptCpu::baseline() };
    let ept = NestedWalker::ept(Level::L4, &cpu).expect("four levels");
    let EntryMeaning::Page { gfn, accessed, dirty, .. } = ept.meaning(Level::L1, 0x7037) else {
        panic!("a page of EPT")
    };
    assert_eq!((gfn, accessed, dirty), (Gfn::new(7), true, Dirtiness::Untracked));
}

/// Two entries that lead to the same table with other permissions are two paths (access test:
/// "effective permissions").
#[test]
fn permissions_of_one_path_do_not_reach_into_another() {
    let mem = four_levels(0x7000 | LINK);
    let other = ADDRESS + (1 << 39);
    let link = mem.get(place(4), 8).expect("an entry");
    mem.set((ROOT << 12) | (index(other, 4) * 8), 8, link & !W);
    let walker = long();
    let root = GuestRoot::Cr3(ROOT << 12);
    let open = walker.walk(&mem, &root, Gva::new(ADDRESS), USER_WRITE).expect("writable");
    assert!(open.path.access.contains(Access::WRITE));
    let closed = walker.walk(&mem, &root, Gva::new(other), USER_WRITE);
    assert_eq!(code(closed), 7);
    let read = walker.walk(&mem, &root, Gva::new(other), USER_READ).expect("readable");
    assert!(!read.path.access.contains(Access::WRITE));
    assert_eq!(read.gpa(), open.gpa());
}

#[test]
fn four_megabyte_pages_above_four_gigabytes_need_pse36() {
    let mem = Pages::new();
    // Bits 39:32 of the address in 20:13.
    mem.set(0x1000 | 0x48 << 2, 4, 0x8000_0000 | 0x0f << 13 | PS | LINK);
    let gva = Gva::new(0x1234_5678);
    let root = GuestRoot::Cr3(0x1000);
    let base = GuestMachine { max_phys_bits: 36, ..machine(GuestMode::TwoLevel) };
    let found = walker(&base).walk(&mem, &root, gva, USER_READ).expect("36 bits are there");
    assert_eq!(found.gpa(), Gpa::new(0xf_8034_5678));
    assert_eq!((found.path.level, found.path.loads), (Level::L2, 1));
    let narrow = GuestMachine { max_phys_bits: 35, ..base };
    assert_eq!(code(walker(&narrow).walk(&mem, &root, gva, USER_READ)), 0xd);
    let without = GuestMachine { pse36: false, ..base };
    assert_eq!(code(walker(&without).walk(&mem, &root, gva, USER_READ)), 0xd);
    // Without CR4.PSE it is a link like any other, here to nowhere.
    let off = GuestMachine { pse: false, ..base };
    assert_eq!(code(walker(&off).walk(&mem, &root, gva, USER_READ)), 4);
}

// KVM row 4.10 and bug B42.

#[test]
fn keys_are_forgotten_when_they_are_switched_off_and_unknown_to_nested_walks() {
    let leaf = 0x7000 | LINK | 5 << 59;
    let mem = four_levels(leaf);
    let denied = Request { pkru: 1 << 10, ..USER_READ };
    let on = walker(&GuestMachine { pke: true, ..machine(GuestMode::FourLevel) });
    assert_eq!(code(walk(&on, &mem, denied)), 0x25);
    // The same PKRU with CR4.PKE off, and again on.
    assert!(walk(&long(), &mem, denied).is_ok());
    assert_eq!(code(walk(&on, &mem, denied)), 0x25);
    // The hypervisor has keys on: its nested tables have none, whatever bits 62:59 say.
    let (cpu, controls) = registers(&GuestMachine { pke: true, ..machine(GuestMode::FourLevel) });
    let npt = NestedWalker::npt(&cpu, controls).expect("long mode");
    for operation in Operation::ALL {
        let request = NestedRequest { operation, purpose: Purpose::Final(Access::ALL) };
        assert!(npt.walk(&mem, ROOT << 12, Gpa::new(ADDRESS), request).is_ok());
    }
}

// KVM row 4.11.

#[test]
fn an_exchange_that_is_lost_starts_the_walk_over_and_finds_the_new_page() {
    let mem = four_levels(0x7000 | LINK);
    // Between the read of the leaf and its exchange the guest maps another page there. Nothing is
    // to be set in the upper entries, so the leaf's exchange is the first.
    for level in 2..=4 {
        mem.set(place(level), 8, mem.get(place(level), 8).expect("an entry") | A);
    }
    let once = Cell::new(true);
    let racing = Racing { mem: &mem, at: place(1), with: 0x9000 | LINK, once: &once };
    let root = GuestRoot::Cr3(ROOT << 12);
    let found = long().walk(&racing, &root, Gva::new(ADDRESS), USER_WRITE).expect("mapped");
    assert_eq!((found.gpa(), found.path.attempts), (Gpa::new(0x9abc), 2));
    assert_eq!(mem.get(place(1), 8), Some(0x9000 | LINK | A | D));
    assert_eq!(mem.log.borrow().len(), 8, "everything was read again");
    let found = walk(&long(), &mem, USER_WRITE).expect("nothing to set, nothing to lose");
    assert_eq!((found.path.attempts, found.path.loads), (1, 4));
}

/// Memory in which the entry `at` becomes `with` just before its first exchange.
struct Racing<'m> {
    mem: &'m Pages,
    at: u64,
    with: u64,
    once: &'m Cell<bool>,
}

impl GuestMem for Racing<'_> {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        self.mem.read(at, width)
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        if at.get() == self.at && self.once.replace(false) {
            self.mem.set(self.at, 8, self.with);
        }
        self.mem.compare_exchange(at, width, old, new)
    }
}

#[test]
fn a_fault_sets_no_bit() {
    for leaf in [0, 0x7000 | P | U, 0x7000 | LINK | 1 << 51] {
        let mem = four_levels(leaf);
        let _ = code(walk(&long(), &mem, USER_WRITE));
        assert_eq!(mem.exchanges.get(), 0, "{leaf:#x}");
    }
}

#[test]
fn an_entry_that_changed_since_is_found_out() {
    let mem = four_levels(0x7000 | LINK);
    let found = walk(&long(), &mem, USER_WRITE).expect("mapped");
    assert!(found.path.entries.iter().all(|entry| entry.is_current(&mem)));
    for level in 1..=4 {
        let at = place(level);
        let value = mem.get(at, 8).expect("an entry");
        mem.set(at, 8, value ^ W);
        let current: Vec<bool> =
            found.path.entries.iter().map(|entry| entry.is_current(&mem)).collect();
        let expected: Vec<bool> = (1..=4).rev().map(|other| other != level).collect();
        assert_eq!(current, expected);
        mem.set(at, 8, value);
    }
    mem.remove(ROOT + 3);
    assert!(!found.path.entries[3].is_current(&mem), "memory that is gone");
}

/// A memory whose page-modification log has room for so many pages.
struct Logged {
    mem: Pages,
    room: Cell<u64>,
    pages: RefCell<Vec<Gpa>>,
}

impl GuestMem for Logged {
    fn read(&self, at: Gpa, width: EntryWidth) -> Result<u64, NotMemory> {
        self.mem.read(at, width)
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        width: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        self.mem.compare_exchange(at, width, old, new)
    }

    fn log_dirty(&self, gpa: Gpa) -> Result<(), LogFull> {
        let room = self.room.get().checked_sub(1).ok_or(LogFull)?;
        self.room.set(room);
        self.pages.borrow_mut().push(gpa);
        Ok(())
    }
}

#[test]
fn a_nested_page_is_logged_before_it_becomes_dirty_and_once() {
    let mem = four_levels(0);
    for level in 2..=4 {
        mem.set(place(level), 8, (ROOT + 5 - u64::from(level)) << 12 | 7);
    }
    mem.set(place(1), 8, 0x7000 | 7 | 6 << 3);
    let (room, pages) = (Cell::new(0), RefCell::default());
    let logged = Logged { mem, room, pages };
    let walker = NestedWalker::ept(Level::L4, &EptCpu::baseline()).expect("four levels");
    let purpose = Purpose::Final(Access::ALL);
    let go = |operation| {
        let request = NestedRequest { operation, purpose };
        walker.walk(&logged, ROOT << 12, Gpa::new(ADDRESS), request)
    };
    go(Operation::Read).expect("a read dirties nothing");
    let Err(NestedError::Fault(fault)) = go(Operation::Write) else { panic!("no room") };
    assert_eq!((fault.cause, fault.report), (Cause::LogFull, NestedReport::LogFull));
    assert_eq!(logged.mem.get(place(1), 8).expect("the leaf") & 1 << 9, 0, "not dirty");
    logged.room.set(2);
    go(Operation::Write).expect("room");
    assert_eq!(logged.mem.get(place(1), 8).expect("the leaf") & 1 << 9, 1 << 9);
    go(Operation::Write).expect("dirty already");
    assert_eq!(*logged.pages.borrow(), [Gpa::new(ADDRESS & !0xfff)]);
}

// KVM rows 4.12 and 4.13.

#[test]
fn a_clean_page_is_not_writable_until_its_first_write_has_set_d() {
    let mem = four_levels(0x7000 | LINK);
    let walker = long();
    let read = walk(&walker, &mem, USER_READ).expect("readable");
    assert_eq!(read.path.dirty, Dirtiness::Clean);
    let shadow = walker.shadow_access(&read, USER_READ);
    assert_eq!(shadow, Access::ALL.difference(Access::WRITE));
    assert_eq!(mem.get(place(1), 8), Some(0x7000 | LINK | A));
    let write = walk(&walker, &mem, USER_WRITE).expect("writable");
    assert_eq!(write.path.dirty, Dirtiness::Dirty);
    assert_eq!(walker.shadow_access(&write, USER_WRITE), Access::ALL);
    assert_eq!(mem.get(place(1), 8), Some(0x7000 | LINK | A | D));
    // D is set once: from now on a read gives a writable page, and nothing is exchanged.
    mem.forget();
    let again = walk(&walker, &mem, USER_READ).expect("readable");
    assert_eq!(walker.shadow_access(&again, USER_READ), Access::ALL);
    assert_eq!(mem.exchanges.get(), 0);
}

#[test]
fn a_supervisor_write_without_wp_gets_a_page_of_the_supervisors_own() {
    for smep in [false, true] {
        for wp in [false, true] {
            for who in EVERYBODY {
                for kind in KINDS {
                    for leaf in [P, P | U, P | W, LINK, P | U | NX, LINK | D, P | U | D] {
                        let machine = GuestMachine { smep, wp, ..machine(GuestMode::FourLevel) };
                        let access = GuestAccess { kind, who, pkru: 0 };
                        let asked = request(&machine, access);
                        let mem = four_levels(leaf | 0x7000);
                        let walker = walker(&machine);
                        let Ok(found) = walk(&walker, &mem, asked) else { continue };
                        let shadow = walker.shadow_access(&found, asked);
                        let (writes, user) = (kind == AccessKind::Write, leaf & U != 0);
                        let lifted = writes && leaf & W == 0;
                        assert!(!lifted || (!wp && who != Who::User), "else it would fault");
                        let dirty = writes || leaf & D != 0;
                        let expected = [
                            (Access::READ, true),
                            (Access::WRITE, lifted || (leaf & W != 0 && dirty)),
                            (Access::USER, user && !lifted),
                            (Access::EXEC, leaf & NX == 0 && !(lifted && smep)),
                        ];
                        for (bit, set) in expected {
                            let says = shadow.contains(bit);
                            assert_eq!(says, set, "{bit:?}: {machine:?} {access:?} {leaf:#x}");
                        }
                    }
                }
            }
        }
    }
}

/// Bug B63: the guest toggles CR0.WP without an exit; the emulator's next walk obeys the new value.
#[test]
fn wp_is_that_of_the_request_and_nothing_older() {
    let mem = four_levels(0x7000 | P | U);
    let walker = long();
    let write = Request::new(Operation::Write, Privilege::Supervisor);
    for _ in 0..3 {
        assert_eq!(code(walk(&walker, &mem, write)), 3);
        let off = Request { write_protect: WriteProtect::Off, ..write };
        assert!(walk(&walker, &mem, off).is_ok());
    }
}

/// Row 4.14 and bug B87: for a guest without EFER.NXE bit 63 is reserved in its entries; our own
/// tables have NX on all the same, and may use it for what the guest never asked for.
#[test]
fn nx_is_reserved_for_the_guest_that_has_it_off_and_never_for_us() {
    let off = GuestMachine { nxe: false, ..machine(GuestMode::FourLevel) };
    let mem = four_levels(0x7000 | LINK | NX);
    assert_eq!(code(walk(&walker(&off), &mem, USER_READ)), 0xd);
    mem.set(place(1), 8, 0x7000 | LINK);
    let fetch = Request::new(Operation::Fetch, Privilege::User);
    let found = walk(&walker(&off), &mem, fetch).expect("everything is executable");
    assert!(found.path.access.contains(Access::EXEC));
    // A fault of a fetch does not say that it was one.
    mem.set(place(1), 8, 0);
    assert_eq!(code(walk(&walker(&off), &mem, fetch)), 4);
    assert_eq!(code(walk(&long(), &mem, fetch)), 0x14);
    let caps = Capabilities { nx_huge_pages: true, ..Capabilities::legacy() };
    let ours = SpteConfig::<Legacy>::new(caps).expect("NX is ours to have");
    let no_fetch = Access::ALL.difference(Access::EXEC);
    let pfn = mmu_core::addr::Pfn::new(0x200);
    let leaf = ours.leaf(&LeafSpec { access: no_fetch, ..LeafSpec::new(pfn, Level::L2) });
    assert_eq!(leaf.raw() & NX, NX);
    assert_eq!(ours.reserved_bits(leaf, Level::L2), 0);
}

// KVM row 4.15: codes seen on emulated machines that are not ours (QEMU's NPT, Bochs' EPT).

#[test]
fn codes_are_those_that_other_machines_showed() {
    let request = |operation| NestedRequest { operation, purpose: Purpose::Final(Access::ALL) };
    let ept = NestedWalker::ept(Level::L4, &EptCpu::baseline()).expect("four levels");
    let (cpu, controls) = registers(&machine(GuestMode::FourLevel));
    let npt = NestedWalker::npt(&cpu, controls).expect("long mode");
    use Operation::{Fetch, Read, Write};
    let wb = 0x7000 | 6 << 3;
    let seen_by_ept = [
        (0, Read, 0x181),
        (0, Write, 0x182),
        (0, Fetch, 0x184),
        (wb | 1, Write, 0x18a),
        (wb | 1, Fetch, 0x18c),
        (wb | 3, Fetch, 0x19c),
        (wb | 5, Write, 0x1aa),
        (wb | 4, Read, 0x1a1),
    ];
    for (leaf, operation, qualification) in seen_by_ept {
        let report = nested_report(&ept, leaf, 7, request(operation));
        let NestedReport::EptViolation(seen) = report else { panic!("{report:?}") };
        assert_eq!(seen.bits(), qualification, "{leaf:#x} {operation:?}");
    }
    for leaf in [2, 6, 1 | 2 << 3, 1 | 7 << 3, 1 | 6 << 3 | 1 << 51] {
        let report = nested_report(&ept, leaf, 7, request(Read));
        assert_eq!(report, NestedReport::EptMisconfig, "{leaf:#x}");
    }
    let seen_by_npt = [
        (0, Read, 0x1_0000_0004),
        (0, Write, 0x1_0000_0006),
        (0, Fetch, 0x1_0000_0014),
        (0x7000 | P | U, Write, 0x1_0000_0007),
        (0x7000 | LINK | NX, Fetch, 0x1_0000_0015),
        (0x7000 | P | W, Read, 0x1_0000_0005),
    ];
    for (leaf, operation, info) in seen_by_npt {
        let report = nested_report(&npt, leaf, LINK, request(operation));
        let NestedReport::Npf(seen) = report else { panic!("{report:?}") };
        assert_eq!(seen.bits(), info, "{leaf:#x} {operation:?}");
    }
    let table = NestedRequest { operation: Read, purpose: Purpose::Table };
    for (leaf, info) in [(0, 0x2_0000_0006), (0x7000 | P | U, 0x2_0000_0007)] {
        let NestedReport::Npf(seen) = nested_report(&npt, leaf, LINK, table) else {
            panic!("an NPF was due")
        };
        assert_eq!(seen.bits(), info);
    }
}

/// The report of a walk to `leaf` behind upper entries with `link` permissions.
fn nested_report(
    walker: &NestedWalker,
    leaf: u64,
    link: u64,
    request: NestedRequest,
) -> NestedReport {
    let mem = four_levels(leaf);
    for level in 2..=4 {
        mem.set(place(level), 8, (ROOT + 5 - u64::from(level)) << 12 | link);
    }
    match walker.walk(&mem, ROOT << 12, Gpa::new(ADDRESS), request) {
        Err(NestedError::Fault(fault)) => fault.report,
        other => panic!("a fault was due: {other:?}"),
    }
}

#[test]
fn nested_tables_that_no_processor_has_are_refused_by_name() {
    let five = NestedWalker::ept(Level::L5, &EptCpu::baseline());
    assert_eq!(five, Err(ModeError::NestedLevels { levels: Level::L5 }));
    let offered = EptCpu { five_levels: true, ..EptCpu::baseline() };
    let five = NestedWalker::ept(Level::L5, &offered).expect("offered");
    assert_eq!(five.mode(), PagingMode::Ept { levels: Level::L5 });
    for levels in [Level::L1, Level::L2, Level::L3] {
        let refused = NestedWalker::ept(levels, &offered);
        assert_eq!(refused, Err(ModeError::NestedLevels { levels }));
    }
    let wide = EptCpu { max_phys_bits: 53, ..offered };
    let refused = NestedWalker::ept(Level::L4, &wide);
    assert_eq!(refused, Err(ModeError::PhysBits { bits: 53 }));
    // A hypervisor of 32 bits has no NPT of ours.
    let refused = NestedWalker::npt(&GuestCpu::baseline(), GuestControls::PG);
    assert_eq!(refused, Err(ModeError::LongModeWithoutPae));
    let npt = NestedWalker::npt(&GuestCpu::baseline(), GuestControls::LONG).expect("long mode");
    assert_eq!(npt.mode(), PagingMode::Npt { levels: Level::L4 });
}

// KVM rows 4.17 and 4.61.

#[test]
fn without_paging_addresses_are_physical_and_everything_is_permitted() {
    let walker =
        GuestWalker::new(&GuestCpu::baseline(), GuestControls::empty()).expect("no tables");
    assert_eq!(walker.mode(), PagingMode::None);
    let mem = Pages::new();
    let root = GuestRoot::Cr3(0xdead_f000);
    for who in EVERYBODY {
        for kind in KINDS {
            let access = GuestAccess { kind, who, pkru: u32::MAX };
            let asked = request(&machine(GuestMode::Off), access);
            let found = walker.walk(&mem, &root, Gva::new(0x1234_5678), asked).expect("always");
            assert_eq!(found.gpa(), Gpa::new(0x1234_5678));
            assert_eq!((found.path.access, found.path.level), (Access::ALL, Level::L2));
            assert_eq!(walker.shadow_access(&found, asked), Access::ALL);
        }
    }
    assert!(mem.log.borrow().is_empty());
}

#[test]
fn the_emulators_question_is_answered_by_the_same_walk() {
    let mem = four_levels(0x7000 | P | U);
    let root = GuestRoot::Cr3(ROOT << 12);
    let gva = Gva::new(ADDRESS);
    let walker = long();
    for (asked, answer) in [
        (USER_READ, Ok(Gpa::new(0x7abc))),
        (Request::new(Operation::Fetch, Privilege::User), Ok(Gpa::new(0x7abc))),
        (Request::new(Operation::Read, Privilege::Implicit), Ok(Gpa::new(0x7abc))),
        (USER_WRITE, Err(7)),
    ] {
        let found = walker.gva_to_gpa(&mem, &root, gva, asked);
        assert_eq!(found.map_err(|error| code(Err(error))), answer);
    }
}

#[test]
fn an_address_that_is_not_canonical_is_no_page_fault() {
    let mem = four_levels(0x7000 | LINK);
    let root = GuestRoot::Cr3(ROOT << 12);
    let edges = |mode| match mode {
        GuestMode::FourLevel => [(1_u64 << 47) - 1, 1 << 47, !0 << 47, (!0 << 47) - 1],
        GuestMode::FiveLevel => [(1 << 56) - 1, 1 << 56, !0 << 56, (!0 << 56) - 1],
        _ => [0xffff_ffff, 1 << 32, 0, u64::MAX],
    };
    for mode in [GuestMode::FourLevel, GuestMode::FiveLevel, GuestMode::TwoLevel] {
        let walker = walker(&machine(mode));
        for (address, canonical) in edges(mode).into_iter().zip([true, false, true, false]) {
            let gva = Gva::new(address);
            let refused =
                walker.walk(&mem, &root, gva, USER_READ) == Err(WalkError::NotCanonical { gva });
            assert_eq!(refused, !canonical, "{mode:?} {address:#x}");
        }
    }
    assert!(WalkError::WrongRoot.to_string().contains("mode"));
}

#[test]
fn errors_name_their_values() {
    let mem = four_levels(0);
    let error = walk(&long(), &mem, USER_WRITE).expect_err("not present");
    let text = error.to_string();
    assert!(text.contains("#PF 0x6") && text.contains("0x123456789abc"), "{text}");
    assert!(text.contains("NotPresent") && text.contains("4K"), "{text}");
    let gva = Gva::new(0x8000_1234_5678_9abc);
    for error in [WalkError::NotCanonical { gva }, WalkError::Contended { gva }] {
        assert!(error.to_string().contains("0x800012345678"), "{error}");
    }
    let request =
        NestedRequest { operation: Operation::Write, purpose: Purpose::Final(Access::ALL) };
    let ept = NestedWalker::ept(Level::L4, &EptCpu::baseline()).expect("four levels");
    let gpa = Gpa::new(0xabc_d000);
    let error = ept.walk(&Pages::new(), 0x1000, gpa, request).expect_err("no table");
    let text = error.to_string();
    assert!(text.contains("NotMemory") && text.contains("0xabcd000"), "{text}");
    assert!(NestedError::Contended { gpa }.to_string().contains("0xabcd000"));
    let NestedError::Fault(fault) = error else { panic!("{error}") };
    let nested = WalkError::Nested { gva, fault }.to_string();
    assert!(nested.contains("0xabcd000") && nested.contains("0x800012345678"), "{nested}");
    for (error, part) in [
        (PointerError::Reserved { index: 2, value: 0x8001 }, "PDPTE 2 is 0x8001"),
        (PointerError::NotMemory { at: gpa }, "0xabcd000"),
        (PointerError::Nested(fault), "0xabcd000"),
        (PointerError::Contended, "nested"),
        (PointerError::NotPae, "PAE"),
    ] {
        assert!(error.to_string().contains(part), "{error}");
    }
    assert!(NotMemory { at: gpa }.to_string().contains("0xabcd000"));
    assert!(LogFull.to_string().contains("full"));
}
