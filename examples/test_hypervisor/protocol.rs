//! What a reader makes of the lines that the test hypervisor prints on its serial port.
//!
//! Owns the grammar below; `src/suite` writes it. `xtask` reads it for every emulator, and the
//! example mini_vmm for the machine behind /dev/kvm. Needs std; no locks.
//!
//! ```text
//! test_hypervisor: npt on svm, 2 CPUs, ...     the headline: what comes before it is firmware
//! suite NAME
//!   [ok  ] CHECK: detail
//!   [FAIL] CHECK: detail
//!   [skip] CHECK: reason
//!   [note] text                                names a sentence of the manual that the machine
//!                                              breaks; judged by nobody
//! panic: text                                  something is broken; no summary follows
//! N passed, N failed, N skipped                the summary: counts checks, ends the run
//! ```

use std::fmt;

const HEADLINE: &str = "test_hypervisor: ";

/// What became of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It held.
    Ok,
    /// It did not hold.
    Fail,
    /// It does not apply to this machine.
    Skip,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The suite it belongs to.
    pub suite: String,
    /// What became of it.
    pub mark: Mark,
    /// Its name.
    pub name: String,
    /// Values, or the reason of a skip.
    pub detail: String,
}

/// Numbers of checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Held.
    pub passed: u64,
    /// Did not hold.
    pub failed: u64,
    /// Did not apply.
    pub skipped: u64,
}

impl Counts {
    /// Count one more.
    pub fn add(&mut self, mark: Mark) {
        match mark {
            Mark::Ok => self.passed += 1,
            Mark::Fail => self.failed += 1,
            Mark::Skip => self.skipped += 1,
        }
    }

    /// The counts that a summary line says.
    fn parse(line: &str) -> Option<Self> {
        let mut parts = line.split(", ");
        let mut count = |what: &str| {
            let number = parts.next()?.strip_suffix(what)?.strip_suffix(' ')?;
            number.parse::<u64>().ok()
        };
        let counts =
            Self { passed: count("passed")?, failed: count("failed")?, skipped: count("skipped")? };
        parts.next().is_none().then_some(counts)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// All that was read.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// What the machine is, in the program's words.
    pub headline: Option<String>,
    /// Checks in order.
    pub checks: Vec<Check>,
    /// Deviations of the machine from the manual.
    pub notes: Vec<String>,
    /// What the summary line says.
    pub summary: Option<Counts>,
    /// A panic's message.
    pub panic: Option<String>,
    suite: String,
}

impl Reading {
    /// Read one line. True if it belongs to the program: comes after its headline, and before the
    /// end of its run.
    pub fn line(&mut self, line: &str) -> bool {
        let line = line.trim();
        if self.summary.is_some() {
            return false;
        }
        if let Some(machine) = line.strip_prefix(HEADLINE) {
            self.headline = Some(machine.to_owned());
            return true;
        }
        if let Some(message) = line.strip_prefix("panic: ") {
            self.panic.get_or_insert_with(|| message.to_owned());
            return true;
        }
        if self.headline.is_none() {
            return false;
        }
        if let Some(name) = line.strip_prefix("suite ") {
            name.clone_into(&mut self.suite);
        } else if let Some(text) = line.strip_prefix("[note] ") {
            self.notes.push(text.to_owned());
        } else if let Some(check) = self.check(line) {
            self.checks.push(check);
        } else {
            self.summary = Counts::parse(line);
        }
        true
    }

    fn check(&self, line: &str) -> Option<Check> {
        let marks = [("[ok  ] ", Mark::Ok), ("[FAIL] ", Mark::Fail), ("[skip] ", Mark::Skip)];
        let read = |(text, mark): &(&str, Mark)| line.strip_prefix(text).map(|rest| (*mark, rest));
        let (mark, rest) = marks.iter().find_map(read)?;
        let (name, detail) = rest.split_once(": ").unwrap_or((rest, ""));
        let suite = self.suite.clone();
        Some(Check { suite, mark, name: name.to_owned(), detail: detail.to_owned() })
    }

    /// What the lines add up to.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.checks.iter().for_each(|check| counts.add(check.mark));
        counts
    }

