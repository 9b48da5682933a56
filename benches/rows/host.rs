//! The embedder of the benchmark, and the VMs it makes.
//!
//! Everything that is the embedder's costs as little as it can: table frames are one block of huge
//! pages that were touched beforehand, a guest page's frame is a constant further on, a flush is
//! counted and done. Format: EPT with hardware A/D, legality checks off (no feature `prove`).

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, Level, Pfn};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::flush::FlushBatch;
use mmu_core::frame::{Arena, FrameMeta, PageTable, PhysMap, raw};
use mmu_core::slot::{Memslot, SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{Capabilities, Ept, Spte, SpteConfig, SpteFormat};
use mmu_core::traits::{HostPage, PfnResolver, ResolveError, TlbFlush, Trace};
use mmu_core::vm::{Actor, VmCore};
use tdp_mmu::{DirtyTracking, TdpMmu, TdpOptions, TdpVcpu};

const PAGE: u64 = 4096;
const HUGE: usize = 2 << 20;
/// Frame of guest page 0: aligned to 1 GiB, so that huge pages are congruent.
const DATA: u64 = 1 << 28;
/// First table frame; unlike any data frame.
const TABLES: u64 = 1 << 20;

/// Anonymous memory on huge pages, touched.
pub struct Block {
    mapping: NonNull<libc::c_void>,
    mapped: usize,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory, unmapped once by the owner.
unsafe impl Send for Block {}
// SAFETY: as above; the block itself reads and writes through `&mut` only.
unsafe impl Sync for Block {}

impl Block {
    pub fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(HUGE);
        let mapped = bytes + HUGE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping, at an address the kernel chooses.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), mapped, protection, flags, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED, "{bytes} bytes: no memory");
        let mapping = NonNull::new(address).expect("not at address 0");
        let offset = address.align_offset(HUGE);
        // SAFETY: the offset is below HUGE, and `mapped` is `bytes + HUGE`.
        let start = unsafe { mapping.cast::<u8>().add(offset) };
        // SAFETY: the range is inside the mapping. It is advice: a failure costs speed only.
        unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        // SAFETY: inside the mapping, which nobody else knows of.
        unsafe { start.as_ptr().write_bytes(0, bytes) };
        Self { mapping, mapped, start, bytes }
    }

    /// The memory as words.
    pub fn words(&self) -> &[AtomicU64] {
        let words = self.start.as_ptr().cast::<AtomicU64>();
        // SAFETY: initialised in `new`, aligned, mapped as long as `self`; atomics may be shared.
        unsafe { std::slice::from_raw_parts(words, self.bytes / 8) }
    }

    /// Put every line of the first `bytes` out of the caches.
    pub fn evict(&self, bytes: usize) {
        #[cfg(target_arch = "x86_64")]
        for word in self.words()[..bytes.min(self.bytes) / 8].iter().step_by(8) {
            // SAFETY: flushing a line of our own memory changes nothing but its place.
            unsafe { core::arch::x86_64::_mm_clflush(std::ptr::from_ref(word).cast()) };
        }
        std::sync::atomic::fence(Ordering::SeqCst);
        #[cfg(not(target_arch = "x86_64"))]
        let _ = bytes;
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and this is its only owner.
        unsafe { libc::munmap(self.mapping.as_ptr(), self.mapped) };
    }
}

/// The embedder.
pub struct BenchHost {
    arena: Arena,
    block: Block,
    level: Level,
    flushes: AtomicU64,
}

impl BenchHost {
    fn new(frames: u64, level: Level) -> Self {
        let block = Block::new((frames * PAGE) as usize);
        // SAFETY: `from_raw_parts` clause by clause.
        //   1. The block has at least `frames` pages, aligned to 2 MiB, readable and writable,
        //      mapped until it is dropped: after the arena, which is declared before it.
        //   2. Nobody else touches it: `words` is used on other blocks, and `evict` reads nothing.
        let arena = unsafe { Arena::from_raw_parts(block.start, frames, Pfn::new(TABLES)) };
        let arena = arena.expect("frames in range");
        Self { arena, block, level, flushes: AtomicU64::new(0) }
    }

    /// Flushes requested.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }
}

// SAFETY: every clause is the arena's, which this forwards to and never replaces.
unsafe impl PhysMap for BenchHost {
    fn provide(&self) -> Option<Pfn> {
        self.arena.provide()
    }

    fn reclaim(&self, frame: Pfn) {
        self.arena.reclaim(frame);
    }

    #[inline(always)]
    fn table(&self, frame: Pfn) -> NonNull<PageTable> {
        self.arena.table(frame)
    }

    #[inline]
    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta> {
        self.arena.meta(frame)
    }
}

impl TlbFlush for BenchHost {
    type Ticket = ();

    #[inline]
    fn request(&self, _: &FlushBatch<'_>) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
    }

