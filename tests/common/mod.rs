//! A VM to test the TDP MMU in: an embedder that records, refuses, delays and lies on request
//! ([`TestHost`]), and a guest on it ([`Guest`]) whose tables an independent walker judges.
//!
//! `map_spec` is the model of what is mapped, `world` runs both in lockstep. Shared by the tests of
//! the root package and by the fuzz target `tdp_ops`.

#![allow(dead_code, reason = "each test file uses its own part")]

pub mod inside;
pub mod map_spec;
pub mod runner;
pub mod watched;
pub mod world;

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, Level, Pfn};
use mmu_core::check::TreeCount;
use mmu_core::fault::{FaultError, FaultOutcome, PageFault};
use mmu_core::flush::{FlushBatch, FlushScope};
use mmu_core::frame::{Arena, FrameMeta, PageTable, PhysMap, raw};
use mmu_core::slot::{
    LogOptions, Memslot, SlotError, SlotFlags, SlotLimits, SlotRequest, SlotWriter,
};
use mmu_core::spte::{Capabilities, Ept, Legacy, Npt, Spte, SpteConfig, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::sync::ENTRIES;
use mmu_core::traits::{
    AgeMode, AgeRange, AgeReport, AgeRequest, AgeSink, CountOnly, HostPage, PageKind, PfnResolver,
    ResolveError, TlbFlush, Trace,
};
use mmu_core::vm::{Actor, VmCore};
use mmu_model::{AccessKind, Format, Mode, PhysMem, SoftCpu, Translation, Walker};
use tdp_mmu::{SlotUpdate, TdpMmu, TdpOptions, TdpVcpu};

/// Frame number of the first table: low enough for the CR3 of PAE.
pub const TABLES: u64 = 0x1000;
/// Frame number from which slots get their memory: 32 GiB, a multiple of every page size.
pub const DATA: u64 = 0x80_0000;
/// Gfn at which most tests have their memory: 4 GiB, a multiple of every page size.
pub const BASE: u64 = 0x10_0000;
/// Pages of a 2 MiB and of a 1 GiB page.
pub const M2: u64 = 512;
pub const G1: u64 = 512 * 512;

/// A resolver.
pub type Resolve = dyn Fn(&Memslot, Gfn, Access) -> Result<HostPage, ResolveError> + Send + Sync;

/// Says what kind of page the resolver gave.
pub type Kinds = dyn Fn(Gfn, &HostPage) -> PageKind + Send + Sync;

/// Called by a wait for a flush.
pub type Hook = dyn Fn(&Batch) + Send + Sync;

/// Called by a lookup of a table, with its frame.
pub type TableHook = dyn Fn(Pfn) + Send + Sync;

/// A flush that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub scope: FlushScope,
    pub ranges: Vec<GfnRange>,
    pub tables: Vec<Pfn>,
}

impl Batch {
    /// Does it name every page of `range`?
    pub fn covers(&self, range: GfnRange) -> bool {
        self.scope == FlushScope::Reload || self.ranges.iter().any(|have| have.covers(range))
    }
}

/// A processor that walks the tables and caches what it finds. The lock is held for a translation
/// and the access through it, so a flush that has the lock knows that no access is under way.
#[derive(Debug)]
pub struct Core {
    pub cpu: SoftCpu,
    /// Asked to leave the guest and load its root again.
    pub reload: bool,
}

/// The embedder.
pub struct TestHost {
    arena: Arena,
    resolver: RwLock<Arc<Resolve>>,
    kinds: RwLock<Option<Arc<Kinds>>>,
    batches: Mutex<Vec<Batch>>,
    recording: AtomicBool,
    cores: RwLock<Vec<Arc<Mutex<Core>>>>,
    /// Called by every wait for a flush, before the flush is done.
    before_flush: RwLock<Option<Arc<Hook>>>,
    delay_us: AtomicU64,
    /// Flushes are asked for and never done.
    forgets: AtomicBool,
    /// Called to have hardware logs handed over.
    on_sync: RwLock<Option<Arc<dyn Fn() + Send + Sync>>>,
    /// Does the host have what it would resolve at hand?
    at_hand: AtomicBool,
    /// Frames handed out and not back.
    outstanding: Arc<AtomicI64>,
    /// Calls of `provide`, and the numbers (from 1) of those that fail.
    provides: AtomicU64,
    fail_from: AtomicU64,
    fail_until: AtomicU64,
    /// Tables looked up: what an operation costs.
    lookups: AtomicU64,
    /// Called at each lookup, by whoever makes it, while `watched`.
    on_table: RwLock<Option<Arc<TableHook>>>,
    watched: AtomicBool,
}

