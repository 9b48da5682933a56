//! Which cache lines a fault writes besides those of the table it changes: none that another vCPU's
//! fault writes too. Counted, not timed, so it holds on any machine.
//!
//! An allocator that remembers what the VM allocated lets the test compare images of *all* of the
//! VM's memory before and after each fault, instead of the fields somebody thought of. Left out are
//! the tables themselves, what belongs to the faulting thread alone (its epoch record, its
//! statistics, its handle, which stands on the stack), and nothing else. A word that is changed and
//! changed back within one fault, such as a spin lock, does not show; [`WORDS_THAT_HIDE`] allows
//! for it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeSet;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, Level, Pfn};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::flush::FlushBatch;
use mmu_core::frame::{Arena, FrameMeta, PageTable, PhysMap};
use mmu_core::slot::{Memslot, SlotFlags, SlotLimits, SlotRequest};
use mmu_core::spte::{Capabilities, Ept, SpteConfig};
use mmu_core::traits::{HostPage, PfnResolver, ResolveError, TlbFlush, Trace};
use mmu_core::vm::VmCore;
use tdp_mmu::{TdpMmu, TdpOptions, TdpVcpu};

const LINE: usize = 64;
const PAGES: u64 = 64 * 512;
const FRAMES: u64 = 160;
const PARTICIPANTS: usize = 5;
/// Spin locks taken when frames are fetched, the pool's and the arena's: their words are 0 again
/// afterwards, and may stand on lines of their own.
const WORDS_THAT_HIDE: usize = 2;

/// Remembers the allocations made while it is told to.
struct Remembering;

const MOST: usize = 256;
static REMEMBER: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);
static PLACES: [[AtomicUsize; 2]; MOST] = [const { [const { AtomicUsize::new(0) }; 2] }; MOST];

