//! The picture of a tiered VM: its memory by generation over time, resident memory against the
//! working set, the guest's speed, and the pages that moved.

use plotters::prelude::*;
use plotters::series::DashedLineSeries;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::watch::{Mark, Sample, Speed, mib, speeds};
use crate::machine::PAGE;

/// What a picture shows.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// Above everything.
    pub title: &'a str,
    /// What was seen, ascending in time.
    pub samples: &'a [Sample],
    /// What happened.
    pub marks: &'a [Mark],
    /// Pages of the VM.
    pub pages: u64,
    /// Bytes below which resident memory is to fall.
    pub limit: u64,
    /// Pages visited each second without aging.
    pub full_speed: f64,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Failure = Box<dyn std::error::Error>;

const SIZE: (u32, u32) = (1080, 760);
/// Height of the panel of memory; the two below share the rest.
const MEMORY: u32 = 440;
/// Room for the names of what is drawn, at the right.
const NAMES: u32 = 190;
/// Room for the numbers at the left.
const NUMBERS: u32 = 56;

/// From used just now to used long ago.
const WARM: [RGBColor; 3] =
    [RGBColor(214, 84, 48), RGBColor(243, 160, 88), RGBColor(250, 216, 160)];
const NEW: RGBColor = RGBColor(198, 218, 190);
const SLOW: RGBColor = RGBColor(178, 190, 202);
const OUT: RGBColor = RGBColor(92, 108, 124);
const INK: RGBColor = RGBColor(34, 34, 34);
const SET: RGBColor = RGBColor(120, 20, 90);
const GUEST: RGBColor = RGBColor(28, 98, 160);

/// Draw it, as SVG.
pub fn draw(scene: &Scene<'_>) -> Result<String, String> {
    let mut svg = String::new();
    let drawn = {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        draw_all(&root, scene)
    };
    drawn.map_err(|error| format!("the picture: {error}"))?;
    Ok(svg)
}

fn draw_all(root: &Area<'_>, scene: &Scene<'_>) -> Result<(), Failure> {
    root.fill(&WHITE)?;
    let title = ("sans-serif", 19).into_font().color(&INK);
    root.draw(&Text::new(scene.title.to_owned(), (20, 14), title))?;
    let (_, below) = root.split_vertically(40);
    let (memory, below) = below.split_vertically(MEMORY);
    let height = (SIZE.1 - 40 - MEMORY) / 2;
    let (guest, moves) = below.split_vertically(height);
    draw_memory(&memory, scene)?;
    let speeds = speeds(scene.samples);
    draw_guest(&guest, scene, &speeds)?;
    draw_moves(&moves, scene, &speeds)?;
    root.present()?;
    Ok(())
}

fn seconds(sample: &Sample) -> f64 {
    sample.at.as_secs_f64()
}

fn end(scene: &Scene<'_>) -> f64 {
    scene.samples.last().map_or(1.0, seconds).max(0.1)
}