/// The page at the slot's host address, writable, in blocks of `level`.
pub fn linear(level: Level) -> Arc<Resolve> {
    Arc::new(move |slot, gfn, _| {
        let hva = slot.hva_of(gfn).ok_or(ResolveError::NoMemory)?;
        Ok(HostPage { pfn: Pfn::new(hva.get() >> 12), writable: true, level })
    })
}

impl TestHost {
    pub fn new(frames: u64) -> Self {
        Self {
            arena: Arena::with_capacity(frames, Pfn::new(TABLES)).expect("memory"),
            resolver: RwLock::new(linear(Level::L1)),
            kinds: RwLock::default(),
            batches: Mutex::default(),
            recording: AtomicBool::new(true),
            cores: RwLock::default(),
            before_flush: RwLock::default(),
            delay_us: AtomicU64::new(0),
            forgets: AtomicBool::new(false),
            on_sync: RwLock::default(),
            at_hand: AtomicBool::new(false),
            outstanding: Arc::default(),
            provides: AtomicU64::new(0),
            fail_from: AtomicU64::new(u64::MAX),
            fail_until: AtomicU64::new(u64::MAX),
            lookups: AtomicU64::new(0),
            on_table: RwLock::default(),
            watched: AtomicBool::new(false),
        }
    }

    /// Answer faults by `resolver` from now on.
    pub fn set_resolver(&self, resolver: Arc<Resolve>) {
        *self.resolver.write().unwrap() = resolver;
    }

    /// Pages are of the kinds that `kinds` says from now on.
    pub fn set_kinds(&self, kinds: Arc<Kinds>) {
        *self.kinds.write().unwrap() = Some(kinds);
    }

    /// The answer of the resolver in force.
    pub fn answer(&self, slot: &Memslot, gfn: Gfn) -> Result<HostPage, ResolveError> {
        let resolver = Arc::clone(&self.resolver.read().unwrap());
        resolver(slot, gfn, Access::READ)
    }

    /// Flushes asked for since the last call.
    pub fn take_batches(&self) -> Vec<Batch> {
        std::mem::take(&mut self.batches.lock().unwrap())
    }

    pub fn record(&self, on: bool) {
        self.recording.store(on, Ordering::Relaxed);
    }

    pub fn before_flush(&self, hook: Option<Arc<Hook>>) {
        *self.before_flush.write().unwrap() = hook;
    }

    /// Call `hook` whenever a table is looked up: between two steps of an operation.
    pub fn on_table(&self, hook: Option<Arc<TableHook>>) {
        self.watched.store(hook.is_some(), Ordering::Release);
        *self.on_table.write().unwrap() = hook;
    }

    /// Answer at once, from now on, what the resolver would say.
    pub fn have_at_hand(&self) {
        self.at_hand.store(true, Ordering::Relaxed);
    }

    /// Throw flushes away from now on.
    pub fn forget_flushes(&self) {
        self.forgets.store(true, Ordering::Relaxed);
    }

    /// Call `hook` when the MMU wants what processors have logged.
    pub fn on_sync(&self, hook: Arc<dyn Fn() + Send + Sync>) {
        *self.on_sync.write().unwrap() = Some(hook);
    }

    pub fn delay_flushes(&self, delay: Duration) {
        let micros = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.delay_us.store(micros, Ordering::Relaxed);
    }

    /// A processor on the tables of this host, flushed from now on.
    pub fn add_core(&self, cpu: SoftCpu) -> Arc<Mutex<Core>> {
        let core = Arc::new(Mutex::new(Core { cpu, reload: true }));
        self.cores.write().unwrap().push(Arc::clone(&core));
        core
    }

    /// Calls of `provide` so far.
    pub fn provides(&self) -> u64 {
        self.provides.load(Ordering::Relaxed)
    }

