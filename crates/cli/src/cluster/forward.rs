//! A port of this machine that leads to a pod, with the user's own rights (`pods/portforward`).
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use tokio::net::{TcpListener, TcpStream};

use super::refused;
use crate::failure::{Done, Problem};
use crate::output::note;

/// Opens a free port of localhost; it is open as long as the returned guard lives.
///
/// # Errors
/// No port is free, or the user may not forward to the pod.
pub async fn open(api: Api<Pod>, pod: String, port: u16) -> Done<(u16, Guard)> {
    // Asked once before anyone waits, so that a refusal is told with its cause.
    let first = api
        .portforward(&pod, &[port])
        .await
        .map_err(|error| refused(&format!("forward to pod {pod}"), &error))?;
    first.abort();
    let internal = |error: std::io::Error| {
        Problem::transient("InputOutput", format!("no port of this machine: {error}"))
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(internal)?;
    let local = listener.local_addr().map_err(internal)?.port();
    let task = tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let (api, pod) = (api.clone(), pod.clone());
            tokio::spawn(async move {
                if let Err(problem) = carry(connection, &api, &pod, port).await {
                    note(&format!("lathe: {problem}"));
                }
            });
        }
    });
    Ok((local, Guard(task)))
}

/// Closes the port when it is dropped.
pub struct Guard(tokio::task::JoinHandle<()>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn carry(mut here: TcpStream, api: &Api<Pod>, pod: &str, port: u16) -> Done<()> {
    let doing = format!("forward to pod {pod}");
    let mut forward = api.portforward(pod, &[port]).await.map_err(|error| refused(&doing, &error))?;
    let Some(mut there) = forward.take_stream(port) else { return Ok(()) };
    // Either side may leave first.
    let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
    Ok(())
}
