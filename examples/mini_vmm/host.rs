//! The VMM as the MMU's embedder: frames, flushes with completion, page resolution.
//!
//! Owns [`VmmHost`], which implements the traits an embedder implements, [`Gates`], the
//! handshake between vCPU threads and a request to reload roots, [`Pause`], by which somebody gets
//! to see a VM that stands still, and [`Pager`], who knows which pages are not in memory.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, GfnRange, Level, Pfn};
use mmu_core::flush::{FlushBatch, FlushScope};
use mmu_core::frame::{Arena, ArenaError, FrameMeta, PageTable, PhysMap};
use mmu_core::slot::Memslot;
use mmu_core::traits::{HostPage, PfnResolver, ResolveError, TlbFlush, Trace};

use super::machine::{Flush, Layout, Machine, PAGE};

/// One word per vCPU: odd while it may be in the guest.
#[derive(Debug)]
pub struct Gates(Vec<AtomicU64>);

impl Gates {
    /// Gates of `vcpus` vCPUs, all outside.
    pub fn new(vcpus: u32) -> Arc<Self> {
        Arc::new(Self((0..vcpus).map(|_| AtomicU64::new(0)).collect()))
    }

    /// Announce entry. After this, check that the root is current; if not, [`leave`](Self::leave).
    /// The fence pairs with the one in [`wait_out`](Self::wait_out): either the vCPU sees that its
    /// root was invalidated, or the waiter sees that it is inside.
    pub fn enter(&self, vcpu: u32) {
        self.0[vcpu as usize].fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }

    /// Announce exit.
    pub fn leave(&self, vcpu: u32) {
        self.0[vcpu as usize].fetch_add(1, Ordering::Release);
    }

    /// Wait until every vCPU that is inside has left once, kicking them.
    fn wait_out(&self, kick: impl Fn()) {
        fence(Ordering::SeqCst);
        let seen: Vec<u64> = self.0.iter().map(|gate| gate.load(Ordering::Acquire)).collect();
        let inside = |(gate, seen): (&AtomicU64, &u64)| {
            seen % 2 == 1 && gate.load(Ordering::Acquire) == *seen
        };
        while self.0.iter().zip(&seen).any(inside) {
            kick();
            std::thread::yield_now();
        }
    }
}

/// How long whoever pauses a VM waits before it kicks again: a kick reaches only vCPUs that are in
/// the guest at that moment.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// Lets vCPU threads stand still between two entries, and ends what they run.
#[derive(Debug, Default)]
pub struct Pause {
    state: Mutex<PauseState>,
    changed: Condvar,
    /// Somebody wants something: `state` tells what. A hint, written under the mutex; a vCPU that
    /// reads the old value is kicked again.
    wanted: AtomicBool,
}

#[derive(Debug, Default)]
struct PauseState {
    /// Number of those who want the VM to stand still.
    pauses: u32,
    /// Threads that run a vCPU and do not stand still.
    running: u32,
    stop: bool,
}

impl Pause {
    fn lock(&self) -> MutexGuard<'_, PauseState> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, state: &PauseState) {
        self.wanted.store(state.pauses > 0 || state.stop, Ordering::Release);
    }

    /// The calling thread is about to run a vCPU, until it drops the answer. Waits while the VM is
    /// paused.
    pub fn running(&self) -> Running<'_> {
        self.begin();
        Running(self)
    }

    fn begin(&self) {
        let mut state = self.lock();
        while state.pauses > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.running += 1;
    }

    fn end(&self) {
        self.lock().running -= 1;
        self.changed.notify_all();
    }

    /// Called between two entries: stands still while the VM is paused. True if vCPUs are to stop.
    #[inline]
    pub fn stand(&self) -> bool {
        if !self.wanted.load(Ordering::Acquire) {
            return false;
        }
        self.end();
        self.begin();
        self.lock().stop
    }

    /// Until the answer is dropped no thread runs a vCPU.
    pub fn pause(&self, kick: impl Fn()) -> Paused<'_> {
        let mut state = self.lock();
        state.pauses += 1;
        self.want(&state);
        while state.running > 0 {
            kick();
            let waited = self.changed.wait_timeout(state, KICK_AGAIN);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Paused(self)
    }

    /// Programs that may be stopped are to stop now, or need not any longer.
    pub fn stop(&self, stop: bool) {
        let mut state = self.lock();
        state.stop = stop;
        self.want(&state);
    }
}

