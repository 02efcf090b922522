//! The conditions of each stage.
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use lathe_api::{
    FineTuneJob, FineTuneJobStatus,
    conditions::{RECONCILING, STALLED, SUCCEEDED, State},
};
use lathe_contract::{CheckDataReport, Measured, Phase};
use lathe_resolve::finetune::{caveat, failed_gates};

use super::super::{
    DATASET_VALID,
    observe::Observed,
    plan::{Hold, Plan, Stage},
};
use crate::{
    claims,
    pods::{Trouble, UNSCHEDULABLE},
    unplaced::{self, Asked},
};

/// Reason: another job that is ahead makes the Model of this name.
const OUTPUT_RESERVED: &str = "OutputReserved";

/// What one condition says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub state: State,
    pub reason: String,
    pub message: String,
}

/// What nobody has looked at yet.
pub fn unknown() -> Line {
    Line { state: State::Unknown, reason: "NotStarted".to_owned(), message: "not looked at yet".to_owned() }
}

pub fn state(text: &str) -> State {
    match text {
        "True" => State::True,
        "False" => State::False,
        _ => State::Unknown,
    }
}

fn line(state: State, reason: impl Into<String>, message: impl Into<String>) -> Option<Line> {
    Some(Line { state, reason: reason.into(), message: message.into() })
}

/// Whether anything more will happen by itself.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Drive {
    GoesOn,
    NeedsAPerson,
    Done,
}

/// Every condition, in the order in which people read them; `None` keeps what it says.
pub fn lines(
    job: &FineTuneJob,
    fresh: &FineTuneJobStatus,
    observed: &Observed,
    plan: &Plan,
    refused: Option<&Trouble>,
) -> Vec<(&'static str, Option<Line>)> {
    let mut known = vec![
        ("Planned", planned(plan, fresh)),
        (DATASET_VALID, dataset(plan)),
        ("Scheduled", scheduled(fresh, observed, plan)),
        ("Training", training(observed, plan)),
        ("Evaluated", evaluated(job, plan)),
    ];
    let (headline, drive) = match refused {
        Some(Trouble { reason, message, stalled }) => {
            let drive = if *stalled { Drive::NeedsAPerson } else { Drive::GoesOn };
            (line(State::Unknown, reason, message), drive)
        }
        None => headline(job, fresh, observed, plan),
    };
    let cause = headline.clone();
    let kept = |on: bool| cause.clone().map(|cause| Line { state: State::from(on), ..cause });
    // Over: what was said of the end stands.
    let over = plan.stage == Stage::Over;
    known.push((SUCCEEDED, headline));
    known.push((RECONCILING, if over { None } else { kept(drive == Drive::GoesOn) }));
    known.push((STALLED, if over { None } else { kept(drive == Drive::NeedsAPerson) }));
    known
}

fn planned(plan: &Plan, fresh: &FineTuneJobStatus) -> Option<Line> {
    match &plan.stage {
        Stage::Waiting(why) | Stage::Rejected(why) => line(State::False, why.reason, why.message.clone()),
        _ => {
            plan.training.as_ref()?;
            let plan = fresh.plan.as_ref()?;
            let profile = plan.profile.as_deref().unwrap_or_default();
            let total =
                plan.memory.iter().find(|row| row.name == "total").map_or("", |row| row.value.as_str());
            let time = plan.duration.as_ref().map_or(String::new(), |d| format!(", about {d}"));
            let passed = &fresh.passed_over;
            let passed = match (passed.is_empty(), passed.join(", ")) {
                (true, _) => String::new(),
                (false, names) => format!("; {names} had no room within `accelerator.fallbackAfter`"),
            };
            let caveat = caveat(plan).map_or(String::new(), |caveat| format!("; {caveat}"));
            let count = plan.count.unwrap_or(1);
            let message = format!("{count} x {profile}, {total} of memory{time}{caveat}{passed}");
            line(State::True, "Planned", message)
        }
    }
}

fn dataset(plan: &Plan) -> Option<Line> {
    if let Some(report) = &plan.checked {
        return line(State::True, "Checked", rows(report));
    }
    match &plan.stage {
        Stage::Checking(None) => line(State::Unknown, "Checking", "a pod reads the dataset"),
        Stage::Checking(Some(trouble)) => line(State::Unknown, &trouble.reason, &trouble.message),
        Stage::BadData(trouble) => {
            // What is not the data's fault says nothing of the data.
            let state = if trouble.stalled { State::False } else { State::Unknown };
            line(state, &trouble.reason, &trouble.message)
        }
        _ => None,
    }
}

/// "5000 rows (Chat), 1200000 tokens, 250 held out; 3 rows are cut".
fn rows(report: &CheckDataReport) -> String {
    let mut text = format!("{} rows ({}), {} tokens", report.rows, report.format, report.tokens);
    for (count, words) in [
        (report.evaluation_rows, "held out"),
        (report.over_long_rows, "cut, since they are longer than `training.sequenceLength`"),
        (report.duplicate_rows, "stand more than once"),
        (report.leaked_rows, "held out and trained on too"),
    ] {
        if count > 0 {
            text.push_str(&format!(", {count} {words}"));
        }
    }
    text
}

