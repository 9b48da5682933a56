//! ASIDs: which one a vCPU runs under, and when all must go.
//!
//! Each CPU gives its ASIDs out in order; when they run out it forgets everything and begins a new
//! generation, so that a vCPU with an ASID of an older one takes a new one before it runs. ASID 0
//! is the host's.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::machine::cpu::{self, MAX_CPUS};

/// An ASID and the generation that it is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    pub asid: u32,
    generation: u64,
}

/// Generation and next ASID of each CPU, touched by that CPU alone: Relaxed throughout.
static GENERATION: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static NEXT: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

impl Tag {
    /// No ASID yet.
    pub const NONE: Self = Self { asid: 0, generation: 0 };

    /// May a vCPU still run under it on the calling CPU?
    pub fn is_current(&self) -> bool {
        self.asid != 0 && self.generation == GENERATION[cpu::current()].load(Ordering::Relaxed)
    }

    /// A fresh one of the calling CPU, which has `tags` of them; true if everything that is cached
    /// under any ASID must be forgotten first.
    pub fn take(tags: u32) -> (Self, bool) {
        let cpu = cpu::current();
        let next = NEXT[cpu].load(Ordering::Relaxed);
        let over = next == 0 || next >= u64::from(tags);
        let asid = if over { 1 } else { next };
        let generation = GENERATION[cpu].load(Ordering::Relaxed) + u64::from(over);
        GENERATION[cpu].store(generation, Ordering::Relaxed);
        NEXT[cpu].store(asid + 1, Ordering::Relaxed);
        (Self { asid: asid as u32, generation }, over)
    }
}