    #[inline]
    fn wait(&self, (): ()) {}
}

impl Trace for BenchHost {}

impl PfnResolver for BenchHost {
    #[inline]
    fn resolve(&self, _: &Memslot, gfn: Gfn, _: Access) -> Result<HostPage, ResolveError> {
        Ok(HostPage { pfn: Pfn::new(gfn.get() + DATA), writable: true, level: self.level })
    }
}

/// How a VM is made.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Guest memory, 4 KiB pages.
    pub pages: u64,
    /// Largest page the host offers.
    pub level: Level,
    /// Does hardware set A and D?
    pub accessed_dirty: bool,
    /// Threads that may use it.
    pub participants: usize,
    /// There are frames to map everything by pages of this size.
    pub smallest: Level,
    /// How writes to logged slots are noticed.
    pub dirty: DirtyTracking,
}

impl Shape {
    pub fn new(pages: u64) -> Self {
        Self {
            pages,
            level: Level::L1,
            accessed_dirty: true,
            participants: 16,
            smallest: Level::MAX_LEAF,
            dirty: DirtyTracking::WriteProtect,
        }
    }
}

/// A VM of `pages` pages in one slot, with this many table frames; no tables yet.
pub fn vm_core(
    pages: u64,
    frames: u64,
    max_gfn_exclusive: Gfn,
) -> (Arc<VmCore<BenchHost>>, SlotWriter) {
    let limits = SlotLimits::new(1, max_gfn_exclusive);
    let host = BenchHost::new(frames, Level::L1);
    let (core, mut slots) = VmCore::new(host, 4, limits, std::thread::yield_now).expect("memory");
    let mut actor = core.actor().expect("room");
    let _ =
        core.set_slot(&mut slots, &mut actor, &request(0, 0, pages), |_, _| {}).expect("a slot");
    drop(actor);
    (core, slots)
}

/// A VM with one vCPU.
pub struct Vm {
    pub mmu: Arc<TdpMmu<Ept, BenchHost>>,
    pub vcpu: TdpVcpu<Ept, BenchHost>,
    pub pages: u64,
    slots: SlotWriter,
}

impl Vm {
    pub fn new(shape: Shape) -> Self {
        let Shape { pages, level, accessed_dirty, participants, smallest, dirty } = shape;
        let leaves = pages.div_ceil(level.min(smallest).table_pages());
        // Upper tables, and what caches hold.
        let frames = leaves + leaves / 256 + 256 + 40 * participants.min(8) as u64;
        let host = BenchHost::new(frames, level);
        let capabilities = Capabilities { accessed_dirty, ..Capabilities::ept() };
        let config = SpteConfig::<Ept>::new(capabilities).expect("a possible EPT");
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let (core, mut slots) =
            VmCore::new(host, participants, limits, std::thread::yield_now).expect("memory");
        let mut options = TdpOptions::default();
        options.dirty = dirty;
        let mmu = TdpMmu::new(core, config, options);
        let mut actor = mmu.vm().actor().expect("room");
        // A slot may have up to 8 TiB minus a page.
        let most = 1 << 30;
        for (id, first) in (0..pages).step_by(most).enumerate() {
            let request = request(id as u16, first, (pages - first).min(most as u64));
            let _ = mmu.set_slot(&mut slots, &mut actor, &request).expect("a good slot");
        }
        let mut vcpu = TdpVcpu::new(&mmu, 0).expect("room");
        vcpu.load_root().expect("frames");
        Self { mmu, vcpu, pages, slots }
    }

    /// Log writes to all guest memory, which is one slot.
    pub fn log(&mut self) {
        self.log_first(self.pages);
    }

    /// Log writes to the first `pages` pages.
    pub fn log_first(&mut self, pages: u64) {
        let request = SlotRequest { flags: SlotFlags::LOG_DIRTY, ..request(0, 0, self.pages) };
        let actor = self.vcpu.actor();
        let change = self.mmu.set_slot_logging(&mut self.slots, actor, &request, 0..pages);
        let _ = change.expect("a slot that can be logged");
    }

    /// Another vCPU.
    pub fn vcpu(&self) -> TdpVcpu<Ept, BenchHost> {
        let mut vcpu = TdpVcpu::new(&self.mmu, 0).expect("room");
        vcpu.load_root().expect("frames");
        vcpu
    }

    /// A thread that is no vCPU.
    pub fn actor(&self) -> Actor<BenchHost> {
        self.mmu.vm().actor().expect("room")
    }

    /// All guest memory.
    pub fn range(&self) -> GfnRange {
        GfnRange::new(Gfn::new(0), Gfn::new(self.pages))
    }

    /// The first `pages` pages.
    pub fn first(&self, pages: u64) -> GfnRange {
        GfnRange::from_len(Gfn::new(0), pages)
    }

