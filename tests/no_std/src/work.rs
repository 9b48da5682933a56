//! The crates at work. Each function is one piece; an error names what did not hold.

use alloc::vec::Vec;
use core::ptr::NonNull;

use mmu_core::access::{Access, EptViolation, PfErrorCode};
use mmu_core::addr::{Gfn, GfnRange, Gpa, Hva, Level, Pfn};
use mmu_core::fault::{FaultOutcome, PageFault};
use mmu_core::flush::FlushBatch;
use mmu_core::frame::{Arena, FrameMeta, PageTable, PhysMap};
use mmu_core::slot::{Memslot, SlotFlags, SlotLimits, SlotRequest};
use mmu_core::spte::{Capabilities, Ept, SpteConfig};
use mmu_core::stats::Counter;
use mmu_core::sync::relax;
use mmu_core::traits::{
    AgeMode, AgeRange, AgeRequest, CountOnly, HostPage, PfnResolver, ResolveError, TlbFlush, Trace,
};
use mmu_core::vm::VmCore;
use tdp_mmu::{TdpMmu, TdpOptions, TdpVcpu};

use lru_age as _;
use shadow_mmu as _;

type Checked = Result<u32, &'static str>;

fn ensure(holds: bool, what: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(what) }
}

/// Everything; the number of checks that held.
pub(crate) fn all() -> Checked {
    Ok(addresses()? + faults()? + paging()?)
}

/// Address arithmetic, and the heap by way of a `Vec`.
fn addresses() -> Checked {
    let range = GfnRange::from_len(Gfn::new(0x1ff), 1024);
    let blocks: Vec<Gfn> = (range.start.get()..range.end.get())
        .map(Gfn::new)
        .filter(|gfn| gfn.is_aligned(Level::L2))
        .collect();
    ensure(blocks == [Gfn::new(0x200), Gfn::new(0x400)], "2M boundaries of a range")?;
    ensure(Gfn::containing(Gpa::new(0x12_3456)).get() == 0x123, "page of an address")?;
    Ok(2)
}

/// Decoding of what hardware reports.
fn faults() -> Checked {
    let code = EptViolation::from_bits_retain(0x18a).to_error_code();
    ensure(code.access() == Access::WRITE, "access of an EPT violation")?;
    ensure(code.contains(PfErrorCode::PRESENT), "presence of an EPT violation")?;
    Ok(2)
}

/// An embedder without TLBs: nothing to flush.
struct Host {
    arena: Arena,
}

// SAFETY: every clause is the arena's, which this forwards to.
unsafe impl PhysMap for Host {
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

impl TlbFlush for Host {
    type Ticket = ();

    fn request(&self, _: &FlushBatch<'_>) {}

    fn wait(&self, (): ()) {}
}

impl Trace for Host {}

impl PfnResolver for Host {
    fn resolve(&self, slot: &Memslot, gfn: Gfn, _: Access) -> Result<HostPage, ResolveError> {
        let hva = slot.hva_of(gfn).ok_or(ResolveError::NoMemory)?;
        let pfn = Pfn::new(hva.get() >> 12);
        Ok(HostPage { pfn, writable: true, level: Level::L2 })
    }
}

/// A VM from its first fault to its end: map, age, unmap, give everything back.
fn paging() -> Checked {
    const BASE: u64 = 0x10_0000;
    const PAGES: u64 = 1024;
    let config = SpteConfig::<Ept>::new(Capabilities::ept()).map_err(|_| "a configuration")?;
    let arena = Arena::with_capacity(64, Pfn::new(0x1000)).map_err(|_| "an arena")?;
    let limits = SlotLimits::new(1, config.max_gfn_exclusive());
    let (vm, mut slots) = VmCore::new(Host { arena }, 4, limits, relax).map_err(|_| "a VM")?;
    let mmu = TdpMmu::new(vm, config, TdpOptions::default());
    let mut actor = mmu.vm().actor().map_err(|_| "an actor")?;
    let mut vcpu = TdpVcpu::new(&mmu, 0).map_err(|_| "a vCPU")?;
    let request = SlotRequest {
        as_id: 0,
        id: 0,
        base: Gfn::new(BASE).address(),
        bytes: PAGES << 12,
        hva: Hva::new(0x8000_0000),
        flags: SlotFlags::empty(),
    };
    let _ = mmu.set_slot(&mut slots, &mut actor, &request).map_err(|_| "a slot")?;
    vcpu.load_root().map_err(|_| "a root")?;

    let fault = |gfn| PageFault::new(Gfn::new(gfn).address(), PfErrorCode::WRITE);
    let small = vcpu.fault(&fault(BASE + 3).at_most(Level::L1));
    ensure(small == Ok(FaultOutcome::Fixed), "a fault maps a page")?;
    let again = vcpu.fault(&fault(BASE + 3).at_most(Level::L1));
    ensure(again == Ok(FaultOutcome::Spurious), "and only once")?;
    let huge = vcpu.fault(&fault(BASE + 512));
    ensure(huge == Ok(FaultOutcome::Fixed), "a fault maps a huge page")?;

    let mut age = |mode| {
        let request = AgeRequest::new(GfnRange::ALL, mode);
        mmu.age(&mut actor, request, &mut CountOnly)
    };
    ensure(age(AgeMode::Clear).young == 513, "both pages are young")?;
    ensure(age(AgeMode::Test).young == 0, "and then old")?;

    let report = mmu.unmap(&mut actor, GfnRange::from_len(Gfn::new(BASE), 4));
    ensure(report.leaves == [1, 0, 0], "an unmap takes the page of its range")?;
    let count = mmu.check(&mut actor).map_err(|_| "a well-formed tree")?;
    ensure(count.leaves == [0, 1, 0], "and leaves the other")?;

    drop(vcpu);
    let rest = mmu.destroy(&mut actor);
    ensure(rest.pages() == 512, "the end finds what was left")?;
    drop(actor);
    ensure(mmu.vm().pool().frames_in_use() == 0, "no table is left")?;
    ensure(mmu.vm().stats().get(Counter::Tables) == 0, "none is counted")?;
    Ok(10)
}
