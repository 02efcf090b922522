//! nginx, Debian's, and LiteLLM, PyPI's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::{command, paths, toolchain, ui};

/// Of LiteLLM: the newest whose proxy can be installed; later ones name a package that PyPI has not.
const VERSION: &str = "1.108.7";

/// nginx's program.
///
/// # Errors
/// There is none, and Debian's cannot be fetched.
pub fn nginx() -> Result<PathBuf> {
    Ok(toolchain::unpacked("nginx", "nginx")?.join("nginx"))
}

/// LiteLLM's program, in an environment of its own: it names the exact versions of what it needs.
///
/// # Errors
/// Python or the packages cannot be had.
pub fn litellm() -> Result<PathBuf> {
    let folder = paths::cache()?.join("bench").join(format!("litellm-{VERSION}"));
    let program = folder.join("bin/litellm");
    if folder.join("complete").is_file() {
        return Ok(program);
    }
    toolchain::venv()?;
    let step = ui::step(format!("LiteLLM {VERSION}"));
    step.expect("about 100 MB, once");
    command::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    let mut pip = Command::new(folder.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]);
    command::run(pip.arg(format!("litellm[proxy]=={VERSION}")))?;
    fs::write(folder.join("complete"), VERSION)?;
    step.done("");
    Ok(program)
}

/// A plain proxy: connections to the worker are kept, pieces of an answer go on as they come.
pub fn nginx_conf(folder: &Path, port: u16, worker: &str) -> String {
    let folder = folder.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("  {name}_temp_path {folder}/{name};\n"))
        .concat();
    // One process: with a master its one worker would be another user, who cannot read the folder.
    format!(
        "daemon off;\nmaster_process off;\nworker_rlimit_nofile 16384;\npid {folder}/nginx.pid;\nerror_log stderr warn;\n\
         events {{ worker_connections 8192; }}\nhttp {{\n  access_log off;\n{temporary}\
         \x20 upstream worker {{ server {worker}; keepalive 2048; keepalive_requests 1000000000; }}\n\
         \x20 server {{\n    listen 127.0.0.1:{port};\n    keepalive_requests 1000000000;\n    location / {{\n\
         \x20     proxy_pass http://worker;\n      proxy_http_version 1.1;\n      proxy_set_header Connection \"\";\n\
         \x20     proxy_buffering off;\n    }}\n  }}\n}}\n"
    )
}

/// These models, one key, no database.
pub fn litellm_conf(models: &[&str], worker: &str, key: &str) -> String {
    let model = |name: &&str| {
        format!(
            "  - model_name: {name}\n    litellm_params: {{model: openai/{name}, api_base: \"http://{worker}/v1\", api_key: none}}\n"
        )
    };
    let models: String = models.iter().map(model).collect();
    format!("model_list:\n{models}general_settings: {{master_key: {key}}}\n")
}
