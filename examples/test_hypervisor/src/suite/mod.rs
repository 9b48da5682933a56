//! The suites: each a file, each written for any machine.
//!
//! A suite makes its own VMs and leaves nothing behind. To add one: a file, a line below.

mod accessed_dirty;
mod aging;
mod dirty;
mod execute;
mod faults;
mod flush;
mod huge;
mod mmio;
mod modes;
mod platform;
mod protect;
mod shadow_aging;
mod shadow_exits;
mod shadow_faults;
mod shadow_huge;
mod shadow_modes;
mod shadow_nested;
mod shadow_tables;
mod shadow_workload;
mod shadow_zap;
mod sizes;
mod tracking;
mod workload;
mod zap;
mod zap_all;

use crate::lab::Lab;
use crate::virt::Virt;

/// A suite: its name, and what it does.
pub type Suite<V> = (&'static str, fn(&mut Lab<V>));

/// Every suite, in the order in which they run.
pub const fn all<V: Virt>() -> &'static [Suite<V>] {
    &[
        ("platform", platform::run),
        ("modes", modes::run),
        ("shadow-exits", shadow_exits::run),
        ("faults", faults::run),
        ("accessed-dirty", accessed_dirty::run),
        ("flush", flush::run),
        ("sizes", sizes::run),
        ("execute", execute::run),
        ("tracking", tracking::run),
        ("mmio", mmio::run),
        ("huge", huge::run),
        ("protect", protect::run),
        ("dirty", dirty::run),
        ("aging", aging::run),
        ("zap", zap::run),
        ("zap-all", zap_all::run),
        ("workload", workload::run),
        ("shadow-faults", shadow_faults::run),
        ("shadow-tables", shadow_tables::run),
        ("shadow-huge", shadow_huge::run),
        ("shadow-modes", shadow_modes::run),
        ("shadow-zap", shadow_zap::run),
        ("shadow-aging", shadow_aging::run),
        ("shadow-workload", shadow_workload::run),
        ("shadow-nested", shadow_nested::run),
    ]
}
