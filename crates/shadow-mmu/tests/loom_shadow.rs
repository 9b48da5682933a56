//! Models of the whole shadow MMU: an ager beside everything that the writer does to what it looks
//! at, every interleaving. Runs under `--cfg loom` only, where tables have two entries.
//!
//! Two writers beside one another need no model: whatever changes a table borrows the
//! [`ShadowWriter`] mutably, so there is one at a time by type. What is left are the pairs of an
//! ager, who has only the bit locks of lists, with each of the writer's operations: a fault that
//! adds an entry to a list or widens one, an unmapping that removes one, a page that is zapped,
//! reclaimed or given up, a page that is synchronised, one that is protected, and another ager.
//!
//! Sections are there by their contract; they have exhaustive models of their own. When the two
//! have ended: an access that the processor noted was reported by one of the two or still stands
//! in the entry, exactly once; no table was looked at after its frame had gone back; books and
//! tables agree; teardown leaves nothing.
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "a test stops when surprised")]

use core::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use loom::thread;
use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Gpa, Gva, Hva, Level, PAGE_SIZE, Pfn};
use mmu_core::fault::FaultOutcome;
use mmu_core::flush::FlushBatch;
use mmu_core::frame::{Arena, FrameMeta, PageTable, PhysMap};
use mmu_core::slot::{Memslot, SlotFlags, SlotLimits, SlotRequest};
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Capabilities, Legacy, Spte, SpteConfig};
use mmu_core::stats::Counter;
use mmu_core::sync::{contract, relax};
use mmu_core::traits::{
    AgeMode, AgeRange, AgeReport, AgeRequest, CountOnly, HostPage, PfnResolver, ResolveError,
    TlbFlush, Trace,
};
use mmu_core::vm::{Actor, VmCore};
use shadow_mmu::guest::{
    EntryWidth, Exchange, GuestControls, GuestCpu, GuestMem, GuestRoot, GuestWalker, NotMemory,
    Operation, Privilege, Request, WriteProtect,
};
use shadow_mmu::{PageRole, ShadowMmu, ShadowVcpu, ShadowWriter, WriterLock};

type Mmu = ShadowMmu<Legacy, ModelHost>;
type Writer = ShadowWriter<Legacy, ModelHost>;
type Vcpu = ShadowVcpu<Legacy, ModelHost>;

/// The page that models are about, at linear addresses 0 and 4096 by the guest's tables.
const PAGE: Gfn = Gfn::new(1);
/// The guest's tables: PAE's pointers, and one of each level below.
const POINTERS: u64 = 4;
const UPPER: u64 = 2;
const LOWER: u64 = 3;
/// Entries: present, writable, a user's, accessed, dirty.
const ALL: u64 = 0x67;
const WRITABLE: u64 = 1 << 1;
const DIRTY: u64 = 1 << 6;
/// First host frame of the guest's memory.
const MEMORY: u64 = 0x100;
const SLOT_PAGES: u64 = 8;

/// Run every interleaving of `body` and report how many there were.
fn explore(name: &str, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 100_000;
    let executions = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&executions);
    contract::set(true);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        body();
    });
    println!("MODEL {name} executions={} bound=none", executions.load(Ordering::Relaxed));
}

/// The embedder. Nothing of it is modelled: it is asked under operations that are.
struct ModelHost {
    arena: Arena,
    /// Bit `n`: frame `n` came back from the MMU, and somebody else has it.
    others: AtomicU64,
}

// SAFETY: every clause is the arena's, to which every call goes.
unsafe impl PhysMap for ModelHost {
    fn provide(&self) -> Option<Pfn> {
        self.arena.provide()
    }

    fn reclaim(&self, frame: Pfn) {
        self.arena.reclaim(frame);
    }

    fn table(&self, frame: Pfn) -> NonNull<PageTable> {
        let others = self.others.load(Ordering::Relaxed) >> frame.get() & 1;
        assert_eq!(others, 0, "{frame:?} is looked at and is somebody else's (R16)");
        self.arena.table(frame)
    }

    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta> {
        self.arena.meta(frame)
    }
}

impl TlbFlush for ModelHost {
    type Ticket = ();