    /// Refuse the calls of `provide` numbered `from..until` (the first ever is number 0).
    pub fn refuse(&self, from: u64, until: u64) {
        self.fail_from.store(from, Ordering::Relaxed);
        self.fail_until.store(until, Ordering::Relaxed);
    }

    /// Tables looked up so far.
    pub fn lookups(&self) -> u64 {
        self.lookups.load(Ordering::Relaxed)
    }

    fn word(&self, pa: u64) -> Option<&mmu_core::spte::cell::SpteCell> {
        let frame = (pa >> 12).checked_sub(TABLES).filter(|n| *n < self.arena.frames())?;
        let index = usize::try_from(pa % 4096 / 8).ok().filter(|_| pa & 7 == 0)?;
        raw::table(&self.arena, Pfn::new(TABLES + frame)).entries().get(index)
    }
}

impl std::fmt::Debug for TestHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestHost").field("arena", &self.arena).finish_non_exhaustive()
    }
}

// SAFETY: every clause is the arena's, which this forwards to; `provide` may say no, which the
// trait allows.
unsafe impl PhysMap for TestHost {
    fn provide(&self) -> Option<Pfn> {
        let number = self.provides.fetch_add(1, Ordering::Relaxed);
        let refused =
            self.fail_from.load(Ordering::Relaxed)..self.fail_until.load(Ordering::Relaxed);
        if refused.contains(&number) {
            return None;
        }
        let frame = self.arena.provide();
        self.outstanding.fetch_add(i64::from(frame.is_some()), Ordering::Relaxed);
        frame
    }

    fn reclaim(&self, frame: Pfn) {
        self.outstanding.fetch_sub(1, Ordering::Relaxed);
        self.arena.reclaim(frame);
    }

    fn table(&self, frame: Pfn) -> NonNull<PageTable> {
        self.lookups.fetch_add(1, Ordering::Relaxed);
        if self.watched.load(Ordering::Acquire) {
            // Not called under the lock: it waits for others who come here too.
            let hook = self.on_table.read().unwrap().clone();
            if let Some(hook) = hook {
                hook(frame);
            }
        }
        self.arena.table(frame)
    }

    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta> {
        self.arena.meta(frame)
    }
}

impl TlbFlush for TestHost {
    type Ticket = Batch;

    fn request(&self, batch: &FlushBatch<'_>) -> Batch {
        inside::host(|| self.requested(batch))
    }

    fn wait(&self, batch: Batch) {
        inside::host(|| self.waited(batch));
    }

    fn sync_hardware_log(&self) {
        let hook = self.on_sync.read().unwrap().clone();
        if let Some(hook) = hook {
            hook();
        }
    }
}

impl TestHost {
    fn requested(&self, batch: &FlushBatch<'_>) -> Batch {
        let mut tables = Vec::new();
        batch.for_each_table(|frame| tables.push(frame));
        assert_eq!(tables.len() as u64, batch.tables());
        for pair in batch.ranges.windows(2) {
            assert!(pair[0].end < pair[1].start, "ranges ascend and are apart: {batch:?}");
        }
        let batch = Batch { scope: batch.scope, ranges: batch.ranges.to_vec(), tables };
        if self.recording.load(Ordering::Relaxed) {
            self.batches.lock().unwrap().push(batch.clone());
        }
        batch
    }

    fn waited(&self, batch: Batch) {
        let hook = self.before_flush.read().unwrap().clone();
        if let Some(hook) = hook {
            hook(&batch);
        }
        match self.delay_us.load(Ordering::Relaxed) {
            0 => {}
            micros => std::thread::sleep(Duration::from_micros(micros)),
        }
        if self.forgets.load(Ordering::Relaxed) {
            return;
        }
        let tables: Vec<u64> = batch.tables.iter().map(|frame| frame.get() << 12).collect();
        for core in self.cores.read().unwrap().iter() {
            let mut core = core.lock().unwrap();
            if batch.scope == FlushScope::Reload {
                core.cpu.flush_all();
                core.reload = true;
            }
            for range in &batch.ranges {
                core.cpu.flush_pages(range.start.get()..range.end.get());
                core.cpu.flush_upper(range.start.get()..range.end.get());
            }
            core.cpu.flush_tables(&tables);
        }
    }
}

