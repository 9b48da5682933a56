//! What can be seen from outside while a VM is tiered: samples over time, and a live view of them
//! where there is a terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use lru_age::{AgeTable, Histogram, WorkingSet};
use mmu_core::spte::SpteFormat;

use super::guest::Progress;
use super::slow::{Moved, SlowTier};
use crate::machine::PAGE;
use crate::vmm::{Error, Vmm};

/// Time between two samples.
pub const EVERY: Duration = Duration::from_millis(25);
/// Time between two redraws of the live view.
const REDRAW: Duration = Duration::from_millis(200);
/// The time over which speeds are averaged.
const WINDOW: Duration = Duration::from_millis(250);
/// Generations that a table keeps at most.
pub const GENERATIONS: usize = 4;
/// Columns of a bar of the live view.
const BAR: u64 = 44;

/// What was seen at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Since the clock began.
    pub at: Duration,
    /// Bytes of host memory that the VM's memory occupies.
    pub resident: u64,
    /// Pages by generation, the youngest first.
    pub generations: [u64; GENERATIONS],
    /// Pages used between the last two passes, as the table estimates it.
    pub working_set: u64,
    /// Did the guest run its program?
    pub running: bool,
    /// Pages that are not in memory.
    pub away: u64,
    /// What moved until now.
    pub moved: Moved,
    /// Pages visited until now.
    pub visits: u64,
    /// Times that pages were taken away until now.
    pub turns: u64,
}

/// The speeds between two samples.
#[derive(Clone, Copy, Debug, Default)]
pub struct Speed {
    /// Pages visited each second.
    pub visits: f64,
    /// Pages taken out each second.
    pub out: f64,
    /// Pages brought, or taken, back each second.
    pub back: f64,
}

impl Speed {
    fn between(old: &Sample, new: &Sample) -> Self {
        let seconds = (new.at - old.at).as_secs_f64().max(1e-6);
        let per_second = |old: u64, new: u64| new.saturating_sub(old) as f64 / seconds;
        let back = |sample: &Sample| sample.moved.back + sample.moved.taken_back;
        Self {
            visits: per_second(old.visits, new.visits),
            out: per_second(old.moved.out, new.moved.out),
            back: per_second(back(old), back(new)),
        }
    }
}

/// The speed at each sample, over a window that ends there.
pub fn speeds(samples: &[Sample]) -> Vec<Speed> {
    let mut first = 0;
    let mut speeds = Vec::with_capacity(samples.len());
    for (index, sample) in samples.iter().enumerate() {
        while first + 1 < index && samples[first].at + WINDOW < sample.at {
            first += 1;
        }
        speeds.push(Speed::between(&samples[first], sample));
    }
    speeds
}

/// Something that happened, for the picture.
#[derive(Clone, Debug)]
pub struct Mark {
    /// When.
    pub at: Duration,
    /// What.
    pub what: String,
}

/// Who watches one VM.
pub struct Watch<'a, F: SpteFormat> {
    vmm: &'a Vmm<F>,
    tier: &'a SlowTier,
    table: &'a AgeTable,
    progress: &'a Progress,
    clock: Instant,
    /// Time that was not watched; it is left out.
    skipped: Duration,
    view: Option<View>,
    /// Pages visited each second without aging.
    pub full_speed: f64,
    /// Resident memory is to fall below so many bytes.
    pub limit: u64,
    /// What was seen.
    pub samples: Vec<Sample>,
    /// What happened.
    pub marks: Vec<Mark>,
}

impl<'a, F: SpteFormat> Watch<'a, F> {
    /// Nothing seen yet. Draws only where the standard output is a terminal.
    pub fn new(
        vmm: &'a Vmm<F>,
        (tier, table): (&'a SlowTier, &'a AgeTable),
        progress: &'a Progress,
        clock: Instant,
        (full_speed, limit): (f64, u64),
    ) -> Self {
        let view = std::io::stdout().is_terminal().then(View::default);
        let (samples, marks, skipped) = (Vec::new(), Vec::new(), Duration::ZERO);
        Self { vmm, tier, table, progress, clock, skipped, view, full_speed, limit, samples, marks }
    }

    fn now(&self) -> Duration {
        self.clock.elapsed() - self.skipped
    }

    /// Leave out the time since the last sample.
    pub fn skip(&mut self) {
        let seen = self.samples.last().map_or(Duration::ZERO, |sample| sample.at);
        self.skipped += self.now().saturating_sub(seen);
    }

    /// Note that something happens now.
    pub fn mark(&mut self, what: impl Into<String>) {
        self.marks.push(Mark { at: self.now(), what: what.into() });
    }

    /// Look once, after the time between two samples.
    pub fn look(&mut self) -> Result<Sample, Error> {
        std::thread::sleep(EVERY);
        let last = self.samples.last().copied().unwrap_or_default();
        let (generations, working_set) =
            self.ages().unwrap_or((last.generations, last.working_set));
        let sample = Sample {
            at: self.now(),
            resident: self.vmm.machine.allocated()?,
            generations,
            working_set,
            running: !self.progress.is_stopped(),
            away: self.tier.away(),
            moved: self.tier.moved(),
            visits: self.progress.visits(),
            turns: self.progress.turns(),
        };
        self.samples.push(sample);
        self.draw(&sample)?;
        Ok(sample)
    }

