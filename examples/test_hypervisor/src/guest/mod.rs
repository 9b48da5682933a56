//! Guests: where things stand in their memory, and the programs they run.

pub mod layout;
pub mod program;
pub mod system;
pub mod tree;
