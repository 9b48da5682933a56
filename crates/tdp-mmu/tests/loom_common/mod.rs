//! What the models share: running one, a small VM, and a processor that walks its tables.

use core::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as Plain, Ordering as Std};

use loom::sync::Mutex;
use mmu_core::access::{Access, PfErrorCode};
use mmu_core::addr::{Gfn, Gpa, Hva, Level, PAGE_SIZE, Pfn};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::flush::{FlushBatch, FlushScope};
use mmu_core::frame::{Arena, FrameMeta, PageTable, PhysMap};
use mmu_core::slot::{Memslot, SlotFlags, SlotLimits, SlotRequest};
use mmu_core::spte::{Capabilities, SpteConfig, SpteFormat};
use mmu_core::stats::Counter;
use mmu_core::sync::{AtomicU64, Ordering, relax};
use mmu_core::traits::{HostPage, PfnResolver, ResolveError, TlbFlush};
use mmu_core::vm::{Actor, VmCore};
use tdp_mmu::{TdpMmu, TdpOptions, TdpVcpu};

/// The page that the models are about.
pub(crate) const GFN: Gfn = Gfn::new(1);

/// Frames of the page before and after [`ModelHost::replace_page`].
const PAGES: [u64; 2] = [0x100, 0x200];

/// Run every interleaving of `body` and report how many there were.
pub(crate) fn explore(name: &str, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = None;
    builder.max_branches = 100_000;
    let executions = Arc::new(Plain::new(0));
    let counted = Arc::clone(&executions);
    builder.check(move || {
        counted.fetch_add(1, Std::Relaxed);
        body();
    });
    println!("MODEL tdp_{name} executions={} bound=none", executions.load(Std::Relaxed));
}

/// The embedder: an arena, a host page that can change, and the processor's side of flushes.
pub(crate) struct ModelHost {
    arena: Arena,
    /// Times the host replaced the page.
    replaced: AtomicU64,
    /// Held by the processor during an access. Holds: was it told to leave?
    cpu: Mutex<bool>,
}

impl ModelHost {
    /// The host gives another page to the guest.
    pub(crate) fn replace_page(&self) {
        self.replaced.fetch_add(1, Ordering::AcqRel);
    }

    /// The page that the guest has now.
    pub(crate) fn page(&self) -> Pfn {
        let index = usize::from(self.replaced.load(Ordering::Acquire) > 0);
        Pfn::new(PAGES[index])
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
    type Ticket = FlushScope;

    fn request(&self, batch: &FlushBatch<'_>) -> FlushScope {
        batch.scope
    }

    fn wait(&self, scope: FlushScope) {
        // The processor is between two accesses when this is ours.
        let mut out = self.cpu.lock().expect("no panic");
        *out |= scope == FlushScope::Reload;
    }
}

impl PfnResolver for ModelHost {
    fn resolve(&self, _: &Memslot, _: Gfn, _: Access) -> Result<HostPage, ResolveError> {
        Ok(HostPage { pfn: self.page(), writable: true, level: Level::L1 })
    }
}

/// A VM with one slot and one root.
pub(crate) struct World<F: SpteFormat> {
    pub(crate) vm: Arc<VmCore<ModelHost>>,
    pub(crate) mmu: Arc<TdpMmu<F, ModelHost>>,
    root: Pfn,
}

impl<F: SpteFormat> World<F> {
    /// The smallest tree the format has; A/D bits by hardware but for EPT, which is access-tracked.
    pub(crate) fn new() -> Self {
        let capabilities = match F::NAME {
            name if name == mmu_core::spte::Ept::NAME => {
                Capabilities { accessed_dirty: false, ..Capabilities::ept() }
            }
            _ => Capabilities::pae(),
        };
        let config = SpteConfig::<F>::new(capabilities).expect("a baseline");
        let host = ModelHost {
            arena: Arena::with_capacity(24, Pfn::new(1)).expect("memory"),
            replaced: AtomicU64::new(0),
            cpu: Mutex::new(false),
        };
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let (vm, mut slots) = VmCore::new(host, 5, limits, relax).expect("memory");
        let mmu = TdpMmu::new(Arc::clone(&vm), config, TdpOptions::default());
        let mut actor = vm.actor().expect("room");
        let request = SlotRequest {
            as_id: 0,
            id: 0,
            base: Gpa::new(0),
            bytes: 4 * PAGE_SIZE,
            hva: Hva::new(0x10_0000),
            flags: SlotFlags::empty(),
        };
        let _ = mmu.set_slot(&mut slots, &mut actor, &request).expect("a good request");
        let mut vcpu = TdpVcpu::new(&mmu, 0).expect("room");
        let root = vcpu.load_root().expect("frames");
        drop(vcpu);
        Self { vm, mmu, root }
    }

