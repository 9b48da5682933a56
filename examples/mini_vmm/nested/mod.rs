//! The test hypervisor as a guest of /dev/kvm: tables of ours walked by the processor on behalf of
//! a hypervisor that is itself a guest (the host's KVM is L0, our program L1, its guests are L2).
//!
//! | file | owns |
//! |---|---|
//! | `offer` | whether /dev/kvm lends its guests SVM or VMX; if not, what is missing |
//! | `image` | the program: its segments and its entry |
//! | `guest` | the VM that boots it: memory, interrupt controllers, vCPUs, ports |
//!
//! What the program prints is read by `examples/test_hypervisor/protocol.rs`.

mod guest;
mod image;
pub mod offer;

pub use guest::{Config, End, boot};
pub use image::Image;
pub use offer::{Missing, offered};
