//! Work that shadow paging does at a stretch: others have a turn with the writer, with sections and
//! with lists before long, whatever the guest's tables look like.
//!
//! A guest with many tables, or with pages of 1 GiB, on a machine with many frames. How much is
//! done at a stretch is counted, not measured.

mod common;
mod shadow_support;

use std::cell::RefCell;

use common::DATA;
use mmu_core::addr::{Gfn, GfnRange, Gva, Level, Pfn};
use mmu_core::fault::FaultOutcome;
use mmu_core::spte::{Capabilities, Legacy};
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, AgeSink, Effort, HostPage, MASK_WORDS};
use mmu_model::AccessKind;
use shadow_mmu::guest::{
    GuestControls, GuestCpu, GuestRoot, GuestWalker, Operation, Privilege, Request,
};
use shadow_mmu::rmap::{RmapGuard, RmapKey};
use shadow_mmu::{PageRole, ReclaimPolicy, RoleFlags, ShadowStats, ShadowWriter, WriterLock};
use shadow_support::memory::Memory;
use shadow_support::rig::{Lock, Machine, Rig};
use shadow_support::{A, D, P, PS, U, W};

const ALL: u64 = P | W | U | A | D;
const M2: u64 = 1 << 21;
const G1: u64 = 1 << 30;
/// Pages of 1 GiB.
const G1_PAGES: u64 = G1 >> 12;

/// A guest of four levels. Its top table is in frame 0, and leads to the tables in frames 1 and 2.
struct Guest {
    rig: Rig<Legacy>,
    memory: Memory,
    walker: GuestWalker,
    role: PageRole,
}

impl Guest {
    /// With `pages` of memory, tables in the first of them; the host has pages of `level` for it.
    fn new(pages: u64, tables: u64, level: Level, policy: ReclaimPolicy) -> Self {
        let page = move |gfn| HostPage { pfn: Pfn::new(DATA + gfn), writable: true, level };
        let machine = Machine { frames: 8192, ..Machine::default() };
        let caps = Capabilities::legacy();
        let rig = Rig::new(machine, 1, caps, u32::MAX, policy, pages, move |gfn| Some(page(gfn)));
        let controls = GuestControls::LONG;
        let mut guest = Self {
            rig,
            memory: Memory::new(pages, tables),
            walker: GuestWalker::new(&GuestCpu::baseline(), controls).unwrap(),
            role: PageRole::new(Level::L4, RoleFlags::NX | RoleFlags::WP),
        };
        guest.put(0, 0, 1 << 12 | ALL);
        guest.put(1, 0, 2 << 12 | ALL);
        guest.load();
        guest
    }

    fn put(&self, table: u64, index: u64, entry: u64) {
        self.memory.set(table << 12 | index << 3, 8, entry);
    }

    fn load(&mut self) {
        let Self { rig, memory, walker, role } = self;
        let root = rig.vcpu.load_root(&rig.lock, walker, memory, Gfn::new(0), *role).unwrap();
        rig.set_register(root);
    }

    /// One fault; the address is mapped after it.
    #[track_caller]
    fn fault(&mut self, gva: u64, operation: Operation) {
        let Self { rig, memory, walker, .. } = self;
        let request = Request::new(operation, Privilege::User);
        let walk = walker.walk(memory, &GuestRoot::Cr3(0), Gva::new(gva), request).unwrap();
        let outcome = rig.vcpu.fault(&rig.lock, walker, memory, &walk, request);
        assert_eq!(outcome, Ok(FaultOutcome::Fixed), "{gva:#x}");
    }

    /// Is it mapped? The processor that asks sets no A.
    fn is_mapped(&self, gva: u64) -> bool {
        self.rig.shadow(gva, mmu_model::Access::user(AccessKind::Read)).is_some()
    }

    /// The processor reads an address, and sets A in all that leads to it.
    fn touch(&self, gva: u64) {
        let read = mmu_model::Access::user(AccessKind::Read);
        let host = self.rig.mmu.vm().host();
        assert!(self.rig.walker.translate(host, self.rig.register, gva, read).is_ok(), "{gva:#x}");
    }
}

/// Lowest tables that [`out_of_sync`] makes, from frame 3 on; the first is linked at address 0, and
/// so on by 2 MiB.
const TABLES: u64 = 200;
/// Pages that follow their tables in one turn, at most: sixteen times protecting or following, of
/// sixteen pages.
const TURN: u64 = 8 * 16;

