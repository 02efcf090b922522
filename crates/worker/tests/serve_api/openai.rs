//! OpenAI's own Python client against this server (`tests/python/openai_client.py`).
use std::path::PathBuf;

use crate::model;
use crate::server::{launch_in, volume};

/// The environment that `tests/python/setup.py` makes.
fn python() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let python = cache.expect("a home").join("lathe/venv/bin/python");
    assert!(python.exists(), "{} is missing; run: python3 tests/python/setup.py", python.display());
    python
}

#[tokio::test]
async fn the_python_client_is_content() {
    let folder = tempfile::tempdir().expect("a folder");
    model::write_model(&volume(folder.path()).join("base"), 1, &[]);
    model::write_adapter(&volume(folder.path()).join("a"), 1, 32);
    let server = launch_in(folder, |_, task| {
        task.context_length = 256;
        task.adapters = vec![crate::server::adapter("team/tuned", "a")];
    })
    .await;
    server.until_ready().await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/python/openai_client.py");
    let output = tokio::process::Command::new(python())
        .args([script, &format!("{}/v1", server.base)])
        .env_remove("HTTP_PROXY")
        .env_remove("http_proxy")
        .output()
        .await
        .expect("Python runs");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(told.contains("all is well"), "{told}");
}
