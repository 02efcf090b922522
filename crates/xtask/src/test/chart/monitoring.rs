//! Rules and dashboard: alerts by promtool, every query by a real Prometheus that reads what our programs say of themselves.

mod prometheus;
mod query;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, process};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::objects::{Helm, RELEASE_NAMESPACE, kinds, named, parse};
use crate::{command, paths, toolchain};
use prometheus::{PATIENCE, Prometheus, Target};
use query::Query;

const VALUES: [&str; 4] = [
    "monitoring.rules.enabled=true",
    "monitoring.rules.labels.release=monitoring",
    "monitoring.dashboard.enabled=true",
    "serviceMonitor.enabled=true",
];
const RUNBOOKS: &str = "https://github.com/lathe-dev/lathe/blob/main/docs/runbooks.md#";
/// What a runbook says of its alert, in this order.
const PARTS: [&str; 3] = ["**What it means.**", "**How to look.**", "**What to do.**"];
/// There only where values say so, and found by those who look for them.
pub fn switches(helm: &Helm) -> Result<()> {
    let all = parse(&helm.template(&[])?)?;
    for kind in ["PrometheusRule", "PodMonitor", "ServiceMonitor"] {
        ensure!(kinds(&all, kind).next().is_none(), "without values there is a {kind}");
    }
    ensure!(named(&all, "ConfigMap", "lathe-dashboard").is_none(), "without values there is a dashboard");
    let all = parse(&helm.template(&VALUES)?)?;
    let labels = |kind: &str, name: &str| named(&all, kind, name).map(|it| it["metadata"]["labels"].clone());
    let rules = labels("PrometheusRule", "lathe").context("no PrometheusRule")?;
    ensure!(rules["release"] == "monitoring", "labels of the rules: {rules}");
    let dashboard = labels("ConfigMap", "lathe-dashboard").context("no dashboard")?;
    ensure!(dashboard["grafana_dashboard"] == "1", "labels of the dashboard: {dashboard}");
    for (values, wanted) in [
        (&VALUES[..], json!({"any": true})),
        (&["serviceMonitor.enabled=true", "namespaces={a,b}"], json!({"matchNames": ["a", "b"]})),
    ] {
        let all = parse(&helm.template(values)?)?;
        let monitor = named(&all, "PodMonitor", "lathe-workers").context("no PodMonitor")?;
        let selected = &monitor["spec"]["namespaceSelector"];
        ensure!(*selected == wanted, "with {values:?} workers are read in {selected}");
    }
    Ok(())
}

