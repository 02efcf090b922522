//! `lathe status`: each object with the one true cause and the next step, as its conditions say.
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use kube::api::{Api, ApiResource, DynamicObject, ListParams, ObjectList};
use lathe_api::kstatus::{Kstatus, kstatus};
use lathe_api::{AcceleratorProfile, FineTuneJob, InferenceService, Model};
use serde_json::{Value, json};

use super::{Connection, Kind, Named, Target, age, connect, refused};
use crate::failure::{Done, Problem};
use crate::output::{say, say_part};

/// Say how the objects of a cluster are: the one cause, and the next step.
///
/// Without a name: a line for each Model, FineTuneJob and InferenceService of the namespace. With KIND/NAME: everything that
/// is known of it, with each of its conditions.
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment, after_long_help = HELP)]
pub struct Args {
    /// KIND or KIND/NAME; KIND is model, finetunejob (ftj), inferenceservice (lsvc) or acceleratorprofile.
    #[arg(value_name = "KIND/NAME")]
    pub object: Option<Named>,
    #[command(flatten)]
    pub target: Target,
    /// Look into every namespace.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,
    /// Form of the answer; `wide` adds columns.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Form,
}

/// Form of the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// For people.
    #[default]
    Text,
    /// With more columns.
    Wide,
    /// For programs: a list of objects.
    Json,
}

const HELP: &str = "Examples:
  lathe status
  lathe status finetunejob/support-tone
  lathe status -A -o json

States: Done or Ready, Working (it goes on by itself), Stuck (a person must act: the message says how).

Next: `lathe logs KIND/NAME` shows what its pods say, `lathe chat SERVICE` asks a service that is Ready.";

/// Longest message in a table where nobody must act; the whole one stands with KIND/NAME, `-o wide` and `-o json`.
const CUT: usize = 100;

/// Runs the command.
///
/// # Errors
/// The cluster does not answer, or there is no such object.
pub async fn run(args: &Args) -> Done<()> {
    let connection = connect(&args.target).await?;
    let now = jiff::Timestamp::now();
    if let Some(Named { kind, name: Some(name) }) = &args.object {
        let object = get(&connection, *kind, name).await?;
        match args.output {
            Form::Json => drop(say(&pretty(&summary(*kind, &object)))),
            _ => drop(say_part(&details(*kind, &object))),
        }
        return Ok(());
    }
    let kinds = match &args.object {
        Some(named) => vec![named.kind],
        None => vec![Kind::Model, Kind::FineTuneJob, Kind::InferenceService],
    };
    let mut rows = Vec::new();
    for kind in kinds {
        for object in list(&connection, kind, args.all_namespaces).await? {
            let object = serde_json::to_value(object).unwrap_or_default();
            rows.push((kind, object));
        }
    }
    match args.output {
        Form::Json => {
            let all: Vec<Value> = rows.iter().map(|(kind, object)| summary(*kind, object)).collect();
            say(&pretty(&json!(all)));
        }
        _ if rows.is_empty() => {
            let place = if args.all_namespaces {
                "this cluster".to_owned()
            } else {
                format!("namespace {}", connection.namespace)
            };
            say(&format!(
                "Nothing of Lathe in {place}. Next: `kubectl apply -f examples/quickstart/`, or look elsewhere with -n or -A."
            ));
        }
        form => drop(say_part(&table(&rows, args.all_namespaces, form == Form::Wide, now))),
    }
    Ok(())
}

fn resource(kind: Kind) -> ApiResource {
    match kind {
        Kind::Model => ApiResource::erase::<Model>(&()),
        Kind::FineTuneJob => ApiResource::erase::<FineTuneJob>(&()),
        Kind::InferenceService => ApiResource::erase::<InferenceService>(&()),
        Kind::AcceleratorProfile => ApiResource::erase::<AcceleratorProfile>(&()),
    }
}

fn api(connection: &Connection, kind: Kind, everywhere: bool) -> Api<DynamicObject> {
    let client = connection.client.clone();
    if everywhere || kind == Kind::AcceleratorProfile {
        Api::all_with(client, &resource(kind))
    } else {
        Api::namespaced_with(client, &connection.namespace, &resource(kind))
    }
}

async fn list(connection: &Connection, kind: Kind, everywhere: bool) -> Done<ObjectList<DynamicObject>> {
    let list = api(connection, kind, everywhere).list(&ListParams::default()).await;
    list.map_err(|error| refused(&format!("list {}s", kind.name()), &error))
}

