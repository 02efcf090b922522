//! Rendering the chart, and finding one's way in what comes out.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{command, paths, toolchain};

/// Name and namespace of the rendered release.
pub const RELEASE: &str = "lathe";
pub const RELEASE_NAMESPACE: &str = "lathe-system";

/// The pinned Helm, and the chart.
pub struct Helm {
    program: PathBuf,
    chart: PathBuf,
}

impl Helm {
    /// # Errors
    /// Helm cannot be built.
    pub fn new() -> Result<Self> {
        let program = toolchain::go_program(&toolchain::HELM)?;
        Ok(Self { program, chart: paths::repository().join("charts/lathe") })
    }

    /// # Errors
    /// The linter has something to say.
    pub fn lint(&self) -> Result<()> {
        command::run(Command::new(&self.program).args(["lint", "--strict"]).arg(&self.chart)).map(drop)
    }

    /// The manifests with these values, hooks included.
    ///
    /// # Errors
    /// Helm refuses; the text has its words.
    pub fn template(&self, values: &[&str]) -> Result<String> {
        let mut helm = Command::new(&self.program);
        helm.args(["template", RELEASE]).arg(&self.chart).args(["--namespace", RELEASE_NAMESPACE]);
        helm.args(values.iter().flat_map(|value| ["--set", value]));
        command::run(&mut helm)
    }
}

/// The documents of a YAML text, without empty ones.
///
/// # Errors
/// It is no YAML.
pub fn parse(text: &str) -> Result<Vec<Value>> {
    let mut all: Vec<Value> = serde_saphyr::from_multiple(text).context("reading rendered YAML")?;
    all.retain(|object| !object.is_null());
    Ok(all)
}

/// `Kind namespace/name`.
pub fn key(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let meta = &object["metadata"];
    format!("{} {}/{}", text(&object["kind"]), text(&meta["namespace"]), text(&meta["name"]))
}

pub fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

pub fn kinds<'a>(all: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    all.iter().filter(move |object| object["kind"] == kind)
}

pub fn named<'a>(all: &'a [Value], kind: &'a str, wanted: &'a str) -> Option<&'a Value> {
    kinds(all, kind).find(|object| name(object) == wanted)
}

/// The strings of a list.
pub fn strings(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// True where every pair of `wanted` stands in `labels`.
pub fn matches(wanted: &Value, labels: &Value) -> bool {
    wanted.as_object().into_iter().flatten().all(|(key, value)| labels[key] == *value)
}