    fn request(&self, _: &FlushBatch<'_>) {}

    fn wait(&self, (): ()) {}
}

impl Trace for ModelHost {}

impl PfnResolver for ModelHost {
    fn resolve(&self, _: &Memslot, gfn: Gfn, _: Access) -> Result<HostPage, ResolveError> {
        Ok(HostPage { pfn: Pfn::new(MEMORY + gfn.get()), writable: true, level: Level::L1 })
    }
}

/// The guest's memory, as far as its tables go: two entries each. One thread uses it.
#[derive(Default)]
struct Memory([[AtomicU64; 2]; 8]);

impl Memory {
    fn word(&self, at: Gpa) -> Option<&AtomicU64> {
        let gfn = usize::try_from(at.get() / PAGE_SIZE).ok()?;
        self.0.get(gfn)?.get(usize::try_from(at.get() % PAGE_SIZE / 8).ok()?)
    }

    fn set(&self, gfn: u64, index: u64, entry: u64) {
        let at = Gpa::new(gfn * PAGE_SIZE + index * 8);
        self.word(at).unwrap().store(entry, Ordering::Relaxed);
    }
}

impl GuestMem for Memory {
    fn read(&self, at: Gpa, _: EntryWidth) -> Result<u64, NotMemory> {
        if at.get() >= 8 * PAGE_SIZE {
            return Err(NotMemory { at });
        }
        // Entries that no model uses are 0.
        Ok(self.word(at).map_or(0, |word| word.load(Ordering::Relaxed)))
    }

    fn compare_exchange(
        &self,
        at: Gpa,
        _: EntryWidth,
        old: u64,
        new: u64,
    ) -> Result<Exchange, NotMemory> {
        let word = self.word(at).ok_or(NotMemory { at })?;
        let done = word.compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed);
        Ok(if done.is_ok() { Exchange::Done } else { Exchange::Lost })
    }
}

/// The embedder's mutex: one thread of a model uses the writer.
struct Lock(Mutex<Writer>);

impl WriterLock<Legacy, ModelHost> for Lock {
    fn with<R>(&self, work: impl FnOnce(&mut Writer) -> R) -> R {
        work(&mut self.0.lock().unwrap())
    }
}

/// Do the processor's entries have accessed bits, or are accesses tracked by permissions?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bits {
    Hardware,
    Tracked,
}

/// A PAE guest on tables of three levels, one vCPU, and an ager.
struct World {
    mmu: Arc<Mmu>,
    lock: Lock,
    vcpu: Vcpu,
    memory: Memory,
    guest: GuestWalker,
    /// The pointers that the guest has loaded, and our table for them.
    pointers: GuestRoot,
    root: Pfn,
    /// Frames that went to somebody else.
    gone: Vec<Pfn>,
}

impl World {
    fn new(bits: Bits) -> (Self, Actor<ModelHost>) {
        // PAE's entries always have accessed bits.
        let caps = match bits {
            Bits::Hardware => Capabilities::pae(),
            Bits::Tracked => Capabilities { accessed_dirty: false, ..Capabilities::legacy() },
        };
        let config = SpteConfig::<Legacy>::new(caps).unwrap();
        let arena = Arena::with_capacity(12, Pfn::new(1)).unwrap();
        let host = ModelHost { arena, others: AtomicU64::new(0) };
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let (vm, mut slots) = VmCore::new(host, 2, limits, relax).unwrap();
        let mut ager = vm.actor().unwrap();
        let request = SlotRequest {
            as_id: 0,
            id: 0,
            base: Gpa::new(0),
            bytes: SLOT_PAGES * PAGE_SIZE,
            hva: Hva::new(MEMORY * PAGE_SIZE),
            flags: SlotFlags::empty(),
        };
        let _ = vm.set_slot(&mut slots, &mut ager, &request, |_, _| {}).unwrap();
        let (mmu, writer) = ShadowMmu::create(vm, config, 8);
        let mut vcpu = ShadowVcpu::new(&mmu).unwrap();
        let memory = Memory::default();
        memory.set(POINTERS, 0, UPPER << 12 | 1);
        memory.set(UPPER, 0, LOWER << 12 | ALL);
        memory.set(LOWER, 0, PAGE.get() << 12 | ALL);
        memory.set(LOWER, 1, PAGE.get() << 12 | ALL);
        let controls = GuestControls::PG | GuestControls::PAE;
        let cpu = GuestCpu::baseline();
        let guest = GuestWalker::new(&cpu, controls).unwrap();
        let lock = Lock(Mutex::new(writer));
        let role = PageRole::of_guest(&cpu, controls, WriteProtect::On).unwrap();
        let pointers = GuestRoot::Pae(guest.load_pointers(&memory, POINTERS * PAGE_SIZE).unwrap());
        let root = vcpu.load_guest_root(&lock, &guest, &memory, &pointers, role).unwrap();
        // Frames for every fault of a model: from here on the pool is left alone.
        vcpu.actor().top_up(6).unwrap();
        let root = Pfn::new(root.get() / PAGE_SIZE);
        (Self { mmu, lock, vcpu, memory, guest, pointers, root, gone: Vec::new() }, ager)
    }

