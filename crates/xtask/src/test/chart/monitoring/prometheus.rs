//! A real Prometheus on a free port, which reads what our programs were recorded to say, with the labels that pods get.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::bench::{ask, process::Watched};
use crate::{paths, ports};

/// Only a machine that stands still takes so long.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A program whose numbers are recorded.
pub struct Target {
    /// Of its file in tests/monitoring.
    pub name: &'static str,
    /// What the Prometheus operator adds.
    pub labels: Value,
    /// Whether the program's own labels win.
    pub honor_labels: bool,
}

/// Prometheus, with its rules, until it is dropped.
pub struct Prometheus {
    pub process: Watched,
    pub api: Api,
}

impl Prometheus {
    /// Starts it on `folder`/rules.yaml; all that it writes stays in `folder`.
    ///
    /// # Errors
    /// It does not start; the text has its last words.
    pub fn start(program: &Path, folder: &Path, targets: &[Target]) -> Result<Self> {
        let feed = feed()?;
        let scrapes: Vec<Value> = targets.iter().map(|target| scrape(target, &feed)).collect();
        let configuration = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": scrapes,
        });
        // JSON is YAML.
        fs::write(folder.join("prometheus.yaml"), configuration.to_string())?;
        let [port] = ports::free()?;
        let mut command = Command::new(program);
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        command.arg(format!("--config.file={}", folder.join("prometheus.yaml").display()));
        command.arg(format!("--storage.tsdb.path={}", folder.join("data").display()));
        let mut process = Watched::start(&mut command, &folder.join("prometheus.log"))?;
        let api = Api {
            agent: ask::agent(Duration::from_secs(30)),
            address: format!("http://127.0.0.1:{port}/api/v1"),
        };
        process.wait_for("Prometheus", PATIENCE, || api.ask("status/runtimeinfo", &[]).ok())?;
        Ok(Self { process, api })
    }
}

/// Prometheus's API.
pub struct Api {
    agent: ureq::Agent,
    address: String,
}

impl Api {
    /// The series of an expression: their labels.
    ///
    /// # Errors
    /// Prometheus refuses it; the text has its words.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let data = self.ask("query", &[("query", expression)])?;
        // Of our expressions none is a bare number.
        let of = |series: &Value| series["metric"].clone();
        Ok(data["result"].as_array().context("no series")?.iter().map(of).collect())
    }

    /// The labels of all series that a selector has found since the start.
    ///
    /// # Errors
    /// Prometheus refuses it; the text has its words.
    pub fn series(&self, selector: &str) -> Result<Vec<Value>> {
        let data = self.ask("series", &[("match[]", selector)])?;
        Ok(data.as_array().context("no list of series")?.clone())
    }

    /// `data` of an answer.
    ///
    /// # Errors
    /// No answer, or an error; the text has Prometheus's words.
    pub fn ask(&self, path: &str, parameters: &[(&str, &str)]) -> Result<Value> {
        let request =
            self.agent.get(format!("{}/{path}", self.address)).query_pairs(parameters.iter().copied());
        let mut response = request.config().http_status_as_error(false).build().call()?;
        let mut answer: Value = serde_json::from_str(&response.body_mut().read_to_string()?)?;
        ensure!(answer["status"] == "success", "Prometheus says: {}", answer["error"]);
        Ok(answer["data"].take())
    }
}

fn scrape(target: &Target, feed: &str) -> Value {
    json!({
        "job_name": target.name,
        "metrics_path": format!("/{}.txt", target.name),
        "honor_labels": target.honor_labels,
        "static_configs": [{"targets": [feed], "labels": target.labels}],
    })
}

/// Serves the recorded files as the programs do, as long as this process lives.
fn feed() -> Result<String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?.to_string();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // Prometheus shows it as a target that is down, and comes again.
            let _ = serve(client);
        }
    });
    Ok(address)
}

fn serve(mut client: TcpStream) -> Result<()> {
    let mut lines = BufReader::new(&client).lines();
    let first = lines.next().context("no request")??;
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let Some(name) = first.strip_prefix("GET /").and_then(|line| line.split(' ').next()) else {
        bail!("no GET");
    };
    let text = fs::read_to_string(paths::repository().join("tests/monitoring").join(name))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    write!(
        client,
        "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    )?;
    Ok(())
}
