//! The machine under the program: one noun a file, each a small safe face over what is not.
//!
//! `unsafe` of the whole program stands here, in `boot/`, in `svm/` and `vmx/`, and in the
//! embedder's one unsafe trait (`host.rs`).

pub mod apic;
pub mod clock;
pub mod cpu;
pub mod descriptors;
pub mod exit;
pub mod heap;
pub mod lock;
mod mem;
pub mod memory;
pub mod paging;
pub mod port;
pub mod runtime;
pub mod serial;
