//! Figures as SVG: what came, and how many replicas were ready for it.
use std::fmt::Write;

use super::compare::{Comparison, Run};
use super::trace::Trace;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 40.0;
const RIGHT: f64 = 850.0;
const PANEL: f64 = 190.0;
const HEIGHT: f64 = 140.0;
const TOP: f64 = 50.0;
const LEGEND: f64 = 130.0;
const LEGEND_STEP: f64 = 180.0;
/// Lathe and its peers, in their order.
const COLOURS: [&str; 4] = ["#c0392b", "#2471a3", "#1e8449", "#b7950b"];

/// The figure of a trace: a panel for each start-up time.
pub fn figure(trace: &Trace, comparisons: &[Comparison]) -> String {
    let height = TOP + PANEL * comparisons.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    text(
        &mut svg,
        LEFT,
        18.0,
        "#222",
        &format!(
            "{}: ready replicas; grey: replicas' worth of work that comes. Late: of all draws; lines: of the first",
            trace.name
        ),
    );
    let load = trace.counted();
    for (at, comparison) in comparisons.iter().enumerate() {
        panel(&mut svg, TOP + PANEL * at as f64, load, comparison);
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, top: f64, load: &[f64], comparison: &Comparison) {
    let runs: Vec<&Run> = [&comparison.lathe].into_iter().chain(&comparison.peers).collect();
    text(svg, LEFT, top - 8.0, "#222", &format!("start-up {} s", comparison.start_up));
    for (at, (run, colour)) in runs.iter().zip(COLOURS).enumerate() {
        let late = 100.0 * run.outcome.late_share();
        let words = format!("{} ({}): {late:.2} %", run.name, run.settings);
        text(svg, LEGEND + LEGEND_STEP * at as f64, top - 8.0, colour, &words);
    }
    let peak = load.iter().copied().fold(1.0, f64::max);
    let most = runs.iter().flat_map(|run| &run.outcome.ready).copied().max().unwrap_or(1);
    // What is far above the load would flatten everything else.
    let most = f64::from(most).max(peak).min(peak * 3.0).ceil();
    let place = |second: usize, value: f64| {
        let x = LEFT + (RIGHT - LEFT) * second as f64 / load.len().max(1) as f64;
        (x, top + HEIGHT * (1.0 - value.min(most) / most))
    };
    let (bottom, minutes) = (top + HEIGHT, load.len() / 60);
    let mut area = format!("M{LEFT} {bottom:.0}");
    for (second, load) in load.iter().enumerate().step_by(20) {
        let (x, y) = place(second, *load);
        let _ = write!(area, "L{x:.1} {y:.1}");
    }
    let _ = writeln!(svg, "<path d=\"{area}L{RIGHT} {bottom:.0}Z\" fill=\"#ddd\"/>");
    let _ = writeln!(svg, "<path d=\"M{LEFT} {top:.0}V{bottom:.0}H{RIGHT}\" fill=\"none\" stroke=\"#888\"/>");
    text(svg, 12.0, top + 10.0, "#222", &format!("{most:.0}"));
    text(svg, 12.0, bottom, "#222", "0");
    text(svg, RIGHT - 40.0, bottom + 13.0, "#222", &format!("{minutes} min"));
    for (run, colour) in runs.iter().zip(COLOURS).rev() {
        let mut line = String::new();
        let mut last = None;
        for (second, ready) in run.outcome.ready.iter().enumerate() {
            if last != Some(*ready) {
                let (x, y) = place(second, f64::from(*ready));
                let _ = if last.is_none() {
                    write!(line, "M{x:.1} {y:.1}")
                } else {
                    write!(line, "H{x:.1}V{y:.1}")
                };
                last = Some(*ready);
            }
        }
        let _ = writeln!(
            svg,
            "<path d=\"{line}H{RIGHT}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.3\"/>"
        );
    }
}

fn text(svg: &mut String, x: f64, y: f64, colour: &str, words: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.0}\" y=\"{y:.0}\" fill=\"{colour}\">{words}</text>");
}
