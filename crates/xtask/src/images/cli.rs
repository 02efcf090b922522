//! `cargo xtask images`.

use std::path::PathBuf;

use anyhow::{Context, Result};

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
}

/// Runs the command.
///
/// # Errors
/// As [`images::build`]; or there is no such cluster.
pub fn run(args: &Args) -> Result<()> {
    for image in images::build(images::REGISTRY)? {
        let path = images::write(&image, &args.out)?;
        let size = image.layer.bytes.len() as f64 / 1e6;
        ui::note(&format!("{} {} {size:.1} MB", image.reference, image.manifest.digest));
        if let Some(name) = &args.import {
            let cluster = cluster::find(name)?;
            let cluster = cluster.with_context(|| format!("cluster {name:?} does not run"))?;
            cluster.import_image(&path)?;
        }
    }
    ui::note(&format!("archives: {}", args.out.display()));
    Ok(())
}