/// A band of the stack: its name, colour and height in pages.
type Band = (&'static str, RGBColor, fn(&Sample, u64) -> u64);

/// From the bottom up. The youngest generation has pages only while a pass is under way.
const BANDS: [Band; 5] = [
    ("two youngest generations", WARM[0], |s, _| s.generations[0] + s.generations[1]),
    ("third generation", WARM[1], |s, _| s.generations[2]),
    ("oldest generation", WARM[2], |s, _| s.generations[3]),
    ("mapped since the last pass", NEW, |s, pages| {
        pages.saturating_sub(s.generations.iter().sum::<u64>() + s.away)
    }),
    ("in the slow tier", SLOW, |s, _| s.away),
];

/// Where each band ends, in MiB, from the bottom up.
fn stack(sample: &Sample, pages: u64) -> [f64; BANDS.len()] {
    let mut sum = 0;
    BANDS.map(|(_, _, height)| {
        sum += height(sample, pages);
        mib(sum.min(pages) * PAGE)
    })
}

fn draw_memory(area: &Area<'_>, scene: &Scene<'_>) -> Result<(), Failure> {
    let top = mib(scene.pages * PAGE) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .margin_right(NAMES)
        .margin_left(10)
        .margin_top(8)
        .x_label_area_size(26)
        .y_label_area_size(NUMBERS)
        .build_cartesian_2d(0f64..end(scene), 0f64..top)?;
    // The highest first: each is drawn down to the axis, and the next one covers what is not its.
    for (upper, (_, colour, _)) in BANDS.iter().enumerate().rev() {
        let points = scene.samples.iter();
        let points = points.map(|sample| (seconds(sample), stack(sample, scene.pages)[upper]));
        chart.draw_series(AreaSeries::new(points, 0.0, colour.filled()))?;
    }
    let resident = scene.samples.iter().map(|sample| (seconds(sample), mib(sample.resident)));
    chart.draw_series(LineSeries::new(resident, INK.stroke_width(3)))?;
    let set = scene.samples.iter().map(|s| (seconds(s), mib(s.working_set * PAGE)));
    chart.draw_series(DashedLineSeries::new(set, 7, 4, SET.stroke_width(3)))?;
    let limit = mib(scene.limit);
    let limit = [(0.0, limit), (end(scene), limit)];
    chart.draw_series(DashedLineSeries::new(limit, 2, 4, INK.stroke_width(1)))?;
    chart
        .configure_mesh()
        .disable_mesh()
        .y_desc("MiB")
        .y_label_formatter(&|mib| format!("{mib:.0}"))
        .x_labels(10)
        .label_style(("sans-serif", 13))
        .draw()?;
    for mark in scene.marks {
        let x = mark.at.as_secs_f64();
        let up = [(x, 0.0), (x, top)];
        chart.draw_series(LineSeries::new(up, INK.mix(0.45).stroke_width(1)))?;
        // Beside its line, on the side where there is room.
        let late = x > end(scene) * 0.75;
        let (side, off) = if late { (HPos::Right, -0.004) } else { (HPos::Left, 0.004) };
        let style = ("sans-serif", 13).into_font().color(&INK).pos(Pos::new(side, VPos::Top));
        let place = (x + end(scene) * off, top * 0.985);
        chart.draw_series([Text::new(mark.what.clone(), place, style)])?;
    }
    let bands = BANDS.iter().rev();
    let mut names: Vec<_> = bands.map(|(name, colour, _)| (*name, Key::Band(*colour))).collect();
    names.push(("resident", Key::Line(INK, 3)));
    names.push(("working set, estimated", Key::Dashed(SET)));
    names.push(("1.3 x the hot set", Key::Dotted(INK)));
    draw_names(area, &names)
}

/// How something is drawn.
enum Key {
    Band(RGBColor),
    Line(RGBColor, u32),
    Dashed(RGBColor),
    Dotted(RGBColor),
}

/// What is drawn how, at the right of a panel.
fn draw_names(area: &Area<'_>, names: &[(&str, Key)]) -> Result<(), Failure> {
    let left = (SIZE.0 - NAMES) as i32 + 14;
    for (row, (name, key)) in (0..).zip(names) {
        let y = 18 + row * 22;
        let line = |from: i32, to: i32, style: ShapeStyle| {
            area.draw(&PathElement::new([(left + from, y), (left + to, y)], style))
        };
        match key {
            Key::Band(colour) => {
                let corners = [(left, y - 7), (left + 22, y + 7)];
                area.draw(&Rectangle::new(corners, colour.filled()))?;
            }
            Key::Line(colour, width) => line(0, 22, colour.stroke_width(*width))?,
            Key::Dashed(colour) => {
                for from in [0, 8, 16] {
                    line(from, from + 6, colour.stroke_width(3))?;
                }
            }
            Key::Dotted(colour) => {
                for from in (0..22).step_by(5) {
                    line(from, from + 2, colour.stroke_width(1))?;
                }
            }
        }
        let place = Pos::new(HPos::Left, VPos::Center);
        let style = ("sans-serif", 13).into_font().color(&INK).pos(place);
        area.draw(&Text::new((*name).to_owned(), (left + 30, y), style))?;
    }
    Ok(())
}

fn draw_guest(area: &Area<'_>, scene: &Scene<'_>, speeds: &[Speed]) -> Result<(), Failure> {
    let percent = |speed: &Speed| speed.visits / scene.full_speed.max(1.0) * 100.0;
    let top = speeds.iter().map(percent).fold(110.0, f64::max).min(150.0);
    let mut chart = ChartBuilder::on(area)
        .margin_right(NAMES)
        .margin_left(10)
        .margin_top(8)
        .x_label_area_size(22)
        .y_label_area_size(NUMBERS)
        .build_cartesian_2d(0f64..end(scene), 0f64..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .y_labels(4)
        .y_desc("% of full speed")
        .y_label_formatter(&|percent| format!("{percent:.0}"))
        .label_style(("sans-serif", 13))
        .draw()?;
    let full = [(0.0, 100.0), (end(scene), 100.0)];
    chart.draw_series(DashedLineSeries::new(full, 2, 4, INK.stroke_width(1)))?;
    let points = scene.samples.iter().zip(speeds).skip(1);
    let points = points.filter(|(sample, _)| sample.running);
    let points = points.map(|(sample, speed)| (seconds(sample), percent(speed).min(top)));
    chart.draw_series(LineSeries::new(points, GUEST.stroke_width(2)))?;
    draw_names(area, &[("guest", Key::Line(GUEST, 2)), ("without aging", Key::Dotted(INK))])
}

fn draw_moves(area: &Area<'_>, scene: &Scene<'_>, speeds: &[Speed]) -> Result<(), Failure> {
    let top = speeds.iter().map(|s| s.out.max(s.back)).fold(1000.0, f64::max) * 1.05 / 1000.0;
    let mut chart = ChartBuilder::on(area)
        .margin_right(NAMES)
        .margin_left(10)
        .margin_top(8)
        .x_label_area_size(40)
        .y_label_area_size(NUMBERS)
        .build_cartesian_2d(0f64..end(scene), 0f64..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .y_labels(4)
        .x_desc("seconds")
        .y_desc("1000 pages/s")
        .label_style(("sans-serif", 13))
        .draw()?;
    let of = |pick: fn(&Speed) -> f64| {
        let points = scene.samples.iter().zip(speeds).skip(1);
        points.map(move |(sample, speed)| (seconds(sample), pick(speed) / 1000.0))
    };
    chart.draw_series(LineSeries::new(of(|speed| speed.out), OUT.stroke_width(2)))?;
    chart.draw_series(LineSeries::new(of(|speed| speed.back), WARM[0].stroke_width(2)))?;
    draw_names(area, &[("taken away", Key::Line(OUT, 2)), ("brought back", Key::Line(WARM[0], 2))])
}
