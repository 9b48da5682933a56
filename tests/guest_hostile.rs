//! Guest tables that no honest guest makes, in every mode: a walk does bounded work, ends, reads
//! nothing but aligned entries, changes nothing but accessed and dirty bits of entries that it has
//! read, and never panics.
//!
//! Each shape says how the tables of one mode are to look; [`Case`] walks them with every operation
//! and counts. Shapes of tables under attack while they are walked flip an entry before each read
//! in turn, and lose exchanges.

mod guest_support;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use guest_support::pages::Pages;
use guest_support::{A, D, LINK, NX, PS, machine, nested_walker, request, root, walker};
use mmu_core::access::Access;
use mmu_core::addr::{Gpa, Gva};
use mmu_model::{
    AccessKind, Ept, Format, GuestAccess, GuestMachine, GuestMode, GuestRoots, Npt, Random, Who,
};
use shadow_mmu::guest::{
    Cause, EntryWidth, Exchange, GuestMem, GuestRoot, GuestWalker, MAX_ATTEMPTS, NestedError,
    NestedRequest, NestedTables, NestedWalker, NotMemory, Operation, Purpose, Request, WalkError,
    WalkPath,
};

/// First table; the ones below follow page by page.
const ROOT: u64 = 0x100;
const HOLE: u64 = 0x7_0000;

/// A way of paging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Guest(GuestMode),
    Nested(Format),
}

fn modes() -> Vec<Mode> {
    let ept = Ept { max_phys_bits: 40, ..Ept::new() };
    vec![
        Mode::Guest(GuestMode::TwoLevel),
        Mode::Guest(GuestMode::Pae),
        Mode::Guest(GuestMode::FourLevel),
        Mode::Guest(GuestMode::FiveLevel),
        Mode::Nested(Format::Ept(ept)),
        Mode::Nested(Format::Ept(Ept { levels: 5, accessed_dirty: false, ..ept })),
        Mode::Nested(Format::Npt(Npt { max_phys_bits: 40, ..Npt::new() })),
    ]
}

/// One mode's tables, empty at first.
struct Case {
    mode: Mode,
    mem: Pages,
    levels: u8,
    bytes: u8,
    address: u64,
    root_page: u64,
    /// Attempts of the walk that took most.
    most: u32,
}

impl Case {
    fn new(mode: Mode) -> Self {
        let (levels, bytes, address) = match mode {
            Mode::Guest(GuestMode::TwoLevel) => (2, 4, 0x1234_5678),
            Mode::Guest(GuestMode::Pae) => (2, 8, 0x1234_5678),
            Mode::Guest(GuestMode::FiveLevel) => (5, 8, 0x0012_3456_789a_bcde),
            Mode::Guest(_) => (4, 8, 0x1234_5678_9abc),
            Mode::Nested(format) => (guest_support::levels_of(&format), 8, 0x1234_5678_9abc),
        };
        let root_page = ROOT + u64::from(levels);
        Self { mode, mem: Pages::new(), levels, bytes, address, root_page, most: 0 }
    }

    fn page(level: u8) -> u64 {
        ROOT + u64::from(level)
    }

    fn index(&self, level: u8) -> u64 {
        let bits = if self.bytes == 4 { 10 } else { 9 };
        self.address >> (12 + bits * (u32::from(level) - 1)) & ((1 << bits) - 1)
    }

    fn place(&self, page: u64, level: u8) -> u64 {
        (page << 12) + self.index(level) * u64::from(self.bytes)
    }

    /// Permissions of an entry that forbids nothing; as a leaf of EPT it is write-back.
    fn open(&self, leaf: bool) -> u64 {
        match self.mode {
            Mode::Nested(Format::Ept(_)) if leaf => 7 | 6 << 3,
            Mode::Nested(Format::Ept(_)) => 7,
            _ => LINK,
        }
    }

    fn set(&self, page: u64, level: u8, value: u64) {
        let value = if self.bytes == 4 { value & 0xffff_ffff } else { value };
        self.mem.set(self.place(page, level), self.bytes, value);
    }

