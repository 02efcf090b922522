//! The operator with 500 objects: how fast they settle, what that costs, and what it costs when nothing changes.
//!
//! The control plane is real and has no nodes, so no pod ever runs. Where a pod's last words are needed to go on (a Model's
//! inspection, a dataset's check) they are put into its status as a node would. In the end every Model is ready, every
//! FineTuneJob has its Job and every InferenceService its Deployment, and these wait for a node.

mod api;
mod node;
mod objects;
mod phase;
mod prometheus;

use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::process::Watched;
use super::worker::empty_folder;
use super::{Found, machine};
use crate::{cluster, command, paths, ports, ui};
use api::Api;
use objects::{Counts, KINDS, TENANTS, object, tenant};
use phase::{Meter, Phase};

const CLUSTER: &str = "bench-operator";
/// Objects are settled when none of them has changed for so long.
const QUIET: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(900);

/// Measures.
///
/// # Errors
/// The cluster or the operator fails; the text has its last words.
pub fn run(program: &Path, quick: bool) -> Result<Found> {
    let counts = Counts::of(if quick { 100 } else { 500 });
    let idle = Duration::from_secs(if quick { 60 } else { 300 });
    cluster::down(CLUSTER)?;
    let options = cluster::Options { name: CLUSTER.to_owned(), nodes: 0, fleet: 0 };
    let cluster = cluster::up(&options)?;
    let folder = empty_folder(&paths::cache()?.join("bench"), "operator")?;
    let measured = measure(program, &cluster, &folder, counts, idle);
    cluster::down(CLUSTER)?;
    let phases = measured?;
    let tables = vec![phase::table(&phases, counts.total())];
    let figures = json!({"objects": counts.total(), "phases": phases});
    Ok(Found { part: "operator", tables, figures, loads: [0.0, machine::load()] })
}

fn measure(
    program: &Path,
    cluster: &cluster::Cluster,
    folder: &Path,
    counts: Counts,
    idle: Duration,
) -> Result<Vec<Phase>> {
    let crds = paths::repository().join("crds");
    command::run(cluster.kubectl().args(["apply", "--server-side", "--filename"]).arg(crds))?;
    let spaces = (0..TENANTS).map(tenant).chain(["lathe-system".to_owned()]);
    let spaces: Vec<Value> = spaces
        .map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
        .collect();
    cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": spaces}))?;
    let kubeconfig = api::user(cluster, folder)?;
    let api = Api::open(cluster, folder)?;
    let start = |log: &str| Operator::start(program, &kubeconfig, &folder.join(log));

    let step = ui::step(format!("{} objects, from none to settled", counts.total()));
    step.expect("some minutes");
    let meter = Meter::fresh(&api)?;
    let mut operator = start("first.log")?;
    let begun = Instant::now();
    for (kind, &count) in counts.each.iter().enumerate() {
        for number in 0..count {
            let path = format!("/apis/lathe.dev/v1alpha1/namespaces/{}/{}", tenant(number), KINDS[kind].0);
            api.create(&path, &object(kind, number, &counts))?;
        }
    }
    let seconds = settle(&api, &mut operator, &counts, begun)?;
    let first = meter.end("from none to settled", seconds, &api, &operator)?;
    step.done(&first.words());
    operator.process.end()?;

    let step = ui::step("the operator anew, with all of them settled");
    let before = versions(&api)?;
    let meter = Meter::fresh(&api)?;
    let started = Instant::now();
    let mut operator = start("second.log")?;
    let url = operator.metrics.clone();
    operator.process.wait_for("a round for every object", PATIENCE, || {
        let rounds = prometheus::sum(&phase::metrics(&url).ok()?, phase::ROUNDS, "");
        (rounds >= counts.total() as f64).then_some(())
    })?;
    let second = meter.end("operator started anew", started.elapsed().as_secs_f64(), &api, &operator)?;
    let after = versions(&api)?;
    let written = after.iter().filter(|object| !before.contains(object)).count();
    step.done(&format!("{}, {written} objects written", second.words()));

    let step = ui::step("nothing changes");
    step.expect(&format!("{} seconds", idle.as_secs()));
    settle(&api, &mut operator, &counts, Instant::now())?;
    let meter = Meter::begin(&api, &operator)?;
    sleep(idle);
    let third = meter.end("nothing changes", idle.as_secs_f64(), &api, &operator)?;
    step.done(&third.words());
    operator.process.end()?;
    Ok(vec![first, second, third])
}