impl Trace for TestHost {}

impl PfnResolver for TestHost {
    fn resolve(&self, slot: &Memslot, gfn: Gfn, want: Access) -> Result<HostPage, ResolveError> {
        // Not called under the lock: it may call back into the MMU.
        let resolver = Arc::clone(&self.resolver.read().unwrap());
        resolver(slot, gfn, want)
    }

    fn resolve_now(&self, slot: &Memslot, gfn: Gfn) -> Option<HostPage> {
        let at_hand = self.at_hand.load(Ordering::Relaxed);
        at_hand.then(|| self.answer(slot, gfn).ok()).flatten()
    }

    fn kind(&self, _: &Memslot, gfn: Gfn, page: &HostPage) -> PageKind {
        let kinds = self.kinds.read().unwrap().clone();
        kinds.map_or(PageKind::RAM, |kinds| kinds(gfn, page))
    }
}

/// The tables as a processor sees them: accessed and dirty bits are set in them.
impl PhysMem for TestHost {
    fn read(&self, pa: u64) -> Option<u64> {
        self.word(pa).map(|cell| cell.load().raw())
    }

    fn cas(&self, pa: u64, old: u64, new: u64) -> Option<Result<(), u64>> {
        let (old, new) = (Spte::from_raw(old), Spte::from_raw(new));
        self.word(pa).map(|cell| cell.try_change(old, new).map_err(Spte::raw))
    }
}

/// The tables as somebody sees them who only looks: nothing is set.
pub struct Peek<'a>(pub &'a TestHost);

impl PhysMem for Peek<'_> {
    fn read(&self, pa: u64) -> Option<u64> {
        self.0.read(pa)
    }

    fn cas(&self, _: u64, _: u64, _: u64) -> Option<Result<(), u64>> {
        Some(Ok(()))
    }
}

/// A format of ours and the model's name for the same machine.
pub trait Modelled: SpteFormat {
    fn model(caps: &Capabilities) -> Format;
}

impl Modelled for Ept {
    fn model(caps: &Capabilities) -> Format {
        Format::Ept(mmu_model::Ept {
            levels: caps.levels,
            max_phys_bits: caps.max_phys_bits,
            exec_only: caps.exec_only,
            mode_based_execute: caps.mode_based_exec,
            accessed_dirty: caps.accessed_dirty,
            huge_2m: caps.huge_2m,
            huge_1g: caps.huge_1g,
        })
    }
}

impl Modelled for Npt {
    fn model(caps: &Capabilities) -> Format {
        Format::Npt(mmu_model::Npt {
            levels: caps.levels,
            max_phys_bits: caps.max_phys_bits,
            nxe: caps.nx,
            huge_1g: caps.huge_1g,
        })
    }
}

impl Modelled for Legacy {
    fn model(caps: &Capabilities) -> Format {
        let mode = match caps.levels {
            3 => Mode::Pae,
            4 => Mode::Long4,
            _ => Mode::Long5,
        };
        Format::Legacy(mmu_model::Legacy {
            max_phys_bits: caps.max_phys_bits,
            nxe: caps.nx,
            gbpages: caps.huge_1g,
            ..mmu_model::Legacy::new(mode)
        })
    }
}

/// Without hardware accessed and dirty bits.
pub const fn no_ad(caps: Capabilities) -> Capabilities {
    Capabilities { accessed_dirty: false, ..caps }
}

/// With five levels.
pub const fn five(caps: Capabilities) -> Capabilities {
    Capabilities { levels: 5, max_phys_bits: 52, ..caps }
}

/// Call `$check::<Format>(capabilities)` for every kind of tables.
#[macro_export]
macro_rules! for_each_format {
    ($check:ident $(, $argument:expr)*) => {{
        use mmu_core::spte::{Capabilities, Ept, Legacy, Npt};
        use $crate::common::{five, no_ad};
        $check::<Ept>(Capabilities::ept() $(, $argument)*);
        $check::<Ept>(no_ad(Capabilities::ept()) $(, $argument)*);
        $check::<Ept>(five(Capabilities::ept()) $(, $argument)*);
        $check::<Npt>(Capabilities::npt() $(, $argument)*);
        $check::<Npt>(no_ad(five(Capabilities::npt())) $(, $argument)*);
        $check::<Legacy>(Capabilities::legacy() $(, $argument)*);
        $check::<Legacy>(no_ad(Capabilities::legacy()) $(, $argument)*);
        $check::<Legacy>(five(Capabilities::legacy()) $(, $argument)*);
    }};
}