    /// Links to the tables' own pages from the top down to `lowest`, and a page behind level 1.
    fn link(&self) {
        for level in 2..=self.levels {
            self.set(Self::page(level), level, Self::page(level - 1) << 12 | self.open(false));
        }
        self.set(Self::page(1), 1, 0x77 << 12 | self.open(true));
    }

    fn bits(&self) -> u64 {
        match self.mode {
            Mode::Nested(Format::Ept(_)) => 3 << 8,
            _ => A | D,
        }
    }

    fn guest(&self) -> Option<(GuestMachine, GuestWalker, GuestRoot)> {
        let Mode::Guest(mode) = self.mode else { return None };
        let machine = GuestMachine { max_phys_bits: 40, ..machine(mode) };
        let walker = walker(&machine);
        let cr3 = self.root_page << 12;
        let roots = GuestRoots { cr3, pdptes: [cr3 & 0xff_ffff_f000 | 1; 4] };
        Some((machine, walker, root(&walker, roots)))
    }

    /// One walk; `None` when it was given up because entries kept changing.
    fn walk(&self, operation: Operation) -> Option<Result<WalkPath, Cause>> {
        match (self.guest(), self.mode) {
            (Some((_, walker, root)), _) => {
                let request = Request::new(operation, shadow_mmu::guest::Privilege::User);
                match walker.walk(&self.mem, &root, Gva::new(self.address), request) {
                    Ok(walk) => Some(Ok(walk.path)),
                    Err(WalkError::Fault(fault)) => Some(Err(fault.cause)),
                    Err(WalkError::Contended { .. }) => None,
                    Err(error) => panic!("{:?}: {error}", self.mode),
                }
            }
            (None, Mode::Nested(format)) => {
                let purpose = Purpose::Final(Access::ALL);
                let request = NestedRequest { operation, purpose };
                let walker: NestedWalker = nested_walker(&format, false);
                let root = self.root_page << 12;
                match walker.walk(&self.mem, root, Gpa::new(self.address), request) {
                    Ok(walk) => Some(Ok(walk.path)),
                    Err(NestedError::Fault(fault)) => Some(Err(fault.cause)),
                    Err(NestedError::Contended { .. }) => None,
                }
            }
            _ => unreachable!("a mode is the guest's or nested"),
        }
    }

    /// Every operation, with the bounds of invariant I19.
    fn check(&mut self) -> Vec<Option<Result<WalkPath, Cause>>> {
        let mut ends = Vec::new();
        for operation in Operation::ALL {
            self.mem.forget();
            let end = self.walk(operation);
            // INVARIANT[I19]: a read for each level, in each attempt.
            let attempts = match &end {
                Some(Ok(path)) => path.attempts,
                _ => MAX_ATTEMPTS,
            };
            let levels = usize::from(self.levels);
            let reads = self.mem.log.borrow().len();
            let what = format!("{:?} {operation:?}: {end:x?}", self.mode);
            assert!(reads <= attempts as usize * levels, "{reads} reads: {what}");
            assert!(self.mem.exchanges.get() <= u64::from(attempts) * u64::from(self.levels));
            if let Some(Ok(path)) = &end {
                assert!(path.loads as usize <= levels && path.entries.len() <= levels, "{what}");
                self.most = self.most.max(path.attempts);
            }
            for (at, bytes, old) in &*self.mem.journal.borrow() {
                let new = self.mem.get(*at, *bytes).expect("changed, so it is there");
                assert!(self.mem.log.borrow().contains(at), "changed, not read: {what}");
                let others = self.mem.before_read.borrow().is_some();
                assert!(others || (old ^ new) & !self.bits() == 0, "{old:#x} to {new:#x}: {what}");
            }
            ends.push(end);
        }
        ends
    }
}

