//! What the models share: running one, a small VM, and a processor that walks its tables.

#![allow(dead_code, reason = "each file of models uses its own part")]

use core::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, Level, PAGE_SIZE, Pfn};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::flush::{FlushBatch, FlushScope};
use mmu_core::frame::{Arena, FrameMeta, PageTable, PhysMap};
use mmu_core::slot::{LogOptions, Memslot, SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::cell::SpteCell;
use mmu_core::spte::{Capabilities, Ept, Legacy, Spte, SpteConfig, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::sync::{contract, relax};
use mmu_core::traits::{HostPage, PfnResolver, ResolveError, TlbFlush, Trace};
use mmu_core::vm::VmCore;
use tdp_mmu::{TdpMmu, TdpOptions, TdpVcpu};

/// The page that most models are about, and the other one of its table.
pub(crate) const GFN: Gfn = Gfn::new(1);
pub(crate) const NEIGHBOUR: Gfn = Gfn::new(0);
/// Both, which is what one entry at level 2 maps.
pub(crate) const BOTH: GfnRange = GfnRange::new(Gfn::new(0), Gfn::new(2));

/// gfns of the slot.
const SLOT_PAGES: u64 = 4;
/// First host frame of the slot's memory.
const MEMORY: u64 = 0x100;
/// Distance to the frame that takes a page's place when the host replaces it.
const REPLACED: u64 = 0x100;

pub(crate) type Vcpu<F> = TdpVcpu<F, ModelHost>;

/// Run every interleaving of `body`, locks and sections by their contract.
pub(crate) fn explore(name: &str, body: impl Fn() + Send + Sync + 'static) {
    run(name, None, true, body);
}

/// The same with at most `bound` preemptions, for a model that would not end.
pub(crate) fn explore_up_to(name: &str, bound: usize, body: impl Fn() + Send + Sync + 'static) {
    run(name, Some(bound), true, body);
}

/// Run `body` with the locks and sections that ship and at most `bound` preemptions.
pub(crate) fn explore_shipped(name: &str, bound: usize, body: impl Fn() + Send + Sync + 'static) {
    run(name, Some(bound), false, body);
}

fn run(
    name: &str,
    bound: Option<usize>,
    by_contract: bool,
    body: impl Fn() + Send + Sync + 'static,
) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = bound;
    builder.max_branches = 100_000;
    let executions = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&executions);
    contract::set(by_contract);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        body();
    });
    let executions = executions.load(Ordering::Relaxed);
    let bound = bound.map_or_else(|| "none".to_owned(), |bound| bound.to_string());
    println!("MODEL {name} executions={executions} bound={bound}");
}

/// A format with the configuration that models use it in.
pub(crate) trait Modelled: SpteFormat {
    fn capabilities() -> Capabilities;
}

/// The smallest tree with hardware A/D: PAE, three levels.
impl Modelled for Legacy {
    fn capabilities() -> Capabilities {
        Capabilities::pae()
    }
}

/// Access tracking, four levels.
impl Modelled for Ept {
    fn capabilities() -> Capabilities {
        Capabilities { accessed_dirty: false, ..Capabilities::ept() }
    }
}

/// What the processor has cached: the frame for each gfn of the slot.
#[derive(Debug, Default)]
struct Cpu {
    tlb: [Option<Pfn>; 4],
    /// May a write use the cached frame and look at no entry? So it is with D set.
    hot: [bool; 4],
    /// Writes to each page, and how many of them the copies hold that somebody took.
    writes: [u64; 4],
    copied: [u64; 4],
    /// An upper-level entry: the level-1 table of [`BOTH`].
    upper: Option<Pfn>,
    /// It was told to leave, and would have to load a root to come back.
    out: bool,
}

