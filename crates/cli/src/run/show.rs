//! What a run says: lines and a bar for people, or one JSON object a line for programs.
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use lathe_api::ScoreStatus;
use lathe_contract::{Phase, Report, TrainProgress};
use serde::Serialize;

use crate::output::{Output, note, say};

/// Between two lines of progress, for people where nothing can be drawn over, and for programs.
const PAUSE: Duration = Duration::from_secs(5);
const PAUSE_JSON: Duration = Duration::from_secs(1);

/// One thing that happened, as `-o json` tells it.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Event<'a> {
    /// Not ours, or nothing to do here.
    Skipped { object: &'a str, why: &'a str },
    /// A worker begins.
    Started { object: &'a str, task: &'a str, log: String },
    /// It goes on.
    Progress { object: &'a str, phase: Phase, message: &'a str, progress: Option<&'a TrainProgress> },
    /// It has ended well.
    Finished { object: &'a str, task: &'a str, message: &'a str, seconds: f64 },
    /// A model was tuned, or an earlier run had done it.
    Tuned { object: &'a str, model: &'a str, folder: &'a str, adopted: bool, scores: &'a [ScoreStatus] },
    /// An endpoint answers.
    Serving { object: &'a str, url: &'a str, models: &'a [String] },
    /// It has ended otherwise.
    Failed { object: &'a str, task: &'a str, reason: &'a str, message: &'a str },
}

/// The steps of one run.
#[derive(Debug)]
pub struct Show {
    output: Output,
    step: Option<Step>,
}

#[derive(Debug)]
struct Step {
    object: String,
    task: &'static str,
    started: Instant,
    bar: ProgressBar,
    told: Option<(Phase, Instant)>,
}

impl Show {
    pub fn new(output: Output) -> Self {
        Self { output, step: None }
    }

    /// A line between steps.
    pub fn note(&self, text: &str) {
        if self.output == Output::Text {
            note(&format!("    {text}"));
        }
    }

    pub fn event(&self, event: &Event<'_>) {
        if self.output == Output::Json {
            // Where whoever read it has gone, the run goes on.
            say(&serde_json::to_string(event).unwrap_or_default());
        }
    }

    /// A worker begins `task` for `object`.
    pub fn begin(&mut self, object: &str, task: &'static str, log: &std::path::Path) {
        self.event(&Event::Started { object, task, log: log.display().to_string() });
        let bar = if self.output == Output::Text && std::io::stderr().is_terminal() {
            let bar = ProgressBar::new_spinner();
            bar.set_style(style("  {spinner} {prefix} {msg} ({elapsed})"));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar.set_prefix(format!("{object}: {task}"));
            bar
        } else {
            ProgressBar::hidden()
        };
        self.step = Some(Step { object: object.to_owned(), task, started: Instant::now(), bar, told: None });
    }

    /// What the worker says of itself.
    pub fn report(&mut self, report: &Report) {
        let Some(step) = &mut self.step else { return };
        let progress = report.progress.as_ref().filter(|progress| progress.steps > 0);
        let training = progress.filter(|_| report.phase == Phase::Training);
        if let Some(progress) = training {
            let unsigned = |number: i64| u64::try_from(number).unwrap_or(0);
            step.bar.set_style(style("  {spinner} {prefix} [{bar:30}] {msg}"));
            step.bar.set_length(unsigned(progress.steps));
            step.bar.set_position(unsigned(progress.step));
            step.bar.set_message(line(progress));
        } else {
            step.bar.set_style(style("  {spinner} {prefix}: {msg} ({elapsed})"));
            step.bar.set_message(report.message.clone());
        }
        let pause = if self.output == Output::Json { PAUSE_JSON } else { PAUSE };
        let due = step.told.is_none_or(|(phase, at)| {
            phase != report.phase || (report.phase == Phase::Training && at.elapsed() >= pause)
        });
        if !due {
            return;
        }
        step.told = Some((report.phase, Instant::now()));
        if self.output == Output::Text && step.bar.is_hidden() && !report.message.is_empty() {
            match training {
                Some(progress) => note(&format!("    {}", line(progress))),
                None => note(&format!("    {}", report.message)),
            }
        }
        let object = step.object.clone();
        let message = report.message.as_str();
        self.event(&Event::Progress { object: &object, phase: report.phase, message, progress });
    }

    /// The step has ended well.
    pub fn done(&mut self, message: &str) {
        let Some(step) = self.step.take() else { return };
        let seconds = step.started.elapsed().as_secs_f64();
        step.bar.finish_and_clear();
        if self.output == Output::Text {
            note(&format!("  ok {}: {}: {message} ({seconds:.1} s)", step.object, step.task));
        }
        self.event(&Event::Finished { object: &step.object, task: step.task, message, seconds });
    }

    /// The step has not.
    pub fn failed(&mut self, reason: &str, message: &str) {
        let Some(step) = self.step.take() else { return };
        step.bar.finish_and_clear();
        if self.output == Output::Text {
            let how = if reason == "Stopped" { "stopped" } else { "FAILED" };
            let seconds = step.started.elapsed().as_secs_f64();
            note(&format!("  {how} {}: {} ({seconds:.1} s)", step.object, step.task));
        }
        self.event(&Event::Failed { object: &step.object, task: step.task, reason, message });
    }
}

/// Where training stands: `step 120/300 (40 %), loss 0.812, 5300 tokens/s, 35 s left`
fn line(progress: &TrainProgress) -> String {
    if progress.step == 0 {
        return format!("step 0/{}", progress.steps);
    }
    let TrainProgress { step, steps, loss, tokens_per_second, remaining_seconds, .. } = progress;
    let share = 100.0 * *step as f64 / (*steps).max(1) as f64;
    format!(
        "step {step}/{steps} ({share:.0} %), loss {loss:.3}, {tokens_per_second:.0} tokens/s, {} left",
        time(*remaining_seconds)
    )
}

/// Seconds for people.
fn time(seconds: f64) -> String {
    let whole = if seconds.is_finite() { seconds.clamp(0.0, 1e9).round() as u64 } else { 0 };
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes}:{seconds:02}"),
        (hours, minutes, _) => format!("{hours} h {minutes:02} min"),
    }
}

