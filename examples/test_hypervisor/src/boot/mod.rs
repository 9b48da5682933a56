//! From what a loader leaves to Rust code on every CPU: entry, disk boot, ACPI, application
//! processors.

pub mod acpi;
pub mod ap;
pub mod disk;
pub mod entry;
pub mod pvh;