/// The embedder: an arena, host pages that can be replaced, and the processor's side of flushes.
///
/// Its state is not modelled: each use of it follows an operation of the MMU that is, and whose
/// order with the others' decides.
pub(crate) struct ModelHost {
    arena: Arena,
    /// Bit `n`: the page of gfn `n` was replaced.
    replaced: AtomicU64,
    /// Bit `n`: and an unmap has returned since, so that it may be used for something else.
    released: AtomicU64,
    /// Host pages are as large as an entry at level 2.
    huge: AtomicBool,
    /// Two threads harvest one log.
    shared: AtomicBool,
    /// Held during an access: who holds it finds the processor between two accesses.
    accessing: loom::sync::Mutex<()>,
    /// Does any thread access memory? If not, nobody need wait for it.
    runs: AtomicBool,
    cpu: Mutex<Cpu>,
}

impl ModelHost {
    /// The host takes the page away and has another one for the gfn from now on.
    pub(crate) fn replace(&self, range: GfnRange) {
        for gfn in range.start.get()..range.end.get() {
            self.replaced.fetch_or(1 << gfn, Ordering::Relaxed);
        }
    }

    /// What was taken away in `range` is unmapped; nobody may use it any more.
    pub(crate) fn release(&self, range: GfnRange) {
        for gfn in range.start.get()..range.end.get() {
            let replaced = self.replaced.load(Ordering::Relaxed) & 1 << gfn;
            self.released.fetch_or(replaced, Ordering::Relaxed);
        }
    }

    /// May the processor use `page` for `gfn`?
    fn may_use(&self, gfn: Gfn, page: Pfn) -> bool {
        let released = self.released.load(Ordering::Relaxed) >> gfn.get() & 1 == 1;
        page == self.page(gfn) || page == Pfn::new(MEMORY + gfn.get()) && !released
    }

    /// Let host pages be as large as an entry at level 2, or small again.
    pub(crate) fn set_huge(&self, huge: bool) {
        self.huge.store(huge, Ordering::Relaxed);
    }

    /// Two threads will harvest one log.
    pub(crate) fn share(&self, shared: bool) {
        self.shared.store(shared, Ordering::Relaxed);
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    /// One of the threads will be the processor.
    pub(crate) fn run_cpu(&self) {
        self.runs.store(true, Ordering::Relaxed);
    }

    /// The frame behind `gfn` now.
    pub(crate) fn page(&self, gfn: Gfn) -> Pfn {
        let replaced = self.replaced.load(Ordering::Relaxed) >> gfn.get() & 1;
        Pfn::new(MEMORY + replaced * REPLACED + gfn.get())
    }

    /// Does the processor still have a page of `range` that the host took away?
    pub(crate) fn is_stale(&self, range: GfnRange) -> bool {
        let cpu = self.cpu.lock().expect("no panic");
        (range.start.get()..range.end.get())
            .map(Gfn::new)
            .any(|gfn| cpu.tlb[gfn.index_in_slot()].is_some_and(|cached| cached != self.page(gfn)))
    }
}

trait InSlot {
    fn index_in_slot(self) -> usize;
}

impl InSlot for Gfn {
    fn index_in_slot(self) -> usize {
        usize::try_from(self.get()).expect("few")
    }
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
        self.arena.table(frame)
    }

    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta> {
        self.arena.meta(frame)
    }
}

impl TlbFlush for ModelHost {
    type Ticket = (FlushScope, Vec<GfnRange>);

    fn request(&self, batch: &FlushBatch<'_>) -> Self::Ticket {
        (batch.scope, batch.ranges.to_vec())
    }

    fn wait(&self, (scope, ranges): Self::Ticket) {
        let between = self.runs.load(Ordering::Relaxed).then(|| self.accessing.lock());
        let mut cpu = self.cpu.lock().expect("no panic");
        let all = scope == FlushScope::Reload;
        cpu.out |= all;
        for gfn in (0..SLOT_PAGES).map(Gfn::new) {
            if all || ranges.iter().any(|range| range.contains(gfn)) {
                cpu.tlb[gfn.index_in_slot()] = None;
                cpu.hot[gfn.index_in_slot()] = false;
            }
        }
        if all || ranges.iter().any(|range| !range.intersection(BOTH).is_empty()) {
            cpu.upper = None;
        }
        drop(cpu);
        drop(between);
    }
}