type Shape = (&'static str, fn(&mut Case));

/// Every table is the page of the table above.
fn shared(case: &mut Case, pages: u64) {
    // Levels take turns on `pages` pages.
    let page = |level: u8| ROOT + 0x20 + u64::from(level) % pages;
    for level in 1..=case.levels {
        let below = page(level - 1 + if level == 1 { pages as u8 } else { 0 });
        let value = below << 12 | case.open(false);
        case.set(page(level), level, value);
    }
    case.root_page = page(case.levels);
}

const SHAPES: [Shape; 19] = [
    ("one page is every table, each entry leads to itself", |case| {
        let value = (ROOT + 0x40) << 12 | case.open(false);
        for index in 0..4096 / u64::from(case.bytes) {
            case.mem.set(((ROOT + 0x40) << 12) + index * u64::from(case.bytes), case.bytes, value);
        }
        case.root_page = ROOT + 0x40;
    }),
    ("the same page at every level", |case| shared(case, 1)),
    ("two pages in turn, a cycle", |case| shared(case, 2)),
    ("three pages in turn", |case| shared(case, 3)),
    ("the root maps itself as the last table", |case| {
        case.link();
        case.set(ROOT + u64::from(2_u8), 2, case.root_page << 12 | case.open(false));
        case.set(case.root_page, 1, case.root_page << 12 | case.open(true));
    }),
    ("the root is a hole", |case| case.root_page = HOLE),
    ("a middle table is a hole", |case| {
        case.link();
        case.set(Case::page(2), 2, HOLE << 12 | case.open(false));
    }),
    ("the last table is a hole", |case| {
        case.link();
        case.mem.remove(Case::page(1));
    }),
    ("the root is beyond the address width", |case| {
        case.link();
        case.root_page |= 1 << 38;
    }),
    ("tables beyond the address width", |case| {
        case.link();
        case.set(Case::page(2), 2, 1 << 45 | Case::page(1) << 12 | case.open(false));
    }),
    ("tables in read-only memory", |case| {
        case.link();
        (1..=case.levels).for_each(|level| case.mem.protect(Case::page(level)));
    }),
    ("one table in read-only memory", |case| {
        case.link();
        case.mem.protect(Case::page(2));
    }),
    ("all ones", |case| {
        for level in 1..=case.levels {
            case.set(Case::page(level), level, u64::MAX);
        }
    }),
    ("all ones but for reserved bits", |case| {
        for level in 1..=case.levels {
            let below = if level == 1 { 0x77 } else { Case::page(level - 1) };
            let flags = 0x07f0_0000_0000_0e18 | case.open(level == 1) | case.bits();
            case.set(Case::page(level), level, below << 12 | flags & !(1 << 8));
        }
    }),
    ("large bits everywhere", |case| {
        for level in 1..=case.levels {
            case.set(Case::page(level), level, PS | case.open(true));
        }
    }),
    ("a large page over its own tables", |case| {
        case.link();
        let page = ROOT >> 10 << 22;
        case.set(Case::page(2), 2, page | PS | case.open(true));
    }),
    ("a large page that is not aligned", |case| {
        case.link();
        case.set(Case::page(2), 2, 0x20_1000 | 1 << 13 | PS | case.open(true));
    }),
    ("every entry an alias of one page", |case| {
        case.link();
        for index in 0..4096 / u64::from(case.bytes) {
            let at = (Case::page(1) << 12) + index * u64::from(case.bytes);
            case.mem.set(at, case.bytes, 0x77 << 12 | case.open(true));
        }
    }),
    ("no-execute and nothing else", |case| {
        for level in 1..=case.levels {
            case.set(Case::page(level), level, NX);
        }
    }),
];

#[test]
fn every_shape_in_every_mode_takes_bounded_work() {
    let mut walks = 0;
    for mode in modes() {
        for (name, build) in SHAPES {
            let mut case = Case::new(mode);
            build(&mut case);
            let ends = case.check();
            walks += ends.len();
            // Nobody else touches the tables: a walk that meets its own bits starts over a few
            // times at most.
            assert!(ends.iter().all(Option::is_some), "{mode:?}, {name}: given up");
            assert!(case.most <= 3, "{mode:?}, {name}: {} attempts", case.most);
        }
    }
    eprintln!("HOSTILE {walks} walks of {} shapes in {} modes", SHAPES.len(), modes().len());
}

#[test]
fn hostile_shapes_end_as_they_should() {
    let four = Mode::Guest(GuestMode::FourLevel);
    let expected = [
        ("one page is every table, each entry leads to itself", None),
        ("the root is a hole", Some(Cause::NotMemory)),
        ("a middle table is a hole", Some(Cause::NotMemory)),
        ("the last table is a hole", Some(Cause::NotMemory)),
        ("the root is beyond the address width", Some(Cause::NotMemory)),
        ("tables beyond the address width", Some(Cause::Reserved)),
        ("tables in read-only memory", None),
        ("all ones", Some(Cause::Reserved)),
        ("large bits everywhere", Some(Cause::Reserved)),
        ("a large page over its own tables", None),
        ("a large page that is not aligned", Some(Cause::Reserved)),
        ("no-execute and nothing else", Some(Cause::NotPresent)),
    ];
    for (name, cause) in expected {
        let build = SHAPES.iter().find(|shape| shape.0 == name).expect("a shape of that name").1;
        let mut case = Case::new(four);
        build(&mut case);
        for end in case.check() {
            assert_eq!(end.expect("nobody interferes").err(), cause, "{name}");
        }
    }
}

/// Another CPU writes an entry before each read in turn (the double fetch): the walk is that of the
/// old value or of the new one, never of a mixture, and it ends.
#[test]
fn an_entry_that_flips_before_any_read_is_seen_whole() {
    let mut walks = 0;
    for mode in modes() {
        for changed in 1..=6 {
            for at_read in 0..6 {
                for flip in [1, 2, 4, PS, NX, 1 << 51, 0x1000, u64::MAX] {
                    let mut case = Case::new(mode);
                    case.link();
                    if changed > case.levels {
                        continue;
                    }
                    let at = case.place(Case::page(changed), changed);
                    let bytes = case.bytes;
                    let hook = move |mem: &Pages, number: usize, _: u64| {
                        if number == at_read {
                            let value = mem.get(at, bytes).expect("an entry");
                            let flip = if bytes == 4 { flip & 0xffff_ffff } else { flip };
                            mem.set(at, bytes, value ^ flip);
                        }
                    };
                    let quiet = ends_without(mode, |_| {});
                    let flipped = ends_without(mode, |case| {
                        let value = case.mem.get(at, bytes).expect("an entry");
                        case.set(Case::page(changed), changed, value ^ flip);
                    });
                    *case.mem.before_read.borrow_mut() = Some(Box::new(hook));
                    for ((end, quiet), flipped) in case.check().iter().zip(quiet).zip(flipped) {
                        walks += 1;
                        // After the first walk the other value may be there already, or not.
                        let end = end.as_ref().expect("one flip is not contention");
                        let end = end.as_ref().map(|path| path.gfn).map_err(|cause| *cause);
                        assert!(end == quiet || end == flipped, "{mode:?} {end:?}");
                    }
                }
            }
        }
    }
    eprintln!("HOSTILE {walks} walks with an entry flipped");
}

/// Frame or cause of each operation on linked tables after `change`.
fn ends_without(mode: Mode, change: impl Fn(&Case)) -> Vec<Result<mmu_core::addr::Gfn, Cause>> {
    let mut case = Case::new(mode);
    case.link();
    change(&case);
    let ends = case.check();
    ends.into_iter().map(|end| end.expect("nobody interferes").map(|path| path.gfn)).collect()
}

#[test]
fn exchanges_may_be_lost_any_number_of_times() {
    for mode in modes() {
        for lost in 0..=2 * u64::from(MAX_ATTEMPTS) {
            let mut case = Case::new(mode);
            case.link();
            case.mem.lose.set(lost);
            case.mem.forget();
            let end = case.walk(Operation::Write);
            let no_bits = matches!(mode, Mode::Nested(Format::Ept(ept)) if !ept.accessed_dirty);
            let survives = no_bits || lost < u64::from(MAX_ATTEMPTS);
            assert_eq!(end.is_some(), survives, "{mode:?}, {lost} lost");
            let attempts = if no_bits { 1 } else { (lost + 1).min(u64::from(MAX_ATTEMPTS)) };
            let reads = case.mem.log.borrow().len() as u64;
            assert_eq!(reads, attempts * u64::from(case.levels), "{mode:?}, {lost} lost");
            // Once left alone it succeeds: nothing was remembered.
            case.mem.lose.set(0);
            case.check().into_iter().for_each(|end| assert!(end.expect("quiet").is_ok()));
        }
    }
}

#[test]
fn another_cpu_that_changes_entries_for_ever_is_given_up_on() {
    for mode in modes() {
        let case = Case::new(mode);
        case.link();
        let leaf = case.place(Case::page(1), 1);
        let (bytes, bits) = (case.bytes, case.bits());
        // Every read of the leaf is followed by a change of a bit that nobody looks at: by the time
        // of the exchange it is another value.
        let reads = Rc::new(RefCell::new(BTreeMap::new()));
        let seen = Rc::clone(&reads);
        *case.mem.before_read.borrow_mut() = Some(Box::new(move |mem: &Pages, _, at| {
            *seen.borrow_mut().entry(at).or_insert(0) += 1;
            if at == leaf {
                mem.lose.set(1);
            }
            let value = mem.get(leaf, bytes).expect("the leaf");
            mem.set(leaf, bytes, value & !bits ^ 1 << 11);
        }));
        let end = case.walk(Operation::Write);
        if matches!(mode, Mode::Nested(Format::Ept(ept)) if !ept.accessed_dirty) {
            assert!(end.is_some(), "nothing to exchange");
            continue;
        }
        assert!(end.is_none(), "{mode:?}: {end:x?}");
        let most = reads.borrow().values().copied().max().unwrap_or(0);
        assert_eq!(most, MAX_ATTEMPTS, "{mode:?}");
    }
}

/// Four tables in atomic words, and how often a walk has set a bit in the last one's entry.
struct Shared {
    words: Vec<AtomicU64>,
    leaf: usize,
    dirtied: AtomicU64,
}

impl GuestMem for Shared {
    fn read(&self, at: Gpa, _: EntryWidth) -> Result<u64, NotMemory> {
        let word = self.words.get((at.get() / 8) as usize).ok_or(NotMemory { at })?;
        Ok(word.load(SeqCst))
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        _: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        let index = (at.get() / 8) as usize;
        let word = self.words.get(index).ok_or(NotMemory { at })?;
        if word.compare_exchange(old, new, SeqCst, SeqCst).is_err() {
            return Ok(Exchange::Lost);
        }
        if index == self.leaf {
            assert_eq!(new & !old, if old & A == 0 { A | D } else { D });
            self.dirtied.fetch_add(1, SeqCst);
        }
        Ok(Exchange::Done)
    }
}

/// On real threads: one maps one page, another, nothing, in turn; one writes through the tables.
/// Every dirty bit that a walk has set is in the entry that is taken out, none anywhere else, and a
/// walk that succeeds leads to one of the two pages.
#[test]
fn no_dirty_bit_is_lost_to_another_cpu() {
    const CHANGES: u64 = 100_000;
    let address = 0x1234_5678_9abc_u64;
    let index = |level: u32| address >> (12 + 9 * (level - 1)) & 511;
    let place = |level: u32| (u64::from(4 - level) * 512 + index(level)) as usize;
    let words: Vec<AtomicU64> = (0..4 * 512).map(|_| AtomicU64::new(0)).collect();
    for level in 2..=4 {
        words[place(level)].store(u64::from(5 - level) << 12 | LINK | A, SeqCst);
    }
    let shared = Shared { words, leaf: place(1), dirtied: AtomicU64::new(0) };
    let done = AtomicBool::new(false);
    let walker = walker(&machine(GuestMode::FourLevel));
    let (reached, taken_out) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let write = Request::new(Operation::Write, shadow_mmu::guest::Privilege::User);
            let mut reached = 0_u64;
            while !done.load(SeqCst) {
                match walker.walk(&shared, &GuestRoot::Cr3(0), Gva::new(address), write) {
                    Ok(walk) => {
                        assert!([0x77, 0x99].contains(&walk.path.gfn.get()), "{walk:x?}");
                        reached += 1;
                    }
                    Err(WalkError::Fault(fault)) => assert_eq!(fault.cause, Cause::NotPresent),
                    Err(error) => assert!(matches!(error, WalkError::Contended { .. })),
                }
            }
            reached
        });
        let mut taken_out = 0;
        let leaf = &shared.words[shared.leaf];
        for change in 0.. {
            let dirtied = shared.dirtied.load(SeqCst);
            if change >= CHANGES && (dirtied > 100 || change > 1000 * CHANGES) {
                break;
            }
            let new = [0x77 << 12 | LINK, 0x99 << 12 | LINK, 0][change as usize % 3];
            let old = leaf.swap(new, SeqCst);
            taken_out += u64::from(old & D != 0);
        }
        done.store(true, SeqCst);
        (writer.join().expect("the writer ends"), taken_out)
    });
    let left = u64::from(shared.words[shared.leaf].load(SeqCst) & D != 0);
    let dirtied = shared.dirtied.load(SeqCst);
    assert_eq!(taken_out + left, dirtied);
    assert!(reached >= dirtied && dirtied > 0, "{reached} {dirtied}");
    eprintln!("HOSTILE threads: {reached} writes, {dirtied} set a dirty bit, none was lost");
}