/// What a guest is made of.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub caps: Capabilities,
    pub frames: u64,
    pub spaces: u16,
    pub participants: usize,
    pub options: TdpOptions,
    pub log: LogOptions,
    /// Generation of the first set of slots.
    pub generation: u64,
}

impl Shape {
    pub fn new(caps: Capabilities) -> Self {
        let (options, log) = (TdpOptions::default(), LogOptions::default());
        Self { caps, frames: 512, spaces: 1, participants: 8, options, log, generation: 0 }
    }
}

/// A VM with one vCPU, and a walker that judges its tables.
pub struct Guest<F: SpteFormat> {
    pub mmu: Arc<TdpMmu<F, TestHost>>,
    pub slots: Arc<Mutex<SlotWriter>>,
    pub actor: Actor<TestHost>,
    pub vcpu: TdpVcpu<F, TestHost>,
    pub walker: Walker,
    pub format: Format,
    outstanding: Arc<AtomicI64>,
}

/// What a walker finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub pfn: u64,
    pub level: u8,
    pub writable: bool,
    pub executable: bool,
}

pub fn range(start: u64, end: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start), Gfn::new(end))
}

pub fn gpa(gfn: u64) -> Gpa {
    Gfn::new(gfn).address()
}

/// A page fault as hardware reports it.
pub fn code(kind: AccessKind, present: bool) -> PfErrorCode {
    let kind = match kind {
        AccessKind::Read => PfErrorCode::empty(),
        AccessKind::Write => PfErrorCode::WRITE,
        AccessKind::Fetch => PfErrorCode::FETCH,
    };
    if present { kind | PfErrorCode::PRESENT } else { kind }
}

/// The exit for a fault of a processor.
pub fn reported(gfn: u64, fault: &mmu_model::Fault) -> PageFault {
    let reserved = fault.kind == mmu_model::FaultKind::Reserved;
    let present = fault.kind != mmu_model::FaultKind::NotPresent;
    let mut code = code(fault.access.kind, present);
    code.set(PfErrorCode::RESERVED, reserved);
    PageFault::new(gpa(gfn), code)
}

pub fn request(id: u16, base: u64, pages: u64, pfn: u64, flags: SlotFlags) -> SlotRequest {
    SlotRequest {
        as_id: 0,
        id,
        base: gpa(base),
        bytes: pages << 12,
        hva: Hva::new(pfn << 12),
        flags,
    }
}

impl<F: Modelled> Guest<F> {
    pub fn new(caps: Capabilities) -> Self {
        Self::with(Shape::new(caps))
    }

    /// A guest with its root loaded and no slot.
    pub fn with(shape: Shape) -> Self {
        let mut guest = Self::without_root(shape);
        guest.vcpu.load_root().expect("a frame for the root");
        guest
    }

    pub fn without_root(shape: Shape) -> Self {
        Self::on(shape, TdpMmu::new)
    }

    /// The same on an MMU that `make` makes.
    pub fn on<M>(shape: Shape, make: M) -> Self
    where
        M: FnOnce(Arc<VmCore<TestHost>>, SpteConfig<F>, TdpOptions) -> Arc<TdpMmu<F, TestHost>>,
    {
        let config = SpteConfig::<F>::new(shape.caps).expect("capabilities");
        let host = TestHost::new(shape.frames);
        let outstanding = Arc::clone(&host.outstanding);
        let give_up_cpu = std::thread::yield_now;
        let mut limits = SlotLimits::new(shape.spaces, config.max_gfn_exclusive());
        limits.first_generation = shape.generation;
        let (vm, slots) =
            VmCore::with_log(host, shape.participants, limits, give_up_cpu, shape.log)
                .expect("a VM");
        let mmu = make(vm, config, shape.options);
        let actor = mmu.vm().actor().expect("room");
        let vcpu = TdpVcpu::new(&mmu, 0).expect("room");
        let format = F::model(&shape.caps);
        let slots = Arc::new(Mutex::new(slots));
        Self { mmu, slots, actor, vcpu, walker: Walker::new(&format), format, outstanding }
    }