impl Trace for ModelHost {}

impl PfnResolver for ModelHost {
    fn resolve(&self, _: &Memslot, gfn: Gfn, _: Access) -> Result<HostPage, ResolveError> {
        let level = if self.huge.load(Ordering::Relaxed) { Level::L2 } else { Level::L1 };
        Ok(HostPage { pfn: self.page(gfn), writable: true, level })
    }
}

/// In which order a walk sets accessed bits. Nothing promises one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    LinksFirst,
    LeafFirst,
}

/// What one access by the processor came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Accessed {
    /// It read, or wrote.
    pub(crate) read: bool,
    pub(crate) wrote: bool,
}

/// A VM with one slot and one root.
pub(crate) struct World<F: SpteFormat> {
    pub(crate) vm: Arc<VmCore<ModelHost>>,
    pub(crate) mmu: Arc<TdpMmu<F, ModelHost>>,
    root: Pfn,
}

impl<F: Modelled> World<F> {
    /// With two vCPUs on one root, ready to fault without taking a lock of the pool, and the right
    /// to change the slot.
    pub(crate) fn new() -> (Arc<Self>, [Vcpu<F>; 2], SlotWriter) {
        Self::with(TdpOptions::default(), LogOptions::default())
    }

    /// The same with other options.
    pub(crate) fn with(
        options: TdpOptions,
        log: LogOptions,
    ) -> (Arc<Self>, [Vcpu<F>; 2], SlotWriter) {
        let config = SpteConfig::<F>::new(F::capabilities()).expect("a baseline");
        let host = ModelHost {
            arena: Arena::with_capacity(14, Pfn::new(1)).expect("memory"),
            replaced: AtomicU64::new(0),
            released: AtomicU64::new(0),
            huge: AtomicBool::new(false),
            shared: AtomicBool::new(false),
            accessing: loom::sync::Mutex::new(()),
            runs: AtomicBool::new(false),
            cpu: Mutex::new(Cpu::default()),
        };
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let (vm, mut slots) = VmCore::with_log(host, 2, limits, relax, log).expect("memory");
        let mmu = TdpMmu::new(Arc::clone(&vm), config, options);
        let mut vcpus = [(); 2].map(|()| TdpVcpu::new(&mmu, 0).expect("room"));
        let request = slot(SLOT_PAGES);
        let _ = mmu.set_slot(&mut slots, vcpus[0].actor(), &request).expect("a good request");
        let mut root = Pfn::new(0);
        for vcpu in &mut vcpus {
            root = vcpu.load_root().expect("frames");
            vcpu.actor().top_up(5).expect("frames");
            // From here on by the thread's copy of the slot.
            let _ = vcpu.actor().find_slot(0, GFN);
        }
        (Arc::new(Self { vm, mmu, root }), vcpus, slots)
    }

    /// The entry for `gfn` as a page walker finds it: from the root, asking nobody. Not present
    /// entries end the walk too.
    fn walk(&self, gfn: Gfn) -> (&SpteCell, Spte, Level) {
        self.walk_from((self.root, self.mmu.config().levels()), gfn)
    }

    fn walk_from(&self, (table, mut level): (Pfn, Level), gfn: Gfn) -> (&SpteCell, Spte, Level) {
        let mut table = self.vm.pool().owned_table(table);
        loop {
            let cell = table.cell(gfn, level);
            let spte = cell.load();
            let Some(below) = level.down().filter(|_| spte.is_table(level)) else {
                return (cell, spte, level);
            };
            table = self.vm.pool().owned_table(spte.pfn());
            level = below;
        }
    }

