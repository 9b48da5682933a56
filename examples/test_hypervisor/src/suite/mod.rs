//! The suites: each a file, each written for any machine.

mod platform;

use crate::lab::Lab;
use crate::virt::Virt;

/// A suite: its name, and what it does.
pub type Suite<V> = (&'static str, fn(&mut Lab<V>));

/// Every suite, in the order in which they run.
pub const fn all<V: Virt>() -> [Suite<V>; 1] {
    [("platform", platform::run)]
}