    /// Drop every mapping and load a new root.
    pub fn reset(&mut self) {
        let zap = self.mmu.invalidate_roots(self.vcpu.actor());
        self.vcpu.load_root().expect("frames");
        let _ = zap.finish(self.vcpu.actor());
    }

    /// Map everything.
    pub fn populate(&mut self) {
        map(&mut self.vcpu, 0..self.pages);
    }

    /// Map everything, by 2 MiB pages.
    pub fn populate_huge(&mut self) {
        let step = Level::L2.pages();
        map(&mut self.vcpu, (0..self.pages / step).map(|page| page * step));
    }

    /// Frames of the level-1 tables, in the order of their gfns.
    pub fn leaf_tables(&mut self) -> Vec<Pfn> {
        let host = self.mmu.vm().host();
        let mut tables = vec![self.vcpu.load_root().expect("frames")];
        let mut level = self.mmu.config().levels();
        while let Some(below) = level.down() {
            let links = tables.iter().flat_map(|frame| raw::table(host, *frame).entries());
            tables = links.map(|c| c.peek()).filter(|s| s.is_table(level)).map(Spte::pfn).collect();
            level = below;
        }
        tables
    }

    /// The CPU's role: set the accessed bit of each leaf for which `used` says so, and clear the
    /// others'. Returns how many are set.
    pub fn set_accessed(&self, tables: &[Pfn], mut used: impl FnMut() -> bool) -> u64 {
        let mut count = 0;
        self.change_leaves(tables, |leaf| {
            let used = used();
            count += u64::from(used);
            let old = leaf.without(Ept::ACCESSED);
            if used { old.with(Ept::ACCESSED) } else { old }
        });
        count
    }

    /// Write-protect every leaf, as the dirty log would.
    pub fn write_protect(&self, tables: &[Pfn]) {
        self.change_leaves(tables, |leaf| leaf.without(Ept::WRITABLE));
    }

    /// Every page was written: its leaf is writable and dirty.
    pub fn make_written(&self, tables: &[Pfn]) {
        self.change_leaves(tables, |leaf| leaf.with(Ept::WRITABLE | Ept::DIRTY));
    }

    /// Would the next write to every page be noticed?
    pub fn is_armed(&self, tables: &[Pfn]) -> bool {
        let told = match self.mmu.dirty_tracking() {
            DirtyTracking::WriteProtect => Ept::WRITABLE,
            DirtyTracking::DirtyBit | DirtyTracking::HardwareLog => Ept::DIRTY,
        };
        let host = self.mmu.vm().host();
        let mut cells = tables.iter().flat_map(|frame| raw::table(host, *frame).entries());
        cells.all(|cell| !cell.peek().has(told))
    }

    fn change_leaves(&self, tables: &[Pfn], mut change: impl FnMut(Spte) -> Spte) {
        let host = self.mmu.vm().host();
        for cell in tables.iter().flat_map(|frame| raw::table(host, *frame).entries()) {
            let leaf = cell.peek();
            if leaf.is_mmu_present() {
                cell.init(change(leaf));
            }
        }
    }

    /// Put all tables out of the caches.
    pub fn evict(&self) {
        let provided = self.mmu.vm().pool().frames_provided();
        self.mmu.vm().host().block.evict((provided * PAGE) as usize);
    }
}

/// A slot of `pages` pages from page `first` on.
fn request(id: u16, first: u64, pages: u64) -> SlotRequest {
    SlotRequest {
        as_id: 0,
        id,
        base: Gpa::new(first * PAGE),
        bytes: pages * PAGE,
        hva: Hva::new((DATA + first) * PAGE),
        flags: SlotFlags::empty(),
    }
}

/// The fault of a write to page `gfn` that is not mapped.
#[inline]
pub fn write(gfn: u64) -> PageFault {
    PageFault::new(Gpa::new(gfn * PAGE), PfErrorCode::WRITE)
}

/// The fault of a write to page `gfn` that is mapped without W.
#[inline]
pub fn forbidden_write(gfn: u64) -> PageFault {
    PageFault::new(Gpa::new(gfn * PAGE), PfErrorCode::WRITE | PfErrorCode::PRESENT)
}

/// Map pages that are not mapped.
#[inline]
pub fn map(vcpu: &mut TdpVcpu<Ept, BenchHost>, gfns: impl Iterator<Item = u64>) {
    for gfn in gfns {
        expect(vcpu.fault(&write(gfn)), FaultOutcome::Fixed);
    }
}

/// A fault that ends otherwise than it must is no measurement.
#[inline]
pub fn expect<E: std::fmt::Debug>(found: Result<FaultOutcome, E>, wanted: FaultOutcome) {
    assert!(matches!(&found, Ok(outcome) if *outcome == wanted), "{found:?}");
}