    /// A vCPU on the root, its frame cache full, so that a fault takes no pool lock.
    pub(crate) fn vcpu(&self) -> TdpVcpu<F, ModelHost> {
        let mut vcpu = TdpVcpu::new(&self.mmu, 0).expect("room");
        vcpu.load_root().expect("the root exists");
        vcpu.actor().top_up(5).expect("frames");
        let _ = vcpu.actor().find_slot(0, GFN);
        vcpu
    }

    /// Map the page, then clear A and D (or track it), as a harvest and an aging pass would.
    pub(crate) fn map_clean(&self, vcpu: &mut TdpVcpu<F, ModelHost>) {
        let fault = PageFault::new(GFN.address(), PfErrorCode::WRITE);
        assert_eq!(vcpu.fault(&fault), Ok(FaultOutcome::Fixed));
        let (cell, spte) = self.leaf().expect("just mapped");
        let config = self.mmu.config();
        let clean = if config.ad_enabled() { config.clear_dirty(spte) } else { spte };
        cell.try_change(spte, config.age(clean)).expect("alone");
    }

    /// The leaf's cell as a page walker finds it: through the frames, asking nobody.
    fn leaf(&self) -> Option<(&mmu_core::spte::cell::SpteCell, mmu_core::spte::Spte)> {
        let mut table = self.vm.pool().owned_table(self.root);
        let mut level = self.mmu.config().levels();
        loop {
            let cell = table.cell(GFN, level);
            let spte = cell.load();
            if !self.mmu.config().is_hw_present(spte) && !spte.is_leaf(level) {
                return None;
            }
            if spte.is_leaf(level) {
                return Some((cell, spte));
            }
            table = self.vm.pool().owned_table(spte.pfn());
            level = level.down()?;
        }
    }

    /// The processor writes to the page: did it get through?
    pub(crate) fn cpu_write(&self) -> bool {
        let out = self.vm.host().cpu.lock().expect("no panic");
        if *out {
            return false;
        }
        let config = self.mmu.config();
        // As often as somebody changes the entry between its read and its update.
        while let Some((cell, spte)) = self.leaf() {
            if !config.permits(spte, Access::WRITE) {
                return false;
            }
            if !config.ad_enabled() {
                return false;
            }
            let after = spte.with(F::ACCESSED | F::DIRTY);
            if spte == after || cell.try_change(spte, after).is_ok() {
                return true;
            }
        }
        false
    }

    /// The tree is sound and the gauges say what stands in it.
    pub(crate) fn check(&self, actor: &mut Actor<ModelHost>) {
        let tree = self.mmu.check(actor).expect("sound");
        let stats = self.vm.stats();
        assert_eq!(tree.leaves[0], stats.get(Counter::Pages4K));
        assert_eq!(tree.tables, stats.get(Counter::Tables));
    }

    /// Give everything back; nothing may be left.
    pub(crate) fn tear_down(&self) {
        let mut actor = self.vm.actor().expect("room");
        let _ = self.mmu.destroy(&mut actor);
        drop(actor);
        self.vm.pool().poll();
        assert_eq!(self.vm.pool().poll(), 0, "frames still wait");
        assert_eq!(self.vm.pool().frames_in_use(), 0, "frames leaked");
        let stats = self.vm.stats();
        assert_eq!(stats.get(Counter::FlushOwed), stats.get(Counter::FlushPaid));
    }
}
