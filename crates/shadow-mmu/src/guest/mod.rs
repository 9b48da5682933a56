//! The guest's side of shadow paging: its paging modes and the walks over its tables.
//!
//! Owns [`mode`] (which kind of tables the guest uses), [`cpu`] (what its processor can do) and
//! [`walk`] (what a walk found, or the fault it raised). Values only; nothing is read here.

pub mod cpu;
pub mod mode;
pub mod walk;

pub use cpu::{GuestControls, GuestCpu};
pub use mode::{ModeError, PagingMode};
pub use walk::{GuestEntry, GuestFault, GuestWalk, MAX_WALK_LEVELS};