/// Each alert says what it is and has a runbook, and each runbook an alert.
pub fn runbooks(helm: &Helm) -> Result<()> {
    let rules = Rendered::of(helm)?.rules;
    let text = fs::read_to_string(paths::repository().join("docs/runbooks.md"))?;
    let sections: Vec<(&str, &str)> =
        text.split("\n## ").skip(1).filter_map(|it| it.split_once('\n')).collect();
    let mut wrong = Vec::new();
    let mut alerts = BTreeSet::new();
    for rule in of_rules(&rules, "alert") {
        let name = rule["alert"].as_str().unwrap_or_default();
        let severity = rule["labels"]["severity"].as_str().unwrap_or_default();
        if !["critical", "warning", "info"].contains(&severity) {
            wrong.push(format!("{name}: severity {severity:?}"));
        }
        let said = |what: &str| rule["annotations"][what].as_str().unwrap_or_default();
        if said("summary").is_empty() || said("description").is_empty() {
            wrong.push(format!("{name}: no summary or description"));
        }
        // GitHub's anchor of a heading.
        if said("runbook_url") != format!("{RUNBOOKS}{}", name.to_lowercase()) {
            wrong.push(format!("{name}: runbook_url is {}", said("runbook_url")));
        }
        if !alerts.insert(name) {
            wrong.push(format!("{name}: a second one"));
        }
    }
    let names: BTreeSet<&str> = sections.iter().map(|section| section.0).collect();
    for (what, these, others) in [("runbook", &alerts, &names), ("alert", &names, &alerts)] {
        let lacking: Vec<_> = these.difference(others).collect();
        ensure!(lacking.is_empty(), "no {what} of {lacking:?}");
    }
    for (name, section) in sections {
        let at: Vec<_> = PARTS.iter().map(|part| section.find(part)).collect();
        if at.contains(&None) || !at.is_sorted() {
            wrong.push(format!("docs/runbooks.md, {name}: not each of {PARTS:?}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// promtool reads the rules, and each alert fires and stays quiet where tests/monitoring/alerts.yaml says so.
pub fn alerts(helm: &Helm) -> Result<()> {
    let promtool = programs()?.join("promtool");
    let rules = Rendered::of(helm)?.rules;
    let text = fs::read_to_string(paths::repository().join("tests/monitoring/alerts.yaml"))?;
    let tests = parse(&text)?;
    let each = tests[0]["tests"].as_array().into_iter().flatten();
    let each = each.flat_map(|test| test["alert_rule_test"].as_array().into_iter().flatten());
    let tested: BTreeSet<(&str, bool)> = each
        .map(|test| {
            let fires = test["exp_alerts"].as_array().is_some_and(|alerts| !alerts.is_empty());
            (test["alertname"].as_str().unwrap_or_default(), fires)
        })
        .collect();
    for rule in of_rules(&rules, "alert") {
        let name = rule["alert"].as_str().unwrap_or_default();
        for (fires, what) in [(true, "fires"), (false, "stays quiet")] {
            ensure!(tested.contains(&(name, fires)), "no test in which {name} {what}");
        }
    }
    in_folder("rules", |folder| {
        fs::write(folder.join("rules.yaml"), rules.to_string())?;
        fs::write(folder.join("alerts.yaml"), &text)?;
        for arguments in
            [&["check", "rules", "--lint-fatal", "rules.yaml"], &["test", "rules", "alerts.yaml"][..]]
        {
            command::run(Command::new(&promtool).args(arguments).current_dir(folder))?;
        }
        Ok(())
    })
}

/// Every query has an answer, from series and labels that our programs have.
pub fn queries(helm: &Helm) -> Result<()> {
    let program = programs()?.join("prometheus");
    let rendered = Rendered::of(helm)?;
    let queries = rendered.queries()?;
    in_folder("prometheus", |folder| {
        fs::write(folder.join("rules.yaml"), rendered.rules.to_string())?;
        let mut prometheus = Prometheus::start(&program, folder, &rendered.targets()?)?;
        let Prometheus { process, api } = &mut prometheus;
        // A rate needs two scrapes, what is recorded an evaluation more.
        let mut waiting: Vec<&Query> = queries.iter().collect();
        let mut why = String::new();
        let answered = process.wait_for("answers to all queries", PATIENCE, || {
            waiting.retain(|query| match query.answer(api) {
                Ok(()) => false,
                Err(error) => {
                    why = format!("{}: {error:#}", query.place);
                    true
                }
            });
            waiting.is_empty().then_some(())
        });
        if answered.is_err() {
            let places: Vec<&str> = waiting.iter().map(|query| query.place.as_str()).collect();
            return answered
                .with_context(|| format!("no answer: {}; the last one: {why}", places.join(", ")));
        }
        let wrong: Vec<String> =
            queries.iter().filter_map(|query| query.strangers(api).err()).map(|e| format!("{e:#}")).collect();
        ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        // This check can fail.
        for stranger in ["sum(lathe_nothing)", "sum by (nobody) (up)", r#"up{job="nobody"}"#] {
            let query = Query {
                place: stranger.into(),
                expression: stranger.into(),
                labels: BTreeSet::new(),
                answers: false,
            };
            ensure!(query.strangers(api).is_err(), "nobody has what {stranger} names, and it is not found");
        }
        prometheus.process.end()
    })
}

/// What the chart makes with everything on.
struct Rendered {
    all: Vec<Value>,
    /// `groups`, as in a file of rules.
    rules: Value,
    dashboard: Value,
}

impl Rendered {
    fn of(helm: &Helm) -> Result<Self> {
        let all = parse(&helm.template(&VALUES)?)?;
        let rules = named(&all, "PrometheusRule", "lathe").context("no PrometheusRule")?["spec"].clone();
        let text = named(&all, "ConfigMap", "lathe-dashboard").context("no dashboard")?["data"]["lathe.json"]
            .clone();
        let dashboard =
            serde_json::from_str(text.as_str().context("no lathe.json")?).context("lathe.json")?;
        Ok(Self { all, rules, dashboard })
    }

    /// Our programs, with the labels that the Prometheus operator gives to what these monitors find.
    fn targets(&self) -> Result<Vec<Target>> {
        let of = |name, kind, monitor, path: &str, labels| {
            let object = named(&self.all, kind, monitor).with_context(|| format!("no {kind} {monitor}"))?;
            let endpoint = object.pointer(path).with_context(|| format!("{monitor} reads nothing"))?;
            anyhow::Ok(Target { name, labels, honor_labels: endpoint["honorLabels"] == true })
        };
        let (service, pod) = ("/spec/endpoints/0", "/spec/podMetricsEndpoints/0");
        let ours = |pod: &str, service: &str| json!({"namespace": RELEASE_NAMESPACE, "pod": pod, "service": service});
        let worker = |pod: &str| json!({"namespace": "team-a", "pod": pod, "container": "worker"});
        Ok(vec![
            of(
                "operator",
                "ServiceMonitor",
                "lathe-operator",
                service,
                ours("lathe-operator-1", "lathe-operator"),
            )?,
            of(
                "gateway",
                "ServiceMonitor",
                "lathe-gateway",
                service,
                ours("lathe-gateway-1", "lathe-gateway-metrics"),
            )?,
            of("serve", "PodMonitor", "lathe-workers", pod, worker("support-serve-1"))?,
            of("train", "PodMonitor", "lathe-workers", pod, worker("tone-train-1"))?,
        ])
    }

    /// All of rules and dashboard.
    fn queries(&self) -> Result<Vec<Query>> {
        let mut all = Vec::new();
        for rule in of_rules(&self.rules, "record") {
            all.push(Query::of(&rule["record"], &rule["expr"], BTreeSet::new(), true)?);
        }
        for rule in of_rules(&self.rules, "alert") {
            let texts = rule["annotations"].to_string();
            all.push(Query::of(&rule["alert"], &rule["expr"], query::labels_of(&texts, "$labels."), false)?);
        }
        for panel in self.dashboard["panels"].as_array().context("no panels")? {
            for target in panel["targets"].as_array().context("no targets")? {
                let legend = target["legendFormat"].as_str().unwrap_or_default();
                all.push(Query::of(&panel["title"], &target["expr"], query::labels_of(legend, "{{"), true)?);
            }
        }
        for variable in self.dashboard["templating"]["list"].as_array().into_iter().flatten() {
            // Grafana's own function: the values of a label.
            let text = variable["query"].as_str().unwrap_or_default();
            if let Some(of) = text.strip_prefix("label_values(") {
                let (selector, label) =
                    of.trim_end_matches(')').rsplit_once(", ").context("label_values of what?")?;
                all.push(Query::of(&variable["name"], &json!(selector), [label.to_owned()].into(), true)?);
            }
        }
        Ok(all)
    }
}

/// The rules that are of a sort, `record` or `alert`.
fn of_rules<'a>(rules: &'a Value, sort: &'a str) -> impl Iterator<Item = &'a Value> {
    let groups = rules["groups"].as_array().into_iter().flatten();
    groups
        .flat_map(|group| group["rules"].as_array().into_iter().flatten())
        .filter(move |rule| !rule[sort].is_null())
}

/// The folder with Debian's `prometheus` and its `promtool`.
fn programs() -> Result<PathBuf> {
    toolchain::unpacked("prometheus", "promtool")
}

/// Runs with a new folder, of which nothing is left.
fn in_folder(what: &str, run: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = env::temp_dir().join(format!("lathe-{what}-{}", process::id()));
    fs::create_dir_all(&folder)?;
    let ended = run(&folder);
    // Whatever came of it, nothing stays behind.
    let _ = fs::remove_dir_all(&folder);
    ended
}