    /// The leaf for `gfn` when nothing runs.
    pub(crate) fn leaf(&self, gfn: Gfn) -> Option<(Spte, Level)> {
        let (_, spte, level) = self.walk(gfn);
        spte.is_leaf(level).then_some((spte, level))
    }

    /// Change the leaf for `gfn` when nothing runs, as a harvest or an aging pass would have.
    pub(crate) fn adjust(&self, gfn: Gfn, change: impl FnOnce(Spte) -> Spte) {
        let (cell, spte, level) = self.walk(gfn);
        assert!(spte.is_leaf(level));
        cell.try_change(spte, change(spte)).expect("alone");
    }

    /// The processor has the present mappings of `range` in its TLB.
    pub(crate) fn fill_tlb(&self, range: GfnRange) {
        let mut cpu = self.vm.host().cpu.lock().expect("no panic");
        for gfn in (range.start.get()..range.end.get()).map(Gfn::new) {
            cpu.tlb[gfn.index_in_slot()] = self.leaf(gfn).map(|leaf| frame(leaf, gfn));
        }
    }

    /// The level-1 table for [`BOTH`] when nothing runs.
    pub(crate) fn lowest_table(&self) -> Option<Pfn> {
        let mut table = self.root;
        let mut level = self.mmu.config().levels();
        while level > Level::L1 {
            let link = self.vm.pool().owned_table(table).cell(GFN, level).load();
            if !link.is_table(level) {
                return None;
            }
            (table, level) = (link.pfn(), level.below());
        }
        Some(table)
    }

    /// The processor has the entry in its caches that leads to the level-1 table of [`BOTH`], and
    /// will go straight to that table until a flush.
    pub(crate) fn fill_upper(&self) {
        self.vm.host().cpu.lock().expect("no panic").upper = self.lowest_table();
    }

    /// The processor writes to `gfn`; where it may not, it reads.
    pub(crate) fn access(&self, gfn: Gfn) -> Accessed {
        let host = self.vm.host();
        let _accessing = host.accessing.lock().expect("no panic");
        let config = self.mmu.config();
        // One turn more for each change of the entry between its read and its update.
        while !host.cpu.lock().expect("no panic").out {
            let upper = host.cpu.lock().expect("no panic").upper.filter(|_| BOTH.contains(gfn));
            let start = upper.map_or((self.root, config.levels()), |table| (table, Level::L1));
            let (cell, spte, level) = self.walk_from(start, gfn);
            if !spte.is_leaf(level) || !config.is_hw_present(spte) {
                // A fault ends what is cached of the way there.
                host.cpu.lock().expect("no panic").upper = None;
                break;
            }
            let wrote = config.permits(spte, Access::WRITE);
            let bits = if wrote { F::ACCESSED | F::DIRTY } else { F::ACCESSED };
            let after = if config.ad_enabled() { spte.with(bits) } else { spte };
            if spte == after || cell.try_change(spte, after).is_ok() {
                let page = frame((after, level), gfn);
                assert!(host.may_use(gfn, page), "translated to a page that is not the guest's");
                host.cpu.lock().expect("no panic").tlb[gfn.index_in_slot()] = Some(page);
                return Accessed { read: true, wrote };
            }
        }
        Accessed::default()
    }

