//! Debian's docker-registry for one test.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// Runs until it is dropped.
pub struct Server {
    child: Child,
    /// `ADDRESS:PORT`
    pub host: String,
}

impl Server {
    /// Serves `folder` on a free port; `extra` is added to the configuration.
    pub fn start(folder: &Path, address: Ipv4Addr, extra: &str) -> Result<Self> {
        let port = TcpListener::bind((address, 0))?.local_addr()?.port();
        let host = format!("{address}:{port}");
        let config = folder.join("config.yml");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n{extra}",
            folder.join("data").display()
        );
        fs::write(&config, text)?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
        let server = Self { child: command.spawn()?, host };
        let started = Instant::now();
        while TcpStream::connect(&server.host).is_err() {
            ensure!(started.elapsed() < Duration::from_secs(30), "the registry does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