/// The operator as a process, and where its metrics are.
struct Operator {
    process: Watched,
    metrics: String,
}

impl Operator {
    /// Starts it as the chart would, and waits until it works.
    fn start(program: &Path, kubeconfig: &Path, log: &Path) -> Result<Self> {
        let [port] = ports::free()?;
        let mut command = Command::new(program);
        command.args(["--worker-image", "ghcr.io/lathe-dev/lathe-worker:bench", "--leader-elect"]);
        command.args(["--listen", &format!("127.0.0.1:{port}")]);
        command.env("KUBECONFIG", kubeconfig).env("RUST_LOG", "warn");
        let mut process = Watched::start(&mut command, log)?;
        let metrics = format!("http://127.0.0.1:{port}/metrics");
        process.wait_for("the operator", PATIENCE, || {
            (prometheus::sum(&phase::metrics(&metrics).ok()?, "lathe_operator_leader", "") > 0.0)
                .then_some(())
        })?;
        Ok(Self { process, metrics })
    }
}

/// Waits until every object is where it can come to without a node, and none changes any more. Returns the seconds from
/// `begun` to the last change.
fn settle(api: &Api, operator: &mut Operator, counts: &Counts, begun: Instant) -> Result<f64> {
    let mut seen = Vec::new();
    let mut changed = Instant::now();
    loop {
        let ended = node::end_short_pods(api)?;
        let now = versions(api)?;
        if ended > 0 || now != seen {
            (seen, changed) = (now, Instant::now());
        }
        if changed.elapsed() > QUIET && arrived(api, counts)? {
            return Ok((changed - begun).as_secs_f64());
        }
        ensure!(
            begun.elapsed() < PATIENCE,
            "not settled after {} s, the operator says:\n{}",
            PATIENCE.as_secs(),
            operator.process.last_words()
        );
        ensure!(
            operator.process.ended()?.is_none(),
            "the operator ended:\n{}",
            operator.process.last_words()
        );
        sleep(LOOK);
    }
}

/// UID and version of each object.
fn versions(api: &Api) -> Result<Vec<[String; 2]>> {
    let mut all = Vec::new();
    for (plural, _) in KINDS {
        let list = api.get(&format!("/apis/lathe.dev/v1alpha1/{plural}?resourceVersion=0"))?;
        for object in list["items"].as_array().into_iter().flatten() {
            let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default().to_owned();
            all.push([text("uid"), text("resourceVersion")]);
        }
    }
    all.sort();
    Ok(all)
}

/// Whether every Model is ready, every FineTuneJob has its Job and every InferenceService its Deployment.
fn arrived(api: &Api, counts: &Counts) -> Result<bool> {
    let [models, jobs, services] = counts.each;
    let list = api.get("/apis/lathe.dev/v1alpha1/models?resourceVersion=0")?;
    let is_ready = |model: &&Value| {
        let conditions = model["status"]["conditions"].as_array();
        conditions.is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
    };
    let ready = list["items"].as_array().map_or(0, |all| all.iter().filter(is_ready).count());
    let training = api.count("/apis/batch/v1/jobs", "lathe.dev/task=train")?;
    let serving = api.count("/apis/apps/v1/deployments", "lathe.dev/kind=inferenceservice")?;
    Ok((ready, training, serving) == (models, jobs, services))
}
