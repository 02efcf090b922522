//! The proxies, each started as its users would on one core.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use rcgen::{KeyPair, PKCS_ED25519};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::cores::Cores;
use super::{api, peers};
use crate::bench::ask;
use crate::bench::process::Watched;
use crate::images::programs;
use crate::{paths, ports};

/// Where the stub listens: the gateway asks workers at their port alone, so it has an address that nobody else has.
const STUB: Ipv4Addr = Ipv4Addr::new(127, 0, 83, 1);
const WORKER_PORT: u16 = 8080;
/// The stub's models: one that answers at once, one that takes its time.
pub const FAST: &str = "fast";
/// See [`FAST`].
pub const PACED: &str = "paced";
/// The client's key; LiteLLM takes none that looks weak.
pub const KEY: &str = "sk-lathe-bench-3f9c1d7e5a2b48c69d0e1f2a3b4c5d6e";
/// LiteLLM imports for long.
const START: Duration = Duration::from_secs(180);

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// `lathe-gateway`.
    Lathe,
    /// nginx.
    Nginx,
    /// LiteLLM.
    LiteLlm,
    /// Nobody stands between.
    Direct,
}

impl Contestant {
    /// In the order in which they are asked: the first one's load is the others' too.
    pub const ALL: [Self; 4] = [Self::Lathe, Self::Direct, Self::Nginx, Self::LiteLlm];

    /// As tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lathe => "lathe-gateway",
            Self::Nginx => "nginx",
            Self::LiteLlm => "LiteLLM",
            Self::Direct => "the stub alone",
        }
    }
}

/// What every proxy is started with.
pub struct Ground {
    /// Who has which.
    pub cores: Cores,
    /// The program of stub and clients.
    pub traffic: PathBuf,
    folder: PathBuf,
    gateway: PathBuf,
    nginx: PathBuf,
    litellm: PathBuf,
}

/// A program that listens.
pub struct Started {
    /// `IP:port`.
    pub address: String,
    /// `None`: of the stub, which is not measured.
    pub process: Option<u32>,
    _running: Watched,
}

impl Ground {
    /// Fetches and compiles what is not there.
    ///
    /// # Errors
    /// Something cannot be had; the text names it.
    pub fn prepare(gateway: &Path, folder: PathBuf, cores: Cores) -> Result<Self> {
        let source = paths::repository().join("crates/xtask/programs/traffic/main.rs");
        let traffic = programs::fast("traffic", &source)?;
        let (nginx, litellm) = (peers::nginx()?, peers::litellm()?);
        Ok(Self { cores, traffic, folder, gateway: gateway.to_path_buf(), nginx, litellm })
    }

    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// It ends, or does not answer.
    pub fn start(&self, contestant: Contestant) -> Result<Started> {
        let folder = self.folder.join(contestant.name());
        fs::create_dir_all(&folder)?;
        let [port, admin] = ports::free()?;
        let worker = format!("{STUB}:{WORKER_PORT}");
        let (command, ready) = match contestant {
            Contestant::Lathe => {
                (self.gateway(&folder, port, admin)?, Some(format!("127.0.0.1:{admin}/readyz")))
            }
            Contestant::Nginx => {
                let conf = folder.join("nginx.conf");
                fs::write(&conf, peers::nginx_conf(&folder, port, &worker))?;
                let mut command = self.cores.proxy(&self.nginx);
                command.arg("-p").arg(&folder).arg("-c").arg(conf);
                (command, None)
            }
            Contestant::LiteLlm => {
                let conf = folder.join("config.yaml");
                fs::write(&conf, peers::litellm_conf(&[FAST, PACED], &worker, KEY))?;
                let mut command = self.cores.proxy(&self.litellm);
                command.args(["--host", "127.0.0.1", "--port", &port.to_string(), "--num_workers", "1"]);
                // It sees nothing of whoever measures, and asks nobody for the newest prices.
                command.args(["--telemetry", "False", "--config"]).arg(conf).env_clear();
                command.env("PATH", "/usr/bin:/bin").env("HOME", &folder).env("LITELLM_LOG", "ERROR");
                command.env("LITELLM_LOCAL_MODEL_COST_MAP", "True");
                (command, Some(format!("127.0.0.1:{port}/health/readiness")))
            }
            Contestant::Direct => {
                let mut command = self.cores.other(&self.traffic);
                command.args(["stub", &worker]);
                (command, None)
            }
        };
        self.wait(contestant, command, &folder, &format!("127.0.0.1:{port}"), ready.as_deref())
    }

    fn wait(
        &self,
        contestant: Contestant,
        mut command: Command,
        folder: &Path,
        address: &str,
        ready: Option<&str>,
    ) -> Result<Started> {
        let direct = contestant == Contestant::Direct;
        let address = if direct { format!("{STUB}:{WORKER_PORT}") } else { address.to_owned() };
        let mut running = Watched::start(&mut command, &folder.join("log"))?;
        let agent = ask::agent(Duration::from_secs(10));
        running.wait_for(contestant.name(), START, || match ready {
            Some(url) => agent.get(format!("http://{url}")).call().ok().map(drop),
            None => std::net::TcpStream::connect(&address).ok().map(drop),
        })?;
        let process = (!direct).then(|| running.id());
        if let Some(pid) = process {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            let name = contestant.name();
            ensure!(children.trim().is_empty(), "{name} has processes more, whose time would not be counted");
        }
        Ok(Started { address, process, _running: running })
    }

    /// With one key, one service, and all defaults.
    fn gateway(&self, folder: &Path, port: u16, admin: u16) -> Result<Command> {
        let url = api::serve(STUB, WORKER_PORT, FAST, PACED)?;
        let kubeconfig = folder.join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "bench",
            "clusters": [{"name": "bench", "cluster": {"server": url}}],
            "users": [{"name": "bench", "user": {}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        });
        fs::write(&kubeconfig, config.to_string())?;
        let (keys, signing) = (folder.join("keys"), folder.join("gateway.key"));
        fs::create_dir_all(&keys)?;
        let hash: String = Sha256::digest(KEY).iter().map(|byte| format!("{byte:02x}")).collect();
        let entry = json!({"hash": format!("sha256:{hash}"), "namespace": api::NAMESPACE});
        fs::write(keys.join("bench"), entry.to_string())?;
        fs::write(&signing, KeyPair::generate_for(&PKCS_ED25519)?.serialize_pem())?;
        let mut command = self.cores.proxy(&self.gateway);
        command.args([
            "--listen",
            &format!("127.0.0.1:{port}"),
            "--admin-listen",
            &format!("127.0.0.1:{admin}"),
        ]);
        command.arg("--keys-dir").arg(keys).arg("--signing-key").arg(signing);
        command.env("KUBECONFIG", kubeconfig).env("RUST_LOG", "warn");
        Ok(command)
    }
}