    /// Pages by generation and the working set; `None` while a pass changes them.
    fn ages(&self) -> Option<([u64; GENERATIONS], u64)> {
        let begun = self.progress.is_looking();
        let histogram = Histogram::of(self.table, self.clock.elapsed().as_millis() as u64);
        let mut generations = [0; GENERATIONS];
        for (pages, bin) in generations.iter_mut().zip(histogram.bins().rev()) {
            *pages = bin.pages();
        }
        let set = WorkingSet::of(self.table, 1).map_or(0, |set| set.pages);
        (!begun && !self.progress.is_looking()).then_some((generations, set))
    }

    /// Redraw the live view, if there is one and it is time.
    fn draw(&mut self, sample: &Sample) -> Result<(), Error> {
        let since = self.samples.iter().rev().take_while(|s| s.at + WINDOW >= sample.at).last();
        let speed = Speed::between(since.unwrap_or(sample), sample);
        let Some(view) = self.view.as_mut().filter(|view| view.is_due(sample.at)) else {
            return Ok(());
        };
        let total = self.vmm.shape.pages;
        let what = self.marks.last().map_or("", |mark| mark.what.as_str());
        let mut lines = vec![
            format!(
                "tiering on {}: {} vCPUs, {:.0} MiB   {:6.1} s   {what}",
                self.vmm.machine.name(),
                self.vmm.shape.vcpus,
                mib(total * PAGE),
                sample.at.as_secs_f64(),
            ),
            format!(
                "resident     {} {:7.1} MiB, wanted below {:.1}",
                bar(sample.resident / PAGE, total, '#', Some(self.limit / PAGE)),
                mib(sample.resident),
                mib(self.limit)
            ),
            format!(
                "working set  {} {:7.1} MiB used lately",
                bar(sample.working_set, total, '=', None),
                mib(sample.working_set * PAGE)
            ),
        ];
        for (name, pages) in GENERATION_NAMES.iter().zip(sample.generations) {
            let bar = bar(pages, total, '#', None);
            lines.push(format!("{name:<12} {bar} {:7.1} MiB", mib(pages * PAGE)));
        }
        let away = bar(sample.away, total, '.', None);
        lines.push(format!("slow tier    {away} {:7.1} MiB", mib(sample.away * PAGE)));
        lines.push(format!(
            "moved        {:.0} pages/s out, {:.0} back; {} out, {} back, {} taken back in time",
            speed.out, speed.back, sample.moved.out, sample.moved.back, sample.moved.taken_back
        ));
        lines.push(format!(
            "guest        {:.0} % of its speed without aging",
            speed.visits / self.full_speed.max(1.0) * 100.0
        ));
        view.draw(sample.at, &lines)
    }
}

/// A sample for JSON.
pub fn json(sample: &Sample, speed: &Speed) -> serde_json::Value {
    serde_json::json!({
        "seconds": sample.at.as_secs_f64(),
        "resident_bytes": sample.resident,
        "pages_by_generation_youngest_first": sample.generations,
        "working_set_pages": sample.working_set,
        "slow_tier_pages": sample.away,
        "pages_taken_away": sample.moved.out,
        "refaults": sample.moved.back,
        "guest_visits_per_s": speed.visits,
    })
}

/// What the generations are called, the youngest first.
pub const GENERATION_NAMES: [&str; GENERATIONS] = ["youngest", "second", "third", "oldest"];

/// Bytes in MiB.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

/// A bar that shows `part` of `whole`, with a mark at `wanted`.
fn bar(part: u64, whole: u64, fill: char, wanted: Option<u64>) -> String {
    let columns = |pages: u64| (pages * BAR).div_ceil(whole.max(1)).min(BAR);
    let (filled, wanted) = (columns(part), wanted.map(columns));
    let column = |at| match at {
        _ if Some(at) == wanted => '|',
        _ if at < filled => fill,
        _ => ' ',
    };
    let inner: String = (0..BAR).map(column).collect();
    format!("[{inner}]")
}

/// Lines of a terminal that are drawn again and again in the same place.
#[derive(Debug, Default)]
struct View {
    /// Lines drawn last time.
    lines: usize,
    drawn: Option<Duration>,
}

impl View {
    fn is_due(&self, now: Duration) -> bool {
        self.drawn.is_none_or(|drawn| drawn + REDRAW <= now)
    }

    fn draw(&mut self, now: Duration, lines: &[String]) -> Result<(), Error> {
        let mut out = std::io::stdout().lock();
        if self.lines > 0 {
            // Up to the first of them.
            write!(out, "\x1b[{}A", self.lines)?;
        }
        for line in lines {
            // Whatever stood behind the end of the line goes.
            writeln!(out, "\r{line}\x1b[K")?;
        }
        out.flush()?;
        (self.lines, self.drawn) = (lines.len(), Some(now));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_what_they_show() {
        assert_eq!(bar(0, 100, '#', None), format!("[{}]", " ".repeat(44)));
        assert_eq!(bar(100, 100, '#', None), format!("[{}]", "#".repeat(44)));
        assert_eq!(bar(200, 100, '#', None), bar(100, 100, '#', None));
        let half = bar(50, 100, '#', Some(75));
        assert_eq!(half, format!("[{}{}|{}]", "#".repeat(22), " ".repeat(11), " ".repeat(10)));
    }

    #[test]
    fn speeds_are_averages_over_the_window() {
        let at =
            |ms: u64, visits| Sample { at: Duration::from_millis(ms), visits, ..Sample::default() };
        let samples: Vec<_> = (0..20).map(|n| at(n * 100, n * 1000)).collect();
        let speeds = speeds(&samples);
        assert_eq!(speeds.len(), samples.len());
        for speed in &speeds[1..] {
            assert!((speed.visits - 10_000.0).abs() < 1.0, "{speed:?}");
        }
    }
}