/// A guest whose lowest tables are all out of sync, and say something else by now.
fn out_of_sync() -> Guest {
    let window = 3 + TABLES;
    let mut guest = Guest::new(1024, window + 1, Level::L1, ReclaimPolicy::Fifo);
    for number in 0..TABLES {
        guest.put(2, number, (3 + number) << 12 | ALL);
        guest.put(3 + number, 0, 600 << 12 | ALL);
        guest.put(window, number, (3 + number) << 12 | ALL);
    }
    guest.put(2, TABLES, window << 12 | ALL);
    for number in 0..TABLES {
        guest.fault(number * M2, Operation::Read);
        // The table itself becomes writable.
        guest.fault(TABLES * M2 + (number << 12), Operation::Write);
        guest.put(3 + number, 0, 601 << 12 | ALL);
    }
    assert_eq!(guest.rig.stats().unsyncs, TABLES);
    guest
}

/// The embedder's mutex, which notes what was done each time that it was held.
struct Turns<'a, B> {
    lock: &'a Lock<Legacy>,
    stats: RefCell<Vec<ShadowStats>>,
    /// Done by somebody else before each turn.
    between: RefCell<B>,
}

impl<B: FnMut(usize, &mut ShadowWriter<Legacy, common::TestHost>)>
    WriterLock<Legacy, common::TestHost> for Turns<'_, B>
{
    fn with<R>(&self, work: impl FnOnce(&mut ShadowWriter<Legacy, common::TestHost>) -> R) -> R {
        let mut writer = self.lock.0.lock().unwrap();
        let turn = self.stats.borrow().len();
        (self.between.borrow_mut())(turn, &mut writer);
        let done = work(&mut writer);
        self.stats.borrow_mut().push(*writer.stats());
        done
    }
}

/// How the guest makes its root follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    Load,
    All,
}

/// Flush with a lock that counts turns; pages synchronised in each.
fn turns(
    guest: &mut Guest,
    flush: Flush,
    between: impl FnMut(usize, &mut ShadowWriter<Legacy, common::TestHost>),
) -> Vec<u64> {
    let Guest { rig, memory, walker, role } = guest;
    let before = rig.stats().syncs;
    let stats = RefCell::default();
    let lock = Turns { lock: &rig.lock, stats, between: RefCell::new(between) };
    match flush {
        Flush::Load => {
            let _ = rig.vcpu.load_root(&lock, walker, memory, Gfn::new(0), *role).unwrap();
        }
        Flush::All => rig.vcpu.guest_flushed(&lock, walker, memory),
    }
    let after: Vec<u64> = lock.stats.into_inner().iter().map(|stats| stats.syncs).collect();
    let from = [before].into_iter().chain(after.iter().copied());
    after.iter().zip(from).map(|(after, before)| after - before).collect()
}

/// KVM row 4.35: a guest with many tables out of sync does not keep the writer from others while
/// they follow.
#[test]
fn a_synchronisation_gives_the_writer_up_in_between() {
    for flush in [Flush::Load, Flush::All] {
        let mut guest = out_of_sync();
        assert!((0..TABLES).all(|number| guest.is_mapped(number * M2)), "stale until the flush");
        let turns = turns(&mut guest, flush, |_, _| {});
        assert!(turns.len() > 1 && turns.iter().all(|done| *done <= TURN), "{flush:?}: {turns:?}");
        assert_eq!(turns.iter().sum::<u64>(), TABLES);
        let stale = (0..TABLES).find(|number| guest.is_mapped(number * M2));
        assert_eq!(stale, None, "{flush:?}: not all follow their tables");
        guest.rig.finish();
    }
}

/// What others do between two turns is seen: a root that goes meanwhile leads nowhere.
#[test]
fn a_root_that_goes_during_its_synchronisation_leads_nowhere() {
    for flush in [Flush::Load, Flush::All] {
        let mut guest = out_of_sync();
        let vm = std::sync::Arc::clone(guest.rig.mmu.vm());
        let mut other = vm.actor().unwrap();
        let turns = turns(&mut guest, flush, |turn, writer| {
            if turn == 1 {
                writer.invalidate_all(&mut other);
                while writer.zap_obsolete(&mut other) {}
            }
        });
        drop(other);
        assert_eq!(turns.iter().sum::<u64>(), TURN, "{flush:?}: {turns:?}");
        assert!(!guest.rig.vcpu.root_is_current(), "{flush:?}");
        assert!((0..TABLES).all(|number| !guest.is_mapped(number * M2)));
        guest.load();
        guest.fault(0, Operation::Read);
        guest.rig.finish();
    }
}

