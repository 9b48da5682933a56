//! The command line.

use arrayvec::{ArrayString, ArrayVec};

use crate::machine::cpu::MAX_CPUS;

/// Suites that can be asked for by name.
const MAX_SUITES: usize = 32;

/// What the command line asks for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only this format: `npt` or `ept`.
    pub format: Option<ArrayString<8>>,
    /// At most so many CPUs.
    pub cpus: usize,
    /// Only these suites; all if there are none.
    pub suites: ArrayVec<ArrayString<24>, MAX_SUITES>,
    /// Not these suites, which the machine does not survive.
    pub without: ArrayVec<ArrayString<24>, MAX_SUITES>,
    /// Seed of everything random; not 0.
    pub seed: u64,
}

impl Options {
    /// Read `line`: `format=npt|ept|auto cpus=N seed=N suite=NAME[,NAME...]
    /// without=NAME[,NAME...]`, each at most once, each optional.
    ///
    /// # Panics
    /// When there is something else in it: a misspelt word must not pass for a run of everything.
    pub fn parse(line: &str) -> Self {
        let (format, suites, without) = (None, ArrayVec::new(), ArrayVec::new());
        let mut options = Self { format, cpus: MAX_CPUS, suites, without, seed: 0x5eed };
        let names = |value: &str, list: &mut ArrayVec<ArrayString<24>, MAX_SUITES>| {
            value
                .split(',')
                .all(|name| ArrayString::from(name).is_ok_and(|name| list.try_push(name).is_ok()))
        };
        for word in line.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let known = match (key, value) {
                ("format", "auto") => true,
                ("format", "npt" | "ept") => {
                    options.format = ArrayString::from(value).ok();
                    true
                }
                ("cpus", _) => value.parse().is_ok_and(|cpus: usize| {
                    options.cpus = cpus.clamp(1, MAX_CPUS);
                    cpus > 0
                }),
                ("seed", _) => value.parse().is_ok_and(|seed: u64| {
                    options.seed = seed.max(1);
                    true
                }),
                ("suite", _) => names(value, &mut options.suites),
                ("without", _) => names(value, &mut options.without),
                // What loaders put there of their own accord: the image's name.
                (path, "") => path.contains('/'),
                _ => false,
            };
            assert!(known, "`{word}` on the command line means nothing");
        }
        options
    }

    /// Is suite `name` to be run?
    pub fn wants(&self, name: &str) -> bool {
        let named = |list: &[ArrayString<24>]| list.iter().any(|suite| suite.as_str() == name);
        (self.suites.is_empty() || named(&self.suites)) && !named(&self.without)
    }
}