    /// The same for each suite, in order of appearance.
    pub fn suites(&self) -> Vec<(&str, Counts)> {
        let mut suites: Vec<(&str, Counts)> = Vec::new();
        for check in &self.checks {
            let at = suites.iter().position(|(name, _)| *name == check.suite);
            let at = at.unwrap_or_else(|| {
                suites.push((&check.suite, Counts::default()));
                suites.len() - 1
            });
            suites[at].1.add(check.mark);
        }
        suites
    }

    /// Why this run proves nothing, or proves that something is broken. Empty: all is well.
    pub fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let counts = self.counts();
        if self.headline.is_none() {
            wrong.push("it never said its first line".to_owned());
        }
        wrong.extend(self.panic.iter().map(|message| format!("it panicked: {message}")));
        match self.summary {
            None => wrong.push("it never said its last line".to_owned()),
            Some(said) if said != counts => {
                wrong.push(format!("it says `{said}`, its lines add up to `{counts}`"));
            }
            Some(_) => {}
        }
        for check in self.checks.iter().filter(|check| check.mark == Mark::Fail) {
            wrong.push(format!("{} {}: {}", check.suite, check.name, check.detail));
        }
        if counts.passed == 0 {
            wrong.push("nothing passed".to_owned());
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Reading {
        let mut reading = Reading::default();
        text.lines().for_each(|line| {
            reading.line(line);
        });
        reading
    }

    const SOUND: &str = "SeaBIOS\n1 passed, 0 failed, 0 skipped\n\
        test_hypervisor: npt on svm, 2 CPUs\r\nsuite faults\n  [ok  ] read: 0x100000004\n\
        [note] P is 0 where the manual says 1\nsuite levels\n  [ok  ] 4k: 3\n  \
        [skip] 5-level: no LA57\n2 passed, 0 failed, 1 skipped\n[FAIL] not ours: x\n";

    #[test]
    fn a_sound_run_reads_as_sound() {
        let reading = read(SOUND);
        assert_eq!(reading.wrong(), [""; 0]);
        assert_eq!(reading.headline.as_deref(), Some("npt on svm, 2 CPUs"));
        assert_eq!(reading.counts().to_string(), "2 passed, 0 failed, 1 skipped");
        assert_eq!(reading.notes, ["P is 0 where the manual says 1"]);
        let suites: Vec<_> = reading.suites().iter().map(|(n, c)| (*n, c.passed)).collect();
        assert_eq!(suites, [("faults", 1), ("levels", 1)]);
        assert_eq!(reading.checks[2].detail, "no LA57");
    }

    #[test]
    fn whatever_is_missing_is_wrong() {
        let without = |part: &str| read(&SOUND.replace(part, "")).wrong().join("; ");
        assert_eq!(without("2 passed, 0 failed, 1 skipped\n[FAIL] not ours: x\n"), {
            "it never said its last line"
        });
        assert!(without("  [ok  ] 4k: 3\n").contains("add up to `1 passed, 0 failed, 1 skipped`"));
        assert!(without("test_hypervisor: ").contains("its first line"));
        assert!(read("").wrong().contains(&"nothing passed".to_owned()));
        let failed = SOUND.replace("[ok  ] 4k", "[FAIL] 4k").replace("2 passed, 0", "1 passed, 1");
        assert_eq!(read(&failed).wrong(), ["levels 4k: 3"]);
        let panicked = SOUND.replace("suite levels", "panic: at main.rs\nsuite levels");
        assert_eq!(read(&panicked).wrong(), ["it panicked: at main.rs"]);
        assert!(read("panic: no SVM").wrong().contains(&"it panicked: no SVM".to_owned()));
        let empty = "test_hypervisor: x\n0 passed, 0 failed, 0 skipped\n";
        assert_eq!(read(empty).wrong(), ["nothing passed"]);
    }

    #[test]
    fn only_a_whole_line_is_a_summary() {
        for line in ["1 passed, 2 failed", "1 passed, 2 failed, 3 skipped, 4", "x passed", ""] {
            assert_eq!(Counts::parse(line), None, "{line}");
        }
        let counts = Counts { passed: 1, failed: 2, skipped: 3 };
        assert_eq!(Counts::parse("1 passed, 2 failed, 3 skipped"), Some(counts));
    }
}
