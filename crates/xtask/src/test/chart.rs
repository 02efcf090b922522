//! The chart layer: what Helm makes of the chart, for every kind of values, and the plain manifests beside it.

mod flows;
mod monitoring;
mod objects;
mod plain;
mod pods;
mod rights;

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{paths, ui};
use objects::{Helm, RELEASE_NAMESPACE, kinds, name, named};

/// Values that are refused, and the field that the refusal names.
const REFUSED: [(&str, &str); 20] = [
    ("operator.replicas=many", "/operator/replicas"),
    ("operator.replica=1", "/operator"),
    ("operator.logFormat=xml", "/operator/logFormat"),
    ("operator.tolerations[0].keys=gpu", "/operator/tolerations/0"),
    ("gateway.auth=Nobody", "/gateway/auth"),
    ("gateway.keysSecret=My Keys", "/gateway/keysSecret"),
    ("gateway.hold.seconds=0", "/gateway/hold/seconds"),
    ("gateway.tolerations[0].keys=gpu", "/gateway/tolerations/0"),
    ("image.tag=a:b", "/image/tag"),
    ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
    ("namespaces={Team}", "/namespaces/0"),
    ("artifacts.accessMode=RWX", "/artifacts/accessMode"),
    ("artifacts.size=big", "/artifacts/size"),
    ("networkPolicy.apiServerPorts={0}", "/networkPolicy/apiServerPorts/0"),
    ("networkPolicy.metricsFrom.labels=x", "/networkPolicy/metricsFrom"),
    ("serviceMonitor.interval=soon", "/serviceMonitor/interval"),
    ("tracing.endpoint=collector:4318", "/tracing/endpoint"),
    ("tracing.sampling=most", "/tracing/sampling"),
    ("monitoring.rules.enabled=soon", "/monitoring/rules/enabled"),
    ("monitoring.dashboards.enabled=true", "/monitoring"),
];

type Check = fn(&Helm) -> Result<()>;

const CHECKS: [(&str, Check); 15] = [
    ("helm lint --strict", Helm::lint),
    ("Chart.yaml tells this version, its images and its kinds", metadata),
    ("values that cannot be meant are refused, and the field is named", refusals),
    ("a value that has another name now is refused, and upgrades.md tells the other", renamed),
    ("two renders are equal: nothing comes from chance or from time", repeated),
    ("every combination of values makes objects that belong together", combinations),
    (
        "who reads the metrics of workers is told to the operator, and lets the same read the gateway's",
        metrics_from,
    ),
    ("there is a gateway unless values say otherwise, and the operator knows", gateway),
    ("a collector of traces is told to every program that has some", tracing),
    ("rules, dashboard and monitors are there where values say so", monitoring::switches),
    ("each alert has a runbook, and each runbook an alert", monitoring::runbooks),
    ("each alert fires, and stays quiet, as promtool sees it", monitoring::alerts),
    (
        "every query of rules and dashboard has an answer of a real Prometheus, from what our programs say",
        monitoring::queries,
    ),
    ("deploy/ has the chart's objects, for kubectl and for Kustomize", plain::same_objects),
    ("a Kustomize overlay changes namespace and images", plain::overlay),
];

