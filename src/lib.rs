#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

pub use lru_age as age;
pub use mmu_core as core;
pub use shadow_mmu as shadow;
pub use tdp_mmu as tdp;
