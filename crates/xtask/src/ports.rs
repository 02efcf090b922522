//! Ports for what is started on this machine.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::Result;

/// Ports of the loopback that were free a moment ago.
///
/// # Errors
/// No port is free.
pub fn free<const N: usize>() -> Result<[u16; N]> {
    // All at once, so that they differ.
    let listeners = [(); N].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(listeners) {
        *port = listener?.local_addr()?.port();
    }
    Ok(ports)
}