    /// The guest accesses linear address 0 or 4096.
    fn fault(&mut self, gva: u64, operation: Operation) -> FaultOutcome {
        let request = Request::new(operation, Privilege::User);
        let walk = self.guest.walk(&self.memory, &self.pointers, Gva::new(gva), request).unwrap();
        let Self { vcpu, lock, guest, memory, .. } = self;
        vcpu.fault(lock, guest, memory, &walk, request).unwrap()
    }

    fn map(&mut self, gva: u64, operation: Operation) {
        assert_eq!(self.fault(gva, operation), FaultOutcome::Fixed);
    }

    /// Somebody else gets the frames that are free now, those that just came back first.
    fn give_away(&mut self) {
        let (vm, actor) = (self.mmu.vm(), self.vcpu.actor());
        while let Some(frame) = actor.take_frame() {
            self.gone.push(frame);
        }
        vm.pool().poll();
        // Less is as well.
        let _ = actor.top_up(1);
        while let Some(frame) = actor.take_frame() {
            self.gone.push(frame);
        }
        let gone = self.gone.iter().map(|frame| 1 << frame.get()).sum();
        vm.host().others.store(gone, Ordering::Relaxed);
    }

    /// The leaves for the page that models are about, when nothing runs.
    fn leaves(&self) -> Vec<Spte> {
        let mut leaves = self.all_leaves();
        leaves.retain(|leaf| leaf.pfn().get() == MEMORY + PAGE.get());
        leaves
    }

    fn all_leaves(&self) -> Vec<Spte> {
        let pool = self.mmu.vm().pool();
        let mut found = Vec::new();
        let mut open = vec![(self.root, self.mmu.config().levels())];
        while let Some((frame, level)) = open.pop() {
            for spte in pool.owned_table(frame).entries().iter().map(SpteCell::load) {
                if spte.is_table(level) {
                    open.push((spte.pfn(), level.below()));
                } else if spte.is_leaf(level) {
                    found.push(spte);
                }
            }
        }
        found
    }

    /// Accesses that entries hold.
    fn accessed(&self) -> u64 {
        let config = self.mmu.config();
        self.all_leaves().iter().map(|leaf| u64::from(config.is_accessed(*leaf))).sum()
    }

    fn writable(&self) -> bool {
        let config = self.mmu.config();
        self.leaves().iter().any(|leaf| config.is_mmu_writable(*leaf))
    }

    /// Books and tables agree; then everything goes, and nothing is left.
    fn finish(mut self, ager: Actor<ModelHost>) {
        let (lock, vcpu) = (&self.lock, &mut self.vcpu);
        self.mmu.vm().host().others.store(0, Ordering::Relaxed);
        self.gone.drain(..).for_each(|frame| vcpu.actor().put_frame(frame));
        let count = lock.with(|writer| writer.check(vcpu.actor()));
        let stats = self.mmu.vm().stats();
        assert_eq!(count.unwrap().leaves[0], stats.get(Counter::Pages4K), "leaves (I24)");
        assert_eq!(stats.get(Counter::FlushOwed), stats.get(Counter::FlushPaid), "debts");
        vcpu.drop_roots(lock);
        let left = lock.with(|writer| {
            let _ = writer.shrink(vcpu.actor(), u32::MAX);
            writer.live_pages()
        });
        assert_eq!((left, stats.get(Counter::Tables)), (0, 0), "pages left");
        let vm = Arc::clone(self.mmu.vm());
        drop((self, ager));
        vm.pool().poll();
        assert_eq!(vm.pool().poll(), 0, "no section is open, so nothing waits");
        assert_eq!(vm.pool().frames_in_use(), 0, "frames lost");
    }
}

/// Test and clear the accessed bits of the page.
fn clear(mmu: &Mmu, actor: &mut Actor<ModelHost>) -> AgeReport {
    mmu.age(actor, AgeRequest::new(GfnRange::from_len(PAGE, 1), AgeMode::Clear), &mut CountOnly)
}

/// The same for all pages, the guest's tables among them.
fn clear_all(mmu: &Mmu, actor: &mut Actor<ModelHost>) -> AgeReport {
    let all = GfnRange::from_len(Gfn::new(0), SLOT_PAGES);
    mmu.age(actor, AgeRequest::new(all, AgeMode::Clear), &mut CountOnly)
}

