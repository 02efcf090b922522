//! The layers that need a Kubernetes: an API server alone, and real nodes.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail, ensure};

use super::programs::{NOTHING, TestProgram, run_all};
use crate::cluster::{self, Cluster};
use crate::toolchain::{self, GoProgram};
use crate::{images, ui};

/// Tests of xtask itself that start clusters and registries, or compile all of Lathe once more.
pub const OF_XTASK: [&str; 3] = ["push", "lifecycle", REPRODUCIBLE];
const REPRODUCIBLE: &str = "reproducible";
/// Those that take longest, the longest first.
const LONGEST: [&str; 5] = ["disturbances", TWO_NODES, "bad_input", "install", "lifecycle"];
/// The one that drains a node.
const TWO_NODES: &str = "front_door";
const CONTROL_PLANE: &str = "control_plane";

/// Against an API server without nodes.
///
/// # Errors
/// A test fails, or the cluster does not come up.
pub fn control_plane(programs: &[TestProgram]) -> Result<()> {
    let options = cluster::Options { name: "lathe-test-control-plane".to_owned(), nodes: 0, fleet: 0 };
    with_cluster(&toolchain::KUBERNETES, &options, |cluster| against(programs, cluster))
}

/// The same against the oldest and the newest Kubernetes; and the images of another checkout.
///
/// # Errors
/// As [`control_plane`]; every version is tried.
pub fn compat(programs: &[TestProgram]) -> Result<()> {
    let mut failed = Vec::new();
    for kubernetes in &toolchain::OTHER_KUBERNETES {
        ui::heading(&format!("-- {}", kubernetes.name));
        let options = cluster::Options { name: "lathe-test-compat".to_owned(), nodes: 0, fleet: 0 };
        let ended = with_cluster(kubernetes, &options, |cluster| against(programs, cluster));
        if let Err(error) = ended {
            failed.push(format!("{}: {error:#}", kubernetes.name));
        }
    }
    let twice = programs.iter().filter(|program| program.name == REPRODUCIBLE);
    if let Err(error) = run_all(twice, NOTHING, &["--include-ignored"]) {
        failed.push(format!("{error:#}"));
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Against real nodes: two clusters side by side, since a test waits for Kubernetes most of its time.
///
/// # Errors
/// As [`control_plane`].
pub fn e2e(programs: &[TestProgram]) -> Result<()> {
    toolchain::packages(&[("docker-registry", "docker-registry"), ("skopeo", "skopeo"), ("curl", "curl")])?;
    let python = super::python()?;
    let archives = images::archives()?;
    let queue = in_order(programs);
    let known = LONGEST.iter().chain(OF_XTASK.iter().filter(|name| **name != REPRODUCIBLE));
    for name in known {
        ensure!(queue.iter().any(|program| program.name == *name), "there is no test program {name}");
    }
    let queue = Mutex::new(queue);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let run = |lane: u32, program: &TestProgram, on: &Cluster| {
        let args: &[&str] = if is_own(program) { &["--include-ignored"] } else { &[] };
        let mut environment = environment(on)?.to_vec();
        environment.push(("LATHE_PYTHON", python.clone()));
        program.run_beside(lane, &environment, args)
    };
    let lane = |lane: u32| {
        with_images(&format!("lathe-test-{lane}"), 1, &archives, |one| {
            let mut failed = Vec::new();
            while let Some(program) = next() {
                let ended = match program.name == TWO_NODES {
                    true => with_images("lathe-test-two-nodes", 2, &archives, |two| run(lane, program, two)),
                    false => run(lane, program, one),
                };
                if let Err(error) = ended {
                    failed.push(format!("{error:#}"));
                }
            }
            ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
            Ok(())
        })
    };
    std::thread::scope(|scope| {
        let lanes = [1, 2].map(|number| scope.spawn(move || lane(number)));
        let ended = lanes.map(|lane| lane.join().unwrap_or_else(|_| bail!("xtask itself panicked")));
        let failed: Vec<_> =
            ended.into_iter().filter_map(|ended| Some(format!("{:#}", ended.err()?))).collect();
        ensure!(failed.is_empty(), "{}", failed.join("; "));
        Ok(())
    })
}

/// Runs something against a cluster that has these images.
///
/// # Errors
/// Its own, or the cluster does not come up.
pub fn with_images(
    name: &str,
    nodes: u32,
    archives: &[PathBuf],
    run: impl FnOnce(&Cluster) -> Result<()>,
) -> Result<()> {
    let options = cluster::Options { name: name.to_owned(), nodes, fleet: 0 };
    with_cluster(&toolchain::KUBERNETES, &options, |cluster| {
        archives.iter().try_for_each(|archive| cluster.import_image(archive))?;
        run(cluster)
    })
}

/// What the e2e layer runs; what takes longest begins first, so that both clusters are done at about the same time.
fn in_order(programs: &[TestProgram]) -> VecDeque<&TestProgram> {
    let rank = |program: &&TestProgram| LONGEST.iter().position(|name| *name == program.name);
    let mut all: Vec<_> = programs.iter().filter(|program| is_own(program) || is_e2e(program)).collect();
    all.sort_by_key(|program| rank(program).unwrap_or(LONGEST.len()));
    all.into()
}

fn is_e2e(program: &TestProgram) -> bool {
    program.package == "lathe-e2e" && program.name != CONTROL_PLANE
}

/// Those of xtask's own that bring up what they need.
fn is_own(program: &TestProgram) -> bool {
    OF_XTASK.contains(&&*program.name) && program.name != REPRODUCIBLE
}

/// The cluster goes when the tests have passed, and stays for a look when they have not.
fn with_cluster(
    kubernetes: &GoProgram,
    options: &cluster::Options,
    tests: impl FnOnce(&Cluster) -> Result<()>,
) -> Result<()> {
    cluster::down(&options.name)?;
    let cluster = cluster::up_with(kubernetes, options)?;
    let ended = tests(&cluster);
    if ended.is_ok() || std::env::var_os("CI").is_some() {
        cluster::down(&options.name)?;
    } else {
        ui::note(&format!(
            "cluster {0} is left for a look; `cargo xtask cluster down --name {0}` removes it",
            options.name
        ));
    }
    ended
}

fn against(programs: &[TestProgram], cluster: &Cluster) -> Result<()> {
    let tests = programs.iter().filter(|program| program.name == CONTROL_PLANE);
    run_all(tests, &environment(cluster)?, &[])
}

/// What tests are told of their cluster.
///
/// # Errors
/// Helm is not built yet and does not build.
pub fn environment(cluster: &Cluster) -> Result<[(&'static str, String); 4]> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    Ok([
        ("KUBECONFIG", text(&cluster.kubeconfig())),
        ("LATHE_HELM", text(&toolchain::go_program(&toolchain::HELM)?)),
        ("LATHE_KUBECTL", text(Path::new(cluster.kubectl().get_program()))),
        ("RUST_TEST_THREADS", "1".to_owned()),
    ])
}
