//! Known breakages, each with a test that must notice it (`docs/mutants.txt`).
//!
//! Owns [`busted!`](crate::busted!), which says whether a line is to be broken. In every ordinary
//! build it is the literal `false`, so the compiler drops the broken line. Under `cfg(busted)`,
//! which only `cargo xtask` sets, one build holds all breakages, and the environment variable
//! `BUSTED` names the one that this process has. A bare machine has no environment: under
//! `cfg(busted = "built_in")` the compiler's counts.

/// Is the line to be broken? `false` but in the builds of `cargo xtask mutants`.
#[cfg(not(busted))]
#[doc(hidden)]
#[macro_export]
macro_rules! busted {
    ($name:literal) => {
        false
    };
}

/// Is the line to be broken in this process?
#[cfg(busted)]
#[doc(hidden)]
#[macro_export]
macro_rules! busted {
    ($name:literal) => {
        $crate::busted::is($name)
    };
}

/// Does this process have the breakage `name`?
#[cfg(all(busted, not(busted = "built_in")))]
#[must_use]
pub fn is(name: &str) -> bool {
    static WANTED: std::sync::OnceLock<std::string::String> = std::sync::OnceLock::new();
    WANTED.get_or_init(|| std::env::var("BUSTED").unwrap_or_default()) == name
}

/// Was the breakage `name` built in?
#[cfg(busted = "built_in")]
#[must_use]
pub fn is(name: &str) -> bool {
    option_env!("BUSTED") == Some(name)
}