/// An ager beside `operation`, on what `prepare` made. `judge` gets what the operation gave, and
/// what the ager found.
fn race<R: 'static>(
    name: &str,
    bits: Bits,
    prepare: fn(&mut World),
    operation: fn(&mut World) -> R,
    judge: fn(&World, R, AgeReport),
) {
    race_of(name, bits, clear, prepare, operation, judge);
}

/// The same with an ager of another kind.
fn race_of<R: 'static>(
    name: &str,
    bits: Bits,
    age: fn(&Mmu, &mut Actor<ModelHost>) -> AgeReport,
    prepare: fn(&mut World),
    operation: fn(&mut World) -> R,
    judge: fn(&World, R, AgeReport),
) {
    explore(name, move || {
        let (mut world, mut ager) = World::new(bits);
        prepare(&mut world);
        let mmu = Arc::clone(&world.mmu);
        let other = thread::spawn(move || {
            let report = age(&mmu, &mut ager);
            (ager, report)
        });
        let done = operation(&mut world);
        let (ager, report) = other.join().unwrap();
        judge(&world, done, report);
        world.finish(ager);
    });
}

/// The page is mapped at linear address 0, and was accessed.
fn mapped(world: &mut World) {
    world.map(0, Operation::Read);
}

/// And nobody accessed it since it was aged.
fn old(world: &mut World) {
    mapped(world);
    assert_eq!(clear(&world.mmu, world.vcpu.actor()).young, 1);
}

/// Accesses that the ager reported and took; what it saw and did not get is another's to report.
fn taken(report: AgeReport) -> u64 {
    report.young - report.lost
}

/// The one access is in an entry, or was reported.
fn once(world: &World, report: AgeReport) {
    told(1, world, report);
}

/// So many accesses are in entries, or were reported.
fn told(accesses: u64, world: &World, report: AgeReport) {
    let told = taken(report) + world.accessed();
    assert_eq!(told, accesses, "an access is lost, or told twice (I21)");
}

#[test]
fn age_against_a_fault_that_adds() {
    for (name, bits) in [
        ("shadow::age_against_first_entry", Bits::Hardware),
        ("shadow::age_against_first_tracked_entry", Bits::Tracked),
    ] {
        race(
            name,
            bits,
            |_| (),
            |world| world.fault(0, Operation::Read),
            |world, done, report| {
                assert_eq!((done, world.leaves().len()), (FaultOutcome::Fixed, 1));
                once(world, report);
            },
        );
    }
    let second = |world: &mut World| world.fault(PAGE_SIZE, Operation::Read);
    race("shadow::age_against_second_entry", Bits::Hardware, old, second, |world, done, report| {
        assert_eq!((done, world.leaves().len()), (FaultOutcome::Fixed, 2));
        once(world, report);
    });
}

/// The guest's page is clean: a write finds an entry that permits reads.
#[test]
fn age_against_a_fault_that_widens() {
    for (name, bits) in [
        ("shadow::age_against_widened_entry", Bits::Hardware),
        ("shadow::age_against_widened_tracked_entry", Bits::Tracked),
    ] {
        let clean = |world: &mut World| {
            world.memory.set(LOWER, 0, PAGE.get() << 12 | ALL & !DIRTY);
            mapped(world);
            assert!(!world.writable());
        };
        race(
            name,
            bits,
            clean,
            |world| world.fault(0, Operation::Write),
            |world, done, report| {
                assert_eq!((done, world.writable()), (FaultOutcome::Fixed, true));
                // The access before is told, and that of the fault with it or after it.
                let told = taken(report) + world.accessed();
                assert!((1..=2).contains(&told), "an access is lost (I21)");
            },
        );
    }
}

#[test]
fn age_against_an_unmap() {
    for (name, bits) in [
        ("shadow::age_against_unmap", Bits::Hardware),
        ("shadow::age_against_unmap_of_tracked", Bits::Tracked),
    ] {
        let unmap = |world: &mut World| {
            let (mmu, lock, actor) = (&world.mmu, &world.lock, world.vcpu.actor());
            let vm = Arc::clone(mmu.vm());
            let range = GfnRange::from_len(PAGE, 1);
            let invalidation = vm.notify().begin(actor.participant(), range);
            mmu.unmap_in(actor, lock, &invalidation, range)
        };
        race(name, bits, mapped, unmap, |world, zapped, report| {
            assert_eq!((zapped.leaves, world.leaves().len()), (1, 0));
            assert_eq!(taken(report) + zapped.accessed, 1, "an access is lost, or told twice");
        });
    }
}