/// A guest with pages of 1 GiB that the host has in small pages: a table of ours for each 2 MiB.
fn many_pages(policy: ReclaimPolicy) -> Guest {
    const HUGE: u64 = 10;
    let mut guest = Guest::new((HUGE + 1) * G1_PAGES, 3, Level::L1, policy);
    (0..HUGE).for_each(|number| guest.put(1, number, ((number + 1) * G1) | PS | ALL));
    (0..HUGE * 512).for_each(|block| guest.fault(block * M2, Operation::Read));
    // Root, level 3, one at level 2 for each page.
    assert_eq!(u64::from(guest.rig.lock.0.lock().unwrap().live_pages()), 2 + HUGE + HUGE * 512);
    guest
}

/// KVM row 4.50: pages go a few at a time, each time with a flush and a section of its own.
#[test]
fn pages_are_reclaimed_a_few_at_a_time() {
    const SLICE: usize = 16;
    for policy in [ReclaimPolicy::Fifo, ReclaimPolicy::Accessed] {
        let mut guest = many_pages(policy);
        let host = guest.rig.mmu.vm().host();
        host.record(true);
        let gone = guest.rig.lock.0.lock().unwrap().shrink(&mut guest.rig.notifier, 100);
        host.record(false);
        assert!((100..100 + SLICE as u32).contains(&gone), "{policy:?}: {gone}");
        let batches = host.take_batches();
        let most = batches.iter().map(|batch| batch.tables.len()).max();
        assert!(most <= Some(SLICE), "{policy:?}: {most:?} in one section");
        let all: usize = batches.iter().map(|batch| batch.tables.len()).sum();
        assert_eq!(all, gone as usize, "{policy:?}");
        guest.rig.finish();
    }
}

/// KVM rows 4.49, 4.50: where all pages are in use, reclaim looks at some, four times, and then
/// goes by age.
#[test]
fn reclaim_looks_at_a_thousand_pages_in_a_round() {
    const LOOKS: u64 = 1024;
    let mut guest = many_pages(ReclaimPolicy::Accessed);
    let pages = u64::from(guest.rig.lock.0.lock().unwrap().live_pages());
    assert!(pages / 4 > LOOKS, "a quarter is more than that");
    (0..10 * 512).for_each(|block| guest.touch(block * M2));
    let gone = guest.rig.lock.0.lock().unwrap().shrink(&mut guest.rig.notifier, 1);
    assert!(gone > 0);
    let looks = guest.rig.stats().second_chances;
    assert!((1..=4 * LOOKS).contains(&looks), "{looks} looks");
    guest.rig.finish();
}

/// Lets a list go as soon as it is told that something is unknown.
struct LetGo<'a> {
    held: Option<RmapGuard<'a>>,
    young: Vec<Gfn>,
    unknown: Vec<GfnRange>,
}

impl AgeSink for LetGo<'_> {
    fn table(&mut self, _: Gfn, _: &[u64; MASK_WORDS], _: &[u64; MASK_WORDS]) {
        panic!("nothing is mapped small");
    }

    fn huge(&mut self, base: Gfn, _: Level, young: bool) {
        assert!(young, "{base} was read");
        self.young.push(base);
    }

    fn unknown(&mut self, range: GfnRange) {
        self.unknown.push(range);
        self.held = None;
    }
}

/// KVM row 5.10: that the leaf of 1 GiB could not be read in one block says nothing about the next,
/// and what it says once is said of each block.
#[test]
fn a_huge_leaf_that_was_held_is_asked_again() {
    let mut guest = Guest::new(2 * G1_PAGES, 3, Level::L3, ReclaimPolicy::Fifo);
    guest.put(1, 1, G1 | PS | ALL);
    guest.fault(G1, Operation::Read);
    guest.touch(G1);
    let range = GfnRange::from_len(Gfn::new(G1_PAGES), 4 * 512);
    let key = RmapKey { space: 0, level: Level::L3, gfn: range.start };
    let mmu = std::sync::Arc::clone(&guest.rig.mmu);
    let held = mmu.rmaps().lock(key);
    assert!(held.is_some(), "a leaf of 1 GiB");
    let mut sink = LetGo { held, young: Vec::new(), unknown: Vec::new() };
    let request = AgeRequest::new(range, AgeMode::Clear).with_effort(Effort::Fast);
    let report = mmu.age(&mut guest.rig.notifier, request, &mut sink);
    assert_eq!(sink.unknown, [GfnRange::from_len(range.start, 512)]);
    let rest = [1, 2, 3].map(|block| range.start.saturating_add(block * 512));
    assert_eq!(sink.young, rest);
    assert_eq!((report.entries, report.young, report.unknown), (1, 3 * 512, 512));
    drop(sink);
    guest.rig.finish();
}
