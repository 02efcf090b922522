//! Command line and environment.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use lathe_telemetry::CollectorOptions;

use crate::hold::HoldBounds;
use crate::places::Places;

/// The one front door for everything that a cluster serves: OpenAI's API, keys, limits, balance.
#[derive(Debug, Parser)]
#[command(name = "lathe-gateway", version)]
pub struct Options {
    /// Address for clients; `[::]` is every address, of IPv4 too.
    #[arg(long, env = "LATHE_LISTEN", default_value = "[::]:8080")]
    pub listen: SocketAddr,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, env = "LATHE_ADMIN_LISTEN", default_value = "[::]:8081")]
    pub admin_listen: SocketAddr,
    /// Namespaces whose services are reached; none: all of them.
    #[arg(long, env = "LATHE_NAMESPACES", value_delimiter = ',')]
    pub namespaces: Vec<String>,
    /// Who may ask.
    #[arg(long, env = "LATHE_AUTH", value_enum, default_value = "keys")]
    pub auth: AuthMode,
    /// Folder of the keys (a mounted Secret), one a file: `lathe keys create` prints what goes into it.
    #[arg(long, env = "LATHE_KEYS_DIR", default_value = "/etc/lathe/keys")]
    pub keys_dir: PathBuf,
    /// The gateway's private key (PKCS#8 PEM), by which workers know it: `gateway.key` of the Secret `lathe-keys`.
    #[arg(long, env = "LATHE_SIGNING_KEY", default_value = "/etc/lathe/signing/gateway.key")]
    pub signing_key: PathBuf,
    /// The operator's public key (SPKI PEM), by which it is known when it asks what flows: `operator.pub` of the Secret `lathe-keys`.
    #[arg(long, env = "LATHE_OPERATOR_KEY", default_value = "/etc/lathe/signing/operator.pub")]
    pub operator_key: PathBuf,
    /// Requests that are answered at a time; one more gets 429.
    #[arg(long, env = "LATHE_MAX_IN_FLIGHT", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_in_flight: u32,
    /// Of them, requests of one key; absent: a quarter.
    #[arg(long, env = "LATHE_MAX_IN_FLIGHT_PER_KEY", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_in_flight_per_key: Option<u32>,
    /// Seconds that a client's connection may be idle; more than a proxy before the gateway keeps its own, so that it writes no
    /// request into a closing one.
    #[arg(long, env = "LATHE_IDLE_SECONDS", default_value_t = 75, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub idle_seconds: u32,
    /// Requests for one service that are held at a time while none of its replicas is ready; one more gets 429. Of one namespace
    /// twice as many, in all eight times as many.
    #[arg(long, env = "LATHE_HOLD_REQUESTS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub hold_requests: u32,
    /// MiB that their bodies have together; of one namespace twice, in all eight times as much.
    #[arg(long, env = "LATHE_HOLD_MIB", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub hold_mib: u32,
    /// Seconds that a request is held; then it gets 503.
    #[arg(long, env = "LATHE_HOLD_SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub hold_seconds: u32,
    /// Write a line of JSON for every request to standard output.
    #[arg(long, env = "LATHE_USAGE_LOG")]
    pub usage_log: bool,
    /// Seconds that open answers have after SIGTERM; less than the pod's terminationGracePeriodSeconds.
    #[arg(long, env = "LATHE_DRAIN_SECONDS", default_value_t = 60)]
    pub drain_seconds: u32,
    /// The collector of traces.
    #[command(flatten)]
    pub collector: CollectorOptions,
    /// Form of the log; what is logged is chosen by RUST_LOG, e.g. `info,kube=warn`.
    #[arg(long, env = "LATHE_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

impl Options {
    /// How many requests are answered at a time.
    pub fn places(&self) -> Arc<Places> {
        let per_key = self.max_in_flight_per_key.unwrap_or(self.max_in_flight.div_ceil(4));
        Places::new(self.max_in_flight as usize, per_key as usize)
    }

    /// How much is held of one service.
    pub fn holds(&self) -> HoldBounds {
        HoldBounds {
            requests: self.hold_requests as usize,
            bytes: (self.hold_mib as usize) << 20,
            time: Duration::from_secs(self.hold_seconds.into()),
        }
    }
}

/// Who may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AuthMode {
    /// Whoever has a key.
    Keys,
    /// Everybody who reaches the gateway, every model of every namespace.
    None,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}
