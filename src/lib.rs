#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub use lru_age as age;
pub use mmu_core as core;
pub use shadow_mmu as shadow;
pub use tdp_mmu as tdp;

mod aging;
mod log;
mod memory;
mod track;
mod vcpu;
mod vm;

pub use log::VmLogError;
pub use memory::Unmapped;
pub use track::WatchError;
pub use vcpu::{Runs, Vcpu, VcpuError};
pub use vm::{Shadow, Vm, VmMmuError};
