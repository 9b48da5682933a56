//! Shadow paging: tables that follow a guest's own page tables.
//!
//! So far this crate holds the guest's side ([`guest`]): walks over its page tables in every paging
//! mode, over the nested tables that a guest hypervisor makes, and over both together. Shadow
//! pages, reverse maps and reclaim are not built yet; `docs/KVM_PARITY.md` says which rows that
//! leaves open. Nothing in this crate changes a table of ours; a walk sets accessed and dirty bits
//! in the guest's, as a processor does.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod guest;
