//! `cargo xtask images`.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::push::{Registry, checked};
use crate::{cluster, images, ui};

/// Build the images of Lathe and of the quick-start, without a container engine.
#[derive(clap::Args)]
pub struct Args {
    /// Where the archives go; `docker load -i` and `ctr images import` take them.
    #[arg(long, value_name = "DIR", default_value = "target/images")]
    out: PathBuf,
    /// Import them into the local cluster of this name.
    #[arg(long, value_name = "NAME")]
    import: Option<String>,
    /// Name them HOST/PATH/... and push them there, with the login of `docker login`.
    #[arg(long, value_name = "HOST/PATH")]
    registry: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// As [`images::build`]; or there is no such cluster, or the registry refuses.
pub fn run(args: &Args) -> Result<()> {
    let cluster = args.import.as_ref().map(|name| -> Result<_> {
        cluster::find(name)?.with_context(|| format!("cluster {name:?} does not run"))
    });
    let cluster = cluster.transpose()?;
    let destination = args.registry.as_deref().map(checked).transpose()?;
    for image in images::build(destination.unwrap_or(images::REGISTRY))? {
        let step = ui::step(&image.reference);
        let path = images::write(&image, &args.out)?;
        if let Some(cluster) = &cluster {
            cluster.import_image(&path)?;
        }
        if let Some(destination) = destination {
            Registry::of(destination).push(&image)?;
        }
        let size = image.layer.bytes.len() as f64 / 1e6;
        step.done(&format!("{size:.1} MB, {}", image.manifest.digest));
    }
    ui::note(&format!("archives: {}", args.out.display()));
    Ok(())
}