    /// One slot of `pages` pages at `BASE`, backed from `DATA`, in blocks of `level`.
    pub fn with_memory(caps: Capabilities, pages: u64, level: Level) -> Self {
        let mut guest = Self::new(caps);
        guest.slot(0, BASE, pages, DATA, SlotFlags::empty());
        guest.host().set_resolver(linear(level));
        guest
    }

    pub fn host(&self) -> &TestHost {
        self.mmu.vm().host()
    }

    pub fn config(&self) -> &SpteConfig<F> {
        self.mmu.config()
    }

    pub fn stat(&self, counter: Counter) -> u64 {
        self.mmu.vm().stats().get(counter)
    }

    pub fn set_slot(&mut self, request: &SlotRequest) -> Result<SlotUpdate, SlotError> {
        self.mmu.set_slot(&mut self.slots.lock().unwrap(), &mut self.actor, request)
    }

    /// Change a slot and what of it is logged.
    pub fn set_slot_logging(
        &mut self,
        request: &SlotRequest,
        pages: std::ops::Range<u64>,
    ) -> Result<SlotUpdate, SlotError> {
        let mut writer = self.slots.lock().unwrap();
        self.mmu.set_slot_logging(&mut writer, &mut self.actor, request, pages)
    }

    #[track_caller]
    pub fn slot(&mut self, id: u16, base: u64, pages: u64, pfn: u64, flags: SlotFlags) {
        let _ = self.set_slot(&request(id, base, pages, pfn, flags)).expect("a legal slot");
    }

    pub fn try_fault(
        &mut self,
        gfn: u64,
        kind: AccessKind,
        level: Level,
    ) -> Result<FaultOutcome, FaultError> {
        let present = self.found(gfn).is_some();
        self.vcpu.fault(&PageFault::new(gpa(gfn), code(kind, present)).at_most(level))
    }

    /// A fault that must end without an error.
    #[track_caller]
    pub fn fault(&mut self, gfn: u64, kind: AccessKind, level: Level) -> FaultOutcome {
        self.try_fault(gfn, kind, level).expect("no error")
    }

    /// Map pages as by reads or writes.
    #[track_caller]
    pub fn map(&mut self, gfns: impl IntoIterator<Item = u64>, kind: AccessKind, level: Level) {
        for gfn in gfns {
            let outcome = self.fault(gfn, kind, level);
            assert!(
                matches!(outcome, FaultOutcome::Fixed | FaultOutcome::Spurious),
                "{gfn:#x}: {outcome:?}"
            );
        }
    }

    /// Split whatever maps `gfn` down to 4 KiB, by a prefetch that asks for no more.
    pub fn shrink(&mut self, gfn: u64) -> FaultOutcome {
        let fault = PageFault::prefetch(gpa(gfn), Access::READ).at_most(Level::L1);
        self.vcpu.fault(&fault).expect("no error")
    }

    pub fn unmap(&mut self, range: GfnRange) -> tdp_mmu::ZapReport {
        self.mmu.unmap(&mut self.actor, range)
    }

    /// Age without a budget.
    pub fn age(&mut self, range: GfnRange, mode: AgeMode) -> AgeReport {
        self.age_into(range, mode, u64::MAX, &mut CountOnly)
    }

    pub fn age_into<S: AgeSink>(
        &mut self,
        range: GfnRange,
        mode: AgeMode,
        budget: u64,
        sink: &mut S,
    ) -> AgeReport {
        self.ask(AgeRequest::new(range, mode).with_budget(budget), sink)
    }

    pub fn ask<S: AgeSink>(&mut self, request: AgeRequest, sink: &mut S) -> AgeReport {
        self.mmu.age(&mut self.actor, request, sink)
    }

    pub fn root_register(&mut self) -> u64 {
        self.vcpu.load_root().expect("a root").address().get()
    }