/// The page's frame goes back at once; an ager that found an entry in it is through by then.
#[test]
fn age_against_a_zap_of_the_page() {
    let zap = |world: &mut World| {
        let (lock, actor) = (&world.lock, world.vcpu.actor());
        assert!(lock.with(|writer| writer.unprotect(actor, Gfn::new(LOWER))));
        world.give_away();
    };
    race("shadow::age_against_zap_page", Bits::Hardware, mapped, zap, |world, (), report| {
        assert!(world.leaves().is_empty() && report.young <= 1);
    });
}

/// The host wants memory back: every page but the root goes.
#[test]
fn age_against_shrinking() {
    let shrink = |world: &mut World| {
        let (lock, actor) = (&world.lock, world.vcpu.actor());
        let gone = lock.with(|writer| writer.shrink(actor, u32::MAX));
        world.give_away();
        gone
    };
    race("shadow::age_against_shrink", Bits::Hardware, mapped, shrink, |world, gone, report| {
        assert_eq!((gone, world.leaves().len()), (2, 0));
        assert!(report.young <= 1);
    });
}

/// A write to the guest's table, seen: one entry goes, its page stays.
#[test]
fn age_against_a_guest_table_write() {
    let write = |world: &mut World| {
        let (lock, actor) = (&world.lock, world.vcpu.actor());
        world.memory.set(LOWER, 0, 0);
        lock.with(|writer| writer.guest_wrote(actor, Gpa::new(LOWER * PAGE_SIZE), 8));
    };
    race("shadow::age_against_table_write", Bits::Hardware, mapped, write, |world, (), report| {
        assert!(world.leaves().is_empty() && report.young <= 1);
    });
}

/// The guest may write to its table, whose shadow is out of sync; it did, to the page's entry.
fn unsync(world: &mut World, entry: u64) {
    mapped(world);
    world.memory.set(LOWER, 1, LOWER << 12 | ALL);
    world.map(PAGE_SIZE, Operation::Write);
    world.memory.set(LOWER, 0, entry);
}

fn flush(world: &mut World) {
    let World { vcpu, lock, guest, memory, .. } = world;
    vcpu.guest_flushed(lock, guest, memory);
}

#[test]
fn age_against_a_synchronisation() {
    for (name, bits) in [
        ("shadow::age_against_sync_of_permissions", Bits::Hardware),
        ("shadow::age_against_sync_of_permissions_of_tracked", Bits::Tracked),
    ] {
        let narrowed = |world: &mut World| unsync(world, PAGE.get() << 12 | ALL & !WRITABLE);
        race(name, bits, narrowed, flush, |world, (), report| {
            assert_eq!((world.leaves().len(), world.writable()), (1, false));
            // The guest's table is mapped by the other entry of its own.
            told(2, world, report);
        });
    }
    let narrowed = |world: &mut World| unsync(world, PAGE.get() << 12 | ALL & !WRITABLE);
    let name = "shadow::age_of_all_against_sync_of_permissions";
    race_of(name, Bits::Hardware, clear_all, narrowed, flush, |world, (), report| {
        assert_eq!((world.leaves().len(), world.writable()), (1, false));
        told(2, world, report);
    });
    let gone = |world: &mut World| unsync(world, 0);
    race(
        "shadow::age_against_sync_that_drops",
        Bits::Hardware,
        gone,
        flush,
        |world, (), report| {
            assert!(world.leaves().is_empty() && report.young <= 1);
        },
    );
}

#[test]
fn age_against_a_write_protection() {
    for (name, bits) in [
        ("shadow::age_against_protect", Bits::Hardware),
        ("shadow::age_against_protect_of_tracked", Bits::Tracked),
    ] {
        let protect = |world: &mut World| {
            let (mmu, lock, actor) = (&world.mmu, &world.lock, world.vcpu.actor());
            mmu.protect_marked(actor, lock, 0, PAGE, 1);
        };
        race(name, bits, mapped, protect, |world, (), report| {
            assert_eq!((world.leaves().len(), world.writable()), (1, false));
            once(world, report);
        });
    }
}

#[test]
fn age_against_age() {
    let age = |world: &mut World| clear(&world.mmu, world.vcpu.actor());
    race("shadow::age_against_age", Bits::Hardware, mapped, age, |world, mine, theirs| {
        let told = taken(mine) + taken(theirs);
        assert_eq!((told, world.accessed()), (1, 0), "an access is lost, or told twice (I21)");
    });
}
