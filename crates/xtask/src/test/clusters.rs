//! The layers that need a Kubernetes: an API server alone, and real nodes.

use anyhow::{Result, ensure};

use super::programs::{TestProgram, run_all};
use crate::cluster::{self, Cluster};
use crate::toolchain::{self, GoProgram};
use crate::{images, paths, ui};

/// Tests of xtask itself that start clusters and registries, or compile all of Lathe once more.
pub const OF_XTASK: [&str; 3] = ["push", "lifecycle", REPRODUCIBLE];
const REPRODUCIBLE: &str = "reproducible";
const CONTROL_PLANE: &str = "control_plane";

/// Against an API server without nodes.
///
/// # Errors
/// A test fails, or the cluster does not come up.
pub fn control_plane(programs: &[TestProgram]) -> Result<()> {
    let options = cluster::Options { name: "lathe-test-control-plane".to_owned(), nodes: 0, fleet: 0 };
    with_cluster(&toolchain::KUBERNETES, &options, |cluster| {
        against(programs, cluster, |name| name == CONTROL_PLANE)
    })
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
        let ended = with_cluster(kubernetes, &options, |cluster| {
            against(programs, cluster, |name| name == CONTROL_PLANE)
        });
        if let Err(error) = ended {
            failed.push(format!("{}: {error:#}", kubernetes.name));
        }
    }
    let twice = programs.iter().filter(|program| program.name == REPRODUCIBLE);
    if let Err(error) = run_all(twice, &[], &["--include-ignored"]) {
        failed.push(format!("{error:#}"));
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Against real nodes.
///
/// # Errors
/// As [`control_plane`].
pub fn e2e(programs: &[TestProgram]) -> Result<()> {
    let options = cluster::Options { name: "lathe-test".to_owned(), nodes: 1, fleet: 0 };
    with_cluster(&toolchain::KUBERNETES, &options, |cluster| {
        let folder = paths::cache()?.join("images");
        for image in images::build(images::REGISTRY)? {
            cluster.import_image(&images::write(&image, &folder)?)?;
        }
        against(programs, cluster, |name| name != CONTROL_PLANE)
    })?;
    toolchain::packages(&[("docker-registry", "docker-registry"), ("skopeo", "skopeo")])?;
    let own = |program: &&TestProgram| OF_XTASK.contains(&&*program.name) && program.name != REPRODUCIBLE;
    run_all(programs.iter().filter(own), &[], &["--include-ignored"])
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

fn against(programs: &[TestProgram], cluster: &Cluster, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let helm = toolchain::go_program(&toolchain::HELM)?;
    let (kubeconfig, helm) = (cluster.kubeconfig(), helm.to_string_lossy().into_owned());
    let kubectl = cluster.kubectl().get_program().to_string_lossy().into_owned();
    let environment = [
        ("KUBECONFIG", &*kubeconfig.to_string_lossy()),
        ("LATHE_HELM", &helm),
        ("LATHE_KUBECTL", &kubectl),
        ("RUST_TEST_THREADS", "1"),
    ];
    let tests = programs.iter().filter(|program| program.package == "lathe-e2e" && wanted(&program.name));
    run_all(tests, &environment, &[])
}
