//! The list of checks that do not apply to a machine, held against what was skipped there.
//!
//! A line is `MACHINE-GLOB SUITE/CHECK-GLOB REASON`; `*` stands for any characters.

use super::protocol::{Mark, Reading};
use crate::Error;
use crate::child;

const LIST: &str = "examples/test_hypervisor/skips.txt";

struct Line {
    text: String,
    machine: String,
    check: String,
    used: bool,
    /// A machine that it names has run all suites.
    tried: bool,
}

/// What a machine ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suites {
    All,
    Some,
}

/// The list.
pub(crate) struct Skips(Vec<Line>);

impl Skips {
    /// The committed list.
    ///
    /// # Errors
    /// It is not there, or a line gives no reason.
    pub(crate) fn load() -> Result<Self, Error> {
        child::list(LIST)?.into_iter().map(Line::parse).collect::<Result<_, _>>().map(Self)
    }

    /// What the list and the run on `machine` do not agree on.
    pub(crate) fn judge(
        &mut self,
        machine: &str,
        reading: &Reading,
        suites: Suites,
    ) -> Vec<String> {
        let mut wrong = Vec::new();
        for line in self.0.iter_mut().filter(|line| matches(&line.machine, machine)) {
            line.tried |= suites == Suites::All;
        }
        for check in &reading.checks {
            let name = format!("{}/{}", check.suite, check.name);
            let lines = self.0.iter_mut();
            let listed: Vec<&mut Line> = lines
                .filter(|line| matches(&line.machine, machine) && matches(&line.check, &name))
                .collect();
            match check.mark {
                Mark::Skip if listed.is_empty() => {
                    wrong
                        .push(format!("{name} was skipped and is not in {LIST}: {}", check.detail));
                }
                Mark::Skip => listed.into_iter().for_each(|line| line.used = true),
                Mark::Ok | Mark::Fail => {
                    let stale = |line: &mut Line| {
                        format!("{LIST}: stale: `{}`, and {name} did run", line.text)
                    };
                    wrong.extend(listed.into_iter().map(stale));
                }
            }
        }
        wrong
    }

    /// Lines that no run needed, though a machine that they name has run everything.
    pub(crate) fn unused(&self) -> Vec<String> {
        let unused = self.0.iter().filter(|line| line.tried && !line.used);
        unused.map(|line| format!("{LIST}: stale: nothing skips for `{}`", line.text)).collect()
    }
}

impl Line {
    fn parse(text: String) -> Result<Self, Error> {
        let mut words = text.split_whitespace();
        let (machine, check) = (words.next(), words.next());
        let (Some(machine), Some(check), Some(_)) = (machine, check, words.next()) else {
            return Err(format!("{LIST}: `{text}`: machine, check and reason expected").into());
        };
        let (machine, check) = (machine.to_owned(), check.to_owned());
        Ok(Self { text, machine, check, used: false, tried: false })
    }
}

/// Does `glob` stand for `name`?
fn matches(glob: &str, name: &str) -> bool {
    let mut parts = glob.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(lines: &[&str]) -> Skips {
        Skips(lines.iter().map(|line| Line::parse((*line).to_owned()).unwrap()).collect())
    }

    fn reading(marks: &[(Mark, &str)]) -> Reading {
        let mut reading = Reading::default();
        reading.line("test_hypervisor: here");
        reading.line("suite levels");
        for (mark, name) in marks {
            let mark = match mark {
                Mark::Ok => "[ok  ]",
                Mark::Fail => "[FAIL]",
                Mark::Skip => "[skip]",
            };
            reading.line(&format!("{mark} {name}: why"));
        }
        reading
    }

    #[test]
    fn a_star_stands_for_anything() {
        for (glob, name) in [("*", ""), ("a*", "a"), ("*-2", "qemu-max-2"), ("q*m*2", "qemu-max-2")]
        {
            assert!(matches(glob, name), "{glob} {name}");
        }
        for (glob, name) in [("", "a"), ("a", "ab"), ("*b", "ba"), ("a*c*b", "ab"), ("a*a", "a")] {
            assert!(!matches(glob, name), "{glob} {name}");
        }
    }

    #[test]
    fn list_and_run_must_agree() {
        let mut skips = list(&["qemu-* levels/5-* no LA57", "bochs-* */pml no PML"]);
        let sound = reading(&[(Mark::Ok, "4k"), (Mark::Skip, "5-level")]);
        assert_eq!(skips.judge("qemu-max-1", &sound, Suites::All), [""; 0]);
        assert_eq!(skips.unused(), [""; 0], "nobody has run bochs");
        let unlisted = skips.judge("bochs-x-1", &sound, Suites::Some);
        assert!(unlisted[0].contains("levels/5-level was skipped and is not in"), "{unlisted:?}");
        let ran = reading(&[(Mark::Ok, "5-level")]);
        let stale = skips.judge("qemu-max-2", &ran, Suites::All);
        assert!(stale[0].contains("stale: `qemu-* levels/5-* no LA57`"), "{stale:?}");
        skips.judge("bochs-x-1", &ran, Suites::All);
        assert!(skips.unused()[0].contains("nothing skips for `bochs-* */pml no PML`"));
    }

    #[test]
    fn a_line_gives_a_reason() {
        assert!(Line::parse("qemu-* levels/*".to_owned()).is_err());
    }
}