/// Measurements before and after, as a table.
pub fn table(scores: &[ScoreStatus]) -> String {
    let mut text = format!("  {:<12}{:>10}{:>10}", "score", "before", "after");
    for score in scores {
        let value =
            |value: &Option<lathe_api::Decimal>| value.as_ref().map_or("-".to_owned(), |v| v.0.clone());
        let metric = lathe_resolve::to_metric(score.metric).as_str();
        text.push_str(&format!("\n  {metric:<12}{:>10}{:>10}", value(&score.before), value(&score.after)));
    }
    text
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(4.4, "4 s")]
    #[case(61.0, "1:01")]
    #[case(3700.0, "1 h 01 min")]
    #[case(f64::NAN, "0 s")]
    fn times_are_short(#[case] seconds: f64, #[case] expected: &str) {
        assert_eq!(time(seconds), expected);
    }

    #[test]
    fn progress_is_one_line() {
        let progress = TrainProgress {
            step: 12,
            steps: 48,
            loss: 0.51234,
            tokens_per_second: 5321.7,
            remaining_seconds: 30.2,
            ..TrainProgress::default()
        };
        assert_eq!(line(&progress), "step 12/48 (25 %), loss 0.512, 5322 tokens/s, 30 s left");
        assert_eq!(line(&TrainProgress { steps: 48, ..TrainProgress::default() }), "step 0/48");
    }

    #[test]
    fn an_event_is_told_apart_by_its_name() {
        let event = Event::Tuned { object: "o", model: "m", folder: "f", adopted: true, scores: &[] };
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!((json["event"].as_str(), json["adopted"].as_bool()), (Some("tuned"), Some(true)));
    }
}