/// Pages of noise as tables: entries lead anywhere, into each other, out of memory, into the nested
/// tables. In one dimension and in two.
#[test]
fn noise_for_tables_takes_bounded_work_in_two_dimensions() {
    const SEED: u64 = 0x5eed_0020;
    const CASES: u64 = 20_000;
    let mut random = Random::new(SEED);
    let (mut reached, mut nested_faults, mut faults) = (0, 0, 0);
    let formats = guest_support::nested_formats(4);
    let mem = Pages::new();
    (0..16).for_each(|page| mem.add(page));
    for case in 0..CASES {
        for _ in 0..if case == 0 { 16 * 512 } else { 256 } {
            let at = random.below(16 * 512) * 8;
            mem.set(at, 8, noise(&mut random));
        }
        mem.forget();
        mem.lose.set(random.below(16) / 14);
        let format = formats[random.below(4) as usize];
        let nested = nested_walker(&format, true);
        let mode = [GuestMode::FourLevel, GuestMode::FiveLevel, GuestMode::TwoLevel]
            [random.below(3) as usize];
        let machine = GuestMachine { max_phys_bits: 48, ..machine(mode) };
        let guest = walker(&machine);
        let tables = NestedTables::new(&nested, random.below(16) << 12);
        let root = GuestRoot::Cr3(random.below(16) << 12);
        let kind =
            [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][random.below(3) as usize];
        let asked = request(&machine, GuestAccess { kind, who: Who::User, pkru: 0 });
        let gva = Gva::new(random.next_u64() & 0x7fff_ffff);
        match guest.walk_nested(&mem, &tables, &root, gva, asked) {
            Ok(walk) => {
                reached += 1;
                assert!(walk.loads() <= 35, "seed {SEED:#x}, case {case}: {walk:x?}");
            }
            Err(WalkError::Nested { .. }) => nested_faults += 1,
            Err(_) => faults += 1,
        }
        // At most eight attempts above, each of whose translations is tried eight times.
        let most = MAX_ATTEMPTS * (5 * (4 * MAX_ATTEMPTS + 1)) + 4 * MAX_ATTEMPTS;
        let reads = mem.log.borrow().len();
        assert!(reads <= most as usize, "seed {SEED:#x}, case {case}: {reads} reads");
    }
    eprintln!(
        "HOSTILE noise, seed {SEED:#x}: {reached} reached, {nested_faults} nested faults, {faults} \
         others"
    );
    assert!(reached > 100 && nested_faults > 100 && faults > 100, "seed {SEED:#x}");
}

/// Mostly sound entries into the sixteen pages.
fn noise(random: &mut Random) -> u64 {
    let value = random.below(16) << 12 | 7 | 6 << 3 | 1 << 10;
    match random.below(40) {
        0 => random.next_u64(),
        1 => 0,
        2 => value | PS,
        3 => value & !(1 << random.below(3)),
        4 => value | 1 << random.below(64),
        // Links of EPT have no memory type.
        _ if random.chance(1, 2) => value & !(6 << 3),
        _ => value,
    }
}
