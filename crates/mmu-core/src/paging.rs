//! Which kind of MMU serves a VM.
//!
//! Owns [`Paging`], the choice, and [`PagingPolicy`], what an embedder gives new VMs (issue of S1:
//! the switch may be turned at any time and says nothing about VMs that exist). A VM takes its
//! choice when it is made ([`VmOptions`](crate::vm::VmOptions)) and keeps it. No locks.

use core::fmt;

use crate::sync::plain;

/// How a VM's guest memory is mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[doc(alias = "tdp_mmu_enabled")]
pub enum Paging {
    /// By the processor's second dimension: EPT or NPT.
    #[default]
    Tdp,
    /// By tables made from the guest's own.
    Shadow,
}

impl fmt::Display for Paging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tdp => "two-dimensional paging",
            Self::Shadow => "shadow paging",
        })
    }
}

/// What VMs made from now on get. An object of the embedder's, so that there may be several; its
/// value may change at any time, from any thread.
#[derive(Debug)]
pub struct PagingPolicy {
    /// 0 for [`Paging::Tdp`], 1 for [`Paging::Shadow`].
    shadow: plain::AtomicU64,
}

impl PagingPolicy {
    /// A policy that says `paging`.
    #[must_use]
    pub fn new(paging: Paging) -> Self {
        Self { shadow: plain::AtomicU64::new(word(paging)) }
    }

    /// Say `paging` from now on. VMs that exist stay as they are.
    pub fn set(&self, paging: Paging) {
        // ORDERING[paging-policy]: Relaxed. One value that nothing else hangs on; pairs with the
        // load in `get`.
        self.shadow.store(word(paging), plain::Ordering::Relaxed);
    }

    /// What a VM made now would get.
    #[must_use]
    pub fn get(&self) -> Paging {
        // ORDERING[paging-policy]: Relaxed. A VM takes one answer and keeps it; pairs with the
        // store in `set`.
        match self.shadow.load(plain::Ordering::Relaxed) {
            0 => Paging::Tdp,
            _ => Paging::Shadow,
        }
    }
}

fn word(paging: Paging) -> u64 {
    u64::from(paging == Paging::Shadow)
}

impl Default for PagingPolicy {
    fn default() -> Self {
        Self::new(Paging::default())
    }
}