    /// The processor reads `gfn` with all its caches: through its TLB if that has the page, else by
    /// a walk that starts at the table it has cached, sets A in what it passes, in either order,
    /// and caches what has A. `false` when it faults.
    pub(crate) fn touch(&self, gfn: Gfn, order: Order) -> bool {
        let host = self.vm.host();
        let _accessing = host.accessing.lock().expect("no panic");
        let (config, at) = (self.mmu.config(), gfn.index_in_slot());
        while !host.cpu.lock().expect("no panic").out {
            if host.cpu.lock().expect("no panic").tlb[at].is_some() {
                return true;
            }
            let upper = host.cpu.lock().expect("no panic").upper.filter(|_| BOTH.contains(gfn));
            let start = upper.map_or((self.root, config.levels()), |table| (table, Level::L1));
            let mut passed = self.pass(start, gfn);
            let Some(&(_, leaf, level)) = passed.last() else { break };
            if !leaf.is_leaf(level) || !config.is_hw_present(leaf) {
                // A fault ends what is cached of the way there.
                host.cpu.lock().expect("no panic").upper = None;
                break;
            }
            if order == Order::LeafFirst {
                passed.reverse();
            }
            let has_bit = |level, leaf: Spte| {
                config.has_table_accessed(level) || leaf.is_leaf(level) && config.ad_enabled()
            };
            let marked = passed.iter().filter(|(_, entry, level)| has_bit(*level, *entry)).all(
                |(cell, entry, _)| {
                    let after = entry.with(F::ACCESSED);
                    *entry == after || cell.try_change(*entry, after).is_ok()
                },
            );
            if marked {
                let page = frame((leaf, level), gfn);
                assert!(host.may_use(gfn, page), "translated to a page that is not the guest's");
                let link = passed
                    .iter()
                    .find(|(_, entry, level)| *level == Level::L2 && entry.is_table(Level::L2));
                let mut cpu = host.cpu.lock().expect("no panic");
                cpu.tlb[at] = Some(page);
                if let Some((_, link, _)) = link.filter(|_| BOTH.contains(gfn)) {
                    cpu.upper = Some(link.pfn());
                }
                return true;
            }
        }
        false
    }

    /// The entries that a walk passes, the last one links nothing.
    fn pass(&self, (table, mut level): (Pfn, Level), gfn: Gfn) -> Vec<(&SpteCell, Spte, Level)> {
        let mut table = self.vm.pool().owned_table(table);
        let mut passed = Vec::new();
        loop {
            let cell = table.cell(gfn, level);
            let spte = cell.load();
            passed.push((cell, spte, level));
            let Some(below) = level.down().filter(|_| spte.is_table(level)) else { return passed };
            table = self.vm.pool().owned_table(spte.pfn());
            level = below;
        }
    }

    /// The guest writes to `gfn`, through its TLB if that has the page as written already. Where it
    /// faults, nothing was written; says whether a translation was there.
    ///
    /// # Errors
    /// The fault.
    pub(crate) fn write(&self, gfn: Gfn) -> Result<(), PageFault> {
        let host = self.vm.host();
        let _accessing = host.accessing.lock().expect("no panic");
        let (config, at) = (self.mmu.config(), gfn.index_in_slot());
        if host.cpu.lock().expect("no panic").hot[at] {
            host.cpu.lock().expect("no panic").writes[at] += 1;
            return Ok(());
        }
        loop {
            let (cell, spte, level) = self.walk(gfn);
            let present = spte.is_leaf(level) && config.is_hw_present(spte);
            if !present || !config.permits(spte, Access::WRITE) {
                // The fault drops what is cached for the page.
                host.cpu.lock().expect("no panic").tlb[at] = None;
                return Err(write_fault(gfn, Level::L1, present));
            }
            let bits = if config.ad_enabled() { F::ACCESSED | F::DIRTY } else { 0 };
            if spte == spte.with(bits) || cell.try_change(spte, spte.with(bits)).is_ok() {
                let page = frame((spte, level), gfn);
                assert!(host.may_use(gfn, page), "translated to a page that is not the guest's");
                let mut cpu = host.cpu.lock().expect("no panic");
                (cpu.tlb[at], cpu.hot[at]) = (Some(page), true);
                cpu.writes[at] += 1;
                return Ok(());
            }
        }
    }

    /// How often each page was written.
    pub(crate) fn writes(&self) -> [u64; 4] {
        self.vm.host().cpu.lock().expect("no panic").writes
    }

