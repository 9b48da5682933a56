//! Two-dimensional paging: EPT and NPT tables that many vCPUs change at once.
//!
//! [`TdpMmu`] maps guest frames to host frames in a tree of tables shared by all vCPUs of a VM. The
//! model is the TDP MMU of Linux KVM (rows 2.x and 3.x of `docs/KVM_PARITY.md`):
//!
//! - [`TdpVcpu::fault`] maps a page. It takes no line that another vCPU's fault writes, apart from
//!   the table it changes; faults that only restore a permission take no lock at all.
//! - [`TdpMmu::unmap`] takes pages away: faults in the range retry, faults elsewhere never wait.
//! - [`TdpMmu::invalidate_roots`] drops everything in O(roots); the tables are given back in
//!   bounded slices behind the vCPUs' backs.
//! - Aging ([`mmu_core::traits::AgeRange`]) reads and clears accessed bits without any lock.
//! - [`TdpIter`] walks a tree, pauses, and goes on where it was.
//!
//! Reading order: `iter` (the walk), `change` (the one place that writes entries), `map` and `fast`
//! (faults), `zap` and `root` (taking away), `age`, `walk` (looking).
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod age;
pub mod attributes;
mod change;
pub mod change_pte;
pub mod collapse;
pub mod dirty;
pub mod dump;
pub mod external;
mod fast;
mod harvest;
pub mod iter;
mod leaf;
mod limits;
pub mod map;
pub mod mmio;
pub mod mmu;
pub mod nx;
pub mod postorder;
mod rearm;
mod recent;
mod resolve;
pub mod root;
mod scan;
mod slice;
pub mod split;
mod sweep;
mod unflushed;
mod upper;
pub mod usage;
pub mod vcpu;
pub mod walk;
mod watch;
pub mod wrprot;
pub mod zap;

pub use change_pte::{ChangePteError, PageChange};
pub use collapse::CollapseReport;
pub use dirty::{DirtyTracking, Harvest, LogError};
pub use dump::{Dump, Run, RunKind};
pub use external::{ExternalCode, ExternalTable, Place, RemoveError};
pub use iter::{Cursor, Step, TdpIter};
pub use map::Prefault;
pub use mmio::MmioInfo;
pub use mmu::{SlotUpdate, SlotZap, TdpMmu, TdpOptions, WrongPaging};
pub use nx::{NxHugePages, NxReport};
pub use postorder::PostOrder;
pub use root::{RootError, ZapAll};
pub use split::SplitReport;
pub use usage::TableUsage;
pub use vcpu::TdpVcpu;
pub use walk::Walker;
pub use zap::ZapReport;
