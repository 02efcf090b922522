//! An API server with one service in it, so that the gateway finds the stub as it finds workers: lists, and watches in which nothing
//! happens. Processor time of a real one would fall on the cores that are measured.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread::spawn;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// The service's namespace, which is the key's.
pub const NAMESPACE: &str = "bench";
/// Longest body of a request that is read.
const MAX_BODY: u64 = 1 << 20;

/// Serves for as long as this program runs. Returns its URL.
///
/// # Errors
/// No port is free.
pub fn serve(worker: Ipv4Addr, port: u16, model: &str, adapter: &str) -> Result<String> {
    let objects =
        [("inferenceservices", service(model, adapter)), ("endpointslices", endpoints(worker, port, model))];
    let lists: HashMap<&str, Value> = objects.into();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let url = format!("http://{}", listener.local_addr()?);
    spawn(move || {
        for stream in listener.incoming().flatten() {
            let lists = lists.clone();
            // Whoever breaks off asks again.
            spawn(move || drop(converse(&stream, &lists)));
        }
    });
    Ok(url)
}

fn converse(stream: &TcpStream, lists: &HashMap<&str, Value>) -> Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split(' ');
        let (method, url) = (words.next().unwrap_or_default().to_owned(), words.next().context("no path")?);
        let url = url.to_owned();
        let mut length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            match line.trim_end().to_ascii_lowercase().split_once(':') {
                Some(("content-length", value)) => length = value.trim().parse()?,
                Some(_) => {}
                None => break,
            }
        }
        let mut body = Vec::new();
        Read::by_ref(&mut reader).take(length.min(MAX_BODY)).read_to_end(&mut body)?;
        let mut writer = stream;
        if url.contains("watch=true") {
            writer.write_all(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
            )?;
            continue;
        }
        let (status, said) = answer(&method, &url, &body, lists);
        let said = said.to_string();
        write!(
            writer,
            "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{said}",
            said.len()
        )?;
    }
}

/// The list of a kind, nothing where an object is named, and to whoever writes what was written.
fn answer(method: &str, url: &str, body: &[u8], lists: &HashMap<&str, Value>) -> (u16, Value) {
    let path = url.split('?').next().unwrap_or_default();
    let kind = path.rsplit('/').next().unwrap_or_default();
    match (method, lists.get(kind)) {
        ("GET", Some(object)) => (200, list(&[object])),
        ("GET", None) if path.contains("/namespaces/") => (
            404,
            json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}),
        ),
        ("GET", None) => (200, list(&[])),
        _ => {
            let mut written: Value = serde_json::from_slice(body).unwrap_or_default();
            written["metadata"]["resourceVersion"] = json!("2");
            (200, written)
        }
    }
}

fn list(items: &[&Value]) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": items})
}

fn service(model: &str, adapter: &str) -> Value {
    json!({
        "apiVersion": "lathe.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {
            "namespace": NAMESPACE, "name": model, "uid": "00000000-0000-4000-8000-000000000001", "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"modelRef": {"name": "base"}, "adapterRefs": [{"name": adapter}]},
        "status": {"observedGeneration": 1, "modelIds": [model, adapter]},
    })
}

fn endpoints(worker: Ipv4Addr, port: u16, model: &str) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "namespace": NAMESPACE, "name": format!("{model}-1"), "resourceVersion": "1",
            "labels": {"kubernetes.io/service-name": model, "lathe.dev/kind": "inferenceservice"},
        },
        "endpoints": [{"addresses": [worker], "conditions": {"ready": true}}],
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::ask;
    use std::time::Duration;

    #[test]
    fn kinds_are_listed_names_are_not_found_and_what_is_written_is_said_again() -> Result<()> {
        let url = serve(Ipv4Addr::new(127, 0, 0, 9), 8080, "fast", "paced")?;
        let agent = ask::agent(Duration::from_secs(20));
        let services =
            ask::get(&agent, &format!("{url}/apis/lathe.dev/v1alpha1/inferenceservices?limit=500"))?;
        assert_eq!(services["items"][0]["status"]["modelIds"], json!(["fast", "paced"]));
        let slices = ask::get(&agent, &format!("{url}/apis/discovery.k8s.io/v1/endpointslices"))?;
        assert_eq!(slices["items"][0]["endpoints"][0]["addresses"][0], "127.0.0.9");
        assert_eq!(ask::get(&agent, &format!("{url}/apis/lathe.dev/v1alpha1/models"))?["items"], json!([]));
        assert!(ask::get(&agent, &format!("{url}/api/v1/namespaces/x/configmaps/y")).is_err());
        let sent =
            agent.put(format!("{url}/api/v1/namespaces/x/configmaps/y")).send(r#"{"data":{"a":"b"}}"#)?;
        let said: Value = serde_json::from_str(&sent.into_body().read_to_string()?)?;
        assert_eq!(said, json!({"data": {"a": "b"}, "metadata": {"resourceVersion": "2"}}));
        Ok(())
    }
}
