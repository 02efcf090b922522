//! Names, addresses and folders of a cluster: all of them follow from its name and its subnet.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::paths;

/// The second byte of `10.S.0.0/16` is chosen from here.
pub const SUBNETS: std::ops::RangeInclusive<u8> = 201..=250;
/// Real nodes of one cluster: their pod ranges are `10.S.65.0/24` and following.
pub const MOST_NODES: u32 = 30;

/// Where everything of one cluster lies.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The user's name for the cluster.
    pub name: String,
    /// Its state: certificates, logs, data, volumes.
    pub folder: PathBuf,
    /// `S` in `10.S.0.0/16`.
    pub subnet: u8,
}

impl Layout {
    /// # Errors
    /// The name is not 1 to 40 lower-case letters, digits and dashes.
    pub fn new(name: &str, subnet: u8) -> Result<Self> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        ensure!(
            (1..=40).contains(&name.len()) && name.chars().all(allowed),
            "a cluster's name has 1 to 40 lower-case letters, digits and dashes; {name:?} is none"
        );
        Ok(Self { name: name.to_owned(), folder: paths::cache()?.join("cluster").join(name), subnet })
    }

    /// A file or folder of the cluster's state.
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.folder.join(path)
    }

    /// A file or folder of one node's state.
    pub fn node_at(&self, node: u32, path: impl AsRef<Path>) -> PathBuf {
        self.folder.join(node_name(node)).join(path)
    }

    /// The host's address on the cluster's bridge, as pods and nodes see it.
    pub fn host_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.subnet, 0, 1)
    }

    /// A node's address, counted from 1; the control plane lives on node 1.
    pub fn node_address(&self, node: u32) -> Ipv4Addr {
        Ipv4Addr::new(10, self.subnet, 0, (1 + node) as u8)
    }

    /// A node's pods.
    pub fn pod_range(&self, node: u32) -> String {
        format!("10.{}.{}.0/24", self.subnet, 64 + node)
    }

    /// All pods of real nodes.
    pub fn all_pods(&self) -> String {
        format!("10.{}.64.0/18", self.subnet)
    }

    /// All services.
    pub fn services(&self) -> String {
        format!("10.{}.128.0/20", self.subnet)
    }

    /// The service `default/kubernetes`.
    pub fn api_service(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.subnet, 128, 1)
    }

    /// The service `kube-system/kube-dns`.
    pub fn dns_service(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.subnet, 128, 10)
    }

    /// Pods of fake nodes; nothing answers there.
    pub fn fake_pods(&self) -> String {
        format!("10.{}.192.1/18", self.subnet)
    }

    /// The bridge on the host that joins all nodes.
    pub fn bridge(&self) -> String {
        format!("lathe-{}", self.subnet)
    }

    /// The host's end of a node's cable.
    pub fn cable(&self, node: u32) -> String {
        format!("lathe-{}-{node}", self.subnet)
    }

    /// A node's cgroup below the root of each controller.
    pub fn cgroup(&self, node: u32) -> String {
        format!("lathe-{}-{node}", self.name)
    }
}

/// A node's name in Kubernetes.
pub fn node_name(node: u32) -> String {
    format!("node-{node}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        for name in ["", "..", "a/b", "A", "a_b", &"a".repeat(41)] {
            assert!(Layout::new(name, 201).is_err(), "{name:?}");
        }
        assert!(Layout::new("lathe-2", 201).is_ok());
    }

    #[test]
    fn ranges_do_not_touch_and_device_names_fit_the_kernel() -> Result<()> {
        let layout = Layout::new("lathe", 250)?;
        assert_eq!(layout.pod_range(1), "10.250.65.0/24");
        // Below the services, which begin at 128.
        assert_eq!(layout.pod_range(MOST_NODES), "10.250.94.0/24");
        assert!(layout.cable(MOST_NODES).len() <= 15);
        Ok(())
    }
}
