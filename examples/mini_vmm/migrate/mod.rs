//! Live migration: a running VM moves into another process over TCP.
//!
//! | file | owns |
//! |---|---|
//! | `wire` | frames, their limits, what is wrong with them |
//! | `source` | pre-copy, stop-and-copy, and going on when anything fails |
//! | `target` | a VM from what arrives, and running it once told to |
//!
//! Whose the VM is: the source's until it sends `Go`, which it does only after the target has said
//! `Ready` and both hold the same memory. Whatever goes wrong before leaves the source running and
//! whole; so does a connection that is known to be closed when `Go` is due, and a `Go` that cannot
//! be sent at all. After that the VM is the target's, even if its `Running` never comes: the source
//! keeps its memory and stands still, since two copies of one VM that both run are worse than one
//! to be started by hand. Of two ends and a
//! connection that may be cut, no protocol can do better than choose the smaller evil here.

pub mod source;
pub mod target;
pub mod wire;
