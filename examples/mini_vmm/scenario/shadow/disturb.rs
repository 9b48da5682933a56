//! A host that has plans of its own: it takes guest pages back, wants tables back, drops all of
//! them, and ages the guest's memory, while the guest runs. The guest must not notice.
//!
//! What takes entries away happens between two exits: the stub by which a vCPU of /dev/kvm leaves
//! its guest is mapped by the same tables, and must be when an exception comes. Aging takes nothing
//! away and has a thread of its own, which takes no lock either. It begins a pass when the guest
//! has exited again, and no sooner: on /dev/kvm a flush costs the guest what it had mapped, and one
//! after the other they would leave it no time to do anything.

use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};
use std::thread::JoinHandle;

use mmu_core::addr::{Gfn, GfnRange};
use mmu_core::spte::Legacy;
use mmu_core::traits::{AgeMode, AgeRange, AgeRequest, CountOnly};
use mmu_core::vm::Actor;
use mmu_model::Random;
use shadow_mmu::{ShadowMmu, ShadowZap, WriterLock};

use super::vm::Lock;
use crate::host::{DATA_GFN, VmmHost};
use crate::vmm::Error;

type Mmu = Arc<ShadowMmu<Legacy, VmmHost>>;

/// Of so many exits the host does something at one.
const SELDOM: u64 = 24;
/// Pages that it takes back at once, at most.
const TAKEN: u64 = 256;

/// What it did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disturbed {
    /// Leaves unmapped.
    pub unmapped: u64,
    /// Tables given up for the host.
    pub shrunk: u64,
    /// Times that all tables became obsolete.
    pub dropped: u64,
    /// Leaves found young by the thread that ages.
    pub aged: u64,
}

/// The host.
pub struct Disturbance {
    mmu: Mmu,
    actor: Actor<VmmHost>,
    random: Random,
    pages: u64,
    done: Disturbed,
    /// Told of exits; ends when nobody can tell it any more.
    ager: Option<(SyncSender<()>, JoinHandle<u64>)>,
}

impl Disturbance {
    /// Begin to disturb a guest of `pages` pages.
    pub fn begin(mmu: &Mmu, seed: u64, pages: u64) -> Result<Self, Error> {
        let (exits, exited) = mpsc::sync_channel(1);
        let aged = Arc::clone(mmu);
        let mut actor = mmu.vm().actor()?;
        let ager = std::thread::spawn(move || {
            let memory = GfnRange::from_len(Gfn::new(DATA_GFN), pages);
            let mut young = 0;
            while exited.recv().is_ok() {
                let request = AgeRequest::new(memory, AgeMode::ClearFlush);
                young += aged.age(&mut actor, request, &mut CountOnly).young;
            }
            young
        });
        Ok(Self {
            mmu: Arc::clone(mmu),
            actor: mmu.vm().actor()?,
            random: Random::new(seed),
            pages,
            done: Disturbed::default(),
            ager: Some((exits, ager)),
        })
    }

    /// After an exit.
    pub fn act(&mut self, lock: &Lock) {
        if let Some((exits, _)) = &self.ager {
            // Full: it is still busy with an earlier one.
            let _ = exits.try_send(());
        }
        if !self.random.chance(1, SELDOM) {
            return;
        }
        match self.random.below(16) {
            0 => {
                self.done.dropped += 1;
                lock.with(|writer| writer.invalidate_all(&mut self.actor));
            }
            1..4 => while lock.with(|writer| writer.zap_obsolete(&mut self.actor)) {},
            4..9 => {
                let wanted = 1 + self.random.below(8) as u32;
                let gone = lock.with(|writer| writer.shrink(&mut self.actor, wanted));
                self.done.shrunk += u64::from(gone);
            }
            _ => {
                // Mostly where the guest's tables and small pages are.
                let part = if self.random.chance(3, 4) { 8 } else { 1 };
                let first = DATA_GFN + self.random.below(self.pages / part);
                let last = first + self.random.below(TAKEN);
                let range = GfnRange::new(Gfn::new(first), Gfn::new(last + 1));
                self.done.unmapped += self.take_back(lock, range).leaves;
            }
        }
    }

    fn take_back(&mut self, lock: &Lock, range: GfnRange) -> ShadowZap {
        let vm = Arc::clone(self.mmu.vm());
        let invalidation = vm.notify().begin(self.actor.participant(), range);
        self.mmu.unmap_in(&mut self.actor, lock, &invalidation, range)
    }

    /// Leave the guest alone from now on; what was done.
    pub fn end(mut self) -> Result<Disturbed, Error> {
        let mut done = self.done;
        if let Some((exits, ager)) = self.ager.take() {
            drop(exits);
            done.aged = ager.join().map_err(|_| "the thread that ages panicked")?;
        }
        Ok(done)
    }
}
