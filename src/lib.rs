//! The memory management of a modern x86 hypervisor, as crates.
//!
//! This package re-exports them under one roof; each can be used alone:
//!
//! | crate | what it is |
//! |---|---|
//! | [`core`] (`mmu-core`) | addresses, entries, frames, epochs, the lock, flushes, slots |
//! | [`tdp`] (`tdp-mmu`) | EPT and NPT tables that many vCPUs change at once |
//! | [`shadow`] (`shadow-mmu`) | shadow paging; the guest-walk types so far |
//! | [`age`] (`lru-age`) | generations of guest memory over either MMU, without its lock |
#![no_std]
#![forbid(unsafe_code)]

pub use lru_age as age;
pub use mmu_core as core;
pub use shadow_mmu as shadow;
pub use tdp_mmu as tdp;
