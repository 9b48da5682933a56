//! The guest's side of shadow paging: its paging modes and the walks over its tables.
//!
//! | file | owns |
//! |---|---|
//! | [`mode`] | which kind of tables the guest uses |
//! | [`cpu`] | what its processor can do, and its control registers |
//! | [`permit`] | which access a translation permits |
//! | [`memory`] | what a walk needs from guest memory |
//! | [`slots`] | the same over memslots |
//! | [`walk`] | what a walk found, or the fault it raised |
//! | [`walker`] | walks over a guest's own tables |
//! | [`nested`] | walks over EPT and NPT, and both dimensions together |
//!
//! Behind them, `rules` has the bits of every format as masks and `descent` is the one walk that
//! they all share. The guest chooses what is read here, its other CPUs change it meanwhile, and
//! none of it is trusted: a walk reads each entry once an attempt, looks at no more entries than
//! there are levels, and ends (invariant I19). No locks are taken.

pub mod cpu;
mod descent;
mod leaf;
pub mod memory;
pub mod mode;
pub mod nested;
pub mod permit;
mod rules;
pub mod slots;
pub mod walk;
pub mod walker;

pub use cpu::{EptCpu, GuestControls, GuestCpu};
pub use descent::MAX_ATTEMPTS;
pub(crate) use leaf::{EntryFormat, GuestLeaf};
pub use memory::{EntryWidth, Exchange, GuestMem, LogFull, NotMemory};
pub use mode::{ModeError, PagingMode};
pub use nested::{NestedRequest, NestedTables, NestedWalker, Purpose, TwoDimensionalWalk};
pub use permit::{Operation, PermissionRules, PermissionTable, Privilege, Request, WriteProtect};
pub use slots::{HostWords, SlotMem};
pub use walk::{
    Cause, Dirtiness, EntryMeaning, GuestEntry, GuestFault, GuestWalk, MAX_WALK_LEVELS,
    NestedError, NestedFault, NestedReport, NestedWalk, WalkError, WalkPath,
};
pub use walker::{GuestRoot, GuestWalker, PaePointers, PointerError};
