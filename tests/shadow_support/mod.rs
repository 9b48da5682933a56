//! Guests on shadow tables, for tests: their memory and tables, a processor whose TLB forgets
//! nothing by itself, and what each address has meant since its last flush. Every step of a world
//! judges what its guest can reach.
//!
//! | file | owns |
//! |---|---|
//! | `memory` | the guest's memory, and what the host has behind it |
//! | `rig` | the MMU under test, the processor and the host of any world |
//! | `world` | a small guest of four levels, whose every address is looked at |
//! | `wide` | any guest whose tables have large pages |
//! | `kernel` | such a guest in every paging mode |
//! | `nested` | such a guest that is nested |
//! | `hostile` | calls that somebody else chooses, of all kinds |

#![allow(dead_code, reason = "each test file uses its own part")]

pub mod hostile;
pub mod kernel;
pub mod memory;
pub mod nested;
pub mod rig;
pub mod wide;
mod world;

#[allow(unused_imports, reason = "each test file uses its own part")]
pub use world::{LOWEST, PAGES, World};

pub const P: u64 = 1 << 0;
pub const W: u64 = 1 << 1;
pub const U: u64 = 1 << 2;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const PS: u64 = 1 << 7;
pub const NX: u64 = 1 << 63;
/// The frame in an entry.
pub const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Bits `low` to `high`.
pub const fn bits(low: u32, high: u32) -> u64 {
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}
