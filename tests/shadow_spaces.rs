//! Shadow tables in two address spaces over the same memory, and shadow pages with more than one
//! way to them (KVM row 4.60; bugs B09, B12).

mod common;
mod shadow_support;

use std::sync::{Arc, Mutex};

use common::{Core, Modelled, Peek, TestHost, five};
use mmu_core::addr::{Gfn, Gpa, Gva, Level};
use mmu_core::fault::FaultOutcome;
use mmu_core::slot::{SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{Capabilities, Ept, Legacy, SpteConfig};
use mmu_core::traits::ResolveError;
use mmu_core::vm::{Actor, VmCore};
use mmu_model::{Access, AccessKind, Caches, SoftCpu, Translation, Walker};
use shadow_mmu::guest::{
    EptCpu, GuestControls, GuestCpu, GuestRoot, GuestWalker, NestedRequest, NestedWalker,
    Privilege, Purpose, Request,
};
use shadow_mmu::{PageRole, ReclaimPolicy, RoleFlags, ShadowMmu, ShadowStats, ShadowVcpu};
use shadow_support::memory::{Backing, Memory};
use shadow_support::rig::{Lock, Machine, Rig, operation, slot};
use shadow_support::{A, D, P, PS, U, W};

const ALL: u64 = P | W | U | A | D;
const PAGES: u64 = 1024;

/// Two vCPUs of one guest, one in each address space, on tables of their own: top tables 1 and 5,
/// then 2, 3, 4 and 6, 7, 8. Both spaces have the same memory.
struct Duo {
    memory: Memory,
    backing: Arc<Backing>,
    lock: Lock<Legacy>,
    vcpus: [ShadowVcpu<Legacy, TestHost>; 2],
    cores: [Arc<Mutex<Core>>; 2],
    roots: [u64; 2],
    walker: Walker,
    guest: GuestWalker,
    vm: Arc<VmCore<TestHost>>,
    notifier: Actor<TestHost>,
    _slots: SlotWriter,
}

const TOPS: [u64; 2] = [1, 5];

impl Duo {
    fn new(huge: bool) -> Self {
        let caps = Capabilities::legacy();
        let config = SpteConfig::<Legacy>::new(caps).unwrap();
        let limits = SlotLimits::new(2, config.max_gfn_exclusive());
        let host = TestHost::new(1024);
        host.record(false);
        let backing = Arc::new(Backing::new(2));
        (0..2).for_each(|block| backing.set(block, block + 1, huge));
        let pages = Arc::clone(&backing);
        host.set_resolver(Arc::new(move |_, gfn, _| {
            pages.page(gfn.get()).ok_or(ResolveError::NoMemory)
        }));
        let (vm, mut slots) = VmCore::new(host, 4, limits, std::thread::yield_now).unwrap();
        let mut notifier = vm.actor().unwrap();
        for as_id in 0..2 {
            let request = SlotRequest { as_id, ..slot(PAGES, SlotFlags::empty()) };
            let _ = vm.set_slot(&mut slots, &mut notifier, &request, |_, _| {}).unwrap();
        }
        let (mmu, writer) = ShadowMmu::create(Arc::clone(&vm), config, 100);
        let format = Legacy::model(&caps);
        let core = || vm.host().add_core(SoftCpu::new(&format, 0, Caches::unlimited()));
        let cores = [core(), core()];
        let flushed = cores.clone();
        vm.host().before_flush(Some(Arc::new(move |_| {
            flushed.iter().for_each(|core| core.lock().unwrap().cpu.flush_all());
        })));
        let memory = Memory::new(PAGES, PAGES);
        for top in TOPS {
            for table in top..top + 3 {
                memory.set(table << 12, 8, (table + 1) << 12 | ALL);
            }
        }
        let controls =
            GuestControls::PG | GuestControls::PAE | GuestControls::LME | GuestControls::NXE;
        let vcpu = || ShadowVcpu::new(&mmu).unwrap();
        let mut duo = Self {
            memory,
            backing,
            lock: Lock(Mutex::new(writer)),
            vcpus: [vcpu(), vcpu()],
            cores,
            roots: [0; 2],
            walker: Walker::new(&format),
            guest: GuestWalker::new(&GuestCpu::baseline(), controls).unwrap(),
            vm,
            notifier,
            _slots: slots,
        };
        (0..2).for_each(|space| duo.load(space));
        duo
    }

    /// The vCPU of `space` loads CR3.
    fn load(&mut self, space: usize) {
        let flags = RoleFlags::NX | RoleFlags::WP;
        let role = PageRole::new(Level::L4, flags).in_space(space as u16);
        let (vcpu, top) = (&mut self.vcpus[space], Gfn::new(TOPS[space]));
        let root = vcpu.load_root(&self.lock, &self.guest, &self.memory, top, role).unwrap();
        self.roots[space] = root.get();
        let mut core = self.cores[space].lock().unwrap();
        core.cpu.set_root(root.get());
        core.cpu.flush_all();
    }

    /// The lowest table of a space maps its page `page` to `gfn`.
    fn map(&self, space: usize, page: u64, gfn: u64) {
        self.memory.set((TOPS[space] + 3) << 12 | page << 3, 8, gfn << 12 | ALL);
    }

    /// The vCPU of `space` accesses its page `page`; the host page that it reaches, or `None` if a
    /// write is to be emulated.
    fn access(&mut self, space: usize, page: u64, kind: AccessKind) -> Option<u64> {
        let address = page << 12;
        for _ in 0..8 {
            let vm = Arc::clone(&self.vm);
            let access = Access::user(kind);
            let reached = self.cores[space].lock().unwrap().cpu.access(vm.host(), address, access);
            if let Ok(pa) = reached {
                return Some(pa >> 12);
            }
            let root = GuestRoot::Cr3(TOPS[space] << 12);
            let request = Request::new(operation(kind), Privilege::User);
            let walk = self.guest.walk(&self.memory, &root, Gva::new(address), request).unwrap();
            let (vcpu, guest) = (&mut self.vcpus[space], &self.guest);
            match vcpu.fault(&self.lock, guest, &self.memory, &walk, request).unwrap() {
                FaultOutcome::Fixed | FaultOutcome::Spurious | FaultOutcome::Retry => {}
                FaultOutcome::WriteProtected => return None,
                other => panic!("{other:?}"),
            }
        }
        panic!("eight faults, and no end");
    }

    fn look(&self, space: usize, page: u64) -> Option<Translation> {
        let (peek, access) = (Peek(self.vm.host()), Access::user(AccessKind::Read));
        self.walker.translate(&peek, self.roots[space], page << 12, access).ok()
    }

    fn host(&self, gfn: u64) -> Option<u64> {
        self.backing.pfn(gfn)
    }

    fn stats(&self) -> ShadowStats {
        *self.lock.0.lock().unwrap().stats()
    }

    fn finish(self) {
        let Self { vm, vcpus, lock, mut notifier, .. } = self;
        let mut writer = lock.0.into_inner().unwrap();
        writer.check(&mut notifier).unwrap();
        let lock = Lock(Mutex::new(writer));
        for mut vcpu in vcpus {
            vcpu.drop_roots(&lock);
        }
        let mut writer = lock.0.into_inner().unwrap();
        let _ = writer.shrink(&mut notifier, u32::MAX);
        assert_eq!(writer.live_pages(), 0);
        drop((writer, notifier));
        assert_eq!(vm.pool().frames_in_use(), 0);
    }
}

use AccessKind::{Read, Write};

/// Row 4.60: a table that gets a shadow in one space loses write access in the other.
#[test]
fn a_table_is_protected_from_every_space() {
    let mut duo = Duo::new(false);
    duo.map(0, 0, 600);
    // Space 1 has the tables of space 0 mapped, writable, before they have a shadow.
    for (page, table) in [(0, 2), (1, 3), (2, 4)] {
        duo.map(1, page, table);
        assert_eq!(duo.access(1, page, Write), duo.host(table));
    }
    assert_eq!(duo.access(0, 0, Read), duo.host(600));
    for page in [0, 1] {
        assert_eq!(duo.access(1, page, Write), None, "page {page}");
        assert!(duo.access(1, page, Read).is_some());
    }
    // What it writes through the emulator is followed at once.
    duo.map(0, 0, 700);
    let (lock, notifier) = (&duo.lock, &mut duo.notifier);
    lock.0.lock().unwrap().guest_wrote(notifier, Gpa::new(4 << 12), 8);
    assert_eq!(duo.access(0, 0, Read), duo.host(700));
    duo.finish();
}

/// Bug B09: the lowest table of one space, written in the other, goes out of sync there too.
#[test]
fn a_table_goes_out_of_sync_whichever_space_writes_to_it() {
    let mut duo = Duo::new(false);
    duo.map(0, 0, 600);
    duo.map(1, 2, 4);
    assert_eq!(duo.access(0, 0, Read), duo.host(600));
    assert_eq!(duo.access(1, 2, Write), duo.host(4));
    assert_eq!(duo.stats().unsyncs, 1);
    duo.map(0, 0, 700);
    duo.load(0);
    assert_eq!(duo.access(0, 0, Read), duo.host(700), "the flush was not followed");
    // In sync again: protected again.
    assert!(!duo.look(1, 2).unwrap().writable());
    assert_eq!(duo.access(1, 2, Write), duo.host(4));
    assert_eq!(duo.stats().unsyncs, 2);
    duo.finish();
}

/// Bug B09 with huge pages: a table in one space keeps them away in the other.
#[test]
fn no_huge_page_of_another_space_lies_over_a_table() {
    let mut duo = Duo::new(true);
    duo.map(0, 0, 600);
    // Space 1 maps the first 2 MiB, with all tables, at 2 MiB.
    duo.memory.set(7 << 12 | 8, 8, PS | ALL);
    // Its own tables have shadows, so this is small.
    assert_eq!(duo.access(1, 512 + 100, Write), duo.host(100));
    assert_eq!(duo.look(1, 512 + 100).unwrap().level, 1);
    // And the second 2 MiB at 4 MiB, without tables yet.
    duo.memory.set(7 << 12 | 16, 8, 512 << 12 | PS | ALL);
    duo.load(1);
    assert_eq!(duo.access(1, 1024 + 100, Write), duo.host(612));
    assert_eq!(duo.look(1, 1024 + 100).unwrap().level, 2);
    assert_eq!(duo.access(0, 0, Read), duo.host(600));
    assert_eq!(duo.look(1, 1024 + 100).unwrap().level, 2, "data is in nobody's way");
    // Space 0 begins to use a table there, which space 1 may write to at once.
    duo.memory.set(620 << 12, 8, 600 << 12 | ALL);
    duo.memory.set(3 << 12 | 16, 8, 620 << 12 | ALL);
    assert_eq!(duo.access(0, 1024, Read), duo.host(600));
    assert!(duo.look(1, 1024 + 100).is_none(), "the huge page is gone, with its neighbours");
    assert_eq!(duo.access(1, 1024 + 100, Write), duo.host(612));
    assert_eq!(duo.look(1, 1024 + 100).unwrap().level, 1);
    // What is written there is followed when it is flushed.
    assert_eq!(duo.access(1, 1024 + 108, Write), duo.host(620));
    duo.memory.set(620 << 12, 8, 700 << 12 | ALL);
    duo.load(0);
    assert_eq!(duo.access(0, 1024, Read), duo.host(700));
    duo.finish();
}

/// Bug B12: a nested table with another way to it, here from another root, outlives the first.
#[test]
fn a_table_that_another_root_uses_outlives_the_one_above_it() {
    const EPT: u64 = 7 | 1 << 8 | 1 << 9;
    let caps = five(Capabilities::ept());
    let backing = |gfn| {
        let pfn = mmu_core::addr::Pfn::new(common::DATA + gfn);
        Some(mmu_core::traits::HostPage { pfn, writable: true, level: Level::L1 })
    };
    let mut rig =
        Rig::<Ept>::new(Machine::default(), 1, caps, 100, ReclaimPolicy::Fifo, PAGES, backing);
    let memory = Memory::new(PAGES, 8);
    // Table 1 has five levels; what it leads to is a tree of four, that L1 uses by itself too.
    for table in 1..5 {
        memory.set(table << 12, 8, (table + 1) << 12 | EPT);
    }
    memory.set(5 << 12, 8, 600 << 12 | EPT | 6 << 3);
    let cpu = EptCpu { five_levels: true, ..EptCpu::baseline() };
    let walker = |level| NestedWalker::ept(level, &cpu).unwrap();
    let (long, short) = (walker(Level::L5), walker(Level::L4));
    let mut other = ShadowVcpu::new(&rig.mmu).unwrap();
    let request = NestedRequest {
        operation: operation(Read),
        purpose: Purpose::Final(mmu_core::access::Access::ALL),
    };
    let above = rig.vcpu.load_nested_root(&rig.lock, &long, &memory, 1 << 12, 0).unwrap();
    let walk = long.walk(&memory, 1 << 12, Gpa::new(0), request).unwrap();
    let done = rig.vcpu.nested_fault(&rig.lock, &long, &memory, &walk, request);
    assert_eq!(done, Ok(FaultOutcome::Fixed));
    let below = other.load_nested_root(&rig.lock, &short, &memory, 2 << 12, 0).unwrap();
    let walk = short.walk(&memory, 2 << 12, Gpa::new(0), request).unwrap();
    let done = other.nested_fault(&rig.lock, &short, &memory, &walk, request);
    assert!(matches!(done, Ok(FaultOutcome::Fixed | FaultOutcome::Spurious)), "{done:?}");
    let found = |rig: &Rig<Ept>, root: mmu_core::addr::Hpa| {
        let peek = Peek(rig.mmu.vm().host());
        rig.walker.translate(&peek, root.get(), 0, Access::user(Read)).ok()
    };
    let pa = (common::DATA + 600) << 12;
    assert_eq!(found(&rig, above).map(|found| found.pa), Some(pa));
    assert_eq!(found(&rig, below).map(|found| found.pa), Some(pa));
    let made = rig.stats().pages_made;
    assert_eq!(made, 6, "a root each, and the four levels are one");
    // The one of five levels is given up.
    let (lock, notifier) = (&rig.lock, &mut rig.notifier);
    assert!(lock.0.lock().unwrap().unprotect(notifier, Gfn::new(1)));
    assert!(!rig.vcpu.root_is_current());
    let again = other.load_nested_root(&rig.lock, &short, &memory, 2 << 12, 0).unwrap();
    assert!(other.root_is_current() && again == below, "the other's is good");
    assert_eq!(found(&rig, below).map(|found| found.pa), Some(pa), "it was used by another");
    // With the other's last root it goes: its own page is found by nobody.
    other.drop_roots(&rig.lock);
    drop(other);
    rig.finish();
}
