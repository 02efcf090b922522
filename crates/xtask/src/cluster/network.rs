//! One bridge on the host with a cable to every node, and routes to pods and services.
//!
//! Nothing else of the host's network is touched: no address translation, no forwarding, no firewall
//! rule. So pods reach each other and the host, and nothing beyond it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use super::layout::{Layout, SUBNETS};
use crate::command::run;

/// The first `10.S.0.0/16` that no route of the host touches.
///
/// # Errors
/// All of them are taken.
pub fn free_subnet() -> Result<u8> {
    let routes = run(Command::new("ip").args(["-4", "route", "show", "table", "all"]))?;
    match first_free(&routes) {
        Some(subnet) => Ok(subnet),
        None => bail!(
            "every network from 10.{}.0.0/16 to 10.{}.0.0/16 is in use: remove a cluster by \
             `cargo xtask cluster down --name NAME`",
            SUBNETS.start(),
            SUBNETS.end()
        ),
    }
}

fn first_free(routes: &str) -> Option<u8> {
    SUBNETS.into_iter().find(|subnet| {
        let prefix = format!("10.{subnet}.");
        !routes.split_whitespace().any(|word| word.starts_with(&prefix))
    })
}

/// Makes the bridge, with the host's address on it.
///
/// # Errors
/// `ip` refuses: usually for want of root.
pub fn bridge(layout: &Layout) -> Result<()> {
    let bridge = layout.bridge();
    if !exists(&bridge) {
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        let address = format!("{}/24", layout.host_address());
        ip(&["address", "add", &address, "dev", &bridge])?;
        mark(layout, &bridge)?;
    }
    ip(&["link", "set", &bridge, "up"])
}

/// Plugs a node in: a cable to the bridge, and routes from the host and from all other nodes.
///
/// # Errors
/// `ip` refuses.
pub fn plug(layout: &Layout, node: u32, holders: &[(u32, u32)], inside: u32) -> Result<()> {
    let (bridge, cable) = (layout.bridge(), layout.cable(node));
    let address = layout.node_address(node).to_string();
    if !exists(&cable) {
        let holder = inside.to_string();
        let far_end = ["peer", "name", "eth0", "netns", &holder];
        ip(&[&["link", "add", &cable, "type", "veth"], &far_end[..]].concat())?;
        mark(layout, &cable)?;
        ip_inside(inside, &["address", "add", &format!("{address}/24"), "dev", "eth0"])?;
        ip_inside(inside, &["link", "set", "eth0", "up"])?;
        let host = layout.host_address().to_string();
        ip_inside(inside, &["route", "add", "default", "via", &host])?;
    }
    ip(&["link", "set", &cable, "master", &bridge, "up"])?;
    ip(&["route", "replace", &layout.pod_range(node), "via", &address])?;
    if node == 1 {
        // Any node could translate service addresses; the first is always there.
        ip(&["route", "replace", &layout.services(), "via", &address])?;
    }
    for (other, other_inside) in holders.iter().filter(|(other, _)| *other != node) {
        let other_address = layout.node_address(*other).to_string();
        let theirs = layout.pod_range(*other);
        ip_inside(inside, &["route", "replace", &theirs, "via", &other_address])?;
        let ours = layout.pod_range(node);
        ip_inside(*other_inside, &["route", "replace", &ours, "via", &address])?;
    }
    Ok(())
}

/// Removes the bridge and the cables and, with them, every route through them.
///
/// # Errors
/// `ip` refuses.
pub fn remove(layout: &Layout) -> Result<()> {
    let devices = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    for device in devices.map(|device| device.path()) {
        let alias = fs::read_to_string(device.join("ifalias")).unwrap_or_default();
        let name = device.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if Path::new(alias.trim_end()) == layout.folder {
            let removed = ip(&["link", "delete", name]);
            // A cable goes by itself soon after the last process of its node.
            if device.exists() {
                removed?;
            }
        }
    }
    Ok(())
}

/// Writes on a device whose it is, so that it is found even when the cluster's folder is lost.
fn mark(layout: &Layout, device: &str) -> Result<()> {
    ip(&["link", "set", "dev", device, "alias", &layout.folder.display().to_string()])
}

fn exists(device: &str) -> bool {
    Path::new("/sys/class/net").join(device).exists()
}

fn ip(args: &[&str]) -> Result<()> {
    run(Command::new("ip").args(args)).map(drop)
}

fn ip_inside(pid: u32, args: &[&str]) -> Result<()> {
    let mut command = Command::new("nsenter");
    command.args(["--target", &pid.to_string(), "--net", "--", "ip"]);
    run(command.args(args)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_in_use_is_passed_over() {
        let routes = "default via 10.0.0.1 dev eth0\n10.201.0.0/24 dev x src 10.201.0.1\n\
                      local 10.202.128.1 dev lo\n";
        assert_eq!(first_free(routes), Some(203));
        assert_eq!(first_free("10.20.1.0/24 dev x"), Some(201));
    }
}
