//! `lathe logs`: what the pods of an object say.
use futures::{AsyncBufReadExt as _, StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt as _, api::LogParams};
use lathe_api::names;
use lathe_resolve::pod;

use super::{Connection, Kind, Named, Target, connect, pods, refused, status};
use crate::failure::{Done, Problem};
use crate::output::{note, say};

/// Show what the pods of an object say: inspection, check of the dataset, training, serving.
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment, after_long_help = HELP)]
pub struct Args {
    /// KIND/NAME; KIND is model, finetunejob (ftj) or inferenceservice (lsvc).
    #[arg(value_name = "KIND/NAME")]
    pub object: Named,
    #[command(flatten)]
    pub target: Target,
    /// Go on until the pods end.
    #[arg(short, long)]
    pub follow: bool,
    /// These pods alone: train, check-data, inspect or serve.
    #[arg(long, value_name = "TASK", value_parser = ["train", "check-data", "inspect", "serve"])]
    pub task: Option<String>,
    /// The last lines of each pod alone.
    #[arg(long, value_name = "LINES")]
    pub tail: Option<i64>,
    /// What a container that was restarted said before.
    #[arg(short, long)]
    pub previous: bool,
}

const HELP: &str = "Examples:
  lathe logs finetunejob/support-tone -f
  lathe logs inferenceservice/shop --tail 20
  lathe logs model/shop-base

Pods go with their Jobs, and their logs with them; `lathe status KIND/NAME` keeps the cause.";

/// Runs the command.
///
/// # Errors
/// The object has no pods, or the cluster does not give their logs.
pub async fn run(args: &Args) -> Done<()> {
    let Named { kind, name: Some(name) } = &args.object else {
        let message = format!("which one? Next: `lathe status {}` lists them.", args.object.kind.lower());
        return Err(Problem::user("InvalidArgument", message));
    };
    let connection = connect(&args.target).await?;
    let mut found = pods(&connection, *kind, name).await?;
    if let Some(task) = &args.task {
        found.retain(|pod| pod.labels().get(names::LABEL_TASK) == Some(task));
    }
    // The oldest first, as it happened.
    found.reverse();
    if found.is_empty() {
        return Err(none(&connection, *kind, name).await?);
    }
    let api: Api<Pod> = Api::namespaced(connection.client.clone(), &connection.namespace);
    let several = found.len() > 1;
    let params = LogParams {
        container: Some(pod::CONTAINER.to_owned()),
        follow: args.follow,
        tail_lines: args.tail,
        previous: args.previous,
        ..LogParams::default()
    };
    let texts = found.iter().map(|pod| print(&api, pod, &params, several));
    if args.follow {
        return stream::iter(texts).buffer_unordered(found.len()).try_collect().await;
    }
    for text in texts {
        text.await?;
    }
    Ok(())
}

async fn print(api: &Api<Pod>, pod: &Pod, params: &LogParams, several: bool) -> Done<()> {
    let name = pod.name_any();
    let log = match api.log_stream(&name, params).await {
        Ok(log) => log,
        // Its container has not started: that is its state, no failure of ours.
        Err(kube::Error::Api(status)) if status.code == 400 => {
            note(&format!("{name}: {}", status.message));
            return Ok(());
        }
        Err(error) => return Err(refused(&format!("read the log of pod {name}"), &error)),
    };
    let mut lines = std::pin::pin!(log.lines());
    loop {
        match lines.next().await {
            Some(Ok(line)) => {
                if !say(&if several { format!("{name}: {line}") } else { line }) {
                    return Ok(());
                }
            }
            Some(Err(error)) => {
                return Err(Problem::transient(
                    "Unreachable",
                    format!("the log of pod {name} broke off: {error}"),
                ));
            }
            None => return Ok(()),
        }
    }
}

/// Why there is nothing to show: the object is not there, or its pods are not.
async fn none(connection: &Connection, kind: Kind, name: &str) -> Done<Problem> {
    let object = status::get(connection, kind, name).await?;
    let (reason, message) = status::cause(kind, &object);
    Ok(Problem::user(
        "NoPods",
        format!("{}/{name} has no pods now. Its status says: {reason}: {message}", kind.lower()),
    ))
}
