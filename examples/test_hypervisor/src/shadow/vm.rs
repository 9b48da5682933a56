//! A VM whose tables are shadows: of its guest's own, or of those that a guest hypervisor made.
//!
//! Owns [`ShadowVm`] and [`Writer`], the mutex that the crate asks the embedder for. Locks: the
//! slot writer's, taken by CPU 0, and `Writer`. A CPU that holds `Writer` may wait until others
//! have left their guests: nobody takes it between the announcement at a gate and the exit.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use mmu_core::addr::{GfnRange, Gpa, Hva};
use mmu_core::slot::{SlotFlags, SlotLimits, SlotRequest, SlotWriter};
use mmu_core::spte::{Capabilities, SpteConfig, SpteFormat};
use mmu_core::vm::{Actor, VmCore};
use shadow_mmu::{
    ShadowCount, ShadowFlaw, ShadowMmu, ShadowStats, ShadowWriter, ShadowZap, WriterLock,
};

use super::ram::Ram;
use crate::guest::layout::{DATA_SLOT, LOW_SLOT};
use crate::guest::system;
use crate::host::{BareHost, MAX_VCPUS};
use crate::machine::lock::Lock;
use crate::machine::memory::Memory;

/// Table frames of a VM.
const FRAMES: u64 = 1024;
/// Threads that use a VM besides its vCPUs.
const OTHERS: usize = 4;
/// Shadow pages that a VM may have, unless a suite wants fewer.
pub const QUOTA: u32 = 800;

/// The writer's mutex.
pub struct Writer<F: SpteFormat>(Lock<ShadowWriter<F, BareHost>>);

impl<F: SpteFormat> WriterLock<F, BareHost> for Writer<F> {
    fn with<R>(&self, work: impl FnOnce(&mut ShadowWriter<F, BareHost>) -> R) -> R {
        work(&mut self.0.lock())
    }
}

/// A VM with shadow tables in format `F`.
pub struct ShadowVm<F: SpteFormat> {
    /// Its tables.
    pub mmu: Arc<ShadowMmu<F, BareHost>>,
    /// The right to change them.
    pub writer: Writer<F>,
    /// Its memory.
    pub ram: Arc<Ram>,
    _slots: SlotWriter,
}

impl<F: SpteFormat> ShadowVm<F> {
    /// A VM with tables of `caps` and `bytes` of data, the guest's system in place, nothing mapped.
    pub fn new(caps: Capabilities, bytes: u64) -> Arc<Self> {
        let ram = Arc::new(Ram::new(bytes));
        system::prepare(&ram);
        Self::over(caps, ram, QUOTA)
    }

    /// The same over memory that is there.
    pub fn over(caps: Capabilities, ram: Arc<Ram>, quota: u32) -> Arc<Self> {
        let config = SpteConfig::new(caps).unwrap_or_else(|error| panic!("{error}"));
        let limits = SlotLimits::new(1, config.max_gfn_exclusive());
        let host = BareHost::new(FRAMES);
        let core = VmCore::new(host, MAX_VCPUS + OTHERS, limits, core::hint::spin_loop);
        let (core, mut slots) = core.unwrap_or_else(|error| panic!("{error}"));
        let mut actor = core.actor().unwrap_or_else(|error| panic!("{error}"));
        for (id, memory) in [(LOW_SLOT, &ram.low), (DATA_SLOT, &ram.data)] {
            // Nothing is mapped where there was no slot.
            let made = core.set_slot(&mut slots, &mut actor, &slot(id, memory), |_, _| {});
            let _ = made.unwrap_or_else(|error| panic!("slot {id}: {error}"));
        }
        drop(actor);
        let (mmu, writer) = ShadowMmu::create(core, config, quota);
        Arc::new(Self { mmu, writer: Writer(Lock::new(writer)), ram, _slots: slots })
    }

    /// A handle for a CPU that is no vCPU at the moment.
    pub fn actor(&self) -> Actor<BareHost> {
        self.mmu.vm().actor().unwrap_or_else(|error| panic!("{error}"))
    }

    /// Write `value` to `gpa` as the emulator does: whoever has a shadow of it is told.
    pub fn write(&self, actor: &mut Actor<BareHost>, gpa: u64, value: u64) {
        self.ram.at(gpa).store(value, Ordering::Release);
        self.writer.with(|writer| writer.guest_wrote(actor, Gpa::new(gpa), 8));
    }

    /// Take pages back, and let `look` see what is left while nobody can map them again.
    pub fn unmap(
        &self,
        actor: &mut Actor<BareHost>,
        range: GfnRange,
        look: impl FnOnce(),
    ) -> ShadowZap {
        let vm = Arc::clone(self.mmu.vm());
        let invalidation = vm.invalidate(actor.participant(), range);
        let gone = self.mmu.unmap_in(actor, &self.writer, &invalidation, range);
        look();
        gone
    }

    /// Drop every shadow page: at once for the guests, then a bit at a time.
    pub fn drop_everything(&self, actor: &mut Actor<BareHost>) {
        self.writer.with(|writer| writer.invalidate_all(actor));
        while self.writer.with(|writer| writer.zap_obsolete(actor)) {}
    }

    /// Give up to `count` shadow pages back; how many went.
    pub fn shrink(&self, actor: &mut Actor<BareHost>, count: u32) -> u32 {
        self.writer.with(|writer| writer.shrink(actor, count))
    }

    /// Let there be at most `quota` shadow pages from now on.
    pub fn set_quota(&self, quota: u32) {
        self.writer.with(|writer| writer.set_quota(quota));
    }

    /// Shadow pages that there are.
    pub fn live_pages(&self) -> u32 {
        self.writer.with(|writer| writer.live_pages())
    }

    /// What was counted so far.
    pub fn stats(&self) -> ShadowStats {
        self.writer.with(|writer| *writer.stats())
    }

    /// Do all tables, lists and counts agree?
    pub fn check(&self, actor: &mut Actor<BareHost>) -> Result<ShadowCount, ShadowFlaw> {
        self.writer.with(|writer| writer.check(actor))
    }

    /// End: everything is given back. Returns shadow pages and frames that are left, which none
    /// are. The vCPUs have gone.
    pub fn end(&self) -> (u32, u64) {
        let mut actor = self.actor();
        self.drop_everything(&mut actor);
        let live = self.live_pages();
        drop(actor);
        let pool = self.mmu.vm().pool();
        // No section is open: two grace periods pass at once.
        for _ in 0..4 {
            pool.poll();
        }
        (live, pool.frames_in_use() + pool.frames_waiting())
    }
}

/// All of `memory`, at the guest physical addresses that are its own.
pub fn slot(id: u16, memory: &Memory) -> SlotRequest {
    let (base, hva) = (Gpa::new(memory.start()), Hva::new(memory.start()));
    SlotRequest { as_id: 0, id, base, bytes: memory.bytes(), hva, flags: SlotFlags::empty() }
}
