//! `cargo xtask demo`: the main job, from nothing to an answer of the tuned model, and replicas that follow the load.

mod ask;
mod follow;
mod gateway;
mod release;
mod scale;
mod target;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::{cluster, images, paths, ui};
use gateway::Gateway;
use scale::Scaled;
use target::Target;

const NAMESPACE: &str = "lathe-demo";
const CLUSTER: &str = "lathe";

/// Tune a model, serve it and ask it, on a Kubernetes that this command brings up.
#[derive(clap::Args)]
pub struct Args {
    /// Use the cluster of this kubectl context instead; needs no root, and --registry unless the demo is taken down.
    #[arg(long)]
    context: Option<String>,
    /// Registry that cluster pulls from; the images are pushed there.
    #[arg(long, value_name = "HOST/PATH")]
    registry: Option<String>,
    /// Take the demo down: the local cluster, or what the demo made in --context.
    #[arg(long, conflicts_with = "keep")]
    down: bool,
    /// Keep the results of an earlier demo instead of beginning afresh.
    #[arg(long)]
    keep: bool,
}

/// Runs the command.
///
/// # Errors
/// A step fails; the text says which, and what the cluster says of it.
pub fn run(args: &Args) -> Result<()> {
    if args.down {
        return down(args);
    }
    can_begin(args)?;
    let started = Instant::now();
    let here = args.context.is_none();
    ui::heading("Lathe: tune a small model, serve it, ask it, load it.");
    ui::note(if here {
        "This brings up a Kubernetes of its own on this machine (one node, in namespaces of its own, needs root),\n    \
         builds Lathe, installs it with Helm and runs examples/quickstart. The first time takes about 25 minutes,\n    \
         mostly compiling Kubernetes and Lathe; later about 5."
    } else {
        "This pushes Lathe's images to the registry, installs Lathe with Helm into the given context and runs\n    \
         examples/quickstart there."
    });

    ui::heading("\n1. Cluster and images");
    let registry = args.registry.as_deref().unwrap_or(images::REGISTRY);
    let target = if let Some(context) = &args.context {
        for image in images::build(registry)? {
            images::push::Registry::of(registry).push(&image)?;
        }
        Target::context(context)
    } else {
        let cluster = cluster::up(&cluster::Options { name: CLUSTER.to_owned(), nodes: 1, fleet: 0 })?;
        let folder = paths::cache()?.join("images");
        for image in images::build(registry)? {
            cluster.import_image(&images::write(&image, &folder)?)?;
        }
        Target::local(&cluster)
    };

    ui::heading("\n2. Install Lathe with Helm");
    let key = release::install(&target, registry)?;

    ui::heading("\n3. Apply examples/quickstart");
    if !args.keep {
        target.kubectl(&["delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait"])?;
    }
    apply(&target, registry)?;

    ui::heading("\n4. Tune");
    let scores = follow::job(&target, NAMESPACE, "support-tone")?;

    ui::heading("\n5. Serve");
    follow::service(&target, NAMESPACE, "shop")?;

    ui::heading("\n6. Ask both, with questions that were held out\n");
    let (gateway, questions) = (Gateway::open(&target, key.clone())?, held_out()?);
    ask::side_by_side(&gateway, ["shop", "shop-support"], &questions)?;
    ui::heading(&scores);

    ui::heading("\n7. Scale with the load, to zero and back");
    let mut scaled = Scaled::new(&target, NAMESPACE, "shop")?;
    scaled.up(&gateway, "shop-support")?;
    scaled.wake(&gateway, "shop-support", &questions[0].0)?;
    say_what_next(&target, args, &key, started);
    Ok(())
}

fn can_begin(args: &Args) -> Result<()> {
    ensure!(
        args.context.is_none() || args.registry.is_some(),
        "--context needs --registry: nodes of another cluster pull the images from there. Next: name a registry that you \
         may push to and they may pull from."
    );
    Ok(())
}

/// Applies the quick-start as it stands, but for the registry of its one image.
fn apply(target: &Target, registry: &str) -> Result<()> {
    target.apply(&format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAMESPACE}\n"), None)?;
    for file in manifests()? {
        let text = fs::read_to_string(&file)?.replace(images::REGISTRY, registry);
        target.apply(&text, Some(NAMESPACE))?;
        ui::note(&format!(
            "kubectl apply -f {}",
            file.strip_prefix(paths::repository()).unwrap_or(&file).display()
        ));
    }
    Ok(())
}

fn manifests() -> Result<Vec<PathBuf>> {
    let folder = paths::repository().join("examples/quickstart");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    Ok(files)
}

/// Three questions and their reference answers, from the beginning, the middle and the end of the test set.
fn held_out() -> Result<Vec<(String, String)>> {
    let path = paths::quickstart_volume().join("data/test.jsonl");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let rows: Vec<serde_json::Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let say = |row: &serde_json::Value, n: usize| {
        row["messages"][n]["content"].as_str().unwrap_or_default().to_owned()
    };
    Ok([0, rows.len() / 2, rows.len().saturating_sub(1)]
        .iter()
        .map(|&n| (say(&rows[n], 0), say(&rows[n], 1)))
        .collect())
}

fn say_what_next(target: &Target, args: &Args, key: &str, started: Instant) {
    let seconds = started.elapsed().as_secs();
    let kubectl = target.shown();
    let flags = args.context.as_ref().map_or(String::new(), |c| format!(" --context {c}"));
    ui::heading(&format!(
        "\nDone in {}:{:02}. Look further:\n\
         \x20 {kubectl} -n {NAMESPACE} get lathe\n\
         \x20 {kubectl} -n {NAMESPACE} describe finetunejob support-tone\n\
         \x20 {kubectl} get acceleratorprofiles\n\
         Ask it yourself, or open its page at http://localhost:8080 with this key:\n\
         \x20 {kubectl} -n {system} port-forward service/lathe-gateway 8080:80\n\
         \x20 curl http://localhost:8080/v1/chat/completions -H 'Authorization: Bearer {key}' \\\n\
         \x20   -H 'Content-Type: application/json' -d '{{\"model\": \"shop-support\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'\n\
         Tear down:\n\
         \x20 cargo xtask demo --down{flags}",
        seconds / 60,
        seconds % 60,
        system = release::NAMESPACE,
    ));
}

fn down(args: &Args) -> Result<()> {
    let Some(context) = &args.context else {
        let step = ui::step("take the local cluster down");
        let there_was_one = cluster::down(CLUSTER)?;
        step.done(if there_was_one { "" } else { "there was none" });
        return Ok(());
    };
    let target = Target::context(context);
    let step = ui::step("remove the demo's namespace and Lathe");
    target.kubectl(&["delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait"])?;
    step.done(release::uninstall(&target)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn a_users_cluster_needs_a_registry_to_begin_and_none_to_end() {
        let takes = |line: &str| {
            let args = Line::try_parse_from(line.split(' ')).expect("a line").args;
            args.down || can_begin(&args).is_ok()
        };
        assert!(takes("demo"));
        assert!(takes("demo --down"));
        assert!(takes("demo --context c --registry r/x"));
        assert!(takes("demo --down --context c"));
        assert!(!takes("demo --context c"));
    }
}