/// One object, as JSON.
///
/// # Errors
/// It is not there; the text names those that are.
pub async fn get(connection: &Connection, kind: Kind, name: &str) -> Done<Value> {
    let found = api(connection, kind, false).get_opt(name).await;
    let found = found.map_err(|error| refused(&format!("read {} {name}", kind.name()), &error))?;
    if let Some(object) = found {
        return Ok(serde_json::to_value(object).unwrap_or_default());
    }
    let there: Vec<String> = list(connection, kind, false).await?.iter().map(|o| o.name_any()).collect();
    let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
    let message = format!(
        "there is no {} {name} in namespace {} (there are: {there}). Next: correct the name, or look elsewhere with -n.",
        kind.name(),
        connection.namespace
    );
    Err(Problem::user("NotFound", message))
}

/// What a program needs: where it stands, why, and the whole status.
fn summary(kind: Kind, object: &Value) -> Value {
    let (reason, message) = cause(kind, object);
    json!({
        "kind": kind.name(), "namespace": object["metadata"]["namespace"], "name": object["metadata"]["name"],
        "state": state(kind, object), "reason": reason, "message": message, "status": object["status"],
    })
}

/// As kstatus reads the object, in words that fit the kind.
fn state(kind: Kind, object: &Value) -> &'static str {
    match kstatus(object) {
        Kstatus::Terminating => "Deleting",
        Kstatus::InProgress => "Working",
        Kstatus::Failed => "Stuck",
        Kstatus::Current if kind == Kind::FineTuneJob => "Done",
        Kstatus::Current => "Ready",
    }
}

/// Reason and message of the summary condition.
pub fn cause(kind: Kind, object: &Value) -> (String, String) {
    let wanted = if kind == Kind::FineTuneJob { "Succeeded" } else { "Ready" };
    let conditions = object["status"]["conditions"].as_array();
    let found = conditions.and_then(|all| all.iter().find(|condition| condition["type"] == wanted));
    match found {
        Some(condition) => (text(&condition["reason"]), text(&condition["message"])),
        None if kind == Kind::AcceleratorProfile => (String::new(), text(&object["spec"]["resource"])),
        None => ("Unvisited".to_owned(), "the operator has not looked at it yet. Next: does it run? `kubectl get pods -A -l app.kubernetes.io/name=lathe-operator`".to_owned()),
    }
}

fn table(rows: &[(Kind, Value)], namespaces: bool, wide: bool, now: jiff::Timestamp) -> String {
    let mut cells = vec![header(namespaces, wide)];
    for (kind, object) in rows {
        let meta = &object["metadata"];
        let (reason, message) = cause(*kind, object);
        let mut row = Vec::new();
        if namespaces {
            row.push(text(&meta["namespace"]));
        }
        row.extend([
            format!("{}/{}", kind.lower(), text(&meta["name"])),
            state(*kind, object).to_owned(),
            reason,
        ]);
        if wide {
            let created: Option<Time> = serde_json::from_value(meta["creationTimestamp"].clone()).ok();
            let seconds = created.map_or(0, |time| now.as_second() - time.0.as_second());
            row.extend([gist(*kind, object), age(seconds)]);
        }
        // What a person must do is told to its end.
        row.push(if wide || state(*kind, object) == "Stuck" { message } else { cut(&message) });
        cells.push(row);
    }
    aligned(&cells)
}

fn header(namespaces: bool, wide: bool) -> Vec<String> {
    let all = [
        ("NAMESPACE", namespaces),
        ("OBJECT", true),
        ("STATE", true),
        ("REASON", true),
        ("DETAIL", wide),
        ("AGE", wide),
        ("MESSAGE", true),
    ];
    all.iter().filter(|(_, shown)| *shown).map(|(name, _)| (*name).to_owned()).collect()
}

/// The number that one looks at first.
fn gist(kind: Kind, object: &Value) -> String {
    let status = &object["status"];
    match kind {
        Kind::Model => text(&status["size"]),
        Kind::FineTuneJob => text(&status["progress"]["summary"]),
        Kind::InferenceService => {
            format!(
                "{}/{} replicas",
                status["readyReplicas"].as_i64().unwrap_or(0),
                object["spec"]["replicas"]
            )
        }
        Kind::AcceleratorProfile => text(&object["spec"]["runtime"]),
    }
}