/// Runs them all.
///
/// # Errors
/// Some fail: the text says what is wrong with which values.
pub fn run() -> Result<()> {
    let helm = Helm::new()?;
    let mut failed = Vec::new();
    for (what, check) in CHECKS {
        match check(&helm) {
            Ok(()) => ui::note(&format!("{what}: ok")),
            Err(error) => failed.push(format!("{what}: {error:#}")),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

fn metadata(helm: &Helm) -> Result<()> {
    let text = fs::read_to_string(paths::repository().join("charts/lathe/Chart.yaml"))?;
    let chart = objects::parse(&text)?.into_iter().next().context("Chart.yaml is empty")?;
    for field in ["version", "appVersion"] {
        ensure!(
            chart[field] == env!("CARGO_PKG_VERSION"),
            "{field} is {}, not the workspace's",
            chart[field]
        );
    }
    let told = |what: &str| {
        let list = chart["annotations"][format!("artifacthub.io/{what}")].as_str().unwrap_or_default();
        anyhow::Ok(objects::parse(list)?.into_iter().next().unwrap_or_default())
    };
    let all = objects::parse(&helm.template(&[])?)?;
    for image in told("images")?.as_array().into_iter().flatten() {
        let image = image["image"].as_str().unwrap_or_default();
        let used = kinds(&all, "Deployment").any(|it| it.to_string().contains(&format!("\"{image}\"")));
        ensure!(used, "no Deployment uses {image}");
    }
    let names = |list: Vec<&str>| list.into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
    let crds = told("crds")?;
    let told = names(crds.as_array().into_iter().flatten().filter_map(|crd| crd["name"].as_str()).collect());
    let rendered = names(kinds(&all, "CustomResourceDefinition").map(name).collect());
    ensure!(told == rendered, "Chart.yaml tells of {told:?}, the chart has {rendered:?}");
    Ok(())
}

fn refusals(helm: &Helm) -> Result<()> {
    for (value, field) in REFUSED {
        match helm.template(&[value]) {
            Ok(_) => bail!("{value} is accepted: values.schema.json does not refuse it"),
            Err(error) => {
                let said = format!("{error:#}");
                ensure!(said.contains(&format!("'{field}'")), "{value}: {field} is not named:\n{said}");
            }
        }
    }
    Ok(())
}

/// The table of upgrades.md: a value that was, the value that is.
fn renamed(helm: &Helm) -> Result<()> {
    let text = fs::read_to_string(paths::repository().join("docs/upgrades.md"))?;
    let values = fs::read_to_string(paths::repository().join("charts/lathe/values.yaml"))?;
    let values = objects::parse(&values)?.into_iter().next().context("values.yaml is empty")?;
    let mut rows = 0;
    for row in text.lines().filter(|line| line.starts_with("| `")) {
        let mut names = row.split('`').skip(1).step_by(2);
        let (was, is) = names.next().zip(names.next()).context("a row without two names")?;
        ensure!(helm.template(&[&format!("{was}=1")]).is_err(), "{was} is still taken");
        let pointer = format!("/{}", is.replace('.', "/"));
        ensure!(values.pointer(&pointer).is_some(), "{was} became {is}, which is no value");
        rows += 1;
    }
    ensure!(rows > 0, "upgrades.md tells of no value");
    Ok(())
}

/// A variable of the operator's environment.
fn told(all: &[Value], variable: &str) -> Option<String> {
    told_to(all, "lathe-operator", variable)
}

fn told_to(all: &[Value], program: &str, variable: &str) -> Option<String> {
    let deployment = named(all, "Deployment", program)?;
    let env = deployment["spec"]["template"]["spec"]["containers"][0]["env"].as_array()?;
    env.iter().find(|env| env["name"] == variable)?["value"].as_str().map(str::to_owned)
}

fn gateway(helm: &Helm) -> Result<()> {
    for (values, there) in [(&[][..], true), (&["gateway.enabled=false"][..], false)] {
        let all = objects::parse(&helm.template(values)?)?;
        let found = named(&all, "Deployment", "lathe-gateway").is_some();
        let said = told(&all, "LATHE_GATEWAY");
        let agree = found == there && said.as_deref() == Some(if there { "true" } else { "false" });
        ensure!(agree, "with {values:?}: a gateway is there: {found}, the operator is told {said:?}");
    }
    Ok(())
}

fn tracing(helm: &Helm) -> Result<()> {
    let variables = [
        ("lathe-operator", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ("lathe-operator", "LATHE_WORKER_OTLP_ENDPOINT"),
        ("lathe-operator", "LATHE_WORKER_TRACES_SAMPLING"),
        ("lathe-gateway", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ("lathe-gateway", "OTEL_TRACES_SAMPLER"),
        ("lathe-gateway", "OTEL_TRACES_SAMPLER_ARG"),
    ];
    let told = |values: &[&str]| {
        let all = objects::parse(&helm.template(values)?)?;
        anyhow::Ok(variables.map(|(program, variable)| told_to(&all, program, variable)))
    };
    let none = told(&[])?;
    ensure!(none.iter().all(Option::is_none), "without a collector: {none:?}");
    let (url, sampling) = ("http://collector.monitoring:4318", "0.05");
    let all = told(&[&format!("tracing.endpoint={url}"), &format!("tracing.sampling={sampling}")])?;
    let expected = [url, url, sampling, url, "parentbased_traceidratio", sampling];
    ensure!(all == expected.map(|value| Some(value.to_owned())), "{all:?}");
    for (url, port) in [
        ("http://collector.monitoring:4318", 4318),
        ("http://me:secret@collector.monitoring:14318/otlp", 14318),
        ("http://collector.monitoring", 80),
        ("https://collector.example.org/otlp:1", 443),
        ("http://[fd00::1:4317]:9", 9),
        ("https://[fd00::1]", 443),
    ] {
        let all = objects::parse(&helm.template(&[&format!("tracing.endpoint={url}")])?)?;
        for program in ["lathe-operator", "lathe-gateway"] {
            let policy = named(&all, "NetworkPolicy", program).context("no NetworkPolicy")?;
            let rules = policy["spec"]["egress"].as_array().into_iter().flatten();
            let opened = json!({"ports": [{"port": port, "protocol": "TCP"}]});
            ensure!(rules.into_iter().any(|rule| *rule == opened), "{program} cannot reach {url} at {port}");
        }
    }
    Ok(())
}

fn metrics_from(helm: &Helm) -> Result<()> {
    let told = |values: &[&str]| {
        let all = objects::parse(&helm.template(values)?)?;
        let variables = ["LATHE_METRICS_FROM_NAMESPACES", "LATHE_METRICS_FROM_PODS"];
        anyhow::Ok(variables.map(|variable| told(&all, variable)))
    };
    // Of the gateway's own policy: to whom its port of metrics is open.
    let open = |values: &[&str]| {
        let all = objects::parse(&helm.template(values)?)?;
        let policy = named(&all, "NetworkPolicy", "lathe-gateway").context("no NetworkPolicy")?;
        let rules = policy["spec"]["ingress"].as_array().context("no rules")?;
        let of =
            |rule: &&Value| rule["ports"].as_array().into_iter().flatten().any(|port| port["port"] == 8081);
        let from: Vec<_> = rules.iter().filter(of).map(|rule| rule["from"].clone()).collect();
        let operator = |from: &Value| {
            from[0]["podSelector"]["matchLabels"]["app.kubernetes.io/name"] == "lathe-operator"
        };
        ensure!(
            from.iter().filter(|from| operator(from)).count() == 1,
            "the operator is not told what flows"
        );
        anyhow::Ok(from.into_iter().filter(|from| !operator(from)).collect::<Vec<_>>())
    };
    ensure!(told(&[])? == [None, None], "without values somebody is let in");
    ensure!(open(&[])?.is_empty(), "without values everybody reads the gateway's metrics");
    let values = [
        r"networkPolicy.metricsFrom.namespaceLabels.kubernetes\.io/metadata\.name=monitoring",
        "networkPolicy.metricsFrom.podLabels.app=prometheus",
        "networkPolicy.metricsFrom.podLabels.shard=a",
    ];
    let [namespaces, pods] = told(&values)?;
    ensure!(namespaces.as_deref() == Some("kubernetes.io/metadata.name=monitoring"), "{namespaces:?}");
    ensure!(pods.as_deref() == Some("app=prometheus,shard=a"), "{pods:?}");
    let from = open(&values)?;
    let expected = json!([{
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": {"app": "prometheus", "shard": "a"}},
    }]);
    ensure!(from == [expected], "{from:?}");
    Ok(())
}

fn repeated(helm: &Helm) -> Result<()> {
    ensure!(helm.template(&[])? == helm.template(&[])?, "the second render differs from the first");
    Ok(())
}

/// What one render was asked for.
struct Case {
    namespaces: bool,
    read_nodes: bool,
    policy: bool,
    /// Metrics are scraped and shown, traces are sent.
    monitor: bool,
    /// Of the operator and of the gateway.
    replicas: i64,
    gateway: bool,
}

impl Case {
    fn all() -> Vec<Self> {
        let of = |bits: u8| Self {
            namespaces: bits & 1 != 0,
            read_nodes: bits & 2 == 0,
            policy: bits & 4 == 0,
            monitor: bits & 8 != 0,
            replicas: if bits & 16 == 0 { 2 } else { 1 },
            gateway: bits & 32 != 0,
        };
        (0..64).map(of).collect()
    }

    fn values(&self) -> Vec<String> {
        let mut values = vec![
            "crds.enabled=false".to_owned(),
            format!("readNodes={}", self.read_nodes),
            format!("networkPolicy.enabled={}", self.policy),
            format!("serviceMonitor.enabled={}", self.monitor),
            format!("monitoring.rules.enabled={}", self.monitor),
            format!("monitoring.dashboard.enabled={}", self.monitor),
            format!(
                "tracing.endpoint={}",
                if self.monitor { "http://collector.monitoring:4318" } else { "" }
            ),
            format!("operator.replicas={}", self.replicas),
            format!("gateway.replicas={}", self.replicas),
            format!("gateway.enabled={}", self.gateway),
        ];
        if self.namespaces {
            values.push("namespaces={team-a,team-b}".to_owned());
        }
        values
    }
}

fn combinations(helm: &Helm) -> Result<()> {
    for case in Case::all() {
        let values = case.values();
        let values: Vec<&str> = values.iter().map(String::as_str).collect();
        let text = helm.template(&values)?;
        let all = objects::parse(&text)?;
        let mut wrong = rights::violations(&all, case.namespaces);
        wrong.extend(rights::uncommented(&text));
        wrong.extend(pods::violations(&all));
        wrong.extend(unexpected(&case, &all));
        if case.policy {
            wrong.extend(flows::violations(&all, case.monitor));
        }
        ensure!(wrong.is_empty(), "with {}:\n{}", values.join(" "), wrong.join("\n"));
    }
    Ok(())
}

/// Objects that should be there and are not, or should not be there and are.
fn unexpected(case: &Case, all: &[Value]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut expect = |what: &str, found: bool, wanted: bool| {
        if found != wanted {
            wrong.push(format!("{what}: {}", if found { "should not be there" } else { "is missing" }));
        }
    };
    for (program, there) in [("lathe-operator", true), ("lathe-gateway", case.gateway)] {
        let mut expect = |kind: &str, wanted: bool| {
            expect(&format!("{kind} {program}"), named(all, kind, program).is_some(), there && wanted);
        };
        expect("Deployment", true);
        expect("Service", true);
        expect("NetworkPolicy", case.policy);
        expect("ServiceMonitor", case.monitor);
        expect("PodDisruptionBudget", case.replicas > 1);
    }
    expect(
        "Service of the gateway's metrics",
        named(all, "Service", "lathe-gateway-metrics").is_some(),
        case.gateway,
    );
    let grants = |role: &str, resource: &str| {
        named(all, "ClusterRole", role).is_some_and(|found| rights::grants(found, resource))
    };
    expect("the right to read nodes", grants("lathe-operator", "nodes"), case.read_nodes);
    for (program, resource, there) in
        [("lathe-operator", "jobs", true), ("lathe-gateway", "endpointslices", case.gateway)]
    {
        let what = format!("{program}'s rights in every namespace");
        expect(&what, grants(program, resource), there && !case.namespaces);
        for namespace in ["team-a", "team-b"] {
            let of = |role: &Value| {
                role["metadata"]["namespace"] == namespace
                    && name(role).starts_with(program)
                    && rights::grants(role, resource)
            };
            let what = format!("a Role of {program} in {namespace}");
            expect(&what, kinds(all, "Role").any(of), there && case.namespaces);
        }
    }
    let mut seen = BTreeSet::new();
    for object in all {
        let key = objects::key(object);
        let instance = &object["metadata"]["labels"]["app.kubernetes.io/instance"];
        expect(&format!("the release's label on {key}"), instance == objects::RELEASE, true);
        expect(&format!("a second {key}"), !seen.insert(key.clone()), false);
        let namespace = object["metadata"]["namespace"].as_str();
        let ours = namespace.is_none_or(|n| n == RELEASE_NAMESPACE || n.starts_with("team-"));
        expect(&format!("{key} ({}) in a namespace that nobody named", name(object)), !ours, false);
    }
    wrong
}
