//! What the MMUs of a hypervisor share.
//!
//! Principles, in the order in which they win:
//!
//! 1. **The types carry the rules.** An unpaid flush, a plain store without the lock, waiting for
//!    oneself, a gfn used as a pfn: none of these compiles, or each is a `#[must_use]` value.
//! 2. **Nothing fails half-way.** Memory is taken before anything is changed; every error returns
//!    with the state as it was and names the values.
//! 3. **Disjoint faults share no written cache line.** A thread writes its own epoch word, its own
//!    statistics, and the table it changes.
//! 4. **`unsafe` stands in three files**: [`frame::raw`], [`frame::arena`], [`epoch::publish`].
//!
//! Reading order: [`addr`], [`spte`] (what an entry means), [`frame`] (where tables live),
//! [`epoch`] and [`lock`] (who may still be looking), [`flush`] and [`notify`] (what is owed, what
//! must retry), [`slot`] (guest memory), [`vm`] (all of it together). The MMUs are `tdp-mmu` and
//! `shadow-mmu`; `lru-age` ages either through [`traits::AgeRange`].
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, loom, all(busted, not(busted = "built_in"))))]
extern crate std;

pub mod access;
pub mod actor;
pub mod addr;
pub mod age;
pub mod async_page;
pub mod attributes;
#[doc(hidden)]
pub mod busted;
pub mod check;
pub mod dead;
pub mod direct;
pub mod dirty;
#[expect(unsafe_code, reason = "publish.rs borrows the live buffer; see its head")]
pub mod epoch;
pub mod fault;
pub mod flush;
#[expect(unsafe_code, reason = "raw.rs and arena.rs follow pointers; see their heads")]
pub mod frame;
pub mod gfn_cache;
pub mod latency;
pub mod lock;
pub mod notify;
pub mod paging;
pub mod role;
pub mod slot;
pub mod spin;
pub mod spte;
pub mod stats;
pub mod sync;
pub mod trace;
pub mod traits;
pub mod vm;
pub mod watch;
