//! An embedder that watches: [`Watched`] is [`TestHost`] with a recording [`Trace`] and a clock
//! that stands still unless a test moves it, so that waits have exact lengths.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Pfn};
use mmu_core::flush::FlushBatch;
use mmu_core::frame::{FrameMeta, PageTable, PhysMap};
use mmu_core::latency::{Latency, Wait};
use mmu_core::slot::{Memslot, SlotFlags, SlotLimits, SlotWriter};
use mmu_core::spte::{Capabilities, SpteConfig, SpteFormat};
use mmu_core::trace::Event;
use mmu_core::traits::{HostPage, PfnResolver, ResolveError, TlbFlush, Trace};
use mmu_core::vm::{Actor, VmCore};
use tdp_mmu::{TdpMmu, TdpOptions, TdpVcpu};

use super::{BASE, Batch, DATA, TestHost, request};

/// See the file's head.
pub struct Watched {
    pub inner: TestHost,
    pub clock: AtomicU64,
    events: Mutex<Vec<Event>>,
}

impl Watched {
    /// Let time pass.
    pub fn pass(&self, nanos: u64) {
        self.clock.fetch_add(nanos, Ordering::SeqCst);
    }

    /// Events since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap())
    }
}

impl Trace for Watched {
    const ENABLED: bool = true;

    fn event(&self, event: &Event) {
        self.events.lock().unwrap().push(*event);
    }

    fn now(&self) -> u64 {
        self.clock.load(Ordering::SeqCst)
    }
}

// SAFETY: every clause is the inner host's, which this forwards to.
unsafe impl PhysMap for Watched {
    fn provide(&self) -> Option<Pfn> {
        self.inner.provide()
    }

    fn reclaim(&self, frame: Pfn) {
        self.inner.reclaim(frame);
    }

    fn table(&self, frame: Pfn) -> NonNull<PageTable> {
        self.inner.table(frame)
    }

    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta> {
        self.inner.meta(frame)
    }
}

impl TlbFlush for Watched {
    type Ticket = Batch;

    fn request(&self, batch: &FlushBatch<'_>) -> Batch {
        self.inner.request(batch)
    }

    fn wait(&self, batch: Batch) {
        self.inner.wait(batch);
    }
}

impl PfnResolver for Watched {
    fn resolve(&self, slot: &Memslot, gfn: Gfn, want: Access) -> Result<HostPage, ResolveError> {
        self.inner.resolve(slot, gfn, want)
    }
}

/// A VM with one vCPU on a [`Watched`] host, its root loaded.
pub struct WatchedGuest<F: SpteFormat> {
    pub mmu: Arc<TdpMmu<F, Watched>>,
    pub slots: SlotWriter,
    pub actor: Actor<Watched>,
    pub vcpu: TdpVcpu<F, Watched>,
}

impl<F: SpteFormat> WatchedGuest<F> {
    /// With a slot of `pages` pages at `BASE`, backed from `DATA`; nothing recorded yet.
    pub fn new(caps: Capabilities, pages: u64) -> Self {
        let config = SpteConfig::<F>::new(caps).expect("capabilities");
        let inner = TestHost::new(512);
        let host = Watched { inner, clock: AtomicU64::new(1), events: Mutex::default() };
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let (vm, slots) = VmCore::new(host, 8, limits, std::thread::yield_now).expect("a VM");
        let mmu = TdpMmu::new(vm, config, TdpOptions::default());
        let actor = mmu.vm().actor().expect("room");
        let mut vcpu = TdpVcpu::new(&mmu, 0).expect("room");
        vcpu.load_root().expect("a frame for the root");
        let mut guest = Self { mmu, slots, actor, vcpu };
        guest.slot(0, BASE, pages, SlotFlags::empty());
        let _ = guest.host().take_events();
        guest
    }

    pub fn host(&self) -> &Watched {
        self.mmu.vm().host()
    }

    /// A slot, backed by the frames that follow `DATA` as it follows `BASE`.
    pub fn slot(&mut self, id: u16, base: u64, pages: u64, flags: SlotFlags) {
        let request = request(id, base, pages, DATA + base - BASE, flags);
        let _ = self.mmu.set_slot(&mut self.slots, &mut self.actor, &request).expect("legal");
    }

    pub fn latency(&self, wait: Wait) -> Latency {
        self.mmu.vm().latency().get(wait)
    }
}