fn scheduled(fresh: &FineTuneJobStatus, observed: &Observed, plan: &Plan) -> Option<Line> {
    match &plan.stage {
        Stage::Pending(Some(trouble)) if trouble.reason == UNSCHEDULABLE => {
            unschedulable(fresh, observed, plan, trouble)
        }
        Stage::Pending(Some(trouble)) if trouble.reason == "VolumeNotFound" => {
            line(State::False, &trouble.reason, &trouble.message)
        }
        Stage::Pending(_) => {
            let newest = observed.attempt.as_ref().and_then(|a| a.run.pods.first());
            placed(newest.map(|pod| &**pod))
                .or_else(|| line(State::Unknown, "Pending", "its pod is on its way"))
        }
        Stage::Queued => {
            line(State::False, "Queued", "a queue holds the Job; it starts when the queue lets it")
        }
        Stage::Behind(why) => line(State::False, OUTPUT_RESERVED, why),
        Stage::Held(Hold::User) => line(State::False, "Suspended", "`spec.suspend` is true"),
        Stage::Held(Hold::Budget(why)) => line(State::False, "BudgetExceeded", format!("stopped {why}.")),
        Stage::Running => placed(observed.attempt.as_ref().and_then(|a| a.run.working()))
            .or_else(|| line(State::True, "Scheduled", "its pod runs")),
        Stage::Lost(_) | Stage::Finished { adopted: false, .. } | Stage::Failed(_) => {
            line(State::True, "Scheduled", "its pod has run")
        }
        Stage::Finished { adopted: true, .. } => {
            line(State::False, "NotNeeded", "an equal job had made the model")
        }
        _ => None,
    }
}

/// Where a pod is; `None` where it has no node.
fn placed(pod: Option<&Pod>) -> Option<Line> {
    let pod = pod.filter(|pod| pod.metadata.deletion_timestamp.is_none())?;
    let node = pod.spec.as_ref()?.node_name.as_ref()?;
    let beside = claims::words(pod.metadata.labels.as_ref());
    line(State::True, "Scheduled", format!("on node {node}{beside}"))
}

/// Why no node takes the pod, and since when.
fn unschedulable(
    fresh: &FineTuneJobStatus,
    observed: &Observed,
    plan: &Plan,
    trouble: &Trouble,
) -> Option<Line> {
    let attempt = observed.attempt.as_ref()?;
    let since = attempt.run.pods.first().and_then(|pod| pod.metadata.creation_timestamp.as_ref());
    let mut since = since.map_or(String::new(), |t| format!("; waiting since {} UTC", t.0.strftime("%H:%M")));
    if let Some(due) = plan.falls_back {
        since.push_str(&format!("; another profile is tried at {} UTC", due.strftime("%H:%M")));
    }
    let named = attempt.run.annotation(super::super::build::PROFILE).unwrap_or_default();
    let Some(profile) = observed.profiles.iter().find(|profile| profile.name_any() == named) else {
        let next = format!("Next: make AcceleratorProfile {named} again, or allow another one.");
        return line(
            State::False,
            UNSCHEDULABLE,
            format!("no node takes the pod: {}{since}. {next}", trouble.message),
        );
    };
    let count = fresh.plan.as_ref().and_then(|plan| plan.count).unwrap_or(1).into();
    let asked = Asked { profile, count, anew: " of a new FineTuneJob" };
    let Trouble { reason, message, .. } =
        unplaced::trouble(&trouble.message, asked, observed.capacity.as_ref(), &since);
    line(State::False, reason, message)
}

fn training(observed: &Observed, plan: &Plan) -> Option<Line> {
    match &plan.stage {
        Stage::Running => {
            let report = observed.report.as_ref();
            let phase = report.map_or("Starting".to_owned(), |r| format!("{:?}", r.phase));
            let said = report.map(|r| r.message.clone()).filter(|m| !m.is_empty());
            let trains = report.is_some_and(|r| r.phase == Phase::Training);
            let state = if trains { State::True } else { State::Unknown };
            line(state, phase, said.unwrap_or_else(|| "the worker is at it".to_owned()))
        }
        Stage::Pending(Some(trouble)) if !is_placing(trouble) => {
            line(State::False, &trouble.reason, &trouble.message)
        }
        Stage::Pending(_) => line(State::Unknown, "Pending", "the worker has not started"),
        Stage::Held(_) => line(State::False, "Suspended", "no pod runs; the last checkpoint is kept"),
        Stage::Failed(trouble) => line(State::False, &trouble.reason, &trouble.message),
        Stage::Lost(_) | Stage::Finished { adopted: false, .. } => {
            line(State::False, "Finished", "training is done")
        }
        Stage::Finished { adopted: true, .. } => {
            line(State::False, "NotNeeded", "an equal job had made the model")
        }
        _ => None,
    }
}

/// Trouble that `Scheduled` tells.
fn is_placing(trouble: &Trouble) -> bool {
    trouble.reason == UNSCHEDULABLE || trouble.reason == "VolumeNotFound"
}

