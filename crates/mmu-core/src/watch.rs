//! What a VM tells those who watch it: events, and how long its threads wait (KVM rows 3.60, 8.25).
//!
//! Owns the measured forms of what waits: [`VmCore::invalidate`], [`Actor::exclusive`] and its
//! [`ExclusiveWork`]; Shared sections, flushes and slot changes are measured where they stand, in
//! [`crate::vm`]. All of it vanishes at compile time unless the embedder's
//! [`Trace::ENABLED`](crate::trace::Trace::ENABLED) is true.

use crate::addr::GfnRange;
use crate::epoch::Participant;
use crate::latency::Wait;
use crate::lock::Exclusive;
use crate::notify::Invalidation;
use crate::trace::Event;
use crate::traits::Host;
use crate::vm::{Actor, VmCore};

impl<H: Host> VmCore<H> {
    /// Tell who wants to know; nothing is put together if nobody does.
    #[inline(always)]
    pub fn trace(&self, event: impl FnOnce() -> Event) {
        if H::ENABLED {
            self.host().event(&event());
        }
    }

    /// The time, to be given to [`took`](Self::took).
    #[inline(always)]
    #[must_use]
    pub fn now(&self) -> u64 {
        if H::ENABLED { self.host().now() } else { 0 }
    }

    /// Note that the participant with index `participant`, the caller, has spent the time since
    /// `start` on `wait`. A clock that goes back counts as one that stood still.
    #[inline(always)]
    pub fn took(&self, participant: usize, wait: Wait, start: u64) {
        if H::ENABLED {
            let nanos = self.host().now().saturating_sub(start);
            self.latency().note(participant, wait, nanos);
        }
    }

    /// [`Invalidations::begin`](crate::notify::Invalidations::begin), its wait measured.
    #[doc(alias = "kvm_mmu_invalidate_begin")]
    pub fn invalidate(&self, participant: &mut Participant, range: GfnRange) -> Invalidation<'_> {
        let start = self.now();
        let begun = self.notify().begin(participant, range);
        self.took(participant.index(), Wait::Invalidation, start);
        begun
    }
}

impl<H: Host> Actor<H> {
    /// Take the MMU lock exclusively: wait for open Shared sections and keep new ones out.
    pub fn exclusive(&mut self) -> ExclusiveWork<'_, H> {
        let (vm, participant) = self.parts();
        let (index, start) = (participant.index(), vm.now());
        let section = vm.lock().exclusive(participant);
        vm.took(index, Wait::Exclusive, start);
        ExclusiveWork { section, vm, index, since: vm.now() }
    }
}

/// An open Exclusive section; what it lasts is measured.
#[derive(Debug)]
pub struct ExclusiveWork<'a, H: Host> {
    /// The section; ends when this drops.
    pub section: Exclusive<'a>,
    /// The VM.
    pub vm: &'a VmCore<H>,
    index: usize,
    since: u64,
}

impl<H: Host> Drop for ExclusiveWork<'_, H> {
    fn drop(&mut self) {
        self.vm.took(self.index, Wait::ExclusiveHeld, self.since);
    }
}