/// A thread that runs a vCPU, also one that panics.
#[derive(Debug)]
pub struct Running<'a>(&'a Pause);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A VM that stands still; see [`Pause::pause`].
#[must_use = "dropped, the vCPUs go on"]
#[derive(Debug)]
pub struct Paused<'a>(&'a Pause);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.pauses -= 1;
        self.0.want(&state);
        self.0.changed.notify_all();
    }
}

/// Knows which data pages are in memory, and brings the others in.
pub trait Pager: Send + Sync {
    /// Is this data page in memory, and may be mapped until an invalidation says otherwise?
    fn is_here(&self, page: u64) -> bool;

    /// Bring in a page that is not here. May return without it when somebody else is at it: ask
    /// again. Called with nothing held; may sleep.
    ///
    /// # Errors
    /// Its contents are lost.
    fn bring_in(&self, page: u64) -> Result<(), super::vmm::Error>;
}

/// What the linear pages of the machine's guest are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Linear {
    /// The gfns of the MMU under test.
    Gfns,
    /// The guest's own business: its tables are shadowed.
    Shadowed,
}

/// Any linear page.
const ALL_LINEAR: Range<u64> = 0..1 << 52;

/// The embedder.
pub struct VmmHost {
    machine: Arc<dyn Machine>,
    arena: Arena,
    layout: Layout,
    gates: Arc<Gates>,
    /// Address of physical page 0 in the VMM: slots say where their memory is by it.
    base: u64,
    /// Largest page the resolver offers.
    level: Level,
    /// Tests of the tests: flushes are thrown away.
    forget_flushes: bool,
    linear: Linear,
    /// Once there is one; else all pages are in memory.
    pager: OnceLock<Arc<dyn Pager>>,
}

impl VmmHost {
    /// An embedder for `machine`, whose tables stand in `layout.tables`.
    pub fn new(
        machine: Arc<dyn Machine>,
        layout: &Layout,
        gates: Arc<Gates>,
        level: Level,
        forget_flushes: bool,
    ) -> Result<Self, ArenaError> {
        let memory = machine.memory();
        let offset = layout.tables.start * PAGE;
        let frames = layout.tables.end - layout.tables.start;
        assert!(layout.tables.end * PAGE <= memory.len, "tables stand in memory");
        // SAFETY: `offset` is inside the machine's mapping (asserted), which is not null.
        let start = unsafe { memory.base.add(offset as usize) };
        let start = NonNull::new(start).expect("the mapping is not at address 0");
        // SAFETY: `from_raw_parts` clause by clause.
        //   1. [start, start + frames pages) is inside the machine's mapping (asserted), page
        //      aligned because the mapping is, readable and writable, and mapped as long as the
        //      machine lives; `Self` keeps the machine alive as long as the arena.
        //   2. The layout reserves these pages for tables: the machine and the guest touch them
        //      by page walks only, which are aligned 8-byte atomic accesses.
        let arena = unsafe { Arena::from_raw_parts(start, frames, Pfn::new(layout.tables.start)) }?;
        let base = memory.base as u64;
        let layout = layout.clone();
        let pager = OnceLock::new();
        let linear = Linear::Gfns;
        Ok(Self { machine, arena, layout, gates, base, level, forget_flushes, linear, pager })
    }

    /// The same for a guest with tables of its own, which are shadowed: a flush of a gfn is one of
    /// whatever leads there.
    pub fn shadowed(mut self) -> Self {
        self.linear = Linear::Shadowed;
        self
    }

    /// From now on `pager` says which pages are in memory. True if it is the first to do so.
    pub fn set_pager(&self, pager: Arc<dyn Pager>) -> bool {
        self.pager.set(pager).is_ok()
    }

    /// Bring in the page behind `gfn`, for which [`resolve`](PfnResolver::resolve) said that it
    /// must be read first.
    pub fn bring_in(&self, gfn: Gfn) -> Result<(), super::vmm::Error> {
        match (self.pager.get(), gfn.get().checked_sub(DATA_GFN)) {
            (Some(pager), Some(page)) => pager.bring_in(page),
            _ => Err(format!("gfn {gfn}: nobody knows where its page is").into()),
        }
    }

    /// Where physical page `page` is mapped in the VMM: what a slot's `hva` is.
    pub fn hva(&self, page: u64) -> u64 {
        self.base + page * PAGE
    }