/// Everything that is known of one object.
fn details(kind: Kind, object: &Value) -> String {
    let (meta, status) = (&object["metadata"], &object["status"]);
    let (reason, message) = cause(kind, object);
    let mut out = format!("{}/{}: {}", kind.lower(), text(&meta["name"]), state(kind, object));
    if !reason.is_empty() {
        out.push_str(&format!(" ({reason})"));
    }
    out.push_str(&format!("\n  {message}\n"));
    let mut fields = Vec::new();
    let mut field = |name: &str, value: String| {
        if !value.is_empty() {
            fields.push(vec![format!("  {name}"), value]);
        }
    };
    field("url", text(&status["url"]));
    field(
        "models",
        status["modelIds"]
            .as_array()
            .map(|ids| ids.iter().map(text).collect::<Vec<_>>().join(", "))
            .unwrap_or_default(),
    );
    field("architecture", text(&status["architecture"]));
    field("parameters", text(&status["parameters"]));
    field("size", text(&status["size"]));
    field("method", text(&status["method"]));
    field("progress", text(&status["progress"]["summary"]));
    field("loss", text(&status["progress"]["loss"]));
    field("tokens/s", text(&status["progress"]["tokensPerSecond"]));
    field("time left", text(&status["progress"]["remaining"]));
    field("profile", text(&status["plan"]["profile"]));
    field("cost", text(&status["cost"]));
    field("model", text(&status["modelRef"]["name"]));
    out.push_str(&aligned(&fields));
    for score in status["scores"].as_array().into_iter().flatten() {
        out.push_str(&format!(
            "  {:<12} {:>10} -> {}\n",
            text(&score["metric"]),
            text(&score["before"]),
            text(&score["after"])
        ));
    }
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let rows: Vec<Vec<String>> = conditions
        .map(|c| {
            vec![
                format!("  {}", text(&c["type"])),
                text(&c["status"]),
                text(&c["reason"]),
                text(&c["message"]),
            ]
        })
        .collect();
    if !rows.is_empty() {
        out.push_str("conditions:\n");
        out.push_str(&aligned(&rows));
    }
    out
}

/// Columns as wide as their widest cell; the last one as long as it is.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// What an object says may hold anything: no control characters reach the terminal.
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn cut(message: &str) -> String {
    match message.char_indices().nth(CUT) {
        Some((end, _)) => format!("{}…", message.get(..end).unwrap_or_default()),
        None => message.to_owned(),
    }
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(conditions: Value) -> Value {
        json!({
            "metadata": {"name": "tone", "namespace": "shop", "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {}, "status": {"observedGeneration": 1, "progress": {"summary": "12/48 25%"}, "conditions": conditions},
        })
    }

    fn conditions(succeeded: &str, reason: &str, message: &str, drive: &str) -> Value {
        json!([
            {"type": "Succeeded", "status": succeeded, "reason": reason, "message": message},
            {"type": drive, "status": "True", "reason": reason, "message": message},
        ])
    }

    #[test]
    fn the_cause_is_the_summary_conditions() {
        let stuck = job(conditions("False", "MalformedRow", "line 3. Next: correct it.", "Stalled"));
        let working = job(conditions("Unknown", "Training", "step 12 of 48", "Reconciling"));
        let rows = [(Kind::FineTuneJob, stuck), (Kind::FineTuneJob, working)];
        let now = "2026-01-01T00:03:00Z".parse().unwrap();
        assert_eq!(
            table(&rows, true, true, now),
            "NAMESPACE  OBJECT            STATE    REASON        DETAIL     AGE  MESSAGE\n\
             shop       finetunejob/tone  Stuck    MalformedRow  12/48 25%  3m   line 3. Next: correct it.\n\
             shop       finetunejob/tone  Working  Training      12/48 25%  3m   step 12 of 48\n"
        );
    }

    #[test]
    fn an_object_that_nobody_visited_says_so() {
        let object =
            json!({"metadata": {"name": "m", "generation": 1}, "status": {"observedGeneration": -1}});
        assert_eq!(state(Kind::Model, &object), "Working");
        assert_eq!(cause(Kind::Model, &object).0, "Unvisited");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let object = job(conditions("False", "X", "a\u{1b}[31mb\n", "Stalled"));
        let shown = details(Kind::FineTuneJob, &object);
        assert!(!shown.contains('\u{1b}') && shown.contains("a [31mb"), "{shown:?}");
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        assert_eq!(cut(&"é".repeat(CUT)), "é".repeat(CUT));
        assert_eq!(cut(&"é".repeat(CUT + 1)), format!("{}…", "é".repeat(CUT)));
    }

    #[test]
    fn resources_are_those_of_the_types() {
        let plural = |kind| resource(kind).plural;
        let kinds = [Kind::Model, Kind::FineTuneJob, Kind::InferenceService, Kind::AcceleratorProfile];
        assert_eq!(kinds.map(plural), ["models", "finetunejobs", "inferenceservices", "acceleratorprofiles"]);
    }
}