    /// What the tables say about a gfn to somebody who only looks.
    pub fn found(&mut self, gfn: u64) -> Option<Found> {
        let root = self.root_register();
        self.found_in(root, gfn)
    }

    pub fn found_in(&self, root: u64, gfn: u64) -> Option<Found> {
        let access = mmu_model::Access::user(AccessKind::Read);
        let found = self.walker.translate(&Peek(self.host()), root, gfn << 12, access).ok()?;
        Some(Found {
            pfn: found.pa >> 12,
            level: found.level,
            writable: found.writable(),
            executable: found.executable(),
        })
    }

    /// A read as the processor makes it, and what comes of it.
    pub fn access(&mut self, gfn: u64) -> Result<FaultOutcome, FaultError> {
        match self.touch(gfn, AccessKind::Read) {
            Ok(_) => Ok(FaultOutcome::Spurious),
            Err(fault) => self.vcpu.fault(&reported(gfn, &fault)),
        }
    }

    /// An access as the processor makes it, TLB aside: sets accessed and dirty bits.
    pub fn touch(&mut self, gfn: u64, kind: AccessKind) -> Result<Translation, mmu_model::Fault> {
        let root = self.root_register();
        let access = mmu_model::Access::user(kind);
        self.walker.translate(self.host(), root, gfn << 12, access)
    }

    /// The entry that maps `gfn`, or says that it is not mapped.
    pub fn entry(&mut self, gfn: u64) -> (Level, Spte) {
        let walk = self.mmu.lookup(&mut self.actor, 0, Gfn::new(gfn));
        *walk.last().expect("a root")
    }

    pub fn young(&mut self, gfn: u64) -> bool {
        let (_, spte) = self.entry(gfn);
        self.config().is_accessed(spte)
    }

    /// Frames in the caches of the actor and the vCPU.
    pub fn cached(&mut self) -> u64 {
        let actor = self.actor.shared().cache.len();
        let vcpu = self.vcpu.actor().shared().cache.len();
        (actor + vcpu) as u64
    }

    /// Every entry is well-formed, the statistics equal a recount, frames are accounted for. Valid
    /// while no zap-all is pending.
    #[track_caller]
    pub fn check(&mut self) -> TreeCount {
        let count = self.mmu.check(&mut self.actor).expect("well-formed trees");
        let pages = [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G];
        assert_eq!(pages.map(|counter| self.stat(counter)), count.leaves, "leaves");
        assert_eq!(self.stat(Counter::Tables), count.tables, "tables");
        assert_eq!(self.stat(Counter::MmioSptes), count.mmio, "MMIO entries");
        assert_eq!(self.stat(Counter::FlushOwed), self.stat(Counter::FlushPaid), "flush debts");
        let cached = self.cached();
        assert_eq!(self.mmu.vm().pool().frames_in_use(), count.tables + cached, "frames");
        count
    }

    /// Tear the VM down; nothing may be left.
    #[track_caller]
    pub fn finish(self) {
        let Self { mmu, slots, mut actor, mut vcpu, outstanding, .. } = self;
        vcpu.unload_root();
        drop(vcpu);
        let _ = mmu.destroy(&mut actor);
        let vm = Arc::clone(mmu.vm());
        let pages = [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G];
        for gauge in pages.into_iter().chain([Counter::Tables, Counter::MmioSptes]) {
            assert_eq!(vm.stats().get(gauge), 0, "{}", gauge.name());
        }
        let owed = vm.stats().get(Counter::FlushOwed);
        assert_eq!(owed, vm.stats().get(Counter::FlushPaid), "flush debts");
        drop(actor);
        assert_eq!(vm.pool().frames_in_use(), 0, "frames in use");
        assert_eq!(vm.pool().poll(), 0, "frames waiting");
        assert_eq!(vm.notify().in_progress(), 0, "invalidations");
        drop(slots);
        drop(mmu);
        drop(vm);
        assert_eq!(outstanding.load(Ordering::Relaxed), 0, "frames not given back");
    }
}

/// Entries of one table, as a number of gfns.
pub const TABLE: u64 = ENTRIES as u64;

/// Ends other threads also when an assertion fails, so that the failure is reported.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