    /// Copy the pages whose bit `pages` has, between two accesses. Returns the writes that the
    /// copies hold.
    pub(crate) fn copy(&self, pages: u64) -> [u64; 4] {
        let host = self.vm.host();
        let _between = host.accessing.lock().expect("no panic");
        let mut cpu = host.cpu.lock().expect("no panic");
        for at in (0..4).filter(|at| pages >> at & 1 == 1) {
            cpu.copied[at] = cpu.writes[at];
        }
        cpu.copied
    }

    /// The pages whose copy does not hold every write.
    pub(crate) fn stale_copies(&self) -> u64 {
        let cpu = self.vm.host().cpu.lock().expect("no panic");
        (0..4).filter(|&at| cpu.copied[at] != cpu.writes[at]).map(|at| 1 << at).sum()
    }

    /// The tree is sound, the gauges say what stands in it, and the processor has nothing that
    /// should be gone. Returns the leaves by level.
    pub(crate) fn check(&self, vcpu: &mut Vcpu<F>) -> [u64; 3] {
        let tree = self.mmu.check(vcpu.actor()).expect("sound");
        let stats = self.vm.stats();
        let gauges = [Counter::Pages4K, Counter::Pages2M, Counter::Pages1G];
        assert_eq!(tree.leaves, gauges.map(|gauge| stats.get(gauge)), "leaves (I24)");
        assert_eq!(tree.tables, stats.get(Counter::Tables), "tables (I24)");
        assert_eq!(stats.get(Counter::FlushOwed), stats.get(Counter::FlushPaid), "debts");
        assert_eq!(self.vm.notify().in_progress(), 0);
        for gfn in (0..SLOT_PAGES).map(Gfn::new) {
            if let Some(leaf) = self.leaf(gfn) {
                assert_eq!(frame(leaf, gfn), self.vm.host().page(gfn), "taken away (I11)");
            }
        }
        tree.leaves
    }

    /// Give everything back; nothing may be left.
    pub(crate) fn tear_down(&self, vcpus: [Vcpu<F>; 2]) {
        let [mut last, other] = vcpus;
        drop(other);
        last.unload_root();
        let _ = self.mmu.destroy(last.actor());
        drop(last);
        self.vm.pool().poll();
        assert_eq!(self.vm.pool().poll(), 0, "no section is open, so nothing waits");
        assert_eq!(self.vm.pool().frames_in_use(), 0, "frames lost");
        assert_eq!(self.vm.stats().get(Counter::Tables), 0);
    }
}

/// The frame that a leaf has for `gfn`.
pub(crate) fn frame((leaf, level): (Spte, Level), gfn: Gfn) -> Pfn {
    Pfn::new(leaf.pfn().get() + gfn.get() % level.pages())
}

/// The request for the slot with that many pages; 0 deletes it.
pub(crate) fn slot(pages: u64) -> SlotRequest {
    SlotRequest {
        as_id: 0,
        id: 0,
        base: Gpa::new(0),
        bytes: pages * PAGE_SIZE,
        hva: Hva::new(MEMORY * PAGE_SIZE),
        flags: SlotFlags::empty(),
    }
}

/// A write fault on `gfn` that maps at most a page of `level`.
pub(crate) fn write_fault(gfn: Gfn, level: Level, present: bool) -> PageFault {
    let code = if present { PfErrorCode::PRESENT } else { PfErrorCode::empty() };
    PageFault::new(gfn.address(), PfErrorCode::WRITE | code).at_most(level)
}

/// Handle a fault; it must come to one of the outcomes that a race may have.
pub(crate) fn take_fault<F: SpteFormat>(vcpu: &mut Vcpu<F>, fault: &PageFault) -> FaultOutcome {
    let outcome = vcpu.fault(fault).expect("memory and a page are there");
    let known = [FaultOutcome::Fixed, FaultOutcome::Spurious, FaultOutcome::Retry];
    assert!(known.contains(&outcome), "{outcome:?}");
    outcome
}
