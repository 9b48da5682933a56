//! The embedder: what the crates ask of a hypervisor, on bare metal.
//!
//! Owns [`BareHost`]: table frames in a direct map, shootdown by doorbells with completion, and the
//! page behind a guest page; and [`Gates`], where a vCPU and a flush meet. `vcpu.rs` is the other
//! half. Lock: the free frames', a leaf.

use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

use mmu_core::access::Access;
use mmu_core::addr::{Gfn, Level, Pfn};
use mmu_core::flush::{FlushBatch, FlushScope};
use mmu_core::frame::{FrameMeta, PageTable, PhysMap};
use mmu_core::slot::Memslot;
use mmu_core::traits::{HostPage, PfnResolver, ResolveError, TlbFlush, Trace};

use crate::machine::cpu;
use crate::machine::lock::Lock;
use crate::machine::memory::{Memory, PAGE};
use crate::virt::LocalFlush;

/// Words of a table.
const ENTRIES: usize = 512;

/// As many vCPUs as a VM may have.
pub const MAX_VCPUS: usize = 16;

/// What a vCPU is told to forget before it enters.
const NOTHING: u8 = 0;
const CONTEXT: u8 = 1;
const ALL: u8 = 2;

/// One vCPU's meeting point with those who flush.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Gate {
    /// Odd while the vCPU may be in the guest.
    inside: AtomicU64,
    /// What it must forget before it is.
    stale: AtomicU8,
    /// The CPU that it runs on.
    cpu: AtomicU8,
}

/// The gates of a VM's vCPUs.
#[derive(Debug, Default)]
pub struct Gates([Gate; MAX_VCPUS]);

impl Gates {
    /// Announce entry; what must be forgotten first. After this ask whether the root is current,
    /// and [`leave`](Self::leave) if it is not.
    pub fn enter(&self, vcpu: usize) -> Option<LocalFlush> {
        let gate = &self.0[vcpu];
        gate.cpu.store(cpu::current() as u8, Ordering::Relaxed);
        gate.inside.fetch_add(1, Ordering::AcqRel);
        // Pairs with the fence in `shoot`: either we see what is stale (and that the root is not
        // current), or they see us inside and ring.
        fence(Ordering::SeqCst);
        match gate.stale.swap(NOTHING, Ordering::AcqRel) {
            NOTHING => None,
            CONTEXT => Some(LocalFlush::Context),
            _ => Some(LocalFlush::All),
        }
    }

    /// Announce exit.
    pub fn leave(&self, vcpu: usize) {
        self.0[vcpu].inside.fetch_add(1, Ordering::Release);
    }

    /// Tell every vCPU to forget `what`, and ring at those that are inside.
    fn shoot(&self, what: u8) -> [u64; MAX_VCPUS] {
        for gate in &self.0 {
            gate.stale.fetch_max(what, Ordering::AcqRel);
        }
        fence(Ordering::SeqCst);
        let seen = core::array::from_fn(|vcpu| self.0[vcpu].inside.load(Ordering::Acquire));
        let inside = self.0.iter().zip(&seen).filter(|(_, seen)| *seen % 2 == 1);
        inside.for_each(|(gate, _)| cpu::ring(gate.cpu.load(Ordering::Relaxed).into()));
        seen
    }

    /// Wait until every vCPU that was inside has left once: it flushes before it is back.
    fn wait(&self, seen: [u64; MAX_VCPUS]) {
        for (gate, seen) in self.0.iter().zip(seen).filter(|(_, seen)| seen % 2 == 1) {
            while gate.inside.load(Ordering::Acquire) == seen {
                core::hint::spin_loop();
            }
        }
    }
}

/// The embedder of one VM.
pub struct BareHost {
    /// The table frames, all of them.
    tables: Memory,
    metas: Vec<FrameMeta>,
    free: Lock<Vec<Pfn>>,
    /// Where vCPUs and flushes meet.
    pub gates: Gates,
}

impl BareHost {
    /// With memory for `frames` tables.
    pub fn new(frames: u64) -> Self {
        let tables = Memory::new(frames * PAGE);
        let count = tables.bytes() / PAGE;
        let free = (0..count).rev().map(|index| Pfn::new(tables.first().get() + index)).collect();
        let metas = (0..count).map(|_| FrameMeta::new()).collect();
        Self { tables, metas, free: Lock::new(free), gates: Gates::default() }
    }

    /// The word of entry `index` in the table at `frame`: for suites that break tables on purpose.
    pub fn entry(&self, frame: Pfn, index: usize) -> &AtomicU64 {
        &self.tables.words()[self.index(frame) * ENTRIES + index]
    }

    fn index(&self, frame: Pfn) -> usize {
        let index = frame.get().wrapping_sub(self.tables.first().get());
        assert!(index < self.metas.len() as u64, "{frame:?} is no table frame of this host");
        index as usize
    }
}

// SAFETY: clause by clause.
//   1. A frame is in `free` or given out, under the lock; `tables` belongs to this host alone, and
//      is seen as atomic words by all, CPUs and suites included.
//   2. The frames are page-aligned RAM in the direct map, zeroed when `tables` was made, and stay
//      until `self` drops; each has a meta of its own in `metas`, which never grows.
//   3. `index` panics for any number outside `tables`.
//   4. `tables` and the buffer of `metas` do not move with `self`.
unsafe impl PhysMap for BareHost {
    fn provide(&self) -> Option<Pfn> {
        self.free.lock().pop()
    }

    fn reclaim(&self, frame: Pfn) {
        self.free.lock().push(frame);
    }

    fn table(&self, frame: Pfn) -> NonNull<PageTable> {
        let words = ENTRIES * self.index(frame);
        NonNull::from(&self.tables.words()[words..words + ENTRIES]).cast()
    }

    fn meta(&self, frame: Pfn) -> NonNull<FrameMeta> {
        NonNull::from(&self.metas[self.index(frame)])
    }
}

impl TlbFlush for BareHost {
    type Ticket = [u64; MAX_VCPUS];

    fn request(&self, batch: &FlushBatch<'_>) -> Self::Ticket {
        // A processor forgets nested translations by the context, not by the guest's page.
        let reload = batch.scope == FlushScope::Reload;
        self.gates.shoot(if reload { ALL } else { CONTEXT })
    }

    fn wait(&self, ticket: Self::Ticket) {
        self.gates.wait(ticket);
    }

    fn sync_hardware_log(&self) {
        self.gates.wait(self.gates.shoot(NOTHING));
    }
}

impl PfnResolver for BareHost {
    /// A slot's host address is a physical address: the direct map, whose memory is in one piece.
    fn resolve(&self, slot: &Memslot, gfn: Gfn, _: Access) -> Result<HostPage, ResolveError> {
        let hva = slot.hva_of(gfn).ok_or(ResolveError::NoMemory)?;
        let pfn = Pfn::new(hva.get() / PAGE);
        Ok(HostPage { pfn, writable: true, level: Level::MAX_LEAF })
    }
}

impl Trace for BareHost {}
