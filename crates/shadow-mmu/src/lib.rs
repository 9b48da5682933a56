//! Shadow paging: tables that follow a guest's own page tables.
//!
//! Principles:
//!
//! 1. **Never wider.** What a shadow entry permits, the guest's tables have permitted since the
//!    guest last flushed the address. A test compares the two after every step (invariant I20).
//! 2. **One hand writes.** Whatever changes a table needs `&mut` [`ShadowWriter`], which the
//!    embedder keeps in a mutex: KVM's `mmu_lock` held for write, as a borrow. Agers and lookups
//!    take no lock but the bit lock of one reverse map.
//! 3. **Flush before trust.** A shadow is built from guest entries that were read after every CPU
//!    has lost the means to change them unseen.
//! 4. **Nothing up front.** No memory is taken for a slot before a page of it is mapped; then eight
//!    bytes a mapping.
//! 5. **A bound on everything.** The guest chooses its tables: walks end, chains are cut, pages
//!    have a quota, work is done in slices.
//!
//! Reading order: [`guest`] (walks over the guest's tables); [`role`], `root`, `page` (what a
//! shadow page is); [`writer`] (who changes them), `change` (the one place that writes entries),
//! `resolve`, `fetch`, `prefetch` (faults); `sync`, `track` (following the guest's writes);
//! `parent`, [`rmap`] (ways back); [`zap`], [`reclaim`] (taking away); [`check`] (does it all
//! agree?). The standard is section 4 of `docs/KVM_PARITY.md`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod age;
mod blocks;
mod chain;
mod change;
pub mod check;
mod desc;
pub mod dirty;
pub mod error;
mod fetch;
pub mod guest;
pub mod histogram;
mod marks;
pub mod mmu;
mod obsolete;
mod page;
mod parent;
mod prefetch;
mod radix;
pub mod reclaim;
mod resolve;
pub mod retry;
pub mod rmap;
pub mod role;
mod root;
mod split;
mod spte_ref;
pub mod stats;
mod sync;
mod track;
pub mod vcpu;
mod watch;
pub mod writer;
mod wrprot;
pub mod zap;

pub use check::{ShadowCount, ShadowFlaw};
pub use dirty::ShadowLogError;
pub use error::ShadowError;
pub use histogram::RmapHistogram;
pub use mmu::ShadowMmu;
pub use reclaim::ReclaimPolicy;
pub use retry::{OnWriteProtected, WriteRetry};
pub use role::{PageRole, RoleFlags};
pub use spte_ref::{PageId, SpteRef};
pub use stats::ShadowStats;
pub use vcpu::ShadowVcpu;
pub use watch::DirectWrite;
pub use writer::{ShadowWriter, WriterLock};
pub use zap::ShadowZap;
