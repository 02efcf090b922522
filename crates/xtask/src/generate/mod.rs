//! `cargo xtask generate`: everything in the repository that is made from the Rust types and the chart.

mod deploy;
mod reference;
mod yaml;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{command, paths, ui};

/// Writes crds/, the chart's copies and docs/reference/api.md from the Rust types, and deploy/ from the chart.
#[derive(clap::Args)]
pub struct Args {
    /// Write nothing; fail and name the files that differ.
    #[arg(long)]
    pub check: bool,
}

/// Runs the command.
///
/// # Errors
/// The types do not compile, a file cannot be written, or with `--check` one differs.
pub fn run(args: &Args) -> Result<()> {
    let mut stale = Vec::new();
    for (path, content) in files()? {
        let found = fs::read_to_string(&path).unwrap_or_default();
        if found == content {
            continue;
        }
        if args.check {
            stale.push(path.display().to_string());
            continue;
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        ui::note(&format!("wrote {}", path.display()));
    }
    if !stale.is_empty() {
        bail!(
            "these files are not what the Rust types and the chart say: {}. Next: cargo xtask generate",
            stale.join(", ")
        );
    }
    Ok(())
}

/// Path and content of every generated file.
fn files() -> Result<Vec<(PathBuf, String)>> {
    let root = paths::repository();
    let mut print = command::cargo();
    print.args(["run", "--quiet", "--package", "lathe-api", "--bin", "crds"]);
    let crds: Vec<Value> =
        serde_json::from_str(&command::run(&mut print)?).context("reading the printed CRDs")?;
    let mut files = deploy::files(&root, &crds)?;
    files.push((root.join("docs/reference/api.md"), reference::page(&crds)));
    for crd in &crds {
        let name = crd["spec"]["names"]["plural"].as_str().context("a CRD without a plural name")?;
        let plain = yaml::document(crd);
        files.push((root.join(format!("charts/lathe/templates/crds/{name}.yaml")), chart_copy(crd)));
        files.push((root.join(format!("crds/{name}.yaml")), plain));
    }
    Ok(files)
}

/// The CRD as a chart template: behind `crds.enabled`, and kept when the release goes.
fn chart_copy(crd: &Value) -> String {
    let mut kept = crd.clone();
    kept["metadata"]["annotations"]["helm.sh/resource-policy"] = "keep".into();
    format!(
        "{{{{- if .Values.crds.enabled }}}}\n{}{{{{- end }}}}\n",
        yaml::document(&kept).replace("{{", "{{ \"{{\" }}")
    )
}
