//! What a scenario found: checks that hold or not, counts, figures with units.

use std::borrow::Cow;
use std::path::Path;

/// One thing that must hold.
#[derive(Clone, Debug)]
pub struct Check {
    /// What, in kebab case.
    pub name: Cow<'static, str>,
    /// Did it hold?
    pub ok: bool,
    /// The values.
    pub detail: String,
}

/// A series for the picture: (x, y) points with a name.
#[derive(Clone, Debug)]
pub struct Series {
    /// What is drawn.
    pub name: String,
    /// Points, x ascending.
    pub points: Vec<(f64, f64)>,
}

/// A scenario's report.
#[derive(Clone, Debug)]
pub struct Report {
    /// The scenario's name.
    pub scenario: &'static str,
    /// "kvm" or "soft".
    pub cpu: &'static str,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes the workload touched.
    pub memory_bytes: u64,
    /// Wall time.
    pub seconds: f64,
    /// What must hold.
    pub checks: Vec<Check>,
    /// Counts.
    pub counters: Vec<(String, u64)>,
    /// Figures, the unit in the key.
    pub metrics: Vec<(String, f64)>,
    /// What `--plot` draws: title, x and y labels, series.
    pub plot: Option<(String, String, String, Vec<Series>)>,
    /// What it draws instead, where there is a picture made for the scenario.
    pub svg: Option<String>,
    /// What was seen over time, the unit in each key; in JSON only.
    pub timeline: Vec<serde_json::Value>,
}

impl Report {
    /// An empty report.
    pub fn new(scenario: &'static str, cpu: &'static str, vcpus: u32, memory_bytes: u64) -> Self {
        Self {
            scenario,
            cpu,
            vcpus,
            memory_bytes,
            seconds: 0.0,
            checks: Vec::new(),
            counters: Vec::new(),
            metrics: Vec::new(),
            plot: None,
            svg: None,
            timeline: Vec::new(),
        }
    }

    /// Note a check.
    pub fn check(
        &mut self,
        name: impl Into<Cow<'static, str>>,
        ok: bool,
        detail: impl Into<String>,
    ) {
        self.checks.push(Check { name: name.into(), ok, detail: detail.into() });
    }

    /// Note a count.
    pub fn count(&mut self, name: impl Into<String>, value: u64) {
        self.counters.push((name.into(), value));
    }

    /// Note a figure.
    pub fn metric(&mut self, name: impl Into<String>, value: f64) {
        self.metrics.push((name.into(), value));
    }

    /// Note the median, the 99th percentile and the maximum of `nanoseconds`.
    pub fn percentiles(&mut self, name: &str, mut nanoseconds: Vec<u64>) {
        if nanoseconds.is_empty() {
            return;
        }
        nanoseconds.sort_unstable();
        let at = |share: f64| nanoseconds[((nanoseconds.len() - 1) as f64 * share) as usize];
        self.metric(format!("{name}_ns_p50"), at(0.5) as f64);
        self.metric(format!("{name}_ns_p99"), at(0.99) as f64);
        self.metric(format!("{name}_ns_max"), at(1.0) as f64);
    }

    /// Did everything hold? A report without checks holds nothing.
    pub fn ok(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.ok)
    }

    /// Print for people.
    pub fn print(&self) {
        let size = self.memory_bytes as f64 / (1 << 20) as f64;
        println!(
            "\n{} on {}: {} vCPUs, {size:.0} MiB, {:.2} s",
            self.scenario, self.cpu, self.vcpus, self.seconds
        );
        for (name, value) in &self.counters {
            println!("  {name:<32} {value:>14}");
        }
        for (name, value) in &self.metrics {
            println!("  {name:<32} {value:>14.2}");
        }
        for check in &self.checks {
            let mark = if check.ok { "ok  " } else { "FAIL" };
            println!("  [{mark}] {}: {}", check.name, check.detail);
        }
        println!("{}: {}", self.scenario, if self.ok() { "ok" } else { "FAILED" });
    }

    /// The JSON object that `--json` holds.
    pub fn json(&self) -> serde_json::Value {
        let checks: Vec<_> = self
            .checks
            .iter()
            .map(|c| serde_json::json!({"name": c.name, "ok": c.ok, "detail": c.detail}))
            .collect();
        let counters: serde_json::Map<_, _> =
            self.counters.iter().map(|(k, v)| (k.clone(), (*v).into())).collect();
        let metrics: serde_json::Map<_, _> =
            self.metrics.iter().map(|(k, v)| (k.clone(), serde_json::json!(v))).collect();
        serde_json::json!({
            "scenario": self.scenario,
            "cpu": self.cpu,
            "vcpus": self.vcpus,
            "memory_bytes": self.memory_bytes,
            "seconds": self.seconds,
            "ok": self.ok(),
            "checks": checks,
            "counters": counters,
            "metrics": metrics,
            "timeline": self.timeline,
        })
    }

    /// Draw the scenario's picture.
    pub fn draw(&self, path: &Path) -> Result<(), String> {
        use plotters::prelude::*;
        if let Some(svg) = &self.svg {
            return std::fs::write(path, svg)
                .map_err(|error| format!("{}: {error}", path.display()));
        }
        let Some((title, x_label, y_label, series)) = &self.plot else {
            return Err(format!("{} has nothing to draw", self.scenario));
        };
        let all = || series.iter().flat_map(|s| s.points.iter().copied());
        let max_x = all().map(|p| p.0).fold(1e-9, f64::max);
        let max_y = all().map(|p| p.1).fold(1e-9, f64::max) * 1.05;
        let root = SVGBackend::new(path, (900, 500)).into_drawing_area();
        let draw = || -> Result<(), Box<dyn std::error::Error>> {
            root.fill(&WHITE)?;
            let mut chart = ChartBuilder::on(&root)
                .caption(title, ("sans-serif", 20))
                .margin(12)
                .x_label_area_size(40)
                .y_label_area_size(70)
                .build_cartesian_2d(0f64..max_x, 0f64..max_y)?;
            chart.configure_mesh().x_desc(x_label).y_desc(y_label).draw()?;
            let colours = [BLUE, RED, GREEN, MAGENTA, CYAN, BLACK];
            for (one, colour) in series.iter().zip(colours.iter().cycle()) {
                let colour = *colour;
                chart
                    .draw_series(LineSeries::new(one.points.iter().copied(), colour))?
                    .label(one.name.clone())
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
            }
            chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
            root.present()?;
            Ok(())
        };
        draw().map_err(|error| format!("{}: {error}", path.display()))
    }
}
