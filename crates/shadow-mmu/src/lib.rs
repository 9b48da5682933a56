//! Shadow paging: tables that follow a guest's own page tables.
//!
//! So far this crate holds the vocabulary of guest walks ([`guest`]): paging modes, what a guest
//! CPU can do, and what a walk reports. The walkers, shadow pages, reverse maps and reclaim are not
//! built yet; `docs/KVM_PARITY.md` says which rows that leaves open. Nothing in this crate changes
//! a table.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod guest;