    /// Physical pages behind a guest range: the data page of each gfn is the slot's, which the
    /// scenarios lay out so that it follows from the gfn alone.
    fn data_pages(&self, range: GfnRange) -> Option<Range<u64>> {
        let start = range.start.get().max(DATA_GFN);
        let first = start - DATA_GFN + self.layout.data.start;
        let pages = range.end.get().saturating_sub(start);
        let end = first.saturating_add(pages).min(self.layout.data.end);
        (first < end).then_some(first..end)
    }

    /// What a flush of `batch` is to a machine whose guest has tables of its own.
    fn shadowed_ticket(&self, batch: &FlushBatch<'_>, tables: Vec<u64>) -> Ticket {
        // A link that was changed leads anywhere, and a host that shadows our tables in turn must
        // forget them all before the place is linked again.
        let links = batch.ranges.contains(&GfnRange::ALL);
        let stub = &self.layout.stub;
        let pfns = |range: &GfnRange| {
            let pinned = range.start.get()..range.end.get().min(stub.end);
            [Some(pinned).filter(|pages| !pages.is_empty()), self.data_pages(*range)]
        };
        Ticket {
            reload: batch.scope == FlushScope::Reload,
            everything: links || !tables.is_empty(),
            gfns: vec![ALL_LINEAR],
            pfns: batch.ranges.iter().flat_map(pfns).flatten().collect(),
            tables,
        }
    }
}

/// First gfn of guest data: 4 GiB.
pub const DATA_GFN: u64 = 0x10_0000;

// SAFETY: every clause is the arena's, which this forwards to and never replaces.
unsafe impl PhysMap for VmmHost {
    fn provide(&self) -> Option<Pfn> {
        self.arena.provide()
    }

    fn reclaim(&self, frame: Pfn) {
        self.arena.reclaim(frame);
    }

    fn table(&self, frame: Pfn) -> NonNull<PageTable> {
        self.arena.table(frame)
    }

    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta> {
        self.arena.meta(frame)
    }
}

/// A flush to be done by `wait`: the machine's flushes are complete when they return, so all of the
/// work is there.
pub struct Ticket {
    reload: bool,
    everything: bool,
    gfns: Vec<Range<u64>>,
    pfns: Vec<Range<u64>>,
    tables: Vec<u64>,
}

impl TlbFlush for VmmHost {
    type Ticket = Ticket;

    fn request(&self, batch: &FlushBatch<'_>) -> Ticket {
        let reload = batch.scope == FlushScope::Reload;
        if reload {
            // Start them on their way; `wait` makes sure.
            self.machine.kick_all();
        }
        let mut tables = Vec::new();
        batch.for_each_table(|frame| tables.push(frame.get()));
        if self.linear == Linear::Shadowed {
            return self.shadowed_ticket(batch, tables);
        }
        let gfns = batch.ranges.iter().map(|r| r.start.get()..r.end.get()).collect();
        let pfns = batch.ranges.iter().filter_map(|range| self.data_pages(*range)).collect();
        Ticket { reload, everything: reload, gfns, pfns, tables }
    }

    fn wait(&self, ticket: Ticket) {
        if self.forget_flushes {
            return;
        }
        let Ticket { reload, everything, gfns, pfns, tables } = ticket;
        if reload {
            self.gates.wait_out(|| self.machine.kick_all());
        }
        let flush = Flush { gfns: &gfns, pfns: &pfns, tables: &tables, everything };
        if let Err(error) = self.machine.flush(&flush) {
            // Going on with stale translations would corrupt the guest silently.
            panic!("the machine could not flush: {error}");
        }
    }

    fn sync_hardware_log(&self) {
        self.gates.wait_out(|| self.machine.kick_all());
    }
}

impl Trace for VmmHost {}

impl PfnResolver for VmmHost {
    #[inline]
    fn resolve(&self, slot: &Memslot, gfn: Gfn, _: Access) -> Result<HostPage, ResolveError> {
        let hva = slot.hva_of(gfn).ok_or(ResolveError::NoMemory)?;
        let page = (hva.get() - self.base) / PAGE;
        if let (Some(pager), Some(data)) =
            (self.pager.get(), page.checked_sub(self.layout.data.start))
        {
            if !pager.is_here(data) {
                return Err(ResolveError::NeedsIo);
            }
        }
        Ok(HostPage { pfn: Pfn::new(page), writable: true, level: self.level })
    }
}