fn evaluated(job: &FineTuneJob, plan: &Plan) -> Option<Line> {
    let (scores, measured) = match &plan.stage {
        Stage::Finished { scores, measured, .. } => (scores, measured),
        _ => return None,
    };
    if scores.is_empty() {
        let message = "nothing was measured: the dataset has no held-out rows (`dataset.evaluation` or `dataset.holdout`)";
        return line(State::False, "NotMeasured", message);
    }
    let failed = failed_gates(&job.spec.evaluation.gates, scores);
    if !failed.is_empty() {
        let on = measured.as_ref().map_or(String::new(), sample);
        return line(State::False, "GateFailed", format!("{}{on}", failed.join("; ")));
    }
    let text = |v: &Option<lathe_api::Decimal>| v.as_ref().map_or("unknown", |d| d.0.as_str()).to_owned();
    let told: Vec<String> =
        scores.iter().map(|s| format!("{:?} {} -> {}", s.metric, text(&s.before), text(&s.after))).collect();
    let on = measured.as_ref().map_or(String::new(), sample);
    line(State::True, "Evaluated", format!("{}{on}", told.join(", ")))
}

/// " (on 1000 of 5000 held-out rows, with 64 questions)": a worker's numbers, so never below zero.
fn sample(measured: &Measured) -> String {
    let Measured { held_out, rows, questions } = *measured;
    if rows <= 0 {
        return String::new();
    }
    let of = if rows < held_out { format!("{rows} of {held_out}") } else { rows.to_string() };
    let asked = if questions > 0 { format!(", with {questions} questions") } else { String::new() };
    format!(" (on {of} held-out rows{asked})")
}

/// `Succeeded`, and who must act next.
fn headline(
    job: &FineTuneJob,
    fresh: &FineTuneJobStatus,
    observed: &Observed,
    plan: &Plan,
) -> (Option<Line>, Drive) {
    let unknown = |reason: &str, message: &str| line(State::Unknown, reason, message);
    let troubled = |trouble: &Trouble| {
        let drive = if trouble.stalled { Drive::NeedsAPerson } else { Drive::GoesOn };
        (unknown(&trouble.reason, &trouble.message), drive)
    };
    match &plan.stage {
        Stage::Waiting(why) => (unknown(why.reason, &why.message), Drive::GoesOn),
        Stage::Rejected(why) => (unknown(why.reason, &why.message), Drive::NeedsAPerson),
        Stage::Checking(None) => (unknown("CheckingDataset", "a pod reads the dataset"), Drive::GoesOn),
        Stage::Taken(message) => (unknown("OutputExists", message), Drive::NeedsAPerson),
        Stage::Behind(why) => (unknown(OUTPUT_RESERVED, why), Drive::GoesOn),
        Stage::Held(Hold::User) => {
            (unknown("Suspended", "`spec.suspend` is true. Next: set it to false."), Drive::GoesOn)
        }
        Stage::Held(Hold::Budget(why)) => {
            let at = fresh
                .progress
                .as_ref()
                .map_or(String::new(), |p| format!("at step {} of {} ", p.step, p.steps));
            (unknown("BudgetExceeded", &format!("stopped {at}{why}.")), Drive::NeedsAPerson)
        }
        Stage::Queued => (unknown("Queued", "a queue holds the Job"), Drive::GoesOn),
        Stage::Pending(Some(trouble)) if trouble.reason == UNSCHEDULABLE => (
            unschedulable(fresh, observed, plan, trouble).map(|l| Line { state: State::Unknown, ..l }),
            Drive::GoesOn,
        ),
        Stage::Pending(Some(trouble)) | Stage::Checking(Some(trouble)) | Stage::BadData(trouble) => {
            troubled(trouble)
        }
        Stage::Lost(Some(trouble)) => {
            let message = format!("training is done, its report is not read yet: {}", trouble.message);
            troubled(&Trouble { message, ..trouble.clone() })
        }
        Stage::Pending(None) => (unknown("Pending", "its pod is on its way"), Drive::GoesOn),
        Stage::Running => {
            let at = training(observed, plan);
            (at.map(|l| Line { state: State::Unknown, ..l }), Drive::GoesOn)
        }
        Stage::Lost(None) => {
            (unknown("ReportLost", "the pod is gone; another one repeats its report"), Drive::GoesOn)
        }
        Stage::Failed(trouble) => {
            (line(State::False, &trouble.reason, &trouble.message), Drive::NeedsAPerson)
        }
        Stage::Finished { scores, adopted, .. } => {
            let failed = failed_gates(&job.spec.evaluation.gates, scores);
            let name = &job.spec.output.model_name;
            if !failed.is_empty() {
                let message = format!(
                    "{}. Model {name} is kept to look at. Next: tune longer or on more rows in a new FineTuneJob.",
                    failed.join("; ")
                );
                return (line(State::False, "GateFailed", message), Drive::NeedsAPerson);
            }
            let (reason, words) =
                if *adopted { ("Adopted", "was there from an equal job") } else { ("Tuned", "is made") };
            (line(State::True, reason, format!("Model {name} {words}")), Drive::Done)
        }
        Stage::Over => (None, Drive::Done),
    }
}
