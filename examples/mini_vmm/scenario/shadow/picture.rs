//! The picture of the experiment: refills added up, and the number of shadow tables, by policy.

use plotters::prelude::*;
use plotters::series::DashedLineSeries;

use super::experiment::Course;

/// A policy and what it did.
pub type Line<'a> = (&'a str, &'a Course);

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Failure = Box<dyn std::error::Error>;

const SIZE: (u32, u32) = (960, 620);
/// Room for the title, and the height of the upper panel.
const TITLE: u32 = 40;
const REFILLS: u32 = 330;
/// Room for the numbers at the left.
const NUMBERS: u32 = 60;

const INK: RGBColor = RGBColor(34, 34, 34);
const COLOURS: [RGBColor; 2] = [RGBColor(214, 84, 48), RGBColor(28, 98, 160)];

/// Draw it, as SVG: the number of tables may be `quota`, and counting begins after round `warm`.
pub fn draw(title: &str, lines: &[Line<'_>], quota: u32, warm: u64) -> Result<String, String> {
    let mut svg = String::new();
    let drawn = {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        draw_all(&root, title, lines, quota, warm)
    };
    drawn.map_err(|error| format!("the picture: {error}"))?;
    Ok(svg)
}

fn draw_all(
    root: &Area<'_>,
    title: &str,
    lines: &[Line<'_>],
    quota: u32,
    warm: u64,
) -> Result<(), Failure> {
    root.fill(&WHITE)?;
    let style = ("sans-serif", 19).into_font().color(&INK);
    root.draw(&Text::new(title.to_owned(), (20, 14), style))?;
    let (_, below) = root.split_vertically(TITLE);
    let (refills, tables) = below.split_vertically(REFILLS);
    draw_refills(&refills, lines, warm)?;
    draw_tables(&tables, lines, quota)?;
    root.present()?;
    Ok(())
}

fn last_round(lines: &[Line<'_>]) -> f64 {
    lines.iter().map(|(_, course)| course.rounds.len()).max().unwrap_or(1).max(1) as f64
}

/// Refills of each round since `warm`, added up.
fn sums(course: &Course, warm: u64) -> Vec<(f64, f64)> {
    let mut sum = 0;
    let rounds = (0..).zip(&course.rounds);
    let rounds = rounds.map(|(at, round): (u64, _)| {
        sum += if at > warm { round.refills } else { 0 };
        (at as f64, sum as f64)
    });
    rounds.collect()
}

fn draw_refills(area: &Area<'_>, lines: &[Line<'_>], warm: u64) -> Result<(), Failure> {
    let all: Vec<_> = lines.iter().map(|(_, course)| sums(course, warm)).collect();
    let top = all.iter().flatten().map(|(_, sum)| *sum).fold(10.0, f64::max) * 1.05;
    let mut chart = ChartBuilder::on(area)
        .margin_right(20)
        .margin_left(10)
        .margin_top(8)
        .x_label_area_size(24)
        .y_label_area_size(NUMBERS)
        .build_cartesian_2d(0f64..last_round(lines), 0f64..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .y_desc("refills since the warm-up")
        .y_label_formatter(&|sum| format!("{sum:.0}"))
        .x_label_formatter(&|round| format!("{round:.0}"))
        .label_style(("sans-serif", 13))
        .draw()?;
    for (((name, _), points), colour) in lines.iter().zip(all).zip(COLOURS) {
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(3)))?
            .label((*name).to_owned())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 14))
        .border_style(INK)
        .background_style(WHITE)
        .draw()?;
    Ok(())
}

fn draw_tables(area: &Area<'_>, lines: &[Line<'_>], quota: u32) -> Result<(), Failure> {
    let end = last_round(lines);
    let top = f64::from(quota) * 1.15;
    let mut chart = ChartBuilder::on(area)
        .margin_right(20)
        .margin_left(10)
        .margin_top(8)
        .x_label_area_size(40)
        .y_label_area_size(NUMBERS)
        .build_cartesian_2d(0f64..end, 0f64..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_desc("rounds of the guest's loop")
        .y_desc("shadow tables")
        .y_label_formatter(&|tables| format!("{tables:.0}"))
        .x_label_formatter(&|round| format!("{round:.0}"))
        .label_style(("sans-serif", 13))
        .draw()?;
    let limit = [(0.0, f64::from(quota)), (end, f64::from(quota))];
    chart.draw_series(DashedLineSeries::new(limit, 4, 4, INK.stroke_width(1)))?;
    for ((_, course), colour) in lines.iter().zip(COLOURS) {
        let rounds = (0u32..).zip(&course.rounds);
        let points = rounds.map(|(at, round)| (f64::from(at), f64::from(round.tables)));
        chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
    }
    Ok(())
}
