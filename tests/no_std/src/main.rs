//! A program without std that drives the crates: what `#![no_std]` promises, tried.
//!
//! [`runtime`] and [`mem`] are the whole of the world it stands on: an entry point, two system
//! calls, an allocator, and the memory functions that compilers call. [`work`] uses the crates as a
//! hypervisor would. Exit status 0 when everything held, 1 when a check failed, 2 after a panic.

#![no_std]
#![no_main]

extern crate alloc;

#[path = "../../../examples/test_hypervisor/src/machine/mem.rs"]
mod mem;
mod runtime;
mod work;

/// Called by the entry point with an aligned stack.
fn run() -> u8 {
    match work::all() {
        Ok(checks) => {
            runtime::say("no_std gate: ");
            runtime::say_number(checks);
            runtime::say(" checks held\n");
            0
        }
        Err(what) => {
            runtime::say("no_std gate: FAILED: ");
            runtime::say(what);
            runtime::say("\n");
            1
        }
    }
}
