//! Independent models that the crates of this repository are judged against.
//!
//! Written from the Intel SDM and the AMD APM. This crate depends on none of the crates under
//! test and shares no line with them: a shared helper would share its mistakes.
//!
//! | file | noun |
//! |---|---|
//! | `phys` | physical memory: 8-byte reads and compare-exchange |
//! | `access` | what is asked, granted, refused |
//! | `format` | what the bits of an entry mean: [`Ept`], [`Npt`], [`Legacy`] |
//! | `walk` | [`Walker`]: address and access to translation or fault; sets accessed and dirty |
//! | `cache` | a bounded or unbounded map with seeded eviction |
//! | `tlb` | [`Tlb`] and [`Psc`]: stale until flushed |
//! | `cpu` | [`SoftCpu`]: walker and caches together |
//! | `guest` | [`GuestMachine`]: a guest's own paging in every mode, keys, SMEP and SMAP included |
//! | `guest_nested` | [`NestedMachine`]: the same in two dimensions |
//! | `map` | [`MapModel`]: what a mapping layer must look like from outside |
//! | `random` | [`Random`]: a generator whose seed can be printed |
//!
//! Levels: 1 is a table of 4 KiB leaves, 2 of 2 MiB, 3 of 1 GiB, 4 the PML4, 5 the PML5.

#![deny(unsafe_code)]

mod access;
mod cache;
mod cpu;
mod format;
mod guest;
mod guest_nested;
mod map;
mod phys;
mod random;
mod tlb;
mod walk;

pub use access::{Access, AccessKind, FaultKind, Permissions, Stage};
pub use cache::Capacity;
pub use cpu::{Caches, Denial, SoftCpu, Stats};
pub use format::{Entry, Ept, Format, Legacy, Mode, Npt, Rules, Vendor};
pub use guest::{GuestAccess, GuestMachine, GuestMode, GuestRoots, GuestWords};
pub use guest::{Rights, Trace, Verdict, Who};
pub use guest_nested::{NestedExit, NestedMachine, NestedVerdict, Why};
pub use map::{Backing, Fixed, MapModel, Page, Refusal};
pub use phys::{MappedMem, PhysMem, VecMem};
pub use random::Random;
pub use tlb::{Psc, Tlb, TlbEntry};
pub use walk::{AccessedOn, Fault, Path, Step, Translation, Walker};