// SAFETY: forwards to the system's allocator, always zeroed so that every byte has a value.
unsafe impl GlobalAlloc for Remembering {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises about `layout` are passed on.
        let place = unsafe { System.alloc_zeroed(layout) };
        if REMEMBER.load(Ordering::Relaxed) {
            let index = COUNT.fetch_add(1, Ordering::Relaxed);
            assert!(index < MOST, "a VM makes fewer allocations");
            PLACES[index][0].store(place as usize, Ordering::Relaxed);
            PLACES[index][1].store(layout.size(), Ordering::Relaxed);
        }
        place
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as for `alloc`, whose memory is zeroed.
        unsafe { self.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        for entry in &PLACES {
            if entry[0].load(Ordering::Relaxed) == place as usize {
                entry[1].store(0, Ordering::Relaxed);
            }
        }
        // SAFETY: the caller's promises are passed on: it came from `alloc`, so from the system.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Remembering = Remembering;

/// The cheapest embedder.
struct Plain(Arena);

// SAFETY: every clause is the arena's, which this forwards to and never replaces.
unsafe impl PhysMap for Plain {
    fn provide(&self) -> Option<Pfn> {
        self.0.provide()
    }

    fn reclaim(&self, frame: Pfn) {
        self.0.reclaim(frame);
    }

    fn table(&self, frame: Pfn) -> NonNull<PageTable> {
        self.0.table(frame)
    }

    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta> {
        self.0.meta(frame)
    }
}

impl TlbFlush for Plain {
    type Ticket = ();

    fn request(&self, _: &FlushBatch<'_>) {}

    fn wait(&self, (): ()) {}
}

impl Trace for Plain {}

impl PfnResolver for Plain {
    fn resolve(&self, _: &Memslot, gfn: Gfn, _: Access) -> Result<HostPage, ResolveError> {
        Ok(HostPage { pfn: Pfn::new(gfn.get() + (1 << 20)), writable: true, level: Level::L1 })
    }
}

/// A VM and where its memory is.
struct Watched {
    mmu: Arc<TdpMmu<Ept, Plain>>,
    /// All of it, tables excepted.
    memory: Vec<Range<usize>>,
}

impl Watched {
    fn new() -> Self {
        let first = COUNT.load(Ordering::Relaxed);
        REMEMBER.store(true, Ordering::Relaxed);
        let host = Plain(Arena::with_capacity(FRAMES, Pfn::new(1 << 16)).unwrap());
        let config = SpteConfig::<Ept>::new(Capabilities::ept()).unwrap();
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let (core, mut slots) =
            VmCore::new(host, PARTICIPANTS, limits, std::thread::yield_now).unwrap();
        let mmu = TdpMmu::new(core, config, TdpOptions::default());
        let mut actor = mmu.vm().actor().unwrap();
        let request = SlotRequest {
            as_id: 0,
            id: 0,
            base: Gpa::new(0),
            bytes: PAGES * 4096,
            hva: Hva::new(1 << 32),
            flags: SlotFlags::empty(),
        };
        let _ = mmu.set_slot(&mut slots, &mut actor, &request).unwrap();
        REMEMBER.store(false, Ordering::Relaxed);
        let last = COUNT.load(Ordering::Relaxed);
        let place = |entry: &[AtomicUsize; 2]| {
            let start = entry[0].load(Ordering::Relaxed);
            start..start + entry[1].load(Ordering::Relaxed)
        };
        let all = PLACES[first..last].iter().map(place).filter(|range| !range.is_empty());
        let is_tables = |range: &Range<usize>| range.len() >= FRAMES as usize * 4096;
        let (tables, memory): (Vec<_>, Vec<_>) = all.partition(is_tables);
        assert_eq!(tables.len(), 1, "the arena's tables");
        Self { mmu, memory }
    }

    fn vcpu(&self) -> TdpVcpu<Ept, Plain> {
        let mut vcpu = TdpVcpu::new(&self.mmu, 0).unwrap();
        vcpu.load_root().unwrap();
        vcpu
    }

    /// Every word of the VM's memory.
    fn image(&self) -> Vec<u64> {
        let words = self.memory.iter().flat_map(|range| range.clone().step_by(8));
        // SAFETY: a word of an allocation that is alive (the VM holds it; the allocator forgets
        // what is freed), aligned to 8 because allocations of such sizes are, zeroed when it was
        // made. No other thread runs, and the read is volatile: it takes what is there.
        words.map(|at| unsafe { std::ptr::read_volatile(at as *const u64) }).collect()
    }

    /// Lines that differ, those excepted that are `own`.
    fn changed(&self, before: &[u64], own: &[Range<usize>]) -> BTreeSet<usize> {
        let now = self.image();
        let places = self.memory.iter().flat_map(|range| range.clone().step_by(8));
        let words = places.zip(before.iter().zip(&now));
        words
            .filter(|(at, (old, new))| old != new && !own.iter().any(|range| range.contains(at)))
            .map(|(at, _)| at / LINE)
            .collect()
    }

    /// What participant `index` alone writes: its statistics and its epoch record.
    fn own(&self, index: usize) -> [Range<usize>; 2] {
        let shard = self.mmu.vm().stats().shard(index);
        let start = std::ptr::from_ref(shard) as usize;
        let records = self.memory.iter().find(|range| range.len() == PARTICIPANTS * 128);
        let record = records.expect("the epoch records").start + index * 128;
        [start..start + size_of_val(shard), record..record + LINE]
    }
}

fn fault(vcpu: &mut TdpVcpu<Ept, Plain>, gfn: u64) {
    let fault = PageFault::new(Gpa::new(gfn * 4096), PfErrorCode::WRITE);
    assert_eq!(vcpu.fault(&fault), Ok(FaultOutcome::Fixed));
}

/// One test, because the allocator watches the whole process.
#[test]
fn a_fault_writes_no_line_that_other_vcpus_write() {
    let vm = Watched::new();
    let (mut vcpu, mut other) = (vm.vcpu(), vm.vcpu());
    let own = vm.own(vcpu.actor().participant().index());
    // Link tables for 8 regions, and let the other vCPU use what it needs.
    (0..8).for_each(|region| fault(&mut vcpu, region * 512));
    fault(&mut other, 60 * 512);

    // Tables are there: not one line.
    let before = vm.image();
    for region in 0..8 {
        (1..512).for_each(|page| fault(&mut vcpu, region * 512 + page));
    }
    assert_eq!(vm.changed(&before, &own), BTreeSet::new(), "lines of the VM written by faults");
    for (range, what) in own.iter().zip(["statistics", "epoch record"]) {
        let others = own.iter().filter(|other| *other != range).cloned().collect::<Vec<_>>();
        assert!(!vm.changed(&before, &others).is_empty(), "the {what} must be seen to change");
    }

    // New tables: at most 2 lines for 512 faults, over 32 tables.
    let mut written = 0;
    let mut fetched = 0;
    for gfn in 8 * 512..40 * 512 {
        let before = vm.image();
        let frames = vm.mmu.vm().pool().frames_in_use();
        fault(&mut vcpu, gfn);
        let lines = vm.changed(&before, &own).len();
        written += lines;
        if vm.mmu.vm().pool().frames_in_use() != frames {
            fetched += 1;
            written += WORDS_THAT_HIDE;
        } else if gfn % 512 == 0 {
            assert!(lines <= 1, "gfn {gfn:#x}: {lines} lines; a new table notes its place");
        } else {
            assert_eq!(lines, 0, "gfn {gfn:#x} needs no table");
        }
    }
    assert!(fetched > 0, "frames were fetched on the way");
    assert!(written <= 2 * 32, "{written} lines in 32 * 512 faults, {fetched} fetches");

    // The test would notice: an unmap announces itself to everybody.
    let before = vm.image();
    let gone = vm.mmu.unmap(vcpu.actor(), GfnRange::from_len(Gfn::new(0), 1));
    assert_eq!(gone.pages(), 1);
    assert!(!vm.changed(&before, &own).is_empty());
}
